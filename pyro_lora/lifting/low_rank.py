"""The updates of weight matrices that LoRA's parts make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from peft.tuners.adalora import AdaLoraConfig
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora.layer import Embedding, LoraLayer, ParamWrapper
from torch import Tensor, nn

from pyro_lora.lifting.sites import LiftedParameter
from pyro_lora.lifting.slots import Location


def has_one_update(layer: object) -> TypeGuard[LoraLayer]:
    """Whether an adapter's layer adds one product s B A to one weight matrix."""
    if not isinstance(layer, LoraLayer) or isinstance(layer, ParamWrapper):
        return False
    base: Any = layer.get_base_layer()
    return getattr(base, "groups", 1) == 1  # grouped convolutions add one a group


def update_factors(
    layer: LoraLayer, adapter: str | None, values: Mapping[Location, Tensor]
) -> tuple[Tensor, Tensor]:
    """The factors s B (..., O, R) and A (..., R, I) of a layer's update.

    Args:
        layer: A layer of the adapter.
        adapter: The adapter's name.
        values: Of the lifted parameters, with any leading dims; the layer's own are
            taken where there is none.
    """
    assert adapter is not None
    if isinstance(layer, Embedding):
        a = _value(layer.lora_embedding_A, adapter, values)
        b = _value(layer.lora_embedding_B, adapter, values)
    else:
        a = _value(layer.lora_A, adapter, values)
        b = _value(layer.lora_B, adapter, values)
    scaling: Any = layer.scaling[adapter]
    if isinstance(layer, AdaLoraLayer):
        e = _value(layer.lora_E, adapter, values)  # (..., R, 1)
        scaling = scaling / (layer.ranknum[adapter].detach() + 1e-5)  # as PEFT does
        b = b * e.mT
    return scaling * b, a


def factor_locations(layer: LoraLayer, adapter: str | None) -> set[Location]:
    """Where the parameters are that :func:`update_factors` takes."""
    assert adapter is not None
    names = ("lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B")
    parts: list[Any] = [getattr(layer, name, {}) for name in names]
    return {_location(part, adapter) for part in parts if adapter in part}


def _location(part: nn.Module, adapter: str) -> Location:
    if isinstance(part, nn.ModuleDict):
        return part[adapter], "weight"
    return part, adapter


def _value(part: nn.Module, adapter: str, values: Mapping[Location, Tensor]) -> Tensor:
    """A matrix from ``lora_A`` and the like: a dict of layers or of parameters."""
    location = _location(part, adapter)
    own = location[0]._parameters[location[1]]
    assert own is not None
    value = values.get(location, own.detach())
    # A convolution's kernel dims join the inputs, as in PEFT's product of the two.
    return value.flatten(1 - own.ndim) if own.ndim > 2 else value


def rank_masks(
    model: nn.Module,
    adapter: str | None,
    parameters: Mapping[str, tuple[LiftedParameter, ...]],
) -> dict[str, Tensor]:
    """The ranks that AdaLoRA's budget has kept; pruned ones stay zero.

    Args:
        model: The network.
        adapter: The adapter that is lifted.
        parameters: Site -> its parameters, in layer order.

    Returns:
        Site ``lora.<path>.E`` -> (L, R, 1), 1 where a rank is kept and 0 where it was
        pruned; only the sites where ranks were pruned.
    """
    config: Any = getattr(model, "peft_config", {}).get(adapter)
    if not isinstance(config, AdaLoraConfig):
        return {}
    # PEFT names them as in the base model, once saved without the adapter's name.
    kept = {
        name.removesuffix(f".{adapter}"): pattern
        for name, pattern in (config.rank_pattern or {}).items()
    }
    masks = {}
    for site, members in parameters.items():
        layers = []
        for p in members:
            name = p.name.removeprefix("base_model.model.").removesuffix(f".{adapter}")
            pattern = kept.get(name, [])
            mask = torch.ones_like(p.parameter)
            if len(pattern) == len(mask):  # a loaded adapter has lost the others
                mask = mask * mask.new_tensor(pattern)[:, None]
            layers.append(mask.detach())
        if not torch.stack(layers).all():
            masks[site] = torch.stack(layers)
    return masks
