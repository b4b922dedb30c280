"""How particles move: the settings of SVGD and the direction that they give."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

from torch import Tensor

from pyro_lora.infer.function_space import (
    Minibatch,
    Minibatches,
    Predictions,
    Strength,
    function_space_direction,
    gated_strength,
    minibatch,
)
from pyro_lora.infer.kernels import Kernel, Zero, check_kernel, space_of
from pyro_lora.infer.particle_model import ParticleModel
from pyro_lora.infer.preconditioner import Preconditioner
from pyro_lora.infer.reference_batch import reference_direction
from pyro_lora.infer.schedules import Schedule
from pyro_lora.infer.weight_space import (
    Gradients,
    log_joint_gradients,
    weight_space_direction,
)
from pyro_lora.lifting.model_trace import Batch

Repulsion = Callable[[float, float], float]
Transport = Literal["stein", "repulsive"]
Gathered = Gradients | Minibatches


@dataclass(frozen=True, kw_only=True)
class UpdateRule:
    """What the batches of one update give, and the direction that follows from it.

    Attributes:
        kernel: A kernel, or ``Zero()``.
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

    kernel: Kernel | Zero
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
            if not isinstance(value, Integral):
                raise TypeError(f"{name} must be an integer, found {value!r}.")
        if self.num_particles < 1:
            raise ValueError(
                f"num_particles must be at least 1, found {self.num_particles}."
            )
        if not callable(self.temperature):
            _check_temperature(self.temperature)
        if not 1 <= self._chunk_size <= self.num_particles:
            raise ValueError(
                "chunk_size must lie between 1 and "
                f"num_particles={self.num_particles}, found {self.chunk_size}."
            )
        if self.accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, found {self.accumulate}.")
        check_kernel(self.kernel)
        if self.transport not in (None, "stein", "repulsive"):
            raise ValueError(
                f"transport: 'stein' or 'repulsive', found {self.transport!r}."
            )
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
            if self._form == "stein" or isinstance(self.kernel, Zero):
                raise ValueError(
                    f"repulsion={self.repulsion} has no effect: it is the strength of "
                    "the repulsive transport. Add transport='repulsive' and a kernel, "
                    "or leave it out."
                )
            if not callable(self.repulsion) and not self.repulsion >= 0:
                raise ValueError(
                    f"repulsion must not be negative, found {self.repulsion}."
                )

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
        return not isinstance(self.kernel, Zero) and self.num_particles > 1

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
            with_loss=callable(self.repulsion) or self.reference is not None,
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
            assert not isinstance(self.kernel, Zero)
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
            assert not isinstance(self.kernel, Zero)
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

    def restored(self, state: Mapping[str, Any] | None, count: int) -> Gathered | None:
        """What the first batches of an update gave, from a saved state.

        Args:
            state: ``dataclasses.asdict`` of what :meth:`gather` gave, or None.
            count: Number of those batches.

        Returns:
            A copy.

        Raises:
            ValueError: If an update of this rule can't go on from there.
        """
        if state is None:
            return None
        if count >= self.accumulate or ("batches" in state) != self._keeps_batches:
            raise ValueError(
                f"The state was saved after {count} batches of an update, by an SVGD "
                "with another accumulate, kernel or reference. Give this one the same "
                f"(found accumulate={self.accumulate}, kernel={self.kernel})."
            )
        state = copy.deepcopy(dict(state))
        if "batches" not in state:
            return Gradients(**state)
        return Minibatches(
            tuple(
                Minibatch(**{**batch, "ahead": Predictions(**batch["ahead"])})
                for batch in state["batches"]
            )
        )

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


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"temperature must be positive and finite, found {temperature}."
        )
