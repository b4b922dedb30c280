r"""Predicted real numbers: a mixture of normals or Student's t for each datum.

:math:`p(y | x) = \sum_s \pi_s p_s(y | x)`, over S draws of the weights or the n
Gaussians of a linearised mixture, each at the nodes of an integral over the scale where
the network outputs that. In each the location is f_s, of variance v_s in it (0
of a draw), and the noise's is :math:`\sigma_s^2`. So

    mean                :math:`m = \sum_s \pi_s f_s`
    noise_variance      :math:`\sum_s \pi_s \sigma_s^2`
    weight_variance     :math:`\sum_s \pi_s ((f_s - m)^2 + v_s)`

and their sum is the variance of a new outcome. Two draws that say 1 and 3 with noise of
variance 1 predict 2, and the variance is 1 of noise plus 1 of weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch import distributions as td

from pyro_lora.ground.settings import check_number
from pyro_lora.ground.synchronisation import require
from pyro_lora.predict.any_prediction import NumberPrediction, joined, rows_of
from pyro_lora.predict.metrics import resampled, with_standard_errors

COVERAGE = 0.9  # of the central interval whose coverage is counted
_NUM_BISECTIONS = 80  # of 2 _REACH, to less than a rounding error
_LEAST = 1e-12  # of a probability; the distribution function rounds at 1e-16
_REACH = 700.0  # exp of it is nearly the largest number
_NUM_RAISED = 4  # of the steps of 2 by which Student's degrees of freedom are raised
_NEGLIGIBLE = 40.0  # nats that leave nothing in float64
_FAR = 1e8  # its square plus one is its square
_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(64)

_LOC_AND_SCALE = (
    "loc must be finite and noise_scale positive. Check the network's outputs and the "
    "prior of the noise."
)

_DIMS = {"loc": 1, "noise_scale": 1, "loc_variance": 1, "df": 1, "labels": 0}


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class RegressionPrediction(NumberPrediction):
    r"""Real outcomes of N data, a mixture over S draws or Gaussians of the weights.

    :math:`p(y | x) = \sum_s \pi_s p_s(y | x)`, each component a normal of variance
    noise plus location's, or Student's t around a location.

    Attributes:
        loc: The components' locations, (S, N), or (S, N, P) for P outputs, each of
            which is then predicted by itself.
        noise_scale: Scale of the noise, of ``loc``'s shape.
        loc_variance: Variance of the location within a component, of ``loc``'s shape:
            of the linearised network; None is 0, that of draws.
        df: Degrees of freedom of Student's noise, of ``loc``'s shape; None is normal.
        weights: :math:`\pi`, (S,); None is equal.
        labels: Outcomes, (N,) or (N, P), NaN where there is none; or None.

    Raises:
        ValueError: If shapes don't fit or values are impossible.

    >>> prediction = RegressionPrediction(
    ...     loc=torch.tensor([[1.0, 0.0], [3.0, 0.0]]), noise_scale=torch.ones(2, 2)
    ... )
    >>> prediction.mean, prediction.weight_variance
    (tensor([2., 0.]), tensor([1., 0.]))
    >>> prediction[:1]
    RegressionPrediction(N=1, labels=None)
    """

    loc: Tensor
    noise_scale: Tensor
    loc_variance: Tensor | None = None
    df: Tensor | None = None
    weights: Tensor | None = None
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        shape = self.loc.shape
        if self.loc.ndim not in (2, 3) or self.loc.numel() == 0:
            raise ValueError(
                f"loc has shape {tuple(shape)}; expected (S, N) or (S, N, P) with at "
                "least one draw and one datum."
            )
        for name, value, like in [
            ("noise_scale", self.noise_scale, shape),
            ("loc_variance", self.loc_variance, shape),
            ("df", self.df, shape),
            ("weights", self.weights, shape[:1]),
            ("labels", self.labels, shape[1:]),
        ]:
            if value is not None and value.shape != like:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}; expected {tuple(like)}, "
                    f"by that of loc, {tuple(shape)}."
                )
            if value is None:
                continue
            wrong = value.isinf() if name == "labels" else ~value.isfinite()
            text = f"{name} has NaN or infinite values."
            require(~wrong.any(), partial(ValueError, text))
        is_right = self.loc.isfinite().all() & (self.noise_scale > 0).all()
        require(is_right, partial(ValueError, _LOC_AND_SCALE))
        if self.df is not None and self.loc_variance is not None:
            raise ValueError("df and loc_variance have no closed form together.")

    def __len__(self) -> int:
        """N."""
        return self.loc.shape[1]

    @property
    def has_label(self) -> Tensor:
        """Which outcomes have a label, (N,) or (N, P).

        Raises:
            ValueError: If there are no labels at all.
        """
        return ~self._labels("metrics").isnan()

    @cached_property
    def mean(self) -> Tensor:
        """Mean of a new outcome, (N,) or (N, P).

        Student's noise of at most 1 degree of freedom has none: that of the locations.
        """
        return self._average(self.loc)

    @cached_property
    def noise_variance(self) -> Tensor:
        """Mean variance of the noise, (N,) or (N, P): what more data would leave.

        Infinite for Student's noise of at most 2 degrees of freedom.
        """
        variance = self.noise_scale.square()
        if self.df is not None:  # Student's is ν / (ν - 2) times its scale's square
            finite = self.df > 2
            ratio = self.df / (self.df - 2).where(finite, torch.ones_like(self.df))
            variance = (variance * ratio).where(finite, variance.new_tensor(math.inf))
        return self._average(variance)

    @cached_property
    def weight_variance(self) -> Tensor:
        """Variance of the location under the posterior, (N,) or (N, P)."""
        between = self._average((self.loc - self.mean).square())
        if self.loc_variance is None:
            return between
        return between + self._average(self.loc_variance)

    def log_prob(self, values: Tensor) -> Tensor:
        """Log density of outcomes, nats, of their shape, (N,) or (N, P)."""
        log_prob: Tensor = self._by_draw().log_prob(values.to(self.loc))
        # log Σ_s π_s p_s(y)
        log_weights = self._pi.log().reshape(-1, *[1] * (log_prob.ndim - 1))
        return (log_prob + log_weights).logsumexp(0)

    def cdf(self, values: Tensor) -> Tensor:
        """Probability of a smaller outcome, of the values' shape, (N,) or (N, P)."""
        return self._cdf(values.to(self.loc).double()).to(self.loc)

    def _cdf(self, values: Tensor) -> Tensor:
        """In float64: tails of few degrees of freedom reach far."""
        z = (values - self.loc.double()) / self._scale.double()
        if self.df is None:
            below = torch.special.ndtr(z)
        else:
            below = _student_cdf(z, self.df.double(), self._whole)
        return torch.tensordot(self._pi.double(), below, 1)

    def quantile(self, probability: float) -> Tensor:
        """The value below which an outcome is with a probability, (N,) or (N, P).

        By bisection of the mixture's distribution function, on a scale of its own that
        reaches over all numbers: below one degree of freedom quantiles of .99 may be
        1e30. Beyond the largest number they are infinite.

        Args:
            probability: Above 0 and below 1, by 1e-12 at least.

        Raises:
            ValueError: If it isn't.
        """
        check_number("probability", probability)
        if not _LEAST <= probability <= 1 - _LEAST:
            raise ValueError(
                f"probability must be above 0 and below 1, by {_LEAST} at least, found "
                f"{probability}."
            )
        # y = center + unit sinh(u): u from -700 to 700 reaches all numbers, and near
        # the center steps are as even as in y.
        first, last = self.loc.double().aminmax(dim=0)
        center = (first + last) / 2
        unit = self._scale.double().amax(0) + (last - first) / 2
        low = torch.full_like(center, -_REACH)
        high = -low
        for _ in range(_NUM_BISECTIONS):
            middle = (low + high) / 2
            below = self._cdf(center + unit * middle.sinh()) < probability
            low, high = middle.where(below, low), high.where(below, middle)
        return (center + unit * ((low + high) / 2).sinh()).to(self.loc)

    def metrics(self, *, num_bootstrap: int = 0) -> dict[str, float]:
        r"""Quality against the labels, means over the data and outputs that have one.

        - ``nll``: mean of :math:`-\log p(y)`, nats, in the labels' unit.
        - ``rmse``: root of the mean squared error of the mean.
        - ``crps``: continuous ranked probability score, :math:`E|Y - y| - \frac12
          E|Y - Y'|` with the closed form of normal mixtures (Grimit et al. 2006); of
          normal noise only.
        - ``coverage``: share of the labels inside the central 90% interval.

        Args:
            num_bootstrap: As :meth:`Prediction.metrics`.

        Returns:
            Name -> value.

        Raises:
            ValueError: If there are no labels, or ``num_bootstrap`` is 1 or negative.
        """
        labelled = self.labelled("metrics")

        def replicate() -> dict[str, float]:
            rows = resampled(len(labelled), self.loc.device)
            return labelled._rows(rows)._metrics()

        return with_standard_errors(labelled._metrics(), num_bootstrap, replicate)

    def _metrics(self) -> dict[str, float]:
        given = self.has_label
        labels = self._labels("metrics").to(self.loc)
        labels = labels.where(given, self.mean)
        place = self.cdf(labels)
        tail = (1 - COVERAGE) / 2
        values = {
            "nll": -self.log_prob(labels)[given].mean(),
            "rmse": (self.mean - labels)[given].square().mean().sqrt(),
            "coverage": ((place > tail) & (place < 1 - tail))[given].double().mean(),
        }
        if self.df is None:
            values["crps"] = self._crps(labels)[given].mean()
        return {name: float(value) for name, value in values.items()}

    def _rows(self, rows: Tensor) -> Self:
        return rows_of(self, rows, _DIMS)

    @classmethod
    def _joined(cls, predictions: Sequence[Self]) -> Self:
        return joined(predictions, _DIMS)

    @property
    def _pi(self) -> Tensor:
        if self.weights is None:
            num_draws = len(self.loc)
            return self.loc.new_full((num_draws,), 1 / num_draws)
        return self.weights.to(self.loc) / self.weights.sum()

    def _average(self, values: Tensor) -> Tensor:
        return torch.tensordot(self._pi, values, 1)

    @cached_property
    def _scale(self) -> Tensor:
        if self.loc_variance is None:
            return self.noise_scale
        return (self.noise_scale.square() + self.loc_variance).sqrt()

    @cached_property
    def _whole(self) -> Tensor:
        """Of :func:`_student_cdf`."""
        assert self.df is not None
        angle = torch.full_like(self.df, math.pi / 2, dtype=torch.float64)
        return _cosine_integral(angle, self.df.double() + 2 * _NUM_RAISED)

    def _by_draw(self) -> td.Normal | td.StudentT:
        if self.df is None:
            return td.Normal(self.loc, self._scale)
        return td.StudentT(self.df, self.loc, self.noise_scale)

    def _crps(self, labels: Tensor) -> Tensor:
        # E|Y - y| - E|Y - Y'| / 2; Y - Y' of two normals is one, of both variances.
        variance, pi = self._scale.square(), self._pi
        score = self._average(_absolute_mean(labels - self.loc, variance))
        # One component against all at a time: (S, N) at once, not (S, S, N).
        for weight, loc, v in zip(pi, self.loc, variance, strict=True):
            pairs = _absolute_mean(self.loc - loc, variance + v)
            score = score - 0.5 * weight * self._average(pairs)
        return score


