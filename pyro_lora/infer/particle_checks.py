"""What can go wrong with particles: errors and warnings that say what to do."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

# Mean kernel value between different particles below which they don't interact.
COLLAPSED = 1e-6


def check_finite(values: Mapping[str, Tensor], what: str, first: int = 0) -> None:
    """Refuse particles with values that are NaN or infinite.

    Args:
        values: Site -> (K, ...).
        what: What the values are.
        first: Number of the first particle.

    Raises:
        ValueError: Naming the first such site and its particles.
    """
    finite = torch.isfinite(_largest(values))
    if finite.all():
        return
    for site, row in zip(values, finite, strict=True):
        if not row.all():
            bad = [first + k for k in (~row).nonzero().flatten().tolist()]
            raise ValueError(
                f"Site {site!r}: the {what} of particle(s) {bad} is NaN or infinite. "
                "No particle was moved. Check the batch and the model, or go back to "
                "an earlier state with a lower learning rate."
            )


def warn_if_together(particles: Mapping[str, Tensor]) -> None:
    """Warn about particles that start at one point, to SVGD's caller."""
    num_particles = next(iter(particles.values())).shape[0]
    if num_particles > 1 and all((x == x[:1]).all() for x in particles.values()):
        warnings.warn(
            f"All {num_particles} particles start at one point, where nothing drives "
            "them apart. Use init_to_adapter(jitter='auto') or init_to_fresh().",
            UserWarning,
            stacklevel=4,
        )


def warn_if_collapsed(mean_kernel: float) -> bool:
    """Warn, to the caller of SVGD's step, of particles that don't interact.

    Args:
        mean_kernel: Mean kernel value between different particles.

    Returns:
        Whether it warned.
    """
    if mean_kernel >= COLLAPSED:
        return False
    warnings.warn(
        f"The kernel has collapsed: its mean value between different particles is "
        f"{mean_kernel:.2g}, so they don't repel and are independent runs. Use "
        "bandwidth=None (the median heuristic) or a larger bandwidth.",
        UserWarning,
        stacklevel=4,  # past SVGD's update and step
    )
    return True


def warn_if_stuck(direction: Mapping[str, Tensor]) -> bool:
    """Warn, to the caller of SVGD's step, of particles that nothing moves.

    Args:
        direction: Site -> (K, ...).

    Returns:
        Whether it warned.
    """
    stuck = (_largest(direction).amax(0) == 0).nonzero().flatten().tolist()
    if not stuck:
        return False
    warnings.warn(
        f"Particle(s) {stuck} are stuck: their direction is exactly 0 at all sites. "
        "The log joint is flat there, or its gradient underflows. Start elsewhere, or "
        "use float32.",
        UserWarning,
        stacklevel=4,  # past SVGD's update and step
    )
    return True


def _largest(values: Mapping[str, Tensor]) -> Tensor:
    """Largest magnitudes, (sites, K); NaN where there is a NaN."""
    return torch.stack(
        [
            torch.linalg.vector_norm(x.reshape(len(x), -1), math.inf, dim=1).double()
            for x in values.values()
        ]
    )
