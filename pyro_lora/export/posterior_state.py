"""A posterior as a JSON-like description and named tensors, and back.

Each kind has a row of one table, ``_KINDS``: its class, the schema of its description,
and the two ways between them. Names are paths, of what is inside of what. Of a mixture
of one Laplace posterior over one site, for example:

    description   {"kind": "mixture", "components": [{"kind": "laplace",
                   "gaussian": "blocks", "sites": ["lora.A"], ...}]}
    tensors       weights (1,), components/0/loc/lora.A (L, R, I),
                  components/0/values/lora.A (L, j, k), ...

A latent site outside of the network has a bijection from unconstrained space onto its
support: ``biject_to``'s, described by the names of its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
import torch
from pyro.distributions import transforms as pyro_transforms
from torch import Tensor
from torch import distributions as td
from torch.distributions import constraints, transforms
from torch.distributions.transforms import Transform

from pyro_lora.curvature.block_gaussian import BlockGaussian
from pyro_lora.curvature.dense_gaussian import DenseGaussian
from pyro_lora.curvature.dual_gaussian import DualGaussian
from pyro_lora.curvature.latent_block import MAX_LATENTS, LatentBlock
from pyro_lora.curvature.prior_moments import counted_scale
from pyro_lora.curvature.saved_observations import (
    ObservationsDescription,
    describe_observations,
    restore_observations,
)
from pyro_lora.curvature.weight_gaussian import WeightGaussian
from pyro_lora.ground.checked_tensors import (
    DOUBLE,
    CheckedTensors,
    check_broadcasts,
    check_definite,
)
from pyro_lora.ground.tensor_folder import Real, Schema
from pyro_lora.ground.weights import Weights, drawing_nothing
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.lifting.prior import NOISE
from pyro_lora.likelihood.model_trace import Model, trace_at
from pyro_lora.posteriors.gaussian_posterior import GaussianPosterior
from pyro_lora.posteriors.laplace_posterior import LaplacePosterior
from pyro_lora.posteriors.mixture_posterior import MixturePosterior
from pyro_lora.posteriors.particle_posterior import ParticlePosterior
from pyro_lora.posteriors.posterior import Posterior, kind_of, one_weight_set
from pyro_lora.posteriors.prior import (
    AtParameters,
    PriorAtParameters,
    fixing,
    made_of_latents,
    networks_prior,
    normal_prior,
    scaled,
)
from pyro_lora.posteriors.scaled_posterior import ScaledPosterior
from pyro_lora.priors import Prior

Tensors = dict[str, Tensor]
Dtypes = tuple[dict[str, torch.dtype], dict[torch.dtype, torch.dtype]]

_GAUSSIANS: dict[str, type[WeightGaussian]] = {
    x.kind: x for x in (BlockGaussian, DenseGaussian, DualGaussian)
}
_OF_LATENTS = ("precision", "log_prior", "gradient")
_ROUNDING = 1e-6  # of a sum of float64 weights, far above it
_SAME = 1e-5  # relative difference of two log densities, summed in another order


Dims = Annotated[int, msgspec.Meta(ge=0, le=8)]

# Those of ``biject_to`` that have no settings.
_PLAIN = {
    kind.__name__: kind
    for kind in (
        transforms.ExpTransform,
        transforms.SigmoidTransform,
        transforms.SoftplusTransform,
        transforms.StickBreakingTransform,
        transforms.CorrCholeskyTransform,
        pyro_transforms.OrderedTransform,
    )
}


class _Exp(Schema, tag_field="kind", tag="ExpTransform"): ...


class _Sigmoid(Schema, tag_field="kind", tag="SigmoidTransform"): ...


class _Softplus(Schema, tag_field="kind", tag="SoftplusTransform"): ...


class _StickBreaking(Schema, tag_field="kind", tag="StickBreakingTransform"): ...


class _CorrCholesky(Schema, tag_field="kind", tag="CorrCholeskyTransform"): ...


class _Ordered(Schema, tag_field="kind", tag="OrderedTransform"): ...


class _Affine(Schema, tag_field="kind", tag="AffineTransform"):
    event_dim: Dims
    loc: Real | None = None  # None: a tensor
    scale: Real | None = None


class _Independent(Schema, tag_field="kind", tag="IndependentTransform"):
    base: TransformDescription
    dims: Dims


class _Compose(Schema, tag_field="kind", tag="ComposeTransform"):
    parts: Annotated[tuple[TransformDescription, ...], msgspec.Meta(max_length=8)]


_WithoutSettings = (
    _Exp | _Sigmoid | _Softplus | _StickBreaking | _CorrCholesky | _Ordered
)
TransformDescription = _WithoutSettings | _Affine | _Independent | _Compose


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

    gaussian: Literal["dense", "blocks", "rows"]
    sites: tuple[str, ...]
    obs_site: str | None
    prior: PriorDescription
    latents: LatentDescription | None
    fixed: tuple[str, ...] = ()
    observations: tuple[ObservationsDescription, ...] = ()
    follows_prior: bool = False
    fit_arguments: tuple[str, ...] | None = None
    num_data: Annotated[int, msgspec.Meta(ge=1)] | None = None
    obs_sites: tuple[str, ...] = ()


class ParticleDescription(Schema, tag_field="kind", tag="particles"):
    """Of a :class:`ParticlePosterior`: its sites in order."""

    sites: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    obs_site: str | None
    fit_arguments: tuple[str, ...] | None = None


class ScaledDescription(Schema, tag_field="kind", tag="scaled"):
    """Of a :class:`ScaledPosterior`: the Gaussian that it scales."""

    base: LaplaceDescription
    scale: Annotated[float, msgspec.Meta(gt=0, le=1)]


class GaussianDescription(Schema, tag_field="kind", tag="gaussian"):
    """Of a :class:`GaussianPosterior`: its sites in order, and which have what."""

    sites: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    obs_site: str | None
    scale: tuple[str, ...]
    rows: tuple[str, ...]
    deviations: tuple[str, ...]


class MixtureDescription(Schema, tag_field="kind", tag="mixture"):
    """Of a :class:`MixturePosterior`."""

    components: Annotated[
        tuple[
            LaplaceDescription
            | ParticleDescription
            | ScaledDescription
            | GaussianDescription,
            ...,
        ],
        msgspec.Meta(min_length=1),
    ]


Description = (
    LaplaceDescription
    | ParticleDescription
    | ScaledDescription
    | GaussianDescription
    | MixtureDescription
)


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
        "LaplacePosterior, ParticlePosterior, ScaledPosterior, GaussianPosterior or "
        "MixturePosterior. A Pyro guide that is normal in each site becomes one by "
        "pyro_lora.methods.mean_field(guide); the parameters of any are saved by "
        "pyro.get_param_store().save(file)."
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
    descriptions, tensors = [], {f"{prefix}weights": posterior.weights}
    for index, component in enumerate(posterior.components):
        description, own = describe(component, f"{prefix}components/{index}/")
        descriptions.append(description)
        tensors |= own
    return {"kind": "mixture", "components": descriptions}, tensors


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
        restore(component, tensors.under(f"components/{index}/"), networks, model)
        for index, component in enumerate(description.components)
    ]
    return MixturePosterior(components, pi)


def _describe_scaled(
    posterior: ScaledPosterior, prefix: str
) -> tuple[dict[str, Any], Tensors]:
    gaussian: Any = posterior.base
    base, tensors = describe(gaussian, f"{prefix}base/")
    tensors |= _named(f"{prefix}center/", posterior.center)
    return {"kind": "scaled", "base": base, "scale": posterior.scale}, tensors


def _restore_scaled(
    description: ScaledDescription,
    tensors: CheckedTensors,
    networks: tuple[LiftedNetwork, ...],
    model: Model | None,
) -> ScaledPosterior:
    base = _restore_laplace(description.base, tensors.under("base/"), networks, model)
    inner = tensors.under("center/")
    center = {s: inner.real(s, x.shape).to(x) for s, x in base.gaussian.loc.items()}
    return replace(base.scaled(), center=center, scale=description.scale)


def _describe_normal(
    posterior: GaussianPosterior, prefix: str
) -> tuple[dict[str, Any], Tensors]:
    description: dict[str, Any] = {
        "kind": "gaussian",
        "sites": list(posterior.loc),
        "obs_site": posterior.obs_site,
    }
    tensors = _named(f"{prefix}loc/", posterior.loc)
    for name in ("scale", "rows", "deviations"):
        values = getattr(posterior, name)
        description[name] = list(values)
        tensors |= _named(f"{prefix}{name}/", values)
    return description, tensors


def _restore_normal(
    description: GaussianDescription,
    tensors: CheckedTensors,
    networks: tuple[LiftedNetwork, ...],
    model: Model | None,
) -> GaussianPosterior:
    lifted = _lifted(networks, description.sites)
    _check_sites(description.sites, lifted)
    inner = tensors.under("loc/")
    loc = {
        s: inner.real(s, lifted[s].shape if s in lifted else None)
        for s in description.sites
    }
    scaled_sites, by_row = {*description.scale}, {*description.rows}
    deviating = {*description.deviations}
    if (
        not scaled_sites | by_row <= loc.keys()
        or scaled_sites & by_row
        or not deviating <= scaled_sites
    ):
        raise ValueError(
            f"the sites with a scale are {sorted(scaled_sites)}, with rows "
            f"{sorted(by_row)}, with deviations {sorted(deviating)}; expected sites of "
            f"{sorted(loc)}, rows where there is no scale, deviations where there is"
        )
    inner = tensors.under("scale/")
    scale = {s: inner.positive(s, loc[s].shape) for s in description.scale}
    rows = {s: _rows_of(s, loc[s], tensors.under("rows/")) for s in description.rows}
    inner = tensors.under("deviations/")
    deviations = {s: inner.real(s) for s in description.deviations}
    ranks = {x.shape[:1] for x in deviations.values()}
    fits = all(x.shape[1:] == loc[s].shape for s, x in deviations.items())
    if len(ranks) > 1 or not fits or not all(x.numel() for x in deviations.values()):
        raise ValueError(
            f"tensors {inner.prefix}... have {sorted(map(tuple, ranks))} deviations; "
            "expected one number, positive, for all sites, each of the site's shape"
        )
    dtypes = _dtypes(loc, networks)
    return GaussianPosterior(
        _in_dtypes(loc, dtypes),
        _in_dtypes(scale, dtypes),
        networks,
        model,
        description.obs_site,
        rows=_in_dtypes(rows, dtypes),
        deviations=_in_dtypes(deviations, dtypes),
    )


def _rows_of(site: str, loc: Tensor, tensors: CheckedTensors) -> Tensor:
    """Factors (L, R, R) that can be inverted, of a site (L, R, ...).

    Raises:
        ValueError: If they can't, or the site has no rows.
    """
    if loc.ndim < 3:
        raise ValueError(f"site {site!r} has shape {tuple(loc.shape)}, and no rows")
    rows = tensors.real(site, (*loc.shape[:2], loc.shape[1]))
    values = torch.linalg.svdvals(rows.double())
    if not bool((values[..., -1] > torch.finfo(rows.dtype).eps * values[..., 0]).all()):
        raise ValueError(f"tensor {tensors.prefix}{site} has no inverse")
    return rows


def _describe_particles(
    posterior: ParticlePosterior, prefix: str
) -> tuple[dict[str, Any], Tensors]:
    description: dict[str, Any] = {
        "kind": "particles",
        "sites": list(posterior.particles),
        "obs_site": posterior.obs_site,
        "fit_arguments": _in_order(posterior.fit_arguments),
    }
    return description, _named(f"{prefix}particles/", posterior.particles)


def _restore_particles(
    description: ParticleDescription,
    tensors: CheckedTensors,
    networks: tuple[LiftedNetwork, ...],
    model: Model | None,
) -> ParticlePosterior:
    lifted = _lifted(networks, description.sites)
    _check_sites(description.sites, lifted)
    saved = _particles(tensors.under("particles/"), description.sites, lifted)
    particles = _in_dtypes(saved, _dtypes(saved, networks))
    return ParticlePosterior(
        particles,
        networks,
        model,
        description.obs_site,
        _set_of(description.fit_arguments),
    )


def _in_order(names: frozenset[str] | None) -> list[str] | None:
    return None if names is None else sorted(names)


def _set_of(names: Sequence[str] | None) -> frozenset[str] | None:
    return None if names is None else frozenset(names)


def _describe_laplace(
    posterior: LaplacePosterior, prefix: str
) -> tuple[dict[str, Any], Tensors]:
    gaussian = posterior.gaussian
    tensors = _named(prefix, gaussian.tensors)
    tensors |= _named(f"{prefix}loc/", gaussian.loc)
    tensors |= _named(f"{prefix}prior_precision/", gaussian.prior_precision)
    tensors |= _named(f"{prefix}prior_mean/", posterior.prior_mean)
    tensors[f"{prefix}log_likelihood"] = posterior.log_likelihood
    tensors[f"{prefix}log_prior"] = posterior.log_prior
    prior, of_prior = _describe_prior(posterior, f"{prefix}prior_parameters/")
    tensors |= _named(f"{prefix}fixed/", posterior.fixed)
    latents, of_latents = _describe_latents(posterior.latents, f"{prefix}latents/")
    description: dict[str, Any] = {
        "kind": "laplace",
        "gaussian": gaussian.kind,
        "sites": list(gaussian.loc),
        "fixed": list(posterior.fixed),
        "obs_site": posterior.obs_site,
        "prior": prior,
        "latents": latents,
        "fit_arguments": _in_order(posterior.fit_arguments),
        "num_data": posterior.num_data,
        "obs_sites": list(posterior.obs_sites),
    }
    if gaussian.observations:
        description["observations"], of_observations = describe_observations(
            gaussian.observations, f"{prefix}observations/"
        )
        description["follows_prior"] = posterior.follows_prior
        tensors |= of_observations
    return description, tensors | of_prior | of_latents


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
    dtypes = _dtypes({**mode, **fixed_there}, networks)
    loc, mean, fixed = (
        _in_dtypes(x, dtypes) for x in (mode, values("prior_mean", sites), fixed_there)
    )
    observations = restore_observations(
        description.observations, tensors.under("observations/")
    )
    if description.follows_prior and not observations:
        raise ValueError("follows_prior is true, but nothing was observed")
    gaussian = _GAUSSIANS[description.gaussian].restored(
        loc, tensors, observations, partial(_in_dtypes, dtypes=dtypes)
    )
    if isinstance(description.prior, NormalPrior):
        prior = normal_prior(mean, gaussian.prior_precision, fixed)
    else:
        parameters = tensors.under("prior_parameters/")
        own = {n: parameters.real(n) for n in description.prior.parameters}
        own = _in_dtypes(own, dtypes)
        prior = fixing(_prior_of(description.prior, own, networks, mode), fixed)
    return LaplacePosterior(
        gaussian,
        mean,
        tensors.real("log_likelihood", (), DOUBLE),
        tensors.real("log_prior", (), DOUBLE),
        prior,
        networks,
        model,
        description.obs_site,
        _restore_latents(description.latents, tensors.under("latents/"), dtypes),
        fixed=fixed,
        follows_prior=description.follows_prior,
        fit_arguments=_set_of(description.fit_arguments),
        num_data=description.num_data,
        obs_sites=description.obs_sites,
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
    _Kind(ScaledPosterior, ScaledDescription, _describe_scaled, _restore_scaled),
    _Kind(GaussianPosterior, GaussianDescription, _describe_normal, _restore_normal),
    _Kind(MixturePosterior, MixtureDescription, _describe_mixture, _restore_mixture),
)


def _lifted(
    networks: Sequence[LiftedNetwork], saved: Sequence[str] | None = None
) -> Weights:
    """Zeros of the lifted sites; their order in a file is the description's.

    Args:
        networks: The lifted networks.
        saved: Latent sites; those that the networks' prior makes of them are left out.
    """
    lifted = {site: x for lora in networks for site, x in lora.zeros().items()}
    if saved is None or lifted.keys() <= {*saved}:
        return lifted
    named = {*saved} | {site.removesuffix(NOISE) for site in saved}
    made = made_of_latents(networks_prior(networks), networks, saved).keys() - named
    return {site: x for site, x in lifted.items() if site not in made}


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
    """What :func:`_restore_laplace` needs of the prior.

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


