"""State of a training run in a folder, with the generators, to go on from."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_lora.curvature.tensor_folder import (
    Format,
    read_manifest,
    read_tensors,
    write_folder,
)

FORMAT = Format("pyro_lora training state", 1, "Save the state again.")

Tensors = dict[str, Tensor]


def write_state(state: Mapping[str, Any], folder: Path) -> None:
    """Write a state of :class:`~pyro_lora.SVGD`, and that of the random generators.

    Args:
        state: From ``SVGD.state_dict()``: nested dicts, lists and tuples of tensors
            and of what JSON has.
        folder: Where, in the form of ``tensor_folder``.

    Raises:
        ValueError: If the state holds something else.
    """
    device = next(iter(state["particles"].values())).device
    tensors: Tensors = {}
    whole = {**state, "random": _generators(device)}
    content = {
        "state": _encoded(whole, "", tensors),
        "device": str(device),
    }
    write_folder(folder, FORMAT, content, tensors)


def read_state(
    folder: Path, device: torch.device | str | None = None
) -> dict[str, Any]:
    """What :func:`write_state` wrote.

    Args:
        folder: Where.
        device: Where to put the tensors; None is where they were.

    Returns:
        The state, with the generators' as ``"random"``.

    Raises:
        ValueError: If the folder is missing, damaged, newer or of something else, or
            this machine doesn't have the device.
    """
    manifest = read_manifest(folder, FORMAT)
    there = torch.device(manifest["device"] if device is None else device)
    if there.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"{folder} is the state of particles on {there}, which this machine "
            "doesn't have. Load it onto another by device='cpu'."
        )
    # Optimisers put their own tensors where the particles are, but counters on the CPU.
    tensors = read_tensors(folder, FORMAT, manifest, torch.device("cpu"))
    kept = ("optim/", "random/")
    tensors = {
        name: x if name.startswith(kept) else x.to(there) for name, x in tensors.items()
    }
    state: dict[str, Any] = _decoded(manifest["state"], tensors)
    return state


def restore_generators(state: Mapping[str, Any]) -> None:
    """Set the generators of torch, NumPy and Python.

    Args:
        state: ``"random"`` of :func:`read_state`. That of a device which this machine
            doesn't have is left out.
    """
    torch.set_rng_state(state["torch"])
    for device, value in state["cuda"].items():
        if (torch.device(device).index or 0) < torch.cuda.device_count():
            torch.cuda.set_rng_state(value, device)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])


def _generators(device: torch.device) -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    on_cuda = device.type == "cuda"
    return {
        "torch": torch.get_rng_state(),
        "cuda": {str(device): torch.cuda.get_rng_state(device)} if on_cuda else {},
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
    }


def _encoded(value: Any, path: str, tensors: Tensors) -> Any:
    """What JSON can hold; tensors and series of floats go into ``tensors``.

    Raises:
        ValueError: If there is anything else.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list) and value and all(type(x) is float for x in value):
        tensors[path] = torch.tensor(value, dtype=torch.float64)
        return {"kind": "floats", "name": path}
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"kind": "tensor", "name": path}
    if isinstance(value, list | tuple):
        items = [_encoded(x, f"{path}/{i}", tensors) for i, x in enumerate(value)]
        return items if isinstance(value, list) else {"kind": "tuple", "items": items}
    if isinstance(value, Mapping) and all(isinstance(k, int | str) for k in value):
        start = f"{path}/" if path else ""
        items = [[k, _encoded(x, f"{start}{k}", tensors)] for k, x in value.items()]
        kind = "counter" if isinstance(value, Counter) else "dict"
        return {"kind": kind, "items": items}
    raise ValueError(
        f"The state has a {type(value).__name__} at {path!r}, which save_state can't "
        "store; expected tensors, numbers, strings, and lists, tuples or dicts of "
        "them. Save svgd.state_dict() by other means."
    )


def _decoded(value: Any, tensors: Tensors) -> Any:
    if isinstance(value, list):
        return [_decoded(x, tensors) for x in value]
    if not isinstance(value, dict):
        return value
    kind = value["kind"]
    if kind == "tensor":
        return tensors[value["name"]]
    if kind == "floats":
        return tensors[value["name"]].tolist()
    if kind == "tuple":
        return tuple(_decoded(value["items"], tensors))
    pairs = {k: _decoded(x, tensors) for k, x in value["items"]}
    return Counter(pairs) if kind == "counter" else pairs
