"""Each row of the table of what can be lifted is true."""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from peft import LoraConfig
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from pyro.optim import Adam
from torch import Tensor, nn
from torch.testing import assert_close

import pyro_lora as pl
from tests.lifting.liftable import TABLE
from tests.lifting.liftable_oracle import (
    NUM_PARTICLES,
    Sites,
    Weights,
    assert_same,
    bound,
    built,
    noisy,
    one_by_one,
    output_of,
    plain,
)
from tests.lifting.liftable_row import Row, attention_lora, bert, llama, started, texts
from tests.lifting.liftable_row import lora as lora_on
from tests.lifting.liftable_toys import STATEFUL, Toy, centred

pytestmark = [
    # transformers' new name for its caches, which peft doesn't use yet.
    pytest.mark.filterwarnings("ignore:.*past_key_values.*deprecated:FutureWarning"),
    # torch, on the sparse tensors of peft's SHiRA and FRoD.
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]


def rows(*, refused: bool) -> list[Any]:
    return [
        pytest.param(row, id=f"{row.group} / {row.name}")
        for row in TABLE
        if bool(row.refused) is refused
    ]


@contextmanager
def assert_unchanged(network: nn.Module, inputs: Mapping[str, Any]) -> Iterator[None]:
    """The network computes and holds the same after the block, bit by bit."""
    output = output_of(network, inputs)

    def state() -> tuple[Any, ...]:
        parameters = [
            (name, p.requires_grad, p.grad) for name, p in network.named_parameters()
        ]
        modes = [module.training for module in network.modules()]
        return parameters, list(network.state_dict()), modes

    values = {name: value.clone() for name, value in network.state_dict().items()}
    before = state()
    yield
    assert state() == before
    after = network.state_dict()
    assert [name for name in values if not torch.equal(after[name], values[name])] == []
    assert torch.equal(output_of(network, inputs), output)


