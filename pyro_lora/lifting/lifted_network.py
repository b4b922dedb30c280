"""A PEFT network whose trainable weights are Pyro sample sites."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from pyro import poutine
from torch import Tensor, nn

from pyro_lora.lifting import initialization, priors
from pyro_lora.lifting.bound_network import (
    BoundNetwork,
    BoundSlots,
    checkpointed_modules,
)
from pyro_lora.lifting.priors import Prior
from pyro_lora.lifting.sites import (
    adapter_modules,
    adapter_name,
    check_in_use,
    lifted_parameters,
)
from pyro_lora.lifting.slots import LinearSlot, as_slot
from pyro_lora.lifting.trunk import find_trunk


def lift(
    model: nn.Module,
    *,
    prior: Prior | None = None,
    adapter: str | None = None,
    name: str | None = None,
) -> LiftedNetwork:
    """Turn the adapter weights of a network into Pyro random variables.

    LoRA matrices of one role and shape are stacked over the layers into one site,
    ``lora.<path>.A`` of event shape (L, R, I) and ``lora.<path>.B`` of (L, O, R);
    heads in ``modules_to_save`` are ``head.<path>.weight`` (L, O, I) and ``.bias``
    (L, O), other trainable linear parameters ``base.<path>...``; L is 1 where there
    is one layer. The network itself computes as before whenever nothing is bound.

    Args:
        model: A ``peft.PeftModel``, or any module with trainable linear layers.
        prior: A function of the lifted network that samples every site; None is
            ``priors.normal(scale=1.0)``.
        adapter: The adapter to lift; None is the active one.
        name: Put into the site names after ``lora.``, ``head.``, ``base.``, to tell
            apart two lifted networks in one Pyro model.

    Returns:
        The lifted network; call it inside a Pyro model.

    Raises:
        ValueError: If there is nothing to lift, the adapter is unknown, merged or
            inactive, a trainable parameter isn't part of an ``nn.Linear``, or a
            value is NaN or infinite.
    """
    return LiftedNetwork(
        model, priors.normal(scale=1.0) if prior is None else prior, adapter, name
    )


class LiftedNetwork:
    """A network with its lifted sites, made by :func:`lift`.

    Attributes:
        network: The original network.
        prior: The function that samples the sites.
        sites: Site name -> parameter names as in ``network.named_parameters()``,
            in layer order.
        slots: Site name -> its layers and which of their parameters, in layer order.
    """

    def __init__(
        self, model: nn.Module, prior: Prior, adapter: str | None, name: str | None
    ) -> None:
        self._adapter = adapter_name(model, adapter)
        found = lifted_parameters(model, self._adapter, name)
        self._adapter_modules = adapter_modules(model, self._adapter)
        self._checkpointed = checkpointed_modules(model)
        self.network = model
        self.prior = prior
        names: dict[str, list[str]] = {}
        slots: dict[str, list[tuple[LinearSlot, str]]] = {}
        for p in found:
            names.setdefault(p.site, []).append(p.name)
        self.sites: dict[str, tuple[str, ...]] = {k: tuple(v) for k, v in names.items()}
        parameters = dict(model.named_parameters())
        for site, members in self.sites.items():
            for member in members:
                if not torch.isfinite(parameters[member]).all():
                    raise ValueError(
                        f"Site {site!r}: parameter {member!r} has NaN or infinite "
                        "values. Restore or re-initialise the adapter before lifting."
                    )
        for p in found:
            slots.setdefault(p.site, []).append((as_slot(p.layer), p.attribute))
        self.slots = {site: tuple(members) for site, members in slots.items()}
        adapted = {slot for members in self.slots.values() for slot, _ in members}
        self._trunk = find_trunk(model, adapted)

    def __call__(self) -> BoundNetwork:
        """Sample the sites by the prior and return the network bound to the values.

        Every site carries ``infer={"lora": (self,)}``.

        Raises:
            TypeError: If the prior doesn't return its values by site.
            ValueError: If the prior misses a site or gives a wrong shape, or the
                adapter is merged or inactive.
        """
        with poutine.infer_config(config_fn=self._infer):
            weights = self.prior(self)
        if not isinstance(weights, Mapping):
            raise TypeError(
                "A prior returns its samples by site, {site: value for site in "
                f"lora.sites}}, but this one returned {type(weights).__name__}."
            )
        return self._bound_network(weights)

    @contextmanager
    def bind(self, weights: Mapping[str, Tensor]) -> Iterator[BoundNetwork]:
        """Bind weights without sampling, for the duration of a ``with`` block.

        Args:
            weights: Site -> value; any leading particle dims that broadcast.

        Yields:
            The bound network. The original network, too, uses the weights inside the
            block (where they have no particle dims).

        Raises:
            ValueError: If a site is missing or unknown, a value has a wrong shape or
                is NaN or infinite, or the adapter is merged or inactive.
        """
        self._check_values(weights)
        network = self._bound_network(weights)
        with network.bound_for_block():
            yield network

    def _infer(self, site: Any) -> Any:
        return {"lora": (self,)} if site["name"] in self.sites else {}

    def _bound_network(self, weights: Mapping[str, Tensor]) -> BoundNetwork:
        self._check_shapes(weights)
        check_in_use(self._adapter_modules, self._adapter)
        return BoundNetwork(
            self.network,
            self.slots,
            weights,
            self._checkpointed,
            self.context_fn,
            self._trunk,
        )

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """The adapter's present values, stacked as sites, copied.

        Values in half precision come as float32, as sites are.
        """
        return {
            site: torch.stack([getattr(slot, attr) for slot, attr in members]).to(
                _site_dtype(members)
            )
            for site, members in self.slots.items()
        }

    def zeros(self) -> dict[str, Tensor]:
        """Zeros of every site's shape, dtype and device, without memory of their own.

        What a prior needs: ``dist.Normal(zeros, 1 + zeros).to_event(zeros.ndim)``.
        """
        result = {}
        for site, members in self.slots.items():
            first = getattr(*members[0])
            zero = torch.zeros((), dtype=_site_dtype(members), device=first.device)
            result[site] = zero.expand(len(members), *first.shape)
        return result

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Write one weight set (no particle dims) into the adapter.

        Raises:
            ValueError: As :meth:`bind`, or if there are particle dims; the adapter is
                then unchanged.
        """
        self._check_shapes(weights)
        self._check_values(weights)
        for site, zeros in self.zeros().items():
            if weights[site].shape != zeros.shape:
                raise ValueError(
                    f"Site {site!r}: load takes one weight set of shape "
                    f"{tuple(zeros.shape)}, found {tuple(weights[site].shape)}. "
                    "Pick one particle or draw first."
                )
        for site, members in self.slots.items():
            for (slot, attr), value in zip(members, weights[site], strict=True):
                getattr(slot, attr).copy_(value)

    def init_to_adapter(self, jitter: float = 0.0) -> initialization.InitFn:
        """``init_loc_fn``: the adapter's present values.

        Args:
            jitter: Standard deviation of normal noise on every weight.
        """
        return initialization.init_to_adapter(self, jitter)

    def init_to(self, weights: Mapping[str, Tensor]) -> initialization.InitFn:
        """``init_loc_fn``: given weights, with a leading (K,) one set a particle.

        Raises:
            ValueError: If a site is missing, has a wrong shape or values that are NaN
                or infinite.
        """
        return initialization.init_to(self, weights)

    def init_to_fresh(self) -> initialization.InitFn:
        """``init_loc_fn``: PEFT's random init and the head's, anew at each call.

        One call for each particle gives the starting points of a deep ensemble.
        """
        return initialization.init_to_fresh(self)

    def context_fn(self) -> tuple[AbstractContextManager[Any], ...]:
        """Contexts that make gradient checkpointing recompute with the bound weights.

        Pass it in ``gradient_checkpointing_kwargs={"use_reentrant": False,
        "context_fn": lora.context_fn}``.
        """
        slots = {slot for members in self.slots.values() for slot, _ in members}
        bound = {slot: slot.bound for slot in slots if slot.bound is not None}
        return nullcontext(), BoundSlots(bound)

    def delta_weight_factors(
        self, weights: Mapping[str, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        r"""Factors of every layer's update :math:`\Delta W = s B A`.

        Args:
            weights: Site -> value, any leading dims.

        Returns:
            Module path -> (s B, A), of shapes (..., O, R) and (..., R, I); the LoRA
            scaling s is in the first.
        """
        self._check_shapes(weights)
        by_name = {
            name: weights[site].select(-3 if name.endswith(".weight") else -2, i)
            for site, names in self.sites.items()
            for i, name in enumerate(names)
        }
        factors = {}
        for name, a in by_name.items():
            path, mark, rest = name.rpartition(".lora_A.")
            if mark:
                layer = self.network.get_submodule(path)
                assert isinstance(layer, LoraLayer)
                scaling = layer.scaling[rest.removesuffix(".weight")]
                factors[path] = (scaling * by_name[f"{path}.lora_B.{rest}"], a)
        return factors

    def _check_shapes(self, weights: Mapping[str, Tensor]) -> None:
        zeros = self.zeros()
        if weights.keys() != zeros.keys():
            missing = sorted(zeros.keys() - weights.keys())
            unknown = sorted(weights.keys() - zeros.keys())
            raise ValueError(
                f"Weights don't match the lifted sites: missing {missing}, unknown "
                f"{unknown}. The sites are the keys of lora.sites."
            )
        for site, zero in zeros.items():
            found = weights[site].shape
            if found[max(len(found) - zero.ndim, 0) :] != zero.shape:
                raise ValueError(
                    f"Site {site!r}: expected shape (..., "
                    f"{', '.join(map(str, zero.shape))}), found {tuple(found)}. "
                    "Particle dims go on the left, event dims are those of "
                    "lora.weights()."
                )

    def _check_values(self, weights: Mapping[str, Tensor]) -> None:
        for site, value in weights.items():
            if not torch.isfinite(value).all():
                raise ValueError(
                    f"Site {site!r}: the weights have NaN or infinite values; every "
                    "value must be finite. Check the run that made them."
                )


def _site_dtype(members: tuple[tuple[LinearSlot, str], ...]) -> torch.dtype:
    dtype: torch.dtype = getattr(*members[0]).dtype
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
