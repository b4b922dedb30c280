"""The table of Fisher roots: each against the expected Hessian by double autograd."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_lora as pl
from pyro_lora.curvature.fisher import FisherTerms, exact_terms, mc_terms
from tests.curvature.gauss_newton import assert_same

Outcomes = tuple[Tensor, Tensor]  # values (V, ...) and their probabilities (V,)
CUTPOINTS = torch.tensor([-1.0, 0.4, 2.0], dtype=torch.float64)
DF = torch.tensor(4.5, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    likelihood: Callable[[Tensor], Any]  # parameters (P,) -> distribution
    parameters: tuple[float, ...]
    rank: int
    outcomes: Callable[[Any], Outcomes]
    regular: bool = True  # whether the expected Hessian is the Fisher information


def enumerated(fn: Any) -> Outcomes:
    values = fn.enumerate_support()
    return values, fn.log_prob(values).exp()


def up_to(most: int) -> Callable[[Any], Outcomes]:
    def counts(fn: Any) -> Outcomes:
        values = torch.arange(most + 1.0, dtype=torch.float64)
        return values, fn.log_prob(values).exp()

    return counts


def compositions(fn: Any) -> Outcomes:
    found = [
        y
        for y in itertools.product(range(fn.total_count + 1), repeat=3)
        if sum(y) == fn.total_count
    ]
    values = torch.tensor(found, dtype=torch.float64)
    return values, fn.log_prob(values).exp()


def by_angle(fn: Any) -> Outcomes:
    """Gauss-Legendre in the angle whose tangent is y, for polynomial tails."""
    points, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(400))
    angle = points * torch.pi / 2
    values = fn.loc + fn.scale * angle.tan()
    slope = fn.scale / angle.cos().square() * torch.pi / 2
    return values, fn.log_prob(values).exp() * slope * weights


def hermite(fn: Any) -> Outcomes:
    points, weights = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(20))
    return fn.loc + fn.scale * points, weights / weights.sum()


def laguerre(fn: Any) -> Outcomes:
    points, weights = map(torch.from_numpy, np.polynomial.laguerre.laggauss(20))
    both = torch.cat([points, -points])
    return fn.loc + fn.scale * both, torch.cat([weights, weights]) / 2


THREE = (0.3, -1.2, 2.0)
CASES = {
    "categorical": Case(lambda x: dist.Categorical(logits=x), THREE, 2, enumerated),
    "one-hot": Case(lambda x: dist.OneHotCategorical(logits=x), THREE, 2, enumerated),
    "one-hot-probs": Case(
        lambda x: dist.OneHotCategorical(probs=x.softmax(-1)), THREE, 2, enumerated
    ),
    "multinomial": Case(
        lambda x: dist.Multinomial(total_count=4, logits=x), THREE, 2, compositions
    ),
    "multinomial-probs": Case(
        lambda x: dist.Multinomial(total_count=4, probs=x.softmax(-1)),
        THREE,
        2,
        compositions,
    ),
    "bernoulli": Case(lambda x: dist.Bernoulli(logits=x[0]), (0.7,), 1, enumerated),
    "bernoulli-probs": Case(
        lambda x: dist.Bernoulli(probs=x[0].sigmoid()), (0.7,), 1, enumerated
    ),
    "binomial": Case(lambda x: dist.Binomial(5, logits=x[0]), (0.7,), 1, enumerated),
    "binomial-probs": Case(
        lambda x: dist.Binomial(5, probs=x[0].sigmoid()), (0.7,), 1, enumerated
    ),
    "negative-binomial": Case(
        lambda x: dist.NegativeBinomial(3.5, logits=x[0]), (-0.4,), 1, up_to(200)
    ),
    "negative-binomial-probs": Case(
        lambda x: dist.NegativeBinomial(3.5, probs=x[0].sigmoid()),
        (-0.4,),
        1,
        up_to(200),
    ),
    "poisson": Case(lambda x: dist.Poisson(x[0].exp()), (0.8,), 1, up_to(60)),
    "poisson-softplus": Case(  # another parameter, the same information
        lambda x: dist.Poisson(torch.nn.functional.softplus(x[0])),
        (0.8,),
        1,
        up_to(60),
    ),
    "ordinal": Case(
        lambda x: dist.OrderedLogistic(x[0], CUTPOINTS), (0.7,), 1, enumerated
    ),
    "ordinal-cutpoints": Case(
        lambda x: dist.OrderedLogistic(x[0], x[1:]), (0.7, -1.0, 0.4), 2, enumerated
    ),
    "normal": Case(lambda x: dist.Normal(x[0], 0.3), (0.4,), 1, hermite),
    "normal-scale": Case(
        lambda x: dist.Normal(x[0], x[1].exp()), (0.4, -0.5), 2, hermite
    ),
    "student-t": Case(lambda x: dist.StudentT(DF, x[0], 0.3), (0.4,), 1, by_angle),
    "student-t-scale": Case(
        lambda x: dist.StudentT(DF, x[0], x[1].exp()), (0.4, -0.5), 2, by_angle
    ),
    "laplace": Case(
        lambda x: dist.Laplace(x[0], 0.3), (0.4,), 1, laguerre, regular=False
    ),
    "laplace-scale": Case(
        lambda x: dist.Laplace(x[0], x[1].exp()),
        (0.4, -0.5),
        2,
        laguerre,
        regular=False,
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def leaf_of(case: Case) -> Tensor:
    return torch.tensor(case.parameters, dtype=torch.float64, requires_grad=True)


def outcomes_and_scores(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Values (V, ...), probabilities (V,) and scores in the parameters, (V, P)."""
    leaf = leaf_of(case).detach()
    values, weights = case.outcomes(case.likelihood(leaf))
    scores = torch.autograd.functional.jacobian(
        lambda x: case.likelihood(x).log_prob(values), leaf
    )
    return values, weights, scores


