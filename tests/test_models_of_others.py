"""Ways of writing models and networks that are unlike those of the other tests."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.testing import assert_close

import pyro_lora as pl
from tests import networks
from tests.predict import models

pytestmark = pytest.mark.untrained


class TwoScales(nn.Module):
    """Two linear layers of the same function; the second's gradients are 1/k."""

    def __init__(self, k: float) -> None:
        super().__init__()
        self.k = k
        self.a, self.b = nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.a(x) + self.b(x * self.k) / self.k
        return out


@pytest.mark.parametrize("structure", [pl.structures.Dense(), pl.structures.KFAC()])
def test_a_layer_of_small_gradients_counts_in_float32(structure: Any) -> None:
    x, y = torch.randn(20, 4), torch.randn(20)
    evidences = []
    for k in (1.0, 1e4):
        torch.manual_seed(1)
        lora = pl.lift(TwoScales(k))

        def model(
            x: Tensor, y: Tensor | None = None, lora: pl.LiftedNetwork = lora
        ) -> None:
            mean = lora()(x)[..., 0]
            with pyro.plate("data", 20, subsample=x):
                pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

        guide = pl.AutoLaplace(
            model, init_loc_fn=lora.init_to_adapter(), structure=structure
        )
        posterior = guide.laplace_approximation([{"x": x, "y": y}])
        evidences.append(float(posterior.log_evidence()))
    assert evidences[1] == pytest.approx(evidences[0], abs=1e-3)


class SortsRows(nn.Module):
    """Rows in the order of their lengths inside, as packed sequences are."""

    def __init__(self) -> None:
        super().__init__()
        self.mid = nn.Linear(3, 3).double()
        self.head = nn.Linear(3, 2).double()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        order = mask.sum(1).argsort(descending=True, stable=True)
        m = mask[order]
        hidden = torch.tanh(self.mid(x[order])) * m[..., None]
        pooled = hidden.sum(-2) / m.sum(-1, keepdim=True)
        out: Tensor = self.head(pooled[..., order.argsort(), :])
        return out


def test_a_network_that_sorts_its_rows_by_what_is_in_them() -> None:
    lora = pl.lift(SortsRows())

    def model(x: Tensor, mask: Tensor, labels: Tensor | None = None) -> None:
        logits = lora()(x, mask)
        with pyro.plate("data", 12, subsample=x):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    x = torch.randn(12, 6, 3).double()
    lengths = torch.tensor([6] * 6 + [2, 5, 3, 6, 1, 4])  # the first batch is in order
    mask = (torch.arange(6) < lengths[:, None]).double()
    labels = torch.randint(2, (12,))
    data = {"x": x, "mask": mask, "labels": labels}
    found, expected = (
        [{k: v[i : i + size] for k, v in data.items()} for i in range(0, 12, size)]
        for size in (6, 1)
    )
    for structure in (pl.structures.Dense(), pl.structures.KFAC()):
        guide = pl.AutoLaplace(
            model, init_loc_fn=lora.init_to_adapter(), structure=structure
        )
        one = guide.laplace_approximation(expected)
        six = guide.laplace_approximation(found)
        assert_close(six.log_evidence(), one.log_evidence(), rtol=0, atol=1e-10)
        each = torch.cat([one.linearized(b).covariance_matrix for b in expected])
        some = torch.cat([one.linearized(b).covariance_matrix for b in found])
        assert_close(some, each, rtol=0, atol=1e-10)


class WithSetting(PyroModule):
    """A model whose setting is an attribute, not a closure's."""

    def __init__(self, lora: pl.LiftedNetwork, temperature: float) -> None:
        super().__init__()
        self.lora, self.temperature = (lora,), temperature

    def forward(self, labels: Tensor | None = None, **texts: Tensor) -> None:
        logits = self.lora[0]()(**texts).logits / self.temperature
        with pyro.plate("data", 10, subsample=texts["input_ids"]):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)


def interrupted(batches: list[Any]) -> Any:
    yield batches[0]
    raise KeyboardInterrupt


class EndsEarly(list[Any]):
    def __iter__(self) -> Any:
        return interrupted(list(super().__iter__()))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_resumed_fit_knows_its_model(temperature: float, tmp_path: Any) -> None:
    lora, _ = models.classifier()
    batches = models.two_batches()

    def guide(temperature: float) -> pl.AutoLaplace:
        model = WithSetting(lora, temperature)
        return pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())

    with pytest.raises(KeyboardInterrupt):
        guide(1.0).laplace_approximation(EndsEarly(batches), checkpoint=tmp_path)
    # A fit of another kind in between, which fills the caches of what both use.
    pl.AutoLaplace(
        pl.models.classification(lora, 10), init_loc_fn=lora.init_to_adapter()
    ).laplace_approximation(batches)
    again = guide(temperature)
    if temperature != 1.0:
        with pytest.raises(ValueError, match="of another fit"):
            again.laplace_approximation(batches, checkpoint=tmp_path)
        return
    found = again.laplace_approximation(batches, checkpoint=tmp_path)
    expected = guide(1.0).laplace_approximation(batches)
    assert float(found.log_evidence()) == float(expected.log_evidence())


