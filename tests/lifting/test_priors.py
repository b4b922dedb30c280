"""Priors: right densities and draws, checked names."""

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from torch import Tensor
from torch.distributions import Normal
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora.lifting.model_trace import trace_at
from tests.networks import batch, bert, classifier, inputs, particles


def scales(lora: pl.LiftedNetwork) -> dict[str, float]:
    return {site: 0.5 + i for i, site in enumerate(lora.sites)}


@pytest.mark.parametrize("lead", [(), (3, 1)])
def test_the_density_is_that_of_independent_normals(lead: tuple[int, ...]) -> None:
    lora = pl.lift(bert(), prior=pl.priors.normal(2.5))
    weights = particles(lora, *lead)

    def model() -> None:
        with pyro.plate_stack("particles", lead):
            lora()

    trace = trace_at(model, weights, {})
    trace.compute_log_prob()
    normal = Normal(torch.zeros((), dtype=torch.float64), 2.5)
    for site, value in weights.items():
        expected = normal.log_prob(value).flatten(len(lead)).sum(-1)
        found = trace.nodes[site]["log_prob"]
        assert_close(found, expected, rtol=1e-12, atol=0)


def test_the_default_is_a_standard_normal() -> None:
    lora = pl.lift(bert())
    nodes = poutine.trace(lora).get_trace().nodes
    for site, value in lora.weights().items():
        assert nodes[site]["fn"].event_shape == value.shape
        assert torch.equal(nodes[site]["fn"].mean, torch.zeros_like(value))
        assert torch.equal(nodes[site]["fn"].variance, torch.ones_like(value))
        assert nodes[site]["value"].dtype == value.dtype


def test_draws_have_the_scale_of_their_site() -> None:
    lora = pl.lift(bert())
    lora.prior = pl.priors.normal(scales(lora))
    draws = Predictive(classifier(lora), num_samples=200, parallel=True)(
        **inputs(batch())
    )
    for site, scale in scales(lora).items():
        n = draws[site].numel()
        # Standard errors: scale / sqrt(n) of the mean, scale / sqrt(2 n) of the scale.
        assert abs(draws[site].mean()) < 5 * scale / n**0.5
        assert abs(draws[site].std() - scale) < 5 * scale / (2 * n) ** 0.5
    assert draws["y"].shape == (200, 5)


def test_a_prior_is_any_function_that_samples_the_sites() -> None:
    def prior(lora: pl.LiftedNetwork) -> dict[str, Tensor]:
        scale = pyro.sample("scale", pyro.distributions.HalfNormal(1.0))
        return {
            site: scale
            * pyro.sample(
                site, pyro.distributions.Normal(zeros, zeros + 1).to_event(zeros.ndim)
            )
            for site, zeros in lora.zeros().items()
        }

    network, texts = bert(), inputs(batch())
    lora = pl.lift(network, prior=prior)
    weights = {**lora.weights(), "scale": torch.tensor(2.0, dtype=torch.float64)}
    nodes = trace_at(classifier(lora), weights, texts).nodes
    assert "lora" not in nodes["scale"]["infer"]  # it is no lifted site
    found = nodes["y"]["fn"].logits
    with lora.bind({site: 2 * value for site, value in lora.weights().items()}) as net:
        expected = net(**texts).logits.log_softmax(-1)
    assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_is_positive_and_finite(scale: float) -> None:
    with pytest.raises(ValueError, match="'every site' must be positive and finite"):
        pl.priors.normal(scale)
    with pytest.raises(ValueError, match=r"'head\.bias' must be positive and finite"):
        pl.priors.normal({"head.weight": 1.0, "head.bias": scale})


def test_scales_are_given_for_exactly_the_sites() -> None:
    lora = pl.lift(bert())
    missing = scales(lora)
    del missing["head.classifier.bias"]
    lora.prior = pl.priors.normal({**missing, "head.other": 1.0})
    with pytest.raises(
        ValueError, match=r"\['head.classifier.bias', 'head.other'\].*lora\.sites"
    ):
        lora()
