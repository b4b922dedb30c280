"""Adapters that PEFT loads, and a network that stays what it was."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pyro import poutine
from torch import Tensor

import pyro_lora as pl
from tests import networks
from tests.predict import models

# Told of draws of a Gaussian, and tested where that is said.
pytestmark = pytest.mark.filterwarnings("ignore:A Gaussian over several layers")


def base_model(network: PeftModel) -> Any:
    """A copy of what the adapter was put on."""
    return copy.deepcopy(network).unload()


def state(network: PeftModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def assert_state(network: PeftModel, expected: dict[str, Tensor]) -> None:
    found = network.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize(
    ("network", "settings"),
    [
        (networks.bert, {}),
        (networks.bert, {"bias": "lora_only"}),
        (networks.bert, {"bias": "all"}),
        (networks.bert, {"use_rslora": True}),
        (networks.llama, {}),
        (networks.llama, {"num_labels": None}),
    ],
)
def test_peft_loads_the_draws(
    network: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    peft_model = network(**settings)
    fresh = network(**settings)
    fresh.load_state_dict(peft_model.state_dict())
    lora = pl.lift(peft_model)
    posterior = pl.ParticlePosterior(models.jittered(lora, 3), (lora,), None, "y")
    before = state(peft_model)
    pl.export_adapters(posterior, tmp_path / "adapters", 3)
    assert_state(peft_model, before)
    batch = networks.inputs(networks.batch())
    names = sorted(file.name for file in (tmp_path / "adapters").iterdir())
    assert names == ["draw_000", "draw_001", "draw_002"]
    folders = [tmp_path / "adapters" / name for name in names]
    for site, value in pl.ensemble(lora, folders).particles.items():
        assert torch.equal(value, posterior.particles[site])
    for index, name in enumerate(names):
        # In its own network, without anything of pyro_lora.
        loaded = PeftModel.from_pretrained(
            base_model(fresh), str(tmp_path / "adapters" / name)
        ).double()
        with torch.no_grad(), lora.bind(models.draw(posterior.particles, index)) as net:
            expected = net(**batch).logits
            found = loaded(**batch).logits
            merged = loaded.merge_and_unload()(**batch).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(expected, peft_model(**batch).logits, atol=1e-3)


NON_CENTRED = pl.priors.horseshoe(centered=False)


@pytest.mark.parametrize(
    "prior",
    [
        NON_CENTRED,
        pl.priors.by_site({"head.*": pl.priors.normal(1.0), "*": NON_CENTRED}),
    ],
)
def test_draws_of_a_non_centred_prior_are_written_as_the_weights_they_make(
    prior: Any, tmp_path: Path
) -> None:
    peft_model = networks.bert()
    fresh = base_model(peft_model)
    lora = pl.lift(peft_model, prior=prior)
    model = pl.models.classification(lora, models.NUM_DATA)
    latents: dict[str, list[Tensor]] = {}
    for _ in range(2):
        trace: Any = poutine.trace(lora.prior).get_trace(lora)
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and not site["is_observed"]:
                latents.setdefault(name, []).append(site["value"])
    draws = {name: torch.stack(values) for name, values in latents.items()}
    posterior = pl.ParticlePosterior(draws, (lora,), model, "y")
    pl.export_adapters(posterior, tmp_path / "adapters", 2)
    pl.save(posterior, tmp_path / "saved")
    again = pl.load(tmp_path / "saved", lora, model=model)
    batch = networks.batch()
    expected = pl.predict(
        posterior, [batch], model=model, keep_draws=True
    ).draw_log_probs
    found = pl.predict(again, [batch], model=model, keep_draws=True).draw_log_probs
    assert expected is not None
    assert found is not None
    torch.testing.assert_close(found, expected)
    for index in range(2):
        folder = str(tmp_path / "adapters" / f"draw_{index:03d}")
        loaded = PeftModel.from_pretrained(copy.deepcopy(fresh), folder).double()
        with torch.no_grad():
            logits = loaded(**networks.inputs(batch)).logits
        torch.testing.assert_close(logits.log_softmax(-1), expected[index])


def test_an_adapter_of_another_name(tmp_path: Path) -> None:
    network = networks.bert()
    network.add_adapter("other", network.peft_config["default"])
    network.set_adapter("other")
    networks.randomize_adapter(network)
    lora = pl.lift(network)
    posterior = pl.ParticlePosterior(models.jittered(lora, 2), (lora,), None, "y")
    network.set_adapter("default")  # what is active now doesn't matter
    pl.export_adapters(posterior, tmp_path, 2)
    base = networks.bert().unload()
    base.load_state_dict(base_model(network).state_dict())
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "draw_001")).double()
    network.set_adapter("other")
    batch = networks.inputs(networks.batch())
    with torch.no_grad(), lora.bind(models.draw(posterior.particles, 1)) as net:
        torch.testing.assert_close(loaded(**batch).logits, net(**batch).logits)


def test_a_compiled_network(tmp_path: Path) -> None:
    network = networks.bert()
    base = base_model(network)
    lora = pl.lift(torch.compile(network, backend="eager"))
    posterior = pl.ParticlePosterior(models.jittered(lora, 2), (lora,), None, "y")
    before = state(network)
    pl.export_adapters(posterior, tmp_path / "draws", 2)
    posterior.save_pretrained(tmp_path / "pretrained")
    assert_state(network, before)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "draws/draw_001")).double()
    batch = networks.inputs(networks.batch())
    with torch.no_grad(), lora.bind(models.draw(posterior.particles, 1)) as net:
        torch.testing.assert_close(loaded(**batch).logits, net(**batch).logits)
    folders = [tmp_path / "draws" / f"draw_{i:03d}" for i in range(2)]
    compiled = torch.compile(loaded, backend="eager")
    for again in (
        pl.ensemble(lora, folders),
        pl.from_pretrained(tmp_path / "pretrained", network=compiled),
    ):
        for site, value in again.sample(2).items():
            assert torch.equal(value, posterior.particles[site])


def test_laplace_draws(tmp_path: Path) -> None:
    lora, model = models.classifier()
    posterior = models.laplace(lora, model, models.two_batches())
    pl.export_adapters(posterior, tmp_path, 2)
    files = [tmp_path / f"draw_00{i}" / "adapter_model.safetensors" for i in range(2)]
    assert files[0].read_bytes() != files[1].read_bytes()


def test_the_mode(tmp_path: Path) -> None:
    lora, model = models.classifier()
    mode = models.laplace(lora, model, models.two_batches()).mode()
    pl.export_adapters(pl.ensemble(lora, [mode]), tmp_path, 1)
    (folder,) = tmp_path.iterdir()
    found = pl.ensemble(lora, [folder]).particles
    for site, value in mode.items():
        torch.testing.assert_close(found[site][0], value, rtol=0, atol=0)


def test_a_failure_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora, model = models.classifier()
    posterior = models.particles(lora, model)
    before = state(lora.network)
    save = PeftModel.save_pretrained
    calls = []

    def fail_at_the_second(self: PeftModel, *args: Any, **kwargs: Any) -> None:
        calls.append(1)
        save(self, *args, **kwargs)
        if len(calls) == 2:
            raise OSError("no space left on device")

    monkeypatch.setattr(PeftModel, "save_pretrained", fail_at_the_second)
    with pytest.raises(OSError, match="no space"):
        pl.export_adapters(posterior, tmp_path, 3)
    assert_state(lora.network, before)
    assert list(tmp_path.iterdir()) == []


def test_old_draws_are_not_mixed_with_new_ones(tmp_path: Path) -> None:
    lora, model = models.classifier()
    posterior = models.particles(lora, model)
    pl.export_adapters(posterior, tmp_path, 3)
    with pytest.raises(ValueError, match="holds draws already"):
        pl.export_adapters(posterior, tmp_path, 2)
    assert len(list(tmp_path.iterdir())) == 3


def test_what_peft_would_lose_is_refused(tmp_path: Path) -> None:
    network = networks.bert()
    layer = network.base_model.model.bert.pooler.dense
    layer.bias.requires_grad_(True)
    lora = pl.lift(network)
    posterior = pl.ParticlePosterior(models.jittered(lora, 2), (lora,), None, "y")
    with pytest.raises(ValueError, match=r"'base\.bert\.pooler\.dense\.bias'.*PEFT"):
        pl.export_adapters(posterior, tmp_path, 2)
    assert list(tmp_path.iterdir()) == []


def test_what_isn_t_a_number_of_weight_sets_is_refused(tmp_path: Path) -> None:
    lora, model = models.classifier(network=networks.bert(dropout=0.1))
    particles = models.particles(lora, model)
    with pytest.raises(ValueError, match="at least 1, found 0"):
        pl.export_adapters(particles, tmp_path, 0)
    others: list[Any] = [pl.mc_dropout(lora), models.guide_over(lora.weights())]
    for other, name in zip(others, ["DropoutPosterior", "function"], strict=True):
        with pytest.raises(ValueError, match=rf"a {name}; .*ensemble\(lora, draws\)"):
            pl.export_adapters(other, tmp_path, 2)
    assert list(tmp_path.iterdir()) == []


def test_one_peft_model_is_needed(tmp_path: Path) -> None:
    linear = torch.nn.Linear(3, 2)
    lora = pl.lift(linear)
    posterior = pl.ParticlePosterior(models.jittered(lora, 2), (lora,), None, "y")
    with pytest.raises(ValueError, match="is a LinearSlot; expected a PeftModel"):
        pl.export_adapters(posterior, tmp_path, 2)
    two = pl.ParticlePosterior(posterior.particles, (lora, lora), None, "y")
    with pytest.raises(ValueError, match="2 lifted networks; expected one"):
        pl.export_adapters(two, tmp_path, 2)


@pytest.mark.parametrize("kind", ["laplace", "mixture", "last_layer", "particles"])
def test_draws_that_may_predict_at_chance_are_told(kind: str, tmp_path: Path) -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    laplace = models.laplace(lora, model, batches)
    last = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter(), sites="last_layer")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The weights aren't a mode")
        narrow = last.laplace_approximation(batches)
    posterior: Any = {
        "laplace": laplace,
        "mixture": pl.MixturePosterior([laplace, models.particles(lora, model)]),
        "last_layer": narrow,
        "particles": models.particles(lora, model),
    }[kind]
    told = kind in ("laplace", "mixture")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pl.export_adapters(posterior, tmp_path, 1)
    said = [str(w.message) for w in caught if w.category is UserWarning]
    assert len(said) == told
    for remedy in ("last layer", "particles", "mode"):
        assert all(remedy in text for text in said)
    card = (tmp_path / "draw_000" / "README.md").read_text(encoding="utf-8")
    assert ("may predict at chance" in card) == told
    assert ("What the posterior predicts is the" in card) != told
