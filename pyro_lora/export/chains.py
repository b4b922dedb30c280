"""Draws of any posterior, chain by chain and a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from pyro.infer import MCMC
from torch import Tensor

from pyro_lora.ground.settings import check_count
from pyro_lora.ground.weights import Weights
from pyro_lora.likelihood.model_trace import Batch
from pyro_lora.posteriors.mixture_posterior import MixturePosterior
from pyro_lora.posteriors.particle_posterior import ParticlePosterior
from pyro_lora.posteriors.posterior import Guide
from pyro_lora.predict.draws import LORA_POSTERIORS, draw_weights

DEFAULT_NUM_SAMPLES = 100  # PSIS needs 25; quantiles want a few more

Samples = Mapping[str, Tensor]  # site -> (chain, draw, ...)


@dataclass(frozen=True)
class Some:
    """A few draws of every chain.

    Attributes:
        weights: Site -> (S, ...), one chain after another.
        component: Of a mixture, each draw's, (S,); else None.
    """

    weights: Weights
    component: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Chains:
    """Draws of a posterior that needn't be in memory together.

    Attributes:
        num_chains: Independent chains; 1 where the draws are independent.
        num_draws: Of each chain.
        take: The draws from start to stop of every chain, asked for in order.
        diverging: Of NUTS, (chain, draw); else None.
    """

    num_chains: int
    num_draws: int
    take: Callable[[int, int], Some] = field(repr=False)
    diverging: Tensor | None = None


def chains_of(
    posterior: Guide | MCMC | Samples, num_samples: int | None, batch: Batch
) -> Chains:
    """The draws of a posterior.

    Args:
        posterior: One of ours, any Pyro guide, an ``MCMC`` that has run, or its
            samples by chain.
        num_samples: Draws of each chain; None is all that there are, or 100. Fewer
            than a Markov chain has are its last ones.
        batch: The arguments that a guide is called with.

    Returns:
        The chains.

    Raises:
        ValueError: If there are fewer draws, or samples don't fit each other.
    """
    if isinstance(posterior, MCMC):
        samples = posterior.get_samples(group_by_chain=True)
        chains = _of_samples(samples, num_samples)
        diverging = torch.zeros(next(iter(samples.values())).shape[:2])
        found = posterior.diagnostics().get("divergences", {})
        for chain, draws in enumerate(found.values()):
            diverging[chain, draws] = 1
        return Chains(
            chains.num_chains,
            chains.num_draws,
            chains.take,
            diverging[:, -chains.num_draws :].bool(),
        )
    if isinstance(posterior, Mapping):
        return _of_samples(posterior, num_samples)
    if num_samples is None:
        num_samples = DEFAULT_NUM_SAMPLES
        if isinstance(posterior, ParticlePosterior):
            num_samples = posterior.num_particles
    check_count("num_samples", num_samples)
    if isinstance(posterior, ParticlePosterior):
        particles = posterior.sample(num_samples)
        return Chains(1, num_samples, lambda a, b: Some(_slice(particles, a, b)))
    if isinstance(posterior, MixturePosterior):
        return Chains(1, num_samples, lambda a, b: _of_mixture(posterior, b - a))
    if isinstance(posterior, LORA_POSTERIORS):
        return Chains(1, num_samples, lambda a, b: Some(posterior.sample(b - a)))
    return Chains(
        1, num_samples, lambda a, b: Some(draw_weights(posterior, b - a, 1, batch))
    )


def _slice(weights: Mapping[str, Tensor], start: int, stop: int) -> Weights:
    return {site: value[start:stop] for site, value in weights.items()}


def _of_samples(samples: Samples, num_samples: int | None) -> Chains:
    leads = {tuple(value.shape[:2]) for value in samples.values()}
    if len(leads) != 1 or len(next(iter(leads))) != 2:
        raise ValueError(
            "Samples should be site -> (chain, draw, ...), as MCMC.get_samples("
            f"group_by_chain=True) gives them; found the leading dims {sorted(leads)}."
        )
    ((num_chains, length),) = leads
    num_draws = length if num_samples is None else num_samples
    if not 1 <= num_draws <= length:
        raise ValueError(
            f"num_samples is {num_draws}, but each chain has {length} draws."
        )
    first = length - num_draws

    def take(start: int, stop: int) -> Some:
        some = slice(first + start, first + stop)
        return Some({s: x[:, some].flatten(0, 1) for s, x in samples.items()})

    return Chains(num_chains, num_draws, take)


def _of_mixture(posterior: MixturePosterior, num: int) -> Some:
    component = torch.multinomial(posterior.weights, num, replacement=True)
    parts = []
    for index, of_part in enumerate(posterior.components):
        count = int((component == index).sum())
        if count > 0:
            parts.append(of_part.sample(count))
    place = component.argsort(stable=True).argsort()
    weights = {s: torch.cat([part[s] for part in parts])[place] for s in parts[0]}
    return Some(weights, component)
