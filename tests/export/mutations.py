"""Folders of tensors and a manifest with one thing changed, signed anew or not."""

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from pyro_lora.ground.tensor_folder import manifest_digest

Files = dict[str, bytes]
DEEP = "@deep@"  # becomes lists in lists, deeper than any program can follow
UNSIGNED = 100_000
SCALARS: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    0.5,
    -2.5,
    1e-9,
    2**31,
    2**63,
    10**30,
    10**400,
    1e308,
    math.nan,
    math.inf,
    -math.inf,
    "",
    "x",
    "cpu",
    "cuda:7",
    "meta",
    "../../secret",
    "\x00\ud800é",
    "y" * 5000,
    DEEP,
]
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


@dataclass(frozen=True)
class Saved:
    """A folder's content, as read."""

    manifest: dict[str, Any]
    tensors: dict[str, Tensor]
    files: Files


def read(folder: Path) -> Saved:
    files = {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()}
    (name,) = (name for name in files if name.endswith(".safetensors"))
    manifest = json.loads(files["manifest.json"])
    return Saved(manifest, load(files[name]), files)


def write(folder: Path, files: Files) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        if old.name not in files:
            old.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def as_text(manifest: Any) -> bytes:
    text = json.dumps(manifest)
    return text.replace(f'"{DEEP}"', "[" * UNSIGNED + "]" * UNSIGNED).encode()


def signed(manifest: dict[str, Any], tensor_file: bytes) -> Files:
    """Both files, with checksums as their writer would have put them."""
    digest = hashlib.sha256(tensor_file).hexdigest()
    entry = manifest.get("tensors")
    if isinstance(entry, dict) and {"file", "bytes", "sha256"} <= entry.keys():
        entry |= {
            "file": f"{digest}.safetensors",
            "bytes": len(tensor_file),
            "sha256": digest,
        }
    return {
        f"{digest}.safetensors": tensor_file,
        "manifest.json": as_text(resigned(manifest)),
    }


def resigned(manifest: dict[str, Any]) -> dict[str, Any]:
    if "manifest_sha256" in manifest:
        manifest["manifest_sha256"] = manifest_digest(manifest)
    return manifest


def mutated(saved: Saved, others: list[Saved], rng: Random) -> tuple[str, Files]:
    """A name for what is done, and the files after it."""
    kind = rng.choice(list(KINDS))
    name, files = kind(saved, others, rng)
    return f"{kind.__name__}: {name}", files


def bytes_flipped(saved: Saved, _: list[Saved], rng: Random) -> tuple[str, Files]:
    files = dict(saved.files)
    name = rng.choice(sorted(files))
    files[name] = _flipped(files[name], rng)
    return _short(name), files


def bytes_flipped_and_signed(
    saved: Saved, _: list[Saved], rng: Random
) -> tuple[str, Files]:
    if rng.random() < 0.7:
        # Mostly the header, where names, dtypes, shapes and places are.
        content = _tensor_file(saved)
        header = 8 + int.from_bytes(content[:8], "little")
        end = header if rng.random() < 0.7 else len(content)
        flipped = _flipped(content[:end], rng) + content[end:]
        return "tensors", signed(copy.deepcopy(saved.manifest), flipped)
    text = _flipped(saved.files["manifest.json"], rng)
    try:
        manifest = json.loads(text)
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict):
        return "manifest", {**saved.files, "manifest.json": text}
    return "manifest", signed(manifest, _tensor_file(saved))


def truncated(saved: Saved, _: list[Saved], rng: Random) -> tuple[str, Files]:
    files = dict(saved.files)
    name = rng.choice(sorted(files))
    content = files[name][: rng.randrange(len(files[name]))]
    if name == "manifest.json" or rng.random() < 0.5:
        return _short(name), {**files, name: content}
    return "tensors, signed", signed(copy.deepcopy(saved.manifest), content)


def swapped(saved: Saved, others: list[Saved], rng: Random) -> tuple[str, Files]:
    other = rng.choice(others)
    if rng.random() < 0.3:
        return "manifest", {
            **saved.files,
            "manifest.json": other.files["manifest.json"],
        }
    content = _tensor_file(other)
    if rng.random() < 0.5:
        name = _tensor_name(saved)
        return "tensors", {**saved.files, name: content}
    return "tensors, signed", signed(copy.deepcopy(saved.manifest), content)


def missing(saved: Saved, _: list[Saved], rng: Random) -> tuple[str, Files]:
    name = rng.choice(sorted(saved.files))
    return _short(name), {n: x for n, x in saved.files.items() if n != name}


def json_changed(saved: Saved, _: list[Saved], rng: Random) -> tuple[str, Files]:
    manifest = copy.deepcopy(saved.manifest)
    path = _change(manifest, rng)
    return path, {**saved.files, "manifest.json": as_text(manifest)}


def json_changed_and_signed(
    saved: Saved, _: list[Saved], rng: Random
) -> tuple[str, Files]:
    manifest = copy.deepcopy(saved.manifest)
    path = "; ".join(_change(manifest, rng) for _ in range(rng.choice([1, 1, 1, 2])))
    if rng.random() < 0.2:  # checksums that are whatever the change made them
        return path, {**saved.files, "manifest.json": as_text(resigned(manifest))}
    return path, signed(manifest, _tensor_file(saved))


def tensors_changed_and_signed(
    saved: Saved, others: list[Saved], rng: Random
) -> tuple[str, Files]:
    tensors = dict(saved.tensors)
    manifest = copy.deepcopy(saved.manifest)
    names = sorted(tensors)
    name = rng.choice(names)
    how = rng.choice(TENSOR_CHANGES)
    how(tensors, name, manifest, rng)
    return f"{how.__name__} {name}", signed(manifest, save(tensors))


