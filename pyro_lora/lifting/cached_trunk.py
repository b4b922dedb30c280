"""Keeping what the trunk makes of each datum, from one step to the next."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyro_lora.ground.interrupts import undone
from pyro_lora.ground.settings import check_number, check_path
from pyro_lora.ground.unfinished import aside
from pyro_lora.lifting.lifted_network import LiftedNetwork, check_lora
from pyro_lora.lifting.trunk import TrunkCache

GIGABYTE = 1e9


@contextmanager
def cached_trunk(
    lora: LiftedNetwork,
    *,
    max_gigabytes: float = 1.0,
    folder: str | Path | None = None,
) -> Iterator[None]:
    """Keep what the layers below the first adapted one make of each datum.

    Within the block, a call with one set of weights or with several particles runs
    these layers only where it sees a datum that is new: with adapters on the last l of
    L layers, later epochs cost about l / L. A datum is known by its inputs, padding
    included, so that batches may be shuffled, but should be padded to one length. A
    change of the frozen weights below the adapter is noticed. The numbers are those
    without a cache. What one set of weights without gradients meets in a network that
    has never been run with gradients, or by particles, isn't kept.

    Args:
        lora: The lifted network; its trunk must be in evaluation mode.
        max_gigabytes: Memory for the cache (1e9 bytes), on the network's device: T
            times the hidden size for each datum. The rest goes to files.
        folder: Where to put these (safetensors); None is the system's place for
            temporary files. They are deleted after the block; what a killed process
            left there, by the next one.

    Yields:
        Nothing.

    Raises:
        ValueError: If there is no such layer, or ``max_gigabytes`` is negative; and
            from a call in the block, if a trunk layer is in training mode, so that its
            dropout may draw anew, or gives more than one tensor.

    >>> import torch, pyro_lora as pl
    >>> from torch import nn
    >>> lora = pl.lift(nn.Linear(2, 1))
    >>> with pl.cached_trunk(lora):
    ...     pass
    Traceback (most recent call last):
    ValueError: There is no trunk to cache: no stack of layers begins below the ...
    """
    check_number("max_gigabytes", max_gigabytes, 0)
    check_path("folder", folder)
    check_lora(lora)
    trunk = lora.trunk
    trunk.check_cacheable()
    before = trunk.cache

    def put_back() -> None:
        trunk.cache = before

    with aside(Path(tempfile.gettempdir() if folder is None else folder)) as files:
        with undone(put_back):
            trunk.cache = TrunkCache(int(max_gigabytes * GIGABYTE), files)
            yield
