"""Predicted real numbers, with Bayesian linear regression as the oracle."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats
from torch import Tensor, nn
from torch.testing import assert_close

import pyro_lora as pl
from tests import networks
from tests.curvature.gauss_newton import flatten, precision_matrix, unflatten
from tests.infer.linear_regression import (
    NOISE_SD,
    LinearRegression,
    linear_regression,
)
from tests.predict import models


def closed_form(problem: LinearRegression) -> tuple[Tensor, Tensor]:
    """Mean of new outcomes, and the weights' share of their variance, (N,)."""
    design = problem.design
    inside = torch.linalg.solve(problem.precision, design.mT)
    return design @ problem.mode, (design * inside.mT).sum(1)


@pytest.fixture
def problem() -> LinearRegression:
    return linear_regression()


def test_linearized_is_bayesian_linear_regression(problem: LinearRegression) -> None:
    found = pl.predict(
        problem.laplace(),
        problem.batches,
        model=problem.model,
        method="linearized",
        labels="y",
    )
    mean, variance = closed_form(problem)
    assert isinstance(found, pl.RegressionPrediction)
    assert_close(found.mean, mean, rtol=0, atol=1e-8)
    assert_close(found.weight_variance, variance, rtol=0, atol=1e-8)
    noise = torch.full_like(mean, NOISE_SD**2)
    assert_close(found.noise_variance, noise, rtol=0, atol=1e-8)
    sd = (variance + noise).sqrt()
    exact = stats.norm(mean.numpy(), sd.numpy())
    y = problem.y
    metrics = found.metrics()
    assert metrics["nll"] == pytest.approx(-exact.logpdf(y.numpy()).mean(), abs=1e-8)
    assert metrics["rmse"] == pytest.approx(float((mean - y).square().mean().sqrt()))
    z = (y - mean) / sd
    inside = z.abs() < stats.norm.ppf(0.95)
    assert metrics["coverage"] == pytest.approx(float(inside.double().mean()))
    # Gneiting & Raftery (2007), eq. 21
    phi, cdf = stats.norm.pdf(z.numpy()), stats.norm.cdf(z.numpy())
    crps = sd.numpy() * (z.numpy() * (2 * cdf - 1) + 2 * phi - 1 / math.sqrt(math.pi))
    assert metrics["crps"] == pytest.approx(crps.mean(), abs=1e-8)


def test_sampling_converges_to_bayesian_linear_regression(
    problem: LinearRegression,
) -> None:
    num_samples = 4000
    found = pl.predict(
        problem.laplace(),
        problem.batches,
        model=problem.model,
        num_samples=num_samples,
        chunk_size=1000,
        labels="y",
    )
    mean, variance = closed_form(problem)
    error = 5 * (variance / num_samples).sqrt()
    assert ((found.mean - mean).abs() < error).all()
    # A sample variance of normal draws has a relative error of sqrt(2 / S).
    ratio = found.weight_variance / variance
    assert ((ratio - 1).abs() < 5 * math.sqrt(2 / num_samples)).all()
    assert_close(found.noise_variance, torch.full_like(mean, NOISE_SD**2))
    exact = pl.predict(
        problem.laplace(),
        problem.batches,
        model=problem.model,
        method="linearized",
        labels="y",
    )
    for name, value in exact.metrics().items():
        assert found.metrics()[name] == pytest.approx(value, abs=0.03)


def test_a_mixture_of_gaussians_is_one_of_outcomes(problem: LinearRegression) -> None:
    first = problem.laplace()
    parts = [first, first.with_prior_precision(20.0)]
    mixture = pl.MixturePosterior([pl.MixturePosterior(parts, [1, 3]), first], [1, 1])
    options: Any = {"method": "linearized", "labels": "y"}
    found = pl.predict(mixture, problem.batches, model=problem.model, **options)
    each = [
        pl.predict(p, problem.batches, model=problem.model, **options) for p in parts
    ]
    pi = [0.125 + 0.5, 0.375]
    log_probs = torch.stack(
        [math.log(w) + p.log_prob(problem.y) for w, p in zip(pi, each, strict=True)]
    )
    assert_close(found.log_prob(problem.y), log_probs.logsumexp(0))
    mean = sum(w * p.mean for w, p in zip(pi, each, strict=True))
    second = sum(
        w * (p.weight_variance + p.mean**2) for w, p in zip(pi, each, strict=True)
    )
    assert_close(found.mean, mean)
    assert_close(found.weight_variance, second - mean**2)


