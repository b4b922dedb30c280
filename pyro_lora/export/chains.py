"""Draws of any posterior, chain by chain and a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from pyro.infer import MCMC
from torch import Tensor

from pyro_lora.ground.settings import check_count
from pyro_lora.ground.weights import Weights
from pyro_lora.posteriors.mixture_posterior import MixturePosterior
from pyro_lora.posteriors.posterior import Posterior

DEFAULT_NUM_SAMPLES = 100  # PSIS needs 25; quantiles want a few more

Samples = Mapping[str, Tensor]  # site -> (chain, draw, ...)


@dataclass(frozen=True)
class Draws:
    """A few draws of every chain.

    Attributes:
        weights: Site -> (S, ...), one chain after another.
        component: Of a mixture, each draw's, (S,); else None.
    """

    weights: Weights
    component: Tensor | None = None

    def __len__(self) -> int:
        """S."""
        return next(iter(self.weights.values())).shape[0]

    def of(self, component: int) -> Tensor:
        """The places of a component's draws."""
        if self.component is None:
            return torch.arange(len(self))
        return (self.component == component).nonzero()[:, 0]


@dataclass(frozen=True, eq=False)
class Chains:
    """Draws of a posterior that needn't be in memory together.

    Attributes:
        num_chains: Independent chains; 1 where the draws are independent.
        num_draws: Of each chain.
        take: The draws from start to stop of every chain, asked for in order.
        components: What the draws are of: a mixture's components, else the posterior
            itself; empty where there are draws alone.
        component_weights: Of a mixture, else None.
        diverging: Of NUTS, (chain, draw); else None.
    """

    num_chains: int
    num_draws: int
    take: Callable[[int, int], Draws] = field(repr=False)
    components: tuple[Posterior, ...] = ()
    component_weights: Tensor | None = None
    diverging: Tensor | None = None


def chains_of(posterior: Posterior | MCMC | Samples, num_samples: int | None) -> Chains:
    """The draws of a posterior.

    Args:
        posterior: A posterior, an ``MCMC`` that has run, or its samples by chain.
        num_samples: Draws of each chain; None is all that there are, or 100. Fewer
            than a Markov chain has are its last ones.

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
        last = diverging[:, -chains.num_draws :].bool()
        return Chains(chains.num_chains, chains.num_draws, chains.take, diverging=last)
    if isinstance(posterior, Mapping):
        return _of_samples(posterior, num_samples)
    if num_samples is None:
        num_samples = posterior.num_samples or DEFAULT_NUM_SAMPLES
    check_count("num_samples", num_samples)
    if isinstance(posterior, MixturePosterior):
        return Chains(
            1,
            num_samples,
            lambda a, b: Draws(*posterior.sample_with_components(b - a)),
            posterior.components,
            posterior.weights,
        )
    if posterior.num_samples is None:
        return Chains(
            1, num_samples, lambda a, b: Draws(posterior.sample(b - a)), (posterior,)
        )
    particles = posterior.sample(num_samples)  # each of them once, over all chunks
    return Chains(
        1,
        num_samples,
        lambda a, b: Draws({site: x[a:b] for site, x in particles.items()}),
        (posterior,),
    )


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

    def take(start: int, stop: int) -> Draws:
        rows = slice(first + start, first + stop)
        return Draws({s: x[:, rows].flatten(0, 1) for s, x in samples.items()})

    return Chains(num_chains, num_draws, take)
