"""Yesterday's posterior as a prior: its density, its draws, and continual learning."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import Tensor, nn
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora.likelihood.model_trace import trace_at
from pyro_lora.priors.previous_posterior import SiteMixture
from tests.networks import batch, bert, classifier, particles

STRUCTURES = {
    "diagonal": pl.structures.Diagonal(),
    "kfac_expand": pl.structures.KFAC(),
    "dense": pl.structures.Dense(),
}


def laplace(
    lora: pl.LiftedNetwork, structure: Any, weights: dict[str, Tensor]
) -> pl.LaplacePosterior:
    guide = pl.AutoLaplace(
        classifier(lora, num_data=5),
        init_loc_fn=lora.init_to(weights),
        structure=structure,
    )
    return guide.laplace_approximation([batch()])


@pytest.fixture(params=list(STRUCTURES))
def posterior(request: pytest.FixtureRequest) -> pl.LaplacePosterior:
    lora = pl.lift(bert())
    with pytest.warns(UserWarning, match="mode"):
        return laplace(lora, STRUCTURES[request.param], lora.weights())


def log_density(
    lora: pl.LiftedNetwork, weights: dict[str, Tensor], *lead: int
) -> Tensor:
    """Of the prior at weights, each site's under its own name."""

    def model() -> None:
        with pyro.plate_stack("particles", lead):
            lora()

    trace = trace_at(model, weights, {})
    trace.compute_log_prob()
    total = sum(trace.nodes[site]["log_prob"] for site in lora.sites)
    assert isinstance(total, Tensor)
    return total


def test_a_laplace_posterior_keeps_its_density(posterior: pl.LaplacePosterior) -> None:
    lora = pl.lift(bert(), prior=pl.priors.from_posterior(posterior))
    draws = posterior.sample(3)
    expected = posterior.log_prob(draws)
    column = {site: value[:, None] for site, value in draws.items()}
    assert_close(log_density(lora, column, 3, 1)[:, 0], expected, rtol=1e-8, atol=1e-8)
    one = {site: value[0] for site, value in draws.items()}
    assert_close(log_density(lora, one), expected[0], rtol=1e-8, atol=1e-8)


def test_draws_have_the_posteriors_moments(posterior: pl.LaplacePosterior) -> None:
    lora = pl.lift(bert(), prior=pl.priors.from_posterior(posterior))
    draws = Predictive(lambda: lora(), num_samples=400, parallel=True)()
    for site, variance in posterior.variance().items():
        z = draws[site].reshape(400, *variance.shape) - posterior.mode()[site]
        z = z / variance.sqrt()
        # Standard errors of a weight's mean and variance: 1/sqrt(400), sqrt(2/400);
        # the largest of a few hundred normals stays below 5.
        assert z.mean(0).abs().max() < 5 / 400**0.5
        assert (z.var(0) - 1).abs().max() < 5 * (2 / 400) ** 0.5


def test_part_of_a_dense_posterior_is_its_marginal() -> None:
    lora = pl.lift(bert())
    with pytest.warns(UserWarning, match="mode"):
        posterior = laplace(lora, pl.structures.Dense(), lora.weights())
    prior = pl.priors.from_posterior(posterior)
    lora = lora.with_prior(
        pl.priors.by_site({"*.value.*": prior, "*": pl.priors.normal()})
    )
    gaussian: Any = posterior.gaussian
    tau = torch.cat(
        [
            gaussian.prior_precision[site].expand(x.shape).flatten()
            for site, x in gaussian.loc.items()
        ]
    )
    covariance = (gaussian.fisher + torch.diag(tau)).inverse()
    weights = {
        site: x + 0.1 * torch.randn(x.shape).double()
        for site, x in posterior.mode().items()
    }
    mine = torch.cat(
        [torch.full((x.numel(),), ".value." in s) for s, x in weights.items()]
    )
    deviation = torch.cat(
        [(x - gaussian.loc[site]).flatten() for site, x in weights.items()]
    )
    expected = torch.distributions.MultivariateNormal(
        torch.zeros(int(mine.sum())).double(), covariance[mine][:, mine]
    ).log_prob(deviation[mine])
    trace = trace_at(lambda: lora(), weights, {})
    trace.compute_log_prob()
    log_prob = sum(trace.nodes[s]["log_prob"] for s in lora.sites if ".value." in s)
    assert_close(log_prob, expected, rtol=1e-8, atol=1e-8)


