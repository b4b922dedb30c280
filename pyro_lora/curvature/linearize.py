r"""Linearised logits: J P^-1 J^T for each datum, or for all data of a batch.

The network's output is taken for :math:`f(x, \hat w) + J (w - \hat w)`, so that
:math:`w \sim N(\hat w, P^{-1})` makes it :math:`N(f(x, \hat w), J P^{-1} J^T)`.
"Logits" are whatever the likelihood's predictor is: of classes their logits, of which
only C - 1 contrasts count; of real numbers their location, of counts a log rate.
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
)
from pyro_lora.curvature.factors import at_least_float32
from pyro_lora.curvature.gaussian_logits import GaussianLogits, JointGaussianLogits
from pyro_lora.curvature.weight_gaussian import WeightGaussian
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood import likelihoods
from pyro_lora.likelihood.batch import Batch
from pyro_lora.likelihood.likelihoods import Likelihood
from pyro_lora.likelihood.model_trace import Model, likelihood_site, trace_at
from pyro_lora.likelihood.outcomes import single_outcomes

Tokens = Literal["last", "each"] | Tensor


def contrasts(likelihood: Likelihood) -> tuple[Tensor, Tensor]:
    """What identifies a likelihood's outcome, and how the logits follow from it.

    Contrasts (..., M), differentiable, M = C - 1 for C classes, and a basis (C, M): the
    logits, their mean over classes removed, are ``basis @ contrasts``. Of numbers, and
    of ordered classes, it's the predictor itself.

    Args:
        likelihood: Of single outcomes.
    """
    f = at_least_float32(likelihood.predictor)
    if likelihood.up_to_shift:
        return _helmert(f)
    classes = likelihood.classes
    if classes is not None and classes.cutpoints is None:
        # Two classes with logits -f/2 and f/2.
        return f, f.new_tensor([[-0.5], [0.5]])
    return f, torch.eye(f.shape[-1]).to(f)


def _helmert(logits: Tensor) -> tuple[Tensor, Tensor]:
    # Helmert's orthonormal contrasts: class m against the mean of those before it. A
    # choice that isn't there, of logit -inf, is left out, which gives a datum a basis
    # of its own.
    present = logits > -math.inf
    if bool(present.all()):
        present = present.new_ones(logits.shape[-1])
    on = present.double()[..., None]  # (..., C, 1)
    c = torch.arange(logits.shape[-1], device=logits.device)[:, None]
    m = c[1:, 0]
    before = on * (c < m)
    number = before.sum(-2, keepdim=True)
    basis = before / number.clamp_min(1) - ((c == m) & (number > 0)).double()
    basis = basis * on * (on[..., 1:, 0][..., None, :])
    norm = basis.norm(dim=-2, keepdim=True)
    basis = (basis / norm.where(norm > 0, 1.0)).to(logits)
    known = logits.where(present, torch.zeros_like(logits))
    if basis.ndim == 2:
        return known @ basis, basis
    return (known[..., None, :] @ basis)[..., 0, :], basis


def linearized_logits(
    model: Model,
    gaussian: WeightGaussian,
    networks: Sequence[LiftedNetwork],
    batch: Batch,
    obs_site: str | None,
    prior_precisions: Sequence[Mapping[str, Tensor]] | None = None,
    tokens: Tokens | None = None,
) -> list[GaussianLogits]:
    r"""Gaussian over the logits, :math:`N(f(x), J P^{-1} J^T)`, for each of Q priors.

    One forward pass and C - 1 backward passes a batch, whatever its size (Immer et al.
    2021, https://arxiv.org/abs/2008.08400, eq. 9); P outputs take P, and each token
    asked for takes C - 1 of its own.

    Args:
        model: A Pyro model.
        gaussian: Mode and precision.
        networks: The lifted networks in the model.
        batch: The model's keyword arguments; labels aren't needed.
        obs_site: The likelihood's site.
        prior_precisions: Priors to evaluate; None is the Gaussian's own.
        tokens: Where a datum has several outcomes, which of them.

    Returns:
        For each prior: mean (B, C), its mean over classes removed, and covariance
        (B, C, C), with T tokens (B, T, C) and (B, T, C, C).

    Raises:
        TypeError: If the likelihood isn't a known type.
        ValueError: If its event dims and ``tokens`` don't fit.
    """
    return linearized_site(
        model, gaussian, networks, batch, obs_site, prior_precisions, tokens
    )[0]


def linearized_site(
    model: Model,
    gaussian: WeightGaussian,
    networks: Sequence[LiftedNetwork],
    batch: Batch,
    obs_site: str | None,
    prior_precisions: Sequence[Mapping[str, Tensor]] | None = None,
    tokens: Tokens | None = None,
) -> tuple[list[GaussianLogits], dict[str, Any]]:
    """As :func:`linearized_logits`, and the likelihood's site at the mode.

    Args:
        model: A Pyro model.
        gaussian: Mode and precision.
        networks: The lifted networks in the model.
        batch: The model's keyword arguments.
        obs_site: The likelihood's site.
        prior_precisions: Priors to evaluate; None is the Gaussian's own.
        tokens: Where a datum has several outcomes, which of them.

    Returns:
        A Gaussian for each prior, and the node of the trace.

    Raises:
        ValueError: As :func:`linearized_logits`.
    """
    found = _linearize(model, gaussian, networks, batch, obs_site, tokens)
    covariances = gaussian.covariance(
        found.jacobians(found.values[..., 0].numel(), found.values.shape[-1]),
        prior_precisions or [gaussian.prior_precision],
    ).to(found.mean)
    shape = found.mean.shape + found.mean.shape[-1:]
    return [
        GaussianLogits(
            found.mean,
            (found.row_basis @ c @ found.row_basis.mT).reshape(shape),
            found.noise_variance,
            found.cutpoints,
            found.numbers,
        )
        for c in covariances
    ], found.site


def joint_linearized_logits(
    model: Model,
    gaussian: WeightGaussian,
    networks: Sequence[LiftedNetwork],
    batch: Batch,
    obs_site: str | None,
    tokens: Tokens | None = None,
) -> JointGaussianLogits:
    """One Gaussian over the logits of all data of a batch together.

    The passes are those of :func:`linearized_logits`; only the contraction, layer by
    layer, is over all pairs of data.

    Args:
        model: A Pyro model.
        gaussian: Mode and precision.
        networks: The lifted networks in the model.
        batch: The model's keyword arguments; labels aren't needed.
        obs_site: The likelihood's site.
        tokens: Where a datum has several outcomes, which of them.

    Returns:
        Mean (B, C) and covariance (B, C, B, C), with T tokens (B, T, C) and
        (B, T, C, B, T, C).

    Raises:
        ValueError: As :func:`linearized_logits`.
    """
    found = _linearize(model, gaussian, networks, batch, obs_site, tokens)
    num_rows = found.values[..., 0].numel()  # B, or B T
    size = found.values.numel()
    # All contrasts of all data are those of a single datum.
    covariance = gaussian.covariance(
        found.jacobians(1, size), [gaussian.prior_precision]
    )
    m = found.values.shape[-1]
    blocks = covariance.to(found.mean).reshape(num_rows, m, num_rows, m)
    basis = found.row_basis.expand(num_rows, -1, -1)
    joint = torch.einsum("acm,amzn,zdn->aczd", basis, blocks, basis)
    shape = found.mean.shape
    return JointGaussianLogits(
        found.mean,
        joint.reshape(shape + shape),
        found.noise_variance,
        found.cutpoints,
        found.numbers,
    )


def linearized_values(
    model: Model,
    gaussian: WeightGaussian,
    networks: Sequence[LiftedNetwork],
    batch: Batch,
    obs_site: str | None,
    weights: Mapping[str, Tensor],
) -> Tensor:
    r"""Logits of the linearised network, :math:`f(x) + J (w - \hat w)`, at S weights.

    The passes are those of :func:`linearized_logits`, whatever S.

    Args:
        model: A Pyro model.
        gaussian: The mode.
        networks: The lifted networks in the model.
        batch: The model's keyword arguments; labels aren't needed.
        obs_site: The likelihood's site.
        weights: Site -> (S, ...).

    Returns:
        (S, B, C), the mean over classes removed.

    Raises:
        ValueError: As :func:`linearized_logits`.
    """
    found = _linearize(model, gaussian, networks, batch, obs_site, None)
    moved: Tensor | float = 0.0
    layer = dict.fromkeys(gaussian.loc, 0)
    rows, terms = found.values[..., 0].numel(), found.values.shape[-1]
    for site, j in found.jacobians(rows, terms):
        i = layer[site]
        layer[site] += 1
        step = (weights[site][:, i] - gaussian.loc[site][i]).flatten(1)  # (S, O I)
        moved = moved + torch.einsum("si,bmi->sbm", step.to(j), j.flatten(2))
    assert isinstance(moved, Tensor)
    return found.mean + (found.row_basis @ moved[..., None])[..., 0]


@dataclass(frozen=True)
class _Linearization:
    """The contrasts of a batch and what their Jacobian is made of.

    Attributes:
        values: (B, ..., M).
        basis: (C, M), or (B, ..., C, M) where choices are missing.
        captures: All layers, gradients of the flattened (..., M).
        noise_variance: Of the outcomes, (B, C), where it is normal noise.
        site: The likelihood's.
        cutpoints: Of an ordinal outcome, (B, ..., C - 1), else None.
        numbers: The distribution at values (..., B, C); None of classes and tokens.
        present: Which choices are there, (B, ..., C); None is all.
    """

    values: Tensor
    basis: Tensor
    captures: list[LayerCapture]
    noise_variance: Tensor | None
    site: dict[str, Any]
    cutpoints: Tensor | None
    numbers: Callable[[Tensor], Any] | None
    present: Tensor | None

    @property
    def row_basis(self) -> Tensor:
        """(C, M), or one for each row, (rows, C, M)."""
        if self.basis.ndim == 2:
            return self.basis
        return self.basis.flatten(0, -3)

    @property
    def mean(self) -> Tensor:
        """Of the logits, -inf of a choice that isn't there."""
        mean = (self.basis @ self.values[..., None])[..., 0]
        return mean if self.present is None else mean.where(self.present, -math.inf)

    def jacobians(self, rows: int, terms: int) -> Iterator[tuple[str, Tensor]]:
        """Site and (rows, terms, O, I) of each layer, one layer at a time."""
        for site, j in jacobians(self.captures):
            yield site, j.reshape(rows, terms, *j.shape[2:])


def _linearize(
    model: Model,
    gaussian: WeightGaussian,
    networks: Sequence[LiftedNetwork],
    batch: Batch,
    obs_site: str | None,
    tokens: Tokens | None,
) -> _Linearization:
    leaves = {site: x.detach().requires_grad_() for site, x in gaussian.loc.items()}
    with torch.enable_grad():
        # Not around the backward passes: a checkpointed network runs again in them.
        with recording(networks, leaves) as record:
            trace = trace_at(model, leaves, batch)
        site: dict[str, Any] = likelihood_site(trace, obs_site, gaussian.loc)
        fn, likelihood, mask = _outcomes(site, tokens)
        values, basis = contrasts(likelihood)
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
        elif len(fn.batch_shape) == 2:  # several outputs: correlated, so one vector
            values = values[..., 0]
            basis = torch.eye(values.shape[-1]).to(values)
            numbers = partial(_of_several, likelihood.at)
        elif noise is not None:
            noise = noise[..., None]
        check_recorded(record, trace, values, site["name"])
        terms = values.flatten(1).mT
        record.find_layouts(terms)
        captures = capture_layers(record, terms)
    return _Linearization(
        values.detach(),
        basis,
        list(captures.values()),
        noise,
        site,
        cutpoints,
        numbers,
        present,
    )


def _of_several(at: Callable[[Tensor], Any], values: Tensor) -> Any:
    """The distribution of several outputs, (..., B, P), with a predictor each."""
    return at(values[..., None])


def _outcomes(
    site: dict[str, Any], tokens: Tokens | None
) -> tuple[Any, Likelihood, Tensor]:
    """The distribution without masks and event dims, and the outcomes that count.

    Raises:
        TypeError: If nothing is known of it.
        ValueError: If it has other dims than ``tokens`` is for.
    """
    single = single_outcomes(site["fn"])
    # Masks outside of the event hide whole data, and labels, not logits.
    fn, event_dims, mask = single.fn, single.event_dims, single.inside.cpu()
    found = (
        f"Site {site['name']!r}: found batch shape {tuple(site['fn'].batch_shape)} and "
        f"event shape {tuple(site['fn'].event_shape)}"
    )
    if len(site["fn"].batch_shape) != 1 or event_dims > 1:
        raise ValueError(
            f"{found}; linearised predictions need batch shape (B,) and an event shape "
            "of (), one outcome a datum, or (T,) by .to_event(1)."
        )
    if event_dims == 0 and tokens is not None:
        raise ValueError(f"{found}: one outcome a datum. Leave tokens out.")
    likelihood = likelihoods.of(fn)
    if event_dims == 1 and fn.event_shape:
        raise ValueError(
            f"{found}; linearised predictions of a {type(fn).__name__} need an event "
            "of its own alone, one outcome a datum."
        )
    if event_dims == 1 and tokens is None and likelihood.classes is not None:
        raise ValueError(
            f"{found}, not one outcome a datum. Say which by tokens='last', "
            "tokens='each', or their positions."
        )
    return fn, likelihood, mask


def _positions(tokens: Tokens, mask: Tensor, site: str) -> Tensor:
    """Positions (B,) or (B, T') of the outcomes asked for, among (B, T).

    Raises:
        ValueError: If there are no such positions.
    """
    batch_size, length = mask.shape
    places = torch.arange(length)
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
    rows = torch.arange(len(index)).reshape(-1, *[1] * (index.ndim - 1))
    return values[rows.to(values.device), index.to(values.device)]
