"""The tree as ArviZ before version 1 has it; ArviZ itself where it is installed."""

import importlib.util
import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import xarray

import pyro_lora as pl
from tests.export.regression_trees import Trees, regression_trees
from tests.infer.linear_regression import linear_regression
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


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    plt.close("all")


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


@pytest.fixture(scope="module")
def fits() -> Trees:
    old_arviz()
    return regression_trees()[1]


@pytest.mark.filterwarnings("ignore")
def test_old_arviz_compares_fits_of_one_posterior(fits: Trees) -> None:
    arviz = old_arviz()
    groups = {name: pl.to_inference_data(tree) for name, tree in fits.items()}
    table = arviz.compare(groups)
    assert set(table.index) == {"Laplace", "SVGD", "AutoNormal"}
    assert table["elpd_loo"].max() - table["elpd_loo"].min() < 1
    assert table["weight"].sum() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("prior_sd", "charge", "other"),
    [(100.0, "likelihood", "prior"), (0.01, "prior", "likelihood")],
)
@pytest.mark.filterwarnings("ignore")
def test_old_psens_sees_who_is_in_charge(
    prior_sd: float, charge: str, other: str
) -> None:
    arviz = old_arviz()
    task = linear_regression(prior_sd=prior_sd)
    posterior = task.laplace(structure=pl.structures.Dense())
    tree = pl.to_datatree(posterior, batches=task.batches, num_samples=400)
    data = pl.to_inference_data(tree)
    more, less = (arviz.psens(data, component=part) for part in (charge, other))
    for name in tree["posterior"].data_vars:
        assert (more[name] > less[name]).all()


@pytest.mark.parametrize("kind", ["Laplace", "SVGD", "AutoNormal"])
@pytest.mark.parametrize(
    ("picture", "options"),
    [("plot_ess", {}), ("plot_loo_pit", {"y": "y"}), ("plot_bpv", {})],
)
@pytest.mark.filterwarnings("ignore")
def test_old_plots_have_something_on_them(
    fits: Trees, kind: str, picture: str, options: dict[str, str]
) -> None:
    getattr(old_arviz(), picture)(pl.to_inference_data(fits[kind]), **options)
    (figure,) = map(plt.figure, plt.get_fignums())
    assert figure.axes
    assert all(axes.lines for axes in figure.axes)
