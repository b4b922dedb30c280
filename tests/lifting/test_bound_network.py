"""A bound network computes what the PEFT model computes at those weights."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import pyro_lora as pl
from pyro_lora.lifting.slots import LinearSlot
from tests.networks import (
    PAD,
    VOCABULARY,
    adapted,
    batch,
    bert,
    bound_logits,
    inputs,
    leaves,
    llama,
    particles,
)

NETWORKS: dict[str, Callable[[], PeftModel]] = {
    "bert": lambda: bert(3),
    "bert eager": lambda: bert(3, attention="eager"),
    "bert biases": lambda: bert(3, bias="lora_only", lora_bias=True),
    "llama": lambda: llama(3),
    "llama eager": lambda: llama(3, attention="eager"),
    "llama rslora": lambda: llama(3, use_rslora=True),
}
SITES_WITHOUT_PARTICLES = (".A", "head.classifier.bias", "head.score.weight")


@pytest.fixture(params=list(NETWORKS))
def network(request: pytest.FixtureRequest) -> PeftModel:
    return NETWORKS[request.param]()


def logits(network: Any, texts: dict[str, Tensor]) -> Tensor:
    return network(**inputs(texts)).logits


def one_by_one(
    lora: pl.LiftedNetwork, weights: dict[str, Tensor], num_particles: int
) -> Iterator[dict[str, Tensor]]:
    """Each particle's weights, from any leading dims whose others are 1."""
    events = {site: value.shape for site, value in lora.weights().items()}
    for i in range(num_particles):
        yield {
            site: value.reshape(-1, *events[site])[
                min(i, value.reshape(-1, *events[site]).shape[0] - 1)
            ]
            for site, value in weights.items()
        }


# One set of weights.


def test_outputs_at_the_adapters_weights_are_the_networks_own(
    network: PeftModel,
) -> None:
    texts = batch()
    expected = logits(network, texts)
    lora = pl.lift(network)
    assert torch.equal(bound_logits(lora, lora.weights(), texts), expected)
    assert torch.equal(logits(network, texts), expected)


def test_the_original_network_is_unchanged_while_nothing_is_bound(
    network: PeftModel,
) -> None:
    texts = batch(padding="right")
    expected = network(**texts)
    lora = pl.lift(network)
    bound_logits(lora, particles(lora, 3), texts)
    again = network(**texts)
    assert torch.equal(again.loss, expected.loss)
    assert torch.equal(again.logits, expected.logits)


def test_gradients_are_those_of_the_parameters(network: PeftModel) -> None:
    texts = batch(num_labels=3)
    parameters = {n: p for n, p in network.named_parameters() if p.requires_grad}
    loss = network(**texts).loss
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    expected = dict(zip(parameters, gradients, strict=True))
    lora = pl.lift(network)
    weights = leaves(lora.weights())
    with lora.bind(weights) as net:
        gradients = torch.autograd.grad(net(**texts).loss, list(weights.values()))
    for (site, names), gradient in zip(lora.sites.items(), gradients, strict=True):
        stacked = torch.stack([expected[name] for name in names])
        assert_close(gradient, stacked, rtol=1e-10, atol=1e-12, msg=site)
        assert gradient.abs().sum() > 0
    assert all(p.grad is None for p in network.parameters())


def test_inside_the_block_the_original_network_uses_the_weights() -> None:
    network, texts = bert(), batch()
    lora = pl.lift(network)
    with lora.bind(particles(lora)) as net:
        assert torch.equal(logits(network, texts), logits(net, texts))


# Several particles.


