"""Chunks of draws, in memory and in a zarr store, against the tree made at once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import arviz_stats
import numpy as np
import pyro
import pytest
import xarray

import pyro_lora as pl
from pyro_lora.export import datatree
from pyro_lora.posteriors.dropout import DropoutPosterior
from tests.predict import models

OUTCOMES = ("posterior_predictive", "prior", "prior_predictive")  # drawn by chunk


def assert_group_allclose(found: Any, expected: Any) -> None:
    """But for rounding: draws run in other forward passes."""
    xarray.testing.assert_allclose(found.ds, expected.ds, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunk_size", [1, 3, 20])
def test_chunks_add_up(chunk_size: int, tmp_path: Path) -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    posterior = models.particles(lora, model, num=4)
    whole = pl.to_datatree(posterior, batches=batches)
    options: Any = {"batches": batches, "chunk_size": chunk_size}
    pyro.set_rng_seed(5)
    parts = pl.to_datatree(posterior, **options)
    pyro.set_rng_seed(5)
    stored = pl.to_datatree(posterior, path=tmp_path / "tree.zarr", **options)
    assert set(stored.children) == set(whole.children)
    for name in whole.children:
        xarray.testing.assert_equal(stored[name].ds, parts[name].ds)
        if name not in OUTCOMES:
            assert_group_allclose(parts[name], whole[name])
    assert [path.name for path in tmp_path.iterdir()] == ["tree.zarr"]
    assert stored["posterior"].attrs["posterior"] == "ParticlePosterior"
    stored.close()


def test_chains_are_cut_along_the_draws(tmp_path: Path) -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    particles = models.jittered(lora, 12)
    chains = {s: x.reshape(3, 4, *x.shape[1:]) for s, x in particles.items()}
    options: Any = {"model": model, "batches": batches}
    whole = pl.to_datatree(chains, **options)
    stored = pl.to_datatree(
        chains, path=tmp_path / "tree.zarr", chunk_size=3, **options
    )
    for name in ("posterior", "log_likelihood", "log_prior", "sample_stats"):
        assert_group_allclose(stored[name], whole[name])
    assert stored["posterior"].sizes["draw"] == 4
    stored.close()


def test_a_laplace_posterior_in_chunks(tmp_path: Path) -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    posterior = models.laplace(lora, model, batches)
    options: Any = {"batches": batches, "num_samples": 30, "chunk_size": 8}
    pyro.set_rng_seed(5)
    parts = pl.to_datatree(posterior, prior_predictive=True, **options)
    pyro.set_rng_seed(5)
    stored = pl.to_datatree(
        posterior, prior_predictive=True, path=tmp_path / "t.zarr", **options
    )
    for name in parts.children:
        xarray.testing.assert_equal(stored[name].ds, parts[name].ds)
    table = arviz_stats.summary(parts, round_to="none")
    again = arviz_stats.summary(stored, round_to="none").loc[table.index]
    np.testing.assert_allclose(again, table, rtol=1e-9)
    stored.close()


def test_one_chunk_is_in_memory_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora, model = models.classifier()
    posterior = models.laplace(lora, model, models.two_batches())
    sizes = []
    of_chunk = datatree.delta_variables

    def spy(loras: Any, weights: Any, mode: Any = None) -> Any:
        sizes.append(next(iter(weights.values())).shape[0])
        return of_chunk(loras, weights, mode)

    monkeypatch.setattr(datatree, "delta_variables", spy)
    tree = pl.to_datatree(
        posterior, num_samples=20, chunk_size=6, path=tmp_path / "t.zarr"
    )
    assert sizes == [6, 6, 6, 6, 6, 6, 2, 2]  # posterior and prior
    values = tree["posterior"]["head.classifier.bias"]
    assert not values.variable._in_memory  # read when asked for
    tree.close()


def test_a_store_is_there_once_it_is_whole(tmp_path: Path) -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    posterior = models.particles(lora, model, num=4)

    class Failing(list[models.Batch]):
        passes = 0

        def __iter__(self) -> Iterator[models.Batch]:
            self.passes += 1
            if self.passes > 4:
                raise RuntimeError("the disk is gone")
            return super().__iter__()

    path = tmp_path / "tree.zarr"
    with pytest.raises(RuntimeError, match="the disk is gone"):
        pl.to_datatree(posterior, batches=Failing(batches), chunk_size=1, path=path)
    assert list(tmp_path.iterdir()) == []
    pl.to_datatree(posterior, batches=batches, chunk_size=1, path=path).close()
    assert [p.name for p in tmp_path.iterdir()] == ["tree.zarr"]


def test_arguments_are_checked(tmp_path: Path) -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    posterior = models.particles(lora, model, num=4)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, found 0"):
        pl.to_datatree(posterior, chunk_size=0)
    with pytest.raises(ValueError, match="4 draws, 3 at a time, take several passes"):
        pl.to_datatree(posterior, batches=iter(batches), chunk_size=3)
    dropout = DropoutPosterior(lora.weights(), (lora,))
    with pytest.raises(ValueError, match="all draws of mc_dropout are the same"):
        pl.to_datatree(dropout, model=model, batches=batches)
    with pytest.raises(ValueError, match="prior_predictive=True takes a pass"):
        pl.to_datatree(posterior, batches=iter(batches), prior_predictive=True)
    for options in ({"prior_predictive": True}, {"method": "sample"}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}= is about groups"):
            pl.to_datatree(posterior, **options)
    once = pl.to_datatree(posterior, batches=iter(batches), chunk_size=4)
    assert once["log_likelihood"].sizes["datum"] == 10
    with pytest.raises(ValueError, match="exists"):
        pl.to_datatree(posterior, path=tmp_path)
