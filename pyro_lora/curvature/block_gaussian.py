r"""Gaussian with one block for each matrix, diagonal in an eigenbasis of its own.

A layer's Fisher block :math:`G \otimes A / n` with :math:`G = U_G \Lambda_G U_G^T` and
:math:`A = U_A \Lambda_A U_A^T` has the eigenvectors :math:`U_G \otimes U_A`, and its
eigenvalues are a table (O, I), :math:`\Lambda = \lambda_G \lambda_A^T / n`: with
:math:`\lambda_G = (9, 1)`, :math:`\lambda_A = (4, 2)` and n = 2, [[18, 9], [2, 1]]. A
prior precision that is one number in the matrix only shifts it, so that for any
:math:`\tau`, with no new decomposition,

- :math:`\log \det P = \sum \log(\Lambda + \tau)`,
- :math:`\mathrm{tr}(F P^{-1}) = \sum \Lambda / (\Lambda + \tau)`,
- :math:`J P^{-1} J^T = \sum (U_G^T J U_A)^2 / (\Lambda + \tau)`, for J as (O, I).

The diagonal structures are the same with the identity for both bases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.transforms import ReshapeTransform
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_lora.curvature.factors import EigenFactors
from pyro_lora.curvature.kronecker_normal import KroneckerNormal, left_product
from pyro_lora.curvature.nystrom import eigh_psd, num_eigenvalues
from pyro_lora.curvature.weight_gaussian import WeightGaussian
from pyro_lora.ground.checked_tensors import DOUBLE, CheckedTensors
from pyro_lora.ground.ranks import Ranks
from pyro_lora.ground.summary import FieldsShown
from pyro_lora.ground.weights import Weights


@dataclass(frozen=True, repr=False)
class Eigenblocks(FieldsShown):
    """Fisher information of one site in a basis where each layer's is diagonal.

    Attributes:
        values: Eigenvalues, (L, O, I), float64, nats, full data; I is 1 for a bias.
            Of low rank (L, j, k): outside of the bases there is no information.
        rows: Basis on the output side, (L, O, O) or (L, O, j), in the factors' dtype;
            None is the identity.
        columns: Basis on the input side, (L, I, I) or (L, I, k), likewise.
    """

    values: Tensor
    rows: Tensor | None
    columns: Tensor | None

    @classmethod
    def restored(cls, site: str, loc: Tensor, tensors: CheckedTensors) -> Eigenblocks:
        """Eigenvalues and bases of a file that fit together, and the site.

        Args:
            site: Its name.
            loc: Its value.
            tensors: With ``values/SITE``, and ``rows/SITE`` and ``columns/SITE``.

        Raises:
            ValueError: If they don't.
        """
        if loc.ndim not in (2, 3):
            raise ValueError(
                f"site {site!r} has shape {tuple(loc.shape)}, and no matrices to have "
                "eigenvalues"
            )
        # F = Σ_ab values_ab (u_a u_aᵀ) ⊗ (v_b v_bᵀ), u_a of the j columns of `rows`
        # and v_b of the k of `columns`.
        num_layers, out, width = (*loc.shape, 1)[:3]  # a bias: a matrix of one column
        values = tensors.under("values/").not_negative(site, None, DOUBLE)
        bases = [name for name in ("rows", "columns") if f"{name}/{site}" in tensors]
        if not bases:
            whole = (num_layers, out, width)
            return cls(
                tensors.under("values/").not_negative(site, whole, DOUBLE), None, None
            )
        if values.ndim != 3 or values.shape[0] != num_layers:
            raise ValueError(
                f"tensor {tensors.prefix}values/{site} has shape "
                f"{tuple(values.shape)}, expected ({num_layers}, j, k)"
            )
        _, j, k = values.shape
        if not (0 < j <= out and 0 < k <= width):
            raise ValueError(
                f"tensor {tensors.prefix}values/{site} has {j} x {k} eigenvalues a "
                f"matrix, expected at most {out} x {width}"
            )
        return cls(
            values,
            tensors.under("rows/").orthonormal(site, (num_layers, out, j)),
            tensors.under("columns/").orthonormal(site, (num_layers, width, k)),
        )

    def bases(self) -> list[tuple[Tensor, Tensor]]:
        """Rows (O, O) and columns (I, I) of each layer, where there are any."""
        if self.rows is None or self.columns is None:
            return []
        return list(zip(self.rows, self.columns, strict=True))


# By identity of a matrix that is still there: its eigenvalues, and where its vectors
# are, a stack over layers and the place there.
Spectra = MutableMapping[Tensor, tuple[Tensor, Tensor, int]]
# Eigenvalues and vectors of a factor, and what it is, for messages.
Decompose = Callable[[Tensor, str], tuple[Tensor, Tensor]]
_WHOSE = {"columns": "inputs", "rows": "gradients"}


def shared_out(
    by_site: Mapping[str, Sequence[EigenFactors]], ranks: Ranks
) -> Decompose:
    """A function that decomposes factors, each of which one rank has decomposed.

    Args:
        by_site: Site -> its layers' factors, the same on all ranks; those of this rank
            are decomposed now, all at once, into their own memory.
        ranks: Who shares them.

    Returns:
        To be called on all ranks for the same factors in the same order, once for each.

    Raises:
        ValueError: If a factor is no sum of outer products.
    """
    if ranks.size == 1:
        return eigh_psd
    names: dict[int, tuple[Tensor, str]] = {}  # by identity: layers share inputs
    for site, factors in by_site.items():
        for i, f in enumerate(factors):
            for name, x in f.matrices.items():
                names.setdefault(id(x), (x, _factor(site, i, name)))
    owners = _owners([x.shape for x, _ in names.values()], ranks.size)
    owner = dict(zip(names, owners, strict=True))
    own: dict[int, Tensor] = {}
    for key, (x, what) in names.items():
        if owner[key] == ranks.rank:
            own[key], vectors = eigh_psd(x, what)
            x[:, : vectors.shape[1]] = vectors

    def decomposed(x: Tensor, what: str) -> tuple[Tensor, Tensor]:
        vectors = x[:, : num_eigenvalues(x.shape)]
        empty = x.new_empty(vectors.shape[1], dtype=torch.float64)
        values = own.pop(id(x), empty)
        values, vectors = ranks.sent(owner[id(x)], [values, vectors])
        return values, vectors

    return decomposed


def _owners(shapes: Sequence[torch.Size], num_ranks: int) -> list[int]:
    """Whose each factor is: the largest first, each the rank's with the least to do."""
    costs = [rows * columns**2 for rows, columns in shapes]
    to_do, owners = [0] * num_ranks, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = to_do.index(min(to_do))
        to_do[owners[i]] += costs[i]
    return owners


