r"""Choosing the prior: by the evidence, or by held-out data.

At a fixed mode the evidence of normal priors of precision :math:`\tau_g`, one for each
group g of :math:`n_g` weights at the squared distance :math:`d_g` from the prior's
mean, is up to a constant

.. math:: \frac12 \sum_g [n_g \log \tau_g - \tau_g d_g] - \frac12 \log \det (F +
          \mathrm{diag}\,\tau),

and takes no pass over the data. Where F is large beside :math:`\tau` its maximum is at
:math:`\tau_g = n_g / d_g`, one over the weights' mean square; in general it's at
:math:`\gamma_g / d_g` with the effective parameters :math:`\gamma_g \le n_g`
(MacKay 1992, section 4), and a group of which the data say nothing keeps what it has.
Held-out data are predicted under a grid of precisions in one pass: only
:math:`J P^{-1} J^T` differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from operator import length_hint
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints, transform_to

from pyro_lora.curvature.dual_gaussian import DualGaussian, UnresolvedError
from pyro_lora.curvature.gaussian_logits import GaussianLogits
from pyro_lora.curvature.linear_model import FollowedEvidence, largest
from pyro_lora.curvature.linearize import LinearizedNetwork
from pyro_lora.curvature.observations import log_predictive
from pyro_lora.curvature.prior_moments import PriorAtMode, prior_at_mode, site_moments
from pyro_lora.curvature.weight_gaussian import WeightGaussian
from pyro_lora.ground.progress import Counted, progress
from pyro_lora.ground.ranks import ALONE, Ranks
from pyro_lora.ground.settings import check_gradients, check_number, check_word
from pyro_lora.ground.warning import warn
from pyro_lora.ground.weights import Weights
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood import likelihoods
from pyro_lora.likelihood.batch import READ_ONCE, Batch, check_batches, checked_batches
from pyro_lora.likelihood.model_trace import naming_batch, trace_at
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
_ROUNDING = 1e-6  # relative, of a precision at an end
_SAME = 1e-4  # relative difference of two log densities, in float32
_NOTHING = 1e-9  # effective parameters under a precision of 1, far above rounding
_NUM_SWEEPS = 2  # over the groups, of the search on held-out data
_UNRESOLVED = 1e30  # nats, where float64 can't tell an evidence
_DECADES = [float(x) for x in range(7, -7, -1)]  # of the search by a score
_MAX_SWEEPS, _SAME_DECADE = 5, 0.1  # over its groups, and where it ends
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
        tau = torch.as_tensor(values[site], dtype=x.dtype, device=x.device)
        tau = tau.detach().clone()  # the user's own may change
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
    |w_g - m_g|^2] - \frac12 \log\det(F + \mathrm{diag}\,\tau)`. Of a group without
    Fisher information, as an expert that no token reaches, that is :math:`-\tau_g
    |w_g - m_g|^2 / 2`, and would leave no prior at all: it keeps its own.

    Args:
        gaussian: Mode and Fisher information.
        prior_mean: Site -> mean of the prior.
        per: ``"all"``, ``"site"`` or ``"layer"``: what shares one precision.

    Returns:
        Site -> precision, one for each of L matrices, (L, 1, 1), or (L, 1) of a bias;
        within 1e-8 to 1e8.

    Raises:
        ValueError: If ``per`` is something else.

    Warns:
        UserWarning: If one is at an end.
    """
    check_gradients()
    _num_precisions(gaussian.loc, per)
    loc = gaussian.loc
    distance = torch.cat(  # |w - m|^2, of each matrix
        [
            (x - prior_mean[s]).double().square().flatten(1).sum(1)
            for s, x in loc.items()
        ]
    )
    sizes = torch.cat(  # n, of each matrix
        [distance.new_full(x.shape[:1], x[0].numel()) for x in loc.values()]
    )

    def log_shrinkage(log_tau: Tensor) -> Tensor:
        # Its gradient is gamma, the effective parameters of each group. One number for
        # all stays one, for which that takes no matrix of each layer.
        tau = _by_matrix(log_tau.exp(), loc, per)
        log_det = gaussian.log_det(_by_site(tau, loc))
        return (sizes * _by_matrix(log_tau, loc, per)).sum() - log_det

    # Logarithms, in which no step leaves the positive numbers; they start at tau = 1.
    present = _log_means(gaussian.prior_precision, per)
    start = torch.zeros_like(present, requires_grad=True)
    with torch.enable_grad():
        (gamma,) = torch.autograd.grad(log_shrinkage(start), start)
    is_informed = gamma > _NOTHING

    def log_evidence(log_tau: Tensor) -> Tensor:
        log_tau = log_tau.where(is_informed, present)
        tau = _by_matrix(log_tau.exp(), loc, per)
        return 0.5 * (log_shrinkage(log_tau) - (tau * distance).sum())

    found = _climbed(log_evidence, start.detach(), loc, per, 1e-9, 1e-12)
    informed = _by_site(_by_matrix(is_informed, loc, per), loc)
    _warn_at_ends(
        {s: tau[informed[s]] for s, tau in found.items()},
        MIN_PRECISION,
        MAX_PRECISION,
        "Use per='all'",
        within=math.log(2),  # where the bounds' parabola stops it
    )
    kept = gaussian.prior_precision
    return {s: tau.where(informed[s], kept[s].to(tau)) for s, tau in found.items()}


