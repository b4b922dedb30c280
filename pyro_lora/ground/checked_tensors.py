"""Tensors of a file, each checked for what it must be before anybody computes with it.

A file may be signed and yet hold anything: shapes that don't fit, NaN, a negative
precision. What a tensor must be is said where it is taken::

    tensors = CheckedTensors(read_tensors(...))
    tensors.real("loc/site", (2, 3, 16))
    tensors.positive("prior_precision/site", (2, 1, 1))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_lora.ground.accumulation import at_least_float32

REAL = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DOUBLE = (torch.float64,)
# Numbers beyond these are no weights or precisions of a network; their squares and
# quotients would leave float32.
LARGEST, SMALLEST = 1.84e19, 1e-18
# How often what is stored once may be repeated where the network doesn't say it.
MAX_REPEATS = 10_000
FLOAT32 = 1e-5  # rounding of sums of outer products, in units of the trace
_ASYMMETRY = 1e-3  # of a product in float32, in units of the largest entry
_NUM_VECTORS = 8  # to see by whether a basis is orthonormal


@dataclass(frozen=True)
class CheckedTensors:
    """Named tensors of a file.

    Attributes:
        values: Name -> tensor.
        prefix: Before the names that are asked for.
    """

    values: Mapping[str, Tensor]
    prefix: str = ""

    def under(self, prefix: str) -> CheckedTensors:
        """The tensors whose names go on after a further prefix."""
        return CheckedTensors(self.values, f"{self.prefix}{prefix}")

    def __contains__(self, name: str) -> bool:
        return f"{self.prefix}{name}" in self.values

    def any(self, name: str) -> Tensor:
        """A tensor as it is.

        Raises:
            ValueError: If there is none.
        """
        full = f"{self.prefix}{name}"
        if full not in self.values:
            raise ValueError(f"tensor {full!r} is missing")
        return self.values[full]

    def real(
        self,
        name: str,
        shape: Sequence[int] | None = None,
        dtypes: Sequence[torch.dtype] = REAL,
    ) -> Tensor:
        """A tensor of finite real numbers.

        Args:
            name: Its name.
            shape: Its shape; None is any, with no more than 10,000 repeats.
            dtypes: One of these is its dtype.

        Raises:
            ValueError: If it's missing or something else.
        """
        x = self.any(name)
        full = f"tensor {self.prefix}{name!s}"
        if x.dtype not in dtypes:
            raise ValueError(
                f"{full} has dtype {x.dtype}, expected {' or '.join(map(str, dtypes))}"
            )
        if shape is not None and tuple(x.shape) != tuple(shape):
            raise ValueError(
                f"{full} has shape {tuple(x.shape)}, expected {tuple(shape)}"
            )
        once = stored(x)
        if shape is None and x.numel() > MAX_REPEATS * once.numel():
            raise ValueError(
                f"{full} repeats what it holds to the shape {tuple(x.shape)}, more "
                f"than {MAX_REPEATS} times"
            )
        if not (once.abs() <= LARGEST).all():
            raise ValueError(
                f"{full} has values that are NaN or beyond {LARGEST:.0e}; they must be "
                "finite"
            )
        return x

    def positive(
        self,
        name: str,
        shape: Sequence[int] | None = None,
        dtypes: Sequence[torch.dtype] = REAL,
    ) -> Tensor:
        """Likewise, of positive numbers.

        Raises:
            ValueError: If it's missing or something else.
        """
        x = self.real(name, shape, dtypes)
        low = stored(x).min() if x.numel() else torch.ones((), device="cpu")
        if not low >= SMALLEST:
            raise ValueError(
                f"tensor {self.prefix}{name} has values from {float(low):.3g} on; they "
                "must be positive"
            )
        return x

    def not_negative(
        self,
        name: str,
        shape: Sequence[int] | None = None,
        dtypes: Sequence[torch.dtype] = REAL,
    ) -> Tensor:
        """Likewise, of numbers from 0 on.

        Raises:
            ValueError: If it's missing or something else.
        """
        x = self.real(name, shape, dtypes)
        if (stored(x) < 0).any():
            raise ValueError(
                f"tensor {self.prefix}{name} has negative values, from "
                f"{float(x.min()):.3g} on"
            )
        return x

    def orthonormal(self, name: str, shape: Sequence[int]) -> Tensor:
        r"""Likewise, (L, n, k), with orthonormal columns in each layer.

        :math:`U^T U v = v` is looked at for a few normal v: O(L n k), where
        :math:`U^T U` itself would cost as much as the eigenvectors did.

        Raises:
            ValueError: If it's missing or something else.
        """
        x = self.real(name, shape)
        wide = at_least_float32(x)
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(  # a column off by e moves U^T U v by about e
            shape[-1],
            _NUM_VECTORS,
            generator=generator,
            dtype=torch.float64,
            device="cpu",
        ).to(wide)
        error = (wide.mT @ (wide @ v) - v).abs().max() if v.numel() else 0.0
        if not error <= 10 * torch.finfo(x.dtype).eps ** 0.5:
            raise ValueError(
                f"tensor {self.prefix}{name} isn't a basis: its columns aren't "
                f"orthonormal (U'U v is off v by {float(error):.2g})"
            )
        return x


def check_definite(x: Tensor, what: str, floor: float) -> None:
    """Check that a matrix is symmetric and positive definite.

    Args:
        x: (n, n).
        what: The start of a message.
        floor: Times the trace, added to the diagonal before: what sums in float32
            round to.

    Raises:
        ValueError: If it isn't.
    """
    size = float(x.abs().max()) if x.numel() else 0.0
    if not ((x - x.mT).abs() <= _ASYMMETRY * size).all():
        raise ValueError(f"{what} isn't symmetric")
    wide = x.double()
    shift = floor * float(wide.diagonal().sum()) + (SMALLEST if floor else 0.0)
    if not shift >= 0 or int(
        torch.linalg.cholesky_ex(
            wide + shift * torch.eye(len(x), dtype=wide.dtype, device=x.device)
        ).info
    ):
        raise ValueError(f"{what} isn't positive definite")


def check_broadcasts(x: Tensor, shape: Sequence[int], what: str) -> Tensor:
    """The tensor, if it broadcasts over a shape.

    Raises:
        ValueError: If it doesn't.
    """
    fits = x.ndim <= len(shape) and all(
        n in (1, m) for n, m in zip(x.shape[::-1], shape[::-1], strict=False)
    )
    if not fits:
        raise ValueError(
            f"{what} has shape {tuple(x.shape)}, which doesn't broadcast over "
            f"{tuple(shape)}"
        )
    return x


def stored(x: Tensor) -> Tensor:
    """The tensor without the dims that only repeat by ``expand``."""
    for dim, stride in enumerate(x.stride()):
        if stride == 0 and x.shape[dim] > 1:
            x = x.narrow(dim, 0, 1)
    return x
