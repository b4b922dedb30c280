"""Metrics against loops over the data, temperature scaling against its own optimum."""

import math

import pytest
import torch
from torch import Tensor

import pyro_lora as pl


def prediction(logits: Tensor, labels: Tensor | None = None) -> pl.Prediction:
    """The prediction of a single network."""
    log_probs = logits.double().log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return pl.Prediction(log_probs=log_probs, aleatoric_entropy=entropy, labels=labels)


def certain(num_data: int, labels: list[int]) -> pl.Prediction:
    """Class 0 with all but certainty, whatever is true."""
    logits = torch.tensor([[40.0, 0.0]]).repeat(num_data, 1)
    return prediction(logits, torch.tensor(labels))


@pytest.fixture
def random_prediction() -> pl.Prediction:
    logits = 2 * torch.randn(203, 4)
    return prediction(logits, torch.distributions.Categorical(logits=logits).sample())


def test_overconfidence_is_positive_where_sure_and_wrong() -> None:
    assert certain(4, [0, 0, 1, 1]).metrics()["overconfidence"] == pytest.approx(0.5)
    unsure = prediction(torch.tensor([[0.1, 0.0]]), torch.tensor([0]))
    assert unsure.metrics()["overconfidence"] < -0.4


def test_brier_is_two_at_worst() -> None:
    assert certain(3, [1, 1, 1]).metrics()["brier"] == pytest.approx(2.0)


def test_selective_accuracy_drops_the_least_confident() -> None:
    logits = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.5, 0.0], [4.0, 0.0]])
    wrong_where_unsure = prediction(logits, torch.tensor([0, 0, 0, 1, 0]))
    assert wrong_where_unsure.metrics()["selective_accuracy"] == 1.0
    wrong_where_sure = prediction(logits, torch.tensor([0, 0, 0, 0, 1]))
    assert wrong_where_sure.metrics()["selective_accuracy"] == 0.75


def test_a_probability_rounded_up_past_one_is_no_logit() -> None:
    rounded = pl.Prediction(
        log_probs=torch.tensor([[3e-16, -60.0]], dtype=torch.float64),
        aleatoric_entropy=torch.zeros(1, dtype=torch.float64),
        labels=torch.tensor([0]),
    )
    assert rounded.log_probs.exp().max() > 1
    assert rounded.metrics()["ece"] == pytest.approx(0.0, abs=1e-7)


def test_total_entropy_is_that_of_the_mean() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]], dtype=torch.float64)
    aleatoric = torch.tensor([0.5, 0.0], dtype=torch.float64)
    mixed = pl.Prediction(log_probs=p.log(), aleatoric_entropy=aleatoric)
    entropy = 1.5 * math.log(2)
    torch.testing.assert_close(mixed.total_entropy.tolist(), [entropy, 0.0])
    torch.testing.assert_close(mixed.epistemic_entropy.tolist(), [entropy - 0.5, 0.0])


def test_rounding_makes_no_negative_epistemic_entropy() -> None:
    single = prediction(torch.randn(50, 3))
    aleatoric = single.total_entropy + 1e-15
    rounded = pl.Prediction(log_probs=single.log_probs, aleatoric_entropy=aleatoric)
    assert (rounded.epistemic_entropy >= 0).all()


def auroc_by_pairs(inside: Tensor, outside: Tensor) -> float:
    wins = 0.0
    for a in inside.tolist():
        for b in outside.tolist():
            wins += 1.0 if b > a else 0.5 if b == a else 0.0
    return wins / (len(inside) * len(outside))


def with_epistemic(num_data: int, values: Tensor) -> pl.Prediction:
    log_probs = torch.zeros(num_data, 20, dtype=torch.float64).log_softmax(-1)
    total = torch.tensor(math.log(20.0), dtype=torch.float64)
    return pl.Prediction(log_probs=log_probs, aleatoric_entropy=total - values)


def test_auroc_equals_all_pairs() -> None:
    inside = prediction(3 * torch.randn(40, 20))  # entropies above 1 nat, too
    outside = prediction(1.5 * torch.randn(31, 20))
    expected = auroc_by_pairs(inside.total_entropy, outside.total_entropy)
    assert outside.total_entropy.max() > 1
    assert pl.auroc(inside, outside) == pytest.approx(expected, abs=1e-6)
    assert expected > 0.6


def test_auroc_by_epistemic_entropy_counts_ties_half() -> None:
    inside = torch.randint(5, (30,)).double() / 10
    outside = torch.randint(1, 6, (20,)).double() / 10
    predictions = with_epistemic(30, inside), with_epistemic(20, outside)
    epistemic = [p.epistemic_entropy for p in predictions]
    found = pl.auroc(*predictions, score="epistemic")
    assert found == pytest.approx(auroc_by_pairs(*epistemic), abs=1e-6)


