"""Trees of data with several outcomes: labels of a datum, tokens of texts."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.testing import assert_close

import pyro_lora as pl
from tests import networks
from tests.predict import models

Batch = dict[str, Tensor]


def some_ignored(labels: Tensor) -> Tensor:
    labels = labels.masked_fill(torch.rand(labels.shape) < 0.2, -100)
    labels[0, 0] = 0
    return labels


def multi_label() -> tuple[pl.LiftedNetwork, Any, list[Batch]]:
    lora, batches = pl.lift(networks.bert(3, attention="eager")), models.two_batches()
    for batch in batches:
        batch["labels"] = some_ignored(torch.randint(2, (len(batch["labels"]), 3)))
    return lora, pl.models.multi_label(lora, models.NUM_DATA), batches


def tokens() -> tuple[pl.LiftedNetwork, Any, list[Batch]]:
    lora = pl.lift(networks.bert(3, of_tokens=True, attention="eager"))
    batches = models.two_batches()
    for batch in batches:
        labels = some_ignored(torch.randint(3, batch["input_ids"].shape))
        labels[-1] = -100  # a text without any
        batch["labels"] = labels.masked_fill(batch["attention_mask"] == 0, -100)
    return lora, pl.models.token_classification(lora, models.NUM_DATA), batches


def log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each datum, the outcomes that count added up, (B,)."""
    if logits.ndim == labels.ndim:
        y = labels.clamp_min(0).to(logits)
        each = -binary_cross_entropy_with_logits(logits, y, reduction="none")
        return (each * (labels >= 0)).sum(1)
    return -cross_entropy(logits.mT, labels, reduction="none").sum(1)


def linearized(
    lora: pl.LiftedNetwork, mode: dict[str, Tensor], draw: dict[str, Tensor], b: Batch
) -> Tensor:
    """f + J (w - mode), J by forward-mode differentiation."""
    sites = list(mode)

    def logits(*values: Tensor) -> Tensor:
        with lora.bind(dict(zip(sites, values, strict=True))) as net:
            out: Tensor = net(**networks.inputs(b)).logits
        return out

    at = tuple(mode[s] for s in sites)
    step = tuple(draw[s] - mode[s] for s in sites)
    f, moved = torch.autograd.functional.jvp(logits, at, step)
    return f + moved


@pytest.mark.parametrize("ready", [multi_label, tokens])
@pytest.mark.parametrize("method", ["sample", "linearized"])
def test_the_log_likelihood_is_the_sum_over_outcomes(ready: Any, method: Any) -> None:
    lora, model, batches = ready()
    posterior: Any = models.laplace(lora, model, batches)
    if method == "sample":
        posterior = models.particles(lora, model)
    tree = pl.to_datatree(posterior, batches, num_samples=3, weights="raw")
    draws = {
        s: torch.as_tensor(tree["posterior"][s].to_numpy()).reshape(3, *x.shape)
        for s, x in lora.zeros().items()
    }
    rows = []
    for batch in batches:
        each = []
        for index in range(3):
            draw = models.draw(draws, index)
            logits = (
                models.logits_at(lora, draw, batch)
                if method == "sample"
                else linearized(lora, posterior.mode(), draw, batch)
            )
            each.append(log_probs(logits, batch["labels"]))
        rows.append(torch.stack(each))
    counts = torch.cat([(b["labels"] >= 0).any(1) for b in batches])
    expected = torch.cat(rows, 1)[:, counts]
    found = tree["log_likelihood"]["y"]
    assert found.attrs.get("method", tree["log_likelihood"].attrs["method"]) == method
    assert_close(torch.as_tensor(found.to_numpy())[0], expected, rtol=0, atol=1e-8)
    assert found["datum"].to_numpy().tolist() == counts.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("ready", [multi_label, tokens])
def test_outcomes_that_do_not_count_are_marked(ready: Any) -> None:
    lora, model, batches = ready()
    tree = pl.to_datatree(models.particles(lora, model), batches)
    observed = torch.as_tensor(tree["observed_data"]["y"].to_numpy())
    longest = max(b["labels"].shape[1] for b in batches)
    labels = torch.cat(
        [
            torch.nn.functional.pad(
                b["labels"], (0, longest - b["labels"].shape[1]), value=-100
            )
            for b in batches
        ]
    )
    labels = labels[(labels >= 0).any(1)]
    if observed.is_floating_point():
        observed = observed.nan_to_num(-100).long()
    assert torch.equal(observed, labels)
    drawn = torch.as_tensor(tree["posterior_predictive"]["y"].to_numpy())[0]
    assert drawn.shape == (3, models.NUM_DATA, longest)
    shorter = batches[0]["labels"].shape[1]
    assert (drawn[:, :6, shorter:] == -100).all()
    assert (drawn[:, :6, :shorter] >= 0).all()
