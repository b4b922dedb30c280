r"""The network linearised at its weights, as a model: its mode, leave-one-out.

With :math:`f(x; w) = f(x; \hat w) + J (w - \hat w)` and a Gaussian prior
:math:`N(c, T^{-1})` the contrasts z of all data are a Gaussian process,

.. math:: z = z_c + g, \qquad g \sim N(0, K), \qquad K = J T^{-1} J^T,

with :math:`z_c` their values at w = c. Its mode is :math:`g = K \alpha` with
:math:`\alpha` the gradient of the log likelihood there, which is n numbers, not D
weights; :math:`w = c + T^{-1} J^T \alpha` are the weights (Rasmussen & Williams 2006,
"Gaussian Processes for Machine Learning", sections 3.4 and 5.4.2).

Where the data's rows are given by coordinates in k others, :math:`J = \Phi U`, so is
:math:`g = \Phi h` with :math:`h \sim N(0, U T^{-1} U^T)`, and :math:`\alpha` is
:math:`\Phi^T` times that gradient: k numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_lora.curvature.dual_gaussian import (
    DualGaussian,
    EachRow,
    InSubspace,
    Roots,
    UnresolvedError,
    cholesky_of,
)
from pyro_lora.curvature.observations import Observations
from pyro_lora.curvature.weight_gaussian import WeightGaussian
from pyro_lora.ground.warning import warn
from pyro_lora.ground.weights import Weights

_MAX_STEPS = 200
_MAX_SCORING = 12  # steps with the Fisher information, which mostly is the Hessian
_CONVERGED = 1e-20  # gain of a Newton step, in nats for each nat of the objective
_CONVERGED_IN_SEARCH = 1e-8
_MISSED = 1e-6  # likewise, of a step that the line search can't take, or down
_ENOUGH, _LEAST_STEP = 1e-4, 1e-10  # of what a line search's step promises; a step
_JITTER = 1e-12  # of the kernel's mean diagonal, where contrasts are given weights
# Where the precision around the trained weights is looked for, in decades from the one
# at which a contrast has a prior variance of 1: at the first the weights stay.
_DECADES = (4.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0, -4.0)
_TINY = 1e-30  # of a network without gradients
_STEP = 1e-4  # of a contrast, for differences

Objective = Literal["evidence", "loo"]


@dataclass(frozen=True, eq=False)
class _At:
    """The likelihood of all data at contrasts.

    Attributes:
        log_likelihood: Nats.
        score: Gradient in the contrasts, (n,).
        fisher: Roots of the Fisher information in them.
        coordinates: Of the data's rows in the k.
    """

    log_likelihood: Tensor
    score: Tensor
    fisher: Roots
    coordinates: EachRow | InSubspace

    @cached_property
    def pull(self) -> Tensor:
        """Gradient in h, (k,)."""
        return self.coordinates.from_data(self.score)

    @cached_property
    def roots(self) -> Roots:
        """Roots of the Fisher information in h."""
        return self.coordinates.roots(self.fisher)


@dataclass(frozen=True, eq=False)
class LinearData:
    """What was observed, as a function of h, the Gaussian process at the k rows.

    Attributes:
        observations: In the order of the contrasts.
        coordinates: Of the data's rows in the k.
        offset: :math:`z_c`, (n,), float64.
    """

    observations: tuple[Observations, ...]
    coordinates: EachRow | InSubspace
    offset: Tensor

    def contrasts(self, h: Tensor) -> Tensor:
        """Z, (n,), at h (k,)."""
        return self.offset + self.coordinates.of_data(h)

    def at(self, h: Tensor) -> _At:
        """The likelihood at h, (k,)."""
        pairs = self._by_part(self.contrasts(h))
        values = [part.at(z) for part, z in pairs]
        return _At(
            torch.stack([at.log_prob.sum() for at in values]).sum(),
            torch.cat([at.score.flatten() for at in values]),
            Roots(tuple(at.root for at in values)),
            self.coordinates,
        )

    def hessian_times(self, h: Tensor, x: Tensor) -> Tensor:
        """The log likelihood's Hessian in h, times x (k, ...)."""
        pairs = self._by_part(self.contrasts(h))
        blocks = Roots(tuple(part.hessian(z) for part, z in pairs))
        coordinates = self.coordinates
        return coordinates.from_data(blocks.left(coordinates.of_data(x)))

    def log_det_score(self, kernel: Tensor, half: Tensor, h: Tensor) -> Tensor:
        r"""Gradient of :math:`\log \det (I + R^T K R)` in h, on which R depends, (k,).

        It is that of :math:`\sum_n \mathrm{tr}(\Sigma_{nn} W_n)` with the covariance
        :math:`\Sigma` fixed, by differences in each contrast of all outcomes at once.

        Args:
            kernel: K.
            half: V with :math:`\Sigma = K - V^T V`, (m, k).
            h: Where.
        """
        slopes, first = [], 0
        for part, z in self._by_part(self.contrasts(h)):
            rows = torch.arange(z.numel(), device=z.device).reshape(z.shape) + first
            first += z.numel()
            sigma = self.coordinates.covariance(kernel, half, rows)
            steps = _STEP * torch.eye(z.shape[1]).to(z)
            ends = [
                _trace(part, z + step, sigma) - _trace(part, z - step, sigma)
                for step in steps
            ]
            slopes.append(torch.stack(ends, 1).flatten() / (2 * _STEP))
        return self.coordinates.from_data(torch.cat(slopes))

    def hessian_roots(self, h: Tensor) -> Roots:
        """Roots of the Hessian's absolute value in place of the Fisher information."""
        pairs = self._by_part(self.contrasts(h))
        roots = Roots(tuple(part.hessian_root(z) for part, z in pairs))
        return self.coordinates.roots(roots)

    def _by_part(self, contrasts: Tensor) -> list[tuple[Observations, Tensor]]:
        sizes = [part.at_fit.numel() for part in self.observations]
        pairs = zip(self.observations, contrasts.split(sizes), strict=True)
        return [(part, z.reshape(part.at_fit.shape)) for part, z in pairs]


