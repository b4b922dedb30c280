"""Dims, coordinates and modules say which layer, rank and class a number is of."""

from pathlib import Path

import xarray
from peft import IA3Config, get_peft_model

import pyro_lora as pl
from tests import networks
from tests.predict import models

QUERY = "delta.bert.encoder.layer.attention.self.query"


def test_dims_say_which_layer() -> None:
    # Query in the last layer only, value in both, at two ranks.
    network = networks.bert(
        target_modules=[
            "encoder.layer.1.attention.self.query",
            "encoder.layer.0.attention.self.value",
            "encoder.layer.1.attention.self.value",
        ],
        rank_pattern={"query": 2},
    )
    lora, model = models.classifier(network=network)
    tree = pl.to_datatree(models.particles(lora, model))
    value = QUERY.replace("query", "value")
    found = tree["posterior"]
    query_values = found[f"{QUERY}.singular_values"]
    value_values = found[f"{value}.singular_values"]
    assert query_values.sizes[query_values.dims[2]] == 1
    assert query_values[query_values.dims[2]].values.tolist() == [1]
    assert value_values[value_values.dims[2]].values.tolist() == [0, 1]
    assert query_values.shape == (1, 3, 1, 2)
    assert value_values.shape == (1, 3, 2, 3)


def test_an_adapter_with_a_number_for_a_name_is_no_layer() -> None:
    network = networks.bert()
    network.add_adapter("7", network.peft_config["default"])
    network.set_adapter("7")
    networks.randomize_adapter(network)
    lora, model = models.classifier(network=network)
    found = pl.to_datatree(models.particles(lora, model), weights="raw")["posterior"]
    site = "lora.bert.encoder.layer.attention.self.query.A"
    assert found[site].coords["layer"].values.tolist() == [0, 1]
    assert "layer" not in found["head.classifier.weight"].dims


def test_an_adapter_of_another_kind_with_a_number_for_a_name() -> None:
    config = IA3Config(target_modules=["key"], feedforward_modules=[])
    network = networks.without_peft(networks.bert())
    lora = pl.lift(get_peft_model(network, config, adapter_name="7"))
    posterior = pl.ensemble(lora, [lora.weights()])
    found = pl.to_datatree(posterior, weights="raw")["posterior"]
    (site,) = lora.sites
    assert found[site].coords["layer"].values.tolist() == [0, 1]


def test_dims_read_well() -> None:
    lora, model = models.classifier(3)
    tree = pl.to_datatree(models.particles(lora, model))
    found = tree["posterior"]
    assert found[f"{QUERY}.singular_values"].dims == ("chain", "draw", "layer", "rank")
    assert found["head.classifier.weight"].dims[2:] == ("class", "in_feature")
    assert found["head.classifier.bias"].dims[2:] == ("class",)


def test_each_update_says_whose_it_is(tmp_path: Path) -> None:
    lora, model = models.classifier()
    tree = pl.to_datatree(models.laplace(lora, model, models.two_batches()))
    tree.to_netcdf(tmp_path / "tree.nc")
    with xarray.open_datatree(tmp_path / "tree.nc", engine="h5netcdf") as again:
        for found in (tree["posterior"], tree["prior"], again["posterior"]):
            names = [str(name) for name in found if str(name).startswith("delta.")]
            assert names
            for name in names:
                paths = [*found[name].attrs["module"]]
                role = name.split(".")[-2]
                for layer, path in zip(found["layer"].values, paths, strict=True):
                    assert f"layer.{layer}." in path
                    assert path.endswith(role)
                    assert hasattr(lora.network.get_submodule(path), "lora_A")
