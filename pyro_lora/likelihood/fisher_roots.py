"""Square roots of the Fisher information, a table by distribution type."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import singledispatch

import pyro.distributions as dist
import torch
from torch import Tensor
from torch import distributions as td
from torch.nn.functional import pad

# Keeps 1 / sqrt(p) finite in float32; such a class adds less than that to the Fisher.
_MIN_PROBABILITY = torch.finfo(torch.float32).tiny ** 0.5

# A root is an array of C (C - 1) for each outcome and costs C - 1 backward passes:
# beyond this many classes, a vocabulary's, neither is what anyone wants.
MOST_EXACT_CLASSES = 2_000


@dataclass(frozen=True)
class FisherRoot:
    r"""Square root of one distribution's Fisher information in its parameter.

    With :math:`F = R R^T` and score :math:`s = \nabla_\eta \log p(y)`, the
    coordinates :math:`\alpha` solve :math:`s = R \alpha`.

    Attributes:
        parameter: What the network outputs, :math:`\eta`, (..., P), differentiable.
        root: R, (..., P, M), a constant.
        coordinates: :math:`\alpha` of the observed value, (..., M), a constant.
    """

    parameter: Tensor
    root: Tensor
    coordinates: Tensor


@singledispatch
def fisher_root(fn: object, value: Tensor) -> FisherRoot:
    r"""Root of the Fisher information of ``fn``, by its type.

    In the parameter that a network usually outputs, with the fewest columns:

    ===================================  ==================  ====================
    distribution                         parameter           columns
    ===================================  ==================  ====================
    Categorical, OneHotCategorical       logits              C - 1
    Multinomial                          logits              C - 1
    Bernoulli, Binomial                  logits              1
    NegativeBinomial                     logits              1
    Poisson                              log rate            1
    OrderedLogistic                      predictor           1, or C - 1 [1]_
    Normal, NanMaskedNormal, StudentT    location            1, or 2 [2]_
    Laplace                              location            1, or 2 [2]_
    ===================================  ==================  ====================

    The Fisher information doesn't depend on which differentiable function of these the
    distribution was made from (probs, rate, ...).

    .. [1] Where gradients flow into the cutpoints, too.
    .. [2] Where gradients flow into the scale, too: its logarithm is a parameter.

    Register your own type; a subclass of a type above has that type's root already::

        @pyro_lora.fisher_root.register
        def _(fn: MyDistribution, value: Tensor) -> pyro_lora.FisherRoot: ...

    Args:
        fn: A distribution without event dims of its own beyond its parameter's.
        value: The observed value, of ``fn``'s shape.

    Raises:
        TypeError: If the type has no exact Fisher information here.
        ValueError: If there are more than 2000 classes.

    >>> root = fisher_root(dist.Bernoulli(logits=torch.zeros(3)), torch.ones(3)).root
    >>> root.flatten()
    tensor([0.5000, 0.5000, 0.5000])
    """
    raise TypeError(
        f"No exact Fisher information for {type(fn).__name__}. Use fisher='mc', which "
        "works for any distribution, or register it with "
        "pyro_lora.fisher_root.register."
    )


@fisher_root.register
def _categorical(fn: td.Categorical, value: Tensor) -> FisherRoot:
    num_classes = _num_classes(fn.logits)
    classes = torch.arange(num_classes, device=fn.logits.device)
    return _softmax(fn.logits, (value[..., None] == classes).double())


@fisher_root.register
def _one_hot(fn: td.OneHotCategorical, value: Tensor) -> FisherRoot:
    _num_classes(fn.logits)
    # The largest entry is the label, as in its log_prob.
    classes = torch.arange(value.shape[-1], device=value.device)
    label = value.argmax(-1, keepdim=True)
    return _softmax(fn.logits, (label == classes).double())


@fisher_root.register
def _multinomial(fn: td.Multinomial, value: Tensor) -> FisherRoot:
    # The counts' own sum, which log_prob goes by: it may differ between data, and is
    # one for soft labels. NaN counts are behind a mask, or found in the likelihood.
    _num_classes(fn.logits)
    total = value.double().sum(-1)
    total = total.where(~total.isnan(), torch.zeros_like(total))
    one = _softmax(fn.logits, value.double())
    scale = total.sqrt()
    inverse = scale.reciprocal().where(total > 0, torch.zeros_like(scale))
    return _root(
        one.parameter,
        one.root.double() * scale[..., None, None],
        one.coordinates.double() * inverse[..., None],
    )


@fisher_root.register
def _bernoulli(fn: td.Bernoulli, value: Tensor) -> FisherRoot:
    return _logistic(fn.logits, value, torch.ones_like(fn.logits))


@fisher_root.register
def _binomial(fn: td.Binomial, value: Tensor) -> FisherRoot:
    return _logistic(fn.logits, value, fn.total_count)


@fisher_root.register
def _negative_binomial(fn: td.NegativeBinomial, value: Tensor) -> FisherRoot:
    _check_constant(fn, total_count=fn.total_count)
    failures = fn.total_count.detach().double()
    logits = _clamped(fn.logits)
    # Score y (1 - p) - r p, variance r p
    score = value * (-logits).sigmoid() - failures * logits.sigmoid()
    return _scalar(fn.logits, failures * logits.sigmoid(), score)


@fisher_root.register
def _poisson(fn: td.Poisson, value: Tensor) -> FisherRoot:
    # An underflown rate of 0 has no logarithm.
    dtype = torch.promote_types(fn.rate.dtype, torch.float32)
    log_rate = fn.rate.to(dtype).clamp_min(torch.finfo(dtype).tiny).log()
    rate = fn.rate.detach().double().clamp_min(_MIN_PROBABILITY)
    return _scalar(log_rate, rate, value - rate)


@fisher_root.register
def _ordered_logistic(fn: dist.OrderedLogistic, value: Tensor) -> FisherRoot:
    if fn.cutpoints.requires_grad:
        return _categorical(fn, value)
    cutpoints = fn.cutpoints.double() - fn.predictor.detach().double()[..., None]
    a, b = (
        pad(cutpoints, (1, 0), value=-math.inf),
        pad(cutpoints, (0, 1), value=math.inf),
    )
    # P(y = k) is s(b) - s(a) and has derivative -P(y = k) (s(b) - s(-a)) with s the
    # sigmoid: both differences written as products, which don't cancel.
    p = b.sigmoid() * (-a).sigmoid() * -torch.expm1(a - b)
    sum_is_negative = a + b < 0
    smaller = torch.where(sum_is_negative, -b, b).sigmoid()
    larger = torch.where(sum_is_negative, -a, a).sigmoid()
    size = smaller * larger * -torch.expm1(-(a + b).abs())
    scores = torch.where(sum_is_negative, -size, size)  # (..., C)
    classes = torch.arange(p.shape[-1], device=p.device)
    score = scores.where(value[..., None] == classes, torch.zeros_like(p)).sum(-1)
    return _scalar(fn.predictor, (p * scores.square()).sum(-1), score)


@fisher_root.register
def _normal(fn: td.Normal, value: Tensor) -> FisherRoot:
    z = _standardized(fn, value)
    return _location_scale(fn.loc, fn.scale, (1.0, 2.0), (z, z.square() - 1))


@fisher_root.register
def _nan_masked_normal(fn: dist.NanMaskedNormal, value: Tensor) -> FisherRoot:
    found = _normal(fn, value)
    seen = value.isfinite()[..., None]
    return FisherRoot(
        found.parameter,
        found.root.where(seen[..., None], torch.zeros_like(found.root)),
        found.coordinates.where(seen, torch.zeros_like(found.coordinates)),
    )


@fisher_root.register
def _student_t(fn: td.StudentT, value: Tensor) -> FisherRoot:
    # Lange, Little and Taylor (1989): the location's and the scale's are uncorrelated.
    _check_constant(fn, df=fn.df)
    df = fn.df.detach().double()
    z = _standardized(fn, value)
    weight = (df + 1) / (df + z.square())
    information = ((df + 1) / (df + 3), 2 * df / (df + 3))
    scores = (weight * z, weight * z.square() - 1)
    return _location_scale(fn.loc, fn.scale, information, scores)


@fisher_root.register
def _laplace(fn: td.Laplace, value: Tensor) -> FisherRoot:
    z = _standardized(fn, value)
    return _location_scale(fn.loc, fn.scale, (1.0, 1.0), (z.sign(), z.abs() - 1))


def _softmax(logits: Tensor, counts: Tensor) -> FisherRoot:
    """Of one draw; coordinates are linear in the counts (..., C)."""
    # Cholesky factor of diag(p) - p p^T in closed form (Tanabe & Sagae 1992), which is
    # a chain of binary splits: class j against the classes after it.
    p = logits.detach().double().softmax(-1).clamp_min(_MIN_PROBABILITY)
    from_here = p.flip(-1).cumsum(-1).flip(-1)  # P(y >= j)
    split, here, after = p[..., :-1], from_here[..., :-1], from_here[..., 1:]
    # Column j: sqrt(p_j P_{j+1} / P_j) at j, -p_i sqrt(p_j / (P_j P_{j+1})) below it.
    below = -p[..., None] * (split / here / after).sqrt()[..., None, :]
    diagonal = torch.diag_embed((split * after / here).sqrt())
    root = below.tril(-1) + pad(diagonal, (0, 0, 0, 1))  # (..., C, C-1)
    # (1[y = j] - p_j / P_j) / root_jj where y >= j, without cancellation at P_j = p_j
    counts_after = counts.flip(-1).cumsum(-1).flip(-1)[..., 1:]  # of y > j
    alpha = counts[..., :-1] * (after / here / split).sqrt()
    alpha = alpha - counts_after * (split / here / after).sqrt()
    # A choice that isn't there has logit -inf, which no root should meet.
    present = logits > -math.inf
    root = root.where(present[..., None], torch.zeros_like(root))
    return _root(logits.where(present, torch.zeros_like(logits)), root, alpha)


def _logistic(logits: Tensor, value: Tensor, total_count: Tensor) -> FisherRoot:
    """Of ``value`` successes among ``total_count``, whole numbers or not."""
    x, n = _clamped(logits), total_count.detach().double()
    # sqrt(n p (1 - p)) and (y - n p) / sqrt(n p (1 - p)) without cancellation
    root = (n * ((-x).sigmoid() * x.sigmoid())).sqrt()
    alpha = value * (-x / 2).exp() - (n - value) * (x / 2).exp()
    alpha = (alpha / n.sqrt()).where(n > 0, torch.zeros_like(alpha))
    return _root(logits[..., None], root[..., None, None], alpha[..., None])


def _standardized(fn: td.Normal | td.StudentT | td.Laplace, value: Tensor) -> Tensor:
    return (value.double() - fn.loc.detach().double()) / fn.scale.detach().double()


def _location_scale(
    loc: Tensor,
    scale: Tensor,
    information: tuple[Tensor | float, Tensor | float],
    scores: tuple[Tensor, Tensor],
) -> FisherRoot:
    """Of a symmetric density, at scale one, in location and logarithm of the scale."""
    s = scale.detach().double()
    roots = [torch.as_tensor(x, dtype=s.dtype, device=s.device) for x in information]
    in_loc, in_scale = (x.sqrt().expand_as(s) for x in roots)
    alpha = torch.stack([scores[0] / in_loc, scores[1] / in_scale], -1)
    if not scale.requires_grad:
        root = (in_loc / s)[..., None, None]
        return _root(loc[..., None], root, alpha[..., :1])
    parameter = torch.stack([loc, scale.log()], -1)
    root = torch.diag_embed(torch.stack([in_loc / s, in_scale], -1))
    return _root(parameter, root, alpha)


def _scalar(parameter: Tensor, information: Tensor, score: Tensor) -> FisherRoot:
    """Of one parameter; no outcome can have a score where there is no information."""
    some = information > 0
    root = information.clamp_min(_MIN_PROBABILITY).sqrt() * some
    alpha = (score / root).where(some, torch.zeros_like(root))
    return _root(parameter[..., None], root[..., None, None], alpha[..., None])


def _root(parameter: Tensor, root: Tensor, coordinates: Tensor) -> FisherRoot:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return FisherRoot(parameter.to(dtype), root.to(dtype), coordinates.to(dtype))


def _clamped(logits: Tensor) -> Tensor:
    limit = -math.log(_MIN_PROBABILITY)
    return logits.detach().double().clamp(-limit, limit)


def _num_classes(logits: Tensor) -> int:
    num_classes = logits.shape[-1]
    if num_classes > MOST_EXACT_CLASSES:
        raise ValueError(
            f"The exact Fisher information of {num_classes} classes takes "
            f"{num_classes - 1} backward passes for each outcome. Use fisher='mc' "
            "with a few num_fisher_samples."
        )
    return num_classes


def _check_constant(fn: object, **parameters: Tensor) -> None:
    for name, value in parameters.items():
        if value.requires_grad:
            raise TypeError(
                f"No exact Fisher information for {type(fn).__name__} with a {name} "
                "that is computed or learned, since it isn't independent of the other "
                "parameters. Use fisher='mc', or detach it."
            )
