"""The conformance table: four likelihoods, nine guides, seven objectives of Pyro."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from pyro import poutine
from pyro.infer import ELBO, SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoStructured,
)
from pyro.optim import Adam
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

import pyro_lora as pl
from tests.networks import batch, bert, llama

Model = Callable[..., None]
MakeGuide = Callable[..., Any]

NUM_DATA, BATCH_SIZE, NUM_PARTICLES, ALPHA = 20, 5, 2, 0.5


# The models, as a user writes them. "output" is there to be predicted.


def categorical(lora: pl.LiftedNetwork) -> Model:
    def model(
        input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> None:
        net = lora()
        logits = net(input_ids=input_ids, attention_mask=attention_mask).logits
        with pyro.plate("data", NUM_DATA, subsample=input_ids):
            pyro.deterministic("output", logits, event_dim=1)
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    return model


def bernoulli(lora: pl.LiftedNetwork) -> Model:
    def model(
        input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> None:
        net = lora()
        output = net(input_ids=input_ids, attention_mask=attention_mask).logits
        logits = output.squeeze(-1)  # (..., B)
        with pyro.plate("data", NUM_DATA, subsample=input_ids):
            pyro.deterministic("output", output, event_dim=1)
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=labels)

    return model


def normal(lora: pl.LiftedNetwork) -> Model:
    def model(
        input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> None:
        net = lora()
        sigma = pyro.sample("sigma", dist.LogNormal(-1.0, 0.5))
        output = net(input_ids=input_ids, attention_mask=attention_mask).logits
        mean = output.squeeze(-1)  # (..., B)
        with pyro.plate("data", NUM_DATA, subsample=input_ids):
            pyro.deterministic("output", output, event_dim=1)
            pyro.sample("y", dist.Normal(mean, sigma), obs=labels)

    return model


def language_model(lora: pl.LiftedNetwork) -> Model:
    def model(
        input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> None:
        net = lora()
        logits = net(input_ids=input_ids, attention_mask=attention_mask).logits
        tokens = dist.Categorical(logits=logits[..., :-1, :])  # (..., B, T - 1)
        real = attention_mask[:, 1:].bool()
        with pyro.plate("data", NUM_DATA, subsample=input_ids):
            pyro.deterministic("output", logits, event_dim=2)
            pyro.sample("y", tokens.mask(real).to_event(1), obs=labels)

    return model


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """A network, the model around it, its labels, and log p(y | output) in plain torch.

    ``log_prob`` takes the network's output, the texts with their labels and the noise's
    standard deviation, and gives one value for each datum, (B,).
    """

    network: Callable[[], PeftModel]
    model: Callable[[pl.LiftedNetwork], Model]
    labels: Callable[[dict[str, Tensor]], Tensor]
    log_prob: Callable[[Tensor, dict[str, Tensor], Tensor], Tensor]


def _token_log_prob(logits: Tensor, texts: dict[str, Tensor], _: Tensor) -> Tensor:
    loss = F.cross_entropy(logits[:, :-1].mT, texts["labels"], reduction="none")
    return -(loss * texts["attention_mask"][:, 1:]).sum(1)


SIZE: dict[str, Any] = {"num_layers": 2, "hidden_size": 8, "r": 2}
LIKELIHOODS = {
    "Categorical": Likelihood(
        network=partial(bert, 3, **SIZE),
        model=categorical,
        labels=lambda texts: texts["labels"],
        log_prob=lambda output, texts, _: (
            -F.cross_entropy(output, texts["labels"], reduction="none")
        ),
    ),
    "Bernoulli": Likelihood(
        network=partial(bert, 1, **SIZE),
        model=bernoulli,
        labels=lambda texts: (texts["labels"] > 0).double(),
        log_prob=lambda output, texts, _: (
            -F.binary_cross_entropy_with_logits(
                output.squeeze(1), texts["labels"], reduction="none"
            )
        ),
    ),
    "Normal": Likelihood(
        network=partial(llama, 1, **SIZE),
        model=normal,
        labels=lambda texts: texts["labels"] + 0.5,
        log_prob=lambda output, texts, sigma: torch.distributions.Normal(
            output.squeeze(1), sigma
        ).log_prob(texts["labels"]),
    ),
    "tokens": Likelihood(
        network=partial(llama, None, **SIZE),
        model=language_model,
        labels=lambda texts: texts["input_ids"][:, 1:],
        log_prob=_token_log_prob,
    ),
}


class Case:
    """One likelihood's lifted network, model and batch."""

    def __init__(self, name: str) -> None:
        likelihood = LIKELIHOODS[name]
        self.likelihood = likelihood
        self.network = likelihood.network()
        self.lora = pl.lift(self.network)
        self.model = likelihood.model(self.lora)
        self.texts = batch(BATCH_SIZE, num_labels=3)
        self.texts["labels"] = likelihood.labels(self.texts)
        self.shapes = {k: v.shape for k, v in self.lora.weights().items()}
        if name == "Normal":
            self.shapes["sigma"] = torch.Size()

    def output(self, weights: Mapping[str, Tensor]) -> Tensor:
        """What the network computes at one weight set, without Pyro or binding."""
        before = self.lora.weights()
        self.lora.load({site: weights[site] for site in self.lora.sites})
        texts = {k: v for k, v in self.texts.items() if k != "labels"}
        with torch.no_grad():
            output: Tensor = self.network(**texts).logits
        self.lora.load(before)
        return output

    def log_likelihood(self, values: Mapping[str, Tensor]) -> Tensor:
        """Log density of the labels for the full data set, a datum at a time, (B,)."""
        sigma = values.get("sigma", torch.tensor(1.0))
        log_prob = self.likelihood.log_prob(self.output(values), self.texts, sigma)
        return NUM_DATA / BATCH_SIZE * log_prob

    def log_prior(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Log density of each latent site."""
        found = {
            k: torch.distributions.Normal(0.0, 1.0).log_prob(values[k]).sum()
            for k in self.lora.sites
        }
        if "sigma" in values:
            log_normal = torch.distributions.LogNormal(-1.0, 0.5)
            found["sigma"] = log_normal.log_prob(values["sigma"])
        return found

    def log_joint(self, values: Mapping[str, Tensor]) -> Tensor:
        """Log density of the full data set and of all latent sites."""
        return sum(self.log_prior(values).values()) + self.log_likelihood(values).sum()


@cache
def lifted_case(likelihood: str) -> Case:
    """The same for every test: no algorithm may change a lifted network."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Case(likelihood)


def is_query(site: Mapping[str, Any]) -> bool:
    return "query" in site["name"] or "q_proj" in site["name"]


def auto_guide_list(model: Model, **settings: Any) -> AutoGuideList:
    guides = AutoGuideList(model)
    query = poutine.block(model, hide_fn=lambda site: not is_query(site))
    guides.append(AutoNormal(query, **settings))
    guides.append(AutoDelta(poutine.block(model, hide_fn=is_query), **settings))
    return guides


def auto_iaf_normal(model: Model, init_loc_fn: object) -> AutoIAFNormal:
    """It takes no starting point."""
    return AutoIAFNormal(model, hidden_dim=[200])


GUIDES: dict[str, MakeGuide] = {
    "AutoDelta": AutoDelta,
    "AutoNormal": AutoNormal,
    "AutoDiagonalNormal": AutoDiagonalNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": partial(AutoLowRankMultivariateNormal, rank=2),
    "AutoIAFNormal": auto_iaf_normal,
    "AutoGuideList": auto_guide_list,
    "AutoStructured": AutoStructured,
    "AutoNormalMessenger": AutoNormalMessenger,
}


def _vectorised(kind: Any, max_plate_nesting: int = 1, **settings: Any) -> ELBO:
    return kind(
        num_particles=NUM_PARTICLES,
        vectorize_particles=True,
        max_plate_nesting=max_plate_nesting,
        **settings,
    )


ELBOS: dict[str, ELBO] = {
    "Trace looped": Trace_ELBO(num_particles=NUM_PARTICLES),
    "Trace vectorised": _vectorised(Trace_ELBO),
    "Trace two plates": _vectorised(Trace_ELBO, 2),
    "MeanField looped": TraceMeanField_ELBO(num_particles=NUM_PARTICLES),
    "MeanField vectorised": _vectorised(TraceMeanField_ELBO),
    "Renyi looped": RenyiELBO(alpha=ALPHA, num_particles=NUM_PARTICLES),
    "Renyi vectorised": _vectorised(RenyiELBO, alpha=ALPHA),
}


def drops_a_density(likelihood: str, guide: str, elbo: str) -> bool:
    """Whether Pyro's mean-field ELBO is wrong for this guide.

    Pyro's KL(Delta, prior) forgets the Delta's ``log_density``. AutoStructured keeps
    its whole entropy there, other autoguides the Jacobian of a positive site. NumPyro
    had the same error: https://github.com/pyro-ppl/numpyro/pull/1625.
    """
    jacobian_elsewhere = ("AutoDelta", "AutoGuideList", "AutoNormalMessenger")
    constrained = likelihood == "Normal" and guide not in jacobian_elsewhere
    return elbo.startswith("MeanField") and (guide == "AutoStructured" or constrained)


def step_moves_all_parameters(
    model: Model, guide: Any, elbo: str, texts: dict[str, Tensor]
) -> None:
    svi = SVI(model, guide, Adam({"lr": 0.01}), ELBOS[elbo])
    svi.evaluate_loss(**texts)  # makes the parameters
    store = pyro.get_param_store()
    start = {k: v.detach().clone() for k, v in store.named_parameters()}
    svi.step(**texts)
    moved = {k: (v - start[k]).abs().max() for k, v in store.named_parameters()}
    # Adam's first step has length lr wherever there is a gradient.
    assert min(moved.values()) > 0.0099


class Draws(Messenger):
    """Records what a guide drew, and the distributions that it drew from."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: list[tuple[str, Any, Tensor]] = []

    def _pyro_post_sample(self, msg: Any) -> None:
        # The model, run after the guide, is replayed at the very same tensors.
        seen = any(msg["value"] is value for _, _, value in self.sites)
        if not (msg["is_observed"] or site_is_subsample(msg) or seen):
            self.sites.append((msg["name"], msg["fn"], msg["value"]))

    def particles(self, shapes: Mapping[str, torch.Size]) -> list[dict[str, Tensor]]:
        """The latent values of each particle, looped or vectorised."""
        values: dict[str, list[Tensor]] = {}
        for name, _, value in self.sites:
            if name in shapes:
                parts = value.detach().reshape(-1, *shapes[name]).unbind()
                values.setdefault(name, []).extend(parts)
        by_particle = zip(*values.values(), strict=True)
        return [dict(zip(values, parts, strict=True)) for parts in by_particle]

    def log_q(self) -> Tensor:
        """Log density of each particle, (K,)."""
        return self._by_particle(lambda fn, value: fn.log_prob(value))

    def log_density(self) -> Tensor:
        """What the guide's Deltas carry of it, (K,)."""
        return self._by_particle(
            lambda fn, value: fn.log_prob(value) if _is_delta(fn) else 0 * value.sum()
        )

    def _by_particle(self, log_prob: Any) -> Tensor:
        total: dict[str, list[Tensor]] = {}
        for name, fn, value in self.sites:
            terms = log_prob(fn, value).detach().reshape(-1)
            total.setdefault(name, []).append(terms)
        terms = [torch.cat(t).expand(NUM_PARTICLES) for t in total.values()]
        return torch.stack(terms).sum(0)


def _is_delta(fn: Any) -> bool:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return type(fn).__name__ == "Delta"


def log_joint_of_draws(case: Case, draws: Draws) -> Tensor:
    """Log joint density of every particle drawn, by plain PyTorch, (K,)."""
    values = draws.particles(case.shapes)
    assert len(values) == NUM_PARTICLES
    return torch.stack([case.log_joint(value) for value in values])


@contextmanager
def assert_unchanged(network: PeftModel) -> Iterator[None]:
    """Parameters and buffers are the same after the block, bit by bit."""

    def state() -> list[tuple[Any, ...]]:
        parameters = network.named_parameters()
        return [(name, id(p), p.requires_grad, p.grad) for name, p in parameters]

    before, training = state(), network.training
    values = {name: value.clone() for name, value in network.state_dict().items()}
    yield
    assert (state(), network.training) == (before, training)
    after = network.state_dict()
    assert list(after) == list(values)
    assert [name for name in values if not torch.equal(after[name], values[name])] == []


class ConformanceTable:
    """A plugin: ``pytest -rA`` ends in one line a guide, objectives by likelihood."""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter: Any) -> Iterator[None]:
        result = yield
        if terminalreporter.hasopt("p"):
            passed = Counter()
            for report in terminalreporter.stats.get("passed", []):
                test, _, row = report.nodeid.rpartition("[")
                key = test.rpartition("::")[2], *row.rstrip("]").split("-")[:2]
                passed[key] += 1
            terminalreporter.line(
                f"Of {len(ELBOS)} objectives, equal to plain PyTorch's + equal but for "
                "a density that Pyro drops:"
            )
            for guide in GUIDES:
                cells = [
                    f"{name} {passed['test_svi', name, guide]} + "
                    f"{passed['test_pyro_drops_a_density', name, guide]}"
                    for name in LIKELIHOODS
                ]
                terminalreporter.line(f"{guide:31}" + "   ".join(cells))
        return result


@contextmanager
def conformance_settings() -> Iterator[None]:
    """Pyro validates all it can; guides make layers of their own in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        with pyro.validation_enabled(True):
            yield
    finally:
        torch.set_default_dtype(torch.float32)
