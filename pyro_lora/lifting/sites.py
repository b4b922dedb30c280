"""Names: which parameters are lifted, and which of them form one site."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from pyro_lora.lifting.owners import find_owners
from pyro_lora.lifting.refusals import check_parameter, check_storages
from pyro_lora.lifting.slots import Location

# PEFT's names of an adapter's parts -> kind and role in the site's name; of the others
# the kind is what stands before the first underscore: ia3_l, vera_lambda_b.
_ROLES = {
    "lora_embedding_A": ("lora", "A"),
    "lora_embedding_B": ("lora", "B"),
    "lora_magnitude_vector": ("lora", "magnitude"),
    "ln_tuning_layers": ("ln_tuning", ""),
    "trainable_tokens_delta": ("trainable_tokens", "delta"),
}
_COMPILED = "_orig_mod"  # the part of a path that torch.compile adds
# What isn't part of the adapter, and is lifted only if it is trainable.
_OUTSIDE = ("base", "prompt", "other adapter", "setting")


@dataclass(frozen=True, eq=False)
class LiftedParameter:
    """One parameter that is lifted.

    Attributes:
        name: As in ``network.named_parameters()``.
        site: Its site's name.
        owner: The module whose forward alone reads it; None: the network's.
        locations: All places that hold it, more than one if it is tied.
    """

    name: str
    site: str
    owner: nn.Module | None
    locations: tuple[Location, ...]

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter itself."""
        holder, attribute = self.locations[0]
        return cast(nn.Parameter, holder._parameters[attribute])


def lifted_parameters(
    model: nn.Module, adapter: str | None, name: str | None
) -> list[LiftedParameter]:
    """All parameters to lift, in the order of ``model.named_parameters()``.

    Lifted are the adapter's own weights (trainable or frozen, since an adapter
    loaded for inference is frozen), its ``modules_to_save``, and whatever else is
    trainable.

    Args:
        model: The network.
        adapter: The adapter's name.
        name: Put into the site names.

    Raises:
        ValueError: If there is nothing to lift, or a trainable parameter can't be
            lifted or is a view of another parameter's numbers.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    aliases: dict[int, list[str]] = {}
    for full_name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(full_name)
    found = {
        full_name: (parameter, *_named(modules, full_name, adapter))
        for full_name, parameter in model.named_parameters()
    }
    # An adapter that was loaded for inference is frozen as a whole.
    training = any(p.requires_grad and k not in _OUTSIDE for p, k, *_ in found.values())
    sites: dict[str, str] = {}
    for full_name, (parameter, kind, path, role) in found.items():
        if kind == "setting" or parameter.numel() == 0:  # all of AdaLoRA's ranks pruned
            continue
        own = kind not in _OUTSIDE and not training
        if parameter.requires_grad or (own and not _always_frozen(modules, full_name)):
            check_parameter(full_name, kind, parameter, modules)
            sites[full_name] = ".".join(
                p for p in (kind, name, _short(path), role) if p
            )
    if not sites:
        raise ValueError(
            "Nothing to lift: the model has no adapter and no trainable parameter. "
            "Wrap it with peft.get_peft_model first, or set requires_grad on the "
            "parameters that should be random."
        )
    check_storages(sites, model)
    for full_name, site in sites.items():
        if any(other.startswith(f"{site}.") for other in sites.values()):
            sites[full_name] = f"{site}.weight"  # no site is a prefix of another
    lifted = []
    for full_name, site in sites.items():
        names = aliases[id(found[full_name][0])]
        locations = dict.fromkeys(_location(modules, alias) for alias in names)
        lifted.append(LiftedParameter(full_name, site, None, tuple(locations)))
    owners = find_owners(model, {n: aliases[id(found[n][0])] for n in sites}, adapter)
    return _with_shape_suffixes(replace(p, owner=owners[p.name]) for p in lifted)


def _location(modules: Mapping[str, nn.Module], full_name: str) -> Location:
    path, _, attribute = full_name.rpartition(".")
    return modules[path], attribute


def _always_frozen(modules: Mapping[str, nn.Module], full_name: str) -> bool:
    """Whether PEFT never trains this weight of an adapter."""
    parts = full_name.split(".")
    return any(
        isinstance(module := modules[".".join(parts[:i])], BaseTunerLayer)
        and parts[i] in module.frozen_peft_weight_names.get(parts[i + 1], ())
        for i in range(1, len(parts) - 1)
    )


def _named(
    modules: Mapping[str, nn.Module], full_name: str, adapter: str | None
) -> tuple[str, str, str]:
    """The kind of a parameter, the path of the layer that it adapts, and its role."""
    parts = full_name.split(".")
    for i in range(len(parts) - 1, 0, -1):  # the innermost adapter layer has it
        path, rest = ".".join(parts[:i]), parts[i:]
        module: Any = modules.get(path)
        if isinstance(module, ModulesToSaveWrapper) and rest[0] == "modules_to_save":
            kind = "head" if rest[1] == adapter else "other adapter"
            return kind, ".".join([path, *rest[2:-1]]), rest[-1]
        if isinstance(module, BaseTunerLayer) and rest[0] in module.other_param_names:
            return "setting", path, rest[0]  # AdaLoRA's number of ranks
        if isinstance(module, BaseTunerLayer) and rest[0] in module.adapter_layer_names:
            kind, role = _ROLES.get(rest[0], rest[0].split("_", 1))
            # lora_A.default.weight is A itself; a trained bias has a name of its own.
            tail = [] if role and rest[2:] == ["weight"] else rest[2:]
            suffix = tail if kind == "lora" and tail else [role, *tail]
            kind = kind if rest[1] == adapter else "other adapter"
            return kind, path, ".".join(part for part in suffix if part)
    if "prompt_encoder" in parts[:2]:  # PEFT's prompt learning, compiled perhaps
        _, name, *inner, role = parts[parts.index("prompt_encoder") :]
        return "prompt" if name == adapter else "other adapter", ".".join(inner), role
    role = "" if parts[-1].isdigit() else parts[-1]
    return "base", ".".join(p for p in parts[:-1] if p != "base_layer"), role


def _short(module_path: str) -> str:
    """The path without wrappers, a leading ``model.`` and layer indices."""
    path = ".".join(p for p in module_path.split(".") if p != _COMPILED)
    path = path.removeprefix("base_model.model.").removeprefix("model.")
    return ".".join(part for part in path.split(".") if not part.isdigit())


def _with_shape_suffixes(found: Iterable[LiftedParameter]) -> list[LiftedParameter]:
    """Give sites that would mix shapes a suffix such as ``_4x64``."""
    found = list(found)
    shapes: defaultdict[str, set[torch.Size]] = defaultdict(set)
    for p in found:
        shapes[p.site].add(p.parameter.shape)
    return [
        p
        if len(shapes[p.site]) == 1
        else replace(p, site=p.site + "_" + "x".join(map(str, p.parameter.shape)))
        for p in found
    ]
