"""What a pass over the data sums, in memory and in a folder to resume from.

The folder's tensors are named by what they are: ``factors/0/a``, ``factors/0/g`` and
``factors/0/count`` of the first layer, ``score/<site>/0`` its gradient,
``log_likelihood``, and ``random/cpu``, the generator's state. Query and value have the
same inputs, so that ``factors/1/a`` is only said to be ``factors/0/a``. Rows of a
Jacobian, which grow, are written as they come, each once, into folders of their own:
in ``rows-5`` are those of the sixth batch and of some after it, ``factors/0/0`` and so
on. What is read must be sums that this fit could have come to, as their kinds say
(``factors``), and the batches that were done are known by their digests, so that going
on gives what one run would have, bit for bit. Of several ranks the first writes the
sums over all; it goes on from them, and each rank, of however many, with the batches
that nobody has done.
"""

from __future__ import annotations

import functools
import hashlib
import math
import operator
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

from pyro_lora.curvature.factors import AnyFactors, kind_named, name_of
from pyro_lora.ground.checked_tensors import CheckedTensors
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
from pyro_lora.lifting.digests import update
from pyro_lora.lifting.fingerprint import Fingerprint
from pyro_lora.likelihood.model_trace import Model

_Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]
OBSERVED = -1  # the place of what was observed, not of a layer


class SavedSums(Schema):
    """The fields of a fit's manifest."""

    fit: str
    batches: Annotated[tuple[_Digest, ...], msgspec.Meta(min_length=1)]
    num_data: Annotated[int, msgspec.Meta(ge=1, le=2**53)]
    num_rows: Count
    random: tuple[str, ...]
    factors: dict[str, str]  # place -> kind
    shared: dict[str, str]
    layers: dict[str, Count]
    rows: tuple[Count, ...] = ()  # the batches with which their folders start


class SavedRows(Schema):
    """The fields of the manifest of some batches' rows."""

    fit: str


FORMAT = Format("pyro_lora fit", 4, "Start anew.", SavedSums)
ROWS = Format("pyro_lora rows of a fit", 2, "Start anew.", SavedRows)
_REST = 20  # so long, in units of the last write, that writing costs 5 % at most


@dataclass(frozen=True, eq=False)
class DataSums:
    """What adds up over batches.

    Attributes:
        factors: By place: one for each layer of each site, or one for all (dense).
            Layers may share a tensor, such as the product of inputs that they share.
        score: Site -> gradient of the log likelihood, (O, I) for each layer.
        log_likelihood: Nats, float64.
        num_data: Data seen.
        num_rows: Rows of the Jacobian of these.
    """

    factors: dict[int, Any]
    score: dict[str, list[Tensor]]
    log_likelihood: Tensor
    num_data: int
    num_rows: int = 0

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
            self.num_rows + other.num_rows,
        )

    def add_factors(self, layers: Mapping[int, AnyFactors]) -> None:
        """Add a batch's factors of some layers, in place: there is one copy of each.

        Args:
            layers: Place -> factors. Tensors that layers share here and in the sums
                stay shared.
        """
        # By identity: what is added here was all there before, so that no id is that of
        # another that has gone meanwhile.
        sums: dict[tuple[int, int], Tensor] = {}

        def add(x: Tensor, y: Tensor) -> Tensor:
            key = id(x), id(y)
            if key not in sums:
                sums[key] = x + y
            return sums[key]

        for i, new in layers.items():
            old = self.factors.get(i)
            self.factors[i] = new if old is None else old.plus(new, add)

    def named(self) -> dict[str, Tensor]:
        """Its tensors, but those that grow, by what they are."""
        factors = {
            f"factors/{i}/{name}": x
            for i, kept in self.factors.items()
            if not kept.grows
            for name, x in kept.tensors.items()
        }
        score = {
            f"score/{site}/{i}": x
            for site, layers in self.score.items()
            for i, x in enumerate(layers)
        }
        return {**factors, **score, "log_likelihood": self.log_likelihood}


