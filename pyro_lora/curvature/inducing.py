r"""The Jacobian of more rows than fit into an n x n matrix: Nyström's approximation.

Of m rows drawn at random, :math:`J_m`, a first pass makes a basis U of their span that
is orthonormal under the prior, :math:`U T^{-1} U^T = I`; a second one projects all rows
on it, :math:`\Phi = J T^{-1} U^T`, (n, k). The network is taken to be linear with the
Jacobian :math:`\Phi U`, for which everything is exact again, in k dimensions, and

.. math:: \Phi \Phi^T = K_{nm} K_{mm}^{-1} K_{mn}, \qquad K = J T^{-1} J^T,

is Nyström's approximation of K, which with all rows drawn is K itself. Outside of the
span the posterior is the prior, which no datum narrows there. With J = (1, 0), (0, 1)
and (3, 3), T = I and the first and third row drawn, U is I up to a rotation and nothing
is lost; with the third alone U = (1, 1) / sqrt 2, and of the first row half is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_lora.curvature.dual_gaussian import (
    DualGaussian,
    InSubspace,
    Rows,
    in_order,
    of_layer,
    roots_at_fit,
)
from pyro_lora.curvature.factors import RowFactors, RowSample
from pyro_lora.curvature.observations import Observations, joined
from pyro_lora.ground.weights import Weights


@dataclass(frozen=True, eq=False)
class Span:
    """The span of some rows, and how others are projected on it.

    Attributes:
        rows: U, k of them.
        prior_precision: Site -> tau, as the rows take it.
    """

    rows: Rows
    prior_precision: Weights

    def project(self, layers: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
        r"""Coordinates of rows, and their squared lengths, under the prior.

        Args:
            layers: Rows (..., O I) of every layer in order.

        Returns:
            :math:`J T^{-1} U^T`, (..., k), and the diagonal of :math:`J T^{-1} J^T`,
            (...), float64.
        """
        inside: Tensor | float = 0.0
        square: Tensor | float = 0.0
        for x, (site, layer, basis) in zip(layers, self.rows.matrices(), strict=True):
            wide = x.double()
            scaled = wide / of_layer(self.prior_precision, site, layer)
            inside = inside + scaled @ basis.double().mT
            square = square + (scaled * wide).sum(-1)
        assert isinstance(inside, Tensor)
        assert isinstance(square, Tensor)
        return inside, square


def span_of(
    loc: Weights, prior_precision: Weights, factors: Mapping[int, RowSample]
) -> Span:
    """The span of the rows drawn, at the weights at which they were taken.

    Args:
        loc: These weights, site -> (L, ...).
        prior_precision: Site -> tau.
        factors: Rows by place among the layers.
    """
    first = factors[0]
    drawn = first.keys.argsort()[: int(first.size)]
    layers = iter(range(len(factors)))
    values = {
        site: torch.stack([factors[next(layers)].values[drawn] for _ in x])
        for site, x in loc.items()
    }
    sample = Rows(loc, values)
    tau = sample.by_matrix(prior_precision)
    eigenvalues, vectors = torch.linalg.eigh(sample.kernel(tau))
    # Rows that say what others say are no further direction; but one is kept at least,
    # also where the network has no gradient.
    least = len(drawn) * torch.finfo(torch.float64).eps * eigenvalues[-1:]
    number = int((eigenvalues[:-1] <= least).sum())
    weights = (vectors * eigenvalues.clamp_min(least + 1e-300).rsqrt())[:, number:]
    basis = {
        site: torch.stack([(weights.mT @ x.double()).to(x) for x in matrices])
        for site, matrices in values.items()
    }
    return Span(Rows(loc, basis), tau)


def projected_gaussian(
    span: Span,
    factors: Mapping[int, RowFactors],
    observed: Sequence[tuple[Observations, ...]],
) -> DualGaussian:
    """The Gaussian of rows that are projected on a span.

    Args:
        span: The span.
        factors: Coordinates (n, k), and squared lengths (n, 1).
        observed: What each batch observed; empty where rows are Fisher terms.
    """
    observations, places = joined(observed)
    matrix, square = (in_order(factors[i], places) for i in (0, 1))
    outside = (square[:, 0] - matrix.square().sum(1)).clamp_min(0)
    coordinates = InSubspace(matrix, outside)
    return DualGaussian(
        span.rows.origin,
        span.prior_precision,
        span.rows,
        coordinates.roots(roots_at_fit(observations, matrix)),
        observations,
        coordinates=coordinates,
    )
