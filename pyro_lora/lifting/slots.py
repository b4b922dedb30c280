"""Slots: layers that compute with each particle's own weights on folded inputs.

Inputs (S B, T, I), particle-major, are S matrices (B T, I), so that all particles'
outputs are one batched product with their weights (S, O, I)::

    (S, B T, I) @ (S, I, O) -> (S, B T, O) -> (S B, T, O)

With one weight set (O, I) it is the layer's own product.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_lora.ground.interrupts import undone

# Where a parameter lives: the module that holds it, and the attribute.
Location = tuple[nn.Module, str]


class NotFoldable(ValueError):
    """Particles can't be folded into the batch of this network."""


@dataclass(frozen=True)
class Fold:
    """How particles are folded into the batch: (S * B, ...), particle-major.

    Attributes:
        num_particles: S.
        rows: Of shape (B, 0): torch.compile would compile anew for every number that it
            reads, but not for every shape.
        repeats: How often a datum may come, in a row: as beams or choices do.
    """

    num_particles: int
    rows: Tensor
    repeats: Container[int] = (1,)

    @property
    def batch_size(self) -> int:
        """B."""
        return self.rows.shape[0]

    @property
    def folded_size(self) -> int:
        """S * B."""
        return self.num_particles * self.batch_size

    def is_folded(self, x: Tensor) -> bool:
        """Whether the first dim of ``x`` holds the particles' batches."""
        return x.ndim > 0 and self.fits(x.shape[0])

    def fits(self, size: int) -> bool:
        """Whether a dim of this size may hold the particles' batches."""
        if self.folded_size == 0:
            return False
        if 1 in self.repeats and size == self.folded_size:
            return True  # the rest can't be traced with symbolic sizes
        repeat, rest = divmod(size, self.folded_size)
        return rest == 0 and repeat in self.repeats

    def check(self, layer: nn.Module, x: Tensor) -> None:
        """Check that the input of a layer is folded.

        Raises:
            NotFoldable: If it isn't.
        """
        if not self.is_folded(x):
            raise NotFoldable(
                f"a lifted {type(layer).__name__} got an input of shape "
                f"{tuple(x.shape)}, which isn't {self.num_particles} particles of a "
                f"batch of {self.batch_size}"
            )


@dataclass(frozen=True)
class BoundLinear:
    """What a :class:`LinearSlot` uses for one call, in place of its own parameters.

    ``weight`` is (O, I) or (S, O, I), ``bias`` is (O,) or (S, O); None means the
    layer's own. ``fold`` is None where the inputs aren't folded.
    """

    weight: Tensor | None
    bias: Tensor | None
    fold: Fold | None


@dataclass(frozen=True)
class BoundModule:
    """What a :class:`ModuleSlot` uses for one call: values (S, ...) by location."""

    values: Mapping[Location, Tensor]
    fold: Fold | None


class Slot(nn.Module):
    """A layer that computes with bound tensors while there are any.

    A layer becomes a slot by assigning its ``__class__`` (as
    ``torch.nn.utils.parametrize`` does), so that parameters, hooks, ``state_dict``
    and every reference that PEFT keeps stay what they were.
    """

    @property
    def bound(self) -> Any:
        """The tensors bound at the moment, None where there are none."""
        return self.__dict__["_bound"]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # By its plain class, since a slot's class is made when it is needed.
        plain = next(c for c in type(self).__mro__ if not issubclass(c, Slot))
        return _new_slot, (plain,), {**self.__getstate__(), "_bound": None}


class LinearSlot(Slot, nn.Linear):
    """An ``nn.Linear`` that runs all particles at once."""

    def forward(self, input: Tensor) -> Tensor:
        """``x W^T + b``; with particle dims, particle s sees its own W_s, b_s.

        Args:
            input: (B, ..., I), or (S * B, ..., I), particle-major, where folded.

        Returns:
            As ``input`` with last dim O.

        Raises:
            RuntimeError: If weights with particle dims are bound, but the inputs
                weren't folded.
            NotFoldable: If the input isn't made of one part for each particle.
        """
        bound = cast("BoundLinear | None", self.bound)
        if bound is None:
            return _linear(input, self.weight, self.bias)
        weight = self.weight if bound.weight is None else bound.weight
        bias = self.bias if bound.bias is None else bound.bias
        # Sites are in float32 where the network is in half precision.
        weight = weight.to(input.dtype)
        bias = None if bias is None else bias.to(input.dtype)
        if weight.ndim == 2 and (bias is None or bias.ndim == 1):
            return _linear(input, weight, bias)
        fold = _fold_of(bound)
        fold.check(self, input)
        x = input.reshape(fold.num_particles, -1, input.shape[-1])  # (S, B T, I)
        out = torch.bmm(x, weight.mT) if weight.ndim == 3 else F.linear(x, weight)
        if bias is not None:
            # Under autocast the product has another type than its inputs.
            out = out + (bias[:, None] if bias.ndim == 2 else bias).to(out.dtype)
        return out.reshape(*input.shape[:-1], out.shape[-1])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # Of states that are cut out of others, such as the last token's, F.linear makes a
    # product for each row, which reads all weights again.
    return F.linear(x.contiguous(), weight, bias)


