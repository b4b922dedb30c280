"""Metrics against loops over the data and their definitions."""

import builtins
import itertools
import math
from typing import Any

import pandas as pd
import pyro
import pytest
import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

import pyro_lora as pl


def prediction(logits: Tensor, labels: Tensor | None = None) -> pl.Prediction:
    """The prediction of a single network."""
    log_probs = logits.double().log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return pl.Prediction(log_probs=log_probs, aleatoric_entropy=entropy, labels=labels)


def calibrated(num_data: int, num_classes: int = 4) -> pl.Prediction:
    logits = 2 * torch.randn(num_data, num_classes)
    return prediction(logits, torch.distributions.Categorical(logits=logits).sample())


@pytest.mark.parametrize("num_data", [203, 11])
def test_metrics_equal_loops(num_data: int) -> None:
    found = calibrated(num_data)
    probs, labels = found.probs.tolist(), found.labels.tolist()
    rows = []  # confidence, correct
    nll = brier = 0.0
    for row, label in zip(probs, labels, strict=True):
        rows.append((max(row), float(row.index(max(row)) == label)))
        nll -= math.log(row[label])
        for c, p in enumerate(row):
            brier += (p - (c == label)) ** 2
    n = len(rows)
    ece = 0.0
    for b in range(15):
        inside = [r for r in rows if b / 15 <= r[0] < (b + 1) / 15]
        ece += abs(sum(r[0] for r in inside) - sum(r[1] for r in inside)) / n
    adaptive, bins = 0.0, min(15, n)
    rising = sorted(rows)
    sizes = [n // bins + (b < n % bins) for b in range(bins)]
    for end, size in zip(itertools.accumulate(sizes), sizes, strict=True):
        adaptive += abs(sum(r[0] - r[1] for r in rising[end - size : end])) / n
    falling = rising[::-1]
    aurc = sum(sum(1 - r[1] for r in falling[:k]) / k for k in range(1, n + 1)) / n
    kept = falling[: math.ceil(0.8 * n)]
    accuracy = sum(r[1] for r in rows) / n
    classwise = 0.0
    for c, b in itertools.product(range(4), range(15)):
        inside = [
            row[c] - (label == c)
            for row, label in zip(probs, labels, strict=True)
            if b / 15 <= row[c] < (b + 1) / 15
        ]
        classwise += abs(sum(inside)) / (4 * n)
    metrics = found.metrics()
    assert metrics.pop("ece") == pytest.approx(ece, abs=1e-6)  # torchmetrics: float32
    assert metrics == pytest.approx(
        {
            "accuracy": accuracy,
            "nll": nll / n,
            "classwise_ece": classwise,
            "adaptive_ece": adaptive,
            "overconfidence": sum(r[0] for r in rows) / n - accuracy,
            "brier": brier / n,
            "selective_accuracy": sum(r[1] for r in kept) / len(kept),
            "aurc": aurc,
        },
        abs=1e-12,
    )


def test_classwise_error_is_the_mean_of_torchmetrics_binary_ones() -> None:
    found = calibrated(300)
    each = [
        float(
            binary_calibration_error(
                found.probs[:, c].contiguous(), (found.labels == c).long()
            )
        )
        for c in range(4)
    ]
    assert found.metrics()["classwise_ece"] == pytest.approx(sum(each) / 4, abs=1e-6)


def test_probabilities_of_any_memory_layout() -> None:
    found = calibrated(20)
    turned = pl.Prediction(
        log_probs=found.log_probs.mT.contiguous().mT,
        aleatoric_entropy=found.aleatoric_entropy,
        labels=found.labels,
    )
    assert turned.metrics() == pytest.approx(found.metrics(), abs=1e-12)


def test_a_certain_class_counts_in_the_classwise_error() -> None:
    sure = prediction(torch.tensor([[200.0, 0.0]] * 4), torch.tensor([0, 0, 0, 1]))
    assert sure.probs.max() == 1
    assert sure.metrics()["classwise_ece"] == pytest.approx(0.25)


def test_ties_in_confidence_are_in_no_order() -> None:
    # Three data of one confidence, two right: the mean over their six orders.
    logits = torch.tensor([[3.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    aurc = []
    for order in itertools.permutations([0, 0, 1]):
        wrong = [0.0, *map(float, order)]
        aurc.append(sum(sum(wrong[:k]) / k for k in range(1, 5)) / 4)
        metrics = prediction(logits, torch.tensor([0, *order])).metrics()
        assert metrics["adaptive_ece"] == pytest.approx(expected_adaptive(logits))
        assert metrics["selective_accuracy"] == pytest.approx(0.75)  # all are kept
    assert metrics["aurc"] == pytest.approx(sum(aurc) / 6, abs=1e-12)


def expected_adaptive(logits: Tensor) -> float:
    """Each datum in a bin of its own, the tied ones right two times in three."""
    p = logits.double().softmax(-1)[:, 0].tolist()
    return ((1 - p[0]) + 3 * abs(2 / 3 - p[1])) / 4


def test_metrics_out_of_domain() -> None:
    inside = calibrated(50)
    outside = prediction(0.1 * torch.randn(30, 4))
    found = inside.metrics(ood=outside)
    assert found["auroc_total"] == pl.auroc(inside, outside) > 0.7
    assert found["auroc_epistemic"] == pl.auroc(inside, outside, "epistemic")
    assert found.keys() - inside.metrics().keys() == {"auroc_total", "auroc_epistemic"}


def test_bootstrap_standard_errors() -> None:
    found = calibrated(400)
    pyro.set_rng_seed(0)
    metrics = found.metrics(num_bootstrap=400)
    assert {k for k in metrics if not k.endswith("_se")} == found.metrics().keys()
    correct = (found.probs.argmax(-1) == found.labels).double()
    losses = -found.log_probs.gather(1, found.labels[:, None])[:, 0]
    # Of a mean it is sd / sqrt(N); from 400 resamples it has a relative error of
    # 1 / sqrt(800), 3.5%.
    for name, values in [("accuracy", correct), ("nll", losses)]:
        exact = float(values.std(correction=0)) / 20
        assert metrics[f"{name}_se"] == pytest.approx(exact, rel=4 * 0.035)
    pyro.set_rng_seed(0)
    assert found.metrics(num_bootstrap=400) == metrics


def test_bootstrap_resamples_both_domains() -> None:
    inside, outside = calibrated(40), prediction(torch.randn(1, 4))
    found = inside.metrics(ood=outside, num_bootstrap=5)
    assert found["auroc_total_se"] > 0


@pytest.mark.parametrize("num_bootstrap", [-3, 1])
def test_too_few_resamples_are_refused(num_bootstrap: int) -> None:
    with pytest.raises(ValueError, match=r"num_bootstrap must be"):
        calibrated(5).metrics(num_bootstrap=num_bootstrap)


def test_a_table_has_a_row_a_datum() -> None:
    found = calibrated(7)
    table = found.to_pandas()
    assert isinstance(table, pd.DataFrame)
    assert table.index.name == "datum"
    assert table.shape == (7, 10)
    assert table["p_2"].tolist() == found.probs[:, 2].tolist()
    assert table["confidence"].tolist() == found.probs.amax(1).tolist()
    assert table["predicted"].tolist() == found.probs.argmax(1).tolist()
    assert table["label"].tolist() == found.labels.tolist()
    for name in ("total_entropy", "aleatoric_entropy", "epistemic_entropy"):
        assert table[name].tolist() == getattr(found, name).tolist()
    assert "label" not in prediction(torch.randn(3, 2)).to_pandas()


def test_a_table_without_pandas_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = builtins.__import__

    def without_pandas(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "pandas":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pandas)
    with pytest.raises(ImportError, match=r"pip install 'pyro-lora\[arviz\]'"):
        calibrated(3).to_pandas()
