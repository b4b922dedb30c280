"""The log joint at many weight sets: rows of the network, the linearised one on all."""

import itertools
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import autoguide
from torch import Tensor, nn

import pyro_lora as pl
from pyro_lora.diagnose import diagnosis, log_joint
from pyro_lora.diagnose.log_joint import LogJoint, LogLikelihoods, WeightSets
from pyro_lora.likelihood.batch import PlacedBatch
from tests.predict import models

N = 24


def wide_classifier(num_classes: int = 2) -> tuple[Any, Any, list[models.Batch]]:
    """A network that is far from linear, on more rows than are always run."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.1), nn.Linear(5, num_classes)
    )
    lora = pl.lift(net.double().eval(), prior=pl.priors.normal(scale=1.0))
    x, y = torch.randn(N, 4).double(), torch.randint(num_classes, (N,))

    def model(x: Tensor, labels: Tensor | None = None) -> None:
        logits = lora()(x)
        with pyro.plate("data", N, subsample=x):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    sizes = (9, 9, 6)
    pairs = zip(x.split(sizes), y.split(sizes), strict=True)
    return lora, model, [{"x": a, "labels": b} for a, b in pairs]


def sets_of(posterior: pl.LaplacePosterior, num_points: int = 5) -> WeightSets:
    steps, _ = posterior.gaussian.informed_directions(2)
    z = torch.randn(num_points, 2).double()
    return WeightSets(posterior.mode(), steps, z, posterior.sample(3))


def passed(joint: LogJoint, posterior: Any, sets: WeightSets, num_rows: int) -> Any:
    return log_joint.linear_pass(
        joint,
        posterior,
        sets,
        num_rows,
        has_joint=True,
        predicts=True,
        labels=None,
    )


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("structure", [pl.structures.KFAC(), pl.structures.Exact()])
def test_with_all_rows_it_is_that_of_the_network(
    structure: Any, num_classes: int
) -> None:
    lora, model, batches = wide_classifier(num_classes)
    posterior = models.laplace(lora, model, batches, structure)
    joint, sets = LogJoint(posterior, model, batches, "y"), sets_of(posterior)
    whole = log_joint.exact(joint, sets)
    found = passed(joint, posterior, sets, N)
    value, error = found.log_likelihoods.of(lambda x: x)
    torch.testing.assert_close(value, whole.known, rtol=0, atol=1e-9)
    torch.testing.assert_close(error, torch.zeros_like(error), rtol=0, atol=1e-9)
    assert found.log_likelihoods.num_data == N
    # One by one, of whole batches in no order.
    for i, weights in enumerate(each_of(sets)):
        logits = torch.cat([models_logits(lora, weights, b) for b in batches])
        labels = torch.cat([b["labels"] for b in batches])
        expected = dist.Categorical(logits=logits).log_prob(labels).sum()
        assert float(whole.known[i]) == pytest.approx(float(expected), abs=1e-9)


def each_of(sets: WeightSets) -> list[dict[str, Tensor]]:
    mode = dict(sets.mode)
    points = [
        {s: x + torch.tensordot(z, sets.steps[s], 1) for s, x in mode.items()}
        for z in sets.coordinates
    ]
    num = len(next(iter(sets.draws.values())))
    return [mode, *points, *(models.draw(sets.draws, w) for w in range(num))]


def models_logits(lora: Any, weights: Any, batch: models.Batch) -> Tensor:
    with lora.bind(weights) as net, torch.no_grad():
        return net(batch["x"])


def test_each_row_stands_for_all_by_its_own_difference() -> None:
    lora, model, batches = wide_classifier()
    posterior = models.laplace(lora, model, batches)
    joint, sets = LogJoint(posterior, model, batches, "y"), sets_of(posterior)
    each = passed(joint, posterior, sets, N).log_likelihoods
    some = passed(joint, posterior, sets, 8).log_likelihoods
    assert (len(each.rest), len(some.rest), some.num_data) == (N, 8, 8)
    assert some.unseen == pytest.approx(2 / 3)
    torch.testing.assert_close(some.known, each.known, rtol=0, atol=1e-9)
    # Units are N times a row's difference: of a random 8 of the 24, unbiased.
    gaps = (some.rest[:, None] - each.rest).abs().amax(-1)  # (8, 24)
    assert ((gaps < 1e-9).sum(1) == 1).all()
    assert ((gaps < 1e-9).sum(0) <= 1).all()
    # At the mode the linearised network is the network.
    assert float(some.rest[:, 0].abs().max()) < 1e-9
    assert float(some.rest[:, 1:].abs().max()) > 1e-3


@given(
    known=st.lists(st.floats(-5, 5), min_size=3, max_size=3),
    rest=st.lists(
        st.lists(st.floats(-5, 5), min_size=3, max_size=3), min_size=2, max_size=6
    ),
    unseen=st.floats(0, 1),
)
@settings(max_examples=40)
def test_of_a_linear_function_the_error_is_the_textbooks(
    known: list[float], rest: list[list[float]], unseen: float
) -> None:
    parts = torch.tensor(rest).double()
    found = LogLikelihoods(torch.tensor(known).double(), parts, unseen, 9)
    a = torch.tensor([2.0, -1.0, 0.5]).double()
    value, error = found.of(lambda x: a @ x)
    assert float(value) == pytest.approx(float(a @ (found.known + parts.mean(0))))
    # The variance of a mean of U units without replacement, (1 - m/N) s^2 / U.
    variance = unseen * float((parts @ a).var()) / len(parts)
    assert float(error) == pytest.approx(math.sqrt(variance), abs=1e-6)


def test_rows_are_drawn_evenly_and_whole_batches_where_they_have_no_rows() -> None:
    pyro.set_rng_seed(2)
    counts = torch.zeros(10)
    for _ in range(300):
        sample = log_joint._Sample(4, by_row=True)
        for first in (0, 6):
            x = torch.arange(first, min(first + 6, 10))
            sample.offer(PlacedBatch({"x": x}), x[None].double())
        assert (sample.seen, len(sample.units)) == (10, 4)
        for unit in sample.units:
            assert unit.known.tolist() == unit.batch["x"].tolist()
            counts[int(unit.known)] += 1
    # Of 300 * 4 / 10 = 120 each, sd sqrt(300 * .4 * .6) = 8.5
    assert (counts - 120).abs().max() < 34


def test_what_cannot_be_taken_apart_is_run_in_whole_batches() -> None:
    lora, model, batches = wide_classifier()

    def of_pairs(x: Tensor, labels: Tensor | None, shift: Tensor) -> None:
        model(x=x + shift.mean(0), labels=labels)  # (7, 4): no row for each datum

    batches = [{**b, "shift": torch.ones(7, 4).double()} for b in batches]
    posterior = models.laplace(lora, of_pairs, batches)
    joint, sets = LogJoint(posterior, of_pairs, batches, "y"), sets_of(posterior)
    whole = log_joint.exact(joint, sets).known
    two = passed(joint, posterior, sets, 5).log_likelihoods  # the least
    assert len(two.rest) == 2
    three = passed(joint, posterior, sets, N).log_likelihoods
    torch.testing.assert_close(three.of(lambda x: x)[0], whole, rtol=0, atol=1e-9)


def test_a_tensor_that_is_only_as_long_as_the_batch_keeps_batches_whole() -> None:
    lora, _, batches = wide_classifier(3)
    batches = [
        {k: x[i : i + 3] for k, x in batch.items()}
        for batch in batches
        for i in range(0, len(batch["x"]), 3)
    ]

    def weighted(x: Tensor, labels: Tensor | None = None, of_class: Any = None) -> None:
        logits = lora()(x) + of_class
        with pyro.plate("data", N, subsample=x):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    of_class = torch.tensor([1.0, 0.0, -1.0]).double()
    batches = [{**b, "of_class": of_class} for b in batches]
    posterior = models.laplace(lora, weighted, batches)
    joint, sets = LogJoint(posterior, weighted, batches, "y"), sets_of(posterior)
    assert not joint.is_by_row(sets.mode)
    found = passed(joint, posterior, sets, N).log_likelihoods
    assert len(found.rest) == len(batches)
    whole = log_joint.exact(joint, sets).known
    torch.testing.assert_close(found.of(lambda x: x)[0], whole, rtol=0, atol=1e-9)


def test_data_that_depend_on_their_batch_keep_it_whole() -> None:
    lora, model, batches = wide_classifier()

    def centred(x: Tensor, labels: Tensor | None = None) -> None:
        model(x - x.mean(0), labels)

    posterior = models.laplace(lora, centred, batches)
    joint, sets = LogJoint(posterior, centred, batches, "y"), sets_of(posterior)
    assert not joint.is_by_row(sets.mode)
    assert LogJoint(posterior, model, batches, "y").is_by_row(sets.mode)
    found = passed(joint, posterior, sets, N).log_likelihoods
    whole = log_joint.exact(joint, sets).known
    torch.testing.assert_close(found.of(lambda x: x)[0], whole, rtol=0, atol=1e-9)


def test_shorter_batches_and_settings_stay_what_they_are() -> None:
    lora, model = models.classifier()

    def scaled(labels: Tensor | None = None, power: float = 1.0, **given: Any) -> None:
        with pyro.poutine.scale(scale=power):
            model(labels=labels, **given)

    batches = [{**b, "power": 0.5} for b in models.two_batches()]
    batches[1] = {
        k: x[:, :-1] if isinstance(x, Tensor) and x.ndim > 1 else x
        for k, x in batches[1].items()
    }
    posterior = models.laplace(lora, scaled, batches)
    joint, sets = LogJoint(posterior, scaled, batches, "y"), sets_of(posterior)
    whole = log_joint.exact(joint, sets).known
    found = passed(joint, posterior, sets, 10).log_likelihoods
    torch.testing.assert_close(found.of(lambda x: x)[0], whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("structure", [pl.structures.KFAC(), pl.structures.Exact()])
def test_one_pass_has_the_gradient_and_the_prediction(structure: Any) -> None:
    lora, model, batches = wide_classifier(3)
    posterior = models.laplace(lora, model, batches, structure)
    joint = LogJoint(posterior, model, batches, "y")
    found = passed(joint, posterior, sets_of(posterior), N)
    expected = joint.gradient(posterior.mode())
    for site, g in found.gradient.items():
        torch.testing.assert_close(g, expected[site], rtol=1e-9, atol=1e-9)
    prediction = pl.predict(posterior, batches, model=model)
    torch.testing.assert_close(found.prediction.log_probs, prediction.log_probs)
    assert torch.equal(found.prediction.labels, prediction.labels)


def test_a_scale_that_the_network_outputs_is_in_the_gradient() -> None:
    lora, _, batches = wide_classifier()

    def model(x: Tensor, labels: Tensor | None = None) -> None:
        loc, log_scale = lora()(x).unbind(-1)
        with pyro.plate("data", N, subsample=x):
            pyro.sample("y", dist.Normal(loc, log_scale.exp()), obs=labels)

    batches = [{**b, "labels": b["labels"].double()} for b in batches]
    posterior = models.laplace(lora, model, batches, pl.structures.Dense())
    joint = LogJoint(posterior, model, batches, "y")
    of_pass = passed(joint, posterior, sets_of(posterior), 5)
    expected = joint.gradient(posterior.mode())
    assert of_pass.gradient is not None
    for site, x in of_pass.gradient.items():
        torch.testing.assert_close(x, expected[site], rtol=1e-9, atol=1e-9)
    found = pl.diagnose(posterior, batches, num_samples=25, max_passes=1.0)
    assert found.stationarity is not None
    leaves = {s: x.requires_grad_() for s, x in posterior.mode().items()}
    total: Any = 0
    for batch in batches:
        trace: Any = poutine.trace(poutine.condition(model, leaves)).get_trace(**batch)
        node = trace.nodes["y"]
        total = total + node["fn"].log_prob(node["value"]).sum()
    total = total + sum(
        dist.Normal(0.0, 1.0).log_prob(x).sum() for x in leaves.values()
    )
    g = torch.autograd.grad(total, list(leaves.values()))
    newton = posterior.gaussian.newton_decrement(dict(zip(leaves, g, strict=True)))
    assert found.stationarity.newton_decrement == pytest.approx(float(newton))


class Rows:
    """Counts the rows that go through a network, and the backward passes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, network: nn.Module) -> None:
        self.rows = self.backwards = 0
        network.register_forward_hook(self.count)
        grad = torch.autograd.grad

        def counted(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.backwards += isinstance(inputs, list) and len(inputs) > 1
            return grad(outputs, inputs, *args, **kwargs)

        monkeypatch.setattr(torch.autograd, "grad", counted)

    def count(self, module: Any, args: Any, output: Tensor) -> None:
        self.rows += output.shape[:-1].numel()


def test_a_diagnosis_takes_three_passes_and_one_with_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lora, _, _ = wide_classifier()
    num = 40
    batches = [
        {"x": torch.randn(30, 4).double(), "labels": torch.randint(2, (30,))}
        for _ in range(num)
    ]
    total = 30 * num

    def larger(x: Tensor, labels: Tensor | None = None) -> None:
        logits = lora()(x)
        with pyro.plate("data", total, subsample=x):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    posterior = models.laplace(lora, larger, batches)
    pl.diagnose(posterior, batches, num_samples=25)  # what is learnt once
    seen = Rows(monkeypatch, lora.network)
    found = pl.diagnose(posterior, batches, num_samples=25)
    # One pass, three more by the rows, and a few runs of the first batch.
    assert 4 * total <= seen.rows <= 4 * total + 7 * 30 + 52
    assert seen.backwards == num + 1  # of two classes one a batch, and the prior's
    assert isinstance(found.gaussian, diagnosis.Directions)
    assert found.gaussian.num_rows == math.ceil(3 * total / (16 + 25 + 11))
    assert "rows of 1200, the others linearised: +- " in str(found)


def passes_of(monkeypatch: pytest.MonkeyPatch, lora: Any, call: Any) -> float:
    seen = Rows(monkeypatch, lora.network)
    call()
    return seen.rows


def test_what_others_than_laplace_take(monkeypatch: pytest.MonkeyPatch) -> None:
    lora, model, batches = wide_classifier()
    first = len(batches[0]["x"])  # a run of the first batch, to see what is where
    particles = pl.ensemble(lora, [lora.weights()] * 3, model=model)
    delta = autoguide.AutoDelta(model, init_loc_fn=lora.init_to_adapter())
    delta(**batches[0])
    dropout = pl.mc_dropout(lora, model=model)
    for posterior in (particles, dropout):  # whether draws are mixed is seen once
        pl.predict(posterior, batches[:1])
    kinds = ((particles, 3, 5), (delta, 1, 5), (dropout, 64, 12))
    for posterior, num_draws, spare in kinds:
        with monkeypatch.context() as patch:
            rows = passes_of(
                patch, lora, lambda p=posterior: pl.diagnose(p, batches, model=model)
            )
        assert num_draws * N <= rows <= num_draws * N + spare * first, num_draws
        lora.network._forward_hooks.clear()
    # Of held-out data the training data's pass isn't run where nothing asks for it.
    posterior = models.laplace(lora, model, batches)
    bare = [{"x": b["x"]} for b in batches]
    rows = passes_of(
        monkeypatch, lora, lambda: pl.diagnose(posterior, bare, held_out=batches[:1])
    )
    assert rows <= 6 * first


def test_in_passes_of_all_data_it_has_no_error() -> None:
    pyro.set_rng_seed(5)
    lora, model, batches = wide_classifier()
    posterior = models.laplace(lora, model, batches)
    found = [
        pl.diagnose(posterior, batches, num_samples=25, max_passes=passes).gaussian
        for passes in itertools.chain([None], [1.0] * 2)
    ]
    whole, part, _ = found
    assert isinstance(whole, diagnosis.Directions)
    assert isinstance(part, diagnosis.Directions)
    assert (whole.num_rows, part.num_rows, part.num_data) == (N, 16, N)
    assert float(whole.log_joint_errors.max()) == whole.k_hat_error == 0
    gaps = (part.log_joint - whole.log_joint).abs()
    assert (gaps < 5 * part.log_joint_errors + 1e-9).all()
    with pytest.raises(ValueError, match="max_passes"):
        pl.diagnose(posterior, batches, max_passes=0.0)
