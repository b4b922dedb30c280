"""ArviZ's own functions on the tree of an adapter, and files that hold it."""

import math
import warnings
from pathlib import Path

import arviz_stats
import pytest
import torch
import xarray

import pyro_lora as pl
from tests.predict import models

QUERY = "delta.bert.encoder.layer.attention.self.query"


@pytest.fixture
def tree() -> xarray.DataTree:
    """Of a posterior that is narrow enough for importance sampling."""
    lora, model = models.classifier(prior=0.02)
    batches = models.two_batches()
    posterior = models.laplace(lora, model, batches)
    return pl.to_datatree(posterior, batches=batches)


def test_arviz_summarizes(tree: xarray.DataTree) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = arviz_stats.summary(tree, round_to="none")
    norms = tree["posterior"][f"{QUERY}.frobenius_norm"]
    # One row for each scalar, none constant.
    size = sum(x[0, 0].size for x in tree["posterior"].data_vars.values())
    assert len(table) == size
    assert table.loc[f"{QUERY}.frobenius_norm[1]", "mean"] == pytest.approx(
        float(norms.sel(layer=1).mean())
    )
    # Of 100 independent draws the estimate is 100 on average, and seldom 10.
    assert table["ess_bulk"].median() > 60
    assert (table["ess_bulk"] > 5).all()


# arviz_stats 0.8 with pandas 3.1.
@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame")
def test_arviz_cross_validates(tree: xarray.DataTree) -> None:
    found = arviz_stats.loo(tree, pointwise=True)
    assert found.n_samples == 100
    assert found.n_data_points == 10
    # With the weights almost known, leaving one datum out changes nothing.
    lppd = torch.as_tensor(tree["log_likelihood"]["y"].values[0]).logsumexp(
        0
    ) - math.log(100)
    assert found.elpd == pytest.approx(float(lppd.sum()), abs=0.05)
    assert (found.pareto_k < 0.7).all()
    table = arviz_stats.compare({"one": tree, "two": tree})
    assert list(table.index) == ["one", "two"]


# arviz_stats 0.8 with later versions of xarray.
@pytest.mark.filterwarnings("ignore:In a future version of xarray:FutureWarning")
def test_arviz_scales_prior_and_likelihood(tree: xarray.DataTree) -> None:
    table = arviz_stats.psense_summary(
        tree, var_names=["head.classifier.bias", f"{QUERY}.frobenius_norm"]
    )
    # The prior is 0.02 wide, so that it, not the data, says where the weights are.
    assert (table["prior"] > table["likelihood"]).all()


@pytest.mark.parametrize("kind", ["netcdf", "zarr"])
def test_files_hold_all_of_it(tree: xarray.DataTree, kind: str, tmp_path: Path) -> None:
    if kind == "netcdf":
        tree.to_netcdf(tmp_path / "tree.nc")
        again = xarray.open_datatree(tmp_path / "tree.nc", engine="h5netcdf")
    else:
        tree.to_zarr(tmp_path / "tree.zarr", consolidated=False)
        again = xarray.open_datatree(tmp_path / "tree.zarr", consolidated=False)
    again.load()
    xarray.testing.assert_identical(again, tree)
    again.close()


def test_a_single_particle_will_do(tmp_path: Path) -> None:
    lora, model = models.classifier()
    posterior = models.particles(lora, model, num=1)
    tree = pl.to_datatree(posterior, batches=models.two_batches())
    assert tree["posterior"].sizes["draw"] == 1
    tree.to_netcdf(tmp_path / "tree.nc")
