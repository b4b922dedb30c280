"""A row of the table of what can be lifted, and the tiny networks that rows share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    RobertaConfig,
)

from tests.networks import batch, inputs

TINY = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 34,
    "initializer_range": 0.2,  # the default would make the outputs nearly constant
    "pad_token_id": 0,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
EXPERTS = {"experts_implementation": "eager"}  # the others know no float64


def texts() -> dict[str, Tensor]:
    """Three texts of different lengths, padded on the right."""
    return inputs(batch(3, 6))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing that people train, and what :func:`pyro_lora.lift` makes of it.

    Attributes:
        group: The table it stands in.
        name: What it is.
        build: Makes the network, with its trainable weights away from their start.
        inputs: Makes the network's keyword arguments.
        sites: Kinds and roles of the lifted sites: ``"lora: A, B; head: weight"``.
        one_by_one: Why particles run one after the other; empty where they run
            together, folded into the batch.
        raises: Part of the error of a call with several particles; empty where they
            run, together or not.
        refused: Part of the error that says why it can't be lifted, and what to do;
            empty where it can.
        note: What else a reader should know, in Markdown.
        lift: Keyword arguments of ``lift``.
        tolerance: Largest difference of outputs, and of gradients as a share of the
            largest one.
        needs: A module or class without which the row can't be built.
    """

    group: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]] = texts
    sites: str = ""
    one_by_one: str = ""
    raises: str = ""
    refused: str = ""
    note: str = ""
    lift: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-12
    needs: str = ""


def bert(auto: Any = AutoModel, **config: Any) -> nn.Module:
    """A BERT of two layers."""
    return tiny(BertConfig, auto, **{**NO_DROPOUT, **config})


def roberta(auto: Any = AutoModel, **config: Any) -> nn.Module:
    """A RoBERTa of two layers."""
    return tiny(RobertaConfig, auto, **{**NO_DROPOUT, **config})


def llama(auto: Any = AutoModel, **config: Any) -> nn.Module:
    """A Llama of two layers."""
    return tiny(LlamaConfig, auto, num_key_value_heads=1, **config)


def tiny(
    config_class: type[PretrainedConfig],
    auto: Any = AutoModelForCausalLM,
    **config: Any,
) -> nn.Module:
    """A network of two layers with a configuration of that class."""
    network = auto.from_config(config_class(**{**TINY, **config}))
    assert isinstance(network, nn.Module)
    return network


def gpt2(auto: Any = AutoModel, **config: Any) -> nn.Module:
    """A GPT-2 of two layers, whose projections are ``Conv1D``."""
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    tokens = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    network = auto.from_config(
        GPT2Config(**{**sizes, **dropout, **tokens, "initializer_range": 0.2, **config})
    )
    assert isinstance(network, nn.Module)
    return network


def lora(network: nn.Module, *targets: str, **config: Any) -> nn.Module:
    """The network with LoRA, r=3 and alpha=6, on the modules named ``targets``.

    Args:
        config: Fields of ``peft.LoraConfig``.
    """
    modules = {"target_modules": list(targets)} if targets else {}
    return adapted(
        network, LoraConfig(**{"r": 3, "lora_alpha": 6, **modules, **config})
    )


def attention_lora(network: nn.Module, **config: Any) -> nn.Module:
    """The network, a Llama, with LoRA on its query and value projections."""
    return lora(network, "q_proj", "v_proj", **config)


def adapted(
    network: nn.Module, config: PeftConfig, dtype: torch.dtype = torch.float64
) -> nn.Module:
    """The network with an adapter, in evaluation mode."""
    return started(get_peft_model(network, config), dtype)


@torch.no_grad()
def started(network: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The network with normal noise on its trainable weights, in evaluation mode.

    Most adapters start as a zero update, at which half of the gradients vanish.
    """
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network.to(dtype).eval()


def trained_only(network: nn.Module, *parts: str) -> nn.Module:
    """The network with those parameters trainable whose names contain a part."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(any(part in name for part in parts))
    return started(network)