@pytest.mark.parametrize("backwards", [False, True])
def test_outcomes_are_those_of_the_model_in_whatever_order(backwards: bool) -> None:
    lora, _ = models.classifier()

    def model(labels: Tensor | None = None, **texts: Tensor) -> None:
        logits = lora()(**texts).logits
        with pyro.plate("data", 10, subsample=texts["input_ids"]):
            obs = None if labels is None else labels.clamp(max=1)
            pyro.sample("y", dist.Categorical(logits=logits), obs=obs)

    batches = models.two_batches()
    for number, batch in enumerate(batches):  # the first has nothing to clamp
        batch["labels"] = torch.randint(2, (len(batch["input_ids"]),)) + number
    batches = batches[::-1] if backwards else batches
    posterior = models.particles(lora, None, obs_site=None)
    found = pl.predict(posterior, batches, model=model).labels
    named = pl.predict(posterior, batches, model=model, labels="labels").labels
    assert torch.equal(named, found)
    expected = torch.cat([batch["labels"] for batch in batches]).clamp(max=1)
    assert torch.equal(found, expected)


def test_an_argument_that_the_model_needs_stays() -> None:
    lora, _ = models.classifier()
    texts = {k: v for k, v in networks.batch(10).items() if k != "labels"}
    labels = torch.randint(2, (10,))

    def model(idx: Tensor) -> None:
        logits = lora()(**{k: v[idx] for k, v in texts.items()}).logits
        with pyro.plate("data", 10, subsample=idx):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels[idx])

    batches = [{"idx": torch.arange(6)}, {"idx": torch.arange(6, 10)}]
    posterior = models.particles(lora, None, obs_site=None)
    found = pl.predict(posterior, batches, model=model)
    assert torch.equal(found.labels, labels)


@pytest.mark.parametrize("linearized", [False, True])
def test_preferences_of_nothing_but_texts(linearized: bool) -> None:
    lora = pl.lift(networks.bert(1))
    model = pl.models.preference(lora, 5)
    pairs = {k: v for k, v in networks.batch(10).items() if k != "labels"}
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
    posterior: Any = guide.laplace_approximation([pairs])
    if not linearized:
        posterior = pl.ensemble(lora, [posterior.mode()], model=model)
    found = pl.predict(posterior, [pairs])
    assert found.probs.shape == (5, 2)
    assert torch.equal(found.labels, torch.ones(5, dtype=torch.long))


def test_a_batch_that_fails_leaves_the_validation_as_it_was() -> None:
    lora, model = models.classifier()
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
    bad = [{**b, "labels": b["labels"] + 9} for b in models.two_batches()]
    before = torch.distributions.Distribution._validate_args
    try:
        for validates in (False, True):
            torch.distributions.Distribution.set_default_validate_args(validates)
            with pytest.raises(ValueError, match="Batch 0"):
                guide.laplace_approximation(bad)
            assert torch.distributions.Distribution._validate_args == validates
    finally:
        torch.distributions.Distribution.set_default_validate_args(before)


class ReadsItsWeight(nn.Module):
    """A layer that is called, and whose weight is read beside that."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.how = nn.Linear(3, 3, bias=False).double(), how

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.a(x))
        if self.how == "tied":
            return nn.functional.linear(hidden, self.a.weight.mT)
        if self.how == "forward":
            return self.a.forward(hidden)
        if self.how == "norm":
            return hidden / self.a.weight.square().sum().sqrt()
        out: Tensor = self.a(hidden)  # twice, by calls
        return out


@pytest.mark.parametrize("how", ["tied", "forward", "norm", "called"])
def test_a_weight_that_is_read_beside_its_layers_calls(how: str) -> None:
    lora = pl.lift(ReadsItsWeight(how))
    x = torch.randn(4, 3).double()

    def model(x: Tensor, y: Tensor | None = None) -> None:
        mean = lora()(x)
        with pyro.plate("data", 4, subsample=x):
            pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)

    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
    batches = [{"x": x, "y": torch.randn(4, 3).double()}]
    if how == "called":
        guide.laplace_approximation(batches)
        return
    with pytest.raises(ValueError, match=r"'a.weight' in 2 places.*called 1 times"):
        guide.laplace_approximation(batches)
