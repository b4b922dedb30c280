r"""What a prior contributes at the mode: density, gradient, mean and precision.

The posterior precision is :math:`P = F + \mathrm{diag}(\tau)`. Under a normal prior
:math:`\tau = 1 / \sigma^2`; another has the :math:`\tau` of the normal with the same
slope at the mode, since :math:`\frac{d}{dw} \log N(w; m, 1 / \tau) = -\tau (w - m)`. Of
a Laplace prior of scale b = 2 that is 1 / (b |w|): 2 at w = .25, .125 at w = 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial, singledispatch
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch import distributions as td

from pyro_lora.curvature.kronecker_normal import KroneckerNormal
from pyro_lora.ground.weights import Weights
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood.likelihoods import has_entry
from pyro_lora.likelihood.model_trace import trace_at, unobserved_names

# Of a prior's scale: a weight nearer to the centre counts as that far from it, since
# Laplace's precision is infinite at the centre. So it is at most 1000 / b^2.
MIN_DISTANCE = 1e-3

# Of a prior's gradient, relative: below it there are no correlations to speak of.
_SAME_GRADIENT = 1e-3


@dataclass(frozen=True, eq=False)
class PriorAtMode:
    """The prior of the lifted sites at the mode, the user's ``poutine.scale`` kept.

    Attributes:
        mean: Site -> mean, of the site's shape.
        precision: Site -> precision, of the site's shape.
        log_prob: Of all sites, nats, float64; the prior's own density, exactly.
        gradient: Site -> gradient of the log density, nats, exactly.
        correlated: The sites whose weights are correlated, which the precision has not.
    """

    mean: Weights
    precision: Weights
    log_prob: Tensor
    gradient: Weights
    correlated: tuple[str, ...]


@singledispatch
def prior_moments(fn: Any, value: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean and precision of the Gaussian that stands for a prior at ``value``.

    Normal: its own. Others that are symmetric about a centre m: m and their
    scale-mixture weight :math:`\tau = -\frac{d \log p(w) / dw}{w - m}`, at the mode
    :math:`\hat w` (for Laplace :math:`1 / (b |w - m|)`, for Student-t
    :math:`(\nu + 1) / (\nu s^2 + (w - m)^2)`). The Gaussian has the prior's gradient
    there, and where p is a scale mixture of normals it is a bound,
    :math:`\log p(w) \ge \log p(\hat w) - \frac\tau2 [(w - m)^2 - (\hat w - m)^2]`
    (Palmer et al. 2006, "Variational EM algorithms for non-Gaussian latent variable
    models"). The second derivative, by contrast, is 0 for Laplace and negative in a
    Student-t's tails. Distances below ``MIN_DISTANCE`` scales count as that.

    A Gaussian with correlations, such as a previous posterior's
    :class:`~pyro_lora.KroneckerNormal`: its mean, and the diagonal of its precision,
    of which a fit warns.

    Args:
        fn: The prior's distribution, without dims of ``Independent``; register others.
        value: The mode; mean and precision have its shape.

    Returns:
        Mean and precision, differentiable in the parameters of ``fn``.

    Raises:
        TypeError: If the type isn't known and has no mean and variance, or isn't
            symmetric about its mean.

    >>> from pyro.distributions import Laplace
    >>> prior_moments(Laplace(0.0, 2.0), torch.tensor([0.25, 4.0]))[1]
    tensor([2.0000, 0.1250])
    """
    return _symmetric(fn, value)


@prior_moments.register
def _normal(fn: td.Normal, value: Tensor) -> tuple[Tensor, Tensor]:
    # One number for all weights stays one, which has one gradient.
    repeated = [slice(1) if step == 0 else slice(None) for step in fn.scale.stride()]
    precision = fn.scale[tuple(repeated)] ** -2
    return fn.loc.expand(value.shape), precision.expand(value.shape)


@prior_moments.register
def _laplace(fn: td.Laplace, value: Tensor) -> tuple[Tensor, Tensor]:
    distance = (value - fn.loc).abs().maximum(MIN_DISTANCE * fn.scale)
    return fn.loc.expand(value.shape), 1 / (fn.scale * distance)


@prior_moments.register
def _student_t(fn: td.StudentT, value: Tensor) -> tuple[Tensor, Tensor]:
    squared = (value - fn.loc).square()
    return (
        fn.loc.expand(value.shape),
        (fn.df + 1) / (fn.df * fn.scale.square() + squared),
    )


