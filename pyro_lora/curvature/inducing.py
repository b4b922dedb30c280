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

One more row is :math:`T (c - \hat w)`, so that the way from the weights to the prior's
mean c is in the span, and :math:`\Phi U (c - \hat w)` is :math:`J (c - \hat w)`
exactly: what the network is at c, from where a mode under the prior is looked for.
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
from pyro_lora.curvature.prior_moments import PriorAtMode
from pyro_lora.ground.weights import Weights

_TINY = 1e-300  # of a network without gradients


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


def span_of(loc: Weights, prior: PriorAtMode, factors: Mapping[int, RowSample]) -> Span:
    """The span of the rows drawn, and of the way to the prior's mean.

    Args:
        loc: The weights at which the rows were taken, site -> (L, ...).
        prior: At these weights.
        factors: Rows by place among the layers.
    """
    first = factors[0]
    drawn = first.keys.argsort()[: int(first.size)]
    layers = iter(range(len(factors)))
    values = {
        site: torch.stack([factors[next(layers)].values[drawn] for _ in x])
        for site, x in loc.items()
    }
    to_mean = {s: prior.precision[s] * (prior.mean[s] - x) for s, x in loc.items()}
    values = {
        site: torch.cat([x, to_mean[site].reshape(len(x), 1, -1).to(x)], 1)
        for site, x in values.items()
    }
    sample = Rows(loc, values)
    tau = sample.by_matrix(prior.precision)
    kernel = sample.kernel(tau)
    # As long as the others are on average: how far the mean is has no say in what
    # counts as a direction.
    length = torch.ones_like(kernel[0])
    if len(drawn) and bool(kernel[-1, -1] > 0):
        length[-1] = (kernel.diagonal()[:-1].mean() / kernel[-1, -1]).sqrt()
    eigenvalues, vectors = torch.linalg.eigh(length[:, None] * kernel * length)
    # Rows that say what others say are no further direction; but one is kept at least,
    # also where the network has no gradient.
    least = len(kernel) * torch.finfo(torch.float64).eps * eigenvalues[-1:]
    number = int((eigenvalues[:-1] <= least).sum())
    weights = (vectors * eigenvalues.clamp_min(least + _TINY).rsqrt())[:, number:]
    weights = length[:, None] * weights
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
    outside = square[:, 0] - matrix.square().sum(1)
    # Below the digits of U it is rounding, which predictions would take for variance.
    basis = next(iter(span.rows.values.values()))
    digits = len(span.rows) * torch.finfo(basis.dtype).eps
    outside = outside.where(outside > digits * square[:, 0], 0.0)
    coordinates = InSubspace(matrix, outside)
    return DualGaussian(
        span.rows.origin,
        span.prior_precision,
        span.rows,
        coordinates.roots(roots_at_fit(observations, matrix)),
        observations,
        coordinates=coordinates,
    )
