"""Jobs run in one process, and in several by gloo: what each gives, by rank."""

import datetime
import os
import runpy
import socket
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pyro
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.distributed import jobs

Found = dict[str, Any]
SECONDS = 60  # that a rank waits for another


def alone(names: list[str], folder: Path) -> Found:
    """What the jobs give in this process."""
    return {name: _run(jobs.JOBS[name], folder) for name in names}


def spawned(size: int, names: list[str], folder: Path) -> list[Found]:
    """What the jobs give on each of several ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    preload()
    mp.start_processes(
        _rank, (size, names, folder), nprocs=size, start_method="forkserver"
    )
    return [
        torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)
    ]


def launched(size: int, module: str, folder: Path) -> list[str]:
    """What a program prints on each rank, where it's told of them as by torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    preload()
    mp.start_processes(
        _program, (size, port, module, folder), nprocs=size, start_method="forkserver"
    )
    return [(folder / f"{rank}.txt").read_text("utf-8") for rank in range(size)]


def _program(rank: int, size: int, port: int, module: str, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    printed = folder / f"{rank}.txt"
    with printed.open("w", encoding="utf-8") as file, redirect_stdout(file):
        runpy.run_module(module, run_name="__main__")


def preload() -> None:
    """Let a server import everything once, which then forks each rank in no time."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.launch"])


def slow_rank(rank: int, size: int, name: str, folder: Path, store: Path) -> None:
    """One job, that may be killed: it says when it has started."""
    _join(rank, size, store)
    (folder / f"started-{rank}").touch()
    pyro.set_rng_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jobs.JOBS[name](folder)
    dist.barrier()


def _join(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=SECONDS),
    )


def _rank(rank: int, size: int, names: list[str], folder: Path) -> None:
    _join(rank, size, folder)
    found = {name: _run(jobs.JOBS[name], folder) for name in names}
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()  # a rank that is done early would close the others' connections
    dist.destroy_process_group()


def _run(job: Callable[[Path], Any], folder: Path) -> Any:
    """The job's result, or the error that it ends with."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return job(folder)
        except (ValueError, TypeError, RuntimeError, jobs.PowerCutError) as error:
            return error


def differences(one: Any, other: Any, path: str = "") -> dict[str, float]:
    """By how much the numbers in two results differ, relative to their size."""
    if isinstance(one, Exception) or isinstance(other, Exception):
        return {path: float("inf")} if repr(one) != repr(other) else {}
    if isinstance(one, Mapping):
        assert set(one) == set(other), (path, list(one), list(other))
        found = {}
        for key in one:
            found |= differences(one[key], other[key], f"{path}/{key}")
        return found
    if isinstance(one, list | tuple):
        assert len(one) == len(other), path
        found = {}
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            found |= differences(a, b, f"{path}/{i}")
        return found
    if isinstance(one, torch.Tensor | float | int):
        a, b = (
            torch.as_tensor(x).double()
            if isinstance(x, torch.Tensor)
            else torch.tensor(x, dtype=torch.float64)
            for x in (one, other)
        )
        assert a.shape == b.shape, (path, a.shape, b.shape)
        if a.numel() == 0 or torch.equal(a, b):
            return {path: 0.0}
        same = (a == b) | (a.isnan() & b.isnan())
        gap = (a - b).where(~same, torch.zeros_like(a)).abs().max()
        size = a.where(a.isfinite(), torch.zeros_like(a)).abs().max().clamp_min(1e-3)
        return {path: float(gap / size)}
    assert one == other, (path, one, other)
    return {}
