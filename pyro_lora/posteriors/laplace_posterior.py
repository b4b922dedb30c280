"""Laplace posterior: a Gaussian around the mode, as a Pyro guide."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, overload

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.optim import PyroOptim
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
from pyro_lora.infer.svgd.kernels import NoRepulsion
from pyro_lora.infer.svgd.optimizer_state import check_optimizer
from pyro_lora.infer.svgd.svgd import SVGD
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood.batch import check_batches, checked_batch
from pyro_lora.likelihood.batches import READ_ONCE
from pyro_lora.likelihood.model_trace import Batch, Model, evaluating
from pyro_lora.posteriors import prior_tuning
from pyro_lora.posteriors.prior_parameters import train_parameters, under_prior
from pyro_lora.priors import Prior

# How a posterior is predicted from where nobody says.
PredictionMethod = Literal["sample", "linearized"]
Refit = Callable[[Model, Weights, Iterable[Batch]], "LaplacePosterior"]


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
        refit: Fits again with the same settings: (model, mode, batches) to posterior;
            None where the posterior was loaded.
        fixed: Lifted sites that are fixed at their mode -> values. They are part of
            modes and draws, too, with variance 0, and no part of the evidence's D.
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
    refit: Refit | None = None
    fixed: Weights = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> Weights:
        """Sample the sites: the guide's statements, whatever the model's arguments."""
        infer: dict[str, Any] = {
            site: {"lora": (lora,)} for lora in self.loras for site in lora.sites
        }
        weights = self.gaussian.pyro_sample(infer)
        for site, value in self.fixed.items():
            fn = dist.Delta(value, event_dim=value.ndim)
            weights[site] = pyro.sample(site, fn, infer=infer[site])
        return weights if self.latents is None else weights | self.latents.pyro_sample()

    @property
    def prediction_method(self) -> PredictionMethod:
        """How to predict: with the linearised network, whose posterior this is."""
        return "linearized"

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
        num_refits: int = 0,
        optim: PyroOptim | None = None,
        num_epochs: int = 1,
        obs_site: str | None = None,
    ) -> LaplacePosterior:
        r"""Choose the prior precision by the evidence or by held-out data.

        With ``num_refits`` the mode follows: the weights are trained under the prior
        found (``num_epochs`` MAP epochs of ``optim`` from where they are, dropout off),
        the curvature is fitted there, and the prior is chosen again, as in online
        Laplace (Immer et al. 2021, https://arxiv.org/abs/2104.04975).

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
                a pass of its own. For a Categorical, Bernoulli or Normal likelihood.
            batches: With ``"nll"``: held-out batches with labels. With ``num_refits``:
                all training data, as for the fit.
            num_refits: How often to train on and fit again; with the evidence only.
            optim: A ``pyro.optim`` optimizer for the refits.
            num_epochs: Passes over the data in each refit, before the one that fits.
            obs_site: With ``"nll"``: the likelihood's site; None is the posterior's.

        Returns:
            A new posterior; network, model and param store are as before.

        Raises:
            ValueError: If the arguments don't fit, held-out labels are missing, the
                posterior was loaded (for refits), or the prior has no parameters.
        """
        check_count("num_refits", num_refits, 0)
        check_count("num_epochs", num_epochs)
        check_word("objective", objective, ("evidence", "nll"))
        check_word("per", per, ("all", "site", "layer", "prior"))
        check_name("obs_site", obs_site)
        if optim is not None:
            check_optimizer(optim)
        if (num_refits > 0) != (optim is not None):
            raise ValueError(
                f"optimize_prior got num_refits={num_refits} and "
                f"{'no ' if optim is None else 'an '}optim: refits need an optimizer, "
                "and nothing else does."
            )
        if objective == "nll" and per != "prior" and batches is not None:
            if num_refits:
                raise ValueError(
                    "optimize_prior refits with objective='evidence' only: under 'nll' "
                    "the batches are the held-out ones."
                )
            model = self._model("optimize_prior(objective='nll')")
            site = obs_site or self.obs_site
            with evaluating(self.loras):
                tau = prior_tuning.minimize_nll(
                    model, self.gaussian, self.loras, batches, site, per
                )
            return self.with_prior_precision(tau)
        if objective != "evidence" or (num_refits > 0) != (batches is not None):
            raise ValueError(
                f"optimize_prior got per={per!r}, objective={objective!r}, batches="
                f"{'None' if batches is None else 'given'}, num_refits={num_refits}: "
                "objective is 'evidence' or 'nll', 'nll' needs held-out batches and "
                "takes no per='prior', and the evidence needs batches for refits only."
            )
        if num_refits:
            check_batches(batches)
        if num_refits and iter(batches or ()) is batches:
            raise ValueError(READ_ONCE.format("each refit takes several passes"))
        best = self._maximize_evidence(per)
        for _ in range(num_refits):
            assert batches is not None
            assert optim is not None
            best = best._refitted(batches, optim, num_epochs)._maximize_evidence(per)
        return best

    def _maximize_evidence(self, per: str) -> LaplacePosterior:
        if per != "prior":
            tau = prior_tuning.maximize_evidence(self.gaussian, self.prior_mean, per)
            return self.with_prior_precision(tau)
        prior, at_mode = train_parameters(
            self.prior, self.loras, self.gaussian, self.log_prior
        )
        return replace(
            self,
            gaussian=self.gaussian.with_prior_precision(at_mode.precision),
            prior_mean=at_mode.mean,
            log_prior=at_mode.log_prob,
            prior=prior,
        )

    def _refitted(
        self, batches: Iterable[Batch], optim: PyroOptim, num_epochs: int
    ) -> LaplacePosterior:
        if self.fixed:
            raise ValueError(
                "Refits train every site, but this posterior is over some of them, and "
                f"{sorted(self.fixed)} are fixed. Leave num_refits out."
            )
        if self.model is None or self.refit is None:
            raise ValueError(
                "Refits need the model and the settings of the fit, but this posterior "
                "was loaded. Fit it by AutoLaplace first."
            )
        mode = self.mode()
        model = under_prior(self.model, self.prior, self.loras, mode)
        ensemble = SVGD(  # one particle without repulsion is MAP
            model,
            NoRepulsion(),
            optim,
            1,
            init_loc_fn=lambda site: mode[site["name"]].clone(),
        )
        with evaluating(self.loras):
            ensemble.run(batches, num_epochs=num_epochs, progress_bar=False)
        weights = {s: x[0] for s, x in ensemble.get_named_particles().items()}
        found = self.refit(model, weights, batches)
        return replace(found, model=self.model, prior=self.prior, refit=self.refit)

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
            obs_site: The likelihood's site; None is the posterior's. Name it where the
                posterior has several.

        Returns:
            Mean (B, C), its mean over classes removed, and covariance (B, C, C); for
            several tokens (B, T, C) and (B, T, C, C).

        Raises:
            ValueError: If this posterior was loaded without a model, the likelihood
                isn't Categorical, Bernoulli or Normal, or ``tokens`` doesn't fit it.
        """
        model, batch = self._model("linearized"), checked_batch(batch)
        site = obs_site or self.obs_site
        at = (model, self.gaussian, self.loras, batch, site)
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
        latents = {} if self.latents is None else self.latents.values
        held = {**self.fixed, **latents}
        model: Model = poutine.condition(self.model, held) if held else self.model
        return model


def normal_prior(mean: Weights, precision: Weights, fixed: Weights) -> Prior:
    """The prior N(mean, 1 / precision), both by site, and Deltas at fixed values."""
    fns: dict[str, dist.TorchDistribution] = {
        site: dist.Normal(x, precision[site].rsqrt().expand(x.shape)).to_event(x.ndim)
        for site, x in mean.items()
    }
    fns |= {site: dist.Delta(x, event_dim=x.ndim) for site, x in fixed.items()}
    return _SitePriors(fns)


@dataclass(frozen=True, eq=False)
class _SitePriors:
    """A distribution for each site."""

    fns: Mapping[str, dist.TorchDistribution]

    def __call__(self, lora: LiftedNetwork) -> Weights:
        return {site: pyro.sample(site, self.fns[site]) for site in lora.sites}
