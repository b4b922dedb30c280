"""Which parameters are lifted, what can't be, and what sites are called."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.cpt import CPTEmbedding
from peft.tuners.lora.layer import (
    Embedding,
    LoraLayer,
    MultiheadAttention,
    ParamWrapper,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.tuners.xlora import XLoraModel
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from pyro_lora.ground.synchronisation import lacks_values
from pyro_lora.lifting.slots import LinearSlot, Location
from pyro_lora.lifting.split_layers import is_split, is_tensor_parallel

Wrapper = ModulesToSaveWrapper | TrainableTokensWrapper
AdapterModules = Mapping[str, BaseTunerLayer | Wrapper]
AdapterConfigs = Mapping[str, Mapping[Any, PeftConfig]]


def adapter_configs(model: nn.Module) -> AdapterConfigs:
    """The adapters' configurations, by path of what PEFT has wrapped and by name.

    Args:
        model: The network, wrapped itself (the path is ""), or with parts that are.
    """
    found: dict[str, Mapping[Any, PeftConfig]] = {}
    for path, module in model.named_modules():
        configs = getattr(module, "peft_config", None)  # or a user's own attribute
        if isinstance(configs, Mapping) and not any(_is_in(path, x) for x in found):
            found[path] = configs
            if not path:  # everything else is in it
                break
    return found


def config_at(
    parts: AdapterConfigs, adapter: str | None, name: str
) -> tuple[PeftConfig | None, str]:
    """The configuration that a parameter's adapter has, and its name in that part.

    Args:
        parts: From :func:`adapter_configs`.
        adapter: The adapter's name.
        name: The parameter's.
    """
    for path, configs in parts.items():
        if _is_in(name, path) and adapter in configs:
            return configs[adapter], name.removeprefix(f"{path}.")
    return None, name


def _is_in(path: str, outer: str) -> bool:
    return not outer or path == outer or path.startswith(f"{outer}.")


def adapter_name(model: nn.Module, adapter: str | None) -> str | None:
    """The adapter to lift: the one named, else the active one, None without PEFT.

    One inside of a network that isn't PEFT's is taken where it is trained, or nothing
    is.

    Raises:
        ValueError: If there is no such adapter, or several are active.
    """
    parts = adapter_configs(model)
    known = {name for configs in parts.values() for name in configs}
    if not known:
        if adapter is not None:
            raise ValueError(f"adapter={adapter!r} was given, but the model has none.")
        return None
    if adapter is None:
        if "" not in parts and _only_others_trained(model):
            return None
        active = {
            active
            for module in model.modules()
            if isinstance(module, BaseTunerLayer | Wrapper)
            for active in module.active_adapters
        }
        candidates = sorted(active or known)
        if len(candidates) > 1:
            where = "" if "" in parts else f" in the parts {sorted(parts)}"
            raise ValueError(
                f"Expected one active adapter, found {candidates}{where}. "
                "Name the one to lift by adapter=."
            )
        adapter = candidates[0]
    if adapter not in known:
        raise ValueError(
            f"No adapter {adapter!r}: the model has {sorted(known)}. "
            "Name one of them by adapter=."
        )
    return adapter


def _only_others_trained(model: nn.Module) -> bool:
    """Whether something is trained, and no adapter's weight."""
    modules = dict(model.named_modules(remove_duplicate=False))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    kinds = {_named(modules, name, None)[0] for name in trained}
    return bool(kinds) and "other adapter" not in kinds


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


def check_unmerged(modules: AdapterModules) -> None:
    """Check that the base weights are without the adapter's updates.

    Raises:
        ValueError: If the adapter is merged into them. PEFT subtracts at unmerging what
            the adapter's weights then say, so these have to stay until then.
    """
    for path, module in modules.items():
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise ValueError(
                f"{path}: the adapter is merged into the base weight. "
                "Call model.unmerge_adapter() first."
            )


