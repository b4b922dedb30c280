"""Questions about tensors' values, which are answered together.

A program runs ahead of its GPU until it needs to know a value; then it waits until all
that it has asked for is done. So what a batch has to be asked, "are these gradients
finite", "which tokens count", is gathered on the device and read at once::

    with gathered():
        require(x.isfinite().all(), lambda: ValueError("x isn't finite"))
        whole = ask(mask.all())
        ...
        if whole:  # here both are read, in one transfer, and the error is raised

The first answer that is needed reads all that were asked for before it, and the end of
the block what is left. Outside of such a block each is read by itself, at once.

Where tensors have shapes but no values, as when the memory of a run is planned, nothing
can be read. So each question is asked together with its usual answer, and where a
smaller run has been through the same questions, its answers are taken.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyro_lora.ground.interrupts import undone
from pyro_lora.ground.ranks import is_agreed

T = TypeVar("T")

_ALL_TRUE: Any = torch._is_all_true


class Answer:
    """A number, or a yes or no, on its way from a device.

    Args:
        asked: A tensor with one element.
        gathering: With what it's read.
        usual: What it is where nothing can be read.
    """

    def __init__(self, asked: Tensor, gathering: Gathering, usual: float) -> None:
        self._asked: Tensor | None = asked.detach()
        self._gathering = gathering
        self.usual = usual
        self._value = 0.0

    def __bool__(self) -> bool:
        return bool(self.value)

    def __int__(self) -> int:
        return int(self.value)

    @property
    def value(self) -> float:
        """The number, which is read with all others that are on their way."""
        if self._asked is not None:
            self._gathering.read()
        return self._value


class Gathering:
    """What is asked for until it's read."""

    def __init__(self) -> None:
        self._answers: list[Answer] = []
        self._checks: list[tuple[Answer, Callable[[], Exception]]] = []
        self.invalid: Callable[[], Exception] | None = None  # while validating

    def ask(self, asked: Tensor, usual: float = True) -> Answer:
        """See :func:`ask`."""
        self._answers.append(Answer(asked, self, usual))
        return self._answers[-1]

    def require(self, holds: Tensor, error: Callable[[], Exception]) -> None:
        """See :func:`require`."""
        self._checks.append((Answer(holds, self, usual=True), error))

    def read(self) -> None:
        """Read all that was asked for: one transfer from each device.

        Raises:
            Exception: The error of the first check that doesn't hold.
        """
        answers, checks = self._answers, self._checks
        required = [answer for answer, _ in checks]
        values = _values(answers, required)
        self._answers, self._checks = [], []  # now: a transfer may be interrupted
        for answer, value in zip([*answers, *required], values, strict=True):
            answer._asked, answer._value = None, value
        for answer, error in checks:
            if not answer:
                with _instead(None):  # what it asks is answered at once
                    raise error()

    @contextmanager
    def validating(self, invalid: Callable[[], Exception]) -> Iterator[None]:
        """Let PyTorch's validation of distributions be among the checks, for a block.

        Args:
            invalid: Makes the error.
        """
        # PyTorch asks by this function, and by nothing else (seen with 2.13).

        def put_back() -> None:
            torch._is_all_true = _ALL_TRUE
            self.invalid = None

        with undone(put_back):
            self.invalid = invalid
            torch._is_all_true = _taken_for_true  # type: ignore[assignment]
            yield

    def forget(self, error: Callable[[], Exception]) -> None:
        """Leave out the checks that would raise this error."""
        self._checks = [check for check in self._checks if check[1] is not error]


class NeedsAllRanksError(Exception):
    """What is run once more can't be run by one rank alone: no failure of its own."""


class _Present(threading.local):
    gathering: Gathering | None = None
    is_again: bool = False  # whether something is run once more, to say what is wrong
    kept: list[float] | None = None  # every answer, for a run of the same form
    given: Iterator[float] | None = None  # in place of all that would be read


_PRESENT = _Present()


@contextmanager
def _instead(gathering: Gathering | None) -> Iterator[None]:
    before = _PRESENT.gathering
    with undone(partial(setattr, _PRESENT, "gathering", before)):
        _PRESENT.gathering = gathering
        yield


@contextmanager
def gathered() -> Iterator[Gathering]:
    """Gather in a block what is asked for; inside of another one, in that.

    Where the block fails, what was asked before may tell why, and that is raised.
    """
    if _PRESENT.gathering is not None:
        yield _PRESENT.gathering
        return
    own = Gathering()
    with _instead(own):
        with _saying_why(own):
            yield own
        own.read()


@contextmanager
def _saying_why(gathering: Gathering) -> Iterator[None]:
    is_done = False

    def say() -> None:
        if not is_done and isinstance(sys.exception(), Exception):
            with suppress(RuntimeError):  # of a GPU that an assert has stopped
                gathering.read()

    try:
        yield
        is_done = True
    finally:
        say()


@contextmanager
def answers_kept() -> Iterator[list[float]]:
    """Keep every answer of a block, in order; of checks there is none."""
    with undone(partial(setattr, _PRESENT, "kept", _PRESENT.kept)):
        _PRESENT.kept = []
        yield _PRESENT.kept


