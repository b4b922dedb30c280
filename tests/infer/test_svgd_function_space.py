"""SVGD in function space, against autograd through the network by particle."""

from collections.abc import Callable
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
from tests.infer import double_loop
from tests.infer.targets import (
    NUM_DATA,
    Target,
    bernoulli_bert,
    bert,
    hierarchical_regression,
)

TARGETS = [bert, bernoulli_bert, hierarchical_regression]


def step(target: Target, bandwidth: float | None = None, **settings: Any) -> pl.SVGD:
    num_particles = len(next(iter(target.particles.values())))
    svgd = pl.SVGD(
        target.model,
        kernels.RBF(space="function", bandwidth=bandwidth),
        SGD({"lr": 1.0}),
        num_particles,
        init_loc_fn=target.init,
        **settings,
    )
    svgd.step(**target.batch)
    return svgd


def moved(svgd: pl.SVGD, target: Target) -> dict[str, Tensor]:
    after = svgd.state_dict()["particles"]
    return {site: after[site] - x for site, x in target.particles.items()}


def oracle(
    target: Target, strength: float, bandwidth: float | None = None, **settings: Any
) -> dict[str, Tensor]:
    assert target.outputs is not None
    return double_loop.function_space(
        double_loop.points(target.particles),
        target.log_joint,
        target.outputs,
        bandwidth,
        settings.get("temperature", 1.0),
        strength,
    )


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert_close(found, expected, rtol=1e-9, atol=1e-9)


def datum_losses(target: Target) -> Tensor:
    """Negative log likelihood per datum, a particle each, of a classifier."""
    assert target.outputs is not None
    labels = target.batch["labels"]
    log_probs = [
        dist.Categorical(logits=target.outputs(p)).log_prob(labels).mean()
        for p in double_loop.points(target.particles)
    ]
    return -torch.stack(log_probs).detach()


@pytest.mark.parametrize("make", TARGETS)
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_median_bandwidth(
    make: Callable[[int], Target], chunk_size: int | None
) -> None:
    target = make(4)
    svgd = step(target, repulsion=5.0, temperature=2.0, chunk_size=chunk_size)
    expected = oracle(target, 5.0, temperature=2.0)
    assert_equal(moved(svgd, target), expected)
    # Without repulsion it would be something else.
    alone = oracle(target, 0.0, temperature=2.0)
    assert any((alone[s] - x).abs().max() > 0.1 for s, x in expected.items())


@pytest.mark.parametrize("make", [bert, hierarchical_regression])
def test_fixed_bandwidth(make: Callable[[int], Target]) -> None:
    target = make(4)
    svgd = step(target, bandwidth=0.8, repulsion=2.0)
    assert_equal(moved(svgd, target), oracle(target, 2.0, bandwidth=0.8))


@pytest.mark.parametrize("max_plate_nesting", [1, 2])
def test_max_plate_nesting(max_plate_nesting: int) -> None:
    target = bert(3)
    svgd = step(target, repulsion=2.0, max_plate_nesting=max_plate_nesting)
    assert_equal(moved(svgd, target), oracle(target, 2.0))


def test_without_a_plate_the_minibatch_is_all_data() -> None:
    x, y = torch.randn(5, 3).double(), torch.zeros(5).double()

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal((x * w).sum(-1), 0.3), obs=y)

    def log_joint(p: double_loop.Point) -> Tensor:
        prior = dist.Normal(0.0, 1.0).log_prob(p["w"]).sum()
        return prior + dist.Normal(x @ p["w"], 0.3).log_prob(y).sum()

    target = Target(
        model,
        {"x": x, "y": y},
        {"w": 0.05 * torch.randn(4, 3).double()},
        {},
        log_joint,
        lambda p: (x @ p["w"])[:, None],
    )
    # The loss is negative, as densities exceed 1 here: .4 N is the most there is.
    svgd = step(target)
    assert_equal(moved(svgd, target), oracle(target, 0.4 * 5))


