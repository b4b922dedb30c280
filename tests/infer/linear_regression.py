"""Bayesian linear regression as a lifted network, with its closed forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_lora as pl
from tests.curvature.gauss_newton import unflatten

PRIOR_SD, NOISE_SD = 0.8, 0.5
NUM_DATA, NUM_FEATURES = 12, 3


@dataclass(frozen=True, eq=False)
class LinearRegression:
    """y = x w + b + noise; weights (3,) and bias (1,) have a N(0, .8^2) prior.

    The features are centred and orthogonal, so that neither the blocks nor the weights
    are correlated: every structure is exact.
    """

    lora: pl.LiftedNetwork
    x: Tensor  # (N, 3)
    y: Tensor  # (N,)
    prior_sd: float

    @property
    def design(self) -> Tensor:
        return torch.cat([self.x, torch.ones_like(self.x[:, :1])], 1)  # (N, 4)

    @property
    def precision(self) -> Tensor:
        """Of the posterior, (4, 4)."""
        gram = self.design.mT @ self.design / NOISE_SD**2
        return gram + torch.eye(4).double() / self.prior_sd**2

    @property
    def mode(self) -> Tensor:
        return torch.linalg.solve(self.precision, self.design.mT @ self.y / NOISE_SD**2)

    @property
    def log_evidence(self) -> Tensor:
        covariance = self.prior_sd**2 * self.design @ self.design.mT
        covariance += NOISE_SD**2 * torch.eye(NUM_DATA).double()
        mean = torch.zeros(NUM_DATA).double()
        log_prob: Tensor = dist.MultivariateNormal(mean, covariance).log_prob(self.y)
        return log_prob

    def model(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        loc = self.lora()(x)[..., 0]
        with pyro.plate("data", NUM_DATA, subsample=x):
            return pyro.sample("y", dist.Normal(loc, NOISE_SD), obs=y)

    @property
    def batches(self) -> list[dict[str, Tensor]]:
        return [{"x": self.x[i : i + 5], "y": self.y[i : i + 5]} for i in (0, 5, 10)]

    @property
    def whole(self) -> dict[str, Tensor]:
        return {"x": self.x, "y": self.y}

    def guide(self, **options: Any) -> pl.AutoLaplace:
        """At the closed form's mode."""
        weights = unflatten(self.mode, self.lora.weights())
        start = self.lora.init_to(weights)
        return pl.AutoLaplace(self.model, init_loc_fn=start, **options)

    def laplace(self, **options: Any) -> pl.LaplacePosterior:
        return self.guide(**options).laplace_approximation(self.batches)


def linear_regression(
    prior_sd: float = PRIOR_SD, orthogonal: bool = True
) -> LinearRegression:
    network = nn.Linear(NUM_FEATURES, 1).double()
    x = torch.randn(NUM_DATA, NUM_FEATURES + 1, dtype=torch.float64)
    if orthogonal:
        x[:, 0] = 1
        x = torch.linalg.qr(x).Q * torch.tensor([1.0, 2.0, 3.0, 0.5]).double()
    x = x[:, 1:]
    y = x @ torch.randn(NUM_FEATURES).double() + 0.5 * torch.randn(NUM_DATA) + 1
    lora = pl.lift(network, prior=pl.priors.normal(scale=prior_sd))
    return LinearRegression(lora, x, y, prior_sd)
