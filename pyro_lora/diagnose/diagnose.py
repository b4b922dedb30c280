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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

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
    LeftOut,
    Stationarity,
)
from pyro_lora.diagnose.log_joint import (
    Linearised,
    LogJoint,
    WeightSets,
    constant_pass,
    exact,
    linear_pass,
    rows_within,
    why_not_linear,
)
from pyro_lora.ground.interrupts import leaving_no_trace
from pyro_lora.ground.progress import Counted, progress
from pyro_lora.ground.ranks import ranks_of, sharing_data
from pyro_lora.ground.settings import check_count, check_positive
from pyro_lora.ground.weights import Weights
from pyro_lora.likelihood import likelihoods
from pyro_lora.likelihood.batch import (
    Batch,
    check_batches,
    checked_batches,
    next_batch,
)
from pyro_lora.likelihood.model_trace import IGNORED, Model
from pyro_lora.likelihood.outcomes import SingleOutcomes, single_outcomes
from pyro_lora.posteriors.guide_posterior import Guide, GuidePosterior
from pyro_lora.posteriors.laplace_posterior import LaplacePosterior
from pyro_lora.posteriors.particle_posterior import ParticlePosterior
from pyro_lora.posteriors.posterior import (
    Posterior,
    as_posterior,
    fit_arguments,
    is_gaussian,
    kind_of,
    only_gaussian,
)
from pyro_lora.predict.any_prediction import AnyPrediction
from pyro_lora.predict.draws import check_names, check_same_inputs, model_of
from pyro_lora.predict.predict import predict
from pyro_lora.predict.prediction import Prediction

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
    max_passes: float | None = 3.0,
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
      https://arxiv.org/abs/1802.02538). Nearly equal weights are good whatever
      :math:`\hat k`; where a standard error leaves both yes and no open, it says
      "unclear", and what would tell.
    - Are particles diverse? How often two disagree, against how often one errs: equal
      for a calibrated ensemble (Jiang et al. 2022, https://arxiv.org/abs/2106.13799).
    - Is the prior or the likelihood in charge? Effective parameters by layer.
    - Is it over- or under-confident? Mean confidence less accuracy; of real outcomes,
      how many are inside their central 90% intervals.

    What can't be said of a posterior, or without labels, is left out, with the reason.

    Of a Laplace posterior the log joint is asked for at S = 4 ``num_directions`` +
    ``num_samples`` + 11 weight sets. The network linearised at the mode tells it at all
    of them in one pass (C - 1 backward passes a batch, as a fit), which also has the
    gradient and the predictions; what the network itself says other than that is seen
    on as many random rows as ``max_passes`` allow, 16 at least, and stands for all
    rows, with a standard error. That is some three fits' time for two classes. Of few
    rows, or with ``max_passes=None``, all go through the network, S times.

    Particles take one pass for each. A stock guide takes ``num_samples`` passes, and as
    many for its predictions.

    Args:
        posterior: A posterior, or any Pyro guide for the model.
        batches: Re-iterable of mappings of model keyword arguments: all training data,
            once.
        model: The Pyro model; None is the posterior's own.
        held_out: The same of other data, for diversity and confidence.
        num_directions: Main directions of a Gaussian.
        num_samples: Draws for :math:`\hat k`, at least 25.
        max_passes: Forward passes over the data that a Laplace posterior's weight sets
            may take together; None is no limit.
        obs_site: The likelihood's site; None is the posterior's, else the model's only
            one.
        labels: The model's argument with that site's outcomes; None follows the
            arguments to its ``obs=``.
        progress_bar: Show one, of the batches of all passes; None: on a terminal or in
            a notebook.
        mesh: A ``DeviceMesh`` whose dim ``"data"`` shares the data and ``"particles"``
            draws and weight sets, as in ``predict``; None: all ranks share the data,
            where ``torch.distributed`` is initialised, each with batches of its own
            (:func:`~pyro_lora.share`), of ``held_out``, too.

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
    if max_passes is not None:
        check_positive("max_passes", max_passes)
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
        evidence = _Evidence(
            joint, others, num_directions, num_samples, max_passes, labels
        )
        for field, answer in {
            "stationarity": evidence.stationarity,
            "gaussian": evidence.density,
            "diversity": evidence.diversity,
            "charge": lambda: charge_of(posterior),
            "confidence": evidence.confidence,
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


@dataclass(frozen=True, eq=False)
class _Evidence:
    """What the questions are answered by, each found once.

    Attributes:
        joint: The log joint.
        held_out: Batches of other data, or None.
        num_directions: Of a Gaussian.
        num_samples: Draws for k-hat.
        max_passes: Over the data, of all weight sets.
        labels: The argument with the outcomes, where it is known.
    """

    joint: LogJoint
    held_out: Iterable[Batch] | None
    num_directions: int
    num_samples: int
    max_passes: float | None
    labels: str | None

    @property
    def posterior(self) -> Posterior:
        """Whose log joint it is."""
        return self.joint.posterior

    @property
    def to_predict(self) -> Iterable[Batch]:
        """Held-out data where there are some."""
        return self.joint.batches if self.held_out is None else self.held_out

    @cached_property
    def gaussian(self) -> LaplacePosterior | None:
        """What the posterior is, if it is one Gaussian."""
        return only_gaussian(self.posterior)

    @cached_property
    def points(self) -> _Points:
        """Where a Gaussian's log joint is asked for."""
        assert self.gaussian is not None  # who asks has seen to it
        return _points(self.gaussian, self.num_directions, self.num_samples)

    @cached_property
    def num_rows(self) -> int | None:
        """On how many the network runs at these points; None is all."""
        num_sets = sum(self.points.sets.sizes)
        return rows_within(self.max_passes, self.joint.num_data, num_sets)

    @cached_property
    def linearised(self) -> Linearised | None:
        """A Gaussian's pass over the data; None where there is none."""
        if self.gaussian is None or why_not_linear(self.joint) is not None:
            return None
        fitted_with = fit_arguments(self.posterior)
        check_same_inputs(self.posterior.networks, fitted_with, self.joint.first)
        has_joint = self.joint.why_not is None
        num_rows = self.num_rows if has_joint else None
        return linear_pass(
            self.joint,
            self.gaussian,
            None if num_rows is None else self.points.sets,
            num_rows or 0,
            has_joint=has_joint,
            predicts=self.held_out is None,
            labels=self.labels,
        )

    def stationarity(self) -> Stationarity:
        """Is the mode stationary?

        Raises:
            LeftOut: If that has no answer here.
        """
        posterior = self.gaussian
        if posterior is None:
            raise LeftOut(f"{kind_of(self.posterior)} has no mode and curvature")
        if posterior.gaussian.is_refined:
            raise LeftOut("its mean is a mode of the linearised network")
        self.joint.check()
        found = None if self.linearised is None else self.linearised.gradient
        # At a mode g = 0. How far it is off counts in units of the curvature there: a
        # step of P⁻¹ g would gain half of gᵀ P⁻¹ g nats.
        gradient = self.joint.gradient(posterior.mode()) if found is None else found
        gaussian, latents = posterior.gaussian, posterior.latents
        newton = float(gaussian.newton_decrement(gradient)) + latents.newton_decrement()
        effective = float(gaussian.effective_parameters()) + len(latents.gradient)
        return Stationarity(newton_decrement=newton, effective_parameters=effective)

    def density(self) -> Directions | Importance:
        """Is the density believable?

        Raises:
            LeftOut: If that has no answer here.
        """
        posterior = self.posterior
        if posterior.num_samples is not None:
            raise LeftOut("particles have no density")
        if self.gaussian is None and posterior.gaussians():
            raise LeftOut("diagnose each of .components")
        self.joint.check()
        if self.gaussian is not None:
            return self._directions(self.gaussian)
        weights, log_q = _draws(posterior, self.num_samples)
        if all(bool((x == x[:1]).all()) for x in weights.values()):
            raise LeftOut(f"{kind_of(posterior)} is a point")
        # log p(y, w) - log q(w): of a q that is the posterior, log p(y) for every draw.
        log_joint = torch.stack(self.joint.at(weights)).sum(0)
        log_ratios = log_joint - log_q.to(log_joint)
        k, effective = _of_weights(log_ratios).tolist()
        return Importance(
            k_hat=k, effective_samples=effective, num_samples=self.num_samples
        )

    def _directions(self, posterior: LaplacePosterior) -> Directions:
        points, joint = self.points, self.joint
        if self.num_rows is None:
            found = exact(joint, points.sets)
        elif self.linearised is not None:
            assert self.linearised.log_likelihoods is not None  # it was asked for them
            found = self.linearised.log_likelihoods
        else:
            found = constant_pass(joint, points.sets, self.num_rows)
        log_prior = torch.cat([joint.log_prior(w) for w in points.sets.near()])
        lines, z, whole = points.places

        def on_lines(log_likelihood: Tensor) -> Tensor:
            log_joint = log_likelihood[: len(log_prior)] + log_prior
            return log_joint[lines] - log_joint[0]

        def of_weights(log_likelihood: Tensor) -> Tensor:
            # q of these directions alone is standard normal, up to a constant.
            log_joint = log_likelihood[z] + log_prior[z]
            return _of_weights(log_joint + 0.5 * points.z.square().sum(-1))

        # In all directions at once; of the log likelihood alone, as it's what F is of.
        def lost(log_likelihood: Tensor) -> Tensor:
            return log_likelihood[whole] - log_likelihood[0]

        log_joint, line_errors = found.of(on_lines)
        weights, weights_errors = found.of(of_weights)
        (k, effective), errors = weights.tolist(), weights_errors.tolist()
        draws, _ = found.of(lost)
        mean, mean_error = found.of(lambda x: lost(x).mean())
        shape = len(points.names), -1
        of_draws = float(draws.std()) / len(draws) ** 0.5
        return Directions(
            names=points.names,
            shares=points.shares,
            offsets=points.offsets,
            log_joint=log_joint.reshape(shape),
            log_joint_errors=line_errors.reshape(shape),
            k_hat=k,
            k_hat_error=errors[0],
            effective_samples=effective,
            effective_samples_error=errors[1],
            num_samples=self.num_samples,
            draws_log_likelihood=float(mean),
            draws_standard_error=math.hypot(of_draws, float(mean_error)),
            draws_expected=-0.5 * float(posterior.gaussian.effective_parameters()),
            num_rows=found.num_data,
            num_data=joint.num_data,
            refined=posterior.gaussian.is_refined,
        )

    @cached_property
    def prediction(self) -> AnyPrediction:
        """Of the held-out data, else of those that the posterior is of.

        Raises:
            LeftOut: If it would take dozens of passes that nobody asked for.
        """
        found = self.linearised if self.held_out is None else None
        if found is not None and found.prediction is not None:
            return found.prediction
        posterior, num_samples = self.posterior, None
        if self.gaussian is not None:
            reason = why_not_linear(self.joint)
            if reason is not None and self.max_passes is not None:
                raise LeftOut(
                    f"the network can't be linearised here, since {reason}: by draws "
                    "of the weights it takes a pass for each, as max_passes=None allows"
                )
        elif isinstance(posterior, GuidePosterior):
            num_samples = 1 if _is_point(posterior) else self.num_samples
        return predict(
            posterior,
            self.to_predict,
            model=self.joint.model,
            num_samples=num_samples,
            obs_site=self.joint.obs_site,
            labels=self.labels,
            keep_draws=self._has_particles and _has_one_class(self.joint),
            progress_bar=False,  # these batches are counted already
            mesh=self.joint.mesh,
        )

    @property
    def _has_particles(self) -> bool:
        return (self.posterior.num_samples or 1) > 1

    def diversity(self) -> Diversity:
        """Are particles diverse?

        Raises:
            LeftOut: If that has no answer here.
        """
        modes = [part.origin() for _, part in self.posterior.gaussians()]
        if self.posterior.num_samples is None and len(modes) < 2:
            raise LeftOut(f"{kind_of(self.posterior)} has none")
        if self.posterior.num_samples == 1:
            raise LeftOut("there is only one")
        _check_classes(self.joint)
        of = self.prediction if self._has_particles else self._at_modes(modes)
        assert isinstance(of, Prediction)  # of one class a datum
        assert of.draw_log_probs is not None
        log_p = of.draw_log_probs  # (K, N, C)
        num, predicted = len(log_p), log_p.argmax(-1)
        # Of all pairs of particles; a particle and itself agree, and add nothing.
        differ = (predicted[:, None] != predicted).double().mean(-1)  # (K, K)
        total = torch.special.entr(log_p.exp().mean(0)).sum()
        aleatoric = torch.special.entr(log_p.exp()).sum((1, 2)).mean()
        error = None
        if of.labels is not None:
            true = of.labels.to(predicted)
            wrong = (predicted != true)[:, true != IGNORED]
            error = float(wrong.double().mean()) if wrong.numel() else None
        return Diversity(
            num_particles=num,
            disagreement=float(differ.sum()) / (num * (num - 1)),
            error=error,
            epistemic_share=float(1 - aleatoric / total),
        )

    def _at_modes(self, modes: Sequence[Weights]) -> AnyPrediction:
        """The modes of a mixture's Gaussians, predicted from as particles."""
        weights = {s: torch.stack([mode[s] for mode in modes]) for s in modes[0]}
        joint = self.joint
        return predict(
            ParticlePosterior(weights, joint.networks, joint.model, joint.obs_site),
            self.to_predict,
            labels=self.labels,
            keep_draws=True,
            progress_bar=False,
            mesh=joint.mesh,
        )

    def confidence(self) -> Confidence | Coverage:
        """Is it over- or under-confident?

        Raises:
            LeftOut: If that has no answer here.
        """
        single = _known(self.joint)
        classes = likelihoods.of(single.fn).classes
        if classes is not None:
            _check_classes(self.joint)
        elif single.event_dims > 1:
            raise LeftOut("the likelihood has several rows of outcomes a datum")
        prediction = self.prediction
        if prediction.labels is None:
            raise LeftOut(
                f"needs labels, and the batches have no {self.labels or 'labels'!r}: "
                "labels= says what they are called"
            )
        try:
            prediction = prediction.labelled("diagnose")
        except ValueError as error:
            raise LeftOut(str(error)) from error
        metrics = prediction.metrics()
        if classes is None:
            if "coverage" not in metrics:
                name = type(single.fn).__name__
                raise LeftOut(f"{name} has no distribution function")
            return Coverage(
                coverage=metrics["coverage"],
                num_data=len(prediction),
                held_out=self.held_out is not None,
            )
        assert isinstance(prediction, Prediction)  # of one class a datum
        assert prediction.labels is not None  # .labelled has seen to it
        confidence, predicted = prediction.probs.double().max(-1)
        # Its mean is the overconfidence, its standard error that of the mean over data.
        gap = confidence - predicted.eq(prediction.labels).double()
        return Confidence(
            overconfidence=metrics["overconfidence"],
            standard_error=float(gap.std(correction=0)) / len(gap) ** 0.5,
            ece=metrics["ece"],
            num_data=len(gap),
            held_out=self.held_out is not None,
        )


@dataclass(frozen=True, eq=False)
class _Points:
    """Where a Gaussian's log joint is asked for.

    Attributes:
        sets: The weight sets: the mode, points on lines, random points, whole draws.
        names: Of the directions, (Q).
        shares: The data's share of the precision, (Q,).
        offsets: On each line, (T,).
        z: The random points' coordinates, (S, Q).
    """

    sets: WeightSets
    names: tuple[str, ...]
    shares: Tensor
    offsets: Tensor
    z: Tensor

    @property
    def places(self) -> tuple[slice, slice, slice]:
        """Of the lines, the random points and the whole draws among the sets."""
        first = 1 + len(self.names) * len(self.offsets)
        last = first + len(self.z)
        return slice(1, first), slice(first, last), slice(last, None)


def _points(
    posterior: LaplacePosterior, num_directions: int, num_samples: int
) -> _Points:
    steps, shares = posterior.gaussian.informed_directions(num_directions)
    num_directions = len(shares)
    eye = torch.eye(num_directions, dtype=torch.float64, device=shares.device)
    offsets = torch.tensor(_OFFSETS, dtype=torch.float64, device=shares.device)
    on_lines = (eye[:, None] * offsets[:, None]).flatten(0, 1)  # (Q T, Q)
    z = torch.randn(num_samples, num_directions, dtype=torch.float64, device="cpu")
    z = z.to(eye)
    draws = posterior.sample(_NUM_WHOLE_DRAWS)
    sets = WeightSets(posterior.mode(), steps, torch.cat([on_lines, z]), draws)
    names = tuple(_name(steps, q) for q in range(num_directions))
    return _Points(sets, names, shares, offsets, z)


def _name(steps: Weights, index: int) -> str:
    """The site, and layer of it, in which most of a direction lies."""
    norms = {s: x[index].flatten(1).norm(dim=1) for s, x in steps.items()}
    site = max(norms, key=lambda s: float(norms[s].max()))
    layer = int(norms[site].argmax())
    return f"{site}[{layer}]" if len(norms[site]) > 1 else site


def _of_weights(log_ratios: Tensor) -> Tensor:
    """Pareto shape, and how many equal weights they are worth, (2,), float64."""
    shares = log_ratios.double().softmax(0)
    effective = 1 / float(shares.square().sum())
    return torch.tensor(
        [_k_hat(log_ratios), effective], dtype=torch.float64, device="cpu"
    )


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
    _known(joint)
    if not _has_one_class(joint):
        raise LeftOut("the likelihood isn't one class a datum")


def _known(joint: LogJoint) -> SingleOutcomes:
    single = single_outcomes(joint.site["fn"])
    if likelihoods.known(single.fn) is None:
        raise LeftOut(f"{type(single.fn).__name__} isn't among pyro_lora.likelihoods")
    return single


def _has_one_class(joint: LogJoint) -> bool:
    single = single_outcomes(joint.site["fn"])
    likelihood = likelihoods.known(single.fn)
    return (
        likelihood is not None
        and likelihood.classes is not None
        and not (single.event_dims)
    )


def _is_point(posterior: Posterior) -> bool:
    """Whether all draws are the same."""
    with torch.random.fork_rng():  # looking at a posterior draws nothing
        draws = posterior.sample(2)
    return all(torch.equal(x[0], x[1]) for x in draws.values())
