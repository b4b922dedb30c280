"""Priors on Delta W, and AdaLoRA's penalty: dense matrices and PEFT as oracles."""

from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from pyro import poutine
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, BertConfig

import pyro_lora as pl
from pyro_lora.likelihood.model_trace import trace_at
from pyro_lora.priors.spectral import singular_values, squared_frobenius_norm
from tests.networks import batch, bert, particles

SHAPES = [(5, 3, 7), (5, 1, 7), (2, 3, 7), (5, 4, 3)]  # (O, R, I)


def nuclear(values: Tensor) -> Tensor:
    return values.sum(-1) / 3


def updates(lora: pl.LiftedNetwork) -> list[Tensor]:
    """PEFT's own Delta W of every layer."""
    layers = [m for m in lora.network.modules() if isinstance(m, LoraLayer)]
    return [layer.get_delta_weight("default") for layer in layers]


def log_factor(
    lora: pl.LiftedNetwork, name: str, weights: dict[str, Tensor], *lead: int
) -> Tensor:
    def model() -> None:
        with pyro.plate_stack("particles", lead):
            lora()

    trace = trace_at(model, weights, {})
    trace.compute_log_prob()
    (site,) = (n for n in trace.nodes if n.startswith(f"prior.{name}."))
    log_prob: Tensor = trace.nodes[site]["log_prob"]
    return log_prob


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lead", [(), (2, 1)])
def test_singular_values_are_those_of_the_product(
    shape: tuple[int, int, int], lead: tuple[int, ...]
) -> None:
    o, r, i = shape
    b = torch.randn(*lead, o, r).double().requires_grad_()
    a = torch.randn(*lead, r, i).double().requires_grad_()
    found, expected = singular_values(b, a), torch.linalg.svdvals(b @ a)
    assert found.shape == (*lead, min(shape))
    assert_close(found, expected[..., : min(shape)], rtol=1e-10, atol=1e-12)
    weight = torch.randn(min(shape)).double()
    gradients = torch.autograd.grad((found * weight).sum(), (a, b))
    dense = (expected[..., : min(shape)] * weight).sum()
    for one, two in zip(gradients, torch.autograd.grad(dense, (a, b)), strict=True):
        assert_close(one, two, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_frobenius_norm_is_that_of_the_product(shape: tuple[int, int, int]) -> None:
    o, r, i = shape
    b = torch.randn(2, o, r).double()
    a = torch.randn(2, r, i).double()
    expected = (b @ a).square().sum((-2, -1))
    assert_close(squared_frobenius_norm(b, a), expected, rtol=1e-10, atol=0)
    assert torch.autograd.gradgradcheck(
        lambda b: squared_frobenius_norm(b, a), b.requires_grad_()
    )


def test_gradients_are_finite_where_b_is_zero() -> None:
    b = torch.zeros(5, 3).double().requires_grad_()
    a = torch.randn(3, 7).double().requires_grad_()
    value = nuclear(singular_values(b, a)) + squared_frobenius_norm(b, a)
    for gradient in torch.autograd.grad(value, (a, b)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("frobenius_scale", "penalty"), [(2.0, None), (None, nuclear), (2.0, nuclear)]
)
def test_the_factor_is_that_of_the_dense_update(
    frobenius_scale: float | None, penalty: Callable[[Tensor], Tensor] | None
) -> None:
    prior = pl.priors.spectral(
        frobenius_scale=frobenius_scale,
        penalty=penalty,
        prior=pl.priors.normal(3.0),
    )
    # Ranks differ, and with them the shapes of the factors.
    lora = pl.lift(bert(rank_pattern={"layer.1.*.query": 2}), prior=prior)
    draws = particles(lora, 3, 1)
    factor = log_factor(lora, "spectral", draws, 3, 1)
    for i in range(3):
        weights = {site: value[i, 0] for site, value in draws.items()}
        lora.load(weights)
        assert len(updates(lora)) == 4
        expected = torch.zeros(()).double()
        for update in updates(lora):
            if frobenius_scale is not None:
                expected -= update.square().sum() / (2 * frobenius_scale**2)
            if penalty is not None:
                expected -= torch.linalg.matrix_norm(update, ord="nuc") / 3
        assert_close(factor[i, 0], expected, rtol=1e-10, atol=0)
        assert_close(
            log_factor(lora, "spectral", weights), expected, rtol=1e-10, atol=0
        )


def test_the_rest_of_the_density_is_the_base_priors() -> None:
    base = pl.priors.normal(3.0)
    lora = pl.lift(bert(), prior=pl.priors.spectral(frobenius_scale=2.0, prior=base))
    weights = particles(lora)
    total = trace_at(lambda: lora(), weights, {}).log_prob_sum()
    factor = log_factor(lora, "spectral", weights)
    lora = lora.with_prior(base)
    expected = trace_at(lambda: lora(), weights, {}).log_prob_sum() + factor
    assert_close(total, expected, rtol=1e-12, atol=0)


def test_splitting_an_update_differently_leaves_the_factor_alone() -> None:
    lora = pl.lift(
        bert(), prior=pl.priors.spectral(frobenius_scale=2.0, penalty=nuclear)
    )
    weights = particles(lora)
    mix = torch.randn(3, 3).double()
    other = {
        site: mix @ x if site.endswith(".A") else x @ mix.inverse()
        for site, x in weights.items()
        if site.startswith("lora.")
    }
    one = log_factor(lora, "spectral", weights)
    two = log_factor(lora, "spectral", {**weights, **other})
    assert_close(one, two, rtol=1e-8, atol=0)


def test_part_of_a_network_can_have_a_spectral_prior() -> None:
    spectral = pl.priors.spectral(frobenius_scale=1.0)
    prior = pl.priors.by_site({"*.query.*": spectral, "*": pl.priors.normal()})
    lora = pl.lift(bert(), prior=prior)
    paths = [n for n, m in lora.network.named_modules() if isinstance(m, LoraLayer)]
    expected = -sum(
        update.square().sum() / 2
        for path, update in zip(paths, updates(lora), strict=True)
        if path.endswith("query")
    )
    factor = log_factor(lora, "spectral", lora.weights())
    assert_close(factor, torch.as_tensor(expected), rtol=1e-10, atol=0)
    lora = lora.with_prior(
        pl.priors.by_site({"*.A": spectral, "*": pl.priors.normal()})
    )
    with pytest.raises(
        ValueError, match=r"query\.A': expected both A and B .*query' with"
    ):
        lora()


def test_bad_spectral_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="neither frobenius_scale nor penalty"):
        pl.priors.spectral()
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(
            ValueError, match="frobenius_scale must be positive and fin"
        ):
            pl.priors.spectral(frobenius_scale=value)
    lora = pl.lift(bert(), prior=pl.priors.spectral(penalty=lambda s: s))
    with pytest.raises(ValueError, match=r"penalty to give \(4,\) from .* \(4, 3\)"):
        lora()
    lora = pl.lift(nn.Linear(3, 2), prior=pl.priors.spectral(frobenius_scale=1.0))
    with pytest.raises(ValueError, match=r"spectral needs LoRA.*'base\.weight'"):
        lora()


