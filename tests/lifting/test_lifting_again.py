"""A network that is lifted again, as a notebook's cell does that is run again."""

from typing import Any

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from pyro.optim import Adam
from torch.testing import assert_close

import pyro_lora as pl
from tests.networks import batch, bert, classifier, inputs, llama, particles
from tests.predict.models import laplace

STALE = r"stale: '.*query.*' has been lifted again"


@pytest.mark.parametrize("build", [bert, llama])
def test_the_network_comes_anew(build: Any) -> None:
    network, texts = build(3), batch(5, num_labels=3)
    names = ["lora", "head"]
    expected = network(**inputs(texts)).logits
    for _ in range(3):
        lora = pl.lift(network)
        assert {site.partition(".")[0] for site in lora.sites} == set(names)
        weights = particles(lora, 2)
        with lora.bind(weights) as net:
            both = net(**inputs(texts)).logits
        for k in range(2):
            with lora.bind({s: x[k] for s, x in weights.items()}) as net:
                assert_close(net(**inputs(texts)).logits, both[k], rtol=0, atol=1e-12)
        guide = AutoDelta(classifier(lora), init_loc_fn=lora.init_to_adapter())
        SVI(classifier(lora), guide, Adam({"lr": 0.1}), Trace_ELBO()).step(**texts)
        pyro.clear_param_store()
        assert torch.equal(network(**inputs(texts)).logits, expected)


def test_the_old_view_says_that_it_is_stale() -> None:
    network, texts = bert(), batch()
    old = pl.lift(network)
    weights = old.weights()
    again = pl.lift(network, name="again")
    with pytest.raises(RuntimeError, match=STALE):
        old()
    with pytest.raises(RuntimeError, match=STALE), old.bind(weights):
        pass
    with pytest.raises(RuntimeError, match=STALE):
        old.load(weights)
    with pytest.raises(RuntimeError, match=STALE):
        classifier(old)(**texts)
    classifier(again)(**texts)
    pl.lift(network)
    with pytest.raises(RuntimeError, match=STALE):
        again()


def test_two_views_in_one_model_are_refused() -> None:
    network, texts = bert(), batch()
    views = [pl.lift(network, name="one"), pl.lift(network, name="two")]

    def model() -> None:
        for lora in views:
            lora()(**inputs(texts))

    with pytest.raises(RuntimeError, match=STALE):
        model()


def test_a_view_of_some_of_the_parameters_takes_them_over() -> None:
    network = bert()
    old = pl.lift(network)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("classifier" in name and "modules_to_save" in name)
    head = pl.lift(network)
    assert set(head.sites) < set(old.sites)
    with pytest.raises(RuntimeError, match=r"stale: '.*classifier.*'"):
        old()
    head()


def test_other_networks_and_adapters_are_left_alone() -> None:
    lora, network = pl.lift(bert()), bert()
    other = pl.lift(network)
    pl.lift(network)
    lora()
    with pytest.raises(RuntimeError, match=STALE):
        other()


def test_not_while_weights_are_bound() -> None:
    network = bert()
    lora = pl.lift(network)
    with lora.bind(lora.weights()) as net:
        with pytest.raises(RuntimeError, match=r"bound.*before lifting again"):
            pl.lift(network)
        net(**inputs(batch()))
    lora()  # which is still the one


def test_a_lift_that_fails_leaves_the_old_view() -> None:
    network = bert()
    lora = pl.lift(network)
    parameter = network.get_parameter(next(iter(lora.sites.values()))[0])
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        pl.lift(network)
    with torch.no_grad():
        parameter.copy_(before)
    lora()


@pytest.mark.parametrize("method", ["linearized", "sample"])
def test_a_posterior_goes_on_with_a_model_of_the_new_view(method: Any) -> None:
    network, texts = bert(3), batch(10, num_labels=3)
    old = pl.lift(network, prior=pl.priors.normal(0.05))
    model = pl.models.classification(old, 10)
    posterior = laplace(old, model, [texts])

    def predicted(model: Any) -> pl.Prediction:
        pyro.set_rng_seed(1)
        return pl.predict(posterior, [texts], model=model, method=method, num_samples=4)

    expected = predicted(model)
    new = pl.lift(network)
    probs = predicted(pl.models.classification(new, 10))
    assert torch.equal(probs.log_probs, expected.log_probs)
    with pytest.raises(RuntimeError, match=STALE):
        predicted(model)
