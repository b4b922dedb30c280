"""Checkpoints of latents beside the weights, other priors, and other dtypes."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import init_to_value
from torch import Tensor, nn

import pyro_lora as pl
from pyro_lora.curvature.structures import Structure
from pyro_lora.curvature.weight_gaussian import WeightGaussian
from tests import networks
from tests.predict import models

pytestmark = pytest.mark.untrained

N = 12
STRUCTURES = [
    pl.structures.KFAC(),
    pl.structures.KFAC(reduce=True),
    pl.structures.KFAC(rank=3),
    pl.structures.EKFAC(),
    pl.structures.Diagonal(),
    pl.structures.Dense(),
    pl.structures.Exact(),
]


class Regression:
    """Latents on several supports beside the network's weights."""

    def __init__(self, prior: Any = None) -> None:
        self.lora = pl.lift(nn.Linear(3, 1).double(), prior=prior)
        self.at = {
            "noise": torch.tensor(0.4),
            "shares": torch.tensor([0.2, 0.3, 0.5]),
            "shift": torch.tensor([0.3, -0.2]),
            "slope": torch.tensor([0.7, 1.4]),
            "cuts": torch.tensor([-0.5, 0.6]),
        }
        self.at = {site: value.double() for site, value in self.at.items()}
        x = torch.randn(N, 3).double()
        condition = {**self.lora.weights(), **self.at}
        y = poutine.condition(self.model, condition)(x)  # around the mode
        self.batches = [{"x": x, "y": y}]

    def model(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        one = torch.ones(2, dtype=x.dtype)
        noise = pyro.sample("noise", dist.LogNormal(0 * one[0], 0.5))
        shares = pyro.sample("shares", dist.Dirichlet(2 * torch.ones_like(x[0])))
        shift = pyro.sample("shift", dist.Normal(0 * one, 0.5).to_event(1))
        slope = pyro.sample("slope", dist.Uniform(0 * one, 3 * one).to_event(1))
        cuts = pyro.sample("cuts", ordered(0 * one))
        loc = self.lora()(x)[..., 0] + shift.sum() + (x * shares).sum(-1)
        loc = loc + 0.1 * (x[:, :2] * slope).sum(-1) + 0.1 * cuts.sum()
        with pyro.plate("data", N, subsample=x):
            drawn: Tensor = pyro.sample("y", dist.Normal(loc, noise), obs=y)
        return drawn

    def laplace(self, structure: Structure) -> pl.LaplacePosterior:
        init = init_to_value(values={**self.lora.weights(), **self.at})
        guide = pl.AutoLaplace(self.model, init_loc_fn=init, structure=structure)
        return guide.laplace_approximation(self.batches)


def ordered(zeros: Tensor) -> dist.TorchDistribution:
    base = dist.Normal(zeros, 0.5).to_event(1)
    return dist.TransformedDistribution(base, dist.transforms.OrderedTransform())


def assert_same(found: pl.LaplacePosterior, expected: pl.LaplacePosterior) -> None:
    """Bit for bit, in all numbers that a user can ask for."""
    pyro.set_rng_seed(1)
    draws = expected.sample(4)
    pyro.set_rng_seed(1)
    again = found.sample(4)
    assert list(again) == list(draws)
    for site, value in draws.items():
        assert torch.equal(again[site], value), site
    assert torch.equal(found.log_prob(draws), expected.log_prob(draws))
    assert torch.equal(found.log_evidence(), expected.log_evidence())
    for name in ("mode", "variance"):
        values = getattr(expected, name)()
        for site, value in getattr(found, name)().items():
            assert torch.equal(value, values[site]), (name, site)
    tuned = found.optimize_prior(per="site").prior_precision
    for site, tau in expected.optimize_prior(per="site").prior_precision.items():
        assert torch.equal(tuned[site], tau), site


@pytest.mark.parametrize(
    "structure", [pl.structures.KFAC(), pl.structures.Diagonal(), pl.structures.Dense()]
)
def test_latents_beside_the_weights(structure: Structure, tmp_path: Path) -> None:
    regression = Regression()
    posterior = regression.laplace(structure)
    pl.save(posterior, tmp_path)
    found = pl.load(tmp_path, regression.lora, model=regression.model)
    assert isinstance(found, pl.LaplacePosterior)
    assert list(found.latents.values) == list(regression.at)
    assert_same(found, posterior)
    assert found.latents.newton_decrement() == posterior.latents.newton_decrement()
    batch = {"x": regression.batches[0]["x"]}
    expected = posterior.linearized(batch)
    assert torch.equal(
        found.linearized(batch).covariance_matrix, expected.covariance_matrix
    )
    trace: Any = poutine.trace(found).get_trace(**batch)
    assert trace.log_prob_sum().isfinite()


def test_a_support_that_no_file_describes_is_refused(tmp_path: Path) -> None:
    lora = pl.lift(nn.Linear(3, 1).double())
    x = torch.randn(N, 3).double()

    class Odd(dist.transforms.ExpTransform):
        pass

    class OddNormal(dist.Normal):
        pass

    class OddPositive(type(constraints.positive)):
        pass

    odd = OddPositive(0.0)
    OddNormal.support = odd  # type: ignore[assignment]
    for registry in (torch.distributions.biject_to, torch.distributions.transform_to):
        registry.register(odd, lambda _: Odd())

    def model(x: Tensor, y: Tensor | None = None) -> None:
        noise = pyro.sample("noise", OddNormal(x.new_tensor(1.0), 0.5))
        loc = lora()(x)[..., 0]
        with pyro.plate("data", N, subsample=x):
            pyro.sample("y", dist.Normal(loc, noise), obs=y)

    init = init_to_value(values={**lora.weights(), "noise": x.new_tensor(0.9)})
    guide = pl.AutoLaplace(model, init_loc_fn=init)
    posterior = guide.laplace_approximation(
        [{"x": x, "y": lora.network(x)[:, 0].detach() + 1}]
    )
    with pytest.raises(ValueError, match=r"'noise'.*by Odd, which.*poutine.condition"):
        pl.save(posterior, tmp_path / "there")
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_structure(structure: Structure, tmp_path: Path) -> None:
    lora, model = models.classifier()
    posterior = models.laplace(lora, model, models.two_batches(), structure)
    pl.save(posterior, tmp_path)
    found = pl.load(tmp_path, lora, model=model)
    assert isinstance(found, pl.LaplacePosterior)
    assert_same(found, posterior)


def with_prior(prior: Any, network: Any = None) -> pl.LiftedNetwork:
    return pl.lift(networks.bert() if network is None else network, prior=prior)


def drawn(posterior: Any, lora: pl.LiftedNetwork) -> dict[str, Tensor]:
    pyro.set_rng_seed(3)
    draws: dict[str, Tensor] = posterior.prior(lora)
    return draws


@pytest.mark.parametrize(
    "prior", [pl.priors.student_t(df=3.0, scale=0.4), pl.priors.laplace(scale=0.3)]
)
@pytest.mark.parametrize("structure", [pl.structures.KFAC(), pl.structures.Diagonal()])
def test_priors_that_are_not_normal(
    prior: Any, structure: Structure, tmp_path: Path
) -> None:
    lora = with_prior(prior)
    model = pl.models.classification(lora, models.NUM_DATA)
    posterior = models.laplace(lora, model, models.two_batches(), structure)
    pl.save(posterior, tmp_path)
    state = torch.get_rng_state()
    found = pl.load(tmp_path, lora, model=model)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(found, pl.LaplacePosterior)
    assert_same(found, posterior)
    expected = drawn(posterior, lora)
    for site, value in drawn(found, lora).items():
        assert torch.equal(value, expected[site])
    other = with_prior(pl.priors.normal(scale=0.4), copy.deepcopy(lora.network))
    message = r"manifest\.json: .*isn't N\(mean.*lifted with.*prior of the fit"
    with pytest.raises(ValueError, match=message):
        pl.load(tmp_path, other)
    # A precision chosen later makes the prior normal, and then any network will do.
    pl.save(posterior.optimize_prior(), tmp_path)
    assert_same(pl.load(tmp_path, other), posterior.optimize_prior())


def test_parameters_of_the_prior_come_back(tmp_path: Path) -> None:
    def prior(lora: pl.LiftedNetwork) -> dict[str, Tensor]:
        scale = pyro.param(
            "scale", torch.tensor(0.5).double(), constraint=constraints.positive
        )
        return pl.priors.normal(scale=scale)(lora)

    lora = with_prior(prior)
    model = pl.models.classification(lora, models.NUM_DATA)
    posterior = models.laplace(lora, model, models.two_batches())
    tuned = posterior.optimize_prior(per="prior")
    pl.save(tuned, tmp_path)
    pyro.clear_param_store()  # as in another process
    found = pl.load(tmp_path, lora, model=model)
    assert isinstance(found, pl.LaplacePosterior)
    assert list(pyro.get_param_store()) == []
    assert_same(found, tuned)
    expected = drawn(tuned, lora)
    for site, value in drawn(found, lora).items():
        assert torch.equal(value, expected[site])
    best = found.optimize_prior(per="prior").log_evidence()
    torch.testing.assert_close(best, tuned.log_evidence(), rtol=1e-6, atol=0)


@pytest.mark.grid
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_another_dtype(
    structure: Structure, dtype: torch.dtype, tmp_path: Path
) -> None:
    lora, model = models.classifier()
    posterior = models.laplace(lora, model, models.two_batches(), structure)
    pl.save(posterior, tmp_path)
    narrow, narrow_model = models.classifier(
        network=copy.deepcopy(lora.network).to(dtype)
    )
    found = pl.load(tmp_path, narrow, model=narrow_model)
    assert isinstance(found, pl.LaplacePosterior)
    # Sites of a network in half precision are float32.
    assert {x.dtype for x in found.mode().values()} == {torch.float32}
    assert {x.dtype for x in found.sample(2).values()} == {torch.float32}
    for site, value in posterior.mode().items():
        torch.testing.assert_close(
            found.mode()[site].double(), value, rtol=1e-6, atol=1e-6
        )
    torch.testing.assert_close(
        found.log_evidence(), posterior.log_evidence(), rtol=1e-6, atol=0
    )
    assert {x.dtype for x in found.prior(narrow).values()} == {torch.float32}
    batches = models.two_batches()
    sampled = pl.predict(found, batches, model=narrow_model, num_samples=2)
    assert sampled.probs.isfinite().all()
    linearized = pl.predict(found, batches, model=narrow_model, method="linearized")
    expected = pl.predict(posterior, batches, model=model, method="linearized")
    tolerance = 1e-4 if dtype is torch.float32 else 0.03
    torch.testing.assert_close(
        linearized.probs, expected.probs, rtol=0, atol=tolerance, check_dtype=False
    )


CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda posterior: posterior,
    "precision": lambda posterior: posterior.with_prior_precision(2.0),
    "tuned": lambda posterior: posterior.optimize_prior(),
    "refined": lambda posterior: posterior.refine(),
    "around the prior": lambda posterior: posterior.refine("prior"),
}