def over_ranks(
    ranks: Ranks, own: DataSums | None, device: torch.device, keep: bool = False
) -> DataSums:
    """The sums over the batches of all ranks, layer by layer.

    Args:
        ranks: Who has some.
        own: Over this rank's batches; None if it has none yet, as another has.
        device: Where they are.
        keep: Whether they are still needed, and what they sum to is for the first
            process's files: there on the CPU, on others without values, so that none
            holds all of it beside them. Else it takes their place.

    Returns:
        On all ranks the same.
    """
    if ranks.size == 1:
        assert own is not None
        return own
    forms = ranks.collected(None if own is None else _Form.of(own))
    given = [form for form in forms if form is not None]
    like = given[0]
    named = {} if own is None else own.named()
    # Tensors that are one on all ranks have one sum.
    keys = {name: tuple(x.first.get(name) for x in given) for name in like.tensors}
    names = {key: name for name, key in keys.items()}  # of each key any
    # What is one here, but not on another rank, goes into several sums.
    times = Counter(named.get(name) for name in names.values())
    by_key: dict[tuple[str | None, ...], Tensor] = {}
    for key, name in names.items():
        x = named.get(name)
        if x is None:
            shape, dtype = like.tensors[name]
            x = torch.zeros(shape, dtype=dtype, device=device)
        elif keep or times[x] > 1:
            x = x.clone()
        by_key[key] = ranks.sum(x)
        if keep:
            by_key[key] = by_key[key].to("cpu" if is_first() else "meta")
    sums = {name: by_key[key] for name, key in keys.items()}
    factors: dict[int, Any] = {}
    for i, (kind, fields) in like.factors.items():
        if kind.by_tensor:
            values = {name: sums[f"factors/{i}/{name}"] for name in fields}
            factors[i] = kind(**values)
        else:
            of_ranks = ranks.collected(None if own is None else own.factors.get(i))
            there = [factor for factor in of_ranks if factor is not None]
            factors[i] = functools.reduce(operator.add, there)
    return DataSums(
        factors,
        {
            site: [sums[f"score/{site}/{i}"] for i in range(num_layers)]
            for site, num_layers in like.score.items()
        },
        sums["log_likelihood"],
        ranks.total(0 if own is None else own.num_data),
        ranks.total(0 if own is None else own.num_rows),
    )


@dataclass(frozen=True)
class _Form:
    """What sums are like, for a rank that has none.

    Attributes:
        factors: Place -> kind, and its fields.
        score: Site -> number of layers.
        tensors: Name -> shape and dtype, of those that add up one by one.
        first: Name -> the first that is the same tensor.
    """

    factors: dict[int, tuple[type[AnyFactors], tuple[str, ...]]]
    score: dict[str, int]
    tensors: dict[str, tuple[torch.Size, torch.dtype]]
    first: dict[str, str]

    @classmethod
    def of(cls, sums: DataSums) -> _Form:
        """That of some sums."""
        kept = {i: x for i, x in sums.factors.items() if x.by_tensor}
        named = replace(sums, factors=kept).named()
        first: dict[Tensor, str] = {}
        return cls(
            {i: (type(x), tuple(vars(x))) for i, x in sums.factors.items()},
            {site: len(layers) for site, layers in sums.score.items()},
            {name: (x.shape, x.dtype) for name, x in named.items()},
            {name: first.setdefault(x, name) for name, x in named.items()},
        )


