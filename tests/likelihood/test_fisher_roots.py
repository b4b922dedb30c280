"""The table of Fisher roots: each against the expected Hessian by double autograd."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from torch import Tensor
from torch import distributions as td

import pyro_lora as pl
from pyro_lora.curvature.fisher import (
    FisherTerms,
    empirical_terms,
    exact_terms,
    mc_terms,
)
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
    "nan-masked-normal": Case(
        lambda x: dist.NanMaskedNormal(x[0], 0.3), (0.4,), 1, hermite
    ),
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
        fisher = exact_terms(case.likelihood(leaf), value)
        assert fisher.coordinates is not None
        assert_same(fisher.coordinates @ roots(fisher, leaf), score)
        alphas.append(fisher.coordinates)
    # In a root's coordinates the Fisher information is the identity.
    alpha = torch.stack(alphas)
    identity = torch.eye(case.rank, dtype=torch.float64)
    assert_same(torch.einsum("v,vi,vj->ij", weights, alpha, alpha), identity)


def assert_within_standard_error(scores: Tensor, exact: Tensor) -> None:
    """The mean of s s' over M draws (M, P) is the Fisher information, by 5 errors.

    The standard error is that of the draws themselves.
    """
    squares = scores[:, :, None] * scores[:, None]
    standard_error = squares.std(0) / len(squares) ** 0.5
    assert ((squares.mean(0) - exact).abs() <= 5 * standard_error + 1e-12).all()


def mc_scores(fn: Any, value: Tensor, leaf: Tensor, num_samples: int) -> Tensor:
    """Gradients in the leaf of M draws of all data together, (M, *leaf)."""
    at_once = 500  # what they take is quadratic in them
    one_each = torch.eye(at_once, dtype=torch.float64)
    gradients = []
    for _ in range(num_samples // at_once):
        terms = mc_terms(fn, value, at_once).terms.reshape(-1, at_once).sum(0)
        gradients += torch.autograd.grad(
            terms, leaf, one_each, retain_graph=True, is_grads_batched=True
        )
    return torch.cat(gradients) * at_once**0.5


def plain(fn: Any) -> Any:
    return fn.expand([3])


def masked(fn: Any) -> Any:
    return fn.expand([3]).mask(torch.tensor([True, False, True]))


def masked_in_event(fn: Any) -> Any:
    mask = torch.tensor([[True, False], [False, False], [True, True]])
    return fn.expand([3, 2]).mask(mask).to_event(1)


def masked_around_event(fn: Any) -> Any:
    return fn.expand([3, 2]).to_event(1).mask(torch.tensor([True, False, True]))


def masked_and_expanded(fn: Any) -> Any:
    return fn.expand([2]).mask(torch.tensor([True, False])).to_event(1).expand([3])


@pytest.mark.grid
@every_case
@pytest.mark.parametrize(
    ("variant", "count"),
    [
        (plain, 3),
        (masked, 2),
        (masked_in_event, 3),
        (masked_around_event, 4),
        (masked_and_expanded, 3),
    ],
)
def test_mc_converges_to_exact(
    case: Case, variant: Callable[[Any], Any], count: int
) -> None:
    num_samples = 500
    values, weights, scores = outcomes_and_scores(case)
    leaf = leaf_of(case)
    fn = variant(case.likelihood(leaf))
    value = values[weights.argmax()].expand(fn.shape())
    root = roots(FisherTerms(exact_terms(fn, value).terms.flatten(), None), leaf)
    exact = root.mT @ root
    expected = count * torch.einsum("v,vi,vj->ij", weights, scores, scores)
    assert_same(exact, expected)
    assert_within_standard_error(mc_scores(fn, value, leaf, num_samples), exact)


GAPS = torch.tensor([[1.0, torch.nan], [torch.nan, torch.nan], [0.5, -1.0]]).double()


@pytest.mark.parametrize("terms", [exact_terms, mc_terms, empirical_terms])
@pytest.mark.parametrize("event_dims", [0, 1, 2])
def test_missing_outcomes_have_no_terms(terms: Any, event_dims: int) -> None:
    leaf = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    fn = dist.NanMaskedNormal(leaf, 0.5).to_event(event_dims)
    fisher = terms(fn, GAPS)
    # A whole batch may be missing: nothing of it, but not nothing to differentiate.
    assert terms(fn, GAPS * torch.nan).terms.requires_grad
    gradients = torch.stack(
        [
            torch.autograd.grad(t, leaf, retain_graph=True)[0]
            for t in fisher.terms.flatten()
        ]
    )
    assert torch.equal((gradients != 0).any(0), GAPS.isfinite())


def test_a_normal_is_missing_where_only_some_of_its_values_are() -> None:
    covariance = torch.tensor([[2.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    leaf = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for value, exact in [
        ([1.0, torch.nan], torch.tensor([[0.5, 0.0], [0.0, 0.0]])),
        ([torch.nan, torch.nan], torch.zeros(2, 2)),
        ([1.0, 1.0], covariance.inverse()),
    ]:
        fn = dist.NanMaskedMultivariateNormal(leaf, covariance)
        scores = mc_scores(fn, torch.tensor(value).double(), leaf, 1_000)
        assert_within_standard_error(scores, exact.double())


@pytest.mark.parametrize("total", [0.0, 1.0, 7.0, 0.5, 2.25])
def test_counts_have_the_total_of_the_given_ones(total: float) -> None:
    # One distribution with one total, whose data have others, soft labels among them.
    leaf = torch.tensor(THREE, dtype=torch.float64, requires_grad=True)
    shares = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    value = torch.stack([total * shares, shares])
    fn = dist.Multinomial(1, logits=leaf.expand(2, 3), validate_args=False)
    root = roots(FisherTerms(exact_terms(fn, value).terms.flatten(), None), leaf)
    p = leaf.detach().softmax(-1)
    expected = (total + 1) * (p.diag() - torch.outer(p, p))
    assert_same(root.mT @ root, expected)
    assert_within_standard_error(mc_scores(fn, value, leaf, 2_000), expected)


def test_trials_that_differ_between_data() -> None:
    leaf = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    fn = dist.Binomial(torch.tensor([0.0, 1.0, 9.0]).double(), logits=leaf + 0.4)
    p = torch.tensor(0.4, dtype=torch.float64).sigmoid()
    expected = (p * (1 - p) * torch.tensor([0.0, 1.0, 9.0]).double()).diag()
    value = torch.zeros(3).double()
    root = roots(FisherTerms(exact_terms(fn, value).terms.flatten(), None), leaf)
    assert_same(root.mT @ root, expected)
    assert_within_standard_error(mc_scores(fn, value, leaf, 2_000), expected)


def affine(f: Tensor) -> Any:
    shift = td.AffineTransform(f, 0.5, cache_size=1)
    return dist.TransformedDistribution(dist.Normal(torch.zeros(3).double(), 1), shift)


def lognormal(f: Tensor) -> Any:
    exp = td.ExpTransform(cache_size=1)
    return dist.TransformedDistribution(dist.Normal(f, 0.5), exp)


def coupling(f: Tensor) -> Any:
    """The second of two numbers around f, by a conditional coupling."""

    class Shift(torch.nn.Module):
        def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
            return context, torch.full_like(context, math.log(0.5))

    flow = T.ConditionalAffineCoupling(1, Shift())
    base = dist.Normal(torch.zeros(3, 2).double(), 1).to_event(1)
    return dist.ConditionalTransformedDistribution(base, [flow]).condition(f[:, None])


@pytest.mark.parametrize("likelihood", [affine, lognormal, coupling])
@pytest.mark.parametrize("event_dims", [0, 1])
def test_a_transform_forgets_what_it_drew(likelihood: Any, event_dims: int) -> None:
    leaf = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    fn = likelihood(leaf)
    value = fn.sample()
    scores = mc_scores(fn.to_event(event_dims), value, leaf, 2_000)
    expected = 4 * torch.eye(3, dtype=torch.float64)  # each a Normal of scale .5
    assert_within_standard_error(scores, expected)


def test_zeros_of_two_kinds_take_samples() -> None:
    case = Case(
        lambda x: dist.ZeroInflatedPoisson(x[0].exp(), gate=torch.tensor(0.3).double()),
        (0.5,),
        1,
        up_to(60),
    )
    _, weights, scores = outcomes_and_scores(case)
    exact = torch.einsum("v,vi,vj->ij", weights, scores, scores)
    leaf = leaf_of(case)
    fn = case.likelihood(leaf).expand([1])
    with pytest.raises(TypeError, match="fisher='mc'"):
        exact_terms(fn, torch.zeros(1))
    assert_within_standard_error(mc_scores(fn, torch.zeros(1), leaf, 2_000), exact)


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"ordinal-cutpoints"}))
def test_one_root_for_each_datum(name: str) -> None:
    case = CASES[name]
    values, _, _ = outcomes_and_scores(case)
    several = leaf_of(case).detach() + torch.arange(3.0)[:, None] / 10
    value = values[[0, 1, 0]]
    logits_last = len(case.parameters) == 3  # else one parameter after the other
    fisher = pl.likelihoods.of(
        case.likelihood(several if logits_last else several.T)
    ).root(value)
    for i in range(3):
        alone = pl.likelihoods.of(case.likelihood(several[i])).root(value[i])
        assert_same(fisher.root[i], alone.root)
        assert_same(fisher.coordinates[i], alone.coordinates)


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
        fisher = pl.likelihoods.of(likelihood(x)).root(torch.full_like(x, label))
        assert torch.isfinite(fisher.root).all()
        assert torch.isfinite(fisher.coordinates).all()
        assert torch.isfinite(fisher.parameter).all()


def test_ordinal_information_does_not_cancel_far_from_the_cutpoints() -> None:
    x = torch.tensor([30.0, -30.0], dtype=torch.float64)
    fisher = pl.likelihoods.of(dist.OrderedLogistic(x, CUTPOINTS)).root(
        torch.tensor([0, 3])
    )
    # Far below all cutpoints c it is that of the first split alone, P(y > 0) =
    # s(x - c) ~ exp(x - c); far above, that of the last.
    expected = torch.stack([CUTPOINTS[-1] - x[0], x[1] - CUTPOINTS[0]]).exp()
    assert_same(fisher.root[..., 0, 0].square(), expected, rtol=1e-9, atol=0.0)
    # The improbable outcome's score is -1 or 1 there.
    score = fisher.root[..., 0, 0] * fisher.coordinates[..., 0]
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
        fisher = pl.likelihoods.of(fn).root(torch.tensor(value, dtype=torch.float64))
        assert (fisher.root[0] == 0).all()
        assert (fisher.coordinates[0] == 0).all()
        assert (fisher.root[1] != 0).any()


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
    fisher = pl.likelihoods.of(fn).root(soft)
    assert_same(fisher.root, pl.likelihoods.of(hard).root(label).root)
    terms = (fisher.parameter[..., None] * fisher.root).sum(-2)
    one, other = (terms * fisher.coordinates).sum(), fn.log_prob(soft).sum()
    (score,) = torch.autograd.grad(one, leaf, retain_graph=True)
    assert_same(score, torch.autograd.grad(other, leaf)[0])


def test_missing_values_of_a_nan_masked_normal() -> None:
    value = torch.tensor([0.5, torch.nan, 1.0])
    fisher = pl.likelihoods.of(dist.NanMaskedNormal(torch.zeros(3), 0.5)).root(value)
    assert_same(fisher.root.flatten(), torch.tensor([2.0, 0.0, 2.0]))
    assert_same(fisher.coordinates.flatten(), torch.tensor([1.0, 0.0, 2.0]))


@pytest.mark.parametrize(
    "fn",
    [
        dist.StudentT(torch.ones(3, requires_grad=True), torch.zeros(3), 1.0),
        dist.NegativeBinomial(torch.ones(3, requires_grad=True), logits=torch.zeros(3)),
    ],
)
def test_a_correlated_parameter_is_refused(fn: Any) -> None:
    with pytest.raises(TypeError, match="fisher='mc'"):
        pl.likelihoods.of(fn).root(torch.ones(3))


@pytest.mark.parametrize(
    "build", [dist.Categorical, dist.OneHotCategorical, dist.Multinomial]
)
def test_a_vocabulary_is_refused_before_its_root_is_formed(build: Any) -> None:
    logits = torch.zeros(1, 1, 50_000)
    value = torch.zeros(1, 1) if build is dist.Categorical else logits
    with pytest.raises(ValueError, match=r"49999 backward passes.*fisher='mc'"):
        pl.likelihoods.of(build(logits=logits, validate_args=False)).root(value)
