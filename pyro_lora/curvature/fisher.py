"""Square roots of the Fisher information of an observed site."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch import distributions as td
from torch.nn.functional import pad

# Keeps 1 / sqrt(p) finite in float32; such a class adds less than that to the Fisher.
_MIN_PROBABILITY = torch.finfo(torch.float32).tiny ** 0.5


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


@dataclass(frozen=True)
class FisherTerms:
    r"""Scalars c_m for each datum with :math:`\sum_m \nabla c_m \nabla c_m^T = F`.

    Attributes:
        terms: c, (..., M), differentiable, ... the batch shape of the site.
        coordinates: (..., M), with :math:`\nabla \log p(y) = \sum_m \alpha_m \nabla
            c_m`, or None where the terms don't span the score.
    """

    terms: Tensor
    coordinates: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> FisherTerms:
        """The function's values at terms and coordinates."""
        alpha = self.coordinates
        return FisherTerms(
            function(self.terms), None if alpha is None else function(alpha)
        )

    def where(self, mask: Tensor | bool) -> FisherTerms:
        """Zero where a mask, which broadcasts to the batch shape, is off."""
        on = torch.as_tensor(mask, device=self.terms.device).bool()[..., None]
        return self.map(lambda x: x.where(on, torch.zeros_like(x)))


@singledispatch
def fisher_root(fn: object, value: Tensor) -> FisherRoot:
    """Root of the Fisher information of ``fn``, by its type; register your own.

    Args:
        fn: A distribution without event dims of its own beyond its parameter's.
        value: The observed value, of ``fn``'s batch shape.

    Raises:
        TypeError: If the type has no exact Fisher information here.

    >>> import pyro.distributions as dist
    >>> root = fisher_root(dist.Bernoulli(logits=torch.zeros(3)), torch.ones(3)).root
    >>> root.flatten()
    tensor([0.5000, 0.5000, 0.5000])
    """
    raise TypeError(
        f"No exact Fisher information for {type(fn).__name__}. Use fisher='mc', which "
        "works for any distribution, or register it with "
        "pyro_lora.curvature.fisher.fisher_root.register."
    )


@fisher_root.register
def _categorical(fn: td.Categorical, value: Tensor) -> FisherRoot:
    # Cholesky factor of diag(p) - p p^T in closed form (Tanabe & Sagae 1992), which is
    # a chain of binary splits: class j against the classes after it.
    p = fn.logits.detach().double().softmax(-1).clamp_min(_MIN_PROBABILITY)
    from_here = p.flip(-1).cumsum(-1).flip(-1)  # P(y >= j)
    split, here, after = p[..., :-1], from_here[..., :-1], from_here[..., 1:]
    # Column j: sqrt(p_j P_{j+1} / P_j) at j, -p_i sqrt(p_j / (P_j P_{j+1})) below it.
    below = -p[..., None] * (split / here / after).sqrt()[..., None, :]
    diagonal = torch.diag_embed((split * after / here).sqrt())
    root = below.tril(-1) + pad(diagonal, (0, 0, 0, 1))  # (..., C, C-1)
    # (1[y = j] - p_j / P_j) / root_jj where y >= j, without cancellation at P_j = p_j
    classes = torch.arange(p.shape[-1] - 1, device=p.device)
    here_or_after = -(value[..., None] >= classes).to(p) * (split / here / after).sqrt()
    alpha = torch.where(
        value[..., None] == classes, (after / here / split).sqrt(), here_or_after
    )
    return _root(fn.logits, root, alpha)


@fisher_root.register
def _bernoulli(fn: td.Bernoulli, value: Tensor) -> FisherRoot:
    limit = -math.log(_MIN_PROBABILITY)
    logits = fn.logits.detach().double().clamp(-limit, limit)
    # sqrt(p (1 - p)) and (y - p) / sqrt(p (1 - p)) without cancellation
    root = ((-logits).sigmoid() * logits.sigmoid()).sqrt()
    alpha = torch.where(value > 0.5, (-logits / 2).exp(), -(logits / 2).exp())
    return _root(fn.logits[..., None], root[..., None, None], alpha[..., None])


@fisher_root.register
def _normal(fn: td.Normal, value: Tensor) -> FisherRoot:
    scale = fn.scale.detach()
    z = (value - fn.loc.detach()) / scale
    if not fn.scale.requires_grad:
        return _root(fn.loc[..., None], (1 / scale)[..., None, None], z[..., None])
    # The network also sets the scale: in its logarithm the Fisher information is 2.
    parameter = torch.stack([fn.loc, fn.scale.log()], -1)
    root = torch.diag_embed(
        torch.stack([1 / scale, torch.full_like(scale, 2**0.5)], -1)
    )
    return _root(parameter, root, torch.stack([z, (z**2 - 1) / 2**0.5], -1))


def _root(parameter: Tensor, root: Tensor, coordinates: Tensor) -> FisherRoot:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return FisherRoot(parameter.to(dtype), root.to(dtype), coordinates.to(dtype))


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
        num_samples: M, the number of labels drawn for each datum.

    Returns:
        Terms (..., M), no coordinates.
    """
    drawn = fn.sample(torch.Size([num_samples]))
    return FisherTerms(fn.log_prob(drawn).movedim(0, -1) / num_samples**0.5, None)


def empirical_terms(fn: Any, value: Tensor) -> FisherTerms:
    r"""The "empirical Fisher", :math:`\nabla \log p(y) \nabla \log p(y)^T`.

    Args:
        fn: The observed site's distribution.
        value: The given labels.

    Returns:
        Terms (..., 1) and coordinates, all one.
    """
    log_prob = fn.log_prob(value)[..., None]
    return FisherTerms(log_prob, torch.ones_like(log_prob).detach())