def _trace(part: Observations, contrasts: Tensor, sigma: Tensor) -> Tensor:
    """Of sigma W for each outcome, (N,)."""
    root = part.at(contrasts).root
    return ((sigma @ root) * root).sum((1, 2))


@dataclass(frozen=True, eq=False)
class LinearMode:
    """The mode of the linearised network.

    Attributes:
        data: What was observed.
        kernel: K of the k rows, (k, k).
        alpha: Gradient of the log likelihood in h, (k,); h = K alpha is the mode.
        at: The likelihood there.
        missing: Nats that one more Newton step would gain, or lose by rounding, where
            that's too many for a mode; else 0.
    """

    data: LinearData
    kernel: Tensor
    alpha: Tensor
    at: _At
    missing: float = 0.0

    @property
    def contrasts(self) -> Tensor:
        """Z at the mode, (n,)."""
        return self.data.contrasts(self.kernel @ self.alpha)

    @cached_property
    def root(self) -> Tensor:
        r"""The Cholesky factor of :math:`I + R^T K R`."""
        return cholesky_of(self.kernel, self.at.roots)

    @property
    def log_evidence(self) -> Tensor:
        """Laplace's, of the Gaussian process, nats (eq. 3.32)."""
        prior = 0.5 * self.alpha @ self.kernel @ self.alpha
        return self.at.log_likelihood - prior - self.root.diagonal().log().sum()


