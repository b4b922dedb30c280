r"""Predicted numbers of any likelihood: a mixture of its distributions for each datum.

:math:`p(y | x) = \sum_s \pi_s p(y | f_s(x))`, over draws of the weights, or over the
nodes of a quadrature where the predictor f is Gaussian. All that is said of a datum is
a sum over s. Counts have a distribution function, as a sum over all smaller counts:

- a count y has no place in its distribution but an interval, from :math:`P(Y < y)` to
  :math:`P(Y \le y)`. It is in the central 90% by as much as the interval is (Czado,
  Gneiting & Held 2009, https://doi.org/10.1111/j.1541-0420.2009.01191.x), which on
  average is 90% where the prediction is right. With P = (.02, .98, ...) for instance,
  the count 0 isn't in it, and 1 by (.95 - .05) / .98;
- the continuous ranked probability score is :math:`\sum_k (P(Y \le k) - 1[y \le k])^2`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_lora.curvature.gaussian_logits import mixture_log_prob
from pyro_lora.likelihood.outcomes import impossible, is_possible
from pyro_lora.predict.metrics import resampled, with_standard_errors
from pyro_lora.predict.regression import COVERAGE
from pyro_lora.predict.tables import table_of_numbers

if TYPE_CHECKING:
    from pandas import DataFrame

# Distribution functions of counts are sums: up to here, where all but so little is.
_MOST_COUNTS, _LEAST_LEFT = 10_000, 1e-6


@dataclass(frozen=True, eq=False, kw_only=True)
class MixturePrediction:
    r"""Numbers of N data, such as counts: a mixture of distributions for each.

    Attributes:
        components: The distributions, of some data after others, and for these of some
            draws after others, each of batch shape (S', N'), or (S', N', P) for P
            outputs, each of which is then predicted by itself. They add up to S draws
            and N data.
        weights: :math:`\pi`, (S,); None is equal.
        labels: Outcomes, (N, ...), NaN where there is none; or None.

    Raises:
        ValueError: If a label has no probability.

    >>> from pyro.distributions import Poisson
    >>> rates = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
    >>> prediction = MixturePrediction(components=[[Poisson(rates)]])
    >>> prediction.mean.tolist(), prediction.weight_variance.tolist()
    ([2.0, 2.0], [1.0, 0.0])
    """

    components: Sequence[Sequence[Any]]
    weights: Tensor | None = None
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        if self.labels is None:
            return
        shape = tuple(self.mean.shape)
        if tuple(self.labels.shape) != shape:
            raise ValueError(
                f"labels have shape {tuple(self.labels.shape)}; expected {shape}, one "
                "outcome for each datum."
            )
        known = self.known
        for fns, labels, seen in zip(
            self.components, self._split(self.labels), self._split(known), strict=True
        ):
            fits = is_possible(fns[0], labels.to(fns[0].mean))
            wrong = ~fits.expand(fns[0].batch_shape)[0] & seen
            if bool(wrong.any()):
                bad = labels[wrong.to(labels.device)].flatten()[0].item()
                raise ValueError(f"labels: {impossible(fns[0], bad)}")

    @cached_property
    def mean(self) -> Tensor:
        """Mean of a new outcome, (N, ...)."""
        return self._average(self._each(lambda fn: _whole(fn, fn.mean)))

    @cached_property
    def noise_variance(self) -> Tensor:
        """Mean variance within a component, (N, ...): what more data would leave."""
        return self._average(self._each(lambda fn: _whole(fn, fn.variance)))

    @cached_property
    def weight_variance(self) -> Tensor:
        """Variance of the components' means, (N, ...): the doubt about the weights."""
        means = self._each(lambda fn: _whole(fn, fn.mean))
        return self._average((means - self.mean).square())

    @cached_property
    def variance(self) -> Tensor:
        """Variance of a new outcome, (N, ...)."""
        return self.noise_variance + self.weight_variance

    @property
    def label_shape(self) -> tuple[int, ...]:
        """What labels of the data have."""
        return tuple(self.mean.shape)

    @cached_property
    def known(self) -> Tensor:
        """Which outcomes have a label, (N,) or (N, P).

        Raises:
            ValueError: If there are no labels at all.
        """
        if self.labels is None:
            raise ValueError(
                "metrics needs labels, and this prediction has none. Put 'labels' "
                "(what the likelihood observes) into every batch given to predict."
            )
        known = ~self.labels.to(self.mean).isnan()
        for _ in self._event_shape:
            known = known.any(-1)  # the others of a row are integrated over
        return known

    def log_prob(self, values: Tensor) -> Tensor:
        """Log density, or probability, of outcomes, nats, (N,) or (N, P)."""
        log_prob = self._each(lambda fn, y: fn.log_prob(y.to(fn.mean)), values)
        return mixture_log_prob(log_prob, self._pi(log_prob))

    def labelled(self, caller: str = "labelled") -> MixturePrediction:
        """The same prediction, if a datum of it has a label.

        Args:
            caller: What needs one, for the error.

        Raises:
            ValueError: If there is none.
        """
        if self.labels is None or not bool(self.known.any()):
            raise ValueError(
                f"{caller} needs labels, and no datum of this prediction has one that "
                "counts: all are masked or missing."
            )
        return self

    def metrics(self, *, num_bootstrap: int = 0) -> dict[str, float]:
        r"""Quality against the labels, means over the data and outputs that have one.

        - ``nll``: mean of :math:`-\log p(y)`, nats.
        - ``rmse``: root of the mean squared error of the mean.
        - ``crps``: of counts, the ranked probability score
          :math:`\sum_k (P(Y \le k) - 1[y \le k])^2`.
        - ``coverage``: share of the labels inside the central 90% interval, a count on
          its edge by the part that is inside; of counts, and of distributions that
          know their ``cdf``.

        Counts that go beyond 10,000 have only the first two.

        Args:
            num_bootstrap: As :meth:`Prediction.metrics`.

        Returns:
            Name -> value.

        Raises:
            ValueError: If there are no labels, or ``num_bootstrap`` is 1 or negative.
        """
        known = self.known
        self.labelled("metrics")
        scores, datum = self._scores(), known.reshape(len(known), -1)
        rows = datum.any(-1).nonzero()[:, 0]

        def averaged(index: Tensor) -> dict[str, float]:
            counts = datum[index].double()
            found = {
                name: float((x.reshape(datum.shape)[index] * counts).sum())
                / float(counts.sum())
                for name, x in scores.items()
            }
            return found | {"rmse": found["rmse"] ** 0.5}

        return with_standard_errors(
            averaged(rows),
            num_bootstrap,
            lambda: averaged(rows[resampled(len(rows), rows.device)]),
        )

    def to_pandas(self) -> DataFrame:
        """One row a datum: mean, standard deviations, the label.

        Columns ``mean``, ``sd``, ``noise_sd``, ``weight_sd`` and, where there are
        labels, ``label``; with P outputs ``mean_0`` and so on.

        Returns:
            A ``pandas.DataFrame`` with the index ``datum``.
        """
        return table_of_numbers(self)

    def _scores(self) -> dict[str, Tensor]:
        """Of each outcome, 0 where it has no label."""
        assert self.labels is not None  # known has seen to it
        known = self.known
        event = (1,) * len(self._event_shape)
        labels = self.labels.to(self.mean)
        if not bool(known.all()):  # any outcome will do there
            drawn = self._each(lambda fn: fn.sample())[0]
            labels = labels.where(known.reshape(*known.shape, *event), drawn)
        error = (self.mean - labels).square()
        scores = {
            "nll": -self.log_prob(labels),
            "rmse": error.nanmean(-1) if event else error,
        }
        scores |= {} if event else self._places(labels)
        return {name: x.where(known, torch.zeros_like(x)) for name, x in scores.items()}

    def _places(self, labels: Tensor) -> dict[str, Tensor]:
        """Scores by the distribution function, where there is one."""
        tail = (1 - COVERAGE) / 2
        if self._is_count:
            return self._places_of_counts(labels, tail)
        try:
            place = self._average(self._each(lambda fn, y: fn.cdf(y), labels))
        except NotImplementedError:  # a distribution that doesn't say
            return {}
        return {"coverage": ((place > tail) & (place < 1 - tail)).to(place)}

    def _places_of_counts(self, labels: Tensor, tail: float) -> dict[str, Tensor]:
        below = at_label = torch.zeros_like(labels)
        score, upto = torch.zeros_like(labels), torch.zeros_like(labels)
        top = int(labels.max())
        means = self._each(lambda fn: fn.mean)
        beyond = self._average((means > _MOST_COUNTS).double())  # at least half of that
        if top >= _MOST_COUNTS or bool((beyond > 2 * _LEAST_LEFT).any()):
            return {}
        for k in range(_MOST_COUNTS):
            if k > top and bool((upto > 1 - _LEAST_LEFT).all()):
                break
            possible = self._fits(torch.full_like(labels, k))
            p = torch.zeros_like(labels)
            if bool(possible.any()):
                inside = torch.full_like(labels, k).where(possible, labels)
                p = self.log_prob(inside).exp().where(possible, p)
            is_label = labels == k
            below = upto.where(is_label, below)
            at_label = p.where(is_label, at_label)
            upto = upto + p
            score = score + (upto - (labels <= k).to(upto)).square()
        else:
            return {}
        inside = (below + at_label).clamp_max(1 - tail) - below.clamp_min(tail)
        # A label without probability is at an end, and outside.
        share = inside.clamp_min(0) / at_label.clamp_min(torch.finfo(p.dtype).tiny)
        return {"crps": score, "coverage": share.clamp_max(1)}

    def _fits(self, values: Tensor) -> Tensor:
        """Which values all components think possible."""
        return self._each(is_possible, values).all(0)

    @property
    def _is_count(self) -> bool:
        return bool(self.components[0][0].support.is_discrete)

    @property
    def _event_shape(self) -> torch.Size:
        shape: torch.Size = self.components[0][0].event_shape
        return shape

    def _split(self, values: Tensor) -> Sequence[Tensor]:
        """Values (N, ...) of the data of each group of components."""
        return values.split([fns[0].batch_shape[1] for fns in self.components])

    def _each(self, function: Callable[..., Tensor], *values: Tensor) -> Tensor:
        """A function of every component, and values (N, ...), as (S, N, ...)."""

        def of_one(fn: Any, *some: Tensor) -> Tensor:
            found = function(fn, *some)
            # What depends on the values alone is the same for all draws.
            own = found.expand(fn.batch_shape + found.shape[len(fn.batch_shape) :])
            return own if own.dtype == torch.bool else own.double()

        parts = zip(self.components, *map(self._split, values), strict=True)
        return torch.cat(
            [torch.cat([of_one(fn, *some) for fn in fns]) for fns, *some in parts], 1
        )

    def _pi(self, like: Tensor) -> Tensor:
        if self.weights is None:
            return like.new_full((len(like),), 1 / len(like))
        return self.weights.to(like) / self.weights.sum()

    def _average(self, values: Tensor) -> Tensor:
        return torch.tensordot(self._pi(values), values, 1)


def _whole(fn: Any, values: Tensor) -> Tensor:
    return values.expand(fn.batch_shape + fn.event_shape)


def concatenated(parts: Sequence[MixturePrediction]) -> MixturePrediction:
    """The data of several predictions, without labels.

    Args:
        parts: Of the same draws.

    Returns:
        One prediction.
    """
    components = [fns for part in parts for fns in part.components]
    return replace(parts[0], components=components)
