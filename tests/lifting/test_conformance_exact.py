"""Stock Pyro finds the exact posterior of a lifted network where it is known.

A linear layer with LoRA whose A is conditioned on: the output is linear in B and in the
trained bias, so that with normal priors and noise their posterior is normal.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import HMC, MCMC, NUTS, SVI, Importance, Predictive, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGuideList,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.infer.importance import vectorized_importance_weights
from pyro.infer.reparam import LocScaleReparam
from pyro.ops.stats import effective_sample_size
from pyro.optim import ClippedAdam
from torch import Tensor, nn
from torch.testing import assert_close

import pyro_lora as pl
from tests.lifting.conformance import ELBOS, GUIDES, conformance_settings
from tests.networks import adapted

N, I, R, O = 12, 4, 2, 2
NOISE, PRIOR_SCALE = 1.0, 0.5


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    with conformance_settings():
        yield


class Regression:
    def __init__(self) -> None:
        self.network = adapted(
            nn.Sequential(OrderedDict(linear=nn.Linear(I, O))),
            r=R,
            lora_alpha=2 * R,
            target_modules=["linear"],
            bias="lora_only",
        )
        self.lora = pl.lift(self.network, prior=pl.priors.normal(PRIOR_SCALE))
        self.x, self.y = torch.randn(N, I) + 1, torch.randn(N, O) + 1
        self.a, self.b, self.bias = (
            next(site for site in self.lora.sites if site.endswith(role))
            for role in (".A", ".B", ".bias")
        )
        self.a_value = self.lora.weights()[self.a]
        self.model = poutine.condition(self.free_model, {self.a: self.a_value})

    def free_model(self) -> None:
        mean = self.lora()(self.x)  # (..., N, O)
        with pyro.plate("data", N):
            pyro.sample("y", dist.Normal(mean, NOISE).to_event(1), obs=self.y)

    @torch.no_grad()
    def regression(self) -> tuple[Tensor, Tensor]:
        """Design (N, R + 1) and targets (N, O) of the regression on (B^T, bias)."""
        base = self.network.base_model.model.linear.base_layer
        scaling = 2.0  # lora_alpha / r
        features = scaling * self.x @ self.a_value[0].T
        design = torch.cat([features, torch.ones(N, 1)], 1)
        return design, self.y - self.x @ base.weight.T

    def posterior(self) -> tuple[Tensor, Tensor]:
        """Mean (R + 1, O), and the precision of each of its columns."""
        design, y = self.regression()
        precision = design.T @ design / NOISE**2 + torch.eye(R + 1) / PRIOR_SCALE**2
        return torch.linalg.solve(precision, design.T @ y / NOISE**2), precision

    def log_evidence(self) -> Tensor:
        """Log density of y, and of A since it counts as data: log p(y, A)."""
        design, y = self.regression()
        covariance = NOISE**2 * torch.eye(N) + PRIOR_SCALE**2 * design @ design.T
        marginal = torch.distributions.MultivariateNormal(torch.zeros(N), covariance)
        prior = torch.distributions.Normal(0.0, PRIOR_SCALE)
        return marginal.log_prob(y.T).sum() + prior.log_prob(self.a_value).sum()

    def columns(self, weights: dict[str, Tensor]) -> Tensor:
        """Draws of B and the bias as (S, R + 1, O)."""
        b = weights[self.b].reshape(-1, O, R)
        return torch.cat([b.mT, weights[self.bias].reshape(-1, 1, O)], 1)


def guide_of(name: str, toy: Regression) -> Any:
    start = {"init_loc_fn": toy.lora.init_to_adapter()}
    if name == "AutoIAFNormal":
        return AutoIAFNormal(toy.model, hidden_dim=[20])
    if name == "AutoLowRankMultivariateNormal":
        return AutoLowRankMultivariateNormal(toy.model, rank=4, **start)
    if name == "AutoGuideList":
        guides = AutoGuideList(toy.model)
        guides.append(AutoNormal(poutine.block(toy.model, hide=[toy.bias]), **start))
        guides.append(AutoDelta(poutine.block(toy.model, hide=[toy.b]), **start))
        return guides
    return GUIDES[name](toy.model, **start)


# The spread that each family finds: of the posterior's marginals, of its conditionals
# (the best factorised normal has precision diag(P)), or none.
SPREAD = {
    "AutoDelta": "none",
    "AutoNormal": "conditional",
    "AutoDiagonalNormal": "conditional",
    "AutoMultivariateNormal": "marginal",
    "AutoLowRankMultivariateNormal": "marginal",
    "AutoIAFNormal": "marginal",
    "AutoGuideList": "conditional",
    "AutoStructured": "marginal",
    "AutoNormalMessenger": "conditional",
}


LONG = ("AutoStructured", "AutoIAFNormal", "AutoLowRankMultivariateNormal")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in LONG else []) for n in GUIDES],
)
def test_svi_finds_the_exact_posterior(name: str) -> None:
    toy = Regression()
    guide = guide_of(name, toy)
    elbo = Trace_ELBO(32, vectorize_particles=True, max_plate_nesting=1)
    optimizer = ClippedAdam({"lr": 0.1, "lrd": 1e-2 ** (1 / 200), "betas": (0.9, 0.99)})
    svi = SVI(toy.model, guide, optimizer, elbo)
    for _ in range(200):
        svi.step()
    draws = Predictive(guide, num_samples=20_000, parallel=True)()
    columns = toy.columns(draws).detach()
    mean, precision = toy.posterior()
    marginal = precision.inverse().diagonal().sqrt()[:, None]
    conditional = precision.diagonal().rsqrt()[:, None]
    expected = {
        "marginal": marginal,
        "conditional": conditional,
        "none": torch.zeros(R + 1, 1),
    }[SPREAD[name]].expand(R + 1, O)
    if name == "AutoGuideList":  # whose bias is a point
        assert torch.equal(columns.std(0)[-1], torch.zeros(O))
        expected = torch.cat([expected[:-1], torch.zeros(1, O)])
    # In the posterior's standard deviations: the standard errors of 20,000 draws are
    # 0.007 for the mean, 0.005 for the spread. Over three seeds, the gradient's noise
    # left up to 0.06 in the mean and 0.1 in the spread after 200 steps.
    assert ((columns.mean(0) - mean) / marginal).abs().max() < 0.15
    assert_close(columns.std(0), expected, rtol=0.15, atol=1e-12)


# At the exact posterior p(x, w) / q(w) is the evidence, whatever w is drawn.


def exact_guide(toy: Regression, model: Any, scale: float = 1.0) -> Any:
    """AutoMultivariateNormal at the exact posterior of the weights over ``scale``."""
    guide = AutoMultivariateNormal(model)
    guide()
    index, start = {}, 0
    for site, value in guide.median().items():
        numbers = start + torch.arange(value.numel()).reshape(value.shape)
        index[site.removesuffix("_decentered")] = numbers
        start += value.numel()
    places = toy.columns(index)[0]  # (R + 1, O), of each weight in the guide's vector
    mean, precision = toy.posterior()
    loc, covariance = torch.zeros(start), torch.zeros(start, start)
    for o in range(O):
        place = places[:, o]
        loc[place] = mean[:, o] / scale
        covariance[place[:, None], place] = precision.inverse() / scale**2
    tril = torch.linalg.cholesky(covariance)
    guide.loc.data = loc
    guide.scale = tril.diagonal()
    guide.scale_tril = tril / tril.diagonal()[:, None]
    return guide


@pytest.mark.parametrize("elbo", list(ELBOS))
def test_every_elbo_is_the_exact_evidence(elbo: str) -> None:
    toy = Regression()
    loss = ELBOS[elbo].loss(toy.model, exact_guide(toy, toy.model))
    assert_close(torch.tensor(-loss), toy.log_evidence(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("elbo", list(ELBOS))
def test_loc_scale_reparam_keeps_the_evidence(elbo: str) -> None:
    toy = Regression()
    config = {site: LocScaleReparam(0.0) for site in (toy.b, toy.bias)}
    model = poutine.reparam(toy.model, config)
    loss = ELBOS[elbo].loss(model, exact_guide(toy, model, PRIOR_SCALE))
    assert_close(torch.tensor(-loss), toy.log_evidence(), rtol=1e-10, atol=0)


def test_importance_weights_are_the_exact_evidence() -> None:
    toy = Regression()
    guide = exact_guide(toy, toy.model)
    run = Importance(toy.model, guide, num_samples=5).run()
    expected = toy.log_evidence().expand(5)
    assert_close(torch.stack(run.log_weights), expected, rtol=1e-10, atol=0)
    settings = {"num_samples": 5, "max_plate_nesting": 1}
    log_weights, _, _ = vectorized_importance_weights(toy.model, guide, **settings)
    assert_close(log_weights, expected, rtol=1e-10, atol=0)


# That it runs is seen by test_conformance_sampling.
@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["NUTS", "HMC"])
def test_monte_carlo_finds_the_exact_posterior(kernel: str) -> None:
    toy = Regression()
    start = toy.lora.init_to_adapter()
    if kernel == "NUTS":
        method = NUTS(toy.model, init_strategy=start)
    else:
        settings = {"adapt_step_size": False, "adapt_mass_matrix": False}
        settings |= {"step_size": 0.12, "num_steps": 7}
        method = HMC(toy.model, init_strategy=start, **settings)
    warmup = 50 if kernel == "NUTS" else 5
    mcmc = MCMC(method, num_samples=120, warmup_steps=warmup, disable_progbar=True)
    mcmc.run()
    columns = toy.columns(mcmc.get_samples())  # (120, R + 1, O)
    mean, precision = toy.posterior()
    deviation = precision.inverse().diagonal().sqrt()[:, None]
    effective = effective_sample_size(columns[None], chain_dim=0, sample_dim=1)
    # Draws that alternate around the mean count for more than one each: without bound,
    # or, where the sum of their correlations is noise around -1/2, for less than none.
    effective = effective.where(effective > 0, 120).clamp(max=120).min()
    assert effective > 25
    standard_error = deviation / effective.sqrt()
    assert ((columns.mean(0) - mean) / standard_error).abs().max() < 4
    # A standard deviation's relative standard error is 1 / sqrt(2 * 25) = 0.14 or less.
    assert_close(columns.std(0), deviation.expand(R + 1, O), rtol=0.5, atol=0)
