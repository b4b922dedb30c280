"""Folders of named tensors: safetensors and a JSON manifest, no pickle, crash-safe."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]

MANIFEST = "manifest.json"
_TENSOR_FILE = re.compile(r"[0-9a-f]{64}\.safetensors")
_TEMPORARY = re.compile(r"[0-9a-f]{16}\.pyro_lora\.tmp")


@dataclass(frozen=True)
class Format:
    """What a folder holds.

    Attributes:
        name: Written into the manifest, and expected there.
        version: The newest that can be read; written into the manifest.
        remedy: What to do about a damaged folder.
    """

    name: str
    version: int
    remedy: str


def write_folder(
    folder: Path, form: Format, content: Mapping[str, Any], tensors: Tensors
) -> None:
    """Write tensors and what JSON can hold into a folder, made if it isn't there.

    A crash at any time leaves the old content or the new one: the tensor file is
    named by its own sha256, the manifest that names it is renamed into place last, and
    the old tensor file is deleted after that. What a crash leaves over, the next write
    deletes. Dims that only repeat by ``expand`` are stored once.

    Args:
        folder: The folder.
        form: What it holds.
        content: Further fields of the manifest.
        tensors: Name -> tensor.

    Raises:
        ValueError: If the folder holds a ``manifest.json`` of something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest_file = folder / MANIFEST
    if manifest_file.exists():
        _read_manifest(manifest_file, form)
    compact, shapes = _without_repetition(tensors)
    with aside(folder) as unfinished:
        new = unfinished / "tensors"
        new.touch()
        mode = new.stat().st_mode
        save_file(compact, new)
        new.chmod(mode)  # safetensors lets nobody but the owner read what it writes
        digest = _file_digest(new)
        manifest = {
            "format": form.name,
            "version": form.version,
            **content,
            "tensors": {
                "file": f"{digest}.safetensors",
                "bytes": new.stat().st_size,
                "sha256": digest,
            },
            "expanded": shapes,
        }
        put(new, folder / f"{digest}.safetensors")
        new = unfinished / "manifest"
        manifest["manifest_sha256"] = manifest_digest(manifest)
        new.write_text(json.dumps(manifest, indent=1))
        put(new, manifest_file)
    _remove_tensors(folder, but=f"{digest}.safetensors")


def read_manifest(folder: Path, form: Format) -> dict[str, Any]:
    """The manifest of a folder written by :func:`write_folder`.

    Args:
        folder: The folder.
        form: What it holds.

    Returns:
        Its fields.

    Raises:
        ValueError: If it's missing, truncated, altered, of something else or written
            by a newer version.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise ValueError(
            f"{file} doesn't exist, so its folder is no checkpoint of pyro_lora. "
            "Check the path."
        )
    manifest = _read_manifest(file, form)
    version = manifest.get("version")
    if not isinstance(version, int) or version > form.version:
        raise ValueError(
            f"{file} has version {version}; this pyro_lora reads up to "
            f"{form.version}. Upgrade pyro_lora."
        )
    if manifest.get("manifest_sha256") != manifest_digest(manifest):
        raise ValueError(
            f"{file} was altered after it was written: its checksum doesn't match. "
            f"{form.remedy}"
        )
    return manifest


def read_tensors(
    folder: Path, form: Format, manifest: Mapping[str, Any], device: torch.device
) -> Tensors:
    """The tensors that a manifest names.

    Args:
        folder: The folder.
        form: What it holds.
        manifest: From :func:`read_manifest`.
        device: Where to put them.

    Returns:
        Name -> tensor.

    Raises:
        ValueError: If the file is missing, truncated or altered.
    """
    entry = manifest["tensors"]
    file = folder / entry["file"]
    if not _TENSOR_FILE.fullmatch(entry["file"]) or not file.is_file():
        raise ValueError(f"{file} doesn't exist. Copy the whole folder.")
    size = file.stat().st_size
    if size != entry["bytes"]:
        raise ValueError(
            f"{file} has {size} bytes, expected {entry['bytes']}: it was truncated or "
            f"altered. Copy it again. {form.remedy}"
        )
    if _file_digest(file) != entry["sha256"]:
        raise ValueError(
            f"{file} was altered: its sha256 isn't {entry['sha256']}. Copy it again. "
            f"{form.remedy}"
        )
    shapes = manifest["expanded"]
    return {
        name: x.to(device).expand(tuple(shapes.get(name, x.shape)))
        for name, x in load_file(file).items()
    }


@contextmanager
def aside(folder: Path) -> Iterator[Path]:
    """A folder for what is unfinished, that which others leave beside it included.

    What a crash left over there is deleted first.

    Args:
        folder: Where finished files go, which exists.

    Yields:
        A new folder inside of it, deleted at the end.
    """
    _remove_unfinished(folder)
    unfinished = folder / f"{secrets.token_hex(8)}.pyro_lora.tmp"
    unfinished.mkdir()
    try:
        yield unfinished
    finally:
        shutil.rmtree(unfinished)


def put(new: Path, target: Path) -> None:
    """Rename what is on the disk, and not only in the system's cache.

    Args:
        new: A file, or a folder with files.
        target: Its new name, on the same disk.
    """
    for path in (*new.rglob("*"), new):
        _sync(path)
    os.replace(new, target)
    _sync(target.parent)  # before the next rename, whatever the system would choose


def delete_folder(folder: Path) -> None:
    """Delete what :func:`write_folder` wrote, and the folder if nothing else is in it.

    Args:
        folder: The folder; nothing happens where there is none.
    """
    if not folder.is_dir():
        return
    (folder / MANIFEST).unlink(missing_ok=True)  # first: a crash leaves no half
    _remove_unfinished(folder)
    _remove_tensors(folder)
    if not any(folder.iterdir()):
        folder.rmdir()


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Sha256 of a manifest's fields but that of the checksum itself."""
    rest = {name: x for name, x in manifest.items() if name != "manifest_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read_manifest(file: Path, form: Format) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(file.read_bytes())
        found = manifest["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{file} is truncated, or no manifest of pyro_lora. Use another folder."
        ) from error
    if found != form.name:
        raise ValueError(
            f"{file} has the format {found!r}, expected {form.name!r}. Use another "
            "folder."
        )
    return manifest


def _without_repetition(tensors: Tensors) -> tuple[Tensors, dict[str, list[int]]]:
    """Copies on the CPU; safetensors refuses tensors that share memory."""
    compact, shapes = {}, {}
    for name, value in tensors.items():
        kept = value.detach()
        for dim, stride in enumerate(value.stride()):
            if stride == 0 and value.shape[dim] > 1:
                kept = kept.narrow(dim, 0, 1)
        if kept.shape != value.shape:
            shapes[name] = list(value.shape)
        compact[name] = kept.cpu().clone(memory_format=torch.contiguous_format)
    return compact, shapes


def _remove_unfinished(folder: Path) -> None:
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            shutil.rmtree(path)


def _remove_tensors(folder: Path, but: str | None = None) -> None:
    for file in folder.iterdir():
        if _TENSOR_FILE.fullmatch(file.name) and file.name != but:
            file.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
