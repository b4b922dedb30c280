"""Networks that are only described: by a configuration, or on the meta device.

A copy without values has every parameter of a network, and takes no memory. A *twin*
has the same layers, with values, but is 8 wide: what a run asks of values, and not of
widths, such as which tokens a layer's gradients are zero at, it can answer. Where the
network turns one dtype into another its twin does so, too.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.lifting.split_layers import is_spread

AdapterConfig = PeftConfig

# PEFT's task -> the head of transformers.
_HEADS: dict[str, Any] = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "CAUSAL_LM": AutoModelForCausalLM,
}
_NARROW_VOCABULARY = 16
# What makes a network wide, by transformers' names.
_NEEDED = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


def described_network(
    network: nn.Module | LiftedNetwork | PretrainedConfig,
    peft_config: AdapterConfig | None,
    dtype: torch.dtype | None,
) -> nn.Module:
    """The network with its adapter, on the meta device where it's only described.

    Args:
        network: Or a configuration of transformers.
        peft_config: Of the adapter, unless the network has one.
        dtype: Of a configuration's weights; None is the configuration's own.

    Raises:
        ValueError: If there isn't enough to make it from.
    """
    if isinstance(network, LiftedNetwork):
        return network.network
    if isinstance(network, nn.Module) and peft_config is None:
        return network
    adapter: Any = copy.deepcopy(peft_config)  # PEFT writes into it
    if isinstance(network, nn.Module):
        base: Any = without_values(network)
    else:
        task = None if adapter is None else adapter.task_type
        if task not in _HEADS:
            raise ValueError(
                "A configuration is of a network without an adapter, and doesn't say "
                "what it's for. Give peft_config=LoraConfig(task_type=..., ...), one "
                f"of {sorted(_HEADS)}; found {task}."
            )
        if getattr(network, "quantization_config", None) is not None:
            raise ValueError(
                "The configuration has a quantization_config, but its weights become "
                "small only as they are loaded, and would be planned whole. Load the "
                "network, with it, and plan that; or set it to None, plan with "
                "dtype=torch.bfloat16, and take off what is saved: of 4 bits three "
                "quarters of the linear layers' weights."
            )
        kwargs = {} if dtype is None else {"dtype": dtype}
        with torch.device("meta"):
            base = _HEADS[task].from_config(copy.deepcopy(network), **kwargs)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that PEFT can't initialise there
        return get_peft_model(base, adapter)


def base_of(network: Any) -> Any:
    """The network under PEFT's wrapper.

    Args:
        network: Wrapped or not.
    """
    get_base = getattr(network, "get_base_model", None)
    return network if get_base is None else get_base()


def without_values(network: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are on the meta device.

    Args:
        network: Which isn't touched, nor copied first.

    Raises:
        ValueError: If processes share its layers out.
    """
    if is_spread(network):
        raise ValueError(
            "The network is shared out over processes already (fully_shard, or tensor "
            "parallelism), so that its layers can't be planned from it. Plan with the "
            "whole network, on the meta device, or its configuration; for fully_shard "
            "with world_size=W, shard_base=True."
        )
    tensors: dict[int, Any] = {}
    for x in [*network.parameters(), *network.buffers()]:
        new = torch.empty_like(x, device="meta", requires_grad=False)
        is_trained = isinstance(x, nn.Parameter)
        tensors[id(x)] = nn.Parameter(new, x.requires_grad) if is_trained else new
    return copy.deepcopy(network, tensors)  # what is in the memo isn't copied


def narrow_twin(
    network: Any, num_rows: int, is_vocabulary_whole: bool = False
) -> nn.Module | None:
    """A network of the same layers, narrow and with values, where it's known how.

    Args:
        network: With an adapter.
        num_rows: Of a batch. No layer sums over as many numbers, which would look like
            a sum over rows.
        is_vocabulary_whole: Whether it has all tokens, or 16.
    """
    base = base_of(network)
    config: Any = copy.deepcopy(getattr(base, "config", None))
    known = isinstance(base, PreTrainedModel) and hasattr(network, "peft_config")
    if not known or not all(hasattr(config, name) for name in _NEEDED):
        return None
    own_keys = getattr(config, "num_key_value_heads", None)
    num_keys = 2 if own_keys == config.num_attention_heads else 1
    width = next(w for w in (8, 16, 24) if num_rows not in (w // 2, w, w + w // 2))
    # Layers of one shape may be known by each other, so others have another shape.
    is_square = config.intermediate_size == config.hidden_size
    own = {
        "hidden_size": width,
        "num_attention_heads": 2,
        "head_dim": width // 2,
        "num_key_value_heads": num_keys,
        "intermediate_size": width if is_square else width + width // 2,
    }
    if not is_vocabulary_whole:
        own["vocab_size"] = _NARROW_VOCABULARY
    for name, size in own.items():
        if hasattr(config, name):
            setattr(config, name, size)
    config.pad_token_id = 0
    name = network.active_adapter
    adapter = copy.deepcopy(network.peft_config[name])
    twin: Any = type(base)._from_config(config, dtype=torch.float64)
    twin = get_peft_model(twin, adapter, adapter_name=name)
    theirs = {n: x.dtype for n, x in _named_tensors(network)}
    for n, x in _named_tensors(twin):
        if x.is_floating_point():
            x.data = x.data.to(_wider(theirs.get(n, base.dtype), base.dtype))
    return twin


def _named_tensors(network: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*network.named_parameters(), *network.named_buffers()]


def _wider(dtype: torch.dtype, otherwise: torch.dtype) -> torch.dtype:
    """Another dtype, that differs from others' where this one does.

    What is zero in half precision for its size alone isn't zero in the wider one.

    Args:
        dtype: Of a network's tensor.
        otherwise: In place of integers, which are quantised weights.
    """
    kind = dtype if dtype.is_floating_point else otherwise
    return torch.float64 if kind.itemsize >= 4 else torch.float32
