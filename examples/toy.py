"""A toy task and tiny networks, so that each example runs in seconds on a CPU.

A review is a row of words, some of them kind and some unkind, and its label says which
are more. Words are numbers here: put your own network and tokenizer in their place.
"""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

NUM_WORDS, LENGTH, BATCH_SIZE = 24, 6, 16
KIND, UNKIND, UNSEEN = range(2, 9), range(9, 16), range(16, 24)


def base_network(num_labels: int = 2) -> BertForSequenceClassification:
    """A random encoder: the "pretrained" one, the same in each call."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=NUM_WORDS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
        num_labels=num_labels,
    )
    return BertForSequenceClassification(config).eval()


def network(num_labels: int = 2, rank: int = 4) -> PeftModel:
    """The encoder with a new LoRA adapter and a head that is trained with it."""
    config = LoraConfig(
        task_type="SEQ_CLS", r=rank, lora_alpha=8, target_modules=["query", "value"]
    )
    return get_peft_model(base_network(num_labels), config).eval()


def reviews(num: int, *, seed: int, unseen: bool = False) -> list[dict[str, Tensor]]:
    """Batches of reviews with labels.

    Args:
        num: Number of reviews.
        seed: Which ones.
        unseen: Of words that no training review has; their labels mean nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    words = torch.tensor([*UNSEEN] if unseen else [*KIND, *UNKIND])
    ids = words[torch.randint(len(words), (num, LENGTH), generator=generator)]
    sign = (ids < UNKIND.start).long() - (ids >= UNKIND.start).long()
    chance = torch.sigmoid(2.0 * sign.sum(1))  # reviews of two minds have either label
    labels = torch.bernoulli(chance, generator=generator).long()
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return [
        {name: value[i : i + BATCH_SIZE] for name, value in rows.items()}
        for i in range(0, num, BATCH_SIZE)
    ]
