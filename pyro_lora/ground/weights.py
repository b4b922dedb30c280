"""Weights: the mode, a draw, a stack of draws or particles, all of one type."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

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


def drawing_nothing(values: Any) -> AbstractContextManager[None]:
    """A block that leaves torch's generators where they are.

    Args:
        values: Weights, or a batch. Of the GPUs' generators it's those where they are:
            torch's own default is all, which warns where there are several GPUs and
            takes memory on each.
    """
    tensors = [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.is_cuda]
    return torch.random.fork_rng(sorted({x.device for x in tensors}, key=str))