def of_particles(
    lora: pl.LiftedNetwork, num_particles: int, spread: float = 0.3
) -> pl.ParticlePosterior:
    draws = particles(lora, num_particles, spread=spread)
    return pl.ParticlePosterior(draws, (lora,), None, None)


@pytest.mark.parametrize("bandwidth", [0.2, None])
def test_particles_become_a_mixture_of_normals(bandwidth: float | None) -> None:
    lora = pl.lift(bert())
    posterior = of_particles(lora, 4)
    size = sum(x.numel() for x in lora.weights().values())
    widths = {
        site: bandwidth or float(4 ** (-1 / (size + 4)) * x.var(0).mean().sqrt())
        for site, x in posterior.particles.items()
    }
    lora = lora.with_prior(pl.priors.from_posterior(posterior, bandwidth=bandwidth))
    draws = particles(lora, 3, 1)
    log_prob = log_density(lora, draws, 3, 1)
    for i in range(3):
        one = {site: value[i, 0] for site, value in draws.items()}
        each = []
        for k in range(4):
            total = torch.zeros(()).double()
            for site, x in one.items():
                normal = dist.Normal(posterior.particles[site][k], widths[site])
                total += normal.log_prob(x).sum()
            each.append(total - math.log(4))
        expected = torch.stack(each).logsumexp(0)
        assert_close(log_prob[i, 0], expected, rtol=1e-6, atol=1e-6)
        assert_close(log_density(lora, one), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("parallel", [False, True])
def test_a_draw_belongs_to_one_particle(parallel: bool) -> None:
    lora = pl.lift(bert())
    posterior = of_particles(lora, 3)
    lora = lora.with_prior(pl.priors.from_posterior(posterior, bandwidth=1e-3))
    draws = Predictive(lambda: lora(), num_samples=60, parallel=parallel)()
    nearest = []
    for site, x in posterior.particles.items():
        own = draws[site].reshape(60, *x.shape[1:])
        distance = (own[:, None] - x).flatten(2).norm(dim=2)  # (60, 3)
        # A chi variable of n degrees of freedom: sqrt(n), give or take less than 1.
        assert (distance.min(1).values < 1e-3 * (x[0].numel() ** 0.5 + 5)).all()
        nearest.append(distance.argmin(1))
    assert all(torch.equal(index, nearest[0]) for index in nearest)
    counts = torch.bincount(nearest[0], minlength=3)
    # Standard error of a count: sqrt(60 (1/3) (2/3)) = 3.7.
    assert (counts - 20).abs().max() < 5 * 3.7


def test_a_mixture_of_laplaces_keeps_its_density() -> None:
    lora = pl.lift(bert())
    with pytest.warns(UserWarning, match="mode"):
        components = [
            laplace(lora, structure, {s: x[0] for s, x in particles(lora, 1).items()})
            for structure in STRUCTURES.values()
        ]
    posterior = pl.MixturePosterior(components, [0.5, 0.2, 0.3])
    lora = lora.with_prior(pl.priors.from_posterior(posterior))
    draws = posterior.sample(6)
    expected = posterior.log_prob(draws)
    column = {site: value[:, None] for site, value in draws.items()}
    log_prob = log_density(lora, column, 6, 1)[:, 0]
    assert_close(log_prob, expected, rtol=1e-8, atol=1e-8)


def test_a_component_without_weight_is_left_out() -> None:
    lora = pl.lift(bert())
    posterior = of_particles(lora, 2)
    far = replace(
        posterior, particles={s: 9 + x for s, x in posterior.particles.items()}
    )
    mixture = pl.MixturePosterior([posterior, far], [1.0, 0.0])
    weights = particles(lora)
    lora = lora.with_prior(pl.priors.from_posterior(posterior))
    expected = log_density(lora, weights)
    lora = lora.with_prior(pl.priors.from_posterior(mixture))
    assert_close(log_density(lora, weights), expected, rtol=1e-12, atol=0)


class Regression:
    """y = x w + b + noise on two batches; the posterior is Gaussian, Laplace exact."""

    noise, prior_sd = 0.5, 0.8

    def __init__(self) -> None:
        self.lora = pl.lift(
            nn.Linear(3, 1).double(), prior=pl.priors.normal(self.prior_sd)
        )
        self.x = torch.randn(12, 3).double()
        self.y = self.x @ torch.randn(3).double() + 0.5 * torch.randn(12) + 1

    def model(self, num_data: int) -> Callable[..., None]:
        def model(x: Tensor, y: Tensor | None = None) -> None:
            mean = self.lora()(x)[..., 0]
            with pyro.plate("data", num_data, subsample=x):
                pyro.sample("y", dist.Normal(mean, self.noise), obs=y)

        return model

    def posterior(self, rows: slice) -> dist.MultivariateNormal:
        """Of weights and bias, in this order."""
        design = torch.cat([self.x, torch.ones(12, 1).double()], 1)[rows]
        precision = design.T @ design / self.noise**2
        precision += torch.eye(4).double() / self.prior_sd**2
        mean = torch.linalg.solve(precision, design.T @ self.y[rows] / self.noise**2)
        return dist.MultivariateNormal(mean, precision_matrix=precision)

    def log_evidence(self, rows: slice) -> Tensor:
        design = torch.cat([self.x, torch.ones(12, 1).double()], 1)[rows]
        covariance = self.prior_sd**2 * design @ design.T
        covariance += self.noise**2 * torch.eye(len(design)).double()
        normal = dist.MultivariateNormal(torch.zeros(len(design)).double(), covariance)
        value: Tensor = normal.log_prob(self.y[rows])
        return value


def test_learning_batch_after_batch_is_learning_from_both() -> None:
    toy = Regression()
    first, both = slice(0, 7), slice(0, 12)
    mode = toy.posterior(first).mean
    weights = {"base.weight": mode[:3].reshape(1, 1, 3), "base.bias": mode[3:][None]}
    guide = pl.AutoLaplace(
        toy.model(7),
        init_loc_fn=toy.lora.init_to(weights),
        structure=pl.structures.Dense(),
    )
    data = {"x": toy.x[first], "y": toy.y[first]}
    before = guide.laplace_approximation([data])
    toy.lora = toy.lora.with_prior(pl.priors.from_posterior(before))
    rest = {"x": toy.x[7:], "y": toy.y[7:]}
    for _ in range(5):
        w = torch.randn(4).double()
        values = {"base.weight": w[:3].reshape(1, 1, 3), "base.bias": w[3:][None]}
        log_joint = trace_at(toy.model(5), values, rest).log_prob_sum()
        # p(w | y1) p(y2 | w) = p(w | y1, y2) p(y2 | y1)
        log_new = toy.log_evidence(both) - toy.log_evidence(first)
        expected = toy.posterior(both).log_prob(w) + log_new
        assert_close(log_joint, expected, rtol=1e-8, atol=1e-8)


def test_a_site_mixture_is_a_distribution() -> None:
    parts = [dist.Normal(torch.tensor([-1.0, 2.0]), 0.5).to_event(1) for _ in range(2)]
    parts[1] = dist.Normal(torch.tensor([4.0, 0.0]), torch.tensor([1.0, 2.0])).to_event(
        1
    )
    log_weights = [torch.tensor([0.3, 0.9]).log(), torch.tensor([0.7, 0.1]).log()]
    fn = SiteMixture(log_weights, parts)
    assert (fn.batch_shape, fn.event_shape) == ((2,), (2,))
    draws = fn.sample((4000,))
    assert draws.shape == (4000, 2, 2)
    means = torch.stack([part.mean for part in parts])  # (K, 2)
    pi = torch.tensor([[0.3, 0.7], [0.9, 0.1]])
    expected = pi @ means
    second = pi @ torch.stack([part.variance + part.mean**2 for part in parts])
    error = ((second - expected**2) / 4000).sqrt()
    assert ((draws.mean(0) - expected).abs() < 5 * error).all()
    value = torch.randn(2)
    each = torch.stack([part.log_prob(value) for part in parts])
    assert_close(fn.log_prob(value), (pi * each.exp()).sum(1).log())
    wide = fn.expand((3, 2))
    assert wide.sample((4,)).shape == (4, 3, 2, 2)
    assert_close(wide.log_prob(value), fn.log_prob(value).expand(3, 2))


# Bad input.


def test_particles_that_coincide_need_a_bandwidth() -> None:
    lora = pl.lift(bert())
    for posterior in (of_particles(lora, 1), of_particles(lora, 3, spread=0.0)):
        with pytest.raises(
            ValueError, match=r"'lora\..*query\.A': its \d particle.*bandwidth="
        ):
            pl.priors.from_posterior(posterior)
        lora = lora.with_prior(pl.priors.from_posterior(posterior, bandwidth=0.1))
        nodes = poutine.trace(lora).get_trace().nodes
        assert all(nodes[site]["value"].isfinite().all() for site in lora.sites)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bandwidth_is_positive_and_finite(value: float) -> None:
    posterior = of_particles(pl.lift(bert()), 2)
    with pytest.raises(ValueError, match="bandwidth must be positive and finite"):
        pl.priors.from_posterior(posterior, bandwidth=value)


@pytest.mark.parametrize("kind", ["particles", "dense", "kfac_expand"])
def test_a_posterior_has_the_networks_sites_and_shapes(kind: str) -> None:
    lora = pl.lift(bert(target_modules=["query"]))
    if kind == "particles":
        posterior: Any = of_particles(lora, 2)
    else:
        with pytest.warns(UserWarning, match="mode"):
            posterior = laplace(lora, STRUCTURES[kind], lora.weights())
    prior = pl.priors.from_posterior(posterior)
    with pytest.raises(
        ValueError, match=r"value\.A': expected it among .*query\.A.*by_site"
    ):
        pl.lift(bert(), prior=prior)()
    with pytest.raises(
        ValueError, match=r"query\.A': expected .* \(2, 2, 16\), found \(2, 3, 16\)"
    ):
        pl.lift(bert(target_modules=["query"], r=2), prior=prior)()


@pytest.mark.parametrize("guide", [AutoDelta, AutoNormal])
def test_a_guide_without_densities_is_refused(guide: Callable[..., Any]) -> None:
    lora = pl.lift(bert())
    auto = guide(classifier(lora), init_loc_fn=lora.init_to_adapter())
    texts = batch()
    auto(**texts)
    with pytest.raises(ValueError, match=r"query\.A'.*found a Delta.*priors\.normal"):
        pl.priors.from_posterior(lambda: auto(**texts))


@pytest.mark.untrained
@pytest.mark.filterwarnings("ignore:No width up to")
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda q: q.for_sampling([batch()], tolerance=9.0), "ScaledPosterior"),
        (lambda q: pl.methods.tfb(q.model, [batch()]), "GaussianPosterior"),
        (lambda q: exact(q), r"LaplacePosterior \(exact"),
        (lambda q: exact(q).refine(), r"LaplacePosterior \(exact"),
        (lambda q: pl.MixturePosterior([q, exact(q)]), "LaplacePosterior"),
    ],
)
def test_a_posterior_that_has_no_densities_is_named(
    make: Callable[[Any], Any], kind: str
) -> None:
    lora = pl.lift(bert())
    found = make(laplace(lora, pl.structures.KFAC(), lora.weights()))
    with pytest.raises(ValueError, match=rf"query\.A'.*this {kind}.*before for_samp"):
        pl.priors.from_posterior(found)


