"""The Laplace posterior against closed forms and brute force."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_lora as pl
from pyro_lora.curvature.gaussian_logits import class_log_probs
from pyro_lora.curvature.structures import Structure
from tests.curvature.gauss_newton import (
    assert_same,
    brute_force,
    flatten,
    laplace,
    precision_matrix,
    split,
)
from tests.infer.linear_regression import linear_regression
from tests.networks import batch, bert, inputs, llama, particles

pytestmark = pytest.mark.untrained

STRUCTURES = [
    pl.structures.KFAC(),
    pl.structures.KFAC(reduce=True),
    pl.structures.Diagonal(),
    pl.structures.Dense(),
]


# Against closed forms.


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("seed", range(3))
def test_linear_regression_is_exact(structure: Structure, seed: int) -> None:
    torch.manual_seed(seed)
    task = linear_regression(orthogonal=structure != pl.structures.Dense())
    posterior = task.laplace(structure=structure)
    assert_same(posterior.log_evidence(), task.log_evidence)
    assert_same(precision_matrix(posterior), task.precision)
    assert_same(flatten(posterior.mode()), task.mode)
    covariance = torch.linalg.inv(task.precision)
    assert_same(flatten(posterior.variance()), covariance.diag())
    x = torch.randn(6, 3, dtype=torch.float64)
    predicted = posterior.linearized({"x": x})
    design = torch.cat([x, torch.ones(6, 1).double()], 1)
    assert_same(predicted.mean, (design @ task.mode)[:, None])
    variance = torch.einsum("bi,ij,bj->b", design, covariance, design)
    assert_same(predicted.covariance_matrix, variance[:, None, None])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_evidence_finds_the_best_prior_of_linear_regression(
    structure: Structure,
) -> None:
    # The mode moves with the prior, which Laplace at a given mode leaves out. Compare
    # at the same mode: evidence of each prior, the mode's density included.
    task = linear_regression()
    posterior = task.laplace(structure=structure)
    best = posterior.optimize_prior()
    for factor in (0.97, 1.03):
        tau = {site: factor * x for site, x in best.prior_precision.items()}
        assert posterior.with_prior_precision(tau).log_evidence() < best.log_evidence()


@pytest.mark.parametrize("num_labels", [2, 3])
@pytest.mark.parametrize("seed", range(2))
def test_dense_is_brute_force(num_labels: int, seed: int) -> None:
    torch.manual_seed(seed)
    lora = pl.lift(bert(num_labels), prior=pl.priors.normal(scale=0.7))
    texts = batch(7, num_labels=num_labels)
    exact = brute_force(lora, texts, 1 / 0.49)
    posterior = laplace(lora, texts, 3, structure=pl.structures.Dense())
    assert_same(posterior.log_evidence(), exact.log_evidence)
    new = batch(4, num_labels=num_labels)
    new_exact = brute_force(lora, new, 1 / 0.49)
    predicted = posterior.linearized(new)
    expected = new_exact.logits - new_exact.logits.mean(1, keepdim=True)
    assert_same(predicted.mean, expected)
    expected = exact.logit_covariance(new_exact.jacobian)
    assert_same(predicted.covariance_matrix, expected)
    assert_same(flatten(posterior.variance()), exact.covariance.diag())
    eigenvalues = torch.linalg.eigvalsh(exact.fisher @ exact.covariance)
    effective = posterior.gaussian.effective_parameters()
    assert_same(effective, (exact.fisher @ exact.covariance).trace())
    assert 0 < float(effective) < len(eigenvalues)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_evidence_and_linearised_covariance_follow_from_the_precision(
    structure: Structure,
) -> None:
    lora = pl.lift(bert(3), prior=pl.priors.normal(scale=0.7))
    texts = batch(7, num_labels=3)
    posterior = laplace(lora, texts, 3, structure=structure)
    exact = brute_force(lora, texts, 1 / 0.49)
    p = precision_matrix(posterior)
    size = len(p)
    log_q_at_mode = 0.5 * (torch.logdet(p) - size * math.log(2 * math.pi))
    log_joint = posterior.log_likelihood + posterior.log_prior
    assert_same(posterior.log_evidence(), log_joint - log_q_at_mode)
    j = exact.jacobian - exact.jacobian.mean(1, keepdim=True)
    expected = j @ torch.linalg.inv(p) @ j.mT
    assert_same(posterior.linearized(texts).covariance_matrix, expected)


def test_linearised_bernoulli_is_two_classes() -> None:
    network = bert(1)
    lora, texts = pl.lift(network), batch(6)

    def model(labels: Tensor | None = None, **texts: Tensor) -> Tensor:
        logits = lora()(**texts).logits[..., 0]
        with pyro.plate("data", 6, subsample=logits):
            obs = None if labels is None else labels.double()
            return pyro.sample("y", dist.Bernoulli(logits=logits), obs=obs)

    def two_classes(labels: Tensor | None = None, **texts: Tensor) -> Tensor:
        logits = lora()(**texts).logits[..., 0]
        logits = torch.stack([-logits / 2, logits / 2], -1)
        with pyro.plate("data", 6, subsample=logits):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    one, two = (
        pl.AutoLaplace(m, init_loc_fn=lora.init_to_adapter()).laplace_approximation(
            split(texts, 4)
        )
        for m in (model, two_classes)
    )
    assert_same(one.log_evidence(), two.log_evidence())
    assert_same(flatten(one.variance()), flatten(two.variance()))
    gaussian, expected = one.linearized(texts), two.linearized(inputs(texts))
    assert_same(gaussian.mean, expected.mean)
    assert_same(gaussian.covariance_matrix, expected.covariance_matrix)


def test_linearised_needs_one_outcome_a_datum() -> None:
    lora, texts = pl.lift(bert(2)), batch(4)

    def model(y: Tensor | None = None, **texts: Tensor) -> Tensor:
        logits = lora()(**texts).logits
        with pyro.plate("data", 4, subsample=logits):
            likelihood = dist.Bernoulli(logits=logits).to_event(1)
            return pyro.sample("y", likelihood, obs=y)

    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
    one = {**inputs(texts), "y": torch.zeros(4, 2).double()}
    posterior = guide.laplace_approximation([one])
    with pytest.raises(ValueError, match=r"'y'.*one outcome a datum.*tokens='last'"):
        posterior.linearized(one)


# Density, draws and variances.


@pytest.mark.parametrize("structure", STRUCTURES)
def test_density_draws_and_variances_agree(structure: Structure) -> None:
    num_samples = 20_000
    lora = pl.lift(bert(3, num_layers=1, hidden_size=8))
    posterior = laplace(lora, batch(9, num_labels=3), structure=structure)
    posterior = posterior.with_prior_precision(0.3)
    p, mode = precision_matrix(posterior), flatten(posterior.mode())
    covariance = torch.linalg.inv(p)
    assert_same(flatten(posterior.variance()), covariance.diag())
    q = dist.MultivariateNormal(mode, precision_matrix=p)
    draws = particles(lora, 5)
    flat = torch.cat([value.flatten(1) for value in draws.values()], 1)
    assert_same(posterior.log_prob(draws), q.log_prob(flat))
    draws = posterior.sample(num_samples)
    centred = torch.cat([value.flatten(1) for value in draws.values()], 1) - mode
    # Along random directions: means, and variances with error sqrt(2 / S) each.
    directions = torch.randn(20, len(mode), dtype=torch.float64)
    sd = (directions @ covariance * directions).sum(1).sqrt()
    along = centred @ directions.mT / sd
    assert (along.mean(0).abs() < 4.5 / num_samples**0.5).all()
    assert ((along.square().mean(0) - 1).abs() < 4.5 * (2 / num_samples) ** 0.5).all()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_leading_dims_of_the_density(structure: Structure) -> None:
    lora = pl.lift(bert(3))
    posterior = laplace(lora, batch(5, num_labels=3), structure=structure)
    many = particles(lora, 4, 2)
    log_prob = posterior.log_prob(many)
    assert log_prob.shape == (4, 2)
    one = {site: value[3, 1] for site, value in many.items()}
    assert_same(posterior.log_prob(one), log_prob[3, 1])


def test_gradients_need_not_be_on() -> None:
    lora, texts = pl.lift(bert(3)), batch(num_labels=3)
    posterior = laplace(lora, texts)
    expected = posterior.linearized(inputs(texts))
    with torch.no_grad():
        again, logits = laplace(lora, texts), posterior.linearized(inputs(texts))
    assert_same(again.log_evidence(), posterior.log_evidence())
    assert_same(logits.mean, expected.mean)
    assert_same(logits.covariance_matrix, expected.covariance_matrix)


def test_mode_is_a_copy() -> None:
    lora = pl.lift(bert(2))
    posterior = laplace(lora, batch(5))
    for value in posterior.mode().values():
        value.zero_()
    assert flatten(posterior.mode()).abs().sum() > 0
    assert_same(flatten(posterior.mean()), flatten(lora.weights()))


def test_llama_with_a_trained_head_end_to_end() -> None:
    lora, texts = pl.lift(llama(2)), batch(8, padding="left")
    posterior = laplace(lora, texts, 3).optimize_prior(per="layer")
    logits = posterior.linearized(inputs(texts))
    assert logits.mean.shape == (8, 2)
    assert torch.isfinite(class_log_probs(logits)).all()