def draws_of(num_draws: int = 3, num_data: int = 5, **options: Any) -> Any:
    return pl.RegressionPrediction(
        loc=torch.randn(num_draws, num_data).double(),
        noise_scale=torch.rand(num_draws, num_data).double() + 0.2,
        labels=torch.randn(num_data).double(),
        **options,
    )


def test_the_score_of_a_mixture_is_the_integral() -> None:
    # CRPS = integral of (F(y) - 1[y >= label])^2
    found = draws_of(weights=torch.tensor([0.2, 0.5, 0.3]).double())
    grid = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    total = 0.0
    for n, label in enumerate(found.labels.tolist()):
        cdf = sum(
            float(w) * stats.norm.cdf(grid.numpy(), float(m), float(s))
            for w, m, s in zip(
                found.weights, found.loc[:, n], found.noise_scale[:, n], strict=True
            )
        )
        step = (grid >= label).double()
        total += float(torch.trapezoid((torch.as_tensor(cdf) - step) ** 2, grid)) / 5
    assert found.metrics()["crps"] == pytest.approx(total, abs=1e-4)


def student_cdf(z: float, df: float) -> float:
    """By the incomplete beta function."""
    if abs(z) < df**0.5:
        inner = special.betainc(0.5, df / 2, z**2 / (df + z**2)) / 2
        return float(0.5 + math.copysign(inner, z))
    ratio = abs(z) / df**0.5
    if ratio < 1e150:
        tail = special.betainc(df / 2, 0.5, 1 / (1 + ratio**2)) / 2
    else:  # whose square is beyond the largest number: the first term of the series
        tail = ratio**-df / (df * special.beta(df / 2, 0.5))
    return float(tail if z < 0 else 1 - tail)


@given(
    log_df=st.floats(-2.0, 9.0),
    log_z=st.floats(-6.0, 12.0),
    sign=st.sampled_from([-1.0, 1.0]),
)
@settings(max_examples=300, deadline=None, database=None)
def test_students_distribution_function(
    log_df: float, log_z: float, sign: float
) -> None:
    df, z = 10.0**log_df, sign * 10.0**log_z
    found = pl.RegressionPrediction(
        loc=torch.zeros(1, 1).double(),
        noise_scale=torch.ones(1, 1).double(),
        df=torch.full((1, 1), df, dtype=torch.float64),
    )
    cdf = float(found.cdf(torch.tensor([z], dtype=torch.float64)))
    assert cdf == pytest.approx(student_cdf(z, df), rel=0, abs=1e-12)


@given(
    log_df=st.floats(-1.3, 6.0),
    probability=st.floats(1e-9, 1 - 1e-9),
    loc=st.floats(-1e3, 1e3),
)
@settings(max_examples=25, deadline=None, database=None)
def test_students_quantiles_beside_others(
    log_df: float, probability: float, loc: float
) -> None:
    """Whatever tails the other data have."""
    df = 10.0**log_df
    found = pl.RegressionPrediction(
        loc=torch.tensor([[loc, 0.0]], dtype=torch.float64),
        noise_scale=torch.ones(1, 2).double(),
        df=torch.tensor([[df, 5.0]], dtype=torch.float64),
    )
    at = found.quantile(probability)
    # Where the distribution function is nearly flat, rounding decides.
    assert_close(found.cdf(at), torch.full_like(at, probability), rtol=0, atol=1e-12)
    for place, center, of in zip(at.tolist(), (loc, 0.0), (df, 5.0), strict=True):
        oracle = student_cdf(place - center, of)
        assert oracle == pytest.approx(probability, rel=0, abs=1e-11)


def test_quantiles_beyond_the_largest_number_are_infinite() -> None:
    found = draws_of(df=torch.full((3, 5), 0.05).double())
    single = replace(
        found,
        loc=found.loc.float(),
        noise_scale=found.noise_scale.float(),
        df=found.df.float(),
    )
    assert (single.quantile(0.999) == math.inf).all()
    assert (found.quantile(0.999) < math.inf).all()
    assert found.quantile(0.5).abs().max() < 100


