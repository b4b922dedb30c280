"""How much doubt there is about data like those trained on, and about others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pyro_lora.export.plots.axes import (
    COLORS,
    LINE_STYLES,
    QUIET,
    axes_or_new,
    named_predictions,
)
from pyro_lora.predict.prediction import Prediction, auroc

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROUNDING = 1e-6  # nats, of the difference of two float32 entropies


def entropy(
    in_domain: Prediction,
    out_of_domain: Prediction | Mapping[str, Prediction],
    ax: Axes | None = None,
    *,
    score: Literal["total", "epistemic"] = "total",
) -> Axes:
    """Entropy of each datum, in domain and in other domains, as ECDFs.

    A curve further right belongs to data that the prediction is less sure of. The
    AUROC is how often a datum of that domain has more entropy than one in domain.

    Args:
        in_domain: Prediction for data like those trained on.
        out_of_domain: Prediction for other data, or name -> prediction.
        ax: Axes to draw on; None makes a figure.
        score: ``"total"``, all doubt about the label, or ``"epistemic"``, how far the
            draws disagree.

    Returns:
        The axes.

    Raises:
        TypeError: If one isn't a prediction of one class a datum.
        ValueError: If ``out_of_domain`` is empty, or no datum has epistemic entropy.
    """
    kinds = (Prediction,)
    curves = named_predictions({"in domain": in_domain}, "entropy", kinds)
    curves |= named_predictions(out_of_domain, "entropy", kinds, "out of domain")
    values = {
        name: p.total_entropy if score == "total" else p.epistemic_entropy
        for name, p in curves.items()
    }
    largest = max(float(x.max()) for x in values.values())
    if largest < _ROUNDING:
        raise ValueError(
            f"plots.entropy: no datum has any {score} entropy. A single network, or a "
            "temperature on top, has no epistemic one: use score='total'."
        )
    ax = axes_or_new(ax)
    for index, (name, value) in enumerate(values.items()):
        label = name
        if index > 0:
            label += f", AUROC {auroc(in_domain, curves[name], score):.2f}"
        ax.ecdf(
            value.cpu().numpy(),
            color=COLORS[index % len(COLORS)],
            linewidth=2 if index == 0 else 1.5,
            linestyle=LINE_STYLES[index % len(LINE_STYLES)],
            label=label,
        )
    right = 1.1 * largest
    if score == "total":
        num_classes = in_domain.log_probs.shape[1]
        limit = math.log(num_classes)
        right = 1.1 * limit
        ax.axvline(limit, color=QUIET, linewidth=1)
        ax.text(limit, 0.02, f" log {num_classes}", color="0.4", va="bottom")
    ax.set(
        xlabel=f"{score} entropy (nats)",
        ylabel="share of the data with less",
        xlim=(0, right),
        ylim=(0, 1.02),
    )
    ax.legend(loc="best", frameon=False)
    return ax
