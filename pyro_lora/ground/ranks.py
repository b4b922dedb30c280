"""Processes that work as one: what each owns, and how sums and gathers are done.

Under ``torchrun``, with ``torch.distributed`` initialised, each process is a *rank*.
The rooms above ask for its share and for sums over all of them; alone, a process owns
everything, and a sum or gather over its one rank is what it was given. Of 5 particles
and 2 ranks, for example, rank 0 owns rows 0 and 1 and rank 1 the others, and
``gathered`` puts what they make of them back in that order.

Before anything is sent the ranks *meet*: each says how it is, in three numbers. So an
error of one of them is raised by all, and none waits for another that has failed or is
somewhere else. Passes over data meet at each batch: whoever has fewer waits there.
"""

from __future__ import annotations

import functools
import io
import pickle
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_lora.ground.interrupts import undone

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
B = TypeVar("B", bound=Mapping[str, Any])

Dim = Literal["data", "particles"]
# How a rank is where it meets the others; or it's within a batch.
_READY, _DONE, _FAILED, _WITHIN = range(4)
SAME_START = (
    "Make the network after torch.manual_seed with the same seed on all ranks, or load "
    "the same adapter; and train it the same way."
)
# Of the sums and sums of squares of weights that should be the same on all ranks.
_SAME = 1e-6


