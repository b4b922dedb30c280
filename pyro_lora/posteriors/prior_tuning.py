"""Choosing the prior: by the evidence, or by held-out data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import constraints, transform_to

from pyro_lora.curvature.gaussian_logits import GaussianLogits, class_log_probs
from pyro_lora.curvature.linearize import linearized_site
from pyro_lora.curvature.prior_moments import PriorAtMode, prior_at_mode, site_moments
from pyro_lora.curvature.weight_gaussian import WeightGaussian
from pyro_lora.ground.settings import check_gradients, check_number, check_word
from pyro_lora.ground.warning import warn
from pyro_lora.ground.weights import Weights
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood import likelihoods
from pyro_lora.likelihood.batch import READ_ONCE, Batch, check_batches, checked_batches
from pyro_lora.likelihood.model_trace import Model, naming_batch, trace_at
from pyro_lora.likelihood.outcomes import (
    impossible,
    is_possible,
    outcomes_that_count,
    single_outcomes,
    values_to_score,
)
from pyro_lora.posteriors.prior import AtParameters, PriorAtParameters
from pyro_lora.priors import Prior

MIN_PRECISION, MAX_PRECISION = 1e-8, 1e8  # prior scales from 1e4 to 1e-4
_NUM_STEPS = 500  # of L-BFGS at most; concave in log tau, a few dozen are usual
_NUM_PARAMETER_STEPS = 200  # likewise, of the prior's own parameters
_SAME = 1e-4  # relative difference of two log densities, in float32
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
    check_gradients()
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

    Warns:
        UserWarning: If one is at an end of the grid.

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
    found = _spread(tau, gaussian.loc, per)
    _warn_at_end(found)
    return found


def _warn_at_end(precisions: Weights) -> None:
    """Warn of precisions at the grid's ends: the best may lie beyond, or be none."""
    for end, of_prior in ((_GRID[0], "weakest"), (_GRID[-1], "strongest")):
        sites = [s for s, tau in precisions.items() if bool((tau == end.to(tau)).any())]
        if sites:
            warn(
                "The held-out loss is least at the grid's end, prior precision "
                f"{float(end):g}, the {of_prior} prior tried, at {sites}: the data "
                "given don't set it. Give more held-out data, which the weights "
                "weren't trained on; or use objective='evidence', or choose one "
                "yourself by with_prior_precision."
            )


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
    """Of the outcomes that count: of classes; of numbers, each output by itself.

    Raises:
        ValueError: If one of them is none.
    """
    fn, value = single_outcomes(site["fn"]).fn, site["value"]
    counts, classes = outcomes_that_count(site), likelihoods.of(fn).classes
    wrong = counts & ~is_possible(fn, value)
    if bool(wrong.any()):
        raise ValueError(
            f"Site {site['name']!r}: {impossible(fn, value[wrong].flatten()[0].item())}"
        )
    if logits.noise_variance is not None:
        variance = logits.predictive_variance.double()
        counts = counts.reshape(variance.shape)
        square = (value.double().reshape(variance.shape) - logits.mean).square()
        loss = 0.5 * (square / variance + (2 * math.pi * variance).log())
    elif classes is None:
        loss = -logits.log_prob(values_to_score(site))
    else:
        log_probs = class_log_probs(logits)
        value = value.argmax(-1) if classes.one_hot else value
        value = value.where(counts, torch.zeros_like(value))
        if log_probs.shape[-1] == 2:  # a Bernoulli's may be between its two classes
            shares = torch.stack([1 - value, value], 1).to(log_probs)
            none = torch.zeros_like(shares)
            loss = -(shares * log_probs).where(shares > 0, none).sum(1)
        else:
            loss = -log_probs.gather(1, value.long()[:, None])[:, 0]
    return loss.where(counts, torch.zeros_like(loss)).sum()


