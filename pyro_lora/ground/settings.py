"""Checks of settings: one sentence for each way in which a value can be wrong.

Each names the setting, and says what was expected and what was found: a ``TypeError``
where it is of a wrong kind, a ``ValueError`` where it is out of its range.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


def check_gradients() -> None:
    """Check that gradients can be computed here; ``torch.no_grad()`` is no obstacle.

    Raises:
        ValueError: Inside of ``torch.inference_mode()``, from which nothing leads back.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "Gradients are needed, and torch.inference_mode() is on, in which there "
            "are none. Call this outside of that block, or use torch.no_grad()."
        )


def check_number(
    name: str, value: object, low: float = -math.inf, high: float = math.inf
) -> None:
    """Check that a setting is a finite number between two others, these included.

    Args:
        name: Of the setting.
        value: Its value. True isn't a number here; a tensor without dims may be one.
        low: The least that it may be.
        high: The largest that it may be.

    Raises:
        TypeError: If it isn't a number.
        ValueError: If it is NaN, infinite or out of the range.
    """
    number = _number(name, value)
    if not (math.isfinite(number) and low <= number <= high):
        ends = (
            f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        )
        expected = "finite" if low == -math.inf else f"finite and {ends}"
        raise ValueError(f"{name} must be {expected}, found {value}.")


def check_positive(name: str, value: object) -> None:
    """Check that a setting is a positive, finite number.

    Args:
        name: Of the setting.
        value: Its value.

    Raises:
        TypeError: If it isn't a number.
        ValueError: If it isn't positive and finite.
    """
    number = _number(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be positive and finite, found {value}.")


def _number(name: str, value: object) -> float:
    scalar = isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex()
    if isinstance(value, bool) or not (scalar or isinstance(value, Real)):
        raise TypeError(f"{name} must be a number, found {value!r}.")
    return float(value)  # type: ignore[arg-type]


def check_count(name: str, value: object, least: int = 1) -> None:
    """Check that a setting is an integer from ``least`` on.

    Args:
        name: Of the setting.
        value: Its value; True isn't a count.
        least: The least that it may be.

    Raises:
        TypeError: If it isn't an integer.
        ValueError: If it is less.
    """
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, found {value!r}.")
    if int(value) < least:
        raise ValueError(f"{name} must be at least {least}, found {value}.")


def check_word(name: str, value: object, words: Iterable[str | None]) -> None:
    """Check that a setting is one of several words.

    Args:
        name: Of the setting.
        value: Its value.
        words: What it may be; None may be among them.

    Raises:
        ValueError: If it isn't.
    """
    words = list(words)
    if not (value is None or isinstance(value, str)) or value not in words:
        last = repr(words[-1])
        listed = ", ".join(map(repr, words[:-1]))
        raise ValueError(f"{name} must be {listed} or {last}, found {value!r}.")


def check_function(name: str, value: object, expected: str) -> None:
    """Check that a setting is a function, and none of a network's own kinds of it.

    Args:
        name: Of the setting.
        value: Its value.
        expected: What should be there instead.

    Raises:
        TypeError: If it can't be called.
    """
    if not callable(value) or isinstance(value, type):
        raise TypeError(f"{name} must be {expected}, found {shown(value)}.")


def check_kind(name: str, value: object, kinds: Any, expected: str) -> None:
    """Check that a setting is of a type.

    Args:
        name: Of the setting.
        value: Its value; text isn't a sequence here.
        kinds: Types, as for ``isinstance``.
        expected: What that is, in words.

    Raises:
        TypeError: If it isn't.
    """
    text = isinstance(value, str) and kinds is not str
    if text or not isinstance(value, kinds):
        raise TypeError(f"{name} must be {expected}, found {shown(value)}.")


@runtime_checkable
class _BeforePosterior(Protocol):
    """What becomes a posterior by a call of its own, and says by which."""

    posterior_by: str


def check_fitted(name: str, value: object) -> None:
    """Check that what should be a posterior isn't still that from which it is made.

    Args:
        name: Of the argument.
        value: Its value.

    Raises:
        TypeError: If it is an engine, trained or not.
    """
    if isinstance(value, _BeforePosterior):
        own = type(value).__name__
        raise TypeError(
            f"{name} must be a posterior; this {own} isn't one yet, whether it was "
            f"trained or not. Call its {value.posterior_by}, and go on with what that "
            "returns."
        )


def check_name(name: str, value: object) -> None:
    """Check that a setting is the name of a site or an argument, or None.

    Args:
        name: Of the setting.
        value: Its value.

    Raises:
        TypeError: If it is something else.
    """
    if not (value is None or isinstance(value, str)):
        raise TypeError(f"{name} must be a name, a string, found {value!r}.")


def check_path(name: str, value: object) -> None:
    """Check that a setting is a path, or None.

    Args:
        name: Of the setting.
        value: Its value.

    Raises:
        TypeError: If it is something else.
    """
    if not (value is None or isinstance(value, str | os.PathLike)):
        raise TypeError(f"{name} must be a path, found {value!r}.")


def shown(value: object) -> str:
    """A value as errors show it.

    Args:
        value: Any.
    """
    if isinstance(value, str | int | float | None):
        return repr(value)
    module = ", a network that isn't lifted" if isinstance(value, nn.Module) else ""
    return f"a {type(value).__name__}{module}"