def find_mode(
    kernel: Tensor,
    data: LinearData,
    start: Tensor | None = None,
    tolerance: float = _CONVERGED,
) -> LinearMode:
    """The mode of :math:`z = z_c + g`, by Newton's method.

    First with the Fisher information in place of the Hessian, which it equals for most
    likelihoods; where that takes long, with the Hessian's absolute value.

    Args:
        kernel: K of the k rows, (k, k), float64.
        data: What was observed.
        start: A first alpha, taken where it is better than zero.
        tolerance: Of the relative gain of one more step.

    Returns:
        The mode. Where the likelihood isn't log-concave, a local one.
    """
    alpha = kernel.new_zeros(len(kernel))
    step = kernel @ alpha
    at = data.at(step)
    value = at.log_likelihood
    if start is not None:
        other = kernel @ start
        at_start = data.at(other)
        of_start = at_start.log_likelihood - 0.5 * start @ other
        if bool(of_start > value) or not bool(value.isfinite()):
            alpha, step, at, value = start, other, at_start, of_start
    missed = False
    for number in range(_MAX_STEPS):
        roots = at.roots
        if number >= _MAX_SCORING:  # Fisher's information is another than the Hessian
            roots = data.hessian_roots(step)
        # alpha' = v - R B^-1 R' K v with v = W g + s (algorithm 3.1, W = R R')
        v = roots.left(roots.right(step)) + at.pull
        inside = roots.right(kernel @ v)[:, None]
        solved = torch.cholesky_solve(inside, cholesky_of(kernel, roots))[:, 0]
        direction = v - roots.left(solved) - alpha
        move = kernel @ direction
        gain = (at.pull - alpha) @ move  # twice, of a whole step
        if not bool(gain > tolerance * (1 + value.abs())):
            # Far below 0 it's no step up, but what rounding has left of one.
            missed = not bool(gain > -_MISSED * (1 + value.abs()))
            break
        size = 1.0
        while True:
            ahead = alpha + size * direction
            new = data.at(step + size * move)
            further = new.log_likelihood - 0.5 * ahead @ (step + size * move)
            if bool(further >= value + _ENOUGH * size * gain) or size < _LEAST_STEP:
                break
            size /= 2
        if not bool(further > value):  # as good as the digits allow, or no step up
            missed = bool(gain > _MISSED * (1 + value.abs()))
            break
        alpha, step, at, value = ahead, step + size * move, new, further
    else:
        missed = True
    return LinearMode(data, kernel, alpha, at, float(gain.abs()) / 2 if missed else 0.0)


class FollowedEvidence:
    """Laplace's evidence of the linearised network, whose mode follows the prior.

    Args:
        gaussian: One that knows what was observed.
        mean: Of the prior, site -> value.
    """

    def __init__(self, gaussian: DualGaussian, mean: Weights) -> None:
        self._data = data_under(gaussian, mean)
        self._last: Tensor | None = None

    def __call__(self, kernel: Tensor) -> Tensor:
        """Nats, differentiable in K, (k, k)."""
        value: Tensor = _Evidence.apply(kernel, self)
        return value

    def mode(self, kernel: Tensor) -> LinearMode:
        """The mode under a kernel, from where the last one was."""
        found = find_mode(kernel, self._data, self._last)
        self._last = found.at.pull
        return found


class _Evidence(torch.autograd.Function):
    r"""Of K: :math:`\log p(y | h) - (\alpha^T K \alpha + \log \det B) / 2`.

    At the mode the first two terms don't change with h, and by the implicit function
    theorem :math:`dh = (I - K H)^{-1} dK\, \alpha`, with H the log likelihood's
    Hessian, moves the third (Rasmussen & Williams 2006, section 5.5.1).
    """

    @staticmethod
    def forward(ctx: Any, kernel: Tensor, evidence: FollowedEvidence) -> Tensor:
        ctx.mode = mode = evidence.mode(kernel.detach())
        return mode.log_evidence

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        mode: LinearMode = ctx.mode
        kernel, alpha, data = mode.kernel, mode.alpha, mode.data
        h = kernel @ alpha
        eye = torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
        inverse = torch.linalg.solve_triangular(
            mode.root, mode.at.roots.right(eye), upper=False
        )
        score = -0.5 * data.log_det_score(kernel, inverse @ kernel, h)
        # (I - H K)^-1 of the score, as the transpose of what moves h
        u = torch.linalg.solve(eye - data.hessian_times(h, kernel), score)
        moved = torch.outer(u, alpha)
        of_kernel = 0.5 * (torch.outer(alpha, alpha) - inverse.mT @ inverse)
        return gradients[0] * (of_kernel + 0.5 * (moved + moved.mT)), None


