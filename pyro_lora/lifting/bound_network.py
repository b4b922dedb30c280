"""A network with one set of weights, or a stack of them, in place of its own."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyro_lora.lifting.binding import (
    Binding,
    Bindings,
    Values,
    checkpoint_contexts,
)
from pyro_lora.lifting.folding import (
    batch_size,
    check_batch_norm,
    check_no_cache,
    check_zero_elsewhere,
    fold_input,
    is_ambiguous,
    num_choices,
    particle_outputs,
    stack_outputs,
    tensors_in,
    unchanged_buffers,
    unfold_output,
)
from pyro_lora.lifting.sites import LiftedParameter
from pyro_lora.lifting.slots import Fold, LinearSlot, NotFoldable, swapped
from pyro_lora.lifting.trunk import Trunk

_logger = logging.getLogger(__name__)

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
        is_pretrained: Whether it is one of transformers', which are batch first.
        context_fn: Contexts that recompute with what is bound at the moment.
        has_slots: Whether every lifted parameter belongs to a slot.
        has_tables: Whether a lifted parameter is that of an embedding.
        checked: The forms of call, see ``_form``, that are known to take particles.
        unfoldable: Those that need one particle at a time.
    """

    network: nn.Module
    members: Members
    trunk: Trunk
    bindings: Bindings = field(default_factory=Bindings)
    checkpointed: Mapping[str, nn.Module] = field(init=False)
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


class BoundNetwork:
    """The lifted network at given weights: call it as the original network.

    Weights with leading particle dims ``lead`` give outputs ``(*lead, B, ...)``;
    where ``lead`` has two or more dims and ends in 1, B takes that 1's place, so that
    a ``pyro.plate`` of data at dim -1 sees ``(S, B)``.
    """

    def __init__(self, host: Host, weights: Mapping[str, Tensor]) -> None:
        self._host = host
        self._closed = False
        self._own: Binding | None = None  # that of the `with` block
        self._lead, self._values = _values(host, weights)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output, tensors as ``(*lead, B, ...)``.

        All particles run at once, folded into the batch. Where a network can't take
        that, they run one at a time, and a message in the log says why.

        Raises:
            RuntimeError: After the ``with lora.bind(...)`` block has ended, or while
                other weights are bound.
            ValueError: If a key-value cache is given to several particles, batch norm
                would mix them, or gradient checkpointing would recompute with other
                weights.
        """
        host = self._host
        return self._run(host.network, args, kwargs, host.trunk, ())

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The network's ``generate`` under every particle at once: ``(*lead, B, T)``.

        Args:
            args: As for ``network.generate``, batch first.
            kwargs: As for ``network.generate``, batch first.

        Raises:
            RuntimeError: As for a call.
            ValueError: As for a call.
        """
        generate: Any = self._host.network.generate
        beams = range(1, sys.maxsize)  # and nothing is shared
        return self._run(generate, args, kwargs, Trunk([]), beams)

    @contextmanager
    def bound_for_block(self) -> Iterator[None]:
        """Bind the weights for a block; afterwards this network refuses calls.

        Raises:
            RuntimeError: If other weights are bound.
        """
        self._check_none_bound()
        stacked = self._lead.numel() > 1  # without dims it is 1
        num_particles = self._lead.numel() if stacked else None
        self._own = Binding(self._host.bindings, self._values, num_particles)
        try:
            with self._own:
                yield
        finally:
            self._closed = True

    def _check_none_bound(self) -> None:
        active = self._host.bindings.active
        if active and active[-1] is not self._own:
            raise RuntimeError(
                "Other weights are bound to this network at the moment. Leave the "
                "`with lora.bind(...)` block before binding again."
            )

    def _run(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        trunk: Trunk,
        repeats: Sequence[int],
    ) -> Any:
        host, lead = self._host, self._lead
        if self._closed:
            raise RuntimeError(
                "This bound network was used after its `with lora.bind(...)` block. "
                "Call it inside the block."
            )
        self._check_none_bound()
        if host.network.training:
            _check_checkpointing(host)
        if not lead:
            return self._one(function, args, kwargs, 0)
        num_particles = lead.numel()
        if num_particles > 1:
            check_no_cache([*enumerate(args), *kwargs.items()], num_particles)
            check_batch_norm(host.network)
            if trunk.caches:  # of no use to the caller: a cache can't be given back
                kwargs.setdefault("use_cache", False)
        form, reason = _form(host.network, args, kwargs), None
        if num_particles > 1 and form not in host.unfoldable:
            try:
                return self._folded(function, args, kwargs, trunk, repeats)
            except NotFoldable as error:
                reason = error
        outputs = [self._one(function, args, kwargs, s) for s in range(num_particles)]
        output = stack_outputs(outputs, "output", lead)
        if reason is not None:  # else the inputs were wrong
            host.unfoldable.add(form)
            # Slower and right, so nothing that should stop a strict run.
            _logger.warning(
                "The particles run one at a time, which is slower: %s.", reason
            )
        return output

    def _one(
        self,
        function: Callable[..., Any],
        args: Any,
        kwargs: Any,
        particle: int,
    ) -> Any:
        values = {
            p: v if v.ndim == p.parameter.ndim else v[particle]
            for p, v in self._values.items()
        }
        with Binding(self._host.bindings, values):
            return function(*args, **kwargs)

    def _folded(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        trunk: Trunk,
        repeats: Sequence[int],
    ) -> Any:
        host, given = self._host, [*args, *kwargs.values()]
        form = _form(host.network, args, kwargs)
        if not host.has_slots:
            raise NotFoldable(
                "a parameter is read by several layers, or by the network"
            )
        fold = Fold(
            self._lead.numel(),
            torch.empty(batch_size(given), 0),
            repeats or (1, num_choices(given)),
        )
        if repeats and host.has_tables and is_ambiguous(given, fold):
            # Of T5's relative positions, say, which have a (T, T) and no batch.
            raise NotFoldable("a sequence is as long as the batches of all particles")
        if form in host.checked or repeats or torch.compiler.is_compiling():
            return self._call_folded(self._values, function, args, kwargs, trunk, fold)
        if not host.is_pretrained:
            self._check_independent(function, args, kwargs, fold)
        elif is_ambiguous(given, fold):
            self._check_batch_first(function, args, kwargs, fold)
        output = self._call_folded(self._values, function, args, kwargs, trunk, fold)
        if host.is_pretrained and is_ambiguous(tensors_in(output), fold):
            self._check_independent(function, args, kwargs, fold)
        host.checked.add(form)
        return output

    def _call_folded(
        self,
        values: Values,
        function: Callable[..., Any],
        args: Any,
        kwargs: Any,
        trunk: Trunk,
        fold: Fold,
    ) -> Any:
        args = tuple(fold_input(v, f"{i}", fold) for i, v in enumerate(args))
        kwargs = {k: fold_input(v, k, fold) for k, v in kwargs.items()}
        binding = Binding(self._host.bindings, values, fold.num_particles, fold)
        with binding, trunk.shared(fold, {**dict(enumerate(args)), **kwargs}):
            output = function(*args, **kwargs)
        return unfold_output(output, "output", self._lead, fold)

    @torch.no_grad()
    def _check_batch_first(
        self, function: Callable[..., Any], args: Any, kwargs: Any, fold: Fold
    ) -> None:
        """Run one particle, to see in every slot where its batch is.

        transformers' networks are batch first, but not all of their layers are.
        """
        one = {
            p: v[None] if v.ndim == p.parameter.ndim else v[:1]
            for p, v in self._values.items()
        }
        with Binding(self._host.bindings, one, 1, replace(fold, num_particles=1)):
            function(*args, **kwargs)

    def _check_independent(
        self, function: Callable[..., Any], args: Any, kwargs: Any, fold: Fold
    ) -> None:
        """Check that no particle's outputs have a gradient in another's weights.

        Nor may they have one in a linear layer's own parameter: its slot replaces it.

        Raises:
            NotFoldable: If they have, or the network keeps a state.
        """
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            unchanged_buffers(self._host.network),
        ):
            leaves = {p: v.detach().clone() for p, v in self._values.items()}
            stacks = [v for p, v in leaves.items() if v.ndim > p.parameter.ndim]
            for stack in stacks:
                stack.requires_grad_()
            own = {
                p.locations[0]: p.parameter.detach().clone().requires_grad_()
                for p in leaves
                if isinstance(p.owner, LinearSlot)
            }
            try:
                with swapped(own):
                    output = self._call_folded(
                        leaves, function, args, kwargs, Trunk([]), fold
                    )
            except RuntimeError as error:
                raise NotFoldable(f"with particles in its batch, {error}") from error
            for s in (0, fold.num_particles - 1):
                outputs = particle_outputs(output, self._lead, s)
                if not outputs:
                    raise NotFoldable(
                        "its outputs have no gradient, which would tell whether they "
                        "depend on one particle each"
                    )
                gradients = torch.autograd.grad(
                    [x.sum() for x in outputs],
                    [*stacks, *own.values()],
                    retain_graph=True,
                    allow_unused=True,
                )
                check_zero_elsewhere(gradients[: len(stacks)], s)
                if any(x is not None for x in gradients[len(stacks) :]):
                    raise NotFoldable(
                        "a linear layer's parameter is read past the layer's forward"
                    )


