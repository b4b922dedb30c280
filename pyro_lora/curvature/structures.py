"""Curvature structures: the forms in which the Fisher information is kept.

A structure is a frozen value. In a pass over the data it turns each batch's layer
inputs a (B, T, I) and gradients of the Fisher terms g (M, B, T, O) into factors that
add up over batches; at the end the factors become a Gaussian over the weights.
``factors.py`` shows the factors by an example.

Most structures have a block for each layer, :class:`LayerStructure`. Their factors come
in halves, so that layers with the same inputs (query, key and value) share the inputs'
half, and Fisher terms may come some at a time::

    inputs = structure.input_factor(a, counts)  # once for layers with these inputs
    terms = structure.gradient_factor(inputs, g, counts)  # adds up over Fisher terms
    factors = structure.combine(inputs, terms)  # adds up over batches

A structure of your own is one more subclass of :class:`LayerStructure`, or of
:class:`JointStructure` for one matrix over all layers. Its factors are some of those
here, or of your own: one more subclass of :class:`SummedFactors`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_lora.curvature.block_gaussian import (
    BlockGaussian,
    eigenblocks,
    shared_out,
    with_values,
)
from pyro_lora.curvature.capture import CountedTokens, LayerCapture
from pyro_lora.curvature.data_sums import OBSERVED
from pyro_lora.curvature.dense_gaussian import DenseGaussian
from pyro_lora.curvature.dual_gaussian import dual_gaussian
from pyro_lora.curvature.factors import (
    AnyFactors,
    DenseFactors,
    DiagonalFactors,
    EigenFactors,
    KroneckerFactors,
    RowFactors,
    RowSample,
    SummedFactors,
)
from pyro_lora.curvature.inducing import Span, projected_gaussian, span_of
from pyro_lora.curvature.nystrom import gram
from pyro_lora.curvature.prior_moments import PriorAtMode
from pyro_lora.curvature.saved_observations import ObservedFactors
from pyro_lora.curvature.weight_gaussian import WeightGaussian
from pyro_lora.ground.accumulation import at_least_float32
from pyro_lora.ground.ranks import ALONE, Ranks
from pyro_lora.ground.weights import Weights

__all__ = [
    "EKFAC",
    "KFAC",
    "Dense",
    "DenseFactors",
    "Diagonal",
    "DiagonalFactors",
    "EigenFactors",
    "Exact",
    "JointStructure",
    "KroneckerFactors",
    "LayerStructure",
    "Structure",
    "SummedFactors",
]

Captures = Mapping[int, LayerCapture]  # by place among the layers
Counts = Mapping[int, CountedTokens]  # by place
Factors = dict[int, Any]  # by place; of a joint structure all are at place 0
MAX_ROWS = 20_000  # of which an n x n matrix has 3.2 GB
# Some Fisher terms each: what captures them, so that one chunk is in memory at a time.
Chunks = Sequence[Callable[[], Captures]]


class BatchStructure(ABC):
    """What one pass over the data sums.

    Attributes:
        joint: Whether it needs all layers at once.
        max_rows: Rows of the Jacobian that it takes; None is any number.
    """

    joint: ClassVar[bool]
    max_rows: int | None = None

    @abstractmethod
    def batch_factors(self, chunks: Chunks, counts: Counts) -> Iterator[Factors]:
        """Factors of one batch, some layers at a time.

        Args:
            chunks: Captures of the same layers, of some of the Fisher terms each;
                gradients are exactly zero at the tokens that don't count.
            counts: Which tokens count, of all Fisher terms together.
        """


class Structure(ABC):
    """A form of the Fisher information: what its passes sum, and its Gaussian.

    Attributes:
        linear: Whether it takes the exact Fisher information as a function of what the
            linearised network outputs, not a root of it at the mode.
    """

    linear: ClassVar[bool] = False

    @property
    @abstractmethod
    def num_passes(self) -> int:
        """Passes over the data; a class variable will do."""

    @property
    @abstractmethod
    def first_pass(self) -> BatchStructure:
        """What the first pass over the data sums."""

    @abstractmethod
    def gaussian(
        self,
        loc: Weights,
        prior: PriorAtMode,
        factors: Factors,
        next_pass: Callable[[BatchStructure], Factors],
        ranks: Ranks = ALONE,
    ) -> WeightGaussian:
        """The Gaussian with this Fisher information.

        Args:
            loc: The mode, site -> (L, ...).
            prior: Its mean and precision there.
            factors: What the first pass summed; used up.
            next_pass: Sums over the data once more.
            ranks: Who comes here with the same factors, and shares what is to be done.

        Raises:
            ValueError: If a factor is no sum of squares or outer products.
        """


class LayerStructure(Structure, BatchStructure):
    """A structure with a block for each layer."""

    joint: ClassVar[bool] = False
    num_passes = 1

    @abstractmethod
    def input_factor(self, a: Tensor, counts: CountedTokens) -> Any:
        """What layers with the same inputs share.

        Args:
            a: The inputs, (B, T, I), in float32 or wider.
            counts: Which tokens count: ``counts.mask`` is (B, T), bool, and
                ``counts.rows(a)`` has these tokens alone, (n, I).
        """

    @abstractmethod
    def gradient_factor(self, inputs: Any, g: Tensor, counts: CountedTokens) -> Tensor:
        """What adds up over the Fisher terms.

        Args:
            inputs: What :meth:`input_factor` gave.
            g: Gradients of some Fisher terms, (M, B, T, O), in float32 or wider,
                exactly zero at the tokens that don't count.
            counts: Which tokens count.
        """

    @abstractmethod
    def combine(self, inputs: Any, gradients: Tensor) -> AnyFactors:
        """The layer's factors, which add up over batches.

        With those that are no :class:`EigenFactors` goes a :meth:`gaussian` of your
        own.

        Args:
            inputs: What :meth:`input_factor` gave.
            gradients: The sum of what :meth:`gradient_factor` gave.
        """

    def __call__(
        self, a: Tensor, g: Tensor, counts: Tensor | CountedTokens | None = None
    ) -> Any:
        """The factors of one layer and batch.

        Args:
            a: Layer inputs, (B, T, I).
            g: Gradients of the Fisher terms w.r.t. the layer's outputs, (M, B, T, O),
                exactly zero at the tokens that don't count.
            counts: Which tokens count, (B, T); None is those with a gradient.

        Returns:
            Factors in the dtype of ``a``, or float32 if that is wider.
        """
        a, g = at_least_float32(a), at_least_float32(g)
        if counts is None:
            counts = g.abs().amax((0, -1)) != 0
        tokens = counts if isinstance(counts, CountedTokens) else CountedTokens(counts)
        inputs = self.input_factor(a, tokens)
        return self.combine(inputs, self.gradient_factor(inputs, g, tokens))

    @property
    def first_pass(self) -> BatchStructure:
        """See the base class."""
        return self

    def batch_factors(self, chunks: Chunks, counts: Counts) -> Iterator[Factors]:
        """See the base class; layers with the same inputs together."""
        inputs: dict[int, Any] = {}
        sums: dict[int, Tensor] = {}
        for chunk in chunks:
            captures = chunk()
            for a, places in _by_input(captures):
                for i in places:
                    if i not in inputs:
                        inputs[i] = self._input_factor(i, a, places, counts, inputs)
                    g = at_least_float32(captures[i].gradients)
                    new = self.gradient_factor(inputs[i], g, counts[i])
                    sums[i] = sums[i] + new if i in sums else new
                if chunk is chunks[-1]:  # their terms are all there
                    yield {i: self._factors(inputs.pop(i), sums.pop(i)) for i in places}

    def _factors(self, inputs: Any, gradients: Tensor) -> AnyFactors:
        factors = self.combine(inputs, gradients)
        if not isinstance(factors, AnyFactors):
            raise ValueError(
                f"{type(self).__name__}.combine returned {type(factors).__name__}, "
                "expected factors: KroneckerFactors, DiagonalFactors, DenseFactors, or "
                "a frozen dataclass that subclasses structures.SummedFactors."
            )
        return factors

    def _input_factor(
        self,
        place: int,
        a: Tensor,
        same: Sequence[int],
        counts: Counts,
        factors: Mapping[int, Any],
    ) -> Any:
        """That of another layer with these inputs where the same tokens count."""
        for i in same:
            if i in factors and counts[i].shared is counts[place].shared:
                return factors[i]
        return self.input_factor(at_least_float32(a), counts[place])

    def gaussian(
        self,
        loc: Weights,
        prior: PriorAtMode,
        factors: Factors,
        next_pass: Callable[[BatchStructure], Factors],
        ranks: Ranks = ALONE,
    ) -> WeightGaussian:
        """See the base class; of :class:`EigenFactors`.

        Raises:
            ValueError: If they're others.
        """
        for x in factors.values():
            if not isinstance(x, EigenFactors):
                raise ValueError(
                    f"{type(x).__name__} have no eigenvalues of a layer. Let them "
                    f"subclass structures.EigenFactors, or give {type(self).__name__} "
                    "a method gaussian."
                )
        return _blocks(loc, prior.precision, factors, ranks)


@dataclass(frozen=True)
class KFAC(LayerStructure):
    r"""Kronecker factors, :math:`F \approx G \otimes A / n`.

    By default every token is a datum of its own, KFAC-expand:
    :math:`A = \sum_{b,t} a_{bt} a_{bt}^T` over the n tokens that count and
    :math:`G = \sum_{m,b,t} g_{mbt} g_{mbt}^T`; exact for one token and one datum.
    Eschenhagen et al. (2023), https://arxiv.org/abs/2311.00636, eq. 18 and 22.

    Attributes:
        reduce: KFAC-reduce: inputs averaged and gradients summed over the tokens of a
            datum that count, :math:`A = \sum_b \bar a_b \bar a_b^T` over n data and
            :math:`G = \sum_{m,b} (\sum_t g_{mbt}) (\sum_t g_{mbt})^T`. Exact where the
            layer's outputs are averaged over the tokens and nothing else is done.
        rank: Eigenpairs kept of each factor wider than 2 rank + 1, found in one pass by
            a sketch: (2 rank + 1) I numbers in place of I^2, nothing of size I x I
            formed; None is all. Outside of them the Fisher information counts as zero,
            so that the posterior is the prior there and is nowhere narrower than with
            the full factors. The sum of the eigenvalues that are lost is at most twice
            the least possible, in expectation.

    >>> factors = KFAC()(torch.ones(1, 2, 3), torch.ones(1, 1, 2, 4))
    >>> factors.a.shape, factors.g.shape, factors.count
    (torch.Size([3, 3]), torch.Size([4, 4]), tensor(2.))
    """

    reduce: bool = False
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(
                f"rank is {self.rank}; it must be at least 1, or None for all."
            )

    def input_factor(self, a: Tensor, counts: CountedTokens) -> tuple[Tensor, Tensor]:
        """A and the number of tokens (or data) that count."""
        if self.reduce:
            weight = counts.mask.to(a)  # the mean over the tokens that count
            tokens = weight.sum(-1, keepdim=True)  # (B, 1)
            rows = (a * weight[..., None]).sum(1) / tokens.clamp_min(1)  # (B, I)
            return gram(rows, self.rank), (tokens > 0).sum().to(a)
        return gram(counts.rows(a), self.rank), counts.mask.sum().to(a)

    def gradient_factor(
        self, inputs: tuple[Tensor, Tensor], g: Tensor, counts: CountedTokens
    ) -> Tensor:
        """G."""
        # Of reduced gradients, (M, B, O), what doesn't count is 0.
        grads = g.sum(2) if self.reduce else counts.rows(g)
        return gram(grads.flatten(0, -2), self.rank)

    def combine(
        self, inputs: tuple[Tensor, Tensor], gradients: Tensor
    ) -> KroneckerFactors:
        """Both factors and the number of tokens that count."""
        return KroneckerFactors(inputs[0], gradients, inputs[1])


@dataclass(frozen=True)
class Diagonal(LayerStructure):
    r"""The exact diagonal, :math:`\sum_{m,b} (\sum_t g_{mbt} a_{bt}^T)^2`.

    >>> Diagonal()(torch.ones(1, 2, 3), torch.ones(1, 1, 2, 4)).diagonal[0]
    tensor([4., 4., 4.])
    """

    def input_factor(self, a: Tensor, counts: CountedTokens) -> Tensor:
        """The inputs as they are."""
        return a

    def gradient_factor(
        self, inputs: Tensor, g: Tensor, counts: CountedTokens
    ) -> Tensor:
        """The diagonal, (O, I)."""
        total = inputs.new_zeros(g.shape[-1], inputs.shape[-1])
        for g_m in g:  # tokens are summed before the square: (B, O, I) at a time
            total += (g_m.mT @ inputs).square().sum(0)
        return total

    def combine(self, inputs: Tensor, gradients: Tensor) -> DiagonalFactors:
        """The diagonal."""
        return DiagonalFactors(gradients)


@dataclass(frozen=True)
class EKFAC(Structure):
    r"""The exact diagonal in the eigenbasis of :class:`KFAC`; two passes over the data.

    :math:`\Lambda = \sum_{m,b} (\sum_t U_G^T g_{mbt} a_{bt}^T U_A)^2` in place of the
    product of eigenvalues, and the basis is kept: of all diagonals in that basis the
    one nearest to the Fisher block. George et al. (2018),
    https://arxiv.org/abs/1806.03884, section 3.
    """

    num_passes = 2

    @property
    def first_pass(self) -> BatchStructure:
        """KFAC, for the eigenbasis."""
        return KFAC()

    def gaussian(
        self,
        loc: Weights,
        prior: PriorAtMode,
        factors: Factors,
        next_pass: Callable[[BatchStructure], Factors],
        ranks: Ranks = ALONE,
    ) -> WeightGaussian:
        """See the base class."""
        kfac = _blocks(loc, prior.precision, factors, ranks)
        bases = [basis for block in kfac.blocks.values() for basis in block.bases()]
        # Of all diagonals L, |F - U L U^T| is least at that of U^T F U.
        moments = _blocks(loc, prior.precision, next_pass(_InBases(tuple(bases))))
        return with_values(kfac, moments)


@dataclass(frozen=True, eq=False)
class _InBases(BatchStructure):
    """The diagonal of each layer's block in a basis, EKFAC's second pass.

    Attributes:
        bases: Each layer's rows U_G (O, O) and columns U_A (I, I).
    """

    joint: ClassVar[bool] = False
    bases: tuple[tuple[Tensor, Tensor], ...]

    def batch_factors(self, chunks: Chunks, counts: Counts) -> Iterator[Factors]:
        """See the base class."""
        diagonal = Diagonal()
        total: Factors = {}
        for chunk in chunks:
            for i, capture in chunk().items():
                # U_G^T (g a^T) U_A is the outer product of rotated g and a.
                rows, columns = self.bases[i]
                a, g = map(at_least_float32, (capture.inputs, capture.gradients))
                new = diagonal(a @ columns.to(a), g @ rows.to(g), counts[i])
                total[i] = total[i] + new if i in total else new
        yield total


class JointStructure(Structure, BatchStructure):
    """A structure of all layers at once: one matrix over all weights."""

    joint: ClassVar[bool] = True
    num_passes = 1

    @abstractmethod
    def factors(self, a: Sequence[Tensor], g: Sequence[Tensor]) -> DenseFactors:
        """The Fisher matrix of one batch, which adds up over Fisher terms.

        Args:
            a: Inputs of every layer in the order of the lifted sites, each (B, T, I).
            g: Gradients of every layer, each (M, B, T, O).

        Returns:
            Of a matrix over all weights, layer after layer, row-major, (D, D).
        """

    @property
    def first_pass(self) -> BatchStructure:
        """See the base class."""
        return self

    def batch_factors(self, chunks: Chunks, counts: Counts) -> Iterator[Factors]:
        """See the base class.

        Raises:
            ValueError: If the structure returns something else.
        """
        total: DenseFactors | None = None
        for chunk in chunks:
            layers = [capture for _, capture in sorted(chunk().items())]
            new = self.factors(
                [at_least_float32(c.inputs) for c in layers],
                [at_least_float32(c.gradients) for c in layers],
            )
            if not isinstance(new, DenseFactors):
                raise ValueError(
                    f"The joint structure returned {type(new).__name__}, expected "
                    "DenseFactors, of a matrix over all weights."
                )
            total = new if total is None else total + new
        assert total is not None
        yield {0: total}

    def gaussian(
        self,
        loc: Weights,
        prior: PriorAtMode,
        factors: Factors,
        next_pass: Callable[[BatchStructure], Factors],
        ranks: Ranks = ALONE,
    ) -> WeightGaussian:
        """See the base class."""
        return DenseGaussian(loc, prior.precision, factors[0].matrix.double())


@dataclass(frozen=True)
class Dense(JointStructure):
    r"""The whole matrix, :math:`\sum_{m,b} j_{mb} j_{mb}^T`; for small models."""

    def factors(self, a: Sequence[Tensor], g: Sequence[Tensor]) -> DenseFactors:
        """See the base class."""
        jacobian = torch.cat(  # rows vec(sum_t g a^T) of all layers, (M B, D)
            [
                (g_l.mT @ a_l).flatten(0, 1).flatten(1)
                for a_l, g_l in zip(a, g, strict=True)
            ],
            1,
        )
        return DenseFactors(jacobian.mT @ jacobian)


@dataclass(frozen=True)
class Exact(Structure):
    r"""The whole matrix in its dual form: exact, with N (C - 1) rows for D weights.

    Nothing is approximated beyond Laplace's method itself, and nothing of size D x D is
    formed: the Jacobian's N (C - 1) rows are kept, (N (C - 1)) D numbers, and all else
    is algebra on matrices of N (C - 1) rows. The network linearised at the mode is then
    known as a model of its own, whose mode ``refine`` finds.

    Of more rows, m of them are drawn at random, and all are projected on their span, by
    a second pass over the data (Nyström's approximation; Quiñonero-Candela & Rasmussen
    2005, https://www.jmlr.org/papers/v6/quinonero-candela05a.html, section 5, of which
    the predictions are those of DTC): m D numbers and N (C - 1) m. Outside of the span
    the posterior is the prior. With all rows drawn it is exact. The way from the
    weights to the prior's mean is a row of the span, too.

    Attributes:
        num_inducing: m; None is all rows, of which 20,000 are taken at most. Which are
            drawn depends on PyTorch's global generator (``pyro.set_rng_seed``).
    """

    num_inducing: int | None = None
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.num_inducing is None:
            return
        if not 1 <= self.num_inducing <= MAX_ROWS:
            raise ValueError(
                f"num_inducing is {self.num_inducing}; it must be from 1 to "
                f"{MAX_ROWS:,}, or None for all rows."
            )

    @property
    def num_passes(self) -> int:
        """One for all rows; two for some of them, and what all are in their span."""
        return 1 if self.num_inducing is None else 2

    @property
    def first_pass(self) -> BatchStructure:
        """All rows, or some of them."""
        if self.num_inducing is None:
            return _AllRows(MAX_ROWS)
        return _SomeRows(self.num_inducing)

    def gaussian(
        self,
        loc: Weights,
        prior: PriorAtMode,
        factors: Factors,
        next_pass: Callable[[BatchStructure], Factors],
        ranks: Ranks = ALONE,
    ) -> WeightGaussian:
        """See the base class."""
        observed = factors.pop(OBSERVED, ObservedFactors(())).batches
        if self.num_inducing is None:
            return dual_gaussian(loc, prior.precision, factors, observed)
        span = span_of(loc, prior, factors)
        del factors
        projected = next_pass(_Projected(span, MAX_ROWS**2 // self.num_inducing))
        observed = projected.pop(OBSERVED, ObservedFactors(())).batches
        return projected_gaussian(span, projected, observed)


def _rows_of(capture: LayerCapture) -> Tensor:
    """The gradients of a layer, (M, B, O I)."""
    a, g = map(at_least_float32, (capture.inputs, capture.gradients))
    return (g.mT @ a).flatten(2)


@dataclass(frozen=True)
class _AllRows(BatchStructure):
    """The gradients of each layer."""

    joint: ClassVar[bool] = False
    max_rows: int | None = None

    def batch_factors(self, chunks: Chunks, counts: Counts) -> Iterator[Factors]:
        """See the base class."""
        rows: dict[int, list[Tensor]] = {}
        for chunk in chunks:
            for i, capture in chunk().items():
                rows.setdefault(i, []).append(_rows_of(capture))
        yield {i: RowFactors((torch.cat(x).flatten(0, 1),)) for i, x in rows.items()}


@dataclass(frozen=True)
class _SomeRows(BatchStructure):
    """The gradients of each layer at some rows, drawn by torch's global generator."""

    joint: ClassVar[bool] = True
    size: int

    def batch_factors(self, chunks: Chunks, counts: Counts) -> Iterator[Factors]:
        """See the base class."""
        for whole in _AllRows().batch_factors(chunks, counts):
            values = {i: x.batches[0] for i, x in whole.items()}
            first = values[0]
            keys = torch.rand(len(first), dtype=torch.float64, device=first.device)
            size = torch.tensor(self.size)
            yield {i: RowSample(x, keys, size) for i, x in values.items()}


