"""Repulsion between the updates B A that particles make, not between their factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_lora.lifting.lifted_network import LiftedNetwork

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class DeltaSpace:
    r"""Weights, where LoRA's count as the updates :math:`\Delta W = s B A` of layers.

    Inner products of updates are traces of (R, R) matrices, :math:`\langle B_i A_i,
    B_j A_j \rangle = \mathrm{tr}\,[(B_i^T B_j) (A_j A_i^T)]`; nothing of a layer's own
    size is formed. All other weights count as they are.

    Attributes:
        networks: The lifted networks in the model.
    """

    networks: Sequence[LiftedNetwork]

    def squared_distances(self, particles: Weights) -> Tensor:
        """Squared distances between particles, (K, K), zero on the diagonal.

        Args:
            particles: Site -> (K, ...).
        """
        found = self._squared_distances(particles, particles).detach()
        return found - torch.diag_embed(found.diagonal())

    def stein_repulsion(self, particles: Weights, slope: Tensor) -> dict[str, Tensor]:
        r"""The second term of SVGD, :math:`\frac1K \sum_j \nabla_{x_j} k(x_j, x_i)`.

        Args:
            particles: Site -> (K, ...).
            slope: Derivative of the kernel in the squared distance, (K, K).

        Returns:
            Site -> (K, ...).
        """
        num_particles = slope.shape[0]
        rows = []
        for i in range(num_particles):
            one = {s: x[i : i + 1] for s, x in particles.items()}
            gradients = self._gradients(particles, one, slope[:, i : i + 1])
            rows.append({s: g.sum(0) / num_particles for s, g in gradients.items()})
        return {s: torch.stack([row[s] for row in rows]) for s in particles}

    def repel(
        self, particles: Weights, gram: Tensor, slope: Tensor
    ) -> dict[str, Tensor]:
        r"""Gradient of :math:`-\log \sum_j k(x_i, x_j)`, other particles held fixed.

        Args:
            particles: Site -> (K, ...).
            gram: (K, K).
            slope: Derivative of the kernel in the squared distance, (K, K).

        Returns:
            Site -> (K, ...).
        """
        share = slope / gram.sum(1, keepdim=True)
        return {s: -g for s, g in self._gradients(particles, particles, share).items()}

    def _gradients(
        self, x: Weights, y: Weights, coefficients: Tensor
    ) -> dict[str, Tensor]:
        """Gradient of sum_kj c_kj d^2(x_k, y_j) in x, where y is constant."""
        leaves = {s: value.detach().requires_grad_() for s, value in x.items()}
        fixed = {s: value.detach() for s, value in y.items()}
        with torch.enable_grad():
            distances = self._squared_distances(leaves, fixed)
            total = (coefficients.to(distances) * distances).sum()
        found = torch.autograd.grad(total, list(leaves.values()))
        return dict(zip(leaves, found, strict=True))

    def _squared_distances(self, x: Weights, y: Weights) -> Tensor:
        products = self._products(x, y)
        x_norms = self._products(x, x).diagonal()
        y_norms = self._products(y, y).diagonal()
        return (x_norms[:, None] + y_norms - 2 * products).clamp_min(0)

    def _products(self, x: Weights, y: Weights) -> Tensor:
        """Inner products, (K, K'), in float64: distances are small differences."""
        total = torch.zeros((), dtype=torch.float64)
        inside: set[str] = set()
        for lora in self.networks:
            own_x = {site: x[site] for site in lora.sites}
            own_y = {site: y[site] for site in lora.sites}
            other = lora.delta_weight_factors(own_y)
            for path, (b, a) in lora.delta_weight_factors(own_x).items():
                b_, a_ = other[path]
                left = torch.einsum("kor,los->klrs", b.double(), b_.double())
                right = torch.einsum("kri,lsi->klrs", a.double(), a_.double())
                total = total.to(b.device) + (left * right).sum((-2, -1))
            inside |= lora.factor_sites
        for site in x.keys() - inside:
            rows, columns = (p[site].double().reshape(len(p[site]), -1) for p in (x, y))
            total = total.to(rows.device) + rows @ columns.mT
        return total
