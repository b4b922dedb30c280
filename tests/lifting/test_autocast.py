"""Under autocast the sites stay float32, and outputs are as exact as the dtype is."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
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


@pytest.mark.grid
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


def relative(rounded: Tensor, exact: Tensor) -> float:
    return float((rounded - exact).abs().max() / exact.abs().max())


# Nobody has trained the adapter.
@pytest.mark.untrained
@dtypes
def test_mathematics_around_the_network_is_not_rounded(dtype: torch.dtype) -> None:
    lifted, texts = pl.lift(bert(3, dtype=torch.float32)), batch()
    model = classifier(lifted, len(texts["labels"]))
    guide = pl.AutoLaplace(model, init_loc_fn=lifted.init_to_adapter())
    posterior = guide.laplace_approximation([texts])
    exact = posterior.linearized(texts).covariance_matrix
    torch.manual_seed(0)
    draws = posterior.sample(3)
    density = posterior.log_prob(draws)
    with autocast(dtype):
        torch.manual_seed(0)
        again = posterior.sample(3)
        assert_close(posterior.log_prob(draws), density, rtol=0, atol=0)
        rounded = posterior.linearized(texts).covariance_matrix
        refitted = guide.laplace_approximation([texts])
    assert_close(again, draws, rtol=0, atol=0)
    # Squares of gradients, which are as exact as the forward and backward pass.
    bound = 4 * ROUNDINGS * torch.finfo(dtype).eps
    assert relative(rounded, exact) < bound
    for site, variance in posterior.variance().items():
        assert relative(refitted.variance()[site], variance) < bound


@pytest.mark.grid
@dtypes
@pytest.mark.parametrize("space", ["joint", "site", "delta", "function"])
def test_svgd_under_autocast_is_svgd_of_a_model_under_autocast(
    dtype: torch.dtype, space: Any
) -> None:
    lifted, texts = pl.lift(bert(3, dtype=torch.float32)), batch()
    model = classifier(lifted)

    def rounded(**texts: Tensor) -> Tensor:
        with autocast(dtype):
            return model(**texts)

    found = []
    for step_of, around in ((rounded, nullcontext()), (model, autocast(dtype))):
        pyro.set_rng_seed(0)
        svgd = pl.SVGD(
            step_of,
            pl.kernels.RBF(space=space),
            pyro.optim.SGD({"lr": 1e-3}),
            3,
            init_loc_fn=lifted.init_to_adapter(jitter=0.1),
        )
        with around:
            svgd.step(**texts)
        found.append(svgd.get_named_particles())
    assert_close(found[1], found[0], rtol=0, atol=0)