KINDS: tuple[Callable[..., tuple[str, Files]], ...] = (
    bytes_flipped,
    bytes_flipped_and_signed,
    bytes_flipped_and_signed,
    truncated,
    swapped,
    missing,
    json_changed,
    *[json_changed_and_signed] * 8,
    *[tensors_changed_and_signed] * 8,
)


def removed(tensors: Any, name: str, manifest: Any, rng: Random) -> None:
    del tensors[name]


def renamed(tensors: Any, name: str, manifest: Any, rng: Random) -> None:
    tensors[rng.choice([f"{name}x", "x", ""])] = tensors.pop(name)


def exchanged(tensors: Any, name: str, manifest: Any, rng: Random) -> None:
    other = rng.choice(sorted(tensors))
    tensors[name], tensors[other] = tensors[other].clone(), tensors[name].clone()


def reshaped(tensors: Any, name: str, manifest: Any, rng: Random) -> None:
    x = tensors[name]
    tensors[name] = rng.choice(
        [
            x.flatten(),
            x[None],
            x[..., None],
            x.mT.contiguous() if x.ndim > 1 else x[None, None],
            x[:0] if x.ndim else x.new_zeros(0),
            x[:1].clone() if x.ndim else x,
            torch.cat([x, x]) if x.ndim else x.expand(2).clone(),
            x.new_zeros(rng.choice([(0,), (1,), (7, 2), (3, 1, 1), (1, 1, 1, 1)])),
        ]
    ).contiguous()


def expanded(tensors: Any, name: str, manifest: Any, rng: Random) -> None:
    size = rng.choice([1, 2, 3, 10**6, 2**40, 2**62])
    shape = [1, *tensors[name].shape]
    if len(shape) > 1 and shape[1] == 1 and rng.random() < 0.5:
        shape = shape[1:]
    shape[0] = size
    manifest["expanded"] = {**manifest.get("expanded", {}), name: shape}


def other_dtype(tensors: Any, name: str, manifest: Any, rng: Random) -> None:
    tensors[name] = tensors[name].to(rng.choice(DTYPES))


def other_values(tensors: Any, name: str, manifest: Any, rng: Random) -> None:
    x = tensors[name].clone()
    tensors[name] = rng.choice([x * 0, x + 1, x * 2, x.neg() if x.is_signed() else x])


def one_value(tensors: Any, name: str, manifest: Any, rng: Random) -> None:
    x = tensors[name].clone()
    if x.numel():
        value = rng.choice([0, -1, math.nan, math.inf, -math.inf, 1e-30, 1e30, 0.5])
        real = x.is_floating_point()
        x.view(-1)[rng.randrange(x.numel())] = value if real else rng.randrange(120)
    tensors[name] = x


def all_values(tensors: Any, name: str, manifest: Any, rng: Random) -> None:
    x = tensors[name]
    value = rng.choice([0, -1, math.nan, math.inf, 1e-300, 1e300, 1e20])
    tensors[name] = x * 0 + value if x.is_floating_point() else x * 0


TENSOR_CHANGES: list[Callable[..., None]] = [
    removed,
    renamed,
    exchanged,
    reshaped,
    reshaped,
    expanded,
    other_dtype,
    other_values,
    one_value,
    all_values,
]


def _change(manifest: dict[str, Any], rng: Random) -> str:
    """Change one place of a JSON document; its path."""
    places = list(_places(manifest, "$"))
    # Long lists of numbers would else take nearly all of the mutations.
    heads = [p for p in places if not (isinstance(p[1], int) and p[1] > 3)]
    path, key, parent = rng.choice(heads if rng.random() < 0.9 else places)
    how = rng.randrange(6)
    if how == 0:
        del parent[key]
    elif how == 1 and isinstance(parent, dict):
        parent[rng.choice([f"{key}x", "x", "kind", "items"])] = parent.pop(key)
    elif how == 2:
        _, other, source = rng.choice(places)
        parent[key] = copy.deepcopy(source[other])
    elif how == 3:
        parent[key] = _tweaked(parent[key], rng)
    else:
        parent[key] = _any_value(rng)
    return path


def _places(value: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        here = f"{path}.{key}"
        yield here, key, value
        yield from _places(inner, here)


def _tweaked(value: Any, rng: Random) -> Any:
    if isinstance(value, bool) or value is None:
        return rng.choice([True, False, None])
    if isinstance(value, int | float):
        return rng.choice([value + 1, -value, value * 2, float(value), str(value)])
    if isinstance(value, str):
        return rng.choice([value[:-1], value + "0", value.upper(), [value]])
    if isinstance(value, list):
        return rng.choice([value[1:], value[::-1], value + value, [value], value * 50])
    return rng.choice([{}, list(value), {**value, "x": 1}, [[k, 1] for k in value]])


def _any_value(rng: Random) -> Any:
    how = rng.random()
    if how < 0.6:
        return rng.choice(SCALARS)
    if how < 0.8:
        return [rng.choice(SCALARS) for _ in range(rng.choice([0, 1, 2, 3, 300]))]
    if how < 0.9:
        return {str(rng.choice(SCALARS))[:9]: rng.choice(SCALARS) for _ in range(3)}
    nested: Any = rng.choice(SCALARS)
    for _ in range(rng.choice([1, 3, 60, 300])):
        nested = [nested] if rng.random() < 0.5 else {"kind": "tuple", "items": nested}
    return nested


def _flipped(content: bytes, rng: Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        if data:
            data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
    return bytes(data)


def _tensor_name(saved: Saved) -> str:
    return next(n for n in saved.files if n.endswith(".safetensors"))


def _tensor_file(saved: Saved) -> bytes:
    return saved.files[_tensor_name(saved)]


def _short(name: str) -> str:
    return "tensors" if name.endswith(".safetensors") else name
