"""Directions of particles under a kernel between their weights."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from pyro_lora.curvature.data_plate import data_plate
from pyro_lora.infer import transport
from pyro_lora.infer.delta_space import DeltaSpace
from pyro_lora.infer.function_space import Strength, datum_loss, likelihood
from pyro_lora.infer.kernels import Kernel, Space, Zero
from pyro_lora.infer.particle_model import ParticleModel, chunked_gradients


def weight_space_direction(
    target: ParticleModel,
    particles: dict[str, Tensor],
    *,
    kernel: Kernel | Zero,
    space: Space,
    form: Literal["stein", "repulsive"],
    temperature: float,
    strength: float | Strength,
    chunk_size: int,
    obs_site: str | None,
    args: Any,
    kwargs: Any,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Stein or repulsive direction with a kernel between weights or their updates.

    Args:
        target: The model.
        particles: Site -> (K, ...), unconstrained.
        kernel: A function of squared distances, or ``Zero()``.
        space: ``"joint"``, ``"site"`` or ``"delta"``.
        form: ``"stein"`` or ``"repulsive"``.
        temperature: T.
        strength: Of the repulsive form: a number, or a function of (minibatch loss,
            N).
        chunk_size: Particles in one forward and backward pass.
        obs_site: The likelihood's site, for the minibatch loss.
        args: The model's positional arguments.
        kwargs: The model's keyword arguments.

    Returns:
        Site -> direction (K, ...); and log joint (K,), norms of attraction and
        repulsion, and mean kernel value.
    """
    losses: list[Tensor] = []
    num_data: list[int] = []

    def objective(rows: slice, trace: Any, log_joint: Tensor) -> Tensor:
        if callable(strength):
            site = likelihood(trace, obs_site)
            losses.append(datum_loss(site, log_joint.shape[0]))
            num_data.append(data_plate(site).full_size)
        return log_joint.sum() / temperature

    gradients, log_joint = chunked_gradients(
        target, particles, chunk_size, objective, args, kwargs, {}
    )
    if isinstance(kernel, Zero):
        zero = log_joint.new_zeros(())
        return gradients, {
            "log_joint": log_joint,
            "attraction": transport.norm(gradients),
            "repulsion": zero,
            "mean_kernel": zero,
        }
    if callable(strength):
        strength = strength(float(torch.cat(losses).mean()), num_data[0])
    fixed = {site: x.detach() for site, x in particles.items()}
    stein = form == "stein"
    if space == "delta":
        delta = DeltaSpace(target.networks)
        distances = delta.squared_distances(fixed)
        gram, slope = transport.gram_and_slope(kernel, distances)
        grams = dict.fromkeys(fixed, (gram, slope))
        repulsions = (
            delta.stein_repulsion(fixed, slope)
            if stein
            else delta.repel(fixed, gram, slope)
        )
    else:
        grams = _grams(kernel, space, fixed)
        repulsions = {
            site: transport.stein_repulsion(x, grams[site][1])
            if stein
            else transport.repel(x, *grams[site])
            for site, x in fixed.items()
        }
    if stein:
        attractions = {s: transport.attract(gradients[s], grams[s][0]) for s in fixed}
    else:
        attractions = gradients
        repulsions = {site: strength * x for site, x in repulsions.items()}
    return {s: attractions[s] + repulsions[s] for s in particles}, {
        "log_joint": log_joint,
        "attraction": transport.norm(attractions),
        "repulsion": transport.norm(repulsions),
        "mean_kernel": torch.stack(
            [transport.mean_off_diagonal(gram) for gram, _ in grams.values()]
        ).mean(),
    }


def _grams(
    kernel: Kernel, space: Space, particles: dict[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    distances = {s: transport.squared_distances(x) for s, x in particles.items()}
    if space == "site":
        return {s: transport.gram_and_slope(kernel, d) for s, d in distances.items()}
    joint = torch.stack(list(distances.values())).sum(0)
    return dict.fromkeys(particles, transport.gram_and_slope(kernel, joint))
