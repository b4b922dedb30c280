r"""A Gaussian made narrow enough that its draws keep their promise in the network.

A Laplace posterior describes the network linearised at a mode. Its draws
:math:`\mu + \delta` may leave the range where that holds, and then predict at chance.
Of :math:`\mu + s \delta` with s small enough they don't: s is the largest under which a
draw's own loss on some rows is at most a stated number of nats above the mode's, the
criterion of training-free Bayesianization (Shi et al. 2024,
https://arxiv.org/abs/2412.05723), with the shape of a Laplace posterior.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_lora.curvature.joint_distribution import WeightDistribution, sample_jointly
from pyro_lora.ground.progress import Counted, progress
from pyro_lora.ground.settings import check_count
from pyro_lora.ground.summary import Summarised, brief, weights_facts
from pyro_lora.ground.warning import warn
from pyro_lora.ground.weights import Weights
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood.batch import (
    NO_BATCHES,
    Batch,
    check_batches,
    checked_batches,
)
from pyro_lora.likelihood.data_plate import data_plate
from pyro_lora.likelihood.model_trace import (
    Model,
    evaluating,
    naming_batch,
    observed_sites,
    trace_batch,
)
from pyro_lora.likelihood.outcomes import data_that_count, values_to_score
from pyro_lora.posteriors.marginals import Levels
from pyro_lora.priors import Prior

_STEPS = (1.0, 0.5, 0.25, 0.1, 0.0)  # from where a network is linearised to its mode
_NUM_HALVINGS = 8  # of the interval that the scale is in


class _Base(WeightDistribution, Protocol):
    """What is scaled: a Gaussian's quantiles are, too."""

    def quantiles(self, quantiles: Levels) -> Weights:
        """Site -> quantiles."""
        ...

    def variance(self) -> Weights:
        """Site -> marginal variances."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class ScaledPosterior(Summarised):
    r"""Draws :math:`c + s (w - \mu)` of a posterior's :math:`w`, with mean :math:`\mu`.

    A Pyro guide. Predicted from by draws, exported and served as it is. Made by
    ``LaplacePosterior.for_sampling``.

    Attributes:
        base: What w is drawn from.
        base_mean: Of the sites that are scaled, site -> value.
        center: c, of the same sites.
        scale: s.
        others: Values of the sites that aren't scaled, at the mode.
        networks: The lifted networks in the model.
        model: The Pyro model; None where it isn't known.
        obs_site: The likelihood's site, None for the only one.
        prior: That of the posterior.
    """

    base: _Base
    base_mean: Weights
    center: Weights
    scale: float
    others: Weights
    networks: tuple[LiftedNetwork, ...]
    model: Model | None
    obs_site: str | None
    prior: Prior

    num_samples: ClassVar[int | None] = None

    def __call__(self, *args: Any, **kwargs: Any) -> Weights:
        """Sample the sites: the guide's statements, whatever the model's arguments."""
        return sample_jointly(self, self.mode(), self.networks)

    def _facts(self) -> dict[str, str]:
        return {
            **weights_facts(self.mode()),
            "base": brief(self.base),
            "scale": f"{self.scale:.4g}",
            "prior": brief(self.prior),
            "obs_site": brief(self.obs_site),
            "model": brief(self.model),
        }

    def mode(self) -> Weights:
        """The center, site -> value."""
        return {site: x.clone() for site, x in {**self.center, **self.others}.items()}

    def sample(self, num_samples: int) -> Weights:
        """Draws, site -> value with a leading (S,)."""
        check_count("num_samples", num_samples)
        return self.scaled(self.base.sample(num_samples))

    def scaled(self, draws: Weights) -> Weights:
        """Draws of the base, (S, ...), as those of this posterior."""
        return {
            site: self.center[site] + self.scale * (x - self.base_mean[site])
            if site in self.center
            else x
            for site, x in draws.items()
        }

    def log_prob(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Log density in nats, (S,) for weights with a leading (S,).

        Raises:
            ValueError: If a site is missing, or isn't one of this posterior's.
        """
        unscaled = {
            site: self.base_mean[site] + (x - self.center[site]) / self.scale
            if site in self.center
            else x
            for site, x in weights.items()
        }
        size = sum(x.numel() for x in self.center.values())
        return self.base.log_prob(unscaled) - size * math.log(self.scale)

    def mean(self) -> Weights:
        """The mean, which is the center."""
        return self.mode()

    def variance(self) -> Weights:
        """Marginal variances, each of its site's shape."""
        return {
            site: self.scale**2 * x if site in self.center else x
            for site, x in self.base.variance().items()
        }

    def median(self) -> Weights:
        """The median of each weight, which is the mode."""
        return self.mode()

    def quantiles(self, quantiles: Levels) -> Weights:
        """Quantiles of each weight by itself.

        Args:
            quantiles: Between 0 and 1: one, or Q of them.

        Returns:
            Site -> value of the site's shape, for several with a leading (Q,).

        Raises:
            TypeError: If they are no numbers.
            ValueError: If one isn't between 0 and 1.
        """
        return self.scaled(self.base.quantiles(quantiles))

    def gaussians(self) -> list[tuple[float, Any]]:
        """None: it is about the network itself, not a linearised one."""
        return []


