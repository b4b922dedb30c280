"""Laplace posterior: a Gaussian around the mode, as a Pyro guide."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, overload

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_lora.curvature.gaussian_logits import GaussianLogits, JointGaussianLogits
from pyro_lora.curvature.latent_block import LatentBlock
from pyro_lora.curvature.linearize import (
    Tokens,
    joint_linearized_logits,
    linearized_logits,
)
from pyro_lora.curvature.weight_gaussian import WeightGaussian
from pyro_lora.ground.interrupts import leaving_no_trace
from pyro_lora.ground.settings import check_count, check_name, check_word
from pyro_lora.ground.weights import Weights, check_weights
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood.batch import Batch, checked_batch
from pyro_lora.likelihood.model_trace import Model, evaluating
from pyro_lora.posteriors import prior_tuning
from pyro_lora.posteriors.joint_distribution import sample_deltas
from pyro_lora.posteriors.prior import normal_prior
from pyro_lora.priors import Prior


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
        networks: The lifted networks in the model.
        model: The Pyro model; None where the posterior was loaded without one.
        obs_site: The likelihood's site; None where there are several.
        latents: Gaussian over latent sites outside of the networks, which are part of
            modes, draws and densities, too; None where there are none.
        fixed: Lifted sites that are fixed at their mode -> values. They are part of
            modes and draws, too, with variance 0, and no part of the evidence's D.
        fit_arguments: Those that the fit's batches gave to the model; None where the
            posterior was loaded.
    """

    gaussian: WeightGaussian
    prior_mean: Weights
    log_likelihood: Tensor
    log_prior: Tensor
    prior: Prior
    networks: tuple[LiftedNetwork, ...]
    model: Model | None
    obs_site: str | None
    latents: LatentBlock | None = None
    fixed: Weights = field(default_factory=dict)
    fit_arguments: frozenset[str] | None = None

    num_samples: ClassVar[int | None] = None

    def __call__(self, *args: Any, **kwargs: Any) -> Weights:
        """Sample the sites: the guide's statements, whatever the model's arguments."""
        infer: dict[str, Any] = {
            site: {"lora": (lora,)} for lora in self.networks for site in lora.sites
        }
        weights = self.gaussian.pyro_sample(infer)
        weights |= sample_deltas(self.fixed, self.fixed, self.networks)
        return weights if self.latents is None else weights | self.latents.pyro_sample()

    def gaussians(self) -> list[tuple[float, LaplacePosterior]]:
        """The Gaussian parts with their weights: this one."""
        return [(1.0, self)]

    def mode(self) -> Weights:
        """The mode, site -> value of the site's shape."""
        latents = {} if self.latents is None else self.latents.values
        found = {**self.gaussian.loc, **self.fixed, **latents}
        return {site: value.clone() for site, value in found.items()}

    def sample(self, num_samples: int) -> Weights:
        """Draws, site -> value with a leading (S,)."""
        check_count("num_samples", num_samples)
        weights = self.gaussian.sample(num_samples)
        for site, value in self.fixed.items():
            weights[site] = value.expand(num_samples, *value.shape).clone()
        return (
            weights
            if self.latents is None
            else weights | self.latents.sample(num_samples)
        )

    def log_prob(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Log density in nats, (S,) for weights with a leading (S,).

        It is that of the sites that aren't fixed, and minus infinity where others have
        other values.

        Raises:
            ValueError: If a site is missing, or isn't one of this posterior's.
        """
        check_weights(weights)
        known = self.gaussian.loc.keys() | self.fixed.keys()
        known |= set() if self.latents is None else self.latents.values.keys()
        if weights.keys() != known:
            raise ValueError(
                "log_prob needs a value of each of the posterior's sites and of no "
                f"others: missing {sorted(known - weights.keys())}, unknown "
                f"{sorted(weights.keys() - known)}."
            )
        log_prob = self.gaussian.log_prob(weights)
        for site, value in self.fixed.items():
            fn = dist.Delta(value, event_dim=value.ndim)
            log_prob = log_prob + fn.log_prob(weights[site])
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
        fixed = {site: torch.zeros_like(x) for site, x in self.fixed.items()}
        variance = self.gaussian.variance() | fixed
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
        :func:`~pyro_lora.curvature.prior_moments.prior_moments`). With ``Diagonal()``
        and ``Dense()`` it's then Laplace's evidence under the normal lower bound that
        touches the prior at the mode (but for weights nearer to the centre than the
        named floor): it understates the evidence under the prior. Kronecker structures
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
                its average :math:`\bar\tau` over each matrix. Along any direction in
                the matrix, the variance is then that of the full :math:`\tau` times a
                factor from :math:`\min \tau / \bar\tau` to :math:`\max \tau /
                \bar\tau`, nearer to one the more the data say.

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
        prior = normal_prior(self.prior_mean, tau, self.fixed)
        return replace(self, gaussian=gaussian, log_prior=log_prior, prior=prior)

    @leaving_no_trace
    def optimize_prior(
        self,
        *,
        per: Literal["all", "site", "layer", "prior"] = "all",
        objective: Literal["evidence", "nll"] = "evidence",
        batches: Iterable[Batch] | None = None,
        obs_site: str | None = None,
    ) -> LaplacePosterior:
        r"""Choose the prior precision by the evidence or by held-out data.

        The mode stays where it is. To let it follow, train on and fit again by
        ``AutoLaplace.refit``, and choose again.

        Args:
            per: One precision for all weights, for each site, or for each layer of
                each site; or ``"prior"``: the prior keeps its form, and the values of
                the ``pyro.param`` statements inside it are trained. The param store
                keeps its values; those found are in the new posterior's ``prior``. (SVI
                trains them, too, to the joint mode, where a scale goes to 0: hide them
                from it by ``pyro.poutine.block``.)
            objective: ``"evidence"``: maximise :meth:`log_evidence`, no pass over the
                data. ``"nll"``: minimise the negative log likelihood of the
                linearised predictive on held-out ``batches``, over a grid in one pass
                over them; with several precisions one after the other, twice, each in
                a pass of its own. For any likelihood in the table.
                It warns where the least is at the grid's end, 1e-4 or 1e6.
            batches: With ``"nll"``: held-out batches with labels.
            obs_site: With ``"nll"``: the likelihood's site; None is the posterior's.

        Returns:
            A new posterior; network, model and param store are as before.

        Raises:
            ValueError: If the arguments don't fit, held-out labels are missing, or the
                prior has no parameters.
        """
        check_word("objective", objective, ("evidence", "nll"))
        check_word("per", per, ("all", "site", "layer", "prior"))
        check_name("obs_site", obs_site)
        held_out = objective == "nll"
        if held_out != (batches is not None) or (held_out and per == "prior"):
            raise ValueError(
                f"optimize_prior got per={per!r}, objective={objective!r}, batches="
                f"{'None' if batches is None else 'given'}: 'nll' needs held-out "
                "batches and takes no per='prior', and the evidence takes no batches."
            )
        if batches is not None:
            model = self._model("optimize_prior(objective='nll')")
            site = obs_site or self.obs_site
            with evaluating(self.networks):
                tau = prior_tuning.minimize_nll(
                    model, self.gaussian, self.networks, batches, site, per
                )
            return self.with_prior_precision(tau)
        if per != "prior":
            tau = prior_tuning.maximize_evidence(self.gaussian, self.prior_mean, per)
            return self.with_prior_precision(tau)
        prior, at_mode = prior_tuning.train_parameters(
            self.prior, self.networks, self.gaussian, self.log_prior
        )
        return replace(
            self,
            gaussian=self.gaussian.with_prior_precision(at_mode.precision),
            prior_mean=at_mode.mean,
            log_prior=at_mode.log_prob,
            prior=prior,
        )

    @overload
    def linearized(
        self,
        batch: Batch,
        *,
        joint: Literal[False] = False,
        tokens: Tokens | None = None,
        obs_site: str | None = None,
    ) -> GaussianLogits: ...

    @overload
    def linearized(
        self,
        batch: Batch,
        *,
        joint: Literal[True],
        tokens: Tokens | None = None,
        obs_site: str | None = None,
    ) -> JointGaussianLogits: ...

    def linearized(
        self,
        batch: Batch,
        *,
        joint: bool = False,
        tokens: Tokens | None = None,
        obs_site: str | None = None,
    ) -> GaussianLogits | JointGaussianLogits:
        r"""Gaussian over the logits of a batch, :math:`N(f(x), J P^{-1} J^T)`.

        One forward pass and C - 1 backward passes for C classes; P for numbers of P
        outputs (``.to_event(1)``), a Normal's with the noise variance.

        Args:
            batch: The model's keyword arguments; labels aren't needed.
            joint: Also the covariances between the data, (B, C, B, C).
            tokens: Which outcomes, where a datum has T of them (``.to_event(1)``):
                ``"last"``, the last one that the distribution doesn't mask;
                ``"each"``; or their positions, (B,) or (B, T'). Every one of a datum
                takes C - 1 backward passes.
            obs_site: The likelihood's site; None is the posterior's. Name it where the
                posterior has several.

        Returns:
            Mean (B, C), its mean over classes removed, and covariance (B, C, C); for
            several tokens (B, T, C) and (B, T, C, C).

        Raises:
            ValueError: If this posterior was loaded without a model, or ``tokens``
                doesn't fit the likelihood.
        """
        model, batch = self._model("linearized"), checked_batch(batch)
        site = obs_site or self.obs_site
        at = (model, self.gaussian, self.networks, batch, site)
        with evaluating(self.networks):
            if joint:
                return joint_linearized_logits(*at, tokens=tokens)
            return linearized_logits(*at, tokens=tokens)[0]

    def _model(self, caller: str) -> Model:
        if self.model is None:
            raise ValueError(
                f"{caller} needs the model, but this posterior was loaded without one. "
                "Use load(path, lora, model=model)."
            )
        latents = {} if self.latents is None else self.latents.values
        held = {**self.fixed, **latents}
        model: Model = poutine.condition(self.model, held) if held else self.model
        return model