def _prior_of(
    description: NetworkPrior,
    parameters: Tensors,
    networks: Sequence[LiftedNetwork],
    mode: Weights,
) -> Prior:
    """The networks' prior, which :func:`_describe_prior` described.

    Args:
        description: As returned by ``_describe_prior``.
        parameters: Of its ``pyro.param`` statements, by name.
        networks: The lifted networks.
        mode: Site -> the mode, in the dtype that it was saved in.

    Returns:
        The prior.

    Raises:
        ValueError: If a parameter is missing or something else, or the networks' prior
            isn't the same.
    """
    present = networks_prior(networks)
    prior = PriorAtParameters(present, parameters)

    expecting = _Expecting(parameters)
    with expecting:
        density = _log_density(_prior_nodes(present, networks, mode), mode)
    if expecting.seen != parameters.keys():
        raise ValueError(
            f"the posterior's prior has the parameters {list(parameters)}, the "
            f"network's {sorted(expecting.seen)}. Lift the network with the prior of "
            "the fit."
        )
    expected = description.log_density
    # No file holds a function: a prior of the same density at the mode is taken for it.
    if not abs(density - expected) <= _SAME * max(1.0, abs(expected)):
        raise ValueError(
            f"the posterior's prior isn't N(mean, 1 / precision), and its log density "
            f"at the mode is {expected:.6g}; that of the prior which the network was "
            f"lifted with is {density:.6g}. Lift the network with the prior of the fit."
        )
    wrong = sorted(description.scales.keys() - mode.keys())
    wrong += [s for s, scale in description.scales.items() if not scale > 0]
    if wrong:
        raise ValueError(
            f"prior/scales has {wrong[0]!r}: expected sites of the posterior, each "
            "with a positive scale"
        )
    return scaled(prior, description.scales)


