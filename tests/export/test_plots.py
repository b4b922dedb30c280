"""What the figures show, read from their lines."""

from collections.abc import Iterator
from statistics import NormalDist
from typing import Literal

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from pyro.optim import Adam

import pyro_lora as pl
from tests import networks
from tests.predict import models


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def binary(logits: torch.Tensor, labels: torch.Tensor | None = None) -> pl.Prediction:
    log_probs = torch.nn.functional.logsigmoid(torch.stack([-logits, logits], -1))
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return pl.Prediction(log_probs=log_probs, aleatoric_entropy=entropy, labels=labels)


def drawn(num_data: int, scale: float = 1.0) -> pl.Prediction:
    """Averaged over two draws, which disagree by the scale."""
    logits = torch.randn(2, num_data, dtype=torch.float64) * scale
    each = [binary(x) for x in logits]
    probs = (each[0].probs + each[1].probs) / 2
    aleatoric = (each[0].total_entropy + each[1].total_entropy) / 2
    return pl.Prediction(log_probs=probs.log(), aleatoric_entropy=aleatoric)


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


def test_reliability_has_wilsons_bands() -> None:
    # One bin: 3 of 4 right. The interval's ends q solve (q - p)^2 = z^2 q (1 - q) / n.
    sure = binary(torch.full((4,), 2.0).double(), torch.tensor([1, 1, 1, 0]))
    band = pl.plots.reliability({"sure": sure}).collections[1]
    ends = np.unique(band.get_paths()[0].vertices[:, 1])
    z2 = NormalDist().inv_cdf(0.975) ** 2
    low, high = sorted(np.roots([1 + z2 / 4, -(2 * 0.75 + z2 / 4), 0.75**2]))
    assert ends.min() == pytest.approx(low, abs=1e-6)
    assert ends.max() == pytest.approx(high, abs=1e-6)


def test_rejection_withholds_the_least_confident() -> None:
    prediction = labelled(40)
    ax = pl.plots.rejection({"MAP": prediction, "other": labelled(30)})
    confidence, predicted = prediction.probs.max(-1)
    correct = (predicted == prediction.labels).double()
    order = sorted(range(40), key=lambda i: float(confidence[i]))
    expected = [
        [n / 40, float(correct[order[n:]].mean())] for n in range(39)
    ]  # 5% are left
    found = ax.get_lines()[0].get_xydata()
    np.testing.assert_allclose(found[::-1], expected, atol=1e-12)
    aurc = sum(1 - float(correct[order[n:]].mean()) for n in range(40)) / 40
    assert ax.get_legend().get_texts()[0].get_text() == f"MAP, AURC {aurc:.3f}"


def test_rejection_averages_over_ties() -> None:
    tied = binary(torch.zeros(4).double(), torch.tensor([1, 0, 0, 1]))
    (line,) = pl.plots.rejection({"tied": tied}).get_lines()
    assert line.get_ydata().tolist() == [0.5] * 4
    with pytest.raises(ValueError, match="needs labels"):
        pl.plots.rejection({"MAP": binary(torch.randn(3))})
    with pytest.raises(ValueError, match=r"plots\.rejection got no predictions"):
        pl.plots.rejection({})


@pytest.mark.parametrize("score", ["total", "epistemic"])
def test_entropy_shows_distribution_functions(
    score: Literal["total", "epistemic"],
) -> None:
    inside, outside = drawn(40), drawn(30, scale=3)
    ax = pl.plots.entropy(inside, {"reviews": outside}, score=score)
    first, second = ax.get_lines()[:2]
    for line, prediction in [(first, inside), (second, outside)]:
        x, y = line.get_data()
        entropy = getattr(prediction, f"{score}_entropy")
        value = entropy.median()
        below = (entropy <= value).double().mean()
        assert y[x <= float(value)].max() == pytest.approx(float(below))
    assert first.get_label() == "in domain"
    auroc = pl.auroc(inside, outside, score)
    assert second.get_label() == f"reviews, AUROC {auroc:.2f}"
    assert ax.get_xlabel() == f"{score} entropy (nats)"


