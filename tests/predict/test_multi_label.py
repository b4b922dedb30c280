"""Labels of which several may hold, against loops over draws, data and labels."""

import dataclasses
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import pyro_lora as pl
from tests import networks
from tests.predict import models

P = 3
Batch = dict[str, Tensor]


def labelled() -> tuple[pl.LiftedNetwork, Any, list[Batch]]:
    """Labels in float, as torch's loss wants them, and some that nobody knows."""
    lora = pl.lift(networks.bert(P))
    batches = models.two_batches()
    for batch in batches:
        batch["labels"] = torch.randint(2, (len(batch["labels"]), P)).double()
    batches[0]["labels"][1, 2] = -100
    batches[1]["labels"][3] = -100
    return lora, pl.models.multi_label(lora, models.NUM_DATA), batches


def entropy(p: Tensor) -> Tensor:
    return -(p * p.log() + (1 - p) * (1 - p).log())


@pytest.mark.parametrize("chunk_size", [1, 5])
def test_draws_are_averaged_label_by_label(chunk_size: int) -> None:
    lora, model, batches = labelled()
    posterior = models.particles(lora, model, num=5)
    found = pl.predict(posterior, batches, chunk_size=chunk_size)
    each = torch.stack(
        [
            torch.cat(
                [
                    models.logits_at(lora, models.draw(posterior.particles, k), b)
                    for b in batches
                ]
            ).sigmoid()
            for k in range(5)
        ]
    )  # (K, N, P)
    assert isinstance(found, pl.MultiLabelPrediction)
    assert_close(found.probs, each.mean(0), rtol=0, atol=1e-8)
    assert_close(found.log_probs[..., 0].exp(), 1 - each.mean(0), rtol=0, atol=1e-8)
    assert_close(found.total_entropy, entropy(each.mean(0)), rtol=0, atol=1e-8)
    assert_close(found.aleatoric_entropy, entropy(each).mean(0), rtol=0, atol=1e-8)
    gap = entropy(each.mean(0)) - entropy(each).mean(0)
    assert_close(found.epistemic_entropy, gap, rtol=0, atol=1e-8)
    expected = torch.cat([b["labels"] for b in batches]).long()
    assert torch.equal(found.labels, expected)
    without = [networks.inputs(b) for b in batches]
    unlabelled = pl.predict(posterior, without, chunk_size=chunk_size)
    assert unlabelled.labels is None
    assert torch.equal(unlabelled.probs, found.probs)


def test_linearized_each_label_is_integrated_by_itself() -> None:
    lora, model, batches = labelled()
    posterior = models.laplace(lora, model, batches)
    found = pl.predict(posterior, batches)
    # The logit's marginal, by a sum over a fine grid.
    z = torch.linspace(-10, 10, 4001).double()
    normal = torch.exp(-(z**2) / 2)
    weights = normal / normal.sum()
    start = 0
    for batch in batches:
        g = posterior.linearized(batch, tokens="each")
        contrast = torch.tensor([-1.0, 1.0]).double()
        loc = g.mean @ contrast
        sd = (g.covariance_matrix @ contrast @ contrast).sqrt()
        assert_close(loc, models.logits_at(lora, posterior.mode(), batch))
        p = (loc[..., None] + sd[..., None] * z).sigmoid() @ weights
        assert_close(found.probs[start : start + len(p)], p, rtol=0, atol=1e-6)
        start += len(p)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 2**31 - 1), st.booleans())
def test_metrics_equal_loops(n: int, p: int, seed: int, soft: bool) -> None:
    torch.manual_seed(seed)
    probs = torch.rand(n, p).double().clamp(1e-6, 1 - 1e-6)
    labels = torch.randint(2, (n, p))
    labels[torch.rand(n, p) < 0.3] = -100
    labels[0, 0] = 1
    found = prediction(probs, labels.double() if soft else labels)
    answers = [
        (float(probs[i, j]), int(labels[i, j]))
        for i in range(n)
        for j in range(p)
        if labels[i, j] >= 0
    ]
    metrics = found.metrics()
    right = [(q > 0.5) == (y == 1) for q, y in answers]
    assert metrics["accuracy"] == pytest.approx(sum(right) / len(right))
    nll = [-math.log(q if y else 1 - q) for q, y in answers]
    assert metrics["nll"] == pytest.approx(sum(nll) / len(nll))
    brier = [(q - y) ** 2 + ((1 - q) - (1 - y)) ** 2 for q, y in answers]
    assert metrics["brier"] == pytest.approx(sum(brier) / len(brier))
    rows = [
        [(float(probs[i, j]) > 0.5) == bool(labels[i, j] == 1) for j in known]
        for i in range(n)
        if (known := [j for j in range(p) if labels[i, j] >= 0])
    ]
    exact = sum(map(all, rows)) / len(rows)
    assert metrics["exact_match"] == pytest.approx(exact)

    def f1(chosen: list[tuple[float, int]]) -> float:
        hits = sum(q > 0.5 and y == 1 for q, y in chosen)
        wrong = sum((q > 0.5) != (y == 1) for q, y in chosen)
        return 2 * hits / (2 * hits + wrong) if hits + wrong else 0.0

    assert metrics["f1_micro"] == pytest.approx(f1(answers))
    by_label = [
        [
            (float(q), int(y))
            for q, y in zip(probs[:, j], labels[:, j], strict=True)
            if y >= 0
        ]
        for j in range(p)
    ]
    macro = sum(map(f1, by_label)) / p
    assert metrics["f1_macro"] == pytest.approx(macro)


