"""Several batches in one update of SVGD, against one batch with all their data."""

import io
from typing import Any

import pyro
import pytest
import torch
from pyro.optim import SGD, Adam
from torch import Tensor

import pyro_lora as pl
from pyro_lora import kernels
from tests import networks
from tests.infer.engines import assert_same, engine
from tests.infer.targets import Target, bert, hierarchical_bert
from tests.infer.test_svgd_step import assert_equal

pytestmark = pytest.mark.filterwarnings("ignore:The batches of an epoch hold")

SETTINGS: list[dict[str, Any]] = [
    {"kernel": kernels.RBF()},
    {"kernel": kernels.IMQ(space="delta"), "temperature": 2.0},
    {"kernel": kernels.RBF(space="site"), "transport": "repulsive"},
    {
        "kernel": kernels.RBF(),
        "transport": "repulsive",
        "repulsion": lambda fraction, loss: 10 * loss,
    },
    {"kernel": kernels.RBF(space="function"), "repulsion": lambda u, loss: 10 * loss},
    {"kernel": kernels.NoRepulsion()},
]


def uneven_batches(target: Target) -> list[dict[str, Tensor]]:
    """The target's four data as 1, 2 and 1."""
    return [
        {name: x[start:stop] for name, x in target.batch.items()}
        for start, stop in ((0, 1), (1, 3), (3, 4))
    ]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_accumulated_is_one_big_batch(
    settings: dict[str, Any], chunk_size: int | None
) -> None:
    target = bert(3)
    big = engine(target, Adam({"lr": 0.01}), **settings)
    parts = engine(
        target, Adam({"lr": 0.01}), accumulate=3, chunk_size=chunk_size, **settings
    )
    for _ in range(2):
        expected = big.step(**target.batch)
        losses = [parts.step(**batch) for batch in uneven_batches(target)]
        shares = (1, 2, 1)
        mean = sum(s * x for s, x in zip(shares, losses, strict=True)) / 4
        assert mean == pytest.approx(expected, rel=1e-10)
        assert_equal(parts.get_named_particles(), big.get_named_particles())
    for name, series in big.diagnostics.items():
        assert parts.diagnostics[name] == pytest.approx(series, rel=1e-10), name


def test_sites_outside_of_the_plate_count_once() -> None:
    target = hierarchical_bert(3)
    big = engine(target, SGD({"lr": 0.01}))
    big.step(**target.batch)
    parts = engine(target, SGD({"lr": 0.01}), accumulate=3)
    for batch in uneven_batches(target):
        parts.step(**batch)
    assert_equal(parts.get_named_particles(), big.get_named_particles())


@pytest.mark.parametrize("settings", SETTINGS)
def test_only_the_last_batch_moves_particles(settings: dict[str, Any]) -> None:
    target = bert(3)
    svgd = engine(target, Adam({"lr": 0.01}), accumulate=2, **settings)
    svgd.step(**target.batch)
    assert_same(svgd.get_named_particles(), target.particles)
    assert svgd.diagnostics == {}
    svgd.step(**target.batch)
    after = svgd.get_named_particles()
    assert all(not torch.equal(after[s], x) for s, x in target.particles.items())
    assert len(svgd.diagnostics["loss"]) == 1


@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[4]])
def test_an_epoch_ends_with_an_update(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    target = bert(3)
    batches = uneven_batches(target)
    svgd = engine(target, Adam({"lr": 0.01}), accumulate=2, **settings)
    svgd.run(batches, num_epochs=2)
    by_hand = engine(target, Adam({"lr": 0.01}), **settings)
    joined = {n: x[:3] for n, x in target.batch.items()}
    for _ in range(2):
        by_hand.step(**joined)
        by_hand.step(**batches[2])
    assert_equal(svgd.get_named_particles(), by_hand.get_named_particles())
    assert len(svgd.diagnostics["loss"]) == 4
    assert "6/6" in capsys.readouterr().err


@pytest.mark.parametrize("settings", SETTINGS[:1] + SETTINGS[3:])
def test_resumed_between_two_batches_of_an_update(settings: dict[str, Any]) -> None:
    target = bert(3)
    batches = uneven_batches(target)
    whole = engine(target, Adam({"lr": 0.01}), accumulate=3, **settings)
    first = engine(target, Adam({"lr": 0.01}), accumulate=3, **settings)
    for svgd in (whole, first):
        for batch in [*batches, *batches[:2]]:
            svgd.step(**batch)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = engine(target, Adam({"lr": 0.01}), accumulate=3, **settings)
    second.load_state_dict(torch.load(file, weights_only=True))
    for svgd in (whole, second):
        svgd.step(**batches[2])
    assert_same(second.get_named_particles(), whole.get_named_particles())
    assert second.diagnostics == whole.diagnostics


def test_a_state_of_another_count_is_refused() -> None:
    target = bert(3)
    svgd = engine(target, SGD({"lr": 0.01}), accumulate=3)
    for _ in range(2):
        svgd.step(**target.batch)
    state = svgd.state_dict()
    for settings in ({"accumulate": 2}, {"kernel": kernels.RBF(space="function")}):
        other = engine(target, SGD({"lr": 0.01}), **settings)
        other.step(**target.batch)
        before = other.state_dict()
        with pytest.raises(ValueError, match="after 2 batches of an update"):
            other.load_state_dict(state)
        assert_same(other.state_dict()["particles"], before["particles"])
        assert other.state_dict()["num_gathered"] == before["num_gathered"]
    with pytest.raises(ValueError, match="accumulate must be at least 1, found 0"):
        engine(target, SGD({"lr": 0.01}), accumulate=0)


@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[4]])
def test_a_batch_that_fails_is_not_in_the_update(settings: dict[str, Any]) -> None:
    lora = pl.lift(networks.bert(2))
    batch = networks.batch()
    plain = pl.models.classification(lora, 12)

    def model(weight: float = 0.0, **batch: Tensor) -> None:
        plain(**batch)
        pyro.factor("f", torch.tensor(weight).double())

    particles = networks.particles(lora, 3)
    target = Target(model, batch, particles, {}, lambda p: torch.zeros(()))
    svgd = engine(target, SGD({"lr": 0.01}), accumulate=2, **settings)
    alone = engine(target, SGD({"lr": 0.01}), accumulate=2, **settings)
    for one in (svgd, alone):
        one.step(weight=0.0, **batch)
    with (
        pyro.validation_enabled(False),
        pytest.raises(ValueError, match=r"'f': the log density"),
    ):
        svgd.step(weight=float("nan"), **batch)
    for one in (svgd, alone):
        one.step(weight=0.0, **batch)
    assert_same(svgd.get_named_particles(), alone.get_named_particles())
