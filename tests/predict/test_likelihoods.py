"""Every likelihood of the table, and one more, answers wherever the table is read."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora.likelihood.outcomes import one_class_log_probs
from tests.predict import models

pytestmark = pytest.mark.filterwarnings("ignore:The best prior precision")

NUM_DATA, NUM_INPUTS = 6, 3
CUTPOINTS = torch.tensor([-0.7, 0.2, 1.1]).double()
COVARIANCE = torch.tensor([[0.5, 0.3], [0.3, 0.7]]).double()
TRIALS = torch.arange(1.0, NUM_DATA + 1).double()


@pl.likelihoods.register(dist.Gamma)
def gamma(fn: dist.Gamma) -> pl.likelihoods.Likelihood:
    """All that the library is told of it."""
    shape = fn.concentration.detach()
    mean = fn.concentration / fn.rate
    return pl.likelihoods.one_parameter(
        predictor=mean.log(),
        information=shape,
        score=lambda y: shape * (y / mean.detach() - 1),
        at=lambda f: dist.Gamma(shape, shape / f.exp()),
    )


@dataclass(frozen=True)
class Case:
    """A likelihood of P outputs, and what an outcome of it is."""

    likelihood: Callable[[Tensor], Any]  # (..., P) -> distribution
    num_outputs: int = 1
    classes: bool = False
    event: bool = False


def first(f: Tensor) -> Tensor:
    return f[..., 0]


CASES = {
    "categorical": Case(lambda f: dist.Categorical(logits=f), 3, classes=True),
    "one-hot": Case(lambda f: dist.OneHotCategorical(logits=f), 3, classes=True),
    "bernoulli": Case(lambda f: dist.Bernoulli(logits=first(f)), classes=True),
    "ordered": Case(lambda f: dist.OrderedLogistic(first(f), CUTPOINTS), classes=True),
    "multinomial": Case(lambda f: dist.Multinomial(4, logits=f), 3, event=True),
    "binomial": Case(lambda f: dist.Binomial(TRIALS, logits=first(f))),
    "negative-binomial": Case(lambda f: dist.NegativeBinomial(3.5, logits=first(f))),
    "poisson": Case(lambda f: dist.Poisson(first(f).exp())),
    "several-poissons": Case(lambda f: dist.Poisson(f.exp()).to_event(1), 2),
    "normal": Case(lambda f: dist.Normal(first(f), 0.5)),
    "several-normals": Case(lambda f: dist.Normal(f, 0.5).to_event(1), 2),
    "nan-masked": Case(lambda f: dist.NanMaskedNormal(first(f), 0.5)),
    "student": Case(lambda f: dist.StudentT(4.0, first(f), 0.5)),
    "laplace": Case(lambda f: dist.Laplace(first(f), 0.5)),
    "multivariate": Case(
        lambda f: dist.MultivariateNormal(f, COVARIANCE), 2, False, True
    ),
    "gamma": Case(lambda f: dist.Gamma(2.5, 2.5 / first(f).exp())),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
numbers = pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if not case.classes]
)


@dataclass(frozen=True)
class Problem:
    """A linear network in front of a likelihood, so that linearising it is exact."""

    lora: Any
    model: Any
    batches: list[dict[str, Tensor]]

    @property
    def labels(self) -> Tensor:
        return torch.cat([batch["labels"] for batch in self.batches])

    @property
    def x(self) -> Tensor:
        return torch.cat([batch["x"] for batch in self.batches])


def problem(case: Case, num_batches: int = 1) -> Problem:
    network = nn.Linear(NUM_INPUTS, case.num_outputs).double()
    lora = pl.lift(network, prior=pl.priors.normal(1.0))

    def model(x: Tensor, labels: Tensor | None = None) -> None:
        f = lora()(x)
        with pyro.plate("data", NUM_DATA, subsample=x):
            pyro.sample("y", case.likelihood(f), obs=labels)

    x = torch.randn(NUM_DATA, NUM_INPUTS).double()
    labels = case.likelihood(network(x).detach()).sample()
    size = NUM_DATA // num_batches
    batches = [
        {"x": a, "labels": b}
        for a, b in zip(x.split(size), labels.split(size), strict=True)
    ]
    return Problem(lora, model, batches)


def predicted(fn: Any, y: Tensor) -> Tensor:
    """Log probability of single outcomes, one for each of P outputs."""
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    log_prob: Tensor = fn.log_prob(y)
    return log_prob


def log_prob_of(prediction: Any, case: Case, y: Tensor) -> Tensor:
    if not case.classes:
        return prediction.log_prob(y)
    classes = y.argmax(-1) if y.ndim == 2 else y.long()
    return prediction.log_probs.gather(1, classes[:, None])[:, 0]


@pytest.mark.grid
@every_case
@pytest.mark.parametrize("num_batches", [1, 2])
def test_draws_are_averaged_in_probability(case: Case, num_batches: int) -> None:
    if case is CASES["binomial"]:
        num_batches = 1  # whose trials are one for each datum
    found = problem(case, num_batches)
    particles = models.particles(found.lora, found.model, num=11)
    prediction = pl.predict(particles, found.batches, chunk_size=4)
    log_probs, means, variances = [], [], []
    for k in range(11):
        with found.lora.bind(models.draw(particles.particles, k)) as net:
            fn = case.likelihood(net(found.x))
        log_probs.append(predicted(fn, found.labels))
        if not case.classes:
            means.append(fn.mean)
            variances.append(fn.variance)
    expected = torch.stack(log_probs).logsumexp(0) - math.log(11)
    found_log_prob = log_prob_of(prediction, case, found.labels)
    assert_close(found_log_prob, expected, rtol=0, atol=1e-9)
    metrics = prediction.metrics()
    assert metrics["nll"] == pytest.approx(-expected.mean().item(), abs=1e-9)
    if case.classes:
        assert ("rps" in metrics) == (case is CASES["ordered"])
        return
    mean, variance = torch.stack(means).mean(0), torch.stack(variances).mean(0)
    between = (torch.stack(means) - mean).square().mean(0)
    for value, other in [
        (prediction.mean, mean),
        (prediction.noise_variance, variance),
        (prediction.weight_variance, between),
        (prediction.variance, variance + between),
    ]:
        assert_close(value, other, rtol=0, atol=1e-9)
    rmse = (mean - found.labels).square().mean().sqrt().item()
    assert metrics["rmse"] == pytest.approx(rmse, abs=1e-9)
    table = prediction.to_pandas()
    assert len(table) == NUM_DATA


def dense(found: Problem) -> pl.LaplacePosterior:
    return models.laplace(found.lora, found.model, found.batches, pl.structures.Dense())


@every_case
@pytest.mark.few(9)
def test_linearised_is_the_integral_over_the_predictor(case: Case) -> None:
    found = problem(case)
    posterior = dense(found)
    prediction = pl.predict(posterior, found.batches)
    # In a linear network draws of the weights are draws of the predictor.
    pyro.set_rng_seed(1)
    draws = posterior.sample(20_000)
    with torch.no_grad(), found.lora.bind(draws) as net:
        fn = case.likelihood(net(found.x))
    each = predicted(fn, found.labels).exp()  # (S, N)
    error = each.std(0) / len(each) ** 0.5
    exact = log_prob_of(prediction, case, found.labels).exp()
    # Quasi-Monte Carlo has an error of its own, .01 of a probability.
    own = 0.02 * exact if case.event else 1e-4 * exact
    assert ((each.mean(0) - exact).abs() < 5 * error + own).all()
    if case.classes or case.event:
        return
    error = (fn.mean.std(0) + fn.variance.sqrt().mean(0)) / len(each) ** 0.5
    assert ((fn.mean.mean(0) - prediction.mean).abs() < 5 * error).all()
    ratio = fn.mean.var(0) / prediction.weight_variance
    assert ((ratio - 1).abs() < 0.25).all()


@pytest.mark.parametrize("name", ["poisson", "gamma", "laplace", "student"])
def test_linearised_on_a_fine_grid(name: str) -> None:
    case = CASES[name]
    found = problem(case)
    posterior = dense(found)
    prediction = pl.predict(posterior, found.batches)
    gaussian = posterior.linearized(found.batches[0])
    sd = gaussian.covariance_matrix[:, 0].sqrt()  # (N, 1)
    z = torch.linspace(-12, 12, 40_001, dtype=torch.float64)
    weights = dist.Normal(0.0, 1.0).log_prob(z).exp() * (z[1] - z[0])
    at = case.likelihood((gaussian.mean + sd * z)[..., None])
    p = (at.log_prob(found.labels[:, None]).exp() * weights).sum(-1)
    # Laplace's density has a kink, where the rule converges quadratically.
    error = 1e-3 if name == "laplace" else 1e-8
    assert_close(prediction.log_prob(found.labels), p.log(), rtol=0, atol=error)
    mean = (at.mean * weights).sum(-1)
    assert_close(prediction.mean, mean, rtol=1e-7, atol=1e-8)


def test_a_multivariate_normal_is_the_closed_form() -> None:
    found = problem(CASES["multivariate"])
    posterior = dense(found)
    prediction = pl.predict(posterior, found.batches)
    gaussian = posterior.linearized(found.batches[0])
    exact = dist.MultivariateNormal(
        gaussian.mean, gaussian.covariance_matrix + COVARIANCE
    )
    assert_close(
        prediction.log_prob(found.labels),
        exact.log_prob(found.labels),
        rtol=0,
        atol=0.05,
    )


@every_case
@pytest.mark.few(6)
def test_every_reader_of_the_table_answers(case: Case) -> None:
    found = problem(case)
    posterior = dense(found)  # the exact Fisher information
    tuned = posterior.optimize_prior(objective="nll", batches=found.batches)
    assert tuned.prior_precision.keys() == posterior.prior_precision.keys()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(Estimated shape|The point-wise)")
        tree = pl.to_datatree(posterior, found.batches, num_samples=4)
        verdict = pl.diagnose(posterior, found.batches, num_samples=25)
    assert tree["log_likelihood"].attrs["method"] == "linearized"
    assert tree["log_likelihood"]["y"].shape == (1, 4, NUM_DATA)
    assert (verdict.confidence is None) == (case in UNPLACED), verdict.left_out
    particles = models.particles(found.lora, found.model)
    number = pl.effective_num_predictions(
        found.model, particles.particles, found.batches
    )
    assert 1 <= number <= 3
    svgd = pl.SVGD(
        found.model,
        pl.kernels.RBF(space="function"),
        pyro.optim.SGD({"lr": 1e-3}),
        2,
        init_loc_fn=found.lora.init_to_adapter(jitter=0.1),
    )
    assert math.isfinite(svgd.step(**found.batches[0]))


# Without a distribution function: what has several dims
UNPLACED = (CASES["multinomial"], CASES["multivariate"])


@numbers
def test_the_nll_that_tunes_the_prior_is_that_of_the_prediction(name: str) -> None:
    found = problem(CASES[name])
    posterior = dense(found)
    tuned = posterior.optimize_prior(objective="nll", batches=found.batches)
    best = pl.predict(tuned, found.batches).metrics()["nll"]
    for factor in (10**-0.5, 10**0.5):
        others = {s: factor * x for s, x in tuned.prior_precision.items()}
        if not all(bool((1e-4 <= x).all() & (x <= 1e6).all()) for x in others.values()):
            continue  # beyond the grid
        other = tuned.with_prior_precision(others)
        nll = pl.predict(other, found.batches).metrics()["nll"]
        assert nll >= best - 1e-6


def test_an_unknown_type_is_refused_by_one_sentence() -> None:
    case = Case(lambda f: dist.Cauchy(first(f), 0.5))
    found = problem(case)
    particles = models.particles(found.lora, found.model)
    guide = pl.AutoLaplace(
        found.model, init_loc_fn=found.lora.init_to_adapter(), fisher="mc"
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The weights aren't a mode")
        posterior = guide.laplace_approximation(found.batches)
    for refused in [
        lambda: dense(found),
        lambda: pl.predict(particles, found.batches),
        lambda: pl.predict(posterior, found.batches),
        lambda: posterior.linearized(found.batches[0]),
        lambda: posterior.optimize_prior(objective="nll", batches=found.batches),
        lambda: pl.effective_num_predictions(
            found.model, particles.particles, found.batches
        ),
    ]:
        with pytest.raises(
            TypeError, match=r"Nothing is known of the likelihood Cauchy.*register"
        ):
            refused()
    verdict = pl.diagnose(particles, found.batches)
    assert verdict.left_out["confidence"] == "Cauchy isn't among pyro_lora.likelihoods"


@pytest.mark.parametrize("name", ["poisson", "gamma", "negative-binomial"])
@pytest.mark.parametrize(("sd", "error"), [(30.0, 1e-3), (100.0, 0.5)])
def test_a_posterior_that_knows_nothing_leaves_finite_losses(
    name: str, sd: float, error: float
) -> None:
    # From an sd of a hundred rates overflow.
    likelihood = CASES[name].likelihood
    y = torch.tensor([1.0, 2.0, 5.0]).double()
    fn = likelihood(torch.zeros(3, 1).double())
    wide = pl.integrals.GaussianLogits(
        torch.zeros(3, 1).double(),
        torch.full((3, 1, 1), sd**2).double(),
        numbers=pl.likelihoods.of(fn).at,
    )
    f = torch.linspace(-300, 300, 60_001, dtype=torch.float64)
    density = dist.Normal(0.0, sd).log_prob(f).exp() * (f[1] - f[0])
    p = (likelihood(f[:, None, None]).log_prob(y).exp() * density[:, None]).sum(0)
    assert_close(wide.log_prob(y), p.log(), rtol=0, atol=error)


@every_case
def test_a_value_says_the_same_at_its_own_predictor(case: Case) -> None:
    f = torch.randn(NUM_DATA, case.num_outputs).double().requires_grad_()
    fn = case.likelihood(f)
    y = fn.sample()
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    entry = pl.likelihoods.of(fn)
    assert_close(entry.at(entry.predictor.detach()).log_prob(y), fn.log_prob(y))
    # The score in the predictor, by autograd.
    at = entry.predictor.detach().requires_grad_()
    (score,) = torch.autograd.grad(entry.at(at).log_prob(y).sum(), at)
    assert_close(entry.score(y), score, rtol=0, atol=1e-9)
    if entry.classes is not None and fn.event_shape == case.likelihood(f).event_shape:
        assert_close(one_class_log_probs(fn), entry.classes.log_probs)


@pytest.mark.parametrize("gaps", [(), (0,), (1,)])
def test_fisher_information_of_a_multivariate_normal(gaps: tuple[int, ...]) -> None:
    loc = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 2).double()
    y[:, list(gaps)] = torch.nan
    entry = pl.likelihoods.of(dist.NanMaskedMultivariateNormal(loc, COVARIANCE))
    found = entry.root(y)
    seen = [i for i in range(2) if i not in gaps]
    expected = torch.zeros(2, 2).double()
    block = COVARIANCE[seen][:, seen].inverse()
    for a, i in enumerate(seen):
        for b, j in enumerate(seen):
            expected[i, j] = block[a, b]
    assert_close(found.root @ found.root.mT, expected.expand(3, 2, 2))
    score = (found.root @ found.coordinates[..., None])[..., 0]
    log_prob = dist.NanMaskedMultivariateNormal(loc, COVARIANCE).log_prob(y)
    assert_close(score, torch.autograd.grad(log_prob.sum(), loc)[0])


# Counts


@settings(deadline=None, max_examples=8)
@given(
    st.lists(st.floats(0.05, 20.0), min_size=1, max_size=4),
    st.integers(0, 40),
)
def test_scores_of_counts_by_definition(rates: list[float], label: int) -> None:
    rate = torch.tensor(rates).double()[:, None]
    prediction = pl.MixturePrediction(
        components=[[dist.Poisson(rate)]], labels=torch.tensor([label])
    )
    k = torch.arange(200.0).double()
    p = dist.Poisson(rate).log_prob(k).exp().mean(0)
    below = p.cumsum(0)
    metrics = prediction.metrics()
    crps = (below - (label <= k).double()).square().sum().item()
    assert metrics["crps"] == pytest.approx(crps, abs=1e-9)
    # Of outcomes that are as predicted, 90% are inside.
    every = pl.MixturePrediction(
        components=[[dist.Poisson(rate.expand(-1, 200))]], labels=k
    )
    inside = every._scores()["coverage"]
    assert float(inside @ p) == pytest.approx(0.9, abs=1e-5)
    assert ((inside >= 0) & (inside <= 1)).all()


def test_missing_counts_are_not_counted() -> None:
    rate = torch.tensor([[1.0, 4.0, 2.0], [2.0, 3.0, 5.0]]).double()
    labels = torch.tensor([3.0, torch.nan, 0.0])
    some = pl.MixturePrediction(components=[[dist.Poisson(rate)]], labels=labels)
    seen = [0, 2]
    alone = pl.MixturePrediction(
        components=[[dist.Poisson(rate[:, seen])]], labels=labels[seen]
    )
    assert some.metrics() == pytest.approx(alone.metrics(), abs=1e-12)
    pyro.set_rng_seed(0)
    with_errors = some.metrics(num_bootstrap=20)
    assert with_errors["nll_se"] > 0
    nothing = pl.MixturePrediction(
        components=[[dist.Poisson(rate)]], labels=torch.full((3,), torch.nan)
    )
    with pytest.raises(ValueError, match="no datum of this prediction has one"):
        nothing.metrics()
    without = pl.MixturePrediction(components=[[dist.Poisson(rate)]])
    with pytest.raises(ValueError, match="metrics needs labels"):
        without.metrics()


def test_counts_beyond_reach_have_no_distribution_function() -> None:
    wide = pl.MixturePrediction(
        components=[[dist.Poisson(torch.full((1, 2), 1e6).double())]],
        labels=torch.full((2,), 1e6),
    )
    assert wide.metrics().keys() == {"nll", "rmse"}


@pytest.mark.parametrize("label", [-1.0, 1.5, math.inf])
def test_a_label_that_is_no_count_is_refused(label: float) -> None:
    found = problem(CASES["poisson"])
    particles = models.particles(found.lora, found.model)
    found.batches[0]["labels"][2] = label
    message = rf"{label} is outside of the support of Poisson"
    with pytest.raises(ValueError, match=message):
        pl.predict(particles, found.batches)
    with pytest.raises(ValueError, match=message):
        pl.MixturePrediction(
            components=[[dist.Poisson(torch.ones(1, 1))]],
            labels=torch.tensor([label]),
        )
    with pytest.raises(ValueError, match=r"labels have shape \(2,\)"):
        pl.MixturePrediction(
            components=[[dist.Poisson(torch.ones(1, 1))]], labels=torch.zeros(2)
        )


# Ordered classes


def test_ranked_probability_score_by_a_double_loop() -> None:
    found = problem(CASES["ordered"])
    particles = models.particles(found.lora, found.model)
    prediction = pl.predict(particles, found.batches)
    total = 0.0
    for n in range(NUM_DATA):
        for k in range(3):
            below = prediction.probs[n, : k + 1].sum()
            total += float((below - (found.labels[n] <= k).double()) ** 2) / NUM_DATA
    assert prediction.metrics()["rps"] == pytest.approx(total, abs=1e-12)
    assert "rps_se" in prediction.metrics(num_bootstrap=5)
    assert "rps" in prediction.with_temperature(2.0).metrics()


def test_a_gaussian_posterior_draws_of_counts_are_compared_with_its_mode() -> None:
    found = problem(CASES["poisson"])
    posterior = dense(found).with_prior_precision(1e-4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Averaged over draws of a Gaussian")
        drawn = pl.predict(posterior, found.batches, method="sample", num_samples=5)
    assert isinstance(drawn, pl.MixturePrediction)


@pytest.mark.parametrize("y", [1.5, -1.5, 0.3])
def test_two_parameters_of_one_number_are_integrated_jointly(y: float) -> None:
    # A location and a log scale, correlated: against a fine grid over both.
    mean = torch.tensor([0.2, -0.1], dtype=torch.float64)
    covariance = torch.tensor([[1.0, 0.2], [0.2, 0.49]], dtype=torch.float64)
    logits = pl.integrals.GaussianLogits(
        mean[None],
        covariance[None],
        numbers=lambda f: dist.Normal(f[..., 0], f[..., 1].exp()),
    )
    z = torch.linspace(-7, 7, 561, dtype=torch.float64)
    grid = torch.cartesian_prod(z, z)
    f = mean + grid @ torch.linalg.cholesky(covariance).mT
    log_weights = -0.5 * grid.square().sum(-1)
    log_probs = dist.Normal(f[:, 0], f[:, 1].exp()).log_prob(torch.tensor(y).double())
    expected = (log_probs + log_weights).logsumexp(0) - log_weights.logsumexp(0)
    found = logits.log_prob(torch.tensor([y]).double())
    assert_close(found[0], expected, rtol=0, atol=2e-3)


def test_rows_with_gaps_count_by_what_is_there() -> None:
    loc = torch.randn(1, 4, 2, dtype=torch.float64)
    scale = torch.tensor([[1.0, 0.3], [0.3, 2.0]], dtype=torch.float64)
    fn = dist.NanMaskedMultivariateNormal(loc, scale.expand(1, 4, 2, 2))
    nan = math.nan
    labels = torch.tensor([[0.1, 0.2], [nan, 1.0], [nan, nan], [0.5, -1.0]]).double()
    prediction = pl.MixturePrediction(components=[[fn]], labels=labels)
    assert prediction.has_label.tolist() == [True, True, False, True]
    full = dist.MultivariateNormal(loc[0], scale)
    parts = [
        full.log_prob(labels.nan_to_num())[0],
        dist.Normal(loc[0, 1, 1], 2.0**0.5).log_prob(labels[1, 1]),
        full.log_prob(labels.nan_to_num())[3],
    ]
    metrics = prediction.metrics()
    assert metrics["nll"] == pytest.approx(-float(sum(parts)) / 3, rel=1e-10)
    assert math.isfinite(metrics["rmse"])
