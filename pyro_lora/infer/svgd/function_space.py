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

from pyro_lora.ground.accumulation import at_least_float32
from pyro_lora.ground.synchronisation import scalar
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
from pyro_lora.likelihood.outcomes import (
    may_not_count,
    outcomes_that_count,
    single_outcomes,
)

# Measured on MiniLM with 500 to 1,000 sentences: a strength of .4 N while particles
# fit a minibatch better than .3 nats per datum keeps most of what repulsion gains in
# overfitted training, and does no harm in ordinary training.
REPULSION, LOSS_LEVEL = 0.4, 0.3


def gated_repulsion(loss: Tensor, num_data: int) -> Tensor:
    """0.4 N times the share by which the loss lies below 0.3 nats per datum.

    A loss that is negative, since a density exceeds 1, counts as 0.
    """
    below = 1 - loss.double().clamp_min(0) / LOSS_LEVEL
    return REPULSION * num_data * below.clamp_min(0)


@dataclass(frozen=True)
class Predictions:
    """What K particles predict on a minibatch of B data.

    Attributes:
        outputs: Predictors of all outcomes, (K, M), differentiable; 0 where one doesn't
            count.
        loss: Negative log likelihood in nats per datum, (K,).
        size: Data that count, those of which an outcome isn't masked.
        score_norm: Norm of the full-data log likelihood's gradient in the outputs,
            (K,).
        num_data: N.
        batch_size: B.
    """

    outputs: Tensor
    loss: Tensor
    size: Tensor | int
    score_norm: Tensor
    num_data: int
    batch_size: int

    def over_ranks(self, at: ParticlePass) -> Predictions:
        """Those of all particles on the whole batch, of this rank's on its share.

        Args:
            at: The model at the particles, on the batch.
        """
        data = at.data_over
        if data.size == at.rows_over.size == 1:
            return self
        # Squares of a gradient's norm add up, but for each share's N / B.
        square = at.mean_over_data(
            self.score_norm.square() * self.batch_size, self.batch_size
        )
        batch_size = data.total(self.batch_size)
        return Predictions(
            at.whole(data.gathered(self.outputs.detach(), 1)),
            at.whole(at.mean_over_data(self.loss, self.size)),
            data.total(int(self.size)),
            at.whole((square / batch_size).sqrt()),
            self.num_data,
            batch_size,
        )


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
        plate.size,
    )


def _outputs_and_score(site: dict[str, Any], num_particles: int) -> tuple[Tensor, ...]:
    """Of E outcomes, both (K, E, P), 0 where one doesn't count; the score is constant.

    Raises:
        TypeError: If the type of the distribution isn't known.
    """
    fn = single_outcomes(site["fn"]).fn
    counts = None
    if may_not_count(site):  # the same for all particles
        counts = outcomes_that_count(site).reshape(num_particles, -1, 1)[:1]

    def counted(x: Tensor) -> Tensor:
        x = x.expand(*fn.batch_shape, x.shape[-1]).reshape(
            num_particles, fn.batch_shape.numel() // num_particles, -1
        )
        return x if counts is None else x.where(counts, torch.zeros_like(x))

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
        if not at.is_one_chunk:
            ahead = predictions_ahead(at).over_ranks(at)
            pushes.append(self._push(ahead, repulsion))
        columns: list[slice] = []

        def objective(rows: slice, trace: Any, log_joint: Tensor) -> Tensor:
            at.target.check_observed(trace)
            site = likelihood_at_particles(trace, at.target.obs_site)
            own = predictions(site, log_joint.shape[0])
            if not pushes:  # these are all particles
                pushes.append(self._push(own.over_ranks(at), repulsion))
            if not columns:
                columns.append(at.data_over.place(own.outputs.shape[1]))
            push = pushes[0].by_output[rows, columns[0]]
            # d/dw of v^T f(w) is J^T v: both terms in one backward pass.
            return log_joint.sum() / temperature + (push * own.outputs).sum()

        by_site, log_joint, nll = at.gradients(objective)
        push = pushes[0]
        return Direction(
            by_site,
            log_joint,
            nll,
            push.score_norm / temperature,
            weight_space.norm({"outputs": push.by_output}),
            weight_space.mean_off_diagonal(push.gram),
        )

    def _push(self, own: Predictions, repulsion: Repulsion) -> Push:
        """The outputs' repulsion, by distances averaged over the data that count."""
        f = own.outputs.detach()
        num_data = scalar(own.size, f).clamp_min(1)
        sq_dists = weight_space.squared_distances(f) / num_data
        gram, slope = weight_space.gram_and_slope(self.kernel, sq_dists)
        _, push = self.transport.weights(gram, slope, 1.0)
        if callable(repulsion):
            repulsion = repulsion(own.loss.mean(), own.num_data)
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
        chunks[0].batch_size,
    )
