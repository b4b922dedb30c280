"""Ordered classes, and choices that aren't there, against their definitions."""

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import SGD
from torch import Tensor
from torch.testing import assert_close

import pyro_lora as pl
from tests import networks
from tests.curvature.gauss_newton import jacobian
from tests.predict import models

CUTPOINTS = torch.tensor([-1.5, -0.2, 0.9], dtype=torch.float64)
PRESENT = torch.tensor([True, True, False, True])
NODES, NODE_WEIGHTS = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(100))


def ordinal() -> tuple[Any, Any, dict[str, Tensor]]:
    lora, _ = models.classifier(1, network=networks.bert(1, num_layers=1))

    def model(labels: Tensor | None = None, **inputs: Tensor) -> None:
        f = lora()(**inputs).logits[..., 0]
        with pyro.plate("data", 5, subsample=inputs["input_ids"]):
            pyro.sample("y", dist.OrderedLogistic(f, CUTPOINTS), obs=labels)

    return lora, model, networks.batch(5, num_labels=4)


def test_ordered_classes_are_integrated_over_their_predictor() -> None:
    lora, model, batch = ordinal()
    posterior = models.laplace(lora, model, [batch], pl.structures.Dense())
    outputs, j = jacobian(lora, batch)  # (N, 1), (N, 1, D)
    gaussian: Any = posterior.gaussian
    precision = gaussian.fisher + torch.eye(j.shape[-1]).double() / 0.5**2
    variance = torch.einsum("nd,de,ne->n", j[:, 0], precision.inverse(), j[:, 0])
    found = posterior.linearized(batch)
    assert_close(found.mean, outputs, rtol=0, atol=1e-10)
    assert_close(found.covariance_matrix[:, 0, 0], variance, rtol=1e-8, atol=1e-10)
    predictor = outputs[:, 0, None] + variance.sqrt()[:, None] * NODES
    p = dist.OrderedLogistic(predictor, CUTPOINTS).probs  # (N, nodes, C)
    mass = NODE_WEIGHTS / NODE_WEIGHTS.sum()
    expected = torch.einsum("nkc,k->nc", p, mass)
    prediction = pl.predict(posterior, [batch], model=model, method="linearized")
    assert_close(prediction.probs, expected, rtol=0, atol=1e-8)
    entropy = torch.special.entr(p).sum(-1) @ mass
    assert_close(prediction.aleatoric_entropy, entropy, rtol=0, atol=1e-7)
    rough = pl.predict(
        posterior,
        [batch],
        model=model,
        method="linearized",
        integral=pl.integrals.probit,
    )
    assert (rough.probs - expected).abs().max() < 0.02


@pytest.mark.parametrize("sd", [0.3, 2.0, 30.0])
def test_ordered_classes_of_two_are_a_bernoulli(sd: float) -> None:
    mean = torch.tensor([[-3.0], [0.4]], dtype=torch.float64)
    one = torch.full((2, 1, 1), sd**2, dtype=torch.float64)
    ordered = pl.integrals.GaussianLogits(
        mean, one, cutpoints=torch.zeros(2, 1).double()
    )
    half = torch.tensor([-0.5, 0.5], dtype=torch.float64)
    binary = pl.integrals.GaussianLogits(mean * half, one * torch.outer(half, half))
    for integral in (pl.integrals.class_log_probs, pl.integrals.probit):
        assert_close(integral(ordered), integral(binary), rtol=0, atol=1e-8)


def test_draws_of_ordered_classes() -> None:
    lora, model, batch = ordinal()
    posterior = models.laplace(lora, model, [batch])
    tree = pl.to_datatree(posterior, batches=[batch], num_samples=400)
    assert tree.log_likelihood.attrs["method"] == "linearized"
    exact = pl.predict(
        posterior,
        [batch],
        model=model,
        method="linearized",
        keep_draws=True,
        num_samples=400,
    )
    draws = exact.draw_log_probs.exp()
    bound = 5 * draws.std(0) / 20 + 1e-6
    assert ((draws.mean(0) - exact.probs).abs() < bound).all()
    chosen = exact.probs.gather(1, batch["labels"][:, None])[:, 0].numpy()
    found = np.exp(tree.log_likelihood["y"].values[0])
    bound = 5 * found.std(0) / 20 + 1e-6
    assert (np.abs(found.mean(0) - chosen) < bound).all()
    tuned = posterior.optimize_prior(objective="nll", batches=[batch])
    assert all((tau > 0).all() for tau in tuned.prior_precision.values())


def padded_choices(num_data: int = 6) -> tuple[Any, Any, Any, dict[str, Tensor]]:
    """A model of four choices, the third not there, and one of the three."""
    lora, _ = models.classifier(4, network=networks.bert(4, num_layers=1))

    def model_of(left_out: bool) -> Any:
        def model(labels: Tensor | None = None, **inputs: Tensor) -> None:
            f = lora()(**inputs).logits
            if left_out:
                f = f[..., PRESENT]
            else:
                f = f.masked_fill(~PRESENT, -torch.inf)
            with pyro.plate("data", num_data, subsample=inputs["input_ids"]):
                pyro.sample("y", dist.Categorical(logits=f), obs=labels)

        return model

    batch = networks.batch(num_data)
    batch["labels"] = torch.arange(num_data) % 3
    return lora, model_of(False), model_of(True), batch


