"""SVGD under masks: what is masked changes nothing, and isn't counted."""

import math
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
VALUES = torch.tensor([0.3, math.nan, 0.8, 0.1, math.nan]).double()
COUNTS = torch.tensor([True, False, True, True, False])


def by_poutine(logits: Tensor, labels: Tensor, counts: Tensor) -> None:
    with poutine.mask(mask=counts):
        pyro.sample("y", dist.Categorical(logits=logits), obs=labels)


def by_distribution(logits: Tensor, labels: Tensor, counts: Tensor) -> None:
    pyro.sample("y", dist.Categorical(logits=logits).mask(counts), obs=labels)


def by_obs_mask(logits: Tensor, labels: Tensor, counts: Tensor) -> None:
    pyro.sample("y", dist.Categorical(logits=logits), obs=labels, obs_mask=counts)


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


def steps(target: Target, kernel: Any = None, **settings: Any) -> dict[str, Any]:
    """Particles and all that is known of them after three steps."""
    svgd = engine(target, SGD({"lr": 0.1}), kernel, **settings)
    losses = [svgd.step(**target.batch) for _ in range(3)]
    return {"losses": losses, **svgd.get_named_particles(), **svgd.diagnostics}


@pytest.mark.grid
@pytest.mark.parametrize("observe", [by_poutine, by_distribution, by_obs_mask])
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


@pytest.mark.grid
@pytest.mark.parametrize("settings", [*SPACES, {"kernel": kernels.NoRepulsion()}])
@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("obs_site", [None, "y"])
def test_pyros_obs_mask_is_a_mask(
    settings: dict[str, Any], chunk_size: int | None, obs_site: str | None
) -> None:
    """Of classes; it draws those in its gaps, which have no gradient."""
    target, by_mask = masked(by_obs_mask), masked(by_distribution)
    target.particles.update(by_mask.particles)
    settings = {"chunk_size": chunk_size, "obs_site": obs_site, **settings}
    found, expected = steps(target, **settings), steps(by_mask, **settings)
    assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_pyros_obs_mask_of_reals() -> None:
    """Whose gaps would be particles, and NaN in them does no harm."""

    def reals(observe: Callable[[Any], None]) -> Target:
        def model(x: Tensor, labels: Tensor, counts: Tensor) -> None:
            w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            noise = pyro.sample("noise_unobserved", dist.Exponential(x.new_ones(())))
            with pyro.plate("data", NUM_DATA, subsample=labels):
                observe(dist.Normal((x * w).sum(-1), noise))

        start = {"w": torch.randn(4, 2), "noise_unobserved": torch.rand(4) + 0.5}
        start = {site: x.double() for site, x in start.items()}
        batch = {"x": X, "labels": VALUES, "counts": COUNTS}
        return Target(model, batch, start, {}, lambda _: VALUES.sum())

    by_mask = reals(lambda fn: pyro.sample("y", fn.mask(COUNTS), obs=VALUES))
    start = by_mask.particles
    target = reals(lambda fn: pyro.sample("y", fn, obs=VALUES, obs_mask=COUNTS))
    target.particles.update(start)
    found, expected = steps(target), steps(by_mask)
    assert found["noise_unobserved"].shape == (4,)
    assert_close(found, expected, rtol=1e-10, atol=1e-10)
