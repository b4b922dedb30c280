"""Mathematics of our own under somebody's ``torch.autocast``.

It is meant for networks. A product in an eigenbasis, or a sum of squared distances, is
a small difference of large numbers, of which bfloat16 leaves nothing.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


@contextmanager
def outside_autocast() -> Iterator[None]:
    """A block, or a function, whose products have their arguments' dtype."""
    with _off("cpu"), _off("cuda"):
        yield


def _off(device: str) -> AbstractContextManager[object]:
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
