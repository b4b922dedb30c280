"""The commands do what the public functions do, on a tiny adapter's folder."""

import csv
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyro
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch.testing import assert_close
from transformers import (
    AutoModelForSequenceClassification,
)
from typer.main import get_command
from typer.testing import CliRunner

import pyro_lora as pl
from pyro_lora.cli import saved_classifier
from pyro_lora.cli.commands import Method, app
from pyro_lora.cli.saved_classifier import (
    check_tokens,
    load_with,
    save_with,
    text_batches,
)
from pyro_lora.cli.saved_settings import (
    Settings,
    class_names,
    network_names,
    remembered,
    settings_of,
)
from pyro_lora.cli.text_files import Texts
from tests import words
from tests.export.test_checkpoint_killed import child
from tests.words import LABELS, TEXTS

pytestmark = pytest.mark.untrained


@dataclass(frozen=True)
class Place:
    folder: Path
    adapter: Path
    train: Path
    test: Path  # as JSONL


def write_csv(path: Path, label: dict[bool, str], name: str = "label") -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", name])
        writer.writerows([t, label[y]] for t, y in zip(TEXTS, LABELS, strict=True))
    return path


def saved_adapter(folder: Path) -> Path:
    """A base network with its tokenizer, and a trained adapter, in two folders."""
    network = words.adapted(words.saved_base(folder / "base"))
    words.tokenizer().save_pretrained(folder / "base")
    network.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    return folder / "adapter"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    train = write_csv(folder / "train.csv", {True: "1", False: "0"})
    test = folder / "test.jsonl"
    lines = [{"text": t, "label": int(y)} for t, y in zip(TEXTS, LABELS, strict=True)]
    test.write_text("\n".join(json.dumps(line) for line in lines[::-1]))
    return Place(folder, saved_adapter(folder), train, test)


def run(*args: object, code: int = 0) -> str:
    result = CliRunner().invoke(
        app, [str(a) for a in args], env={"COLUMNS": "100", "TERM": "dumb"}
    )
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def python_side(place: Place, names: tuple[str, ...] = ("0", "1")) -> Any:
    """The same network and model, by public names."""
    base = AutoModelForSequenceClassification.from_pretrained(place.folder / "base")
    network = PeftModel.from_pretrained(base, str(place.adapter)).eval()
    lora = pl.lift(network, prior=pl.priors.normal(scale=1.0))
    settings = Settings(
        adapter=str(place.adapter),
        label_names=names,
        text_column="text",
        label_column="label",
        max_length=128,
        prior_scale=1.0,
    )
    return lora, pl.models.classification(lora, len(TEXTS)), settings


def texts(texts: list[str], labels: list[str]) -> Texts:
    return Texts(Path("x"), "text", "label", texts, labels, "line {}".format)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def laplace(place: Place) -> Path:
    posterior = place.folder / "laplace"
    output = run("fit", place.adapter, place.train, posterior)
    assert "100%" not in output  # bars are for terminals
    assert "log evidence, prior chosen by it" in output
    return posterior


@pytest.fixture(scope="module")
def svgd(place: Place) -> Path:
    posterior = place.folder / "svgd"
    output = run(
        "fit",
        place.adapter,
        place.train,
        posterior,
        *("--method", "svgd", "--num-particles", 3, "--epochs", 2, "--batch-size", 6),
    )
    rows = re.findall(r"^\W* (\w+) ", output, re.MULTILINE)
    assert rows[rows.index("particles") + 1] == "nll"  # what says how training went
    assert "mean_kernel" in rows
    assert "loss" not in rows
    assert "100%" not in output
    return posterior


def refined_in_python(place: Place, lora: Any, model: Any, settings: Any) -> Any:
    start, exact = lora.init_to_adapter(), pl.structures.Exact()
    guide = pl.AutoLaplace(model, init_loc_fn=start, structure=exact)
    train = texts(TEXTS, [str(int(y)) for y in LABELS])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The weights aren't a mode")
        return guide.laplace_approximation(text_batches(train, settings, 5, lora))


def test_a_fit_of_few_texts_is_refined(place: Place, laplace: Path) -> None:
    lora, model, settings = python_side(place)
    found = pl.load(laplace, lora, model=model)
    assert isinstance(found, pl.LaplacePosterior)
    exact = refined_in_python(place, lora, model, settings)
    expected = exact.refine().optimize_prior()
    assert_close(found.mode(), expected.mode())
    assert_close(found.variance(), expected.variance(), rtol=1e-3, atol=1e-6)


def test_a_fit_of_many_is_laplace_s_approximation(place: Place, tmp_path: Path) -> None:
    run("fit", place.adapter, place.train, tmp_path / "p", "--method", "laplace")
    lora, model, settings = python_side(place)
    found = pl.load(tmp_path / "p", lora, model=model)
    train = texts(TEXTS, [str(int(y)) for y in LABELS])
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
    batches = text_batches(train, settings, 5, lora)
    expected = guide.laplace_approximation(batches).optimize_prior()
    assert isinstance(found, pl.LaplacePosterior)
    assert_close(found.mode(), expected.mode())
    assert_close(found.variance(), expected.variance(), rtol=1e-3, atol=1e-6)
    assert Method.for_size(2000, 50_000) is Method.refined
    assert Method.for_size(2000, 50_001) is Method.laplace
    assert Method.for_size(2001, 1) is Method.laplace


def test_the_adapter_of_what_is_refined_is_the_trained_one(
    place: Place, tmp_path: Path
) -> None:
    lora, model, settings = python_side(place)
    exact = refined_in_python(place, lora, model, settings)
    posterior = exact.refine(around="prior")
    moved = [(x - posterior.mode()[s]).abs().max() for s, x in lora.weights().items()]
    assert max(moved) > 0.01
    pl.save(posterior, tmp_path / "refined")
    options = ("--mode", "--adapter", place.adapter)
    run("export", tmp_path / "refined", tmp_path / "out", *options)
    (folder,) = (tmp_path / "out").iterdir()
    found = pl.ensemble(lora, [folder]).particles
    assert_close({s: x[0] for s, x in found.items()}, lora.weights())


