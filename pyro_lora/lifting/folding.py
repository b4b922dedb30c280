"""Particles as parts of the batch, and outputs as one part for each particle.

S particles of a batch of B data are a batch of S B, particle-major: row s B + b is
datum b under particle s. Of S = 2 and B = 3::

    particle   0 0 0 1 1 1
    datum      0 1 2 0 1 2

Layers without weights of their own for each particle run as on any batch; the others,
the slots, tell the particles apart by place. Which is right for a network that treats
the rows of a batch independently, and that is checked here and in ``bound_network``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Cache

from pyro_lora.ground.interrupts import undone
from pyro_lora.ground.synchronisation import ask
from pyro_lora.lifting.slots import Fold, NotFoldable

_REDUCTIONS = frozenset(
    "amax amin aminmax kthvalue linalg_vector_norm logsumexp max mean median min "
    "nanmedian norm prod quantile sort std std_mean sum topk var var_mean".split()
)
# Of a tensor's largest value; bfloat16 resolves .008.
_MOST_ROUNDING = 0.05


def batch_size(values: Iterable[Any]) -> int:
    """The batch size that the inputs tell.

    Raises:
        NotFoldable: If no input has a batch dim.
    """
    sizes = [v.shape[0] for v in values if isinstance(v, Tensor) and v.ndim > 0]
    if not sizes:
        raise NotFoldable("no tensor input has a batch dim")
    # A 1 is the batch size only if all are 1: position_ids, say, may be (1, T).
    return next((size for size in sizes if size != 1), 1)


def num_choices(values: Iterable[Any]) -> int:
    """Texts of one datum: c where multiple choice gives ids of shape (B, c, T)."""
    return next(
        (
            v.shape[1]
            for v in values
            if isinstance(v, Tensor) and v.ndim == 3 and not v.is_floating_point()
        ),
        1,
    )


def is_ambiguous(values: Iterable[Any], fold: Fold) -> bool:
    """Whether another dim of a tensor may be taken for the folded batch."""
    return any(
        isinstance(v, Tensor) and any(map(fold.fits, v.shape[1:])) for v in values
    )


def fold_input(value: Any, name: str, fold: Fold) -> Any:
    """An input, (B, ...), repeated for each particle, (S * B, ...).

    Raises:
        NotFoldable: If its first dim is neither the batch nor 1, or it holds tensors
            in another form.
    """
    if isinstance(value, Tensor) and value.ndim > 0:
        if value.shape[0] == fold.batch_size:
            return value.repeat(fold.num_particles, *[1] * (value.ndim - 1))
        if value.shape[0] == 1:  # the same for all data, and so for all particles
            return value
        raise NotFoldable(
            f"input {name!r} has shape {tuple(value.shape)}, whose first dim is "
            f"neither the batch's, {fold.batch_size}, nor 1"
        )
    if not isinstance(value, Tensor) and tensors_in(value):
        raise NotFoldable(f"input {name!r} is a {type(value).__name__}")
    return value


def unfold_output(value: Any, name: str, lead: torch.Size, fold: Fold) -> Any:
    """An output, (S * B, ...), as ``(*lead, B, ...)``, where lead holds S particles.

    Raises:
        NotFoldable: If a tensor in it isn't made of one part for each particle.
    """
    if isinstance(value, Tensor):
        if fold.is_folded(value):
            size = value.shape[0] // fold.num_particles
            return value.reshape(*batch_lead(lead), size, *value.shape[1:])
        raise NotFoldable(
            f"output {name!r} has shape {tuple(value.shape)}, which mixes or drops "
            "the particles (a loss, perhaps)"
        )
    if isinstance(value, Mapping):
        return type(value)(
            **{k: unfold_output(v, k, lead, fold) for k, v in value.items()}
        )
    if isinstance(value, tuple | list):
        return _like(value, [unfold_output(v, name, lead, fold) for v in value])
    if is_dataclass(value):
        return replace(
            value,  # type: ignore[type-var]
            **{k: unfold_output(v, k, lead, fold) for k, v in _fields(value).items()},
        )
    return value


def equally_long(texts: list[Any], pad: int | None) -> list[Any]:
    """Token ids (B, T) of each particle, padded to the longest, as in one batch."""
    is_ids = [isinstance(x, Tensor) and x.ndim == 2 for x in texts]
    if pad is None or not all(is_ids):
        return texts
    length = max(x.shape[1] for x in texts)
    return [nn.functional.pad(x, (0, length - x.shape[1]), value=pad) for x in texts]


def stack_outputs(outputs: list[Any], name: str, lead: torch.Size) -> Any:
    """One output of each particle, tensors as ``(*lead, B, ...)``.

    Raises:
        ValueError: If their shapes differ.
    """
    first = outputs[0]
    if isinstance(first, Cache) and len(outputs) > 1:
        return None  # there is no cache for all of them
    if isinstance(first, Tensor):
        if any(out.shape != first.shape for out in outputs):
            raise ValueError(
                f"Output {name!r} has shapes {[tuple(out.shape) for out in outputs]}, "
                "which differ between particles. Bind one particle at a time."
            )
        lead = batch_lead(lead) if first.ndim else lead
        stack = torch.stack(outputs) if len(outputs) > 1 else first[None]
        return stack.reshape(*lead, *first.shape)
    if isinstance(first, Mapping):
        return type(first)(
            **{k: stack_outputs([out[k] for out in outputs], k, lead) for k in first}
        )
    if isinstance(first, tuple | list):
        by_item = zip(*outputs, strict=True)
        return _like(first, [stack_outputs(list(item), name, lead) for item in by_item])
    if is_dataclass(first):
        named = [_fields(out) for out in outputs]
        return replace(
            first,  # type: ignore[type-var]
            **{k: stack_outputs([out[k] for out in named], k, lead) for k in named[0]},
        )
    return first


def _like(value: Any, items: list[Any]) -> Any:
    """The items in a tuple or list of the value's type, a named tuple perhaps."""
    return getattr(type(value), "_make", type(value))(items)


