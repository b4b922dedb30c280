"""Folders for what isn't finished, each its writer's own and gone with its writer.

Several processes and threads may write into one place, and any of them may be killed.
Locks of the system tell who still lives, since they end with their owner. Nothing but
the tidying up depends on them: where a file system has none, what a killed writer left
over stays.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pyro_lora.ground.interrupts import undone

if sys.platform != "win32":
    import fcntl

_NAME = re.compile(r"[0-9a-f]{16}\.pyro_lora\.tmp")
_PATIENCE = 10.0  # seconds; who holds a lock for so long is stopped, not at work


class _Lock:
    """A lock on a folder: taken and released by one owner, each as often as he likes.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor = -1
        self.held = False

    def take(self, patience: float) -> None:
        """Take it, unless another has it for so many seconds or it is held already."""
        if sys.platform == "win32":
            return
        give_up = time.monotonic() + patience
        try:
            if self._descriptor < 0:
                self._descriptor = os.open(self._folder, os.O_RDONLY)
            while not self.held:
                try:
                    fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self.held = True
                except BlockingIOError:
                    if time.monotonic() >= give_up:
                        return
                    time.sleep(1e-3)
        except OSError:  # no such folder, or no locks on this file system
            return

    def release(self) -> None:
        """Free it; not by closing alone, since a forked child has it open, too."""
        descriptor = self._descriptor
        if sys.platform != "win32" and descriptor >= 0:
            with suppress(OSError):  # there was none
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            # Forgotten before it is closed: it may be another file's after that.
            self._descriptor, self.held = -1, False
            os.close(descriptor)


@contextmanager
def locked(folder: Path, patience: float = _PATIENCE) -> Iterator[bool]:
    """Keep other writers out of a folder for a moment.

    Args:
        folder: The folder.
        patience: Seconds to wait for another one's lock.

    Yields:
        Whether the lock is held.
    """
    lock = _Lock(folder)
    with undone(lock.release):
        lock.take(patience)
        yield lock.held


@contextmanager
def aside(
    folder: Path, tidy: Callable[[Path], None] = lambda unfinished: None
) -> Iterator[Path]:
    """A folder for what is unfinished, that which others leave beside it included.

    What killed writers left over there is deleted first, that of living ones isn't.

    Args:
        folder: Where finished files go, made if it isn't there.
        tidy: Called with an unfinished folder before it is deleted: by its own writer
            at the end, or by a later one if that was killed.

    Yields:
        A new folder inside of it, deleted at the end.
    """
    unfinished = folder / f"{secrets.token_hex(8)}.pyro_lora.tmp"
    turn, owner = _Lock(folder), _Lock(unfinished)

    def delete() -> None:
        try:
            if unfinished.is_dir():
                turn.take(_PATIENCE)
                _delete(unfinished, tidy)
        finally:
            turn.release()
            owner.release()

    make_folder(folder)
    with undone(delete):
        turn.take(_PATIENCE)  # or another would find it before it has an owner
        _delete_abandoned(folder, tidy)
        unfinished.mkdir(parents=True)
        owner.take(0)
        turn.release()
        yield unfinished


def make_folder(folder: Path) -> None:
    """Make a folder, if it isn't there.

    Raises:
        ValueError: If a file has its name, or that of a folder that it would be in.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        file = next(x for x in (folder, *folder.parents) if os.path.lexists(x))
        what = "a file" if file == folder else f"in {file}, a file"
        raise ValueError(
            f"{folder} should be a folder to write into, and is {what}. Name another "
            "one."
        ) from error


def _delete_abandoned(folder: Path, tidy: Callable[[Path], None]) -> None:
    for path in folder.iterdir():
        if _NAME.fullmatch(path.name):
            with locked(path, 0) as is_abandoned:
                if is_abandoned:
                    _delete(path, tidy)


def _delete(unfinished: Path, tidy: Callable[[Path], None]) -> None:
    tidy(unfinished)
    shutil.rmtree(unfinished)
