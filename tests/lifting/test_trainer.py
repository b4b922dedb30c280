"""Adapters trained by transformers' Trainer are lifted afterwards."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import disk_offload, dispatch_model
from peft import PeftModel
from torch import Tensor
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

import pyro_lora as pl
from tests.networks import (
    VOCABULARY,
    adapted,
    batch,
    bert,
    classifier,
    inputs,
    llama,
    particles,
    without_peft,
)
from tests.pages import blocks

NUM_DATA = 24

# Its arguments have other names from transformers 5.24 on, and 4.56 has only these.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")


def rows() -> list[dict[str, Tensor]]:
    """Texts whose label says whether the first token is in the upper half."""
    texts = batch(NUM_DATA)
    texts["labels"] = (texts["input_ids"][:, 0] > VOCABULARY // 2).long()
    return [{k: v[i] for k, v in texts.items()} for i in range(NUM_DATA)]


def trainer(network: PeftModel, path: Path, **settings: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "max_steps": 2,
        "learning_rate": 0.02,
        "per_device_train_batch_size": 8,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments = TrainingArguments(output_dir=str(path), **{**defaults, **settings})
    return Trainer(network, arguments, train_dataset=rows())


def one_by_one(
    lora: pl.LiftedNetwork, weights: dict[str, Tensor], texts: dict[str, Tensor]
) -> Tensor:
    """The network's own outputs with each particle loaded: (S, B, C)."""
    before, outputs = lora.weights(), []
    for s in range(3):
        lora.load({site: value[s] for site, value in weights.items()})
        outputs.append(lora.network(**texts).logits.detach())
    lora.load(before)
    return torch.stack(outputs)


@pytest.mark.untrained  # no prior in training
@pytest.mark.parametrize("kind", [bert, llama])
@pytest.mark.few(1)
def test_lifted_in_three_lines(kind: Any, tmp_path: Path) -> None:
    network = kind(dtype=torch.float32, lora_dropout=0.1)
    frozen = {
        k: p.clone() for k, p in network.named_parameters() if not p.requires_grad
    }
    training = trainer(network, tmp_path, max_steps=30)
    training.train()

    lora = pl.lift(training.model)
    guide = pl.AutoLaplace(
        classifier(lora, NUM_DATA), init_loc_fn=lora.init_to_adapter()
    )
    posterior = guide.laplace_approximation(training.get_train_dataloader())

    trained = {k: p for k, p in network.named_parameters() if p.requires_grad}
    for site, value in posterior.mode().items():
        assert_close(
            value, torch.stack([trained.pop(name) for name in lora.sites[site]])
        )
    assert not trained, "whatever the Trainer trained is lifted"
    parameters = dict(network.named_parameters())
    assert all(torch.equal(parameters[name], p) for name, p in frozen.items())
    batches = list(training.get_train_dataloader())
    prediction = pl.predict(
        posterior, batches, model=classifier(lora), method="linearized"
    )
    assert prediction.metrics()["accuracy"] > 0.8
    # It learned something, and knows that 24 texts leave room for doubt.
    at_mode = network.eval()(**inputs(batches[0])).logits.softmax(-1)
    assert (prediction.probs[:8].max(-1).values < at_mode.max(-1).values).all()


@pytest.mark.untrained
def test_the_page_about_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, train, lift = blocks("docs/training.md")[:3]
    network = bert(dtype=torch.float32)
    names: dict[str, Any] = {"pl": pl, "peft_model": network, "rows": rows()}
    exec(train.replace("report_to", "use_cpu=True, report_to"), names)

    def model(**data: Tensor) -> Tensor:
        return classifier(names["lora"], NUM_DATA)(**data)

    names["model"] = model
    exec(lift, names)
    assert isinstance(names["posterior"], pl.LaplacePosterior)


def test_a_saved_adapter_is_reloaded_and_lifted(tmp_path: Path) -> None:
    network = bert(dtype=torch.float32)
    training = trainer(network, tmp_path)
    training.train()
    training.save_model(str(tmp_path / "adapter"))
    expected = pl.lift(network).weights()
    texts = inputs(batch())
    output = network.eval()(**texts).logits
    base = without_peft(network)
    base.classifier = torch.nn.Linear(16, 2)  # the adapter brings its own

    lora = pl.lift(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    weights = lora.weights()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[site], value) for site, value in expected.items())
    with lora.bind(weights) as net:
        assert_close(net(**texts).logits, output)


