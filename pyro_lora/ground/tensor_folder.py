"""Folders of named tensors: safetensors and a JSON manifest, no pickle, crash-safe."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyro_lora.ground.checked_tensors import stored
from pyro_lora.ground.unfinished import aside, locked, make_folder

Tensors = dict[str, Tensor]

MANIFEST = "manifest.json"
_TENSOR_FILE = re.compile(r"[0-9a-f]{64}\.safetensors")

# Of a manifest, before it is parsed: the largest has the names of a network's tensors.
_MAX_BYTES, _MAX_DEPTH = 64_000_000, 100
# As msgspec reads them: JSON's numbers have no bounds, torch's do.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Real = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)]
Shape = Annotated[tuple[Count, ...], msgspec.Meta(max_length=16)]


class Schema(msgspec.Struct, forbid_unknown_fields=True):
    """What a JSON object holds: the fields of a subclass, and nothing else."""


class _TensorFile(Schema):
    file: str
    bytes: Count
    sha256: str


class _Frame(Schema):
    """The fields of every manifest."""

    format: str
    version: Annotated[int, msgspec.Meta(ge=1)]
    tensors: _TensorFile
    expanded: dict[str, Shape]
    manifest_sha256: str


@dataclass(frozen=True)
class Format:
    """What a folder holds.

    Attributes:
        name: Written into the manifest, and expected there.
        version: The newest that can be read; written into the manifest.
        remedy: What to do about a damaged folder.
        content: The manifest's own fields, a subclass of :class:`Schema` or a
            dataclass, as msgspec reads it.
    """

    name: str
    version: int
    remedy: str
    content: type[Any]


@dataclass(frozen=True)
class Manifest:
    """A manifest that was read and checked.

    Attributes:
        file: Where.
        version: Of its format.
        content: Of the format's type.
        tensor_file: Name, size and checksum of the file of tensors.
        expanded: Tensor -> its shape, where dims only repeat.
    """

    file: Path
    version: int
    content: Any
    tensor_file: _TensorFile
    expanded: Mapping[str, tuple[int, ...]]


def write_folder(
    folder: Path, form: Format, content: Mapping[str, Any], tensors: Tensors
) -> None:
    """Write tensors and what JSON can hold into a folder, made if it isn't there.

    A crash at any time leaves the old content or the new one: the tensor file has a
    name that no other has, the manifest that says it is renamed into place last, and
    the tensor file of the manifest before it is deleted after that. Of several writers
    the last one's rename counts; readers go by :func:`read_folder`. What a killed
    writer leaves over, the next write deletes, and nothing that isn't named by one of
    these manifests. Dims that only repeat by ``expand`` are stored once.

    Args:
        folder: The folder.
        form: What it holds.
        content: Further fields of the manifest.
        tensors: Name -> tensor.

    Raises:
        ValueError: If the folder holds a ``manifest.json`` of something else, or is a
            file.
    """
    make_folder(folder)
    manifest_file = folder / MANIFEST
    if manifest_file.exists():
        _read_manifest(manifest_file, form)
    compact, shapes = _without_repetition(tensors)
    with aside(folder, partial(_delete_replaced, folder)) as unfinished:
        new = unfinished / "tensors"
        new.touch()
        mode = new.stat().st_mode
        save_file(compact, new)
        new.chmod(mode)  # safetensors lets nobody but the owner read what it writes
        manifest = {
            "format": form.name,
            "version": form.version,
            **content,
            "tensors": {
                "file": f"{secrets.token_hex(32)}.safetensors",
                "bytes": new.stat().st_size,
                "sha256": _file_digest(new),
            },
            "expanded": shapes,
        }
        manifest["manifest_sha256"] = manifest_digest(manifest)
        new_manifest = unfinished / "new.json"
        new_manifest.write_text(json.dumps(manifest, indent=1))
        _sync(new)  # here, where it keeps nobody waiting
        with locked(folder):
            if manifest_file.exists():
                replaced = manifest_file.read_bytes()
                (unfinished / "replaced.json").write_bytes(replaced)
            put(new, folder / manifest["tensors"]["file"])
            put(new_manifest, manifest_file)


def read_folder(
    folder: Path,
    form: Format,
    device: torch.device,
    check: Callable[[Manifest], None] = lambda manifest: None,
) -> tuple[Manifest, Tensors]:
    """Manifest and tensors, of one and the same write, also beside writers.

    Args:
        folder: The folder.
        form: What it holds.
        device: Where to put the tensors.
        check: Called with the manifest before the tensors are read.

    Returns:
        The manifest; name -> tensor.

    Raises:
        ValueError: As :func:`read_manifest`, :func:`read_tensors` and ``check`` do.
        OSError: If a file can't be read.
        RuntimeError: If torch can't map it into memory.
    """
    manifest = read_manifest(folder, form)
    while True:
        check(manifest)
        try:
            return manifest, read_tensors(folder, form, manifest, device)
        except (ValueError, OSError, RuntimeError):  # the last is torch's, of no file
            newer = read_manifest(folder, form)
            if newer == manifest:
                raise
            manifest = newer  # whose write has deleted the tensors of the one before


def read_manifest(folder: Path, form: Format) -> Manifest:
    """The manifest of a folder written by :func:`write_folder`.

    Args:
        folder: The folder.
        form: What it holds.

    Returns:
        Its fields.

    Raises:
        ValueError: If it's missing, truncated, altered, of something else or written
            by a newer version, or a field isn't what the format has there.
    """
    file = folder / MANIFEST
    if not file.is_file():
        inside = [x.parent for x in sorted(folder.glob(f"*/{MANIFEST}"))]
        remedy = f"There is one in {inside[0]}." if inside else "Check the path."
        raise ValueError(
            f"{file} doesn't exist, so its folder is no checkpoint of pyro_lora. "
            f"{remedy}"
        )
    manifest = _read_manifest(file, form)
    version = manifest.get("version")
    if not isinstance(version, int) or version > form.version:
        raise ValueError(
            f"{file} has version {version!r:.50}; this pyro_lora reads up to "
            f"{form.version}. Upgrade pyro_lora."
        )
    if manifest.get("manifest_sha256") != manifest_digest(manifest):
        raise ValueError(
            f"{file} was altered after it was written: its checksum doesn't match. "
            f"{form.remedy}"
        )
    own = {
        name: manifest.pop(name) for name in _Frame.__struct_fields__ & manifest.keys()
    }
    try:
        frame = msgspec.convert(own, _Frame)
        content = msgspec.convert(manifest, form.content)
    except (msgspec.ValidationError, UnicodeError) as error:
        raise ValueError(f"{file}: {error}. {form.remedy}") from error
    return Manifest(file, frame.version, content, frame.tensors, frame.expanded)


def read_tensors(
    folder: Path, form: Format, manifest: Manifest, device: torch.device
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
        ValueError: If the file is missing, truncated or altered, or holds no tensors.
    """
    entry = manifest.tensor_file
    if not _TENSOR_FILE.fullmatch(entry.file):
        raise ValueError(
            f"{manifest.file}: {entry.file!r:.80} is no name of a file of tensors. "
            f"{form.remedy}"
        )
    file = folder / entry.file
    if not file.is_file():
        raise ValueError(f"{file} doesn't exist. Copy the whole folder.")
    size = file.stat().st_size
    if size != entry.bytes:
        raise ValueError(
            f"{file} has {size} bytes, expected {entry.bytes}: it was truncated or "
            f"altered. Copy it again. {form.remedy}"
        )
    if _file_digest(file) != entry.sha256:
        raise ValueError(
            f"{file} was altered: its sha256 isn't {entry.sha256:.64}. Copy it again. "
            f"{form.remedy}"
        )
    try:
        stored = load_file(file)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"{file} holds no tensors that can be read: {error}. {form.remedy}"
        ) from error
    if not manifest.expanded.keys() <= stored.keys():
        raise ValueError(
            f"{manifest.file}: expanded has tensors that aren't there. {form.remedy}"
        )
    tensors = {}
    for name, x in stored.items():
        shape = tuple(manifest.expanded.get(name, x.shape))
        if not _repeats(x.shape, shape):
            raise ValueError(
                f"{manifest.file}: tensor {name!r} of shape {tuple(x.shape)} can't be "
                f"repeated to {shape}. {form.remedy}"
            )
        # A copy, since what was loaded is the file itself, which may be overwritten.
        tensors[name] = x.to(device, copy=True).expand(shape)
    return tensors


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
    with (
        aside(folder, partial(_delete_replaced, folder)) as unfinished,
        locked(folder),
    ):
        manifest = folder / MANIFEST
        if manifest.exists():
            os.replace(manifest, unfinished / "replaced.json")
    with suppress(OSError):  # there is something else in it
        folder.rmdir()


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Sha256 of a manifest's fields but that of the checksum itself."""
    rest = {name: x for name, x in manifest.items() if name != "manifest_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read_manifest(file: Path, form: Format) -> dict[str, Any]:
    size = file.stat().st_size
    if size > _MAX_BYTES:
        raise ValueError(
            f"{file} has {size} bytes, more than any manifest of pyro_lora "
            f"({_MAX_BYTES}). Use another folder."
        )
    try:
        manifest = json.loads(file.read_bytes())
        name = manifest["format"]
        _check_depth(manifest)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{file} is truncated, or no manifest of pyro_lora. Use another folder."
        ) from error
    if name != form.name:
        raise ValueError(
            f"{file} has the format {name!r:.80}, expected {form.name!r}. Use another "
            "folder."
        )
    assert isinstance(manifest, dict)  # nothing else of JSON's has a "format"
    return manifest


