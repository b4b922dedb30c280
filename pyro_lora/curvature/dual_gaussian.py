r"""The Laplace posterior in its exact dual form: N rows in place of D weights.

With J the Jacobian of all n rows (the contrasts of the data's outcomes, or Fisher
terms) and R a block-diagonal root of their Fisher information, the precision is

.. math:: P = T + J^T R R^T J, \qquad T = \mathrm{diag}(\tau),

and everything asked of it follows from :math:`K = J T^{-1} J^T` and the n x n matrix
:math:`B = I + R^T K R` (Woodbury): nothing of size D x D is formed, and nothing is
approximated. A datum x = 2 of y = w x + noise of variance 1, with tau = 4, say: J = 2,
R = 1, K = 2 * 2 / 4 = 1, B = 2, and P = 4 + 4 = tau det B.

Of more data than that the rows may be given by coordinates in k directions,
:math:`J \approx \Phi U`: with U for J and a root of :math:`\Phi^T R R^T \Phi` for R it
is the same algebra on k x k matrices (``inducing``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyro_lora.curvature.factors import WIDE, RowFactors
from pyro_lora.curvature.joint_distribution import JointDistribution, sample_parts
from pyro_lora.curvature.observations import Observations, joined
from pyro_lora.curvature.weight_gaussian import (
    WeightGaussian,
    restored_precision,
    under,
)
from pyro_lora.ground.checked_tensors import (
    DOUBLE,
    CheckedTensors,
    check_broadcasts,
)
from pyro_lora.ground.summary import FieldsShown
from pyro_lora.ground.weights import Weights

_LEAST_SHARE = 1e-12  # of the data in a precision, which isn't rounding
_JITTER = 1e-14  # of the mean eigenvalue of a matrix that may have none
# Of Gram matrices of several groups of layers together. Beyond, each is made again
# where it is needed: one evaluation then takes as long as all of them did.
_KEPT_BYTES = 2e9


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
        uniform = _uniform(tau)
        if uniform is not None:
            return self._gram / uniform
        of_sites = [_uniform({site: x}) for site, x in tau.items()]
        if None not in of_sites:
            each = torch.stack([x for x in of_sites if x is not None])
            return self._by_site.weighted(1 / each)
        each = torch.cat([x.reshape(-1) for x in tau.values()]).double()
        return self._by_layer.weighted(1 / each)

    def by_matrix(self, precision: Mapping[str, Tensor]) -> Weights:
        """Each site's precision as (L, 1, 1) where each matrix has one, else whole."""
        found = {}
        for site, x in self.origin.items():
            tau = precision[site].to(x.device)
            if tau.shape[1 - x.ndim :].numel() > 1:
                tau = tau.expand(x.shape)
                first = tau.flatten(1)[:, :1]
                # Equal ones may have a gradient each, but where they are one number.
                if tau.requires_grad:
                    same = not any(_moving_strides(tau[0]))
                else:
                    same = bool((tau.flatten(1) == first).all())
                if same:
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
        return _sum_of_grams([rows for _, _, rows in self.matrices()])

    @cached_property
    def _by_site(self) -> _Grams:
        return _Grams(tuple(tuple(rows) for rows in self.values.values()))

    @cached_property
    def _by_layer(self) -> _Grams:
        return _Grams(tuple((rows,) for _, _, rows in self.matrices()))


@dataclass(frozen=True, eq=False)
class _Grams:
    """Gram matrices of groups of layers, to be added with weights.

    Attributes:
        groups: Rows (n, O I) of each group's layers.
    """

    groups: tuple[tuple[Tensor, ...], ...]

    def weighted(self, weights: Tensor) -> Tensor:
        """The sum, (n, n), differentiable in the weights (G,)."""
        size = len(self.groups[0][0])
        if 8 * size**2 * len(self.groups) <= _KEPT_BYTES:
            return torch.einsum("g,gij->ij", weights, self._kept)
        total: Tensor = _WeightedGrams.apply(weights, self.groups)
        return total

    @cached_property
    def _kept(self) -> Tensor:
        return torch.stack([_sum_of_grams(group) for group in self.groups])


