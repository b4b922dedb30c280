"""Quality of class probabilities against labels, as functions of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import nll_loss, one_hot

from pyro_lora.ground.settings import check_count

NUM_BINS = 15  # the field's usual number for the calibration error
COVERAGE = 0.8  # share of the data that selective accuracy keeps


def class_metrics(probs: Tensor, log_probs: Tensor, labels: Tensor) -> dict[str, float]:
    """All metrics of ``Prediction.metrics``, which says what they mean.

    Args:
        probs: (N, C).
        log_probs: Their logarithms, (N, C), nats.
        labels: (N,), integers.

    Returns:
        Name -> value.
    """
    # Where it is used: it loads matplotlib and all its metrics, for seconds.
    from torchmetrics.functional.classification import multiclass_calibration_error

    num_classes = probs.shape[1]
    confidence, predicted = probs.max(-1)
    correct = (predicted == labels).to(probs)
    ece = multiclass_calibration_error(
        probs, labels, num_classes=num_classes, n_bins=NUM_BINS, norm="l1"
    )
    values = {
        "accuracy": correct.mean(),  # torchmetrics' would be rounded to float32
        "nll": nll_loss(log_probs, labels),
        "ece": ece,
        "classwise_ece": classwise_ece(probs, labels),
        "adaptive_ece": adaptive_ece(confidence, correct),
        "overconfidence": confidence.mean() - correct.mean(),
        "brier": (probs - one_hot(labels, num_classes)).square().sum(-1).mean(),
        **selective_metrics(confidence, correct),
    }
    return {name: float(value) for name, value in values.items()}


def ranked_probability_score(probs: Tensor, labels: Tensor) -> float:
    r"""Squared error of the distribution function of ordered classes, mean over data.

    :math:`\frac1N \sum_n \sum_{k < C - 1} (P_n(y \le k) - 1[y_n \le k])^2`: to be one
    class off costs less than two. Epstein (1969), "A scoring system for probability
    forecasts of ranked categories".

    Args:
        probs: (N, C).
        labels: (N,).
    """
    # The outcome's own distribution function is a step from 0 to 1 at the label.
    step = labels[:, None] <= torch.arange(probs.shape[1] - 1, device=labels.device)
    gap = probs.cumsum(1)[:, :-1] - step.to(probs)
    return float(gap.square().sum(1).mean())


def classwise_ece(probs: Tensor, labels: Tensor) -> Tensor:
    r"""Calibration error of each class's probability, averaged over the classes.

    :math:`\frac1{CN} \sum_{c, b} |\sum_{i \in B_{cb}} (p_{ic} - 1[y_i = c])|` with
    bins of equal width. torchmetrics' binary error, of all classes at once.

    Kull et al. (2019), https://arxiv.org/abs/1910.12656, eq. 3.

    Args:
        probs: (N, C).
        labels: (N,).

    Returns:
        A scalar.
    """
    num_data, num_classes = probs.shape
    edges = torch.linspace(0, 1, NUM_BINS + 1, dtype=probs.dtype, device=probs.device)
    index = (
        torch.bucketize(probs.contiguous(), edges, right=True) - 1
    )  # a bin of its own for 1
    index = index + (NUM_BINS + 1) * torch.arange(num_classes, device=probs.device)
    # A bin's mean probability less its share of the class, times its size, is a sum.
    gap = probs - one_hot(labels, num_classes)
    sums = probs.new_zeros(num_classes * (NUM_BINS + 1))
    sums.index_add_(0, index.flatten(), gap.flatten())
    return sums.abs().sum() / (num_classes * num_data)


def adaptive_ece(confidence: Tensor, correct: Tensor) -> Tensor:
    r"""Calibration error in bins that hold equally many data.

    :math:`\frac1N \sum_b |\sum_{i \in B_b} (\text{confidence}_i - \text{correct}_i)|`,
    15 bins, each datum one of its own where there are fewer.

    Nguyen & O'Connor (2015), https://arxiv.org/abs/1508.05154.

    Args:
        confidence: Probability of the predicted class, (N,).
        correct: 1 or 0, (N,).

    Returns:
        A scalar.
    """
    # Data of one confidence may fall into different bins, in no order of their own.
    gap = _mean_of_ties(confidence, confidence - correct)
    gap = gap[confidence.argsort()]
    bins = gap.tensor_split(min(NUM_BINS, len(gap)))
    return torch.stack([x.sum().abs() for x in bins]).sum() / len(gap)


def f1_scores(predicted: Tensor, labels: Tensor) -> tuple[float, float]:
    r"""Harmonic mean of precision and recall: of all labels together, and of each.

    :math:`F_1 = 2 h / (2 h + e)` with h hits and e errors of either kind.

    Args:
        predicted: Booleans, (N, P).
        labels: 0 or 1, whatever else doesn't count, (N, P).

    Returns:
        Micro, and macro: the mean over the labels, 0 of one without hits and errors.
    """
    holds, fails = labels == 1, labels == 0
    hits = (predicted & holds).sum(0).double()  # (P,)
    errors = ((predicted & fails) | (~predicted & holds)).sum(0).double()
    h = torch.cat([hits, hits.sum()[None]])
    e = torch.cat([errors, errors.sum()[None]])
    f1 = 2 * h / (2 * h + e).clamp_min(1)
    return float(f1[-1]), float(f1[:-1].mean())


def selective_metrics(confidence: Tensor, correct: Tensor) -> dict[str, Tensor]:
    r"""Quality of the answers where the least confident ones are withheld.

    ``selective_accuracy``: accuracy of the most confident 80%. ``aurc``: error rate of
    the n most confident, averaged over n from 1 to N, the area under the risk-coverage
    curve (Geifman et al. 2019, https://arxiv.org/abs/1805.08206).

    Args:
        confidence: (N,).
        correct: 1 or 0, (N,).

    Returns:
        Two scalars, by name.
    """
    accuracies = selective_accuracies(confidence, correct)
    # Risk is 1 - accuracy, coverage n / N.
    num_kept = math.ceil(COVERAGE * len(accuracies))
    return {
        "selective_accuracy": accuracies[num_kept - 1],
        "aurc": (1 - accuracies).mean(),
    }


def selective_accuracies(confidence: Tensor, correct: Tensor) -> Tensor:
    """Accuracy of the n most confident data for n from 1 to N, (N,).

    Of data with the same confidence any may come first: the mean over their orders.

    Args:
        confidence: (N,).
        correct: 1 or 0, (N,).
    """
    order = confidence.argsort(descending=True)
    right = _mean_of_ties(confidence, correct)[order].cumsum(0)
    return right / torch.arange(
        1, len(right) + 1, dtype=right.dtype, device=right.device
    )


def with_standard_errors(
    values: dict[str, float],
    num_bootstrap: int,
    replicate: Callable[[], dict[str, float]],
) -> dict[str, float]:
    """Metrics and their standard errors, by name with ``_se`` behind it.

    Args:
        values: The metrics.
        num_bootstrap: How many resampled data sets; 0: no standard errors.
        replicate: The same metrics of data resampled with replacement.

    Raises:
        ValueError: If ``num_bootstrap`` is 1 or negative.
    """
    check_count("num_bootstrap", num_bootstrap, 0)
    if num_bootstrap == 1:
        raise ValueError(
            f"num_bootstrap must be 0 or at least 2, found {num_bootstrap}. A hundred "
            "give a standard error to within 7%."
        )
    if num_bootstrap == 0:
        return values
    rows = [list(replicate().values()) for _ in range(num_bootstrap)]
    errors = torch.tensor(rows, dtype=torch.float64, device="cpu").std(0).tolist()
    return values | {f"{n}_se": e for n, e in zip(values, errors, strict=True)}


def resampled(num_data: int, device: torch.device) -> Tensor:
    """Indices of as many data, drawn with replacement by torch's generator, (N,)."""
    return torch.randint(num_data, (num_data,)).to(device)


def auroc_of_scores(inside: Tensor, outside: Tensor) -> float:
    """Probability that a score outside is larger than one inside, ties counting half.

    Args:
        inside: (N,).
        outside: (N',).

    Returns:
        From 0 to 1.
    """
    from torchmetrics.functional.classification import binary_auroc

    scores = torch.cat([inside, outside.to(inside.device)])  # of the wider type
    outside_mark = torch.arange(len(scores), device=scores.device) >= len(inside)
    # torchmetrics takes scores above 1 for logits, and its sigmoid would tie small
    # ones, so it gets ranks.
    _, ranks = scores.unique(return_inverse=True)
    return float(binary_auroc(ranks.double() / len(scores), outside_mark.long()))


def _mean_of_ties(key: Tensor, values: Tensor) -> Tensor:
    """Each value replaced by the mean over the data with the same key, (N,)."""
    _, group = key.unique(return_inverse=True)
    sums = torch.zeros_like(values).index_add_(0, group, values)
    counts = torch.zeros_like(values).index_add_(0, group, torch.ones_like(values))
    return sums[group] / counts[group]