# AdaLoRA.


def adalora(orth_reg_weight: float) -> Any:
    """A BERT classifier with AdaLoRA on query and value, all weights random."""
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=2,
    )
    network = AutoModelForSequenceClassification.from_config(config).double()
    peft_model = get_peft_model(
        network,
        AdaLoraConfig(
            init_r=4,
            target_r=2,
            total_step=10,
            tinit=1,
            tfinal=1,
            orth_reg_weight=orth_reg_weight,
            target_modules=["query", "value"],
            task_type="SEQ_CLS",
        ),
    )
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name and parameter.requires_grad:
                parameter.normal_(std=0.3)
    return peft_model.eval()


def test_the_orthogonality_penalty_is_pefts() -> None:
    texts = batch()
    peft_model = adalora(orth_reg_weight=0.7)
    output = peft_model(**texts)
    plain = nn.functional.cross_entropy(output.logits, texts["labels"])
    num_data = 100  # of which the loss is a mean, and the log joint a sum
    lora = pl.lift(peft_model, prior=pl.priors.orthogonal(0.7 * num_data))
    factor = log_factor(lora, "orthogonal", lora.weights())
    assert_close(factor, -num_data * (output.loss - plain), rtol=1e-8, atol=0)


def test_rank_ard_takes_e_into_the_component() -> None:
    lora = pl.lift(adalora(0.0), prior=pl.priors.rank_ard())
    nodes = poutine.trace(lora).get_trace().nodes
    sites = [site[:-1] for site in lora.sites if site.endswith(".E")]
    assert len(sites) == 2
    for site in sites:
        scale = {role: nodes[site + role]["fn"].base_dist.scale for role in "ABE"}
        assert len(scale["E"].unique()) == 8  # two layers of rank 4
        assert torch.equal(scale["E"], scale["A"][..., :1])
        assert torch.equal(scale["E"][..., 0], scale["B"][:, 0])


def test_orthogonal_multiplies_its_base_prior_by_the_factor() -> None:
    prior = pl.priors.orthogonal(5.0, prior=pl.priors.normal(2.0))
    lora = pl.lift(bert(), prior=prior)
    draws = particles(lora, 3, 1)
    factor = log_factor(lora, "orthogonal", draws, 3, 1)
    for i in range(3):
        weights = {site: value[i, 0] for site, value in draws.items()}
        norms = []
        for site, stack in weights.items():
            for w in stack if site.startswith("lora.") else ():
                gram = w @ w.T if site.endswith("A") else w.T @ w
                norms.append((gram - torch.eye(3)).square().sum().sqrt())
        assert len(norms) == 8
        expected = -5.0 * torch.stack(norms).mean()
        assert_close(factor[i, 0], expected, rtol=1e-10, atol=0)


def test_orthonormal_factors_have_no_penalty_and_finite_gradients() -> None:
    lora = pl.lift(bert(), prior=pl.priors.orthogonal(1.0))
    weights = {}
    for site, x in lora.weights().items():
        tall = x.mT if site.endswith(".A") else x
        q = torch.linalg.qr(tall).Q if site.startswith("lora.") else x
        weights[site] = (q.mT if site.endswith(".A") else q).requires_grad_()
    factor = log_factor(lora, "orthogonal", weights)
    assert abs(factor) < 1e-12
    sites = [s for s in weights if s.startswith("lora.")]
    for gradient in torch.autograd.grad(factor, [weights[s] for s in sites]):
        assert gradient.isfinite().all()


def test_bad_orthogonal_arguments_are_refused() -> None:
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="strength must be positive and finite"):
            pl.priors.orthogonal(value)
    lora = pl.lift(nn.Linear(3, 2), prior=pl.priors.orthogonal(1.0))
    with pytest.raises(ValueError, match=r"orthogonal needs LoRA.*'base\.weight'"):
        lora()
    nodes = poutine.trace(pl.lift(bert(), prior=pl.priors.orthogonal(1.0))).get_trace()
    assert sum(name.startswith("prior.orthogonal.") for name in nodes.nodes) == 1
