"""Stein variational gradient descent over adapters."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from operator import length_hint
from typing import Any, Literal

import torch
from pyro.optim import PyroOptim
from tqdm.auto import tqdm

from pyro_lora.ground.interrupts import leaving_no_trace, undone
from pyro_lora.ground.settings import check_count, check_function, check_kind
from pyro_lora.ground.weights import Weights
from pyro_lora.infer.svgd.delta_space import DeltaSpace
from pyro_lora.infer.svgd.engine_state import checked_state
from pyro_lora.infer.svgd.kernels import Kernel, NoRepulsion, space_of
from pyro_lora.infer.svgd.optimizer_state import (
    check_optimizer,
    optimizer_state,
    restore_optimizer,
    step_schedulers,
)
from pyro_lora.infer.svgd.particle_checks import (
    DataCount,
    check_finite,
    warn_if_collapsed,
    warn_if_stuck,
    warn_if_together,
)
from pyro_lora.infer.svgd.particle_model import InitFn, ParticleModel, check_shapes
from pyro_lora.infer.svgd.preconditioner import Laplace
from pyro_lora.infer.svgd.preconditioner import preconditioner as metric
from pyro_lora.infer.svgd.schedules import Schedule, check_epochs, fraction_done
from pyro_lora.infer.svgd.starting_point import initial_particles, particle_model
from pyro_lora.infer.svgd.transport import spread
from pyro_lora.infer.svgd.update_rule import Gathered, Repulsion, UpdateRule
from pyro_lora.lifting.fingerprint import (
    Fingerprint,
    check_networks,
    described,
    fingerprint,
)
from pyro_lora.likelihood.batch import (
    PlacedBatch,
    check_batches,
    checked_batch,
    checked_batches,
)
from pyro_lora.likelihood.model_trace import Batch, Model, check_model
from pyro_lora.posteriors.particle_posterior import ParticlePosterior


class SVGD:
    r"""An ensemble of adapters whose members repel one another.

    ``transport="stein"`` (Liu & Wang 2016, https://arxiv.org/abs/1608.04471, eq. 8)
    moves particle i along :math:`\phi_i = \frac1K \sum_j [k(x_j, x_i) \nabla \log
    p(x_j) / T + \nabla_{x_j} k(x_j, x_i)]`. ``"repulsive"`` (D'Angelo & Fortuin 2021,
    https://arxiv.org/abs/2106.11642, eq. 8): :math:`\phi_i = \nabla \log p(x_i) / T -
    \beta \nabla_{x_i} \log \sum_j k(x_i, x_j)`, other particles held fixed. With
    ``kernels.NoRepulsion()``: :math:`\phi_i = \nabla \log p(x_i) / T`, a deep
    ensemble, or MAP with one particle. :math:`\log p` is the log joint of the full
    data, in nats.

    The particles live in this object, not in Pyro's param store. ``optim`` must not
    have per-parameter callables, since Pyro would look their names up in that store.

    ``temperature`` and ``repulsion`` may be functions of the fraction of :meth:`run`
    that is done: 0 at its first step and 1 at its last (rising once an epoch where the
    batches have no length; over several calls by ``total_epochs``), 1 for a
    :meth:`step` outside of it.

    Args:
        model: A Pyro model, as a rule one that calls a lifted network.
        kernel: One of ``kernels``, or a function of squared distances (K, K) -> (K, K)
            over all weights jointly.
        optim: A ``pyro.optim`` optimiser or scheduler. It sees one tensor a site with
            all particles, so that clipping by norm is by the norm over them.
        num_particles: K.
        max_plate_nesting: Batch dims that the model's sites take; None finds out.
        temperature: T, a positive number or a function of the fraction.
        transport: None is ``"repulsive"`` in function space, ``"stein"`` elsewhere.
        repulsion: :math:`\beta` of the repulsive transport: a number, or a function of
            (fraction, minibatch loss in nats per datum, mean over particles). None is 1
            in weight space. In function space it is 0.4 N at a loss of 0, falling to 0
            at 0.3 nats per datum; that is for class labels, since the loss of a Normal
            depends on its units. At 1, few particles keep log(K + 1) / (2 D) of a
            standard Gaussian's variance over D weights (Ba et al. 2022,
            https://openreview.net/forum?id=Qycd9j5Qp9J), at 2 D / log(K + 1) all of it.
        chunk_size: Particles in one forward pass; None is all. Same numbers, less
            memory; function space then needs a second forward pass.
        accumulate: Batches in one update: the particles move once for all of them, as
            on one batch that holds their data. :meth:`run` ends an epoch with an update
            of what is left. Function space then needs a second forward pass, too.
        preconditioner: A Laplace posterior, or several (one at each particle), whose
            mean precision P is the metric: the direction is :math:`P^{-1}` times that
            above, with distances by P (matrix-valued SVGD, Wang et al. 2019,
            https://arxiv.org/abs/1910.12794). A learning rate of 1 is then of the size
            of a Newton step: use ``pyro.optim.SGD``, since Adam rescales it again.
        reference: A batch, with labels or without, on which function space compares
            predictions, by passes of its own; None is the minibatch.
        init_loc_fn: Where particles start, for example
            ``lora.init_to_adapter(jitter="auto")`` or ``lora.init_to_fresh()``.
        obs_site: The likelihood's site, which every batch must then observe; None is
            the only one.

    Attributes:
        diagnostics: Series with one value a step: ``loss`` (nats, full data),
            ``attraction`` and ``repulsion`` (norms, in function space those of the
            directions of the logits, unless there is a ``reference``), ``ratio``
            (repulsion over attraction), ``spread`` (root mean square distance of the
            particles to their mean), ``delta_spread`` (where LoRA's weights count as
            the updates B A; if the model has such), ``mean_kernel`` (off the diagonal).

    Raises:
        TypeError: If kernel or optimiser are no such thing, or a count is no integer.
        ValueError: If an argument is out of its range, or would have no effect.
    """

    def __init__(
        self,
        model: Model,
        kernel: Kernel | NoRepulsion,
        optim: PyroOptim,
        num_particles: int,
        max_plate_nesting: int | None = None,
        *,
        temperature: float | Schedule = 1.0,
        transport: Literal["stein", "repulsive"] | None = None,
        repulsion: float | Repulsion | None = None,
        chunk_size: int | None = None,
        accumulate: int = 1,
        preconditioner: Laplace | Sequence[Laplace] | None = None,
        reference: Batch | None = None,
        init_loc_fn: InitFn,
        obs_site: str | None = None,
    ) -> None:
        if reference is not None:
            check_kind("reference", reference, Mapping, "a batch, a mapping")
            reference = checked_batch(reference, "The reference")
        self._rule = UpdateRule(
            kernel=kernel,
            transport=transport,
            temperature=temperature,
            repulsion=repulsion,
            num_particles=num_particles,
            chunk_size=chunk_size,
            accumulate=accumulate,
            obs_site=obs_site,
            reference=reference,
            preconditioner=None
            if preconditioner is None
            else metric(preconditioner, space_of(kernel)),
        )
        check_optimizer(optim)
        check_model(model)
        check_function("init_loc_fn", init_loc_fn, "such as lora.init_to_adapter()")
        if max_plate_nesting is not None:
            check_count("max_plate_nesting", max_plate_nesting, 0)
        self._model, self._optim = model, optim
        self._num_particles = num_particles
        self._max_plate_nesting = max_plate_nesting
        self._init_loc_fn, self._obs_site = init_loc_fn, obs_site
        self._particles: Weights | None = None
        self._loaded_values: Weights = {}
        self._loaded_networks: list[Fingerprint] | None = None
        self._gathered: Gathered | None = None  # by the batches of an unfinished update
        self._num_gathered = 0
        self._target: ParticleModel | None = None
        self._delta_space: DeltaSpace | None = None  # None without LoRA's factors
        self._num_epochs = 0  # of all runs
        self._fraction = 1.0  # of the run that is done; 1 outside of run()
        self._given: set[str] | None = None  # the arguments of every batch so far
        self._num_batches = 0
        self._warned: set[str] = set()
        self.diagnostics: dict[str, list[float]] = {}

    @leaving_no_trace
    def step(self, *args: Any, **kwargs: Any) -> float:
        """One batch; with ``accumulate``, the last batch of an update moves particles.

        Args:
            *args: The model's positional arguments.
            **kwargs: The model's keyword arguments.

        Returns:
            Mean over particles of minus the log joint of the full data on this batch,
            nats (``pyro.infer.SVGD`` returns a dict of squared gradients instead).

        Raises:
            TypeError: If function space doesn't know the likelihood.
            ValueError: If the model can't be run by particles, or a log density or
                direction is NaN or infinite; no particle is changed then.
        """
        return self._step(args, checked_batch(kwargs))

    def _step(self, args: Any, kwargs: PlacedBatch) -> float:
        with self._naming_batch():
            # What wasn't in a batch before may be left out again, a weight perhaps.
            kwargs.check_given((self._given or set()) | kwargs.given)
        target, particles = self._set_up(args, kwargs)
        self._given = (self._given or kwargs.given) & kwargs.given
        check_finite(particles, "value")
        with self._naming_batch():
            gathered, log_joint = self._rule.gather(
                target, particles, self._gathered, args, kwargs
            )
            if self._num_gathered + 1 == self._rule.accumulate:
                self._update(gathered)
            else:
                self._gathered, self._num_gathered = gathered, self._num_gathered + 1
        self._num_batches += 1
        if log_joint is None:
            return self.diagnostics["loss"][-1]
        return -log_joint.mean().item()

    @contextmanager
    def _naming_batch(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            number = self._num_batches
            raise ValueError(f"SVGD's batch {number} (from 0): {error}") from error

    def _update(self, gathered: Gathered) -> None:
        """Move the particles, once for all batches that were gathered."""
        assert self._target is not None
        assert self._particles is not None
        target, particles = self._target, self._particles
        direction, found = self._rule.direction(
            target, particles, gathered, self._fraction
        )
        check_finite(direction, "direction")
        log_joint = found.pop("log_joint")
        found = {
            "loss": -log_joint.mean(),
            **found,
            "ratio": found["repulsion"] / found["attraction"],
            "spread": spread(particles),
        }
        if self._delta_space is not None:
            found["delta_spread"] = self._delta_space.spread(particles)
        with undone(partial(_drop_gradients, particles)):
            for site, particle in particles.items():
                particle.grad = direction[site].neg_()
            self._optim(list(particles.values()))
        self._gathered, self._num_gathered = None, 0
        values = torch.stack([x.double() for x in found.values()]).tolist()
        for name, value in zip(found, values, strict=True):
            self.diagnostics.setdefault(name, []).append(value)
        if self._rule.repels and "collapsed" not in self._warned:
            if warn_if_collapsed(self.diagnostics["mean_kernel"][-1]):
                self._warned.add("collapsed")
        if "stuck" not in self._warned and warn_if_stuck(direction):
            self._warned.add("stuck")

    @leaving_no_trace
    def run(
        self,
        batches: Iterable[Batch],
        *,
        num_epochs: int,
        total_epochs: int | None = None,
        progress_bar: bool = True,
    ) -> None:
        """Step through the batches, and a scheduler once an epoch.

        Args:
            batches: Re-iterable of mappings of model keyword arguments.
            num_epochs: Passes over the batches.
            total_epochs: Those of all calls, earlier ones and other processes' (by
                :meth:`state_dict`) included, for schedules that go on from call to
                call; None is this call by itself.
            progress_bar: Show loss, spread and repulsion.

        Raises:
            ValueError: As :meth:`step`, or if there is nothing to step through, or
                these epochs go beyond ``total_epochs``.

        Warns:
            UserWarning: After the first epoch, if its batches hold another number of
                data than the model's plate says, which every batch stands for. A
                ``DataLoader`` with ``drop_last`` may leave out less than a batch.
        """
        first, total = check_epochs(num_epochs, total_epochs, self._num_epochs)
        self._given = None
        check_batches(batches)
        length = length_hint(batches)
        steps = num_epochs * length or None
        with undone(partial(setattr, self, "_fraction", 1.0)):
            with tqdm(total=steps, desc="SVGD", disable=not progress_bar) as bar:
                for epoch in range(first, first + num_epochs):
                    losses: list[float] = []
                    count = DataCount()
                    for batch in checked_batches(batches):
                        done = epoch * length + len(losses) if length else epoch
                        self._fraction = fraction_done(done, total * (length or 1))
                        with count:
                            losses.append(self._step((), batch))
                        if self.diagnostics:
                            bar.set_postfix(self._progress(), refresh=False)
                        bar.update()
                    if not losses:
                        raise ValueError(
                            f"Epoch {epoch + 1} found no batches. Give a list or a "
                            "DataLoader, which can be gone through again, not an "
                            "iterator."
                        )
                    if self._gathered is not None:
                        self._update(self._gathered)
                    assert self._particles is not None
                    step_schedulers(
                        self._optim, self._particles.values(), sum(losses) / len(losses)
                    )
                    self._num_epochs += 1
                    if epoch == first and "num_data" not in self._warned:
                        drop_last = getattr(batches, "drop_last", False)
                        if count.warn_if_not_covered(drop_last):
                            self._warned.add("num_data")

    def get_named_particles(self) -> Weights:
        """The particles, site -> (K, ...).

        Raises:
            ValueError: Before the first step.
        """
        if self._particles is None:
            raise ValueError("There are no particles before the first step.")
        values = self._loaded_values  # until a step has seen the sites' supports
        if self._target is not None:
            with torch.no_grad():
                values = self._target.constrained(self._particles)
        return {site: value.detach().clone() for site, value in values.items()}

    def get_samples(
        self, num_samples: int | None = None, group_by_chain: bool = False
    ) -> Weights:
        """Particles as MCMC would give draws.

        Args:
            num_samples: S; None gives each particle once.
            group_by_chain: Put a chain dim of size 1 in front.

        Returns:
            Site -> (S, ...), or (1, S, ...).

        Raises:
            ValueError: Before the first step, or if S isn't positive.
        """
        particles = self.get_named_particles()
        posterior = ParticlePosterior(particles, (), self._model, self._obs_site)
        number = self._num_particles if num_samples is None else num_samples
        draws = posterior.sample(number)
        return {s: x[None] for s, x in draws.items()} if group_by_chain else draws

    def posterior(self) -> ParticlePosterior:
        """The particles as a guide.

        Raises:
            ValueError: Before the first step (of this object, if a state was loaded).
        """
        particles = self.get_named_particles()
        if self._target is None:
            raise ValueError(
                "Step once after loading a state: the model is unknown yet. Or load a "
                "posterior that pyro_lora.save wrote."
            )
        return ParticlePosterior(
            particles, self._target.networks, self._model, self._obs_site
        )

    def state_dict(self) -> dict[str, Any]:
        """All but random generators that the next step or epoch depends on.

        Raises:
            ValueError: Before the first step.
        """
        if self._particles is None:
            raise ValueError("There is no state before the first step.")
        networks = self._loaded_networks
        if self._target is not None:
            networks = [fingerprint(lora) for lora in self._target.networks]
        return {
            "values": self.get_named_particles(),
            "particles": {s: x.detach().clone() for s, x in self._particles.items()},
            "optim": {
                s: optimizer_state(self._optim, x) for s, x in self._particles.items()
            },
            "diagnostics": {k: list(v) for k, v in self.diagnostics.items()},
            "gathered": None if self._gathered is None else asdict(self._gathered),
            "num_gathered": self._num_gathered,
            "num_epochs": self._num_epochs,
            "networks": None if networks is None else described(networks),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; works before the first step.

        Args:
            state: From :meth:`state_dict` of an engine with the same model and K.

        Raises:
            ValueError: If the state is that of another model, network, K or optimiser,
                or can't be one; this object is then unchanged.
        """
        checked = checked_state(state, self._num_particles, self._target)
        particles = {
            s: x.detach().clone().requires_grad_() for s, x in checked.particles.items()
        }
        for site, x in particles.items():
            here = (self._particles or particles).get(site, x)
            if here.dtype != x.dtype:
                raise ValueError(
                    f"Site {site!r}: the state holds {x.dtype}, this SVGD has "
                    f"{here.dtype}. Load it into a network of the same dtype."
                )
        networks = checked.networks
        if networks is not None and self._target is not None:
            check_networks(networks, self._target.networks, "The state")
        count = checked.num_gathered
        gathered = self._rule.restored(checked.gathered, count, particles)
        restore_optimizer(
            self._optim,
            [(x, checked.optim[s]) for s, x in particles.items()],
            replaced=(self._particles or {}).values(),
        )
        self._particles, self._loaded_values = particles, dict(checked.values)
        self._loaded_networks = networks
        self._gathered, self._num_gathered = gathered, count
        self._num_epochs = checked.num_epochs
        self.diagnostics = {k: list(v) for k, v in checked.diagnostics.items()}

    def __getstate__(self) -> dict[str, Any]:
        # What pyro.optim keeps for each tensor can't be pickled, but its state can.
        optim = copy.copy(self._optim)
        optim.optim_objs, optim.grad_clip = {}, {}
        states = [
            (x, optimizer_state(self._optim, x))
            for x in (self._particles or {}).values()
        ]
        return {**vars(self), "_optim": optim, "states": states}

    def __setstate__(self, state: dict[str, Any]) -> None:
        states = state.pop("states")
        vars(self).update(state)
        restore_optimizer(self._optim, states, replaced=())

    def _set_up(self, args: Any, kwargs: Any) -> tuple[ParticleModel, Weights]:
        if self._target is None:
            loaded = self._particles or {}  # whose generators go on as they were
            devices = {x.device for x in loaded.values() if x.is_cuda}
            with torch.random.fork_rng(devices, enabled=bool(loaded)):
                target = particle_model(
                    self._model,
                    self._init_loc_fn,
                    self._max_plate_nesting,
                    args,
                    kwargs,
                    self._obs_site,
                )
            self._rule.check(target)
            if self._particles is not None:
                check_shapes(self._particles, self._num_particles, target)
            if self._loaded_networks is not None:
                check_networks(self._loaded_networks, target.networks, "The state")
            self._target = target
            if target.factor_sites:
                self._delta_space = DeltaSpace(target.networks)
        if self._particles is None:
            self._particles = initial_particles(
                self._target, self._init_loc_fn, self._num_particles, args, kwargs
            )
            warn_if_together(self._particles)
        return self._target, self._particles

    def _progress(self) -> dict[str, str]:
        formats = {"loss": ".1f", "spread": ".3g", "repulsion": ".2g"}
        return {k: f"{self.diagnostics[k][-1]:{form}}" for k, form in formats.items()}


def _drop_gradients(particles: Weights) -> None:
    for particle in particles.values():
        particle.grad = None
