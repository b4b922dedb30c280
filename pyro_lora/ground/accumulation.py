"""Sums of many terms, which lose the small ones in half precision."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Sums of many terms need float32 or wider; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
