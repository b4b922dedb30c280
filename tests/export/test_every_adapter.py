"""Posteriors over whatever can be lifted go to ArviZ and to disk, and come back."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor

import pyro_lora as pl
from tests.lifting.liftable import TABLE
from tests.lifting.liftable_oracle import built, output_of
from tests.lifting.liftable_row import Row
from tests.networks import particles

ROWS = [
    pytest.param(row, id=f"{row.group} / {row.name}")
    for row in TABLE
    if not (row.refused or row.raises)
]
# One row for each set of sites: their values are written whatever the network is.
BY_SITES = {p.values[0].sites: p for p in reversed(ROWS)}
FIRST_OF_THEIR_SITES = [
    p
    if p is BY_SITES[p.values[0].sites]
    else pytest.param(*p.values, id=p.id, marks=pytest.mark.slow)
    for p in ROWS
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


@pytest.mark.parametrize("row", BY_SITES.values())
def test_the_raw_tree_holds_every_site(row: Row) -> None:
    posterior = posterior_of(row)
    raw = pl.to_datatree(posterior, weights="raw")["posterior"]
    assert set(raw.data_vars) == set(posterior.networks[0].sites)
    for site, value in posterior.particles.items():
        found = raw[site].values[0]
        assert np.array_equal(found.reshape(value.shape), value.numpy())


@pytest.mark.parametrize("row", FIRST_OF_THEIR_SITES)
def test_the_tree_holds_every_update_and_files_hold_every_site(
    row: Row, tmp_path: Path
) -> None:
    posterior = posterior_of(row)
    (lora,) = posterior.networks
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
@pytest.mark.few(14)
def test_the_updates_are_those_of_peft(row: Row) -> None:
    posterior = posterior_of(row)
    (lora,) = posterior.networks
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


# Networks whose base a loaded adapter doesn't find again, by what PEFT does.
OTHER_BASE = {
    "LoftQ": "the quantised weights are the base",
    "LoRA-GA": "the base is shifted by gradients of the data",
}


@pytest.mark.filterwarnings("ignore")  # PEFT's, about its own methods
@pytest.mark.parametrize("row", FIRST_OF_THEIR_SITES)
@pytest.mark.few(28)
def test_peft_and_an_ensemble_read_what_is_exported(
    row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases: list[Any] = []  # before the adapter
    init = PeftModel.__init__

    def keep(self: PeftModel, model: Any, *args: Any, **kwargs: Any) -> None:
        bases.append(copy.deepcopy(model))
        init(self, model, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(PeftModel, "__init__", keep)
        posterior = posterior_of(row)
    (lora,) = posterior.networks
    network = lora.network
    if not isinstance(network, PeftModel):
        pytest.skip("not an adapter of PEFT")
    if row.name in OTHER_BASE:
        pytest.skip(OTHER_BASE[row.name])
    pl.export_adapters(posterior, tmp_path, 2)
    loaded = PeftModel.from_pretrained(
        bases[0], str(tmp_path / "draw_001"), autocast_adapter_dtype=False
    )
    frozen = next(p for p in network.parameters() if not p.requires_grad)
    inputs = row.inputs()
    weights = {site: value[1] for site, value in posterior.particles.items()}
    with torch.no_grad(), lora.bind(weights) as net:
        expected = output_of(net, inputs)
        found = output_of(loaded.to(frozen.dtype).eval(), inputs)
    if row.name == "P-tuning":
        with pytest.raises(ValueError, match="an encoder of P_TUNING makes, and not"):
            pl.ensemble(lora, [tmp_path / "draw_001"])
    else:
        read = pl.ensemble(lora, [tmp_path / "draw_001"]).particles
        for site, (first, *_) in lora.parameters.items():
            written = weights[site].to(first.parameter.dtype)  # half precision, perhaps
            assert torch.equal(read[site][0], written.to(weights[site].dtype))
    # Loaded in float32 at the most, since some initialisations know nothing wider.
    rounding = max(torch.finfo(t).eps for t in (torch.float32, frozen.dtype))
    difference = (found - expected).abs().max()
    assert difference <= 32 * rounding * expected.abs().max()
