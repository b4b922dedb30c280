"""A posterior as a JSON-like description and named tensors, and back.

Each kind has a row of one table, ``_KINDS``: its class, the schema of its description,
and the two ways between them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
import torch
from torch import Tensor
from torch import distributions as td
from torch.distributions import constraints

from pyro_lora.curvature.block_gaussian import BlockGaussian, Eigenblocks
from pyro_lora.curvature.dense_gaussian import DenseGaussian
from pyro_lora.curvature.latent_block import MAX_LATENTS, LatentBlock
from pyro_lora.curvature.prior_moments import counted_scale
from pyro_lora.curvature.weight_gaussian import WeightGaussian
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
from pyro_lora.ground.tensor_folder import Real, Schema
from pyro_lora.ground.weights import Weights
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.lifting.prior import NOISE
from pyro_lora.likelihood.model_trace import Model, trace_at
from pyro_lora.posteriors.laplace_posterior import LaplacePosterior
from pyro_lora.posteriors.mixture_posterior import MixturePosterior
from pyro_lora.posteriors.particle_posterior import ParticlePosterior
from pyro_lora.posteriors.posterior import Posterior, kind_of, one_weight_set
from pyro_lora.posteriors.prior import (
    AtParameters,
    PriorAtParameters,
    fixing,
    networks_prior,
    normal_prior,
    scaled,
)
from pyro_lora.priors import Prior

Tensors = dict[str, Tensor]
Dtypes = tuple[dict[str, torch.dtype], dict[torch.dtype, torch.dtype]]

_OF_LATENTS = ("precision", "log_prior", "gradient")
_ROUNDING = 1e-6  # of a sum of float64 weights, far above it
_SAME = 1e-5  # relative difference of two log densities, summed in another order


class NormalPrior(Schema, tag_field="kind", tag="normal"):
    """N(prior mean, 1 / prior precision), the posterior's own."""


class NetworkPrior(Schema, tag_field="kind", tag="network"):
    """The prior that the network was lifted with, recognised by its density."""

    log_density: Real
    parameters: tuple[str, ...]
    scales: dict[str, Real] = msgspec.field(default_factory=dict)


PriorDescription = NormalPrior | NetworkPrior


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
        tuple[LaplaceDescription | ParticleDescription, ...],
        msgspec.Meta(min_length=1),
    ]


Description = LaplaceDescription | ParticleDescription | MixtureDescription


def describe(posterior: Posterior, prefix: str = "") -> tuple[dict[str, Any], Tensors]:
    """What :func:`restore` needs.

    Args:
        posterior: Of a kind in the table below.
        prefix: Put before the tensors' names.

    Returns:
        A description that JSON can hold, and named tensors.

    Raises:
        ValueError: If the posterior is of another kind, or a latent site outside of the
            network has a support that can't be described.
    """
    for kind in _KINDS:
        if type(posterior) is kind.posterior:
            return kind.describe(posterior, prefix)
    raise ValueError(
        f"save can't store a {kind_of(posterior)}; expected "
        "LaplacePosterior, ParticlePosterior or MixturePosterior. A Pyro guide's "
        "parameters are saved by pyro.get_param_store().save(file)."
    )


def restore(
    description: Description,
    tensors: CheckedTensors,
    networks: tuple[LiftedNetwork, ...],
    model: Model | None,
) -> Posterior:
    """The posterior that :func:`describe` described.

    Weights come back in the networks' dtype, other latents and the prior's parameters
    in the dtype that follows from that; sums over the data stay in float64.

    Args:
        description: As returned by ``describe``.
        tensors: As returned by ``describe``.
        networks: The lifted networks.
        model: The Pyro model, or None.

    Returns:
        The posterior.

    Raises:
        ValueError: If the description and the tensors aren't those of a posterior over
            the networks' weights, or the prior isn't normal, and the network has
            another.
    """
    (kind,) = (kind for kind in _KINDS if type(description) is kind.description)
    return kind.restore(description, tensors, networks, model)


