"""Medians and quantiles of weights, against closed forms and against draws."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import autoguide
from torch import Tensor
from torch.distributions import biject_to
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora.posteriors import marginals
from pyro_lora.posteriors.gaussian_posterior import GaussianPosterior
from pyro_lora.posteriors.guide_posterior import GuidePosterior
from tests.networks import batch, bert

pytestmark = pytest.mark.untrained
NUM_DATA = 5
LEVELS = [0.05, 0.4, 0.5, 0.9]


def setting() -> tuple[pl.LiftedNetwork, Any]:
    """A model with latent sites, with other supports, beside the weights."""
    lora = pl.lift(bert(num_layers=1))
    zero = torch.zeros((), dtype=torch.float64)

    def model(input_ids: Tensor, attention_mask: Tensor, labels: Any = None) -> None:
        logits = lora()(input_ids=input_ids, attention_mask=attention_mask).logits
        positive = pyro.sample("positive", dist.LogNormal(zero, 0.5))
        bounded = pyro.sample("bounded", dist.Uniform(0.5 + zero, 3 + zero))
        with pyro.plate("data", NUM_DATA, subsample=input_ids):
            fn = dist.Categorical(logits=logits * positive * bounded)
            pyro.sample("y", fn, obs=labels)

    return lora, model


def laplace(**settings: Any) -> pl.LaplacePosterior:
    lora, model = setting()
    at = {
        **lora.weights(),
        "positive": torch.tensor(0.9).double(),
        "bounded": torch.tensor(1.5).double(),
    }
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to(at), **settings)
    return guide.laplace_approximation([batch()])


def particles(like: Any, num: int = 4) -> pl.ParticlePosterior:
    draws = like.sample(num)
    return pl.ParticlePosterior(draws, like.networks, like.model, "y")


def mixture() -> pl.MixturePosterior:
    first = laplace()
    other = first.with_prior_precision(30.0)
    return pl.MixturePosterior([first, other, particles(first)], [0.5, 0.3, 0.2])


def mixture_of_others() -> pl.MixturePosterior:
    """Of Gaussians that aren't about a linearised network."""
    first = laplace()
    narrow = dataclasses.replace(first.scaled(), scale=0.3)
    scale = {s: torch.full_like(first.mode()[s], 0.1) for s in first.networks[0].sites}
    normal = GaussianPosterior(first.mode(), scale, first.networks, first.model, "y")
    return pl.MixturePosterior([narrow, normal], [0.7, 0.3])


