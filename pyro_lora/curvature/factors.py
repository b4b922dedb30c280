"""What the curvature structures sum over the data: values that add up by ``+``.

Each kind of them says how it adds up over batches and over processes, what of it a
checkpoint holds, and how it's made again of that. Those of your own subclass
:class:`SummedFactors`, or :class:`EigenFactors`, of which the Gaussian comes with them.

A linear layer with weight W (O, I) has at datum b and token t the input a_bt (I,) and,
for the Fisher term m, the output gradient g_mbt (O,). Its Fisher block is the sum over
b and m of j j^T with j = vec(sum_t g_mbt a_bt^T), of size O I x O I. For O = I = 2, one
datum of one token, a = (1, 2) and g = (3, 4):

- :class:`KroneckerFactors`: a a^T = [[1, 2], [2, 4]] and g g^T = [[9, 12], [12, 16]],
  whose Kronecker product is the block;
- :class:`DiagonalFactors`: the block's diagonal, (g a^T)^2 = [[9, 36], [16, 64]];
- :class:`DenseFactors`: the block itself, of the row-major g a^T = (3, 6, 4, 8),
  together with its covariances with all other layers;
- :class:`RowFactors`: j = (3, 6, 4, 8) itself; :class:`RowSample` has some of many.
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import isabstract
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pyro_lora.ground.checked_tensors import (
    DOUBLE,
    FLOAT32,
    CheckedTensors,
    check_definite,
)

WIDE = (torch.float32, torch.float64)
Add = Callable[[Tensor, Tensor], Tensor]


class AnyFactors(ABC):
    """What a pass sums of one layer, or of all: a value that adds up by ``+``.

    Attributes:
        by_tensor: Whether tensors add up one by one, as processes add them; others are
            sent from one to another as they are.
        grows: Whether batches stand side by side in the sum, as rows of a Jacobian do,
            so that a checkpoint writes each of them once.
    """

    by_tensor: ClassVar[bool] = False
    grows: ClassVar[bool] = False

    @abstractmethod
    def plus(self, other: Self, add: Add) -> Self:
        """The sum of both.

        Args:
            other: Of other data.
            add: The sum of two tensors, which layers that share both share.
        """

    def __add__(self, other: Self) -> Self:
        return self.plus(other, operator.add)

    @property
    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds, by name."""

    @classmethod
    @abstractmethod
    def restored(cls, tensors: CheckedTensors, shape: Sequence[int]) -> Self:
        """Made again of :attr:`tensors`, which come from a file.

        Args:
            tensors: Each is taken by what it must be: ``tensors.real("x", (4, 4))``,
                ``tensors.not_negative("diagonal", shape)``.
            shape: Of the weights that they're of: (O, I), (O,) of a bias, (D,) of all.

        Raises:
            ValueError: If they can't be the sums of such weights.
        """


