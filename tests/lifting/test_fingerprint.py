"""Another network of the same sites is told from the one that something is of."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import IA3Config, get_peft_model
from torch import nn

import pyro_lora as pl
from pyro_lora.lifting.fingerprint import (
    Fingerprint,
    NetworkDescription,
    described,
    fingerprint,
    restored,
)
from tests import networks


def check(there: pl.LiftedNetwork, here: pl.LiftedNetwork) -> None:
    fingerprint(there).check(here, "the file")


def refusal(there: pl.LiftedNetwork, here: pl.LiftedNetwork) -> str | None:
    """What is said where it is another network."""
    try:
        check(there, here)
    except ValueError as error:
        return str(error)
    return None


def parameter(network: nn.Module, name: str) -> torch.Tensor:
    return next(x for n, x in network.named_parameters() if name in n)


@torch.no_grad()
def other_base(network: Any) -> None:
    for name, x in network.named_parameters():
        if "lora" not in name and x.ndim > 1:
            x.add_(1e-3 * torch.randn_like(x))


@torch.no_grad()
def one_layer(network: Any) -> None:
    parameter(network, "layer.1.attention.self.key").mul_(1 + 1e-6)


@torch.no_grad()
def a_frozen_bias(network: Any) -> None:
    parameter(network, "embeddings.LayerNorm.bias").add_(0.1)


def more_heads(network: Any) -> None:
    network.config.num_attention_heads = 4


def another_activation(network: Any) -> None:
    network.config.hidden_act = "relu"


def another_epsilon(network: Any) -> None:
    network.config.layer_norm_eps = 1e-3


def another_adapter_setting(network: Any) -> None:
    network.peft_config["default"].fan_in_fan_out = True


CHANGES = [
    other_base,
    one_layer,
    a_frozen_bias,
    more_heads,
    another_activation,
    another_epsilon,
    another_adapter_setting,
]


@pytest.mark.parametrize("change", CHANGES)
def test_another_network_is_told(change: Callable[[Any], None]) -> None:
    network = networks.bert()
    other = copy.deepcopy(network)
    lora = pl.lift(network)
    assert refusal(lora, pl.lift(copy.deepcopy(network))) is None
    change(other)
    with pytest.raises(ValueError, match=r"the file: .* so this is another network"):
        check(lora, pl.lift(other))


@pytest.mark.parametrize("frozen", ["lora_A", "head"])
def test_what_of_the_adapter_is_frozen_counts(frozen: str) -> None:
    network = networks.bert()
    for name, x in network.named_parameters():
        if frozen in name or (frozen == "head" and "modules_to_save" in name):
            x.requires_grad_(False)
    other = copy.deepcopy(network)
    name = "modules_to_save" if frozen == "head" else frozen
    with torch.no_grad():
        parameter(other, name).mul_(1.5)
    with pytest.raises(ValueError, match=name):
        check(pl.lift(network), pl.lift(other))


@torch.no_grad()
def other_lifted_values(network: Any) -> Any:
    for x in network.parameters():
        if x.requires_grad:
            x.mul_(2)
    return network


def in_half_precision(network: Any) -> Any:
    return network.bfloat16()


def in_single_precision(network: Any) -> Any:
    return network.float()


def compiled(network: Any) -> Any:
    base = network.base_model.model.bert
    network.base_model.model.bert = torch.compile(base, backend="eager")
    return network


def with_dropout(network: Any) -> Any:
    network.config.hidden_dropout_prob = 0.5
    network.peft_config["default"].lora_dropout = 0.5
    return network.eval()


def under_another_name(network: Any) -> Any:
    network.add_adapter("other", network.peft_config["default"])
    network.set_adapter("other")
    return network


@torch.no_grad()
def with_another_head_below(network: Any) -> Any:
    # What transformers draws anew in each process, and PEFT's copy stands in for.
    for name, x in network.named_parameters():
        if "original_module" in name:
            x.normal_()
    return network


def with_other_attention(network: Any) -> Any:
    network.config._attn_implementation = "eager"
    return network


MOVES = [
    other_lifted_values,
    in_half_precision,
    in_single_precision,
    compiled,
    with_dropout,
    under_another_name,
    with_another_head_below,
    with_other_attention,
]


@pytest.mark.parametrize("move", MOVES)
def test_the_same_network_elsewhere_is_not(move: Callable[[Any], Any]) -> None:
    network = networks.bert()
    there = pl.lift(network)
    here = pl.lift(move(copy.deepcopy(network)))
    assert refusal(there, here) is None
    assert refusal(here, there) is None


def test_layers_without_weights_count_where_there_is_no_config() -> None:
    def network(activation: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 2))

    lora = pl.lift(network(nn.Tanh()))
    assert refusal(lora, pl.lift(network(nn.Tanh()))) is None
    with pytest.raises(ValueError, match=r"layer 1 is 'Tanh\(\)' there, 'ReLU\(\)'"):
        check(lora, pl.lift(network(nn.ReLU())))


def test_an_adapter_of_another_kind() -> None:
    network = networks.without_peft(networks.bert())
    config = IA3Config(target_modules=["query"], feedforward_modules=[])
    lora = pl.lift(get_peft_model(copy.deepcopy(network), config))
    assert (
        refusal(lora, pl.lift(get_peft_model(copy.deepcopy(network), config))) is None
    )


def test_statistics_that_training_moves_count_in_evaluation() -> None:
    def lifted(**state: Any) -> pl.LiftedNetwork:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).train(
            state.pop("training")
        )
        for name, value in state.items():
            getattr(network[1], name).fill_(value)
        return pl.lift(network)

    assert (
        refusal(lifted(training=True), lifted(training=True, running_mean=3.0)) is None
    )
    assert (
        refusal(lifted(training=False), lifted(training=False, num_batches_tracked=9))
        is None
    )
    with pytest.raises(ValueError, match=r"1\.running_mean"):
        check(lifted(training=False), lifted(training=False, running_mean=3.0))


def test_tensors_that_are_not_here_are_not_looked_at() -> None:
    network = networks.bert()
    there, other = pl.lift(network), copy.deepcopy(network)
    word = other.base_model.model.bert.embeddings.word_embeddings
    word.weight = nn.Parameter(word.weight.to("meta"), requires_grad=False)
    assert refusal(there, pl.lift(other)) is None


def test_it_goes_through_a_file() -> None:
    lora = pl.lift(networks.bert())
    descriptions, values = described([fingerprint(lora)])
    inner = NetworkDescription(**descriptions[0])
    (again,) = restored([inner], values)
    assert isinstance(again, Fingerprint)
    again.check(lora, "the file")


@pytest.mark.parametrize(
    "values", [torch.zeros(3, 32), torch.zeros(0, 32).double(), None]
)
def test_values_of_another_form_are_refused(values: Any) -> None:
    lora = pl.lift(networks.bert())
    (description,), _ = described([fingerprint(lora)])
    inner = NetworkDescription(**description)
    tensors = {} if values is None else {"networks/0": values}
    with pytest.raises(ValueError, match="networks/0"):
        restored([inner], tensors)


def test_the_default_dtype_is_of_no_matter() -> None:
    lora = pl.lift(networks.bert(dtype=torch.float32))
    expected = fingerprint(lora)
    torch.set_default_dtype(torch.float64)
    try:
        again = fingerprint(lora)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(again.values, expected.values)
