r"""Repulsion between what particles predict on a minibatch.

.. math::

    \phi_i = \nabla_i \log p / T - \beta J_i^T \nabla_{f_i} \log \sum_j k(f_i, f_j)

with :math:`f_i` the natural parameters of particle i's likelihood at the B data of the
minibatch, J their Jacobian in its weights, other particles held fixed, and
:math:`d^2_{ij} = \frac1B \sum_b |f_{ib} - f_{jb}|^2` (function-space particles, Wang et
al. 2019, https://arxiv.org/abs/1902.09754; D'Angelo & Fortuin 2021). The Jacobian isn't
formed: the second term is the gradient of :math:`v_i^T f_i` with v held fixed, in the
same backward pass as the first. A softmax's logits are less their mean over classes,
since adding to all of them says nothing: (1, 3) and (0, 2) are no distance apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_lora.curvature.factors import at_least_float32
from pyro_lora.infer.svgd import weight_space
from pyro_lora.infer.svgd.kernels import Kernel
from pyro_lora.infer.svgd.particle_model import (
    ParticleModel,
    ParticlePass,
    datum_loss,
    likelihood_at_particles,
)
from pyro_lora.infer.svgd.weight_space import (
    REPULSIVE,
    Direction,
    Repulsion,
    Transport,
)
from pyro_lora.likelihood import likelihoods
from pyro_lora.likelihood.data_plate import data_plate
from pyro_lora.likelihood.outcomes import outcomes_that_count, single_outcomes

# Measured on MiniLM with 500 to 1,000 sentences: a strength of .4 N while particles
# fit a minibatch better than .3 nats per datum keeps most of what repulsion gains in
# overfitted training, and does no harm in ordinary training.
REPULSION, LOSS_LEVEL = 0.4, 0.3


def gated_repulsion(loss: float, num_data: int) -> float:
    """0.4 N times the share by which the loss lies below 0.3 nats per datum.

    A loss that is negative, since a density exceeds 1, counts as 0.
    """
    return REPULSION * num_data * max(0.0, 1 - max(loss, 0.0) / LOSS_LEVEL)


@dataclass(frozen=True)
class Predictions:
    """What K particles predict on a minibatch of B data.

    Attributes:
        outputs: Predictors of all outcomes that count, (K, M), differentiable.
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
    """What the likelihood says of its outcomes: their predictors.

    Args:
        site: Of the likelihood, in a trace of K particles with its log densities.
        num_particles: K.

    Returns:
        The particles' predictions.

    Raises:
        TypeError: If the type of its distribution isn't known.
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
        TypeError: If the type of the distribution isn't known.
    """
    fn, counts = single_outcomes(site["fn"]).fn, outcomes_that_count(site)
    counts = counts.reshape(num_particles, -1)[0]

    def counted(x: Tensor) -> Tensor:
        x = x.expand(*fn.batch_shape, x.shape[-1])
        return x.reshape(num_particles, counts.numel(), -1)[:, counts]

    likelihood = likelihoods.of(fn)
    outputs = at_least_float32(counted(likelihood.predictor))
    with torch.no_grad():
        score = counted(likelihood.score(site["value"]))
    if not likelihood.up_to_shift:
        return outputs, score
    # Adding to all logits says nothing, nor does a choice that isn't there.
    present = outputs > -math.inf
    outputs = outputs.where(present, torch.zeros_like(outputs))
    mean = outputs.sum(-1, keepdim=True) / present.sum(-1, keepdim=True)
    return (outputs - mean) * present, score


@dataclass(frozen=True)
class FunctionSpace:
    """The predictions on the minibatch.

    Attributes:
        kernel: A function of squared distances.
        transport: The repulsive one.

    Raises:
        ValueError: If it is another.
    """

    kernel: Kernel
    transport: Transport = REPULSIVE

    def __post_init__(self) -> None:
        if self.transport != REPULSIVE:
            raise ValueError(
                "Function space has the repulsive transport only. Leave transport=None."
            )

    @property
    def default_repulsion(self) -> Repulsion:
        """A gate, by the minibatch loss."""
        return gated_repulsion

    def check(self, target: ParticleModel) -> None:
        """Every model will do, until its likelihood is seen."""

    def direction(
        self, at: ParticlePass, temperature: float, repulsion: Repulsion
    ) -> Direction:
        """Own gradients and the repulsion of the outputs, pulled back to the weights.

        One backward pass; in chunks there's a forward pass before it, since all
        particles' outputs must be known before the gradient of any.
        """
        pushes: list[Push] = []
        if at.chunk_size < at.num_particles:
            pushes.append(self._push(predictions_ahead(at), repulsion))

        def objective(rows: slice, trace: Any, log_joint: Tensor) -> Tensor:
            at.target.check_observed(trace)
            site = likelihood_at_particles(trace, at.target.obs_site)
            own = predictions(site, log_joint.shape[0])
            if not pushes:  # these are all particles
                pushes.append(self._push(own, repulsion))
            push = pushes[0].by_output[rows]
            # d/dw of v^T f(w) is J^T v: both terms in one backward pass.
            return log_joint.sum() / temperature + (push * own.outputs).sum()

        by_site, log_joint = at.gradients(objective)
        push = pushes[0]
        return Direction(
            by_site,
            log_joint,
            push.score_norm / temperature,
            weight_space.norm({"outputs": push.by_output}),
            weight_space.mean_off_diagonal(push.gram),
        )

    def _push(self, own: Predictions, repulsion: Repulsion) -> Push:
        """The outputs' repulsion, by distances averaged over the data that count."""
        f, num_data = own.outputs.detach(), max(1, own.size)
        sq_dists = weight_space.squared_distances(f) / num_data
        gram, slope = weight_space.gram_and_slope(self.kernel, sq_dists)
        _, push = self.transport.weights(gram, slope, 1.0)
        if callable(repulsion):
            repulsion = repulsion(float(own.loss.mean()), own.num_data)
        return Push(
            weight_space.repel(f, push) / num_data * repulsion,
            gram,
            own.score_norm.square().mean().sqrt(),
        )


@dataclass(frozen=True)
class Push:
    """The repulsion of the outputs of K particles.

    Attributes:
        by_output: (K, M).
        gram: (K, K).
        score_norm: Root mean square of that of the predictions, a scalar.
    """

    by_output: Tensor
    gram: Tensor
    score_norm: Tensor


@torch.no_grad()
def predictions_ahead(at: ParticlePass) -> Predictions:
    """All particles' predictions, by a forward pass of their own.

    Raises:
        ValueError: If labels are missing, or a log density is NaN or infinite.
    """
    chunks = []
    for rows, trace, _ in at.forward():
        at.target.check_observed(trace)
        site = likelihood_at_particles(trace, at.target.obs_site)
        chunks.append(predictions(site, rows.stop - rows.start))
    return Predictions(
        torch.cat([p.outputs for p in chunks]),
        torch.cat([p.loss for p in chunks]),
        chunks[0].size,
        torch.cat([p.score_norm for p in chunks]),
        chunks[0].num_data,
    )
