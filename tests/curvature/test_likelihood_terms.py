"""Several observed sites and every likelihood, against sums over the full batch."""

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
from tests.curvature.gauss_newton import (
    assert_same,
    brute_force,
    fisher,
    fit,
    flatten,
    jacobian,
    precision_matrix,
    split,
)
from tests.curvature.test_cost import Passes
from tests.networks import batch, bert, inputs

pytestmark = pytest.mark.untrained

Batch = dict[str, Tensor]
BOTH = ("y", "z")


def two_outcomes(
    lora: pl.LiftedNetwork, num_data: int = 7, scale: float = 0.3
) -> Callable[..., None]:
    """A class of three, and a measurement where it isn't missing, scaled."""

    def model(labels: Tensor, z: Tensor, **texts: Tensor) -> None:
        outputs = lora()(**texts).logits
        loc = outputs[:, 3]
        with pyro.plate("data", num_data, subsample=outputs):
            pyro.sample("y", dist.Categorical(logits=outputs[..., :3]), obs=labels)
            with poutine.scale(scale=scale), poutine.mask(mask=z < 1):
                pyro.sample("z", dist.Normal(loc, 0.5), obs=z)

    return model


class TwoOutcomes:
    """The same by brute force: one class and one measurement for each of 7 texts."""

    def __init__(self, scale: float = 0.3) -> None:
        self.lora = pl.lift(bert(4, num_layers=1))
        self.texts = batch(7, num_labels=3)
        self.texts["z"] = torch.tensor([0.1, 2.0, -1.0, 0.3, 3.0, -0.2, 0.7]).double()
        self.model = two_outcomes(self.lora, scale=scale)
        network_inputs = {k: v for k, v in self.texts.items() if k != "z"}
        outputs, self.jacobian = jacobian(self.lora, network_inputs)
        self.probs = outputs[:, :3].softmax(-1)
        one_hot = torch.eye(3, dtype=torch.float64)
        self.residuals = one_hot - self.probs[:, None]  # of each label, (N, label, 3)
        weight = scale * (self.texts["z"] < 1).double()
        self.z_root = weight.sqrt() / 0.5  # (N,)
        self.z_residual = (self.texts["z"] - outputs[:, 3]) / 0.5
        self.log_likelihood = (
            self.probs.log().gather(1, self.texts["labels"][:, None]).sum()
            + (weight * dist.Normal(outputs[:, 3], 0.5).log_prob(self.texts["z"])).sum()
        )

    @property
    def fisher(self) -> Tensor:
        j, p = self.jacobian, self.probs
        hessian = torch.zeros(7, 4, 4, dtype=torch.float64)
        hessian[:, :3, :3] = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        hessian[:, 3, 3] = self.z_root.square()
        return torch.einsum("ncd,nce,nef->df", j, hessian, j)

    @property
    def scores(self) -> tuple[Tensor, Tensor]:
        """Of class and of measurement, by root of the scale, each (N, D)."""
        of_label = self.residuals[torch.arange(7), self.texts["labels"]]
        of_class = torch.einsum("nc,ncd->nd", of_label, self.jacobian[:, :3])
        size = self.z_root * self.z_residual
        return of_class, size[:, None] * self.jacobian[:, 3]

    @property
    def gradient(self) -> Tensor:
        of_class, of_z = self.scores
        weights = flatten(self.lora.weights())
        return of_class.sum(0) + 0.3**0.5 * of_z.sum(0) - weights


@pytest.mark.parametrize("batch_size", [1, 3, 7])
@pytest.mark.parametrize("names", [BOTH, ["z", "y"]])
def test_the_fisher_information_of_several_sites_adds_up(
    names: Any, batch_size: int
) -> None:
    exact = TwoOutcomes()
    batches = split(exact.texts, batch_size)
    fitted = fit(exact.lora, exact.model, batches, obs_site=names)
    assert_same(fisher(fitted), exact.fisher)
    assert_same(fitted.log_likelihood, exact.log_likelihood)
    assert fitted.obs_sites == tuple(names)


