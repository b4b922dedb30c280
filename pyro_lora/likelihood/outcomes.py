"""The single outcomes of a likelihood, and which of them count.

A likelihood such as ``NanMaskedNormal(f, 1).mask(m).to_event(1)`` in a site that is
masked, too, has T outcomes a datum. An outcome counts if no mask hides it and its value
is given. This is the only place that knows: Fisher information, held-out losses,
metrics, and what ArviZ is told all ask here. What is inside is what
:mod:`~pyro_lora.likelihood.likelihoods` knows of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch import distributions as td

from pyro_lora.likelihood import likelihoods
from pyro_lora.likelihood.data_plate import DataPlate, data_plate

Site = Mapping[str, Any]

_WITH_ZERO = (
    td.constraints.boolean,
    td.constraints.nonnegative,
    td.constraints.nonnegative_integer,
    td.constraints.real,
    td.constraints.unit_interval,
)


def is_given(fn: Any, value: Tensor) -> Tensor:
    """Which values are outcomes, not marks for missing ones; of the batch shape.

    Most distributions know no mark, so that NaN is an error there.

    Args:
        fn: The distribution of single outcomes.
        value: Of ``fn``'s shape.
    """
    likelihood = likelihoods.known(fn)
    if likelihood is not None and likelihood.given is not None:
        return likelihood.given(value)
    shape = value.shape[: value.ndim - len(fn.event_shape)]
    return torch.ones(shape, dtype=torch.bool, device=value.device)


def is_possible(fn: Any, value: Tensor) -> Tensor:
    """Which values can be outcomes, or marks for missing ones; of the batch shape.

    The one answer to whether a label is right: 1.5 is no class, -1 no count.

    Args:
        fn: The distribution of single outcomes.
        value: Of ``fn``'s shape.
    """
    likelihood = likelihoods.known(fn)
    if likelihood is not None and likelihood.support is not None:
        own: Tensor = likelihood.support.check(value)
        return own
    try:
        fits: Tensor = fn.support.check(value)
    except NotImplementedError:  # a distribution that doesn't say
        shape = value.shape[: value.ndim - len(fn.event_shape)]
        return torch.ones(shape, dtype=torch.bool, device=value.device)
    if value.is_floating_point():  # infinity is in the support of a Normal
        infinite = value.isinf()
        for _ in fn.event_shape:
            infinite = infinite.any(-1)
        fits = fits & ~infinite
    return fits


def impossible(fn: Any, value: Any) -> str:
    """What is said of a value that counts and can't be an outcome.

    Args:
        fn: The distribution of single outcomes.
        value: The value.
    """
    most = getattr(fn.support, "upper_bound", None)
    classes = f", classes 0 to {most}" if isinstance(most, int) else ""
    return (
        f"the observed value {value} is outside of the support of {type(fn).__name__}"
        f"{classes}. Check the labels; mask or leave out data that have none."
    )


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
        is_masked: Whether there are masks.
    """

    fn: Any
    event_dims: int
    inside: Tensor
    unmasked: Tensor
    is_masked: bool


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
    parameters = [x for x in vars(fn).values() if isinstance(x, Tensor)]
    device = parameters[0].device if parameters else None
    inside = unmasked = torch.ones((), dtype=torch.bool, device=device)
    for mask, outside in masks:
        # It has none of the dims that are in the event inside of it: m is (B, T) in
        # .mask(m).to_event(1), and (B,) in .to_event(1).mask(m).
        own = _with_dims(mask, event_dims - outside).to(inside.device)
        unmasked = unmasked & own
        if outside > 0:
            inside = inside & own
    shape = fn.batch_shape
    return SingleOutcomes(
        fn, event_dims, inside.expand(shape), unmasked.expand(shape), bool(masks)
    )


def one_class_log_probs(fn: Any) -> Tensor:
    """Log probabilities of one class a datum, (..., C), float64, nats.

    Args:
        fn: The likelihood's distribution, of batch shape (...).

    Raises:
        ValueError: If it has no classes, or a datum has several outcomes.
    """
    single = single_outcomes(fn)
    classes = likelihoods.of(single.fn).classes
    if classes is None or single.event_dims:
        raise ValueError(
            f"The likelihood is {type(single.fn).__name__} with {single.event_dims} "
            "event dims. Expected one class a datum."
        )
    return classes.log_probs


