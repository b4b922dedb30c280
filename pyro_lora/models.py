"""Ready Pyro models around a lifted network, short enough to copy and change."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor

from pyro_lora.lifting.lifted_network import LiftedNetwork


def classification(lora: LiftedNetwork, num_data: int) -> Callable[..., Tensor]:
    """One label for each input, from the network's logits.

    Args:
        lora: A lifted network whose output has ``.logits``, (..., B, C).
        num_data: N, data in all, for which each batch stands.

    Returns:
        A Pyro model with keyword arguments: the network's inputs, (B, ...), and
        ``labels``, (B,) or None.
    """

    def model(labels: Tensor | None = None, **inputs: Any) -> Tensor:
        net = lora()  # the pyro.sample statements
        logits = net(**inputs).logits
        first = next(iter(inputs.values()))
        with pyro.plate("data", num_data, subsample=first):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    return model