@pytest.mark.grid
@pytest.mark.parametrize(
    ("lead", "kept"),
    [
        ((4,), (4,)),
        ((1,), (1,)),
        ((4, 1), (4,)),
        ((1, 1), (1,)),
        ((4, 1, 1), (4, 1)),
        ((2, 2), (2, 2)),
        ((2, 2, 1), (2, 2)),
    ],
)
def test_particles_are_a_loop_over_one_particle(
    network: PeftModel, lead: tuple[int, ...], kept: tuple[int, ...]
) -> None:
    texts = batch()
    lora = pl.lift(network)
    weights = particles(lora, *lead)
    together = bound_logits(lora, weights, texts)
    assert together.shape == (*kept, 5, 3)
    one_each = one_by_one(lora, weights, torch.Size(lead).numel())
    expected = torch.stack([bound_logits(lora, w, texts) for w in one_each])
    assert expected.shape[0] == 1 or (expected[0] - expected[1]).abs().min() > 1e-6
    assert_close(together, expected.reshape(together.shape), rtol=0, atol=1e-12)


@pytest.mark.grid
@pytest.mark.parametrize("other_lead", [(), (1,), (1, 1)])
def test_sites_without_particles_are_shared_by_all(
    network: PeftModel, other_lead: tuple[int, ...]
) -> None:
    texts = batch()
    lora = pl.lift(network)
    alone = particles(lora, *other_lead)
    weights = {
        site: alone[site] if site.endswith(SITES_WITHOUT_PARTICLES) else value
        for site, value in particles(lora, 3, 1).items()
    }
    together = bound_logits(lora, weights, texts)
    for i, w in enumerate(one_by_one(lora, weights, 3)):
        assert_close(together[i], bound_logits(lora, w, texts), rtol=0, atol=1e-12)


