"""Rows projected on the span of some: exact with all of them, and measured with few."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora.curvature import dual_gaussian
from pyro_lora.curvature import structures as own_structures
from tests.curvature.gauss_newton import assert_same, flatten, laplace, split
from tests.infer.linear_regression import NOISE_SD, linear_regression
from tests.networks import batch, bert, inputs
from tests.posteriors.test_refined import (
    SMOOTH,
    Linear,
    assert_same_posterior,
    every_case,
    moved,
)
from tests.predict.test_likelihoods import CASES, Case

pytestmark = [
    pytest.mark.untrained,
    pytest.mark.filterwarnings("ignore:The weights aren't a mode"),
]


@every_case
@pytest.mark.few(6)
def test_all_rows_drawn_are_exact(case: Case) -> None:
    task = Linear(case)
    start = moved(task.lora)
    exact = task.fit(start, pl.structures.Exact())
    found = task.fit(start, pl.structures.Exact(num_inducing=100))
    assert_same_posterior(found, exact, 1e-8)
    refined: Any = [p.refine("prior") for p in (found, exact)]
    assert_same_posterior(*refined, 1e-6)
    # Two-dimensional quadratures differ with the axes that rounding chooses.
    tolerance = 2e-3 if case.num_outputs == 2 and not case.classes else 1e-6
    leave_one_out = [p.leave_one_out() for p in refined]
    assert_close(*leave_one_out, rtol=tolerance, atol=tolerance)
    near: Any = [p.refine() for p in (found, exact)]
    assert_same_posterior(*near, 1e-3)  # a search, which rounding moves
    chosen = [p.optimize_prior(per="layer") for p in (found, exact)]
    assert_same(*[p.log_evidence() for p in chosen])


def dense_twin(found: Any) -> Tensor:
    """The precision of the projected Jacobian, (D, D)."""
    gaussian = found.gaussian
    basis = torch.cat(
        [x.transpose(0, 1).flatten(1) for x in gaussian.rows.values.values()], 1
    )
    j = gaussian.coordinates.matrix @ basis  # (n, D)
    (part,) = gaussian.observations
    z = part.at_fit + (j @ (flatten(found.mode()) - flatten(gaussian.origin))).reshape(
        part.at_fit.shape
    )
    jr = torch.block_diag(*part.at(z).root).mT @ j
    tau = torch.cat(
        [
            found.prior_precision[s].expand(x.shape).flatten()
            for s, x in gaussian.loc.items()
        ]
    )
    return jr.mT @ jr + torch.diag(tau)


@pytest.mark.parametrize("name", ["categorical", "poisson", "heteroscedastic"])
@pytest.mark.parametrize("refined", [True, False])
def test_some_rows_are_exact_for_the_projected_network(
    name: str, refined: bool
) -> None:
    task = Linear(SMOOTH[name])
    found = task.fit(moved(task.lora), pl.structures.Exact(num_inducing=3))
    found = found.refine("prior") if refined else found
    found = found.with_prior_precision(
        {s: 0.5 + i for i, s in enumerate(task.lora.sites)}
    )
    precision = dense_twin(found)
    covariance = torch.linalg.inv(precision)
    assert_same(flatten(found.variance()), covariance.diagonal())
    draws = found.sample(3)
    flat = torch.cat([draws[s].flatten(1) for s in task.lora.sites], 1)
    normal = dist.MultivariateNormal(flatten(found.mode()), precision_matrix=precision)
    assert_same(found.log_prob(draws), normal.log_prob(flat))
    log_q = found.log_prob({s: x[None] for s, x in found.mode().items()})[0]
    assert_same(found.log_evidence(), found.log_likelihood + found.log_prior - log_q)


@pytest.mark.parametrize("name", ["categorical", "poisson", "heteroscedastic"])
@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("mean", [0.0, 1.5])
@pytest.mark.few(6)
def test_the_mode_fits_the_data_as_it_says(name: str, number: int, mean: float) -> None:
    def prior(lora: pl.LiftedNetwork) -> dict[str, Tensor]:
        at = {s: torch.full_like(x, mean) for s, x in lora.zeros().items()}
        return {
            s: pyro.sample(s, dist.Normal(x, 0.7).to_event(x.ndim))
            for s, x in at.items()
        }

    task = Linear(SMOOTH[name])
    task.lora = pl.lift(task.lora.network, prior=prior)
    fit = task.fit(moved(task.lora), pl.structures.Exact(num_inducing=number))
    for refined in (fit.refine("prior"), fit.refine()):
        with task.lora.bind(refined.mode()) as network:  # linear in its weights
            fn = task.case.likelihood(network(task.batch["x"]))
        log_likelihood = fn.log_prob(task.batch["y"]).sum()
        assert_same(refined.log_likelihood, log_likelihood)


@pytest.mark.parametrize("number", [1, 2])
def test_leave_one_out_is_refitting_in_the_span(number: int) -> None:
    task = linear_regression()
    structure = pl.structures.Exact(num_inducing=number)
    found: Any = task.laplace(structure=structure).refine("prior")
    assert found.gaussian.coordinates.lost > 0.01
    flat = [x.transpose(0, 1).flatten(1) for x in found.gaussian.rows.values.values()]
    basis = torch.cat(flat, 1)  # orthonormal under the prior
    design = task.design @ basis.mT @ basis * task.prior_sd**2
    tau = torch.eye(design.shape[1]).double() / task.prior_sd**2
    for n in range(len(task.x)):
        kept = torch.arange(len(task.x)) != n
        inside, y = design[kept], task.y[kept]
        precision = inside.mT @ inside / NOISE_SD**2 + tau
        mean = torch.linalg.solve(precision, inside.mT @ y / NOISE_SD**2)
        row = task.design[n]  # the network's own, as predictions have it
        variance = row @ torch.linalg.solve(precision, row) + NOISE_SD**2
        expected = dist.Normal(row @ mean, variance.sqrt()).log_prob(task.y[n])
        assert_same(found.leave_one_out()[n], expected)


def transformer(num_labels: int = 3) -> tuple[pl.LiftedNetwork, Any, Any]:
    lora = pl.lift(bert(num_labels), prior=pl.priors.normal(scale=0.7))
    return lora, batch(12, num_labels=num_labels), batch(4, num_labels=num_labels)


def test_it_comes_nearer_with_more_rows() -> None:
    lora, texts, new = transformer()
    exact = laplace(lora, texts, 5, structure=pl.structures.Exact()).refine("prior")
    expected = exact.linearized(inputs(new))
    errors = []
    for number in (1, 8, 24):
        each = []
        for seed in range(2):
            pyro.set_rng_seed(seed)
            structure = pl.structures.Exact(num_inducing=number)
            found = laplace(lora, texts, 5, structure=structure).refine("prior")
            logits = found.linearized(inputs(new))
            differences = (
                logits.mean - expected.mean,
                logits.covariance_matrix - expected.covariance_matrix,
                found.log_evidence() - exact.log_evidence(),
            )
            each.append([float(x.abs().max()) for x in differences])
        errors.append([sum(x) / len(each) for x in zip(*each, strict=True)])
    for few, more in pairwise(errors):
        assert all(b < a for a, b in zip(few, more, strict=True))
    assert all(x < 1e-6 for x in errors[-1])


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 24), st.integers(0, 5))
def test_the_rows_lost_are_those_of_the_dense_projection(
    number: int, seed: int
) -> None:
    task = Linear(CASES["categorical"])
    exact: Any = task.fit(task.lora.weights(), pl.structures.Exact())
    pyro.set_rng_seed(seed)
    found: Any = task.fit(task.lora.weights(), pl.structures.Exact(num_inducing=number))
    j, basis = (
        torch.cat([x.transpose(0, 1).flatten(1) for x in g.rows.values.values()], 1)
        for g in (exact.gaussian, found.gaussian)
    )
    projection = torch.linalg.pinv(basis) @ basis
    outside = 0.49 * (j - j @ projection).square().sum(1)
    coordinates = found.gaussian.coordinates
    assert_close(coordinates.residual, outside, rtol=1e-8, atol=1e-8)
    total = 0.49 * j.square().sum()
    assert abs(coordinates.lost - float(outside.sum() / total)) < 1e-9


@pytest.mark.parametrize("number", [1, 3, 6, 12])
@pytest.mark.few(2)
def test_the_log_determinant_is_within_its_bound(number: int) -> None:
    lora = pl.lift(bert(2), prior=pl.priors.normal(scale=0.7))
    texts = batch(12, num_labels=2)
    exact: Any = laplace(lora, texts, 5, structure=pl.structures.Exact())
    structure = pl.structures.Exact(num_inducing=number)
    found: Any = laplace(lora, texts, 5, structure=structure)
    w = exact.gaussian.roots.blocks[0][:, 0, 0].square()
    order = [p.gaussian.observations[0].value for p in (exact, found)]
    assert torch.equal(*order)
    gap = torch.log1p(w * found.gaussian.coordinates.residual).sum()
    tau = exact.prior_precision
    missing = exact.gaussian.log_det(tau) - found.gaussian.log_det(tau)
    assert -1e-9 < float(missing) < float(gap) + 1e-9
    assert number == 12 or float(missing) > 0.5 * float(gap) / 12


def test_the_empirical_fisher_is_projected_too() -> None:
    lora, texts, _ = transformer()
    fits = [
        laplace(lora, texts, 5, structure=structure, fisher="empirical")
        for structure in (pl.structures.Exact(num_inducing=12), pl.structures.Dense())
    ]
    assert_same_posterior(*fits, 1e-8)


@pytest.mark.parametrize("fisher", ["exact", "mc"])
@pytest.mark.parametrize("masked", [False, True])
def test_too_many_rows_are_refused_before_they_are_made(
    fisher: Any, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = bert(3)
    lora, texts = pl.lift(network), batch(12, num_labels=3)
    seen: list[int] = []
    network.register_forward_hook(lambda *_: seen.append(1))

    def model(input_ids: Tensor, attention_mask: Tensor, labels: Any = None) -> None:
        logits = lora()(input_ids=input_ids, attention_mask=attention_mask).logits
        counts = labels != 0 if masked else torch.ones(len(input_ids)).bool()
        with pyro.plate("data", 12, subsample=input_ids):
            fn = dist.Categorical(logits=logits).mask(counts)
            pyro.sample("y", fn, obs=labels)

    texts["labels"] = torch.tensor([0, 1, 2]).repeat(4)
    guide = pl.AutoLaplace(
        model,
        init_loc_fn=lora.init_to_adapter(),
        structure=pl.structures.Exact(),
        fisher=fisher,
    )
    guide.laplace_approximation(split(texts, 3))  # sets the guide up
    seen.clear()
    monkeypatch.setattr(own_structures, "MAX_ROWS", 11)
    # Of each three data two count, with two rows each: 12 after nine data. Where none
    # is masked the first batch tells.
    with pytest.raises(ValueError, match=r"here (24|12) or more, and takes 11 at most"):
        guide.laplace_approximation(split(texts, 3))
    assert len(seen) == (3 if masked and fisher == "exact" else 1)


def test_bad_numbers_of_rows() -> None:
    for number in (0, 20_001):
        with pytest.raises(ValueError, match="num_inducing"):
            pl.structures.Exact(num_inducing=number)
    task = Linear(CASES["categorical"])
    guide = pl.AutoLaplace(
        task.model,
        init_loc_fn=task.lora.init_to_adapter(),
        structure=pl.structures.Exact(num_inducing=2),
    )
    guide.laplace_approximation([task.batch])
    with pytest.raises(ValueError, match="2 passes"):
        guide.laplace_approximation(iter([task.batch]))


@pytest.mark.parametrize("name", ["categorical", "several-normals"])
def test_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    task = Linear(CASES[name])
    fit = task.fit(moved(task.lora), pl.structures.Exact(num_inducing=4))
    for posterior in (fit, fit.refine(), fit.refine("prior")):
        path = tmp_path / str(id(posterior))
        pl.save(posterior, path)
        loaded: Any = pl.load(path, task.lora, model=task.model)
        assert_same_posterior(loaded, posterior, 0.0)
        assert_same(loaded.leave_one_out(), posterior.leave_one_out())
        again = loaded.refine("prior"), posterior.refine("prior")
        assert_same_posterior(*again, 1e-9)


def test_outcomes_that_are_certain_leave_the_fisher_information_singular() -> None:
    # One row of 250 is informed, and its square lies below the digits of all others'.
    number = 250
    network = nn.Linear(number, 1).double()
    nn.init.normal_(network.weight, std=0.01)
    lora = pl.lift(network)
    x, sure = torch.randn(number, number).double(), torch.arange(number) > 0

    def model(x: Tensor, sure: Tensor, y: Tensor) -> None:
        logits = lora()(x)[..., 0] + 1000.0 * sure
        with pyro.plate("data", number, subsample=x):
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)

    data = {"x": x, "sure": sure, "y": torch.ones(number).double()}
    found, exact, dense = (
        pl.AutoLaplace(
            model, init_loc_fn=lora.init_to_adapter(), structure=structure
        ).laplace_approximation([data])
        for structure in (
            pl.structures.Exact(num_inducing=number),
            pl.structures.Exact(),
            pl.structures.Dense(),
        )
    )
    assert_same_posterior(exact, dense, 1e-9)
    assert_same_posterior(found, exact, 1e-8)


def test_says_what_is_lost() -> None:
    task = Linear(CASES["categorical"])
    fit = task.fit(task.lora.weights(), pl.structures.Exact(num_inducing=4))
    assert "5 directions" in repr(fit.gaussian)
    assert "lost, of 12 rows of 6 data" in repr(fit.gaussian)


@pytest.mark.parametrize("per", ["site", "layer"])
@pytest.mark.few(1)
def test_grams_that_are_not_kept_are_the_same(
    per: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora, texts, _ = transformer()
    exact = laplace(lora, texts, 5, structure=pl.structures.Exact())
    expected = exact.optimize_prior(per=per)
    monkeypatch.setattr(dual_gaussian, "_KEPT_BYTES", 0)
    again = laplace(lora, texts, 5, structure=pl.structures.Exact())
    found = again.optimize_prior(per=per)
    assert_same(found.log_evidence(), expected.log_evidence())
    for site, tau in found.prior_precision.items():
        assert_close(tau, expected.prior_precision[site], rtol=1e-5, atol=0)
    grams = again.gaussian.rows._by_layer  # type: ignore[attr-defined]
    assert "_kept" not in vars(grams)
    weights = torch.rand(len(grams.groups)).double().requires_grad_()
    assert torch.autograd.gradcheck(grams.weighted, weights)
