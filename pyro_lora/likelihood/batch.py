"""What a batch is: the one door that batches come in by, and what to say of a bad one.

A batch is a mapping of the model's keyword arguments, as a Hugging Face collator makes
it. On the way in its form is checked, which costs microseconds and no synchronisation
with a GPU. Observed values are looked at where Pyro validates, and others when a model
has failed on them, so that the error can say which argument it was, and what to do:

    Batch 3, argument 'input_ids': token 30522 is outside of the network's vocabulary of
    30522, 0 to 30521. Use the network's own tokenizer.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from pyro_lora.ground.ranks import ALONE, Ranks
from pyro_lora.ground.synchronisation import lacks_values, require
from pyro_lora.ground.warning import warn
from pyro_lora.lifting.lifted_network import LORA_IN_PLATE, LiftedNetwork
from pyro_lora.likelihood.outcomes import (
    impossible,
    is_checked,
    is_possible,
    outcomes_that_count,
    single_outcomes,
)

Batch = Mapping[str, Any]  # the model's keyword arguments

# What Python, PyTorch, Pyro and transformers raise on bad arguments. A user's own kind
# of error stays what it is, and so does running out of memory.
FAILURES: tuple[type[Exception], ...] = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
    getattr(torch, "AcceleratorError", RuntimeError),  # asserts on a GPU
)
Nodes = Mapping[str, Any]  # of a trace
Finding = Callable[[Mapping[str, Any], Any, Nodes], Iterator[str]]
_PACKAGE = str(Path(__file__).parents[1])
_PARTICLES = ("num_particles_vectorized", "_num_predictive_samples")  # Pyro's plates


class PlacedBatch(dict[str, Any]):
    """A batch, its form checked, that knows its place among others.

    Args:
        values: The model's keyword arguments.
        place: Such as "Batch 3"; "The batch" where there is one.
    """

    def __init__(self, values: Mapping[str, Any], place: str = "The batch") -> None:
        super().__init__(values)
        self.place = place

    @property
    def given(self) -> set[str]:
        """The arguments that aren't None."""
        return {name for name, value in self.items() if value is not None}

    def check_given(self, expected: set[str]) -> None:
        """Check that the batch has the arguments that the first one has.

        Args:
            expected: Those of the first one that aren't None.

        Raises:
            ValueError: If it lacks one, a mask, say, without which padding would
                count, or has more.
        """
        for name in sorted(expected ^ self.given):
            has = "no " if name in expected else ""
            raise ValueError(
                f"{self.place} has {has}{name!r}, other than the first. Give all "
                "batches the same arguments, labels and masks included."
            )

    def replaced(self, **values: Any) -> PlacedBatch:
        """The same batch with other values of some arguments."""
        return PlacedBatch({**self, **values}, self.place)

    def copied(self) -> PlacedBatch:
        """The same batch, in memory of its own."""
        return PlacedBatch(tree_map_only(Tensor, Tensor.clone, dict(self)), self.place)


def check_batches(batches: object, name: str = "batches") -> None:
    """Check that there can be batches in something.

    Args:
        batches: What was given for them.
        name: Of the argument.

    Raises:
        ValueError: If it isn't a list, a loader or another iterable of mappings.
    """
    single = isinstance(batches, Mapping | Tensor | str | bytes)
    if single or not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):
        raise ValueError(
            f"{name} must be a list, or loader, of mappings of the model's keyword "
            f"arguments, found a {type(batches).__name__}. Put a single batch into a "
            "list."
        )


def checked_batches(
    batches: Iterable[Mapping[str, Any]],
) -> Iterator[PlacedBatch]:
    """Batches one after the other, each checked, that all have the same arguments.

    Args:
        batches: Mappings of model keyword arguments.

    Yields:
        Each batch, with its place. It is a copy, of which parts may be kept: some
        loaders fill the same tensors again for the next one.

    Raises:
        ValueError: As :func:`checked_batch`, or if arguments differ.
    """
    expected: set[str] | None = None
    for index, batch in enumerate(batches):
        checked = checked_batch(batch, f"Batch {index}")
        if expected is None:
            expected = checked.given
        checked.check_given(expected)
        yield checked.copied()


