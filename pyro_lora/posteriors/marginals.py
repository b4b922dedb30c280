r"""Each weight by itself: medians and quantiles.

A weight's marginal under any posterior whose parts are known is a mixture of normals,
in unconstrained space, of which a particle is one of standard deviation 0:

.. math:: F(x) = \sum_n \pi_n \Phi\left(\frac{x - m_n}{s_n}\right).

The quantile of level q is the least x with F(x) >= q. Of one normal it is :math:`m + s
\Phi^{-1}(q)`; of several it lies between the smallest and the largest of theirs, where
bisection finds it. Of two at 0 and 10 with s = 1 and equal weights, say, the median is
5 and the quantile of level 1/4 is 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.special import ndtr, ndtri

from pyro_lora.ground.settings import check_kind, check_number
from pyro_lora.ground.weights import Weights

# Each halves the bracket: what is left of it is below the rounding of float64.
_NUM_BISECTIONS = 64
_ROUNDING = 1e-14  # of mixture weights that add up to a level

Levels = float | Sequence[float] | Tensor | np.ndarray


@dataclass(frozen=True, eq=False)
class Marginals:
    """The weights of one site, each by itself a mixture of n normals.

    Attributes:
        weights: Of the normals, (n,), they add up to one.
        loc: Their means in unconstrained space, (n, ...).
        sd: Their standard deviations, of that shape or broadcasting to it.
        transform: From unconstrained space to the site's support; None where that is
            the same.
    """

    weights: Tensor
    loc: Tensor
    sd: Tensor
    transform: Any = None

    def quantile(self, level: float) -> Tensor:
        """Of one level, of the site's shape.

        On a support whose coordinates depend on each other, a simplex, it is where the
        quantile in unconstrained space is taken to, as in Pyro's autoguides.
        """
        x = self._unconstrained(level)
        if self.transform is None:
            return x
        value: Tensor = self.transform(x)
        if self.transform.domain.event_dim:
            return value
        # Upper bounds are reached by falling functions, which turn the order round.
        mirrored: Tensor = self.transform(self._unconstrained(1 - level))
        one = torch.ones_like(x)
        rises = self.transform(x + one) >= self.transform(x - one)
        return value.where(rises, mirrored)

    def _unconstrained(self, level: float) -> Tensor:
        q = torch.tensor(level, dtype=torch.float64, device=self.loc.device)
        loc, sd = self.loc.double(), self.sd.double()
        of_each = loc + ndtri(q) * sd
        low, high = of_each.amin(0), of_each.amax(0)
        if len(loc) == 1:
            return low.to(self.loc)
        weights = self.weights.to(loc)
        is_point = sd == 0
        scale = sd.where(~is_point, torch.ones_like(sd))
        for _ in range(_NUM_BISECTIONS):
            middle = (low + high) / 2
            below = (middle >= loc).to(loc)
            cdf = below.where(is_point, ndtr((middle - loc) / scale))
            reached = torch.tensordot(weights, cdf, 1) >= q - _ROUNDING
            low, high = low.where(reached, middle), middle.where(reached, high)
        return high.to(self.loc)


def normals(loc: Tensor, variance: Tensor, transform: Any = None) -> Marginals:
    """One normal for each weight.

    Args:
        loc: Means in unconstrained space.
        variance: Of that shape.
        transform: As in :class:`Marginals`.
    """
    return Marginals(
        loc.new_ones(1), loc[None].clone(), variance.sqrt()[None], transform
    )


def points(values: Tensor) -> Marginals:
    """Equally weighted values.

    Args:
        values: (K, ...).
    """
    num = len(values)
    return Marginals(
        values.new_full((num,), 1 / num), values.clone(), torch.zeros_like(values)
    )


def mixed(weights: Tensor, parts: Sequence[Marginals]) -> Marginals:
    """A mixture of the marginals of one site.

    Args:
        weights: (n,), they add up to one.
        parts: One for each.
    """
    transform: Any = next((p.transform for p in parts if p.transform is not None), None)
    like, loc = parts[0].loc, []
    for part in parts:
        # Points don't say where they come from: they are on the support.
        on_support = transform is not None and part.transform is None
        loc.append(transform.inv(part.loc) if on_support else part.loc)
    return Marginals(
        torch.cat([w * p.weights.to(w) for w, p in zip(weights, parts, strict=True)]),
        torch.cat([x.to(like) for x in loc]),
        torch.cat([p.sd.to(x).expand_as(x) for p, x in zip(parts, loc, strict=True)]),
        transform,
    )


def quantiles_of(marginals: Mapping[str, Marginals], levels: Levels) -> Weights:
    """Site -> quantiles.

    Args:
        marginals: By site.
        levels: Between 0 and 1: one, or Q of them.

    Returns:
        Of the site's shape, for several levels with a leading (Q,).
    """
    each = checked_levels(levels)
    values = {
        site: torch.stack([of_site.quantile(q) for q in each])
        for site, of_site in marginals.items()
    }
    return as_given(values, levels)


def checked_levels(levels: Levels) -> list[float]:
    """The levels as numbers.

    Args:
        levels: One, or several.

    Raises:
        TypeError: If they are no numbers.
        ValueError: If one isn't between 0 and 1, or there are none.
    """
    several: Any = levels
    if isinstance(levels, Tensor | np.ndarray):
        several = levels.tolist()
    several = [several] if _is_one(levels) else several
    check_kind("quantiles", several, Sequence, "numbers between 0 and 1")
    for q in several:
        check_number("A quantile", q, 0, 1)
        if q in (0, 1):
            raise ValueError(f"Quantiles lie between 0 and 1, found {q}.")
    if not several:
        raise ValueError("quantiles is empty. Give some, such as [0.05, 0.5, 0.95].")
    return [float(q) for q in several]


def as_given(values: Weights, levels: Levels) -> Weights:
    """Values with a leading (Q,), without it where one level was given."""
    one = _is_one(levels)
    return {site: x[0] for site, x in values.items()} if one else values


def _is_one(levels: Levels) -> bool:
    if isinstance(levels, Tensor | np.ndarray):
        return levels.ndim == 0
    return isinstance(levels, int | float)


class ByMarginals(ABC):
    """A posterior whose weights are each known by themselves."""

    @abstractmethod
    def mean(self) -> Weights:
        """Site -> the mean of each weight, of the site's shape."""

    @abstractmethod
    def variance(self) -> Weights:
        """Site -> the variance of each weight, of the site's shape."""

    @abstractmethod
    def marginals(self) -> dict[str, Marginals]:
        """Of each site's weights, each by itself."""

    def quantiles(self, quantiles: Levels) -> Weights:
        r"""Quantiles of each weight by itself, of a normal :math:`m + s \Phi^{-1}(q)`.

        Of a latent on another support they are those of its unconstrained coordinates,
        taken there. Where coordinates depend on each other there, as on a simplex, that
        is a point on the support for each level, as of Pyro's autoguides: not the
        quantiles of each entry by itself, and not always in order. For these take
        draws: ``posterior.sample(1000)[site].quantile(q, 0)``.

        Args:
            quantiles: Between 0 and 1: one, or Q of them.

        Returns:
            Site -> value of the site's shape, for several with a leading (Q,). A
            particle's share is a step: the least value that as much lies below.

        Raises:
            TypeError: If they are no numbers.
            ValueError: If one isn't between 0 and 1, or a component's marginals aren't
                known.
        """
        return quantiles_of(self.marginals(), quantiles)
