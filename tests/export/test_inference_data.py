"""The tree as ArviZ before version 1 has it; ArviZ itself where it is installed."""

import importlib.util
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray

import pyro_lora as pl
from tests.predict import models

QUERY = "delta.bert.encoder.layer.attention.self.query"


@pytest.fixture
def tree() -> xarray.DataTree:
    lora, model = models.classifier(prior=0.02)
    batches = models.two_batches()
    return pl.to_datatree(models.laplace(lora, model, batches), batches=batches)


def stand_in(**members: Any) -> types.ModuleType:
    module = types.ModuleType("arviz")
    for name, value in members.items():
        setattr(module, name, value)
    return module


def test_every_group_goes_over(
    tree: xarray.DataTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "arviz", stand_in(InferenceData=dict))
    groups = pl.to_inference_data(tree)
    assert set(groups) == set(tree.children)
    for name, group in groups.items():
        xarray.testing.assert_identical(group, tree[name].to_dataset())


def test_other_versions_are_refused(
    tree: xarray.DataTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match="pip install 'arviz<1'"):
        pl.to_inference_data(tree)
    monkeypatch.setitem(sys.modules, "arviz", stand_in(__version__="1.2.0"))
    with pytest.raises(ImportError, match=r"1\.2\.0 has no InferenceData"):
        pl.to_inference_data(tree)


def old_arviz() -> Any:
    """ArviZ before version 1, else the test is skipped."""
    if importlib.util.find_spec("arviz") is None:
        pytest.skip("ArviZ before version 1 isn't installed")
    arviz = pytest.importorskip("arviz")
    if not hasattr(arviz, "InferenceData"):
        pytest.skip("this ArviZ takes the tree itself")
    return arviz


@pytest.mark.filterwarnings("ignore")  # its own, of the libraries below it
def test_old_arviz_itself(tree: xarray.DataTree, tmp_path: Path) -> None:
    arviz = old_arviz()
    data = pl.to_inference_data(tree)
    table = arviz.summary(data, var_names=[f"{QUERY}.frobenius_norm"], round_to="none")
    norms = tree["posterior"][f"{QUERY}.frobenius_norm"]
    np.testing.assert_allclose(table["mean"], norms.mean(("chain", "draw")))
    found = arviz.loo(data, pointwise=True)
    log_p = torch.as_tensor(tree["log_likelihood"]["y"].values[0])
    lppd = log_p.logsumexp(0) - math.log(100)
    assert found.elpd_loo == pytest.approx(float(lppd.sum()), abs=0.05)
    assert list(arviz.compare({"one": data, "two": data}).index) == ["one", "two"]
    assert arviz.loo_pit(data, y="y", y_hat="y").shape == (10,)
    tree.to_netcdf(tmp_path / "tree.nc")
    again = arviz.from_netcdf(tmp_path / "tree.nc")
    assert set(again.groups()) == set(tree.children)
    axes = arviz.plot_forest(again, var_names=[f"{QUERY}.frobenius_norm"])
    assert len(axes) == 1
