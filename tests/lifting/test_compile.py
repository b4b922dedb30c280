"""torch.compile: same numbers, and no recompilation when only the weights change."""

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pytest
import torch
from peft import PeftModel
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from pyro.optim import Adam
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
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

NUM_STEPS = 3
leads = pytest.mark.parametrize(
    "lead", [pytest.param((), marks=pytest.mark.slow), (4,)], ids=str
)
# Of dynamo, which looks at everything of a tensor that is bound.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def counter() -> CompileCounterWithBackend:
    """A backend that counts the graphs it is given, and runs them as they are."""
    return CompileCounterWithBackend("eager")


def one_layer() -> PeftModel:
    return bert(num_layers=1)


def adapted_gpt2() -> nn.Module:
    network = gpt2(AutoModelForCausalLM, n_layer=1)
    return lora(network, "c_attn", fan_in_fan_out=True)


def pair(build: Callable[[], Any] = one_layer) -> tuple[pl.LiftedNetwork, Any]:
    """A lifted network that isn't compiled, and one like it that isn't lifted."""
    eager, network = pl.lift(build()), build()
    network.load_state_dict(eager.network.state_dict())
    return eager, network


def assert_same(
    compiled: Tensor, expected: Tensor, weights: dict[str, Tensor], atol: float = 1e-12
) -> None:
    """Compare outputs and gradients."""
    assert_close(compiled, expected, rtol=0, atol=atol)
    found, wanted = (
        torch.autograd.grad(out.square().sum(), list(weights.values()))
        for out in (compiled, expected)
    )
    assert_close(found, wanted, rtol=0, atol=100 * atol)


def compile_in_place(network: PeftModel, backend: Any) -> nn.Module:
    network.compile(backend=backend)
    return network


def compile_each_layer(network: PeftModel, backend: Any) -> nn.Module:
    for layer in network.get_base_model().bert.encoder.layer:
        layer.compile(backend=backend)
    return network


def compile_wrapped(network: PeftModel, backend: Any) -> nn.Module:
    compiled = torch.compile(network, backend=backend)
    assert isinstance(compiled, nn.Module)
    return compiled


@pytest.mark.parametrize(
    "compiled",
    [
        compile_in_place,
        pytest.param(compile_each_layer, marks=pytest.mark.slow),
        pytest.param(compile_wrapped, marks=pytest.mark.slow),
    ],
)
@leads
def test_a_compiled_network_can_be_lifted(
    compiled: Callable[[PeftModel, Any], nn.Module],
    lead: tuple[int, ...],
    counter: CompileCounterWithBackend,
) -> None:
    (eager, network), texts = pair(), inputs(batch())
    lifted = pl.lift(compiled(network, counter))
    assert list(lifted.sites) == list(eager.sites)
    assert_close(lifted.weights(), eager.weights(), rtol=0, atol=0)
    graphs = 0
    for step in range(NUM_STEPS):
        weights = leaves(particles(eager, *lead))
        out = bound_logits(lifted, weights, texts)
        assert_same(out, bound_logits(eager, weights, texts), weights)
        graphs = counter.frame_count if step == 0 else graphs
    assert counter.frame_count == graphs > 0


@leads
def test_a_lifted_network_can_be_compiled(
    lead: tuple[int, ...], counter: CompileCounterWithBackend
) -> None:
    (eager, network), texts = pair(lambda: llama(num_layers=1)), inputs(batch())
    lifted = pl.lift(network)
    network.compile(backend=counter)
    for _ in range(NUM_STEPS):
        weights = leaves(particles(eager, *lead))
        out = bound_logits(lifted, weights, texts)
        assert_same(out, bound_logits(eager, weights, texts), weights)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("build", [one_layer, adapted_gpt2])
def test_a_graph_is_used_for_what_is_bound_only(
    build: Callable[[], Any], counter: CompileCounterWithBackend
) -> None:
    (eager, network), texts = pair(build), inputs(batch())
    network.compile(backend=counter)
    expected = eager.network(**texts).logits
    assert_close(network(**texts).logits, expected, rtol=0, atol=1e-12)
    lifted = pl.lift(network)
    for _ in range(2):
        assert_close(network(**texts).logits, expected, rtol=0, atol=1e-12)
        for lead in [(), (4,)]:
            weights = leaves(particles(eager, *lead))
            out = bound_logits(lifted, weights, texts)
            assert_same(out, bound_logits(eager, weights, texts), weights)


