r"""The Laplace posterior in its exact dual form: N rows in place of D weights.

With J the Jacobian of all n rows (the contrasts of the data's outcomes, or Fisher
terms) and R a block-diagonal root of their Fisher information, the precision is

.. math:: P = T + J^T R R^T J, \qquad T = \mathrm{diag}(\tau),

and everything asked of it follows from :math:`K = J T^{-1} J^T` and the n x n matrix
:math:`B = I + R^T K R` (Woodbury): nothing of size D x D is formed, and nothing is
approximated. A datum x = 2 of y = w x + noise of variance 1, with tau = 4, say: J = 2,
R = 1, K = 2 * 2 / 4 = 1, B = 2, and P = 4 + 4 = tau det B.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_lora.curvature.dense_gaussian import unflatten_weights
from pyro_lora.curvature.factors import RowFactors
from pyro_lora.curvature.joint_distribution import JointDistribution
from pyro_lora.curvature.observations import Observations, Observed, joined
from pyro_lora.curvature.weight_gaussian import WeightGaussian
from pyro_lora.ground.summary import FieldsShown
from pyro_lora.ground.weights import Weights

_LEAST_SHARE = 1e-12  # of the data in a precision, which isn't rounding
MAX_ROWS = 20_000  # of which an n x n matrix has 3.2 GB


@dataclass(frozen=True, eq=False, repr=False)
class Rows(FieldsShown):
    """The Jacobian of n rows in all weights, layer by layer.

    Attributes:
        origin: The weights that it is taken at, site -> (L, ...).
        values: Site -> (L, n, O I), in float32 or wider.
    """

    origin: Weights
    values: Weights

    def __len__(self) -> int:
        return next(iter(self.values.values())).shape[1]

    def kernel(self, precision: Mapping[str, Tensor]) -> Tensor:
        """:math:`J T^{-1} J^T`, (n, n), float64, differentiable in the precision.

        Args:
            precision: Site -> tau, broadcasting over the site.
        """
        tau = self.by_matrix(precision)
        if any(x[0].numel() > 1 for x in tau.values()):
            return self._weighted_kernel(tau)
        layers = {site: x.reshape(-1) for site, x in tau.items()}
        each = torch.cat(list(layers.values())).double()
        if bool((each == each[0]).all()):
            return self._gram / each.mean()
        if all(bool((x == x[0]).all()) for x in layers.values()):
            of_sites = torch.stack([x.double().mean() for x in layers.values()])
            return torch.einsum("s,sij->ij", 1 / of_sites, self._site_grams)
        return torch.einsum("l,lij->ij", 1 / each, self._layer_grams)

    def by_matrix(self, precision: Mapping[str, Tensor]) -> Weights:
        """Each site's precision as (L, 1, 1) where each matrix has one, else whole."""
        found = {}
        for site, x in self.origin.items():
            tau = precision[site].to(x.device)
            if tau.shape[1 - x.ndim :].numel() > 1:
                tau = tau.expand(x.shape)
                first = tau.flatten(1)[:, :1]
                if bool((tau.flatten(1) == first).all()):
                    tau = first
            if tau.numel() <= x.shape[0]:
                tau = tau.reshape(-1, *[1] * (x.ndim - 1))
                tau = tau.expand(x.shape[0], *[1] * (x.ndim - 1))
            found[site] = tau
        return found

    def dot(self, weights: Mapping[str, Tensor]) -> Tensor:
        """J w, (S, n), float64, for weights with a leading (S,)."""
        total: Tensor | float = 0.0
        for site, rows in self.values.items():
            w = weights[site].flatten(2) if weights[site].ndim > 2 else weights[site]
            w = w.reshape(len(w), rows.shape[0], -1).double()  # (S, L, O I)
            for layer, matrix in enumerate(rows):
                total = total + w[:, layer] @ matrix.double().mT
        assert isinstance(total, Tensor)
        return total

    def spread(self, alpha: Tensor) -> Weights:
        """J' alpha, site -> (S, L, ...), for alpha (S, n)."""
        return {
            site: torch.stack([alpha.double() @ matrix.double() for matrix in rows], 1)
            .to(rows)
            .reshape(len(alpha), *self.origin[site].shape)
            for site, rows in self.values.items()
        }

    def matrices(self) -> Iterable[tuple[str, int, Tensor]]:
        """Site, layer, and rows (n, O I), of every matrix in order."""
        for site, rows in self.values.items():
            for layer, matrix in enumerate(rows):
                yield site, layer, matrix

    def _weighted_kernel(self, tau: Mapping[str, Tensor]) -> Tensor:
        total: Tensor | float = 0.0
        for site, layer, rows in self.matrices():
            x = self.origin[site]
            own = tau[site].expand(x.shape)[layer].flatten().double()
            wide = rows.double()
            total = total + (wide / own) @ wide.mT
        assert isinstance(total, Tensor)
        return total

    @cached_property
    def _gram(self) -> Tensor:
        return self._sum_of(self.matrices())

    @cached_property
    def _site_grams(self) -> Tensor:
        sites = ((site, iter(rows)) for site, rows in self.values.items())
        return torch.stack(
            [self._sum_of((site, 0, x) for x in rows) for site, rows in sites]
        )

    @cached_property
    def _layer_grams(self) -> Tensor:
        return torch.stack([_outer(x) for _, _, x in self.matrices()])

    def _sum_of(self, matrices: Iterable[tuple[str, int, Tensor]]) -> Tensor:
        total: Tensor | float = 0.0
        for _, _, x in matrices:
            total = total + _outer(x)
        assert isinstance(total, Tensor)
        return total


