"""AdaLoRA's budget: ranks that it pruned stay pruned under any weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from pyro.infer import Predictive
from torch.testing import assert_close

import pyro_lora as pl
from tests.networks import batch, bert, classifier, inputs, particles, without_peft


def pruned_adalora() -> Any:
    """AdaLoRA with r=4 whose budget has kept two ranks of each matrix on average."""
    torch.manual_seed(0)
    network = without_peft(bert())
    config = AdaLoraConfig(
        init_r=4,
        target_r=2,
        total_step=10,
        tinit=1,
        tfinal=1,
        target_modules=["query", "value"],
        task_type="SEQ_CLS",
    )
    peft_model: Any = get_peft_model(network.double(), config)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.3)
    for step in range(10):
        peft_model(**batch()).loss.backward()
        peft_model.update_and_allocate(step)
        peft_model.zero_grad()
    return peft_model.eval()


def test_pruned_ranks_stay_pruned() -> None:
    network, texts = pruned_adalora(), inputs(batch())
    layers = [m for m in network.modules() if type(m).__name__ == "SVDLinear"]
    zero = torch.stack([m.lora_E["default"] == 0 for m in layers])
    assert 0 < zero.sum() < zero.numel()
    lora = pl.lift(network)
    assert not any("ranknum" in site for site in lora.sites)
    weights = particles(lora, 3)  # E isn't zero anywhere
    with lora.bind(weights) as net:
        together = net(**texts).logits
    own, expected = lora.weights(), []
    for i in range(3):
        lora.load({site: value[i] for site, value in weights.items()})
        assert torch.equal(
            torch.stack([m.lora_E["default"] == 0 for m in layers]), zero
        )
        expected.append(network(**texts).logits)
    assert_close(together, torch.stack(expected), rtol=0, atol=1e-12)
    path = "base_model.model.bert.encoder.layer.0.attention.self.query"
    b, a = lora.delta_weight_factors(weights)[path]  # layer 0 holds the last particle
    delta = layers[0].get_delta_weight("default")
    assert_close((b @ a)[-1], delta, rtol=0, atol=1e-12)
    lora.load(own)
    site = "lora.bert.encoder.layer.attention.self.query.E"
    b, a = lora.delta_weight_factors(own)[path]
    delta = layers[0].get_delta_weight("default")
    assert_close(b @ a, delta, rtol=0, atol=1e-12)
    assert own[site].shape == (2, 4, 1)


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
def test_a_saved_adapter_has_the_ranks_that_were_kept(tmp_path: Path) -> None:
    network, texts = pruned_adalora(), inputs(batch())
    network.save_pretrained(tmp_path, save_embedding_layers=False)
    torch.manual_seed(0)
    base = without_peft(bert()).double()
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).double().eval()
    lora = pl.lift(loaded)
    own = lora.weights()
    assert all(value.numel() > 0 for value in own.values())
    with lora.bind(own) as net:
        expected = loaded(**texts).logits
        assert_close(net(**texts).logits, expected, rtol=0, atol=1e-12)
    read = pl.ensemble(lora, [tmp_path]).particles
    for site, value in lora.weights().items():
        assert torch.equal(value, own[site])
        assert torch.equal(read[site][0], value)
    # The network itself still holds the ranks that were pruned.
    lora = pl.lift(network)
    own = lora.weights()
    with pytest.raises(ValueError, match="an adapter of another network"):
        pl.ensemble(lora, [tmp_path])
    assert all(torch.equal(x, own[site]) for site, x in lora.weights().items())


def test_a_pruned_adapter_can_be_moved_after_lifting() -> None:
    network = pruned_adalora()
    lora = pl.lift(network)
    network.to("meta")
    with torch.device("meta"):
        weights = {k: torch.empty(v.shape) for k, v in lora.weights().items()}
    weights = {k: v.to(torch.float64) for k, v in weights.items()}
    factors = lora.delta_weight_factors(weights)
    assert all(x.is_meta for pair in factors.values() for x in pair)


def test_a_prior_predictive_of_a_pruned_adapter() -> None:
    lora, texts = pl.lift(pruned_adalora()), inputs(batch())
    drawn = Predictive(classifier(lora), num_samples=4, parallel=True)(**texts)
    assert drawn["y"].shape == (4, 5)


@pytest.mark.parametrize("site", ["A", "B"])
def test_networks_without_a_budget_have_no_mask(site: str) -> None:
    lora = pl.lift(bert())
    name = f"lora.bert.encoder.layer.attention.self.query.{site}"
    weights = particles(lora)
    lora.load(weights)
    assert torch.equal(lora.weights()[name], weights[name])
