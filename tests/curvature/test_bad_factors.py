"""Factors that are no sums of squares are refused, never replaced."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import pyro_lora as pl
from pyro_lora.curvature.block_gaussian import eigenblocks
from pyro_lora.curvature.dense_gaussian import DenseGaussian
from pyro_lora.curvature.structures import (
    KFAC,
    Diagonal,
    DiagonalFactors,
    KroneckerFactors,
    LayerStructure,
)
from tests.curvature.gauss_newton import flatten, laplace, unflatten
from tests.networks import batch, bert

pytestmark = pytest.mark.untrained

Change = Callable[[Tensor], Tensor]
EYE = torch.eye(16, dtype=torch.float64)


@dataclass(frozen=True)
class Changed(LayerStructure):
    """KFAC with other factors for layers of 16 inputs."""

    of_inputs: Change
    of_gradients: Change
    rank: int | None = None

    def input_factor(self, a: Tensor, counts: Any) -> Any:
        wide = a.shape[-1] == 16
        return *KFAC(rank=self.rank).input_factor(a, counts), wide

    def gradient_factor(self, inputs: Any, g: Tensor, counts: Any) -> Tensor:
        return KFAC(rank=self.rank).gradient_factor(inputs, g, counts)

    def combine(self, inputs: Any, gradients: Tensor) -> KroneckerFactors:
        a, count, wide = inputs
        if not wide:
            return KroneckerFactors(a, gradients, count)
        return KroneckerFactors(self.of_inputs(a), self.of_gradients(gradients), count)


@dataclass(frozen=True)
class ChangedDiagonal(LayerStructure):
    change: Change

    def input_factor(self, a: Tensor, counts: Any) -> Tensor:
        return a

    def gradient_factor(self, inputs: Tensor, g: Tensor, counts: Any) -> Tensor:
        return Diagonal().gradient_factor(inputs, g, counts)

    def combine(self, inputs: Tensor, gradients: Tensor) -> DiagonalFactors:
        return DiagonalFactors(self.change(gradients))


def same(x: Tensor) -> Tensor:
    return x


def sketch_of_negative(x: Tensor) -> Tensor:
    return -x


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (
            Changed(lambda a: a - 1e-3 * a.trace() * EYE, same),
            r"layer 0: the factor of its inputs has eigenvalues from -.*structure",
        ),
        (
            Changed(same, lambda g: -g),
            r"layer 0: the factor of its gradients has eigenvalues from -",
        ),
        (Changed(lambda a: a * torch.nan, same), "inputs has NaN or infinite"),
        (Changed(same, lambda g: g / 0), "gradients has NaN or infinite"),
        (Changed(lambda a: a + a.triu(1), same), "inputs isn't symmetric"),
        (Changed(sketch_of_negative, same, rank=2), "inputs has eigenvalues from -"),
        # A matrix of another form, which would be read as a sketch.
        (Changed(lambda a: a[:, :5], same), "inputs isn't symmetric"),
        (
            ChangedDiagonal(lambda x: x - 50),
            r"layer 0: the diagonal has values from -50 to .*not negative",
        ),
        (
            ChangedDiagonal(lambda x: x / 0),
            "layer 0: the diagonal has values",
        ),
    ],
)
def test_factors_of_a_users_structure(structure: Any, message: str) -> None:
    lora, texts = pl.lift(bert(3)), batch(5, num_labels=3)
    with pytest.raises(ValueError, match=rf"Site 'lora\.bert.*{message}"):
        laplace(lora, texts, structure=structure)


def test_rounding_is_no_error() -> None:
    # Sums in float32 of data that span 3 of 40 dims: eigenvalues of -1e-6.
    a = torch.randn(1, 4000, 3) @ torch.randn(3, 40)
    found = pl.structures.KFAC()(a, torch.randn(1, 1, 4000, 2))
    assert torch.linalg.eigvalsh(found.a.double()).min() < 0
    for rank in (None, 5):
        factors = pl.structures.KFAC(rank=rank)(a, torch.randn(1, 1, 4000, 2))
        assert (eigenblocks([factors]).values >= 0).all()


def test_no_information_is_the_prior() -> None:
    lora, texts = pl.lift(bert(3)), batch(5, num_labels=3)
    nothing = Changed(torch.zeros_like, torch.zeros_like)
    posterior = laplace(lora, texts, structure=nothing)
    for site, value in posterior.variance().items():
        wide = value.shape[-1] == 16
        assert torch.equal(value, torch.ones_like(value)) == wide, site


EVALUATIONS: dict[str, Callable[[pl.LaplacePosterior], Any]] = {
    "evidence": lambda q: q.log_evidence(),
    "draws": lambda q: q.sample(2),
    "density": lambda q: q.log_prob(q.mode()),
    "variances": lambda q: q.variance(),
    "tuning": lambda q: q.optimize_prior(),
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_a_dense_precision_that_is_not_positive_definite(name: str) -> None:
    lora, texts = pl.lift(bert(3, hidden_size=8)), batch(5, num_labels=3)
    posterior = laplace(lora, texts, structure=pl.structures.Dense())
    gaussian = posterior.gaussian
    assert isinstance(gaussian, DenseGaussian)
    # Symmetric, of a positive diagonal, and -300 along one direction.
    ones = torch.ones_like(gaussian.fisher)
    fisher = gaussian.fisher - ones + 2 * ones.diagonal().diag()
    broken = replace(posterior, gaussian=replace(gaussian, fisher=fisher))
    with pytest.raises(ValueError, match=r"isn't positive definite; its.*float64"):
        EVALUATIONS[name](broken)


def test_an_ill_conditioned_dense_precision() -> None:
    # Condition number 1e15: a root of the covariance itself would fail.
    lora, texts = pl.lift(bert(3, hidden_size=8)), batch(5, num_labels=3)
    posterior = laplace(lora, texts, structure=pl.structures.Dense())
    gaussian = posterior.gaussian
    assert isinstance(gaussian, DenseGaussian)
    size = len(gaussian.fisher)
    values = torch.logspace(-7, 8, size, dtype=torch.float64)
    broken = replace(posterior, gaussian=replace(gaussian, fisher=values.diag()))
    changed = broken.with_prior_precision(1e-8)
    expected = 1 / (values + 1e-8)
    torch.testing.assert_close(flatten(changed.variance()), expected, rtol=1e-9, atol=0)
    step = unflatten(expected.sqrt(), posterior.mode())
    at = {site: x + step[site] for site, x in posterior.mode().items()}
    lost = changed.log_prob(posterior.mode()) - changed.log_prob(at)
    assert float(lost) == pytest.approx(size / 2, rel=1e-9)
