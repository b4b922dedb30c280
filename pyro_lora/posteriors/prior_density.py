"""The prior of a posterior: draws of it, its density and its scales at draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_lora.ground.weights import Weights
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood.model_trace import trace_at
from pyro_lora.posteriors.laplace_posterior import LaplacePosterior
from pyro_lora.posteriors.posterior import Guide
from pyro_lora.priors import Prior
from pyro_lora.priors.prior import NOISE


def prior_of(posterior: Guide) -> Prior:
    """The prior that a posterior was made with, else the lifted network's own."""
    if isinstance(posterior, LaplacePosterior):
        return posterior.prior
    return lambda lora: lora.prior(lora)


@torch.no_grad()
def prior_draws(prior: Prior, loras: Sequence[LiftedNetwork], num: int) -> Weights:
    """Draws of every latent site of the prior.

    Args:
        prior: The prior.
        loras: The lifted networks.
        num: S.

    Returns:
        Site -> (S, ...), the prior's own latent scales included.
    """
    found: dict[str, list[Tensor]] = {}
    for lora in loras:
        for _ in range(num):
            trace: Any = poutine.trace(prior).get_trace(lora)
            for name, node in _latent_nodes(trace).items():
                found.setdefault(name, []).append(node["value"])
    return {name: torch.stack(values) for name, values in found.items()}


@torch.no_grad()
def with_scaled_sites(
    prior: Prior, loras: Sequence[LiftedNetwork], draws: Mapping[str, Tensor]
) -> Weights:
    """The draws, and what a non-centred prior makes of their noise.

    Args:
        prior: The prior.
        loras: The lifted networks.
        draws: Site -> (S, ...), all latent sites of the prior.

    Returns:
        Site -> (S, ...): where the latents are ``<site>_decentered``, the site, too.
    """
    if not any(site.endswith(NOISE) for site in draws):
        return dict(draws)
    found: dict[str, list[Tensor]] = {}
    for lora in loras:
        for s in range(next(iter(draws.values())).shape[0]):
            at = {site: value[s] for site, value in draws.items()}
            trace = trace_at(lambda lora=lora: prior(lora), at, {})
            for name, node in trace.nodes.items():
                if f"{name}{NOISE}" in draws:
                    found.setdefault(name, []).append(node["value"])
    return dict(draws) | {name: torch.stack(values) for name, values in found.items()}


def log_prior_by_site(
    prior: Prior, loras: Sequence[LiftedNetwork], draws: Mapping[str, Tensor]
) -> Weights:
    """Log density of each site under the prior.

    Args:
        prior: The prior.
        loras: The lifted networks.
        draws: Site -> (S, ...).

    Returns:
        Site -> (S,), nats, float64 (a sum over thousands of weights), differentiable.
    """
    found: dict[str, list[Tensor]] = {}
    num_draws = next(iter(draws.values())).shape[0]
    for lora in loras:
        for s in range(num_draws):
            at = {site: value[s].double() for site, value in draws.items()}
            trace = trace_at(lambda lora=lora: prior(lora), at, {})
            for name, node in _latent_nodes(trace).items():
                if name in draws:
                    log_prob = node["fn"].log_prob(node["value"]) * node["scale"]
                    found.setdefault(name, []).append(log_prob.sum())
    return {name: torch.stack(values) for name, values in found.items()}


def _latent_nodes(trace: Any) -> dict[str, Any]:
    return {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample"
        and not node["is_observed"]
        and not site_is_subsample(node)
    }
