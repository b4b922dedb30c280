"""Names: which parameters are lifted, and which of them form one site."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from peft.tuners.lora.layer import (
    Embedding,
    LoraLayer,
    MultiheadAttention,
    ParamWrapper,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from pyro_lora.lifting.slots import LinearSlot

_LORA_MATRICES = {"lora_A": "A", "lora_B": "B"}
# These read the values of A and B and don't call them as layers, so slots in them would
# be passed by.
_UNLIFTABLE_LORA = (Embedding, MultiheadAttention, ParamWrapper)


AdapterModules = Mapping[str, LoraLayer | ModulesToSaveWrapper]


@dataclass(frozen=True)
class LiftedParameter:
    """One parameter that is lifted: its full name, its layer and its site's name."""

    name: str
    layer: nn.Module
    attribute: str  # "weight" or "bias"
    site: str

    @property
    def shape(self) -> torch.Size:
        """The parameter's shape."""
        parameter: nn.Parameter = getattr(self.layer, self.attribute)
        return parameter.shape


def lifted_parameters(
    model: nn.Module, adapter: str | None, name: str | None
) -> list[LiftedParameter]:
    """All parameters to lift, in the order of ``model.named_parameters()``.

    Lifted are the adapter's own matrices (trainable or frozen, since an adapter
    loaded for inference is frozen), its ``modules_to_save``, and whatever else is
    trainable.

    Args:
        model: The network.
        adapter: The adapter's name, see :func:`adapter_name`.
        name: Put into the site names.

    Raises:
        ValueError: If there is nothing to lift, the adapter is merged or disabled, or
            a trainable parameter can't be lifted.
    """
    in_use = adapter_modules(model, adapter)
    check_in_use(in_use, adapter)
    _check_lora_layers(in_use, adapter)
    modules = dict(model.named_modules())
    lora_layers = [p for p, m in modules.items() if isinstance(m, LoraLayer)]
    wrappers = [p for p, m in modules.items() if isinstance(m, ModulesToSaveWrapper)]
    uses = Counter(
        id(p) for module in modules.values() for p in module.parameters(recurse=False)
    )
    found = []
    for full_name, parameter in model.named_parameters():
        path, _, attribute = full_name.rpartition(".")
        module_path, kind, role = _locate(path, lora_layers, wrappers, adapter)
        if kind in ("base", "other adapter") and not parameter.requires_grad:
            continue
        layer = modules[path]
        _check_liftable(full_name, kind, layer, attribute, uses[id(parameter)])
        suffix = {"lora": role, "head": attribute, "base": attribute}[kind]
        if kind == "lora" and attribute == "bias":
            suffix = "bias"
        middle = [part for part in (name, _short(module_path)) if part]
        site = ".".join([kind, *middle, suffix])
        found.append(LiftedParameter(full_name, layer, attribute, site))
    if not found:
        raise ValueError(
            "Nothing to lift: the model has no LoRA adapter and no trainable "
            "parameter. Wrap it with peft.get_peft_model first, or set "
            "requires_grad on the parameters that should be random."
        )
    return _with_shape_suffixes(found)


def adapter_name(model: nn.Module, adapter: str | None) -> str | None:
    """The adapter to lift: the one named, else the active one, None without PEFT.

    Raises:
        ValueError: If there is no such adapter, or several are active.
    """
    configs = getattr(model, "peft_config", None)
    if configs is None:
        if adapter is not None:
            raise ValueError(f"adapter={adapter!r} was given, but the model has none.")
        return None
    if adapter is None:
        active = {
            active
            for module in model.modules()
            if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)
            for active in module.active_adapters
        }
        candidates = sorted(active or configs)
        if len(candidates) > 1:
            raise ValueError(
                f"Expected one active adapter, found {candidates}. "
                "Name the one to lift by adapter=."
            )
        adapter = candidates[0]
    if adapter not in configs:
        raise ValueError(
            f"No adapter {adapter!r}: the model has {sorted(configs)}. "
            "Name one of them by adapter=."
        )
    return adapter


def adapter_modules(model: nn.Module, adapter: str | None) -> AdapterModules:
    """The modules that hold weights of the adapter, by path."""
    found: dict[str, LoraLayer | ModulesToSaveWrapper] = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.r:
            found[path] = module
        elif isinstance(module, ModulesToSaveWrapper):
            if adapter in module.modules_to_save.keys():
                found[path] = module
    return found


