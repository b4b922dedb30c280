"""Weights put in place of a network's own, for a while."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    create_selective_checkpoint_contexts,
)

from pyro_lora.lifting.sites import LiftedParameter
from pyro_lora.lifting.slots import (
    BoundLinear,
    BoundModule,
    Fold,
    LinearSlot,
    Location,
    Slot,
    swapped,
)

# One weight set, or that of all particles, by the parameter that is replaced.
Values = Mapping[LiftedParameter, Tensor]


@dataclass
class Bindings:
    """What is bound to one lifted network at the moment.

    Attributes:
        active: The bindings, the innermost last.
        own: The network's own parameters, where others have taken their place.
        is_known: Whether the network is one of transformers', whose linear layers'
            parameters nothing reads but the layers.
    """

    active: list[Binding] = field(default_factory=list)
    own: dict[Location, nn.Parameter] = field(default_factory=dict)
    is_known: bool = False

    def parameter(self, lifted: LiftedParameter) -> nn.Parameter:
        """The network's own parameter, whatever is bound."""
        return self.own.get(lifted.locations[0], lifted.parameter)

    def is_read_elsewhere(self, lifted: LiftedParameter) -> bool:
        """Whether a linear layer's parameter may be read past its forward."""
        return not (self.is_known or lifted.site.startswith("lora."))


def checkpoint_contexts(bindings: Bindings) -> tuple[AbstractContextManager[Any], ...]:
    """Contexts for checkpointing: recompute with what is bound at the moment."""
    if torch.compiler.is_compiling():  # bound tensors are inputs of a compiled graph
        contexts: Any = create_selective_checkpoint_contexts(_recompute)
        return tuple(contexts)
    return nullcontext(), bindings.active[-1] if bindings.active else nullcontext()


def _recompute(*args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


class Binding(AbstractContextManager[None]):
    """Values bound while a block runs; then what was bound before is bound again.

    Linear slots are given their values. Other layers, and linear ones whose parameters
    may be read past their forward, get one weight set in the places of their
    parameters, which is right for any network; a stack of them goes to their slots. A
    stack needs folded inputs. A binding can be entered again and again: gradient
    checkpointing recomputes once for each backward pass.

    Args:
        bindings: Those of the network.
        values: Parameter -> value of its shape or, in a stack, (S, ...).
        num_particles: S; None for one weight set.
        fold: How particles are folded into the inputs; None: they aren't.
    """

    def __init__(
        self,
        bindings: Bindings,
        values: Values,
        num_particles: int | None = None,
        fold: Fold | None = None,
    ) -> None:
        self._bindings = bindings
        self._in_place: dict[Location, Tensor] = {}
        self._slots: dict[Slot, BoundLinear | BoundModule | None] = {}
        linear: dict[LinearSlot, dict[str, Tensor]] = {}
        modules: dict[Slot, dict[Location, Tensor]] = {}
        for p, value in values.items():
            slot = p.owner
            if isinstance(slot, LinearSlot):
                linear.setdefault(slot, {})[p.locations[0][1]] = value
                if num_particles is None and bindings.is_read_elsewhere(p):
                    in_place = value.to(bindings.parameter(p).dtype)
                    self._in_place |= dict.fromkeys(p.locations, in_place)
            elif num_particles is None:
                self._in_place |= dict.fromkeys(p.locations, value)
                if isinstance(slot, Slot):
                    self._slots[slot] = None
            elif isinstance(slot, Slot):  # else the network takes one set at a time
                shape = bindings.parameter(p).shape
                stack = value.expand(num_particles, *shape)
                modules.setdefault(slot, {}).update(dict.fromkeys(p.locations, stack))
        for slot, parts in linear.items():
            self._slots[slot] = BoundLinear(
                parts.get("weight"), parts.get("bias"), fold
            )
        for slot, stacks in modules.items():
            self._slots[slot] = BoundModule(stacks, fold)
        self._exits: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as stack:
            own = self._bindings.own
            for holder, name in self._in_place.keys() - own.keys():
                own[holder, name] = holder._parameters[name]  # type: ignore[assignment]
                stack.callback(own.pop, (holder, name))
            stack.enter_context(swapped(self._in_place))
            # Not slot.bound = ..., which takes nn.Module.__setattr__'s time for each.
            before = [(vars(slot), slot.bound) for slot in self._slots]
            stack.callback(_restore, before)
            for slot, bound in self._slots.items():
                vars(slot)["_bound"] = bound
            self._bindings.active.append(self)
            stack.callback(self._bindings.active.pop)
            self._exits.append(stack.pop_all())

    def __exit__(self, *exception: object) -> None:
        self._exits.pop().close()


def _restore(before: list[tuple[dict[str, Any], Any]]) -> None:
    for attributes, bound in before:
        attributes["_bound"] = bound