def _describe_mixture(
    posterior: MixturePosterior, prefix: str
) -> tuple[dict[str, Any], Tensors]:
    parts = [
        describe(component, f"{prefix}components/{index}/")
        for index, component in enumerate(posterior.components)
    ]
    tensors = {f"{prefix}weights": posterior.weights}
    for _, part in parts:
        tensors |= part
    return {"kind": "mixture", "components": [d for d, _ in parts]}, tensors


def _restore_mixture(
    description: MixtureDescription,
    tensors: CheckedTensors,
    networks: tuple[LiftedNetwork, ...],
    model: Model | None,
) -> MixturePosterior:
    pi = tensors.not_negative("weights", (len(description.components),), DOUBLE)
    if not abs(float(pi.sum()) - 1) <= _ROUNDING:
        raise ValueError(
            f"tensor {tensors.prefix}weights sums to {float(pi.sum()):.6g}; the "
            "weights of a mixture sum to 1"
        )
    components = [
        restore(part, tensors.under(f"components/{index}/"), networks, model)
        for index, part in enumerate(description.components)
    ]
    return MixturePosterior(components, pi)


def _describe_particles(
    posterior: ParticlePosterior, prefix: str
) -> tuple[dict[str, Any], Tensors]:
    description: dict[str, Any] = {
        "kind": "particles",
        "sites": list(posterior.particles),
        "obs_site": posterior.obs_site,
    }
    return description, _named(f"{prefix}particles/", posterior.particles)


def _restore_particles(
    description: ParticleDescription,
    tensors: CheckedTensors,
    networks: tuple[LiftedNetwork, ...],
    model: Model | None,
) -> ParticlePosterior:
    lifted = _lifted(networks)
    _check_sites(description.sites, lifted)
    saved = _particles(tensors.under("particles/"), description.sites, lifted)
    particles = _in_dtypes(saved, _dtypes(saved, networks))
    return ParticlePosterior(particles, networks, model, description.obs_site)


def _describe_laplace(
    posterior: LaplacePosterior, prefix: str
) -> tuple[dict[str, Any], Tensors]:
    kind, tensors = _describe_gaussian(posterior.gaussian, prefix)
    tensors |= _named(f"{prefix}prior_mean/", posterior.prior_mean)
    tensors[f"{prefix}log_likelihood"] = posterior.log_likelihood
    tensors[f"{prefix}log_prior"] = posterior.log_prior
    prior, found = _describe_prior(posterior, f"{prefix}prior_parameters/")
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


def _restore_laplace(
    description: LaplaceDescription,
    tensors: CheckedTensors,
    networks: tuple[LiftedNetwork, ...],
    model: Model | None,
) -> LaplacePosterior:
    lifted, sites = _lifted(networks), description.sites
    _check_sites([*sites, *description.fixed], lifted, noise=False)
    shapes = {site: tuple(x.shape) for site, x in lifted.items()}

    def values(name: str, sites: Sequence[str]) -> Weights:
        inner = tensors.under(f"{name}/")
        return {site: inner.real(site, shapes[site]) for site in sites}

    mode, fixed_there = values("loc", sites), values("fixed", description.fixed)
    tau_there = _precisions(tensors, description, shapes)
    dtypes = _dtypes({**mode, **fixed_there}, networks)
    loc, mean, tau, fixed = (
        _in_dtypes(x, dtypes)
        for x in (mode, values("prior_mean", sites), tau_there, fixed_there)
    )
    prior = _restore_prior(
        description.prior,
        tensors.under("prior_parameters/"),
        partial(_in_dtypes, dtypes=dtypes),
        networks,
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
        networks,
        model,
        description.obs_site,
        _restore_latents(description.latents, tensors.under("latents/"), dtypes),
        fixed=fixed,
    )


@dataclass(frozen=True)
class _Kind:
    """A kind of posterior that files can hold.

    Attributes:
        posterior: Its class.
        description: What the manifest says of it, by its tag.
        describe: (posterior, prefix) to that description and named tensors.
        restore: (description, tensors, networks, model) to the posterior.
    """

    posterior: type
    description: type[Schema]
    describe: Callable[[Any, str], tuple[dict[str, Any], Tensors]]
    restore: Callable[..., Posterior]