@dataclass(frozen=True)
class SummedFactors(AnyFactors):
    """Tensors that add up one by one; factors of your own are one more subclass.

    A subclass is a frozen dataclass of tensors, with :meth:`restored`. Its structure
    then fits on any number of processes, and resumes from a checkpoint. Layers that
    have the same tensor, such as a product of inputs that they share, share its sum.
    """

    by_tensor: ClassVar[bool] = True

    def plus(self, other: Self, add: Add) -> Self:
        """See the base class."""
        more = other.tensors
        return type(self)(
            **{name: add(x, more[name]) for name, x in vars(self).items()}
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """See the base class."""
        return dict(vars(self))


@dataclass(frozen=True)
class EigenFactors(SummedFactors):
    """Those of a layer whose block is diagonal in a basis of rows and columns.

    Of them :class:`LayerStructure` makes the Gaussian.
    """

    @property
    @abstractmethod
    def matrices(self) -> Mapping[str, Tensor]:
        """Whose eigenvectors are the basis: "columns", (I, I), and "rows", (O, O).

        Sums of outer products, or their sketches; none of them is the identity.
        """

    @abstractmethod
    def eigenvalues(self, spectra: Mapping[str, Tensor], what: str) -> Tensor:
        """Of the block, (O, I), or of the subspace that sketches leave.

        Args:
            spectra: The eigenvalues of each of :attr:`matrices`.
            what: The layer, the start of a message.

        Raises:
            ValueError: If the factors are no sums of squares.
        """


@dataclass(frozen=True)
class KroneckerFactors(EigenFactors):
    r"""Sums for one linear layer whose block is :math:`F \approx G \otimes A / n`.

    Attributes:
        a: Sum of input outer products over the tokens that count, (I, I), or its sketch
            (I, 2 k + 1) of rank k.
        g: Sum of gradient outer products, (O, O), nats, full data; likewise.
        count: n, the number of tokens that count.
    """

    a: Tensor
    g: Tensor
    count: Tensor

    @property
    def matrices(self) -> dict[str, Tensor]:
        """See the base class."""
        return {"columns": self.a, "rows": self.g}

    def eigenvalues(self, spectra: Mapping[str, Tensor], what: str) -> Tensor:
        """See the base class."""
        # n is 0 where no token counted, and then so is A.
        of_inputs = spectra["columns"] / self.count.clamp_min(1)
        return spectra["rows"][:, None] * of_inputs

    @classmethod
    def restored(
        cls, tensors: CheckedTensors, shape: Sequence[int]
    ) -> KroneckerFactors:
        """See the base class."""
        out, width = (*shape, 1)[:2]  # a bias is a matrix of one column
        a, g = _gram(tensors, "a", width), _gram(tensors, "g", out)
        return cls(a, g, tensors.not_negative("count", (), WIDE))


@dataclass(frozen=True)
class DiagonalFactors(EigenFactors):
    r"""The exact diagonal of one linear layer's Fisher block.

    Attributes:
        diagonal: :math:`\sum_{m,b} (\partial h_{mb} / \partial W)^2` over the Fisher
            terms h, (O, I), nats, full data.
    """

    diagonal: Tensor

    @property
    def matrices(self) -> dict[str, Tensor]:
        """See the base class."""
        return {}

    def eigenvalues(self, spectra: Mapping[str, Tensor], what: str) -> Tensor:
        """See the base class.

        Raises:
            ValueError: If they're negative or not finite.
        """
        x = self.diagonal
        if not (x.isfinite() & (x >= 0)).all():
            raise ValueError(
                f"{what}: the diagonal has values from {float(x.min()):.3g} to "
                f"{float(x.max()):.3g}. Sums of squares are finite and not negative: "
                "check the structure."
            )
        return x

    @classmethod
    def restored(cls, tensors: CheckedTensors, shape: Sequence[int]) -> DiagonalFactors:
        """See the base class."""
        return cls(tensors.not_negative("diagonal", (*shape, 1)[:2], WIDE))


@dataclass(frozen=True)
class DenseFactors(SummedFactors):
    r"""The Fisher matrix of one layer, or of all layers together.

    Attributes:
        matrix: :math:`\sum_{m,b} j_{mb} j_{mb}^T` with j the gradient of a Fisher term
            in these weights, (D, D), nats, full data.
    """

    matrix: Tensor

    @classmethod
    def restored(cls, tensors: CheckedTensors, shape: Sequence[int]) -> DenseFactors:
        """See the base class."""
        return cls(_gram(tensors, "matrix", math.prod(shape)))


@dataclass(frozen=True)
class GrowingFactors(AnyFactors):
    """What batches have one by one: they add up to more batches.

    Attributes:
        batches: One of each.
    """

    batches: tuple[Any, ...]
    grows: ClassVar[bool] = True

    def plus(self, other: Self, add: Add) -> Self:
        """See the base class."""
        return type(self)(self.batches + other.batches)


@dataclass(frozen=True)
class RowFactors(GrowingFactors):
    """The gradients themselves, of one linear layer: they add up to more rows.

    Attributes:
        batches: Of each batch the gradients of its Fisher terms, (M B, O I), those of
            the first term first.
    """

    @property
    def tensors(self) -> dict[str, Tensor]:
        """See the base class."""
        return {str(n): x for n, x in enumerate(self.batches)}

    @classmethod
    def restored(cls, tensors: CheckedTensors, shape: Sequence[int]) -> RowFactors:
        """See the base class; they may be rows in a span, of any width.

        Raises:
            ValueError: If they're no rows.
        """
        batches: list[Tensor] = []
        while (name := str(len(batches))) in tensors:
            batches.append(tensors.real(name, None, WIDE))
            if batches[-1].ndim != 2:
                raise ValueError(f"tensor {tensors.prefix}{name} isn't rows")
        return cls(tuple(batches))

    def at(self, places: Tensor) -> RowFactors:
        """One batch's rows at places of its flattened (M, B)."""
        (rows,) = self.batches
        return RowFactors((rows[places],))

    def like(self, number: int) -> RowFactors:
        """What so many batches like this one have in all, but for the values."""
        (rows,) = self.batches
        return RowFactors((rows.new_empty(number * len(rows), rows.shape[1]),))


@dataclass(frozen=True)
class RowSample(AnyFactors):
    """Some of the gradients, drawn at random: those with the smallest keys.

    Attributes:
        values: (m, O I).
        keys: Random numbers, (m,), float64; the same for all layers.
        size: How many are kept, ().
    """

    values: Tensor
    keys: Tensor
    size: Tensor

    def plus(self, other: RowSample, add: Add) -> RowSample:
        """See the base class."""
        keys = torch.cat([self.keys, other.keys])
        # In the rows' own order, so that all rows are kept as they came.
        kept = keys.argsort()[: int(self.size)].sort().values
        values = torch.cat([self.values, other.values])
        return RowSample(values[kept], keys[kept], self.size)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """See the base class."""
        return dict(vars(self))

    @classmethod
    def restored(cls, tensors: CheckedTensors, shape: Sequence[int]) -> RowSample:
        """See the base class.

        Raises:
            ValueError: If they're no rows of such weights.
        """
        keys = tensors.not_negative("keys", None, DOUBLE)
        if keys.ndim != 1:
            raise ValueError(f"tensor {tensors.prefix}keys has shape {keys.shape}")
        values = tensors.real("values", (len(keys), math.prod(shape)), WIDE)
        return cls(values, keys, tensors.any("size"))

    def at(self, places: Tensor) -> RowSample:
        """One batch's rows at places of its flattened (M, B)."""
        return RowSample(self.values[places], self.keys[places], self.size)

    def like(self, number: int) -> RowSample:
        """See :meth:`RowFactors.like`."""
        size = min(number * len(self.keys), int(self.size))
        values = self.values.new_empty(size, self.values.shape[1])
        return RowSample(values, self.keys.new_empty(size), self.size)


def kind_named(name: str) -> type[AnyFactors] | None:
    """The kind of factors that :func:`name_of` calls so, None if there is none."""
    kinds: list[Any] = [AnyFactors]
    for kind in kinds:  # which grows meanwhile
        kinds += kind.__subclasses__()
    # What is defined again, as in a notebook, counts as it is now.
    return {name_of(kind): kind for kind in kinds if not isabstract(kind)}.get(name)


def name_of(kind: type[AnyFactors]) -> str:
    """What a file calls a kind of factors."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _gram(tensors: CheckedTensors, name: str, width: int) -> Tensor:
    """A Gram matrix (n, n), or the sketch (n, 2 k + 1) of one.

    Raises:
        ValueError: If it's neither.
    """
    x = tensors.real(name, None, WIDE)
    if x.shape == (width, width):
        check_definite(x, f"tensor {tensors.prefix}{name}", FLOAT32)
        # As the eigenvalues' own check, which doesn't know of the file.
        if not (
            (x - x.mT).abs() <= torch.finfo(x.dtype).eps ** 0.5 * x.abs().max()
        ).all():
            raise ValueError(f"tensor {tensors.prefix}{name} isn't symmetric")
        return x
    # An odd number of columns, fewer than rows: see nystrom.
    sketch = x.ndim == 2 and x.shape[0] == width and x.shape[1] < width
    if not sketch or x.shape[1] % 2 == 0:
        raise ValueError(
            f"tensor {tensors.prefix}{name} has shape {tuple(x.shape)}, expected "
            f"({width}, {width}) or ({width}, 2 k + 1)"
        )
    return x
