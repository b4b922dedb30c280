"""EKFAC: true second moments in the Kronecker eigenbasis, by a second pass."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import pyro_lora as pl
from pyro_lora.curvature.block_gaussian import BlockGaussian
from tests.curvature.gauss_newton import (
    assert_same,
    blocks,
    brute_force,
    flatten,
    laplace,
    precision_matrix,
    split,
)
from tests.networks import batch, bert, llama

pytestmark = pytest.mark.untrained

Build = Callable[..., PeftModel]


def eigenbasis(posterior: pl.LaplacePosterior, site: str, layer: int) -> Tensor:
    """U_G kron U_A over row-major weights, dense."""
    gaussian = posterior.gaussian
    assert isinstance(gaussian, BlockGaussian)
    block = gaussian.blocks[site]
    assert block.rows is not None
    assert block.columns is not None
    return torch.kron(block.rows[layer], block.columns[layer])


@pytest.mark.grid
@pytest.mark.parametrize("num_labels", [2, 3])
@pytest.mark.parametrize("build", [bert, llama])
@pytest.mark.few(1)
def test_it_is_the_exact_diagonal_in_the_eigenbasis_of_kfac_expand(
    build: Build, num_labels: int
) -> None:
    lora, texts = pl.lift(build(num_labels)), batch(6, num_labels=num_labels)
    kfac = laplace(lora, texts, 4)
    precision = precision_matrix(
        laplace(lora, texts, 4, structure=pl.structures.EKFAC())
    )
    exact = brute_force(lora, texts, 1.0).fisher
    tolerance = 1e-6 if build is llama else 1e-9  # Llama's norms compute in float32
    for site, layer, place in blocks(lora):
        u = eigenbasis(kfac, site, layer)
        moments = (u.mT @ exact[place, place] @ u).diag()
        expected = u * (moments + 1) @ u.mT
        scale = max(float(expected.max()), 1.0)
        message = f"{site} {layer}"
        assert_same(
            precision[place, place], expected, atol=tolerance * scale, msg=message
        )


def test_it_is_nearer_to_the_exact_blocks_than_kfac() -> None:
    lora, texts = pl.lift(bert(3)), batch(8, num_labels=3)
    exact = brute_force(lora, texts, 1.0).fisher

    def error(structure: Any) -> float:
        precision = precision_matrix(laplace(lora, texts, structure=structure))
        return sum(
            float(
                (precision - exact)[place, place]
                .sub(torch.eye(place.stop - place.start))
                .square()
                .sum()
            )
            for _, _, place in blocks(lora)
        )

    assert error(pl.structures.EKFAC()) < error(pl.structures.KFAC())


def test_one_token_of_one_datum_gives_the_exact_blocks() -> None:
    lora = pl.lift(bert(3))
    texts = {
        "input_ids": torch.tensor([[7]]),
        "attention_mask": torch.ones(1, 1, dtype=torch.long),
        "labels": torch.tensor([1]),
    }
    precision = precision_matrix(laplace(lora, texts, structure=pl.structures.EKFAC()))
    exact = brute_force(lora, texts, 1.0).fisher
    for site, layer, place in blocks(lora):
        identity = torch.eye(place.stop - place.start, dtype=exact.dtype)
        assert_same(
            precision[place, place],
            exact[place, place] + identity,
            msg=f"{site} {layer}",
        )


def test_a_second_pass_over_a_generator_is_refused() -> None:
    lora, texts = pl.lift(bert(3)), batch(6, num_labels=3)
    guide = pl.AutoLaplace(
        pl.models.classification(lora, 6),
        init_loc_fn=lora.init_to_adapter(),
        structure=pl.structures.EKFAC(),
    )
    expected = guide.laplace_approximation(split(texts, 3))  # this sets the guide up
    with pytest.raises(ValueError, match=r"EKFAC\(\) takes 2 passes.*DataLoader"):
        guide.laplace_approximation(b for b in split(texts, 3))
    loader: Any = torch.utils.data.DataLoader(
        [{k: v[i] for k, v in texts.items()} for i in range(6)], batch_size=4
    )
    posterior = guide.laplace_approximation(loader, progress_bar=True)
    assert_same(posterior.log_evidence(), expected.log_evidence())


def test_evidence_prior_and_prediction_are_those_of_the_dense_matrix() -> None:
    lora, texts = pl.lift(bert(3)), batch(6, num_labels=3)
    posterior = laplace(
        lora, texts, structure=pl.structures.EKFAC()
    ).with_prior_precision(0.3)
    one = laplace(lora, texts, structure=pl.structures.EKFAC())
    shift = torch.eye(len(flatten(lora.weights())), dtype=torch.float64)
    precision = precision_matrix(one) - 0.7 * shift
    assert_same(precision_matrix(posterior), precision)
    exact = brute_force(lora, texts, 0.3)
    log_det = torch.logdet(exact.fisher + 0.3 * shift) - torch.logdet(precision)
    assert_same(posterior.log_evidence(), exact.log_evidence + 0.5 * log_det)
    assert_same(
        flatten(posterior.variance()), torch.linalg.inv(precision).diag(), rtol=1e-8
    )
    j = exact.jacobian - exact.jacobian.mean(1, keepdim=True)
    expected = j @ torch.linalg.inv(precision) @ j.mT
    assert_same(posterior.linearized(texts).covariance_matrix, expected, rtol=1e-8)


def test_it_survives_saving(tmp_path: Path) -> None:
    lora, texts = pl.lift(bert(3)), batch(6, num_labels=3)
    posterior = laplace(lora, texts, structure=pl.structures.EKFAC())
    pl.save(posterior, tmp_path / "posterior")
    loaded: Any = pl.load(tmp_path / "posterior", lora, model=posterior.model)
    assert torch.equal(loaded.log_evidence(), posterior.log_evidence())
    for site, value in posterior.variance().items():
        assert torch.equal(loaded.variance()[site], value)
