"""Fisher information of an observed site, as scalars whose gradients are its root."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch import distributions as td

from pyro_lora.curvature.factors import at_least_float32
from pyro_lora.likelihood.fisher_roots import fisher_root
from pyro_lora.likelihood.outcomes import is_given


@dataclass(frozen=True)
class FisherTerms:
    r"""Scalars c_m for each datum with :math:`\sum_m \nabla c_m \nabla c_m^T = F`.

    Attributes:
        terms: c, (..., M), differentiable, ... the batch shape of the site.
        coordinates: (..., M), with :math:`\nabla \log p(y) = \sum_m \alpha_m \nabla
            c_m`, or None where the terms don't span the score.
        scores: Whether terms are log likelihoods, which add up over the independent
            outcomes of a datum; roots stand side by side.
    """

    terms: Tensor
    coordinates: Tensor | None
    scores: bool = False

    def map(self, function: Callable[[Tensor], Tensor]) -> FisherTerms:
        """The function's values at terms and coordinates."""
        alpha = self.coordinates
        return replace(
            self,
            terms=function(self.terms),
            coordinates=None if alpha is None else function(alpha),
        )

    def where(self, mask: Tensor | bool) -> FisherTerms:
        """Zero where a mask, which broadcasts to the batch shape, is off."""
        on = torch.as_tensor(mask, device=self.terms.device).bool()[..., None]
        return self.map(lambda x: x.where(on, torch.zeros_like(x)))


def exact_terms(fn: Any, value: Tensor) -> FisherTerms:
    """Fisher terms in closed form: C - 1 for C classes, one for a scalar.

    Args:
        fn: The observed site's distribution; event dims added by ``.to_event`` give
            terms of their own.
        value: The observed value.

    Returns:
        Terms and coordinates, (..., M) with ... the batch shape of ``fn``.

    Raises:
        TypeError: If the distribution has no exact Fisher information here.
        ValueError: If there are more classes than anyone has backward passes for.
    """
    if isinstance(fn, td.Independent):
        found = exact_terms(fn.base_dist, value)
        return found.map(lambda x: x.flatten(-1 - fn.reinterpreted_batch_ndims))
    if isinstance(fn, MaskedDistribution):
        return exact_terms(fn.base_dist, value).where(fn._mask)
    root = fisher_root(fn, value)
    terms = (root.parameter[..., None] * root.root).sum(-2)
    return FisherTerms(terms, root.coordinates)


def mc_terms(fn: Any, value: Tensor, num_samples: int = 1) -> FisherTerms:
    r"""Fisher terms :math:`\log p(y_m) / \sqrt{M}` by sampled labels, any likelihood.

    Args:
        fn: The observed site's distribution.
        value: The observed value, of which only so much counts as says what there was
            to observe: which outcomes are missing, and of how many trials counts are.
        num_samples: M, the number of labels drawn for each datum. A datum's outcomes
            (event dims, such as tokens) are drawn together: M terms for all of them.

    Returns:
        Terms (..., M), no coordinates.
    """

    def drawn(single: Any, given: Tensor) -> Tensor:
        found = log_prob_of_draws(single, given, num_samples)
        return at_least_float32(found).movedim(0, -1)

    log_prob = _log_prob_of_data(fn, value, drawn)
    return FisherTerms(log_prob / num_samples**0.5, None, scores=True)


def _log_prob_of_data(
    fn: Any, value: Tensor, of_single: Callable[[Any, Tensor], Tensor]
) -> Tensor:
    """Log likelihoods of all outcomes of a datum, (..., M), from those of single ones.

    What doesn't count is 0, but still a function of the network's outputs.
    """
    if isinstance(fn, td.Independent):
        found = _log_prob_of_data(fn.base_dist, value, of_single)
        return found.flatten(-1 - fn.reinterpreted_batch_ndims, -2).sum(-2)
    if isinstance(fn, MaskedDistribution):
        found = _log_prob_of_data(fn.base_dist, value, of_single)
        counts = torch.as_tensor(fn._mask, device=found.device)
    else:
        found, counts = of_single(fn, value), is_given(fn, value)
    return found.where(counts[..., None], torch.zeros_like(found))


