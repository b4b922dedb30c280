"""Mixtures of posteriors, against PyTorch's own mixture and closed forms."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import SVI, Importance, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import SGD, Adam
from torch import Tensor
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora import kernels
from pyro_lora.ground.weights import Weights
from tests import networks
from tests.infer.targets import NUM_DATA

Posterior = pl.LaplacePosterior | pl.ParticlePosterior | pl.MixturePosterior


@pytest.fixture(scope="module")
def lora() -> pl.LiftedNetwork:
    torch.manual_seed(0)
    network = networks.bert(num_layers=1, hidden_size=4, r=1)
    return pl.lift(network, prior=pl.priors.normal(0.5))


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return networks.batch()


@pytest.fixture(scope="module")
def laplaces(
    lora: pl.LiftedNetwork, batch: dict[str, Tensor]
) -> list[pl.LaplacePosterior]:
    """Dense Laplace posteriors at two different places."""
    torch.manual_seed(1)
    model = pl.models.classification(lora, 5)
    found = []
    for shift in (0.0, 1.0):
        weights = {s: x + shift for s, x in lora.weights().items()}
        guide = pl.AutoLaplace(
            model, init_loc_fn=lora.init_to(weights), structure=pl.structures.Dense()
        )
        with pytest.warns(UserWarning, match="mode"):
            found.append(guide.laplace_approximation([batch]))
    return found


@pytest.fixture(scope="module")
def particles(lora: pl.LiftedNetwork, batch: dict[str, Tensor]) -> pl.ParticlePosterior:
    torch.manual_seed(2)
    svgd = pl.SVGD(
        pl.models.classification(lora, NUM_DATA),
        kernels.NoRepulsion(),
        SGD({"lr": 0.0}),
        3,
        init_loc_fn=lora.init_to_adapter(jitter=0.5),
    )
    svgd.step(**batch)
    return svgd.posterior()


def flat(weights: Weights) -> Tensor:
    """(S, D)."""
    return torch.cat([x.flatten(1) for x in weights.values()], 1)


def vector(weights: Weights) -> Tensor:
    return flat({s: x[None] for s, x in weights.items()})[0]


def covariance(laplace: pl.LaplacePosterior) -> Tensor:
    """Dense, from the Fisher information and the prior precision."""
    tau = {
        s: laplace.prior_precision[s].expand(x.shape) for s, x in laplace.mode().items()
    }
    return torch.linalg.inv(laplace.gaussian.fisher + torch.diag(vector(tau)))


def torch_mixture(
    laplaces: list[pl.LaplacePosterior], weights: list[float]
) -> torch.distributions.MixtureSameFamily:
    means = torch.stack([vector(laplace.mode()) for laplace in laplaces])
    covariances = torch.stack([covariance(laplace) for laplace in laplaces])
    return torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.tensor(weights).double()),
        torch.distributions.MultivariateNormal(means, covariances),
    )


@pytest.mark.parametrize("weights", [None, [0.3, 0.7], [3.0, 1.0]])
def test_log_prob(
    laplaces: list[pl.LaplacePosterior], weights: list[float] | None
) -> None:
    mixture = pl.MixturePosterior(laplaces, weights)
    oracle = torch_mixture(laplaces, weights or [1.0, 1.0])
    draws = mixture.sample(20)
    expected = oracle.log_prob(flat(draws))
    assert_close(mixture.log_prob(draws), expected, rtol=1e-8, atol=1e-8)


def test_mean_and_variance(laplaces: list[pl.LaplacePosterior]) -> None:
    mixture = pl.MixturePosterior(laplaces, [0.3, 0.7])
    oracle = torch_mixture(laplaces, [0.3, 0.7])
    assert_close(vector(mixture.mean()), oracle.mean, rtol=1e-8, atol=1e-8)
    assert_close(vector(mixture.variance()), oracle.variance, rtol=1e-8, atol=1e-8)


def test_draws_have_the_moments(laplaces: list[pl.LaplacePosterior]) -> None:
    mixture = pl.MixturePosterior(laplaces, [0.3, 0.7])
    num_samples = 20_000
    draws = flat(mixture.sample(num_samples))
    mean, variance = vector(mixture.mean()), vector(mixture.variance())
    standard_error = (variance / num_samples).sqrt()
    assert ((draws.mean(0) - mean).abs() < 4 * standard_error).all()
    # A Gaussian's sample variance has a relative standard error of sqrt(2 / S); one of
    # two Gaussians apart has less.
    error = (2 / num_samples) ** 0.5
    assert ((draws.var(0) / variance - 1).abs() < 4 * error).all()


def test_frequencies_and_order(particles: pl.ParticlePosterior) -> None:
    # Components that can be told apart: one particle each.
    components = [one_particle(particles, k) for k in range(3)]
    mixture = pl.MixturePosterior(components, [0.5, 0.2, 0.3])
    draws = flat(mixture.sample(6000))
    number = torch.cdist(draws, flat(particles.particles)).argmin(1)
    probability = torch.tensor([0.5, 0.2, 0.3])
    standard_error = (probability * (1 - probability) / 6000).sqrt()
    frequency = torch.bincount(number, minlength=3) / 6000
    assert ((frequency - probability).abs() < 4 * standard_error).all()
    # In random order: neighbours agree as often as independent ones do.
    agree = (number[1:] == number[:-1]).double().mean()
    expected = probability.square().sum().item()
    error = (expected * (1 - expected) / 6000) ** 0.5
    assert abs(agree.item() - expected) < 4 * error


def one_particle(posterior: pl.ParticlePosterior, k: int) -> pl.ParticlePosterior:
    only = {s: x[k : k + 1] for s, x in posterior.particles.items()}
    return pl.ParticlePosterior(
        only, posterior.networks, posterior.model, posterior.obs_site
    )


def test_a_component_of_weight_0_is_never_drawn(
    particles: pl.ParticlePosterior,
) -> None:
    components = [one_particle(particles, k) for k in range(2)]
    draws = pl.MixturePosterior(components, [0.0, 1.0]).sample(50)
    for site, x in draws.items():
        assert (x == particles.particles[site][1]).all()


def test_nested_mixtures(laplaces: list[pl.LaplacePosterior]) -> None:
    one, other = laplaces
    inner = pl.MixturePosterior([one, other], [0.5, 0.5])
    nested = pl.MixturePosterior([inner, other], [0.4, 0.6])
    plain = pl.MixturePosterior([one, other], [0.2, 0.8])
    draws = nested.sample(10)
    assert_close(nested.log_prob(draws), plain.log_prob(draws))
    assert_close(nested.mean(), plain.mean())
    assert_close(nested.variance(), plain.variance())


@given(numbers=st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=6), data=st.data())
@settings(max_examples=50, deadline=None)
def test_weights_of_a_mixture_stay_when_it_is_mixed_again(
    particles: pl.ParticlePosterior, numbers: list[float], data: st.DataObject
) -> None:
    mixture = pl.MixturePosterior([particles] * len(numbers), numbers)
    shares = data.draw(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=2))
    nested = pl.MixturePosterior([mixture, particles], shares)
    for one in (mixture, nested):
        again = pl.MixturePosterior(one.components, one.weights)
        assert torch.equal(again.weights, one.weights)
        assert float(again.weights.sum()) == pytest.approx(1, abs=1e-12)


def test_a_file_keeps_the_weights_to_the_last_bit(
    particles: pl.ParticlePosterior, tmp_path: Path
) -> None:
    (lora,) = particles.networks
    for index, numbers in enumerate(([1, 1, 1], [3, 7, 11], [0.1, 0.2, 0.7], [1, 9])):
        mixture = pl.MixturePosterior([particles] * len(numbers), numbers)
        nested = pl.MixturePosterior([mixture, particles], [0.3, 0.4])
        for name, one in (("one", mixture), ("nested", nested)):
            folder = tmp_path / f"{name}{index}"
            pl.save(one, folder)
            again: Any = pl.load(folder, lora)
            assert torch.equal(again.weights, one.weights)
            pl.save(again, folder)
            third: Any = pl.load(folder, lora)
            assert torch.equal(third.weights, one.weights)


def test_particles_among_the_components(
    laplaces: list[pl.LaplacePosterior], particles: pl.ParticlePosterior
) -> None:
    mixture = pl.MixturePosterior([laplaces[0], particles], [0.25, 0.75])
    draws = flat(mixture.sample(4000))
    distance = torch.cdist(draws, flat(particles.particles)).min(1).values
    share = (distance < 1e-5).double().mean().item()
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 4000) ** 0.5
    expected = 0.25 * vector(laplaces[0].mean()) + 0.75 * vector(particles.mean())
    assert_close(vector(mixture.mean()), expected)
    with pytest.raises(ValueError, match="no density"):
        mixture.log_prob(mixture.sample(2))


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(
    laplaces: list[pl.LaplacePosterior],
    lora: pl.LiftedNetwork,
    batch: dict[str, Tensor],
    parallel: bool,
) -> None:
    mixture = pl.MixturePosterior(laplaces)
    predictive = Predictive(
        mixture.model, guide=mixture, num_samples=6, parallel=parallel
    )
    assert predictive(**networks.inputs(batch))["y"].shape == (6, 5)
    trace = poutine.trace(mixture).get_trace(**batch)
    for site in lora.sites:
        assert trace.nodes[site]["infer"]["lora"] == (lora,)


@pytest.mark.parametrize("vectorized", [False, True])
def test_an_elbo(
    laplaces: list[pl.LaplacePosterior],
    batch: dict[str, Tensor],
    vectorized: bool,
) -> None:
    mixture = pl.MixturePosterior(laplaces, [0.3, 0.7])
    assert mixture.model is not None
    elbo = Trace_ELBO(
        num_particles=5, vectorize_particles=vectorized, max_plate_nesting=1
    )
    svi = SVI(mixture.model, mixture, Adam({"lr": 0.1}), elbo)
    pyro.set_rng_seed(3)
    loss = svi.evaluate_loss(**batch)
    pyro.set_rng_seed(3)
    if vectorized:
        draws = mixture.sample(5)
    else:
        each = [mixture.sample(1) for _ in range(5)]
        draws = {s: torch.cat([d[s] for d in each]) for s in each[0]}
    log_joints = [
        log_joint(mixture.model, {s: x[k] for s, x in draws.items()}, batch)
        for k in range(5)
    ]
    log_q = torch_mixture(laplaces, [0.3, 0.7]).log_prob(flat(draws))
    expected = -(torch.stack(log_joints) - log_q).mean().item()
    assert loss == pytest.approx(expected, rel=1e-8)


def log_joint(
    model: Callable[..., Tensor], weights: Weights, batch: dict[str, Tensor]
) -> Tensor:
    conditioned = poutine.condition(model, weights)
    return poutine.trace(conditioned).get_trace(**batch).log_prob_sum()


def test_importance(
    laplaces: list[pl.LaplacePosterior], batch: dict[str, Tensor]
) -> None:
    # Every weight is log p - log q; all that Importance needs is there.
    mixture = pl.MixturePosterior(laplaces)
    importance = Importance(mixture.model, mixture, num_samples=4).run(**batch)
    assert torch.isfinite(torch.stack(importance.log_weights)).all()


def test_no_single_mode(laplaces: list[pl.LaplacePosterior]) -> None:
    with pytest.raises(ValueError, match="components"):
        pl.MixturePosterior(laplaces).mode()


def test_no_components() -> None:
    with pytest.raises(ValueError, match="at least one component"):
        pl.MixturePosterior([])


@pytest.mark.parametrize(
    "weights",
    [
        [1.0],
        [1.0, 1.0, 1.0],
        [1.0, -0.1],
        [0.0, 0.0],
        [1.0, float("nan")],
        [1.0, float("inf")],
        [[0.5, 0.5]],
    ],
)
def test_bad_weights(laplaces: list[pl.LaplacePosterior], weights: list[float]) -> None:
    with pytest.raises(ValueError, match="2 non-negative numbers"):
        pl.MixturePosterior(laplaces, weights)


@pytest.mark.parametrize("num_samples", [0, -1])
def test_no_draws(laplaces: list[pl.LaplacePosterior], num_samples: int) -> None:
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        pl.MixturePosterior(laplaces).sample(num_samples)


def test_components_of_other_models(particles: pl.ParticlePosterior) -> None:
    def changed(sites: Weights) -> pl.ParticlePosterior:
        return pl.ParticlePosterior(
            sites, particles.networks, particles.model, particles.obs_site
        )

    site, value = next(iter(particles.particles.items()))
    fewer = {s: x for s, x in particles.particles.items() if s != site}
    more = {**particles.particles, "extra": value}
    other = {**particles.particles, site: value[:, :, :, :1]}
    for components, name in (
        ([particles, changed(fewer)], site),
        ([particles, changed(more)], "extra"),
        ([changed(fewer), particles], site),
        ([particles, particles, changed(other)], site),
    ):
        with pytest.raises(ValueError, match=f"'{name}'.*Mix posteriors of one model"):
            pl.MixturePosterior(components)


@pytest.mark.parametrize("name", ["evidence", "equal"])
def test_weights_by_a_name_are_checked(
    laplaces: list[pl.LaplacePosterior], particles: pl.ParticlePosterior, name: Any
) -> None:
    components = laplaces if name == "equal" else [laplaces[0], particles]
    with pytest.raises(ValueError, match=f"{name}.*or 'evidence' where.*LaplacePos"):
        pl.MixturePosterior(components, name)


def test_guides_among_the_components(
    laplaces: list[pl.LaplacePosterior], batch: dict[str, Tensor]
) -> None:
    guide = AutoNormal(laplaces[0].model)
    with pytest.raises(TypeError, match="Component 1 is AutoNormal; a mixture is of"):
        pl.MixturePosterior([laplaces[0], guide])
    guide(**batch)
    before = torch.get_rng_state()
    mixture = pl.MixturePosterior([laplaces[0], guide], [0.0, 1.0])
    assert torch.equal(torch.get_rng_state(), before)
    draws = mixture.sample(500)
    for site, median in guide.median().items():
        error = guide._get_loc_and_scale(site)[1] / 500**0.5
        assert ((draws[site].mean(0) - median).abs() < 5 * error).all()
    with pytest.raises(ValueError, match="moments of a AutoNormal aren't known"):
        mixture.mean()


@pytest.mark.parametrize("wrong", [3, None, {}])
def test_components_of_other_kinds(
    laplaces: list[pl.LaplacePosterior], wrong: Any
) -> None:
    with pytest.raises(TypeError, match="Component 1 of a mixture: posterior must be"):
        pl.MixturePosterior([laplaces[0], wrong])


def test_the_prior_is_the_components_own_in_every_copy(
    laplaces: list[pl.LaplacePosterior], tmp_path: Path
) -> None:
    # Each fit and each file makes its own value of one prior, the networks' is another.
    one = [part.with_prior_precision(3.0) for part in laplaces[:1] * 2]
    mixture = pl.MixturePosterior([one[0], laplaces[0].with_prior_precision(3.0)])
    lora = one[0].networks[0]
    pl.save(mixture, tmp_path)
    loaded = pl.load(tmp_path, lora)
    for found in (mixture, loaded):
        trace = poutine.trace(found.prior).get_trace(lora)
        for site, value in lora.weights().items():
            fn = trace.nodes[site]["fn"]
            expected = torch.full_like(value, 3.0**-0.5)
            assert_close(fn.variance.sqrt(), expected)
    other = pl.MixturePosterior([one[0], laplaces[0].with_prior_precision(5.0)])
    trace = poutine.trace(other.prior).get_trace(lora)
    assert all(
        torch.equal(trace.nodes[s]["fn"].variance, torch.full_like(x, 0.25))
        for s, x in lora.weights().items()
    )


def test_looking_at_particles_draws_nothing(
    particles: pl.ParticlePosterior, tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    mixture = pl.MixturePosterior([particles, particles])
    pl.save(mixture, tmp_path)
    pl.load(tmp_path, particles.networks[0])
    assert torch.equal(torch.get_rng_state(), before)
