"""A network with one set of weights, or a stack of them, in place of its own."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from pyro_lora.ground.interrupts import eagerly, entered, leaving_no_trace
from pyro_lora.ground.ranks import Ranks
from pyro_lora.ground.synchronisation import values_are_known
from pyro_lora.ground.weights import drawing_nothing
from pyro_lora.lifting.binding import (
    Binding,
    Host,
    Values,
    check_checkpointing,
)
from pyro_lora.lifting.folding import (
    StatisticsOfBatch,
    batch_size,
    call_form,
    check_batch_norm,
    check_zero_elsewhere,
    equally_long,
    fold_input,
    is_ambiguous,
    is_compiled,
    num_choices,
    outputs_of_one,
    particle_outputs,
    same_but_for_rounding,
    stack_outputs,
    tensors_in,
    unchanged_buffers,
    unfold_output,
)
from pyro_lora.lifting.sites import LiftedParameter
from pyro_lora.lifting.slots import Fold, LinearSlot, NotFoldable, swapped
from pyro_lora.lifting.split_layers import (
    OF_SPLIT,
    check_alike,
    check_writes,
    meet,
    meet_before_backward,
    ranks_on,
)
from pyro_lora.lifting.text_trunk import TextTrunk, check_caches
from pyro_lora.lifting.trunk import Call, Trunk

_logger = logging.getLogger(__name__)
_LEAST_MOVE = 1.0  # of weights that are zero, LoRA's B at first
_NUM_OTHERS = 4  # of which one at least should change a statistic, such as a maximum


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
        self._num_calls = 0
        self._are_as_many = False  # particles of all over whom the network is split

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output, tensors as ``(*lead, B, ...)``.

        All particles run at once, folded into the batch. Where a network can't take
        that, they run one at a time, and a message in the log says why.

        With ``use_cache=True`` the output has a key-value cache, in a form of its own,
        to be given to this bound network again.

        Raises:
            RuntimeError: After the ``with lora.bind(...)`` block has ended, or while
                other weights are bound.
            ValueError: If a key-value cache is given to several particles that isn't
                theirs, batch norm would mix them, or gradient checkpointing would
                recompute with other weights.
        """
        host = self._host
        host.check_names(kwargs.keys())
        fills = kwargs.get("use_cache") or _caches_in([*args, *kwargs.values()])
        trunk = self._text_trunk() if fills else host.trunk
        if not torch.compiler.is_compiling():
            self._num_calls += 1
        output = self._run(host.network, args, kwargs, trunk, ())
        if host.mesh is not None and not torch.compiler.is_compiling():
            meet_before_backward(self._ranks, tensors_in(output))
        return output

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The network's ``generate`` under every particle at once: ``(*lead, B, T)``.

        Args:
            args: As for ``network.generate``, batch first.
            kwargs: As for ``network.generate``, batch first.

        Raises:
            RuntimeError: As for a call.
            ValueError: As for a call, or if FSDP doesn't know of ``generate``.
        """
        host = self._host
        if host.mesh is not None and not host.is_tensor_parallel:
            check_writes(host.network)
            kwargs.setdefault("synced_gpus", True)  # until the longest text is written
        generate: Any = host.network.generate
        beams = range(1, sys.maxsize)
        return self._run(generate, args, kwargs, self._text_trunk(), beams)

    def _text_trunk(self) -> TextTrunk:
        trunk = self._host.trunk
        layers = [] if is_compiled(self._host.network) else trunk.layers
        return TextTrunk(layers, trunk.tables)

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
            with self._own.bound(by_user=True):
                yield
        finally:
            self._closed = True

    def _check_none_bound(self) -> None:
        bindings = self._host.bindings
        if bindings.active:
            bindings.undo_interrupted()
        if bindings.active and bindings.active[-1].binding is not self._own:
            raise RuntimeError(
                "Other weights are bound to this network at the moment. Leave the "
                "`with lora.bind(...)` block before binding again."
            )

    def _run(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        trunk: Trunk | TextTrunk,
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
            check_checkpointing(host)
        if host.is_tensor_parallel and not torch.compiler.is_compiling():
            weights = {p.name: value for p, value in self._values.items()}
            given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
            check_alike(self._ranks, weights, given)
        if not lead and host.mesh is None:  # split, it has no nodes of its own
            return self._one(function, args, kwargs, 0, trunk)
        num_particles = lead.numel()
        if host.mesh is not None and not torch.compiler.is_compiling():
            start = f"the start of a pass {OF_SPLIT}"
            self._are_as_many = len({*self._ranks.counts(num_particles, start)}) == 1
        if num_particles > 1:  # what particles would share or mix is refused
            check_caches([*enumerate(args), *kwargs.items()], num_particles)
            check_batch_norm(host.batch_norms)
            if trunk.caches:  # which the caller hasn't asked for
                kwargs.setdefault("use_cache", False)
        form = (bool(repeats), self._form(args, kwargs))
        reason = None
        if num_particles > 1 and form not in host.unfoldable:
            try:
                return self._folded(function, args, kwargs, trunk, repeats, form)
            except NotFoldable as error:
                if _caches_in([*args, *kwargs.values()]):
                    raise  # it is all particles'
                reason = error
        outputs = [
            self._one(function, args, kwargs, s, trunk) for s in range(num_particles)
        ]
        if repeats:
            config = getattr(host.network, "generation_config", None)
            pad = kwargs.get("pad_token_id", getattr(config, "pad_token_id", None))
            outputs = equally_long(outputs, pad)
        output = stack_outputs(outputs, "output", lead)
        if reason is not None:  # else the inputs were wrong
            host.unfoldable.add(form)
            # Slower and right, so nothing that should stop a strict run.
            _logger.warning(
                "The particles run one at a time, which is slower: %s.", reason
            )
        return output

    def _form(self, args: Any, kwargs: Any) -> tuple[Any, ...]:
        """What of a call may decide whether the network mixes its batch, or layers."""
        form = call_form({**dict(enumerate(args)), **kwargs})
        return self._host.network.training, form

    def _one(
        self,
        function: Callable[..., Any],
        args: Any,
        kwargs: Any,
        particle: int,
        trunk: Trunk | TextTrunk | None = None,
    ) -> Any:
        values = {
            p: v if v.ndim == p.parameter.ndim else v[particle]
            for p, v in self._values.items()
        }
        self._meet()
        with Binding(self._host.bindings, values).bound():
            inputs = {**dict(enumerate(args)), **kwargs}
            # A cache knows data by rows, which tensors inside of a dict don't tell.
            by_row = any(isinstance(x, Tensor) and x.ndim > 0 for x in inputs.values())
            if trunk is None or trunk.cache is None or not by_row:
                return function(*args, **kwargs)
            if trunk.caches:  # which the caller hasn't asked for
                kwargs = {"use_cache": False, **kwargs}
                inputs = {**dict(enumerate(args)), **kwargs}
            fold = Fold(1, torch.empty(batch_size(inputs.values()), 0))
            run, form = partial(function, *args, **kwargs), self._form(args, kwargs)
            call = Call(run, fold, inputs, form, values.values(), self._place)
            return trunk.run(call)

    def _folded(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        trunk: Trunk | TextTrunk,
        repeats: Sequence[int],
        form: tuple[Any, ...],
    ) -> Any:
        host, given = self._host, [*args, *kwargs.values()]
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
        # What has filled a cache was checked then.
        known = form in host.checked or bool(_caches_in(given)) or bool(repeats)
        if torch.compiler.is_compiling() or not self._of_any(not known):
            return self._call_folded(self._values, function, args, kwargs, trunk, fold)
        if not host.is_pretrained:
            self._check_independent(function, args, kwargs, fold)
            # Gradients don't tell of what is detached, nor of the batch's size.
            self._check_alone(function, args, kwargs, fold)
        elif self._of_any(is_ambiguous(given, fold)):
            self._check_batch_first(function, args, kwargs, fold)
        call = partial(self._call_folded, self._values, function, args, kwargs)
        statistics = StatisticsOfBatch(fold)
        if is_compiled(host.network):
            # What dynamo meets under a dispatch mode, it leaves alone from then on.
            with unchanged_buffers(host.network), eagerly(), entered(statistics):
                with torch.no_grad(), drawing_nothing(self._values):
                    call(Trunk([]), fold)
            output = call(trunk, fold)
        else:
            with entered(statistics):
                output = call(trunk, fold)
        if host.is_pretrained and self._of_any(statistics.noticed):
            self._check_alone(function, args, kwargs, fold)
        if host.is_pretrained and self._of_any(is_ambiguous(tensors_in(output), fold)):
            self._check_independent(function, args, kwargs, fold)
        host.checked.add(form)
        return output

    def _call_folded(
        self,
        values: Values,
        function: Callable[..., Any],
        args: Any,
        kwargs: Any,
        trunk: Trunk | TextTrunk,
        fold: Fold,
    ) -> Any:
        inputs, form = {**dict(enumerate(args)), **kwargs}, self._form(args, kwargs)
        args = tuple(fold_input(v, f"{i}", fold) for i, v in enumerate(args))
        kwargs = {k: fold_input(v, k, fold) for k, v in kwargs.items()}
        binding = Binding(self._host.bindings, values, fold.num_particles, fold)
        self._meet()
        with binding.bound():
            run = partial(function, *args, **kwargs)
            call = Call(run, fold, inputs, form, values.values(), self._place)
            output = trunk.run(call)
        return unfold_output(output, "output", self._lead, fold)

    @property
    def _place(self) -> int:
        """Which call of a model's run this is; compiled, each would be a graph."""
        return 0 if torch.compiler.is_compiling() else self._num_calls

    def _meet(self) -> None:
        """Wait for the processes over which the network's layers are split, if any."""
        if self._host.mesh is not None and not torch.compiler.is_compiling():
            meet(self._ranks)

    @property
    def _ranks(self) -> Ranks:
        """The processes over which the network's layers are split."""
        return ranks_on(self._host.mesh)

    def _of_any(self, flag: bool) -> bool:
        """Whether something holds for one of these: all take as many passes.

        Those that have other numbers of particles don't ask each other.
        """
        form = f"a question before or after a pass {OF_SPLIT}"
        return any(self._ranks.counts(flag, form)) if self._are_as_many else flag

    @leaving_no_trace
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
        alone = replace(fold, num_particles=1)
        self._meet()
        with Binding(self._host.bindings, one, 1, alone).bound():
            function(*args, **kwargs)

    @torch.no_grad()
    def _check_alone(
        self, function: Callable[..., Any], args: Any, kwargs: Any, fold: Fold
    ) -> None:
        """Check that particles' outputs stay, whatever the others' weights are.

        The first's and the last's: among others as among equals, and as alone. In
        training mode dropout must draw the same, which it doesn't for one alone; the
        generators are put back.

        Raises:
            NotFoldable: If they don't.
        """
        if not values_are_known():  # nothing to compare; planned as what folds
            return
        for particle in (0, fold.num_particles - 1):
            outputs = []
            with unchanged_buffers(self._host.network):
                for seed in (None, *range(_NUM_OTHERS)):
                    values = _beside_others(self._values, particle, seed)
                    with drawing_nothing(self._values):
                        output = self._call_folded(
                            values, function, args, kwargs, Trunk([]), fold
                        )
                    outputs.append(outputs_of_one(output, self._lead, particle))
                if not self._host.network.training:
                    alone = self._one(function, args, kwargs, particle)
                    outputs.append(tensors_in(alone))
            for others in outputs[1:]:
                if not all(map(same_but_for_rounding, outputs[0], others)):
                    raise NotFoldable(
                        "a particle's outputs change with the others': the network "
                        "reads the batch's size, or takes a statistic of the whole "
                        "batch, a range for quantisation perhaps"
                    )

    @leaving_no_trace
    def _check_independent(
        self, function: Callable[..., Any], args: Any, kwargs: Any, fold: Fold
    ) -> None:
        """Check that no particle's outputs have a gradient in another's weights.

        Nor may they have one in a linear layer's own parameter: its slot replaces it.

        Raises:
            NotFoldable: If they have, or the network keeps a state.
            OutOfMemoryError: If the particles don't fit into memory together.
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
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise NotFoldable(f"with particles in its batch, {error}") from error
            # The first and the last: what mixes neighbours or halves shows at an end.
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


def _caches_in(values: Iterable[Any]) -> list[Cache]:
    return [x for x in values if isinstance(x, Cache)]


def _beside_others(values: Values, particle: int, seed: int | None) -> Values:
    """A particle's weights among others: far ones by a seed, equal ones without."""
    beside = {}
    for p, value in values.items():
        if value.ndim > p.parameter.ndim:
            own = value[particle].detach()
            value = own.expand(value.shape).clone()
            if seed is not None:
                generator = torch.Generator(value.device).manual_seed(seed)
                noise = torch.empty_like(value).normal_(generator=generator)
                value += noise * own.abs().amax().clamp_min(_LEAST_MOVE)
                value[particle] = own
        beside[p] = value
    return beside


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
        # A single particle is a weight set, whatever its dims: plain products will do.
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
