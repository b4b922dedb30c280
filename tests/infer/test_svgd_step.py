"""One step of SVGD in weight space, against double loops."""

from collections.abc import Callable
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide.initialization import init_to_sample
from pyro.optim import SGD
from torch import Tensor
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora import kernels
from tests import networks
from tests.infer import double_loop
from tests.infer.targets import (
    NUM_DATA,
    Target,
    bert,
    hierarchical_bert,
    hierarchical_regression,
)

TARGETS = [hierarchical_regression, bert, hierarchical_bert]
SPACES = {"joint": double_loop.joint_rbf, "site": double_loop.site_rbf}


def direction(
    target: Target, kernel: Any = None, **settings: Any
) -> tuple[dict[str, Tensor], pl.SVGD]:
    """What one step of plain SGD at learning rate 1 adds to the particles."""
    num_particles = len(next(iter(target.particles.values())))
    svgd = pl.SVGD(
        target.model,
        kernels.RBF() if kernel is None else kernel,
        SGD({"lr": 1.0}),
        num_particles,
        init_loc_fn=target.init,
        **settings,
    )
    svgd.step(**target.batch)
    after = svgd.state_dict()["particles"]
    return {s: after[s] - x for s, x in target.particles.items()}, svgd


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.grid
@pytest.mark.parametrize("make", TARGETS)
@pytest.mark.parametrize("space", ["joint", "site"])
@pytest.mark.parametrize("bandwidth", [None, 2.0])
def test_stein(
    make: Callable[[int], Target],
    space: Literal["joint", "site"],
    bandwidth: float | None,
) -> None:
    target = make(4)
    phi, _ = direction(target, kernels.RBF(space=space, bandwidth=bandwidth))
    at = double_loop.points(target.particles)
    by_site = SPACES[space](at, bandwidth)
    assert_equal(phi, double_loop.stein(at, target.log_joint, by_site))


@pytest.mark.parametrize("space", ["joint", "site"])
def test_stein_at_a_temperature(space: Literal["joint", "site"]) -> None:
    target = hierarchical_regression(5)
    phi, _ = direction(target, kernels.RBF(space=space), temperature=2.5)
    at = double_loop.points(target.particles)
    by_site = SPACES[space](at, None)
    assert_equal(phi, double_loop.stein(at, target.log_joint, by_site, 2.5))


def test_stein_with_a_kernel_of_ones_own() -> None:
    target = hierarchical_regression(4)
    phi, _ = direction(target, lambda sq_dists: (1 + sq_dists).rsqrt())
    at = double_loop.points(target.particles)
    sites = list(target.particles)

    def imq(x: double_loop.Point, y: double_loop.Point) -> Tensor:
        return (1 + double_loop.squared_distance(x, y, sites)).rsqrt()

    by_site: dict[str, double_loop.PairKernel] = dict.fromkeys(sites, imq)
    assert_equal(phi, double_loop.stein(at, target.log_joint, by_site))


def test_a_kernel_may_have_a_kink_at_zero() -> None:
    # exp(-d) has no derivative where particles meet, which each does with itself.
    target = hierarchical_regression(3)
    phi, _ = direction(target, lambda sq_dists: (-sq_dists.sqrt()).exp())
    at = double_loop.points(target.particles)
    sites = list(target.particles)

    def laplace(x: double_loop.Point, y: double_loop.Point) -> Tensor:
        sq_dist = double_loop.squared_distance(x, y, sites)
        if sq_dist == 0:
            return sq_dist.detach() + 1 + 0 * x["w"].sum()
        return (-sq_dist.sqrt()).exp()

    by_site: dict[str, double_loop.PairKernel] = dict.fromkeys(sites, laplace)
    assert_equal(phi, double_loop.stein(at, target.log_joint, by_site))


@pytest.mark.parametrize("make", [hierarchical_regression, bert])
@pytest.mark.parametrize("space", ["joint", "site"])
def test_repulsive_transport(
    make: Callable[[int], Target], space: Literal["joint", "site"]
) -> None:
    target = make(4)
    phi, _ = direction(
        target,
        kernels.RBF(space=space),
        transport="repulsive",
        temperature=2.0,
        repulsion=3.0,
    )
    at = double_loop.points(target.particles)
    by_site = SPACES[space](at, None)
    expected = double_loop.repulsive(at, target.log_joint, by_site, 2.0, 3.0)
    assert_equal(phi, expected)


def test_repulsive_transport_has_strength_one() -> None:
    target = hierarchical_regression(4)
    phi, _ = direction(target, transport="repulsive")
    at = double_loop.points(target.particles)
    by_site = double_loop.joint_rbf(at, None)
    expected = double_loop.repulsive(at, target.log_joint, by_site, 1.0, 1.0)
    assert_equal(phi, expected)


