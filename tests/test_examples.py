import json
import subprocess
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

import pyro_lora as pl
from examples import demo, methods, report, text, vader
from examples.rows import Corpus, Row, read_corpus

GOOD = ["fine", "good", "great", "lovely"]
BAD = ["awful", "bad", "dull", "poor"]
SPECIAL = ["[PAD]", "[UNK]"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a random two-layer BERT and a tokenizer of ten words."""
    folder = tmp_path / "model"
    words = {word: i for i, word in enumerate([*SPECIAL, "film", *GOOD, *BAD])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """32 rows of two or three words, in a file of JSON lines."""
    records = [
        {"text": f"{first} {second}{' film' * (i % 2)}", "label": label}
        for label, words in {"pro": GOOD, "contra": BAD}.items()
        for i, first in enumerate(words)
        for second in words
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return path


def run_demo(model: Path, rows: Path, out: Path, *options: str) -> dict[str, Any]:
    demo.main(
        [
            f"--model={model}",
            f"--train={rows}",
            f"--test={rows}",
            f"--out={out}",
            "--epochs=2",
            "--num-particles=2",
            *options,
        ]
    )
    return json.loads((out / "table.json").read_text())["rows"]


@pytest.mark.untrained
def test_demo_prints_every_method_and_writes_its_files(
    model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    found = run_demo(model, rows, out)
    assert list(found) == [
        "MAP",
        "MAP + temperature scaling",
        "deep ensemble",
        "Laplace (evidence)",
        "Laplace, refined (evidence)",
        "Laplace (held-out nll)",
        "SVGD (all weights)",
        "SVGD (function space)",
        "mixture of Laplace at these particles",
    ]
    for values in found.values():
        assert 0 <= values["accuracy"] <= 1
        assert values["auroc"] is None  # there are no other domains
        assert values["spearman"] is None  # nor ratings
    table = (out / "table.txt").read_text()
    printed = capsys.readouterr().out
    assert table.strip() in printed
    for line in table.splitlines():
        if line.startswith("MAP  "):
            assert line.split()[5:7] == ["-", "-"]
    for name in ("laplace.nc", "svgd.nc"):
        assert (out / name).stat().st_size > 0
    pictures = {path.name for path in out.glob("*.png")}
    assert pictures == {
        "delta_norms.png",
        "effective_parameters.png",
        "evidence.png",
        "forces.png",
        "khat.png",
        "norms.png",
        "pava.png",
        "rejection.png",
        "reliability.png",
    }
    assert f"Pictures in {out}: " in printed
    for name in pictures:
        assert name in printed
        pixels = plt.imread(out / name)
        assert pixels.std() > 0  # something is on it
    assert list((out / "adapters" / "laplace").glob("**/adapter_model.safetensors"))
    assert pictures | {report.MARK, "entropy.png"} | {
        x.name for x in out.iterdir()
    } == {
        report.MARK,
        *report.WRITTEN,
    }
    # Once more, with fewer methods: nothing of the first run is left among its files.
    (out / "notes.txt").write_text("mine")
    again = run_demo(model, rows, out, "--quick", "--layers=all")
    assert list(again) == [
        "MAP",
        "MAP + temperature scaling",
        "Laplace (evidence)",
        "Laplace, refined (evidence)",
    ]
    assert (out / "notes.txt").exists()
    assert not {"svgd", "svgd.nc", "mixture", "forces.png"} & {
        x.name for x in out.iterdir()
    }
    assert [x.name for x in (out / "adapters").iterdir()] == ["laplace"]


@pytest.mark.parametrize("name", ["laplace", "table.txt", "adapters"])
def test_files_of_others_are_refused_before_any_work(
    name: str,
    model: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(methods, "run")
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(SystemExit, match=rf"holds {name}, which.*--out"):
        run_demo(model, rows, out)
    (out / report.MARK).write_text('{"rows": 3')  # of something else, or half of one
    with pytest.raises(SystemExit, match=rf"holds {name}, which.*--out"):
        run_demo(model, rows, out)
    assert (out / name).read_text() == "mine"
    with pytest.raises(SystemExit, match="File exists"):
        run_demo(model, rows, out / name)


@pytest.mark.slow
@pytest.mark.untrained
def test_other_domains_and_ratings_are_measured_and_drawn(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rated = [
        Row(f"{first} {second}", label, spread=0.1 * i + 0.5 * label)
        for label, words in enumerate((BAD, GOOD))
        for i, first in enumerate(words)
        for second in words
    ]
    elsewhere = {
        name: [Row(f"film {word} {word}", 0, spread=1.0) for word in words]
        for name, words in {"news": GOOD, "shops": BAD}.items()
    }
    corpus = Corpus(train=rated, test=rated, classes=("-", "+"), domains=elsewhere)
    monkeypatch.setattr(vader, "load", lambda: corpus)
    out = tmp_path / "out"
    demo.main([f"--model={model}", f"--out={out}", "--epochs=1", "--quick"])
    table = (out / "table.txt").read_text()
    assert "test 32, news 4, shops 4" in table
    record = json.loads((out / "table.json").read_text())
    apart = record["state_distance"]
    assert apart.keys() == {"news", "shops"}
    assert min(apart.values()) > 0.8  # of words in an order that is nowhere else
    assert f"news {apart['news']:.3f}, shops {apart['shops']:.3f}" in table
    for name, values in record["rows"].items():
        assert 0 <= values["auroc"] <= 1
        assert -1 <= values["spearman"] <= 1
        (line,) = [x for x in table.splitlines() if x.startswith(f"{name}  ")]
        cells = line.removeprefix(name).split()
        assert cells[4:6] == [f"{values['auroc']:.3f}", f"{values['spearman']:.3f}"]
    assert plt.imread(out / "entropy.png").std() > 0


@pytest.mark.parametrize("layers", ["last2", "all"])
def test_what_nobody_reads_is_skipped(layers: Any, model: Path) -> None:
    config = BertConfig.from_pretrained(model, num_hidden_layers=3)
    BertForSequenceClassification(config).save_pretrained(model)
    network, tokenizer = text.load_network(
        str(model), num_classes=2, layers=layers, device="cpu"
    )
    network.double()
    texts = ["film", "film bad awful dull", "film fine", "great great"]
    (batch,) = text.batches([Row(x, 0) for x in texts], tokenizer, device="cpu")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    lora = pl.lift(network)
    torch.manual_seed(0)
    weights = {
        site: torch.randn(3, *x.shape, dtype=x.dtype, requires_grad=True)
        for site, x in lora.weights().items()
    }

    def logits_and_gradients(particle: Any) -> list[Tensor]:
        with lora.bind({site: x[particle] for site, x in weights.items()}) as net:
            logits = net(input_ids=ids, attention_mask=mask).logits
        loss = logits.square().sum()
        return [logits, *torch.autograd.grad(loss, list(weights.values()))]

    particles = [slice(None), 1]  # in one pass, and one alone
    expected = [logits_and_gradients(particle) for particle in particles]
    text.skip_unread(network)
    seen = []
    for layer in network.get_base_model().bert.encoder.layer:
        layer.output.dense.register_forward_hook(
            lambda _, inputs, output: seen.append(output.shape[:-1].numel())
        )
    found = [logits_and_gradients(particle) for particle in particles]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    num_tokens, num_texts = int(mask.sum()), len(texts)
    assert num_tokens < mask.numel()
    assert seen[-3:] == [num_tokens, num_tokens, num_texts]
    assert seen[-4] == 3 * num_texts


def test_demo_says_what_is_wrong_without_a_traceback(model: Path, rows: Path) -> None:
    with pytest.raises(SystemExit, match="give both or none"):
        demo.main([f"--train={rows}"])
    with pytest.raises(SystemExit, match=r"absent\.jsonl"):
        demo.main([f"--model={model}", f"--train={rows}", "--test=absent.jsonl"])


def test_labels_may_be_numbers_or_names_in_either_format(tmp_path: Path) -> None:
    train, test = tmp_path / "train.csv", tmp_path / "test.jsonl"
    train.write_text('text,label\n"one, two",10\nthree,9\n')
    test.write_text('{"text": "four", "label": 10}\n\n')
    corpus = read_corpus(train, test)
    assert corpus.classes == ("9", "10")
    assert corpus.train == [Row("one, two", 1), Row("three", 0)]
    assert corpus.test == [Row("four", 1)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows"),
        ('{"text": "a", "label": 1}\n', "at least two"),
        ('{"text": "a", "label": 1}\n{"text": "b"}\n', "line 2: expected the fields"),
        ('{"text": "a", "label": 1}\n[1]\n', "line 2: expected the fields"),
        ('{"text": "a", "label": 1}\n{"te', "line 2: not JSON"),
    ],
)
def test_a_bad_file_of_rows_is_named(
    tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        read_corpus(path, path)
    assert str(path) in str(raised.value)


def test_a_label_that_training_never_saw_is_refused(tmp_path: Path) -> None:
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n')
    test.write_text('{"text": "a", "label": 2}\n')
    with pytest.raises(ValueError, match="label '2' is not among"):
        read_corpus(train, test)


@pytest.mark.parametrize("fetched", [None, b"something else"])
def test_a_failed_download_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fetched: bytes | None
) -> None:
    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if fetched is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: no connection")
        folder = Path(command[command.index("-d") + 1])
        (folder / vader.ARCHIVE).write_bytes(fetched)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    cache = tmp_path / "cache"
    error, message = (
        (RuntimeError, "no connection\nCheck")
        if fetched is None
        else (ValueError, "nothing was kept")
    )
    with pytest.raises(error, match=message):
        vader.fetch(cache)
    assert not list(cache.iterdir())


def test_a_damaged_archive_in_the_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / vader.ARCHIVE).write_bytes(b"half of it")
    with pytest.raises(ValueError, match=r"Delete .* and run again"):
        vader.load(tmp_path)
