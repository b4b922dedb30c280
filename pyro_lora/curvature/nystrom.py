r"""Nyström sketches: low-rank approximations of Gram matrices that add up.

In place of :math:`A = X^T X` (I, I) a pass sums :math:`Y = A \Omega` (I, 2 k + 1), for
an :math:`\Omega` that is always the same: :math:`(A_1 + A_2) \Omega = Y_1 + Y_2`. If A
has rank k at most, :math:`Y (\Omega^T Y)^+ Y^T` is A itself: of A = 4 :math:`e_1 e_1^T`
and :math:`\Omega = e_1` it is :math:`4 e_1 \cdot 4^{-1} \cdot 4 e_1^T`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_lora.ground.memory import constant
from pyro_lora.ground.synchronisation import require

_NUM_BLOCKS, _LEAST_BLOCKED = 4, 320  # 5/8 of the products, from a width on that pays


def gram(x: Tensor, rank: int | None) -> Tensor:
    r"""Gram matrix :math:`X^T X`, or its sketch :math:`X^T X \Omega` where it is wide.

    Omega has 2 rank + 1 columns, the same in every call, so that sketches add up over
    batches in any split as the matrices do. Narrow matrices, for which the sketch
    would be no smaller, are kept whole.

    Args:
        x: Rows that are summed over, (n, I).
        rank: k, the rank that :func:`eigh_psd` is to keep; None keeps the matrix.

    Returns:
        (I, I), or (I, 2 k + 1).
    """
    width = x.shape[-1]
    if rank is None or 2 * rank + 1 >= width:
        return _whole_gram(x)
    # Right to left: n I (2 k + 1) products, and nothing of size (I, I).
    return x.mT @ (x @ _test_matrix(width, 2 * rank + 1).to(x))


def _whole_gram(x: Tensor) -> Tensor:
    """X^T X by rows of blocks, of which those below the diagonal are transposes."""
    width = x.shape[-1]
    if width < _LEAST_BLOCKED:
        return x.mT @ x
    size = -(-width // _NUM_BLOCKS)
    result = x.new_empty(width, width)
    for start in range(0, width, size):
        stop = min(start + size, width)
        result[start:stop, start:] = x[:, start:stop].mT @ x[:, start:]
        result[start:stop, :start] = result[:start, start:stop].mT
    return result


def eigh_psd(matrix: Tensor, what: str = "It") -> tuple[Tensor, Tensor]:
    r"""Eigenvalues and eigenvectors of a sum of what :func:`gram` returns.

    From a sketch :math:`Y = A \Omega` it takes the leading k eigenpairs of Nyström's
    :math:`\hat A = Y (\Omega^T Y)^+ Y^T`, for which :math:`\hat A \preceq A` and
    :math:`E \|A - \hat A_k\|_* \le 2 \sum_{j > k} \lambda_j(A)`, twice the least error
    of any rank-k matrix (Tropp et al. 2017, https://arxiv.org/abs/1706.05736,
    section 4).

    Args:
        matrix: (I, I), positive semidefinite, or a sketch (I, 2 k + 1).
        what: What it is, the start of a message.

    Returns:
        Eigenvalues (I,) and vectors (I, I), or (k,) and (I, k); float64.

    Raises:
        ValueError: If it isn't finite, symmetric and positive semidefinite, up to the
            rounding of sums in its dtype.
    """
    width, size = matrix.shape
    # Rounding moves entries and eigenvalues by far less than half of a sum's digits.
    tolerance = torch.finfo(matrix.dtype).eps ** 0.5
    matrix = matrix.double()
    if size == width:
        values, vectors = _eigh(matrix, tolerance, what)
        # Gram matrices have no negative eigenvalues; what is below zero is rounding.
        return values.clamp_min(0), vectors
    omega = _test_matrix(width, size).to(matrix)
    core = omega.mT @ matrix
    values, vectors = _eigh(core, tolerance, what)
    # Beyond the rank of A the core's eigenvalues are rounding, which the pseudo-inverse
    # would blow up; rounding in a sum of n terms is some eps of the largest.
    kept = values > size * torch.finfo(matrix.dtype).eps * values[-1]
    roots = torch.where(kept, values.clamp_min(0).rsqrt(), 0.0)
    u, s, _ = torch.linalg.svd(matrix @ (vectors * roots), full_matrices=False)
    k = num_eigenvalues((width, size))
    return s[:k].square(), u[:, :k]


def num_eigenvalues(shape: Sequence[int]) -> int:
    """How many :func:`eigh_psd` finds of a matrix, or of the sketch of one.

    Args:
        shape: (I, I), or (I, 2 k + 1).
    """
    width, size = shape
    return width if size == width else (size - 1) // 2


def _eigh(matrix: Tensor, tolerance: float, what: str) -> tuple[Tensor, Tensor]:
    remedy = "A sum of outer products has none: check the structure."

    def not_finite() -> ValueError:
        return ValueError(f"{what} has NaN or infinite entries. {remedy}")

    def not_symmetric() -> ValueError:
        return ValueError(
            f"{what} isn't symmetric. A sum of outer products is: check the structure."
        )

    def negative() -> ValueError:
        return ValueError(
            f"{what} has eigenvalues from {float(values[0]):.3g} to "
            f"{float(values[-1]):.3g}, negative ones, too. {remedy}"
        )

    require(matrix.isfinite().all(), not_finite)
    atol = tolerance * matrix.abs().max()
    require(((matrix - matrix.mT).abs_() <= atol).all(), not_symmetric)
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    require(values[0] >= -tolerance * values.abs().max(), negative)
    return values, vectors


@constant
def _test_matrix(width: int, size: int) -> Tensor:
    """Omega, orthonormal columns with a uniformly distributed range, (width, size)."""
    generator = torch.Generator().manual_seed(width)
    normal = torch.randn(
        width, size, generator=generator, dtype=torch.float64, device="cpu"
    )
    return torch.linalg.qr(normal).Q