def test_entropy_needs_some() -> None:
    inside = binary(torch.randn(5))
    with pytest.raises(ValueError, match=r"plots\.entropy got no predictions"):
        pl.plots.entropy(inside, {})
    with pytest.raises(ValueError, match=r"no datum has any epistemic.*score='total'"):
        pl.plots.entropy(inside, {"reviews": inside}, score="epistemic")


def cells(ax: Axes) -> dict[tuple[str, str], float]:
    """(role, layer) -> value of a heat map, checked against the numbers on it."""
    (image,) = ax.get_images()
    columns = [text.get_text() for text in ax.get_xticklabels()]
    rows = [text.get_text() for text in ax.get_yticklabels()]
    values = np.ma.filled(image.get_array(), np.nan)
    found = {
        (row, column): float(values[y, x])
        for y, row in enumerate(rows)
        for x, column in enumerate(columns)
        if not np.isnan(values[y, x])
    }
    written = {text.get_position(): float(text.get_text()) for text in ax.texts}
    assert len(written) == len(found)
    for (x, y), number in written.items():
        assert number == pytest.approx(values[int(y), int(x)], rel=0.05)
    return found


def test_effective_parameters_are_those_of_each_matrix() -> None:
    lora, model = models.classifier()
    posterior = models.laplace(lora, model, models.two_batches())
    found = cells(pl.plots.effective_parameters(posterior))
    layers = posterior.gaussian.effective_parameters_by_layer()
    prefix = "lora.bert.encoder.layer.attention.self."
    expected = {
        (site.removeprefix(prefix), str(layer)): float(value)
        for site, values in layers.items()
        if site.startswith(prefix)
        for layer, value in enumerate(values)
    }
    expected |= {
        (f"classifier.{name}", "-"): float(layers[f"head.classifier.{name}"])
        for name in ("weight", "bias")
    }
    assert found == pytest.approx(expected)
    mixture = pl.MixturePosterior([posterior, posterior.with_prior_precision(1e4)])
    between = cells(pl.plots.effective_parameters(mixture))
    other = cells(pl.plots.effective_parameters(mixture.components[1]))
    for place, value in between.items():
        assert value == pytest.approx((found[place] + other[place]) / 2)


def test_effective_parameters_need_a_fisher_information() -> None:
    lora, model = models.classifier()
    with pytest.raises(TypeError, match=r"ParticlePosterior has no Fisher information"):
        pl.plots.effective_parameters(models.particles(lora, model))  # type: ignore[arg-type]


def test_delta_norms_are_those_of_each_layer() -> None:
    # Query in the last layer only, value in both, at two ranks.
    network = networks.bert(
        target_modules=["layer.1.attention.self.query", "value"],
        rank_pattern={"query": 2},
    )
    lora, _ = models.classifier(network=network)
    draws = models.jittered(lora, 3)
    dense: dict[tuple[str, str], list[float]] = {}
    for s in range(3):
        factors = lora.delta_weight_factors(models.draw(draws, s))
        for path, (b, a) in factors.items():
            place = path.rpartition(".")[2], path.split("layer.")[1][0]
            dense.setdefault(place, []).append(float((b @ a).norm()))
    assert set(dense) == {("query", "1"), ("value", "0"), ("value", "1")}
    mean = {place: sum(norms) / 3 for place, norms in dense.items()}
    found = cells(pl.plots.delta_norms(lora, draws | {"noise": torch.ones(3)}))
    assert found == pytest.approx(mean)
    first = {place: norms[0] for place, norms in dense.items()}
    at_first = pl.plots.delta_norms(lora, models.draw(draws, 0))
    assert cells(at_first) == pytest.approx(first)


def test_layers_stand_in_their_order() -> None:
    lora, _ = models.classifier(network=networks.bert(num_layers=11))
    ax = pl.plots.delta_norms(lora, lora.weights())
    numbers = [text.get_text() for text in ax.get_xticklabels()]
    assert numbers == [str(layer) for layer in range(11)]


def test_delta_norms_need_low_rank_updates() -> None:
    lora = pl.lift(torch.nn.Linear(2, 1))
    with pytest.raises(ValueError, match="no updates of the form B A"):
        pl.plots.delta_norms(lora, lora.weights())


