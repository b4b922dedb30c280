"""Owners: the module whose forward alone reads a parameter, so that it is the slot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from peft.tuners.lora.layer import Embedding, LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from pyro_lora.lifting.slots import LinearSlot

# These read the values of their children's parameters, past the children's forward.
_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def find_owners(
    model: nn.Module, aliases: Mapping[str, Sequence[str]], adapter: str | None
) -> dict[str, nn.Module | None]:
    """The smallest module that alone reads each parameter.

    Args:
        model: The network.
        aliases: Parameter name -> all names that it has, more than one if it is tied.
        adapter: The adapter that is lifted.

    Returns:
        Parameter name -> its owner; None where only the network as a whole is.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, str | None] = {}
    for name, names in aliases.items():
        paths = [_owner(modules, n.rpartition(".")[0], adapter) for n in names]
        shared = len({id(modules[p]) for p in paths if p is not None}) > 1
        found[name] = None if shared else paths[0]
    owners = set(found.values())
    whole = whole_network(model)
    result: dict[str, nn.Module | None] = {}
    for name, own in found.items():
        # What an owner holds is its own as well: the outermost owner has it all.
        path = next((p for p in _ancestors(own) if p in owners), None)
        owner = None if path is None else modules[path]
        result[name] = owner if path not in whole or _is_linear(owner) else None
    return result


def _is_linear(module: nn.Module | None) -> bool:
    return type(module) in (nn.Linear, LinearSlot)


def whole_network(model: nn.Module) -> set[str]:
    """Paths of the modules that are the network, wrapped or not."""
    get_base = getattr(model, "get_base_model", None)
    base = model if get_base is None else get_base()
    path = next(path for path, module in model.named_modules() if module is base)
    return set(_ancestors(path))


def _ancestors(path: str | None) -> Iterator[str]:
    """The paths from the network, "", down to ``path`` itself."""
    if path is None:
        return
    yield ""
    parts = path.split(".") if path else []
    for i in range(len(parts)):
        yield ".".join(parts[: i + 1])


def _owner(
    modules: Mapping[str, nn.Module], path: str, adapter: str | None
) -> str | None:
    """The path of the owner, None if only the whole network will do."""
    chain = list(_ancestors(path))
    if "prompt_encoder" in path.split(".")[:2]:
        return None  # PeftModel reads it
    for ancestor in chain:
        module = modules[ancestor]
        if isinstance(module, TrainableTokensWrapper) or _hooked(
            module, ancestor, path
        ):
            return None
        if isinstance(module, _READERS) or _reads_below(module, adapter):
            return ancestor
    # Containers (ModuleDict, ParameterDict, ...) compute nothing.
    return next(p for p in reversed(chain) if _computes(modules[p]))


def _hooked(module: nn.Module, ancestor: str, path: str) -> bool:
    """Whether something outside of the module's class computes with its weights."""
    if is_parametrized(module):
        return True
    moves_inputs = getattr(vars(module).get("_hf_hook"), "offload", True) is False
    replaced = "forward" in vars(module) and not moves_inputs  # accelerate's device_map
    return ancestor == path and bool(module._forward_pre_hooks or replaced)


def _reads_below(module: Any, adapter: str | None) -> bool:
    if not isinstance(module, BaseTunerLayer):
        return False
    # Plain LoRA calls its matrices as the layers that they are.
    plain = isinstance(module, LoraLayer) and adapter not in module.lora_variant
    return not plain or isinstance(module, Embedding | ParamWrapper)


def _computes(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward
