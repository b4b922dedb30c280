"""Priors under which all weights are independent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_lora.ground.settings import check_number, check_positive
from pyro_lora.ground.summary import FieldsShown
from pyro_lora.ground.synchronisation import scalar
from pyro_lora.ground.weights import check_weights
from pyro_lora.lifting.prior import Network

Scale = float | Mapping[str, float | Tensor]
Center = float | Literal["init"] | Mapping[str, Tensor]


@dataclass(frozen=True, repr=False)
class normal(FieldsShown):
    r"""Independent :math:`N(m, \sigma^2)` on every weight.

    The one to start with. Its precision :math:`1 / \sigma^2` is what L2 regularisation
    calls weight decay (in nats, for the full data set).

    Args:
        scale: Standard deviation :math:`\sigma`: one number; or for each site name a
            number or a tensor that broadcasts over the site's (L, ...).
        center: Mean m: a number; ``"init"`` for the adapter as it was lifted, since
            with PiSSA, OLoRA and other initialisations that are taken out of the base
            weight it is that adapter, not zero, that leaves the network unchanged; or
            weights, site -> (L, ...), another adapter's for example.

    Raises:
        ValueError: If a scale isn't positive and finite, or (when called) names or
            shapes aren't those of the network's sites.

    >>> normal(scale=3.0)
    normal(scale=3.0, center=0.0)
    """

    scale: Scale = 1.0
    _: KW_ONLY
    center: Center = 0.0

    def __post_init__(self) -> None:
        _check(self.scale, self.center)

    def __call__(self, lora: Network) -> dict[str, Tensor]:
        """Sample every site, event dims as in ``lora.weights()``."""
        return _sample(lora, dist.Normal, self.scale, self.center)


@dataclass(frozen=True, repr=False)
class laplace(FieldsShown):
    r"""Independent Laplace, :math:`p(w) = \exp(-|w - m| / b) / (2 b)`, on every weight.

    For sparse modes: its MAP is L1 regularisation (the lasso; Tibshirani 1996,
    section 5). Its draws aren't sparse; where uncertainty matters, too, a
    ``horseshoe`` separates zero from large more clearly.

    Args:
        scale: b, as in :func:`normal`; the standard deviation is :math:`\sqrt 2 b`.
        center: m, as in :func:`normal`.

    Raises:
        ValueError: As :func:`normal`.
    """

    scale: Scale = 1.0
    _: KW_ONLY
    center: Center = 0.0

    def __post_init__(self) -> None:
        _check(self.scale, self.center)

    def __call__(self, lora: Network) -> dict[str, Tensor]:
        """Sample every site."""
        return _sample(lora, dist.Laplace, self.scale, self.center)


@dataclass(frozen=True, repr=False)
class student_t(FieldsShown):
    r"""Independent Student-t with :math:`\nu` degrees of freedom on every weight.

    :math:`p(w) \propto (1 + (w - m)^2 / (\nu s^2))^{-(\nu + 1) / 2}`: most weights
    near m, a few far away, which a normal prior would pull back. Heavy-tailed priors
    suit trained weights better than a normal one (Fortuin et al. 2022,
    https://arxiv.org/abs/2102.06571).

    Args:
        df: :math:`\nu`; 1 is a Cauchy, the variance is infinite up to 2.
        scale: s, as in :func:`normal`; above two degrees of freedom the standard
            deviation is :math:`s \sqrt{\nu / (\nu - 2)}`.
        center: m, as in :func:`normal`.

    Raises:
        ValueError: As :func:`normal`, or if ``df`` isn't positive and finite.
    """

    df: float
    scale: Scale = 1.0
    _: KW_ONLY
    center: Center = 0.0

    def __post_init__(self) -> None:
        check_positive("Degrees of freedom df", self.df)
        _check(self.scale, self.center)

    def __call__(self, lora: Network) -> dict[str, Tensor]:
        """Sample every site."""

        def fn(loc: Tensor, scale: Tensor) -> dist.TorchDistribution:
            return dist.StudentT(loc.new_full((), self.df), loc, scale)

        return _sample(lora, fn, self.scale, self.center)


def _check(scale: Scale, center: Center) -> None:
    scales = dict(scale) if isinstance(scale, Mapping) else {"every site": scale}
    for site, value in scales.items():
        if not isinstance(value, Tensor):
            check_positive(f"Prior scale for {site!r}", value)
        elif not ((value > 0).all() and torch.isfinite(value).all() and value.numel()):
            raise ValueError(
                f"Prior scale for {site!r} must be positive and finite, found {value}."
            )
    if isinstance(center, str) and center != "init":
        raise ValueError(
            f"Prior center must be a number, 'init' or a mapping of weights, found "
            f"{center!r}."
        )
    if isinstance(center, Mapping):
        check_weights(center, "Prior center")
    elif not isinstance(center, str):
        check_number("Prior center", center)


def _sample(
    lora: Network,
    fn: Callable[[Tensor, Tensor], dist.TorchDistribution],
    scale: Scale,
    center: Center,
) -> dict[str, Tensor]:
    # "init", the only word that is left
    locs = lora.initial_weights if isinstance(center, str) else center
    for what, values in (("scales", scale), ("centers", locs)):
        if isinstance(values, Mapping) and values.keys() != lora.sites.keys():
            wrong = sorted(values.keys() ^ lora.sites.keys())
            raise ValueError(
                f"Prior {what} and sites differ in {wrong}: give one for each name "
                "in lora.sites, or one number for all."
            )
    weights = {}
    for site, zeros in lora.zeros().items():
        loc = _over_site(locs, site, zeros, "center")
        sd = _over_site(scale, site, zeros, "scale")
        weights[site] = pyro.sample(site, fn(loc, sd).to_event(zeros.ndim))
    return weights


def _over_site(
    values: float | Mapping[str, float | Tensor] | Mapping[str, Tensor],
    site: str,
    zeros: Tensor,
    what: str,
) -> Tensor:
    value = values[site] if isinstance(values, Mapping) else values
    tensor = scalar(value, zeros)
    try:
        return tensor.expand(zeros.shape)
    except RuntimeError as error:
        raise ValueError(
            f"Site {site!r}: expected a prior {what} that broadcasts over "
            f"{tuple(zeros.shape)}, found shape {tuple(tensor.shape)}. Shapes are "
            "those of lora.weights()."
        ) from error