def check_in_use(modules: AdapterModules, adapter: str | None) -> None:
    """Check that the network computes with the adapter's layers.

    Raises:
        ValueError: If the adapter is merged, disabled or not the active one, so that
            weights bound to it would change nothing.
    """
    for path, module in modules.items():
        if isinstance(module, LoraLayer) and module.merged:
            raise ValueError(
                f"{path}: the adapter is merged into the base weight. "
                "Call model.unmerge_adapter() first."
            )
        if module.disable_adapters:
            raise ValueError(
                f"{path}: adapters are disabled. Leave `with model.disable_adapter()`, "
                "or call model.enable_adapter_layers()."
            )
        if adapter not in module.active_adapters:
            raise ValueError(
                f"{path}: adapter {adapter!r} is not active (active: "
                f"{module.active_adapters}). Call model.set_adapter({adapter!r})."
            )


def _check_lora_layers(modules: AdapterModules, adapter: str | None) -> None:
    for path, layer in modules.items():
        if isinstance(layer, _UNLIFTABLE_LORA):
            raise ValueError(
                f"{path}: LoRA of an embedding, a parameter or nn.MultiheadAttention "
                f"({type(layer).__name__}) can't be lifted. Adapt torch.nn.Linear only."
            )
        if isinstance(layer, LoraLayer) and adapter in layer.lora_variant:
            raise ValueError(
                f"{path}: this LoRA variant "
                f"({type(layer.lora_variant[adapter]).__name__}) reads its matrices "
                "outside of their layers and can't be lifted. Use plain LoRA or rsLoRA."
            )


def _locate(
    path: str, lora_layers: list[str], wrappers: list[str], adapter: str | None
) -> tuple[str, str, str]:
    """Module path, kind of site and role (A or B) of the layer at ``path``."""
    for root in lora_layers:
        rest = path[len(root) + 1 :].split(".")
        if path.startswith(root + ".") and rest[0] in _LORA_MATRICES:
            kind = "lora" if rest[1:] == [adapter] else "other adapter"
            return root, kind, _LORA_MATRICES[rest[0]]
    for root in wrappers:
        inner = f"{root}.modules_to_save."
        if path.startswith(inner):
            name, _, rest_path = path[len(inner) :].partition(".")
            kind = "head" if name == adapter else "other adapter"
            return f"{root}.{rest_path}".rstrip("."), kind, ""
    return path.replace(".base_layer", ""), "base", ""


def _check_liftable(
    name: str, kind: str, layer: nn.Module, attribute: str, num_uses: int
) -> None:
    if kind == "other adapter":
        raise ValueError(
            f"Trainable parameter {name!r} belongs to an adapter that isn't lifted. "
            "Freeze it, or lift that adapter by adapter=."
        )
    if type(layer) not in (nn.Linear, LinearSlot):
        raise ValueError(
            f"Parameter {name!r} can't be lifted: expected the weight or bias of "
            f"torch.nn.Linear, found {attribute!r} of {type(layer).__name__}. "
            "Freeze it (requires_grad_(False)), or adapt linear layers only."
        )
    if attribute not in ("weight", "bias") or "forward" in vars(layer):
        raise ValueError(
            f"Parameter {name!r} can't be lifted: the forward or the weights of its "
            "layer were replaced by a hook. Remove the hook, or freeze the parameter "
            "(requires_grad_(False))."
        )
    if num_uses > 1:
        raise ValueError(
            f"Parameter {name!r} can't be lifted: {num_uses} layers share it, and a "
            "site would replace it in one of them only. Untie or freeze it "
            "(requires_grad_(False))."
        )


def _short(module_path: str) -> str:
    """The path without PEFT's wrapper, a leading ``model.`` and layer indices."""
    path = module_path.removeprefix("base_model.model.").removeprefix("model.")
    return ".".join(part for part in path.split(".") if not part.isdigit())


def _with_shape_suffixes(found: list[LiftedParameter]) -> list[LiftedParameter]:
    """Give sites that would mix shapes a suffix such as ``_4x64``."""
    shapes = defaultdict(set)
    for p in found:
        shapes[p.site].add(p.shape)
    return [
        p
        if len(shapes[p.site]) == 1
        else replace(p, site=p.site + "_" + "x".join(map(str, p.shape)))
        for p in found
    ]
