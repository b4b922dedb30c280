r"""Gaussian with one full precision matrix over all sites; for small models.

:math:`P = F + \mathrm{diag}(\tau) = R R^T` over vectors of all weights, flattened site
by site, each row-major: sites a of shape (1, 2) and b of shape (1,) at [[1, 2]] and [3]
are the vector (1, 2, 3). With the Cholesky factor R, :math:`\log \det P = 2 \sum \log
R_{ii}` and :math:`J P^{-1} J^T = |R^{-1} J^T|^2`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_lora.curvature.joint_distribution import (
    flatten_weights,
    sample_parts,
    unflatten_weights,
)
from pyro_lora.curvature.weight_gaussian import WeightGaussian, restored_precision
from pyro_lora.ground.checked_tensors import (
    DOUBLE,
    FLOAT32,
    CheckedTensors,
    check_definite,
)
from pyro_lora.ground.weights import Weights


@dataclass(frozen=True, eq=False, repr=False)
class DenseGaussian(WeightGaussian):
    """One Gaussian over all weights together.

    Attributes:
        loc: The mode, site -> value.
        prior_precision: Site -> tau, any shape that broadcasts over the site.
        fisher: (D, D), float64, nats, full data.
    """

    loc: Weights
    prior_precision: Weights
    fisher: Tensor

    kind: ClassVar[str] = "dense"

    @property
    def structure(self) -> str:
        """See the base class."""
        return "dense"

    @property
    def origin(self) -> Weights:
        """See the base class."""
        return self.loc

    @property
    def tensors(self) -> dict[str, Tensor]:
        """See the base class."""
        return {"fisher": self.fisher}

    @classmethod
    def restored(
        cls,
        loc: Weights,
        tensors: CheckedTensors,
        observations: tuple[Any, ...],
        in_dtypes: Callable[[Weights], Weights],
    ) -> DenseGaussian:
        """See the base class."""
        size = sum(x.numel() for x in loc.values())
        fisher = tensors.real("fisher", (size, size), DOUBLE)
        check_definite(fisher, f"tensor {tensors.prefix}fisher", floor=FLOAT32)
        gaussian = cls(loc, in_dtypes(restored_precision(loc, tensors)), fisher)
        gaussian.variance()  # raises where the precision isn't definite
        return gaussian

    def with_prior_precision(
        self, prior_precision: Mapping[str, Tensor]
    ) -> DenseGaussian:
        """See the base class."""
        return replace(self, prior_precision=dict(prior_precision))

    def sample(self, num_samples: int) -> Weights:
        """See the base class."""
        return unflatten_weights(
            self._normal.sample(torch.Size([num_samples])), self.loc
        )

    def log_prob(self, weights: Mapping[str, Tensor]) -> Tensor:
        """See the base class."""
        return self._normal.log_prob(flatten_weights(weights, self.loc))

    def variance(self) -> Weights:
        """See the base class."""
        return unflatten_weights(self._normal.variance, self.loc)

    def log_det(self, prior_precision: Mapping[str, Tensor]) -> Tensor:
        """See the base class."""
        return 2 * self._cholesky(prior_precision).diagonal().log().sum()

    def effective_parameters_by_layer(self) -> Weights:
        """See the base class."""
        # tr(F P^-1) = tr(P^-1 F), whose diagonal tells the layers apart.
        share = torch.cholesky_solve(self.fisher, self._root).diagonal()
        return {
            site: x.flatten(1).sum(1)
            for site, x in unflatten_weights(share, self.loc).items()
        }

    def informed_directions(self, num_directions: int) -> tuple[Weights, Tensor]:
        """See the base class."""
        # P = R R^T, so u with R^-1 F R^-T u = s u gives v = R^-T u.
        root = self._root
        half = torch.linalg.solve_triangular(root, self.fisher, upper=False)
        white = torch.linalg.solve_triangular(root, half.mT, upper=False)
        shares, vectors = torch.linalg.eigh(white)
        top = vectors[:, -num_directions:].flip(1)  # eigh has the largest last
        steps = torch.linalg.solve_triangular(root.mT, top, upper=True).mT
        loc = flatten_weights(self.loc, self.loc)
        return (
            unflatten_weights(steps.to(loc), self.loc),
            shares[-num_directions:].flip(0),
        )

    def covariance(
        self,
        jacobians: Iterable[tuple[str, Tensor]],
        prior_precisions: Sequence[Mapping[str, Tensor]],
    ) -> Tensor:
        """See the base class."""
        j = torch.cat([j.flatten(2) for _, j in jacobians], -1)  # (B, M, D)
        flat = j.flatten(0, 1).double()
        result = []
        for tau in prior_precisions:
            white = torch.linalg.solve_triangular(  # R^-1 J^T, (B, M, D) transposed
                self._cholesky(tau), flat.mT, upper=False
            ).mT.reshape(j.shape)
            result.append(white @ white.mT)
        return torch.stack(result).to(j)

    def pyro_sample(self, infer: Mapping[str, Any]) -> Weights:
        """See the base class; one auxiliary joint variable, the sites Deltas of it."""
        return sample_parts(self._normal, self.loc, infer)

    def _cholesky(self, tau: Mapping[str, Tensor]) -> Tensor:
        return _cholesky(self._precision(tau))

    def _precision(self, tau: Mapping[str, Tensor]) -> Tensor:
        full = {  # tau of every weight, (D,) once flattened
            site: tau[site].double().expand(x.shape) for site, x in self.loc.items()
        }
        return self.fisher + torch.diag_embed(flatten_weights(full, self.loc))

    @cached_property
    def _root(self) -> Tensor:
        return self._cholesky(self.prior_precision)

    @cached_property
    def _normal(self) -> dist.MultivariateNormal:
        # P = U U^T with U upper triangular: the covariance is U^-T U^-1.
        precision = self._precision(self.prior_precision)
        upper = _cholesky(precision.flip(0, 1)).flip(0, 1)
        identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
        root = torch.linalg.solve_triangular(upper.mT, identity, upper=False)
        loc = flatten_weights(self.loc, self.loc)
        return dist.MultivariateNormal(loc, scale_tril=root.to(loc))


def _cholesky(precision: Tensor) -> Tensor:
    root, info = torch.linalg.cholesky_ex(precision)
    if int(info):
        diagonal = precision.detach().diagonal()
        raise ValueError(
            "The dense precision, Fisher information plus prior precision, isn't "
            "positive definite; its diagonal runs from "
            f"{float(diagonal.min()):.3g} to {float(diagonal.max()):.3g}. Its digits "
            "don't resolve that: run the network in float64, or take a larger prior "
            "precision or a Kronecker structure."
        )
    return root
