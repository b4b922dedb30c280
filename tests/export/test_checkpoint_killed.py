"""``kill -9`` at any point of a save leaves a checkpoint that loads, whole."""

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import pyro_lora as pl
from tests import networks
from tests.predict import models

# The children of a process with threads (a progress bar leaves one) run one thread,
# which does nothing but save.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork"),
]


@contextmanager
def child(work: Callable[[], object]) -> Iterator[int]:
    """A forked process that does some work and ends; the parent gets its number."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)  # neither pytest's frames nor its exit handlers
    yield pid


def old_and_new(folder: Path) -> tuple[pl.LiftedNetwork, list[pl.ParticlePosterior]]:
    """Two posteriors of half a megabyte each, the first one saved."""
    lora = pl.lift(networks.bert(hidden_size=32))
    both = [models.particles(lora, None, num=n) for n in (20, 21)]
    pl.save(both[0], folder)
    return lora, both


def which(
    folder: Path, lora: pl.LiftedNetwork, posteriors: list[pl.ParticlePosterior]
) -> int:
    """The number of the posterior that the folder holds, in all its bits."""
    found: Any = pl.load(folder, lora)
    (index,) = (
        i for i, p in enumerate(posteriors) if p.num_particles == found.num_particles
    )
    expected = posteriors[index].particles
    assert list(found.particles) == list(expected)
    for site, value in found.particles.items():
        assert torch.equal(value, expected[site]), site
    return index


@pytest.mark.slow  # the test below kills at every operation, this one anywhere
def test_killed_at_random(tmp_path: Path) -> None:
    lora, posteriors = old_and_new(tmp_path)

    def save_for_ever() -> None:
        while True:
            for posterior in reversed(posteriors):
                pl.save(posterior, tmp_path)

    started = time.monotonic()
    pl.save(posteriors[0], tmp_path)
    longest = 4 * (time.monotonic() - started)
    left_over = 0
    for _ in range(50):
        with child(save_for_ever) as pid:
            time.sleep(random.uniform(0, longest))
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status)
        which(tmp_path, lora, posteriors)
        left_over += len(list(tmp_path.iterdir())) > 2
    # Most of a save is between its first file and its last rename.
    assert left_over > 0
    pl.save(posteriors[1], tmp_path)
    assert which(tmp_path, lora, posteriors) == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_killed_at_every_operation_on_files(tmp_path: Path) -> None:
    lora, posteriors = old_and_new(tmp_path)
    folder, seen = str(tmp_path), []

    def save_and_die(at: int) -> None:
        left = at

        def die(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if any(str(x).startswith(folder) for x in arguments):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(die)
        pl.save(posteriors[1], tmp_path)

    killed = True
    while killed:
        assert len(seen) < 100
        with child(lambda: save_and_die(len(seen))) as pid:
            killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        seen.append(which(tmp_path, lora, posteriors))
        pl.save(posteriors[0], tmp_path)
    # The old posterior up to the manifest's rename, the new one from there on.
    assert seen == sorted(seen)
    assert sum(seen) >= 2
    assert len(seen) - sum(seen) > 5
