"""The table of likelihoods: all that the library knows of a distribution, by its type.

A network outputs a *predictor* f: logits, a location, the logarithm of a rate. An entry
says what its distribution is at any f, and its Fisher information. With score s, the
gradient of log p(y) in f, that is F = E[s s^T] = R R^T, and s = R a. For example, a
Poisson of rate 4 has f = log 4 and s = y - 4, so that F = 4, R = 2 and a = (y - 4) / 2.

===================================  ==================  ====================
distribution                         predictor           columns of R
===================================  ==================  ====================
Categorical, OneHotCategorical       logits              C - 1
Multinomial                          logits              C - 1
Bernoulli, Binomial                  logits              1
NegativeBinomial                     logits              1
Poisson                              log rate            1
OrderedLogistic                      predictor           1, or C - 1 [1]_
Normal, NanMaskedNormal, StudentT    location            1, or 2 [2]_
Laplace                              location            1, or 2 [2]_
MultivariateNormal, NanMasked...     location            P
===================================  ==================  ====================

The Fisher information doesn't depend on which differentiable function of these the
distribution was made from (probs, rate, ...). A subclass has the entry of its base,
but for one with a ``log_prob`` of its own, which is another distribution.

.. [1] Where gradients flow into the cutpoints, too.
.. [2] Where gradients flow into the scale, too: its logarithm is a parameter.

A type that isn't there is added in one place, and is then known to the exact Fisher
information, to ``predict`` by draws and linearised, to function space and all else:

>>> @register(dist.Gamma)
... def gamma(fn):
...     shape = fn.concentration.detach()  # which the network doesn't output
...     mean = fn.concentration / fn.rate
...     return one_parameter(
...         predictor=mean.log(),
...         information=shape,
...         score=lambda y: shape * (y / mean.detach() - 1),
...         at=lambda f: dist.Gamma(shape, shape / f.exp()),
...     )
>>> of(dist.Gamma(torch.tensor(4.0), torch.tensor(2.0))).root(torch.tensor(3.0)).root
tensor([[2.]])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any, TypeVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch import distributions as td
from torch.nn.functional import pad

from pyro_lora.ground.accumulation import at_least_float32
from pyro_lora.ground.synchronisation import scalar

# Keeps 1 / sqrt(p) finite in float32; such a class adds less than that to the Fisher.
_MIN_PROBABILITY = torch.finfo(torch.float32).tiny ** 0.5

# A root is an array of C (C - 1) for each outcome and costs C - 1 backward passes:
# beyond this many classes, a vocabulary's, neither is what anyone wants.
MOST_EXACT_CLASSES = 2_000


class _Anything(td.constraints.Constraint):
    """Also what isn't finite, which marks a missing number."""

    def check(self, value: Tensor) -> Tensor:
        return torch.ones_like(value, dtype=torch.bool)


_ANYTHING = _Anything()


@dataclass(frozen=True)
class FisherRoot:
    r"""Square root of one distribution's Fisher information in its parameter.

    With :math:`F = R R^T` and score :math:`s = \nabla_\eta \log p(y)`, the
    coordinates :math:`\alpha` solve :math:`s = R \alpha`.

    Attributes:
        parameter: What the network outputs, :math:`\eta`, (..., P), differentiable: the
            predictor, and a scale or cutpoints where gradients flow into them.
        root: R, (..., P, M), a constant.
        coordinates: :math:`\alpha` of the observed value, (..., M), a constant.
    """

    parameter: Tensor
    root: Tensor
    coordinates: Tensor


@dataclass(frozen=True, eq=False)
class Classes:
    """Outcomes that are one of C classes.

    Attributes:
        logits: Of their probabilities, up to a shift, (..., C).
        cutpoints: Of ordered classes, (..., C - 1); None of others.
        one_hot: Whether an outcome is C zeros and ones rather than a class's number.
    """

    logits: Tensor
    cutpoints: Tensor | None = None
    one_hot: bool = False

    @property
    def log_probs(self) -> Tensor:
        """Log probabilities, (..., C), float64, nats."""
        return self.logits.double().log_softmax(-1)


