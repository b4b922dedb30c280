"""What SVGD reports: series, warnings, particles."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.constraints import real
from pyro.infer import autoguide
from pyro.optim import SGD
from torch import Tensor
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora import kernels
from tests import networks
from tests.infer import double_loop
from tests.infer.engines import engine
from tests.infer.targets import (
    NUM_DATA,
    Target,
    bert,
    hierarchical_bert,
    hierarchical_regression,
)

SPACES: list[Any] = ["joint", "site", "delta", "function"]


def test_diagnostics_have_one_value_a_step() -> None:
    target = hierarchical_regression(4)
    svgd = engine(target, SGD({"lr": 0.01}), kernels.RBF(space="site"))
    expected: dict[str, list[float]] = {name: [] for name in DIAGNOSTICS}
    svgd.step(**target.batch)  # so that there are particles to start from
    svgd.diagnostics.clear()
    for _ in range(3):
        at = double_loop.points(svgd.state_dict()["particles"])
        svgd.step(**target.batch)
        by_site = double_loop.site_rbf(at, None)
        for name, value in diagnostics(target, at, by_site).items():
            expected[name].append(value)
    assert svgd.diagnostics.keys() == {*expected, "nll"}
    for name, series in expected.items():
        assert svgd.diagnostics[name] == pytest.approx(series, rel=1e-10), name


DIAGNOSTICS = ("loss", "attraction", "repulsion", "ratio", "spread", "mean_kernel")


def diagnostics(
    target: Target,
    at: list[double_loop.Point],
    by_site: dict[str, double_loop.PairKernel],
) -> dict[str, float]:
    num_particles = len(at)
    attraction, repulsion = double_loop.attraction_and_repulsion(
        at, target.log_joint, by_site
    )

    def rms(directions: list[double_loop.Point]) -> float:
        squares = [sum(x.square().sum().item() for x in d.values()) for d in directions]
        return (sum(squares) / num_particles) ** 0.5

    mean = {s: torch.stack([x[s] for x in at]).mean(0) for s in at[0]}
    off_diagonal = [
        kernel(x, y).item()
        for kernel in by_site.values()
        for x in at
        for y in at
        if x is not y
    ]
    return {
        "ratio": rms(repulsion) / rms(attraction),
        "loss": -sum(target.log_joint(x).item() for x in at) / num_particles,
        "attraction": rms(attraction),
        "repulsion": rms(repulsion),
        "spread": rms([{s: x[s] - mean[s] for s in x} for x in at]),
        "mean_kernel": sum(off_diagonal) / len(off_diagonal),
    }


@pytest.mark.parametrize("kernel", [kernels.NoRepulsion(), kernels.RBF()])
def test_diagnostics_of_zero_and_of_one_particle(kernel: Any) -> None:
    target = hierarchical_regression(3 if kernel == kernels.NoRepulsion() else 1)
    svgd = engine(target, SGD({"lr": 0.01}), kernel)
    for _ in range(2):
        svgd.step(**target.batch)
    assert svgd.diagnostics["repulsion"] == svgd.diagnostics["ratio"] == [0, 0]
    scores = [
        double_loop.gradient(target.log_joint, p)
        for p in double_loop.points(target.particles)
    ]
    squares = [sum(x.square().sum().item() for x in p.values()) for p in scores]
    rms = (sum(squares) / len(squares)) ** 0.5
    assert svgd.diagnostics["attraction"][0] == pytest.approx(rms, rel=1e-12)


KERNELS = [kernels.NoRepulsion(), *(kernels.RBF(space=space) for space in SPACES)]


@pytest.mark.grid
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("make", [bert, hierarchical_bert])
def test_the_spread_of_updates(make: Callable[[int], Target], kernel: Any) -> None:
    # Written out as full matrices: B A of every layer, and other weights as they are.
    target = make(4)
    svgd = engine(target, SGD({"lr": 1e-3}), kernel)
    expected: list[Any] = []
    for _ in range(3):
        at = double_loop.points(
            svgd.state_dict()["particles"] if expected else target.particles
        )
        rows = torch.stack([torch.cat([x.flatten() for x in full(p)]) for p in at])
        variance = (rows - rows.mean(0)).square().sum(1).mean()
        expected.append(pytest.approx(variance.sqrt().item(), rel=1e-9))
        svgd.step(**target.batch)
    assert svgd.diagnostics["delta_spread"] == expected
    assert all(
        joint != pytest.approx(delta)
        for joint, delta in zip(
            svgd.diagnostics["spread"], svgd.diagnostics["delta_spread"], strict=True
        )
    )


def full(point: double_loop.Point) -> list[Tensor]:
    return [
        2.0 * x @ point[f"{site[:-1]}A"] if site.startswith("lora.") else x
        for site, x in point.items()
        if not (site.startswith("lora.") and site.endswith(".A"))
    ]


@pytest.mark.parametrize("space", SPACES)
def test_a_collapsed_kernel_is_reported_once(space: Any) -> None:
    target = bert(3)
    svgd = engine(target, SGD({"lr": 1e-6}), kernels.RBF(space=space, bandwidth=1e-4))
    with pytest.warns(UserWarning, match="collapsed") as caught:
        svgd.step(**target.batch)
    svgd.step(**target.batch)  # a second warning would be an error
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_a_stuck_particle_is_reported_once(kernel: Any, chunk_size: int | None) -> None:
    # Without a prior, and far out, where the likelihood's gradient underflows.
    x, y = torch.ones(4, 1), torch.ones(4)
    lora = pl.lift(networks.bert()) if kernel == kernels.RBF(space="delta") else None

    def model() -> None:
        w = pyro.sample("w", dist.ImproperUniform(real, (), (1,)))
        if lora is not None:
            with poutine.mask(mask=False):  # sites that the likelihood doesn't know
                lora()
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Bernoulli(logits=(x * w).sum(-1)), obs=y)

    def init(site: dict[str, Any]) -> Tensor:
        k = site["infer"].get("particle", 0)
        if site["name"] == "w":
            return torch.tensor([500.0 if k == 1 else 0.1 * k])
        return torch.zeros(site["fn"].shape(), dtype=torch.float64)

    svgd = pl.SVGD(
        model,
        kernel,
        SGD({"lr": 0.01}),
        3,
        init_loc_fn=init,
        chunk_size=chunk_size,
        **(
            {}
            if kernel == kernels.NoRepulsion()
            else {"transport": "repulsive", "repulsion": 0.0}
        ),
    )
    with pytest.warns(UserWarning, match=r"Particle\(s\) \[1\] are stuck") as caught:
        svgd.step()
    svgd.step()  # a second warning would be an error
    assert len(caught) == 1
    assert caught[0].filename == __file__
    w = svgd.get_named_particles()["w"][:, 0]
    assert w[1] == 500
    assert w[0] > 0
    assert w[2] > 0.2  # the others went on


def test_particles_at_one_point_are_reported() -> None:
    lora = pl.lift(networks.bert())
    svgd = pl.SVGD(
        pl.models.classification(lora, NUM_DATA),
        kernels.RBF(),
        SGD({"lr": 0.01}),
        3,
        init_loc_fn=lora.init_to_adapter(),
    )
    with pytest.warns(UserWarning, match="start at one point") as caught:
        svgd.step(**networks.batch())
    svgd.step(**networks.batch())
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_named_particles_and_samples() -> None:
    target = hierarchical_regression(4)
    svgd = engine(target, SGD({"lr": 0.0}))
    svgd.step(**target.batch)
    expected = {**target.particles, "tau": target.particles["tau"].exp()}
    particles = svgd.get_named_particles()
    assert_close(particles, expected, rtol=1e-14, atol=1e-14)
    particles["w"].zero_()
    assert_close(svgd.get_samples(), expected, rtol=1e-14, atol=1e-14)
    by_chain = svgd.get_samples(group_by_chain=True)
    assert_close(by_chain, {s: x[None] for s, x in expected.items()})
    assert svgd.get_samples(2)["m"].shape == (2, 2, 3)
    assert svgd.get_samples(9, group_by_chain=True)["tau"].shape == (1, 9)
    for num_samples in (0, -1):
        with pytest.raises(ValueError, match="num_samples"):
            svgd.get_samples(num_samples)


@pytest.mark.parametrize("space", ["joint", "site", "function"])
def test_particles_of_a_non_centred_prior_have_no_spread_of_updates(space: Any) -> None:
    lora = pl.lift(networks.bert(), prior=pl.priors.horseshoe(centered=False))
    svgd = pl.SVGD(
        pl.models.classification(lora, NUM_DATA),
        kernels.RBF(space=space),
        SGD({"lr": 1e-6}),
        3,
        init_loc_fn=autoguide.init_to_sample,
    )
    svgd.step(**networks.batch(NUM_DATA, 7))
    assert svgd.diagnostics.keys() == {*DIAGNOSTICS, "nll"}
    assert svgd.diagnostics["spread"][0] > 0
    assert "head.classifier.bias_decentered" in svgd.get_named_particles()


def test_updates_of_a_non_centred_prior_are_no_latents_to_compare() -> None:
    lora = pl.lift(networks.bert(), prior=pl.priors.horseshoe(centered=False))
    svgd = pl.SVGD(
        pl.models.classification(lora, NUM_DATA),
        kernels.RBF(space="delta"),
        SGD({"lr": 1e-6}),
        3,
        init_loc_fn=autoguide.init_to_sample,
    )
    with pytest.raises(ValueError, match=r"none of the sites .* is a factor"):
        svgd.step(**networks.batch(NUM_DATA, 7))


@pytest.mark.parametrize("space", ["joint", "site"])
def test_distances_of_latents_in_half_precision_are_in_float32(space: Any) -> None:
    # Around 100 a bfloat16 is a multiple of a half, and so would be the mean.
    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(4), 1.0).to_event(1))
        with pyro.plate("data", len(x), subsample=x):
            pyro.sample("y", dist.Normal((x * w).sum(-1), 1.0), obs=x[:, 0])

    x, particles = torch.randn(5, 4), (100 + torch.randn(3, 4)).bfloat16()
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        target: Any = Target(model, {}, {"w": particles.to(dtype)}, {}, len)
        svgd = engine(target, SGD({"lr": 0.0}), kernels.RBF(space=space))
        svgd.step(x=x.to(dtype))
        found.append(svgd.diagnostics)
    for name in ("spread", "repulsion", "mean_kernel"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5), name
