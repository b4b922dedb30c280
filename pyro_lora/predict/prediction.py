"""Predicted class probabilities and how good they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from pyro_lora.ground.settings import check_kind, check_positive, check_word
from pyro_lora.ground.synchronisation import require
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood.model_trace import IGNORED
from pyro_lora.predict.any_prediction import (
    AnyPrediction,
    check_class_names,
    check_labels,
    class_columns,
    class_facts,
    is_ahead,
    joined,
    named,
    names_in,
    replaced,
    rows_of,
)
from pyro_lora.predict.metrics import (
    auroc_of_scores,
    class_metrics,
    ranked_probability_score,
    resampled,
    with_standard_errors,
)

MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-2, 1e2
_NUM_BISECTIONS = 60  # halves log(1e4) to below 1e-16

_DIMS = {"log_probs": 0, "aleatoric_entropy": 0, "labels": 0, "draw_log_probs": 1}

# What the mode must be ahead by: in accuracy, in nats, and in the accuracy that its own
# probabilities promise, where there are no labels. Draws of a posterior over the last
# layer, which are right, stay below.
_ACCURACY, _NATS, _EXPECTED_ACCURACY = 0.05, 0.1, 0.15


def _not_normalised() -> ValueError:
    return ValueError(
        "log_probs has NaN values or rows whose probabilities don't sum to 1. "
        "Pass logits.log_softmax(-1), and check the network's outputs."
    )


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Prediction(AnyPrediction):
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
        class_names: Names of the classes, C different ones; None: they have none.
            ``predict`` takes them from the network's ``config.id2label``, if somebody
            has set it; ``dataclasses.replace(prediction, class_names=...)`` sets
            others.

    Raises:
        ValueError: If shapes don't fit, there are no data, a log probability is NaN
            or not normalised, a label is neither -100 nor one of 0 ... C - 1, or the
            names are more or fewer than the classes.

    >>> p = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    >>> entropy = -(p * p.log()).sum(-1)
    >>> labels = torch.tensor([0, 0])
    >>> prediction = Prediction(
    ...     log_probs=p.log(), aleatoric_entropy=entropy, labels=labels
    ... )
    >>> prediction.metrics()["accuracy"]
    0.5
    >>> prediction[:1]
    Prediction(N=1, C=2, labels=1, accuracy=1.000, nll=0.105)
    """

    log_probs: Tensor
    aleatoric_entropy: Tensor
    labels: Tensor | None = None
    draw_log_probs: Tensor | None = None
    ordered: bool = False
    class_names: tuple[str, ...] | None = None

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
        sums = self.log_probs.double().logsumexp(-1)
        require((sums.abs() < 1e-3).all(), _not_normalised)
        if self.labels is not None:
            self._check_labels(self.labels)
        check_class_names(self.class_names, shape[1])

    def _check_labels(self, labels: Tensor) -> None:
        num_data, num_classes = self.log_probs.shape
        if labels.shape != (num_data,):
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}; expected ({num_data},), "
                "one class for each datum."
            )
        wrong = (labels < 0) | (labels >= num_classes) | (labels != labels.long())
        wrong = wrong & (labels != IGNORED)

        def error() -> ValueError:
            return ValueError(
                f"labels must be classes 0 to {num_classes - 1}, found "
                f"{labels[wrong][0].item()}. A datum without one has {IGNORED}; a "
                "soft label has to be rounded, or left out when predicting."
            )

        require(~wrong.any(), error)

    @property
    def num_classes(self) -> int:
        """C."""
        return self.log_probs.shape[1]

    def __len__(self) -> int:
        """N."""
        return self.log_probs.shape[0]

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
        if ood is not None:
            check_kind("ood", ood, Prediction, "a Prediction of classes")
            ood = replaced(ood, draw_log_probs=None)
        labelled = replaced(self, draw_log_probs=None).labelled("metrics")

        def replicate() -> dict[str, float]:
            own = labelled._resampled()
            return own._metrics(None if ood is None else ood._resampled())

        return with_standard_errors(labelled._metrics(ood), num_bootstrap, replicate)

    @property
    def _has_label(self) -> Tensor:
        return self._labels("metrics") != IGNORED

    def _metrics(self, ood: Prediction | None) -> dict[str, float]:
        labels = self._labels("metrics").long()
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
        return self._rows(resampled(len(self), self.log_probs.device))

    def columns(self) -> dict[str, np.ndarray]:
        """A table, one row a datum: class, probabilities, entropies, the label.

        ``predicted``, ``confidence``, a probability for each class, ``total_entropy``,
        ``aleatoric_entropy``, ``epistemic_entropy`` (nats) and, where there are labels,
        ``label``. Classes go by their ``class_names``, else by their numbers, from
        ``p_0`` on.

        >>> p = torch.tensor([[0.9, 0.1]])
        >>> prediction = Prediction(
        ...     log_probs=p.log(),
        ...     aleatoric_entropy=torch.zeros(1),
        ...     class_names=("negative", "positive"),
        ... )
        >>> [*prediction.columns()][:4]
        ['predicted', 'confidence', 'p_negative', 'p_positive']
        """
        confidence, predicted = self.probs.max(-1)
        columns = {
            "predicted": named(predicted, self.class_names),
            "confidence": confidence.cpu().numpy(),
            **class_columns(self.log_probs, self.class_names),
        }
        for entropy in ("total_entropy", "aleatoric_entropy", "epistemic_entropy"):
            columns[entropy] = getattr(self, entropy).cpu().numpy()
        if self.labels is not None:
            columns["label"] = named(self.labels.long(), self.class_names)
        return columns

    def with_labels(self, labels: Tensor, place: str = "The prediction") -> Self:
        """The same prediction with the true classes of its data.

        Args:
            labels: (N,), whole numbers, -100 where there is none.
            place: What the data are, for the error.

        Raises:
            ValueError: If they are something else.
        """
        check_labels(labels, tuple(self.log_probs.shape[:1]), place)
        labels = labels.to(self.log_probs.device)
        # Of what is no whole number the error says so.
        is_whole = not labels.is_floating_point() or bool(
            (labels.long() == labels).all()
        )
        return replaced(self, labels=labels.long() if is_whole else labels)

    def with_names_of(self, networks: Sequence[LiftedNetwork]) -> Self:
        """The same with the names that a network has for its classes, if it has any."""
        return replaced(self, class_names=names_in(networks, self.num_classes))

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
        # log p are logits, up to a shift of all, which a softmax doesn't see.
        log_probs = (self.log_probs / temperature).log_softmax(-1)
        return replaced(
            self,
            log_probs=log_probs,
            aleatoric_entropy=torch.special.entr(log_probs.exp()).sum(-1),
            draw_log_probs=None,
        )

    def worse_than(self, at_mode: Self) -> str | None:
        """By accuracy or NLL; without labels, where it answers something else."""
        of_mode = at_mode.log_probs.argmax(-1)
        own = self.log_probs.argmax(-1)
        if self.labels is None:
            # By the mode's own probabilities: how much accuracy its classes promise.
            right = at_mode.probs.gather(1, of_mode[:, None])
            left = at_mode.probs.gather(1, own[:, None])
            if not is_ahead((right - left)[:, 0], _EXPECTED_ACCURACY):
                return None
            same = float((of_mode == own).double().mean())
            return (
                f"{100 * (1 - same):.0f} % of the predicted classes are others than "
                "those"
            )
        counts = self.labels >= 0
        labels = self.labels[counts].to(of_mode)
        right, left = of_mode[counts] == labels, own[counts] == labels
        nll, best = (
            -p.log_probs[counts].gather(1, labels[:, None])[:, 0]
            for p in (self, at_mode)
        )
        if not (
            is_ahead(right.double() - left.double(), _ACCURACY)
            or is_ahead((nll - best).double(), _NATS)
        ):
            return None
        return (
            f"the prediction has accuracy {left.double().mean():.3f} and NLL "
            f"{nll.mean():.3f}, against {right.double().mean():.3f} and "
            f"{best.mean():.3f}"
        )

    def _rows(self, rows: Tensor) -> Self:
        return rows_of(self, rows, _DIMS)

    @classmethod
    def _joined(cls, predictions: Sequence[Self]) -> Self:
        return joined(predictions, _DIMS)

    def _facts(self) -> dict[str, str]:
        facts = {"N": str(len(self)), **class_facts(self.num_classes, self.class_names)}
        if self.draw_log_probs is not None:
            facts["S"] = str(len(self.draw_log_probs))
        if self.labels is None:
            return facts | {"labels": "None"}
        counts = self.labels != IGNORED
        facts["labels"] = str(int(counts.sum()))
        if bool(counts.any()):
            log_probs, labels = self.log_probs[counts], self.labels[counts].long()
            accuracy = (log_probs.argmax(-1) == labels).double().mean()
            facts["accuracy"] = f"{float(accuracy):.3f}"
            facts["nll"] = f"{float(nll_loss(log_probs, labels)):.3f}"
        return facts


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
        all held-out data are classified correctly), and 1 where it's the same at all
        of them, as of uniform predictions.

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
    labels = held_out._labels("fit_temperature").long()
    # A class of probability 0 has none at any temperature; -inf would become NaN.
    log_probs = held_out.log_probs.double().clamp_min(-1e4)
    chosen = log_probs.gather(1, labels[:, None])

    # With q = softmax(β log p), dNLL/dβ = E[Σ_c q_c log p_c - log p_y].
    def slope(log_temperature: float) -> float:
        q = (log_probs * math.exp(-log_temperature)).softmax(-1)
        return float((q * (log_probs - chosen)).sum(-1).mean())

    low, high = math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE)
    if slope(low) == slope(high) == 0:
        return 1.0
    for _ in range(_NUM_BISECTIONS):
        middle = (low + high) / 2
        # dNLL/dbeta > 0: beta is too large, so the temperature is too small.
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return math.exp((low + high) / 2)


