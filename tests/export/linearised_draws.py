"""The linearised network at a draw, by a derivative of the network itself."""

from typing import Any

import torch
from torch import Tensor

import pyro_lora as pl
from tests import networks
from tests.predict import models


def linearised_logits(
    lora: pl.LiftedNetwork, mode: models.Weights, at: models.Weights, batch: Any
) -> Tensor:
    """f + J (w - mode) by a derivative in one direction, (B, C)."""

    def logits(t: Tensor) -> Tensor:
        weights = {s: x + t * (at[s] - x) for s, x in mode.items()}
        with lora.bind(weights) as net:
            result: Tensor = net(**networks.inputs(batch)).logits
        return result

    zero = torch.zeros((), dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(logits, zero)
    assert isinstance(slope, Tensor)
    return logits(zero).detach() + slope
