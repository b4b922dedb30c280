"""Preferences: pairs joined into one call of the network are two calls of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.optim import Adam
from torch import Tensor
from torch.testing import assert_close

import pyro_lora as pl
from tests.curvature.gauss_newton import assert_same, flatten
from tests.curvature.test_padding import STRUCTURES
from tests.networks import PAD, VOCABULARY, bert, llama, particles

pytestmark = pytest.mark.untrained

NUM_DATA = 7
ROOT = Path(__file__).parent.parent
Batch = dict[str, Tensor]


def collated(num_pairs: int, length: int, margin: bool = True) -> Batch:
    """Padded on the right, as TRL's DataCollatorForPreference does it."""
    lengths = torch.randint(2, length + 1, (2 * num_pairs,))
    mask = torch.arange(length) < lengths[:, None]
    ids = torch.randint(1, VOCABULARY, mask.shape).where(mask, torch.tensor(PAD))
    batch = {"input_ids": ids, "attention_mask": mask.long()}
    return {**batch, "margin": torch.rand(num_pairs)} if margin else batch


def batches() -> list[Batch]:
    return [collated(4, 6), collated(3, 5)]


def two_calls(lora: pl.LiftedNetwork, num_data: int) -> Callable[..., Tensor]:
    def model(margin: Tensor, labels: Tensor | None = None, **inputs: Tensor) -> Tensor:
        net = lora()
        chosen, rejected = (
            net(**{name: x.chunk(2)[i] for name, x in inputs.items()}).logits[..., 0]
            for i in (0, 1)
        )
        with pyro.plate("data", num_data, subsample=margin):
            fn = dist.Bernoulli(logits=chosen - rejected - margin.double())
            return pyro.sample("y", fn, obs=labels)

    return model


def with_labels(batches: list[Batch]) -> list[Batch]:
    return [{**b, "labels": torch.ones(len(b["margin"])).double()} for b in batches]


def fit(lora: pl.LiftedNetwork, model: Any, data: Any, **options: Any) -> Any:
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter(), **options)
    torch.manual_seed(0)
    return guide.laplace_approximation(data)


def log_prob(model: Any, lora: pl.LiftedNetwork, batch: Any) -> Tensor:
    trace: Any = poutine.trace(poutine.condition(model, lora.weights())).get_trace(
        **batch
    )
    trace.compute_log_prob()
    found: Tensor = trace.nodes["y"]["unscaled_log_prob"]
    return found


def test_the_likelihood_is_that_of_bradley_and_terry() -> None:
    lora, batch = pl.lift(bert(1)), collated(4, 6)
    model = pl.models.preference(lora, NUM_DATA)
    with torch.no_grad():
        r = torch.stack(
            [
                lora.network(input_ids=i[None], attention_mask=m[None]).logits[0, 0]
                for i, m in zip(
                    batch["input_ids"], batch["attention_mask"], strict=True
                )
            ]
        )
    difference = r[:4] - r[4:] - batch["margin"].double()
    expected = -torch.log1p((-difference).exp())
    assert_same(log_prob(model, lora, batch), expected)
    second = {**batch, "labels": torch.zeros(4, dtype=torch.long)}
    assert_same(log_prob(model, lora, second), expected - difference)
    without = {name: x for name, x in batch.items() if name != "margin"}
    expected = -torch.log1p((r[4:] - r[:4]).exp())
    assert_same(log_prob(model, lora, without), expected)


def test_unknown_labels_are_drawn() -> None:
    lora, batch = pl.lift(bert(1)), collated(4, 6)
    model = pl.models.preference(lora, NUM_DATA)
    drawn = Predictive(model, num_samples=40)(**batch, labels=None)["y"]
    assert drawn.shape == (40, 4)
    assert set(drawn.flatten().tolist()) == {0.0, 1.0}


@pytest.mark.grid
@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.few(2)
def test_laplace_is_that_of_two_calls(structure: Any, fisher: Any) -> None:
    lora, data = pl.lift(llama(1, num_layers=1)), batches()
    options = {"structure": structure, "fisher": fisher}
    if fisher == "mc" and structure == pl.structures.EKFAC():
        pytest.skip("other labels in its second pass")
    model = pl.models.preference(lora, NUM_DATA)
    other = two_calls(lora, NUM_DATA)
    found = fit(lora, model, data, **options)
    expected = fit(lora, other, with_labels(data), **options)
    assert_same(found.log_evidence(), expected.log_evidence())
    assert_same(flatten(found.variance()), flatten(expected.variance()))
    assert_same(
        found.gaussian.effective_parameters(), expected.gaussian.effective_parameters()
    )
    for batch in data:
        for joint in (False, True):
            one = found.linearized({**batch, "labels": None}, joint=joint)
            two = expected.linearized(batch, joint=joint)
            assert_same(one.mean, two.mean)
            assert_same(one.covariance_matrix, two.covariance_matrix)


