"""Linearised outputs: covariances across data, several outputs, tokens, noise."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification, BertConfig

import pyro_lora as pl
from pyro_lora.curvature.structures import Structure
from tests.curvature.gauss_newton import (
    assert_same,
    flatten,
    jacobian,
    laplace,
    precision_matrix,
    unflatten,
)
from tests.infer.linear_regression import NOISE_SD, linear_regression
from tests.networks import VOCABULARY, adapted, batch, bert, inputs

pytestmark = pytest.mark.untrained
STRUCTURES = [pl.structures.KFAC(), pl.structures.Diagonal(), pl.structures.Dense()]


def autograd_jacobian(
    lora: pl.LiftedNetwork, outputs: Callable[[Any], Tensor]
) -> tuple[Tensor, Tensor]:
    """Outputs (...) of the bound network and their Jacobian (..., D)."""
    weights = lora.weights()

    def at(flat: Tensor) -> Tensor:
        with lora.bind(unflatten(flat, weights)) as net:
            return outputs(net)

    flat = flatten(weights)
    return at(flat).detach(), torch.autograd.functional.jacobian(at, flat)


def centred(x: Tensor, dim: int) -> Tensor:
    return x - x.mean(dim, keepdim=True)


@pytest.mark.parametrize("num_labels", [2, 3])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_joint_covariance_is_the_dense_product(
    structure: Structure, num_labels: int
) -> None:
    lora = pl.lift(bert(num_labels), prior=pl.priors.normal(scale=0.7))
    texts = batch(5, num_labels=num_labels)
    posterior = laplace(lora, texts, structure=structure)
    _, j = jacobian(lora, texts)
    j = centred(j, 1)
    covariance = torch.linalg.inv(precision_matrix(posterior))
    expected = torch.einsum("bcd,de,afe->bcaf", j, covariance, j)
    logits = posterior.linearized(texts, joint=True)
    assert_same(logits.covariance_matrix, expected, rtol=1e-8, atol=1e-10)
    each = posterior.linearized(texts)
    assert_same(logits.mean, each.mean)
    assert_same(logits.marginals().covariance_matrix, each.covariance_matrix)


def test_joint_draws_are_correlated_across_data() -> None:
    lora, texts = pl.lift(bert(2)), batch(3)
    logits = laplace(lora, texts).linearized(texts, joint=True)
    num_samples = 100_000
    drawn = (logits.rsample((num_samples,)) - logits.mean).flatten(1)
    c = logits.covariance_matrix.reshape(6, 6)
    variances = c.diagonal()
    standard_error = ((variances[:, None] * variances + c**2) / num_samples).sqrt()
    assert ((drawn.mT @ drawn / num_samples - c).abs() < 5 * standard_error).all()
    assert c[0, 2].abs() > 20 * standard_error[0, 2]
    assert logits.rsample().shape == (3, 2)


def test_joint_equals_a_larger_batch_cut_to_size() -> None:
    lora, texts = pl.lift(bert(3)), batch(6, num_labels=3)
    posterior = laplace(lora, texts)
    part = {name: x[2:5] for name, x in texts.items()}
    whole = posterior.linearized(texts, joint=True).covariance_matrix
    covariance = posterior.linearized(part, joint=True).covariance_matrix
    assert_same(covariance, whole[2:5, :, 2:5], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_linear_regression_predicts_with_noise(structure: Structure) -> None:
    problem = linear_regression()
    posterior = problem.laplace(structure=structure)
    x = torch.randn(4, 3).double()
    design = torch.cat([x, torch.ones(4, 1).double()], 1)
    location = design @ torch.linalg.inv(problem.precision) @ design.mT
    logits = posterior.linearized({"x": x})
    assert_same(logits.mean[:, 0], design @ problem.mode, rtol=1e-8)
    variance = location.diagonal() + NOISE_SD**2
    assert_same(logits.predictive_variance[:, 0], variance, rtol=1e-8)
    joint = posterior.linearized({"x": x}, joint=True)
    assert_same(joint.covariance_matrix[:, 0, :, 0], location, rtol=1e-8, atol=1e-10)
    assert_same(joint.marginals().predictive_variance[:, 0], variance, rtol=1e-8)


@pytest.mark.parametrize("scale", [0.4, torch.tensor([0.2, 0.5, 0.9]).double()])
def test_several_outputs_against_the_closed_form(scale: Any) -> None:
    num_data, num_outputs = 12, 3
    lora = pl.lift(
        nn.Linear(2, num_outputs, bias=False).double(),
        prior=pl.priors.normal(scale=0.8),
    )
    x = torch.randn(num_data, 2).double()
    y = torch.randn(num_data, num_outputs).double()
    noise = torch.as_tensor(scale, dtype=torch.float64).expand(num_outputs)

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        loc = lora()(x)
        with pyro.plate("data", num_data, subsample=x):
            return pyro.sample("y", dist.Normal(loc, scale).to_event(1), obs=y)

    # Each output is a regression of its own, all with the same inputs.
    precisions = [x.mT @ x / s**2 + torch.eye(2) / 0.8**2 for s in noise]
    mode = torch.stack(
        [
            torch.linalg.solve(p, x.mT @ y[:, i] / noise[i] ** 2)
            for i, p in enumerate(precisions)
        ]
    )
    weights = unflatten(mode.flatten(), lora.weights())
    posterior = pl.AutoLaplace(
        model, init_loc_fn=lora.init_to(weights), structure=pl.structures.Dense()
    ).laplace_approximation([{"x": x, "y": y}])
    new = torch.randn(5, 2).double()
    logits = posterior.linearized({"x": new})
    assert_same(logits.mean, new @ mode.mT, rtol=1e-8)
    variance = torch.stack(
        [(new @ torch.linalg.inv(p) * new).sum(-1) for p in precisions], -1
    )
    expected = torch.diag_embed(variance)
    assert_same(logits.covariance_matrix, expected, rtol=1e-8, atol=1e-10)
    assert_same(logits.predictive_variance, variance + noise**2, rtol=1e-8)


def test_outputs_of_a_network_are_correlated() -> None:
    lora, texts = pl.lift(bert(3)), inputs(batch(4))

    def model(y: Tensor | None = None, **texts: Tensor) -> Tensor:
        loc = lora()(**texts).logits
        with pyro.plate("data", 4, subsample=loc):
            return pyro.sample("y", dist.Normal(loc, 0.5).to_event(1), obs=y)

    posterior = pl.AutoLaplace(
        model, init_loc_fn=lora.init_to_adapter(), structure=pl.structures.KFAC()
    ).laplace_approximation([{**texts, "y": torch.randn(4, 3).double()}])
    mean, j = autograd_jacobian(lora, lambda net: net(**texts).logits)
    covariance = torch.linalg.inv(precision_matrix(posterior))
    logits = posterior.linearized(texts)
    assert_same(logits.mean, mean)
    assert_same(logits.covariance_matrix, j @ covariance @ j.mT, rtol=1e-8)
    assert logits.covariance_matrix[0, 0, 1].abs() > 1e-3


def test_classes_have_no_noise() -> None:
    lora, texts = pl.lift(bert(2)), batch(4)
    logits = laplace(lora, texts).linearized(texts)
    assert logits.noise_variance is None
    with pytest.raises(ValueError, match="outcomes are classes"):
        logits.predictive_variance  # noqa: B018


NUM_TAGS = 5


def tagging() -> pl.LiftedNetwork:
    """A lifted BERT with logits of every token."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        initializer_range=0.2,
        num_labels=NUM_TAGS,
    )
    network = AutoModelForTokenClassification.from_config(config).double()
    return pl.lift(
        adapted(network, target_modules=["query", "value"], task_type="TOKEN_CLS")
    )


