"""Model and posterior -> a diagnosis: what to believe of the posterior."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_lora.diagnose.diagnosis import (
    Charge,
    Confidence,
    Coverage,
    Diagnosis,
    Directions,
    Diversity,
    Importance,
    Stationarity,
)
from pyro_lora.diagnose.log_joint import LeftOut, LogJoint
from pyro_lora.ground.interrupts import leaving_no_trace
from pyro_lora.ground.settings import check_count
from pyro_lora.ground.weights import Weights
from pyro_lora.likelihood import likelihoods
from pyro_lora.likelihood.batch import Batch, check_batches, checked_batches
from pyro_lora.likelihood.model_trace import IGNORED, Model
from pyro_lora.likelihood.outcome_source import GivenLabels
from pyro_lora.likelihood.outcomes import (
    SingleOutcomes,
    class_log_probs,
    single_outcomes,
)
from pyro_lora.posteriors.guide_posterior import Guide, GuidePosterior
from pyro_lora.posteriors.laplace_posterior import LaplacePosterior
from pyro_lora.posteriors.posterior import (
    Posterior,
    as_posterior,
    is_gaussian,
    kind_of,
    only_gaussian,
)
from pyro_lora.predict.draws import (
    DRAWS_AT_ONCE,
    check_names,
    model_at_draws,
    model_of,
    outcome_source,
)
from pyro_lora.predict.predict import predict

_OFFSETS = (-2.0, -1.0, 1.0, 2.0)  # standard deviations along a direction
_NUM_WHOLE_DRAWS = 10
_EQUAL_NATS = 1e-6  # log weights that differ by less are equal but for rounding


@leaving_no_trace
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
    first = next(checked_batches(batches), None)
    if first is None:
        raise ValueError("diagnose got no batches.")
    posterior = as_posterior(posterior, model, first)
    model = model_of(posterior, model, "diagnose")
    check_names(model, obs_site, labels)
    obs_site = posterior.obs_site if obs_site is None else obs_site
    joint = LogJoint(posterior, model, batches, obs_site)
    left_out: dict[str, str] = {}
    found: dict[str, Any] = {}
    for field, answer in {
        "stationarity": lambda: _stationarity(joint),
        "gaussian": lambda: _density(joint, num_directions, num_samples),
        "diversity": lambda: _diversity(joint, held_out, labels),
        "charge": lambda: charge_of(posterior),
        "confidence": lambda: _confidence(joint, held_out, labels),
    }.items():
        try:
            found[field] = answer()
        except LeftOut as reason:
            found[field], left_out[field] = None, str(reason)
    return Diagnosis(
        posterior=kind_of(posterior),
        num_data=joint.num_data,
        left_out=left_out,
        **found,
    )


def _stationarity(joint: LogJoint) -> Stationarity:
    posterior = only_gaussian(joint.posterior)
    if posterior is None:
        raise LeftOut(f"{kind_of(joint.posterior)} has no mode and curvature")
    joint.check()
    gradient = joint.gradient(posterior.mode())
    newton = float(posterior.gaussian.newton_decrement(gradient))
    effective = float(posterior.gaussian.effective_parameters())
    if posterior.latents is not None:
        newton += posterior.latents.newton_decrement()
        effective += len(posterior.latents.gradient)
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
    z = torch.randn(num, num_directions, dtype=torch.float64).to(eye)
    mode = posterior.mode()

    def log_joint(coordinates: Tensor) -> Tensor:
        found = []
        for some in coordinates.split(DRAWS_AT_ONCE):  # weight sets in memory
            weights = {s: x.expand(len(some), *x.shape) for s, x in mode.items()}
            for site, step in steps.items():
                moved = torch.tensordot(some.to(step), step, 1)
                weights[site] = weights[site] + moved
            found.append(torch.stack(joint.at(weights)).sum(0))
        return torch.cat(found)

    at_mode, prior_at_mode = joint.at({s: x[None] for s, x in mode.items()})
    lines = log_joint(on_lines) - at_mode - prior_at_mode
    # q of these directions alone is standard normal, up to a constant.
    k_hat = _k_hat(log_joint(z) + 0.5 * z.square().sum(-1))
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
    parts = [
        (weight, part.gaussian.effective_parameters_by_layer())
        for weight, part in posterior.gaussians()
    ]
    _, first = posterior.gaussians()[0]
    return Charge(
        by_layer={
            site: torch.stack([weight * layers[site] for weight, layers in parts]).sum(
                0
            )
            for site in parts[0][1]
        },
        num_weights={s: x[0].numel() for s, x in first.gaussian.loc.items()},
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
    outcomes: list[Any] = []
    given = GivenLabels(source)
    for index, batch in enumerate(joint.batches if held_out is None else held_out):
        traces = at.traces(source.hidden(batch))
        parts = [class_log_probs(t.nodes[at.obs_site]["fn"]) for t in traces]
        log_probs.append(torch.cat(parts))
        outcomes.append(given.read(batch, log_probs[-1].shape[-1], index))
    log_p = torch.cat(log_probs, 1)  # (K, N, C)
    predicted = log_p.argmax(-1)
    differ = (predicted[:, None] != predicted).double().mean(-1)  # (K, K)
    total = torch.special.entr(log_p.exp().mean(0)).sum()
    aleatoric = torch.special.entr(log_p.exp()).sum((1, 2)).mean()
    error = None
    if all(isinstance(x, Tensor) for x in outcomes):
        true = torch.cat(outcomes).to(predicted)
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
        known = ~prediction.labels.isnan()
        return Coverage(
            coverage=metrics["coverage"],
            num_data=int(known.reshape(len(known), -1).any(1).sum()),
            held_out=held_out is not None,
        )
    confidence, predicted = prediction.probs.double().max(-1)
    gap = confidence - (predicted == prediction.labels).double()
    return Confidence(
        overconfidence=metrics["overconfidence"],
        standard_error=float(gap.std(correction=0)) / len(gap) ** 0.5,
        ece=metrics["ece"],
        num_data=len(gap),
        held_out=held_out is not None,
    )
