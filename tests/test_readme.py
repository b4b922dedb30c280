"""The README's code runs as it stands, and what it links to is there."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
from pyro.optim import Adam

import pyro_lora as pl
from tests import words
from tests.networks import batch, bert
from tests.pages import ROOT, blocks

README = (ROOT / "README.md").read_text(encoding="utf-8")
URLS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"]


def prepared(folder: Path) -> dict[str, Any]:
    """What the first lines start from: a folder ``my_adapter``, and texts."""
    network = words.adapted(words.saved_base(folder / "base"))
    words.saved_adapter(folder / "my_adapter", network)
    return {
        "train_texts": words.TEXTS,
        "train_labels": words.LABELS,
        "texts": ["a good play", "the bad film", "film"],
    }


@pytest.mark.untrained
def test_the_first_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = prepared(tmp_path)
    first = blocks("README.md")[0]
    exec(first, names)
    table = names["table"]
    assert [*table][:4] == ["predicted", "confidence", "p_0", "p_1"]
    assert table["predicted"].tolist()[:2] == [1, 0]
    printed = capsys.readouterr().out
    shown = next(x for x in README.splitlines() if x.lstrip().startswith("predicted "))
    assert printed.split()[:5] == shown.split()
    statements = [x for x in first.splitlines() if x and "import" not in x]
    assert len(statements) <= 10


@pytest.mark.untrained
def test_the_lines_on_pyro(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {
        **{"pl": pl, "pyro": pyro, "dist": dist, "Adam": Adam},
        **{"lora": pl.lift(bert()), "num_data": 10},
        "train_batches": [batch(), batch()],
        "test_batches": [batch()],
    }
    _, *others = blocks("README.md")
    exec("\n".join(others), names)
    assert names["prediction"].probs.shape == (5, 2)
    assert "accuracy" in capsys.readouterr().out
    assert (tmp_path / "posterior.nc").is_file()


def test_links_hold_outside_of_the_repository() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert all(link.startswith("https://") for link in links), links
    source = URLS["Source"]
    raw = source.replace("//github.com", "//raw.githubusercontent.com") + "/main/"
    ours = [
        link.removeprefix(prefix)
        for link in links
        for prefix in (raw, f"{source}/blob/main/", f"{source}/tree/main/")
        if link.startswith(prefix)
    ]
    assert len(ours) >= 4
    assert [path for path in ours if not (ROOT / path).exists()] == []
    foreign = [x for x in links if "pyro_lora" in x and not x.startswith((source, raw))]
    assert foreign == []


def test_one_version_and_one_address() -> None:
    cited = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {pl.__version__}\n" in cited
    assert f"\nrepository-code: {URLS['Source']}\n" in cited


@pytest.mark.slow
def test_the_first_lines_from_an_installed_wheel(tmp_path: Path) -> None:
    """Of the package nothing but the wheel is seen, its dependencies are ours."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = ["wheel", str(ROOT), "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, *wheel, "--wheel-dir", str(tmp_path)], check=True)
    (file,) = tmp_path.glob("pyro_lora-*.whl")
    site = tmp_path / "site"
    install = ["install", str(file), "--no-deps", "--target", str(site)]
    subprocess.run([*pip, *install], check=True)
    names = prepared(tmp_path)
    lines = [f"{name} = {value!r}" for name, value in names.items()]
    code = "\n".join(
        [*lines, blocks("README.md")[0], "print(pl.__file__, pl.__version__)"]
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert "epistemic_entropy" in done.stdout
    assert done.stdout.split()[-2:] == [
        str(site / "pyro_lora" / "__init__.py"),
        pl.__version__,
    ]
