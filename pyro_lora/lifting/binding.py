"""Weights put in place of a network's own, for a while, and what is known of how."""

from __future__ import annotations

import difflib
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import (
    AbstractContextManager,
    ExitStack,
    contextmanager,
    nullcontext,
    suppress,
)
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    create_selective_checkpoint_contexts,
)
from transformers import PreTrainedModel

from pyro_lora.ground.interrupts import undone
from pyro_lora.lifting.sites import LiftedParameter
from pyro_lora.lifting.slots import (
    BoundLinear,
    BoundModule,
    Fold,
    LinearSlot,
    Location,
    Slot,
)
from pyro_lora.lifting.split_layers import is_split, is_tensor_parallel, mesh_of
from pyro_lora.lifting.trunk import Trunk

# One weight set, or that of all particles, by the parameter that is replaced.
Values = Mapping[LiftedParameter, Tensor]


@dataclass(frozen=True, eq=False)
class Bound:
    """A binding while it lasts, and what it has taken the place of.

    Attributes:
        binding: What is bound.
        slots: Attributes of each slot, and what was bound there.
        parameters: What was at each location.
        thread: Where the block runs that it is bound for; None: unknown.
        by_user: Whether that is a ``with lora.bind(...)``, or else one call.
    """

    binding: Binding
    slots: list[tuple[dict[str, Any], Any]]
    parameters: dict[Location, nn.Parameter]
    thread: int | None
    by_user: bool

    def put_back(self) -> None:
        """Let everything be as it was, once or again."""
        for attributes, bound in self.slots:
            attributes["_bound"] = bound
        for (holder, name), parameter in self.parameters.items():
            holder._parameters[name] = parameter


# Of every network that was ever lifted, also by views that are gone.
_BINDINGS: weakref.WeakKeyDictionary[nn.Module, list[Bindings]] = (
    weakref.WeakKeyDictionary()
)


def undo_interrupted(network: nn.Module) -> None:
    """End what interrupted calls have left bound, by whatever view of a network."""
    for bindings in _BINDINGS.get(network, ()):
        bindings.undo_interrupted()


@dataclass(eq=False)
class Bindings:
    """What is bound to one lifted network at the moment.

    Attributes:
        active: The bindings, the innermost last. One is here before it changes
            anything, and until it has put everything back.
        is_pretrained: Whether the network is one of transformers', whose linear layers'
            parameters nothing reads but the layers.
    """

    active: list[Bound] = field(default_factory=list)
    is_pretrained: bool = False

    def __getstate__(self) -> dict[str, Any]:
        if self.active:
            raise RuntimeError(
                "The network can't be copied or pickled while weights are bound to it. "
                "Leave the `with lora.bind(...)` block before."
            )
        return vars(self)

    def are_of(self, network: nn.Module) -> None:
        """Let :func:`undo_interrupted` find these."""
        others = _BINDINGS.setdefault(network, [])
        if not any(bindings is self for bindings in others):
            others.append(self)

    def parameter(self, lifted: LiftedParameter) -> nn.Parameter:
        """The network's own parameter, whatever is bound."""
        for bound in self.active:  # the outermost that has replaced it
            own = bound.parameters.get(lifted.locations[0])
            if own is not None:
                return own
        return lifted.parameter

    def undo(self, bound: Bound) -> None:
        """End a binding, if it lasts, and those inside of it."""
        while bound in self.active:
            self.active[-1].put_back()
            self.active.pop()

    def undo_interrupted(self) -> None:
        """End the bindings of calls, of which none can be running in this thread.

        One is left where an interrupt came before it could put anything back.
        """
        if torch.compiler.is_compiling():
            return
        here = threading.get_ident()
        for bound in list(self.active):
            if not bound.by_user and bound.thread == here:
                self.undo(bound)

    def is_read_elsewhere(self, lifted: LiftedParameter) -> bool:
        """Whether a linear layer's parameter may be read past its forward."""
        return not (self.is_pretrained or lifted.site.startswith("lora."))


def checkpoint_contexts(bindings: Bindings) -> tuple[AbstractContextManager[Any], ...]:
    """Contexts for checkpointing: recompute with what is bound at the moment."""
    if torch.compiler.is_compiling():  # bound tensors are inputs of a compiled graph
        contexts: Any = create_selective_checkpoint_contexts(_recompute)
        return tuple(contexts)
    if not bindings.active:
        return nullcontext(), nullcontext()
    return nullcontext(), _Recomputing(bindings.active[-1].binding)


