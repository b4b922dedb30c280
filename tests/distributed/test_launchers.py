"""Under torchrun and accelerate; and what a kill leaves."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing as mp

from tests.distributed import launch, spread

ROOT = Path(__file__).parents[2]
SECONDS = 120  # for a launcher on a busy machine


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """A launcher of this environment, from the repository."""
    folder = Path(sys.executable).parent
    return subprocess.run(
        [str(folder / command[0]), *command[1:]],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-3:]


def test_the_example_runs_where_a_launcher_says_who_is_who(tmp_path: Path) -> None:
    first, second = launch.launched(2, "examples.distributed", tmp_path)
    evidence, *metrics = first.splitlines()[-3:]
    assert evidence.startswith("log evidence")
    assert all("of 250 reviews" in line for line in metrics)
    assert "evidence" not in second  # one rank speaks for all


@pytest.mark.slow
def test_torchrun_accelerate_and_one_process_give_the_same() -> None:
    accelerate = run(
        *("accelerate", "launch", "--cpu", "--num_processes", "2"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--module", "examples.distributed"),
    )
    torchrun = run("torchrun", "--nproc-per-node", "2", "-m", "examples.distributed")
    one = run("python", "-m", "examples.distributed")
    assert lines(accelerate) == lines(torchrun) == lines(one)


@pytest.mark.slow
def test_torchrun_names_the_rank_that_was_killed(tmp_path: Path) -> None:
    launched = run(
        *("torchrun", "--nproc-per-node", "2", "-m", "tests.distributed.dies"),
        str(tmp_path),
    )
    assert launched.returncode != 0
    cause = launched.stderr[launched.stderr.index("Root Cause") :]
    assert "rank      : 1 (local_rank: 1)" in cause
    assert "exitcode  : -9" in cause


@pytest.mark.slow
def test_torchrun_starts_again_where_it_was(tmp_path: Path) -> None:
    launched = run(
        *("torchrun", "--nproc-per-node", "2", "--max-restarts", "1"),
        *("-m", "tests.distributed.dies", str(tmp_path)),
    )
    assert launched.returncode == 0, launched.stderr[-3000:]
    assert "resumed after 1 restart: True" in launched.stdout


def killed(size: int, name: str, folder: Path, after: float, victim: int) -> str | None:
    """Kill a rank so long after it has started, and what the others then say.

    Returns:
        Their errors; None if it had ended by then.
    """
    for old in folder.glob("started-*"):
        old.unlink()
    store = folder / f"store-{time.monotonic_ns()}"
    store.mkdir()
    launch.preload()
    context: Any = mp.start_processes(
        launch.slow_rank,
        (size, name, folder, store),
        nprocs=size,
        join=False,
        start_method="forkserver",
    )
    while len(list(folder.glob("started-*"))) < size:
        assert all(p.exitcode in (None, 0) for p in context.processes)
        time.sleep(0.01)
    time.sleep(after)
    try:
        os.kill(context.processes[victim].pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    for process in context.processes:
        process.join(launch.SECONDS)
        assert process.exitcode is not None, "a rank waits on and on"
    if context.processes[victim].exitcode == 0:
        return None
    said = [Path(f) for f in context.error_files]
    return "".join(f.read_text("latin-1") for f in said if f.exists())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["slow KFAC", "slow EKFAC", "slow SVGD"])
def test_after_kills_other_numbers_of_ranks_go_on(name: str, tmp_path: Path) -> None:
    chance = random.Random(name)
    one = launch.alone([name], tmp_path / "one")
    num_kills = num_late = 0
    for chain in range(5):
        folder = tmp_path / str(chain)
        folder.mkdir()
        for size in (3, 2):
            said = killed(
                size, name, folder, chance.uniform(0, 1.2), chance.randrange(size)
            )
            num_kills += 1
            num_late += said is None
            if said:  # the second of torch itself, where all had done their work
                assert re.search("gets no answer from another|Connection", said), said
        again = launch.alone([name], folder)
        gaps = spread.differences(one[name], again[name])
        assert all(gap < 1e-10 for gap in gaps.values()), gaps
    assert num_late < num_kills / 2
