"""A posterior over some of the sites, the others fixed at the mode."""

import copy
import math
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from pyro.optim import Adam
from torch import Tensor, nn
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora.curvature.structures import Structure
from tests.curvature.gauss_newton import (
    assert_same,
    blocks,
    brute_force,
    jacobian,
    laplace,
    split,
)
from tests.networks import batch, bert, inputs, llama

pytestmark = pytest.mark.untrained

HEAD = ["head.classifier.weight", "head.classifier.bias"]
QUERY = ["lora.bert.encoder.layer.attention.self.query.A", HEAD[0]]
STRUCTURES = [
    pl.structures.KFAC(),
    pl.structures.KFAC(reduce=True),
    pl.structures.EKFAC(),
    pl.structures.Diagonal(),
    pl.structures.Dense(),
]
TAU = 1 / 0.7**2


@pytest.fixture
def lora() -> pl.LiftedNetwork:
    return pl.lift(bert(3), prior=pl.priors.normal(scale=0.7))


def places_of(lora: pl.LiftedNetwork, sites: list[str]) -> Tensor:
    """Where the sites' weights are among all."""
    found = [torch.arange(p.start, p.stop) for s, _, p in blocks(lora) if s in sites]
    return torch.cat(found)


@pytest.mark.parametrize("sites", [HEAD, QUERY])
def test_it_is_the_full_posterior_given_the_other_sites(
    lora: pl.LiftedNetwork, sites: list[str]
) -> None:
    texts, others = batch(6, num_labels=3), batch(4, num_labels=3)
    exact = brute_force(lora, texts, TAU)
    places = places_of(lora, sites)
    precision = torch.linalg.inv(exact.covariance)[places][:, places]
    covariance = torch.linalg.inv(precision)  # of a Gaussian, given the rest
    posterior = laplace(lora, texts, 2, structure=pl.structures.Dense(), sites=sites)

    weights, mode = posterior.sample(3), posterior.mode()
    own = [site for site in lora.sites if site in sites]  # in the order of all
    flat = torch.cat([weights[s].flatten(1) for s in own], 1)
    mean = torch.cat([mode[s].flatten() for s in own])
    expected = dist.MultivariateNormal(mean, covariance).log_prob(flat)
    assert_same(posterior.log_prob(weights), expected)

    w = exact.weights[places]
    log_p = exact.logits.log_softmax(-1).gather(1, exact.labels[:, None]).sum()
    log_dets = 0.5 * len(w) * math.log(TAU) + 0.5 * torch.logdet(covariance)
    evidence = log_p - 0.5 * TAU * w.square().sum() + log_dets
    assert_same(posterior.log_evidence(), evidence)

    f, j = jacobian(lora, others)
    j = (j - j.mean(1, keepdim=True))[..., places]
    logits = posterior.linearized(others)
    assert_same(logits.mean, f - f.mean(1, keepdim=True))
    assert_same(logits.covariance_matrix, j @ covariance @ j.mT)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_last_layer_is_what_is_left_where_the_adapter_is_frozen(
    structure: Structure,
) -> None:
    texts, others = batch(6, num_labels=3), batch(4, num_labels=3)
    network = bert(3)
    frozen = copy.deepcopy(network)
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_("classifier" in name and parameter.requires_grad)
    alone = laplace(pl.lift(frozen), texts, 2, structure=structure)
    assert list(alone.mode()) == HEAD
    tuned = alone.optimize_prior(per="site").log_evidence()
    covariance = alone.linearized(others).covariance_matrix
    lora = pl.lift(network)
    for sites in (HEAD, "last_layer"):
        posterior = laplace(lora, texts, 2, structure=structure, sites=sites)
        assert_same(posterior.log_evidence(), alone.log_evidence())
        assert_same(posterior.optimize_prior(per="site").log_evidence(), tuned)
        assert_same(posterior.linearized(others).covariance_matrix, covariance)
        for site in HEAD:
            assert_same(posterior.variance()[site], alone.variance()[site])
            assert_same(posterior.prior_precision[site], alone.prior_precision[site])


