"""Stock Pyro leaves the network and the param store alone, and tells networks apart."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from peft import PeftModel
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Importance, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.inspect import get_model_relations
from pyro.optim import Adam
from torch import Tensor
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora.likelihood.model_trace import trace_at
from tests.networks import batch, bert, classifier, inputs, llama, particles

Model = Callable[..., Any]
Engine = Callable[[Model, pl.LiftedNetwork, dict[str, Tensor]], None]


@pytest.fixture
def network() -> PeftModel:
    return bert(num_layers=1, hidden_size=8)


@contextmanager
def assert_unchanged(network: PeftModel, folder: Path) -> Iterator[None]:
    """Everything that PEFT sees is the same after the block, bit by bit."""

    def state(name: str) -> tuple[Any, ...]:
        network.save_pretrained(folder / name, save_embedding_layers=False)
        files = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (folder / name).iterdir()
        }
        parameters = [
            (name, p.requires_grad, p.grad) for name, p in network.named_parameters()
        ]
        return files, parameters, list(network.state_dict()), network.training

    values = {name: value.clone() for name, value in network.state_dict().items()}
    before = state("before")
    yield
    assert state("after") == before
    after = network.state_dict()
    assert [name for name in values if not torch.equal(after[name], values[name])] == []


def svi(model: Model, lora: pl.LiftedNetwork, texts: dict[str, Tensor]) -> None:
    guide = AutoNormal(model, init_loc_fn=lora.init_to_adapter())
    SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO()).step(**texts)
    Predictive(model, guide=guide, num_samples=2, parallel=True)(**inputs(texts))


def importance(model: Model, lora: pl.LiftedNetwork, texts: dict[str, Tensor]) -> None:
    Importance(model, num_samples=2).run(**texts)


def nuts(model: Model, lora: pl.LiftedNetwork, texts: dict[str, Tensor]) -> None:
    kernel = NUTS(model, step_size=0.01, adapt_step_size=False, max_tree_depth=2)
    MCMC(kernel, num_samples=2, warmup_steps=1, disable_progbar=True).run(**texts)


def inspection(model: Model, lora: pl.LiftedNetwork, texts: dict[str, Tensor]) -> None:
    get_model_relations(model, model_kwargs=texts)


@pytest.mark.parametrize("engine", [svi, importance, nuts, inspection])
def test_an_engine_leaves_what_peft_saves_bit_identical(
    engine: Engine, network: PeftModel, tmp_path: Path
) -> None:
    texts = batch()
    lora = pl.lift(network)
    with assert_unchanged(network, tmp_path):
        engine(classifier(lora), lora, texts)


def test_lifting_leaves_the_param_store_empty(network: PeftModel) -> None:
    lora = pl.lift(network)
    model = classifier(lora)
    texts = batch()
    trace_at(model, lora.weights(), texts)
    Predictive(model, num_samples=2, parallel=True)(**inputs(texts))
    with lora.bind(particles(lora, 3)) as net:
        net(**inputs(texts))
    assert list(pyro.get_param_store()) == []


def test_every_site_knows_its_lifted_network(network: PeftModel) -> None:
    one, two = pl.lift(network), pl.lift(llama(), name="second")
    texts = inputs(batch())

    def model() -> None:
        pyro.sample("noise", dist.Normal(0.0, 1.0))
        one()(**texts)
        two()(**texts)

    nodes = poutine.trace(model).get_trace().nodes
    for lora in (one, two):
        for site in lora.sites:
            assert nodes[site]["infer"]["lora"] == (lora,)
    assert "lora" not in nodes["noise"]["infer"]


def test_two_networks_in_one_model() -> None:
    texts = batch()
    one, two = pl.lift(bert()), pl.lift(bert(), name="second")

    def model(labels: Tensor, **kwargs: Tensor) -> Tensor:
        logits = one()(**kwargs).logits + two()(**kwargs).logits
        with pyro.plate("data", 5):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    trace = trace_at(model, one.weights() | two.weights(), texts)
    expected = sum(lora.network(**inputs(texts)).logits for lora in (one, two))
    found = trace.nodes["y"]["fn"].logits
    assert_close(found, expected.log_softmax(-1), rtol=0, atol=1e-12)
