"""Texts of a posterior equal those computed draw by draw, token by token."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessor,
    Qwen3Config,
    RepetitionPenaltyLogitsProcessor,
)

import pyro_lora as pl
from pyro_lora.predict.generate import Generation
from tests import networks
from tests.lifting.liftable_row import gpt2, lora, tiny
from tests.predict.language import (
    adapters,
    averaged_text,
    particles,
    prompts,
    step_by_step,
)

NEW = 6
END = 2  # Llama's own token for the end of a text


def llama() -> Any:
    return networks.llama(None)


NETWORKS: dict[str, Any] = {
    "Llama": llama,
    "GPT-2": lambda: lora(
        gpt2(AutoModelForCausalLM), "c_attn", fan_in_fan_out=True, task_type="CAUSAL_LM"
    ),
    "Qwen3": lambda: lora(
        tiny(Qwen3Config, num_key_value_heads=1, head_dim=8),
        "q_proj",
        "v_proj",
        task_type="CAUSAL_LM",
    ),
    "Llama, its last layer": lambda: networks.llama(
        None, num_layers=3, layers_to_transform=[2]
    ),
}
# Rotary tables are float32, and padding on the left moves positions along them.
TOLERANCE = {name: 1e-8 if name == "GPT-2" else 1e-7 for name in NETWORKS}


def unpadded(given: dict[str, Tensor], row: int) -> Tensor:
    return given["input_ids"][row][given["attention_mask"][row].bool()]


def assert_scores(
    found: Generation, index: Any, each: list[Any], prompt: Tensor, atol: float
) -> int:
    """Compare one text's scores to the long way; its length."""
    new = found.new_tokens[index]
    ends = (new == END).nonzero()
    length = int(ends[0]) + 1 if len(ends) else len(new)
    expected = step_by_step(each, prompt, new[:length])
    for name, value in (
        ("total", found.total_entropy),
        ("aleatoric", found.aleatoric_entropy),
        ("log_prob", found.log_probs),
    ):
        assert_close(value[index][:length], expected[name], rtol=0, atol=atol)
        assert (value[index][length:] == 0).all()
    assert (new[length:] == networks.PAD).all()
    assert bool(found.finished[index]) == bool(len(ends))
    return length


@pytest.mark.grid
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.few(2)
def test_the_average_is_that_of_every_token(name: str, padded: bool) -> None:
    lifted = pl.lift(NETWORKS[name]())
    posterior, given = particles(lifted), prompts()
    if not padded:
        given = {k: v[:1] for k, v in given.items()}
        assert given["attention_mask"].all()
    found = pl.generate(posterior, lora=lifted, **given, max_new_tokens=NEW)
    each = adapters(lifted, posterior.sample(3))
    atol = TOLERANCE[name] if padded else 1e-8
    for row in range(len(given["input_ids"])):
        prompt = unpadded(given, row)
        length = assert_scores(found, row, each, prompt, atol)
        expected = averaged_text(each, prompt, NEW, END)
        assert torch.equal(found.new_tokens[row, :length], expected)
    assert (found.epistemic_entropy[found.log_probs != 0] > 1e-3).all()
    assert_close(found.epistemic_entropy, found.total_entropy - found.aleatoric_entropy)