def auroc(
    in_domain: Prediction | Tensor,
    out_of_domain: Prediction | Tensor,
    score: Literal["total", "epistemic"] = "total",
) -> float:
    """Area under the ROC curve for telling out-of-domain data by a score.

    Args:
        in_domain: Prediction for data like those trained on; or a score of each datum,
            (N,), such as a distance.
        out_of_domain: The same for other data.
        score: Of predictions, the entropy that should be larger out of domain.

    Returns:
        The probability that a datum out of domain has the larger score than one in
        domain, ties counting half.

    Raises:
        TypeError: If one is a prediction and the other isn't.
        ValueError: If ``score`` is something else, or scores aren't numbers (N,).

    >>> def prediction(p):
    ...     probs = torch.tensor([[p, 1 - p]])
    ...     return Prediction(log_probs=probs.log(), aleatoric_entropy=torch.zeros(1))
    >>> auroc(prediction(0.99), prediction(0.6))
    1.0
    >>> auroc(torch.tensor([0.9, 1.1]), torch.tensor([1.0, 3.0]))
    0.75
    """
    check_word("score", score, ("total", "epistemic"))
    if isinstance(in_domain, Tensor) is not isinstance(out_of_domain, Tensor):
        raise TypeError(
            "in_domain and out_of_domain must be two predictions, or scores of both; "
            f"found {type(in_domain).__name__} and {type(out_of_domain).__name__}."
        )
    inside = _scores("in_domain", in_domain, score)
    outside = _scores("out_of_domain", out_of_domain, score)
    return auroc_of_scores(inside, outside)


def _scores(name: str, given: Prediction | Tensor, score: str) -> Tensor:
    """Of each datum, (N,), the larger the more foreign.

    Raises:
        ValueError: If they aren't numbers of N data.
    """
    if not isinstance(given, Tensor):
        check_kind(name, given, Prediction, "a Prediction of classes, or scores (N,)")
        return given.total_entropy if score == "total" else given.epistemic_entropy
    if given.ndim != 1 or not len(given) or given.is_complex() or given.isnan().any():
        raise ValueError(
            f"{name} should be one score a datum, real numbers (N,) without NaN, found "
            f"{given.dtype} of shape {tuple(given.shape)}."
        )
    return given