@prior_moments.register
def _cauchy(fn: td.Cauchy, value: Tensor) -> tuple[Tensor, Tensor]:
    squared = (value - fn.loc).square()
    return fn.loc.expand(value.shape), 2 / (fn.scale.square() + squared)


@prior_moments.register
def _kronecker_normal(fn: KroneckerNormal, value: Tensor) -> tuple[Tensor, Tensor]:
    # diag(U L U^T) with U = U_G ⊗ U_A: the squares of the bases.
    diagonal = fn.precision
    if fn.rows is not None:
        diagonal = fn.rows.square() @ diagonal
    if fn.columns is not None:
        diagonal = diagonal @ fn.columns.square().mT
    return fn.loc.expand(value.shape), diagonal.expand(value.shape)


@prior_moments.register
def _multivariate_normal(
    fn: td.MultivariateNormal, value: Tensor
) -> tuple[Tensor, Tensor]:
    diagonal = fn.precision_matrix.diagonal(dim1=-2, dim2=-1)
    return fn.loc.expand(value.shape), diagonal.expand(value.shape)


@prior_moments.register(td.Independent)
def _independent(fn: Any, value: Tensor) -> tuple[Tensor, Tensor]:
    return _moments(fn.base_dist, value)


@prior_moments.register
def _reshaped(fn: td.TransformedDistribution, value: Tensor) -> tuple[Tensor, Tensor]:
    if {type(transform) for transform in fn.transforms} != {td.ReshapeTransform}:
        return _symmetric(fn, value)
    for transform in reversed(fn.transforms):
        value = transform.inv(value)
    mean, precision = _moments(fn.base_dist, value)
    for transform in fn.transforms:
        mean, precision = transform(mean), transform(precision)
    return mean, precision


def _moments(fn: Any, value: Tensor) -> tuple[Tensor, Tensor]:
    # What overrides the density of a registered type has moments of its own.
    if has_entry(type(fn), prior_moments.registry):
        return prior_moments(fn, value)
    return _symmetric(fn, value)


def _symmetric(fn: Any, value: Tensor) -> tuple[Tensor, Tensor]:
    """The scale-mixture weight by autograd, where it makes sense.

    Raises:
        TypeError: Where it doesn't.
    """
    kind = type(fn).__name__
    if fn.event_shape:
        raise TypeError(f"no Gaussian stands for {kind}, whose weights are dependent")
    try:
        center, scale = fn.mean.expand(value.shape), fn.variance.sqrt()
    except NotImplementedError:
        raise TypeError(f"no Gaussian is known to stand for {kind}") from None
    if not (center.isfinite().all() and scale.isfinite().all()):
        raise TypeError(f"no Gaussian is known to stand for {kind} without a variance")
    offset = value - center
    least = (MIN_DISTANCE * scale).expand_as(offset)
    # -score / offset is 0 / 0 at the centre, and infinite there of a Laplace.
    offset = torch.where(offset.abs() < least, least, offset)
    with torch.enable_grad():
        w = center + offset
        if not w.requires_grad:
            w.requires_grad_()
        log_prob = fn.log_prob(w)
        (score,) = torch.autograd.grad(log_prob.sum(), w, create_graph=True)
    # p(m + d) = p(m - d); a skewed density has no centre that it would be a weight of.
    if not torch.allclose(log_prob, fn.log_prob(center - offset), rtol=1e-4, atol=1e-4):
        raise TypeError(f"no Gaussian stands for {kind}, not symmetric about its mean")
    return center, -score / offset


def prior_at_mode(trace: Any, mode: Mapping[str, Tensor]) -> PriorAtMode:
    """Read the prior of the lifted sites from a trace at the mode.

    Args:
        trace: A trace of the model at ``mode``, its graph not used up.
        mode: Site -> the value in the trace, a leaf that requires a gradient.

    Returns:
        Density, gradient and moments.

    Raises:
        ValueError: If a prior has no Gaussian form, isn't proper, or depends on other
            sites.
    """
    mean, precision, log_probs, correlated = {}, {}, [], []
    gradient = {site: torch.zeros_like(value) for site, value in mode.items()}
    for name, leaf in mode.items():
        site = trace.nodes[name]
        with torch.enable_grad():
            log_prob = site["fn"].log_prob(leaf)
            scaled = scale_and_mask(log_prob, site["scale"], site["mask"])
            total = scaled.double().sum()
        log_probs.append(total.detach())
        _add_gradient(gradient, name, total, mode)
        mean[name], precision[name] = site_moments(site, leaf.detach())
        if _is_correlated(site["fn"], leaf.detach()):
            correlated.append(name)
    return PriorAtMode(
        {s: x.detach() for s, x in mean.items()},
        {s: x.detach() for s, x in precision.items()},
        torch.stack(log_probs).sum(),
        gradient,
        tuple(correlated),
    )


