"""Draws in chunks, seeds, numbers of low precision, and memory."""

import gc
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import autoguide
from torch import Tensor
from torch.testing import assert_close

import pyro_lora as pl
from tests import networks
from tests.predict import models


@pytest.mark.parametrize("chunk_size", [1, 3, 11, 50])
def test_chunks_change_nothing(chunk_size: int) -> None:
    lora, model = models.classifier(3)
    batches = models.two_batches(3)
    posterior = models.laplace(lora, model, batches)
    found = []
    for size in (8, chunk_size):
        pyro.set_rng_seed(4)
        found.append(
            pl.predict(posterior, batches, model=model, num_samples=11, chunk_size=size)
        )
    assert_close(found[1].log_probs, found[0].log_probs, rtol=0, atol=1e-10)
    assert_close(found[1].aleatoric_entropy, found[0].aleatoric_entropy)


def test_chunks_bound_what_is_folded() -> None:
    lora, plain = models.classifier()
    at_once = []

    def model(**batch: Any) -> Tensor:
        labels = plain(**batch)
        at_once.append(labels.numel() // len(batch["input_ids"]))
        return labels

    posterior = models.particles(lora, model, num=5)
    pl.predict(posterior, models.two_batches(), model=model, chunk_size=2)
    # The first finds the model's plates, the next two that it keeps draws apart.
    assert at_once == [1, 1, 2, 2, 2, 1, 2, 2, 1]
    with pytest.raises(ValueError, match="chunk_size must be at least 1, found 0"):
        pl.predict(posterior, models.two_batches(), model=model, chunk_size=0)


@pytest.mark.parametrize(
    "family",
    [
        autoguide.AutoNormal,
        autoguide.AutoDiagonalNormal,
        autoguide.AutoLowRankMultivariateNormal,
    ],
)
def test_the_batch_size_changes_nothing_for_stock_guides(family: Any) -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    guide = family(model, init_loc_fn=lora.init_to_adapter())
    guide(**batches[0])
    results = []
    for size in (1, 4, 10):
        pyro.set_rng_seed(1)
        resized = models.resized(batches, size)
        results.append(pl.predict(guide, resized, model=model, num_samples=5).probs)
    for other in results[1:]:
        assert_close(other, results[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "structure", [pl.structures.KFAC(), pl.structures.Diagonal(), pl.structures.Dense()]
)
def test_the_batch_size_changes_nothing_for_linearized_networks(
    structure: Any,
) -> None:
    lora, model = models.classifier(3)
    batches = models.two_batches(3)
    laplace = models.laplace(lora, model, batches, structure)
    mixture = pl.MixturePosterior([laplace, laplace.with_prior_precision(20.0)])
    for posterior in (laplace, mixture):
        results = [
            pl.predict(
                posterior,
                models.resized(batches, size),
                model=model,
                method="linearized",
            )
            for size in (1, 4, 10)
        ]
        for other in results[1:]:
            for name in ("log_probs", "aleatoric_entropy"):
                expected = getattr(results[0], name)
                assert_close(getattr(other, name), expected, rtol=0, atol=1e-10)


def test_networks_in_bfloat16() -> None:
    lora, model = models.classifier(3, networks.bert(3, dtype=torch.bfloat16))
    batches = models.two_batches(3)
    posterior = models.particles(lora, model)
    found = pl.predict(posterior, batches, model=model)
    assert found.log_probs.dtype == torch.float64
    total = found.log_probs.logsumexp(-1)
    assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-12)
    each = torch.stack(
        [
            torch.cat(
                [
                    models.logits_at(lora, models.draw(posterior.particles, s), b)
                    for b in batches
                ]
            ).float()
            for s in range(3)
        ]
    )
    expected = each.log_softmax(-1).logsumexp(0) - torch.tensor(3.0).log()
    # Logits have eight bits, and rounding depends on how draws are folded.
    scale = float(each.abs().max())
    assert_close(found.log_probs.float(), expected, rtol=0, atol=scale * 2**-6)


def live_numbers() -> int:
    """How many numbers are in tensors that something refers to."""
    gc.collect()
    tensors = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for x in gc.get_objects()
        if type(x) is Tensor
    }
    return sum(tensors.values()) // 8


@pytest.mark.parametrize("method", ["sample", "linearized"])
def test_memory_is_that_of_the_results(method: Any) -> None:
    lora, model = models.classifier()
    batch = networks.batch(8)
    posterior = models.laplace(lora, model, models.two_batches())
    before: list[int] = []

    def batches() -> Iterator[dict[str, Tensor]]:
        for _ in range(5):
            before.append(live_numbers())
            yield batch

    with models.only_new_objects():
        pl.predict(posterior, batches(), model=model, method=method, num_samples=4)
    # A batch leaves 8 log-probability pairs and 8 entropies, by draws the mode's, too,
    # and its 8 labels.
    growth = [b - a for a, b in pairwise(before[1:])]
    assert all(0 < g <= 8 * 7 for g in growth)


def test_a_progress_bar_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    lora, model = models.classifier()
    posterior = models.particles(lora, model)
    pl.predict(posterior, models.two_batches(), model=model)
    assert "Predict" not in capsys.readouterr().err
    pl.predict(posterior, models.two_batches(), model=model, progress_bar=True)
    assert "Predict" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind", ["AutoNormal", "AutoDelta", "AutoLowRankMultivariateNormal"]
)
def test_stock_guides_that_start_anywhere(kind: str) -> None:
    """With their own way to start, which they wrap the model in."""
    lora = pl.lift(networks.bert(3))
    model = pl.models.classification(lora, 5)
    texts = networks.batch(5, num_labels=3)
    guide = getattr(autoguide, kind)(model)
    guide(**texts)
    found = pl.predict(guide, [networks.inputs(texts)], num_samples=2)
    assert found.probs.shape == (5, 3)
    assert pl.diagnose(guide, [texts], num_samples=25).confidence is not None
