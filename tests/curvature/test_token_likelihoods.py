"""Token-level likelihoods: a datum is a text, its tokens are independent terms."""

from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import pyro_lora as pl
from pyro_lora.curvature.fisher import empirical_terms, mc_terms
from tests.curvature.gauss_newton import (
    Batch,
    assert_same,
    fisher,
    fit,
    flatten,
    split,
    unflatten,
)
from tests.curvature.test_cost import LargestTensor, Passes
from tests.networks import VOCABULARY, batch, inputs, llama

pytestmark = pytest.mark.untrained


def language_model(lora: pl.LiftedNetwork, num_data: int, form: str) -> Any:
    """The next token of each, padding masked, as one event or in a plate."""

    def model(labels: Tensor, **texts: Tensor) -> None:
        logits = lora()(**texts).logits
        fn = dist.Categorical(logits=logits)
        mask = texts["attention_mask"].bool()
        if form == "event":
            with pyro.plate("data", num_data, subsample=logits):
                pyro.sample("y", fn.mask(mask).to_event(1), obs=labels)
        else:
            data = pyro.plate("data", num_data, subsample=logits, dim=-2)
            tokens = pyro.plate("tokens", logits.shape[1], dim=-1)
            with data, tokens, poutine.mask(mask=mask):
                pyro.sample("y", fn, obs=labels)

    return model


def text_to_continue(batch_size: int = 4, length: int = 5) -> Batch:
    texts = batch(batch_size, length)
    return {**texts, "labels": texts["input_ids"].roll(-1, 1)}


def token_gradients(lora: pl.LiftedNetwork, texts: Batch) -> tuple[Tensor, Tensor]:
    """Probabilities (N, T, V) and the logits' Jacobian (N, T, V, D)."""
    weights = lora.weights()

    def outputs(flat: Tensor) -> Tensor:
        with lora.bind(unflatten(flat, weights)) as net:
            logits: Tensor = net(**inputs(texts)).logits
        return logits

    flat = flatten(weights)
    j = torch.autograd.functional.jacobian(outputs, flat)
    return outputs(flat).softmax(-1), j


@pytest.mark.parametrize("form", ["event", "plate"])
@pytest.mark.few(1)
def test_mc_of_tokens_converges_to_the_sum_over_tokens(form: str) -> None:
    num_samples = 150
    lora = pl.lift(llama(None, num_layers=1, hidden_size=8))
    texts = text_to_continue()
    terms = partial(mc_terms, num_samples=num_samples)
    model = language_model(lora, 4, form)
    information = fisher(fit(lora, model, split(texts, 3), terms))
    p, j = token_gradients(lora, texts)
    p = p * texts["attention_mask"][..., None]
    for v in torch.randn(4, j.shape[-1], dtype=torch.float64):
        slopes = j @ v
        slopes = slopes - (p * slopes).sum(-1, keepdim=True)
        t2, t4 = (p * slopes.square()).sum(-1), (p * slopes**4).sum(-1)  # (N, T)
        mean = t2.sum(1)
        # Fourth moment of a sum of independent scores of mean zero
        fourth = t4.sum(1) + 3 * (mean.square() - t2.square().sum(1))
        standard_error = ((fourth - mean.square()).sum() / num_samples).sqrt()
        assert abs(v @ information @ v - mean.sum()) < 4 * standard_error


@pytest.mark.grid
@pytest.mark.parametrize("form", ["event", "plate"])
@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.few(1)
def test_tokens_and_vocabulary_cost_no_backward_pass(
    form: str, num_samples: int
) -> None:
    network = llama(None, hidden_size=8)
    lora, texts = pl.lift(network), text_to_continue(4, 7)
    guide = pl.AutoLaplace(
        language_model(lora, 4, form),
        init_loc_fn=lora.init_to_adapter(),
        fisher="mc",
        num_fisher_samples=num_samples,
    )
    guide.laplace_approximation(split(texts, 2))
    passes = Passes()
    with passes.counting(network):
        guide.laplace_approximation(split(texts, 2))
    assert passes.forward == 2
    assert passes.backward == 2 * (num_samples + 1)  # one at the given labels


def test_nothing_is_larger_than_the_logits() -> None:
    lora, texts = pl.lift(llama(None, hidden_size=8)), text_to_continue(4, 7)
    terms = partial(mc_terms, num_samples=3)
    model = language_model(lora, 4, "event")
    with LargestTensor() as largest:
        fit(lora, model, [texts], terms, structure=pl.structures.KFAC())
    assert largest.numel == 4 * 7 * VOCABULARY


def test_a_mask_by_pyro_and_by_the_distribution_are_the_same() -> None:
    lora, texts = pl.lift(llama(None, num_layers=1, hidden_size=8)), text_to_continue()
    one, other = (
        fit(lora, language_model(lora, 4, form), split(texts, 3), empirical_terms)
        for form in ("event", "plate")
    )
    assert_same(fisher(one), fisher(other), atol=1e-9)
    assert_same(one.log_likelihood, other.log_likelihood)
    assert_same(flatten(one.gradient), flatten(other.gradient), atol=1e-9)
