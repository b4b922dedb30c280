r"""Stein variational gradient descent over adapters.

A step asks the kernel's space for a direction (``weight_space``, or its neighbours for
updates and predictions; the kernels are in ``kernels``). The space runs the model once
at all particles (``particle_model``). What comes back goes to a ``pyro.optim``
optimiser, as minus a gradient would. Of several ranks each runs it for its own rows of
the particles; what comes back is of all of them, and the update is the same on each.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from operator import length_hint
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pyro.optim import PyroOptim
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_lora.ground.interrupts import leaving_no_trace, undone
from pyro_lora.ground.progress import progress
from pyro_lora.ground.ranks import (
    ALONE,
    SAME_START,
    Ranks,
    all_ranks,
    is_agreed,
    ranks_of,
)
from pyro_lora.ground.settings import (
    check_count,
    check_function,
    check_gradients,
    check_kind,
    check_name,
    check_number,
    check_positive,
    check_word,
)
from pyro_lora.ground.summary import Summarised, brief, weights_facts
from pyro_lora.ground.synchronisation import Gathering, ask, gathered
from pyro_lora.ground.tensor_folder import MANIFEST
from pyro_lora.ground.warning import warn
from pyro_lora.ground.weights import Weights, drawing_nothing
from pyro_lora.infer.svgd import delta_space
from pyro_lora.infer.svgd.delta_space import DeltaSpace
from pyro_lora.infer.svgd.function_space import FunctionSpace
from pyro_lora.infer.svgd.kernels import Kernel, NoRepulsion, check_kernel, space_of
from pyro_lora.infer.svgd.particle_model import (
    InitFn,
    ParticleModel,
    ParticlePass,
    check_finite,
    initial_particles,
    is_data,
    of_one_particle,
    particle_model,
)
from pyro_lora.infer.svgd.schedules import Schedule, check_epochs, fraction_done
from pyro_lora.infer.svgd.training_state import (
    check_optimizer,
    check_shapes,
    checked_state,
    optimizer_state,
    read_state,
    restore_generators,
    restore_optimizer,
    step_schedulers,
    write_state,
)
from pyro_lora.infer.svgd.weight_space import (
    REPULSIVE,
    STEIN,
    Direction,
    Independent,
    JointSpace,
    Repulsion,
    SiteSpace,
    Space,
    Transport,
    spread,
)
from pyro_lora.lifting.cached_trunk import trunk_once
from pyro_lora.lifting.fingerprint import (
    Fingerprint,
    check_networks,
    check_same_networks,
    described,
    fingerprint,
    restored,
)
from pyro_lora.likelihood.batch import (
    Batch,
    PlacedBatch,
    check_batches,
    checked_batch,
    checked_batches,
)
from pyro_lora.likelihood.data_plate import data_plate
from pyro_lora.likelihood.model_trace import Model, check_model
from pyro_lora.posteriors.particle_posterior import ParticlePosterior

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# What a kernel's `space` and SVGD's `transport` say.
SPACES: dict[str, Callable[..., Space]] = {
    "joint": JointSpace,
    "site": SiteSpace,
    "delta": DeltaSpace,
    "function": FunctionSpace,
}
TRANSPORTS: dict[str, Transport] = {"stein": STEIN, "repulsive": REPULSIVE}
# Mean kernel value between different particles below which they don't interact.
COLLAPSED = 1e-6


class SVGD(Summarised):
    r"""An ensemble of adapters whose members repel one another.

    ``transport="stein"`` (Liu & Wang 2016, https://arxiv.org/abs/1608.04471, eq. 8)
    moves particle i along

    .. math:: \phi_i = \frac1K \sum_j [k(x_j, x_i) \nabla \log p(x_j) / T
              + \nabla_{x_j} k(x_j, x_i)],

    and ``"repulsive"`` (D'Angelo & Fortuin 2021, https://arxiv.org/abs/2106.11642,
    eq. 8), other particles held fixed, along

    .. math:: \phi_i = \nabla \log p(x_i) / T
              - \beta \nabla_{x_i} \log \sum_j k(x_i, x_j).

    With ``kernels.NoRepulsion()``: :math:`\phi_i = \nabla \log p(x_i) / T`, a deep
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
        init_loc_fn: Where particles start, for example
            ``lora.init_to_adapter(jitter="auto")`` or ``lora.init_to_fresh()``.
        obs_site: The likelihood's site, which every batch must then observe; None is
            the only one.
        mesh: A ``DeviceMesh`` with the dims ``"particles"``, whose ranks have K / W of
            the particles each, and ``"data"``, whose ranks have shares of each batch;
            None: all ranks share the particles, where ``torch.distributed`` is
            initialised, and each is given the same batches.

    Attributes:
        diagnostics: Series with one value a step: ``loss`` (nats, full data), ``nll``
            (of the batch's data alone, nats per datum as the model scales them; if it
            observes any),
            ``attraction`` and ``repulsion`` (norms, in function space those of the
            directions of the logits), ``ratio`` (repulsion over attraction),
            ``spread`` (root mean square distance of the particles to their mean),
            ``delta_spread`` (where LoRA's weights count as the updates B A; if the
            model has such), ``mean_kernel`` (off the diagonal).

    Raises:
        TypeError: If kernel or optimiser are no such thing, or a count is no integer.
        ValueError: If an argument is out of its range, or would have no effect.
    """

    posterior_by: ClassVar[str] = "posterior()"

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
        repulsion: float | Callable[[float, float], float] | None = None,
        chunk_size: int | None = None,
        init_loc_fn: InitFn,
        obs_site: str | None = None,
        mesh: DeviceMesh | None = None,
    ) -> None:
        check_count("num_particles", num_particles)
        chunk_size = num_particles if chunk_size is None else chunk_size
        check_count("chunk_size", chunk_size)
        if not callable(temperature):
            check_positive("temperature", temperature)
        if chunk_size > num_particles:
            raise ValueError(
                f"chunk_size must lie between 1 and num_particles={num_particles}, "
                f"found {chunk_size}."
            )
        check_kernel(kernel)
        check_word("transport", transport, (*TRANSPORTS, None))
        check_name("obs_site", obs_site)
        self._kernel, self._space = kernel, _space(kernel, transport)
        if repulsion is not None:
            if self._space.default_repulsion is None:
                raise ValueError(
                    f"repulsion={repulsion} has no effect: it is the strength of "
                    "the repulsive transport. Add transport='repulsive' and a kernel, "
                    "or leave it out."
                )
            if not callable(repulsion):
                check_number("repulsion", repulsion, 0)
        check_optimizer(optim)
        check_model(model)
        check_function("init_loc_fn", init_loc_fn, "such as lora.init_to_adapter()")
        if max_plate_nesting is not None:
            check_count("max_plate_nesting", max_plate_nesting, 0)
        self._model, self._optim = model, optim
        self._temperature, self._repulsion = temperature, repulsion
        self._num_particles, self._chunk_size = num_particles, chunk_size
        self._repels = not isinstance(kernel, NoRepulsion) and num_particles > 1
        self._max_plate_nesting = max_plate_nesting
        self._init_loc_fn, self._obs_site = init_loc_fn, obs_site
        self._mesh = mesh
        self._particles: Weights | None = None
        self._loaded_values: Weights = {}
        self._loaded_networks: list[Fingerprint] | None = None
        self._target: ParticleModel | None = None
        self._num_epochs = 0  # of all runs
        self._fraction = 1.0  # of the run that is done; 1 outside of run()
        self._given: set[str] | None = None  # the arguments of every batch so far
        self._num_batches = 0
        self._warned: set[str] = set()
        self.diagnostics: dict[str, list[float]] = {}

    def _facts(self) -> dict[str, str]:
        facts = {
            "num_particles": str(self._num_particles),
            "kernel": brief(self._kernel),
            "temperature": brief(self._temperature),
            "optim": brief(self._optim.pt_optim_constructor),
            "steps": f"{len(self.diagnostics.get('loss', ())):,}",
            "epochs": f"{self._num_epochs:,}",
            **(self._progress() if self.diagnostics else {}),
        }
        if self._particles is not None:
            facts |= weights_facts(self._particles, lead=1)
        return facts | {"obs_site": brief(self._obs_site), "model": brief(self._model)}

    @leaving_no_trace
    def step(self, *args: Any, **kwargs: Any) -> float:
        """Move the particles by one batch.

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
        with all_ranks().together():
            return self._step(args, checked_batch(kwargs))

    @torch.enable_grad()
    def _step(self, args: Any, kwargs: PlacedBatch) -> float:
        check_gradients()
        rows_over = ranks_of(self._mesh, "particles", default="particles")
        if rows_over.size > self._num_particles:
            raise ValueError(
                f"num_particles={self._num_particles} can't be shared over "
                f"{rows_over.size} ranks. Use a mesh with a dim 'data', or more "
                "particles."
            )
        all_ranks().draw_alike()
        with self._naming_batch():
            # What wasn't in a batch before may be left out again, a weight perhaps.
            kwargs.check_given((self._given or set()) | kwargs.given)
            rows_over.check_batch([args, dict(kwargs)])
        target, particles = self._set_up(args, kwargs, rows_over)
        self._given = (self._given or kwargs.given) & kwargs.given
        at = ParticlePass(
            target,
            particles,
            args,
            kwargs,
            self._chunk_size,
            rows_over=rows_over,
            data_over=ranks_of(self._mesh, "data", default="particles"),
        )
        with self._naming_batch(), gathered() as gathering:
            check_finite(particles, "value")
            temperature, repulsion = self._settings()
            with (
                trunk_once([] if at.is_one_chunk else target.networks),
                all_ranks().drawing_apart(),  # dropout's masks
            ):
                direction = self._space.direction(at, temperature, repulsion)
            self._move(direction, at, gathering)
        self._num_batches += 1
        return self.diagnostics["loss"][-1]

    @contextmanager
    def _naming_batch(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            if is_agreed(error):  # the rank that it comes from has named the batch
                raise
            number = self._num_batches
            raise ValueError(f"SVGD's batch {number} (from 0): {error}") from error

    def _settings(self) -> tuple[float, Repulsion]:
        """Temperature and strength of the repulsion at the present fraction."""
        fraction, temperature = self._fraction, self._temperature
        if callable(temperature):
            temperature = temperature(fraction)
            check_positive("temperature", temperature)
        given = self._repulsion
        if callable(given):
            return temperature, lambda loss, num_data: given(fraction, ask(loss).value)
        if given is None:
            given_by_space = self._space.default_repulsion
            return temperature, 1.0 if given_by_space is None else given_by_space
        return temperature, given

    def _move(
        self, direction: Direction, at: ParticlePass, gathering: Gathering
    ) -> None:
        """Take a step and a line of the diagnostics, or neither."""
        sizes = check_finite(direction.by_site, "direction")
        particles, networks = at.particles, at.target.networks
        line = {
            "loss": -direction.log_joint.mean(),
            "attraction": direction.attraction,
            "repulsion": direction.repulsion,
            "mean_kernel": direction.mean_kernel,
            "ratio": direction.repulsion / direction.attraction,
            "spread": spread(particles),
        }
        if direction.nll is not None:
            line["nll"] = direction.nll.to(line["loss"].device).mean()
        if at.target.factor_sites:
            line["delta_spread"] = delta_space.spread(networks, particles)
        numbers = {name: ask(x) for name, x in line.items()}
        is_stuck = ask((sizes.amax(0) == 0).any(), usual=False)
        gathering.read()  # one transfer from the GPU for all of a step
        with undone(partial(_drop_gradients, particles)):
            for site, particle in particles.items():
                particle.grad = direction.by_site[site].neg_()  # optimisers descend
            self._optim(list(particles.values()))
        for name, number in numbers.items():
            self.diagnostics.setdefault(name, []).append(number.value)
        if self._repels and "collapsed" not in self._warned:
            if warn_if_collapsed(self.diagnostics["mean_kernel"][-1]):
                self._warned.add("collapsed")
        if is_stuck and "stuck" not in self._warned:
            warn_of_stuck(sizes)
            self._warned.add("stuck")

    @leaving_no_trace
    def run(
        self,
        batches: Iterable[Batch],
        *,
        num_epochs: int,
        total_epochs: int | None = None,
        progress_bar: bool | None = None,
    ) -> None:
        """Step through the batches, and a scheduler once an epoch.

        Args:
            batches: Re-iterable of mappings of model keyword arguments.
            num_epochs: Passes over the batches.
            total_epochs: Those of all calls, earlier ones and other processes' (by
                :meth:`state_dict`) included, for schedules that go on from call to
                call; None is this call by itself.
            progress_bar: Show one, with the batch's negative log likelihood in nats
                per datum, averaged over the particles (at chance, log C for C classes),
                and spread and repulsion, "0, gate closed" where the default gate of
                function space is. What a prior adds to the loss is mostly a constant,
                and left out. None: on a terminal or in a notebook.

        Raises:
            ValueError: As :meth:`step`, or if there is nothing to step through, or
                these epochs go beyond ``total_epochs``.

        Warns:
            UserWarning: After the first epoch, if its batches hold another number of
                data than the model's plate says, which every batch stands for. A
                ``DataLoader`` with ``drop_last`` may leave out less than a batch.
        """
        first, total = check_epochs(num_epochs, total_epochs, self._num_epochs)
        check_batches(batches)
        length = length_hint(batches)  # 0 where it isn't known
        steps = num_epochs * length or None
        data_over = ranks_of(self._mesh, "data", default="particles")
        with (
            all_ranks().together(),
            undone(partial(setattr, self, "_fraction", 1.0)),
        ):
            with progress(
                title="SVGD", unit="batch", total=steps, shown=progress_bar
            ) as bar:
                for epoch in range(first, first + num_epochs):
                    losses: list[float] = []
                    count = DataCount()
                    for batch in checked_batches(batches):
                        done = epoch * length + len(losses) if length else epoch
                        self._fraction = fraction_done(done, total * (length or 1))
                        if epoch == first and not losses:
                            self._given = None  # another run's may have been others
                        with count:
                            losses.append(self._step((), batch))
                        bar.set_postfix(self._progress(), refresh=False)
                        bar.update()
                    if not losses:
                        raise ValueError(
                            f"Epoch {epoch + 1} found no batches. Give a list or a "
                            "DataLoader, which can be gone through again, not an "
                            "iterator."
                        )
                    assert self._particles is not None
                    # As torch's are stepped by hand, once an epoch.
                    step_schedulers(
                        self._optim, self._particles.values(), sum(losses) / len(losses)
                    )
                    self._num_epochs += 1
                    if epoch == first and "num_data" not in self._warned:
                        drop_last = getattr(batches, "drop_last", False)
                        if count.warn_if_not_covered(drop_last, data_over):
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
            particles,
            self._target.networks,
            self._model,
            self._obs_site,
            None if self._given is None else frozenset(self._given),
        )

    def state_dict(self) -> dict[str, Any]:
        """All but random generators that the next step or epoch depends on.

        Raises:
            ValueError: Before the first step.
        """
        if self._particles is None:
            raise ValueError("There is no state before the first step.")
        networks = self._loaded_networks or []
        if self._target is not None:
            networks = [fingerprint(lora) for lora in self._target.networks]
        return {
            "values": self.get_named_particles(),
            "particles": {s: x.detach().clone() for s, x in self._particles.items()},
            "optim": {
                s: optimizer_state(self._optim, x) for s, x in self._particles.items()
            },
            "diagnostics": {k: list(v) for k, v in self.diagnostics.items()},
            "num_epochs": self._num_epochs,
            "networks": described(networks),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; works before the first step.

        Args:
            state: From :meth:`state_dict` of an engine with the same model and K.

        Raises:
            TypeError: If the state is no mapping.
            ValueError: If it is that of another model, network, K or optimiser, or
                can't be one; this object is then unchanged.
        """
        check_kind("state", state, Mapping, "from SVGD.state_dict()")
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
        networks = restored(*checked.networks)
        if self._target is not None:
            check_networks(networks, self._target.networks, "The state")
        restore_optimizer(
            self._optim,
            [(x, checked.optim[s]) for s, x in particles.items()],
            replaced=(self._particles or {}).values(),
        )
        self._particles, self._loaded_values = particles, dict(checked.values)
        self._loaded_networks = networks
        self._num_epochs = checked.num_epochs
        self.diagnostics = {k: list(v) for k, v in checked.diagnostics.items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the run into a folder: all that the next step depends on.

        Particles, the optimiser with its schedule, the number of epochs, the
        diagnostics, and the random generators of torch, NumPy and Python. The files are
        as those of :func:`~pyro_lora.save`: safetensors and JSON with checksums,
        nothing pickled; a crash leaves the old state or the new one.

        Args:
            path: The folder, made if it isn't there.

        Raises:
            ValueError: Before the first step, if the optimiser's state holds what isn't
                a tensor, number or string, or the folder is of something else.
        """
        write_state(self.state_dict(), Path(path))

    def load(
        self,
        path: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
    ) -> None:
        """Go on, before the first step or later, from what :meth:`save` wrote.

        Bit for bit: the random generators of torch, NumPy and Python are set, too, so
        that shuffled batches and dropout go on as they would have.

        Args:
            path: The folder, of an engine with the same model, kernel, optimiser and K.
            device: Where the network is; None is where the particles were.

        Raises:
            ValueError: If a file is missing, truncated, altered, not one of ours or
                written by a newer version, this machine doesn't have the device, or the
                state is that of another model, network, K or optimiser, or can't be
                one; this object and the generators are then unchanged.
        """
        folder = Path(path)
        state = read_state(folder, device)
        generators = state.pop("random")
        try:
            self.load_state_dict(state)
        except ValueError as error:
            raise ValueError(f"{folder / MANIFEST}: {error}") from error
        restore_generators(generators)

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

    def _set_up(
        self, args: Any, kwargs: Any, ranks: Ranks
    ) -> tuple[ParticleModel, Weights]:
        is_new = self._target is None
        if self._target is None:
            loaded = self._particles or {}  # whose generators go on as they were
            with drawing_nothing(loaded) if loaded else nullcontext():
                target = particle_model(
                    self._model,
                    self._init_loc_fn,
                    self._max_plate_nesting,
                    args,
                    kwargs,
                    self._obs_site,
                )
            self._space.check(target)
            if self._particles is not None:
                check_shapes(self._particles, self._num_particles, target)
            if self._loaded_networks is not None:
                check_networks(self._loaded_networks, target.networks, "The state")
            self._target = target
        elif self._particles is not None:
            self._target.check_stack(self._particles, args, kwargs)
        if self._particles is None:
            self._particles = initial_particles(
                self._target, self._init_loc_fn, self._num_particles, args, kwargs
            )
            warn_if_together(self._particles)
        if is_new:
            ranks.check_same(self._particles, "the particles", SAME_START)
            check_same_networks(self._target.networks, ranks)
        return self._target, self._particles

    def _progress(self) -> dict[str, str]:
        last = {name: series[-1] for name, series in self.diagnostics.items() if series}
        # The loss is mostly the prior's constant: thousands of weights, log sqrt(2 pi).
        loss = "nll" if "nll" in last else "loss"
        formats = {loss: ".3f", "spread": ".3g", "repulsion": ".2g"}
        said = {k: f"{last[k]:{form}}" for k, form in formats.items() if k in last}
        gated = self._repulsion is None and callable(self._space.default_repulsion)
        if gated and last.get("repulsion") == 0:
            said["repulsion"] = "0, gate closed"
        return said


def _drop_gradients(particles: Weights) -> None:
    for particle in particles.values():
        particle.grad = None


def _space(kernel: Kernel | NoRepulsion, transport: str | None) -> Space:
    if isinstance(kernel, NoRepulsion):
        return Independent()
    space = SPACES[space_of(kernel)]
    return space(kernel) if transport is None else space(kernel, TRANSPORTS[transport])


def warn_if_together(particles: Weights) -> None:
    """Warn about particles that start at one point, to SVGD's caller."""
    num_particles = next(iter(particles.values())).shape[0]
    if num_particles > 1 and all((x == x[:1]).all() for x in particles.values()):
        warn(
            f"All {num_particles} particles start at one point, where nothing drives "
            "them apart. Use init_to_adapter(jitter='auto'), or, where there is LoRA "
            "or a head of PEFT's, init_to_fresh().",
        )


def warn_if_collapsed(mean_kernel: float) -> bool:
    """Warn, to the caller of SVGD's step, of particles that don't interact.

    Args:
        mean_kernel: Mean kernel value between different particles.

    Returns:
        Whether it warned.
    """
    if mean_kernel >= COLLAPSED:
        return False
    warn(
        f"The kernel has collapsed: its mean value between different particles is "
        f"{mean_kernel:.2g}, so they don't repel and are independent runs. Use "
        "bandwidth=None (the median heuristic) or a larger bandwidth.",
    )
    return True


def warn_of_stuck(sizes: Tensor) -> None:
    """Warn, to the caller of SVGD's step, of particles that nothing moves.

    Args:
        sizes: Largest magnitudes of their direction, (sites, K), 0 for one at least.
    """
    stuck = [k for k, size in enumerate(sizes.amax(0).tolist()) if size == 0]
    warn(
        f"Particle(s) {stuck} are stuck: their direction is exactly 0 at all sites. "
        "The log joint is flat there, or its gradient underflows. Start elsewhere, or "
        "use float32.",
    )


class DataCount(Messenger):
    """Counts the data of an epoch, at each observed site: entered for each batch.

    Attributes:
        counts: Site -> data in all batches, in the largest batch, and in the plate.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, tuple[int, int, int]] = {}
        self._seen: set[str] = set()

    def __enter__(self) -> Any:
        self._seen = set()
        return super().__enter__()

    def _pyro_post_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self._seen or not is_data(msg):
            return
        site = of_one_particle(msg)
        if any(frame.vectorized for frame in site["cond_indep_stack"]):
            self._seen.add(name)  # chunks of particles run on the same data
            plate = data_plate(site)
            size, largest, _ = self.counts.get(name, (0, 0, 0))
            self.counts[name] = (
                size + plate.size,
                max(largest, plate.size),
                plate.full_size,
            )

    def warn_if_not_covered(self, drop_last: bool, ranks: Ranks = ALONE) -> bool:
        """Warn, to the caller of SVGD's run, if the model's number of data is another.

        Args:
            drop_last: Whether the batches may leave out less than one.
            ranks: Who has shares of the batches.

        Returns:
            Whether it warned.
        """
        # A plate that no batch is a part of need not be one of data, beside others.
        minibatched = {s: x for s, x in self.counts.items() if x[1] < x[2]}
        counts = minibatched or (self.counts if len(self.counts) == 1 else {})
        for name, (own, most, full_size) in counts.items():
            size = ranks.total(own)
            left_out = full_size - size
            if left_out == 0 or (drop_last and 0 < left_out < most):
                continue
            remedy = "Correct num_data in the model's pyro.plate"
            if most == full_size:
                remedy = (
                    "It has the size of a batch: say how many there are in all, "
                    'pyro.plate("data", num_data, subsample=input_ids)'
                )
            warn(
                f"The batches of an epoch hold {size} data, but the plate of site "
                f"{name!r} says {full_size}, and it's for as many that each batch "
                f"counts: the likelihood weighs {full_size / size:.3g} times what "
                f"these data do. {remedy}; or, if an epoch is meant to be another "
                "part of the data, go on.",
            )
            return True
        return False
