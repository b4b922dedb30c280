"""Jobs run in one process, and in several by gloo: what each gives, by rank."""

import datetime
import gc
import os
import runpy
import socket
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pyro
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.distributed import jobs, spread

Found = dict[str, Any]
JOBS = {**jobs.JOBS, **spread.JOBS}
SECONDS = 60  # that a rank waits for another
# What is imported when it is used: each rank would do it anew.
LATE = (
    *("arviz_base", "arviz_stats", "torchmetrics", "zarr"),
    "transformers.models.bert.modeling_bert",
)


def alone(names: list[str], folder: Path) -> Found:
    """What the jobs give in this process."""
    return {name: run(JOBS[name], folder) for name in names}


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
    context.set_forkserver_preload(["tests.distributed.launch", *LATE])


def slow_rank(rank: int, size: int, name: str, folder: Path, store: Path) -> None:
    """One job, that may be killed: it says when it has started."""
    _join(rank, size, store)
    (folder / f"started-{rank}").touch()
    pyro.set_rng_seed(0)
    pyro.enable_validation(True)  # importing torch.compile's parts turns it off
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        JOBS[name](folder)
    dist.barrier()


def _join(rank: int, size: int, folder: Path) -> None:
    gc.freeze()  # to look at what the server shares would copy it
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
    found = {name: run(JOBS[name], folder) for name in names}
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()  # a rank that is done early would close the others' connections
    dist.destroy_process_group()


def run(job: Callable[[Path], Any], folder: Path) -> Any:
    """The job's result, or the error that it ends with."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    pyro.enable_validation(True)  # importing torch.compile's parts turns it off
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return job(folder)
        except (ValueError, TypeError, RuntimeError, jobs.PowerCutError) as error:
            return error