@torch.no_grad()
def _prior_nodes(
    prior: Prior, networks: Sequence[LiftedNetwork], mode: Weights
) -> list[dict[str, Any]]:
    """Trace nodes of the prior at the mode; the generators stay where they are."""
    with drawing_nothing(mode):
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
    particles = {site: tensors.real(site) for site in sites}
    num_particles = {x.shape[:1] for x in particles.values()}
    if (
        len(num_particles) > 1
        or 0 in min(num_particles, default=(0,))
        or () in num_particles
    ):
        raise ValueError(
            f"tensors {tensors.prefix}... hold {sorted(map(tuple, num_particles))} "
            "particles; expected one number, positive, for all sites"
        )
    for site, x in particles.items():
        like = lifted.get(site.removesuffix(NOISE), lifted.get(site))
        if like is not None and x.shape[1:] != like.shape:
            raise ValueError(
                f"tensor {tensors.prefix}{site} has particles of shape "
                f"{tuple(x.shape[1:])}, expected {tuple(like.shape)}"
            )
    return particles


def sites_of(posterior: Posterior) -> dict[str, tuple[int, ...]]:
    """Site -> its shape."""
    one = one_weight_set(posterior)
    return {site: tuple(value.shape) for site, value in one.items()}


def _describe_latents(
    latents: LatentBlock, prefix: str
) -> tuple[dict[str, Any] | None, Tensors]:
    if not latents.values:
        return None, {}
    bijections, tensors = {}, _named(f"{prefix}values/", latents.values)
    for site, transform in latents.transforms.items():
        try:
            bijections[site], own = _describe_transform(
                transform, f"{prefix}transforms/{site}/"
            )
        except ValueError as error:
            raise ValueError(
                f"Latent site {site!r}: {error}. Fix it by pyro.poutine.condition and "
                "refit."
            ) from error
        tensors |= own
    tensors |= {f"{prefix}{name}": getattr(latents, name) for name in _OF_LATENTS}
    return {"sites": list(latents.values), "transforms": bijections}, tensors


