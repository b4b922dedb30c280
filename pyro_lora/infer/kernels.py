"""Kernels between particles: small values that map squared distances to a Gram matrix.

A kernel of your own is any function of squared distances (K, K) -> (K, K); it acts on
all weights jointly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Keeps the bandwidth positive where all particles coincide (all B = 0, function space).
MIN_SQUARED_BANDWIDTH = 1e-8

Kernel = Callable[[Tensor], Tensor]
Space = Literal["joint", "site", "function"]


@dataclass(frozen=True)
class RBF:
    r"""Gaussian kernel :math:`k = \exp(-d^2 / (2 h^2))`.

    Attributes:
        space: What :math:`d` measures. ``"joint"``: all weights together; ``"site"``:
            one kernel for each site; ``"function"``: the likelihood's logit contrasts
            (or location), squared differences averaged over the minibatch.
        bandwidth: h, or None for the median heuristic :math:`2 h^2 = \mathrm{median}_{
            i<j} d_{ij}^2 / \log(K + 1)` (the lower median; Pyro's kernels divide by
            another factor), with no gradient through it.

    >>> RBF(bandwidth=1.0)(torch.tensor([[0.0, 2.0], [2.0, 0.0]]))
    tensor([[1.0000, 0.3679],
            [0.3679, 1.0000]])
    """

    space: Space = "joint"
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        if self.space not in ("joint", "site", "function"):
            raise ValueError(
                f"space must be 'joint', 'site' or 'function', found {self.space!r}."
            )
        if self.bandwidth is not None and not self.bandwidth > 0:
            raise ValueError(f"bandwidth must be positive, found {self.bandwidth}.")

    def __call__(self, sq_dists: Tensor) -> Tensor:
        """Gram matrix (K, K) of squared distances (K, K)."""
        if self.bandwidth is not None:
            return (-sq_dists / (2 * self.bandwidth**2)).exp()
        return (-sq_dists / _median_heuristic(sq_dists.detach())).exp()


@dataclass(frozen=True)
class Zero:
    r"""No interaction: :math:`\phi_i = \nabla \log p(x_i) / T`.

    K particles are a deep ensemble, one is MAP.
    """


def check_kernel(kernel: object) -> None:
    """Refuse what can't be a kernel.

    Raises:
        TypeError: If it is neither ``Zero()`` nor a function.
    """
    if isinstance(kernel, type) or not (isinstance(kernel, Zero) or callable(kernel)):
        raise TypeError(
            "kernel must be kernels.RBF(...), kernels.Zero() or a function of squared "
            f"distances, found {kernel!r}."
        )


def _median_heuristic(sq_dists: Tensor) -> Tensor:
    num_particles = sq_dists.shape[0]
    if num_particles == 1:
        return sq_dists.new_ones(())
    i, j = torch.triu_indices(
        num_particles, num_particles, offset=1, device=sq_dists.device
    )
    median = sq_dists[i, j].median()
    return (median / math.log(num_particles + 1)).clamp_min(MIN_SQUARED_BANDWIDTH)
