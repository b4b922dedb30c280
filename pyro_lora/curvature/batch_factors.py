"""Curvature factors of one batch, of all layers and Fisher terms at once or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from pyro_lora.curvature import structures
from pyro_lora.curvature.capture import (
    LayerCapture,
    Recording,
    capture_layers,
    largest_gradients,
    score_gradient,
    tokens_that_count,
    without_padding,
)
from pyro_lora.curvature.fisher import FisherTerms
from pyro_lora.curvature.structures import KroneckerFactors, Structure
from pyro_lora.lifting.interrupts import eagerly

Captures = Mapping[int, LayerCapture]  # by place among the layers
Counts = Mapping[int, Tensor]  # place -> which tokens count, (B, T)
Factors = dict[int, Any]  # place -> what a structure returns
OfLayers = Callable[[Captures, Counts], Iterator[Factors]]


@dataclass(frozen=True)
class FactorsFunction:
    """From a batch's captures to its factors.

    Attributes:
        of_layers: Factors, some layers at a time, of the tokens that count.
        joint: Whether it needs all layers at once.
        of_chunks: Factors of layers whose captures come with some Fisher terms at a
            time; None where all terms are needed at once.
    """

    of_layers: OfLayers
    joint: bool = False
    of_chunks: Callable[[OfLayers, Iterable[Captures], Counts], Factors] | None = None


def factors_of(structure: Structure) -> FactorsFunction:
    """What the first pass over the data sums.

    Args:
        structure: As :func:`~pyro_lora.curvature.fit.fit_fisher` takes it.
    """
    if structures.is_joint(structure):
        of_layers_together = cast(structures.JointStructure, structure)

        def of_all(captures: Captures, counts: Counts) -> Iterator[Factors]:
            masked = [without_padding(captures[i], counts[i]) for i in sorted(captures)]
            inputs = [c.inputs for c in masked]
            found = of_layers_together(inputs, [c.gradients for c in masked])
            if not isinstance(found, structures.DenseFactors):
                raise ValueError(
                    f"The joint structure returned {type(found).__name__}, expected "
                    "DenseFactors, of a matrix over all weights."
                )
            yield {0: found}

        adds = structure is structures.dense
        return FactorsFunction(of_all, joint=True, of_chunks=_added if adds else None)
    first = structures.kfac_expand if structure is structures.ekfac else structure
    of_layer = cast(structures.LayerStructure, first)

    def of_layers(captures: Captures, counts: Counts) -> Iterator[Factors]:
        places: dict[Tensor, list[int]] = {}
        for i, capture in captures.items():
            places.setdefault(capture.inputs, []).append(i)
        for inputs, same in places.items():
            masked = [without_padding(captures[i], counts[i]) for i in same]
            found = structures.with_same_inputs(
                of_layer, inputs, [c.gradients for c in masked]
            )
            yield dict(zip(same, found, strict=True))

    if structures.is_kfac(of_layer):
        return FactorsFunction(of_layers, of_chunks=_with_input_factors)
    adds = of_layer is structures.diagonal
    return FactorsFunction(of_layers, of_chunks=_added if adds else None)


def moments_in(bases: Sequence[tuple[Tensor, Tensor]]) -> FactorsFunction:
    """What EKFAC's second pass sums.

    Args:
        bases: Each layer's rows and columns.
    """

    def of_layers(captures: Captures, counts: Counts) -> Iterator[Factors]:
        for i, capture in captures.items():
            c = without_padding(capture, counts[i])
            yield {i: structures.ekfac(c.inputs, c.gradients, *bases[i])}

    return FactorsFunction(of_layers, of_chunks=_added)


def batch_factors(
    found: FisherTerms,
    log_likelihood: Tensor,
    leaves: Mapping[str, Tensor],
    record: Recording,
    of_batch: FactorsFunction,
    max_bytes: float,
) -> tuple[dict[str, list[Tensor]], Iterator[Factors]]:
    """Gradient of the log likelihood, and factors that are yet to be computed.

    Args:
        found: Fisher terms (M, B).
        log_likelihood: Of the batch, nats.
        leaves: Site -> the weights.
        record: Of the forward pass.
        of_batch: The factors.
        max_bytes: Of the gradients that are kept at a time. Beyond, they come in
            chunks of terms, then of layers, and twice: first to see which tokens count.

    Returns:
        Site -> (O, I) for each layer; and factors by place, some layers at a time.
    """
    terms, alpha = found.terms, found.coordinates
    score = _autograd_score(log_likelihood, leaves) if alpha is None else None
    record.find_layouts(terms, max_bytes)
    groups, step = _chunks(record, terms, of_batch, max_bytes)
    starts = range(0, len(terms), step)
    whole = len(groups) * len(starts) == 1

    def captured(places: list[int], start: int, keep_graph: bool) -> Captures:
        chunk = terms[start : start + step]
        return capture_layers(record, chunk, places, keep_graph)

    sizes: dict[int, Tensor] = {}
    gradients: dict[int, Tensor] = {}
    for places in groups:
        for start in starts:
            captures = captured(places, start, keep_graph=not whole)
            for i, c in captures.items():
                size = largest_gradients(c)
                sizes[i] = size.maximum(sizes[i]) if start else size
                if alpha is not None:
                    g = score_gradient(c, alpha[start : start + step])
                    gradients[i] = gradients[i] + g if start else g
    counts = tokens_that_count(sizes)
    if score is None:
        score = {site: [] for site in leaves}
        for i, (_, p) in enumerate(record.layers):
            score[p.site].append(gradients[i])
    if whole:
        return score, of_batch.of_layers(captures, counts)
    del captures

    def in_chunks() -> Iterator[Factors]:
        for places in groups:
            more = places is not groups[-1]
            parts = (captured(places, s, more or s != starts[-1]) for s in starts)
            if len(starts) == 1:
                yield from of_batch.of_layers(next(parts), counts)
            else:
                assert of_batch.of_chunks is not None
                yield of_batch.of_chunks(of_batch.of_layers, parts, counts)

    return score, in_chunks()


def _chunks(
    record: Recording, terms: Tensor, of_batch: FactorsFunction, max_bytes: float
) -> tuple[list[list[int]], int]:
    """Places of the layers that go together, and how many terms do."""
    # Layers with the same inputs share a factor, so they stay together.
    families: dict[Any, list[int]] = {}
    sizes: dict[Any, int] = {}  # of the gradients of one term, in bytes
    seen: set[Any] = set()
    for i, (slot, _) in enumerate(record.layers):
        calls = record.calls.get(slot, [])
        key = tuple(call.input.data_ptr() for call in calls)
        families.setdefault(key, []).append(i)
        own = 0 if slot in seen else sum(call.output.nbytes for call in calls)
        sizes[key] = sizes.get(key, 0) + own
        seen.add(slot)  # a weight and a bias have the same gradients
    num_terms, total = len(terms), sum(sizes.values())
    step = num_terms
    if of_batch.of_chunks is not None and num_terms * total > max_bytes:
        step = max(1, int(max_bytes // total))
    if of_batch.joint:
        return [list(range(len(record.layers)))], step
    groups: list[list[int]] = []
    size = 0
    for key, places in families.items():
        if groups and step * (size + sizes[key]) <= max_bytes:
            groups[-1] += places
            size += sizes[key]
        else:
            groups.append(list(places))
            size = sizes[key]
    return groups, step


def _added(of_layers: OfLayers, parts: Iterable[Captures], counts: Counts) -> Factors:
    total: Factors = {}
    for captures in parts:
        for layers in of_layers(captures, counts):
            for i, factors in layers.items():
                total[i] = total[i] + factors if i in total else factors
    return total


def _with_input_factors(
    of_layers: OfLayers, parts: Iterable[Captures], counts: Counts
) -> Factors:
    """KFAC's gradient factors add up; its input factors are of all terms' tokens."""
    inputs: dict[int, KroneckerFactors] = {}
    gradients: dict[int, Tensor] = {}
    for captures in parts:
        if not inputs:
            marks = {
                i: replace(c, gradients=counts[i][None, ..., None].to(c.gradients))
                for i, c in captures.items()
            }
            for layers in of_layers(marks, counts):
                inputs |= layers
        thin = {i: replace(c, inputs=c.inputs[..., :0]) for i, c in captures.items()}
        for layers in of_layers(thin, counts):
            for i, f in layers.items():
                gradients[i] = gradients[i] + f.g if i in gradients else f.g
    return {i: replace(f, g=gradients[i]) for i, f in inputs.items()}


def _autograd_score(
    log_likelihood: Tensor, leaves: Mapping[str, Tensor]
) -> dict[str, list[Tensor]]:
    with eagerly():
        found = torch.autograd.grad(
            log_likelihood, list(leaves.values()), retain_graph=True, allow_unused=True
        )
    return {
        site: list(torch.zeros_like(leaf) if g is None else g)
        for (site, leaf), g in zip(leaves.items(), found, strict=True)
    }