@dataclass(frozen=True, eq=False)
class Noise:
    """Outcomes that are the predictor and an error of a known form.

    Attributes:
        scale: Of the error, (...).
        df: Degrees of freedom of Student's t; None is normal.
    """

    scale: Tensor
    df: Tensor | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Likelihood:
    """What is known of a distribution of single outcomes, of batch shape (...).

    Attributes:
        predictor: What the network outputs and a linearised network is linear in,
            (..., P), differentiable.
        at: The distribution at other values (..., P) of the predictor, whatever dims
            are before those of the batch; its other parameters are constants.
        score: Gradient of the log density of a value in the predictor, (..., P).
        root: The Fisher information of a value's distribution: but for the number of
            trials, and what is missing, the value doesn't matter to it.
        up_to_shift: Whether adding one number to all P says nothing, as with logits.
        classes: Where outcomes are classes; None: they are numbers.
        noise: Where outcomes are the predictor and an error, which has closed forms.
        support: What an outcome can be; None: as the distribution itself says.
        given: Which values are outcomes, not marks for missing ones, (...); None: all.
        log_prob_of_draws: Log densities (M, ...) of M outcomes that could be in the
            place of a value, up to a constant; None: of any draws.
        in_all: Where gradients flow into other parameters, too, a scale or cutpoints:
            the same likelihood with those in the predictor, as ``root`` has them. None:
            the predictor is all.
        has_scale: Whether the predictor is a location and the logarithm of the scale of
            a normal error.
    """

    predictor: Tensor
    at: Callable[[Tensor], Any]
    score: Callable[[Tensor], Tensor]
    root: Callable[[Tensor], FisherRoot]
    up_to_shift: bool = False
    classes: Classes | None = None
    noise: Noise | None = None
    support: Any = None
    given: Callable[[Tensor], Tensor] | None = None
    log_prob_of_draws: Callable[[Tensor, int], Tensor] | None = None
    in_all: Likelihood | None = None
    has_scale: bool = False

    @property
    def whole(self) -> Likelihood:
        """The likelihood in all that gradients flow into."""
        return self if self.in_all is None else self.in_all


def of(fn: Any) -> Likelihood:
    """What is known of a distribution, by its type.

    Args:
        fn: A distribution of single outcomes: masks and event dims are taken off.

    Raises:
        TypeError: If nothing is known of the type, such as of one that overrides the
            ``log_prob`` of a type that is known.

    >>> of(dist.Poisson(torch.tensor(4.0))).score(torch.tensor(5.0)).tolist()
    [1.0]
    """
    return (_table if has_entry(type(fn), _table.registry) else _unknown)(fn)


Entry = TypeVar("Entry", bound=Callable[[Any], Likelihood])


def register(kind: type) -> Callable[[Entry], Entry]:
    """Add a type of distribution to the table, or change what is said of it.

    Args:
        kind: The distribution's type.

    Returns:
        A decorator of a function that makes a :class:`Likelihood` of such a
        distribution.

    Raises:
        TypeError: If ``kind`` isn't a type of distributions.
    """
    if not (isinstance(kind, type) and issubclass(kind, td.Distribution)):
        raise TypeError(
            f"likelihoods.register takes a type of distributions, such as dist.Gamma, "
            f"found {kind!r}. Use @likelihoods.register(dist.Gamma)."
        )

    def add(entry: Entry) -> Entry:
        _table.register(kind, entry)
        return entry

    return add


def known(fn: Any) -> Likelihood | None:
    """The same; None where nothing is known of the type."""
    return of(fn) if has_entry(type(fn), _table.registry) else None


def has_exact_fisher(fn: Any) -> bool:
    """Whether a distribution of single outcomes has a root of no more than many terms.

    Args:
        fn: The distribution.
    """
    entry = known(fn)
    if entry is None:
        return False
    return entry.classes is None or entry.classes.logits.shape[-1] <= MOST_EXACT_CLASSES


def has_entry(kind: type, registered: Container[type]) -> bool:
    """Whether what is registered for a distribution's type, or a base, is true of it.

    Args:
        kind: The type. One that overrides the density of its base is another
            distribution, such as a tempered or a label-smoothed one.
        registered: The types that have an entry of their own.
    """
    for base in kind.__mro__:
        if base in registered:
            return base is not object
        if "log_prob" in vars(base) and not _is_library(base):
            return False
    return False


