r"""The user's model at many particles: its sites, where they start, its log joint.

Particle k is a value :math:`x_{ks}` of each latent site s in unconstrained space, all
K of them one tensor a site, (K, ...). The site's transform :math:`T_s` takes them to
its support. One run of the model under one more plate, on the left of all others, gives

.. math:: \log p(T(x_k), y) + \sum_s \log |\det T_s'(x_{ks})|, \quad k = 1, ..., K,

(K,) in nats of the full data. A site of shape (2, 3) in the model's plate of 4 has
particles (K, 4, 2, 3); where other sites are in two plates, the model sees them as
(K, 1, 4, 2, 3).

Of several ranks each runs the model for its own rows of the particles, on its own share
of the batch; all K particles are on every rank, and so is all that is made of the runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import Transform

from pyro_lora.ground.accumulation import at_least_float32
from pyro_lora.ground.autocast import outside_autocast
from pyro_lora.ground.interrupts import undone, unvalidated
from pyro_lora.ground.ranks import ALONE, Ranks, is_agreed
from pyro_lora.ground.settings import check_gradients
from pyro_lora.ground.synchronisation import (
    NeedsAllRanksError,
    once_more,
    require,
    validated,
)
from pyro_lora.ground.weights import Weights, check_weights
from pyro_lora.lifting.initialization import check_number_of_starts, check_start
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.lifting.split_layers import who_run
from pyro_lora.likelihood.batch import Batch, explaining
from pyro_lora.likelihood.data_plate import GivenRows, data_plate
from pyro_lora.likelihood.model_trace import (
    Model,
    check_model,
    evaluating_model,
    lifted_networks,
    observed_names,
    observed_site,
    observed_sites,
    trace_drawing_rows,
    trace_on,
    unobserved_names,
    without_gaps,
)
from pyro_lora.likelihood.outcomes import (
    may_not_count,
    outcomes_that_count,
    values_in_range,
)
from pyro_lora.likelihood.stacks import Stacking

InitFn = Callable[[dict[str, Any]], Tensor]

# The plate of the particles, left of the model's own; Pyro's ELBOs use the same name.
PARTICLE_PLATE = "num_particles_vectorized"


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
        data_sites: Those of the data, in that run.
        obs_site: The likelihood's site, which every batch must then observe; None is
            the only one.
    """

    model: Model
    latents: Mapping[str, LatentSite]
    max_plate_nesting: int
    networks: tuple[LiftedNetwork, ...]
    observes: bool
    data_sites: tuple[str, ...]
    obs_site: str | None

    @cached_property
    def factor_sites(self) -> frozenset[str]:
        """The latent sites that are factors B and A of updates.

        None where a prior isn't centred: the latents are then the factors' noise.
        """
        sites = {site for lora in self.networks for site in lora.sites}
        if not sites <= self.latents.keys():
            return frozenset()
        return frozenset[str]().union(*(lora.factor_sites for lora in self.networks))

    def check_observed(self, trace: Any) -> None:
        """Check that a batch has the outcomes that it should have.

        A site whose labels are missing would be drawn anew in each run, as if the batch
        said nothing of it.

        Args:
            trace: Of the model on the batch.

        Raises:
            ValueError: If the likelihood's site isn't observed, another one that isn't
                latent is sampled, or nothing is observed where the first batch had
                outcomes.
        """
        is_named = self.obs_site is not None
        if is_named or (self.observes and not observed_names(trace)):
            observed_sites(trace, self.obs_site)
        for name in sorted(unobserved_names(trace) - self.latents.keys()):
            raise ValueError(
                f"Site {name!r} is neither observed in this batch nor one of the "
                f"latent sites of the first, {sorted(self.latents)}. Put labels into "
                "all batches; a site without any must not be sampled."
            )

    def check_stack(
        self,
        particles: Weights,
        args: tuple[Any, ...],
        kwargs: Batch,
        trace: Any = None,
    ) -> None:
        """Check that the model doesn't mix the data of several particles.

        Args:
            particles: Site -> (K, ...), unconstrained; the first is looked at.
            args: The model's positional arguments.
            kwargs: The model's keyword arguments.
            trace: Of the model there, where it is known.

        Raises:
            ValueError: Naming the site, if it does.
        """
        at = self.constrained({s: x.detach()[0] for s, x in particles.items()})
        plates = {} if trace is None else _rows_of_plates(trace)

        def run(at: Weights) -> Any:
            with evaluating_model():
                trace = trace_drawing_rows(
                    partial(self.model, *args), {**at, **plates}, kwargs
                )
            plates.update(_rows_of_plates(trace))
            return trace

        def run_stack(stack: Weights) -> Any:
            particles = {s: self.latents[s].transform.inv(x) for s, x in stack.items()}
            several = ParticlePass(self, particles, args, kwargs, 1, dict(plates))
            with evaluating_model():
                return several.trace(particles)[0]

        inputs = [*args, *kwargs.values()]
        ranks = who_run(self.networks)
        Stacking(
            self.model, inputs, self.data_sites, run, run_stack, ranks=ranks
        ).check(at, trace)

    def constrained(self, particles: Weights) -> Weights:
        """Particles on the sites' supports, (K, ...)."""
        return {s: self.latents[s].transform(x) for s, x in particles.items()}


