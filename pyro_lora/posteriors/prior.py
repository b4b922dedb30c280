"""The prior of a posterior: what it may be, draws of it, its density at draws.

A prior is a function of a lifted network that samples its sites. A posterior has the
one that it was made with: its networks' own, or one that tuning has found.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_lora.curvature.prior_moments import counted_scale
from pyro_lora.ground.summary import FieldsShown, ShownInside, extent
from pyro_lora.ground.weights import Weights, drawing_nothing
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.lifting.prior import NOISE
from pyro_lora.likelihood.model_trace import Model, trace_at
from pyro_lora.priors import Prior


def networks_prior(networks: Sequence[LiftedNetwork]) -> Prior:
    """The prior that networks were lifted with, of each the one of its sites.

    Args:
        networks: Lifted networks; with none it's that of whichever is asked about.
    """
    if not networks:
        return _own_prior
    if len(networks) == 1:
        return networks[0].prior
    return _PriorOfEach({frozenset(lora.sites): lora.prior for lora in networks})


def is_networks_own(prior: Prior, networks: Sequence[LiftedNetwork]) -> bool:
    """Whether it is the one that networks were lifted with, as it is there.

    Args:
        prior: A posterior's.
        networks: The posterior's lifted networks.
    """
    of_each = prior.priors if isinstance(prior, _PriorOfEach) else {}
    return all(
        of_each.get(frozenset(lora.sites), prior) is lora.prior for lora in networks
    )


def _own_prior(lora: LiftedNetwork) -> Weights:
    return lora.prior(lora)


@dataclass(frozen=True, eq=False, repr=False)
class _PriorOfEach(FieldsShown):
    """Of several networks, each told by its sites, the prior of each."""

    priors: Mapping[frozenset[str], Prior]

    def __call__(self, lora: LiftedNetwork) -> Weights:
        return self.priors[frozenset(lora.sites)](lora)


def normal_prior(mean: Weights, precision: Weights, fixed: Weights) -> Prior:
    """The prior N(mean, 1 / precision), both by site, and Deltas at fixed values."""
    fns = {
        site: dist.Normal(x, precision[site].rsqrt().expand(x.shape)).to_event(x.ndim)
        for site, x in mean.items()
    }
    return _SitePriors(fns, fixed)


def _points(values: Weights) -> dict[str, dist.TorchDistribution]:
    """Deltas, whose draws are copies: a Delta's own are its value."""
    return {s: dist.Delta(x.clone(), event_dim=x.ndim) for s, x in values.items()}


@dataclass(frozen=True, eq=False, repr=False)
class _SitePriors(ShownInside):
    """A normal distribution for each site, or the value where it is fixed."""

    fns: Mapping[str, dist.Independent]
    fixed: Weights

    def _facts(self) -> dict[str, str]:
        normals = [fn.base_dist for fn in self.fns.values()]
        facts = {
            name: extent(getattr(x, name) for x in normals) for name in ("scale", "loc")
        }
        return facts | ({"fixed": f"{len(self.fixed)} sites"} if self.fixed else {})

    def __call__(self, lora: LiftedNetwork) -> Weights:
        fns = {**self.fns, **_points(self.fixed)}
        return {site: pyro.sample(site, fns[site]) for site in lora.sites}


def scaled(prior: Prior, scales: Mapping[str, float | Tensor]) -> Prior:
    """The prior with log densities that count as a model says.

    Args:
        prior: The prior.
        scales: Site -> scale, as
            :func:`~pyro_lora.curvature.prior_moments.model_scales` finds them.
    """
    return _Scaled(prior, dict(scales)) if scales else prior


@dataclass(frozen=True, eq=False, repr=False)
class _Scaled(FieldsShown):
    """A prior some of whose sites count as a model says."""

    prior: Prior
    scales: Mapping[str, float | Tensor]

    def __call__(self, lora: LiftedNetwork) -> Weights:
        with _Scaling(self.scales):
            return self.prior(lora)


def fixing(prior: Prior, fixed: Weights) -> Prior:
    """The prior with some sites fixed at values: Deltas."""
    return _Fixing(prior, fixed) if fixed else prior


@dataclass(frozen=True, eq=False, repr=False)
class _Fixing(FieldsShown):
    """A prior with some sites fixed at values."""

    prior: Prior
    fixed: Weights

    def __call__(self, lora: LiftedNetwork) -> Weights:
        with _UnderPrior(_points(self.fixed)):
            return self.prior(lora)


@dataclass(frozen=True, eq=False, repr=False)
class PriorAtParameters(FieldsShown):
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
        # What the user has conditioned has no prior that could be another.
        if msg["name"] in self.fns and not msg["is_observed"]:
            msg["fn"] = self.fns[msg["name"]]


class _Scaling(Messenger):
    """Sites whose log densities count as much as is said here."""

    def __init__(self, scales: Mapping[str, float | Tensor]) -> None:
        super().__init__()
        self.scales = scales

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.scales:
            msg["scale"] = self.scales[msg["name"]]


