"""ArviZ's own functions on the trees of three kinds of posterior."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import arviz_plots
import arviz_stats
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pytest
import torch
import xarray
from pyro.infer import SVI, Trace_ELBO, autoguide
from pyro.optim import Adam
from torch.distributions import Normal

import pyro_lora as pl
from tests.infer.linear_regression import NOISE_SD, linear_regression

Trees = dict[str, xarray.DataTree]

# Versions of ArviZ, xarray and pandas that warn of one another.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame"),
    pytest.mark.filterwarnings("ignore:In a future version of xarray:FutureWarning"),
]


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def fits() -> tuple[Any, Trees]:
    """Linear regression by Laplace, SVGD and a stock autoguide, 400 draws each."""
    pyro.set_rng_seed(1)
    pyro.clear_param_store()
    task = linear_regression(prior_sd=0.15)  # so that no datum pulls too hard
    laplace = task.laplace(structure=pl.dense)
    # Where SVGD ends with very many particles: draws of the posterior.
    particles = pl.ParticlePosterior(laplace.sample(400), (task.lora,), task.model, "y")
    guide = autoguide.AutoNormal(task.model, init_loc_fn=task.lora.init_to_adapter())
    svi = SVI(task.model, guide, Adam({"lr": 0.05}), Trace_ELBO(num_particles=4))
    for _ in range(400):
        svi.step(**task.whole)
    options: Any = {"model": task.model, "batches": task.batches, "num_samples": 400}
    trees = {
        "Laplace": pl.to_datatree(laplace, **options),
        "SVGD": pl.to_datatree(particles, **options),
        "AutoNormal": pl.to_datatree(guide, **options),
    }
    return task, trees


def exact_elpd(task: Any) -> float:
    """Leave-one-out, each datum by the posterior of the others, in closed form."""
    total = 0.0
    for n in range(len(task.y)):
        rest = torch.arange(len(task.y)) != n
        x, y = task.design[rest], task.y[rest]
        precision = x.mT @ x / NOISE_SD**2 + torch.eye(4).double() / task.prior_sd**2
        mean = torch.linalg.solve(precision, x.mT @ y / NOISE_SD**2)
        row = task.design[n]
        variance = NOISE_SD**2 + row @ torch.linalg.solve(precision, row)
        total += float(Normal(row @ mean, variance.sqrt()).log_prob(task.y[n]))
    return total


def test_loo_is_leave_one_out(fits: tuple[Any, Trees]) -> None:
    task, trees = fits
    for name, tree in trees.items():
        found = arviz_stats.loo(tree, pointwise=True)
        assert found.n_data_points == 12
        assert float(found.pareto_k.max()) < 0.7, name
        # 400 draws know each datum's log density to about .1.
        assert found.elpd == pytest.approx(exact_elpd(task), abs=0.4), name


def test_compare_sees_three_fits_of_one_posterior(fits: tuple[Any, Trees]) -> None:
    table = arviz_stats.compare(fits[1])
    assert set(table.index) == {"Laplace", "SVGD", "AutoNormal"}
    assert table["elpd"].max() - table["elpd"].min() < 0.6


def test_loo_pit_is_the_predictives_distribution_function(
    fits: tuple[Any, Trees],
) -> None:
    task, trees = fits
    pit = arviz_stats.loo_pit(trees["Laplace"])["y"].values
    assert pit.shape == (12,)
    covariance = torch.linalg.inv(task.precision)
    sd = (NOISE_SD**2 + ((task.design @ covariance) * task.design).sum(1)).sqrt()
    expected = Normal(task.design @ task.mode, sd).cdf(task.y)
    # Leaving a datum out moves its value away from the middle: close, not equal.
    assert np.corrcoef(pit, expected)[0, 1] > 0.9


@pytest.mark.parametrize(
    ("prior_sd", "charge", "other"),
    [(100.0, "likelihood", "prior"), (0.01, "prior", "likelihood")],
)
def test_psense_sees_who_is_in_charge(prior_sd: float, charge: str, other: str) -> None:
    task = linear_regression(prior_sd=prior_sd)
    posterior = task.laplace(structure=pl.dense)
    tree = pl.to_datatree(posterior, batches=task.batches, num_samples=400)
    table = arviz_stats.psense_summary(tree)
    assert (table[charge] > table[other]).all()
    assert "base.bias" in arviz_stats.psense(tree, group="likelihood")


def test_summary_has_the_closed_forms_moments(fits: tuple[Any, Trees]) -> None:
    task, trees = fits
    table = arviz_stats.summary(trees["Laplace"], round_to="none")
    mode, sd = task.mode, task.precision.inverse().diagonal().sqrt()
    rows = [*(f"base.weight[0, {i}]" for i in range(3)), "base.bias[0]"]
    for row, mean, scale in zip(rows, mode.tolist(), sd.tolist(), strict=True):
        assert abs(table.loc[row, "mean"] - mean) < 4 * scale / np.sqrt(400)
        assert table.loc[row, "sd"] == pytest.approx(scale, rel=4 / np.sqrt(800))


@pytest.mark.parametrize(
    "draw",
    [
        lambda tree: arviz_plots.plot_forest(tree, backend="matplotlib"),
        lambda tree: arviz_plots.plot_ess(tree, backend="matplotlib"),
        lambda tree: arviz_plots.plot_ppc_pit(tree, backend="matplotlib"),
        lambda tree: arviz_plots.plot_loo_pit(tree, backend="matplotlib"),
        lambda tree: arviz_plots.plot_prior_posterior(tree, backend="matplotlib"),
        lambda tree: arviz_plots.plot_psense_dist(tree, backend="matplotlib"),
        lambda tree: arviz_plots.plot_khat(
            arviz_stats.loo(tree, pointwise=True), backend="matplotlib"
        ),
    ],
    ids=["forest", "ess", "ppc_pit", "loo_pit", "prior_posterior", "psense", "khat"],
)
@pytest.mark.parametrize("kind", ["Laplace", "AutoNormal"])
def test_plots_have_something_on_them(
    fits: tuple[Any, Trees], draw: Any, kind: str
) -> None:
    draw(fits[1][kind])
    (figure,) = map(plt.figure, plt.get_fignums())
    assert all(axes.lines or axes.collections or axes.texts for axes in figure.axes)


@pytest.mark.parametrize("kind", ["Laplace", "SVGD", "AutoNormal"])
def test_files_give_the_same_answers(
    fits: tuple[Any, Trees], kind: str, tmp_path: Path
) -> None:
    tree = fits[1][kind]
    elpd = arviz_stats.loo(tree).elpd
    tree.to_netcdf(tmp_path / "tree.nc")
    with xarray.open_datatree(tmp_path / "tree.nc", engine="h5netcdf") as again:
        assert arviz_stats.loo(again).elpd == elpd
    tree.to_zarr(tmp_path / "tree.zarr", consolidated=False)
    with xarray.open_datatree(tmp_path / "tree.zarr", consolidated=False) as again:
        assert arviz_stats.loo(again).elpd == elpd