def roots(found: FisherTerms, leaf: Tensor) -> Tensor:
    """Gradient of each term, (M, P)."""
    return torch.stack(
        [torch.autograd.grad(t, leaf, retain_graph=True)[0] for t in found.terms]
    )


@every_case
def test_exact_is_the_expected_hessian(case: Case) -> None:
    values, weights, scores = outcomes_and_scores(case)
    assert_same(weights.sum(), torch.ones((), dtype=torch.float64))
    leaf = leaf_of(case)
    root = roots(exact_terms(case.likelihood(leaf), values[0]), leaf)
    assert len(root) == case.rank  # the fewest columns
    assert int(torch.linalg.matrix_rank(root)) == case.rank
    assert_same(root.mT @ root, torch.einsum("v,vi,vj->ij", weights, scores, scores))
    if case.regular:
        hessian = torch.autograd.functional.hessian(
            lambda x: -(case.likelihood(x).log_prob(values) * weights).sum(),
            leaf.detach(),
        )
        assert_same(root.mT @ root, hessian)


@every_case
def test_coordinates_recover_the_score_of_every_outcome(case: Case) -> None:
    values, weights, scores = outcomes_and_scores(case)
    leaf = leaf_of(case)
    alphas = []
    for value, score in zip(values, scores, strict=True):
        found = exact_terms(case.likelihood(leaf), value)
        assert found.coordinates is not None
        assert_same(found.coordinates @ roots(found, leaf), score)
        alphas.append(found.coordinates)
    # In a root's coordinates the Fisher information is the identity.
    alpha = torch.stack(alphas)
    identity = torch.eye(case.rank, dtype=torch.float64)
    assert_same(torch.einsum("v,vi,vj->ij", weights, alpha, alpha), identity)


@every_case
def test_mc_converges_to_exact(case: Case) -> None:
    num_samples = 2_000
    _, weights, scores = outcomes_and_scores(case)
    exact = torch.einsum("v,vi,vj->ij", weights, scores, scores)
    fourth = torch.einsum("v,vi,vj->ij", weights, scores.square(), scores.square())
    standard_error = ((fourth - exact.square()).clamp_min(0) / num_samples).sqrt()
    leaf = leaf_of(case)
    terms = mc_terms(case.likelihood(leaf), torch.zeros(()), num_samples).terms
    one_each = torch.eye(num_samples, dtype=torch.float64)
    (root,) = torch.autograd.grad(terms, leaf, one_each, is_grads_batched=True)
    assert ((root.mT @ root - exact).abs() <= 4 * standard_error + 1e-12).all()


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"ordinal-cutpoints"}))
def test_one_root_for_each_datum(name: str) -> None:
    case = CASES[name]
    values, _, _ = outcomes_and_scores(case)
    several = leaf_of(case).detach() + torch.arange(3.0)[:, None] / 10
    value = values[[0, 1, 0]]
    logits_last = len(case.parameters) == 3  # else one parameter after the other
    found = pl.fisher_root(
        case.likelihood(several if logits_last else several.T), value
    )
    for i in range(3):
        alone = pl.fisher_root(case.likelihood(several[i]), value[i])
        assert_same(found.root[i], alone.root)
        assert_same(found.coordinates[i], alone.coordinates)


