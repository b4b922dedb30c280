"""Files of texts with labels, and the files that are written beside them.

pandas reads the tables; what is said of them names the line. Nothing here needs torch:
what is wrong with a file is said before the libraries load.
"""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from pandas import DataFrame

    import pyro_lora as pl

MANIFEST, POSTERIOR = "manifest.json", "pyro_lora posterior"  # a file, its format
_LONGEST_FIELD = 2**31 - 1  # of a C long, wherever it is 32 bits wide
_UNREADABLE = 10**9  # values of a record that isn't CSV
Place = Callable[[int], str]  # of the n-th row in its file, as messages name it


@dataclass(frozen=True)
class Texts:
    """What a file has in two of its columns.

    Attributes:
        path: The file.
        text_column: Column of the texts.
        label_column: Column of the labels.
        texts: N texts.
        labels: N labels, or None where the file has none.
        place: Where each is in the file.
    """

    path: Path
    text_column: str
    label_column: str
    texts: Sequence[str]
    labels: Sequence[str] | None
    place: Place

    def __len__(self) -> int:
        return len(self.texts)

    def where(self, index: int) -> str:
        """The place of a row, as messages name it."""
        return f"{self.path}, {self.place(index)}"


def read_texts(
    path: Path, text_column: str, label_column: str, *, optional: bool = False
) -> Texts:
    """Texts and labels of a file.

    Args:
        path: A CSV or TSV file with a header, a JSONL or a Parquet file.
        text_column: Column of the texts.
        label_column: Column of the labels.
        optional: Whether the file may have no labels at all.

    Returns:
        The texts, labels being None where no row has one and none is needed.

    Raises:
        ValueError: If it isn't such a file, isn't in UTF-8, has no rows, or a column or
            a value is missing or of another type.
    """
    is_sheet = path.suffix.lower() in _SHEETS
    remedy = " Save the sheet as 'CSV UTF-8'." if is_sheet else ""
    read = _format_of(path, str(path), remedy).read
    if text_column == label_column:
        raise ValueError(
            f"--text-column and --label-column are both {text_column!r}; expected two "
            "columns."
        )
    frame, place = read(path)
    if not len(frame):
        raise ValueError(f"{path} has no rows.")
    needed = [text_column] if optional else [text_column, label_column]
    for column in needed:
        if column not in frame.columns:
            remedy = "Name it by --text-column or --label-column."
            if len(frame.columns) == 1 and path.suffix.lower() in (".csv", ".tsv"):
                remedy = _other_separator(frame.columns[0]) or remedy
            raise ValueError(
                f"{path} has no column {column!r}, but {sorted(frame.columns)}. "
                f"{remedy}"
            )
    texts, labels = _values(frame, text_column), _values(frame, label_column)
    file = Texts(path, text_column, label_column, texts, None, place)
    for index, text in enumerate(texts):
        if not _string(text, text_column, file, index).strip():
            raise ValueError(
                f"{file.where(index)}: the text is empty. Delete the row, or write "
                "what it says."
            )
    if optional and all(isinstance(y, str | None) and not y for y in labels):
        return file
    words = [
        _string(label, label_column, file, index, numbers=True)
        for index, label in enumerate(labels)
    ]
    return replace(file, labels=words)


def _values(frame: DataFrame, column: str) -> list[Any]:
    """Of a column, None where there is none."""
    import pandas

    values = frame[column].tolist() if column in frame.columns else [None] * len(frame)
    # isna of a list is a list, and of a value True or False.
    return [None if pandas.isna(value) is True else value for value in values]


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


def _delimited(path: Path, separator: str) -> tuple[DataFrame, Place]:
    import pandas

    text = _decoded(path)
    try:
        # The header is read as a row: a column that is there twice would be renamed.
        # Only pandas' reader in Python refuses a quote that nobody closes, instead of
        # taking all rows up to the next one for one field.
        with _long_fields():
            frame = pandas.read_csv(
                io.StringIO(text, newline=""),
                sep=separator,
                header=None,
                dtype=object,
                keep_default_na=False,
                engine="python",
            )
        if not isinstance(frame.index, pandas.RangeIndex):  # made of further values
            raise pandas.errors.ParserError("more values than columns")
    except pandas.errors.EmptyDataError:
        return pandas.DataFrame(), str
    except pandas.errors.ParserError as error:
        # pandas counts records, of which one may have several lines.
        records = list(_records(text, separator))
        width = records[0][1]
        line, values = next((r for r in records if r[1] > width), records[0])
        what = f"{values} values for {width} columns"
        if values == _UNREADABLE:
            what = f"not {path.suffix[1:].upper()} ({error})"
        remedy = (
            f"Put quotes around a text with {separator!r} in it; a quote inside of a "
            'quoted text is written twice: "".'
        )
        if width == 1:
            remedy = _other_separator(text[: text.find("\n")]) or remedy
        raise ValueError(f"{path}, line {line}: {what}. {remedy}") from error

    def place(index: int) -> str:
        return f"line {list(_records(text, separator))[index + 1][0]}"

    header = frame.iloc[0]
    twice = header[header.duplicated()]
    if len(twice):
        raise ValueError(
            f"{path}, {place(-1)}: column {twice.iloc[0]!r} is there twice. Rename one."
        )
    return frame[1:].set_axis(header, axis="columns"), place