def _layer(site: str, layer: int) -> str:
    return f"Site {site!r}, layer {layer}"


def _factor(site: str, layer: int, name: str) -> str:
    return f"{_layer(site, layer)}: the factor of its {_WHOSE[name]}"


def eigenblocks(
    factors: list[EigenFactors],
    spectra: Spectra | None = None,
    site: str = "",
    decompose: Decompose = eigh_psd,
) -> Eigenblocks:
    """Diagonalise the factors of one site's layers.

    Args:
        factors: One for each layer, summed over all data. The list is emptied, so that
            eigenvectors take the place of the factors that nobody else holds.
        spectra: Matrices that were diagonalised; those that weren't are added. Layers
            that share a matrix need one decomposition, and sites whose layers all do
            have one stack of vectors.
        site: The site's name, for messages.
        decompose: Eigenvalues and vectors of a matrix, float64.

    Returns:
        The eigenvalues and bases; eigendecompositions run in float64.

    Raises:
        ValueError: If a factor is no sum of squares or outer products.
    """
    spectra = WeakTensorKeyDictionary() if spectra is None else spectra
    # Vectors are written into their stack at once: no second copy of all layers'.
    num_layers, stacks = len(factors), _shared_stacks(factors, spectra)

    def put(name: str, layer: int, x: Tensor) -> None:
        if name not in stacks:
            stacks[name] = x.new_empty(num_layers, *x.shape)
        stacks[name][layer] = x

    for i in range(num_layers):
        f = factors.pop(0)
        values: dict[str, Tensor] = {}
        for name, x in f.matrices.items():
            if x not in spectra:
                found, vectors = decompose(x, _factor(site, i, name))
                put(name, i, vectors.to(x))
                spectra[x] = found, stacks[name], i
            values[name], stack, place = spectra[x]
            if stack is not stacks.get(name) or place != i:
                put(name, i, stack[place])
        put("values", i, f.eigenvalues(values, _layer(site, i)).double())
    return Eigenblocks(stacks["values"], stacks.get("rows"), stacks.get("columns"))