_KINDS = (
    _Kind(LaplacePosterior, LaplaceDescription, _describe_laplace, _restore_laplace),
    _Kind(
        ParticlePosterior, ParticleDescription, _describe_particles, _restore_particles
    ),
    _Kind(MixturePosterior, MixtureDescription, _describe_mixture, _restore_mixture),
)


def _lifted(networks: Sequence[LiftedNetwork]) -> Weights:
    """Zeros of the lifted sites; their order in a file is the description's."""
    return {site: x for lora in networks for site, x in lora.zeros().items()}


class _Expecting(AtParameters):
    """Values of ``pyro.param`` statements, once each is seen to be one it may have."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__(values)
        self.seen: set[str] = set()

    def _pyro_param(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self.values:
            raise ValueError(
                f"the prior of the network has a parameter {name!r}, the posterior's "
                f"has {list(self.values)}. Lift the network with the prior of the fit."
            )
        first = msg["args"][0] if msg["args"] else None
        first = first() if callable(first) else first
        value = self.values[name]
        constraint = msg["kwargs"].get("constraint", constraints.real)
        if isinstance(first, Tensor) and first.shape != value.shape:
            raise ValueError(
                f"tensor prior_parameters/{name} has shape {tuple(value.shape)}, "
                f"expected {tuple(first.shape)}"
            )
        if not constraint.check(value).all():
            raise ValueError(
                f"tensor prior_parameters/{name} isn't {constraint}, as it must be"
            )
        self.seen.add(name)
        super()._pyro_param(msg)


def _describe_prior(
    posterior: LaplacePosterior, prefix: str
) -> tuple[dict[str, Any], Tensors]:
    """What :func:`_restore_prior` needs.

    A prior that is N(prior mean, 1 / prior precision) is in the posterior's numbers.
    Any other is a function of the user's, which no file can hold: of it the values of
    its ``pyro.param`` statements are kept, and its log density at the mode, by which
    it's recognised, and the scales of it that ``poutine.scale`` sets.

    Args:
        posterior: The posterior.
        prefix: Put before the tensors' names.

    Returns:
        A description that JSON can hold, and named tensors.

    Raises:
        ValueError: If a site has several scales.
    """
    mode, tau = posterior.gaussian.loc, posterior.prior_precision
    nodes = _prior_nodes(posterior.prior, posterior.networks, mode)
    parameters = {n["name"]: n["value"] for n in nodes if n["type"] == "param"}
    if not parameters and all(
        _is_normal(n["fn"], posterior.prior_mean[n["name"]], tau[n["name"]])
        for n in nodes
        if n["name"] in mode
    ):
        return {"kind": "normal"}, {}
    description = {
        "kind": "network",
        "log_density": _log_density(nodes, mode),
        "parameters": list(parameters),
    }
    scales = {n["name"]: _scale(n) for n in nodes if n["name"] in mode}
    if set(scales.values()) != {1.0}:
        description["scales"] = scales
    return description, {f"{prefix}{name}": x for name, x in parameters.items()}


def _restore_prior(
    description: PriorDescription,
    tensors: CheckedTensors,
    in_dtypes: Callable[[Tensors], Tensors],
    networks: Sequence[LiftedNetwork],
    mode: Weights,
    mean: Weights,
    precision: Weights,
    fixed: Weights,
) -> Prior:
    """The prior that :func:`_describe_prior` described.

    Args:
        description: As returned by ``_describe_prior``.
        tensors: By name, of its ``pyro.param`` statements.
        in_dtypes: Brings tensors to the network's dtype.
        networks: The lifted networks.
        mode: Site -> the mode, in the dtype that it was saved in.
        mean: Site -> mean of the normal prior.
        precision: Site -> precision of the normal prior.
        fixed: Site -> value, of the sites that have a Delta there.

    Returns:
        The prior.

    Raises:
        ValueError: If a parameter is missing or something else, or the saved prior
            isn't normal, and the network's isn't the same.
    """
    if isinstance(description, NormalPrior):
        return normal_prior(mean, precision, fixed)
    parameters = in_dtypes({n: tensors.real(n) for n in description.parameters})
    present = networks_prior(networks)
    prior = PriorAtParameters(present, parameters)

    expecting = _Expecting(parameters)
    with expecting:
        found = _log_density(_prior_nodes(present, networks, mode), mode)
    if expecting.seen != parameters.keys():
        raise ValueError(
            f"the posterior's prior has the parameters {list(parameters)}, the "
            f"network's {sorted(expecting.seen)}. Lift the network with the prior of "
            "the fit."
        )
    expected = description.log_density
    if not abs(found - expected) <= _SAME * max(1.0, abs(expected)):
        raise ValueError(
            f"the posterior's prior isn't N(mean, 1 / precision), and its log density "
            f"at the mode is {expected:.6g}; that of the prior which the network was "
            f"lifted with is {found:.6g}. Lift the network with the prior of the fit."
        )
    wrong = sorted(description.scales.keys() - mode.keys())
    wrong += [s for s, scale in description.scales.items() if not scale > 0]
    if wrong:
        raise ValueError(
            f"prior/scales has {wrong[0]!r}: expected sites of the posterior, each "
            "with a positive scale"
        )
    return fixing(scaled(prior, description.scales), fixed)


@torch.no_grad()
def _prior_nodes(
    prior: Prior, networks: Sequence[LiftedNetwork], mode: Weights
) -> list[dict[str, Any]]:
    """Trace nodes of the prior at the mode; the generators stay where they are."""
    with torch.random.fork_rng():
        traces = [trace_at(partial(prior, lora), mode, {}) for lora in networks]
    return [node for trace in traces for node in trace.nodes.values()]


@torch.no_grad()
def _log_density(nodes: Sequence[Mapping[str, Any]], mode: Weights) -> float:
    return sum(
        float(node["fn"].log_prob(mode[node["name"]]).double().sum())
        for node in nodes
        if node["name"] in mode
    )


def _scale(node: Mapping[str, Any]) -> float:
    scale = counted_scale(node)
    if isinstance(scale, Tensor) and scale.numel() != 1:
        raise ValueError(
            f"Site {node['name']!r}: its prior is scaled by a tensor of shape "
            f"{tuple(scale.shape)}, which no file can hold. Scale it by one number."
        )
    return float(scale)


def _is_normal(fn: Any, mean: Tensor, precision: Tensor) -> bool:
    while isinstance(fn, td.Independent):
        fn = fn.base_dist
    return isinstance(fn, td.Normal) and all(
        torch.allclose(found, expected.to(found).expand_as(found))
        for found, expected in (
            (fn.loc.expand(mean.shape), mean),
            (fn.scale.expand(mean.shape), precision.rsqrt()),
        )
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
        or () in num_particles
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
    one = one_weight_set(posterior)
    return {site: tuple(value.shape) for site, value in one.items()}


def _describe_gaussian(gaussian: WeightGaussian, prefix: str) -> tuple[str, Tensors]:
    tensors = _named(f"{prefix}loc/", gaussian.loc)
    tensors |= _named(f"{prefix}prior_precision/", gaussian.prior_precision)
    if isinstance(gaussian, DenseGaussian):
        return "dense", tensors | {f"{prefix}fisher": gaussian.fisher}
    if not isinstance(gaussian, BlockGaussian):
        raise TypeError(
            "Files hold the Gaussians of pyro_lora's structures, found a "
            f"{type(gaussian).__name__}. Keep draws of the posterior instead, by "
            "export_adapters."
        )
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


def _dtypes(saved: Weights, networks: Sequence[LiftedNetwork]) -> Dtypes:
    """Lifted site -> the network's dtype, and saved dtype -> what it became there."""
    lifted = {s: x.dtype for lora in networks for s, x in lora.zeros().items()}
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
