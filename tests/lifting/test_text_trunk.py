"""Draws that write texts run what no draw touches once, and change nothing."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Cache,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GPT2Config,
    JambaConfig,
    LogitsProcessor,
    Qwen3Config,
)

import pyro_lora as pl
from tests.lifting.liftable_row import EXPERTS, lora, tiny
from tests.networks import VOCABULARY, batch, inputs, llama, particles

NUM_PARTICLES, BATCH_SIZE, LENGTH, NEW = 3, 4, 6, 5
FOLDED = NUM_PARTICLES * BATCH_SIZE
HALF_HEADS = {"num_key_value_heads": 1, "head_dim": 8}


def on_top(config_class: Any, *targets: str, **config: Any) -> nn.Module:
    """Three layers, the last of which is adapted."""
    config = {"num_hidden_layers": 3, **config}
    network = tiny(config_class, AutoModelForCausalLM, **config)
    return lora(
        network,
        *(targets or ("q_proj", "v_proj")),
        task_type="CAUSAL_LM",
        layers_to_transform=[2],
        layers_pattern="h" if targets else None,
        fan_in_fan_out=config_class is GPT2Config,
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "Llama": lambda: llama(None, num_layers=3, layers_to_transform=[2]),
    "GPT-2": lambda: on_top(GPT2Config, "c_attn"),
    "Qwen3": lambda: on_top(Qwen3Config, **HALF_HEADS),
    "Bloom, a bias for each head": lambda: on_top(
        BloomConfig, "query_key_value", n_layer=3, n_head=2
    ),
}
SLIDING: dict[str, Callable[[], nn.Module]] = {
    "Gemma 3": lambda: on_top(Gemma3TextConfig, **HALF_HEADS, sliding_window=4)
}
ALL_AT_ONCE: dict[str, Callable[[], nn.Module]] = {
    "Gemma 3n, keys of lower layers in upper ones": lambda: on_top(
        Gemma3nTextConfig,
        **HALF_HEADS,
        num_kv_shared_layers=1,
        hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=VOCABULARY,
        laurel_rank=4,
        altup_num_inputs=2,
        layer_types=["full_attention"] * 3,
        activation_sparsity_pattern=None,
    ),
    "Jamba, a recurrent state": lambda: on_top(
        JambaConfig,
        num_key_value_heads=1,
        attn_layer_period=2,
        attn_layer_offset=0,
        num_experts=2,
        use_mamba_kernels=False,
        **EXPERTS,
    ),
}


@dataclass
class Seen:
    """What passes through a network: rows of its lowest layer, logits, caches."""

    rows: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    caches: list[Cache] = field(default_factory=list)

    @property
    def layer_rows(self) -> list[int]:
        """Rows of keys in the layers of the cache."""
        return [len(layer.keys) for layer in self.caches[-1].layers]


@contextmanager
def seen(lifted: pl.LiftedNetwork) -> Iterator[Seen]:
    network: Any = lifted.network
    stack = next(m for m in network.modules() if isinstance(m, nn.ModuleList))
    leaf = next(m for m in stack[0].modules() if not list(m.children()))
    result = Seen()

    def see(_: Any, args: Any, output: Any) -> None:
        result.logits.append(output.logits[:, -1])
        result.caches.extend(x for x in output.values() if isinstance(x, Cache))

    handles = [
        leaf.register_forward_pre_hook(
            lambda _, args: result.rows.append(len(args[0]))
        ),
        network.get_base_model().register_forward_hook(see),
    ]
    yield result
    for handle in handles:
        handle.remove()


class Chooses(LogitsProcessor):
    """The next tokens: given ones, the same for all draws, or each draw's likeliest.

    Args:
        tokens: Given ones, (B, T').
        noise: Gumbel noise, (T', V): a draw's tokens are then sampled.
    """

    def __init__(self, tokens: Tensor | None, noise: Tensor | None = None) -> None:
        self.tokens, self.noise, self.step = tokens, noise, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.tokens is not None:
            token = self.tokens[:, self.step].repeat(len(scores) // len(self.tokens))
            scores = torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0)
        elif self.noise is not None:
            scores = scores + self.noise[self.step]
        self.step += 1
        return scores


def one_text() -> Chooses:
    torch.manual_seed(5)
    return Chooses(torch.randint(3, VOCABULARY, (BATCH_SIZE, NEW)))


def likeliest() -> Chooses:
    return Chooses(None)


def sampled() -> Chooses:
    torch.manual_seed(5)
    noise = -torch.empty(NEW, VOCABULARY).exponential_().log()
    return Chooses(None, noise)


def prompts(
    batch_size: int = BATCH_SIZE, length: int = LENGTH, padded: bool = True
) -> dict[str, Tensor]:
    """Of different lengths, padded on the left."""
    if length == 1 or not padded:
        ids = torch.randint(1, VOCABULARY, (batch_size, length))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs(batch(batch_size, length, padding="left"))


def assert_draw_by_draw(
    lifted: pl.LiftedNetwork,
    weights: dict[str, Tensor],
    chooses: Callable[[], Chooses],
    texts: dict[str, Tensor],
    **changed: Any,
) -> Seen:
    """Compare tokens and logits to those of one draw after another."""
    options: dict[str, Any] = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "eos_token_id": -1,
        **changed,
    }
    with lifted.bind(weights) as net, seen(lifted) as together:
        tokens = net.generate(**texts, **options, logits_processor=[chooses()])
    for s, own in enumerate(tokens):
        one = {site: value[s] for site, value in weights.items()}
        with lifted.bind(one) as net, seen(lifted) as alone:
            expected = net.generate(**texts, **options, logits_processor=[chooses()])
        assert torch.equal(own[:, : expected.shape[1]], expected)
        for logits, theirs in zip(together.logits, alone.logits, strict=False):
            of_draw = logits.unflatten(0, (len(tokens), -1))[s]
            assert_close(of_draw, theirs, rtol=0, atol=1e-10)
    return together


@pytest.mark.grid
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("chooses", [one_text, likeliest, sampled])
def test_draws_are_as_one_after_another(
    name: str, chooses: Callable[[], Chooses]
) -> None:
    lifted = pl.lift(NETWORKS[name]())
    weights = particles(lifted, NUM_PARTICLES, spread=1.0)
    # Padding on the left gives Bloom NaNs in float64.
    texts = prompts(padded=not name.startswith("Bloom"))
    found = assert_draw_by_draw(lifted, weights, chooses, texts)
    together = NEW if chooses is one_text else 1
    assert found.rows == [BATCH_SIZE] * together + [FOLDED] * (NEW - together)
    kept = [x.numel() for x in tensors_of(found.caches[-1])]
    per_token = kept[-1] // (FOLDED * (LENGTH + NEW - 1))  # heads, their size
    own = 1 if chooses is one_text else NUM_PARTICLES
    expected = per_token * BATCH_SIZE * (LENGTH + own * (NEW - 1))
    assert sum(kept) == 4 * expected + 2 * kept[-1]  # keys and values of two layers


def tensors_of(cache: Any) -> list[Tensor]:
    """All keys and values that a cache keeps."""
    layers = [
        part
        for layer in cache.layers
        for part in (getattr(layer, "prompts", None), layer)
        if part is not None
    ]
    return [x for layer in layers for x in (layer.keys, layer.values)]


def test_rows_for_each_head_are_shared_in_a_call() -> None:
    lifted = pl.lift(NETWORKS["Bloom, a bias for each head"]())
    weights, texts = particles(lifted, NUM_PARTICLES, spread=1.0), prompts(padded=False)
    assert_call_is_draw_by_draw(lifted, weights, texts)


def assert_call_is_draw_by_draw(
    lifted: pl.LiftedNetwork, weights: dict[str, Tensor], texts: dict[str, Tensor]
) -> None:
    with lifted.bind(weights) as net:
        logits = net(**texts).logits
    for s, own in enumerate(logits):
        with lifted.bind({site: value[s] for site, value in weights.items()}) as net:
            assert_close(own, net(**texts).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SLIDING)
@pytest.mark.parametrize("chooses", [one_text, likeliest])
def test_windows_that_slide_are_copied_where_texts_begin_to_differ(
    name: str, chooses: Callable[[], Chooses]
) -> None:
    lifted = pl.lift(SLIDING[name]())
    weights = particles(lifted, NUM_PARTICLES, spread=1.0)
    found = assert_draw_by_draw(lifted, weights, chooses, prompts())
    together = NEW if chooses is one_text else 1
    assert found.rows == [BATCH_SIZE] * together + [FOLDED] * (NEW - together)
    of_trunk = BATCH_SIZE if chooses is one_text else FOLDED
    assert found.layer_rows == [of_trunk, of_trunk, FOLDED]


@pytest.mark.grid
@pytest.mark.parametrize("name", ALL_AT_ONCE)
@pytest.mark.parametrize("chooses", [one_text, likeliest])
def test_layers_that_leave_more_than_their_outputs_are_never_shared(
    name: str, chooses: Callable[[], Chooses]
) -> None:
    lifted = pl.lift(ALL_AT_ONCE[name]())
    weights, texts = particles(lifted, NUM_PARTICLES, spread=1.0), prompts()
    found = assert_draw_by_draw(lifted, weights, chooses, texts)
    assert set(found.rows) <= {FOLDED, 2}  # Gemma 3n's states have another dim first
    assert_call_is_draw_by_draw(lifted, weights, texts)


@pytest.mark.parametrize(
    ("changed", "rows"),
    [
        ({"use_cache": False}, [BATCH_SIZE] + [FOLDED] * (NEW - 1)),
        ({"cache_implementation": "static"}, [FOLDED] * NEW),
        ({"num_beams": 2}, [2 * FOLDED] * NEW),
    ],
)
def test_other_caches_and_beams(changed: dict[str, Any], rows: list[int]) -> None:
    lifted = pl.lift(NETWORKS["Llama"]())
    weights = particles(lifted, NUM_PARTICLES, spread=1.0)
    if "num_beams" in changed:
        with lifted.bind(weights) as net, seen(lifted) as found:
            net.generate(**prompts(), max_new_tokens=NEW, eos_token_id=-1, **changed)
    else:
        found = assert_draw_by_draw(lifted, weights, likeliest, prompts(), **changed)
    assert found.rows == rows


def test_a_cache_that_is_given_to_the_caller_holds_every_draw() -> None:
    lifted = pl.lift(NETWORKS["Llama"]())
    with lifted.bind(particles(lifted, NUM_PARTICLES)) as net, seen(lifted) as found:
        net.generate(**prompts(), max_new_tokens=2, return_dict_in_generate=True)
    assert found.layer_rows == [FOLDED] * 3


def test_texts_end_at_different_places() -> None:
    lifted = pl.lift(NETWORKS["Llama"]())
    weights, texts = particles(lifted, NUM_PARTICLES, spread=1.0), prompts()
    with lifted.bind(weights) as net:
        free = net.generate(**texts, max_new_tokens=NEW, eos_token_id=-1)
    end = int(free[1, 0, LENGTH + 1])  # the second token that draw 1 generates
    assert_draw_by_draw(lifted, weights, likeliest, texts, eos_token_id=end)


def test_dropout_is_each_draw_s_own() -> None:
    network = on_top(GPT2Config, "c_attn", attn_pdrop=0.5)
    lifted = pl.lift(network)
    same = {s: w.expand(3, *w.shape) for s, w in lifted.weights().items()}
    network.train()
    with lifted.bind(same) as net, seen(lifted) as found:
        net.generate(**prompts(), max_new_tokens=2)
    assert found.rows == [FOLDED] * 2
    first = found.logits[0].unflatten(0, (3, -1))
    assert (first[0] - first[1]).abs().min() > 1e-6


@functools.cache
def lifted_from(first: int, positions: int) -> pl.LiftedNetwork:
    """Three layers, adapted from the given one on."""
    torch.manual_seed(first)
    adapted = list(range(first, 3))
    if positions:  # a table of as many rows
        return pl.lift(
            lora(
                tiny(
                    GPT2Config,
                    AutoModelForCausalLM,
                    num_hidden_layers=3,
                    max_position_embeddings=positions,
                ),
                "c_attn",
                fan_in_fan_out=True,
                task_type="CAUSAL_LM",
                layers_to_transform=adapted,
                layers_pattern="h",
            )
        )
    return pl.lift(llama(None, num_layers=3, layers_to_transform=adapted))


@settings(max_examples=15, deadline=None)
@given(
    num=st.integers(2, 4),
    size=st.integers(1, 4),
    length=st.integers(1, 9),
    first=st.integers(0, 2),
    positions=st.sampled_from([0, 16]),
    spread=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_any_sizes(
    num: int, size: int, length: int, first: int, positions: int, spread: float
) -> None:
    lifted = lifted_from(first, positions)
    weights = particles(lifted, num, spread=spread)
    texts = prompts(size, length)
    found = assert_draw_by_draw(lifted, weights, likeliest, texts)
    if first == 0:
        assert found.rows == [num * size] * NEW
    else:
        assert found.rows[0] == size
        # Once texts differ, their draws stay apart.
        assert sorted(found.rows) == found.rows
