"""What a pass over the data sums, in memory and in a folder to resume from.

The folder's tensors are named by what they are: ``factors/0/a``, ``factors/0/g`` and
``factors/0/count`` of the first layer, ``score/<site>/0`` its gradient,
``log_likelihood``, and ``random/cpu``, the generator's state. Query and value have the
same inputs, so that ``factors/1/a`` is only said to be ``factors/0/a``. What is read
must be sums that this fit could have come to, and the batches that were done are known
by a digest, so that going on gives what one run would have, bit for bit.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch
from torch import Tensor

from pyro_lora.curvature.digests import update
from pyro_lora.curvature.factors import (
    DenseFactors,
    DiagonalFactors,
    KroneckerFactors,
)
from pyro_lora.ground.checked_tensors import FLOAT32, CheckedTensors, check_definite
from pyro_lora.ground.tensor_folder import (
    MANIFEST,
    Count,
    Format,
    Manifest,
    Schema,
    delete_folder,
    read_folder,
    write_folder,
)
from pyro_lora.lifting.fingerprint import Fingerprint
from pyro_lora.likelihood.model_trace import Model

_FACTORS = (KroneckerFactors, DiagonalFactors, DenseFactors)
_FIELDS = {kind.__name__: kind.__annotations__.keys() for kind in _FACTORS}


class SavedSums(Schema):
    """The fields of a fit's manifest."""

    fit: str
    num_batches: Annotated[int, msgspec.Meta(ge=1, le=2**53)]
    num_data: Annotated[int, msgspec.Meta(ge=1, le=2**53)]
    digest: str
    random: tuple[str, ...]
    factors: Literal["KroneckerFactors", "DiagonalFactors", "DenseFactors"]
    fields: tuple[str, ...]
    num_factors: Count
    shared: dict[str, str]
    layers: dict[str, Count]


FORMAT = Format("pyro_lora fit", 2, "Start anew.", SavedSums)
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
                a = shared.get(
                    (old.a, new.a)
                )  # by identity: one sum for all that share
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
        folder: Where it was read.
    """

    sums: DataSums
    num_batches: int
    digest: str
    random: Mapping[str, Tensor]
    folder: Path

    def check(self, num_batches: int, digest: str) -> None:
        """Check that the batches given again are those that were done.

        Args:
            num_batches: Batches skipped.
            digest: Of these.

        Raises:
            ValueError: If they aren't.
        """
        if (num_batches, digest) != (self.num_batches, self.digest):
            raise ValueError(
                f"{self.folder} has the sums over {self.num_batches} batches, which "
                f"aren't the first {num_batches} of those given now. Give the same "
                "batches in the same order (shuffle=False), or delete it to start anew."
            )

    def check_score(self, score: Mapping[str, Sequence[Tensor]]) -> None:
        """Check that a batch's gradient adds to the one that was read.

        Args:
            score: Site -> gradients of its layers.

        Raises:
            ValueError: If it's of other shapes.
        """
        for site, layers in score.items():
            for old, new in zip(self.sums.score[site], layers, strict=True):
                if old.shape != new.shape:
                    raise ValueError(
                        f"{self.folder} has a gradient of shape {tuple(old.shape)} at "
                        f"site {site!r}, not {tuple(new.shape)}. Delete it to start "
                        "anew."
                    )

    def check_factors(self, layers: Mapping[int, Any]) -> None:
        """Check that a batch's factors add to those that were read.

        Args:
            layers: Place -> factors.

        Raises:
            ValueError: If they're of another structure.
        """
        for i, new in layers.items():
            old = self.sums.factors.get(i)
            forms = [
                (type(f), [(n, x.shape, x.dtype) for n, x in vars(f).items()])
                for f in (old, new)
                if f is not None
            ]
            if len(forms) != 2 or forms[0] != forms[1]:
                raise ValueError(
                    f"{self.folder} has other factors than this fit: {forms}. Delete "
                    "it to start anew."
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
        shapes: Site -> shape of its stack of layers, of all sites.
    """

    folder: Path
    fit: str
    device: torch.device
    shapes: Mapping[str, tuple[int, ...]]
    _resting_until: float = field(default=0.0, init=False)

    def read(self) -> PassState | None:
        """The state last written, or None.

        Raises:
            ValueError: If the folder is damaged, or another fit's.
        """
        if not (self.folder / MANIFEST).exists():
            return None

        def check(manifest: Manifest) -> None:
            if manifest.content.fit != self.fit:
                raise ValueError(
                    f"{self.folder} is of another fit: of another mode, structure, "
                    "Fisher, obs site, network or model. Give another checkpoint."
                )

        try:
            manifest, tensors = read_folder(
                self.folder, FORMAT, torch.device("cpu"), check
            )
            try:
                return self._state(manifest.content, tensors)
            except ValueError as error:
                raise ValueError(f"{manifest.file}: {error}.") from error
        except ValueError as error:
            raise ValueError(
                f"{error} Or delete {self.folder} to start anew."
            ) from error

    def _state(self, saved: SavedSums, tensors: dict[str, Tensor]) -> PassState:
        """What was read, if these can be the sums of this fit.

        Raises:
            ValueError: If they can't.
        """
        random = {
            device: _generator(
                tensors.pop(f"random/{device}", None), device, self.device
            )
            for device in saved.random
        }
        if "cpu" not in random:
            raise ValueError("the generator's state is missing")
        # Generators' states stay on the CPU, sums go where the fit adds to them.
        tensors = {name: x.to(self.device) for name, x in tensors.items()}
        for name, first in saved.shared.items():
            if first not in tensors or name in tensors:
                raise ValueError(f"shared: {name!r:.80} can't share {first!r:.80}")
            tensors[name] = tensors[first]
        checked = CheckedTensors(tensors)
        layers = [shape[1:] for shape in self.shapes.values() for _ in range(shape[0])]
        expected = {site: shape[0] for site, shape in self.shapes.items()}
        if saved.layers != expected:
            raise ValueError(f"layers are {saved.layers}, expected {expected}")
        joint = saved.factors == "DenseFactors"
        num_factors = 1 if joint else len(layers)
        kind = next(kind for kind in _FACTORS if kind.__name__ == saved.factors)
        if saved.num_factors != num_factors or {*saved.fields} != {
            *_FIELDS[saved.factors]
        }:
            raise ValueError(f"{saved.num_factors} {saved.factors} of {saved.fields}")
        size = sum(shape.numel() for shape in map(torch.Size, layers))
        factors = {
            i: kind(**_factor(checked.under(f"factors/{i}/"), saved.factors, shape))
            for i, shape in enumerate([(size, size)] if joint else layers)
        }
        score = {
            site: [
                _score(checked, f"score/{site}/{i}", shape[1:]) for i in range(shape[0])
            ]
            for site, shape in self.shapes.items()
        }
        log_likelihood = checked.real("log_likelihood", (), (torch.float64,))
        sums = DataSums(factors, score, log_likelihood, saved.num_data)
        return PassState(sums, saved.num_batches, saved.digest, random, self.folder)

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


