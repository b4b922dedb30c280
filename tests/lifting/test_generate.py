"""Text generation with several adapters at once equals one PEFT model after another."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, pad
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    Gemma3TextConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MixtralConfig,
    Qwen3Config,
)

import pyro_lora as pl
from tests.lifting.liftable_row import EXPERTS, gpt2, lora, tiny
from tests.networks import PAD, VOCABULARY, batch, inputs, llama, particles, t5

NUM_PARTICLES = 3
HALF_HEADS = {"num_key_value_heads": 1, "head_dim": 8}


def seq2seq() -> nn.Module:
    network = t5(decoder_start_token_id=PAD)
    return lora(network, "q", "v", task_type="SEQ_2_SEQ_LM")


def causal(config_class: Any, **config: Any) -> nn.Module:
    network = tiny(config_class, **config)
    return lora(network, "q_proj", "v_proj", task_type="CAUSAL_LM")


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "Llama": lambda: llama(None),
    "GPT-2": lambda: lora(
        gpt2(AutoModelForCausalLM), "c_attn", fan_in_fan_out=True, task_type="CAUSAL_LM"
    ),
    "Qwen3": lambda: causal(Qwen3Config, **HALF_HEADS),
    "Gemma 3, sliding window": lambda: causal(
        Gemma3TextConfig, **HALF_HEADS, sliding_window=4
    ),
    "Mixtral, a mixture of experts": lambda: causal(
        MixtralConfig, num_local_experts=3, num_key_value_heads=1, **EXPERTS
    ),
    "T5, encoder and decoder": seq2seq,
}


def prompts(batch_size: int = 4, length: int = 6) -> dict[str, Tensor]:
    """Prompts of different lengths, padded on the left."""
    return inputs(batch(batch_size, length, padding="left"))


def one_after_another(
    lifted: pl.LiftedNetwork,
    weights: dict[str, Tensor],
    generate: Callable[[Any], Any],
) -> list[Any]:
    """What a copy of the PEFT model generates with each particle as its adapter."""
    alone = copy.deepcopy(lifted)
    generated = []
    for particle in range(NUM_PARTICLES):
        alone.load({site: value[particle] for site, value in weights.items()})
        generated.append(generate(alone.network))
    return generated


def stacked(tokens: list[Tensor]) -> Tensor:
    """Rows of different lengths, filled up with padding, one block a particle."""
    length = max(rows.shape[-1] for rows in tokens)
    return torch.stack([pad(r, (0, length - r.shape[-1]), value=PAD) for r in tokens])


def in_both_ways(
    lifted: pl.LiftedNetwork, weights: dict[str, Tensor], **settings: Any
) -> tuple[Tensor, Tensor]:
    """Tokens of all particles at once, and of one PEFT model after another."""
    with lifted.bind(weights) as net:
        together = net.generate(**settings)
    alone = one_after_another(lifted, weights, lambda n: n.generate(**settings))
    return together, stacked(alone)


@pytest.mark.grid
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_tokens_are_those_of_one_adapter_after_another(
    name: str, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    lifted = pl.lift(NETWORKS[name]())
    weights = particles(lifted, NUM_PARTICLES, spread=1.0)
    together, alone = in_both_ways(
        lifted, weights, **prompts(), max_new_tokens=8, do_sample=False, **settings
    )
    assert torch.equal(together, alone)
    assert not torch.equal(together[0], together[1])
    # All at once: no message that says why they aren't.
    assert not [r for r in caplog.records if r.name.startswith("pyro_lora")]


def test_with_the_cache_only_new_tokens_are_computed() -> None:
    lifted = pl.lift(llama(None))
    weights, settings = particles(lifted, 3, spread=1.0), prompts()
    lengths: list[int] = []
    network: Any = lifted.network
    network.get_base_model().register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]),
        with_kwargs=True,
    )
    with lifted.bind(weights) as net:
        cached = net.generate(**settings, max_new_tokens=5, do_sample=False)
        assert lengths == [6, 1, 1, 1, 1]
        uncached = net.generate(
            **settings, max_new_tokens=5, do_sample=False, use_cache=False
        )
        assert lengths[5:] == [6, 7, 8, 9, 10]
    assert torch.equal(cached, uncached)


def test_particles_stop_at_different_lengths() -> None:
    lifted = pl.lift(llama(None))
    weights = particles(lifted, NUM_PARTICLES, spread=1.0)
    settings = {**prompts(2), "max_new_tokens": 8, "do_sample": False}
    with lifted.bind(weights) as net:
        free = net.generate(**settings)
    end = int(free[1, 0, 7])  # the second token that particle 1 generates
    together, alone = in_both_ways(lifted, weights, eos_token_id=end, **settings)
    assert torch.equal(together, alone)
    lengths = (together[:, :, 6:] != PAD).sum(-1)
    assert int(lengths[1, 0]) == 2
    assert int(lengths.max()) > 2


@pytest.mark.parametrize("lead", [(1,), (3, 1), (3, 1, 1)])
def test_particle_dims_of_the_tokens(lead: tuple[int, ...]) -> None:
    lifted = pl.lift(llama(None))
    weights = particles(lifted, *lead, spread=1.0)
    settings = {**prompts(), "max_new_tokens": 3, "do_sample": False}
    with lifted.bind(weights) as net:
        together = net.generate(**settings)
    flat = {s: w.reshape(-1, *w.shape[len(lead) :]) for s, w in weights.items()}
    with lifted.bind(flat) as net:
        expected = net.generate(**settings)
    kept = lead if len(lead) == 1 else lead[:-1]
    assert together.shape == (*kept, 4, 9)
    assert torch.equal(together.reshape(expected.shape), expected)


def test_several_sequences_of_a_prompt() -> None:
    lifted = pl.lift(llama(None))
    weights = particles(lifted, NUM_PARTICLES, spread=1.0)
    settings = {**prompts(), "max_new_tokens": 4, "do_sample": False}
    together, alone = in_both_ways(
        lifted, weights, num_beams=3, num_return_sequences=2, **settings
    )
    assert together.shape == (3, 8, 10)
    assert torch.equal(together, alone)


def test_scores_come_by_particle() -> None:
    lifted = pl.lift(llama(None))
    weights = particles(lifted, NUM_PARTICLES, spread=1.0)
    settings: dict[str, Any] = {
        **prompts(),
        "max_new_tokens": 3,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with lifted.bind(weights) as net:
        together = net.generate(**settings)
    alone = one_after_another(lifted, weights, lambda n: n.generate(**settings))
    assert len(together.logits) == 3
    for step, logits in enumerate(together.logits):
        expected = torch.stack([out.logits[step] for out in alone])
        assert_close(logits, expected, rtol=0, atol=1e-12)


# Sampling.

NUM_DRAWS = 4000
END = 2  # Llama's own end-of-text token, after which comes padding
PROMPT = torch.tensor([[5, 23, 42]])


class GumbelNoise(LogitsProcessor):
    """Makes the most likely token a draw, by a generator of its own."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # -log E is Gumbel noise, E ~ Exponential(1).
        noise = torch.empty_like(scores).exponential_(generator=self.generator)
        return scores - noise.log()