def _restore_latents(
    description: LatentDescription | None, tensors: CheckedTensors, dtypes: Dtypes
) -> LatentBlock:
    if description is None:
        return LatentBlock()
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
    bijections = {
        site: _restore_transform(
            description.transforms[site],
            tensors.under(f"transforms/{site}/"),
            partial(_in_dtypes, dtypes=dtypes),
            x,
        )
        for site, x in values.items()
    }
    # A simplex of n numbers has n - 1 that are free.
    free = sum(
        bijections[site].inverse_shape(x.shape).numel() for site, x in values.items()
    )
    precision = tensors.real("precision", (free, free), DOUBLE)
    check_definite(precision, f"tensor {tensors.prefix}precision", floor=0.0)
    return LatentBlock(
        values,
        bijections,
        precision,
        tensors.real("log_prior", (), DOUBLE),
        tensors.real("gradient", (free,), DOUBLE),
    )


def _dtypes(saved: Weights, networks: Sequence[LiftedNetwork]) -> Dtypes:
    """Lifted site -> the network's dtype, and saved dtype -> what it became there."""
    lifted = {s: x.dtype for lora in networks for s, x in lora.zeros().items()}
    sites = {s if s in saved else f"{s}{NOISE}": x for s, x in lifted.items()}
    changed = {saved[s].dtype: dtype for s, dtype in sites.items() if s in saved}
    return sites, changed