KINDS: dict[str, Callable[[], Any]] = {
    "kfac": laplace,
    "dense, last layer": lambda: laplace(
        structure=pl.structures.Dense(), sites="last_layer"
    ),
    "exact": lambda: laplace(structure=pl.structures.Exact()),
    "mixture": mixture,
    "mixture of others": mixture_of_others,
    "scaled": lambda: dataclasses.replace(laplace().for_sampling([batch()]), scale=0.3),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
@pytest.mark.few(3)
def test_quantiles_are_those_of_draws(make: Callable[[], Any]) -> None:
    posterior, num = make(), 20_000
    draws, found = posterior.sample(num), posterior.quantiles(LEVELS)
    assert found.keys() == draws.keys()
    for site, x in draws.items():
        assert found[site].shape == (len(LEVELS), *x.shape[1:])
        assert found[site].dtype == x.dtype
        for q, value in zip(LEVELS, found[site], strict=True):
            # The share of the draws below is binomial; points have theirs at once, and
            # bisection stops within rounding of them.
            share = (x <= value + 1e-12).double().mean(0)
            below = (x < value - 1e-12).double().mean(0)
            error = 5.5 * (q * (1 - q) / num) ** 0.5
            assert (share >= q - error).all(), site
            assert (below <= q + error).all(), site


def test_moments_of_a_mixture_are_those_of_its_parts() -> None:
    mixture = mixture_of_others()
    components: Any = mixture.components
    mean, variance = mixture.mean(), mixture.variance()
    for site, x in mean.items():
        parts = [(p.mean()[site], p.variance()[site]) for p in components]
        expected = 0.7 * parts[0][0] + 0.3 * parts[1][0]
        assert_close(x, expected)
        squares = [v + m.square() for m, v in parts]
        second_moment = 0.7 * squares[0] + 0.3 * squares[1]
        assert_close(variance[site], second_moment - expected.square())


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
@pytest.mark.few(3)
def test_medians_are_quantiles_of_a_half(make: Callable[[], Any]) -> None:
    posterior = make()
    half = posterior.quantiles(0.5)
    assert_close(posterior.median(), half, rtol=1e-12, atol=1e-12)
    for several in ([0.5], torch.tensor([0.5]), np.array([0.5]), (0.5,)):
        leading = {site: x[None] for site, x in half.items()}
        assert_close(posterior.quantiles(several), leading, rtol=0, atol=0)
    for one in (torch.tensor(0.5), np.array(0.5)):
        assert_close(posterior.quantiles(one), half, rtol=0, atol=0)


def test_of_a_gaussian_they_are_the_normal_s() -> None:
    posterior = laplace()
    found = posterior.quantiles([0.1, 0.8])
    for site in posterior.networks[0].sites:
        sd = posterior.variance()[site].sqrt()
        fn = dist.Normal(posterior.mode()[site], sd)
        for q, value in zip((0.1, 0.8), found[site], strict=True):
            expected = fn.icdf(torch.tensor(q, dtype=torch.float64))
            assert_close(value, expected, rtol=1e-10, atol=1e-10)
    assert_close(posterior.median(), posterior.mode(), rtol=0, atol=0)
    for site in ("positive", "bounded"):
        assert found[site][0] < posterior.mode()[site] < found[site][1]


@pytest.mark.parametrize(
    "support",
    [
        constraints.real,
        constraints.positive,
        constraints.less_than(3.0),  # reached by a falling function
        constraints.interval(-1.0, 2.0),
    ],
)
def test_on_a_support_they_are_those_of_what_is_there(support: Any) -> None:
    loc, sd = torch.tensor([-0.5, 0.3]).double(), torch.tensor([0.4, 1.1]).double()
    transform = biject_to(support)
    one = marginals.normals(loc, sd.square(), transform)
    points = transform(loc + sd * torch.randn(200_001, 2).double())
    found = marginals.quantiles_of({"w": one}, LEVELS)["w"]
    expected = points.quantile(torch.tensor(LEVELS).double(), 0)
    assert_close(found, expected, rtol=0.02, atol=0.02)
    # A mixture of the normals with points that were drawn from them is as they are.
    other = marginals.points(points[:2000])
    both = marginals.mixed(torch.tensor([0.5, 0.5]).double(), [one, other])
    assert_close(
        marginals.quantiles_of({"w": both}, LEVELS)["w"], expected, rtol=0.1, atol=0.1
    )


def test_of_particles_they_are_numpy_s() -> None:
    posterior = particles(laplace(), 6)
    found = posterior.quantiles(LEVELS)
    for site, x in posterior.particles.items():
        expected = torch.from_numpy(np.quantile(x.numpy(), LEVELS, axis=0))
        assert_close(found[site], expected, rtol=1e-12, atol=1e-12)


def test_of_a_mixture_the_distribution_function_takes_the_level() -> None:
    posterior = mixture()
    gaussians = pl.MixturePosterior(posterior.components[:2], [0.6, 0.4])
    for q, site in ((0.03, "head.classifier.weight"), (0.7, "head.classifier.bias")):
        value = gaussians.quantiles(q)[site].double()
        cdf = sum(
            pi * dist.Normal(c.mode()[site], c.variance()[site].sqrt()).cdf(value)
            for pi, c in zip((0.6, 0.4), gaussians.components, strict=True)
        )
        assert_close(cdf, torch.full_like(value, q), rtol=1e-10, atol=1e-10)
    (lora,) = posterior.networks
    one, two = lora.zeros(), {s: 1 + x for s, x in lora.zeros().items()}
    ensembles = [pl.ensemble(lora, [x]) for x in (one, two)]
    found = pl.MixturePosterior(ensembles, [0.3, 0.7]).quantiles([0.29, 0.3, 0.31])
    for x in found.values():
        assert_close(x.flatten(1)[:, 0], torch.tensor([0.0, 0, 1]).double())


def test_the_example_of_the_first_lines() -> None:
    means = torch.tensor([[0.0], [10.0]]).double()
    two = [marginals.normals(mean, torch.ones(1)) for mean in means]
    mixed = {"w": marginals.mixed(torch.tensor([0.5, 0.5]).double(), two)}
    found = marginals.quantiles_of(mixed, [0.25, 0.5])["w"]
    assert_close(found, torch.tensor([[0.0], [5.0]]).double(), rtol=0, atol=1e-7)


def test_autoguides_have_their_own() -> None:
    lora, model = setting()
    guide = autoguide.AutoNormal(model, init_loc_fn=lora.init_to_adapter())
    guide(**batch())
    posterior = GuidePosterior(guide)
    found = posterior.quantiles([0.2, 0.5])
    assert_close(found, guide.quantiles([0.2, 0.5]))
    half = {site: x[1] for site, x in found.items()}
    assert_close(posterior.quantiles(0.5), half)
    assert_close(posterior.median(), half)
    with pytest.raises(ValueError, match="AutoDelta has no quantiles"):
        GuidePosterior(autoguide.AutoDelta(model)).quantiles(0.5)
    mixed = pl.MixturePosterior([guide, guide])
    with pytest.raises(ValueError, match="quantiles of a AutoNormal aren't known"):
        mixed.quantiles(0.5)


@pytest.mark.parametrize(
    ("levels", "error", "message"),
    [
        (0.0, ValueError, "between 0 and 1, found 0"),
        ([0.5, 1.0], ValueError, "between 0 and 1, found 1"),
        (1.5, ValueError, "between 0 and 1, found 1.5"),
        ([], ValueError, "quantiles is empty"),
        ("0.5", TypeError, "quantiles must be numbers"),
        (["a"], TypeError, "must be a number"),
        (True, TypeError, "must be a number"),
    ],
)
def test_what_is_no_level(levels: Any, error: Any, message: str) -> None:
    lora = pl.lift(bert(num_layers=1))
    posterior = pl.ensemble(lora, [lora.weights()])
    with pytest.raises(error, match=message):
        posterior.quantiles(levels)
