"""Networks in the state that users train them in: checkpointed, in autocast."""

import copy
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pyro_lora as pl
from pyro_lora.curvature.structures import Structure
from tests.curvature.gauss_newton import assert_same, flatten, laplace
from tests.networks import batch, bert, llama

pytestmark = [
    pytest.mark.untrained,
    # Which transformers itself uses.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning"),
]
STRUCTURES = [
    pl.structures.KFAC(),
    pl.structures.EKFAC(),
    pl.structures.Diagonal(),
    pl.structures.Dense(),
]


def summary(posterior: pl.LaplacePosterior, texts: dict[str, Tensor]) -> Tensor:
    return torch.cat(
        [
            posterior.log_evidence()[None].double(),
            flatten(posterior.variance()).double(),
            posterior.linearized(texts).covariance_matrix.flatten().double(),
        ]
    )


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("build", [bert, llama])
def test_gradient_checkpointing_changes_nothing(
    build: Any, structure: Structure
) -> None:
    network, texts = build(3), batch(6, num_labels=3)
    plain = laplace(pl.lift(copy.deepcopy(network)), texts, 4, structure=structure)
    lora = pl.lift(network)
    network.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={
            "use_reentrant": False,
            "context_fn": lora.context_fn,
        }
    )
    network.train()
    posterior = laplace(lora, texts, 4, structure=structure)
    assert network.training
    assert_same(summary(posterior, texts), summary(plain, texts))


class Checkpointed(nn.Module):
    """Computes its layers again in every backward pass, in eval mode, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 3)
        self.context_fn: Any = None

    def layers(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).tanh())
        return out

    def forward(self, x: Tensor) -> Tensor:
        if self.context_fn is None:
            return self.layers(x)
        out: Tensor = checkpoint(
            self.layers, x, use_reentrant=False, context_fn=self.context_fn
        )
        return out


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_network_that_checkpoints_itself(structure: Structure) -> None:
    network = Checkpointed().double()
    lora = pl.lift(network)
    one = {"x": torch.randn(8, 3).double(), "labels": torch.arange(8) % 3}

    def model(x: Tensor, labels: Tensor | None = None) -> None:
        logits = lora()(x)
        with pyro.plate("data", 8, subsample=x):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    def fit() -> pl.LaplacePosterior:
        guide = pl.AutoLaplace(
            model, init_loc_fn=lora.init_to_adapter(), structure=structure
        )
        return guide.laplace_approximation([one])

    plain = fit()
    expected = summary(plain, one)
    network.context_fn = lora.context_fn
    assert_same(summary(fit(), one), expected)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_autocast_costs_digits_only(structure: Structure) -> None:
    lora, texts = pl.lift(bert(3, dtype=torch.float32)), batch(6, num_labels=3)
    plain = pl.models.classification(lora, 6)

    def rounded(**texts: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return plain(**texts)

    def fit(model: Any) -> pl.LaplacePosterior:
        guide = pl.AutoLaplace(
            model, init_loc_fn=lora.init_to_adapter(), structure=structure
        )
        return guide.laplace_approximation([texts])

    expected, found = fit(plain), fit(rounded)
    for site, value in expected.variance().items():
        assert found.variance()[site].dtype == torch.float32
        error = (found.variance()[site] - value).abs().max()
        assert float(error) < 0.05 * float(value.max())
    assert not torch.equal(found.log_evidence(), expected.log_evidence())
    wanted = expected.linearized(texts).covariance_matrix
    error = (found.linearized(texts).covariance_matrix - wanted).norm()
    assert float(error / wanted.norm()) < 0.05