def kind_named(name: str) -> type | None:
    """The type of distribution in the table that has a name, None if there is none.

    Args:
        name: As ``__name__``, Pyro's own where PyTorch has the same.
    """
    kinds = [kind for kind in _table.registry if kind is not object]
    kind: Any = getattr(dist, name, None)
    if isinstance(kind, type) and issubclass(kind, tuple(kinds)):
        return kind
    return next((kind for kind in kinds if kind.__name__ == name), None)


def _unknown(fn: Any) -> Likelihood:
    name = type(fn).__name__
    need = (
        "fisher='mc', another space than the function's, to_datatree with "
        "method='sample', pyro.infer.Predictive."
    )
    for base in type(fn).__mro__[:-1]:
        if base in _table.registry:
            raise TypeError(
                f"The likelihood {name} has a log_prob of its own, so that what is "
                f"known of {base.__name__} needn't be true of it. To temper a plain "
                f"{base.__name__}, put pyro.poutine.scale around its pyro.sample "
                f"statement. Add another density by pyro_lora.likelihoods.register("
                f"{name}), or use what needs no more than it and draws from it: {need}"
            )
    names = sorted({kind.__name__ for kind in _table.registry if kind is not object})
    raise TypeError(
        f"Nothing is known of the likelihood {name} but its density and draws; known "
        f"are {', '.join(names)}. Add it by pyro_lora.likelihoods.register, or use "
        f"what needs no more: {need}"
    )


_table = singledispatch(_unknown)


def _is_library(kind: type) -> bool:
    # Pyro's own subclasses of PyTorch's write the same density in another way.
    return kind.__module__.partition(".")[0] in ("torch", "pyro")


def _kind(fn: Any) -> Any:
    """The type that makes a distribution's density of other values."""
    kind = type(fn)
    if _is_library(kind):
        return kind
    # A user's subclass may make something else of the same arguments.
    base = next(base for base in kind.__mro__ if base in _table.registry)
    return getattr(dist, base.__name__, base)


def one_parameter(
    *,
    predictor: Tensor,
    information: Tensor,
    score: Callable[[Tensor], Tensor],
    at: Callable[[Tensor], Any],
) -> Likelihood:
    """A likelihood of numbers whose predictor is one number, by scalar functions of it.

    Args:
        predictor: f, (...), differentiable.
        information: The Fisher information in f, (...).
        score: Derivative of the log density of a value in f, (...).
        at: The distribution at other values of f, (...).

    Returns:
        The entry.
    """

    def root(value: Tensor) -> FisherRoot:
        return _scalar(predictor, information, score(value))

    return _with_root(predictor, score, at, root)


def _with_root(
    predictor: Tensor,
    score: Callable[[Tensor], Tensor],
    at: Callable[[Tensor], Any],
    root: Callable[[Tensor], FisherRoot],
    **others: Any,
) -> Likelihood:
    """The same with a root in a form of its own."""
    return Likelihood(
        predictor=predictor[..., None],
        at=lambda f: at(f[..., 0]),
        score=lambda value: score(value)[..., None],
        root=root,
        **others,
    )


@register(td.Categorical)
def _categorical(fn: td.Categorical) -> Likelihood:
    kind, logits = _kind(fn), fn.logits

    def root(value: Tensor) -> FisherRoot:
        classes = torch.arange(_num_classes(logits), device=logits.device)
        return _softmax(logits, (value[..., None] == classes).double())

    def log_prob_of_draws(value: Tensor, num_samples: int) -> Tensor:
        # log_prob would take the logits M times, and every backward pass, too: with a
        # vocabulary's and many tokens, each is most of the memory that there is.
        drawn = draws(fn, num_samples)
        return logits.gather(-1, drawn.movedim(0, -1)).movedim(-1, 0)

    return Likelihood(
        predictor=logits,
        at=lambda f: kind(logits=f),
        score=lambda value: _class_score(logits, value[..., None]),
        root=root,
        up_to_shift=True,
        classes=Classes(logits),
        log_prob_of_draws=log_prob_of_draws,
    )


