"""Slots: linear layers that use a bound tensor while there is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class BoundLinear:
    """What a slot uses for one call, in place of its own parameters.

    ``weight`` is (O, I) or (S, O, I), ``bias`` is (O,) or (S, O); None means the
    layer's own. ``folded`` is (S, B) where the inputs were folded to (S * B, ...),
    None where they were not.
    """

    weight: Tensor | None
    bias: Tensor | None
    folded: tuple[int, int] | None


class LinearSlot(nn.Linear):
    """An ``nn.Linear`` that computes with bound tensors while there are any.

    A layer becomes a slot by ``layer.__class__ = LinearSlot`` (as
    ``torch.nn.utils.parametrize`` does), so that parameters, hooks, ``state_dict``
    and every reference that PEFT keeps stay what they were.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``x W^T + b``; with particle dims, particle s sees its own W_s, b_s.

        Args:
            input: (B, ..., I), or (S * B, ..., I), particle-major, where folded.

        Returns:
            As ``input`` with last dim O.

        Raises:
            RuntimeError: If weights with particle dims are bound, but the inputs
                weren't folded.
            ValueError: If the input isn't made of one part for each particle.
        """
        bound = self.bound
        if bound is None:
            return F.linear(input, self.weight, self.bias)
        weight = self.weight if bound.weight is None else bound.weight
        bias = self.bias if bound.bias is None else bound.bias
        weight = weight.to(input.dtype)
        bias = None if bias is None else bias.to(input.dtype)
        if weight.ndim == 2 and (bias is None or bias.ndim == 1):
            return F.linear(input, weight, bias)
        if bound.folded is None:
            raise RuntimeError(
                "Weights with particle dims need folded inputs: call the network that "
                "lora() or lora.bind(weights) returns, not the PEFT model itself."
            )
        return _particle_linear(input, weight, bias, bound.folded)

    @property
    def bound(self) -> BoundLinear | None:
        """The tensors bound at the moment, None where there are none."""
        return cast("BoundLinear | None", self.__dict__.get("_bound"))

    @bound.setter
    def bound(self, value: BoundLinear | None) -> None:
        # Not through nn.Module.__setattr__: a bound tensor is no part of the module.
        self.__dict__["_bound"] = value


def _particle_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, folded_dims: tuple[int, int]
) -> Tensor:
    num_particles, batch_size = folded_dims
    # Beams, or tokens flattened into the batch, make the first dim a multiple.
    if x.shape[0] % (num_particles * batch_size) != 0:
        raise ValueError(
            f"A lifted layer got an input of shape {tuple(x.shape)}, which isn't "
            f"{num_particles} particles of a batch of {batch_size} (relative position "
            "embeddings, perhaps). Bind one particle at a time, or don't adapt that "
            "layer."
        )
    folded = x.reshape(num_particles, -1, x.shape[-1])  # (S, B T, I)
    if weight.ndim == 2:
        out = F.linear(folded, weight)
    else:
        out = torch.bmm(folded, weight.mT)
    if bias is not None:
        out = out + (bias[:, None] if bias.ndim == 2 else bias)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def as_slot(layer: nn.Module) -> LinearSlot:
    """Turn a plain ``nn.Linear`` into a slot, in place; a slot stays as it is.

    Raises:
        TypeError: If the layer is not exactly an ``nn.Linear``.
    """
    if isinstance(layer, LinearSlot):
        return layer
    if type(layer) is not nn.Linear:
        raise TypeError(f"expected torch.nn.Linear, found {type(layer).__name__}")
    layer.__class__ = LinearSlot
    return cast(LinearSlot, layer)
