"""A posterior over dependent sites as one distribution over vectors.

A guide whose sites depend on one another samples the vector of all of them, an
auxiliary variable, and the sites as Deltas of it: sites a of shape (2,) and b of shape
() come from one vector (3,), whose density is that of the posterior, while each Delta's
is 1. A Categorical over components or particles, and sites given its value, would make
the guide's log density that of one component, not of the mixture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_lora.ground.weights import Weights
from pyro_lora.lifting.lifted_network import LiftedNetwork


def flatten_weights(
    weights: Mapping[str, Tensor], like: Mapping[str, Tensor]
) -> Tensor:
    """Weight sets as vectors: sites in the order of ``like``, each row-major.

    Args:
        weights: Site -> value with any leading dims.
        like: Site -> one value without leading dims.

    Returns:
        (..., D).
    """
    return torch.cat(
        [
            weights[site].reshape(
                *weights[site].shape[: weights[site].ndim - x.ndim], x.numel()
            )
            for site, x in like.items()
        ],
        -1,
    )


def unflatten_weights(flat: Tensor, like: Mapping[str, Tensor]) -> Weights:
    """The inverse of :func:`flatten_weights`.

    Args:
        flat: (..., D).
        like: Site -> one value without leading dims.

    Returns:
        Site -> (..., *event shape).
    """
    by_site = flat.split([x.numel() for x in like.values()], -1)
    return {
        site: part.reshape(flat.shape[:-1] + x.shape)
        for (site, x), part in zip(like.items(), by_site, strict=True)
    }


class WeightDistribution(Protocol):
    """What draws weight sets and knows their density."""

    def sample(self, num_samples: int) -> Weights:
        """Draws with a leading (S,)."""
        ...

    def log_prob(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Log density in nats, (S,)."""
        ...


class JointDistribution(TorchDistribution):
    """Vectors (D,) whose parts are the sites of a weight distribution.

    Args:
        weights: What draws the weight sets.
        like: Site -> one value of the site's shape.
        batch_shape: Number of independent draws.
    """

    arg_constraints = {}  # noqa: RUF012
    support = constraints.real_vector

    def __init__(
        self,
        weights: WeightDistribution,
        like: Weights,
        batch_shape: torch.Size = torch.Size(),  # noqa: B008
    ) -> None:
        self._weights, self._like = weights, like
        size = sum(x.numel() for x in like.values())
        super().__init__(batch_shape, torch.Size([size]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> JointDistribution:
        """The same distribution with a larger batch shape."""
        return JointDistribution(self._weights, self._like, torch.Size(batch_shape))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws, (*sample_shape, *batch_shape, D)."""
        shape = self._extended_shape(sample_shape)
        draws = self._weights.sample(shape[:-1].numel())  # sample and batch dims in one
        return flatten_weights(draws, self._like).reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, of the batch shape."""
        flat = value.reshape(-1, value.shape[-1])
        log_prob = self._weights.log_prob(unflatten_weights(flat, self._like))
        return log_prob.reshape(value.shape[:-1])


def sample_jointly(
    weights: WeightDistribution, like: Weights, networks: tuple[LiftedNetwork, ...]
) -> Weights:
    """Guide statements: one auxiliary joint variable, the sites Deltas of it.

    Args:
        weights: What draws the weight sets.
        like: Site -> one value of the site's shape.
        networks: The lifted networks, named in the ``infer`` dict of their sites.

    Returns:
        Site -> the value sampled.
    """
    return sample_parts(JointDistribution(weights, like), like, infer_of(networks))


def sample_parts(fn: Any, like: Weights, infer: Mapping[str, Any]) -> Weights:
    """Likewise of a distribution over vectors.

    Args:
        fn: Over vectors (D,), whose parts are the sites, in order.
        like: Site -> one value of the site's shape.
        infer: Site -> the ``infer`` dict of its sample statement.

    Returns:
        Site -> the value sampled.
    """
    flat = pyro.sample("lora_joint", fn, infer={"is_auxiliary": True})
    return _deltas(unflatten_weights(flat, like), like, infer)


def infer_of(networks: tuple[LiftedNetwork, ...]) -> dict[str, Any]:
    """Lifted site -> its ``infer`` dict, in which engines find the network."""
    return {site: {"lora": (lora,)} for lora in networks for site in lora.sites}


def sample_deltas(
    weights: Weights, like: Weights, networks: tuple[LiftedNetwork, ...]
) -> Weights:
    """Guide statements: sites that have these values.

    Args:
        weights: Site -> value, leading dims allowed.
        like: Site -> one value of the site's shape.
        networks: The lifted networks, named in the ``infer`` dict of their sites.

    Returns:
        Site -> the value.
    """
    return _deltas(weights, like, infer_of(networks))


def _deltas(weights: Weights, like: Weights, infer: Mapping[str, Any]) -> Weights:
    return {
        site: pyro.sample(
            site,
            dist.Delta(value, event_dim=like[site].ndim),
            infer=infer.get(site, {}),
        )
        for site, value in weights.items()
    }
