"""One mode, saved adapters, deep ensembles and MC dropout, each as a posterior."""

from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from torch import Tensor, nn
from torch.testing import assert_close

import pyro_lora as pl
from tests import networks
from tests.predict import models


def saved(lora: pl.LiftedNetwork, weights: dict[str, Tensor], folder: Path) -> Path:
    """What ``save_pretrained`` writes when the adapter has these weights."""
    before = lora.weights()
    lora.load(weights)
    lora.network.save_pretrained(str(folder), save_embedding_layers=False)
    lora.load(before)
    return folder


def test_the_mode_as_a_posterior() -> None:
    lora, model = models.classifier(3)
    batches = models.two_batches(3)
    posterior = models.laplace(lora, model, batches)
    found = pl.predict(pl.ensemble(lora, [posterior.mode()]), batches, model=model)
    logits = torch.cat([models.logits_at(lora, posterior.mode(), b) for b in batches])
    assert_close(found.probs, logits.softmax(-1))
    assert found.epistemic_entropy.max() < 1e-12


def test_the_mode_has_the_other_latent_sites() -> None:
    lora = pl.lift(networks.bert(1))
    model = pl.models.regression(lora, models.NUM_DATA)
    batches = [{**b, "labels": b["labels"].double()} for b in models.two_batches()]
    mode = models.laplace(lora, model, batches).mode()
    found = pl.predict(pl.ensemble(lora, [mode]), batches, model=model)
    assert_close(found.noise_variance, mode["noise"].square().expand(10).double())


@pytest.mark.parametrize(
    ("network", "options"),
    [
        (networks.bert, {}),
        (networks.bert, {"bias": "lora_only"}),
        (networks.bert, {"use_dora": True}),
        (networks.llama, {}),
    ],
)
def test_saved_adapters_and_weights_are_members(
    network: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    lora = pl.lift(network(**options))
    before = lora.weights()
    drawn = models.jittered(lora, 3)
    sets = [models.draw(drawn, k) for k in range(3)]
    members: list[Any] = [
        saved(lora, sets[0], tmp_path / "first"),
        sets[1],
        str(saved(lora, sets[2], tmp_path / "third")),
    ]
    found = pl.ensemble(lora, members)
    assert found.num_particles == 3
    for site, value in drawn.items():
        assert_close(found.particles[site], value)
    assert all(torch.equal(x, before[s]) for s, x in lora.weights().items())


def test_an_ensemble_equals_a_loop(tmp_path: Path) -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    drawn = models.jittered(lora, 3)
    folders = [
        saved(lora, models.draw(drawn, k), tmp_path / f"seed_{k}") for k in range(3)
    ]
    found = pl.predict(pl.ensemble(lora, folders), batches, model=model)
    probs, aleatoric = models.averaged(lora, drawn, batches)
    assert_close(found.probs, probs)
    assert_close(found.aleatoric_entropy, aleatoric)


def test_members_that_do_not_fit_are_named(tmp_path: Path) -> None:
    lora, _ = models.classifier()
    own = lora.weights()
    with pytest.raises(ValueError, match="at least one member"):
        pl.ensemble(lora, [])
    with pytest.raises(ValueError, match="Put it into a list"):
        pl.ensemble(lora, own)  # type: ignore[arg-type]
    site = "head.classifier.bias"
    less = {s: x for s, x in own.items() if s != site}
    with pytest.raises(ValueError, match=rf"Member 1, site '{site}'.*no such site"):
        pl.ensemble(lora, [own, less])
    with pytest.raises(ValueError, match=r"Member 0, .*\(3, 1, 2\).*one by one"):
        pl.ensemble(lora, [{**own, site: torch.zeros(3, 1, 2)}])
    more = {**own, "noise": torch.ones(())}
    with pytest.raises(ValueError, match=r"Member 1, site 'noise'.*found no such site"):
        pl.ensemble(lora, [more, own])
    with pytest.raises(ValueError, match=r"Member 1, .*'noise': expected no such site"):
        pl.ensemble(lora, [own, more])
    with pytest.raises(ValueError, match="holds no adapter_config"):
        pl.ensemble(lora, [tmp_path])
    plain = pl.lift(nn.Linear(2, 1))
    with pytest.raises(ValueError, match="expected a PeftModel"):
        pl.ensemble(plain, [tmp_path])


@pytest.mark.parametrize("frozen", ["lora_A", "classifier"])
def test_a_folder_with_other_frozen_weights_is_refused(
    frozen: str, tmp_path: Path
) -> None:
    task: Any = {"task_type": None} if frozen == "classifier" else {}
    network = networks.bert(**task)
    for name, parameter in network.named_parameters():
        if frozen in name:
            parameter.requires_grad_(False)
    lora = pl.lift(network)
    own = saved(lora, lora.weights(), tmp_path / "own")
    networks.bert().save_pretrained(str(tmp_path / "other"))
    before = {name: x.clone() for name, x in network.state_dict().items()}
    assert pl.ensemble(lora, [own]).num_particles == 1
    with pytest.raises(ValueError, match=f"another '.*{frozen}.* isn't lifted"):
        pl.ensemble(lora, [tmp_path / "other"])
    after = network.state_dict()
    assert all(torch.equal(after[name], x) for name, x in before.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_alpha": 7}, "lora_alpha is 7, but the lifted adapter's is 6"),
        ({"r": 2}, "r is 2, but the lifted adapter's is 3"),
        ({"hidden_size": 8}, "an adapter of another network"),
        ({"num_layers": 1}, "which site .* needs"),
    ],
)
def test_foreign_folders_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    lora, _ = models.classifier()
    before = lora.weights()
    other = pl.lift(networks.bert(**options))
    folder = saved(other, other.weights(), tmp_path / "other")
    with pytest.raises(ValueError, match=message):
        pl.ensemble(lora, [folder])
    assert all(torch.equal(x, before[s]) for s, x in lora.weights().items())


