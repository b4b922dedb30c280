"""The likelihood's site at draws through the linearised network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_lora.curvature.linearize import contrasts, linearized_values
from pyro_lora.export.chains import Draws
from pyro_lora.ground.weights import Weights
from pyro_lora.likelihood import likelihoods
from pyro_lora.likelihood.batch import Batch
from pyro_lora.likelihood.model_trace import Model, evaluating, trace_at
from pyro_lora.likelihood.outcomes import around, single_outcomes
from pyro_lora.posteriors.laplace_posterior import LaplacePosterior


def at_values(fn: Any, values: Tensor) -> Any:
    """A likelihood with other logits, or whatever its predictor is.

    Args:
        fn: The likelihood's distribution, of batch shape (B,).
        values: (S, B, C), as :func:`~pyro_lora.curvature.linearize.linearized_values`.
    """

    def single(inside: Any) -> Any:
        likelihood = likelihoods.of(inside)
        basis = contrasts(likelihood)[1]
        if len(inside.batch_shape) == 2:  # a predictor for each of several outputs
            return likelihood.at(values[..., None])
        size = likelihood.predictor.shape[-1]
        if size == values.shape[-1]:
            return likelihood.at(values)
        return likelihood.at(values @ torch.linalg.pinv(basis).mT)

    return around(fn, single)


def is_one_outcome(fn: Any) -> bool:
    """Whether a likelihood has one outcome a datum, or one row of numbers.

    Args:
        fn: Its distribution, of batch shape (B,), of a known type.
    """
    single = single_outcomes(fn)
    numbers = likelihoods.of(single.fn).classes is None and not single.fn.event_shape
    return single.event_dims == 0 or (single.event_dims == 1 and numbers)


@dataclass(frozen=True, eq=False)
class LinearizedAtDraws:
    """A model at S draws of a Gaussian posterior, the network linearised at its mode.

    Attributes:
        model: The Pyro model.
        gaussians: What the draws are of, a mixture's components in order.
        draws: The draws.
        obs_site: The likelihood's site.
    """

    model: Model
    gaussians: Sequence[LaplacePosterior]
    draws: Draws
    obs_site: str

    @property
    def num_draws(self) -> int:
        """S."""
        return len(self.draws)

    def traces(self, batch: Batch) -> Iterator[Any]:
        """One trace, at the mode but for the likelihood's distribution.

        Args:
            batch: The model's keyword arguments.

        Yields:
            A trace in which that has batch shape (S, B).
        """
        values: Tensor | None = None
        for component, gaussian in enumerate(self.gaussians):
            index = self.draws.of(component)
            if not len(index):
                continue
            with evaluating(gaussian.networks):
                trace = trace_at(self.model, gaussian.mode(), batch)
                found = linearized_values(
                    poutine.condition(self.model, gaussian.fixed),
                    gaussian.gaussian,
                    gaussian.networks,
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


def _at(weights: Weights, index: Tensor) -> Weights:
    return {site: value[index.to(value.device)] for site, value in weights.items()}
