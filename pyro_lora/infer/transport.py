"""Directions in which particles move: functions of particles, gradients, kernel."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_lora.infer.kernels import Kernel


def squared_distances(particles: Tensor) -> Tensor:
    """Squared distances between particles, by a Gram matrix.

    Args:
        particles: (K, ...).

    Returns:
        (K, K), zero on the diagonal.
    """
    flat = _rows(particles)
    flat = flat - flat.mean(0)  # distances don't change, cancellation shrinks
    return distances_from_products(flat @ flat.mT)


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


def attract(gradients: Tensor, gram: Tensor) -> Tensor:
    r"""The first term of SVGD, :math:`\frac1K \sum_j k(x_j, x_i) \nabla \log p(x_j)`.

    Liu & Wang (2016), https://arxiv.org/abs/1608.04471, eq. 8.

    Args:
        gradients: Of the (tempered) log joint of the full data, (K, ...), nats.
        gram: (K, K).

    Returns:
        (K, ...).
    """
    mean = gram.to(gradients) @ _rows(gradients) / gram.shape[0]
    return mean.reshape(gradients.shape)


def stein_repulsion(particles: Tensor, slope: Tensor) -> Tensor:
    r"""The second term of SVGD, :math:`\frac1K \sum_j \nabla_{x_j} k(x_j, x_i)`.

    Liu & Wang (2016), https://arxiv.org/abs/1608.04471, eq. 8.

    Args:
        particles: (K, ...).
        slope: Derivative of the kernel in the squared distance, (K, K).

    Returns:
        (K, ...).
    """
    return -_slope_times_difference(particles, slope) / slope.shape[0]


def repel(particles: Tensor, gram: Tensor, slope: Tensor) -> Tensor:
    r"""Gradient of minus the log kernel density, other particles held fixed.

    :math:`-\nabla_{x_i} \log \sum_j k(x_i, x_j)`, j including i (D'Angelo & Fortuin
    2021, https://arxiv.org/abs/2106.11642, eq. 8).

    Args:
        particles: (K, ...).
        gram: (K, K).
        slope: Derivative of the kernel in the squared distance, (K, K).

    Returns:
        (K, ...).
    """
    density = gram.to(particles).sum(1).reshape(-1, *[1] * (particles.ndim - 1))
    return -_slope_times_difference(particles, slope) / density


def spread(particles: Mapping[str, Tensor]) -> Tensor:
    """Root mean square distance of the particles from their mean, a scalar."""
    centred = {s: x.detach() - x.detach().mean(0) for s, x in particles.items()}
    return norm(centred)


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
    squares = [_rows(x).square().sum(1) for x in values.values()]
    return torch.stack(squares).sum(0).mean().sqrt()


def _rows(particles: Tensor) -> Tensor:
    return particles.reshape(particles.shape[0], -1)  # (K, D), D = 1 for scalars


def _slope_times_difference(particles: Tensor, slope: Tensor) -> Tensor:
    # sum_j 2 kappa'_ij (x_i - x_j), without a (K, K, D) tensor
    flat = _rows(particles)
    flat = flat - flat.mean(0)
    slope = slope.to(flat)
    result = 2 * (slope.sum(1, keepdim=True) * flat - slope @ flat)
    return result.reshape(particles.shape)
