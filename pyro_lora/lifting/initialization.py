"""Where inference starts: ``init_loc_fn`` functions for guides and particles."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.adalora.layer import AdaLoraLayer
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyro_lora.lifting.sites import LiftedParameter
from pyro_lora.lifting.slots import swapped

if TYPE_CHECKING:
    from pyro_lora.lifting.lifted_network import LiftedNetwork

InitFn = Callable[[dict[str, Any]], Tensor]


# Half-precision networks must tell the particles apart: the least change of a number of
# size one that bfloat16 still resolves.
RESOLVED = torch.finfo(torch.bfloat16).eps


def init_to_adapter(lora: LiftedNetwork, jitter: float | str) -> InitFn:
    """The adapter's present values plus normal noise.

    Raises:
        ValueError: If ``jitter`` is neither ``"auto"`` nor a number from 0 on.
    """
    weights = lora.weights()
    if jitter == "auto":
        scales = _resolved_scales(lora, weights)
    elif isinstance(jitter, str) or not jitter >= 0:
        raise ValueError(
            f"jitter: expected 'auto' or a standard deviation from 0 on, found "
            f"{jitter!r}."
        )
    else:
        scales = {site: torch.full_like(x, jitter) for site, x in weights.items()}

    def init(site: dict[str, Any]) -> Tensor:
        if site["name"] not in weights:
            return init_to_median(site)
        value = weights[site["name"]]
        if jitter == 0:
            return value.clone()
        return value + scales[site["name"]] * torch.randn_like(value)

    return init


def _resolved_scales(
    lora: LiftedNetwork, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Standard deviations of a jitter that is just resolved, site -> (L, 1, ...)."""
    ones = {site: torch.ones_like(x) for site, x in weights.items()}
    scaled = lora.delta_weight_factors(ones)  # their first factors are s
    factors = lora.delta_weight_factors(weights)
    result = {}
    for site, members in lora.parameters.items():
        layers = []
        for p, value in zip(members, weights[site], strict=True):
            wide = value.to(torch.promote_types(value.dtype, torch.float32))
            path, _, part = p.name.partition(".lora_B.")
            rms = wide.square().mean().sqrt()
            if part and path in factors:
                (b, _), (_, a) = scaled[path], factors[path]
                gain = b.flatten()[0].abs() * a.to(wide).norm()
            else:
                gain = 1 / rms
            if not (gain > 0 and gain.isfinite()):
                gain = rms.new_tensor(value[0].numel() if value.ndim > 1 else 1).sqrt()
            layers.append((RESOLVED / gain).to(value))
        shape = (-1, *[1] * (weights[site].ndim - 1))
        result[site] = torch.stack(layers).reshape(shape)
    return result


def init_to(lora: LiftedNetwork, weights: Mapping[str, Tensor]) -> InitFn:
    """Given weights; a leading (K,) holds one weight set for each particle.

    Raises:
        ValueError: If a site is missing, has a wrong shape or values that are NaN or
            infinite.
    """
    shapes = {site: zeros.shape for site, zeros in lora.zeros().items()}
    counts = set()
    for site, shape in shapes.items():
        if site not in weights:
            raise ValueError(
                f"Site {site!r} is missing from the initial weights: expected "
                f"{sorted(shapes)}, found {sorted(weights)}."
            )
        found = weights[site].shape
        if found != shape and found[1:] != shape:
            raise ValueError(
                f"Site {site!r}: expected initial weights of shape {tuple(shape)}, or "
                f"(K, ...) with one for each particle, found {tuple(found)}."
            )
        if not torch.isfinite(weights[site]).all():
            raise ValueError(
                f"Site {site!r}: the initial weights have NaN or infinite values; "
                "every value must be finite. Check the run that made them."
            )
        counts.add(found[0] if found != shape else None)
    if len(counts) > 1:
        raise ValueError(
            f"The initial weights hold different numbers of particles: {counts}. "
            "Give every site the same leading (K,), or none."
        )
    num_particles = counts.pop()

    def init(site: dict[str, Any]) -> Tensor:
        name = site["name"]
        if name not in shapes:
            return init_to_median(site)
        value = weights[name].detach()
        if num_particles is None:
            return value.clone()
        particle = site["infer"].get("particle", 0)
        if particle >= num_particles:
            raise ValueError(
                f"Site {name!r}: particle {particle + 1} was asked for, but the "
                f"initial weights hold {num_particles}. Give one for each particle."
            )
        return value[particle].clone()

    return init