@register(td.OneHotCategorical)
def _one_hot(fn: td.OneHotCategorical) -> Likelihood:
    kind, logits = _kind(fn), fn.logits

    def label(value: Tensor) -> Tensor:
        # The largest entry is the label, as in its log_prob.
        return value.argmax(-1, keepdim=True)

    def root(value: Tensor) -> FisherRoot:
        classes = torch.arange(_num_classes(logits), device=logits.device)
        return _softmax(logits, (label(value) == classes).double())

    return Likelihood(
        predictor=logits,
        at=lambda f: kind(logits=f),
        score=lambda value: _class_score(logits, label(value)),
        root=root,
        up_to_shift=True,
        classes=Classes(logits, one_hot=True),
    )


@register(td.Multinomial)
def _multinomial(fn: td.Multinomial) -> Likelihood:
    kind, logits, total_count = _kind(fn), fn.logits, fn.total_count

    def total(value: Tensor) -> Tensor:
        # The counts' own sum, which log_prob goes by: it may differ between data, and
        # is one for soft labels. NaN is behind a mask, or shows in the likelihood.
        trials = value.detach().double().sum(-1)
        return trials.where(trials.isfinite(), torch.zeros_like(trials))

    def root(value: Tensor) -> FisherRoot:
        _num_classes(logits)
        one = _softmax(logits, value.double())
        scale = total(value).sqrt()
        inverse = scale.reciprocal().where(scale > 0, torch.zeros_like(scale))
        return _root(
            one.parameter,
            one.root.double() * scale[..., None, None],
            one.coordinates.double() * inverse[..., None],
        )

    def score(value: Tensor) -> Tensor:
        probs = at_least_float32(logits).softmax(-1)
        return value - value.sum(-1, keepdim=True) * probs

    def log_prob_of_draws(value: Tensor, num_samples: int) -> Tensor:
        drawn = _counts(fn, total(value).expand(num_samples, *fn.batch_shape))
        # What wasn't drawn says nothing, of a choice that isn't there, too.
        return (drawn * logits.where(drawn > 0, torch.zeros_like(logits))).sum(-1)

    return Likelihood(
        predictor=logits,
        at=lambda f: kind(total_count, logits=f, validate_args=False),
        score=score,
        root=root,
        up_to_shift=True,
        # Soft labels among them
        support=td.constraints.independent(td.constraints.nonnegative, 1),
        log_prob_of_draws=log_prob_of_draws,
    )


@register(td.Bernoulli)
def _bernoulli(fn: td.Bernoulli) -> Likelihood:
    kind, logits = _kind(fn), fn.logits
    p = logits.detach().sigmoid()
    return _with_root(
        logits,
        score=lambda value: value - p,
        at=lambda f: kind(logits=f),
        root=lambda value: _logistic(logits, value, torch.ones_like(logits)),
        classes=Classes(torch.stack([torch.zeros_like(logits), logits], -1)),
        support=td.constraints.unit_interval,  # of soft labels
    )


@register(td.Binomial)
def _binomial(fn: td.Binomial) -> Likelihood:
    kind, logits, total = _kind(fn), fn.logits, fn.total_count
    p = logits.detach().sigmoid()
    return _with_root(
        logits,
        score=lambda value: value - total * p,
        at=lambda f: kind(total.to(f), logits=f),
        root=lambda value: _logistic(logits, value, total),
    )


@register(td.NegativeBinomial)
def _negative_binomial(fn: td.NegativeBinomial) -> Likelihood:
    kind, failures, logits = _kind(fn), fn.total_count.detach(), _clamped(fn.logits)

    def score(value: Tensor) -> Tensor:
        # y (1 - p) - r p, of variance r p
        return value * (-logits).sigmoid() - failures.double() * logits.sigmoid()

    def root(value: Tensor) -> FisherRoot:
        _check_constant(fn, total_count=fn.total_count)
        return _scalar(fn.logits, failures.double() * logits.sigmoid(), score(value))

    return _with_root(fn.logits, score, lambda f: kind(failures.to(f), logits=f), root)


