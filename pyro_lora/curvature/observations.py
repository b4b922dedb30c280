r"""The outcomes of a data set as functions of what a linearised network outputs.

Of each outcome the network gives M numbers z that matter, its *contrasts*: C - 1 of the
logits of C classes, a location, a log rate. With the distribution's other parameters
held, :math:`\log p(y | z)`, its gradient s and a root R of its Fisher information,
:math:`R R^T = E[s s^T]`, are functions of z alone. For two classes with logits (0, f),
say, z = f / sqrt 2 up to the sign, and at z = 0 the Fisher information is 1/2.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_lora.curvature.gaussian_logits import (
    GaussianLogits,
    class_log_probs,
    mixture_log_prob,
)
from pyro_lora.curvature.linearize import contrasts
from pyro_lora.ground.interrupts import unvalidated
from pyro_lora.ground.summary import FieldsShown
from pyro_lora.ground.synchronisation import require, scalar
from pyro_lora.likelihood import likelihoods
from pyro_lora.likelihood.data_plate import DataPlate
from pyro_lora.likelihood.likelihoods import Likelihood
from pyro_lora.likelihood.outcomes import (
    is_given,
    may_not_count,
    single_outcomes,
    values_in_range,
)

_SAME = 1e-2  # of two log densities, one of them in half precision
# Arguments of which a distribution takes one: the one that is kept.
_ALTERNATIVES = {
    "logits": ("probs",),
    "scale_tril": ("covariance_matrix", "precision_matrix"),
}


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The likelihood of N outcomes at contrasts z, (N, M); nats, the scales counted.

    Attributes:
        log_prob: (N,), float64.
        score: Gradient in z, (N, M).
        root: Of the Fisher information in z, (N, M, R).
    """

    log_prob: Tensor
    score: Tensor
    root: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Observations(FieldsShown):
    """N outcomes that count, of one type of distribution.

    Attributes:
        kind: The distribution's type.
        parameters: By the names of its constructor's arguments: tensors (N, ...) in
            float64, and what isn't a tensor.
        value: What was observed, (N, ...).
        scale: What each outcome counts, (N,), float64.
        datum: The datum that each belongs to, (N,), from 0.
        num_data: Data that there are.
        in_all: Whether all of the parameters are the network's, not the predictor
            alone.
    """

    kind: type
    parameters: Mapping[str, Any]
    value: Tensor
    scale: Tensor
    datum: Tensor
    num_data: int
    in_all: bool

    def __getstate__(self) -> dict[str, Any]:
        # What is kept for later holds functions, which can't be pickled.
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def form(self) -> tuple[Any, ...]:
        """What outcomes have in common that can be put together."""
        parameters = tuple(
            (name, x.shape[1:] if isinstance(x, Tensor) else x)
            for name, x in self.parameters.items()
        )
        event = self.value.shape[1:], self.value.dtype
        return self.kind, self.in_all, parameters, event, self.at_fit.shape[1:]

    @property
    def at_fit(self) -> Tensor:
        """The contrasts of the network itself, (N, M)."""
        return self._contrasts_and_basis[0]

    def at(self, contrasts: Tensor) -> Evaluation:
        """The likelihood at other contrasts, (N, M)."""
        f = self._predictor(contrasts).detach().requires_grad_()
        with torch.enable_grad(), unvalidated():
            fn = self._likelihood.at(f)
            root = likelihoods.of(fn).whole.root(self.value)
        with torch.no_grad(), unvalidated():
            log_prob = fn.log_prob(self.value).double() * self.scale
            in_z = self._from_contrasts.mT @ root.root.double()
            score = (in_z @ root.coordinates.double()[..., None])[..., 0]
            by_scale = self.scale.sqrt()[:, None, None]
        return Evaluation(
            log_prob.detach(), score * self.scale[:, None], in_z * by_scale
        )

    def hessian_root(self, contrasts: Tensor) -> Tensor:
        r"""A root of :math:`|\nabla^2 \log p(y | z)|`, each eigenvalue's, (N, M, M)."""
        values, vectors = torch.linalg.eigh(self.hessian(contrasts))
        return vectors * values.abs().sqrt()[..., None, :]

    def hessian(self, contrasts: Tensor) -> Tensor:
        r""":math:`\nabla^2 \log p(y | z)` at other contrasts, (N, M, M)."""
        z = contrasts.detach().requires_grad_()
        with torch.enable_grad(), unvalidated():
            fn = self._likelihood.at(self._predictor(z))
            total = (fn.log_prob(self.value).double() * self.scale).sum()
            (gradient,) = torch.autograd.grad(total, z, create_graph=True)
            rows = [
                torch.autograd.grad(g.sum(), z, retain_graph=True)[0]
                for g in gradient.unbind(-1)
            ]
        hessian = torch.stack(rows, -1)
        return (hessian + hessian.mT) / 2

    def log_predictive(self, mean: Tensor, covariance: Tensor) -> Tensor:
        r"""Log of :math:`E[p(y | z)]` for Gaussian z, (N,), nats: no scale counts.

        Args:
            mean: (N, M).
            covariance: (N, M, M).
        """
        likelihood, basis = self._likelihood, self._basis
        classes, noise = likelihood.classes, likelihood.noise
        logits = GaussianLogits(
            self._in_logits(mean),
            basis @ covariance @ basis.mT,
            noise.scale.square()[:, None] if noise and noise.df is None else None,
            None if classes is None else classes.cutpoints,
            likelihood.at if classes is None else None,
            has_scale=likelihood.has_scale,
        )
        return log_predictive(logits, likelihood, self.value)

    def where(self, chosen: Tensor) -> Observations:
        """Those of the outcomes at places (N',)."""
        parameters = {
            name: x[chosen] if isinstance(x, Tensor) else x
            for name, x in self.parameters.items()
        }
        return replace(
            self,
            parameters=parameters,
            value=self.value[chosen],
            scale=self.scale[chosen],
            datum=self.datum[chosen],
        )

    def repeated(self, number: int) -> Observations:
        """These outcomes as those of so many times the data."""
        places = torch.arange(number * len(self.datum), device=self.datum.device)
        whole = self.where(places % len(self.datum))
        return replace(whole, num_data=number * self.num_data)

    def _predictor(self, contrasts: Tensor) -> Tensor:
        up_to_shift = self._likelihood.up_to_shift
        return self._in_logits(contrasts) if up_to_shift else contrasts

    def _in_logits(self, contrasts: Tensor) -> Tensor:
        f = (self._basis @ contrasts[..., None])[..., 0]
        if not self._likelihood.up_to_shift:
            return f
        absent = self._likelihood.predictor.detach() == -math.inf
        return f.masked_fill(absent, -math.inf)

    @cached_property
    def _likelihood(self) -> Likelihood:
        with torch.enable_grad(), unvalidated():
            parameters = {
                name: x.detach().requires_grad_()
                if self.in_all and isinstance(x, Tensor) and x.is_floating_point()
                else x
                for name, x in self.parameters.items()
            }
            return likelihoods.of(self.kind(**parameters)).whole

    @cached_property
    def _contrasts_and_basis(self) -> tuple[Tensor, Tensor]:
        values, basis = contrasts(self._likelihood)
        return values.detach(), basis.detach()

    @property
    def _basis(self) -> Tensor:
        """(C, M) or, where choices are missing, (N, C, M)."""
        return self._contrasts_and_basis[1]

    @property
    def _from_contrasts(self) -> Tensor:
        """The predictor's basis: that of the logits, or one for one."""
        if self._likelihood.up_to_shift:
            return self._basis
        size = self._likelihood.predictor.shape[-1]
        return torch.eye(size, dtype=self._basis.dtype, device=self._basis.device)


