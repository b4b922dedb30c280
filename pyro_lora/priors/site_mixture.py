"""A mixture of any distributions over one site."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor


class SiteMixture(TorchDistribution):
    r"""Mixture :math:`\sum_k \pi_k p_k(w)`, the components of any type.

    Args:
        log_weights: :math:`\log \pi_k` up to a common constant, each of a shape that
            broadcasts with the components' batch shapes.
        components: :math:`p_k`, over one event shape and support.

    >>> from torch.distributions import Normal
    >>> halves = [torch.zeros(()), torch.zeros(())]
    >>> SiteMixture(halves, [Normal(-1.0, 0.1), Normal(1.0, 0.1)]).sample().shape
    torch.Size([])
    """

    arg_constraints = {}  # noqa: RUF012

    def __init__(
        self, log_weights: Sequence[Tensor], components: Sequence[TorchDistribution]
    ) -> None:
        self.components = tuple(components)
        batch_shape = torch.broadcast_shapes(
            *(fn.batch_shape for fn in components), *(x.shape for x in log_weights)
        )
        self.log_weights = torch.stack(
            [x.expand(batch_shape) for x in log_weights]
        ).log_softmax(0)  # (K, *batch_shape)
        super().__init__(batch_shape, components[0].event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """That of the components."""
        return self.components[0].support

    def expand(self, batch_shape: Any, _instance: Any = None) -> SiteMixture:
        """The same distribution with a larger batch shape."""
        shape = torch.Size(batch_shape)
        return SiteMixture(
            [x.expand(shape) for x in self.log_weights],
            [fn.expand(shape) for fn in self.components],
        )

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws, (*sample_shape, *batch_shape, *event_shape)."""
        shape = torch.Size(sample_shape)
        with torch.no_grad():
            pi = self.log_weights.exp().movedim(0, -1)  # (*batch_shape, K)
            drawn = torch.distributions.Categorical(probs=pi).sample(shape)
            drawn = drawn[(..., *[None] * len(self.event_shape))]
            value: Tensor | None = None
            for k, fn in enumerate(self.components):
                draw = fn.expand(self.batch_shape).sample(shape)
                value = draw if value is None else torch.where(drawn == k, draw, value)
        assert value is not None, "a mixture has components"
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, of the batch shape."""
        log_probs = [
            log_pi + fn.log_prob(value)
            for log_pi, fn in zip(self.log_weights, self.components, strict=True)
        ]
        return torch.stack(log_probs).logsumexp(0)
