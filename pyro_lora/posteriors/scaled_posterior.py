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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from pyro_lora.curvature.joint_distribution import WeightDistribution, sample_jointly
from pyro_lora.ground.progress import Counted, progress
from pyro_lora.ground.ranks import ALONE, Ranks
from pyro_lora.ground.settings import check_count
from pyro_lora.ground.summary import brief, weights_facts
from pyro_lora.ground.warning import warn
from pyro_lora.ground.weights import Weights, check_sites, handing_out_copies
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood.batch import (
    NO_BATCHES,
    Batch,
    check_batches,
    checked_batches,
)
from pyro_lora.likelihood.model_trace import (
    Model,
)
from pyro_lora.posteriors import marginals
from pyro_lora.posteriors.loss_of_draws import LossOfDraws, largest_scale
from pyro_lora.posteriors.shared import Shared
from pyro_lora.priors import Prior

_STEPS = (1.0, 0.5, 0.25, 0.1, 0.0)  # from where a network is linearised to its mode
_LEAST = 2.0**-8  # of a scale: below it draws are the center


class _Base(WeightDistribution, Protocol):
    """What is scaled: a Gaussian's marginals are, too."""

    def marginals(self) -> dict[str, marginals.Marginals]:
        """Site -> of each weight by itself."""
        ...

    def variance(self) -> Weights:
        """Site -> marginal variances."""
        ...


@handing_out_copies("base_mean", "center", "others")
@dataclass(frozen=True, eq=False, repr=False)
class ScaledPosterior(marginals.ByMarginals, Shared):
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
        fit_arguments: Those that the fit's batches gave to the model, where known.
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
    fit_arguments: frozenset[str] | None = None

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
        return self.center | self.others

    def sample(self, num_samples: int) -> Weights:
        """Draws, site -> value with a leading (S,)."""
        check_count("num_samples", num_samples)
        return self.scaled(self.base.sample(num_samples))

    def scaled(self, draws: Weights) -> Weights:
        """Draws of the base, (S, ...), as those of this posterior."""
        center, mean = self.center, self.base_mean
        return {
            site: center[site] + self.scale * (x - mean[site]) if site in center else x
            for site, x in draws.items()
        }

    def log_prob(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Log density in nats, (S,) for weights with a leading (S,).

        Raises:
            ValueError: If a site is missing, isn't one of this posterior's, or has
                another shape.
        """
        check_sites(weights, self.mode())
        center, mean = self.center, self.base_mean
        unscaled = {
            site: mean[site] + (x - center[site]) / self.scale if site in center else x
            for site, x in weights.items()
        }
        size = sum(x.numel() for x in center.values())
        return self.base.log_prob(unscaled) - size * math.log(self.scale)

    def mean(self) -> Weights:
        """The mean, which is the center."""
        return self.mode()

    def variance(self) -> Weights:
        """Marginal variances, each of its site's shape."""
        center = self.center
        return {
            site: self.scale**2 * x if site in center else x
            for site, x in self.base.variance().items()
        }

    def median(self) -> Weights:
        """The median of each weight, which is the mode."""
        return self.mode()

    def marginals(self) -> dict[str, marginals.Marginals]:
        """Of each site's weights, each by itself."""
        of_base, mean = self.base.marginals(), self.base_mean
        return of_base | {
            site: marginals.Marginals(
                of_base[site].weights,
                center + self.scale * (of_base[site].loc - mean[site]),
                self.scale * of_base[site].sd,
            )
            for site, center in self.center.items()
        }

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
    obs_sites: Sequence[str] = (),
    progress_bar: bool | None = None,
    ranks: Ranks = ALONE,
) -> ScaledPosterior:
    """The posterior with the largest scale whose draws lose no more than a tolerance.

    Args:
        posterior: At any center and scale.
        origin: Where the network is linearised, site -> value. Where the mean is
            another, the center is the point between the two with the least loss.
        batches: Mappings of model keyword arguments, labels included.
        tolerance: Nats a datum, of the mean loss of one draw above the center's.
        num_samples: Draws whose losses are averaged, the same at every scale.
        obs_sites: The likelihood's sites, whose losses add up; empty for the
            posterior's one.
        progress_bar: Show one, of the batches of all passes.
        ranks: Who shares the data.

    Raises:
        ValueError: If the batches are no batches, or none.

    Warns:
        UserWarning: If no scale is small enough.
    """
    check_batches(batches)
    rows = list(checked_batches(batches))  # read once for each of many passes
    if not rows:
        raise ValueError(ranks.none_here(NO_BATCHES))
    with progress(title="Scale", unit="batch", shown=progress_bar) as bar:
        counted = Counted(rows, bar)
        return _largest_scale(
            posterior, origin, counted, tolerance, num_samples, obs_sites, ranks
        )


def _largest_scale(
    posterior: ScaledPosterior,
    origin: Weights,
    rows: Iterable[Batch],
    tolerance: float,
    num_samples: int,
    obs_sites: Sequence[str],
    ranks: Ranks,
) -> ScaledPosterior:
    mean = posterior.base_mean

    one = {site: x[None] for site, x in {**origin, **posterior.others}.items()}
    assert posterior.model is not None  # for_sampling has asked for it
    networks, sites = posterior.networks, obs_sites or posterior.obs_site
    loss = LossOfDraws(
        posterior.model, networks, sites, one, rows, ranks, "for_sampling"
    )

    is_origin = all(torch.equal(mean[s], x) for s, x in origin.items())
    steps = _STEPS[:1] if is_origin else _STEPS
    centers = [
        {s: x + step * (mean[s] - x) for s, x in origin.items()} for step in steps
    ]
    losses = [loss.at(one | {s: x[None] for s, x in c.items()}) for c in centers]
    least = min(losses)
    if not math.isfinite(least):
        raise ValueError(
            "for_sampling: the loss at the center is NaN or infinite. Check the "
            "batches' inputs and labels."
        )
    posterior = replace(posterior, center=centers[losses.index(least)])
    draws = posterior.base.sample(num_samples)

    def increase(scale: float) -> float:
        return loss.at(replace(posterior, scale=scale).scaled(draws)) - least

    scale, is_found = largest_scale(increase, tolerance, 1.0, most=1.0, least=_LEAST)
    if not is_found:
        warn(
            f"Even at a scale of {scale:.3g} a draw loses more than {tolerance:g} nats "
            "a datum against the center; that scale is taken. Use particles, or a "
            "posterior over the last layer."
        )
    return replace(posterior, scale=scale)
