"""The README and every page of the docs with code run as they stand."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_lora as pl
from tests.networks import batch, bert
from tests.pages import blocks, names_after


@pytest.mark.untrained
def test_readme_ten_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {
        "peft_model": bert(),
        "num_data": 10,
        "train_batches": [batch(), batch()],
        "test_batches": [batch()],
    }
    exec(blocks("README.md")[0], names)
    assert names["prediction"].probs.shape == (5, 2)
    assert "accuracy" in capsys.readouterr().out
    assert (tmp_path / "posterior.nc").is_file()
    loaded = pl.load(tmp_path / "posterior", names["lora"], model=names["model"])
    assert loaded.log_evidence() == pytest.approx(
        float(names["posterior"].log_evidence())
    )


def test_readme_the_models_own_lines() -> None:
    lora = pl.lift(bert())
    names: dict[str, Any] = {"pyro": pyro, "dist": dist, "lora": lora, "num_data": 10}
    exec(blocks("README.md")[1], names)
    data = batch()
    logits = (
        pyro.poutine.trace(names["model"]).get_trace(**data).nodes["y"]["fn"].logits
    )
    assert logits.shape == (5, 2)


def test_quickstart() -> None:
    assert names_after("quickstart")["prediction"].probs.shape == (64, 2)


# A page that trains for seconds only.
@pytest.mark.untrained
@pytest.mark.filterwarnings("ignore:The held-out loss is least at the grid's end")
def test_laplace() -> None:
    names = names_after("quickstart", "laplace")
    assert names["prediction"].probs.shape == (200, 2)
    assert names["joint"].covariance_matrix.shape == (200, 2, 200, 2)
    assert names["by_evidence"].log_evidence() >= names["posterior"].log_evidence()
    assert names["conditional"].obs_site == "y"


# A page that trains for seconds only.
@pytest.mark.untrained
@pytest.mark.filterwarnings("ignore:The weights aren't a mode")
def test_linearized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = names_after("quickstart", "linearized")
    assert names["prediction"].probs.shape == (64, 2)
    assert 0 < names["narrow"].scale <= 1
    assert len(list((tmp_path / "adapters").iterdir())) >= 8


# A page that trains for seconds only.
@pytest.mark.untrained
def test_svgd() -> None:
    names = names_after("quickstart", "svgd")
    assert len(names["mixture"].components) == 4
    assert names["last"]["ratio"] > 0


def test_prediction(capsys: pytest.CaptureFixture[str]) -> None:
    names = names_after("quickstart", "prediction")
    assert names["table"].shape[0] == 200
    assert len(names["rows"]) == 8
    assert "Laplace + temperature" in capsys.readouterr().out
    assert len(names["chosen"].indices) == 10


# A page of trees and figures, whose parts the tests of export look at.
# Few draws; and versions of ArviZ and xarray that warn of one another.
@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto")
@pytest.mark.filterwarnings("ignore:In a future version of xarray:FutureWarning")
@pytest.mark.slow
def test_arviz(capsys: pytest.CaptureFixture[str]) -> None:
    plt.close("all")  # those of other pages
    names = names_after("quickstart", "arviz")
    assert len(names["svgd_tree"]["posterior"].draw) == 4
    assert len(names["chain_tree"]["posterior"].draw) == 10
    assert names["again"].identical(names["tree"])
    assert set(names["large"].children) == set(names["tree"].children)
    printed = capsys.readouterr().out
    assert "Is the mode stationary?" in printed
    assert "AutoNormal" in printed
    assert len(plt.get_fignums()) == 7
    names["again"].close()
    names["large"].close()
    plt.close("all")


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = names_after("quickstart", "files")
    assert not any((tmp_path / "unfinished").iterdir())
    found = {path.name for path in tmp_path.iterdir() if any(path.iterdir())}
    assert found == {"posterior", "training", "draws", "particles", "mode"}
    assert names["probs"].shape == (5, 2)
    assert torch.allclose(names["probs"].sum(-1), torch.ones(5))


def test_text() -> None:
    names = names_after("text")
    assert len(set(names["third"])) > 1


@pytest.mark.slow
@pytest.mark.untrained
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_scale() -> None:
    names = names_after("scale")
    variance = names["posterior"].variance()
    assert all(not x.any() for site, x in variance.items() if site != names["name"])
    assert torch.isfinite(names["posterior"].log_evidence())


def test_preferences() -> None:
    prediction = names_after("preferences")["prediction"]
    assert (prediction.probs[:, 1] > 0.5).all()