def _other_separator(header: str) -> str | None:
    """What to ask where a header is one value; None where it has no separator."""
    for separator in ";\t,|":
        if separator in header:
            return (
                f"Is it separated by {separator!r}? Save it with ',' between the "
                "values, as .csv, or with tabs, as .tsv."
            )
    return None


def _records(text: str, separator: str) -> Iterator[tuple[int, int]]:
    """Lines where records begin, the header's first, and how many values each has."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    start = 1
    with _long_fields():
        try:
            for values in reader:
                if len(values) > 1 or "".join(values).strip():  # else pandas skips it
                    yield start, len(values)
                start = reader.line_num + 1
        except csv.Error:
            yield start, _UNREADABLE


@contextmanager
def _long_fields() -> Iterator[None]:
    """Fields of any length for csv, by which pandas reads, too."""
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _json_lines(path: Path) -> tuple[DataFrame, Place]:
    import pandas

    # Line by line: pandas' own reader drops halves of characters, makes 1.0 of a label
    # 1 above an absent one, and doesn't say in which line it failed.
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    for number, line in enumerate(io.StringIO(_decoded(path), newline=""), start=1):
        if not line.strip():
            continue
        try:
            row = msgspec.json.decode(line, type=dict[str, Any])
            # Of a key that is there twice both readers keep the last value in silence.
            keys = [key for key, _ in _pairs(line)]
        except (msgspec.MsgspecError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {number}: not JSON as expected ({error}). Write one "
                'object in each line, as {"text": "...", "label": "..."}.'
            ) from error
        twice = next((key for key, times in Counter(keys).items() if times > 1), None)
        if twice is not None:
            raise ValueError(
                f"{path}, line {number}: the key {twice!r} is there twice. Rename one."
            )
        rows.append(row)
        lines.append(number)
    return pandas.DataFrame(rows, dtype=object), lambda index: f"line {lines[index]}"


def _pairs(line: str) -> list[tuple[str, Any]]:
    """A JSON object's keys and values as they stand there; numbers are left alone."""
    pairs: list[tuple[str, Any]] = json.loads(
        line, object_pairs_hook=list, parse_int=str, parse_float=str
    )
    return pairs


def _parquet(path: Path) -> tuple[DataFrame, Place]:
    import pandas

    try:
        frame = pandas.read_parquet(path)
    except ImportError as error:
        raise ImportError(
            f"{path}: Parquet files need pyarrow. Install it by: pip install pyarrow"
        ) from error
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path}: not Parquet ({error}). Write it anew, by to_parquet of pandas."
        ) from error
    return frame.astype(object), lambda index: f"row {index + 1}"


_Columns = Mapping[str, Sequence[Any]]  # of one length


def _as_delimited(columns: _Columns, separator: str) -> bytes:
    content = io.StringIO(newline="")
    writer = csv.writer(content, delimiter=separator)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return content.getvalue().encode()


def _as_json_lines(columns: _Columns) -> bytes:
    rows = zip(*columns.values(), strict=True)
    lines = (dict(zip(columns, row, strict=True)) for row in rows)
    return msgspec.json.Encoder().encode_lines(lines)


def _as_parquet(columns: _Columns) -> bytes:
    import pandas

    return pandas.DataFrame(columns).to_parquet(index=False)


@dataclass(frozen=True)
class _Format:
    """How a table's file is read and written.

    Attributes:
        read: The table in a file, and where its rows are.
        write: A file's content.
        needs: A package that the command line itself doesn't bring.
    """

    read: Callable[[Path], tuple[DataFrame, Place]]
    write: Callable[[_Columns], bytes]
    needs: str | None = None


def _separated_by(separator: str) -> _Format:
    return _Format(
        partial(_delimited, separator=separator),
        partial(_as_delimited, separator=separator),
    )


_CSV = _separated_by(",")
_JSON_LINES = _Format(_json_lines, _as_json_lines)
_FORMATS = {
    ".csv": _CSV,
    ".tsv": _separated_by("\t"),
    ".parquet": _Format(_parquet, _as_parquet, needs="pyarrow"),
    ".json": _JSON_LINES,
    ".jsonl": _JSON_LINES,
}
_SHEETS = (".xlsx", ".xls", ".ods", ".numbers")
# Of files that are nothing but tables: those of networks and adapters end in .json.
TABLES = frozenset(_FORMATS) - {".json"}


def _format_of(path: Path, called: str, remedy: str = "") -> _Format:
    """The format that a file's name ends in.

    Raises:
        ValueError: If it isn't one of the table.
    """
    if path.suffix.lower() in _FORMATS:
        return _FORMATS[path.suffix.lower()]
    *others, last = _FORMATS
    raise ValueError(
        f"{called}: expected a file that ends in {', '.join(others)} or {last}.{remedy}"
    )


