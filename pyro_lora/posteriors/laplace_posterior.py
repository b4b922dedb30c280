r"""Laplace posterior: a Gaussian around the mode, as a Pyro guide.

:math:`q(w) = N(\hat w, P^{-1})` over the weights, with :math:`P = F + \mathrm{diag}
\,\tau`; beside them, and independent of them, the Gaussian over other latent sites, and
sites that are fixed at their mode. Evidence and prior need neither data nor model
again: F stays, and only :math:`\tau` changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, overload

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_lora.curvature import linear_model
from pyro_lora.curvature.gaussian_logits import GaussianLogits, JointGaussianLogits
from pyro_lora.curvature.joint_distribution import infer_of, sample_deltas
from pyro_lora.curvature.latent_block import LatentBlock
from pyro_lora.curvature.linearize import LinearizedNetwork, Tokens
from pyro_lora.curvature.weight_gaussian import WeightGaussian
from pyro_lora.ground.interrupts import leaving_no_trace
from pyro_lora.ground.ranks import ranks_of, sharing_data
from pyro_lora.ground.settings import (
    check_count,
    check_name,
    check_positive,
    check_word,
)
from pyro_lora.ground.summary import brief, extent, weights_facts
from pyro_lora.ground.warning import warn
from pyro_lora.ground.weights import (
    Weights,
    check_sites,
    copied,
    handing_out_copies,
)
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood.batch import Batch, checked_batch
from pyro_lora.likelihood.model_trace import Model, evaluating
from pyro_lora.posteriors import marginals, prior_tuning
from pyro_lora.posteriors.prior import normal_prior
from pyro_lora.posteriors.scaled_posterior import ScaledPosterior, scaled_to
from pyro_lora.posteriors.shared import Shared
from pyro_lora.priors import Prior

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Weights up to which the sum of their eigenvalues' logs takes no time.
_FREE = 10**6

# The mode under a prior that isn't normal, by reweighted normal ones.
_MAX_REWEIGHTED, _SAME_WEIGHT = 100, 1e-6


@handing_out_copies("prior_mean", "log_likelihood", "log_prior", "fixed")
@dataclass(frozen=True, eq=False, repr=False)
class LaplacePosterior(marginals.ByMarginals, Shared):
    r"""Gaussian :math:`N(\hat w, (F + \mathrm{diag}\,\tau)^{-1})` over lifted sites.

    A Pyro guide: called with the model's arguments, it samples the sites. Made by
    ``AutoLaplace.laplace_approximation``; every method gives a new value and leaves
    this one as it is.

    Attributes:
        gaussian: Mode, Fisher information of all data (nats), prior precision.
        prior_mean: Site -> mean of the prior.
        log_likelihood: Of all data at the mode, nats, float64; of a refined posterior
            the linearised network's.
        log_prior: At the mode, nats, float64.
        prior: The prior that this posterior was made with.
        networks: The lifted networks in the model.
        model: The Pyro model; None where the posterior was loaded without one.
        obs_site: The likelihood's site; None where there are several.
        obs_sites: Those of the fit; empty where only the one above is known.
        latents: Gaussian over latent sites outside of the networks, which are part of
            modes, draws and densities, too.
        fixed: Lifted sites that are fixed at their mode -> values. They are part of
            modes and draws, too, with variance 0, and no part of the evidence's D.
        fit_arguments: Those that the last of the fit's batches gave to the model; None
            where the posterior was loaded.
        follows_prior: Whether the mode is that of the linearised network under the
            prior, and moves with it.
        num_data: N, the data of the fit.
    """

    gaussian: WeightGaussian
    prior_mean: Weights
    log_likelihood: Tensor
    log_prior: Tensor
    prior: Prior
    networks: tuple[LiftedNetwork, ...]
    model: Model | None
    obs_site: str | None
    latents: LatentBlock = field(default_factory=LatentBlock)
    fixed: Weights = field(default_factory=dict)
    fit_arguments: frozenset[str] | None = None
    follows_prior: bool = False
    num_data: int | None = None
    obs_sites: tuple[str, ...] = ()

    num_samples: ClassVar[int | None] = None

    def __call__(self, *args: Any, **kwargs: Any) -> Weights:
        """Sample the sites: the guide's statements, whatever the model's arguments."""
        weights = self.gaussian.pyro_sample(infer_of(self.networks))
        weights |= sample_deltas(self.fixed, self.fixed, self.networks)
        return weights | self.latents.pyro_sample()

    @torch.no_grad()
    def _facts(self) -> dict[str, str]:
        facts = self.gaussian._facts()
        others = {"latents": self.latents.values, "fixed": self.fixed}
        facts |= {name: weights_facts(x)["sites"] for name, x in others.items() if x}
        if self.gaussian.is_refined:
            under = "the prior" if self.follows_prior else "a prior around the weights"
            facts["mode"] = f"refined, the linearised network's under {under}"
        if self.num_data is not None:
            facts["num_data"] = f"{self.num_data:,}"
        facts |= {
            "prior": brief(self.prior),
            "log_likelihood": extent([self.log_likelihood]),
        }
        facts["log_evidence"] = (
            extent([self.log_evidence()])
            if knows_evidence(self)
            else "computed when asked for"
        )
        return facts | {"obs_site": brief(self.obs_site), "model": brief(self.model)}

    def gaussians(self) -> list[tuple[float, LaplacePosterior]]:
        """The Gaussian parts with their weights: this one."""
        return [(1.0, self)]

    def mode(self) -> Weights:
        """The mode, site -> value of the site's shape.

        Of a refined posterior it is the mode of the linearised network. The network
        itself may predict at chance there: see :meth:`origin`.
        """
        return copied(self.gaussian.loc) | self.fixed | self.latents.values

    def origin(self) -> Weights:
        """The weights at which the network is linearised, site -> the site's shape.

        They are the mode, but of a refined posterior, where they are the weights that
        were trained: those at which the network itself predicts as it should.
        """
        return copied(self.gaussian.origin) | self.fixed | self.latents.values

    def sample(self, num_samples: int) -> Weights:
        """Draws, site -> value with a leading (S,)."""
        check_count("num_samples", num_samples)
        weights = self.gaussian.sample(num_samples)
        for site, value in self.fixed.items():
            weights[site] = value.expand(num_samples, *value.shape).clone()
        return weights | self.latents.sample(num_samples)

    def log_prob(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Log density in nats, (S,) for weights with a leading (S,).

        It is that of the sites that aren't fixed, and minus infinity where others have
        other values.

        Raises:
            ValueError: If a site is missing, isn't one of this posterior's, or has
                another shape.
        """
        own = {**self.gaussian.loc, **self.fixed, **self.latents.values}
        check_sites(weights, own)
        log_prob = self.gaussian.log_prob(weights)
        for site, value in self.fixed.items():  # log 1 there, log 0 elsewhere
            fn = dist.Delta(value, event_dim=value.ndim)
            log_prob = log_prob + fn.log_prob(weights[site])
        return self.latents.log_prob(weights) + log_prob

    def mean(self) -> Weights:
        """The mean, which is the mode."""
        return self.mode()

    def variance(self) -> Weights:
        """Marginal variances, each of its site's shape; of latents to first order."""
        fixed = {site: torch.zeros_like(x) for site, x in self.fixed.items()}
        return self.gaussian.variance() | fixed | self.latents.variance()

    def median(self) -> Weights:
        """The median of each weight, which is the mode."""
        return self.mode()

    def marginals(self) -> dict[str, marginals.Marginals]:
        """Of each site's weights, each by itself."""
        result = {
            site: marginals.normals(self.gaussian.loc[site], variance)
            for site, variance in self.gaussian.variance().items()
        }
        result |= {site: marginals.points(x[None]) for site, x in self.fixed.items()}
        return result | {
            site: marginals.normals(loc, variance, self.latents.transforms[site])
            for site, (loc, variance) in self.latents.unconstrained().items()
        }

    @property
    def prior_precision(self) -> Weights:
        r"""Site -> :math:`\tau`, broadcasting over the site."""
        return copied(self.gaussian.prior_precision)

    def log_evidence(self) -> Tensor:
        r"""Laplace's log marginal likelihood of all data.

        .. math:: \log p(y, \hat w) - \log q(\hat w) = \log p(y | \hat w)
                  + \log p(\hat w) + \frac{D}{2} \log 2 \pi - \frac12 \log \det P

        (MacKay 1992, eq. 6). It stands for the evidence where :math:`\hat w` is a mode
        under the prior; elsewhere, as with weights that were trained for too short or
        too long, of which a fit warns, it may be off by as much as there is.

        Under a prior that isn't normal :math:`p(\hat w)` is still its own density, and
        P has its scale-mixture weight (see
        :func:`~pyro_lora.curvature.prior_moments.prior_moments`). With ``Diagonal()``
        and ``Dense()`` it's then Laplace's evidence under the normal lower bound that
        touches the prior at the mode (but for weights nearer to the centre than the
        named floor): it understates the evidence under the prior. Kronecker structures
        average the weights over each matrix, which usually lowers it further.

        Under a prior that the model tempers by ``poutine.scale`` :math:`p(\hat w)^s`
        isn't normalised, so that this is no evidence: values under different scales of
        the prior or of the weights don't compare.

        Returns:
            A scalar, nats, float64.

        Raises:
            ValueError: If with ``structures.Exact()`` the data say so much more than
                the prior that float64 can't tell it.
        """
        num_weights = sum(x.numel() for x in self.gaussian.loc.values())
        # log q at its own mode: the Gaussian's normaliser alone is left.
        log_det = self.gaussian.log_det(self.gaussian.prior_precision)
        log_q = 0.5 * log_det - 0.5 * num_weights * math.log(2 * math.pi)
        evidence = self.log_likelihood + self.log_prior - log_q
        return evidence + self.latents.log_evidence()

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
        log_likelihood = self.log_likelihood
        if self.follows_prior:
            gaussian, log_likelihood = linear_model.at_mode_under(
                linear_model.checked(gaussian), self.prior_mean, tau
            )
        # Kronecker structures average it: the prior is the one that they then have.
        tau, mean = gaussian.prior_precision, self.prior_mean
        log_prior = sum(
            dist.Normal(mean[s].double(), tau[s].double().rsqrt())
            .log_prob(x.double())
            .sum()
            for s, x in gaussian.loc.items()
        )
        return replace(
            self,
            gaussian=gaussian,
            log_likelihood=log_likelihood,
            log_prior=log_prior,
            prior=normal_prior(mean, tau, self.fixed),
        )

    @leaving_no_trace
    def refine(
        self,
        around: Literal["weights", "prior"] = "weights",
        *,
        objective: Literal["evidence", "loo"] | None = None,
    ) -> LaplacePosterior:
        r"""The posterior at the mode of the linearised network, a convex problem.

        Training stops early, or goes on too long, and weights that aren't a mode can't
        be widened into a posterior. Of the network linearised at the trained weights,
        :math:`f(x, \hat w) + J (w - \hat w)`, the mode is found exactly, in N (C - 1)
        dimensions and without a pass over the data. Predictions are those of the
        linearised network around it::

            posterior = guide.laplace_approximation(batches).refine().optimize_prior()

        Args:
            around: ``"weights"``: the mode under :math:`N(\hat w, 1 / \tau_0)`, near
                the trained weights, which stay where training was complete
                (:math:`\tau_0 \to \infty`). ``"prior"``: under the posterior's own
                prior; from then on the mode follows where
                :meth:`with_prior_precision` and :meth:`optimize_prior` change it.
            objective: With ``"weights"``: what chooses :math:`\tau_0`, the evidence of
                this prior (None or ``"evidence"``), or ``"loo"``, the exact
                leave-one-out log density of the data, each as often as it counts by a
                ``poutine.scale``. Nothing is held out.

        Returns:
            A new posterior under the same prior; the network is as before.

        Raises:
            ValueError: If this posterior isn't of ``structures.Exact()`` with
                ``fisher="exact"``, the prior's parameters changed since the fit, or
                there is an objective around the prior, which sets no precision.

        Warns:
            UserWarning: If the mode isn't found, there are latent sites besides the
                weights, which stay where they are, or the prior has correlations, which
                only its diagonal stands for.
        """
        check_word("around", around, ("weights", "prior"))
        check_word("objective", objective, ("evidence", "loo", None))
        if around == "prior" and objective is not None:
            raise ValueError(
                f"refine(around='prior') keeps the prior's own precision, and has no "
                f"use for objective={objective!r}. Leave it out, and tune the prior by "
                "optimize_prior(objective=...)."
            )
        gaussian = linear_model.checked(self.gaussian)
        present = prior_tuning.moments_at(self.prior, self.networks, gaussian.loc)
        prior_tuning.check_as_fitted(float(present.log_prob), self.log_prior)
        if self.latents.values:
            warn(
                f"refine moves the weights; {list(self.latents.values)} stay where "
                "they were in the fit, such as a noise scale that fits larger errors. "
                "Where that is far from their mode, train them first."
            )
        if around == "weights":
            moved = self._moved(
                *linear_model.near_weights(gaussian, objective or "evidence")
            )
            return replace(moved, follows_prior=False)
        posterior = replace(self, follows_prior=True)
        for _ in range(_MAX_REWEIGHTED):
            before = posterior.gaussian.prior_precision
            gaussian, log_likelihood = linear_model.at_mode_under(
                gaussian, posterior.prior_mean, before
            )
            posterior = posterior._moved(gaussian, log_likelihood)
            # A normal prior is the same everywhere.
            if all(
                torch.allclose(tau, before[site], rtol=_SAME_WEIGHT, atol=0.0)
                for site, tau in posterior.gaussian.prior_precision.items()
            ):
                break
        else:
            warn(
                f"The mode under a prior that isn't normal isn't found: after "
                f"{_MAX_REWEIGHTED} normal priors in its place weights still move. "
                "Refine again from here, or refine(around='weights')."
            )
        if present.correlated:
            warn(
                f"The prior of {list(present.correlated)} has correlations between "
                "weights, of which only the diagonal of its precision counts: the mode "
                "isn't its own. Use a prior of independent weights, or "
                "refine(around='weights')."
            )
        return posterior

    def _moved(
        self, gaussian: WeightGaussian, log_likelihood: Tensor
    ) -> LaplacePosterior:
        """Around another mode, with the prior as it is there."""
        prior = prior_tuning.moments_at(self.prior, self.networks, gaussian.loc)
        return replace(
            self,
            gaussian=gaussian.with_prior_precision(prior.precision),
            prior_mean=prior.mean,
            log_likelihood=log_likelihood,
            log_prior=prior.log_prob,
        )

    @leaving_no_trace
    def optimize_prior(
        self,
        *,
        per: Literal["all", "site", "layer", "prior"] = "all",
        objective: Literal["evidence", "loo", "nll"] = "evidence",
        batches: Iterable[Batch] | None = None,
        obs_site: str | None = None,
        progress_bar: bool | None = None,
        mesh: DeviceMesh | None = None,
    ) -> LaplacePosterior:
        r"""Choose the prior precision by the evidence or by held-out data.

        The mode stays where it is, but after ``refine(around="prior")``. To let it
        follow otherwise, train on and fit again by ``AutoLaplace.refit``, and choose
        again.

        Args:
            per: One precision for all weights, for each site, or for each layer of
                each site; or ``"prior"``: the prior keeps its form, and the values of
                the ``pyro.param`` statements inside it are trained. The param store
                keeps its values; those found are in the new posterior's ``prior``. (SVI
                trains them, too, to the joint mode, where a scale goes to 0: hide them
                from it by ``pyro.poutine.block``.)
            objective: ``"evidence"``: maximise :meth:`log_evidence`, no pass over the
                data; weights of which the data say nothing keep their precision.
                ``"nll"``: minimise the negative log likelihood of the linearised
                predictive on held-out ``batches``, over a grid in one pass over them;
                with several precisions one after the other, twice, each in
                a pass of its own. For any likelihood in the table.
                ``"loo"``: maximise the leave-one-out log density of the data of the
                fit, each as often as it counts by a ``poutine.scale``, of
                ``structures.Exact()`` alone, exact for the Gaussian.
            batches: With ``"nll"``: held-out batches with labels.
            obs_site: With ``"nll"``: the likelihood's site; None is the posterior's.
            progress_bar: With ``"nll"``: show one; None: on a terminal or in a
                notebook.
            mesh: With ``"nll"``: a ``DeviceMesh`` whose dim ``"data"`` shares the
                batches; None: all ranks do, where ``torch.distributed`` is initialised,
                each with some of its own (:func:`~pyro_lora.share`).

        Returns:
            A new posterior; network, model and param store are as before.

        Raises:
            ValueError: If the arguments don't fit, held-out labels are missing, or the
                prior has no parameters, or with ``per="prior"`` is tempered.

        Warns:
            UserWarning: If the best precision is at an end of those tried: 1e-8 or
                1e8; 1e-4 or 1e6 with ``"nll"``; with ``"loo"``, and after
                ``refine(around="prior")``, 1e-6 or 1e7.
        """
        check_word("objective", objective, ("evidence", "loo", "nll"))
        check_word("per", per, ("all", "site", "layer", "prior"))
        check_name("obs_site", obs_site)
        of_batches = {"obs_site": obs_site, "mesh": mesh}
        given = [name for name, value in of_batches.items() if value is not None]
        if given and objective != "nll":
            raise ValueError(
                f"optimize_prior(objective={objective!r}) makes no pass over batches, "
                f"and has no use for {' and '.join(given)}. Leave out what it has no "
                "use for, or use objective='nll' with held-out batches."
            )
        held_out = objective == "nll"
        if held_out != (batches is not None) or (held_out and per == "prior"):
            raise ValueError(
                f"optimize_prior got per={per!r}, objective={objective!r}, batches="
                f"{'None' if batches is None else 'given'}: 'nll' needs held-out "
                "batches and takes no per='prior'; evidence and 'loo' take no batches."
            )
        if held_out and self.follows_prior:
            raise ValueError(
                "optimize_prior(objective='nll') keeps the mode where it is, but after "
                "refine(around='prior') it follows the prior. Use objective='loo' or "
                "'evidence', or refine(around='weights')."
            )
        if batches is not None:
            ranks = ranks_of(mesh, "data")
            model = self._own_model("optimize_prior(objective='nll')")
            network = linearized_network(self, model, obs_site or self.obs_site)
            with ranks.together(), evaluating(self.networks):
                tau = prior_tuning.minimize_nll(
                    network, self.gaussian, batches, per, progress_bar, ranks
                )
            return self.with_prior_precision(tau)
        if objective == "loo" or self.follows_prior:
            return self._search_prior(per, objective)
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

    def leave_one_out(self) -> Tensor:
        """Log predictive density of each datum of the fit given all others.

        Exact for the Gaussian, of ``structures.Exact()`` alone: the datum's likelihood
        is taken out of it (Rasmussen & Williams 2006, section 5.4.2). The log densities
        of a datum's outcomes add up. A ``poutine.scale`` counts in the posterior of the
        other data, not in the density: a datum that counts half has its whole one.

        Returns:
            (N,), in the order of the fit's batches, nats, float64; 0 where no outcome
            of a datum counts.

        Raises:
            ValueError: If this posterior isn't of ``structures.Exact()`` with
                ``fisher="exact"``.
        """
        return linear_model.log_leave_one_out(linear_model.checked(self.gaussian))

    def _search_prior(self, per: str, objective: str) -> LaplacePosterior:
        if per == "prior":
            raise ValueError(
                "optimize_prior(per='prior') trains the prior's parameters by the "
                "evidence at a fixed mode. Use it before refine(around='prior'), and "
                "not with objective='loo'."
            )

        gaussian = linear_model.checked(self.gaussian)
        if objective == "evidence":
            tau = prior_tuning.maximize_followed_evidence(
                gaussian, self.prior_mean, per
            )
            return self.with_prior_precision(tau)

        def score(tau: Weights) -> float:
            under = self.with_prior_precision(tau).gaussian
            return linear_model.leave_one_out_score(linear_model.checked(under))

        remedy = "Use objective='evidence'"
        if not gaussian.is_refined:
            remedy += ", refine first if the weights aren't a mode"
        tau = prior_tuning.search_precision(score, gaussian.loc, per, remedy)
        return self.with_prior_precision(tau)

    @leaving_no_trace
    @sharing_data
    def for_sampling(
        self,
        batches: Iterable[Batch],
        *,
        tolerance: float = 0.05,
        num_samples: int = 8,
        progress_bar: bool | None = None,
        mesh: DeviceMesh | None = None,
    ) -> ScaledPosterior:
        r"""The same shape, narrow enough that draws of it can be served.

        Draws of this posterior itself are about the linearised network, and may be at
        chance in the network itself, where servers of adapters, ``export_adapters``,
        ``generate`` and ``predict(method="sample")`` use them. Here they are
        :math:`c + s (w - \hat w)`, with the largest s in (0, 1] under which one draw
        loses no more than a tolerance on some rows: five to nine passes over them, of
        so many draws, and five of one weight set where the posterior was refined.

        Args:
            batches: Rows with labels to measure the loss on, a hundred or so. Of a
                posterior that was refined, rows that weren't trained on: its center c
                is then the point between the trained weights and the refined mode with
                the least loss.
            tolerance: Nats a datum that a draw may lose, on average over draws: a
                single one may lose more, and what their mean probability loses is less.
            num_samples: Draws, the same at every s.
            progress_bar: Show one; None: on a terminal or in a notebook.
            mesh: A ``DeviceMesh`` whose dim ``"data"`` shares the batches; None: all
                ranks do, where ``torch.distributed`` is initialised, each with some of
                its own (:func:`~pyro_lora.share`).

        Returns:
            A posterior over the same sites, by draws.

        Raises:
            ValueError: If this posterior was loaded without a model, there are no
                batches, or they have no labels.

        Warns:
            UserWarning: If a draw loses more at every s.
        """
        check_positive("tolerance", tolerance)
        check_count("num_samples", num_samples)
        self._own_model("for_sampling")
        return scaled_to(
            self.scaled(),
            self.gaussian.origin,
            batches,
            tolerance=tolerance,
            num_samples=num_samples,
            progress_bar=progress_bar,
            obs_sites=self.obs_sites,
            ranks=ranks_of(mesh, "data"),
        )

    def scaled(self) -> ScaledPosterior:
        """Draws of this posterior, as one to scale: at its mean and a scale of one."""
        loc = self.gaussian.loc
        return ScaledPosterior(
            self,
            base_mean=loc,
            center=loc,
            scale=1.0,
            others={**self.fixed, **self.latents.values},
            networks=self.networks,
            model=self.model,
            obs_site=self.obs_site,
            prior=self.prior,
            fit_arguments=self.fit_arguments,
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

        Of a refined posterior :math:`f(x)` is the linearised network's, at the mode.
        One forward pass and C - 1 backward passes for C classes; P for numbers of P
        outputs (``.to_event(1)``), a Normal's with the noise variance. Where the
        network outputs scales, too, it's 2 P, and the Gaussian is over the location and
        the scale's logarithm of each output, one after the other.

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
        model, batch = self._own_model("linearized"), checked_batch(batch)
        network = linearized_network(self, model, obs_site or self.obs_site)
        with evaluating(self.networks):
            at_batch = network.at(batch, tokens)
            if joint:
                return at_batch.joint_logits(self.gaussian)
            return at_batch.logits(self.gaussian)[0]

    def _own_model(self, caller: str) -> Model:
        if self.model is None:
            raise ValueError(
                f"{caller} needs the model, but this posterior was loaded without one. "
                "Use load(path, lora, model=model)."
            )
        return self.model


def linearized_network(
    posterior: LaplacePosterior, model: Model, obs_site: str | None
) -> LinearizedNetwork:
    """A model's network linearised at the origin, what isn't the Gaussian's held.

    Args:
        posterior: A posterior.
        model: Its own, or one like it.
        obs_site: The likelihood's site; None is the only observed one.
    """
    # The Gaussian is over the other sites alone: J has no columns of these.
    held = {**posterior.fixed, **posterior.latents.values}
    model = poutine.condition(model, held) if held else model
    origin = posterior.gaussian.origin
    return LinearizedNetwork(model, origin, posterior.networks, obs_site)


def knows_evidence(posterior: LaplacePosterior) -> bool:
    """Whether its log evidence takes no decomposition, and so no time."""
    num_weights = sum(x.numel() for x in posterior.gaussian.loc.values())
    return posterior.gaussian.knows_log_det and num_weights <= _FREE
