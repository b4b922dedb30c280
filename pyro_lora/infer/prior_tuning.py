"""Choosing the prior precision: by the evidence, or by held-out data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from pyro_lora.curvature.gaussian_logits import class_log_probs
from pyro_lora.curvature.linearize import linearized_logits
from pyro_lora.curvature.weight_gaussian import WeightGaussian, Weights
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.lifting.model_trace import Batch, Model

MIN_PRECISION, MAX_PRECISION = 1e-8, 1e8  # prior scales from 1e4 to 1e-4
_NUM_STEPS = 500  # of L-BFGS at most; concave in log tau, a few dozen are usual
_GRID = torch.logspace(-4, 6, 81, dtype=torch.float64)  # 8 precisions a decade


def checked_precision(
    value: float | Tensor | Mapping[str, float | Tensor], like: Mapping[str, Tensor]
) -> Weights:
    """A prior precision for every site, each broadcasting over its site.

    Args:
        value: One for all, or one for each site.
        like: Site -> a value of the site's shape, dtype and device.

    Returns:
        Site -> precision with as many dims as the site.

    Raises:
        ValueError: If names, shapes or values are wrong.
    """
    if isinstance(value, Mapping):
        if value.keys() != like.keys():
            raise ValueError(
                f"Prior precisions and sites differ in "
                f"{sorted(value.keys() ^ like.keys())}: give one for each site."
            )
        values = dict(value)
    else:
        values = dict.fromkeys(like, value)
    result = {}
    for site, x in like.items():
        tau = torch.as_tensor(values[site], dtype=x.dtype, device=x.device).detach()
        if not ((tau >= MIN_PRECISION) & (tau <= MAX_PRECISION)).all():
            raise ValueError(
                f"Site {site!r}: prior precisions must lie between {MIN_PRECISION:g} "
                f"and {MAX_PRECISION:g}, found {tau.min():.3g} to {tau.max():.3g}."
            )
        tau = tau.reshape((1,) * (x.ndim - tau.ndim) + tau.shape)
        try:
            fits = torch.broadcast_shapes(tau.shape, x.shape) == x.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"Site {site!r}: a prior precision of shape {tuple(tau.shape)} doesn't "
                f"broadcast over the site's shape {tuple(x.shape)}. Use () or "
                f"{(x.shape[0], *[1] * (x.ndim - 1))}."
            )
        result[site] = tau
    return result


def maximize_evidence(
    gaussian: WeightGaussian, prior_mean: Mapping[str, Tensor], per: str
) -> Weights:
    r"""Prior precisions that maximise the Laplace evidence at the given mode.

    Up to constants the log evidence is :math:`\frac12 \sum_g [n_g \log \tau_g - \tau_g
    |w_g - m_g|^2] - \frac12 \log\det(F + \mathrm{diag}\,\tau)`.

    Args:
        gaussian: Mode and Fisher information.
        prior_mean: Site -> mean of the prior.
        per: ``"all"``, ``"site"`` or ``"layer"``: what shares one precision.

    Returns:
        Site -> precision, () or (L, 1, 1), within 1e-8 to 1e8.

    Raises:
        ValueError: If ``per`` is something else.
    """
    sizes = {"all": 1, "site": len(gaussian.loc)}
    sizes["layer"] = sum(x.shape[0] for x in gaussian.loc.values())
    if per not in sizes:
        raise ValueError(f"per must be one of {sorted(sizes)}, found {per!r}.")
    distance = {  # |w - m|^2, summed over each layer
        site: (x - prior_mean[site]).double().square().flatten(1).sum(1)
        for site, x in gaussian.loc.items()
    }
    first = next(iter(gaussian.loc.values()))
    theta = torch.zeros(sizes[per], dtype=torch.float64, device=first.device)
    theta.requires_grad_()

    def precisions(log_tau: Tensor) -> Weights:
        result, position = {}, 0
        for index, (site, x) in enumerate(gaussian.loc.items()):
            if per == "layer":
                tau = log_tau[position : position + x.shape[0]].exp()
                position += x.shape[0]
            else:
                tau = log_tau[0 if per == "all" else index].exp().expand(x.shape[0])
            result[site] = tau.reshape(-1, *[1] * (x.ndim - 1))
        return result

    def log_evidence(log_tau: Tensor) -> Tensor:
        tau = precisions(log_tau)
        total = -0.5 * gaussian.log_det(tau)
        for site, x in gaussian.loc.items():
            t = tau[site].flatten()
            per_layer = x[0].numel()
            total = total + 0.5 * (per_layer * t.log() - t * distance[site]).sum()
        return total

    num_weights = sum(x.numel() for x in gaussian.loc.values())
    low, high = math.log(MIN_PRECISION), math.log(MAX_PRECISION)

    optimizer = torch.optim.LBFGS(
        [theta],
        max_iter=_NUM_STEPS,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        # A parabola keeps it near the bounds. A clamp would have no gradient outside of
        # them, and a step that is too long would end there; it is for overflow only.
        outside = (theta - theta.clamp(low, high)).square().sum()
        finite = theta.clamp(2 * low, 2 * high)
        loss = num_weights * outside - log_evidence(finite)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    found = precisions(theta.detach())
    return {s: tau.clamp(MIN_PRECISION, MAX_PRECISION) for s, tau in found.items()}


def minimize_nll(
    model: Model,
    gaussian: WeightGaussian,
    networks: Sequence[LiftedNetwork],
    batches: Iterable[Batch],
    obs_site: str | None,
) -> float:
    """The one prior precision with the smallest held-out negative log likelihood.

    Every precision of a grid (8 a decade, 1e-4 to 1e6) is evaluated in the same pass.

    Args:
        model: A Pyro model.
        gaussian: Mode and Fisher information.
        networks: The lifted networks in the model.
        batches: Held-out batches with ``labels``.
        obs_site: The likelihood's site.

    Returns:
        The precision.

    Raises:
        ValueError: If a batch has no labels, or there is none.
    """
    grid = [checked_precision(float(tau), gaussian.loc) for tau in _GRID]
    total: Tensor | float = 0.0
    for index, batch in enumerate(batches):
        labels = batch.get("labels")
        if labels is None:
            raise ValueError(
                f"Held-out batch {index} has no 'labels', which objective='nll' needs."
            )
        found = linearized_logits(model, gaussian, networks, batch, obs_site, grid)
        chosen = labels.long()[:, None]
        total = total + torch.stack(
            [-class_log_probs(logits).gather(1, chosen).sum() for logits in found]
        )
    if not isinstance(total, Tensor):
        raise ValueError("objective='nll' got no batches.")
    return float(_GRID[int(total.argmin())])
