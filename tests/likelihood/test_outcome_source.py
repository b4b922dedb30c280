"""The outcomes of a site come from the argument that reaches its obs=."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora.likelihood.model_trace import trace_at
from pyro_lora.likelihood.outcome_source import OutcomeSource
from tests import networks
from tests.predict import models

NUM = models.NUM_DATA
# What a model may do with the outcomes before it observes them: (B,) or (B, 2) -> (B,).
SAME: dict[str, Callable[[Any], Tensor]] = {
    "itself": lambda s: s,
    "float": lambda s: s.float(),
    "to": lambda s: s.to(torch.float64, copy=True),
    "view": lambda s: s.view(-1, 1)[:, 0],
    "clone": lambda s: s.detach().clone(),
    "filled": lambda s: _filled(s),
}
OTHER: dict[str, Callable[[Any], Tensor]] = {
    "standardised": lambda s: (s - 3.0) / 0.5,
    "log": lambda s: s.exp().log1p(),
    "through numpy": lambda s: torch.as_tensor(s.numpy()).neg(),
}


def _filled(s: Tensor) -> Tensor:
    result = torch.zeros(len(s), dtype=torch.float64)
    result[:] = s
    return result


def two_outcomes(
    lora: pl.LiftedNetwork, of_stars: Callable[[Any], Tensor]
) -> Callable[..., None]:
    def model(labels: Tensor | None = None, stars: Any = None, **texts: Tensor) -> None:
        logits = lora()(**texts).logits
        with pyro.plate("data", NUM, subsample=texts["input_ids"]):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)
            obs = None if stars is None else of_stars(stars)
            pyro.sample("s", dist.Normal(logits[..., 0], 1.0), obs=obs)

    return model


def with_stars() -> list[dict[str, Tensor]]:
    batches = models.two_batches()
    for batch in batches:
        batch["stars"] = 100 + torch.randn(len(batch["labels"])).double()
    return batches


def joined(batches: list[dict[str, Tensor]], name: str) -> Tensor:
    return torch.cat([batch[name] for batch in batches])


@settings(deadline=None, max_examples=15, suppress_health_check=list(HealthCheck))
@given(
    how=st.sampled_from(sorted(SAME | OTHER)),
    site=st.sampled_from(["y", "s"]),
    method=st.sampled_from([None, "sample"]),
    order=st.booleans(),
)
def test_a_site_is_scored_against_its_own_outcomes(
    how: str, site: str, method: Any, order: bool
) -> None:
    lora, _ = models.classifier()
    function = (SAME | OTHER)[how]
    model = two_outcomes(lora, function)
    batches = with_stars()
    if order:
        batches = [dict(reversed(batch.items())) for batch in batches]
    both = [b | {"stars": b["stars"] / 100} for b in batches]
    guide = pl.AutoLaplace(
        model, init_loc_fn=lora.init_to_adapter(), obs_site=("y", "s")
    )
    with pytest.warns(UserWarning, match="The weights aren't a mode"):
        posterior = guide.laplace_approximation(both)
    posterior = posterior.with_prior_precision(1e4)  # draws near the mode
    prediction = pl.predict(
        posterior, batches, model=model, obs_site=site, method=method, num_samples=3
    )
    expected = joined(batches, "labels")
    if site == "s":
        expected = function(joined(batches, "stars")).double()
        rmse = (prediction.mean - expected).square().mean().sqrt()
        assert prediction.metrics()["rmse"] == pytest.approx(float(rmse), rel=1e-6)
    assert_close(prediction.labels, expected, rtol=1e-6, atol=0, check_dtype=False)


@pytest.mark.parametrize("how", sorted(SAME | OTHER))
def test_the_argument_is_found_and_hidden(how: str) -> None:
    lora, _ = models.classifier()
    model, weights = two_outcomes(lora, (SAME | OTHER)[how]), lora.weights()
    (batch, _) = with_stars()

    def trace(given: Any) -> Any:
        return trace_at(model, weights, given)

    for site, name in {"y": "labels", "s": "stars"}.items():
        source = OutcomeSource(trace, site, weights)
        if site == "s" and how == "through numpy":  # where torch's functions end
            assert source.arguments(batch) == ()
            continue
        assert source.arguments(batch) == (name,)
        assert source.hidden(batch) == {**batch, name: None}
        rest = source.hidden(batch)
        assert source.outcomes(rest) is None
        assert source.outcomes({k: x for k, x in batch.items() if k != name}) is None


def test_what_the_network_is_given_isnt_hidden_with_the_outcomes() -> None:
    # transformers drop a mask that is all ones, and its outputs then don't depend on it
    lora = pl.lift(networks.bert(1, num_layers=1))

    def rate(labels: Any = None, **texts: Tensor) -> None:
        score = lora()(**texts).logits[..., 0]
        obs = None if labels is None else labels / texts["attention_mask"].sum(1)
        with pyro.plate("data", NUM, subsample=texts["input_ids"]):
            pyro.sample("y", dist.Normal(score, 1.0), obs=obs)

    whole, padded = (networks.batch(4, 6) for _ in range(2))
    whole["attention_mask"].fill_(1)
    padded["attention_mask"][:, 3:] = 0
    batches = [b | {"labels": torch.rand(4).double()} for b in (whole, padded)]
    posterior = pl.ensemble(lora, [lora.weights()], model=rate)
    found = pl.predict(posterior, batches)
    with torch.no_grad():
        texts = [{k: x for k, x in b.items() if k != "labels"} for b in batches]
        expected = torch.cat([lora.network(**x).logits[:, 0] for x in texts])
    assert_close(found.mean, expected)
    assert "attention_mask" in pl.to_datatree(posterior, batches)["constant_data"]


def test_an_argument_that_is_named_is_taken_at_its_word() -> None:
    lora, _ = models.classifier()
    model = two_outcomes(lora, SAME["float"])
    batches = with_stars()
    for batch in batches:
        batch["other"] = batch["stars"] + 1
    posterior = models.particles(lora, None, obs_site=None)

    def taking_others(other: Tensor, **batch: Any) -> None:
        model(**batch)

    prediction = pl.predict(
        posterior, batches, model=taking_others, obs_site="s", labels="other"
    )
    assert_close(prediction.labels, joined(batches, "other"))


def test_two_observed_sites_and_no_name_are_refused() -> None:
    lora, _ = models.classifier()
    model = two_outcomes(lora, SAME["itself"])
    posterior = models.particles(lora, None, obs_site=None)
    with pytest.raises(ValueError, match=r"found \['y', 's'\].*obs_site="):
        pl.predict(posterior, with_stars(), model=model)


def test_labels_that_only_some_batches_have() -> None:
    lora, model = models.classifier()
    posterior = models.particles(lora, model)
    batches = models.two_batches()
    for bare in (0, 1):
        some = [
            {k: x for k, x in batch.items() if k != "labels" or i != bare}
            for i, batch in enumerate(batches)
        ]
        with pytest.raises(ValueError, match=r"Batch 1 has (no )?'labels'"):
            pl.predict(posterior, some, model=model)


def test_outcomes_of_the_model_itself_count() -> None:
    lora, _ = models.classifier()
    texts = networks.batch(NUM)
    labels = texts.pop("labels")

    def model(**texts: Tensor) -> None:
        logits = lora()(**texts).logits
        with pyro.plate("data", NUM):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    prediction = pl.predict(models.particles(lora, model), [texts], model=model)
    assert prediction.labels is not None
    assert torch.equal(prediction.labels, labels)


def test_held_out_tuning_and_diagnoses_take_the_sites_own() -> None:
    lora, _ = models.classifier()
    model = two_outcomes(lora, SAME["float"])
    batches = with_stars()
    for batch in batches:
        batch["stars"] = batch["stars"] / 100
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter(), obs_site="s")
    with (
        pytest.warns(UserWarning, match="The weights aren't a mode"),
        pytest.warns(UserWarning, match=r"observes \['y'\], too"),
    ):
        posterior = guide.laplace_approximation(batches)
    options: dict[str, Any] = {"objective": "nll", "batches": batches}
    tuned = posterior.optimize_prior(**options)
    alone = [{**batch, "labels": None} for batch in batches]
    expected = posterior.optimize_prior(objective="nll", batches=alone)
    for site, tau in expected.prior_precision.items():
        assert torch.equal(tuned.prior_precision[site], tau)
    coverage = pl.diagnose(posterior, batches, model=model).confidence
    assert (
        coverage
        == pl.diagnose(posterior, batches, model=model, labels="stars").confidence
    )
    tree = pl.to_datatree(posterior, batches=batches, num_samples=3)
    named = pl.to_datatree(posterior, batches=batches, num_samples=3, labels="stars")
    assert set(tree["constant_data"]) == set(named["constant_data"])