def test_particles_start_apart_as_far_as_half_precision_sees(
    place: Place, tmp_path: Path
) -> None:
    options = ("--method", "svgd", "--epochs", 1, "--learning-rate", 0)
    run("fit", place.adapter, place.train, tmp_path / "start", *options)
    lora, model, _ = python_side(place)
    found = pl.load(tmp_path / "start", lora, model=model)
    assert isinstance(found, pl.ParticlePosterior)
    for site, value in lora.weights().items():
        a = lora.weights().get(f"{site.removesuffix('B')}A")
        size = value.flatten(1).square().mean(1).sqrt()
        if site.endswith(".B"):
            assert a is not None
            size = 1 / (4 * a.flatten(1).norm(dim=1))  # lora_alpha / r = 8 / 2
        moved = (found.particles[site] - value).transpose(0, 1).flatten(1)
        ratio = moved.square().mean(1) / (2**-7 * size).square()  # (L,)
        # 5 standard errors of the mean square of so many normal numbers.
        error = 5 * (2 / moved.shape[1]) ** 0.5
        assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=error)


def test_predictions_are_those_of_predict(
    place: Place, laplace: Path, tmp_path: Path
) -> None:
    output = run("predict", laplace, place.test, "--output", tmp_path / "p.csv")
    lora, model, settings = python_side(place)
    test = texts(TEXTS[::-1], [str(int(y)) for y in LABELS[::-1]])
    expected = pl.predict(
        pl.load(laplace, lora, model=model),
        text_batches(test, settings, 32, lora),
        model=model,
        method="linearized",
    )
    written = rows(tmp_path / "p.csv")
    assert len(written) == len(TEXTS)
    for index, row in enumerate(written):
        p = expected.probs[index].double()
        for column, value in (
            ("p_0", p[0]),
            ("p_1", p[1]),
            ("confidence", p.max()),
            ("total_entropy", expected.total_entropy[index]),
            ("epistemic_entropy", expected.epistemic_entropy[index]),
        ):
            assert float(row[column]) == pytest.approx(float(value), abs=1e-5)
        assert row["predicted"] == str(int(p.argmax()))
    assert "100%" not in output
    assert f"prediction of {place.test}" in output.replace("\n", "")
    for name in ("accuracy", "nll", "ece", "brier"):
        assert f"{expected.metrics()[name]:.3g}"[:4] in output
    assert expected.metrics()["accuracy"] > 0.7  # the adapter is a trained one


def test_the_format_of_what_is_written_is_that_of_its_name(
    place: Place, laplace: Path, tmp_path: Path
) -> None:
    run("predict", laplace, place.test, "--output", tmp_path / "p.csv")
    run("predict", laplace, place.test, "--output", tmp_path / "p.jsonl")
    lines = [json.loads(x) for x in (tmp_path / "p.jsonl").read_text().splitlines()]
    as_text = [{name: str(value) for name, value in line.items()} for line in lines]
    assert as_text == rows(tmp_path / "p.csv")
    assert "accuracy" in run("predict", laplace, tmp_path / "p.jsonl")


def test_particles_predict_by_sampling(
    place: Place, svgd: Path, tmp_path: Path
) -> None:
    run("predict", svgd, place.train, "--output", tmp_path / "p.csv")
    lora, model, settings = python_side(place)
    particles = pl.load(svgd, lora, model=model)
    assert isinstance(particles, pl.ParticlePosterior)
    assert particles.num_particles == 3
    data = texts(TEXTS, [str(int(y)) for y in LABELS])
    expected = pl.predict(
        particles, text_batches(data, settings, 32, lora), model=model
    )
    found = [float(row["p_1"]) for row in rows(tmp_path / "p.csv")]
    assert found == pytest.approx(expected.probs[:, 1].tolist(), abs=1e-5)


@pytest.mark.filterwarnings("ignore:Averaged over draws")
def test_a_seed_gives_the_same_numbers(
    place: Place, laplace: Path, tmp_path: Path
) -> None:
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        file = tmp_path / f"{name}.csv"
        options = ("--method", "sample", "--num-samples", 4, "--output", file)
        run("predict", laplace, place.test, *options, "--seed", seed)
        found.append(file.read_text())
    assert found[0] == found[1] != found[2]


def test_texts_without_labels(place: Place, laplace: Path, tmp_path: Path) -> None:
    file = tmp_path / "texts.csv"
    file.write_text("text\n" + "\n".join(TEXTS))
    output = run("predict", laplace, file, "--output", tmp_path / "p.csv")
    assert "mean confidence" in output
    assert "accuracy" not in output
    assert len(rows(tmp_path / "p.csv")) == len(TEXTS)


def test_diagnose_prints_the_diagnosis(place: Place, laplace: Path) -> None:
    output = run("diagnose", laplace, place.train)
    lora, model, settings = python_side(place)
    data = texts(TEXTS, [str(int(y)) for y in LABELS])
    pyro.set_rng_seed(0)
    expected = pl.diagnose(
        pl.load(laplace, lora, model=model),
        text_batches(data, settings, 32, lora),
        model=model,
    )
    assert str(expected).splitlines()[0] in output
    assert "give --held-out for what counts" in output
    assert "held_out=" not in output
    held_out = run("diagnose", laplace, place.train, "--held-out", place.test)
    assert held_out != output


