"""What a prior contributes at the mode: density, gradient, mean and precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch import distributions as td

from pyro_lora.curvature.weight_gaussian import Weights


@dataclass(frozen=True, eq=False)
class PriorAtMode:
    """The prior of the lifted sites at the mode, the user's ``poutine.scale`` kept.

    Attributes:
        mean: Site -> mean, of the site's shape.
        precision: Site -> precision, of the site's shape.
        log_prob: Of all sites, nats, float64.
        gradient: Site -> gradient of the log density, nats.
    """

    mean: Weights
    precision: Weights
    log_prob: Tensor
    gradient: Weights


@singledispatch
def prior_moments(fn: object, value: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and precision of the Gaussian that stands for a prior at ``value``.

    Args:
        fn: The prior's distribution, without event dims.
        value: The mode; mean and precision have its shape.

    Raises:
        TypeError: If the type isn't known.
    """
    raise TypeError(f"expected a Normal prior, found {type(fn).__name__}")


@prior_moments.register
def _normal(fn: td.Normal, value: Tensor) -> tuple[Tensor, Tensor]:
    return fn.loc.expand(value.shape), fn.scale.expand(value.shape) ** -2


def prior_at_mode(trace: Any, mode: Mapping[str, Tensor]) -> PriorAtMode:
    """Read the prior of the lifted sites from a trace at the mode.

    Args:
        trace: A trace of the model.
        mode: Site -> value.

    Returns:
        Density, gradient and moments.

    Raises:
        ValueError: If a prior has no Gaussian form or isn't proper.
    """
    mean, precision, log_probs = {}, {}, []
    leaves = {s: value.detach().requires_grad_() for s, value in mode.items()}
    for name, value in mode.items():
        mean[name], precision[name] = _site_moments(trace.nodes[name], value.detach())
    with torch.enable_grad():
        for name, leaf in leaves.items():
            site = trace.nodes[name]
            log_prob = site["fn"].log_prob(leaf)
            scaled = scale_and_mask(log_prob, site["scale"], site["mask"])
            log_probs.append(scaled.double().sum())
        total = torch.stack(log_probs).sum()
    gradient = torch.autograd.grad(total, list(leaves.values()))
    return PriorAtMode(
        mean, precision, total.detach(), dict(zip(leaves, gradient, strict=True))
    )


def _site_moments(site: dict[str, Any], value: Tensor) -> tuple[Tensor, Tensor]:
    fn = site["fn"]
    while isinstance(fn, td.Independent):
        fn = fn.base_dist
    try:
        mean, precision = prior_moments(fn, value)
    except TypeError as error:
        raise ValueError(
            f"Site {site['name']!r}: {error}. Use priors.normal, or register the type "
            "with pyro_lora.curvature.prior_moments.prior_moments.register."
        ) from error
    precision = scale_and_mask(precision, site["scale"], site["mask"])
    if not (torch.isfinite(precision).all() and (precision > 0).all()):
        raise ValueError(
            f"Site {site['name']!r}: the prior precision must be positive and finite, "
            f"found values from {precision.min():.3g} to {precision.max():.3g}. Use a "
            "proper prior."
        )
    return mean.detach(), precision.detach()