def by_global_seed(net: Any, seed: int) -> Tensor:
    """Two new tokens from each of the prompts, by transformers' own sampling."""
    torch.manual_seed(seed)
    ids = PROMPT.repeat(NUM_DRAWS, 1)
    settings = {"max_new_tokens": 2, "do_sample": True, "top_k": 0}
    tokens = net.generate(input_ids=ids, attention_mask=ids.clamp(max=1), **settings)
    assert isinstance(tokens, Tensor)
    return tokens


def by_generator(net: Any, seed: int) -> Tensor:
    """The same, whatever the global random state."""
    ids = PROMPT.repeat(NUM_DRAWS, 1)
    tokens = net.generate(
        input_ids=ids,
        attention_mask=ids.clamp(max=1),
        max_new_tokens=2,
        do_sample=False,
        logits_processor=LogitsProcessorList([GumbelNoise(seed)]),
    )
    assert isinstance(tokens, Tensor)
    return tokens


@torch.no_grad()
def token_probs(network: Any) -> Tensor:
    """Probabilities of the two tokens after the prompt, (2, V), from logits alone."""
    continued = torch.cat(
        [PROMPT.repeat(VOCABULARY, 1), torch.arange(VOCABULARY)[:, None]], 1
    )
    probs = network(input_ids=continued).logits.softmax(-1)  # (V, T, V)
    first = probs[0, -2]
    probs[END, -1] = one_hot(torch.tensor(PAD), VOCABULARY).to(probs.dtype)
    return torch.stack([first, first @ probs[:, -1]])


