"""What a pass over the data sums, in memory and in a folder to resume from.

The folder's tensors are named by what they are: ``factors/0/a``, ``factors/0/g`` and
``factors/0/count`` of the first layer, ``score/<site>/0`` its gradient,
``log_likelihood``, and ``random/cpu``, the generator's state. Query and value have the
same inputs, so that ``factors/1/a`` is only said to be ``factors/0/a``. Rows of a
Jacobian, which aren't summed, are written as they come, each once, into folders of
their own: ``rows-5`` has those of the sixth batch and of some after it. What is read
must be sums that this fit could have come to, and the batches that were done are known
by their digests, so that going on gives what one run would have, bit for bit. Of
several ranks the first writes the sums over all; it goes on from them, and each rank,
of however many, with the batches that nobody has done.
"""

from __future__ import annotations

import functools
import hashlib
import operator
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
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
    ObservedFactors,
    RowFactors,
    RowSample,
)
from pyro_lora.curvature.saved_observations import (
    ObservationsDescription,
    describe_observations,
    restore_observations,
)
from pyro_lora.ground.checked_tensors import (
    DOUBLE,
    FLOAT32,
    CheckedTensors,
    check_definite,
)
from pyro_lora.ground.ranks import Ranks, is_first
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

_FACTORS = (KroneckerFactors, DiagonalFactors, DenseFactors, RowSample, RowFactors)
_FIELDS = {kind.__name__: kind.__annotations__.keys() for kind in _FACTORS}
_Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]
_WIDE = (torch.float32, torch.float64)
OBSERVED = -1  # the place of what was observed, not of a layer


class SavedSums(Schema):
    """The fields of a fit's manifest."""

    fit: str
    batches: Annotated[tuple[_Digest, ...], msgspec.Meta(min_length=1)]
    num_data: Annotated[int, msgspec.Meta(ge=1, le=2**53)]
    random: tuple[str, ...]
    factors: Literal[
        "KroneckerFactors", "DiagonalFactors", "DenseFactors", "RowSample", "RowFactors"
    ]
    fields: tuple[str, ...]
    num_factors: Count
    shared: dict[str, str]
    layers: dict[str, Count]
    rows: tuple[Count, ...] = ()  # the batches with which their folders start


class SavedBatch(Schema):
    """What isn't summed of a batch."""

    num_rows: Count
    observed: tuple[ObservationsDescription, ...]


class SavedRows(Schema):
    """The fields of the manifest of some batches' rows."""

    fit: str
    batches: tuple[SavedBatch, ...]


FORMAT = Format("pyro_lora fit", 3, "Start anew.", SavedSums)
ROWS = Format("pyro_lora rows of a fit", 1, "Start anew.", SavedRows)
_GROWING = (RowFactors, ObservedFactors)
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

    @property
    def num_rows(self) -> int:
        """Rows of the Jacobian that are kept."""
        rows = self.factors.get(0)
        return sum(map(len, rows.batches)) if isinstance(rows, RowFactors) else 0

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


def over_ranks(
    ranks: Ranks, own: DataSums | None, device: torch.device, keep: bool = False
) -> DataSums:
    """The sums over the batches of all ranks, layer by layer.

    Args:
        ranks: Who has some.
        own: Over this rank's batches; None if it has none yet, as another has.
        device: Where they are.
        keep: Whether they are still needed; else what they sum to takes their place.

    Returns:
        On all ranks the same.
    """
    if ranks.size == 1:
        assert own is not None
        return own
    forms = ranks.collected(None if own is None else _form(own))
    given = [form for form in forms if form is not None]
    like, _ = given[0]
    places = _Places(ranks, device, keep)
    factors = {}
    for i, (kind, fields) in like["factors"].items():
        factor = None if own is None else own.factors.get(i)
        if fields is None:  # rows, and what was observed at them
            of_each = [x for x in ranks.collected(factor) if x is not None]
            factors[i] = functools.reduce(operator.add, of_each)
            continue
        # Layers share a sum of inputs where they do so on all ranks.
        key = tuple(of_rank.get(i) for _, of_rank in given)
        factors[i] = kind(
            **{
                name: places.summed((key, name) if name == "a" else None, x, form)
                for name, form in fields.items()
                for x in [None if factor is None else getattr(factor, name)]
            }
        )
    score = {
        site: [
            places.summed(None, None if own is None else own.score[site][i], form)
            for i, form in enumerate(layers)
        ]
        for site, layers in like["score"].items()
    }
    log_p = None if own is None else own.log_likelihood
    return DataSums(
        factors,
        score,
        places.summed(None, log_p, like["log_likelihood"]),
        ranks.total(0 if own is None else own.num_data),
    )


