"""What the figures show, read from their lines."""

from collections.abc import Iterator

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import pyro_lora as pl
from tests.predict import models


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def binary(logits: torch.Tensor, labels: torch.Tensor | None = None) -> pl.Prediction:
    log_probs = torch.nn.functional.logsigmoid(torch.stack([-logits, logits], -1))
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return pl.Prediction(log_probs=log_probs, aleatoric_entropy=entropy, labels=labels)


def labelled(num_data: int, sharpness: float = 3.0) -> pl.Prediction:
    logits = torch.randn(num_data, dtype=torch.float64)
    return binary(sharpness * logits, torch.bernoulli(logits.sigmoid()).long())


def test_reliability_shows_accuracy_and_confidence_of_each_bin() -> None:
    prediction = labelled(200)
    ax = pl.plots.reliability({"MAP": prediction, "other": labelled(100)})
    diagonal, line, _ = ax.get_lines()
    assert diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]
    confidence, predicted = prediction.probs.max(-1)
    correct = (predicted == prediction.labels).double()
    expected, share = [], []
    for b in range(15):
        inside = (confidence >= b / 15) & (confidence < (b + 1) / 15)
        if inside.any():
            expected.append([confidence[inside].mean(), correct[inside].mean()])
            share.append(inside.double().mean())
    np.testing.assert_allclose(line.get_xydata(), np.array(expected), atol=1e-12)
    areas = ax.collections[0].get_sizes()
    np.testing.assert_allclose(areas / areas.sum(), np.array(share))
    ece = prediction.metrics()["ece"]
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts[0] == f"MAP, ECE {ece:.3f}"
    gap = sum(s * abs(c - a) for s, (c, a) in zip(share, expected, strict=True))
    assert ece == pytest.approx(float(gap), abs=1e-6)


def test_reliability_keeps_the_last_bin_of_certain_data() -> None:
    certain = binary(torch.full((4,), 80.0).double(), torch.tensor([1, 1, 1, 0]))
    line = pl.plots.reliability({"sure": certain}).get_lines()[1]
    assert line.get_xydata().tolist() == [[1.0, 0.75]]


def test_reliability_needs_labels_and_predictions() -> None:
    with pytest.raises(ValueError, match="needs labels"):
        pl.plots.reliability({"MAP": binary(torch.randn(3))})
    with pytest.raises(ValueError, match="no predictions"):
        pl.plots.reliability({})


def test_entropy_shows_distribution_functions() -> None:
    inside, outside = binary(3 * torch.randn(40)), binary(torch.randn(30))
    ax = pl.plots.entropy(inside, {"reviews": outside})
    curves = {line.get_label(): line for line in ax.get_lines()}
    for name, prediction in [("in domain", inside), ("reviews", outside)]:
        x, y = curves[name].get_data()
        value = prediction.total_entropy.median()
        below = (prediction.total_entropy <= value).double().mean()
        assert y[x <= float(value)].max() == pytest.approx(float(below))
    with pytest.raises(ValueError, match="no predictions"):
        pl.plots.entropy(inside, {})


def test_evidence_marks_its_maximum() -> None:
    lora, model = models.classifier()
    posterior = models.laplace(lora, model, models.two_batches())
    ax = pl.plots.evidence(posterior)
    curve, mark, _ = ax.get_lines()
    (scale,), (top,) = mark.get_data()
    best = posterior.optimize_prior(per="all")
    tau = best.prior_precision["head.classifier.bias"].flatten()[0]
    assert scale == pytest.approx(float(tau) ** -0.5, rel=0.08)
    assert top == pytest.approx(float(best.log_evidence()), abs=0.1)
    x, y = curve.get_data()
    for index in (0, 20, 60):
        at = posterior.with_prior_precision(x[index] ** -2)
        assert y[index] == pytest.approx(float(at.log_evidence()))


def test_axes_can_be_given() -> None:
    lora, model = models.classifier()
    posterior = models.laplace(lora, model, models.two_batches())
    figure, axes = plt.subplots(1, 3)
    assert pl.plots.reliability({"MAP": labelled(9)}, ax=axes[0]) is axes[0]
    assert pl.plots.entropy(labelled(9), {"x": labelled(9)}, ax=axes[1]) is axes[1]
    assert pl.plots.evidence(posterior, ax=axes[2]) is axes[2]
    assert plt.get_fignums() == [figure.number]
