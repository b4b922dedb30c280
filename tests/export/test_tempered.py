"""``poutine.scale`` around ``lora()`` or the model: one log joint everywhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.optim import Adam
from torch import Tensor

import pyro_lora as pl
from pyro_lora.diagnose.log_joint import LogJoint
from pyro_lora.posteriors.posterior import as_posterior
from tests.curvature.gauss_newton import flatten
from tests.infer.linear_regression import NOISE_SD, NUM_DATA, linear_regression
from tests.infer.test_auto_laplace_refits import normal_prior, student_prior
from tests.networks import bert
from tests.predict import models

Model = Callable[..., Any]
ignore_mode = pytest.mark.filterwarnings("ignore:The weights aren't a mode")


def around_lora(lora: pl.LiftedNetwork, scale: float) -> Model:
    def model(labels: Tensor | None = None, **inputs: Tensor) -> None:
        with poutine.scale(scale=scale):
            net = lora()
        logits = net(**inputs).logits
        with pyro.plate("data", models.NUM_DATA, subsample=inputs["input_ids"]):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    return model


def around_model(lora: pl.LiftedNetwork, scale: float) -> Model:
    return poutine.scale(pl.models.classification(lora, models.NUM_DATA), scale)


def around_both(lora: pl.LiftedNetwork, scale: float) -> Model:
    return poutine.scale(around_lora(lora, scale), 0.5)


def masked(lora: pl.LiftedNetwork, scale: float) -> Model:
    """No prior at all, as by ``poutine.mask(mask=False)``; the scale is of the data."""

    def model(labels: Tensor | None = None, **inputs: Tensor) -> None:
        with poutine.mask(mask=False):
            net = lora()
        logits = net(**inputs).logits
        with pyro.plate("data", models.NUM_DATA, subsample=inputs["input_ids"]):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    return poutine.scale(model, scale)


def particles(lora: pl.LiftedNetwork, model: Model) -> pl.ParticlePosterior:
    return models.particles(lora, model)


def laplace(lora: pl.LiftedNetwork, model: Model) -> pl.LaplacePosterior:
    return models.laplace(lora, model, models.two_batches())


def mixture(lora: pl.LiftedNetwork, model: Model) -> pl.MixturePosterior:
    return pl.MixturePosterior([laplace(lora, model), particles(lora, model)])


def stock(lora: pl.LiftedNetwork, model: Model) -> Any:
    return models.guide_over(lora.weights())


PLACES = [around_lora, around_model, around_both]
CASES = [(kind, place) for kind in (particles, laplace, stock) for place in PLACES]
CASES += [(mixture, around_lora), (particles, masked), (stock, masked)]


@pytest.mark.grid
@pytest.mark.parametrize(("kind", "place"), CASES)
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_lp_is_the_models_log_joint(
    kind: Callable[..., Any], place: Callable[..., Model], scale: float
) -> None:
    lora, _ = models.classifier()
    model = place(lora, scale)
    posterior, batches = kind(lora, model), models.two_batches()
    options: Any = {"model": model, "method": "sample", "obs_site": "y"}
    tree = pl.to_datatree(posterior, batches, num_samples=3, weights="raw", **options)
    weights = {
        site: torch.as_tensor(tree["posterior"][site].values[0]).reshape(3, *x.shape)
        for site, x in lora.weights().items()
    }
    (whole,) = models.resized(batches, models.NUM_DATA)
    posterior = as_posterior(posterior, model, batches[0])
    joint = LogJoint(posterior, model, batches, "y")
    log_joint = torch.stack(joint.at(weights)).sum(0)
    for s in range(3):
        at = models.draw(weights, s)
        trace = poutine.trace(poutine.condition(model, at)).get_trace(**whole)
        expected = float(trace.log_prob_sum().detach())
        assert float(tree["sample_stats"]["lp"][0, s]) == pytest.approx(
            expected, rel=1e-9
        )
        assert float(log_joint[s]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("place", PLACES)
def test_diagnose_has_the_gradient_of_the_models_log_joint(
    place: Callable[..., Model],
) -> None:
    lora, _ = models.classifier()
    model = place(lora, 0.1)
    posterior, batches = laplace(lora, model), models.two_batches()
    (whole,) = models.resized(batches, models.NUM_DATA)
    leaves = {s: x.clone().requires_grad_() for s, x in posterior.mode().items()}
    trace: Any = poutine.trace(poutine.condition(model, leaves)).get_trace(**whole)
    expected = torch.autograd.grad(trace.log_prob_sum(), list(leaves.values()))
    found = LogJoint(posterior, model, batches, "y").gradient(posterior.mode())
    for (site, g), e in zip(found.items(), expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-9, msg=site)


def tuned(posterior: pl.LaplacePosterior) -> Any:
    return posterior.with_prior_precision(4.0)


def narrow(posterior: pl.LaplacePosterior) -> Any:
    return tuned(posterior).for_sampling(models.two_batches(), num_samples=2)


def narrow_as_fitted(posterior: pl.LaplacePosterior) -> Any:
    return posterior.for_sampling(models.two_batches(), num_samples=2)


def mixed(posterior: pl.LaplacePosterior) -> Any:
    return pl.MixturePosterior([tuned(posterior), tuned(posterior)])


def mixed_with_narrow(posterior: pl.LaplacePosterior) -> Any:
    return pl.MixturePosterior([tuned(posterior), narrow(posterior)])


def mixed_as_fitted(posterior: pl.LaplacePosterior) -> Any:
    return pl.MixturePosterior([posterior, narrow_as_fitted(posterior)])


# Each posterior, and the scale and the standard deviation of its normal prior where the
# model says 0.25 N(0, 1).
OF_A_GAUSSIAN = {
    tuned: (1.0, 0.5),
    narrow: (1.0, 0.5),
    mixed: (1.0, 0.5),
    mixed_with_narrow: (1.0, 0.5),
    narrow_as_fitted: (0.25, 1.0),
    mixed_as_fitted: (0.25, 1.0),
}


@pytest.mark.grid
@ignore_mode
@pytest.mark.parametrize(("make", "found"), OF_A_GAUSSIAN.items())
@pytest.mark.parametrize("several", [False, True])
def test_a_prior_that_counts_as_it_should_is_not_tempered_again(
    make: Callable[..., Any], found: tuple[float, float], several: bool
) -> None:
    lora, _ = models.classifier()
    lora = lora.with_prior(pl.priors.normal(scale=1.0))
    loras = [lora, pl.lift(bert(2), name="second")] if several else [lora]

    def model(labels: Tensor | None = None, **inputs: Tensor) -> None:
        with poutine.scale(scale=0.25):
            nets = [each() for each in loras]
        logits = sum(net(**inputs).logits for net in nets)
        with pyro.plate("data", models.NUM_DATA, subsample=inputs["input_ids"]):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    batches = models.two_batches()
    at = {site: x for each in loras for site, x in each.weights().items()}
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to(at))
    posterior = make(guide.laplace_approximation(batches))
    options: Any = {"num_samples": 3, "weights": "raw", "method": "sample"}
    tree = pl.to_datatree(posterior, batches, **options)
    draws = {
        site: torch.as_tensor(tree["posterior"][site].values[0]).reshape(3, *x.shape)
        for site, x in at.items()
    }
    scale, sd = found
    zero = torch.zeros((), dtype=torch.float64)
    expected = {
        site: scale * dist.Normal(zero, sd).log_prob(x).flatten(1).sum(1)
        for site, x in draws.items()
    }
    total = torch.stack(list(expected.values())).sum(0)
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
    for site, of_site in expected.items():
        close(torch.as_tensor(tree["log_prior"][site].values[0]), of_site)
    log_likelihood = torch.as_tensor(tree["log_likelihood"]["y"].values[0]).sum(-1)
    lp = torch.as_tensor(tree["sample_stats"]["lp"].values[0])
    close(lp, log_likelihood + total)
    joint = LogJoint(posterior, model, batches, "y")
    close(torch.stack(joint.at(draws)), torch.stack([log_likelihood, total]))
    close(joint.log_prior(draws), total)
    mode = {site: x[0] for site, x in draws.items()}
    no_data = {site: torch.zeros_like(x) for site, x in mode.items()}
    for site, gradient in joint.with_prior(mode, no_data).items():
        close(gradient, -scale * mode[site] / sd**2)


@pytest.mark.parametrize("place", PLACES)
def test_a_file_keeps_the_scale(place: Callable[..., Model], tmp_path: Path) -> None:
    lora, _ = models.classifier()
    model = place(lora, 0.1)
    posterior, batches = laplace(lora, model), models.two_batches()
    pl.save(posterior, tmp_path)
    again = pl.load(tmp_path, lora, model=model)
    weights = models.jittered(lora, 2)
    found, expected = (
        torch.stack(LogJoint(p, model, batches, "y").at(weights))
        for p in (again, posterior)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@ignore_mode
@pytest.mark.parametrize(("in_model", "on_prior"), [(1.0, 0.1), (0.4, 1.0)])
def test_refits_end_at_the_mode_under_the_prior_found(
    in_model: float, on_prior: float
) -> None:
    task = linear_regression()

    def model(x: Tensor, y: Tensor | None = None) -> None:
        with poutine.scale(scale=on_prior):
            net = task.lora()
        loc = net(x)[..., 0]
        with pyro.plate("data", NUM_DATA, subsample=x):
            pyro.sample("y", dist.Normal(loc, NOISE_SD), obs=y)

    whole = [task.whole]
    guide = pl.AutoLaplace(
        poutine.scale(model, in_model),
        init_loc_fn=task.lora.init_to_adapter(),
        structure=pl.structures.Dense(),
    )
    first = guide.laplace_approximation(whole)
    posterior = first.optimize_prior()
    (tau,) = {float(x.flatten()[0]) for x in posterior.prior_precision.values()}
    found = guide.refit(posterior, whole, Adam({"lr": 0.05}), num_epochs=300)
    gram = in_model * task.design.mT @ task.design / NOISE_SD**2
    right = in_model * task.design.mT @ task.y / NOISE_SD**2
    expected = torch.linalg.solve(gram + tau * torch.eye(4).double(), right)
    torch.testing.assert_close(flatten(found.mode()), expected, rtol=0, atol=1e-4)


@ignore_mode
@pytest.mark.parametrize("prior", [normal_prior, student_prior])
@pytest.mark.parametrize("place", PLACES)
def test_parameters_of_a_tempered_prior_have_no_evidence(
    place: Callable[..., Model], prior: Any
) -> None:
    # Of N(0, s^2) to the power 4 it grows with 1 / s without end.
    lora, _ = models.classifier()
    lora = lora.with_prior(prior)
    tempered = laplace(lora, place(lora, 4.0))
    inside = lora.with_prior(poutine.scale(prior, scale=4.0))
    plain = pl.models.classification(inside, models.NUM_DATA)
    for posterior in (tempered, laplace(inside, plain)):
        with pytest.raises(ValueError, match=r"counts [42] times.*per='all'"):
            posterior.optimize_prior(per="prior")
        assert posterior.optimize_prior(per="all").log_evidence().isfinite()


@ignore_mode
def test_parameters_of_a_prior_are_trained_beside_a_tempered_likelihood() -> None:
    lora, _ = models.classifier()
    lora = lora.with_prior(normal_prior)

    def model(labels: Tensor | None = None, **inputs: Tensor) -> None:
        logits = lora()(**inputs).logits
        with (
            pyro.plate("data", models.NUM_DATA, subsample=inputs["input_ids"]),
            poutine.scale(scale=0.25),
        ):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    posterior = laplace(lora, model)
    torch.testing.assert_close(
        posterior.optimize_prior(per="prior").log_evidence(),
        posterior.optimize_prior(per="all").log_evidence(),
        rtol=1e-8,
        atol=0,
    )