def tagger(lora: pl.LiftedNetwork, num_data: int, masked: bool = True) -> Any:
    """A tag for every token, as one event a datum."""

    def model(
        input_ids: Tensor, attention_mask: Tensor, y: Tensor | None = None
    ) -> Tensor:
        net = lora()
        logits = net(input_ids=input_ids, attention_mask=attention_mask).logits
        fn: Any = dist.Categorical(logits=logits)
        fn = fn.mask(attention_mask.bool()) if masked else fn
        with pyro.plate("data", num_data, subsample=input_ids):
            return pyro.sample("y", fn.to_event(1), obs=y)

    return model


def token_posterior(
    lora: pl.LiftedNetwork, texts: dict[str, Tensor], **options: Any
) -> pl.LaplacePosterior:
    y = torch.randint(NUM_TAGS, texts["input_ids"].shape)
    model = tagger(lora, len(y), **options)
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
    return guide.laplace_approximation([{**inputs(texts), "y": y}])


@pytest.mark.parametrize("padding", ["left", "right"])
def test_tokens_against_the_dense_product(padding: Any) -> None:
    lora, texts = tagging(), inputs(batch(3, 4, padding=padding))
    posterior = token_posterior(lora, texts)
    mean, j = autograd_jacobian(
        lora, lambda net: net(**texts).logits
    )  # (B, T, C), (B, T, C, D)
    mean, j = centred(mean, -1), centred(j, -2)
    covariance = torch.linalg.inv(precision_matrix(posterior))
    expected = j @ covariance @ j.mT
    each = posterior.linearized(texts, tokens="each")
    assert_same(each.mean, mean)
    assert_same(each.covariance_matrix, expected, rtol=1e-8, atol=1e-10)
    positions = torch.arange(4) * texts["attention_mask"]
    last = positions.argmax(1)
    logits = posterior.linearized(texts, tokens="last")
    rows = torch.arange(3)
    assert_same(logits.mean, mean[rows, last])
    assert_same(logits.covariance_matrix, expected[rows, last], rtol=1e-8, atol=1e-10)
    again = posterior.linearized(texts, tokens=last)
    assert torch.equal(again.covariance_matrix, logits.covariance_matrix)
    two = torch.tensor([[3, 0], [1, 2], [2, 2]])
    at_two = posterior.linearized(texts, tokens=two)
    assert_same(at_two.mean, mean[rows[:, None], two])
    assert_same(
        at_two.covariance_matrix, expected[rows[:, None], two], rtol=1e-8, atol=1e-10
    )
    joint = posterior.linearized(texts, tokens=two, joint=True)
    picked = j[rows[:, None], two]
    assert_same(
        joint.covariance_matrix,
        torch.einsum("btcd,de,aufe->btcauf", picked, covariance, picked),
        rtol=1e-8,
        atol=1e-10,
    )
    assert_same(joint.marginals().covariance_matrix, at_two.covariance_matrix)