def test_default_strength_is_gated_by_the_loss() -> None:
    target = bert(3, num_labels=2)
    for site in ("head.classifier.weight", "head.classifier.bias"):
        target.particles[site] *= 0.1
    biases = target.particles["head.classifier.bias"]
    target.batch["labels"][:] = 0

    def repulsion(margin: float) -> float:
        # Particles that differ, at a mean loss of log(1 + exp(-margin)), nearly.
        biases[:, 0, 0] = margin + torch.tensor([-0.1, 0.0, 0.1]).double()
        biases[:, 0, 1] = 0.0
        loss = datum_losses(target).mean().item()
        expected = oracle(target, 0.4 * NUM_DATA * max(0.0, 1 - loss / 0.3))
        svgd = step(target)
        assert_equal(moved(svgd, target), expected)
        return svgd.diagnostics["repulsion"][0]

    closed, half, wide = repulsion(0.0), repulsion(2.0), repulsion(8.0)
    assert closed == 0
    assert 0 < half < wide


def test_strength_as_a_function_sees_fraction_and_loss() -> None:
    target = bert(3)
    seen = []

    def repulsion(fraction: float, loss: float) -> float:
        seen.append((fraction, loss))
        return 3 * loss

    svgd = step(target, repulsion=repulsion)
    loss = datum_losses(target).mean().item()
    assert seen == [(1.0, pytest.approx(loss, rel=1e-12))]
    assert_equal(moved(svgd, target), oracle(target, 3 * loss))


@pytest.mark.parametrize("make", TARGETS)
def test_diagnostics(make: Callable[[int], Target]) -> None:
    target = make(3)
    assert target.outputs is not None
    svgd = step(target, repulsion=4.0, temperature=2.0)
    at = double_loop.points(target.particles)
    f = torch.stack([target.outputs(p).detach() for p in at])  # (K, B, M)
    batch_size = f.shape[1]
    pairs = [(i, j) for i in range(3) for j in range(i + 1, 3)]

    def distance(i: int, j: int) -> float:
        return (f[i] - f[j]).square().sum().item() / batch_size

    twice = double_loop.median_bandwidth([distance(i, j) for i, j in pairs], 3)
    off_diagonal = [
        torch.tensor(-distance(i, j) / twice).exp().item() for i, j in pairs
    ]
    assert svgd.diagnostics["mean_kernel"] == [
        pytest.approx(sum(off_diagonal) / 3, rel=1e-6)
    ]

    def repulsion(own: Tensor) -> Tensor:
        kernel = [(-(own - g).square().sum() / batch_size / twice).exp() for g in f]
        return -4.0 * torch.stack(kernel).sum().log()

    pushes = [
        double_loop.gradient(lambda p: repulsion(p["f"]), {"f": own})["f"] for own in f
    ]
    rms = torch.stack([x.square().sum() for x in pushes]).mean().sqrt().item()
    assert svgd.diagnostics["repulsion"] == [pytest.approx(rms, rel=1e-9)]
    scores = [score(target, own) for own in f]
    rms = torch.stack([x.square().sum() for x in scores]).mean().sqrt().item() / 2
    assert svgd.diagnostics["attraction"] == [pytest.approx(rms, rel=1e-9)]


def score(target: Target, outputs: Tensor) -> Tensor:
    """Gradient of the full-data log likelihood in the outputs of one particle."""

    def log_likelihood(p: double_loop.Point) -> Tensor:
        f = p["f"]
        if "y" in target.batch:
            fn, y = dist.Normal(f[:, 0], 0.5), target.batch["y"]
        elif f.shape[1] == 1:
            fn, y = dist.Bernoulli(logits=f[:, 0]), target.batch["labels"]
        else:
            fn, y = dist.Categorical(logits=f), target.batch["labels"]
        return fn.log_prob(y).sum() * NUM_DATA / len(f)

    return double_loop.gradient(log_likelihood, {"f": outputs})["f"]