@dataclass(eq=False)
class _Places:
    """Sums over ranks of tensors that layers may share."""

    ranks: Ranks
    device: torch.device
    keep: bool
    shared: dict[Any, Tensor] = field(default_factory=dict)
    used: set[Tensor] = field(default_factory=set)

    def summed(self, key: Any, x: Tensor | None, form: Tensor) -> Tensor:
        """The sum; that of a key only once.

        Args:
            key: What layers share it by; None is nothing.
            x: This rank's part, None if it has none.
            form: An empty one like it, on the meta device.
        """
        if key is not None and key in self.shared:
            return self.shared[key]
        if x is None:
            x = torch.zeros_like(form, device=self.device)
        elif self.keep or x in self.used:  # shared here, but not on another rank
            x = x.clone()
        if key is not None:
            self.used.add(x)
        total = self.ranks.sum(x)
        if key is not None:
            self.shared[key] = total
        return total


def _form(sums: DataSums) -> tuple[dict[str, Any], dict[int, int]]:
    """Kinds and shapes of sums; and place -> the first that has the same inputs."""
    first: dict[Tensor, int] = {}
    same = {
        i: first.setdefault(factor.a, i)
        for i, factor in sums.factors.items()
        if isinstance(factor, KroneckerFactors)
    }
    factors = {
        i: (
            type(factor),
            None
            if isinstance(factor, RowFactors | RowSample | ObservedFactors)
            else {name: x.to("meta") for name, x in vars(factor).items()},
        )
        for i, factor in sums.factors.items()
    }
    score = {s: [x.to("meta") for x in layers] for s, layers in sums.score.items()}
    like = {
        "factors": factors,
        "score": score,
        "log_likelihood": sums.log_likelihood.to("meta"),
    }
    return like, same


