"""Where inference starts: ``init_loc_fn`` functions for guides and particles."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft.tuners.adalora.layer import AdaLoraLayer
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor, nn
from torch import distributions as td
from transformers import PreTrainedModel

from pyro_lora.ground.accumulation import at_least_float32
from pyro_lora.ground.interrupts import leaving_no_trace
from pyro_lora.ground.settings import check_number
from pyro_lora.ground.weights import check_weights
from pyro_lora.lifting.prior import NOISE, Network
from pyro_lora.lifting.sites import LiftedParameter, adapter_configs, config_at
from pyro_lora.lifting.slots import swapped

InitFn = Callable[[dict[str, Any]], Tensor]

# Half-precision networks must tell the particles apart: the least change of a number of
# size one that bfloat16 still resolves.
RESOLVED = torch.finfo(torch.bfloat16).eps


class Lifted(Network, Protocol):
    """What is known here of a lifted network, which itself offers these functions."""

    @property
    def parameters(self) -> Mapping[str, tuple[LiftedParameter, ...]]:
        """Site name -> its parameters and where they are, in layer order."""
        ...

    @property
    def adapter(self) -> str | None:
        """The name of the adapter, None without PEFT."""
        ...


def init_to_adapter(lora: Lifted, jitter: float | str) -> InitFn:
    """The adapter's present values plus normal noise.

    Raises:
        ValueError: If ``jitter`` is neither ``"auto"`` nor a number from 0 on.
    """
    weights = lora.weights()
    if jitter == "auto":
        scales = _resolved_scales(lora, weights)
    elif isinstance(jitter, str):
        raise ValueError(
            f"jitter: expected 'auto' or a standard deviation from 0 on, found "
            f"{jitter!r}."
        )
    else:
        check_number("jitter, unless 'auto',", jitter, 0)
        scales = {site: x.new_full((), jitter) for site, x in weights.items()}
    return _Around(weights, {} if jitter == 0 else scales)


@dataclass(frozen=True, eq=False, repr=False)
class _Around:
    """The adapter's values plus normal noise, where there are scales for it."""

    weights: Mapping[str, Tensor]
    scales: Mapping[str, Tensor]

    def __repr__(self) -> str:
        return f"the adapter's weights{' with noise' if self.scales else ''}"

    def __call__(self, site: dict[str, Any]) -> Tensor:
        name = site["name"]
        if name not in self.weights:
            return init_to_median(site)
        value = self.weights[name]
        if not self.scales:
            return value.clone()
        return value + self.scales[name] * torch.randn_like(value)


