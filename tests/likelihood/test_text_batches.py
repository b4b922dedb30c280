"""Texts as batches: the same numbers as tokenising them all at once."""

import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyro_lora as pl
from tests.words import WORDS, tokenizer

TEXTS = ["good film", "bad", "a good good play", "the film", "bad play"]
texts = st.lists(
    st.lists(st.sampled_from(WORDS[2:]), min_size=1, max_size=9).map(" ".join),
    min_size=1,
    max_size=12,
)


@settings(max_examples=50, deadline=None)
@given(texts, st.integers(1, 5), st.booleans())
def test_batches_are_the_texts_in_order(
    some: list[str], batch_size: int, shuffle: bool
) -> None:
    labels = torch.arange(len(some))
    words = tokenizer()
    loader = pl.text_batches(
        words, some, labels, batch_size=batch_size, shuffle=shuffle
    )
    assert len(loader) == -(-len(some) // batch_size)
    for _ in range(2):  # as often as needed
        seen: list[int] = []
        for batch in loader:
            chosen = batch["labels"].tolist()
            expected = words(
                [some[i] for i in chosen], padding=True, return_tensors="pt"
            )
            assert batch.keys() == {*expected, "labels"}
            for name, value in expected.items():
                assert torch.equal(batch[name], value)
            seen += chosen
        assert (sorted(seen) if shuffle else seen) == labels.tolist()


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([1, 0, 1, 1, 0], torch.int64),
        ((True, False, True, True, False), torch.int64),
        (np.array([1, 0, 1, 1, 0], dtype=np.int32), torch.int64),
        (np.arange(5) / 2, torch.float32),
        ([[0.0, 1.0]] * 5, torch.float32),
        (torch.arange(10).reshape(5, 2), torch.int64),
    ],
)
def test_labels_of_any_numbers(labels: Any, expected: torch.dtype) -> None:
    (batch,) = pl.text_batches(tokenizer(), TEXTS, labels)
    given_ = labels if isinstance(labels, torch.Tensor) else torch.tensor(labels)
    assert batch["labels"].dtype == expected
    assert torch.equal(batch["labels"].double(), given_.double())
    (without,) = pl.text_batches(tokenizer(), iter(TEXTS))
    assert "labels" not in without


@pytest.mark.parametrize(
    "form",
    [list, tuple, iter, np.array, pd.Series, lambda x: pd.Series(x, range(9, 4, -1))],
)
def test_columns_of_any_form(form: Any) -> None:
    labels = [1, 0, 1, 1, 0]
    (expected,) = pl.text_batches(tokenizer(), TEXTS, labels)
    (found,) = pl.text_batches(tokenizer(), form(TEXTS), form(labels))
    assert found.keys() == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in found.items())


def test_what_has_no_order_or_is_a_table_is_refused() -> None:
    numbers = dict.fromkeys(TEXTS, 1)
    for texts, labels, name in (
        (numbers, None, "texts is a dict"),
        ({*TEXTS}, None, "texts is a set"),
        (pd.DataFrame({"text": TEXTS}), None, "texts is a table"),
        (TEXTS, numbers, "labels is a dict"),
        (TEXTS, {*range(5)}, "labels is a set"),
    ):
        with pytest.raises(TypeError, match=name):
            pl.text_batches(tokenizer(), texts, labels)
    two = pd.DataFrame({"toxic": [1, 0, 1, 0, 0], "rude": [0, 0, 1, 1, 0]})
    (batch,) = pl.text_batches(tokenizer(), TEXTS, two)  # of models.multi_label
    assert batch["labels"].tolist() == two.to_numpy().tolist()


def test_long_texts_are_cut() -> None:
    long = ["good " * 40]
    (batch,) = pl.text_batches(tokenizer(), long, max_length=7)
    assert batch["input_ids"].shape == (1, 7)
    words = tokenizer()
    words.model_max_length = 16
    with pytest.warns(UserWarning, match=r"^1 of 1 texts are cut after 16 tokens"):
        (batch,) = pl.text_batches(words, long)
    assert batch["input_ids"].shape == (1, 16)
    words.model_max_length = int(1e30)  # as where nobody has said
    (batch,) = pl.text_batches(words, long)
    assert batch["input_ids"].shape == (1, 40)
    words.truncation_side = "left"  # a prompt's end stays
    (batch,) = pl.text_batches(words, ["a the good film"], max_length=2)
    assert words.batch_decode(batch["input_ids"]) == ["good film"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.booleans())
def test_texts_that_nobody_asked_to_cut_are_counted(
    sizes: list[int], pairs: bool
) -> None:
    words = tokenizer()
    words.model_max_length = 5
    some: Any = [" ".join(["good"] * size) for size in sizes]
    if pairs:
        some = [(text, "bad") for text in some]
    too_long = [i for i, size in enumerate(sizes) if size + pairs > 5]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        loader = pl.text_batches(words, some)
        list(loader)
        list(loader)
        pl.text_batches(words, some, max_length=5)  # this was asked for
    said = [str(w.message) for w in found]
    assert len(said) == bool(too_long)
    if too_long:
        start = f"{len(too_long)} of {len(sizes)} texts are cut after 5 tokens"
        assert said[0].startswith(start)
        assert f"the first one is texts[{too_long[0]}]" in said[0]
        assert found[0].filename == __file__


def test_pairs_of_texts() -> None:
    (batch,) = pl.text_batches(tokenizer(), [("good film", "bad"), ("a", "the play")])
    expected = tokenizer()(
        ["good film", "a"], ["bad", "the play"], padding=True, return_tensors="pt"
    )
    assert torch.equal(batch["input_ids"], expected["input_ids"])


def test_bad_arguments_are_named() -> None:
    words = tokenizer()

    def batches(*args: Any, **options: Any) -> Any:
        return pl.text_batches(words, *args, **options)

    with pytest.raises(TypeError, match="tokenizer must be a tokenizer of transform"):
        pl.text_batches("bert-base-uncased", TEXTS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a single string; put it into a list"):
        batches("good film")
    with pytest.raises(ValueError, match="texts is empty"):
        batches([])
    with pytest.raises(TypeError, match=r"texts\[1\] is nan; expected a string"):
        batches(["good", float("nan")])
    with pytest.raises(ValueError, match=r"texts\[1\] is '', in which the tokenizer"):
        batches(["good", ""])
    with pytest.raises(ValueError, match=r"shape \(2,\), but there are 5 texts"):
        batches(TEXTS, [0, 1])
    with pytest.raises(ValueError, match=r"found \['good', 'bad', 'good'\].*label2id"):
        batches(TEXTS, ["good", "bad", "good", "good", "bad"])
    with pytest.raises(ValueError, match="batch_size must be"):
        batches(TEXTS, batch_size=0)
    words.pad_token = None
    with pytest.raises(ValueError, match=r"tokenizer.pad_token = tokenizer.eos_token"):
        batches(TEXTS)
