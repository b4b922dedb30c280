"""Exported adapters are what servers of many adapters, readers and the hub expect."""

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import pyro_lora as pl
from tests import networks
from tests.predict import models

# Told of draws of a Gaussian, and tested where that is said.
pytestmark = pytest.mark.filterwarnings("ignore:A Gaussian over several layers")


def saved_base(folder: Path, **lora: Any) -> PeftModel:
    """An adapted network whose base is in a folder, as on a user's disk."""
    if lora["task_type"] == "CAUSAL_LM":
        network = networks.without_peft(networks.llama(num_labels=None))
        network.save_pretrained(folder)
    else:  # an encoder, without a head
        networks.without_peft(networks.bert()).bert.save_pretrained(folder)
    base = loaded_base(folder, lora["task_type"]).double()
    peft_model: Any = get_peft_model(base, LoraConfig(r=3, lora_alpha=6, **lora))
    networks.randomize_adapter(peft_model)
    return peft_model.eval()


def loaded_base(folder: Path, task_type: str) -> Any:
    if task_type == "CAUSAL_LM":
        return AutoModelForCausalLM.from_pretrained(folder)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)


def exported(peft_model: PeftModel, folder: Path, num: int = 3) -> Any:
    lora = pl.lift(peft_model)
    posterior = pl.ParticlePosterior(models.jittered(lora, num), (lora,), None, "y")
    pl.export_adapters(posterior, folder, num)
    return posterior


def expected_logits(posterior: Any, index: int, batch: dict[str, Tensor]) -> Tensor:
    (lora,) = posterior.networks
    weights = models.draw(posterior.particles, index)
    return models.logits_at(lora, weights, batch)


CAUSAL = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
CLASSIFIER = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}


