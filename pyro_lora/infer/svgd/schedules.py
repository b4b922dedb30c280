"""Temperatures over a run of SVGD: functions of the fraction that is done, 0 to 1."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

from pyro_lora.ground.settings import check_count, check_number

__all__ = ["annealed", "cyclical"]

Schedule = Callable[[float], float]


def fraction_done(done: int, total: int) -> float:
    """0 at the first of ``total`` steps, 1 at the last."""
    return min(done / (total - 1), 1.0) if total > 1 else 1.0


def check_epochs(
    num_epochs: int, total_epochs: int | None, done: int
) -> tuple[int, int]:
    """The epochs before these, and those in all.

    Args:
        num_epochs: To run now.
        total_epochs: In all; None is these alone.
        done: Before.

    Raises:
        ValueError: If there are none to run, or too many.
    """
    check_count("num_epochs", num_epochs)
    if total_epochs is not None:
        check_count("total_epochs", total_epochs)
    if total_epochs is None:
        return 0, num_epochs
    if done + num_epochs > total_epochs:
        raise ValueError(
            f"total_epochs is {total_epochs}; {done} are done, and num_epochs="
            f"{num_epochs} more go beyond it."
        )
    return done, total_epochs


@dataclass(frozen=True)
class annealed:
    r"""Hot at first, so that particles spread, then cooling to ``final``.

    :math:`T(u) = \min(T_0, T_1 / \gamma(u))` with :math:`\gamma(u) = \tanh((1.3 u)^p) /
    \tanh(1.3^p)` (D'Angelo & Fortuin 2021, https://arxiv.org/abs/2101.09815;
    here :math:`\gamma(1) = 1`, so that the last temperature is exact).

    Args:
        final: :math:`T_1`, of the last step.
        start: :math:`T_0`, of the first.
        power: p; larger is hot for longer.

    A function for ``SVGD(temperature=...)``.

    Raises:
        ValueError: If a number isn't positive, or ``start`` is below ``final``.

    >>> schedule = annealed()
    >>> schedule(0.0), schedule(1.0)
    (100.0, 1.0)
    """

    final: float = 1.0
    _: KW_ONLY
    start: float = 100.0
    power: float = 5.0

    def __post_init__(self) -> None:
        _check(self.final, self.start, self.power)

    def __call__(self, fraction: float) -> float:
        """The temperature when a fraction of the run is done."""
        # gamma, from 0 to 1; near 0 the start bounds what would be a division by 0.
        share = math.tanh((1.3 * fraction) ** self.power) / math.tanh(1.3**self.power)
        return self.final / max(share, self.final / self.start)


@dataclass(frozen=True)
class cyclical:
    r"""Heating up again and again: particles spread, then settle, in each cycle.

    :math:`T(u) = \min(T_0, T_1 / v^p)`, v the fraction of the present cycle (D'Angelo &
    Fortuin 2021, https://arxiv.org/abs/2101.09815). The last cycle ends at
    ``final`` exactly.

    Args:
        final: :math:`T_1`.
        start: :math:`T_0`, at which every cycle begins.
        power: p; larger is hot for longer.
        num_cycles: Cycles in a run.

    A function for ``SVGD(temperature=...)``.

    Raises:
        ValueError: As :func:`annealed`, or if there is no cycle.

    >>> schedule = cyclical(num_cycles=2)
    >>> schedule(0.0), schedule(0.5), schedule(1.0)
    (100.0, 100.0, 1.0)
    """

    final: float = 1.0
    _: KW_ONLY
    start: float = 100.0
    power: float = 5.0
    num_cycles: int = 4

    def __post_init__(self) -> None:
        _check(self.final, self.start, self.power)
        check_count("num_cycles", self.num_cycles)

    def __call__(self, fraction: float) -> float:
        """The temperature when a fraction of the run is done."""
        inside = fraction * self.num_cycles % 1 if fraction < 1 else 1.0
        return self.final / max(inside**self.power, self.final / self.start)


def _check(final: float, start: float, power: float) -> None:
    for name, value in {"final": final, "start": start, "power": power}.items():
        check_number(name, value)
    if not (0 < final <= start and power > 0):
        raise ValueError(
            "Expected 0 < final <= start and power > 0, found "
            f"final={final}, start={start}, power={power}."
        )
