"""Which width of the prior the data speak for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pyro_lora.export.plots.axes import COLORS, QUIET, axes_or_new
from pyro_lora.posteriors.posterior import Posterior, as_posterior, only_gaussian

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

_DECADES = torch.linspace(-1, 1, 61, dtype=torch.float64)


def evidence(posterior: Posterior, ax: Axes | None = None) -> Axes:
    r"""Log evidence against the scale of a Normal prior, one scale for all weights.

    The maximum is marked: the scale that ``optimize_prior(per="all")`` finds, to the
    grid's 8%. Two decades around it are shown.

    Args:
        posterior: A Laplace posterior; its own prior precision doesn't matter.
        ax: Axes to draw on; None makes a figure.

    Returns:
        The axes.

    Raises:
        TypeError: If the posterior is of another kind.
    """
    gaussian = only_gaussian(as_posterior(posterior))
    if gaussian is None:
        raise TypeError(
            "plots.evidence needs a LaplacePosterior, found a "
            f"{type(posterior).__name__}, which has no evidence. Of a mixture, draw "
            "each of .components."
        )

    def log_evidence(log_scales: Tensor) -> Tensor:
        posteriors = (
            gaussian.with_prior_precision(10 ** float(-2 * x)) for x in log_scales
        )
        return torch.stack([p.log_evidence().cpu() for p in posteriors])

    ax = axes_or_new(ax)
    coarse = 3 * _DECADES[::2]
    log_scales = coarse[log_evidence(coarse).argmax()] + _DECADES
    values = log_evidence(log_scales)
    best = int(values.argmax())
    scale, top = float(10 ** log_scales[best]), float(values[best])
    ax.plot((10**log_scales).tolist(), values.tolist(), color=COLORS[0])
    ax.plot([scale], [top], marker="o", color=COLORS[1])
    ax.axvline(scale, color=QUIET, linewidth=1, linestyle="--", zorder=0)
    # Narrow priors lose far more than wide ones: by the wide side, so that the
    # maximum isn't flattened.
    fall = max(top - float(values[best:].min()), 1.0)
    ax.set(
        xscale="log",
        xlabel=r"prior scale $1/\sqrt{\tau}$",
        ylabel="log evidence (nats)",
        ylim=(top - 1.2 * fall, top + 0.2 * fall),
    )
    ax.annotate(
        f"{scale:.2g}",
        (scale, top),
        xytext=(6, 6),
        textcoords="offset points",
        color=COLORS[1],
    )
    return ax
