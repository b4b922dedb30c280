"""SVGD under masks: what is masked changes nothing, and isn't counted."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.optim import SGD
from torch import Tensor
from torch.testing import assert_close

from pyro_lora import kernels
from tests.infer import double_loop
from tests.infer.engines import engine
from tests.infer.targets import NUM_DATA, Target, normal

X = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).double()
LABELS = torch.tensor([0, 2, 1, 0, 1])
COUNTS = torch.tensor([True, False, True, True, False])


def by_poutine(logits: Tensor, labels: Tensor, counts: Tensor) -> None:
    with poutine.mask(mask=counts):
        pyro.sample("y", dist.Categorical(logits=logits), obs=labels)


def by_distribution(logits: Tensor, labels: Tensor, counts: Tensor) -> None:
    pyro.sample("y", dist.Categorical(logits=logits).mask(counts), obs=labels)


def masked(observe: Callable[[Tensor, Tensor, Tensor], None]) -> Target:
    """A softmax regression on the data that count."""

    def model(x: Tensor, labels: Tensor, counts: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(2, 3), 1.0).to_event(2))
        with pyro.plate("data", NUM_DATA, subsample=labels):
            observe((x[..., None] * w).sum(-2), labels, counts)

    def log_joint(p: double_loop.Point) -> Tensor:
        log_probs = (X @ p["w"]).log_softmax(-1)[torch.arange(5), LABELS]
        return normal(p["w"], 0.0, 1.0) + NUM_DATA / 5 * log_probs[COUNTS].sum()

    batch = {"x": X, "labels": LABELS, "counts": COUNTS}
    return Target(model, batch, {"w": torch.randn(4, 2, 3).double()}, {}, log_joint)


def loss(target: Target, counts: Tensor = COUNTS) -> float:
    """Mean over the particles and the data that count."""
    log_probs = (X @ target.particles["w"]).log_softmax(-1)
    return -log_probs[:, torch.arange(5), LABELS][:, counts].mean().item()


SPACES: list[dict[str, Any]] = [
    {"kernel": kernels.RBF(), "transport": "repulsive"},
    {"kernel": kernels.RBF(space="function")},
]


def run(
    target: Target, labels: Tensor = LABELS, **settings: Any
) -> tuple[list[float], dict[str, Any]]:
    """Losses given to the repulsion in two updates, and the state after them."""
    seen: list[float] = []

    def repulsion(fraction: float, loss: float) -> float:
        seen.append(loss)
        return 3 * loss

    batch = {**target.batch, "labels": labels}
    optim, kernel = SGD({"lr": 0.1}), settings.pop("kernel")
    svgd = engine(target, optim, kernel, repulsion=repulsion, **settings)
    for _ in range(2):
        svgd.step(**batch)
    return seen, {**svgd.get_named_particles(), **svgd.diagnostics}


@pytest.mark.parametrize("observe", [by_poutine, by_distribution])
@pytest.mark.parametrize("settings", SPACES)
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_a_masked_label_changes_nothing(
    observe: Callable[[Tensor, Tensor, Tensor], None],
    settings: dict[str, Any],
    chunk_size: int | None,
) -> None:
    target = masked(observe)
    flipped = LABELS.where(COUNTS, (LABELS + 1) % 3)
    seen, after = run(target, chunk_size=chunk_size, **settings)
    assert seen[0] == pytest.approx(loss(target), rel=1e-12)
    again = run(target, flipped, chunk_size=chunk_size, **settings)
    assert again[0] == seen
    assert_close(again[1], after, rtol=0, atol=0)


@pytest.mark.parametrize("settings", SPACES)
def test_a_batch_without_a_datum_that_counts(settings: dict[str, Any]) -> None:
    target = masked(by_poutine)
    target.batch["counts"] = torch.zeros_like(COUNTS)
    seen, after = run(target, **settings)
    assert seen == [0, 0]
    assert all(torch.as_tensor(after[x]).isfinite().all() for x in ("w", "loss"))
