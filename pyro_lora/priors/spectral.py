"""Priors on the update of a layer itself, Delta W = s B A."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import torch
from torch import Tensor

from pyro_lora.ground.autocast import outside_autocast
from pyro_lora.ground.settings import check_function, check_positive
from pyro_lora.ground.summary import FieldsShown
from pyro_lora.lifting.prior import Network, Prior, check_prior
from pyro_lora.lifting.sites import lora_factor
from pyro_lora.priors.independent import normal
from pyro_lora.priors.prior import hyper_name

SpectralPenalty = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, repr=False)
class spectral(FieldsShown):
    r"""A base prior times a factor of every layer's update :math:`\Delta W = s B A`.

    .. math::
        p(w) \propto p_0(w) \prod_l \exp\left(
            -\frac{\|\Delta W_l\|_F^2}{2 \sigma^2}
            - h(\sigma_1(\Delta W_l), \ldots, \sigma_R(\Delta W_l)) \right)

    For saying how far a layer may move, in terms that don't depend on how
    :math:`\Delta W` is split into B and A (which the base prior :math:`p_0` alone
    identifies). ``penalty=lambda s: s.sum(-1) / b`` is the nuclear norm, which favours
    low rank (Fazel et al. 2001).

    **It is a factor, not a density with a change of variables**: the sites are sampled
    from :math:`p_0`, then ``pyro.factor`` multiplies the density, without
    normalisation. So an engine that scores the model (SVI, MCMC, SVGD) sees the
    prior above; ``Predictive`` without a posterior draws from :math:`p_0`, and an
    evidence lacks a constant that depends on :math:`\sigma` and h.

    Nothing of size O x I is formed: :math:`\|B A\|_F^2 = \mathrm{tr}(B^T B A A^T)`, and
    with thin QR factors :math:`B = Q_B R_B`, :math:`A^T = Q_A R_A` the singular values
    are those of :math:`R_B R_A^T`, R x R. Gradients are exact, also where B = 0.
    Second derivatives are exact for the Frobenius norm, but not for ``penalty``.

    Args:
        frobenius_scale: :math:`\sigma`; None leaves the norm out.
        penalty: h, from the singular values of one layer, (..., R), largest first, to
            nats, (...).
        prior: :math:`p_0`, a proper prior over every site; None is
            ``priors.normal(scale=1.0)``.

    Raises:
        ValueError: If neither norm nor penalty is given, the scale isn't positive and
            finite, or (when called) there is no LoRA update, an A or B lacks its
            partner, or the penalty gives a wrong shape.
    """

    frobenius_scale: float | None = None
    penalty: SpectralPenalty | None = None
    prior: Prior | None = None

    def __post_init__(self) -> None:
        if self.frobenius_scale is None and self.penalty is None:
            raise ValueError(
                "spectral got neither frobenius_scale nor penalty: give one, or use "
                "its base prior alone."
            )
        if self.frobenius_scale is not None:
            check_positive("spectral: frobenius_scale", self.frobenius_scale)
        if self.penalty is not None:
            expected = "a function of singular values"
            check_function("spectral: penalty", self.penalty, expected)
        check_prior("spectral: prior", self.prior)

    def __call__(self, lora: Network) -> dict[str, Tensor]:
        """Sample every site by the base prior, and multiply by the factor.

        Raises:
            ValueError: If there is no update, or the penalty gives a wrong shape.
        """
        weights = (normal(1.0) if self.prior is None else self.prior)(lora)
        factors = lora.delta_weight_factors(weights)
        _check_complete(lora, factors)
        total: Tensor | float = 0.0
        for b, a in _stacks(factors):
            if self.frobenius_scale is not None:
                squares = squared_frobenius_norm(b, a)  # (..., layers)
                total = total + squares.sum(-1) / (2 * self.frobenius_scale**2)
            if self.penalty is not None:
                values = singular_values(b, a)  # (..., layers, R)
                nats = self.penalty(values)
                if nats.shape != values.shape[:-1]:
                    raise ValueError(
                        f"spectral: expected penalty to give {tuple(values.shape[:-1])}"
                        f" from singular values {tuple(values.shape)}, found "
                        f"{tuple(nats.shape)}. Reduce their last dim."
                    )
                total = total + nats.sum(-1)
        name = hyper_name("spectral", next(iter(lora.sites)))
        pyro.factor(name, -torch.as_tensor(total))
        return weights


@outside_autocast()
def squared_frobenius_norm(b: Tensor, a: Tensor) -> Tensor:
    r""":math:`\|B A\|_F^2 = \mathrm{tr}(B^T B A A^T)`.

    Args:
        b: (..., O, R).
        a: (..., R, I).

    Returns:
        (...).
    """
    # tr(X Y) is the sum of X * Y^T, and both Gram matrices (..., R, R) are symmetric.
    return ((b.mT @ b) * (a @ a.mT)).sum((-2, -1))


@outside_autocast()
def singular_values(b: Tensor, a: Tensor) -> Tensor:
    r"""Singular values of B A, largest first, with exact first derivatives.

    The orthonormal bases are constants for autograd: with u, v the singular vectors in
    full space, :math:`d \sigma = u^T d(B A) v` holds for any bases that contain them,
    whereas the derivative of a QR decomposition doesn't exist at B = 0.

    Args:
        b: (..., O, R).
        a: (..., R, I).

    Returns:
        (..., min(O, R, I)).
    """
    with torch.no_grad():
        rows = torch.linalg.qr(b).Q  # (..., O, min(O, R))
        columns = torch.linalg.qr(a.mT).Q  # (..., I, min(I, R))
    # B A = Q_B (Q_B^T B A Q_A) Q_A^T, and orthonormal Q leave singular values alone.
    return torch.linalg.svdvals((rows.mT @ b) @ (a @ columns))


def _stacks(
    factors: dict[str, tuple[Tensor, Tensor]],
) -> list[tuple[Tensor, Tensor]]:
    """Layers of one shape together: (..., layers, O, R) and (..., layers, R, I)."""
    groups = defaultdict(list)
    for b, a in factors.values():
        groups[b.shape[-2:], a.shape[-2:], a.device].append((b, a))
    stacks = []
    for layers in groups.values():
        lead = torch.broadcast_shapes(*(x.shape[:-2] for pair in layers for x in pair))
        b, a = (
            torch.stack([x.expand(*lead, *x.shape[-2:]) for x in part], -3)
            for part in zip(*layers, strict=True)
        )
        stacks.append((b, a))
    device = stacks[0][0].device if stacks else None
    return [(b.to(device), a.to(device)) for b, a in stacks]


def _check_complete(lora: Network, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
    for site, names in lora.sites.items():
        for name in names:
            factor = lora_factor(name)
            if factor is None:
                continue
            layer = lora.network.get_submodule(factor[0])
            if factor[0] not in factors or lora.num_experts(factor[0]) is not None:
                raise ValueError(
                    f"Site {site!r}: expected both A and B of a linear layer, found "
                    f"{type(layer).__name__} {factor[0]!r} without an update B A of "
                    "these sites. Give spectral A and B together, other layers another "
                    "prior by by_site."
                )
    if not factors:
        raise ValueError(
            f"spectral needs LoRA matrices A and B, found only {list(lora.sites)}. Use "
            "another prior for these sites."
        )
