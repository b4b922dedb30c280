"""Gaussian logits and the integrals of class probabilities over them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.quasirandom import SobolEngine

from pyro_lora.ground.autocast import OutsideAutocast
from pyro_lora.ground.interrupts import unvalidated
from pyro_lora.ground.memory import constant
from pyro_lora.ground.summary import FieldsShown

# Sobol points. The error in a probability is 1e-4 at most for 3 classes and logits of
# sd 1, .003 for 5 classes and sd 10.
_NUM_POINTS = 4096
# Of a mixture that is kept for each datum.
_NUM_JOINT_POINTS = 256
_NUM_JOINT_NUMBERS = 2**14  # points times parameters, where that is more
# Nodes in standard deviations. The trapezoid rule converges exponentially: where the
# likelihood has a width of w of them, its error is about exp(-2 (pi w / step)^2).
_REACH, _STEP = 8.0, 0.02
# The same over a scale's logarithm, in which a normal density has a width of .5 or so:
# up to an sd of 1 the error is 1e-8, at 2 it's 1e-4.
_SCALE_REACH, _SCALE_STEP = 10.0, 0.2
_MOST_LOG_SCALE = 300.0  # the square of exp of it is a number, and of -300 isn't 0
_WIDE = 1.5  # sd from which the integral doesn't run over the noise


@dataclass(frozen=True, eq=False, repr=False)
class GaussianLogits(OutsideAutocast, FieldsShown):
    r"""A Gaussian over the logits of each datum (their mean over classes removed).

    :math:`N(f(x, \hat w) + J (\mu - \hat w), J P^{-1} J^T)`, of the network linearised
    at the weights :math:`\hat w`, which are the mean :math:`\mu` unless it was refined
    (Immer et al. 2021, https://arxiv.org/abs/2008.08400, eq. 8).

    Attributes:
        mean: (B, C), or (B, T, C) for T tokens.
        covariance_matrix: (B, C, C) or (B, T, C, C), singular: only C - 1 contrasts
            vary. A Normal likelihood has its C locations, and a regular one.
        noise_variance: Of a Normal likelihood, where it's linearised, (B, C); None
            for classes, and where the network outputs it.
        cutpoints: Of ordered classes, (B, C - 1) or (B, T, C - 1): the Gaussian is then
            over their one predictor, mean (B, 1), and the cutpoints are held at their
            values there, learned or not. None for others.
        numbers: Where outcomes are numbers, such as counts: their distribution at
            values (..., B, P) of the predictor, the Gaussian's, of P outputs. None for
            classes, and for some tokens of all.
        are_all_there: Whether each datum is known to have all choices.
        has_scale: Whether the network outputs a Normal's scale, too: the Gaussian is
            then over the location and the scale's logarithm of each of P outputs, one
            after the other, mean (B, 2 P).

    A choice that isn't there has mean -inf.
    """

    mean: Tensor
    covariance_matrix: Tensor
    noise_variance: Tensor | None = None
    cutpoints: Tensor | None = None
    numbers: Callable[[Tensor], Any] | None = None
    are_all_there: bool = False
    has_scale: bool = False

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Draws of the logits, ``(*sample_shape, B, C)``."""
        noise = torch.randn(
            *sample_shape,
            *self.mean.shape,
            dtype=self.mean.dtype,
            device=self.mean.device,
        )
        root = self._root.to(self.mean)
        return self.mean + (root @ noise[..., None])[..., 0]

    @cached_property
    def _root(self) -> Tensor:
        """That of the covariance; an eigendecomposition waits for a GPU."""
        return _square_root(self.covariance_matrix)

    @property
    def predictive_variance(self) -> Tensor:
        """Variance of a new outcome, (B, P): its location's and the noise.

        Raises:
            ValueError: If the outcomes are classes.
        """
        if self.has_scale:
            # E[exp(2 g)] = exp(2 m + 2 v) of g ~ N(m, v)
            log_scale, variance = self.mean[..., 1::2], self._variance[..., 1::2]
            return self._variance[..., ::2] + (2 * (log_scale + variance)).exp()
        if self.noise_variance is None:
            raise ValueError(
                "The outcomes are classes, so there is no noise to add. Use "
                ".covariance_matrix, or class probabilities by predict."
            )
        return self._variance + self.noise_variance

    @property
    def _variance(self) -> Tensor:
        return self.covariance_matrix.diagonal(dim1=-2, dim2=-1)

    def given_scale(self) -> tuple[list[GaussianLogits], Tensor]:
        r"""Gaussians of the locations alone, of which this one is a mixture.

        Of a location f and a scale's logarithm g, :math:`N(f, g) = N(g) N(f | g)`, and
        given g the noise is known. So :math:`p(y) = \int N(y; E[f | g], Var[f | g] +
        e^{2 g}) N(g) dg`, here at the nodes g_q of a trapezoid rule: the sum over q of
        :math:`\pi_q N(y; m_q, v + e^{2 g_q})`. Outputs are each by themselves.

        Returns:
            Q of them, (B, P), with the noise's variance, and weights (Q,) that sum to
            one; itself alone where the scale is no output.
        """
        if not self.has_scale:
            return [self], self.mean.new_ones(1, dtype=torch.float64)
        mean, variance = self.mean.double(), self._variance.double().clamp_min(0)
        both = self.covariance_matrix.double().diagonal(1, -2, -1)[..., ::2]
        sd = variance[..., 1::2].sqrt()
        # With g = m + sd z: f is N(mean + slope z, its own variance less slope²).
        slope = (both / sd).where(sd > 0, torch.zeros_like(sd))
        left = torch.diag_embed((variance[..., ::2] - slope.square()).clamp_min(0))
        number = round(2 * _SCALE_REACH / _SCALE_STEP) + 1
        z = torch.linspace(
            -_SCALE_REACH, _SCALE_REACH, number, dtype=mean.dtype, device=mean.device
        )
        bound = _MOST_LOG_SCALE
        parts = [
            GaussianLogits(
                mean[..., ::2] + slope * at,
                left,
                (2 * (mean[..., 1::2] + sd * at).clamp(-bound, bound)).exp(),
            )
            for at in z
        ]
        weights = _density(z)
        return parts, weights / weights.sum()

    def components(self) -> tuple[Any, Tensor]:
        r"""Distributions of numbers whose weighted mean is the predictive one.

        :math:`p(y) = \int p(y | f) N(f) df`, the trapezoid rule over each output by
        itself, which resolves a likelihood of a hundredth of the Gaussian's width;
        quasi-Monte Carlo where several parameters make one outcome (the logits of a
        multinomial, a location and a scale), which resolves one of about a third of it.

        Returns:
            A distribution of batch shape (Q, B, ...), and Q weights that sum to one.

        Raises:
            ValueError: If the outcomes are classes.
        """
        if self.numbers is None:
            raise ValueError("The outcomes are classes. Use pyro_lora.integrals.")
        # Far out a rate may be infinite, where no outcome has a density.
        with torch.no_grad(), unvalidated():
            return self._components(self.numbers)

    def _components(self, numbers: Callable[[Tensor], Any]) -> tuple[Any, Tensor]:
        mean = self.mean.double()
        fn, num_parameters = numbers(mean), mean.shape[-1]
        by_itself = num_parameters == 1 or fn.batch_shape == mean.shape
        if fn.event_shape or not by_itself:  # several parameters make one outcome
            wanted = max(_NUM_JOINT_NUMBERS // num_parameters, _NUM_JOINT_POINTS)
            number = 2 ** int(math.log2(wanted))  # of which Sobol's points are even
            at_points = numbers(_sobol_logits(self, number))
            return at_points, mean.new_full((number,), 1 / number)
        variance = self._variance.double()
        number = round(2 * _REACH / _STEP) + 1
        z = torch.linspace(
            -_REACH, _REACH, number, dtype=mean.dtype, device=mean.device
        )
        sd = variance.clamp_min(0).sqrt()
        weights = _density(z)
        return numbers(mean + sd * z[:, None, None]), weights / weights.sum()

    def log_prob(self, values: Tensor) -> Tensor:
        """Log density of numbers, nats, float64, of their batch shape.

        Args:
            values: Outcomes, (B,), (B, P) of several outputs.
        """
        fn, weights = self.components()
        log_prob: Tensor = fn.log_prob(values.to(self.mean.device).double())
        return mixture_log_prob(log_prob, weights)


def mixture_log_prob(log_prob: Tensor, weights: Tensor) -> Tensor:
    """Log density of a mixture, nats, from its components' at one outcome each.

    Args:
        log_prob: (S, ...), NaN where a component's parameters overflow, which then has
            no density.
        weights: (S,), that sum to one.

    Returns:
        (...).
    """
    seen = log_prob.masked_fill(log_prob.isnan(), -math.inf)
    log_weights = weights.log().reshape(-1, *[1] * (seen.ndim - 1))
    return (seen + log_weights).logsumexp(0)


@dataclass(frozen=True, eq=False, repr=False)
class JointGaussianLogits(OutsideAutocast, FieldsShown):
    """One Gaussian over the logits of all data of a batch.

    Attributes:
        mean: (B, C), or (B, T, C) for T tokens.
        covariance_matrix: The mean's shape twice, (B, C, B, C): of logit c of datum b
            with logit d of datum a at [b, c, a, d].
        noise_variance: As in :class:`GaussianLogits`; independent across data.
        cutpoints: As in :class:`GaussianLogits`.
        numbers: As in :class:`GaussianLogits`.
        are_all_there: As in :class:`GaussianLogits`.
        has_scale: As in :class:`GaussianLogits`.
    """

    mean: Tensor
    covariance_matrix: Tensor
    noise_variance: Tensor | None = None
    cutpoints: Tensor | None = None
    numbers: Callable[[Tensor], Any] | None = None
    are_all_there: bool = False
    has_scale: bool = False

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Draws of the logits, ``(*sample_shape, B, C)``, correlated across data."""
        size = self.mean.numel()
        flat = GaussianLogits(
            self.mean.reshape(size), self.covariance_matrix.reshape(size, size)
        )
        return flat.rsample(sample_shape).reshape(*sample_shape, *self.mean.shape)

    def marginals(self) -> GaussianLogits:
        """The Gaussian of each datum by itself."""
        shape, num_logits = self.mean.shape, self.mean.shape[-1]
        rows = self.mean.numel() // num_logits
        blocks = self.covariance_matrix.reshape(rows, num_logits, rows, num_logits)
        each = blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)
        return GaussianLogits(
            self.mean,
            each.reshape(*shape, num_logits),
            self.noise_variance,
            self.cutpoints,
            self.numbers,
            self.are_all_there,
            self.has_scale,
        )

    def log_probs_of(self, values: Tensor) -> Tensor:
        """Log probabilities (..., B, C), float64, of draws by :meth:`rsample`."""
        if self.cutpoints is None:
            return values.double().log_softmax(-1)
        return _ordered_log_probs(
            self.cutpoints.double() - values.double(), torch.nn.functional.logsigmoid
        )


def _of_choices(
    integral: Callable[[GaussianLogits], Tensor], *, by_class: bool = True
) -> Callable[[GaussianLogits], Tensor]:
    """The integral of each datum over the choices that it has."""

    @wraps(integral)
    def of_choices(logits: GaussianLogits) -> Tensor:
        if logits.are_all_there or logits.cutpoints is not None:
            return integral(logits)
        present = logits.mean > -math.inf
        if bool(present.all()):
            return integral(logits)
        num_classes = present.shape[-1]
        mean, on = logits.mean.flatten(0, -2), present.flatten(0, -2)
        covariance = logits.covariance_matrix.reshape(-1, num_classes, num_classes)
        result = mean.new_full((len(mean), num_classes), -math.inf, dtype=torch.float64)
        for choices in on.unique(dim=0):
            rows = (on == choices).all(-1).nonzero()[:, 0]
            at = choices.nonzero()[:, 0]
            of_present = GaussianLogits(
                mean[rows[:, None], at],
                covariance[rows[:, None, None], at[:, None], at],
            )
            value = torch.zeros_like(result[rows[:, None], at])  # of one choice: sure
            if len(at) > 1:
                value = integral(of_present)
            result[rows[:, None], at] = value.reshape(len(rows), -1)
        if by_class:
            return result.reshape(present.shape)
        return result.amax(-1).reshape(present.shape[:-1])  # the same at every choice

    return of_choices


@_of_choices
def class_log_probs(logits: GaussianLogits) -> Tensor:
    r"""Log of :math:`E[\mathrm{softmax}(f)]` for Gaussian f.

    Two classes: a relative error below 1e-8 of both probabilities, at any standard
    deviation, and where one is as small as exp(-1e6).
    More classes: quasi-Monte Carlo with 4096 fixed Sobol points, an absolute error of
    1e-4 for narrow Gaussians and .003 for wide ones.

    Args:
        logits: Mean (B, C) and covariance (B, C, C), C of at least two.

    Returns:
        Log-probabilities, (B, C), float64, nats.

    Raises:
        ValueError: If there is one output only, which has no classes.
    """
    if logits.cutpoints is not None:
        splits, variance = _ordered_splits(logits)
        spread = variance.sqrt().expand_as(splits)
        return _ordered_log_probs(splits, lambda x: _log_expected_sigmoid(x, spread))
    mean, sd = _binary(logits)
    if sd is None:
        return _sobol_logits(logits).log_softmax(-1).logsumexp(0) - math.log(
            _NUM_POINTS
        )
    return torch.stack(
        [_log_expected_sigmoid(-mean, sd), _log_expected_sigmoid(mean, sd)], -1
    )


@_of_choices
def probit(logits: GaussianLogits) -> Tensor:
    r"""Log of :math:`E[\mathrm{softmax}(f)]` by MacKay's probit approximation.

    Two classes (MacKay 1992, "The evidence framework applied to classification
    networks"): :math:`\sigma(m / \sqrt{1 + \pi v / 8})` for the logit
    :math:`f_1 - f_0 \sim N(m, v)`. More classes:

    .. math:: 1 / p_k = 1 + \sum_{i \ne k} \exp(-m_{ki} / \sqrt{1 + \pi v_{ki} / 8})

    over the differences :math:`f_k - f_i \sim N(m_{ki}, v_{ki})`, normalised, the
    pairwise mean field of Lu, Ie & Sha (2020), https://arxiv.org/abs/2006.07584. Unlike
    a softmax of rescaled logits it doesn't depend on how the logits' common shift is
    fixed.

    Its absolute error is below .02 for two classes. For up to ten it is about .01 on
    average and at most .15 where logits have an sd of 1, and at most .3 where it is 5.

    Args:
        logits: Mean (B, C) and covariance (B, C, C), C of at least two.

    Returns:
        Log-probabilities, (B, C), float64, nats.

    Raises:
        ValueError: If there is one output only, which has no classes.

    >>> wide = GaussianLogits(torch.tensor([[-1.0, 1.0]]), 4 * torch.eye(2)[None])
    >>> probit(wide).exp()
    tensor([[0.2723, 0.7277]], dtype=torch.float64)
    """
    if logits.cutpoints is not None:
        splits, variance = _ordered_splits(logits)
        scaled = splits / (1 + math.pi / 8 * variance).sqrt()
        return _ordered_log_probs(scaled, torch.nn.functional.logsigmoid)
    mean, covariance = _classes(logits)
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    both = variance[..., :, None] + variance[..., None, :] - 2 * covariance
    # [k, i] is f_i - f_k; where i is k it is 0, the 1 of the sum.
    difference = mean[..., None, :] - mean[..., :, None]
    scaled = difference / (1 + math.pi / 8 * both.clamp_min(0)).sqrt()
    return (-scaled.logsumexp(-1)).log_softmax(-1)


@partial(_of_choices, by_class=False)
def expected_entropy(logits: GaussianLogits) -> Tensor:
    r""":math:`E[H(\mathrm{softmax}(f))]` for Gaussian f, by the same integrals.

    Args:
        logits: Mean (B, C) and covariance (B, C, C), C of at least two.

    Returns:
        Entropy, (B,), float64, nats.

    Raises:
        ValueError: If there is one output only.
    """
    if logits.cutpoints is not None:
        return _expected_ordered_entropy(logits)
    mean, sd = _binary(logits)
    if sd is None:
        log_p = _sobol_logits(logits).log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1).mean(0)
    # Narrow: trapezoid over the noise. Wide: over the logit, where H has width ~ 1.
    z = torch.arange(-9, 9.01, 0.05, dtype=mean.dtype, device=mean.device)
    shifted = mean[..., None] + sd[..., None] * z
    narrow = (_binary_entropy(shifted) * _density(z)).sum(-1)
    f = torch.arange(-45, 45.01, 0.1, dtype=mean.dtype, device=mean.device)
    wide_sd = sd.clamp_min(_WIDE)[..., None]
    wide = (
        _binary_entropy(f) * _density((f - mean[..., None]) / wide_sd) / wide_sd
    ).sum(-1)
    return torch.where(sd < _WIDE, narrow * 0.05, wide * 0.1)


def _ordered_splits(logits: GaussianLogits) -> tuple[Tensor, Tensor]:
    """Cutpoints less the predictor's mean (..., C - 1), and its variance (..., 1)."""
    assert logits.cutpoints is not None
    splits = logits.cutpoints.double() - logits.mean.double()
    return splits, logits.covariance_matrix.double()[..., 0].clamp_min(0)


def _ordered_log_probs(
    splits: Tensor, log_sigmoid: Callable[[Tensor], Tensor]
) -> Tensor:
    """Log probabilities (..., C) from log P(y <= k) = log_sigmoid(splits_k)."""
    below = pad(log_sigmoid(splits), (0, 1), value=0.0)  # log P(y <= k)
    above = pad(log_sigmoid(-splits), (1, 0), value=0.0)  # log P(y >= k)
    # The difference of the smaller two of each class cancels least.
    low = pad(below[..., :-1], (1, 0), value=-math.inf)
    high = pad(above[..., 1:], (0, 1), value=-math.inf)
    upper = below.where(below < above, above)
    lower = low.where(below < above, high)
    return upper + torch.log1p(-(lower - upper).exp().clamp_max(1))


def _expected_ordered_entropy(logits: GaussianLogits) -> Tensor:
    splits, variance = _ordered_splits(logits)
    sd = variance.sqrt()  # (..., 1)
    z = torch.arange(-9, 9.01, 0.05, dtype=sd.dtype, device=sd.device)
    reach = float(splits.abs().max()) + 45
    f = torch.arange(-reach, reach, 0.1, dtype=sd.dtype, device=sd.device)

    def entropy(predictor: Tensor) -> Tensor:  # (..., points)
        by_point = splits[..., None, :] - predictor[..., None]
        log_p = _ordered_log_probs(by_point, torch.nn.functional.logsigmoid)
        return torch.special.entr(log_p.exp()).sum(-1)

    # Narrow: over the noise. Wide: over the predictor, as of two classes.
    narrow = (entropy(sd * z) * _density(z)).sum(-1) * 0.05
    wide_sd = sd.clamp_min(_WIDE)
    wide = (entropy(f.expand(*sd.shape[:-1], -1)) * _density(f / wide_sd)).sum(-1)
    return torch.where(sd[..., 0] < _WIDE, narrow, wide * 0.1 / wide_sd[..., 0])


def _binary(logits: GaussianLogits) -> tuple[Tensor, Tensor | None]:
    """Mean and sd of the one contrast f_1 - f_0; sd None for more classes."""
    mean, covariance = _classes(logits)
    if mean.shape[-1] > 2:
        return mean, None
    # No list of numbers, whose copy to a GPU would wait: (-1, 1).
    contrast = 2 * torch.arange(2, dtype=mean.dtype, device=mean.device) - 1
    variance = contrast @ covariance @ contrast
    return mean @ contrast, variance.clamp_min(0).sqrt()


def _classes(logits: GaussianLogits) -> tuple[Tensor, Tensor]:
    """Mean and covariance in float64.

    Raises:
        ValueError: If there are no classes.
    """
    is_real = logits.noise_variance is not None or logits.numbers is not None
    if logits.mean.shape[-1] == 1 or is_real:
        raise ValueError(
            f"The likelihood has {logits.mean.shape[-1]} real output(s) and no classes,"
            " so there are no class probabilities. Use .mean, .covariance_matrix and "
            ".predictive_variance of the linearized output."
        )
    return logits.mean.double(), logits.covariance_matrix.double()


def _log_expected_sigmoid(mean: Tensor, sd: Tensor) -> Tensor:
    # Narrow: the integrand over the noise z is analytic in a strip, so the trapezoid
    # rule converges exponentially.
    z = torch.arange(-9, 9.01, 0.05, dtype=mean.dtype, device=mean.device)
    shifted = mean[..., None] + sd[..., None] * z
    narrow = (torch.nn.functional.logsigmoid(shifted) + _log_density(z)).logsumexp(-1)
    # Wide: a series for the smaller of the two probabilities.
    smaller = _log_wide_sigmoid(-mean.abs(), sd.clamp_min(_WIDE))
    wide = smaller.where(mean < 0, torch.log1p(-smaller.exp()))
    return torch.where(sd < _WIDE, narrow + math.log(0.05), wide)


def _log_wide_sigmoid(mean: Tensor, sd: Tensor) -> Tensor:
    r"""Log of E sigmoid(f) for a mean of at most 0.

    Geometric series of the sigmoid on both sides of 0 give, with :math:`a = m / s` and
    Mills' ratio :math:`R(x) = \int_0^\infty e^{-x t - t^2 / 2} dt`,

    .. math:: E \sigma(f) = \phi(a) \Bigl[\sum_{k \ge 1} (-1)^{k-1} R(k s + a)
              + \sum_{k \ge 0} (-1)^k R(k s - a)\Bigr].

    Both are alternating sums of a moment sequence, and positive, so that none cancels.
    """
    terms = torch.arange(len(_ALTERNATING), dtype=mean.dtype, device=mean.device)
    m, s = mean[..., None], sd[..., None]

    def log_summands(k: Tensor, sign: int) -> Tensor:
        # phi(a) R(x) is Phi(-x) exp((x^2 - a^2) / 2), where the squares would cancel.
        x = k * s + sign * m / s
        left = k * (sign * m + k * s.square() / 2) + torch.special.log_ndtr(-x)
        ratio = torch.special.erfcx(x.clamp_min(0) / math.sqrt(2))
        right = (ratio / 2).log() - (m / s).square() / 2
        return torch.where(x < 0, left, right)

    log_terms = torch.cat([log_summands(terms + 1, 1), log_summands(terms, -1)], -1)
    largest = log_terms.amax(-1, keepdim=True)
    weights = _alternating(mean.dtype, mean.device).repeat(2)
    return largest[..., 0] + ((log_terms - largest).exp() @ weights).log()


def _alternating_weights(number: int) -> list[float]:
    """Weights of the first terms of an alternating sum of moments.

    Its relative error is below 2 / 5.8^n (Cohen, Rodriguez Villegas & Zagier 2000,
    "Convergence acceleration of alternating series", algorithm 1).
    """
    scale = (3 + math.sqrt(8)) ** number
    scale = (scale + 1 / scale) / 2
    step, rest, weights = -1.0, -scale, []
    for k in range(number):
        rest = step - rest
        weights.append(rest / scale)
        step *= (k + number) * (k - number) / ((k + 0.5) * (k + 1))
    return weights


_ALTERNATING = _alternating_weights(20)


@constant
def _alternating(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(_ALTERNATING, dtype=dtype, device=device)


def _log_density(z: Tensor) -> Tensor:
    return -0.5 * z.square() - 0.5 * math.log(2 * math.pi)


def _density(z: Tensor) -> Tensor:
    return _log_density(z).exp()


def _binary_entropy(f: Tensor) -> Tensor:
    # H = log(1 + e^-|f|) + |f| sigmoid(-|f|)
    size = f.abs()
    return torch.log1p((-size).exp()) + size * (-size).sigmoid()


def _sobol_logits(logits: GaussianLogits, num_points: int = _NUM_POINTS) -> Tensor:
    mean = logits.mean.double()  # (B, C)
    normal = _sobol_points(mean.shape[-1], num_points, mean.device)
    return mean + torch.einsum("...cd,sd->s...c", logits._root, normal)


@constant
def _sobol_points(num_dims: int, number: int, device: torch.device) -> Tensor:
    """Standard normal points of a Sobol sequence, (number, dims), float64."""
    with torch.device("cpu"):  # where its tables are, whatever the default is
        engine = SobolEngine(num_dims, scramble=True, seed=0)
        uniform = engine.draw(number, dtype=torch.float64)
    return torch.special.ndtri(uniform.to(device).clamp(1e-12, 1 - 1e-12))


def _square_root(covariance: Tensor) -> Tensor:
    # Singular by construction, so no Cholesky factor; eigenvalues below zero are
    # rounding errors of a positive semi-definite matrix.
    # Largest first, since the first dims of a Sobol sequence are its most even ones.
    values, vectors = torch.linalg.eigh(covariance.double())
    return (vectors * values.clamp_min(0).sqrt()[..., None, :]).flip(-1)