def under_prior(
    model: Model, prior: Prior, networks: Sequence[LiftedNetwork], like: Any
) -> Model:
    """The model with another prior on the sites of its lifted networks.

    It counts as it says: a ``poutine.scale`` in the model, which tempers the prior
    there, is part of this one where it should be.

    Args:
        model: A Pyro model.
        prior: The prior; its sites are independent given their names.
        networks: The lifted networks.
        like: Site -> a value of the site's shape.

    Returns:
        A Pyro model; the one given is as before.
    """
    nodes: dict[str, Any] = {}
    # Traced once, so that the model's own statements, plates and names stay as they are
    # and only distributions and scales are others.
    for lora in networks:
        trace = trace_at(partial(prior, lora), like, {})
        nodes |= {site: trace.nodes[site] for site in lora.sites}
    fns = {site: node["fn"] for site, node in nodes.items()}
    scales = {site: counted_scale(node) for site, node in nodes.items()}

    def changed(*args: Any, **kwargs: Any) -> Any:
        with _Scaling(scales), _UnderPrior(fns):
            return model(*args, **kwargs)

    return changed


@torch.no_grad()
def prior_draws(prior: Prior, networks: Sequence[LiftedNetwork], num: int) -> Weights:
    """Draws of every latent site of the prior.

    Args:
        prior: The prior.
        networks: The lifted networks.
        num: S.

    Returns:
        Site -> (S, ...), the prior's own latent scales included.
    """
    draws: dict[str, list[Tensor]] = {}
    for lora in networks:
        for _ in range(num):
            trace: Any = poutine.trace(prior).get_trace(lora)
            for name, node in latent_nodes(trace).items():
                draws.setdefault(name, []).append(node["value"])
    return {name: torch.stack(values) for name, values in draws.items()}


@torch.no_grad()
def with_scaled_sites(
    prior: Prior, networks: Sequence[LiftedNetwork], draws: Mapping[str, Tensor]
) -> Weights:
    """The draws, and the sites that the prior makes of other latents.

    Args:
        prior: The prior.
        networks: The lifted networks.
        draws: Site -> (S, ...), all latent sites of the prior.

    Returns:
        Site -> (S, ...): where the latents are ``<site>_decentered``, say, the site,
        too.
    """
    made: dict[str, list[Tensor]] = {}
    has_noise = any(site.endswith(NOISE) for site in draws)
    for lora in networks:
        if lora.sites.keys() <= draws.keys() and not has_noise:
            continue
        for s in range(next(iter(draws.values())).shape[0]):
            at = {site: value[s] for site, value in draws.items()}
            trace = trace_at(lambda lora=lora: prior(lora), at, {})
            for site, node in trace.nodes.items():
                is_weight = site in lora.sites and site not in draws
                if f"{site}{NOISE}" in draws or (is_weight and node["is_observed"]):
                    made.setdefault(site, []).append(node["value"])  # not drawn anew
    return dict(draws) | {site: torch.stack(values) for site, values in made.items()}


@torch.no_grad()
def made_of_latents(
    prior: Prior, networks: Sequence[LiftedNetwork], sites: Container[str]
) -> Weights:
    """The lifted sites that a prior makes of latents that are all among ``sites``.

    Args:
        prior: The prior.
        networks: The lifted networks.
        sites: Names of latent sites.

    Returns:
        Site -> the value that it has where all latents are 1.
    """
    made: Weights = {}
    for lora in networks:
        of_network = partial(prior, lora)
        with drawing_nothing(lora.zeros()):
            latents = latent_nodes(trace_at(of_network, {}, {}))
            if all(site in sites for site in latents):
                ones = {s: torch.ones_like(x["value"]) for s, x in latents.items()}
                nodes = trace_at(of_network, ones, {}).nodes
                names = [site for site in lora.sites if site not in latents]
                made |= {site: nodes[site]["value"] for site in names}
    return made


def log_prior_by_site(
    prior: Prior, networks: Sequence[LiftedNetwork], draws: Mapping[str, Tensor]
) -> Weights:
    """Log density of each site under the prior.

    Args:
        prior: The prior.
        networks: The lifted networks.
        draws: Site -> (S, ...).

    Returns:
        Site -> (S,), nats, float64 (a sum over thousands of weights), differentiable.
    """
    log_probs: dict[str, list[Tensor]] = {}
    num_draws = next(iter(draws.values())).shape[0]
    for lora in networks:
        for s in range(num_draws):
            at = {site: value[s].double() for site, value in draws.items()}
            trace = trace_at(lambda lora=lora: prior(lora), at, {})
            for name, node in latent_nodes(trace).items():
                if name in draws:
                    log_prob = node["fn"].log_prob(node["value"])
                    counted = scale_and_mask(log_prob, node["scale"], node["mask"])
                    log_probs.setdefault(name, []).append(counted.sum())
    return {name: torch.stack(values) for name, values in log_probs.items()}


def latent_nodes(trace: Any) -> dict[str, Any]:
    """The nodes of a trace that are sampled, site by site."""
    return {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample"
        and not node["is_observed"]
        and not site_is_subsample(node)
    }
