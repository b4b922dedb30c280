r"""How many different predictions particles make.

Two particles agree on an outcome by the Bhattacharyya coefficient :math:`\int
\sqrt{p_i(y) p_j(y)} dy`, 1 where they say the same and 0 where no outcome is possible
to both. Of classes it's :math:`\sum_c \sqrt{p_{ic} p_{jc}}`, of normals it has a closed
form. Of all others it's estimated: with m the mean of all particles' densities,

.. math:: \int \sqrt{p_i p_j} dy = E_{y \sim m} \sqrt{p_i(y) p_j(y)} / m(y),

from the same draws for all pairs, and the diagonal is then made one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_lora.ground.autocast import outside_autocast
from pyro_lora.ground.interrupts import leaving_no_trace
from pyro_lora.ground.progress import progress
from pyro_lora.ground.ranks import ranks_of, sharing_data
from pyro_lora.ground.settings import check_count
from pyro_lora.infer.svgd.particle_model import (
    ParticlePass,
    likelihood_at_particles,
    model_at_particles,
)
from pyro_lora.likelihood import likelihoods
from pyro_lora.likelihood.batch import Batch, check_batches, checked_batches
from pyro_lora.likelihood.model_trace import Model, evaluating
from pyro_lora.likelihood.outcomes import outcomes_that_count, single_outcomes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_NUM_DRAWS = 64  # of each particle's distribution, where there is no closed form


def gram_of(
    sites: Sequence[Mapping[str, Any]], sizes: Sequence[int]
) -> tuple[Tensor, int]:
    """Affinities of K particles' predictions, and of how many data.

    Args:
        sites: The likelihood's, some particles after the others, each of batch shape
            (K', ...).
        sizes: K' of each.

    Returns:
        The sum (K, K) over the data of which an outcome counts; how many they are.
    """
    fns = [single_outcomes(site["fn"]).fn for site in sites]
    events = sites[0]["fn"].event_shape.numel() // fns[0].event_shape.numel()
    counts = outcomes_that_count(sites[0]).reshape(sizes[0], -1, events)[0]

    def of_all(parameters: Sequence[Tensor]) -> Tensor:
        """(K, B, E, P) of E outcomes a datum, float64."""
        pairs = zip(parameters, sizes, strict=True)
        return torch.cat(
            [
                x.detach().double().reshape(size, *counts.shape, x.shape[-1])
                for x, size in pairs
            ]
        )

    entries = [likelihoods.of(fn) for fn in fns]
    classes = [x.classes.log_probs for x in entries if x.classes is not None]
    noise = [x.noise for x in entries if x.noise is not None and x.noise.df is None]
    if classes:
        affinity = _affinity_of_classes(of_all(classes))
    elif noise:
        loc = of_all([x.predictor for x in entries])
        scale = of_all([x.scale[..., None] for x in noise])
        affinity = _affinity_of_normals(loc[..., 0], scale[..., 0])
    else:
        affinity = _affinity_by_draws(fns, sizes, counts.shape)
    # Of outcomes that don't count, all particles say the same. Those of one datum are
    # independent given the weights: affinities multiply.
    by_datum = affinity.where(counts, 1).prod(-1)
    data = counts.any(-1)
    return by_datum.where(data, torch.zeros_like(by_datum)).sum(-1), int(data.sum())


def effective_number(gram: Tensor) -> Tensor:
    r"""Exponential of the entropy of a Gram matrix's eigenvalues, a scalar.

    :math:`\exp(-\sum_k \lambda_k \log \lambda_k)` with :math:`\lambda` the eigenvalues
    of Gram / K (Friedman & Dieng 2023, https://arxiv.org/abs/2210.02410, eq. 1).

    Args:
        gram: (K, K), ones on the diagonal.
    """
    eigenvalues = torch.linalg.eigvalsh(gram.double() / gram.shape[0])
    return torch.special.entr(eigenvalues.clamp_min(0)).sum().exp()


@leaving_no_trace
@sharing_data
@torch.no_grad()
def effective_num_predictions(
    model: Model,
    particles: Mapping[str, Tensor],
    batches: Iterable[Batch],
    *,
    obs_site: str | None = None,
    chunk_size: int | None = None,
    progress_bar: bool | None = None,
    mesh: DeviceMesh | None = None,
) -> float:
    r"""Effective number of distinct predictions among particles, from 1 to K.

    The Vendi score :math:`\exp(-\sum_k \lambda_k \log \lambda_k)`, with :math:`\lambda`
    the eigenvalues of the matrix of similarities over K (Friedman & Dieng 2023,
    https://arxiv.org/abs/2210.02410, eq. 1). The similarity of two particles is the
    Bhattacharyya coefficient :math:`\int \sqrt{p_i(y | x) p_j(y | x)} \, dy` of their
    predictive distributions, mean over the data of which an outcome counts. All alike
    give 1; K particles of which no two believe in the same outcome give K. Where data
    leave no doubt and all particles see that, it is near 1, as it should be.

    Args:
        model: A Pyro model, whose likelihood is among ``pyro_lora.likelihoods``, or an
            event of independent ones. The coefficients of classes and of Normals are
            exact; of others they are estimated by draws from torch's generator.
        particles: Site -> (K, ...), on the sites' supports, such as
            ``posterior.particles``.
        batches: Mappings of model keyword arguments, labels included (which don't
            matter).
        obs_site: The likelihood's site; None is the only observed one.
        chunk_size: Particles in one forward pass; None is all.
        progress_bar: Show one, of the batches; None: on a terminal or in a notebook.
        mesh: A ``DeviceMesh`` whose dim ``"data"`` shares the data; None: all ranks
            do, where ``torch.distributed`` is initialised, each with batches of its
            own (:func:`~pyro_lora.share`).

    Raises:
        TypeError: If the likelihood is of another type.
        ValueError: If there is nothing to go through, no outcome counts, the model
            can't be run by particles, or a site is missing or has another shape.
    """
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    total, num_data, any_batch = torch.zeros((), device="cpu"), 0, False
    check_batches(batches)
    ranks = ranks_of(mesh, "data")
    with progress(
        batches, title="Effective predictions", unit="batch", shown=progress_bar
    ) as bar:
        for batch in ranks.drawing(ranks.in_step(checked_batches(bar))):
            target, unconstrained = model_at_particles(model, particles, batch)
            num_particles = next(iter(unconstrained.values())).shape[0]
            at = ParticlePass(
                target, unconstrained, (), batch, chunk_size or num_particles
            )
            sites, sizes = [], []
            with evaluating(target.networks):
                for rows, chunk in at.chunks():
                    trace, _ = at.trace(chunk)
                    sites.append(likelihood_at_particles(trace, obs_site))
                    sizes.append(rows.stop - rows.start)
            gram, size = gram_of(sites, sizes)
            total, num_data = total + gram, num_data + size
            any_batch = True
    if not any_batch:
        raise ValueError(ranks.none_here("There are no batches to predict."))
    total, num_data = ranks.sum(total), ranks.total(num_data)
    if num_data == 0:
        raise ValueError(
            "There is no datum to predict: all outcomes are masked or missing. Give "
            "others."
        )
    return float(effective_number(total / num_data))


@outside_autocast()
def _affinity_of_classes(log_probs: Tensor) -> Tensor:
    roots = (log_probs / 2).exp()
    return torch.einsum("kbec,jbec->kjbe", roots, roots)


def _affinity_of_normals(loc: Tensor, scale: Tensor) -> Tensor:
    # sqrt(2 s t / (s² + t²)) exp(-(m - n)² / (4 (s² + t²))) of N(m, s²) and N(n, t²)
    variances = scale[:, None].square() + scale.square()
    gap = (loc[:, None] - loc).square() / (4 * variances)
    return (2 * scale[:, None] * scale / variances).sqrt() * (-gap).exp()


def _affinity_by_draws(
    fns: Sequence[Any], sizes: Sequence[int], shape: torch.Size
) -> Tensor:
    """Estimated, (K, K, B, E), with equally many draws of each particle's density."""
    pairs = list(zip(fns, sizes, strict=True))
    drawn = [fn.sample(torch.Size([_NUM_DRAWS])).to(fn.mean) for fn, _ in pairs]
    rows = []
    for fn, size in pairs:
        # Every particle's density of every particle's draws, (M K, K', ...).
        log_prob = [
            fn.log_prob(y[:, k][:, None].expand(-1, size, *y.shape[2:]))
            for y in drawn
            for k in range(y.shape[1])
        ]
        rows.append(torch.cat(log_prob).double().reshape(-1, size, *shape))
    log_p = torch.cat(rows, 1)  # (M K, K, B, E)
    # sqrt(p_i p_j) / m at each draw is the product of sqrt(p_i / m) and sqrt(p_j / m).
    roots = ((log_p - log_p.logsumexp(1, keepdim=True)) / 2).exp()
    gram = torch.einsum("yibe,yjbe->ijbe", roots, roots)
    norm = gram.diagonal(dim1=0, dim2=1).movedim(-1, 0).sqrt()
    return gram / (norm[:, None] * norm)
