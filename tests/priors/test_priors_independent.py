"""Normal, Laplace and Student-t priors: densities, draws, centres, checked names."""

from collections.abc import Callable
from typing import Any

import pyro
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import Predictive
from torch import Tensor
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora.likelihood.model_trace import trace_at
from pyro_lora.priors import Prior
from tests.networks import batch, bert, classifier, inputs, particles

FAMILIES: dict[str, tuple[Callable[..., Prior], Any]] = {
    "normal": (pl.priors.normal, scipy.stats.norm()),
    "laplace": (pl.priors.laplace, scipy.stats.laplace()),
    "student_t": (lambda *a, **k: pl.priors.student_t(7.0, *a, **k), scipy.stats.t(7)),
}
each_family = pytest.mark.parametrize("family", list(FAMILIES))


def scales(lora: pl.LiftedNetwork) -> dict[str, float]:
    return {site: 0.5 + i for i, site in enumerate(lora.sites)}


def log_probs(
    lora: pl.LiftedNetwork, weights: dict[str, Tensor], *lead: int
) -> dict[str, Tensor]:
    def model() -> None:
        with pyro.plate_stack("particles", lead):
            lora()

    trace = trace_at(model, weights, {})
    trace.compute_log_prob()
    return {site: trace.nodes[site]["log_prob"] for site in weights}


@pytest.mark.grid
@each_family
@pytest.mark.parametrize("lead", [(), (3, 1)])
@pytest.mark.parametrize("center", [0.0, 0.7, "init", "other"])
def test_the_density_is_scipys(
    family: str, lead: tuple[int, ...], center: float | str
) -> None:
    prior, reference = FAMILIES[family]
    lora = pl.lift(bert())
    other, start = particles(lora), lora.weights()
    means: Any = other if center == "other" else center
    lora = lora.with_prior(prior(2.5, center=means))
    weights = particles(lora, *lead)
    for site, found in log_probs(lora, weights, *lead).items():
        mean = {"init": start, "other": other}.get(str(center), {}).get(site, center)
        z = (weights[site] - mean) / 2.5
        each = torch.from_numpy(reference.logpdf(z.numpy())) - torch.tensor(2.5).log()
        expected = each.flatten(len(lead)).sum(-1)
        assert_close(found, expected, rtol=1e-6 if lead else 1e-7, atol=0)


@each_family
def test_draws_have_the_moments_of_their_site(family: str) -> None:
    prior, reference = FAMILIES[family]
    lora = pl.lift(bert())
    lora = lora.with_prior(prior(scales(lora), center="init"))
    draws = Predictive(classifier(lora), num_samples=200, parallel=True)(
        **inputs(batch())
    )
    _, variance, _, kurtosis = reference.stats("mvsk")
    for site, scale in scales(lora).items():
        start = lora.initial_weights[site]
        noise = (draws[site].reshape(200, *start.shape) - start) / scale
        n = noise.numel()
        # Standard errors: of the mean, sqrt(var / n); of the variance, by the fourth
        # moment, var sqrt((excess kurtosis + 2) / n).
        assert abs(noise.mean()) < 5 * (variance / n) ** 0.5
        assert abs(noise.var() - variance) < 5 * variance * ((kurtosis + 2) / n) ** 0.5


def test_the_default_is_a_standard_normal() -> None:
    lora = pl.lift(bert())
    nodes = poutine.trace(lora).get_trace().nodes
    for site, value in lora.weights().items():
        assert nodes[site]["fn"].event_shape == value.shape
        assert torch.equal(nodes[site]["fn"].mean, torch.zeros_like(value))
        assert torch.equal(nodes[site]["fn"].variance, torch.ones_like(value))
        assert nodes[site]["value"].dtype == value.dtype


def test_the_initial_adapter_is_the_one_that_was_lifted() -> None:
    lora = pl.lift(bert(), prior=pl.priors.normal(1e-9, center="init"))
    start = lora.weights()
    lora.load({site: value + 1 for site, value in start.items()})
    nodes = poutine.trace(lora).get_trace().nodes
    for site, value in start.items():
        assert_close(nodes[site]["value"], value, rtol=0, atol=1e-7)


def test_a_scale_can_differ_within_a_site() -> None:
    lora = pl.lift(bert())
    by_layer = torch.tensor([0.5, 2.0]).double()
    scale = {
        site: by_layer.reshape(2, *[1] * (x.ndim - 1)) if len(x) == 2 else 1.0
        for site, x in lora.weights().items()
    }
    lora = lora.with_prior(pl.priors.normal(scale))
    nodes = poutine.trace(lora).get_trace().nodes
    for site, x in lora.weights().items():
        expected = by_layer if len(x) == 2 else torch.ones(1).double()
        sd = nodes[site]["fn"].stddev.flatten(1)
        assert torch.equal(sd, expected[:, None].expand(sd.shape))


@each_family
@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_is_positive_and_finite(family: str, scale: float) -> None:
    prior, _ = FAMILIES[family]
    with pytest.raises(ValueError, match="'every site' must be positive and finite"):
        prior(scale)
    with pytest.raises(ValueError, match=r"'head\.bias' must be positive and finite"):
        prior({"head.weight": 1.0, "head.bias": scale})


@pytest.mark.parametrize("df", [0.0, -1.0, float("nan"), float("inf")])
def test_degrees_of_freedom_are_positive_and_finite(df: float) -> None:
    with pytest.raises(ValueError, match="df must be positive and finite"):
        pl.priors.student_t(df)


def test_a_center_is_a_number_weights_or_init() -> None:
    with pytest.raises(ValueError, match="'init' or a mapping of weights, found 'mean"):
        pl.priors.normal(center="mean")  # type: ignore[arg-type]


@pytest.mark.grid
@each_family
@pytest.mark.parametrize("what", ["scale", "center"])
def test_scales_and_centers_are_given_for_exactly_the_sites(
    family: str, what: str
) -> None:
    prior, _ = FAMILIES[family]
    lora = pl.lift(bert())
    wrong: dict[str, Any] = {
        "scale": scales(lora),
        "center": lora.weights(),
    }[what]
    del wrong["head.classifier.bias"]
    lora = lora.with_prior(prior(**{what: {**wrong, "head.other": torch.tensor(1.0)}}))
    with pytest.raises(
        ValueError, match=r"\['head.classifier.bias', 'head.other'\].*lora\.sites"
    ):
        lora()


@pytest.mark.parametrize("what", ["scale", "center"])
def test_scales_and_centers_have_the_shape_of_their_site(what: str) -> None:
    lora = pl.lift(bert())
    wrong = {**lora.weights(), "head.classifier.bias": torch.ones(3)}
    wrong = {site: value.abs() + 1 for site, value in wrong.items()}
    prior = pl.priors.normal(**{what: wrong})  # type: ignore[arg-type]
    lora = lora.with_prior(prior)
    with pytest.raises(
        ValueError,
        match=rf"'head.classifier.bias': expected a prior {what} that broadcasts over "
        r"\(1, 2\), found shape \(3,\)",
    ):
        lora()
