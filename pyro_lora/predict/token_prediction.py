"""Predicted tokens: one class for each token of a text, without all probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from pyro_lora.likelihood.model_trace import IGNORED
from pyro_lora.predict.metrics import (
    NUM_BINS,
    adaptive_ece,
    resampled,
    selective_metrics,
    with_standard_errors,
)
from pyro_lora.predict.tables import data_frame

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenPrediction:
    """What is predicted for each of M tokens of N texts, averaged over the posterior.

    A vocabulary's probabilities would be too many to keep: only these numbers stay.

    Attributes:
        data: The text of each token, 0 to N - 1, (M,).
        positions: Its place in the text among the likelihood's outcomes, (M,).
        predicted: The most probable class, (M,).
        confidence: Its probability, (M,).
        total_entropy: Of the averaged probabilities, (M,), nats.
        aleatoric_entropy: Of each draw's, averaged over the draws, (M,), nats.
        num_data: N.
        labels: The observed class, (M,), -100 where it doesn't count; or None.
        label_log_probs: Log of its averaged probability, (M,), nats, NaN where it
            doesn't count; or None.
        text_log_probs: Log of the probability of all labels of a text together, each
            draw's product over the tokens averaged over the draws, (N,), nats, 0 of a
            text without labels; None without labels or draws.
    """

    data: Tensor
    positions: Tensor
    predicted: Tensor
    confidence: Tensor
    total_entropy: Tensor
    aleatoric_entropy: Tensor
    num_data: int
    labels: Tensor | None = None
    label_log_probs: Tensor | None = None
    text_log_probs: Tensor | None = None

    @cached_property
    def epistemic_entropy(self) -> Tensor:
        """Total minus aleatoric entropy, (M,), nats: how far the draws disagree."""
        return (self.total_entropy - self.aleatoric_entropy).clamp_min(0)

    def metrics(self, *, num_bootstrap: int = 0) -> dict[str, float]:
        r"""Quality against the labels, means over the tokens whose label counts.

        - ``accuracy``, ``overconfidence``, ``ece``, ``adaptive_ece``,
          ``selective_accuracy``, ``aurc``: as :meth:`Prediction.metrics`, of tokens.
        - ``nll``: mean of :math:`-\log p(y)`, nats a token; ``perplexity``: its exp.

        Args:
            num_bootstrap: As :meth:`Prediction.metrics`, whole texts resampled: the
                tokens of one aren't independent.

        Returns:
            Name -> value.

        Raises:
            ValueError: If there are no labels or no tokens, or ``num_bootstrap`` is 1
                or negative.
        """
        if self.labels is None or self.label_log_probs is None:
            raise ValueError(
                "metrics needs labels, and this prediction has none. Put 'labels' "
                "into every batch given to predict."
            )
        counts = self.labels != IGNORED
        every = counts.nonzero()[:, 0]
        if len(every) == 0:
            raise ValueError("metrics got no tokens that count. Check the labels.")
        texts = self.data[every].unique()

        def replicate() -> dict[str, float]:
            some = texts[resampled(len(texts), texts.device)]
            of_some = (some[:, None] == self.data) & counts
            _, tokens = of_some.nonzero(as_tuple=True)
            return self._metrics(tokens)

        return with_standard_errors(self._metrics(every), num_bootstrap, replicate)

    def _metrics(self, tokens: Tensor) -> dict[str, float]:
        """Of the tokens of an index, (M',)."""
        assert self.labels is not None  # metrics has seen to it
        assert self.label_log_probs is not None
        correct = (self.predicted == self.labels).to(self.confidence)[tokens]
        confidence = self.confidence.clamp_max(1)[tokens]
        nll = -self.label_log_probs[tokens].mean()
        values = {
            "accuracy": correct.mean(),
            "nll": nll,
            "perplexity": nll.exp(),
            "ece": binary_calibration_error(
                confidence, correct.long(), n_bins=NUM_BINS, norm="l1"
            ),
            "adaptive_ece": adaptive_ece(confidence, correct),
            "overconfidence": confidence.mean() - correct.mean(),
            **selective_metrics(confidence, correct),
        }
        return {name: float(value) for name, value in values.items()}

    def to_pandas(self) -> DataFrame:
        """One row a token: its text and place, the predicted class, entropies, labels.

        Returns:
            A ``pandas.DataFrame`` with the index ``token``.
        """
        columns = {
            "datum": self.data,
            "position": self.positions,
            "predicted": self.predicted,
            "confidence": self.confidence,
            "total_entropy": self.total_entropy,
            "aleatoric_entropy": self.aleatoric_entropy,
            "epistemic_entropy": self.epistemic_entropy,
        }
        if self.labels is not None and self.label_log_probs is not None:
            columns |= {"label": self.labels, "label_log_prob": self.label_log_probs}
        return data_frame(columns, "token")


def token_prediction(
    log_probs: Tensor,
    aleatoric_entropy: Tensor,
    rows: Tensor,
    places: Tensor,
    num_data: int,
    labels: Tensor | None,
    text_log_probs: Tensor | None,
) -> TokenPrediction:
    """Keep of the tokens' probabilities what stays.

    Args:
        log_probs: (M, C), nats.
        aleatoric_entropy: (M,), nats.
        rows: Each token's text, (M,).
        places: Its place, (M,).
        num_data: N.
        labels: (M,), or None.
        text_log_probs: (N,), nats, or None.

    Returns:
        The prediction.
    """
    confidence, predicted = log_probs.max(-1)
    of_labels = None
    if labels is not None:
        of_labels = log_probs.gather(1, labels.clamp_min(0)[:, None])[:, 0]
        of_labels = of_labels.masked_fill(labels == IGNORED, torch.nan)
    return TokenPrediction(
        data=rows,
        positions=places,
        predicted=predicted,
        confidence=confidence.exp(),
        total_entropy=torch.special.entr(log_probs.exp()).sum(-1),
        aleatoric_entropy=aleatoric_entropy,
        num_data=num_data,
        labels=labels,
        label_log_probs=of_labels,
        text_log_probs=text_log_probs,
    )


def concatenated(parts: Sequence[TokenPrediction]) -> TokenPrediction:
    """The texts of several predictions, in order.

    Args:
        parts: All with labels, or none.

    Returns:
        One prediction.
    """
    starts = torch.tensor([0, *(p.num_data for p in parts)]).cumsum(0).tolist()

    def joined(tensors: list[Tensor | None]) -> Tensor | None:
        some = [x for x in tensors if x is not None]
        return torch.cat(some) if some else None

    return TokenPrediction(
        data=torch.cat([p.data + s for p, s in zip(parts, starts, strict=False)]),
        positions=torch.cat([p.positions for p in parts]),
        predicted=torch.cat([p.predicted for p in parts]),
        confidence=torch.cat([p.confidence for p in parts]),
        total_entropy=torch.cat([p.total_entropy for p in parts]),
        aleatoric_entropy=torch.cat([p.aleatoric_entropy for p in parts]),
        num_data=starts[-1],
        labels=joined([p.labels for p in parts]),
        label_log_probs=joined([p.label_log_probs for p in parts]),
        text_log_probs=joined([p.text_log_probs for p in parts]),
    )