@pytest.mark.parametrize("method", ["sample", "linearized"])
def test_predictions_are_those_of_two_calls(method: Any) -> None:
    lora, data = pl.lift(bert(1)), batches()
    model, other = pl.models.preference(lora, NUM_DATA), two_calls(lora, NUM_DATA)
    posterior = fit(lora, model, data)
    found = []
    for at, given in ((model, data), (other, with_labels(data))):
        torch.manual_seed(0)
        found.append(
            pl.predict(posterior, given, model=at, method=method, num_samples=5)
        )
    assert found[0].probs.shape == (NUM_DATA, 2)
    assert_same(found[0].log_probs, found[1].log_probs)
    known = pl.predict(posterior, with_labels(data), model=model, method=method)
    assert 0 <= known.metrics()["accuracy"] <= 1


def test_advantages_are_the_difference_and_what_is_open_of_it() -> None:
    lora, data = pl.lift(bert(1)), batches()
    model = pl.models.preference(lora, NUM_DATA)
    posterior = fit(lora, model, data)
    found = pl.predict(posterior, data, model=model.advantages)
    logits = [posterior.linearized({**b, "labels": None}) for b in data]
    contrast = torch.tensor([-1.0, 1.0]).double()
    assert_same(found.mean, torch.cat([g.mean @ contrast for g in logits]))
    variance = torch.cat([g.covariance_matrix @ contrast @ contrast for g in logits])
    assert_same(found.weight_variance, variance)
    each = particles(lora, 4)
    drawn = pl.ParticlePosterior(each, (lora,), model, "y")
    found = pl.predict(drawn, data, model=model.advantages)
    differences = []
    for k in range(4):
        with torch.no_grad(), lora.bind({s: x[k] for s, x in each.items()}) as net:
            r = [
                net(input_ids=b["input_ids"], attention_mask=b["attention_mask"])
                .logits[:, 0]
                .chunk(2)
                for b in data
            ]
        pairs = zip(r, data, strict=True)
        differences.append(torch.cat([a - c - b["margin"] for (a, c), b in pairs]))
    assert_same(found.mean, torch.stack(differences).mean(0))
    variance = torch.stack(differences).var(0, correction=0)
    assert_same(found.weight_variance, variance)


@pytest.mark.grid
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("space", ["joint", "function"])
def test_folded_particles_are_those_of_two_calls(space: Any, chunk_size: Any) -> None:
    lora, data = pl.lift(bert(1)), batches()
    start = particles(lora, 3)
    found = []
    for model, given in (
        (pl.models.preference(lora, NUM_DATA), data),
        (two_calls(lora, NUM_DATA), with_labels(data)),
    ):
        svgd = pl.SVGD(
            model,
            pl.kernels.RBF(space),
            Adam({"lr": 1e-2}),
            num_particles=3,
            chunk_size=chunk_size,
            init_loc_fn=lora.init_to(start),
        )
        losses = [svgd.step(**batch) for batch in 2 * given]
        found.append((flatten(svgd.get_samples()), torch.tensor(losses)))
    assert_close(found[0], found[1], rtol=1e-8, atol=1e-10)


def test_the_data_are_pairs_in_a_tree() -> None:
    lora, data = pl.lift(bert(1)), batches()
    model = pl.models.preference(lora, NUM_DATA)
    posterior = fit(lora, model, data)
    tree = pl.to_datatree(posterior, model=model, batches=data, num_samples=4)
    assert tree["log_likelihood"]["y"].shape == (1, 4, NUM_DATA)
    assert tree["posterior_predictive"]["y"].shape == (1, 4, NUM_DATA)


def test_rows_that_are_no_pairs_are_refused() -> None:
    batch = collated(2, 4, margin=False)
    odd = {name: x[:3] for name, x in batch.items()}
    with pytest.raises(ValueError, match=r"1 outputs for each of 3 rows, .*2 B"):
        pl.models.preference(pl.lift(bert(1)), 2)(**odd)
    with pytest.raises(ValueError, match=r"2 outputs.*num_labels=1"):
        pl.models.preference(pl.lift(bert(2)), 2)(**batch)