def leave_one_out(mode: LinearMode, kernel: Tensor) -> Tensor:
    """Log predictive density of each datum given all others, nats, (N,).

    The log densities of a datum's outcomes add up, whatever their scales.

    Args:
        mode: Under the prior that sets the mean, which leaving out moves.
        kernel: K under the prior that sets the width, (k, k).
    """
    observations = mode.data.observations
    result = mode.contrasts.new_zeros(observations[0].num_data)
    each = _each_left_out(mode, kernel)
    for part, log_prob in zip(observations, each, strict=True):
        result.index_add_(0, part.datum, log_prob)
    return result


def scaled_leave_one_out(mode: LinearMode, kernel: Tensor) -> Tensor:
    """The sum over all data, each outcome as often as it counts in the likelihood.

    Args:
        mode: As of :func:`leave_one_out`.
        kernel: Likewise.
    """
    each = _each_left_out(mode, kernel)
    pairs = zip(mode.data.observations, each, strict=True)
    return torch.stack([part.scale @ log_prob for part, log_prob in pairs]).sum()


def _each_left_out(mode: LinearMode, kernel: Tensor) -> list[Tensor]:
    r"""Log predictive density of each outcome given all other data, nats, (N,) a form.

    Exact for the Gaussian approximation: with :math:`\Sigma = (K^{-1} + W)^{-1}`, a
    datum without its own part has the covariance :math:`C = \Sigma_{nn} (I - W_n
    \Sigma_{nn})^{-1}` and the mean :math:`z_n - C s_n`. All of a datum's outcomes are
    left out together. What of its row lies outside of the span adds the prior's
    variance, as it does in a prediction.
    """
    observations, coordinates = mode.data.observations, mode.data.coordinates
    rows_of = torch.cat(
        [part.datum.repeat_interleave(part.at_fit.shape[1]) for part in observations]
    )
    if not len(rows_of):  # no outcome counts
        return [torch.zeros_like(part.scale) for part in observations]
    counts = rows_of.bincount()
    by_datum = rows_of.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    place = torch.empty_like(by_datum)  # of each row, among those of its datum
    place[by_datum] = torch.arange(len(by_datum), device=place.device)
    place = place - starts[rows_of]
    contrasts, at = mode.contrasts, mode.at
    mean = torch.empty_like(contrasts)
    covariance = mean.new_zeros(len(mean), int(counts.max()))
    of_mean = of_width = _half(mode.kernel, mode.root, at.roots)
    if kernel is not mode.kernel:
        of_width = _half(kernel, cholesky_of(kernel, at.roots), at.roots)
    for count in counts[counts > 0].unique().tolist():
        data = (counts == count).nonzero()[:, 0]
        rows = by_datum[starts[data][:, None] + torch.arange(count, device=data.device)]
        w = _fisher_blocks(at.fisher, observations, rows)
        c = _without_own(coordinates.covariance(kernel, of_width, rows), w)
        covariance[rows, :count] = c + coordinates.outside(kernel, rows)
        if of_mean is not of_width:
            c = _without_own(coordinates.covariance(mode.kernel, of_mean, rows), w)
        mean[rows] = contrasts[rows] - (c @ at.score[rows][..., None])[..., 0]
    each, first = [], 0
    for part in observations:
        size, width = part.at_fit.shape
        rows = torch.arange(first, first + size * width, device=place.device)
        rows = rows.reshape(size, width)
        first += size * width
        own = covariance[rows[:, :, None], place[rows][:, None, :]]
        each.append(part.log_predictive(mean[rows], own))
    return each


def _half(kernel: Tensor, root: Tensor, roots: Roots) -> Tensor:
    r"""V with :math:`\Sigma = K - V^T V`, (k, n)."""
    return torch.linalg.solve_triangular(root, roots.right(kernel), upper=False)


def _without_own(sigma: Tensor, w: Tensor) -> Tensor:
    """C of some data, (data, rows, rows)."""
    eye = torch.eye(sigma.shape[1], dtype=sigma.dtype, device=sigma.device)
    c = torch.linalg.solve(eye - sigma @ w, sigma)
    return (c + c.mT) / 2


