r"""Which positions of a layer's output belong to which datum.

A position is a place in all dims of a tensor but the last. A datum owns those at which
its own Fisher terms alone have a gradient, and this is how they are found: with datum
b's terms times :math:`2^b`, the gradient at a position of datum b is exactly
:math:`2^b` times as large, in any precision, and with :math:`2^{-b}` so many times as
small. At one that depends on two data it is never both: of shares p and 1 - p and
powers x and y, :math:`(p x + (1 - p) y) (p / x + (1 - p) / y) = 1` only where x = y, p
= 0 or p = 1; nor of more whose shares are positive, since an arithmetic mean is above a
harmonic one. So that nothing cancels, as (i, j) and (j, i) do, the terms have irregular
factors all the time. With 2 data of 3 tokens, batch first and time-major::

    0 0 0      0 1
    1 1 1      0 1
               0 1

Looking at every layer takes backward passes, so what is found of a network is kept: how
a layer's positions are made of the rows of the network's output. What a model does with
these rows, joining or sorting them before the network runs and after it, may change
with the batch, and is looked at each time, by passes that end at the output. What the
network itself does is written in autograd's graph: it holds for other batches with the
same operations, unless they take rows by places or sum over as many as there are, which
others may do otherwise. Of an operation that tells nothing of itself, compiled or a
user's own, it's taken to hold.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad
from torch.autograd.function import BackwardCFunction

from pyro_lora.ground.accumulation import at_least_float32
from pyro_lora.ground.memory import address
from pyro_lora.ground.ranks import ALONE, Ranks
from pyro_lora.ground.synchronisation import Answer, ask, require
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.lifting.split_layers import meet

NOBODY, SEVERAL = -1, -2  # in place of a datum
AT_ONCE = 2**22  # entries that temporary tensors have
# Operations that choose by the data's values; that take rows by places; that do where
# they go along the first dim; and products, with the places of what is multiplied.
_CHOOSING = ("Index", "Gather", "Scatter", "Take", "Masked", "Sort", "Topk")
_REORDERING = (
    *("IndexSelect", "IndexCopy", "IndexAdd", "IndexPut", "Sort", "Take", "Scatter"),
    *("SegmentReduce", "CopySlices", "Embedding", "Sparse", "Solve"),
)
_JOINING = ("Stack", "Cat", "Unsqueeze")  # whose dim is one of what they give
_CUTTING = (
    *("Select", "Slice", "Split", "UnsafeSplit", "Unbind"),
    *("Stack", "Cat", "Roll", "Flip"),
)
_PRODUCTS = {
    **dict.fromkeys(("MmBackward0", "BmmBackward0", "MvBackward0"), (0, 1)),
    **dict.fromkeys(("AddmmBackward0", "BaddbmmBackward0"), (1, 2)),
}


@dataclass(frozen=True, eq=False)
class Layout:
    """The positions of one call of a layer, datum by datum.

    Attributes:
        num_rows: R; position p, of all in order, is in row p // inner % R.
        inner: See there.
        index: Rows of each datum, (B, k); None where row b is datum b's.
        present: (B, k), off where a datum has fewer rows than others; None where all
            have as many.
    """

    num_rows: int
    inner: int = 1
    index: Tensor | None = None
    present: Tensor | None = None

    def inputs(self, x: Tensor) -> Tensor:
        """(..., X) by datum, (B, T, X); any values where a datum has fewer."""
        # (outer, R, inner, X) -> (R, outer, inner, X)
        x = x.reshape(-1, self.num_rows, self.inner, x.shape[-1]).transpose(0, 1)
        if self.index is None:
            return x.flatten(1, 2)
        return x[self.index.to(x.device)].flatten(1, 3)

    def gradients(self, g: Tensor) -> Tensor:
        """(..., O) by datum, (B, T, O); zero where a datum has fewer."""
        by_datum = self.inputs(g)
        if self.present is None:
            return by_datum
        tokens = by_datum.shape[1] // self.present.shape[1]
        present = self.present.to(g.device).repeat_interleave(tokens, 1)
        return by_datum * present[..., None]


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a slot.

    Attributes:
        name: A parameter of the slot, and its site.
        input: What the slot got.
        output: What it returned.
        versions: Those of the two tensors at that time.
    """

    name: str
    site: str
    input: Tensor
    output: Tensor
    versions: tuple[int, int]

    @property
    def overwritten(self) -> bool:
        """Whether a later operation wrote into the input or the output."""
        return (self.input._version, self.output._version) != self.versions


