"""AdaLoRA's orthogonality penalty as a prior factor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

import pyro
import torch
from torch import Tensor

from pyro_lora.ground.autocast import outside_autocast
from pyro_lora.ground.settings import check_positive
from pyro_lora.ground.summary import FieldsShown
from pyro_lora.lifting.prior import Network, Prior, check_prior
from pyro_lora.lifting.sites import lora_factor
from pyro_lora.priors.independent import normal
from pyro_lora.priors.prior import hyper_name


@dataclass(frozen=True, repr=False)
class orthogonal(FieldsShown):
    r"""A base prior times AdaLoRA's orthogonality factor.

    .. math::
        p(w) \propto p_0(w) \exp\left( -\frac{\gamma}{2 L} \sum_l
            \|A_l A_l^T - I\|_F + \|B_l^T B_l - I\|_F \right)

    (Zhang et al. 2023, eq. 4, https://arxiv.org/abs/2303.10512, with norms that aren't
    squared and their mean over all 2 L matrices, as PEFT computes it.) For AdaLoRA,
    :math:`\Delta W = s B \mathrm{diag}(E) A`, whose E are singular values only where A
    and B have orthonormal rows and columns.

    PEFT adds ``orth_reg_weight`` times that mean to the mean loss of a batch. A log
    joint is a sum over all data in nats, so the same optimum has ``strength =
    orth_reg_weight * num_data`` (times the tokens of a datum where the loss is a mean
    over tokens).

    It is a factor (``pyro.factor``), not normalised: engines that score the model see
    it, while ``Predictive`` without a posterior draws from :math:`p_0`.

    Args:
        strength: :math:`\gamma`, nats.
        prior: :math:`p_0`, a proper prior over every site; None is
            ``priors.normal(scale=1.0)``.

    Raises:
        ValueError: If the strength isn't positive and finite, or (when called) there
            are no LoRA matrices.
    """

    strength: float
    _: KW_ONLY
    prior: Prior | None = None

    def __post_init__(self) -> None:
        check_positive("orthogonal: strength", self.strength)
        check_prior("orthogonal: prior", self.prior)

    def __call__(self, lora: Network) -> dict[str, Tensor]:
        """Sample every site by the base prior, and multiply by the factor."""
        weights = (normal(1.0) if self.prior is None else self.prior)(lora)
        penalty = orthogonality_penalty(lora.sites, weights)
        pyro.factor(
            hyper_name("orthogonal", next(iter(lora.sites))), -self.strength * penalty
        )
        return weights


@outside_autocast()
def orthogonality_penalty(
    sites: Mapping[str, tuple[str, ...]], weights: Mapping[str, Tensor]
) -> Tensor:
    r"""Mean over all A and B of :math:`\|A A^T - I\|_F` and :math:`\|B^T B - I\|_F`.

    Args:
        sites: As ``lora.sites``.
        weights: Site -> (..., L, R, I) or (..., L, O, R).

    Returns:
        (...).

    Raises:
        ValueError: If no site is an A or a B.
    """
    total: Tensor | float = 0.0
    count = 0
    for site, names in sites.items():
        factor = lora_factor(names[0])
        if factor is None or factor[1] == "E":
            continue
        value = weights[site]
        rows = (
            value if factor[1] == "A" else value.mT
        )  # (..., L, R, I) or (..., L, R, O)
        gram = rows @ rows.mT
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        # Not squared, so that its gradient doesn't vanish as A A^T approaches I.
        total = total + torch.linalg.matrix_norm(gram - eye).sum(-1)
        count += len(names)
    if not count:
        raise ValueError(
            f"orthogonal needs LoRA matrices A and B, found only {list(sites)}. Use "
            "another prior for these sites."
        )
    return torch.as_tensor(total / count)