def _fisher_blocks(
    roots: Roots, observations: tuple[Observations, ...], rows: Tensor
) -> Tensor:
    """W of some data, (data, rows, rows), zero between outcomes."""
    blocks, outcome, inner = [], [], []
    first = 0
    for block, part in zip(roots.blocks, observations, strict=True):
        size, width = part.at_fit.shape
        w = block @ block.mT
        blocks.append(w)
        outcome.append(
            torch.arange(first, first + size, device=rows.device).repeat_interleave(
                width
            )
        )
        inner.append(torch.arange(width, device=rows.device).repeat(size))
        first += size
    widest = max(w.shape[-1] for w in blocks)
    padded = torch.cat(
        [
            torch.nn.functional.pad(
                w, (0, widest - w.shape[-1], 0, widest - w.shape[-1])
            )
            for w in blocks
        ]
    )
    of, at = torch.cat(outcome)[rows], torch.cat(inner)[rows]
    found = padded[of[:, :, None], at[:, :, None], at[:, None, :]]
    return found * (of[:, :, None] == of[:, None, :])


def data_under(gaussian: DualGaussian, mean: Weights) -> LinearData:
    """What was observed, as a function of the process with a mean.

    Args:
        gaussian: One that knows what was observed.
        mean: Of the prior, site -> value.
    """
    at_fit = torch.cat([p.at_fit.flatten() for p in gaussian.observations])
    origin = LinearData(gaussian.observations, gaussian.coordinates, at_fit)
    return replace(
        origin, offset=origin.contrasts(_rows_at(gaussian, mean, gaussian.origin))
    )


def _rows_at(gaussian: DualGaussian, weights: Weights, center: Weights) -> Tensor:
    """The rows times what weights are away from a center, (k,), float64."""
    moved = {s: (weights[s] - center[s])[None] for s in gaussian.loc}
    return gaussian.rows.dot(moved)[0]


def log_leave_one_out(gaussian: DualGaussian) -> Tensor:
    """Of each datum given all others, nats, (N,): :func:`leave_one_out` of a Gaussian.

    Args:
        gaussian: One that knows what was observed.
    """
    return leave_one_out(*_mode_and_kernel(gaussian))


def leave_one_out_score(gaussian: DualGaussian) -> float:
    """Likewise :func:`scaled_leave_one_out`.

    Args:
        gaussian: One that knows what was observed.
    """
    return float(scaled_leave_one_out(*_mode_and_kernel(gaussian)))


def _mode_and_kernel(gaussian: DualGaussian) -> tuple[LinearMode, Tensor]:
    """The mode that a Gaussian is at, and the K of its width."""
    data = data_under(gaussian, gaussian.loc)
    kernel = of_mode = gaussian.rows.kernel(gaussian.prior_precision)
    if gaussian.mode_precision is not None:
        of_mode = gaussian.rows.kernel(gaussian.mode_precision)
        kernel = of_mode if torch.equal(kernel, of_mode) else kernel
    stays = of_mode.new_zeros(len(of_mode))
    return LinearMode(data, of_mode, stays, data.at(stays)), kernel


def at_mode_under(
    gaussian: DualGaussian, mean: Weights, precision: Weights
) -> tuple[DualGaussian, Tensor]:
    """The Gaussian at the mode of the linearised network under a normal prior.

    Args:
        gaussian: One that knows what was observed.
        mean: Of the prior, site -> value.
        precision: Of the prior, site -> tau.

    Returns:
        The same rows and prior precision, around the mode; and the log likelihood
        there, nats.

    Warns:
        UserWarning: If it isn't found.
    """
    tau = gaussian.rows.by_matrix(precision)
    kernel = gaussian.rows.kernel(tau)
    start = None
    if mean is not gaussian.origin:  # where the mean is now, as K alpha
        distance = _rows_at(gaussian, gaussian.loc, mean)
        jitter = _JITTER * kernel.diagonal().mean()
        inside = kernel + jitter * torch.eye(
            len(kernel), dtype=kernel.dtype, device=kernel.device
        )
        root, info = torch.linalg.cholesky_ex(inside)
        if not int(info):
            start = torch.cholesky_solve(distance[:, None], root)[:, 0]
    mode = find_mode(kernel, data_under(gaussian, mean), start)
    if mode.missing:
        warn(
            "The mode of the linearised network isn't found: one more Newton step "
            f"should change the log joint by {mode.missing:.3g} nats. The likelihood "
            "may have kinks, as Laplace's, its rate overflow, or a noise scale that "
            "the network outputs go to 0. A larger prior precision may help."
        )
    return _moved(gaussian, mean, tau, mode), mode.at.log_likelihood


