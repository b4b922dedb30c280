"""What every Gaussian over weight sets can do."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pyro_lora.ground.autocast import OutsideAutocast
from pyro_lora.ground.checked_tensors import CheckedTensors, check_broadcasts
from pyro_lora.ground.summary import Summarised, extent, weights_facts
from pyro_lora.ground.weights import Weights


class WeightGaussian(OutsideAutocast, Summarised):
    r"""Gaussian over all sites, precision :math:`P = F + \mathrm{diag}(\tau)`.

    F is the Fisher information of the full data set in nats, :math:`\tau` the prior
    precision, site by site.

    Attributes:
        loc: The mode, site -> value.
        prior_precision: Site -> tau, broadcasting over the site.
        observations: Of the fit's data, where they are kept.
        kind: What a file calls such Gaussians; none of a user's own.
    """

    loc: Weights
    prior_precision: Weights
    observations: tuple[Any, ...] = ()
    kind: ClassVar[str] = ""

    @property
    def knows_log_det(self) -> bool:
        """Whether its log determinant takes no decomposition."""
        return False

    @property
    @abstractmethod
    def structure(self) -> str:
        """What F looks like, in a few words."""

    @property
    @abstractmethod
    def origin(self) -> Weights:
        """The weights at which the network is linearised.

        They are the mode, but for a refined posterior.
        """

    @property
    def is_refined(self) -> bool:
        """Whether the mode is another than the weights it is linearised at."""
        return False

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
    def effective_parameters_by_layer(self) -> Weights:
        r"""Each layer's part of :math:`\mathrm{tr}(F P^{-1})`, site -> (L,)."""

    @abstractmethod
    def informed_directions(self, num_directions: int) -> tuple[Weights, Tensor]:
        r"""The directions in which the data count most against the prior.

        Eigenvectors v of :math:`F v = s P v` with the largest s, :math:`v^T P v = 1`:
        along each, a step of 1 is a standard deviation, and they are independent.

        Args:
            num_directions: Q; fewer come where there are fewer weights, or the data
                inform fewer.

        Returns:
            Site -> steps from the mode, (Q, ...), and s, (Q,), float64, largest
            first: the data's share of the precision.
        """

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What a file holds of it besides mean and prior precision, by name.

        Raises:
            TypeError: If files don't hold such ones.
        """
        raise TypeError(
            "Files hold the Gaussians of pyro_lora's structures, found a "
            f"{type(self).__name__}. Keep draws of the posterior instead, by "
            "export_adapters."
        )

    @classmethod
    def restored(
        cls,
        loc: Weights,
        tensors: CheckedTensors,
        observations: tuple[Any, ...],
        in_dtypes: Callable[[Weights], Weights],
    ) -> Self:
        """The Gaussian of a file.

        Args:
            loc: Its mean, site -> value.
            tensors: What :attr:`tensors` gave, and ``prior_precision/SITE``.
            observations: Of the fit's data, where they were kept.
            in_dtypes: Weights of the file -> those of the network's dtypes.

        Raises:
            ValueError: If they make none.
        """
        raise NotImplementedError

    def _facts(self) -> dict[str, str]:
        return {
            **weights_facts(self.loc),
            "structure": self.structure,
            "prior_precision": extent(self.prior_precision.values()),
        }

    def effective_parameters(self) -> Tensor:
        r""":math:`\mathrm{tr}(F P^{-1})`, a scalar between 0 and D."""
        layers = self.effective_parameters_by_layer().values()
        return torch.stack([layer.sum() for layer in layers]).sum()

    def newton_decrement(self, gradient: Mapping[str, Tensor]) -> Tensor:
        """:math:`g^T P^{-1} g`, a scalar: twice what a Newton step would gain, nats.

        Args:
            gradient: Site -> gradient of the log joint at the mode.
        """
        layers = (
            (site, layer.reshape(1, 1, layer.shape[0], -1))
            for site in self.loc
            for layer in gradient[site]
        )
        return self.covariance(layers, [self.prior_precision]).squeeze()

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


def under(name: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by their names in a file, each after another name."""
    return {f"{name}/{key}": x for key, x in values.items()}


def restored_precision(loc: Weights, tensors: CheckedTensors) -> Weights:
    """Prior precisions of a file, each of a shape that broadcasts over its site.

    Args:
        loc: Site -> value.
        tensors: With ``prior_precision/SITE``.

    Raises:
        ValueError: If they aren't positive, or don't broadcast.
    """
    inner = tensors.under("prior_precision/")
    return {
        site: check_broadcasts(
            inner.positive(site), x.shape, f"tensor {inner.prefix}{site}"
        )
        for site, x in loc.items()
    }