@torch.no_grad()
def serve(base: Any, folder: Path) -> Any:
    """The base with a folder's update, by the rules that vLLM's documentation states.

    One rank and one alpha, nothing but linear layers' A and B, no biases, no saved
    modules, and the base's own name in the configuration.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == base.name_or_path
    assert config["bias"] == "none"
    assert not config["use_dora"]
    assert not config["modules_to_save"]
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    scale = config["lora_alpha"] / (
        math.sqrt(config["r"]) if config["use_rslora"] else config["r"]
    )
    tensors = load_file(folder / "adapter_model.safetensors")
    layers = {re.sub(r"\.lora_[AB]\.weight$", "", name) for name in tensors}
    assert len(tensors) == 2 * len(layers)
    for layer in layers:
        a, b = (tensors[f"{layer}.lora_{x}.weight"] for x in "AB")
        assert a.shape[0] == b.shape[1] == config["r"]
        assert layer.split(".")[-1] in config["target_modules"]
        module = base.get_submodule(layer.removeprefix("base_model.model."))
        module.weight += scale * b @ a
    return base


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}])
def test_servers_of_many_adapters(settings: dict[str, Any], tmp_path: Path) -> None:
    peft_model = saved_base(tmp_path / "base", **CAUSAL, **settings)
    posterior = exported(peft_model, tmp_path / "adapters")
    batch = networks.inputs(networks.batch())
    for index in range(3):
        base = loaded_base(tmp_path / "base", "CAUSAL_LM").double()
        served = serve(base, tmp_path / "adapters" / f"draw_00{index}")
        with torch.no_grad():
            found = served(**batch).logits
        expected = expected_logits(posterior, index, batch)
        assert_close(found, expected, rtol=0, atol=1e-10)
    assert "take the folder as it is" in card(tmp_path / "adapters" / "draw_000").text


def test_peft_answers_by_all_draws_in_one_batch(tmp_path: Path) -> None:
    peft_model = saved_base(tmp_path / "base", **CLASSIFIER)
    posterior = exported(peft_model, tmp_path / "adapters")
    (lora,) = posterior.networks
    batch = networks.batch()
    base = loaded_base(tmp_path / "base", "SEQ_CLS")
    folders = sorted((tmp_path / "adapters").iterdir())
    network = PeftModel.from_pretrained(base, str(folders[0]), folders[0].name)
    for folder in folders[1:]:
        network.load_adapter(str(folder), folder.name)
    network = network.double().eval()
    names = [folder.name for folder in folders]
    repeated = {n: x.repeat(3, 1) for n, x in networks.inputs(batch).items()}
    with torch.no_grad():
        logits = network(
            **repeated, adapter_names=[name for name in names for _ in range(5)]
        ).logits
    found = logits.view(3, 5, -1).softmax(-1).mean(0)
    model = pl.models.classification(lora, 5)
    expected = pl.predict(posterior, [batch], model=model).probs
    assert_close(found, expected, rtol=0, atol=1e-6)


def card(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


@pytest.mark.parametrize("settings", [CAUSAL, CLASSIFIER])
def test_the_card_loads_the_draw(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    posterior = exported(saved_base(tmp_path / "base", **settings), tmp_path / "out")
    folder = tmp_path / "out" / "draw_001"
    text = card(folder).text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = code.replace("this folder", ".")
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code, names)
    batch = networks.inputs(networks.batch())
    with torch.no_grad():
        found = names["network"](**batch).logits
    expected = expected_logits(posterior, 1, batch)
    assert_close(found.double(), expected, rtol=0, atol=1e-5)  # loaded in float32


def test_the_card_says_what_it_is(tmp_path: Path) -> None:
    exported(saved_base(tmp_path / "base", **CLASSIFIER), tmp_path / "out")
    found = card(tmp_path / "out" / "draw_001")
    assert found.data.library_name == "peft"
    assert found.data.base_model == str(tmp_path / "base")
    assert "pyro_lora" in found.data.tags
    assert found.text.strip().startswith("# Particle 2 of 3\n")
    assert "may refuse: `base_model.model.classifier.weight`" in found.text


def test_each_kind_of_draw_has_its_title(tmp_path: Path) -> None:
    lora, model = models.classifier()
    laplace = models.laplace(lora, model, models.two_batches())
    particles = models.particles(lora, model, num=4)
    titles = {
        "Draw 1 of 2 from a Laplace approximation of the posterior": laplace,
        "Draw 1 of 2 from 4 particles": particles,
        "Draw 1 of 2 from a mixture of 2 posteriors": pl.MixturePosterior(
            [laplace, laplace]
        ),
    }
    for index, (title, posterior) in enumerate(titles.items()):
        pl.export_adapters(posterior, tmp_path / str(index), 2)
        text = card(tmp_path / str(index) / "draw_000").text
        assert text.strip().startswith(f"# {title}\n")
        # A network that was never on a disk or the hub has no name.
        assert 'from_pretrained("the base model", num_labels=2)' in text
        data = card(tmp_path / str(index) / "draw_000").data
        assert data.base_model is None
        assert not any(tag.startswith("base_model") for tag in data.tags)
    pl.export_adapters(pl.ensemble(lora, [laplace.mode()]), tmp_path / "mode", 1)
    text = card(tmp_path / "mode" / "draw_000").text
    assert text.strip().startswith("# The one weight set of a point estimate\n")


def test_a_network_that_is_the_user_s_own(tmp_path: Path) -> None:
    network = networks.adapted(TwoLayers().double(), target_modules=["first"])
    exported(network, tmp_path)
    text = card(tmp_path / "draw_000").text
    assert f"from {__name__} import TwoLayers\n" in text
    assert "base = ...\n" in text


class TwoLayers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 4)
        self.second = torch.nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def test_all_files_can_be_read_by_whoever_reads_the_folder(tmp_path: Path) -> None:
    exported(copy.deepcopy(networks.bert()), tmp_path)
    readable = (tmp_path / "draw_000").stat().st_mode & 0o666
    files = list((tmp_path / "draw_000").iterdir())
    assert {file.name for file in files} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert {file.stat().st_mode & 0o777 for file in files} == {readable}
