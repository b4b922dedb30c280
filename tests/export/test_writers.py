"""Many writers and readers of one folder: every save succeeds, every read is whole."""

import json
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pyro_lora as pl
from pyro_lora.ground import tensor_folder
from pyro_lora.ground.unfinished import aside
from pyro_lora.infer.svgd.training_state import read_state, write_state
from tests import networks
from tests.predict import models

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork"),
]


class Numbers(tensor_folder.Schema):
    number: int


FORM = tensor_folder.Format("some numbers", 1, "Write them again.", Numbers)


def fork(work: Callable[[], object], report: Path) -> int:
    """Start a process that writes down how its work ended."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            report.write_text("done")
        except BaseException as error:
            report.write_text(repr(error))
        finally:
            os._exit(0)  # neither pytest's frames nor its exit handlers
    return pid


def write(folder: Path, number: int) -> None:
    """Write numbers of which any two writes differ everywhere."""
    x = torch.full((200,), float(number), dtype=torch.float64)
    tensor_folder.write_folder(folder, FORM, {"number": number}, {"x": x})


def read(folder: Path) -> int:
    """Check that what is there comes from one write, and say which."""
    device = torch.device("cpu")
    manifest, tensors = tensor_folder.read_folder(folder, FORM, device)
    number: int = manifest.content.number
    assert torch.equal(tensors["x"], torch.full_like(tensors["x"], number))
    return number


def outcomes(
    folder: Path, reports: Path, num_writers: int, num_readers: int, num_writes: int
) -> Counter[str]:
    """How the work of writers and readers ended, one count for each write or read."""

    def repeat(work: Callable[[int], object], first: int, report: Path) -> None:
        found = Counter[str]()
        for i in range(num_writes):
            try:
                work(first + i)
                found["done"] += 1
            except Exception as error:
                found[type(error).__name__] += 1
        report.write_text(json.dumps(found))

    reports.mkdir(exist_ok=True)
    pids = []
    for i in range(num_writers + num_readers):
        work: Callable[[int], object] = (
            (lambda n: write(folder, n)) if i < num_writers else lambda n: read(folder)
        )
        report = reports / f"of_{i}"
        pids.append(
            fork(
                lambda work=work, i=i, report=report: repeat(
                    work, i * num_writes, report
                ),
                reports / f"process_{i}",
            )
        )
    for pid in pids:
        os.waitpid(pid, 0)
    found = Counter[str]()
    for report in reports.glob("of_*"):
        found += Counter(json.loads(report.read_text()))
    return found


@pytest.mark.parametrize(
    ("num_writers", "num_readers", "num_writes"),
    [(4, 3, 20), pytest.param(8, 8, 200, marks=pytest.mark.slow)],
)
def test_every_save_and_every_load_succeeds(
    num_writers: int, num_readers: int, num_writes: int, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    write(folder, -1)
    found = outcomes(folder, tmp_path / "of", num_writers, num_readers, num_writes)
    assert found == {"done": (num_writers + num_readers) * num_writes}
    assert read(folder) >= 0
    assert len(list(folder.iterdir())) == 2


def test_threads_may_write_into_one_folder(tmp_path: Path) -> None:
    failures: list[Exception] = []

    def work(first: int) -> None:
        try:
            for number in range(first, first + 15):
                write(tmp_path, number)
                read(tmp_path)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(100 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("num_kills", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_killed_writers_harm_neither_writers_nor_readers(
    num_kills: int, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    write(folder, 0)
    started = time.monotonic()
    write(folder, 0)
    longest = 3 * (time.monotonic() - started)

    def write_for_ever() -> None:
        while True:
            write(folder, os.getpid())

    living = fork(lambda: [write(folder, n) for n in range(100)], tmp_path / "living")
    left_over = 0
    for _ in range(num_kills):
        pid = fork(write_for_ever, tmp_path / "killed")
        time.sleep(random.uniform(0, longest))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        read(folder)
        left_over += len(list(folder.iterdir())) > 2
    os.waitpid(living, 0)
    assert (tmp_path / "living").read_text() == "done"
    assert left_over > 0
    write(folder, 1)
    assert read(folder) == 1
    assert len(list(folder.iterdir())) == 2


def test_a_living_writer_s_files_are_left_alone(tmp_path: Path) -> None:
    with aside(tmp_path) as mine:
        (mine / "half").write_text("done")
        write(tmp_path, 1)
        assert (mine / "half").read_text() == "done"
    assert not mine.exists()
    abandoned = tmp_path / f"{'0' * 16}.pyro_lora.tmp"
    abandoned.mkdir()
    write(tmp_path, 2)
    assert not abandoned.exists()


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    # Named as if they were ours, and as files are that mark or link to others.
    names = [f"{'a' * 64}.safetensors", "0" * 64, f"{'f' * 15}.pyro_lora.tmp", "x.json"]
    for name in names:
        (tmp_path / name).write_text("foreign")
    write(tmp_path, 1)
    write(tmp_path, 2)
    assert len(list(tmp_path.iterdir())) == 2 + len(names)
    tensor_folder.delete_folder(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    assert all((tmp_path / name).read_text() == "foreign" for name in names)


@pytest.mark.parametrize("file", ["../precious.safetensors", "precious", 3, None])
def test_no_manifest_can_name_a_foreign_file(file: Any, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    write(folder, 1)
    for path in (tmp_path / "precious.safetensors", folder / "precious"):
        path.write_text("precious")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tensors"]["file"] = file
    (folder / "manifest.json").write_text(json.dumps(manifest))
    write(folder, 2)
    assert (tmp_path / "precious.safetensors").exists()
    assert (folder / "precious").exists()


def test_a_reader_whose_tensors_are_replaced_reads_the_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)
    read_tensors, seen = tensor_folder.read_tensors, []

    def after_another_write(*args: Any) -> Any:
        seen.append(args)
        if len(seen) < 4:
            write(tmp_path, 1 + len(seen))
        return read_tensors(*args)

    monkeypatch.setattr(tensor_folder, "read_tensors", after_another_write)
    assert read(tmp_path) == 4
    assert len(seen) == 4
    (file,) = tmp_path.glob("*.safetensors")
    file.unlink()
    with pytest.raises(ValueError, match="doesn't exist"):
        read(tmp_path)


def test_posteriors_and_runs_are_read_beside_a_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = pl.lift(networks.bert(num_layers=1))
    old, new = (models.particles(lora, None, num=n) for n in (2, 3))
    state = {"particles": {"x": torch.zeros(2)}, "num": 1}
    pl.save(old, tmp_path / "posterior")
    write_state(state, tmp_path / "run")
    read_tensors, seen = tensor_folder.read_tensors, Counter[Path]()

    def after_another_write(folder: Path, *args: Any) -> Any:
        seen[folder] += 1
        if seen[folder] == 1 and folder.name == "posterior":
            pl.save(new, folder)
        elif seen[folder] == 1:
            write_state({**state, "num": 2}, folder)
        return read_tensors(folder, *args)

    monkeypatch.setattr(tensor_folder, "read_tensors", after_another_write)
    found: Any = pl.load(tmp_path / "posterior", lora)
    assert found.num_particles == 3
    assert read_state(tmp_path / "run")["num"] == 2


def test_of_two_exports_into_one_folder_one_is_refused(tmp_path: Path) -> None:
    lora = pl.lift(networks.bert(num_layers=1))
    posterior = models.particles(lora, None, num=2)
    folder = tmp_path / "draws"
    reports = [tmp_path / f"{i}" for i in range(3)]
    pids = [
        fork(lambda: pl.export_adapters(posterior, folder, 2), report)
        for report in reports
    ]
    for pid in pids:
        os.waitpid(pid, 0)
    said = sorted(report.read_text() for report in reports)
    assert sum(text == "done" for text in said) == 1
    assert sum("holds draws already" in text for text in said) == 2
    assert sorted(path.name for path in folder.iterdir()) == ["draw_000", "draw_001"]
    assert len(list(tmp_path.iterdir())) == 4


def test_draws_go_into_a_folder_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = pl.lift(networks.bert(num_layers=1))
    posterior = models.particles(lora, None, num=1)
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match=r"something else.*Name a new one.*draws'?\.$"):
        pl.export_adapters(posterior, tmp_path, 1)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(ValueError, match="is the current folder"):
        pl.export_adapters(posterior, ".", 1)
    # An empty one keeps its rights, and a link to it goes on being one.
    monkeypatch.chdir(tmp_path)
    here.chmod(0o750)
    (tmp_path / "link").symlink_to(here)
    pl.export_adapters(posterior, "link", 1)
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in here.iterdir()] == ["draw_000"]
    assert here.stat().st_mode & 0o777 == 0o750
    shutil.rmtree(here)
