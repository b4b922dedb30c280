"""Where inference starts: ``init_loc_fn`` functions for guides and particles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor, nn
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from pyro_lora.lifting.lifted_network import LiftedNetwork

InitFn = Callable[[dict[str, Any]], Tensor]


def init_to_adapter(lora: LiftedNetwork, jitter: float) -> InitFn:
    """The adapter's present values plus ``jitter`` times standard normal noise."""
    weights = lora.weights()

    def init(site: dict[str, Any]) -> Tensor:
        if site["name"] not in weights:
            return init_to_median(site)
        value = weights[site["name"]]
        return value + jitter * torch.randn_like(value) if jitter else value.clone()

    return init


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
    if site.startswith("base."):
        return lora.weights()[site]  # pretrained, nothing to draw anew
    zeros = lora.zeros()[site]
    values = []
    for name in lora.sites[site]:
        path, _, attribute = name.rpartition(".")
        layer = lora.network.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        copy = nn.Linear(  # PyTorch's Kaiming-uniform rule, which is PEFT's for A
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            device=zeros.device,
            dtype=zeros.dtype,
        )
        if site.startswith("lora."):
            _reset_lora(lora, path, copy)
        elif (base := _pretrained(lora.network)) is not None:
            base._init_weights(copy)
        values.append(getattr(copy, attribute).detach())
    return torch.stack(values)


def _reset_lora(lora: LiftedNetwork, path: str, layer: nn.Linear) -> None:
    parent, adapter = path.split(".")[-2:]
    configs: Mapping[str, Any] = lora.network.peft_config  # type: ignore[assignment]
    rule = configs[adapter].init_lora_weights
    if not (isinstance(rule, bool) or rule == "gaussian"):
        raise ValueError(
            f"Site of {path!r}: init_lora_weights={rule!r} starts from the base weight "
            "and has no random init to repeat. Use init_to_adapter(jitter=...) instead "
            "of init_to_fresh()."
        )
    if parent == "lora_B" and rule is not False:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
    elif rule == "gaussian":
        nn.init.normal_(layer.weight, std=1 / layer.out_features)


def _pretrained(network: nn.Module) -> PreTrainedModel | None:
    for module in network.modules():
        if isinstance(module, PreTrainedModel):
            return module
    return None
