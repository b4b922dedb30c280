"""SVGD as an engine: optimisers, schedules, and what it leaves alone."""

import warnings
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import SGD, Adam
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import DataLoader, IterableDataset

import pyro_lora as pl
from pyro_lora import kernels
from tests import networks
from tests.infer import double_loop
from tests.infer.engines import (
    OPTIMIZERS,
    assert_same,
    engine,
    exponential,
    plateau,
    regression_batches,
)
from tests.infer.targets import NUM_DATA, hierarchical_regression

# Most batches here are a part of the data, which is told, and tested below.
pytestmark = pytest.mark.filterwarnings("ignore:The batches of an epoch hold")


@pytest.mark.parametrize("name", ["Adam", "ClippedAdam", "SGD", "clipped"])
def test_optimizers_follow_the_direction(name: str) -> None:
    # Two steps, the second with momentum, against the optimiser on plain tensors.
    target = hierarchical_regression(3)
    svgd = engine(target, OPTIMIZERS[name]())
    leaves = {s: x.clone().requires_grad_() for s, x in target.particles.items()}
    oracle = {
        "Adam": lambda x: torch.optim.Adam(x, lr=0.05),
        "ClippedAdam": lambda x: ClippedAdam(x, lr=0.05, clip_norm=1.0),
        "SGD": lambda x: torch.optim.SGD(x, lr=0.01, momentum=0.9),
        "clipped": lambda x: torch.optim.Adam(x, lr=0.05),
    }[name](list(leaves.values()))
    for _ in range(2):
        svgd.step(**target.batch)
        at = double_loop.points({s: x.detach() for s, x in leaves.items()})
        by_site = double_loop.joint_rbf(at, None)
        phi = double_loop.stein(at, target.log_joint, by_site)
        for site, x in leaves.items():
            x.grad = -phi[site]
            if name == "clipped":
                torch.nn.utils.clip_grad_norm_(x, 3.0)
        oracle.step()
    expected = {site: x.detach() for site, x in leaves.items()}
    particles = svgd.state_dict()["particles"]
    assert_close(particles, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "factors"),
    [
        ("ExponentialLR", [1.0, 0.5, 0.25]),
        ("LambdaLR", [1.0, 1 / 2, 1 / 3]),
        ("ReduceLROnPlateau", [1.0, 1.0, 0.1]),
    ],
)
def test_run_steps_a_scheduler_once_an_epoch(name: str, factors: list[float]) -> None:
    optim = OPTIMIZERS[name]()
    rates: list[float] = []

    class Watched(list[dict[str, Tensor]]):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            for batch in super().__iter__():
                yield batch
                inner = next(iter(optim.optim_objs.values()))
                rates.append(inner.optimizer.param_groups[0]["lr"])

    target = hierarchical_regression(3)
    svgd = engine(target, optim)
    svgd.run(Watched(regression_batches(2)), num_epochs=3, progress_bar=False)
    start = rates[0]
    expected = [start * factor for factor in factors for _ in range(2)]
    assert rates == pytest.approx(expected)
    assert start in (0.1, 0.01)


# All of Pyro's but Muon, which is for matrices, and SparseAdam.
ALONE = (
    "Adadelta Adafactor Adagrad AdagradRMSProp Adam AdamW Adamax ASGD ClippedAdam "
    "DCTAdam NAdam RAdam RMSprop Rprop SGD"
).split()


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.few(5)
def test_any_optimizer(name: str) -> None:
    target = hierarchical_regression(2)
    settings = {} if name == "AdagradRMSProp" else {"lr": 0.01}
    optim = getattr(pyro.optim, name)(settings)
    svgd = engine(target, optim, kernels.NoRepulsion())
    leaves = {s: x.clone().requires_grad_() for s, x in target.particles.items()}
    oracle = optim.pt_optim_constructor(list(leaves.values()), **settings)
    for _ in range(3):
        svgd.step(**target.batch)
        for particle in range(2):
            at = {s: x.detach()[particle] for s, x in leaves.items()}
            score = double_loop.gradient(target.log_joint, at)
            for site, x in leaves.items():
                x.grad = torch.zeros_like(x) if particle == 0 else x.grad
                assert x.grad is not None
                x.grad[particle] = -score[site]
        oracle.step()
    particles = svgd.state_dict()["particles"]
    expected = {site: x.detach() for site, x in leaves.items()}
    assert_close(particles, expected, rtol=1e-9, atol=1e-9)
    assert any((x != target.particles[s]).all() for s, x in particles.items())


