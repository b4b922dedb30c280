"""ArviZ's groups for some draws of a posterior."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_lora.export.chains import Chains, Draws
from pyro_lora.export.linearized_pass import LinearizedAtDraws
from pyro_lora.export.weight_variables import (
    Variables,
    check_raw_size,
    delta_variables,
    raw_variables,
)
from pyro_lora.ground.weights import Weights
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood.batch import Batch
from pyro_lora.likelihood.model_trace import Model, evaluating_model, trace_at
from pyro_lora.likelihood.outcome_source import OutcomeSource
from pyro_lora.posteriors.posterior import (
    Posterior,
    kind_of,
    only_gaussian,
    tempered_prior,
)
from pyro_lora.posteriors.prior import (
    log_prior_by_site,
    networks_prior,
    prior_draws,
    scaled,
    with_scaled_sites,
)
from pyro_lora.predict.data_pass import DataPass, pass_over_data
from pyro_lora.predict.draws import model_at_draws, outcome_source
from pyro_lora.priors import Prior

if TYPE_CHECKING:
    from xarray import Dataset

UnderPrior = Callable[[Prior, Sequence[LiftedNetwork], Weights], Weights]


@dataclass(frozen=True, eq=False)
class DrawGroups:
    """What the groups are made from, some draws at a time.

    Attributes:
        posterior: The posterior; None where there are draws alone.
        kind: What it is called.
        chains: Its draws.
        model: The Pyro model, where there is one.
        batches: The data, or None.
        first: The first batch, or None.
        raw: Whether sites come as they are.
        linearized: Whether the likelihood is that of the linearised network.
        obs_site: The likelihood's site, or None.
        labels: The model's argument with that site's outcomes, where it is named.
    """

    posterior: Posterior | None
    kind: str
    chains: Chains
    model: Model | None
    batches: Iterable[Batch] | None
    first: Batch | None
    raw: bool
    linearized: bool
    obs_site: str | None
    labels: str | None

    def datasets(
        self, start: int, stop: int, prior_predictive: bool
    ) -> dict[str, Dataset]:
        """The groups of the draws from start to stop of every chain.

        Args:
            start: The first draw's place in its chain.
            stop: One after the last's.
            prior_predictive: Whether to run the model at draws of the prior, too.
        """
        from arviz_base import dict_to_dataset

        some = self.chains.take(start, stop)
        if self.raw:
            check_raw_size(some.weights)
        data = self._pass(some)
        networks = self._networks(data)
        variables = raw_variables if self.raw else delta_variables
        mode = _modes(self.chains, some)
        scales = {} if data is None else data.prior_scales
        priors = _priors(self.chains, some, scales)
        drawn = _by_draw(
            priors, lambda prior, draws: prior_draws(prior, networks, len(draws))
        )

        def under_prior(of: UnderPrior, weights: Weights) -> Weights:
            return _by_draw(
                priors,
                lambda prior, draws: of(
                    prior, networks, {site: x[draws] for site, x in weights.items()}
                ),
            )

        log_prior = under_prior(log_prior_by_site, some.weights)
        if data is not None:
            log_prior = data.log_prior | log_prior
        groups = {
            "posterior": variables(
                networks, under_prior(with_scaled_sites, some.weights), mode
            ),
            "prior": variables(networks, under_prior(with_scaled_sites, drawn)),
            "log_prior": _variables(log_prior),
            "sample_stats": _variables(
                self._sample_stats(some, data, log_prior, slice(start, stop))
            ),
            **_data_groups(data),
        }
        if prior_predictive and data is not None:
            groups["prior_predictive"] = self._prior_predictive(some, drawn, data)
        result = {}
        # Group by group: a site's draws and its log prior have one name, other dims.
        for name, group in groups.items():
            if group.values:
                result[name] = dict_to_dataset(
                    {n: self._shaped(name, x) for n, x in group.values.items()},
                    dims=group.dims,
                    coords=group.coords,
                    sample_dims=["chain", "draw"] if per_draw(name) else [],
                    attrs=self._attributes(name, data),
                    check_conventions=False,  # a chunk may have fewer draws than chains
                )
                for variable, module in group.modules.items():
                    result[name][variable].attrs["module"] = module
                if per_draw(name):
                    result[name] = result[name].assign_coords(draw=range(start, stop))
        return result

    def _shaped(self, group: str, value: Any) -> Any:
        """(S, ...) -> (chain, draw, ...)."""
        if not per_draw(group):
            return value
        return value.reshape(self.chains.num_chains, -1, *value.shape[1:])

    def _pass(self, some: Draws) -> DataPass | None:
        if self.batches is None or self.first is None:
            return None
        assert self.model is not None  # to_datatree has checked it
        labels = self._source(some).arguments(self.first)
        if self.linearized:
            assert self.obs_site is not None
            gaussians = [only_gaussian(part) for part in self.chains.components]
            at = LinearizedAtDraws(
                self.model,
                [part for part in gaussians if part is not None],  # datatree's check
                some,
                self.obs_site,
            )
            return pass_over_data(at, self.batches, labels)
        return pass_over_data(
            model_at_draws(self.model, some.weights, self.first, self.obs_site),
            self.batches,
            labels,
        )

    def _source(self, some: Draws) -> OutcomeSource:
        assert self.model is not None
        one = {site: value[0] for site, value in some.weights.items()}
        return outcome_source(self.model, one, self.obs_site, self.labels)

    def _networks(self, data: DataPass | None) -> Sequence[LiftedNetwork]:
        if data is not None:
            return data.networks
        assert self.posterior is not None  # to_datatree has checked it
        return self.posterior.networks

    def _prior_predictive(
        self, some: Draws, drawn: Weights, data: DataPass
    ) -> Variables:
        assert self.model is not None
        assert self.first is not None
        assert self.batches is not None
        source = self._source(some)
        hidden = source.hidden(self.first)
        others = _other_latents(self.model, drawn, hidden, data)
        at = model_at_draws(self.model, drawn | others, self.first, data.obs_site)
        batches = (source.hidden(batch) for batch in self.batches)
        outcomes = pass_over_data(at, batches, source.arguments(self.first)).outcomes
        return _data_groups(data, {"prior_predictive": outcomes})["prior_predictive"]

    def _sample_stats(
        self, some: Draws, data: DataPass | None, log_prior: Weights, draws: slice
    ) -> Weights:
        stats = {}
        if data is not None and data.obstacle is None:
            assert data.total_log_likelihood is not None  # no obstacle, so labels
            total = torch.stack(list(log_prior.values())).sum(0)
            stats["lp"] = total + data.total_log_likelihood
        log_q = None if self.posterior is None else _log_q(self.posterior, some.weights)
        if log_q is not None:
            stats["log_q"] = log_q
        if some.component is not None:
            stats["component"] = some.component
        if self.chains.diverging is not None:
            stats["diverging"] = self.chains.diverging[:, draws].flatten()
        return stats

    def _attributes(self, group: str, data: DataPass | None) -> dict[str, Any]:
        found: dict[str, Any] = {"inference_library": "pyro_lora"}
        if group == "posterior":
            found |= self._posterior_attributes()
            if data is not None and data.obstacle is not None:
                found["lp_left_out"] = data.obstacle
        if group in ("log_likelihood", "posterior_predictive"):
            found["method"] = "linearized" if self.linearized else "sample"
        return found

    def _posterior_attributes(self) -> dict[str, Any]:
        found: dict[str, Any] = {"posterior": self.kind}
        weights, components = self.chains.component_weights, self.chains.components
        if weights is None:
            for part in components:
                found |= _gaussian_attributes(part)
            return found
        found["component_weights"] = weights.tolist()
        for index, part in enumerate(components):
            of_part = {"posterior": kind_of(part), **_gaussian_attributes(part)}
            found |= {f"component.{index}.{n}": value for n, value in of_part.items()}
        return found


def per_draw(group: str) -> bool:
    """Whether a group has the dims chain and draw.

    Args:
        group: Its name.
    """
    return not group.endswith("_data")


@torch.no_grad()
def _other_latents(
    model: Model, drawn: Weights, batch: Batch, data: DataPass
) -> Weights:
    """Draws from the model of the latent sites that the weights' prior doesn't have."""
    found: dict[str, list[Tensor]] = {}
    for s in range(_num_draws(drawn)):
        at = {site: value[s] for site, value in drawn.items()}
        with evaluating_model():
            trace = trace_at(model, at, batch)
        for site in data.log_prior:
            if site not in drawn:
                found.setdefault(site, []).append(trace.nodes[site]["value"])
    return {site: torch.stack(values) for site, values in found.items()}


def _num_draws(draws: Weights) -> int:
    return next(iter(draws.values())).shape[0]


def _log_q(posterior: Posterior, weights: Weights) -> Tensor | None:
    """Log density of draws of the posterior, float64; None where it has none."""
    try:
        return posterior.log_prob(weights).double()
    except ValueError:
        return None


def _data_groups(
    data: DataPass | None, outcomes: Mapping[str, Tensor] | None = None
) -> dict[str, Variables]:
    if data is None:
        return {}
    datum = {"datum": range(data.outcomes.shape[1])}
    groups = {
        group: _variables({data.obs_site: value}, datum)
        for group, value in {
            "posterior_predictive": data.outcomes,
            **(outcomes or {}),
        }.items()
    }
    if data.observed is not None and data.log_likelihood is not None:
        assert data.counts is not None
        # A missing outcome is no datum: leave-one-out would count its 0.
        seen = data.counts.nonzero()[:, 0]
        of_seen = {"datum": seen.tolist()}
        groups |= {
            "log_likelihood": _variables(
                {data.obs_site: data.log_likelihood[:, seen]}, of_seen
            ),
            "observed_data": _variables({data.obs_site: data.observed[seen]}, of_seen),
        }
    groups["constant_data"] = Variables()
    for name, value in data.inputs.items():
        token = {"token": range(value.shape[1])} if value.ndim == 2 else {}
        groups["constant_data"].add(name, value, datum | token, name)
    return groups


def _priors(
    chains: Chains, draws: Draws, scales: Mapping[str, float | Tensor]
) -> list[tuple[Prior, Tensor]]:
    """Each prior, and which draws it is the one of: in a mixture its component's."""
    if not chains.components:
        return [(scaled(networks_prior(()), scales), draws.of(0))]
    found = [
        (tempered_prior(part, scales), draws.of(index))
        for index, part in enumerate(chains.components)
    ]
    return [(prior, rows) for prior, rows in found if len(rows) > 0]