def others_in_use(modules: AdapterModules, adapter: str | None) -> set[str]:
    """The adapters that are active beside this one."""
    active = {x for module in modules.values() for x in module.active_adapters}
    return active - {adapter}


def check_in_use(
    modules: AdapterModules, adapter: str | None, others: Set[str]
) -> None:
    """Check that the network computes with the adapter's layers, and those it had.

    Args:
        modules: Those that hold weights of the adapter, by path.
        adapter: Its name.
        others: The adapters that were active beside it where it was lifted.

    Raises:
        ValueError: If the adapter is merged, disabled or not the active one, so that
            weights bound to it would change nothing, or others are active beside it.
    """
    check_unmerged(modules)
    for path, module in modules.items():
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
    found = others_in_use(modules, adapter)
    if found != others:
        raise ValueError(
            f"Beside adapter {adapter!r} {sorted(found) or 'none'} is active, where it "
            f"was lifted {sorted(others) or 'none'}: that is another network. Call "
            "model.set_adapter as before, or lift it anew."
        )


def uncompiled(model: nn.Module) -> nn.Module:
    """What ``torch.compile(model)`` has wrapped, else the network itself."""
    # Not by getattr, which PEFT hands on to the base.
    inner = model._modules.get(_COMPILED)
    return model if inner is None else inner


def bare_names(model: nn.Module, adapter: str | None) -> Callable[[str], str | None]:
    """Names as they would be under any other adapter name, and not compiled.

    Args:
        model: The network.
        adapter: The adapter's name.

    Returns:
        A function of the name of a tensor or module; None where it's another adapter's.
    """
    parts = adapter_configs(model).values()
    # A part without the lifted adapter computes with its own, which are frozen.
    adapters = {name for x in parts if adapter in x for name in x}
    holders: set[str] = set()  # attributes that hold tensors by adapter
    for module in model.modules():
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
            holders |= {*module.adapter_layer_names}
            holders |= {*getattr(module, "other_param_names", ())}
        if isinstance(module, PeftModel):
            holders.add("prompt_encoder")

    def bare(name: str) -> str | None:
        kept: list[str] = []
        for part in name.split("."):
            if kept and kept[-1] in holders and part in adapters:
                if part != adapter:
                    return None
            elif part != _COMPILED:
                kept.append(part)
        return ".".join(kept)

    return bare


def check_network(model: nn.Module) -> None:
    """Check that calling the network leaves base and bound weights alone.

    Raises:
        ValueError: If it doesn't: LoRA of ``nn.MultiheadAttention``, X-LoRA, CPT, or
            4-bit layers that bitsandbytes has packed for inference on a CPU.
    """
    for path, module in model.named_modules():
        if isinstance(module, MultiheadAttention):
            raise ValueError(
                f"{path}: LoRA of nn.MultiheadAttention changes the base weights at "
                "every call and can't be lifted. Adapt torch.nn.Linear layers."
            )
        if isinstance(module, XLoraModel):
            raise ValueError(
                "X-LoRA mixes several adapters and switches off their gradients at "
                "every call, so it can't be lifted. Load one LoRA adapter."
            )
        if isinstance(module, CPTEmbedding):
            raise ValueError(
                f"{path}: CPT writes into its own weights at every call, so it can't "
                "be lifted. Use another method of prompt learning, or LoRA."
            )
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"{path}: bitsandbytes has packed this 4-bit layer for inference on "
                "the CPU, which has no gradient. Load the network again and lift it "
                "before its first call in evaluation mode, or use a GPU."
            )


def keep_bitsandbytes_differentiable(model: nn.Module) -> None:
    """Stop 4-bit layers from packing their weights in place, which has no gradient.

    bitsandbytes does so on some CPUs at the first call in evaluation mode.
    """
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            vars(module)["support_avx512bf16_for_cpu"] = False