def next_batch(
    batches: Iterator[PlacedBatch], caller: str, ranks: Ranks = ALONE
) -> PlacedBatch:
    """The next one of a stream that should have one, such as the first.

    Args:
        batches: From :func:`checked_batches`.
        caller: Whose batches they are, for the error.
        ranks: Who shares the data.

    Raises:
        ValueError: If there is none.

    Warns:
        UserWarning: If all who should share the data have the same batch.
    """
    batch = next(batches, None)
    if batch is None:
        message = f"{caller} got no batches. Is the iterable used up already?"
        raise ValueError(ranks.none_here(message))
    if ranks.are_given_one(dict(batch)):
        warn(
            f"{caller}: all {ranks.size} ranks have the same batch, so that each datum "
            "seems to be there as many times. Give each rank its share, "
            "pl.share(batches); or, where each should have all data, mesh="
            f"init_device_mesh(device, (1, {ranks.size}), mesh_dim_names=('data', "
            "'particles'))."
        )
    return batch


def checked_batch(batch: Any, place: str = "The batch") -> PlacedBatch:
    """A batch with its form checked, lists and arrays of numbers made tensors.

    Args:
        batch: A mapping of the model's keyword arguments.
        place: Which one it is, for errors.

    Raises:
        TypeError: If a key isn't a name.
        ValueError: If it isn't a mapping, has no data, or token ids and mask don't fit.
    """
    if isinstance(batch, PlacedBatch):
        return batch
    if not isinstance(batch, Mapping):
        raise ValueError(
            "batches must be a list, or loader, of mappings of the model's keyword "
            f"arguments, found a {type(batch).__name__} in it ({place.lower()}). Put a "
            "single batch into a list."
        )
    for name in batch:
        if not isinstance(name, str):
            raise TypeError(
                f"{place} has the key {name!r}; expected names of the model's keyword "
                "arguments, strings."
            )
    placed = PlacedBatch(batch, place)
    rows = {x.shape[0] for x in batch.values() if isinstance(x, Tensor) and x.ndim}
    for name, value in batch.items():
        # A list of another length is a setting, a shape perhaps.
        listed = isinstance(value, list) and (not rows or len(value) in rows)
        if listed or isinstance(value, np.ndarray):
            placed[name] = _as_tensor(value, placed)
    _check_form(placed)
    return placed


def _as_tensor(value: Any, batch: Mapping[str, Any]) -> Any:
    """Numbers as a tensor, where the other tensors are; all else as it is."""
    if not _holds_numbers(value):
        return value
    devices = (x.device for x in batch.values() if isinstance(x, Tensor))
    device = next(devices, None)
    try:
        if isinstance(value[0], np.ndarray):
            return torch.stack([torch.as_tensor(x, device=device) for x in value])
        return torch.as_tensor(value, device=device)
    except (
        RuntimeError,
        TypeError,
        ValueError,
    ):  # rows of different lengths: the model may like it
        return value


def _holds_numbers(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim > 0 and value.dtype.kind in "biuf"
    if len(value) == 0:
        return False
    if isinstance(value[0], list | tuple | np.ndarray):
        return _holds_numbers(value[0])
    return isinstance(value[0], bool | int | float | np.generic)


def _check_form(batch: PlacedBatch) -> None:
    sizes = [x.shape[0] for x in batch.values() if isinstance(x, Tensor) and x.ndim > 0]
    if sizes and not any(sizes):
        raise ValueError(f"{batch.place} is empty, of 0 data. Leave it out.")
    for name, value in batch.items():
        if isinstance(value, Tensor) and lacks_values(value):
            raise ValueError(
                f"{batch.place}, argument {name!r} is on the meta device, where "
                "tensors have no values. Give it on the network's device."
            )
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor):
        return
    if ids.is_floating_point() or ids.is_complex():
        raise ValueError(
            f"{batch.place}, argument 'input_ids': expected token ids, integers, found "
            f"{_form(ids)}. Give them as the tokenizer does, by .long()."
        )
    if ids.shape[-1:] == (0,):
        raise ValueError(
            f"{batch.place}, argument 'input_ids': {_form(ids)} has no tokens. Leave "
            "empty texts out."
        )
    mask = batch.get("attention_mask")
    # With more dims than the ids it's one of pairs of tokens; with more tokens, of
    # those in a cache, too; of one row, of all.
    if not isinstance(mask, Tensor) or mask.ndim > ids.ndim:
        return
    rows = zip(mask.shape[:-1], ids.shape[:-1], strict=False)
    fits = mask.ndim == ids.ndim and all(m in (1, n) for m, n in rows)
    if not fits or mask.shape[-1] < ids.shape[-1]:
        raise ValueError(
            f"{batch.place}, argument 'attention_mask': expected the shape of "
            f"'input_ids', {tuple(ids.shape)}, found {tuple(mask.shape)}."
        )