def near_weights(
    gaussian: DualGaussian, objective: Objective
) -> tuple[DualGaussian, Tensor]:
    r"""The Gaussian at the mode under :math:`N(\hat w, 1 / \tau_0)`.

    Around the weights :math:`\hat w` at which the network is linearised;
    :math:`\tau_0`, one number, is that with the best leave-one-out log density or
    evidence of this prior. At infinity the weights stay.

    Args:
        gaussian: One that knows what was observed.
        objective: ``"evidence"`` or ``"loo"``.

    Returns:
        The same rows and prior precision, around the mode; and the log likelihood
        there, nats.

    Warns:
        UserWarning: If the mode isn't found.
    """
    ones = {site: x.new_ones(()) for site, x in gaussian.loc.items()}
    gram = gaussian.rows.kernel(ones)
    data = data_under(gaussian, gaussian.origin)
    variance = gaussian.coordinates.variance(gram)
    scale = float(variance.sum()) / max(len(variance), 1)
    first = math.log10(max(scale, _TINY))
    last: Tensor | None = None

    def score(log_tau: float) -> float:
        nonlocal last
        kernel = gram / 10**log_tau
        mode = find_mode(kernel, data, last, _CONVERGED_IN_SEARCH)
        last = mode.at.pull
        if objective == "evidence":
            return float(mode.log_evidence)
        return float(scaled_leave_one_out(mode, kernel))

    best = largest(score, [first + x for x in _DECADES])
    precision = {site: x * 10**best for site, x in ones.items()}
    return at_mode_under(gaussian, gaussian.origin, precision)


def largest(score: Callable[[float], float], points: Sequence[float]) -> float:
    """Where a function of one number is largest: at points, then around the best one.

    Args:
        score: The function.
        points: Where to look first; the largest is within them.
    """

    def finite(x: float) -> float:
        try:
            value = score(x)
        except UnresolvedError:
            return -math.inf
        return value if math.isfinite(value) else -math.inf

    values = {x: finite(x) for x in points}
    best = max(values, key=lambda x: values[x])
    sides = [x for x in (best - 0.5, best + 0.5) if min(points) < x < max(points)]
    values |= {x: finite(x) for x in sides}
    if len(sides) == 2:
        # The vertex of the parabola through these three
        low, middle, high = (values[x] for x in (sides[0], best, sides[1]))
        bend = low - 2 * middle + high
        vertex = best + 0.25 * (low - high) / bend if bend < 0 else best
        if sides[0] < vertex < sides[1]:
            values[vertex] = finite(vertex)
    return max(values, key=lambda x: values[x])


def checked(gaussian: WeightGaussian) -> DualGaussian:
    """The Gaussian, if it knows what was observed.

    Args:
        gaussian: Any.

    Raises:
        ValueError: If it doesn't.
    """
    if not isinstance(gaussian, DualGaussian) or not gaussian.observations:
        raise ValueError(
            "Refining the mode and leaving data out need the linearised network as a "
            "model of its own. Fit with AutoLaplace(model, structure="
            "structures.Exact(), fisher='exact'). Tokens of a vocabulary have no exact "
            "Fisher information: there fit a model of the answers, such as "
            "models.multiple_choice, or train on."
        )
    return gaussian


def _moved(
    gaussian: DualGaussian, center: Weights, tau: Weights, mode: LinearMode
) -> DualGaussian:
    step = gaussian.rows.spread(mode.alpha[None])
    # The rows may be wider than the network, of a file for one, which has the weights'.
    loc = {
        site: (center[site] + step[site][0] / tau[site].to(step[site])).to(x)
        for site, x in gaussian.origin.items()
    }
    return replace(gaussian, loc=loc, roots=mode.at.roots, mode_precision=tau)
