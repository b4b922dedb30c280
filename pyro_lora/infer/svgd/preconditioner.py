"""A Laplace posterior's precision as the metric in which particles move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pyro_lora.curvature.dense_gaussian import (
    DenseGaussian,
    flatten_weights,
    unflatten_weights,
)
from pyro_lora.curvature.latent_block import LatentBlock
from pyro_lora.curvature.mean_precision import mean_precision
from pyro_lora.curvature.weight_gaussian import WeightGaussian
from pyro_lora.ground.weights import Weights
from pyro_lora.infer.svgd.kernels import Space
from pyro_lora.infer.svgd.particle_model import ParticleModel


class Laplace(Protocol):
    """What a Laplace posterior has."""

    @property
    def gaussian(self) -> WeightGaussian:
        """Over the lifted sites."""
        ...

    @property
    def latents(self) -> LatentBlock | None:
        """Over other latent sites, unconstrained."""
        ...


@dataclass(frozen=True, eq=False)
class Preconditioner:
    """A precision P over all sites, in unconstrained space.

    Attributes:
        gaussian: That of the lifted sites.
        latents: Other latent sites -> a value of the unconstrained shape.
        precision: That of the other sites, (H, H).
    """

    gaussian: WeightGaussian
    latents: Weights
    precision: Tensor

    def times_precision(self, weights: Mapping[str, Tensor]) -> Weights:
        """P times each weight set, site -> (K, ...)."""
        found = self.gaussian.times_precision(weights)
        return {**found, **self._of_latents(weights, self.precision)}

    def times_covariance(self, weights: Mapping[str, Tensor]) -> Weights:
        """The inverse of P times each weight set, site -> (K, ...)."""
        found = self.gaussian.times_covariance(weights)
        return {**found, **self._of_latents(weights, self.precision.inverse())}

    def check(self, target: ParticleModel) -> None:
        """Refuse a model with other sites.

        Raises:
            ValueError: Naming the first site that differs.
        """
        like = {**self.gaussian.loc, **self.latents}
        expected = {site: tuple(x.shape) for site, x in like.items()}
        found = {site: tuple(x.shape) for site, x in target.latents.items()}
        for site in sorted(found.keys() | expected.keys()):
            if found.get(site) != expected.get(site):
                raise ValueError(
                    f"Site {site!r}: the preconditioner is for shape "
                    f"{expected.get(site)}, the model's site has {found.get(site)}. "
                    "Give a Laplace posterior of the same model."
                )

    def _of_latents(self, weights: Mapping[str, Tensor], matrix: Tensor) -> Weights:
        if not self.latents:
            return {}
        flat = flatten_weights(weights, self.latents)
        found = unflatten_weights(flat.to(matrix) @ matrix, self.latents)
        return {site: x.to(weights[site]) for site, x in found.items()}


def preconditioner(
    posteriors: Laplace | Sequence[Laplace], space: Space
) -> Preconditioner:
    """The mean precision of Laplace posteriors.

    Args:
        posteriors: One, or several (one at each particle) that are averaged.
        space: Of the kernel.

    Returns:
        The preconditioner.

    Raises:
        TypeError: If they aren't Laplace posteriors.
        ValueError: If they don't fit together or to the space, or there is none.
    """
    several = posteriors if isinstance(posteriors, Sequence) else [posteriors]
    if not several:
        raise ValueError("preconditioner: expected a Laplace posterior, found none.")
    for posterior in several:
        if not isinstance(getattr(posterior, "gaussian", None), WeightGaussian):
            raise TypeError(
                "preconditioner must be a Laplace posterior or a sequence of them, "
                f"found {type(posterior).__name__}. Take those in .components of a "
                "mixture."
            )
    if space not in ("joint", "site"):
        raise ValueError(
            f"A preconditioner is a metric for weights, and the kernel's space is "
            f"{space!r}. Use space='joint' or 'site'."
        )
    gaussian = mean_precision([posterior.gaussian for posterior in several])
    if space == "site" and isinstance(gaussian, DenseGaussian):
        raise ValueError(
            "The dense structure couples the sites, and the kernel's space is 'site'. "
            "Use space='joint', or structures.KFAC()."
        )
    blocks = [p.latents for p in several if p.latents is not None]
    if not blocks:
        return Preconditioner(gaussian, {}, torch.zeros(0, 0))
    if space == "site":
        raise ValueError(
            f"The latent sites {list(blocks[0].values)} have one precision together, "
            "and the kernel's space is 'site'. Use space='joint'."
        )
    latents = {s: blocks[0].transforms[s].inv(x) for s, x in blocks[0].values.items()}
    precision = torch.stack([block.precision for block in blocks]).mean(0)
    return Preconditioner(gaussian, latents, precision)
