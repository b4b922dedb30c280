"""A prior over R numbers a layer, between factors that are fixed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

import pyro
import pyro.distributions as dist
from torch import Tensor

from pyro_lora.ground.settings import check_number, check_positive
from pyro_lora.ground.summary import FieldsShown
from pyro_lora.ground.weights import check_weights
from pyro_lora.lifting.prior import Network
from pyro_lora.lifting.sites import lora_factor
from pyro_lora.priors.prior import hyper_name


@dataclass(frozen=True, repr=False)
class subspace(FieldsShown):
    r"""Updates that differ from a trained adapter's in the weight of each component.

    .. math:: \Delta W_l = s B_l \, \mathrm{diag}(v_l) A_l, \quad v_{lr} \sim N(m,
        \sigma^2)

    with A and B fixed, so that a posterior is over R numbers a layer, as in Bayesian
    inference over a stochastic subspace (Samplawski et al. 2025,
    https://arxiv.org/abs/2506.21408; there A and B are trained along). Few enough for
    ``AutoNormal``, ``AutoMultivariateNormal`` or NUTS::

        lora = lora.with_prior(pl.priors.subspace())
        guide = AutoNormal(pl.models.classification(lora, num_data))

    The latents are the sites ``prior.subspace.<A's site>``, (L, R); the lifted sites
    are deterministic, A with its rows times v, all others as they are. For heads that
    are random, too, ``by_site({"head.*": normal(1.0), "*": subspace()})``.

    Args:
        scale: :math:`\sigma`.
        center: m; at 1 the center is the adapter as it is.
        factors: Site -> (L, ...), the A and B, and all other sites; None is the network
            as it was lifted.

    Raises:
        TypeError: If an argument is of a wrong kind.
        ValueError: If a number is out of its range, or (when called) there is no A, or
            a site has no value.
    """

    scale: float = 1.0
    _: KW_ONLY
    center: float = 1.0
    factors: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        check_positive("subspace: scale", self.scale)
        check_number("subspace: center", self.center)
        if self.factors is not None:
            check_weights(self.factors, "subspace: factors")

    def __call__(self, lora: Network) -> dict[str, Tensor]:
        """Sample the weights of the components, and make every site of them.

        Raises:
            ValueError: If there is no A, or a site has no value of its shape.
        """
        fixed = lora.initial_weights if self.factors is None else self.factors
        weights, latents = {}, 0
        for site, zeros in lora.zeros().items():
            value = fixed.get(site)
            if value is None or value.shape != zeros.shape:
                found = "none" if value is None else f"{tuple(value.shape)}"
                raise ValueError(
                    f"Site {site!r}: expected factors of shape {tuple(zeros.shape)}, "
                    f"found {found}. Give subspace a whole weight set."
                )
            value = value.detach().to(zeros)
            roles = {
                factor and factor[1] for factor in map(lora_factor, lora.sites[site])
            }
            if roles == {"A"}:
                latents += 1
                shape = zeros.shape[:2]  # (L, R)
                v = pyro.sample(
                    hyper_name("subspace", site),
                    dist.Normal(
                        zeros.new_full(shape, self.center),
                        zeros.new_full((), self.scale).expand(shape),
                    ).to_event(2),
                )
                value = value * v.reshape(*v.shape, *[1] * (zeros.ndim - 2))
            weights[site] = pyro.deterministic(site, value, event_dim=zeros.ndim)
        if not latents:
            raise ValueError(
                f"subspace needs LoRA matrices A, found only {list(lora.sites)}. Use "
                "another prior for these sites."
            )
        return weights
