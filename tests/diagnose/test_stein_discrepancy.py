"""The kernelised Stein discrepancy against a double loop, and as a test."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_lora as pl
from pyro_lora import kernels
from tests import networks
from tests.infer.double_loop import LogJoint, Point, gradient, points
from tests.infer.targets import hierarchical_regression

CORRELATION = 0.6
PairKernel = Callable[[Tensor, Tensor], Tensor]


def gaussian() -> None:
    """Two sites, (2,) and (), correlated, with standard deviations 1, 0.5 and 1.2."""
    one = torch.ones((), dtype=torch.float64)
    scale = torch.tensor([1.0, 0.5]).double()
    x = pyro.sample("x", dist.Normal(torch.zeros(2).double(), scale).to_event(1))
    pyro.sample("y", dist.Normal(CORRELATION * x[..., 0], 1.2 * one))


def gaussian_draws(num_draws: int) -> dict[str, Tensor]:
    x = torch.randn(num_draws, 2).double() * torch.tensor([1.0, 0.5]).double()
    y = CORRELATION * x[:, 0] + 1.2 * torch.randn(num_draws).double()
    return {"x": x, "y": y}


def gaussian_log_joint(p: Point) -> Tensor:
    scale = torch.tensor([1.0, 0.5]).double()
    return dist.Normal(0.0, scale).log_prob(p["x"]).sum() + dist.Normal(
        CORRELATION * p["x"][0], 1.2
    ).log_prob(p["y"])


def vector(p: Point, sites: list[str]) -> Tensor:
    return torch.cat([p[site].reshape(-1) for site in sites])


def double_loop(
    at: list[Point], log_joint: LogJoint, kernel: PairKernel, sites: list[str]
) -> Tensor:
    """The Stein kernel of all pairs, every derivative by autograd."""
    scores = [vector(gradient(log_joint, p), sites) for p in at]
    rows = []
    for p, s_x in zip(at, scores, strict=True):
        row = []
        for q, s_y in zip(at, scores, strict=True):
            x, y = (vector(v, sites).clone().requires_grad_() for v in (p, q))
            k = kernel(x, y)
            k_x, k_y = torch.autograd.grad(k, (x, y), create_graph=True)
            mixed = [
                torch.autograd.grad(k_x[d], y, retain_graph=True)[0][d]
                for d in range(len(x))
            ]
            u = k * (s_x @ s_y) + s_x @ k_y + k_x @ s_y + torch.stack(mixed).sum()
            row.append(u.detach())
        rows.append(torch.stack(row))
    return torch.stack(rows)


def rbf(x: Tensor, y: Tensor) -> Tensor:
    return (-(x - y).square().sum() / (2 * 0.9**2)).exp()


def imq(x: Tensor, y: Tensor) -> Tensor:
    return (1 + (x - y).square().sum() / (2 * 0.9**2)).rsqrt()


def mixture(x: Tensor, y: Tensor) -> Tensor:
    d = (x - y).square().sum() / (2 * 0.9**2)
    return ((-4 * d).exp() + (-d).exp() + (-d / 4).exp()) / 3


def own(sq_dists: Tensor) -> Tensor:
    return (-sq_dists / 2).exp()


def statistics(stein: Tensor) -> tuple[float, float]:
    num_draws = len(stein)
    off_diagonal = [
        stein[i, j].item() for i in range(num_draws) for j in range(num_draws) if i != j
    ]
    return sum(off_diagonal) / len(off_diagonal), stein.mean().item()


@pytest.mark.parametrize("space", ["joint", "site"])
@pytest.mark.parametrize(
    ("kernel", "pair_kernel"),
    [(kernels.RBF, rbf), (kernels.IMQ, imq), (kernels.Mixture, mixture)],
)
def test_statistics_of_a_gaussian(
    kernel: Any, pair_kernel: PairKernel, space: Any
) -> None:
    draws = gaussian_draws(7)
    found = pl.kernelized_stein_discrepancy(
        gaussian, draws, [{}], kernel=kernel(space=space, bandwidth=0.9)
    )
    groups = [["x", "y"]] if space == "joint" else [["x"], ["y"]]
    stein = torch.stack(
        [
            double_loop(points(draws), gaussian_log_joint, pair_kernel, sites)
            for sites in groups
        ]
    ).sum(0)
    u, v = statistics(stein)
    assert found.u_statistic == pytest.approx(u, rel=1e-10, abs=1e-10)
    assert found.v_statistic == pytest.approx(v, rel=1e-10, abs=1e-10)
    assert found.p_value is None


def test_the_median_heuristic_is_a_constant() -> None:
    draws = gaussian_draws(6)
    flat = torch.cat([draws["x"], draws["y"][:, None]], 1)
    distances = torch.pdist(flat).square()
    bandwidth = (distances.median() / (2 * math.log(7))).sqrt().item()
    expected = pl.kernelized_stein_discrepancy(
        gaussian, draws, [{}], kernel=kernels.IMQ(bandwidth=bandwidth)
    )
    found = pl.kernelized_stein_discrepancy(gaussian, draws, [{}])
    assert found.v_statistic == pytest.approx(expected.v_statistic, rel=1e-10)


def test_a_kernel_of_ones_own_and_a_temperature() -> None:
    draws = gaussian_draws(5)
    found = pl.kernelized_stein_discrepancy(
        gaussian, draws, [{}], kernel=own, temperature=2.5
    )
    stein = double_loop(
        points(draws),
        lambda p: gaussian_log_joint(p) / 2.5,
        lambda x, y: (-(x - y).square().sum() / 2).exp(),
        ["x", "y"],
    )
    u, v = statistics(stein)
    assert found.u_statistic == pytest.approx(u, rel=1e-10)
    assert found.v_statistic == pytest.approx(v, rel=1e-10)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_constrained_sites_and_minibatches(chunk_size: int | None) -> None:
    # Batches of 5 and 7 rows together are the 12 data: the score is that of them all.
    target = hierarchical_regression(4)
    x, y = torch.randn(12, 3).double(), torch.randn(12).double()
    batches = [{"x": x[:5], "y": y[:5]}, {"x": x[5:], "y": y[5:]}]
    constrained = {**target.particles, "tau": target.particles["tau"].exp()}
    kernel = kernels.IMQ(bandwidth=0.9)

    def log_joint(p: Point) -> Tensor:
        tau = p["tau"].exp()
        hidden = torch.tanh(x @ p["m"].T).sum(1)
        one = torch.ones((), dtype=torch.float64)
        return (
            dist.Gamma(2 * one, 3 * one).log_prob(tau)
            + p["tau"]
            + dist.Normal(0 * one, tau).log_prob(p["w"]).sum()
            + dist.Normal(0 * one, 0.7 * one).log_prob(p["m"]).sum()
            + dist.Normal(x @ p["w"] + hidden, 0.5 * one).log_prob(y).sum()
        )

    found = pl.kernelized_stein_discrepancy(
        target.model, constrained, batches, kernel=kernel, chunk_size=chunk_size
    )
    stein = double_loop(points(target.particles), log_joint, imq, ["tau", "w", "m"])
    u, v = statistics(stein)
    assert found.u_statistic == pytest.approx(u, rel=1e-10)
    assert found.v_statistic == pytest.approx(v, rel=1e-10)


def test_particles_of_a_network() -> None:
    network = networks.bert(dropout=0.5).train()
    lora = pl.lift(network, prior=pl.priors.normal(0.7))
    model = pl.models.classification(lora, 8)
    texts = networks.batch(8)
    particles = networks.particles(lora, 3)
    halves = [
        {k: x[rows] for k, x in texts.items()} for rows in (slice(3), slice(3, 8))
    ]
    whole, parts = (
        pl.kernelized_stein_discrepancy(model, particles, batches)
        for batches in ([texts], halves)
    )
    # dropout is off, or they would differ
    assert whole.v_statistic == pytest.approx(parts.v_statistic, rel=1e-8)
    assert network.training


def test_the_test_rejects_shifted_draws_and_has_its_size() -> None:
    level, num_tests = 0.1, 300
    p_values = []
    for _ in range(num_tests):
        found = pl.kernelized_stein_discrepancy(
            gaussian, gaussian_draws(60), [{}], num_bootstrap=99
        )
        assert found.p_value is not None
        p_values.append(found.p_value)
    rejected = sum(p <= level for p in p_values) / num_tests
    # Standard error of a share of .1 among 300: .017; three of them. The signs make
    # the test exact but for terms that vanish with the number of draws.
    assert abs(rejected - level) < 3 * math.sqrt(level * (1 - level) / num_tests)
    draws = gaussian_draws(60)
    for shift in (1.5, -1.5):  # about a standard deviation of y
        shifted = {**draws, "y": draws["y"] + shift}
        found = pl.kernelized_stein_discrepancy(
            gaussian, shifted, [{}], num_bootstrap=999
        )
        assert found.p_value is not None
        assert found.p_value < 0.02
        assert found.u_statistic > 0


def test_one_draw_has_no_pairs() -> None:
    found = pl.kernelized_stein_discrepancy(
        gaussian, gaussian_draws(1), [{}], num_bootstrap=9
    )
    assert math.isnan(found.u_statistic)
    assert found.v_statistic > 0
    assert found.p_value == 1


def rough(sq_dists: Tensor) -> Tensor:
    return (-sq_dists.sqrt()).exp()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel": kernels.RBF(space="delta")}, "joint"),
        ({"kernel": kernels.NoRepulsion()}, "compares weights"),
        ({"kernel": rough}, "twice differentiable"),
        ({"temperature": 0.0}, "temperature"),
        ({"num_bootstrap": -1}, "num_bootstrap"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"batches": []}, "no batches"),
        ({"particles": {}}, "no particles"),
        ({"particles": {"x": torch.ones(3, 2).double()}}, "'y' of the model"),
        ({"particles": {"x": torch.zeros(3, 2), "y": torch.zeros(3, 2)}}, "'y'.*shape"),
        (
            {"particles": {"x": torch.zeros(3, 2), "y": torch.zeros(4)}},
            "'y'.*expected 3",
        ),
    ],
)
def test_bad_arguments(settings: dict[str, Any], message: str) -> None:
    arguments = {"particles": gaussian_draws(3), "batches": [{}], **settings}
    with pytest.raises(ValueError, match=message):
        pl.kernelized_stein_discrepancy(gaussian, **arguments)


def test_batches_that_do_not_cover_the_data() -> None:
    target = hierarchical_regression(3)
    constrained = {**target.particles, "tau": target.particles["tau"].exp()}
    with pytest.raises(ValueError, match=r"0\.4167 times the data"):
        pl.kernelized_stein_discrepancy(target.model, constrained, [target.batch])