@dataclass(eq=False)
class Run:
    """One call of a lifted network.

    Attributes:
        network: Which; None where slots are called outside of theirs.
        given: Its arguments' names, and whether they are None.
        calls: Of its slots, in order.
        outputs: Tensors that it returned.
    """

    network: LiftedNetwork | None = None
    given: tuple[tuple[object, bool], ...] = ()
    calls: list[Call] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    @cached_property
    def form(self) -> tuple[object, ...]:
        """What decides how the network lays out its rows."""
        calls = tuple((call.name, call.output.ndim) for call in self.calls)
        names = " ".join(node.name() for node in self.operations)
        digest = hashlib.blake2b(names.encode()).digest()
        return self.given, calls, tuple(x.ndim for x in self.outputs), digest

    @cached_property
    def operations(self) -> dict[Any, None]:
        """Those between its slots and its outputs, nodes of autograd's graph."""
        calls = {call.output.grad_fn for call in self.calls}
        leads: dict[Any, bool] = {}  # whether a slot's call is among what led to a node
        stack: list[Any] = [x.grad_fn for x in self.outputs if x.requires_grad]
        while stack:
            node = stack[-1]
            before = [n for n, _ in node.next_functions if n is not None]
            rest = [n for n in before if n not in leads]
            if rest and node not in leads:
                stack += rest
                continue
            leads[stack.pop()] = node in calls or any(leads[n] for n in before)
        return {node: None for node, is_led_to in leads.items() if is_led_to}

    @cached_property
    def keeps_order(self) -> list[Answer]:
        """Whether rows that are chosen together with tokens are all, in their order."""
        firsts = [
            node._saved_indices[0]
            for node in self.operations
            if node.name().startswith("IndexBackward")
            and len(node._saved_indices) > 1
            and node._saved_indices[0] is not None
        ]
        return [
            ask((x == torch.arange(x.numel(), device=x.device).reshape(x.shape)).all())
            if x.dtype == torch.long
            else ask(x.all())
            for x in firsts
        ]


@dataclass(frozen=True)
class Place:
    """Where a network's R rows are among the positions of a layer.

    Attributes:
        dim: Which, of outer * R * inner entries; entry e is in row e // inner % R.
        outer: See there.
        inner: See there.
    """

    dim: int
    outer: int
    inner: int

    def fits(self, lead: Sequence[int], num_rows: int) -> bool:
        """Whether the positions, (lead), may be made of as many rows."""
        return lead[self.dim] == self.outer * num_rows * self.inner

    def inner_size(self, lead: Sequence[int]) -> int:
        """Positions of a row that follow each other, in the order of all of them."""
        return self.inner * math.prod(lead[self.dim + 1 :])

    def rows(self, lead: Sequence[int], num_rows: int, device: torch.device) -> Tensor:
        """The row of every position, (lead)."""
        entries = torch.arange(lead[self.dim], device=device) // self.inner % num_rows
        shape = [-1 if d == self.dim else 1 for d in range(len(lead))]
        return entries.reshape(shape).expand(lead)


@dataclass(frozen=True)
class KeptLayout:
    """What is known of a network's layout, for a form of call.

    Attributes:
        dims: Of each output that the likelihood depends on, the dim of its rows.
        places: Of each call; None where they may change from batch to batch.
    """

    dims: tuple[int | None, ...]
    places: tuple[Place | None, ...]


