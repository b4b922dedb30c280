"""A posterior as a JSON-like description and named tensors, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
import torch
from torch import Tensor

from pyro_lora.curvature.block_gaussian import BlockGaussian, Eigenblocks
from pyro_lora.curvature.dense_gaussian import DenseGaussian
from pyro_lora.curvature.latent_block import MAX_LATENTS, LatentBlock
from pyro_lora.curvature.weight_gaussian import WeightGaussian
from pyro_lora.export.prior_state import (
    PriorDescription,
    describe_prior,
    restore_prior,
)
from pyro_lora.export.transform_state import (
    TransformDescription,
    describe_transform,
    restore_transform,
)
from pyro_lora.ground.checked_tensors import (
    DOUBLE,
    FLOAT32,
    CheckedTensors,
    check_broadcasts,
    check_definite,
)
from pyro_lora.ground.tensor_folder import Schema
from pyro_lora.ground.weights import Weights
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood.model_trace import Model
from pyro_lora.posteriors.laplace_posterior import LaplacePosterior
from pyro_lora.posteriors.mixture_posterior import MixturePosterior
from pyro_lora.posteriors.particle_posterior import ParticlePosterior
from pyro_lora.priors.prior import NOISE

Posterior = LaplacePosterior | ParticlePosterior | MixturePosterior
Tensors = dict[str, Tensor]
Dtypes = tuple[dict[str, torch.dtype], dict[torch.dtype, torch.dtype]]

_OF_LATENTS = ("precision", "log_prior", "gradient")
_ROUNDING = 1e-6  # of a sum of float64 weights, far above it


class LatentDescription(Schema):
    """Of a :class:`LatentBlock`: its sites in order, and how they are mapped."""

    sites: tuple[str, ...]
    transforms: dict[str, TransformDescription]


class LaplaceDescription(Schema, tag_field="kind", tag="laplace"):
    """Of a :class:`LaplacePosterior`: its sites in order, those that are fixed too."""

    gaussian: Literal["dense", "blocks"]
    sites: tuple[str, ...]
    obs_site: str | None
    prior: PriorDescription
    latents: LatentDescription | None
    fixed: tuple[str, ...] = ()


class ParticleDescription(Schema, tag_field="kind", tag="particles"):
    """Of a :class:`ParticlePosterior`: its sites in order."""

    sites: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    obs_site: str | None


class MixtureDescription(Schema, tag_field="kind", tag="mixture"):
    """Of a :class:`MixturePosterior`."""

    components: Annotated[
        tuple[LaplaceDescription | ParticleDescription | MixtureDescription, ...],
        msgspec.Meta(min_length=1),
    ]


Description = LaplaceDescription | ParticleDescription | MixtureDescription


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
    description: Description,
    tensors: CheckedTensors,
    loras: tuple[LiftedNetwork, ...],
    model: Model | None,
) -> Posterior:
    """The posterior that :func:`describe` described.

    Weights come back in the networks' dtype, other latents and the prior's parameters
    in the dtype that follows from that; sums over the data stay in float64.

    Args:
        description: As returned by ``describe``.
        tensors: As returned by ``describe``.
        loras: The lifted networks.
        model: The Pyro model, or None.

    Returns:
        The posterior.

    Raises:
        ValueError: If the description and the tensors aren't those of a posterior over
            the networks' weights, or the prior isn't normal, and the network has
            another.
    """
    if isinstance(description, MixtureDescription):
        pi = tensors.not_negative("weights", (len(description.components),), DOUBLE)
        if not abs(float(pi.sum()) - 1) <= _ROUNDING:
            raise ValueError(
                f"tensor {tensors.prefix}weights sums to {float(pi.sum()):.6g}; the "
                "weights of a mixture sum to 1"
            )
        components = [
            restore(part, tensors.under(f"components/{index}/"), loras, model)
            for index, part in enumerate(description.components)
        ]
        return MixturePosterior(components, pi)
    lifted = {s: x for lora in loras for s, x in lora.zeros().items()}
    sites = description.sites  # in order: draws and dense matrices depend on it
    if isinstance(description, ParticleDescription):
        _check_sites(sites, lifted)
        saved = _particles(tensors.under("particles/"), sites, lifted)
        particles = _in_dtypes(saved, _dtypes(saved, loras))
        return ParticlePosterior(particles, loras, model, description.obs_site)
    _check_sites([*sites, *description.fixed], lifted, noise=False)
    shapes = {site: tuple(x.shape) for site, x in lifted.items()}

    def values(name: str, sites: Sequence[str]) -> Weights:
        inner = tensors.under(f"{name}/")
        return {site: inner.real(site, shapes[site]) for site in sites}

    mode, fixed_there = values("loc", sites), values("fixed", description.fixed)
    tau_there = _precisions(tensors, description, shapes)
    dtypes = _dtypes({**mode, **fixed_there}, loras)
    loc, mean, tau, fixed = (
        _in_dtypes(x, dtypes)
        for x in (mode, values("prior_mean", sites), tau_there, fixed_there)
    )
    prior = restore_prior(
        description.prior,
        tensors.under("prior_parameters/"),
        partial(_in_dtypes, dtypes=dtypes),
        loras,
        mode,
        mean,
        tau,
        fixed,
    )
    return LaplacePosterior(
        _restore_gaussian(description.gaussian, loc, tau, tensors),
        mean,
        tensors.real("log_likelihood", (), DOUBLE),
        tensors.real("log_prior", (), DOUBLE),
        prior,
        loras,
        model,
        description.obs_site,
        _restore_latents(description.latents, tensors.under("latents/"), dtypes),
        fixed=fixed,
    )


def _check_sites(
    sites: Sequence[str], lifted: Mapping[str, Tensor], noise: bool = True
) -> None:
    """Check that each lifted site is there once, by its name or that of its noise.

    Raises:
        ValueError: If one isn't, or there is another where ``noise`` isn't allowed.
    """
    names = [
        f"{site}{NOISE}" if noise and f"{site}{NOISE}" in sites else site
        for site in lifted
    ]
    unknown = [] if noise else [site for site in sites if site not in lifted]
    missing = [site for site in names if site not in sites]
    if unknown or missing or len(set(sites)) < len(sites):
        raise ValueError(
            f"the sites are {list(sites)}; expected each of the network's once, {names}"
        )


def _particles(
    tensors: CheckedTensors, sites: Sequence[str], lifted: Mapping[str, Tensor]
) -> Weights:
    found = {site: tensors.real(site) for site in sites}
    num_particles = {x.shape[:1] for x in found.values()}
    if (
        len(num_particles) > 1
        or 0 in min(num_particles, default=(0,))
        or () in (num_particles)
    ):
        raise ValueError(
            f"tensors {tensors.prefix}... hold {sorted(map(tuple, num_particles))} "
            "particles; expected one number, positive, for all sites"
        )
    for site, x in found.items():
        like = lifted.get(site.removesuffix(NOISE), lifted.get(site))
        if like is not None and x.shape[1:] != like.shape:
            raise ValueError(
                f"tensor {tensors.prefix}{site} has particles of shape "
                f"{tuple(x.shape[1:])}, expected {tuple(like.shape)}"
            )
    return found


def _precisions(
    tensors: CheckedTensors,
    description: LaplaceDescription,
    shapes: Mapping[str, tuple[int, ...]],
) -> Weights:
    """Prior precisions in the shapes in which the Gaussians keep them.

    Raises:
        ValueError: If they aren't positive, or of another shape.
    """
    found = {}
    inner = tensors.under("prior_precision/")
    for site in description.sites:
        shape = shapes[site]
        if description.gaussian == "dense":
            tau = inner.positive(site)
            check_broadcasts(tau, shape, f"tensor {inner.prefix}{site}")
        elif f"rows/{site}" in tensors:  # one for each matrix
            tau = inner.positive(site, (shape[0], *[1] * (len(shape) - 1)))
        else:
            tau = inner.positive(site, shape)
        found[site] = tau
    return found


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
    kind: str, loc: Weights, tau: Weights, tensors: CheckedTensors
) -> WeightGaussian:
    if kind == "dense":
        size = sum(x.numel() for x in loc.values())
        fisher = tensors.real("fisher", (size, size), DOUBLE)
        check_definite(fisher, f"tensor {tensors.prefix}fisher", floor=FLOAT32)
        gaussian = DenseGaussian(loc, tau, fisher)
        gaussian.variance()  # raises where the precision isn't definite
        return gaussian
    return BlockGaussian(loc, tau, {s: _block(s, x, tensors) for s, x in loc.items()})


def _block(site: str, loc: Tensor, tensors: CheckedTensors) -> Eigenblocks:
    """Eigenvalues and bases that fit together, and the site.

    Raises:
        ValueError: If they don't.
    """
    if loc.ndim not in (2, 3):
        raise ValueError(
            f"site {site!r} has shape {tuple(loc.shape)}, and no matrices to have "
            "eigenvalues"
        )
    num_layers, out, width = (*loc.shape, 1)[:3]  # a bias is a matrix of one column
    values = tensors.under("values/").not_negative(site, None, DOUBLE)
    bases = [name for name in ("rows", "columns") if f"{name}/{site}" in tensors]
    if not bases:
        whole = (num_layers, out, width)
        return Eigenblocks(
            tensors.under("values/").not_negative(site, whole, DOUBLE), None, None
        )
    if values.ndim != 3 or values.shape[0] != num_layers:
        raise ValueError(
            f"tensor {tensors.prefix}values/{site} has shape {tuple(values.shape)}, "
            f"expected ({num_layers}, j, k)"
        )
    _, j, k = values.shape
    if not (0 < j <= out and 0 < k <= width):
        raise ValueError(
            f"tensor {tensors.prefix}values/{site} has {j} x {k} eigenvalues a matrix, "
            f"expected at most {out} x {width}"
        )
    return Eigenblocks(
        values,
        tensors.under("rows/").orthonormal(site, (num_layers, out, j)),
        tensors.under("columns/").orthonormal(site, (num_layers, width, k)),
    )


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
    description: LatentDescription | None, tensors: CheckedTensors, dtypes: Dtypes
) -> LatentBlock | None:
    if description is None:
        return None
    if {*description.transforms} != {*description.sites} or not description.sites:
        raise ValueError(
            f"the latent sites are {list(description.sites)}, those with a transform "
            f"{list(description.transforms)}; expected the same"
        )
    inner = tensors.under("values/")
    values = {site: inner.real(site) for site in description.sites}
    size = sum(x.numel() for x in values.values())
    if size > MAX_LATENTS:
        raise ValueError(f"the latent sites have {size} entries, more than allowed")
    values = _in_dtypes(values, dtypes)
    transforms = {
        site: restore_transform(
            description.transforms[site],
            tensors.under(f"transforms/{site}/"),
            partial(_in_dtypes, dtypes=dtypes),
            x,
        )
        for site, x in values.items()
    }
    free = sum(
        transforms[site].inverse_shape(x.shape).numel() for site, x in values.items()
    )
    precision = tensors.real("precision", (free, free), DOUBLE)
    check_definite(precision, f"tensor {tensors.prefix}precision", floor=0.0)
    return LatentBlock(
        values,
        transforms,
        precision,
        tensors.real("log_prior", (), DOUBLE),
        tensors.real("gradient", (free,), DOUBLE),
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
