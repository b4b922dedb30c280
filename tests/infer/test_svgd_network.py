"""SVGD on a network: what saves memory changes no numbers; from Laplace and back."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import SGD
from torch import Tensor
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora import kernels
from tests import networks
from tests.infer.engines import assert_same
from tests.infer.linear_regression import linear_regression
from tests.infer.targets import NUM_DATA
from tests.infer.test_svgd_step import assert_equal
from tests.lifting.test_checkpointing import enable, saved_bytes

SPACES: list[Any] = ["joint", "site", "delta", "function"]
STRENGTH: dict[str, dict[str, Any]] = {"function": {"repulsion": 3.0}}


def svgd(
    lora: pl.LiftedNetwork,
    particles: dict[str, Tensor],
    space: Any,
    model: Any = None,
    **settings: Any,
) -> pl.SVGD:
    return pl.SVGD(
        model or pl.models.classification(lora, NUM_DATA),
        kernels.RBF(space=space),
        SGD({"lr": 0.01}),
        len(next(iter(particles.values()))),
        init_loc_fn=lora.init_to(particles),
        **STRENGTH.get(space, {}),
        **settings,
    )


@pytest.mark.grid
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("space", SPACES)
def test_checkpointing_changes_nothing(space: Any, chunk_size: int | None) -> None:
    lora = pl.lift(networks.bert(num_layers=3))
    lora.network.train()  # without it PEFT's networks don't checkpoint
    particles, batch = networks.particles(lora, 3), networks.batch(8, 16)
    whole = svgd(lora, particles, space)
    losses = [whole.step(**batch) for _ in range(2)]
    kept = saved_bytes(lambda: whole.step(**batch))
    enable(lora)
    again = svgd(lora, particles, space, chunk_size=chunk_size)
    assert [again.step(**batch) for _ in range(2)] == pytest.approx(losses, rel=1e-12)
    assert saved_bytes(lambda: again.step(**batch)) < 0.7 * kept
    assert_equal(again.get_named_particles(), whole.get_named_particles())


def as_float64(lora: pl.LiftedNetwork) -> pl.LiftedNetwork:
    """Another network with the same weights."""
    wide = networks.bert(dtype=torch.float64)
    wide.load_state_dict(lora.network.state_dict())
    return pl.lift(wide)


@pytest.mark.grid
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_is_as_exact_as_it_can_be(space: Any, autocast: bool) -> None:
    # Under autocast or in a bfloat16 network, particles stay float32. The oracle is
    # float64 at the network's rounded weights.
    network = networks.bert(dtype=torch.float32)
    lora = pl.lift(network if autocast else network.to(torch.bfloat16))
    particles, batch = networks.particles(lora, 4), networks.batch()
    again = svgd(lora, particles, space)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        again.step(**batch)
    after = again.state_dict()["particles"]
    assert {x.dtype for x in after.values()} == {torch.float32}
    double = {site: x.double() for site, x in particles.items()}
    exact = svgd(as_float64(lora), double, space)
    exact.step(**batch)
    expected = exact.state_dict()["particles"]
    error = torch.stack([(after[s] - x).norm() for s, x in expected.items()]).norm()
    moved = torch.stack([(double[s] - x).norm() for s, x in expected.items()]).norm()
    eps = torch.finfo(torch.bfloat16).eps
    assert error < 16 * eps * moved  # 16 roundings, as in the tests of autocast
    for name, series in exact.diagnostics.items():
        assert again.diagnostics[name] == pytest.approx(series, rel=16 * eps), name


@pytest.mark.untrained
def test_from_laplace_to_svgd_and_back() -> None:
    regression = linear_regression()
    laplace = regression.laplace()
    draws = laplace.sample(5)
    start = pl.SVGD(
        regression.model,
        kernels.RBF(),
        SGD({"lr": 0.0}),
        5,
        init_loc_fn=regression.lora.init_to(draws),
    )
    start.step(**regression.whole)
    particles = start.get_named_particles()
    assert_same(particles, draws)
    # One Gaussian a particle: here each is the posterior, around another place.
    components = []
    for k in range(5):
        at = {site: x[k] for site, x in particles.items()}
        guide = pl.AutoLaplace(
            regression.model, init_loc_fn=regression.lora.init_to(at)
        )
        components.append(guide.laplace_approximation(regression.batches))
    log_evidence = torch.stack([q.log_evidence() for q in components])
    mixture = pl.MixturePosterior(components, "evidence")
    # log p(y, x) - log q(x) at x, and q has the precision of the exact posterior p:
    # their quadratic forms differ by that of the distance to the mode.
    flat = torch.cat([x.flatten(1) for x in particles.values()], 1)
    gap = flat - regression.mode
    expected = regression.log_evidence - ((gap @ regression.precision) * gap).sum(1) / 2
    assert_close(log_evidence, expected, rtol=1e-10, atol=0)
    assert_close(mixture.weights, expected.softmax(0), rtol=1e-9, atol=0)
    assert_close(
        pl.MixturePosterior(components).weights, torch.full((5,), 0.2).double()
    )


def test_thousands_of_log_densities_in_half_precision_are_summed_in_float32() -> None:
    # Of 4096 tokens a sum in bfloat16 is rounded to a multiple of 64 nats.
    lora = pl.lift(networks.bert(5, dtype=torch.bfloat16, of_tokens=True))
    texts = networks.inputs(networks.batch(128, 32))
    labels = torch.randint(5, (128, 32))
    seen = []

    def model(labels: Tensor, **texts: Tensor) -> None:
        logits = lora()(**texts).logits.flatten(-3, -2)
        fn, labels = dist.Categorical(logits=logits), labels.flatten()
        seen.append(fn.log_prob(labels).detach())
        with pyro.plate("data", len(labels), subsample=labels):
            pyro.sample("y", fn, obs=labels)

    particles = networks.particles(lora, 2)
    again = svgd(lora, particles, "joint", model=model)
    loss = again.step(labels=labels, **texts)
    assert seen[-1].dtype == torch.bfloat16
    assert seen[-1].shape == (2, 4096)
    log_prior = sum(dist.Normal(0.0, 1.0).log_prob(x).sum() for x in particles.values())
    expected = -(seen[-1].double().sum() + log_prior) / 2
    assert loss == pytest.approx(float(expected), abs=0.01)  # float32 has 1e-3
