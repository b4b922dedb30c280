"""How far particles or draws are from a model's posterior, by Stein's identity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_lora.ground.interrupts import leaving_no_trace
from pyro_lora.ground.progress import progress
from pyro_lora.ground.ranks import Ranks, ranks_of, sharing_data
from pyro_lora.ground.settings import check_count, check_positive
from pyro_lora.infer.svgd.kernels import (
    IMQ,
    Kernel,
    NoRepulsion,
    check_kernel,
    space_of,
)
from pyro_lora.infer.svgd.particle_model import (
    ParticleModel,
    ParticlePass,
    likelihood_at_particles,
    model_at_particles,
)
from pyro_lora.infer.svgd.weight_space import squared_distances
from pyro_lora.likelihood.batch import Batch, check_batches, checked_batches
from pyro_lora.likelihood.data_plate import data_plate
from pyro_lora.likelihood.model_trace import Model, evaluating

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Shares of the data add up to one but for rounding.
SHARE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class SteinDiscrepancy:
    """A kernelised Stein discrepancy, squared, and its test.

    Attributes:
        u_statistic: Mean of the Stein kernel over pairs of different draws: unbiased,
            about 0 for draws of the posterior, may be negative. NaN with one draw.
        v_statistic: Mean over all pairs, never negative (but for rounding); its root
            is the discrepancy of the empirical distribution.
        p_value: Of the hypothesis that independent draws come from the posterior; None
            if it wasn't asked for.
    """

    u_statistic: float
    v_statistic: float
    p_value: float | None


@leaving_no_trace
@sharing_data
def kernelized_stein_discrepancy(
    model: Model,
    particles: Mapping[str, Tensor],
    batches: Iterable[Batch],
    *,
    kernel: Kernel | None = None,
    temperature: float = 1.0,
    num_bootstrap: int = 0,
    chunk_size: int | None = None,
    progress_bar: bool | None = None,
    mesh: DeviceMesh | None = None,
) -> SteinDiscrepancy:
    r"""Squared kernelised Stein discrepancy between particles and the posterior.

    With :math:`s = \nabla \log p / T`, D weights, and a kernel :math:`k =
    \kappa(d^2)` the Stein kernel is

    .. math:: u(x, y) = \kappa\, s(x)^T s(y) + 2 \kappa' (s(y) - s(x))^T (x - y)
              - 2 D \kappa' - 4 d^2 \kappa''

    (Liu, Lee & Jordan 2016, https://arxiv.org/abs/1602.03253, eq. 14; Chwialkowski,
    Strathmann & Gretton 2016, https://arxiv.org/abs/1602.02964). Under the posterior
    its mean is 0. ``IMQ``, the default, also notices mass that is missing (Gorham &
    Mackey 2017, https://arxiv.org/abs/1703.01717); a kernel over ``"site"`` adds one
    discrepancy a site. Weights are compared in unconstrained space, and the density has
    the transform's Jacobian there.

    The p-value multiplies pairs by random signs, :math:`\frac{1}{S (S-1)} \sum_{i \ne
    j} \epsilon_i \epsilon_j u_{ij}`, and counts those that reach the statistic
    (Chwialkowski et al., section 3; for independent draws). The U and the V statistic
    give the same one, as the signs leave the diagonal alone. Particles of SVGD aren't
    independent: they lie more evenly than draws do, so that a small p-value says they
    are off, and a large one proves nothing.

    Args:
        model: A Pyro model.
        particles: Site -> (S, ...), on the sites' supports: ``posterior.particles``,
            ``posterior.sample(S)``, ``svgd.get_named_particles()``, or MCMC's samples.
        batches: Mappings of model keyword arguments that cover all data once; they are
            gone through once.
        kernel: A function of squared distances, over ``"joint"`` or ``"site"``; twice
            differentiable at 0.
        temperature: T.
        num_bootstrap: Draws of random signs; 0 for no p-value.
        chunk_size: Particles in one forward pass; None is all.
        progress_bar: Show one, of the batches; None: on a terminal or in a notebook.
        mesh: A ``DeviceMesh`` whose dim ``"data"`` shares the data; None: all ranks
            do, where ``torch.distributed`` is initialised, each with batches of its
            own (:func:`~pyro_lora.share`).

    Returns:
        Statistics (squared scores: per squared unit of the weights) and p-value.

    Raises:
        TypeError: If the kernel isn't one.
        ValueError: If an argument is out of its range, the batches don't cover the
            data once, a site is missing or has another shape, the model can't be run
            by particles, or a score or the Stein kernel isn't finite.
    """
    kernel = IMQ() if kernel is None else kernel
    _check(kernel, temperature, num_bootstrap)
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    check_batches(batches)
    ranks = ranks_of(mesh, "data")
    with progress(
        batches, title="Stein discrepancy", unit="batch", shown=progress_bar
    ) as bar:
        target, unconstrained, scores = _scores(
            model, particles, bar, chunk_size, ranks
        )
    scores = {site: score / temperature for site, score in scores.items()}
    if space_of(kernel) == "site":
        groups = [[site] for site in target.latents]
    else:
        groups = [list(target.latents)]
    stein = torch.stack(
        [_stein_kernel(kernel, unconstrained, scores, sites) for sites in groups]
    ).sum(0)
    if not torch.isfinite(stein).all():
        raise ValueError(
            "The Stein kernel is NaN or infinite: the kernel must be twice "
            f"differentiable in the squared distance, at 0 too, found {kernel!r}."
        )
    num_draws = stein.shape[0]
    pairs = num_draws * (num_draws - 1)
    # U: the mean over i ≠ j, unbiased; V: over all pairs, the diagonal included.
    off_diagonal = stein - torch.diag_embed(stein.diagonal())
    total = off_diagonal.sum()
    p_value = None
    if num_bootstrap:
        signs = (
            stein.new_empty(num_bootstrap, num_draws).bernoulli_(0.5).mul_(2).sub_(1)
        )
        resampled = ((signs @ off_diagonal) * signs).sum(1)
        p_value = (1 + int((resampled >= total).sum())) / (1 + num_bootstrap)
    return SteinDiscrepancy(
        float(total) / pairs if pairs else float("nan"), float(stein.mean()), p_value
    )


def _check(kernel: Kernel, temperature: float, num_bootstrap: int) -> None:
    check_kernel(kernel)
    if isinstance(kernel, NoRepulsion) or space_of(kernel) not in ("joint", "site"):
        raise ValueError(
            "A Stein discrepancy compares weights: give a kernel over 'joint' or "
            f"'site', found {kernel!r}."
        )
    check_positive("temperature", temperature)
    check_count("num_bootstrap", num_bootstrap, 0)


def _stein_kernel(
    kernel: Kernel,
    particles: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    sites: list[str],
) -> Tensor:
    """Stein kernel (S, S) of some sites in float64, in (S, S) and (S, D) memory."""
    sq_dists = score_products = mixed = torch.zeros(
        (), dtype=torch.float64, device="cpu"
    )
    num_weights = 0
    for site in sites:
        x = particles[site].double().reshape(len(particles[site]), -1)
        s = scores[site].double().reshape(x.shape)
        x = x - x.mean(0)  # differences don't change, cancellation shrinks
        sq_dists = sq_dists.to(x.device) + squared_distances(x)
        score_products = score_products.to(x.device) + s @ s.mT
        mixed = mixed.to(x.device) + s @ x.mT
        num_weights += x.shape[1]
    with torch.enable_grad():
        leaf = sq_dists.requires_grad_()
        gram = kernel(leaf)
        (slope,) = torch.autograd.grad(gram.sum(), leaf, create_graph=True)
        curvature = torch.zeros_like(leaf)
        if slope.requires_grad:  # not for a kernel that is linear in the distances
            (curvature,) = torch.autograd.grad(slope.sum(), leaf)
    gram, slope, sq_dists = gram.detach(), slope.detach(), sq_dists.detach()
    own = mixed.diagonal()
    # (s_j - s_i)' (x_i - x_j), from the products s_i' x_j
    differences = mixed + mixed.mT - own[:, None] - own[None, :]
    return (
        gram * score_products
        + 2 * slope * (differences - num_weights)
        - 4 * curvature * sq_dists
    )


def _scores(
    model: Model,
    particles: Mapping[str, Tensor],
    batches: Iterable[Batch],
    particles_at_once: int | None,
    ranks: Ranks,
) -> tuple[ParticleModel, dict[str, Tensor], dict[str, Tensor]]:
    """The model, particles in unconstrained space, gradients of the log joint.

    Raises:
        ValueError: If there is nothing to go through, a site is missing or has another
            shape, or the batches don't cover the data once.
    """
    target: ParticleModel | None = None
    unconstrained: dict[str, Tensor] = {}
    scores: dict[str, Tensor] = {}
    covered, num_draws = 0.0, 0
    for batch in ranks.in_step(checked_batches(batches)):
        if target is None:
            target, unconstrained = model_at_particles(model, particles, batch)
            num_draws = next(iter(unconstrained.values())).shape[0]
        target.check_stack(unconstrained, (), batch)
        shares: list[float] = []

        def objective(
            rows: slice, trace: Any, log_joint: Tensor, shares: list[float] = shares
        ) -> Tensor:
            shares.append(_share(trace))
            # A batch's log joint stands for all data: batches are averaged.
            return shares[-1] * log_joint.sum()

        with evaluating(target.networks):
            at = ParticlePass(
                target, unconstrained, (), batch, particles_at_once or num_draws
            )
            of_batch, _, _ = at.gradients(objective)
        scores = {s: scores.get(s, 0) + g.double() for s, g in of_batch.items()}
        covered += shares[0]
    if target is None:
        message = "There are no batches: give [{}] for a model without data."
        raise ValueError(ranks.none_here(message))
    scores = dict(zip(scores, ranks.sums(list(scores.values())), strict=True))
    covered = float(ranks.sum(torch.tensor(covered, dtype=torch.float64)))
    if abs(covered - 1) > SHARE_TOLERANCE:
        raise ValueError(
            f"The batches hold {covered:.4g} times the data of the model's plate. Give "
            "batches that cover every datum once."
        )
    return target, unconstrained, scores


def _share(trace: Any) -> float:
    """Share of all data that a batch holds, 1 for a model without data.

    Raises:
        ValueError: If observed sites hold different shares.
    """
    observed = [
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and site["is_observed"]
    ]
    plates = [data_plate(likelihood_at_particles(trace, name)) for name in observed]
    shares = {plate.size / plate.full_size for plate in plates}
    if len(shares) > 1:
        raise ValueError(
            f"The batch holds different shares of the data at the sites {observed}: "
            f"{sorted(shares)}. Give each the same share, or all data in one batch."
        )
    return shares.pop() if shares else 1.0
