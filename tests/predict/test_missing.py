"""Missing outcomes: everything is as if their data weren't there."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import arviz_stats
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import pyro_lora as pl
from tests import networks
from tests.predict import models

pytestmark = [
    pytest.mark.filterwarnings("ignore:Estimated shape parameter"),
    pytest.mark.filterwarnings("ignore:The point-wise LOO"),
]

NUM_DATA = models.NUM_DATA
SEEN = [
    torch.tensor([True, True, False, True, True, False]),
    torch.tensor([False, True, True, True]),
]
Observe = Callable[[Tensor, Tensor | None, Tensor], None]


def classes_by_poutine(f: Tensor, labels: Tensor | None, seen: Tensor) -> None:
    with poutine.mask(mask=seen):
        pyro.sample("y", dist.Categorical(logits=f), obs=labels)


def classes_by_labels(f: Tensor, labels: Tensor | None, seen: Tensor) -> None:
    fn: Any = dist.Categorical(logits=f)
    if labels is not None:
        fn = fn.mask(labels >= 0)
        labels = labels.clamp_min(0)
    pyro.sample("y", fn, obs=labels)


def classes_by_obs_mask(f: Tensor, labels: Tensor | None, seen: Tensor) -> None:
    if labels is not None:
        labels = labels.clamp_min(0)
    pyro.sample("y", dist.Categorical(logits=f), obs=labels, obs_mask=seen)


def bernoulli_by_nan(f: Tensor, labels: Tensor | None, seen: Tensor) -> None:
    fn: Any = dist.Bernoulli(logits=f[..., 0])
    if labels is not None:
        fn = fn.mask(labels >= 0)
        labels = labels.clamp_min(0).double()
    pyro.sample("y", fn, obs=labels)


def reals_by_nan(f: Tensor, labels: Tensor | None, seen: Tensor) -> None:
    pyro.sample("y", dist.NanMaskedNormal(f[..., 0], 0.7), obs=labels)


def reals_by_poutine(f: Tensor, labels: Tensor | None, seen: Tensor) -> None:
    with poutine.mask(mask=seen):
        pyro.sample("y", dist.Normal(f[..., 0], 0.7), obs=labels)


def several_reals(f: Tensor, labels: Tensor | None, seen: Tensor) -> None:
    pyro.sample("y", dist.NanMaskedNormal(f, 0.7).to_event(1), obs=labels)


CLASSES = [classes_by_poutine, classes_by_labels, classes_by_obs_mask, bernoulli_by_nan]
REALS = [reals_by_nan, reals_by_poutine, several_reals]
every_way = pytest.mark.parametrize("observe", [*CLASSES, *REALS])


def problem(observe: Observe) -> tuple[Any, Any, list[dict], list[dict]]:
    """Network, model, batches with missing outcomes, and the same without them."""
    lora, _ = models.classifier(2)

    def model(seen: Tensor, labels: Tensor | None = None, **inputs: Tensor) -> None:
        f = lora()(**inputs).logits
        with pyro.plate("data", NUM_DATA, subsample=inputs["input_ids"]):
            observe(f, labels, seen)

    batches = models.two_batches()
    for batch, seen in zip(batches, SEEN, strict=True):
        batch["seen"] = seen
        labels = batch["labels"].where(seen, -100)
        if observe in REALS:
            real = torch.randn(len(seen), 2, dtype=torch.float64)
            real = real.where(seen[:, None], torch.nan)
            if observe is not several_reals:
                real = real[:, 0]
            labels = real
        batch["labels"] = labels
    rows = [
        {name: x[seen] for name, x in batch.items()}
        for batch, seen in zip(batches, SEEN, strict=True)
    ]
    return lora, model, batches, rows


@pytest.mark.grid
@every_way
@pytest.mark.parametrize("method", ["sample", "linearized"])
def test_metrics_are_those_of_the_data_that_count(
    observe: Observe, method: Any
) -> None:
    lora, model, batches, rows = problem(observe)
    posterior: Any = (
        models.particles(lora, model, obs_site=None)
        if method == "sample"
        else models.laplace(lora, model, batches)
    )
    found = pl.predict(posterior, batches, model=model, method=method)
    alone = pl.predict(posterior, rows, model=model, method=method)
    assert found.metrics() == pytest.approx(alone.metrics(), abs=1e-10)
    assert found.labels is not None
    assert len(found.labels) == NUM_DATA
    if observe in CLASSES:
        assert found.labels[2] == -100
        assert pl.fit_temperature(found) == pytest.approx(pl.fit_temperature(alone))
        # A datum without a label may be worth one.
        assert len(pl.acquire(found, NUM_DATA).indices) == NUM_DATA
    else:
        assert found.labels[2].isnan().all()


def test_metrics_of_data_with_some_of_their_outcomes() -> None:
    lora, model, batches, _ = problem(several_reals)
    for batch in batches:
        batch["labels"][1, 0] = torch.nan
    found = pl.predict(models.particles(lora, model), batches, model=model)
    labels = found.labels
    known = ~labels.isnan()
    error = (found.mean - labels)[known]
    metrics = found.metrics(num_bootstrap=3)
    assert metrics["rmse"] == pytest.approx(float(error.square().mean().sqrt()))
    filled = labels.where(known, 0.0)
    nll = -float(found.log_prob(filled)[known].mean())
    assert metrics["nll"] == pytest.approx(nll)


@pytest.mark.parametrize("observe", [classes_by_poutine, reals_by_poutine])
def test_no_label_that_counts_is_an_error(observe: Observe) -> None:
    lora, model, batches, _ = problem(observe)
    nothing = [{**b, "seen": torch.zeros_like(b["seen"])} for b in batches]
    found = pl.predict(models.particles(lora, model), nothing, model=model)
    with pytest.raises(ValueError, match="all are masked or missing"):
        found.metrics()
    posterior = models.laplace(lora, model, batches)
    with pytest.raises(ValueError, match="no outcome that counts"):
        posterior.optimize_prior(objective="nll", batches=nothing)


@pytest.mark.parametrize("observe", [classes_by_poutine, reals_by_poutine])
def test_a_label_that_counts_must_be_one(observe: Observe) -> None:
    lora, model, batches, _ = problem(observe)
    counted = [batches[0], {**batches[1], "seen": torch.ones(4, dtype=torch.bool)}]
    with pytest.raises(ValueError, match="Batch 1, site 'y': the observed value"):
        pl.predict(models.particles(lora, model), counted, model=model)
    posterior = models.laplace(lora, model, batches)
    with pytest.raises(ValueError, match=r"Batch 1.*'y': the observed value"):
        posterior.optimize_prior(objective="nll", batches=counted)


@pytest.mark.filterwarnings("ignore:The best prior precision")
@pytest.mark.parametrize("observe", [classes_by_obs_mask, reals_by_nan, several_reals])
def test_the_prior_is_tuned_on_the_data_that_count(observe: Observe) -> None:
    lora, model, batches, rows = problem(observe)
    posterior = models.laplace(lora, model, batches)
    found, alone = (
        posterior.optimize_prior(objective="nll", batches=some)
        for some in (batches, rows)
    )
    for site, tau in alone.prior_precision.items():
        assert torch.equal(found.prior_precision[site], tau)


@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame")
@every_way
def test_leave_one_out_is_of_the_data_that_count(observe: Observe) -> None:
    lora, model, batches, rows = problem(observe)
    posterior = models.particles(lora, model, num=40, obs_site=None)
    tree = pl.to_datatree(posterior, model=model, batches=batches)
    alone = pl.to_datatree(posterior, model=model, batches=rows)
    (name,) = tree.log_likelihood.data_vars
    seen = torch.cat(SEEN).nonzero()[:, 0].tolist()
    for group in ("log_likelihood", "observed_data"):
        assert tree[group][name].coords["datum"].values.tolist() == seen
        np.testing.assert_allclose(
            tree[group][name].values, alone[group][name].values, atol=1e-10
        )
    assert len(tree.posterior_predictive[name].datum) == NUM_DATA
    log_prior = sum(x.values for x in alone.log_prior.data_vars.values())
    log_joint = log_prior + alone.log_likelihood[name].sum("datum").values
    np.testing.assert_allclose(tree.sample_stats["lp"].values, log_joint, atol=1e-8)
    assert "lp_left_out" in alone.posterior.attrs
    found = arviz_stats.loo(tree, var_name=name, pointwise=True)
    expected = arviz_stats.loo(alone, var_name=name, pointwise=True)
    assert found.n_data_points == len(seen)
    assert found.elpd == pytest.approx(expected.elpd)
    assert found.se == pytest.approx(expected.se)
    compared = arviz_stats.compare(
        {"with": tree, "without": alone}, var_name=name, method="BB-pseudo-BMA"
    )
    assert compared["elpd"].iloc[0] == pytest.approx(compared["elpd"].iloc[1])


@pytest.mark.parametrize("observe", [classes_by_labels, reals_by_nan])
def test_a_diagnosis_is_of_the_data_that_count(observe: Observe) -> None:
    lora, model, batches, rows = problem(observe)
    for posterior in (
        models.laplace(lora, model, batches),
        models.particles(lora, model),
    ):
        found, alone = (
            pl.diagnose(posterior, batches, model=model, held_out=some, num_samples=25)
            for some in (batches, rows)
        )
        assert found.confidence is not None
        assert alone.confidence is not None
        assert asdict(found.confidence) == pytest.approx(asdict(alone.confidence))
        if found.diversity is not None:
            assert alone.diversity is not None
            assert found.diversity.error == alone.diversity.error


def test_masked_texts_have_no_token_that_counts() -> None:
    lora = pl.lift(networks.llama(None, num_layers=1))

    def model(seen: Tensor, labels: Tensor, **inputs: Tensor) -> None:
        logits = lora()(**inputs).logits[..., :-1, :]
        with (
            pyro.plate("data", 5, subsample=labels),
            poutine.mask(mask=seen),
        ):
            fn = dist.Categorical(logits=logits).mask(labels[:, 1:] >= 0).to_event(1)
            pyro.sample("y", fn, obs=labels[:, 1:].clamp_min(0))

    texts = networks.inputs(networks.batch(5))
    texts["labels"] = texts["input_ids"].where(texts["attention_mask"] > 0, -100)
    texts["seen"] = torch.tensor([True, False, True, True, False])
    rows = {name: x[texts["seen"]] for name, x in texts.items()}
    posterior = models.particles(lora, model)
    for tokens in ("each", "last"):
        found, alone = (
            pl.predict(posterior, [some], model=model, tokens=tokens)
            for some in (texts, rows)
        )
        assert found.metrics() == pytest.approx(alone.metrics(), abs=1e-6)


def by_bool(seen: Tensor) -> bool:
    return bool((~seen).any())


def by_item(seen: Tensor) -> bool:
    return seen.double().min().item() == 0


def by_list(seen: Tensor) -> bool:
    return False in seen.tolist()


def by_member(seen: Tensor) -> bool:
    return False in seen


def by_numpy(seen: Tensor) -> bool:
    return not np.asarray(seen).all()


BRANCHES = [by_bool, by_item, by_list, by_member, by_numpy]


@pytest.mark.grid
@pytest.mark.parametrize("masks", BRANCHES)
@pytest.mark.parametrize("method", ["sample", "linearized"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_mask_that_some_batches_have(
    masks: Callable[[Tensor], bool], method: Any, order: tuple[int, int]
) -> None:
    lora, _ = models.classifier(2)

    def model(seen: Tensor, labels: Tensor | None = None, **inputs: Tensor) -> None:
        f = lora()(**inputs).logits
        fn: Any = dist.Categorical(logits=f)
        if labels is not None and masks(seen):  # predictions know nothing of it
            fn = fn.mask(seen)
        with pyro.plate("data", NUM_DATA, subsample=inputs["input_ids"]):
            pyro.sample("y", fn, obs=labels)

    batches = [models.two_batches()[i] for i in order]
    for batch in batches:
        batch["seen"] = torch.ones(len(batch["labels"])).bool()
    batches[1]["seen"][1:3] = False
    posterior: Any = (
        models.particles(lora, model)
        if method == "sample"
        else models.laplace(lora, model, batches)
    )
    found = pl.predict(posterior, batches, method=method)
    seen = torch.cat([batch["seen"] for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches])
    assert found.labels is not None
    assert found.labels.tolist() == labels.where(seen, -100).tolist()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("settings", [(False, True), ([], [1])])
def test_a_setting_that_masks_some_batches(
    settings: tuple[Any, Any], order: tuple[int, int]
) -> None:
    lora, _ = models.classifier(2)

    def model(masks: Any, labels: Tensor | None = None, **inputs: Tensor) -> None:
        f = lora()(**inputs).logits
        fn: Any = dist.Categorical(logits=f)
        if labels is not None and masks:
            fn = fn.mask(torch.arange(len(f)) > 0)
        with pyro.plate("data", NUM_DATA, subsample=inputs["input_ids"]):
            pyro.sample("y", fn, obs=labels)

    pairs = zip(models.two_batches(), settings, strict=True)
    each: list[Any] = [{**batch, "masks": masks} for batch, masks in pairs]
    batches = [each[i] for i in order]
    found = pl.predict(models.particles(lora, model), batches)
    labels = []
    for batch in batches:
        labels += batch["labels"].tolist()
        if batch["masks"]:
            labels[-len(batch["labels"])] = -100
    assert found.labels is not None
    assert found.labels.tolist() == labels


@pytest.mark.parametrize("settings", [{}, {"keep": 1, "name": "a"}])
def test_ready_models_run_once_more_on_the_first_batch_only(
    settings: dict[str, Any],
) -> None:
    lora, model = models.classifier(2)
    calls = 0

    def counted(keep: int = 0, name: str = "", **batch: Any) -> Any:
        nonlocal calls
        calls += 1
        return model(**batch)

    posterior, numbers = models.particles(lora, counted), []
    pl.predict(posterior, [networks.batch(4)])  # sees that it keeps draws apart
    for num in (1, 2, 3):
        calls = 0
        pl.predict(posterior, [networks.batch(4) | settings for _ in range(num)])
        numbers.append(calls)
    assert numbers[2] - numbers[1] == numbers[1] - numbers[0] == 1
