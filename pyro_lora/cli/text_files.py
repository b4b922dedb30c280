"""Files of texts with labels, and the files that are written beside them.

Nothing here needs torch: what is wrong with a file is said before the libraries load.
"""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyro_lora as pl

_LONGEST_FIELD = 2**31 - 1  # of a C long, wherever it is 32 bits wide
Record = dict[str, Any]  # column -> value


@dataclass(frozen=True)
class Texts:
    """What a file has in two of its columns.

    Attributes:
        path: The file.
        text_column: Column of the texts.
        label_column: Column of the labels.
        texts: N texts.
        labels: N labels, or None where the file has none.
        lines: Where each is in the file, counted from one.
    """

    path: Path
    text_column: str
    label_column: str
    texts: Sequence[str]
    labels: Sequence[str] | None
    lines: Sequence[int]

    def __len__(self) -> int:
        return len(self.texts)

    def where(self, index: int) -> str:
        """The place of a row, as messages name it."""
        return f"{self.path}, line {self.lines[index]}"


def read_texts(
    path: Path, text_column: str, label_column: str, *, optional: bool = False
) -> Texts:
    """Texts and labels of a file.

    Args:
        path: A CSV file with a header, or a JSONL file.
        text_column: Column of the texts.
        label_column: Column of the labels.
        optional: Whether the file may have no labels at all.

    Returns:
        The texts, labels being None where no row has one and none is needed.

    Raises:
        ValueError: If it isn't such a file, isn't in UTF-8, has no rows, or a column or
            a value is missing or of another type.
    """
    read = {".csv": _csv_rows, ".jsonl": _json_rows, ".json": _json_rows}
    if path.suffix.lower() not in read:
        raise ValueError(f"{path}: expected a file that ends in .csv or .jsonl.")
    if text_column == label_column:
        raise ValueError(
            f"--text-column and --label-column are both {text_column!r}; expected two "
            "columns."
        )
    rows = list(read[path.suffix.lower()](path, _decoded(path)))
    if not rows:
        raise ValueError(f"{path} has no rows.")
    needed = [text_column] if optional else [text_column, label_column]
    columns = {name for _, row in rows for name in row}
    for column in needed:
        if column not in columns:
            raise ValueError(
                f"{path} has no column {column!r}, but {sorted(columns)}. "
                "Name it by --text-column or --label-column."
            )
    labelled = not optional or any(
        row.get(label_column) not in (None, "") for _, row in rows
    )
    texts, labels, lines = [], [], []
    for line, row in rows:
        where = f"{path}, line {line}"
        text = _string(row, text_column, where)
        if not text.strip():
            raise ValueError(
                f"{where}: the text is empty. Delete the row, or write what it says."
            )
        texts.append(text)
        lines.append(line)
        if labelled:
            labels.append(_string(row, label_column, where, numbers=True))
    return Texts(
        path, text_column, label_column, texts, labels if labelled else None, lines
    )


def _decoded(path: Path) -> str:
    """The file's characters, without the mark that spreadsheets put first.

    Raises:
        ValueError: If it isn't text in UTF-8.
    """
    content = path.read_bytes()
    remedy = "Save it as text in UTF-8 (in spreadsheets: 'CSV UTF-8')."
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: found the byte 0x{content[error.start]:02x}, which "
            f"isn't UTF-8. {remedy}"
        ) from error
    nul = text.find("\0")
    if nul >= 0:
        line = text.count("\n", 0, nul) + 1
        raise ValueError(f"{path}, line {line}: found a NUL byte. {remedy}")
    return text


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, Record]]:
    before = csv.field_size_limit(_LONGEST_FIELD)
    # Otherwise, a quote that nobody closes takes the rest of the file for one field.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    start = 1
    header: list[str] = []
    try:
        for values in reader:
            where, line = f"{path}, line {start}", start
            start = reader.line_num + 1
            if not values:
                continue
            if not header:
                header = values
                twice = sorted({name for name in header if header.count(name) > 1})
                if twice:
                    raise ValueError(f"{where}: column {twice[0]!r} is there twice.")
                continue
            if len(values) > len(header):
                raise ValueError(
                    f"{where}: {len(values)} values for {len(header)} columns. Put "
                    "quotes around a text with commas."
                )
            yield line, dict(zip(header, values, strict=False))
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {start}: not CSV ({error}). A quote inside of a quoted text "
            'is written twice: "".'
        ) from error
    finally:
        csv.field_size_limit(before)


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, Record]]:
    for number, line in enumerate(io.StringIO(text, newline=""), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}, line {number}: expected one JSON object in each line, as "
                '{"text": "...", "label": "..."}.'
            )
        yield number, row


def _string(row: Record, column: str, where: str, *, numbers: bool = False) -> str:
    value = row.get(column)
    if value is None:
        raise ValueError(f"{where}: no value for {column!r}.")
    if numbers and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        expected = "a string or a whole number" if numbers else "a string"
        raise ValueError(
            f"{where}: {column!r} is of type {type(value).__name__}, expected "
            f"{expected}."
        )
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(
            f"{where}: {column!r} has half of a surrogate pair, which is no character. "
            "The text was cut in the middle of one: write it anew."
        )
    return value


