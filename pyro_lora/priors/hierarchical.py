"""A scale for each layer, partially pooled over layers and roles."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_lora.ground.settings import check_positive
from pyro_lora.ground.summary import FieldsShown
from pyro_lora.lifting.prior import Network
from pyro_lora.priors.prior import aligned, hyper_name, over_event, sample_normal


@dataclass(frozen=True, repr=False)
class hierarchical(FieldsShown):
    r"""A scale for each layer of each site, partially pooled over layers and roles.

    .. math::
        w_{sl} \sim N(0, e^{2 \eta_{sl}}), \quad
        \eta_{sl} \sim N(\mu_s, \sigma_\text{layer}^2), \quad
        \mu_s \sim N(\mu, \sigma_\text{role}^2), \quad
        \mu \sim N(\log \text{scale}, \text{spread}^2)

    with half-normal :math:`\sigma_\text{role}, \sigma_\text{layer}` (Gelman & Hill
    2007, chapter 12; Gelman 2006 on such spreads). For adapters on many layers, when
    layers may need updates of different size and nobody wants to tune each: a layer
    that the data say little of borrows its scale from the others.

    The hyper-latents are the sites ``prior.log_scale.<site>`` (L,), and
    ``prior.mean_log_scale``, ``prior.role_spread``, ``prior.layer_spread`` and
    ``prior.role_log_scale`` (one for each site), all with ``.<first site>``.

    Args:
        scale: Typical standard deviation of a weight, the median of :math:`e^\mu`.
        scale_spread: Standard deviation of :math:`\mu`, in nats.
        role_spread: Scale of the half-normal on :math:`\sigma_\text{role}`, nats.
        layer_spread: Scale of the half-normal on :math:`\sigma_\text{layer}`, nats.
        centered: False: the latents are ``<site>_decentered``, standard normal, and
            the sites are deterministic, w = scale times latent. The same
            distribution of the weights. The joint mode of the centred form is at
            vanishing weights and scales: for MAP take False.
        centered_scales: The same for the log scales. A layer with many weights
            determines its scale well, and then True mixes better.

    Raises:
        ValueError: If a number isn't positive and finite.
    """

    scale: float = 1.0
    _: KW_ONLY
    scale_spread: float = 1.0
    role_spread: float = 0.5
    layer_spread: float = 0.5
    centered: bool = True
    centered_scales: bool = False

    def __post_init__(self) -> None:
        check_positive("hierarchical: scale", self.scale)
        check_positive("hierarchical: scale_spread", self.scale_spread)
        check_positive("hierarchical: role_spread", self.role_spread)
        check_positive("hierarchical: layer_spread", self.layer_spread)

    def __call__(self, lora: Network) -> dict[str, Tensor]:
        """Sample every site and its scales."""
        all_zeros = lora.zeros()
        first, like = next(iter(all_zeros.items()))
        mean = pyro.sample(  # (...,) with any particle dims, as all hyper-latents here
            hyper_name("mean_log_scale", first),
            dist.Normal(
                like.new_full((), math.log(self.scale)),
                like.new_full((), self.scale_spread),
            ),
        )
        role_sd, layer_sd = (
            pyro.sample(
                hyper_name(quantity, first), dist.HalfNormal(like.new_full((), spread))
            )
            for quantity, spread in (
                ("role_spread", self.role_spread),
                ("layer_spread", self.layer_spread),
            )
        )
        mean, role_sd, layer_sd = aligned((mean, 0), (role_sd, 0), (layer_sd, 0))
        role_log_scales = sample_normal(
            hyper_name("role_log_scale", first),
            mean[..., None].expand(*mean.shape, len(all_zeros)),
            role_sd[..., None],
            1,
            centered=self.centered_scales,
        )
        role_log_scales, layer_sds = aligned(
            (role_log_scales, 1), (layer_sd[..., None], 1)
        )
        weights = {}
        for i, (site, zeros) in enumerate(all_zeros.items()):
            role = role_log_scales[..., i, None].to(zeros)  # (..., 1), over layers
            log_scale = sample_normal(
                hyper_name("log_scale", site),
                role.expand(*role.shape[:-1], len(zeros)),
                layer_sds.to(zeros),
                1,
                centered=self.centered_scales,
            )
            # (..., L) -> (..., L, 1, 1), over the weights of each layer
            layer_scale = over_event(torch.exp(log_scale), zeros.ndim - 1)
            weights[site] = sample_normal(
                site, zeros, layer_scale, zeros.ndim, centered=self.centered
            )
        return weights