def check_outcomes(site: Mapping[str, Any], batch: PlacedBatch) -> None:
    """Check that an observed site's value is a tensor of its distribution's shape.

    Labels (B, 1) under probabilities (B,) would be broadcast to (B, B), one label to
    all data. And 1.5 is no class, though PyTorch takes it for 1 where it doesn't
    validate, as after an import of ``torch._dynamo``; so values are looked at here,
    unless Pyro is told not to (``pyro.enable_validation(False)``).

    Args:
        site: A node of a trace, observed.
        batch: The model's arguments.

    Raises:
        ValueError: If it isn't, but for a constant and dims of particles on the left.
    """
    fn, value, place = site["fn"], site["value"], batch.place
    if not isinstance(value, Tensor) or value.is_complex():
        raise ValueError(
            f"{place}, site {site['name']!r}: expected observed values, labels "
            f"perhaps, as a tensor of numbers, found {_form(value)}."
        )
    own = tuple(value.shape)
    shape = tuple(fn.batch_shape + fn.event_shape)
    frames = [f for f in site["cond_indep_stack"] if f.vectorized]
    dims = [-f.dim for f in frames if f.name not in _PARTICLES]
    # From the data on, dims must be there; left of them are particles.
    least = len(fn.event_shape) + min(dims, default=0)
    fits = least <= len(own) <= len(shape)
    pairs = zip(shape[len(shape) - len(own) :], own, strict=True) if fits else ()
    given = [x for x in batch.values() if isinstance(x, Tensor) and x.ndim == 0]
    constant = not own and not given  # of the model, the same for all data
    differs = any(number != expected for expected, number in pairs)
    if differs or not (fits or constant):
        raise ValueError(
            f"{place}, site {site['name']!r}: expected observed values, labels "
            f"perhaps, of shape {shape[len(shape) - least :]}, found {own}. Give one "
            "for each datum; a column (B, 1) by .squeeze(-1)."
            f"{_rows_that_differ(batch)}"
        )
    if is_checked(site):
        _require_possible(site, place)


def check_plates(site: Mapping[str, Any], nodes: Nodes, place: str) -> None:
    """Check that a likelihood under one weight set has no dims but those of its plates.

    Outputs (B, 1) in a plate of B data would be B outcomes for each datum.

    Args:
        site: A node of a trace, observed.
        nodes: All nodes of the trace.
        place: Of the batch, for the error.

    Raises:
        ValueError: If it has others.
    """
    samples = [x for x in nodes.values() if x["type"] == "sample"]
    lifted = [x for x in samples if "lora" in x["infer"]]
    stacked = any(x["value"].ndim > x["fn"].event_dim for x in lifted)
    dims = [-f.dim for f in site["cond_indep_stack"] if f.vectorized]
    if not lifted or not dims or stacked:  # then dims may be particles'
        return
    shape = tuple(site["fn"].batch_shape)
    if any(size > 1 for size in shape[: len(shape) - max(dims)]):
        raise ValueError(
            f"{place}, site {site['name']!r}: its distribution is of batch shape "
            f"{shape}, of which the last {max(dims)} are its plates'. Index outputs "
            "(B, 1) of a network by [..., 0], or make several outcomes of a datum one "
            "event by .to_event(1)."
        )


def _rows_that_differ(batch: PlacedBatch) -> str:
    """What is said of arguments with different numbers of rows."""
    rows = {n: len(x) for n, x in batch.items() if isinstance(x, Tensor) and x.ndim}
    return f" The arguments' rows differ, {rows}." if len({*rows.values()}) > 1 else ""


