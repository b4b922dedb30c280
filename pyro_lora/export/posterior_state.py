"""A posterior as a JSON-like description and named tensors, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pyro_lora.curvature.block_gaussian import BlockGaussian, Eigenblocks
from pyro_lora.curvature.dense_gaussian import DenseGaussian
from pyro_lora.curvature.weight_gaussian import WeightGaussian, Weights
from pyro_lora.infer.laplace_posterior import LaplacePosterior, normal_prior
from pyro_lora.infer.mixture_posterior import MixturePosterior
from pyro_lora.infer.particle_posterior import ParticlePosterior
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.lifting.model_trace import Model

Posterior = LaplacePosterior | ParticlePosterior | MixturePosterior
Tensors = dict[str, Tensor]


def describe(posterior: Posterior, prefix: str = "") -> tuple[dict[str, Any], Tensors]:
    """What :func:`restore` needs.

    Args:
        posterior: One of ours.
        prefix: Put before the tensors' names.

    Returns:
        A description that JSON can hold, and named tensors.

    Raises:
        ValueError: If the posterior is of another type, or has latent sites outside of
            the network.
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
        description = {
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
    if posterior.latents is not None:
        raise ValueError(
            f"save can't store the latent sites {list(posterior.latents.values)}: they "
            "aren't part of the network. Fix them by pyro.poutine.condition and refit."
        )
    kind, tensors = _describe_gaussian(posterior.gaussian, prefix)
    tensors |= _named(f"{prefix}prior_mean/", posterior.prior_mean)
    tensors[f"{prefix}log_likelihood"] = posterior.log_likelihood
    tensors[f"{prefix}log_prior"] = posterior.log_prior
    description = {
        "kind": "laplace",
        "gaussian": kind,
        "sites": list(posterior.gaussian.loc),
        "obs_site": posterior.obs_site,
    }
    return description, tensors


def restore(
    description: Mapping[str, Any],
    tensors: Tensors,
    loras: tuple[LiftedNetwork, ...],
    model: Model | None,
    prefix: str = "",
) -> Posterior:
    """The posterior that :func:`describe` described.

    A Laplace posterior's prior comes back as N(prior mean, 1 / prior precision).

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
        particles = _at(f"{prefix}particles/", sites, tensors)
        return ParticlePosterior(particles, loras, model, description["obs_site"])
    if kind != "laplace":
        raise KeyError(kind)
    gaussian = _restore_gaussian(description["gaussian"], sites, tensors, prefix)
    mean = _at(f"{prefix}prior_mean/", sites, tensors)
    return LaplacePosterior(
        gaussian,
        mean,
        tensors[f"{prefix}log_likelihood"],
        tensors[f"{prefix}log_prior"],
        normal_prior(mean, gaussian.prior_precision),
        loras,
        model,
        description["obs_site"],
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
    kind: str, sites: Sequence[str], tensors: Tensors, prefix: str
) -> WeightGaussian:
    loc = _at(f"{prefix}loc/", sites, tensors)
    tau = _at(f"{prefix}prior_precision/", sites, tensors)
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
        for site in sites
    }
    return BlockGaussian(loc, tau, blocks)


def _named(prefix: str, values: Mapping[str, Tensor]) -> Tensors:
    return {f"{prefix}{name}": value for name, value in values.items()}


def _at(prefix: str, sites: Sequence[str], tensors: Tensors) -> Weights:
    return {site: tensors[f"{prefix}{site}"] for site in sites}
