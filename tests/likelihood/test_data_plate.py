"""A plate that draws its own rows, and those who must see each datum once."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import SGD
from torch import Tensor

import pyro_lora as pl
from pyro_lora import structures
from tests import networks
from tests.curvature.gauss_newton import assert_same, laplace, split

pytestmark = pytest.mark.untrained

NUM_DATA, SIZE = 6, 2


class Setting:
    """A network, its data, and a model that takes rows of them from its plate."""

    def __init__(self, **plate: Any) -> None:
        self.lora = pl.lift(networks.bert(3))
        self.texts = networks.batch(NUM_DATA, num_labels=3)
        self.batches = split(self.texts, SIZE)
        self.rows = [{"rows": x} for x in torch.arange(NUM_DATA).split(SIZE)]

        def model(rows: Tensor) -> Tensor:
            net = self.lora()
            own = plate or {"subsample": rows}
            with pyro.plate("texts", NUM_DATA, **own) as i:
                of_rows = {name: x[i] for name, x in self.texts.items()}
                fn = dist.Categorical(logits=net(**networks.inputs(of_rows)).logits)
                return pyro.sample("y", fn, obs=of_rows["labels"])

        self.model = model

    def guide(self, structure: Any) -> pl.AutoLaplace:
        init = self.lora.init_to_adapter()
        return pl.AutoLaplace(self.model, init_loc_fn=init, structure=structure)

    def fitted(self, structure: Any) -> pl.LaplacePosterior:
        """By the model of the same data that are given to it."""
        return laplace(self.lora, self.texts, SIZE, structure=structure)

    def by_rows(self) -> pl.LaplacePosterior:
        """The same, of a model that has this one's arguments."""
        given = Setting()
        posterior = given.guide(structures.Exact()).laplace_approximation(given.rows)
        self.lora, self.texts = given.lora, given.texts  # which the model looks up
        return posterior

    def svgd(self) -> pl.SVGD:
        init = self.lora.init_to_adapter(jitter=0.1)
        kernel = pl.kernels.NoRepulsion()
        return pl.SVGD(self.model, kernel, SGD({"lr": 1e-3}), 2, init_loc_fn=init)

    def svi(self) -> pl.AutoLaplace:
        guide = self.guide(structures.Dense())
        pyro.clear_param_store()
        engine = SVI(self.model, guide, SGD({"lr": 1e-3}), Trace_ELBO())
        assert all(engine.step(**batch) for batch in self.rows)
        return guide

    def of_particles(self, function: Callable[..., Any]) -> Any:
        return function(self.model, networks.particles(self.lora, 2), self.rows)

    def of_guide(self) -> Any:
        guide = AutoNormal(self.model, init_loc_fn=self.lora.init_to_adapter())
        SVI(self.model, guide, SGD({"lr": 1e-4}), Trace_ELBO()).step(**self.rows[0])
        return pl.predict(guide, self.rows, model=self.model)


MUST_SEE_EACH_ONCE: dict[str, Callable[[Setting], Any]] = {
    "fit": lambda s: s.guide(structures.Dense()).laplace_approximation(s.rows),
    "fit after SVI": lambda s: s.svi().laplace_approximation(s.rows),
    "EKFAC": lambda s: s.guide(structures.EKFAC()).laplace_approximation(s.rows),
    "Exact": lambda s: s.guide(structures.Exact()).laplace_approximation(s.rows),
    "refit": lambda s: s.guide(structures.Dense()).refit(
        s.fitted(structures.Dense()), s.rows, SGD({"lr": 1e-4})
    ),
    "predict": lambda s: pl.predict(s.by_rows(), s.rows, model=s.model),
    "predict by particles": lambda s: pl.predict(
        pl.ensemble(s.lora, [s.lora.weights()] * 2, model=s.model), s.rows
    ),
    "predict by a guide of Pyro's": lambda s: s.of_guide(),
    "to_datatree": lambda s: pl.to_datatree(s.by_rows(), s.rows, model=s.model),
    "diagnose": lambda s: pl.diagnose(s.by_rows(), s.rows, model=s.model),
    "discrepancy": lambda s: s.of_particles(pl.kernelized_stein_discrepancy),
    "effective": lambda s: s.of_particles(pl.effective_num_predictions),
}


