"""What the curvature structures sum over the data: values that add up by ``+``.

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

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class KroneckerFactors:
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

    def __add__(self, other: KroneckerFactors) -> KroneckerFactors:
        return KroneckerFactors(
            self.a + other.a, self.g + other.g, self.count + other.count
        )


@dataclass(frozen=True)
class DiagonalFactors:
    r"""The exact diagonal of one linear layer's Fisher block.

    Attributes:
        diagonal: :math:`\sum_{m,b} (\partial h_{mb} / \partial W)^2` over the Fisher
            terms h, (O, I), nats, full data.
    """

    diagonal: Tensor

    def __add__(self, other: DiagonalFactors) -> DiagonalFactors:
        return DiagonalFactors(self.diagonal + other.diagonal)


@dataclass(frozen=True)
class DenseFactors:
    r"""The Fisher matrix of all layers together.

    Attributes:
        matrix: :math:`\sum_{m,b} j_{mb} j_{mb}^T` with j the gradient of a Fisher term
            in all weights, (D, D), nats, full data.
    """

    matrix: Tensor

    def __add__(self, other: DenseFactors) -> DenseFactors:
        return DenseFactors(self.matrix + other.matrix)


@dataclass(frozen=True)
class RowFactors:
    """The gradients themselves, of one linear layer: they add up to more rows.

    Attributes:
        batches: Of each batch the gradients of its Fisher terms, (M, B, O I) in order.
    """

    batches: tuple[Tensor, ...]

    def __add__(self, other: RowFactors) -> RowFactors:
        return RowFactors(self.batches + other.batches)

    def at(self, places: Tensor) -> RowFactors:
        """One batch's rows at places of its flattened (M, B)."""
        (rows,) = self.batches
        return RowFactors((rows[places],))


@dataclass(frozen=True)
class RowSample:
    """Some of the gradients, drawn at random: those with the smallest keys.

    Attributes:
        values: (m, O I).
        keys: Random numbers, (m,), float64; the same for all layers.
        size: How many are kept, ().
    """

    values: Tensor
    keys: Tensor
    size: Tensor

    def __add__(self, other: RowSample) -> RowSample:
        keys = torch.cat([self.keys, other.keys])
        # In the rows' own order, so that all rows are kept as they came.
        kept = keys.argsort()[: int(self.size)].sort().values
        values = torch.cat([self.values, other.values])
        return RowSample(values[kept], keys[kept], self.size)

    def at(self, places: Tensor) -> RowSample:
        """One batch's rows at places of its flattened (M, B)."""
        return RowSample(self.values[places], self.keys[places], self.size)


@dataclass(frozen=True)
class ObservedFactors:
    """What each batch observed at its rows.

    Attributes:
        batches: One of each.
    """

    batches: tuple[Any, ...]

    def __add__(self, other: ObservedFactors) -> ObservedFactors:
        return ObservedFactors(self.batches + other.batches)


def at_least_float32(x: Tensor) -> Tensor:
    """Sums of many terms need float32 or wider; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
