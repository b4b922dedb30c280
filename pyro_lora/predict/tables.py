"""Predictions as pandas tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

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
