r"""What draws lose on some rows, and the largest scale at which they lose little.

The criterion of training-free Bayesianization (Shi et al. 2024,
https://arxiv.org/abs/2412.05723): a width is as large as a stated loss allows. With
losses of .40, .43 and .52 nats a datum at the scales 0, .5 and 1 and a tolerance of .03
it is .5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_lora.ground.ranks import Ranks
from pyro_lora.ground.weights import Weights
from pyro_lora.lifting.cached_trunk import trunk_once
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.lifting.split_layers import who_run
from pyro_lora.likelihood.batch import Batch
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

_PER_OCTAVE = 88  # scales that are told apart, each by one part in 127
_FARTHEST = 3 * _PER_OCTAVE  # to go on from a scale at once
_DRAWS_AT_ONCE = 8  # in one forward pass


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
        plates: dict[str, DataPlate] = {}
        for index, batch in enumerate(self.ranks.in_step(self.batches)):
            runs = [*self._runs(weights, batch, index)]
            with trunk_once(self.networks if len(runs) > 1 else []):
                for at in runs:
                    _, sites = self._run(at, batch, index)
                    counted = sum(float(_counted(site).sum()) for site in sites)
                    total -= counted / num_draws
            plates = {site["name"]: self._plate(site) for site in sites}
            each = map(data_that_count, sites, plates.values())
            counts = torch.stack([*each]).any(0)
            number += int(counts.sum())
            num_seen += len(counts)
        of_rank = torch.tensor(total, dtype=torch.float64, device="cpu")
        total = float(self.ranks.sum(of_rank))
        number = self.ranks.total(number)
        num_seen = self.ranks.total(num_seen)
        for name, plate in plates.items():
            miscounts = plate.dim is None or plate.is_tempered
            if plate.is_contradicted(num_seen) and miscounts:
                says, remedy = plate.contradiction(num_seen, name)
                raise ValueError(
                    f"{self.caller}: the batches hold {num_seen} data, but {says}. "
                    f"{remedy}"
                )
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
