"""Under autocast the sites stay float32, and outputs are as exact as the dtype is."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from pyro.optim import Adam
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import pyro_lora as pl
from tests.lifting.liftable_row import gpt2, lora
from tests.networks import (
    batch,
    bert,
    bound_logits,
    classifier,
    inputs,
    leaves,
    llama,
    particles,
)

NETWORKS: dict[str, Callable[[], Any]] = {
    "BERT": lambda: bert(3, dtype=torch.float32),
    "BERT, biases": lambda: bert(3, dtype=torch.float32, bias="lora_only"),
    "Llama": lambda: llama(3, dtype=torch.float32),
    "GPT-2": lambda: lora(
        gpt2(AutoModelForCausalLM), "c_attn", fan_in_fan_out=True, bias="lora_only"
    ).float(),
}
# Two layers round about 30 times in a row, each time by at most eps / 2 of the largest
# value at that place. Values grow and shrink by small factors in between, so the error
# of an output is below 16 eps of the largest output, were all errors of one sign.
ROUNDINGS = 16

dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
networks = pytest.mark.parametrize("name", NETWORKS)
leads = pytest.mark.parametrize("lead", [(), (1,), (4,)], ids=str)


def autocast(dtype: torch.dtype) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=dtype)


def score(out: Tensor) -> Tensor:
    return (out.float() * torch.arange(out.numel()).view(out.shape).cos()).sum()


@networks
@dtypes
def test_outputs_at_the_adapters_weights_are_the_networks_own(
    name: str, dtype: torch.dtype
) -> None:
    network, texts = NETWORKS[name](), inputs(batch())
    with autocast(dtype):
        expected = network(**texts).logits
    lifted = pl.lift(network)
    with autocast(dtype):
        assert torch.equal(bound_logits(lifted, lifted.weights(), texts), expected)


@networks
@dtypes
@leads
def test_outputs_and_gradients_are_as_exact_as_the_dtype(
    name: str, dtype: torch.dtype, lead: tuple[int, ...]
) -> None:
    lifted, texts = pl.lift(NETWORKS[name]()), inputs(batch())
    weights = leaves(particles(lifted, *lead))
    exact = bound_logits(lifted, weights, texts)
    exact_gradients = torch.autograd.grad(score(exact), list(weights.values()))
    with autocast(dtype):
        plain_dtype = lifted.network(**texts).logits.dtype
        rounded = bound_logits(lifted, weights, texts)
    gradients = torch.autograd.grad(score(rounded), list(weights.values()))
    assert rounded.dtype == plain_dtype
    eps = torch.finfo(dtype).eps
    error = (rounded - exact).abs().max() / exact.abs().max()
    assert 0 < error < ROUNDINGS * eps
    for site, gradient, wanted in zip(weights, gradients, exact_gradients, strict=True):
        assert lifted.weights()[site].dtype == gradient.dtype == torch.float32
        # The backward pass is as long as the forward pass.
        error = (gradient - wanted).norm() / wanted.norm()
        assert error < 2 * ROUNDINGS * eps, site


@networks
@dtypes
def test_particles_are_a_loop_over_one_particle(name: str, dtype: torch.dtype) -> None:
    lifted, texts = pl.lift(NETWORKS[name]()), inputs(batch())
    weights = particles(lifted, 3)
    with autocast(dtype):  # one block, whose cache of rounded weights must not mix them
        together = bound_logits(lifted, weights, texts)
        alone = [
            bound_logits(lifted, {s: w[i] for s, w in weights.items()}, texts)
            for i in range(3)
        ]
    scale = float(together.abs().max())
    distance = float((together[0] - together[1]).abs().max())
    atol = ROUNDINGS * torch.finfo(dtype).eps * scale
    assert distance > 2 * atol
    assert_close(together, torch.stack(alone), rtol=0, atol=atol)


@dtypes
@leads
def test_a_linear_layer_keeps_its_output_dtype(
    dtype: torch.dtype, lead: tuple[int, ...]
) -> None:
    lifted, x = pl.lift(nn.Linear(4, 2)), torch.randn(5, 4)
    weights = particles(lifted, *lead)
    with autocast(dtype):
        assert lifted.network(x).dtype == dtype
        with lifted.bind(weights) as net:
            assert net(x).dtype == dtype


@dtypes
@leads
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
def test_checkpointing_recomputes_under_autocast(
    dtype: torch.dtype, lead: tuple[int, ...]
) -> None:
    network, texts = bert(dtype=torch.float32), inputs(batch())
    lifted = pl.lift(network.train())
    weights = leaves(particles(lifted, *lead))

    def gradients() -> tuple[Tensor, ...]:
        with autocast(dtype):
            out = bound_logits(lifted, weights, texts)
        return torch.autograd.grad(score(out), list(weights.values()))

    expected = gradients()
    network.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={
            "use_reentrant": False,
            "context_fn": lifted.context_fn,
        }
    )
    assert_close(gradients(), expected, rtol=0, atol=0)


@dtypes
def test_svi_trains_float32_sites(dtype: torch.dtype) -> None:
    network, texts = bert(dtype=torch.float32), batch()
    frozen = {
        name: copy.deepcopy(p)
        for name, p in network.named_parameters()
        if not p.requires_grad
    }
    lifted = pl.lift(network)
    model = classifier(lifted)

    def rounded(**texts: Tensor) -> Tensor:
        with autocast(dtype):
            return model(**texts)

    guide = AutoDelta(rounded, init_loc_fn=lifted.init_to_adapter())
    svi = SVI(rounded, guide, Adam({"lr": 1e-2}), Trace_ELBO())
    losses = [svi.step(**texts) for _ in range(20)]
    # More than rounding makes: a log joint of about 300 nats in steps of eps.
    assert losses[-1] < losses[0] * (1 - ROUNDINGS * torch.finfo(dtype).eps)
    store = pyro.get_param_store()
    assert {p.dtype for p in store.values()} == {torch.float32}
    for name, p in network.named_parameters():
        assert name not in frozen or torch.equal(p, frozen[name])
