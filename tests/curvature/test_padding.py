"""Padding of any amount on either side changes nothing."""

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import pyro_lora as pl
from pyro_lora.curvature.block_gaussian import BlockGaussian
from pyro_lora.curvature.dense_gaussian import DenseGaussian
from pyro_lora.curvature.structures import Structure
from tests.curvature.gauss_newton import CountingTokens, assert_same, laplace, split
from tests.networks import PAD, batch, bert, llama

pytestmark = pytest.mark.untrained

STRUCTURES = [
    pl.structures.KFAC(),
    pl.structures.KFAC(reduce=True),
    pl.structures.KFAC(rank=3),
    pl.structures.EKFAC(),
    pl.structures.Diagonal(),
    pl.structures.Dense(),
]
SEED = 1  # by which rounding leaves gradients at padded tokens; by 0 all are 0


def padded(texts: dict[str, Tensor], left: int, right: int) -> dict[str, Tensor]:
    """More columns of padding; the labels stay."""

    def pad(x: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(x, (left, right), value=value)

    return {
        "input_ids": pad(texts["input_ids"], PAD),
        "attention_mask": pad(texts["attention_mask"], 0),
        "labels": texts["labels"],
    }


def moved_left(texts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same texts with their padding on the other side."""
    lengths = texts["attention_mask"].sum(1)
    width = texts["attention_mask"].shape[1]
    source = (torch.arange(width) + lengths[:, None]) % width
    return {
        "input_ids": texts["input_ids"].gather(1, source),
        "attention_mask": texts["attention_mask"].gather(1, source),
        "labels": texts["labels"],
    }


def with_positions(texts: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a model with absolute positions needs when padding is on the left."""
    positions = (texts["attention_mask"].cumsum(1) - 1).clamp_min(0)
    return {**texts, "position_ids": positions}


def summary(posterior: pl.LaplacePosterior, texts: dict[str, Tensor]) -> Tensor:
    """Evidence, variances, effective number of parameters, linearised covariance."""
    return torch.cat(
        [
            posterior.log_evidence()[None],
            *(value.flatten() for value in posterior.variance().values()),
            posterior.gaussian.effective_parameters()[None],
            posterior.linearized(texts).covariance_matrix.flatten(),
        ]
    )


def eigenvalues(posterior: pl.LaplacePosterior) -> dict[str, Tensor]:
    """Of the Fisher information's blocks."""
    gaussian = posterior.gaussian
    if isinstance(gaussian, BlockGaussian):
        return {site: block.values for site, block in gaussian.blocks.items()}
    assert isinstance(gaussian, DenseGaussian)
    return {"": torch.linalg.eigvalsh(gaussian.fisher)}


@pytest.mark.grid
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("build", [bert, llama])
@pytest.mark.few(2)
def test_right_padding_changes_nothing(
    build: Callable[..., PeftModel], structure: Structure
) -> None:
    torch.manual_seed(SEED)
    lora, texts = pl.lift(build(3)), batch(5, 6, num_labels=3)
    expected = laplace(lora, texts, structure=structure)
    for right in (1, 9):
        more = padded(texts, 0, right)
        posterior = laplace(lora, more, structure=structure)
        assert_same(
            summary(posterior, more), summary(expected, texts), rtol=1e-10, atol=1e-10
        )
        for site, values in eigenvalues(expected).items():
            assert_same(eigenvalues(posterior)[site], values, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.few(3)
def test_left_padding_changes_nothing(structure: Structure) -> None:
    torch.manual_seed(SEED)
    lora, texts = pl.lift(llama(3)), batch(5, 6, num_labels=3)
    expected = laplace(lora, texts, structure=structure)
    for left in (0, 1, 9):
        for with_position_ids in (False, True):
            more = padded(moved_left(texts), left, 0)
            if with_position_ids:
                more = with_positions(more)
            posterior = laplace(lora, more, structure=structure)
            # Rotary tables are float32.
            assert_same(
                summary(posterior, more), summary(expected, texts), rtol=1e-6, atol=1e-6
            )


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.few(2)
def test_each_batch_may_be_padded_in_its_own_way(structure: Structure) -> None:
    torch.manual_seed(SEED)
    lora, texts = pl.lift(llama(2)), batch(6, 6)
    expected = laplace(lora, texts, structure=structure)
    model = pl.models.classification(lora, 6)
    guide = pl.AutoLaplace(
        model, init_loc_fn=lora.init_to_adapter(), structure=structure
    )
    batches = [
        padded(one, 0, 2 * i) if i % 2 else padded(moved_left(one), i, 0)
        for i, one in enumerate(split(texts, 1))
    ]
    posterior = guide.laplace_approximation(batches)
    assert_same(
        summary(posterior, texts), summary(expected, texts), rtol=1e-6, atol=1e-6
    )


def test_tokens_of_padding_are_not_counted() -> None:
    lora, texts = pl.lift(llama(2)), batch(5, 6)

    def counts(texts: dict[str, Tensor]) -> list[int]:
        structure = CountingTokens()
        laplace(lora, texts, structure=structure)
        return structure.counts

    expected = counts(texts)
    assert counts(padded(texts, 3, 7)) == expected
    assert max(expected) == int(texts["attention_mask"].sum())


def test_a_layer_that_a_datum_has_no_use_for_counts_none_of_its_tokens() -> None:
    # One token over and over, without absolute positions: its values are the same at
    # all places, whatever the query; of its gradient rounding is left.
    lora, texts = pl.lift(llama(2, target_modules=["q_proj"])), batch(5, 6)
    same = {name: value.clone() for name, value in texts.items()}
    same["input_ids"][0] = 7
    same["attention_mask"][0] = 1
    found = []
    for rows in (same, {name: value[1:] for name, value in same.items()}):
        structure = CountingTokens()
        laplace(lora, rows, structure=structure)
        found.append(structure.counts)
    more = [a - b for a, b in zip(*found, strict=True)]
    assert sorted(more) == [0, 0, 0, 0, 1]  # A and B of two layers; the head
