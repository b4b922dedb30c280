r"""Predicted tokens: one class for each of several outcomes of a datum.

They are the tokens of a text, or the labels of a multi-label classifier, a yes or no
each. M outcomes of N data are one row each, in the order of data and places: of two
texts of two and three tokens that count, say,

    data        0  0  1  1  1
    positions   0  1  0  2  3        the second text's token 1 is masked

All probabilities are kept where there are up to 64 classes. A vocabulary's would be too
many: of those stay the largest, the label's, and the entropies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, NoReturn, Self

import numpy as np
import torch
from torch import Tensor

from pyro_lora.ground.synchronisation import require
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood import likelihoods
from pyro_lora.likelihood.likelihoods import Likelihood
from pyro_lora.likelihood.model_trace import IGNORED
from pyro_lora.likelihood.outcomes import (
    impossible,
    is_possible,
    outcomes_that_count,
    single_outcomes,
)
from pyro_lora.predict.any_prediction import (
    AnyPrediction,
    check_class_names,
    class_columns,
    class_facts,
    joined,
    listed,
    named,
    names_in,
    replaced,
    rows_of,
)
from pyro_lora.predict.metrics import (
    NUM_BINS,
    adaptive_ece,
    resampled,
    selective_metrics,
    with_standard_errors,
)

WhichTokens = Literal["last", "each"]
WhichOutcomes = Literal["last", "each", "labels"]  # "labels": a yes or no for each

_MOST_KEPT = 64  # classes, 512 bytes a token
_OF_TOKENS = dict.fromkeys(
    "data positions predicted confidence total_entropy aleatoric_entropy labels "
    "label_log_probs log_probs".split(),
    0,
)
_DIMS = {**_OF_TOKENS, "text_log_probs": 0}


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class TokenPrediction(AnyPrediction):
    """What is predicted for each of M tokens of N texts, averaged over the posterior.

    ``len(prediction)`` is N, and ``prediction[3]`` a text with all of its tokens.

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
        log_probs: Log of all averaged probabilities, (M, C), nats, where C is at most
            64; else None.
        num_classes: C, or None where nobody said.
        is_binary: Whether each is a yes or no of its own (Bernoulli), so that it's the
            places that have names.
        class_names: Names of the classes, C different ones, which ``predict`` takes
            from the network's config; None: they have none.
        position_names: Names of the places, as of the labels of a multi-label
            classifier; None: they have none.

    Raises:
        ValueError: If names are more or fewer than what they name, or labels are there
            without their probabilities.
    """

    _row: ClassVar[str] = "token"

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
    log_probs: Tensor | None = None
    num_classes: int | None = None
    is_binary: bool = False
    class_names: tuple[str, ...] | None = None
    position_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if (self.labels is None) != (self.label_log_probs is None):
            raise ValueError("labels and label_log_probs come together, or not at all.")
        if self.num_classes is not None:
            check_class_names(self.class_names, self.num_classes)
        names = self.position_names
        if names is not None and self._num_places > len(names):
            raise ValueError(
                f"position_names has {len(names)} names, but there is a position "
                f"{self._num_places - 1}. Give one for each place, 0 and on."
            )

    def __len__(self) -> int:
        """N, the texts."""
        return self.num_data

    @cached_property
    def probs(self) -> Tensor:
        """Probabilities, (M, C), where there are at most 64 classes.

        Raises:
            ValueError: If there are more.
        """
        if self.log_probs is None:
            raise ValueError(
                f"The probabilities of more than {_MOST_KEPT} classes aren't kept for "
                "each token, but confidence and label_log_probs are. Use tokens='last'."
            )
        return self.log_probs.exp().clamp_max(1)

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
        counts = self._labels("metrics") != IGNORED
        every = counts.nonzero()[:, 0]
        if len(every) == 0:
            raise ValueError("metrics got no tokens that count. Check the labels.")
        texts = self.data[every].unique()

        def replicate() -> dict[str, float]:
            _, tokens = self._tokens_of(texts[resampled(len(texts), texts.device)])
            return self._metrics(tokens[counts[tokens]])

        return with_standard_errors(self._metrics(every), num_bootstrap, replicate)

    def _metrics(self, tokens: Tensor) -> dict[str, float]:
        """Of the tokens of an index, (M',)."""
        assert self.labels is not None  # metrics has seen to it
        assert self.label_log_probs is not None
        correct = (self.predicted == self.labels).to(self.confidence)[tokens]
        confidence = self.confidence.clamp_max(1)[tokens]
        nll = -self.label_log_probs[tokens].mean()
        # Where it is used: it loads matplotlib and all its metrics, for seconds.
        from torchmetrics.functional.classification import binary_calibration_error

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

    def columns(self) -> dict[str, np.ndarray]:
        """A table, one row a token: its text and place, then as of classes.

        ``datum``, ``position``, ``predicted``, ``confidence``, a probability for each
        class where these are kept, three entropies (nats) and, where there are labels,
        ``label`` and ``label_log_prob``. Places and classes go by their names.
        """
        columns = {
            "datum": self.data.cpu().numpy(),
            "position": named(self.positions, self.position_names),
            "predicted": named(self.predicted, self.class_names),
            "confidence": self.confidence.cpu().numpy(),
        }
        if self.log_probs is not None:
            columns |= class_columns(self.log_probs, self.class_names)
        for entropy in ("total_entropy", "aleatoric_entropy", "epistemic_entropy"):
            columns[entropy] = getattr(self, entropy).cpu().numpy()
        if self.labels is not None and self.label_log_probs is not None:
            columns["label"] = named(self.labels, self.class_names)
            columns["label_log_prob"] = self.label_log_probs.cpu().numpy()
        return columns

    def with_labels(self, labels: Tensor, place: str = "The prediction") -> NoReturn:
        """Of tokens, not to be had afterwards.

        Raises:
            ValueError: Always: which tokens count is in the labels, which the model has
                to be shown.
        """
        raise ValueError(
            f"{place}: labels of tokens say which of them count, so predict needs them "
            "in its batches."
        )

    def with_names_of(self, networks: Sequence[LiftedNetwork]) -> Self:
        """The same with the names that a network has for its classes, if it has any.

        The outputs of a multi-label classifier are places of a datum, yes or no each.
        """
        if self.num_classes is None:
            return self
        if self.is_binary:
            return replaced(self, position_names=names_in(networks, self._num_places))
        return replaced(self, class_names=names_in(networks, self.num_classes))

    def worse_than(self, at_mode: Self) -> None:
        """None: nobody looks at each token at the mode, too."""

    @property
    def _has_label(self) -> Tensor:
        counts = self._labels("metrics") != IGNORED
        texts = torch.arange(len(self), device=self.data.device)
        return torch.isin(texts, self.data[counts])

    @property
    def _num_places(self) -> int:
        """One more than the last place of a token."""
        return int(self.positions.max()) + 1 if len(self.positions) else 0

    def _tokens_of(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        """For each token of some texts, text by text: the text's place, and its own."""
        texts = texts.to(self.data.device)
        by_text = self.data.argsort(stable=True)
        counts = self.data.bincount(minlength=self.num_data)
        own = counts[texts]
        place = torch.arange(len(texts), device=texts.device).repeat_interleave(own)
        # The j-th token of a text is j after the text's first one.
        j = torch.arange(len(place), device=texts.device) - (own.cumsum(0) - own)[place]
        first = counts.cumsum(0) - counts
        return place, by_text[first[texts][place] + j]

    def _rows(self, rows: Tensor) -> Self:
        place, tokens = self._tokens_of(rows)
        of_texts = self.text_log_probs
        return replaced(
            rows_of(self, tokens, _OF_TOKENS),
            data=place,
            num_data=len(rows),
            text_log_probs=of_texts
            if of_texts is None
            else of_texts[rows.to(of_texts.device)],
        )

    @classmethod
    def _joined(cls, predictions: Sequence[Self]) -> Self:
        starts = np.cumsum([0, *(len(p) for p in predictions)]).tolist()
        moved = [p.data + start for p, start in zip(predictions, starts, strict=False)]
        return joined(predictions, _DIMS, data=torch.cat(moved), num_data=starts[-1])

    def _facts(self) -> dict[str, str]:
        facts = {
            "N": str(len(self)),
            "outcomes": str(len(self.data)),
            **class_facts(self.num_classes, self.class_names),
        }
        if self.position_names is not None:
            facts["positions"] = listed(self.position_names)
        if self.labels is None or self.label_log_probs is None:
            return facts | {"labels": "None"}
        counts = self.labels != IGNORED
        facts["labels"] = str(int(counts.sum()))
        if bool(counts.any()):
            accuracy = (self.predicted == self.labels)[counts].double().mean()
            facts["accuracy"] = f"{float(accuracy):.3f}"
            facts["nll"] = f"{float(-self.label_log_probs[counts].mean()):.3f}"
        return facts


def which_outcomes(
    site: Mapping[str, Any], tokens: WhichTokens | None
) -> WhichOutcomes | None:
    """Which outcomes of a datum are predicted, as was said or as its likelihood says.

    Args:
        site: The likelihood's site.
        tokens: What was said; None: all, where a datum has several.

    Returns:
        ``"labels"`` of several yes-or-no outcomes where nobody said anything; None of
        one class a datum, and of numbers.

    Raises:
        TypeError: If nothing is known of the likelihood.
        ValueError: If it has no such outcomes.
    """
    single, name = single_outcomes(site["fn"]), site["name"]
    fn, event_dims = single.fn, single.event_dims
    likelihood = likelihoods.of(fn)
    # The event of a distribution, such as a multinomial's, is one outcome.
    if event_dims > 1 or (event_dims == 1 and fn.event_shape):
        raise ValueError(
            f"Site {name!r} has {event_dims + len(fn.event_shape)} event dims; predict "
            "is for one outcome a datum, or one row of them (.to_event(1))."
        )
    several = event_dims == 1 and likelihood.classes is not None
    if tokens is not None and not several:
        raise ValueError(
            f"tokens={tokens!r} is for classes with one event dim, those of a text's "
            f"tokens. Site {name!r} is {type(fn).__name__} with "
            f"{event_dims}: leave tokens out."
        )
    if tokens is None and several:
        return "labels" if is_binary(likelihood) else "each"
    return tokens


def is_binary(likelihood: Likelihood) -> bool:
    """Whether an outcome is a yes or no, of one logit, as a Bernoulli's.

    Args:
        likelihood: Of classes.
    """
    assert likelihood.classes is not None
    is_one = likelihood.predictor.shape[-1] == 1
    return is_one and likelihood.classes.cutpoints is None


@dataclass(frozen=True, eq=False)
class ChosenTokens:
    """The outcomes of a batch that are predicted, one row each.

    Attributes:
        rows: Their data, (M,).
        places: Their places in these, (M,).
        num_data: B.
    """

    rows: Tensor
    places: Tensor
    num_data: int


def chosen_tokens(mask: Tensor, which: WhichOutcomes, site: str) -> ChosenTokens:
    """The outcomes asked for.

    Args:
        mask: Which outcomes count, (B, T).
        which: ``"last"``: the last one of each datum; ``"each"``: all; ``"labels"``:
            those that don't count, too.
        site: The likelihood's site.

    Raises:
        ValueError: If a datum has none, with ``"last"``.
    """
    if which != "last":
        every = torch.ones_like(mask) if which == "labels" else mask
        rows, places = every.nonzero(as_tuple=True)
        return ChosenTokens(rows, places, len(mask))
    counted = mask.any(1)

    def error() -> ValueError:
        return ValueError(
            f"Site {site!r}: datum {int((~counted).nonzero()[0])} of a batch has no "
            "token that counts, so no last one. Leave it out, or check its labels and "
            "mask."
        )

    require(counted.all(), error)
    # The largest place that counts: of (1, 1, 0, 1, 0), max(0, 1, 0, 3, 0) = 3.
    last = (torch.arange(mask.shape[1], device=mask.device) * mask).amax(1)
    return ChosenTokens(torch.arange(len(mask), device=mask.device), last, len(mask))


def token_labels(site: Mapping[str, Any], chosen: ChosenTokens) -> Tensor | None:
    """The observed classes, (M,), -100 where they don't count; None if none are.

    Args:
        site: The likelihood's site, whatever dims the draws added before (B, T).
        chosen: Which of them.

    Raises:
        ValueError: If one that counts isn't a class.
    """
    if not site["is_observed"]:
        return None

    def of_tokens(value: Tensor) -> Tensor:
        one = value.reshape(-1, *value.shape[-2:])[0].to(chosen.rows.device)
        return one[chosen.rows, chosen.places]

    fn, value = single_outcomes(site["fn"]).fn, site["value"]
    labels = of_tokens(value)
    counts = of_tokens(outcomes_that_count(site))
    fits = is_possible(fn, value) & (value == value.round())  # no soft labels here
    wrong = counts & ~of_tokens(fits)
    name = site["name"]

    def error() -> ValueError:
        return ValueError(
            f"Site {name!r}: {impossible(fn, labels[wrong][0].item())} Mask tokens by "
            ".mask(...) before .to_event(1)."
        )

    require(~wrong.any(), error)
    return labels.masked_fill(~counts, IGNORED).long()


def token_prediction(
    log_probs: Tensor,
    aleatoric_entropy: Tensor,
    chosen: ChosenTokens,
    labels: Tensor | None,
    text_log_probs: Tensor | None,
    is_binary: bool,
) -> TokenPrediction:
    """Keep of the tokens' probabilities what stays.

    Args:
        log_probs: (M, C), nats.
        aleatoric_entropy: (M,), nats.
        chosen: The tokens.
        labels: (M,), or None.
        text_log_probs: (N,), nats, or None.
        is_binary: Whether each is a yes or no of its own.

    Returns:
        The prediction.
    """
    confidence, predicted = log_probs.max(-1)
    of_labels = None
    if labels is not None:
        of_labels = log_probs.gather(1, labels.clamp_min(0)[:, None])[:, 0]
        of_labels = of_labels.masked_fill(labels == IGNORED, torch.nan)
    num_classes = log_probs.shape[1]
    return TokenPrediction(
        data=chosen.rows,
        positions=chosen.places,
        predicted=predicted,
        confidence=confidence.exp(),
        total_entropy=torch.special.entr(log_probs.exp()).sum(-1),
        aleatoric_entropy=aleatoric_entropy,
        num_data=chosen.num_data,
        labels=labels,
        label_log_probs=of_labels,
        text_log_probs=text_log_probs,
        log_probs=log_probs if num_classes <= _MOST_KEPT else None,
        num_classes=num_classes,
        is_binary=is_binary,
    )