def test_exported_adapters_load(place: Place, svgd: Path, tmp_path: Path) -> None:
    run("export", svgd, tmp_path / "adapters", "--num-samples", 3)
    lora, _, _ = python_side(place)
    particles = pl.load(svgd, lora).sample(3)
    for index in range(3):
        base = AutoModelForSequenceClassification.from_pretrained(place.folder / "base")
        folder = tmp_path / "adapters" / f"draw_{index:03d}"
        alone = pl.lift(PeftModel.from_pretrained(base, str(folder)))
        draw = {site: value[index] for site, value in particles.items()}
        assert_close(alone.weights(), draw)


def test_all_particles_or_the_mode_are_exported(
    place: Place, laplace: Path, svgd: Path, tmp_path: Path
) -> None:
    output = run("export", svgd, tmp_path / "particles")
    assert "draw_002" in output
    assert len(list((tmp_path / "particles").iterdir())) == 3
    run("export", laplace, tmp_path / "mode", "--mode")
    lora, _, _ = python_side(place)
    (folder,) = (tmp_path / "mode").iterdir()
    found = pl.ensemble(lora, [folder]).particles
    assert_close({s: x[0] for s, x in found.items()}, lora.weights())
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # as in a terminal
        draws = run("export", laplace, tmp_path / "draws", "--num-samples", 1)
    assert "may predict at chance" in draws
    assert "Here: write the mode, by --mode" in draws.replace("\n", " ")
    again = run("export", laplace, tmp_path / "mode", code=1)
    assert "holds draws already" in again
    assert "no mode" in run("export", svgd, tmp_path / "no", "--mode", code=1)


def test_training_first(place: Place, tmp_path: Path) -> None:
    options = ("--epochs", 2, "--learning-rate", 0.01)
    run("fit", place.adapter, place.train, tmp_path / "trained", *options)
    lora, _, _ = python_side(place)
    moved = pl.load(tmp_path / "trained", lora).mode()  # type: ignore[union-attr]
    distances = [(moved[s] - w).abs().max() for s, w in lora.weights().items()]
    assert 0.005 < max(distances) < 0.1


def test_labels_that_are_words(place: Place, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "words.csv", {True: "pos", False: "neg"}, "sentiment")
    options = ("--label-column", "sentiment", "--epochs", 0)
    wrong = run("fit", place.adapter, data, tmp_path / "p", *options, code=1)
    assert "line 2: label 'pos' isn't one of the classes 'LABEL_0', 'LABEL_1'" in wrong
    options = (*options, "--label-names", "neg, pos")
    run("fit", place.adapter, data, tmp_path / "p", *options)
    output = run("predict", tmp_path / "p", data, "--output", tmp_path / "p.csv")
    assert "accuracy" in output
    written = rows(tmp_path / "p.csv")
    assert written[0].keys() >= {"p_neg", "p_pos"}
    predicted = [row["predicted"] for row in written]
    assert predicted == ["pos" if y else "neg" for y in LABELS]


def test_what_is_written_stands_beside_the_text(
    place: Place, laplace: Path, tmp_path: Path
) -> None:
    run("predict", laplace, place.test, "--output", tmp_path / "p.csv")
    written = rows(tmp_path / "p.csv")
    assert [row["text"] for row in written] == TEXTS[::-1]
    assert [row["label"] for row in written] == [str(int(y)) for y in LABELS[::-1]]