def _fields(value: Any) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in fields(value) if f.init}


def batch_lead(lead: torch.Size) -> torch.Size:
    """The particle dims of what has a batch dim, which takes the place of a last 1."""
    return lead[:-1] if len(lead) > 1 and lead[-1] == 1 else lead


def particle_outputs(output: Any, lead: torch.Size, particle: int) -> list[Tensor]:
    """A particle's part of the tensors that have gradients, in ``(*lead, B, ...)``."""
    num_dims = len(batch_lead(lead))
    return [
        x.flatten(0, num_dims - 1)[particle]
        for x in tensors_in(output)
        if x.requires_grad
    ]


def outputs_of_one(output: Any, lead: torch.Size, particle: int) -> list[Tensor]:
    """A particle's part of all tensors in ``(*lead, B, ...)``."""
    num_dims = len(batch_lead(lead))
    return [x.flatten(0, num_dims - 1)[particle] for x in tensors_in(output)]


def same_but_for_rounding(x: Tensor, y: Tensor) -> bool:
    """Whether tensors differ by no more than another order of summation may explain."""
    if not x.is_floating_point():
        return torch.equal(x, y)
    tolerance = min(torch.finfo(x.dtype).eps ** 0.5, _MOST_ROUNDING)
    size = x.abs().where(x.isfinite(), torch.zeros_like(x)).amax() if x.numel() else 0
    return torch.allclose(x, y, rtol=0, atol=float(tolerance * size), equal_nan=True)


_LARGE = 16


def is_setting(value: Any) -> bool:
    """Whether an argument is neither a tensor nor an object with a state."""
    if isinstance(value, tuple):
        return all(map(is_setting, value))
    return value is None or isinstance(value, bool | int | float | str)


def call_form(inputs: Mapping[Any, Any]) -> tuple[Any, ...]:
    """What of a call may decide what a network does: settings, what there is and isn't.

    Args:
        inputs: By name.

    Returns:
        Equal for calls that differ in tensors, in objects of one type, in floats that
        aren't 0, or in whole numbers that are large: small ones choose, large ones
        count steps.
    """
    return tuple((name, _kind(x)) for name, x in inputs.items())


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Tensor
    if isinstance(value, tuple | list):
        return type(value), tuple(map(_kind, value))
    if isinstance(value, Mapping):
        return type(value), call_form(value)
    if value is None or isinstance(value, bool | str):
        return type(value), value
    if isinstance(value, int):
        return type(value), max(-1, min(value, _LARGE))
    return type(value), value != 0 if isinstance(value, float) else None


def is_compiled(network: nn.Module) -> bool:
    """Whether a network, or a part of it, is compiled."""
    return any(
        module._compiled_call_impl is not None or "_orig_mod" in module._modules
        for module in network.modules()
    )


class StatisticsOfBatch(TorchDispatchMode):
    """Notices numbers that are taken over a whole folded batch, detached or not.

    Args:
        fold: How particles are folded into it.
    """

    def __init__(self, fold: Fold) -> None:
        super().__init__()
        self._size = fold.folded_size
        self.noticed = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.noticed and func.overloadpacket.__name__ in _REDUCTIONS:
            given, made = tensors_in(args)[:1], tensors_in(result)
            self.noticed = any(
                x.is_floating_point()
                and x.ndim > 0
                and x.numel() % self._size == 0
                and (x.ndim == 1 or any(y.ndim == 0 or len(y) != len(x) for y in made))
                for x in given
            )
        return result


def check_zero_elsewhere(gradients: Iterable[Tensor | None], particle: int) -> None:
    """Check that gradients, (S, ...), of a particle's outputs are all in its own part.

    Raises:
        NotFoldable: If one isn't.
    """
    for gradient in gradients:
        if gradient is None:
            continue
        # Products with a gradient of zero are exactly zero, whatever their size.
        others = torch.arange(len(gradient), device=gradient.device) != particle
        at_others = (gradient != 0).flatten(1).any(1) & others
        if ask(at_others.any(), usual=False):
            raise NotFoldable(
                "a particle's outputs depend on the others': the inputs aren't batch "
                "first, or the network mixes the data of a batch"
            )


@contextmanager
def unchanged_buffers(network: nn.Module) -> Iterator[None]:
    """Put buffers back that a block has changed.

    Raises:
        NotFoldable: If it has changed one: a state that the particles would share.
    """
    # What was made in inference mode has no version, and is written there alone.
    before = [
        (b, b.clone(), b._version) for b in network.buffers() if not b.is_inference()
    ]
    changed: list[Tensor] = []

    @torch.no_grad()
    def put_back() -> None:
        for buffer, value, version in before:
            if buffer._version != version:
                buffer.copy_(value)
                changed.append(buffer)

    with undone(put_back):
        yield
    if changed:
        raise NotFoldable("the network writes into its buffers")


def check_batch_norm(batch_norms: Mapping[str, nn.Module]) -> None:
    """Check that no batch norm is in training mode.

    Raises:
        ValueError: If one is: it mixes the particles' data, and keeps statistics.
    """
    for path, module in batch_norms.items():
        if module.training:
            raise ValueError(
                f"{path}: batch norm in training mode mixes the particles. Put it in "
                "evaluation mode, by .eval(), or bind one particle at a time."
            )


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value):
        value = _fields(value)
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        return [x for v in value for x in tensors_in(v)]
    return []