@pytest.mark.parametrize("use_reentrant", [False, True, None])
@pytest.mark.few(1)
def test_gradient_checkpointing_left_on_by_the_trainer(
    use_reentrant: bool | None, tmp_path: Path
) -> None:
    network = llama(dtype=torch.float32)
    settings = None if use_reentrant is None else {"use_reentrant": use_reentrant}
    trainer(
        network,
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs=settings,
    ).train()
    assert network.training, "where it is used"
    lora = pl.lift(network)
    texts = inputs(batch())
    weights = {k: v.requires_grad_() for k, v in particles(lora, 3).items()}

    # It would recompute with other weights: refused, with the remedy.
    with (
        lora.bind(weights) as net,
        pytest.raises(ValueError, match=r'"context_fn": lora\.context_fn'),
    ):
        net(**texts)
    network.eval()  # where it isn't used
    gradients = [gradient(lora, weights, texts)]
    with torch.no_grad(), lora.bind(weights) as net:
        logits = net(**texts).logits
    assert_close(logits, one_by_one(lora, weights, texts))

    network.train()  # the remedy
    network.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={
            "use_reentrant": False,
            "context_fn": lora.context_fn,
        }
    )
    gradients.append(gradient(lora, weights, texts))
    network.gradient_checkpointing_disable()
    gradients.append(gradient(lora, weights, texts))
    assert_close(gradients[1], gradients[0])
    assert_close(gradients[2], gradients[0])


def gradient(
    lora: pl.LiftedNetwork, weights: dict[str, Tensor], texts: dict[str, Tensor]
) -> tuple[Tensor, ...]:
    with lora.bind(weights) as net:
        loss = net(**texts).logits.square().sum()
    return torch.autograd.grad(loss, list(weights.values()))


def test_autocast_left_on_by_the_trainer(tmp_path: Path) -> None:
    network = bert(dtype=torch.float32)
    training = trainer(network, tmp_path, bf16=True)
    training.train()
    network.eval()
    lora = pl.lift(network)
    assert {value.dtype for value in lora.weights().values()} == {torch.float32}
    texts = inputs(batch())
    weights = particles(lora, 3)
    outputs = []
    for _ in range(2):
        with torch.no_grad(), lora.bind(weights) as net:
            found = net(**texts).logits
        outputs.append((found, one_by_one(lora, weights, texts)))
        # And without autocast, as accelerate's documentation says how.
        training.accelerator.unwrap_model(network, keep_fp32_wrapper=False)
    (found, expected), (exact, expected_exact) = outputs
    assert found.dtype == expected.dtype == torch.float32
    bf16_error = 2**-7 * expected.abs().max().item()  # bf16 has 8 bits
    assert_close(found, expected, rtol=0, atol=bf16_error)
    assert_close(exact, expected_exact)
    assert (found - exact).abs().max() > 1e-4, "autocast was on"


def test_dropout_left_on_by_the_trainer_is_off_in_fits_and_predictions(
    tmp_path: Path,
) -> None:
    network = bert(dtype=torch.float32, dropout=0.5, lora_dropout=0.5)
    training = trainer(network, tmp_path)
    training.train()
    assert network.training
    lora = pl.lift(network)
    guide = pl.AutoLaplace(
        classifier(lora, NUM_DATA), init_loc_fn=lora.init_to_adapter()
    )
    batches = list(training.get_train_dataloader())
    with pytest.warns(UserWarning, match="aren't a mode"):
        first = guide.laplace_approximation(batches)
    with pytest.warns(UserWarning, match="aren't a mode"):
        second = guide.laplace_approximation(batches)
    assert_close(first.variance(), second.variance())
    predictions = [
        pl.predict(first, batches, model=classifier(lora), method="linearized").probs
        for _ in range(2)
    ]
    assert_close(*predictions)
    assert network.training, "and on again afterwards"


def test_the_trainer_goes_on_after_lifting(tmp_path: Path) -> None:
    network = bert(dtype=torch.float32)
    lora = pl.lift(network)
    with torch.no_grad(), lora.bind(particles(lora, 3)) as net:
        net(**inputs(batch()))
    before = lora.weights()
    training = trainer(network, tmp_path)
    training.train()
    after = lora.weights()
    assert all(not torch.equal(after[site], value) for site, value in before.items())

    unlifted, lifted = bert(dtype=torch.float32), bert(dtype=torch.float32)
    lifted.load_state_dict(unlifted.state_dict())
    pl.lift(lifted)
    for each in (unlifted, lifted):
        torch.manual_seed(0)  # of the data
        trainer(each, tmp_path).train()
    assert_close(dict(unlifted.state_dict()), dict(lifted.state_dict()), rtol=0, atol=0)