def test_forces_are_svgds_diagnostics() -> None:
    lora, model = models.classifier()
    svgd = pl.SVGD(
        model,
        pl.kernels.RBF(),
        Adam({"lr": 1e-2}),
        3,
        init_loc_fn=lora.init_to_adapter(jitter=0.1),
    )
    with pytest.raises(ValueError, match="no values of attraction and repulsion"):
        pl.plots.forces(svgd.diagnostics)
    svgd.run(models.two_batches(), num_epochs=2, progress_bar=False)
    ax = pl.plots.forces(svgd.diagnostics)
    names = ("attraction", "repulsion")
    for name, line in zip(names, ax.get_lines()[::2], strict=True):
        assert line.get_xdata().tolist() == [1, 2, 3, 4]
        assert line.get_ydata().tolist() == svgd.diagnostics[name]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [*names]


def test_forces_have_running_means_and_gaps_at_zero() -> None:
    attraction = [float(2 + n % 2) for n in range(100)]
    ax = pl.plots.forces({"attraction": attraction, "repulsion": [0.0] * 100})
    _, mean, nothing, _ = ax.get_lines()
    window = sum(attraction[8:13]) / 5
    assert mean.get_ydata()[10] == pytest.approx(window)
    assert mean.get_ydata()[0] == pytest.approx(sum(attraction[:3]) / 3)
    assert np.isnan(nothing.get_ydata()).all()
    assert ax.get_legend().get_texts()[1].get_text() == "repulsion (0 throughout)"


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


def test_evidence_is_a_laplace_posteriors() -> None:
    lora, model = models.classifier()
    with pytest.raises(TypeError, match="needs a LaplacePosterior, found a Part"):
        pl.plots.evidence(models.particles(lora, model))  # type: ignore[arg-type]


def test_axes_can_be_given() -> None:
    lora, model = models.classifier()
    posterior = models.laplace(lora, model, models.two_batches())
    series = {"attraction": [2.0, 1.0], "repulsion": [0.5, 0.0]}
    figure, grid = plt.subplots(2, 4)
    axes = iter(grid.flat)
    for draw in (
        lambda ax: pl.plots.reliability({"MAP": labelled(9)}, ax=ax),
        lambda ax: pl.plots.rejection({"MAP": labelled(9)}, ax=ax),
        lambda ax: pl.plots.entropy(labelled(9), {"x": labelled(9)}, ax=ax),
        lambda ax: pl.plots.evidence(posterior, ax=ax),
        lambda ax: pl.plots.effective_parameters(posterior, ax=ax),
        lambda ax: pl.plots.delta_norms(lora, lora.weights(), ax=ax),
        lambda ax: pl.plots.forces(series, ax=ax),
    ):
        ax = next(axes)
        assert draw(ax) is ax
        assert ax.has_data()
    assert plt.get_fignums() == [figure.number]
    figure.canvas.draw()


def test_a_prediction_alone_is_drawn_as_one_of_a_mapping() -> None:
    prediction, other = labelled(50), labelled(30)
    for one, several in (
        (
            pl.plots.reliability(prediction),
            pl.plots.reliability({"prediction": prediction}),
        ),
        (
            pl.plots.rejection(prediction),
            pl.plots.rejection({"prediction": prediction}),
        ),
        (
            pl.plots.entropy(prediction, other),
            pl.plots.entropy(prediction, {"out of domain": other}),
        ),
    ):
        lines = [
            [line.get_xydata().tolist() for line in ax.get_lines()]
            for ax in (one, several)
        ]
        assert lines[0] == lines[1]
        legends = [ax.get_legend().get_texts() for ax in (one, several)]
        words = [[text.get_text() for text in legend] for legend in legends]
        assert words[0] == words[1]


def test_what_has_no_classes_is_not_drawn() -> None:
    real = pl.RegressionPrediction(loc=torch.zeros(1, 3), noise_scale=torch.ones(1, 3))
    classes = labelled(5)
    for wrong in (real, {"a": classes, "b": real}, 3):
        for draw in (
            pl.plots.reliability,
            pl.plots.rejection,
            lambda x: pl.plots.entropy(classes, x),
        ):
            with pytest.raises(TypeError, match=r"must be a prediction of classes"):
                draw(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"entropy.*found a RegressionPrediction"):
        pl.plots.entropy(real, classes)  # type: ignore[arg-type]