@register(td.Poisson)
def _poisson(fn: td.Poisson) -> Likelihood:
    # s = y - rate and F = Var(y) = rate. An underflown rate of 0 has no logarithm.
    wide = at_least_float32(fn.rate)
    rate = fn.rate.detach().double().clamp_min(_MIN_PROBABILITY)
    kind = _kind(fn)
    return one_parameter(
        predictor=wide.clamp_min(torch.finfo(wide.dtype).tiny).log(),
        information=rate,
        score=lambda value: value - rate,
        at=lambda f: kind(f.exp()),
    )


@register(dist.OrderedLogistic)
def _ordered_logistic(fn: dist.OrderedLogistic) -> Likelihood:
    kind, cutpoints = _kind(fn), fn.cutpoints.detach()
    splits = cutpoints.double() - fn.predictor.detach().double()[..., None]
    a, b = (
        pad(splits, (1, 0), value=-math.inf),
        pad(splits, (0, 1), value=math.inf),
    )
    # P(y = k) is s(b) - s(a) and has derivative -P(y = k) (s(b) - s(-a)) with s the
    # sigmoid: both differences written as products, which don't cancel.
    p = b.sigmoid() * (-a).sigmoid() * -torch.expm1(a - b)
    sum_is_negative = a + b < 0
    smaller = torch.where(sum_is_negative, -b, b).sigmoid()
    larger = torch.where(sum_is_negative, -a, a).sigmoid()
    size = smaller * larger * -torch.expm1(-(a + b).abs())
    scores = torch.where(sum_is_negative, -size, size)  # (..., C)
    information = (p * scores.square()).sum(-1)

    def score(value: Tensor) -> Tensor:
        classes = torch.arange(p.shape[-1], device=p.device)
        is_class = value[..., None] == classes
        return scores.where(is_class, torch.zeros_like(p)).sum(-1)

    def root(value: Tensor) -> FisherRoot:
        if fn.cutpoints.requires_grad:
            return _categorical(fn).root(value)
        return _scalar(fn.predictor, information, score(value))

    return _with_root(
        fn.predictor,
        score,
        lambda f: kind(f, cutpoints.to(f)),
        root,
        classes=Classes(fn.logits, cutpoints),
        log_prob_of_draws=_categorical(fn).log_prob_of_draws,
        in_all=_at_own_logits(fn) if fn.cutpoints.requires_grad else None,
    )


def _at_own_logits(fn: td.Categorical) -> Likelihood:
    """Of any classes, with all their logits as the predictor."""
    return replace(_categorical(fn), at=lambda f: td.Categorical(logits=f))


@register(td.Normal)
def _normal(fn: td.Normal) -> Likelihood:
    # At scale 1: s is (z, z^2 - 1) in location and log scale, F is diag(1, 2).
    kind, scale = _kind(fn), fn.scale.detach()

    def root(value: Tensor) -> FisherRoot:
        z = _standardized(fn, value)
        return _location_scale(fn, (1.0, 2.0), (z, z.square() - 1))

    return _around_location(
        fn, root, at=lambda f, s=scale: kind(f, s.to(f)), noise=Noise(scale)
    )


@register(dist.NanMaskedNormal)
def _nan_masked_normal(fn: dist.NanMaskedNormal) -> Likelihood:
    normal = _normal(fn)

    def root(value: Tensor) -> FisherRoot:
        fisher = normal.root(value)
        seen = value.isfinite()[..., None]
        return FisherRoot(
            fisher.parameter,
            fisher.root.where(seen[..., None], torch.zeros_like(fisher.root)),
            fisher.coordinates.where(seen, torch.zeros_like(fisher.coordinates)),
        )

    return replace(normal, root=root, support=_ANYTHING, given=torch.isfinite)


@register(td.StudentT)
def _student_t(fn: td.StudentT) -> Likelihood:
    # Lange, Little and Taylor (1989): the location's and the scale's are uncorrelated.
    kind, scale, df = _kind(fn), fn.scale.detach(), fn.df.detach()

    def root(value: Tensor) -> FisherRoot:
        _check_constant(fn, df=fn.df)
        nu = df.double()
        z = _standardized(fn, value)
        weight = (nu + 1) / (nu + z.square())
        information = ((nu + 1) / (nu + 3), 2 * nu / (nu + 3))
        scores = (weight * z, weight * z.square() - 1)
        return _location_scale(fn, information, scores)

    return _around_location(
        fn,
        root,
        at=lambda f, s=scale: kind(df.to(f), f, s.to(f)),
        noise=Noise(scale, df),
    )


