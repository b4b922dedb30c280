"""What a value says of itself: a title and facts, in a line or in a few.

``repr`` of every kind is made here, and a notebook's table of the same facts, so that
both have one form and stay short whatever tensors a value holds:

    normal(scale=3.0, center=0.0)

    LaplacePosterior(
        sites=lora.q_proj.A (2, 3, 16), lora.q_proj.B (2, 16, 3), and 4 more,
        weights=1,234,
        prior_precision=0.11 to 1,
    )

A repr is printed by debuggers and failing tests, of values in any state: it runs no
network, draws nothing, and reads no more of a tensor than its extremes.
"""

from __future__ import annotations

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from html import escape
from itertools import islice
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, cast

from torch import Tensor, nn
from torch.distributions import Distribution, Independent

_LINE = 88  # columns: what is longer has a line for each fact
_FACT = 160  # characters of a fact
_SHOWN = 3  # of the entries of a mapping or a list
_DEPTH = 3  # of containers in one another
_PARTS = 4  # of a site's name: lora...attention.query.A

# It says <X instance at ...> where a class of the user's has a repr that raises.
_OTHERS = reprlib.Repr()
_OTHERS.maxother = _OTHERS.maxstring = 120


class Summarised(ABC):
    """A value that says what it holds by facts, name -> a few words."""

    @abstractmethod
    def _facts(self) -> dict[str, str]:
        """What a short description says, by name."""

    def __repr__(self) -> str:
        return text(_title(self), self._facts())

    def _repr_html_(self) -> str:
        return html(_title(self), self._facts())


class ShownInside(Summarised):
    """One whose facts are said where it is a part of something else, too."""


class FieldsShown(ShownInside):
    """A dataclass, made with ``repr=False``, whose facts are its fields."""

    def _facts(self) -> dict[str, str]:
        # A value that is being unpickled doesn't have them all.
        there = vars(self)
        return {
            f.name: brief(there[f.name])
            for f in fields(cast(Any, self))
            if f.name in there
        }


def text(title: str, facts: Mapping[str, str]) -> str:
    """Title and facts, in one line where they fit into one.

    Args:
        title: What the facts are of.
        facts: Name -> words.

    >>> text("RBF", {"space": "'joint'", "bandwidth": "None"})
    "RBF(space='joint', bandwidth=None)"
    """
    line = _line(title, facts)
    if len(line) <= _LINE:
        return line
    rows = [f"    {name}={_cut(fact)},\n" for name, fact in facts.items()]
    return f"{title}(\n{''.join(rows)})"


def html(title: str, facts: Mapping[str, str]) -> str:
    """Title and facts as a notebook's table.

    Args:
        title: What the facts are of.
        facts: Name -> words.
    """
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(_cut(fact))}</td></tr>"
        for name, fact in facts.items()
    )
    return f"<table><caption>{title}</caption>{rows}</table>"


def brief(value: object, depth: int = _DEPTH) -> str:
    """A value in a few words: a tensor's shape, a function's name.

    Args:
        value: Any.
        depth: Of containers that are opened.

    >>> import torch
    >>> brief({"a": torch.zeros(2, 3), "b": 0.5, "c": brief, "d": None})
    "{'a': tensor (2, 3), 'b': 0.5, 'c': brief, and 1 more}"
    """
    if isinstance(value, Tensor):
        # Its own repr, of one number, works for tensors without storage, too.
        one = value.numel() == 1
        return repr(value.detach()) if one else f"tensor {tuple(value.shape)}"
    if isinstance(value, FunctionType | MethodType | BuiltinFunctionType | type):
        return value.__qualname__
    if isinstance(value, partial):
        return _partial(value, depth)
    if isinstance(value, nn.Module):
        return type(value).__name__
    if isinstance(value, Distribution):
        shape = tuple(value.batch_shape + value.event_shape)
        while isinstance(value, Independent):
            value = value.base_dist
        return f"{type(value).__name__} {shape}"
    if isinstance(value, ShownInside):
        return _cut(_line(_title(value), value._facts()))
    if isinstance(value, Summarised):
        return _title(value)
    if isinstance(value, Mapping | list | tuple | set | frozenset) and not depth:
        return "..."
    if isinstance(value, Mapping):
        first = [
            f"{brief(_short(k) if isinstance(k, str) else k)}: {brief(x, depth - 1)}"
            for k, x in _first(value.items())
        ]
        return f"{{{listed(first, len(value))}}}"
    if isinstance(value, list | tuple | set | frozenset):
        inside = listed([brief(x, depth - 1) for x in _first(value)], len(value))
        return f"({inside})" if isinstance(value, tuple) else f"[{inside}]"
    return " ".join(_OTHERS.repr(value).split())


def listed(first: Sequence[str], number: int) -> str:
    """The first of several, and how many more there are.

    Args:
        first: In words.
        number: Of all.

    >>> listed(["a", "b"], 7)
    'a, b, and 5 more'
    """
    rest = number - len(first)
    return ", ".join([*first, *([f"and {rest:,} more"] if rest else [])])


def weights_facts(weights: Mapping[str, Tensor], lead: int = 0) -> dict[str, str]:
    """Sites with their shapes, and how many weights they have together.

    Args:
        weights: Site -> value.
        lead: Leading dims of the values that aren't the sites' own.
    """
    shapes = {site: x.shape[lead:] for site, x in weights.items()}
    first = [f"{_short(site)} {tuple(shapes[site])}" for site in _first(shapes)]
    number = sum(shape.numel() for shape in shapes.values())
    return {"sites": listed(first, len(shapes)), "weights": f"{number:,}"}


def extent(values: Iterable[Tensor]) -> str:
    """The one number that tensors hold, or the smallest and the largest.

    Args:
        values: Of any shapes.

    >>> import torch
    >>> extent([torch.ones(2), torch.tensor(0.25)])
    '0.25 to 1'
    """
    ends = [
        float(end)
        for x in values
        if x.numel() and not x.is_meta
        for end in x.detach().aminmax()
    ]
    if not ends:
        return "none"
    low, high = f"{min(ends):.4g}", f"{max(ends):.4g}"
    return low if low == high else f"{low} to {high}"


def _partial(value: partial[Any], depth: int) -> str:
    func = value.func
    if isinstance(func, partial):
        return _partial(func, depth)
    # As poutine.scale(model, 0.5) makes one.
    if getattr(func, "__module__", None) == "pyro.poutine.messenger":
        handler, handled = value.args
        return f"{brief(handled, depth)} under {type(handler).__name__}"
    return f"partial of {brief(func, depth)}"


def _line(title: str, facts: Mapping[str, str]) -> str:
    return f"{title}({', '.join(f'{name}={_cut(x)}' for name, x in facts.items())})"


def _title(value: object) -> str:
    return type(value).__name__.lstrip("_")


def _cut(fact: str) -> str:
    return fact if len(fact) <= _FACT else f"{fact[: _FACT - 3]}..."


def _short(name: str) -> str:
    """A site's name, without the middle of a long path."""
    parts = name.split(".")
    if len(parts) <= _PARTS:
        return name
    return f"{parts[0]}...{'.'.join(parts[1 - _PARTS :])}"


def _first(values: Iterable[Any]) -> list[Any]:
    return list(islice(values, _SHOWN))