# device_map: accelerate's hooks move inputs, and weights that are offloaded.


def hooked_before_peft(network: PeftModel, devices: dict[str, Any]) -> PeftModel:
    """As ``from_pretrained(..., device_map=devices)`` and then ``get_peft_model``."""
    base = without_peft(network)
    dispatch_model(base, devices, main_device="cpu", force_hooks=True)
    return adapted(base, target_modules=["query", "value"], task_type="SEQ_CLS")


def hooked_after_peft(network: PeftModel, devices: dict[str, Any]) -> PeftModel:
    """As ``PeftModel.from_pretrained(..., device_map=devices)``."""
    devices = {f"base_model.model.{name}": where for name, where in devices.items()}
    dispatch_model(network, devices, main_device="cpu", force_hooks=True)
    return network


def device_map(first_layer: str | int = "cpu") -> dict[str, Any]:
    names = ["bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1"]
    names += ["bert.pooler", "dropout", "classifier"]
    return {**dict.fromkeys(names, "cpu"), "bert.encoder.layer.0": first_layer}


@pytest.mark.parametrize("first_layer", ["cpu", pytest.param(0, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("hooked", [hooked_before_peft, hooked_after_peft])
def test_a_network_spread_over_devices(
    hooked: Any, first_layer: str | int, caplog: pytest.LogCaptureFixture
) -> None:
    plain = bert(dtype=torch.float32)
    spread = hooked(bert(dtype=torch.float32), device_map(first_layer))
    spread.load_state_dict(plain.state_dict())
    layers = spread.base_model.model.bert.encoder.layer
    assert layers[0].attention.self.query.lora_A.default.weight.device == (
        torch.device(first_layer)
    )
    assert layers[1].attention.self.query.lora_A.default.weight.device.type == "cpu"

    texts = inputs(batch())
    loras = [pl.lift(plain), pl.lift(spread)]
    assert loras[1].sites == loras[0].sites
    values = particles(loras[0], 3)
    found = []
    for lora in loras:
        weights = {k: v.clone().requires_grad_() for k, v in values.items()}
        with lora.bind(weights) as net:
            logits = net(**texts).logits
        loss = logits.square().sum()
        found.append((logits, *torch.autograd.grad(loss, list(weights.values()))))
    for expected, value in zip(*found, strict=True):
        scale = expected.detach().abs().max().item()
        assert_close(value.cpu(), expected, rtol=0, atol=1e-5 * scale)
    for lora in loras:
        lora.load({site: value[0] for site, value in values.items()})
    assert_close(spread(**texts).logits, plain(**texts).logits)
    assert "one at a time" not in caplog.text


@pytest.mark.untrained
@pytest.mark.parametrize("hooked", [hooked_before_peft, hooked_after_peft])
def test_laplace_of_a_network_spread_over_devices(hooked: Any) -> None:
    plain = bert(dtype=torch.float32)
    spread = hooked(bert(dtype=torch.float32), device_map())
    spread.load_state_dict(plain.state_dict())
    data = batch(NUM_DATA)
    expected, posterior = [
        pl.AutoLaplace(
            classifier(lora, NUM_DATA), init_loc_fn=lora.init_to_adapter()
        ).laplace_approximation([data])
        for lora in [pl.lift(plain), pl.lift(spread)]
    ]
    for site, variance in expected.variance().items():
        assert_close(posterior.variance()[site], variance, rtol=1e-4, atol=0)


def test_an_offloaded_adapter_is_refused(tmp_path: Path) -> None:
    network = bert(dtype=torch.float32)
    texts = inputs(batch())
    expected = network(**texts).logits.detach()
    disk_offload(network, str(tmp_path), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"lora_A.*is on the meta device.*Load the"):
        pl.lift(network)
    assert_close(network(**texts).logits, expected)


def test_an_offloaded_layer_without_adapter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = bert(dtype=torch.float32, layers_to_transform=[1])
    first = plain.base_model.model.bert.encoder.layer[0]
    texts = inputs(batch())
    lora = pl.lift(plain)
    weights = particles(lora, 3)
    with torch.no_grad(), lora.bind(weights) as net:
        expected = net(**texts).logits
    disk_offload(first, str(tmp_path), execution_device=torch.device("cpu"))
    assert first.attention.self.key.weight.is_meta
    with torch.no_grad(), lora.bind(weights) as net:
        assert_close(net(**texts).logits, expected)
    assert "one at a time" not in caplog.text
