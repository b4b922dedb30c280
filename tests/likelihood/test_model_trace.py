"""Finding the likelihood and the lifted networks in a trace of a user's model."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora.likelihood.model_trace import (
    evaluating,
    lifted_networks,
    likelihood_site,
    observed_site,
    trace_at,
)
from tests.networks import batch, bert, classifier, inputs, llama, particles


def model(
    x: Tensor | None = None, y: Tensor | None = None, z: Tensor | None = None
) -> None:
    """Besides the latent w and the likelihoods y and z: what is no likelihood."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.factor("penalty", -w.square())
    pyro.deterministic("square", w.square())
    with pyro.plate("data", 10, subsample_size=3):
        if x is not None:
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)
        pyro.sample("y", dist.Normal(w, 1.0), obs=y)
        if z is not None:
            pyro.sample("z", dist.Normal(w, 1.0), obs=z)


DATA = torch.zeros(3)


def trace(**batch: Tensor) -> Any:
    return poutine.trace(model).get_trace(**batch)


# The observed site.


def test_the_only_observed_site_is_the_likelihood() -> None:
    assert observed_site(trace(y=DATA), None)["name"] == "y"
    assert likelihood_site(trace(y=DATA), None, ["w"])["name"] == "y"


@pytest.mark.parametrize(
    "find", [observed_site, lambda t, s: likelihood_site(t, s, [])]
)
def test_a_named_site_comes_before_the_rule(find: Callable[..., Any]) -> None:
    assert find(trace(y=DATA, z=DATA), "z")["name"] == "z"


def test_without_labels_the_likelihood_is_the_site_that_is_not_latent() -> None:
    assert likelihood_site(trace(), None, ["w"])["name"] == "y"
    assert likelihood_site(trace(), "y", ["w"])["name"] == "y"


@pytest.mark.parametrize(
    ("data", "obs_site", "message"),
    [
        ({}, None, "observed nothing.*labels"),
        ({"y": DATA, "z": DATA}, None, r"2 observed sites, \['y', 'z'\].*obs_site="),
        ({"z": DATA}, "y", r"'y' isn't observed; observed are \['z'\].*labels"),
        ({"y": DATA}, "square", r"'square' isn't observed; observed are \['y'\]"),
    ],
)
def test_no_single_observed_site(
    data: dict[str, Tensor], obs_site: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        observed_site(trace(**data), obs_site)


@pytest.mark.parametrize(
    ("data", "obs_site", "latent", "message"),
    [
        ({}, None, ["w", "y"], r"one likelihood site, found \[\].*obs_site="),
        ({}, None, [], r"found \['w', 'y'\].*obs_site="),
        ({"y": DATA, "z": DATA}, None, ["w"], r"found \['y', 'z'\].*obs_site="),
        ({"y": DATA}, "v", ["w"], r"no site 'v'; it has \['w', 'y'\].*obs_site="),
    ],
)
def test_no_single_likelihood_site(
    data: dict[str, Tensor], obs_site: str | None, latent: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        likelihood_site(trace(**data), obs_site, latent)


# Running the model at given weights.


def test_trace_at_gives_latent_sites_their_values() -> None:
    w = torch.tensor(1.5)
    nodes = trace_at(model, {"w": w, "y": DATA + 7}, {"y": DATA}).nodes
    assert nodes["w"]["value"] is w
    assert not nodes["w"]["is_observed"]
    assert torch.equal(nodes["y"]["value"], DATA)  # an observed site keeps its data
    assert torch.equal(nodes["square"]["value"], w.square())


def test_trace_at_samples_what_has_no_value() -> None:
    pyro.set_rng_seed(0)
    one = trace_at(model, {}, {"y": DATA}).nodes["w"]["value"]
    two = trace_at(model, {}, {"y": DATA}).nodes["w"]["value"]
    assert one != two


def test_trace_at_runs_the_network_at_the_weights() -> None:
    lora, texts = pl.lift(bert()), batch()
    weights = particles(lora)
    site = trace_at(classifier(lora), weights, texts).nodes["y"]
    with lora.bind(weights) as net:
        expected = net(**inputs(texts)).logits.log_softmax(-1)
    assert_close(site["fn"].logits, expected, rtol=0, atol=1e-12)


def test_lifted_networks_each_once_in_the_models_order() -> None:
    one, two = pl.lift(bert()), pl.lift(llama(), name="second")

    def both() -> None:
        two()
        one()

    assert lifted_networks(poutine.trace(both).get_trace()) == (two, one)
    assert lifted_networks(trace()) == ()


# Dropout off.


def test_evaluating_restores_every_modules_mode() -> None:
    network = bert(dropout=0.5)
    network.train()
    head = network.base_model.model.classifier
    head.eval()
    texts = inputs(batch())
    lora = pl.lift(network)
    with evaluating([lora]):
        assert torch.equal(network(**texts).logits, network(**texts).logits)
    assert not torch.equal(network(**texts).logits, network(**texts).logits)
    assert network.training
    assert not head.training


def test_evaluating_restores_after_an_exception() -> None:
    layers = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
    layers.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), evaluating([pl.lift(layers)]):
        layers(torch.zeros(1, 2))
    assert layers[1].training
