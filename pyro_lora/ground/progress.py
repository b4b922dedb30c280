"""Progress bars: one rule for all that takes seconds.

``progress_bar=None``, the default everywhere, shows one on a terminal or in a notebook,
of what takes longer than a moment; in files and pipes there is none. True shows one
anywhere and at once, False never. Of several processes the first one shows them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import length_hint
from typing import Any

from tqdm.auto import tqdm

from pyro_lora.ground.ranks import is_first

_MOMENT = 0.5  # seconds before a bar that nobody asked for is shown


def progress(
    over: Iterable[Any] | None = None,
    *,
    title: str,
    unit: str,
    shown: bool | None,
    total: int | None = None,
) -> Any:
    """A tqdm bar.

    Args:
        over: What is gone through; None where the caller says how far it is.
        title: What is being done.
        unit: What is counted.
        shown: A function's ``progress_bar``.
        total: How many there will be, where ``over`` doesn't know.
    """
    return tqdm(
        over,
        desc=title,
        unit=unit,
        total=total,
        # None, tqdm's own word: off where it would write into a file or a pipe.
        disable=(None if shown is None else not shown) if is_first() else True,
        delay=_MOMENT if shown is None else 0,
    )


@dataclass(frozen=True, eq=False)
class Counted:
    """Batches that are gone through several times, all passes on one bar.

    Where nobody knows how many passes there will be, the bar's total is that of those
    that have begun.

    Attributes:
        batches: Re-iterable.
        bar: From :func:`progress`.
    """

    batches: Iterable[Any]
    bar: Any

    def __iter__(self) -> Iterator[Any]:
        length, bar = length_hint(self.batches), self.bar
        for index, batch in enumerate(self.batches):
            yield batch
            if index < length and (bar.total is None or bar.n >= bar.total):
                bar.total = bar.n + length - index
            bar.update()
