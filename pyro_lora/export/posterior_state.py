"""A posterior as a JSON-like description and named tensors, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_lora.curvature.block_gaussian import BlockGaussian, Eigenblocks
from pyro_lora.curvature.dense_gaussian import DenseGaussian
from pyro_lora.curvature.latent_block import LatentBlock
from pyro_lora.curvature.weight_gaussian import WeightGaussian, Weights
from pyro_lora.export.prior_density import NOISE
from pyro_lora.export.prior_state import describe_prior, restore_prior
from pyro_lora.export.transform_state import describe_transform, restore_transform
from pyro_lora.infer.laplace_posterior import LaplacePosterior
from pyro_lora.infer.mixture_posterior import MixturePosterior
from pyro_lora.infer.particle_posterior import ParticlePosterior
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.lifting.model_trace import Model

Posterior = LaplacePosterior | ParticlePosterior | MixturePosterior
Tensors = dict[str, Tensor]
Dtypes = tuple[dict[str, torch.dtype], dict[torch.dtype, torch.dtype]]

_OF_LATENTS = ("precision", "log_prior", "gradient")


def describe(posterior: Posterior, prefix: str = "") -> tuple[dict[str, Any], Tensors]:
    """What :func:`restore` needs.

    Args:
        posterior: One of ours.
        prefix: Put before the tensors' names.

    Returns:
        A description that JSON can hold, and named tensors.

    Raises:
        ValueError: If the posterior is of another type, or a latent site outside of the
            network has a support that can't be described.
    """
    if isinstance(posterior, MixturePosterior):
        parts = [
            describe(component, f"{prefix}components/{index}/")
            for index, component in enumerate(posterior.components)
        ]
        tensors = {f"{prefix}weights": posterior.weights}
        for _, part in parts:
            tensors |= part
        return {"kind": "mixture", "components": [d for d, _ in parts]}, tensors
    if isinstance(posterior, ParticlePosterior):
        description: dict[str, Any] = {
            "kind": "particles",
            "sites": list(posterior.particles),
            "obs_site": posterior.obs_site,
        }
        return description, _named(f"{prefix}particles/", posterior.particles)
    if not isinstance(posterior, LaplacePosterior):
        raise ValueError(
            f"save can't store a {type(posterior).__name__}; expected "
            "LaplacePosterior, ParticlePosterior or MixturePosterior. A Pyro guide's "
            "parameters are saved by pyro.get_param_store().save(file)."
        )
    kind, tensors = _describe_gaussian(posterior.gaussian, prefix)
    tensors |= _named(f"{prefix}prior_mean/", posterior.prior_mean)
    tensors[f"{prefix}log_likelihood"] = posterior.log_likelihood
    tensors[f"{prefix}log_prior"] = posterior.log_prior
    prior, found = describe_prior(posterior, f"{prefix}prior_parameters/")
    tensors |= _named(f"{prefix}fixed/", posterior.fixed)
    latents, others = _describe_latents(posterior.latents, f"{prefix}latents/")
    description = {
        "kind": "laplace",
        "gaussian": kind,
        "sites": list(posterior.gaussian.loc),
        "fixed": list(posterior.fixed),
        "obs_site": posterior.obs_site,
        "prior": prior,
        "latents": latents,
    }
    return description, tensors | found | others


def restore(
    description: Mapping[str, Any],
    tensors: Tensors,
    loras: tuple[LiftedNetwork, ...],
    model: Model | None,
    prefix: str = "",
) -> Posterior:
    """The posterior that :func:`describe` described.

    Weights come back in the networks' dtype, other latents and the prior's parameters
    in the dtype that follows from that; sums over the data stay in float64.

    Args:
        description: As returned by ``describe``.
        tensors: As returned by ``describe``.
        loras: The lifted networks.
        model: The Pyro model, or None.
        prefix: As given to ``describe``.

    Returns:
        The posterior.

    Raises:
        KeyError: If a tensor or a field is missing.
        ValueError: If the prior isn't normal, and the network has another.
    """
    kind = description["kind"]
    if kind == "mixture":
        components = [
            restore(part, tensors, loras, model, f"{prefix}components/{index}/")
            for index, part in enumerate(description["components"])
        ]
        return MixturePosterior(components, tensors[f"{prefix}weights"])
    sites = description["sites"]  # in order: draws and dense matrices depend on it
    if kind == "particles":
        saved = _at(f"{prefix}particles/", sites, tensors)
        particles = _in_dtypes(saved, _dtypes(saved, loras))
        return ParticlePosterior(particles, loras, model, description["obs_site"])
    if kind != "laplace":
        raise KeyError(kind)
    mode = _at(f"{prefix}loc/", sites, tensors)
    saved = _at(f"{prefix}fixed/", description.get("fixed", []), tensors)
    dtypes = _dtypes({**mode, **saved}, loras)
    fixed = _in_dtypes(saved, dtypes)
    loc, mean, tau = (
        _in_dtypes(_at(f"{prefix}{name}/", sites, tensors), dtypes)
        for name in ("loc", "prior_mean", "prior_precision")
    )
    names = description["prior"].get("parameters", [])
    parameters = _at(f"{prefix}prior_parameters/", names, tensors)
    prior = restore_prior(
        description["prior"],
        _in_dtypes(parameters, dtypes),
        loras,
        mode,
        mean,
        tau,
        fixed,
    )
    return LaplacePosterior(
        _restore_gaussian(description["gaussian"], loc, tau, tensors, prefix),
        mean,
        tensors[f"{prefix}log_likelihood"],
        tensors[f"{prefix}log_prior"],
        prior,
        loras,
        model,
        description["obs_site"],
        _restore_latents(description["latents"], tensors, f"{prefix}latents/", dtypes),
        fixed=fixed,
    )


def sites_of(posterior: Posterior) -> dict[str, tuple[int, ...]]:
    """Site -> its shape."""
    return {site: tuple(value.shape) for site, value in posterior.mean().items()}


def _describe_gaussian(gaussian: WeightGaussian, prefix: str) -> tuple[str, Tensors]:
    tensors = _named(f"{prefix}loc/", gaussian.loc)
    tensors |= _named(f"{prefix}prior_precision/", gaussian.prior_precision)
    if isinstance(gaussian, DenseGaussian):
        return "dense", tensors | {f"{prefix}fisher": gaussian.fisher}
    assert isinstance(gaussian, BlockGaussian)
    for site, block in gaussian.blocks.items():
        tensors[f"{prefix}values/{site}"] = block.values
        if block.rows is not None:
            tensors[f"{prefix}rows/{site}"] = block.rows
        if block.columns is not None:
            tensors[f"{prefix}columns/{site}"] = block.columns
    return "blocks", tensors


def _restore_gaussian(
    kind: str, loc: Weights, tau: Weights, tensors: Tensors, prefix: str
) -> WeightGaussian:
    if kind == "dense":
        return DenseGaussian(loc, tau, tensors[f"{prefix}fisher"])
    if kind != "blocks":
        raise KeyError(kind)
    blocks = {
        site: Eigenblocks(
            tensors[f"{prefix}values/{site}"],
            tensors.get(f"{prefix}rows/{site}"),
            tensors.get(f"{prefix}columns/{site}"),
        )
        for site in loc
    }
    return BlockGaussian(loc, tau, blocks)


def _describe_latents(
    latents: LatentBlock | None, prefix: str
) -> tuple[dict[str, Any] | None, Tensors]:
    if latents is None:
        return None, {}
    transforms, tensors = {}, _named(f"{prefix}values/", latents.values)
    for site, transform in latents.transforms.items():
        try:
            found = describe_transform(transform, f"{prefix}transforms/{site}/")
        except ValueError as error:
            raise ValueError(
                f"Latent site {site!r}: {error}. Fix it by pyro.poutine.condition and "
                "refit."
            ) from error
        transforms[site] = found[0]
        tensors |= found[1]
    tensors |= {f"{prefix}{name}": getattr(latents, name) for name in _OF_LATENTS}
    return {"sites": list(latents.values), "transforms": transforms}, tensors


def _restore_latents(
    description: Mapping[str, Any] | None,
    tensors: Tensors,
    prefix: str,
    dtypes: Dtypes,
) -> LatentBlock | None:
    if description is None:
        return None
    transforms = {}
    for site, transform in description["transforms"].items():
        start = f"{prefix}transforms/{site}/"
        own = {name: x for name, x in tensors.items() if name.startswith(start)}
        transforms[site] = restore_transform(transform, _in_dtypes(own, dtypes), start)
    values = _at(f"{prefix}values/", description["sites"], tensors)
    return LatentBlock(
        _in_dtypes(values, dtypes),
        transforms,
        *(tensors[f"{prefix}{name}"] for name in _OF_LATENTS),
    )


def _dtypes(saved: Weights, loras: Sequence[LiftedNetwork]) -> Dtypes:
    """Lifted site -> the network's dtype, and saved dtype -> what it became there."""
    lifted = {s: x.dtype for lora in loras for s, x in lora.zeros().items()}
    sites = {s if s in saved else f"{s}{NOISE}": x for s, x in lifted.items()}
    return sites, {saved[site].dtype: dtype for site, dtype in sites.items()}


def _in_dtypes(values: Tensors, dtypes: Dtypes) -> Tensors:
    sites, changed = dtypes
    return {
        name: x.to(sites.get(name, changed.get(x.dtype, x.dtype)))
        for name, x in values.items()
    }


def _named(prefix: str, values: Mapping[str, Tensor]) -> Tensors:
    return {f"{prefix}{name}": value for name, value in values.items()}


def _at(prefix: str, sites: Sequence[str], tensors: Tensors) -> Weights:
    return {site: tensors[f"{prefix}{site}"] for site in sites}