def prediction(
    probs: Tensor, labels: Tensor | None = None, **options: Any
) -> pl.MultiLabelPrediction:
    return pl.MultiLabelPrediction(
        log_probs=torch.stack([(1 - probs).log(), probs.log()], -1),
        aleatoric_entropy=entropy(probs),
        labels=labels,
        **options,
    )


def test_a_table_has_a_row_for_each_datum() -> None:
    probs = torch.tensor([[0.9, 0.2, 0.6], [0.3, 0.1, 0.45]]).double()
    labels = torch.tensor([[1, 0, -100], [0, 0, 0]])
    found = prediction(probs, labels, class_names=("toxic", "rude", "spam"))
    table = found.to_pandas()
    assert table.index.name == "datum"
    assert [*table] == [
        *("predicted", "confidence", "p_toxic", "p_rude", "p_spam"),
        *("total_entropy", "aleatoric_entropy", "epistemic_entropy", "label"),
    ]
    assert table["predicted"].tolist() == [("toxic", "spam"), ()]
    assert table["label"].tolist() == [("toxic",), ()]
    np.testing.assert_allclose(table["p_spam"], [0.6, 0.45])
    np.testing.assert_allclose(table["confidence"], [0.6, 0.55])
    np.testing.assert_allclose(table["total_entropy"], entropy(probs).sum(1))
    bare = prediction(probs).columns()
    assert "label" not in bare
    assert bare["predicted"].tolist() == [(0, 2), ()]
    assert [*bare][2] == "p_0"


def test_the_names_are_the_networks() -> None:
    lora, model, batches = labelled()
    names = {0: "toxic", 1: "rude", 2: "spam"}
    lora.network.config.id2label = names  # type: ignore[union-attr]
    found = pl.predict(models.particles(lora, model), batches)
    assert found.class_names == ("toxic", "rude", "spam")
    assert "P=3, classes=(toxic, rude, spam)" in " ".join(repr(found).split())


def test_pieces_make_up_the_whole() -> None:
    lora, model, batches = labelled()
    whole = pl.predict(models.particles(lora, model), batches)
    pieces = pl.MultiLabelPrediction.concatenated([whole[:4], whole[4:]])
    assert torch.equal(pieces.log_probs, whole.log_probs)
    assert pieces.metrics() == whole.metrics()
    assert len(whole) == models.NUM_DATA
    assert len(whole.labelled()) == models.NUM_DATA - 1  # one has no label at all
    later = dataclasses.replace(whole, labels=None).with_labels(whole.labels)
    assert later.metrics() == whole.metrics()
    pyro.set_rng_seed(0)
    errors = whole.metrics(num_bootstrap=30)
    assert errors["exact_match_se"] >= 0
    assert errors["nll_se"] > 0
    scaled = whole.pairs.with_temperature(pl.fit_temperature(whole.pairs))
    assert scaled.metrics()["nll"] <= whole.metrics()["nll"] + 1e-9


def test_errors_say_what_is_expected() -> None:
    probs = torch.full((2, 2), 0.5)
    with pytest.raises(ValueError, match=r"labels has shape \(2,\); expected \(2, 2\)"):
        prediction(probs, torch.zeros(2))
    with pytest.raises(ValueError, match=r"classes 0 to 1, found 0.5.*soft.*rounded"):
        prediction(probs, probs)
    with pytest.raises(ValueError, match=r"expected \(N, P, 2\)"):
        pl.MultiLabelPrediction(log_probs=probs.log(), aleatoric_entropy=probs)
    with pytest.raises(ValueError, match="class_names must be 2 different strings"):
        prediction(probs, class_names=("a",))
    with pytest.raises(ValueError, match="all are masked or missing"):
        prediction(probs, torch.full((2, 2), -100)).metrics()
    other = prediction(torch.full((2, 3), 0.5))
    with pytest.raises(ValueError, match="tokens='each'"):
        pl.MultiLabelPrediction.concatenated([prediction(probs), other])


def test_draws_that_are_far_worse_than_the_mode_are_told_of() -> None:
    lora, model, batches = labelled()
    posterior = models.laplace(lora, model, batches).with_prior_precision(1e-3)
    mode = pl.predict(pl.ensemble(lora, [posterior.mode()]), batches, model=model)
    for batch, start in zip(batches, (0, 6), strict=True):
        rows = slice(start, start + len(batch["labels"]))
        batch["labels"] = mode.predicted[rows].double()
    with pytest.warns(UserWarning, match="Averaged over draws of a Gaussian"):
        pl.predict(posterior, batches, method="sample", num_samples=16)


def test_tokens_of_yes_or_no_are_predicted_where_somebody_says() -> None:
    lora = pl.lift(networks.bert(1, of_tokens=True))

    def model(labels: Tensor | None = None, **inputs: Tensor) -> None:
        logits = lora()(**inputs).logits[..., 0]
        with pyro.plate("data", models.NUM_DATA, subsample=inputs["input_ids"]):
            mask = inputs["attention_mask"] > 0
            fn = dist.Bernoulli(logits=logits).mask(mask).to_event(1)
            pyro.sample("y", fn, obs=labels)

    posterior = models.particles(lora, model)
    batches = [networks.inputs(b) for b in models.two_batches()]
    found = pl.predict(posterior, batches, tokens="each")
    number = sum(int(b["attention_mask"].sum()) for b in batches)
    assert found.probs.shape == (number, 2)
    with pytest.raises(ValueError, match=r"\[7, 9\] outcomes each.*tokens='each'"):
        pl.predict(posterior, batches)
