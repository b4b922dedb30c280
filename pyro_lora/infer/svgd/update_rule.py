"""How particles move: the settings of SVGD and the direction that they give."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from torch import Tensor

from pyro_lora.ground.checked_tensors import LARGEST, REAL
from pyro_lora.ground.settings import (
    check_count,
    check_name,
    check_number,
    check_positive,
    check_word,
)
from pyro_lora.infer.svgd.function_space import (
    Minibatches,
    Strength,
    function_space_direction,
    gated_strength,
    minibatch,
)
from pyro_lora.infer.svgd.kernels import Kernel, NoRepulsion, check_kernel, space_of
from pyro_lora.infer.svgd.particle_checks import check_finite
from pyro_lora.infer.svgd.particle_model import ParticleModel
from pyro_lora.infer.svgd.preconditioner import Preconditioner
from pyro_lora.infer.svgd.reference_batch import reference_direction
from pyro_lora.infer.svgd.schedules import Schedule
from pyro_lora.infer.svgd.weight_space import (
    Gradients,
    log_joint_gradients,
    weight_space_direction,
)
from pyro_lora.likelihood.model_trace import Batch

Repulsion = Callable[[float, float], float]
Transport = Literal["stein", "repulsive"]
Gathered = Gradients | Minibatches


@dataclass(frozen=True, kw_only=True)
class UpdateRule:
    """What the batches of one update give, and the direction that follows from it.

    Attributes:
        kernel: A kernel, or ``NoRepulsion()``.
        transport: ``"stein"`` or ``"repulsive"``; None follows the kernel's space.
        temperature: T, a number or a schedule.
        repulsion: Strength of the repulsive transport; None follows the space.
        num_particles: K.
        chunk_size: Particles in one pass; None is all.
        accumulate: Batches in one update.
        obs_site: The likelihood's site; None is the only one.
        preconditioner: The metric of weight space; None is the identity.
        reference: The batch on which function space compares predictions; None is the
            minibatch.

    Raises:
        TypeError: If the kernel is none, or a count no integer.
        ValueError: If a setting is out of its range, or would have no effect.
    """

    kernel: Kernel | NoRepulsion
    transport: Transport | None
    temperature: float | Schedule
    repulsion: float | Repulsion | None
    num_particles: int
    chunk_size: int | None
    accumulate: int
    obs_site: str | None
    preconditioner: Preconditioner | None
    reference: Batch | None

    def __post_init__(self) -> None:
        counts: dict[str, Any] = {
            "num_particles": self.num_particles,
            "chunk_size": self._chunk_size,
            "accumulate": self.accumulate,
        }
        for name, value in counts.items():
            check_count(name, value)
        if not callable(self.temperature):
            _check_temperature(self.temperature)
        if self._chunk_size > self.num_particles:
            raise ValueError(
                "chunk_size must lie between 1 and "
                f"num_particles={self.num_particles}, found {self.chunk_size}."
            )
        check_kernel(self.kernel)
        check_word("transport", self.transport, ("stein", "repulsive", None))
        check_name("obs_site", self.obs_site)
        if self._in_function_space and self.transport == "stein":
            raise ValueError(
                "Function space has the repulsive transport only. Leave transport=None."
            )
        if self.reference is not None and not self._in_function_space:
            raise ValueError(
                "A reference batch has no effect: predictions are compared in function "
                "space only. Use a kernel over 'function', or leave it out."
            )
        if self.repulsion is not None:
            if self._form == "stein" or isinstance(self.kernel, NoRepulsion):
                raise ValueError(
                    f"repulsion={self.repulsion} has no effect: it is the strength of "
                    "the repulsive transport. Add transport='repulsive' and a kernel, "
                    "or leave it out."
                )
            if not callable(self.repulsion):
                check_number("repulsion", self.repulsion, 0)

    def check(self, target: ParticleModel) -> None:
        """Refuse a model that the rule can't move particles of.

        Raises:
            ValueError: If the preconditioner is for other sites, or there are no
                updates that a kernel in delta space could compare.
        """
        if space_of(self.kernel) == "delta" and not target.factor_sites:
            raise ValueError(
                "A kernel over 'delta' compares the updates B A of LoRA layers, and "
                f"none of the sites {sorted(target.latents)} is a factor of one. Use "
                "space='joint'."
            )
        if self.preconditioner is not None:
            self.preconditioner.check(target)

    @property
    def repels(self) -> bool:
        """Whether particles act on one another."""
        return not isinstance(self.kernel, NoRepulsion) and self.num_particles > 1

    def gather(
        self,
        target: ParticleModel,
        particles: Mapping[str, Tensor],
        before: Gathered | None,
        args: Any,
        kwargs: Any,
    ) -> tuple[Gathered, Tensor | None]:
        """Add a batch to those of an update.

        Args:
            target: The model.
            particles: Site -> (K, ...), unconstrained.
            before: What the batches before it gave, None for the first.
            args: The model's positional arguments.
            kwargs: The model's keyword arguments.

        Returns:
            What all of them give; and the log joint (K,) as this batch estimates it,
            None where only :meth:`direction` will know it.
        """
        if self._keeps_batches:
            assert not isinstance(before, Gradients)
            ahead = self.accumulate > 1 or self._chunk_size < self.num_particles
            batch = minibatch(
                target,
                particles,
                ahead=ahead,
                chunk_size=self._chunk_size,
                obs_site=self.obs_site,
                args=args,
                kwargs=kwargs,
            )
            earlier = () if before is None else before.batches
            return Minibatches((*earlier, batch)), batch.log_joint
        assert not isinstance(before, Minibatches)
        found = log_joint_gradients(
            target,
            particles,
            with_loss=self._with_loss,
            chunk_size=self._chunk_size,
            obs_site=self.obs_site,
            args=args,
            kwargs=kwargs,
        )
        return found if before is None else before.joined(found), found.log_joint

    def direction(
        self,
        target: ParticleModel,
        particles: Mapping[str, Tensor],
        gathered: Gathered,
        fraction: float,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The direction of an update.

        Args:
            target: The model.
            particles: Site -> (K, ...), unconstrained.
            gathered: What its batches gave.
            fraction: Of the run that is done.

        Returns:
            Site -> direction (K, ...); and log joint (K,), norms of attraction and
            repulsion, and mean kernel value.

        Raises:
            ValueError: If a schedule leaves its range, or a log density is NaN or
                infinite.
        """
        temperature, repulsion = self.temperature, self.repulsion
        if callable(temperature):
            temperature = temperature(fraction)
        _check_temperature(temperature)
        strength: float | Strength
        if callable(repulsion):
            strength = lambda loss, num_data: repulsion(fraction, loss)  # noqa: E731
        elif repulsion is None:
            strength = gated_strength if self._in_function_space else 1.0
        else:
            strength = repulsion
        if isinstance(gathered, Minibatches):
            assert not isinstance(self.kernel, NoRepulsion)
            return function_space_direction(
                target,
                particles,
                gathered.batches,
                kernel=self.kernel,
                temperature=temperature,
                strength=strength,
                chunk_size=self._chunk_size,
                obs_site=self.obs_site,
            )
        if self.reference is not None:
            assert not isinstance(self.kernel, NoRepulsion)
            return reference_direction(
                target,
                particles,
                gathered,
                self.reference,
                kernel=self.kernel,
                temperature=temperature,
                strength=strength,
                chunk_size=self._chunk_size,
                obs_site=self.obs_site,
            )
        return weight_space_direction(
            target,
            particles,
            gathered,
            kernel=self.kernel,
            space=space_of(self.kernel),
            form=self._form,
            temperature=temperature,
            strength=strength,
            preconditioner=self.preconditioner,
        )

    def restored(
        self,
        state: Mapping[str, Any] | None,
        count: int,
        particles: Mapping[str, Tensor],
    ) -> Gathered | None:
        """What the first batches of an update gave, from a saved state.

        Args:
            state: ``dataclasses.asdict`` of what :meth:`gather` gave, or None.
            count: Number of those batches.
            particles: Site -> (K, ...).

        Returns:
            A copy.

        Raises:
            ValueError: If an update of this rule can't go on from there.
        """
        if (state is None) != (count == 0):
            raise ValueError(
                f"The state has gathered {count} batches, but not what of."
            )
        if state is None:
            return None
        if count >= self.accumulate or ("batches" in state) != self._keeps_batches:
            raise ValueError(
                f"The state was saved after {count} batches of an update, by an SVGD "
                "with another accumulate, kernel or reference. Give this one the same "
                f"(found accumulate={self.accumulate}, kernel={self.kernel})."
            )
        kind: type[Gathered] = Minibatches if "batches" in state else Gradients
        try:
            found: Gathered = msgspec.convert(copy.deepcopy(dict(state)), kind)
        except (msgspec.ValidationError, UnicodeError) as error:
            raise ValueError(f"The state's gathered batches: {error}.") from error
        tensors: dict[str, Tensor | None]
        if isinstance(found, Gradients):
            tensors = {"log_joint": found.log_joint}
            if (found.loss is None) == self._with_loss:
                raise ValueError("The state's gathered batches have another loss.")
            tensors |= {"loss": found.loss} if self._with_loss else {}
            _check_like(found.by_site, particles, "by_site")
            for site, x in particles.items():
                if found.by_site[site].dtype != x.dtype:
                    raise ValueError(
                        f"The state's gradients at {site!r} aren't {x.dtype}."
                    )
            counts = [found.batch_size, *([found.num_data] if self._with_loss else [])]
        else:
            if len(found.batches) != count:
                raise ValueError(
                    f"The state has {len(found.batches)} gathered batches, not {count}."
                )
            tensors, counts = {}, []
            for i, batch in enumerate(found.batches):
                if batch.ahead is None:
                    raise ValueError(f"Gathered batch {i} has no predictions.")
                if batch.ahead.outputs.ndim != 2:
                    raise ValueError(f"Gathered batch {i} has no matrix of outputs.")
                tensors |= {
                    f"{i}.outputs": batch.ahead.outputs[:, 0],
                    f"{i}.loss": batch.ahead.loss,
                    f"{i}.score_norm": batch.ahead.score_norm,
                    f"{i}.log_joint": batch.log_joint,
                }
                check_finite({"outputs": batch.ahead.outputs}, "gathered output")
                counts += [batch.size, batch.ahead.num_data]
        one = next(iter(particles.values())).detach()
        rows = {name: one.flatten(1).sum(1) for name in tensors}
        _check_like(tensors, rows, "gathered")
        if not all(isinstance(n, int) and n > 0 for n in counts):
            raise ValueError(f"The state's gathered batches have {counts} data.")
        return found

    @property
    def _with_loss(self) -> bool:
        return callable(self.repulsion) or self.reference is not None

    @property
    def _in_function_space(self) -> bool:
        return space_of(self.kernel) == "function"

    @property
    def _keeps_batches(self) -> bool:
        return self._in_function_space and self.reference is None

    @property
    def _form(self) -> Transport:
        if self.transport is not None:
            return self.transport
        return "repulsive" if self._in_function_space else "stein"

    @property
    def _chunk_size(self) -> int:
        return self.num_particles if self.chunk_size is None else self.chunk_size


def _check_like(
    found: Mapping[str, Tensor | None], like: Mapping[str, Tensor], what: str
) -> None:
    """Check that gathered tensors are finite, and of the shapes of others.

    Raises:
        ValueError: If they aren't.
    """
    if found.keys() != like.keys():
        raise ValueError(f"The state's {what} is of {list(found)}, not {list(like)}.")
    for name, x in found.items():
        shape = like[name].shape
        if x is None or x.shape != shape or x.dtype not in REAL[:2]:
            raise ValueError(
                f"The state's {what}, {name!r}: expected real numbers of shape "
                f"{tuple(shape)}."
            )
        if not (x.abs() <= LARGEST).all():
            raise ValueError(f"The state's {what}, {name!r}, is NaN or infinite.")


def _check_temperature(temperature: float) -> None:
    check_positive("temperature", temperature)