def _check_depth(value: Any) -> None:
    """Refuse what functions that call themselves couldn't follow.

    Raises:
        ValueError: If it's nested too deep.
    """
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise ValueError(f"It is nested more than {_MAX_DEPTH} deep.")


def _repeats(stored: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a shape is the stored one with some dims of 1 repeated."""
    same = len(stored) == len(shape)
    return same and all(
        n == m or (n == 1 and m > 0) for n, m in zip(stored, shape, strict=True)
    )


def _without_repetition(tensors: Tensors) -> tuple[Tensors, dict[str, list[int]]]:
    """Copies on the CPU; safetensors refuses tensors that share memory."""
    compact, shapes = {}, {}
    for name, value in tensors.items():
        kept = stored(value.detach())
        if kept.shape != value.shape:
            shapes[name] = list(value.shape)
        compact[name] = kept.cpu().clone(memory_format=torch.contiguous_format)
    return compact, shapes


def _delete_replaced(folder: Path, unfinished: Path) -> None:
    """Delete the tensors that a write has replaced, or its own where it didn't end."""
    current = _tensor_file(folder / MANIFEST)
    for manifest in unfinished.glob("*.json"):
        file = _tensor_file(manifest)
        if file is not None and file != current:
            (folder / file).unlink(missing_ok=True)


def _tensor_file(manifest: Path) -> str | None:
    """The name of the tensor file, None where no manifest says one that is ours."""
    try:
        name = json.loads(manifest.read_bytes())["tensors"]["file"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    is_ours = isinstance(name, str) and _TENSOR_FILE.fullmatch(name)
    return name if is_ours else None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
