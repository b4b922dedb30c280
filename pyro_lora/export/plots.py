"""Figures: calibration, entropy in and out of domain, evidence. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from pyro_lora.infer.laplace_posterior import LaplacePosterior
from pyro_lora.predict.metrics import NUM_BINS
from pyro_lora.predict.prediction import Prediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

# Okabe & Ito's colours: told apart with any colour vision.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DECADES = torch.linspace(-1, 1, 61, dtype=torch.float64)


def reliability(predictions: Mapping[str, Prediction], ax: Axes | None = None) -> Axes:
    """Accuracy against confidence, in bins of equal width.

    A marker's area grows with the share of the data in its bin, and a bin without
    data has none. Markers below the diagonal are over-confident.

    Args:
        predictions: Name -> prediction with labels.
        ax: Axes to draw on; None makes a figure.

    Returns:
        The axes.

    Raises:
        ValueError: If there are no predictions, or one has no labels.
    """
    _check_names(predictions, "reliability")
    ax = _axes(ax)
    ax.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--", zorder=0)
    smallest = 1.0
    for index, (name, prediction) in enumerate(predictions.items()):
        ece = prediction.metrics()["ece"]
        confidence, accuracy, share = _bins(prediction)
        smallest = min(smallest, *confidence)
        ax.plot(
            confidence,
            accuracy,
            color=_COLORS[index % len(_COLORS)],
            linewidth=1.2,
            label=f"{name}, ECE {ece:.3f}",
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=4,
        )
        ax.scatter(
            confidence,
            accuracy,
            s=[600 * x for x in share],
            color=_COLORS[index % len(_COLORS)],
            alpha=0.25,
            linewidths=0,
        )
    ax.set(
        xlabel="confidence (mean probability of the predicted class)",
        ylabel="accuracy",
        xlim=(max(0.0, smallest - 0.05), 1.03),
        ylim=(-0.03, 1.03),
    )
    ax.legend(loc="best", frameon=False)
    return ax


def entropy(
    in_domain: Prediction,
    out_of_domain: Mapping[str, Prediction],
    ax: Axes | None = None,
) -> Axes:
    """Total entropy of each datum, in domain and in other domains, as ECDFs.

    A curve further right belongs to data that the prediction is less sure of.

    Args:
        in_domain: Prediction for data like those trained on.
        out_of_domain: Name -> prediction for other data.
        ax: Axes to draw on; None makes a figure.

    Returns:
        The axes.

    Raises:
        ValueError: If ``out_of_domain`` is empty.
    """
    _check_names(out_of_domain, "entropy")
    ax = _axes(ax)
    curves = {"in domain": in_domain, **out_of_domain}
    for index, (name, prediction) in enumerate(curves.items()):
        ax.ecdf(
            prediction.total_entropy.cpu().numpy(),
            color=_COLORS[index % len(_COLORS)],
            linewidth=2 if index == 0 else 1.5,
            linestyle="-" if index == 0 else ("--", "-.", ":")[index % 3],
            label=name,
        )
    num_classes = in_domain.log_probs.shape[1]
    limit = float(torch.tensor(float(num_classes)).log())
    ax.axvline(limit, color="0.6", linewidth=1)
    ax.text(limit, 0.02, f" log {num_classes}", color="0.4", ha="left", va="bottom")
    ax.set(
        xlabel="entropy of the prediction (nats)",
        ylabel="share of the data with less",
        xlim=(0, 1.1 * limit),
        ylim=(0, 1.02),
    )
    ax.legend(loc="best", frameon=False)
    return ax


def evidence(posterior: LaplacePosterior, ax: Axes | None = None) -> Axes:
    r"""Log evidence against the scale of a Normal prior, one scale for all weights.

    The maximum is marked: the scale that ``optimize_prior(per="all")`` finds, to the
    grid's 8%. Two decades around it are shown.

    Args:
        posterior: A Laplace posterior; its own prior precision doesn't matter.
        ax: Axes to draw on; None makes a figure.

    Returns:
        The axes.
    """

    def log_evidence(log_scales: Tensor) -> Tensor:
        posteriors = (
            posterior.with_prior_precision(10 ** float(-2 * x)) for x in log_scales
        )
        return torch.stack([p.log_evidence().cpu() for p in posteriors])

    ax = _axes(ax)
    coarse = 3 * _DECADES[::2]
    log_scales = coarse[log_evidence(coarse).argmax()] + _DECADES
    values = log_evidence(log_scales)
    best = int(values.argmax())
    scale, top = float(10 ** log_scales[best]), float(values[best])
    ax.plot((10**log_scales).tolist(), values.tolist(), color=_COLORS[0])
    ax.plot([scale], [top], marker="o", color=_COLORS[1])
    ax.axvline(scale, color="0.6", linewidth=1, linestyle="--", zorder=0)
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
        color=_COLORS[1],
    )
    return ax


def _bins(prediction: Prediction) -> tuple[list[float], list[float], list[float]]:
    """Mean confidence, accuracy and share of the data of each bin that has data."""
    confidence, predicted = prediction.probs.max(-1)
    assert prediction.labels is not None  # metrics() has checked it
    correct = (predicted == prediction.labels).to(confidence)
    index = (confidence * NUM_BINS).long().clamp_max(NUM_BINS - 1)
    count = (
        torch.zeros(NUM_BINS)
        .to(confidence)
        .index_add(0, index, torch.ones_like(confidence))
    )
    sums = [
        torch.zeros_like(count).index_add(0, index, x) for x in (confidence, correct)
    ]
    kept = count > 0
    means = [(x[kept] / count[kept]).tolist() for x in sums]
    return means[0], means[1], (count[kept] / count.sum()).tolist()


def _check_names(predictions: Mapping[str, Prediction], caller: str) -> None:
    if not predictions:
        raise ValueError(f"plots.{caller} got no predictions; give at least one.")


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "pyro_lora.plots needs matplotlib: pip install 'pyro-lora[plots]'"
        ) from error
    return plt.subplots(figsize=(5, 4), layout="constrained")[1]
