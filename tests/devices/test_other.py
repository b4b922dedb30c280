"""The whole main job runs on a second device, and gives what it gives on the CPU."""

import json
from pathlib import Path

import pytest
import torch.multiprocessing as mp
from torch.utils import backend_registration

from tests.devices import main_job
from tests.distributed import launch

FEW = ("mixing", "KFAC")
TABLE = "two devices"  # a row of the table in distributed/test_spread.py
# The others are slow.

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this version of PyTorch takes devices that are written in C++ only",
)


def wrong(names: list[str], folder: Path) -> dict[str, str]:
    """What each job finds wrong, in a process of its own: see ``other``."""
    launch.preload()
    mp.start_processes(
        main_job.write, (folder / "wrong", names), nprocs=1, start_method="forkserver"
    )
    found: dict[str, str] = json.loads((folder / "wrong").read_text())
    assert [*found] == names
    return {name: error for name, error in found.items() if error}


def test_a_few_jobs(tmp_path: Path) -> None:
    assert wrong([*FEW], tmp_path) == {}


@pytest.mark.slow
def test_all_other_jobs(tmp_path: Path) -> None:
    assert (
        wrong([name for name in main_job.JOBS if name not in (*FEW, TABLE)], tmp_path)
        == {}
    )
