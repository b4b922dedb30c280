"""Whatever is done to a file, it is refused in words or gives valid numbers."""

import functools
import os
import resource
import signal
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from tests.export import mutations, saved_kinds
from tests.export.saved_kinds import InvalidError, Kind

# For each kind of folder; a million takes some hours a kind.
NUM_MUTATIONS = int(os.environ.get("PYRO_LORA_MUTATIONS", "4000"))
NUM_QUICK = 40  # without the slow tests
NUM_PARTS = 8  # that may run side by side
SECONDS, GIGABYTES = 20, 2.0  # that reading kilobytes never needs

pytestmark = pytest.mark.filterwarnings(
    "ignore:The weights aren't a mode", "ignore:Particles"
)


@contextmanager
def bounded() -> Iterator[None]:
    """Time and memory for what the block does; beyond them it fails."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + int(GIGABYTES * 1e9)
    before = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        x = value.detach().contiguous().reshape(-1)
        return str(x.dtype), tuple(value.shape), bytes(x.view(torch.uint8).tolist())
    if isinstance(value, dict):
        return {key: plain(x) for key, x in value.items()}
    return [plain(x) for x in value] if isinstance(value, list | tuple) else value


def same_content(one: mutations.Files, saved: mutations.Saved, folder: Path) -> bool:
    """Whether the files say what they said, in whatever bytes."""
    try:
        found = mutations.read(folder)
    except (ValueError, KeyError, RecursionError, SafetensorError):
        return False
    checksums = {"manifest_sha256": "", "tensors": ""}
    return plain([found.manifest | checksums, found.tensors]) == plain(
        [saved.manifest | checksums, saved.tensors]
    )


def outcome(kind: Kind, folder: Path, intact: Any, unsigned: bool) -> str:
    """What reading the folder comes to; '' where that is as it should be."""
    before = plain(kind.state())
    saved_place = str(folder.parent)
    try:
        found = kind.load(folder)
    except ValueError as error:
        if saved_place not in str(error):
            return f"ValueError that doesn't name the file: {error}"[:300]
        if plain(kind.state()) != before:
            kind.restore()
            return "ValueError, but something was changed"
        return ""
    except InvalidError as error:
        kind.restore()
        return f"loaded, but invalid: {error}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        kind.restore()
        return f"{type(error).__name__}: {error}"[:300]
    kind.restore()
    if unsigned and plain(found) != intact:
        return "loaded with other numbers"
    return ""


@functools.cache
def saved_others() -> dict[str, mutations.Saved]:
    """Folders whose files are put in the place of others."""
    found = {}
    for name in ("kfac", "particles", "training", "fit, kfac"):
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "kind" / "folder"
            saved_kinds.KINDS[name]().write(place)
            found[name] = mutations.read(place)
    return found


def faults(
    name: str, numbers: range, folder: Path
) -> tuple[Counter[str], dict[str, tuple[int, str]]]:
    """Number of faults by their first words, and one of each."""
    place = folder / "kind" / "folder"
    kind = saved_kinds.KINDS[name]()
    kind.write(place)
    saved = mutations.read(place)
    intact = plain(kind.load(place))
    kind.restore()
    others = [x for other, x in saved_others().items() if other != name]
    counts: Counter[str] = Counter()
    examples: dict[str, tuple[int, str]] = {}
    for i in numbers:
        how, files = mutations.mutated(saved, others, Random(f"{name}/{i}"))
        mutations.write(place, files)
        unsigned = "signed" not in how or same_content(files, saved, place)
        if name.startswith("fit") and "manifest.json" not in files:
            unsigned = False  # there is no checkpoint: the fit starts anew
        with bounded(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fault = outcome(kind, place, intact, unsigned)
        if fault:
            key = fault.split(":")[0]
            counts[key] += 1
            examples.setdefault(
                f"{how.split(':')[0]} -> {fault[:60]}", (i, f"{how} -> {fault}")
            )
    return counts, examples


@pytest.mark.parametrize("name", saved_kinds.KINDS)
def test_some_mutations(name: str, tmp_path: Path) -> None:
    counts, examples = faults(name, range(NUM_QUICK), tmp_path)
    assert not counts, (dict(counts), list(examples.values())[:5])


@pytest.mark.slow
@pytest.mark.parametrize("part", range(NUM_PARTS))
@pytest.mark.parametrize("name", saved_kinds.KINDS)
def test_many_mutations(name: str, part: int, tmp_path: Path) -> None:
    numbers = range(NUM_QUICK + part, NUM_QUICK + NUM_MUTATIONS, NUM_PARTS)
    counts, examples = faults(name, numbers, tmp_path)
    assert not counts, (dict(counts), list(examples.values())[:20])
