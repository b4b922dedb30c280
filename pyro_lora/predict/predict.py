"""Posterior -> predictions, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_lora.curvature.gaussian_logits import GaussianLogits, class_log_probs
from pyro_lora.ground.interrupts import leaving_no_trace
from pyro_lora.ground.settings import check_count, check_function, check_word
from pyro_lora.ground.warning import warn
from pyro_lora.ground.weights import Weights
from pyro_lora.likelihood.batch import check_batches, checked_batches
from pyro_lora.likelihood.model_trace import Batch, Model, likelihood_site
from pyro_lora.likelihood.outcome_kinds import GivenLabels, Tokens
from pyro_lora.likelihood.outcome_source import OutcomeSource
from pyro_lora.posteriors.dropout import DropoutPosterior
from pyro_lora.posteriors.joint_distribution import check_num_samples
from pyro_lora.posteriors.laplace_posterior import PredictionMethod
from pyro_lora.posteriors.posterior import Guide
from pyro_lora.predict import prediction, regression, token_prediction
from pyro_lora.predict.draws import (
    DRAWS_AT_ONCE,
    LORA_POSTERIORS,
    check_guide,
    check_names,
    draw_weights,
    model_at_draws,
    model_of,
    outcome_source,
    prediction_method,
)
from pyro_lora.predict.far_from_mode import warn_if_worse
from pyro_lora.predict.linearized import (
    check_linearizable,
    laplace_parts,
    linearized,
    obstacle,
)
from pyro_lora.predict.prediction import Prediction
from pyro_lora.predict.regression import RegressionPrediction
from pyro_lora.predict.sampled import sampled
from pyro_lora.predict.token_prediction import TokenPrediction

DEFAULT_NUM_SAMPLES = 64  # the Monte-Carlo sd of a probability is then at most .06


@leaving_no_trace
def predict(
    posterior: Guide,
    batches: Iterable[Batch],
    *,
    model: Model | None = None,
    method: PredictionMethod | None = None,
    num_samples: int | None = None,
    chunk_size: int = DRAWS_AT_ONCE,
    integral: Callable[[GaussianLogits], Tensor] = class_log_probs,
    tokens: Tokens | None = None,
    obs_site: str | None = None,
    labels: str | None = None,
    keep_draws: bool = False,
    progress_bar: bool = False,
) -> Any:
    r"""Class probabilities, or real outcomes, averaged over a posterior.

    ``"linearized"``: the network linearised in the weights around the mode, so that the
    logits are Gaussian, and integrated exactly (Immer et al. 2021,
    https://arxiv.org/abs/2008.08400). ``"sample"``: :math:`p(y | x) = \frac1S \sum_s
    p(y | x, w_s)` with one set of draws for all data.

    Each posterior knows its way: a ``LaplacePosterior``, or a mixture of them,
    describes the linearised network and is predicted from with it; draws of it in the
    network itself may be at chance. Particles, dropout and all other guides go by
    draws. Where the likelihood has no linear predictor (Student's t, whole
    vocabularies), draws it is, with a warning.

    By the likelihood's type the result is a :class:`Prediction` (Categorical or
    Bernoulli), a :class:`RegressionPrediction` (Normal or, by draws, StudentT; several
    outputs by ``.to_event(1)``), or with ``tokens="each"`` a :class:`TokenPrediction`.

    Dropout is off, but for :func:`mc_dropout`, and nothing is trained. Batches are
    streamed: only N rows of numbers stay. Labels are kept for the metrics and hidden
    from the model, unless there are ``tokens``: which of them count is then in the
    labels. Draws come from torch's generator before the first batch runs, so that a
    seed decides them whatever the batches' size; but for :func:`mc_dropout`, whose
    masks are drawn as the batches go by and depend on it and ``chunk_size``.

    Labels of outcomes that don't count, since the likelihood masks them or has a mark
    for missing ones (``NanMaskedNormal``), are -100 in the result, of real outcomes
    NaN, and no metric counts them. That costs one forward pass at one weight set: for
    the first batch, and with masks for every one.

    Args:
        posterior: Any Pyro guide for the model, with ``"sample"``; a
            ``LaplacePosterior`` or a mixture of them, with ``"linearized"``.
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
            ``"linearized"``: ``class_log_probs``, numerical, or the closed forms
            ``probit`` and ``laplace_bridge``, which are rough. The aleatoric entropy
            is numerical in any case.
        tokens: Where a datum has several classes (``.to_event(1)``), one for each
            token: ``"last"`` predicts the last one that the likelihood doesn't mask,
            ``"each"`` all of them.
        obs_site: The likelihood's site; None is the posterior's, else the model's
            only one.
        labels: The model's argument with that site's outcomes; None follows the
            arguments to its ``obs=``, in a run of the first batch.
        keep_draws: Keep each draw's probabilities, S (N, C) numbers, for
            :func:`acquire`. With ``"linearized"`` they are drawn from the joint
            Gaussian of a batch, so that all data must be one batch. Real outcomes
            keep theirs in any case.
        progress_bar: Show one.

    Returns:
        Predictions and labels of all data, in order.

    Raises:
        ValueError: If there are no batches, or other things than mappings in them, the
            likelihood isn't of a known type, some batches have labels and others none,
            it can't be told which argument they are, or the posterior doesn't fit the
            model or the method.

    Warns:
        UserWarning: If a Gaussian posterior is sampled for want of a linear predictor,
            or its draws predict far worse than its mode.
    """
    model = model_of(posterior, model, "predict")
    check_word("method", method, ("sample", "linearized", None))
    check_word("tokens", tokens, ("last", "each", None))
    check_names(model, obs_site, labels)
    check_guide(posterior)
    check_function("integral", integral, "a function of Gaussian logits")
    check_count("chunk_size", chunk_size)
    if num_samples is not None:
        check_count("num_samples", num_samples)
    if isinstance(posterior, LORA_POSTERIORS | DropoutPosterior):
        obs_site = obs_site or posterior.obs_site
    predictor: _Predictor | None = None
    parts: list[Any] = []
    outcomes: list[Any] = []
    modes: list[Any] = []
    given: GivenLabels | None = None
    check_batches(batches)
    bar = tqdm(batches, desc="Predict", disable=not progress_bar)
    for index, batch in enumerate(checked_batches(bar)):
        if predictor is None:
            predictor = _predictor(
                model,
                posterior,
                batch,
                method,
                tokens,
                obs_site,
                labels,
                num_samples,
                chunk_size,
                integral,
                keep_draws,
            )
        shown = batch if tokens else predictor.source.hidden(batch)
        if predictor.joint and parts:
            raise ValueError(
                "keep_draws with the linearised network needs all data in one batch, "
                "whose joint Gaussian it draws from; found a second batch. Give one "
                "batch, or say method='sample'."
            )
        part = predictor.predict(shown)
        parts.append(part)
        if predictor.predict_mode is not None:
            modes.append(predictor.predict_mode(shown))
        if tokens is not None:
            outcomes.append(part.labels)
            predictor.source.forget()
            continue
        given = GivenLabels(predictor.source) if given is None else given
        classes = part.log_probs.shape[1] if isinstance(part, Prediction) else None
        known = given.read(batch, classes, index)
        if known is not None:
            known = _one_a_datum(known, batch.place, part)
        outcomes.append(known)
        predictor.source.forget()  # a batch that has gone by
    if predictor is None:
        raise ValueError("predict got no batches. Is the iterable used up already?")
    found = _concatenated(parts)
    if tokens is None and outcomes[0] is not None:
        found = replace(found, labels=_joined(outcomes, found))
    if modes:
        warn_if_worse(found, _concatenated(modes))
    return found


@dataclass(frozen=True, eq=False)
class _Predictor:
    """How each batch is predicted.

    Attributes:
        predict: The prediction of a batch, its labels hidden but for tokens.
        source: Of the outcomes.
        predict_mode: The same at the mode of a Gaussian whose draws are used.
        joint: Whether draws of a batch are joint over it, so that there is one only.
    """

    predict: Callable[[Batch], Any]
    source: OutcomeSource
    predict_mode: Callable[[Batch], Any] | None = None
    joint: bool = False


def _predictor(
    model: Model,
    posterior: Guide,
    batch: Batch,
    method: PredictionMethod | None,
    tokens: Tokens | None,
    obs_site: str | None,
    labels: str | None,
    num_samples: int | None,
    chunk_size: int,
    integral: Callable[[GaussianLogits], Tensor],
    keep_draws: bool,
) -> _Predictor:
    """Decided on at the first batch.

    Raises:
        ValueError: If the arguments don't fit.
    """
    if num_samples is not None:
        check_num_samples(num_samples)
    is_gaussian = prediction_method(posterior) == "linearized"
    if method == "linearized" or (method is None and is_gaussian):
        check_linearizable(posterior, obs_site)
        mode = _mode(posterior)
        source = outcome_source(model, mode, obs_site, labels)
        reason = None
        if method is None:
            site = likelihood_site(source.trace_of(batch), obs_site, mode)
            reason = obstacle(site["fn"], tokens)
        if reason is None:
            _check_keep_draws(keep_draws, tokens, "linearized")
            num_draws = (num_samples or DEFAULT_NUM_SAMPLES) if keep_draws else 0
            return _Predictor(
                lambda shown: linearized(
                    posterior, model, shown, integral, obs_site, tokens, num_draws
                ),
                source,
                joint=keep_draws,
            )
        warn(
            f"The network can't be linearised here, since {reason}: predictions are by "
            "draws of the weights, which may leave the range where the Gaussian holds. "
            "Say method='sample' if that's what you want.",
        )
    _check_keep_draws(keep_draws, tokens, "sample")
    weights = draw_weights(posterior, num_samples, DEFAULT_NUM_SAMPLES, batch)
    one = {site: x[0] for site, x in weights.items()}
    source = outcome_source(model, one, obs_site, labels)
    shown = batch if tokens else source.hidden(batch)
    dropout = isinstance(posterior, DropoutPosterior)
    trace = source.trace_of(batch)
    at_draws = model_at_draws(
        model, weights, shown, obs_site, chunk_size, dropout, trace
    )
    predict_mode = None
    if is_gaussian and tokens != "each":
        mode = {site: x[None] for site, x in _mode(posterior).items()}
        at_mode = model_at_draws(model, mode, shown, obs_site, trace=trace)
        predict_mode = partial(sampled, at_mode, tokens=tokens)
    return _Predictor(
        partial(sampled, at_draws, tokens=tokens, keep_draws=keep_draws),
        source,
        predict_mode,
    )


def _mode(posterior: Guide) -> Weights:
    """The mode of a Gaussian; in a mixture that of the one with the most weight."""
    _, part = max(laplace_parts(posterior), key=lambda pair: float(pair[0]))
    return part.mode()


def _check_keep_draws(keep: bool, tokens: Tokens | None, method: str) -> None:
    if keep and (tokens == "each" or (method == "linearized" and tokens is not None)):
        raise ValueError(
            "keep_draws is for one class a datum: with tokens, method='sample' and "
            "tokens='last'."
        )


def _concatenated(
    parts: Sequence[Any],
) -> Prediction | RegressionPrediction | TokenPrediction:
    if isinstance(parts[0], Prediction):
        return prediction.concatenated(parts)
    if isinstance(parts[0], RegressionPrediction):
        return regression.concatenated(parts)
    return token_prediction.concatenated(parts)


def _one_a_datum(labels: Tensor, place: str, part: Any) -> Tensor:
    """The labels of a batch, one for each datum.

    Raises:
        ValueError: If they are something else, or their number is.
    """
    real = isinstance(part, RegressionPrediction)
    shape = part.loc.shape[1:] if real else part.log_probs.shape[:1]
    if real and labels.shape == (*shape, 1):  # as the network's outputs are
        return labels[..., 0]
    if labels.is_complex() or labels.shape != shape:
        raise ValueError(
            f"{place}: expected labels as a tensor of real numbers of shape "
            f"{tuple(shape)}, one for each datum, found {tuple(labels.shape)}."
        )
    return labels


def _joined(labels: Sequence[Any], found: Any) -> Tensor:
    joined = torch.cat(list(labels))
    if isinstance(found, RegressionPrediction):
        return joined.to(found.loc)
    joined = joined.to(found.log_probs.device)
    whole = joined.long()
    return whole if bool((whole == joined).all()) else joined
