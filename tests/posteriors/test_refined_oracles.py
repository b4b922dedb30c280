"""The linearised network against other people's Gaussian processes, and NUTS.

Linearised, a network is a Gaussian process with the kernel J J' / tau. scikit-learn and
Pyro know that of zero mean: the prior is centred where the linearised network says 0.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib import gp
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import effective_sample_size
from sklearn.gaussian_process import GaussianProcessClassifier
from sklearn.gaussian_process.kernels import ConstantKernel, DotProduct
from torch import Tensor, nn
from torch.testing import assert_close

import pyro_lora as pl
from tests.curvature.gauss_newton import assert_same, flatten, laplace, unflatten
from tests.networks import batch, bert, inputs

pytestmark = [
    pytest.mark.untrained,
    pytest.mark.filterwarnings("ignore:The weights aren't a mode"),
]

NUM_DATA, NUM_NEW, NOISE_SD = 12, 5, 0.4
Outputs = Callable[[Tensor], Tensor]  # of flat weights


def at_center(output: Outputs, at: Tensor) -> tuple[Tensor, Tensor]:
    """Jacobian, and the weights nearest to these where the linearised output is 0."""
    j = torch.autograd.functional.jacobian(output, at)
    return j, at - torch.linalg.pinv(j) @ output(at)


def normal(center: dict[str, Tensor], tau: float) -> Any:
    sites = {s: dist.Normal(x, tau**-0.5).to_event(x.ndim) for s, x in center.items()}

    def prior(lora: pl.LiftedNetwork) -> dict[str, Tensor]:
        return {site: pyro.sample(site, sites[site]) for site in lora.sites}

    return prior


def classifier(tau: float) -> tuple[pl.LiftedNetwork, Any, Tensor, Tensor, Any]:
    """A network of two classes under that prior, data, and J of them and of others."""
    lora = pl.lift(bert(2))
    texts, new = batch(NUM_DATA, num_labels=2), batch(NUM_NEW, num_labels=2)
    weights = lora.weights()

    def difference(texts: Any) -> Outputs:
        def output(flat: Tensor) -> Tensor:
            with lora.bind(unflatten(flat, weights)) as net:
                logits: Tensor = net(**inputs(texts)).logits
            return logits[:, 1] - logits[:, 0]

        return output

    j, center = at_center(difference(texts), flatten(weights))
    j_new = torch.autograd.functional.jacobian(difference(new), flatten(weights))
    lora = lora.with_prior(normal(unflatten(center, weights), tau))
    offset = difference(new)(flatten(weights)) + j_new @ (center - flatten(weights))
    return lora, texts, j, j_new, (new, offset)


@pytest.mark.parametrize("tau", [1.0, 30.0])
def test_classifies_as_sklearns_gaussian_process(tau: float) -> None:
    lora, texts, j, j_new, (new, offset) = classifier(tau)
    exact = laplace(lora, texts, 5, structure=pl.structures.Exact())
    refined = exact.refine("prior")
    kernel = ConstantKernel(1 / tau) * DotProduct(0.0, "fixed")
    process = GaussianProcessClassifier(kernel, optimizer=None)
    process.fit(j.numpy(), texts["labels"].numpy())
    # Its Newton steps end where one gains 1e-10 nats, so that f is off by up to 1e-5.
    evidence = torch.tensor(process.log_marginal_likelihood_value_).double()
    assert_close(refined.log_evidence(), evidence, rtol=0, atol=1e-7)
    inside = process.base_estimator_
    at_data = refined.linearized(inputs(texts)).mean
    f = torch.as_tensor(inside.pi_).logit()
    assert_close(at_data[:, 1] - at_data[:, 0], f, rtol=0, atol=1e-5)
    cross = j @ j_new.mT / tau  # algorithm 3.2 of Rasmussen & Williams, by its factors
    half = np.linalg.solve(inside.L_, inside.W_sr_[:, None] * cross.numpy())
    variance = j_new.square().sum(1) / tau - torch.as_tensor(half).square().sum(0)
    mean = offset + cross.mT @ (texts["labels"] - torch.as_tensor(inside.pi_))
    found = refined.linearized(inputs(new))
    contrast = torch.tensor([-1.0, 1.0]).double()
    assert_close(found.mean @ contrast, mean, rtol=0, atol=1e-4)
    assert_close(
        contrast @ found.covariance_matrix @ contrast, variance, rtol=1e-4, atol=0
    )
    # At the data its mean is ours, and E[sigmoid(f)] is by five error functions there.
    probs = pl.predict(refined, [inputs(texts)]).probs
    expected = torch.as_tensor(process.predict_proba(j.numpy()))
    assert_close(probs, expected, rtol=0, atol=2e-3)


def test_leaves_out_as_sklearns_gaussian_process_without_the_datum() -> None:
    # Refitting moves the mode, too, which the Gaussian approximation does to first
    # order: the two are close where the others nearly determine it.
    lora, texts, j, _, _ = classifier(100.0)
    refined = laplace(lora, texts, 5, structure=pl.structures.Exact()).refine("prior")
    kernel = ConstantKernel(0.01) * DotProduct(0.0, "fixed")
    found = refined.leave_one_out()
    for n in range(NUM_DATA):
        kept = torch.arange(NUM_DATA) != n
        process = GaussianProcessClassifier(kernel, optimizer=None)
        process.fit(j[kept].numpy(), texts["labels"][kept].numpy())
        probs = process.predict_proba(j[n : n + 1].numpy())[0]
        expected = np.log(probs[int(texts["labels"][n])])
        assert abs(float(found[n]) - expected) < 0.03


def test_is_pyros_gaussian_process_in_regression() -> None:
    lora = pl.lift(bert(1), prior=pl.priors.normal(scale=0.7))
    texts, new = (inputs(batch(n)) for n in (NUM_DATA, NUM_NEW))
    y = torch.randn(NUM_DATA).double()
    weights = lora.weights()
    at = flatten(weights)

    def model(
        input_ids: Tensor, attention_mask: Tensor, y: Tensor | None = None
    ) -> Any:
        loc = lora()(input_ids=input_ids, attention_mask=attention_mask).logits[..., 0]
        with pyro.plate("data", NUM_DATA, subsample=input_ids):
            return pyro.sample("y", dist.Normal(loc, NOISE_SD), obs=y)

    def outputs(texts: Any) -> Outputs:
        def output(flat: Tensor) -> Tensor:
            with lora.bind(unflatten(flat, weights)) as net:
                logits: Tensor = net(**texts).logits[:, 0]
            return logits

        return output

    guide = pl.AutoLaplace(
        model, init_loc_fn=lora.init_to_adapter(), structure=pl.structures.Exact()
    )
    refined = guide.laplace_approximation([{**texts, "y": y}]).refine("prior")
    j, j_new = (
        torch.autograd.functional.jacobian(outputs(x), at) for x in (texts, new)
    )
    offset, offset_new = (
        outputs(x)(at) - jacobian @ at for x, jacobian in ((texts, j), (new, j_new))
    )
    kernel = gp.kernels.Linear(j.shape[1], variance=torch.tensor(0.49).double())
    process = gp.models.GPRegression(
        j, y - offset, kernel, noise=torch.tensor(NOISE_SD**2).double(), jitter=0.0
    )
    with torch.no_grad():
        trace: Any = poutine.trace(process.model).get_trace()
        assert_same(refined.log_evidence(), trace.log_prob_sum())
        mean, covariance = process(j_new, full_cov=True, noiseless=True)
    found: Any = refined.linearized(new, joint=True)
    assert_close(found.mean[:, 0], mean + offset_new, rtol=1e-8, atol=1e-8)
    found_covariance = found.covariance_matrix.reshape(NUM_NEW, NUM_NEW)
    assert_close(found_covariance, covariance, rtol=1e-8, atol=1e-8)


def toy() -> tuple[pl.LiftedNetwork, Tensor, Outputs]:
    """A network that isn't linear, 9 weights, and inputs."""
    network = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    lora = pl.lift(network, prior=pl.priors.normal(scale=1.0))
    x = torch.randn(20, 2).double()
    weights = lora.weights()

    def output(flat: Tensor) -> Tensor:
        with lora.bind(unflatten(flat, weights)) as net:
            found: Tensor = net(x)[:, 0]
        return found

    return lora, x, output