def check_storages(lifted: Iterable[str], model: nn.Module) -> None:
    """Check that no lifted parameter shares its numbers with another one.

    One ``nn.Parameter`` in several places is one parameter. Two of them on the same
    numbers, as PEFT's ``ensure_weight_tying`` makes of the matrices for tied
    embeddings, would be sites that move independently.

    Args:
        lifted: Names of lifted parameters.
        model: The network.

    Raises:
        ValueError: Naming both.
    """
    by_storage: dict[Any, list[tuple[str, Tensor]]] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        # Quantised types and the like have no storage of their own, and no gradient.
        if type(tensor) in (nn.Parameter, Tensor) and tensor.numel():
            start = tensor.device, tensor.untyped_storage().data_ptr()
            by_storage.setdefault(start, []).append((name, tensor))
    names = set(lifted)
    for (_, start), tensors in by_storage.items():
        own = [pair for pair in tensors if pair[0] in names]
        for (one, x), (two, y) in product(own if start else [], tensors):  # 0: no data
            if x is not y and _overlap(x, y):
                raise ValueError(
                    f"Parameters {one!r} and {two!r} are two views of the same numbers "
                    "(tied by PEFT's ensure_weight_tying=True, perhaps), and would be "
                    "lifted as if they could differ. Leave one out (of target_modules, "
                    "say), or share one nn.Parameter."
                )


