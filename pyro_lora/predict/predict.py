"""Posterior -> predictions, batch by batch.

The first batch decides how: by the linearised network or by draws, which argument has
the outcomes, what kind of prediction it is. Then every batch, its labels hidden from
the model, becomes a prediction of its data, and all of these one of all data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from pyro_lora.curvature.gaussian_logits import GaussianLogits, class_log_probs
from pyro_lora.ground.interrupts import leaving_no_trace
from pyro_lora.ground.progress import progress
from pyro_lora.ground.ranks import (
    ALONE,
    Ranks,
    draw_ranks_of,
    ranks_of,
    sharing_data,
)
from pyro_lora.ground.settings import check_count, check_function, check_word
from pyro_lora.ground.synchronisation import gathered
from pyro_lora.ground.warning import warn
from pyro_lora.ground.weights import Weights
from pyro_lora.lifting.cached_trunk import end_trunk_once, trunk_once
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood.batch import (
    Batch,
    PlacedBatch,
    check_batches,
    checked_batches,
    next_batch,
)
from pyro_lora.likelihood.model_trace import Model, lifted_networks, likelihood_site
from pyro_lora.likelihood.outcome_source import GivenLabels, OutcomeSource
from pyro_lora.posteriors.dropout import has_dropout
from pyro_lora.posteriors.guide_posterior import Guide
from pyro_lora.posteriors.posterior import (
    Posterior,
    PredictionMethod,
    as_posterior,
    fit_arguments,
    kind_of,
    largest_gaussian,
    one_weight_set,
    prediction_method,
)
from pyro_lora.predict.any_prediction import AnyPrediction
from pyro_lora.predict.draws import (
    DRAWS_AT_ONCE,
    check_names,
    check_same_inputs,
    draw_weights,
    model_at_draws,
    model_of,
    outcome_source,
)
from pyro_lora.predict.linearized import (
    check_linearizable,
    linearized_at,
    not_linearizable,
)
from pyro_lora.predict.sampled import Sampled
from pyro_lora.predict.token_prediction import (
    WhichOutcomes,
    WhichTokens,
    which_outcomes,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

DEFAULT_NUM_SAMPLES = 64  # the Monte-Carlo sd of a probability is then at most .06


@leaving_no_trace
@sharing_data
def predict(
    posterior: Posterior | Guide,
    batches: Iterable[Batch],
    *,
    model: Model | None = None,
    method: PredictionMethod | None = None,
    num_samples: int | None = None,
    chunk_size: int = DRAWS_AT_ONCE,
    integral: Callable[[GaussianLogits], Tensor] = class_log_probs,
    tokens: WhichTokens | None = None,
    obs_site: str | None = None,
    labels: str | None = None,
    keep_draws: bool = False,
    progress_bar: bool | None = None,
    mesh: DeviceMesh | None = None,
) -> Any:
    r"""Class probabilities, or numbers, averaged over a posterior.

    ``"linearized"``: the network linearised in the weights around the mode, so that the
    logits are Gaussian, and integrated exactly (Immer et al. 2021,
    https://arxiv.org/abs/2008.08400); so is a scale that the network outputs.
    ``"sample"``: :math:`p(y | x) = \frac1S \sum_s
    p(y | x, w_s)` with one set of draws for all data.

    Each posterior knows its way: a ``LaplacePosterior``, or a mixture of them,
    describes the linearised network and is predicted from with it; draws of it in the
    network itself may be at chance. Particles, dropout and all other guides go by
    draws. Where linearising takes too many backward passes (tokens of a vocabulary),
    draws it is, with a warning.

    Every likelihood of ``pyro_lora.likelihoods`` is predicted, by its outcomes: of
    classes, ordered or not, the result is a :class:`Prediction`; of real numbers with
    normal or Student's noise a :class:`RegressionPrediction`; of counts and all other
    numbers a :class:`MixturePrediction`. Several outcomes a datum are one event,
    ``.to_event(1)``: of classes, the tokens of a text, a :class:`TokenPrediction`; of
    yes or no (Bernoulli), several labels, a :class:`MultiLabelPrediction`.

    Dropout is off, but for :func:`mc_dropout`, and nothing is trained. Batches are
    streamed: only N rows of numbers stay. Labels are kept for the metrics and hidden
    from the model, but for those of tokens: which of them count is in the labels. Draws
    come from torch's generator before the first batch runs, so that a seed decides them
    whatever the batches' size; but for :func:`mc_dropout`, whose masks are drawn as the
    batches go by and depend on it and ``chunk_size``.

    Labels of outcomes that don't count, since the likelihood masks them or has a mark
    for missing ones (``NanMaskedNormal``), are -100 in the result, of real outcomes
    NaN, and no metric counts them. That costs one forward pass at one weight set: for
    the first batch, and with masks for every one.

    Args:
        posterior: A posterior, or any Pyro guide for the model; with
            ``"linearized"`` a ``LaplacePosterior`` or a mixture of them.
        batches: Mappings of model keyword arguments.
        model: The Pyro model, whose labels come in as ``labels``, None here; None is
            the posterior's own.
        method: ``"sample"`` or ``"linearized"``; None is the posterior's own.
        num_samples: Draws S; None is every particle once, or 64 where there are
            none. It doesn't choose the method: ``"linearized"`` is exact, and has a use
            for it only to keep draws.
        chunk_size: Draws in one forward pass, where there is memory for as many times a
            batch.
        integral: Log probabilities (B, C) from Gaussian logits, with
            ``"linearized"``: ``class_log_probs``, numerical, or the closed form
            ``probit``, which is rough. The aleatoric entropy is numerical in any case.
        tokens: Where a datum has several classes (``.to_event(1)``), one for each
            token: ``"each"`` predicts all that the likelihood doesn't mask, which None
            means, too; ``"last"`` the last one of each datum. None of yes or no: a
            table of labels, which all data have.
        obs_site: The likelihood's site; None is the posterior's, else the model's
            only one.
        labels: The model's argument with that site's outcomes; None follows the
            arguments to its ``obs=``, in a run of the first batch.
        keep_draws: Keep each draw's probabilities, S (N, C) numbers, for
            :func:`acquire`. With ``"linearized"`` they are drawn from the joint
            Gaussian of a batch, so that all data must be one batch. Real outcomes
            keep theirs in any case.
        progress_bar: Show one; None: on a terminal or in a notebook.
        mesh: A ``DeviceMesh`` whose dim ``"data"`` shares the data and ``"particles"``
            the draws, for which its ranks have the same batches (of fewer draws than
            ranks each runs all); None: all ranks share the data, where
            ``torch.distributed`` is initialised, each with batches of its own
            (:func:`~pyro_lora.share`). The numbers are one process's, but that
            :func:`mc_dropout` draws other masks.

    Returns:
        Predictions and labels of all data, in order, that of the ranks; on every rank.

    Raises:
        TypeError: If the likelihood isn't of a known type.
        ValueError: If there are no batches, or other things than mappings in them, some
            batches have labels and others none, it can't be told which argument they
            are, the posterior doesn't fit the model or the method, or ``integral`` is
            given where predictions are by draws.

    Warns:
        UserWarning: If a Gaussian posterior is sampled since linearising takes too
            much, or its draws predict far worse than its mode; or the network gets a
            mask, or another input, that it didn't have in the fit, or the other way
            round.
    """
    check_word("method", method, ("sample", "linearized", None))
    check_word("tokens", tokens, ("last", "each", None))
    check_function("integral", integral, "a function of Gaussian logits")
    check_count("chunk_size", chunk_size)
    if num_samples is not None:
        check_count("num_samples", num_samples)
    check_batches(batches)
    ranks = ranks_of(mesh, "data")
    stream = checked_batches(
        progress(batches, title="Predict", unit="batch", shown=progress_bar)
    )
    first = next_batch(stream, "predict", ranks)
    posterior = as_posterior(posterior, model, first)
    model = model_of(posterior, model, "predict")
    check_names(model, obs_site, labels)
    check_same_inputs(posterior.networks, fit_arguments(posterior), first)
    question = _Question(
        posterior=posterior,
        model=model,
        obs_site=obs_site or posterior.obs_site,
        labels=labels,
        method=method,
        tokens=tokens,
        num_samples=num_samples,
        draws_at_once=chunk_size,
        integral=integral,
        keep_draws=keep_draws,
        draws_over=draw_ranks_of(mesh),
    )
    with trunk_once(posterior.networks):  # of the first batch, which is looked at
        plan = question.plan(first)
        given = GivenLabels(plan.source)
        predictions: list[AnyPrediction] = []
        at_mode: list[AnyPrediction] = []
        stream = ranks.drawing(ranks.in_step(_with([first], stream)))
        stream = plan.draws_over.on_same(stream)
        del first
        with gathered():  # what a batch is asked for is read with the next one's
            for index, batch in enumerate(stream):
                if plan.way.takes_one_batch and (predictions or ranks.size > 1):
                    raise ValueError(
                        "keep_draws with the linearised network needs all data in one "
                        "batch, whose joint Gaussian it draws from; found a second "
                        "batch. Give one batch, to a single process, or say "
                        "method='sample'."
                    )
                seen = plan.shown(batch)
                reads_labels = plan.which in (None, "labels")
                if predictions and reads_labels:
                    given.look(batch, predictions[-1].num_classes)
                with trunk_once(plan.networks if plan.num_runs > 1 else []):
                    prediction = plan.way.predict(seen)
                    if plan.at_mode is not None:
                        at_mode.append(plan.at_mode.predict(seen))
                if reads_labels:
                    observed = given.read(batch, prediction.num_classes, index)
                    if observed is not None:
                        prediction = prediction.with_labels(observed, batch.place)
                predictions.append(prediction)
                plan.source.forget()  # a batch that has gone by
                end_trunk_once(posterior.networks)
    kind = type(predictions[0])
    own = [kind.concatenated(x) for x in (predictions, at_mode) if x]
    shares = [ranks.collected(x) for x in own]
    whole, *mode = [x[0] if len(x) == 1 else kind.concatenated(x) for x in shares]
    for prediction in mode:
        warn_if_worse(whole, prediction)
    return whole.with_names_of(plan.networks)


def _with(ahead: list[PlacedBatch], rest: Iterable[PlacedBatch]) -> Iterator[Any]:
    """What was read ahead, and the rest; each goes when the next one comes."""
    while ahead:
        yield ahead.pop(0)
    yield from rest


class _Way(Protocol):
    """How a batch is predicted: by draws, or by the linearised network."""

    @property
    def takes_one_batch(self) -> bool: ...

    @property
    def num_runs(self) -> int: ...

    def predict(self, batch: Batch) -> AnyPrediction: ...


@dataclass(frozen=True, eq=False)
class _Plan:
    """How each batch is predicted.

    Attributes:
        way: To the prediction of a batch, its labels hidden but for tokens.
        which: Which outcomes of a datum.
        source: Of the outcomes.
        networks: Those in the model, which may know the classes' names.
        at_mode: The same at the mode of a Gaussian whose draws are used.
        draws_over: Who shares the draws.
    """

    way: _Way
    which: WhichOutcomes | None
    source: OutcomeSource
    networks: Sequence[LiftedNetwork]
    at_mode: Sampled | None = None
    draws_over: Ranks = ALONE

    @property
    def num_runs(self) -> int:
        """How often a batch goes through the network."""
        return self.way.num_runs + (self.at_mode is not None)

    def shown(self, batch: PlacedBatch) -> PlacedBatch:
        """What the model sees of a batch."""
        return shown(self.source, batch, self.which)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Question:
    """What is predicted, and how: :func:`predict`'s arguments, checked."""

    posterior: Posterior
    model: Model
    obs_site: str | None
    labels: str | None
    method: PredictionMethod | None
    tokens: WhichTokens | None
    num_samples: int | None
    draws_at_once: int
    integral: Callable[[GaussianLogits], Tensor]
    keep_draws: bool
    draws_over: Ranks

    def plan(self, first: PlacedBatch) -> _Plan:
        """Decided on at the first batch.

        Raises:
            ValueError: If the arguments don't fit.
        """
        own_method = prediction_method(self.posterior)
        if (self.method or own_method) == "sample":
            return self._by_draws(first)
        check_linearizable(self.posterior, self.obs_site)
        source = self._source(one_weight_set(self.posterior))
        site = likelihood_site(source.trace_of(first), self.obs_site, source.latents)
        which = which_outcomes(site, self.tokens)
        reason = None if self.method else not_linearizable(site["fn"], which)
        if reason is None:
            return self._linearized(source, which)
        warn(
            f"The network can't be linearised here, since {reason}: predictions are by "
            "draws of the weights, which may leave the range where the Gaussian holds. "
            "Say method='sample' if that's what you want.",
        )
        return self._by_draws(first)

    def _linearized(self, source: OutcomeSource, which: WhichOutcomes | None) -> _Plan:
        self._check_keep_draws(which is None)
        num_draws = (self.num_samples or DEFAULT_NUM_SAMPLES) if self.keep_draws else 0
        way = linearized_at(
            self.posterior, self.model, self.obs_site, self.integral, which, num_draws
        )
        return _Plan(way, which, source, self.posterior.networks)

    def _by_draws(self, first: PlacedBatch) -> _Plan:
        if self.integral is not class_log_probs:
            raise ValueError(
                "integral= is of the linearised network's Gaussian logits, and "
                f"predictions of this {kind_of(self.posterior)} are by draws. Leave it "
                "out."
            )
        weights = draw_weights(self.posterior, self.num_samples, DEFAULT_NUM_SAMPLES)
        source = self._source({site: x[0] for site, x in weights.items()})
        trace = source.trace_of(first)
        site = likelihood_site(trace, self.obs_site, source.latents)
        which = which_outcomes(site, self.tokens)
        self._check_keep_draws(which in (None, "last"))
        seen = shown(source, first, which)
        at_draws = model_at_draws(
            self.model,
            weights,
            seen,
            self.obs_site,
            self.draws_at_once,
            has_dropout(self.posterior),
            trace,
            self.draws_over,
        )
        at_mode, gaussian = None, largest_gaussian(self.posterior)
        own_method = prediction_method(self.posterior)
        if gaussian is not None and own_method == "linearized" and which != "each":
            trained = {site: x[None] for site, x in gaussian.origin().items()}
            one = model_at_draws(self.model, trained, seen, self.obs_site, trace=trace)
            at_mode = Sampled(one, which)
        way = Sampled(at_draws, which, self.keep_draws)
        networks = lifted_networks(trace)
        return _Plan(way, which, source, networks, at_mode, at_draws.ranks)

    def _source(self, weights: Weights) -> OutcomeSource:
        return outcome_source(self.model, weights, self.obs_site, self.labels)

    def _check_keep_draws(self, one_class: bool) -> None:
        if self.keep_draws and not one_class:
            raise ValueError(
                "keep_draws is for one class a datum: with tokens, method='sample' and "
                "tokens='last'."
            )


def shown(
    source: OutcomeSource, batch: PlacedBatch, which: WhichOutcomes | None
) -> PlacedBatch:
    """What the model sees of a batch: no labels, but where these are of tokens.

    Args:
        source: Of the outcomes.
        batch: The model's keyword arguments.
        which: Which outcomes of a datum.
    """
    # Which tokens count is in their labels alone.
    return batch if which in ("last", "each") else source.hidden(batch)


def warn_if_worse(by_draws: AnyPrediction, at_mode: AnyPrediction) -> None:
    """Warn, to predict's caller, of draws that predict far worse than their mode.

    Args:
        by_draws: The prediction by draws, with labels where there are any.
        at_mode: The same data at the mode.
    """
    worse = by_draws.worse_than(at_mode)
    if worse is not None:
        warn(
            f"Averaged over draws of a Gaussian posterior, {worse} at its mode: the "
            "draws leave the range where the Gaussian holds. Predict with the "
            "linearised network (method='linearized', the default), or use a posterior "
            "over the last layer (AutoLaplace(sites='last_layer')) or particles.",
        )