def scaled_to(
    posterior: ScaledPosterior,
    origin: Weights,
    batches: Iterable[Batch],
    *,
    tolerance: float,
    num_samples: int,
    progress_bar: bool | None = None,
) -> ScaledPosterior:
    """The posterior with the largest scale whose draws lose no more than a tolerance.

    Args:
        posterior: At any center and scale.
        origin: Where the network is linearised, site -> value. Where the mean is
            another, the center is the point between the two with the least loss.
        batches: Mappings of model keyword arguments, labels included.
        tolerance: Nats a datum, of the mean loss of one draw above the center's.
        num_samples: Draws whose losses are averaged, the same at every scale.
        progress_bar: Show one, of the batches of all passes.

    Raises:
        ValueError: If the batches are no batches, or none.

    Warns:
        UserWarning: If no scale is small enough.
    """
    check_batches(batches)
    rows = list(checked_batches(batches))  # read once for each of many passes
    if not rows:
        raise ValueError(NO_BATCHES)
    with progress(title="Scale", unit="batch", shown=progress_bar) as bar:
        counted = Counted(rows, bar)
        return _largest_scale(posterior, origin, counted, tolerance, num_samples)


def _largest_scale(
    posterior: ScaledPosterior,
    origin: Weights,
    rows: Iterable[Batch],
    tolerance: float,
    num_samples: int,
) -> ScaledPosterior:
    mean = posterior.base_mean

    def loss(center: Weights) -> float:
        one = {site: x[None] for site, x in {**center, **posterior.others}.items()}
        return _mean_loss(posterior, one, rows)

    steps = _STEPS if mean is not origin else _STEPS[:1]
    centers = [
        {s: x + step * (mean[s] - x) for s, x in origin.items()} for step in steps
    ]
    losses = [loss(center) for center in centers]
    least = min(losses)
    if not math.isfinite(least):
        raise ValueError(
            "for_sampling: the loss at the center is NaN or infinite. Check the "
            "batches' inputs and labels."
        )
    posterior = replace(posterior, center=centers[losses.index(least)])
    draws = posterior.base.sample(num_samples)

    def is_close(scale: float) -> bool:
        at_scale = replace(posterior, scale=scale).scaled(draws)
        return _mean_loss(posterior, at_scale, rows) <= least + tolerance

    low, high = 0.0, 1.0
    if is_close(high):
        return replace(posterior, scale=high)
    for _ in range(_NUM_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if is_close(middle) else (low, middle)
    if low == 0.0:
        low = high
        warn(
            f"Even at a scale of {high:.3g} a draw loses more than {tolerance:g} nats "
            "a datum against the center; that scale is taken. Use particles, or a "
            "posterior over the last layer."
        )
    return replace(posterior, scale=low)


@torch.no_grad()
def _mean_loss(
    posterior: ScaledPosterior, weights: Weights, batches: Iterable[Batch]
) -> float:
    """Negative log likelihood a datum, averaged over weight sets (S, ...).

    Raises:
        ValueError: If nothing is observed.
    """
    model = posterior.model
    assert model is not None  # for_sampling has asked for it
    total, number = 0.0, 0
    num_draws = len(next(iter(weights.values())))
    with evaluating(posterior.networks):
        for index, batch in enumerate(batches):
            for s in range(num_draws):
                at = {site: x[s] for site, x in weights.items()}
                trace = trace_batch(model, at, batch, index)
                with naming_batch(index):
                    sites = observed_sites(trace, posterior.obs_site)
                for site in sites:
                    plate = data_plate(site)
                    log_prob = site["fn"].log_prob(values_to_score(site))
                    counted = scale_and_mask(log_prob, plate.scale, plate.mask)
                    total -= float(counted.double().sum())
                number += int(data_that_count(sites[0]).sum())
    if number == 0:
        raise ValueError(
            "for_sampling got no outcome that counts: all data are masked or missing."
        )
    return total / number if math.isfinite(total) else math.inf