def _overlap(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors on one storage have numbers in common."""
    if x.element_size() != y.element_size():
        return True  # one reads the other's bytes as another type
    starts = [z.storage_offset() for z in (x, y)]
    steps = [zip(z.shape, z.stride(), strict=True) for z in (x, y)]
    ends = [
        1 + start + sum((size - 1) * stride for size, stride in of_dims)
        for start, of_dims in zip(starts, steps, strict=True)
    ]
    if ends[0] <= starts[1] or ends[1] <= starts[0]:
        return False
    marked = torch.zeros(max(ends), dtype=torch.bool)
    marked.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(True)
    return bool(marked.as_strided(y.shape, y.stride(), y.storage_offset()).any())


def check_parameter(
    name: str, kind: str, parameter: nn.Parameter, modules: Mapping[str, nn.Module]
) -> None:
    """Check that a parameter can be lifted.

    Args:
        name: Its full name.
        kind: The first part of its site's name, or "other adapter".
        parameter: The parameter.
        modules: The network's modules by path.

    Raises:
        ValueError: If it belongs to another adapter or to a recurrent layer, has no
            values, or it or its layer is split over processes.
    """
    holder = modules[name.rpartition(".")[0]]
    if kind == "other adapter":
        raise ValueError(
            f"Trainable parameter {name!r} belongs to an adapter that isn't lifted. "
            "Freeze it, or lift that adapter by adapter=."
        )
    if isinstance(holder, nn.RNNBase):
        raise ValueError(
            f"Parameter {name!r} can't be lifted: {type(holder).__name__} keeps "
            "references of its own to its weights. Freeze it (requires_grad_(False))."
        )
    if lacks_values(parameter):
        raise ValueError(
            f"Parameter {name!r} can't be lifted: it is on the meta device and has no "
            "values (offloaded, perhaps). Load the network whole, or freeze it "
            "(requires_grad_(False))."
        )
    if is_tensor_parallel(name, modules):
        raise ValueError(
            f"Parameter {name!r} can't be lifted: its layer is split over processes by "
            "tensor parallelism, so that each has another part of the output. Leave "
            "the layers with adapters whole, and split others."
        )
    if is_split(parameter):
        raise ValueError(
            f"Parameter {name!r} can't be lifted: it is sharded over processes. Leave "
            "what is trained whole: fully_shard(module, ignored_params={p for p in "
            "network.parameters() if p.requires_grad}). A saved adapter is trained if "
            "it's loaded with is_trainable=True."
        )


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
    owner_paths: dict[str, str | None] = {}
    for name, names in aliases.items():
        paths = [_owner(modules, n.rpartition(".")[0], adapter) for n in names]
        shared = len({id(modules[p]) for p in paths if p is not None}) > 1
        owner_paths[name] = None if shared else paths[0]
    owners = set(owner_paths.values())
    whole = whole_network(model)
    result: dict[str, nn.Module | None] = {}
    for name, own in owner_paths.items():
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
    if _prompt_at(modules, path.split(".")) is not None:
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
_FACTOR = re.compile(r"\.lora_(?:embedding_)?([ABE])\b(?!.*\.bias$)")
_SHAPE = re.compile(r"_\d+(x\d+)*$")
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
    named = {
        full_name: (parameter, *_named(modules, full_name, adapter))
        for full_name, parameter in model.named_parameters()
    }
    # An adapter that was loaded for inference is frozen as a whole.
    training = any(p.requires_grad and k not in _OUTSIDE for p, k, *_ in named.values())
    sites: dict[str, str] = {}
    for full_name, (parameter, kind, path, role) in named.items():
        if kind == "setting" or parameter.numel() == 0:  # all of AdaLoRA's ranks pruned
            continue
        own = kind not in _OUTSIDE and not training
        if parameter.requires_grad or (own and not _always_frozen(modules, full_name)):
            check_parameter(full_name, kind, parameter, modules)
            sites[full_name] = ".".join(
                p for p in (kind, name, _short(modules, path), role) if p
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
        names = aliases[id(named[full_name][0])]
        locations = dict.fromkeys(_location(modules, alias) for alias in names)
        lifted.append(LiftedParameter(full_name, site, None, tuple(locations)))
    owners = find_owners(model, {n: aliases[id(named[n][0])] for n in sites}, adapter)
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
    start = _prompt_at(modules, parts)
    if start is not None:
        _, name, *inner, role = parts[start:]
        kind = "prompt" if name == adapter else "other adapter"
        return kind, ".".join([*parts[:start], *inner]), role
    role = "" if parts[-1].isdigit() else parts[-1]
    return "base", ".".join(p for p in parts[:-1] if p != "base_layer"), role


def _prompt_at(modules: Mapping[str, nn.Module], parts: Sequence[str]) -> int | None:
    """Where PEFT's prompt encoders are among the parts of a path, if they are."""
    for i, part in enumerate(parts):
        is_prompt = part == "prompt_encoder"
        if is_prompt and isinstance(modules.get(".".join(parts[:i])), PeftModel):
            return i
    return None


def _short(modules: Mapping[str, nn.Module], module_path: str) -> str:
    """The path without wrappers, a leading ``model.`` and layer indices."""
    wrapper = ".base_model.model."
    outer, found, inner = module_path.partition(wrapper)
    if found and isinstance(modules.get(outer), PeftModel):  # a part of the network
        module_path = f"{outer}.{inner}"
    path = ".".join(p for p in module_path.split(".") if p != _COMPILED)
    path = path.removeprefix("base_model.model.").removeprefix("model.")
    return ".".join(part for part in path.split(".") if not part.isdigit())


def lora_factor(parameter: str) -> tuple[str, str] | None:
    """Module path and role, A, B or (AdaLoRA) E, of a parameter; None for another."""
    match = _FACTOR.search(parameter)
    return None if match is None else (parameter[: match.start()], match[1])


def without_shape(site: str) -> str:
    """The name of a site without a suffix such as ``_4x64``."""
    return _SHAPE.sub("", site)


def _with_shape_suffixes(lifted: Iterable[LiftedParameter]) -> list[LiftedParameter]:
    """Give sites that would mix shapes a suffix such as ``_4x64``."""
    lifted = list(lifted)
    shapes: defaultdict[str, set[torch.Size]] = defaultdict(set)
    for p in lifted:
        shapes[p.site].add(p.parameter.shape)
    return [
        p
        if len(shapes[p.site]) == 1
        else replace(p, site=p.site + "_" + "x".join(map(str, p.parameter.shape)))
        for p in lifted
    ]
