"""Texts and a tokenizer -> batches, the door before the one that batches come in by.

Of two texts and their classes, for instance, with the tokenizer of a BERT,

    ["good film", "bad"]      input_ids       101 2204 2143  102     labels  1
    [1, 0]               ->                   101 2919  102    0             0
                              attention_mask    1    1    1    1
                                                1    1    1    0
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from pyro_lora.ground.settings import check_count, check_kind
from pyro_lora.ground.warning import warn

Text = str | tuple[str, str]
Labels = Iterable[Any] | np.ndarray | Tensor

_NO_LIMIT = 10**9  # what tokenizers say whose network reads any length is far above


def text_batches(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[Text],
    labels: Labels | None = None,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    shuffle: bool = False,
    device: str | torch.device | None = None,
) -> DataLoader[Any]:
    """Texts as batches, padded batch by batch: a loader to be read as often as needed.

    What ``DataLoader`` and transformers' ``DataCollatorWithPadding`` make of tokenised
    rows, in one call.

    Args:
        tokenizer: The network's own.
        texts: N strings, or pairs of strings for networks that compare two texts.
        labels: N numbers, of classes from 0 on or real ones; or N rows of them, such as
            the P zeros and ones of ``models.multi_label``; None where nobody knows.
        batch_size: Texts in a batch, B.
        max_length: Tokens after which a text is cut; None is what the tokenizer says
            that its network can read. A prompt, whose answer comes after its end, is
            cut at its beginning by ``tokenizer.truncation_side = "left"``.
        shuffle: Whether to put them into another order each time, for training.
        device: Where the network is; None is the CPU.

    Returns:
        A loader of ``input_ids`` and ``attention_mask``, (B, T), what else the
        tokenizer gives, and ``labels``, (B,) or (B, P), if there are any.

    Raises:
        TypeError: If the tokenizer is something else, a text no string, or the texts or
            labels are a table, or in no order.
        ValueError: If there are no texts, one has no tokens, there are more or fewer
            labels, they aren't numbers, or the tokenizer has no token to pad with.

    Warns:
        UserWarning: If texts are cut and ``max_length`` is None.
    """
    expected = "a tokenizer of transformers, such as AutoTokenizer.from_pretrained(...)"
    check_kind("tokenizer", tokenizer, PreTrainedTokenizerBase, expected)
    check_count("batch_size", batch_size)
    if max_length is not None:
        check_count("max_length", max_length)
    if tokenizer.pad_token is None:
        raise ValueError(
            "The tokenizer has no token to pad with. Set one: tokenizer.pad_token = "
            "tokenizer.eos_token, and the network's config.pad_token_id to its id."
        )
    rows = _tokenized(tokenizer, _checked(texts), max_length)
    if labels is not None:
        for row, label in zip(rows, _numbers(labels, len(rows)), strict=True):
            row["labels"] = label
    pad = DataCollatorWithPadding(tokenizer)
    collate = partial(_collated, pad=pad, device=device)
    return DataLoader(rows, batch_size, shuffle=shuffle, collate_fn=collate)  # type: ignore[arg-type]  # a list will do


def _checked(texts: Iterable[Text]) -> list[Text]:
    """The texts.

    Raises:
        TypeError: If one of them is no string.
        ValueError: If there are none.
    """
    if isinstance(texts, str):
        raise TypeError("texts is a single string; put it into a list.")
    _check_order("texts", texts)
    if getattr(texts, "ndim", 1) != 1:  # a table of pandas is its columns' names
        raise TypeError("texts is a table; give the column that has them.")
    listed = list(texts)
    if not listed:
        raise ValueError("texts is empty; give one at least.")
    for index, text in enumerate(listed):
        pair = text if isinstance(text, tuple) else (text, "")
        if len(pair) != 2 or not all(isinstance(x, str) for x in pair):
            raise TypeError(
                f"texts[{index}] is {text!r}; expected a string, or a pair of them. "
                "Leave out rows that have no text."
            )
    return listed


def _check_order(name: str, values: Iterable[Any]) -> None:
    """Refuse what would be read as names of columns, or in any order.

    Raises:
        TypeError: If it is such.
    """
    if isinstance(values, Mapping | Set):
        raise TypeError(
            f"{name} is a {type(values).__name__}; expected them one after another, as "
            "in a list. Of a table, give the column."
        )


def _tokenized(
    tokenizer: PreTrainedTokenizerBase, texts: list[Text], max_length: int | None
) -> list[dict[str, Any]]:
    """One mapping for each text, name -> list of numbers, not padded.

    Raises:
        ValueError: If a text has no tokens.

    Warns:
        UserWarning: If one is cut, and nobody has said where.
    """
    most: int = tokenizer.model_max_length if max_length is None else max_length
    # Asked to cut at no length, tokenizers warn.
    cut: Any = {"truncation": True, "max_length": most} if most < _NO_LIMIT else {}
    columns = tokenizer(texts, **cut)
    if max_length is None and cut:
        _warn_of_cut(tokenizer, texts, [len(x) for x in columns["input_ids"]], most)
    for index, ids in enumerate(columns["input_ids"]):
        if not ids:
            raise ValueError(
                f"texts[{index}] is {texts[index]!r}, in which the tokenizer finds no "
                "tokens. Leave it out."
            )
    names = list(columns)
    return [
        dict(zip(names, row, strict=True))
        for row in zip(*columns.values(), strict=True)
    ]


def _warn_of_cut(
    tokenizer: PreTrainedTokenizerBase, texts: list[Text], sizes: list[int], most: int
) -> None:
    """Warn, to text_batches' caller, of texts that nobody has asked to cut."""
    full = [index for index, size in enumerate(sizes) if size >= most]
    if not full:
        return
    whole = tokenizer([texts[i] for i in full], verbose=False)["input_ids"]
    cut = [i for i, ids in zip(full, whole, strict=True) if len(ids) > most]
    if cut:
        warn(
            f"{len(cut)} of {len(texts)} texts are cut after {most} tokens, which is "
            "what the tokenizer says that its network can read; the first one is "
            f"texts[{cut[0]}]. Where that is intended, say max_length={most}."
        )


