"""Temperatures over a run: where they begin, how they fall, and where they end."""

import math

import pytest
from pyro.optim import SGD

import pyro_lora as pl
from tests.infer.targets import hierarchical_regression

pytestmark = pytest.mark.filterwarnings("ignore:The batches of an epoch hold")

FRACTIONS = [i / 40 for i in range(41)]


def test_annealing_follows_its_formula() -> None:
    schedule = pl.schedules.annealed(2.0, start=50.0, power=3.0)
    for u in FRACTIONS:
        share = math.tanh((1.3 * u) ** 3) / math.tanh(1.3**3)
        expected = 50.0 if share < 2 / 50 else 2.0 / share
        assert schedule(u) == pytest.approx(expected, rel=1e-12)
    assert schedule(1.0) == 2.0
    temperatures = [schedule(u) for u in FRACTIONS]
    assert temperatures == sorted(temperatures, reverse=True)


@pytest.mark.parametrize("num_cycles", [1, 2, 5])
def test_cycles_begin_hot_and_the_last_ends_exactly(num_cycles: int) -> None:
    schedule = pl.schedules.cyclical(0.5, start=20.0, power=2.0, num_cycles=num_cycles)
    for cycle in range(num_cycles):
        begin = cycle / num_cycles
        assert schedule(begin) == pytest.approx(20.0)
        middle = schedule(begin + 0.5 / num_cycles)
        assert middle == pytest.approx(0.5 / 0.25)
        assert schedule(begin + 0.999 / num_cycles) < middle
    assert schedule(1.0) == 0.5


@pytest.mark.parametrize("make", [pl.schedules.annealed, pl.schedules.cyclical])
def test_svgd_sees_every_temperature(make: object) -> None:
    target = hierarchical_regression(3)
    seen = []

    def watched(fraction: float) -> float:
        seen.append(make()(fraction))  # type: ignore[operator]
        return seen[-1]

    svgd = pl.SVGD(
        target.model,
        pl.kernels.RBF(),
        SGD({"lr": 1e-4}),
        3,
        temperature=watched,
        init_loc_fn=target.init,
    )
    svgd.run([target.batch] * 4, num_epochs=3, progress_bar=False)
    assert seen[0] == 100.0
    assert seen[-1] == 1.0


@pytest.mark.parametrize(
    "settings", [{"final": 0.0}, {"final": 3.0, "start": 2.0}, {"power": -1.0}]
)
def test_wrong_numbers(settings: dict[str, float]) -> None:
    for make in (pl.schedules.annealed, pl.schedules.cyclical):
        with pytest.raises(ValueError, match="Expected 0 < final <= start"):
            make(**settings)
    with pytest.raises(ValueError, match="num_cycles must be at least 1, found 0"):
        pl.schedules.cyclical(num_cycles=0)
