r"""Predicted labels of a datum, several of which may hold: a yes or no for each.

Of P labels the likelihood is a Bernoulli each, independent given the weights, so that N
data are N P questions of two answers. As ``pairs`` they are one ``Prediction``, which
knows the rest: of two data and the labels (toxic, rude), say,

    probs   .9  .2        pairs.probs   .1 .9     datum 0: toxic?
            .4  .1                      .8 .2     datum 0: rude?
                                        .6 .4     datum 1: toxic?
                                        .9 .1     datum 1: rude?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from torch import Tensor

from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood.model_trace import IGNORED
from pyro_lora.predict.any_prediction import (
    AnyPrediction,
    check_class_names,
    check_labels,
    class_facts,
    joined,
    names_in,
    replaced,
    rows_of,
)
from pyro_lora.predict.metrics import f1_scores, resampled, with_standard_errors
from pyro_lora.predict.prediction import Prediction

_DIMS = {"log_probs": 0, "aleatoric_entropy": 0, "labels": 0}
_ANSWERS = 2  # no and yes


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class MultiLabelPrediction(AnyPrediction):
    """Probabilities of each of P labels for N data, averaged over the posterior.

    Attributes:
        log_probs: Log of the averaged probabilities of no and yes, (N, P, 2), nats.
        aleatoric_entropy: Entropy of each draw's answer, averaged over the draws,
            (N, P), nats: the doubt that more training data would leave.
        labels: Which hold, (N, P), 0 or 1, -100 where nobody knows; or None.
        class_names: Names of the labels, P different ones, which ``predict`` takes from
            the network's ``config.id2label``; None: they have none.

    Raises:
        ValueError: If shapes don't fit, there are no data, a log probability is NaN or
            not normalised, a label is something else, or the names are more or fewer.

    >>> import torch
    >>> p = torch.tensor([[0.9, 0.2], [0.4, 0.1]])
    >>> prediction = MultiLabelPrediction(
    ...     log_probs=torch.stack([1 - p, p], -1).log(),
    ...     aleatoric_entropy=torch.zeros(2, 2),
    ...     labels=torch.tensor([[1, 0], [1, 0]]),
    ...     class_names=("toxic", "rude"),
    ... )
    >>> prediction.predicted.tolist()
    [[True, False], [False, False]]
    >>> prediction.metrics()["exact_match"]
    0.5
    """

    log_probs: Tensor
    aleatoric_entropy: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        shape = self.log_probs.shape
        if len(shape) != 3 or shape[-1] != _ANSWERS or 0 in shape:
            raise ValueError(
                f"log_probs has shape {tuple(shape)}; expected (N, P, 2), of no and "
                "yes, with at least one datum and one label."
            )
        for name in ("aleatoric_entropy", "labels"):
            value = getattr(self, name)
            if value is not None and value.shape != shape[:-1]:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}; expected "
                    f"{tuple(shape[:-1])}, one value for each label of each datum."
                )
        check_class_names(self.class_names, shape[1])
        self.pairs  # noqa: B018  # which looks at the values

    @cached_property
    def pairs(self) -> Prediction:
        """The N P questions, datum by datum, as one prediction of two classes.

        For all that is said of classes: ``fit_temperature(prediction.pairs)``.
        """
        return Prediction(
            log_probs=self.log_probs.flatten(0, 1),
            aleatoric_entropy=self.aleatoric_entropy.flatten(),
            labels=None if self.labels is None else self.labels.flatten(),
        )

    @property
    def num_classes(self) -> int:
        """2: each label holds or doesn't."""
        return _ANSWERS

    def __len__(self) -> int:
        """N."""
        return self.log_probs.shape[0]

    @cached_property
    def probs(self) -> Tensor:
        """Probability that each label holds, (N, P)."""
        return self.log_probs[..., 1].exp().clamp_max(1)

    @cached_property
    def predicted(self) -> Tensor:
        """Which labels are more likely than not, (N, P), booleans."""
        return self.log_probs[..., 1] > self.log_probs[..., 0]

    @cached_property
    def total_entropy(self) -> Tensor:
        """Entropy of each averaged answer, (N, P), nats."""
        return self.pairs.total_entropy.view_as(self.probs)

    @cached_property
    def epistemic_entropy(self) -> Tensor:
        """Total minus aleatoric entropy, (N, P), nats: how far the draws disagree."""
        return self.pairs.epistemic_entropy.view_as(self.probs)

    def metrics(self, *, num_bootstrap: int = 0) -> dict[str, float]:
        r"""Quality against the labels that are known.

        Those of :meth:`Prediction.metrics` are of ``pairs``, a mean over all labels of
        all data: ``accuracy`` is the share of right answers, ``nll`` nats a label.

        - ``exact_match``: share of the data all of whose labels are right.
        - ``f1_micro``, ``f1_macro``: the harmonic mean of precision and recall, of all
          labels together; and averaged over the labels, 0 of one that neither holds
          nor is predicted.

        Args:
            num_bootstrap: As :meth:`Prediction.metrics`, whole data resampled.

        Returns:
            Name -> value.

        Raises:
            ValueError: If there are no labels, or ``num_bootstrap`` is 1 or negative.
        """
        labelled = self.labelled("metrics")

        def replicate() -> dict[str, float]:
            rows = resampled(len(labelled), labelled.log_probs.device)
            return labelled._rows(rows)._metrics()

        return with_standard_errors(labelled._metrics(), num_bootstrap, replicate)

    def _metrics(self) -> dict[str, float]:
        labels = self._labels("metrics").long()
        unknown = labels == IGNORED
        right = (self.predicted == labels.bool()) | unknown
        values = self.pairs.metrics()
        values["exact_match"] = float(right.all(1).double().mean())
        values["f1_micro"], values["f1_macro"] = f1_scores(self.predicted, labels)
        return values

    def columns(self) -> dict[str, np.ndarray]:
        """A table, one row a datum: labels, probabilities, entropies.

        ``predicted``, a tuple of the labels that are more likely than not;
        ``confidence``, the probability of the least certain answer; ``p_`` and a
        label's name, the probability that it holds, for each; ``total_entropy``,
        ``aleatoric_entropy``, ``epistemic_entropy`` (nats), added up over the labels;
        and, where there are labels, ``label``, a tuple of those that hold. Labels go
        by their ``class_names``, else by their numbers, from ``p_0`` on.
        """
        names = self.class_names or range(self.log_probs.shape[1])
        least_sure = self.log_probs.amax(-1).amin(-1).exp().clamp_max(1)
        columns = {
            "predicted": _names_where(self.predicted, names),
            "confidence": least_sure.cpu().numpy(),
        }
        for name, p in zip(names, self.probs.mT, strict=True):
            columns[f"p_{name}"] = p.cpu().numpy()
        for entropy in ("total_entropy", "aleatoric_entropy", "epistemic_entropy"):
            columns[entropy] = getattr(self, entropy).sum(-1).cpu().numpy()
        if self.labels is not None:
            columns["label"] = _names_where(self.labels == 1, names)
        return columns

    def with_labels(self, labels: Tensor, place: str = "The prediction") -> Self:
        """The same prediction with the labels that hold.

        Args:
            labels: (N, P), 0 or 1, -100 where nobody knows.
            place: What the data are, for the error.

        Raises:
            ValueError: If they are something else.
        """
        check_labels(labels, tuple(self.probs.shape), place)
        labels = labels.to(self.log_probs.device)
        whole = labels.long()
        is_whole = bool((whole == labels).all())
        return replaced(self, labels=whole if is_whole else labels)

    def with_names_of(self, networks: Sequence[LiftedNetwork]) -> Self:
        """The same with the names that a network has for its labels, if it has any."""
        return replaced(self, class_names=names_in(networks, self.log_probs.shape[1]))

    def worse_than(self, at_mode: Self) -> str | None:
        """By the answers, as of classes."""
        return self.pairs.worse_than(at_mode.pairs)

    @property
    def _has_label(self) -> Tensor:
        return (self._labels("metrics") != IGNORED).any(1)

    def _rows(self, rows: Tensor) -> Self:
        return rows_of(self, rows, _DIMS)

    @classmethod
    def _joined(cls, predictions: Sequence[Self]) -> Self:
        numbers = {p.log_probs.shape[1] for p in predictions}
        if len(numbers) > 1:
            raise ValueError(
                f"The data have {sorted(numbers)} outcomes each, expected as many "
                "labels for all. If they are tokens, a yes or no each, say "
                "predict(..., tokens='each')."
            )
        return joined(predictions, _DIMS)

    def _facts(self) -> dict[str, str]:
        facts = {
            "N": str(len(self)),
            "P": str(self.log_probs.shape[1]),
            **class_facts(None, self.class_names),
        }
        return facts | {
            name: fact
            for name, fact in self.pairs._facts().items()
            if name not in ("N", "C")
        }


def multi_label_prediction(
    log_probs: Tensor, aleatoric_entropy: Tensor, num_data: int
) -> MultiLabelPrediction:
    """The prediction of N data of their answers, one after the other.

    Args:
        log_probs: (N P, 2), nats.
        aleatoric_entropy: (N P,), nats.
        num_data: N.
    """
    return MultiLabelPrediction(
        log_probs=log_probs.reshape(num_data, -1, _ANSWERS),
        aleatoric_entropy=aleatoric_entropy.reshape(num_data, -1),
    )


def _names_where(holds: Tensor, names: Sequence[str] | range) -> np.ndarray:
    """The names of the labels that hold, a tuple for each datum, (N,)."""
    rows = np.empty(len(holds), dtype=object)
    for index, row in enumerate(holds.tolist()):
        rows[index] = tuple(n for n, one in zip(names, row, strict=True) if one)
    return rows