SCHEDULERS: dict[str, dict[str, Any]] = {
    "ConstantLR": {"factor": 0.5, "total_iters": 2},
    "CosineAnnealingLR": {"T_max": 3},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "CyclicLR": {"base_lr": 1e-4, "max_lr": 1e-3, "step_size_up": 2},
    "LinearLR": {"start_factor": 0.5, "total_iters": 3},
    "MultiStepLR": {"milestones": [1, 2]},
    "MultiplicativeLR": {"lr_lambda": lambda epoch: 0.9},
    "OneCycleLR": {"max_lr": 1e-3, "total_steps": 5},
    "PolynomialLR": {"total_iters": 4},
    "StepLR": {"step_size": 2},
}


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_any_scheduler(name: str) -> None:
    target = hierarchical_regression(2)
    arguments = {"lr": 1e-3, "momentum": 0.9}
    optim = getattr(pyro.optim, name)(
        {"optimizer": torch.optim.SGD, "optim_args": arguments, **SCHEDULERS[name]}
    )
    svgd = engine(target, optim, kernels.NoRepulsion())
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], **arguments)
    oracle = getattr(torch.optim.lr_scheduler, name)(sgd, **SCHEDULERS[name])
    rates = set()
    for _ in range(4):
        svgd.run([target.batch, target.batch], num_epochs=1, progress_bar=False)
        sgd.step()
        oracle.step()
        for inner in optim.optim_objs.values():
            assert inner.get_last_lr() == oracle.get_last_lr()
        rates.add(oracle.get_last_lr()[0])
    assert len(rates) > 1


def test_an_optimizer_that_fails_moves_nothing() -> None:
    target = hierarchical_regression(2)
    svgd = engine(target, Adam({"rate": 0.1}))
    with pytest.raises(TypeError, match="rate"):
        svgd.step(**target.batch)
    assert_close(svgd.state_dict()["particles"], target.particles)
    assert svgd.diagnostics == {}


def test_a_plateau_is_one_of_the_loss() -> None:
    optim = plateau(threshold=1e-3)
    target = hierarchical_regression(3)
    svgd = engine(target, optim, kernels.NoRepulsion())
    svgd.run([target.batch], num_epochs=5, progress_bar=False)
    losses = svgd.diagnostics["loss"]
    assert all(after < before - 1e-3 for before, after in pairwise(losses))
    rates = [
        inner.optimizer.param_groups[0]["lr"] for inner in optim.optim_objs.values()
    ]
    assert rates == [0.01] * len(target.particles)


def test_a_shared_scheduler_steps_for_one_engine_at_a_time() -> None:
    optim = exponential()
    target = hierarchical_regression(2)
    one, other = engine(target, optim), engine(target, optim)
    batches = regression_batches(1)
    one.run(batches, num_epochs=1, progress_bar=False)
    other.run(batches, num_epochs=2, progress_bar=False)
    one.run(batches, num_epochs=1, progress_bar=False)
    assert_same(one.get_named_particles(), other.get_named_particles())


def test_two_engines_side_by_side() -> None:
    # In turn they do what each does alone.
    targets = hierarchical_regression(3), hierarchical_regression(3)
    alone = []
    for target in targets:
        svgd = engine(target, Adam({"lr": 0.05}))
        for _ in range(3):
            svgd.step(**target.batch)
        alone.append(svgd.get_named_particles())
    optim = Adam({"lr": 0.05})  # even with one optimiser for both
    both = [engine(target, optim) for target in targets]
    for _ in range(3):
        for svgd, target in zip(both, targets, strict=True):
            svgd.step(**target.batch)
    for svgd, expected in zip(both, alone, strict=True):
        assert_same(svgd.get_named_particles(), expected)


