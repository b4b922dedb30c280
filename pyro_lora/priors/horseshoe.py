"""The regularised horseshoe: most weights at zero, the others free up to a slab."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_lora.ground.settings import check_positive, check_word
from pyro_lora.ground.summary import FieldsShown
from pyro_lora.lifting.prior import Network
from pyro_lora.priors.prior import aligned, hyper_name, over_event, sample_normal


@dataclass(frozen=True, repr=False)
class horseshoe(FieldsShown):
    r"""Regularised horseshoe: shrinks most weights to zero and leaves a few alone.

    .. math::
        w_j \sim N(0, \tau^2 \tilde\lambda_j^2), \quad
        \tilde\lambda_j^2 = \frac{c^2 \lambda_j^2}{c^2 + \tau^2 \lambda_j^2}, \quad
        \lambda_j \sim C^+(0, 1), \quad \tau \sim C^+(0, \tau_0), \quad
        c^2 \sim \text{Inv-Gamma}(\nu / 2, \nu s^2 / 2)

    (Piironen & Vehtari 2017, sections 2.3 and 3, https://arxiv.org/abs/1707.01694).
    For an adapter of which a small part should matter, or to find which: a weight with
    :math:`\tau \lambda_j \ll c` is shrunk by the horseshoe, one with
    :math:`\tau \lambda_j \gg c` is Student-t with scale s and :math:`\nu` degrees of
    freedom. :math:`\tau` and c are shared by all sites.

    The hyper-latents are the sites ``prior.global_scale.<first site>``,
    ``prior.slab_variance.<first site>`` and ``prior.local_scale.<site>``. The joint
    density is unbounded as scales and weights go to zero together, so a joint mode
    doesn't exist: for MAP take ``centered=False``; for NUTS either, whichever mixes
    better.

    Args:
        global_scale: :math:`\tau_0`. With p of D weights thought to matter, N data and
            pseudo noise :math:`\sigma` (2 for a balanced binary label), the paper's
            choice is :math:`\frac{p}{D - p} \frac{\sigma}{\sqrt N}` (section 3.3).
        slab_scale: s, the scale of the weights that matter.
        slab_df: :math:`\nu`.
        per: One :math:`\lambda_j` for each weight, or for each row of each matrix (a
            rank component of A, an output of B or of a head, an entry of a vector).
        centered: False: the latents are ``<site>_decentered``, standard normal, and
            the sites are deterministic, w = scale times latent. The same
            distribution of the weights.

    Raises:
        ValueError: If a number isn't positive and finite, or ``per`` is unknown.
    """

    global_scale: float = 0.1
    _: KW_ONLY
    slab_scale: float = 1.0
    slab_df: float = 4.0
    per: Literal["weight", "row"] = "weight"
    centered: bool = True

    def __post_init__(self) -> None:
        check_positive("horseshoe: global_scale", self.global_scale)
        check_positive("horseshoe: slab_scale", self.slab_scale)
        check_positive("horseshoe: slab_df", self.slab_df)
        check_word("horseshoe: per", self.per, ("weight", "row"))

    def __call__(self, lora: Network) -> dict[str, Tensor]:
        """Sample every site and its scales."""
        all_zeros = lora.zeros()
        first, like = next(iter(all_zeros.items()))
        tau = pyro.sample(
            hyper_name("global_scale", first),
            dist.HalfCauchy(like.new_full((), self.global_scale)),
        )
        slab_variance = pyro.sample(
            hyper_name("slab_variance", first),
            dist.InverseGamma(
                like.new_full((), self.slab_df / 2),
                like.new_full((), self.slab_df / 2 * self.slab_scale**2),
            ),
        )
        weights = {}
        for site, zeros in all_zeros.items():
            # A site is (L, rows, ...); a stack of vectors has rows of one entry.
            num_dims = zeros.ndim if self.per == "weight" else min(zeros.ndim, 2)
            shape = zeros.shape[:num_dims]
            local = pyro.sample(
                hyper_name("local_scale", site),
                dist.HalfCauchy(zeros.new_ones(()).expand(shape)).to_event(num_dims),
            )
            lambdas, taus, slabs = aligned(
                (local, num_dims),
                (over_event(tau, num_dims).to(zeros), num_dims),
                (over_event(slab_variance, num_dims).to(zeros), num_dims),
            )
            scale = over_event(
                regularized_scale(taus, lambdas, slabs), zeros.ndim - num_dims
            )
            weights[site] = sample_normal(
                site, zeros, scale, zeros.ndim, centered=self.centered
            )
        return weights


def regularized_scale(tau: Tensor, local: Tensor, slab_variance: Tensor) -> Tensor:
    r""":math:`\tau \tilde\lambda = \tau \lambda c / \sqrt{c^2 + \tau^2 \lambda^2}`.

    Never 0, which a half-Cauchy draw can be once in 2^24 draws and no scale may be.
    """
    # hypot squares neither of the two, which over- and underflow for a Cauchy's draws.
    slab = slab_variance.sqrt()
    wide = tau * local
    scale = slab * (wide / torch.hypot(slab, wide))
    return scale.clamp_min(torch.finfo(scale.dtype).tiny)
