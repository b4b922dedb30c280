"""Gaussians over the weights of a linear network, of any size and condition number.

Used by ``python -m benchmarks.svgd_dimension``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_lora as pl

NUM_PARTICLES = 20
FLAT = 1e-3  # prior precision over the smallest precision of the posterior
SIDES = {1: (1, 1), 10: (5, 2), 100: (10, 10), 1000: (100, 10), 10_000: (100, 100)}


def spectrum(size: int, condition: float) -> Tensor:
    """Variances along the axes, wide first, of mean 1."""
    values = condition ** -torch.linspace(0, 1, size)
    return values / values.mean()


class Heads(nn.Module):
    """A linear network without bias, whose outputs are those of several layers."""

    def __init__(self, num_inputs: int, num_outputs: int, num_heads: int) -> None:
        super().__init__()
        for name in "abcdefghij"[:num_heads]:
            setattr(self, name, nn.Linear(num_inputs, num_outputs // num_heads, False))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (..., O) of inputs (..., I)."""
        return torch.cat([head(x) for head in self.children()], -1)


@dataclass(frozen=True)
class Variances:
    """Of particles over those of the posterior: 1 is right, 0 is collapsed.

    Attributes:
        marginal: Mean over weights of theirs, over that of the posterior's.
        widest: Mean ratio along the widest tenth of the axes.
        narrowest: Along the narrowest tenth.
    """

    marginal: float
    widest: float
    narrowest: float


@dataclass(frozen=True, eq=False)
class Problem:
    """A lifted network, a Pyro model that calls it, and the data."""

    lora: pl.LiftedNetwork
    model: Callable[..., None]
    data: dict[str, Tensor]


@dataclass(frozen=True)
class Target:
    """A Gaussian over O rows of I weights, each with the same covariance.

    Attributes:
        size: D = I O.
        condition: Of the covariance.
        turned: Whether its axes are turned at random against those of the weights.
    """

    size: int
    condition: float
    turned: bool = False

    @property
    def spectrum(self) -> Tensor:
        """Variances of a row along its axes, (I,)."""
        return spectrum(SIDES[self.size][0], self.condition)

    @property
    def axes(self) -> Tensor:
        """Of a row, the columns of an orthogonal matrix (I, I)."""
        side = SIDES[self.size][0]
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(side, side, generator=generator)
        return torch.linalg.qr(noise).Q if self.turned else torch.eye(side)

    def draws(self) -> Tensor:
        """Where particles start, (K, O, I)."""
        torch.manual_seed(0)
        num_inputs, num_outputs = SIDES[self.size]
        noise = torch.randn(NUM_PARTICLES, num_outputs, num_inputs)
        return (noise * self.spectrum.sqrt()) @ self.axes.mT

    def problem(self, num_heads: int = 1) -> Problem:
        """A linear network, its Pyro model and the data with this posterior."""
        num_inputs, num_outputs = SIDES[self.size]
        precision = 1 / self.spectrum
        flat = FLAT * precision.min()
        prior = pl.priors.normal(scale=float(flat**-0.5))
        lora = pl.lift(Heads(num_inputs, num_outputs, num_heads), prior=prior)

        def model(x: Tensor, y: Tensor) -> None:
            outputs = lora()(x)
            if y.ndim == 1:  # each output a datum, as function space wants it
                outputs = outputs.flatten(-2)
            with pyro.plate("data", len(y), subsample=y):
                fn = dist.Normal(outputs, 1.0).to_event(y.ndim - 1)
                pyro.sample("y", fn, obs=y)

        x = (precision - flat).sqrt()[:, None] * self.axes.mT
        return Problem(lora, model, {"x": x, "y": torch.zeros(num_inputs, num_outputs)})

    def summary(self, particles: Tensor) -> Variances:
        """What particles (K, O, I) keep."""
        along = (particles.detach() @ self.axes).var(0).mean(0)
        return variances(along, self.spectrum)


def variances(found: Tensor, expected: Tensor) -> Variances:
    """Compare variances along axes, wide ones first."""
    tenth = max(1, len(found) // 10)
    shares = found / expected
    return Variances(
        float(found.mean() / expected.mean()),
        float(shares[:tenth].mean()),
        float(shares[-tenth:].mean()),
    )