def _outer(rows: Tensor) -> Tensor:
    # In float64: rounding of K would count as prior variance of its own, and K may be
    # a million times the variance that the data leave.
    wide = rows.double()
    return wide @ wide.mT


@dataclass(frozen=True, eq=False, repr=False)
class Roots(FieldsShown):
    """A block-diagonal root R of the rows' Fisher information, one block an outcome.

    Attributes:
        blocks: One after another (N, M, R), float64: N outcomes of M rows each.
    """

    blocks: tuple[Tensor, ...]

    def left(self, x: Tensor) -> Tensor:
        """R x for (k, ...)."""
        return self._times(x, self.blocks)

    def right(self, x: Tensor) -> Tensor:
        """R' x for (n, ...)."""
        return self._times(x, [b.mT for b in self.blocks])

    def within(self, kernel: Tensor) -> Tensor:
        """R' K R, (k, k), for (n, n)."""
        return self.right(self.right(kernel).mT)

    @staticmethod
    def _times(x: Tensor, blocks: Sequence[Tensor]) -> Tensor:
        rest = x.shape[1:]
        flat = x.reshape(len(x), math.prod(rest))  # there may be no rows
        parts = flat.split([b.shape[0] * b.shape[2] for b in blocks])
        done = [
            part * b[:, :, 0]
            if b.shape[1:] == (1, 1)
            else (b @ part.reshape(*b.shape[::2], part.shape[1])).flatten(0, 1)
            for b, part in zip(blocks, parts, strict=True)
        ]
        whole = done[0] if len(done) == 1 else torch.cat(done)
        return whole.reshape(len(whole), *rest)


class UnresolvedError(ValueError):
    """The data say so much more than the prior that float64 can't tell it."""


def cholesky_of(kernel: Tensor, roots: Roots) -> Tensor:
    """Cholesky factor of :math:`I + R^T K R`, whose eigenvalues are at least 1.

    Args:
        kernel: K, (n, n).
        roots: R.

    Raises:
        UnresolvedError: If rounding is more than that.
    """
    inside = roots.within(kernel)
    inside.diagonal().add_(1)
    root, info = torch.linalg.cholesky_ex(inside)
    if int(info):
        raise UnresolvedError(
            "Beside the prior the Fisher information of the data is beyond the digits "
            f"of float64: entries of I + R'KR run to {float(inside.abs().max()):.3g}. "
            "Use a larger prior precision; a noise scale that the network outputs may "
            "have gone to 0."
        )
    return root


