"""The dense Gauss-Newton posterior of a two-class network, by algebra in data space.

The reference of ``python -m benchmarks.curvature_quality``: one backward pass for each
datum and (N, N) matrices, no code in common with the library's curvature.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import pyro_lora as pl
from benchmarks.encoder_top import CachedRows
from pyro_lora.ground.weights import Weights


def logit_jacobian(
    lora: pl.LiftedNetwork, weights: Weights, rows: CachedRows
) -> tuple[Tensor, Tensor]:
    """Difference f of the two logits, (N,), and its Jacobian (N, D), float64.

    Weights are flattened site by site, each row-major.
    """
    leaves = {site: x.clone().requires_grad_() for site, x in weights.items()}
    values, jacobian = [], []
    for i in range(len(rows)):
        batch = rows.batch([i])
        with lora.bind(leaves) as net:
            logits = net(batch["hidden"], batch["attention_mask"])[0]
        f = logits[1] - logits[0]
        found = torch.autograd.grad(f, list(leaves.values()))
        values.append(f.detach().double())
        jacobian.append(torch.cat([g.flatten() for g in found]).double())
    return torch.stack(values), torch.stack(jacobian)


def layers_of(jacobian: Tensor, like: Weights) -> list[tuple[str, Tensor]]:
    """The Jacobian as (site, (N, 1, O, I)) of each layer; I is 1 for a bias."""
    parts = jacobian.split([x.numel() for x in like.values()], 1)
    return [
        (site, layer.reshape(len(jacobian), 1, x.shape[1], -1))
        for (site, x), part in zip(like.items(), parts, strict=True)
        for layer in part.chunk(x.shape[0], 1)
    ]


@dataclass(frozen=True)
class DenseGGN:
    r"""Gaussian at the mode w with the precision :math:`\tau I + R^T R`.

    Row n of R, (N, D), is :math:`\sqrt{p_n (1 - p_n)} \, \partial f_n / \partial w`;
    the prior is N(0, 1 / tau). With the eigenvalues of :math:`R R^T = U \Lambda U^T`,
    :math:`\log\det P = D \log \tau + \sum_n \log(1 + \lambda_n / \tau)` and
    :math:`\tau P^{-1} = I - R^T U (\tau + \Lambda)^{-1} U^T R` (Woodbury).
    """

    mode: Tensor  # (D,)
    log_likelihood: Tensor
    roots: Tensor  # R
    values: Tensor  # (N,)
    basis: Tensor  # U, (N, N)

    def log_evidence(self, tau: float) -> float:
        """Laplace's log marginal likelihood, nats, full data."""
        num_weights = len(self.mode)
        log_prior = 0.5 * num_weights * math.log(tau / (2 * math.pi))
        log_prior -= 0.5 * tau * float(self.mode.square().sum())
        log_det = num_weights * math.log(tau)
        log_det += float((1 + self.values / tau).log().sum())
        volume = 0.5 * num_weights * math.log(2 * math.pi) - 0.5 * log_det
        return float(self.log_likelihood) + log_prior + volume

    def best_precision(self) -> float:
        """The prior precision with the largest evidence, by golden-section search."""
        low, high = math.log(1e-6), math.log(1e6)
        ratio = (math.sqrt(5) - 1) / 2
        while high - low > 1e-8:
            left, right = high - ratio * (high - low), low + ratio * (high - low)
            if self.log_evidence(math.exp(left)) > self.log_evidence(math.exp(right)):
                high = right
            else:
                low = left
        return math.exp((low + high) / 2)

    def variances(self, jacobian: Tensor, taus: Sequence[float]) -> Tensor:
        r"""Of f at other data: :math:`J P^{-1} J^T`, (Q, B) for Q prior precisions."""
        inside = (jacobian @ self.roots.mT @ self.basis).square()  # (B, N)
        total = jacobian.square().sum(1)
        return torch.stack(
            [(total - inside @ (1 / (tau + self.values))) / tau for tau in taus]
        )


def dense_ggn(lora: pl.LiftedNetwork, weights: Weights, rows: CachedRows) -> DenseGGN:
    """The posterior of ``rows`` around ``weights``."""
    f, jacobian = logit_jacobian(lora, weights, rows)
    roots = (f.sigmoid() * (-f).sigmoid()).sqrt()[:, None] * jacobian
    values, basis = torch.linalg.eigh(roots @ roots.mT)
    sign = 2.0 * rows.labels - 1
    return DenseGGN(
        mode=torch.cat([x.flatten() for x in weights.values()]).double(),
        log_likelihood=torch.nn.functional.logsigmoid(sign * f).sum(),
        roots=roots,
        values=values.clamp_min(0),
        basis=basis,
    )
