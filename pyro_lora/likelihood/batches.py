"""Reading batches, with errors that say which one it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from pyro_lora.ground.interrupts import unvalidated
from pyro_lora.ground.weights import Weights
from pyro_lora.likelihood.batch import check_batches, checked_batches
from pyro_lora.likelihood.model_trace import Batch, Model, trace_at

NO_BATCHES = (
    "There are no batches. Give a re-iterable of batches, such as a list or a "
    "DataLoader; a generator may be used up already."
)
READ_ONCE = (
    "The batches are an iterator, which can be read once only, but {}. Give a list or "
    "a DataLoader."
)


def first_batch(batches: Iterable[Batch], why: str) -> Batch:
    """The first batch, of batches that are read again.

    Args:
        batches: Mappings of model keyword arguments.
        why: What it is read for, a clause.

    Raises:
        ValueError: If they are something else, or read once only, or there is none.
    """
    check_batches(batches)
    if iter(batches) is batches:
        raise ValueError(READ_ONCE.format(why))
    first = next(checked_batches(batches), None)
    if first is None:
        raise ValueError(NO_BATCHES)
    return first


def trace_batch(model: Model, weights: Weights, batch: Batch, index: int) -> Any:
    """The model's trace on a batch.

    Args:
        model: A Pyro model.
        weights: Latent site -> value.
        batch: The model's keyword arguments.
        index: The batch's place.

    Raises:
        ValueError: As the model does, with the batch's place and, if it's for NaN
            parameters of a likelihood, their sites.
    """
    with naming_batch(index, partial(_nan_likelihoods, model, weights, batch)):
        return trace_at(model, weights, batch)


@contextmanager
def naming_batch(
    index: int, find_sites: Callable[[], Sequence[str]] = tuple
) -> Iterator[None]:
    """Say in an error of the model, such as Pyro's on NaN logits, which batch it was.

    Args:
        index: The batch's place.
        find_sites: Called on an error; names of the sites at fault, if they're known.

    Raises:
        ValueError: If the block raises one.
    """
    try:
        yield
    except ValueError as error:
        at = "".join(f", site {name!r}" for name in find_sites())
        if str(error).startswith(f"Batch {index}"):
            if not at:
                raise
            raise ValueError(f"{error}\nNaN are the parameters of{at[1:]}.") from error
        raise ValueError(
            f"The model failed on batch {index}{at}: {error}\nIf it runs on others, "
            "check that batch's inputs and labels."
        ) from error


def _nan_likelihoods(model: Model, weights: Weights, batch: Batch) -> list[str]:
    """Observed sites whose distribution has NaN parameters, if nothing else fails."""
    try:
        with unvalidated():
            trace = trace_at(model, weights, batch)
    except ValueError:
        return []
    names = []
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or not site["is_observed"]:
            continue
        fn = site["fn"]
        while hasattr(fn, "base_dist"):
            fn = fn.base_dist
        tensors = [x for x in vars(fn).values() if isinstance(x, Tensor)]
        if any(x.isnan().any() for x in tensors):
            names.append(name)
    return names
