"""Small latent sites beside the network's: a block of their own."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor, nn
from torch.distributions import biject_to

import pyro_lora as pl
from pyro_lora.curvature.structures import Structure
from tests.curvature.gauss_newton import assert_same, laplace, split
from tests.networks import batch, bert

N = 12
SHARES = torch.tensor([2.0, 3.0, 4.0]).double()


class Regression:
    """y ~ N(x w + b + s c, sigma^2) with latent sigma > 0 and s on a simplex (3,)."""

    def __init__(self, prior: pl.priors.Prior | None = None) -> None:
        network = nn.Linear(3, 1).double()
        self.lora = pl.lift(network, prior=prior or pl.priors.normal(scale=0.8))
        self.x = torch.randn(N, 3).double()
        self.c = torch.randn(N, 3).double()
        self.sigma = torch.tensor(0.45, dtype=torch.float64)
        self.s = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
        noise = 0.4 * torch.randn(N).double()
        self.y = network(self.x)[:, 0].detach() + self.c @ self.s + noise

    def model(self, x: Tensor, c: Tensor, y: Tensor | None = None) -> None:
        sigma = pyro.sample("sigma", dist.LogNormal(-1 + 0 * self.sigma, 0.7))
        s = pyro.sample("s", dist.Dirichlet(SHARES))
        loc = self.lora()(x)[..., 0] + (c * s).sum(-1)
        with pyro.plate("data", N, subsample=x):
            pyro.sample("y", dist.Normal(loc, sigma), obs=y)

    def log_joint(self, u: Tensor) -> Tensor:
        """In unconstrained space of sigma and s, (3,), written out; weights fixed."""
        to_s = biject_to(dist.constraints.simplex)
        sigma, s = u[0].exp(), to_s(u[1:])
        with torch.no_grad():
            loc = (self.lora.network(self.x))[:, 0]
        z = (self.y - loc - self.c @ s) / sigma
        likelihood = (-z.square() / 2 - sigma.log()).sum() - N * NORM
        prior = -(((u[0] + 1) / 0.7) ** 2) / 2 - math.log(0.7) - NORM
        prior = prior + dist.Dirichlet(SHARES).log_prob(s)
        result: Tensor = likelihood + prior + to_s.log_abs_det_jacobian(u[1:], s)
        return result

    @property
    def at(self) -> Tensor:
        to_s = biject_to(dist.constraints.simplex)
        return torch.cat([self.sigma.log()[None], to_s.inv(self.s)])

    def init(self, site: dict[str, Any]) -> Tensor:
        extra = {"sigma": self.sigma, "s": self.s}
        value: Tensor = {**self.lora.weights(), **extra}[site["name"]]
        return value

    @property
    def whole(self) -> dict[str, Tensor]:
        return {"x": self.x, "c": self.c, "y": self.y}

    def laplace(self, batch_size: int = 5, **options: Any) -> pl.LaplacePosterior:
        guide = pl.AutoLaplace(self.model, init_loc_fn=self.init, **options)
        batches = [
            {name: x[i : i + batch_size] for name, x in self.whole.items()}
            for i in range(0, N, batch_size)
        ]
        return guide.laplace_approximation(batches)


NORM = 0.9189385332046727  # log(2 pi) / 2
ignore_mode = pytest.mark.untrained
STRUCTURES = [pl.structures.Dense(), pl.structures.KFAC(), pl.structures.Diagonal()]


@ignore_mode
@pytest.mark.parametrize("structure", STRUCTURES)
def test_block_is_minus_the_hessian(structure: Structure) -> None:
    regression = Regression()
    posterior = regression.laplace(structure=structure)
    block = posterior.latents
    order = list(block.values)
    assert order == ["sigma", "s"]
    expected = -torch.autograd.functional.hessian(
        regression.log_joint, regression.at.requires_grad_()
    )
    assert_same(block.precision, expected)
    at = regression.at.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(regression.log_joint(at), at)
    assert_same(block.gradient, gradient)
    # The weights are as with the latents fixed.
    fixed = poutine.condition(
        regression.model, {"sigma": regression.sigma, "s": regression.s}
    )
    guide = pl.AutoLaplace(
        fixed,
        init_loc_fn=regression.lora.init_to_adapter(),
        structure=structure,
        obs_site="y",
    )
    plain = guide.laplace_approximation([regression.whole])
    for site, variance in plain.variance().items():
        assert_same(posterior.variance()[site], variance)
    # Evidence: that of the weights, and the Gaussian integral of the latents.
    at_mode = regression.log_joint(at) - _log_likelihood(regression)
    added = at_mode - 0.5 * torch.logdet(expected / (2 * torch.pi))
    assert_same(posterior.log_evidence(), plain.log_evidence() + added)


def _log_likelihood(regression: Regression) -> Tensor:
    loc = regression.lora.network(regression.x)[:, 0] + regression.c @ regression.s
    log_prob: Tensor = dist.Normal(loc, regression.sigma).log_prob(regression.y)
    return log_prob.sum()


@ignore_mode
def test_batches_do_not_change_the_block() -> None:
    regression = Regression()
    blocks = [regression.laplace(size).latents for size in (N, 5, 1)]
    for block in blocks[1:]:
        assert_same(block.precision, blocks[0].precision)
        assert_same(block.log_prior, blocks[0].log_prior)


@ignore_mode
@pytest.mark.parametrize("structure", STRUCTURES)
def test_draws_and_density(structure: Structure) -> None:
    regression = Regression()
    posterior = regression.laplace(structure=structure)
    draws = posterior.sample(20000)
    to_s = biject_to(dist.constraints.simplex)
    u = torch.cat([draws["sigma"].log()[:, None], to_s.inv(draws["s"])], 1)
    covariance = posterior.latents.precision.inverse()
    error = (2 / 20000) ** 0.5 * covariance.diagonal().max()
    torch.testing.assert_close(u.T.cov(), covariance, rtol=0, atol=5 * float(error))
    mean_error = float((covariance.diagonal().max() / 20000).sqrt())
    torch.testing.assert_close(u.mean(0), regression.at, rtol=0, atol=5 * mean_error)
    # The density: of u, with the map's Jacobian, beside that of the weights.
    few = {site: x[:7] for site, x in draws.items()}
    log_q = dist.MultivariateNormal(regression.at, covariance).log_prob(u[:7])
    log_q = log_q - u[:7, 0] - to_s.log_abs_det_jacobian(u[:7, 1:], few["s"])
    expected = log_q + posterior.gaussian.log_prob(few)
    assert_same(posterior.log_prob(few), expected)
    # The guide's trace has the same density.
    trace: Any = poutine.trace(posterior).get_trace(**regression.whole)
    at = {site: trace.nodes[site]["value"][None] for site in draws}
    assert_same(trace.log_prob_sum(), posterior.log_prob(at)[0])
    variance = posterior.variance()
    assert_same(variance["sigma"], covariance[0, 0] * regression.sigma**2)
    assert variance["s"].shape == (3,)
    assert posterior.mode()["sigma"] == regression.sigma


@ignore_mode
def test_the_guide_in_stock_pyro() -> None:
    regression = Regression()
    posterior = regression.laplace()
    samples = Predictive(regression.model, guide=posterior, num_samples=9)(
        regression.x, regression.c
    )
    assert samples["y"].shape == (9, N)
    assert (samples["sigma"] > 0).all()
    loops = Trace_ELBO(num_particles=4000, vectorize_particles=True)
    pyro.set_rng_seed(0)
    looped = loops.loss(regression.model, posterior, **regression.whole)
    draws = posterior.sample(1000)
    log_joint = []
    for i in range(1000):
        w = {site: x[i] for site, x in draws.items()}
        trace = poutine.trace(poutine.condition(regression.model, w)).get_trace(
            **regression.whole
        )
        log_joint.append(trace.log_prob_sum())
    gap = torch.stack(log_joint) - posterior.log_prob(draws)
    error = float(gap.std()) / 1000**0.5
    assert abs(looped + float(gap.mean())) < 5 * 1.25**0.5 * error
    logits = posterior.linearized({"x": regression.x, "c": regression.c})
    assert logits.mean.shape == (N, 1)


def test_from_svi() -> None:
    regression = Regression()
    pyro.clear_param_store()
    guide = pl.AutoLaplace(regression.model, init_loc_fn=regression.init)
    svi = SVI(regression.model, guide, Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(600):
        svi.step(**regression.whole)
    posterior = guide.laplace_approximation([regression.whole])
    # A mode on the support: in unconstrained space the Jacobian's gradient is left.
    assert float(posterior.latents.gradient[0]) == pytest.approx(1.0, abs=1e-3)
    assert posterior.log_evidence().isfinite()


NON_CENTRED = r"isn't latent.*centered=False.*optimize_prior.*SVGD"


@ignore_mode
@pytest.mark.parametrize("after_svi", [False, True])
@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (pl.priors.hierarchical(), r"depends on latent.*no joint mode.*optimize_prior"),
        (pl.priors.horseshoe(), r"depends on latent.*no joint mode.*SVGD"),
        (pl.priors.hierarchical(centered=False), NON_CENTRED),
        (pl.priors.horseshoe(centered=False), NON_CENTRED),
        (pl.priors.rank_ard(centered=False), NON_CENTRED),
        (
            pl.priors.by_site(
                {
                    "head.*": pl.priors.normal(),
                    "*": pl.priors.hierarchical(centered=False),
                }
            ),
            NON_CENTRED,
        ),
    ],
)
def test_scales_of_the_weights_are_refused(
    prior: pl.priors.Prior, message: str, after_svi: bool
) -> None:
    pyro.clear_param_store()
    lora, texts = pl.lift(bert(2), prior=prior), batch(5)
    model = pl.models.classification(lora, 5)
    guide = pl.AutoLaplace(model, init_loc_fn=pyro.infer.autoguide.init_to_median)
    if after_svi:
        SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO()).step(**texts)
    with pytest.raises(ValueError, match=rf"Site 'lora.*{message}"):
        guide.laplace_approximation(split(texts, 3))


def test_a_hierarchical_prior_whose_scales_are_fixed() -> None:
    # What the docs say to do: MAP in the non-centred form, then the scales fixed.
    pyro.clear_param_store()
    network = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    lora = pl.lift(network, prior=pl.priors.hierarchical(0.3, centered=False))
    one = {"x": torch.randn(N, 3).double(), "y": torch.arange(N) % 3}

    def model(x: Tensor, y: Tensor | None = None) -> None:
        logits = lora()(x)
        with pyro.plate("data", N, subsample=x):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    start = pyro.infer.autoguide.init_to_median
    trained = pyro.infer.autoguide.AutoDelta(model, init_loc_fn=start)
    svi = SVI(model, trained, Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(150):
        svi.step(**one)
    median = trained.median()
    trace: Any = poutine.trace(poutine.condition(model, median)).get_trace(**one)
    weights = {site: trace.nodes[site]["value"].detach() for site in lora.sites}
    hyper = {name: x for name, x in median.items() if name.startswith("prior.")}
    # No warning: given the scales, the mode is that of the weights.
    lora = lora.with_prior(poutine.condition(pl.priors.hierarchical(0.3), hyper))
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to(weights), obs_site="y")
    posterior = guide.laplace_approximation([one])
    scales = {}
    for site, w in weights.items():
        log_scale = trace.nodes[f"prior.log_scale.{site}"]["value"].detach()
        assert len(set(log_scale.tolist())) == len(w) == 2
        scales[site] = log_scale.exp().reshape(-1, *[1] * (w.ndim - 1))
        tau = posterior.prior_precision[site]
        assert_same(tau, (scales[site] ** -2).expand_as(tau))
        assert_same(posterior.mode()[site], w)
    lora = lora.with_prior(pl.priors.normal(scales))
    plain = pl.AutoLaplace(model, init_loc_fn=lora.init_to(weights))
    again = plain.laplace_approximation([one])
    assert_same(posterior.log_evidence(), again.log_evidence())
    assert posterior.linearized({"x": one["x"]}).mean.shape == (N, 3)


@ignore_mode
def test_latents_that_fit_no_block() -> None:
    lora, texts = pl.lift(bert(2)), batch(5)

    def model(kind: str, labels: Tensor | None = None, **texts: Tensor) -> None:
        logits = lora()(**texts).logits
        if kind == "local":
            with pyro.plate("local", 5):
                shift = pyro.sample("z", dist.Normal(logits[:, 0] * 0, 1.0))
        elif kind == "discrete":
            shift = pyro.sample("z", dist.Poisson(logits.new_tensor(3.0)))
        elif kind == "large":
            zeros = logits.new_zeros(1001)
            shift = pyro.sample("z", dist.Normal(zeros, 1.0).to_event(1)).mean()
        elif kind == "bimodal":
            shift = pyro.sample("z", dist.StudentT(1.0, logits.new_tensor(5.0), 0.1))
        logits = logits + shift[..., None] * (kind != "bimodal")
        with pyro.plate("data", 5, subsample=logits):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    messages = {
        "local": "batch shape",
        "discrete": "discrete",
        "large": "1001 entries",
        "bimodal": "isn't concave",
    }

    def init(site: dict[str, Any]) -> Tensor:
        value: Tensor = {**lora.weights()}.get(
            site["name"], torch.zeros(site["fn"].batch_shape + site["fn"].event_shape)
        )
        return value

    for kind, message in messages.items():
        guide = pl.AutoLaplace(model, init_loc_fn=init)
        with pytest.raises(ValueError, match=message):
            guide.laplace_approximation([{"kind": kind, **texts}])
    assert not laplace(lora, texts).latents.values


@ignore_mode
def test_laplace_starts_where_svgd_left_the_noise() -> None:
    lora, texts = pl.lift(bert(1)), batch(8)
    texts["labels"] = 0.1 * torch.randn(8).double()
    model = pl.models.regression(lora, 8)
    svgd = pl.SVGD(
        model,
        pl.kernels.NoRepulsion(),
        Adam({"lr": 0.05}),
        1,
        init_loc_fn=lora.init_to_adapter(),
    )
    svgd.run([texts], num_epochs=20, progress_bar=False)
    particle = svgd.get_named_particles()
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to(particle))
    mode = guide.laplace_approximation([texts]).mode()
    assert mode.keys() == particle.keys()
    for site, value in particle.items():
        assert torch.equal(mode[site], value[0])


@ignore_mode
def test_a_density_takes_all_sites_and_no_others() -> None:
    posterior = Regression().laplace()
    draws = posterior.sample(2)
    assert posterior.log_prob(draws).shape == (2,)
    others = dict(draws)
    sigma = others.pop("sigma")
    with pytest.raises(ValueError, match=r"missing \['sigma'\], unknown \['tau'\]"):
        posterior.log_prob({**others, "tau": sigma})