# Of the network, of the folder, and what is said of it.
OTHER_ADAPTERS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {},
        {"target_modules": ["query", "key", "value"]},
        r"holds '.*self\.key\.lora_A\.weight' \(4 such\).*no parameter",
    ),
    (
        {"layers_to_transform": [1]},
        {},
        r"holds '.*layer\.0\..*query\.lora_A\.weight' \(4 such\).*no parameter",
    ),
    ({}, {"lora_bias": True}, "lora_bias is True, but the lifted adapter's is False"),
    ({}, {"trainable_token_indices": [1, 2]}, r"token_indices is \[1, 2\], .* is None"),
    (
        {"trainable_token_indices": [1, 3]},
        {"trainable_token_indices": [1, 2]},
        r"token_indices is \[1, 2\], .* is \[1, 3\]",
    ),
    ({}, {"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', .* is True"),
    ({"init_lora_weights": "olora"}, {}, "init_lora_weights is True, .* is 'olora'"),
    ({}, {"task_type": None}, r"has no '.*classifier\.\w+', which the lifted"),
    ({"task_type": None}, {}, r"has another '.*classifier\.\w+' than .* isn't lifted"),
]


@pytest.mark.filterwarnings("ignore:.*have invalid shape")  # PEFT's, of lora_bias
@pytest.mark.parametrize(("own", "other", "message"), OTHER_ADAPTERS)
def test_folders_that_hold_another_adapter_are_refused(
    own: dict[str, Any], other: dict[str, Any], message: str, tmp_path: Path
) -> None:
    lora = pl.lift(networks.bert(dtype=torch.float32, **own))
    foreign = networks.bert(dtype=torch.float32, **other)
    foreign.save_pretrained(str(tmp_path), save_embedding_layers=False)
    before = {name: x.clone() for name, x in lora.network.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        pl.ensemble(lora, [tmp_path])
    after = lora.network.state_dict()
    assert all(torch.equal(after[name], x) for name, x in before.items())


def test_a_start_that_leaves_the_base_does_not_matter(tmp_path: Path) -> None:
    other = networks.bert(init_lora_weights="gaussian")
    other.save_pretrained(str(tmp_path), save_embedding_layers=False)
    found = pl.ensemble(pl.lift(networks.bert()), [tmp_path]).particles
    for site, value in pl.lift(other).weights().items():
        assert torch.equal(found[site][0], value)


def draws(network: Any, batch: dict[str, Tensor], num_samples: int) -> Tensor:
    """Probabilities (S, B, C): rows of one batch are dropped out each by itself."""
    rows = {k: x.repeat(num_samples, 1) for k, x in networks.inputs(batch).items()}
    probs: Tensor = network(**rows).logits.softmax(-1)
    return probs.unflatten(0, (num_samples, -1))


@pytest.mark.parametrize("name", ["dropout", "lora_dropout"])
def test_dropout_is_left_on(name: str) -> None:
    network = networks.bert(**{name: 0.4})
    lora, model = models.classifier(network=network)
    batches = models.two_batches()
    posterior = pl.mc_dropout(lora)
    for node in poutine.trace(posterior).get_trace().nodes.values():
        assert node["type"] != "sample" or node["infer"]["lora"] == (lora,)
    modes = {n: m.training for n, m in network.named_modules()}
    num_samples = 200
    pyro.set_rng_seed(0)
    found = pl.predict(posterior, batches, model=model, num_samples=num_samples)
    assert found.epistemic_entropy.min() > 1e-5  # 0 without
    assert {n: m.training for n, m in network.named_modules()} == modes
    network.train()
    with torch.no_grad():
        each = torch.cat([draws(network, b, num_samples) for b in batches], 1)
    error = 5 * each.std(0) * (2 / num_samples) ** 0.5  # of two means of draws
    assert ((found.probs - each.mean(0)).abs() < error).all()
    off = pl.predict(pl.ensemble(lora, [lora.weights()]), batches, model=model)
    assert ((found.probs - off.probs).abs() > error / 10).any()


def test_the_seed_decides_what_is_dropped() -> None:
    lora, model = models.classifier(network=networks.bert(dropout=0.4))
    batches = models.two_batches()

    def probs(seed: int) -> Tensor:
        pyro.set_rng_seed(seed)
        posterior = pl.mc_dropout(lora)
        return pl.predict(posterior, batches, model=model, num_samples=9).probs

    assert torch.equal(probs(1), probs(1))
    assert not torch.allclose(probs(1), probs(2), atol=1e-3)


def test_dropout_of_other_weights() -> None:
    lora, model = models.classifier(network=networks.bert(dropout=0.01))
    batches = models.two_batches()
    weights = models.draw(models.jittered(lora, 1), 0)
    posterior = pl.mc_dropout(lora, weights)
    found = pl.predict(posterior, batches, model=model, num_samples=64)
    at = torch.cat([models.logits_at(lora, weights, b) for b in batches]).softmax(-1)
    assert (found.probs - at).abs().max() < 0.1
    drawn = Predictive(model, guide=posterior, num_samples=2)(
        **networks.inputs(batches[0])
    )
    assert drawn["y"].shape == (2, 6)


def test_a_network_without_dropout_is_refused() -> None:
    lora, _ = models.classifier()
    with pytest.raises(ValueError, match="has no dropout"):
        pl.mc_dropout(lora)
    dropping = pl.lift(networks.bert(dropout=0.1))
    some = dict(list(dropping.weights().items())[1:])
    with pytest.raises(ValueError, match="is missing from the weights"):
        pl.mc_dropout(dropping, some)


def test_a_table_of_methods_is_one_loop() -> None:
    lora, model = models.classifier(network=networks.bert(dropout=0.1))
    batches = models.two_batches()
    laplace = models.laplace(lora, model, batches)
    methods: dict[str, tuple[Any, dict[str, Any]]] = {
        "map": (pl.ensemble(lora, [laplace.mode()]), {}),
        "ensemble": (models.particles(lora, model), {}),
        "dropout": (pl.mc_dropout(lora, laplace.mode()), {"num_samples": 5}),
        "laplace": (laplace, {"method": "linearized"}),
    }
    rows = {}
    for name, (posterior, options) in methods.items():
        held_out = pl.predict(posterior, batches, model=model, **options)
        rows[name] = held_out.metrics()
        scaled = held_out.with_temperature(pl.fit_temperature(held_out))
        rows[f"{name}, scaled"] = scaled.metrics()
        assert rows[f"{name}, scaled"]["nll"] <= rows[name]["nll"] + 1e-9
        assert rows[f"{name}, scaled"]["accuracy"] == rows[name]["accuracy"]
    assert len(rows) == 8
