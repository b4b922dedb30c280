"""All priors: right names and shapes, under every way of running a Pyro model."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.infer.reparam import LocScaleReparam
from pyro.optim import Adam
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora.likelihood.model_trace import trace_at
from pyro_lora.priors import Prior
from tests.networks import batch, bert, classifier, inputs, particles


def nuclear(values: Tensor) -> Tensor:
    return values.sum(-1) / 3


def mixed() -> Prior:
    return pl.priors.by_site(
        {
            "*.query.*": pl.priors.rank_ard(),
            "*.value.*": pl.priors.rank_ard(0.5, centered=False),
            "head.*.weight": pl.priors.horseshoe(),
            "*": pl.priors.hierarchical(),
        }
    )


def earlier() -> Prior:
    lora = pl.lift(bert())
    posterior = pl.ParticlePosterior(particles(lora, 3), (lora,), None, None)
    return pl.priors.from_posterior(posterior)


PRIORS: dict[str, Callable[[], Prior]] = {
    "normal": pl.priors.normal,
    "normal, init": partial(pl.priors.normal, center="init"),
    "laplace": pl.priors.laplace,
    "student_t": partial(pl.priors.student_t, 3.0),
    "horseshoe": pl.priors.horseshoe,
    "horseshoe, rows": partial(pl.priors.horseshoe, per="row", centered=False),
    "hierarchical": pl.priors.hierarchical,
    "hierarchical, non-centred": partial(pl.priors.hierarchical, centered=False),
    "hierarchical, centred scales": partial(
        pl.priors.hierarchical, centered_scales=True
    ),
    "rank_ard": pl.priors.rank_ard,
    "rank_ard, non-centred": partial(pl.priors.rank_ard, centered=False),
    "spectral": partial(pl.priors.spectral, frobenius_scale=2.0, penalty=nuclear),
    "orthogonal": partial(pl.priors.orthogonal, 2.0, prior=pl.priors.hierarchical()),
    "from_posterior": earlier,
    "by_site": mixed,
}
each_prior = pytest.mark.parametrize("name", list(PRIORS))


def latents(model: Callable[..., Any], **batch: Tensor) -> dict[str, Tensor]:
    """One draw of the model's latent sites."""
    trace = poutine.trace(poutine.block(model, hide_fn=observed)).get_trace(**batch)
    return {name: trace.nodes[name]["value"] for name in trace.stochastic_nodes}


def observed(site: dict[str, Any]) -> bool:
    return site["type"] == "sample" and (site["is_observed"] or site_is_subsample(site))


@each_prior
def test_a_prior_samples_every_site_in_its_shape(name: str) -> None:
    lora = pl.lift(bert(), prior=PRIORS[name]())
    nodes = poutine.trace(lora).get_trace().nodes
    for site, value in lora.weights().items():
        assert nodes[site]["fn"].batch_shape == ()
        assert nodes[site]["fn"].event_shape == value.shape
        assert nodes[site]["value"].dtype == value.dtype
        assert nodes[site]["infer"]["lora"] == (lora,)
        assert torch.isfinite(nodes[site]["value"]).all()


@each_prior
def test_hyper_latents_have_names_that_stock_guides_can_use(name: str) -> None:
    lora = pl.lift(bert(), prior=PRIORS[name]())
    nodes = poutine.trace(lora).get_trace().nodes
    names = [n for n, node in nodes.items() if node["type"] == "sample"]
    assert [n for n in names if "$" in n or n.startswith("model.")] == []
    assert [(a, b) for a in names for b in names if b.startswith(a + ".")] == []
    for n in names:
        assert ("lora" in nodes[n]["infer"]) == (n in lora.sites)


