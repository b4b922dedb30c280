"""What the trunk makes of each datum, kept from one step to the next."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pyro_lora.lifting.interrupts import undone
from pyro_lora.lifting.settings import check_lora, check_number, check_path
from pyro_lora.lifting.unfinished import aside

if TYPE_CHECKING:
    from pyro_lora.lifting.lifted_network import LiftedNetwork

GIGABYTE = 1e9
_NAME = "rows"  # of the only tensor in a file


@contextmanager
def cached_trunk(
    lora: LiftedNetwork,
    *,
    max_gigabytes: float = 1.0,
    folder: str | Path | None = None,
) -> Iterator[None]:
    """Keep what the layers below the first adapted one make of each datum.

    Within the block, a call with several particles runs these layers only where it
    sees a datum that is new: with adapters on the last l of L layers, later epochs cost
    about l / L. A datum is known by its inputs, padding included, so that batches may
    be shuffled, but should be padded to one length. A change of the frozen weights
    below the adapter is noticed. The numbers are those without a cache.

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


class TrunkCache:
    """Rows of hidden states by the inputs that they come from.

    Args:
        max_bytes: Memory for rows; those beyond it go to files.
        folder: Of the files.
    """

    def __init__(self, max_bytes: int, folder: Path) -> None:
        self._room = max_bytes
        self._folder = folder
        self._in_memory: dict[bytes, Tensor] = {}
        # Where a row is, and a digest of it: files may be altered by others.
        self._on_disk: dict[bytes, tuple[Path, int, bytes]] = {}
        self._device = "cpu"

    def get(self, keys: Sequence[bytes]) -> Tensor | None:
        """The rows (B, ...) of these keys; None if one isn't there.

        Raises:
            ValueError: If a file was altered.
        """
        rows = []
        for key in keys:
            row = self._in_memory.get(key)
            if row is None and key in self._on_disk:
                row = self._read(*self._on_disk[key])
            if row is None:
                return None
            rows.append(row)
        return torch.stack(rows)

    def put(self, keys: Sequence[bytes], rows: Tensor) -> None:
        """Keep the rows (B, ...) of these keys, constants from now on."""
        new: dict[bytes, int] = {}
        for i, key in enumerate(keys):
            if key not in self._in_memory and key not in self._on_disk:
                new[key] = i
        if not new:
            return
        kept = rows.detach()[torch.tensor(list(new.values()), device=rows.device)]
        size = kept.numel() * kept.element_size()
        if size <= self._room:
            self._room -= size
            self._in_memory.update(zip(new, kept, strict=True))
            return
        self._device = str(kept.device)
        path = self._folder / f"{len(self._on_disk)}.safetensors"
        save_file({_NAME: kept}, path)
        digests = [_row_digest(row) for row in kept.cpu()]
        self._on_disk.update({key: (path, i, digests[i]) for i, key in enumerate(new)})

    def _read(self, path: Path, place: int, digest: bytes) -> Tensor:
        try:
            with safe_open(path, "pt") as file:
                row: Tensor = file.get_slice(_NAME)[place : place + 1][0]
            whole = _row_digest(row) == digest
        except (SafetensorError, OSError, IndexError, RuntimeError) as error:
            raise ValueError(
                f"{path}, which the trunk's cache wrote, can't be read: {error}. Leave "
                "the files in its folder alone."
            ) from error
        if not whole:
            raise ValueError(
                f"{path}, which the trunk's cache wrote, was altered. Leave the files "
                "in its folder alone."
            )
        return row.to(self._device)


def _row_digest(row: Tensor) -> bytes:
    """Of a row on the CPU, its dtype and shape included."""
    form = f"{row.dtype}{tuple(row.shape)}".encode()
    flat = row.contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(flat.tobytes(), key=form[:64], digest_size=16).digest()


def row_keys(inputs: Mapping[Any, Any], batch_size: int, state: Any) -> list[bytes]:
    """A digest for each row of a batch, of all that a frozen network makes of it.

    Args:
        inputs: The network's inputs, by name; of particles one copy.
        batch_size: B; tensors with another first dim belong to every row.
        state: What else the outputs depend on.

    Returns:
        B digests.
    """
    common = hashlib.blake2b(repr(state).encode(), digest_size=16)
    by_row = []
    for name, value in inputs.items():
        common.update(repr(name).encode())
        if not isinstance(value, Tensor):
            common.update(repr(value).encode())
            continue
        common.update(f"{value.dtype}{tuple(value.shape[1:])}".encode())
        flat = value.detach().contiguous().reshape(value.shape[0], -1)
        rows = flat.view(torch.uint8).cpu().numpy()
        if len(rows) == batch_size:
            by_row.append(rows)
        else:
            common.update(rows.tobytes())
    keys = []
    for i in range(batch_size):
        digest = common.copy()
        for rows in by_row:
            digest.update(rows[i].tobytes())
        keys.append(digest.digest())
    return keys


def versions(tensors: Iterable[Tensor]) -> tuple[tuple[int, int], ...]:
    """What changes when one of the tensors does."""
    return tuple((x.data_ptr(), x._version) for x in tensors)
