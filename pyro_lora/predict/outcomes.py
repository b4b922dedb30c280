"""What a likelihood's distribution says of its outcomes, by its type."""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch
from typing import Any, Literal

import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch import distributions as td

Tokens = Literal["last", "each"]
REAL_TYPES = (td.Normal, td.StudentT)


@dataclass(frozen=True, eq=False)
class Likelihood:
    """A likelihood's distribution without masks and event dims.

    Attributes:
        fn: The distribution of single outcomes.
        event_dims: How many of its dims are one event of the likelihood.
        mask: Which outcomes inside the event count, of ``fn``'s batch shape.
    """

    fn: Any
    event_dims: int
    mask: Tensor

    @property
    def is_real(self) -> bool:
        """Whether the outcomes are real numbers with a location and a scale."""
        return isinstance(self.fn, REAL_TYPES)


def likelihood(fn: Any) -> Likelihood:
    """Take masks and event dims off a distribution.

    Args:
        fn: The likelihood's distribution.

    Returns:
        What is inside. A mask outside the event hides whole data, and labels rather
        than predictions: it's ignored.
    """
    event_dims, mask = 0, torch.tensor(True)
    while isinstance(fn, MaskedDistribution | td.Independent):
        if isinstance(fn, td.Independent):
            event_dims += fn.reinterpreted_batch_ndims
        elif event_dims > 0:
            mask = mask & torch.as_tensor(fn._mask)
        fn = fn.base_dist
    return Likelihood(fn, event_dims, mask.expand(fn.batch_shape))


def check_outcomes(found: Likelihood, tokens: Tokens | None, site: str) -> None:
    """Check that ``tokens`` is given where a datum has several classes, and only there.

    Raises:
        ValueError: If it isn't so.
    """
    if tokens not in (None, "last", "each"):
        raise ValueError(f"tokens must be 'last', 'each' or None, found {tokens!r}.")
    if found.event_dims > 1:
        raise ValueError(
            f"Site {site!r} has {found.event_dims} event dims; predict is for one "
            "outcome a datum, or one row of them (.to_event(1))."
        )
    if tokens is not None and (found.event_dims == 0 or found.is_real):
        raise ValueError(
            f"tokens={tokens!r} is for classes with one event dim, those of a text's "
            f"tokens. Site {site!r} is {type(found.fn).__name__} with "
            f"{found.event_dims}: leave tokens out."
        )
    if tokens is None and found.event_dims == 1 and not found.is_real:
        raise ValueError(
            f"Site {site!r} has event shape {tuple(found.fn.batch_shape[-1:])}: "
            "several outcomes, one for each token perhaps, not one class a datum. Say "
            "which by tokens='last' or tokens='each', or draw outcomes by "
            "pyro.infer.Predictive."
        )


@singledispatch
def outcome_logits(fn: object) -> Tensor:
    """Logits of the classes up to a shift, (..., C).

    By the distribution's type; register your own.

    Args:
        fn: A distribution of single outcomes, of batch shape (...).

    Raises:
        ValueError: If the type has no classes here.

    >>> import pyro.distributions as dist
    >>> outcome_logits(dist.Bernoulli(torch.tensor(0.25))).softmax(-1)
    tensor([0.7500, 0.2500])
    """
    raise ValueError(
        f"No class probabilities for {type(fn).__name__}; expected Categorical or "
        "Bernoulli, or for regression Normal or StudentT. For other likelihoods draw "
        "outcomes by pyro.infer.Predictive, or by to_datatree."
    )


@outcome_logits.register
def _categorical(fn: td.Categorical) -> Tensor:
    return fn.logits


@outcome_logits.register
def _bernoulli(fn: td.Bernoulli) -> Tensor:
    return torch.stack([torch.zeros_like(fn.logits), fn.logits], -1)


def chosen_outcomes(mask: Tensor, tokens: Tokens, site: str) -> tuple[Tensor, Tensor]:
    """Data and positions of the outcomes asked for, both (M,).

    Args:
        mask: Which outcomes count, (B, T).
        tokens: ``"last"``: the last one of each datum; ``"each"``: all.
        site: The likelihood's site.

    Raises:
        ValueError: If a datum has none, with ``"last"``.
    """
    if tokens == "each":
        rows, places = mask.nonzero(as_tuple=True)
        return rows, places
    empty = (~mask.any(1)).nonzero()
    if len(empty):
        raise ValueError(
            f"Site {site!r}: datum {int(empty[0])} of a batch has no token that "
            "counts, so no last one. Leave it out, or check its labels and mask."
        )
    last = (torch.arange(mask.shape[1], device=mask.device) * mask).amax(1)
    return torch.arange(len(mask), device=mask.device), last


def outcome_log_probs(fn: object) -> Tensor:
    """Log probabilities of one class a datum, (..., C), float64, nats.

    Args:
        fn: The likelihood's distribution, of batch shape (...).

    Raises:
        ValueError: If the type has no classes, or a datum has several outcomes.
    """
    found = likelihood(fn)
    if found.event_dims:
        raise ValueError(
            f"The likelihood has {found.event_dims} event dims: several outcomes a "
            "datum. Expected one class a datum."
        )
    return outcome_logits(found.fn).double().log_softmax(-1)