@pytest.mark.parametrize("name", MUST_SEE_EACH_ONCE)
def test_a_plate_that_draws_its_own_rows_is_refused(name: str) -> None:
    setting = Setting(subsample_size=SIZE)
    # A refit says so where it would train, not after it.
    place = "The batch" if name == "refit" else "Batch 0"
    words = (
        f"{place}: plate 'texts' draws its own rows, 2 of 6 at random and others in "
        "each run, but here each datum must be seen once. Give the rows to the model "
        "as an argument and say subsample=, as in pyro.plate('texts', 6, "
        "subsample=input_ids). SVI and SVGD take the model as it is."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        MUST_SEE_EACH_ONCE[name](setting)


def test_tuning_the_prior_on_rows_that_are_drawn_is_refused() -> None:
    setting = Setting(subsample_size=SIZE)
    posterior = replace(setting.fitted(structures.KFAC()), model=setting.model)
    with pytest.raises(ValueError, match="plate 'texts' draws its own rows"):
        posterior.optimize_prior(objective="nll", batches=setting.rows)


@pytest.mark.parametrize("structure", [structures.EKFAC(), structures.Exact()])
def test_rows_that_are_given_to_the_plate_are_each_seen_once(structure: Any) -> None:
    """The oracle is the ready model on the same data in the same order."""
    setting = Setting()
    found = setting.guide(structure).laplace_approximation(setting.rows)
    expected = setting.fitted(structure)
    assert_same(found.log_likelihood, expected.log_likelihood)
    assert_same(found.log_evidence(), expected.log_evidence())
    if isinstance(structure, structures.Exact):
        assert_same(found.leave_one_out(), expected.leave_one_out())
    predicted = pl.predict(found, setting.rows)
    assert_same(predicted.probs, pl.predict(expected, setting.batches).probs)
    assert predicted.labels is not None
    assert predicted.labels.tolist() == setting.texts["labels"].tolist()


@pytest.mark.parametrize("plate", [{"subsample_size": NUM_DATA}, {"dim": -1}])
def test_a_plate_of_all_rows_draws_none(plate: dict[str, Any]) -> None:
    setting = Setting(**plate)
    all_rows = [{"rows": torch.arange(NUM_DATA)}]
    found = setting.guide(structures.Dense()).laplace_approximation(all_rows)
    expected = setting.fitted(structures.Dense())
    assert_same(found.log_likelihood, expected.log_likelihood)
    assert_same(found.log_evidence(), expected.log_evidence())


def test_training_takes_the_rows_that_a_plate_draws() -> None:
    setting = Setting(subsample_size=SIZE)
    start = setting.lora.weights()
    mode = setting.svi().median()
    svgd = setting.svgd()
    svgd.run(setting.rows, num_epochs=1, progress_bar=False)
    for trained in (mode, {s: x[0] for s, x in svgd.get_named_particles().items()}):
        assert all((trained[site] != x).any() for site, x in start.items())


def test_a_plate_may_say_how_many_rows_a_batch_has_and_leave_alone_which() -> None:
    setting = Setting()
    net = setting.lora

    def model(labels: Tensor | None = None, **texts: Tensor) -> Tensor:
        network = net()
        with pyro.plate("texts", NUM_DATA, subsample_size=len(texts["input_ids"])):
            fn = dist.Categorical(logits=network(**texts).logits)
            return pyro.sample("y", fn, obs=labels)

    init = net.init_to_adapter()
    guide = pl.AutoLaplace(model, init_loc_fn=init, structure=structures.Exact())
    found = guide.laplace_approximation(setting.batches)
    expected = setting.fitted(structures.Exact())
    assert_same(found.log_likelihood, expected.log_likelihood)
    assert_same(found.log_evidence(), expected.log_evidence())
    assert_same(found.leave_one_out(), expected.leave_one_out())
    predicted = pl.predict(found, setting.batches)
    assert_same(predicted.probs, pl.predict(expected, setting.batches).probs)


LOOKED_UP: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "index": lambda x, i: x[i],
    "index_select": lambda x, i: x.index_select(0, i),
    "gather": lambda x, i: x.gather(0, i[:, None].expand(-1, x.shape[1])),
    "by pyro.subsample": lambda x, i: pyro.subsample(x, event_dim=1),
    "in a list": lambda x, i: torch.stack([list(x)[j] for j in i.tolist()]),
    "one by one": lambda x, i: torch.stack([x[int(j)] for j in i]),
    "in NumPy": lambda x, i: torch.from_numpy(x.numpy()[i.numpy()]),
    "by a detached copy": lambda x, i: x[i.detach()],
    "by their data": lambda x, i: x[i.data],
}


@pytest.mark.parametrize("name", LOOKED_UP)
def test_rows_are_refused_however_they_are_looked_up(name: str) -> None:
    setting = Setting()
    texts, labels = networks.inputs(setting.texts), setting.texts["labels"]

    def model(rows: Tensor) -> Tensor:
        net = setting.lora()
        with pyro.plate("texts", NUM_DATA, subsample_size=SIZE) as i:
            of_rows = {key: LOOKED_UP[name](x, i) for key, x in texts.items()}
            fn = dist.Categorical(logits=net(**of_rows).logits)
            return pyro.sample("y", fn, obs=labels[:SIZE])

    guide = pl.AutoLaplace(model, init_loc_fn=setting.lora.init_to_adapter())
    with pytest.raises(ValueError, match="plate 'texts' draws its own rows"):
        guide.laplace_approximation(setting.rows)
