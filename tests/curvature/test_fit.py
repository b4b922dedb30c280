"""What a fit sums over: batches, scales and masks; the gradient it finds on the way."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import pyro_lora as pl
from pyro_lora.curvature.fisher import (
    empirical_terms,
    exact_terms,
    mc_terms,
)
from pyro_lora.curvature.fit import FisherPasses
from pyro_lora.curvature.structures import Structure
from tests.curvature.gauss_newton import (
    CountingTokens,
    assert_same,
    brute_force,
    fisher,
    fit,
    flatten,
    laplace,
    split,
    unflatten,
)
from tests.networks import batch, bert, inputs, llama

pytestmark = pytest.mark.untrained

STRUCTURES = [
    pl.structures.KFAC(),
    pl.structures.KFAC(reduce=True),
    pl.structures.EKFAC(),
    pl.structures.Diagonal(),
    pl.structures.Dense(),
]
Batch = dict[str, Tensor]
Model = Callable[..., Any]


def assert_same_posterior(
    found: pl.LaplacePosterior, expected: pl.LaplacePosterior
) -> None:
    assert_same(found.log_evidence(), expected.log_evidence())
    for site, value in expected.variance().items():
        assert_same(found.variance()[site], value)


@pytest.mark.grid
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("build", [bert, llama])
@pytest.mark.few(3)
def test_any_split_gives_the_same(build: Any, structure: Structure) -> None:
    lora, texts = pl.lift(build(3)), batch(7, num_labels=3)
    expected = laplace(lora, texts, structure=structure)
    for batch_size in (1, 4, 5):
        posterior = laplace(lora, texts, batch_size, structure=structure)
        assert_same_posterior(posterior, expected)


def test_tokens_of_a_datum_without_doubt_count_in_any_batch() -> None:
    # Its gradients are 1e-5 of the others', but then so is what counts as zero.
    lora, texts = pl.lift(bert(2, dtype=torch.float32)), batch(5)
    texts["certain"] = torch.tensor([0.0, 0.0, 12.0, 0.0, 0.0])

    def model(certain: Tensor, labels: Tensor | None = None, **texts: Tensor) -> Tensor:
        logits = lora()(**texts).logits + torch.stack([certain, -certain], -1)
        with pyro.plate("data", 5, subsample=logits):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    def num_tokens(batch_size: int) -> int:
        structure = CountingTokens()
        guide = pl.AutoLaplace(
            model, init_loc_fn=lora.init_to_adapter(), structure=structure
        )
        guide.laplace_approximation(split(texts, batch_size))
        return sum(structure.counts)

    assert num_tokens(5) == num_tokens(1)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.few(3)
def test_the_order_of_data_does_not_matter(structure: Structure) -> None:
    lora, texts = pl.lift(bert(3)), batch(7, num_labels=3)
    order = torch.randperm(7)
    shuffled = {name: value[order] for name, value in texts.items()}
    expected = laplace(lora, texts, 3, structure=structure)
    assert_same_posterior(laplace(lora, shuffled, 2, structure=structure), expected)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.few(3)
def test_seeing_the_data_twice_doubles_the_information(structure: Structure) -> None:
    lora, texts = pl.lift(bert(3)), batch(4, num_labels=3)
    twice = {name: torch.cat([value, value]) for name, value in texts.items()}
    prior = lora.prior
    once = laplace(lora, texts, structure=structure)
    posterior = laplace(lora, twice, 3, structure=structure).with_prior_precision(2.0)
    assert lora.prior is prior
    for site, value in once.variance().items():
        assert_same(posterior.variance()[site], value / 2)


def scaled(
    lora: pl.LiftedNetwork,
    num_data: int,
    scale: Callable[[Any], Any] = lambda labels: 1.0,
    mask: Callable[[Any], Any] = lambda labels: True,
) -> Model:
    """Classification with a scale and a mask on the likelihood."""

    def model(labels: Tensor | None = None, **texts: Tensor) -> Tensor:
        logits = lora()(**texts).logits
        with pyro.plate("data", num_data, subsample=logits):
            with poutine.scale(scale=scale(labels)), poutine.mask(mask=mask(labels)):
                return pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    return model


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_subsampling_is_divided_out_once_and_a_users_scale_kept(
    batch_size: int,
) -> None:
    lora, texts = pl.lift(bert(3)), batch(7, num_labels=3)
    exact = brute_force(lora, texts, 1.0)
    fitted = fit(lora, scaled(lora, 7, lambda labels: 0.3), split(texts, batch_size))
    assert_same(fisher(fitted), 0.3 * exact.fisher)
    log_p = exact.logits.log_softmax(-1).gather(1, texts["labels"][:, None])
    assert_same(fitted.log_likelihood, 0.3 * log_p.sum())


def test_one_scale_for_each_datum() -> None:
    lora, texts = pl.lift(bert(3)), batch(7, num_labels=3)
    exact = brute_force(lora, texts, 1.0)
    model = scaled(lora, 7, lambda labels: 0.5 + labels.double())
    fitted = fit(lora, model, split(texts, 3))
    weights = 0.5 + texts["labels"].double()
    j, h = exact.jacobian, exact.hessian * weights[:, None, None]
    assert_same(fisher(fitted), torch.einsum("ncd,nce,nef->df", j, h, j))


@pytest.mark.parametrize("kind", ["poutine", "distribution"])
@pytest.mark.parametrize("terms", [exact_terms, mc_terms, empirical_terms])
def test_masked_data_have_no_information(kind: str, terms: Any) -> None:
    lora, texts = pl.lift(bert(3)), batch(7, num_labels=3)
    texts["labels"] = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    kept = {name: value[texts["labels"] != 2] for name, value in texts.items()}

    def by_distribution(labels: Tensor | None = None, **texts: Tensor) -> Tensor:
        logits = lora()(**texts).logits
        with pyro.plate("data", 7, subsample=logits):
            fn = dist.Categorical(logits=logits).mask(labels != 2)
            return pyro.sample("y", fn, obs=labels)

    by_poutine = scaled(lora, 7, mask=lambda labels: labels != 2)
    model = by_poutine if kind == "poutine" else by_distribution
    fitted = fit(lora, model, split(texts, 3), terms)
    only = fit(lora, pl.models.classification(lora, 5), [kept], terms)
    assert_same(fitted.log_likelihood, only.log_likelihood)
    for site, value in only.gradient.items():
        assert_same(fitted.gradient[site], value)
    if terms is not mc_terms:  # other labels are drawn
        assert_same(fisher(fitted), fisher(only))


@pytest.mark.parametrize("obs_site", [None, "y", "y_observed"])
def test_pyros_obs_mask(obs_site: str | None) -> None:
    # It makes "y_observed" and a latent "y_unobserved".
    lora, texts = pl.lift(bert(3)), batch(7, num_labels=3)
    mask = torch.tensor([True, False, True, True, False, True, True])

    def model(mask: Any, labels: Tensor | None = None, **texts: Tensor) -> Tensor:
        logits = lora()(**texts).logits
        with pyro.plate("data", 7, subsample=texts["input_ids"]):
            fn = dist.Categorical(logits=logits)
            return pyro.sample("y", fn, obs=labels, obs_mask=mask)

    guide = pl.AutoLaplace(
        model,
        init_loc_fn=lora.init_to_adapter(),
        structure=pl.structures.Dense(),
        obs_site=obs_site,
    )
    batches = split({**texts, "mask": mask}, 3)
    posterior = guide.laplace_approximation(batches)
    only = {name: value[mask] for name, value in texts.items()}
    expected = laplace(lora, only, structure=pl.structures.Dense())
    assert_same_posterior(posterior, expected)
    # Both missing outcomes and observed ones are predicted.
    all_data = [inputs(texts)]
    torch.manual_seed(0)
    one = pl.predict(
        posterior, [{**all_data[0], "mask": mask}], model=model, num_samples=4
    )
    torch.manual_seed(0)
    plain = pl.models.classification(lora, 7)
    other = pl.predict(expected, all_data, model=plain, num_samples=4)
    assert_same(one.probs, other.probs)


def test_nan_labels_behind_a_mask_do_no_harm() -> None:
    lora, texts = pl.lift(bert(1)), batch(5)
    y = torch.tensor([0.1, math.nan, 0.3, math.nan, -1.0], dtype=torch.float64)

    def model(y: Any, num_data: int = 5, **texts: Tensor) -> Tensor:
        loc = lora()(**texts).logits[:, 0]
        fn = dist.Normal(loc, 0.5, validate_args=False)
        with pyro.plate("data", num_data), poutine.mask(mask=~y.isnan()):
            return pyro.sample("y", fn, obs=y)

    fitted = fit(lora, model, [{**inputs(texts), "y": y}])
    seen = {name: value[~y.isnan()] for name, value in inputs(texts).items()}
    one = {**seen, "y": y[~y.isnan()]}
    expected = fit(lora, partial(model, num_data=3), [one])
    assert_same(fitted.log_likelihood, expected.log_likelihood)
    assert_same(fisher(fitted), fisher(expected))
    for site, value in expected.gradient.items():
        assert_same(fitted.gradient[site], value)


@pytest.mark.parametrize(
    "terms", [exact_terms, partial(mc_terms, num_samples=2), empirical_terms]
)
@pytest.mark.parametrize("build", [bert, llama])
def test_gradient_is_that_of_the_log_joint(build: Any, terms: Any) -> None:
    lora = pl.lift(build(3), prior=pl.priors.normal(scale=0.7))
    texts = batch(7, num_labels=3)
    fitted = fit(lora, pl.models.classification(lora, 7), split(texts, 3), terms)
    weights = lora.weights()
    flat = flatten(weights).requires_grad_()
    with lora.bind(unflatten(flat, weights)) as net:
        log_p = net(**inputs(texts)).logits.log_softmax(-1)
    prior = dist.Normal(torch.zeros_like(flat), 0.7 + torch.zeros_like(flat))
    log_prior = prior.log_prob(flat).sum()
    log_likelihood = log_p.gather(1, texts["labels"][:, None]).sum()
    assert_same(fitted.log_likelihood, log_likelihood.detach(), rtol=1e-6)
    assert_same(fitted.log_prior, log_prior.detach())
    expected = torch.autograd.grad(log_likelihood + log_prior, flat)[0]
    tolerance = 1e-6 if build is llama else 1e-11  # its norms compute in float32
    assert_same(flatten(fitted.gradient), expected, atol=tolerance)


def test_a_scale_on_the_whole_model_scales_the_prior_too() -> None:
    # poutine.scale(1 / N) is a common way to make losses comparable.
    lora = pl.lift(bert(3), prior=pl.priors.normal(scale=0.7))
    texts = batch(7, num_labels=3)
    plain = pl.models.classification(lora, 7)
    with_scale = poutine.scale(plain, scale=1 / 7)
    one = fit(lora, plain, split(texts, 3))
    fitted = fit(lora, with_scale, split(texts, 3))
    assert_same(fitted.log_prior, one.log_prior / 7)
    assert_same(fisher(fitted), fisher(one) / 7)
    for site, value in one.gradient.items():
        assert_same(fitted.gradient[site], value / 7)
        tau = one.gaussian.prior_precision[site]
        assert_same(fitted.gaussian.prior_precision[site], tau / 7)


def test_empirical_fisher_is_the_sum_of_squared_scores() -> None:
    lora, texts = pl.lift(bert(3)), batch(7, num_labels=3)
    exact = brute_force(lora, texts, 1.0)
    one_hot = torch.nn.functional.one_hot(texts["labels"], 3)
    residual = one_hot - exact.logits.softmax(-1)
    scores = torch.einsum("nc,ncd->nd", residual, exact.jacobian)
    model = pl.models.classification(lora, 7)
    fitted = fit(lora, model, split(texts, 3), empirical_terms)
    assert_same(fisher(fitted), scores.mT @ scores)


def test_mc_fisher_converges_to_the_exact_one() -> None:
    lora, texts = pl.lift(bert(3, num_layers=1)), batch(4, num_labels=3)
    exact = brute_force(lora, texts, 1.0)
    num_samples = 400
    terms = partial(mc_terms, num_samples=num_samples)
    fitted = fit(lora, pl.models.classification(lora, 4), split(texts, 2), terms)
    probs = exact.logits.softmax(-1)
    residuals = torch.eye(3, dtype=torch.float64) - probs[:, None]  # (N, label, C)
    # A random direction v: v' F v is a mean over draws of (v' s)^2, summed over data.
    for v in torch.randn(5, exact.jacobian.shape[-1], dtype=torch.float64):
        slopes = torch.einsum("nlc,ncd,d->nl", residuals, exact.jacobian, v)
        mean = (probs * slopes.square()).sum(1)
        variance = (probs * slopes**4).sum(1) - mean.square()
        standard_error = float((variance.sum() / num_samples).sqrt())
        assert_same(v @ exact.fisher @ v, mean.sum())
        assert abs(float(v @ fisher(fitted) @ v - mean.sum())) < 4 * standard_error


def test_tokens_are_terms_of_one_datum() -> None:
    # A language model's likelihood: the outcome of a datum is a sequence.
    lora = pl.lift(llama(None, num_layers=1, hidden_size=8))
    texts = batch(4, 5)
    texts["labels"] = texts["input_ids"].roll(-1, 1)

    def outputs(flat: Tensor) -> Tensor:
        with lora.bind(unflatten(flat, lora.weights())) as net:
            logits: Tensor = net(**inputs(texts)).logits[..., :3]
        return logits

    def model(labels: Tensor, **texts: Tensor) -> Tensor:
        mask = texts["attention_mask"].bool()
        logits = lora()(**texts).logits[..., :3]
        with pyro.plate("data", 4, subsample=logits):
            fn = dist.Categorical(logits=logits).mask(mask).to_event(1)
            return pyro.sample("y", fn, obs=labels % 3)

    fitted = fit(lora, model, split(texts, 2))
    flat = flatten(lora.weights())
    j = torch.autograd.functional.jacobian(outputs, flat)  # (N, T, C, D)
    p = outputs(flat).softmax(-1) * texts["attention_mask"][..., None]
    root = p.sqrt()[..., None] * (j - torch.einsum("ntc,ntcd->ntd", p, j)[:, :, None])
    expected = torch.einsum("ntcd,ntce->de", root, root)
    assert_same(fisher(fitted), expected, rtol=1e-5, atol=1e-5)  # float32 in its norms


def test_two_networks_in_one_model() -> None:
    first = pl.lift(bert(3, num_layers=1), name="first")
    second = pl.lift(bert(3, num_layers=1), name="second")
    texts = batch(5, num_labels=3)

    def model(labels: Tensor | None = None, **texts: Tensor) -> Tensor:
        logits = first()(**texts).logits + 2 * second()(**texts).logits
        with pyro.plate("data", 5, subsample=logits):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    passes = FisherPasses(
        model=model,
        networks=[first, second],
        values={**first.weights(), **second.weights()},
        sites={**first.sites, **second.sites},
        structure=pl.structures.Dense(),
        fisher_terms=exact_terms,
    )
    fit = passes.fit(split(texts, 2))
    one, two = brute_force(first, texts, 1.0), brute_force(second, texts, 1.0)
    j = torch.cat([one.jacobian, 2 * two.jacobian], -1)
    p = (one.logits + 2 * two.logits).softmax(-1)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    assert_same(fisher(fit), torch.einsum("ncd,nce,nef->df", j, hessian, j))


def test_several_complete_plates_are_refused() -> None:
    lora, texts = pl.lift(bert(4)), batch(4)

    def model(y: Tensor, **texts: Tensor) -> Tensor:
        loc = lora()(**texts).logits
        with pyro.plate("data", 4, dim=-2), pyro.plate("outputs", 4, dim=-1):
            return pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    one = {**inputs(texts), "y": torch.zeros(4, 4, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"'y'.*'data'.*to_event"):
        fit(lora, model, [one])


@pytest.mark.parametrize("raters", [2, 3, 4, 6])
def test_a_subsampled_plate_that_is_not_the_data_is_refused(raters: int) -> None:
    # With as many raters in the batch as data, nothing in the shapes tells them apart.
    lora, texts = pl.lift(bert(3, num_layers=1)), batch(4)

    def model(y: Tensor, **texts: Tensor) -> Tensor:
        logits = lora()(**texts).logits
        of_raters = pyro.plate("raters", 8, subsample=y, dim=-2)
        with of_raters, pyro.plate("data", 4, dim=-1):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    one = {**inputs(texts), "y": torch.randint(3, (raters, 4))}
    with pytest.raises(ValueError, match=r"'raters', 'data'.*'raters' is subsampled"):
        fit(lora, model, [one])


def test_a_second_plate_gives_terms_of_the_same_datum() -> None:
    lora, texts = pl.lift(bert(4)), batch(6)

    def model(y: Tensor, **texts: Tensor) -> Tensor:
        loc = lora()(**texts).logits
        data = pyro.plate("data", 6, subsample=loc, dim=-2)
        with data, pyro.plate("outputs", 4, dim=-1):
            return pyro.sample("y", dist.Normal(loc, 0.5), obs=y)

    y = torch.randn(6, 4, dtype=torch.float64)
    fitted = fit(lora, model, split({**texts, "y": y}, 2))
    j = brute_force(lora, texts, 1.0).jacobian.flatten(0, 1)
    assert_same(fisher(fitted), j.mT @ j / 0.25)


def test_outcomes_that_were_not_drawn_count_through_those_that_were() -> None:
    # The data's subsampling is divided out, that of a datum's outcomes isn't.
    lora, texts = pl.lift(bert(4)), batch(6)
    drawn = torch.tensor([0, 2])

    def model(y: Tensor, **texts: Tensor) -> Tensor:
        loc = lora()(**texts).logits
        data = pyro.plate("data", 6, subsample=loc, dim=-2)
        with data, pyro.plate("outputs", 4, subsample=drawn, dim=-1):
            fn = dist.Normal(loc[:, drawn], 0.5)
            return pyro.sample("y", fn, obs=y[:, drawn])

    y = torch.randn(6, 4, dtype=torch.float64)
    fitted = fit(lora, model, split({**texts, "y": y}, 2))
    exact = brute_force(lora, texts, 1.0)
    j = exact.jacobian[:, drawn].flatten(0, 1)
    assert_same(fisher(fitted), 2 * j.mT @ j / 0.25)
    log_prob = dist.Normal(exact.logits, 0.5).log_prob(y)[:, drawn].sum()
    assert_same(fitted.log_likelihood, 2 * log_prob)


@pytest.mark.parametrize(
    ("plate", "message"),
    [
        (
            None,
            r"hold 8 data, but site 'y' is in no plate.*of 4, would be all data.*"
            r"pyro\.plate\(\"data\", num_data, subsample=",
        ),
        (
            4,
            r"hold 8 data, but the plate 'data' of site 'y' has the size of a batch, 4"
            r".*pyro\.plate\(\"data\", num_data, subsample=",
        ),
        (7, r"hold 8 data, but the plate of site 'y' says 7\..*correct num_data"),
        (9, r"hold 8 data, but the plate of site 'y' says 9\..*correct num_data"),
    ],
)
def test_a_plate_that_is_missing_or_wrong_is_named(
    plate: int | None, message: str
) -> None:
    lora, texts = pl.lift(bert(3)), batch(8, num_labels=3)

    def model(labels: Tensor, **texts: Tensor) -> None:
        fn = dist.Categorical(logits=lora()(**texts).logits)
        if plate is None:
            pyro.sample("y", fn, obs=labels)
            return
        subsample = None if plate == len(labels) else labels
        with pyro.plate("data", plate, subsample=subsample):
            pyro.sample("y", fn, obs=labels)

    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
    with pytest.raises(ValueError, match=message):
        guide.laplace_approximation(split(texts, 4))
