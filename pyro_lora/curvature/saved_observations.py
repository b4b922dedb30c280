"""What was observed, as a description that JSON can hold and named tensors, and back.

Of two outcomes of a Bernoulli, for example:

    description   {"kind": "Bernoulli", "parameters": ["logits"], "constants": {},
                   "num_data": 2, "in_all": false}
    tensors       0/parameters/logits (2,), 0/value (2,), 0/scale (2,), 0/datum (2,)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor

from pyro_lora.curvature.factors import GrowingFactors
from pyro_lora.curvature.observations import Observations
from pyro_lora.ground.checked_tensors import DOUBLE, CheckedTensors
from pyro_lora.ground.tensor_folder import Count, Real, Schema
from pyro_lora.likelihood import likelihoods
from pyro_lora.likelihood.outcomes import is_possible


class ObservationsDescription(Schema):
    """Of :class:`Observations`: the distribution's type and what it's made of."""

    kind: str
    parameters: tuple[str, ...]
    constants: dict[str, Real]
    num_data: Count
    in_all: bool


def describe_observations(
    observations: Sequence[Observations], prefix: str
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """What :func:`restore_observations` needs.

    Args:
        observations: The outcomes of each form.
        prefix: Put before the tensors' names.

    Returns:
        Descriptions that JSON can hold, and named tensors.

    Raises:
        ValueError: If a likelihood's type can't be found again by its name.
    """
    descriptions: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for i, part in enumerate(observations):
        name = part.kind.__name__
        if likelihoods.kind_named(name) is not part.kind:
            raise ValueError(
                f"The likelihood {name} isn't known by that name, so that no file can "
                "hold it. Register the type itself, by pyro_lora.likelihoods.register."
            )
        of_part = {k: x for k, x in part.parameters.items() if isinstance(x, Tensor)}
        constants = {k: x for k, x in part.parameters.items() if k not in of_part}
        descriptions.append(
            {
                "kind": name,
                "parameters": list(of_part),
                "constants": constants,
                "num_data": part.num_data,
                "in_all": part.in_all,
            }
        )
        of_all = {"value": part.value, "scale": part.scale, "datum": part.datum}
        of_all |= {f"parameters/{k}": x for k, x in of_part.items()}
        tensors |= {f"{prefix}{i}/{k}": x for k, x in of_all.items()}
    return descriptions, tensors


def restore_observations(
    descriptions: Sequence[ObservationsDescription], tensors: CheckedTensors
) -> tuple[Observations, ...]:
    """What :func:`describe_observations` described.

    Raises:
        ValueError: If there can't be such outcomes.
    """
    found = []
    for i, description in enumerate(descriptions):
        inner = tensors.under(f"{i}/")
        scale = inner.not_negative("scale", None, DOUBLE)
        datum = inner.any("datum")
        fits = datum.dtype == torch.int64 and datum.shape == scale.shape
        if not fits or not bool(((datum >= 0) & (datum < description.num_data)).all()):
            raise ValueError(
                f"tensor {inner.prefix}datum isn't a whole number from 0 to "
                f"{description.num_data - 1} for each of {len(scale)} outcomes"
            )
        kind = likelihoods.kind_named(description.kind)
        if kind is None:
            raise ValueError(
                f"the likelihood {description.kind!r:.80} isn't among "
                "pyro_lora.likelihoods. Register it before loading"
            )
        parameters = {
            name: inner.any(f"parameters/{name}") for name in description.parameters
        }
        # A number of trials is whole.
        constants = {
            k: int(x) if float(x).is_integer() else x
            for k, x in description.constants.items()
        }
        part = Observations(
            kind,
            parameters | constants,
            inner.any("value"),
            scale,
            datum,
            description.num_data,
            description.in_all,
        )
        try:
            fn = kind(**part.parameters, validate_args=True)
            possible = is_possible(fn, part.value)
            shape = fn.batch_shape
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"tensors {inner.prefix}... make no {description.kind}: {error}"
            ) from error
        if shape != scale.shape or not bool(possible.all()):
            raise ValueError(
                f"tensors {inner.prefix}... hold values that no {description.kind} "
                f"can have, or {tuple(shape)} of them where {tuple(scale.shape)} are"
            )
        found.append(part)
    return tuple(found)


@dataclass(frozen=True)
class ObservedFactors(GrowingFactors):
    """What each batch observed at the rows of its Jacobian."""

    batches: tuple[tuple[Observations, ...], ...]

    def like(self, number: int) -> ObservedFactors:
        """See :meth:`~pyro_lora.curvature.factors.RowFactors.like`."""
        (sites,) = self.batches
        return ObservedFactors((tuple(site.repeated(number) for site in sites),))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """See the base class; a description is bytes of JSON."""
        found: dict[str, Tensor] = {}
        for n, outcomes in enumerate(self.batches):
            description, tensors = describe_observations(outcomes, f"{n}/")
            as_bytes = list(msgspec.json.encode(description))
            found |= tensors | {f"{n}/json": torch.tensor(as_bytes, dtype=torch.uint8)}
        return found

    @classmethod
    def restored(cls, tensors: CheckedTensors, shape: Sequence[int]) -> ObservedFactors:
        """See the base class.

        Raises:
            ValueError: If there can't be such outcomes.
        """
        batches: list[tuple[Observations, ...]] = []
        while (name := f"{len(batches)}/json") in tensors:
            as_bytes = tensors.any(name)
            if as_bytes.dtype != torch.uint8 or as_bytes.ndim != 1:
                raise ValueError(f"tensor {tensors.prefix}{name} isn't JSON")
            try:
                description = msgspec.json.decode(
                    bytes(as_bytes.tolist()), type=tuple[ObservationsDescription, ...]
                )
            except msgspec.DecodeError as error:
                raise ValueError(f"tensor {tensors.prefix}{name}: {error}") from error
            inner = tensors.under(f"{len(batches)}/")
            batches.append(restore_observations(description, inner))
        return cls(tuple(batches))
