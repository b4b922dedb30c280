r"""TFB: an adapter that is trained already, as wide as it may be without harm.

With the singular value decomposition :math:`s B_l = U D V^T`,

.. math:: A_l = \hat A_l + \sigma V D^{-1} Z, \quad Z \sim N(0, I), \quad \text{so that}
    \quad \Delta W_l = s B_l \hat A_l + \sigma U Z:

noise of one width in all directions that the adapter can move its layer in (Shi et al.
2024, https://arxiv.org/abs/2412.05723). That is :math:`\sigma (s^2 B_l^T B_l)^{-1/2}`
for the rows of A. :math:`\sigma` is the largest at which a draw's loss on some rows is
a stated number of nats above the adapter's own: forward passes alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_lora.ground.interrupts import leaving_no_trace
from pyro_lora.ground.progress import Counted, progress
from pyro_lora.ground.ranks import ranks_of, sharing_data
from pyro_lora.ground.settings import check_count, check_positive
from pyro_lora.ground.warning import warn
from pyro_lora.ground.weights import Weights, check_weights, drawing_nothing
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.lifting.sites import lora_factor
from pyro_lora.likelihood import likelihoods
from pyro_lora.likelihood.batch import (
    NO_BATCHES,
    Batch,
    PlacedBatch,
    check_batches,
    checked_batches,
)
from pyro_lora.likelihood.model_trace import (
    Model,
    check_model,
    evaluating_model,
    lifted_networks,
    likelihood_site,
    trace_batch,
)
from pyro_lora.likelihood.outcomes import single_outcomes
from pyro_lora.posteriors.gaussian_posterior import GaussianPosterior
from pyro_lora.posteriors.loss_of_draws import LossOfDraws, largest_scale
from pyro_lora.posteriors.prior import latent_nodes
from pyro_lora.priors.spectral import squared_frobenius_norm

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Of the largest singular value: directions of A that B hardly maps to anywhere would
# get numbers that leave float32, for nothing.
_LEAST_SINGULAR = 1e-3
_RANGE = 2.0**20  # of widths, on either side of the adapter's own size


@leaving_no_trace
@sharing_data
def tfb(
    model: Model,
    batches: Iterable[Batch],
    *,
    tolerance: float = 0.05,
    weights: Mapping[str, Tensor] | None = None,
    num_samples: int = 8,
    obs_site: str | None = None,
    progress_bar: bool | None = None,
    mesh: DeviceMesh | None = None,
) -> GaussianPosterior:
    r"""A Gaussian on every A, of the largest width that costs no more than a tolerance.

    Nothing is trained and no gradient taken, so that it works for an adapter that
    somebody else has trained. Without labels the adapter's own most probable classes
    are taken for them.

    Args:
        model: A Pyro model that calls a lifted network.
        batches: Rows to measure the loss on, a few hundred, training rows or others.
        tolerance: Nats a datum that a draw may lose, on average over draws. (The paper
            has .3 % of the loss.)
        weights: A weight set, site -> value, with values of the model's other latent
            sites where there are any; None is the adapter's present one.
        num_samples: Draws, the same at every width.
        obs_site: The likelihood's site, None for the only one.
        progress_bar: Show one, of the batches of all passes; None: on a terminal or in
            a notebook.
        mesh: A ``DeviceMesh`` whose dim ``"data"`` shares the rows; None: all ranks
            do, where ``torch.distributed`` is initialised, each with batches of its
            own (:func:`~pyro_lora.share`).

    Returns:
        The posterior; sites that are no A, and A without a B, are points.

    Raises:
        TypeError: If an argument is of a wrong kind.
        ValueError: If there are no batches, a latent site has no value, there is no A
            with a B that isn't 0, labels are missing and the likelihood has no classes,
            or the loss of the adapter itself is NaN.

    Warns:
        UserWarning: If a draw loses more at every width, or no more at any.
    """
    check_model(model)
    check_positive("tolerance", tolerance)
    check_count("num_samples", num_samples)
    check_batches(batches)
    rows = list(checked_batches(batches))  # read once for each of many passes
    ranks = ranks_of(mesh, "data")
    if not rows:
        raise ValueError(ranks.none_here(NO_BATCHES))
    first = rows[0]
    if weights is not None:
        check_weights(weights)
    with torch.no_grad(), drawing_nothing(dict(first)), evaluating_model():
        trace = trace_batch(model, weights or {}, first, 0)
    networks = lifted_networks(trace)
    at = {site: x for lora in networks for site, x in lora.weights().items()}
    at |= {} if weights is None else weights
    likelihood = likelihood_site(trace, obs_site, at)
    missing = sorted(latent_nodes(trace).keys() - at.keys() - {likelihood["name"]})
    if missing:
        raise ValueError(
            f"tfb needs values of the model's latent sites {missing}. Give a whole "
            "weight set, tfb(..., weights=guide.median()), say."
        )
    scored = model
    if not likelihood["is_observed"]:
        scored = _OwnLabels(model, likelihood["name"])
        rows = [scored.labelled(at, batch, index) for index, batch in enumerate(rows)]
    factors = _row_factors(networks, at)
    if not factors:
        raise ValueError(
            "tfb needs A and B of an adapter that is trained, found none whose B isn't "
            f"0 among {list(at)}. Train the adapter, or load it, before."
        )
    unit = GaussianPosterior(at, {}, networks, model, obs_site, rows=factors)
    draws = unit.sample(num_samples)

    def at_width(sigma: float) -> Weights:
        return {
            site: at[site] + sigma * (x - at[site]) if site in factors else x
            for site, x in draws.items()
        }

    with progress(title="Width", unit="batch", shown=progress_bar) as bar:
        counted = Counted(rows, bar)

        one = {site: x[None] for site, x in at.items()}
        loss = LossOfDraws(scored, networks, obs_site, one, counted, ranks, "tfb")
        least = loss.at(one)
        if not least < float("inf"):
            raise ValueError(
                "tfb: the loss at the adapter is NaN or infinite. Check the batches' "
                "inputs and labels."
            )
        size = _mean_size(networks, at)
        sigma, is_found = largest_scale(
            lambda sigma: loss.at(at_width(sigma)) - least,
            tolerance,
            size,
            most=(widest := size * _RANGE),
            least=size / _RANGE,
        )
    if not is_found:
        warn(
            f"Even at a width of {sigma:.3g} a draw loses more than {tolerance:g} nats "
            "a datum against the adapter; that width is taken. Give more rows, or a "
            "larger tolerance."
        )
    elif sigma == widest:
        warn(
            f"No width up to {sigma:.3g} costs {tolerance:g} nats a datum against the "
            "adapter, so that nothing bounds it on these rows; that width is taken. "
            "Train the adapter for longer (this one may be no better than chance "
            "here), or give other rows or a smaller tolerance."
        )
    rows_of_a = {site: sigma * x for site, x in factors.items()}
    return GaussianPosterior(at, {}, networks, model, obs_site, rows=rows_of_a)


_OUTCOMES = "_own_labels"  # the argument in which a batch carries them


@dataclass(frozen=True)
class _OwnLabels:
    """A model that observes the labels which it finds most probable itself.

    Attributes:
        model: A Pyro model.
        obs_site: The likelihood's site.
    """

    model: Model
    obs_site: str

    def __call__(self, **batch: Any) -> Any:
        outcomes = {self.obs_site: batch.pop(_OUTCOMES)}
        return poutine.condition(self.model, outcomes)(**batch)

    @torch.no_grad()
    def labelled(self, at: Weights, batch: PlacedBatch, index: int) -> PlacedBatch:
        """A batch with its labels, at a weight set.

        Raises:
            ValueError: If the likelihood has no classes.
        """
        with drawing_nothing(at), evaluating_model():
            site = trace_batch(self.model, at, batch, index).nodes[self.obs_site]
        fn = single_outcomes(site["fn"]).fn
        classes = likelihoods.of(fn).classes
        if classes is None or classes.one_hot:
            raise ValueError(
                f"tfb: {batch.place} has no labels for site {self.obs_site!r}, and its "
                f"{type(fn).__name__} has no most probable class that could be taken. "
                "Give labels."
            )
        labels = classes.logits.argmax(-1)
        return batch.replaced(**{_OUTCOMES: labels.to(site["value"])})


def _row_factors(networks: Sequence[LiftedNetwork], at: Weights) -> Weights:
    r"""Site of A -> :math:`(s^2 B_l^T B_l)^{-1/2}`, (L, R, R), where B isn't 0."""
    found = {}
    for lora in networks:
        factors = lora.delta_weight_factors({site: at[site] for site in lora.sites})
        for site, names in lora.sites.items():
            parts = [lora_factor(name) for name in names]
            paths = [part[0] for part in parts if part is not None and part[1] == "A"]
            if len(paths) < len(names) or not factors.keys() >= {*paths}:
                continue
            b = torch.stack([factors[path][0] for path in paths]).double()
            # With B = U D V^T, B^T B = V D^2 V^T.
            squares, v = torch.linalg.eigh(b.mT @ b)
            d = squares.clamp_min(0).sqrt()
            if not d.max() > 0:
                continue
            d = d.clamp_min(_LEAST_SINGULAR * d.max())
            found[site] = (v / d[..., None, :] @ v.mT).to(at[site])
    return found


def _mean_size(networks: Sequence[LiftedNetwork], at: Weights) -> float:
    """Root mean square of the updates' entries in the directions that B has."""
    total, number = 0.0, 0
    for lora in networks:
        factors = lora.delta_weight_factors({site: at[site] for site in lora.sites})
        for b, a in factors.values():
            total += float(squared_frobenius_norm(b.double(), a.double()))
            number += a.numel()
    return (total / number) ** 0.5 if total > 0 else 1.0