def test_the_head_of_a_regression_is_bayesian_linear_regression() -> None:
    lora, texts = pl.lift(bert(1)), inputs(batch(9))
    y, sd = torch.randn(9).double(), 0.3

    def model(y: Tensor | None = None, **texts: Tensor) -> Tensor:
        loc = lora()(**texts).logits[..., 0]
        with pyro.plate("data", 9, subsample=loc):
            return pyro.sample("y", dist.Normal(loc, sd), obs=y)

    guide = pl.AutoLaplace(
        model,
        init_loc_fn=lora.init_to_adapter(),
        structure=pl.structures.Dense(),
        sites="last_layer",
    )
    posterior = guide.laplace_approximation([{**texts, "y": y}])
    # Of the head of weights e_i and bias 0, the output is feature i.
    units = {s: x.expand(16, *x.shape) for s, x in lora.weights().items()}
    units[HEAD[0]] = torch.eye(16).double()[:, None, None]
    units[HEAD[1]] = torch.zeros(16, 1, 1).double()
    with lora.bind(units) as net, torch.no_grad():
        features = net(**texts).logits[..., 0].mT  # (N, 16)
    design = torch.cat([features, torch.ones(9, 1)], 1)
    precision = design.mT @ design / sd**2 + torch.eye(17)
    variance = torch.cat([posterior.variance()[s].flatten() for s in HEAD])
    assert_same(variance, torch.linalg.inv(precision).diagonal())
    covariance = posterior.linearized(texts).covariance_matrix[:, 0, 0]
    expected = (design @ torch.linalg.inv(precision) @ design.mT).diagonal()
    assert_same(covariance, expected)


def test_as_a_guide_it_holds_the_other_sites(lora: pl.LiftedNetwork) -> None:
    texts = batch(6, num_labels=3)
    model = pl.models.classification(lora, 6)
    posterior = laplace(lora, texts, sites=HEAD)
    mode = lora.weights()
    sampled, draws, drawn = posterior(), posterior.sample(5), posterior.variance()
    for site, value in mode.items():
        assert sampled[site].shape == value.shape
        if site not in HEAD:
            assert torch.equal(sampled[site], value)
            assert torch.equal(draws[site], value.expand(5, *value.shape))
            assert torch.equal(drawn[site], torch.zeros_like(value))
        else:
            assert (sampled[site] != value).all()
            assert (draws[site].std(0) > 0).all()
    samples = Predictive(model, guide=posterior, num_samples=4)(**inputs(texts))
    assert samples["y"].shape == (4, 6)
    trace: Any = pyro.poutine.trace(posterior).get_trace()
    weights = {s: trace.nodes[s]["value"][None] for s in mode}
    assert_close(trace.log_prob_sum(), posterior.log_prob(weights)[0])
    weights[QUERY[0]] = weights[QUERY[0]] + 1
    assert posterior.log_prob(weights)[0] == -math.inf


def test_the_rest_of_the_library_takes_it(
    lora: pl.LiftedNetwork, tmp_path: Path
) -> None:
    texts = batch(6, num_labels=3)
    model = pl.models.classification(lora, 6)
    posterior = laplace(lora, texts, sites=HEAD).optimize_prior()
    expected = pl.predict(posterior, [texts], model=model, method="linearized")
    pl.save(posterior, tmp_path)
    loaded = pl.load(tmp_path, lora, model=model)
    assert isinstance(loaded, pl.LaplacePosterior)
    assert torch.equal(loaded.log_evidence(), posterior.log_evidence())
    prediction = pl.predict(loaded, [texts], model=model, method="linearized")
    assert torch.equal(prediction.probs, expected.probs)
    assert loaded.sample(2).keys() == lora.sites.keys()
    sampled = pl.predict(loaded, [texts], model=model, num_samples=3)
    assert sampled.probs.shape == (6, 3)
    tree = pl.to_datatree(loaded, model=model, batches=[texts], num_samples=4)
    log_likelihood = tree["log_likelihood"]["y"]
    assert dict(log_likelihood.sizes) == {"chain": 1, "draw": 4, "datum": 6}
    mixture = pl.MixturePosterior([posterior, loaded])
    mixed = pl.predict(mixture, [texts], model=model, method="linearized")
    assert_close(mixed.probs, expected.probs)
    draws = mixture.sample(3)
    assert_close(mixture.log_prob(draws), posterior.log_prob(draws))