def _form(network: nn.Module, args: Any, kwargs: Any) -> tuple[Any, ...]:
    """Of a call: training or not, which inputs there are, which of them are None."""
    given = [*enumerate(args), *kwargs.items()]
    return network.training, *((name, x is None) for name, x in given)


def _values(
    host: Host, weights: Mapping[str, Tensor]
) -> tuple[torch.Size, dict[LiftedParameter, Tensor]]:
    """Particle dims, and each parameter's value: of its shape, or a stack (S, ...).

    Raises:
        ValueError: If the particle dims don't broadcast, or hold no particle.
    """
    event_dims = {site: 1 + ps[0].parameter.ndim for site, ps in host.members.items()}
    leads = {
        # A torch.Size also for Pyro's provenance tensors, whose shape is a tuple.
        site: torch.Size(weights[site].shape[: weights[site].ndim - event_dim])
        for site, event_dim in event_dims.items()
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
    values = {}
    for site, members in host.members.items():
        value, event_dim = weights[site], event_dims[site]
        event_shape = value.shape[value.ndim - event_dim :]
        if leads[site].numel() == 1 and lead.numel() == 1:
            value = value.reshape(event_shape)
        elif leads[site]:
            value = value.expand(*lead, *event_shape).reshape(-1, *event_shape)
        for p, of_layer in zip(members, value.unbind(-event_dim), strict=True):
            own = host.bindings.parameter(p)
            # A linear slot casts them to the type of its inputs.
            dtype = of_layer.dtype if isinstance(p.owner, LinearSlot) else own.dtype
            values[p] = of_layer.to(own.device, dtype)
    return lead, values


def _check_checkpointing(host: Host) -> None:
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
