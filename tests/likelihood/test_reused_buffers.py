"""Loaders that fill the same tensors for each batch, as those of pinned memory do."""

from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import pyro_lora as pl

NUM_DATA, SIZE = 12, 4

pytestmark = [
    pytest.mark.untrained,
    pytest.mark.filterwarnings("ignore:The weights aren't a mode"),
    pytest.mark.filterwarnings("ignore:At a draw"),
]


class Refilled:
    """Batches in one pair of tensors."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y
        self.buffers = {"x": x[:SIZE].clone(), "y": y[:SIZE].clone()}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, NUM_DATA, SIZE):
            self.buffers["x"].copy_(self.x[start : start + SIZE])
            self.buffers["y"].copy_(self.y[start : start + SIZE])
            yield self.buffers


KINDS: dict[str, Any] = {
    "categorical": lambda f: dist.Categorical(logits=f),
    "poisson": lambda f: dist.Poisson(f[..., 0].exp()),
    "normal": lambda f: dist.Normal(f[..., 0], 0.5),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_of_a_batch_stays(kind: str) -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    lora = pl.lift(network)
    x = torch.randn(NUM_DATA, 3).double()
    with torch.no_grad():
        y = KINDS[kind](network(x)).sample()

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        f = lora()(x)
        with pyro.plate("data", NUM_DATA, subsample=x):
            return pyro.sample("y", KINDS[kind](f), obs=y)

    def found(batches: Any) -> dict[str, Any]:
        pyro.set_rng_seed(0)
        guide = pl.AutoLaplace(
            model,
            init_loc_fn=lora.init_to_adapter(),
            structure=pl.structures.Exact(),
        )
        fit = guide.laplace_approximation(batches)
        data = pl.to_datatree(fit, batches, num_samples=2)
        return {
            "left out": fit.leave_one_out(),
            "evidence": fit.refine("prior").log_evidence(),
            "nll": torch.tensor(pl.predict(fit, batches).metrics()["nll"]),
            "scale": torch.tensor(fit.for_sampling(batches, tolerance=0.1).scale),
            "observed": torch.as_tensor(data["observed_data"]["y"].values),
        }

    whole = [
        {"x": a, "y": b} for a, b in zip(x.split(SIZE), y.split(SIZE), strict=True)
    ]
    assert_close(found(Refilled(x, y)), found(whole), rtol=1e-9, atol=1e-9)