def _require_possible(site: Mapping[str, Any], place: str) -> None:
    """Require that values that count have a probability."""
    single, value = single_outcomes(site["fn"]), site["value"]
    wrong = ~is_possible(single.fn, value) & outcomes_that_count(site)

    def error() -> ValueError:
        event = (1,) * len(single.fn.event_shape)
        by_entry = wrong.reshape(*wrong.shape, *event)
        shape = torch.broadcast_shapes(by_entry.shape, value.shape)
        bad = value.expand(shape)[by_entry.expand(shape)]
        text = impossible(single.fn, bad[0].item())
        return ValueError(f"{place}, site {site['name']!r}: {text}")

    require(~wrong.any(), error)


@contextmanager
def explaining(
    batch: Mapping[str, Any],
    model: Callable[..., Any] | None = None,
    nodes: Nodes | Callable[[], Nodes] = MappingProxyType({}),
) -> Iterator[None]:
    """Say in an error that others raise which argument of the batch is at fault.

    What the library itself refuses inside of the block keeps its words.

    Args:
        batch: The model's keyword arguments.
        model: The model, if it runs in the block, whose arguments can be looked up.
        nodes: Those of the model's trace, or what gives them as far as it came.

    Raises:
        ValueError: If the block fails in other words than ours.
    """
    try:
        yield
    except FAILURES as error:
        # Pyro adds the shapes of all sites to what is raised inside of a trace.
        words = str(error).split("Trace Shapes:")[0].strip()
        if type(error) not in FAILURES or (_is_ours(error) and words == str(error)):
            raise
        if _is_ours(error):
            raise type(error)(words) from error
        in_trace = nodes() if callable(nodes) else nodes
        place = getattr(batch, "place", "The batch")
        text = f"{type(error).__name__}: {words}"
        reasons = [x for find in FINDINGS for x in _tried(find, batch, model, in_trace)]
        if not reasons:
            raise ValueError(
                f"{place}: the model failed on its arguments, {_forms(batch)}. {text}"
            ) from error
        raise ValueError(f"{place}, {' '.join(reasons)} ({text})") from error


def _tried(find: Finding, batch: Any, model: Any, nodes: Nodes) -> list[str]:
    """What can be found; after an assert on a GPU no value can be looked at."""
    try:
        return list(find(batch, model, nodes))
    except FAILURES:
        return []