def test_a_normal_with_a_scale_of_its_own() -> None:
    # The kernel compares locations; the scale moves by its gradient alone.
    x, y = torch.randn(5, 3).double(), torch.randn(5).double()

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        scale = pyro.sample("scale", dist.Exponential(x.new_ones(())))
        with pyro.plate("data", NUM_DATA, subsample=y):
            pyro.sample("y", dist.Normal((x * w).sum(-1), scale), obs=y)

    def log_joint(p: double_loop.Point) -> Tensor:
        scale = p["scale"].exp()
        prior = dist.Normal(0.0, 1.0).log_prob(p["w"]).sum() - scale + p["scale"]
        likelihood = dist.Normal(x @ p["w"], scale).log_prob(y).sum()
        return prior + NUM_DATA / 5 * likelihood

    particles = {"w": torch.randn(3, 3).double(), "scale": torch.randn(3).double()}
    target = Target(
        model,
        {"x": x, "y": y},
        particles,
        {"scale": torch.exp},
        log_joint,
        lambda p: (x @ p["w"])[:, None],
    )
    svgd = step(target, repulsion=3.0)
    assert_equal(moved(svgd, target), oracle(target, 3.0))
    scores = []
    for p in double_loop.points(particles):
        z = (y - x @ p["w"]) / p["scale"].exp() ** 2 * NUM_DATA / 5
        scores.append(z.square().sum())
    rms = torch.stack(scores).mean().sqrt().item()
    assert svgd.diagnostics["attraction"] == [pytest.approx(rms, rel=1e-9)]


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_an_ordinal_likelihood_with_cutpoints_of_its_own(
    chunk_size: int | None,
) -> None:
    # The kernel compares predictors; the cutpoints move by their gradient alone.
    y = torch.tensor([0, 2, 1, 1, 0])

    def likelihood(f: Tensor, c: Tensor) -> Any:
        return dist.OrderedLogistic(f, torch.stack([c - 1, c + 1], -1))

    def model(y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(X.new_zeros(2), 1.0).to_event(1))
        c = pyro.sample("c", dist.Normal(X.new_zeros(()), 1.0))
        with pyro.plate("data", NUM_DATA, subsample=y):
            pyro.sample("y", likelihood((X * w).sum(-1), c), obs=y)

    def log_joint(p: double_loop.Point) -> Tensor:
        prior = sum(dist.Normal(0.0, 1.0).log_prob(x).sum() for x in p.values())
        return prior + NUM_DATA / 5 * likelihood(X @ p["w"], p["c"]).log_prob(y).sum()

    particles = {"w": torch.randn(3, 2).double(), "c": torch.randn(3).double()}
    target = Target(
        model, {"y": y}, particles, {}, log_joint, lambda p: (X @ p["w"])[:, None]
    )
    svgd = step(target, repulsion=3.0, chunk_size=chunk_size)
    assert_equal(moved(svgd, target), oracle(target, 3.0))


X = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).double()
COUNTS = torch.tensor([0.0, 2.0, 1.0, 4.0, 1.0]).double()
CLASSES = torch.tensor([[1, 0, 2], [0, 1, 0], [3, 0, 0], [0, 0, 1], [1, 1, 1]]).double()
CUTPOINTS = torch.tensor([-1.0, 1.0]).double()

# Likelihood of the network's outputs f, (B,) or (B, 3), and outcomes.
LIKELIHOODS: dict[str, tuple[Callable[[Tensor], Any], Tensor]] = {
    "Poisson": (lambda f: dist.Poisson(f.exp()), COUNTS),
    "Binomial": (lambda f: dist.Binomial(4, logits=f), COUNTS),
    "NegativeBinomial": (lambda f: dist.NegativeBinomial(3.0, logits=f), COUNTS),
    "OrderedLogistic": (lambda f: dist.OrderedLogistic(f, CUTPOINTS), COUNTS % 3),
    "StudentT": (lambda f: dist.StudentT(4.0, f, 0.7), COUNTS),
    "Laplace": (lambda f: dist.Laplace(f, 0.7), COUNTS),
    "OneHotCategorical": (
        lambda f: dist.OneHotCategorical(logits=f),
        torch.eye(3).double()[[0, 1, 2, 2, 0]],
    ),
    "Multinomial": (
        lambda f: dist.Multinomial(logits=f, validate_args=False),
        CLASSES,
    ),
}


