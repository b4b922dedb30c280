"""Digests are equal where values are, in other processes too, and only there."""

import abc
import functools
import hashlib
import importlib
import subprocess
import sys
from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyro_lora.lifting.digests import update


def digest(value: Any) -> str:
    sha = hashlib.sha256()
    update(sha, value)
    return sha.hexdigest()


def adding(constant: Any) -> Any:
    return lambda x: x + constant


@dataclass(frozen=True)
class Prior:
    scale: float = 1.0

    def __call__(self) -> float:
        return self.scale


class Model:
    def __init__(self, noise: float) -> None:
        self.noise = noise

    def run(self) -> float:
        return self.noise


DIFFERENT = [
    *(None, True, 1, 1.0, "1", b"1", [], [1], [1, [2]], [[1], 2], {}, {"a": 1}, {1, 2}),
    *(torch.ones(2), torch.ones(2).double(), torch.ones(1, 2), torch.zeros(2)),
    *(np.ones(2), np.zeros(2), np.ones(2, dtype=np.float32)),
    *(
        adding(1),
        adding(2),
        adding("1"),
        adding([1]),
        lambda x: x - 1,
        len,
        Model,
        Prior,
    ),
    *(functools.partial(adding, 1), functools.partial(adding, constant=1)),
    *(Prior(), Prior(2.0), Model(1.0).run, Model(2.0).run, Model(1.0)),
]


def test_different_values_have_different_digests() -> None:
    digests = [digest(x) for x in DIFFERENT]
    assert len(set(digests)) == len(digests)


@pytest.mark.slow  # imports the library anew
def test_it_is_the_same_in_another_process() -> None:
    code = (
        "from tests.lifting.test_digests import *;"
        "print(*[digest(x) for x in DIFFERENT])"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    here = importlib.import_module("tests.lifting.test_digests")  # as it's there
    assert run.stdout.split() == [digest(x) for x in here.DIFFERENT]


json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(json, json)
def test_equal_where_the_values_are(one: Any, other: Any) -> None:
    assert (digest(one) == digest(other)) == (repr(one) == repr(other))


def test_what_holds_itself_ends() -> None:
    values: list[Any] = [1]
    values.append(values)
    assert digest(values) == digest(values)


@pytest.mark.parametrize("value", [object(), open, sys.stdout])
def test_what_is_not_known_is_its_type(value: Any) -> None:
    assert digest(value)


def test_an_expanded_number_is_its_value() -> None:
    one = torch.tensor(2.0)
    assert digest(one.expand(1)) == digest(torch.tensor([2.0]))
    assert digest(one.expand(3, 2)) == digest(torch.full((3, 2), 2.0))


def test_classes_that_are_registered_elsewhere_change_nothing() -> None:
    kinds = functools.singledispatch(lambda value: "any")
    kinds.register(Sized, lambda value: "sized")
    before = digest(kinds)
    abc.ABCMeta("Other", (), {}).register(int)  # as an import may
    kinds([1])
    kinds.register(str, lambda value: "text")  # a likelihood of another model, say
    assert digest(kinds) == before