def maximize_followed_evidence(
    gaussian: DualGaussian, prior_mean: Weights, per: str
) -> Weights:
    """Likewise where the mode is the linearised network's and follows the prior.

    One precision for all is looked for over decades first, and all go on from there by
    the gradient. Several are looked for from the present ones, too: the best one for
    all may be so strong that no gradient leads away from it.

    Args:
        gaussian: One that knows what was observed.
        prior_mean: Site -> mean of the prior.
        per: As of :func:`maximize_evidence`.

    Returns:
        Site -> precision, (L, 1, 1), within 1e-8 to 1e8.

    Raises:
        ValueError: If ``per`` is something else.

    Warns:
        UserWarning: If one is at an end of the decades, or beyond.
    """
    check_gradients()
    loc = gaussian.loc
    size = _num_precisions(loc, per)
    evidence = FollowedEvidence(gaussian, prior_mean)

    def log_evidence(log_tau: Tensor) -> Tensor:
        tau = _by_matrix(log_tau.exp(), loc, per)
        try:
            return evidence(gaussian.rows.kernel(_by_site(tau, loc)))
        except UnresolvedError:  # a finite number, from which a line search turns back
            return 0 * log_tau.sum() - _UNRESOLVED

    first = next(iter(loc.values()))
    ones = torch.ones(size, dtype=torch.float64, device=first.device)

    def at_decade(x: float) -> float:
        return float(log_evidence(x * math.log(10) * ones))

    starts = [largest(at_decade, _DECADES) * math.log(10) * ones]
    if size > 1:
        starts.append(_log_means(gaussian.prior_precision, per))
    each = [_climbed(log_evidence, x, loc, per, 1e-5, 1e-7) for x in starts]
    found = max(each, key=lambda x: float(log_evidence(_log_means(x, per))))
    low, high = 10 ** _DECADES[-1], 10 ** _DECADES[0]
    _warn_at_ends(found, low, high, "Use objective='loo'")
    return found