def label_numbers(texts: Texts, names: Sequence[str]) -> list[int] | None:
    """The class of each label; None where there are no labels.

    Raises:
        ValueError: If a label isn't the name of a class.
    """
    if texts.labels is None:
        return None
    numbers = {name: i for i, name in enumerate(names)}
    for index, label in enumerate(texts.labels):
        if label not in numbers:
            raise ValueError(
                f"{texts.where(index)}: label {label!r} isn't one of the classes "
                f"{_listed(names)}. If the network's outputs are others, name all of "
                "them, in order: --label-names."
            )
    return [numbers[label] for label in texts.labels]


def _listed(names: Sequence[str], most: int = 20) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + rest


def given_names(option: str) -> tuple[str, ...]:
    """The classes in ``--label-names``, none where it is empty.

    Raises:
        ValueError: If one has no name, or two have the same.
    """
    if not option:
        return ()
    names = tuple(name.strip() for name in option.split(","))
    if "" in names:
        raise ValueError(
            f"--label-names {option!r}: class {names.index('')} has no name. Expected "
            "names with commas between them."
        )
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"--label-names: {twice[0]!r} is there twice.")
    return names


def check_folder(folder: Path, option: str, *others: Path) -> None:
    """Refuse a folder that couldn't be written to, before anything is computed.

    Args:
        folder: To be made, or to be written into.
        option: What the command line calls it.
        others: Folders with files of another kind.

    Raises:
        ValueError: If it can't be written to, or is one of the others.
    """
    for other in others:
        if folder.resolve() == other.resolve():
            raise ValueError(
                f"{option} {folder} is the folder that is read. Name another one."
            )
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise ValueError(f"{option} {folder}: {there} is no folder.")
    try:
        with suppress(FileNotFoundError):
            folder.stat()  # a name that is too long
        os.rmdir(tempfile.mkdtemp(prefix=".pyro_lora", dir=there))
    except OSError as error:
        raise ValueError(
            f"{option} {folder}: nothing can be written into {there} "
            f"({error.strerror})."
        ) from error


def check_is_ours(folder: Path) -> None:
    """Refuse a folder with the manifest of something else, which stays what it is.

    Raises:
        ValueError: If it has one.
    """
    manifest = folder / "manifest.json"
    if not manifest.exists():
        return
    try:
        form = json.loads(manifest.read_bytes())["format"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        form = None
    if form != "pyro_lora posterior":
        raise ValueError(
            f"{manifest} is of something else than a posterior. Name another folder."
        )


def check_output(output: Path, inputs: Sequence[Path]) -> None:
    """Refuse a file that is an input, or can't be written.

    Args:
        output: The file.
        inputs: Files that are read, and folders that hold some.

    Raises:
        ValueError: If it is, or is in, one of the inputs, or its folder doesn't exist
            or can't be written to.
    """
    target = output.resolve()
    for path in map(Path.resolve, inputs):
        if path == target or path in target.parents:
            raise ValueError(
                f"--output {output} would write over what is read from {path}. Name "
                "another file."
            )
    if output.exists() and not output.is_file():
        return  # a pipe or a device
    if output.exists() and not os.access(output, os.W_OK):
        raise ValueError(f"--output {output} is write-protected. Name another file.")
    if not target.parent.is_dir():
        raise ValueError(
            f"--output {output}: there is no folder {output.parent} to write into."
        )
    check_folder(target.parent, "--output")


def write_prediction(path: Path, texts: Texts, prediction: pl.Prediction) -> None:
    """A CSV file with a row for each text, in order; it is there in full or not at all.

    Beside the text, and its label if it has one, are the prediction's own columns, as
    those of ``to_pandas``: ``predicted``, ``confidence``, ``p_negative`` and so on.

    Args:
        path: The file.
        texts: What was predicted.
        prediction: For the same texts.
    """
    columns: dict[str, Sequence[Any]] = {texts.text_column: texts.texts}
    if texts.labels is not None:
        columns[texts.label_column] = texts.labels
    for name, values in prediction.columns().items():
        if name != "label":  # which the file has in its own words
            # beside a column of the file that is called so, too
            columns[f"predicted_{name}" if name in columns else name] = values.tolist()
    content = io.StringIO(newline="")
    writer = csv.writer(content)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    replace_file(path, content.getvalue())


def replace_file(path: Path, content: str) -> None:
    """Write a file aside, and rename it; a pipe or a device is written to as it is."""
    if path.exists() and not path.is_file():
        path.write_text(content, "utf-8", newline="")
        return
    target = path.resolve()  # what a link points to, and not the link
    handle, name = tempfile.mkstemp(prefix=f".{target.name[:100]}", dir=target.parent)
    new = Path(name)
    try:
        with open(handle, "w", encoding="utf-8", newline="") as file:
            file.write(content)
        mask = os.umask(0)
        os.umask(mask)
        new.chmod(target.stat().st_mode if target.exists() else 0o666 & ~mask)
        os.replace(new, target)
    finally:
        new.unlink(missing_ok=True)
