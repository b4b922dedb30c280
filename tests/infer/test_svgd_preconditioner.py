"""SVGD in the metric of a Laplace posterior, against dense matrices."""

from dataclasses import replace
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import SGD
from torch import Tensor, nn
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora import kernels
from pyro_lora.curvature.mean_precision import mean_precision
from pyro_lora.curvature.structures import Structure
from tests import networks
from tests.curvature.gauss_newton import flatten, precision_matrix, unflatten
from tests.infer import double_loop
from tests.infer.engines import engine
from tests.infer.linear_regression import linear_regression
from tests.infer.targets import (
    NUM_DATA,
    Target,
    bert,
    hierarchical_bert,
    hierarchical_regression,
    normal,
)
from tests.infer.test_svgd_step import assert_equal, direction
from tests.networks import batch

pytestmark = pytest.mark.untrained

STRUCTURES = [pl.structures.KFAC(), pl.structures.EKFAC(), pl.structures.Diagonal()]


def laplace(
    lora: pl.LiftedNetwork, structure: Structure, **weights: Any
) -> pl.LaplacePosterior:
    """At the adapter's own weights, or given ones, on data of its own."""
    guide = pl.AutoLaplace(
        pl.models.classification(lora, NUM_DATA),
        init_loc_fn=lora.init_to(weights) if weights else lora.init_to_adapter(),
        structure=structure,
    )
    texts = batch(NUM_DATA, num_labels=3)
    return guide.laplace_approximation([texts])


def lifted(target: Target) -> pl.LiftedNetwork:
    with pyro.poutine.trace() as trace:
        target.model(**target.batch)
    site = next(iter(target.particles))
    (lora,) = trace.trace.nodes[site]["infer"]["lora"]
    assert isinstance(lora, pl.LiftedNetwork)
    return lora


def dense_metric(
    at: list[double_loop.Point],
    precision: Tensor,
    space: Literal["joint", "site"],
    bandwidth: float | None,
) -> dict[str, double_loop.PairKernel]:
    """Gaussian kernels of (x - y)' P (x - y), by the whole matrix or a site's block."""
    starts, places = 0, {}
    for site, x in at[0].items():
        places[site] = slice(starts, starts + x.numel())
        starts += x.numel()

    def kernel(rows: slice) -> double_loop.PairKernel:
        def distance(x: double_loop.Point, y: double_loop.Point) -> Tensor:
            difference = (flatten(x) - flatten(y))[rows]
            return difference @ precision[rows, rows] @ difference

        pairs = [distance(x, y).item() for i, x in enumerate(at) for y in at[:i]]
        median = double_loop.median_bandwidth(pairs, len(at))
        scale = median if bandwidth is None else 2 * bandwidth**2
        return lambda x, y: (-distance(x, y) / scale).exp()

    if space == "joint":
        return dict.fromkeys(at[0], kernel(slice(0, starts)))
    return {site: kernel(rows) for site, rows in places.items()}


def solved(direction: dict[str, Tensor], precision: Tensor) -> dict[str, Tensor]:
    rows = [
        torch.linalg.solve(precision, flatten(p)) for p in double_loop.points(direction)
    ]
    like = {s: x[0] for s, x in direction.items()}
    return unflatten(torch.stack(rows), like)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("space", ["joint", "site"])
@pytest.mark.parametrize("bandwidth", [None, 20.0])
def test_stein(
    structure: Structure, space: Literal["joint", "site"], bandwidth: float | None
) -> None:
    target = bert(4)
    posterior = laplace(lifted(target), structure)
    found, _ = direction(
        target,
        kernels.RBF(space=space, bandwidth=bandwidth),
        preconditioner=posterior,
        temperature=2.0,
    )
    precision = precision_matrix(posterior)
    at = double_loop.points(target.particles)
    by_site = dense_metric(at, precision, space, bandwidth)
    expected = double_loop.stein(at, target.log_joint, by_site, 2.0)
    assert_equal(found, solved(expected, precision))