@dataclass(frozen=True, eq=False)
class PassState:
    """How far a pass over the data has come.

    Attributes:
        sums: Over the batches done.
        batches: The digest of each batch done.
        random: The random generators' states after them, by device.
        folder: Where it was read.
    """

    sums: DataSums
    batches: tuple[str, ...]
    random: Mapping[str, Tensor]
    folder: Path

    def check(self, num_found: int) -> None:
        """Check that the batches given again are those that were done.

        Args:
            num_found: How many of these there are among those given.

        Raises:
            ValueError: If they aren't.
        """
        if num_found != len(self.batches):
            raise ValueError(
                f"{self.folder} has the sums over {len(self.batches)} batches, of "
                f"which {num_found} are among those given now. Give the same batches "
                "in the same order (shuffle=False), or delete it to start anew."
            )

    def check_any(self, num_found: int) -> None:
        """Check that the first of the batches given is one of those that were done."""
        if num_found == 0:
            self.check(0)

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
            forms = [_kind(f) for f in (old, new) if f is not None]
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
    _rows: list[int] = field(default_factory=list, init=False)  # as SavedSums has them
    _num_saved: int = field(default=0, init=False)  # batches whose rows are there
    _num_own: int = field(default=0, init=False)  # this rank's among them

    def read(self) -> PassState | None:
        """The state last written, or None; the first rank's to go on from.

        Raises:
            ValueError: If the folder is damaged, or another fit's.
        """
        if not is_first() or not (self.folder / MANIFEST).exists():
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
        # Of rows that are projected there are two, whatever the layers.
        rows = saved.factors == "RowFactors"
        num_factors = saved.num_factors if rows else 1 if joint else len(layers)
        kind: Any = next(kind for kind in _FACTORS if kind.__name__ == saved.factors)
        if saved.num_factors != num_factors or {*saved.fields} != {
            *_FIELDS[saved.factors]
        }:
            raise ValueError(f"{saved.num_factors} {saved.factors} of {saved.fields}")
        size = sum(shape.numel() for shape in map(torch.Size, layers))
        factors: dict[int, Any] = {}
        if not rows:
            for i, shape in enumerate([(size, size)] if joint else layers):
                inner = checked.under(f"factors/{i}/")
                factors[i] = kind(**_factor(inner, saved.factors, shape))
        if saved.rows:
            factors |= self._read_rows(saved, saved.num_factors if rows else 0)
        score = {
            site: [
                _score(checked, f"score/{site}/{i}", shape[1:]) for i in range(shape[0])
            ]
            for site, shape in self.shapes.items()
        }
        log_likelihood = checked.real("log_likelihood", (), (torch.float64,))
        sums = DataSums(factors, score, log_likelihood, saved.num_data)
        return PassState(sums, saved.batches, random, self.folder)

    def _read_rows(self, saved: SavedSums, num_places: int) -> dict[int, Any]:
        """What isn't summed, of all batches done.

        Raises:
            ValueError: If it isn't there as the state has it.
        """
        rows: dict[int, list[Tensor]] = {i: [] for i in range(num_places)}
        observed: list[Any] = []
        for first, stop in zip(
            saved.rows, (*saved.rows[1:], len(saved.batches)), strict=True
        ):
            folder = self._rows_folder(first)
            manifest, tensors = read_folder(folder, ROWS, torch.device("cpu"))
            own = manifest.content
            if own.fit != self.fit or len(own.batches) != stop - first:
                raise ValueError(
                    f"{folder} doesn't hold the rows of batches {first} to {stop - 1}"
                )
            checked = CheckedTensors({k: x.to(self.device) for k, x in tensors.items()})
            sizes = [batch.num_rows for batch in own.batches]
            for i in rows:
                x = checked.real(f"rows/{i}", None, _WIDE)
                if x.ndim != 2 or len(x) != sum(sizes):
                    raise ValueError(
                        f"tensor rows/{i} in {folder} has shape {tuple(x.shape)}, "
                        f"expected ({sum(sizes)}, ...)"
                    )
                rows[i] += x.split(sizes)
            observed += [
                restore_observations(batch.observed, checked.under(f"observed/{n}/"))
                for n, batch in enumerate(own.batches)
                if batch.observed
            ]
        self._rows = list(saved.rows)
        self._num_saved = self._num_own = len(saved.batches)
        found: dict[int, Any] = {i: RowFactors(tuple(x)) for i, x in rows.items()}
        if observed:
            found[OBSERVED] = ObservedFactors(tuple(observed))
        return found

    def _write_rows(self, new: Mapping[int, Any]) -> None:
        """Write what isn't summed of the batches since the last write."""
        rows = [x.batches for i, x in new.items() if i != OBSERVED]
        tensors = {
            f"rows/{i}": torch.cat(x.batches) for i, x in new.items() if i != OBSERVED
        }
        num_batches = len(next(iter(new.values())).batches)
        batches: list[dict[str, Any]] = [
            {"num_rows": len(rows[0][n]) if rows else 0, "observed": []}
            for n in range(num_batches)
        ]
        for n, outcomes in enumerate(new[OBSERVED].batches if OBSERVED in new else ()):
            described = describe_observations(outcomes, f"observed/{n}/")
            batches[n]["observed"] = described[0]
            tensors |= described[1]
        folder = self._rows_folder(self._num_saved)
        write_folder(folder, ROWS, {"fit": self.fit, "batches": batches}, tensors)
        self._rows.append(self._num_saved)
        self._num_saved += num_batches

    def _rows_folder(self, first: int) -> Path:
        return self.folder / f"rows-{first}"

    def write(
        self, ranks: Ranks, own: DataSums | None, batches: Sequence[str], ready: bool
    ) -> None:
        """Write the state, unless the last write is so recent that it would cost.

        A crash leaves the old state or the new one.

        Args:
            ranks: All of which come here; the first process decides, and writes.
            own: Over this rank's batches done, None if there are none yet.
            batches: Digests of these.
            ready: Whether there is something new.
        """
        started = time.monotonic()
        if not ranks.first_says(ready and started >= self._resting_until):
            return
        new: dict[int, Any] = {}  # since the last write, of what isn't summed
        if own is not None:
            rest = {i: x for i, x in own.factors.items() if not isinstance(x, _GROWING)}
            new = {
                i: type(x)(x.batches[self._num_own :])
                for i, x in own.factors.items()
                if isinstance(x, _GROWING)
            }
            own = replace(own, factors=rest)
            self._num_own = len(batches)
        sums = over_ranks(ranks, own, self.device, keep=True)
        of_all = ranks.collected(list(batches))
        for of_rank in ranks.collected(new)[1:]:
            new = {i: new[i] + x if i in new else x for i, x in of_rank.items()} or new
        if not is_first():
            return
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random[str(self.device)] = torch.cuda.get_rng_state(self.device)
        tensors = {f"random/{device}": state for device, state in random.items()}
        tensors["log_likelihood"] = sums.log_likelihood
        # Before the state that says so: a crash leaves rows that nobody asks for.
        if any(x.batches for x in new.values()):  # else all were done before
            self._write_rows(new)
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
        places = {**sums.factors, **new}
        header = {
            "fit": self.fit,
            "batches": [digest for of_rank in of_all for digest in of_rank],
            "num_data": sums.num_data,
            "random": list(random),
            "factors": type(places[0]).__name__,
            "fields": list(vars(places[0])),
            "num_factors": sum(place != OBSERVED for place in places),
            "shared": shared,
            "layers": {site: len(layers) for site, layers in sums.score.items()},
            "rows": self._rows,
        }
        write_folder(self.folder, FORMAT, header, tensors)
        now = time.monotonic()
        self._resting_until = now + _REST * (now - started)

    def delete(self) -> None:
        """Remove the folder, once the fit is done."""
        if not is_first():
            return
        delete_folder(self.folder)  # the state first, which needs the rows
        for rows in self.folder.glob("rows-*"):
            delete_folder(rows)
        with suppress(OSError):  # it's gone, or there is something else in it
            self.folder.rmdir()