def _climbed(
    log_evidence: Callable[[Tensor], Tensor],
    theta: Tensor,
    loc: Weights,
    per: str,
    tolerance_grad: float,
    tolerance_change: float,
) -> Weights:
    """Where a function of log precisions (G,) is largest, from a start."""
    theta = theta.requires_grad_()
    num_weights = sum(x.numel() for x in loc.values())
    low, high = math.log(MIN_PRECISION), math.log(MAX_PRECISION)

    optimizer = torch.optim.LBFGS(
        [theta],
        max_iter=_NUM_STEPS,
        tolerance_grad=tolerance_grad,
        tolerance_change=tolerance_change,
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
    precisions = _spread(theta.detach().exp(), loc, per)
    return {s: tau.clamp(MIN_PRECISION, MAX_PRECISION) for s, tau in precisions.items()}


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
    pairs = zip(values, layers, strict=True)
    return torch.cat([value.expand(number) for value, number in pairs])


def _by_site(matrices: Tensor, loc: Weights) -> Weights:
    """One value for each matrix of all sites as site -> (L, 1, 1)."""
    by_site = matrices.split([x.shape[0] for x in loc.values()])
    return {
        site: part.reshape(-1, *[1] * (x.ndim - 1))
        for (site, x), part in zip(loc.items(), by_site, strict=True)
    }


def _log_means(precisions: Weights, per: str) -> Tensor:
    """The logarithm of precisions, on average over each group, (G,)."""
    by_site = [tau.double().log().flatten(1).mean(1) for tau in precisions.values()]
    if per == "layer":
        return torch.cat(by_site)
    means = torch.stack([x.mean() for x in by_site])
    return means if per == "site" else means.mean()[None]


def _spread(values: Tensor, loc: Weights, per: str) -> Weights:
    """Precisions (G,), one for each group, as site -> (L, 1, 1)."""
    return _by_site(_by_matrix(values, loc, per), loc)


def search_precision(
    score: Callable[[Weights], float], loc: Weights, per: str, remedy: str
) -> Weights:
    """The prior precisions with the largest score, by values of it alone.

    One for all first, over decades and between the best of them; then of each group in
    turn, the others fixed, until none moves by a tenth of a decade.

    Args:
        score: A function of site -> precision, (L, 1, 1).
        loc: Site -> a value of the site's shape.
        per: ``"all"``, ``"site"`` or ``"layer"``: what shares one precision.
        remedy: What to do where one is at an end.

    Returns:
        Site -> precision, (L, 1, 1).

    Warns:
        UserWarning: If one is at an end of the decades.
    """
    size = _num_precisions(loc, per)
    first = next(iter(loc.values()))
    log_tau = torch.zeros(size, dtype=torch.float64, device=first.device)

    def spread(values: Tensor) -> Weights:
        return _spread(10**values, loc, per)

    best = largest(lambda x: score(spread(torch.full_like(log_tau, x))), _DECADES)
    log_tau += best
    for _ in range(_MAX_SWEEPS if size > 1 else 0):
        before = log_tau.clone()
        for group in range(size):

            def of_group(x: float, group: int = group) -> float:
                values = log_tau.clone()
                values[group] = x
                return score(spread(values))

            center = float(log_tau[group])
            around = (center + step for step in (2, 1, 0, -1, -2))
            inside = [min(max(x, _DECADES[-1]), _DECADES[0]) for x in around]
            log_tau[group] = largest(of_group, inside)
        if bool((log_tau - before).abs().max() < _SAME_DECADE):
            break
    found = spread(log_tau)
    _warn_at_ends(found, 10 ** _DECADES[-1], 10 ** _DECADES[0], remedy)
    return found


def _warn_at_ends(
    precisions: Weights,
    low: float,
    high: float,
    remedy: str,
    within: float = _ROUNDING,
) -> None:
    """Warn of precisions at the ends of those tried: the best lie beyond, or nowhere.

    Args:
        precisions: Site -> tau.
        low: The least that was tried.
        high: The largest.
        remedy: What to do, other than what has just been done.
        within: A distance of logarithms, up to which one is at an end.
    """
    for end, sign, of_prior in ((high, 1, "strongest"), (low, -1, "weakest")):
        sites = [
            site
            for site, tau in precisions.items()
            if bool((sign * (tau / end).log() >= -within).any())
        ]
        if sites:
            is_all = 3 < len(sites) == len(precisions)
            where = "all sites" if is_all else f"{sites}"
            warn(
                f"The best prior precision is {end:g}, the {of_prior} prior tried, at "
                f"{where}: the data given don't set it. {remedy}, or choose one "
                "yourself by with_prior_precision."
            )


def minimize_nll(
    network: LinearizedNetwork,
    gaussian: WeightGaussian,
    batches: Iterable[Batch],
    per: str,
    progress_bar: bool | None = None,
    ranks: Ranks = ALONE,
) -> Weights:
    """The prior precisions with the smallest held-out negative log likelihood.

    Every precision of a grid (8 a decade, 1e-4 to 1e6) is evaluated in the same pass,
    first of one for all; then of each group in turn, the others fixed, twice.

    Args:
        network: Linearised at the Gaussian's origin.
        gaussian: Mode and Fisher information.
        batches: Held-out batches with labels.
        per: ``"all"``, ``"site"`` or ``"layer"``: what shares one precision.
        progress_bar: Show one, of the batches of all passes.
        ranks: Who shares the data.

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
        losses = _nll(network, gaussian, Counted(batches, bar), priors, ranks)
        return candidates[int(losses.argmin())]

    # One coordinate after the other: a grid over all of them has 81^G points.
    num_sweeps = _NUM_SWEEPS if size > 1 else 0
    total = length_hint(batches) * (1 + num_sweeps * size)
    with progress(
        title="Prior", unit="batch", total=total or None, shown=progress_bar
    ) as bar:
        tau = best_of(grid[:, None].expand(-1, size))
        for _ in range(num_sweeps):
            for group in range(size):
                candidates = tau.repeat(len(grid), 1)  # (grid, G)
                candidates[:, group] = grid
                tau = best_of(candidates)
    precisions = _spread(tau, gaussian.loc, per)
    remedy = (
        "Give more held-out data, which the weights weren't trained on; use "
        "objective='evidence'"
    )
    _warn_at_ends(precisions, float(_GRID[0]), float(_GRID[-1]), remedy)
    return precisions


def _nll(
    network: LinearizedNetwork,
    gaussian: WeightGaussian,
    batches: Iterable[Batch],
    priors: Sequence[Weights],
    ranks: Ranks,
) -> Tensor:
    total: Tensor | float = 0.0
    num_outcomes = 0
    for index, batch in enumerate(ranks.in_step(checked_batches(batches))):
        with naming_batch(index):
            at_batch = network.at(batch, every=True)
            site, logits = at_batch.site, at_batch.logits(gaussian, priors)
            if not site["is_observed"]:
                raise ValueError(
                    f"Held-out batch {index} has no labels, which objective='nll' "
                    f"needs: site {site['name']!r} isn't observed."
                )
            losses = torch.stack([_log_loss(of_prior, site) for of_prior in logits])
            if not losses.isfinite().all():
                raise ValueError(
                    f"Site {site['name']!r}: the log likelihood is NaN or infinite. "
                    "Check the labels."
                )
            total = total + losses
            num_outcomes += int(outcomes_that_count(site).sum())
    if not isinstance(total, Tensor):
        raise ValueError(ranks.none_here("objective='nll' got no batches."))
    total, num_outcomes = ranks.sum(total), ranks.total(num_outcomes)
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
    counts = outcomes_that_count(site)
    wrong = counts & ~is_possible(fn, value)
    if bool(wrong.any()):
        raise ValueError(
            f"Site {site['name']!r}: {impossible(fn, value[wrong].flatten()[0].item())}"
        )
    loss = -log_predictive(logits, likelihoods.of(fn), values_to_score(site))
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
        ValueError: If the prior has no parameters, is tempered, isn't as it was when
            the mode was found, or the evidence has no maximum.
    """
    check_gradients()
    mode = {site: x.detach().requires_grad_() for site, x in gaussian.loc.items()}
    parameters: dict[str, Any] = {}
    for lora in networks:
        trace = trace_at(partial(prior, lora), mode, {})
        for name, node in trace.nodes.items():
            if node["type"] == "param":
                parameters[name] = (node["value"], node["kwargs"].get("constraint"))
    if not parameters:
        raise ValueError(
            "per='prior' trains the prior's own parameters, but it has no pyro.param. "
            "Use per='all', 'site' or 'layer', or a prior with one."
        )
    transforms = {
        k: transform_to(c or constraints.real) for k, (_, c) in parameters.items()
    }
    free = {  # unconstrained, so that steps stay within the parameters' constraints
        name: transforms[name].inv(value.detach()).double().requires_grad_()
        for name, (value, _) in parameters.items()
    }

    def values() -> dict[str, Tensor]:
        return {k: transforms[k](u).to(parameters[k][0]) for k, u in free.items()}

    def log_evidence() -> Tensor:
        first, precisions = next(iter(gaussian.loc.values())), {}
        total = first.new_zeros((), dtype=torch.float64)
        for node in _nodes(prior, networks, gaussian, values()):
            w = gaussian.loc[node["name"]]
            log_prob = node["fn"].log_prob(w)
            total = total + log_prob.double().sum().to(total.device)
            precisions[node["name"]] = site_moments(node, w)[1]
        in_order = {site: precisions[site] for site in gaussian.loc}
        # theta moves it by the prior's density and by the tau that P has from it.
        return total - 0.5 * gaussian.log_det(in_order).to(total.device)

    _check_normalised(_nodes(prior, networks, gaussian, values()))
    # F was found at a mode under the parameters' values then.
    at_first = PriorAtParameters(prior, {k: x.detach() for k, x in values().items()})
    check_as_fitted(
        float(moments_at(at_first, networks, gaussian.loc).log_prob), log_prior
    )
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
    return best, moments_at(best, networks, mode)


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


def _check_normalised(nodes: Sequence[Mapping[str, Any]]) -> None:
    """Check that a prior's densities integrate to one, whatever its parameters.

    Raises:
        ValueError: If one is tempered.
    """
    for node in nodes:
        scale = torch.as_tensor(node["scale"])
        if bool((scale != 1).any()):
            raise ValueError(
                f"Site {node['name']!r}: its log prior counts "
                f"{float(scale.flatten()[0]):.3g} times, by a poutine.scale around "
                "lora() or the model. p(w)^s isn't normalised, so that per='prior' has "
                "no evidence to train its parameters by. Use per='all', 'site' or "
                "'layer', which find a normal prior; or scale the likelihood alone."
            )


def check_as_fitted(now: float, then: Tensor) -> None:
    """Check that a prior is as it was when the mode was found.

    Args:
        now: Its log density at the mode.
        then: The same in the fit.

    Raises:
        ValueError: If its parameters changed.
    """
    if abs(now - float(then)) > _SAME * max(1.0, abs(now)):
        raise ValueError(
            f"The prior's log density at the mode is {now:.6g}, but it was "
            f"{float(then):.6g} in the fit: its pyro.param values changed since. Fit "
            "again."
        )


def moments_at(
    prior: Prior, networks: Sequence[LiftedNetwork], weights: Mapping[str, Tensor]
) -> PriorAtMode:
    """What a prior contributes at a mode.

    Args:
        prior: The prior.
        networks: The lifted networks that it is the prior of.
        weights: Lifted site -> the mode.
    """
    mode = {site: x.detach().requires_grad_() for site, x in weights.items()}
    mean: Weights = {}
    precision: Weights = {}
    gradient: Weights = {}
    correlated: tuple[str, ...] = ()
    first = next(iter(mode.values()))
    total = first.new_zeros((), dtype=torch.float64)
    for lora in networks:
        own = {site: mode[site] for site in lora.sites if site in mode}
        moments = prior_at_mode(trace_at(partial(prior, lora), own, {}), own)
        mean |= moments.mean
        precision |= moments.precision
        gradient |= moments.gradient
        correlated += moments.correlated
        total = total + moments.log_prob.to(total.device)
    return PriorAtMode(mean, precision, total, gradient, correlated)
