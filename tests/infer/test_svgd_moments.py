"""Where SVGD ends: moments of targets that are known in closed form."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import effective_sample_size
from torch import Tensor
from torch.distributions import biject_to

import pyro_lora as pl
from pyro_lora import kernels

RBF = kernels.RBF()


def particles_of(
    model: Callable[[], None],
    num_particles: int,
    num_steps: int,
    spread: float = 1.0,
    kernel: Any = RBF,
    **settings: Any,
) -> dict[str, Tensor]:
    def init(site: dict[str, Any]) -> Tensor:
        noise = spread * torch.randn(site["fn"].shape(), dtype=torch.float64)
        return biject_to(site["fn"].support)(noise)

    schedule = {
        "optimizer": torch.optim.Adam,
        "optim_args": {"lr": 0.1},
        "gamma": 0.05 ** (1 / num_steps),
    }
    svgd = pl.SVGD(
        model,
        kernel,
        pyro.optim.ExponentialLR(schedule),
        num_particles,
        init_loc_fn=init,
        **settings,
    )
    svgd.run([{}], num_epochs=num_steps, progress_bar=False)
    return svgd.get_samples()


@pytest.mark.parametrize(
    ("loc", "covariance"),
    [
        pytest.param([2.0], [[2.0]], marks=pytest.mark.slow),
        pytest.param([1.0, -1.0], [[1.0, 0.0], [0.0, 1.0]], marks=pytest.mark.slow),
        ([1.0, -1.0], [[4.0, 1.6], [1.6, 1.0]]),  # a correlation of .8
    ],
)
def test_gaussians(loc: list[float], covariance: list[list[float]]) -> None:
    mean, expected = torch.tensor(loc).double(), torch.tensor(covariance).double()

    def model() -> None:
        pyro.sample("x", dist.MultivariateNormal(mean, expected))

    particles = particles_of(model, 100, 300)["x"]
    sd = expected.diagonal().sqrt()
    # In standard deviations; SVGD has no Monte Carlo error.
    assert ((particles.mean(0) - mean).abs() / sd).max() < 0.02
    # 100 particles keep most of the variance in one or two dims.
    error = (particles.T.cov().view_as(expected) - expected) / sd.outer(sd)
    assert error.abs().max() < (0.06 if len(loc) == 1 else 0.12)
    assert (error.diagonal() < 0.01).all()


@pytest.mark.slow
def test_a_skewed_target() -> None:
    # x is the logarithm of an exponential variable.
    one = torch.ones((), dtype=torch.float64)

    def model() -> None:
        x = pyro.sample("x", dist.Normal(one, one).mask(False))
        pyro.factor("gumbel", x - x.exp())

    particles = particles_of(model, 100, 300)["x"]
    mean, variance = torch.digamma(one).item(), math.pi**2 / 6
    assert particles.mean().item() == pytest.approx(mean, abs=0.05)
    assert particles.var().item() == pytest.approx(variance, rel=0.15)
    # The deciles are those of the target, not of a normal of this mean and variance.
    levels = torch.arange(1, 10).double() / 10
    deciles = (-(1 - levels).log()).log()
    error = (particles.quantile(levels) - deciles).abs()
    assert (error < 0.1).all()
    normal = dist.Normal(mean, variance**0.5).icdf(levels)
    assert ((normal - deciles).abs() > 0.1).any()


# What the tests beside it see with closed forms, once more by a long chain.
@pytest.mark.slow
def test_a_logistic_model_agrees_with_nuts() -> None:
    # Two sites, an intercept and two slopes; 40 data leave room for skewness.
    x = torch.randn(40, 2).double()
    y = torch.bernoulli(torch.sigmoid(x @ torch.tensor([1.5, -1.0]).double() + 0.5))

    def model() -> None:
        b = pyro.sample("b", dist.Normal(x.new_zeros(()), 2.0))
        w = pyro.sample("w", dist.Normal(x.new_zeros(2), 2.0).to_event(1))
        logits = (x * w[..., None, :]).sum(-1) + b[..., None]
        pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=y)

    found = particles_of(model, 100, 300)
    mcmc = MCMC(NUTS(model), num_samples=600, warmup_steps=150, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()
    particles, chain = (torch.cat([v["b"][:, None], v["w"]], 1) for v in (found, draws))
    sd = chain.std(0)
    ess = effective_sample_size(chain[None], chain_dim=0, sample_dim=1)
    # 4 standard errors of NUTS, beside the errors of SVGD stated above.
    bias = (particles.mean(0) - chain.mean(0)).abs() / sd
    assert (bias < 0.02 + 4 / ess.sqrt()).all()
    ratio = particles.var(0) / chain.var(0)
    assert ((ratio > 0.8) & (ratio < 1.05 + 4 * (2 / ess).sqrt())).all()
    correlation = particles.T.corrcoef() - chain.T.corrcoef()
    assert correlation.abs().max() < 0.05 + 4 / ess.min().sqrt()


@pytest.mark.parametrize(
    "temperature", [1.0, pytest.param(2.0, marks=pytest.mark.slow)]
)
def test_correlated_gaussian_over_two_sites(temperature: float) -> None:
    # Sites of two sizes, correlated: a vector of sites laid out site by site and cut
    # into particles, as in pyro.infer.SVGD, gives other moments.
    one = torch.ones((), dtype=torch.float64)
    loc, scale = torch.tensor([1.0, -2.0]).double(), torch.tensor([1.0, 0.6]).double()

    def model() -> None:
        x = pyro.sample("x", dist.Normal(loc, scale).to_event(1))
        pyro.sample("y", dist.Normal(x[..., 0] - x[..., 1], 0.5 * one))

    particles = particles_of(model, 100, 300, temperature=temperature)
    flat = torch.cat([particles["x"], particles["y"][:, None]], 1)
    # y = x_0 - x_1 + noise
    a, b = scale.square().tolist()
    covariance = torch.tensor([[a, 0, a], [0, b, -b], [a, -b, a + b + 0.25]]).double()
    mean = torch.tensor([1.0, -2.0, 3.0]).double()
    # SVGD has no Monte Carlo error; with 100 particles its variances come out low.
    sd = (temperature * covariance.diagonal()).sqrt()
    assert ((flat.mean(0) - mean).abs() / sd).max() < 0.02
    correlation = flat.T.corrcoef()
    expected = covariance / (
        covariance.diagonal().sqrt().outer(covariance.diagonal().sqrt())
    )
    assert (correlation - expected).abs().max() < 0.05
    ratio = flat.var(0) / (temperature * covariance.diagonal())
    assert ((ratio > 0.85) & (ratio < 1.05)).all()


def test_conjugate_regression() -> None:
    x = torch.randn(20, 2).double()
    y = x @ torch.tensor([1.0, -0.5]).double() + 0.5 * torch.randn(20).double()

    def model() -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(2), 2.0).to_event(1))
        with pyro.plate("data", 20):
            pyro.sample("y", dist.Normal((x * w).sum(-1), 0.5), obs=y)

    particles = particles_of(model, 100, 200)["w"]
    precision = x.T @ x / 0.25 + torch.eye(2).double() / 4
    mean = torch.linalg.solve(precision, x.T @ y / 0.25)
    sd = torch.linalg.inv(precision).diagonal().sqrt()
    assert ((particles.mean(0) - mean).abs() / sd).max() < 0.02
    ratio = particles.var(0) / sd.square()
    assert ((ratio > 0.85) & (ratio < 1.05)).all()


def test_a_positive_site() -> None:
    # Moments on the support need the Jacobian: without it the mean of Gamma(4, 2),
    # which is 2, would become that of Gamma(3, 2).
    def model() -> None:
        four = torch.tensor(4.0).double()
        pyro.sample("rate", dist.Gamma(four, four / 2))

    particles = particles_of(model, 50, 200)["rate"]
    assert particles.mean().item() == pytest.approx(2.0, abs=0.05)
    assert particles.var().item() == pytest.approx(1.0, abs=0.15)


def test_two_modes_are_both_found() -> None:
    def model() -> None:
        flat = dist.Uniform(*torch.tensor([-20.0, 20.0]).double())
        x = pyro.sample("x", flat)
        modes = [dist.Normal(mode, 0.7).log_prob(x) for mode in (-3.0, 3.0)]
        pyro.factor("modes", torch.stack(modes).logsumexp(0))

    particles = particles_of(model, 40, 200, spread=2.0)["x"]
    left, right = particles[particles < 0], particles[particles > 0]
    assert 10 <= len(left) <= 30
    for side, mode in ((left, -3.0), (right, 3.0)):
        assert side.mean().item() == pytest.approx(mode, abs=0.1)
        assert side.std().item() == pytest.approx(0.7, abs=0.15)


@pytest.mark.slow
def test_strength_of_repulsion_is_a_temperature() -> None:
    # A Gaussian of one dim: the repulsive transport of strength beta has temperature
    # beta, so that its variance grows with it.
    def model() -> None:
        pyro.sample("x", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))

    variances = [
        particles_of(model, 40, 200, transport="repulsive", repulsion=repulsion)["x"]
        .var()
        .item()
        for repulsion in (0.5, 1.0, 2.0)
    ]
    one = variances[1]
    assert 0.8 < one < 1.0
    assert variances == pytest.approx([one / 2, one, 2 * one], rel=0.05)


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({}, math.log(6) / 200),
        ({"transport": "repulsive"}, math.log(6) / 400),
        ({"temperature": 200 / math.log(6)}, 1.0),
        ({"transport": "repulsive", "repulsion": 400 / math.log(6)}, 1.0),
    ],
)
@pytest.mark.few(1)
def test_variance_of_few_particles_in_many_dims(
    settings: dict[str, Any], share: float
) -> None:
    # They end at equal distances, where forces balance at a variance of log(K + 1) / D
    # (half of it for the repulsive transport): the kernel between two of them is
    # 1 / (K + 1), and the gradients of the others take away what they add up to.
    def model() -> None:
        zeros = torch.zeros(200, dtype=torch.float64)
        pyro.sample("x", dist.Normal(zeros, 1.0).to_event(1))

    particles = particles_of(model, 5, 200, spread=0.3, **settings)["x"]
    distances = torch.pdist(particles)
    assert distances.std() < 0.01 * distances.mean()
    assert particles.var(0).mean().item() == pytest.approx(share, rel=0.01)


def test_function_space_measures_by_the_data() -> None:
    # Where data say all about the weights, distances of outputs are those of whitened
    # weights: forces balance at the right variance whatever the posterior's shape.
    num_weights, num_particles = 40, 5
    turn = torch.linalg.qr(torch.randn(num_weights, num_weights).double()).Q
    x = torch.logspace(-0.5, 0.5, num_weights).double()[:, None] * turn

    def model() -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(num_weights), 1e3).to_event(1))
        with pyro.plate("data", num_weights):
            loc = (x * w).sum(-1)
            pyro.sample("y", dist.Normal(loc, 1.0), obs=x.new_zeros(num_weights))

    strength = 2 * num_weights / math.log(num_particles + 1)
    kernel = kernels.RBF(space="function")
    particles = particles_of(
        model, num_particles, 200, kernel=kernel, repulsion=strength
    )["w"]
    whitened = (particles @ x.T).var(0)
    assert whitened.mean().item() == pytest.approx(1.0, rel=0.01)