def test_warnings_are_sentences(place: Place, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # as in a terminal
        options = ("--method", "laplace")
        output = run("fit", place.adapter, place.train, tmp_path / "p", *options)
    assert "Warning: The weights aren't a mode of the log joint" in output
    assert "by (more) --epochs, as in --epochs 1" in output
    assert "UserWarning" not in output
    assert "FutureWarning" not in output


def test_spreadsheets_files_and_ragged_ones(
    place: Place, laplace: Path, tmp_path: Path
) -> None:
    content = place.train.read_text().splitlines()
    excel = tmp_path / "excel.CSV"
    excel.write_text("\ufeff" + "\r\n".join(content), "utf-8")
    assert "accuracy" in run("predict", laplace, excel)
    for name, text, message in (
        ("short.csv", "text,label\na film,1\na play\n", "line 3: no value for 'label'"),
        ("bad.jsonl", '{"text": "a", "label": 1}\n{"te', "line 2: not JSON"),
        ("list.jsonl", "[1]\n", "line 1: not JSON as expected (Expected `object`"),
        ("null.jsonl", '{"text": null, "label": 1}', "line 1: no value for 'text'"),
    ):
        file = tmp_path / name
        file.write_text(text)
        output = run("predict", laplace, file, code=1)
        assert f"{name}, {message}" in output.replace("\n", "")


def test_errors_are_sentences(place: Place, laplace: Path, tmp_path: Path) -> None:
    fit = ("fit", place.adapter)
    out = tmp_path / "out"
    empty, other = tmp_path / "empty.csv", tmp_path / "texts.txt"
    empty.write_text("text,label\n")
    other.write_text("good")
    three = tmp_path / "three.csv"
    three.write_text("text,label\na film,2\n")
    bert = tmp_path / "lm"
    bert.mkdir()
    config = json.loads((place.adapter / "adapter_config.json").read_text())
    (bert / "adapter_config.json").write_text(
        json.dumps({**config, "task_type": "CAUSAL_LM"})
    )
    for args, message in (
        ((*fit, empty, out), "has no rows"),
        ((*fit, other, out), "ends in .csv, .tsv, .parquet, .json or .jsonl"),
        ((*fit, place.train, out, "--text-column", "t"), "has no column 't'"),
        ((*fit, three, out), "line 2: label '2' isn't one of the classes '0', '1'"),
        (("fit", bert, place.train, out), "knows SEQ_CLS"),
        (
            ("predict", place.adapter, place.test),
            "holds no manifest.json. Make it by `pyro-lora fit`",
        ),
        ((*fit, place.train, out, "--device", "gpu"), "--device gpu: "),
        (
            ("predict", laplace, place.test, "--output", tmp_path / "no" / "p.csv"),
            f"there is no folder {tmp_path / 'no'}",
        ),
        (("diagnose", laplace, place.folder / "empty.csv"), ""),
    ):
        output = run(*args, code=1 if message else 2)
        assert message in output.replace("\n", " ")
        assert "Traceback" not in output


def test_another_base_of_the_same_shapes_is_refused(
    place: Place, tmp_path: Path
) -> None:
    run("fit", saved_adapter(tmp_path), place.train, tmp_path / "posterior")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    base.bert.encoder.layer[0].output.dense.weight.data.mul_(1.01)
    base.save_pretrained(tmp_path / "base")
    output = run("predict", tmp_path / "posterior", place.test, code=1)
    assert "output.dense.weight' has" in " ".join(output.split())
    assert "so this is another network" in " ".join(output.split())


def test_damaged_settings_are_named(place: Place, tmp_path: Path) -> None:
    posterior = tmp_path / "posterior"
    run("fit", place.adapter, place.train, posterior)
    file = posterior / "manifest.json"
    whole = file.read_text()
    for text, word in (
        (whole[:-9], "truncated"),
        (whole.replace("max_", "min_"), "alt"),
    ):
        file.write_text(text)
        output = run("predict", posterior, place.test, code=1)
        assert "manifest.json" in output
        assert word in output
        assert "Traceback" not in output


@pytest.mark.parametrize("command", ["fit", "predict", "diagnose", "export"])
def test_help_explains_every_parameter(command: str) -> None:
    assert command in run("--help")
    found: Any = get_command(app)
    for parameter in found.commands[command].params:
        assert parameter.help, parameter.name
    assert len(found.commands[command].help) > 100


PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text("utf-8")
ON_THE_PAGE = re.findall(r"^pyro-lora (\w+) (.*)$", PAGE, re.MULTILINE)


def test_the_commands_on_the_page_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {name for name, _ in ON_THE_PAGE} == {"fit", "diagnose", "predict", "export"}
    monkeypatch.chdir(tmp_path)
    for file in ("train.csv", "dev.csv", "test.csv", "reviews.jsonl"):
        Path(file).touch()
    for folder in ("my_adapter", "posterior", "particles", "saved"):
        Path(folder).mkdir()
    commands: Any = get_command(app)
    for name, rest in ON_THE_PAGE:
        context = commands.commands[name].make_context(name, shlex.split(rest))
        given = context.params["posterior"]
        assert Path(given).name in ("posterior", "particles", "stars", "saved")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:A Gaussian over several layers describes")
def test_the_commands_on_the_page_run(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_adapter").symlink_to(place.adapter)
    for file in ("train.csv", "dev.csv", "test.csv"):
        Path(file).symlink_to(place.train)
    stars = [
        {"review": text, "stars": "good" if label else "bad"}
        for text, label in zip(TEXTS, LABELS, strict=True)
    ]
    Path("reviews.jsonl").write_text("\n".join(map(json.dumps, stars)))
    lora, *_ = python_side(place)
    pl.save(pl.ensemble(lora, [lora.weights()] * 2), "saved")
    for name, rest in ON_THE_PAGE:
        run(name, *shlex.split(rest))
    assert {path.name for path in tmp_path.iterdir()} >= {
        *("posterior", "particles", "adapters", "predictions.csv")
    }


def settings_for(place: Place, names: tuple[str, str]) -> Settings:
    return Settings(
        adapter=str(place.adapter),
        label_names=names,
        text_column="text",
        label_column="label",
        max_length=128,
        prior_scale=1.0,
    )


@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_posterior_never_meets_another_fit_s_settings(
    place: Place, tmp_path: Path
) -> None:
    """Killed at each operation on files, the two are those of one and the same fit."""
    lora, *_ = python_side(place)
    fits = [
        (pl.ensemble(lora, [lora.weights()] * n), settings_for(place, names))
        for n, names in ((2, ("0", "1")), (3, ("1", "0")))
    ]
    save_with(fits[0][0], tmp_path, fits[0][1])

    def save_and_die(at: int) -> None:
        left = at

        def die(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if any(str(x).startswith(str(tmp_path)) for x in arguments):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(die)
        save_with(fits[1][0], tmp_path, fits[1][1])

    seen, killed = [], True
    while killed:
        with child(lambda: save_and_die(len(seen))) as pid:
            killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        fitted = remembered(tmp_path)
        found: Any = load_with(tmp_path, fitted, lora)
        settings = settings_of(tmp_path, fitted)
        seen.append(settings == fits[1][1])
        assert settings == fits[seen[-1]][1]
        assert found.num_particles == fits[seen[-1]][0].num_particles
        save_with(fits[0][0], tmp_path, fits[0][1])
    # The old fit up to the manifest's rename, the new one from there on.
    assert seen == sorted(seen)
    assert 5 < len(seen) - sum(seen) < len(seen) < 100


def test_a_posterior_that_is_replaced_while_it_is_read_is_refused(
    place: Place, tmp_path: Path
) -> None:
    lora, *_ = python_side(place)
    particles = pl.ensemble(lora, [lora.weights()] * 2)
    save_with(particles, tmp_path, settings_for(place, ("1", "0")))
    with pytest.raises(ValueError, match="was written to while it was read"):
        load_with(tmp_path, settings_for(place, ("0", "1")), lora)


def test_a_posterior_saved_from_python_is_read(place: Place, tmp_path: Path) -> None:
    lora, model, settings = python_side(place)
    particles = pl.ensemble(lora, [lora.weights()] * 2)
    pl.save(particles, tmp_path / "saved")
    without = run("predict", tmp_path / "saved", place.test, code=1)
    assert "name it by --adapter" in without.replace("\n", " ")
    data = tmp_path / "data.tsv"
    lines = [
        f"{t}\t{'pos' if y else 'neg'}" for t, y in zip(TEXTS, LABELS, strict=True)
    ]
    data.write_text("\n".join(["review\tmood", *lines]))
    options = ("--text-column", "review", "--label-column", "mood")
    options = ("--adapter", place.adapter, "--label-names", "neg,pos", *options)
    out = tmp_path / "p.csv"
    assert "accuracy" in run(
        "predict", tmp_path / "saved", data, *options, "--output", out
    )
    test = texts(TEXTS, [str(int(y)) for y in LABELS])
    expected = pl.predict(
        particles, text_batches(test, settings, 32, lora), model=model
    )
    found = [float(row["p_pos"]) for row in rows(out)]
    assert found == pytest.approx(expected.probs[:, 1].tolist(), abs=1e-5)
    assert "12 data" in run("diagnose", tmp_path / "saved", data, *options)
    run("export", tmp_path / "saved", tmp_path / "out", "--adapter", place.adapter)
    assert len(list((tmp_path / "out").iterdir())) == 2


def named(lora: pl.LiftedNetwork) -> Any:
    """The same network, its classes called bad and good."""
    network: Any = lora.network
    network.config.id2label = {0: "bad", 1: "good"}
    return network


@pytest.mark.parametrize("inside", [False, True])
def test_a_folder_of_save_pretrained_is_read(
    place: Place, tmp_path: Path, inside: bool
) -> None:
    lora, model, settings = python_side(place)
    named(lora)
    particles = pl.ensemble(lora, [lora.weights()] * 2, model=model)
    particles.save_pretrained(tmp_path / "saved")
    folder = tmp_path / "saved" / "posterior" if inside else tmp_path / "saved"
    data = write_csv(tmp_path / "data.csv", {True: "good", False: "bad"})
    out = tmp_path / "p.csv"
    assert "accuracy" in run("predict", folder, data, "--output", out)
    test = texts(TEXTS, [str(int(y)) for y in LABELS])
    expected = pl.predict(particles, text_batches(test, settings, 32, lora))
    found = [float(row["p_good"]) for row in rows(out)]
    assert found == pytest.approx(expected.probs[:, 1].tolist(), abs=1e-5)
    # Numbers will do for labels where they are the file's, as in a fit.
    run("predict", folder, place.test, "--output", out, "--replace")
    assert {"p_0", "p_1"} <= rows(out)[0].keys()
    assert "12 data" in run("diagnose", folder, data)
    run("export", folder, tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_a_folder_of_save_pretrained_that_is_no_classifier_s(
    place: Place, tmp_path: Path
) -> None:
    lora, *_ = python_side(place)
    model = pl.models.multi_label(lora, len(TEXTS))
    particles = pl.ensemble(lora, [lora.weights()] * 2, model=model)
    particles.save_pretrained(tmp_path / "saved")
    output = run("predict", tmp_path / "saved", place.test, code=1)
    assert "is of models.multi_label; the command line knows" in output.replace(
        "\n", " "
    )


def test_a_mixture_of_a_gaussian_and_a_particle_goes_by_draws(
    place: Place, laplace: Path, tmp_path: Path
) -> None:
    """The library's own rule holds, which isn't whether there is a Gaussian in it."""
    lora, model, settings = python_side(place)
    gaussian: Any = pl.load(laplace, lora, model=model)
    particle = pl.ensemble(lora, [lora.weights()], model=model)
    save_with(pl.MixturePosterior([gaussian, particle]), tmp_path / "mixture", settings)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert "accuracy" in run("predict", tmp_path / "mixture", place.test)


def test_an_option_of_another_method_is_refused(
    place: Place, laplace: Path, svgd: Path, tmp_path: Path
) -> None:
    fit = ("fit", place.adapter, place.train, tmp_path / "p")
    predict = ("predict", laplace, place.test)
    for args, message in (
        ((*fit, "--num-particles", 3), "--num-particles is for --method svgd"),
        ((*fit, "--learning-rate", 0.1), "--learning-rate is for training"),
        ((*fit, "--epochs", 0, "--learning-rate", 0.1), "--learning-rate is for"),
        ((*predict, "--num-samples", 3), "--num-samples is for --method sample"),
        (
            ("predict", svgd, place.test, "--num-samples", 2),
            "means over all particles for svgd",
        ),
        (
            (*predict, "--method", "linearized", "--num-samples", 3),
            "--num-samples is for --method sample",
        ),
    ):
        assert message in run(*args, code=1)
        assert not (tmp_path / "p").exists()


def test_a_posterior_and_its_adapter_move_together(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copytree(place.adapter, "adapter")
    run("fit", "adapter", place.train, "posterior")
    shutil.move(tmp_path / "here", tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    assert "accuracy" in run("predict", "there/posterior", place.test)
    shutil.move("there/adapter", "adapter")
    moved = run("predict", "there/posterior", place.test, code=1)
    assert "Say where it is by --adapter" in moved.replace("\n", " ")
    found = run("predict", "there/posterior", place.test, "--adapter", "adapter")
    assert "accuracy" in found


def test_nothing_is_replaced_unasked(
    place: Place, laplace: Path, tmp_path: Path
) -> None:
    before = (laplace / "manifest.json").read_bytes()
    again = run("fit", place.adapter, place.train, laplace, code=1)
    assert "holds a posterior already" in again
    assert (laplace / "manifest.json").read_bytes() == before
    out = tmp_path / "p.csv"
    out.write_text("of yesterday")
    predict = ("predict", laplace, place.test, "--output", out)
    assert "is there already" in run(*predict, code=1)
    assert out.read_text() == "of yesterday"
    run(*predict, "--replace")
    assert len(rows(out)) == len(TEXTS)
    run("fit", place.adapter, place.train, tmp_path / "p")
    run("fit", place.adapter, place.train, tmp_path / "p", "--replace", "--epochs", 1)


def test_a_gate_that_is_closed_is_said(place: Place, tmp_path: Path) -> None:
    turned = write_csv(tmp_path / "turned.csv", {True: "neg", False: "pos"})
    options = ("--method", "svgd", "--epochs", 1, "--label-names", "neg,pos")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an adapter that is wrong
        output = run("fit", place.adapter, turned, tmp_path / "p", *options)
    for name in ("repulsion", "ratio"):
        assert re.search(rf"{name}\W+0, gate closed", output)


def test_fit_says_how_often_the_adapter_is_right(place: Place, tmp_path: Path) -> None:
    right = run("fit", place.adapter, place.train, tmp_path / "right")
    lora, model, settings = python_side(place)
    train = texts(TEXTS, [str(int(y)) for y in LABELS])
    at_mode = pl.predict(
        pl.ensemble(lora, [lora.weights()]),
        text_batches(train, settings, 32, lora),
        model=model,
    )
    accuracy = at_mode.metrics()["accuracy"]
    assert re.search(rf"accuracy of the adapter\W+{accuracy:.4g}", right)
    assert "most frequent class" not in right
    assert "accuracy after training" not in right
    turned = write_csv(tmp_path / "turned.csv", {True: "neg", False: "pos"})
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # as in a terminal
        wrong = run(
            "fit", place.adapter, turned, tmp_path / "p", "--label-names", "neg,pos"
        )
    assert f"{1 - accuracy:.1%} of the texts" in wrong.replace("\n", " ")


@pytest.mark.parametrize("epochs", [0, 1])
def test_the_accuracy_at_the_mode_takes_no_pass_of_its_own(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int
) -> None:
    asked = []
    predict = pl.predict

    def counted(*args: Any, **options: Any) -> Any:
        asked.append(args)
        return predict(*args, **options)

    monkeypatch.setattr(pl, "predict", counted)
    folder, file = tmp_path / "p", tmp_path / "first_wrong.csv"
    labels = [str(int(y) if i else 1 - int(y)) for i, y in enumerate(LABELS)]
    lines = [f"{t},{y}" for t, y in zip(TEXTS, labels, strict=True)]
    file.write_text("\n".join(["text,label", *lines]))
    of_fit = ("--epochs", epochs, "--batch-size", 5)  # the last batch is a smaller one
    output = run("fit", place.adapter, file, folder, *of_fit)
    assert len(asked) == epochs  # before training, which may be in vain
    monkeypatch.undo()
    lora, model, settings = python_side(place)
    mode = load_with(folder, remembered(folder), lora, model).mode()
    train = text_batches(texts(TEXTS, labels), settings, 5, lora)
    at_mode = pl.predict(pl.ensemble(lora, [mode]), train, model=model)
    accuracy = at_mode.metrics()["accuracy"]
    name = "accuracy after training" if epochs else "accuracy of the adapter"
    assert re.search(rf"{name}\W+{accuracy:.4g}\W", output)


def test_the_version_is_printed() -> None:
    assert run("--version") == f"pyro-lora {version('pyro-lora')}\n"


@pytest.mark.parametrize(("option", "offline"), [((), "1"), (("--online",), "0")])
def test_the_hub_is_asked_only_if_that_is_allowed(
    place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    option: tuple[str, ...],
    offline: str,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "whatever it is")
    adapter = altered_adapter(
        place, tmp_path / "adapter", base_model_name_or_path="nobody/nothing"
    )
    output = run("fit", adapter, place.train, tmp_path / "p", *option, code=1)
    assert os.environ["HF_HUB_OFFLINE"] == offline
    assert "'nobody/nothing' can't be loaded" in output.replace("\n", " ")
    assert "--online fetches it" in output.replace("\n", " ")


def altered_adapter(place: Place, folder: Path, **config: Any) -> Path:
    shutil.copytree(place.adapter, folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return folder


WEIGHTS = "adapter_model.safetensors"
LAYER = "base_model.model.bert.encoder.layer.7.attention.self.query.lora_A.weight"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "NONSENSE"}, "adapter_config.json is no configuration"),
        ({"task_type": 5}, "adapter_config.json is no configuration"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is None"),
        ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path is ['x']"),
        ({"base_model_name_or_path": "/nowhere"}, "its base network '/nowhere' can't"),
        ({"r": "eight"}, "doesn't fit its base network"),
        ({"r": 3}, "doesn't fit its base network"),
        ({"target_modules": "("}, "doesn't fit its base network"),
    ],
)
def test_hostile_configurations(
    place: Place, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    adapter = altered_adapter(place, tmp_path / "adapter", **config)
    output = run("fit", adapter, place.train, tmp_path / "p", code=1)
    assert f"Error: {adapter}" in output
    assert message in output
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda whole, tensors: whole[:0], "is truncated"),
        (lambda whole, tensors: whole[:100], "is truncated"),
        (lambda whole, tensors: whole[:-1], "is truncated"),
        (lambda whole, tensors: save_tensors({}), "doesn't fit its base network"),
        (
            lambda whole, tensors: save_tensors(dict(sorted(tensors.items())[1:])),
            "has no weights for",
        ),
        (
            lambda whole, tensors: save_tensors({**tensors, LAYER: torch.ones(2, 16)}),
            "of another network",
        ),
        (
            lambda whole, tensors: save_tensors(
                {k: torch.full_like(x, torch.nan) for k, x in tensors.items()}
            ),
            "has NaN or infinite values",
        ),
    ],
)
def test_damaged_weights(
    place: Place, tmp_path: Path, change: Callable[..., bytes], message: str
) -> None:
    adapter = altered_adapter(place, tmp_path / "adapter")
    whole = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(change(whole, load_tensors(whole)))
    output = run("fit", adapter, place.train, tmp_path / "p", code=1)
    assert f"Error: {adapter}" in output
    assert message in output


class Evil:
    def __reduce__(self) -> Any:
        return print, ("run by pickle",)


def test_pickled_weights_run_nothing(place: Place, tmp_path: Path) -> None:
    adapter = altered_adapter(place, tmp_path / "adapter")
    (adapter / WEIGHTS).unlink()
    assert "doesn't exist" in run("fit", adapter, place.train, tmp_path / "p", code=1)
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))
    output = run("fit", adapter, place.train, tmp_path / "p", code=1)
    assert "adapter_model.bin is truncated, or holds no weights" in output
    assert "run by pickle" not in output


