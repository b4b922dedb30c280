"""A network with one set of weights, or a stack of them, in place of its adapter."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from pyro_lora.lifting.slots import BoundLinear, LinearSlot
from pyro_lora.lifting.trunk import Trunk

Weights = Mapping[str, Tensor]
SlotValues = dict[LinearSlot, BoundLinear]


class BoundNetwork:
    """The lifted network at given weights: call it as the original network.

    Weights with leading particle dims ``lead`` give outputs ``(*lead, B, ...)``;
    where ``lead`` has two or more dims and ends in 1, B takes that 1's place, so that
    a ``pyro.plate`` of data at dim -1 sees ``(S, B)``.
    """

    def __init__(
        self,
        network: nn.Module,
        slots: Mapping[str, tuple[tuple[LinearSlot, str], ...]],
        weights: Weights,
        checkpointed: Mapping[str, nn.Module],
        context_fn: Callable[..., Any],
        trunk: Trunk,
    ) -> None:
        self._network = network
        self._trunk = trunk
        self._checkpointed = checkpointed
        self._context_fn = context_fn
        self._closed = False
        self._lead, self._values = _slot_values(slots, weights)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output, tensors as ``(*lead, B, ...)``.

        Raises:
            RuntimeError: After the ``with lora.bind(...)`` block has ended, or while
                other weights are bound.
            ValueError: If an input or output can't be split by particle, or gradient
                checkpointing would recompute with other weights.
        """
        return self._run(self._network, args, kwargs, self._trunk)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The network's ``generate`` under every particle at once: ``(*lead, B, T)``.

        Args:
            args: As for ``network.generate``, batch first.
            kwargs: As for ``network.generate``, batch first.

        Raises:
            RuntimeError: As for a call.
            ValueError: As for a call.
        """
        generate: Any = self._network.generate
        return self._run(generate, args, kwargs, Trunk([]))  # caches: nothing shared

    @contextmanager
    def bound_for_block(self) -> Iterator[None]:
        """Bind the slots for a block; afterwards this network refuses calls."""
        try:
            with self._bound(self._values):
                yield
        finally:
            self._closed = True

    def _bound(self, values: SlotValues) -> AbstractContextManager[None]:
        if any(
            slot.bound is not None and slot.bound is not own
            for slot, own in self._values.items()
        ):
            raise RuntimeError(
                "Other weights are bound to this network at the moment. Leave the "
                "`with lora.bind(...)` block before binding again."
            )
        return BoundSlots(values)

    def _run(
        self, function: Callable[..., Any], args: Any, kwargs: Any, trunk: Trunk
    ) -> Any:
        if self._closed:
            raise RuntimeError(
                "This bound network was used after its `with lora.bind(...)` block. "
                "Call it inside the block."
            )
        if self._network.training:
            _check_checkpointing(self._checkpointed, self._context_fn)
        if not self._lead:
            with self._bound(self._values):
                return function(*args, **kwargs)
        num_particles = self._lead.numel()
        batch_size = _batch_size([*args, *kwargs.values()])
        if num_particles > 1:
            args = [_fold(v, "input", num_particles, batch_size) for v in args]
            kwargs = {
                k: _fold(v, k, num_particles, batch_size) for k, v in kwargs.items()
            }
            if trunk.caches:  # of no use to the caller: a cache can't be given back
                kwargs.setdefault("use_cache", False)
        folded = {
            slot: replace(value, folded=(num_particles, batch_size))
            for slot, value in self._values.items()
        }
        inputs = {**dict(enumerate(args)), **kwargs}
        with self._bound(folded), trunk.shared(num_particles, batch_size, inputs):
            output = function(*args, **kwargs)
        lead = self._lead
        lead = lead[:-1] if len(lead) > 1 and lead[-1] == 1 else lead
        return _unfold(output, "output", lead, num_particles * batch_size)


class BoundSlots(AbstractContextManager[None]):
    """Slots bound while a block runs; then what was bound before is bound again.

    It can be entered again and again: gradient checkpointing recomputes once for each
    backward pass.
    """

    def __init__(self, values: SlotValues) -> None:
        self._values = values
        self._before: list[dict[LinearSlot, BoundLinear | None]] = []

    def __enter__(self) -> None:
        self._before.append({slot: slot.bound for slot in self._values})
        for slot, value in self._values.items():
            slot.bound = value

    def __exit__(self, *exception: object) -> None:
        for slot, previous in self._before.pop().items():
            slot.bound = previous


def _slot_values(
    slots: Mapping[str, tuple[tuple[LinearSlot, str], ...]], weights: Weights
) -> tuple[torch.Size, SlotValues]:
    leads = {
        # A torch.Size also for Pyro's provenance tensors, whose shape is a tuple.
        site: torch.Size(
            weights[site].shape[: weights[site].ndim - _event_dim(members)]
        )
        for site, members in slots.items()
    }
    try:
        lead = torch.broadcast_shapes(*leads.values())
    except RuntimeError as error:
        raise ValueError(
            "Particle dims don't broadcast: "
            + ", ".join(f"{site!r} has {tuple(s)}" for site, s in leads.items())
            + ". Give every site the same leading dims, or none."
        ) from error
    if lead.numel() == 0:
        raise ValueError(
            f"Weights with leading dims {tuple(lead)} hold no particle: expected one "
            "or more."
        )
    parts: dict[LinearSlot, dict[str, Tensor]] = {}
    for site, members in slots.items():
        value = weights[site]
        event_shape = value.shape[value.ndim - _event_dim(members) :]
        if leads[site].numel() == 1 and lead.numel() == 1:
            value = value.reshape(event_shape)
        elif leads[site]:
            value = value.expand(*lead, *event_shape).reshape(-1, *event_shape)
        layers = value.unbind(value.ndim - _event_dim(members))
        for (slot, attribute), layer_value in zip(members, layers, strict=True):
            parts.setdefault(slot, {})[attribute] = layer_value
    return lead, {
        slot: BoundLinear(part.get("weight"), part.get("bias"), None)
        for slot, part in parts.items()
    }


def _event_dim(members: tuple[tuple[LinearSlot, str], ...]) -> int:
    return 3 if members[0][1] == "weight" else 2


def _batch_size(values: list[Any]) -> int:
    sizes = [v.shape[0] for v in values if isinstance(v, Tensor) and v.ndim > 0]
    if not sizes:
        raise ValueError(
            "No tensor input with a batch dimension was found, so particles can't be "
            "folded into the batch. Pass tensors, batch first."
        )
    # A 1 is the batch size only if all are 1: position_ids, say, may be (1, T).
    return next((size for size in sizes if size != 1), 1)


def _fold(value: Any, name: str, num_particles: int, batch_size: int) -> Any:
    if isinstance(value, Tensor) and value.ndim > 0:
        if value.shape[0] == batch_size:
            return value.repeat(num_particles, *[1] * (value.ndim - 1))
        if value.shape[0] == 1:
            return value
        raise ValueError(
            f"Input {name!r} has shape {tuple(value.shape)}, but {num_particles} "
            f"particles are folded into a batch of {batch_size}: its first dim must "
            "be the batch or 1. Pass one particle at a time, or batch first."
        )
    if _holds_tensors(value) or isinstance(value, Cache):
        raise ValueError(
            f"Input {name!r} is a {type(value).__name__}, which can't be folded over "
            f"{num_particles} particles. Pass one particle at a time."
        )
    return value


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        return any(isinstance(v, Tensor) or _holds_tensors(v) for v in value)
    return False


def _unfold(value: Any, name: str, lead: torch.Size, folded_batch: int) -> Any:
    if isinstance(value, Tensor):
        if value.ndim > 0 and value.shape[0] == folded_batch:
            return value.reshape(
                *lead, folded_batch // max(lead.numel(), 1), *value.shape[1:]
            )
        if lead.numel() == 1:
            return value
        raise ValueError(
            f"Output {name!r} has shape {tuple(value.shape)}, which mixes or drops the "
            f"{lead.numel()} particles (a loss, perhaps). Call the network without "
            "labels, or one particle at a time."
        )
    if isinstance(value, Mapping):
        return type(value)(
            **{k: _unfold(v, k, lead, folded_batch) for k, v in value.items()}
        )
    if isinstance(value, tuple | list):
        return type(value)(_unfold(v, name, lead, folded_batch) for v in value)
    return value


def checkpointed_modules(network: nn.Module) -> dict[str, nn.Module]:
    """The modules that transformers can checkpoint, by path."""
    return {
        path: module
        for path, module in network.named_modules()
        if getattr(module, "gradient_checkpointing", None) is not None
    }


def _check_checkpointing(
    modules: Mapping[str, nn.Module], context_fn: Callable[..., Any]
) -> None:
    for path, module in modules.items():
        if not module.gradient_checkpointing:
            continue
        function = getattr(module, "_gradient_checkpointing_func", None)
        settings = function.keywords if isinstance(function, functools.partial) else {}
        given = settings.get("context_fn")
        if settings.get("use_reentrant", True) or given != context_fn:
            raise ValueError(
                f"Gradient checkpointing at {path!r} would recompute without the bound "
                "weights. Enable it by model.gradient_checkpointing_enable("
                'gradient_checkpointing_kwargs={"use_reentrant": False, '
                '"context_fn": lora.context_fn}).'
            )
