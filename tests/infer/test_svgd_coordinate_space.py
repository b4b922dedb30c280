"""SVGD with a kernel for each coordinate, against double loops."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide.initialization import init_to_sample
from torch import Tensor
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora import kernels
from tests.infer import double_loop
from tests.infer.double_loop import Point
from tests.infer.targets import Target, hierarchical_regression
from tests.infer.test_svgd_delta_space import PROFILES
from tests.infer.test_svgd_preconditioner import noisy_regression
from tests.infer.test_svgd_step import assert_equal, direction


def apart(point: Point) -> Point:
    """Each coordinate as a site of its own."""
    return {
        f"{site}:{d}": x
        for site, value in point.items()
        for d, x in enumerate(value.flatten())
    }


def together(point: Point, like: Point) -> Point:
    return {
        site: torch.stack([point[f"{site}:{d}"] for d in range(x.numel())]).view_as(x)
        for site, x in like.items()
    }


def coordinate_kernels(
    at: list[Point], profile: Callable[[Tensor], Tensor], bandwidth: float | None
) -> dict[str, double_loop.PairKernel]:
    def kernel(name: str) -> double_loop.PairKernel:
        values = [x[name].item() for x in at]
        pairs = [(x - y) ** 2 for i, x in enumerate(values) for y in values[:i]]
        scale = (
            double_loop.median_bandwidth(pairs, len(at))
            if bandwidth is None
            else 2 * bandwidth**2
        )
        return lambda x, y: profile((x[name] - y[name]).square() / scale)

    return {name: kernel(name) for name in at[0]}


def expected_directions(
    target: Target,
    profile: Callable[[Tensor], Tensor],
    bandwidth: float | None,
    rule: Callable[..., dict[str, Tensor]],
    *settings: float,
) -> dict[str, Tensor]:
    whole = double_loop.points(target.particles)
    at = [apart(x) for x in whole]
    found = rule(
        at,
        lambda p: target.log_joint(together(p, whole[0])),
        coordinate_kernels(at, profile, bandwidth),
        *settings,
    )
    return double_loop.stack([together(p, whole[0]) for p in double_loop.points(found)])


@pytest.mark.parametrize("bandwidth", [None, 0.8])
@pytest.mark.parametrize("name", list(PROFILES))
def test_stein(name: str, bandwidth: float | None) -> None:
    target = hierarchical_regression(5)
    kernel, profile = PROFILES[name]
    found, _ = direction(
        target, kernel(space="coordinate", bandwidth=bandwidth), temperature=2.0
    )
    expected = expected_directions(target, profile, bandwidth, double_loop.stein, 2.0)
    assert_equal(found, expected)


def test_stein_with_a_lifted_network_in_chunks() -> None:
    target = noisy_regression(3)
    found, _ = direction(target, kernels.RBF(space="coordinate"), chunk_size=2)
    profile = PROFILES["RBF"][1]
    assert_equal(found, expected_directions(target, profile, None, double_loop.stein))


@pytest.mark.parametrize("name", list(PROFILES))
def test_repulsive(name: str) -> None:
    target = hierarchical_regression(4)
    kernel, profile = PROFILES[name]
    found, _ = direction(
        target,
        kernel(space="coordinate"),
        transport="repulsive",
        temperature=2.0,
        repulsion=3.0,
    )
    expected = expected_directions(
        target, profile, None, double_loop.repulsive, 2.0, 3.0
    )
    assert_equal(found, expected)


def test_coordinates_of_many_blocks() -> None:
    # More squared distances than are alive at once, and a last block that isn't full.
    x = torch.randn(32, 700).double()

    def model() -> None:
        pyro.sample("x", dist.Normal(x.new_zeros(700), 2.0).to_event(1))

    target = Target(model, {}, {"x": x}, {}, lambda p: -p["x"].square().sum() / 8)
    found, svgd = direction(target, kernels.RBF(space="coordinate", bandwidth=1.0))
    differences = x[:, None] - x  # (i, j, d)
    gram = (-differences.square() / 2).exp()
    pull = (gram * -x / 4).mean(1)
    push = (gram * differences).mean(1)
    assert_close(found["x"], pull + push, rtol=1e-10, atol=1e-10)
    off_diagonal = (gram.sum() - 32 * 700) / (32 * 31 * 700)
    norms = {
        "attraction": pull.square().sum(1).mean().sqrt(),
        "repulsion": push.square().sum(1).mean().sqrt(),
        "mean_kernel": off_diagonal,
    }
    for series, value in norms.items():
        assert svgd.diagnostics[series] == [pytest.approx(value.item(), rel=1e-10)]


def test_one_particle_is_map() -> None:
    target = hierarchical_regression(1)
    found, svgd = direction(target, kernels.RBF(space="coordinate"))
    score = double_loop.gradient(
        target.log_joint, double_loop.points(target.particles)[0]
    )
    assert_equal(found, {site: x[None] for site, x in score.items()})
    assert svgd.diagnostics["repulsion"] == [0]


def variances(kernel: Any, num_weights: int) -> Tensor:
    def model() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(num_weights), 1.0).to_event(1))

    schedule = {
        "optimizer": torch.optim.Adam,
        "optim_args": {"lr": 0.1},
        "gamma": 0.97,
    }
    optim = pyro.optim.ExponentialLR(schedule)
    svgd = pl.SVGD(model, kernel, optim, 20, init_loc_fn=init_to_sample)
    svgd.run([{}], num_epochs=150, progress_bar=False)
    return svgd.get_named_particles()["x"].var(0)


def test_variances_do_not_shrink_with_the_number_of_weights() -> None:
    for num_weights in (1, 300):
        found = variances(kernels.RBF(space="coordinate"), num_weights)
        assert ((found > 0.75) & (found < 1.0)).all()
    # where one kernel for all weights leaves log(K + 1) / D
    assert variances(kernels.RBF(), 300).mean() < 0.02
