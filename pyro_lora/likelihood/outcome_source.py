"""Where a likelihood's outcomes come from: which arguments of the model reach obs=.

A model of stars and classes, ``pyro.sample("s", ..., obs=stars.float())`` beside
``pyro.sample("y", ..., obs=labels)``, has the outcomes of "s" in ``stars``: that is
what predictions of "s" are compared with, and what is hidden from the model meanwhile.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch import distributions as td
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_lora.ground.interrupts import eagerly, entered, hooked
from pyro_lora.ground.synchronisation import (
    Answer,
    NeedsAllRanksError,
    ask,
    once_more,
    require,
)
from pyro_lora.lifting.folding import is_setting
from pyro_lora.likelihood import likelihoods
from pyro_lora.likelihood.batch import Batch, PlacedBatch, checked_batch
from pyro_lora.likelihood.model_trace import IGNORED, lifted_networks, likelihood_site
from pyro_lora.likelihood.outcomes import (
    impossible,
    is_possible,
    may_not_count,
    outcomes_that_count,
    single_outcomes,
)

# Functions of torch that change a tensor's type and shape, not its values.
_KEEPING = frozenset(
    "bfloat16 clone contiguous cpu cuda detach double flatten float half int long "
    "ravel reshape reshape_as short squeeze to type type_as unsqueeze view view_as "
    "as_tensor tensor".split()
)

# And those by which Python code comes to know values, and may go by them.
_READING = frozenset(
    "__bool__ __contains__ __float__ __index__ __int__ allclose argwhere equal item "
    "is_nonzero nonzero numpy tolist unique __array__".split()
)
_LIBRARIES = frozenset("torch pyro transformers peft pyro_lora".split())


@dataclass(frozen=True, eq=False)
class Origin:
    """Where the outcomes are in batches of one form.

    Attributes:
        arguments: The model's arguments that they are made of. None are where the
            model has its data from elsewhere.
        are_there: Whether the site is observed.
        are_argument: Whether they are the one argument itself, but for type and shape.
        site: The likelihood's site.
        shape: Of its value on the first batch.
        made_of: Every argument that the outcomes are made of, hidden or not.
    """

    arguments: tuple[str, ...]
    are_there: bool = True
    are_argument: bool = True
    site: str = ""
    shape: tuple[int, ...] = ()
    made_of: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class OutcomeSource:
    """Finds a likelihood's outcomes in batches.

    Attributes:
        trace: Runs the model on a batch, at some weights.
        obs_site: The likelihood's site, or None.
        latents: The latent sites.
        named: The argument with the outcomes, where the user says which.
    """

    trace: Callable[[Batch], Any]
    obs_site: str | None
    latents: Iterable[str]
    named: str | None = None
    _traces: dict[frozenset[str], Any] = field(default_factory=dict)
    _origins: dict[frozenset[str], Origin] = field(default_factory=dict)
    # Whether its code knows values of tensors, and what else it was given.
    _branching: dict[frozenset[str], tuple[bool, dict[str, Any]]] = field(
        default_factory=dict
    )

    def trace_of(self, batch: Batch) -> Any:
        """The trace of the first batch with the same arguments as this one."""
        form = _form(batch)
        if form not in self._traces:
            self._traces[form] = batch, self._run(batch)
        return self._traces[form][1]

    def _run(self, batch: Batch) -> Any:
        """The trace of a batch; the first of its form tells of :meth:`may_branch`."""
        form = _form(batch)
        with torch.no_grad():
            if form in self._branching:
                return self.trace(batch)
            looking = _Looking()
            with eagerly(), entered(looking):
                trace = self.trace(batch)
        self._branching[form] = looking.has_read, _settings(batch)
        return trace

    def forget(self) -> None:
        """Let the traces go, and the batches that are in them."""
        self._traces.clear()

    def arguments(self, batch: Batch) -> tuple[str, ...]:
        """The arguments that the outcomes come in."""
        return self._origin(batch).arguments

    def hidden(self, batch: Batch) -> PlacedBatch:
        """The batch with these arguments set to None."""
        return checked_batch(batch).replaced(**dict.fromkeys(self.arguments(batch)))

    def outcomes(self, batch: Batch) -> Any:
        """The outcomes as the likelihood has them, (B, ...); None if there are none.

        Where they are some function of an argument, that takes a run of the model.
        """
        origin = self._origin(batch)
        if self.named:
            return self._named(batch, self.named)
        if not origin.are_there:
            return None
        if origin.are_argument:
            given = batch[origin.arguments[0]]
            if isinstance(given, Tensor) and given.ndim != len(origin.shape):
                shape = len(given), *origin.shape[1:]
                if given.numel() == math.prod(shape):  # (B, 1), say
                    given = given.reshape(shape)
            return given
        return self.site(batch)["value"]

    def _named(self, batch: Batch, name: str) -> Any:
        """An argument, or what the model makes of it for its site to observe."""
        given = batch.get(name)
        if given is None:
            return None
        site = self.site(batch)
        value = site["value"]
        itself = isinstance(given, Tensor) and given.numel() == value.numel()
        if not site["is_observed"] or (itself and _is_same(given, value)):
            return given
        form = _form(batch)
        if form not in self._origins:
            self._origins[form] = self._find(batch)
        # What the model observes has nothing to do with it: at the user's word.
        return value if name in self._origins[form].made_of else given

    def site(self, batch: Batch) -> dict[str, Any]:
        """The likelihood's site, of a run of the model."""
        last, trace = self._traces.get(_form(batch), (None, None))
        if last is not batch:
            trace = self._run(batch)
            self._traces[_form(batch)] = batch, trace
        return likelihood_site(trace, self.obs_site, self.latents)

    def may_branch(self, batch: Batch) -> bool:
        """Whether the model's code may take another way than on the first batch.

        ``if not seen.all(): fn = fn.mask(seen)`` masks some batches only. Known from
        the first batch with the same arguments, and from settings that aren't its.
        """
        form = _form(batch)
        if form not in self._branching:
            self._run(batch)
        has_read, settings = self._branching[form]
        others = _settings(batch)
        return (
            has_read or not all(map(is_setting, others.values())) or others != settings
        )

    def _origin(self, batch: Batch) -> Origin:
        if self.named:
            return Origin((self.named,))
        form = _form(batch)
        if form not in self._origins:
            none = Origin((), are_there=False)
            self._origins[form] = self._find(batch) if form else none
        return self._origins[form]

    def _find(self, batch: Batch) -> Origin:
        trace = self.trace_of(batch)
        site = likelihood_site(trace, self.obs_site, self.latents)
        name, shape = site["name"], tuple(site["value"].shape)
        if not site["is_observed"]:
            # A model that is for predictions only may have no use for its labels.
            idle = not any(node.get("is_observed") for node in trace.nodes.values())
            only = idle and batch.get("labels") is not None
            return Origin(("labels",) if only else (), only, True, name, shape)
        if batch.get("labels") is site["value"]:  # as nearly always
            made_of = frozenset({"labels"})
            return Origin(("labels",), True, True, name, shape, made_of)
        following = _Following(batch)
        shown: list[frozenset[str]] = []

        # A network may drop an argument, as transformers' do a mask that is all ones,
        # and read it in the next batch. Labels they take for a loss of their own.
        def sees(network: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            given = [*args, *(x for k, x in kwargs.items() if k != "labels")]
            shown.extend(map(following.origins, _leaves(given)))

        networks = [lora.network for lora in lifted_networks(trace)]
        with (
            torch.no_grad(),
            hooked({}, before=dict.fromkeys(networks, sees)),
            entered(following),
        ):
            trace = self.trace(batch)
        site = trace.nodes[name]
        names = following.origins(site["value"])
        shown += [
            following.origins(x) for x in _parameters(single_outcomes(site["fn"]).fn)
        ]
        shown += [
            following.origins(node["value"])
            for node in trace.nodes.values()
            if node["type"] == "sample" and site_is_subsample(node)
        ]
        # What the model needs for more than its outcomes can't be hidden from it.
        own = tuple(sorted(names.difference(*shown)))
        itself = len(own) == 1 and names == {*own}
        itself = itself and not following.is_changed(site["value"])
        itself = itself and _is_same(batch[own[0]], site["value"])
        return Origin(own, True, itself, name, shape, names)


def _settings(batch: Batch) -> dict[str, Any]:
    """Arguments that aren't tensors."""
    return {k: x for k, x in batch.items() if not isinstance(x, Tensor | None)}


def _form(batch: Batch) -> frozenset[str]:
    return frozenset(name for name, x in batch.items() if x is not None)


@dataclass(frozen=True, eq=False)
class _Looked:
    """A batch's labels, and whether some of them are no outcomes."""

    batch: Batch
    labels: Tensor
    are_wrong: Answer


@dataclass
class GivenLabels:
    """The labels of one batch after another, those marked that don't count.

    Predictions are made without labels, but which of them count may be said in the
    labels alone. So the model runs once more with them, at one weight set: on the first
    batch; and on every one if it has masks or a mark for missing outcomes, holds
    labels that are none, or the model's code looks at values, or is given a setting
    that differs, by which it may mask some batches only.

    Attributes:
        source: Where the labels are in a batch.
        may_not_count: Whether some outcomes may not count; None before the first batch.
        one_hot: Whether a class comes as C zeros and ones.
    """

    source: OutcomeSource
    may_not_count: bool | None = None
    one_hot: bool = False
    _looked: _Looked | None = None

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
        looked, self._looked = self._looked, None
        if looked is None or looked.batch is not batch:
            looked = self._look(batch, num_classes)
        if looked is None:
            return None
        labels = looked.labels
        if self.may_not_count is None:
            site = self.source.site(batch)
            self.may_not_count = bool(site["is_observed"] and may_not_count(site))
            self.one_hot = _is_one_hot(site)
        counts: Tensor | None = None
        if self.may_not_count or self.source.may_branch(batch) or looked.are_wrong:
            wrong = _are_none(labels, num_classes)
            site, is_own = self._site(batch)
            counts, wrong = self._counted(site if is_own else None, labels, wrong)
            name = " and ".join(self.source.arguments(batch)) or "outcomes"
            fn = single_outcomes(site["fn"]).fn
            error = partial(_impossible, index, site["name"], name, fn, labels, wrong)
            require(~wrong.any(), error)
        if self.one_hot and labels.ndim == 2:
            labels = labels.argmax(-1)
        if counts is None:
            return labels
        counts = _like(counts, labels)
        if num_classes is not None:
            return labels.masked_fill(~counts, IGNORED)
        if not labels.is_floating_point() and bool(counts.all()):
            return labels
        real = labels if labels.is_floating_point() else labels.double()
        return real.masked_fill(~counts, torch.nan)

    def look(self, batch: Batch, num_classes: int | None) -> None:
        """Ask what :meth:`read` needs to know, before something else is asked for.

        Args:
            batch: The one that is read next.
            num_classes: C, None of real outcomes.
        """
        self._looked = self._look(batch, num_classes)

    def _look(self, batch: Batch, num_classes: int | None) -> _Looked | None:
        given = self.source.outcomes(batch)
        if given is None:
            return None
        labels = _as_tensor(given)
        are_none = ask(_are_none(labels, num_classes).any(), usual=False)
        return _Looked(batch, labels, are_none)

    def _site(self, batch: Batch) -> tuple[dict[str, Any], bool]:
        """The likelihood's site, and whether it's this batch's own.

        For wrong labels, which others needn't have, it is that of a batch like this
        one, where all ranks would have to run the model again.
        """
        if self.may_not_count or self.source.may_branch(batch):
            return self.source.site(batch), True
        with once_more(), suppress(NeedsAllRanksError):
            return self.source.site(batch), True
        trace = self.source.trace_of(batch)
        return likelihood_site(trace, self.source.obs_site, self.source.latents), False

    def _counted(
        self, site: dict[str, Any] | None, labels: Tensor, wrong: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Which outcomes count; and which labels that do are wrong, of their shape."""
        if site is None or not site["is_observed"]:
            return torch.ones_like(labels, dtype=torch.bool), wrong
        counts = outcomes_that_count(site).to(labels.device)
        value: Tensor = site["value"]
        if labels.numel() == value.numel():
            fn = single_outcomes(site["fn"]).fn
            fits = is_possible(fn, labels.reshape(value.shape).to(value.device))
            bad = counts & ~fits.to(labels.device)
            return counts, _like(bad, labels)
        return counts, wrong & _like(counts, labels)


def _impossible(
    index: int, site: str, name: str, fn: Any, labels: Tensor, wrong: Tensor
) -> ValueError:
    return ValueError(
        f"Batch {index}, site {site!r}, {name}: "
        f"{impossible(fn, labels[wrong][0].item())} Mask them in the "
        "model, by poutine.mask or obs_mask=."
    )


def _is_one_hot(site: Mapping[str, Any]) -> bool:
    likelihood = likelihoods.known(single_outcomes(site["fn"]).fn)
    classes = None if likelihood is None else likelihood.classes
    return classes is not None and classes.one_hot


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


class _Following(TorchFunctionMode):
    """Follows arguments through torch's functions, to all that is made of them."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        # Numbers and strings are shared between places that have nothing in common.
        self._arguments = {
            id(x): frozenset({name})
            for name, x in arguments.items()
            if not isinstance(x, int | float | str | None)
        }
        self._made: Any = WeakTensorKeyDictionary()
        self._changed: Any = WeakTensorKeyDictionary()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        of_inputs = [self.origins(x) for x in _leaves((args, kwargs))]
        origins = frozenset[str]().union(*of_inputs)
        if origins:
            made = [x for x in _leaves(result) if isinstance(x, Tensor)]
            # An assignment to a part of a tensor returns nothing.
            given = [x for x in _leaves((args, kwargs)) if isinstance(x, Tensor)]
            changed = any(map(self.is_changed, given)) or not _keeps(func, given, made)
            for x in made or [x for x in args[:1] if isinstance(x, Tensor)]:
                self._made[x] = self.origins(x) | origins
                self._changed[x] = changed
        return result

    def is_changed(self, value: Tensor) -> bool:
        """Whether it may have other values than the argument that it's made of."""
        return bool(self._changed.get(value, False))

    def origins(self, value: Any) -> frozenset[str]:
        """The arguments that a value is made of."""
        own = self._arguments.get(id(value), frozenset())
        return own | self._made.get(value, own) if isinstance(value, Tensor) else own


class _Looking(TorchFunctionMode):
    """Notices where code that isn't a library's reads values of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.has_read = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if not self.has_read and getattr(func, "__name__", "") in _READING:
            frame = sys._getframe(1)
            while frame.f_back is not None and frame.f_globals.get("__name__") in (
                "torch._tensor",
                "torch.overrides",
                "torch.utils._device",
            ):
                frame = frame.f_back
            module = str(frame.f_globals.get("__name__", ""))
            self.has_read = module.partition(".")[0] not in _LIBRARIES
        return func(*args, **(kwargs or {}))


def _keeps(func: Any, given: Sequence[Tensor], made: Sequence[Tensor]) -> bool:
    """Whether a function changes nothing but type and shape."""
    if getattr(func, "__name__", "") not in _KEEPING:
        return False
    rounds = any(x.is_floating_point() for x in given)
    return all(x.is_floating_point() or not rounds for x in made)


def _leaves(value: Any) -> Iterator[Any]:
    yield value
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))


def _parameters(fn: Any) -> Iterator[Tensor]:
    """The tensors that a distribution is made of, without masks."""
    for value in vars(fn).values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, td.Distribution):
            yield from _parameters(value)


def _as_tensor(value: Any) -> Tensor:
    """A tensor as it is: ``as_tensor`` would take it to the default device."""
    if isinstance(value, Tensor):
        return value
    return torch.as_tensor(value, device="cpu")


def _is_same(argument: Any, value: Tensor) -> bool:
    given = _as_tensor(argument).flatten().to(value.device)
    return given.shape == (value.numel(),) and torch.allclose(
        given.double(), value.double().flatten(), rtol=1e-6, atol=0, equal_nan=True
    )
