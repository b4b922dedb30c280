"""Closed forms for class probabilities under Gaussian logits, against many draws."""

import math

import pytest
import torch
from torch import Tensor

from pyro_lora.curvature.integrals import GaussianLogits, class_log_probs, probit
from tests.curvature.gauss_newton import assert_same

NUM_DRAWS = 100_000  # the standard error of a probability is below 2e-3


def averaged(logits: GaussianLogits) -> Tensor:
    """Mean softmax of many draws."""
    total = torch.zeros_like(logits.mean)
    for _ in range(10):
        total += logits.rsample((NUM_DRAWS // 10,)).softmax(-1).mean(0) / 10
    return total


def random_logits(num_classes: int, scale: float, num_data: int = 4) -> GaussianLogits:
    contrast = torch.eye(num_classes).double() - 1 / num_classes
    root = torch.randn(num_data, num_classes, num_classes).double()
    root = contrast @ root * scale / num_classes**0.5
    mean = 2 * torch.randn(num_data, num_classes).double() @ contrast
    return GaussianLogits(mean, root @ root.mT)


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_probit_of_two_classes_is_within_two_hundredths(scale: float) -> None:
    logits = random_logits(2, scale, 8)
    assert ((probit(logits).exp() - averaged(logits)).abs() < 0.02).all()


@pytest.mark.parametrize("num_classes", [3, 10])
@pytest.mark.parametrize(
    ("scale", "mean_error", "max_error"),
    [(0.1, 1e-3, 5e-3), (1.0, 0.03, 0.15), (5.0, 0.1, 0.3)],
)
def test_probit_of_more_classes(
    num_classes: int, scale: float, mean_error: float, max_error: float
) -> None:
    logits = random_logits(num_classes, scale, 1 if num_classes > 5 else 4)
    error = (probit(logits).exp() - averaged(logits)).abs()
    assert error.mean() < mean_error
    assert error.max() < max_error


def test_probit_of_two_classes_is_mackays() -> None:
    logits = random_logits(2, 3.0)
    mean = logits.mean[:, 1] - logits.mean[:, 0]
    contrast = torch.tensor([-1.0, 1.0]).double()
    variance = contrast @ logits.covariance_matrix @ contrast
    expected = (mean / (1 + math.pi * variance / 8).sqrt()).sigmoid()
    assert_same(probit(logits).exp()[:, 1], expected)


def test_probit_of_more_classes_as_a_loop() -> None:
    logits = random_logits(4, 2.0, 2)
    m, c = logits.mean, logits.covariance_matrix
    for b in range(2):
        p = []
        for k in range(4):
            total = 1.0
            for i in range(4):
                if i != k:
                    v = float(c[b, k, k] + c[b, i, i] - 2 * c[b, k, i])
                    scaled = float(m[b, k] - m[b, i]) / math.sqrt(1 + math.pi * v / 8)
                    total += math.exp(-scaled)
            p.append(1 / total)
        assert_same(
            probit(logits)[b].exp(), torch.tensor(p, dtype=torch.float64) / sum(p)
        )


def test_probit_ignores_a_shift_of_all_logits() -> None:
    logits = random_logits(4, 2.0)
    shifted = GaussianLogits(logits.mean + 3.0, logits.covariance_matrix + 7.0)
    assert_same(probit(shifted), probit(logits))


@pytest.mark.parametrize("num_classes", [2, 3])
def test_the_closed_form_is_normalised_and_finite(num_classes: int) -> None:
    mean = torch.tensor([[0.0] * num_classes, [400.0] + [-400.0] * (num_classes - 1)])
    for variance in (0.0, 1.0, 1e6):
        covariance = variance * torch.eye(num_classes).expand(2, -1, -1)
        log_p = probit(GaussianLogits(mean, covariance))
        assert log_p.dtype == torch.float64
        assert log_p.isfinite().all()
        assert_same(log_p.logsumexp(-1), torch.zeros(2).double())


@pytest.mark.parametrize("num_classes", [2, 3])
def test_tokens_are_data_of_their_own(num_classes: int) -> None:
    logits = random_logits(num_classes, 1.5, 6)
    tokens = GaussianLogits(
        logits.mean.reshape(2, 3, -1),
        logits.covariance_matrix.reshape(2, 3, num_classes, -1),
    )
    for integral in (class_log_probs, probit):
        assert_same(integral(tokens).flatten(0, 1), integral(logits))