def _recompute(*args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


class _Recomputing(ExitStack):
    """Bound as in the forward pass; entered again for each backward pass."""

    def __init__(self, binding: Binding) -> None:
        super().__init__()
        self._binding = binding

    def __enter__(self) -> _Recomputing:
        try:
            self.enter_context(self._binding.bound())
            return self
        except BaseException:
            self.close()
            raise


class Binding:
    """Values to be bound while a block runs; then what was before is bound again.

    Linear slots are given their values. Other layers, and linear ones whose parameters
    may be read past their forward, get one weight set in the places of their
    parameters, which is right for any network; a stack of them goes to their slots. A
    stack needs folded inputs. It can be bound again and again: gradient checkpointing
    recomputes once for each backward pass.

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
                # Tied or read past its forward, it must be right in its place as well.
                if num_particles is None and bindings.is_read_elsewhere(p):
                    in_place = value.to(bindings.parameter(p).dtype)
                    self._in_place |= dict.fromkeys(p.locations, in_place)
            elif num_particles is None:
                self._in_place |= dict.fromkeys(p.locations, value)
                if isinstance(
                    slot, Slot
                ):  # what an outer block bound isn't for this one
                    self._slots[slot] = None
            elif isinstance(slot, Slot):  # else the network takes one set at a time
                shape = bindings.parameter(p).shape
                stack = value.expand(num_particles, *shape)
                modules.setdefault(slot, {}).update(dict.fromkeys(p.locations, stack))
        for slot, own in linear.items():
            self._slots[slot] = BoundLinear(own.get("weight"), own.get("bias"), fold)
        for slot, stacks in modules.items():
            self._slots[slot] = BoundModule(stacks, fold)

    @contextmanager
    def bound(self, by_user: bool = False) -> Iterator[None]:
        """Bind the values for a block.

        Args:
            by_user: Whether it is a ``with lora.bind(...)``, or else one call.
        """
        compiling = torch.compiler.is_compiling()
        bound = Bound(
            self,
            [(vars(slot), slot.bound) for slot in self._slots],
            {at: at[0]._parameters[at[1]] for at in self._in_place},  # type: ignore[misc]
            None if compiling else threading.get_ident(),
            by_user,
        )
        with undone(partial(self._bindings.undo, bound)):
            self._bindings.active.append(bound)  # before anything is changed
            for (holder, name), value in self._in_place.items():
                holder._parameters[name] = value  # type: ignore[assignment]
            # Not slot.bound = ..., which takes nn.Module.__setattr__'s time for each.
            for slot, in_slot in self._slots.items():
                vars(slot)["_bound"] = in_slot
            yield


Members = Mapping[str, tuple[LiftedParameter, ...]]


@dataclass
class Host:
    """A network that takes bound weights, and what is known of how it does.

    Attributes:
        network: The network.
        members: Site -> its parameters, in layer order.
        trunk: The layers that are the same for all particles.
        bindings: What is bound at the moment.
        checkpointed: The modules that transformers can checkpoint, by path.
        batch_norms: The batch norms, by path.
        is_pretrained: Whether it is one of transformers', which are batch first.
        context_fn: Contexts that recompute with what is bound at the moment.
        has_slots: Whether every lifted parameter belongs to a slot.
        has_tables: Whether a lifted parameter is that of an embedding of anything but
            tokens, which alone are known to come batch first.
        argument_names: What the network's forward is known to take; of others a
            misspelled one is refused, since transformers' networks take any.
        checked: The forms of call, see ``_run``, that are known to take particles.
        unfoldable: Those that need one particle at a time.
        steps: The steps from the network down to what holds lifted parameters: parent,
            name and child.
        mesh: Over which some of its parameters are split; None if none are.
        is_tensor_parallel: Whether these compute parts of the same outputs.
        layouts: Form of call -> how its layers lay out the rows of its outputs, as far
            as the curvature has seen.
        lifted_anew: A parameter that a later lift has taken over, if one has.
    """

    network: nn.Module
    members: Members
    trunk: Trunk
    bindings: Bindings = field(default_factory=Bindings)
    checkpointed: Mapping[str, nn.Module] = field(init=False)
    batch_norms: Mapping[str, nn.Module] = field(init=False)
    context_fn: Callable[[], Any] = field(init=False)
    has_slots: bool = field(init=False)
    has_tables: bool = field(init=False)
    is_pretrained: bool = field(init=False)
    argument_names: frozenset[str] = field(init=False)
    checked: set[tuple[Any, ...]] = field(default_factory=set)
    unfoldable: set[tuple[Any, ...]] = field(default_factory=set)
    steps: tuple[tuple[nn.Module, str, nn.Module], ...] = field(init=False)
    mesh: Any = field(init=False)
    is_tensor_parallel: bool = field(init=False)
    layouts: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    lifted_anew: str | None = None

    def __post_init__(self) -> None:
        self.checkpointed = {
            path: module
            for path, module in self.network.named_modules()
            if getattr(module, "gradient_checkpointing", None) is not None
        }
        self.batch_norms = {
            path: module
            for path, module in self.network.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        }
        self.steps = self._steps_down()
        split = [n for n, p in self.network.named_parameters() if is_split(p)]
        modules = dict(self.network.named_modules())
        self.mesh = mesh_of(self.network)
        self.is_tensor_parallel = any(is_tensor_parallel(n, modules) for n in split)
        # torch.compile takes a partial, but no bound method.
        self.context_fn = functools.partial(checkpoint_contexts, self.bindings)
        owners = [p.owner for ps in self.members.values() for p in ps]
        self.has_slots = None not in owners
        get_base = getattr(self.network, "get_base_model", lambda: self.network)
        network: Any = type(getattr(get_base(), "_orig_mod", get_base()))
        of_transformers = network.__module__.startswith("transformers.")
        self.is_pretrained = of_transformers and issubclass(network, PreTrainedModel)
        tables = {owner for owner in owners if isinstance(owner, nn.Embedding)}
        if tables and self.is_pretrained:
            base: Any = get_base()
            of_tokens = None
            with suppress(NotImplementedError):  # there are none
                of_tokens = base.get_input_embeddings()
            if isinstance(of_tokens, nn.Module):
                tables -= {*of_tokens.modules()}
        self.has_tables = bool(tables)
        self.bindings.are_of(self.network)
        self.bindings.is_pretrained = self.is_pretrained
        self.trunk.are_apart = self.is_pretrained
        parameters = inspect.signature(network.forward).parameters.values()
        self.argument_names = frozenset(
            p.name
            for p in parameters
            if p.name != "self" and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        )

    def check_in_place(self) -> None:
        """Check that what holds the lifted parameters is still a part of the network.

        Raises:
            ValueError: If it isn't, so that weights bound to it would change nothing.
        """
        if all(
            parent._modules.get(name) is child for parent, name, child in self.steps
        ):
            return
        self.steps = self._steps_down()  # a module between may have got a wrapper

    def _steps_down(self) -> tuple[tuple[nn.Module, str, nn.Module], ...]:
        """See ``steps``.

        Raises:
            ValueError: If something that holds a lifted parameter isn't reached.
        """
        above: dict[nn.Module, tuple[nn.Module, str]] = {}
        for parent in self.network.modules():
            for name, child in parent.named_children():
                above.setdefault(child, (parent, name))
        steps = {}
        for p in (p for ps in self.members.values() for p in ps):
            module, _ = p.locations[0]
            while module is not self.network and module not in steps:
                if module not in above:
                    raise ValueError(
                        f"Site {p.site!r}: what holds {p.name!r} was taken out of the "
                        "network, by unload() or a second get_peft_model on the same "
                        "base, perhaps, so that it would change nothing. Lift the "
                        "network that you call, again if need be; for several adapters "
                        "wrap a base of its own for each, copy.deepcopy(base)."
                    )
                steps[module] = above[module]
                module, _ = above[module]
        return tuple((parent, name, child) for child, (parent, name) in steps.items())

    def check_names(self, names: Set[str]) -> None:
        """Check that no argument is misspelled, a mask that wouldn't count, say.

        Args:
            names: Of the keyword arguments of a call.

        Raises:
            ValueError: If one is nearly the name of another that isn't there.
        """
        for name in {*names} - self.argument_names:
            others = [x for x in self.argument_names if x not in names]
            meant = difflib.get_close_matches(name, others, n=1, cutoff=0.85)
            if meant:
                raise ValueError(
                    f"The network takes no argument {name!r}. Do you mean {meant[0]!r}?"
                )


def check_checkpointing(host: Host) -> None:
    """Check that gradient checkpointing would recompute with the bound weights.

    Raises:
        ValueError: If it wouldn't.
    """
    for path, module in host.checkpointed.items():
        if not module.gradient_checkpointing:
            continue
        function = getattr(module, "_gradient_checkpointing_func", None)
        settings = function.keywords if isinstance(function, functools.partial) else {}
        given = settings.get("context_fn")
        if settings.get("use_reentrant", True) or given is not host.context_fn:
            raise ValueError(
                f"Gradient checkpointing at {path!r} would recompute without the bound "
                "weights. Enable it by model.gradient_checkpointing_enable("
                'gradient_checkpointing_kwargs={"use_reentrant": False, '
                '"context_fn": lora.context_fn}).'
            )
