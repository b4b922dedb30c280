"""A network that takes bound weights, and what is known of how it does."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
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
        checked: The forms of call, see ``_run``, that are known to take particles.
        unfoldable: Those that need one particle at a time.
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
    checked: set[tuple[Any, ...]] = field(default_factory=set)
    unfoldable: set[tuple[Any, ...]] = field(default_factory=set)

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
        network = type(getattr(get_base(), "_orig_mod", get_base()))
        known = network.__module__.startswith("transformers.")
        self.is_pretrained = known and issubclass(network, PreTrainedModel)
        self.bindings.is_known = self.is_pretrained


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