@pytest.mark.slow
def test_batches_of_any_size_share_a_graph(counter: CompileCounterWithBackend) -> None:
    eager, network = pair()
    lifted = pl.lift(network)
    network.compile(backend=counter)
    for size in [(5, 7), (4, 8), (3, 6), (6, 9), (7, 10), (2, 12)]:
        weights, texts = leaves(particles(eager, 4)), inputs(batch(*size))
        out = bound_logits(lifted, weights, texts)
        assert_same(out, bound_logits(eager, weights, texts), weights)
    # As without lifting: one for the first size, one for any other.
    assert counter.frame_count == 2


@leads
def test_a_function_that_binds_and_calls_is_one_graph(
    lead: tuple[int, ...], counter: CompileCounterWithBackend
) -> None:
    lifted, texts = pl.lift(one_layer()), inputs(batch())
    # It remembers what it has checked.
    bound_logits(lifted, particles(lifted, *lead), texts)
    compiled = torch.compile(bound_logits, backend=counter, fullgraph=True)
    for _ in range(NUM_STEPS):
        weights = leaves(particles(lifted, *lead))
        out = compiled(lifted, weights, texts)
        assert_same(out, bound_logits(lifted, weights, texts), weights)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_layers_that_all_particles_share(counter: CompileCounterWithBackend) -> None:
    eager, network = pair(lambda: bert(num_layers=2, layers_to_transform=[1]))
    lifted, texts = pl.lift(network), inputs(batch())
    network.compile(backend=counter)
    graphs = []
    for _ in range(NUM_STEPS):
        weights = leaves(particles(eager, 4))
        out = bound_logits(lifted, weights, texts)
        assert_same(out, bound_logits(eager, weights, texts), weights)
        graphs.append(counter.frame_count)
    assert graphs[0] > 0
    assert graphs[1:] == graphs[1:2] * (NUM_STEPS - 1)


@leads
def test_layers_that_run_once_for_each_particle(
    lead: tuple[int, ...], counter: CompileCounterWithBackend
) -> None:
    (eager, network), texts = pair(adapted_gpt2), inputs(batch())
    lifted = pl.lift(network)
    network.compile(backend=counter)
    graphs = []
    for _ in range(NUM_STEPS):
        weights = leaves(particles(eager, *lead))
        out = bound_logits(lifted, weights, texts)
        assert_same(out, bound_logits(eager, weights, texts), weights)
        graphs.append(counter.frame_count)
    assert graphs[0] > 0
    assert graphs[1:] == graphs[1:2] * (NUM_STEPS - 1)


def test_svi_steps_reuse_the_graph(counter: CompileCounterWithBackend) -> None:
    eager, network = pair()
    network.compile(backend=counter)
    texts, losses = batch(), []
    for one in (eager, pl.lift(network)):
        pyro.clear_param_store()
        model = classifier(one)
        guide = AutoDelta(model, init_loc_fn=one.init_to_adapter())
        svi = SVI(model, guide, Adam({"lr": 1e-2}), Trace_ELBO())
        losses.append(torch.tensor([svi.step(**texts) for _ in range(4)]))
    assert_close(losses[0], losses[1], rtol=1e-9, atol=0)
    assert losses[0][-1] < losses[0][0]
    assert counter.frame_count == 2  # the guide's first call makes no gradient


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
@pytest.mark.skipif(
    torch.__version__ < (2, 13),
    reason="up to torch 2.11 at least, compiled checkpoints refuse lora.context_fn",
)
def test_compiled_layers_are_recomputed_in_the_backward_pass() -> None:
    (eager, network), texts = pair(), inputs(batch())
    lifted = pl.lift(network.train())
    eager.network.train()
    network.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={
            "use_reentrant": False,
            "context_fn": lifted.context_fn,
        }
    )
    network.compile(backend="aot_eager")
    for _ in range(2):
        weights = leaves(particles(eager, 4))
        out = bound_logits(lifted, weights, texts)
        assert_same(out, bound_logits(eager, weights, texts), weights)


@pytest.mark.slow
@leads
def test_inductor_computes_the_same(lead: tuple[int, ...]) -> None:
    (eager, network), texts = pair(), inputs(batch())
    lifted = pl.lift(network)
    network.compile()
    for _ in range(2):
        weights = leaves(particles(eager, *lead))
        out = bound_logits(lifted, weights, texts)
        assert_same(out, bound_logits(eager, weights, texts), weights)
