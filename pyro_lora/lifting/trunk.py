"""The trunk: layers below the first adapted one, the same for every particle.

Their inputs, S copies of a batch of B, and their outputs are the same for all S. So
the first layer's forward is given one copy, and the last one's output is repeated: with
l of L layers below the adapter, S particles cost S (L - l) + l layers in place of S L.
What the last one gives can be kept, and is known again by the inputs; then the layers
aren't run at all.

The first adapted layer reads these copies by frozen parts of its own, a norm or the
projections that LoRA adds to. These are given one copy, too:

    trunk -> S copies of h -> W_q h + B_s A_s h,  W_k h + 0,  W_v h + B_s A_s h
                              '-- once           '-- once    '-- once
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_lora.ground.autocast import autocast_dtype
from pyro_lora.ground.interrupts import entered, num_hooks, undone
from pyro_lora.lifting.folding import is_compiled, is_setting, tensors_in
from pyro_lora.lifting.slots import Fold

_NOT_APART = (
    "The trunk can't be cached: what its layers give isn't theirs alone, each run once "
    "and in order, or is read elsewhere, too. An adapter may run before them, or a "
    "random number be drawn, or a mean be taken over all layers. Leave the cache out."
)
_MOST_FORMS = 64  # of a call; more than that are known anew each time
_NO_NETWORK = nn.Module()


def _base(network: nn.Module) -> Any:
    """The network within PEFT's."""
    get_base = getattr(network, "get_base_model", None)
    return network if get_base is None else get_base()


def _caches(network: nn.Module) -> bool:
    """Whether a call fills a key-value cache unless it is told not to."""
    base = _base(network)
    wants = getattr(getattr(base, "config", None), "use_cache", False)
    return bool(wants) and "use_cache" in inspect.signature(base.forward).parameters


def find_trunk(network: nn.Module, adapted: Iterable[nn.Module]) -> Trunk:
    """The trunk of a network.

    Args:
        network: The network.
        adapted: Its adapted layers.

    Returns:
        The trunk, which may be empty.
    """
    adapted = set(adapted)
    if not adapted:
        return Trunk([], _caches(network))
    order = {module: i for i, module in enumerate(network.modules())}
    first_slot = min(order[slot] for slot in adapted)
    below = [
        (path, module)
        for path, module in network.named_modules()
        if order[module] < first_slot
    ]
    layers = _layers_to(network, adapted, order, first_slot)
    readers = [
        module
        for layer in layers[-1:]
        for module in layer.modules()
        # Activations have no weights, and cost no more than a copy does.
        if module not in adapted
        and not any(module.children())
        and any(True for _ in _own_tensors(module))
    ]
    # What a layer is given may be such a table: of relative positions, say.
    tables = {
        module.num_embeddings
        for module in network.modules()
        if isinstance(module, nn.Embedding)
    }
    return Trunk(
        layers[:-1],
        _caches(network),
        dict(below),
        tables,
        readers,
        network,
        layers[-1] if layers else None,
    )


def _layers_to(
    network: nn.Module,
    adapted: set[nn.Module],
    order: Mapping[nn.Module, int],
    first_slot: int,
) -> list[nn.Module]:
    """The layers of a stack down to its first adapted one, which comes last."""
    for stack in network.modules():
        if not isinstance(stack, nn.ModuleList):
            continue
        contents = [set(layer.modules()) for layer in stack]
        first = next((i for i, c in enumerate(contents) if c & adapted), None)
        # Modules are registered in the order in which they run: this stack must hold
        # the first slot of all.
        if first is not None and any(order[m] == first_slot for m in contents[first]):
            return list(stack)[: first + 1]
    return []


def are_equal(x: Tensor, fold: Fold) -> bool:
    """Whether a folded tensor is the same for all particles."""
    copies = x.unflatten(0, (fold.num_particles, -1))
    return torch.equal(copies[1:], copies[:1].expand_as(copies[1:]))