@pytest.mark.parametrize("df", [1.0, 2.5, 4.0, 30.0, 900.0])
def test_student_noise(df: float) -> None:
    num_draws, num_data = 3, 7
    found = draws_of(num_draws, num_data, df=torch.full((3, 7), df).double())
    pdf, cdf = [], []
    for m, s in zip(found.loc.numpy(), found.noise_scale.numpy(), strict=True):
        pdf.append(stats.t.pdf(found.labels.numpy(), df, m, s))
        cdf.append(stats.t.cdf(found.labels.numpy(), df, m, s))
    expected = torch.as_tensor(sum(pdf) / 3).log()
    assert_close(found.log_prob(found.labels), expected)
    mean_cdf = torch.as_tensor(sum(cdf) / 3)
    assert_close(found.cdf(found.labels), mean_cdf, rtol=0, atol=1e-10)
    assert "crps" not in found.metrics()
    variance = stats.t.var(df) if df > 2 else math.inf
    noise = variance * found.noise_scale.square().mean(0)
    assert_close(found.noise_variance, noise)


@pytest.mark.parametrize("df", [None, 3.0])
@pytest.mark.parametrize("probability", [1e-12, 1e-6, 0.05, 0.5, 0.975, 1 - 1e-12])
def test_quantiles_invert_the_distribution(
    df: float | None, probability: float
) -> None:
    degrees = None if df is None else torch.full((3, 5), df).double()
    found = draws_of(df=degrees)
    at = found.quantile(probability)
    assert_close(found.cdf(at), torch.full_like(at, probability), rtol=1e-6, atol=1e-15)


def test_a_table_has_a_row_a_datum() -> None:
    found = draws_of()
    table = found.to_pandas()
    assert list(table) == ["mean", "sd", "noise_sd", "weight_sd", "label"]
    assert table["sd"].tolist() == found.variance.sqrt().tolist()
    two = pl.RegressionPrediction(
        loc=torch.zeros(1, 4, 2), noise_scale=torch.ones(1, 4, 2)
    )
    assert "weight_sd_1" in two.to_pandas()


def test_a_network_with_latent_noise_equals_a_loop() -> None:
    lora = pl.lift(networks.bert(1))
    model = pl.models.regression(lora, models.NUM_DATA)
    batches = models.two_batches()
    batches = [{**b, "labels": b["labels"].double()} for b in batches]
    weights = models.jittered(lora, 5)
    weights["noise"] = torch.rand(5).double() + 0.5
    posterior = pl.ParticlePosterior(weights, (lora,), model, "y")
    found = pl.predict(posterior, batches, model=model, chunk_size=2)
    lifted = {site: weights[site] for site in lora.sites}
    loc = torch.stack(
        [
            torch.cat(
                [
                    models.logits_at(lora, models.draw(lifted, s), b)[:, 0]
                    for b in batches
                ]
            )
            for s in range(5)
        ]
    )
    assert_close(found.mean, loc.mean(0))
    assert_close(found.weight_variance, loc.var(0, correction=0))
    assert_close(found.noise_variance, weights["noise"].square().mean().expand(10))
    labels = torch.cat([b["labels"] for b in batches])
    density = (
        sum(
            dist.Normal(m, s).log_prob(labels).exp()
            for m, s in zip(loc, weights["noise"], strict=True)
        )
        / 5
    )
    assert found.metrics()["nll"] == pytest.approx(-float(density.log().mean()))


def test_standard_errors_of_means() -> None:
    found = draws_of(4, 300)
    pyro.set_rng_seed(0)
    metrics = found.metrics(num_bootstrap=400)
    losses = -found.log_prob(found.labels)
    exact = float(losses.std(correction=0)) / 300**0.5
    # From 400 resamples: a relative error of 1 / sqrt(800), 3.5%.
    assert metrics["nll_se"] == pytest.approx(exact, rel=4 * 0.035)
    assert {k for k in metrics if not k.endswith("_se")} == found.metrics().keys()
    with pytest.raises(ValueError, match="num_bootstrap must be"):
        found.metrics(num_bootstrap=1)


