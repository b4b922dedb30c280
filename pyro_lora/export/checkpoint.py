"""Posteriors in folders: safetensors and a JSON manifest, no pickle, crash-safe."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pyro_lora.export.posterior_state import (
    Posterior,
    Tensors,
    describe,
    restore,
    sites_of,
)
from pyro_lora.export.weight_variables import without_adapter_name
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.lifting.model_trace import Model

FORMAT = "pyro_lora posterior"
VERSION = 1
MANIFEST = "manifest.json"
_TENSOR_FILE = re.compile(r"[0-9a-f]{64}\.safetensors")
_TEMPORARY_FILE = re.compile(r"[0-9a-f]{16}\.pyro_lora\.tmp")


def save(posterior: Posterior, path: str | os.PathLike[str]) -> None:
    """Write a posterior into a folder, which is made if it isn't there.

    A crash at any time leaves the old checkpoint or the new one: the tensor file is
    named by its own sha256, the manifest that names it is renamed into place last, and
    the old tensor file is deleted after that. What a crash leaves over, the next save
    deletes.

    Args:
        posterior: A Laplace, particle or mixture posterior.
        path: The folder.

    Raises:
        ValueError: If the posterior is of another kind, or the folder holds a
            ``manifest.json`` of something else.
    """
    folder = Path(path)
    description, tensors = describe(posterior)
    folder.mkdir(parents=True, exist_ok=True)
    manifest_file = folder / MANIFEST
    if manifest_file.exists():
        _read_manifest(manifest_file, check=False)
    compact, shapes = _without_repetition(tensors)
    name, size = _write_tensors(folder, compact)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "posterior": description,
        "sites": {site: list(shape) for site, shape in sites_of(posterior).items()},
        "layers": _layers(posterior.loras),
        "tensors": {"file": name, "bytes": size, "sha256": name.partition(".")[0]},
        "expanded": shapes,
    }
    manifest["manifest_sha256"] = _digest(manifest)
    text = json.dumps(manifest, indent=1).encode()
    temporary = _write_temporary(folder, lambda file: file.write_bytes(text))
    os.replace(temporary, manifest_file)
    _sync(folder)
    _remove_all_but(name, folder)


def load(
    path: str | os.PathLike[str],
    lora: LiftedNetwork | Sequence[LiftedNetwork],
    *,
    model: Model | None = None,
) -> Posterior:
    """Read a posterior written by :func:`save`.

    Args:
        path: The folder.
        lora: The lifted network that the posterior is about, or all of them where the
            model has several.
        model: The Pyro model; without it, what needs one (``linearized``, tuning by
            held-out data) raises.

    Returns:
        The posterior, on the network's device and in its dtype; in the dtype that it
        was saved in, bit for bit what was saved. A normal prior is restored whatever
        prior ``lora`` was lifted with; any other prior is that of ``lora``, its
        ``pyro.param`` values as they were. Refits (``num_refits=``) need a new fit.

    Raises:
        ValueError: If a file is missing, truncated, altered, not one of ours or
            written by a newer version, or the network has other sites, layers or
            scalings, or another prior, where that of the fit wasn't normal.
    """
    loras = (lora,) if isinstance(lora, LiftedNetwork) else tuple(lora)
    manifest_file = Path(path) / MANIFEST
    manifest = _read_manifest(manifest_file, check=True)
    _check_network(manifest_file, manifest, loras)
    tensors = _read_tensors(Path(path), manifest["tensors"])
    device = next(iter(loras[0].zeros().values())).device
    for name, value in tensors.items():
        shape = manifest["expanded"].get(name, value.shape)
        tensors[name] = value.to(device).expand(tuple(shape))
    try:
        return restore(manifest["posterior"], tensors, loras, model)
    except KeyError as error:
        raise ValueError(
            f"{manifest_file}: {error} is missing or unknown. Save the posterior again."
        ) from error
    except ValueError as error:
        raise ValueError(f"{manifest_file}: {error}") from error


def _without_repetition(tensors: Tensors) -> tuple[Tensors, dict[str, list[int]]]:
    """Copies on the CPU; dims that only repeat by ``expand`` are stored once."""
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


def _write_tensors(folder: Path, tensors: Tensors) -> tuple[str, int]:
    temporary = _write_temporary(folder, lambda file: save_file(tensors, file))
    name = f"{_file_digest(temporary)}.safetensors"
    size = temporary.stat().st_size
    os.replace(temporary, folder / name)
    return name, size


def _write_temporary(folder: Path, write: Callable[[Path], object]) -> Path:
    """A new file, on the disk and not only in the system's cache."""
    file = folder / f"{secrets.token_hex(8)}.pyro_lora.tmp"
    file.touch()
    mode = file.stat().st_mode
    try:
        write(file)
        file.chmod(mode)  # safetensors lets nobody but the owner read what it writes
        _sync(file)
    except BaseException:
        file.unlink(missing_ok=True)
        raise
    return file