@dataclass(frozen=True)
class Copies:
    """The copies of a batch in folded tensors, for layers that need one of them.

    Attributes:
        fold: How particles are folded into the batch.
        ambiguous: Whether a tensor may have as many rows for another reason; then
            copies are told by being copies.
    """

    fold: Fold
    ambiguous: bool

    def are_folded(self, x: Tensor) -> bool:
        """Whether a tensor's rows are those of all particles."""
        return x.ndim > 1 and x.shape[0] == self.fold.folded_size

    def are_equal(self, x: Tensor) -> bool:
        """Whether a folded tensor is the same for all particles."""
        return are_equal(x, self.fold)

    def one(self, x: Tensor) -> Tensor:
        """The first copy; a tensor without copies as it is."""
        if self.are_folded(x) and not self.ambiguous:
            return x[: self.fold.batch_size]
        maybe = self.are_folded(x) or self._may_have_rows_of_data(x)
        if maybe and self.are_equal(x):
            return x[: len(x) // self.fold.num_particles]
        return x

    def _may_have_rows_of_data(self, x: Tensor) -> bool:
        """Whether a datum may have several rows: one for each head with ALiBi."""
        if torch.compiler.is_compiling() or x.ndim < 2 or not self.fold.folded_size:
            return False
        return len(x) > 0 and len(x) % self.fold.folded_size == 0

    def are_given(self, tensors: Sequence[Tensor]) -> bool:
        """Whether a layer is given the same for all particles, hidden states first."""
        if not tensors or not self.are_folded(tensors[0]):
            return False
        folded = filter(self.are_folded, tensors[:1] if self.ambiguous else tensors)
        return all(map(self.are_equal, folded))

    def all(self, x: Tensor) -> Tensor:
        """A copy for each particle, of a tensor that has the batch's rows."""
        if x.ndim < 2 or x.shape[0] != self.fold.batch_size:
            return x
        return x.repeat(self.fold.num_particles, *[1] * (x.ndim - 1))


class KnownCopies:
    """Tensors that are known to hold one copy of the batch for each particle.

    They are told by being the same objects, not written into since.

    Args:
        fold: How particles are folded into the batch.
    """

    def __init__(self, fold: Fold) -> None:
        self._fold = fold
        self.batch_size = fold.batch_size
        self._known: list[tuple[weakref.ref[Tensor], int]] = []

    def repeated(self, x: Tensor) -> Tensor:
        """A copy for each particle, known from now on; see :meth:`Copies.all`."""
        copies = Copies(self._fold, ambiguous=False).all(x)
        # Tensors of inference mode have no version. And checkpointing, which asks for
        # gradients, recomputes with as many rows as there were.
        if not (copies is x or copies.is_inference() or copies.requires_grad):
            self._known.append((weakref.ref(copies), copies._version))
        return copies

    def read_once(self, forward: Callable[..., Any], _: int) -> Callable[..., Any]:
        """A frozen layer's forward that runs on one copy where it's given several."""

        def reading_forward(*args: Any, **kwargs: Any) -> Any:
            if len(args) == 1 and not kwargs and self._are_known(args[0]):
                output = forward(args[0][: self._fold.batch_size])
                if isinstance(output, Tensor):
                    copies = self.repeated(output)
                    if copies is not output:
                        return copies
            return forward(*args, **kwargs)

        return reading_forward

    def _are_known(self, x: Any) -> bool:
        return isinstance(x, Tensor) and any(
            x is copies() and x._version == version for copies, version in self._known
        )


@contextmanager
def replaced_forwards(
    layers: Sequence[nn.Module],
    replacement: Callable[[Callable[..., Any], int], Callable[..., Any]],
) -> Iterator[None]:
    """Give layers other forwards while a block runs.

    Args:
        layers: The layers.
        replacement: Makes a layer's from its own one and its place.
    """
    before = [layer.__dict__.get("forward") for layer in layers]

    def put_back() -> None:
        for layer, forward in zip(layers, before, strict=True):
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.__dict__["forward"] = forward

    with undone(put_back):
        for i, layer in enumerate(layers):
            layer.forward = replacement(layer.forward, i)
        yield


class Watch(TorchDispatchMode):
    """Notices what of a call stands against sharing its trunk, or leaving it out.

    - The layers run in another order, or several times.
    - Before the last of them has run, an operation reads the weights that differ
      between particles, or draws random numbers.
    - It matters elsewhere than in the next layer what a lower one gives. What is made
      of it is followed from one operation to the next: to the network's outputs, to a
      number that the program reads, or to whoever keeps it. So is what is made of
      data within the layers.

    Args:
        layers: The trunk's.
        weights: That differ between particles.

    Attributes:
        are_read: Whether anything outside of the layers has read what a lower one gave.
    """

    def __init__(self, layers: Sequence[nn.Module], weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.are_read = False
        self._noticed = False
        self._order = list(range(len(layers)))
        self._calls: list[int] = []
        self._num_inside = 0
        self._weights = {x.untyped_storage()._cdata: x for x in weights}
        self._made: weakref.WeakSet[Any] = weakref.WeakSet()  # storages
        self._data: weakref.WeakSet[Any] = weakref.WeakSet()
        self._inside: weakref.WeakSet[Any] = weakref.WeakSet()

    def watched(self, forward: Callable[..., Any], layer: int) -> Callable[..., Any]:
        """A layer's forward that is watched.

        Args:
            forward: The layer's.
            layer: Its place.
        """

        def watched_forward(*args: Any, **kwargs: Any) -> Any:
            self._num_inside += 1
            self._data.update(_storages((args, kwargs)))
            try:
                output = forward(*args, **kwargs)
            finally:
                self._num_inside -= 1
            self._calls.append(layer)
            self.allow(output)
            if layer < self._order[-1]:  # of the last one all may read the output
                self._made.update(_storages(output))
            return output

        return watched_forward

    def allow(self, value: Any) -> None:
        """Let what was made within a layer be kept."""
        for storage in _storages(value):
            self._inside.discard(storage)

    def notice(self) -> None:
        """Say that sharing isn't right here."""
        self._noticed = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and see what it reads."""
        kwargs = kwargs or {}
        read = tensors_in((args, kwargs))
        before = _storages(read)
        if len(self._calls) < len(self._order):
            of_weights = any(x._cdata in self._weights for x in before)
            self._noticed |= of_weights or _draws(func, args, kwargs)
        outside = not self._num_inside
        followed = any(x in self._made or x in self._inside for x in before)
        self.are_read |= outside and followed
        output = func(*args, **kwargs)
        made = _storages(output)
        if outside and followed:
            self._made.update(made)
            self._noticed |= not made
        elif not outside and any(x in self._data for x in before):
            new = set(made).difference(before)
            self._data.update(new)
            self._inside.update(new)
        return output

    @property
    def may_be_why(self) -> bool:
        """Whether an error may come of sharing: of rows that are fewer than others."""
        in_order = self._calls == self._order[: len(self._calls)]
        return self.are_read or self._noticed or not in_order

    @property
    def noticed(self) -> bool:
        """Whether anything was noticed, after the call."""
        kept = len(self._made) + len(self._inside)
        return self._noticed or self._calls != self._order or kept > 0


def _storages(value: Any) -> list[Any]:
    # Sparse tensors have none.
    strided = (x for x in tensors_in(value) if x.layout is torch.strided)
    return [x.untyped_storage() for x in strided]


def _draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation draws random numbers."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    given = {
        x.name: args[i] if i < len(args) else kwargs.get(x.name, x.default_value)
        for i, x in enumerate(func._schema.arguments)
    }
    if given.get("train", given.get("training", True)) is False:
        return False
    return bool(given.get("dropout_p", True))  # that of attention


@dataclass(frozen=True, eq=False)
class Call:
    """A call of the network.

    Attributes:
        run: Runs it, inputs folded and weights bound.
        fold: How particles are folded into the inputs.
        inputs: By name, one copy.
        form: What of it may decide what the network does.
        weights: The particles'.
        place: Which of the calls at these weights it is.
    """

    run: Callable[[], Any]
    fold: Fold
    inputs: Mapping[Any, Any]
    form: Any
    weights: Iterable[Tensor]
    place: int


class Cache(Protocol):
    """What the trunk gave earlier."""

    @property
    def has_ended(self) -> bool:
        """Whether nothing is kept, nor will be."""
        ...

    def end_batch(self) -> None:
        """Be told that the batch is done."""
        ...

    def key(self, call: Call, state: Any, are_apart: bool, is_seen: bool) -> Any | None:
        """What a batch is known by; None if it can't be kept.

        Args:
            call: Of the network.
            state: What else the outputs depend on.
            are_apart: Whether data are known not to depend on others of their batch.
            is_seen: Whether somebody's hooks see what its layers give.
        """
        ...

    def get(self, key: Any) -> Tensor | None:
        """The hidden states (B, ...); None if they aren't there."""
        ...

    def put(self, key: Any, hidden: Tensor) -> None:
        """Keep hidden states (B, ...), constants from now on."""
        ...

    def refuse(self, reason: str) -> None:
        """Say, or take for known, that the trunk can't be cached."""
        ...


@dataclass(eq=False)
class _Known:
    """What is known of the calls of one form.

    Attributes:
        copies: Layer and place of an argument -> whether it has rows of all particles.
        nones: Layer -> how many None it returns after its hidden states; None where it
            returns these alone.
    """

    copies: dict[Any, bool] = field(default_factory=dict)
    nones: dict[int, int | None] = field(default_factory=dict)

    def output(self, layer: int, hidden: Tensor) -> Any:
        """What a layer returns that gives these hidden states."""
        nones = self.nones[layer]
        return hidden if nones is None else (hidden, *[None] * nones)


@dataclass(eq=False)
class _Seen:
    """What is seen in one call.

    Attributes:
        key: The batch's, in the cache, if what it gives is to be kept.
        hidden: What the last layer gives, one copy, if there is no more to it.
        reason: Why that can't be kept.
        done: The layers that have run.
        known: Of its form.
        watch: Of a call whose form is new.
    """

    key: Any = None
    hidden: Tensor | None = None
    reason: str | None = None
    done: set[int] = field(default_factory=set)
    known: _Known = field(default_factory=_Known)
    watch: Watch | None = None

    def look(self, output: Any, layer: int, last: bool, batch_size: int) -> None:
        """See what a layer's output (one copy) is."""
        if self.reason is not None:
            return
        rest = output[1:] if isinstance(output, tuple) else ()
        hidden = output[0] if isinstance(output, tuple) else output
        alone = isinstance(hidden, Tensor) and all(x is None for x in rest)
        if not alone or len(hidden) != batch_size:
            self.reason = (
                f"The trunk can't be cached: its layer {layer} returns more than one "
                "tensor, or one without the batch. Leave the cache out."
            )
            return
        if last and self.key is not None:
            self.hidden = hidden.detach()
        self.known.nones[layer] = len(rest) if isinstance(output, tuple) else None


class Trunk:
    """Runs the trunk on one copy of the batch while particles are folded into it.

    Args:
        layers: In the order in which they run.
        caches: Whether the network fills a key-value cache unless told not to.
        below: All modules before the first adapted one, by path.
        tables: How many rows the network's embeddings have.
        readers: The frozen parts of the first adapted layer, some of which read what
            the trunk gives.
        network: The whole.
        first_adapted: The layer above; None where the network has no stack of layers.

    Attributes:
        are_apart: Whether data of a batch are known not to depend on each other.
    """

    def __init__(
        self,
        layers: list[nn.Module],
        caches: bool = False,
        below: Mapping[str, nn.Module] | None = None,
        tables: Container[int] = (),
        readers: Sequence[nn.Module] = (),
        network: nn.Module = _NO_NETWORK,
        first_adapted: nn.Module | None = None,
    ) -> None:
        self.layers = layers
        self.first_adapted = first_adapted
        self.caches = caches
        self.cache: Cache | None = None  # of what the last layer gives
        self._below = below or {}
        self.tables = tables
        self._readers = readers
        self._network = network
        self.are_apart = False
        # By form of call; None where sharing isn't right.
        self._forms: dict[Any, _Known | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "cache": None}

    @property
    def why_not_cacheable(self) -> str | None:
        """Why nothing can be cached; None where it can."""
        if is_compiled(self._network):
            return (
                "The trunk can't be cached: the network is compiled, and would be for "
                "each batch anew. Leave the cache out."
            )
        for path, module in self._below.items():
            if module.training:
                return (
                    f"The trunk can't be cached: {path or 'the network'!r} is in "
                    "training mode, where dropout may draw anew at each step. Call "
                    ".eval() on the network, or leave the cache out."
                )
        if not self.layers:
            return (
                "There is no trunk to cache: no stack of layers begins below the first "
                "adapted one. Adapt the upper layers only (layers_to_transform in "
                "peft), or leave the cache out."
            )
        return None

    def _key(self, call: Call) -> Any | None:
        """The batch's key in the cache; None without one, or if it can't be used."""
        inputs = call.inputs
        if (
            self.cache is None
            or self.cache.has_ended
            or torch.is_inference_mode_enabled()  # gradients can't use what it makes
            or torch.compiler.is_compiling()
            or not all(isinstance(x, Tensor) or is_setting(x) for x in inputs.values())
        ):
            return None
        tensors = tensors_in(inputs)
        below = [*self._below.values()]
        below += [m for layer in self.layers for m in layer.modules()]
        known = set(below)
        # Modules may be registered in another order than they run in.
        frozen = [
            x
            for m in self._network.modules()
            for x in _own_tensors(m)
            if m in known or not x.requires_grad
        ]
        if (
            any(x.requires_grad or x.ndim == 0 for x in tensors)
            or any(x.layout is not torch.strided for x in tensors)
            or any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)
            or any(x.is_inference() for x in frozen)  # which have no version
            # Ranks that hold shards of it must all run it, or none.
            or any(getattr(x, "device_mesh", None) is not None for x in frozen)
            or (torch.is_grad_enabled() and any(x.requires_grad for x in frozen))
        ):
            return None
        device = tensors[0].device.type
        is_seen = any(map(num_hooks, self.layers))
        hooks = [(id(m), num_hooks(m)) for m in below]
        state = (versions(frozen), hooks, autocast_dtype(device))
        return self.cache.key(call, state, self.are_apart, is_seen)

    def run(self, call: Call) -> Any:
        """What a call gives, its trunk run once for all particles where it's safe.

        It isn't where the network reads elsewhere what one of its layers gives, for a
        mean over layers, say. The first call of each form is watched (:class:`Watch`),
        and a later one's trunk may be left out.

        Args:
            call: Of the network.

        Raises:
            AssertionError: What the call raises.
            IndexError: The same.
            OutOfMemoryError: The same.
            RuntimeError: The same.
            ValueError: The same, or if there's a cache that can't be used.
        """
        if self.cache is not None:
            self._refuse(self.why_not_cacheable)
        form = (call.fold.num_particles > 1, call.form)
        if not self.layers or self._forms.get(form, _Known()) is None:
            self._refuse(_NOT_APART)
            return call.run()
        output, failed = None, False
        with self._shared(call, form) as seen:
            watch = seen.watch
            try:
                with nullcontext() if watch is None else entered(watch):
                    output = call.run()
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, IndexError, AssertionError):
                if watch is None or not watch.may_be_why:
                    raise
                failed = True  # of rows that are fewer than others, perhaps
        if watch is not None:
            if failed or watch.noticed:
                output = None  # its memory, before it's made again
                output = call.run()
                self._learn(form, None)
                self._refuse(_NOT_APART)
                return output
            self._learn(form, seen.known)
        self._keep(seen)
        return output

    @contextmanager
    def _shared(self, call: Call, form: Any) -> Iterator[_Seen]:
        """Share the trunk between particles while the block runs, where it's safe.

        It isn't where every layer's states or caches are asked for, where dropout
        differs between particles (in training mode), or where a sequence is as long
        as the folded batch, so that the two can't be told apart.

        Args:
            call: Of the network.
            form: Its own; only a known one's trunk is left out.

        Yields:
            What is seen in the block.
        """
        fold, inputs = call.fold, call.inputs
        sizes = {
            n for x in inputs.values() if isinstance(x, Tensor) for n in x.shape[1:]
        }
        asks = ("output_hidden_states", "output_attentions")
        # One particle, which is here for the cache's sake, is mixed with no other.
        safe = fold.num_particles == 1 or fold.folded_size not in sizes
        config = getattr(_base(self._network), "config", None)
        safe = safe and not any(
            inputs.get(name, getattr(config, name, False)) for name in asks
        )
        safe = safe and not inputs.get("use_cache", self.caches)
        safe = safe and not any(m.training for x in self.layers for m in x.modules())
        if not (self.layers and safe):
            yield _Seen()  # each particle runs them
            return
        layers = self.layers
        key, seen, hidden = self._key(call), _Seen(), None
        of_form = self._forms.get(form)
        if of_form is not None:
            seen.known = of_form
            if key is not None and self.cache is not None:
                if len(of_form.nones) == len(layers):
                    hidden = self.cache.get(key)
        if hidden is None:
            seen.key = key
        known = KnownCopies(fold)
        compiling = torch.compiler.is_compiling()
        if of_form is None and not (compiling or is_compiled(self._network)):
            # Dynamo leaves alone what it meets under a dispatch mode.
            seen.watch = Watch(layers, call.weights)

        def replacement(forward: Callable[..., Any], i: int) -> Callable[..., Any]:
            last = i == len(layers) - 1
            if hidden is not None:
                return self._recalling(forward, hidden, i, last, known, seen)
            shared = self._sharing(forward, fold, i, last, known, seen)
            return shared if seen.watch is None else seen.watch.watched(shared, i)

        with (
            replaced_forwards(layers, replacement),
            replaced_forwards(self._constant(fold), known.read_once),
        ):
            yield seen

    def _constant(self, fold: Fold) -> list[nn.Module]:
        """The readers that give copies if they're given copies."""
        if fold.num_particles == 1 or torch.compiler.is_compiling():
            return []
        return [
            module
            for module in self._readers
            # Dropout may draw for each particle; weights trained beside the lifted ones
            # have gradients, too.
            if not module.training
            and not any(x.requires_grad for x in _own_tensors(module))
        ]

    def _recalling(
        self,
        forward: Callable[..., Any],
        hidden: Tensor,
        layer: int,
        last: bool,
        known: KnownCopies,
        seen: _Seen,
    ) -> Callable[..., Any]:
        # What no other than the next layer reads, which doesn't.
        given = known.repeated(hidden) if last else torch.full_like(hidden, torch.nan)

        def recalled(*args: Any, **kwargs: Any) -> Any:
            if layer in seen.done:
                return forward(*args, **kwargs)
            seen.done.add(layer)
            return seen.known.output(layer, given)

        return recalled

    def _learn(self, form: Any, known: _Known | None) -> None:
        if len(self._forms) < _MOST_FORMS:
            self._forms[form] = known

    def _refuse(self, reason: str | None) -> None:
        if self.cache is not None and reason is not None:
            self.cache.refuse(reason)

    def _keep(self, seen: _Seen) -> None:
        if self.cache is None or seen.key is None:
            return
        self._refuse(seen.reason if self.layers else self.why_not_cacheable)
        if seen.hidden is not None:
            self.cache.put(seen.key, seen.hidden)

    def _sharing(
        self,
        forward: Callable[..., Any],
        fold: Fold,
        layer: int,
        last: bool,
        known: KnownCopies,
        seen: _Seen,
    ) -> Callable[..., Any]:
        alone, watch = fold.num_particles == 1, seen.watch

        def shared_forward(*args: Any, **kwargs: Any) -> Any:
            given = tensors_in((args, kwargs))
            # An adapted layer runs before, or checkpointing asks for gradients; or the
            # layer runs again, on what the last one has made of all particles.
            if (alone and any(x.requires_grad for x in given)) or layer in seen.done:
                return forward(*args, **kwargs)
            if watch is not None:
                plain = all(map(is_plain, [*args, *kwargs.values()]))
                if not plain or not (layer or _are_copies(given[:1], fold)):
                    watch.notice()
            seen.done.add(layer)
            copies = seen.known.copies
            args, kwargs = _one_copy(fold, copies, (layer,), (args, kwargs))
            output = forward(*args, **kwargs)
            seen.look(output, layer, last, fold.batch_size)
            if watch is not None:
                watch.allow(seen.hidden)
            place = (layer, "output")
            return _all_copies(known, copies, place, output) if last else output

        return shared_forward