def _remedy(site: Any, target: ParticleModel) -> str:
    """Of a site that has a dim too many under the plate of particles."""
    frames = of_one_particle(site)["cond_indep_stack"]
    plates = [frame.name for frame in frames if frame.vectorized]
    if target.networks and len(plates) > 1:
        return (
            f"It is in the plates {plates}, and of the network's outputs only the "
            "data's dim may be a plate's, at dim -1. Declare others, such as tokens, "
            "as one event, by .to_event(1) in place of their plate."
        )
    return "Let the model keep every dim on the left of its own, as under pyro.plate."


def _rows_of_plates(trace: Any) -> dict[str, Tensor]:
    return {
        name: site["value"]
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and site_is_subsample(site)
    }


@dataclass(frozen=True)
class ParticlePass:
    """The model at K particles on one batch, a chunk of particles at a time.

    Attributes:
        target: The model.
        particles: Site -> (K, ...), unconstrained.
        args: The model's positional arguments.
        kwargs: The model's keyword arguments.
        chunk_size: Particles in one forward and backward pass.
        plates: Plate -> its indices, where the model draws them itself: at the first
            run, for all others, so that all chunks see the same data.
        rows_over: The ranks that the particles are shared over.
        data_over: The ranks that each batch is shared over.
        shares: What is known of this rank's share of the batch, from its first run.
    """

    target: ParticleModel
    particles: Weights
    args: tuple[Any, ...]
    kwargs: Batch
    chunk_size: int
    plates: dict[str, Tensor] = field(default_factory=dict)
    rows_over: Ranks = ALONE
    data_over: Ranks = ALONE
    shares: list[float] = field(default_factory=list)

    @property
    def num_particles(self) -> int:
        """K."""
        return next(iter(self.particles.values())).shape[0]

    @property
    def is_one_chunk(self) -> bool:
        """Whether all particles that are run here are in memory together."""
        return self.chunk_size >= len(self.rows_over.owned(self.num_particles))

    def chunks(self) -> Iterator[tuple[slice, Weights]]:
        """Rows of the particles that go through the model here together, and these."""
        own = self.rows_over.owned(self.num_particles)
        for start in own[:: self.chunk_size]:
            rows = slice(start, min(start + self.chunk_size, own.stop))
            yield rows, {s: x.detach()[rows] for s, x in self.particles.items()}

    def mean_over_data(self, values: Tensor, size: Tensor | int) -> Tensor:
        """Means over this rank's data as those over the data of all ranks' shares.

        Args:
            values: Of any shape.
            size: How many data they are the mean over.
        """
        ranks = self.data_over
        if ranks.size == 1:
            return values
        number = int(size)
        return ranks.sum(values * number) / max(1, ranks.total(number))

    def share(self, trace: Any) -> float:
        """This rank's share of the batch that all ranks have together.

        Args:
            trace: Of the model.

        Raises:
            ValueError: If the model's sites have different numbers of data, or its
                plate fewer than the ranks.
        """
        if self.data_over.size > 1 and not self.shares:
            self.shares.append(self._share(trace))
        return self.shares[0] if self.shares else 1.0

    def _share(self, trace: Any) -> float:
        sites = [site for site in trace.nodes.values() if site["type"] == "sample"]
        plates = [data_plate(of_one_particle(x)) for x in sites if is_data(x)]
        if len({plate.size for plate in plates}) != 1:
            names = [x["name"] for x in sites if is_data(x)]
            raise ValueError(
                f"The batch has different numbers of data at the sites {names}, so "
                "it's no share of another. Use a mesh without the dim 'data'."
            )
        size, full_size = plates[0].size, plates[0].full_size
        total = self.data_over.total(size)
        if total > full_size:
            raise ValueError(
                f"The ranks' batches have {total} data together, the model's plate "
                f"{full_size}: it must say how many there are in all, as in "
                "pyro.plate('data', num_data, subsample=input_ids)."
            )
        return size / total

    def over_ranks(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Parts that add up over the data, as sums of all particles' on all ranks.

        Args:
            values: Of this rank's particles, (K', ...) each.

        Returns:
            (K, ...) each, by one sum and one gather.
        """
        if self.rows_over.size == self.data_over.size == 1:
            return list(values)
        like = values[0]
        flat = torch.cat([x.reshape(len(x), -1).to(like.device) for x in values], 1)
        whole = self.rows_over.gathered(self.data_over.sum(flat))
        parts = whole.split([x[0].numel() for x in values], 1)
        return [
            part.reshape(-1, *x.shape[1:]).to(x)
            for part, x in zip(parts, values, strict=True)
        ]

    def whole(self, values: Tensor) -> Tensor:
        """What was found for this rank's particles, (K', ...), for all (K, ...)."""
        return self.rows_over.gathered(values)

    def trace(self, chunk: Weights) -> tuple[Any, dict[str, Tensor]]:
        """Run the model at a chunk of particles.

        Args:
            chunk: Site -> (K', ...), unconstrained.

        Returns:
            The trace, and site -> log density (K',) in nats, of the full data and with
            the transform's log Jacobian. They add up to the log joint.

        Raises:
            ValueError: If a site has batch dims that no plate declares.
        """
        target, kwargs = self.target, self.kwargs
        num_particles = next(iter(chunk.values())).shape[0]
        plate_dim = -target.max_plate_nesting - 1

        def vectorized(**batch: Any) -> Any:
            with pyro.plate(PARTICLE_PLATE, num_particles, dim=plate_dim):
                return without_gaps(target.model)(*self.args, **batch)

        values, log_density = {}, {}
        for site, x in chunk.items():
            latent = target.latents[site]
            value = latent.transform(x)
            jacobian = latent.transform.log_abs_det_jacobian(x, value)
            # p(u) = p(T(u)) |det T'(u)|, by particle
            log_density[site] = jacobian.reshape(num_particles, -1).sum(1)
            # Right of the particles' dim: dims of size 1 for plates that it isn't in.
            missing = target.max_plate_nesting - len(latent.batch_shape)
            values[site] = value.reshape(
                num_particles, *[1] * missing, *value.shape[1:]
            )
        vectorized.__wrapped__ = partial(target.model, *self.args)  # type: ignore[attr-defined]
        trace = trace_drawing_rows(vectorized, {**values, **self.plates}, kwargs)
        for site in trace.nodes.values():
            if site["type"] == "sample" and is_data(site):
                site["value"] = values_in_range(site)
        # Pyro would look for NaN at each site, and so do we, at all of them together.
        with explaining(kwargs, nodes=trace.nodes), _without_looking():
            trace.compute_log_prob(lambda name, site: not site_is_subsample(site))
        for name, site in trace.nodes.items():
            if site["type"] != "sample":
                continue
            if site_is_subsample(site):
                if name != PARTICLE_PLATE:
                    self.plates[name] = site["value"]
                continue
            if site["log_prob"].shape[:plate_dim].numel() > 1:
                raise ValueError(
                    f"Site {name!r}: with {num_particles} particles at dim {plate_dim} "
                    f"its log density has shape {tuple(site['log_prob'].shape)}, a dim "
                    "too many: one particle's values meet another's. "
                    f"{_remedy(site, target)}"
                )
            # Thousands of tokens' log densities: a sum in half precision loses them.
            log_prob = site["log_prob"].reshape(num_particles, -1)
            log_prob = at_least_float32(log_prob)
            log_density[name] = log_density.get(name, 0) + log_prob.sum(1)
        return trace, log_density

    def forward(self) -> Iterator[tuple[slice, Any, Tensor]]:
        """Run the model, where the caller needs no gradients.

        Yields:
            Rows, trace and log joint (K',) of a chunk.

        Raises:
            ValueError: If a log density is NaN or infinite, naming its particles.
        """
        for rows, chunk in self.chunks():
            trace, log_joint = self._finite_trace(chunk, rows.start)
            self.share(trace)
            yield rows, trace, log_joint

    @torch.enable_grad()
    def gradients(
        self, objective: Callable[[slice, Any, Tensor], Tensor]
    ) -> tuple[Weights, Tensor, Tensor | None]:
        """Gradients of an objective that is a sum over particles.

        Args:
            objective: Of a chunk's rows, trace and log joint (this rank's share of it):
                a scalar.

        Returns:
            Site -> gradient (K, ...); the log joint (K,), nats, full data; and what
            :func:`data_loss` says, (K,), if the batch observes any data.

        Raises:
            ValueError: If a log density or a gradient is NaN or infinite.
        """
        check_gradients()
        gradients: dict[str, list[Tensor]] = {site: [] for site in self.particles}
        log_joints, losses = [], list[Tensor]()
        for rows, chunk in self.chunks():
            # A chunk's graph is gone before the next one's is built.
            leaves = {s: x.requires_grad_() for s, x in chunk.items()}
            trace, log_joint = self._finite_trace(leaves, rows.start)
            # A share's log joint stands for all data: shares of it add up to the whole.
            share = self.share(trace)
            log_joint = log_joint if share == 1 else share * log_joint
            with outside_autocast():  # PyTorch's advice for backward passes
                of_chunk = torch.autograd.grad(
                    objective(rows, trace, log_joint),
                    list(leaves.values()),
                    # A site may have a flat density and no effect.
                    materialize_grads=True,
                )
            by_site = dict(zip(leaves, of_chunk, strict=True))
            check_finite(by_site, "gradient", rows.start)
            for site, gradient in by_site.items():
                gradients[site].append(gradient)
            log_joints.append(log_joint.detach())
            loss = data_loss(trace, log_joint.shape[0])
            losses.extend([] if loss is None else [share * loss])
        self.rows_over.check_batch(self.plates)
        found = [torch.cat(log_joints), *map(torch.cat, gradients.values())]
        found += [torch.cat(losses)] if losses else []
        log_joint, *whole = self.over_ranks(found)
        nll = whole.pop() if losses else None
        return dict(zip(gradients, whole, strict=True)), log_joint, nll

    def _finite_trace(self, chunk: Weights, first: int) -> tuple[Any, Tensor]:
        trace, log_density = validated(partial(self._explained_trace, chunk, first))
        check_finite(log_density, "log density", first)
        return trace, torch.stack(list(log_density.values())).sum(0)

    def _explained_trace(
        self, chunk: Weights, first: int
    ) -> tuple[Any, dict[str, Tensor]]:
        try:
            return self.trace(chunk)
        except ValueError as error:
            if is_agreed(error):  # to run again, a rank needs the others
                raise
            # Pyro's validation of arguments and values says nothing of particles.
            again = replace(self, plates=dict(self.plates))
            with torch.no_grad(), unvalidated(), once_more():
                with suppress(NeedsAllRanksError):
                    _, log_density = again.trace(chunk)
                    check_finite(log_density, "log density", first)
            raise


def particle_model(
    model: Model,
    init_loc_fn: InitFn,
    max_plate_nesting: int | None,
    args: Any,
    kwargs: Any,
    obs_site: str | None = None,
) -> ParticleModel:
    """Inspect the model by one run, where the first particle starts.

    Args:
        model: A Pyro model.
        init_loc_fn: As in Pyro's autoguides.
        max_plate_nesting: Batch dims that the model's sites take; None finds out.
        args: The model's positional arguments.
        kwargs: The model's keyword arguments.
        obs_site: A site that must be observed; None is any or none.

    Returns:
        The model with its latent sites.

    Raises:
        ValueError: If ``obs_site`` isn't observed, there are no latent sites, one is
            discrete, belongs to the data of a minibatch or has a support without a
            transform, ``init_loc_fn`` gives a value of another shape, or
            ``max_plate_nesting`` is too small.
    """
    trace = _starting_trace(model, init_loc_fn, 0, args, kwargs)
    if obs_site is not None:
        observed_site(trace, obs_site)
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
    target = ParticleModel(
        model,
        latents,
        needed[widest] if max_plate_nesting is None else max_plate_nesting,
        lifted_networks(trace),
        bool(observed_names(trace)),
        tuple(
            name
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and is_data(site)
        ),
        obs_site,
    )
    first = {
        s: x.transform.inv(trace.nodes[s]["value"])[None] for s, x in latents.items()
    }
    target.check_stack(first, args, kwargs, trace)
    return target


def model_at_particles(
    model: Model, particles: Mapping[str, Tensor], batch: Batch
) -> tuple[ParticleModel, dict[str, Tensor]]:
    """Inspect a model by one run, and take particles to unconstrained space.

    Args:
        model: A Pyro model.
        particles: Site -> (K, ...), on the sites' supports.
        batch: The model's keyword arguments.

    Returns:
        The model, and site -> (K, ...) in unconstrained space.

    Raises:
        ValueError: If there are no particles, a latent site is missing or has another
            shape, one isn't the model's, the model can't be run by particles, or a
            plate of it draws its own rows.
    """
    check_model(model)
    check_weights(particles, "particles")
    num_particles = next((x.shape[0] for x in particles.values() if x.ndim), 0)
    if num_particles < 1:
        raise ValueError(
            "There are no particles. Give a mapping of sites to values (K, ...), such "
            "as posterior.particles or svgd.get_named_particles()."
        )

    def first(site: dict[str, Any]) -> Tensor:
        name, shape = site["name"], site["fn"].shape()
        if name not in particles:
            return site["fn"].sample()
        if particles[name].shape != (num_particles, *shape):
            raise ValueError(
                f"Site {name!r}: the particles have shape "
                f"{tuple(particles[name].shape)}, expected {num_particles} of the "
                f"site's shape {tuple(shape)}."
            )
        return particles[name][0]

    with GivenRows(batch):
        target = particle_model(model, first, None, (), batch)
    missing = sorted(target.latents.keys() - particles.keys())
    if missing:
        raise ValueError(
            f"Site {missing[0]!r} of the model isn't among the particles, which have "
            f"{sorted(particles)}. Give values of all latent sites."
        )
    unknown = sorted(particles.keys() - target.latents.keys())
    if unknown:
        raise ValueError(
            f"The particles have values of {unknown}, which the model doesn't sample; "
            f"its latent sites are {sorted(target.latents)}. Leave them out, or give "
            "the model that the particles are of."
        )
    with torch.no_grad():
        return target, {
            site: latent.transform.inv(particles[site])
            for site, latent in target.latents.items()
        }


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
        ValueError: If a starting point has another shape than its site, is NaN or
            infinite, or isn't all that ``init_to`` was given, or that has more.
    """
    check_number_of_starts(init_loc_fn, num_particles)
    rows = []
    for k in range(num_particles):
        trace = _starting_trace(target.model, init_loc_fn, k, args, kwargs)
        start = {site: trace.nodes[site]["value"] for site in target.latents}
        check_start(init_loc_fn, start, k)
        row = {
            site: latent.transform.inv(start[site])
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


def check_finite(values: Mapping[str, Tensor], what: str, first: int = 0) -> Tensor:
    """Refuse particles with values that are NaN or infinite.

    Args:
        values: Site -> (K, ...).
        what: What the values are.
        first: Number of the first particle.

    Returns:
        Their largest magnitudes, (sites, K).

    Raises:
        ValueError: Naming the first such site and its particles.
    """
    sizes = largest(values)
    finite = sizes.isfinite()
    require(finite.all(), partial(_not_finite, [*values], finite, what, first))
    return sizes


def _not_finite(
    sites: Sequence[str], finite: Tensor, what: str, first: int
) -> ValueError:
    rows = finite.tolist()
    site, row = next(x for x in zip(sites, rows, strict=True) if not all(x[1]))
    bad = [first + k for k, is_finite in enumerate(row) if not is_finite]
    return ValueError(
        f"Site {site!r}: the {what} of particle(s) {bad} is NaN or infinite. "
        "No particle was moved. Check the batch and the model, or go back to "
        "an earlier state with a lower learning rate."
    )


@contextmanager
def _without_looking() -> Iterator[None]:
    """A block in which Pyro warns of no log densities."""
    before = pyro.settings.get("validate_poutine")
    with undone(partial(pyro.settings.set, validate_poutine=before)):
        pyro.settings.set(validate_poutine=False)
        yield


def largest(values: Mapping[str, Tensor]) -> Tensor:
    """Largest magnitudes, (sites, K); NaN where there is a NaN."""
    return torch.stack(
        [
            torch.linalg.vector_norm(x.reshape(len(x), -1), math.inf, dim=1).double()
            for x in values.values()
        ]
    )


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

    with (
        evaluating_model(),
        InitMessenger(init),
        poutine.infer_config(config_fn=lambda _: number),
    ):
        return trace_on(without_gaps(model), args, kwargs)


def likelihood_at_particles(trace: Any, obs_site: str | None) -> dict[str, Any]:
    """The likelihood's site in a trace of K particles, without the particles' plate.

    Args:
        trace: Of the vectorised model.
        obs_site: Its name; None is the only observed one.

    Raises:
        ValueError: If there is no such site, or more than one.
    """
    return of_one_particle(observed_site(trace, obs_site))


def of_one_particle(site: Any) -> dict[str, Any]:
    """A site without the particles' plate among those that it is in."""
    frames = [f for f in site["cond_indep_stack"] if f.name != PARTICLE_PLATE]
    return {**site, "cond_indep_stack": tuple(frames)}


def is_data(site: Any) -> bool:
    """Whether a site has data, observed values of a distribution."""
    is_function = site["infer"].get("_deterministic", False) or site_is_factor(site)
    is_observed: bool = site["is_observed"]
    return is_observed and not (is_function or site_is_subsample(site))


def data_loss(trace: Any, num_particles: int) -> Tensor | None:
    """Negative log likelihood per datum, nats, as the model scales it, (K,).

    Of several observed sites, each per datum of its own, the sum; None of none.

    Args:
        trace: Of the vectorised model, with its log densities.
        num_particles: K.
    """
    losses = []
    for site in trace.nodes.values():
        if site["type"] != "sample" or not is_data(site):
            continue
        one = of_one_particle(site)
        log_prob = site["log_prob"].detach().reshape(num_particles, -1)
        in_plate = any(frame.vectorized for frame in one["cond_indep_stack"])
        num_data = data_plate(one).full_size if in_plate else log_prob.shape[1]
        losses.append(-at_least_float32(log_prob).sum(1) / num_data)
    return torch.stack([x.to(losses[0]) for x in losses]).sum(0) if losses else None


def datum_loss(site: dict[str, Any], num_particles: int) -> tuple[Tensor, Tensor | int]:
    """Negative log likelihood in nats per datum, of the data that count.

    Args:
        site: Of the likelihood, in a trace of K particles with its log densities.
        num_particles: K.

    Returns:
        (K,), a constant, 0 where no datum counts; and how many do. One does if an
        outcome of it does.
    """
    log_prob = site["unscaled_log_prob"].detach().reshape(num_particles, -1)  # (K, B)
    log_prob = at_least_float32(log_prob)
    if not may_not_count(site):
        size = log_prob.shape[1]
        return -log_prob.sum(1) / max(1, size), size
    counts = outcomes_that_count(site)
    data = counts.reshape(*log_prob.shape, -1).any(-1)
    # Pyro's "unscaled" is unmasked, too: a masked label may be anything.
    seen = log_prob.where(data, torch.zeros_like(log_prob))
    number = data[0].sum()
    return -seen.sum(1) / number.clamp_min(1), number
