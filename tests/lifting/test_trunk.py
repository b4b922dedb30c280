"""Layers below the first adapted one run once for all particles, and change nothing."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, DebertaV2Config

import pyro_lora as pl
from pyro_lora.lifting.cached_trunk import trunk_once
from tests.networks import adapted, batch, bert, inputs, llama, particles


def bert_on_top(**settings: Any) -> PeftModel:
    return bert(3, num_layers=3, layers_to_transform=[2], **settings)


def llama_on_top() -> PeftModel:
    return llama(3, num_layers=3, layers_to_transform=[2])


def layers(network: PeftModel) -> nn.ModuleList:
    """The stack of its three layers."""
    return next(
        module for module in network.modules() if isinstance(module, nn.ModuleList)
    )


@contextmanager
def rows_seen(network: PeftModel) -> Iterator[list[int]]:
    """How many rows each layer was called with."""
    seen: list[int] = []
    handles = [
        next(
            m for m in layer.modules() if isinstance(m, nn.Linear)
        ).register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
        for layer in layers(network)
    ]
    yield seen
    for handle in handles:
        handle.remove()


def loop(
    lora: pl.LiftedNetwork,
    weights: dict[str, Tensor],
    call: Callable[[Any], Tensor],
) -> list[Tensor]:
    outputs = []
    for i in range(next(iter(weights.values())).shape[0]):
        with lora.bind({site: value[i] for site, value in weights.items()}) as net:
            outputs.append(call(net))
    return outputs


@pytest.mark.parametrize("kind", [bert_on_top, llama_on_top])
@pytest.mark.parametrize("length", [7, 15, 5])
def test_particles_are_a_loop_over_one_particle(
    kind: Callable[[], PeftModel], length: int
) -> None:
    network, texts = kind(), inputs(batch(length=length))
    lora = pl.lift(network)
    weights = particles(lora, 3)
    with lora.bind(weights) as net, rows_seen(network) as seen:
        together = net(**texts).logits
    # With 15 tokens in each of 3 x 5 rows, rows and tokens can't be told apart; one
    # particle is run first, to see that rows come first.
    assert seen == ([5, 5, 5, 15, 15, 15] if length == 15 else [5, 5, 15])
    expected = loop(lora, weights, lambda net: net(**texts).logits)
    assert_close(together, torch.stack(expected), rtol=0, atol=1e-12)


class Products(TorchFunctionMode):
    """Rows of each product with one of the weights in question."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self._weights = [*weights]
        self.rows: list[int] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is F.linear and any(args[1] is w for w in self._weights):
            self.rows.append(len(args[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [bert_on_top, llama_on_top])
@pytest.mark.parametrize("cached", [False, True])
def test_frozen_parts_of_the_first_adapted_layer_read_one_copy(
    kind: Callable[[], PeftModel], cached: bool
) -> None:
    network = kind()
    lora = pl.lift(network)
    names = ("query.base", "key", "value.base", "q_proj.base", "k_proj", "v_proj.base")
    frozen = {
        name: p
        for name, p in layers(network)[2].named_parameters()
        if "lora" not in name
    }
    read = [p for name, p in frozen.items() if any(n in name for n in names)]
    dense = [p for n, p in frozen.items() if "output.dense" in n or "down_proj" in n]
    calls = [(num, inputs(batch(size, 6))) for num, size in [(3, 5), (2, 1), (4, 2)]]
    for num, texts in calls * 2:
        weights = {s: x.requires_grad_() for s, x in particles(lora, num).items()}
        size = len(texts["input_ids"])

        def gradients(logits: Tensor, weights: Any = weights) -> Any:
            return torch.autograd.grad(logits.square().sum(), list(weights.values()))

        one_by_one = torch.stack(
            loop(lora, weights, lambda net, x=texts: net(**x).logits)
        )
        with (
            pl.cached_trunk(lora) if cached else nullcontext(),
            lora.bind(weights) as net,
            Products([w for w in read if w.ndim == 2]) as seen,
            Products([w for w in dense if w.ndim == 2]) as above,
        ):
            together = net(**texts).logits
        assert seen.rows == [size] * 3
        assert set(above.rows) == {num * size}
        assert_close(together, one_by_one, rtol=0, atol=1e-12)
        assert_close(gradients(together), gradients(one_by_one), rtol=1e-10, atol=1e-12)


class Written(nn.Module):
    """A layer that adds what its adapter makes to its input, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.adapter, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        before = self.frozen(x)
        x += self.adapter(x.clone())
        return before * self.frozen(x)


def test_copies_that_were_written_into_are_read_by_each_particle() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), Written()])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    network = Stack().double().eval().requires_grad_(False)
    network.layers[1].adapter.requires_grad_()
    lora = pl.lift(network)
    x = torch.randn(5, 4, dtype=torch.float64)
    weights = particles(lora, 3)
    expected = loop(lora, weights, lambda net: net(x))
    frozen = network.layers[1].frozen.weight
    for _ in range(2):  # the first call of its form is looked at more closely
        with lora.bind(weights) as net, Products([frozen]) as seen:
            together = net(x)
        assert seen.rows[-2:] == [5, 15]
        assert_close(together, torch.stack(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("change", ["training", "requires_grad"])
def test_parts_that_may_differ_between_particles_are_read_by_each(change: str) -> None:
    network, texts = bert_on_top(), inputs(batch())
    lora = pl.lift(network)
    weights = particles(lora, 3)
    key = layers(network)[2].attention.self.key
    with lora.bind(weights) as net, Products([key.weight]) as seen:
        net(**texts)
        key.train() if change == "training" else key.requires_grad_()
        net(**texts)
    assert seen.rows == [5, 15]


def test_gradients_are_those_of_the_loop() -> None:
    network, texts = bert_on_top(), inputs(batch())
    lora = pl.lift(network)
    weights = {k: v.requires_grad_() for k, v in particles(lora, 3).items()}
    with lora.bind(weights) as net:
        together = net(**texts).logits.square().sum()
    one_by_one = loop(lora, weights, lambda net: net(**texts).logits.square().sum())
    gradients = torch.autograd.grad(together, list(weights.values()))
    expected = torch.autograd.grad(sum(one_by_one), list(weights.values()))
    assert_close(gradients, expected, rtol=1e-10, atol=1e-12)


def test_a_key_value_cache_goes_on_with_every_particle() -> None:
    network = llama(None, num_layers=3, layers_to_transform=[2])
    lora = pl.lift(network)
    weights, texts = particles(lora, 3), inputs(batch(padding="left"))
    ids, mask = texts["input_ids"], texts["attention_mask"]
    places = (mask.cumsum(1) - 1).clamp(min=0)

    def in_two_parts(net: Any) -> Tensor:
        first = net(
            ids[:, :4],
            attention_mask=mask[:, :4],
            position_ids=places[:, :4],
            use_cache=True,
        )
        [(name, cache)] = [
            (k, x) for k, x in first.items() if not isinstance(x, Tensor)
        ]
        rows.append([len(layer.keys) for layer in cache.layers])
        logits: Tensor = net(
            ids[:, 4:],
            attention_mask=mask,
            position_ids=places[:, 4:],
            **{name: cache},
        ).logits
        return logits

    rows: list[list[int]] = []
    with lora.bind(weights) as net:
        together = in_two_parts(net)
        whole = net(ids, attention_mask=mask, position_ids=places).logits
    assert rows == [[5, 5, 15]]
    assert_close(together, whole[:, :, 4:], rtol=0, atol=1e-10)


def test_every_layers_states_are_there_when_asked_for() -> None:
    network, texts = bert_on_top(), inputs(batch())
    lora = pl.lift(network)
    weights = particles(lora, 3)
    with lora.bind(weights) as net:
        states = net(**texts, output_hidden_states=True).hidden_states
    assert [state.shape for state in states] == [(3, 5, 7, 16)] * 4


def test_dropout_stays_independent_between_particles() -> None:
    network, texts = bert_on_top(dropout=0.5), inputs(batch())
    lora = pl.lift(network)
    same = {k: v.expand(3, *v.shape) for k, v in lora.weights().items()}
    with lora.bind(same) as net, rows_seen(network) as seen:
        net(**texts)
    assert seen == [5, 5, 15]
    network.train()
    with lora.bind(same) as net, rows_seen(network) as seen:
        logits = net(**texts).logits
    assert seen == [15, 15, 15]
    assert (logits[0] - logits[1]).abs().min() > 1e-6
    network.eval()
    with lora.bind(same) as net:
        logits = net(**texts).logits
    assert_close(logits[0], logits[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"num_beams": 2}])
def test_generate_equals_sequential_calls(settings: dict[str, Any]) -> None:
    network = llama(None, num_layers=3, layers_to_transform=[2])
    texts = inputs(batch(padding="left"))
    # No end of a text: every row of every particle is as long as the others.
    settings = {
        "max_new_tokens": 12,
        "do_sample": False,
        "eos_token_id": -1,
        **settings,
    }
    lora = pl.lift(network)
    weights = particles(lora, 3, spread=1.0)
    with lora.bind(weights) as net:
        together = net.generate(**texts, **settings)
    expected = loop(lora, weights, lambda net: net.generate(**texts, **settings))
    assert torch.equal(together, torch.stack(expected))
    assert not torch.equal(together[0], together[1])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("kind", [bert_on_top, llama_on_top])
def test_gradients_are_equal_with_checkpointing(kind: Callable[[], PeftModel]) -> None:
    network, texts = kind(), inputs(batch())
    lora = pl.lift(network)
    weights = {k: v.requires_grad_() for k, v in particles(lora, 3).items()}

    def gradients() -> tuple[Tensor, ...]:
        with lora.bind(weights) as net:
            loss = net(**texts).logits.square().sum()
        return torch.autograd.grad(loss, list(weights.values()))

    expected = gradients()
    settings = {"use_reentrant": False, "context_fn": lora.context_fn}
    network.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    network.train()
    assert_close(gradients(), expected, rtol=0, atol=1e-12)


def test_the_layers_are_as_before_after_a_call_and_after_an_exception() -> None:
    network, texts = bert_on_top(), inputs(batch())
    expected = network(**texts).logits
    lora = pl.lift(network)
    weights = particles(lora, 3)
    with lora.bind(weights) as net:
        net(**texts)
    assert torch.equal(network(**texts).logits, expected)
    handle = layers(network)[1].register_forward_hook(lambda *_: 1 / 0)
    with lora.bind(weights) as net, pytest.raises(ZeroDivisionError):
        net(**texts)
    handle.remove()
    assert not any("forward" in vars(layer) for layer in layers(network))
    assert torch.equal(network(**texts).logits, expected)


def deberta_on_top() -> PeftModel:
    """Its layers are given a table of 8 relative positions."""
    config = DebertaV2Config(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        relative_attention=True,
        position_buckets=4,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
        pad_token_id=0,
    )
    network = AutoModelForSequenceClassification.from_config(config).double()
    return adapted(
        network,
        target_modules=["value_proj"],
        task_type="SEQ_CLS",
        layers_to_transform=[2],
        layers_pattern="layer",
    )


@pytest.mark.parametrize("kind", [deberta_on_top, bert_on_top])
@pytest.mark.parametrize("first", [(2, 4), (2, 3)])
def test_tables_of_as_many_rows_as_the_folded_batch(
    kind: Callable[[], PeftModel], first: tuple[int, int]
) -> None:
    network = kind()
    lora = pl.lift(network)
    # 8 relative positions of DeBERTa, 32 positions of BERT
    for num, size in [first, (2, 4), (4, 2), (8, 1), (3, 3), (4, 8), (8, 4)]:
        weights, texts = particles(lora, num), inputs(batch(size, 5))
        expected = loop(lora, weights, lambda net, x=texts: net(**x).logits)
        with lora.bind(weights) as net, rows_seen(network) as seen:
            logits = net(**texts).logits
        assert_close(logits, torch.stack(expected), rtol=1e-10, atol=1e-10)
        calls = len(seen) // 3  # the table goes through a layer of DeBERTa's, too
        assert seen[::calls] == [size, size, num * size]


class Pooled(nn.Module):
    """Reads what each of its layers gives, and not the last one's alone."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])
        self.how = how

    def forward(self, x: Tensor, lowest: float = True) -> Tensor:
        states = [torch.tanh(self.layers[0](x))]
        for layer in self.layers[1:]:
            states.append(torch.tanh(layer(states[-1])))
        if self.how == "one by one":
            total = states[-1]
            for state in states[:-1]:
                total = total + state
            return total
        if self.how == "skipped" and lowest:
            return states[-1] * states[0]
        if self.how == "signs":
            return torch.where(states[0] > 0, states[-1], -states[-1])
        if self.how == "a decision":
            return states[-1] if states[0].sum() > 1e6 else -states[-1]
        if self.how == "kept":
            self.kept = states[0]
            return torch.tanh(states[-1])
        return states[-1] if self.how == "skipped" else torch.stack(states).mean(0)


HOW = ["stacked", "one by one", "skipped", "signs", "a decision", "kept"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("size", [1, 5])
def test_a_network_that_reads_all_layers_has_no_trunk(
    how: str, cached: bool, size: int
) -> None:
    network = adapted(Pooled(how).double(), target_modules=["layers.3"])
    lora = pl.lift(network)
    x = torch.randn(size, 4, dtype=torch.float64)
    for num in (1, 3):
        weights = particles(lora, num)
        expected = loop(lora, weights, lambda net: net(x))
        if cached:
            weights = {s: w.requires_grad_() for s, w in weights.items()}
            with pl.cached_trunk(lora), lora.bind(weights) as net:
                with pytest.raises(ValueError, match="is read elsewhere"):
                    net(x)
            return
        with lora.bind(weights) as net:
            for _ in range(2):
                assert_close(net(x), torch.stack(expected), rtol=0, atol=1e-12)


def test_each_form_of_call_is_looked_at() -> None:
    network = adapted(Pooled("skipped").double(), target_modules=["layers.3"])
    lora = pl.lift(network)
    weights, x = particles(lora, 3), torch.randn(5, 4, dtype=torch.float64)
    for lowest in (False, 0.0, 0.5, True, 0.0):
        expected = loop(lora, weights, lambda net, how=lowest: net(x, lowest=how))
        with lora.bind(weights) as net:
            together = net(x, lowest=lowest)
        assert_close(together, torch.stack(expected), rtol=0, atol=1e-12)


def test_a_wrong_call_takes_no_trunk_away() -> None:
    network, texts = bert_on_top(), inputs(batch())
    lora = pl.lift(network)
    weights = particles(lora, 3)
    with lora.bind(weights) as net:
        with pytest.raises(IndexError):
            net(**{**texts, "input_ids": texts["input_ids"] + 1000})
        assert "forward" not in vars(layers(network)[0])
        with rows_seen(network) as seen:
            net(**texts)
    assert seen[:3] == [5, 5, 15]


class Layers(nn.Module):
    """A network of layers, and what it does with them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.first, self.noise = nn.Linear(4, 4), nn.Dropout(0.5)
        self.bias = nn.Parameter(torch.randn(6, 4), requires_grad=False)
        self.how = how

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        if self.how == "called twice":
            return self.run(x) * self.run(x.flip(1))
        if self.how == "in a loop":
            return self.run(self.run(x))
        if self.how == "again at times":
            return self.run(self.run(x)) if x[0, 0] > 0 else self.run(x)
        if self.how == "the other way":
            return self.layers[2](self.layers[0](self.layers[1](x)))
        if self.how == "after an adapted one":
            return self.run(self.first(x))
        return self.run(x)


@pytest.mark.parametrize(
    "how", ["called twice", "in a loop", "the other way", "after an adapted one"]
)
@pytest.mark.parametrize("in_chunks", [False, True])
def test_layers_that_are_no_chain_have_no_trunk(how: str, in_chunks: bool) -> None:
    targets = ["layers.2"] + (["first"] if how == "after an adapted one" else [])
    network = adapted(Layers(how).double(), target_modules=targets)
    lora = pl.lift(network)
    zeros = {s: torch.zeros(3, *x.shape).to(x) for s, x in lora.weights().items()}
    with lora.bind(zeros) as net:  # all particles are the same there
        net(torch.randn(5, 4).double())
    weights = particles(lora, 4)
    x = torch.randn(5, 4, dtype=torch.float64)
    expected = torch.stack(loop(lora, weights, lambda net: net(x)))
    with trunk_once([lora] if in_chunks else []):
        for rows in ([0, 1, 2, 3], [0, 1], [2, 3], [1]):
            with lora.bind({s: w[rows] for s, w in weights.items()}) as net:
                for _ in range(2):
                    assert_close(net(x), expected[rows], rtol=0, atol=1e-12)
    leaves = {s: w[0].requires_grad_() for s, w in weights.items()}
    with pl.cached_trunk(lora), lora.bind(leaves) as net:
        with pytest.raises(ValueError, match=r"run once and\s+in order"):
            net(x)


def test_layers_that_run_again_for_some_batches_run_as_they_are() -> None:
    network = adapted(Layers("again at times").double(), target_modules=["layers.2"])
    lora = pl.lift(network)
    weights, x = particles(lora, 3), torch.randn(5, 4, dtype=torch.float64)
    x[0, 0] = -1.0
    with trunk_once([lora]):
        for value in (-1.0, -1.0, 1.0, 1.0, -1.0):
            given = x.clone()
            given[0, 0] = value
            expected = loop(lora, weights, lambda net, x=given: net(x))
            with lora.bind(weights) as net:
                for _ in range(2):
                    found = net(given)
            assert_close(found, torch.stack(expected), rtol=0, atol=1e-12)


class Biased(nn.Module):
    """Layers that are given a table, (6, 4), in the place of rows of data."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([BiasedLayer() for _ in range(3)])
        self.table = nn.Parameter(torch.randn(6, 4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, self.table)
        return x


class BiasedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return torch.tanh(self.linear(x) + table.sum(0) * table[-1])


@pytest.mark.parametrize("first", [(3, 5), (3, 2), (2, 1)])
def test_a_table_of_as_many_rows_by_chance_is_given_whole(
    first: tuple[int, int],
) -> None:
    network = adapted(Biased().double(), target_modules=["layers.2.linear"])
    lora = pl.lift(network)
    for num, size in (first, (3, 2), (6, 1), (2, 3), (3, 4)):
        weights, x = particles(lora, num), torch.randn(size, 4, dtype=torch.float64)
        expected = loop(lora, weights, lambda net, x=x: net(x))
        with lora.bind(weights) as net:
            assert_close(net(x), torch.stack(expected), rtol=0, atol=1e-12)


class Noisy(nn.Module):
    """A layer with dropout of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn_like(x) if isinstance(self.dropout, nn.Identity) else 0
        x = self.linear(self.dropout(x)) + noise
        return torch.tanh(x)


@pytest.mark.parametrize("always", [False, True])
def test_random_numbers_below_the_adapter_are_each_particles_own(always: bool) -> None:
    network = adapted(
        nn.Sequential(nn.ModuleList([Noisy() for _ in range(3)])).double(),
        target_modules=["0.2.linear"],
    )
    stack = network.base_model.model[0]
    network.base_model.model.forward = lambda x: stack[2](stack[1](stack[0](x)))
    if always:
        stack[0].dropout = nn.Identity().eval()
    else:
        stack[1].dropout.train()
    lora = pl.lift(network)
    same = {s: x.expand(3, *x.shape) for s, x in lora.weights().items()}
    x = torch.randn(5, 4, dtype=torch.float64)
    with trunk_once([lora]), lora.bind(same) as net:
        one, two = net(x), net(x)
    assert (one[0] - one[1]).abs().amax() > 1e-6
    assert (one - two).abs().amax() > 1e-6
