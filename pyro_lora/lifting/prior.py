"""What a lifted network and its prior know of each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from pyro_lora.ground.settings import check_function

# What a non-centred site's noise is called, after the site's name.
NOISE = "_decentered"


class Network(Protocol):
    """What a prior knows of a lifted network, or of some of its sites."""

    @property
    def network(self) -> nn.Module:
        """The original network."""
        ...

    @property
    def sites(self) -> dict[str, tuple[str, ...]]:
        """Site name -> parameter names, in layer order."""
        ...

    @property
    def initial_weights(self) -> dict[str, Tensor]:
        """Site name -> the values at the time of lifting, (L, ...)."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """The present values, stacked as sites."""
        ...

    def zeros(self) -> dict[str, Tensor]:
        """Zeros of every site's shape, dtype and device."""
        ...

    def delta_weight_factors(
        self, weights: Mapping[str, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Module path -> (s B, A), of shapes (..., O, R) and (..., R, I)."""
        ...

    def num_experts(self, path: str) -> int | None:
        """How many experts' matrices a layer stacks; None: it isn't one of experts."""
        ...


Prior = Callable[[Any], dict[str, Tensor]]  # of a Network


def check_prior(name: str, value: object) -> None:
    """Check that something can be a prior.

    Args:
        name: Of the argument.
        value: A function, or None for the default.

    Raises:
        TypeError: If it can't be called.
    """
    if value is not None:
        check_function(name, value, "a prior, such as priors.normal(scale=1.0)")