def _remove_all_but(name: str, folder: Path) -> None:
    for file in folder.iterdir():
        old = _TENSOR_FILE.fullmatch(file.name) and file.name != name
        if old or _TEMPORARY_FILE.fullmatch(file.name):
            file.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _layers(loras: Sequence[LiftedNetwork]) -> dict[str, Any]:
    """What tells apart networks whose sites have the same names and shapes.

    The parameters of each site in layer order, adapter names left out, and the LoRA
    scaling of each layer.
    """
    parameters: dict[str, list[str]] = {}
    scalings: dict[str, float] = {}
    for lora in loras:
        for site, names in lora.sites.items():
            parameters[site] = [without_adapter_name(name) for name in names]
        ones = {site: torch.ones_like(x) for site, x in lora.zeros().items()}
        for layer, (b, _) in lora.delta_weight_factors(ones).items():
            scalings[layer] = float(b.flatten()[0])
    return {"parameters": parameters, "scalings": scalings}


def _digest(manifest: Mapping[str, Any]) -> str:
    rest = {name: x for name, x in manifest.items() if name != "manifest_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_manifest(file: Path, *, check: bool) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(
            f"{file} doesn't exist, so its folder is no checkpoint of pyro_lora. "
            "Check the path."
        )
    try:
        manifest: dict[str, Any] = json.loads(file.read_bytes())
        found = manifest["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{file} is truncated, or no manifest of pyro_lora. Use another folder."
        ) from error
    if found != FORMAT:
        raise ValueError(
            f"{file} has the format {found!r}, expected {FORMAT!r}. Use another folder."
        )
    if not check:
        return manifest
    if not manifest.get("version", 0) <= VERSION:
        raise ValueError(
            f"{file} has version {manifest['version']}; this pyro_lora reads up to "
            f"{VERSION}. Upgrade pyro_lora."
        )
    if manifest.get("manifest_sha256") != _digest(manifest):
        raise ValueError(
            f"{file} was altered after it was written: its checksum doesn't match. "
            "Save the posterior again."
        )
    return manifest


def _read_tensors(folder: Path, entry: Mapping[str, Any]) -> Tensors:
    file = folder / entry["file"]
    if not _TENSOR_FILE.fullmatch(entry["file"]) or not file.is_file():
        raise ValueError(f"{file} doesn't exist. Copy the whole folder.")
    size = file.stat().st_size
    if size != entry["bytes"]:
        raise ValueError(
            f"{file} has {size} bytes, expected {entry['bytes']}: it was truncated or "
            "altered. Copy it again, or save the posterior again."
        )
    if _file_digest(file) != entry["sha256"]:
        raise ValueError(
            f"{file} was altered: its sha256 isn't {entry['sha256']}. Copy it again, "
            "or save the posterior again."
        )
    return load_file(file)


def _check_network(
    file: Path, manifest: Mapping[str, Any], loras: Sequence[LiftedNetwork]
) -> None:
    saved = manifest["sites"]
    found = {s: list(x.shape) for lora in loras for s, x in lora.zeros().items()}
    remedy = "Lift the network that the posterior was made for."
    for site, shape in found.items():
        if saved.get(site) != shape:
            raise ValueError(
                f"{file}: site {site!r} of this network has shape {shape}, the saved "
                f"posterior has {saved.get(site, 'no such site')}. {remedy}"
            )
    saved_layers, layers = manifest["layers"], _layers(loras)
    for site, names in saved_layers["parameters"].items():
        if layers["parameters"].get(site) != names:
            raise ValueError(
                f"{file}: site {site!r} holds {names} in the saved posterior, and "
                f"{layers['parameters'].get(site, 'nothing')} in this network. {remedy}"
            )
    for layer, scaling in saved_layers["scalings"].items():
        other = layers["scalings"].get(layer)
        if other is None or abs(other - scaling) > 1e-6 * abs(scaling):
            raise ValueError(
                f"{file}: layer {layer!r} has the LoRA scaling {scaling} in the saved "
                f"posterior, and {other} in this network, so the same weights mean "
                f"another update. {remedy}"
            )
