"""A network that takes bound weights, and what is known of how it does."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from pyro_lora.lifting.binding import Bindings, checkpoint_contexts
from pyro_lora.lifting.sites import LiftedParameter
from pyro_lora.lifting.trunk import Trunk

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
        has_tables: Whether a lifted parameter is that of an embedding.
        argument_names: What the network's forward is known to take; of others a
            misspelled one is refused, since transformers' networks take any.
        checked: The forms of call, see ``_run``, that are known to take particles.
        unfoldable: Those that need one particle at a time.
        layouts: Form of call -> how its layers lay out the rows of its outputs, as far
            as the curvature has seen.
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
    layouts: dict[tuple[Any, ...], Any] = field(default_factory=dict)

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
        # torch.compile takes a partial, but no bound method.
        self.context_fn = functools.partial(checkpoint_contexts, self.bindings)
        owners = [p.owner for ps in self.members.values() for p in ps]
        self.has_slots = None not in owners
        self.has_tables = any(isinstance(owner, nn.Embedding) for owner in owners)
        get_base = getattr(self.network, "get_base_model", lambda: self.network)
        network: Any = type(getattr(get_base(), "_orig_mod", get_base()))
        known = network.__module__.startswith("transformers.")
        self.is_pretrained = known and issubclass(network, PreTrainedModel)
        self.bindings.are_of(self.network)
        self.bindings.is_known = self.is_pretrained
        parameters = inspect.signature(network.forward).parameters.values()
        self.argument_names = frozenset(
            p.name
            for p in parameters
            if p.name != "self" and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        )

    def check_names(self, names: Set[str]) -> None:
        """Check that no argument is misspelled, a mask that wouldn't count, say.

        Args:
            names: Of the keyword arguments of a call.

        Raises:
            ValueError: If one is nearly the name of another that isn't there.
        """
        for name in names - self.argument_names:
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