def train_parameters(
    prior: Prior,
    networks: Sequence[LiftedNetwork],
    gaussian: WeightGaussian,
    log_prior: Tensor,
) -> tuple[Prior, PriorAtMode]:
    r"""Maximise Laplace's evidence in the ``pyro.param`` values inside a prior.

    Up to a constant the log evidence is :math:`\log p_\theta(\hat w) - \frac12
    \log\det(F + \mathrm{diag}\,\tau_\theta)`, at the given mode.

    Args:
        prior: The prior.
        networks: The lifted networks that it is the prior of.
        gaussian: Mode and Fisher information.
        log_prior: The prior's log density when the mode was found.

    Returns:
        The prior at the values found, and its moments at the mode. The param store
        keeps its values.

    Raises:
        ValueError: If the prior has no parameters, isn't as it was when the mode was
            found, or the evidence has no maximum.
    """
    check_gradients()
    mode = {site: x.detach().requires_grad_() for site, x in gaussian.loc.items()}
    found: dict[str, Any] = {}
    for lora in networks:
        trace = trace_at(partial(prior, lora), mode, {})
        for name, node in trace.nodes.items():
            if node["type"] == "param":
                found[name] = (node["value"], node["kwargs"].get("constraint"))
    if not found:
        raise ValueError(
            "per='prior' trains the prior's own parameters, but it has no pyro.param. "
            "Use per='all', 'site' or 'layer', or a prior with one."
        )
    transforms = {k: transform_to(c or constraints.real) for k, (_, c) in found.items()}
    free = {
        name: transforms[name].inv(value.detach()).double().requires_grad_()
        for name, (value, _) in found.items()
    }

    def values() -> dict[str, Tensor]:
        return {k: transforms[k](u).to(found[k][0]) for k, u in free.items()}

    def log_evidence() -> Tensor:
        total, precisions = torch.zeros((), dtype=torch.float64), {}
        for node in _nodes(prior, networks, gaussian, values()):
            w = gaussian.loc[node["name"]]
            log_prob = node["fn"].log_prob(w)
            scaled = scale_and_mask(log_prob, node["scale"], node["mask"])
            total = total + scaled.double().sum().to(total.device)
            precisions[node["name"]] = site_moments(node, w)[1]
        in_order = {site: precisions[site] for site in gaussian.loc}
        return total - 0.5 * gaussian.log_det(in_order).to(total.device)

    _check_as_fitted(_log_prior(prior, networks, gaussian, values()), log_prior)
    optimizer = torch.optim.LBFGS(
        list(free.values()),
        max_iter=_NUM_PARAMETER_STEPS,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -log_evidence()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    at = {name: value.detach() for name, value in values().items()}
    if not all(value.isfinite().all() for value in at.values()):
        raise ValueError(
            f"The evidence has no maximum in the prior's parameters {list(at)}. Bound "
            "them by constraint=, or use per='all', which has bounds."
        )

    best = PriorAtParameters(prior, at)
    return best, _moments(best, networks, mode)


def _nodes(
    prior: Prior,
    networks: Sequence[LiftedNetwork],
    gaussian: WeightGaussian,
    values: Mapping[str, Tensor],
) -> list[dict[str, Any]]:
    nodes = []
    for lora in networks:
        with AtParameters(values):
            trace = trace_at(partial(prior, lora), gaussian.loc, {})
        nodes += [trace.nodes[site] for site in lora.sites if site in gaussian.loc]
    return nodes


@torch.no_grad()
def _log_prior(
    prior: Prior,
    networks: Sequence[LiftedNetwork],
    gaussian: WeightGaussian,
    values: Mapping[str, Tensor],
) -> float:
    return sum(
        float(
            scale_and_mask(
                node["fn"].log_prob(gaussian.loc[node["name"]]),
                node["scale"],
                node["mask"],
            ).sum()
        )
        for node in _nodes(prior, networks, gaussian, values)
    )


def _check_as_fitted(now: float, then: Tensor) -> None:
    if abs(now - float(then)) > _SAME * max(1.0, abs(now)):
        raise ValueError(
            f"The prior's log density at the mode is {now:.6g}, but it was "
            f"{float(then):.6g} in the fit: its pyro.param values changed since. Fit "
            "again."
        )


def _moments(
    prior: Prior, networks: Sequence[LiftedNetwork], mode: Mapping[str, Tensor]
) -> PriorAtMode:
    mean: Weights = {}
    precision: Weights = {}
    gradient: Weights = {}
    total = torch.zeros((), dtype=torch.float64)
    for lora in networks:
        part = {site: mode[site] for site in lora.sites if site in mode}
        found = prior_at_mode(trace_at(partial(prior, lora), part, {}), part)
        mean |= found.mean
        precision |= found.precision
        gradient |= found.gradient
        total = total + found.log_prob.to(total.device)
    return PriorAtMode(mean, precision, total, gradient)
