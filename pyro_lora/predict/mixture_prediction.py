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
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from pyro_lora.curvature.gaussian_logits import mixture_log_prob
from pyro_lora.likelihood.outcomes import impossible, is_possible
from pyro_lora.predict.any_prediction import NumberPrediction, joined, replaced
from pyro_lora.predict.metrics import resampled, with_standard_errors
from pyro_lora.predict.regression import COVERAGE

# Distribution functions of counts are sums: up to here, where all but so little is.
_MOST_COUNTS, _LEAST_LEFT = 10_000, 1e-6


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class MixturePrediction(NumberPrediction):
    r"""Numbers of N data, such as counts: a mixture of distributions for each.

    Attributes:
        components: The distributions, of some data after others, and for these of some
            draws after others, each of batch shape (S', N'), or (S', N', P) for P
            outputs, each of which is then predicted by itself. They add up to S draws
            and, without ``rows``, N data.
        weights: :math:`\pi`, (S,); None is equal.
        labels: Outcomes, (N, ...), NaN where there is none; or None.
        rows: Which of the components' data these are, (N,), each once; None is all. A
            distribution can't be indexed, so ``prediction[10:20]`` notes this.

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
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        if self.labels is None:
            return
        fn = self.components[0][0]
        shape = (len(self), *fn.batch_shape[2:], *fn.event_shape)
        if tuple(self.labels.shape) != shape:
            raise ValueError(
                f"labels have shape {tuple(self.labels.shape)}; expected {shape}, one "
                "outcome for each datum."
            )
        labels = self.labels.to(fn.mean)
        # What is possible to one draw is to all: one of each group will do.
        possible = self._each(is_possible, labels, of=[f[:1] for f in self.components])
        wrong = ~possible[0] & self.has_label
        if bool(wrong.any()):
            bad = labels[wrong].flatten()[0].item()
            raise ValueError(f"labels: {impossible(fn, bad)}")

    def __len__(self) -> int:
        """N."""
        return self._num_rows if self.rows is None else len(self.rows)

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
    def has_label(self) -> Tensor:
        """Which outcomes have a label, (N,) or (N, P).

        Raises:
            ValueError: If there are no labels at all.
        """
        device = self.components[0][0].mean.device
        given = ~self._labels("metrics").isnan().to(device)
        for _ in self._event_shape:
            given = given.any(-1)  # the others of a row are integrated over
        return given

    def log_prob(self, values: Tensor) -> Tensor:
        """Log density, or probability, of outcomes, nats, (N,) or (N, P)."""
        log_prob = self._each(lambda fn, y: fn.log_prob(y.to(fn.mean)), values)
        return mixture_log_prob(log_prob, self._pi(log_prob))

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
        given = self.has_label
        self.labelled("metrics")
        scores, datum = self._scores(), given.reshape(len(given), -1)
        rows = datum.any(-1).nonzero()[:, 0]

        def averaged(index: Tensor) -> dict[str, float]:
            counts = datum[index].double()
            means = {
                name: float((x.reshape(datum.shape)[index] * counts).sum())
                / float(counts.sum())
                for name, x in scores.items()
            }
            return means | {"rmse": means["rmse"] ** 0.5}

        return with_standard_errors(
            averaged(rows),
            num_bootstrap,
            lambda: averaged(rows[resampled(len(rows), rows.device)]),
        )

    def _scores(self) -> dict[str, Tensor]:
        """Of each outcome, 0 where it has no label."""
        given = self.has_label
        event = (1,) * len(self._event_shape)
        labels = self._labels("metrics").to(self.mean)
        if not bool(given.all()):  # any outcome will do there
            drawn = self._each(lambda fn: fn.sample())[0]
            labels = labels.where(given.reshape(*given.shape, *event), drawn)
        error = (self.mean - labels).square()
        scores = {
            "nll": -self.log_prob(labels),
            "rmse": error.nanmean(-1) if event else error,
        }
        scores |= {} if event else self._places(labels)
        return {name: x.where(given, torch.zeros_like(x)) for name, x in scores.items()}

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
        # A component whose mean is beyond has at least about half of its probability
        # there: then the sums would stop before all is in them.
        beyond = self._average((means > _MOST_COUNTS).double())
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
            # F(k - 1) is in upto, and F(k) after p is added.
            is_label = labels == k
            below = upto.where(is_label, below)
            at_label = p.where(is_label, at_label)
            upto = upto + p
            score = score + (upto - (labels <= k).to(upto)).square()
        else:
            return {}
        # The part of [F(y - 1), F(y)] that is in [tail, 1 - tail].
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

    @property
    def _num_rows(self) -> int:
        """Data of the components, of which ``rows`` are these."""
        return sum(int(fns[0].batch_shape[1]) for fns in self.components)

    def _each(
        self,
        function: Callable[..., Tensor],
        *values: Tensor,
        of: Sequence[Sequence[Any]] | None = None,
    ) -> Tensor:
        """A function of every component, and values (N, ...), as (S, N, ...)."""
        components = self.components if of is None else of

        def of_one(fn: Any, *own: Tensor) -> Tensor:
            if self.rows is not None:
                # Data that aren't chosen have zeros, which needn't be possible.
                fn = copy(fn)
                fn._validate_args = False
            result = function(fn, *own)
            # What depends on the values alone is the same for all draws.
            result = result.expand(fn.batch_shape + result.shape[len(fn.batch_shape) :])
            return result if result.dtype == torch.bool else result.double()

        sizes = [fns[0].batch_shape[1] for fns in components]
        groups = zip(
            components, *(self._all(x).split(sizes) for x in values), strict=True
        )
        every = torch.cat(
            [torch.cat([of_one(fn, *own) for fn in fns]) for fns, *own in groups], 1
        )
        return every if self.rows is None else every[:, self.rows.to(every.device)]

    def _all(self, values: Tensor) -> Tensor:
        """Values (N, ...) in the places of all the components' data, else zeros."""
        if self.rows is None:
            return values
        whole = values.new_zeros(self._num_rows, *values.shape[1:])
        return whole.index_copy(0, self.rows.to(values.device), values)

    def _own_rows(self) -> Tensor:
        if self.rows is None:
            return torch.arange(self._num_rows, device="cpu")
        return self.rows.cpu()

    def _rows(self, rows: Tensor) -> Self:
        own = (
            torch.arange(self._num_rows, device="cpu")
            if self.rows is None
            else self.rows.cpu()
        )
        chosen = own[rows.cpu()]
        # What is chosen for the n-th time is a row of the components' n-th copy, which
        # takes no memory: rows 2, 0, 2 of 3 data are 2, 0, 5.
        order = chosen.argsort(stable=True)
        ascending = chosen[order]
        copy_of = torch.zeros_like(chosen)
        first = torch.searchsorted(ascending, ascending)
        copy_of[order] = torch.arange(len(chosen), device="cpu") - first
        groups = [*self.components] * (int(copy_of.max()) + 1)
        chosen = chosen + copy_of * self._num_rows
        # Groups of which no row is chosen go: what is asked is asked of all rows.
        sizes = torch.tensor([fns[0].batch_shape[1] for fns in groups], device="cpu")
        ends = sizes.cumsum(0)
        group = torch.searchsorted(ends, chosen, right=True)
        used, place = group.unique(return_inverse=True)
        moved = sizes[used].cumsum(0) - ends[used]
        labels = self.labels
        return replaced(
            self,
            components=[groups[g] for g in used.tolist()],
            rows=chosen + moved[place],
            labels=None if labels is None else labels[rows.to(labels.device)],
        )

    @classmethod
    def _joined(cls, predictions: Sequence[Self]) -> Self:
        forms = [_form(p) for p in predictions]
        for index, form in enumerate(forms):
            if form != forms[0]:
                raise ValueError(
                    f"predictions[{index}] doesn't fit the first one: it's a mixture "
                    f"of {form}, not of {forms[0]}. Concatenate predictions of the "
                    "same outcomes by as many draws."
                )
        rows: list[Tensor] = []
        start = 0
        for p in predictions:
            own = (
                torch.arange(p._num_rows, device="cpu")
                if p.rows is None
                else p.rows.cpu()
            )
            rows.append(own + start)
            start += p._num_rows
        whole = all(p.rows is None for p in predictions)
        return joined(
            predictions,
            {"labels": 0},
            components=[fns for p in predictions for fns in p.components],
            rows=None if whole else torch.cat(rows),
        )

    def _pi(self, like: Tensor) -> Tensor:
        if self.weights is None:
            return like.new_full((len(like),), 1 / len(like))
        return self.weights.to(like) / self.weights.sum()

    def _average(self, values: Tensor) -> Tensor:
        return torch.tensordot(self._pi(values), values, 1)


def _whole(fn: Any, values: Tensor) -> Tensor:
    return values.expand(fn.batch_shape + fn.event_shape)


def _form(prediction: MixturePrediction) -> str:
    """What mixtures have in common that can be joined."""
    fns = prediction.components[0]
    num_draws = sum(fn.batch_shape[0] for fn in fns)
    outputs = "".join(f" x {n}" for n in (*fns[0].batch_shape[2:], *fns[0].event_shape))
    return f"{num_draws} {type(fns[0]).__name__}{outputs}"
