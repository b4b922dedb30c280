"""Posterior of equally weighted particles, as a Pyro guide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_lora.ground.weights import Weights
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood.model_trace import Model
from pyro_lora.posteriors.joint_distribution import check_num_samples, sample_jointly


@dataclass(frozen=True, eq=False)
class ParticlePosterior:
    """Equally weighted weight sets; a Pyro guide that draws one of them.

    Particles have no density, so :meth:`mode` and :meth:`log_prob` raise; use the
    guide in ``Predictive``, not in an ELBO.

    Attributes:
        particles: Site -> (K, ...).
        loras: The lifted networks in the model.
        model: The Pyro model; None where the posterior was loaded without one.
        obs_site: The likelihood's site, None for the only one.
    """

    particles: Weights
    loras: tuple[LiftedNetwork, ...]
    model: Model | None
    obs_site: str | None

    def __call__(self, *args: Any, **kwargs: Any) -> Weights:
        """Sample the sites: one particle, whatever the model's arguments."""
        like = {site: value[0] for site, value in self.particles.items()}
        return sample_jointly(self, like, self.loras)

    @property
    def prediction_method(self) -> Literal["sample"]:
        """How to predict: by running the network at draws."""
        return "sample"

    @property
    def num_particles(self) -> int:
        """K."""
        return next(iter(self.particles.values())).shape[0]

    def sample(self, num_samples: int) -> Weights:
        """Particles, site -> value with a leading (S,).

        S = K gives each once, in order; fewer are drawn without replacement, more
        with.

        Raises:
            ValueError: If S isn't positive.
        """
        check_num_samples(num_samples)
        device = next(iter(self.particles.values())).device
        if num_samples == self.num_particles:
            index = torch.arange(num_samples, device=device)
        elif num_samples < self.num_particles:
            index = torch.randperm(self.num_particles, device=device)[:num_samples]
        else:
            index = torch.randint(self.num_particles, (num_samples,), device=device)
        return {site: value[index] for site, value in self.particles.items()}

    def mean(self) -> Weights:
        """The particles' mean, each of its site's shape."""
        return {site: value.mean(0) for site, value in self.particles.items()}

    def variance(self) -> Weights:
        """Marginal variances over the particles, each of its site's shape."""
        return {s: x.var(0, correction=0) for s, x in self.particles.items()}

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
