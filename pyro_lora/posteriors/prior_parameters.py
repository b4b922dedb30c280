"""Priors with ``pyro.param`` values to train, and models under another prior."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints, transform_to

from pyro_lora.curvature.prior_moments import PriorAtMode, prior_at_mode, site_moments
from pyro_lora.curvature.weight_gaussian import WeightGaussian
from pyro_lora.ground.weights import Weights
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood.model_trace import Model, trace_at
from pyro_lora.priors import Prior

_NUM_STEPS = 200  # of L-BFGS at most
_SAME = 1e-4  # relative difference of two log densities, in float32


class AtParameters(Messenger):
    """``pyro.param`` statements take given values; the param store stays as it is."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_param(self, msg: Any) -> None:
        if msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]


class _UnderPrior(Messenger):
    """Sites that are sampled from other distributions than the model says."""

    def __init__(self, fns: Mapping[str, Any]) -> None:
        super().__init__()
        self.fns = fns

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.fns and not msg["is_observed"]:
            msg["fn"] = self.fns[msg["name"]]


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
        max_iter=_NUM_STEPS,
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


def under_prior(
    model: Model, prior: Prior, networks: Sequence[LiftedNetwork], like: Any
) -> Model:
    """The model with another prior on the sites of its lifted networks.

    Args:
        model: A Pyro model.
        prior: The prior; its sites are independent given their names.
        networks: The lifted networks.
        like: Site -> a value of the site's shape.

    Returns:
        A Pyro model; the one given is as before.
    """
    fns: dict[str, Any] = {}
    for lora in networks:
        trace = trace_at(partial(prior, lora), like, {})
        fns |= {site: trace.nodes[site]["fn"] for site in lora.sites}

    def changed(*args: Any, **kwargs: Any) -> Any:
        with _UnderPrior(fns):
            return model(*args, **kwargs)

    return changed


@dataclass(frozen=True, eq=False)
class PriorAtParameters:
    """A prior whose ``pyro.param`` statements take given values.

    Attributes:
        prior: The prior.
        values: Name -> value.
    """

    prior: Prior
    values: Mapping[str, Tensor]

    def __call__(self, lora: LiftedNetwork) -> Weights:
        """Sample every site."""
        with AtParameters(self.values):
            return self.prior(lora)


@dataclass(frozen=True, eq=False)
class _PriorOfEach:
    """Of several networks, each told by its sites, the prior of each."""

    priors: Mapping[frozenset[str], Prior]

    def __call__(self, lora: LiftedNetwork) -> Weights:
        return self.priors[frozenset(lora.sites)](lora)


@dataclass(frozen=True, eq=False)
class _Fixing:
    """A prior with some sites fixed at values."""

    prior: Prior
    fixed: Weights

    def __call__(self, lora: LiftedNetwork) -> Weights:
        fns = {s: dist.Delta(x, event_dim=x.ndim) for s, x in self.fixed.items()}
        with _UnderPrior(fns):
            return self.prior(lora)


def present_prior(networks: Sequence[LiftedNetwork]) -> Prior:
    """The networks' priors as they are now, whatever ``lora.prior`` is set to later."""
    return _PriorOfEach({frozenset(lora.sites): lora.prior for lora in networks})


def fixing(prior: Prior, fixed: Weights) -> Prior:
    """The prior with some sites fixed at values: Deltas."""
    return _Fixing(prior, fixed) if fixed else prior


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
            f"{float(then):.6g} in the fit: its pyro.param values changed since, or "
            "the model scales or masks lora(). Fit again, and scale inside the prior."
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
