"""Stock Pyro runs on a lifted network, gets it right, and leaves the network alone."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from peft import PeftModel
from pyro import poutine
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    Importance,
    Predictive,
    Trace_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoLowRankMultivariateNormal,
    AutoNormal,
)
from pyro.infer.inspect import get_dependencies, get_model_relations
from pyro.optim import Adam, ClippedAdam
from torch import Tensor, nn
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora.lifting.model_trace import trace_at
from tests.networks import batch, bert, classifier, inputs, llama, particles

Model = Callable[..., Any]
Guide = Callable[..., Any]


@pytest.fixture
def network() -> PeftModel:
    return bert(num_layers=1, hidden_size=8)


def auto_guide_list(model: Model, *, init_loc_fn: Any) -> AutoGuideList:
    guides = AutoGuideList(model)
    body = poutine.block(model, hide_fn=is_head)
    head = poutine.block(model, hide_fn=lambda site: not is_head(site))
    guides.append(AutoNormal(body, init_loc_fn=init_loc_fn))
    guides.append(AutoDelta(head, init_loc_fn=init_loc_fn))
    return guides


def is_head(site: dict[str, Any]) -> bool:
    return bool(site["name"].startswith("head."))


GUIDES: dict[str, Guide] = {
    "AutoDelta": AutoDelta,
    "AutoNormal": AutoNormal,
    "AutoDiagonalNormal": AutoDiagonalNormal,
    "AutoLowRankMultivariateNormal": partial(AutoLowRankMultivariateNormal, rank=2),
    "AutoGuideList": auto_guide_list,
}
ELBOS = {
    "looped": Trace_ELBO(num_particles=3),
    "vectorised": Trace_ELBO(
        num_particles=3, vectorize_particles=True, max_plate_nesting=1
    ),
    "two plates": Trace_ELBO(
        num_particles=3, vectorize_particles=True, max_plate_nesting=2
    ),
    "mean field": TraceMeanField_ELBO(),
}


@contextmanager
def unchanged(network: PeftModel, folder: Path) -> Iterator[None]:
    """Everything that PEFT sees is the same after the block, bit by bit."""

    def state(name: str) -> tuple[Any, ...]:
        network.save_pretrained(folder / name, save_embedding_layers=False)
        files = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (folder / name).iterdir()
        }
        parameters = [
            (name, p.requires_grad, p.grad) for name, p in network.named_parameters()
        ]
        return files, parameters, list(network.state_dict()), network.training

    values = {name: value.clone() for name, value in network.state_dict().items()}
    before = state("before")
    yield
    assert state("after") == before
    after = network.state_dict()
    assert [name for name in values if not torch.equal(after[name], values[name])] == []


# Stochastic variational inference and prediction.


@pytest.mark.parametrize("elbo", list(ELBOS))
@pytest.mark.parametrize("guide_name", list(GUIDES))
def test_svi_and_predictive(
    guide_name: str, elbo: str, network: PeftModel, tmp_path: Path
) -> None:
    texts = batch()
    lora = pl.lift(network)
    model = classifier(lora)
    with unchanged(network, tmp_path):
        guide = GUIDES[guide_name](model, init_loc_fn=lora.init_to_adapter())
        svi = SVI(model, guide, Adam({"lr": 0.01}), ELBOS[elbo])
        losses = [svi.step(**texts) for _ in range(2)]
        assert torch.tensor(losses).isfinite().all()
        medians = guide.median(**texts)
        # Adam's first steps have length lr: every weight has moved.
        moved = {k: (medians[k] - v).abs().max() for k, v in lora.weights().items()}
        assert min(moved.values()) > 0.005
        for parallel in (False, True):
            predictive = Predictive(
                model, guide=guide, num_samples=4, parallel=parallel
            )
            assert predictive(**inputs(texts))["y"].shape[::4] == (4,)
    names = list(pyro.get_param_store())
    assert names
    assert [name for name in names if not name.startswith("Auto")] == []


def test_lifting_leaves_the_param_store_empty(network: PeftModel) -> None:
    lora = pl.lift(network)
    model = classifier(lora)
    texts = batch()
    trace_at(model, lora.weights(), texts)
    Predictive(model, num_samples=2, parallel=True)(**inputs(texts))
    with lora.bind(particles(lora, 3)) as net:
        net(**inputs(texts))
    assert list(pyro.get_param_store()) == []


@pytest.mark.parametrize("kind", [bert, llama])
@pytest.mark.parametrize("max_plate_nesting", [1, 2])
def test_a_particle_plate_gives_each_particle_its_own_likelihood(
    kind: Callable[[int], PeftModel], max_plate_nesting: int
) -> None:
    lora = pl.lift(kind(3))
    texts, model = batch(num_labels=3), classifier(lora)
    weights = particles(lora, 4, *[1] * max_plate_nesting)

    def vectorised(**kwargs: Tensor) -> None:
        with pyro.plate("particles", 4, dim=-1 - max_plate_nesting):
            model(**kwargs)

    trace = trace_at(vectorised, weights, texts)
    trace.compute_log_prob()
    together = trace.nodes["y"]["log_prob"].reshape(4, 5)
    for i in range(4):
        one = {k: v[i].reshape(lora.weights()[k].shape) for k, v in weights.items()}
        alone = trace_at(model, one, texts)
        alone.compute_log_prob()
        assert_close(together[i], alone.nodes["y"]["log_prob"], rtol=0, atol=1e-10)
        for site in lora.sites:
            expected = alone.nodes[site]["log_prob"]
            log_prob = trace.nodes[site]["log_prob"].flatten()[i]
            assert_close(log_prob, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_uses_each_draw(network: PeftModel, parallel: bool) -> None:
    texts = inputs(batch())
    lora = pl.lift(network)
    draws = particles(lora, 3)

    def model(**kwargs: Tensor) -> None:
        logits = lora()(**kwargs).logits
        pyro.deterministic("logits", logits, event_dim=1)
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Categorical(logits=logits))

    found = Predictive(model, draws, parallel=parallel)(**texts)["logits"]
    with lora.bind(draws) as net:
        expected = net(**texts).logits
    assert_close(found.reshape(3, 5, 2), expected, rtol=0, atol=1e-12)


def test_every_site_knows_its_lifted_network(network: PeftModel) -> None:
    one, two = pl.lift(network), pl.lift(llama(), name="second")
    texts = inputs(batch())

    def model() -> None:
        pyro.sample("noise", dist.Normal(0.0, 1.0))
        one()(**texts)
        two()(**texts)

    nodes = poutine.trace(model).get_trace().nodes
    for lora in (one, two):
        for site in lora.sites:
            assert nodes[site]["infer"]["lora"] == (lora,)
    assert "lora" not in nodes["noise"]["infer"]


# Other engines.


def test_importance(network: PeftModel, tmp_path: Path) -> None:
    texts = batch()
    lora = pl.lift(network)
    model = classifier(lora)
    with unchanged(network, tmp_path):
        guide = AutoNormal(model, init_loc_fn=lora.init_to_adapter(), init_scale=0.01)
        run = Importance(model, guide, num_samples=3).run(**texts)
    assert torch.stack(run.log_weights).isfinite().all()
    assert run.exec_traces[0].nodes.keys() >= {"y", *lora.sites}


def test_nuts(network: PeftModel, tmp_path: Path) -> None:
    texts = batch()
    lora = pl.lift(network)
    start = lora.weights()
    with unchanged(network, tmp_path):
        mcmc = MCMC(
            NUTS(
                classifier(lora, num_data=5),
                step_size=0.01,
                adapt_step_size=False,
                max_tree_depth=3,
            ),
            num_samples=3,
            warmup_steps=1,
            initial_params={site: value.clone() for site, value in start.items()},
            disable_progbar=True,
        )
        mcmc.run(**texts)
        samples = mcmc.get_samples()
    assert samples.keys() == lora.sites.keys()
    for site, draws in samples.items():
        assert draws.shape == (3, *start[site].shape)
        assert (draws[0] - draws[2]).abs().sum() > 0


def test_get_dependencies(network: PeftModel, tmp_path: Path) -> None:
    texts = batch()
    lora = pl.lift(network)
    with unchanged(network, tmp_path):
        dependencies = get_dependencies(classifier(lora), model_kwargs=texts)
        relations = get_model_relations(classifier(lora), model_kwargs=texts)
    assert set(relations["sample_sample"]["y"]) == set(lora.sites)  # render_model's
    assert dependencies["prior_dependencies"]["y"].keys() == {"y", *lora.sites}


def test_two_networks_in_one_model() -> None:
    texts = batch()
    one, two = pl.lift(bert()), pl.lift(bert(), name="second")

    def model(labels: Tensor, **kwargs: Tensor) -> Tensor:
        logits = one()(**kwargs).logits + two()(**kwargs).logits
        with pyro.plate("data", 5):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    trace = trace_at(model, one.weights() | two.weights(), texts)
    expected = sum(lora.network(**inputs(texts)).logits for lora in (one, two))
    found = trace.nodes["y"]["fn"].logits
    assert_close(found, expected.log_softmax(-1), rtol=0, atol=1e-12)


# A convex toy: linear regression through a lifted nn.Linear, posterior known.

NOISE, PRIOR_SCALE = 0.5, 1.5


class Regression:
    def __init__(self) -> None:
        self.x = torch.randn(20, 3, dtype=torch.float64)
        self.y = torch.randn(20, 2, dtype=torch.float64) + self.x[:, :2]
        self.lora = pl.lift(
            nn.Linear(3, 2).double(), prior=pl.priors.normal(PRIOR_SCALE)
        )

    def model(self) -> None:
        mean = self.lora()(self.x)  # (..., 20, 2)
        with pyro.plate("data", 20):
            pyro.sample("y", dist.Normal(mean, NOISE).to_event(1), obs=self.y)

    def posterior(self) -> tuple[Tensor, Tensor]:
        """Mean (4, 2) and precision (4, 4) of weights and bias, one column a row."""
        design = torch.cat([self.x, torch.ones(20, 1, dtype=torch.float64)], 1)
        precision = design.T @ design / NOISE**2 + torch.eye(4) / PRIOR_SCALE**2
        return torch.linalg.solve(precision, design.T @ self.y / NOISE**2), precision

    def columns(self, weights: dict[str, Tensor]) -> Tensor:
        return torch.cat([weights["base.weight"][0].T, weights["base.bias"]])


def test_auto_delta_finds_the_exact_mode() -> None:
    toy = Regression()
    guide = AutoDelta(toy.model, init_loc_fn=toy.lora.init_to_adapter())
    optimizer = ClippedAdam({"lr": 0.1, "lrd": 0.98})
    svi = SVI(toy.model, guide, optimizer, Trace_ELBO())
    for _ in range(400):
        svi.step()
    mean, _ = toy.posterior()
    assert_close(toy.columns(guide.median()), mean, rtol=0, atol=1e-4)


def test_auto_normal_finds_the_exact_posterior() -> None:
    toy = Regression()
    guide = AutoNormal(toy.model, init_loc_fn=toy.lora.init_to_adapter())
    elbo = TraceMeanField_ELBO(
        num_particles=32, vectorize_particles=True, max_plate_nesting=1
    )
    optimizer = ClippedAdam({"lr": 0.1, "lrd": 0.99})
    svi = SVI(toy.model, guide, optimizer, elbo)
    for _ in range(700):
        svi.step()
    mean, precision = toy.posterior()
    # The best factorised Gaussian has the exact mean, and precision diag(P).
    expected = precision.diagonal().rsqrt()[:, None].expand(4, 2)
    quantiles = guide.quantiles([0.15865525, 0.84134475])
    low = toy.columns({site: value[0] for site, value in quantiles.items()})
    high = toy.columns({site: value[1] for site, value in quantiles.items()})
    # A gradient has the standard error of 32 draws; the last steps, of length
    # 0.1 * 0.99^700 = 9e-5, average it away.
    assert_close((low + high) / 2, mean, rtol=0, atol=0.01)
    assert_close((high - low) / 2, expected, rtol=0.05, atol=0)


def test_nuts_finds_the_exact_posterior() -> None:
    toy = Regression()
    mcmc = MCMC(NUTS(toy.model), num_samples=150, warmup_steps=50, disable_progbar=True)
    mcmc.run()
    samples = mcmc.get_samples()
    mean, precision = toy.posterior()
    deviation = precision.inverse().diagonal().sqrt()[:, None]
    found = toy.columns({site: value.mean(0) for site, value in samples.items()})
    # Standard error at least deviation / sqrt(150); NUTS draws are nearly independent.
    assert ((found - mean) / deviation).abs().max() < 5 / 150**0.5