def log_predictive(
    logits: GaussianLogits, likelihood: Likelihood, value: Tensor
) -> Tensor:
    r"""Log of :math:`E[p(y | f)]` of single outcomes, nats, float64.

    Args:
        logits: Gaussian f of N outcomes.
        likelihood: Of the outcomes.
        value: What was observed; a class that is none is an error of the caller's.

    Returns:
        Of the values' batch shape.
    """
    classes = likelihood.classes
    if logits.has_scale:
        parts, weights = logits.given_scale()
        each = [log_predictive(part, likelihood, value) for part in parts]
        return mixture_log_prob(torch.stack(each), weights)
    if logits.noise_variance is not None:
        variance = logits.predictive_variance.double()
        square = (value.double().reshape(variance.shape) - logits.mean).square()
        loss = 0.5 * (square / variance + (2 * math.pi * variance).log())
        return -loss.reshape(value.shape)
    if classes is None:
        return logits.log_prob(value)
    log_probs = class_log_probs(logits)
    label = value.argmax(-1) if classes.one_hot else value
    if log_probs.shape[-1] == 2:  # a Bernoulli's may be between its two classes
        shares = torch.stack([1 - label, label], -1).to(log_probs)
        return (shares * log_probs).where(shares > 0, torch.zeros_like(shares)).sum(-1)
    return log_probs.gather(-1, label.long()[..., None])[..., 0]


