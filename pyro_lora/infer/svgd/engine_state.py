"""The state of an SVGD engine, checked before any of it is taken over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from torch import Tensor

from pyro_lora.ground.checked_tensors import CheckedTensors
from pyro_lora.ground.tensor_folder import Count, Schema
from pyro_lora.infer.svgd.particle_model import ParticleModel, check_shapes
from pyro_lora.lifting.fingerprint import Fingerprint, NetworkDescription, restored

Tensors = dict[str, Tensor]


class _Fields(Schema):
    """What ``SVGD.state_dict()`` gives; before there were networks, without them."""

    values: Tensors
    particles: Annotated[Tensors, msgspec.Meta(min_length=1)]
    optim: dict[str, dict[str, Any]]
    diagnostics: dict[str, list[float]]
    gathered: dict[str, Any] | None
    num_gathered: Count
    num_epochs: Count
    networks: tuple[list[NetworkDescription], Tensors] | None = None


class EngineState(msgspec.Struct, frozen=True):
    """A state that was checked, but for what the update rule and optimiser know.

    Attributes:
        values: Site -> particles on its support, (K, ...).
        particles: Site -> particles, unconstrained.
        optim: Site -> the optimiser's state.
        diagnostics: Series with one value a step.
        gathered: What the first batches of an update gave.
        num_gathered: Number of these.
        num_epochs: Of all runs.
        networks: What the networks were; None where the state doesn't say.
    """

    values: Tensors
    particles: Tensors
    optim: dict[str, dict[str, Any]]
    diagnostics: dict[str, list[float]]
    gathered: dict[str, Any] | None
    num_gathered: int
    num_epochs: int
    networks: list[Fingerprint] | None


def checked_state(
    state: Mapping[str, Any], num_particles: int, target: ParticleModel | None
) -> EngineState:
    """The state of an engine.

    Args:
        state: From ``SVGD.state_dict()``.
        num_particles: K.
        target: The model, None where it isn't known yet.

    Returns:
        The same, checked.

    Raises:
        ValueError: If it's something else, or of another K or model.
    """
    try:
        fields = msgspec.convert(dict(state), _Fields)
    except (msgspec.ValidationError, UnicodeError) as error:
        raise ValueError(
            f"Expected a state from SVGD.state_dict(), but {error}. Load another."
        ) from error
    sites = list(fields.particles)
    for name in ("values", "optim"):
        found = getattr(fields, name)
        if found.keys() != fields.particles.keys():
            raise ValueError(
                f"The state has particles at {sites}, {name!r} at {list(found)}."
            )
    check_shapes(fields.particles, num_particles, target)
    particles = CheckedTensors(fields.particles, "")
    values = CheckedTensors(fields.values, "")
    for site in sites:
        x = particles.real(site)
        shape = (
            None
            if target is None
            else target.latents[site].transform.forward_shape(x.shape)
        )
        value = values.real(site, shape, (x.dtype,))
        if value.shape[:1] != (num_particles,):
            raise ValueError(f"values of {site!r} have shape {tuple(value.shape)}")
    networks = None
    if fields.networks is not None:
        networks = restored(*fields.networks)
    return EngineState(
        fields.values,
        fields.particles,
        fields.optim,
        fields.diagnostics,
        fields.gathered,
        fields.num_gathered,
        fields.num_epochs,
        networks,
    )