@pytest.mark.parametrize("structure", [pl.structures.KFAC(), pl.structures.Dense()])
def test_repulsive(structure: Structure) -> None:
    target = bert(3)
    posterior = laplace(lifted(target), structure)
    found, _ = direction(
        target, preconditioner=posterior, transport="repulsive", repulsion=3.0
    )
    precision = precision_matrix(posterior)
    at = double_loop.points(target.particles)
    by_site = dense_metric(at, precision, "joint", None)
    expected = double_loop.repulsive(at, target.log_joint, by_site, 1.0, 3.0)
    assert_equal(found, solved(expected, precision))


def test_independent_particles_take_newton_steps() -> None:
    target = bert(3)
    posterior = laplace(lifted(target), pl.structures.KFAC())
    found, _ = direction(target, kernels.NoRepulsion(), preconditioner=posterior)
    scores = [
        double_loop.gradient(target.log_joint, p)
        for p in double_loop.points(target.particles)
    ]
    expected = solved(double_loop.stack(scores), precision_matrix(posterior))
    assert_equal(found, expected)


def test_low_rank_factors() -> None:
    target = bert(3)
    posterior = laplace(lifted(target), pl.structures.KFAC(rank=2))
    found, _ = direction(target, preconditioner=posterior)
    precision = precision_matrix(posterior)
    at = double_loop.points(target.particles)
    by_site = dense_metric(at, precision, "joint", None)
    expected = double_loop.stein(at, target.log_joint, by_site)
    assert_equal(found, solved(expected, precision))


class IllConditioned:
    """Regression on centred, correlated features of very different scales.

    The posterior is a Gaussian, and Laplace's approximation by KFAC is exact.
    """

    def __init__(self) -> None:
        task = linear_regression()
        scales = torch.tensor([0.3, 3.0, 30.0]).double()
        basis = torch.linalg.qr(task.x).Q
        turn = torch.linalg.qr(torch.randn(3, 3).double()).Q
        x = (basis * scales) @ turn  # columns orthogonal to the constant
        y = x @ torch.randn(3).double() + 0.5 * torch.randn(12).double() + 1
        self.task = replace(task, x=x, y=y)
        self.posterior = self.task.laplace(structure=pl.structures.KFAC())

    def run(self, num_steps: int, lr: float, **settings: Any) -> Tensor:
        """Particles (100, 4) after some steps from one spread far from the mode."""
        torch.manual_seed(5)
        svgd = pl.SVGD(
            self.task.model,
            kernels.RBF(),
            SGD({"lr": lr}),
            100,
            init_loc_fn=lambda site: 3 + torch.randn(site["fn"].shape()).double(),
            **settings,
        )
        batches = [self.task.whole]
        svgd.run(batches, num_epochs=num_steps, progress_bar=False)
        return torch.cat([x.flatten(1) for x in svgd.get_named_particles().values()], 1)

    def error(self, particles: Tensor) -> float:
        """Of the mean, in posterior standard deviations along the worst direction."""
        root = torch.linalg.cholesky(self.task.precision)
        return float((root.mT @ (particles.mean(0) - self.task.mode)).abs().max())


def test_ill_conditioned_gaussian() -> None:
    problem = IllConditioned()
    precision = problem.task.precision
    assert torch.linalg.cond(precision) > 1000
    assert_close(precision_matrix(problem.posterior), precision, rtol=1e-9, atol=1e-9)
    found = problem.run(150, 3.0, preconditioner=problem.posterior)
    # The right stationary point: mean and, whitened, covariance. SVGD's variances come
    # out low with 100 particles in 4 dims, here alike in all directions.
    assert problem.error(found) < 0.02
    white = (found - found.mean(0)) @ torch.linalg.cholesky(precision)
    variances = torch.linalg.eigvalsh(white.mT @ white / 99)
    assert ((variances > 0.7) & (variances < 1.05)).all()
    # Faster: without it no learning rate gets there in as many steps. Small ones are
    # slow along the wide direction, large ones unstable along the narrow one.
    plain = []
    for lr in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2):
        try:
            plain.append(problem.error(problem.run(150, lr)))
        except ValueError:  # a particle ran away
            plain.append(float("inf"))
    assert min(plain) > 1


