"""Posterior -> predictions, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
from pyro_lora.likelihood.batch import Batch, check_batches, checked_batches
from pyro_lora.likelihood.model_trace import Model, likelihood_site
from pyro_lora.likelihood.outcome_source import GivenLabels, OutcomeSource
from pyro_lora.posteriors.dropout import has_dropout
from pyro_lora.posteriors.guide_posterior import Guide
from pyro_lora.posteriors.posterior import (
    Posterior,
    PredictionMethod,
    as_posterior,
    prediction_method,
)
from pyro_lora.predict import (
    mixture_prediction,
    prediction,
    regression,
    token_prediction,
)
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
    linearized,
    obstacle,
)
from pyro_lora.predict.mixture_prediction import MixturePrediction
from pyro_lora.predict.prediction import Prediction
from pyro_lora.predict.regression import RegressionPrediction
from pyro_lora.predict.sampled import AnyPrediction, NumberPrediction, sampled
from pyro_lora.predict.token_prediction import Tokens

DEFAULT_NUM_SAMPLES = 64  # the Monte-Carlo sd of a probability is then at most .06


@leaving_no_trace
def predict(
    posterior: Posterior | Guide,
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
    r"""Class probabilities, or numbers, averaged over a posterior.

    ``"linearized"``: the network linearised in the weights around the mode, so that the
    logits are Gaussian, and integrated exactly (Immer et al. 2021,
    https://arxiv.org/abs/2008.08400). ``"sample"``: :math:`p(y | x) = \frac1S \sum_s
    p(y | x, w_s)` with one set of draws for all data.

    Each posterior knows its way: a ``LaplacePosterior``, or a mixture of them,
    describes the linearised network and is predicted from with it; draws of it in the
    network itself may be at chance. Particles, dropout and all other guides go by
    draws. Where linearising takes too many backward passes (tokens of a vocabulary),
    draws it is, with a warning.

    Every likelihood of ``pyro_lora.likelihoods`` is predicted, by its outcomes: of
    classes, ordered or not, the result is a :class:`Prediction`, with ``tokens="each"``
    a :class:`TokenPrediction`; of real numbers with normal or Student's noise a
    :class:`RegressionPrediction`; of counts and all other numbers a
    :class:`MixturePrediction`. Several numbers a datum are one event,
    ``.to_event(1)``.

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
        TypeError: If the likelihood isn't of a known type.
        ValueError: If there are no batches, or other things than mappings in them, some
            batches have labels and others none, it can't be told which argument they
            are, or the posterior doesn't fit the model or the method.

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
    stream = checked_batches(tqdm(batches, desc="Predict", disable=not progress_bar))
    first = next(stream, None)
    if first is None:
        raise ValueError("predict got no batches. Is the iterable used up already?")
    posterior = as_posterior(posterior, model, first)
    model = model_of(posterior, model, "predict")
    check_names(model, obs_site, labels)
    check_same_inputs(posterior, first)
    predictor = _predictor(
        model,
        posterior,
        first,
        method,
        tokens,
        obs_site or posterior.obs_site,
        labels,
        num_samples,
        chunk_size,
        integral,
        keep_draws,
    )
    parts: list[Any] = []
    outcomes: list[Any] = []
    modes: list[Any] = []
    given = GivenLabels(predictor.source)
    stream = _with([first], stream)
    del first
    for index, batch in enumerate(stream):
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
        classes = part.log_probs.shape[1] if isinstance(part, Prediction) else None
        known = given.read(batch, classes, index)
        if known is not None:
            known = _one_a_datum(known, batch.place, part)
        outcomes.append(known)
        predictor.source.forget()  # a batch that has gone by
    found = _concatenated(parts)
    if tokens is None and outcomes[0] is not None:
        found = replace(found, labels=_joined(outcomes, found))
    if modes:
        warn_if_worse(found, _concatenated(modes))
    return found


def _with(ahead: list[Any], rest: Iterable[Any]) -> Iterator[Any]:
    """What was read ahead, and the rest; each goes when the next one comes."""
    while ahead:
        yield ahead.pop(0)
    yield from rest


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
    posterior: Posterior,
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
    own_method = prediction_method(posterior)
    if (method or own_method) == "linearized":
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
    weights = draw_weights(posterior, num_samples, DEFAULT_NUM_SAMPLES)
    one = {site: x[0] for site, x in weights.items()}
    source = outcome_source(model, one, obs_site, labels)
    shown = batch if tokens else source.hidden(batch)
    trace = source.trace_of(batch)
    at_draws = model_at_draws(
        model, weights, shown, obs_site, chunk_size, has_dropout(posterior), trace
    )
    predict_mode = None
    if own_method == "linearized" and tokens != "each":
        mode = {site: x[None] for site, x in _mode(posterior).items()}
        at_mode = model_at_draws(model, mode, shown, obs_site, trace=trace)
        predict_mode = partial(sampled, at_mode, tokens=tokens)
    return _Predictor(
        partial(sampled, at_draws, tokens=tokens, keep_draws=keep_draws),
        source,
        predict_mode,
    )


def _mode(posterior: Posterior) -> Weights:
    """The mode of a Gaussian; in a mixture that of the one with the most weight."""
    _, part = max(posterior.gaussians(), key=lambda pair: pair[0])
    return part.mode()


def _check_keep_draws(keep: bool, tokens: Tokens | None, method: str) -> None:
    if keep and (tokens == "each" or (method == "linearized" and tokens is not None)):
        raise ValueError(
            "keep_draws is for one class a datum: with tokens, method='sample' and "
            "tokens='last'."
        )


def _concatenated(parts: Sequence[Any]) -> AnyPrediction:
    if isinstance(parts[0], Prediction):
        return prediction.concatenated(parts)
    if isinstance(parts[0], RegressionPrediction):
        return regression.concatenated(parts)
    if isinstance(parts[0], MixturePrediction):
        return mixture_prediction.concatenated(parts)
    return token_prediction.concatenated(parts)


def _one_a_datum(labels: Tensor, place: str, part: Any) -> Tensor:
    """The labels of a batch, one for each datum.

    Raises:
        ValueError: If they are something else, or their number is.
    """
    shape, number = part.label_shape, isinstance(part, NumberPrediction)
    if number and labels.shape == (*shape, 1):  # as the network's outputs are
        return labels[..., 0]
    if labels.is_complex() or labels.shape != shape:
        raise ValueError(
            f"{place}: expected labels as a tensor of real numbers of shape "
            f"{shape}, one for each datum, found {tuple(labels.shape)}."
        )
    return labels


def _joined(labels: Sequence[Any], found: Any) -> Tensor:
    joined = torch.cat(list(labels))
    if isinstance(found, NumberPrediction):
        return joined.to(found.mean)
    joined = joined.to(found.log_probs.device)
    whole = joined.long()
    return whole if bool((whole == joined).all()) else joined


# What the mode must be ahead by, in accuracy, and where only its own probabilities say
# what is right. Draws of a posterior over the last layer, which are right, stay below.
_ACCURACY, _EXPECTED_ACCURACY = 0.05, 0.15
_NATS = 0.1
_RMSE = 0.1  # of the mode's
_NUM_ERRORS = 3.0  # standard errors of the mean over the data


def warn_if_worse(sampled: Any, at_mode: Any) -> None:
    """Warn, to predict's caller, of draws that predict far worse than their mode.

    Args:
        sampled: The prediction by draws, with labels where there are any.
        at_mode: The same data at the mode.
    """
    found = None
    if isinstance(sampled, Prediction):
        found = _of_classes(sampled, at_mode)
    elif isinstance(sampled, NumberPrediction):
        found = _of_reals(sampled, at_mode)
    if found is not None:
        warn(
            f"Averaged over draws of a Gaussian posterior, {found} at its mode: the "
            "draws leave the range where the Gaussian holds. Predict with the "
            "linearised network (method='linearized', the default), or use a posterior "
            "over the last layer (AutoLaplace(sites='last_layer')) or particles.",
        )


def _of_classes(sampled: Prediction, at_mode: Prediction) -> str | None:
    chosen = at_mode.log_probs.argmax(-1)
    other = sampled.log_probs.argmax(-1)
    if sampled.labels is None:
        right = at_mode.probs.gather(1, chosen[:, None])
        left = at_mode.probs.gather(1, other[:, None])
        if not _is_ahead((right - left)[:, 0], _EXPECTED_ACCURACY):
            return None
        same = float((chosen == other).double().mean())
        return (
            f"{100 * (1 - same):.0f} % of the predicted classes are others than those"
        )
    counts = sampled.labels >= 0
    labels = sampled.labels[counts].to(chosen)
    right, left = chosen[counts] == labels, other[counts] == labels
    nll, best = (
        -p.log_probs[counts].gather(1, labels[:, None])[:, 0]
        for p in (sampled, at_mode)
    )
    if not (
        _is_ahead(right.double() - left.double(), _ACCURACY)
        or _is_ahead((nll - best).double(), _NATS)
    ):
        return None
    return (
        f"the prediction has accuracy {left.double().mean():.3f} and NLL "
        f"{nll.mean():.3f}, against {right.double().mean():.3f} and {best.mean():.3f}"
    )


def _of_reals(sampled: NumberPrediction, at_mode: NumberPrediction) -> str | None:
    if sampled.labels is None:
        shift = (sampled.mean - at_mode.mean).square()
        noise = at_mode.noise_variance
        if not _is_ahead((shift - noise).flatten(), 0.0):
            return None
        moved, scale = shift.mean().sqrt(), noise.mean().sqrt()
        return f"the outcomes' mean is {moved:.3g} (noise {scale:.3g}) from that"
    counts = sampled.labels.isfinite()
    error, best = (
        (p.mean - sampled.labels).square()[counts] for p in (sampled, at_mode)
    )
    gain = float(((1 + _RMSE) ** 2 - 1) * best.mean())
    if not _is_ahead(error - best, gain):
        return None
    return (
        f"the prediction has RMSE {error.mean().sqrt():.3g}, against "
        f"{best.mean().sqrt():.3g}"
    )


def _is_ahead(gains: Tensor, least: float) -> bool:
    """Whether the mean over the data is large, and larger than chance makes it."""
    if len(gains) < 2:
        return False
    gains = gains.double()
    error = gains.std() / len(gains) ** 0.5
    return bool(gains.mean() > torch.clamp(_NUM_ERRORS * error, min=least))
