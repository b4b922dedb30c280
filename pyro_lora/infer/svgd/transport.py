"""Directions in which particles move: functions of particles, gradients, kernel."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_lora.infer.svgd.kernels import Kernel

# Numbers that are worked on at once: 1 MiB in float32 stays in a core's cache. A GPU
# has no use for small blocks.
BLOCK, LARGE_BLOCK = 2**18, 2**26


def squared_distances(particles: Tensor) -> Tensor:
    """Squared distances between particles, by a Gram matrix.

    Args:
        particles: (K, ...).

    Returns:
        (K, K), zero on the diagonal, in float32 or wider.
    """
    return distances_from_products(centred_products(particles))


def centred_products(particles: Tensor) -> Tensor:
    """Inner products of particles (K, ...) less their mean, (K, K).

    Distances are those of the particles themselves, with less cancellation. In float32
    or wider.
    """
    blocks = (_centred(block) for block in _blocks(particles))
    return torch.stack([x @ x.mT for x in blocks]).sum(0)


def products(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of weight sets (K, ...), (K, K)."""
    return _rows(x) @ _rows(y).mT


def distances_from_products(gram: Tensor) -> Tensor:
    """Squared distances (K, K) of particles with inner products (K, K)."""
    norms = gram.diagonal()
    sq_dists = (norms[:, None] + norms[None, :] - gram - gram.mT).clamp_min(0)
    return sq_dists - torch.diag_embed(sq_dists.diagonal())


def gram_and_slope(kernel: Kernel, sq_dists: Tensor) -> tuple[Tensor, Tensor]:
    r"""Kernel and its derivative :math:`\kappa'` in the squared distance.

    Args:
        kernel: A function (K, K) -> (K, K), elementwise in the squared distances.
        sq_dists: (..., K, K).

    Returns:
        Gram matrix and slopes, both (..., K, K), constants.

    Raises:
        ValueError: If the kernel doesn't give a (K, K) matrix.
    """
    with torch.enable_grad():
        leaf = sq_dists.detach().requires_grad_()
        gram = kernel(leaf)
        if gram.shape != leaf.shape:
            raise ValueError(
                f"The kernel maps squared distances {tuple(leaf.shape)} to shape "
                f"{tuple(gram.shape)}; it must give the Gram matrix of the same shape."
            )
        (slope,) = torch.autograd.grad(gram.sum(), leaf)
    # a particle doesn't repel itself, even if the slope is inf
    slope.diagonal(dim1=-2, dim2=-1).zero_()
    return gram.detach(), slope


def stein_weights(gram: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    r"""SVGD's update as :math:`\phi_i = \sum_j (a_{ij} s_j + c_{ij} x_j)`: a and c.

    The first term is :math:`\frac1K \sum_j k(x_j, x_i) s_j` with the scores
    :math:`s_j = \nabla \log p(x_j) / T`, the second :math:`\frac1K \sum_j \nabla_{x_j}
    k(x_j, x_i) = -\frac2K \sum_j \kappa'_{ij} (x_i - x_j)` (Liu & Wang 2016,
    https://arxiv.org/abs/1608.04471, eq. 8).

    Args:
        gram: (K, K).
        slope: Derivative of the kernel in the squared distance, (K, K).

    Returns:
        Both (K, K).
    """
    num_particles = gram.shape[0]
    return gram / num_particles, _differences(slope) / num_particles


def repulsive_weights(gram: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    r"""Those of an own gradient and minus the log kernel density's.

    The second term is :math:`-\nabla_{x_i} \log \sum_j k(x_i, x_j)`, j including i,
    other particles held fixed (D'Angelo & Fortuin 2021,
    https://arxiv.org/abs/2106.11642, eq. 8).

    Args:
        gram: (K, K).
        slope: Derivative of the kernel in the squared distance, (K, K).

    Returns:
        Both (K, K).
    """
    density = gram.sum(1, keepdim=True)
    return torch.eye(len(gram)).to(gram), _differences(slope) / density


def combine(
    scores: Tensor, particles: Tensor, pull: Tensor, push: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Direction :math:`\phi_i = \sum_j (a_{ij} s_j + c_{ij} x_j)`, in one pass.

    Args:
        scores: s, (K, ...).
        particles: x, (K, ...).
        pull: a, (K, K).
        push: c, (K, K), with rows that add up to 0.

    Returns:
        (K, ...); and the sums of squares of both terms, (2,).
    """
    direction = torch.empty_like(particles, memory_format=torch.contiguous_format)
    rows = direction.view(len(particles), -1)
    squares, start = [], 0
    for s, x in zip(_blocks(scores), _blocks(particles), strict=True):
        x = _centred(x)  # c times their mean is 0, and its rounding errors are large
        attraction, repulsion = pull.to(x) @ s.to(x), push.to(x) @ x
        squares += [attraction.square().sum(), repulsion.square().sum()]
        stop = start + x.shape[1]
        rows[:, start:stop] = attraction.add_(repulsion)
        start = stop
    return direction, torch.stack(squares).double().view(-1, 2).sum(0)


def attract(scores: Tensor, pull: Tensor) -> Tensor:
    """The first term alone, (K, ...)."""
    rows = _wide(_rows(scores))
    return (pull.to(rows) @ rows).to(scores.dtype).reshape(scores.shape)


def repel(particles: Tensor, push: Tensor) -> Tensor:
    """The second term alone, (K, ...)."""
    x = _centred(_rows(particles))
    return (push.to(x) @ x).reshape(particles.shape)


def spread(particles: Mapping[str, Tensor]) -> Tensor:
    """Root mean square distance of the particles from their mean, a scalar."""
    squares = [
        _centred(block).square().sum()
        for x in particles.values()
        for block in _blocks(x.detach())
    ]
    return _root_mean_square(squares, particles)


def mean_off_diagonal(gram: Tensor) -> Tensor:
    """Mean kernel value between different particles, (...) of (..., K, K).

    It is 1 where there is just one.
    """
    num_particles = gram.shape[-1]
    if num_particles == 1:
        return gram.new_ones(gram.shape[:-2])
    total = gram.sum((-2, -1)) - gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    return total / (num_particles * (num_particles - 1))


def norm(values: Mapping[str, Tensor]) -> Tensor:
    """Root mean square over particles of the norm over all sites, a scalar."""
    squares = [
        _wide(block).square().sum() for x in values.values() for block in _blocks(x)
    ]
    return _root_mean_square(squares, values)


def _root_mean_square(squares: list[Tensor], like: Mapping[str, Tensor]) -> Tensor:
    num_particles = next(iter(like.values())).shape[0]
    return (torch.stack(squares).double().sum() / num_particles).sqrt()


def _rows(particles: Tensor) -> Tensor:
    return particles.reshape(particles.shape[0], -1)  # (K, D), D = 1 for scalars


def _blocks(particles: Tensor) -> tuple[Tensor, ...]:
    """Columns of the rows, in parts (K, n)."""
    size = LARGE_BLOCK if particles.is_cuda else BLOCK
    return _rows(particles).split(max(1, size // len(particles)), 1)


def _centred(rows: Tensor) -> Tensor:
    rows = _wide(rows)
    return rows - rows.mean(0)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _differences(slope: Tensor) -> Tensor:
    # c of -2 sum_j kappa'_ij (x_i - x_j)
    return 2 * (slope - slope.sum(1).diag())