def find_layouts(
    runs: Sequence[Run],
    terms: Tensor,
    max_bytes: float = math.inf,
    ranks: Ranks = ALONE,
) -> dict[Call, Layout]:
    """How the positions of every call are those of the data.

    Args:
        runs: Calls of the networks, with those of the slots.
        terms: (M, B), each datum's terms depending on that datum alone.
        max_bytes: Of gradients at a time, where it takes more than one tensor.
        ranks: Who runs each pass together, since layers are split over them.

    Returns:
        Call -> layout, but for calls without positions, as of an expert without tokens.

    Raises:
        ValueError: If a position depends on several data.
    """
    runs = [
        run
        if all(c.output.numel() for c in run.calls)
        else replace(run, calls=[c for c in run.calls if c.output.numel()])
        for run in runs
    ]
    calls = [call for run in runs for call in run.calls]
    num_data = terms.shape[1]
    probe = _Probe(terms, max_bytes, calls, ranks)
    if probe.num_data == 1:
        return dict.fromkeys(calls, Layout(1))
    outputs = [x for run in runs for x in run.outputs]
    if num_data == 1:  # this rank only takes part in the others' passes
        probe.owners([], outputs)
        probe.owners([])
        return dict.fromkeys(calls, Layout(1))
    kept = {run: run.network.layouts.get(run.form) for run in runs if run.network}
    first = [c for run in runs for c in _unknown(run, kept.get(run))]
    owners, probed = probe.owners(first, outputs)
    of_outputs = iter(probed)
    # All is asked before the first answer is needed.
    by_run = {run: [next(of_outputs) for _ in run.outputs] for run in runs}
    asked = {r: _Outputs(r, by_run[r], kept.get(r), num_data) for r in runs}
    early = {  # which of the layers may be, where there is one choice
        run: {c: (owners[c], _places(owners[c], row)) for c in _unknown(run, kept[run])}
        for run in runs
        if kept.get(run) and (row := asked[run].only_row) is not None
    }
    _require_single(owners, num_data)
    families = _families(owners)
    rows: dict[Run, _Rows | None] = {}
    for run in runs:
        of_kept = kept.get(run)
        rows[run] = asked[run].rows()
        if of_kept is not None and not _fits(run, of_kept, rows[run]):
            kept[run] = None
            rows[run] = _Outputs(run, by_run[run], None, num_data).rows()
    rest = [c for run in runs for c in _unknown(run, kept.get(run)) if c not in owners]
    more, _ = probe.owners(rest)
    if more:
        owners |= more
        _require_single(owners, num_data)
        families = _families(owners)
    for family in families:
        if all(family.agree):
            owners |= dict.fromkeys(family.calls, family.union)
    choices = {
        run: {
            call: _places(owners[call], found.owner)
            if owners[call] is not owner or found.owner is not asked[run].only_row
            else places
            for call in _unknown(run, kept.get(run))
            for owner, places in [early.get(run, {}).get(call, (None, []))]
        }
        for run, found in rows.items()
        if found is not None
    }
    layouts: dict[Call, Layout] = {}
    for run in runs:
        layouts |= _layouts(
            run, kept.get(run), rows[run], owners, choices.get(run, {}), num_data
        )
    return layouts


def mixes_data(runs: Sequence[Run], terms: Tensor) -> bool:
    """Whether what a network returns, at one position, is part of several data.

    Args:
        runs: Calls of the networks.
        terms: (M, B).
    """
    outputs = [x for run in runs for x in run.outputs]
    _, owners = _Probe(terms, math.inf).owners([], outputs)
    return any([ask((owner == SEVERAL).any(), usual=False) for owner in owners])


def _unknown(run: Run, kept: KeptLayout | None) -> list[Call]:
    if kept is None:
        return run.calls
    return [c for c, p in zip(run.calls, kept.places, strict=True) if p is None]