@singledispatch
def log_prob_of_draws(fn: Any, value: Tensor, num_samples: int) -> Tensor:
    """Log likelihood of M outcomes that could have been in the place of ``value``.

    By the distribution's type, where drawing from it isn't all: counts, for example,
    have the number of trials that the given ones have.

    Args:
        fn: The distribution of single outcomes.
        value: The observed value, of ``fn``'s shape.
        num_samples: M.

    Returns:
        (M, ...) with ... the batch shape, up to a constant; anything where no outcome
        is given.
    """
    return fn.log_prob(_drawn(fn, num_samples))


@log_prob_of_draws.register
def _with_gaps(
    fn: dist.NanMaskedMultivariateNormal, value: Tensor, num_samples: int
) -> Tensor:
    seen = value.isfinite()
    seen = seen | ~seen.any(-1, keepdim=True)
    return fn.log_prob(_drawn(fn, num_samples).where(seen, torch.nan))


@log_prob_of_draws.register
def _categorical(fn: td.Categorical, value: Tensor, num_samples: int) -> Tensor:
    # log_prob would take the logits M times, and every backward pass, too: with a
    # vocabulary's and many tokens, each is most of the memory that there is.
    drawn = _drawn(fn, num_samples)
    return fn.logits.gather(-1, drawn.movedim(0, -1)).movedim(-1, 0)


@log_prob_of_draws.register
def _multinomial(fn: td.Multinomial, value: Tensor, num_samples: int) -> Tensor:
    # A distribution has one total for all data, but log_prob goes by the counts' own.
    total = value.detach().double().sum(-1)
    total = total.where(total.isfinite(), torch.zeros_like(total))
    rest = total.expand(num_samples, *fn.batch_shape)
    # The part of a trial, as soft labels may have: its root, so that the score has a
    # part of the variance.
    whole, part = rest.floor(), rest - rest.floor()
    probs = fn.probs.detach().double()
    last = td.Categorical(probs, validate_args=False).sample(whole.shape[:1])
    drawn = torch.zeros(*whole.shape, probs.shape[-1]).to(probs)
    left = probs.flip(-1).cumsum(-1).flip(-1)  # P(y >= j)
    for j in range(probs.shape[-1]):  # class j, or one after it
        share = (probs[..., j] / left[..., j]).nan_to_num(0.0).clamp(0, 1)
        drawn[..., j] = torch.binomial(whole, share.expand(whole.shape))
        whole = whole - drawn[..., j]
    drawn.scatter_add_(-1, last[..., None], part.sqrt()[..., None])
    logits = fn.logits
    return (drawn * logits.where(drawn > 0, torch.zeros_like(logits))).sum(-1)


def _drawn(fn: Any, num_samples: int) -> Tensor:
    """M outcomes, (M, ...), which have no history."""
    with torch.no_grad():
        # A transform may remember the tensor that it made, and answer without the
        # parameters' gradients if it is asked for the inverse: it gets another one.
        drawn: Tensor = fn.sample(torch.Size([num_samples])).clone()
    return drawn


def empirical_terms(fn: Any, value: Tensor) -> FisherTerms:
    r"""The "empirical Fisher", :math:`\nabla \log p(y) \nabla \log p(y)^T`.

    Args:
        fn: The observed site's distribution.
        value: The given labels.

    Returns:
        Terms (..., 1) and coordinates, all one.
    """

    def scored(single: Any, given: Tensor) -> Tensor:
        missing = ~is_given(single, given)
        if bool(missing.any()):
            event = (1,) * len(single.event_shape)
            missing = missing.reshape(missing.shape + event)
            given = _drawn(single, 1)[0].where(missing, given)
        return single.log_prob(given)[..., None]

    log_prob = _log_prob_of_data(fn, value, scored)
    ones = torch.ones_like(log_prob).detach()
    return FisherTerms(log_prob, ones, scores=True)
