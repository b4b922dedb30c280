"""Predicted tokens: one class for each token of a text, without all probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from pyro_lora.likelihood.likelihoods import Classes
from pyro_lora.likelihood.model_trace import IGNORED
from pyro_lora.likelihood.outcomes import (
    SingleOutcomes,
    impossible,
    is_possible,
    outcomes_that_count,
    single_outcomes,
)
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


Tokens = Literal["last", "each"]


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
                "(what the likelihood observes) into every batch given to predict."
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


def check_tokens(
    single: SingleOutcomes, classes: Classes | None, tokens: Tokens | None, site: str
) -> None:
    """Check that ``tokens`` is given where a datum has several classes, and only there.

    Args:
        single: The likelihood without masks and event dims.
        classes: Of its outcomes; None where they are numbers.
        tokens: What was given.
        site: The likelihood's site.

    Raises:
        ValueError: If it isn't so.
    """
    if tokens not in (None, "last", "each"):
        raise ValueError(f"tokens must be 'last', 'each' or None, found {tokens!r}.")
    fn, event_dims = single.fn, single.event_dims
    # The event of a distribution, such as a multinomial's, is one outcome.
    if event_dims > 1 or (event_dims == 1 and fn.event_shape):
        raise ValueError(
            f"Site {site!r} has {event_dims + len(fn.event_shape)} event dims; predict "
            "is for one outcome a datum, or one row of them (.to_event(1))."
        )
    if tokens is not None and (event_dims == 0 or classes is None):
        raise ValueError(
            f"tokens={tokens!r} is for classes with one event dim, those of a text's "
            f"tokens. Site {site!r} is {type(fn).__name__} with "
            f"{event_dims}: leave tokens out."
        )
    if tokens is None and event_dims == 1 and classes is not None:
        raise ValueError(
            f"Site {site!r} has event shape {tuple(fn.batch_shape[-1:])}: "
            "several outcomes, one for each token perhaps, not one class a datum. Say "
            "which by tokens='last' or tokens='each', or draw outcomes by "
            "pyro.infer.Predictive."
        )


def chosen_tokens(mask: Tensor, tokens: Tokens, site: str) -> tuple[Tensor, Tensor]:
    """Data and positions of the outcomes asked for, both (M,).

    Args:
        mask: Which outcomes count, (B, T).
        tokens: ``"last"``: the last one of each datum; ``"each"``: all.
        site: The likelihood's site.

    Raises:
        ValueError: If a datum has none, with ``"last"``.
    """
    if tokens == "each":
        rows, places = mask.nonzero(as_tuple=True)
        return rows, places
    empty = (~mask.any(1)).nonzero()
    if len(empty):
        raise ValueError(
            f"Site {site!r}: datum {int(empty[0])} of a batch has no token that "
            "counts, so no last one. Leave it out, or check its labels and mask."
        )
    last = (torch.arange(mask.shape[1], device=mask.device) * mask).amax(1)
    return torch.arange(len(mask), device=mask.device), last


def token_labels(site: Mapping[str, Any], rows: Tensor, places: Tensor) -> Tensor:
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

    fn, value = single_outcomes(site["fn"]).fn, site["value"]
    labels = of_tokens(value)
    counts = of_tokens(outcomes_that_count(site))
    fits = is_possible(fn, value) & (value == value.round())  # no soft labels here
    wrong = counts & ~of_tokens(fits)
    if bool(wrong.any()):
        raise ValueError(
            f"Site {site['name']!r}: {impossible(fn, labels[wrong][0].item())} Mask "
            "tokens by .mask(...) before .to_event(1)."
        )
    return labels.masked_fill(~counts, IGNORED).long()


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
