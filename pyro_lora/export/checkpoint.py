"""Posteriors in folders that another process, or another machine, can load.

A folder is two files: the tensors, under a random name that no other write takes, and
a manifest, which comes last and by renaming, so that it always names a file that is
whole.

    manifest.json              {"format": "pyro_lora posterior", "version": 2,
                                "posterior": {"kind": "laplace", ...}, "sites": ...}
    <64 digits>.safetensors    loc/lora.query.A, values/lora.query.A, ...

What tells a network from others of the same shapes (its layers, scalings, and a
fingerprint of its frozen weights) is in there, too, and checked by ``load``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from pyro_lora.export.posterior_state import (
    Description,
    describe,
    restore,
    sites_of,
)
from pyro_lora.export.weight_variables import bare_parameters
from pyro_lora.ground.autocast import outside_autocast
from pyro_lora.ground.checked_tensors import CheckedTensors
from pyro_lora.ground.interrupts import leaving_no_trace
from pyro_lora.ground.settings import check_kind
from pyro_lora.ground.tensor_folder import (
    Format,
    Manifest,
    Real,
    Schema,
    Shape,
    read_folder,
    read_manifest,
    write_folder,
)
from pyro_lora.lifting.fingerprint import (
    NUM_VALUES,
    NetworkDescription,
    check_networks,
    described,
    fingerprint,
    restored,
    rounding,
    sample,
)
from pyro_lora.lifting.lifted_network import LiftedNetwork, check_lora
from pyro_lora.lifting.prior import NOISE
from pyro_lora.lifting.sites import bare_names
from pyro_lora.likelihood.model_trace import Model
from pyro_lora.posteriors.guide_posterior import Guide
from pyro_lora.posteriors.posterior import Posterior, as_posterior
from pyro_lora.posteriors.prior import made_of_latents, networks_prior


class _Layers(Schema):
    """What tells apart networks whose sites have the same names and shapes."""

    parameters: dict[str, tuple[str, ...]]
    scalings: dict[str, Real]


class SavedPosterior(Schema):
    """The fields of a posterior's manifest; version 1 had no ``networks``.

    ``made`` has the dtypes of sites that the prior makes of latents.
    """

    posterior: Description
    sites: dict[str, Shape]
    layers: _Layers
    networks: tuple[NetworkDescription, ...] | None = None
    made: dict[str, str] = msgspec.field(default_factory=dict)
    metadata: dict[str, str] = msgspec.field(default_factory=dict)


_ROUNDING = 1e-5  # relative, in float32

FORMAT = Format("pyro_lora posterior", 2, "Save the posterior again.", SavedPosterior)


@leaving_no_trace
def save(
    posterior: Posterior | Guide,
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a posterior into a folder, which is made if it isn't there.

    The folder has a tensor file (safetensors) and ``manifest.json`` with a sha256 of
    both; nothing is pickled. A crash at any time, also ``kill -9``, leaves the old
    checkpoint or the new one. Several processes may save into one folder: the last one
    wins, and who loads meanwhile gets one of them, whole. Files that no manifest of
    this folder names are left alone.

    Args:
        posterior: A Laplace, particle or mixture posterior.
        path: The folder.
        metadata: Words of your own, such as the names of the classes, that are there
            with the posterior or not at all, for :func:`load_metadata`.

    Raises:
        ValueError: If the posterior is of another kind, the metadata aren't strings, or
            the folder holds a ``manifest.json`` of something else.
    """
    metadata = {} if metadata is None else dict(metadata)
    for name, value in metadata.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise ValueError(
                f"metadata must be strings by name, found {name!r}: {value!r}. Put "
                "other things into one by json.dumps."
            )
    posterior = as_posterior(posterior)
    description, tensors = describe(posterior)
    networks, values = described([fingerprint(lora) for lora in posterior.networks])
    sites = sites_of(posterior)
    made = made_of_latents(posterior.prior, posterior.networks, sites)
    values |= {f"made/{site}": sample(x).cpu() for site, x in made.items()}
    content = {
        "posterior": description,
        "sites": {site: list(shape) for site, shape in sites.items()},
        "made": {s: str(x.dtype).removeprefix("torch.") for s, x in made.items()},
        "layers": _layers(posterior.networks),
        "metadata": metadata,
        "networks": networks,
    }
    write_folder(Path(path), FORMAT, content, tensors | values)