@dataclass(frozen=True, eq=False)
class PassState:
    """How far a pass over the data has come.

    Attributes:
        sums: Over the batches done.
        batches: The digest of each batch done.
        random: The random generators' states after them, "cpu" and perhaps "cuda".
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

    @cached_property
    def _forms(self) -> dict[int, Any]:
        """Of what was read, not of what is added to it."""
        return {i: _form(x) for i, x in self.sums.factors.items()}

    def check_factors(self, layers: Mapping[int, AnyFactors]) -> None:
        """Check that a batch's factors add to those that were read.

        Args:
            layers: Place -> factors.

        Raises:
            ValueError: If they're of another structure.
        """
        for i, new in layers.items():
            old, form = self._forms.get(i), _form(new)
            if old != form:
                raise ValueError(
                    f"{self.folder} has other factors than this fit: {old}, not "
                    f"{form}. Delete it to start anew."
                )

    def restore_random_state(self) -> None:
        """Set the generators, so that the next labels drawn are those that were due."""
        torch.set_rng_state(self.random["cpu"])
        if "cuda" in self.random:
            device = self.sums.log_likelihood.device
            torch.cuda.set_rng_state(self.random["cuda"], device)


@dataclass
class PassCheckpoint:
    """A folder for one pass, in the form of ``tensor_folder``.

    Attributes:
        folder: Where.
        fit: Tells this fit from others.
        device: Where the sums live.
        shapes: Site -> shape of its stack of layers, of all sites.
        reads: Whether this process goes on from what is there; the first one writes.
    """

    folder: Path
    fit: str
    device: torch.device
    shapes: Mapping[str, tuple[int, ...]]
    reads: bool
    _resting_until: float = field(default=0.0, init=False)
    _rows: list[int] = field(default_factory=list, init=False)  # as SavedSums has them
    _num_saved: int = field(default=0, init=False)  # batches that are there
    _num_own: int = field(default=0, init=False)  # this rank's among them

    def read(self) -> PassState | None:
        """The state last written, or None; to go on from for those who read.

        Raises:
            ValueError: If the folder is damaged, or another fit's.
        """
        if not self.reads or not (self.folder / MANIFEST).exists():
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
            kind: _generator(state, kind, self.device)
            for kind in saved.random
            for state in [tensors.pop(f"random/{kind}", None)]
            if kind in ("cpu", self.device.type)  # else the fit has moved
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
        expected = {site: shape[0] for site, shape in self.shapes.items()}
        if saved.layers != expected:
            raise ValueError(f"layers are {saved.layers}, expected {expected}")
        kinds = {int(i): _known(name) for i, name in saved.factors.items()}
        growing = {i: kind for i, kind in kinds.items() if kind.grows}
        number = len(kinds.keys() - {OBSERVED})
        if kinds.keys() - {OBSERVED} != {*range(number)}:
            raise ValueError(f"factors are at {[*kinds]!r:.80}")
        # One for each layer, or each is of all weights.
        layers = [shape[1:] for shape in self.shapes.values() for _ in range(shape[0])]
        if number != len(layers):
            layers = [(sum(map(math.prod, layers)),)] * number
        factors = {
            i: kind.restored(checked.under(f"factors/{i}/"), layers[i])
            for i, kind in kinds.items()
            if not kind.grows
        }
        ends = (*saved.rows[1:], len(saved.batches))
        for start, stop in zip(saved.rows, ends, strict=False):
            for i, new in self._read_rows(start, stop, growing).items():
                factors[i] = factors[i] + new if i in factors else new
        if factors.keys() != kinds.keys():
            raise ValueError("the folders of rows are missing")
        self._rows = list(saved.rows)
        self._num_saved = self._num_own = len(saved.batches)
        score = {
            site: [
                _score(checked, f"score/{site}/{i}", shape[1:]) for i in range(shape[0])
            ]
            for site, shape in self.shapes.items()
        }
        log_likelihood = checked.real("log_likelihood", (), (torch.float64,))
        sums = DataSums(factors, score, log_likelihood, saved.num_data, saved.num_rows)
        return PassState(sums, saved.batches, random, self.folder)

    def _read_rows(
        self, first: int, stop: int, kinds: Mapping[int, type[AnyFactors]]
    ) -> dict[int, Any]:
        """What has grown by some batches.

        Raises:
            ValueError: If it isn't there as the state has it.
        """
        folder = self._rows_folder(first)
        manifest, tensors = read_folder(folder, ROWS, torch.device("cpu"))
        checked = CheckedTensors({k: x.to(self.device) for k, x in tensors.items()})
        rows: dict[int, Any] = {
            i: kind.restored(checked.under(f"factors/{i}/"), ())
            for i, kind in kinds.items()
        }
        numbers = {len(x.batches) for x in rows.values()}
        sizes = {tuple(map(len, x.batches)) for i, x in rows.items() if i != OBSERVED}
        is_ours = manifest.content.fit == self.fit and len(sizes) < 2
        if not is_ours or numbers != {stop - first}:
            raise ValueError(
                f"{folder} doesn't hold the rows of batches {first} to {stop - 1}"
            )
        return rows

    def _rows_folder(self, first: int) -> Path:
        return self.folder / f"rows-{first}"

    def write(
        self,
        ranks: Ranks,
        own: DataSums | None,
        batches: Sequence[str],
        ready: bool,
        at_once: bool = False,
    ) -> None:
        """Write the state, unless the last write is so recent that it would cost.

        A crash leaves the old state or the new one.

        Args:
            ranks: All of which come here; the first process decides, and writes.
            own: Over this rank's batches done, None if there are none yet.
            batches: Digests of these.
            ready: Whether there is something new.
            at_once: Whether it has to be written, whatever it costs.
        """
        started = time.monotonic()
        is_time = at_once or started >= self._resting_until
        if not ranks.first_says(ready and is_time):
            return
        if own is not None:
            new = {  # since the last write, of what grows
                i: replace(x, batches=x.batches[self._num_own :]) if x.grows else x
                for i, x in own.factors.items()
            }
            own = replace(own, factors=new)
            self._num_own = len(batches)
        sums = over_ranks(ranks, own, self.device, keep=True)
        of_all = [digest for x in ranks.collected(list(batches)) for digest in x]
        if not is_first():
            return
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        tensors = {f"random/{kind}": state for kind, state in random.items()}
        shared: dict[str, str] = {}
        names: dict[Tensor, str] = {}
        for name, x in sums.named().items():
            if x in names:
                shared[name] = names[x]
            else:
                names[x], tensors[name] = name, x
        rows = {  # new ones
            f"factors/{i}/{name}": x
            for i, kept in sums.factors.items()
            if kept.grows
            for name, x in kept.tensors.items()
        }
        # Before the state that says so: a crash leaves rows that nobody asks for.
        if rows:  # else all were done before
            folder = self._rows_folder(self._num_saved)
            write_folder(folder, ROWS, {"fit": self.fit}, rows)
            self._rows.append(self._num_saved)
        self._num_saved = len(of_all)
        header = {
            "fit": self.fit,
            "batches": of_all,
            "num_data": sums.num_data,
            "num_rows": sums.num_rows,
            "random": list(random),
            "factors": {str(i): name_of(type(x)) for i, x in sums.factors.items()},
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

    def write(self, sums: DataSums | None, at_once: bool = False) -> None:
        """Write the sums so far over this rank's batches, perhaps at any cost."""
        if self.checkpoint is not None:
            ready = not self._skips
            self.checkpoint.write(self.ranks, sums, self._done, ready, at_once)

    def check(self) -> None:
        """Check at the end that all batches that were done were given again."""
        self.go_on()
        num_found = self.ranks.total(self._num_found)
        if self.before is not None:
            self.before.check(num_found)


def _form(factors: AnyFactors) -> Any:
    """What factors that add up have in common, shapes and dtypes but of rows."""
    kind = type(factors).__name__
    if factors.by_tensor:
        return kind, {name: (x.shape, x.dtype) for name, x in factors.tensors.items()}
    return kind, {(x.shape[1:], x.dtype) for x in factors.tensors.values()}


def _known(name: str) -> type[AnyFactors]:
    """The kind of factors of that name.

    Raises:
        ValueError: If there is none.
    """
    kind = kind_named(name)
    if kind is None:
        raise ValueError(
            f"nothing is known of factors called {name!r:.80}; import what defines them"
        )
    return kind


def _generator(state: Tensor | None, kind: str, device: torch.device) -> Tensor:
    """The state of a generator, once it's seen to be one.

    Args:
        state: What was read.
        kind: "cpu", or that of the sums' device.
        device: The sums'.

    Raises:
        ValueError: If it isn't.
    """
    if state is None or state.dtype != torch.uint8 or state.ndim != 1:
        raise ValueError(f"the generator's state of {kind!r} is missing or none")
    try:
        torch.Generator("cpu" if kind == "cpu" else device).set_state(state)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"the generator's state of {kind!r}: {error}") from error
    return state


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
