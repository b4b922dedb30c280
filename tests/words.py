"""A tokenizer of eight words, and a saved adapter that has learnt which are good."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    PreTrainedTokenizerFast,
)

WORDS = ["[PAD]", "[UNK]", "good", "bad", "film", "play", "a", "the"]
TEXTS = [
    f"{article} {word} {noun}"
    for word in ("good", "bad")
    for article in ("a", "the")
    for noun in ("film", "play", "film film")
]
LABELS = ["good" in text for text in TEXTS]


def tokenizer() -> Any:
    words = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, "[UNK]"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]"
    )


def base(num_labels: int = 2) -> Any:
    """A small BERT that nobody has trained."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        initializer_range=0.3,
        num_labels=num_labels,
    )
    return AutoModelForSequenceClassification.from_config(config)


def saved_base(folder: Path, num_labels: int = 2) -> Any:
    """The same from a folder, which its adapters then remember."""
    base(num_labels).save_pretrained(folder)
    return AutoModelForSequenceClassification.from_pretrained(folder)


def adapted(network: Any, num_steps: int = 20) -> Any:
    """A network with an adapter, trained on ``TEXTS``."""
    peft_model: Any = get_peft_model(
        network, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    )
    optimizer = torch.optim.Adam(peft_model.parameters(), 0.02)
    batch = tokenizer()(TEXTS, padding=True, return_tensors="pt")
    batch = {k: batch[k] for k in ("input_ids", "attention_mask")}
    for _ in range(num_steps):
        optimizer.zero_grad()
        logits = peft_model(**batch).logits
        labels = torch.tensor(LABELS).long()
        torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
    return peft_model.eval()


def saved_adapter(folder: Path, network: Any) -> None:
    """What a Trainer leaves: an adapter with its tokenizer."""
    network.save_pretrained(str(folder), save_embedding_layers=False)
    tokenizer().save_pretrained(folder)
