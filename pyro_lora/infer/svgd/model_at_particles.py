"""The user's model at particles that are given on its sites' supports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_lora.ground.weights import check_weights
from pyro_lora.infer.svgd.particle_model import ParticleModel
from pyro_lora.infer.svgd.starting_point import particle_model
from pyro_lora.likelihood.model_trace import Batch, Model, check_model


def model_at_particles(
    model: Model, particles: Mapping[str, Tensor], batch: Batch
) -> tuple[ParticleModel, dict[str, Tensor]]:
    """Inspect a model by one run, and take particles to unconstrained space.

    Args:
        model: A Pyro model.
        particles: Site -> (K, ...), on the sites' supports.
        batch: The model's keyword arguments.

    Returns:
        The model, and site -> (K, ...) in unconstrained space.

    Raises:
        ValueError: If there are no particles, a latent site is missing or has another
            shape, one isn't the model's, or the model can't be run by particles.
    """
    check_model(model)
    check_weights(particles, "particles")
    num_particles = next((x.shape[0] for x in particles.values() if x.ndim), 0)
    if num_particles < 1:
        raise ValueError(
            "There are no particles. Give a mapping of sites to values (K, ...), such "
            "as posterior.particles or svgd.get_named_particles()."
        )

    def first(site: dict[str, Any]) -> Tensor:
        name, shape = site["name"], site["fn"].shape()
        if name not in particles:
            return site["fn"].sample()
        if particles[name].shape != (num_particles, *shape):
            raise ValueError(
                f"Site {name!r}: the particles have shape "
                f"{tuple(particles[name].shape)}, expected {num_particles} of the "
                f"site's shape {tuple(shape)}."
            )
        return particles[name][0]

    target = particle_model(model, first, None, (), batch)
    missing = sorted(target.latents.keys() - particles.keys())
    if missing:
        raise ValueError(
            f"Site {missing[0]!r} of the model isn't among the particles, which have "
            f"{sorted(particles)}. Give values of all latent sites."
        )
    unknown = sorted(particles.keys() - target.latents.keys())
    if unknown:
        raise ValueError(
            f"The particles have values of {unknown}, which the model doesn't sample; "
            f"its latent sites are {sorted(target.latents)}. Leave them out, or give "
            "the model that the particles are of."
        )
    with torch.no_grad():
        return target, {
            site: latent.transform.inv(particles[site])
            for site, latent in target.latents.items()
        }
