"""Curvature structures: functions of (layer inputs, output gradients)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_lora.curvature.nystrom import gram


@dataclass(frozen=True)
class KroneckerFactors:
    r"""Sums for one linear layer whose block is :math:`F \approx G \otimes A / n`.

    Attributes:
        a: Sum of input outer products over the tokens that count, (I, I), or its sketch
            (I, 2 k + 1) of rank k.
        g: Sum of gradient outer products, (O, O), nats, full data; likewise.
        count: n, the number of tokens that count.
    """

    a: Tensor
    g: Tensor
    count: Tensor

    def __add__(self, other: KroneckerFactors) -> KroneckerFactors:
        return KroneckerFactors(
            self.a + other.a, self.g + other.g, self.count + other.count
        )


@dataclass(frozen=True)
class DiagonalFactors:
    r"""The exact diagonal of one linear layer's Fisher block.

    Attributes:
        diagonal: :math:`\sum_{m,b} (\partial h_{mb} / \partial W)^2` over the Fisher
            terms h, (O, I), nats, full data.
    """

    diagonal: Tensor

    def __add__(self, other: DiagonalFactors) -> DiagonalFactors:
        return DiagonalFactors(self.diagonal + other.diagonal)


@dataclass(frozen=True)
class DenseFactors:
    r"""The Fisher matrix of all layers together.

    Attributes:
        matrix: :math:`\sum_{m,b} j_{mb} j_{mb}^T` with j the gradient of a Fisher term
            in all weights, (D, D), nats, full data.
    """

    matrix: Tensor

    def __add__(self, other: DenseFactors) -> DenseFactors:
        return DenseFactors(self.matrix + other.matrix)


LayerStructure = Callable[[Tensor, Tensor], KroneckerFactors | DiagonalFactors]
JointStructure = Callable[[Sequence[Tensor], Sequence[Tensor]], DenseFactors]
EigenbasisStructure = Callable[[Tensor, Tensor, Tensor, Tensor], DiagonalFactors]
Structure = LayerStructure | JointStructure | EigenbasisStructure


def kfac_expand(a: Tensor, g: Tensor, rank: int | None = None) -> KroneckerFactors:
    r"""KFAC-expand, every token a datum of its own: :math:`F \approx G \otimes A / n`.

    :math:`A = \sum_{b,t} a_{bt} a_{bt}^T` over the n tokens that count and
    :math:`G = \sum_{m,b,t} g_{mbt} g_{mbt}^T`. Exact for one token and one datum.
    Eschenhagen et al. (2023), https://arxiv.org/abs/2311.00636, eq. 18.

    ``structure=functools.partial(kfac_expand, rank=64)`` keeps of each factor wider
    than 2 rank + 1 the leading ``rank`` eigenpairs, found in one pass by a sketch:
    (2 rank + 1) I numbers in place of I^2, nothing of size I x I formed. Outside of
    them the Fisher information counts as zero, so that the posterior is the prior
    there and is nowhere narrower than with the full factors. The sum of the
    eigenvalues that are lost is at most twice the least possible, in expectation.

    Args:
        a: Layer inputs, (B, T, I).
        g: Gradients of the Fisher terms w.r.t. the layer's outputs, (M, B, T, O),
            exactly zero at the tokens that don't count.
        rank: Eigenpairs kept of each wide factor; None is all.

    Returns:
        Factors that add up over batches, in the dtype of ``a`` or float32 if wider.

    >>> factors = kfac_expand(torch.ones(1, 2, 3), torch.ones(1, 1, 2, 4))
    >>> factors.a.shape, factors.g.shape, factors.count
    (torch.Size([3, 3]), torch.Size([4, 4]), tensor(2.))
    """
    a, g = at_least_float32(a), at_least_float32(g)
    counts = _counts(g)
    if not counts.all():
        a, g = a[counts], g[:, counts]
    rows, grads = a.flatten(0, -2), g.flatten(0, -2)
    return KroneckerFactors(gram(rows, rank), gram(grads, rank), counts.sum().to(a))


def kfac_reduce(a: Tensor, g: Tensor, rank: int | None = None) -> KroneckerFactors:
    r"""KFAC-reduce: inputs averaged and gradients summed over the tokens of a datum.

    :math:`F \approx G \otimes A / n` with :math:`A = \sum_b \bar a_b \bar a_b^T` over
    the n data, :math:`\bar a_b` the mean over the tokens that count, and :math:`G =
    \sum_{m,b} (\sum_t g_{mbt}) (\sum_t g_{mbt})^T`. Exact where the layer's outputs are
    averaged over the tokens and nothing else is done with them.
    Eschenhagen et al. (2023), https://arxiv.org/abs/2311.00636, eq. 22.

    Args:
        a: Layer inputs, (B, T, I).
        g: Gradients of the Fisher terms, (M, B, T, O), zero where a token doesn't
            count.
        rank: As in :func:`kfac_expand`.

    Returns:
        Factors with n the number of data that have a token that counts.
    """
    a, g = at_least_float32(a), at_least_float32(g)
    counts = _counts(g).to(a)
    tokens = counts.sum(-1, keepdim=True)  # (B, 1)
    rows = (a * counts[..., None]).sum(1) / tokens.clamp_min(1)
    grads = g.sum(2).flatten(0, 1)
    num_data = (tokens > 0).sum().to(a)
    return KroneckerFactors(gram(rows, rank), gram(grads, rank), num_data)


def diagonal(a: Tensor, g: Tensor) -> DiagonalFactors:
    r"""The exact diagonal, :math:`\sum_{m,b} (\sum_t g_{mbt} a_{bt}^T)^2`.

    Args:
        a: Layer inputs, (B, T, I).
        g: Gradients of the Fisher terms, (M, B, T, O).

    Returns:
        The diagonal, (O, I).
    """
    a, g = at_least_float32(a), at_least_float32(g)
    total = torch.zeros(g.shape[-1], a.shape[-1], dtype=a.dtype, device=a.device)
    for g_m in g:
        total += (g_m.mT @ a).square().sum(0)
    return DiagonalFactors(total)


def joint_structure(structure: JointStructure) -> JointStructure:
    """Mark a structure as one of all layers at once, as :func:`dense` is.

    Args:
        structure: A function of the inputs of every layer, each (B, T, I), and of the
            gradients, each (M, B, T, O), in the order of the lifted sites.

    Returns:
        The same function.

    >>> @joint_structure
    ... def without_covariances(a, g):
    ...     diagonal = dense(a, g).matrix.diagonal()
    ...     return DenseFactors(torch.diag(diagonal))
    """
    structure.joint = True  # type: ignore[attr-defined]
    return structure


@joint_structure
def dense(a: Sequence[Tensor], g: Sequence[Tensor]) -> DenseFactors:
    r"""The whole Fisher matrix, :math:`\sum_{m,b} j_{mb} j_{mb}^T`; for small models.

    Args:
        a: Inputs of every layer, each (B, T, I).
        g: Gradients of every layer, each (M, B, T, O).

    Returns:
        The matrix over all weights, layer after layer, row-major, (D, D).
    """
    jacobian = torch.cat(
        [
            (g_l.mT @ a_l).flatten(0, 1).flatten(1)
            for a_l, g_l in zip(
                map(at_least_float32, a), map(at_least_float32, g), strict=True
            )
        ],
        1,
    )
    return DenseFactors(jacobian.mT @ jacobian)


def ekfac(a: Tensor, g: Tensor, rows: Tensor, columns: Tensor) -> DiagonalFactors:
    r"""EKFAC: the exact diagonal in the eigenbasis of :func:`kfac_expand`.

    :math:`\Lambda = \sum_{m,b} (\sum_t U_G^T g_{mbt} a_{bt}^T U_A)^2` in place of the
    product of eigenvalues, and the basis is kept: of all diagonals in that basis the
    one nearest to the Fisher block. George et al. (2018),
    https://arxiv.org/abs/1806.03884, section 3.

    As a structure it takes two passes over the data: :func:`kfac_expand` for the basis,
    then this function.

    Args:
        a: Layer inputs, (B, T, I).
        g: Gradients of the Fisher terms, (M, B, T, O).
        rows: Eigenbasis on the output side, :math:`U_G`, (O, O).
        columns: Eigenbasis on the input side, :math:`U_A`, (I, I).

    Returns:
        The second moments in the eigenbasis, (O, I).

    >>> a, g = torch.ones(1, 2, 3), torch.ones(1, 1, 2, 4)
    >>> ekfac(a, g, torch.eye(4), torch.eye(3)).diagonal[0]
    tensor([4., 4., 4.])
    """
    a, g = at_least_float32(a), at_least_float32(g)
    return diagonal(a @ columns.to(a), g @ rows.to(g))


def is_joint(structure: Structure) -> bool:
    """Whether it is of all layers at once."""
    return getattr(getattr(structure, "func", structure), "joint", False)


def is_kfac(structure: LayerStructure) -> bool:
    """Whether it is ``kfac_expand`` or ``kfac_reduce``, of any rank."""
    return getattr(structure, "func", structure) in (kfac_expand, kfac_reduce)


def with_same_inputs(
    structure: LayerStructure, a: Tensor, g: Sequence[Tensor]
) -> list[KroneckerFactors | DiagonalFactors]:
    """A structure of several layers that have the same inputs.

    The input factor of KFAC is formed once for all layers in which the same tokens
    count, and is the same tensor in their factors.

    Args:
        structure: A function of one layer.
        a: The inputs, (B, T, I).
        g: Gradients of every layer, each (M, B, T, O).

    Returns:
        What the structure returns for each layer.
    """
    if len(g) == 1 or not is_kfac(structure):
        return [structure(a, g_l) for g_l in g]
    known: list[tuple[Tensor, KroneckerFactors]] = []
    result: list[KroneckerFactors | DiagonalFactors] = []
    for g_l in g:
        counts = _counts(g_l)
        same = next((f for c, f in known if torch.equal(c, counts)), None)
        # Inputs of width 0 leave the gradients' factor alone to be formed.
        found = structure(a if same is None else a[..., :0], g_l)
        assert isinstance(found, KroneckerFactors)
        if same is None:
            known.append((counts, found))
        result.append(found if same is None else replace(same, g=found.g))
    return result


def at_least_float32(x: Tensor) -> Tensor:
    """Sums of many terms need float32 or wider; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _counts(g: Tensor) -> Tensor:
    return g.abs().amax((0, -1)) != 0  # (B, T)