def _absolute_mean(mean: Tensor, variance: Tensor) -> Tensor:
    """E|X| of a normal X."""
    sd = variance.sqrt()
    z = mean / sd
    # E|X| = 2 σ φ(μ / σ) + μ (2 Φ(μ / σ) - 1)
    density = (-0.5 * z.square()).exp() / math.sqrt(2 * math.pi)
    return 2 * sd * density + mean * (2 * torch.special.ndtr(z) - 1)


def _student_cdf(z: Tensor, df: Tensor, whole: Tensor) -> Tensor:
    r"""Student's distribution function, float64; ``whole`` is W of the raised df.

    With :math:`z = \sqrt\nu \tan u` it is :math:`P_\nu = \int_0^u \cos^{\nu - 1} /
    W_\nu` of the way from 1/2 to 1, where :math:`W_\nu = \int_0^{\pi / 2} \cos^{\nu -
    1}`. The integrand has a pole below :math:`\nu = 1` and is no polynomial near there,
    so what is integrated has some more degrees of freedom, and :math:`P_\nu = P_{\nu +
    2} - \sin u \cos^\nu u / ((\nu + 1) W_{\nu + 2})` (by parts) leads down to
    :math:`\nu`.
    """
    ratio = z.abs() / df.sqrt()
    angle = ratio.atan()
    # log cos u, where the ratio's square is beyond what numbers can hold, too
    log_cos = -0.5 * ratio.clamp(max=_FAR).square().log1p()
    log_cos = log_cos.where(ratio < _FAR, -ratio.log())
    share = _cosine_integral(angle, df + 2 * _NUM_RAISED) / whole
    for step in reversed(range(_NUM_RAISED)):
        n = df + 2 * step
        share = share - angle.sin() * (n * log_cos).exp() / ((n + 1) * whole)
        whole = whole * (n + 1) / n
    return 0.5 + 0.5 * z.sign() * share


def _cosine_integral(angle: Tensor, df: Tensor) -> Tensor:
    """Of cos(u)^(df - 1) from 0 to an angle, by Gauss and Legendre."""
    # cos(u)^n < exp(-n u^2 / 2): beyond the reach nothing is left of it.
    angle = angle.minimum((2 * _NEGLIGIBLE / (df - 1)).sqrt())
    total = torch.zeros_like(angle)
    nodes, weights = angle.new_tensor(_NODES), angle.new_tensor(_NODE_WEIGHTS)
    for node, weight in zip(nodes.split(8), weights.split(8), strict=True):
        u = angle[..., None] * (0.5 * (1 + node))
        log_cos = 0.5 * (-u.sin().square()).log1p()  # exact where df is large, u small
        total += ((df[..., None] - 1) * log_cos).exp() @ weight
    return 0.5 * angle * total
