"""Draws that keep their promise in the network itself."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora.posteriors.scaled_posterior import ScaledPosterior
from tests.curvature.gauss_newton import assert_same, flatten, laplace, split
from tests.infer.linear_regression import linear_regression
from tests.networks import batch, bert, inputs

pytestmark = [
    pytest.mark.untrained,
    pytest.mark.filterwarnings("ignore:The weights aren't a mode"),
]


@pytest.fixture
def lora() -> pl.LiftedNetwork:
    return pl.lift(bert(3), prior=pl.priors.normal(scale=3.0))


@pytest.fixture
def texts() -> dict[str, Tensor]:
    return batch(8, num_labels=3)


def loss(lora: pl.LiftedNetwork, texts: dict[str, Tensor], draws: object) -> float:
    """Nats a datum, averaged over draws, by the network alone."""
    assert isinstance(draws, dict)
    losses = []
    for s in range(len(next(iter(draws.values())))):
        with torch.no_grad(), lora.bind({k: x[s] for k, x in draws.items()}) as net:
            log_probs = net(**inputs(texts)).logits.log_softmax(-1)
        losses.append(-log_probs.gather(1, texts["labels"][:, None]).mean())
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("structure", [pl.structures.KFAC(), pl.structures.Exact()])
@pytest.mark.parametrize("tolerance", [0.02, 0.2])
def test_the_scale_is_the_largest_within_the_tolerance(
    lora: pl.LiftedNetwork,
    texts: dict[str, Tensor],
    structure: pl.structures.Structure,
    tolerance: float,
) -> None:
    posterior = laplace(lora, texts, 3, structure=structure)
    before = {s: x.clone() for s, x in lora.weights().items()}
    pyro.set_rng_seed(1)
    found = posterior.for_sampling(split(texts, 3), tolerance=tolerance, num_samples=4)
    pyro.set_rng_seed(1)
    draws = posterior.sample(4)
    mode = posterior.mode()
    least = loss(lora, texts, {s: x[None] for s, x in mode.items()})

    def at(scale: float) -> float:
        scaled = {s: mode[s] + scale * (x - mode[s]) for s, x in draws.items()}
        return loss(lora, texts, scaled)

    assert 0 < found.scale < 1
    assert at(found.scale) <= least + tolerance
    assert at(found.scale + 2**-8) > least + tolerance
    for site, x in lora.weights().items():
        assert torch.equal(x, before[site])
    assert_same(flatten(found.mode()), flatten(mode))


def test_density_and_moments_are_those_of_the_narrower_gaussian() -> None:
    task = linear_regression()
    posterior = task.laplace(structure=pl.structures.Exact())
    found = posterior.for_sampling(task.batches, tolerance=0.01)
    mode, size = flatten(posterior.mode()), 4
    covariance = found.scale**2 * torch.linalg.inv(task.precision)
    expected = dist.MultivariateNormal(mode, covariance)
    draws = found.sample(2000)
    flat = torch.cat([draws[s].flatten(1) for s in task.lora.sites], 1)
    assert_same(found.log_prob(draws), expected.log_prob(flat))
    error = (flat.mean(0) - mode) / covariance.diagonal().sqrt()
    assert float(error.abs().max()) < 5 / math.sqrt(2000)
    assert_same(flatten(found.mean()), mode)
    assert_same(flatten(found.variance()), covariance.diagonal())
    ratio = flat.var(0) / covariance.diagonal()
    assert float((ratio - 1).abs().max()) < 5 * math.sqrt(2 / 2000)
    trace = poutine.trace(found).get_trace(**task.whole)
    weights = {s: trace.nodes[s]["value"][None] for s in task.lora.sites}
    assert_same(trace.log_prob_sum(), found.log_prob(weights)[0])
    assert size == flat.shape[1]


def test_a_refined_posterior_is_centered_where_the_network_itself_is_best(
    lora: pl.LiftedNetwork, texts: dict[str, Tensor]
) -> None:
    refined = laplace(lora, texts, 3, structure=pl.structures.Exact()).refine("prior")
    found = refined.for_sampling(split(texts, 3), tolerance=0.05, num_samples=2)
    origin, mode = lora.weights(), refined.mode()
    losses = {
        step: loss(
            lora,
            texts,
            {s: (x + step * (mode[s] - x))[None] for s, x in origin.items()},
        )
        for step in (0.0, 0.1, 0.25, 0.5, 1.0)
    }
    best = min(losses, key=lambda step: losses[step])
    center = {s: x + best * (mode[s] - x) for s, x in origin.items()}
    assert_close(flatten(found.mode()), flatten(center))


def test_is_predicted_by_draws_and_exported(
    lora: pl.LiftedNetwork, texts: dict[str, Tensor], tmp_path: object
) -> None:
    posterior = laplace(lora, texts, 3)
    found = posterior.for_sampling(split(texts, 3), num_samples=2)
    assert isinstance(found, pl.Posterior)
    assert isinstance(found, ScaledPosterior)
    pyro.set_rng_seed(0)
    prediction = pl.predict(found, [inputs(texts)], num_samples=3)
    pyro.set_rng_seed(0)
    draws = found.sample(3)
    probs = []
    for s in range(3):
        with torch.no_grad(), lora.bind({k: x[s] for k, x in draws.items()}) as net:
            probs.append(net(**inputs(texts)).logits.softmax(-1))
    assert_close(prediction.probs, torch.stack(probs).mean(0).double())


def test_fixed_sites_and_other_latents_are_as_they_were(
    texts: dict[str, Tensor],
) -> None:
    lora = pl.lift(bert(3), prior=pl.priors.normal(scale=3.0))
    posterior = laplace(lora, texts, 3, sites="last_layer")
    found = posterior.for_sampling(split(texts, 3), tolerance=0.1, num_samples=2)
    draws = found.sample(3)
    for site, value in posterior.fixed.items():
        assert_same(draws[site], value.expand(3, *value.shape))


def test_bad_arguments(lora: pl.LiftedNetwork, texts: dict[str, Tensor]) -> None:
    posterior = laplace(lora, texts, 3)
    with pytest.raises(ValueError, match="tolerance"):
        posterior.for_sampling([texts], tolerance=0.0)
    with pytest.raises(ValueError, match="There are no batches"):
        posterior.for_sampling([])
    with pytest.raises(ValueError, match="labels"):
        posterior.for_sampling([inputs(texts)])


def test_a_loss_that_is_no_number_is_an_error(
    lora: pl.LiftedNetwork, texts: dict[str, Tensor]
) -> None:
    task = linear_regression()
    posterior = task.laplace()
    wrong = {"x": task.x.clone(), "y": task.y}
    wrong["x"][0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        posterior.for_sampling([wrong])
