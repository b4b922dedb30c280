"""Posterior -> predictions, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_lora.curvature.gaussian_logits import GaussianLogits, class_log_probs
from pyro_lora.lifting.model_trace import Batch, Model
from pyro_lora.predict import prediction, regression, token_prediction
from pyro_lora.predict.draws import (
    DRAWS_AT_ONCE,
    LORA_POSTERIORS,
    Guide,
    ModelAtDraws,
    draw_weights,
    model_at_draws,
    without_labels,
)
from pyro_lora.predict.dropout import DropoutPosterior
from pyro_lora.predict.linearized import check_linearizable, linearized
from pyro_lora.predict.outcomes import Tokens
from pyro_lora.predict.prediction import Prediction
from pyro_lora.predict.regression import RegressionPrediction
from pyro_lora.predict.sampled import sampled
from pyro_lora.predict.token_prediction import TokenPrediction

DEFAULT_NUM_SAMPLES = 64  # the Monte-Carlo sd of a probability is then at most .06


def predict(
    model: Model,
    posterior: Guide,
    batches: Iterable[Batch],
    *,
    method: Literal["sample", "linearized"] = "sample",
    num_samples: int | None = None,
    chunk_size: int = DRAWS_AT_ONCE,
    integral: Callable[[GaussianLogits], Tensor] = class_log_probs,
    tokens: Tokens | None = None,
    obs_site: str | None = None,
    labels: str = "labels",
    keep_draws: bool = False,
    progress_bar: bool = False,
) -> Any:
    r"""Class probabilities, or real outcomes, averaged over a posterior.

    ``"sample"``: :math:`p(y | x) = \frac1S \sum_s p(y | x, w_s)` with one set of draws
    for all data. ``"linearized"``: the network linearised in the weights around the
    mode, so that the logits are Gaussian, and integrated exactly (Immer et al. 2021,
    https://arxiv.org/abs/2008.08400).

    By the likelihood's type the result is a :class:`Prediction` (Categorical or
    Bernoulli), a :class:`RegressionPrediction` (Normal or, by draws, StudentT; several
    outputs by ``.to_event(1)``), or with ``tokens="each"`` a :class:`TokenPrediction`.

    Dropout is off, but for :func:`mc_dropout`, and nothing is trained. Batches are
    streamed: only N rows of numbers stay. Labels are kept for the metrics and hidden
    from the model, unless there are ``tokens``: which of them count is then in the
    labels. Draws come from torch's generator before the first batch runs, so that a
    seed decides them whatever the batches' size; but for :func:`mc_dropout`, whose
    masks are drawn as the batches go by and depend on it and ``chunk_size``.

    Args:
        model: The Pyro model; its labels come in as ``labels``, None here.
        posterior: Any Pyro guide for the model, with ``"sample"``; a
            ``LaplacePosterior`` or a mixture of them, with ``"linearized"``.
        batches: Mappings of model keyword arguments.
        method: ``"sample"`` or ``"linearized"``.
        num_samples: Draws S; None is every particle once, or 64 where there are
            none. ``"linearized"`` has a use for it only to keep draws.
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
        labels: The model's argument with that site's outcomes.
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
            or the posterior doesn't fit the model or the method.
    """
    if method not in ("sample", "linearized"):
        raise ValueError(f"method must be 'sample' or 'linearized', found {method!r}.")
    if keep_draws and (
        tokens == "each" or (method == "linearized" and tokens is not None)
    ):
        raise ValueError(
            "keep_draws is for one class a datum: with tokens, method='sample' and "
            "tokens='last'."
        )
    if isinstance(posterior, LORA_POSTERIORS | DropoutPosterior):
        obs_site = obs_site or posterior.obs_site
    if method == "linearized":
        check_linearizable(posterior, obs_site)
    at_draws: ModelAtDraws | None = None
    parts: list[Any] = []
    outcomes: list[Any] = []
    for batch in tqdm(batches, desc="Predict", disable=not progress_bar):
        if not isinstance(batch, Mapping):
            raise ValueError(
                "batches must be a list, or loader, of mappings of the model's keyword "
                f"arguments, found a {type(batch).__name__} in it. Put a single batch "
                "into a list."
            )
        shown = without_labels(batch, labels) if tokens is None else batch
        if method == "linearized":
            if keep_draws and parts:
                raise ValueError(
                    "keep_draws with method='linearized' needs all data in one batch, "
                    "whose joint Gaussian it draws from; found a second batch."
                )
            kept = (num_samples or DEFAULT_NUM_SAMPLES) if keep_draws else 0
            part = linearized(posterior, model, shown, integral, obs_site, tokens, kept)
        else:
            if at_draws is None:
                weights = draw_weights(
                    posterior, num_samples, DEFAULT_NUM_SAMPLES, batch
                )
                dropout = isinstance(posterior, DropoutPosterior)
                at_draws = model_at_draws(
                    model, weights, shown, obs_site, chunk_size, dropout
                )
            part = sampled(at_draws, shown, tokens, keep_draws)
        parts.append(part)
        outcomes.append(batch.get(labels) if tokens is None else part.labels)
    if not parts:
        raise ValueError("predict got no batches. Is the iterable used up already?")
    _check_all_or_none(outcomes, labels)
    found = _concatenated(parts)
    if tokens is not None or outcomes[0] is None:
        return found
    return replace(found, labels=_joined(outcomes, found))


def _concatenated(
    parts: Sequence[Any],
) -> Prediction | RegressionPrediction | TokenPrediction:
    if isinstance(parts[0], Prediction):
        return prediction.concatenated(parts)
    if isinstance(parts[0], RegressionPrediction):
        return regression.concatenated(parts)
    return token_prediction.concatenated(parts)


def _check_all_or_none(labels: Sequence[Any], name: str) -> None:
    missing = [index for index, value in enumerate(labels) if value is None]
    if missing and len(missing) < len(labels):
        raise ValueError(
            f"Batch {missing[0]} has no {name!r}, but others have. Give all batches "
            "labels, or none."
        )


def _joined(labels: Sequence[Any], found: Any) -> Tensor:
    joined = torch.cat([torch.as_tensor(value) for value in labels])
    if isinstance(found, RegressionPrediction):
        return joined.to(found.loc).reshape(found.loc.shape[1:])
    joined = joined.to(found.log_probs.device)
    whole = joined.long()
    return whole if bool((whole == joined).all()) else joined
