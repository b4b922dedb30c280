"""What particles predict on a minibatch, and how their predictions repel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_lora.curvature.data_plate import data_plate
from pyro_lora.curvature.fisher_roots import fisher_root
from pyro_lora.curvature.linearize import contrasts
from pyro_lora.infer import transport
from pyro_lora.infer.kernels import Kernel
from pyro_lora.infer.particle_model import (
    PARTICLE_PLATE,
    ParticleModel,
    chunked_gradients,
    chunks,
)
from pyro_lora.lifting.model_trace import observed_site

# Measured on MiniLM with 500 to 1,000 sentences: a strength of .4 N while particles
# fit a minibatch better than .3 nats per datum keeps most of what repulsion gains in
# overfitted training, and does no harm in ordinary training.
STRENGTH, LOSS_LEVEL = 0.4, 0.3

# Repulsion strength, a function of (minibatch loss in nats per datum, N).
Strength = Callable[[float, int], float]


def gated_strength(loss: float, num_data: int) -> float:
    """0.4 N times the share by which the loss lies below 0.3 nats per datum.

    A loss that is negative, since a density exceeds 1, counts as 0.
    """
    return STRENGTH * num_data * max(0.0, 1 - max(loss, 0.0) / LOSS_LEVEL)


@dataclass(frozen=True)
class Predictions:
    """What K particles predict on a minibatch of B data.

    Attributes:
        contrasts: Logit contrasts or location, (K, B, M), differentiable.
        loss: Negative log likelihood in nats per datum, (K,).
        score_norm: Norm of the full-data log likelihood's gradient in the contrasts,
            (K,).
        num_data: N.
    """

    contrasts: Tensor
    loss: Tensor
    score_norm: Tensor
    num_data: int


def likelihood(trace: Any, obs_site: str | None) -> dict[str, Any]:
    """The observed site in a trace of K particles, without the particles' plate."""
    site = observed_site(trace, obs_site)
    frames = [f for f in site["cond_indep_stack"] if f.name != PARTICLE_PLATE]
    return {**site, "cond_indep_stack": tuple(frames)}


def datum_loss(site: dict[str, Any], num_particles: int) -> Tensor:
    """Negative log likelihood in nats per datum, (K,), a constant."""
    log_prob = site["unscaled_log_prob"].detach().reshape(num_particles, -1)
    return -log_prob.mean(1)


def predictions(trace: Any, obs_site: str | None, num_particles: int) -> Predictions:
    """Read the observed site of a trace of K particles.

    Args:
        trace: Of the vectorised model.
        obs_site: The likelihood's site; None is the only observed one.
        num_particles: K.

    Returns:
        The particles' predictions.

    Raises:
        ValueError: If there is no such site, or it isn't Categorical, Bernoulli or
            Normal with one outcome a datum.
    """
    site = likelihood(trace, obs_site)
    fn, plate = site["fn"], data_plate(site)
    if fn.event_shape:
        raise ValueError(
            f"Site {site['name']!r}: function space is for one outcome a datum; found "
            f"event shape {tuple(fn.event_shape)}. Use another space."
        )
    values, basis = contrasts(fn)
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    with torch.no_grad():
        root = fisher_root(fn, site["value"])
        score = (root.root @ root.coordinates[..., None])[..., 0]
        if score.shape[-1] == basis.shape[0]:
            score = score @ basis.to(score)
        score = score[..., : values.shape[-1]]  # a Normal may have its scale, too
        score = score.reshape(num_particles, -1) * plate.full_size / plate.size
    return Predictions(
        values.reshape(num_particles, -1, values.shape[-1]),
        datum_loss(site, num_particles),
        score.norm(dim=1),
        plate.full_size,
    )


def repulsion_in_function_space(
    found: Predictions, kernel: Kernel
) -> tuple[Tensor, Tensor]:
    r"""Gradient of :math:`-\log \sum_j k(f_i, f_j)` in :math:`f_i`, others held fixed.

    The squared distance is that of the contrasts, averaged over the minibatch.

    Args:
        found: Predictions of all particles.
        kernel: A function of squared distances.

    Returns:
        Directions (K, B, M) and the Gram matrix (K, K).
    """
    f = found.contrasts.detach()
    batch_size = f.shape[1]
    sq_dists = transport.squared_distances(f) / batch_size
    gram, slope = transport.gram_and_slope(kernel, sq_dists)
    return transport.repel(f, gram, slope) / batch_size, gram


def function_space_direction(
    target: ParticleModel,
    particles: dict[str, Tensor],
    *,
    kernel: Kernel,
    temperature: float,
    strength: float | Strength,
    chunk_size: int,
    obs_site: str | None,
    args: Any,
    kwargs: Any,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    r"""Own gradient plus repulsion of the predictions, pulled back to the weights.

    :math:`\phi_i = \nabla_i \log p / T + \beta J_i^T v_i` with v the repulsion of the
    contrasts and J their Jacobian, in one backward pass.

    Args:
        target: The model.
        particles: Site -> (K, ...), unconstrained.
        kernel: A function of squared distances.
        temperature: T.
        strength: :math:`\beta`, a number, or a function of (minibatch loss, N).
        chunk_size: Particles in one pass; below K, a forward pass comes first.
        obs_site: The likelihood's site.
        args: The model's positional arguments.
        kwargs: The model's keyword arguments.

    Returns:
        Site -> direction (K, ...); and log joint (K,), norms of attraction and
        repulsion of the contrasts, and mean kernel value.
    """
    num_particles = next(iter(particles.values())).shape[0]
    minibatch: dict[str, Tensor] = {}
    ahead: Predictions | None = None
    if chunk_size < num_particles:
        parts = []
        with torch.no_grad():
            for rows in chunks(num_particles, chunk_size):
                some = {s: x[rows] for s, x in particles.items()}
                trace, _ = target.trace(some, args, kwargs, minibatch)
                parts.append(predictions(trace, obs_site, rows.stop - rows.start))
        ahead = _join(parts)
    series: dict[str, Tensor] = {}

    def objective(rows: slice, trace: Any, log_joint: Tensor) -> Tensor:
        own = predictions(trace, obs_site, log_joint.shape[0])
        everyone = own if ahead is None else ahead
        push, gram = repulsion_in_function_space(everyone, kernel)
        push = push * (
            strength(float(everyone.loss.mean()), everyone.num_data)
            if callable(strength)
            else strength
        )
        series["attraction"] = everyone.score_norm.square().mean().sqrt() / temperature
        series["repulsion"] = transport.norm({"function": push})
        series["mean_kernel"] = transport.mean_off_diagonal(gram)
        return log_joint.sum() / temperature + (push[rows] * own.contrasts).sum()

    direction, log_joint = chunked_gradients(
        target, particles, chunk_size, objective, args, kwargs, minibatch
    )
    return direction, {"log_joint": log_joint, **series}


def _join(parts: Sequence[Predictions]) -> Predictions:
    return Predictions(
        torch.cat([p.contrasts for p in parts]),
        torch.cat([p.loss for p in parts]),
        torch.cat([p.score_norm for p in parts]),
        parts[0].num_data,
    )