class ModuleSlot(Slot):
    """Any other layer, run once for each particle with its parameters swapped."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward; with particle dims, one call for each particle.

        Args:
            args: Tensors with first dim S * B are split; others, with first dim 1 or
                none, go to every particle.
            kwargs: As ``args``.

        Returns:
            A tensor, or a tuple of tensors, with first dim S * B.

        Raises:
            RuntimeError: If weights with particle dims are bound, but the inputs
                weren't folded.
            NotFoldable: If an input or output isn't made of one part for each
                particle.
        """
        bound = cast("BoundModule | None", self.bound)
        if bound is None:
            return super().forward(*args, **kwargs)
        fold = _fold_of(bound)
        tensors = [x for x in [*args, *kwargs.values()] if isinstance(x, Tensor)]
        # A table of positions, say, is looked up once for the whole batch.
        shared = isinstance(self, nn.Embedding) and tensors[0].shape[0] == 1
        if not shared:
            fold.check(self, tensors[0])
        outputs = []
        # Nothing is known of how such a layer computes, so that it can't be batched.
        for s in range(fold.num_particles):
            part = [_part(self, x, fold, s) for x in args]
            named = {k: _part(self, x, fold, s) for k, x in kwargs.items()}
            with swapped({at: v[s] for at, v in bound.values.items()}):
                out = super().forward(*part, **named)
            outputs.append(
                out.expand(fold.batch_size, *out.shape[1:]) if shared else out
            )
        return _joined(self, outputs, fold)


def _fold_of(bound: BoundLinear | BoundModule) -> Fold:
    if bound.fold is None:
        raise RuntimeError(
            "Weights with particle dims need folded inputs: call the network that "
            "lora() or lora.bind(weights) returns, not the PEFT model itself."
        )
    return bound.fold


def _part(layer: nn.Module, x: Any, fold: Fold, particle: int) -> Any:
    """What one particle gets of an argument.

    Raises:
        NotFoldable: If it isn't clear how to split it.
    """
    if isinstance(x, Tensor) and x.ndim > 0 and x.shape[0] != 1:
        fold.check(layer, x)
        return x.chunk(fold.num_particles)[particle]  # particle-major
    if isinstance(x, list | tuple):
        if len(x) == fold.folded_size:  # one item for each datum
            first = particle * fold.batch_size
            return x[first : first + fold.batch_size]
        return type(x)(_part(layer, item, fold, particle) for item in x)
    if isinstance(x, Tensor | bool | int | float | str | None):
        return x
    raise NotFoldable(
        f"a lifted {type(layer).__name__} got a {type(x).__name__}, which can't be "
        "split by particle"
    )


def _joined(layer: nn.Module, outputs: list[Any], fold: Fold) -> Any:
    """The outputs of all particles, folded.

    Raises:
        NotFoldable: If one isn't made of tensors with a batch dim.
    """
    first = outputs[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        if first.ndim > 0 and fold.is_folded(joined := torch.cat(outputs)):
            return joined
        raise NotFoldable(
            f"a lifted {type(layer).__name__} returns a tensor of shape "
            f"{tuple(first.shape)}, which isn't a batch of {fold.batch_size}"
        )
    if type(first) is tuple:
        return tuple(
            _joined(layer, list(items), fold) for items in zip(*outputs, strict=True)
        )
    raise NotFoldable(
        f"a lifted {type(layer).__name__} returns a {type(first).__name__}, which "
        "can't be joined over particles"
    )


@contextmanager
def swapped(values: Mapping[Location, Tensor]) -> Iterator[None]:
    """Parameters replaced by tensors while a block runs.

    Args:
        values: Location -> tensor of the parameter's shape.
    """
    before = [(holder, name, holder._parameters[name]) for holder, name in values]

    def put_back() -> None:
        for holder, name, parameter in before:
            holder._parameters[name] = parameter

    with undone(put_back):
        for (holder, name), value in values.items():
            holder._parameters[name] = cast(nn.Parameter, value)
        yield


@functools.cache
def _slot_class(cls: Any) -> type[Slot]:
    if cls is nn.Linear:
        return LinearSlot
    name = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    bases = (ModuleSlot, cls)
    slot = types.new_class(cls.__name__, bases, exec_body=lambda ns: ns.update(name))
    return cast("type[Slot]", slot)


def _new_slot(cls: Any) -> Slot:
    slot = _slot_class(cls)
    return slot.__new__(slot)


def as_slot(layer: nn.Module) -> None:
    """Turn a layer into a slot, in place; a slot stays as it is."""
    if not isinstance(layer, Slot):
        cls: Any = type(layer)
        # First, since a slot reads it; torch.compile guards against a None, not
        # against what isn't there.
        layer.__dict__["_bound"] = None
        layer.__class__ = _slot_class(cls)
    if "_old_forward" in vars(layer):  # what the forward of accelerate's hook calls
        vars(layer)["_old_forward"] = types.MethodType(type(layer).forward, layer)
