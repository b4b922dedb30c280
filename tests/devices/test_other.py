"""The whole main job runs on a second device, and gives what it gives on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

from tests.devices.main_job import JOBS

ROOT = Path(__file__).parents[2]
# The others are slow.
FEW = ("mixing", "KFAC", "two devices")

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this version of PyTorch takes devices that are written in C++ only",
)


def wrong(names: list[str], folder: Path) -> dict[str, str]:
    """What each job finds wrong, in a process of its own: see ``other``."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.devices.main_job", folder / "wrong", *names],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, str] = json.loads((folder / "wrong").read_text())
    assert [*found] == names
    return {name: error for name, error in found.items() if error}


def test_a_few_jobs(tmp_path: Path) -> None:
    assert wrong([*FEW], tmp_path) == {}


@pytest.mark.slow
def test_all_other_jobs(tmp_path: Path) -> None:
    assert wrong([name for name in JOBS if name not in FEW], tmp_path) == {}
