"""The likelihood's site at draws through the linearised network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch import distributions as td

from pyro_lora.curvature.linearize import linearized_values
from pyro_lora.export.chains import Some
from pyro_lora.ground.weights import Weights
from pyro_lora.likelihood.model_trace import Batch, Model, evaluating, trace_at
from pyro_lora.posteriors.laplace_posterior import LaplacePosterior
from pyro_lora.posteriors.mixture_posterior import MixturePosterior


@singledispatch
def at_values(fn: object, values: Tensor) -> Any:
    """A likelihood with other logits, or locations.

    Args:
        fn: The likelihood's distribution, of batch shape (B,).
        values: (S, B, C), as :func:`~pyro_lora.curvature.linearize.linearized_values`.

    Raises:
        TypeError: If its type isn't one of those that can be linearised.
    """
    raise TypeError(type(fn).__name__)


@at_values.register
def _categorical(fn: td.Categorical, values: Tensor) -> Any:
    return type(fn)(logits=values)


@at_values.register
def _ordered_logistic(fn: dist.OrderedLogistic, values: Tensor) -> Any:
    return type(fn)(values[..., 0], fn.cutpoints.to(values))


@at_values.register
def _bernoulli(fn: td.Bernoulli, values: Tensor) -> Any:
    return type(fn)(logits=values[..., 1] - values[..., 0])


@at_values.register
def _normal(fn: td.Normal, values: Tensor) -> Any:
    # One output a datum; several come through the event below.
    loc = values if fn.scale.ndim == 2 else values[..., 0]
    return type(fn)(loc, fn.scale.to(loc))


@at_values.register
def _masked(fn: MaskedDistribution, values: Tensor) -> Any:
    return at_values(fn.base_dist, values).mask(fn._mask)


@at_values.register(td.Independent)
def _independent(fn: td.Independent[Any], values: Tensor) -> Any:
    if not isinstance(fn.base_dist, td.Normal):
        raise TypeError(type(fn).__name__)  # several classes a datum: tokens
    return at_values(fn.base_dist, values).to_event(fn.reinterpreted_batch_ndims)


def has_linear_predictor(fn: Any) -> bool:
    """Whether a likelihood is Categorical, Bernoulli or Normal, one outcome a datum.

    Args:
        fn: Its distribution, of batch shape (B,).
    """
    while isinstance(fn, MaskedDistribution):
        fn = fn.base_dist
    if isinstance(fn, td.Independent):
        return isinstance(fn.base_dist, td.Normal) and len(fn.event_shape) == 1
    return isinstance(fn, td.Categorical | td.Bernoulli | td.Normal)


@dataclass(frozen=True, eq=False)
class LinearizedAtDraws:
    """A model at S draws of a Gaussian posterior, the network linearised at its mode.

    Attributes:
        model: The Pyro model.
        posterior: A Laplace posterior, or a mixture of them.
        draws: The draws.
        obs_site: The likelihood's site.
    """

    model: Model
    posterior: LaplacePosterior | MixturePosterior
    draws: Some
    obs_site: str

    @property
    def num_draws(self) -> int:
        """S."""
        return next(iter(self.draws.weights.values())).shape[0]

    def traces(self, batch: Batch) -> Iterator[Any]:
        """One trace, at the mode but for the likelihood's distribution.

        Args:
            batch: The model's keyword arguments.

        Yields:
            A trace in which that has batch shape (S, B).
        """
        values: Tensor | None = None
        for gaussian, index in self._parts():
            with evaluating(gaussian.loras):
                trace = trace_at(self.model, gaussian.mode(), batch)
                found = linearized_values(
                    poutine.condition(self.model, gaussian.fixed),
                    gaussian.gaussian,
                    gaussian.loras,
                    batch,
                    self.obs_site,
                    _at(self.draws.weights, index),
                )
            if values is None:
                values = found.new_empty(self.num_draws, *found.shape[1:])
            values[index] = found
        assert values is not None
        site = trace.nodes[self.obs_site]
        trace.nodes[self.obs_site] = {**site, "fn": at_values(site["fn"], values)}
        yield trace

    def _parts(self) -> list[tuple[LaplacePosterior, Tensor]]:
        """Each Gaussian with the indices of its draws."""
        if isinstance(self.posterior, LaplacePosterior):
            return [(self.posterior, torch.arange(self.num_draws))]
        assert self.draws.component is not None
        parts = enumerate(self.posterior.components)
        indices = [
            (part, (self.draws.component == k).nonzero()[:, 0]) for k, part in parts
        ]
        return [
            (part, index)
            for part, index in indices
            if len(index) and isinstance(part, LaplacePosterior)
        ]


def _at(weights: Weights, index: Tensor) -> Weights:
    return {site: value[index.to(value.device)] for site, value in weights.items()}