def with_values(gaussian: BlockGaussian, values: BlockGaussian) -> BlockGaussian:
    """The bases of one, with the eigenvalues of another."""
    blocks = {
        site: replace(block, values=values.blocks[site].values)
        for site, block in gaussian.blocks.items()
    }
    return replace(gaussian, blocks=blocks)


def _shared_stacks(
    factors: Sequence[EigenFactors], spectra: Spectra
) -> dict[str, Tensor]:
    """Stacks of another site whose layers all have the same matrices, by name."""
    stacks: dict[str, Tensor] = {}
    for name in factors[0].matrices:
        known = [spectra.get(f.matrices[name]) for f in factors]
        if known[0] is None or len(known[0][1]) != len(known):
            continue
        # In the same order, too: then the vectors are stored once for both sites.
        stack = known[0][1]
        places = [k[2] for k in known if k is not None and k[1] is stack]
        if places == list(range(len(known))):
            stacks[name] = stack
    return stacks


@dataclass(frozen=True, eq=False, repr=False)
class BlockGaussian(WeightGaussian):
    """Independent matrices; the Kronecker and the diagonal structures.

    Attributes:
        loc: The mode, site -> (L, O, I) or (L, O).
        prior_precision: Site -> tau. Where the basis isn't the identity, tau is
            constant inside each matrix.
        blocks: Site -> the Fisher information.
    """

    loc: Weights
    prior_precision: Weights
    blocks: Mapping[str, Eigenblocks]

    kind: ClassVar[str] = "blocks"

    @property
    def knows_log_det(self) -> bool:
        """See the base class: the eigenvalues are kept."""
        return True

    @property
    def structure(self) -> str:
        """See the base class."""
        if all(block.rows is None for block in self.blocks.values()):
            return "diagonal"
        low_rank = any(self._is_thin(site) for site in self.blocks)
        return "Kronecker, of low rank" if low_rank else "Kronecker"

    @property
    def origin(self) -> Weights:
        """See the base class."""
        return self.loc

    @property
    def tensors(self) -> dict[str, Tensor]:
        """See the base class."""
        return {
            f"{name}/{site}": x
            for site, block in self.blocks.items()
            for name, x in vars(block).items()
            if x is not None
        }

    @classmethod
    def restored(
        cls,
        loc: Weights,
        tensors: CheckedTensors,
        observations: tuple[Any, ...],
        in_dtypes: Callable[[Weights], Weights],
    ) -> BlockGaussian:
        """See the base class."""
        inner = tensors.under("prior_precision/")
        # As τI alone is diagonal in a block's bases, there is one for each matrix;
        # without bases each weight may have its own.
        tau = {
            site: inner.positive(
                site,
                (len(x), *[1] * (x.ndim - 1))
                if f"rows/{site}" in tensors
                else tuple(x.shape),
            )
            for site, x in loc.items()
        }
        blocks = {s: Eigenblocks.restored(s, x, tensors) for s, x in loc.items()}
        return cls(loc, in_dtypes(tau), blocks)

    def with_prior_precision(
        self, prior_precision: Mapping[str, Tensor]
    ) -> BlockGaussian:
        """See the base class; tau is averaged over a matrix that has a basis."""
        return replace(self, prior_precision=self._isotropic(prior_precision))

    def sample(self, num_samples: int) -> Weights:
        """See the base class."""
        shape = torch.Size([num_samples])
        return {site: fn.sample(shape) for site, fn in self._distributions().items()}

    def log_prob(self, weights: Mapping[str, Tensor]) -> Tensor:
        """See the base class."""
        return sum(  # type: ignore[return-value]
            fn.log_prob(weights[site]) for site, fn in self._distributions().items()
        )

    def variance(self) -> Weights:
        """See the base class."""
        return {
            site: self._normal(site).variance.reshape(loc.shape)
            for site, loc in self.loc.items()
        }

    def log_det(self, prior_precision: Mapping[str, Tensor]) -> Tensor:
        """See the base class."""
        total: Tensor | float = 0.0
        tau = {site: self._by_matrix(site, x) for site, x in prior_precision.items()}
        for sites, values in self._eigenvalues:
            shift = [tau[site].double() for site in sites]
            if len({x.shape[1] for x in shift}) > 1:
                shift = [x.expand(-1, values.shape[1]) for x in shift]
            total = total + (values + torch.cat(shift)).log().sum()
        for site, block in self.blocks.items():
            if self._is_thin(site):  # outside of its bases P is tau alone
                num_outside = self.loc[site][0].numel() - block.values[0].numel()
                total = total + num_outside * tau[site].double().log().sum()
        assert isinstance(total, Tensor)
        return total

    def effective_parameters_by_layer(self) -> Weights:
        """See the base class."""
        return {site: share.sum((1, 2)) for site, share in self._shares().items()}

    def informed_directions(self, num_directions: int) -> tuple[Weights, Tensor]:
        """See the base class; each lies in one matrix."""
        shares = self._shares()  # F v = s P v is diagonal in the bases: these are the s
        flat = torch.cat([share.flatten() for share in shares.values()])
        top = flat.topk(min(num_directions, len(flat)))
        steps = {s: x.new_zeros(len(top.values), *x.shape) for s, x in self.loc.items()}
        first = 0
        for site, share in shares.items():
            for q, index in enumerate((top.indices - first).tolist()):
                if 0 <= index < share.numel():
                    layer, o, i = np.unravel_index(index, share.shape)
                    steps[site][q, layer] = self._step(site, layer, o, i)
            first += share.numel()
        return steps, top.values

    def covariance(
        self,
        jacobians: Iterable[tuple[str, Tensor]],
        prior_precisions: Sequence[Mapping[str, Tensor]],
    ) -> Tensor:
        """See the base class; O(D) for each datum, one layer at a time."""
        taus = [self._isotropic(p) for p in prior_precisions]
        layer = dict.fromkeys(self.blocks, 0)
        total: Tensor | float = 0.0
        for site, j in jacobians:
            i = layer[site]
            layer[site] += 1
            block = self.blocks[site]
            if block.rows is not None and block.columns is not None:
                # (U_G ⊗ U_A)^T vec(J) is vec(U_G^T J U_A), and P^-1 elementwise there.
                rows, columns = block.rows[i].to(j), block.columns[i].to(j)
                inside = left_product(rows.mT, j) @ columns  # (B, M, O, I), or j, k
                if self._is_thin(site):  # J J^T / tau is left over outside of the bases
                    rest = j - left_product(rows, inside) @ columns.mT
                    rest = rest.flatten(2)
                    scales = torch.stack(
                        [1 / tau[site][i].flatten()[0] for tau in taus]
                    )
                    total = total + scales.to(j)[:, None, None, None] * (rest @ rest.mT)
                j = inside
            flat = j.flatten(2)  # (B, M, O I)
            variances = torch.stack(
                [1 / self._precision(site, tau)[i].flatten() for tau in taus]
            ).to(flat)  # (Q, O I)
            if flat.shape[1] == 1:  # of one contrast a sum of squares, no matrices
                total = total + (flat[:, 0].square() @ variances.mT).mT[..., None, None]
            else:
                total = total + torch.stack([(flat * v) @ flat.mT for v in variances])
        assert isinstance(total, Tensor)
        return total

    def pyro_sample(self, infer: Mapping[str, Any]) -> Weights:
        """See the base class."""
        return {
            site: pyro.sample(site, fn, infer=infer.get(site, {}))
            for site, fn in self._distributions().items()
        }

    def _shares(self) -> Weights:
        return {
            site: block.values / self._precision(site, self.prior_precision)
            for site, block in self.blocks.items()
        }

    def _step(self, site: str, layer: int, o: int, i: int) -> Tensor:
        """One standard deviation along an eigenvector of one matrix, its shape."""
        # v = u / sqrt(p) has v^T P v = 1; the eigenvector u of place (o, i) is the
        # outer product of columns o of U_G and i of U_A.
        loc, block = self.loc[site][layer], self.blocks[site]
        sd = self._precision(site, self.prior_precision)[layer, o, i].rsqrt()
        if block.rows is None or block.columns is None:
            inside = torch.zeros_like(block.values[layer])
            inside[o, i] = sd
        else:
            inside = sd * torch.outer(
                block.rows[layer][:, o].double(), block.columns[layer][:, i].double()
            )
        return inside.reshape(loc.shape).to(loc)

    def _precision(self, site: str, tau: Mapping[str, Tensor]) -> Tensor:
        values = self.blocks[site].values
        shift = tau[site].double()
        if self.loc[site].ndim == 2:  # a bias is a matrix of one column
            shift = shift[..., None]
        return values + shift

    @cached_property
    def _eigenvalues(self) -> list[tuple[list[str], Tensor]]:
        """Sites with matrices of one size, and their eigenvalues, a row a matrix."""
        # One logarithm for all of a size: tuning calls log_det hundreds of times, and
        # what a call of torch's costs is more than these few numbers do.
        sites: dict[int, list[str]] = {}
        for site, block in self.blocks.items():
            sites.setdefault(block.values[0].numel(), []).append(site)
        return [
            (of_size, torch.cat([self.blocks[s].values.flatten(1) for s in of_size]))
            for of_size in sites.values()
        ]

    def _by_matrix(self, site: str, tau: Tensor) -> Tensor:
        """(L, 1) where tau is constant in each matrix or averaged, else (L, O I)."""
        loc = self.loc[site]
        num_layers = loc.shape[0]
        # The bases diagonalise tau I, and no other diag(tau): that is averaged.
        if tau.shape[1 - loc.ndim :].numel() == 1:
            return tau.reshape(-1, 1).expand(num_layers, 1)
        full = tau.expand(loc.shape).flatten(1)
        rotated = self.blocks[site].rows is not None
        return full.mean(1, keepdim=True) if rotated else full

    def _isotropic(self, tau: Mapping[str, Tensor]) -> Weights:
        result = {}
        for site, value in tau.items():
            loc = self.loc[site]
            matrices = self._by_matrix(site, value)
            if self.blocks[site].rows is None:
                matrices = matrices.expand(-1, loc[0].numel())
                result[site] = matrices.reshape(loc.shape)
            else:
                result[site] = matrices.reshape(-1, *[1] * (loc.ndim - 1))
        return result

    def _normal(self, site: str) -> KroneckerNormal:
        loc, block = self.loc[site], self.blocks[site]
        return KroneckerNormal(
            loc if loc.ndim == 3 else loc[..., None],
            self._precision(site, self.prior_precision).to(loc),
            None if block.rows is None else block.rows.to(loc),
            None if block.columns is None else block.columns.to(loc),
            self._outside(site),
            validate_args=False,
        )

    def _is_thin(self, site: str) -> bool:
        return self.blocks[site].values[0].numel() < self.loc[site][0].numel()

    def _outside(self, site: str) -> Tensor | None:
        """Precision outside of the bases, (L,); None where they are complete."""
        if not self._is_thin(site):
            return None
        return self.prior_precision[site].to(self.loc[site]).flatten()

    def _distributions(self) -> dict[str, dist.TorchDistribution]:
        result = {}
        for site, loc in self.loc.items():
            fn: dist.TorchDistribution = self._normal(site).to_event(1)
            if loc.ndim == 2:
                reshape = ReshapeTransform(torch.Size([*loc.shape, 1]), loc.shape)
                fn = dist.TransformedDistribution(fn, [reshape])
            result[site] = fn
        return result
