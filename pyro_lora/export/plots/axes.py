"""What the figures have in common: colours and lines, and axes to draw on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pyro_lora.ground.settings import check_kind

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


def named_predictions(
    predictions: Any,
    caller: str,
    kinds: Sequence[type],
    alone: str = "prediction",
) -> dict[str, Any]:
    """Predictions by name, one or several.

    Args:
        predictions: A prediction, or name -> prediction.
        caller: The figure's name.
        kinds: Types that it can be drawn of, as for ``isinstance``.
        alone: The name of a single one.

    Raises:
        TypeError: If there is something else.
        ValueError: If there is none.
    """
    several = predictions if isinstance(predictions, Mapping) else {alone: predictions}
    if not several:
        raise ValueError(f"plots.{caller} got no predictions; give at least one.")
    expected = (
        f"a prediction of classes, {' or '.join(x.__name__ for x in kinds)}, or a "
        "mapping of names to such (of a MultiLabelPrediction its pairs are one)"
    )
    for prediction in several.values():
        check_kind(f"What plots.{caller} draws", prediction, tuple(kinds), expected)
    return dict(several)