def test_the_last_token_without_a_mask_is_the_last_place() -> None:
    lora, texts = tagging(), inputs(batch(3, 4))
    posterior = token_posterior(lora, texts, masked=False)
    logits = posterior.linearized(texts, tokens="last")
    expected = posterior.linearized(texts, tokens=torch.tensor([3, 3, 3]))
    assert torch.equal(logits.mean, expected.mean)
    assert torch.equal(logits.covariance_matrix, expected.covariance_matrix)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (None, r"'y'.*event shape \(4,\).*tokens='last'"),
        ("first", "'last', 'each' or a tensor of positions, found 'first'"),
        (torch.tensor([0, 1, 4]), r"'y': tokens must be integers.*from 0 to 3"),
        (torch.tensor([0, 1, -1]), "tokens must be integers"),
        (torch.tensor([0, 1]), r"of shape \(3,\)"),
        (torch.zeros(3), "tokens must be integers"),
    ],
)
def test_impossible_tokens_are_refused(tokens: Any, message: str) -> None:
    lora, texts = tagging(), inputs(batch(3, 4))
    posterior = token_posterior(lora, texts)
    with pytest.raises(ValueError, match=message):
        posterior.linearized(texts, tokens=tokens)


def test_one_outcome_has_no_tokens() -> None:
    lora, texts = pl.lift(bert(2)), batch(3)
    with pytest.raises(ValueError, match=r"'y'.*Leave tokens out"):
        laplace(lora, texts).linearized(texts, tokens="last")