@pytest.mark.parametrize("name", ["Llama", "Llama, its last layer"])
@pytest.mark.few(1)
def test_each_draw_has_its_own_text(name: str) -> None:
    lifted = pl.lift(NETWORKS[name]())
    posterior, given = particles(lifted), prompts()
    found = pl.generate(
        posterior, lora=lifted, **given, max_new_tokens=NEW, mode="draws"
    )
    assert found.sequences.shape == (3, 3, 5 + NEW)
    each = adapters(lifted, posterior.sample(3))
    for draw, network in enumerate(each):
        alone = network.generate(**given, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(found.sequences[draw, :, : alone.shape[1]], alone)
        for row in range(3):
            assert_scores(found, (draw, row), each, unpadded(given, row), 1e-7)
    assert not torch.equal(found.sequences[0], found.sequences[1])


def test_finished_rows_are_padded_and_certain() -> None:
    lifted = pl.lift(llama())
    posterior, given = particles(lifted), prompts()
    free = pl.generate(posterior, lora=lifted, **given, max_new_tokens=NEW)
    end = int(free.new_tokens[0, 1])
    found = pl.generate(
        posterior, lora=lifted, **given, max_new_tokens=NEW, eos_token_id=end
    )
    rows = [row.tolist() for row in free.new_tokens]
    lengths = [row.index(end) + 1 if end in row else NEW for row in rows]
    assert len(set(lengths)) > 1
    for row, length in enumerate(lengths):
        assert torch.equal(
            found.new_tokens[row, :length], free.new_tokens[row, :length]
        )
        assert (found.new_tokens[row, length:] == networks.PAD).all()
        for name in ("total_entropy", "aleatoric_entropy", "log_probs"):
            value, other = getattr(found, name)[row], getattr(free, name)[row]
            assert (value[length:] == 0).all()
            assert_close(value[:length], other[:length], rtol=0, atol=1e-12)
    assert found.finished.tolist() == [end in row for row in rows]


SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 7},
    {"top_p": 0.6},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.8},
]


@pytest.mark.parametrize("mode", ["average", "draws"])
@pytest.mark.parametrize("settings", SAMPLING)
@pytest.mark.few(5)
def test_one_draw_samples_what_peft_does(mode: Any, settings: dict[str, Any]) -> None:
    lifted = pl.lift(llama())
    posterior, given = particles(lifted, 1), prompts(4)
    (network,) = adapters(lifted, posterior.sample(1))
    torch.manual_seed(3)
    own = network.generate(
        **given,
        max_new_tokens=NEW,
        do_sample=True,
        **{"top_k": 0, **settings},
    )
    torch.manual_seed(3)
    found = pl.generate(
        posterior,
        lora=lifted,
        **given,
        max_new_tokens=NEW,
        do_sample=True,
        mode=mode,
        **settings,
    )
    sequences = found.sequences.reshape(4, -1)
    assert torch.equal(sequences, own)


def test_one_draw_follows_the_generation_config() -> None:
    network = llama()
    config = network.get_base_model().generation_config
    config.update(
        do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=1.8, top_k=9
    )
    lifted = pl.lift(network)
    posterior, given = particles(lifted, 1), prompts(4)
    (alone,) = adapters(lifted, posterior.sample(1))
    own = alone.generate(**given, max_new_tokens=NEW, do_sample=False)
    found = pl.generate(posterior, lora=lifted, **given, max_new_tokens=NEW)
    assert torch.equal(found.sequences, own)
    config.update(repetition_penalty=1.0)
    without = pl.generate(posterior, lora=lifted, **given, max_new_tokens=NEW)
    assert not torch.equal(found.sequences, without.sequences)
    penalty = RepetitionPenaltyLogitsProcessor(1.8)
    given_one = pl.generate(
        posterior, lora=lifted, **given, max_new_tokens=NEW, logits_processor=[penalty]
    )
    assert torch.equal(given_one.sequences, own)