@pytest.mark.parametrize(
    "terms", [exact_terms, partial(mc_terms, num_samples=2), empirical_terms]
)
def test_gradient_of_several_sites(terms: Any) -> None:
    exact = TwoOutcomes()
    fitted = fit(exact.lora, exact.model, split(exact.texts, 3), terms, BOTH)
    assert_same(flatten(fitted.gradient), exact.gradient)


@pytest.mark.filterwarnings("ignore:The model observes")
def test_one_site_of_several() -> None:
    exact = TwoOutcomes()
    of_y, of_z, of_both = (
        fit(exact.lora, exact.model, split(exact.texts, 3), obs_site=name)
        for name in ("y", ("z",), BOTH)
    )
    assert_same(fisher(of_y) + fisher(of_z), fisher(of_both))
    assert (of_y.obs_sites, of_z.obs_sites) == (("y",), ("z",))


def test_the_empirical_score_of_a_datum_is_that_of_its_sites_together() -> None:
    exact = TwoOutcomes()
    fitted = fit(exact.lora, exact.model, split(exact.texts, 3), empirical_terms, BOTH)
    scores = sum(exact.scores)
    assert_same(fisher(fitted), torch.einsum("nd,ne->de", scores, scores))


def test_mc_draws_the_sites_of_a_datum_together() -> None:
    exact, num_samples = TwoOutcomes(), 200
    terms = partial(mc_terms, num_samples=num_samples)
    fitted = fit(exact.lora, exact.model, split(exact.texts, 4), terms, BOTH)
    p = exact.probs
    for v in torch.randn(5, exact.jacobian.shape[-1], dtype=torch.float64):
        # (v' s)^2 with s = s_y + s_z, independent, of mean zero
        slopes = torch.einsum(
            "nlc,ncd,d->nl", exact.residuals, exact.jacobian[:, :3], v
        )
        y2, y4 = (p * slopes.square()).sum(1), (p * slopes**4).sum(1)
        z2 = (exact.z_root * (exact.jacobian[:, 3] @ v)).square()
        fourth = y4 + 6 * y2 * z2 + 3 * z2.square()  # a normal's is 3 sd^4
        standard_error = ((fourth - (y2 + z2).square()).sum() / num_samples).sqrt()
        assert_same(v @ exact.fisher @ v, (y2 + z2).sum())
        assert abs(v @ fisher(fitted) @ v - (y2 + z2).sum()) < 4 * standard_error


@pytest.mark.parametrize(
    ("fisher", "passes"), [("exact", 2 + 1), ("mc", 2 + 1), ("empirical", 1 + 1)]
)
@pytest.mark.few(1)
def test_backward_passes_of_two_sites(fisher: Any, passes: int) -> None:
    # Exact: classes less one, and the measurement. Else: a sample each, and the score.
    exact, counter = TwoOutcomes(), Passes()
    guide = pl.AutoLaplace(
        exact.model,
        init_loc_fn=exact.lora.init_to_adapter(),
        fisher=fisher,
        num_fisher_samples=2,
        obs_site=BOTH,
    )
    guide.laplace_approximation(split(exact.texts, 4))
    with counter.counting(exact.lora.network):
        guide.laplace_approximation(split(exact.texts, 4))
    assert counter.forward == 2
    assert counter.backward == 2 * passes


