"""Predictions as pandas tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from pandas import DataFrame


def data_frame(columns: Mapping[str, Tensor], index: str) -> DataFrame:
    """A table of equally long tensors.

    Args:
        columns: Name -> (N,).
        index: Name of the index, 0 to N - 1.

    Returns:
        A ``pandas.DataFrame``.

    Raises:
        ImportError: If pandas isn't installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError(
            "to_pandas needs pandas: pip install 'pyro-lora[arviz]'"
        ) from error
    arrays = {name: x.cpu().numpy() for name, x in columns.items()}
    size = len(next(iter(arrays.values())))
    return pd.DataFrame(arrays, index=pd.RangeIndex(size, name=index))


class _Numbers(Protocol):
    """Predictions of N numbers, or of P for each of N data."""

    @property
    def mean(self) -> Tensor: ...

    @property
    def variance(self) -> Tensor: ...

    @property
    def noise_variance(self) -> Tensor: ...

    @property
    def weight_variance(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor | None: ...


def table_of_numbers(prediction: _Numbers) -> DataFrame:
    """One row a datum: mean, standard deviations, the label where there is one.

    Args:
        prediction: Of N numbers, or of P outputs, whose columns end in ``_p`` then.

    Returns:
        A ``pandas.DataFrame`` with the index ``datum``.
    """
    columns = {
        "mean": prediction.mean,
        "sd": prediction.variance.sqrt(),
        "noise_sd": prediction.noise_variance.sqrt(),
        "weight_sd": prediction.weight_variance.sqrt(),
    }
    if prediction.labels is not None:
        columns["label"] = prediction.labels
    if prediction.mean.ndim == 2:
        columns = {
            f"{name}_{p}": x
            for name, values in columns.items()
            for p, x in enumerate(values.mT)
        }
    return data_frame(columns, "datum")
