"""How many different predictions particles make."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
import torch.distributions as td
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_lora.ground.settings import check_count
from pyro_lora.infer.svgd.model_at_particles import model_at_particles
from pyro_lora.infer.svgd.outcomes import likelihood
from pyro_lora.infer.svgd.particle_model import chunks
from pyro_lora.likelihood.batch import check_batches, checked_batches
from pyro_lora.likelihood.model_trace import Batch, Model, evaluating
from pyro_lora.likelihood.outcomes import outcomes_that_count, single_outcomes


@dataclass(frozen=True)
class Outcomes:
    """What K particles say of the outcomes of B data.

    Attributes:
        parameters: (K, B, E, P), of E outcomes a datum.
        affinity: Bhattacharyya coefficients (K, K, B, E) of the parameters.
        counts: Which outcomes count, (B, E).
    """

    parameters: Tensor
    affinity: Callable[[Tensor], Tensor]
    counts: Tensor

    def gram(self) -> Tensor:
        """Affinities of the particles' predictions, mean over the data, (K, K)."""
        # of outcomes that don't count, all particles say the same
        by_outcome = self.affinity(self.parameters).where(self.counts, 1)
        # outcomes of one datum are independent given the weights: affinities multiply
        return by_outcome.prod(-1).mean(-1)


@singledispatch
def outcome_parameters(fn: object) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Parameters (..., P) of an outcome, float64, and how their affinity is found.

    Args:
        fn: The likelihood's distribution, of batch shape (...).

    Raises:
        ValueError: If the type has no affinity here.
    """
    raise ValueError(
        f"No affinity between predictions of type {type(fn).__name__}; expected "
        "Categorical, Bernoulli or Normal, or independent ones as one event."
    )


@outcome_parameters.register
def _categorical(fn: td.Categorical) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    return fn.logits.double().log_softmax(-1), _affinity_of_classes


@outcome_parameters.register
def _bernoulli(fn: td.Bernoulli) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    logits = fn.logits.double()
    log_probs = torch.stack([logsigmoid(-logits), logsigmoid(logits)], -1)
    return log_probs, _affinity_of_classes


@outcome_parameters.register
def _normal(fn: td.Normal) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    return torch.stack([fn.loc, fn.scale], -1).double(), _affinity_of_normals


def outcomes(site: dict[str, Any], num_particles: int) -> Outcomes:
    """What K particles say of the outcomes, by the likelihood in their trace.

    Args:
        site: Of the likelihood, of batch shape (K, ...).
        num_particles: K.

    Raises:
        ValueError: If the type has no affinity here.
    """
    fn, counts = single_outcomes(site["fn"]).fn, outcomes_that_count(site)
    parameters, affinity = outcome_parameters(fn)
    shape = (num_particles, -1, site["fn"].event_shape.numel())
    return Outcomes(
        parameters.detach().reshape(*shape, parameters.shape[-1]),
        affinity,
        counts.reshape(shape)[0],
    )


def joined(parts: Sequence[Outcomes]) -> Outcomes:
    """The outcomes of all particles, from those of some."""
    return Outcomes(
        torch.cat([p.parameters for p in parts]),
        parts[0].affinity,
        parts[0].counts,
    )


def effective_number(gram: Tensor) -> Tensor:
    r"""Exponential of the entropy of a Gram matrix's eigenvalues, a scalar.

    :math:`\exp(-\sum_k \lambda_k \log \lambda_k)` with :math:`\lambda` the eigenvalues
    of Gram / K (Friedman & Dieng 2023, https://arxiv.org/abs/2210.02410, eq. 1).

    Args:
        gram: (K, K), ones on the diagonal.
    """
    eigenvalues = torch.linalg.eigvalsh(gram.double() / gram.shape[0])
    return torch.special.entr(eigenvalues.clamp_min(0)).sum().exp()


@torch.no_grad()
def effective_num_predictions(
    model: Model,
    particles: Mapping[str, Tensor],
    batches: Iterable[Batch],
    *,
    obs_site: str | None = None,
    chunk_size: int | None = None,
) -> float:
    r"""Effective number of distinct predictions among particles, from 1 to K.

    The Vendi score :math:`\exp(-\sum_k \lambda_k \log \lambda_k)`, with :math:`\lambda`
    the eigenvalues of the matrix of similarities over K (Friedman & Dieng 2023,
    https://arxiv.org/abs/2210.02410, eq. 1). The similarity of two particles is the
    Bhattacharyya coefficient :math:`\int \sqrt{p_i(y | x) p_j(y | x)} \, dy` of their
    predictive distributions, mean over the data. All alike give 1; K particles of which
    no two believe in the same outcome give K. Where data leave no doubt and all
    particles see that, it is near 1, as it should be.

    Args:
        model: A Pyro model, whose likelihood is Categorical, Bernoulli or Normal, or
            an event of independent ones.
        particles: Site -> (K, ...), on the sites' supports, such as
            ``posterior.particles``.
        batches: Mappings of model keyword arguments, labels included (which don't
            matter).
        obs_site: The likelihood's site; None is the only observed one.
        chunk_size: Particles in one forward pass; None is all.

    Raises:
        ValueError: If there is nothing to go through, the model can't be run by
            particles, a site is missing or has another shape, or the likelihood is of
            another type.
    """
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    total, num_data = torch.zeros(()), 0
    check_batches(batches)
    for batch in checked_batches(batches):
        target, unconstrained = model_at_particles(model, particles, batch)
        num_particles = next(iter(unconstrained.values())).shape[0]
        parts = []
        plates: dict[str, Tensor] = {}
        with evaluating(target.networks):
            for rows in chunks(num_particles, chunk_size or num_particles):
                some = {site: x[rows] for site, x in unconstrained.items()}
                trace, _ = target.trace(some, (), batch, plates)
                site = likelihood(trace, obs_site)
                parts.append(outcomes(site, rows.stop - rows.start))
        found = joined(parts)
        size = found.parameters.shape[1]
        total, num_data = total + size * found.gram(), num_data + size
    if num_data == 0:
        raise ValueError("There are no batches to predict.")
    return float(effective_number(total / num_data))


def _affinity_of_classes(log_probs: Tensor) -> Tensor:
    roots = (log_probs / 2).exp()
    return torch.einsum("kbec,jbec->kjbe", roots, roots)


def _affinity_of_normals(parameters: Tensor) -> Tensor:
    loc, scale = parameters.unbind(-1)
    variances = scale[:, None].square() + scale.square()
    gap = (loc[:, None] - loc).square() / (4 * variances)
    return (2 * scale[:, None] * scale / variances).sqrt() * (-gap).exp()
