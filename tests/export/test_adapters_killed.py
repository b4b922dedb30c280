"""``kill -9`` at any point of an export leaves every adapter, or none."""

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pyro_lora as pl
from tests import networks
from tests.predict import models

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork"),
]


def killed_at(operation: int, folder: Path, posterior: pl.ParticlePosterior) -> bool:
    """Export in a child that is killed before its n-th change of a file there.

    Returns:
        Whether it was: there may be fewer operations.
    """
    pid = os.fork()
    if pid == 0:
        left = operation

        def die(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            changes = event in ("os.mkdir", "os.rename", "os.rmdir", "os.remove")
            if event == "open":
                changes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
            if changes and any(str(x).startswith(str(folder)) for x in arguments):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(die)
        try:
            pl.export_adapters(posterior, folder, posterior.num_particles)
        finally:
            os._exit(0)  # neither pytest's frames nor its exit handlers
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def test_killed_at_every_change_of_a_file(tmp_path: Path) -> None:
    lora = pl.lift(networks.bert(num_layers=1))
    posterior = models.particles(lora, None, num=2)
    folder = tmp_path / "adapters"
    found, operation, killed = [], 0, True
    while killed:
        assert operation < 100
        killed = killed_at(operation, folder, posterior)
        draws = sorted(folder.glob("draw_*"))
        for index, draw in enumerate(draws):
            assert len(list(draw.iterdir())) == 3
            weights = pl.ensemble(lora, [draw]).particles
            for site, value in posterior.particles.items():
                assert torch.equal(weights[site][0], value[index]), site
            shutil.rmtree(draw)
        found.append(len(draws))
        operation += 1
    assert found == sorted(found)
    assert set(found) == {0, 2}  # never a part of them
    # What a crash leaves over, the next export deletes.
    pl.export_adapters(posterior, folder, 2)
    assert len(list(folder.iterdir())) == 2
    assert list(tmp_path.iterdir()) == [folder]