def _resolved_scales(lora: Lifted, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Standard deviations of a jitter that is just resolved, site -> (L, 1, ...)."""
    # Of weights 1 the first factor s B is s, whatever PEFT's rule for s is.
    ones = {site: torch.ones_like(x) for site, x in weights.items()}
    scaled = lora.delta_weight_factors(ones)  # their first factors are s
    factors = lora.delta_weight_factors(weights)
    result = {}
    for site, members in lora.parameters.items():
        layers = []
        for p, value in zip(members, weights[site], strict=True):
            wide = at_least_float32(value)
            path, _, part = p.name.partition(".lora_B.")
            rms = wide.square().mean().sqrt()
            if part and path in factors:  # of B: E changes the outputs by s E A x
                (b, _), (_, a) = scaled[path], factors[path]
                gain = b.flatten()[0].abs() * a.to(wide).norm()
            else:
                gain = 1 / rms
            if not (gain > 0 and gain.isfinite()):
                # Of zeros eps / sqrt(I), a change of eps for inputs of variance one.
                gain = rms.new_tensor(value[0].numel() if value.ndim > 1 else 1).sqrt()
            layers.append((RESOLVED / gain).to(value))
        shape = (-1, *[1] * (weights[site].ndim - 1))
        result[site] = torch.stack(layers).reshape(shape)
    return result


@dataclass(frozen=True, eq=False, repr=False)
class GivenWeights:
    """``init_loc_fn`` at given values of latent sites, the median at others.

    Attributes:
        weights: Site -> value on its support, lifted or not; (K, ...) for particles.
        num_particles: K; None where there is one weight set.
        checked: The sites whose shapes are known to be right.
    """

    weights: Mapping[str, Tensor]
    num_particles: int | None
    checked: Collection[str]

    def __repr__(self) -> str:
        particles = f" of {self.num_particles} particles" if self.num_particles else ""
        return f"given weights of {len(self.weights)} sites{particles}"

    def __call__(self, site: dict[str, Any]) -> Tensor:
        """The value of a site, of ``site["infer"]["particle"]``'s or the only one.

        Raises:
            ValueError: If there are fewer particles, or several where a guide starts at
                one, or the model's site has another shape.
        """
        name: str = site["name"]
        fn: Any = site.get("fn")
        particle: int | None = site["infer"].get("particle")
        if name in self.weights:
            value = self._of(name, particle).clone()
        elif f"{name}{NOISE}" in self.weights:
            # LocScaleReparam asks for the site itself, and takes the noise from it.
            while isinstance(fn, td.Independent):
                fn = fn.base_dist
            value = fn.loc + fn.scale * self._of(f"{name}{NOISE}", particle)
        else:
            return init_to_median(site)
        if name not in self.checked and value.shape != (shape := site["fn"].shape()):
            raise ValueError(
                f"Site {name!r}: expected an initial value of shape {tuple(shape)}, "
                f"found {tuple(value.shape)} in the weights given to init_to. Give the "
                "model's own, with a leading (K,) if every site has one."
            )
        return value

    def _of(self, name: str, particle: int | None) -> Tensor:
        value = self.weights[name].detach()
        if self.num_particles is None:
            return value
        if particle is None and self.num_particles > 1:
            raise ValueError(
                f"Site {name!r}: the weights given to init_to hold "
                f"{self.num_particles} particles, but a guide starts at one. Pick one, "
                "by {site: x[k] for site, x in weights.items()}; or fit one guide at "
                "each and mix their posteriors by MixturePosterior."
            )
        particle = particle or 0
        if particle >= self.num_particles:
            raise ValueError(
                f"Site {name!r}: particle {particle + 1} was asked for, but the "
                f"initial weights hold {self.num_particles}. Give one for each "
                "particle."
            )
        return value[particle]


def check_start(
    init: Callable[..., Any], start: Mapping[str, Tensor], particle: int | None = None
) -> None:
    """Check that a model starts at all that :func:`init_to` was given.

    Args:
        init: Any ``init_loc_fn``; only :func:`init_to`'s says what it has.
        start: The values of the model's latent sites, as it was used.
        particle: Whose; None where there is one.

    Raises:
        ValueError: Naming a site that isn't the model's, or starts elsewhere.
    """
    if not isinstance(init, GivenWeights):
        return
    # Where a latent site is noise, what follows from it may be given as well.
    sites = start.keys() | {name.removesuffix(NOISE) for name in start}
    unused = sorted(init.weights.keys() - sites)
    if unused:
        raise ValueError(
            f"The weights given to init_to have values of {unused}, which the model "
            f"doesn't sample; its latent sites are {sorted(start)}. Leave them out, "
            "or start from weights of the same model and prior."
        )
    for name in init.weights.keys() & start.keys():
        given, value = init._of(name, particle), start[name].detach()
        if not torch.allclose(value.double(), given.to(value).double(), 1e-3, 1e-5):
            raise ValueError(
                f"Site {name!r} doesn't start where init_to says: it follows from "
                f"{name.removesuffix(NOISE)!r} in a way that isn't "
                "LocScaleReparam(0.0)'s, or that site was given another value. Give "
                f"{name.removesuffix(NOISE)!r} alone."
            )


def check_number_of_starts(init: Callable[..., Any], num_particles: int) -> None:
    """Check that :func:`init_to` was given no more particles than there will be.

    Args:
        init: Any ``init_loc_fn``.
        num_particles: K.

    Raises:
        ValueError: If it was.
    """
    if isinstance(init, GivenWeights) and (init.num_particles or 1) > num_particles:
        raise ValueError(
            f"The weights given to init_to hold {init.num_particles} particles, more "
            f"than num_particles={num_particles}. Give one for each, by "
            f"{{site: x[:{num_particles}] for site, x in weights.items()}}, say."
        )


def init_to(lora: Lifted, weights: Mapping[str, Tensor]) -> GivenWeights:
    """Given values; a leading (K,) holds one set of them for each particle.

    Raises:
        ValueError: If a lifted site is missing, has a wrong shape or values that are
            NaN or infinite.
    """
    check_weights(weights, "initial weights")
    shapes = {site: zeros.shape for site, zeros in lora.zeros().items()}
    counts: dict[str, int | None] = {}
    for site, shape in shapes.items():
        # Under a prior that isn't centred, the latent site is the noise.
        name = site if site in weights else f"{site}{NOISE}"
        if name not in weights:
            raise ValueError(
                f"Site {site!r} is missing from the initial weights: expected "
                f"{sorted(shapes)}, found {sorted(weights)}."
            )
        given = weights[name].shape
        if given != shape and given[1:] != shape:
            raise ValueError(
                f"Site {name!r}: expected initial weights of shape {tuple(shape)}, or "
                f"(K, ...) with one for each particle, found {tuple(given)}."
            )
        counts[name] = given[0] if given != shape else None
    num_particles = next(iter(counts.values()))
    for site, value in weights.items():
        if not torch.isfinite(value).all():
            raise ValueError(
                f"Site {site!r}: the initial weights have NaN or infinite values; "
                "every value must be finite. Check the run that made them."
            )
        if site not in counts and num_particles is not None:
            counts[site] = value.shape[0] if value.ndim else None
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"The initial weights hold different numbers of particles: {counts}. "
            "Give every site the same leading (K,), or none."
        )
    return GivenWeights(dict(weights), num_particles, frozenset(shapes))


def init_to_fresh(lora: Lifted) -> InitFn:
    """PEFT's own random initialisation, and the head's, anew at each call."""
    return _Fresh(lora)


@dataclass(frozen=True, eq=False, repr=False)
class _Fresh:
    """New values at each call."""

    lora: Lifted

    def __repr__(self) -> str:
        return "PEFT's own random weights"

    def __call__(self, site: dict[str, Any]) -> Tensor:
        name = site["name"]
        if name not in self.lora.sites:
            return init_to_median(site)
        return _fresh(self.lora, name)


@leaving_no_trace
@torch.no_grad()
def _fresh(lora: Lifted, site: str) -> Tensor:
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


def _fresh_head(lora: Lifted, p: LiftedParameter, value: Tensor) -> Tensor:
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


def _fresh_lora(lora: Lifted, p: LiftedParameter, value: Tensor) -> Tensor:
    path = re.split(r"\.lora_[^.]+\.", p.name)[0]
    layer: Any = lora.network.get_submodule(path)
    config: Any = config_at(adapter_configs(lora.network), lora.adapter, p.name)[0]
    rule = config.init_lora_weights
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
