"""The log joint of many particles in one run of the user's model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import Transform

from pyro_lora.infer.particle_checks import check_finite
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.lifting.model_trace import Model, lifted_networks, trace_at

# The plate of the particles, left of the model's own; Pyro's ELBOs use the same name.
PARTICLE_PLATE = "num_particles_vectorized"

InitFn = Callable[[dict[str, Any]], Tensor]


@dataclass(frozen=True)
class LatentSite:
    """A latent site of the model.

    Attributes:
        transform: From unconstrained space to the site's support.
        batch_shape: Of the site in a plain run of the model.
        shape: Of the site's value in unconstrained space, in a plain run.
    """

    transform: Transform
    batch_shape: torch.Size
    shape: torch.Size


@dataclass(frozen=True)
class ParticleModel:
    """The model's latent sites, and how to run it for K particles at once.

    Attributes:
        model: A Pyro model.
        latents: Site -> its support and batch shape.
        max_plate_nesting: Batch dims that the model's own sites take.
        networks: The lifted networks in the model.
    """

    model: Model
    latents: Mapping[str, LatentSite]
    max_plate_nesting: int
    networks: tuple[LiftedNetwork, ...]

    @property
    def factor_sites(self) -> frozenset[str]:
        """The latent sites that are factors B and A of updates.

        None where a prior isn't centred: the latents are then the factors' noise.
        """
        sites = {site for lora in self.networks for site in lora.sites}
        if not sites <= self.latents.keys():
            return frozenset()
        return frozenset[str]().union(*(lora.factor_sites for lora in self.networks))

    def constrained(self, particles: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Particles on the sites' supports, (K, ...)."""
        return {s: self.latents[s].transform(x) for s, x in particles.items()}

    def trace(
        self,
        particles: Mapping[str, Tensor],
        args: Any,
        kwargs: Any,
        minibatch: dict[str, Tensor],
    ) -> tuple[Any, dict[str, Tensor]]:
        """Run the model at K particles.

        Args:
            particles: Site -> (K, ...), unconstrained.
            args: The model's positional arguments.
            kwargs: The model's keyword arguments.
            minibatch: Plate -> its indices. Those that are here are used, the others
                are drawn and put here, so that chunks of particles see the same data.

        Returns:
            The trace, and site -> log density (K,) in nats, of the full data and with
            the transform's log Jacobian. They add up to the log joint.
        """
        num_particles = next(iter(particles.values())).shape[0]
        plate_dim = -self.max_plate_nesting - 1

        def vectorized(**batch: Any) -> Any:
            with pyro.plate(PARTICLE_PLATE, num_particles, dim=plate_dim):
                return self.model(*args, **batch)

        values, log_density = {}, {}
        for site, x in particles.items():
            latent = self.latents[site]
            value = latent.transform(x)
            jacobian = latent.transform.log_abs_det_jacobian(x, value)
            log_density[site] = jacobian.reshape(num_particles, -1).sum(1)
            missing = self.max_plate_nesting - len(latent.batch_shape)
            values[site] = value.reshape(
                num_particles, *[1] * missing, *value.shape[1:]
            )
        trace = trace_at(vectorized, {**values, **minibatch}, kwargs)
        trace.compute_log_prob(lambda name, site: not site_is_subsample(site))
        for name, site in trace.nodes.items():
            if site["type"] != "sample":
                continue
            if site_is_subsample(site):
                if name != PARTICLE_PLATE:
                    minibatch[name] = site["value"]
                continue
            log_prob = site["log_prob"].reshape(num_particles, -1)
            wide = torch.promote_types(log_prob.dtype, torch.float32)
            log_density[name] = log_density.get(name, 0) + log_prob.sum(1, dtype=wide)
        return trace, log_density

    def finite_trace(
        self,
        particles: Mapping[str, Tensor],
        args: Any,
        kwargs: Any,
        minibatch: dict[str, Tensor],
        first: int,
    ) -> tuple[Any, Tensor]:
        """Run the model at K particles, and refuse a log density that isn't finite.

        Args:
            particles: Site -> (K, ...), unconstrained.
            args: The model's positional arguments.
            kwargs: The model's keyword arguments.
            minibatch: As for :meth:`trace`.
            first: Number of the first particle.

        Returns:
            The trace and the log joint (K,), nats, full data.

        Raises:
            ValueError: If a log density is NaN or infinite, naming its particles.
        """
        try:
            trace, log_density = self.trace(particles, args, kwargs, minibatch)
        except ValueError:
            # Pyro's validation of arguments and values says nothing of particles.
            with torch.no_grad(), pyro.validation_enabled(False):
                _, log_density = self.trace(particles, args, kwargs, dict(minibatch))
            check_finite(log_density, "log density", first)
            raise
        check_finite(log_density, "log density", first)
        return trace, torch.stack(list(log_density.values())).sum(0)