def _numbers(labels: Labels, num_texts: int) -> Tensor:
    """The labels, (N, ...).

    Raises:
        ValueError: If they aren't numbers, or not as many as texts.
    """
    _check_order("labels", labels)
    if isinstance(labels, Iterator):
        labels = list(labels)
    # A copy: a column of pandas may not be written to, which torch warns of.
    given = labels if isinstance(labels, Tensor) else np.array(labels)
    if isinstance(given, np.ndarray) and given.dtype.kind not in "biuf":
        raise ValueError(
            f"labels must be numbers, found {list(labels)[:3]!r} ... Give names their "
            "classes' numbers: [network.config.label2id[name] for name in names]."
        )
    numbers = torch.as_tensor(given)
    if numbers.ndim == 0 or len(numbers) != num_texts:
        raise ValueError(
            f"labels are of shape {tuple(numbers.shape)}, but there are {num_texts} "
            "texts; expected one for each."
        )
    if numbers.is_floating_point():  # NumPy's are in float64
        return numbers.to(torch.get_default_dtype())
    return numbers.long()


def _collated(
    rows: list[Mapping[str, Any]],
    pad: Callable[..., Mapping[str, Tensor]],
    device: str | torch.device | None,
) -> dict[str, Tensor]:
    """A batch, its labels in a tensor of their own dtype."""
    texts = [{n: x for n, x in row.items() if n != "labels"} for row in rows]
    batch = {name: x.to(device) for name, x in pad(texts).items()}
    if "labels" in rows[0]:
        batch["labels"] = torch.stack([row["labels"] for row in rows]).to(device)
    return batch
