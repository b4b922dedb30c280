"""What particles predict on a minibatch, and how their predictions repel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch import distributions as td

from pyro_lora.curvature.factors import at_least_float32
from pyro_lora.infer.svgd import transport
from pyro_lora.infer.svgd.kernels import Kernel
from pyro_lora.infer.svgd.outcomes import datum_loss, likelihood
from pyro_lora.infer.svgd.particle_model import (
    ParticleModel,
    batch_size,
    chunked_gradients,
    chunks,
)
from pyro_lora.likelihood.data_plate import data_plate
from pyro_lora.likelihood.fisher_roots import fisher_root
from pyro_lora.likelihood.outcomes import outcomes_that_count, single_outcomes

# Measured on MiniLM with 500 to 1,000 sentences: a strength of .4 N while particles
# fit a minibatch better than .3 nats per datum keeps most of what repulsion gains in
# overfitted training, and does no harm in ordinary training.
STRENGTH, LOSS_LEVEL = 0.4, 0.3

# Roots of distributions whose parameter is the logits of classes, and distributions
# whose first parameter is a location.
ROOTS_OF_LOGITS = [
    fisher_root.dispatch(kind)
    for kind in (td.Categorical, td.OneHotCategorical, td.Multinomial)
]
LOCATION_SCALE = (td.Normal, td.StudentT, td.Laplace)

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
        outputs: Natural parameters of all outcomes that count, (K, M), differentiable.
        loss: Negative log likelihood in nats per datum, (K,).
        size: Data that count: those of which an outcome isn't masked.
        score_norm: Norm of the full-data log likelihood's gradient in the outputs,
            (K,).
        num_data: N.
    """

    outputs: Tensor
    loss: Tensor
    size: int
    score_norm: Tensor
    num_data: int


def predictions(site: dict[str, Any], num_particles: int) -> Predictions:
    """What the likelihood says of its outcomes: their natural parameters.

    Args:
        site: Of the likelihood, in a trace of K particles with its log densities.
        num_particles: K.

    Returns:
        The particles' predictions.

    Raises:
        TypeError: If the natural parameter of its distribution isn't known.
    """
    plate = data_plate(site)
    outputs, score = _outputs_and_score(site, num_particles)
    loss, size = datum_loss(site, num_particles)
    return Predictions(
        outputs.flatten(1),
        loss,
        size,
        score.flatten(1).norm(dim=1) * plate.full_size / plate.size,
        plate.full_size,
    )


def _outputs_and_score(site: dict[str, Any], num_particles: int) -> tuple[Tensor, ...]:
    """Of the E outcomes that count, both (K, E, P); the score is a constant.

    Raises:
        TypeError: If the natural parameter of the distribution isn't known.
    """
    fn, counts = single_outcomes(site["fn"]).fn, outcomes_that_count(site)
    counts = counts.reshape(num_particles, -1)[0]

    def counted(x: Tensor) -> Tensor:
        x = x.expand(*fn.batch_shape, x.shape[-1])
        return x.reshape(num_particles, counts.numel(), -1)[:, counts]

    if fisher_root.dispatch(type(fn)) in ROOTS_OF_LOGITS:  # a root would be (C, C - 1)
        value = site["value"] if fn.event_dim else site["value"][..., None]
        outputs = at_least_float32(counted(fn.logits))
        with torch.no_grad():
            score = _score_in_logits(fn, outputs, counted(value))
        # Adding to all logits says nothing, nor does a choice that isn't there.
        present = outputs > -math.inf
        outputs = outputs.where(present, torch.zeros_like(outputs))
        mean = outputs.sum(-1, keepdim=True) / present.sum(-1, keepdim=True)
        return (outputs - mean) * present, score
    try:
        root = fisher_root(_without_cutpoints(fn), site["value"])
    except TypeError as error:
        raise TypeError(
            f"Site {site['name']!r}: function space compares natural parameters, and "
            f"that of {type(fn).__name__} isn't known. Use another space, or register "
            "the type with pyro_lora.fisher_root.register."
        ) from error
    outputs = counted(root.parameter)
    with torch.no_grad():
        score = counted((root.root @ root.coordinates[..., None])[..., 0])
    if isinstance(fn, LOCATION_SCALE):  # without the scale, if that is trained
        return outputs[..., :1], score[..., :1]
    return outputs, score