class Outputs:
    """A linear network with two real outputs a datum."""

    def __init__(self, family: Any) -> None:
        self.lora = pl.lift(nn.Linear(3, 2).double())
        self.family = family

    def model(self, x: Tensor, labels: Tensor | None = None) -> None:
        loc = self.lora()(x)
        with pyro.plate("data", 8, subsample=x):
            pyro.sample("y", self.family(loc).to_event(1), obs=labels)


def test_several_outputs() -> None:
    outputs = Outputs(lambda loc: dist.Normal(loc, 0.5))
    x = torch.randn(8, 3).double()
    batches = [
        {"x": part, "labels": torch.randn(len(part), 2).double()} for part in x.split(3)
    ]
    posterior = models.laplace(
        outputs.lora, outputs.model, batches, pl.structures.Dense()
    )
    exact = pl.predict(posterior, batches, model=outputs.model, method="linearized")
    drawn = pl.predict(
        posterior, batches, model=outputs.model, num_samples=3000, chunk_size=1000
    )
    assert exact.mean.shape == drawn.mean.shape == exact.labels.shape == (8, 2)
    error = 5 * (exact.weight_variance / 3000).sqrt()
    assert ((exact.mean - drawn.mean).abs() < error).all()
    ratio = drawn.weight_variance / exact.weight_variance - 1
    assert ratio.abs().max() < 5 * math.sqrt(2 / 3000)
    assert_close(exact.noise_variance, torch.full((8, 2), 0.25).double())
    assert exact.metrics().keys() == {"nll", "rmse", "coverage", "crps"}


MIXED = torch.tensor([[1.0, 0.0], [0.5, 1.0]], dtype=torch.float64)


class NoiseToo:
    """A linear network with a location and a scale's logarithm for each outcome.

    They share weights, so that they are correlated.
    """

    def __init__(self, num_outputs: int, family: Any) -> None:
        self.lora = pl.lift(nn.Linear(3, 2 * num_outputs).double())
        self.family = family
        self.x = torch.randn(8, 3).double()
        self.y = torch.randn(8, num_outputs).double()

    def model(self, x: Tensor, labels: Tensor | None = None) -> None:
        outputs = self.lora()(x).unflatten(-1, (-1, 2)) @ MIXED.mT
        fn = self.family(outputs[..., 0], outputs[..., 1].exp())
        with pyro.plate("data", 8, subsample=x):
            pyro.sample("y", fn.to_event(1), obs=labels)

    def laplace(self, prior_precision: float = 8.0) -> pl.LaplacePosterior:
        batches: Any = [{"x": self.x, "labels": self.y}]
        posterior = models.laplace(
            self.lora, self.model, batches, pl.structures.Dense()
        )
        return posterior.with_prior_precision(prior_precision)

    def gaussian(self, posterior: pl.LaplacePosterior) -> tuple[Tensor, Tensor]:
        """Of location and log scale: means (8, P, 2) and covariances (8, P, 2, 2)."""
        flat = {s: x.flatten(1) for s, x in posterior.mode().items()}
        covariance = torch.linalg.inv(precision_matrix(posterior))
        weight, bias = flat["base.weight"], flat["base.bias"]
        size = bias.shape[1]
        mean = self.x @ weight.reshape(size, 3).mT + bias
        # Of output o: x_i in the place of its weight i, and 1 in that of its bias.
        eye = torch.eye(size).double()
        rows = torch.einsum("bi,op->bopi", self.x, eye).flatten(2)
        j = torch.cat([rows, eye.expand(8, size, size)], -1)
        whole = (j @ covariance @ j.mT).unflatten(1, (-1, 2)).unflatten(3, (-1, 2))
        each = whole.diagonal(dim1=1, dim2=3).movedim(-1, 1)
        return mean.unflatten(1, (-1, 2)) @ MIXED.mT, MIXED @ each @ MIXED.mT