@pytest.mark.parametrize(
    "kernel",
    [kernels.RBF(), kernels.RBF(space="function"), kernels.NoRepulsion()],
)
def test_network_and_param_store_stay_as_they_were(kernel: Any) -> None:
    network = networks.bert()
    before = {name: x.clone() for name, x in network.state_dict().items()}
    trainable = [n for n, p in network.named_parameters() if p.requires_grad]
    lora = pl.lift(network)
    svgd = pl.SVGD(
        pl.models.classification(lora, NUM_DATA),
        kernel,
        Adam({"lr": 0.1}),
        3,
        init_loc_fn=lora.init_to_adapter(jitter=0.1),
    )
    svgd.run([networks.batch(), networks.batch()], num_epochs=2, progress_bar=False)
    svgd.posterior()
    assert list(network.state_dict()) == list(before)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
    assert [n for n, p in network.named_parameters() if p.requires_grad] == trainable
    assert all(p.grad is None for p in network.parameters())
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize("num_epochs", [1, 3])
@pytest.mark.parametrize("repulsive", [True, False])
def test_schedules_run_from_0_to_1(num_epochs: int, repulsive: bool) -> None:
    target = hierarchical_regression(3)
    seen: list[float] = []
    strengths: list[float] = []

    def temperature(fraction: float) -> float:
        seen.append(fraction)
        return 1 + fraction

    def repulsion(fraction: float, loss: float) -> float:
        strengths.append(fraction)
        return 1.0

    svgd = engine(
        target,
        SGD({"lr": 0.01}),
        temperature=temperature,
        **({"transport": "repulsive", "repulsion": repulsion} if repulsive else {}),
    )
    svgd.run(regression_batches(2), num_epochs=num_epochs, progress_bar=False)
    steps = 2 * num_epochs
    expected = [step / (steps - 1) for step in range(steps)]
    assert seen == pytest.approx(expected, abs=1e-15)
    assert seen[0] == 0
    assert seen[-1] == 1
    assert strengths == (seen if repulsive else [])
    svgd.step(**target.batch)
    assert seen[-1] == 1


def test_the_schedule_of_a_single_step_is_at_its_end() -> None:
    target = hierarchical_regression(2)
    seen: list[float] = []
    svgd = engine(
        target, SGD({"lr": 0.01}), temperature=lambda u: seen.append(u) or 1.0
    )
    svgd.run([target.batch], num_epochs=1, progress_bar=False)
    assert seen == [1.0]


def test_the_schedule_is_at_its_end_after_a_run_that_broke() -> None:
    target = hierarchical_regression(2)
    seen: list[float] = []
    svgd = engine(
        target, SGD({"lr": 0.01}), temperature=lambda u: seen.append(u) or 1.0
    )
    with pytest.raises(ValueError, match="Batch 1 has"):
        svgd.run([target.batch, {"wrong": 1}], num_epochs=2, progress_bar=False)
    svgd.step(**target.batch)
    assert seen == [0.0, 1.0]


def test_a_schedule_sets_the_temperature() -> None:
    target = hierarchical_regression(3)
    batches = regression_batches(3)
    svgd = engine(target, SGD({"lr": 0.01}), temperature=lambda u: 4.0 - 3 * u)
    svgd.run(batches, num_epochs=1, progress_bar=False)
    at = engine(target, SGD({"lr": 0.01}), temperature=4.0)
    at.step(**batches[0])
    for temperature, batch in ((2.5, batches[1]), (1.0, batches[2])):
        again = engine(target, SGD({"lr": 0.01}), temperature=temperature)
        again.load_state_dict(at.state_dict())
        again.step(**batch)
        at = again
    assert_close(
        svgd.get_named_particles(), at.get_named_particles(), rtol=1e-12, atol=1e-12
    )