def of_four(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "labels": PRESENT.nonzero()[:, 0][batch["labels"]]}


@pytest.mark.parametrize("structure", [pl.structures.Dense(), pl.structures.KFAC()])
@pytest.mark.parametrize("fisher", ["exact", "empirical", "mc"])
def test_a_fit_is_that_of_the_choices_that_are_there(
    structure: Any, fisher: Any
) -> None:
    lora, padded, alone, batch = padded_choices()
    posteriors = []
    for model, data in [(padded, of_four(batch)), (alone, batch)]:
        guide = pl.AutoLaplace(
            model,
            init_loc_fn=lora.init_to_adapter(),
            structure=structure,
            fisher=fisher,
            num_fisher_samples=20,
        )
        torch.manual_seed(0)
        with pytest.warns(UserWarning, match="aren't a mode"):
            posteriors.append(guide.laplace_approximation([data]))
    evidence, expected = (p.log_evidence() for p in posteriors)
    if fisher != "mc":
        assert_close(evidence, expected, rtol=1e-9, atol=1e-9)
    assert evidence.isfinite()
    assert_close(evidence, expected, rtol=0.1, atol=0.0)


def assert_padded(found: Any, expected: Any) -> None:
    """Predictions of four choices and three are the same."""
    assert_close(found.probs[:, PRESENT], expected.probs, rtol=0, atol=1e-10)
    assert (found.probs[:, ~PRESENT] == 0).all()
    for name in ("aleatoric_entropy", "total_entropy"):
        assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-9)
    metrics, of_three = found.metrics(), expected.metrics()
    for name in ("accuracy", "nll", "ece", "brier", "aurc"):
        assert metrics[name] == pytest.approx(of_three[name], abs=1e-9)
    temperature = pl.fit_temperature(expected)
    assert pl.fit_temperature(found) == pytest.approx(temperature, rel=1e-9)


@pytest.mark.parametrize(
    "integral", [pl.integrals.class_log_probs, pl.integrals.probit]
)
def test_linearised_choices_that_are_there(integral: Any) -> None:
    lora, padded, alone, batch = padded_choices()
    posterior = models.laplace(lora, alone, [batch])
    found, expected = (
        pl.predict(
            posterior, [data], model=model, method="linearized", integral=integral
        )
        for model, data in [(padded, of_four(batch)), (alone, batch)]
    )
    assert_padded(found, expected)


def test_sampled_choices_that_are_there() -> None:
    lora, padded, alone, batch = padded_choices()
    posterior = models.particles(lora, alone)
    found, expected = (
        pl.predict(posterior, [data], model=model)
        for model, data in [(padded, of_four(batch)), (alone, batch)]
    )
    assert_padded(found, expected)


def test_each_datum_may_have_choices_of_its_own() -> None:
    lora, _ = models.classifier(4, network=networks.bert(4, num_layers=1))
    batch = networks.batch(4)
    there = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 1, 0, 0], [0, 1, 1, 1]]) > 0

    def model(there: Tensor, labels: Tensor | None = None, **inputs: Tensor) -> None:
        f = lora()(**inputs).logits.masked_fill(~there, -torch.inf)
        with pyro.plate("data", 4, subsample=there):
            pyro.sample("y", dist.Categorical(logits=f), obs=labels)

    batch["labels"] = torch.tensor([0, 2, 1, 3])
    batch["there"] = there
    posterior = models.laplace(lora, model, [batch])
    found = pl.predict(posterior, [batch], model=model, method="linearized")
    joint = posterior.linearized(
        {n: x for n, x in batch.items() if n != "labels"}, joint=True
    ).marginals()
    single = posterior.linearized(batch)
    assert_close(joint.covariance_matrix, single.covariance_matrix)
    for row in range(4):
        one = {name: x[row : row + 1] for name, x in batch.items()}
        on = there[row]

        def alone(
            there: Tensor, labels: Tensor | None = None, on: Tensor = on, **inputs: Any
        ) -> None:
            f = lora()(**inputs).logits[..., on]
            with pyro.plate("data", 4, subsample=there):
                pyro.sample("y", dist.Categorical(logits=f), obs=labels)

        if on.sum() == 1:
            assert found.probs[row].tolist() == on.double().tolist()
            assert found.aleatoric_entropy[row] == 0
            continue
        del one["labels"]
        expected = pl.predict(posterior, [one], model=alone, method="linearized")
        assert_close(found.probs[row][on], expected.probs[0], rtol=0, atol=1e-9)


def test_function_space_compares_the_choices_that_are_there() -> None:
    lora, padded, alone, batch = padded_choices()
    start = models.jittered(lora, 3)
    after = []
    for model, data in [(padded, of_four(batch)), (alone, batch)]:
        svgd = pl.SVGD(
            model,
            pl.kernels.RBF(space="function"),
            SGD({"lr": 0.01}),
            3,
            repulsion=2.0,
            init_loc_fn=lambda site: start[site["name"]][site["infer"]["particle"]],
        )
        svgd.step(**data)
        after.append(svgd.get_named_particles())
    for site, value in after[0].items():
        assert_close(value, after[1][site], rtol=0, atol=1e-10)
