"""SVGD runs in folders, to go on from in another process."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from pyro_lora.ground.tensor_folder import MANIFEST
from pyro_lora.infer.svgd.svgd import SVGD
from pyro_lora.infer.svgd.training_state import (
    read_state,
    restore_generators,
    write_state,
)


def save_state(svgd: SVGD, path: str | os.PathLike[str]) -> None:
    """Write an SVGD run into a folder: all that the next step depends on.

    Particles, the optimiser with its schedule, batches of an unfinished update, the
    number of epochs, the diagnostics, and the random generators of torch, NumPy and
    Python. The files are as those of :func:`~pyro_lora.save`: safetensors and JSON with
    checksums, nothing pickled; a crash leaves the old state or the new one.

    Args:
        svgd: The engine, after its first step.
        path: The folder, made if it isn't there.

    Raises:
        ValueError: Before the first step, if the optimiser's state holds what isn't a
            tensor, number or string, or the folder is of something else.
    """
    write_state(svgd.state_dict(), Path(path))


def load_state(
    svgd: SVGD,
    path: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
) -> None:
    """Go on from a run that :func:`save_state` wrote, bit for bit.

    Sets the random generators of torch, NumPy and Python, too, so that shuffled
    batches and dropout go on as they would have.

    Args:
        svgd: An engine with the same model, kernel, optimiser and K; before its first
            step or after it.
        path: The folder.
        device: Where the network is; None is where the particles were.

    Raises:
        ValueError: If a file is missing, truncated, altered, not one of ours or
            written by a newer version, this machine doesn't have the device, or the
            state is that of another model, network, K or optimiser, or can't be one;
            ``svgd`` and the generators are then unchanged.
    """
    folder = Path(path)
    state = read_state(folder, device)
    generators = state.pop("random")
    try:
        svgd.load_state_dict(state)
    except ValueError as error:
        raise ValueError(f"{folder / MANIFEST}: {error}") from error
    restore_generators(generators)
