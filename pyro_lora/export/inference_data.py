"""A tree -> the ``InferenceData`` of ArviZ before version 1."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xarray import DataTree


def to_inference_data(tree: DataTree) -> Any:
    """The same groups as ``arviz.InferenceData``, for ArviZ before version 1.

    From 1 on, ArviZ takes the tree as it is.

    Args:
        tree: What :func:`pyro_lora.to_datatree` gave.

    Returns:
        An ``arviz.InferenceData``.

    Raises:
        ImportError: If ArviZ before version 1 isn't installed.
    """
    try:
        arviz = import_module("arviz")
    except ImportError as error:
        raise ImportError(
            "to_inference_data needs ArviZ before version 1: pip install 'arviz<1'"
        ) from error
    if not hasattr(arviz, "InferenceData"):
        raise ImportError(
            f"ArviZ {arviz.__version__} has no InferenceData: its functions take the "
            "tree of to_datatree as it is."
        )
    groups = {name: child.to_dataset() for name, child in tree.children.items()}
    return arviz.InferenceData(**groups)