@pytest.mark.grid
@each_prior
@pytest.mark.parametrize("parallel", [False, True])
def test_prior_predictive(name: str, parallel: bool) -> None:
    lora, texts = pl.lift(bert(), prior=PRIORS[name]()), inputs(batch())

    def model(**texts: Tensor) -> Tensor:
        logits = lora()(**texts).logits
        pyro.deterministic("logits", logits, event_dim=1)
        with pyro.plate("data", 5):
            y: Tensor = pyro.sample("y", dist.Categorical(logits=logits))
        return y

    draws = Predictive(model, num_samples=3, parallel=parallel)(**texts)
    assert draws["y"].shape == (3, 5)
    weights = {
        site: draws[site].reshape(3, *value.shape)
        for site, value in lora.weights().items()
    }
    with lora.bind(weights) as net:
        expected = net(**texts).logits
    assert_close(draws["logits"].reshape(3, 5, 2), expected, rtol=0, atol=1e-10)
    assert (expected[0] - expected[1]).abs().max() > 1e-6


@pytest.mark.grid
@each_prior
@pytest.mark.parametrize("max_plate_nesting", [1, 2])
def test_a_particle_plate_gives_each_particle_its_own_log_joint(
    name: str, max_plate_nesting: int
) -> None:
    lora, texts = pl.lift(bert(), prior=PRIORS[name]()), batch()
    model = classifier(lora)

    def vectorised(**texts: Tensor) -> None:
        with pyro.plate("particles", 3, dim=-1 - max_plate_nesting):
            model(**texts)

    draws = [latents(model, **texts) for _ in range(3)]
    together = {
        site: torch.stack([draw[site] for draw in draws]).reshape(
            3, *[1] * max_plate_nesting, *value.shape
        )
        for site, value in draws[0].items()
    }
    trace = trace_at(vectorised, together, texts)
    trace.compute_log_prob()
    log_prob = sum(
        node["log_prob"].reshape(3, -1).sum(1)
        for node in trace.nodes.values()
        if node["type"] == "sample" and not site_is_subsample(node)
    )
    expected = [trace_at(model, draw, texts).log_prob_sum() for draw in draws]
    assert_close(log_prob, torch.stack(expected), rtol=1e-10, atol=1e-10)


@each_prior
def test_factors_and_reparametrised_sites_are_no_latents(name: str) -> None:
    lora = pl.lift(bert(), prior=PRIORS[name]())
    trace = poutine.trace(lora).get_trace()
    for n, node in trace.nodes.items():
        if site_is_factor(node):
            assert n.startswith("prior.")
            assert node["fn"].log_factor.shape == ()
        if n.endswith("_decentered"):
            site = trace.nodes[n.removesuffix("_decentered")]
            assert site["is_observed"]
            assert site["infer"]["_deterministic"]


@pytest.mark.grid
@each_prior
@pytest.mark.parametrize("guide", [AutoDelta, AutoNormal])
def test_stock_guides_train_all_latents(
    name: str, guide: Callable[..., AutoDelta | AutoNormal]
) -> None:
    lora, texts = pl.lift(bert(), prior=PRIORS[name]()), batch()
    model = classifier(lora)
    auto = guide(model, init_loc_fn=lora.init_to_adapter())
    elbo = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, auto, Adam({"lr": 0.01}), elbo)
    assert torch.tensor([svi.step(**texts) for _ in range(2)]).isfinite().all()
    start, median = lora.weights(), auto.median(**texts)
    expected = latents(model, **texts)
    assert median.keys() == expected.keys()
    for site, value in median.items():
        assert value.shape == expected[site].shape
        assert value.isfinite().all()
        if site in start:
            assert 0.005 < (value - start[site]).abs().max() < 0.05
    draws = Predictive(model, guide=auto, num_samples=2, parallel=True)
    assert draws(**inputs(texts))["y"].shape == (2, 5)


@pytest.mark.parametrize(
    "name", ["horseshoe, rows", "rank_ard", "spectral", "from_posterior", "by_site"]
)
def test_nuts_moves_all_latents(name: str) -> None:
    lora, texts = pl.lift(bert(), prior=PRIORS[name]()), batch()
    kernel = NUTS(
        classifier(lora, num_data=5),
        step_size=1e-3,
        adapt_step_size=False,
        max_tree_depth=2,
    )
    mcmc = MCMC(kernel, num_samples=2, warmup_steps=1, disable_progbar=True)
    mcmc.run(**texts)
    samples = mcmc.get_samples()
    expected = latents(classifier(lora), **texts)
    assert samples.keys() == expected.keys()
    for site, draws in samples.items():
        assert draws.shape == (2, *expected[site].shape)
        assert draws.isfinite().all()


