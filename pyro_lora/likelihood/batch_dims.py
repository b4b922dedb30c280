"""Where a stack of weight sets goes among the batch dims of a model's sites.

With the data's plate alone, of B data, and a site of weights (L, R, I) outside of it,
S weight sets (S, L, R, I) become (S, 1, L, R, I), the 1 standing for the plate, and
one run of the model gives a likelihood of batch shape (S, B).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class BatchDims:
    """The batch dims of a site among those of its model.

    Attributes:
        missing: Dims of the model's plates that the site doesn't have.
    """

    missing: int

    def stacked(self, value: Tensor) -> Tensor:
        """Values (S, *shape) as (S, 1, ..., 1, *shape), left of all plates."""
        return value.reshape(len(value), *[1] * self.missing, *value.shape[1:])


def batch_dims(
    observed: Sequence[Mapping[str, Any]], latent: Mapping[str, Mapping[str, Any]]
) -> dict[str, BatchDims]:
    """Of each latent site.

    Args:
        observed: Nodes of a trace at one weight set.
        latent: Site -> its node there.

    Raises:
        ValueError: If one is inside of the data's plate.
    """
    nodes = [*observed, *latent.values()]
    frames = [f for n in nodes for f in n["cond_indep_stack"] if f.vectorized]
    nesting = max(
        *(-frame.dim for frame in frames), *(len(n["fn"].batch_shape) for n in nodes), 0
    )
    found = {}
    for name, node in latent.items():
        for site in observed:
            shared = plates_of(node) & plates_of(site)
            if shared:
                raise ValueError(
                    f"Site {name!r} is inside the plate {shared.pop()!r} of the data, "
                    "so its draws for one batch say nothing about another. Only sites "
                    "outside of the data's plate can be predicted from."
                )
        own = node["value"].ndim - node["fn"].event_dim
        found[name] = BatchDims(nesting - own)
    return found


def plates_of(node: Mapping[str, Any]) -> set[str]:
    """Names of the plates that a site is in."""
    return {frame.name for frame in node["cond_indep_stack"]}
