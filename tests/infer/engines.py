"""SVGD engines on toy targets, with every kind of optimiser."""

from collections.abc import Callable
from typing import Any

import pyro.optim
import torch
from pyro.optim import SGD, Adam, PyroOptim
from torch import Tensor
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora import kernels
from tests.infer.targets import Target

Batches = list[dict[str, Tensor]]


def engine(
    target: Target, optim: PyroOptim, kernel: Any = None, **settings: Any
) -> pl.SVGD:
    return pl.SVGD(
        target.model,
        kernels.RBF() if kernel is None else kernel,
        optim,
        len(next(iter(target.particles.values()))),
        init_loc_fn=target.init,
        **settings,
    )


def regression_batches(num_batches: int = 3) -> Batches:
    return [
        {"x": torch.randn(4, 3).double(), "y": torch.randn(4).double()}
        for _ in range(num_batches)
    ]


def exponential() -> PyroOptim:
    settings = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.5}
    return pyro.optim.ExponentialLR(settings)


def by_lambda() -> PyroOptim:
    settings = {
        "optimizer": torch.optim.SGD,
        "optim_args": {"lr": 0.01, "momentum": 0.9},
        "lr_lambda": lambda epoch: 1 / (1 + epoch),
    }
    return pyro.optim.LambdaLR(settings)


def plateau(threshold: float = 1e9) -> PyroOptim:
    """The rate falls after an epoch unless the loss fell by the threshold."""
    settings = {
        "optimizer": torch.optim.SGD,
        "optim_args": {"lr": 0.01},
        "patience": 0,
        "threshold": threshold,
        "threshold_mode": "abs",
    }
    return pyro.optim.ReduceLROnPlateau(settings)


OPTIMIZERS: dict[str, Callable[[], PyroOptim]] = {
    "Adam": lambda: Adam({"lr": 0.05}),
    "ClippedAdam": lambda: pyro.optim.ClippedAdam({"lr": 0.05, "clip_norm": 1.0}),
    "SGD": lambda: SGD({"lr": 0.01, "momentum": 0.9}),
    "clipped": lambda: Adam({"lr": 0.05}, {"clip_norm": 3.0}),
    "ExponentialLR": exponential,
    "LambdaLR": by_lambda,
    "ReduceLROnPlateau": plateau,
}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert_close(found, expected, rtol=0, atol=0)


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """All of ``SVGD.state_dict()``, bit for bit."""
    assert _plain(found) == _plain(expected)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.tolist()
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    return [_plain(x) for x in value] if isinstance(value, list | tuple) else value
