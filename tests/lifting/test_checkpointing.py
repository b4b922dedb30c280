"""Gradient checkpointing changes no gradient, whatever the architecture."""

from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from pyro.optim import SGD
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    Qwen3Config,
)

import pyro_lora as pl
from tests.lifting.liftable_row import EXPERTS, gpt2, lora, tiny
from tests.networks import (
    VOCABULARY,
    batch,
    bert,
    classifier,
    inputs,
    leaves,
    particles,
    t5,
)

# Which transformers itself uses.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")

HALF_HEADS = {"num_key_value_heads": 1, "head_dim": 8}


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "GPT-2": lambda: lora(gpt2(AutoModelForCausalLM), "c_attn", fan_in_fan_out=True),
    "Qwen3": lambda: lora(tiny(Qwen3Config, **HALF_HEADS), "q_proj", "v_proj"),
    "Mixtral, a mixture of experts": lambda: lora(
        tiny(MixtralConfig, num_local_experts=3, num_key_value_heads=1, **EXPERTS),
        "q_proj",
        "v_proj",
    ),
    "T5, encoder and decoder": lambda: lora(t5(), "q", "v"),
    "BERT with DoRA": lambda: bert(use_dora=True),
    "BERT with dropout": lambda: bert(dropout=0.3, lora_dropout=0.3),
    "BERT, embeddings adapted": lambda: bert(
        target_modules=["word_embeddings", "query"]
    ),
}


def texts(name: str) -> dict[str, Tensor]:
    if name.startswith("T5"):
        decoder = {"decoder_input_ids": torch.randint(1, VOCABULARY, (4, 5))}
        return {**inputs(batch(4, 6)), **decoder}
    return inputs(batch(4, 6))


def enable(lifted: pl.LiftedNetwork) -> None:
    """Gradient checkpointing, in training mode, without which it does nothing."""
    network: Any = lifted.network
    network.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={
            "use_reentrant": False,
            "context_fn": lifted.context_fn,
        }
    )


def loss(
    lifted: pl.LiftedNetwork, weights: dict[str, Tensor], texts: dict[str, Tensor]
) -> Tensor:
    """A scalar whose gradient tells all outputs apart, the same dropout each time."""
    torch.manual_seed(0)
    with lifted.bind(weights) as net:
        logits = net(**texts, use_cache=False).logits
    return (logits * torch.arange(logits.numel()).view(logits.shape).cos()).sum()


def gradients(loss: Tensor, weights: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, list(weights.values()), retain_graph=True)


def saved_bytes(function: Callable[[], Any]) -> int:
    """Bytes that autograd keeps for the backward pass, each tensor counted once."""
    storages = {}

    def keep(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        function()
    return sum(storages.values())


@pytest.mark.grid
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("lead", [(), (1,), (4,)], ids=str)
def test_gradients_are_those_without_checkpointing(
    name: str, lead: tuple[int, ...]
) -> None:
    lifted, given = pl.lift(NETWORKS[name]()), texts(name)
    lifted.network.train()
    weights, others = leaves(particles(lifted, *lead)), leaves(particles(lifted, *lead))
    expected = gradients(loss(lifted, weights, given), weights)
    expected_others = gradients(loss(lifted, others, given), others)
    assert all(gradient.any() for gradient in expected)
    assert not torch.equal(expected[0], expected_others[0])
    enable(lifted)
    # Both graphs are there before either is recomputed, and one of them twice.
    of_weights, of_others = loss(lifted, weights, given), loss(lifted, others, given)
    for total, at, wanted in [
        (of_weights, weights, expected),
        (of_others, others, expected_others),
        (of_weights, weights, expected),
    ]:
        atol = 1e-12 * max(float(gradient.abs().max()) for gradient in wanted)
        assert_close(gradients(total, at), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("lead", [(), (4,)], ids=str)
def test_less_is_kept_for_the_backward_pass(lead: tuple[int, ...]) -> None:
    lifted, given = pl.lift(bert(num_layers=3)), inputs(batch(8, 16))
    lifted.network.train()
    weights = leaves(particles(lifted, *lead))
    without = saved_bytes(lambda: loss(lifted, weights, given))
    enable(lifted)
    assert saved_bytes(lambda: loss(lifted, weights, given)) < 0.5 * without


def test_an_svi_step_is_that_without_checkpointing() -> None:
    given = batch()
    modes = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        pyro.clear_param_store()
        lifted = pl.lift(bert(), prior=pl.priors.normal(scale=1.0))
        lifted.network.train()
        if checkpointed:
            enable(lifted)
        model = classifier(lifted)
        guide = AutoDelta(model, init_loc_fn=lifted.init_to_adapter())
        svi = SVI(model, guide, SGD({"lr": 1e-2}), Trace_ELBO())
        for _ in range(3):
            svi.step(**given)
        modes.append({site: v.detach() for site, v in guide.median().items()})
        start = lifted.weights()
        moved = [modes[-1][s] - start[s] for s in start]
        assert all(distance.abs().max() > 1e-3 for distance in moved)
    assert_close(modes[0], modes[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["GPT-2", "T5, encoder and decoder"])
@pytest.mark.parametrize("lead", [(), (4,)], ids=str)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputing_without_the_weights_is_refused(
    name: str, lead: tuple[int, ...], use_reentrant: bool
) -> None:
    lifted, given = pl.lift(NETWORKS[name]()), texts(name)
    lifted.network.train()
    weights = particles(lifted, *lead)
    expected = loss(lifted, weights, given)
    network: Any = lifted.network
    settings = {"use_reentrant": use_reentrant}
    network.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    with pytest.raises(ValueError, match=r"use_reentrant.*lora\.context_fn"):
        loss(lifted, weights, given)
    network.gradient_checkpointing_disable()
    assert torch.equal(loss(lifted, weights, given), expected)
