"""Kernels between particles: small values that map squared distances to a Gram matrix.

A kernel of your own is any function of squared distances (K, K) -> (K, K); it acts on
all weights jointly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from pyro_lora.ground.settings import check_positive, check_word

__all__ = ["IMQ", "RBF", "Mixture", "NoRepulsion"]

# Keeps the bandwidth positive where all particles coincide (all B = 0, function space).
MIN_SQUARED_BANDWIDTH = 1e-8

Kernel = Callable[[Tensor], Tensor]
SpaceName = Literal["joint", "site", "delta", "function"]
_SPACES = get_args(SpaceName)


@dataclass(frozen=True)
class RBF:
    r"""Gaussian kernel :math:`k = \exp(-d^2 / (2 h^2))`.

    Attributes:
        space: What :math:`d` measures. ``"joint"``: all weights together; ``"site"``:
            one kernel for each site; ``"delta"``: all weights, but LoRA's by the
            updates :math:`s B A`, so that turning the factors is no distance;
            ``"function"``: the likelihood's natural parameter (logits less their mean,
            a logit, a log rate) or location, squared differences averaged over the
            minibatch.
        bandwidth: h, or None for the median heuristic :math:`2 h^2 = \mathrm{median}_{
            i<j} d_{ij}^2 / \log(K + 1)` (the lower median; Pyro's kernels divide by
            another factor), with no gradient through it.

    >>> RBF(bandwidth=1.0)(torch.tensor([[0.0, 2.0], [2.0, 0.0]]))
    tensor([[1.0000, 0.3679],
            [0.3679, 1.0000]])
    """

    space: SpaceName = "joint"
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        _check(self.space, self.bandwidth)

    def __call__(self, sq_dists: Tensor) -> Tensor:
        """Gram matrix (..., K, K) of squared distances (..., K, K)."""
        return (-_scaled(sq_dists, self.bandwidth)).exp()


@dataclass(frozen=True)
class IMQ:
    r"""Inverse multiquadric kernel :math:`k = (1 + d^2 / (2 h^2))^{-1/2}`.

    Its tails are heavy: particles that are far apart still repel, and a Stein
    discrepancy with it notices mass that is missing (Gorham & Mackey 2017,
    https://arxiv.org/abs/1703.01717).

    Attributes:
        space: As for :class:`RBF`.
        bandwidth: h, as for :class:`RBF`.

    >>> IMQ(bandwidth=1.0)(torch.tensor([[0.0, 6.0], [6.0, 0.0]]))
    tensor([[1.0000, 0.5000],
            [0.5000, 1.0000]])
    """

    space: SpaceName = "joint"
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        _check(self.space, self.bandwidth)

    def __call__(self, sq_dists: Tensor) -> Tensor:
        """Gram matrix (..., K, K) of squared distances (..., K, K)."""
        return (1 + _scaled(sq_dists, self.bandwidth)).rsqrt()


@dataclass(frozen=True)
class Mixture:
    r"""Mean of Gaussian kernels, :math:`\frac1n \sum_s \exp(-d^2 / (2 s^2 h^2))`.

    Several widths at once: no single one is right while particles spread.

    Attributes:
        scales: The factors s on the bandwidth.
        space: As for :class:`RBF`.
        bandwidth: h, as for :class:`RBF`.

    >>> Mixture(scales=(1.0,), bandwidth=1.0)(torch.tensor([[0.0, 2.0], [2.0, 0.0]]))
    tensor([[1.0000, 0.3679],
            [0.3679, 1.0000]])
    """

    scales: tuple[float, ...] = (0.5, 1.0, 2.0)
    space: SpaceName = "joint"
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        _check(self.space, self.bandwidth)
        if not isinstance(self.scales, tuple | list) or not self.scales:
            raise ValueError(f"scales must be positive numbers, found {self.scales!r}.")
        for scale in self.scales:
            check_positive("Each of scales", scale)

    def __call__(self, sq_dists: Tensor) -> Tensor:
        """Gram matrix (..., K, K) of squared distances (..., K, K)."""
        scaled = _scaled(sq_dists, self.bandwidth)
        return torch.stack([(-scaled / s**2).exp() for s in self.scales]).mean(0)


@dataclass(frozen=True)
class NoRepulsion:
    r"""No interaction: :math:`\phi_i = \nabla \log p(x_i) / T`.

    K particles are a deep ensemble, one is MAP.
    """


def check_kernel(kernel: object) -> None:
    """Refuse what can't be a kernel.

    Raises:
        TypeError: If it is neither ``NoRepulsion()`` nor a function.
    """
    if isinstance(kernel, type) or not (
        isinstance(kernel, NoRepulsion) or callable(kernel)
    ):
        raise TypeError(
            "kernel must be one of kernels, such as kernels.RBF(...), or a function of "
            f"squared distances, found {kernel!r}."
        )


@runtime_checkable
class _OfSpace(Protocol):
    @property
    def space(self) -> SpaceName: ...


def space_of(kernel: Kernel | NoRepulsion) -> SpaceName:
    """What a kernel's distances measure: its ``space``, all weights if it has none.

    Args:
        kernel: Any; one of your own may have a ``space``, too.

    Raises:
        ValueError: If that is none.
    """
    space: SpaceName = kernel.space if isinstance(kernel, _OfSpace) else "joint"
    check_word("A kernel's space", space, _SPACES)
    return space


def _check(space: str, bandwidth: float | None) -> None:
    check_word("space", space, _SPACES)
    if bandwidth is not None:
        check_positive("bandwidth", bandwidth)


def _scaled(sq_dists: Tensor, bandwidth: float | None) -> Tensor:
    """d^2 / (2 h^2)."""
    if bandwidth is not None:
        return sq_dists / (2 * bandwidth**2)
    return sq_dists / _median_heuristic(sq_dists.detach())


def _median_heuristic(sq_dists: Tensor) -> Tensor:
    """Median of the pairs over log(K + 1), (..., 1, 1) of (..., K, K)."""
    num_particles = sq_dists.shape[-1]
    if num_particles == 1:
        return sq_dists.new_ones(())
    i, j = torch.triu_indices(
        num_particles, num_particles, offset=1, device=sq_dists.device
    )
    # With 2 h^2 = median / log(K + 1) a kernel value at the median is 1 / (K + 1): all
    # others' together count about as much as a particle's own.
    median = sq_dists[..., i, j].median(-1).values[..., None, None]
    return (median / math.log(num_particles + 1)).clamp_min(MIN_SQUARED_BANDWIDTH)
