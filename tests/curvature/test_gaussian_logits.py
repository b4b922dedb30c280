"""Integrals over Gaussian logits, against fine sums and many draws."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_lora.curvature.gaussian_logits import expected_entropy
from pyro_lora.curvature.integrals import GaussianLogits, class_log_probs, probit
from tests.curvature.gauss_newton import assert_same

SDS = [0.0, 0.01, 0.3, 1.0, 1.49, 1.51, 3.0, 10.0, 30.0, 100.0]


def binary(mean: float, sd: float) -> GaussianLogits:
    """Logits whose difference f_1 - f_0 is N(mean, sd^2), mean over classes removed."""
    half = torch.tensor([-0.5, 0.5], dtype=torch.float64)
    return GaussianLogits(mean * half[None], sd**2 * torch.outer(half, half)[None])


def grid(mean: float, sd: float) -> tuple[Tensor, Tensor]:
    """Logit differences with their log weights: a fine sum over all that matters."""
    if sd == 0:
        return torch.tensor([mean]).double(), torch.zeros(1).double()
    # E e^f, the tails of the expectation, has its mass around mean +- sd^2.
    reach = 14 * sd + sd**2
    f = torch.linspace(mean - reach, mean + reach, 200_001, dtype=torch.float64)
    step = 2 * reach / 200_000
    log_density = -0.5 * ((f - mean) / sd).square() - math.log(sd * step**-1)
    return f, log_density - 0.5 * math.log(2 * math.pi)


@pytest.mark.grid
@pytest.mark.parametrize("sd", SDS)
@pytest.mark.parametrize("mean", [0.0, 0.7, -4.0, 25.0])
def test_two_classes_against_a_fine_sum(mean: float, sd: float) -> None:
    logits = binary(mean, sd)
    f, log_weight = grid(mean, sd)
    log_probs = class_log_probs(logits)[0]
    expected = torch.stack(
        [
            (logsigmoid(-f) + log_weight).logsumexp(0),
            (logsigmoid(f) + log_weight).logsumexp(0),
        ]
    )
    # Relative in the probability, however small it is.
    assert_same((log_probs - expected).expm1(), torch.zeros(2).double(), atol=1e-8)
    p, log_p = f.sigmoid(), logsigmoid(f)
    entropy = -p * log_p - (1 - p) * logsigmoid(-f)
    expected = (entropy * log_weight.exp()).sum()
    assert_same(expected_entropy(logits)[0], expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(("mean", "sd"), [(-200.0, 10.0), (-60.0, 3.0), (-900.0, 20.0)])
def test_a_probability_far_out_in_the_tail(mean: float, sd: float) -> None:
    f, log_weight = grid(mean, sd)
    expected = (logsigmoid(f) + log_weight).logsumexp(0)
    assert expected < -50
    assert_same(class_log_probs(binary(mean, sd))[0, 1], expected, rtol=1e-9)
    assert_same(class_log_probs(binary(-mean, sd))[0, 0], expected, rtol=1e-9)


NODES, NODE_WEIGHTS = np.polynomial.legendre.leggauss(40)


def log_expected_sigmoid(mean: float, sd: float) -> float:
    """By Gauss-Legendre in pieces around the mode of the log-concave integrand."""

    def log_integrand(f: np.ndarray | float) -> np.ndarray:
        log_density = -0.5 * np.square((f - mean) / sd) - math.log(sd)
        return -np.logaddexp(0, -f) + log_density - 0.5 * math.log(2 * math.pi)

    low, high = mean, mean + sd**2
    for _ in range(200):
        middle = (low + high) / 2
        rises = np.exp(-np.logaddexp(0, middle)) > (middle - mean) / sd**2
        low, high = (middle, high) if rises else (low, middle)
    top = float(log_integrand(low))
    edges = []
    for sign in (-1, 1):  # as far as it is within 45 nats of the mode
        width = 1e-3 * sd
        while log_integrand(low + sign * width) > top - 45:
            width *= 1.5
        edges.append(low + sign * width)
    near_zero = np.linspace(-40, 40, 81)
    inside = near_zero[(near_zero > edges[0]) & (near_zero < edges[1])]
    cuts = np.unique([*np.linspace(*edges, 40), *inside])
    half = np.diff(cuts)[:, None] / 2
    f = cuts[:-1, None] + half * (1 + NODES)
    return top + math.log((half * NODE_WEIGHTS * np.exp(log_integrand(f) - top)).sum())


@settings(max_examples=200, deadline=None)
@given(
    sd=st.floats(1e-3, 1e3),
    # the integrand's mode is on either side of 0, or there, by the mean over sd^2
    share=st.floats(-3, 3),
    shift=st.floats(-30, 30),
)
@example(sd=30.0, share=-1.0, shift=0.0)
@example(sd=1e3, share=-1.0, shift=0.0)
@example(sd=1e3, share=0.0, shift=0.0)
@example(sd=1.5, share=-3.0, shift=30.0)
def test_two_classes_at_any_mean_and_sd(sd: float, share: float, shift: float) -> None:
    mean = share * sd**2 + shift
    log_probs = class_log_probs(binary(mean, sd))[0]
    expected = [log_expected_sigmoid(-mean, sd), log_expected_sigmoid(mean, sd)]
    error = log_probs - torch.tensor(expected, dtype=torch.float64)
    assert (error.abs() < 1e-8).all()
    assert (log_probs <= 0).all()
    assert_same(log_probs.logsumexp(0), torch.zeros(()).double(), atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(sd=st.floats(0, 1e3), mean=st.floats(-1e3, 1e3))
def test_a_third_class_that_never_wins(sd: float, mean: float) -> None:
    two = binary(mean, sd)
    half = torch.tensor([-0.5, 0.5, 0.0], dtype=torch.float64)
    never = torch.tensor([0.0, 0.0, -1e5], dtype=torch.float64)
    three = GaussianLogits(
        (mean * half + never)[None], sd**2 * torch.outer(half, half)[None]
    )
    for integral, bound in [(class_log_probs, 3e-3), (probit, 1e-9)]:
        alone, beside = integral(two).exp(), integral(three).exp()
        assert (beside[:, :2] - alone).abs().max() < bound
        assert_same(beside.sum(-1), torch.ones(1).double(), atol=1e-9)
    exact = class_log_probs(two).exp()
    assert (probit(two).exp() - exact).abs().max() < 0.02


def random_logits(num_classes: int, scale: float) -> GaussianLogits:
    """Two data; covariances of rank C - 1, as the linearised ones are."""
    contrast = torch.eye(num_classes) - 1 / num_classes
    root = scale * contrast @ torch.randn(2, num_classes, num_classes)
    mean = 2 * torch.randn(2, num_classes) @ contrast
    return GaussianLogits(mean.double(), (root @ root.mT).double())


def draws(logits: GaussianLogits, num_samples: int) -> Tensor:
    values, vectors = torch.linalg.eigh(logits.covariance_matrix)
    root = vectors * values.clamp_min(0).sqrt()[:, None]
    noise = torch.randn(num_samples, *logits.mean.shape, 1, dtype=torch.float64)
    return logits.mean + (root @ noise)[..., 0]


@pytest.mark.grid
@pytest.mark.parametrize(("num_classes", "num_samples"), [(3, 200_000), (5, 200_000)])
@pytest.mark.parametrize(
    ("scale", "quasi_monte_carlo"), [(0.1, 1e-4), (1.0, 5e-4), (5.0, 3e-3)]
)
def test_more_classes_against_many_draws(
    num_classes: int, num_samples: int, scale: float, quasi_monte_carlo: float
) -> None:
    logits = random_logits(num_classes, scale)
    log_p = draws(logits, num_samples).log_softmax(-1)
    p = log_p.exp()
    standard_error = p.std(0) / num_samples**0.5
    error = (class_log_probs(logits).exp() - p.mean(0)).abs()
    assert (error < 4 * standard_error + quasi_monte_carlo).all()
    entropy = -(p * log_p).sum(-1)
    standard_error = entropy.std(0) / num_samples**0.5
    error = (expected_entropy(logits) - entropy.mean(0)).abs()
    assert (error < 4 * standard_error + quasi_monte_carlo).all()


def test_more_classes_without_variance_are_the_softmax() -> None:
    logits = random_logits(4, 0.0)
    log_p = logits.mean.log_softmax(-1)
    assert_same(class_log_probs(logits), log_p)
    assert_same(expected_entropy(logits), -(log_p.exp() * log_p).sum(-1))


def test_probabilities_sum_to_one() -> None:
    for logits in (binary(1.0, 2.0), binary(-3.0, 0.4), random_logits(5, 2.0)):
        total = class_log_probs(logits).logsumexp(-1)
        assert_same(total, torch.zeros_like(total), atol=1e-9)


def test_the_same_points_every_time() -> None:
    logits = random_logits(3, 1.0)
    state = torch.get_rng_state()
    first = class_log_probs(logits)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(class_log_probs(logits), first)


@pytest.mark.parametrize("num_classes", [1, 2, 4])
def test_draws_have_the_covariance(num_classes: int) -> None:
    num_samples = 100_000
    root = torch.randn(2, num_classes, max(num_classes - 1, 1), dtype=torch.float64)
    mean = torch.randn(2, num_classes, dtype=torch.float64)
    logits = GaussianLogits(mean, root @ root.mT)
    drawn = logits.rsample((num_samples,)) - mean
    c = logits.covariance_matrix
    covariance = torch.einsum("sbi,sbj->bij", drawn, drawn) / num_samples
    diagonal = c.diagonal(dim1=1, dim2=2)
    standard_error = (
        (diagonal[:, :, None] * diagonal[:, None, :] + c.square()) / num_samples
    ).sqrt()
    assert ((covariance - c).abs() < 5 * standard_error).all()
    assert logits.rsample().shape == (2, num_classes)


def test_float32_logits_are_integrated_in_float64() -> None:
    for logits in (binary(1.0, 2.0), random_logits(3, 1.0)):
        half = GaussianLogits(logits.mean.float(), logits.covariance_matrix.float())
        assert class_log_probs(half).dtype == torch.float64
        assert half.rsample((3,)).dtype == torch.float32
        assert_same(class_log_probs(half), class_log_probs(logits), atol=1e-6)


def test_one_output_has_no_classes() -> None:
    logits = GaussianLogits(torch.zeros(2, 1), torch.ones(2, 1, 1))
    for integral in (class_log_probs, probit, expected_entropy):
        with pytest.raises(ValueError, match=r"no classes.*covariance_matrix"):
            integral(logits)
