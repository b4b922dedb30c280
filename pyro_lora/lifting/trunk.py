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
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pyro_lora.ground.interrupts import eagerly, undone
from pyro_lora.ground.synchronisation import ask
from pyro_lora.ground.weights import drawing_nothing
from pyro_lora.lifting.folding import is_compiled, tensors_in, unchanged_buffers
from pyro_lora.lifting.slots import Fold, NotFoldable

_READ_ELSEWHERE = (
    "The trunk can't be cached: the network reads what its layers give elsewhere, too, "
    "for a mean over layers perhaps. Leave the cache out."
)


def _caches(network: nn.Module) -> bool:
    """Whether a call fills a key-value cache unless it is told not to."""
    get_base = getattr(network, "get_base_model", None)
    base = network if get_base is None else get_base()
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
    return Trunk(layers[:-1], _caches(network), dict(below), tables, readers, network)


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
        copies = x.unflatten(0, (self.fold.num_particles, -1))
        return torch.equal(copies[1:], copies[:1].expand_as(copies[1:]))

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


class Cache(Protocol):
    """What the trunk gave earlier."""

    def key(self, inputs: Mapping[Any, Any], batch_size: int, state: Any) -> Any | None:
        """What a batch is known by; None if it can't be kept.

        Args:
            inputs: The network's inputs, by name, one copy.
            batch_size: B.
            state: What else the outputs depend on.
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
class _Seen:
    """What is seen in one call.

    Attributes:
        looks: Whether it's looked for.
        key: The batch's, in the cache.
        hidden: What the last layer gives, one copy, if there is no more to it.
        reason: Why that can't be kept.
    """

    looks: bool
    key: Any = None
    hidden: Tensor | None = None
    reason: str | None = None

    def look(
        self, output: Any, layer: int, last: bool, batch_size: int
    ) -> Callable[[Tensor], Any] | None:
        """What a layer's output (one copy) is around hidden states; None: not known."""
        if not self.looks or self.reason is not None:
            return None
        rest = output[1:] if isinstance(output, tuple) else ()
        hidden = output[0] if isinstance(output, tuple) else output
        alone = isinstance(hidden, Tensor) and not tensors_in(rest)
        if not alone or len(hidden) != batch_size:
            self.reason = (
                f"The trunk can't be cached: its layer {layer} returns more than one "
                "tensor, or one without the batch. Leave the cache out."
            )
            return None
        if last:
            self.hidden = hidden.detach()
        in_tuple = isinstance(output, tuple)
        return lambda x: (x, *rest) if in_tuple else x


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
    """

    def __init__(
        self,
        layers: list[nn.Module],
        caches: bool = False,
        below: Mapping[str, nn.Module] | None = None,
        tables: Container[int] = (),
        readers: Sequence[nn.Module] = (),
        network: nn.Module | None = None,
    ) -> None:
        self.layers = layers
        self.caches = caches
        self.cache: Cache | None = None  # of what the last layer gives
        self._below = below or {}
        self.tables = tables
        self._readers = readers
        self._network = network
        self._checked = False  # that particles really are the same there
        # The forms of call in which the next layer alone reads what one gives.
        self._forms: set[Any] = set()
        # Layer -> what a call returns around its hidden states.
        self._wrapped: dict[int, Callable[[Tensor], Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "cache": None, "_wrapped": {}}  # both of the cache

    @property
    def why_not_cacheable(self) -> str | None:
        """Why nothing can be cached: there is no trunk, or it is in training mode."""
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

    def _key(self, inputs: Mapping[Any, Any], fold: Fold) -> Any | None:
        """The batch's key in the cache; None without one, or if it can't be used."""
        tensors = [x for x in inputs.values() if isinstance(x, Tensor)]
        own = [x for m in self._below.values() for x in _own_tensors(m)]
        if (
            self.cache is None
            or torch.is_inference_mode_enabled()  # gradients can't use what it makes
            or torch.compiler.is_compiling()
            or any(x.requires_grad or x.ndim == 0 for x in tensors)
            or any(x.is_inference() for x in own)  # which have no version
            or len(tensors_in(inputs)) > len(tensors)  # some are inside of others
        ):
            return None
        device = tensors[0].device.type
        state = (
            versions(own),
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        )
        one_copy = {
            name: x[: fold.batch_size]
            if isinstance(x, Tensor) and x.shape[0] == fold.folded_size
            else x
            for name, x in inputs.items()
        }
        return self.cache.key(one_copy, fold.batch_size, state)

    def caches_one(self, weights: Iterable[Tensor]) -> bool:
        """Whether a call with one set of weights can use the cache.

        That no adapted layer runs before the trunk is seen by the gradients, or was
        seen before.
        """
        if self.cache is None:
            return False
        return self._checked or (
            torch.is_grad_enabled() and all(x.requires_grad for x in weights)
        )

    def run(
        self, call: Callable[[], Any], fold: Fold, inputs: Mapping[Any, Any]
    ) -> Any:
        """What a call gives, its trunk run once for all particles where it's safe.

        It isn't where the network reads elsewhere what one of its layers gives, for a
        mean over layers, say. So what a call of this form gives first must stay without
        NaN where all layers but the last give nothing else.

        Args:
            call: Runs the network.
            fold: How particles are folded into the inputs.
            inputs: The network's folded inputs, by name.

        Raises:
            OutOfMemoryError: If there is no memory for the call.
            ValueError: If there's a cache that can't be used.
            Exception: What the call raises.
        """
        if self.cache is not None:
            self._refuse(self.why_not_cacheable)
        settings = bool | int | str | None
        form = tuple(
            (k, x if isinstance(x, settings) else 0) for k, x in inputs.items()
        )
        if not self.layers or form in self._forms or torch.compiler.is_compiling():
            with self._shared(fold, inputs, form) as seen:
                output = call()
            self._keep(seen)
            return output
        layers = self.layers
        try:
            with self._shared(fold, inputs, form) as seen:
                output = call()
        except torch.OutOfMemoryError:
            raise
        except Exception:
            self.layers = []
            try:
                output = call()
            except Exception:  # it isn't for the trunk
                self.layers = layers
                raise
            self._refuse(_READ_ELSEWHERE)
            return output
        if seen.hidden is not None and self.layers:
            had_nan = _has_nan(output).to(seen.hidden.device)
            try:
                has_nan = self._has_nan_without(call, fold, seen.hidden)
            except torch.OutOfMemoryError:  # of a pass that nobody has asked for
                return output
            if bool(ask(has_nan & ~had_nan, usual=False)):
                self.layers = []
                self._refuse(_READ_ELSEWHERE)
                return call()
            if not ask(had_nan, usual=False):
                self._forms.add(form)
        self._keep(seen)
        return output

    @torch.no_grad()
    def _has_nan_without(
        self, call: Callable[[], Any], fold: Fold, hidden: Tensor
    ) -> Tensor:
        """Whether outputs have NaN, or there are none, without the lower layers'.

        Args:
            call: Runs the network.
            fold: How particles are folded into the inputs.
            hidden: What the last layer gives, one copy.

        Raises:
            OutOfMemoryError: If there is no memory for this pass.
        """
        network, known = self._network, KnownCopies(fold)
        assert network is not None  # that of the layers

        def replacement(forward: Callable[..., Any], i: int) -> Callable[..., Any]:
            return self._recalling(hidden, i, i == len(self.layers) - 1, known)

        found = torch.ones((), dtype=torch.bool, device=hidden.device)
        try:
            with (
                suppress(NotFoldable),  # it writes into buffers, which are put back
                unchanged_buffers(network),
                drawing_nothing(list(network.parameters())),
                eagerly() if is_compiled(network) else nullcontext(),
                replaced_forwards(self.layers, replacement),
                replaced_forwards(self._constant(fold), known.read_once),
            ):
                found = _has_nan(call()).to(hidden.device)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever a network says of NaN
            return found
        return found

    @contextmanager
    def _shared(
        self, fold: Fold, inputs: Mapping[Any, Any], form: Any
    ) -> Iterator[_Seen]:
        """Share the trunk between particles while the block runs, where it's safe.

        It isn't where every layer's states or caches are asked for, where dropout
        differs between particles (in training mode), or where a sequence is as long
        as the folded batch, so that the two can't be told apart.

        Args:
            fold: How particles are folded into the inputs.
            inputs: The network's folded inputs, by name.
            form: That of the call; only a known one's trunk is left out.

        Yields:
            What is seen in the block.
        """
        sizes = {
            n for x in inputs.values() if isinstance(x, Tensor) for n in x.shape[1:]
        }
        asks = ("output_hidden_states", "output_attentions")
        # One particle, which is here for the cache's sake, is mixed with no other.
        safe = fold.num_particles == 1 or fold.folded_size not in sizes
        safe = safe and not any(inputs.get(name) for name in asks)
        safe = safe and not inputs.get("use_cache", self.caches)
        safe = safe and not any(layer.training for layer in self.layers)
        if not (self.layers and safe):
            yield _Seen(False)  # each particle runs them
            return
        layers, is_known = self.layers, form in self._forms
        key = self._key(inputs, fold)
        hidden = None
        if key is not None and self.cache is not None and is_known:
            hidden = self.cache.get(key)
        known = KnownCopies(fold)
        seen = _Seen(hidden is None and (key is not None or not is_known), key)

        def replacement(forward: Callable[..., Any], i: int) -> Callable[..., Any]:
            last = i == len(layers) - 1
            if hidden is None:
                return self._sharing(forward, fold, i, last, known, seen)
            return self._recalling(hidden, i, last, known)

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
        self, hidden: Tensor, layer: int, last: bool, known: KnownCopies
    ) -> Callable[..., Any]:
        # What no other than the next layer reads, which doesn't.
        given = known.repeated(hidden) if last else torch.full_like(hidden, torch.nan)
        return lambda *args, **kwargs: self._wrapped[layer](given)

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
        alone = fold.num_particles == 1
        # Of as many rows as a table has, copies are told by being copies.
        ambiguous = fold.folded_size in self.tables
        copies = Copies(fold, ambiguous)

        def shared_forward(*args: Any, **kwargs: Any) -> Any:
            if alone and any(x.requires_grad for x in tensors_in((args, kwargs))):
                # An adapted layer runs before, or checkpointing asks for gradients.
                return forward(*args, **kwargs)
            if not self._checked:
                given = [*args, *kwargs.values()]
                plain = all(map(is_plain, given))
                if not (plain and (alone or copies.are_given(tensors_in(given)))):
                    # Never share: an adapted layer runs before, or what layers give
                    # each other isn't all in their outputs.
                    self.layers = []
                self._checked = True
            if not self.layers:
                return forward(*args, **kwargs)
            args, kwargs = mapped((args, kwargs), copies.one)
            output = forward(*args, **kwargs)
            form = seen.look(output, layer, last, fold.batch_size)
            if form is not None:
                self._wrapped[layer] = form
            return mapped(output, known.repeated) if last else output

        return shared_forward


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of a module, not of those inside it."""
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _has_nan(output: Any) -> Tensor:
    """Whether one of the tensors in it has NaN, a tensor with one element."""
    found = [x.isnan().any() for x in tensors_in(output) if x.is_floating_point()]
    return torch.stack(found).any() if found else torch.tensor(False)


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
