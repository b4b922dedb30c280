"""Fisher information of an observed site, as scalars whose gradients are its root."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch import distributions as td

from pyro_lora.curvature.fisher_roots import fisher_root
from pyro_lora.curvature.structures import at_least_float32


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
        value: Ignored (the labels are sampled).
        num_samples: M, the number of labels drawn for each datum. A datum's outcomes
            (event dims, such as tokens) are drawn together: M terms for all of them.

    Returns:
        Terms (..., M), no coordinates.
    """
    log_prob = _sampled_log_prob(fn, num_samples)
    return FisherTerms(log_prob / num_samples**0.5, None, scores=True)


def _sampled_log_prob(fn: Any, num_samples: int) -> Tensor:
    """Log likelihoods of outcomes drawn from ``fn`` itself, (..., M)."""
    if isinstance(fn, td.Independent):
        found = _sampled_log_prob(fn.base_dist, num_samples)
        return found.flatten(-1 - fn.reinterpreted_batch_ndims, -2).sum(-2)
    if isinstance(fn, MaskedDistribution):
        found = _sampled_log_prob(fn.base_dist, num_samples)
        on = torch.as_tensor(fn._mask, device=found.device)[..., None]
        return found.where(on, torch.zeros_like(found))
    drawn = fn.sample(torch.Size([num_samples]))
    if isinstance(fn, td.Categorical):
        # log_prob would take the logits M times, and every backward pass, too: with a
        # vocabulary's and many tokens, each is most of the memory that there is.
        return at_least_float32(fn.logits.gather(-1, drawn.movedim(0, -1)))
    return at_least_float32(fn.log_prob(drawn)).movedim(0, -1)


def empirical_terms(fn: Any, value: Tensor) -> FisherTerms:
    r"""The "empirical Fisher", :math:`\nabla \log p(y) \nabla \log p(y)^T`.

    Args:
        fn: The observed site's distribution.
        value: The given labels.

    Returns:
        Terms (..., 1) and coordinates, all one.
    """
    log_prob = fn.log_prob(value)[..., None]
    ones = torch.ones_like(log_prob).detach()
    return FisherTerms(log_prob, ones, scores=True)