def _are_copies(given: Sequence[Tensor], fold: Fold) -> bool:
    """Whether hidden states that a layer is given are the same for all particles."""
    if fold.num_particles == 1:
        return True
    folded = bool(given) and len(given[0]) == fold.folded_size
    return folded and are_equal(given[0], fold)


def _one_copy(fold: Fold, copies: dict[Any, bool], place: Any, value: Any) -> Any:
    """One copy of arguments that have rows of all particles, others as they are.

    Which ones have is seen when they first have more than one row, by being copies: a
    table has as many rows by chance.

    Args:
        fold: How particles are folded into the inputs.
        copies: Place of an argument -> whether it has; what is seen goes there.
        place: Of the value.
        value: An argument, or a tuple or dict of such.
    """
    if isinstance(value, tuple):
        parts = [_one_copy(fold, copies, (*place, i), v) for i, v in enumerate(value)]
        return tuple(parts)
    if isinstance(value, dict):
        return {k: _one_copy(fold, copies, (*place, k), v) for k, v in value.items()}
    if not isinstance(value, Tensor) or value.ndim == 0 or len(value) <= 1:
        return value
    if fold.num_particles == 1:
        return value
    if torch.compiler.is_compiling():  # no values are known
        whole = value.ndim > 1 and len(value) == fold.folded_size
        return value[: fold.batch_size] if whole else value
    if place not in copies:
        folded = not len(value) % fold.folded_size
        copies[place] = folded and are_equal(value, fold)
    if copies[place] and not len(value) % fold.num_particles:
        return value[: len(value) // fold.num_particles]
    return value


def _all_copies(
    known: KnownCopies, copies: dict[Any, bool], place: Any, value: Any
) -> Any:
    """What the last layer gives, for all particles: the same backwards."""
    if isinstance(value, tuple):
        parts = enumerate(value)
        return tuple(_all_copies(known, copies, (*place, i), v) for i, v in parts)
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if place not in copies and len(value) > 1:
        copies[place] = len(value) == known.batch_size
    return known.repeated(value) if copies.get(place, True) else value


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of a module, not of those inside it."""
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def is_plain(value: Any) -> bool:
    """Whether an argument is for a layer to read, not to leave something there."""
    if isinstance(value, tuple):
        return all(map(is_plain, value))
    return isinstance(value, Tensor | bool | int | float | str | None)


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """What a function makes of every tensor in nested tuples and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(mapped(v, function) for v in value)
    if isinstance(value, dict):
        return {k: mapped(v, function) for k, v in value.items()}
    return value


def versions(tensors: Iterable[Tensor]) -> tuple[tuple[int, int], ...]:
    """What changes when one of the tensors does."""
    return tuple((x.data_ptr(), x._version) for x in tensors)
