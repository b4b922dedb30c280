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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_lora.curvature.joint_distribution import WeightDistribution, sample_jointly
from pyro_lora.ground.progress import Counted, progress
from pyro_lora.ground.ranks import ALONE, Ranks
from pyro_lora.ground.settings import check_count
from pyro_lora.ground.summary import brief, weights_facts
from pyro_lora.ground.warning import warn
from pyro_lora.ground.weights import Weights, check_sites, handing_out_copies
from pyro_lora.lifting.cached_trunk import trunk_once
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.lifting.split_layers import who_run
from pyro_lora.likelihood.batch import (
    NO_BATCHES,
    Batch,
    check_batches,
    checked_batches,
)
from pyro_lora.likelihood.batch_dims import BatchDims, batch_dims
from pyro_lora.likelihood.data_plate import DataPlate, data_plate
from pyro_lora.likelihood.model_trace import (
    Model,
    evaluating,
    naming_batch,
    observed_sites,
    trace_batch,
)
from pyro_lora.likelihood.outcomes import data_that_count, values_to_score
from pyro_lora.likelihood.stacks import Stacking
from pyro_lora.posteriors import marginals
from pyro_lora.posteriors.shared import Shared
from pyro_lora.priors import Prior

_STEPS = (1.0, 0.5, 0.25, 0.1, 0.0)  # from where a network is linearised to its mode
_PER_OCTAVE = 88  # scales that are told apart, each by one part in 127
_FARTHEST = 3 * _PER_OCTAVE  # to go on from a scale at once
_LEAST = 2.0**-8  # of a scale: below it draws are the center
_DRAWS_AT_ONCE = 8  # in one forward pass


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


def largest_scale(
    increase: Callable[[float], float],
    tolerance: float,
    start: float,
    *,
    most: float,
    least: float,
) -> tuple[float, bool]:
    r"""The largest scale at which a loss grows by no more than a tolerance.

    Around a mode the growth is about :math:`a s^2`, so that one value of it says where
    to look next; between a scale that is small enough and one that isn't, it is taken
    for a power of s. Where two steps haven't halved what is left, the next does. Five
    to eight values are enough where halving alone takes ten.

    Args:
        increase: Of the loss, at a scale; may be infinite.
        tolerance: How much it may be.
        start: Where to begin.
        most: The largest scale that is looked at.
        least: The smallest.

    Returns:
        The scale, one of 88 in each octave from the start, whatever the rounding of
        losses; and whether the loss grows by no more there: where it grows by more even
        at the smallest, that one.
    """
    first, last = (round(_PER_OCTAVE * math.log2(x / start)) for x in (least, most))
    low = high = None  # places among the scales, and the increases there
    at, num_steps, widths = 0, 0, [last - first]
    while True:
        found = at, increase(start * 2 ** (at / _PER_OCTAVE))
        if found[1] <= tolerance:
            low = found
        else:
            high = found
        if low is None or high is None:
            if at == (first if low is None else last):
                return start * 2 ** (at / _PER_OCTAVE), low is not None
            # Farther with each step from the third on: the loss isn't like a s^2 then.
            num_steps += 1
            at += _step(found[1], tolerance) * max(num_steps - 1, 1)
            at = min(max(at, first), last)
        elif high[0] - low[0] == 1:
            return start * 2 ** (low[0] / _PER_OCTAVE), True
        else:
            widths.append(high[0] - low[0])
            share = 0.5
            if 2 * widths[-1] <= widths[-3:][0]:
                share = _share(low[1], high[1], tolerance)
            # On the middle's side of it, so that the farther of the two is replaced.
            on = share * widths[-1]
            on = math.ceil(on) if share < 0.5 else math.floor(on)
            at = low[0] + min(max(on, 1), widths[-1] - 1)


def _step(increase: float, tolerance: float) -> int:
    """By how many places to go on, just beyond where a s^2 is the tolerance."""
    if increase <= 0 or math.isinf(increase):
        return _FARTHEST if increase <= 0 else -_FARTHEST
    step = _PER_OCTAVE * math.log2(tolerance / increase) / 2
    if increase <= tolerance:
        return min(math.floor(step) + 1, _FARTHEST)
    return max(math.ceil(step) - 1, -_FARTHEST)


def _share(low: float, high: float, tolerance: float) -> float:
    """Where between two scales a power law has grown to the tolerance, in logs."""
    if low <= 0 or math.isinf(high):
        return 0.5
    return math.log(tolerance / low) / math.log(high / low)