@dataclass(frozen=True, eq=False)
class Ranks:
    """The processes that share one piece of work, this one among them.

    Attributes:
        group: Of ``torch.distributed``; None is this process alone.
        meeting: All that work at the same time, this group's ranks and others'.
        within_batches: Whether they may meet while others are done with their batches.
    """

    group: dist.ProcessGroup | None = None
    meeting: dist.ProcessGroup | None = None
    within_batches: bool = False

    @property
    def size(self) -> int:
        """W."""
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        """This process's number among them, from 0."""
        return 0 if self.group is None else self.group.rank()

    def owned(self, number: int) -> range:
        """The rows of so many that are this rank's: contiguous, in the ranks' order."""
        first, last = (number * r // self.size for r in (self.rank, self.rank + 1))
        return range(first, last)

    def over(self, number: int) -> Ranks:
        """Those who share so many rows: each by itself, where some would have none."""
        return self if number >= self.size else ALONE

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all ranks, in float32 or wider; ``x`` may be overwritten."""
        return self.sums([x])[0]

    def sums(self, values: Sequence[Tensor]) -> list[Tensor]:
        """That of each of several, one after another, on all ranks in the same order.

        Args:
            values: Of the same shapes on all ranks; they may be overwritten.
        """
        if self.size == 1:
            return list(values)
        self._meet(f"a sum of {[(x.ndim, _summable(x.dtype)) for x in values]}")
        return [self._summed(x) for x in values]

    def log_sum(self, x: Tensor) -> Tensor:
        """The log of the sum over all ranks of exp(x), with what is largest taken out.

        Args:
            x: Of the same shape on all ranks.
        """
        if self.size == 1:
            return x
        self._meet(f"a log sum of {x.ndim} dims, {x.dtype}")
        # -inf less -inf would be NaN
        largest = self._summed(x.clone(), "MAX")
        largest = largest.clamp_min(torch.finfo(x.dtype).min)
        return largest + self._summed((x - largest).exp()).log()

    def sent(self, owner: int, values: Sequence[Tensor]) -> list[Tensor]:
        """What one rank has, on all of them.

        Args:
            owner: Whose it is.
            values: Of the same shapes and dtypes on all ranks; they may be overwritten.
        """
        if self.size == 1:
            return list(values)
        self._meet(f"what rank {owner} has, {[(x.ndim, x.dtype) for x in values]}")
        return [self._from(owner, x) for x in values]

    def first_says(self, flag: bool) -> bool:
        """What the first process says, to all that work at the same time."""
        if self.size == 1:
            return flag
        return bool(self._said("a decision", _READY, number=flag)[0][1])

    def total(self, number: int) -> int:
        """The sum of a count over all ranks."""
        return sum(self.counts(number))

    def counts(self, number: int, form: str = "a count") -> list[int]:
        """Those of all ranks, in their order.

        Args:
            number: This rank's.
            form: What it's for, in words.
        """
        return self._meet(form, number=number)

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """Of each of several numbers, as many on all ranks, the largest."""
        return [*map(max, *self.collected(numbers))] if self.size > 1 else [*numbers]

    def gathered(self, x: Tensor, dim: int = 0) -> Tensor:
        """What the ranks have, joined along a dim in their order.

        Args:
            x: Of the same shape on all ranks, but for that dim.
            dim: Along which it is this rank's part.
        """
        if self.size == 1:
            return x
        rows = x.movedim(dim, 0).contiguous()
        form = f"a gather of {rows.ndim} dims, {rows.dtype}"
        lengths = self._meet(form, number=len(rows))
        as_bytes = rows.view(torch.uint8) if rows.dtype == torch.bool else rows
        padded = as_bytes.new_zeros(max(lengths), *rows.shape[1:])
        padded[: len(rows)] = as_bytes
        padded = self._placed(padded)
        parts = [torch.empty_like(padded) for _ in lengths]
        with self._answered():
            dist.all_gather(parts, padded, group=self.group)
        whole = torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)])
        return whole.to(x.device).view(rows.dtype).movedim(0, dim)

    def place(self, number: int) -> slice:
        """Where this rank's part is in what is gathered.

        Args:
            number: Rows of this rank's part.
        """
        lengths = self._meet("a place", number=number)
        first = sum(lengths[: self.rank])
        return slice(first, first + number)

    def collected(self, value: T) -> list[T]:
        """The ranks' values, of any kind that can be pickled, in their order."""
        if self.size == 1:
            return [value]
        buffer = io.BytesIO()
        torch.save(value, buffer)
        self._meet("values")
        return [_loaded(x) for x in self._all_of(buffer.getvalue(), self.group)]

    def of_first(self, value: T) -> T:
        """The first rank's value, on all of them."""
        return self.collected(value if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def rounds(self, items: Iterable[T]) -> Iterator[T | None]:
        """This rank's items, the ranks in step; None while others have more.

        Args:
            items: As many as there are, perhaps more or fewer than on another rank.
        """
        if self.size == 1:
            yield from items
            return
        for item in items:
            self._meet("a batch")
            yield item
        while not self._all_done():
            yield None

    def in_step(self, items: Iterable[T]) -> Iterator[T]:
        """This rank's items, each while the others have one of theirs, or are done."""
        return (item for item in self.rounds(items) if item is not None)

    def drawing(self, items: Iterable[T]) -> Iterator[T]:
        """The items, each rank drawing other numbers from the first to the last."""
        with self.drawing_apart():
            yield from items

    def on_same(self, batches: Iterable[B]) -> Iterator[B]:
        """Batches that all ranks have, each drawing other numbers for them.

        Args:
            batches: The model's keyword arguments.

        Raises:
            ValueError: If a rank has another batch.
        """
        if self.size == 1:
            yield from batches
            return
        with self.drawing_apart():
            for batch in batches:
                self.check_batch(dict(batch))
                yield batch

    def check_same(self, values: Mapping[str, Tensor], what: str, remedy: str) -> None:
        """Check that all ranks have the same weights.

        Args:
            values: Site -> value.
            what: What they are, for the error.
            remedy: What to do.

        Raises:
            ValueError: If they don't, naming a site and ranks.
        """
        other = self.differing(values)
        if other is not None:
            site, rank = other
            raise ValueError(
                f"Site {site!r}: {what} of rank {rank} are others than those of rank "
                f"0. {remedy}"
            )

    def differing(self, values: Mapping[str, Tensor]) -> tuple[str, int] | None:
        """What is another on a rank than on the first, and that rank; None if nothing.

        Args:
            values: By name.
        """
        if self.size == 1:
            return None
        moments = {
            name: torch.stack([x.sum(), x.square().sum(), x.abs().sum()]).cpu()
            for name, value in values.items()
            for x in [value.detach().double()]
        }
        by_rank = self.collected(moments)
        for name in by_rank[0]:
            none = torch.full([3], torch.inf, dtype=torch.float64)
            each = torch.stack([own.get(name, none) for own in by_rank])  # (W, 3)
            others = ((each - each[0]).abs() > _SAME * each[0, 2]).any(1).nonzero()
            if len(others):
                return name, int(others[0])
        return None

    def given_another(self, values: Mapping[str, Any]) -> tuple[str, int] | None:
        """What isn't the same to the last bit on a rank as on the first, and that rank.

        Args:
            values: By name, tensors or what holds some.
        """
        by_rank = self.collected({name: _digest(x) for name, x in values.items()})
        for rank, digests in enumerate(by_rank):
            for name in sorted({*digests, *by_rank[0]}):
                if digests.get(name) != by_rank[0].get(name):
                    return name, rank
        return None

    def meet(self, form: str) -> None:
        """Wait until all ranks are about to do the same.

        Args:
            form: What, in words.

        Raises:
            agreed: As for all that ranks do together: a ValueError if they don't, or
                the error of one that has failed.
        """
        self._meet(form)

    def check_batch(self, values: Any) -> None:
        """Check that all ranks are given the same.

        Args:
            values: Of which all tensors count, in dicts, lists and tuples.

        Raises:
            ValueError: If one has others.
        """
        if self.size == 1:
            return
        for rank, other in enumerate(said := self._digests(values)):
            if other != said[0]:
                raise ValueError(
                    f"The batch of rank {rank} is another than that of rank 0. Ranks "
                    "that share the particles or the draws take the same batches in "
                    "the same order: a loader that shuffles needs the same seed on "
                    "each; don't share them out but over a mesh's dim 'data'."
                )

    def are_given_one(self, values: Any) -> bool:
        """Whether several ranks are all given the same, to the last bit.

        Args:
            values: Of which all tensors count, in dicts, lists and tuples.
        """
        return self.size > 1 and len({*self._digests(values)}) == 1

    def _digests(self, values: Any) -> list[int]:
        return self._meet("a batch's digest", _digest(values))

    def none_here(self, alone: str) -> str:
        """What is said where this rank has no batches.

        Args:
            alone: What is said to a single process.
        """
        if self.size == 1:
            return alone
        return (
            f"Rank {self.rank} of {self.size} has no batches. Each rank needs one at "
            "least: make them smaller, or start fewer processes."
        )

    def draw_alike(self) -> None:
        """Set torch's generators as the first rank's are, so that all draw the same."""
        if self.size == 1:
            return
        cpu, cuda = self.of_first((torch.get_rng_state(), _cuda_state()))
        torch.set_rng_state(cpu.cpu())
        if cuda is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(cuda.cpu())

    @contextmanager
    def drawing_apart(self) -> Iterator[None]:
        """A block in which each rank draws other numbers, for data of its own.

        The first draws those that a single process would, and all go on from where it
        is at the end.
        """
        if self.size == 1:
            yield
            return
        before = torch.get_rng_state(), _cuda_state()
        try:
            if self.rank:
                ahead = torch.Generator()
                ahead.set_state(before[0])
                first = int(torch.randint(2**62, (), generator=ahead))
                # Where data are shared, too: draws' rank 1 isn't seeded as data's is.
                step = 2**31 if self.within_batches else 1
                torch.manual_seed(first + self.rank * step)
            yield
        except BaseException:
            torch.set_rng_state(before[0])
            if before[1] is not None:
                torch.cuda.set_rng_state(before[1])
            raise
        self.draw_alike()

    def together(self) -> _Together:
        """A block that all ranks end alike: an error of one is raised by all."""
        return _Together(self)

    def _all_done(self) -> bool:
        return all(state == _DONE for state, _ in self._said("a batch", _DONE))

    def _meet(self, form: str, number: int = 0) -> list[int]:
        """The numbers that all ranks say where they are about to do the same."""
        if self.size == 1:
            return [number]
        state = _WITHIN if self.within_batches else _READY
        said = self._said(form, state, number)
        ranks = dist.get_process_group_ranks(self.group)
        return [said[dist.get_group_rank(self.everyone, r)][1] for r in ranks]

    def _said(
        self, form: str, state: int, number: int = 0, error: Exception | None = None
    ) -> list[tuple[int, int]]:
        """State and number of all ranks, if none has failed and all do the same.

        Raises:
            agreed: The error of the first rank that has failed; a ValueError if they
                do different things.
        """
        mine = torch.tensor(
            [state, number, zlib.crc32(form.encode())], device=self.device
        )
        everyone = self.everyone
        parts = [torch.empty_like(mine) for _ in range(everyone.size())]
        with self._answered():
            dist.all_gather(parts, mine, group=everyone)
        rows = torch.stack(parts).tolist()
        # Whoever is done with its batches waits while others meet within theirs.
        within = any(row[0] == _WITHIN for row in rows)
        here = [row for row in rows if not (within and row[0] == _DONE)]
        if all(row[0] != _FAILED and row[2] == here[0][2] for row in here):
            return [(row[0], row[1]) for row in rows]
        own = pickle.dumps(_told(form, error))
        said = [pickle.loads(x) for x in self._all_of(own, everyone)]
        for rank, (_, told) in enumerate(said):
            if told is not None:
                known = error if rank == everyone.rank() and error else _again(*told)
                known.add_note(f"Raised by rank {rank} of {everyone.size()}.")
                raise agreed(known)
        forms = ", ".join(f"rank {r} is at {form}" for r, (form, _) in enumerate(said))
        raise agreed(
            ValueError(
                f"The ranks do different things: {forms}. Let all of them call the "
                "same functions with the same arguments, on batches of one kind; for "
                "SVGD, on as many batches."
            )
        )

    def _all_of(self, value: bytes, group: Any) -> list[bytes]:
        parts: list[Any] = [None] * group.size()
        with self._answered():
            dist.all_gather_object(parts, value, group=group)
        return parts

    def _summed(self, x: Tensor, by: str = "SUM") -> Tensor:
        wide = self._placed(x.to(_summable(x.dtype)).contiguous())
        with self._answered():
            dist.all_reduce(wide, getattr(dist.ReduceOp, by), group=self.group)
        return wide.to(x)

    def _from(self, owner: int, x: Tensor) -> Tensor:
        own = self._placed(x.contiguous())
        with self._answered():
            dist.broadcast(own, group=self.group, group_src=owner)
        return own.to(x.device)

    def _placed(self, x: Tensor) -> Tensor:
        """Where the group can send it from."""
        return x if self.device.type == "cpu" or not x.is_cpu else x.to(self.device)

    @property
    def everyone(self) -> dist.ProcessGroup:
        """The ranks that must all come to a meeting."""
        group = self.meeting or self.group
        assert group is not None
        return group

    @property
    def device(self) -> torch.device:
        """Of what this library sends: the CPU, unless the group only knows another."""
        if dist.get_backend(self.group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    @contextmanager
    def _answered(self) -> Iterator[None]:
        """What torch says when another rank is gone, or is waited for too long.

        Raises:
            agreed: A RuntimeError, in our words.
            OutOfMemoryError: This rank's own.
        """
        try:
            yield
        except torch.OutOfMemoryError:  # this rank's own
            raise
        except RuntimeError as error:
            own, size = self.everyone.rank(), self.everyone.size()
            others = [r for r in range(size) if r != own]
            raise agreed(
                RuntimeError(
                    f"Rank {own} of {size} gets no answer from another "
                    f"(of {others}): it was killed, or took longer than the time limit "
                    "of torch.distributed.init_process_group. The launcher's report "
                    "names the first that ended. Start all again; a fit with "
                    "checkpoint=, and SVGD from what it saved, go on from there. "
                    f"({error})"
                )
            ) from error


ALONE = Ranks()


class _Present(threading.local):
    is_alone = False


_PRESENT = _Present()


class _Together:
    """See :meth:`Ranks.together`."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: object, error: BaseException | None, trace: object
    ) -> None:
        if self._ranks.size == 1:
            return
        if error is None:
            self._ranks._meet("the end")
        # An interrupt comes to all processes, from the terminal or the launcher.
        elif isinstance(error, Exception) and not is_agreed(error):
            self._ranks._said("an error", _FAILED, error=error)


def ranks_of(mesh: DeviceMesh | None, dim: Dim, default: Dim = "data") -> Ranks:
    """The ranks that share something out.

    Args:
        mesh: Of all processes, with dims ``"data"`` and ``"particles"``; None is one of
            the default dim alone, where ``torch.distributed`` is initialised.
        dim: Along which.
        default: What all ranks share where there is no mesh.

    Raises:
        TypeError: If the mesh is none.
        ValueError: If it has neither dim, or leaves processes out.
    """
    if mesh is None:
        return all_ranks() if dim == default else ALONE
    names = getattr(mesh, "mesh_dim_names", ...)
    if names is ...:
        raise TypeError(
            "mesh must be a torch.distributed.device_mesh.DeviceMesh, found a "
            f"{type(mesh).__name__}."
        )
    if not {"data", "particles"} & {*(names or ())}:
        raise ValueError(
            f"mesh has the dims {names}, expected 'data', 'particles' or both: "
            "init_device_mesh(device, (2, 2), mesh_dim_names=('data', 'particles'))."
        )
    if mesh.size() != dist.get_world_size():
        raise ValueError(
            f"mesh has {mesh.size()} of {dist.get_world_size()} processes. Make it of "
            "all; those that differ in other dims do the same work."
        )
    return Ranks(mesh.get_group(dim), dist.group.WORLD) if dim in names else ALONE


def draw_ranks_of(mesh: DeviceMesh | None) -> Ranks:
    """The ranks that share draws out: those of a mesh's dim ``"particles"``.

    Args:
        mesh: As for :func:`ranks_of`; without one, draws aren't shared out.
    """
    return replace(ranks_of(mesh, "particles"), within_batches=True)


def all_ranks() -> Ranks:
    """All processes, where ``torch.distributed`` is initialised."""
    there = dist.is_available() and dist.is_initialized()
    return Ranks(dist.group.WORLD) if there and not _PRESENT.is_alone else ALONE


@contextmanager
def working_alone() -> Iterator[None]:
    """A block in which this process shares nothing out, whatever others do."""
    with undone(partial(setattr, _PRESENT, "is_alone", _PRESENT.is_alone)):
        _PRESENT.is_alone = True
        yield


def is_first() -> bool:
    """Whether this is the process that writes files and shows bars."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def sharing_data(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose data are shared out: all ranks start and end it alike."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        ranks = all_ranks()
        with ranks.together():
            ranks.draw_alike()
            return function(*args, **kwargs)

    return wrapper


@dataclass(frozen=True, eq=False)
class Share:
    """Some of what can be gone through again, in a row.

    Attributes:
        of: A list, a data set or a loader.
        rows: Places there.
    """

    of: Any
    rows: range

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.of[self.rows[index]]

    def __iter__(self) -> Iterator[Any]:
        if hasattr(type(self.of), "__getitem__"):
            return (self.of[i] for i in self.rows)
        return islice(iter(self.of), self.rows.start, self.rows.stop)


def share(batches: Any, *, mesh: DeviceMesh | None = None) -> Any:
    """This process's contiguous share of batches, or of anything with a length.

    The shares of all ranks are the whole, in their order, and their lengths differ by
    one at most. Of a single process it is the whole. A list's or data set's share loads
    its own items alone; a ``DataLoader`` is gone through and the others' batches are
    left out, so that it pays to share its data set instead::

        loader = DataLoader(pl.share(dataset), batch_size=32, collate_fn=collate)

    Args:
        batches: A list, a map-style data set, or a loader that gives the same batches
            in the same order on all ranks.
        mesh: A ``DeviceMesh`` with the dim ``"data"``, whose ranks share; None is all
            ranks, where ``torch.distributed`` is initialised.

    Returns:
        What can be gone through again and again, with a length; by index, too, where
        ``batches`` can be.

    Raises:
        TypeError: If there is no length.
        ValueError: If it is a loader that shuffles by torch's global generator: ranks
            draw other numbers while they have data of their own, and each would leave
            out other data than the others take.

    >>> list(share([1, 2, 3]))
    [1, 2, 3]
    """
    try:
        number = len(batches)
    except TypeError as error:
        raise TypeError(
            f"share takes what has a length, found a {type(batches).__name__}. Give a "
            "list, a data set or a DataLoader of one; or let each rank read its own."
        ) from error
    ranks = ranks_of(mesh, "data")
    if ranks.size > 1 and _is_shuffled(batches):
        raise ValueError(
            "share got a loader that shuffles by torch's global generator, of which "
            "ranks draw other numbers, so that each would leave out other data than "
            "the others take. Share its data set, DataLoader(pl.share(dataset), "
            "shuffle=True); or give it generator=torch.Generator().manual_seed(0)."
        )
    return Share(batches, ranks.owned(number))


def _is_shuffled(loader: Any) -> bool:
    """Whether a loader's order is drawn by torch's global generator."""
    inner = getattr(loader, "batch_sampler", None)
    samplers = getattr(loader, "sampler", None), getattr(inner, "sampler", None)
    return any(getattr(x, "generator", x) is None for x in samplers if x is not None)


def _summable(dtype: torch.dtype) -> torch.dtype:
    """Sums of many terms need float32 or wider; integers stay what they are."""
    return (
        torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype
    )


def _digest(values: Any) -> int:
    """Of all tensors in dicts, lists and tuples."""
    digest = 0
    for x in tree_leaves(values):
        if isinstance(x, Tensor):
            rows = x.detach().cpu().contiguous().reshape(-1)
            digest = zlib.crc32(rows.view(torch.uint8).numpy().data, digest)
    return digest


def _cuda_state() -> Tensor | None:
    """That of this process's generator on its GPU, if it has one."""
    return torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def _loaded(value: bytes) -> Any:
    """What another rank has saved, its GPU's tensors on this rank's."""

    def here(storage: Any, location: str) -> Any:
        return storage.cuda() if location.startswith("cuda") else storage

    return torch.load(io.BytesIO(value), map_location=here, weights_only=False)


def _told(form: str, error: Exception | None) -> tuple[str, Any]:
    """What a rank says of itself to those who must stop."""
    if error is None:
        return form, None
    kind = type(error)
    try:
        pickle.dumps(kind)
    except (AttributeError, pickle.PicklingError):  # a class of a function's own
        return form, (RuntimeError, f"{kind.__name__}: {error}")
    return form, (kind, str(error))


def _again(kind: type[Exception], text: str) -> Exception:
    """The same error as on another rank."""
    try:
        return kind(text)
    except TypeError:  # one that is made of more than words
        return RuntimeError(f"{kind.__name__}: {text}")


def is_agreed(error: BaseException | None) -> bool:
    """Whether all ranks raise an error, or what it was made of."""
    while error is not None:
        if getattr(error, "is_agreed", False):
            return True
        error = error.__cause__
    return False


def agreed(error: Exception) -> Exception:
    """An error that all ranks know of."""
    error.is_agreed = True  # type: ignore[attr-defined]
    return error