def _by_draw(
    priors: Sequence[tuple[Prior, Tensor]], values: Callable[[Prior, Tensor], Weights]
) -> Weights:
    """Values under each prior, in the order of the draws."""
    parts = [values(prior, draws) for prior, draws in priors]
    order = torch.cat([draws for _, draws in priors]).argsort()
    return {s: torch.cat([part[s] for part in parts])[order] for s in parts[0]}


def _modes(chains: Chains, draws: Draws) -> Weights | None:
    """The mode; of a mixture each draw's own, (S, ...), NaN where there is none."""
    gaussians = [only_gaussian(part) for part in chains.components]
    modes = [None if part is None else part.mode() for part in gaussians]
    known = next((mode for mode in modes if mode is not None), None)
    if known is None or draws.component is None:
        return known
    nowhere = {site: torch.full_like(x, torch.nan) for site, x in known.items()}
    each = [nowhere if mode is None else mode for mode in modes]
    return {s: torch.stack([m[s] for m in each])[draws.component] for s in known}


def _variables(
    values: Weights, dims: Mapping[str, Sequence[int]] | None = None
) -> Variables:
    result = Variables()
    for name, value in values.items():
        result.add(name, value, dims or {}, name)
    return result


def _gaussian_attributes(posterior: Posterior) -> dict[str, Any]:
    gaussian = only_gaussian(posterior)
    if gaussian is None:
        return {}
    found: dict[str, Any] = {"log_evidence": float(gaussian.log_evidence())}
    for site, tau in gaussian.prior_precision.items():
        rows = tau.expand(gaussian.mode()[site].shape).flatten(1).mean(1).tolist()
        found[f"prior_precision.{site}"] = rows[0] if len(set(rows)) == 1 else rows
    return found
