"""Trained in full under GaLore, outside of Pyro; then Bayesian over a chosen part."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

import pyro_lora as pl
from tests.networks import VOCABULARY, batch, bert, classifier, inputs, without_peft

galore_torch = pytest.importorskip("galore_torch")

pytestmark = pytest.mark.filterwarnings("ignore:This implementation of AdamW")

NUM_DATA = 32
RANK = 2
TARGETS = r".*encoder.*(query|key|value|dense)"


def texts() -> dict[str, Tensor]:
    """Texts whose label says whether the first token is in the upper half."""
    data = batch(NUM_DATA)
    data["labels"] = (data["input_ids"][:, 0] > VOCABULARY // 2).long()
    return data


def galore_matrices(network: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name: p
        for name, p in network.named_parameters()
        if "encoder" in name and p.ndim == 2
    }


def by_a_loop(network: nn.Module, data: dict[str, Tensor], steps: int, _: Path) -> None:
    matrices = galore_matrices(network)
    others = [p for name, p in network.named_parameters() if name not in matrices]
    projected = {"rank": RANK, "update_proj_gap": 20, "scale": 1.0, "proj_type": "std"}
    optimizer = galore_torch.GaLoreAdamW(
        [{"params": others}, {"params": list(matrices.values()), **projected}], lr=0.01
    )
    for _step in range(steps):
        optimizer.zero_grad()
        network(**data).loss.backward()
        optimizer.step()


def by_the_trainer(
    network: nn.Module, data: dict[str, Tensor], steps: int, path: Path
) -> None:
    arguments = TrainingArguments(
        output_dir=str(path),
        optim="galore_adamw",
        optim_target_modules=TARGETS,
        optim_args=f"rank={RANK}, update_proj_gap=20, scale=1.0",
        learning_rate=0.01,
        lr_scheduler_type="constant",
        max_steps=steps,
        per_device_train_batch_size=NUM_DATA,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = [{k: v[i] for k, v in data.items()} for i in range(NUM_DATA)]
    Trainer(network, arguments, train_dataset=rows).train()


Train = Callable[[nn.Module, dict[str, Tensor], int, Path], None]


def network() -> Any:
    """A classifier without adapter, all of it trainable."""
    return without_peft(bert(dtype=torch.float32)).requires_grad_(True)


@pytest.mark.parametrize("train", [by_a_loop, by_the_trainer])
def test_a_step_has_the_rank_of_its_projection(train: Train, tmp_path: Path) -> None:
    net, data = network(), texts()
    before = {name: p.clone() for name, p in net.named_parameters()}
    train(net, data, 5, tmp_path)  # within one update_proj_gap
    for name, p in net.named_parameters():
        step = (p - before[name]).detach()
        assert step.abs().max() > 0
        if name in galore_matrices(net):
            rank = torch.linalg.matrix_rank(step, rtol=1e-3)  # float32
            assert rank <= RANK < min(p.shape)


def only(net: nn.Module, *chosen: str) -> set[str]:
    """Freeze all but the parameters whose names start so; returns their names."""
    for name, p in net.named_parameters():
        p.requires_grad_(name.startswith(chosen))
    return {name for name, p in net.named_parameters() if p.requires_grad}


LAST_LAYER = ["classifier"]
LAST_LAYERS = ["classifier", "bert.pooler"]
LAST_MLP = [
    "bert.encoder.layer.1.intermediate.dense",
    "bert.encoder.layer.1.output.dense",
]


@pytest.mark.untrained  # no prior in training
@pytest.mark.parametrize(
    ("train", "chosen"),
    [
        (by_a_loop, LAST_LAYER),
        (by_a_loop, LAST_MLP),
        (by_the_trainer, LAST_LAYERS),
    ],
)
@pytest.mark.few(1)
def test_laplace_over_a_part_of_it(
    train: Train, chosen: list[str], tmp_path: Path
) -> None:
    net, data = network(), texts()
    train(net, data, 60, tmp_path)
    names = only(net, *chosen)
    trained = {name: p.clone() for name, p in net.named_parameters()}

    lora = pl.lift(net.eval())
    model = classifier(lora, NUM_DATA)
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
    posterior = guide.laplace_approximation([data])
    prediction = pl.predict(posterior, [data], model=model, method="linearized")

    assert sorted(n for members in lora.sites.values() for n in members) == sorted(
        names
    )
    for site, value in posterior.mode().items():
        assert_close(value, torch.stack([trained[name] for name in lora.sites[site]]))
    assert prediction.metrics()["accuracy"] > 0.9
    at_mode = net(**inputs(data)).logits.softmax(-1)
    assert (prediction.probs.max(-1).values < at_mode.max(-1).values).all()
    after = dict(net.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in trained.items())


def test_a_stock_guide_over_the_last_layer(tmp_path: Path) -> None:
    net, data = network(), texts()
    by_a_loop(net, data, 60, tmp_path)
    only(net, "classifier")
    lora = pl.lift(net.eval(), prior=pl.priors.normal(scale=2.0))
    model = classifier(lora, NUM_DATA)
    guide = AutoNormal(model, init_loc_fn=lora.init_to_adapter(), init_scale=0.02)
    svi = SVI(model, guide, Adam({"lr": 0.05}), Trace_ELBO())
    losses = [torch.tensor([svi.evaluate_loss(**data) for _ in range(50)])]
    for _ in range(60):
        svi.step(**data)
    losses.append(torch.tensor([svi.evaluate_loss(**data) for _ in range(50)]))
    before, after = [x.mean() for x in losses]
    error = torch.stack([x.var() / len(x) for x in losses]).sum().sqrt()
    assert before - after > 5 * error, "the posterior is wider than the start"
    prediction = pl.predict(guide, [data], model=model, num_samples=20)
    assert prediction.metrics()["accuracy"] > 0.9
