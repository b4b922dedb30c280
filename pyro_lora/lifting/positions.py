"""Where the tokens of padded texts stand, as a network counts them by itself.

Networks that are told nothing count what comes first as 0, padding too: a text that is
padded on the left would stand elsewhere than alone. Told ``position_ids``, real tokens
count alone,

    attention_mask   0  0  1  1  1
    position_ids     0  0  0  1  2

and from ``padding_idx + 1`` in networks made like RoBERTa, where those before it are
the padding's own.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

# PEFT moves given positions past these prompts, and ignores them beside others.
_AFTER_PROMPTS = ("PREFIX_TUNING", "CARTRIDGE")


def takes(network: nn.Module, name: str) -> bool:
    """Whether the network under the adapter takes an argument.

    Args:
        network: PEFT's, or one without.
        name: The argument's.
    """
    return name in inspect.signature(_base(network).forward).parameters


def position_ids(network: nn.Module, attention_mask: Tensor) -> Tensor | None:
    """Positions that count real tokens alone, those of padding aside.

    Args:
        network: A network of texts, PEFT's or one without.
        attention_mask: 0 for padding, (..., T).

    Returns:
        (..., T); None where the network takes none, or makes several for each token by
        itself, as those do that see images.
    """
    config: Any = getattr(network, "active_peft_config", None)
    prompts = getattr(config, "is_prompt_learning", False)
    if prompts and config.peft_type not in _AFTER_PROMPTS:
        return None
    base = _base(network)
    by_itself = any(hasattr(x, "get_rope_index") for x in (base, *base.children()))
    if by_itself or not takes(network, "position_ids"):
        return None
    return counted(network, attention_mask)


def counted(network: nn.Module, attention_mask: Tensor) -> Tensor:
    """Likewise, one for each token of a text, whatever the network takes.

    Args:
        network: A network of texts.
        attention_mask: 0 for padding, (..., T).
    """
    positions = ((attention_mask > 0).long().cumsum(-1) - 1).clamp_min(0)
    return positions + first_position(network)


def first_position(network: nn.Module) -> int:
    """What the network counts a text's first token as.

    Args:
        network: A network of texts.
    """
    module: Any
    words = getattr(_base(network), "get_input_embeddings", lambda: None)()
    for module in network.modules():
        if words is not None and any(x is words for x in module.children()):
            counts = hasattr(type(module), "create_position_ids_from_input_ids")
            return int(module.padding_idx) + 1 if counts else 0
    return 0


def _base(network: nn.Module) -> Any:
    """What is under the adapter."""
    return getattr(network, "get_base_model", lambda: network)()