def test_a_posterior_of_several_sites_predicts_the_one_that_is_named() -> None:
    lora, texts = pl.lift(bert(5, num_layers=1)), batch(7, num_labels=3)

    def model(labels: Any = None, other: Any = None, **texts: Tensor) -> None:
        outputs = lora()(**texts).logits
        with pyro.plate("data", 7, subsample=texts["input_ids"]):
            pyro.sample("y", dist.Categorical(logits=outputs[..., :3]), obs=labels)
            pyro.sample("z", dist.Categorical(logits=outputs[..., 3:]), obs=other)

    texts["other"] = torch.randint(2, (7,))
    guide = pl.AutoLaplace(
        model, init_loc_fn=lora.init_to_adapter(), obs_site=("y", "z")
    )
    posterior = guide.laplace_approximation(split(texts, 3))
    assert posterior.obs_site is None
    prediction = pl.predict(
        posterior, [inputs(texts)], model=model, num_samples=3, obs_site="y"
    )
    assert prediction.probs.shape == (7, 3)


@pytest.mark.filterwarnings("ignore:The best prior precision")
@pytest.mark.parametrize("structure", [pl.structures.Dense(), pl.structures.KFAC()])
def test_a_posterior_of_several_sites_is_linearised_for_each(structure: Any) -> None:
    exact = TwoOutcomes()
    guide = pl.AutoLaplace(
        exact.model,
        init_loc_fn=exact.lora.init_to_adapter(),
        structure=structure,
        obs_site=BOTH,
    )
    posterior = guide.laplace_approximation(split(exact.texts, 3))
    covariance = torch.linalg.inv(precision_matrix(posterior))
    of_class = exact.jacobian[:, :3] - exact.jacobian[:, :3].mean(1, keepdim=True)
    logits = posterior.linearized(exact.texts, obs_site="y")
    assert_same(
        logits.covariance_matrix, of_class @ covariance @ of_class.mT, rtol=1e-8
    )
    joint = posterior.linearized(exact.texts, obs_site="z", joint=True)
    of_z = exact.jacobian[:, 3]
    assert_same(
        joint.covariance_matrix[:, 0, :, 0], of_z @ covariance @ of_z.mT, rtol=1e-8
    )
    noise = torch.full((7, 1), 0.25).double()
    assert_same(joint.noise_variance, noise)
    with pytest.raises(ValueError, match=r"found \['y', 'z'\].*obs_site="):
        posterior.linearized(exact.texts)
    options: Any = {"objective": "nll", "batches": [exact.texts]}
    best = posterior.optimize_prior(**options, obs_site="y")
    other = posterior.optimize_prior(**options, obs_site="z")
    assert float(best.log_evidence()) != float(other.log_evidence())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (None, r"2 observed sites, \['y', 'z'\].*obs_site="),
        ((), "one observed site or several"),
        (("y", "y"), "each once"),
        (("y", "w"), r"'w' isn't observed; observed are \['y', 'z'\]"),
    ],
)
def test_names_that_do_not_fit(names: Any, message: str) -> None:
    exact = TwoOutcomes()
    with pytest.raises(ValueError, match=message):
        fit(exact.lora, exact.model, [exact.texts], obs_site=names)


def test_sites_of_different_data_are_refused() -> None:
    lora, texts = pl.lift(bert(3, num_layers=1)), batch(6, num_labels=3)

    def model(labels: Tensor, **texts: Tensor) -> None:
        logits = lora()(**texts).logits
        with pyro.plate("all", 6, subsample=logits):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)
        with pyro.plate("some", 2):
            pyro.sample(
                "z", dist.Normal(logits[:2, 0], 1.0), obs=logits[:2, 1].detach()
            )

    with pytest.raises(ValueError, match=r"'y': \(6, 6\), 'z': \(2, 2\).*one plate"):
        fit(lora, model, [texts], obs_site=BOTH)


