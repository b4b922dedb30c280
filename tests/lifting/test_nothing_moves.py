"""Fitting, predicting and diagnosing move no buffer and leave every module's mode."""

import copy
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import Adam
from torch import Tensor, nn
from torch.testing import assert_close

import pyro_lora as pl

NUM_DATA = 12
pytestmark = pytest.mark.untrained


class Normalised(nn.Module):
    """A network with batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.head = nn.Linear(4, 2)
        self.body.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.body(x)))
        return logits


def model_of(lora: pl.LiftedNetwork) -> Any:
    def model(x: Tensor, labels: Tensor | None = None) -> Any:
        logits = lora()(x)
        tilt = pyro.sample("tilt", dist.Normal(torch.zeros(()), 1.0))
        logits = torch.stack([logits[..., 0] + tilt, logits[..., 1]], -1)
        with pyro.plate("data", NUM_DATA, subsample=x):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    return model


def without_latent(lora: pl.LiftedNetwork) -> Any:
    def model(x: Tensor, labels: Tensor | None = None) -> Any:
        logits = lora()(x)
        with pyro.plate("data", NUM_DATA, subsample=x):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    return model


def batches() -> list[dict[str, Tensor]]:
    return [
        {"x": 3 * torch.randn(6, 3) + 1, "labels": torch.randint(2, (6,))}
        for _ in range(2)
    ]


def build(make: Callable[[Any], Any]) -> tuple[pl.LiftedNetwork, Any, Any]:
    network = Normalised().train()
    network.body[2].eval()  # a mode of its own
    lora = pl.lift(network)
    return lora, make(lora), batches()


def state(network: nn.Module) -> tuple[Any, list[bool]]:
    tensors = {k: x.clone() for k, x in network.state_dict().items()}
    return tensors, [module.training for module in network.modules()]


def guide_of(lora: pl.LiftedNetwork, model: Any, **settings: Any) -> pl.AutoLaplace:
    start = {**lora.weights(), "tilt": torch.tensor(0.1)}
    return pl.AutoLaplace(model, init_loc_fn=lambda s: start[s["name"]], **settings)


def particles(lora: pl.LiftedNetwork, model: Any) -> pl.ParticlePosterior:
    values = {s: torch.stack([x, 2 * x]) for s, x in lora.weights().items()}
    return pl.ParticlePosterior(values, (lora,), model, None)


@pytest.mark.parametrize("make", [model_of, without_latent])
@pytest.mark.parametrize(
    "structure", [pl.structures.KFAC(), pl.structures.EKFAC(), pl.structures.Dense()]
)
def test_fits_are_equal_and_move_nothing(make: Any, structure: Any) -> None:
    lora, model, data = build(make)
    before = copy.deepcopy(state(lora.network))
    likelihoods = {
        float(
            guide_of(lora, model, structure=structure)
            .laplace_approximation(data)
            .log_likelihood
        )
        for _ in range(4)
    }
    assert len(likelihoods) == 1
    assert_close(state(lora.network), before, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The best prior precision")
@pytest.mark.parametrize("method", ["linearized", "sample"])
def test_predictions_move_nothing(method: Any) -> None:
    lora, model, data = build(without_latent)
    posterior = guide_of(lora, model).laplace_approximation(data)
    before = copy.deepcopy(state(lora.network))
    pl.predict(posterior, data, model=model, method=method, num_samples=3)
    posterior.optimize_prior(objective="nll", batches=data)
    pl.predict(pl.mc_dropout(lora), data, model=model, num_samples=2)
    assert_close(state(lora.network), before, rtol=0, atol=0)


def test_diagnoses_and_exports_move_nothing() -> None:
    lora, model, data = build(without_latent)
    posterior = guide_of(lora, model, sites="last_layer").laplace_approximation(data)
    before = copy.deepcopy(state(lora.network))
    pl.diagnose(posterior, data, model=model)
    pl.to_datatree(posterior, model=model, batches=data, num_samples=3)
    several = particles(lora, model)
    pl.effective_num_predictions(model, several.particles, data)
    pl.kernelized_stein_discrepancy(model, several.particles, data)
    assert_close(state(lora.network), before, rtol=0, atol=0)


def test_what_looks_for_svgds_particles_moves_nothing() -> None:
    lora, model, data = build(without_latent)
    before = copy.deepcopy(state(lora.network))
    svgd = pl.SVGD(
        model,
        pl.kernels.RBF(),
        Adam({"lr": 1e-3}),
        2,
        init_loc_fn=lora.init_to_adapter(jitter=0.1),
    )
    with pytest.raises(ValueError, match="batch norm in training mode"):
        svgd.step(**data[0])
    assert_close(state(lora.network), before, rtol=0, atol=0)