def test_members_of_a_mixture_may_hold_other_values() -> None:
    texts = batch(6, num_labels=3)
    lora = pl.lift(bert(3))
    first = laplace(lora, texts, sites=HEAD)
    lora.load({s: x + 0.1 for s, x in lora.weights().items()})
    second = laplace(lora, texts, sites=HEAD)
    mixture = pl.MixturePosterior([first, second], [0.25, 0.75])
    draws = second.sample(2)
    expected = second.log_prob(draws) + math.log(0.75)
    assert_close(mixture.log_prob(draws), expected)


def test_another_prior_is_on_its_sites_alone(lora: pl.LiftedNetwork) -> None:
    posterior = laplace(lora, batch(6, num_labels=3), sites=HEAD)
    for changed in (posterior, posterior.with_prior_precision(2.0)):
        trace: Any = pyro.poutine.trace(changed.prior).get_trace(lora)
        assert set(changed.prior_precision) == set(HEAD)
        for site, value in lora.weights().items():
            is_fixed = isinstance(trace.nodes[site]["fn"], dist.Delta)
            assert is_fixed == (site not in HEAD)
            if is_fixed:
                assert torch.equal(trace.nodes[site]["value"], value)


def test_prior_parameters_are_trained_for_its_sites() -> None:
    def prior(lora: pl.LiftedNetwork) -> dict[str, Tensor]:
        scale = pyro.param("scale", torch.tensor(1.0).double())
        return {
            s: pyro.sample(s, dist.Normal(z, scale).to_event(z.ndim))
            for s, z in lora.zeros().items()
        }

    lora = pl.lift(bert(3), prior=prior)
    posterior = laplace(lora, batch(6, num_labels=3), sites=HEAD)
    best = posterior.optimize_prior(per="prior")
    expected = posterior.optimize_prior(per="all")
    assert_close(best.log_evidence(), expected.log_evidence(), rtol=1e-6, atol=1e-6)


def test_the_last_layer_takes_no_pass_through_the_network() -> None:
    network = bert(4)
    lora, texts = pl.lift(network), batch(6, num_labels=4)
    seen = []
    layer = network.base_model.model.bert.encoder.layer[-1]
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    layer.register_forward_hook(lambda *_: seen.append("forward"))
    laplace(lora, texts, sites="last_layer")
    assert "forward" in seen
    assert "backward" not in seen


def test_sites_that_are_not_lifted_are_named(lora: pl.LiftedNetwork) -> None:
    texts = batch(6, num_labels=3)
    with pytest.raises(ValueError, match=r"\['head'\] aren't lifted"):
        laplace(lora, texts, sites=["head", HEAD[0]])
    with pytest.raises(ValueError, match="sites is empty"):
        laplace(lora, texts, sites=[])


def test_a_last_layer_among_stacked_ones_is_refused() -> None:
    lora = pl.lift(llama(None, num_layers=2))

    def model(**texts: Tensor) -> None:
        logits = lora()(**inputs(texts)).logits[:, -1]
        with pyro.plate("data", 4, subsample=logits):
            pyro.sample("y", dist.Categorical(logits=logits), obs=texts["labels"])

    guide = pl.AutoLaplace(
        model, init_loc_fn=lora.init_to_adapter(), sites="last_layer"
    )
    with pytest.raises(ValueError, match=r"called last holds .*lora_B.*others, too"):
        guide.laplace_approximation([batch(4)])


def test_refits_are_refused(lora: pl.LiftedNetwork) -> None:
    texts = batch(6, num_labels=3)
    posterior = laplace(lora, texts, sites=HEAD)
    model = pl.models.classification(lora, 6)
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter(), sites=HEAD)
    with pytest.raises(ValueError, match=r"are fixed\. Fit without sites="):
        guide.refit(posterior, split(texts, 3), Adam({"lr": 1e-3}))


class Scaled(nn.Module):
    """A layer whose trained scale isn't that of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.linear(x)))
        return out


def test_the_other_sites_need_no_curvature() -> None:
    lora = pl.lift(Scaled().double())
    x, labels = torch.randn(5, 3).double(), torch.tensor([0, 1, 1, 0, 1])

    def model(x: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = lora()(x)
        with pyro.plate("data", 5, subsample=logits):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    guide = pl.AutoLaplace(
        model, init_loc_fn=lora.init_to_adapter(), sites="last_layer"
    )
    posterior = guide.laplace_approximation([{"x": x, "labels": labels}])
    assert set(posterior.prior_precision) == {"base.head.weight", "base.head.bias"}
