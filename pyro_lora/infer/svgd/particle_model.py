"""The log joint of many particles in one run of the user's model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions.transforms import Transform

from pyro_lora.ground.interrupts import unvalidated
from pyro_lora.infer.svgd.particle_checks import PARTICLE_PLATE, check_finite
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood.batch import explaining
from pyro_lora.likelihood.data_plate import data_plate
from pyro_lora.likelihood.model_trace import (
    Model,
    observed_names,
    observed_sites,
    trace_at,
    unobserved_names,
)

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
        observes: Whether it observed anything in the run that found the others.
    """

    model: Model
    latents: Mapping[str, LatentSite]
    max_plate_nesting: int
    networks: tuple[LiftedNetwork, ...]
    observes: bool

    @property
    def factor_sites(self) -> frozenset[str]:
        """The latent sites that are factors B and A of updates.

        None where a prior isn't centred: the latents are then the factors' noise.
        """
        sites = {site for lora in self.networks for site in lora.sites}
        if not sites <= self.latents.keys():
            return frozenset()
        return frozenset[str]().union(*(lora.factor_sites for lora in self.networks))

    def check_observed(self, trace: Any, obs_site: str | None) -> None:
        """Check that a batch has the outcomes that it should have.

        A site whose labels are missing would be drawn anew in each run, as if the batch
        said nothing of it.

        Args:
            trace: Of the model on the batch.
            obs_site: A site that must be observed, or None.

        Raises:
            ValueError: If it isn't, or another one that isn't latent is sampled, or
                nothing is observed where the first batch had outcomes.
        """
        if obs_site is not None or (self.observes and not observed_names(trace)):
            observed_sites(trace, obs_site)
        for name in sorted(unobserved_names(trace) - self.latents.keys()):
            raise ValueError(
                f"Site {name!r} is neither observed in this batch nor one of the "
                f"latent sites of the first, {sorted(self.latents)}. Put labels into "
                "all batches; a site without any must not be sampled."
            )

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

        Raises:
            ValueError: If a site has batch dims that no plate declares.
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
        vectorized.__wrapped__ = partial(self.model, *args)  # type: ignore[attr-defined]
        trace = trace_at(vectorized, {**values, **minibatch}, kwargs)
        with explaining(kwargs, nodes=trace.nodes):
            trace.compute_log_prob(lambda name, site: not site_is_subsample(site))
        for name, site in trace.nodes.items():
            if site["type"] != "sample":
                continue
            if site_is_subsample(site):
                if name != PARTICLE_PLATE:
                    minibatch[name] = site["value"]
                continue
            if site["log_prob"].shape[:plate_dim].numel() > 1:
                raise ValueError(
                    f"Site {name!r}: with {num_particles} particles at dim {plate_dim} "
                    f"its log density has shape {tuple(site['log_prob'].shape)}, a dim "
                    "too many: one particle's values meet another's. Let the model "
                    "keep every dim on the left of its own, as under pyro.plate."
                )
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
            with torch.no_grad(), unvalidated():
                _, log_density = self.trace(particles, args, kwargs, dict(minibatch))
            check_finite(log_density, "log density", first)
            raise
        check_finite(log_density, "log density", first)
        return trace, torch.stack(list(log_density.values())).sum(0)


def batch_size(trace: Any) -> int:
    """Data in a trace of K particles, by the first observed site's plate of data.

    It is 1 where that site is in no plate.
    """
    for site in trace.nodes.values():
        if site["type"] == "sample" and site["is_observed"]:
            frames = [f for f in site["cond_indep_stack"] if f.name != PARTICLE_PLATE]
            if any(f.vectorized for f in frames):
                return data_plate({**site, "cond_indep_stack": tuple(frames)}).size
    return 1


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
