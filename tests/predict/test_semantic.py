"""Groups of meanings, and their entropies against sums written out."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import pyro_lora as pl

TEXTS = ["four", "five", "4", "four", "vier", "5", "no idea"]
PROBS = torch.tensor([0.3, 0.1, 0.2, 0.3, 0.05, 0.08, 0.02], dtype=torch.float64)
MEANING = {"four": 4, "4": 4, "vier": 4, "five": 5, "5": 5, "no idea": None}


def entropy(probs: list[float]) -> float:
    return -sum(p * math.log(p) for p in probs)


@pytest.mark.parametrize(
    "relation",
    [
        {"same_meaning": lambda a, b: MEANING[a] == MEANING[b]},
        {"key": MEANING.__getitem__},
    ],
    ids=["two texts", "key"],
)
def test_probabilities_of_meanings(relation: dict[str, Any]) -> None:
    found = pl.semantic_entropy(TEXTS, PROBS.log(), **relation)
    assert found.groups.tolist() == [0, 1, 0, 0, 0, 1, 2]
    groups = [0.3 + 0.2 + 0.05, 0.1 + 0.08, 0.02]  # "four" once
    expected = torch.tensor(groups, dtype=torch.float64)
    assert_close(found.log_probs.exp(), expected, rtol=0, atol=1e-12)
    normalised = [p / sum(groups) for p in groups]
    assert found.entropy.item() == pytest.approx(entropy(normalised), abs=1e-12)
    log = [math.log(p) for p in groups]
    each = -(4 * log[0] + 2 * log[1] + log[2]) / 7
    assert found.monte_carlo_entropy.item() == pytest.approx(each, abs=1e-12)
    shares = entropy([4 / 7, 2 / 7, 1 / 7])
    assert found.discrete_entropy.item() == pytest.approx(shares, abs=1e-12)


def test_the_first_match_decides_where_the_relation_is_not_transitive() -> None:
    def close(first: str, other: str) -> bool:
        return abs(int(first) - int(other)) <= 1

    uniform = torch.zeros(4)
    # 2 is close to 1 and 3, which aren't close to each other.
    found = pl.semantic_entropy(["1", "2", "3", "2"], uniform, close)
    assert found.groups.tolist() == [0, 0, 1, 0]
    found = pl.semantic_entropy(["2", "1", "3", "2"], uniform, close)
    assert found.groups.tolist() == [0, 0, 0, 0]


def test_only_first_texts_are_compared_and_come_first() -> None:
    pairs: list[tuple[str, str]] = []

    def same(first: str, other: str) -> bool:
        pairs.append((first, other))
        return first[0] == other[0]

    pl.semantic_entropy(["a1", "a2", "b1", "a3", "b2"], torch.zeros(5), same)
    assert pairs == [
        ("a1", "a2"),
        ("a1", "b1"),
        ("a1", "a3"),
        ("a1", "b2"),
        ("b1", "b2"),
    ]


def test_one_meaning_is_certain_and_n_meanings_are_log_n() -> None:
    uniform = torch.full((5,), 0.2, dtype=torch.float64).log()
    texts = list("abcde")
    one = pl.semantic_entropy(texts, uniform, key=lambda _: 0)
    each = pl.semantic_entropy(texts, uniform, key=lambda text: text)
    for found, expected in ((one, 0.0), (each, math.log(5))):
        for name in ("entropy", "monte_carlo_entropy", "discrete_entropy"):
            value = getattr(found, name).item()
            assert value == pytest.approx(expected, abs=1e-12)


def test_the_monte_carlo_estimate_tends_to_the_entropy() -> None:
    probs = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64)
    meanings = [0, 0, 1, 2]
    truth = entropy([0.7, 0.2, 0.1])
    num = 2000
    draws = probs.multinomial(num, replacement=True)
    found = pl.semantic_entropy(
        [str(i) for i in draws.tolist()],
        probs.log()[draws],
        key=lambda text: meanings[int(text)],
    )
    # The standard deviation of -log p(c) over that of the mean.
    logs = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    variance = (logs * logs.log().square()).sum() - truth**2
    error = float((variance / num).sqrt())
    assert abs(found.monte_carlo_entropy.item() - truth) < 4 * error
    assert found.entropy.item() == pytest.approx(truth, abs=1e-12)  # all were seen


def key(text: str) -> str:
    return text


@pytest.mark.parametrize(
    ("message", "texts", "log_probs", "relation"),
    [
        ("one or more strings", [], torch.zeros(0), {"key": key}),
        ("one or more strings", "ab", torch.zeros(2), {"key": key}),
        (r"shape \(3,\); expected \(2,\)", ["a", "b"], torch.zeros(3), {"key": key}),
        ("NaN or infinite", ["a"], torch.tensor([-torch.inf]), {"key": key}),
        ("exactly one of", ["a"], torch.zeros(1), {}),
        ("exactly one of", ["a"], torch.zeros(1), {"key": key, "same_meaning": max}),
    ],
)
def test_arguments(
    message: str, texts: Any, log_probs: Any, relation: dict[str, Callable[..., Any]]
) -> None:
    with pytest.raises(ValueError, match=message):
        pl.semantic_entropy(texts, log_probs, **relation)