def mean_field(
    lora: pl.LiftedNetwork, loc: dict[str, Tensor], scale: dict[str, Tensor]
) -> Any:
    """Normals at the sites that have a scale, points at the others."""

    def guide() -> None:
        for site, x in loc.items():
            normal = dist.Normal(x, scale[site]) if site in scale else dist.Delta(x)
            pyro.sample(site, normal.to_event(x.ndim))

    found = pl.methods.mean_field(guide, model=classifier(lora))
    return replace(found, networks=(lora,))


@pytest.mark.parametrize("in_mixture", [False, True])
def test_a_mean_field_gaussian_keeps_its_density(in_mixture: bool) -> None:
    lora = pl.lift(bert())
    loc = {site: torch.randn_like(x) for site, x in lora.weights().items()}
    scale = {site: 0.1 + torch.rand_like(x) for site, x in loc.items()}
    posterior = mean_field(lora, loc, scale)
    if in_mixture:
        posterior = pl.MixturePosterior([posterior])
    found = lora.with_prior(pl.priors.from_posterior(posterior))
    one = {site: torch.randn_like(x) for site, x in loc.items()}
    each = [dist.Normal(loc[s], scale[s]).log_prob(x).sum() for s, x in one.items()]
    expected = torch.stack(each).sum()
    assert_close(log_density(found, one), expected, rtol=1e-8, atol=1e-8)