class _Probe:
    """Finds owners, by gradients of the terms times powers of two.

    Args:
        terms: (M, B).
        max_bytes: Of gradients at a time.
        calls: All that may be looked at.
        ranks: Who runs each pass together: all look at what one of them doesn't know.

    Attributes:
        num_data: The most that one of these has, by which they take as many passes.
    """

    def __init__(
        self,
        terms: Tensor,
        max_bytes: float,
        calls: Sequence[Call] = (),
        ranks: Ranks = ALONE,
    ) -> None:
        # One number for each datum, whose gradient is zero only where all terms' are.
        mix = torch.linspace(1, 2, len(terms), dtype=terms.dtype, device=terms.device)
        data = torch.arange(terms.shape[1], dtype=torch.float64, device=terms.device)
        # No two are nearer to each other than .38 / B, by the golden ratio.
        irregular = 1 + data * (5**0.5 - 1) / 2 % 1
        self._data = (mix @ terms) * irregular.to(terms)  # (B,)
        self._max_bytes = max_bytes
        self._calls, self._ranks = calls, ranks
        meet(ranks, f"a look at {len(calls)} calls of layers")
        self.num_data = max(ranks.counts(terms.shape[1]))

    def owners(
        self, calls: Sequence[Call], outputs: Sequence[Tensor] = ()
    ) -> tuple[dict[Call, Tensor], list[Tensor]]:
        """Of every position of tensors (..., X) the datum, (...), or a marker.

        Args:
            calls: Those to be looked at; with the ranks, also those of others.
            outputs: Of networks: one with two dims or one may have no features, but a
                position (..., 1) for every number.
        """
        places = {call: i for i, call in enumerate(self._calls)}
        wanted = [places[call] for call in calls]
        of_ranks = self._ranks.collected(wanted)
        looked_at = [self._calls[i] for i in sorted({*chain(*of_ranks)})]
        tensors = [*outputs, *(call.output for call in looked_at)]
        found = self._owners(tensors, len(outputs))
        of_calls = found[len(outputs) :]
        return dict(zip(looked_at, of_calls, strict=True)), found[: len(outputs)]

    def _owners(self, tensors: Sequence[Tensor], num_outputs: int) -> list[Tensor]:
        single = [i < num_outputs and x.ndim < 3 for i, x in enumerate(tensors)]
        decoded: dict[int, tuple[Tensor, Tensor]] = {}
        nbytes = [x.nbytes if x.requires_grad else 0 for x in tensors]
        nbytes = self._ranks.largest(nbytes)
        for group in self._groups([(i, n) for i, n in enumerate(nbytes) if n]):
            decoded |= self._decoded({i: tensors[i] for i in group}, single)
        num_data = len(self._data)
        sizes = {  # of each datum, its largest; what nobody owns is put behind them
            i: self._data.new_zeros(num_data + 1).scatter_reduce(
                0, owner.where(owner >= 0, num_data).flatten(), size.flatten(), "amax"
            )[:num_data]
            for i, (owner, size) in decoded.items()
        }
        zero = self._data.new_zeros(len(self._data))
        largest = torch.stack([zero, *sizes.values()]).amax(0)
        data = torch.arange(0, device=self._data.device)
        return [
            _without_padding(*decoded[i], sizes[i], largest)
            if i in decoded
            else data.new_full(x.shape if single[i] else x.shape[:-1], NOBODY)
            for i, x in enumerate(tensors)
        ]

    def _groups(self, sizes: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
        group: list[int] = []
        total = 0.0
        for i, size in sizes:
            if group and 2 * (total + size) > self._max_bytes:
                yield group
                group, total = [], 0
            group.append(i)
            total += size
        if group:
            yield group

    def _decoded(
        self, tensors: Mapping[int, Tensor], single: Sequence[bool]
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Owners, and largest gradients, of every position."""
        narrow = any(x.dtype == torch.float16 for x in tensors.values())
        base = 8 if narrow else 32  # so many powers are within the type's range
        num_data = len(self._data)
        data = torch.arange(num_data, device=self._data.device)
        plain = self._gradients(tensors, torch.ones_like(self._data), single)
        top = {i: _largest(g) for i, g in plain.items()}
        owner = {i: torch.zeros_like(at) for i, (at, _) in top.items()}
        # Datum b has the digits b // base^k % base, and two passes find one of them.
        place = 1
        while place < self.num_data:
            digits = data // place % base
            last = min(base, -(-num_data // place)) - 1
            rising, falling = (
                {
                    i: _power(g, plain[i], *top[i])
                    for i, g in self._gradients(
                        tensors, torch.exp2(powers.to(self._data)), single
                    ).items()
                }
                for powers in (digits, last - digits)
            )
            for i, digit in rising.items():
                is_one = (digit >= 0) & (falling[i] >= 0) & (owner[i] >= 0)
                several = ~is_one | (digit + falling[i] != last)
                owner[i] = (owner[i] + place * digit).masked_fill(several, SEVERAL)
            place *= base
        decoded = {}
        for i, (_, size) in top.items():
            whose = owner[i].masked_fill(owner[i] >= num_data, SEVERAL)
            # Half precision rounds what is less than its least normal number.
            tiny = (whose == SEVERAL) & (size.abs() < torch.finfo(size.dtype).tiny)
            whose = whose.masked_fill(tiny | (size == 0), NOBODY)
            # NaN is given to someone, so that the sums have it and their check sees it.
            whose = whose.masked_fill(~size.isfinite(), 0)
            decoded[i] = whose.to(self._data.device), size.abs().to(self._data)
        return decoded

    def _gradients(
        self, tensors: Mapping[int, Tensor], weights: Tensor, single: Sequence[bool]
    ) -> dict[int, Tensor]:
        gradients = grad(
            self._data @ weights,
            list(tensors.values()),
            retain_graph=True,
            allow_unused=True,
        )
        filled = {
            i: torch.zeros_like(x) if g is None else g
            for (i, x), g in zip(tensors.items(), gradients, strict=True)
        }
        return {i: g[..., None] if single[i] else g for i, g in filled.items()}


def _largest(g: Tensor) -> tuple[Tensor, Tensor]:
    """Of gradients (..., X) where the largest is, and its value, each (...)."""
    at = torch.cat([x.abs().argmax(-1) for x in _blocks(g)]).reshape(g.shape[:-1])
    return at, g.gather(-1, at[..., None])[..., 0]


def _power(g: Tensor, plain: Tensor, at: Tensor, size: Tensor) -> Tensor:
    """The power of two by which gradients (..., X) are larger, -1 if there is none."""
    ratio = at_least_float32(g.gather(-1, at[..., None])[..., 0])
    power = (ratio / at_least_float32(size)).log2().round().nan_to_num(-1, -1, -1)
    factor = torch.exp2(power).to(g)
    factors = factor.flatten()[:, None].split(_step(g))
    errors = [
        torch.addcmul(x, before, by, value=-1).abs_().amax(-1)
        for x, before, by in zip(_blocks(g), _blocks(plain), factors, strict=True)
    ]
    # A power of two rounds nothing, but sums on a GPU may add in another order.
    tolerance = min(torch.finfo(g.dtype).eps ** 0.5, 2**-6)
    exact = torch.cat(errors).reshape(at.shape) <= tolerance * (factor * size).abs()
    return power.long().masked_fill(~exact, -1)


def _blocks(g: Tensor) -> tuple[Tensor, ...]:
    """Rows of (..., X), some at a time: a vocabulary's gradients are large."""
    return g.reshape(-1, g.shape[-1]).split(_step(g))


def _step(g: Tensor) -> int:
    return max(1, AT_ONCE // g.shape[-1])


def _without_padding(
    owner: Tensor, size: Tensor, sizes: Tensor, largest: Tensor
) -> Tensor:
    """Nobody owns what is rounding, as :func:`tokens_that_count` has it."""
    eps = torch.finfo(sizes.dtype).eps
    least = eps * torch.maximum(1e3 * sizes, 10 * largest)
    # Of what is no datum's alone, rounding leaves as much as beside the largest of all.
    own = least[owner.clamp_min(0)].where(owner >= 0, least.amax())
    return owner.masked_fill(size <= own, NOBODY)


def _require_single(owners: Mapping[Call, Tensor], num_data: int) -> None:
    if not owners:
        return
    several = torch.stack([(owner == SEVERAL).sum() for owner in owners.values()])
    calls = [(c.site, c.name, c.input.shape, c.output[..., 0].numel()) for c in owners]

    def error() -> ValueError:
        numbers = several.tolist()
        i = next(i for i, number in enumerate(numbers) if number)
        site, name, shape, size = calls[i]
        return ValueError(
            f"Site {site!r}: the layer of {name!r} has an input of shape "
            f"{tuple(shape)} in a batch of {num_data} data, and at "
            f"{numbers[i]} of its {size} positions the gradients of several "
            "data add up, so that no datum's own can be told. Either several data of "
            "the model are of one row of the network, as two people's answers to a "
            "text are: give each a row of its own, net(x[text]) for net(x)[text]. Or "
            "all share these rows, as they do the relative positions in DeBERTa with "
            "share_att_key=True, or the network mixes the data of a batch: give "
            "batches of one datum each, or leave the layer out of the adapter "
            "(target_modules in peft)."
        )

    require((several == 0).all(), error)


@dataclass(frozen=True, eq=False)
class _Family:
    """Calls with the same input, whose owners may be the same: it's then grouped once.

    At positions where one layer has a gradient the other may have none.

    Attributes:
        calls: The calls.
        union: The owners that any of them knows.
        agree: Of each call, whether they are its own, too.
    """

    calls: list[Call]
    union: Tensor
    agree: list[Answer]


def _families(owners: Mapping[Call, Tensor]) -> list[_Family]:
    by_input: dict[tuple[object, ...], list[Call]] = {}
    for call in owners:
        x = call.input
        by_input.setdefault((address(x), x.shape, x.stride()), []).append(call)
    families = []
    for calls in by_input.values():
        if len(calls) > 1:
            # Where it isn't the same datum, NOBODY is the least: the maximum knows
            # more.
            union = torch.stack([owners[call] for call in calls]).amax(0)
            agree = [ask(_agree(owners[call], union)) for call in calls]
            families.append(_Family(calls, union, agree))
    return families


def _agree(owner: Tensor, expected: Tensor) -> Tensor:
    return ((owner == expected) | (owner == NOBODY)).all()


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of a network's outputs.

    Attributes:
        dims: Their dim in each output; None where no datum owns a position.
        owner: The datum of each row, (R,).
        order: How they are those of data.
        as_given: Whether those that are chosen together with tokens are.
    """

    dims: tuple[int | None, ...]
    owner: Tensor
    order: _Order
    as_given: Sequence[Answer]


@dataclass(frozen=True, eq=False)
class _Along:
    """The owners along a dim of an output.

    Attributes:
        dim: Which.
        row: The datum of each entry.
        fits: Whether they are the same along all other dims.
        order: How they are those of data.
    """

    dim: int
    row: Tensor
    fits: Answer
    order: _Order


class _Outputs:
    """What is asked of a network's outputs.

    Args:
        run: The network's.
        owners: Of each output's positions.
        kept: What is known of them, if anything is.
        num_data: B.
    """

    def __init__(
        self,
        run: Run,
        owners: Sequence[Tensor],
        kept: KeptLayout | None,
        num_data: int,
    ) -> None:
        self._num_data = num_data
        self._as_given = run.keeps_order
        dims = None if kept is None else kept.dims
        self._dims = list(dims or [None] * len(owners))
        self._is_nobodys = [ask((owner == NOBODY).all(), False) for owner in owners]
        self._along = [
            [
                _along(owner, dim, num_data)
                for dim in (range(owner.ndim) if dims is None else dims[i : i + 1])
                if dim is not None
            ]
            for i, owner in enumerate(owners)
        ]

    @property
    def only_row(self) -> Tensor | None:
        """The datum of each row, where there is one way."""
        ways = [x.row for along in self._along for x in along]
        return ways[0] if len(ways) == 1 else None

    def rows(self) -> _Rows | None:
        """The rows that outputs are made of; None: there are none, or several ways."""
        dims, found = list(self._dims), list[_Along]()
        for i, is_nobodys in enumerate(self._is_nobodys):
            if is_nobodys:
                continue
            fitting = [x for x in self._along[i] if x.fits]
            if len(fitting) != 1:
                return None
            (one,) = fitting
            dims[i] = one.dim
            found.append(one)
        if not found:
            return None
        total, order = found[0].row, found[0].order
        for one in found[1:]:
            if total.shape != one.row.shape:
                return None
            union = one.row.maximum(total)
            if not ask(_agree(total, union) & _agree(one.row, union)):
                return None
            total, order = union, _Order(union, self._num_data)
        return _Rows(tuple(dims), total, order, self._as_given)


def _along(owner: Tensor, dim: int, num_data: int) -> _Along:
    others = [d for d in range(owner.ndim) if d != dim]
    row = owner.amax(others, keepdim=True) if others else owner
    fits = _agree(owner, row) & (owner != SEVERAL).all()
    flat = row.flatten()
    return _Along(dim, flat, ask(fits, usual=dim == 0), _Order(flat, num_data))


class _Order:
    """How rows are those of data: what must be known is asked for first.

    Args:
        owner: The datum of each row, (R,).
        num_data: B.
    """

    def __init__(self, owner: Tensor, num_data: int) -> None:
        self._num_data = num_data
        row = torch.arange(len(owner), device=owner.device)
        self._repeats, rest = divmod(len(owner), num_data)
        simple: list[Tensor] = []
        if not rest and self._repeats:
            # Rows of nobody go where they keep the order simple.
            simple = [row % num_data, row // self._repeats]
        self._simple = [(x, ask(_agree(owner, x))) for x in simple]
        # Of each datum its rows; those of nobody are put behind them.
        of_datum = owner.where(owner >= 0, num_data)
        counts = torch.zeros(num_data + 1, dtype=row.dtype, device=row.device)
        self._counts = counts.scatter_add(0, of_datum, torch.ones_like(row))[:num_data]
        self._sorted = of_datum.argsort(stable=True)
        self._width = ask(self._counts.amax(), usual=self._repeats)
        self._is_full = ask((self._counts == self._counts.amax()).all())

    def index(self) -> tuple[Tensor | None, Tensor | None]:
        """Rows of each datum, (B, k), and which are present."""
        for simple, agrees in self._simple:
            if agrees:
                if self._repeats == 1:
                    return None, None
                return simple.argsort(stable=True).reshape(self._num_data, -1), None
        width = max(1, int(self._width))
        place = torch.arange(width, device=self._counts.device)
        present = place < self._counts[:, None]
        first = self._counts.cumsum(0) - self._counts
        # Sorted by datum, the k-th row of one is k after its first.
        at = (first[:, None] + place).clamp_max(len(self._sorted) - 1)
        index = self._sorted[at].where(present, 0)
        return index, None if self._is_full and int(self._width) else present


def _fits(run: Run, kept: KeptLayout, rows: _Rows | None) -> bool:
    return rows is not None and all(
        [
            *rows.as_given,
            *(
                place is None or place.fits(call.output.shape[:-1], len(rows.owner))
                for call, place in zip(run.calls, kept.places, strict=True)
            ),
        ]
    )


def _layouts(
    run: Run,
    kept: KeptLayout | None,
    rows: _Rows | None,
    owners: Mapping[Call, Tensor],
    choices: Mapping[Call, Sequence[tuple[Place, Answer]]],
    num_data: int,
) -> dict[Call, Layout]:
    """Layouts of a run's calls; what is new of the network is kept."""
    index = None if rows is None else rows.order.index()
    places = [None] * len(run.calls) if kept is None else kept.places
    known = dict(zip(run.calls, places, strict=True))
    fitting = {
        call: [place for place, fits in choices.get(call, ()) if fits]
        for call, place in known.items()
        if place is None
    }
    known |= {call: next(iter(own), None) for call, own in fitting.items()}
    orders: dict[int, _Order] = {}  # of calls that aren't made of rows, all asked first
    for call, place in known.items():
        if place is None and id(owners[call]) not in orders:
            orders[id(owners[call])] = _Order(owners[call].flatten(), num_data)
    same: dict[object, Layout] = {}  # so that calls with the same share it
    layouts: dict[Call, Layout] = {}
    for call, place in known.items():
        if place is None:
            owner = owners[call]
            if id(owner) not in same:
                of_positions = orders[id(owner)].index()
                same[id(owner)] = Layout(owner.numel(), 1, *of_positions)
            layouts[call] = same[id(owner)]
        else:
            assert rows is not None
            assert index is not None
            inner = place.inner_size(call.output.shape[:-1])
            layouts[call] = same.setdefault(
                inner, Layout(len(rows.owner), inner, *index)
            )
    if kept is None and rows is not None and run.network is not None:
        learnt = _learnt(run, fitting, rows)
        if learnt is not None:
            run.network.layouts[run.form] = KeptLayout(rows.dims, learnt)
    return layouts


def _places(owner: Tensor, row_owner: Tensor) -> list[tuple[Place, Answer]]:
    """The ways in which owned positions may be made of rows, and whether they are."""
    lead, num_rows = owner.shape, len(row_owner)
    ways = []
    for dim, size in enumerate(lead):
        repeats, rest = divmod(size, num_rows)
        if rest or repeats == 0:
            continue
        for inner in (n for n in range(1, repeats + 1) if repeats % n == 0):
            place = Place(dim, repeats // inner, inner)
            rows = place.rows(lead, num_rows, owner.device)
            is_usual = dim == 0 and inner == repeats
            ways.append((place, ask(_agree(owner, row_owner[rows]), is_usual)))
    return ways


def _learnt(
    run: Run, choices: Mapping[Call, Sequence[Place]], rows: _Rows
) -> tuple[Place | None, ...] | None:
    """What of it holds for other batches, None if there is nothing.

    Rows without tokens among others with them are chosen from batch to batch: tokens
    sent to an expert, say; or a head's, whose gradients are cheap.
    """
    one = {c.output.shape: p[0] for c, p in choices.items() if len(p) == 1}
    flat = all(call.output.ndim == 2 for call in run.calls)
    fixed = not flat or not any(map(_routes, run.operations))
    if not all(rows.as_given) or _reorders(run, len(rows.owner)):
        return None
    learnt: list[Place | None] = []
    for call, places in choices.items():
        if call.output.ndim == 2 and not (flat and fixed):
            learnt.append(None)
            continue
        place = places[0] if len(places) == 1 else one.get(call.output.shape)
        if place not in places:
            return None
        if place and not flat and (place.outer, place.inner) != (1, 1):
            return None  # rows of several tokens in one dim may be cut otherwise
        learnt.append(place)
    return tuple(learnt)


def _routes(operation: Any) -> bool:
    """Whether an operation may choose rows by the data's values."""
    chooses = any(word in operation.name() for word in _CHOOSING)
    return chooses or isinstance(operation, BackwardCFunction)


def _reorders(run: Run, num_rows: int) -> bool:
    """Whether it may put rows into another order, as x[order] does, or add some up.

    Two indices at once, x[rows, last], pick a token of each row, as pooling does. A sum
    over as many as there are rows, or positions, is taken for one over these.
    """
    positions = {math.prod(call.output.shape[:-1]) for call in run.calls}
    if all(call.output.ndim == 2 for call in run.calls):
        of_rows = positions | {num_rows}
    else:
        of_rows = {num_rows}
        features = {x.shape[-1] for c in run.calls for x in (c.input, c.output)}
        positions -= features  # as a norm's sums are over
    for operation in run.operations:
        name = operation.name()
        if name.startswith("IndexBackward"):
            if sum(index is not None for index in operation._saved_indices) == 1:
                return True
        elif any(word in name for word in _REORDERING):
            return True
        elif name in _PRODUCTS:
            left, right = (operation.next_functions[i] for i in _PRODUCTS[name])
            shape = operation._input_metadata[0].shape
            # A matrix on the left of rows, as one that sorts or pools them.
            on_left = right[0] in run.operations
            if on_left and (len(shape) == 2 or shape[0] % num_rows):
                return True
            # Or on either side, but for weights that are lifted.
            if on_left or right[0] is None:
                if _summed_over(left, right) in of_rows:
                    return True
        else:
            dims, sizes = _dims_of(operation)
            cuts = name.startswith(_CUTTING)
            if any(
                sizes[d] in of_rows | positions or (cuts and d % len(sizes) == 0)
                for d in dims
            ):
                return True
    return False


def _summed_over(left: tuple[Any, int], right: tuple[Any, int]) -> int:
    """The size that a product of two nodes' tensors sums over."""
    node, index = left
    if node is not None:
        return int(node._input_metadata[index].shape[-1])
    node, index = right
    return int(node._input_metadata[index].shape[-2:][0])


def _dims_of(operation: Any) -> tuple[list[int], Sequence[int]]:
    """The dims along which an operation goes, and the sizes of the tensor's."""
    names = ("_saved_dims", "_saved_dim", "_saved_dimension")
    saved = [getattr(operation, name, None) for name in names]
    dims: Any = next((x for x in saved if x is not None), None)
    if dims is None:
        return [], []
    if operation.name().startswith(_JOINING):
        sizes = operation._input_metadata[0].shape
    else:
        of_inputs = (of for of in operation.next_functions if of[0] is not None)
        node, index = next(of_inputs)
        sizes = node._input_metadata[index].shape
    if not sizes:  # a number's
        return [], []
    dims = dims if isinstance(dims, Sequence) else [dims]
    # Negative ones are kept as what is left of 2^64.
    return [d - 2**64 if d >= 2**63 else d for d in dims], sizes