@dataclass(frozen=True, eq=False, repr=False)
class Observed(FieldsShown):
    """What a batch's sites observed, and where its rows are among Fisher terms (M, B).

    Attributes:
        sites: Of each site the outcomes that count, and the place of each of their rows
            in the flattened (M, B), each outcome's contrasts after another's, (n,).
    """

    sites: tuple[tuple[Observations, Tensor], ...]

    @property
    def outcomes(self) -> tuple[Observations, ...]:
        """Of each site."""
        return tuple(part for part, _ in self.sites)

    @property
    def rows(self) -> Tensor:
        """Where the rows of all sites' outcomes are, one after another, (n,)."""
        return torch.cat([order for _, order in self.sites])

    @property
    def num_each(self) -> int | None:
        """Rows of every datum, where they have one outcome of each site."""
        single = all(len(p.datum) == p.num_data for p in self.outcomes)
        return sum(p.at_fit.shape[1] for p in self.outcomes) if single else None


def joined(
    batches: Sequence[tuple[Observations, ...]],
) -> tuple[tuple[Observations, ...], list[tuple[int, slice]]]:
    """The outcomes of all batches, those of one form together.

    Args:
        batches: What each observed, site by site.

    Returns:
        Observations, and where their rows are, in order: in which batch, and where
        among its own.
    """
    forms: dict[Any, list[tuple[int, Observations, slice]]] = {}
    first = 0
    for index, batch in enumerate(batches):
        start = 0
        for part in batch:
            stop = start + part.at_fit.numel()
            own = replace(part, datum=part.datum + first)
            forms.setdefault(part.form, []).append((index, own, slice(start, stop)))
            start = stop
        first += batch[0].num_data
    members = [[part for _, part, _ in of_form] for of_form in forms.values()]
    places = [(i, where) for of_form in forms.values() for i, _, where in of_form]
    return tuple(_concatenated(parts, first) for parts in members), places


