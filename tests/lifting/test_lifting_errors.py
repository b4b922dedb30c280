"""Bad input: an error that names the site and the remedy, and a network unharmed."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora.lifting.slots import LinearSlot
from tests.networks import (
    batch,
    bert,
    classifier,
    inputs,
    llama,
    particles,
    without_peft,
)

QUERY = "lora.bert.encoder.layer.attention.self.query"
LAYER = r"base_model\.model\.bert\.encoder\.layer\.0\.attention\.self\.query"


@contextmanager
def assert_refused(
    network: nn.Module, message: str, error: type[Exception] = ValueError
) -> Iterator[None]:
    """The error is raised, and what the network computes and holds stays the same."""
    texts = inputs(batch())
    before = network(**texts).logits
    values = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(error, match=message):
        yield
    assert torch.equal(network(**texts).logits, before)
    after = network.state_dict()
    assert [name for name in values if not torch.equal(values[name], after[name])] == []


# What lift refuses.


def test_nothing_trainable_and_no_adapter() -> None:
    network = without_peft(bert()).requires_grad_(False)
    with assert_refused(network, "Nothing to lift.*get_peft_model"):
        pl.lift(network)


def test_an_adapter_on_a_layer_that_transformers_has_split() -> None:
    network = bert()
    layer = network.base_model.model.bert.encoder.layer[0].attention.self.query
    layer.base_layer._hf_tp_plan = "colwise"  # as tp_plan="auto" leaves it
    with assert_refused(network, f"{LAYER}.lora_A.*split over.*tensor parallelism"):
        pl.lift(network)
    del layer.base_layer._hf_tp_plan
    network.base_model.model.classifier._hf_tp_plan = "colwise"  # PEFT's wrapper
    network.base_model.model.classifier.modules_to_save.default._hf_tp_plan = "colwise"
    with assert_refused(network, "classifier.*tensor parallelism"):
        pl.lift(network)


def test_no_adapter_but_one_was_named() -> None:
    network = without_peft(bert())
    with assert_refused(network, "adapter='default'.*the model has none"):
        pl.lift(network, adapter="default")


def test_an_unknown_adapter() -> None:
    network = bert()
    with assert_refused(network, r"No adapter 'other'.*\['default'\].*adapter="):
        pl.lift(network, adapter="other")


def two_adapters(network: PeftModel) -> PeftModel:
    layers = [name.split(".")[-1] for name in network.targeted_module_names]
    network.add_adapter("other", LoraConfig(r=2, target_modules=layers))
    return network


def test_an_adapter_that_is_not_active() -> None:
    network = two_adapters(bert())
    with assert_refused(
        network, rf"{LAYER}.*'other' is not active.*set_adapter\('other'\)"
    ):
        pl.lift(network, adapter="other")
    network.set_adapter("other")
    pl.lift(network, adapter="other")


def test_another_adapter_made_active_later() -> None:
    network = llama(None)
    lora = pl.lift(network)
    two_adapters(network)
    with lora.bind(lora.weights()) as net:
        net(**inputs(batch()))
    network.base_model.set_adapter(["default", "other"])
    with (
        pytest.raises(ValueError, match=r"'default' \['other'\] is active, .* none"),
        lora.bind(lora.weights()),
    ):
        pass
    network.base_model.set_adapter(["default"])
    with lora.bind(lora.weights()):
        pass


def test_several_active_adapters() -> None:
    network = two_adapters(llama(None))
    network.base_model.set_adapter(["default", "other"])
    with assert_refused(network, r"\['default', 'other'\].*adapter="):
        pl.lift(network)


def test_a_second_trainable_adapter() -> None:
    network = two_adapters(llama(None))
    network.base_model.set_adapter(["default", "other"])
    with assert_refused(
        network, r"\.other\.weight' belongs to an adapter that isn't lifted"
    ):
        pl.lift(network, adapter="default")


def test_a_merged_adapter_before_and_after_lifting() -> None:
    network = bert()
    network.merge_adapter()
    with assert_refused(network, rf"{LAYER}.*merged.*unmerge_adapter\(\)"):
        pl.lift(network)
    network.unmerge_adapter()
    lora = pl.lift(network)
    weights = particles(lora)
    network.merge_adapter()
    with (
        assert_refused(network, rf"{LAYER}.*merged.*unmerge_adapter\(\)"),
        lora.bind(weights),
    ):
        pass
    with assert_refused(network, rf"{LAYER}.*merged.*unmerge_adapter\(\)"):
        lora()


def test_a_merged_adapters_weights_are_neither_read_nor_written() -> None:
    network = bert()
    lora = pl.lift(network)
    weights = particles(lora)
    before = {name: x.clone() for name, x in network.state_dict().items()}
    network.merge_adapter()
    with assert_refused(network, rf"{LAYER}.*merged.*unmerge_adapter\(\)"):
        lora.load(weights)
    with assert_refused(network, rf"{LAYER}.*merged.*unmerge_adapter\(\)"):
        lora.weights()
    network.unmerge_adapter()
    for name, x in network.state_dict().items():
        assert_close(x, before[name], rtol=0, atol=1e-12)
    lora.load(weights)
    assert_close(lora.weights(), weights, rtol=0, atol=0)


def unloaded(network: Any) -> None:
    network.unload()


def adapted_again(network: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, of a second adapter
        get_peft_model(network.get_base_model(), network.peft_config["default"])


def with_another(path: str) -> Callable[[nn.Module], None]:
    def replace(network: nn.Module) -> None:
        other = copy.deepcopy(network.get_submodule(path))
        network.set_submodule(path, other)

    return replace


REPLACED: list[tuple[Callable[[], nn.Module], Callable[[Any], None]]] = [
    (llama, unloaded),
    (llama, adapted_again),
    (llama, with_another("base_model.model.model.layers.1")),
    (bert, with_another("base_model.model.classifier")),
    (lambda: without_peft(bert()), with_another("classifier")),
]


@pytest.mark.parametrize(("build", "replace"), REPLACED)
def test_what_was_lifted_is_replaced_after_lifting(build: Any, replace: Any) -> None:
    network = build()
    lora = pl.lift(network)
    weights = particles(lora)
    replace(network)
    for use in (lora, lambda: lora.bind(weights).__enter__(), lambda: lora.load({})):
        with pytest.raises(ValueError, match=r"taken out of the network.*Lift.*base"):
            use()


def test_what_was_lifted_is_put_into_another_module_after_lifting() -> None:
    network, texts = bert(), inputs(batch())
    lora = pl.lift(network)
    weights = particles(lora, 2)
    with lora.bind(weights) as net:
        expected = net(**texts).logits
    path = "base_model.model.bert.encoder"
    network.set_submodule(path, Wrapper(network.get_submodule(path)))
    for _ in range(2):  # it's looked for once
        with lora.bind(weights) as net:
            assert_close(net(**texts).logits, expected, rtol=0, atol=1e-12)


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def test_a_disabled_adapter_before_and_after_lifting() -> None:
    network = bert()
    message = rf"{LAYER}.*disabled.*enable_adapter_layers\(\)"
    with network.disable_adapter(), assert_refused(network, message):
        pl.lift(network)
    lora = pl.lift(network)
    with network.disable_adapter(), assert_refused(network, message):
        lora()
    with lora.bind(particles(lora)):
        pass


def test_what_is_not_a_module() -> None:
    lora = pl.lift(bert())
    with pytest.raises(TypeError, match=r"torch\.nn\.Module.*found a LiftedNetwork"):
        pl.lift(lora)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_adapter_with_nan(value: float) -> None:
    network = bert()
    layer = network.get_submodule(LAYER.replace("\\", ""))
    with torch.no_grad():
        layer.lora_B["default"].weight[1, 2] = value
    message = rf"'{QUERY}\.B'.*layer\.0\.attention.*NaN.*re-initialise"
    with pytest.raises(ValueError, match=message):
        pl.lift(network)
    assert not any(isinstance(module, LinearSlot) for module in network.modules())


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.LSTM(3, 3), r"'0\.weight_ih_l0'.*LSTM keeps references.*Freeze it"),
        (nn.Linear(3, 3, device="meta"), r"'0\.weight'.*meta device.*Load the network"),
    ],
)
def test_layers_that_cannot_be_lifted(layer: nn.Module, message: str) -> None:
    network = nn.Sequential(layer, nn.Linear(3, 3))
    with pytest.raises(ValueError, match=message):
        pl.lift(network)
    assert not any(isinstance(module, LinearSlot) for module in network.modules())
    layer.requires_grad_(False)
    pl.lift(network)


# What bind and load refuse.


def without_query(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {site: value for site, value in weights.items() if site != f"{QUERY}.A"}


def with_query(value: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {**weights, f"{QUERY}.A": value}


WRONG_WEIGHTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (without_query, rf"missing \['{QUERY}\.A'\].*lora\.sites"),
    "unknown": (
        lambda weights: {**weights, "head.other": torch.zeros(1)},
        r"unknown \['head\.other'\].*lora\.sites",
    ),
    "wrong shape": (
        with_query(torch.zeros(2, 3, 17)),
        rf"'{QUERY}\.A': expected shape \(\.\.\., 2, 3, 16\), found \(2, 3, 17\)",
    ),
    "too few dims": (
        with_query(torch.zeros(3, 16)),
        rf"'{QUERY}\.A': expected shape \(\.\.\., 2, 3, 16\), found \(3, 16\)",
    ),
    "dtype": (
        with_query(torch.zeros(2, 3, 16)),
        rf"'{QUERY}\.A': expected dtype torch\.float64, found torch\.float32.*\.to\(",
    ),
    "device": (
        with_query(torch.zeros(2, 3, 16, dtype=torch.float64, device="meta")),
        rf"'{QUERY}\.A': expected device cpu, found meta.*\.to\(",
    ),
    "nan": (
        with_query(torch.full((2, 3, 16), torch.nan).double()),
        rf"'{QUERY}\.A'.*NaN",
    ),
    "infinite": (
        with_query(torch.full((2, 3, 16), -torch.inf).double()),
        rf"'{QUERY}\.A'.*every value must be finite",
    ),
}


@pytest.mark.parametrize("case", list(WRONG_WEIGHTS))
@pytest.mark.parametrize("method", ["bind", "load"])
def test_wrong_weights(method: str, case: str) -> None:
    network = bert()
    lora = pl.lift(network)
    change, message = WRONG_WEIGHTS[case]
    weights = change(particles(lora))
    with assert_refused(network, message):
        if method == "load":
            lora.load(weights)
        with lora.bind(weights):
            pass
    with lora.bind(particles(lora)):
        pass


def test_load_takes_no_particles() -> None:
    network = bert()
    lora = pl.lift(network)
    with assert_refused(
        network, rf"'{QUERY}\.A': load takes one.*\(3, 2, 3, 16\).*Pick one"
    ):
        lora.load(particles(lora, 3))


def test_particle_dims_that_do_not_broadcast() -> None:
    network = bert()
    lora = pl.lift(network)
    weights = {**particles(lora, 3), f"{QUERY}.A": particles(lora, 2)[f"{QUERY}.A"]}
    message = rf"broadcast: '{QUERY}\.A' has \(2,\), '{QUERY}\.B' has \(3,\).*same"
    with assert_refused(network, message), lora.bind(weights):
        pass


def test_no_particles_at_all() -> None:
    network = bert()
    lora = pl.lift(network)
    with (
        assert_refused(network, r"\(0,\) hold no particle"),
        lora.bind(particles(lora, 0)),
    ):
        pass


# What a bound network refuses.


@pytest.mark.parametrize("lead", [(), (3,)])
def test_a_bound_network_after_its_block(lead: tuple[int, ...]) -> None:
    network, texts = bert(), inputs(batch())
    lora = pl.lift(network)
    with lora.bind(particles(lora, *lead)) as net:
        net(**texts)
    with assert_refused(network, "after its `with", RuntimeError):
        net(**texts)
    with pytest.raises(ZeroDivisionError), lora.bind(particles(lora)) as net:
        raise ZeroDivisionError
    with assert_refused(network, "after its `with", RuntimeError):
        net(**texts)


@pytest.mark.parametrize("lead", [(), (3,)])
def test_binding_inside_binding(lead: tuple[int, ...]) -> None:
    network, texts = bert(), inputs(batch())
    lora = pl.lift(network)
    with lora.bind(particles(lora, *lead)) as outer:
        expected = outer(**texts).logits
        with (
            pytest.raises(RuntimeError, match=r"Other weights.*before binding"),
            lora.bind(particles(lora)),
        ):
            pass
        sampled = lora()
        with pytest.raises(RuntimeError, match="Other weights are bound"):
            sampled(**texts)
        assert torch.equal(outer(**texts).logits, expected)
    with assert_refused(network, "after its `with", RuntimeError):
        outer(**texts)
    assert sampled(**texts).logits.shape == (5, 2)


def test_the_original_network_while_particles_are_bound() -> None:
    network, texts = bert(), inputs(batch())
    lora = pl.lift(network)
    with (
        assert_refused(network, "need folded inputs.*lora", RuntimeError),
        lora.bind(particles(lora, 3)),
    ):
        network(**texts)


@pytest.mark.filterwarnings("ignore:.*past_key_values.*deprecated:FutureWarning")
def test_a_cache_that_particles_would_share() -> None:
    network, texts = llama(None), inputs(batch(padding="left"))
    lora = pl.lift(network)
    (ids, mask), num_first = texts.values(), 6
    first = {"input_ids": ids[:, :num_first], "attention_mask": mask[:, :num_first]}
    last = {"input_ids": ids[:, num_first:], "attention_mask": mask}
    others = network(**first, use_cache=True).past_key_values
    with lora.bind(particles(lora, 3)) as net:
        with pytest.raises(ValueError, match=r"'past_key_values'.*one particle"):
            net(**last, past_key_values=others)
        own = net(**first, use_cache=True).past_key_values
        found = net(**last, past_key_values=own).logits
        expected = net(**texts).logits[..., num_first:, :]
        assert expected.shape == (3, 5, 1, 50)
        assert_close(found, expected, rtol=0, atol=1e-10)


def test_batch_norm_in_training_mode() -> None:
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    lora, x = pl.lift(network), torch.randn(5, 4)
    weights = particles(lora, 3)
    with lora.bind(weights) as net:
        with pytest.raises(ValueError, match=r"1: batch norm.*\.eval\(\)"):
            net(x)
        network.eval()
        assert net(x).shape == (3, 5, 2)


# What a model refuses.


def sampled_without(missing: str | None) -> Callable[[pl.LiftedNetwork], Any]:
    def prior(lora: pl.LiftedNetwork) -> Any:
        weights = {
            site: pyro.sample(site, dist.Normal(zeros, zeros + 1).to_event(zeros.ndim))
            for site, zeros in lora.zeros().items()
            if site != missing
        }
        return None if missing is None else weights

    return prior


def test_a_prior_that_misses_a_site() -> None:
    network = bert()
    lora = pl.lift(network, prior=sampled_without(f"{QUERY}.A"))
    with assert_refused(network, rf"missing \['{QUERY}\.A'\].*lora\.sites"):
        classifier(lora)(**batch())


def test_a_prior_that_forgets_to_return() -> None:
    network = bert()
    lora = pl.lift(network, prior=sampled_without(None))
    with assert_refused(network, r"returns.*by site.*NoneType", TypeError):
        classifier(lora)(**batch())


def test_a_prior_of_a_wrong_shape() -> None:
    network = bert()
    lora = pl.lift(
        network, prior=lambda lora: {k: v[0] for k, v in lora.zeros().items()}
    )
    with assert_refused(network, rf"'{QUERY}\.A': expected shape.*lora\.weights\(\)"):
        classifier(lora)(**batch())


def test_a_prior_that_gives_nan() -> None:
    network = bert()

    def prior(lora: pl.LiftedNetwork) -> dict[str, Tensor]:
        return {k: v * torch.nan for k, v in lora.zeros().items()}

    lora = pl.lift(network, prior=prior)
    with assert_refused(network, r"Site '.*NaN or infinite.*the run that made them"):
        classifier(lora)(**batch())


# What lift warns of.


def wide() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2000, 2000), nn.Tanh(), nn.Linear(2000, 2))


def test_a_whole_network_is_probably_a_mistake() -> None:
    network = wide()
    number = sum(p.numel() for p in network.parameters())
    with pytest.warns(UserWarning, match=f"found {number:,} .*'base.*get_peft_model"):
        lora = pl.lift(network)
    assert sum(x.numel() for x in lora.weights().values()) == number


def test_a_head_or_a_large_adapter_is_none() -> None:
    network = wide()
    network[0].requires_grad_(False)
    pl.lift(network)  # a warning would be an error
    config = LoraConfig(r=1100, target_modules=["0"], modules_to_save=["2"])
    lora = pl.lift(get_peft_model(wide(), config))
    assert sum(x.numel() for x in lora.weights().values()) > 4_000_000
