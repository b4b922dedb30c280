"""Posteriors over whatever can be lifted go to ArviZ and to disk, and come back."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor

import pyro_lora as pl
from tests.lifting.liftable import TABLE
from tests.lifting.liftable_oracle import built
from tests.lifting.liftable_row import Row
from tests.networks import particles

ROWS = [
    pytest.param(row, id=f"{row.group} / {row.name}")
    for row in TABLE
    if not (row.refused or row.raises)
]


def posterior_of(row: Row) -> pl.ParticlePosterior:
    lora = pl.lift(built(row), **row.lift)
    return pl.ParticlePosterior(particles(lora, 2), (lora,), None, "y")


def frobenius_norms(lora: pl.LiftedNetwork, weights: dict[str, Tensor]) -> Tensor:
    """PEFT's own update of each layer that has one of full size, by its norm."""
    own = lora.weights()
    lora.load(weights)
    norms = [
        layer.get_delta_weight(lora.adapter).norm()
        for path, layer in lora.network.named_modules()
        if path in lora.delta_weight_factors(weights)
    ]
    lora.load(own)
    return torch.stack(norms).sort().values


@pytest.mark.parametrize("row", ROWS)
def test_the_tree_holds_every_site(row: Row, tmp_path: Path) -> None:
    posterior = posterior_of(row)
    (lora,) = posterior.loras
    raw = pl.to_datatree(posterior, weights="raw")["posterior"]
    assert set(raw.data_vars) == set(lora.sites)
    for site, value in posterior.particles.items():
        found = raw[site].values[0]
        assert np.array_equal(found.reshape(value.shape), value.numpy())
    tree = pl.to_datatree(posterior)["posterior"]
    factors = lora.delta_weight_factors(posterior.particles)
    if factors:
        norms = [
            x.values[0, 1].ravel()
            for name, x in tree.data_vars.items()
            if str(name).startswith("delta.") and str(name).endswith("frobenius_norm")
        ]
        expected = torch.stack([(b @ a)[1].norm() for b, a in factors.values()])
        assert np.allclose(
            np.sort(np.concatenate(norms)), expected.sort().values, rtol=1e-6
        )
    pl.save(posterior, tmp_path / "posterior")
    loaded: Any = pl.load(tmp_path / "posterior", lora)
    for site, value in posterior.particles.items():
        assert torch.equal(loaded.particles[site], value)


@pytest.mark.parametrize(
    "row", [p for p in ROWS if p.values[0].group.startswith("LoRA")]
)
def test_the_updates_are_those_of_peft(row: Row) -> None:
    posterior = posterior_of(row)
    (lora,) = posterior.loras
    weights = {site: value[0] for site, value in posterior.particles.items()}
    factors = lora.delta_weight_factors(weights)
    for path, layer in lora.network.named_modules():
        other = not isinstance(layer, LoraLayer) or lora.adapter not in layer.r
        one = not (other or isinstance(layer, ParamWrapper))
        assert path in factors or not one or "grouped" in path
    if factors:
        expected = torch.stack([(b @ a).norm() for b, a in factors.values()])
        found = frobenius_norms(lora, weights)
        assert torch.allclose(found.double(), expected.sort().values.double())