def test_a_base_that_lacks_weights_is_refused(place: Place, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(place.folder / "base", base)
    tensors = load_tensors((base / "model.safetensors").read_bytes())
    lost = "bert.encoder.layer.0.attention.self.query.weight"
    del tensors[lost]
    (base / "model.safetensors").write_bytes(save_tensors(tensors, {"format": "pt"}))
    adapter = altered_adapter(
        place, tmp_path / "adapter", base_model_name_or_path=str(base)
    )
    output = run("fit", adapter, place.train, tmp_path / "p", code=1)
    assert f"has weights for '{lost}'" in output


def test_classes_are_those_of_the_adapter(place: Place, tmp_path: Path) -> None:
    """Not the largest label, nor what the base network's configuration says."""
    adapter = altered_adapter(place, tmp_path / "adapter")
    tensors = load_tensors((adapter / WEIGHTS).read_bytes())
    for name, value in tensors.items():
        if "classifier" in name:
            tensors[name] = torch.cat([value, value[:1]])
    (adapter / WEIGHTS).write_bytes(save_tensors(tensors))
    assert "3" in run("fit", adapter, place.train, tmp_path / "p")
    assert remembered(tmp_path / "p").label_names == ("0", "1", "2")
    data = tmp_path / "data.csv"
    for label in ("30000000", "9" * 30, "-1", "2", "1.0", "nan", "", "³", "good"):
        data.write_text(f"text,label\na film,0\na play,{label}\n", "utf-8")
        output = run("fit", place.adapter, data, tmp_path / "q", code=1)
        assert f"{data}, line 3: " in output
        assert f"label {label!r} isn't one of the classes '0', '1'" in output
    options = ("--label-names", "0,1,2")
    output = run("fit", place.adapter, place.train, tmp_path / "q", *options, code=1)
    assert "--label-names: 3 names, but the network has 2 classes" in output


def test_numbers_that_are_names_too() -> None:
    for names, labels, expected in (
        ("01", "01", ("0", "1")),
        ("12", "12", ("1", "2")),
        ("12", "01", ("0", "1")),
        ("ab", "ab", ("a", "b")),
        ("ab", "01", ("0", "1")),
    ):
        found = class_names(names, texts(["x", "y"], list(labels)))
        assert found == expected
    with pytest.raises(ValueError, match="and numbers of them, too"):
        class_names("10", texts(["x", "y"], ["0", "1"]))


def test_long_texts_are_cut_with_a_word(place: Place, tmp_path: Path) -> None:
    file = tmp_path / "long.csv"
    file.write_text("text,label\na film,0\n" + "good film " * 30 + ",1\n")
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # as in a terminal
        output = run("fit", place.adapter, file, tmp_path / "p").replace("\n", " ")
    assert "1 of 2 texts are cut after 16 tokens" in output
    assert f"{file}, line 3" in output


def test_draws_that_predict_worse_than_the_mode_have_a_remedy_here(
    place: Place, laplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pl.Prediction, "worse_than", lambda self, other: "it is worse")
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # as in a terminal
        output = run("predict", laplace, place.test, "--method", "sample")
    assert "Averaged over draws of a Gaussian posterior, it is worse" in output
    assert "Here: leave out --method sample" in output.replace("\n", " ")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "finds no tokens in the text 'y'"),
        ([8], "token 8, but the network knows 8"),
    ],
)
def test_tokens_that_the_network_cannot_read(
    place: Place, monkeypatch: pytest.MonkeyPatch, ids: list[int], message: str
) -> None:
    class OneText:
        model_max_length = 10**30

        def __call__(self, texts: list[str], verbose: bool) -> Any:
            return SimpleNamespace(input_ids=[[7], ids])

    lora, _, settings = python_side(place)
    monkeypatch.setattr(saved_classifier, "tokenizer_of", lambda _: OneText())
    with pytest.raises(ValueError, match=f"x, line 1: .*{message}"):
        check_tokens(texts(["x", "y"], ["0", "1"]), settings, lora)


