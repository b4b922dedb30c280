"""Predictions of one batch, averaged over draws of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from pyro_lora.likelihood.model_trace import IGNORED, Batch
from pyro_lora.likelihood.outcome_kinds import (
    Tokens,
    check_outcomes,
    chosen_outcomes,
    likelihood,
    outcome_log_probs,
    outcome_logits,
)
from pyro_lora.likelihood.outcomes import outcomes_that_count
from pyro_lora.predict.draws import ModelAtDraws
from pyro_lora.predict.prediction import Prediction
from pyro_lora.predict.regression import RegressionPrediction
from pyro_lora.predict.token_prediction import TokenPrediction, token_prediction

AnyPrediction = Prediction | RegressionPrediction | TokenPrediction


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
    found = likelihood(first["fn"])
    check_outcomes(found, tokens, at_draws.obs_site)
    nodes = chain([first], stream)
    if found.is_real:
        return _reals(nodes)
    if tokens is None:
        log_probs = (outcome_log_probs(node["fn"]) for node in nodes)
        return _classes(log_probs, at_draws.num_draws, keep_draws)
    mask = found.mask[0].to(outcome_logits(found.fn).device)
    return _tokens(nodes, mask, at_draws, tokens, keep_draws)


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


def _reals(nodes: Iterable[dict[str, Any]]) -> RegressionPrediction:
    fns = [likelihood(node["fn"]).fn for node in nodes]

    def joined(values: list[Tensor]) -> Tensor:
        one = torch.cat(values).double()  # (S, B), or (S, B, P)
        return one[..., 0] if one.ndim == 3 and one.shape[-1] == 1 else one

    is_student = isinstance(fns[0], td.StudentT)
    return RegressionPrediction(
        loc=joined([fn.loc for fn in fns]),
        noise_scale=joined([fn.scale for fn in fns]),
        df=joined([fn.df for fn in fns]) if is_student else None,
    )


def _tokens(
    nodes: Iterable[dict[str, Any]],
    mask: Tensor,
    at_draws: ModelAtDraws,
    tokens: Tokens,
    keep_draws: bool,
) -> Prediction | TokenPrediction:
    rows, places = chosen_outcomes(mask, tokens, at_draws.obs_site)
    labels: Tensor | None = None
    of_texts: list[Tensor] = []

    def chunks() -> Iterator[Tensor]:
        nonlocal labels
        for node in nodes:
            logits = outcome_logits(likelihood(node["fn"]).fn)
            log_p = logits[:, rows, places].double().log_softmax(-1)  # (S', M, C)
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


def token_labels(site: dict[str, Any], rows: Tensor, places: Tensor) -> Tensor:
    """The observed classes, (M,), -100 where they don't count.

    Args:
        site: The likelihood's site, whatever dims the draws added before (B, T).
        rows: Their data, (M,).
        places: Their places, (M,).

    Raises:
        ValueError: If one that counts isn't a class.
    """

    def of_tokens(value: Tensor) -> Tensor:
        one = value.reshape(-1, *value.shape[-2:])[0].to(rows.device)
        return one[rows, places]

    labels = of_tokens(site["value"])
    counts = of_tokens(outcomes_that_count(site))
    num_classes = outcome_logits(likelihood(site["fn"]).fn).shape[-1]
    wrong = counts & ~((labels >= 0) & (labels < num_classes))
    if bool(wrong.any()):
        raise ValueError(
            f"Site {site['name']!r}: labels must be classes 0 to {num_classes - 1}, "
            f"found {labels[wrong][0].item()}. Mask the tokens without one in the "
            "model, by .mask(...) before .to_event(1)."
        )
    return labels.masked_fill(~counts, IGNORED).long()