def standardised_errors(tokens: Tensor, probs: Tensor) -> Tensor:
    """Errors of relative frequencies in units of their standard errors, (S, V).

    Args:
        tokens: Draws, (S, n).
        probs: What they should be drawn from, (S, V).
    """
    num_draws = tokens.shape[1]
    counts = torch.stack([row.bincount(minlength=VOCABULARY) for row in tokens])
    standard_error = (probs * (1 - probs) / num_draws).sqrt()
    errors = (counts / num_draws - probs) / standard_error
    return errors.where(probs * num_draws > 5, 0)  # counts too small to be normal


@pytest.mark.parametrize("sample", [by_global_seed, by_generator])
def test_every_particle_samples_from_its_own_distribution(
    sample: Callable[[Any, int], Tensor],
) -> None:
    lifted = pl.lift(llama(None))
    weights = particles(lifted, NUM_PARTICLES, spread=0.5)
    probs = torch.stack(one_after_another(lifted, weights, token_probs))  # (S, 2, V)
    with lifted.bind(weights) as net:
        tokens = sample(net, 0)
        again, other = sample(net, 0), sample(net, 1)
    assert torch.equal(tokens, again)
    assert not torch.equal(tokens, other)
    for step in range(2):
        drawn = tokens[:, :, PROMPT.shape[1] + step]
        errors = standardised_errors(drawn, probs[:, step])
        assert (errors != 0).sum() > 80
        # All of 150 normal errors are below 4.5 with probability 0.999.
        assert errors.abs().max() < 4.5
        # The check tells particles apart.
        assert standardised_errors(drawn.roll(1, 0), probs[:, step]).abs().max() > 10


def test_the_original_network_samples_as_one_particle_does() -> None:
    lifted = pl.lift(llama(None))
    weights = particles(lifted, 1)
    with lifted.bind(weights) as net:
        tokens = by_global_seed(net, 0)
    lifted.load({site: value[0] for site, value in weights.items()})
    assert torch.equal(tokens[0], by_global_seed(lifted.network, 0))


def bart() -> nn.Module:
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=32,
        init_std=0.3,
        pad_token_id=PAD,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    return AutoModelForSeq2SeqLM.from_config(config)


@pytest.mark.grid
@pytest.mark.parametrize("length", [5, 6, 12])  # 6 = S * B, as the folded batch
@pytest.mark.parametrize(
    ("network", "table"),
    [
        (
            lambda: seq2seq().get_base_model(),
            "encoder.block.0.layer.0.SelfAttention.rel",
        ),  # type: ignore[operator]
        (lambda: seq2seq().get_base_model(), "relative_attention_bias"),  # type: ignore[operator]
        (bart, "decoder.embed_positions"),
    ],
)
def test_tables_of_positions_have_no_batch(
    network: Callable[[], nn.Module], table: str, length: int
) -> None:
    torch.manual_seed(0)
    plain: Any = network().double().eval()
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(table in name)
    lora = pl.lift(plain)
    weights = particles(lora, NUM_PARTICLES, spread=3.0)
    ids = torch.randint(3, VOCABULARY, (2, length))
    settings: dict[str, Any] = {
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "do_sample": False,
        "num_beams": 1,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with lora.bind(weights) as net:
        logits = torch.stack(net.generate(ids, **settings).logits)  # (4, S, B, V)
    own = lora.weights()
    for i in range(NUM_PARTICLES):
        lora.load({site: value[i] for site, value in weights.items()})
        expected = torch.stack(plain.generate(ids, **settings).logits)
        assert_close(logits[:, i], expected, rtol=0, atol=1e-12)
    lora.load(own)