@dataclass(frozen=True, eq=False)
class LossOfDraws:
    """Negative log likelihood a datum of draws on some rows, several in one run.

    Attributes:
        model: A Pyro model.
        networks: Its lifted networks, which are in evaluation mode meanwhile.
        obs_site: The likelihood's site, or several, whose losses add up; None for the
            only one.
        one: Site -> (1, ...), all latent sites: any weight set.
        batches: Mappings of model keyword arguments, labels included.
        ranks: Who shares the data.
        caller: What needs it, for errors.
        mixed: Batches in which draws mix; from the first on each is run by itself.
    """

    model: Model
    networks: Sequence[LiftedNetwork]
    obs_site: str | Sequence[str] | None
    one: Weights
    batches: Iterable[Batch]
    ranks: Ranks
    caller: str
    mixed: set[int] = field(default_factory=set)

    @torch.no_grad()
    def at(self, weights: Weights) -> float:
        """The mean over weight sets, nats; infinite for NaN.

        Args:
            weights: Site -> (S, ...), all latent sites.

        Raises:
            ValueError: If nothing is observed, or each batch would be all data and
                doesn't count each once.
        """
        num_draws = len(next(iter(weights.values())))
        total, number, num_seen = 0.0, 0, 0
        for index, batch in enumerate(self.ranks.in_step(self.batches)):
            runs = [*self._runs(weights, batch, index)]
            with trunk_once(self.networks if len(runs) > 1 else []):
                for at in runs:
                    _, sites = self._run(at, batch, index)
                    counted = sum(float(_counted(site).sum()) for site in sites)
                    total -= counted / num_draws
            plates = [self._plate(site) for site in sites]
            each = map(data_that_count, sites, plates)
            counts = torch.stack([*each]).any(0)
            number += int(counts.sum())
            num_seen += len(counts)
        for plate, site in zip(plates, sites, strict=True):
            tempered = bool((torch.as_tensor(plate.scale) != 1).any())
            if plate.is_contradicted(num_seen) and (tempered or plate.dim is None):
                says, remedy = plate.contradiction(num_seen, site["name"])
                raise ValueError(
                    f"{self.caller}: the batches hold {num_seen} data, but {says}. "
                    f"{remedy}"
                )
        of_rank = torch.tensor(total, dtype=torch.float64, device="cpu")
        total = float(self.ranks.sum(of_rank))
        number = self.ranks.total(number)
        if number == 0:
            raise ValueError(
                f"{self.caller} got no outcome that counts: all data are masked or "
                "missing."
            )
        return total / number if math.isfinite(total) else math.inf

    def _runs(self, weights: Weights, batch: Batch, index: int) -> Iterator[Weights]:
        """What goes through a batch at a time: several draws, or each by itself."""
        num_draws = len(next(iter(weights.values())))
        if self.mixed or not self._stacking(batch, index).is_right(self._first):
            self.mixed.add(index)  # for the batches that follow, too
            for i in range(num_draws):
                yield {site: x[i] for site, x in weights.items()}
            return
        stack = self._stacked(weights)
        for start in range(0, num_draws, _DRAWS_AT_ONCE):
            yield {s: x[start : start + _DRAWS_AT_ONCE] for s, x in stack.items()}

    def _stacking(self, batch: Batch, index: int) -> Stacking:
        def run(at: Weights) -> Any:
            return self._run(at, batch, index)[0]

        return Stacking(
            self.model,
            batch.values(),
            self._places[1],
            run,
            lambda stack: run(self._stacked(stack)),
            ranks=who_run(self.networks),
        )

    def _stacked(self, weights: Weights) -> Weights:
        return {s: dims.stacked(weights[s]) for s, dims in self._places[0].items()}

    @cached_property
    def _first(self) -> Weights:
        return {site: x[0] for site, x in self.one.items()}

    @cached_property
    def _places(self) -> tuple[dict[str, BatchDims], dict[str, DataPlate]]:
        """Where draws go among the model's batch dims, and the data of each site."""
        trace, sites = self._run(self._first, next(iter(self.batches)), 0)
        latents = {s: trace.nodes[s] for s in self.one if s in trace.nodes}
        return batch_dims(sites, latents), {x["name"]: data_plate(x) for x in sites}

    def _plate(self, site: Mapping[str, Any]) -> DataPlate:
        """The data's, where draws may be in the place of data that have no dim."""
        alone = self._places[1][site["name"]]
        return alone if alone.dim is None else data_plate(site)

    def _run(
        self, weights: Weights, batch: Batch, index: int
    ) -> tuple[Any, list[dict[str, Any]]]:
        """A trace at a weight set, or at several stacked ones, and observed sites."""
        with torch.no_grad(), evaluating(self.networks):
            trace = trace_batch(self.model, weights, batch, index)
        with naming_batch(index):
            return trace, observed_sites(trace, self.obs_site)


def _counted(site: dict[str, Any]) -> Tensor:
    """Log densities of a site, as they count among the data, float64."""
    plate = data_plate(site)
    log_prob = site["fn"].log_prob(values_to_score(site))
    counted: Tensor = scale_and_mask(log_prob, plate.scale, plate.mask).double()
    return counted
