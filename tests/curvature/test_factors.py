"""Factors, ours or a user's own: they add up by tensor, on one process and on many."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pyro_lora as pl
from pyro_lora.curvature.data_sums import DataSums, over_ranks
from pyro_lora.curvature.factors import RowFactors, RowSample
from pyro_lora.curvature.structures import DiagonalFactors, KroneckerFactors
from pyro_lora.ground.tensor_folder import manifest_digest
from tests.curvature.gauss_newton import brute_force, laplace, split
from tests.curvature.own_structures import LayerDense, OwnFactors, Squares
from tests.networks import batch, bert

pytestmark = pytest.mark.untrained
KINDS: dict[Any, list[str]] = {
    KroneckerFactors: ["a", "g", "count"],
    DiagonalFactors: ["diagonal"],
    Squares: ["a", "n"],
}


class InThreads:
    """Ranks that are threads, and sums in place, as all_reduce's are."""

    def __init__(self, size: int) -> None:
        self.size, self._barrier = size, threading.Barrier(size, timeout=20)
        self._slots: list[Any] = [None] * size
        self._rank = threading.local()

    def join(self, rank: int) -> None:
        self._rank.number = rank

    def collected(self, value: Any) -> list[Any]:
        self._slots[self._rank.number] = value
        self._barrier.wait()
        found = list(self._slots)
        self._barrier.wait()
        return found

    def sum(self, x: Tensor) -> Tensor:
        return x.copy_(sum(self.collected(x.clone())))

    def total(self, number: int) -> int:
        return sum(self.collected(number))


def made(kind: Any, num_places: int, draw: Any) -> DataSums:
    """Sums of some places, of which some have the same tensors."""
    pool = {
        name: [torch.randn(2, 2, dtype=torch.float64) for _ in range(num_places)]
        for name in KINDS[kind]
    }
    which = st.integers(0, num_places - 1)
    factors = {
        i: kind(**{name: xs[draw(which)] for name, xs in pool.items()})
        for i in range(num_places)
    }
    return DataSums(factors, {"w": [torch.randn(3)]}, torch.randn(()).double(), 2, 1)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_sums_over_ranks_are_of_each_field(data: Any) -> None:
    """Whatever fields are called, whatever tensors places share, on whichever rank."""
    kind, size = data.draw(st.sampled_from(list(KINDS))), data.draw(st.integers(2, 3))
    num_places, keep = data.draw(st.integers(1, 4)), data.draw(st.booleans())
    some = [made(kind, num_places, data.draw) for _ in range(size)]
    own = [x if data.draw(st.booleans()) else None for x in some[1:]]
    of_ranks = [some[0], *own]
    there = [x for x in of_ranks if x is not None]
    expected = {
        (i, name): sum(vars(x.factors[i])[name].clone() for x in there)
        for i in range(num_places)
        for name in KINDS[kind]
    }
    before = [[y.clone() for y in x.named().values()] for x in there]
    ranks = InThreads(size)

    def of_rank(rank: int) -> DataSums:
        ranks.join(rank)
        device = torch.device("cpu")
        return over_ranks(ranks, of_ranks[rank], device, keep)  # type: ignore[arg-type]

    with ThreadPoolExecutor(size) as pool:
        for found in pool.map(of_rank, range(size)):
            for (i, name), value in expected.items():
                torch.testing.assert_close(vars(found.factors[i])[name], value)
            assert (found.num_data, found.num_rows) == (2 * len(there), len(there))
    if keep:
        after = [list(x.named().values()) for x in there]
        assert all(map(torch.equal, chain(*before), chain(*after)))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_batches_add_up_in_each_field(data: Any) -> None:
    kind, num_places = data.draw(st.sampled_from(list(KINDS))), 4
    sums = made(kind, num_places, data.draw)
    fields = [(i, name) for i in range(num_places) for name in KINDS[kind]]
    expected = {(i, name): vars(sums.factors[i])[name] for i, name in fields}
    for _ in range(data.draw(st.integers(1, 3))):
        new = made(kind, num_places, data.draw)
        expected = {
            (i, name): x + vars(new.factors[i])[name]
            for (i, name), x in expected.items()
        }
        sums.add_factors(new.factors)
    for (i, name), value in expected.items():
        assert torch.equal(vars(sums.factors[i])[name], value)


