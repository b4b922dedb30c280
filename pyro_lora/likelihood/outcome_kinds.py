"""What a likelihood's distribution says of its outcomes, by its type."""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch
from typing import Any, Literal

import torch
from torch import Tensor
from torch import distributions as td

from pyro_lora.likelihood.model_trace import (
    IGNORED,
    Batch,
)
from pyro_lora.likelihood.outcome_source import OutcomeSource
from pyro_lora.likelihood.outcomes import (
    may_not_count,
    outcomes_that_count,
    single_outcomes,
)

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
    single = single_outcomes(fn)
    return Likelihood(single.fn, single.event_dims, single.inside)


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


@dataclass
class GivenLabels:
    """The labels of one batch after another, those marked that don't count.

    Predictions are made without labels, but which of them count may be said in the
    labels alone. So the model runs once more with them, at one weight set: on the first
    batch; and on every one if it has masks or a mark for missing outcomes, or holds
    labels that are none.

    Attributes:
        source: Where the labels are in a batch.
        may_not_count: Whether some outcomes may not count; None before the first batch.
    """

    source: OutcomeSource
    may_not_count: bool | None = None

    def read(self, batch: Batch, num_classes: int | None, index: int) -> Tensor | None:
        """The labels of a batch, where there are any.

        Args:
            batch: The model's keyword arguments.
            num_classes: C, None of real outcomes.
            index: The batch's place.

        Returns:
            Of the given shape, -100 where a class doesn't count, NaN where a real
            outcome doesn't.

        Raises:
            ValueError: If one that counts is no outcome.
        """
        given = self.source.outcomes(batch)
        if given is None:
            return None
        labels = torch.as_tensor(given)
        wrong = _are_none(labels, num_classes)
        if self.may_not_count is False and not wrong.any():
            return labels
        site = self.source.site(batch)
        known = site["is_observed"]
        self.may_not_count = bool(known and may_not_count(site))
        counts = torch.ones_like(labels, dtype=torch.bool)
        if known:
            counts = _like(outcomes_that_count(site).to(labels.device), labels)
        if bool((wrong & counts).any()):
            expected = (
                "finite numbers"
                if num_classes is None
                else f"classes 0 to {num_classes - 1}"
            )
            name = " and ".join(self.source.arguments(batch)) or "outcomes"
            raise ValueError(
                f"Batch {index}, site {site['name']!r}: {name} must be "
                f"{expected}, found {labels[wrong & counts][0].item()}. Mask the data "
                "without one in the model, by poutine.mask or obs_mask=, or leave "
                "them out."
            )
        if bool(counts.all()):
            return labels
        if num_classes is not None:
            return labels.masked_fill(~counts, IGNORED)
        real = labels if labels.is_floating_point() else labels.double()
        return real.masked_fill(~counts, torch.nan)


def _are_none(labels: Tensor, num_classes: int | None) -> Tensor:
    if num_classes is None:
        return ~labels.isfinite()
    return ~((labels >= 0) & (labels < num_classes))


def _like(counts: Tensor, labels: Tensor) -> Tensor:
    """Which outcomes count, of the labels' shape, which may have dims of size one."""
    if counts.numel() == labels.numel():
        return counts.reshape(labels.shape)
    by_datum = counts.reshape(len(labels), -1).any(-1)
    return by_datum.reshape(-1, *[1] * (labels.ndim - 1)).expand(labels.shape)
