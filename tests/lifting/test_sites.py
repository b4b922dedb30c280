"""Site names and stacks, and the ways that weights go in and out of the adapter."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, RobertaConfig

import pyro_lora as pl
from tests.networks import (
    batch,
    bert,
    inputs,
    llama,
    particles,
    randomize_adapter,
    without_peft,
)

SELF = "bert.encoder.layer.attention.self"


def shapes(lora: pl.LiftedNetwork) -> dict[str, tuple[int, ...]]:
    return {site: tuple(value.shape) for site, value in lora.weights().items()}


def roberta() -> PeftModel:
    """Its head has two linear layers, both in one ``modules_to_save``."""
    config = RobertaConfig(
        vocab_size=50,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=32,
    )
    network = AutoModelForSequenceClassification.from_config(config).double()
    return get_peft_model(
        network, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    )


def plain() -> nn.Sequential:
    """Linear layers of two shapes, with no PEFT around them."""
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), nn.Linear(3, 3))


def test_bert_sites_stack_the_layers() -> None:
    lora = pl.lift(bert(3))
    assert shapes(lora) == {
        f"lora.{SELF}.query.A": (2, 3, 16),
        f"lora.{SELF}.query.B": (2, 16, 3),
        f"lora.{SELF}.value.A": (2, 3, 16),
        f"lora.{SELF}.value.B": (2, 16, 3),
        "head.classifier.weight": (1, 3, 16),
        "head.classifier.bias": (1, 3),
    }
    path = "base_model.model.bert.encoder.layer.{}.attention.self.value.lora_B.default"
    assert lora.sites[f"lora.{SELF}.value.B"] == tuple(
        path.format(layer) + ".weight" for layer in range(2)
    )
    assert lora.sites["head.classifier.bias"] == (
        "base_model.model.classifier.modules_to_save.default.bias",
    )


def test_llama_sites_lose_the_leading_model() -> None:
    assert shapes(pl.lift(llama(3))) == {
        "lora.layers.self_attn.q_proj.A": (2, 3, 16),
        "lora.layers.self_attn.q_proj.B": (2, 16, 3),
        "lora.layers.self_attn.v_proj.A": (2, 3, 16),
        "lora.layers.self_attn.v_proj.B": (2, 8, 3),
        "head.score.weight": (1, 3, 16),
    }


def test_layer_order_is_numerical() -> None:
    lora = pl.lift(bert(num_layers=11, hidden_size=4, target_modules=["query"]))
    layers = [int(name.split(".")[5]) for name in lora.sites[f"lora.{SELF}.query.A"]]
    assert layers == list(range(11))


def test_every_layer_of_a_head_has_its_own_sites() -> None:
    assert [site for site in pl.lift(roberta()).sites if site.startswith("head")] == [
        "head.classifier.dense.weight",
        "head.classifier.dense.bias",
        "head.classifier.out_proj.weight",
        "head.classifier.out_proj.bias",
    ]


def test_different_shapes_under_one_name_get_a_suffix() -> None:
    network = bert(
        num_layers=3,
        target_modules=["query"],
        rank_pattern={r".*layer\.1\.attention\.self\.query": 2},
    )
    lora = pl.lift(network)
    stacks = {site: shape for site, shape in shapes(lora).items() if "lora" in site}
    assert stacks == {
        f"lora.{SELF}.query.A_3x16": (2, 3, 16),
        f"lora.{SELF}.query.B_16x3": (2, 16, 3),
        f"lora.{SELF}.query.A_2x16": (1, 2, 16),
        f"lora.{SELF}.query.B_16x2": (1, 16, 2),
    }
    names = lora.sites[f"lora.{SELF}.query.A_3x16"]
    assert [name.split(".")[5] for name in names] == ["0", "2"]


def test_trained_biases_of_the_base_are_sites() -> None:
    lora = pl.lift(bert(bias="lora_only"))
    assert shapes(lora)[f"base.{SELF}.query.bias"] == (2, 16)
    assert lora.sites[f"base.{SELF}.query.bias"][1] == (
        "base_model.model.bert.encoder.layer.1.attention.self.query.base_layer.bias"
    )


def test_a_lora_bias_is_a_site() -> None:
    lora = pl.lift(bert(target_modules=["query"], lora_bias=True))
    assert shapes(lora)[f"lora.{SELF}.query.bias"] == (2, 16)


def test_a_name_tells_two_networks_apart() -> None:
    one, two = pl.lift(bert()), pl.lift(bert(), name="second")
    assert f"lora.second.{SELF}.query.A" in two.sites
    assert "head.second.classifier.bias" in two.sites
    assert not one.sites.keys() & two.sites.keys()


def test_plain_modules_are_lifted_where_they_are_trainable() -> None:
    network = plain()
    network[3].weight.requires_grad_(False)
    assert shapes(pl.lift(network)) == {
        "base.weight_3x4": (1, 3, 4),
        "base.weight_3x3": (1, 3, 3),
        "base.bias": (3, 3),
    }


@pytest.mark.parametrize(
    "network",
    [
        bert,
        llama,
        roberta,
        plain,
        lambda: bert(bias="lora_only"),
        lambda: bert(rank_pattern={r".*layer\.1\.attention\.self\.query": 2}),
    ],
)
def test_site_names_are_safe_in_pyro(network: Callable[[], nn.Module]) -> None:
    names = list(pl.lift(network()).sites)
    dotted = [(a, b) for a in names for b in names if b.startswith(a + ".")]
    assert dotted == []
    assert {name.split(".")[0] for name in names} <= {"lora", "head", "base"}
    assert [name for name in names if "$$$" in name or "unconstrained" in name] == []


def test_sites_are_the_trainable_parameters_each_once() -> None:
    network = llama(bias="lora_only")
    names = [name for names in pl.lift(network).sites.values() for name in names]
    trainable = [name for name, p in network.named_parameters() if p.requires_grad]
    assert sorted(names) == sorted(trainable)


@pytest.mark.parametrize("network", [bert, llama, plain])
def test_weights_are_the_parameters_copied(network: Callable[[], nn.Module]) -> None:
    model = network()
    lora = pl.lift(model)
    parameters = dict(model.named_parameters())
    weights = lora.weights()
    for site, names in lora.sites.items():
        assert torch.equal(weights[site], torch.stack([parameters[n] for n in names]))
        weights[site].zero_()
    assert all(value.abs().sum() > 0 for value in lora.weights().values())


def test_load_then_weights_is_the_identity() -> None:
    network = bert(bias="lora_only")
    lora = pl.lift(network)
    weights = particles(lora)
    base = {n: p.clone() for n, p in network.named_parameters() if not p.requires_grad}
    lora.load(weights)
    assert lora.weights().keys() == weights.keys()
    for site, value in lora.weights().items():
        assert torch.equal(value, weights[site])
    parameters = dict(network.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in base.items())


def test_a_loaded_network_equals_a_bound_one() -> None:
    network = llama(3)
    texts = inputs(batch())
    lora = pl.lift(network)
    weights = particles(lora)
    with lora.bind(weights) as net:
        bound = net(**texts).logits
    assert not torch.allclose(network(**texts).logits, bound)
    lora.load(weights)
    assert_close(network(**texts).logits, bound, rtol=0, atol=1e-12)


def test_an_adapter_loaded_for_inference_is_lifted(tmp_path: Path) -> None:
    texts = inputs(batch())
    trained = bert(3)
    trained.save_pretrained(tmp_path, save_embedding_layers=False)
    frozen = PeftModel.from_pretrained(without_peft(trained), tmp_path).double().eval()
    frozen.requires_grad_(False)  # peft < 0.18 leaves the head trainable
    lora = pl.lift(frozen)
    assert shapes(lora) == shapes(pl.lift(bert(3)))
    weights = particles(lora)
    leaves = {site: value.requires_grad_() for site, value in weights.items()}
    with lora.bind(leaves) as net:
        loss = net(**texts).logits.square().sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_only_the_adapter_that_is_asked_for_is_lifted() -> None:
    network = bert()
    network.add_adapter("other", LoraConfig(r=2, target_modules=["key"]))
    assert pl.lift(network).sites.keys() == pl.lift(bert()).sites.keys()
    network.set_adapter("other")
    assert shapes(pl.lift(network)) == {
        f"lora.{SELF}.key.A": (2, 2, 16),
        f"lora.{SELF}.key.B": (2, 16, 2),
        "head.classifier.weight": (1, 2, 16),
        "head.classifier.bias": (1, 2),
    }


def test_adapters_added_by_transformers_are_lifted() -> None:
    network = without_peft(bert())
    try:
        network.add_adapter(LoraConfig(r=2, target_modules=["query"]))
    except ValueError as error:
        pytest.skip(f"transformers refuses this version of peft: {error}")
    assert list(pl.lift(network).sites) == [
        f"lora.{SELF}.query.A",
        f"lora.{SELF}.query.B",
    ]


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("lead", [(), (3,), (3, 1)])
def test_delta_weight_factors_multiply_to_pefts_update(
    use_rslora: bool, lead: tuple[int, ...]
) -> None:
    network = llama(
        use_rslora=use_rslora, alpha_pattern={r".*layers\.1\.self_attn\.q_proj": 11}
    )
    lora = pl.lift(network)
    weights = particles(lora, *lead)
    factors = lora.delta_weight_factors(weights)
    assert sorted(factors) == [
        f"base_model.model.model.layers.{layer}.self_attn.{role}_proj"
        for layer in range(2)
        for role in "qv"
    ]
    flat = {site: v.reshape(-1, *v.shape[len(lead) :]) for site, v in weights.items()}
    for i in range(lead[0] if lead else 1):
        lora.load({site: value[i] for site, value in flat.items()})
        for path, (b, a) in factors.items():
            delta = (b @ a)[None].flatten(0, -3)[i]
            expected = network.get_submodule(path).get_delta_weight("default")
            assert_close(delta, expected, rtol=0, atol=1e-12)


def test_lifting_leaves_the_state_dict_as_it_was(tmp_path: Path) -> None:
    network = bert()
    randomize_adapter(network)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.save_pretrained(tmp_path / "before", save_embedding_layers=False)
    lora = pl.lift(network)
    with lora.bind(particles(lora)):
        bound = network.state_dict()
        network.save_pretrained(tmp_path / "after", save_embedding_layers=False)
    assert list(bound) == list(before)
    assert all(torch.equal(bound[name], value) for name, value in before.items())
    files = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "after").iterdir())
    for name in files:
        saved = (tmp_path / "after" / name).read_bytes()
        assert saved == (tmp_path / "before" / name).read_bytes()
