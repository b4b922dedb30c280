"""Which adapter of a network is lifted, and whether the network computes with it."""

from __future__ import annotations

from collections.abc import Mapping

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn

Wrapper = ModulesToSaveWrapper | TrainableTokensWrapper
AdapterModules = Mapping[str, BaseTunerLayer | Wrapper]


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
            if isinstance(module, BaseTunerLayer | Wrapper)
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
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, BaseTunerLayer | Wrapper) and _holds(module, adapter)
    }


def _holds(module: BaseTunerLayer | Wrapper, adapter: str | None) -> bool:
    if isinstance(module, TrainableTokensWrapper):
        module = module.token_adapter
    return any(adapter in getattr(module, n, ()) for n in module.adapter_layer_names)


def check_in_use(
    model: nn.Module, modules: AdapterModules, adapter: str | None
) -> None:
    """Check that the network computes with the adapter's layers.

    Raises:
        ValueError: If the adapter is unloaded, merged, disabled or not the active one,
            so that weights bound to it would change nothing.
    """
    for path, module in modules.items():
        if isinstance(module, BaseTunerLayer) and module.merged:
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
    for path, module in modules.items():  # the first tells: PEFT unloads them all
        if model.get_submodule(path) is not module:
            raise ValueError(
                f"{path}: expected the adapter's layer, found that it was taken out of "
                "the network (by unload(), perhaps). Lift a network with its adapter."
            )
        break