def batch_size(trace: Any) -> int:
    """Data in a trace of K particles: the entries of the observed sites' plates.

    It is 1 where an observed site is in no plate.
    """
    sizes = {
        frame.name: frame.size
        for site in trace.nodes.values()
        if site["type"] == "sample" and site["is_observed"]
        for frame in site["cond_indep_stack"]
        if frame.vectorized and frame.name != PARTICLE_PLATE
    }
    return math.prod(sizes.values())


def chunks(num_particles: int, chunk_size: int) -> list[slice]:
    """Rows of the particles that go through the model together."""
    return [
        slice(start, min(start + chunk_size, num_particles))
        for start in range(0, num_particles, chunk_size)
    ]


def check_shapes(
    particles: Mapping[str, Tensor], num_particles: int, target: ParticleModel | None
) -> None:
    """Refuse particles of another K or another model.

    Args:
        particles: Site -> (K, ...), unconstrained.
        num_particles: K.
        target: The model, None where it isn't known yet.

    Raises:
        ValueError: Naming the site that differs.
    """
    for site, x in particles.items():
        if x.shape[:1] != (num_particles,):
            raise ValueError(
                f"Site {site!r}: the state holds particles {tuple(x.shape)}, this SVGD "
                f"has num_particles={num_particles}. Make one with as many."
            )
    if target is None:
        return
    found = {site: tuple(x.shape[1:]) for site, x in particles.items()}
    expected = {site: tuple(latent.shape) for site, latent in target.latents.items()}
    for site in sorted(found.keys() | expected.keys()):
        if found.get(site) != expected.get(site):
            raise ValueError(
                f"Site {site!r}: the state holds particles of shape {found.get(site)}, "
                f"the model's are {expected.get(site)}. Load the state of the same "
                "model."
            )


