"""What generate and sequence_log_prob refuse, and the sentence that they say."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, T5Config

import pyro_lora as pl
from tests import networks
from tests.lifting.liftable_row import lora
from tests.predict.language import particles, prompts
from tests.predict.models import classifier, guide_over


def assert_refused(message: str, lifted: Any = None, **changed: Any) -> None:
    lifted = pl.lift(networks.llama(None)) if lifted is None else lifted
    settings: dict[str, Any] = {
        "posterior": particles(lifted),
        **prompts(),
        "max_new_tokens": 2,
        **changed,
    }
    with pytest.raises(ValueError, match=message):
        pl.generate(lora=lifted, **settings)


def test_networks_without_a_continuation() -> None:
    config = T5Config(
        vocab_size=networks.VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=networks.PAD,
    )
    t5 = AutoModelForSeq2SeqLM.from_config(config)
    assert_refused("encoder-decoder", pl.lift(lora(t5, "q", task_type="SEQ_2_SEQ_LM")))
    assert_refused("expected a causal language model", classifier()[0])
    assert_refused("expected a causal language model", pl.lift(torch.nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("name", "value", "off", "message"),
    [
        ("num_beams", 2, 1, "beam search, which ranks"),
        ("num_return_sequences", 2, 1, "several texts of each prompt"),
        ("penalty_alpha", 0.6, None, "contrastive search"),
        ("prompt_lookup_num_tokens", 1, None, "guesses of tokens"),
        ("stop_strings", ["x"], None, "ends in words"),
    ],
)
def test_a_config_that_asks_for_another_search(
    name: str, value: Any, off: Any, message: str
) -> None:
    network = networks.llama(None)
    setattr(network.get_base_model().generation_config, name, value)
    lifted = pl.lift(network)
    assert_refused(rf"{name}=.* {message}.*generation_config\.{name} = {off}", lifted)
    setattr(network.get_base_model().generation_config, name, off)
    found = pl.generate(particles(lifted), **prompts(), lora=lifted, max_new_tokens=2)
    assert 0 < found.new_tokens.shape[-1] <= 2


def test_padding() -> None:
    right = networks.inputs(networks.batch(3, 5, padding="right"))
    assert_refused("Pad on the left", **right)
    assert_refused("starts with 0, the padding token", attention_mask=None)
    empty = prompts()["attention_mask"]
    empty[1] = 0
    assert_refused("nothing but padding", attention_mask=empty)
    assert_refused("attention_mask has shape", attention_mask=empty[:2])


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        ("mode must be 'average', 'draws' or 'mode'", {"mode": "beam"}),
        ("max_new_tokens must be at least 1", {"max_new_tokens": 0}),
        ("num_samples must be at least 1", {"num_samples": 0}),
        ("nothing but samples", {"temperature": 0.5}),
        ("nothing but samples", {"top_k": 3}),
        ("temperature", {"temperature": 0.0, "do_sample": True}),
        ("top_p", {"top_p": 1.5, "do_sample": True}),
        ("expected integers", {"input_ids": torch.ones(3, 5)}),
        ("expected integers", {"input_ids": torch.ones(5, dtype=torch.long)}),
    ],
)
def test_arguments(message: str, changed: dict[str, Any]) -> None:
    assert_refused(message, **changed)


def test_posteriors_without_a_mode() -> None:
    lifted = pl.lift(networks.llama(None))
    assert_refused("Particles have no mode|no single mode|no mode", lifted, mode="mode")
    guide = guide_over(lifted.weights())
    assert_refused("neither a mode nor a median", lifted, posterior=guide, mode="mode")


def test_a_posterior_of_another_network() -> None:
    other = pl.lift(networks.llama(None), name="other")
    assert_refused(
        "isn't among those that the posterior samples", posterior=particles(other)
    )


def test_draws_that_cannot_share_a_batch() -> None:
    network = networks.llama(None)
    base = network.get_base_model()
    base.get_input_embeddings().weight.requires_grad_()
    base.lm_head.weight = base.get_input_embeddings().weight  # read by two layers
    lifted = pl.lift(network)
    assert_refused("draws in one batch", lifted)
    found = pl.generate(
        particles(lifted), lora=lifted, **prompts(), max_new_tokens=2, mode="draws"
    )
    assert found.sequences.shape == (3, 3, 7)


def test_dropout_is_off_so_mc_dropout_is_refused() -> None:
    lifted = pl.lift(networks.llama(None, lora_dropout=0.5))
    assert_refused(
        "all draws of mc_dropout are the same", lifted, posterior=pl.mc_dropout(lifted)
    )


def test_logits_that_are_no_numbers() -> None:
    lifted = pl.lift(networks.llama(None))
    posterior, given = particles(lifted, 2), prompts(3)
    at: tuple[int, int] | None = None

    def spoil(module: object, args: object, logits: Tensor) -> None:
        if at is not None:  # two draws of three rows, (6, T, V)
            logits[at] = torch.nan

    head = lifted.network.get_base_model().lm_head
    labels = given["input_ids"].clone()
    labels[:, :3] = -100  # two tokens of each are scored, from places 2 and 3 of 5
    scored = {**given, "labels": labels}
    expected = pl.sequence_log_prob(posterior, **scored).draws
    said = r"^Row 2: the network's logits are NaN or infinite under draw 1 of"
    with head.register_forward_hook(spoil):
        at = 5, -1
        for settings in ({}, {"mode": "draws"}, {"do_sample": True}):
            assert_refused(said, lifted, posterior=posterior, **settings)
        at = 5, -2
        with pytest.raises(ValueError, match=said):
            pl.sequence_log_prob(posterior, **scored)
        one = pl.ensemble(lifted, [lifted.weights()])
        at = 1, -2
        with pytest.raises(ValueError, match=r"^Row 1: .* or infinite\. If rows"):
            pl.sequence_log_prob(one, **scored, num_samples=1)
        # What comes after the last token is no part of the score.
        at = 5, -1
        assert torch.equal(pl.sequence_log_prob(posterior, **scored).draws, expected)
        at, labels[2, 3] = (5, -3), -100  # of row 2 only the last token is scored
        assert pl.sequence_log_prob(posterior, **scored).draws.isfinite().all()