def _is_correlated(fn: Any, value: Tensor) -> bool:
    """Whether a prior of dependent weights has a gradient other than its moments'."""
    inside = fn
    while isinstance(inside, td.Independent):
        inside = inside.base_dist
    if not inside.event_shape:
        return False
    # At the centre the gradient is 0: one standard deviation away it isn't.
    mean, precision = _moments(fn, value)
    offset = value - mean
    away = mean + offset.abs().maximum(precision.rsqrt()).copysign(offset)
    with torch.enable_grad():
        w = away.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(fn.log_prob(w).sum(), w, retain_graph=True)
    mean, precision = _moments(fn, w.detach())
    own = -precision * (w - mean)
    same = max(_SAME_GRADIENT, torch.finfo(value.dtype).eps ** 0.5)
    return bool(((gradient - own).abs() > same * own.abs()).any())


@torch.no_grad()
def model_scales(
    trace: Any, networks: Sequence[LiftedNetwork]
) -> dict[str, float | Tensor]:
    """How much log densities count where a model says other than the prior itself.

    ``poutine.scale`` around ``lora()``, or around the whole model, tempers the prior,
    which doesn't know of it.

    Args:
        trace: Of the model.
        networks: The lifted networks in it.

    Returns:
        Site of the prior -> the scale in the model, 0 where it's masked.
    """
    scales: dict[str, float | Tensor] = {}
    latent = unobserved_names(trace)
    values = {name: trace.nodes[name]["value"] for name in latent}
    for lora in networks:
        own = trace_at(partial(lora.prior, lora), values, {})
        for name in latent & unobserved_names(own):
            scale = counted_scale(trace.nodes[name])
            differs = scale != counted_scale(own.nodes[name])
            if bool(differs.any() if isinstance(differs, Tensor) else differs):
                scales[name] = scale
    return scales


def counted_scale(site: Mapping[str, Any]) -> float | Tensor:
    """How much a site's log density counts in the joint: its scale, 0 if masked.

    Args:
        site: A node of a trace.
    """
    scale: float | Tensor = site["scale"]
    mask = site["mask"]
    return scale if mask is None else scale * mask


def _add_gradient(
    gradient: Weights, name: str, log_prob: Tensor, mode: Mapping[str, Tensor]
) -> None:
    if not log_prob.requires_grad:  # masked
        return
    gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
        log_prob, list(mode.values()), allow_unused=True, retain_graph=True
    )
    for other, g in zip(mode, gradients, strict=True):
        if g is None:
            continue
        if other != name:
            raise ValueError(
                f"Site {name!r}: its prior depends on the site {other!r}, so their "
                "curvatures don't separate. As a previous posterior take one of "
                "structures.Diagonal(), or of a Kronecker structure, of which the "
                "diagonal counts; or use SVGD."
            )
        gradient[name] = g


def site_moments(site: Mapping[str, Any], value: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and precision of a site's prior, scaled and masked as in the model.

    Args:
        site: A node of a trace.
        value: The mode.

    Returns:
        Mean and precision, of the value's shape, differentiable in the prior's
        parameters.

    Raises:
        ValueError: If the prior has no Gaussian form or isn't proper.
    """
    try:
        mean, precision = _moments(site["fn"], value)
    except TypeError as error:
        raise ValueError(
            f"Site {site['name']!r}: {error}. Use a proper prior that is symmetric, "
            "such as priors.normal or priors.student_t, or register the type with "
            "pyro_lora.curvature.prior_moments.prior_moments.register; SVGD takes any."
        ) from error
    # s log p has s times the curvature.
    precision = scale_and_mask(precision, site["scale"], site["mask"])
    if not (torch.isfinite(precision).all() and (precision > 0).all()):
        raise ValueError(
            f"Site {site['name']!r}: the prior precision must be positive and finite, "
            f"found values from {precision.min():.3g} to {precision.max():.3g}. Use a "
            "proper prior."
        )
    return mean, precision