def _without_cutpoints(fn: Any) -> Any:
    """The same with trained cutpoints held fixed, as a location without its scale."""
    if not isinstance(fn, dist.OrderedLogistic):
        return fn
    return dist.OrderedLogistic(fn.predictor, fn.cutpoints.detach())


def _score_in_logits(fn: Any, logits: Tensor, value: Tensor) -> Tensor:
    """Counts of the classes less those expected, (..., C)."""
    probs = logits.softmax(-1)
    if isinstance(fn, td.Multinomial):
        return value - value.sum(-1, keepdim=True) * probs
    if fn.event_dim > 0:  # one-hot: the largest entry is the label, as in its log_prob
        value = value.argmax(-1, keepdim=True)
    one = torch.ones_like(value, dtype=probs.dtype)
    return probs.neg_().scatter_add_(-1, value.long(), one)


def repulsion_in_function_space(
    found: Predictions, kernel: Kernel
) -> tuple[Tensor, Tensor]:
    r"""Gradient of :math:`-\log \sum_j k(f_i, f_j)` in :math:`f_i`, others held fixed.

    The squared distance is that of the outputs, averaged over the data that count.

    Args:
        found: Predictions of all particles.
        kernel: A function of squared distances.

    Returns:
        Directions (K, M) and the Gram matrix (K, K).
    """
    f = found.outputs.detach()
    num_data = max(1, found.size)
    sq_dists = transport.squared_distances(f) / num_data
    gram, slope = transport.gram_and_slope(kernel, sq_dists)
    _, push = transport.repulsive_weights(gram, slope)
    return transport.repel(f, push) / num_data, gram


