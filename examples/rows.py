"""Rows of text with a label, in memory and from files."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """A text, its class, and the standard deviation of its ratings if it has any."""

    text: str
    label: int
    spread: float | None = None


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Rows to train on, rows to test on, and rows of other domains by name."""

    train: list[Row]
    test: list[Row]
    classes: tuple[str, ...]
    domains: dict[str, list[Row]] = field(default_factory=dict)


def read_corpus(train: Path, test: Path) -> Corpus:
    """Rows from two files, JSON lines or CSV, with the fields ``text`` and ``label``.

    Labels may be numbers or names; the classes are the train file's, sorted.

    Args:
        train: File of the rows to train on.
        test: File of the rows to test on.

    Returns:
        A corpus without other domains.

    Raises:
        ValueError: A row lacks a field, or its label is unknown, or the train file
            has a single class.
    """
    pairs = {path: list(_pairs(path)) for path in (train, test)}
    labels = {label for _, label in pairs[train]}
    numeric = all(label.removeprefix("-").isdecimal() for label in labels)
    classes = tuple(sorted(labels, key=int) if numeric else sorted(labels))
    if len(classes) < 2:
        raise ValueError(f"{train}: found the labels {classes}, needs at least two.")
    rows = {}
    for path in (train, test):
        for _, label in pairs[path]:
            if label not in classes:
                raise ValueError(
                    f"{path}: label {label!r} is not among the train file's {classes}."
                )
        rows[path] = [Row(text, classes.index(label)) for text, label in pairs[path]]
    return Corpus(train=rows[train], test=rows[test], classes=classes)


def _pairs(path: Path) -> Iterator[tuple[str, str]]:
    read = _csv_records if path.suffix.lower() == ".csv" else _json_records
    number = 0
    try:
        for number, record in read(path):  # noqa: B007  # for the message
            yield str(record["text"]), str(record["label"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}, line {number}: expected the fields text and label "
            f"({type(error).__name__}: {error})."
        ) from error
    if not number:
        raise ValueError(f"{path}: no rows.")


def _csv_records(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for record in reader:
            yield reader.line_num, record


def _json_records(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{path}, line {number}: not JSON ({error}). Give one JSON "
                        "object a line, or a CSV file with a header, ending in .csv."
                    ) from error