def chunked_gradients(
    target: ParticleModel,
    particles: Mapping[str, Tensor],
    chunk_size: int,
    objective: Callable[[slice, Any, Tensor], Tensor],
    args: Any,
    kwargs: Any,
    minibatch: dict[str, Tensor],
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of an objective that is a sum over particles, a chunk at a time.

    Args:
        target: The model.
        particles: Site -> (K, ...), unconstrained.
        chunk_size: Particles in one forward and backward pass.
        objective: Of a chunk's rows, trace and log joint: a scalar.
        args: The model's positional arguments.
        kwargs: The model's keyword arguments.
        minibatch: As for :meth:`ParticleModel.trace`.

    Returns:
        Site -> gradient (K, ...), and the log joint (K,), nats, full data.

    Raises:
        ValueError: If a log density or a gradient is NaN or infinite.
    """
    gradients: dict[str, list[Tensor]] = {site: [] for site in particles}
    log_joints = []
    num_particles = next(iter(particles.values())).shape[0]
    for rows in chunks(num_particles, chunk_size):
        leaves = {s: x.detach()[rows].requires_grad_() for s, x in particles.items()}
        trace, log_joint = target.finite_trace(
            leaves, args, kwargs, minibatch, rows.start
        )
        found = torch.autograd.grad(
            objective(rows, trace, log_joint),
            list(leaves.values()),
            materialize_grads=True,  # a site may have a flat density and no effect
        )
        by_site = dict(zip(leaves, found, strict=True))
        check_finite(by_site, "gradient", rows.start)
        for site, gradient in by_site.items():
            gradients[site].append(gradient)
        log_joints.append(log_joint.detach())
    return {s: torch.cat(g) for s, g in gradients.items()}, torch.cat(log_joints)


def particle_model(
    model: Model,
    init_loc_fn: InitFn,
    max_plate_nesting: int | None,
    args: Any,
    kwargs: Any,
) -> ParticleModel:
    """Inspect the model by one run, where the first particle starts.

    Args:
        model: A Pyro model.
        init_loc_fn: As in Pyro's autoguides.
        max_plate_nesting: Batch dims that the model's sites take; None finds out.
        args: The model's positional arguments.
        kwargs: The model's keyword arguments.

    Returns:
        The model with its latent sites.

    Raises:
        ValueError: If there are no latent sites, one is discrete, belongs to the data
            of a minibatch or has a support without a transform, ``init_loc_fn`` gives
            a value of another shape, or ``max_plate_nesting`` is too small.
    """
    trace = _starting_trace(model, init_loc_fn, 0, args, kwargs)
    latents = {}
    needed: dict[str, int] = {}
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site_is_subsample(site):
            continue
        frames = [f for f in site["cond_indep_stack"] if f.vectorized]
        fn = site["fn"]
        needed[name] = len(fn.batch_shape)
        if site["is_observed"]:
            continue
        if fn.support.is_discrete:
            raise ValueError(
                f"Latent site {name!r} is discrete, so particles can't move along its "
                "gradient. Marginalise it, or give labels to the likelihood."
            )
        if any((f.full_size or f.size) != f.size for f in frames):
            raise ValueError(
                f"Latent site {name!r} belongs to the data of a minibatch, so its "
                "particles would mean other data at the next step. Move it out of the "
                "subsampled plate, or give labels to the likelihood."
            )
        try:
            transform = biject_to(fn.support)
        except NotImplementedError as error:
            raise ValueError(
                f"Latent site {name!r}: there is no transform from unconstrained space "
                f"to its support, {fn.support}. Sample it in other coordinates."
            ) from error
        latents[name] = LatentSite(
            transform, fn.batch_shape, transform.inv(site["value"]).shape
        )
    if not latents:
        raise ValueError(
            "The model has no latent sites. Call lora() inside it, with "
            "lora = pyro_lora.lift(peft_model)."
        )
    widest = max(needed, key=needed.__getitem__)
    if max_plate_nesting is not None and max_plate_nesting < needed[widest]:
        raise ValueError(
            f"Site {widest!r} takes {needed[widest]} batch dims, more than "
            f"max_plate_nesting={max_plate_nesting}: particles would mix with them. "
            "Leave max_plate_nesting=None, or declare event dims by .to_event()."
        )
    return ParticleModel(
        model,
        latents,
        needed[widest] if max_plate_nesting is None else max_plate_nesting,
        lifted_networks(trace),
    )


@torch.no_grad()
def initial_particles(
    target: ParticleModel,
    init_loc_fn: InitFn,
    num_particles: int,
    args: Any,
    kwargs: Any,
) -> dict[str, Tensor]:
    """K starting points; ``init_loc_fn`` finds k in ``site["infer"]["particle"]``.

    Args:
        target: The model.
        init_loc_fn: As in Pyro's autoguides.
        num_particles: K.
        args: The model's positional arguments.
        kwargs: The model's keyword arguments.

    Returns:
        Site -> (K, ...), unconstrained, leaf tensors that require gradients.

    Raises:
        ValueError: If a starting point has another shape than its site, or is NaN or
            infinite.
    """
    rows = []
    for k in range(num_particles):
        trace = _starting_trace(target.model, init_loc_fn, k, args, kwargs)
        row = {
            site: latent.transform.inv(trace.nodes[site]["value"])
            for site, latent in target.latents.items()
        }
        for site, latent in target.latents.items():
            if row[site].shape != latent.shape:
                raise ValueError(
                    f"Site {site!r}: particle {k} starts with shape "
                    f"{tuple(row[site].shape)}, another with {tuple(latent.shape)}. "
                    "The model's sites must have the same shapes in each run."
                )
        rows.append(row)
    particles = {site: torch.stack([r[site] for r in rows]) for site in target.latents}
    for site, value in particles.items():
        if not torch.isfinite(value).all():
            raise ValueError(
                f"Site {site!r}: a particle starts at NaN or infinity. Check "
                "init_loc_fn and the adapter's weights."
            )
    return {s: x.detach().clone().requires_grad_() for s, x in particles.items()}


@torch.no_grad()
def _starting_trace(
    model: Model, init_loc_fn: InitFn, particle: int, args: Any, kwargs: Any
) -> Any:
    number: Any = {"particle": particle}

    def init(site: dict[str, Any]) -> Tensor:
        value, shape = init_loc_fn(site), site["fn"].shape()
        if value.shape != shape:  # it would be broadcast, or fail far from here
            raise ValueError(
                f"Site {site['name']!r}: init_loc_fn starts particle {particle} with "
                f"a value of shape {tuple(value.shape)}, the site's is {tuple(shape)}."
            )
        return value

    with InitMessenger(init), poutine.infer_config(config_fn=lambda _: number):
        return poutine.trace(model).get_trace(*args, **kwargs)
