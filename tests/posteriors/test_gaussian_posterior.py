"""A Gaussian whose form is said, against the dense one of the same covariance."""

import math
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoNormal,
)
from torch import Tensor
from torch.testing import assert_close

import pyro_lora as pl
from tests.curvature.gauss_newton import assert_same, flatten
from tests.infer.linear_regression import linear_regression
from tests.networks import batch, bert, inputs

GaussianPosterior = pl.methods.GaussianPosterior
pytestmark = pytest.mark.untrained


def gaussian(num_deviations: int = 2) -> Any:
    """Rows of one A, normals elsewhere, a point; all of them dependent."""
    torch.manual_seed(0)
    loc = {
        "a": torch.randn(2, 3, 2).double(),
        "b": torch.randn(2, 2).double(),
        "c": torch.randn(1, 4).double(),
        "d": torch.randn(3).double(),
    }
    scale = {"b": torch.rand(2, 2).double() + 0.1, "c": torch.rand(1, 4).double() + 0.1}
    rows = {"a": torch.randn(2, 3, 3).double()}
    deviations = {
        s: torch.randn(num_deviations, *loc[s].shape).double()
        for s in ("b", "c")
        if num_deviations
    }
    return GaussianPosterior(loc, scale, (), rows=rows, deviations=deviations)


def covariance(posterior: Any) -> Tensor:
    """Of a, b and c as one vector, from the definition."""
    blocks = [torch.kron(r @ r.mT, torch.eye(2).double()) for r in posterior.rows["a"]]
    scales = [posterior.scale[s].flatten().square() for s in ("b", "c")]
    total = torch.block_diag(*blocks, torch.diag(torch.cat(scales)))
    if posterior.deviations:
        d = torch.cat([posterior.deviations[s].flatten(1) for s in ("b", "c")], 1)
        total[12:, 12:] += d.mT @ d
    return total


def random_sites(draws: dict[str, Tensor]) -> Tensor:
    return torch.cat([draws[s].flatten(1) for s in ("a", "b", "c")], 1)


@pytest.mark.parametrize("num_deviations", [0, 1, 5])
def test_density_and_moments_are_those_of_the_covariance(num_deviations: int) -> None:
    posterior, number = gaussian(num_deviations), 20_000
    mean = random_sites({s: x[None] for s, x in posterior.loc.items()})[0]
    expected = covariance(posterior)
    draws = posterior.sample(number)
    flat = random_sites(draws)
    exact = dist.MultivariateNormal(mean, expected).log_prob(flat)
    assert_close(posterior.log_prob(draws), exact, rtol=0, atol=1e-9)
    assert torch.equal(draws["d"], posterior.loc["d"].expand(number, 3))
    variance = random_sites({s: x[None] for s, x in posterior.variance().items()})[0]
    assert_same(variance, expected.diagonal())
    assert not posterior.variance()["d"].any()
    # An entry's standard error is sqrt((c_ii c_jj + c_ij^2) / S).
    sd = expected.diagonal().sqrt()
    bound = 5 * (torch.outer(sd, sd).square() + expected.square()).sqrt()
    assert ((flat.mT.cov() - expected).abs() < bound / math.sqrt(number)).all()
    assert ((flat.mean(0) - mean).abs() < 5 * sd / math.sqrt(number)).all()
    levels = posterior.quantiles([0.5, 0.975])
    upper = random_sites({s: x[1:] for s, x in levels.items()})[0]
    assert_close(upper, mean + 1.959963984540054 * sd)
    assert_same(levels["d"][1], posterior.loc["d"])


def test_elsewhere_than_a_point_there_is_no_density() -> None:
    posterior = gaussian()
    draws = posterior.sample(2)
    draws["d"][1] += 1
    log_prob = posterior.log_prob(draws)
    assert log_prob[0].isfinite()
    assert log_prob[1] == -torch.inf
    del draws["c"]
    with pytest.raises(ValueError, match=r"missing \['c'\]"):
        posterior.log_prob(draws)


