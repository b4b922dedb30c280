"""Brute force for tiny networks: Jacobians by autograd, whole matrices, inverses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora.curvature.fisher import TermsFunction, exact_terms
from pyro_lora.curvature.fit import FisherFit, FisherPasses
from pyro_lora.curvature.structures import KFAC, KroneckerFactors, LayerStructure
from tests.networks import inputs

Batch = dict[str, Tensor]

# assert_close allows 1e-7 in float64; these are equal but for rounding.
assert_same: Callable[..., None] = partial(assert_close, rtol=1e-9, atol=1e-11)


def flatten(weights: dict[str, Tensor]) -> Tensor:
    """Sites in order, row-major, (D,)."""
    return torch.cat([value.flatten() for value in weights.values()])


def unflatten(flat: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`flatten`; any leading dims."""
    by_site = flat.split([value.numel() for value in like.values()], -1)
    return {
        site: part.reshape(*flat.shape[:-1], *like[site].shape)
        for site, part in zip(like, by_site, strict=True)
    }


def precision_matrix(posterior: pl.LaplacePosterior) -> Tensor:
    """Minus the Hessian of the log density, (D, D)."""
    mode = posterior.mode()

    def log_prob(flat: Tensor) -> Tensor:
        return posterior.log_prob(unflatten(flat, mode))

    # All rows at once: some hundred backward passes, each of next to nothing.
    return -torch.autograd.functional.hessian(log_prob, flatten(mode), vectorize=True)


def blocks(lora: pl.LiftedNetwork) -> list[tuple[str, int, slice]]:
    """Each layer of each site and its place among all weights."""
    result, start = [], 0
    for site, value in lora.weights().items():
        for layer in range(value.shape[0]):
            stop = start + value[layer].numel()
            result.append((site, layer, slice(start, stop)))
            start = stop
    return result


def jacobian(lora: pl.LiftedNetwork, texts: Batch) -> tuple[Tensor, Tensor]:
    """Logits (B, C) and their Jacobian (B, C, D) at the adapter's weights."""
    weights = lora.weights()

    def logits(flat: Tensor) -> Tensor:
        with lora.bind(unflatten(flat, weights)) as net:
            output: Tensor = net(**inputs(texts)).logits
        return output

    flat = flatten(weights)
    return logits(flat), torch.autograd.functional.jacobian(logits, flat)


@dataclass(frozen=True)
class BruteForce:
    """Laplace's approximation for a classifier under a N(0, 1/tau) prior."""

    logits: Tensor  # (N, C)
    jacobian: Tensor  # (N, C, D)
    labels: Tensor  # (N,)
    weights: Tensor  # (D,)
    precision: Tensor  # of the prior, (D,)

    @property
    def hessian(self) -> Tensor:
        """Of -log p(y) in the logits, (N, C, C)."""
        p = self.logits.softmax(-1)
        return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]

    @property
    def fisher(self) -> Tensor:
        """The generalised Gauss-Newton matrix, (D, D)."""
        j, h = self.jacobian, self.hessian
        return torch.einsum("ncd,nce,nef->df", j, h, j)

    @property
    def covariance(self) -> Tensor:
        return torch.linalg.inv(self.fisher + torch.diag(self.precision))

    @property
    def log_evidence(self) -> Tensor:
        log_p = self.logits.log_softmax(-1)
        log_likelihood = log_p.gather(1, self.labels[:, None]).sum()
        quadratic = 0.5 * (self.precision * self.weights.square()).sum()
        p = self.fisher + torch.diag(self.precision)
        log_dets = 0.5 * self.precision.log().sum() - 0.5 * torch.logdet(p)
        return log_likelihood - quadratic + log_dets

    def logit_covariance(self, texts_jacobian: Tensor) -> Tensor:
        """Of the logits, their mean over classes removed, (B, C, C)."""
        j = texts_jacobian - texts_jacobian.mean(1, keepdim=True)
        return j @ self.covariance @ j.mT


def brute_force(
    lora: pl.LiftedNetwork, texts: Batch, precision: float | Tensor
) -> BruteForce:
    logits, j = jacobian(lora, texts)
    weights = flatten(lora.weights())
    tau = torch.as_tensor(precision, dtype=weights.dtype).expand_as(weights)
    return BruteForce(logits, j, texts["labels"], weights, tau)


def split(texts: Batch, batch_size: int) -> list[Batch]:
    """The same data in batches."""
    num_data = len(texts["labels"])
    return [
        {name: value[start : start + batch_size] for name, value in texts.items()}
        for start in range(0, num_data, batch_size)
    ]


def laplace(
    lora: pl.LiftedNetwork, texts: Batch, batch_size: int | None = None, **options: Any
) -> pl.LaplacePosterior:
    """Laplace's approximation around the adapter, through the public names."""
    num_data = len(texts["labels"])
    model = pl.models.classification(lora, num_data)
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter(), **options)
    return guide.laplace_approximation(split(texts, batch_size or num_data))


class CountingTokens(LayerStructure):
    """KFAC that keeps how many tokens count in each batch and layer."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def input_factor(self, a: Tensor, counts: Any) -> Any:
        return KFAC().input_factor(a, counts)

    def gradient_factor(self, inputs: Any, g: Tensor, counts: Any) -> Tensor:
        return KFAC().gradient_factor(inputs, g, counts)

    def combine(self, inputs: Any, gradients: Tensor) -> KroneckerFactors:
        factors = KFAC().combine(inputs, gradients)
        self.counts.append(int(factors.count))
        return factors


def fit(
    lora: pl.LiftedNetwork,
    model: Any,
    batches: list[Batch],
    terms: TermsFunction = exact_terms,
    obs_site: Any = None,
    structure: Any = pl.structures.Dense(),
) -> FisherFit:
    """What passes over the data sum at the adapter's own weights."""
    return FisherPasses(
        model=model,
        networks=[lora],
        values=lora.weights(),
        sites=lora.sites,
        structure=structure,
        fisher_terms=terms,
        obs_site=obs_site,
    ).fit(batches)


def fisher(fitted: FisherFit) -> Tensor:
    """(D, D)."""
    matrix: Tensor = fitted.gaussian.fisher  # type: ignore[attr-defined]
    return matrix