def test_strength_as_a_function_sees_fraction_and_loss() -> None:
    target = hierarchical_regression(4)
    seen = []

    def repulsion(fraction: float, loss: float) -> float:
        seen.append((fraction, loss))
        return 2 * loss

    phi, _ = direction(target, transport="repulsive", repulsion=repulsion, chunk_size=3)
    at = double_loop.points(target.particles)
    y = target.batch["y"]
    assert target.outputs is not None
    log_probs = [
        dist.Normal(target.outputs(p)[:, 0], 0.5).log_prob(y).mean() for p in at
    ]
    loss = -torch.stack(log_probs).mean().item()
    assert seen == [(1.0, pytest.approx(loss, rel=1e-12))]
    by_site = double_loop.joint_rbf(at, None)
    expected = double_loop.repulsive(at, target.log_joint, by_site, 1.0, 2 * loss)
    assert_equal(phi, expected)


@pytest.mark.parametrize("make", TARGETS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_zero_is_independent_gradients(
    make: Callable[[int], Target], temperature: float
) -> None:
    target = make(3)
    phi, _ = direction(target, kernels.NoRepulsion(), temperature=temperature)
    scores = [
        double_loop.gradient(target.log_joint, p)
        for p in double_loop.points(target.particles)
    ]
    expected = double_loop.stack(scores)
    assert_equal(phi, {site: x / temperature for site, x in expected.items()})


@pytest.mark.grid
@pytest.mark.parametrize(
    "settings",
    [
        {"kernel": kernels.RBF()},
        {"kernel": kernels.RBF(space="site"), "temperature": 2.0},
        {"kernel": kernels.RBF(), "transport": "repulsive"},
        {"kernel": kernels.RBF(space="function"), "repulsion": 3.0},
        {"kernel": kernels.NoRepulsion()},
    ],
)
@pytest.mark.parametrize("chunk_size", [1, 3, 5])
def test_chunks_change_nothing(settings: dict[str, Any], chunk_size: int) -> None:
    target = bert(5)
    whole, one = direction(target, **settings)
    chunks, other = direction(target, chunk_size=chunk_size, **settings)
    assert_equal(chunks, whole)
    assert other.diagnostics.keys() == one.diagnostics.keys()
    for name, series in one.diagnostics.items():
        assert other.diagnostics[name] == pytest.approx(series, rel=1e-10)


@pytest.mark.parametrize("space", ["joint", "function"])
def test_chunks_see_the_same_minibatch(space: Literal["joint", "function"]) -> None:
    # Here the plate draws its indices itself: once a step, not once a chunk.
    x, y = torch.randn(NUM_DATA, 2).double(), torch.randn(NUM_DATA).double()

    def model() -> None:
        zeros = x.new_zeros(2)
        w = pyro.sample("w", dist.Normal(zeros, 1.0).to_event(1))
        with pyro.plate("data", NUM_DATA, subsample_size=3) as index:
            loc = (x[index] * w).sum(-1)
            pyro.sample("y", dist.Normal(loc, 0.5), obs=y[index])

    def particles(chunk_size: int | None) -> dict[str, Tensor]:
        svgd = pl.SVGD(
            model,
            kernels.RBF(space=space),
            SGD({"lr": 1.0}),
            4,
            init_loc_fn=lambda site: (
                torch.ones(2).double() * (1 + site["infer"].get("particle", 0))
            ),
            chunk_size=chunk_size,
        )
        torch.manual_seed(3)
        svgd.step()
        return svgd.get_named_particles()

    assert_equal(particles(2), particles(None))


@pytest.mark.parametrize("max_plate_nesting", [None, 1, 2])
def test_max_plate_nesting(max_plate_nesting: int | None) -> None:
    target = bert(4)
    phi, _ = direction(target, max_plate_nesting=max_plate_nesting)
    at = double_loop.points(target.particles)
    by_site = double_loop.joint_rbf(at, None)
    assert_equal(phi, double_loop.stein(at, target.log_joint, by_site))


@pytest.mark.parametrize("num_particles", [3, 4])
def test_batch_dims_without_a_plate(num_particles: int) -> None:
    # As many particles as data: dims that aren't declared must not mix.
    y = torch.randn(4).double()

    def model() -> None:
        w = pyro.sample("w", dist.Normal(y.new_zeros(4), 1.0))
        scale = pyro.sample("scale", dist.Exponential(y.new_ones(())))
        pyro.sample("y", dist.Normal(w, scale), obs=y)

    def log_joint(p: double_loop.Point) -> Tensor:
        scale = p["scale"].exp()
        return (
            dist.Normal(0.0, 1.0).log_prob(p["w"]).sum()
            + (p["scale"] - scale)  # the density of Exponential(1) and the Jacobian
            + dist.Normal(p["w"], scale).log_prob(y).sum()
        )

    particles = {
        "w": torch.randn(num_particles, 4).double(),
        "scale": torch.randn(num_particles).double(),
    }
    target = Target(model, {}, particles, {"scale": torch.exp}, log_joint)
    phi, _ = direction(target)
    at = double_loop.points(particles)
    by_site = double_loop.joint_rbf(at, None)
    assert_equal(phi, double_loop.stein(at, log_joint, by_site))


def test_latents_in_two_plates() -> None:
    y = torch.randn(2, 3).double()

    def model() -> None:
        with pyro.plate("columns", 3, dim=-1):
            a = pyro.sample("a", dist.Normal(y.new_zeros(()), 1.0))
            with pyro.plate("rows", 2, dim=-2):
                b = pyro.sample("b", dist.Normal(a, 2.0))
                pyro.deterministic("sum", a + b)
                pyro.sample("y", dist.Normal(a + b, 0.5), obs=y)
        pyro.factor("tilt", -a.square().sum(-1, keepdim=True) / 7)

    def log_joint(p: double_loop.Point) -> Tensor:
        return (
            dist.Normal(0.0, 1.0).log_prob(p["a"]).sum()
            + dist.Normal(p["a"], 2.0).log_prob(p["b"]).sum()
            + dist.Normal(p["a"] + p["b"], 0.5).log_prob(y).sum()
            - p["a"].square().sum() / 7
        )

    particles = {"a": torch.randn(3, 3).double(), "b": torch.randn(3, 2, 3).double()}
    target = Target(model, {}, particles, {}, log_joint)
    phi, _ = direction(target)
    at = double_loop.points(particles)
    by_site = double_loop.joint_rbf(at, None)
    assert_equal(phi, double_loop.stein(at, log_joint, by_site))


def test_positional_arguments() -> None:
    target = hierarchical_regression(3)
    phi, _ = direction(target)
    svgd = pl.SVGD(
        target.model, kernels.RBF(), SGD({"lr": 1.0}), 3, init_loc_fn=target.init
    )
    svgd.step(target.batch["x"], y=target.batch["y"])
    after = svgd.state_dict()["particles"]
    assert_equal({s: after[s] - x for s, x in target.particles.items()}, phi)


def test_the_loss_is_minus_the_log_joint_and_unbiased() -> None:
    # At a learning rate of 0, the mean over equal batches is the full-data value.
    target = bert(3)
    lora = pl.lift(networks.bert(2))
    full = networks.batch(NUM_DATA)
    target = Target(
        pl.models.classification(lora, NUM_DATA),
        full,
        networks.particles(lora, 3),
        {},
        lambda p: torch.zeros(()),
    )
    svgd = pl.SVGD(
        target.model, kernels.RBF(), SGD({"lr": 0.0}), 3, init_loc_fn=target.init
    )
    losses = [
        svgd.step(**{name: x[start : start + 4] for name, x in full.items()})
        for start in range(0, NUM_DATA, 4)
    ]
    log_joints = []
    for p in double_loop.points(target.particles):
        with lora.bind(p) as net:
            logits = net(**networks.inputs(full)).logits
        prior = sum(dist.Normal(0.0, 1.0).log_prob(x).sum() for x in p.values())
        likelihood = dist.Categorical(logits=logits).log_prob(full["labels"]).sum()
        log_joints.append(prior + likelihood)
    expected = -torch.stack(log_joints).mean().item()
    assert sum(losses) / 3 == pytest.approx(expected, rel=1e-12)
    assert svgd.step(**full) == pytest.approx(expected, rel=1e-12)


def test_a_network_in_training_with_dropout_still_steps() -> None:
    network = networks.bert(dropout=0.1).train()
    lora = pl.lift(network)
    svgd = pl.SVGD(
        pl.models.classification(lora, NUM_DATA),
        kernels.RBF(),
        SGD({"lr": 0.01}),
        3,
        init_loc_fn=lora.init_to_adapter(jitter=0.1),
    )
    batch = networks.batch()
    svgd.step(**batch)
    first = svgd.diagnostics["loss"][0]
    assert svgd.step(**batch) != first
    assert network.training


def test_init_functions_of_pyro_and_a_fresh_start() -> None:
    def model() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    svgd = pl.SVGD(
        model, kernels.RBF(), SGD({"lr": 0.0}), 3, init_loc_fn=init_to_sample
    )
    svgd.step()
    x = svgd.get_named_particles()["x"]
    assert len(x.unique(dim=0)) == 3
    lora = pl.lift(networks.bert())
    svgd = pl.SVGD(
        pl.models.classification(lora, NUM_DATA),
        kernels.RBF(),
        SGD({"lr": 0.0}),
        2,
        init_loc_fn=lora.init_to_fresh(),
    )
    svgd.step(**networks.batch())
    particles = svgd.get_named_particles()
    assert all((x == 0).all() for s, x in particles.items() if s.endswith(".B"))
    assert all(
        not torch.equal(x[0], x[1]) for s, x in particles.items() if s.endswith(".A")
    )