def _generator(state: Tensor | None, device: str, sums: torch.device) -> Tensor:
    """The state of a device's generator, once it's seen to be one.

    Raises:
        ValueError: If it isn't.
    """
    is_used = device in ("cpu", str(sums))
    if state is None or not is_used or state.dtype != torch.uint8 or state.ndim != 1:
        raise ValueError(f"the generator's state of {device!r:.80} is missing or none")
    try:
        torch.Generator("cpu" if device == "cpu" else sums).set_state(state)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"the generator's state of {device!r}: {error}") from error
    return state


def _factor(
    tensors: CheckedTensors, kind: str, shape: tuple[int, ...]
) -> dict[str, Tensor]:
    """The fields of one layer's factors, or of all layers'.

    Raises:
        ValueError: If they aren't sums of squares or outer products of its size.
    """
    dtypes = (torch.float32, torch.float64)
    out, width = (*shape, 1)[:2]  # a bias is a matrix of one column
    if kind == "DiagonalFactors":
        return {"diagonal": tensors.not_negative("diagonal", (out, width), dtypes)}
    if kind == "DenseFactors":
        return {"matrix": _gram(tensors, "matrix", out)}
    count = tensors.not_negative("count", (), dtypes)
    return {
        "a": _gram(tensors, "a", width),
        "g": _gram(tensors, "g", out),
        "count": count,
    }


def _gram(tensors: CheckedTensors, name: str, width: int) -> Tensor:
    """A Gram matrix (n, n), or the sketch (n, 2 k + 1) of one.

    Raises:
        ValueError: If it's neither.
    """
    x = tensors.real(name, None, (torch.float32, torch.float64))
    if x.shape == (width, width):
        check_definite(x, f"tensor {tensors.prefix}{name}", FLOAT32)
        # As the eigenvalues' own check, which doesn't know of the file.
        if not (
            (x - x.mT).abs() <= torch.finfo(x.dtype).eps ** 0.5 * x.abs().max()
        ).all():
            raise ValueError(f"tensor {tensors.prefix}{name} isn't symmetric")
        return x
    # An odd number of columns, fewer than rows: see nystrom.
    sketch = x.ndim == 2 and x.shape[0] == width and x.shape[1] < width
    if not sketch or x.shape[1] % 2 == 0:
        raise ValueError(
            f"tensor {tensors.prefix}{name} has shape {tuple(x.shape)}, expected "
            f"({width}, {width}) or ({width}, 2 k + 1)"
        )
    return x


def _score(tensors: CheckedTensors, name: str, shape: tuple[int, ...]) -> Tensor:
    """The gradient of one layer; that of a bias may be a column.

    Raises:
        ValueError: If it's something else.
    """
    x = tensors.real(name)
    if x.numel() != torch.Size(shape).numel():
        raise ValueError(f"tensor {name} has shape {tuple(x.shape)}, expected {shape}")
    return x


def batch_digest(digest: str, batch: Mapping[str, Any]) -> str:
    """Digest of all batches so far, given that of those before this one."""
    sha = hashlib.sha256(digest.encode())
    for name in sorted(batch):
        update(sha, name)
        update(sha, batch[name])
    return sha.hexdigest()


def fit_digest(
    mode: Mapping[str, Tensor],
    settings: Sequence[Any],
    networks: Sequence[Fingerprint],
    model: Model,
) -> str:
    """What tells one fit from another.

    Args:
        mode: Site -> value.
        settings: Functions, with what they close over, and names.
        networks: What the networks are.
        model: The Pyro model, likewise a function with what it closes over.
    """
    sha = hashlib.sha256()
    for value in (dict(mode), settings, networks, model):
        update(sha, value)
    return sha.hexdigest()