def test_a_mean_field_gaussian_names_its_points_and_other_sites() -> None:
    lora = pl.lift(bert())
    loc = {site: x.clone() for site, x in lora.weights().items()}
    point, *others = loc
    scale = {site: torch.ones_like(loc[site]) for site in others}
    prior = pl.priors.from_posterior(mean_field(lora, loc, scale))
    with pytest.raises(ValueError, match=rf"{point}'.*fixes it.*another prior by by_s"):
        lora.with_prior(prior)()
    noise = {"noise": torch.ones(())}
    with pytest.warns(UserWarning, match=r"\['noise'\] belong to no lifted network"):
        pl.priors.from_posterior(mean_field(lora, loc | noise, scale | noise))


def exact(posterior: pl.LaplacePosterior) -> pl.LaplacePosterior:
    (lora,) = posterior.networks
    return laplace(lora, pl.structures.Exact(), posterior.mode())


@pytest.mark.untrained
def test_a_posterior_of_weights_that_are_deltas_is_refused_beside_a_latent() -> None:
    lora = pl.lift(nn.Linear(3, 1).double())
    x, y = torch.randn(5, 3).double(), torch.randn(5).double()

    def model(x: Tensor, y: Tensor | None = None) -> None:
        noise = pyro.sample("noise", dist.LogNormal(torch.zeros(()).double(), 1.0))
        mean = lora()(x)[..., 0]
        with pyro.plate("data", 5, subsample=x):
            pyro.sample("y", dist.Normal(mean, noise), obs=y)

    guide = pl.AutoLaplace(
        model, init_loc_fn=lora.init_to_adapter(), structure=pl.structures.Exact()
    )
    posterior = guide.laplace_approximation([{"x": x, "y": y}])
    with pytest.raises(ValueError, match=r"base\.\w+'.*found a Delta"):
        pl.priors.from_posterior(posterior)


