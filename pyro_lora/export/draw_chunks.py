"""One tree of chunks of draws: in memory, or in a zarr store that they are added to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pyro_lora.export.draw_groups import per_draw
from pyro_lora.ground.unfinished import aside

if TYPE_CHECKING:
    from xarray import Dataset, DataTree

Groups = Mapping[str, "Dataset"]


def joined(chunks: Iterable[Groups]) -> DataTree:
    """All chunks as one tree in memory.

    Args:
        chunks: Groups of some draws each, in order.
    """
    from xarray import DataTree, concat

    parts = list(chunks)
    if len(parts) == 1:
        return DataTree.from_dict(dict(parts[0]))
    return DataTree.from_dict(
        {
            name: concat(
                [part[name] for part in parts],
                "draw",
                data_vars="all",
                coords="minimal",
                compat="override",
                join="exact",
                combine_attrs="override",
            )
            if per_draw(name)
            else group
            for name, group in parts[0].items()
        }
    )


def written(chunks: Iterable[Groups], path: Path) -> DataTree:
    """All chunks in a zarr store, one in memory at a time.

    The store has another name until it is whole.

    Args:
        chunks: Groups of some draws each, in order.
        path: The store to make.

    Returns:
        The tree, which reads from the store.

    Raises:
        ValueError: If ``path`` exists.
    """
    from xarray import open_datatree

    if path.exists():
        raise ValueError(f"{path} exists. Name a store that doesn't, or delete it.")
    with aside(path.parent) as unfinished:
        part = unfinished / path.name
        for index, groups in enumerate(chunks):
            for name, group in groups.items():
                if index == 0:
                    group.to_zarr(part, group=name, mode="a", consolidated=False)
                elif per_draw(name):
                    group.to_zarr(
                        part, group=name, append_dim="draw", consolidated=False
                    )
        part.rename(path)
    return open_datatree(path, engine="zarr", consolidated=False)