@pytest.mark.untrained
@pytest.mark.parametrize("num_outputs", [1, 2])
def test_a_scale_that_the_network_outputs_is_integrated_over(num_outputs: int) -> None:
    problem = NoiseToo(num_outputs, dist.Normal)
    posterior = problem.laplace()
    batches: Any = [{"x": x} for x in problem.x.split(5)]
    found = pl.predict(posterior, batches)
    assert isinstance(found, pl.RegressionPrediction)
    mean, covariance = problem.gaussian(posterior)
    assert 0.3 < covariance[..., 1, 1].sqrt().max() < 1
    assert covariance[..., 0, 1].abs().max() > 1e-3
    # On a fine grid over both: against it, and against closed forms.
    y = 2 * torch.randn(8, num_outputs).double()
    z = torch.linspace(-9, 9, 361, dtype=torch.float64)
    grid = torch.cartesian_prod(z, z)
    log_weights = -0.5 * grid.square().sum(-1)
    f = mean[..., None, :] + grid @ torch.linalg.cholesky(covariance).mT
    log_probs = dist.Normal(f[..., 0], f[..., 1].exp()).log_prob(y[..., None])
    expected = (log_probs + log_weights).logsumexp(-1) - log_weights.logsumexp(-1)
    noise = (2 * mean[..., 1] + 2 * covariance[..., 1, 1]).exp()

    def same(value: Tensor, expected: Tensor) -> None:
        assert_close(value.reshape(expected.shape), expected, rtol=1e-8, atol=1e-8)

    shape = found.mean.shape
    same(found.log_prob(y.reshape(shape)), expected)
    same(found.mean, mean[..., 0])
    same(found.weight_variance, covariance[..., 0, 0])
    same(found.noise_variance, noise)
    gaussian = posterior.linearized({"x": problem.x})
    same(gaussian.mean, mean)
    same(gaussian.predictive_variance, noise + covariance[..., 0, 0])
    joint = posterior.linearized({"x": problem.x}, joint=True).marginals()
    same(joint.predictive_variance, noise + covariance[..., 0, 0])


@pytest.mark.untrained
def test_a_precision_is_chosen_by_the_densities_that_are_predicted() -> None:
    problem = NoiseToo(1, dist.Normal)
    labelled: Any = [{"x": problem.x, "labels": torch.randn(8, 1).double()}]
    posterior = problem.laplace()
    tuned = posterior.optimize_prior(objective="nll", batches=labelled)
    (tau,) = {float(t) for x in tuned.prior_precision.values() for t in x.flatten()}
    losses = [
        pl.predict(posterior.with_prior_precision(t), labelled).metrics()["nll"]
        for t in (tau, 1.3 * tau, tau / 1.3)  # of a grid of steps of 1.33
    ]
    assert losses[0] == min(losses)


@pytest.mark.untrained
def test_a_scale_of_a_transformer_is_integrated_over() -> None:
    lora, texts = pl.lift(networks.bert(2)), networks.inputs(networks.batch(4))

    def model(y: Tensor | None = None, **texts: Tensor) -> None:
        loc, log_scale = lora()(**texts).logits.unbind(-1)
        with pyro.plate("data", 4, subsample=loc):
            pyro.sample("y", dist.Normal(loc, log_scale.exp()), obs=y)

    y = torch.randn(4).double()
    posterior = pl.AutoLaplace(
        model, init_loc_fn=lora.init_to_adapter()
    ).laplace_approximation([{**texts, "y": y}])
    posterior = posterior.with_prior_precision(20.0)
    found = pl.predict(posterior, [texts])
    # Monte Carlo over the network, linearised by a derivative.
    mode, number = posterior.mode(), 20_000

    def outputs(flat: Tensor) -> Tensor:
        with lora.bind(unflatten(flat, mode)) as net:
            logits: Tensor = net(**texts).logits
        return logits

    flat = flatten(mode)
    j = torch.autograd.functional.jacobian(outputs, flat)
    draws = posterior.sample(number)
    steps = torch.cat([(draws[s] - x).flatten(1) for s, x in mode.items()], 1)
    f = outputs(flat).detach() + torch.einsum("bcd,sd->sbc", j, steps)
    density = dist.Normal(f[..., 0], f[..., 1].exp()).log_prob(y).exp()
    noise = (2 * f[..., 1]).exp()
    assert f[..., 1].std(0).max() > 0.2
    for value, each in [
        (found.log_prob(y).exp(), density),
        (found.mean, f[..., 0]),
        (found.noise_variance, noise),
    ]:
        error = (value - each.mean(0)) / (each.std(0) / math.sqrt(number))
        assert error.abs().max() < 5


