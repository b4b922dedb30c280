r"""Repulsion between the updates B A that particles make, not between their factors.

Weights, where LoRA's count as the updates :math:`\Delta W = s B A` of layers. Inner
products of updates are traces of (R, R) matrices,

.. math:: \langle B_i A_i, B_j A_j \rangle = \mathrm{tr}\,[(B_i^T B_j) (A_j A_i^T)],

and nothing of a layer's own size is formed. All other weights count as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_lora.ground.autocast import outside_autocast
from pyro_lora.ground.weights import Weights
from pyro_lora.infer.svgd import weight_space
from pyro_lora.infer.svgd.particle_model import ParticleModel, ParticlePass
from pyro_lora.infer.svgd.weight_space import (
    Direction,
    KernelSpace,
    Scores,
)
from pyro_lora.lifting.lifted_network import LiftedNetwork

# B (K, L, O, R) and A (K, L, R, I) of layers that are alike, in float64.
Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class DeltaSpace(KernelSpace):
    """All weights, LoRA's by their updates: turning the factors is no distance."""

    def check(self, target: ParticleModel) -> None:
        """Refuse a model without updates.

        Raises:
            ValueError: If no latent site is a factor of one.
        """
        if not target.factor_sites:
            raise ValueError(
                "A kernel over 'delta' compares the updates B A of LoRA layers, and "
                f"none of the sites {sorted(target.latents)} is a factor of one. Use "
                "space='joint'."
            )

    def move(self, at: ParticlePass, scores: Scores, temperature: float) -> Direction:
        """Direction where the scores are known."""
        networks = at.target.networks
        gram, slope = weight_space.gram_and_slope(
            self.kernel, squared_distances(networks, at.particles)
        )
        pull, _ = self.transport.weights(gram, slope, scores.repulsion)
        attractions = {
            s: weight_space.attract(x / temperature, pull)
            for s, x in scores.by_site.items()
        }
        with torch.enable_grad():
            leaves = {s: x.detach().requires_grad_() for s, x in at.particles.items()}
            updates = _factors(networks, leaves)

        def gradients(coefficients: Tensor, others: slice) -> tuple[Tensor, ...]:
            fixed = [(b[others], a[others]) for b, a in updates]
            return _gradients(leaves, updates, fixed, coefficients)

        pushes = self.transport.repulsions(gram, slope, scores.repulsion, gradients)
        repulsions = dict(zip(leaves, pushes, strict=True))
        return Direction(
            {s: x + repulsions[s] for s, x in attractions.items()},
            scores.log_joint,
            scores.nll,
            weight_space.norm(attractions),
            weight_space.norm(repulsions),
            weight_space.mean_off_diagonal(gram),
        )


def squared_distances(networks: Sequence[LiftedNetwork], particles: Weights) -> Tensor:
    """Squared distances between particles, (K, K), zero on the diagonal.

    Args:
        networks: The lifted networks in the model.
        particles: Site -> (K, ...).
    """
    factors = _factors(networks, {s: x.detach() for s, x in particles.items()})
    gram = _summed([_products(one, one) for one in factors])
    return weight_space.distances_from_products(gram)


def spread(networks: Sequence[LiftedNetwork], particles: Weights) -> Tensor:
    """Root mean square distance of the particles from their mean, a scalar.

    Args:
        networks: The lifted networks in the model.
        particles: Site -> (K, ...).
    """
    # The mean over pairs of |x_i - x_j|^2 is twice that of |x_i - mean|^2.
    return (squared_distances(networks, particles).mean() / 2).sqrt()


def _factors(networks: Sequence[LiftedNetwork], particles: Weights) -> list[Factors]:
    """Those of all updates; a weight outside of them is a B, its A is 1."""
    factors, inside = list[Factors](), set[str]()
    for lora in networks:
        own = {site: particles[site] for site in lora.sites}
        factors += lora.stacked_weight_factors(own)
        inside |= lora.factor_sites
    for site, x in particles.items():
        if site not in inside:
            b = x.reshape(len(x), 1, -1, 1)
            factors.append((b, x.new_ones(1, 1, 1)))
    num = len(next(iter(particles.values())))
    return [
        part
        for b, a in factors
        for part in _in_blocks(
            b.double().expand(num, *b.shape[-3:]), a.double().expand(num, *a.shape[-3:])
        )
    ]


def _in_blocks(b: Tensor, a: Tensor) -> Iterator[Factors]:
    """As many layers at a time as have (K R)^2 products that fit into a block."""
    size = weight_space.block_size(b) // (len(b) * b.shape[-1]) ** 2
    layers = max(1, size)
    yield from zip(b.split(layers, 1), a.split(layers, 1), strict=True)


@outside_autocast()
def _products(x: Factors, y: Factors) -> Tensor:
    """Inner products of updates, (K, K')."""
    left = torch.einsum("knor,lnos->klnrs", x[0], y[0])  # B_k^T B_l
    right = torch.einsum("knri,lnsi->klnrs", x[1], y[1])  # A_k A_l^T
    return (left * right).sum((-3, -2, -1))


@outside_autocast()
def _squared_norms(x: Factors) -> Tensor:
    b, a = x
    return ((b.mT @ b) * (a @ a.mT)).sum((-3, -2, -1))  # (K,)


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
            # |X - Y|^2 = |X|^2 + |Y|^2 - 2 <X, Y>
            norms = _squared_norms(one)[:, None] + _squared_norms(other)
            distances.append(norms - 2 * _products(one, other))
        total = (coefficients.to(distances[0]) * _summed(distances)).sum()
    return torch.autograd.grad(total, list(leaves.values()), retain_graph=True)
