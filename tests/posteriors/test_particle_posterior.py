"""Particles as a guide."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Importance, Predictive, Trace_ELBO
from pyro.optim import SGD, Adam
from torch import Tensor
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora import kernels
from tests import networks
from tests.infer.targets import NUM_DATA

NUM_PARTICLES = 4


def model(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Sites of shapes () and (2,), each of which tells the particles below apart."""
    loc = pyro.sample("loc", dist.Normal(torch.zeros(()), 1.0))
    pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x * loc, 1e-6), obs=y)


def init(site: dict[str, Any]) -> Tensor:
    number = torch.tensor(float(site["infer"].get("particle", 0)))
    return number if site["name"] == "loc" else torch.stack([10 * number, -number])


X = torch.tensor([1.0, -1.0, 2.0])


@pytest.fixture
def posterior() -> pl.ParticlePosterior:
    svgd = pl.SVGD(
        model, kernels.RBF(), SGD({"lr": 0.0}), NUM_PARTICLES, init_loc_fn=init
    )
    svgd.step(X, torch.zeros(3))
    return svgd.posterior()


def numbers(draws: dict[str, Tensor]) -> list[int]:
    """Which particle each draw is; all sites must be of the same one."""
    number = draws["loc"].reshape(-1)
    expected = torch.stack([10 * number, -number], 1)
    assert torch.equal(draws["w"].reshape(-1, 2), expected)
    return number.int().tolist()


def test_as_many_as_particles_gives_each_in_order(
    posterior: pl.ParticlePosterior,
) -> None:
    assert posterior.num_particles == NUM_PARTICLES
    assert numbers(posterior.sample(NUM_PARTICLES)) == list(range(NUM_PARTICLES))


def test_fewer_are_drawn_without_replacement(posterior: pl.ParticlePosterior) -> None:
    draws = [numbers(posterior.sample(3)) for _ in range(400)]
    assert all(len(set(draw)) == 3 for draw in draws)
    counts = torch.bincount(torch.tensor(draws).flatten(), minlength=NUM_PARTICLES)
    # Each is in with probability 3/4: a standard deviation of 8.7 in 400 draws.
    assert ((counts - 300).abs() < 4 * 8.7).all()


def test_more_are_drawn_with_replacement(posterior: pl.ParticlePosterior) -> None:
    counts = torch.bincount(
        torch.tensor(numbers(posterior.sample(4000))), minlength=NUM_PARTICLES
    )
    # Binomial(4000, 1/4): a standard deviation of 27.4.
    assert ((counts - 1000).abs() < 4 * 27.4).all()
    assert len(set(numbers(posterior.sample(5)))) < NUM_PARTICLES + 1


@pytest.mark.parametrize("num_samples", [0, -1])
def test_no_draws(posterior: pl.ParticlePosterior, num_samples: int) -> None:
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        posterior.sample(num_samples)


def test_mean_and_variance(posterior: pl.ParticlePosterior) -> None:
    assert_close(posterior.mean()["w"], torch.tensor([15.0, -1.5]))
    assert_close(posterior.variance()["w"], torch.tensor([125.0, 1.25]))
    assert_close(posterior.mean()["loc"], torch.tensor(1.5))
    assert_close(posterior.variance()["loc"], torch.tensor(1.25))


def test_no_mode_and_no_density(posterior: pl.ParticlePosterior) -> None:
    with pytest.raises(ValueError, match="no mode"):
        posterior.mode()
    with pytest.raises(ValueError, match=r"no density.*MixturePosterior"):
        posterior.log_prob(posterior.sample(2))


def test_a_guide_draws_one_particle(posterior: pl.ParticlePosterior) -> None:
    found = []
    for _ in range(200):
        trace = poutine.trace(posterior).get_trace(X)
        values = {site: trace.nodes[site]["value"] for site in ("w", "loc")}
        assert values["w"].shape == (2,)
        assert values["loc"].shape == ()
        found += numbers(values)
    # Binomial(200, 1/4): a standard deviation of 6.1.
    counts = torch.bincount(torch.tensor(found), minlength=NUM_PARTICLES)
    assert ((counts - 50).abs() < 4 * 6.1).all()


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(posterior: pl.ParticlePosterior, parallel: bool) -> None:
    predictive = Predictive(
        model,
        guide=posterior,
        num_samples=400,
        parallel=parallel,
        return_sites=["w", "loc", "y"],
    )
    draws = predictive(X)
    found = numbers(draws)
    # Binomial(400, 1/4): a standard deviation of 8.7.
    counts = torch.bincount(torch.tensor(found), minlength=NUM_PARTICLES)
    assert ((counts - 100).abs() < 4 * 8.7).all()
    # With so little noise, y tells that the model saw the very same particle.
    expected = draws["loc"].reshape(400, 1) * X
    assert_close(draws["y"].reshape(400, 3), expected, rtol=0, atol=1e-4)


def test_parallel_predictive_of_all_particles(
    posterior: pl.ParticlePosterior,
) -> None:
    predictive = Predictive(
        model, guide=posterior, num_samples=NUM_PARTICLES, parallel=True
    )
    expected = torch.arange(4.0)[:, None] * X
    assert_close(predictive(X)["y"], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("vectorized", [False, True])
def test_an_elbo_says_that_there_is_no_density(
    posterior: pl.ParticlePosterior, vectorized: bool
) -> None:
    elbo = Trace_ELBO(
        num_particles=2, vectorize_particles=vectorized, max_plate_nesting=1
    )
    svi = SVI(model, posterior, Adam({"lr": 0.1}), elbo)
    with pytest.raises(ValueError, match="no density"):
        svi.step(X, torch.zeros(3))
    with pytest.raises(ValueError, match="no density"):
        Importance(model, posterior, num_samples=2).run(X, torch.zeros(3))


@pytest.mark.parametrize("parallel", [False, True])
def test_on_a_network(parallel: bool) -> None:
    lora = pl.lift(networks.bert())
    classification = pl.models.classification(lora, NUM_DATA)
    batch = networks.batch()
    svgd = pl.SVGD(
        classification,
        kernels.RBF(),
        Adam({"lr": 0.01}),
        3,
        init_loc_fn=lora.init_to_adapter(jitter=0.3),
    )
    svgd.step(**batch)
    posterior = svgd.posterior()
    assert posterior.networks == (lora,)
    predictive = Predictive(
        classification, guide=posterior, num_samples=3, parallel=parallel
    )
    inputs = networks.inputs(batch)
    assert predictive(**inputs)["y"].shape == (3, 5)
    trace = poutine.trace(posterior).get_trace(**batch)
    for site in lora.sites:
        assert trace.nodes[site]["infer"]["lora"] == (lora,)
