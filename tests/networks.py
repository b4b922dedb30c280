"""Tiny PEFT networks with random weights, and padded batches for them."""

from collections.abc import Callable
from copy import deepcopy
from functools import wraps
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    LlamaConfig,
    T5Config,
)

from pyro_lora import LiftedNetwork

PAD = 0
VOCABULARY = 50


def made_once(make: Callable[..., PeftModel]) -> Callable[..., PeftModel]:
    """Let calls with the same arguments and state of the generator give copies.

    A network and its adapter take twice as long to make as to copy.
    """
    made: dict[tuple[str, bytes], tuple[PeftModel, Tensor]] = {}

    @wraps(make)
    def copy(*args: Any, **kwargs: Any) -> PeftModel:
        key = repr((args, kwargs)), torch.get_rng_state().numpy().tobytes()
        if key not in made:
            made[key] = make(*args, **kwargs), torch.get_rng_state()
        network, state = made[key]
        torch.set_rng_state(state)
        return deepcopy(network)

    return copy


@made_once
def bert(
    num_labels: int = 2,
    *,
    num_layers: int = 2,
    hidden_size: int = 16,
    dropout: float = 0.0,
    attention: Literal["sdpa", "eager"] = "sdpa",
    dtype: torch.dtype = torch.float64,
    of_tokens: bool = False,
    **lora: Any,
) -> PeftModel:
    """A BERT classifier with LoRA on query and value, and a trained head.

    Args:
        of_tokens: Whether each token has a class, rather than the text.
        lora: Fields of ``peft.LoraConfig`` that differ from :func:`adapted`'s.
    """
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        intermediate_size=2 * hidden_size,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.2,  # the default would make the outputs nearly constant
        num_labels=num_labels,
        pad_token_id=PAD,
        attn_implementation=attention,
    )
    kind: Any = AutoModelForSequenceClassification
    if of_tokens:
        kind = AutoModelForTokenClassification
    task = "TOKEN_CLS" if of_tokens else "SEQ_CLS"
    return adapted(
        kind.from_config(config).to(dtype),
        **{"target_modules": ["query", "value"], "task_type": task, **lora},
    )


@made_once
def llama(
    num_labels: int | None = 2,
    *,
    num_layers: int = 2,
    hidden_size: int = 16,
    attention: Literal["sdpa", "eager"] = "sdpa",
    dtype: torch.dtype = torch.float64,
    **lora: Any,
) -> PeftModel:
    """A Llama with LoRA on the query and value projections.

    Args:
        num_labels: Classes of its trained head, None for a causal language model.
        lora: Fields of ``peft.LoraConfig`` that differ from :func:`adapted`'s.
    """
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=2 * hidden_size,
        max_position_embeddings=32,
        initializer_range=0.2,
        pad_token_id=PAD,
        attn_implementation=attention,
        **({} if num_labels is None else {"num_labels": num_labels}),
    )
    kind: Any = (
        AutoModelForCausalLM
        if num_labels is None
        else AutoModelForSequenceClassification
    )
    task = "CAUSAL_LM" if num_labels is None else "SEQ_CLS"
    return adapted(
        kind.from_config(config).to(dtype),
        **{"target_modules": ["q_proj", "v_proj"], "task_type": task, **lora},
    )


def t5(**config: Any) -> Any:
    """T5 without an adapter.

    Args:
        config: Further fields of its configuration.
    """
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return AutoModelForSeq2SeqLM.from_config(
        T5Config(
            vocab_size=VOCABULARY,
            **sizes,
            dropout_rate=0.0,
            initializer_factor=3.0,
            **config,
        )
    )


def adapted(network: nn.Module, **lora: Any) -> PeftModel:
    """The network with LoRA, r=3 and alpha=6, whose B isn't zero.

    Args:
        lora: Further fields of ``peft.LoraConfig``.
    """
    peft_model = get_peft_model(
        network, LoraConfig(**{"r": 3, "lora_alpha": 6, **lora})
    )
    randomize_adapter(peft_model)
    return peft_model.eval()


def without_peft(peft_model: PeftModel) -> Any:
    """The network under the adapter."""
    network = peft_model.unload()
    vars(network).pop("peft_config", None)  # which peft < 0.18 leaves there
    return network


@torch.no_grad()
def randomize_adapter(peft_model: nn.Module) -> None:
    """Give LoRA's B, zero at first, and trained biases values that matter."""
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name or (name.endswith("bias") and parameter.requires_grad):
            parameter.normal_(std=0.3)


def batch(
    batch_size: int = 5,
    length: int = 7,
    *,
    num_labels: int = 2,
    padding: Literal["left", "right"] = "right",
) -> dict[str, Tensor]:
    """Texts of different lengths, padded, with labels."""
    ids = torch.randint(1, VOCABULARY, (batch_size, length))
    lengths = length - torch.arange(batch_size) % (length - 1)
    mask = torch.arange(length) < lengths[:, None]
    mask = mask.flip(1) if padding == "left" else mask
    return {
        "input_ids": ids.where(mask, torch.tensor(PAD)),
        "attention_mask": mask.long(),
        "labels": torch.randint(num_labels, (batch_size,)),
    }


def inputs(texts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch without its labels: what the network itself takes."""
    return {name: value for name, value in texts.items() if name != "labels"}


def particles(
    lora: LiftedNetwork, *lead: int, spread: float = 0.3
) -> dict[str, Tensor]:
    """The adapter's weights plus normal noise of standard deviation ``spread``."""
    return {
        site: value + spread * torch.randn(*lead, *value.shape, dtype=value.dtype)
        for site, value in lora.weights().items()
    }


def leaves(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {site: value.clone().requires_grad_() for site, value in weights.items()}


def bound_logits(
    lora: LiftedNetwork, weights: dict[str, Tensor], texts: dict[str, Tensor]
) -> Tensor:
    """What the network gives with these weights bound."""
    with lora.bind(weights) as net:
        logits: Tensor = net(**inputs(texts)).logits
    return logits


def classifier(lora: LiftedNetwork, num_data: int = 100) -> Callable[..., Tensor]:
    """The Pyro model of a lifted classifier."""

    def model(
        input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        net = lora()
        logits = net(input_ids=input_ids, attention_mask=attention_mask).logits
        with pyro.plate("data", num_data, subsample=input_ids):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    return model
