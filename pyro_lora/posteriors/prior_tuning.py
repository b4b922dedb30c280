"""Choosing the prior precision: by the evidence, or by held-out data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_lora.curvature.gaussian_logits import GaussianLogits, class_log_probs
from pyro_lora.curvature.linearize import linearized_site
from pyro_lora.curvature.weight_gaussian import WeightGaussian
from pyro_lora.ground.settings import check_number, check_word
from pyro_lora.ground.weights import Weights
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood.batch import check_batches, checked_batches
from pyro_lora.likelihood.batches import READ_ONCE, naming_batch
from pyro_lora.likelihood.model_trace import Batch, Model
from pyro_lora.likelihood.outcomes import outcomes_that_count

MIN_PRECISION, MAX_PRECISION = 1e-8, 1e8  # prior scales from 1e4 to 1e-4
_NUM_STEPS = 500  # of L-BFGS at most; concave in log tau, a few dozen are usual
_NUM_SWEEPS = 2  # over the groups, of the search on held-out data
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
    if not isinstance(value, Mapping | Tensor):
        check_number("A prior precision", value, MIN_PRECISION, MAX_PRECISION)
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
    size = _num_precisions(gaussian.loc, per)
    loc = gaussian.loc
    distance = torch.cat(  # |w - m|^2, of each matrix
        [
            (x - prior_mean[s]).double().square().flatten(1).sum(1)
            for s, x in loc.items()
        ]
    )
    first = next(iter(loc.values()))
    sizes = torch.cat(
        [distance.new_full(x.shape[:1], x[0].numel()) for x in loc.values()]
    )
    theta = torch.zeros(size, dtype=torch.float64, device=first.device)
    theta.requires_grad_()

    def log_evidence(log_tau: Tensor) -> Tensor:
        log_tau = _by_matrix(log_tau, loc, per)
        tau = log_tau.exp()
        log_prior = 0.5 * (sizes * log_tau - tau * distance).sum()
        return log_prior - 0.5 * gaussian.log_det(_by_site(tau, loc))

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
    found = _spread(theta.detach().exp(), gaussian.loc, per)
    return {s: tau.clamp(MIN_PRECISION, MAX_PRECISION) for s, tau in found.items()}


def _num_precisions(loc: Weights, per: str) -> int:
    sizes = {"all": 1, "site": len(loc)}
    sizes["layer"] = sum(x.shape[0] for x in loc.values())
    check_word("per", per, sizes)
    return sizes[per]


def _by_matrix(values: Tensor, loc: Weights, per: str) -> Tensor:
    """Values (G,), one for each group, as one for each matrix of all sites."""
    if per == "layer":
        return values
    layers = [x.shape[0] for x in loc.values()]
    if per == "all":
        return values.expand(sum(layers))
    parts = zip(values, layers, strict=True)
    return torch.cat([value.expand(number) for value, number in parts])


def _by_site(matrices: Tensor, loc: Weights) -> Weights:
    """One value for each matrix of all sites as site -> (L, 1, 1)."""
    parts = matrices.split([x.shape[0] for x in loc.values()])
    return {
        site: part.reshape(-1, *[1] * (x.ndim - 1))
        for (site, x), part in zip(loc.items(), parts, strict=True)
    }


def _spread(values: Tensor, loc: Weights, per: str) -> Weights:
    """Precisions (G,), one for each group, as site -> (L, 1, 1)."""
    return _by_site(_by_matrix(values, loc, per), loc)


def minimize_nll(
    model: Model,
    gaussian: WeightGaussian,
    networks: Sequence[LiftedNetwork],
    batches: Iterable[Batch],
    obs_site: str | None,
    per: str,
) -> Weights:
    """The prior precisions with the smallest held-out negative log likelihood.

    Every precision of a grid (8 a decade, 1e-4 to 1e6) is evaluated in the same pass,
    first of one for all; then of each group in turn, the others fixed, twice.

    Args:
        model: A Pyro model.
        gaussian: Mode and Fisher information.
        networks: The lifted networks in the model.
        batches: Held-out batches with labels.
        obs_site: The likelihood's site.
        per: ``"all"``, ``"site"`` or ``"layer"``: what shares one precision.

    Returns:
        Site -> precision, (L, 1, 1).

    Raises:
        ValueError: If ``per`` is something else, a batch has no labels, there is none,
            or they can be read once only and there are several precisions.
    """
    size = _num_precisions(gaussian.loc, per)
    check_batches(batches)
    if size > 1 and iter(batches) is batches:
        raise ValueError(READ_ONCE.format("each of several precisions takes passes"))
    device = next(iter(gaussian.loc.values())).device
    grid = _GRID.to(device)

    def best_of(candidates: Tensor) -> Tensor:
        priors = [
            checked_precision(_spread(tau, gaussian.loc, per), gaussian.loc)
            for tau in candidates
        ]
        losses = _nll(model, gaussian, networks, batches, obs_site, priors)
        return candidates[int(losses.argmin())]

    tau = best_of(grid[:, None].expand(-1, size))
    for _ in range(_NUM_SWEEPS if size > 1 else 0):
        for group in range(size):
            candidates = tau.repeat(len(grid), 1)
            candidates[:, group] = grid
            tau = best_of(candidates)
    return _spread(tau, gaussian.loc, per)


def _nll(
    model: Model,
    gaussian: WeightGaussian,
    networks: Sequence[LiftedNetwork],
    batches: Iterable[Batch],
    obs_site: str | None,
    priors: Sequence[Weights],
) -> Tensor:
    total: Tensor | float = 0.0
    num_outcomes = 0
    for index, batch in enumerate(checked_batches(batches)):
        with naming_batch(index):
            found, site = linearized_site(
                model, gaussian, networks, batch, obs_site, priors
            )
            if not site["is_observed"]:
                raise ValueError(
                    f"Held-out batch {index} has no labels, which objective='nll' "
                    f"needs: site {site['name']!r} isn't observed."
                )
            losses = torch.stack([_log_loss(logits, site) for logits in found])
            if not losses.isfinite().all():
                raise ValueError(
                    f"Site {site['name']!r}: the log likelihood is NaN or infinite. "
                    "Check the labels."
                )
            total = total + losses
            num_outcomes += int(outcomes_that_count(site).sum())
    if not isinstance(total, Tensor):
        raise ValueError("objective='nll' got no batches.")
    if num_outcomes == 0:
        raise ValueError(
            "objective='nll' got no outcome that counts: all held-out data are masked "
            "or missing. Give others."
        )
    return total


def _log_loss(logits: GaussianLogits, site: dict[str, Any]) -> Tensor:
    """Of the outcomes that count: of classes; of real ones, each output by itself.

    Raises:
        ValueError: If one of them is none.
    """
    counts, value = outcomes_that_count(site), site["value"]
    if logits.noise_variance is None:
        log_probs = class_log_probs(logits)
        value = value.where(counts, torch.zeros_like(value))
        wrong = ~((value >= 0) & (value < log_probs.shape[-1]))
        _check_outcomes(wrong, value, site)
        if log_probs.shape[-1] == 2:  # a Bernoulli's may be between its two classes
            shares = torch.stack([1 - value, value], 1).to(log_probs)
            none = torch.zeros_like(shares)
            loss = -(shares * log_probs).where(shares > 0, none).sum(1)
        else:
            loss = -log_probs.gather(1, value.long()[:, None])[:, 0]
    else:
        variance = logits.predictive_variance.double()
        value = value.double().reshape(variance.shape)
        counts = counts.reshape(variance.shape)
        _check_outcomes(counts & ~value.isfinite(), value, site)
        square = (value - logits.mean).square() / variance
        loss = 0.5 * (square + (2 * math.pi * variance).log())
    return loss.where(counts, torch.zeros_like(loss)).sum()


def _check_outcomes(wrong: Tensor, value: Tensor, site: dict[str, Any]) -> None:
    if bool(wrong.any()):
        raise ValueError(
            f"Site {site['name']!r}: {value[wrong][0].item()} is no outcome of a "
            f"{type(site['fn']).__name__}. Mask the data without one in the model, or "
            "leave them out."
        )