@pytest.fixture(scope="module")
def wide() -> dict[str, pl.LaplacePosterior]:
    lora, model = models.classifier()
    batches = models.two_batches()
    exact = models.laplace(lora, model, batches, pl.structures.Exact())
    saved = ("nothing", "refined", "around the prior")
    return {name: CHANGES[name](exact) for name in saved}


@pytest.mark.grid
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("saved", ["nothing", "refined", "around the prior"])
def test_what_is_refined_in_another_dtype(
    wide: Any, saved: str, change: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    original = wide[saved]
    pl.save(original, tmp_path)
    (lora,) = original.networks
    network = copy.deepcopy(lora.network).to(dtype)
    narrow, model = models.classifier(network=network)
    loaded: Any = pl.load(tmp_path, narrow, model=model)
    found, expected = CHANGES[change](loaded), CHANGES[change](original)
    gaussian, batches = found.gaussian, models.two_batches()
    for weights in (
        found.mode(),
        found.variance(),
        found.sample(2),
        found.prior_mean,
        found.prior(narrow),
        gaussian.origin,
        gaussian.informed_directions(2)[0],
    ):
        assert {x.dtype for x in weights.values()} == {torch.float32}
    for site, value in expected.mode().items():
        moved = found.mode()[site].double()
        torch.testing.assert_close(moved, value, rtol=1e-3, atol=1e-3)
    assert float(found.log_evidence()) == pytest.approx(
        float(expected.log_evidence()), rel=1e-4
    )
    log_probs = [pl.predict(p, batches).probs for p in (found, expected)]
    tolerance = 1e-3 if dtype is torch.float32 else 0.05
    torch.testing.assert_close(*log_probs, rtol=0, atol=tolerance, check_dtype=False)


def test_latents_take_the_weights_dtype(tmp_path: Path) -> None:
    regression = Regression()
    posterior = regression.laplace(pl.structures.KFAC())
    pl.save(posterior, tmp_path)
    narrow = pl.lift(copy.deepcopy(regression.lora.network).float())
    found = pl.load(tmp_path, narrow)
    assert isinstance(found, pl.LaplacePosterior)
    assert {x.dtype for x in found.sample(3).values()} == {torch.float32}
    expected = posterior.variance()
    for site, value in found.variance().items():
        torch.testing.assert_close(value.double(), expected[site], rtol=1e-5, atol=1e-6)


def test_particles_with_hyper_latents(tmp_path: Path) -> None:
    lora = with_prior(pl.priors.hierarchical())
    draws = pyro.infer.Predictive(lambda: lora() and None, num_samples=3)()
    particles = {site: value.double() for site, value in draws.items()}
    assert particles.keys() > lora.sites.keys()
    pl.save(pl.ParticlePosterior(particles, (lora,), None, "y"), tmp_path)
    found = pl.load(tmp_path, lora)
    assert isinstance(found, pl.ParticlePosterior)
    assert list(found.particles) == list(particles)
    for site, value in particles.items():
        assert torch.equal(found.particles[site], value), site
    narrow = pl.lift(copy.deepcopy(lora.network).float())
    dtypes = {x.dtype for x in pl.load(tmp_path, narrow).sample(3).values()}
    assert dtypes == {torch.float32}


@pytest.mark.gpu
def test_another_device(tmp_path: Path) -> None:
    lora, model = models.classifier()
    posterior = models.laplace(lora, model, models.two_batches())
    pl.save(posterior, tmp_path)
    there = pl.lift(copy.deepcopy(lora.network).to("cuda"))
    found = pl.load(tmp_path, there)
    assert {x.device.type for x in found.sample(2).values()} == {"cuda"}
    pl.save(found, tmp_path / "back")
    assert_same(pl.load(tmp_path / "back", lora), posterior)


@pytest.mark.parametrize("structure", ["Diagonal", "Dense", "Exact"])
def test_a_gaussian_of_ones_own_is_saved_as_what_it_is(
    structure: str, tmp_path: Path
) -> None:
    lora, model = models.classifier()
    kind = getattr(pl.structures, structure)()
    posterior: Any = models.laplace(lora, model, models.two_batches(), kind)
    given = posterior.gaussian
    own_kind = dataclasses.dataclass(frozen=True, eq=False, repr=False)(
        type("Own", (type(given),), {"__annotations__": {}})
    )
    values = {f.name: getattr(given, f.name) for f in dataclasses.fields(given)}
    own = dataclasses.replace(posterior, gaussian=own_kind(**values))
    pl.save(own, tmp_path / "own")
    loaded: Any = pl.load(tmp_path / "own", lora, model=model)
    draws = posterior.sample(2)
    assert type(loaded.gaussian) is type(given)
    assert torch.equal(loaded.log_prob(draws), posterior.log_prob(draws))


def test_a_gaussian_that_files_do_not_hold_is_refused(tmp_path: Path) -> None:
    lora, model = models.classifier()
    posterior: Any = models.laplace(lora, model, models.two_batches())
    other = type("Other", (WeightGaussian,), dict(vars(type(posterior.gaussian))))
    for name in ("tensors", "restored", "kind"):
        delattr(other, name)
    gaussian = object.__new__(other)
    vars(gaussian).update(vars(posterior.gaussian))
    own = dataclasses.replace(posterior, gaussian=gaussian)
    with pytest.raises(TypeError, match="found a Other"):
        pl.save(own, tmp_path / "own")
    assert not (tmp_path / "own").exists()