@dataclass(frozen=True, eq=False)
class _Projected(BatchStructure):
    """Coordinates of all rows in a span, and their squared lengths.

    Attributes:
        span: The span.
    """

    joint: ClassVar[bool] = True
    span: Span
    max_rows: int | None

    def batch_factors(self, chunks: Chunks, counts: Counts) -> Iterator[Factors]:
        """See the base class."""
        done = [
            self.span.project(
                _rows_of(capture) for _, capture in sorted(chunk().items())
            )
            for chunk in chunks
        ]
        inside, square = (torch.cat(x).flatten(0, 1) for x in zip(*done, strict=True))
        yield {0: RowFactors((inside,)), 1: RowFactors((square[:, None],))}


def _by_input(captures: Captures) -> list[tuple[Tensor, list[int]]]:
    """Places of the layers that get the same tensor, together."""
    places: dict[Tensor, list[int]] = {}
    for i, capture in captures.items():
        places.setdefault(capture.inputs, []).append(i)
    return list(places.items())


def _blocks(
    loc: Weights, prior_precision: Weights, factors: Factors, ranks: Ranks = ALONE
) -> BlockGaussian:
    """A block for each layer; the factors are used up."""
    places = iter(range(len(factors)))
    by_site = {s: [factors.pop(next(places)) for _ in x] for s, x in loc.items()}
    decompose, spectra = shared_out(by_site, ranks), WeakTensorKeyDictionary()
    blocks = {s: eigenblocks(x, spectra, s, decompose) for s, x in by_site.items()}
    return BlockGaussian(loc, prior_precision, blocks)
