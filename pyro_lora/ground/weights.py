"""Weights: the mode, a draw, a stack of draws or particles, all of one type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pyro_lora.ground.settings import shown

# Site name -> value, any leading dims (S,) before the site's own (L, ...).
Weights = dict[str, Tensor]


def check_weights(weights: Any, name: str = "weights") -> None:
    """Check that weights are tensors by site.

    Args:
        weights: Site -> value.
        name: What they are called.

    Raises:
        TypeError: If they are something else.
    """
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"{name} must be a mapping, site -> tensor, such as lora.weights(), found "
            f"{shown(weights)}."
        )
    for site, value in weights.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name}, site {site!r}: expected a tensor, found {shown(value)}."
            )
