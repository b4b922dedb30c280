"""Posteriors in folders that another process, or another machine, can load."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pyro_lora.curvature.tensor_folder import (
    MANIFEST,
    Format,
    read_manifest,
    read_tensors,
    write_folder,
)
from pyro_lora.export.posterior_state import Posterior, describe, restore, sites_of
from pyro_lora.export.prior_density import NOISE
from pyro_lora.export.weight_variables import without_adapter_name
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.lifting.model_trace import Model

FORMAT = Format("pyro_lora posterior", 1, "Save the posterior again.")


def save(posterior: Posterior, path: str | os.PathLike[str]) -> None:
    """Write a posterior into a folder, which is made if it isn't there.

    The folder has a tensor file (safetensors) and ``manifest.json`` with a sha256 of
    both; nothing is pickled. A crash at any time, also ``kill -9``, leaves the old
    checkpoint or the new one.

    Args:
        posterior: A Laplace, particle or mixture posterior.
        path: The folder.

    Raises:
        ValueError: If the posterior is of another kind, or the folder holds a
            ``manifest.json`` of something else.
    """
    description, tensors = describe(posterior)
    content = {
        "posterior": description,
        "sites": {site: list(shape) for site, shape in sites_of(posterior).items()},
        "layers": _layers(posterior.loras),
    }
    write_folder(Path(path), FORMAT, content, tensors)


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
    folder = Path(path)
    manifest_file = folder / MANIFEST
    manifest = read_manifest(folder, FORMAT)
    _check_network(manifest_file, manifest, loras)
    device = next(iter(loras[0].zeros().values())).device
    tensors = read_tensors(folder, FORMAT, manifest, device)
    try:
        return restore(manifest["posterior"], tensors, loras, model)
    except KeyError as error:
        raise ValueError(
            f"{manifest_file}: {error} is missing or unknown. Save the posterior again."
        ) from error
    except ValueError as error:
        raise ValueError(f"{manifest_file}: {error}") from error


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


def _check_network(
    file: Path, manifest: Mapping[str, Any], loras: Sequence[LiftedNetwork]
) -> None:
    saved = manifest["sites"]
    found = {s: list(x.shape) for lora in loras for s, x in lora.zeros().items()}
    remedy = "Lift the network that the posterior was made for."
    for site, shape in found.items():
        there = saved.get(site, saved.get(f"{site}{NOISE}", "no such site"))
        if there != shape:
            raise ValueError(
                f"{file}: site {site!r} of this network has shape {shape}, the saved "
                f"posterior has {there}. {remedy}"
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
