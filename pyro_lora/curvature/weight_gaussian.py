"""What every Gaussian over weight sets can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from torch import Tensor

Weights = dict[str, Tensor]


class WeightGaussian(ABC):
    r"""Gaussian over all sites, precision :math:`P = F + \mathrm{diag}(\tau)`.

    F is the Fisher information of the full data set in nats, :math:`\tau` the prior
    precision, site by site.

    Attributes:
        loc: The mode, site -> value.
        prior_precision: Site -> tau, broadcasting over the site.
    """

    loc: Weights
    prior_precision: Weights

    @abstractmethod
    def with_prior_precision(self, prior_precision: Mapping[str, Tensor]) -> Self:
        """The same Fisher information with another prior precision."""

    @abstractmethod
    def sample(self, num_samples: int) -> Weights:
        """Draws, each site with a leading (S,)."""

    @abstractmethod
    def log_prob(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Log density in nats, (...) the leading dims of ``weights``."""

    @abstractmethod
    def variance(self) -> Weights:
        """Marginal variances, each of its site's shape."""

    @abstractmethod
    def log_det(self, prior_precision: Mapping[str, Tensor]) -> Tensor:
        """Log det P at a prior precision, scalar, float64, differentiable."""

    @abstractmethod
    def effective_parameters(self) -> Tensor:
        r""":math:`\mathrm{tr}(F P^{-1})`, a scalar between 0 and D."""

    @abstractmethod
    def covariance(
        self,
        jacobians: Iterable[tuple[str, Tensor]],
        prior_precisions: Sequence[Mapping[str, Tensor]],
    ) -> Tensor:
        r""":math:`J P^{-1} J^T` for each datum and each of several priors.

        Args:
            jacobians: (site, (B, M, O, I)) for every layer, sites and layers in order.
            prior_precisions: The priors, Q of them.

        Returns:
            (Q, B, M, M).
        """

    @abstractmethod
    def pyro_sample(self, infer: Mapping[str, Any]) -> Weights:
        """The guide's sample statements.

        Args:
            infer: Site -> the ``infer`` dict of its sample statement.

        Returns:
            Site -> the value sampled.
        """
