"""A Gaussian over matrices whose precision is diagonal in a Kronecker eigenbasis."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints


class KroneckerNormal(TorchDistribution):
    r"""Normal over (O, I) matrices with precision diagonal in :math:`U_G \otimes U_A`.

    :math:`W = M + U_G (Z / \sqrt{\Lambda}) U_A^T` with Z standard normal. With
    eigenvalues :math:`\Lambda = \lambda_G \lambda_A^T + \tau` it is the Gaussian of
    precision :math:`G \otimes A + \tau I`. Nothing of size (O I) x (O I) is formed.

    Args:
        loc: M, (..., O, I).
        precision: Eigenvalues :math:`\Lambda > 0`, (..., O, I).
        rows: Orthogonal :math:`U_G`, (..., O, O); None is the identity.
        columns: Orthogonal :math:`U_A`, (..., I, I); None is the identity.
        validate_args: As in ``torch.distributions``.

    >>> KroneckerNormal(torch.zeros(2, 3, 4), torch.ones(3, 4)).sample().shape
    torch.Size([2, 3, 4])
    """

    arg_constraints = {  # noqa: RUF012
        "loc": constraints.independent(constraints.real, 2),
        "precision": constraints.independent(constraints.positive, 2),
    }
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(
        self,
        loc: Tensor,
        precision: Tensor,
        rows: Tensor | None = None,
        columns: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        batch_shape = torch.broadcast_shapes(
            *(x.shape[:-2] for x in (loc, precision, rows, columns) if x is not None)
        )
        event_shape = torch.broadcast_shapes(loc.shape[-2:], precision.shape[-2:])
        self.loc = loc.expand(batch_shape + event_shape)
        self.precision = precision.expand(batch_shape + event_shape)
        self.rows, self.columns = rows, columns
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> KroneckerNormal:
        """The same distribution with a larger batch shape."""
        shape = torch.Size(batch_shape) + self.event_shape
        return KroneckerNormal(
            self.loc.expand(shape),
            self.precision.expand(shape),
            self.rows,
            self.columns,
            validate_args=False,
        )

    @property
    def mean(self) -> Tensor:
        """M, (..., O, I)."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Marginal variances, (..., O, I)."""
        value = 1 / self.precision
        if self.rows is not None:
            value = self.rows.square() @ value
        if self.columns is not None:
            value = value @ self.columns.square().mT
        return value

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws, (*sample_shape, ..., O, I)."""
        shape = self._extended_shape(sample_shape)
        z = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + self.from_basis(z * self.precision.rsqrt())

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, of the batch shape."""
        if self._validate_args:
            self._validate_sample(value)
        z = self.to_basis(value - self.loc)
        log_normalizer = 0.5 * (self.precision / (2 * math.pi)).log()
        return (log_normalizer - 0.5 * self.precision * z.square()).sum((-2, -1))

    def entropy(self) -> Tensor:
        """Differential entropy in nats, of the batch shape."""
        return 0.5 * (2 * math.pi * math.e / self.precision).log().sum((-2, -1))

    def to_basis(self, value: Tensor) -> Tensor:
        """:math:`U_G^T V U_A`, (..., O, I)."""
        if self.rows is not None:
            value = self.rows.mT @ value
        return value if self.columns is None else value @ self.columns

    def from_basis(self, value: Tensor) -> Tensor:
        """:math:`U_G V U_A^T`, (..., O, I)."""
        if self.rows is not None:
            value = self.rows @ value
        return value if self.columns is None else value @ self.columns.mT
