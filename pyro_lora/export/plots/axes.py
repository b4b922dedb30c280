"""What the figures have in common: colours and lines, and axes to draw on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito's colours: told apart with any colour vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINE_STYLES = ("-", "--", "-.", ":")
QUIET = "0.6"  # the grey of what there is to compare with


def axes_or_new(ax: Axes | None, size: tuple[float, float] = (5, 4)) -> Axes:
    """The axes, or those of a new figure.

    Args:
        ax: Axes, or None.
        size: The new figure's width and height, inches.

    Raises:
        ImportError: If matplotlib isn't installed.
    """
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "pyro_lora.plots needs matplotlib: pip install 'pyro-lora[plots]'"
        ) from error
    return plt.subplots(figsize=size, layout="constrained")[1]


def check_predictions(predictions: Mapping[str, Any], caller: str) -> None:
    """Refuse to draw nothing.

    Args:
        predictions: Name -> prediction.
        caller: The figure's name.

    Raises:
        ValueError: If there is none.
    """
    if not predictions:
        raise ValueError(f"plots.{caller} got no predictions; give at least one.")
