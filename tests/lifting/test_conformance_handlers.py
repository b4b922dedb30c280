"""Pyro's effect handlers, reparametrisation and inspection on every likelihood."""

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.infer.inspect import get_dependencies, render_model
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor
from torch.testing import assert_close

import pyro_lora as pl
from tests.lifting.conformance import (
    BATCH_SIZE,
    LIKELIHOODS,
    NUM_DATA,
    Case,
    assert_unchanged,
    conformance_settings,
    lifted_case,
    step_moves_all_parameters,
)
from tests.networks import particles

on_each_likelihood = pytest.mark.parametrize("likelihood", list(LIKELIHOODS))


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    with conformance_settings():
        yield


def trace_of(case: Case, model: Callable[..., Any]) -> Any:
    with assert_unchanged(case.network):
        trace = poutine.trace(model).get_trace(**case.texts)
    trace.compute_log_prob()
    return trace


def some_values(case: Case, *lead: int) -> dict[str, Tensor]:
    values = particles(case.lora, *lead)
    if "sigma" in case.shapes:
        values["sigma"] = 0.5 + torch.rand(lead)
    return values


def values_of(case: Case, trace: Any) -> dict[str, Tensor]:
    return {site: trace.nodes[site]["value"] for site in case.shapes}


def assert_output(case: Case, trace: Any, values: dict[str, Tensor]) -> None:
    output = trace.nodes["output"]["value"]
    assert_close(output, case.output(values), rtol=0, atol=1e-10)


# Effect handlers.


@on_each_likelihood
def test_condition_on_all_sites(likelihood: str) -> None:
    case = lifted_case(likelihood)
    values = some_values(case)
    trace = trace_of(case, poutine.condition(case.model, values))
    assert {s for s in case.shapes if trace.nodes[s]["is_observed"]} == {*case.shapes}
    assert_output(case, trace, values)
    expected = case.log_joint(values)
    assert_close(trace.log_prob_sum(), expected, rtol=1e-10, atol=0)


@on_each_likelihood
def test_condition_on_one_site(likelihood: str) -> None:
    case = lifted_case(likelihood)
    first, *others = case.shapes
    value = some_values(case)[first]
    trace = trace_of(case, poutine.condition(case.model, {first: value}))
    assert trace.nodes[first]["value"] is value
    assert [s for s in others if trace.nodes[s]["is_observed"]] == []
    assert_output(case, trace, values_of(case, trace))
    expected = case.log_joint(values_of(case, trace))
    assert_close(trace.log_prob_sum(), expected, rtol=1e-10, atol=0)


@on_each_likelihood
def test_do_reaches_the_network_but_not_the_prior(likelihood: str) -> None:
    case = lifted_case(likelihood)
    first, *_ = case.shapes
    value = some_values(case)[first]
    trace = trace_of(case, poutine.do(case.model, {first: value}))
    fresh = values_of(case, trace)  # what the prior drew, used nowhere
    assert not torch.equal(fresh[first], value)
    assert_output(case, trace, fresh | {first: value})
    log_prior = sum(case.log_prior(fresh).values())
    expected = log_prior + case.log_likelihood(fresh | {first: value}).sum()
    assert_close(trace.log_prob_sum(), expected, rtol=1e-10, atol=0)


@on_each_likelihood
def test_block_hides_sites_that_still_reach_the_network(likelihood: str) -> None:
    case = lifted_case(likelihood)
    hidden, *others = case.shapes
    values = some_values(case)
    model = poutine.block(poutine.condition(case.model, values), hide=[hidden])
    trace = trace_of(case, model)
    assert hidden not in trace.nodes
    assert trace.nodes.keys() >= {"y", *others}
    assert_output(case, trace, values)
    expected = case.log_joint(values) - case.log_prior(values)[hidden]
    assert_close(trace.log_prob_sum(), expected, rtol=1e-10, atol=0)


@on_each_likelihood
def test_mask_removes_densities_only(likelihood: str) -> None:
    case = lifted_case(likelihood)
    values = some_values(case)
    model = poutine.condition(case.model, values)
    trace = trace_of(case, poutine.mask(model, mask=False))
    assert_output(case, trace, values)
    assert float(trace.log_prob_sum()) == 0


