"""KFAC of low rank: the sketch, the posterior, what it costs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pyro_lora as pl
from pyro_lora.curvature.block_gaussian import BlockGaussian, eigenblocks
from pyro_lora.curvature.structures import KroneckerFactors, Structure
from tests.curvature.gauss_newton import (
    assert_same,
    blocks,
    brute_force,
    flatten,
    laplace,
    precision_matrix,
    split,
)
from tests.curvature.test_cost import LargestTensor
from tests.networks import batch, bert

pytestmark = pytest.mark.untrained

STRUCTURES = [pl.structures.KFAC(), pl.structures.KFAC(reduce=True)]


def decaying(num_tokens: int, width: int, power: float) -> Tensor:
    """Layer inputs whose j-th singular value goes as j to minus the power."""
    x = torch.randn(1, num_tokens, width, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q
    return x * torch.arange(1, width + 1) ** -power @ basis


def low_rank_factor(a: Tensor, rank: int, split_at: int | None = None) -> Tensor:
    """The factor A / n of `rank` that a fit finds for inputs (1, T, I), dense."""
    g = torch.ones(1, *a.shape[:2], 1, dtype=a.dtype)
    parts = [slice(None)]
    if split_at is not None:
        parts = [slice(split_at), slice(split_at, None)]
    first, *rest = (pl.structures.KFAC(rank=rank)(a[:, p], g[:, :, p]) for p in parts)
    total = sum(rest, first)
    block = eigenblocks([total])
    assert block.columns is not None
    u = block.columns[0]
    assert u.shape == (a.shape[-1], rank)
    assert_same(u.mT @ u, torch.eye(rank, dtype=a.dtype))
    return u * (block.values[0, 0] / g.sum()) @ u.mT


@pytest.mark.parametrize("split_at", [None, 3])
@pytest.mark.parametrize("rank", [3, 5])
def test_a_factor_of_no_higher_rank_is_exact(rank: int, split_at: int | None) -> None:
    a = torch.randn(1, 9, 3, dtype=torch.float64) @ torch.randn(3, 20).double()
    expected = a[0].mT @ a[0] / 9
    assert_same(low_rank_factor(a, rank, split_at), expected, rtol=1e-8, atol=1e-10)


def test_no_tokens_give_no_information() -> None:
    assert low_rank_factor(torch.zeros(1, 4, 20).double(), 3).abs().max() == 0


@pytest.mark.parametrize("power", [0.25, 1.0, 2.0])
@pytest.mark.parametrize("rank", [4, 16])
def test_the_error_is_within_the_bound(rank: int, power: float) -> None:
    width, ratios = 100, []
    for seed in range(20):
        torch.manual_seed(seed)
        a = decaying(300, width, power)
        full = a[0].mT @ a[0] / 300
        lost = full - low_rank_factor(a, rank)
        # Nothing is added anywhere: the posterior is nowhere too narrow.
        assert torch.linalg.eigvalsh(lost).min() > -1e-10 * full.trace()
        least = torch.linalg.eigvalsh(full)[:-rank].sum()
        ratios.append(float(lost.trace() / least))
    ratio = torch.tensor(ratios)
    standard_error = ratio.std() / len(ratio) ** 0.5
    assert ratio.min() > 1 - 1e-9
    assert ratio.mean() + 4 * standard_error < 2


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_any_split_gives_the_same(structure: Any, batch_size: int) -> None:
    lora, texts = pl.lift(bert(3)), batch(7, num_labels=3)
    low_rank = replace(structure, rank=4)
    expected = laplace(lora, texts, structure=low_rank)
    posterior = laplace(lora, texts, batch_size, structure=low_rank)
    assert_same(posterior.log_evidence(), expected.log_evidence(), rtol=1e-8)
    for site, value in expected.variance().items():
        assert_same(posterior.variance()[site], value, rtol=1e-7)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_with_enough_rank_nothing_changes(structure: Any) -> None:
    lora, texts = pl.lift(bert(3)), batch(5, num_labels=3)
    expected = laplace(lora, texts, structure=structure)
    posterior = laplace(lora, texts, structure=replace(structure, rank=8))  # width 16
    assert torch.equal(posterior.log_evidence(), expected.log_evidence())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_method_is_that_of_the_dense_matrix(structure: Any) -> None:
    lora, texts = pl.lift(bert(3)), batch(6, num_labels=3)
    fitted = laplace(lora, texts, structure=replace(structure, rank=2))
    tau = {"head": 0.6}
    posterior = fitted.with_prior_precision(
        {s: tau.get(s.split(".")[0], 0.3) for s in lora.sites}
    )
    gaussian = posterior.gaussian
    assert isinstance(gaussian, BlockGaussian)
    size = len(flatten(lora.weights()))
    precision = torch.zeros(size, size, dtype=torch.float64)
    num_thin = 0
    for site, layer, place in blocks(lora):
        block = gaussian.blocks[site]
        assert block.rows is not None
        assert block.columns is not None
        u = torch.kron(block.rows[layer], block.columns[layer])
        shift = tau.get(site.split(".")[0], 0.3)
        identity = torch.eye(len(u), dtype=torch.float64)
        precision[place, place] = u * block.values[layer].flatten() @ u.mT
        precision[place, place] += shift * identity
        num_thin += u.shape[1] < u.shape[0]
    assert num_thin >= len(lora.sites) - 2
    covariance = torch.linalg.inv(precision)

    assert_same(precision_matrix(posterior), precision)
    assert_same(flatten(posterior.variance()), covariance.diag())
    mode = flatten(posterior.mode())
    expected = torch.distributions.MultivariateNormal(mode, covariance)
    draws = posterior.sample(3)
    flat = torch.cat([draws[s].flatten(1) for s in lora.sites], 1)
    assert_same(posterior.log_prob(draws), expected.log_prob(flat))
    log_evidence = (
        posterior.log_likelihood + posterior.log_prior - expected.log_prob(mode)
    )
    assert_same(posterior.log_evidence(), log_evidence)
    fisher = precision - torch.diag(
        flatten({s: t.expand_as(lora.weights()[s]) for s, t in tau_of(posterior)})
    )
    assert_same(gaussian.effective_parameters(), (fisher @ covariance).trace())
    j = brute_force(lora, texts, 1.0).jacobian
    j = j - j.mean(1, keepdim=True)
    assert_same(posterior.linearized(texts).covariance_matrix, j @ covariance @ j.mT)
    normal = gaussian.pyro_sample({})
    assert {s: x.shape for s, x in normal.items()} == {
        s: x.shape for s, x in lora.weights().items()
    }


def tau_of(posterior: pl.LaplacePosterior) -> list[tuple[str, Tensor]]:
    return list(posterior.prior_precision.items())


def test_draws_have_the_covariance() -> None:
    lora, texts = pl.lift(bert(3, num_layers=1)), batch(6, num_labels=3)
    posterior = laplace(lora, texts, structure=pl.structures.KFAC(rank=2))
    covariance = torch.linalg.inv(precision_matrix(posterior))
    num_samples = 20_000
    draws = posterior.sample(num_samples)
    centred = torch.cat([draws[s].flatten(1) for s in lora.sites], 1)
    centred = centred - flatten(posterior.mode())
    found = centred.mT @ centred / num_samples
    diagonal = covariance.diag()
    # Isserlis: the variance of x_i x_j is c_ii c_jj + c_ij^2.
    variance = diagonal[:, None] * diagonal + covariance.square()
    assert ((found - covariance).abs() < 6 * (variance / num_samples).sqrt()).all()


def test_it_is_nowhere_narrower_than_the_full_structure() -> None:
    lora, texts = pl.lift(bert(3)), batch(6, num_labels=3)
    full = precision_matrix(laplace(lora, texts))
    smallest, errors = [], []
    for rank in (1, 3, 6):
        structure = pl.structures.KFAC(rank=rank)
        lost = full - precision_matrix(laplace(lora, texts, structure=structure))
        smallest.append(float(torch.linalg.eigvalsh(lost).min()))
        errors.append(float(lost.trace() / full.trace()))
    assert min(smallest) > -1e-9 * float(full.trace())
    assert errors[0] > 5 * errors[2] > 0


def test_it_survives_saving(tmp_path: Path) -> None:
    lora, texts = pl.lift(bert(3)), batch(6, num_labels=3)
    posterior = laplace(lora, texts, structure=pl.structures.KFAC(rank=2))
    pl.save(posterior, tmp_path / "posterior")
    loaded: Any = pl.load(tmp_path / "posterior", lora, model=posterior.model)
    assert torch.equal(loaded.log_evidence(), posterior.log_evidence())
    for site, value in posterior.variance().items():
        assert torch.equal(loaded.variance()[site], value)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_no_square_of_the_width_is_formed(structure: Any) -> None:
    width, rank = 192, 8
    lora = pl.lift(bert(3, hidden_size=width, num_layers=1))
    texts = batch(4, 5, num_labels=3)
    low_rank: Structure = replace(structure, rank=rank)
    # The network's own weights are width x width: count what the structure makes.
    a = torch.randn(4, 5, width, dtype=torch.float64)
    g = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    with LargestTensor() as largest:
        factors: Any = low_rank(a, g)  # type: ignore[call-arg, arg-type]
        eigenblocks([factors + factors])
    assert width * (2 * rank + 1) <= largest.numel < width**2 / 4
    posterior = laplace(lora, texts, 2, structure=low_rank)
    with LargestTensor() as largest:
        posterior.log_prob(posterior.sample(2))
        posterior.variance()
        posterior.optimize_prior(per="layer").log_evidence()
        posterior()
    assert 0 < largest.numel < width**2 / 4


def test_prior_tuning_by_evidence_and_by_held_out_data() -> None:
    lora, texts = pl.lift(bert(3)), batch(8, num_labels=3)
    posterior = laplace(lora, texts, structure=pl.structures.KFAC(rank=3))
    tuned = posterior.optimize_prior(per="site")
    for factor in (0.8, 1.25):
        other = {s: factor * t for s, t in tuned.prior_precision.items()}
        assert posterior.with_prior_precision(other).log_evidence() < (
            tuned.log_evidence()
        )
    held_out = posterior.optimize_prior(objective="nll", batches=split(texts, 4))
    assert float(held_out.log_evidence()) < float(tuned.log_evidence())


def test_factors_say_what_they_are() -> None:
    a, g = torch.randn(2, 3, 20), torch.randn(1, 2, 3, 4)
    factors = pl.structures.KFAC(rank=3)(a, g)
    assert isinstance(factors, KroneckerFactors)
    assert (factors.a.shape, factors.g.shape) == ((20, 7), (4, 4))
    for rank in (0, -1):
        with pytest.raises(ValueError, match="must be at least 1"):
            pl.structures.KFAC(rank=rank)(a, g)
