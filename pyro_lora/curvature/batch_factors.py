"""Curvature factors of one batch, of all layers and Fisher terms at once or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_lora.curvature.capture import (
    Recording,
    capture_layers,
    largest_gradients,
    score_gradient,
    tokens_that_count,
    without_padding,
)
from pyro_lora.curvature.fisher import FisherTerms
from pyro_lora.curvature.structures import BatchStructure, Captures, Factors
from pyro_lora.ground.interrupts import eagerly


def batch_factors(
    found: FisherTerms,
    log_likelihood: Tensor,
    leaves: Mapping[str, Tensor],
    record: Recording,
    structure: BatchStructure,
    max_bytes: float,
) -> tuple[dict[str, list[Tensor]], Iterator[Factors]]:
    """Gradient of the log likelihood, and factors that are yet to be computed.

    Args:
        found: Fisher terms (M, B).
        log_likelihood: Of the batch, nats.
        leaves: Site -> the weights.
        record: Of the forward pass.
        structure: What the pass sums.
        max_bytes: Of the gradients that are kept at a time. Beyond, they come in
            chunks of terms, then of layers, and twice: first to see which tokens count.

    Returns:
        Site -> (O, I) for each layer; and factors by place, some layers at a time.
    """
    terms, alpha = found.terms, found.coordinates
    score = _autograd_score(log_likelihood, leaves) if alpha is None else None
    record.find_layouts(terms, max_bytes)
    groups, step = _chunks(record, terms, structure.joint, max_bytes)
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

    def masked(capture: Callable[[], Captures]) -> Captures:
        return {i: without_padding(c, counts[i]) for i, c in capture().items()}

    if whole:
        once = [captures]  # popped, so that nothing here holds them any longer
        return score, structure.batch_factors([partial(masked, once.pop)], counts)
    del captures

    def in_chunks() -> Iterator[Factors]:
        for places in groups:
            more = places is not groups[-1]
            chunks = [
                partial(masked, partial(captured, places, s, more or s != starts[-1]))
                for s in starts
            ]
            yield from structure.batch_factors(chunks, counts)

    return score, in_chunks()


def _chunks(
    record: Recording, terms: Tensor, joint: bool, max_bytes: float
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
    if num_terms * total > max_bytes:
        step = max(1, int(max_bytes // total))
    if joint:
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