@on_each_likelihood
def test_scale_multiplies_densities_only(likelihood: str) -> None:
    case = lifted_case(likelihood)
    values = some_values(case)
    model = poutine.condition(case.model, values)
    trace = trace_of(case, poutine.scale(model, scale=0.25))
    assert_output(case, trace, values)
    expected = case.log_joint(values) / 4
    assert_close(trace.log_prob_sum(), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("max_plate_nesting", [1, 2])
@on_each_likelihood
def test_a_particle_plate_gives_each_particle_its_own_likelihood(
    likelihood: str, max_plate_nesting: int
) -> None:
    case = lifted_case(likelihood)
    values = some_values(case, 4, *[1] * max_plate_nesting)

    def vectorised(**texts: Tensor) -> None:
        with pyro.plate("particles", 4, dim=-1 - max_plate_nesting):
            case.model(**texts)

    trace = trace_of(case, poutine.condition(vectorised, values))
    for i in range(4):
        one = {site: values[site][i].reshape(v) for site, v in case.shapes.items()}
        log_prob = trace.nodes["y"]["log_prob"].reshape(4, BATCH_SIZE)[i]
        assert_close(log_prob, case.log_likelihood(one), rtol=1e-10, atol=0)
        for site, expected in case.log_prior(one).items():
            log_prob = trace.nodes[site]["log_prob"].flatten()[i]
            assert_close(log_prob, expected, rtol=1e-10, atol=0)


def test_padded_tokens_and_masked_texts_do_not_count() -> None:
    case = lifted_case("tokens")
    keep = torch.tensor([True, True, False, True, False])

    def model(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> None:
        logits = case.lora()(input_ids=input_ids, attention_mask=attention_mask).logits
        tokens = dist.Categorical(logits=logits[..., :-1, :])
        real = attention_mask[:, 1:].bool()
        with pyro.plate("data", BATCH_SIZE), poutine.mask(mask=keep):
            pyro.sample("y", tokens.mask(real).to_event(1), obs=labels)

    values = some_values(case)
    trace = trace_of(case, poutine.condition(model, values))
    log_prob = trace.nodes["y"]["log_prob"]
    expected = case.log_likelihood(values) * keep * BATCH_SIZE / NUM_DATA
    assert_close(log_prob, expected, rtol=1e-10, atol=0)
    padding = case.texts["attention_mask"][:, 1:] == 0
    assert padding.any()
    texts = case.texts | {"labels": case.texts["labels"].where(~padding, 7)}
    other = poutine.trace(poutine.condition(model, values)).get_trace(**texts)
    other.compute_log_prob()
    assert torch.equal(other.nodes["y"]["log_prob"], log_prob)


# Reparametrisation.

SCALE = 2.0


@cache
def lifted_with_wide_prior(likelihood: str) -> pl.LiftedNetwork:
    return pl.lift(LIKELIHOODS[likelihood].network(), prior=pl.priors.normal(SCALE))


def decentred(likelihood: str, centered: float | None) -> tuple[Any, Any]:
    """The model with prior Normal(0, 2) and its weights reparametrised."""
    lora = lifted_with_wide_prior(likelihood)
    config = {site: LocScaleReparam(centered) for site in lora.sites}
    return lora, poutine.reparam(LIKELIHOODS[likelihood].model(lora), config)


@on_each_likelihood
def test_loc_scale_reparam_changes_variables(likelihood: str) -> None:
    case = lifted_case(likelihood)
    lora, model = decentred(likelihood, 0.0)
    trace = poutine.trace(model).get_trace(**case.texts)
    trace.compute_log_prob()
    standard = torch.distributions.Normal(0.0, 1.0)
    for site in lora.sites:
        noise = trace.nodes[f"{site}_decentered"]
        expected = standard.log_prob(noise["value"]).sum()
        assert_close(noise["log_prob"], expected, rtol=1e-10, atol=0)
        assert torch.equal(trace.nodes[site]["value"], SCALE * noise["value"])
        assert trace.nodes[site]["log_prob"] == 0
        assert trace.nodes[site]["infer"]["lora"] == (lora,)
    values = values_of(case, trace)
    with lora.bind({site: values[site] for site in lora.sites}) as net:
        texts = {k: v for k, v in case.texts.items() if k != "labels"}
        assert_close(trace.nodes["output"]["value"], net(**texts).logits)


@pytest.mark.grid
@pytest.mark.parametrize("elbo", ["Trace looped", "Trace two plates"])
@pytest.mark.parametrize("centered", [0.0, 0.5, None])
@on_each_likelihood
def test_svi_of_a_reparametrised_model(
    likelihood: str, centered: float | None, elbo: str
) -> None:
    case = lifted_case(likelihood)
    lora, model = decentred(likelihood, centered)
    guide = AutoNormal(model, init_loc_fn=lora.init_to_adapter())
    with assert_unchanged(lora.network):
        guide(**case.texts)
        start = guide.median()
        # It starts at the adapter: w = 2^(1 - centered) times the new variable.
        factor = SCALE ** (1 - (0.5 if centered is None else centered))
        for site, weights in lora.weights().items():
            found = factor * start[f"{site}_decentered"]
            assert_close(found, weights, rtol=0, atol=1e-10)
        step_moves_all_parameters(model, guide, elbo, case.texts)
    learnt = {f"{site}_centered" for site in lora.sites} if centered is None else set()
    store = set(pyro.get_param_store())
    assert {name for name in store if not name.startswith("AutoNormal.")} == learnt


# Inspection.


@on_each_likelihood
def test_get_dependencies(likelihood: str) -> None:
    case = lifted_case(likelihood)
    with assert_unchanged(case.network):
        dependencies = get_dependencies(case.model, model_kwargs=case.texts)
    assert dependencies["prior_dependencies"]["y"].keys() == {"y", *case.shapes}
    assert dependencies["posterior_dependencies"].keys() == case.shapes.keys()


@on_each_likelihood
def test_render_model(likelihood: str) -> None:
    case = lifted_case(likelihood)
    with assert_unchanged(case.network):
        source = render_model(case.model, model_kwargs=case.texts).source
    name = r'"?([\w.]+)"?'
    edges = set(re.findall(rf"^\s*{name} -> {name}", source, re.MULTILINE))
    nodes = set(re.findall(rf"^\s*{name} \[label=", source, re.MULTILINE))
    assert nodes == {"output", "y", *case.shapes}
    to_y = {(site, "y") for site in case.shapes}
    assert edges == to_y | {(site, "output") for site in case.lora.sites}
