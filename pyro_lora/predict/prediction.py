"""Predicted class probabilities and how good they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from pyro_lora.ground.settings import check_kind, check_positive, check_word
from pyro_lora.likelihood.model_trace import IGNORED
from pyro_lora.predict.metrics import (
    auroc_of_scores,
    class_metrics,
    ranked_probability_score,
    resampled,
    with_standard_errors,
)
from pyro_lora.predict.tables import data_frame

if TYPE_CHECKING:
    from pandas import DataFrame

MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-2, 1e2
_NUM_BISECTIONS = 60  # halves log(1e4) to below 1e-16


@dataclass(frozen=True, eq=False, kw_only=True)
class Prediction:
    """Class probabilities of N data, averaged over the posterior.

    Attributes:
        log_probs: Log of the averaged probabilities, (N, C), nats.
        aleatoric_entropy: Entropy of each draw's probabilities, averaged over the
            draws, (N,), nats: the doubt that more training data would leave.
        labels: True classes, (N,), integers, -100 where there is none; or None.
        draw_log_probs: Log probabilities under each draw of the weights, (S, N, C),
            nats, where ``predict(keep_draws=True)`` was asked for them. One draw is
            the same weights for all data.
        ordered: Whether the classes are ordered, as those of ``OrderedLogistic``.

    Raises:
        ValueError: If shapes don't fit, there are no data, a log probability is NaN
            or not normalised, or a label is neither -100 nor one of
            0 ... C - 1.

    >>> p = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    >>> entropy = -(p * p.log()).sum(-1)
    >>> labels = torch.tensor([0, 0])
    >>> prediction = Prediction(
    ...     log_probs=p.log(), aleatoric_entropy=entropy, labels=labels
    ... )
    >>> prediction.metrics()["accuracy"]
    0.5
    """

    log_probs: Tensor
    aleatoric_entropy: Tensor
    labels: Tensor | None = None
    draw_log_probs: Tensor | None = None
    ordered: bool = False

    def __post_init__(self) -> None:
        shape = self.log_probs.shape
        if len(shape) != 2 or shape[0] < 1 or shape[1] < 2:
            raise ValueError(
                f"log_probs has shape {tuple(shape)}; expected (N, C) with at least "
                "one datum and two classes."
            )
        if self.aleatoric_entropy.shape != shape[:1]:
            raise ValueError(
                f"aleatoric_entropy has shape {tuple(self.aleatoric_entropy.shape)}; "
                f"expected ({shape[0]},), one value for each row of log_probs."
            )
        draws = self.draw_log_probs
        if draws is not None and (draws.ndim != 3 or draws.shape[1:] != shape):
            raise ValueError(
                f"draw_log_probs has shape {tuple(draws.shape)}; expected (S, N, C) "
                f"with log_probs of shape {tuple(shape)}."
            )
        if not (self.log_probs.double().logsumexp(-1).abs() < 1e-3).all():
            raise ValueError(
                "log_probs has NaN values or rows whose probabilities don't sum to 1. "
                "Pass logits.log_softmax(-1), and check the network's outputs."
            )
        if self.labels is not None:
            self._check_labels(self.labels)

    def _check_labels(self, labels: Tensor) -> None:
        num_data, num_classes = self.log_probs.shape
        if labels.shape != (num_data,):
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}; expected ({num_data},), "
                "one class for each datum."
            )
        wrong = (labels < 0) | (labels >= num_classes) | (labels != labels.long())
        wrong = wrong & (labels != IGNORED)
        if wrong.any():
            raise ValueError(
                f"labels must be classes 0 to {num_classes - 1}, found "
                f"{labels[wrong][0].item()}. A datum without one has {IGNORED}."
            )

    @property
    def label_shape(self) -> tuple[int, ...]:
        """What labels of the data have, (N,)."""
        return tuple(self.log_probs.shape[:1])

    @cached_property
    def probs(self) -> Tensor:
        """Probabilities, (N, C)."""
        # Rounding may end at 1 + 1e-16, which torchmetrics would take for a logit.
        return self.log_probs.exp().clamp_max(1)

    @cached_property
    def total_entropy(self) -> Tensor:
        """Entropy of the averaged probabilities, (N,), nats."""
        return torch.special.entr(self.probs).sum(-1)

    @cached_property
    def epistemic_entropy(self) -> Tensor:
        """Total minus aleatoric entropy, (N,), nats: how far the draws disagree.

        The mutual information between label and weights (Houlsby et al. 2011,
        https://arxiv.org/abs/1112.5745).
        """
        return (self.total_entropy - self.aleatoric_entropy).clamp_min(0)

    def metrics(
        self, *, ood: Prediction | None = None, num_bootstrap: int = 0
    ) -> dict[str, float]:
        r"""Quality against the labels, of the data that have one.

        - ``accuracy``: share of data whose most probable class is the label.
        - ``nll``: mean of :math:`-\log p(y)`, nats.
        - ``ece``: expected calibration error of the predicted class, 15 bins of equal
          width, l1; ``adaptive_ece``: with equally many data in each bin (Nguyen &
          O'Connor 2015); ``classwise_ece``: of every class's probability, averaged over
          the classes (Kull et al. 2019).
        - ``overconfidence``: mean probability of the predicted class minus accuracy,
          the sign of the calibration error; negative where the prediction is
          under-confident.
        - ``brier``: mean over data of :math:`\sum_c (p_c - 1[y = c])^2`, from 0 to 2
          (some divide it by C, or by 2 for two classes).
        - ``selective_accuracy``: accuracy on the 80% of the data with the largest
          probability of the predicted class.
        - ``aurc``: error rate of the n most confident data, averaged over all n: the
          area under the risk-coverage curve (Geifman et al. 2019).
        - ``rps``: of ordered classes, the ranked probability score
          :math:`\sum_{k < C - 1} (P(y \le k) - 1[y \le k])^2`, from 0 to C - 1.
        - ``auroc_total``, ``auroc_epistemic``: with ``ood``, see :func:`auroc`.

        Args:
            ood: Prediction for data out of domain, whose labels aren't looked at.
            num_bootstrap: Resampled data sets from which to estimate the standard error
                of each metric, ``accuracy_se`` and so on: the data vary, the
                posterior's draws don't. Drawn with torch's generator. 0: none.

        Returns:
            Name -> value.

        Raises:
            ValueError: If there are no labels, or ``num_bootstrap`` is 1 or negative.
        """
        known = self.labelled("metrics")
        if ood is not None:
            check_kind("ood", ood, Prediction, "a Prediction of classes")
        return with_standard_errors(
            known._metrics(ood),
            num_bootstrap,
            lambda: known._resampled()._metrics(
                None if ood is None else ood._resampled()
            ),
        )

    def labelled(self, caller: str = "labelled") -> Prediction:
        """The data that have a label.

        Args:
            caller: What needs them, for the error.

        Raises:
            ValueError: If there are none.
        """
        labels = self._labels(caller)
        known = labels != IGNORED
        if bool(known.all()):
            return self
        if not bool(known.any()):
            raise ValueError(
                f"{caller} needs labels, and no datum of this prediction has one that "
                "counts: all are masked or missing."
            )
        return self._at(known.nonzero()[:, 0])

    def _metrics(self, ood: Prediction | None) -> dict[str, float]:
        labels = self._labels("metrics")
        values = class_metrics(self.probs, self.log_probs, labels)
        if self.ordered:
            values["rps"] = ranked_probability_score(self.probs, labels)
        if ood is None:
            return values
        return values | {
            "auroc_total": auroc(self, ood),
            "auroc_epistemic": auroc(self, ood, "epistemic"),
        }

    def _resampled(self) -> Prediction:
        """As many data, drawn with replacement."""
        return self._at(resampled(len(self.log_probs), self.log_probs.device))

    def _at(self, index: Tensor) -> Prediction:
        """The data of an index, (N',), without draws."""
        index, labels = index.to(self.log_probs.device), self.labels
        return Prediction(
            log_probs=self.log_probs[index],
            aleatoric_entropy=self.aleatoric_entropy[index],
            labels=None if labels is None else labels[index.to(labels.device)],
            ordered=self.ordered,
        )

    def to_pandas(self) -> DataFrame:
        """One row a datum: probabilities, the predicted class, entropies, the label.

        Columns ``p_0`` to ``p_{C-1}``, ``predicted``, ``confidence``,
        ``total_entropy``, ``aleatoric_entropy``, ``epistemic_entropy`` (nats) and,
        where there are labels, ``label``.

        Returns:
            A ``pandas.DataFrame`` with the index ``datum``.
        """
        confidence, predicted = self.probs.max(-1)
        columns = {f"p_{c}": p for c, p in enumerate(self.probs.mT)} | {
            "predicted": predicted,
            "confidence": confidence,
            "total_entropy": self.total_entropy,
            "aleatoric_entropy": self.aleatoric_entropy,
            "epistemic_entropy": self.epistemic_entropy,
        }
        if self.labels is not None:
            columns["label"] = self._labels("to_pandas")
        return data_frame(columns, "datum")

    def with_temperature(self, temperature: float) -> Prediction:
        r"""The prediction :math:`\mathrm{softmax}(\log p / T)`.

        A temperature acts on the averaged probabilities, where nothing is left of
        the draws: all entropy of the result counts as aleatoric, none as epistemic.

        Args:
            temperature: T; above 1 makes the prediction less confident.

        Returns:
            A new prediction with the same labels.

        Raises:
            ValueError: If T isn't positive and finite.
        """
        check_positive("temperature", temperature)
        log_probs = (self.log_probs / temperature).log_softmax(-1)
        return Prediction(
            log_probs=log_probs,
            aleatoric_entropy=torch.special.entr(log_probs.exp()).sum(-1),
            labels=self.labels,
            ordered=self.ordered,
        )

    def _labels(self, caller: str) -> Tensor:
        if self.labels is None:
            raise ValueError(
                f"{caller} needs labels, and this prediction has none. Put 'labels' "
                "(what the likelihood observes) into every batch given to predict."
            )
        return self.labels.long()


def concatenated(parts: Sequence[Prediction]) -> Prediction:
    """The data of several predictions, in order.

    Args:
        parts: All with labels, or none.

    Returns:
        One prediction.
    """
    labels = [p.labels for p in parts if p.labels is not None]
    draws = [p.draw_log_probs for p in parts if p.draw_log_probs is not None]
    return Prediction(
        log_probs=torch.cat([p.log_probs for p in parts]),
        aleatoric_entropy=torch.cat([p.aleatoric_entropy for p in parts]),
        labels=torch.cat(labels) if labels else None,
        draw_log_probs=torch.cat(draws, 1) if draws else None,
        ordered=parts[0].ordered,
    )


def fit_temperature(held_out: Prediction) -> float:
    r"""The temperature with the smallest NLL on held-out data (Guo et al. 2017).

    https://arxiv.org/abs/1706.04599. The NLL of :math:`\mathrm{softmax}(\beta \log p)`
    is convex in :math:`\beta = 1 / T`, so its derivative is bisected.

    Args:
        held_out: A prediction of classes with labels (of tokens, with
            ``tokens="last"``), of data that weren't trained on. Data without a label
            don't count.

    Returns:
        T, within 0.01 to 100: at an end of it where the NLL falls beyond (0.01 if
        all held-out data are classified correctly).

    Raises:
        ValueError: If there are no labels, or no classes.

    >>> p = torch.tensor([[0.9, 0.1]] * 4, dtype=torch.float64)  # right 3 times in 4
    >>> labels = torch.tensor([0, 0, 0, 1])
    >>> sure = Prediction(
    ...     log_probs=p.log(), aleatoric_entropy=torch.zeros(4), labels=labels
    ... )
    >>> round(fit_temperature(sure), 3)
    2.0
    """
    if not isinstance(held_out, Prediction):
        raise ValueError(
            f"fit_temperature: held_out must be a Prediction of classes, found a "
            f"{type(held_out).__name__}."
        )
    held_out = held_out.labelled("fit_temperature")
    labels = held_out._labels("fit_temperature")
    # A class of probability 0 has none at any temperature; -inf would become NaN.
    log_probs = held_out.log_probs.double().clamp_min(-1e4)
    chosen = log_probs.gather(1, labels[:, None])

    def slope(log_temperature: float) -> float:
        p = (log_probs * math.exp(-log_temperature)).softmax(-1)
        return float((p * (log_probs - chosen)).sum(-1).mean())

    low, high = math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE)
    for _ in range(_NUM_BISECTIONS):
        middle = (low + high) / 2
        # dNLL/dbeta > 0: beta is too large, so the temperature is too small.
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return math.exp((low + high) / 2)


def auroc(
    in_domain: Prediction,
    out_of_domain: Prediction,
    score: Literal["total", "epistemic"] = "total",
) -> float:
    """Area under the ROC curve for telling out-of-domain data by their entropy.

    Args:
        in_domain: Prediction for data like those trained on.
        out_of_domain: Prediction for other data.
        score: The entropy that should be larger out of domain.

    Returns:
        The probability that a datum out of domain has the larger score than one in
        domain, ties counting half.

    Raises:
        ValueError: If ``score`` is something else.

    >>> def prediction(p):
    ...     probs = torch.tensor([[p, 1 - p]])
    ...     return Prediction(log_probs=probs.log(), aleatoric_entropy=torch.zeros(1))
    >>> auroc(prediction(0.99), prediction(0.6))
    1.0
    """
    check_word("score", score, ("total", "epistemic"))
    for name, given in {"in_domain": in_domain, "out_of_domain": out_of_domain}.items():
        check_kind(name, given, Prediction, "a Prediction of classes")
    inside, outside = (
        p.total_entropy if score == "total" else p.epistemic_entropy
        for p in (in_domain, out_of_domain)
    )
    return auroc_of_scores(inside, outside)
