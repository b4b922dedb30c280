"""Toy networks that can't hold particles in their batch, each for its own reason."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.lifting.liftable_row import Row, bert, trained_only

GROUP = "Networks that can't hold particles in their batch"


class Toy(nn.Module):
    """Two trained linear layers with a frozen part between them."""

    def __init__(
        self, between: Callable[[Tensor], Tensor], *, transposed: bool = False
    ) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.between = between
        self.last = nn.Linear(4, 3)
        self.transposed = transposed
        if isinstance(between, nn.Module):
            between.requires_grad_(False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.transposed else x
        out = self.last(self.between(self.first(x)))
        return out.transpose(0, 1) if self.transposed else out


class CentredBert(nn.Module):
    """A BERT whose first states lose their mean over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = bert()
        self.head = nn.Linear(16, 2)

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.head(centred(self.encoder(**inputs).last_hidden_state[:, 0]))


class Recurrent(nn.Module):
    """A GRU over sequences (T, B, 4), as PyTorch's default is."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0]


class Normalised(nn.Module):
    """Batch norm of (B, T, 4) over batch and time."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.mT).mT


class RunningMean(nn.Module):
    """Subtracts a running mean, which every call changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.mean: Tensor
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean((0, 1)))
        return x - self.mean


class LastState(nn.Module):
    """Adds what the call before has left, for every datum of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(2, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.state: Tensor
        out = x + self.state
        self.state.copy_(x.detach()[:, -1:])
        return out


def accumulated(x: Tensor) -> Tensor:
    return x.cumsum(0).tanh()


def centred(x: Tensor) -> Tensor:
    return x - x.mean(0)


def sequences(batch_size: int, length: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"x": torch.randn(batch_size, length, 4, dtype=torch.float64)}


def unfoldable(
    name: str,
    build: Callable[[], nn.Module],
    shape: tuple[int, int] = (2, 5),
    *,
    one_by_one: str = "",
    raises: str = "",
    note: str = "",
) -> Row:
    return Row(
        group=GROUP,
        name=name,
        build=build,
        inputs=sequences(*shape),
        sites="base: bias, weight",
        one_by_one=one_by_one,
        raises=raises,
        note=note,
    )


ROWS = [
    unfoldable(
        "layers that see (T, B, ...)",
        lambda: Toy(accumulated, transposed=True),
        one_by_one="they mix what is folded",
    ),
    unfoldable(
        "the same, T as long as the folded batch",
        lambda: Toy(accumulated, transposed=True),
        (2, 6),
        one_by_one="they mix what is folded",
    ),
    unfoldable(
        "inputs (T, B, ...)",
        lambda: Toy(accumulated),
        (5, 2),
        one_by_one="time comes first",
    ),
    unfoldable(
        "inputs (T, B, ...), as many as particles",
        lambda: Toy(accumulated),
        (2, 2),
        one_by_one="time comes first",
    ),
    unfoldable(
        "a recurrent layer over (T, B, ...)",
        lambda: Toy(Recurrent()),
        (5, 2),
        one_by_one="time comes first",
    ),
    unfoldable(
        "a mean over the batch", lambda: Toy(centred), one_by_one="it is everyone's"
    ),
    Row(
        group=GROUP,
        name="a mean over the batch, of BERT's outputs",
        build=lambda: trained_only(CentredBert(), "query", "head"),
        sites="base: bias, weight",
        one_by_one="it is everyone's",
    ),
    unfoldable(
        "batch norm in training mode",
        lambda: Toy(Normalised()).train(),
        raises="batch norm in training mode",
        note="put it in evaluation mode",
    ),
    unfoldable(
        "batch norm without running statistics",
        lambda: Toy(Normalised()).eval(),
        one_by_one="it normalises over the batch",
    ),
]
ROWS.append(
    Row(
        group=GROUP,
        name="a trained recurrent layer",
        build=lambda: Toy(Recurrent()).requires_grad_(True),
        inputs=sequences(5, 2),
        refused="keeps references of its own",
        note="PyTorch's recurrent layers keep references to their weights: freeze them",
    )
)
STATEFUL = {
    "a running mean": lambda: Toy(RunningMean()),
    "a state for each datum": lambda: Toy(LastState()),
}
