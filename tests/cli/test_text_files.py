"""Every file of texts is read as it is, or refused by its name and the line."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyro_lora as pl
from pyro_lora.cli.text_files import (
    Texts,
    check_folder,
    check_output,
    given_names,
    read_texts,
    replace_file,
    write_prediction,
)

HEADER = "text,label\n"
# Any character but NUL and halves of surrogate pairs.
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0")).filter(str.strip)
ROWS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=5)


def file_of(folder: Path, content: str | bytes, name: str = "file.csv") -> Path:
    path = folder / name
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(content)
    return path


@settings(max_examples=25, deadline=None)
@given(rows=ROWS, end=st.sampled_from(["\n", "\r\n"]), mark=st.booleans())
def test_what_is_written_is_read(
    rows: list[tuple[str, str]],
    end: str,
    mark: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("files")
    with (folder / "a.csv").open(
        "w", encoding="utf-8-sig" if mark else "utf-8", newline=""
    ) as file:
        # The writer itself quotes no "\r" where lines end in "\n".
        writer = csv.writer(file, lineterminator=end, quoting=csv.QUOTE_ALL)
        writer.writerows([("text", "label"), *rows])
    lines = [json.dumps({"text": t, "label": y}, ensure_ascii=mark) for t, y in rows]
    file_of(folder, end.join(lines), "a.jsonl")
    frame = pandas.DataFrame(rows, columns=["text", "label"])
    frame.to_csv(folder / "a.tsv", sep="\t", index=False, quoting=csv.QUOTE_ALL)
    frame.to_parquet(folder / "a.parquet")
    for name in ("a.csv", "a.tsv", "a.jsonl", "a.parquet"):
        found = read_texts(folder / name, "text", "label")
        assert list(zip(found.texts, found.labels or (), strict=True)) == rows


@settings(max_examples=100, deadline=None)
@given(
    content=st.one_of(
        st.binary(),
        st.text().map(lambda text: (HEADER + text).encode("utf-8", "surrogatepass")),
        st.text('{}[]":,\\u0d8 texlab\n').map(str.encode),
    ),
    name=st.sampled_from(["a.csv", "a.tsv", "a.jsonl", "a.parquet"]),
)
def test_any_bytes_are_read_or_refused_by_name(
    content: bytes, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = file_of(tmp_path_factory.mktemp("files"), content, name)
    limit = csv.field_size_limit()
    message = ""
    try:
        found = read_texts(path, "text", "label", optional=True)
    except ValueError as error:
        message = str(error)
    assert str(path) in message or all(text.strip() for text in found.texts)
    assert csv.field_size_limit() == limit


GOOD = '{"text": "a film", "label": 0}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", HEADER + "a film,0\na film, good,1\n", "line 3: 3 values for 2 col"),
        ("a.csv", HEADER + 'a film,0\n"good,1\na play,0\n', "line 3: not CSV"),
        ("a.csv", HEADER + '"a" film,0\n', "line 2: not CSV"),
        ("a.csv", HEADER + "a film,0\n ,1\n", "line 3: the text is empty"),
        ("a.csv", "text,label,text\na,1,b\n", "line 1: column 'text' is there twice"),
        ("a.csv", HEADER + '\n"a\nb",0\na,b,1,2\n', "line 5: 4 values for 2 columns"),
        ("a.csv", HEADER + "a,b,1,2\n", "line 2: 4 values for 2 columns"),
        ("a.tsv", 'text\tlabel\n"a film\t0\n', "line 2: not TSV"),
        ("a.csv", HEADER + "a\0b,1\n", "line 2: found a NUL byte"),
        ("a.csv", (HEADER + "a,1\ncafé,1").encode("latin-1"), "line 3: .* 0xe9"),
        ("a.csv", (HEADER + "a,1\n").encode("utf-16"), "line 1: .* isn't UTF-8"),
        ("a.jsonl", GOOD + "[" * 100_000, "line 2: not JSON"),
        (
            "a.jsonl",
            f'{GOOD}{{"text": "a", "label": 1, "label": 0}}',
            "line 2: the key 'label' is there twice",
        ),
        ("a.jsonl", GOOD + '{"text": "a", "label": ' + "9" * 5000, "line 2: not JSON"),
        ("a.jsonl", GOOD + r'{"text": "\ud800", "label": 1}', "line 2: .*surrogate"),
        *(
            ("a.jsonl", GOOD + f'{{"text": {value}, "label": 1}}', "line 2: 'text' is")
            for value in ("3", "true", "[1]", '{"a": 1}')
        ),
        *(
            ("a.jsonl", GOOD + f'{{"text": "a", "label": {value}}}', "line 2: 'label'")
            for value in ("1.0", "true", "[1]", '{"a": 1}')
        ),
        ("a.jsonl", GOOD + '{"text": NaN}', "line 2: not JSON"),
        ("a.jsonl", '{"text": "a"}\n' + GOOD, "line 1: no value for 'label'"),
    ],
)
def test_refusals_name_the_line(
    name: str, content: str | bytes, message: str, tmp_path: Path
) -> None:
    path = file_of(tmp_path, content, name)
    with pytest.raises(ValueError, match=rf"{name}, {message}"):
        read_texts(path, "text", "label", optional=True)


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
@settings(max_examples=25, deadline=None)
@given(
    columns=st.lists(
        st.from_regex(r"[a-z ]+", fullmatch=True), min_size=2, unique=True
    ),
    separator=st.sampled_from(";,\t|"),
)
def test_another_separator_is_asked_for(
    ending: str,
    columns: list[str],
    separator: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    own = {".csv": ",", ".tsv": "\t"}[ending]
    rows = [separator.join(row) for row in (columns, columns)]
    folder = tmp_path_factory.mktemp("files")
    path = file_of(folder, "\n".join(rows), f"file{ending}")
    asked = re.escape(f"Is it separated by {separator!r}?")
    other = asked if separator != own else "Name it by --text-column"
    with pytest.raises(ValueError, match=f"has no column 'TEXT'.*{other}"):
        read_texts(path, "TEXT", "label", optional=True)


@pytest.mark.parametrize("second", ["good, really;1", 'a "good" film, really;1'])
def test_a_separator_in_the_header_is_asked_for_where_texts_have_commas(
    second: str, tmp_path: Path
) -> None:
    path = file_of(tmp_path, f"text;label\n{second}\n", "a.csv")
    message = r"line 2: 2 values for 1 columns\. Is it separated by ';'\?.*as \.csv"
    with pytest.raises(ValueError, match=message):
        read_texts(path, "text", "label")
    path = file_of(tmp_path, "text,label\ngood, really,1\n", "b.csv")
    with pytest.raises(ValueError, match=r"3 values for 2 columns\. Put quotes around"):
        read_texts(path, "text", "label")


def test_sheets_are_to_be_saved_as_text(tmp_path: Path) -> None:
    for name in ("a.xlsx", "a.ods"):
        with pytest.raises(ValueError, match=r"Save the sheet as 'CSV UTF-8'"):
            read_texts(file_of(tmp_path, "PK", name), "text", "label")


def test_long_fields_and_lines_of_many_rows(tmp_path: Path) -> None:
    long = "good, " * 100_000
    path = file_of(tmp_path, HEADER + f'"{long}",1\n\n"a\nplay",0\n,1\n')
    with pytest.raises(ValueError, match="line 6: the text is empty"):
        read_texts(path, "text", "label")
    path = file_of(tmp_path, HEADER + f'"{long}",1\n\n"a\nplay",0\n')
    found = read_texts(path, "text", "label")
    assert found.texts == [long, "a\nplay"]
    assert [found.where(n) for n in (0, 1)] == [f"{path}, line {n}" for n in (2, 4)]


def test_parquet_s_rows_are_counted(tmp_path: Path) -> None:
    frame = pandas.DataFrame({"text": ["a", None, "b"], "label": [1, 0, None]})
    path = tmp_path / "a.parquet"
    frame.to_parquet(path)
    with pytest.raises(ValueError, match=r"a.parquet, row 2: no value for 'text'"):
        read_texts(path, "text", "label")
    frame[["text"]].dropna().to_parquet(path)
    assert read_texts(path, "text", "label", optional=True).labels is None
    path.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"a.parquet: not Parquet"):
        read_texts(path, "text", "label")


def test_labels_are_optional_all_or_none(tmp_path: Path) -> None:
    none = file_of(tmp_path, '{"text": "a", "label": null}\n{"text": "b"}', "n.jsonl")
    assert read_texts(none, "text", "label", optional=True).labels is None
    zero = file_of(tmp_path, GOOD, "z.jsonl")
    assert read_texts(zero, "text", "label", optional=True).labels == ["0"]
    empty = file_of(tmp_path, HEADER + "a,\nb,\n")
    assert read_texts(empty, "text", "label", optional=True).labels is None


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (",,", "class 0 has no name"),
        ("a,,b", "class 1 has"),
        ("a, b,a", "'a' is there"),
    ],
)
def test_names_of_classes(option: str, message: str) -> None:
    assert given_names("") == ()
    assert given_names("a b, c") == ("a b", "c")
    with pytest.raises(ValueError, match=f"--label-names.*{message}"):
        given_names(option)


def predicted(texts: Texts) -> pl.Prediction:
    log_probs = torch.randn(len(texts), 2).log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return pl.Prediction(
        log_probs=log_probs, aleatoric_entropy=entropy, class_names=("bad", "good")
    )


@settings(max_examples=25, deadline=None)
@given(rows=ROWS, labelled=st.booleans())
def test_what_is_predicted_is_read_again_in_every_format(
    rows: list[tuple[str, str]],
    labelled: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("files")
    texts, labels = ([row[i] for row in rows] for i in (0, 1))
    file = Texts(Path("x"), "text", "label", texts, labels if labelled else None, str)
    prediction = predicted(file)
    for ending in (".csv", ".TSV", ".json", ".jsonl", ".parquet"):
        path = folder / f"p{ending}"
        check_output(path, [], replace=False)
        write_prediction(path, file, prediction)
        found = read_texts(path, "text", "label", optional=True)
        assert (found.texts, found.labels) == (file.texts, file.labels)
        names = ("bad", "good")
        best = [names[i] for i in prediction.probs.argmax(-1).tolist()]
        assert read_texts(path, "text", "predicted").labels == best
    content = (folder / "p.jsonl").read_bytes().splitlines()
    lines = [json.loads(line) for line in content]
    frame = pandas.read_parquet(folder / "p.parquet")
    for column, values in prediction.columns().items():
        if column != "label":
            assert frame[column].tolist() == values.tolist()
            assert [line[column] for line in lines] == pytest.approx(values.tolist())


def test_outputs_end_as_tables_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("p.xlsx", "p", "p.csv.gz"):
        with pytest.raises(ValueError, match=rf"--output .*{name}: .* or .jsonl.$"):
            check_output(tmp_path / name, [], replace=False)
    monkeypatch.setattr("pyro_lora.cli.text_files.find_spec", lambda _: None)
    check_output(tmp_path / "p.tsv", [], replace=False)
    with pytest.raises(ImportError, match=r"p.parquet: such files need pyarrow"):
        check_output(tmp_path / "p.parquet", [], replace=False)


def test_outputs_are_no_inputs(tmp_path: Path) -> None:
    data = file_of(tmp_path, HEADER)
    (tmp_path / "posterior").mkdir()
    (tmp_path / "link.csv").symlink_to(data)
    inputs = [data, tmp_path / "posterior"]
    for output in (
        data,
        tmp_path / "link.csv",
        tmp_path / "posterior" / ".." / "file.csv",
        tmp_path / "posterior" / "manifest.json",
        tmp_path / "posterior" / "new" / "p.csv",
    ):
        with pytest.raises(ValueError, match=r"--output .* would write over"):
            check_output(output, inputs, replace=True)
    with pytest.raises(ValueError, match="there is no folder"):
        check_output(tmp_path / "none" / "p.csv", inputs, replace=False)
    check_output(tmp_path / "p.csv", inputs, replace=False)
    check_output(Path("/dev/null"), inputs, replace=False)
    there = file_of(tmp_path, "of yesterday", "p.csv")
    with pytest.raises(ValueError, match=r"p.csv is there already.*--replace"):
        check_output(there, inputs, replace=False)
    check_output(there, inputs, replace=True)


def test_targets_are_looked_at_beforehand(tmp_path: Path) -> None:
    file = file_of(tmp_path, "")
    for folder in (file, file / "below", tmp_path / ("x" * 300), Path("/proc/x")):
        with pytest.raises(ValueError, match="POSTERIOR"):
            check_folder(folder, "POSTERIOR")
    with pytest.raises(ValueError, match="is the folder that is read"):
        check_folder(tmp_path / "a" / "..", "POSTERIOR", tmp_path)
    check_folder(tmp_path / "a" / "b", "POSTERIOR")
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_is_replaced_in_full_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, link = file_of(tmp_path, "old"), tmp_path / "link.csv"
    path.chmod(0o640)
    link.symlink_to(path)
    replace_file(link, b"new\r\n")
    assert path.read_bytes() == b"new\r\n"
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    replace_file(Path("/dev/null"), b"to nobody")

    def fail(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="full"):
        replace_file(path, b"newer")
    assert path.read_bytes() == b"new\r\n"
    assert {p.name for p in tmp_path.iterdir()} == {"file.csv", "link.csv"}
