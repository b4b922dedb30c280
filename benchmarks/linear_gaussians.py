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
    """Eigenvalues of a circulant covariance with marginal variances 1, by frequency."""
    half = condition ** -(torch.arange(size // 2 + 1) / max(1, size // 2))
    whole = torch.cat([half, half[1 : (size + 1) // 2].flip(0)])
    return half / whole.mean()


def filtered(x: Tensor, factors: Tensor) -> Tensor:
    """Multiply the Fourier coefficients along the last dim."""
    return torch.fft.irfft(torch.fft.rfft(x) * factors, n=x.shape[-1])


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
    """Of particles over those of the posterior: 1 is right, 0 is collapsed."""

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
    """A Gaussian over O rows of I weights, each with a circulant covariance.

    Attributes:
        size: D = I O.
        condition: Of the covariance.
    """

    size: int
    condition: float

    @property
    def eigenvalues(self) -> Tensor:
        """Of the covariance of a row, by frequency."""
        return spectrum(SIDES[self.size][0], self.condition)

    def draws(self) -> Tensor:
        """Where particles start, (K, O, I)."""
        torch.manual_seed(0)
        num_inputs, num_outputs = SIDES[self.size]
        noise = torch.randn(NUM_PARTICLES, num_outputs, num_inputs)
        return filtered(noise, self.eigenvalues.sqrt())

    def problem(self, num_heads: int = 1) -> Problem:
        """A linear network, its Pyro model and the data with this posterior."""
        num_inputs, num_outputs = SIDES[self.size]
        precision = 1 / self.eigenvalues
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

        x = filtered(torch.eye(num_inputs), (precision - flat).sqrt())
        return Problem(lora, model, {"x": x, "y": torch.zeros(num_inputs, num_outputs)})

    def summary(self, particles: Tensor) -> Variances:
        """What particles (K, O, I) keep."""
        particles = particles.detach()
        waves = torch.fft.rfft(particles - particles.mean(0), norm="ortho")
        along = waves.abs().square().sum(0).mean(0) / (NUM_PARTICLES - 1)
        return variances(particles.var(0), along / self.eigenvalues)


def variances(marginal: Tensor, along: Tensor) -> Variances:
    """Means of variances over the posterior's, along axes from wide to narrow."""
    tenth = max(1, len(along) // 10)
    parts = (marginal, along[:tenth], along[-tenth:])
    return Variances(*(float(x.mean()) for x in parts))