def test_the_metric_is_a_change_of_coordinates() -> None:
    # On one trajectory of many steps: plain SVGD in the coordinates R' x, P = R R'.
    target = bert(4)
    posterior = laplace(lifted(target), pl.structures.EKFAC())
    precision = precision_matrix(posterior)
    root = torch.linalg.cholesky(precision)
    svgd = engine(target, SGD({"lr": 0.3}), preconditioner=posterior)
    at = double_loop.points(target.particles)
    for _ in range(3):
        svgd.step(**target.batch)
        like = at[0]
        white = [{"z": root.mT @ flatten(p)} for p in at]

        def log_joint(p: double_loop.Point, like: double_loop.Point = like) -> Tensor:
            return target.log_joint(
                unflatten(torch.linalg.solve(root.mT, p["z"]), like)
            )

        by_site = double_loop.joint_rbf(white, None)
        phi = double_loop.stein(white, log_joint, by_site)
        moved = torch.stack([p["z"] for p in white]) + 0.3 * phi["z"]
        at = double_loop.points(
            unflatten(torch.linalg.solve(root.mT, moved.mT).mT, like)
        )
    assert_close(
        svgd.get_named_particles(), double_loop.stack(at), rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("structure", [*STRUCTURES, pl.structures.Dense()])
def test_several_posteriors_of_one_basis_are_averaged(structure: Structure) -> None:
    target = bert(3)
    one = laplace(lifted(target), structure)
    other = one.with_prior_precision(5.0)
    found, _ = direction(target, preconditioner=[one, other, other])
    precision = (precision_matrix(one) + 2 * precision_matrix(other)) / 3
    at = double_loop.points(target.particles)
    by_site = dense_metric(at, precision, "joint", None)
    expected = double_loop.stein(at, target.log_joint, by_site)
    assert_equal(found, solved(expected, precision))


@pytest.mark.parametrize(
    "structure",
    [pl.structures.KFAC(), pl.structures.Diagonal(), pl.structures.KFAC(rank=2)],
)
def test_the_mean_of_different_bases(structure: Structure) -> None:
    # Along every basis vector that it keeps, the mean's quadratic form is exact; so
    # are its trace and, for diagonals, all of it.
    lora = pl.lift(networks.bert(3))
    points = networks.particles(lora, 3)
    posteriors = [
        laplace(lora, structure, **{s: x[k] for s, x in points.items()})
        for k in range(3)
    ]
    mean = mean_precision([p.gaussian for p in posteriors])
    expected = torch.stack([precision_matrix(p) for p in posteriors]).mean(0)
    eye = unflatten(torch.eye(len(expected)).double(), lora.weights())
    found = torch.cat([x.flatten(1) for x in mean.times_precision(eye).values()], 1)
    assert_close(found, found.mT, rtol=1e-9, atol=1e-9)
    values, vectors = torch.linalg.eigh(found)
    if structure == pl.structures.Diagonal():
        assert_close(found, expected, rtol=1e-9, atol=1e-9)
    elif structure == pl.structures.KFAC():
        assert_close(found.trace(), expected.trace(), rtol=1e-9, atol=1e-9)
        difference = torch.linalg.matrix_norm(found - expected)
        isotropic = expected.trace() / len(expected) * torch.eye(len(expected))
        assert difference < 0.5 * torch.linalg.matrix_norm(isotropic - expected)
    exact = ((vectors.mT @ expected) * vectors.mT).sum(1)
    assert_close(exact, values, rtol=1e-7, atol=1e-7)
    inverse = torch.cat([x.flatten(1) for x in mean.times_covariance(eye).values()], 1)
    assert_close(inverse @ found, torch.eye(len(found)).double(), rtol=0, atol=1e-9)


def test_latents_outside_of_the_network() -> None:
    # Their own precision is in unconstrained space, where particles are.
    target = noisy_regression(3)
    lora = lifted(target)
    weights = {s: x[0] for s, x in target.particles.items() if s in lora.sites}
    init = {**weights, "sigma": target.particles["sigma"][0].exp()}
    guide = pl.AutoLaplace(
        target.model,
        init_loc_fn=lambda site: init[site["name"]].clone(),
        structure=pl.structures.Diagonal(),
    )
    posterior = guide.laplace_approximation([target.batch])
    assert posterior.latents is not None
    found, _ = direction(target, preconditioner=[posterior, posterior])
    at = double_loop.points(target.particles)
    network = torch.cat(
        [x.expand(weights[s].shape).flatten() for s, x in precisions(posterior).items()]
    )
    order = list(target.particles)
    assert order[-1] == "sigma"
    precision = torch.block_diag(network.diag(), posterior.latents.precision)
    by_site = dense_metric(at, precision, "joint", None)
    expected = double_loop.stein(at, target.log_joint, by_site)
    assert_equal(found, solved(expected, precision))
    with pytest.raises(ValueError, match=r"'sigma'.*Use space='joint'"):
        direction(target, kernels.RBF(space="site"), preconditioner=posterior)


def precisions(posterior: pl.LaplacePosterior) -> dict[str, Tensor]:
    """1 / variance of the lifted sites, all that there is of a diagonal structure."""
    return {s: 1 / x for s, x in posterior.gaussian.variance().items()}


def noisy_regression(num_particles: int) -> Target:
    lora = pl.lift(nn.Linear(3, 1).double(), prior=pl.priors.normal(0.8))
    x, y = torch.randn(NUM_DATA, 3).double(), torch.randn(NUM_DATA).double()

    def model(x: Tensor, y: Tensor) -> None:
        loc = lora()(x)[..., 0]
        sigma = pyro.sample("sigma", dist.LogNormal(y.new_zeros(()), 0.5))
        with pyro.plate("data", NUM_DATA, subsample=y):
            pyro.sample("y", dist.Normal(loc, sigma), obs=y)

    def log_joint(p: double_loop.Point) -> Tensor:
        weights = {s: value for s, value in p.items() if s != "sigma"}
        with lora.bind(weights) as net:
            likelihood = normal(y, net(x)[:, 0], p["sigma"].exp())
        prior = torch.stack([normal(v, 0.0, 0.8) for v in weights.values()]).sum()
        return prior + normal(p["sigma"], 0.0, 0.5) + likelihood

    particles = networks.particles(lora, num_particles)
    particles["sigma"] = 0.2 * torch.randn(num_particles).double()
    batch = {"x": x, "y": y}
    return Target(model, batch, particles, {"sigma": torch.exp}, log_joint)


def test_what_is_refused() -> None:
    target = bert(3)
    lora = lifted(target)
    posterior, dense = (
        laplace(lora, pl.structures.KFAC()),
        laplace(lora, pl.structures.Dense()),
    )
    cases: list[tuple[type[Exception], str, Any, Any]] = [
        (ValueError, "found none", [], kernels.RBF()),
        (TypeError, "Laplace posterior", torch.eye(3), kernels.RBF()),
        (TypeError, "components", pl.MixturePosterior([posterior]), kernels.RBF()),
        (ValueError, "space is 'delta'", posterior, kernels.RBF(space="delta")),
        (ValueError, "is 'coordinate'", posterior, kernels.RBF(space="coordinate")),
        (ValueError, "space is 'function'", posterior, kernels.RBF(space="function")),
        (ValueError, "couples the sites", dense, kernels.RBF(space="site")),
        (ValueError, "same sites and structure", [posterior, dense], kernels.RBF()),
    ]
    for error, match, preconditioner, kernel in cases:
        with pytest.raises(error, match=match):
            engine(target, SGD({"lr": 1.0}), kernel, preconditioner=preconditioner)
    for other in (hierarchical_bert(3), hierarchical_regression(3)):
        svgd = engine(other, SGD({"lr": 1.0}), preconditioner=posterior)
        with pytest.raises(ValueError, match=r"the preconditioner is for shape"):
            svgd.step(**other.batch)