def test_auroc_tells_tiny_entropies_apart() -> None:
    # Sigmoids of these are all 0.5 to machine precision; some entropy is above 1.
    inside = prediction(torch.tensor([[60.0, 0, 0, 0], [0, 0, 0, 0]]))
    outside = prediction(torch.tensor([[55.0, 0, 0, 0], [50.0, 0, 0, 0]]))
    assert pl.auroc(inside, outside) == pytest.approx(0.5, abs=1e-6)


def test_auroc_refuses_another_score(random_prediction: pl.Prediction) -> None:
    with pytest.raises(ValueError, match="'total' or 'epistemic', found 'aleatoric'"):
        pl.auroc(random_prediction, random_prediction, score="aleatoric")  # type: ignore[arg-type]


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 5.0])
def test_fitted_temperature_is_stationary(sharpness: float) -> None:
    logits = torch.randn(300, 3, dtype=torch.float64)
    labels = torch.distributions.Categorical(logits=logits).sample()
    temperature = pl.fit_temperature(prediction(sharpness * logits, labels))
    t = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    nll = torch.nn.functional.cross_entropy(sharpness * logits / t, labels)
    (slope,) = torch.autograd.grad(nll, t)  # convex in 1/T: one stationary point
    assert abs(float(slope) * temperature) < 1e-10
    assert temperature == pytest.approx(sharpness, rel=0.3)


def test_fitted_temperature_stops_at_the_bounds() -> None:
    assert pl.fit_temperature(certain(3, [0, 0, 0])) == pytest.approx(0.01)
    assert pl.fit_temperature(certain(3, [1, 1, 1])) == pytest.approx(100)


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_no_temperature_is_fitted_to_uniform_predictions(num_classes: int) -> None:
    labels = torch.arange(8) % num_classes
    uniform = prediction(torch.full((8, num_classes), 7.0), labels)
    assert pl.fit_temperature(uniform) == 1


def test_fitted_temperature_takes_classes_of_probability_zero() -> None:
    log_probs = torch.tensor([[0.7, 0.3, 0.0], [0.6, 0.4, 0.0]]).double().log()
    labels = torch.tensor([0, 1])
    held_out = pl.Prediction(
        log_probs=log_probs,
        aleatoric_entropy=torch.zeros(2).double(),
        labels=labels,
    )
    without = pl.Prediction(
        log_probs=log_probs[:, :2],
        aleatoric_entropy=torch.zeros(2).double(),
        labels=labels,
    )
    assert pl.fit_temperature(held_out) == pytest.approx(pl.fit_temperature(without))


def test_with_temperature_divides_the_logits() -> None:
    logits = torch.randn(20, 3, dtype=torch.float64)
    labels = torch.randint(3, (20,))
    scaled = prediction(logits, labels).with_temperature(2.5)
    expected = prediction(logits / 2.5, labels)
    torch.testing.assert_close(scaled.log_probs, expected.log_probs)
    torch.testing.assert_close(scaled.aleatoric_entropy, expected.aleatoric_entropy)
    assert scaled.epistemic_entropy.max() < 1e-12
    assert (
        scaled.metrics()["accuracy"] == prediction(logits, labels).metrics()["accuracy"]
    )


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_an_impossible_temperature_is_refused(
    temperature: float, random_prediction: pl.Prediction
) -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        random_prediction.with_temperature(temperature)


def test_missing_labels_are_named() -> None:
    unlabelled = prediction(torch.randn(5, 2))
    with pytest.raises(ValueError, match=r"metrics needs labels.*into every batch"):
        unlabelled.metrics()
    with pytest.raises(ValueError, match="fit_temperature needs labels"):
        pl.fit_temperature(unlabelled)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 2]), "classes 0 to 1, found 2"),
        (torch.tensor([0, -1, 1]), "classes 0 to 1, found -1"),
        (torch.tensor([0.0, 0.5, 1.0]), "classes 0 to 1, found 0.5"),
        (torch.tensor([0, 1]), r"shape \(2,\); expected \(3,\)"),
    ],
)
def test_wrong_labels_are_refused(labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prediction(torch.randn(3, 2), labels)


@pytest.mark.parametrize(
    ("log_probs", "entropy", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(3), "don't sum to 1"),
        (torch.full((3, 2), math.nan), torch.zeros(3), "NaN"),
        (torch.zeros(3, 1), torch.zeros(3), r"\(3, 1\); expected \(N, C\)"),
        (torch.zeros(0, 2), torch.zeros(0), r"\(0, 2\); expected \(N, C\)"),
        (torch.full((3, 2), math.log(0.5)), torch.zeros(2), "aleatoric_entropy"),
    ],
)
def test_impossible_predictions_are_refused(
    log_probs: Tensor, entropy: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pl.Prediction(log_probs=log_probs, aleatoric_entropy=entropy)