def around(fn: Any, inside: Callable[[Any], Any]) -> Any:
    """The masks and event dims of a distribution, around another one.

    Args:
        fn: The likelihood's distribution.
        inside: What is put in the place of the distribution of single outcomes.
    """
    if isinstance(fn, MaskedDistribution):
        return around(fn.base_dist, inside).mask(fn._mask)
    if isinstance(fn, td.Independent):
        return around(fn.base_dist, inside).to_event(fn.reinterpreted_batch_ndims)
    return inside(fn)


def may_not_count(site: Site) -> bool:
    """Whether a likelihood has masks, or a mark for missing outcomes.

    Args:
        site: A node of a trace.
    """
    single = single_outcomes(site["fn"])
    if site["mask"] is not None or single.is_masked:
        return True
    likelihood = likelihoods.known(single.fn)
    return likelihood is not None and likelihood.given is not None


def outcomes_that_count(site: Site) -> Tensor:
    """Which outcomes of a site count: no mask hides them, and their value is given.

    Args:
        site: A node of a trace.

    Returns:
        Of the batch shape of the single outcomes.
    """
    single = single_outcomes(site["fn"])
    return _unmasked(site, single) & is_given(single.fn, site["value"])


def data_that_count(site: Site, plate: DataPlate | None = None) -> Tensor:
    """Which data of a site count: those of which an outcome does.

    Args:
        site: A node of a trace, at one weight set or at S, left of all other batch
            dims, which then all have the same masks.
        plate: The data's at one weight set; None: as this node has it.

    Returns:
        (B,).
    """
    plate = data_plate(site) if plate is None else plate
    shape = site["fn"].batch_shape
    counts = outcomes_that_count(site).reshape(*shape, -1)
    return plate.data_last(counts, shape).any(0)


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
    wrong = ~is_possible(single.fn, value) & ~_unmasked(site, single)
    if _zero_is_possible(single.fn):
        possible = torch.zeros_like(value)
    elif not bool(wrong.any()):
        return value
    else:  # whatever the distribution is
        possible = site["fn"].sample().to(value)
    return possible.where(_with_dims(wrong, len(single.fn.event_shape)), value)


def values_in_range(site: Site) -> Tensor:
    """The site's value, with zeros in place of classes that aren't there.

    An index that is out of range stops a GPU for good, before a check that was asked
    for can say so. Where nobody checks (:func:`is_checked`) values stay as they are.

    Args:
        site: A node of a trace, observed.
    """
    value = values_to_score(site)
    single = single_outcomes(site["fn"])
    if not (is_checked(site) and _is_class(single.fn)):
        return value
    return value.where(is_possible(single.fn, value), torch.zeros_like(value))


def is_checked(site: Site) -> bool:
    """Whether an outcome that has no probability is refused, as Pyro would do.

    Args:
        site: A node of a trace.
    """
    if not pyro.settings.get("validate_distributions_pyro"):
        return False
    fn = site["fn"]
    own = vars(fn).get("_validate_args", True)
    return own or not getattr(type(fn), "_validate_args", False)


def _is_class(fn: Any) -> bool:
    support = fn.support
    is_interval = isinstance(support, td.constraints.integer_interval)
    return is_interval and isinstance(support.lower_bound, int)


def _zero_is_possible(fn: Any) -> bool:
    """Whether 0 is surely an outcome, as nearly always."""
    likelihood = likelihoods.known(fn)
    if likelihood is None:
        return False
    support = fn.support if likelihood.support is None else likelihood.support
    while isinstance(support, td.constraints.independent):
        support = support.base_constraint
    if isinstance(support, td.constraints.integer_interval):
        return isinstance(support.lower_bound, int) and support.lower_bound == 0
    return support in _WITH_ZERO


def _unmasked(site: Site, single: SingleOutcomes) -> Tensor:
    unmasked = single.unmasked.to(site["value"].device)
    if site["mask"] is None:
        return unmasked
    return unmasked & _with_dims(site["mask"], single.event_dims).to(unmasked.device)


def _with_dims(mask: Tensor | bool, number: int) -> Tensor:
    """A mask with so many dims of size one on the right."""
    if not isinstance(mask, Tensor):
        mask = torch.full((), mask, device="cpu")
    own = mask.bool()
    return own.reshape(own.shape + (1,) * (number if own.ndim else 0))
