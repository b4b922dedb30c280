"""Keeping what the trunk makes of a datum, from one call to the next.

For as long as the user says, :func:`cached_trunk` keeps it of every datum, by a digest
of its inputs. Where the library itself runs a model more than once on a batch, for some
draws after others, around one mode after another, or to look at it before it's used,
:func:`trunk_once` keeps it of that batch.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pyro_lora.ground.interrupts import undone
from pyro_lora.ground.settings import check_number, check_path
from pyro_lora.ground.synchronisation import ask
from pyro_lora.ground.unfinished import aside
from pyro_lora.lifting.lifted_network import LiftedNetwork, check_lora
from pyro_lora.lifting.trunk import Call

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
    change of the frozen weights by PyTorch's operations is noticed; one through
    ``.data`` or NumPy, or of a module's other attributes, isn't. The numbers are those
    without a cache. Where data of a batch may depend on each other, as in networks that
    aren't of transformers, a batch is known as a whole.

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
            dropout may draw anew, gives more than one tensor, or isn't run in order
            for the next layer alone.

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
    if trunk.why_not_cacheable is not None:
        raise ValueError(trunk.why_not_cacheable)
    put_back = partial(setattr, trunk, "cache", trunk.cache)
    with aside(Path(tempfile.gettempdir() if folder is None else folder)) as files:
        with undone(put_back):
            trunk.cache = TrunkCache(int(max_gigabytes * GIGABYTE), files)
            yield


@contextmanager
def trunk_once(
    networks: Iterable[LiftedNetwork], is_read_again: bool = False
) -> Iterator[None]:
    """Run the trunk once for one batch, through which the model goes several times.

    Call by call: what the model changes between two of them stays so. The numbers are
    those of a block without it. A cache that is there already stays.

    Args:
        networks: Those that are called in the block.
        is_read_again: Whether the batch is read more than once, so that one and the
            same tensor may have come to hold another batch.

    Yields:
        Nothing.
    """
    taken = [(lora.trunk, lora.trunk.cache) for lora in networks]
    taken = [(trunk, x) for trunk, x in taken if x is None or x.has_ended]

    def put_back() -> None:
        for trunk, cache in taken:
            trunk.cache = cache

    with undone(put_back):
        for trunk, _ in taken:
            trunk.cache = OneBatch(is_read_again)
        yield


def end_trunk_once(networks: Iterable[LiftedNetwork]) -> None:
    """End what :func:`trunk_once` keeps: another batch comes.

    Args:
        networks: Those of the block, whose later calls go as they would without it.
    """
    for lora in networks:
        if lora.trunk.cache is not None:
            lora.trunk.cache.end_batch()


class OneBatch:
    """What the trunk gave in each call of a model's first run; nothing after others.

    Args:
        is_read_again: See :func:`trunk_once`.
    """

    def __init__(self, is_read_again: bool) -> None:
        self.has_ended = False
        self._is_read_again = is_read_again
        self._kept: dict[int, tuple[_Inputs, Tensor]] = {}

    def key(
        self, call: Call, state: Any, are_apart: bool, is_seen: bool
    ) -> tuple[int, _Inputs] | None:
        """The inputs themselves; None where somebody looks at what layers give."""
        if is_seen:
            return None
        return call.place, _Inputs(call.inputs, state)

    def get(self, key: tuple[int, _Inputs]) -> Tensor | None:
        """The hidden states (B, ...) of the same call with these inputs."""
        place, inputs = key
        if place not in self._kept:
            return None
        first, hidden = self._kept[place]
        if inputs.equals(first, self._is_read_again):
            return hidden
        self.end_batch()  # each comparison waits for the device
        return None

    def put(self, key: tuple[int, _Inputs], hidden: Tensor) -> None:
        """Keep these hidden states."""
        place, inputs = key
        if not self.has_ended:
            self._kept[place] = inputs.kept(), hidden.detach()

    def refuse(self, reason: str) -> None:
        """Keep nothing from now on: nobody has asked for it."""
        self.end_batch()

    def end_batch(self) -> None:
        """Keep nothing from now on."""
        self.has_ended = True
        self._kept.clear()


class _Inputs:
    """A network's inputs, and what else its trunk depends on.

    Args:
        inputs: By name.
        state: The rest.
    """

    def __init__(self, inputs: Mapping[Any, Any], state: Any) -> None:
        self._tensors = {n: x for n, x in inputs.items() if isinstance(x, Tensor)}
        others = {n: repr(x) for n, x in inputs.items() if n not in self._tensors}
        forms = {n: (x.shape, x.dtype, x.device) for n, x in self._tensors.items()}
        self._form = (others, forms, state)
        self._versions = {
            n: None if x.is_inference() else x._version
            for n, x in self._tensors.items()
        }
        self._values: dict[Any, Tensor] = {}

    def equals(self, kept: _Inputs, by_value: bool) -> bool:
        """Whether the trunk makes the same of these as of inputs that were kept.

        Args:
            kept: They.
            by_value: Whether to look into tensors that nothing of PyTorch's has written
                into since.
        """
        if self._form != kept._form:
            return False
        others = [
            (x == kept._values[n]).all()
            for n, x in self._tensors.items()
            if by_value
            or x is not kept._tensors[n]
            or self._versions[n] is None
            or self._versions[n] != kept._versions[n]
        ]
        return not others or bool(ask(torch.stack(others).all()))

    def kept(self) -> _Inputs:
        """Itself, with the values as they are now, whatever is written there later."""
        self._values = {n: x.detach().clone() for n, x in self._tensors.items()}
        return self


_NAME = "rows"  # of the only tensor in a file


class TrunkCache:
    """Rows of hidden states by the inputs that they come from.

    Args:
        max_bytes: Memory for rows; those beyond it go to files.
        folder: Of the files.
    """

    has_ended = False  # it's for as long as the user says

    def __init__(self, max_bytes: int, folder: Path) -> None:
        self._room = max_bytes
        self._folder = folder
        self._in_memory: dict[bytes, Tensor] = {}
        # Where a row is, and a digest of it: files may be altered by others.
        self._on_disk: dict[bytes, tuple[Path, int, bytes]] = {}
        self._device = "cpu"

    def key(
        self, call: Call, state: Any, are_apart: bool, is_seen: bool
    ) -> Sequence[bytes]:
        """A digest for each row, of all rows where they may depend on each other."""
        batch_size = call.fold.batch_size
        keys = row_keys(call.inputs, batch_size, state)
        if are_apart:
            return keys
        whole = b"".join(keys)
        return [
            hashlib.blake2b(whole + str(i).encode(), digest_size=16).digest()
            for i in range(batch_size)
        ]

    def end_batch(self) -> None:
        """Keep all that is there."""

    def refuse(self, reason: str) -> None:
        """Say that nothing can be kept, though it was asked for.

        Raises:
            ValueError: In any case.
        """
        raise ValueError(reason)

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