@pytest.mark.untrained
@pytest.mark.parametrize("family", [partial(dist.StudentT, 5.0), dist.Laplace])
def test_another_scale_that_the_network_outputs_is_integrated_over(family: Any) -> None:
    problem = NoiseToo(1, family)
    posterior = problem.laplace()
    found = pl.predict(posterior, [{"x": problem.x}])
    mean, covariance = problem.gaussian(posterior)
    z = torch.linspace(-8, 8, 201, dtype=torch.float64)
    grid = torch.cartesian_prod(z, z)
    log_weights = -0.5 * grid.square().sum(-1)
    f = mean[:, 0, None] + grid @ torch.linalg.cholesky(covariance[:, 0]).mT
    log_probs = family(f[..., 0], f[..., 1].exp()).log_prob(problem.y)
    expected = (log_probs + log_weights).logsumexp(-1) - log_weights.logsumexp(-1)
    log_prob = found.log_prob(problem.y.reshape(found.mean.shape)).reshape(-1)
    assert_close(log_prob, expected, rtol=0, atol=1e-2)  # quasi-Monte Carlo
    assert_close(found.mean.reshape(-1), mean[:, 0, 0], rtol=0, atol=2e-3)


def test_student_likelihood() -> None:
    lora = pl.lift(nn.Linear(3, 1).double())

    def model(x: Tensor, labels: Tensor | None = None) -> None:
        loc = lora()(x)[..., 0]
        with pyro.plate("data", 8, subsample=x):
            pyro.sample("y", dist.StudentT(4.0, loc, 0.5), obs=labels)

    batches = [{"x": torch.randn(8, 3).double(), "labels": torch.zeros(8)}]
    posterior = models.laplace(lora, model, batches, pl.structures.Dense())
    found = pl.predict(posterior, batches, model=model, method="sample", num_samples=4)
    assert_close(found.noise_variance, torch.full((8,), 0.5).double())
    assert_close(found.mean, found.loc.mean(0))
    # Linearised: an integral over the location, here on a fine grid of it.
    exact = pl.predict(posterior, batches, model=model)
    gaussian = posterior.linearized(batches[0])
    sd = gaussian.covariance_matrix[:, 0].sqrt()
    z = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    at = dist.StudentT(4.0, gaussian.mean + sd * z, 0.5)
    density = (dist.Normal(0, 1).log_prob(z)).exp() * (z[1] - z[0])
    y = torch.linspace(-2, 2, 8).double()
    expected = (at.log_prob(y[:, None]).exp() * density).sum(-1).log()
    assert_close(exact.log_prob(y), expected, rtol=0, atol=1e-8)
    assert_close(exact.mean, gaussian.mean[:, 0], rtol=0, atol=1e-8)
    assert_close(exact.weight_variance, sd[:, 0].square(), rtol=0, atol=1e-8)
    assert_close(exact.noise_variance, torch.full((8,), 0.5).double())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loc": torch.zeros(3)}, r"loc has shape \(3,\); expected \(S, N\)"),
        ({"noise_scale": torch.ones(2, 4)}, r"noise_scale has shape \(2, 4\)"),
        ({"noise_scale": torch.zeros(2, 3)}, "noise_scale positive"),
        ({"labels": torch.zeros(2)}, r"labels has shape \(2,\); expected \(3,\)"),
        ({"loc": torch.full((2, 3), math.nan)}, "loc must be finite"),
        ({"labels": torch.full((3,), math.inf)}, "labels has NaN"),
        (
            {"df": torch.ones(2, 3), "loc_variance": torch.ones(2, 3)},
            "no closed form together",
        ),
    ],
)
def test_impossible_predictions_are_refused(
    change: dict[str, Tensor], message: str
) -> None:
    fields: dict[str, Any] = {"loc": torch.zeros(2, 3), "noise_scale": torch.ones(2, 3)}
    with pytest.raises(ValueError, match=message):
        pl.RegressionPrediction(**{**fields, **change})


def test_arguments_are_checked() -> None:
    found = pl.RegressionPrediction(loc=torch.zeros(1, 2), noise_scale=torch.ones(1, 2))
    with pytest.raises(ValueError, match="metrics needs labels"):
        found.metrics()
    for probability in (0.0, 1 - 1e-16, 1.0):
        with pytest.raises(ValueError, match=f"below 1, by .* found {probability}"):
            found.quantile(probability)
