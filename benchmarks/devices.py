"""Time and memory of a run, on the CPU or on a GPU."""

import gc
import time
from collections.abc import Callable
from typing import Any

import torch


def clock(device: str) -> float:
    """Seconds: the processor's own, where it does the work; else once a GPU is done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def allocated(run: Callable[[], object], device: str = "cpu") -> int:
    """Bytes that a run has in use at most, beside those before it."""
    gc.collect()
    if device != "cpu":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(
        activities=activities, profile_memory=True, acc_events=True
    ) as profile:
        run()
    events: Any = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    now = most = 0
    for _, change in sorted(changes, key=lambda x: x[0]):
        now += change
        most = max(most, now)
    return most
