"""Log-probabilities of given continuations against a token-by-token count."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora.predict import sequence_scores
from tests import networks
from tests.predict.language import adapters, next_log_probs, particles

PROMPT = 2  # tokens of each prompt


def continuations(padding: Any = "right") -> tuple[dict[str, Tensor], Tensor]:
    """Texts of different lengths, and the labels of what follows their prompts."""
    given = networks.inputs(networks.batch(4, 7, padding=padding))
    position = given["attention_mask"].cumsum(-1)
    scored = given["attention_mask"].bool() & (position > PROMPT)
    return given, given["input_ids"].where(scored, -100)


def by_hand(each: list[Any], given: dict[str, Tensor]) -> Tensor:
    """Each draw's log-probability of each token, zero outside, (S, B, T)."""
    lengths = given["attention_mask"].sum(-1)
    result = torch.zeros(len(each), len(lengths), 7, dtype=torch.float64)
    for row, length in enumerate(lengths.tolist()):
        text = given["input_ids"][row][given["attention_mask"][row].bool()]
        for s, network in enumerate(each):
            for t in range(PROMPT, length):
                result[s, row, t] = next_log_probs(network, text[:t])[text[t]]
    return result


@pytest.mark.parametrize(("padding", "atol"), [("right", 1e-8), ("left", 1e-7)])
@pytest.mark.parametrize("limit", [1, 10**9])
def test_both_averages(
    padding: str, atol: float, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One row at a time, or all at once.
    monkeypatch.setattr(sequence_scores, "MAX_LOG_PROBS", limit)
    lifted = pl.lift(networks.llama(None))
    posterior = particles(lifted)
    given, labels = continuations(padding)
    found = pl.sequence_log_prob(posterior, lora=lifted, labels=labels, **given)
    tokens = by_hand(adapters(lifted, posterior.sample(3)), given)  # (S, B, T)
    by_draw = tokens.sum(-1)
    assert_close(found.draws, by_draw, rtol=0, atol=atol)
    assert_close(found.by_sequence, by_draw.exp().mean(0).log(), rtol=0, atol=atol)
    by_token = tokens.exp().mean(0).log().sum(-1)
    assert_close(found.by_token, by_token, rtol=0, atol=atol)
    assert torch.equal(found.num_tokens, (tokens != 0).all(0).sum(-1))
    assert (found.by_token - found.by_sequence).abs().max() > 0.01


def test_a_generated_text_has_its_own_score() -> None:
    lifted = pl.lift(networks.llama(None))
    posterior = particles(lifted)
    prompt = torch.tensor([[5, 23, 42], [7, 8, 9]])
    text = pl.generate(
        posterior, prompt, lora=lifted, max_new_tokens=4, eos_token_id=[]
    )
    labels = text.sequences.clone()
    labels[:, :3] = -100
    found = pl.sequence_log_prob(posterior, text.sequences, labels, lora=lifted)
    assert_close(found.by_token, text.log_probs.sum(-1), rtol=0, atol=1e-12)
    assert found.num_tokens.tolist() == [4, 4]


def test_all_texts_of_two_tokens_sum_to_one() -> None:
    lifted = pl.lift(networks.llama(None))
    posterior, size = particles(lifted), networks.VOCABULARY
    pairs = torch.cartesian_prod(torch.arange(size), torch.arange(size))
    ids = torch.cat([torch.full((len(pairs), 1), 5), pairs], 1)
    labels = ids.clone()
    labels[:, 0] = -100
    found = pl.sequence_log_prob(posterior, ids, labels, lora=lifted)
    for log_probs in (found.by_sequence, found.by_token, *found.draws):
        assert_close(log_probs.exp().sum().item(), 1.0, rtol=0, atol=1e-12)


def test_brain_floats_are_added_in_single_precision() -> None:
    lifted = pl.lift(networks.llama(None, dtype=torch.bfloat16))
    given, labels = continuations()
    found = pl.sequence_log_prob(particles(lifted), lora=lifted, labels=labels, **given)
    assert found.by_sequence.dtype == found.by_token.dtype == torch.float32


@pytest.mark.parametrize(
    ("message", "row", "column", "value"),
    [
        ("Row 1: the labels differ", 1, 3, 1),
        ("Row 0: the labels score a text's first token", 0, 0, None),
        ("Row 3: the labels score padding", 3, 6, None),
        ("Row 2: the labels score no token", 2, slice(None), -100),
    ],
)
def test_labels_that_are_wrong(message: str, row: int, column: Any, value: Any) -> None:
    lifted = pl.lift(networks.llama(None))
    given, labels = continuations()
    given["input_ids"][1, 3] = 2
    labels[1, 3] = 2
    labels[row, column] = given["input_ids"][row, column] if value is None else value
    with pytest.raises(ValueError, match=message):
        pl.sequence_log_prob(particles(lifted), lora=lifted, labels=labels, **given)


def test_labels_of_another_shape() -> None:
    lifted = pl.lift(networks.llama(None))
    given, labels = continuations()
    with pytest.raises(ValueError, match=r"labels have shape \(4, 6\)"):
        pl.sequence_log_prob(
            particles(lifted), lora=lifted, labels=labels[:, 1:], **given
        )
