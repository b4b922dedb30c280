"""Whether predicted probabilities can be believed, against the labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_lora.export.plots.axes import (
    COLORS,
    LINE_STYLES,
    MARKERS,
    QUIET,
    axes_or_new,
    named_predictions,
)
from pyro_lora.predict.metrics import NUM_BINS, selective_accuracies
from pyro_lora.predict.prediction import Prediction
from pyro_lora.predict.token_prediction import TokenPrediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OfClasses = Prediction | TokenPrediction
_KINDS = (Prediction, TokenPrediction)

_BAND = 1.959964  # normal quantile of a central 95%
_MAX_WITHHELD = 0.95  # accuracies of fewer data than that leaves are noise


def reliability(
    predictions: OfClasses | Mapping[str, OfClasses], ax: Axes | None = None
) -> Axes:
    r"""Accuracy against confidence, in bins of equal width, with 95% bands.

    A marker's area grows with the share of the data in its bin, and a bin without
    data has none. Markers below the diagonal are over-confident. The band is Wilson's
    interval of the accuracy p in a bin of n data, :math:`\frac{p + z^2 / 2n}{1 + z^2 /
    n} \pm \frac{z}{1 + z^2 / n} \sqrt{p (1 - p) / n + z^2 / 4 n^2}` (Wilson 1927).

    Args:
        predictions: A prediction with labels, or name -> prediction.
        ax: Axes to draw on; None makes a figure.

    Returns:
        The axes.

    Raises:
        TypeError: If one isn't of classes.
        ValueError: If there are no predictions, or one has no labels.
    """
    several = named_predictions(predictions, "reliability", _KINDS)
    ax = axes_or_new(ax)
    ax.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle="--", zorder=0)
    smallest = 1.0
    for index, (name, prediction) in enumerate(several.items()):
        color = COLORS[index % len(COLORS)]
        ece = prediction.metrics()["ece"]
        confidence, accuracy, count = _bins(prediction)
        low, high = _wilson(accuracy, count)
        x, y = confidence.tolist(), accuracy.tolist()
        smallest = min(smallest, *x)
        ax.plot(
            x,
            y,
            color=color,
            linewidth=1.2,
            label=f"{name}, ECE {ece:.3f}",
            marker=MARKERS[index % len(MARKERS)],
            markersize=4,
        )
        areas = (600 * count / count.sum()).tolist()
        ax.scatter(x, y, s=areas, color=color, alpha=0.25, linewidths=0)
        ax.fill_between(
            x, low.tolist(), high.tolist(), color=color, alpha=0.1, linewidth=0
        )
    ax.set(
        xlabel="confidence (mean probability of the predicted class)",
        ylabel="accuracy",
        xlim=(max(0.0, smallest - 0.05), 1.03),
        ylim=(-0.03, 1.03),
    )
    ax.legend(loc="best", frameon=False)
    return ax


def rejection(
    predictions: OfClasses | Mapping[str, OfClasses], ax: Axes | None = None
) -> Axes:
    """Accuracy of the answers that are left where the least confident are withheld.

    The curves start at the accuracy of all answers, and should rise. They end where 5%
    are left. Of data with the same confidence any may be withheld first: the curve is
    the mean over their orders. AURC is the error rate averaged over each curve.

    Args:
        predictions: A prediction with labels, or name -> prediction.
        ax: Axes to draw on; None makes a figure.

    Returns:
        The axes.

    Raises:
        TypeError: If one isn't of classes.
        ValueError: If there are no predictions, or one has no labels.
    """
    several = named_predictions(predictions, "rejection", _KINDS)
    ax = axes_or_new(ax)
    for index, (name, prediction) in enumerate(several.items()):
        aurc = prediction.metrics()["aurc"]
        accuracy = selective_accuracies(*_confidence_and_correct(prediction))
        num_kept = torch.arange(1, len(accuracy) + 1, dtype=torch.float64)
        withheld = 1 - num_kept / len(accuracy)
        shown = withheld <= _MAX_WITHHELD
        ax.plot(
            withheld[shown].tolist(),
            accuracy.cpu()[shown].tolist(),
            color=COLORS[index % len(COLORS)],
            linestyle=LINE_STYLES[index % len(LINE_STYLES)],
            linewidth=1.5,
            label=f"{name}, AURC {aurc:.3f}",
        )
    ax.set(
        xlabel="share of the answers withheld, least confident first",
        ylabel="accuracy of the rest",
        xlim=(0, 1),
    )
    ax.legend(loc="lower right", frameon=False, fontsize="small")  # below the curves
    return ax


def _bins(prediction: OfClasses) -> tuple[Tensor, Tensor, Tensor]:
    """Mean confidence, accuracy and number of data of each bin that has any."""
    confidence, correct = _confidence_and_correct(prediction)
    index = (confidence * NUM_BINS).long().clamp_max(NUM_BINS - 1)
    empty = confidence.new_zeros(NUM_BINS)
    count = empty.index_add(0, index, torch.ones_like(confidence))
    kept = count > 0
    means = [
        empty.index_add(0, index, x)[kept] / count[kept] for x in (confidence, correct)
    ]
    return means[0], means[1], count[kept]


def _wilson(accuracy: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    z = _BAND
    centre = accuracy + z**2 / (2 * count)
    spread = accuracy * (1 - accuracy) / count + z**2 / (4 * count.square())
    scale = 1 / (1 + z**2 / count)
    return (
        scale * (centre - z * spread.sqrt()),
        scale * (centre + z * spread.sqrt()),
    )


def _confidence_and_correct(prediction: OfClasses) -> tuple[Tensor, Tensor]:
    prediction = prediction.labelled()
    confidence, predicted = prediction.probs.max(-1)
    assert prediction.labels is not None
    return confidence, (predicted == prediction.labels).to(confidence)