def _in_dtypes(values: Tensors, dtypes: Dtypes) -> Tensors:
    sites, changed = dtypes
    return {
        name: x.to(sites.get(name, changed.get(x.dtype, x.dtype)))
        for name, x in values.items()
    }


def _named(prefix: str, values: Mapping[str, Tensor]) -> Tensors:
    return {f"{prefix}{name}": value for name, value in values.items()}


def _describe_transform(
    transform: Transform, prefix: str
) -> tuple[dict[str, Any], Tensors]:
    """What :func:`_restore_transform` needs.

    Args:
        transform: A bijection as ``biject_to`` makes it.
        prefix: Put before the tensors' names.

    Returns:
        A description that JSON can hold, and named tensors.

    Raises:
        ValueError: If the transform is of another type.
    """
    kind = type(transform).__name__
    if isinstance(transform, transforms.ComposeTransform):
        inner: list[dict[str, Any]] = []
        tensors: Tensors = {}
        for index, part in enumerate(transform.parts):
            description, of_part = _describe_transform(part, f"{prefix}{index}/")
            inner.append(description)
            tensors |= of_part
        return {"kind": kind, "parts": inner}, tensors
    if isinstance(transform, transforms.IndependentTransform):
        base, tensors = _describe_transform(transform.base_transform, prefix)
        dims = transform.reinterpreted_batch_ndims
        return {"kind": kind, "base": base, "dims": dims}, tensors
    if isinstance(transform, transforms.AffineTransform):
        description = {"kind": kind, "event_dim": transform.event_dim}
        tensors = {}
        for name in ("loc", "scale"):
            value = getattr(transform, name)
            if isinstance(value, Tensor):
                tensors[f"{prefix}{name}"] = value
            else:
                description[name] = value
        return description, tensors
    if _PLAIN.get(kind) is not type(transform):
        raise ValueError(f"its support is mapped by {kind}, which save doesn't know")
    return {"kind": kind}, {}