@contextmanager
def without_reading(answers: Sequence[float] = ()) -> Iterator[None]:
    """Read nothing in a block, whose tensors have no values.

    Args:
        answers: Those of a block that asks the same; where there are none, the usual
            ones. Checks hold.
    """
    with undone(partial(setattr, _PRESENT, "given", _PRESENT.given)):
        _PRESENT.given = iter(answers)
        yield


@contextmanager
def once_more() -> Iterator[None]:
    """A block that runs something again to say what is wrong, on this rank alone.

    Raises:
        NeedsAllRanksError: If it comes to what needs the others, who are elsewhere.
    """
    with undone(partial(setattr, _PRESENT, "is_again", _PRESENT.is_again)):
        _PRESENT.is_again = True
        yield


def before_all_ranks() -> None:
    """Say that something comes for which all ranks are needed.

    From here on distributions are validated as ever, since what has been here can't be
    run once more to say what is wrong.

    Raises:
        NeedsAllRanksError: If it is being run once more.
    """
    if _PRESENT.is_again:
        raise NeedsAllRanksError("Run by all ranks, or not at all.")
    if _PRESENT.gathering is not None:
        _PRESENT.gathering.invalid = None


def values_are_known() -> bool:
    """Whether tensors have values: not within :func:`without_reading`."""
    return _PRESENT.given is None


def lacks_values(x: Tensor) -> bool:
    """Whether a tensor has no values where it should have some."""
    return x.is_meta and values_are_known()


def ask(asked: Tensor, usual: float = True) -> Answer:
    """Ask for a number, or a yes or no, that is needed later.

    Args:
        asked: A tensor with one element.
        usual: What it is of usual data: in batches, batch first, with some padding,
            where all goes well.
    """
    return (_PRESENT.gathering or Gathering()).ask(asked, usual)


def require(holds: Tensor, error: Callable[[], Exception]) -> None:
    """Raise an error, now or when answers are next read, unless something holds.

    Args:
        holds: A boolean tensor with one element.
        error: Makes the error. It may hold on to little, since it lives until then.
    """
    gathering = _PRESENT.gathering or Gathering()
    gathering.require(holds, error)
    if gathering is not _PRESENT.gathering:
        gathering.read()


def scalar(value: float | Tensor, like: Tensor) -> Tensor:
    """A number as a tensor of another's type and device.

    It's filled there: a number that is copied to a GPU waits for it.

    Args:
        value: A number, or a tensor of any shape.
        like: The other tensor.
    """
    return value.to(like) if isinstance(value, Tensor) else like.new_full((), value)


def validated(run: Callable[[], T]) -> T:
    """What a function gives, PyTorch's validation of distributions gathered, too.

    Args:
        run: Does the same each time. It's run once more, validated as ever, where it
            fails or a distribution turns out to be invalid, to say so in PyTorch's
            words: a list that it appends to has what it appends twice then.

    Raises:
        ValueError: As the function does.
    """
    here = _PRESENT.gathering
    if here is None or here.invalid is not None:
        return run()
    invalid = partial(_invalid, run)
    try:
        with here.validating(invalid):
            return run()
    except ValueError as error:  # of another error the end of the block tells why
        here.forget(invalid)
        if is_agreed(error):  # to run again, a rank needs the others
            raise
        with _instead(None), once_more(), suppress(NeedsAllRanksError):
            return run()
        raise


def _taken_for_true(valid: Tensor) -> Any:
    here = _PRESENT.gathering
    if here is None or here.invalid is None or torch.compiler.is_compiling():
        return _ALL_TRUE(valid)
    here.require(_ALL_TRUE(valid), here.invalid)
    return True


def _invalid(again: Callable[[], object]) -> Exception:
    with once_more(), suppress(NeedsAllRanksError):
        again()  # which raises, if it does the same as before
    return ValueError(
        "A distribution's parameters, or a value, aren't what it allows, though they "
        "were when the model ran once more. Give the model the same each time."
    )


def _values(answers: Sequence[Answer], required: Sequence[Answer]) -> list[float]:
    if _PRESENT.given is not None:
        # Checks aren't among what is kept: which there are depends on the network.
        values = [next(_PRESENT.given, a.usual) for a in answers]
        return values + [a.usual for a in required]
    both = [*answers, *required]
    values = _transferred([a._asked for a in both if a._asked is not None])
    if _PRESENT.kept is not None:
        _PRESENT.kept += values[: len(answers)]
    return values


def _transferred(tensors: Sequence[Tensor]) -> list[float]:
    """The values of tensors with one element, by one transfer from each device."""
    values = [0.0] * len(tensors)
    by_device: dict[torch.device, dict[torch.dtype, list[int]]] = {}
    for i, x in enumerate(tensors):
        by_device.setdefault(x.device, {}).setdefault(x.dtype, []).append(i)
    for by_dtype in by_device.values():
        stacks = [
            torch.stack([tensors[i].reshape(()) for i in places]).double()
            for places in by_dtype.values()
        ]
        numbers = torch.cat(stacks).tolist()
        places = [i for of_dtype in by_dtype.values() for i in of_dtype]
        for i, number in zip(places, numbers, strict=True):
            values[i] = number
    return values