def test_gradients_stay_with_their_particle(network: PeftModel) -> None:
    texts = batch()
    lora = pl.lift(network)
    weights = leaves(particles(lora, 3, 1))
    loss = bound_logits(lora, weights, texts).square().sum()
    together = torch.autograd.grad(loss, list(weights.values()))
    for i, w in enumerate(one_by_one(lora, weights, 3)):
        alone = leaves(w)
        loss = bound_logits(lora, alone, texts).square().sum()
        expected = torch.autograd.grad(loss, list(alone.values()))
        for gradient, value in zip(together, expected, strict=True):
            assert_close(gradient[i, 0], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_padding_in_float32(attention: Literal["sdpa", "eager"]) -> None:
    texts = batch(padding="left")
    lora = pl.lift(llama(attention=attention, dtype=torch.float32))
    weights = particles(lora, 3)
    together = bound_logits(lora, weights, texts)
    for i, w in enumerate(one_by_one(lora, weights, 3)):
        assert_close(together[i], bound_logits(lora, w, texts), rtol=0, atol=2e-5)


def test_hidden_states_and_tuples_are_unfolded_too() -> None:
    lora = pl.lift(bert())
    weights = particles(lora, 3, 1)
    texts = inputs(batch())
    with lora.bind(weights) as net:
        output = net(**texts, output_hidden_states=True)
        as_tuple = net(**texts, output_hidden_states=True, return_dict=False)
    assert [h.shape for h in output.hidden_states] == [(3, 5, 7, 16)] * 3
    assert torch.equal(as_tuple[0], output.logits)
    assert torch.equal(as_tuple[1][2], output.hidden_states[2])


def test_inputs_that_broadcast_over_the_batch_still_do() -> None:
    lora, texts = pl.lift(bert()), inputs(batch())
    weights = particles(lora, 3)
    with lora.bind(weights) as net:
        expected = net(**texts).logits
        positions = net(position_ids=torch.arange(7)[None], **texts).logits
        positional = net(texts["input_ids"], texts["attention_mask"]).logits
    assert torch.equal(positions, expected)
    assert torch.equal(positional, expected)


def test_a_batch_of_one() -> None:
    lora, texts = pl.lift(llama()), batch(1)
    weights = particles(lora, 3)
    together = bound_logits(lora, weights, texts)
    assert together.shape == (3, 1, 2)
    for i, w in enumerate(one_by_one(lora, weights, 3)):
        assert_close(together[i], bound_logits(lora, w, texts), rtol=0, atol=1e-12)


def test_a_plain_linear_layer_with_any_lead() -> None:
    x = torch.randn(5, 4)
    lora = pl.lift(nn.Linear(4, 2))
    weight, bias = torch.randn(3, 1, 1, 2, 4), torch.randn(1, 2)
    with lora.bind({"base.weight": weight, "base.bias": bias}) as net:
        out = net(x)
    assert_close(out, x @ weight[:, 0, 0].mT + bias, rtol=0, atol=1e-6)
    weight, bias = torch.randn(1, 2, 4), torch.randn(3, 1, 2)
    with lora.bind({"base.weight": weight, "base.bias": bias}) as net:
        out = net(x)
    assert_close(out, x @ weight[0].T + bias, rtol=0, atol=1e-6)


class RelativePositions(nn.Module):
    """As in DeBERTa, positions that all data share go through an adapted layer."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 4)
        self.positions = nn.Buffer(torch.randn(1, 8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x) + self.project(self.positions).mean(1)


def test_a_layer_whose_input_has_no_batch_sees_one_particle_at_a_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Folding would give each particle some of the positions.
    x, lora = torch.randn(5, 4), pl.lift(RelativePositions())
    weights = particles(lora, 2)
    with lora.bind(weights) as net:
        together, again = net(x), net(x)
    assert torch.equal(together, again)
    (record,) = caplog.records  # once
    assert "one at a time" in record.message
    assert "(1, 8, 4)" in record.message
    for out, one in zip(together, one_by_one(lora, weights, 2), strict=True):
        with lora.bind(one) as net:
            assert torch.equal(net(x), out)
    with lora.bind(lora.weights()) as net:
        assert torch.equal(net(x), lora.network(x))


# Half precision.


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_a_bfloat16_base(adapter_dtype: torch.dtype) -> None:
    texts = batch()
    network = bert(dtype=torch.bfloat16)
    if adapter_dtype == torch.bfloat16:
        network.to(torch.bfloat16)
    lora = pl.lift(network)
    assert {value.dtype for value in lora.weights().values()} == {torch.float32}
    own = bound_logits(lora, lora.weights(), texts)
    assert torch.equal(own, logits(network, texts))
    exact = logits(copy.deepcopy(network).double(), texts)
    # A bfloat16 rounding is 2^-9 relative; each layer makes about ten.
    assert (own - exact).norm() < 20 * 2**-9 * exact.norm()
    weights = leaves(particles(lora, 3))
    together = bound_logits(lora, weights, texts)
    for i, w in enumerate(one_by_one(lora, weights, 3)):
        alone = bound_logits(lora, w, texts)
        assert (together[i] - alone).norm() < 20 * 2**-9 * alone.norm()
    gradients = torch.autograd.grad(together.float().sum(), list(weights.values()))
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


# Gradient checkpointing.


def checkpoint(network: PeftModel, **kwargs: Any) -> None:
    network.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    network.train()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("kind", [bert, llama])
@pytest.mark.parametrize("lead", [(), (1,), (4, 1)])
def test_gradients_are_equal_with_checkpointing(
    kind: Callable[[], PeftModel], lead: tuple[int, ...]
) -> None:
    network, texts = kind(), batch()
    lora = pl.lift(network)
    weights = leaves(particles(lora, *lead))

    def gradients() -> list[tuple[Tensor, ...]]:
        out = bound_logits(lora, weights, texts)
        return [
            torch.autograd.grad(out[..., c].sum(), list(weights.values()), None, True)
            for c in range(2)  # two backward passes: it recomputes twice
        ]

    network.train()
    expected = gradients()
    calls = []
    first_slot = next(iter(lora.parameters.values()))[0].owner
    assert first_slot is not None
    first_slot.register_forward_pre_hook(lambda *_: calls.append(1))
    checkpoint(network, use_reentrant=False, context_fn=lora.context_fn)
    assert_close(gradients(), expected, rtol=0, atol=1e-12)
    assert len(calls) == 3  # the forward and one recomputation for each backward pass


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_checkpointing_recomputes_with_the_weights_of_its_own_call() -> None:
    network, texts = llama(), batch()
    lora = pl.lift(network)
    checkpoint(network, use_reentrant=False, context_fn=lora.context_fn)
    one, two = leaves(particles(lora)), particles(lora, 3)
    expected = torch.autograd.grad(
        bound_logits(lora, one, texts).sum(), list(one.values())
    )
    loss = bound_logits(lora, one, texts).sum()
    with lora.bind(two) as net:
        gradients = torch.autograd.grad(loss, list(one.values()))
        after = logits(net, texts)
    assert_close(gradients, expected, rtol=0, atol=0)
    assert torch.equal(after, bound_logits(lora, two, texts))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize(
    "settings",
    [
        {"use_reentrant": True},
        {"use_reentrant": False},
        {"use_reentrant": False, "context_fn": lambda lora: lambda: None},
        {"use_reentrant": True, "context_fn": lambda lora: lora.context_fn},
    ],
)
def test_other_checkpointing_is_refused(settings: dict[str, Any]) -> None:
    network, texts = bert(), batch()
    lora = pl.lift(network)
    given = {k: v(lora) if k == "context_fn" else v for k, v in settings.items()}
    checkpoint(network, **given)
    with pytest.raises(
        ValueError, match=r"'base_model.*use_reentrant.*lora\.context_fn"
    ):
        bound_logits(lora, lora.weights(), texts)
    network.eval()  # nothing is recomputed
    assert torch.equal(
        bound_logits(lora, lora.weights(), texts), logits(network, texts)
    )


# Text generation.


def until_padding(row: Tensor) -> list[int]:
    return [int(token) for token in row if token != PAD]


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_cache": False}, {"eos_token_id": [3, 7, 11]}, {"num_beams": 2}],
)
def test_generate_equals_sequential_calls(settings: dict[str, Any]) -> None:
    network = llama(None)
    texts = inputs(batch(padding="left"))
    settings = {"max_new_tokens": 6, "do_sample": False, **settings}
    lora = pl.lift(network)
    own = lora.weights()
    weights = particles(lora, 3, spread=1.0)
    with lora.bind(weights) as net:
        together = net.generate(**texts, **settings)
    assert together.shape[:2] == (3, 5)
    sequential = []
    for w in one_by_one(lora, weights, 3):
        lora.load(w)
        sequential.append(network.generate(**texts, **settings))
    for rows, expected in zip(together, sequential, strict=True):
        assert [until_padding(row) for row in rows] == [
            until_padding(row) for row in expected
        ]
    assert not torch.equal(together[0], together[1])
    lora.load(own)


# The network as an object.


@pytest.mark.parametrize("lead", [(), (3,)])
def test_the_adapter_is_back_after_an_exception_in_the_forward(
    lead: tuple[int, ...],
) -> None:
    network, texts = bert(), batch()
    expected = logits(network, texts)
    lora = pl.lift(network)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    head = network.base_model.model.classifier
    handle = head.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        bound_logits(lora, particles(lora, *lead), texts)
    handle.remove()
    assert torch.equal(logits(network, texts), expected)
    slots = [m for m in network.modules() if isinstance(m, LinearSlot)]
    assert len(slots) == 9
    assert [slot.bound for slot in slots] == [None] * 9


def test_a_lifted_network_can_be_copied_and_pickled() -> None:
    network, texts = bert(), batch()
    lora = pl.lift(network)
    weights = particles(lora, 3)
    expected, own = bound_logits(lora, weights, texts), logits(network, texts)
    copied = copy.deepcopy(lora)
    assert copied.network is not network
    copied.load({site: value[0] for site, value in weights.items()})
    assert torch.equal(logits(network, texts), own)
    assert torch.equal(bound_logits(copied, weights, texts), expected)
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    for unpickled in (
        pickle.loads(pickle.dumps(network)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(logits(unpickled, texts), own)
        assert torch.equal(bound_logits(pl.lift(unpickled), weights, texts), expected)


def test_lifting_again_gives_the_same_sites() -> None:
    network, texts = bert(), batch()
    lora = pl.lift(network)
    sites, weights = lora.sites, particles(lora, 3)
    expected = bound_logits(lora, weights, texts)
    del lora
    again = pl.lift(network)
    assert again.sites == sites
    assert torch.equal(bound_logits(again, weights, texts), expected)


def test_slots_do_not_stop_torch_compile() -> None:
    network, texts = bert(num_layers=1), batch()
    expected = logits(network, texts)
    pl.lift(network)
    assert any(isinstance(module, LinearSlot) for module in network.modules())
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    assert_close(logits(compiled, texts), expected, rtol=0, atol=1e-12)


class Reading(nn.Module):
    """A network that reads its batch's size, or what autograd doesn't follow."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.below, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.how = how

    def forward(self, x: Tensor, mixes: bool = True) -> Tensor:
        u = torch.tanh(self.below(x))
        fixed = u.detach()
        ones = torch.ones(1, len(u), dtype=u.dtype) / len(u)
        others = {
            "size": u / len(u),
            "places": u * torch.arange(len(u))[:, None],
            "first row": u - fixed[:1],
            "product": u - ones @ fixed,
            "running": u - fixed.cummax(0).values,
            "ranks": u + fixed[:, :1].argsort(0).argsort(0) / len(u),
            "counts": u + torch.bincount(u.argmax(1), minlength=4),
            "numpy": u - torch.as_tensor(fixed.numpy().mean(0)),
        }
        logits: Tensor = self.head(others[self.how] if mixes else u)
        return logits


@pytest.mark.parametrize(
    "how",
    [
        "size",
        "places",
        "first row",
        "product",
        "running",
        "ranks",
        "counts",
        "numpy",
    ],
)
def test_networks_that_read_their_batch_are_given_one_particles(how: str) -> None:
    network = adapted(Reading(how).double(), target_modules=["below"])
    lora = pl.lift(network)
    weights = particles(lora, 3)
    x = torch.randn(5, 4, dtype=torch.float64)
    for mixes in (False, True):  # a call of another form is another one
        expected = []
        for i in range(3):
            with lora.bind({s: w[i] for s, w in weights.items()}) as net:
                expected.append(net(x, mixes=mixes))
        with lora.bind(weights) as net:
            found = net(x, mixes=mixes)
        assert_close(found, torch.stack(expected), rtol=0, atol=1e-12)


def test_a_number_that_counts_steps_is_looked_at_a_few_times() -> None:
    class Stepped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor, step: int) -> Tensor:
            logits: Tensor = self.layer(x) / (1 + step)
            return logits

    network = adapted(Stepped().double(), target_modules=["layer"])
    lora = pl.lift(network)
    seen: list[int] = []
    network.register_forward_pre_hook(lambda *_: seen.append(1))
    x = torch.randn(5, 4, dtype=torch.float64)
    with lora.bind(particles(lora, 3)) as net:
        for step in range(100):
            if step == 50:
                seen.clear()
            net(x, step=step)
    assert len(seen) == 50


class ProductsOf(TorchDispatchMode):
    """Names of the products that give so many numbers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if "mm" in name and result.shape[-1] == self.size:
            self.names.append(name)
        return result


@pytest.mark.parametrize("num_particles", [None, 3])
def test_the_vocabulary_is_one_product_for_all_rows(num_particles: int | None) -> None:
    """Else its weights would be read once for each row."""
    lora = pl.lift(llama(None))
    texts = {**inputs(batch(4)), "logits_to_keep": 1}
    weights = lora.weights()
    if num_particles is not None:
        weights = particles(lora, num_particles)
    with torch.no_grad():
        with lora.bind(weights) as net:
            net(**texts)  # looks at the network
            with ProductsOf(VOCABULARY) as found:
                net(**texts)
    assert found.names == ["mm"]
