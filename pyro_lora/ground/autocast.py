"""Mathematics of our own under somebody's ``torch.autocast``.

It is meant for networks. A product in an eigenbasis, or a sum of squared distances, is
a small difference of large numbers, of which bfloat16 leaves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from types import FunctionType
from typing import Any

import torch


@contextmanager
def outside_autocast() -> Iterator[None]:
    """A block, or a function, whose products have their arguments' dtype."""
    with _off("cpu"), _off("cuda"):
        yield


class OutsideAutocast:
    """A base class of what runs no network: its methods' products are outside.

    So are those of its subclasses, a user's own among them. A method that is a
    generator computes where it is gone through.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, member in [*vars(cls).items()]:
            if isinstance(member, FunctionType):
                setattr(cls, name, _outside(member))


def _outside(method: Callable[..., Any]) -> Callable[..., Any]:
    # torch.compile traces a block, but no method that a context manager decorates.
    @wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with outside_autocast():
            return method(*args, **kwargs)

    return wrapper


def autocast_dtype(device: str) -> torch.dtype | None:
    """What somebody's autocast computes products in.

    Args:
        device: A type of device.

    Returns:
        The dtype; None where autocast is off, or there is none for such devices.
    """
    is_there = torch.amp.is_autocast_available(device)  # not for the meta device
    if is_there and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def _off(device: str) -> AbstractContextManager[object]:
    if autocast_dtype(device) is None:
        return nullcontext()
    return torch.autocast(device, enabled=False)
