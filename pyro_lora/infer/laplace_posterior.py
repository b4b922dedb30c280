"""Laplace posterior: a Gaussian around the mode, as a Pyro guide."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import pyro
import pyro.distributions as dist
from pyro import poutine
from torch import Tensor

from pyro_lora.curvature.gaussian_logits import GaussianLogits, JointGaussianLogits
from pyro_lora.curvature.latent_block import LatentBlock
from pyro_lora.curvature.linearize import (
    Tokens,
    joint_linearized_logits,
    linearized_logits,
)
from pyro_lora.curvature.weight_gaussian import WeightGaussian, Weights
from pyro_lora.infer import prior_tuning
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.lifting.model_trace import Batch, Model, evaluating
from pyro_lora.lifting.priors import Prior


@dataclass(frozen=True, eq=False)
class LaplacePosterior:
    r"""Gaussian :math:`N(\hat w, (F + \mathrm{diag}\,\tau)^{-1})` over lifted sites.

    A Pyro guide: called with the model's arguments, it samples the sites. Made by
    ``AutoLaplace.laplace_approximation``; every method gives a new value and leaves
    this one as it is.

    Attributes:
        gaussian: Mode, Fisher information of all data (nats), prior precision.
        prior_mean: Site -> mean of the prior.
        log_likelihood: Of all data at the mode, nats, float64.
        log_prior: At the mode, nats, float64.
        prior: The prior that this posterior was made with.
        loras: The lifted networks in the model.
        model: The Pyro model; None where the posterior was loaded without one.
        obs_site: The likelihood's site; None where there are several.
        latents: Gaussian over latent sites outside of the networks, which are part of
            modes, draws and densities, too; None where there are none.
    """

    gaussian: WeightGaussian
    prior_mean: Weights
    log_likelihood: Tensor
    log_prior: Tensor
    prior: Prior
    loras: tuple[LiftedNetwork, ...]
    model: Model | None
    obs_site: str | None
    latents: LatentBlock | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Weights:
        """Sample the sites: the guide's statements, whatever the model's arguments."""
        infer = {site: {"lora": (lora,)} for lora in self.loras for site in lora.sites}
        weights = self.gaussian.pyro_sample(infer)
        return weights if self.latents is None else weights | self.latents.pyro_sample()

    def mode(self) -> Weights:
        """The mode, site -> value of the site's shape."""
        latents = {} if self.latents is None else self.latents.values
        return {
            s: value.clone() for s, value in {**self.gaussian.loc, **latents}.items()
        }

    def sample(self, num_samples: int) -> Weights:
        """Draws, site -> value with a leading (S,)."""
        weights = self.gaussian.sample(num_samples)
        return (
            weights
            if self.latents is None
            else weights | self.latents.sample(num_samples)
        )

    def log_prob(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Log density in nats, (S,) for weights with a leading (S,)."""
        log_prob = self.gaussian.log_prob(weights)
        return (
            log_prob
            if self.latents is None
            else self.latents.log_prob(weights) + log_prob
        )

    def mean(self) -> Weights:
        """The mean, which is the mode."""
        return self.mode()

    def variance(self) -> Weights:
        """Marginal variances, each of its site's shape; of latents to first order."""
        variance = self.gaussian.variance()
        return variance if self.latents is None else variance | self.latents.variance()

    @property
    def prior_precision(self) -> Weights:
        r"""Site -> :math:`\tau`, broadcasting over the site."""
        return self.gaussian.prior_precision

    def log_evidence(self) -> Tensor:
        r"""Laplace's log marginal likelihood of all data.

        :math:`\log p(y, \hat w) - \log q(\hat w) = \log p(y | \hat w) + \log p(\hat w)
        + \frac{D}{2} \log 2 \pi - \frac12 \log \det P` (MacKay 1992, eq. 6).

        Under a prior that isn't normal :math:`p(\hat w)` is still its own density, and
        P has its scale-mixture weight (see
        :func:`~pyro_lora.curvature.prior_moments.prior_moments`). With ``diagonal`` and
        ``dense`` it's then Laplace's evidence under the normal lower bound that touches
        the prior at the mode (but for weights nearer to the centre than the named
        floor): it understates the evidence under the prior. Kronecker structures
        average the weights over each matrix, which usually lowers it further.

        Returns:
            A scalar, nats, float64.
        """
        num_weights = sum(x.numel() for x in self.gaussian.loc.values())
        log_det = self.gaussian.log_det(self.prior_precision)
        log_q = 0.5 * log_det - 0.5 * num_weights * math.log(2 * math.pi)
        evidence = self.log_likelihood + self.log_prior - log_q
        return (
            evidence if self.latents is None else evidence + self.latents.log_evidence()
        )

    def with_prior_precision(
        self, value: float | Tensor | Mapping[str, float | Tensor]
    ) -> LaplacePosterior:
        r"""The same mode and curvature under the prior N(prior mean, :math:`1/\tau`).

        Args:
            value: :math:`\tau`, one number, or one for each site, of a shape that
                broadcasts over the site, () or (L, 1, 1). Kronecker structures take
                its average over each matrix.

        Returns:
            A new posterior; the model keeps its own prior.

        Raises:
            ValueError: If a site is missing or unknown, or a value isn't positive and
                within 1e-8 to 1e8, or doesn't broadcast.
        """
        tau = prior_tuning.checked_precision(value, self.gaussian.loc)
        gaussian = self.gaussian.with_prior_precision(tau)
        tau = gaussian.prior_precision
        log_prior = sum(
            dist.Normal(self.prior_mean[s].double(), tau[s].double().rsqrt())
            .log_prob(x.double())
            .sum()
            for s, x in gaussian.loc.items()
        )
        prior = normal_prior(self.prior_mean, tau)
        return replace(self, gaussian=gaussian, log_prior=log_prior, prior=prior)

    def optimize_prior(
        self,
        *,
        per: Literal["all", "site", "layer"] = "all",
        objective: Literal["evidence", "nll"] = "evidence",
        batches: Iterable[Batch] | None = None,
    ) -> LaplacePosterior:
        """Choose the prior precision by the evidence or by held-out data.

        Args:
            per: One precision for all weights, for each site, or for each layer of
                each site.
            objective: ``"evidence"``: maximise :meth:`log_evidence`, no pass over the
                data. ``"nll"``: minimise the negative log likelihood of the
                linearised predictive on held-out ``batches``, one pass over them;
                with ``per="all"`` only.
            batches: Held-out batches with labels.

        Returns:
            A new posterior.

        Raises:
            ValueError: If the arguments don't fit, or held-out labels are missing.
        """
        if objective == "evidence":
            tau = prior_tuning.maximize_evidence(self.gaussian, self.prior_mean, per)
            return self.with_prior_precision(tau)
        if objective != "nll" or per != "all" or batches is None:
            raise ValueError(
                f"optimize_prior got per={per!r}, objective={objective!r}, batches="
                f"{'None' if batches is None else 'given'}: objective is 'evidence' or "
                "'nll', and 'nll' needs held-out batches and per='all'."
            )
        model = self._model("optimize_prior(objective='nll')")
        with evaluating(self.loras):
            best = prior_tuning.minimize_nll(
                model, self.gaussian, self.loras, batches, self.obs_site
            )
        return self.with_prior_precision(best)

    @overload
    def linearized(
        self,
        batch: Batch,
        *,
        joint: Literal[False] = False,
        tokens: Tokens | None = None,
    ) -> GaussianLogits: ...

    @overload
    def linearized(
        self, batch: Batch, *, joint: Literal[True], tokens: Tokens | None = None
    ) -> JointGaussianLogits: ...

    def linearized(
        self, batch: Batch, *, joint: bool = False, tokens: Tokens | None = None
    ) -> GaussianLogits | JointGaussianLogits:
        r"""Gaussian over the logits of a batch, :math:`N(f(x), J P^{-1} J^T)`.

        One forward pass and C - 1 backward passes for C classes; P for a Normal
        likelihood with P outputs (``.to_event(1)``), whose result also has the noise
        variance.

        Args:
            batch: The model's keyword arguments; labels aren't needed.
            joint: Also the covariances between the data, (B, C, B, C).
            tokens: Which outcomes, where a datum has T of them (``.to_event(1)``):
                ``"last"``, the last one that the distribution doesn't mask;
                ``"each"``; or their positions, (B,) or (B, T'). Every one of a datum
                takes C - 1 backward passes.

        Returns:
            Mean (B, C), its mean over classes removed, and covariance (B, C, C); for
            several tokens (B, T, C) and (B, T, C, C).

        Raises:
            ValueError: If this posterior was loaded without a model, the likelihood
                isn't Categorical, Bernoulli or Normal, or ``tokens`` doesn't fit it.
        """
        model = self._model("linearized")
        at = (model, self.gaussian, self.loras, batch, self.obs_site)
        with evaluating(self.loras):
            if joint:
                return joint_linearized_logits(*at, tokens=tokens)
            return linearized_logits(*at, tokens=tokens)[0]

    def _model(self, caller: str) -> Model:
        if self.model is None:
            raise ValueError(
                f"{caller} needs the model, but this posterior was loaded without one. "
                "Use load(path, lora, model=model)."
            )
        if self.latents is None:
            return self.model
        model: Model = poutine.condition(self.model, self.latents.values)
        return model


def normal_prior(mean: Weights, precision: Weights) -> Prior:
    """The prior N(mean, 1 / precision), both by site."""

    def prior(lora: LiftedNetwork) -> Weights:
        return {
            site: pyro.sample(
                site,
                dist.Normal(
                    mean[site], precision[site].rsqrt().expand(mean[site].shape)
                ).to_event(mean[site].ndim),
            )
            for site in lora.sites
        }

    return prior
