"""What can go wrong with particles: errors and warnings that say what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_factor
from torch import Tensor

from pyro_lora.ground.warning import warn
from pyro_lora.likelihood.data_plate import data_plate

# The plate of the particles, left of the model's own; Pyro's ELBOs use the same name.
PARTICLE_PLATE = "num_particles_vectorized"
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
        warn(
            f"All {num_particles} particles start at one point, where nothing drives "
            "them apart. Use init_to_adapter(jitter='auto') or init_to_fresh().",
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
    warn(
        f"The kernel has collapsed: its mean value between different particles is "
        f"{mean_kernel:.2g}, so they don't repel and are independent runs. Use "
        "bandwidth=None (the median heuristic) or a larger bandwidth.",
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
    warn(
        f"Particle(s) {stuck} are stuck: their direction is exactly 0 at all sites. "
        "The log joint is flat there, or its gradient underflows. Start elsewhere, or "
        "use float32.",
    )
    return True


class DataCount(Messenger):
    """Counts the data of an epoch, at each observed site: entered for each batch.

    Attributes:
        counts: Site -> data in all batches, in the largest batch, and in the plate.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, tuple[int, int, int]] = {}
        self._seen: set[str] = set()

    def __enter__(self) -> Any:
        self._seen = set()
        return super().__enter__()

    def _pyro_post_sample(self, msg: Any) -> None:
        name = msg["name"]
        is_function = msg["infer"].get("_deterministic", False) or site_is_factor(msg)
        if not msg["is_observed"] or name in self._seen or is_function:
            return
        frames = [f for f in msg["cond_indep_stack"] if f.name != PARTICLE_PLATE]
        if any(frame.vectorized for frame in frames):
            self._seen.add(name)  # chunks of particles run on the same data
            plate = data_plate({**msg, "cond_indep_stack": tuple(frames)})
            size, largest, _ = self.counts.get(name, (0, 0, 0))
            self.counts[name] = (
                size + plate.size,
                max(largest, plate.size),
                plate.full_size,
            )

    def warn_if_not_covered(self, drop_last: bool) -> bool:
        """Warn, to the caller of SVGD's run, if the model's number of data is another.

        Args:
            drop_last: Whether the batches may leave out less than one.

        Returns:
            Whether it warned.
        """
        # A plate that no batch is a part of need not be one of data, beside others.
        parts = {s: x for s, x in self.counts.items() if x[1] < x[2]}
        counts = parts or (self.counts if len(self.counts) == 1 else {})
        for name, (size, largest, full_size) in counts.items():
            left_out = full_size - size
            if left_out == 0 or (drop_last and 0 < left_out < largest):
                continue
            warn(
                f"The batches of an epoch hold {size} data, but the plate of site "
                f"{name!r} says {full_size}, and it's for as many that each batch "
                f"counts: the likelihood weighs {full_size / size:.3g} times what "
                "these data do. Correct num_data in the model's pyro.plate; or, if an "
                "epoch is meant to be another part of the data, go on.",
            )
            return True
        return False


def _largest(values: Mapping[str, Tensor]) -> Tensor:
    """Largest magnitudes, (sites, K); NaN where there is a NaN."""
    return torch.stack(
        [
            torch.linalg.vector_norm(x.reshape(len(x), -1), math.inf, dim=1).double()
            for x in values.values()
        ]
    )
