"""Structures that a user might write, with factors of ours and of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import pyro_lora as pl
from pyro_lora.curvature.dense_gaussian import DenseGaussian
from pyro_lora.curvature.structures import (
    BatchStructure,
    DenseFactors,
    EigenFactors,
    Factors,
    LayerStructure,
    SummedFactors,
)
from pyro_lora.curvature.weight_gaussian import WeightGaussian
from pyro_lora.ground.checked_tensors import CheckedTensors
from pyro_lora.ground.ranks import ALONE, Ranks
from pyro_lora.ground.weights import Weights


@dataclass(frozen=True)
class LayerDense(LayerStructure):
    """Each layer's whole block, by our factors and a Gaussian of its own."""

    def input_factor(self, a: Tensor, counts: Any) -> Tensor:
        return a

    def gradient_factor(self, inputs: Tensor, g: Tensor, counts: Any) -> Tensor:
        return pl.structures.Dense().factors([inputs], [g]).matrix

    def combine(self, inputs: Tensor, gradients: Tensor) -> DenseFactors:
        return DenseFactors(gradients)

    def gaussian(
        self,
        loc: Weights,
        prior_precision: Weights,
        factors: Factors,
        next_pass: Callable[[BatchStructure], Factors],
        ranks: Ranks = ALONE,
    ) -> WeightGaussian:
        blocks = [factors[i].matrix.double() for i in range(len(factors))]
        return DenseGaussian(loc, prior_precision, torch.block_diag(*blocks))


@dataclass(frozen=True)
class Squares(EigenFactors):
    """A diagonal under a name that KFAC's factors have for something shared."""

    a: Tensor
    n: Tensor

    @property
    def matrices(self) -> dict[str, Tensor]:
        return {}

    def eigenvalues(self, spectra: Mapping[str, Tensor], what: str) -> Tensor:
        return self.a * self.n

    @classmethod
    def restored(cls, tensors: CheckedTensors, shape: Sequence[int]) -> Squares:
        shape = (*shape, 1)[:2]
        return cls(tensors.not_negative("a", shape), tensors.not_negative("n", ()))


@dataclass(frozen=True)
class OwnFactors(LayerStructure):
    """The exact diagonal times the number of tokens that count, which layers share."""

    def input_factor(self, a: Tensor, counts: Any) -> tuple[Tensor, Tensor]:
        return a, counts.mask.sum().to(a)

    def gradient_factor(
        self, inputs: tuple[Tensor, Tensor], g: Tensor, counts: Any
    ) -> Tensor:
        return pl.structures.Diagonal().gradient_factor(inputs[0], g, counts)

    def combine(
        self, inputs: tuple[Tensor, Tensor], gradients: Tensor
    ) -> SummedFactors:
        return Squares(gradients, inputs[1])
