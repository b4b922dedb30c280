r"""A Gaussian over matrices whose precision is diagonal in a Kronecker eigenbasis.

With row-major vec, :math:`(U_G \otimes U_A) \mathrm{vec}(Z) = \mathrm{vec}(U_G Z
U_A^T)`: what would be a product with an (O I, O I) matrix is two products with small
ones. For :math:`U_G` the swap of two rows and :math:`U_A = I`, Z = [[1, 2], [3, 4]]
becomes [[3, 4], [1, 2]].
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_lora.ground.autocast import OutsideAutocast


class KroneckerNormal(OutsideAutocast, TorchDistribution):
    r"""Normal over (O, I) matrices with precision diagonal in :math:`U_G \otimes U_A`.

    :math:`W = M + U_G (Z / \sqrt{\Lambda}) U_A^T` with Z standard normal. With
    eigenvalues :math:`\Lambda = \lambda_G \lambda_A^T + \tau` it is the Gaussian of
    precision :math:`G \otimes A + \tau I`. Nothing of size (O I) x (O I) is formed.

    Bases with fewer columns than rows leave out a subspace; there the precision is
    ``outside``, the same in all directions, and :math:`W = M + (Z - P Z) /
    \sqrt{\tau} + U_G (U_G^T Z U_A / \sqrt{\Lambda}) U_A^T` with the projection
    :math:`P Z = U_G U_G^T Z U_A U_A^T`.

    Args:
        loc: M, (..., O, I).
        precision: Eigenvalues :math:`\Lambda > 0`, (..., O, I), or (..., j, k).
        rows: Orthonormal :math:`U_G`, (..., O, O) or (..., O, j); None is the identity.
        columns: Orthonormal :math:`U_A`, (..., I, I) or (..., I, k); None is the
            identity.
        outside: :math:`\tau`, (...), with j < O or k < I only.
        validate_args: As in ``torch.distributions``.

    >>> KroneckerNormal(torch.zeros(2, 3, 4), torch.ones(3, 4)).sample().shape
    torch.Size([2, 3, 4])
    """

    arg_constraints = {  # noqa: RUF012
        "loc": constraints.independent(constraints.real, 2),
        "precision": constraints.independent(constraints.positive, 2),
        "outside": constraints.positive,
    }
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(
        self,
        loc: Tensor,
        precision: Tensor,
        rows: Tensor | None = None,
        columns: Tensor | None = None,
        outside: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        batch_shape = torch.broadcast_shapes(
            *(x.shape[:-2] for x in (loc, precision, rows, columns) if x is not None),
            () if outside is None else outside.shape,
        )
        event_shape = loc.shape[-2:]
        if outside is None:
            event_shape = torch.broadcast_shapes(event_shape, precision.shape[-2:])
            inner_shape = event_shape
        else:
            inner_shape = precision.shape[-2:]
        self.outside = (loc.new_ones(()) if outside is None else outside).expand(
            batch_shape
        )
        self.loc = loc.expand(batch_shape + event_shape)
        self.precision = precision.expand(batch_shape + inner_shape)
        self.rows, self.columns = rows, columns
        self._thin = outside is not None
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> KroneckerNormal:
        """The same distribution with a larger batch shape."""
        shape = torch.Size(batch_shape) + self.event_shape
        return KroneckerNormal(
            self.loc.expand(shape),
            self.precision.expand(shape[:-2] + self.precision.shape[-2:]),
            self.rows,
            self.columns,
            self.outside.expand(shape[:-2]) if self._thin else None,
            validate_args=False,
        )

    @property
    def mean(self) -> Tensor:
        """M, (..., O, I)."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Marginal variances, (..., O, I)."""
        # diag(U L^-1 U^T): entry (o, i) is sum_jk U_G[o, j]^2 U_A[i, k]^2 / L[j, k].
        value = self._from_squares(1 / self.precision)
        if not self._thin:
            return value
        # The projection's diagonal, below 1 but for rounding.
        inside = self._from_squares(torch.ones_like(self.precision))
        return value + (1 - inside).clamp_min(0) / self.outside[..., None, None]

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws, (*sample_shape, ..., O, I)."""
        shape = self._extended_shape(sample_shape)
        z = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        if not self._thin:
            return self.loc + self.from_basis(z * self.precision.rsqrt())
        # P z and z - P z are independent, so one z serves both parts.
        inside = self.to_basis(z)
        rest = z - self.from_basis(inside)
        scaled = self.from_basis(inside * self.precision.rsqrt())
        return self.loc + rest * self.outside.rsqrt()[..., None, None] + scaled

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, of the batch shape."""
        if self._validate_args:
            self._validate_sample(value)
        z = self.to_basis(value - self.loc)
        log_normalizer = 0.5 * (self.precision / (2 * math.pi)).log()
        result = (log_normalizer - 0.5 * self.precision * z.square()).sum((-2, -1))
        if not self._thin:
            return result
        # Not |w|^2 - |z|^2, which cancels where little lies outside.
        rest = (value - self.loc - self.from_basis(z)).square().sum((-2, -1))
        log_normalizer = 0.5 * self._num_outside * (self.outside / (2 * math.pi)).log()
        return result + log_normalizer - 0.5 * self.outside * rest

    def entropy(self) -> Tensor:
        """Differential entropy in nats, of the batch shape."""
        inside = 0.5 * (2 * math.pi * math.e / self.precision).log().sum((-2, -1))
        if not self._thin:
            return inside
        each = 0.5 * (2 * math.pi * math.e / self.outside).log()
        return inside + self._num_outside * each

    @property
    def _num_outside(self) -> int:
        return self.event_shape.numel() - self.precision.shape[-2:].numel()

    def _from_squares(self, value: Tensor) -> Tensor:
        if self.rows is not None:
            value = self.rows.square() @ value
        return value if self.columns is None else value @ self.columns.square().mT

    def to_basis(self, value: Tensor) -> Tensor:
        """:math:`U_G^T V U_A`, (..., O, I), or (..., j, k)."""
        if self.rows is not None:
            value = left_product(self.rows.to(value).mT, value)
        return value if self.columns is None else right_product(value, self.columns)

    def from_basis(self, value: Tensor) -> Tensor:
        """:math:`U_G V U_A^T`, (..., O, I)."""
        if self.rows is not None:
            value = left_product(self.rows.to(value), value)
        if self.columns is None:
            return value
        return right_product(value, self.columns.mT)


def right_product(values: Tensor, matrix: Tensor) -> Tensor:
    """``values @ matrix``, likewise: see :func:`left_product`."""
    return left_product(matrix.to(values).mT, values.mT).mT.contiguous()


def left_product(matrix: Tensor, values: Tensor) -> Tensor:
    """``matrix @ values``, reading a large matrix once for many values.

    A product with a stack of thin values would read it anew for each of them; it's one
    product with all of them side by side.

    Args:
        matrix: (..., P, O).
        values: (*S, ..., O, I).

    Returns:
        (*S, ..., P, I).
    """
    lead = values.shape[: values.ndim - matrix.ndim]
    if not lead or values.shape[len(lead) : -2] != matrix.shape[:-2]:
        return matrix @ values
    stack = values.flatten(0, len(lead) - 1)  # (S, ..., O, I)
    product = matrix @ stack.movedim(0, -2).flatten(-2)  # (..., P, S I)
    apart = product.reshape(*product.shape[:-1], len(stack), values.shape[-1])
    stack = apart.movedim(-2, 0)
    return stack.reshape(*lead, *stack.shape[1:])