def test_samples_of_the_average_follow_it() -> None:
    lifted = pl.lift(llama())
    posterior, num = particles(lifted), 4000
    prompt = torch.tensor([[5, 23, 42]])
    each = adapters(lifted, posterior.sample(3))
    settings: dict[str, Any] = {"max_new_tokens": 1, "do_sample": True}

    def sampled(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        found = pl.generate(
            posterior,
            prompt.repeat(num, 1),
            lora=lifted,
            **settings,
            generator=generator,
        )
        return found.new_tokens[:, 0]

    tokens = sampled(0)
    assert torch.equal(tokens, sampled(0))
    assert not torch.equal(tokens, sampled(1))
    with torch.no_grad():
        logits = [network(input_ids=prompt).logits[0, -1] for network in each]
    probs = sum(x.softmax(-1) for x in logits) / 3
    frequencies = tokens.bincount(minlength=networks.VOCABULARY) / num
    standard_error = (probs * (1 - probs) / num).sqrt()
    errors = ((frequencies - probs) / standard_error)[probs * num > 5]
    assert len(errors) > 25
    # All of 50 normal errors are below 4.2 with probability .999.
    assert errors.abs().max() < 4.2
    one = ((frequencies - logits[0].softmax(-1)) / standard_error)[probs * num > 5]
    assert one.abs().max() > 10


def test_the_global_seed_decides_where_no_generator_is_given() -> None:
    lifted = pl.lift(llama())
    posterior, given = particles(lifted), prompts()
    settings: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": True}
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(pl.generate(posterior, lora=lifted, **given, **settings).sequences)
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_the_cache_is_used_for_all_draws_at_once() -> None:
    lifted = pl.lift(llama())
    shapes: list[tuple[int, ...]] = []
    network: Any = lifted.network
    network.get_base_model().register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    given = prompts()
    pl.generate(
        particles(lifted), lora=lifted, **given, max_new_tokens=3, eos_token_id=[]
    )
    # Three prompts under three draws; then the texts' scores, in one pass.
    assert shapes == [(9, 5), (9, 1), (9, 1), (9, 8)]


def test_the_network_is_left_as_it_was() -> None:
    network = networks.llama(None, lora_dropout=0.5)
    lifted = pl.lift(network)
    posterior, given = particles(lifted), prompts()
    network.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    config = network.get_base_model().generation_config.to_dict()
    first = pl.generate(posterior, lora=lifted, **given, max_new_tokens=3)
    second = pl.generate(posterior, lora=lifted, **given, max_new_tokens=3)
    assert torch.equal(first.sequences, second.sequences)  # no dropout
    assert_close(first.total_entropy, second.total_entropy, rtol=0, atol=0)
    assert all(module.training for module in network.modules())
    assert network.get_base_model().generation_config.to_dict() == config
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


def test_brain_floats_score_in_single_precision() -> None:
    network = networks.llama(None, dtype=torch.bfloat16)
    wide = pl.lift(copy.deepcopy(network).double())
    lifted = pl.lift(network)
    posterior, given = particles(lifted), prompts()
    found = pl.generate(posterior, lora=lifted, **given, max_new_tokens=NEW)
    assert found.total_entropy.dtype == found.log_probs.dtype == torch.float32
    weights = {s: w.double() for s, w in posterior.sample(3).items()}
    each = adapters(wide, weights)
    for row in range(3):
        new = found.new_tokens[row]
        length = int(found.log_probs[row].ne(0).sum())
        expected = step_by_step(each, unpadded(given, row), new[:length])
        # bf16 has 8 bits: logits of a few units are off by some hundredths.
        assert_close(
            found.log_probs[row, :length],
            expected["log_prob"].float(),
            rtol=0,
            atol=0.15,
        )


class Refusing(LogitsProcessor):
    """Bans a token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(-1, torch.tensor([self.token]), -torch.inf)


def test_a_banned_token_stays_out_of_the_average() -> None:
    lifted = pl.lift(llama())
    posterior, given = particles(lifted), prompts()
    free = pl.generate(posterior, lora=lifted, **given, max_new_tokens=NEW)
    token = int(free.new_tokens[0, 0])
    found = pl.generate(
        posterior,
        lora=lifted,
        **given,
        max_new_tokens=NEW,
        logits_processor=[Refusing(token)],
    )
    assert (free.new_tokens == token).any()
    assert not (found.new_tokens == token).any()
    assert found.log_probs.isfinite().all()
    assert found.total_entropy.isfinite().all()