def test_nothing_is_loaded_for_a_target_that_cannot_be_written(
    place: Place, laplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a network was loaded")

    monkeypatch.setattr(saved_classifier, "network_of", fail)
    other = tmp_path / "other"
    other.mkdir()
    (other / "manifest.json").write_text('{"name": "an app"}')
    fit = ("fit", place.adapter, place.train)
    predict = ("predict", laplace, place.test, "--output")
    for args in (
        (*fit, other),
        (*fit, place.train / "below"),
        (*fit, place.adapter),
        (*predict, place.test),
        (*predict, tmp_path / "p.xlsx"),
        (*predict, laplace / "manifest.json"),
        (*predict, place.adapter / "adapter_config.json"),
        (*predict, place.folder / "base" / "config.json"),
        ("export", laplace, laplace),
        ("export", laplace, place.adapter),
        ("export", laplace, tmp_path / "a", "--mode", "--num-samples", 3),
    ):
        before = sorted(place.folder.rglob("*"))
        assert "Error: " in run(*args, code=1)
        assert sorted(place.folder.rglob("*")) == before


def test_what_files_say_is_said_before_anything_is_loaded(
    place: Place, laplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora, *_ = python_side(place)
    pl.export_adapters(pl.ensemble(lora, [lora.weights()]), tmp_path / "draws", 1)
    posterior, mine = tmp_path / "posterior", tmp_path / "mine"
    shutil.copytree(laplace, posterior)
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    other = write_csv(tmp_path / "other.csv", {True: "2", False: "0"})
    settings = json.loads(pl.load_metadata(laplace)["command_line"])

    def fail(*_: Any) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr("pyro_lora.cli.commands._prepare", fail)
    fit, new = ("fit", place.adapter), tmp_path / "new"
    for args, message in (
        (("export", laplace, tmp_path / "draws"), "holds draws already"),
        (("export", laplace, mine), "mine holds 'notes.txt'. Name a new folder"),
        (("predict", mine, place.test), "mine holds no manifest.json"),
        (("export", mine, new), "mine holds no manifest.json"),
        (("fit", mine, place.train, new), "mine/adapter_config.json doesn't exist"),
        ((*fit, place.train, mine), "mine holds 'notes.txt' and no posterior"),
        ((*fit, place.train, mine, "--replace"), "holds 'notes.txt' and no posterior"),
        ((*fit, other, new), "line 2: label '2' isn't one of the classes '0', '1'"),
        (
            (*fit, place.train, new, "--label-names", "0,1,2"),
            "3 names, but the network has 2 classes",
        ),
        (("predict", laplace, other), "line 2: label '2' isn't one of the classes"),
        (("diagnose", laplace, other), "line 2: label '2' isn't one of the classes"),
        (
            ("diagnose", laplace, place.train, "--held-out", other),
            "line 2: label '2' isn't one of the classes",
        ),
        (
            ("predict", posterior, place.test),
            f"isn't in {os.path.normpath(posterior / settings['adapter'])} any more",
        ),
    ):
        assert message in run(*args, code=1).replace("\n", " ")
    assert [path.name for path in mine.iterdir()] == ["notes.txt"]
    assert not new.exists()


def test_the_libraries_are_not_imported_for_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_csv(tmp_path / "train.csv", {True: "1", False: "0"})
    arguments = ["fit", "empty", "train.csv", "new"]
    script = (
        "import sys\nfrom pyro_lora.cli.commands import app\n"
        f"try:\n    app({arguments})\n"
        "finally:\n    print(*{'torch', 'peft', 'pyro'} & sys.modules.keys())"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert found.returncode == 1
    assert "adapter_config.json doesn't exist" in " ".join(found.stderr.split())
    assert found.stdout == "\n"


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("labels", [None, {0: "bad", 1: "good"}])
def test_classes_in_files_are_those_of_the_network(
    place: Place, tmp_path: Path, num_classes: int, labels: Any
) -> None:
    base, config = (
        tmp_path / "base",
        {"base_model_name_or_path": str(tmp_path / "base")},
    )
    shutil.copytree(place.folder / "base", base)
    said = json.loads((base / "config.json").read_text())
    said |= {} if labels is None else {"id2label": labels}
    (base / "config.json").write_text(json.dumps(said))
    adapter = altered_adapter(place, tmp_path / "adapter", **config)
    tensors = load_tensors((adapter / WEIGHTS).read_bytes())
    for name, value in tensors.items():
        if "classifier" in name:
            tensors[name] = torch.cat([value, value])[:num_classes]
    (adapter / WEIGHTS).write_bytes(save_tensors(tensors))
    network = saved_classifier.network_of(adapter)
    assert network_names(adapter) == saved_classifier.names_in(network)
    assert len(saved_classifier.names_in(network)) == num_classes
    # Where the files don't say, it's seen when they are loaded.
    (adapter / WEIGHTS).write_bytes(
        save_tensors(
            {**tensors, "base_model.model.head.dense.weight": torch.ones(5, 5)}
        )
    )
    assert network_names(adapter) is None
    (base / "config.json").unlink()
    assert network_names(adapter) is None


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((option, "nan") for option in ("--learning-rate", "--prior-scale")),
        *((option, "inf") for option in ("--learning-rate", "--prior-scale")),
        ("--learning-rate", "-1"),
        ("--prior-scale", "0"),
        ("--seed", "-1"),
        ("--seed", "4294967296"),
        *((name, "9" * 23) for name in ("--max-length", "--batch-size", "--epochs")),
        ("--num-particles", "1000000000000"),
        ("--device", "meta"),
    ],
)
def test_options_out_of_bounds_are_named(
    place: Place, tmp_path: Path, option: str, value: str
) -> None:
    code = 1 if option == "--device" else 2
    args = ("fit", place.adapter, place.train, tmp_path / "p", option, value)
    assert option in run(*args, code=code)
    assert not (tmp_path / "p").exists()


def test_a_column_that_is_called_as_a_result_is_kept(
    place: Place, tmp_path: Path
) -> None:
    data = write_csv(tmp_path / "data.csv", {True: "1", False: "0"}, "predicted")
    run("fit", place.adapter, data, tmp_path / "p", "--label-column", "predicted")
    run("predict", tmp_path / "p", data, "--output", tmp_path / "out.csv")
    written = rows(tmp_path / "out.csv")
    assert [row["predicted"] for row in written] == [str(int(y)) for y in LABELS]
    assert {row["predicted_predicted"] for row in written} <= {"0", "1"}


@pytest.mark.skipif(sys.platform != "linux", reason="others have no such names")
def test_names_of_files_that_are_no_text(
    place: Place, laplace: Path, tmp_path: Path
) -> None:
    data = tmp_path / os.fsdecode(b"caf\xe9.csv")
    data.write_bytes(place.train.read_bytes())
    assert "caf\\udce9.csv" in run("predict", laplace, data)


def test_memory_that_is_short_is_said(
    place: Place, laplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(pl, "predict", fail)
    output = run("predict", laplace, place.test, code=1)
    assert "Error: not enough memory. A smaller --batch-size" in output