COUNTS: list[tuple[str, Callable[[Tensor], Any], Tensor]] = [
    ("poisson", lambda f: dist.Poisson(f[:, 0].exp()), torch.tensor([2.0, 0.0, 4.0])),
    (
        "student-t",
        lambda f: dist.StudentT(4.0, f[:, 0], 0.5),
        torch.tensor([1.0, -9, 0]),
    ),
    (
        "ordinal",
        lambda f: dist.OrderedLogistic(f[:, 0], torch.tensor([-1.0, 0.5]).double()),
        torch.tensor([2, 0, 1]),
    ),
    (
        "negative-binomial",
        lambda f: dist.NegativeBinomial(3.0, logits=f[:, 0]),
        torch.tensor([2.0, 0.0, 4.0]),
    ),
    (
        "multinomial",
        lambda f: dist.Multinomial(3, logits=f),
        torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 3.0], [1.0, 1.0, 1.0]]),
    ),
    (
        "binomial",
        lambda f: dist.Binomial(4, logits=f[:, 0]),
        torch.tensor([2.0, 0.0, 4.0]),
    ),
    (
        "bernoulli-probs",
        lambda f: dist.Bernoulli(probs=f[:, 0].sigmoid()),
        torch.tensor([1.0, 0.0, 1.0]),
    ),
    (
        "soft labels",
        lambda f: dist.Multinomial(1, logits=f, validate_args=False),
        torch.tensor([[0.1, 0.2, 0.7], [1.0, 0.0, 0.0], [0.3, 0.3, 0.4]]),
    ),
    (
        "one-hot",
        lambda f: dist.OneHotCategorical(logits=f),
        torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]),
    ),
]


@pytest.mark.parametrize(("name", "likelihood", "labels"), COUNTS)
def test_each_likelihood_in_a_model(
    name: str, likelihood: Callable[[Tensor], Any], labels: Tensor
) -> None:
    lora, texts = pl.lift(bert(3, num_layers=1)), batch(3, num_labels=3)
    texts["labels"] = labels.double() if labels.is_floating_point() else labels

    def model(labels: Tensor, **texts: Tensor) -> None:
        fn = likelihood(lora()(**texts).logits)
        with pyro.plate("data", 3, subsample=labels):
            pyro.sample("y", fn, obs=labels)

    fitted = fit(lora, model, split(texts, 2))
    exact = brute_force(lora, {**texts, "labels": torch.zeros(3).long()}, 1.0)
    outputs = exact.logits.clone().requires_grad_()
    fn = likelihood(outputs)
    log_likelihood = fn.log_prob(texts["labels"]).sum()
    (score,) = torch.autograd.grad(log_likelihood, outputs)
    gradient = torch.einsum("nc,ncd->d", score, exact.jacobian) - exact.weights
    assert_same(flatten(fitted.gradient), gradient)
    assert_same(fitted.log_likelihood, log_likelihood.detach())
    # tests/likelihood/test_fisher_roots.py has the Hessian in the outputs.
    root = pl.likelihoods.of(likelihood(outputs)).root(texts["labels"])
    j_root = torch.stack(
        [
            torch.autograd.grad(column, outputs, retain_graph=True)[0]
            for column in (root.parameter[..., None] * root.root).sum(-2).sum(0)
        ]
    )
    rows = torch.einsum("mnc,ncd->mnd", j_root, exact.jacobian).flatten(0, 1)
    assert_same(fisher(fitted), rows.mT @ rows)


@pytest.mark.parametrize(
    "family", [dist.Normal, dist.Laplace, partial(dist.StudentT, 4)]
)
def test_a_learned_noise_is_one_thing_and_the_networks_another(family: Any) -> None:
    # Location and scale are uncorrelated, so the weights' information is as if fixed.
    lora, texts = pl.lift(bert(1, num_layers=1)), batch(5)
    texts["labels"] = torch.randn(5, dtype=torch.float64)

    def model(scale: Tensor, labels: Tensor, **texts: Tensor) -> None:
        loc = lora()(**texts).logits[:, 0]
        with pyro.plate("data", 5, subsample=labels):
            pyro.sample("y", family(loc, scale), obs=labels)

    fixed, learned = (
        fit(lora, partial(model, torch.tensor(0.5, requires_grad=on)), split(texts, 2))
        for on in (False, True)
    )
    assert_same(fisher(learned), fisher(fixed))
    assert_same(flatten(learned.gradient), flatten(fixed.gradient))