@dataclass(eq=False)
class PassLog:
    """Which batches of a pass are done, by a checkpoint where there is one.

    Attributes:
        checkpoint: None where nothing is written or read.
        ranks: Who shares the batches.
        before: What was read, on the first rank.
    """

    checkpoint: PassCheckpoint | None
    ranks: Ranks
    before: PassState | None = field(default=None, init=False)
    _done: list[str] = field(default_factory=list, init=False)
    _to_find: Counter[str] = field(default_factory=Counter, init=False)
    _num_found: int = field(default=0, init=False)
    _skips: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.checkpoint is None:
            return
        self.before = self.checkpoint.read()
        self._skips = self.before is not None
        self._done = [] if self.before is None else list(self.before.batches)
        # Whoever did them, they are done: another rank may be given them now.
        self._to_find = Counter(self.ranks.of_first(self._done))

    def is_done(self, batch: Mapping[str, Any]) -> bool:
        """Whether a batch is in the sums that were read; if not it will be now.

        Raises:
            ValueError: If it is the first of all, and isn't in them.
        """
        if self.checkpoint is None:
            return False
        digest = batch_digest(batch)
        if self._to_find[digest]:
            self._to_find[digest] -= 1
            self._num_found += 1
            return True
        if self.before is not None:
            self.before.check_any(self._num_found)
        self.go_on()
        self._done.append(digest)
        return False

    def go_on(self) -> None:
        """Draw what was due when the state was written."""
        if self._skips and self.before is not None:
            self.before.restore_random_state()
        self._skips = False

    def write(self, sums: DataSums | None) -> None:
        """Write the sums so far, over this rank's batches."""
        if self.checkpoint is not None:
            self.checkpoint.write(self.ranks, sums, self._done, not self._skips)

    def check(self) -> None:
        """Check at the end that all batches that were done were given again."""
        self.go_on()
        num_found = self.ranks.total(self._num_found)
        if self.before is not None:
            self.before.check(num_found)


def _kind(factor: Any) -> Any:
    """What factors that add up have in common."""
    if isinstance(factor, ObservedFactors):
        return ObservedFactors
    if isinstance(factor, RowFactors):
        return RowFactors, factor.batches[-1].shape[1:], factor.batches[-1].dtype
    shapes = {name: (x.shape, x.dtype) for name, x in vars(factor).items()}
    if isinstance(factor, RowSample):  # some rows or more
        shapes = {name: (shape[1:], dtype) for name, (shape, dtype) in shapes.items()}
    return type(factor), list(shapes.items())


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
    if kind == "RowSample":
        keys = tensors.not_negative("keys", None, DOUBLE)
        if keys.ndim != 1:
            raise ValueError(f"tensor {tensors.prefix}keys has shape {keys.shape}")
        values = tensors.real("values", (len(keys), out * width), dtypes)
        return {"values": values, "keys": keys, "size": tensors.any("size")}
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


def batch_digest(batch: Mapping[str, Any]) -> str:
    """Digest of a batch's values, by which it is known again."""
    sha = hashlib.sha256()
    for name in sorted(batch):
        update(sha, name)
        update(sha, batch[name])
    return sha.hexdigest()[:16]


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
