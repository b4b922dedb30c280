"""Posterior of equally weighted weight sets: particles, an ensemble, one mode."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_lora.curvature.joint_distribution import sample_jointly
from pyro_lora.ground.settings import check_count, check_kind
from pyro_lora.ground.summary import brief, weights_facts
from pyro_lora.ground.weights import Weights, check_weights, handing_out_copies, itself
from pyro_lora.lifting.lifted_network import LiftedNetwork, check_lora
from pyro_lora.lifting.saved_adapter import read_adapter
from pyro_lora.likelihood.model_trace import Model
from pyro_lora.posteriors.marginals import Levels, as_given, checked_levels
from pyro_lora.posteriors.prior import networks_prior
from pyro_lora.posteriors.shared import Shared
from pyro_lora.priors import Prior

Member = Mapping[str, Tensor] | str | os.PathLike[str]


@handing_out_copies("particles")
@dataclass(frozen=True, eq=False, repr=False)
class ParticlePosterior(Shared):
    """Equally weighted weight sets; a Pyro guide that draws one of them.

    Particles have no density, so :meth:`mode` and :meth:`log_prob` raise; use the
    guide in ``Predictive``, not in an ELBO.

    Attributes:
        particles: Site -> (K, ...), a copy each time it is read.
        networks: The lifted networks in the model.
        model: The Pyro model; None where the posterior was loaded without one.
        obs_site: The likelihood's site, None for the only one.
        fit_arguments: Those that the training's batches gave to the model, where known.
    """

    particles: Weights
    networks: tuple[LiftedNetwork, ...]
    model: Model | None
    obs_site: str | None
    fit_arguments: frozenset[str] | None = None

    _particles = itself("particles")  # a copy of all is K times the adapter

    def __call__(self, *args: Any, **kwargs: Any) -> Weights:
        """Sample the sites: one particle, whatever the model's arguments."""
        like = {site: value[0] for site, value in self._particles.items()}
        return sample_jointly(self, like, self.networks)

    def _facts(self) -> dict[str, str]:
        return {
            "num_particles": str(self.num_particles),
            **weights_facts(self._particles, lead=1),
            "prior": brief(self.prior),
            "obs_site": brief(self.obs_site),
            "model": brief(self.model),
        }

    @property
    def prior(self) -> Prior:
        """The prior of the networks."""
        return networks_prior(self.networks)

    @property
    def num_particles(self) -> int:
        """K."""
        return len(next(iter(self._particles.values())))

    @property
    def num_samples(self) -> int:
        """K: each of them once says it all."""
        return self.num_particles

    def gaussians(self) -> list[tuple[float, Any]]:
        """None: points have no width."""
        return []

    def sample(self, num_samples: int) -> Weights:
        """Particles, site -> value with a leading (S,).

        S = K gives each once, in order; fewer are drawn without replacement, more
        with.

        Raises:
            ValueError: If S isn't positive.
        """
        check_count("num_samples", num_samples)
        device = next(iter(self._particles.values())).device
        if num_samples == self.num_particles:
            index = torch.arange(num_samples, device=device)
        elif num_samples < self.num_particles:  # a repeated one would say nothing new
            index = torch.randperm(self.num_particles, device=device)[:num_samples]
        else:
            index = torch.randint(self.num_particles, (num_samples,), device=device)
        return {site: value[index] for site, value in self._particles.items()}

    def mean(self) -> Weights:
        """The particles' mean, each of its site's shape."""
        return {site: value.mean(0) for site, value in self._particles.items()}

    def variance(self) -> Weights:
        """Marginal variances over the particles, each of its site's shape."""
        return {s: x.var(0, correction=0) for s, x in self._particles.items()}

    def median(self) -> Weights:
        """The particles' median, each of its site's shape."""
        return self.quantiles(0.5)

    def quantiles(self, quantiles: Levels) -> Weights:
        """Empirical quantiles of each weight, linear between two particles.

        Args:
            quantiles: Between 0 and 1: one, or Q of them.

        Returns:
            Site -> value of the site's shape, for several with a leading (Q,).

        Raises:
            TypeError: If they are no numbers.
            ValueError: If one isn't between 0 and 1.
        """
        levels = checked_levels(quantiles)
        values: Weights = {}
        for site, particles in self._particles.items():
            x = particles.sort(0).values  # torch.quantile takes 16 million numbers
            places = [q * (self.num_particles - 1) for q in levels]
            values[site] = torch.stack(
                [x[math.floor(p)].lerp(x[math.ceil(p)], p % 1) for p in places]
            )
        return as_given(values, quantiles)

    def mode(self) -> Weights:
        """Not defined.

        Raises:
            ValueError: Always.
        """
        raise ValueError("Particles have no mode. Use .sample or .particles.")

    def log_prob(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Not defined.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "Particles have no density. For one, put a Laplace approximation at each "
            "particle and mix them by MixturePosterior."
        )


def ensemble(
    lora: LiftedNetwork,
    members: Sequence[Member],
    *,
    model: Model | None = None,
    obs_site: str | None = None,
) -> ParticlePosterior:
    r"""Equally weighted members, :math:`q(w) = \frac1K \sum_k \delta(w - w_k)`.

    ``ensemble(lora, [posterior.origin()])`` is the network at a Laplace posterior's
    mode, or where it was before it was refined;
    ``ensemble(lora, [lora.weights()])`` is the adapter as it is; folders of adapters
    that were trained from different seeds are a deep ensemble (Lakshminarayanan et al.
    2017, https://arxiv.org/abs/1612.01474).

    Args:
        lora: The lifted network.
        members: For each member a weight set, as of ``lora.weights()``, with the values
            of the model's other latent sites where there are any; or a folder that
            PEFT's ``save_pretrained`` wrote, of an adapter with the same configuration.
        model: The Pyro model, where something needs it.
        obs_site: The likelihood's site, None for the only one.

    Returns:
        A guide; the network's own weights are as before.

    Raises:
        ValueError: If there are no members, one doesn't have the network's sites and
            shapes or the first member's, or a folder doesn't fit the network.
    """
    if isinstance(members, Mapping | str | os.PathLike):
        raise ValueError(
            f"members must be a list of weight sets or folders, found a "
            f"{type(members).__name__}. Put it into a list."
        )
    check_lora(lora)
    check_kind("members", members, Sequence, "a list of weight sets or folders")
    for index, member in enumerate(members):
        if not isinstance(member, str | os.PathLike):
            check_weights(member, f"Member {index}")
    if not members:
        raise ValueError("An ensemble needs at least one member; found none.")
    weights = [
        read_adapter(lora, member) if isinstance(member, str | os.PathLike) else member
        for member in members
    ]
    # Lifted sites have the network's shapes, other latents those of the first member.
    shapes = {site: x.shape for site, x in weights[0].items()}
    shapes |= {site: x.shape for site, x in lora.zeros().items()}
    for index, member in enumerate(weights):
        for site in sorted(shapes.keys() | member.keys()):
            expected = shapes.get(site)
            shape = member[site].shape if site in member else None
            if shape != expected:
                raise ValueError(
                    f"Member {index}, site {site!r}: expected "
                    f"{_named(expected)}, found {_named(shape)}. Members are weight "
                    "sets of one model, without leading dims: pick draws one by one."
                )
    device = next(iter(lora.zeros().values())).device
    stacked = {
        site: torch.stack([m[site].detach().to(device) for m in weights])
        for site in shapes
    }
    return ParticlePosterior(stacked, (lora,), model, obs_site)


def _named(shape: torch.Size | None) -> str:
    return "no such site" if shape is None else f"shape {tuple(shape)}"