class _WeightedGrams(torch.autograd.Function):
    """A weighted sum of Gram matrices, none of which is kept for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, groups: Sequence[Sequence[Tensor]]
    ) -> Tensor:
        ctx.groups = groups
        total = weights.new_zeros(len(groups[0][0]), len(groups[0][0]))
        for weight, group in zip(weights, groups, strict=True):
            total += weight * _sum_of_grams(group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # tr(G' X X') = sum of (G X) * X, for which no n x n matrix is needed again.
        (gradient,) = gradients
        found = [
            sum(((gradient @ x.double()) * x).sum() for x in group)
            for group in ctx.groups
        ]
        return torch.stack([torch.as_tensor(x) for x in found]), None


def _sum_of_grams(group: Sequence[Tensor]) -> Tensor:
    total = _outer(group[0])
    for rows in group[1:]:
        total += _outer(rows)
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


class EachRow:
    """The data's rows are the Gaussian's own."""

    def of_data(self, x: Tensor) -> Tensor:
        """Of the Gaussian's rows (k, ...) as of the data's (n, ...)."""
        return x

    def from_data(self, x: Tensor) -> Tensor:
        """The transpose, (n, ...) to (k, ...)."""
        return x

    def roots(self, roots: Roots) -> Roots:
        """Roots of the data's rows as those of the Gaussian's."""
        return roots

    def variance(self, kernel: Tensor) -> Tensor:
        """The prior variance of each contrast, (n,), by K (k, k)."""
        return kernel.diagonal()

    def covariance(self, kernel: Tensor, half: Tensor, rows: Tensor) -> Tensor:
        r"""Blocks of :math:`K - V^T V` at the data's rows.

        Args:
            kernel: K, (k, k).
            half: V, (m, k).
            rows: (data, rows).

        Returns:
            (data, rows, rows).
        """
        inside = half[:, rows].permute(1, 2, 0)
        return kernel[rows[:, :, None], rows[:, None, :]] - inside @ inside.mT

    def outside(self, kernel: Tensor, rows: Tensor) -> Tensor:
        """Prior covariance of the data's rows that K hasn't, in the form of blocks.

        Args:
            kernel: K, (k, k).
            rows: (data, rows).

        Returns:
            (data, rows, rows).
        """
        return kernel.new_zeros(*rows.shape, rows.shape[1])

    @property
    def tensors(self) -> Weights:
        """What a file holds of it, by name."""
        return {}

    def root_shapes(self, shapes: Sequence[tuple[int, ...]]) -> Sequence[Any]:
        """Of the Gaussian's roots, (N, M) a block, by those of the data's."""
        return shapes

    def words(self, size: int) -> str:
        """What the Gaussian is, of so many rows."""
        return f"exact, in {size:,} rows"


@dataclass(frozen=True, eq=False, repr=False)
class InSubspace(FieldsShown):
    r"""The data's rows lie in the span of the Gaussian's, :math:`J \approx \Phi U`.

    Attributes:
        matrix: :math:`\Phi`, (n, k), float64.
        residual: Diagonal of :math:`(J - \Phi U) T^{-1} (J - \Phi U)^T` at the prior of
            the fit, (n,): what of the prior variance of each contrast lies outside.
    """

    matrix: Tensor
    residual: Tensor

    @property
    def lost(self) -> float:
        """The share of the prior variance of all contrasts that lies outside."""
        outside = float(self.residual.sum())
        total = float(self.matrix.square().sum()) + outside
        return outside / total if total else 0.0

    def of_data(self, x: Tensor) -> Tensor:
        """See :class:`EachRow`."""
        return self.matrix @ x

    def from_data(self, x: Tensor) -> Tensor:
        """See :class:`EachRow`."""
        return self.matrix.mT @ x

    def roots(self, roots: Roots) -> Roots:
        """See :class:`EachRow`; one block of all."""
        inside = roots.right(self.matrix)
        fisher = inside.mT @ inside
        # Directions that no datum informs leave it singular.
        fisher.diagonal().add_(_JITTER * fisher.diagonal().mean())
        root, info = torch.linalg.cholesky_ex(fisher)
        if int(info):  # an R of a QR decomposition takes longer, and can't fail
            root = torch.linalg.qr(inside, mode="r").R.mT
        return Roots((root[None],))

    def variance(self, kernel: Tensor) -> Tensor:
        """See :class:`EachRow`."""
        return ((self.matrix @ kernel) * self.matrix).sum(1)

    def covariance(self, kernel: Tensor, half: Tensor, rows: Tensor) -> Tensor:
        """See :class:`EachRow`."""
        own = self.matrix[rows]  # (data, rows, k)
        return own @ (kernel - half.mT @ half) @ own.mT

    def outside(self, kernel: Tensor, rows: Tensor) -> Tensor:
        """See :class:`EachRow`: the variances alone, which scale as those of the span.

        At the prior of the fit K is I, and under t times its precision I / t.
        """
        return torch.diag_embed(self.residual[rows] * kernel.diagonal().mean())

    @property
    def tensors(self) -> Weights:
        """See :class:`EachRow`."""
        return {"matrix": self.matrix, "residual": self.residual}

    def root_shapes(self, shapes: Sequence[tuple[int, ...]]) -> Sequence[Any]:
        """See :class:`EachRow`."""
        return [(1, self.matrix.shape[1])]

    def words(self, size: int) -> str:
        """See :class:`EachRow`."""
        number = len(self.matrix)
        return f"{size:,} directions, {self.lost:.2g} lost, of {number:,} rows"


def _restored_coordinates(
    tensors: CheckedTensors, shapes: Sequence[tuple[int, ...]], sizes: set[int]
) -> EachRow | InSubspace:
    """The data's rows as coordinates in the Jacobian's, or as these.

    Raises:
        ValueError: If they fit neither the outcomes nor the Jacobian.
    """
    if "matrix" not in tensors:
        return EachRow()
    matrix = tensors.real("matrix", None, DOUBLE)
    number = sum(map(math.prod, shapes)) if shapes else len(matrix)
    if matrix.ndim != 2 or len(matrix) != number or {matrix.shape[1]} != sizes:
        raise ValueError(
            f"tensor {tensors.prefix}matrix has shape {tuple(matrix.shape)}, expected "
            f"({number}, {sorted(sizes)})"
        )
    return InSubspace(matrix, tensors.not_negative("residual", (number,), DOUBLE))


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
        observations: What the data's rows are the contrasts of, in order; empty where
            they are Fisher terms.
        mode_precision: Of the normal prior under which the mean is the mode of the
            linearised network; None where the mean is the rows' origin.
        coordinates: Of the data's rows in these.
    """

    loc: Weights
    prior_precision: Weights
    rows: Rows
    roots: Roots
    observations: tuple[Observations, ...] = ()
    mode_precision: Weights | None = None
    coordinates: EachRow | InSubspace = field(default_factory=EachRow)

    kind: ClassVar[str] = "rows"

    @property
    def tensors(self) -> dict[str, Tensor]:
        """See the base class."""
        roots = {str(i): x for i, x in enumerate(self.roots.blocks)}
        tensors = under("jacobian", self.rows.values) | under("roots", roots)
        tensors |= under("coordinates", self.coordinates.tensors)
        if self.mode_precision is None:
            return tensors
        tensors |= under("origin", self.origin)
        return tensors | under("mode_precision", self.mode_precision)

    @classmethod
    def restored(
        cls,
        loc: Weights,
        tensors: CheckedTensors,
        observations: tuple[Observations, ...],
        in_dtypes: Callable[[Weights], Weights],
    ) -> DualGaussian:
        """See the base class: rows, roots and observations that fit together.

        Raises:
            ValueError: If they don't.
        """
        values, sizes = {}, set()
        for site, x in loc.items():
            j = tensors.under("jacobian/").real(site, None, WIDE)
            expected = (x.shape[0], j.shape[1] if j.ndim == 3 else 0, x[0].numel())
            if tuple(j.shape) != expected:
                raise ValueError(
                    f"tensor {tensors.prefix}jacobian/{site} has shape "
                    f"{tuple(j.shape)}, expected ({expected[0]}, n, {expected[2]})"
                )
            values[site] = j
            sizes.add(expected[1])
        shapes = [tuple(part.at_fit.shape) for part in observations]
        coordinates = _restored_coordinates(
            tensors.under("coordinates/"), shapes, sizes
        )
        expected_roots = coordinates.root_shapes(shapes)
        blocks = []
        for i in range(len(expected_roots) or 1):
            block = tensors.under("roots/").real(str(i), None, DOUBLE)
            shape = tuple(block.shape[:2])
            if block.ndim != 3 or (expected_roots and shape != expected_roots[i]):
                of = (*expected_roots[i], "k") if expected_roots else "(N, M, k)"
                raise ValueError(
                    f"tensor {tensors.prefix}roots/{i} has shape {tuple(block.shape)}, "
                    f"expected {of}"
                )
            blocks.append(block)
        num_rows = sum(block.shape[0] * block.shape[1] for block in blocks)
        if sizes != {num_rows}:
            raise ValueError(
                f"tensors {tensors.prefix}jacobian/... have {sorted(sizes)} rows, but "
                f"there are roots of {num_rows}"
            )
        rows, mode_precision = Rows(loc, values), None
        refined = ("origin", "mode_precision")
        if any(f"{name}/{site}" in tensors for name in refined for site in loc):
            origins, inner = (tensors.under(f"{name}/") for name in refined)
            origin = in_dtypes({s: origins.real(s, x.shape) for s, x in loc.items()})
            rows = Rows(origin, values)
            found = {
                s: check_broadcasts(
                    inner.positive(s), x.shape, f"mode_precision of {s}"
                )
                for s, x in loc.items()
            }
            mode_precision = rows.by_matrix(in_dtypes(found))
        return cls(
            loc,
            rows.by_matrix(in_dtypes(restored_precision(loc, tensors))),
            rows,
            Roots(tuple(blocks)),
            observations,
            mode_precision,
            coordinates,
        )

    @property
    def structure(self) -> str:
        """See the base class."""
        num_data = sum(x.num_data for x in self.observations[:1])
        rows = self.coordinates.words(len(self.rows))
        return f"{rows} of {num_data:,} data" if num_data else rows

    @property
    def origin(self) -> Weights:
        """See the base class."""
        return self.rows.origin

    @property
    def is_refined(self) -> bool:
        """See the base class."""
        return self.mode_precision is not None

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
            site: x + noise[site] - step.to(x) / self.prior_precision[site].to(x)
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
                (self.prior_precision[s] * x.square())
                .flatten(1)
                .sum(1, dtype=torch.float64)
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
            tau = of_layer(self.prior_precision, site, layer)
            half = torch.linalg.solve_triangular(
                self._cholesky, self.roots.right(rows.double()), upper=False
            )
            own = 1 / tau - half.square().sum(0) / tau.square()
            found[site][layer] = own.reshape(found[site].shape[1:]).to(found[site])
        return found

    @property
    def knows_log_det(self) -> bool:
        """See the base class: once it was asked for, or a prediction was made."""
        return not {"_cholesky", "_log_det"}.isdisjoint(vars(self))

    def log_det(self, prior_precision: Mapping[str, Tensor]) -> Tensor:
        """See the base class."""
        differentiable = any(x.requires_grad for x in prior_precision.values())
        if prior_precision is self.prior_precision and not differentiable:
            return self._log_det
        return self._log_det_at(prior_precision)

    @cached_property
    def _log_det(self) -> Tensor:
        return self._log_det_at(self.prior_precision, vars(self).get("_cholesky"))

    def _log_det_at(
        self, prior_precision: Mapping[str, Tensor], root: Tensor | None = None
    ) -> Tensor:
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
        if root is None:
            root = cholesky_of(self.rows.kernel(tau), self.roots)
        return of_prior + 2 * root.diagonal().log().sum()

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
            site: (x / self.prior_precision[site].to(x)).to(self.loc[site])
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
            # In float64, as K is: what the data leave of it may be a millionth.
            flat = j.flatten(2).double()
            rows = self.rows.values[site][layer].to(flat)
            for q, tau in enumerate(each):
                scaled = flat / of_layer(tau, site, layer).to(flat)
                own[q] = own[q] + scaled @ flat.mT
                cross[q] = cross[q] + scaled.flatten(0, 1) @ rows.mT
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
        return sample_parts(JointDistribution(self, self.loc), self.loc, infer)

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

    @cached_property
    def _cholesky(self) -> Tensor:
        return cholesky_of(self.rows.kernel(self.prior_precision), self.roots)

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues and vectors of R' J J' R."""
        ones = {site: x.new_ones(()) for site, x in self.loc.items()}
        values, vectors = torch.linalg.eigh(self.roots.within(self.rows.kernel(ones)))
        return values.clamp_min(0), vectors


def of_layer(tau: Mapping[str, Tensor], site: str, layer: int) -> Tensor:
    """A matrix's own precision, (1,), or that of each weight, (O I,); float64.

    Args:
        tau: Site -> precision, as :meth:`Rows.by_matrix` gives it.
        site: Its site.
        layer: Its place there.
    """
    own = tau[site].double()
    return own[layer if len(own) > 1 else 0].flatten()


def _uniform(tau: Mapping[str, Tensor]) -> Tensor | None:
    """The one precision of all weights; None if there are several.

    Several of the same value, too, where each has a gradient of its own.
    """
    first = next(iter(tau.values()))
    one = first.reshape(-1)[0]
    if first.requires_grad:
        same = all(
            x.data_ptr() == first.data_ptr() and not any(_moving_strides(x))
            for x in tau.values()
        )
    else:
        same = all(bool((x == one).all()) for x in tau.values())
    return one.double() if same else None


def _moving_strides(x: Tensor) -> list[int]:
    """Those along which there is more than one value."""
    sizes = zip(x.stride(), x.shape, strict=True)
    return [stride for stride, size in sizes if size > 1 and stride != 0]


def dual_gaussian(
    loc: Weights,
    prior_precision: Weights,
    factors: dict[int, RowFactors],
    observed: Sequence[tuple[Observations, ...]],
) -> DualGaussian:
    """The Gaussian at the weights at which the rows were taken.

    Args:
        loc: These weights, site -> (L, ...).
        prior_precision: Site -> tau.
        factors: Rows by place among the layers; used up, so that few are there twice.
        observed: What each batch observed; empty where rows are Fisher terms.
    """
    observations, places = joined(observed)
    layers = iter(range(len(factors)))
    values = {
        site: torch.stack([in_order(factors.pop(next(layers)), places) for _ in x])
        for site, x in loc.items()
    }
    rows = Rows(loc, values)
    roots = roots_at_fit(observations, next(iter(values.values())))
    tau = rows.by_matrix(prior_precision)
    return DualGaussian(loc, tau, rows, roots, observations)


def in_order(factors: RowFactors, places: Sequence[tuple[int, slice]]) -> Tensor:
    """Rows of all batches in the order of the outcomes, where these are known.

    Args:
        factors: Of each batch.
        places: Batch, and where among its rows; empty: as they came.
    """
    batches = factors.batches
    return torch.cat([batches[i][where] for i, where in places] or list(batches))


def roots_at_fit(observations: tuple[Observations, ...], rows: Tensor) -> Roots:
    """Roots of the Fisher information where the network is; of Fisher terms 1.

    Args:
        observations: What was observed.
        rows: Of the data, (..., n, W).
    """
    if observations:
        return Roots(tuple(part.at(part.at_fit).root for part in observations))
    return Roots((rows.new_ones(rows.shape[-2], 1, 1, dtype=torch.float64),))