def init_to_fresh(lora: LiftedNetwork) -> InitFn:
    """PEFT's own random initialisation, and the head's, anew at each call."""

    def init(site: dict[str, Any]) -> Tensor:
        name = site["name"]
        if name not in lora.sites:
            return init_to_median(site)
        return _fresh(lora, name)

    return init


@torch.no_grad()
def _fresh(lora: LiftedNetwork, site: str) -> Tensor:
    kind = site.partition(".")[0]
    if kind not in ("lora", "head", "base"):
        raise ValueError(
            f"Site {site!r}: init_to_fresh knows how LoRA and heads start, not this "
            "kind of adapter. Use init_to_adapter(jitter=...)."
        )
    now = lora.weights()[site]
    if kind == "base":
        return now  # pretrained, nothing to draw anew
    draw = _fresh_head if kind == "head" else _fresh_lora
    values = [
        draw(lora, p, value.clone())
        for p, value in zip(lora.parameters[site], now, strict=True)
    ]
    return torch.stack(values)


def _fresh_head(lora: LiftedNetwork, p: LiftedParameter, value: Tensor) -> Tensor:
    layer, attribute = _new_layer(p, value)
    for module in lora.network.modules():
        if isinstance(module, PreTrainedModel):
            module._init_weights(layer)
            break
    return layer._parameters[attribute].detach()


def _new_layer(p: LiftedParameter, value: Tensor) -> tuple[Any, str]:
    """A copy of the parameter's layer, with PyTorch's own initialisation."""
    holder, attribute = p.locations[0]
    layer: Any = copy.deepcopy(holder).to(value)
    layer.reset_parameters()
    return layer, attribute


def _fresh_lora(lora: LiftedNetwork, p: LiftedParameter, value: Tensor) -> Tensor:
    path = re.split(r"\.lora_[^.]+\.", p.name)[0]
    layer: Any = lora.network.get_submodule(path)
    configs: Any = lora.network.peft_config
    rule = configs[lora.adapter].init_lora_weights
    if not (isinstance(rule, bool) or rule == "gaussian"):
        raise ValueError(
            f"Site {p.site!r}: init_lora_weights={rule!r} starts from the base weight "
            "and has no random init to repeat. Use init_to_adapter(jitter=...) instead "
            "of init_to_fresh()."
        )
    if rule is False:  # PEFT leaves its matrices as PyTorch makes them
        if isinstance(p.locations[0][0], nn.ParameterDict):
            return torch.randn_like(value)
        layer, attribute = _new_layer(p, value)
        return layer._parameters[attribute].detach()
    # PEFT's own rule, run on copies in the adapter's place. What it doesn't draw, such
    # as DoRA's magnitude, keeps its value.
    copies = {
        (holder, name): nn.Parameter(parameter.to(value.dtype, copy=True))
        for part in layer.adapter_layer_names
        for holder in getattr(layer, part, nn.Module()).modules()
        for name, parameter in holder._parameters.items()
        if parameter is not None
    }
    copies[p.locations[0]] = nn.Parameter(value)
    with swapped(copies):
        if isinstance(layer, AdaLoraLayer):
            layer.reset_lora_parameters(lora.adapter)
        else:
            layer.reset_lora_parameters(lora.adapter, rule)
    return copies[p.locations[0]].detach()
