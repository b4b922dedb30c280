"""ArviZ's own functions on the trees of each kind of posterior."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import arviz_plots
import arviz_stats
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import xarray
from pyro.infer import MCMC, NUTS
from torch.distributions import Normal

import pyro_lora as pl
from tests.export.regression_trees import Trees, regression_trees
from tests.infer.linear_regression import NOISE_SD, linear_regression
from tests.predict import models

KINDS = ["Laplace", "SVGD", "mixture", "AutoNormal", "NUTS"]

# Versions of ArviZ, xarray and pandas that warn of one another.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame"),
    pytest.mark.filterwarnings("ignore:In a future version of xarray:FutureWarning"),
    # Its bound falls with the number of draws: .47 for 80 particles.
    pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto"),
]


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def fits() -> tuple[Any, Trees]:
    """Linear regression by each kind of posterior."""
    task, trees = regression_trees()
    trees = dict(trees)
    nuts = NUTS(task.model, max_tree_depth=3)
    mcmc = MCMC(nuts, num_samples=250, warmup_steps=60, disable_progbar=True)
    mcmc.run(**task.whole)
    laplace = task.laplace(structure=pl.structures.Dense())
    mixture = pl.MixturePosterior([laplace, laplace])
    options: Any = {"model": task.model, "batches": task.batches}
    trees["mixture"] = pl.to_datatree(mixture, num_samples=1000, **options)
    trees["NUTS"] = pl.to_datatree(mcmc, **options)
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
        # 1,000 draws know the sum to about .15. 80 particles have 3/4 of the variance,
        # and so fit better than they predict.
        gain = found.elpd - exact_elpd(task)
        assert (0 < gain < 0.8) if name == "SVGD" else abs(gain) < 0.5, name


def test_approximate_loo_finds_nothing_to_correct_in_an_exact_posterior(
    fits: tuple[Any, Trees],
) -> None:
    task, trees = fits
    stats = trees["Laplace"]["sample_stats"]
    log_ratio = (stats["lp"] - stats["log_q"]).values
    np.testing.assert_allclose(log_ratio, float(task.log_evidence), atol=1e-6)
    found = arviz_stats.loo_approximate_posterior(
        trees["Laplace"], stats["lp"], stats["log_q"]
    )
    assert found.elpd == pytest.approx(arviz_stats.loo(trees["Laplace"]).elpd, abs=1e-6)


def test_compare_sees_fits_of_one_posterior(fits: tuple[Any, Trees]) -> None:
    table = arviz_stats.compare(fits[1])
    assert set(table.index) == set(KINDS)
    assert table["elpd"].max() - table["elpd"].min() < 1
    assert table["weight"].sum() == pytest.approx(1, abs=1e-3)


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
    posterior = task.laplace(structure=pl.structures.Dense())
    tree = pl.to_datatree(posterior, batches=task.batches, num_samples=400)
    table = arviz_stats.psense_summary(tree)
    assert (table[charge] > table[other]).all()
    assert "base.bias" in arviz_stats.psense(tree, group="likelihood")


@pytest.mark.parametrize("kind", KINDS)
def test_summary_has_the_closed_forms_moments(
    fits: tuple[Any, Trees], kind: str
) -> None:
    task, trees = fits
    table = arviz_stats.summary(trees[kind], round_to="none")
    mode, sd = task.mode, task.precision.inverse().diagonal().sqrt()
    rows = [*(f"base.weight[0, {i}]" for i in range(3)), "base.bias[0]"]
    # 250 draws of a Markov chain, at worst.
    for row, mean, scale in zip(rows, mode.tolist(), sd.tolist(), strict=True):
        assert abs(table.loc[row, "mean"] - mean) < 0.4 * scale
        assert table.loc[row, "sd"] == pytest.approx(scale, rel=0.25)


@pytest.mark.grid
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
@pytest.mark.parametrize("kind", ["Laplace", "SVGD", "AutoNormal"])
def test_plots_have_something_on_them(
    fits: tuple[Any, Trees], draw: Any, kind: str
) -> None:
    draw(fits[1][kind])
    (figure,) = map(plt.figure, plt.get_fignums())
    assert all(axes.lines or axes.collections or axes.texts for axes in figure.axes)


def test_two_classes_have_a_picture_of_their_own() -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    posterior = models.laplace(lora, model, batches)
    tree = pl.to_datatree(posterior, batches=batches, num_samples=50)
    plot = arviz_plots.plot_ppc_pava(tree, backend="matplotlib")
    (axes,) = plot.get_viz("figure").axes
    drawn = np.concatenate([line.get_xdata() for line in axes.lines])
    probs = tree["posterior_predictive"]["y"].mean(("chain", "draw"))
    assert drawn.min() == pytest.approx(float(probs.min()))
    assert drawn.max() == pytest.approx(float(probs.max()))


@pytest.mark.parametrize("kind", KINDS)
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
