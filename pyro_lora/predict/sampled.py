"""Predictions of one batch, averaged over draws of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from pyro_lora.likelihood import likelihoods
from pyro_lora.likelihood.batch import Batch
from pyro_lora.likelihood.model_trace import IGNORED
from pyro_lora.likelihood.outcomes import class_log_probs, single_outcomes
from pyro_lora.predict.draws import ModelAtDraws
from pyro_lora.predict.mixture_prediction import MixturePrediction
from pyro_lora.predict.prediction import Prediction
from pyro_lora.predict.regression import RegressionPrediction
from pyro_lora.predict.token_prediction import (
    TokenPrediction,
    Tokens,
    check_tokens,
    chosen_tokens,
    token_labels,
    token_prediction,
)

NumberPrediction = RegressionPrediction | MixturePrediction
AnyPrediction = Prediction | NumberPrediction | TokenPrediction


@torch.no_grad()
def sampled(
    at_draws: ModelAtDraws,
    batch: Batch,
    tokens: Tokens | None,
    keep_draws: bool = False,
) -> AnyPrediction:
    """The prediction of one batch, by its likelihood's type.

    Args:
        at_draws: The model at S draws.
        batch: The model's keyword arguments, without labels; of tokens, with them.
        tokens: Which outcomes of a datum.
        keep_draws: Whether each draw's probabilities stay.

    Returns:
        Without labels, but those of tokens.

    Raises:
        ValueError: If the likelihood has no such outcomes.
    """
    stream = (t.nodes[at_draws.obs_site] for t in at_draws.traces(batch))
    first = next(stream)
    single = single_outcomes(first["fn"])
    classes = likelihoods.of(single.fn).classes
    check_tokens(single, classes, tokens, at_draws.obs_site)
    nodes = chain([first], stream)
    if classes is None:
        return numbers([single_outcomes(node["fn"]).fn for node in nodes])
    if tokens is None:
        log_probs = (class_log_probs(node["fn"]) for node in nodes)
        found = _classes(log_probs, at_draws.num_draws, keep_draws)
    else:
        mask = single.inside[0].to(classes.logits.device)
        of_tokens = _tokens(nodes, mask, at_draws, tokens, keep_draws)
        if isinstance(of_tokens, TokenPrediction):
            return of_tokens
        found = of_tokens
    return replace(found, ordered=classes.cutpoints is not None)


def _classes(chunks: Iterable[Tensor], num_draws: int, keep_draws: bool) -> Prediction:
    kept: list[Tensor] = []

    def keeping() -> Iterator[Tensor]:
        for chunk in chunks:
            kept.append(chunk)
            yield chunk

    log_p, entropy = _averaged(keeping() if keep_draws else chunks, num_draws)
    draws = torch.cat(kept) if keep_draws else None
    return Prediction(log_probs=log_p, aleatoric_entropy=entropy, draw_log_probs=draws)


def _averaged(chunks: Iterable[Tensor], num_draws: int) -> tuple[Tensor, Tensor]:
    """Log of the mean probability (B, C) and the mean entropy (B,) of (S', B, C)."""
    log_sum: Tensor | None = None
    entropy = torch.zeros(())
    for log_p in chunks:
        entropy = entropy.to(log_p) + torch.special.entr(log_p.exp()).sum((0, -1))
        part = log_p.logsumexp(0)
        log_sum = part if log_sum is None else torch.logaddexp(log_sum, part)
    assert log_sum is not None
    return log_sum - math.log(num_draws), entropy / num_draws


def numbers(fns: Sequence[Any], weights: Tensor | None = None) -> NumberPrediction:
    """A mixture of distributions of numbers, in closed form where there is one.

    Args:
        fns: Single outcomes' distributions, one for some draws after the others, each
            of batch shape (S', B), or (S', B, P) of P outputs.
        weights: Of all draws, (S,); None is equal.

    Returns:
        Without labels.
    """
    known = [likelihoods.of(fn) for fn in fns]
    noise = [x.noise for x in known if x.noise is not None]
    if not noise:
        return MixturePrediction(components=[fns], weights=weights)

    def joined(values: list[Tensor]) -> Tensor:
        one = torch.cat(values).double()  # (S, B), or (S, B, P)
        return one[..., 0] if one.ndim == 3 and one.shape[-1] == 1 else one

    return RegressionPrediction(
        loc=joined([x.predictor[..., 0] for x in known]),
        noise_scale=joined([x.scale for x in noise]),
        df=joined([x.df for x in noise if x.df is not None])
        if noise[0].df is not None
        else None,
        weights=weights,
    )


def _tokens(
    nodes: Iterable[dict[str, Any]],
    mask: Tensor,
    at_draws: ModelAtDraws,
    tokens: Tokens,
    keep_draws: bool,
) -> Prediction | TokenPrediction:
    rows, places = chosen_tokens(mask, tokens, at_draws.obs_site)
    labels: Tensor | None = None
    of_texts: list[Tensor] = []

    def chunks() -> Iterator[Tensor]:
        nonlocal labels
        for node in nodes:
            classes = likelihoods.of(single_outcomes(node["fn"]).fn).classes
            assert classes is not None  # check_tokens has seen to it
            log_p = (
                classes.logits[:, rows, places].double().log_softmax(-1)
            )  # (S', M, C)
            if node["is_observed"]:
                labels = token_labels(node, rows, places)
                known = labels.clamp_min(0).expand(log_p.shape[:2])
                chosen = log_p.gather(2, known[..., None])
                chosen = chosen * (labels != IGNORED)[..., None]
                zeros = log_p.new_zeros(len(log_p), len(mask))
                of_texts.append(zeros.index_add(1, rows, chosen[..., 0]))
            yield log_p

    if tokens == "last":
        found = _classes(chunks(), at_draws.num_draws, keep_draws)
        return replace(found, labels=labels)
    log_p, entropy = _averaged(chunks(), at_draws.num_draws)
    texts = None
    if of_texts:
        texts = torch.cat(of_texts).logsumexp(0) - math.log(at_draws.num_draws)
    return token_prediction(log_p, entropy, rows, places, len(mask), labels, texts)