@contextmanager
def first_dims(network: nn.Module) -> Iterator[list[int]]:
    """The first dims of the inputs of every call of the network during the block."""
    sizes: list[int] = []

    def record(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        sizes.append(next(iter(kwargs.values())).shape[0])

    handle = network.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield sizes
    finally:
        handle.remove()


def sites_in_words(sites: Sites) -> set[str]:
    """``{"lora: A, B", "head: weight"}``: the kinds of sites and the roles of each."""
    roles: dict[str, set[str]] = {}
    for site in sites:
        name = re.sub(r"_\d+(x\d+)*$", "", site)  # of stacks that differ in shape
        kind, *_, role = [part for part in name.split(".") if not part.isdigit()]
        roles.setdefault(kind, set()).add(role)
    return {f"{kind}: {', '.join(sorted(r))}" for kind, r in roles.items()}


def assert_named_well(lora: pl.LiftedNetwork, trainable: set[str]) -> None:
    names = [name for members in lora.sites.values() for name in members]
    assert len(names) == len(set(names))
    assert trainable - set(names) == set()
    parameters = dict(lora.network.named_parameters())
    for site, value in lora.weights().items():
        members = [parameters[name] for name in lora.sites[site]]
        assert value.shape == (len(members), *members[0].shape)
        assert not re.search(r"(layers?|blocks?|h)\.\d", site)
        assert not any(other.startswith(f"{site}.") for other in lora.sites)
        assert not site.startswith("model.")


@pytest.mark.parametrize("row", rows(refused=False))
@pytest.mark.few(64)
def test_can_be_lifted(row: Row, caplog: pytest.LogCaptureFixture) -> None:
    original = built(row)
    network, inputs = copy.deepcopy(original), row.inputs()
    trainable = {n for n, p in network.named_parameters() if p.requires_grad}
    with assert_unchanged(network, inputs):
        lora = pl.lift(network, **row.lift)
        assert_named_well(lora, trainable)
        assert sites_in_words(lora.sites) == set(row.sites.split("; "))
        weights = lora.weights()
        expected = plain(original, inputs, lora.sites, weights)
        assert_same(bound(lora, inputs, weights), expected, row.tolerance)
        assert any(gradient.any() for gradient in expected[1].values())

        particles = noisy(lora, dict(network.named_parameters()))
        if row.raises:
            with pytest.raises(ValueError, match=row.raises):
                bound(lora, inputs, particles)
            return
        expected = one_by_one(original, inputs, lora.sites, particles)
        assert (expected[0][0] - expected[0][1]).abs().max() > 1e-3
        with first_dims(network) as sizes:
            output = bound(lora, inputs, particles)
        assert_same(output, expected, row.tolerance)
        together = sizes[-1] == NUM_PARTICLES * next(iter(inputs.values())).shape[0]
        assert together is not bool(row.one_by_one)
        reasons = [r.getMessage() for r in caplog.records if "pyro_lora" in r.name]
        assert len(reasons) == bool(row.one_by_one), reasons

        lora.load({site: value[0] for site, value in particles.items()})
        assert_same(
            (output_of(network, inputs), {}), (expected[0][0], {}), row.tolerance
        )
        lora.load(weights)


@pytest.mark.parametrize(
    "name", ["BERT", "RoBERTa", "DeBERTa-v2", "Llama", "GPT-2", "Mixtral", "T5"]
)
def test_texts_may_be_as_long_as_the_folded_batch(name: str) -> None:
    row = next(row for row in TABLE if row.name == name)
    original, ids = built(row), torch.randint(1, 50, (2, 2 * NUM_PARTICLES))
    inputs = {"input_ids": ids}
    if "decoder_input_ids" in row.inputs():
        inputs["decoder_input_ids"] = ids.flip(1)
    lora = pl.lift(copy.deepcopy(original))
    particles = noisy(lora, dict(original.named_parameters()))
    expected = one_by_one(original, inputs, lora.sites, particles)
    assert_same(bound(lora, inputs, particles), expected, row.tolerance)


@pytest.mark.parametrize(
    "name",
    [
        "nn.Embedding",
        "DoRA",
        "IA3",
        "VB-LoRA",
        "P-tuning",
        "all weights of an encoder",
    ],
)
def test_particle_dims_of_any_kind_of_layer(name: str) -> None:
    row = next(row for row in TABLE if row.name == name)
    original, inputs = built(row), row.inputs()
    lora = pl.lift(copy.deepcopy(original))
    particles = noisy(lora, dict(original.named_parameters()))
    last = list(lora.sites)[-1]
    particles[last] = particles[last][:1].expand_as(particles[last])  # the same for all
    expected, _ = one_by_one(original, inputs, lora.sites, particles)
    B = expected.shape[1]
    for lead, kept in [((3,), (3, B)), ((3, 1), (3, B)), ((3, 1, 1), (3, 1, B))]:
        weights = {s: w.reshape(*lead, *w.shape[1:]) for s, w in particles.items()}
        weights[last] = particles[last][0]
        with lora.bind(weights) as net:
            output = output_of(net, inputs)
        assert output.shape[: len(kept)] == kept
        assert_close(output.view_as(expected), expected, rtol=0, atol=row.tolerance)


@pytest.mark.parametrize(
    "name", ["DoRA", "IA3", "VB-LoRA", "prompt tuning", "all weights of a decoder"]
)
def test_svgd_and_a_vectorised_elbo_see_the_log_joint_of_each_particle(
    name: str,
) -> None:
    row = next(row for row in TABLE if row.name == name)
    lora, inputs = pl.lift(built(row)), row.inputs()

    def model(**inputs: Tensor) -> None:
        output = output_of(lora(), inputs)
        with pyro.plate("data", 10, subsample=inputs["input_ids"]):
            normal = dist.Normal(output, 1.0).to_event(2)
            pyro.sample("y", normal, obs=torch.zeros(output.shape[-3:]).to(output))

    def minus_log_joint(weights: Weights) -> float:
        trace = pyro.poutine.trace(pyro.condition(model, weights)).get_trace(**inputs)
        return -float(trace.log_prob_sum())

    init = lora.init_to_adapter(jitter=0.1)
    guide = AutoDelta(model, init_loc_fn=init)
    elbo = Trace_ELBO(NUM_PARTICLES, vectorize_particles=True, max_plate_nesting=1)
    loss = elbo.loss(model, guide, **inputs)
    assert loss == pytest.approx(minus_log_joint(guide.median()), rel=1e-10)

    svgd = pl.SVGD(
        model, pl.kernels.RBF(), Adam({"lr": 1e-2}), NUM_PARTICLES, init_loc_fn=init
    )
    svgd.step(**inputs)
    particles = svgd.get_samples()
    singles = [{s: w[i] for s, w in particles.items()} for i in range(NUM_PARTICLES)]
    mean = sum(map(minus_log_joint, singles)) / NUM_PARTICLES
    assert svgd.step(**inputs) == pytest.approx(mean, rel=1e-10)


def test_two_lifted_networks_in_one_model_share_no_site() -> None:
    one, two = attention_lora(llama()), lora_on(bert(), "query", "value")
    first, second = pl.lift(one, name="one"), pl.lift(two, name="two")
    assert first.sites.keys().isdisjoint(second.sites)
    assert all(site.split(".")[1] == "one" for site in first.sites)
    inputs = texts()

    def model() -> Tensor:
        with pyro.plate("particles", NUM_PARTICLES, dim=-1):
            return output_of(first(), inputs) + output_of(second(), inputs)

    trace = pyro.poutine.trace(model).get_trace()
    draws = {site: trace.nodes[site]["value"] for site in (*first.sites, *second.sites)}
    expected = sum(
        one_by_one(net, inputs, lora.sites, {site: draws[site] for site in lora.sites})[
            0
        ]
        for net, lora in ((one, first), (two, second))
    )
    assert_close(trace.nodes["_RETURN"]["value"], expected, rtol=0, atol=1e-10)


def test_each_adapter_of_a_network_can_be_lifted() -> None:
    network: Any = attention_lora(llama())
    network.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
    started(network)
    original, inputs = copy.deepcopy(network), texts()
    lifted = {"default": pl.lift(network, name="one")}
    network.set_adapter("other")
    lifted["other"] = pl.lift(network, name="two")
    assert lifted["default"].sites.keys().isdisjoint(lifted["other"].sites)
    for adapter, lora in lifted.items():
        for peft_model in (network, original):
            peft_model.set_adapter(adapter)
        particles = noisy(lora, dict(network.named_parameters()))
        expected = one_by_one(original, inputs, lora.sites, particles)
        assert_same(bound(lora, inputs, particles), expected, 1e-12)


def test_mixing_is_seen_although_the_particles_coincide_at_first() -> None:
    original = Toy(centred)
    network, inputs = copy.deepcopy(original), {"x": torch.randn(2, 5, 4).double()}
    lora = pl.lift(network)
    bound(lora, inputs, {s: torch.stack([w] * 3) for s, w in lora.weights().items()})
    particles = noisy(lora, dict(network.named_parameters()))
    together = bound(lora, inputs, particles)
    expected = one_by_one(original, inputs, lora.sites, particles)
    assert_same(together, expected, 1e-12)


@pytest.mark.parametrize("name", STATEFUL)
def test_a_network_that_writes_into_its_buffers_sees_one_particle_at_a_time(
    name: str,
) -> None:
    original = STATEFUL[name]()
    network, inputs = copy.deepcopy(original), {"x": torch.randn(2, 5, 4).double()}
    lora = pl.lift(network)
    particles = noisy(lora, dict(network.named_parameters()))
    together, _ = bound(lora, inputs, particles)
    parameters = dict(original.named_parameters())
    for i in range(NUM_PARTICLES):  # each starts at what the one before has left
        for site, names in lora.sites.items():
            for name, value in zip(names, particles[site][i], strict=True):
                parameters[name].data.copy_(value)
        assert_close(together[i], output_of(original, inputs), rtol=0, atol=1e-12)
    assert_close(dict(network.named_buffers()), dict(original.named_buffers()))


@pytest.mark.parametrize("row", rows(refused=True))
def test_is_refused(row: Row) -> None:
    network, inputs = built(row), row.inputs()
    with (
        assert_unchanged(network, inputs),
        pytest.raises(ValueError, match=row.refused),
    ):
        pl.lift(network, **row.lift)
