"""The top of a BERT classifier on cached states: what isn't adapted is run only once.

Used by ``python -m benchmarks.curvature_quality`` and its neighbours.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from examples.rows import Row
from examples.text import default_model

NUM_LAYERS = 2  # adapted ones, at the top, where nobody says
MAX_LENGTH, BATCH_SIZE = 32, 32
POOL = 4 * BATCH_SIZE  # rows that are sorted by length, to save padding
Batch = dict[str, Tensor]
T = TypeVar("T")


def chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Consecutive parts of at most ``size`` items."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def minilm(
    num_labels: int,
) -> tuple[BertForSequenceClassification, PreTrainedTokenizerBase]:
    """MiniLM with a new head, from which torch's global generator goes on."""
    logging.set_verbosity_error()  # a new head is meant to be untrained
    logging.disable_progress_bar()
    torch.manual_seed(0)
    network = AutoModelForSequenceClassification.from_pretrained(
        default_model(), num_labels=num_labels, dtype=torch.float32
    )
    return network.eval(), AutoTokenizer.from_pretrained(default_model())


class EncoderTop(nn.Module):
    """The last layers, the pooler and the classifier, as in the whole network.

    Only the first token of the last layer is read, so only its query is computed.
    """

    def __init__(
        self, network: BertForSequenceClassification, num_layers: int = NUM_LAYERS
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(network.bert.encoder.layer[-num_layers:])
        self.pooler = network.bert.pooler
        self.classifier = network.classifier

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (B, C) from the states (B, T, I) below the first of the layers."""
        *lower, last = self.layers
        for layer in lower:
            hidden = _layer(layer, hidden, hidden, attention_mask)
        first = _layer(last, hidden[:, :1], hidden, attention_mask)
        logits: Tensor = self.classifier(self.pooler(first))
        return logits


def _layer(layer: nn.Module, at: Tensor, hidden: Tensor, mask: Tensor) -> Tensor:
    """A BertLayer's output at the tokens ``at``, which attend to all of ``hidden``."""
    attention = layer.attention.self

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)

    mixed = scaled_dot_product_attention(
        heads(attention.query(at)),
        heads(attention.key(hidden)),
        heads(attention.value(hidden)),
        attn_mask=mask[:, None, None].bool(),
    )
    x = layer.attention.output(mixed.transpose(1, 2).flatten(2), at)
    out: Tensor = layer.output(layer.intermediate(x), x)
    return out


def adapted(
    network: BertForSequenceClassification, rank: int, num_layers: int = NUM_LAYERS
) -> PeftModel:
    """LoRA on query and value of the top layers, and a head that is trained, too."""
    config = LoraConfig(
        r=rank,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules=["query", "value"],
        modules_to_save=["classifier"],
    )
    return get_peft_model(EncoderTop(network, num_layers), config).eval()


class Rows(ABC):
    """Rows whose states below the adapted layers are kept, and their labels, (N,)."""

    labels: Tensor

    @abstractmethod
    def lengths(self) -> list[int]:
        """Tokens of each row, which a batch pads to the most."""

    @abstractmethod
    def batch(self, index: Sequence[int]) -> Batch:
        """Some rows, padded to the longest."""

    @abstractmethod
    def subset(self, index: Sequence[int]) -> Self:
        """Some rows."""

    def __len__(self) -> int:
        return len(self.labels)

    def order(self) -> list[int]:
        """Short ones first, so that batches in order have little padding."""
        lengths = self.lengths()
        return sorted(range(len(self)), key=lengths.__getitem__)

    def by_length(self) -> Self:
        """The rows in that order."""
        return self.subset(self.order())

    def ordered(self) -> list[Batch]:
        """All rows once."""
        return [self.batch(i) for i in chunks(range(len(self)), BATCH_SIZE)]

    def shuffled(self, seed: int) -> "ShuffledBatches":
        """All rows once in each pass, in a new order."""
        return ShuffledBatches(self, torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class CachedRows(Rows):
    """States below the adapted layers, (T, I) for each row, and labels, (N,)."""

    hidden: list[Tensor]
    labels: Tensor

    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(x) for x in self.hidden]

    def batch(self, index: Sequence[int]) -> Batch:
        """Some rows, padded to the longest."""
        states = [self.hidden[i] for i in index]
        masks = [torch.ones(len(x), dtype=torch.long) for x in states]
        return {
            "hidden": pad_sequence(states, batch_first=True),
            "attention_mask": pad_sequence(masks, batch_first=True),
            "labels": self.labels[list(index)],
        }

    def subset(self, index: Sequence[int]) -> "CachedRows":
        """Some rows."""
        return CachedRows([self.hidden[i] for i in index], self.labels[list(index)])


@dataclass(frozen=True)
class ShuffledBatches:
    """Batches in a new random order in each pass.

    Rows are drawn in pools of a few batches, and sorted by length in a pool.
    """

    rows: Rows
    generator: torch.Generator

    def __len__(self) -> int:
        return -(-len(self.rows) // BATCH_SIZE)

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(len(self.rows), generator=self.generator).tolist()
        lengths = self.rows.lengths()
        pools = [sorted(x, key=lengths.__getitem__) for x in chunks(order, POOL)]
        parts = [part for pool in pools for part in chunks(pool, BATCH_SIZE)]
        for i in torch.randperm(len(parts), generator=self.generator).tolist():
            yield self.rows.batch(parts[i])


@torch.no_grad()
def cache(
    network: BertForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    num_layers: int = NUM_LAYERS,
) -> CachedRows:
    """Run the layers below the adapted ones, once for each row."""
    hidden = []
    for chunk in chunks(rows, BATCH_SIZE):
        tokens = tokenizer(
            [row.text for row in chunk],
            padding=True,
            truncation=True,
            max_length=MAX_LENGTH,
            return_tensors="pt",
        )
        states = network.bert(**tokens, output_hidden_states=True).hidden_states
        lengths = tokens["attention_mask"].sum(1).tolist()
        below = states[-1 - num_layers]
        hidden += [x[:n].clone() for x, n in zip(below, lengths, strict=True)]
    return CachedRows(hidden, torch.tensor([row.label for row in rows]))
