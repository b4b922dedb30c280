"""Repulsion of what particles predict on a batch that stays the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pyro_lora.infer.svgd import transport
from pyro_lora.infer.svgd.function_space import (
    Strength,
    minibatch,
    predictions,
    repulsion_in_function_space,
)
from pyro_lora.infer.svgd.kernels import Kernel
from pyro_lora.infer.svgd.outcomes import likelihood
from pyro_lora.infer.svgd.particle_model import ParticleModel, chunked_gradients
from pyro_lora.infer.svgd.weight_space import Gradients
from pyro_lora.likelihood.model_trace import Batch


def reference_direction(
    target: ParticleModel,
    particles: Mapping[str, Tensor],
    gradients: Gradients,
    reference: Batch,
    *,
    kernel: Kernel,
    temperature: float,
    strength: float | Strength,
    chunk_size: int,
    obs_site: str | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    r"""Own gradient plus repulsion of the predictions on a reference batch.

    :math:`\phi_i = \nabla_i \log p / T + \beta J_i^T v_i` with v the repulsion of the
    outputs on the reference batch and J their Jacobian (function-space particles, Wang
    et al. 2019, https://arxiv.org/abs/1902.09754).

    Args:
        target: The model.
        particles: Site -> (K, ...), unconstrained.
        gradients: Of the log joint, there, with the minibatch loss.
        reference: The model's keyword arguments, with labels or without.
        kernel: A function of squared distances.
        temperature: T.
        strength: :math:`\beta`, a number, or a function of (minibatch loss, N).
        chunk_size: Particles in one pass.
        obs_site: The likelihood's site.

    Returns:
        Site -> direction (K, ...); and log joint (K,), norms of attraction and
        repulsion of the weights, and mean kernel value.

    Raises:
        ValueError: If a log density or a gradient is NaN or infinite.
    """
    assert gradients.loss is not None
    assert gradients.num_data is not None
    if callable(strength):
        strength = strength(float(gradients.loss.mean()), gradients.num_data)
    found = minibatch(
        target,
        particles,
        ahead=chunk_size < len(gradients.log_joint),
        chunk_size=chunk_size,
        obs_site=obs_site,
        latent=target.latents,
        args=(),
        kwargs=dict(reference),
    )
    grams: list[Tensor] = []

    def objective(rows: slice, trace: Any, log_joint: Tensor) -> Tensor:
        site = likelihood(trace, obs_site, target.latents)
        own = predictions(site, log_joint.shape[0])
        everyone = own if found.ahead is None else found.ahead
        push, gram = repulsion_in_function_space(everyone, kernel)
        grams.append(gram)
        return (strength * push[rows] * own.outputs).sum()

    repulsions, _ = chunked_gradients(
        target,
        particles,
        chunk_size,
        objective,
        found.args,
        found.kwargs,
        dict(found.plates),
    )
    scores = {s: g / temperature for s, g in gradients.by_site.items()}
    return {s: scores[s] + repulsions[s] for s in scores}, {
        "log_joint": gradients.log_joint,
        "attraction": transport.norm(scores),
        "repulsion": transport.norm(repulsions),
        "mean_kernel": transport.mean_off_diagonal(grams[0]),
    }
