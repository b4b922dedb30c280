"""Weights: the mode, a draw, a stack of draws or particles, all of one type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_lora.ground.settings import shown

# Site name -> value, any leading dims (S,) before the site's own (L, ...).
Weights = dict[str, Tensor]

_Class = TypeVar("_Class", bound=type)


def handing_out_copies(*names: str) -> Callable[[_Class], _Class]:
    """A decorator of dataclasses that hand out copies of some fields.

    A value doesn't change: what others write in place to a tensor that they got of it
    is to a tensor of their own. Of large fields, and in loops, the class's own methods
    read :func:`itself`.

    Args:
        names: Of fields that are tensors, or weights.
    """

    def decorate(kind: _Class) -> _Class:
        for name in names:
            setattr(kind, name, _Copied(name))
        return kind

    return decorate


def itself(name: str) -> Any:
    """A property that is a field which :func:`handing_out_copies` hides.

    Args:
        name: Of the field.
    """
    return property(lambda owner: vars(owner)[name])


class _Copied:
    """A field of which every reader gets a copy."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, owner: Any, kind: type) -> Any:
        if owner is None:
            return self
        if self.name not in vars(owner):  # as of one that is being unpickled
            raise AttributeError(self.name)
        value = vars(owner)[self.name]
        return value.clone() if isinstance(value, Tensor) else copied(value)

    def __set__(self, owner: Any, value: Any) -> None:
        vars(owner)[self.name] = value


def copied(weights: Mapping[str, Tensor]) -> Weights:
    """Weights whose tensors are their own.

    Args:
        weights: Site -> value.
    """
    return {site: x.clone() for site, x in weights.items()}


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


def check_sites(weights: Any, sites: Mapping[str, Tensor]) -> None:
    """Check that weights are a value, or a stack of them, of each site and no others.

    Args:
        weights: Site -> (..., *shape of the site's).
        sites: Site -> a value.

    Raises:
        TypeError: If they aren't tensors by site.
        ValueError: If a site is missing, unknown or has another shape.
    """
    check_weights(weights)
    if weights.keys() != sites.keys():
        raise ValueError(
            "log_prob needs a value of each of the posterior's sites and of no "
            f"others: missing {sorted(sites.keys() - weights.keys())}, unknown "
            f"{sorted(weights.keys() - sites.keys())}."
        )
    for site, like in sites.items():
        shape = tuple(weights[site].shape)
        if shape[len(shape) - like.ndim :] != like.shape or len(shape) < like.ndim:
            raise ValueError(
                f"Site {site!r}: log_prob needs a value of shape {tuple(like.shape)}, "
                f"or a stack of S, (S, ...); found {shape}. Give weights as sample() "
                "and mode() do."
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