@dataclass(frozen=True)
class Minibatch:
    """A batch of one update, and what the particles predict on it.

    Attributes:
        args: The model's positional arguments.
        kwargs: The model's keyword arguments.
        plates: Plate -> its indices, as far as the model draws them itself.
        ahead: The predictions, constants; None where one pass finds them and their
            gradients.
        log_joint: (K,), nats, full data; None likewise.
        size: Data in the batch; None likewise.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    plates: dict[str, Tensor]
    ahead: Predictions | None
    log_joint: Tensor | None
    size: int | None


@dataclass(frozen=True)
class Minibatches:
    """The batches of one update."""

    batches: tuple[Minibatch, ...]


def minibatch(
    target: ParticleModel,
    particles: Mapping[str, Tensor],
    *,
    ahead: bool,
    chunk_size: int,
    obs_site: str | None,
    latent: Iterable[str] | None = None,
    args: Any,
    kwargs: Any,
) -> Minibatch:
    """A batch of one update.

    Args:
        target: The model.
        particles: Site -> (K, ...), unconstrained.
        ahead: Predict by a forward pass of its own: all particles' predictions on all
            batches of the update must be known before the gradient of any.
        chunk_size: Particles in one pass.
        obs_site: The likelihood's site.
        latent: The latent sites, where the outcomes need not be observed.
        args: The model's positional arguments.
        kwargs: The model's keyword arguments.

    Returns:
        The batch.

    Raises:
        ValueError: If labels are missing, or a log density is NaN or infinite.
    """
    if not ahead:
        return Minibatch(args, dict(kwargs), {}, None, None, None)
    plates: dict[str, Tensor] = {}
    parts, log_joints, size = [], [], 1
    num_particles = next(iter(particles.values())).shape[0]
    with torch.no_grad():
        for rows in chunks(num_particles, chunk_size):
            some = {s: x[rows] for s, x in particles.items()}
            trace, log_joint = target.finite_trace(
                some, args, kwargs, plates, rows.start
            )
            log_joints.append(log_joint)
            if latent is None:
                target.check_observed(trace, obs_site)
            site = likelihood(trace, obs_site, latent)
            parts.append(predictions(site, rows.stop - rows.start))
            size = batch_size(trace)
    found = Predictions(
        torch.cat([p.outputs for p in parts]),
        torch.cat([p.loss for p in parts]),
        parts[0].size,
        torch.cat([p.score_norm for p in parts]),
        parts[0].num_data,
    )
    return Minibatch(args, dict(kwargs), plates, found, torch.cat(log_joints), size)


def function_space_direction(
    target: ParticleModel,
    particles: Mapping[str, Tensor],
    batches: Sequence[Minibatch],
    *,
    kernel: Kernel,
    temperature: float,
    strength: float | Strength,
    chunk_size: int,
    obs_site: str | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    r"""Own gradient plus repulsion of the predictions, pulled back to the weights.

    :math:`\phi_i = \nabla_i \log p / T + \beta J_i^T v_i` with v the repulsion of the
    outputs on all batches and J their Jacobian, in one backward pass a batch.

    Args:
        target: The model.
        particles: Site -> (K, ...), unconstrained.
        batches: Of the update. One without predictions is alone, and not in chunks.
        kernel: A function of squared distances.
        temperature: T.
        strength: :math:`\beta`, a number, or a function of (minibatch loss, N).
        chunk_size: Particles in one pass.
        obs_site: The likelihood's site.

    Returns:
        Site -> direction (K, ...); and log joint (K,), norms of attraction and
        repulsion of the outputs, and mean kernel value.
    """
    sizes = [1 if batch.size is None else batch.size for batch in batches]
    shares = [size / sum(sizes) for size in sizes]
    everyone = _joined([b.ahead for b in batches if b.ahead is not None], shares)
    series: dict[str, Tensor] = {}

    def push_on(known: Predictions) -> Tensor:
        push, gram = repulsion_in_function_space(known, kernel)
        push = push * (
            strength(float(known.loss.mean()), known.num_data)
            if callable(strength)
            else strength
        )
        series["attraction"] = known.score_norm.square().mean().sqrt() / temperature
        series["repulsion"] = transport.norm({"function": push})
        series["mean_kernel"] = transport.mean_off_diagonal(gram)
        return push

    pushes: Sequence[Tensor | None] = [None]
    if everyone is not None:
        counts = [b.ahead.outputs.shape[1] for b in batches if b.ahead is not None]
        pushes = push_on(everyone).split(counts, dim=1)
    direction: dict[str, Tensor] = {}
    log_joint = torch.zeros(())
    for batch, share, push in zip(batches, shares, pushes, strict=True):

        def objective(
            rows: slice,
            trace: Any,
            log_joint: Tensor,
            share: float = share,
            push: Tensor | None = push,
        ) -> Tensor:
            target.check_observed(trace, obs_site)
            own = predictions(likelihood(trace, obs_site), log_joint.shape[0])
            known = push_on(own) if push is None else push
            own_term = share * log_joint.sum() / temperature
            return own_term + (known[rows] * own.outputs).sum()

        found, of_batch = chunked_gradients(
            target,
            particles,
            chunk_size,
            objective,
            batch.args,
            batch.kwargs,
            dict(batch.plates),
        )
        direction = {s: g + direction.get(s, 0) for s, g in found.items()}
        log_joint = log_joint.to(of_batch) + share * of_batch
    return direction, {"log_joint": log_joint, **series}


def _joined(
    parts: Sequence[Predictions], shares: Sequence[float]
) -> Predictions | None:
    """Predictions on all batches; the score's norm is that of one batch of them all."""
    if not parts:
        return None
    size = sum(p.size for p in parts)
    losses = torch.stack([p.size / max(1, size) * p.loss for p in parts])
    # A score is scaled to the full data by N / B, and here by N / (the sum of B).
    norms = torch.stack([s * p.score_norm for s, p in zip(shares, parts, strict=True)])
    return Predictions(
        torch.cat([p.outputs for p in parts], 1),
        losses.sum(0),
        size,
        norms.square().sum(0).sqrt(),
        parts[0].num_data,
    )
