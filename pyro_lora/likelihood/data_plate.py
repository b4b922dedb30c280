"""The data dimension of an observed site, and its scale without subsampling.

In ``pyro.plate("data", 1000, subsample=x)`` with 10 rows a log density is scaled by
100, so that each batch stands for all data. A sum over all batches counts each datum
once, so the 100 is divided out; a scale of the user's own, a temperature, say, stays.

``pyro.plate("data", 1000, subsample_size=10)`` draws 10 rows itself, others in each
run. An optimiser may take them, but whatever must see each datum once refuses a model
that looks them up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class DataPlate:
    """Where the data are in an observed site.

    Attributes:
        dim: The data's batch dim, negative; None where there is a single datum.
        size: Data in this batch, B.
        full_size: Data in all, N.
        scale: The site's scale with the data's subsampling divided out; that of
            another plate stands for the outcomes of a datum that weren't drawn.
        mask: The site's mask, None where there is none.
        name: The plate's, None where there is none.
    """

    dim: int | None
    size: int
    full_size: int
    scale: Tensor | float
    mask: Tensor | bool | None
    name: str | None = None

    def data_last(self, value: Tensor, batch_shape: torch.Size) -> Tensor:
        """(..., M) with ... broadcasting to the batch shape -> (M', B)."""
        value = value.expand(*batch_shape, value.shape[-1])
        if self.dim is None:
            return value.reshape(-1, 1)
        # The terms' dim is right of the batch dims, so theirs count one further.
        return value.movedim(self.dim - 1, -1).flatten(0, -2)

    @property
    def is_tempered(self) -> bool:
        """Whether data count otherwise than once each."""
        other = self.scale != 1
        return bool(other.any()) if isinstance(other, Tensor) else other

    def is_contradicted(self, num_seen: int) -> bool:
        """Whether a batch says that it's all data, and more than it has were seen."""
        return self.size == self.full_size and num_seen > self.full_size

    def contradiction(self, num_seen: int, site: str) -> tuple[str, str]:
        """What was said of the number of data, which is another, and what to do.

        Args:
            num_seen: The data of all batches.
            site: The observed site.
        """
        in_all = 'pyro.plate("data", num_data, subsample=input_ids)'
        if self.name is None:
            return (
                f"site {site!r} is in no plate, so that each batch, such as one of "
                f"{self.size}, would be all data",
                f"Put its pyro.sample into a plate: with {in_all}.",
            )
        if self.is_contradicted(num_seen):
            return (
                f"the plate {self.name!r} of site {site!r} has the size of a batch, "
                f"{self.size}, which would then be all data",
                f"Say how many there are in all, {in_all}; if these are all, give them "
                "once.",
            )
        return (
            f"the plate of site {site!r} says {self.full_size}",
            "Give batches that cover every datum exactly once (drop_last=False, no "
            "repeats), or correct num_data in the model's pyro.plate.",
        )


def data_plate(site: Mapping[str, Any]) -> DataPlate:
    """Find the data plate of an observed site in a trace.

    The subsampled plate (the outermost one), else the rightmost, else the last batch
    dim. A fit checks that the network's inputs are along it.

    Args:
        site: A node of a trace, of type sample.

    Returns:
        The data's dim, sizes, and the scale that isn't due to subsampling.
    """
    frames = [f for f in site["cond_indep_stack"] if f.vectorized]
    batch_shape = site["fn"].batch_shape
    if not frames:
        size = batch_shape[-1] if batch_shape else 1
        dim = -1 if batch_shape else None
        return DataPlate(dim, size, size, site["scale"], site["mask"])
    subsampled = [f for f in frames if (f.full_size or f.size) != f.size]
    # Dims are negative, so the largest is the rightmost.
    frame = subsampled[0] if subsampled else max(frames, key=lambda f: f.dim)
    full_size = frame.full_size or frame.size
    scale = site["scale"] / (full_size / frame.size)
    return DataPlate(frame.dim, frame.size, full_size, scale, site["mask"], frame.name)


class GivenRows(Messenger):
    """A block in which no plate may draw the rows of its data.

    One that says how many there are and leaves alone which, may: the rows that it draws
    are for nothing. So it's their use that is refused.

    Args:
        batch: Whose place the error names, where it has one.
    """

    def __init__(self, batch: object = None) -> None:
        super().__init__()
        self._place = getattr(batch, "place", "The batch")

    def _pyro_sample(self, msg: Any) -> None:
        # What was given, by subsample= or a handler, has arrived at the outermost one.
        if not site_is_subsample(msg) or msg["value"] is not None:
            return
        name, size, drawn = msg["name"], msg["fn"].size, msg["fn"].subsample_size
        if drawn is not None and drawn < size:  # else all rows, in their order
            rows = msg["fn"]().as_subclass(_DrawnRows)
            rows.refusal = (
                f"{self._place}: plate {name!r} draws its own rows, {drawn} of {size} "
                "at random and others in each run, but here each datum must be seen "
                "once. Give the rows to the model as an argument and say subsample=, "
                f"as in pyro.plate({name!r}, {size}, subsample=input_ids). SVI and "
                "SVGD take the model as it is."
            )
            msg["value"] = rows


class _DrawnRows(Tensor):
    """Places of rows, which nobody may look up."""

    refusal: str
    _OF_SIZES: ClassVar = {Tensor.size, Tensor.__len__, Tensor.dim, Tensor.numel}

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # Sizes, and attributes that are no tensors, such as the device, tell no place.
        if func in cls._OF_SIZES or getattr(func, "__name__", "") == "__get__":
            with torch._C.DisableTorchFunctionSubclass():
                found = func(*args, **(kwargs or {}))
            if not isinstance(found, Tensor):
                return found
        given = tree_leaves((args, kwargs))
        raise ValueError(next(x.refusal for x in given if isinstance(x, _DrawnRows)))
