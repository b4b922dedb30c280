"""What moves the particles of SVGD."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pyro_lora.export.plots.axes import COLORS, axes_or_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NUM_WINDOWS = 25  # of the running mean, side by side


def forces(diagnostics: Mapping[str, Sequence[float]], ax: Axes | None = None) -> Axes:
    """Attraction and repulsion of SVGD's particles over the steps.

    Norms of the two parts of the direction (in function space, of that of the logits),
    thin, with their running means over 1/25 of the steps. Where repulsion is far
    below attraction the particles are as good as independent.

    Args:
        diagnostics: ``SVGD.diagnostics``.
        ax: Axes to draw on; None makes a figure.

    Returns:
        The axes.

    Raises:
        ValueError: If there are no steps.
    """
    names = ("attraction", "repulsion")
    missing = [name for name in names if not diagnostics.get(name)]
    if missing:
        raise ValueError(
            f"plots.forces found no values of {' and '.join(missing)}. Pass the "
            ".diagnostics of an SVGD that has made steps."
        )
    ax = axes_or_new(ax)
    for name, color in zip(names, COLORS, strict=False):
        values = diagnostics[name]
        steps = range(1, len(values) + 1)
        ax.plot(steps, _positive(values), color=color, linewidth=0.6, alpha=0.4)
        ax.plot(
            steps,
            _positive(_running_mean(values)),
            color=color,
            label=name if any(values) else f"{name} (0 throughout)",
        )
    ax.set(xlabel="step", ylabel="norm of the direction", yscale="log")
    ax.legend(loc="best", frameon=False)
    return ax


def _positive(values: Sequence[float]) -> list[float]:
    """A logarithm has no 0: where a gate is shut, there is a gap."""
    return [x if x > 0 else math.nan for x in values]


def _running_mean(values: Sequence[float]) -> list[float]:
    half = len(values) // (2 * _NUM_WINDOWS)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [statistics.fmean(window) for window in windows]
