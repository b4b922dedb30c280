"""The single outcomes of a likelihood, and which of them count.

A likelihood such as ``NanMaskedNormal(f, 1).mask(m).to_event(1)`` in a site that is
masked, too, has T outcomes a datum. An outcome counts if no mask hides it and its value
is given. This is the only place that knows: Fisher information, held-out losses,
metrics, and what ArviZ is told all ask here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch import distributions as td

Site = Mapping[str, Any]


@singledispatch
def is_given(fn: Any, value: Tensor) -> Tensor:
    """Which values are outcomes, not marks for missing ones; of the batch shape.

    By the distribution's type: most know no mark, so that NaN is an error there.

    Args:
        fn: The distribution of single outcomes.
        value: Of ``fn``'s shape.
    """
    shape = value.shape[: value.ndim - len(fn.event_shape)]
    return torch.ones(shape, dtype=torch.bool, device=value.device)


@is_given.register
def _nan_masked_normal(fn: dist.NanMaskedNormal, value: Tensor) -> Tensor:
    return value.isfinite()


@is_given.register
def _nan_masked_multivariate_normal(
    fn: dist.NanMaskedMultivariateNormal, value: Tensor
) -> Tensor:
    return value.isfinite().any(-1)  # it marginalises over the others


@dataclass(frozen=True, eq=False)
class SingleOutcomes:
    """A likelihood without masks and event dims of its own.

    Attributes:
        fn: The distribution of single outcomes.
        event_dims: How many of its batch dims are one event of the likelihood.
        inside: Which outcomes the masks inside of the event leave, of ``fn``'s batch
            shape. In a text these tell tokens from padding; one outside of it, or the
            site's, hides whole data.
        unmasked: Which outcomes all masks of the distribution leave, likewise.
    """

    fn: Any
    event_dims: int
    inside: Tensor
    unmasked: Tensor


def single_outcomes(fn: Any) -> SingleOutcomes:
    """Take masks and event dims off a distribution.

    Args:
        fn: The likelihood's distribution.

    Returns:
        What is inside.
    """
    event_dims = 0
    masks: list[tuple[Tensor | bool, int]] = []
    while isinstance(fn, MaskedDistribution | td.Independent):
        if isinstance(fn, td.Independent):
            event_dims += fn.reinterpreted_batch_ndims
        else:
            masks.append((fn._mask, event_dims))
        fn = fn.base_dist
    inside = unmasked = torch.tensor(True)
    for mask, outside in masks:
        # It has none of the dims that are in the event inside of it.
        own = _with_dims(mask, event_dims - outside)
        unmasked = unmasked & own
        if outside > 0:
            inside = inside & own
    shape = fn.batch_shape
    return SingleOutcomes(fn, event_dims, inside.expand(shape), unmasked.expand(shape))


def may_not_count(site: Site) -> bool:
    """Whether a likelihood has masks, or a mark for missing outcomes.

    Args:
        site: A node of a trace.
    """
    fn, masked = site["fn"], site["mask"] is not None
    while isinstance(fn, MaskedDistribution | td.Independent):
        masked = masked or isinstance(fn, MaskedDistribution)
        fn = fn.base_dist
    return masked or is_given.dispatch(type(fn)) is not is_given.dispatch(object)


def outcomes_that_count(site: Site) -> Tensor:
    """Which outcomes of a site count: no mask hides them, and their value is given.

    Args:
        site: A node of a trace.

    Returns:
        Of the batch shape of the single outcomes.
    """
    single = single_outcomes(site["fn"])
    return _unmasked(site, single) & is_given(single.fn, site["value"])


def data_that_count(site: Site) -> Tensor:
    """Which data of a site count: those of which an outcome does.

    Args:
        site: A node of a trace, of batch shape (B,), or (S, B) at S draws, which then
            all have the same masks.

    Returns:
        (B,).
    """
    counts = outcomes_that_count(site)
    shape = site["fn"].batch_shape
    by_datum = counts.reshape(*shape, -1).any(-1)
    return by_datum.reshape(-1, *shape[-1:])[0]


def values_to_score(site: Site) -> Tensor:
    """The site's value, with a draw of the likelihood where a mask hides no outcome.

    NaN or -100 behind a mask adds nothing to a log density, but can't be scored, and
    NaN would be in its gradient.

    Args:
        site: A node of a trace.
    """
    value: Tensor = site["value"]
    if not may_not_count(site):
        return value
    single = single_outcomes(site["fn"])
    wrong = ~single.fn.support.check(value) & ~_unmasked(site, single)
    if not bool(wrong.any()):
        return value
    drawn = site["fn"].sample().to(value)
    return drawn.where(_with_dims(wrong, len(single.fn.event_shape)), value)


def _unmasked(site: Site, single: SingleOutcomes) -> Tensor:
    unmasked = single.unmasked.to(site["value"].device)
    if site["mask"] is None:
        return unmasked
    return unmasked & _with_dims(site["mask"], single.event_dims).to(unmasked.device)


def _with_dims(mask: Tensor | bool, number: int) -> Tensor:
    """A mask with so many dims of size one on the right."""
    own = torch.as_tensor(mask).bool()
    return own.reshape(own.shape + (1,) * (number if own.ndim else 0))