EXTREME = torch.tensor([500.0, -500.0, 60.0, -60.0, 0.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("likelihood", "labels"),
    [
        (lambda x: dist.Bernoulli(logits=x), (0.0, 1.0)),
        (lambda x: dist.Binomial(5, logits=x), (0.0, 3.0, 5.0)),
        (lambda x: dist.NegativeBinomial(2.0, logits=x), (0.0, 7.0)),
        (lambda x: dist.Poisson(x.clamp_max(60.0).exp()), (0.0, 7.0)),
        (lambda x: dist.OrderedLogistic(x, CUTPOINTS.to(x)), (0.0, 1.0, 3.0)),
        (lambda x: dist.StudentT(3.0, x, 0.1), (0.0, 7.0)),
    ],
)
def test_extreme_parameters_give_finite_roots(
    likelihood: Any, labels: tuple[float, ...], dtype: torch.dtype
) -> None:
    x = EXTREME.to(dtype)
    for label in labels:
        found = pl.fisher_root(likelihood(x), torch.full_like(x, label))
        assert torch.isfinite(found.root).all()
        assert torch.isfinite(found.coordinates).all()
        assert torch.isfinite(found.parameter).all()


def test_ordinal_information_does_not_cancel_far_from_the_cutpoints() -> None:
    x = torch.tensor([30.0, -30.0], dtype=torch.float64)
    found = pl.fisher_root(dist.OrderedLogistic(x, CUTPOINTS), torch.tensor([0, 3]))
    # Far below all cutpoints c it is that of the first split alone, P(y > 0) =
    # s(x - c) ~ exp(x - c); far above, that of the last.
    expected = torch.stack([CUTPOINTS[-1] - x[0], x[1] - CUTPOINTS[0]]).exp()
    assert_same(found.root[..., 0, 0].square(), expected, rtol=1e-9, atol=0.0)
    # The improbable outcome's score is -1 or 1 there.
    score = found.root[..., 0, 0] * found.coordinates[..., 0]
    assert_same(score, torch.tensor([-1.0, 1.0], dtype=torch.float64))


def test_no_trials_have_no_information() -> None:
    logits = torch.zeros(2, 3, dtype=torch.float64)
    for fn, value in [
        (dist.Binomial(torch.tensor([0.0, 2.0]), logits=logits[:, 0]), [0.0, 1.0]),
        (
            dist.Multinomial(2, logits=logits, validate_args=False),
            [[0.0] * 3, [1, 0, 1]],
        ),
    ]:
        found = pl.fisher_root(fn, torch.tensor(value, dtype=torch.float64))
        assert (found.root[0] == 0).all()
        assert (found.coordinates[0] == 0).all()
        assert (found.root[1] != 0).any()


@pytest.mark.parametrize("kind", ["multinomial", "bernoulli"])
def test_soft_labels(kind: str) -> None:
    leaf = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    if kind == "multinomial":
        soft = torch.rand(4, 3, dtype=torch.float64).softmax(-1)
        fn: Any = dist.Multinomial(logits=leaf, validate_args=False)
        hard: Any = dist.Categorical(logits=leaf)
        label = torch.zeros(4)
    else:
        soft = torch.rand(4, 3, dtype=torch.float64)
        fn = dist.Bernoulli(logits=leaf, validate_args=False)
        hard, label = dist.Bernoulli(logits=leaf), torch.zeros(4, 3)
    found = pl.fisher_root(fn, soft)
    assert_same(found.root, pl.fisher_root(hard, label).root)
    terms = (found.parameter[..., None] * found.root).sum(-2)
    one, other = (terms * found.coordinates).sum(), fn.log_prob(soft).sum()
    (score,) = torch.autograd.grad(one, leaf, retain_graph=True)
    assert_same(score, torch.autograd.grad(other, leaf)[0])


def test_missing_values_of_a_nan_masked_normal() -> None:
    value = torch.tensor([0.5, torch.nan, 1.0])
    found = pl.fisher_root(dist.NanMaskedNormal(torch.zeros(3), 0.5), value)
    assert_same(found.root.flatten(), torch.tensor([2.0, 0.0, 2.0]))
    assert_same(found.coordinates.flatten(), torch.tensor([1.0, 0.0, 2.0]))


@pytest.mark.parametrize(
    "fn",
    [
        dist.StudentT(torch.ones(3, requires_grad=True), torch.zeros(3), 1.0),
        dist.NegativeBinomial(torch.ones(3, requires_grad=True), logits=torch.zeros(3)),
    ],
)
def test_a_correlated_parameter_is_refused(fn: Any) -> None:
    with pytest.raises(TypeError, match="fisher='mc'"):
        pl.fisher_root(fn, torch.ones(3))


@pytest.mark.parametrize(
    "build", [dist.Categorical, dist.OneHotCategorical, dist.Multinomial]
)
def test_a_vocabulary_is_refused_before_its_root_is_formed(build: Any) -> None:
    logits = torch.zeros(1, 1, 50_000)
    value = torch.zeros(1, 1) if build is dist.Categorical else logits
    with pytest.raises(ValueError, match=r"49999 backward passes.*fisher='mc'"):
        pl.fisher_root(build(logits=logits, validate_args=False), value)
