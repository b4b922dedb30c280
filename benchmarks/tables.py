"""Tables in Markdown, and where their numbers were measured."""

import os
import platform
from collections.abc import Iterable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch


def row(*cells: str) -> str:
    """A line of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def header(*columns: str) -> list[str]:
    """The first two lines of a table in Markdown."""
    return [row(*columns), "|---" * len(columns) + "|"]


def over_seeds(values: Iterable[Any], digits: int = 3) -> str:
    """Mean ± standard error; no error of a single one, nothing of none."""
    found = [float(x) for x in values]
    if not found:
        return ""
    error = f" ± {stdev(found) / len(found) ** 0.5:.{digits}f}" if found[1:] else ""
    return f"{fmean(found):.{digits}f}{error}"


def machine(device: str) -> str:
    """Processor, number of cores and threads; or the name of the GPU."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [x.split(":")[1].strip() for x in lines if x.startswith("model name")]
    name = names[0] if names else platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def provenance(*others: str, device: str = "cpu") -> str:
    """A sentence: date, machine, Python, versions of our packages and of others."""
    packages = ("torch", "pyro-ppl", "transformers", "peft", *others)
    versions = [f"{package} {version(package)}" for package in packages]
    python = f"Python {platform.python_version()}"
    return ", ".join([str(date.today()), machine(device), python, *versions]) + "."