@pytest.mark.untrained
@pytest.mark.parametrize("structure", ["diagonal", "kfac_expand", "dense"])
def test_sites_that_a_fit_left_out_are_the_cause(structure: str) -> None:
    lora = pl.lift(bert())
    guide = pl.AutoLaplace(
        classifier(lora, num_data=5),
        init_loc_fn=lora.init_to_adapter(),
        structure=STRUCTURES[structure],
        sites=[site for site in lora.sites if ".value." in site],
    )
    posterior = guide.laplace_approximation([batch()])
    prior = pl.priors.from_posterior(posterior)
    with pytest.raises(
        ValueError, match=r"query\.A'.*fixe[sd].*sites=.*another prior by by_site"
    ):
        lora.with_prior(prior)()
    # Of the others it's as good as ever.
    others = pl.priors.by_site({"*.value.*": prior, "*": pl.priors.normal(1.0)})
    draws = posterior.sample(2)
    one = {site: x[0] for site, x in draws.items()}
    expected = posterior.log_prob(draws)[0]
    for site, x in one.items():
        if ".value." not in site:
            expected = expected + dist.Normal(0.0, 1.0).log_prob(x).sum()
    found = log_density(lora.with_prior(others), one)
    assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_sites_outside_of_the_network_are_named() -> None:
    lora = pl.lift(bert())
    weights = {**particles(lora, 3), "noise": torch.ones(3)}
    posterior = pl.ParticlePosterior(weights, (lora,), None, None)
    mixture = pl.MixturePosterior([posterior])
    for one in (posterior, mixture):
        with pytest.warns(
            UserWarning, match=r"\['noise'\] belong to no lifted network"
        ):
            pl.priors.from_posterior(one, bandwidth=0.1)
