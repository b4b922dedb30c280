"""Priors that aren't normal: their precision at the mode, density and gradient."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_lora as pl
from pyro_lora.curvature.prior_moments import MIN_DISTANCE
from pyro_lora.curvature.structures import Structure
from tests.curvature.gauss_newton import (
    assert_same,
    brute_force,
    flatten,
    laplace,
    precision_matrix,
    unflatten,
)
from tests.infer.linear_regression import NOISE_SD, NUM_DATA, linear_regression
from tests.networks import batch, bert

pytestmark = pytest.mark.untrained

B, DF, CENTER = 0.4, 3.0, 0.05

Weight = Callable[[Tensor], Tensor]


def distance(w: Tensor) -> Tensor:
    return (w - CENTER).abs().clamp_min(MIN_DISTANCE * B)


def independent(fn: Callable[[Tensor], Any]) -> pl.priors.Prior:
    def prior(lora: pl.LiftedNetwork) -> dict[str, Tensor]:
        return {
            site: pyro.sample(site, fn(zeros).to_event(zeros.ndim))
            for site, zeros in lora.zeros().items()
        }

    return prior


PRIORS: dict[str, tuple[pl.priors.Prior, Weight]] = {
    "laplace": (
        pl.priors.laplace(B, center=CENTER),
        lambda w: 1 / (B * distance(w)),
    ),
    "student t": (
        pl.priors.student_t(DF, B, center=CENTER),
        lambda w: (DF + 1) / (DF * B**2 + (w - CENTER).square()),
    ),
    "cauchy": (
        independent(lambda zeros: dist.Cauchy(zeros + CENTER, zeros + B)),
        lambda w: 2 / (B**2 + (w - CENTER).square()),
    ),
    "soft laplace": (  # p ~ 1 / cosh((w - m) / b), by autograd
        independent(lambda zeros: dist.SoftLaplace(zeros + CENTER, zeros + B)),
        lambda w: torch.tanh(distance(w) / B) / (B * distance(w)),
    ),
}


def log_prior(prior: pl.priors.Prior, lora: pl.LiftedNetwork, w: Any) -> Tensor:
    conditioned = pyro.poutine.condition(prior, w)
    trace: Any = pyro.poutine.trace(conditioned).get_trace(lora)
    total: Tensor = trace.log_prob_sum()
    return total


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("structure", [pl.structures.Dense(), pl.structures.Diagonal()])
def test_precision_of_each_weight(name: str, structure: Structure) -> None:
    prior, weight = PRIORS[name]
    lora, texts = pl.lift(bert(3, hidden_size=8), prior=prior), batch(6, num_labels=3)
    posterior = laplace(lora, texts, structure=structure)
    tau = weight(flatten(lora.weights()))
    assert_same(flatten(posterior.prior_precision), tau, rtol=1e-6)
    assert_same(flatten(posterior.prior_mean), torch.full_like(tau, CENTER), atol=1e-12)
    if structure == pl.structures.Dense():
        expected = brute_force(lora, texts, tau)
        p = expected.fisher + torch.diag(tau)
        assert_same(precision_matrix(posterior), p, rtol=1e-6, atol=1e-7)
        log_det = torch.logdet(p / (2 * torch.pi))
        log_likelihood = -torch.nn.functional.cross_entropy(
            expected.logits, texts["labels"], reduction="sum"
        )
        at_mode = log_likelihood + log_prior(prior, lora, lora.weights())
        assert_same(posterior.log_evidence(), at_mode - log_det / 2, rtol=1e-7)


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize(
    "structure", [pl.structures.KFAC(), pl.structures.KFAC(reduce=True)]
)
def test_kronecker_structures_take_the_average_over_each_matrix(
    name: str, structure: Structure
) -> None:
    prior, weight = PRIORS[name]
    lora, texts = pl.lift(bert(2), prior=prior), batch(6)
    posterior = laplace(lora, texts, structure=structure)
    for site, w in lora.weights().items():
        mean = weight(w).mean(tuple(range(1, w.ndim)), keepdim=True)
        assert_same(posterior.prior_precision[site], mean, rtol=1e-6)
    assert_same(posterior.log_prior, log_prior(prior, lora, lora.weights()))


@pytest.mark.parametrize("name", ["laplace", "student t", "cauchy", "soft laplace"])
def test_the_gaussian_touches_the_prior_from_below(name: str) -> None:
    prior, weight = PRIORS[name]
    lora = pl.lift(torch.nn.Linear(5, 3).double(), prior=prior)
    at = {site: 2 * torch.randn_like(w) for site, w in lora.weights().items()}
    tau = {site: weight(w) for site, w in at.items()}
    highest = log_prior(prior, lora, at)
    leaves = {site: w.clone().requires_grad_() for site, w in at.items()}
    log_prior(prior, lora, leaves).backward()
    for site, leaf in leaves.items():
        assert_same(leaf.grad, -tau[site] * (at[site] - CENTER), rtol=1e-8)
    for scale in (0.01, 0.3, 3.0, 30.0):
        w = {site: x + scale * torch.randn_like(x) for site, x in at.items()}
        change = sum(
            (tau[s] * ((w[s] - CENTER) ** 2 - (at[s] - CENTER) ** 2)).sum() for s in at
        )
        assert log_prior(prior, lora, w) >= highest - 0.5 * change


def test_a_prior_at_its_centre_has_a_finite_precision() -> None:
    network = bert(2, init_lora_weights=True)
    with torch.no_grad():  # LoRA's B before training
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    lora = pl.lift(network, prior=pl.priors.laplace(B))
    posterior = laplace(lora, batch(5), structure=pl.structures.Diagonal())
    for site, tau in posterior.prior_precision.items():
        if site.endswith(".B"):
            assert_same(tau, torch.full_like(tau, 1 / (MIN_DISTANCE * B**2)))
    assert posterior.log_evidence().isfinite()


def test_the_users_scale_of_a_prior_is_kept() -> None:
    lora, texts = pl.lift(bert(2), prior=pl.priors.student_t(DF, B)), batch(5)
    expected = laplace(lora, texts, structure=pl.structures.Diagonal())
    lora = lora.with_prior(pyro.poutine.scale(lora.prior, scale=0.25))
    posterior = laplace(lora, texts, structure=pl.structures.Diagonal())
    for site, tau in expected.prior_precision.items():
        assert_same(posterior.prior_precision[site], tau / 4)
    assert_same(posterior.log_prior, expected.log_prior / 4)


# A previous posterior as the prior.


@pytest.mark.parametrize("structure", [pl.structures.KFAC(), pl.structures.Diagonal()])
@pytest.mark.parametrize(
    "new", [pl.structures.Dense(), pl.structures.Diagonal(), pl.structures.KFAC()]
)
def test_a_previous_posterior_as_the_prior(
    structure: Structure, new: Structure
) -> None:
    lora, texts = pl.lift(bert(2, hidden_size=8, bias="lora_only")), batch(6)
    before = laplace(lora, batch(9), structure=structure)
    mode = {s: w + 0.1 * torch.randn_like(w) for s, w in before.mode().items()}
    lora = lora.with_prior(pl.priors.from_posterior(before))
    lora.load(mode)
    is_whole = structure == pl.structures.Diagonal()
    with nullcontext() if is_whole else pytest.warns(UserWarning, match="correlations"):
        posterior = laplace(lora, texts, structure=new)
    start = 0
    diagonal = precision_matrix(before).diagonal()
    for site, w in mode.items():
        tau = diagonal[start : start + w.numel()].reshape(w.shape)
        start += w.numel()
        if new == pl.structures.KFAC():
            tau = tau.mean(tuple(range(1, w.ndim)), keepdim=True)
        assert_same(posterior.prior_precision[site], tau)
        assert_same(posterior.prior_mean[site], before.mode()[site])
    expected = before.log_prob({s: w[None] for s, w in mode.items()})[0]
    assert_same(posterior.log_prior, expected)


@pytest.mark.parametrize("first", [pl.structures.KFAC(), pl.structures.Diagonal()])
def test_learning_batch_after_batch(first: Structure) -> None:
    toy = linear_regression(orthogonal=False)
    before = toy.laplace(structure=first)
    toy = replace(toy, lora=toy.lora.with_prior(pl.priors.from_posterior(before)))
    if first == pl.structures.KFAC():
        said = r"'base\.weight'\].* correlations.*diagonal.*Diagonal\(\).*SVGD.*SVI"
        with pytest.warns(UserWarning, match=said) as seen:
            toy.laplace(structure=pl.structures.Dense())
        assert len(seen) == 1
        return
    # The same data again, under N(mode, diag of the precision)
    tau = toy.precision.diagonal()
    design, center = toy.design, toy.mode
    precision = tau.diag() + design.mT @ design / NOISE_SD**2
    residual = toy.y - design @ center
    shift = torch.linalg.solve(precision, design.mT @ residual / NOISE_SD**2)
    covariance = design @ (design / tau).mT
    covariance += NOISE_SD**2 * torch.eye(NUM_DATA).double()
    evidence = dist.MultivariateNormal(design @ center, covariance).log_prob(toy.y)
    start = toy.lora.init_to(unflatten(center + shift, toy.lora.weights()))
    for structure in (pl.structures.Dense(), pl.structures.Exact()):
        guide = pl.AutoLaplace(toy.model, init_loc_fn=start, structure=structure)
        after = guide.laplace_approximation(toy.batches)
        assert_same(flatten(after.variance()), precision.inverse().diagonal())
        assert_same(after.log_evidence(), evidence)


@pytest.mark.parametrize("pair", [(0, 1), (3, 17), None])
def test_a_correlation_of_two_weights_is_said(pair: tuple[int, int] | None) -> None:
    def prior(lora: pl.LiftedNetwork) -> dict[str, Tensor]:
        weights = {}
        for site, zeros in lora.zeros().items():
            covariance = torch.eye(zeros.shape[-1]).double()
            if pair is not None and site == "head.classifier.weight":
                i, j = pair
                covariance[i, j] = covariance[j, i] = -0.1
            fn = dist.MultivariateNormal(zeros, covariance)
            weights[site] = pyro.sample(site, fn.to_event(zeros.ndim - 1))
        return weights

    # At the prior's mean, where it has no gradient
    lora = pl.lift(bert(2, hidden_size=24), prior=prior)
    lora.load(lora.zeros())
    said = r"The prior of \['head\.classifier\.weight'\] has correlations"
    with nullcontext() if pair is None else pytest.warns(UserWarning, match=said):
        laplace(lora, batch(5), structure=pl.structures.Diagonal())


def test_a_subclass_with_a_density_of_its_own_has_its_own_precision() -> None:
    class Tempered(dist.Normal):
        def log_prob(self, value: Tensor) -> Tensor:
            return 0.1 * super().log_prob(value)

    lora, texts = pl.lift(bert(2)), batch(5)
    fits = []
    for prior in (
        independent(lambda zeros: Tempered(zeros + CENTER, zeros + B)),
        pyro.poutine.scale(pl.priors.normal(B, center=CENTER), scale=0.1),
    ):
        lora = lora.with_prior(prior)
        fits.append(laplace(lora, texts, structure=pl.structures.Diagonal()))
    tempered, scaled = fits
    for site, tau in scaled.prior_precision.items():
        assert_same(tempered.prior_precision[site], tau)
    assert_same(tempered.log_evidence(), scaled.log_evidence())


def test_previous_posteriors_whose_sites_are_dependent() -> None:
    lora, texts = pl.lift(bert(2, hidden_size=8)), batch(6)
    dense = laplace(lora, batch(9), structure=pl.structures.Dense())
    both = pl.MixturePosterior([laplace(lora, batch(9))] * 2)
    lora = lora.with_prior(pl.priors.from_posterior(dense))
    with pytest.raises(ValueError, match=r"depends on the site .*Diagonal\(\).*SVGD"):
        laplace(lora, texts)
    lora = lora.with_prior(pl.priors.from_posterior(both))
    with pytest.raises(ValueError, match=r"SiteMixture, whose weights are depend"):
        laplace(lora, texts)
