"""Directions of particles under a kernel between their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_lora.infer.svgd import transport
from pyro_lora.infer.svgd.coordinate_space import coordinate_direction
from pyro_lora.infer.svgd.delta_space import DeltaSpace
from pyro_lora.infer.svgd.function_space import Strength
from pyro_lora.infer.svgd.kernels import Kernel, NoRepulsion, Space
from pyro_lora.infer.svgd.outcomes import datum_loss, likelihood
from pyro_lora.infer.svgd.particle_model import (
    ParticleModel,
    batch_size,
    chunked_gradients,
)
from pyro_lora.infer.svgd.preconditioner import Preconditioner
from pyro_lora.likelihood.data_plate import data_plate


@dataclass(frozen=True)
class Gradients:
    """Gradients of the log joint at K particles, from one batch or several.

    Attributes:
        by_site: Site -> (K, ...), nats, full data.
        log_joint: (K,), nats, full data.
        batch_size: Data in the batches.
        loss: Negative log likelihood in nats per datum, (K,); None where unasked.
        loss_size: Data that the loss is of: those that aren't masked.
        num_data: N; None likewise.
    """

    by_site: dict[str, Tensor]
    log_joint: Tensor
    batch_size: int
    loss: Tensor | None
    loss_size: int
    num_data: int | None

    def joined(self, other: Gradients) -> Gradients:
        """What one batch with the data of both would give: each datum counts alike."""
        batch_size = self.batch_size + other.batch_size
        share = other.batch_size / batch_size
        loss, loss_size = self.loss, self.loss_size + other.loss_size
        if loss is not None and other.loss is not None:
            loss = loss.lerp(other.loss.to(loss), other.loss_size / max(1, loss_size))
        return Gradients(
            {s: g.lerp(other.by_site[s], share) for s, g in self.by_site.items()},
            self.log_joint.lerp(other.log_joint.to(self.log_joint), share),
            batch_size,
            loss,
            loss_size,
            self.num_data,
        )


def log_joint_gradients(
    target: ParticleModel,
    particles: Mapping[str, Tensor],
    *,
    with_loss: bool,
    chunk_size: int,
    obs_site: str | None,
    args: Any,
    kwargs: Any,
) -> Gradients:
    """Gradients of the log joint on one batch.

    Args:
        target: The model.
        particles: Site -> (K, ...), unconstrained.
        with_loss: Also find the minibatch loss.
        chunk_size: Particles in one forward and backward pass.
        obs_site: The likelihood's site, for the minibatch loss; it must be observed.
        args: The model's positional arguments.
        kwargs: The model's keyword arguments.

    Returns:
        The gradients.

    Raises:
        ValueError: If labels are missing, or a log density or a gradient is NaN or
            infinite.
    """
    losses: list[Tensor] = []
    sizes: list[int] = []
    loss_size, num_data = 0, None

    def objective(rows: slice, trace: Any, log_joint: Tensor) -> Tensor:
        nonlocal loss_size, num_data
        target.check_observed(trace, obs_site)
        sizes.append(batch_size(trace))
        if with_loss:
            site = likelihood(trace, obs_site)
            loss, loss_size = datum_loss(site, log_joint.shape[0])
            losses.append(loss)
            num_data = data_plate(site).full_size
        return log_joint.sum()

    gradients, log_joint = chunked_gradients(
        target, particles, chunk_size, objective, args, kwargs, {}
    )
    return Gradients(
        gradients,
        log_joint,
        sizes[0],
        torch.cat(losses) if with_loss else None,
        loss_size,
        num_data,
    )


def weight_space_direction(
    target: ParticleModel,
    particles: Mapping[str, Tensor],
    gradients: Gradients,
    *,
    kernel: Kernel | NoRepulsion,
    space: Space,
    form: Literal["stein", "repulsive"],
    temperature: float,
    strength: float | Strength,
    preconditioner: Preconditioner | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    r"""Stein or repulsive direction with a kernel between weights or their updates.

    With a preconditioner P it is that of the coordinates :math:`P^{1/2} x`, in x:
    :math:`P^{-1}` times the direction, distances by P (Wang et al. 2019,
    https://arxiv.org/abs/1910.12794, the constant preconditioner). The gradient of
    such a distance is P times the difference, so that the repulsion needs no P at all.

    Args:
        target: The model.
        particles: Site -> (K, ...), unconstrained.
        gradients: Of the log joint, there.
        kernel: A function of squared distances, or ``NoRepulsion()``.
        space: ``"joint"``, ``"site"``, ``"coordinate"`` or ``"delta"``.
        form: ``"stein"`` or ``"repulsive"``.
        temperature: T.
        strength: Of the repulsive form: a number, or a function of (minibatch loss,
            N).
        preconditioner: P, for joint or site space.

    Returns:
        Site -> direction (K, ...); and log joint (K,), norms of attraction and
        repulsion, and mean kernel value.
    """
    scores, fixed = gradients.by_site, {s: x.detach() for s, x in particles.items()}
    if preconditioner is not None:
        scores = preconditioner.times_covariance(scores)
    series = {"log_joint": gradients.log_joint}
    if callable(strength):
        assert gradients.loss is not None
        assert gradients.num_data is not None
        strength = strength(float(gradients.loss.mean()), gradients.num_data)
    if not isinstance(kernel, NoRepulsion) and space in ("joint", "site"):
        grams = _grams(kernel, space, fixed, preconditioner)
        direction, squares = {}, []
        for site, x in fixed.items():
            pull, push = _weights(form, *grams[site], strength)
            direction[site], found = transport.combine(
                scores[site], x, pull / temperature, push
            )
            squares.append(found)
        norms = (torch.stack(squares).sum(0) / len(gradients.log_joint)).sqrt()
        mean_kernels = [transport.mean_off_diagonal(gram) for gram, _ in grams.values()]
        mean_kernel = torch.stack(mean_kernels).mean()
        series |= {"attraction": norms[0], "repulsion": norms[1]}
        return direction, {**series, "mean_kernel": mean_kernel}
    scores = {s: g / temperature for s, g in scores.items()}
    if isinstance(kernel, NoRepulsion):
        zero = gradients.log_joint.new_zeros(())
        series |= {"attraction": transport.norm(scores), "repulsion": zero}
        return scores, {**series, "mean_kernel": zero}
    if space == "coordinate":
        attractions, repulsions, mean_kernel = coordinate_direction(
            kernel, fixed, scores, form
        )
    else:
        delta = DeltaSpace(target.networks)
        gram, slope = transport.gram_and_slope(kernel, delta.squared_distances(fixed))
        pull, _ = _weights(form, gram, slope, strength)
        attractions = {s: transport.attract(x, pull) for s, x in scores.items()}
        repulsions = (
            delta.stein_repulsion(fixed, slope)
            if form == "stein"
            else delta.repel(fixed, gram, slope)
        )
        mean_kernel = transport.mean_off_diagonal(gram)
    if form == "repulsive":
        repulsions = {site: strength * x for site, x in repulsions.items()}
    series |= {
        "attraction": transport.norm(attractions),
        "repulsion": transport.norm(repulsions),
        "mean_kernel": mean_kernel,
    }
    return {s: attractions[s] + repulsions[s] for s in particles}, series


def _weights(
    form: Literal["stein", "repulsive"], gram: Tensor, slope: Tensor, strength: float
) -> tuple[Tensor, Tensor]:
    """The matrices (K, K) of both terms."""
    if form == "stein":
        return transport.stein_weights(gram, slope)
    pull, push = transport.repulsive_weights(gram, slope)
    return pull, strength * push


def _grams(
    kernel: Kernel,
    space: Space,
    particles: dict[str, Tensor],
    preconditioner: Preconditioner | None,
) -> dict[str, tuple[Tensor, Tensor]]:
    if preconditioner is None:
        products = {s: transport.centred_products(x) for s, x in particles.items()}
    else:
        centred = {s: x - x.mean(0) for s, x in particles.items()}
        weighted = preconditioner.times_precision(centred)
        products = {s: transport.products(x, weighted[s]) for s, x in centred.items()}
    if space == "joint":
        joint = torch.stack(list(products.values())).sum(0)
        distances = transport.distances_from_products(joint)
        return dict.fromkeys(particles, transport.gram_and_slope(kernel, distances))
    return {
        s: transport.gram_and_slope(kernel, transport.distances_from_products(gram))
        for s, gram in products.items()
    }