def _concatenated(parts: Sequence[Observations], num_data: int) -> Observations:
    names = parts[0].parameters
    return replace(
        parts[0],
        parameters={
            name: torch.cat([part.parameters[name] for part in parts])
            if isinstance(x, Tensor)
            else x
            for name, x in names.items()
        },
        value=torch.cat([part.value for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        datum=torch.cat([part.datum for part in parts]),
        num_data=num_data,
    )


def observe(
    site: Mapping[str, Any], plate: DataPlate
) -> tuple[Tensor, Observations, Tensor]:
    """The contrasts of a site, differentiable, and what was observed at them.

    Args:
        site: Node of a trace.
        plate: The data's.

    Returns:
        (M, B), zero where an outcome doesn't count; the outcomes that do; the place of
        each of their rows in the flattened (M, B).

    Raises:
        TypeError: If nothing is known of the distribution.
    """
    fn, value = site["fn"], values_in_range(site)
    single = single_outcomes(fn)
    own = likelihoods.of(single.fn)
    likelihood = own.whole
    values = contrasts(likelihood)[0]
    shape, num = single.fn.batch_shape, values.shape[-1]
    values = values.expand(*shape, num)
    counts = None
    if plate.mask is not None or may_not_count(site):
        counts = single.unmasked.to(value.device) & is_given(single.fn, value)
        if plate.mask is not None:
            mask = _of_outcomes(plate.mask, fn.batch_shape, shape, value)
            counts = counts & mask.bool()
        values = values.where(counts[..., None], torch.zeros_like(values))

    def by_datum(x: Tensor) -> Tensor:  # (*shape, M) -> (M', B)
        return plate.data_last(x.flatten(-1 - single.event_dims), fn.batch_shape)

    rows = torch.arange(shape.numel() * num, device=value.device)
    places = by_datum(rows.reshape(*shape, num))
    order = places.flatten().argsort()
    size = places.shape[1]
    datum = (order % size).reshape(-1, num)[:, 0]
    scale = _of_outcomes(plate.scale, fn.batch_shape, shape, value)
    with torch.no_grad(), unvalidated():
        at = likelihood.at(likelihood.predictor.detach().double())
        event = value.shape[value.ndim - len(single.fn.event_shape) :]
        observations = Observations(
            type(at),
            _parameters(at, shape),
            value.expand(*shape, *event).reshape(-1, *event),
            scale.reshape(-1).double(),
            datum,
            size,
            likelihood is not own,
        )
    chosen = None if counts is None else counts.reshape(-1).nonzero()[:, 0]
    _check_rebuilt(site["name"], observations, single.fn, chosen)
    if chosen is None:
        return by_datum(values), observations, order
    order = order.reshape(-1, num)[chosen].reshape(-1)
    return by_datum(values), observations.where(chosen), order


def _check_rebuilt(
    name: str, observations: Observations, fn: Any, chosen: Tensor | None
) -> None:
    """Check that the parameters that were kept make the same distribution.

    Raises:
        TypeError: If they don't.
    """
    with torch.no_grad(), unvalidated():
        shape = (*fn.batch_shape, *observations.value.shape[1:])
        before = fn.log_prob(observations.value.reshape(shape)).reshape(-1)
        again = observations.kind(**observations.parameters)
        after = again.log_prob(observations.value).to(before)
    if chosen is not None:
        before, after = before[chosen], after[chosen]
    is_same = torch.isclose(before, after, rtol=_SAME, atol=_SAME, equal_nan=True)

    def error() -> TypeError:
        return TypeError(
            f"Site {name!r}: structures.Exact() makes {observations.kind.__name__} "
            "again from the attributes that are named as its constructor's arguments, "
            f"{[*observations.parameters]}, and that isn't the same distribution. Keep "
            "each argument under its name, or use another structure."
        )

    require(is_same.all(), error)


def _of_outcomes(
    x: Any, batch_shape: torch.Size, shape: torch.Size, like: Tensor
) -> Tensor:
    """A mask or scale of data, as one for each of their outcomes, on a device."""
    each = scalar(x, like.double()).expand(batch_shape)
    return each.reshape(*batch_shape, *[1] * (len(shape) - len(batch_shape))).expand(
        shape
    )


def _parameters(fn: Any, shape: torch.Size) -> dict[str, Any]:
    """What a distribution is made of, tensors as (N, ...)."""
    found = {}
    arguments = inspect.signature(type(fn)).parameters
    dropped = {
        name
        for kept, others in _ALTERNATIVES.items()
        if kept in arguments
        for name in others
    }
    for name, argument in arguments.items():
        if name in dropped or name == "validate_args" or not hasattr(fn, name):
            continue
        x = getattr(fn, name)
        if not isinstance(x, Tensor) and x == argument.default:
            continue
        if isinstance(x, Tensor):
            constraint = fn.arg_constraints.get(name, constraints.real)
            event = x.shape[x.ndim - constraint.event_dim :]
            x = x.expand(*shape, *event).reshape(-1, *event)
            x = x.double() if x.is_floating_point() else x
        found[name] = x
    return found