@dataclass(frozen=True, eq=False, repr=False)
class DualGaussian(WeightGaussian):
    """The Gaussian with precision :math:`T + J^T R R^T J`.

    Attributes:
        loc: Its mean, site -> value: the origin of the rows, or a mode of the network
            that is linearised there.
        prior_precision: Site -> tau, (L, 1, 1) where each matrix has one.
        rows: J.
        roots: R, at the mean.
        observations: What the rows are the contrasts of, in order; empty where they are
            Fisher terms.
        mode_precision: Of the normal prior under which the mean is the mode of the
            linearised network; None where it's none.
    """

    loc: Weights
    prior_precision: Weights
    rows: Rows
    roots: Roots
    observations: tuple[Observations, ...] = ()
    mode_precision: Weights | None = None

    @property
    def structure(self) -> str:
        """See the base class."""
        num_data = sum(x.num_data for x in self.observations[:1])
        rows = f"exact, in {len(self.rows):,} rows"
        return f"{rows} of {num_data:,} data" if num_data else rows

    @property
    def origin(self) -> Weights:
        """See the base class."""
        return self.rows.origin

    def with_prior_precision(
        self, prior_precision: Mapping[str, Tensor]
    ) -> DualGaussian:
        """See the base class."""
        return replace(self, prior_precision=self.rows.by_matrix(prior_precision))

    def sample(self, num_samples: int) -> Weights:
        """See the base class; a draw of the prior, corrected (Matheron's rule)."""
        # u ~ N(0, T^-1), e ~ N(0, I): u - T^-1 J' R B^-1 (R' J u + e) ~ N(0, P^-1)
        noise = {
            site: torch.randn(num_samples, *x.shape, dtype=x.dtype, device=x.device)
            * self.prior_precision[site].to(x).rsqrt()
            for site, x in self.loc.items()
        }
        image = self.roots.right(self.rows.dot(noise).mT)  # (k, S)
        image = image + torch.randn(image.shape, dtype=image.dtype, device=image.device)
        alpha = self.roots.left(torch.cholesky_solve(image, self._cholesky)).mT
        return {
            site: x + noise[site] - step / self.prior_precision[site].to(x)
            for (site, x), step in zip(
                self.loc.items(), self.rows.spread(alpha).values(), strict=True
            )
        }

    def log_prob(self, weights: Mapping[str, Tensor]) -> Tensor:
        """See the base class."""
        lead = next(iter(weights.values())).shape
        first = next(iter(self.loc.values()))
        lead = lead[: len(lead) - first.ndim]
        moved = {
            site: (weights[site] - x).reshape(-1, *x.shape)
            for site, x in self.loc.items()
        }
        of_data = self.roots.right(self.rows.dot(moved).mT).square().sum(0)
        of_prior = torch.stack(
            [
                (self.prior_precision[s] * x.square()).flatten(1).sum(1).double()
                for s, x in moved.items()
            ]
        ).sum(0)
        size = sum(x.numel() for x in self.loc.values())
        log_det = self.log_det(self.prior_precision)
        log_prob = 0.5 * (log_det - of_data - of_prior - size * math.log(2 * math.pi))
        return log_prob.to(first).reshape(lead)

    def variance(self) -> Weights:
        """See the base class."""
        found = {site: torch.empty_like(x) for site, x in self.loc.items()}
        for site, layer, rows in self.rows.matrices():
            tau = self._of_layer(self.prior_precision, site, layer)
            half = torch.linalg.solve_triangular(
                self._cholesky, self.roots.right(rows.double()), upper=False
            )
            own = 1 / tau - half.square().sum(0) / tau.square()
            found[site][layer] = own.reshape(found[site].shape[1:]).to(found[site])
        return found

    def log_det(self, prior_precision: Mapping[str, Tensor]) -> Tensor:
        """See the base class."""
        tau = self.rows.by_matrix(prior_precision)
        of_prior = torch.stack(
            [
                tau[site].double().log().sum() * (x.numel() / tau[site].numel())
                for site, x in self.loc.items()
            ]
        ).sum()
        uniform = _uniform(tau)
        if uniform is not None and uniform.requires_grad:  # many to come
            return of_prior + torch.log1p(self._spectrum[0] / uniform).sum()
        kernel = self.rows.kernel(tau)
        return of_prior + 2 * cholesky_of(kernel, self.roots).diagonal().log().sum()

    def effective_parameters_by_layer(self) -> Weights:
        """See the base class."""
        return {
            site: (1 - self.prior_precision[site].double() * x.double())
            .flatten(1)
            .sum(1)
            for site, x in self.variance().items()
        }

    def informed_directions(self, num_directions: int) -> tuple[Weights, Tensor]:
        """See the base class."""
        # T^-1/2 J' R has the left singular vectors that are asked for.
        inside = self.roots.within(self.rows.kernel(self.prior_precision))
        values, vectors = torch.linalg.eigh(inside)
        # Rows that say the same twice leave directions to rounding, which aren't any.
        informed = int((values > _LEAST_SHARE * (1 + values.max())).sum())
        if informed == 0:
            return self._first_axis()
        number = min(num_directions, informed)
        values, vectors = values[-number:].flip(0), vectors[:, -number:].flip(1)
        scale = (values * (1 + values)).rsqrt()
        alpha = (self.roots.left(vectors) * scale).mT
        steps = {
            site: x / self.prior_precision[site].to(x)
            for site, x in self.rows.spread(alpha).items()
        }
        return steps, values / (1 + values)

    def _first_axis(self) -> tuple[Weights, Tensor]:
        """One prior standard deviation of the first weight, of which no datum says."""
        steps = {site: torch.zeros_like(x)[None] for site, x in self.loc.items()}
        site = next(iter(steps))
        sd = self.prior_precision[site].to(steps[site]).flatten()[0].rsqrt()
        steps[site].view(-1)[0] = sd
        return steps, torch.zeros(1, dtype=torch.float64, device=sd.device)

    def covariance(
        self,
        jacobians: Iterable[tuple[str, Tensor]],
        prior_precisions: Sequence[Mapping[str, Tensor]],
    ) -> Tensor:
        """See the base class."""
        taus = [self.rows.by_matrix(tau) for tau in prior_precisions]
        uniform = [_uniform(tau) for tau in taus]
        if None in uniform:
            each = taus
        else:  # one product for all priors
            each = [{site: torch.ones_like(x[:1]) for site, x in taus[0].items()}]
        own: list[Any] = [0.0] * len(each)  # (B, M, M)
        cross: list[Any] = [0.0] * len(each)  # (B M, n)
        layers = dict.fromkeys(self.loc, 0)
        like = None
        for site, j in jacobians:
            like = j
            layer = layers[site]
            layers[site] += 1
            flat = j.flatten(2)
            for q, tau in enumerate(each):
                own_tau = self._of_layer(tau, site, layer).to(j)
                scaled = flat / own_tau
                own[q] = own[q] + (scaled @ flat.mT).double()
                rows = self.rows.values[site][layer].to(j)
                cross[q] = cross[q] + (scaled.flatten(0, 1) @ rows.mT).double()
        assert like is not None
        inside = [self.roots.right(x.mT) for x in cross]  # (k, B M)
        if None not in uniform:
            found = self._under_uniform(own[0], inside[0], uniform)
        else:
            found = [
                x - self._explained(y, tau, len(x))
                for x, y, tau in zip(own, inside, taus, strict=True)
            ]
        return torch.stack(found).to(like)

    def pyro_sample(self, infer: Mapping[str, Any]) -> Weights:
        """See the base class; one auxiliary joint variable, the sites Deltas of it."""
        flat = pyro.sample(
            "lora_joint",
            JointDistribution(self, self.loc),
            infer={"is_auxiliary": True},
        )
        return {
            site: pyro.sample(
                site,
                dist.Delta(value, event_dim=self.loc[site].ndim),
                infer=infer.get(site, {}),
            )
            for site, value in unflatten_weights(flat, self.loc).items()
        }

    def _under_uniform(
        self, own: Tensor, inside: Tensor, uniform: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """Of each of several priors with one precision, from the products at 1."""
        taus = [tau.detach() for tau in uniform if tau is not None]
        if len(taus) == 1:
            tau = taus[0]
            precision = {site: tau for site in self.loc}
            return [own / tau - self._explained(inside / tau, precision, len(own))]
        values, vectors = self._spectrum
        rotated = (vectors.mT @ inside).mT.reshape(*own.shape[:-1], -1)  # (B, M, k)
        return [
            own / tau - (rotated / (tau * (tau + values))) @ rotated.mT for tau in taus
        ]

    def _explained(
        self, inside: Tensor, tau: Mapping[str, Tensor], num_data: int
    ) -> Tensor:
        """(B, M, M) of :math:`C B^{-1} C^T`, C the rows' covariances, (k, B M)."""
        mine = all(
            torch.equal(tau[site].to(x).expand_as(x), x)
            for site, x in self.prior_precision.items()
        )
        root = (
            self._cholesky if mine else cholesky_of(self.rows.kernel(tau), self.roots)
        )
        half = torch.linalg.solve_triangular(root, inside, upper=False)
        half = half.mT.unflatten(0, (num_data, half.shape[1] // num_data))
        return half @ half.mT

    def _of_layer(self, tau: Mapping[str, Tensor], site: str, layer: int) -> Tensor:
        """(1,), or one for each weight, (O I,)."""
        own = tau[site].double()
        return own[layer if len(own) > 1 else 0].flatten()

    @cached_property
    def _cholesky(self) -> Tensor:
        return cholesky_of(self.rows.kernel(self.prior_precision), self.roots)

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues and vectors of R' J J' R."""
        ones = {site: x.new_ones(()) for site, x in self.loc.items()}
        values, vectors = torch.linalg.eigh(self.roots.within(self.rows.kernel(ones)))
        return values.clamp_min(0), vectors


def _uniform(tau: Mapping[str, Tensor]) -> Tensor | None:
    """The one precision of all weights; None if there are several."""
    each = torch.cat([x.reshape(-1) for x in tau.values()]).double()
    return each.mean() if bool((each == each[0]).all()) else None


def dual_gaussian(
    loc: Weights,
    prior_precision: Weights,
    factors: Mapping[int, RowFactors],
    observed: Sequence[Observed],
) -> DualGaussian:
    """The Gaussian at the weights at which the rows were taken.

    Args:
        loc: These weights, site -> (L, ...).
        prior_precision: Site -> tau.
        factors: Rows by place among the layers.
        observed: What each batch observed; empty where rows are Fisher terms.

    Raises:
        ValueError: If there are more rows than fit into n x n matrices.
    """
    observations, chosen = joined(observed)
    batches = factors[0].batches
    num_rows = sum(x.shape[0] * x.shape[1] for x in batches)
    num_rows = sum(len(order) for _, order in chosen) if observed else num_rows
    if num_rows > MAX_ROWS:
        raise ValueError(
            f"structures.Exact() works on matrices of as many rows as there are "
            f"outcomes times contrasts, here {num_rows:,}, and takes {MAX_ROWS:,} at "
            "most. Use structures.KFAC()."
        )
    num_layers = iter(range(len(factors)))
    values = {}
    for site, x in loc.items():
        layers = []
        for _ in x:
            flat = [b.flatten(0, 1) for b in factors[next(num_layers)].batches]
            layers.append(
                torch.cat([flat[i][order] for i, order in chosen])
                if observed
                else torch.cat(flat)
            )
        values[site] = torch.stack(layers)
    rows = Rows(loc, values)
    blocks = tuple(part.at(part.at_fit).root for part in observations)
    if not observed:
        like = next(iter(values.values()))
        blocks = (like.new_ones(len(rows), 1, 1, dtype=torch.float64),)
    tau = rows.by_matrix(prior_precision)
    return DualGaussian(loc, tau, rows, Roots(blocks), observations)
