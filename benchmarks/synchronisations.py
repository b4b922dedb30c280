"""Where a program waits for a GPU, counted on a machine without one.

A GPU runs behind the program that feeds it, until the program asks for a tensor's
value, or for a shape that depends on values. These operations are the same on a CPU,
where nothing waits, and can be counted there.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operations whose result, or whose success, the program has to know before it goes on.
_VALUES = frozenset(
    "_local_scalar_dense _linalg_check_errors _linalg_eigh _unique _unique2 bincount "
    "equal histc is_nonzero linalg_cholesky_ex_check masked_select multinomial nonzero "
    "unique_consecutive unique_dim".split()
)
_INDEXING = frozenset("index index_put index_put_ _index_put_impl_".split())
# Python's own lists and arrays, which no operation makes.
_COPIES = frozenset("tolist numpy __array__".split())
_ROOT = str(Path(__file__).parents[1])
_READ = f"{_ROOT}/pyro_lora/ground/synchronisation.py"  # what for is more of interest


@dataclass
class Counts:
    """What was seen.

    Attributes:
        operations: All that were dispatched, each a launch or none.
        waits: File and line in this repository, and the operation -> how often the
            program would have waited.
        network: Likewise, inside of the networks' own code.
    """

    operations: int = 0
    waits: Counter[str] = field(default_factory=Counter)
    network: Counter[str] = field(default_factory=Counter)

    @property
    def num_waits(self) -> int:
        """How often the program would have waited, but for the networks' own code."""
        return self.waits.total()


@contextmanager
def counted() -> Iterator[Counts]:
    """Count in a block what would wait for a GPU."""
    counts = Counts()
    with _Values(counts), _Copies(counts):
        yield counts


class _Values(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        self._counts.operations += 1
        given = {**dict(enumerate(args)), **(kwargs or {})}
        if (
            name in _VALUES
            or (name in _INDEXING and _has_mask(args[1]))
            or (name == "repeat_interleave" and given.get("output_size") is None)
        ):
            _add(self._counts, name)
        return func(*args, **(kwargs or {}))


class _Copies(TorchFunctionMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _COPIES:
            _add(self._counts, name)
        return func(*args, **(kwargs or {}))


def _has_mask(indices: Any) -> bool:
    return any(
        isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in indices
    )


def _add(counts: Counts, name: str) -> None:
    """Count one, but for an optimiser's number of steps, which is on the CPU."""
    frame: Any = sys._getframe(1)
    inside = counts.waits
    while frame is not None:
        file = frame.f_code.co_filename
        if "/torch/optim/" in file:
            return
        if any(f"/{package}/" in file for package in ("transformers", "peft")):
            inside = counts.network
        installed = "/site-packages/" in file  # in .venv, say, which lies in here
        if file.startswith(_ROOT) and not installed and file not in (__file__, _READ):
            place = f"{file.removeprefix(_ROOT + '/')}:{frame.f_lineno}"
            inside[f"{place} {name}"] += 1
            return
        frame = frame.f_back
    inside[name] += 1