def test_rows_come_in_the_ranks_order() -> None:
    ranks, device = InThreads(2), torch.device("cpu")
    sample = [RowSample(torch.rand(2, 3), torch.rand(2).double(), torch.tensor(3))] * 2
    rows = [RowFactors((torch.rand(2, 3),)) for _ in range(2)]

    def of_rank(rank: int) -> DataSums:
        ranks.join(rank)
        factors: Any = {0: rows[rank], 1: sample[rank]}
        own = DataSums(factors, {}, torch.zeros(()).double(), 2)
        return over_ranks(ranks, own, device)  # type: ignore[arg-type]

    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(of_rank, range(2)):
            kept: Any = found.factors
            of_ranks = chain(*(x.batches for x in rows))
            assert all(map(torch.equal, kept[0].batches, of_ranks))
            assert len(kept[0].batches) == 2
            assert len(kept[1].values) == 3


def test_layers_of_dense_blocks() -> None:
    lora, texts = pl.lift(bert(3)), batch(6, num_labels=3)
    fitted: Any = laplace(lora, texts, 4, structure=LayerDense())
    exact, found = brute_force(lora, texts, 1.0).fisher, fitted.gaussian.fisher
    same = (found == 0) | ((found - exact).abs() < 1e-8)
    assert bool(same.all())
    torch.testing.assert_close(found.diag(), exact.diag(), rtol=1e-8, atol=1e-8)


def test_factors_that_are_none_are_refused() -> None:
    @dataclass(frozen=True)
    class Plain:
        a: Tensor

    class Bare(LayerDense):
        def combine(self, inputs: Tensor, gradients: Tensor) -> Any:
            return Plain(gradients)

    lora, texts = pl.lift(bert(3)), batch(6, num_labels=3)
    with pytest.raises(ValueError, match=r"Bare.combine returned Plain.*SummedFactors"):
        laplace(lora, texts, structure=Bare())


def test_without_eigenvalues_a_structure_needs_a_gaussian() -> None:
    class WithoutGaussian(pl.structures.LayerStructure):
        def input_factor(self, a: Tensor, counts: Any) -> Tensor:
            return a

        def gradient_factor(self, inputs: Any, g: Tensor, counts: Any) -> Tensor:
            return LayerDense().gradient_factor(inputs, g, counts)

        def combine(self, inputs: Any, gradients: Tensor) -> Any:
            return LayerDense().combine(inputs, gradients)

    lora, texts = pl.lift(bert(3)), batch(6, num_labels=3)
    with pytest.raises(ValueError, match=r"DenseFactors have no.*WithoutGaussian a me"):
        laplace(lora, texts, structure=WithoutGaussian())


class PowerCutError(Exception):
    pass


def test_a_kind_that_isnt_there_is_refused(tmp_path: Path) -> None:
    lora, batches = pl.lift(bert(3)), split(batch(6, num_labels=3), 3)
    model = pl.models.classification(lora, 6)
    guide = pl.AutoLaplace(
        model, init_loc_fn=lora.init_to_adapter(), structure=OwnFactors()
    )

    guide.laplace_approximation(batches)  # sets the guide up

    def cut() -> Any:
        yield batches[0]
        raise PowerCutError

    with pytest.raises(PowerCutError):
        guide.laplace_approximation(cut(), checkpoint=tmp_path)
    file = tmp_path / "fisher" / "manifest.json"
    manifest = json.loads(file.read_text())
    assert {*manifest["factors"].values()} == {f"{Squares.__module__}.Squares"}
    for name in ("os.system", "pyro_lora.curvature.factors.SummedFactors"):
        manifest["factors"]["1"] = name
        manifest["manifest_sha256"] = manifest_digest(manifest)
        file.write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=rf"nothing is known of.*{name}"):
            guide.laplace_approximation(batches, checkpoint=tmp_path)
