"""Data sets in a folder, and random parts of them.

A folder has ``train.jsonl`` and ``test.jsonl``, an object with ``text`` and ``label``
on each line; where there is no train file the first half of the test file is it.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from examples.rows import Corpus, read_corpus

T = TypeVar("T")


def corpus(folder: Path) -> Corpus:
    """The rows of one data set."""
    train, test = folder / "train.jsonl", folder / "test.jsonl"
    if not test.exists():
        raise SystemExit(f"{test} isn't there. {__doc__}")
    if train.exists():
        return read_corpus(train, test)
    found = read_corpus(test, test)
    half = len(found.test) // 2
    return replace(found, train=found.test[:half], test=found.test[half:])


def chosen(rows: Sequence[T], number: int, seed: int) -> list[T]:
    """A random part, the seed's own."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return [rows[i] for i in order[:number].tolist()]