@pytest.mark.slow  # a minute of NUTS
@pytest.mark.parametrize(
    "likelihood",
    [lambda f: dist.Normal(f, NOISE_SD), lambda f: dist.Bernoulli(logits=3 * f)],
    ids=["normal", "bernoulli"],
)
def test_nuts_on_the_linearised_network(likelihood: Any) -> None:
    lora, x, output = toy()
    y = likelihood(output(torch.randn(9).double())).sample()
    at = flatten(lora.weights())
    j = torch.autograd.functional.jacobian(output, at)
    f = output(at).detach()

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        loc = lora()(x)[..., 0]
        with pyro.plate("data", len(x), subsample=x):
            return pyro.sample("y", likelihood(loc), obs=y)

    guide = pl.AutoLaplace(
        model, init_loc_fn=lora.init_to_adapter(), structure=pl.structures.Exact()
    )
    refined = guide.laplace_approximation([{"x": x, "y": y}]).refine("prior")

    def log_joint(w: Tensor) -> Tensor:
        density = likelihood(f + (w - at) @ j.mT).log_prob(y).sum(-1)
        return density + dist.Normal(0.0, 1.0).log_prob(w).sum(-1)

    mode = flatten(refined.mode())
    own = refined.sample(4000)
    flat = torch.cat([own[s].flatten(1) for s in lora.sites], 1)
    scales = torch.linalg.cholesky(flat.mT.cov())

    def potential(unknown: dict[str, Tensor]) -> Tensor:
        return -log_joint(mode + scales @ unknown["u"])  # whitened: a short trajectory

    kernel = NUTS(potential_fn=potential, adapt_mass_matrix=False, step_size=0.5)
    chain = MCMC(
        kernel,
        num_samples=1000,
        warmup_steps=100,
        initial_params={"u": torch.zeros(9).double()},
        disable_progbar=True,
    )
    chain.run()
    draws = mode + chain.get_samples()["u"] @ scales.mT  # (S, D)
    # The Gaussian's draws, weighted, stand for the same distribution.
    log_ratio = log_joint(flat) - refined.log_prob(own)
    share = log_ratio.softmax(0)
    for value in (lambda w: w, lambda w: (w - mode).square()):
        number = effective_sample_size(value(draws)[None], chain_dim=0, sample_dim=1)
        error = (value(draws).var(0) / number).sqrt()
        mean = share @ value(flat)
        own_error = (share.square() @ (value(flat) - mean).square()).sqrt()
        z = (value(draws).mean(0) - mean) / (error.square() + own_error.square()).sqrt()
        assert float(z.abs().max()) < 5  # standard errors
    log_evidence = log_ratio.logsumexp(0) - math.log(len(flat))
    if likelihood(f).has_rsample:  # a Normal's: Laplace's method is exact
        assert_same(log_ratio, log_ratio[:1].expand_as(log_ratio))
        assert_same(refined.log_evidence(), log_evidence)
    else:  # what it leaves out is O(1 / N): a tenth of a nat here
        standard_error = float(share.mul(len(flat)).std()) / len(flat) ** 0.5
        difference = float(refined.log_evidence() - log_evidence)
        assert abs(difference) < 0.3 + 5 * standard_error
