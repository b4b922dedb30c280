"""Automatic relevance determination of the rank components of LoRA."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_lora.ground.settings import check_positive
from pyro_lora.ground.summary import FieldsShown
from pyro_lora.lifting.prior import Network
from pyro_lora.lifting.sites import lora_factor
from pyro_lora.priors.prior import hyper_name, over_event, sample_normal

# Which dim of a stacked site is the rank: A (L, R, I), B (L, O, R), E (L, R, 1).
_RANK_DIM = {"A": 1, "B": 2, "E": 1}


@dataclass(frozen=True, repr=False)
class rank_ard(FieldsShown):
    r"""One precision for each rank component, shared by A's row and B's column.

    .. math::
        A_{lr\cdot}, B_{l \cdot r} \sim N(0, \alpha_{lr}^{-1}), \quad
        \alpha_{lr} \sim \text{Gamma}(\nu / 2, \nu s^2 / 2)

    The automatic relevance determination of Bayesian PCA (Bishop 1999, section 3):
    :math:`\Delta W_l = \sum_r B_{l \cdot r} A_{lr\cdot}` uses as few components as the
    data need, the others get a large precision. For choosing the rank: start with more
    than needed, then count the components whose posterior
    :math:`\alpha_{lr}^{-1/2}` stands out. AdaLoRA's E shares the precision, too.

    A component is marginally multivariate Student-t with :math:`\nu` degrees of
    freedom and scale s. Unlike under other hierarchical priors the centred joint
    density is bounded, and there is a joint mode. It has, for a component :math:`w_r`
    of :math:`D_r` weights, :math:`\alpha = (D_r + \nu - 2) / (\|w_r\|^2 + \nu s^2)`.

    The hyper-latents are the sites ``prior.rank_precision.<A's site>``, (L, R).

    Args:
        scale: s, of the components that are in use.
        df: :math:`\nu`. Small: components differ more, and draws have heavier tails.
        other_scale: Standard deviation of the sites that aren't LoRA factors (heads,
            biases), normal; None is ``scale``.
        centered: False: the latents are ``<site>_decentered``, standard normal, and
            the sites are deterministic, w = scale times latent. The same
            distribution of the weights; for :math:`\nu < 2` without a joint mode.

    Raises:
        ValueError: If a number isn't positive and finite; when called, if there is no
            A, or a B or E has no A of the same module and rank.
    """

    scale: float = 1.0
    _: KW_ONLY
    df: float = 1.0
    other_scale: float | None = None
    centered: bool = True

    def __post_init__(self) -> None:
        check_positive("rank_ard: scale", self.scale)
        check_positive("rank_ard: df", self.df)
        if self.other_scale is not None:
            check_positive("rank_ard: other_scale", self.other_scale)

    def __call__(self, lora: Network) -> dict[str, Tensor]:
        """Sample every site and the precisions.

        Raises:
            ValueError: If there is no A, or a B or E has none of its module and rank.
        """
        all_zeros = lora.zeros()
        sds: dict[str, Tensor] = {}  # module path -> sd, (..., R)
        for site, names in lora.sites.items():
            factors = [lora_factor(name) for name in names]
            if factors[0] is None or factors[0][1] != "A":
                continue
            zeros = all_zeros[site]
            shape = zeros.shape[:2]  # (L, R)
            precision = pyro.sample(
                hyper_name("rank_precision", site),
                dist.Gamma(
                    zeros.new_full((), self.df / 2).expand(shape),
                    zeros.new_full((), self.df / 2 * self.scale**2),
                ).to_event(2),
            )
            sd = precision.rsqrt()
            sds |= {f[0]: sd[..., i, :] for i, f in enumerate(factors) if f}
        if not sds:
            raise ValueError(
                f"rank_ard needs LoRA matrices A and B, found only {list(lora.sites)}. "
                "Use normal or hierarchical for these sites."
            )
        weights = {}
        for site, zeros in all_zeros.items():
            factors = [lora_factor(name) for name in lora.sites[site]]
            if factors[0] is None:
                sd = zeros.new_full((), self.other_scale or self.scale)
            else:
                role = factors[0][1]
                rank = zeros.shape[_RANK_DIM[role]]
                sd = torch.stack(
                    [_sd(sds, site, f, rank, lora) for f in factors if f], -2
                ).to(zeros)  # (..., L, R)
                if role == "B":
                    sd = sd[..., None, :]
                sd = over_event(sd, zeros.ndim - 1 - _RANK_DIM[role])
            weights[site] = sample_normal(
                site, zeros, sd, zeros.ndim, centered=self.centered
            )
        return weights


def _sd(
    sds: dict[str, Tensor],
    site: str,
    factor: tuple[str, str],
    rank: int,
    lora: Network,
) -> Tensor:
    """Standard deviations of one layer's rank components, (..., R).

    Raises:
        ValueError: If the layer has no A, or one of another rank.
    """
    path, role = factor
    num_rows = sds[path].shape[-1] if path in sds else None
    if num_rows != rank:
        raise ValueError(
            f"Site {site!r}: expected an A of {path!r} with {rank} rows, this site's "
            f"rank, found {num_rows}. Give rank_ard A and B together."
        )
    num_experts = lora.num_experts(path)
    if role == "B" and num_experts is not None:
        # PEFT orders the components of stacked experts differently in A and B.
        experts = sds[path].unflatten(-1, (num_experts, -1))
        return experts.mT.flatten(-2)
    return sds[path]
