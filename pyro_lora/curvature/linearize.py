r"""The network linearised at weights: :math:`f(x, \hat w) + J (w - \hat w)`.

Under :math:`w \sim N(\mu, P^{-1})` its logits are
:math:`N(f(x, \hat w) + J (\mu - \hat w), J P^{-1} J^T)`, for each datum or for all
data of a batch. The mean :math:`\mu` is the origin :math:`\hat w`, unless it was
refined.
"Logits" are whatever the likelihood's predictor is: of classes their logits, of which
only C - 1 contrasts count; of real numbers their location, with the scale's logarithm
if the network outputs that, too; of counts a log rate.

One backward pass gives one contrast's gradients of all data, so J is that of C - 1
contrasts, the inner products of f with the columns of a basis (C, M); f less its mean
is the basis times the contrasts. For C = 3 Helmert's columns are (1, -1, 0) / sqrt(2)
and (1/2, 1/2, -1) / sqrt(3/2): orthonormal, and orthogonal to (1, 1, 1), along which a
softmax is constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_lora.curvature.capture import (
    LayerCapture,
    capture_layers,
    check_recorded,
    jacobians,
    recording,
    score_gradient,
)
from pyro_lora.curvature.gaussian_logits import GaussianLogits, JointGaussianLogits
from pyro_lora.curvature.weight_gaussian import WeightGaussian
from pyro_lora.ground.accumulation import at_least_float32
from pyro_lora.ground.autocast import OutsideAutocast, outside_autocast
from pyro_lora.ground.synchronisation import ask
from pyro_lora.ground.weights import Weights
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood import likelihoods
from pyro_lora.likelihood.batch import Batch
from pyro_lora.likelihood.likelihoods import Likelihood
from pyro_lora.likelihood.model_trace import Model, likelihood_site, trace_at
from pyro_lora.likelihood.outcomes import around, single_outcomes

Tokens = Literal["last", "each"] | Tensor


@outside_autocast()
def contrasts(
    likelihood: Likelihood, are_all_there: bool | None = None
) -> tuple[Tensor, Tensor]:
    """What identifies a likelihood's outcome, and how the logits follow from it.

    Contrasts (..., M), differentiable, M = C - 1 for C classes, and a basis (C, M): the
    logits, their mean over classes removed, are ``basis @ contrasts``. Of numbers, and
    of ordered classes, it's the predictor itself.

    Args:
        likelihood: Of single outcomes.
        are_all_there: Whether each datum has all of the choices; None: it's asked.
    """
    f = at_least_float32(likelihood.predictor)
    if likelihood.up_to_shift:
        return _helmert(f, are_all_there)
    classes = likelihood.classes
    if classes is not None and classes.cutpoints is None:
        # Two classes with logits -f/2 and f/2.
        return f, torch.arange(2, dtype=f.dtype, device=f.device)[:, None] - 0.5
    return f, torch.eye(f.shape[-1], dtype=f.dtype, device=f.device)


def _helmert(logits: Tensor, are_all_there: bool | None) -> tuple[Tensor, Tensor]:
    # Helmert's orthonormal contrasts: class m against the mean of those before it. A
    # choice that isn't there, of logit -inf, is left out, which gives a datum a basis
    # of its own.
    present = logits > -math.inf
    if present.all() if are_all_there is None else are_all_there:
        present = present.new_ones(logits.shape[-1])
    on = present.double()[..., None]  # (..., C, 1)
    c = torch.arange(logits.shape[-1], device=logits.device)[:, None]
    m = c[1:, 0]
    before = on * (c < m)
    number = before.sum(-2, keepdim=True)  # (..., 1, C - 1), of choices before m
    basis = before / number.clamp_min(1) - ((c == m) & (number > 0)).double()
    basis = basis * on * (on[..., 1:, 0][..., None, :])
    norm = basis.norm(dim=-2, keepdim=True)
    basis = (basis / norm.where(norm > 0, 1.0)).to(logits)
    finite = logits.where(present, torch.zeros_like(logits))
    if basis.ndim == 2:
        return finite @ basis, basis
    return (finite[..., None, :] @ basis)[..., 0, :], basis


@dataclass(frozen=True, eq=False)
class LinearizedNetwork:
    r"""A model's network linearised at weights: :math:`f(x, \hat w) + J (w - \hat w)`.

    Attributes:
        model: A Pyro model.
        origin: :math:`\hat w`, lifted site -> value.
        networks: The lifted networks in the model.
        obs_site: The likelihood's site; None is the only observed one.
    """

    model: Model
    origin: Weights
    networks: Sequence[LiftedNetwork]
    obs_site: str | None

    def at(
        self, batch: Batch, tokens: Tokens | None = None, every: bool = False
    ) -> LinearizedBatch:
        """The network at a batch: C - 1 backward passes, whatever the batch's size.

        P outputs take P, with scales 2 P, and each token asked for takes C - 1 of its
        own.

        Args:
            batch: The model's keyword arguments; labels aren't needed.
            tokens: Where a datum has several outcomes, which of them.
            every: Whether it is all of them, and the one where it has one.

        Raises:
            TypeError: If the likelihood isn't a known type.
            ValueError: If its event dims and ``tokens`` don't fit.
        """
        leaves = {site: x.detach().requires_grad_() for site, x in self.origin.items()}
        with torch.enable_grad():
            # Not around the backward passes: a checkpointed network runs again in them.
            with recording(self.networks, leaves) as record:
                trace = trace_at(self.model, leaves, batch, undrawn=self.obs_site)
            site: dict[str, Any] = likelihood_site(trace, self.obs_site, self.origin)
            if every and _has_several_classes(site):
                tokens = "each"
            fn, likelihood, mask = _single_outcomes(site, tokens)
            if likelihood.classes is None:  # a scale is linearised, cutpoints are held
                likelihood = likelihood.whole
            # Nearly always all choices are there. Whether they are is asked together
            # with what the layouts are asked for, which are then found once more.
            is_whole = ask((likelihood.predictor > -math.inf).all())
            for are_all_there in (True, False):
                values, basis = contrasts(likelihood, are_all_there)
                values = values.expand(*fn.batch_shape, values.shape[-1])
                classes, error = likelihood.classes, likelihood.noise
                numbers = likelihood.at if classes is None else None
                noise = None
                if error is not None and error.df is None:
                    noise = error.scale.square()
                cutpoints = None if classes is None else classes.cutpoints
                present = None
                if basis.ndim > 2:
                    basis = basis.expand(*fn.batch_shape, *basis.shape[-2:])
                    present = likelihood.predictor > -math.inf
                if tokens is not None:
                    numbers = None
                    index = _positions(tokens, mask, site["name"])
                    values = _taken(values, index)
                    cutpoints = None if cutpoints is None else _taken(cutpoints, index)
                    if present is not None:
                        basis, present = _taken(basis, index), _taken(present, index)
                    noise = None if noise is None else _taken(noise[..., None], index)
                elif (
                    len(fn.batch_shape) == 2
                ):  # several outputs: correlated, so one vector
                    numbers = partial(_of_several, likelihood.at, values.shape[-1])
                    values = values.flatten(-2)
                    basis = torch.eye(
                        values.shape[-1], dtype=values.dtype, device=values.device
                    )
                elif noise is not None:
                    noise = noise[..., None]
                check_recorded(record, trace, values, site["name"])
                terms = values.flatten(1).mT  # (M, B), or (T M, B)
                with outside_autocast():  # PyTorch's advice for backward passes
                    record.find_layouts(terms)
                if not likelihood.up_to_shift or is_whole:
                    break
            with outside_autocast():
                captures = capture_layers(record, terms)
        return LinearizedBatch(
            self.origin,
            site,
            values.detach(),
            basis,
            list(captures.values()),
            present,
            noise,
            cutpoints,
            numbers,
            likelihood.has_scale,
        )


@dataclass(frozen=True, eq=False)
class LinearizedBatch(OutsideAutocast):
    """A batch's contrasts at the origin, and what their Jacobian is made of.

    Attributes:
        origin: Site -> value.
        site: The likelihood's, a node of the trace at the origin.
        values: The contrasts, (B, ..., M).
        basis: (C, M), or (B, ..., C, M) where choices are missing.
        captures: All layers, gradients of the flattened (..., M).
        present: Which choices are there, (B, ..., C); None is all.
        noise_variance: Of the outcomes, (B, C), where it is normal noise.
        cutpoints: Of an ordinal outcome, (B, ..., C - 1), else None.
        numbers: The distribution at values (..., B, C); None of classes and tokens.
        has_scale: Whether these are locations and logarithms of scales, C = 2 P.
    """

    origin: Weights
    site: dict[str, Any]
    values: Tensor
    basis: Tensor
    captures: list[LayerCapture]
    present: Tensor | None
    noise_variance: Tensor | None
    cutpoints: Tensor | None
    numbers: Callable[[Tensor], Any] | None
    has_scale: bool

    @property
    def mean(self) -> Tensor:
        """Of the logits, (B, ..., C); -inf of a choice that isn't there."""
        return self._logits_of(self.values)

    def _logits_of(self, contrasts: Tensor) -> Tensor:
        logits = (self.basis @ contrasts[..., None])[..., 0]
        if self.present is None:
            return logits
        return logits.where(self.present, -math.inf)

    def jacobians(self) -> Iterator[tuple[str, Tensor]]:
        """Site and Jacobian of the contrasts in one layer, layers in order.

        (rows, M, O, I), of B rows, or B T.
        """
        num_contrasts = self.values.shape[-1]
        for site, j in jacobians(self.captures):
            yield site, j.reshape(-1, num_contrasts, *j.shape[2:])

    def logits(
        self,
        gaussian: WeightGaussian,
        prior_precisions: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> list[GaussianLogits]:
        r"""The Gaussian of mean :math:`f(x) + J (\mu - \hat w)`, for each of Q priors.

        Its covariance is :math:`J P^{-1} J^T` (Immer et al. 2021,
        https://arxiv.org/abs/2008.08400, eq. 9).

        Args:
            gaussian: Over the weights.
            prior_precisions: Priors to evaluate; None is the Gaussian's own.

        Returns:
            For each prior: mean (B, C), its mean over classes removed, and covariance
            (B, C, C), with T tokens (B, T, C) and (B, T, C, C).
        """
        basis, step = self._row_basis, self._step_to(gaussian)
        covariances = gaussian.covariance(
            step.along(self.jacobians()),
            prior_precisions or [gaussian.prior_precision],
        ).to(self.mean)
        mean = self._moved_by(step)
        shape = mean.shape + mean.shape[-1:]
        return [
            GaussianLogits(
                mean,
                (basis @ covariance @ basis.mT).reshape(shape),
                self.noise_variance,
                self.cutpoints,
                self.numbers,
                are_all_there=self.present is None,
                has_scale=self.has_scale,
            )
            for covariance in covariances
        ]

    def joint_logits(self, gaussian: WeightGaussian) -> JointGaussianLogits:
        """One Gaussian over the logits of all data together.

        Only the contraction, layer by layer, is another, over all pairs of data.

        Args:
            gaussian: Over the weights.

        Returns:
            Mean (B, C) and covariance (B, C, B, C), with T tokens (B, T, C) and
            (B, T, C, B, T, C).
        """
        # All contrasts of all data are those of a single datum.
        step = self._step_to(gaussian)
        of_one = (
            (site, j.flatten(0, 1)[None]) for site, j in step.along(self.jacobians())
        )
        num_contrasts = self.values.shape[-1]
        num_rows = self.values[..., 0].numel()
        covariance = gaussian.covariance(of_one, [gaussian.prior_precision])
        mean = self._moved_by(step)
        covariance = covariance.to(mean)
        blocks = covariance.reshape(num_rows, num_contrasts, num_rows, num_contrasts)
        basis = self._row_basis.expand(num_rows, -1, -1)  # (rows, C, M)
        joint = torch.einsum("acm,amzn,zdn->aczd", basis, blocks, basis)
        return JointGaussianLogits(
            mean,
            joint.reshape(mean.shape + mean.shape),
            self.noise_variance,
            self.cutpoints,
            self.numbers,
            are_all_there=self.present is None,
            has_scale=self.has_scale,
        )

    def logits_at(self, weights: Weights) -> Tensor:
        r"""The logits :math:`f(x) + J (w - \hat w)` themselves.

        Args:
            weights: Site -> (S, ...).

        Returns:
            (S, B, C), with T tokens (S, B, T, C), the mean over classes removed.
        """
        steps = {site: weights[site] - x for site, x in self.origin.items()}
        return self.mean + self.logits_along(steps)

    def logits_along(self, steps: Weights) -> Tensor:
        r"""How far the logits move with the weights, :math:`J v`.

        Args:
            steps: Site -> v, (S, ...).

        Returns:
            (S, B, C), with T tokens (S, B, T, C), the mean over classes removed.
        """
        step = _Step({s: torch.zeros_like(v[0]) for s, v in steps.items()}, steps)
        for _ in step.along(self.jacobians()):
            pass
        assert step.moved is not None
        moved = (self._row_basis @ step.moved[..., None])[..., 0]
        return moved.reshape(-1, *self.mean.shape)

    def gradient(self, function: Callable[[Tensor], Tensor]) -> Weights:
        r"""Gradient at the origin of a function of the logits, without a backward pass.

        Args:
            function: Of the logits (B, C), with T tokens (B, T, C); a scalar.

        Returns:
            Site -> value of its shape.
        """
        contrasts = self.values.detach().requires_grad_()
        with torch.enable_grad():
            value = function(self._logits_of(contrasts))
            (alpha,) = torch.autograd.grad(value, contrasts)
        by_layer: dict[str, list[Tensor]] = {site: [] for site in self.origin}
        for capture in self.captures:
            g = score_gradient(capture, alpha.flatten(1).mT)
            by_layer[capture.site].append(g)
        return {
            site: torch.stack(layers).reshape(self.origin[site].shape)
            for site, layers in by_layer.items()
        }

    def _step_to(self, gaussian: WeightGaussian) -> _Step:
        """To the Gaussian's mean, which a refined one has elsewhere."""
        if gaussian.loc is self.origin:
            return _Step({}, {})
        return _Step(self.origin, {site: x[None] for site, x in gaussian.loc.items()})

    def _moved_by(self, step: _Step) -> Tensor:
        """The logits' mean after a step of one weight set."""
        if step.moved is None:
            return self.mean
        moved = (self._row_basis @ step.moved[0, ..., None])[..., 0]
        return self.mean + moved.reshape(self.mean.shape)

    @property
    def _row_basis(self) -> Tensor:
        """(C, M), or one for each row, (rows, C, M)."""
        return self.basis if self.basis.ndim == 2 else self.basis.flatten(0, -3)


class _Step:
    r""":math:`J (w - \hat w)`, summed while a pass over the Jacobian goes by.

    Args:
        origin: :math:`\hat w`, site -> (L, ...); empty for no step.
        weights: Site -> (S, L, ...).

    Attributes:
        moved: (S, rows, M) after the pass; None where there is no step.
    """

    def __init__(self, origin: Weights, weights: Weights) -> None:
        self.moved: Tensor | None = None
        self._layers = {
            site: iter((weights[site] - x).unbind(1)) for site, x in origin.items()
        }

    def along(
        self, jacobians: Iterator[tuple[str, Tensor]]
    ) -> Iterator[tuple[str, Tensor]]:
        """The same Jacobian, layer by layer.

        Args:
            jacobians: Site and (rows, M, O, I), layers in order.
        """
        for site, j in jacobians:
            if self._layers:
                step = next(self._layers[site]).flatten(1).to(j)  # (S, O I)
                new = torch.einsum("si,bmi->sbm", step, j.flatten(2))
                self.moved = new if self.moved is None else self.moved + new
            yield site, j


def likelihood_at(
    fn: Any, logits: Tensor, numbers: Callable[[Tensor], Any] | None
) -> Any:
    """A likelihood with other logits, or whatever its predictor is.

    Args:
        fn: Its distribution, of batch shape (B,).
        logits: As of :class:`LinearizedBatch`, (..., B, C), the mean over classes
            removed; of T classes a datum (..., B, T, C), of numbers (..., B, P).
        numbers: As of :class:`LinearizedBatch`.
    """

    def single(inside: Any) -> Any:
        if numbers is not None:
            return numbers(logits)
        likelihood = likelihoods.of(inside)
        size = likelihood.predictor.shape[-1]
        if size == logits.shape[-1]:
            return likelihood.at(logits)
        # Contrasts z = E f, of which f = pinv(E) z up to a shift.
        basis = contrasts(likelihood)[1]
        return likelihood.at(logits @ torch.linalg.pinv(basis).mT)

    return around(fn, single)


def _of_several(at: Callable[[Tensor], Any], size: int, values: Tensor) -> Any:
    """The distribution of several outputs, (..., B, P), with a predictor each."""
    return at(values.unflatten(-1, (-1, size)))


def _single_outcomes(
    site: dict[str, Any], tokens: Tokens | None
) -> tuple[Any, Likelihood, Tensor]:
    """The distribution without masks and event dims, and the outcomes that count.

    Raises:
        TypeError: If nothing is known of it.
        ValueError: If it has other dims than ``tokens`` is for.
    """
    single = single_outcomes(site["fn"])
    # Masks outside of the event hide whole data, and labels, not logits.
    fn, event_dims, mask = single.fn, single.event_dims, single.inside
    form = (
        f"Site {site['name']!r}: found batch shape {tuple(site['fn'].batch_shape)} and "
        f"event shape {tuple(site['fn'].event_shape)}"
    )
    if len(site["fn"].batch_shape) != 1 or event_dims > 1:
        raise ValueError(
            f"{form}; linearised predictions need batch shape (B,) and an event shape "
            "of (), one outcome a datum, or (T,) by .to_event(1)."
        )
    if event_dims == 0 and tokens is not None:
        raise ValueError(f"{form}: one outcome a datum. Leave tokens out.")
    likelihood = likelihoods.of(fn)
    if event_dims == 1 and fn.event_shape:
        raise ValueError(
            f"{form}; linearised predictions of a {type(fn).__name__} need an event "
            "of its own alone, one outcome a datum."
        )
    if event_dims == 1 and tokens is None and likelihood.classes is not None:
        raise ValueError(
            f"{form}, not one outcome a datum. Say which by tokens='last', "
            "tokens='each', or their positions."
        )
    return fn, likelihood, mask


def _has_several_classes(site: dict[str, Any]) -> bool:
    """Whether each datum has several outcomes that are classes, (B, T)."""
    single = single_outcomes(site["fn"])
    likelihood = likelihoods.known(single.fn)
    are_classes = likelihood is not None and likelihood.classes is not None
    return single.event_dims == 1 and are_classes


def _positions(tokens: Tokens, mask: Tensor, site: str) -> Tensor:
    """Positions (B,) or (B, T') of the outcomes asked for, among (B, T).

    Raises:
        ValueError: If there are no such positions.
    """
    batch_size, length = mask.shape
    places, mask = torch.arange(length, device="cpu"), mask.cpu()
    if isinstance(tokens, Tensor):
        index = tokens.cpu()
        whole = not (index.is_floating_point() or index.dtype == torch.bool)
        fits = whole and index.ndim in (1, 2) and index.shape[0] == batch_size
        if not fits or not ((index >= 0) & (index < length)).all():
            raise ValueError(
                f"Site {site!r}: tokens must be integers of shape ({batch_size},) or "
                f"({batch_size}, T'), from 0 to {length - 1}; found {index}."
            )
        return index
    if tokens == "last":
        return (places * mask).amax(1)
    if tokens == "each":
        return places.expand(batch_size, length)
    raise ValueError(
        f"tokens must be 'last', 'each' or a tensor of positions, found {tokens!r}."
    )


def _taken(values: Tensor, index: Tensor) -> Tensor:
    """(B, T, M) at positions (B,) or (B, T') -> (B, M) or (B, T', M)."""
    index = index.to(values.device)
    rows = torch.arange(len(index), device=values.device)
    return values[rows.reshape(-1, *[1] * (index.ndim - 1)), index]
