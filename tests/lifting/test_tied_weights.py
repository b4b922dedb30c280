"""Names that share their numbers: one storage is one site, or refused."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig

import pyro_lora as pl
from pyro_lora.lifting.sites import check_storages
from tests.networks import particles


def tied(**lora: Any) -> Any:
    """A causal Llama whose head is its embedding, with LoRA that PEFT ties alike."""
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    network = AutoModelForCausalLM.from_config(config).double()
    return get_peft_model(
        network,
        LoraConfig(task_type="CAUSAL_LM", r=2, ensure_weight_tying=True, **lora),
    ).eval()


def test_lora_that_peft_ties_by_views_is_refused() -> None:
    network = tied(target_modules=["q_proj", "embed_tokens", "lm_head"])
    message = (
        r"'.*embed_tokens\.lora_embedding_A.*' and '.*lm_head\.lora_B.*' are two views"
        r".*ensure_weight_tying=True.*target_modules"
    )
    with pytest.raises(ValueError, match=message):
        pl.lift(network)


def test_modules_to_save_that_peft_ties_are_one_site() -> None:
    network = tied(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    lora = pl.lift(network)
    (site,) = (site for site in lora.sites if not site.startswith("lora."))
    assert lora.zeros()[site].shape == (1, 50, 16)
    ids = torch.randint(1, 50, (3, 5))
    weights = {s: x.requires_grad_() for s, x in particles(lora).items()}
    with lora.bind(weights) as net:
        logits = net(input_ids=ids).logits
    gradients = torch.autograd.grad(logits.square().sum(), list(weights.values()))
    lora.load({s: x.detach() for s, x in weights.items()})
    parameters = [network.get_parameter(names[0]) for names in lora.sites.values()]
    expected = network(input_ids=ids).logits
    assert_close(logits, expected, rtol=0, atol=1e-12)
    exact = torch.autograd.grad(expected.square().sum(), parameters)
    for gradient, other in zip(gradients, exact, strict=True):
        assert_close(gradient[0], other, rtol=1e-10, atol=1e-10)


class Two(nn.Module):
    """Two linear layers, one after the other."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.first.weight, self.second.weight = first, second  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).tanh())
        return out


def test_one_parameter_in_two_layers_is_one_site() -> None:
    shared = nn.Parameter(torch.randn(3, 3).double())
    network = Two(shared, shared)
    lora = pl.lift(network)
    assert list(lora.sites.values()) == [("first.weight",)]
    value, x = torch.randn(1, 3, 3).double(), torch.randn(4, 3).double()
    with lora.bind(dict.fromkeys(lora.sites, value)) as net:
        assert torch.equal(net(x), (x @ value[0].mT).tanh() @ value[0].mT)


@pytest.mark.parametrize("trained", ["first", "second", "both"])
def test_two_parameters_on_the_same_numbers_are_refused(trained: str) -> None:
    weight = torch.randn(3, 3).double()
    network = Two(nn.Parameter(weight), nn.Parameter(weight.mT))
    network.first.requires_grad_(trained != "second")
    network.second.requires_grad_(trained != "first")
    with pytest.raises(ValueError, match=r"'(first|second)\.weight' and '.*two views"):
        pl.lift(network)


def test_parts_of_one_storage_are_parameters_of_their_own() -> None:
    flat = torch.randn(18).double()  # as sharded and offloaded training keeps them
    network = Two(
        nn.Parameter(flat[:9].reshape(3, 3)), nn.Parameter(flat[9:].reshape(3, 3))
    )
    assert sum(len(names) for names in pl.lift(network).sites.values()) == 2


VIEW = st.tuples(*[st.integers(1, 4)] * 4, st.integers(0, 8))


@given(VIEW, VIEW)
def test_views_are_refused_if_they_share_a_number(a: Any, b: Any) -> None:
    storage = torch.zeros(64)
    views = [storage.as_strided(x[:2], x[2:4], x[4]) for x in (a, b)]
    addresses = [
        {x[4] + i * x[2] + j * x[3] for i in range(x[0]) for j in range(x[1])}
        for x in (a, b)
    ]
    network = nn.Module()
    network.one, network.two = (nn.Parameter(view) for view in views)
    if addresses[0].isdisjoint(addresses[1]):
        check_storages(["one"], network)
    else:
        with pytest.raises(ValueError, match="'one' and 'two'"):
            check_storages(["one"], network)