class Stream(IterableDataset[dict[str, Tensor]]):
    """Batches whose number isn't known."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        torch.manual_seed(0)
        yield from regression_batches(2)


def test_batches_without_a_length() -> None:
    target = hierarchical_regression(2)
    seen: list[float] = []
    svgd = engine(
        target, SGD({"lr": 0.01}), temperature=lambda u: seen.append(u) or 1.0
    )
    loader = DataLoader(Stream(), batch_size=None)
    svgd.run(loader, num_epochs=3, progress_bar=False)
    assert seen == [0, 0, 0.5, 0.5, 1, 1]
    seen.clear()
    svgd.run(loader, num_epochs=1, progress_bar=False)
    assert seen == [1, 1]


def test_progress_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # the faster, the less room there is
    target = hierarchical_regression(3)
    svgd = engine(target, SGD({"lr": 0.01}))
    svgd.run(regression_batches(2), num_epochs=2, progress_bar=True)
    shown = capsys.readouterr()
    assert "4/4" in shown.err
    for text in (f"nll={svgd.diagnostics['nll'][-1]:.3f}", "spread=", "repulsion="):
        assert text in shown.err
    svgd.run(regression_batches(2), num_epochs=2, progress_bar=False)
    svgd.run(regression_batches(2), num_epochs=2)  # no terminal, no bar
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("space", ["joint", "function"])
def test_the_data_loss_is_that_of_each_datum(space: Any) -> None:
    lora, texts = pl.lift(networks.bert(3)), networks.batch(4, num_labels=3)
    svgd = pl.SVGD(
        pl.models.classification(lora, 20),  # the batch is a fifth of the data
        kernels.RBF(space=space),
        Adam({"lr": 0.01}),
        3,
        chunk_size=2,
        init_loc_fn=lora.init_to_adapter(jitter=0.1),
    )
    svgd.step(**texts)
    particles = svgd.get_named_particles()
    svgd.step(**texts)
    losses = []
    for k in range(3):
        with lora.bind({s: x[k] for s, x in particles.items()}) as net:
            logits = net(**networks.inputs(texts)).logits
        losses.append(torch.nn.functional.cross_entropy(logits, texts["labels"]))
    assert svgd.diagnostics["nll"][1] == pytest.approx(float(sum(losses)) / 3, rel=1e-9)


def test_the_data_loss_of_several_sites_and_of_none() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(()).double(), 1.0))
        pyro.factor("penalty", -(w**2))
        if y is None:
            return
        with pyro.plate("data", 10, subsample=x):
            pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)
        pyro.sample("whole", dist.Normal(w[..., None] + 0 * x, 2.0).to_event(1), obs=x)

    x, y = torch.randn(3).double(), torch.randn(3).double()
    for given in ({"x": x, "y": y}, {"x": x}):
        svgd = pl.SVGD(
            model,
            kernels.RBF(),
            SGD({"lr": 0.0}),
            2,
            init_loc_fn=lambda site: torch.tensor(
                1.0 + site["infer"]["particle"], dtype=torch.float64
            ),
        )
        svgd.step(**given)
        if "y" not in given:
            assert "nll" not in svgd.diagnostics
            assert svgd._progress().keys() == {"loss", "spread", "repulsion"}
            continue
        expected = torch.stack(
            [
                -dist.Normal(w * x, 1.0).log_prob(y).mean()
                - dist.Normal(w, 2.0).log_prob(x).sum()
                for w in torch.tensor([1.0, 2.0]).double()
            ]
        ).mean()
        assert svgd.diagnostics["nll"] == [pytest.approx(float(expected), rel=1e-12)]


def test_batches_must_be_there_again() -> None:
    target = hierarchical_regression(2)
    svgd = engine(target, SGD({"lr": 0.01}))
    with pytest.raises(ValueError, match="Epoch 2 found no batches"):
        svgd.run(iter(regression_batches(2)), num_epochs=2, progress_bar=False)
    with pytest.raises(ValueError, match="Epoch 1 found no batches"):
        svgd.run([], num_epochs=2, progress_bar=False)
    with pytest.raises(ValueError, match="num_epochs"):
        svgd.run(regression_batches(), num_epochs=0, progress_bar=False)


def test_float32_particles_and_a_float64_latent() -> None:
    lora = pl.lift(networks.bert(dtype=torch.float32))
    batch = networks.batch()

    def model(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> None:
        bias = pyro.sample(
            "bias", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1)
        )
        logits = lora()(input_ids=input_ids, attention_mask=attention_mask).logits
        with pyro.plate("data", NUM_DATA, subsample=input_ids):
            pyro.sample("y", dist.Categorical(logits=logits + bias), obs=labels)

    svgd = pl.SVGD(
        model,
        kernels.RBF(),
        SGD({"lr": 0.01}),
        3,
        init_loc_fn=lora.init_to_adapter(jitter=0.1),
    )
    svgd.step(**batch)
    assert svgd.get_named_particles()["bias"].dtype == torch.float64


def counted(num_data: int, **settings: Any) -> pl.SVGD:
    """SVGD of a model that takes its data to be as many as that."""
    lora = pl.lift(networks.bert())
    return pl.SVGD(
        pl.models.classification(lora, num_data),
        kernels.RBF(space=settings.pop("space", "joint")),
        SGD({"lr": 1e-4}),
        2,
        init_loc_fn=lora.init_to_adapter(jitter=0.1),
        **settings,
    )


def told(svgd: pl.SVGD, batches: Any) -> list[str]:
    """What an epoch warns of."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        svgd.run(batches, num_epochs=1, progress_bar=False)
    return [str(warning.message) for warning in found]