@pytest.mark.parametrize("parallel", [False, True])
def test_a_guides_draws_of_scales_and_noise_belong_together(parallel: bool) -> None:
    lora, texts = pl.lift(bert(), prior=pl.priors.hierarchical(centered=False)), batch()
    model = classifier(lora)
    guide = AutoNormal(model, init_loc_fn=lora.init_to_adapter(), init_scale=0.5)
    guide(**texts)
    predictive = Predictive(model, guide=guide, num_samples=4, parallel=parallel)
    draws = {k: v.squeeze(1) for k, v in predictive(**texts).items() if v.ndim > 1}
    first = next(iter(lora.sites))
    spread = draws[f"prior.layer_spread.{first}"].reshape(4, 1)
    roles = draws[f"prior.role_log_scale.{first}"].reshape(4, -1)
    for role, (site, zeros) in zip(roles.T, lora.zeros().items(), strict=True):
        noise = draws[f"prior.log_scale.{site}_decentered"].reshape(4, len(zeros))
        log_scale = role[:, None] + spread * noise
        scale = log_scale.exp().reshape(4, len(zeros), *[1] * (zeros.ndim - 1))
        z = draws[f"{site}_decentered"].reshape(4, *zeros.shape)
        draw = draws[site].reshape(4, *zeros.shape)
        assert_close(draw, scale * z, rtol=1e-10, atol=0)


@pytest.mark.grid
@pytest.mark.parametrize(
    "name",
    ["normal", "laplace", "student_t", "horseshoe", "hierarchical", "rank_ard"],
)
@pytest.mark.parametrize("centered", [0.0, None])
def test_sites_can_be_decentered_by_pyro_itself(
    name: str, centered: float | None
) -> None:
    lora, texts = pl.lift(bert(), prior=PRIORS[name]()), batch()
    config = {site: LocScaleReparam(centered) for site in lora.sites}
    model = poutine.reparam(classifier(lora), config=config)
    guide = AutoNormal(model, init_loc_fn=lora.init_to_adapter())
    svi = SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO())
    assert torch.tensor([svi.step(**texts) for _ in range(2)]).isfinite().all()
    medians = guide.median(**texts)
    assert {f"{site}_decentered" for site in lora.sites} <= medians.keys()
    draws = Predictive(model, guide=guide, num_samples=4)(**inputs(texts))
    for site, value in lora.weights().items():
        assert draws[site].shape == (4, 1, *value.shape)


def test_two_networks_in_one_model_share_no_hyper_latent() -> None:
    prior = mixed()
    one, two = pl.lift(bert(), prior=prior), pl.lift(bert(), prior=prior, name="second")

    def model() -> None:
        one()
        two()

    nodes = poutine.trace(model).get_trace().nodes
    hypers = [n for n in nodes if n.startswith("prior.")]
    assert len(hypers) > 10
    second = [n for n in hypers if ".second." in n]
    assert sorted(n.replace(".second.", ".") for n in second) == sorted(
        set(hypers) - set(second)
    )


def test_a_prior_is_any_function_that_samples_the_sites() -> None:
    def prior(lora: pl.LiftedNetwork) -> dict[str, Tensor]:
        scale = pyro.sample("scale", pyro.distributions.HalfNormal(1.0))
        return {
            site: scale
            * pyro.sample(
                site, pyro.distributions.Normal(zeros, zeros + 1).to_event(zeros.ndim)
            )
            for site, zeros in lora.zeros().items()
        }

    network, texts = bert(), inputs(batch())
    lora = pl.lift(network, prior=prior)
    weights = {**lora.weights(), "scale": torch.tensor(2.0, dtype=torch.float64)}
    nodes = trace_at(classifier(lora), weights, texts).nodes
    assert "lora" not in nodes["scale"]["infer"]  # it is no lifted site
    logits = nodes["y"]["fn"].logits
    with lora.bind({site: 2 * value for site, value in lora.weights().items()}) as net:
        expected = net(**texts).logits.log_softmax(-1)
    assert_close(logits, expected, rtol=0, atol=1e-12)