def test_as_a_guide_its_density_is_that_of_its_draw() -> None:
    posterior = gaussian()
    trace = poutine.trace(posterior).get_trace(1, two=2)
    draw = {s: trace.nodes[s]["value"][None] for s in posterior.loc}
    assert_same(trace.log_prob_sum(), posterior.log_prob(draw)[0])


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 4),
    st.booleans(),
    st.integers(0, 10**6),
)
@settings(max_examples=25, deadline=None)
def test_any_form_has_the_density_of_its_covariance(
    layers: int, rank: int, width: int, number: int, by_row: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    shape = (layers, rank, width)
    loc = {"a": torch.randn(shape).double()}
    eye = torch.eye(rank).double()
    factor = 0.3 * torch.randn(layers, rank, rank).double() + eye
    scale = torch.rand(shape).double() + 0.1
    deviations = {} if by_row else {"a": torch.randn(number, *shape).double()}
    posterior = GaussianPosterior(
        loc,
        {} if by_row else {"a": scale},
        (),
        rows={"a": factor} if by_row else {},
        deviations=deviations,
    )
    if by_row:
        covariances = [torch.kron(f @ f.mT, torch.eye(width).double()) for f in factor]
        total = torch.block_diag(*covariances)
    else:
        d = deviations["a"].flatten(1)
        total = torch.diag(scale.flatten().square()) + d.mT @ d
    at = loc["a"] + torch.randn(3, *shape).double()
    expected = dist.MultivariateNormal(loc["a"].flatten(), total).log_prob(
        at.flatten(1)
    )
    assert_close(posterior.log_prob({"a": at}), expected, rtol=1e-7, atol=1e-7)


class Task:
    def __init__(self) -> None:
        self.lora = pl.lift(bert(2), prior=pl.priors.normal(0.5))
        self.model = pl.models.classification(self.lora, 5)
        self.batch = batch()

    def normal(self, **options: Any) -> AutoNormal:
        options = {"init_loc_fn": self.lora.init_to_adapter(), **options}
        guide = AutoNormal(self.model, **options)
        guide(**self.batch)
        return guide


def test_a_mean_field_guide_as_a_value() -> None:
    task = Task()
    guide = task.normal(init_scale=0.05)
    for site in task.lora.sites:  # as training would
        scale = guide.scales
        for part in site.split("."):
            scale = getattr(scale, part)
        assert (scale == scale.flatten()[0]).all()
    found = pl.methods.mean_field(guide)
    assert found.networks == (task.lora,)
    weights = task.lora.weights()
    assert_same(flatten(found.mode()), flatten({s: weights[s] for s in found.loc}))
    assert_close(
        flatten(found.variance()),
        torch.full((418,), 0.05**2).double(),
        rtol=1e-5,
        atol=0,
    )
    trace = poutine.trace(guide).get_trace(**task.batch)
    draw = {site: trace.nodes[site]["value"][None] for site in weights}
    assert_close(found.log_prob(draw)[0], trace.log_prob_sum().detach())
    pyro.get_param_store().clear()
    assert not found.loc[next(iter(weights))].requires_grad


def test_a_function_of_normals_and_points_as_a_value() -> None:
    task = Task()
    weights = task.lora.weights()
    first, *rest = weights

    def guide(**_: Any) -> None:
        fn = dist.Normal(weights[first], 0.2).to_event(weights[first].ndim)
        pyro.sample(first, fn)
        for site in rest:
            pyro.sample(site, dist.Delta(weights[site], event_dim=weights[site].ndim))

    found = pl.methods.mean_field(guide, model=task.model)
    assert set(found.scale) == {first}
    assert_same(flatten(found.loc), flatten(weights))
    assert (found.scale[first] == 0.2).all()
    prediction = pl.predict(found, [inputs(task.batch)], num_samples=2)
    assert prediction.probs.shape == (5, 2)


def test_what_is_no_mean_field_guide_is_refused() -> None:
    task = Task()
    joint = AutoDiagonalNormal(task.model, init_loc_fn=task.lora.init_to_adapter())
    joint(**task.batch)
    with pytest.raises(ValueError, match=r"depend on one another by .*Take an AutoN"):
        pl.methods.mean_field(joint)
    lora = pl.lift(bert(1))
    model = pl.models.regression(lora, 5)
    positive = AutoNormal(model, init_loc_fn=lora.init_to_adapter())
    data = {**batch(), "labels": torch.randn(5).double()}
    positive(**data)
    with pytest.raises(ValueError, match=r"Site 'noise': .*AutoDelta in an AutoGuide"):
        pl.methods.mean_field(positive)
    guide = AutoGuideList(model)
    guide.append(
        AutoNormal(
            poutine.block(model, hide=["noise"]), init_loc_fn=lora.init_to_adapter()
        )
    )
    guide.append(AutoDelta(poutine.block(model, expose=["noise"])))
    guide(**data)
    found = pl.methods.mean_field(guide)
    assert found.loc["noise"] > 0
    assert "noise" not in found.scale
    first, second, *_ = weights = task.lora.weights()

    def chained(**_: Any) -> None:
        loc, other = weights[first], weights[second]
        w = pyro.sample(first, dist.Normal(loc, 0.2).to_event(loc.ndim))
        fn = dist.Normal(other + w.sum(), 0.1).to_event(other.ndim)
        pyro.sample(second, fn)

    with pytest.raises(ValueError, match=rf"{second}.*another in each call.*AutoN"):
        pl.methods.mean_field(chained)
    with pytest.raises(TypeError, match="guide must be"):
        pl.methods.mean_field(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_deviations", [0, 3])
def test_saved_and_loaded_it_draws_the_same(
    num_deviations: int, tmp_path: Path
) -> None:
    task = Task()
    weights = task.lora.weights()
    by_row = next(site for site in weights if site.endswith(".A"))
    scale = {
        s: torch.rand_like(x) + 0.1
        for s, x in weights.items()
        if s != by_row and not s.startswith("head.")
    }
    rows = {by_row: torch.randn(2, 3, 3).double() + torch.eye(3)}
    deviations = {
        s: torch.randn(num_deviations, *x.shape).double()
        for s, x in scale.items()
        if num_deviations
    }
    posterior = GaussianPosterior(
        weights, scale, (task.lora,), task.model, "y", rows=rows, deviations=deviations
    )
    pl.save(posterior, tmp_path / "posterior")
    again: Any = pl.load(tmp_path / "posterior", task.lora, model=task.model)
    assert type(again) is GaussianPosterior
    torch.manual_seed(0)
    expected = posterior.sample(3)
    torch.manual_seed(0)
    found = again.sample(3)
    for site, x in expected.items():
        assert torch.equal(found[site], x)
    assert torch.equal(again.log_prob(expected), posterior.log_prob(expected))


def test_the_moments_of_an_exact_posterior_are_kept() -> None:
    task = linear_regression()
    exact = task.laplace(structure=pl.structures.Dense())
    sd = {s: x.sqrt() for s, x in exact.variance().items()}
    found = GaussianPosterior(exact.mode(), sd, exact.networks, exact.model)
    assert_same(flatten(found.mean()), flatten(exact.mean()))
    assert_same(flatten(found.variance()), flatten(exact.variance()))
