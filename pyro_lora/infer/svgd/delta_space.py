"""Repulsion between the updates B A that particles make, not between their factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_lora.ground.weights import Weights
from pyro_lora.infer.svgd import transport
from pyro_lora.lifting.lifted_network import LiftedNetwork

Factors = tuple[Tensor, Tensor]  # B (K, O, R) and A (K, R, I), in float64


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
        factors = self._factors({s: x.detach() for s, x in particles.items()})
        gram = _summed([_products(one, one) for one in factors])
        return transport.distances_from_products(gram)

    def spread(self, particles: Weights) -> Tensor:
        """Root mean square distance of the particles from their mean, a scalar.

        Args:
            particles: Site -> (K, ...).
        """
        # The mean over pairs of |x_i - x_j|^2 is twice that of |x_i - mean|^2.
        return (self.squared_distances(particles).mean() / 2).sqrt()

    def stein_repulsion(self, particles: Weights, slope: Tensor) -> dict[str, Tensor]:
        r"""The second term of SVGD, :math:`\frac1K \sum_j \nabla_{x_j} k(x_j, x_i)`.

        Args:
            particles: Site -> (K, ...).
            slope: Derivative of the kernel in the squared distance, (K, K).

        Returns:
            Site -> (K, ...).
        """
        num_particles = slope.shape[0]
        leaves, factors = self._leaves(particles)
        rows = []
        for i in range(num_particles):
            one = [(b[i : i + 1], a[i : i + 1]) for b, a in factors]
            gradients = _gradients(leaves, factors, one, slope[:, i : i + 1])
            rows.append([g.sum(0) / num_particles for g in gradients])
        return {
            s: torch.stack(x)
            for s, x in zip(leaves, zip(*rows, strict=True), strict=True)
        }

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
        leaves, factors = self._leaves(particles)
        gradients = _gradients(leaves, factors, factors, share)
        return {s: -g for s, g in zip(leaves, gradients, strict=True)}

    @torch.enable_grad()
    def _leaves(self, particles: Weights) -> tuple[dict[str, Tensor], list[Factors]]:
        leaves = {s: x.detach().requires_grad_() for s, x in particles.items()}
        return leaves, self._factors(leaves)

    def _factors(self, particles: Weights) -> list[Factors]:
        """Those of all updates; a weight outside of them is a B, its A is 1."""
        found, inside = [], set[str]()
        for lora in self.networks:
            own = {site: particles[site] for site in lora.sites}
            found += list(lora.delta_weight_factors(own).values())
            inside |= lora.factor_sites
        for site in particles:
            if site in inside:
                continue
            x = particles[site]
            found.append((x.reshape(len(x), -1, 1), x.new_ones(len(x), 1, 1)))
        return [(b.double(), a.double()) for b, a in found]


def _products(x: Factors, y: Factors) -> Tensor:
    """Inner products of updates, (K, K')."""
    left = torch.einsum("kor,los->klrs", x[0], y[0])
    right = torch.einsum("kri,lsi->klrs", x[1], y[1])
    return (left * right).sum((-2, -1))


def _squared_norms(x: Factors) -> Tensor:
    b, a = x
    return ((b.mT @ b) * (a @ a.mT)).sum((-2, -1))  # (K,)


def _summed(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([x.to(values[0].device) for x in values]).sum(0)


def _gradients(
    leaves: Weights,
    x: Sequence[Factors],
    y: Sequence[Factors],
    coefficients: Tensor,
) -> tuple[Tensor, ...]:
    """Gradient of sum_kj c_kj d^2(x_k, y_j) in the leaves of x, where y is constant."""
    with torch.enable_grad():
        distances = []
        for one, (b, a) in zip(x, y, strict=True):
            other = b.detach(), a.detach()
            norms = _squared_norms(one)[:, None] + _squared_norms(other)
            distances.append(norms - 2 * _products(one, other))
        total = (coefficients.to(distances[0]) * _summed(distances)).sum()
    return torch.autograd.grad(total, list(leaves.values()), retain_graph=True)