def _format_to_write(output: Path) -> _Format:
    if output.exists() and not output.is_file() and not output.suffix:
        return _CSV  # a pipe or a device, as /dev/stdout
    return _format_of(output, f"--output {output}")


def _string(
    value: Any, column: str, file: Texts, index: int, *, numbers: bool = False
) -> str:
    if value is None:
        raise ValueError(f"{file.where(index)}: no value for {column!r}.")
    if numbers and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        expected = "a string or a whole number" if numbers else "a string"
        raise ValueError(
            f"{file.where(index)}: {column!r} is of type {type(value).__name__}, "
            f"expected {expected}."
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


def read_json(file: Path) -> dict[str, Any]:
    """A file's JSON object; an empty one where it is something else, or isn't there."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


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


def check_is_free(folder: Path, replace: bool) -> None:
    """Refuse a folder with a posterior, or with anything else.

    Args:
        folder: To be written into.
        replace: Whether a posterior that is there may go.

    Raises:
        ValueError: If it has one, or other files, which are nobody's to replace.
    """
    manifest = folder / MANIFEST
    if not manifest.exists():
        others = [path.name for path in _content(folder) if not _is_left(path)]
        if others:
            raise ValueError(
                f"{folder} holds {others[0]!r} and no posterior. Name another folder: "
                "--replace puts one in the place of an earlier posterior alone."
            )
        return
    if read_json(manifest).get("format") != POSTERIOR:
        raise ValueError(
            f"{manifest} is of something else than a posterior. Name another folder."
        )
    if not replace:
        raise ValueError(
            f"{folder} holds a posterior already. Name another folder, or let "
            "--replace put the new one in its place."
        )


def check_is_new(folder: Path) -> None:
    """Refuse a folder that isn't empty.

    Raises:
        ValueError: If there is anything in it.
    """
    content = _content(folder)
    if any(path.name.startswith("draw_") for path in content):
        raise ValueError(
            f"{folder} holds draws already. Delete them, or name another folder."
        )
    if content:
        raise ValueError(
            f"{folder} holds {content[0].name!r}. Name a new folder, such as "
            f"{folder / 'draws'}."
        )


def _content(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _is_left(path: Path) -> bool:
    """Whether a fit that was killed has left it, or a file manager keeps it."""
    return path.name.startswith(".") or path.name.endswith(".pyro_lora.tmp")


def check_output(output: Path, inputs: Sequence[Path], replace: bool) -> None:
    """Refuse a file that is an input, is there already, or can't be written.

    Args:
        output: The file.
        inputs: Files that are read, and folders that hold some.
        replace: Whether a file that is there, and no input, may go.

    Raises:
        ValueError: If it is, or is in, one of the inputs, is there and shall stay, or
            its folder doesn't exist or can't be written to, or no table's name ends as
            it does.
        ImportError: If the package that writes it isn't there.
    """
    needs = _format_to_write(output).needs
    if needs and find_spec(needs) is None:
        raise ImportError(
            f"--output {output}: such files need {needs}. Install it by: pip install "
            f"{needs}"
        )
    target = output.resolve()
    for path in map(Path.resolve, inputs):
        if path == target or path in target.parents:
            raise ValueError(
                f"--output {output} would write over what is read from {path}. Name "
                "another file."
            )
    if output.exists() and not output.is_file():
        return  # a pipe or a device
    if output.exists() and not replace:
        raise ValueError(
            f"--output {output} is there already. Name another file, or let --replace "
            "put the new one in its place."
        )
    if output.exists() and not os.access(output, os.W_OK):
        raise ValueError(f"--output {output} is write-protected. Name another file.")
    if not target.parent.is_dir():
        raise ValueError(
            f"--output {output}: there is no folder {output.parent} to write into."
        )
    check_folder(target.parent, "--output")


def write_prediction(path: Path, texts: Texts, prediction: pl.Prediction) -> None:
    """A table with a row for each text, in order; it is there in full or not at all.

    Beside the text, and its label if it has one, are the prediction's own columns, as
    those of ``to_pandas``: ``predicted``, ``confidence``, ``p_negative`` and so on.

    Args:
        path: The file, in the format that its name ends in.
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
    replace_file(path, _format_to_write(path).write(columns))


def replace_file(path: Path, content: bytes) -> None:
    """Write a file aside, and rename it; a pipe or a device is written to as it is."""
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    target = path.resolve()  # what a link points to, and not the link
    handle, name = tempfile.mkstemp(prefix=f".{target.name[:100]}", dir=target.parent)
    new = Path(name)
    try:
        with open(handle, "wb") as file:
            file.write(content)
        mask = os.umask(0)
        os.umask(mask)
        new.chmod(target.stat().st_mode if target.exists() else 0o666 & ~mask)
        os.replace(new, target)
    finally:
        new.unlink(missing_ok=True)