@register(td.Laplace)
def _laplace(fn: td.Laplace) -> Likelihood:
    # At scale 1: s is (sign z, |z| - 1) and F the identity, though -d s / dz is 0.
    kind, scale = _kind(fn), fn.scale.detach()

    def root(value: Tensor) -> FisherRoot:
        z = _standardized(fn, value)
        return _location_scale(fn, (1.0, 1.0), (z.sign(), z.abs() - 1))

    return _around_location(fn, root, at=lambda f, s=scale: kind(f, s.to(f)))


@register(td.MultivariateNormal)
def _multivariate_normal(fn: td.MultivariateNormal) -> Likelihood:
    # s = S^-1 (y - loc), F = S^-1
    kind, covariance = _kind(fn), fn.covariance_matrix.detach()
    loc = fn.loc.detach().double()

    def root(value: Tensor) -> FisherRoot:
        _check_constant(fn, covariance_matrix=fn.covariance_matrix)
        # With Sigma = L L^T the precision's root is L^-T, and a = L^-1 (y - loc). A
        # value that is missing is one of its own, which has no part in either.
        seen = value.isfinite()
        both = seen[..., :, None] & seen[..., None, :]
        own = covariance.double().where(both, torch.zeros_like(covariance).double())
        cholesky = torch.linalg.cholesky(own + torch.diag_embed((~seen).double()))
        eye = torch.eye(loc.shape[-1], dtype=loc.dtype, device=loc.device)
        inverse = torch.linalg.solve_triangular(cholesky, eye, upper=False)
        inverse = inverse * seen[..., None, :]
        distance = (value.double() - loc).where(seen, torch.zeros_like(loc))
        alpha = (inverse @ distance[..., None])[..., 0]
        return _root(fn.loc, inverse.mT.expand(*alpha.shape, -1), alpha)

    def score(value: Tensor) -> Tensor:
        fisher = root(value)
        return (fisher.root @ fisher.coordinates[..., None])[..., 0]

    return Likelihood(
        predictor=fn.loc,
        at=lambda f: kind(f, covariance.to(f)),
        score=score,
        root=root,
    )


@register(dist.NanMaskedMultivariateNormal)
def _nan_masked_multivariate_normal(
    fn: dist.NanMaskedMultivariateNormal,
) -> Likelihood:
    def log_prob_of_draws(value: Tensor, num_samples: int) -> Tensor:
        seen = value.isfinite()
        seen = seen | ~seen.any(-1, keepdim=True)
        log_prob: Tensor = fn.log_prob(draws(fn, num_samples).where(seen, torch.nan))
        return log_prob

    return replace(
        _multivariate_normal(fn),
        support=td.constraints.independent(_ANYTHING, 1),
        given=lambda value: value.isfinite().any(-1),  # the others are integrated over
        log_prob_of_draws=log_prob_of_draws,
    )


def check_draws(fn: Any) -> None:
    """Check that a distribution's draws can be of the density that it has.

    Args:
        fn: A distribution of single outcomes.

    Raises:
        TypeError: If its type overrides ``log_prob`` of a base, and draws as that does.
    """
    for base in type(fn).__mro__:
        if _is_library(base) or {"sample", "rsample"} & {*vars(base)}:
            return
        if "log_prob" in vars(base):
            raise TypeError(
                f"The likelihood {type(fn).__name__} has a log_prob of its own, but "
                "draws as its base does, and fisher='mc' needs draws that follow the "
                "density. Override sample, too, or register the type by "
                f"pyro_lora.likelihoods.register({type(fn).__name__}). To temper a "
                "likelihood put pyro.poutine.scale around its pyro.sample statement."
            )


def draws(fn: Any, num_samples: int) -> Tensor:
    """M outcomes, (M, ...), which have no history."""
    with torch.no_grad():
        # A transform may remember the tensor that it made, and answer without the
        # parameters' gradients if it is asked for the inverse: it gets another one.
        drawn: Tensor = fn.sample(torch.Size([num_samples])).clone()
    return drawn


