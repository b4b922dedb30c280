"""The log joint of all data, at weights that needn't be draws of a posterior."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from pyro_lora.curvature.prior_moments import model_scales
from pyro_lora.ground.settings import check_gradients
from pyro_lora.ground.weights import Weights
from pyro_lora.likelihood.batch import Batch, checked_batches, explaining
from pyro_lora.likelihood.data_plate import data_plate
from pyro_lora.likelihood.model_trace import (
    Model,
    evaluating,
    lifted_networks,
    trace_at,
)
from pyro_lora.posteriors.posterior import (
    Posterior,
    one_weight_set,
    tempered_prior,
)
from pyro_lora.posteriors.prior import log_prior_by_site
from pyro_lora.predict.data_pass import (
    datum_log_probs,
    latent_log_probs,
    no_log_joint,
    observes_only,
)
from pyro_lora.predict.draws import model_at_draws


class LeftOut(Exception):
    """Why a question has no answer here."""


class LogJoint:
    """Log likelihood and log prior of all data, as a function of the weights.

    Args:
        posterior: The posterior, whose prior is used.
        model: The Pyro model.
        batches: Re-iterable of mappings of model keyword arguments.
        obs_site: The likelihood's site, or None.

    Raises:
        ValueError: If there are no batches, or the posterior doesn't fit the model.
    """

    def __init__(
        self,
        posterior: Posterior,
        model: Model,
        batches: Iterable[Batch],
        obs_site: str | None,
    ) -> None:
        first = next(checked_batches(batches), None)
        if first is None:
            raise ValueError("diagnose got no batches.")
        self.posterior, self.model, self.batches = posterior, model, batches
        self.first = first
        one = {site: x[None] for site, x in one_weight_set(posterior).items()}
        at = model_at_draws(model, one, first, obs_site)
        (trace,) = at.traces(first)
        self.obs_site, self.site = at.obs_site, trace.nodes[at.obs_site]
        self.networks = lifted_networks(trace)
        self.prior = tempered_prior(posterior, model_scales(trace, self.networks))
        self.observes_only = observes_only(trace, at.obs_site)
        self.num_data = 0
        for batch in checked_batches(batches):
            (trace,) = at.traces(batch)
            self.num_data += data_plate(trace.nodes[at.obs_site]).size

    def check(self) -> None:
        """Check that there is a log joint.

        Raises:
            LeftOut: If labels or data are missing, or another site is observed, too.
        """
        reason = no_log_joint(self.site, self.num_data, self.observes_only)
        if reason is not None:
            raise LeftOut(reason)

    @torch.no_grad()
    def at(self, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Log likelihood and log prior, (S,) each, nats, float64.

        Args:
            weights: Site -> (S, ...).
        """
        at = model_at_draws(self.model, weights, self.first, self.obs_site)
        totals: list[Tensor] = []
        latents: list[dict[str, Tensor]] = []
        for index, batch in enumerate(checked_batches(self.batches)):
            parts = []
            for trace in at.traces(batch):
                site = trace.nodes[self.obs_site]
                with explaining(batch, nodes=trace.nodes):
                    log_prob = datum_log_probs(site)
                parts.append((log_prob * data_plate(site).scale).sum(-1))
                if index == 0:
                    latents.append(latent_log_probs(trace, self.networks))
            totals.append(torch.cat(parts))
        others = {s: torch.cat([part[s] for part in latents]) for s in latents[0]}
        log_prior = others | log_prior_by_site(self.prior, self.networks, weights)
        return (
            torch.stack(totals).sum(0),
            torch.stack(list(log_prior.values())).sum(0),
        )

    def gradient(self, mode: Weights) -> Weights:
        """Gradient in the lifted sites, nats.

        Args:
            mode: Site -> value, all latent sites of the model.
        """
        check_gradients()
        leaves = {
            site: mode[site].clone().requires_grad_()
            for lora in self.networks
            for site in lora.sites
        }
        with torch.enable_grad(), evaluating(self.networks):
            prior = log_prior_by_site(
                self.prior, self.networks, {s: x[None] for s, x in leaves.items()}
            )
            torch.stack(list(prior.values())).sum().backward()
            for batch in checked_batches(self.batches):
                trace = trace_at(self.model, {**mode, **leaves}, batch)
                site = trace.nodes[self.obs_site]
                with explaining(batch, nodes=trace.nodes):
                    log_prob = datum_log_probs(site) * data_plate(site).scale
                log_prob.sum().backward()
        return {
            s: torch.zeros_like(x) if x.grad is None else x.grad
            for s, x in leaves.items()
        }