@pytest.mark.parametrize("name", list(LIKELIHOODS))
def test_other_likelihoods(name: str) -> None:
    likelihood, y = LIKELIHOODS[name]
    event = torch.Size([2, *y.shape[1:]])

    def model(y: Tensor) -> None:
        fn = dist.Normal(X.new_zeros(event), 1.0).to_event(len(event))
        w = pyro.sample("w", fn)
        f = (X[..., None] * w).sum(-2) if len(event) == 2 else (X * w).sum(-1)
        with pyro.plate("data", NUM_DATA, subsample=y):
            pyro.sample("y", likelihood(f), obs=y)

    def log_joint(p: double_loop.Point) -> Tensor:
        prior = dist.Normal(0.0, 1.0).log_prob(p["w"]).sum()
        return prior + NUM_DATA / 5 * likelihood(X @ p["w"]).log_prob(y).sum()

    def outputs(p: double_loop.Point) -> Tensor:
        f = X @ p["w"]
        return f[:, None] if f.ndim == 1 else f - f.mean(-1, keepdim=True)

    particles = {"w": torch.randn(4, *event).double()}
    target = Target(model, {"y": y}, particles, {}, log_joint, outputs)
    svgd = step(target, repulsion=3.0)
    assert_equal(moved(svgd, target), oracle(target, 3.0))
    scores = [
        double_loop.gradient(
            lambda p: NUM_DATA / 5 * likelihood(p["f"]).log_prob(y).sum(),
            {"f": X @ p["w"]},
        )["f"]
        for p in double_loop.points(particles)
    ]
    rms = torch.stack([s.square().sum() for s in scores]).mean().sqrt().item()
    assert svgd.diagnostics["attraction"] == [pytest.approx(rms, rel=1e-6)]


def test_a_likelihood_without_a_natural_parameter() -> None:
    def model() -> None:
        w = pyro.sample("w", dist.Normal(X.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Cauchy((X * w).sum(-1), 1.0), obs=COUNTS)

    svgd = pl.SVGD(
        model,
        kernels.RBF(space="function"),
        SGD({"lr": 0.1}),
        2,
        init_loc_fn=lambda site: X[site["infer"].get("particle", 0)],
    )
    with pytest.raises(TypeError, match="Nothing is known of the likelihood Cauchy"):
        svgd.step()


def test_particles_that_agree_stay_finite() -> None:
    # All B = 0 and one head: the same logits, and distances of 0.
    lora = pl.lift(networks.bert())
    weights = lora.weights()
    particles = {
        s: (0.0 if s.endswith(".B") else 1.0) * x.expand(3, *x.shape).clone()
        for s, x in weights.items()
    }
    for site, x in particles.items():
        if site.endswith(".A"):
            x += 0.1 * torch.randn_like(x)
    svgd = pl.SVGD(
        pl.models.classification(lora, NUM_DATA),
        kernels.RBF(space="function"),
        SGD({"lr": 0.01}),
        3,
        init_loc_fn=lora.init_to(particles),
        repulsion=1.0,
    )
    for _ in range(3):
        svgd.step(**networks.batch())
    assert svgd.diagnostics["mean_kernel"][0] == 1


def test_the_likelihood_is_named_where_there_are_two() -> None:
    target = hierarchical_regression(3)

    def model(x: Tensor, y: Tensor) -> None:
        target.model(x, y)
        pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0), obs=x[0, 0])

    two = Target(
        model,
        target.batch,
        target.particles,
        target.constrained,
        target.log_joint,
        target.outputs,
    )
    with pytest.raises(ValueError, match=r"obs_site="):
        step(two, repulsion=1.0)
    svgd = step(two, repulsion=1.0, obs_site="y")
    assert_equal(moved(svgd, two), oracle(target, 1.0))