def _counts(fn: td.Multinomial, total: Tensor) -> Tensor:
    """Counts (M, ..., C) of as many trials, (M, ...), one after the other class."""
    # The part of a trial, as soft labels may have: its root, so that the score has a
    # part of the variance.
    whole, part = total.floor(), total - total.floor()
    probs = fn.probs.detach().double()
    last = td.Categorical(probs, validate_args=False).sample(whole.shape[:1])
    drawn = probs.new_zeros(*whole.shape, probs.shape[-1])
    left = probs.flip(-1).cumsum(-1).flip(-1)  # P(y >= j)
    for j in range(probs.shape[-1]):  # class j, or one after it
        share = (probs[..., j] / left[..., j]).nan_to_num(0.0).clamp(0, 1)
        drawn[..., j] = torch.binomial(whole, share.expand(whole.shape))
        whole = whole - drawn[..., j]
    return drawn.scatter_add_(-1, last[..., None], part.sqrt()[..., None])


def _class_score(logits: Tensor, label: Tensor) -> Tensor:
    """The class less the probabilities, (..., C), for a label (..., 1)."""
    probs = at_least_float32(logits.detach()).softmax(-1)
    # What is no class is behind a mask. Labels are the same for all draws.
    index = label.long().clamp(0, probs.shape[-1] - 1).expand(*probs.shape[:-1], 1)
    return probs.neg_().scatter_add_(-1, index, torch.ones_like(probs[..., :1]))


def _around_location(
    fn: td.Normal | td.StudentT | td.Laplace,
    root: Callable[[Tensor], FisherRoot],
    at: Callable[..., Any],
    noise: Noise | None = None,
) -> Likelihood:
    """Of a symmetric density: the scale is no part of what is predicted.

    Args:
        fn: The distribution.
        root: Of the location, and of the scale where gradients flow into it.
        at: The distribution at a location, and at a scale or the own one.
        noise: What is known of the error.
    """

    def score(value: Tensor) -> Tensor:
        fisher = root(value)
        return fisher.root[..., 0, 0] * fisher.coordinates[..., 0]

    def score_in_all(value: Tensor) -> Tensor:
        found = root(value)
        return (found.root @ found.coordinates[..., None])[..., 0]

    in_all = None
    if fn.scale.requires_grad:
        in_all = Likelihood(
            predictor=torch.stack([fn.loc, fn.scale.log()], -1),
            at=lambda f: at(f[..., 0], f[..., 1].exp()),
            score=score_in_all,
            root=root,
            has_scale=noise is not None and noise.df is None,
        )
    return _with_root(fn.loc, score, at, root, noise=noise, in_all=in_all)


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
    fn: td.Normal | td.StudentT | td.Laplace,
    information: tuple[Tensor | float, Tensor | float],
    scores: tuple[Tensor, Tensor],
) -> FisherRoot:
    """Of a symmetric density, at scale one, in location and logarithm of the scale."""
    loc, scale = fn.loc, fn.scale
    s = scale.detach().double()
    roots = [scalar(x, s) for x in information]
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
    informative = information > 0
    root = information.clamp_min(_MIN_PROBABILITY).sqrt() * informative
    alpha = (score / root).where(informative, torch.zeros_like(root))
    return _root(parameter[..., None], root[..., None, None], alpha[..., None])


def _root(parameter: Tensor, root: Tensor, coordinates: Tensor) -> FisherRoot:
    parameter = at_least_float32(parameter)
    return FisherRoot(parameter, root.to(parameter), coordinates.to(parameter))


def _clamped(logits: Tensor) -> Tensor:
    limit = -math.log(_MIN_PROBABILITY)
    return logits.detach().double().clamp(-limit, limit)


class TooManyClasses(ValueError):
    """The exact Fisher information isn't to be had, whatever the batch."""


def _num_classes(logits: Tensor) -> int:
    num_classes = logits.shape[-1]
    if num_classes > MOST_EXACT_CLASSES:
        raise TooManyClasses(
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
                "that is computed or learned, of which there is none in closed form. "
                "Use fisher='mc', or detach it."
            )