@leaving_no_trace
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
        ``pyro.param`` values as they were.

    Raises:
        TypeError: If ``lora`` is something else.
        ValueError: If a file is missing, truncated, altered, not one of ours or
            written by a newer version, or the network has other sites, layers or
            scalings, or another prior, where that of the fit wasn't normal.
    """
    expected = "a lifted network, or a list of them"
    check_kind("lora", lora, LiftedNetwork | Sequence, expected)
    networks = (lora,) if isinstance(lora, LiftedNetwork) else tuple(lora)
    for network in networks:
        check_lora(network)
    if not networks:
        raise ValueError(f"lora must be {expected}, found none.")
    folder = Path(path)
    device = next(iter(networks[0].zeros().values())).device

    def check(manifest: Manifest) -> None:
        _check_network(manifest.file, manifest.content, networks)

    manifest, read = read_folder(folder, FORMAT, device, check)
    content: SavedPosterior = manifest.content
    file = manifest.file
    tensors = CheckedTensors(read)
    try:
        if manifest.version > 1:  # else there were none
            saved = restored(content.networks or (), tensors.values)
            check_networks(saved, networks, "the posterior")
        with outside_autocast():  # what was read is checked by products
            posterior = restore(content.posterior, tensors, networks, model)
            _check_made(content, tensors.under("made/"), posterior)
        if sites_of(posterior) != content.sites:
            raise ValueError(
                f"the sites have the shapes {sites_of(posterior)}, the manifest says "
                f"{content.sites}. {FORMAT.remedy}"
            )
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return posterior


def load_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """What was given to :func:`save` as ``metadata``, without loading the posterior.

    Args:
        path: The folder.

    Returns:
        Name -> words.

    Raises:
        ValueError: If the manifest is missing, truncated, altered, not one of ours or
            written by a newer version.
    """
    content: SavedPosterior = read_manifest(Path(path), FORMAT).content
    return content.metadata


def _layers(networks: Sequence[LiftedNetwork]) -> dict[str, Any]:
    """What tells apart networks whose sites have the same names and shapes.

    The parameters of each site in layer order, adapter names left out, and the LoRA
    scaling of each layer.
    """
    parameters: dict[str, list[str]] = {}
    scalings: dict[str, float] = {}
    for lora in networks:
        parameters |= bare_parameters(lora)
        bare = bare_names(lora.network, lora.adapter)
        # s B A of ones: B comes with the scaling s, which PEFT has in many places.
        ones = {site: torch.ones_like(x) for site, x in lora.zeros().items()}
        for layer, (b, _) in lora.delta_weight_factors(ones).items():
            scalings[str(bare(layer))] = float(b.flatten()[0])
    return {"parameters": parameters, "scalings": scalings}


def _check_made(
    saved: SavedPosterior, samples: CheckedTensors, posterior: Posterior
) -> None:
    """Check that the prior makes the same sites of latents as where they were saved.

    Raises:
        ValueError: If it doesn't.
    """
    if not saved.made:
        return
    here = made_of_latents(posterior.prior, posterior.networks, saved.sites)
    for site, dtype in saved.made.items():
        then = samples.real(site, (NUM_VALUES,), (torch.float32,))
        kind = getattr(torch, dtype, None)
        is_real = isinstance(kind, torch.dtype) and kind.is_floating_point
        if site not in here or not is_real:
            raise ValueError(f"made: {site!r} is none of latents, or has no dtype")
        now = sample(here[site]).to(then)
        rtol, atol = rounding(dtype, str(here[site].dtype).removeprefix("torch."))
        # Another device may round a product otherwise.
        off = ~torch.isclose(now, then, rtol=max(rtol, _ROUNDING), atol=atol)
        if off.any():
            i = int(off.nonzero()[0])
            raise ValueError(
                f"site {site!r}: the prior makes it of the saved latents and of what "
                f"this network was lifted with, and of latents of 1 {float(now[i]):.6g}"
                f" where it made {float(then[i]):.6g}. Lift the network with the "
                "adapter and the prior that the posterior was fitted with."
            )


def _check_network(
    file: Path, saved: SavedPosterior, networks: Sequence[LiftedNetwork]
) -> None:
    here = {s: tuple(x.shape) for lora in networks for s, x in lora.zeros().items()}
    remedy = "Lift the network that the posterior was made for."
    absent = {s for s in here if not {s, f"{s}{NOISE}"} & saved.sites.keys()}
    if absent:
        prior = networks_prior(networks)
        made = absent & made_of_latents(prior, networks, saved.sites).keys()
        here = {site: shape for site, shape in here.items() if site not in made}
    for site, shape in here.items():
        there = saved.sites.get(site, saved.sites.get(f"{site}{NOISE}"))
        said = "no such site" if there is None else list(there)
        if there != shape:
            raise ValueError(
                f"{file}: site {site!r} of this network has shape {list(shape)}, the "
                f"saved posterior has {said}. {remedy}"
            )
    layers = _layers(networks)
    for site, names in saved.layers.parameters.items():
        own = tuple(layers["parameters"].get(site, ()))
        if own != names:
            raise ValueError(
                f"{file}: site {site!r} holds {list(names)} in the saved posterior, "
                f"and {list(own) or 'nothing'} in this network. {remedy}"
            )
    for layer, scaling in saved.layers.scalings.items():
        other = layers["scalings"].get(layer)
        # A scaling comes as a number of the network's dtype, rounded.
        if other is None or abs(other - scaling) > 1e-6 * abs(scaling):
            raise ValueError(
                f"{file}: layer {layer!r} has the LoRA scaling {scaling} in the saved "
                f"posterior, and {other} in this network, so the same weights mean "
                f"another update. {remedy}"
            )
    if (
        saved.layers.parameters.keys() != layers["parameters"].keys()
        or saved.layers.scalings.keys() != layers["scalings"].keys()
    ):
        raise ValueError(
            f"{file}: the saved posterior is of the layers "
            f"{sorted(saved.layers.scalings)}, this network has "
            f"{sorted(layers['scalings'])}. {remedy}"
        )
