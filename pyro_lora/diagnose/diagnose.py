r"""Model and posterior -> a diagnosis: what to believe of the posterior.

Most questions compare the Gaussian N(ŵ, P⁻¹), P = F + diag(τ), with the log joint of
all data, log p(y | w) + log p(w). With g its gradient at ŵ, a Newton step would gain
:math:`\frac12 g^T P^{-1} g` nats; along the q-th main direction, t standard deviations
from the mode, it should fall by t² / 2, as here it doesn't quite:

    offset t                -2    -1     1     2
    Gaussian              -2.0  -0.5  -0.5  -2.0
    log joint             -2.3  -0.6  -0.4  -1.7

A whole draw loses half the effective parameters, tr(F P⁻¹) / 2, on average.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_lora.curvature.prior_moments import model_scales
from pyro_lora.diagnose.diagnosis import (
    Charge,
    Confidence,
    Coverage,
    Diagnosis,
    Directions,
    Diversity,
    Importance,
    LeftOut,
    Stationarity,
)
from pyro_lora.ground.interrupts import leaving_no_trace
from pyro_lora.ground.progress import Counted, progress
from pyro_lora.ground.ranks import ALONE, Ranks, ranks_of, sharing_data
from pyro_lora.ground.settings import check_count, check_gradients
from pyro_lora.ground.weights import Weights
from pyro_lora.likelihood import likelihoods
from pyro_lora.likelihood.batch import (
    Batch,
    check_batches,
    checked_batches,
    explaining,
    next_batch,
)
from pyro_lora.likelihood.data_plate import data_plate
from pyro_lora.likelihood.model_trace import (
    IGNORED,
    Model,
    evaluating,
    lifted_networks,
    trace_at,
)
from pyro_lora.likelihood.outcome_source import GivenLabels
from pyro_lora.likelihood.outcomes import (
    SingleOutcomes,
    one_class_log_probs,
    single_outcomes,
)
from pyro_lora.posteriors.guide_posterior import Guide, GuidePosterior
from pyro_lora.posteriors.laplace_posterior import LaplacePosterior
from pyro_lora.posteriors.posterior import (
    Posterior,
    as_posterior,
    is_gaussian,
    kind_of,
    one_weight_set,
    only_gaussian,
    tempered_prior,
)
from pyro_lora.posteriors.prior import log_prior_by_site
from pyro_lora.predict.data_pass import (
    datum_log_probs,
    latent_log_probs,
    observes_only,
    why_no_log_joint,
)
from pyro_lora.predict.draws import (
    DRAWS_AT_ONCE,
    check_names,
    model_at_draws,
    model_of,
    outcome_source,
)
from pyro_lora.predict.predict import predict

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_OFFSETS = (-2.0, -1.0, 1.0, 2.0)  # standard deviations along a direction
_NUM_WHOLE_DRAWS = 10
_EQUAL_NATS = 1e-6  # log weights that differ by less are equal but for rounding


@leaving_no_trace
@sharing_data
def diagnose(
    posterior: Posterior | Guide,
    batches: Iterable[Batch],
    *,
    model: Model | None = None,
    held_out: Iterable[Batch] | None = None,
    num_directions: int = 4,
    num_samples: int = 50,
    obs_site: str | None = None,
    labels: str | None = None,
    progress_bar: bool | None = None,
    mesh: DeviceMesh | None = None,
) -> Diagnosis:
    r"""Ask a posterior five questions; ``print`` the answer.

    - Is the mode stationary? :math:`g^T P^{-1} g` against the effective number of
      parameters, :math:`\mathrm{tr}(F P^{-1})`, g the gradient of the log joint.
    - Is the Gaussian believable? Along the directions in which the data count most
      (eigenvectors of :math:`P^{-1} F`): the log joint at 1 and 2 standard deviations
      against the Gaussian's, and Pareto's :math:`\hat k` of the weights p / q for draws
      of these directions, all others at the mode; and how much likelihood whole draws
      lose. Of a stock guide: :math:`\hat k` for its draws (Yao et al. 2018,
      https://arxiv.org/abs/1802.02538).
    - Are particles diverse? How often two disagree, against how often one errs: equal
      for a calibrated ensemble (Jiang et al. 2022, https://arxiv.org/abs/2106.13799).
    - Is the prior or the likelihood in charge? Effective parameters by layer.
    - Is it over- or under-confident? Mean confidence less accuracy; of real outcomes,
      how many are inside their central 90% intervals.

    What can't be said of a posterior, or without labels, is left out, with the reason.
    A Laplace posterior takes about ``4 * num_directions + num_samples + 12`` forward
    passes over the data, a stock guide ``num_samples``.

    Args:
        posterior: A posterior, or any Pyro guide for the model.
        batches: Re-iterable of mappings of model keyword arguments: all training data,
            once.
        model: The Pyro model; None is the posterior's own.
        held_out: The same of other data, for diversity and confidence.
        num_directions: Main directions of a Gaussian.
        num_samples: Draws for :math:`\hat k`, at least 25.
        obs_site: The likelihood's site; None is the posterior's, else the model's only
            one.
        labels: The model's argument with that site's outcomes; None follows the
            arguments to its ``obs=``.
        progress_bar: Show one, of the batches of all passes; None: on a terminal or in
            a notebook.
        mesh: A ``DeviceMesh`` whose dim ``"data"`` shares the data; None: all ranks
            do, where ``torch.distributed`` is initialised, each with batches of its
            own (:func:`~pyro_lora.share`), of ``held_out``, too.

    Returns:
        The numbers, and ``str`` of it the table.

    Raises:
        ImportError: If ArviZ isn't installed.
        ValueError: If the batches are empty or can be read once only, there are too
            few samples, or the posterior doesn't fit the model.
    """
    try:
        import arviz_stats  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "diagnose needs ArviZ. Install it by: pip install 'pyro-lora[arviz]'"
        ) from error
    check_count("num_samples", num_samples)
    check_count("num_directions", num_directions)
    if num_samples < 25:
        raise ValueError(
            f"diagnose got num_samples={num_samples}, num_directions={num_directions}; "
            "k-hat needs 25 draws at least, and one direction."
        )
    for name, value in {"batches": batches, "held_out": held_out}.items():
        if name == "batches" or value is not None:
            check_batches(value, name)
        if value is not None and iter(value) is value:
            raise ValueError(
                f"diagnose reads {name} several times, but got an iterator. Pass a "
                "list or a DataLoader."
            )
    ranks = ranks_of(mesh, "data")
    first = next_batch(checked_batches(batches), "diagnose", ranks)
    posterior = as_posterior(posterior, model, first)
    model = model_of(posterior, model, "diagnose")
    check_names(model, obs_site, labels)
    obs_site = posterior.obs_site if obs_site is None else obs_site
    left_out: dict[str, str] = {}
    answers: dict[str, Any] = {}
    with progress(title="Diagnose", unit="batch", shown=progress_bar) as bar:
        joint = LogJoint(posterior, model, Counted(batches, bar), obs_site, ranks, mesh)
        others = None if held_out is None else Counted(held_out, bar)
        for field, answer in {
            "stationarity": lambda: _stationarity(joint),
            "gaussian": lambda: _density(joint, num_directions, num_samples),
            "diversity": lambda: _diversity(joint, others, labels),
            "charge": lambda: charge_of(posterior),
            "confidence": lambda: _confidence(joint, others, labels),
        }.items():
            try:
                answers[field] = answer()
            except LeftOut as reason:
                answers[field], left_out[field] = None, str(reason)
    return Diagnosis(
        posterior=kind_of(posterior),
        num_data=joint.num_data,
        left_out=left_out,
        **answers,
    )


class LogJoint:
    """Log likelihood and log prior of all data, as a function of the weights.

    Args:
        posterior: The posterior, whose prior is used.
        model: The Pyro model.
        batches: Re-iterable of mappings of model keyword arguments.
        obs_site: The likelihood's site, or None.
        ranks: Who shares the data.
        mesh: Whose ranks these are.

    Raises:
        ValueError: If there are no batches, or the posterior doesn't fit the model.
    """

    def __init__(
        self,
        posterior: Posterior,
        model: Model,
        batches: Iterable[Batch],
        obs_site: str | None,
        ranks: Ranks = ALONE,
        mesh: DeviceMesh | None = None,
    ) -> None:
        self.ranks, self.mesh = ranks, mesh
        first = next_batch(checked_batches(batches), "diagnose", ranks)
        self.posterior, self.model, self.batches = posterior, model, batches
        self.first = first
        one = {site: x[None] for site, x in one_weight_set(posterior).items()}
        at = model_at_draws(model, one, first, obs_site)
        (trace,) = at.traces(first)
        self.obs_site, self.site = at.obs_site, trace.nodes[at.obs_site]
        self.networks = lifted_networks(trace)
        self.prior = tempered_prior(posterior, model_scales(trace, self.networks))
        self.observes_only = observes_only(trace, at.obs_site)
        num_data = 0
        for batch in ranks.in_step(checked_batches(batches)):
            (trace,) = at.traces(batch)
            num_data += data_plate(trace.nodes[at.obs_site]).size
        self.num_data = ranks.total(num_data)

    def check(self) -> None:
        """Check that there is a log joint.

        Raises:
            LeftOut: If labels or data are missing, or another site is observed, too.
        """
        reason = why_no_log_joint(self.site, self.num_data, self.observes_only)
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
        in_step = self.ranks.in_step(checked_batches(self.batches))
        for index, batch in enumerate(in_step):
            of_batch = []
            for trace in at.traces(batch):
                site = trace.nodes[self.obs_site]
                with explaining(batch, nodes=trace.nodes):
                    log_prob = datum_log_probs(site)
                of_batch.append((log_prob * data_plate(site).scale).sum(-1))
                if index == 0:
                    latents.append(latent_log_probs(trace, self.networks))
            totals.append(torch.cat(of_batch))
        others = {s: torch.cat([chunk[s] for chunk in latents]) for s in latents[0]}
        log_prior = others | log_prior_by_site(self.prior, self.networks, weights)
        return (
            self.ranks.sum(torch.stack(totals).sum(0)),
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
            for batch in self.ranks.in_step(checked_batches(self.batches)):
                trace = trace_at(self.model, {**mode, **leaves}, batch)
                site = trace.nodes[self.obs_site]
                with explaining(batch, nodes=trace.nodes):
                    log_prob = datum_log_probs(site) * data_plate(site).scale
                log_prob.sum().backward()
            of_data = self.ranks.sums(
                [
                    torch.zeros_like(x) if x.grad is None else x.grad
                    for x in leaves.values()
                ]
            )
            prior = log_prior_by_site(
                self.prior, self.networks, {s: x[None] for s, x in leaves.items()}
            )
            of_prior = torch.autograd.grad(
                torch.stack(list(prior.values())).sum(),
                list(leaves.values()),
                materialize_grads=True,
            )
        return {
            site: a + b for site, a, b in zip(leaves, of_data, of_prior, strict=True)
        }


def _stationarity(joint: LogJoint) -> Stationarity:
    posterior = only_gaussian(joint.posterior)
    if posterior is None:
        raise LeftOut(f"{kind_of(joint.posterior)} has no mode and curvature")
    if posterior.gaussian.is_refined:
        raise LeftOut("its mean is a mode of the linearised network")
    joint.check()
    # At a mode g = 0. How far it is off counts in units of the curvature there: a step
    # of P⁻¹ g would gain half of gᵀ P⁻¹ g nats.
    gradient = joint.gradient(posterior.mode())
    gaussian, latents = posterior.gaussian, posterior.latents
    newton = float(gaussian.newton_decrement(gradient)) + latents.newton_decrement()
    effective = float(gaussian.effective_parameters()) + len(latents.gradient)
    return Stationarity(newton_decrement=newton, effective_parameters=effective)


def _density(
    joint: LogJoint, num_directions: int, num_samples: int
) -> Directions | Importance:
    posterior = joint.posterior
    if posterior.num_samples is not None:
        raise LeftOut("particles have no density")
    gaussian = only_gaussian(posterior)
    if gaussian is None and posterior.gaussians():
        raise LeftOut("diagnose each of .components")
    joint.check()
    if gaussian is not None:
        return _directions(joint, gaussian, num_directions, num_samples)
    weights, log_q = _draws(posterior, num_samples)
    if all(bool((x == x[:1]).all()) for x in weights.values()):
        raise LeftOut(f"{kind_of(posterior)} is a point")
    # log p(y, w) - log q(w): of a q that is the posterior, log p(y) for every draw.
    log_joint = torch.stack(joint.at(weights)).sum(0)
    log_ratios = log_joint - log_q.to(log_joint)
    return Importance(k_hat=_k_hat(log_ratios), num_samples=num_samples)


@torch.no_grad()
def _draws(posterior: Posterior, num_samples: int) -> tuple[Weights, Tensor]:
    """Draws, with the log density of each.

    Raises:
        LeftOut: If there is none.
    """
    if isinstance(posterior, GuidePosterior):  # with that of its auxiliary variables
        return posterior.sample_with_log_prob(num_samples)
    weights = posterior.sample(num_samples)
    try:
        return weights, posterior.log_prob(weights)
    except ValueError as error:
        raise LeftOut(str(error)) from error


def _directions(
    joint: LogJoint, posterior: LaplacePosterior, num_directions: int, num: int
) -> Directions:
    steps, shares = posterior.gaussian.informed_directions(num_directions)
    num_directions = len(shares)
    eye = torch.eye(num_directions, dtype=torch.float64, device=shares.device)
    offsets = torch.tensor(_OFFSETS, dtype=torch.float64, device=shares.device)
    on_lines = (eye[:, None] * offsets[:, None]).flatten(0, 1)  # (Q T, Q)
    z = torch.randn(num, num_directions, dtype=torch.float64, device="cpu").to(eye)
    mode = posterior.mode()

    def log_joint(coordinates: Tensor) -> Tensor:
        values = []
        for z in coordinates.split(DRAWS_AT_ONCE):  # weight sets in memory
            weights = {s: x.expand(len(z), *x.shape) for s, x in mode.items()}
            for site, step in steps.items():  # w = ŵ + Σ_q z_q step_q
                moved = torch.tensordot(z.to(step), step, 1)
                weights[site] = weights[site] + moved
            values.append(torch.stack(joint.at(weights)).sum(0))
        return torch.cat(values)

    at_mode, prior_at_mode = joint.at({s: x[None] for s, x in mode.items()})
    lines = log_joint(on_lines) - at_mode - prior_at_mode
    # q of these directions alone is standard normal, up to a constant.
    k_hat = _k_hat(log_joint(z) + 0.5 * z.square().sum(-1))
    # In all directions at once; of the log likelihood alone, as it's what F is of.
    whole, _ = joint.at(posterior.sample(_NUM_WHOLE_DRAWS))
    return Directions(
        names=tuple(_name(steps, q) for q in range(num_directions)),
        shares=shares,
        offsets=offsets,
        log_joint=lines.reshape(num_directions, -1),
        k_hat=k_hat,
        num_samples=num,
        draws_log_likelihood=float(whole.mean() - at_mode),
        draws_standard_error=float(whole.std()) / _NUM_WHOLE_DRAWS**0.5,
        draws_expected=-0.5 * float(posterior.gaussian.effective_parameters()),
    )


def _name(steps: Weights, index: int) -> str:
    """The site, and layer of it, in which most of a direction lies."""
    norms = {s: x[index].flatten(1).norm(dim=1) for s, x in steps.items()}
    site = max(norms, key=lambda s: float(norms[s].max()))
    layer = int(norms[site].argmax())
    return f"{site}[{layer}]" if len(norms[site]) > 1 else site


def _k_hat(log_ratios: Tensor) -> float:
    from arviz_stats.base import array_stats  # type: ignore[attr-defined]

    if float(log_ratios.max() - log_ratios.min()) < _EQUAL_NATS:
        return -math.inf  # no tail to fit a Pareto distribution to
    # It takes log likelihoods, whose reciprocals are leave-one-out's weights.
    # Where all others of the tail underflow it divides by zero, or says NaN.
    try:
        with np.errstate(divide="raise"):
            _, k_hat = array_stats.psislw(-log_ratios.cpu().numpy())
    except FloatingPointError:
        return math.inf
    return math.inf if math.isnan(k_hat) else float(k_hat)


def charge_of(posterior: Posterior) -> Charge:
    """Effective parameters by layer; a mixture's are its components', averaged.

    Args:
        posterior: A posterior.

    Raises:
        LeftOut: If it has no Fisher information.
    """
    if not is_gaussian(posterior):
        raise LeftOut(
            f"{kind_of(posterior)} has no Fisher information: see "
            "arviz_stats.psense_summary of to_datatree"
        )
    by_layer: dict[str, Tensor] = {}
    for pi, part in posterior.gaussians():
        for site, layers in part.gaussian.effective_parameters_by_layer().items():
            by_layer[site] = by_layer.get(site, 0) + pi * layers
    return Charge(
        by_layer=by_layer,
        num_weights={s: x[0].numel() for s, x in part.gaussian.loc.items()},
    )


def _check_classes(joint: LogJoint) -> None:
    single = _known(joint)
    if single.event_dims or likelihoods.of(single.fn).classes is None:
        raise LeftOut("the likelihood isn't one class a datum")


def _known(joint: LogJoint) -> SingleOutcomes:
    single = single_outcomes(joint.site["fn"])
    if likelihoods.known(single.fn) is None:
        raise LeftOut(f"{type(single.fn).__name__} isn't among pyro_lora.likelihoods")
    return single


@torch.no_grad()
def _diversity(
    joint: LogJoint, held_out: Iterable[Batch] | None, labels: str | None
) -> Diversity:
    posterior = joint.posterior
    modes = [part.mode() for _, part in posterior.gaussians()]
    if posterior.num_samples is not None:
        weights = posterior.sample(posterior.num_samples)
    elif len(modes) > 1:
        weights = {s: torch.stack([mode[s] for mode in modes]) for s in modes[0]}
    else:
        raise LeftOut(f"{kind_of(posterior)} has none")
    num = next(iter(weights.values())).shape[0]
    if num == 1:
        raise LeftOut("there is only one")
    _check_classes(joint)
    one = {site: x[0] for site, x in weights.items()}
    source = outcome_source(joint.model, one, joint.obs_site, labels)
    at = model_at_draws(
        joint.model, weights, source.hidden(joint.first), joint.obs_site
    )
    log_probs: list[Tensor] = []
    observed: list[Tensor | None] = []
    given = GivenLabels(source)
    batches = joint.batches if held_out is None else held_out
    for index, batch in enumerate(joint.ranks.in_step(batches)):
        traces = at.traces(source.hidden(batch))
        by_draws = [one_class_log_probs(t.nodes[at.obs_site]["fn"]) for t in traces]
        log_probs.append(torch.cat(by_draws))
        observed.append(given.read(batch, log_probs[-1].shape[-1], index))
    log_p = joint.ranks.gathered(torch.cat(log_probs, 1), 1)  # (K, N, C)
    predicted = log_p.argmax(-1)
    # Of all pairs of particles; a particle and itself agree, and add nothing.
    differ = (predicted[:, None] != predicted).double().mean(-1)  # (K, K)
    total = torch.special.entr(log_p.exp().mean(0)).sum()
    aleatoric = torch.special.entr(log_p.exp()).sum((1, 2)).mean()
    error = None
    observed = [x for own in joint.ranks.collected(observed) for x in own]
    labels_of_all = [x for x in observed if x is not None]
    if len(labels_of_all) == len(observed):
        true = torch.cat(labels_of_all).to(predicted)
        wrong = (predicted != true)[:, true != IGNORED]
        error = float(wrong.double().mean()) if wrong.numel() else None
    return Diversity(
        num_particles=num,
        disagreement=float(differ.sum()) / (num * (num - 1)),
        error=error,
        epistemic_share=float(1 - aleatoric / total),
    )


def _confidence(
    joint: LogJoint, held_out: Iterable[Batch] | None, labels: str | None
) -> Confidence | Coverage:
    single = _known(joint)
    classes = likelihoods.of(single.fn).classes
    if classes is not None:
        _check_classes(joint)
    elif single.event_dims > 1:
        raise LeftOut("the likelihood has several rows of outcomes a datum")
    prediction = predict(
        joint.posterior,
        joint.batches if held_out is None else held_out,
        model=joint.model,
        obs_site=joint.obs_site,
        labels=labels,
        progress_bar=False,  # these batches are counted already
        mesh=joint.mesh,
    )
    if prediction.labels is None:
        raise LeftOut(
            f"needs labels, and the batches have no {labels or 'labels'!r}: labels= "
            "says what they are called"
        )
    try:
        prediction = prediction.labelled("diagnose")
    except ValueError as error:
        raise LeftOut(str(error)) from error
    metrics = prediction.metrics()
    if classes is None:
        if "coverage" not in metrics:
            raise LeftOut(f"{type(single.fn).__name__} has no distribution function")
        return Coverage(
            coverage=metrics["coverage"],
            num_data=len(prediction),
            held_out=held_out is not None,
        )
    confidence, predicted = prediction.probs.double().max(-1)
    # Its mean is the overconfidence, its standard error that of the mean over data.
    gap = confidence - (predicted == prediction.labels).double()
    return Confidence(
        overconfidence=metrics["overconfidence"],
        standard_error=float(gap.std(correction=0)) / len(gap) ** 0.5,
        ece=metrics["ece"],
        num_data=len(gap),
        held_out=held_out is not None,
    )