def _restore_transform(
    description: TransformDescription,
    tensors: CheckedTensors,
    in_dtypes: Callable[[Tensors], Tensors],
    value: Tensor,
) -> Transform:
    """The transform that :func:`_describe_transform` described.

    Args:
        description: As returned by ``_describe_transform``.
        tensors: As returned by ``_describe_transform``.
        in_dtypes: Brings tensors to the network's dtype.
        value: On the support, what it maps to.

    Returns:
        The transform.

    Raises:
        ValueError: If a tensor is missing or something else, or no transform maps
            onto ``value``.
    """
    what = f"the transform {tensors.prefix}"
    transform = _transform_of(description, tensors, in_dtypes, value)
    try:
        u = transform.inv(value)
        again = transform(u)
        finite = transform.log_abs_det_jacobian(u, again).isfinite().all()
        shape = transform.inverse_shape(value.shape)
    except (ValueError, RuntimeError, AssertionError, IndexError) as error:
        raise ValueError(
            f"{what} can't map to {tuple(value.shape)}: {error}"
        ) from error
    # A bijection onto the support takes the site's value there and back.
    rounding = 10 * torch.finfo(value.dtype).eps ** 0.5
    form = again.shape, again.dtype
    same = form == (value.shape, value.dtype) and torch.allclose(
        again, value, rtol=rounding, atol=rounding
    )
    if not (same and finite and u.isfinite().all() and u.shape == shape):
        raise ValueError(f"{what} isn't onto a support that has the site's value")
    return transform


def _transform_of(
    description: TransformDescription,
    tensors: CheckedTensors,
    in_dtypes: Callable[[Tensors], Tensors],
    value: Tensor,
) -> Transform:
    if isinstance(description, _Compose):
        return transforms.ComposeTransform(
            [
                _transform_of(part, tensors.under(f"{index}/"), in_dtypes, value)
                for index, part in enumerate(description.parts)
            ]
        )
    if isinstance(description, _Independent):
        base = _transform_of(description.base, tensors, in_dtypes, value)
        return transforms.IndependentTransform(base, description.dims)
    if isinstance(description, _Affine):
        loc, scale = (
            _affine(tensors, name, getattr(description, name), in_dtypes, value)
            for name in ("loc", "scale")
        )
        if (torch.as_tensor(scale) == 0).any():
            raise ValueError(f"the transform {tensors.prefix} has a scale of 0")
        return transforms.AffineTransform(loc, scale, description.event_dim)
    plain: Transform = _PLAIN[str(description.__struct_config__.tag)]()
    return plain


def _affine(
    tensors: CheckedTensors,
    name: str,
    number: float | None,
    in_dtypes: Callable[[Tensors], Tensors],
    value: Tensor,
) -> Tensor | float:
    if number is not None:
        return number
    x = tensors.real(name)
    check_broadcasts(x, value.shape, f"tensor {tensors.prefix}{name}")
    return in_dtypes({tensors.prefix + name: x})[tensors.prefix + name]
