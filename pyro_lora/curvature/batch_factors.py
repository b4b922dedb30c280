"""Curvature factors of one batch, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from torch import Tensor

from pyro_lora.curvature import structures
from pyro_lora.curvature.capture import LayerCapture, without_padding
from pyro_lora.curvature.structures import Structure

# From a batch's captures to its factors by layer, some layers at a time.
FactorsFunction = Callable[[Sequence[LayerCapture]], Iterator[dict[int, Any]]]


def factors_of(structure: Structure) -> FactorsFunction:
    """What the first pass over the data sums.

    Args:
        structure: As :func:`~pyro_lora.curvature.fit.fit_fisher` takes it.
    """
    if structure is structures.dense:

        def of_all(captures: Sequence[LayerCapture]) -> Iterator[dict[int, Any]]:
            pairs = [(c.inputs, c.gradients) for c in without_padding(captures)]
            yield {0: structures.dense(*zip(*pairs, strict=True))}

        return of_all
    first = structures.kfac_expand if structure is structures.ekfac else structure
    of_layer = cast(structures.LayerStructure, first)

    def of_layers(captures: Sequence[LayerCapture]) -> Iterator[dict[int, Any]]:
        places: dict[Tensor, list[int]] = {}
        for i, capture in enumerate(captures):
            places.setdefault(capture.inputs, []).append(i)
        order = [i for same in places.values() for i in same]
        rest = without_padding([captures[i] for i in order])
        for inputs, same in places.items():
            gradients = [next(rest).gradients for _ in same]
            found = structures.with_same_inputs(of_layer, inputs, gradients)
            yield dict(zip(same, found, strict=True))

    return of_layers


def moments_in(bases: Sequence[tuple[Tensor, Tensor]]) -> FactorsFunction:
    """What EKFAC's second pass sums.

    Args:
        bases: Each layer's rows and columns.
    """

    def of_layers(captures: Sequence[LayerCapture]) -> Iterator[dict[int, Any]]:
        for i, c in enumerate(without_padding(captures)):
            yield {i: structures.ekfac(c.inputs, c.gradients, *bases[i])}

    return of_layers
