"""What a pass over the data sums, in memory and in a file to resume from."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_lora.curvature.structures import (
    DenseFactors,
    DiagonalFactors,
    KroneckerFactors,
)
from pyro_lora.curvature.tensor_folder import (
    MANIFEST,
    Format,
    delete_folder,
    read_manifest,
    read_tensors,
    write_folder,
)

FORMAT = Format("pyro_lora fit", 1, "Start anew.")
_FACTORS = (KroneckerFactors, DiagonalFactors, DenseFactors)
_REST = 20  # so long, in units of the last write, that writing costs 5 % at most


@dataclass(frozen=True, eq=False)
class DataSums:
    """What adds up over batches.

    Attributes:
        factors: One for each layer of each site, or one for all (dense). Layers with
            the same inputs may share the tensor of their input factor.
        score: Site -> gradient of the log likelihood, (O, I) for each layer.
        log_likelihood: Nats, float64.
        num_data: Data seen.
    """

    factors: dict[int, Any]
    score: dict[str, list[Tensor]]
    log_likelihood: Tensor
    num_data: int

    def plus_rest(self, other: DataSums) -> DataSums:
        """The sums of all but the factors, which stay."""
        return DataSums(
            self.factors,
            {
                site: [a + b for a, b in zip(layers, other.score[site], strict=True)]
                for site, layers in self.score.items()
            },
            self.log_likelihood + other.log_likelihood,
            self.num_data + other.num_data,
        )

    def add_factors(self, layers: Mapping[int, Any]) -> None:
        """Add a batch's factors of some layers, in place: there is one copy of each.

        Args:
            layers: Place -> factors. An input factor that layers share here and in the
                sums stays shared.
        """
        shared: dict[tuple[Tensor, Tensor], Tensor] = {}
        for i, new in layers.items():
            old = self.factors.get(i)
            if old is None:
                self.factors[i] = new
            elif isinstance(old, KroneckerFactors):
                a = shared.get((old.a, new.a))
                if a is None:
                    a = shared[old.a, new.a] = old.a + new.a
                self.factors[i] = KroneckerFactors(
                    a, old.g + new.g, old.count + new.count
                )
            else:
                self.factors[i] = old + new


@dataclass(frozen=True, eq=False)
class PassState:
    """How far a pass over the data has come.

    Attributes:
        sums: Over the batches done.
        num_batches: Batches done.
        digest: Of these batches' values, in order.
        random: The random generators' states after them, by device.
    """

    sums: DataSums
    num_batches: int
    digest: str
    random: Mapping[str, Tensor]

    def check(self, num_batches: int, digest: str, folder: Path) -> None:
        """Check that the batches given again are those that were done.

        Args:
            num_batches: Batches skipped.
            digest: Of these.
            folder: Where the state was read.

        Raises:
            ValueError: If they aren't.
        """
        if (num_batches, digest) != (self.num_batches, self.digest):
            raise ValueError(
                f"{folder} has the sums over {self.num_batches} batches, which aren't "
                f"the first {num_batches} of those given now. Give the same batches in "
                "the same order (shuffle=False), or delete it to start anew."
            )

    def restore_random_state(self) -> None:
        """Set the generators, so that the next labels drawn are those that were due."""
        for device, state in self.random.items():
            if device == "cpu":
                torch.set_rng_state(state)
            else:
                torch.cuda.set_rng_state(state, device)


@dataclass
class PassCheckpoint:
    """A folder for one pass, in the form of ``tensor_folder``.

    Attributes:
        folder: Where.
        fit: Tells this fit from others.
        device: Where the sums live.
    """

    folder: Path
    fit: str
    device: torch.device
    _resting_until: float = field(default=0.0, init=False)

    def read(self) -> PassState | None:
        """The state last written, or None.

        Raises:
            ValueError: If the folder is damaged, or another fit's.
        """
        if not (self.folder / MANIFEST).exists():
            return None
        try:
            header = read_manifest(self.folder, FORMAT)
            if header["fit"] != self.fit:
                raise ValueError(
                    f"{self.folder} is of another fit: of another mode, structure, "
                    "Fisher or obs site. Give another checkpoint."
                )
            tensors = read_tensors(self.folder, FORMAT, header, torch.device("cpu"))
        except ValueError as error:
            raise ValueError(
                f"{error} Or delete {self.folder} to start anew."
            ) from error
        random = {d: tensors.pop(f"random/{d}") for d in header["random"]}
        tensors = {name: x.to(self.device) for name, x in tensors.items()}
        tensors |= {name: tensors[first] for name, first in header["shared"].items()}
        (kind,) = (kind for kind in _FACTORS if kind.__name__ == header["factors"])
        factors = {
            i: kind(**{n: tensors[f"factors/{i}/{n}"] for n in header["fields"]})
            for i in range(header["num_factors"])
        }
        score = {
            site: [tensors[f"score/{site}/{i}"] for i in range(num_layers)]
            for site, num_layers in header["layers"].items()
        }
        sums = DataSums(factors, score, tensors["log_likelihood"], header["num_data"])
        return PassState(sums, header["num_batches"], header["digest"], random)

    def write(self, sums: DataSums, num_batches: int, digest: str) -> None:
        """Write the state, unless the last write is so recent that it would cost.

        A crash leaves the old state or the new one.

        Args:
            sums: Over the batches done.
            num_batches: Batches done.
            digest: Of these.
        """
        started = time.monotonic()
        if started < self._resting_until:
            return
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random[str(self.device)] = torch.cuda.get_rng_state(self.device)
        tensors = {f"random/{device}": state for device, state in random.items()}
        tensors["log_likelihood"] = sums.log_likelihood
        shared: dict[str, str] = {}
        names: dict[Tensor, str] = {}
        for i, factor in sums.factors.items():
            for field_name, x in vars(factor).items():
                name = f"factors/{i}/{field_name}"
                if x in names:
                    shared[name] = names[x]
                else:
                    names[x], tensors[name] = name, x
        for site, layers in sums.score.items():
            tensors |= {f"score/{site}/{i}": x for i, x in enumerate(layers)}
        header = {
            "fit": self.fit,
            "num_batches": num_batches,
            "num_data": sums.num_data,
            "digest": digest,
            "random": list(random),
            "factors": type(sums.factors[0]).__name__,
            "fields": list(vars(sums.factors[0])),
            "num_factors": len(sums.factors),
            "shared": shared,
            "layers": {site: len(layers) for site, layers in sums.score.items()},
        }
        write_folder(self.folder, FORMAT, header, tensors)
        now = time.monotonic()
        self._resting_until = now + _REST * (now - started)

    def delete(self) -> None:
        """Remove the folder, once the fit is done."""
        delete_folder(self.folder)


def batch_digest(digest: str, batch: Mapping[str, Any]) -> str:
    """Digest of all batches so far, given that of those before this one."""
    found = hashlib.sha256(digest.encode())
    for name in sorted(batch):
        _update(found, name, batch[name])
    return found.hexdigest()


def fit_digest(mode: Mapping[str, Tensor], settings: Sequence[Any]) -> str:
    """What tells one fit from another: the mode, and functions and names."""
    found = hashlib.sha256(repr([_described(x) for x in settings]).encode())
    for site, value in mode.items():
        _update(found, site, value)
    return found.hexdigest()


def _update(found: Any, name: str, value: object) -> None:
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(flat.view(torch.uint8).numpy())
    elif isinstance(value, str | int | float | bool | None):
        found.update(f"{name} {value!r}".encode())


def _described(setting: str | Callable[..., Any] | None) -> object:
    if isinstance(setting, functools.partial):
        return _described(setting.func), setting.args, sorted(setting.keywords.items())
    if setting is None or isinstance(setting, str):
        return setting
    named = setting if isinstance(setting, type(_described)) else type(setting)
    return f"{named.__module__}.{named.__qualname__}"