def rows(num_data: int, **settings: Any) -> DataLoader[Any]:
    data = networks.batch(num_data)
    each = [{name: x[i] for name, x in data.items()} for i in range(num_data)]
    return DataLoader(each, **settings)  # type: ignore[arg-type]


SETTINGS = [
    {},
    pytest.param({"chunk_size": 1}, marks=pytest.mark.slow),
    {"space": "function"},
    pytest.param({"space": "function", "chunk_size": 1}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_run_notices_data_that_the_plate_does_not_have(settings: Any) -> None:
    loader = rows(7, batch_size=2)
    svgd = counted(7, **settings)
    assert not told(svgd, loader)
    assert not told(svgd, loader)
    svgd = counted(14, **settings)
    message = r"hold 7 data, but the plate of site 'y' says 14.*weighs 2 times"
    with pytest.warns(UserWarning, match=message):
        svgd.run(loader, num_epochs=1, progress_bar=False)
    assert not told(svgd, loader)  # it has been said
    svgd = counted(5, **settings)
    with pytest.warns(UserWarning, match=r"hold 7 data.*says 5.*Correct num_data"):
        svgd.run(loader, num_epochs=1, progress_bar=False)
    svgd = counted(2, **settings)
    with pytest.warns(UserWarning, match=r"says 2.*size of a batch.*subsample="):
        svgd.run(rows(6, batch_size=2), num_epochs=1, progress_bar=False)


def test_a_loader_may_drop_its_last_batch() -> None:
    dropping = rows(7, batch_size=2, drop_last=True)
    assert not told(counted(7), dropping)
    for num_data in (8, 5):  # a batch too many, and one too few
        svgd = counted(num_data)
        with pytest.warns(UserWarning, match=f"hold 6 data.*says {num_data}"):
            svgd.run(dropping, num_epochs=1, progress_bar=False)
    svgd = counted(7)
    with pytest.warns(UserWarning, match=r"hold 6 data.*says 7"):
        svgd.run(list(dropping), num_epochs=1, progress_bar=False)


def test_a_model_without_a_plate_of_data_has_nothing_to_cover() -> None:
    lora = pl.lift(networks.bert())

    def model(labels: Tensor, **texts: Tensor) -> None:
        logits = lora()(**texts).logits
        log_prob = dist.Categorical(logits=logits).log_prob(labels)
        pyro.factor("y", log_prob.sum(-1))

    svgd = pl.SVGD(
        model,
        kernels.NoRepulsion(),
        SGD({"lr": 1e-4}),
        2,
        max_plate_nesting=0,
        init_loc_fn=lora.init_to_adapter(jitter=0.1),
    )
    assert not told(svgd, [networks.batch()] * 2)


def test_plates_of_other_things_than_data_are_not_counted() -> None:
    lora = pl.lift(networks.bert())

    def model(labels: Tensor, **texts: Tensor) -> None:
        with pyro.plate("groups", 2):
            pyro.sample("known", dist.Normal(0.0, 1.0), obs=torch.zeros(2))
            pyro.deterministic("fixed", torch.ones(2))
        pl.models.classification(lora, 10)(labels=labels, **texts)

    svgd = pl.SVGD(
        model,
        kernels.NoRepulsion(),
        SGD({"lr": 1e-4}),
        2,
        init_loc_fn=lora.init_to_adapter(jitter=0.1),
    )
    assert not told(svgd, [networks.batch(5)] * 2)
    with pytest.warns(UserWarning, match=r"hold 5 data.*'y' says 10"):
        svgd.run([networks.batch(5)], num_epochs=1, progress_bar=False)


def test_a_refused_run_forgets_nothing() -> None:
    lora, batch = pl.lift(networks.bert(num_layers=1)), networks.batch()
    svgd = pl.SVGD(
        pl.models.classification(lora, len(batch["labels"])),
        kernels.NoRepulsion(),
        SGD({"lr": 0.0}),
        1,
        init_loc_fn=lora.init_to_adapter(),
    )
    svgd.run([batch], num_epochs=1, progress_bar=False)
    with pytest.raises(ValueError, match="no batches"):
        svgd.run([], num_epochs=1, progress_bar=False)
    assert svgd.posterior().fit_arguments == set(batch)
