"""Square roots of the Fisher information, against its definition by automatic sums."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_lora as pl
from pyro_lora import likelihoods
from pyro_lora.curvature.fisher import (
    FisherTerms,
    empirical_terms,
    exact_terms,
    mc_terms,
)
from tests.curvature.gauss_newton import assert_same

Likelihood = Callable[[Tensor], Any]  # parameters (..., P) -> distribution


def categorical(logits: Tensor) -> Any:
    return dist.Categorical(logits=logits)


def categorical_probs(logits: Tensor) -> Any:
    return dist.Categorical(probs=logits.softmax(-1))


def bernoulli(logits: Tensor) -> Any:
    return dist.Bernoulli(logits=logits[..., 0])


def bernoulli_probs(logits: Tensor) -> Any:
    return dist.Bernoulli(probs=logits[..., 0].sigmoid())


def normal(parameters: Tensor) -> Any:
    return dist.Normal(parameters[..., 0], 0.3)


def normal_with_scale(parameters: Tensor) -> Any:
    return dist.Normal(parameters[..., 0], parameters[..., 1].exp())


def score(likelihood: Likelihood, parameters: Tensor, value: Tensor) -> Tensor:
    """Gradient of log p(y) in the parameters, (..., P)."""
    leaf = parameters.detach().requires_grad_()
    total = likelihood(leaf).log_prob(value).sum()
    return torch.autograd.grad(total, leaf)[0]


def fisher_by_definition(likelihood: Likelihood, parameters: Tensor) -> Tensor:
    """E[s s^T] over a discrete support, or by Gauss-Hermite quadrature, (P, P)."""
    fn = likelihood(parameters.detach())
    if fn.has_enumerate_support:
        values = list(fn.enumerate_support())
        weights = [fn.log_prob(value).exp() for value in values]
    else:  # a polynomial of degree 4 in y: exact with 3 points or more
        points, mass = torch.linalg.eigh(  # Golub-Welsch, for the standard normal
            torch.diag(torch.arange(1.0, 6).double().sqrt(), 1)
            + torch.diag(torch.arange(1.0, 6).double().sqrt(), -1)
        )
        values = [fn.loc + fn.scale * point for point in points]
        weights = list(mass[0].square())
    scores = [score(likelihood, parameters, value) for value in values]
    return sum(w * torch.outer(s, s) for w, s in zip(weights, scores, strict=True))


def term_gradients(found: FisherTerms, parameters: Tensor) -> Tensor:
    """Gradient of every term in the parameters, (M, *parameters.shape)."""
    terms = found.terms.flatten(0, -2).sum(0)
    one_each = torch.eye(len(terms), dtype=terms.dtype)
    return torch.autograd.grad(
        terms, parameters, one_each, retain_graph=True, is_grads_batched=True
    )[0]


CASES = [
    pytest.param(categorical, [0.3, -1.2], 1, id="categorical-2"),
    pytest.param(categorical, [0.3, -1.2, 2.0], 2, id="categorical-3"),
    pytest.param(categorical, [0.3, -1.2, 2.0, 0.0, -3.0], 4, id="categorical-5"),
    pytest.param(categorical, [30.0, 0.0, -2.0], 2, id="categorical-nearly-first"),
    pytest.param(categorical, [-4.0, 0.0, 25.0], 2, id="categorical-nearly-last"),
    pytest.param(categorical_probs, [0.3, -1.2, 2.0], 2, id="categorical-probs"),
    pytest.param(bernoulli, [0.7], 1, id="bernoulli"),
    pytest.param(bernoulli, [-30.0], 1, id="bernoulli-nearly-zero"),
    pytest.param(bernoulli_probs, [0.7], 1, id="bernoulli-probs"),
    pytest.param(normal, [0.4], 1, id="normal"),
    pytest.param(normal_with_scale, [0.4, -0.5], 2, id="normal-with-scale"),
]


@pytest.mark.parametrize(("likelihood", "parameters", "rank"), CASES)
def test_exact_terms_span_fisher_and_score(
    likelihood: Likelihood, parameters: list[float], rank: int
) -> None:
    leaf = torch.tensor(parameters, dtype=torch.float64, requires_grad=True)
    fn = likelihood(leaf)
    value = fn.sample()
    fisher = exact_terms(fn, value)
    root = term_gradients(FisherTerms(fisher.terms[None], None), leaf)  # (M, P)
    assert len(root) == rank
    # Relative: a saturated class has a Fisher information of 1e-13, not of 0.
    expected = fisher_by_definition(likelihood, leaf)
    assert_same(root.mT @ root, expected, atol=1e-11 * float(expected.max()))
    assert fisher.coordinates is not None
    assert_same(fisher.coordinates @ root, score(likelihood, leaf, value))


@pytest.mark.parametrize("likelihood", [categorical, bernoulli])
@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturated_probabilities_give_finite_terms(
    likelihood: Likelihood, label: int, dtype: torch.dtype
) -> None:
    logits = torch.tensor([[500.0, 0.0], [-500.0, 0.0], [60.0, 0.0]], dtype=dtype)
    value = torch.full((3,), float(label), dtype=dtype)
    fisher = likelihoods.of(likelihood(logits)).root(value)
    assert torch.isfinite(fisher.root).all()
    assert torch.isfinite(fisher.coordinates).all()
    recovered = (fisher.root @ fisher.coordinates[..., None])[..., 0]
    expected = score(likelihood, logits, value)
    tolerance = 10 * torch.finfo(dtype).eps
    expected = expected[..., : recovered.shape[-1]]
    assert_same(recovered, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("x", [0.0, 5.0, 38.0, -38.0])
def test_two_classes_are_a_bernoulli(x: float) -> None:
    logits = torch.tensor([0.0, x], dtype=torch.float64)
    for label in range(2):
        value = torch.tensor(label)
        fisher = likelihoods.of(categorical(logits)).root(value)
        alone = likelihoods.of(bernoulli(logits[1:])).root(value)
        assert_same(fisher.root[1].abs(), alone.root[0], atol=0.0)
        assert_same(fisher.coordinates, -alone.coordinates, atol=0.0)


def test_one_root_for_each_datum() -> None:
    logits = torch.randn(2, 4, 3, dtype=torch.float64)
    value = torch.randint(3, (2, 4))
    fisher = likelihoods.of(categorical(logits)).root(value)
    for index in torch.cartesian_prod(torch.arange(2), torch.arange(4)):
        i = tuple(index)
        alone = likelihoods.of(categorical(logits[i])).root(value[i])
        assert_same(fisher.root[i], alone.root)
        assert_same(fisher.coordinates[i], alone.coordinates)


@pytest.mark.parametrize("seed", range(3))
def test_mc_converges_to_exact(seed: int) -> None:
    torch.manual_seed(seed)
    num_samples = 2_000
    leaf = torch.randn(1, 3, dtype=torch.float64, requires_grad=True)
    fisher = mc_terms(categorical(leaf), torch.tensor([0]), num_samples)
    assert fisher.coordinates is None
    root = term_gradients(fisher, leaf)[:, 0]
    exact = fisher_by_definition(categorical, leaf[0])
    probs = leaf.detach()[0].softmax(-1)
    scores = torch.eye(3, dtype=torch.float64) - probs  # of each label
    squares = torch.einsum("l,li,lj->ij", probs, scores.square(), scores.square())
    standard_error = ((squares - exact.square()) / num_samples).sqrt()
    assert ((root.mT @ root - exact).abs() < 4 * standard_error).all()


def test_mc_needs_no_closed_form() -> None:
    num_samples = 2_000
    rate = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    fisher = mc_terms(dist.Poisson(rate), torch.zeros(1), num_samples)
    root = term_gradients(fisher, rate)
    # Fisher information 1 / rate; the score (y / rate - 1) has fourth moment
    # (rate + 3 rate^2) / rate^4 = .875, so the mean of its squares has this error.
    standard_error = ((0.875 - 0.25) / num_samples) ** 0.5
    assert abs(float(root.square().sum()) - 0.5) < 4 * standard_error


def test_empirical_terms_are_the_score_of_the_given_labels() -> None:
    leaf = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    value = torch.tensor([0, 1, 2, 1])
    fisher = empirical_terms(categorical(leaf), value)
    assert_same(term_gradients(fisher, leaf)[0], score(categorical, leaf, value))
    assert_same(fisher.coordinates, torch.ones(4, 1, dtype=torch.float64))


@pytest.mark.parametrize("event_dims", [1, 2])
def test_event_dims_are_terms_of_their_own(event_dims: int) -> None:
    leaf = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    value = torch.randint(3, (2, 4, 3))
    flat = exact_terms(categorical(leaf), value)
    fisher = exact_terms(categorical(leaf).to_event(event_dims), value)
    assert_same(fisher.terms, flat.terms.flatten(-1 - event_dims))
    assert fisher.coordinates is not None
    assert flat.coordinates is not None
    assert_same(fisher.coordinates, flat.coordinates.flatten(-1 - event_dims))


@pytest.mark.parametrize("inside", [True, False])
def test_masked_outcomes_have_no_information(inside: bool) -> None:
    leaf = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    value = torch.randint(2, (2, 3))
    mask = torch.tensor([[True, False, True], [False, False, True]])
    if inside:  # some tokens of each datum
        fn = categorical(leaf).mask(mask).to_event(1)
    else:  # all tokens of the second datum
        mask = torch.tensor([True, False])
        fn = categorical(leaf).to_event(1).mask(mask)
        mask = mask[:, None].expand(2, 3)
    terms = exact_terms(fn, value)
    gradients = term_gradients(terms, leaf)
    assert terms.coordinates is not None
    assert_same(
        torch.einsum("bm,mbtc->btc", terms.coordinates, gradients),
        torch.autograd.grad(fn.log_prob(value).sum(), leaf)[0],
    )
    fisher = torch.einsum("mbtc,mbtd->btcd", gradients, gradients)
    full = torch.stack(
        [fisher_by_definition(categorical, x) for x in leaf.detach().flatten(0, 1)]
    ).reshape(2, 3, 2, 2)
    assert_same(fisher, full * mask[..., None, None])


def test_missing_values_may_be_nan_behind_a_mask() -> None:
    loc = torch.randn(3, dtype=torch.float64, requires_grad=True)
    value = torch.tensor([0.5, math.nan, 1.0], dtype=torch.float64)
    fn = dist.Normal(loc, 1.0, validate_args=False).mask(~value.isnan())
    fisher = exact_terms(fn, value)
    assert fisher.coordinates is not None
    assert_same(fisher.coordinates[1], torch.zeros(1, dtype=torch.float64))


def test_unknown_distribution_suggests_mc() -> None:
    with pytest.raises(TypeError, match=r"Cauchy.*fisher='mc'"):
        exact_terms(dist.Cauchy(torch.ones(3), 1.0), torch.ones(3))


def test_a_user_may_register_a_root() -> None:
    class Likelihood(dist.Normal):
        pass

    @likelihoods.register(Likelihood)
    def wider(fn: Likelihood) -> likelihoods.Likelihood:
        return likelihoods.of(dist.Normal(fn.loc, 2.0))

    fn = Likelihood(torch.zeros(3, requires_grad=True), 1.0)
    assert_same(
        term_gradients(exact_terms(fn, torch.ones(3)), fn.loc)[0, 0],
        0.5 * torch.ones(()),
    )


class Tempered(dist.Categorical):
    def log_prob(self, value: Tensor) -> Tensor:
        log_prob: Tensor = 0.1 * super().log_prob(value)
        return log_prob


class Plain(Tempered):
    """As tempered as its base."""


class Doubled(dist.Normal):
    """Of twice the scale."""

    @property
    def own(self) -> dist.Normal:
        return dist.Normal(self.loc, 2 * self.scale)

    def log_prob(self, value: Tensor) -> Tensor:
        log_prob: Tensor = self.own.log_prob(value)
        return log_prob

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        drawn: Tensor = self.own.sample(sample_shape)
        return drawn


@pytest.mark.parametrize("kind", [Tempered, Plain])
@pytest.mark.parametrize("masked", [False, True])
def test_a_density_of_its_own_is_not_that_of_the_base(kind: Any, masked: bool) -> None:
    fn, value = kind(logits=torch.randn(4, 3).double()), torch.tensor([0, 1, 2, 0])
    fn = fn.mask(torch.ones(4).bool()).to_event(1) if masked else fn
    said = rf"{kind.__name__} has a log_prob of its own.*Categorical.*poutine\.scale"
    said += rf".*register\({kind.__name__}\)"
    with pytest.raises(TypeError, match=said):
        exact_terms(fn, value)
    # Tempered draws would be other ones.
    with pytest.raises(TypeError, match=rf"register\({kind.__name__}\)"):
        mc_terms(fn, value)
    given = empirical_terms(fn, value).terms
    assert_same(given[..., 0], fn.log_prob(value))


@pytest.mark.untrained
@pytest.mark.parametrize(
    "structure",
    [pl.structures.KFAC(), pl.structures.Dense(), pl.structures.Exact()],
    ids=repr,
)
def test_a_tempered_likelihood_is_refused_or_registered(structure: Any) -> None:
    class Registered(Tempered):
        pass

    lora = pl.lift(torch.nn.Linear(3, 3).double(), prior=pl.priors.normal(1.0))
    x, labels = torch.randn(8, 3).double(), torch.randint(3, (8,))

    def fit(kind: Any, scale: float = 1.0) -> pl.LaplacePosterior:
        def model(x: Tensor, labels: Tensor | None = None) -> None:
            logits = lora()(x)
            with pyro.plate("data", 8, subsample=x), pyro.poutine.scale(scale=scale):
                pyro.sample("y", kind(logits=logits), obs=labels)

        start = lora.init_to(lora.weights())
        guide = pl.AutoLaplace(model, init_loc_fn=start, structure=structure)
        return guide.laplace_approximation([{"x": x, "labels": labels}])

    with pytest.raises(TypeError, match="Registered has a log_prob of its own"):
        fit(Registered)

    @likelihoods.register(Registered)
    def tempered(fn: Registered) -> likelihoods.Likelihood:
        plain = likelihoods.of(dist.Categorical(logits=fn.logits))

        def root(value: Tensor) -> likelihoods.FisherRoot:
            of_plain = plain.root(value)
            return replace(
                of_plain,
                root=0.1**0.5 * of_plain.root,
                coordinates=0.1**0.5 * of_plain.coordinates,
            )

        return replace(
            plain,
            at=lambda f: Registered(logits=f),
            score=lambda value: 0.1 * plain.score(value),
            root=root,
        )

    found, expected = fit(Registered), fit(dist.Categorical, 0.1)
    assert_same(found.log_evidence(), expected.log_evidence())
    for site, variance in expected.variance().items():
        assert_same(found.variance()[site], variance)


def test_mc_draws_from_a_density_of_its_own() -> None:
    loc = torch.randn(4).double().requires_grad_()
    terms = []
    for fn in (Doubled(loc, 0.3), dist.Normal(loc, 0.6)):
        torch.manual_seed(0)
        terms.append(mc_terms(fn, torch.zeros(4).double(), 5))
    assert_same(*(term_gradients(found, loc) for found in terms))


def test_what_pyro_makes_of_a_type_has_its_entry() -> None:
    f, cutpoints = torch.randn(3).double(), torch.tensor([-1.0, 1.0]).double()
    eye = torch.eye(3).double()
    for fn in (
        dist.Categorical(logits=f),
        torch.distributions.Categorical(logits=f),
        dist.OneHotCategoricalStraightThrough(logits=f),
        dist.Binomial(3, logits=f),
        dist.ExtendedBinomial(3, logits=f),
        dist.Poisson(f.exp()),
        dist.Poisson(f.exp(), is_sparse=True),
        dist.OrderedLogistic(f, cutpoints),
        dist.NanMaskedNormal(f, 1.0),
        dist.OMTMultivariateNormal(f, eye),
    ):
        value = fn.sample()
        at = likelihoods.of(fn).at(likelihoods.of(fn).predictor)
        assert type(at) is type(fn)
        assert_same(at.log_prob(value), fn.log_prob(value))


def test_a_subclass_with_arguments_of_its_own_is_made_again_without_them() -> None:
    class Cooler(dist.Categorical):
        def __init__(self, logits: Tensor) -> None:
            super().__init__(logits=2 * logits)

    class Exposed(torch.distributions.Poisson):
        def __init__(self, exposure: float, rate: Tensor) -> None:
            super().__init__(exposure * rate)

    f = torch.randn(4, 3).double()
    for fn in (Cooler(f), Exposed(3.0, f.exp())):
        at = likelihoods.of(fn).at(likelihoods.of(fn).predictor)
        value = fn.sample()
        assert_same(at.log_prob(value), fn.log_prob(value))


@pytest.mark.parametrize("kind", [dist.Normal(0.0, 1.0), int, "Gamma", None])
def test_what_is_registered_is_a_type_of_distributions(kind: Any) -> None:
    with pytest.raises(TypeError, match="a type of distributions"):
        likelihoods.register(kind)
