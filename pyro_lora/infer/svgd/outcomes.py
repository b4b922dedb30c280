"""The outcomes of a likelihood's data, and which of them count."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pyro_lora.infer.svgd.particle_checks import PARTICLE_PLATE
from pyro_lora.likelihood.model_trace import likelihood_site, observed_site
from pyro_lora.likelihood.outcomes import outcomes_that_count


def likelihood(
    trace: Any, obs_site: str | None, latent: Iterable[str] | None = None
) -> dict[str, Any]:
    """The likelihood's site in a trace of K particles, without the particles' plate.

    Args:
        trace: Of the vectorised model.
        obs_site: Its name; None is the only observed one.
        latent: The latent sites, where the outcomes need not be observed.

    Raises:
        ValueError: If there is no such site, or more than one.
    """
    site = (
        observed_site(trace, obs_site)
        if latent is None
        else likelihood_site(trace, obs_site, latent)
    )
    frames = [f for f in site["cond_indep_stack"] if f.name != PARTICLE_PLATE]
    return {**site, "cond_indep_stack": tuple(frames)}


def datum_loss(site: dict[str, Any], num_particles: int) -> tuple[Tensor, int]:
    """Negative log likelihood in nats per datum, of the data that count.

    Args:
        site: Of the likelihood, in a trace of K particles with its log densities.
        num_particles: K.

    Returns:
        (K,), a constant, 0 where no datum counts; and how many do. One does if an
        outcome of it does.
    """
    log_prob = site["unscaled_log_prob"].detach().reshape(num_particles, -1)  # (K, B)
    counts = outcomes_that_count(site)
    data = counts.reshape(*log_prob.shape, -1).any(-1)
    # Pyro's "unscaled" is unmasked, too: a masked label may be anything.
    seen = log_prob.where(data, torch.zeros_like(log_prob))
    size = int(data[0].sum())
    wide = torch.promote_types(seen.dtype, torch.float32)
    return -seen.sum(1, dtype=wide) / max(1, size), size