def _is_ours(error: BaseException) -> bool:
    """Whether a ``raise`` of this package was the error's origin."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    code = trace.tb_frame.f_code
    raised = dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
    return raised and code.co_filename.startswith(_PACKAGE)


def _names(batch: Mapping[str, Any], model: Any, nodes: Nodes) -> Iterator[str]:
    """Arguments that the model doesn't take, or needs."""
    while isinstance(model, partial) and type(model) is not partial:
        model = model.args[1]  # in Pyro's own kind of it, what a handler is around
    try:
        taken = list(inspect.signature(model).parameters.values())
    except (TypeError, ValueError):  # there is no model, or none that can be read
        return
    names = [
        p.name for p in taken if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if not any(p.kind is p.VAR_KEYWORD for p in taken):
        unknown = [name for name in batch if name not in names]
        if unknown:
            yield f"arguments {unknown}: the model takes {names} only."
    needed = [p.name for p in taken if p.name in names and p.default is p.empty]
    missing = [name for name in needed if name not in batch]
    if missing:
        yield f"arguments {missing} are missing: found {list(batch)}."


def _inputs(batch: Mapping[str, Any], model: Any, nodes: Nodes) -> Iterator[str]:
    """The network's main input, and token ids that it has no rows for."""
    for network in _networks(nodes):
        name = network.main_input_name
        ids = batch.get(name)
        if ids is None and batch.get("inputs_embeds") is None:
            yield f"argument {name!r} is missing or None: found {_forms(batch)}."
        if not isinstance(ids, Tensor) or ids.is_floating_point() or not ids.numel():
            continue
        table = network.get_input_embeddings()
        size: int | None = getattr(table, "num_embeddings", None)
        wrong = ids[:0] if size is None else ids[(ids < 0) | (ids >= size)]
        if size is not None and wrong.numel():
            yield (
                f"argument {name!r}: token {int(wrong.flatten()[0])} is outside of the "
                f"network's vocabulary of {size}, 0 to {size - 1}. Use the network's "
                "own tokenizer."
            )
        longest = getattr(network.config, "max_position_embeddings", None)
        if longest is not None and ids.shape[-1] > longest:
            yield (
                f"argument {name!r}: {ids.shape[-1]} tokens are more than the "
                f"network's {longest} positions. Truncate the texts, by "
                f"tokenizer(..., truncation=True, max_length={longest})."
            )
        if ids.ndim == 1 or ids.ndim > 3:
            yield f"argument {name!r}: expected (B, T), found {_form(ids)}."


def _types(batch: Mapping[str, Any], model: Any, nodes: Nodes) -> Iterator[str]:
    """What should be a tensor, of rows and devices as the others."""
    rows, devices = {}, {}
    for name, value in batch.items():
        if isinstance(value, Tensor):
            devices[name] = value.device
            if value.ndim:
                rows[name] = value.shape[0]
            if value.is_inference() and not torch.is_inference_mode_enabled():
                yield (
                    f"argument {name!r} was made under torch.inference_mode(), of "
                    "which gradients can't make use. Make it outside, or clone it."
                )
            if value.is_floating_point() and value.isnan().any():
                yield f"argument {name!r} has NaN values."
        elif not isinstance(value, bool | int | float | None):
            yield (
                f"argument {name!r} is {_form(value)}; expected a tensor. Tokenize "
                "texts, and pad them to one length."
            )
    if len(set(rows.values()) - {1}) > 1:
        yield f"arguments have different numbers of rows, {rows}."
    if len(set(devices.values())) > 1:
        yield f"arguments are on different devices, {devices}. Move them by .to(...)."


def _plates(batch: Mapping[str, Any], model: Any, nodes: Nodes) -> Iterator[str]:
    """A network that is sampled inside a plate."""
    for site in nodes.values():
        if site["type"] == "sample" and "lora" in site["infer"]:
            names = [f.name for f in site["cond_indep_stack"] if f.vectorized]
            names = [name for name in names if name not in _PARTICLES]
            if names:
                yield f"{LORA_IN_PLATE.format(names[-1])}"
                return


def _inference(batch: Mapping[str, Any], model: Any, nodes: Nodes) -> Iterator[str]:
    """A network that was made where there are no gradients."""
    if torch.is_inference_mode_enabled():
        return
    for network in _networks(nodes):
        made = [name for name, x in network.named_parameters() if x.is_inference()]
        if made:
            yield (
                f"the network's {made[0]!r} was made under torch.inference_mode(), of "
                "which gradients can't make use. Make or load the network outside."
            )


FINDINGS: tuple[Finding, ...] = (_plates, _names, _inputs, _types, _inference)


def _networks(nodes: Nodes) -> list[PreTrainedModel]:
    """The networks of transformers among the lifted ones of a trace."""
    lifted: dict[int, LiftedNetwork] = {}
    for site in nodes.values():
        if site["type"] == "sample":
            lifted |= {id(lora): lora for lora in site["infer"].get("lora", ())}
    networks = []
    for lora in lifted.values():
        models = (m for m in lora.network.modules() if isinstance(m, PreTrainedModel))
        networks += [model for model in [next(models, None)] if model is not None]
    return networks


def _form(value: Any) -> str:
    """What a value is: dtype and shape, or type."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, list | tuple) and value:
        return f"a {type(value).__name__} of {type(value[0]).__name__}"
    return "None" if value is None else f"a {type(value).__name__}"


def _forms(batch: Mapping[str, Any]) -> str:
    return ", ".join(f"{k!r}: {_form(v)}" for k, v in batch.items()) or "none at all"


NO_BATCHES = (
    "There are no batches. Give a re-iterable of batches, such as a list or a "
    "DataLoader; a generator may be used up already."
)
READ_ONCE = (
    "The batches are an iterator, which can be read once only, but {}. Give a list or "
    "a DataLoader."
)


def first_batch(
    batches: Iterable[Mapping[str, Any]], why: str, ranks: Ranks = ALONE
) -> PlacedBatch:
    """The first batch, of batches that are read again.

    Args:
        batches: Mappings of model keyword arguments.
        why: What it is read for, a clause.
        ranks: Who shares the data.

    Raises:
        ValueError: If they are something else, or read once only, or there is none.
    """
    check_batches(batches)
    if iter(batches) is batches:
        raise ValueError(READ_ONCE.format(why))
    first = next(checked_batches(batches), None)
    if first is None:
        raise ValueError(ranks.none_here(NO_BATCHES))
    return first
