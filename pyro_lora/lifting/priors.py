"""Priors: functions ``f(lora) -> weights`` that call ``pyro.sample`` for every site."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import pyro
import pyro.distributions as dist
from torch import Tensor

if TYPE_CHECKING:
    from pyro_lora.lifting.lifted_network import LiftedNetwork

Prior = Callable[["LiftedNetwork"], dict[str, Tensor]]


def normal(scale: float | Mapping[str, float] = 1.0) -> Prior:
    r"""Independent :math:`N(0, \sigma^2)` on every weight.

    Its precision :math:`1 / \sigma^2` is what L2 regularisation calls weight decay
    (in nats, for the full data set).

    Args:
        scale: Standard deviation, one number or one for each site name.

    Returns:
        A prior: called with a lifted network, it samples every site, event dims as
        in ``lora.weights()``.

    Raises:
        ValueError: If a scale isn't positive and finite, or (when called) the names
            aren't those of the network's sites.

    >>> prior = normal(scale=3.0)
    """
    scales = dict(scale) if isinstance(scale, Mapping) else {"every site": scale}
    for site, value in scales.items():
        if not (float(value) > 0 and math.isfinite(value)):
            raise ValueError(
                f"Prior scale for {site!r} must be positive and finite, found {value}."
            )

    def prior(lora: LiftedNetwork) -> dict[str, Tensor]:
        if isinstance(scale, Mapping) and scale.keys() != lora.sites.keys():
            wrong = sorted(scale.keys() ^ lora.sites.keys())
            raise ValueError(
                f"Prior scales and sites differ in {wrong}: give one scale for each "
                "name in lora.sites, or one number for all."
            )
        weights = {}
        for site, zeros in lora.zeros().items():
            sd = scale[site] if isinstance(scale, Mapping) else scale
            fn = dist.Normal(zeros, zeros + sd).to_event(zeros.ndim)
            weights[site] = pyro.sample(site, fn)
        return weights

    return prior
