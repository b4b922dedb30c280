r"""A Gaussian over the weights themselves, whose form is said rather than computed.

.. math:: w = \mu + L z + \sum_{k=1}^K u_k d_k, \quad z, u \sim N(0, I)

with, for each site, L diagonal or one matrix :math:`R_l` for the rows of each of its
matrices, so that an A of shape (R, I) is :math:`\mu_l + R_l Z_l`; a vector :math:`d_k`
is over all sites together. What variational inference, iterates of SGD or a width that
is looked for end in. For example, of a site (1, 2) with scale (1, 2) and one deviation
(1, 0), the covariance is diag(1 + 1, 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch import distributions as td

from pyro_lora.curvature.joint_distribution import sample_jointly
from pyro_lora.ground.autocast import OutsideAutocast
from pyro_lora.ground.settings import check_count, check_function
from pyro_lora.ground.summary import brief, extent, weights_facts
from pyro_lora.ground.weights import Weights, check_sites, handing_out_copies, itself
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood.model_trace import Model
from pyro_lora.posteriors import marginals
from pyro_lora.posteriors.guide_posterior import Guide, GuidePosterior
from pyro_lora.posteriors.prior import latent_nodes, networks_prior
from pyro_lora.posteriors.shared import Shared
from pyro_lora.priors import Prior


@handing_out_copies("loc", "scale", "rows", "deviations")
@dataclass(frozen=True, eq=False, repr=False)
class GaussianPosterior(OutsideAutocast, marginals.ByMarginals, Shared):
    r"""A Gaussian over some sites, the others points. A Pyro guide.

    It is about the network itself, not a linearised one, and so predicted from by
    draws.

    Attributes:
        loc: The mean :math:`\mu`, site -> value, points among them.
        scale: Of the sites with a diagonal L: standard deviations, of their shape.
        rows: Of the sites (L, R, ...) with a matrix for the rows: it, (L, R, R).
        deviations: Site -> :math:`d_k`, (K, ...), of sites with a scale; empty: K = 0.
        networks: The lifted networks in the model.
        model: The Pyro model; None where it isn't known.
        obs_site: The likelihood's site, None for the only one.
    """

    loc: Weights
    scale: Weights
    networks: tuple[LiftedNetwork, ...]
    model: Model | None = None
    obs_site: str | None = None
    rows: Weights = field(default_factory=dict)
    deviations: Weights = field(default_factory=dict)

    num_samples: ClassVar[int | None] = None
    _loc, _scale = itself("loc"), itself("scale")
    _rows, _deviations = itself("rows"), itself("deviations")

    def __call__(self, *args: Any, **kwargs: Any) -> Weights:
        """Sample the sites: the guide's statements, whatever the model's arguments."""
        return sample_jointly(self, self._loc, self.networks)

    def _facts(self) -> dict[str, str]:
        facts = weights_facts(self._loc)
        facts["gaussian"] = weights_facts(self._random)["sites"] or "none"
        if self._scale:
            facts["scale"] = extent(self._scale.values())
        if self._rank:
            facts["rank"] = str(self._rank)
        return facts | {
            "prior": brief(self.prior),
            "obs_site": brief(self.obs_site),
            "model": brief(self.model),
        }

    @property
    def prior(self) -> Prior:
        """The prior of the networks."""
        return networks_prior(self.networks)

    @property
    def _random(self) -> Weights:
        return {
            s: x for s, x in self._loc.items() if s in self._scale or s in self._rows
        }

    @property
    def _rank(self) -> int:
        """K."""
        return len(next(iter(self._deviations.values()), ()))

    def gaussians(self) -> list[tuple[float, Any]]:
        """None: it is about the network itself, not a linearised one."""
        return []

    def mode(self) -> Weights:
        """The mean, site -> value of the site's shape."""
        return {site: x.clone() for site, x in self._loc.items()}

    mean = median = mode

    def sample(self, num_samples: int) -> Weights:
        """Draws, site -> value with a leading (S,)."""
        check_count("num_samples", num_samples)
        like = next(iter(self._deviations.values()), torch.empty(0))
        u = torch.randn(num_samples, self._rank, dtype=like.dtype, device=like.device)
        draws = {}
        for site, loc in self._loc.items():
            value = loc.expand(num_samples, *loc.shape)
            if site in self._random:
                value = value + self._spread(site, torch.randn_like(value))
            if site in self._deviations:
                value = value + torch.tensordot(u, self._deviations[site], 1).to(value)
            draws[site] = value.clone()
        return draws

    def log_prob(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Log density in nats, (S,) for weights with a leading (S,).

        It is that of the sites that aren't points, and minus infinity where these have
        other values.

        Raises:
            ValueError: If a site is missing, isn't one of this posterior's, or has
                another shape.
        """
        check_sites(weights, self._loc)
        # With L and D = (d_1, ..., d_K), V = L^-1 D and e = L^-1 (w - mu), the
        # covariance is L (I + V V^T) L^T; Woodbury leaves the K x K matrix I + V^T V,
        # whose eigenvalues are 1 plus those of V^T V.
        random = self._random
        log_prob: Any = 0.0
        errors, whitened = [], []
        for site, loc in self._loc.items():
            if site not in random:
                fn = dist.Delta(loc, event_dim=loc.ndim)
                log_prob = log_prob + fn.log_prob(weights[site])  # log 1, or log 0
                continue
            error = weights[site].double() - loc.double()
            errors.append(self._whitened(site, error).flatten(-loc.ndim))
            log_prob = log_prob - self._log_det(site)
            deviations = self._deviations.get(
                site, loc.new_zeros(self._rank, *loc.shape)
            )
            whitened.append(self._whitened(site, deviations.double()).flatten(1))
        if not errors:  # points alone
            return torch.as_tensor(log_prob)
        first = errors[0]
        e = torch.cat([x.to(first.device) for x in errors], -1)  # (S, D)
        v = torch.cat([x.to(first.device) for x in whitened], -1)  # (K, D)
        values, vectors = torch.linalg.eigh(v @ v.mT)
        values = values.clamp_min(0)  # deviations from a mean add up to 0
        inside = (e @ v.mT @ vectors).square() / (1 + values)
        square = e.square().sum(-1) - inside.sum(-1)
        log_prob = log_prob - 0.5 * values.log1p().sum()
        constant = e.shape[-1] * math.log(2 * math.pi)
        total: Tensor = log_prob - 0.5 * (square + constant)
        return total

    def variance(self) -> Weights:
        """Marginal variances, each of its site's shape."""
        variance = {}
        for site, loc in self._loc.items():
            of_site = torch.zeros_like(loc)
            if site in self._scale:
                of_site = of_site + self._scale[site].square()
            if site in self._rows:
                by_row = self._rows[site].square().sum(-1)  # (L, R)
                of_site = of_site + by_row.reshape(*by_row.shape, *[1] * (loc.ndim - 2))
            if site in self._deviations:
                of_site = of_site + self._deviations[site].square().sum(0)
            variance[site] = of_site
        return variance

    def marginals(self) -> dict[str, marginals.Marginals]:
        """Of each site's weights, each by itself."""
        return {
            site: marginals.normals(self._loc[site], variance)
            for site, variance in self.variance().items()
        }

    def _spread(self, site: str, z: Tensor) -> Tensor:
        """L z of a site, any leading dims."""
        if site in self._scale:
            return self._scale[site] * z
        return self._by_row(site, z, lambda rows, x: rows @ x)

    def _whitened(self, site: str, x: Tensor) -> Tensor:
        """Its inverse, in float64."""
        if site in self._scale:
            return x / self._scale[site].double()
        return self._by_row(
            site, x, lambda rows, x: torch.linalg.solve(rows.double(), x)
        )

    def _by_row(
        self, site: str, x: Tensor, product: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        # A convolution's kernel dims are columns, too.
        start = x.ndim - self._loc[site].ndim + 2
        return product(self._rows[site], x.flatten(start)).reshape(x.shape)

    def _log_det(self, site: str) -> Tensor:
        """Logarithm of det L of a site."""
        if site in self._scale:
            return self._scale[site].double().log().sum()
        num_columns = self._loc[site][0, 0].numel()
        return torch.linalg.slogdet(self._rows[site].double())[1].sum() * num_columns


def mean_field(guide: Guide, *, model: Model | None = None) -> GaussianPosterior:
    """The Gaussian that a trained guide is, if its sites are normals and points.

    As a value it doesn't change if the guide is trained on, it has a density, and
    ``save`` can store it. Guides of that kind are ``AutoNormal``, ``AutoDelta``, an
    ``AutoGuideList`` of them, and functions that sample normals and Deltas.

    Args:
        guide: A guide that has run at least once, or needs no arguments.
        model: The Pyro model; None is the guide's own.

    Returns:
        The posterior.

    Raises:
        TypeError: If the guide isn't a function.
        ValueError: If a site depends on others or isn't normal, as latents are whose
            support isn't all real numbers.
    """
    check_function("guide", guide, "a Pyro guide")
    wrapped = GuidePosterior(guide, model)
    loc, scale = _normals(wrapped)
    # Parameters that are made of another site's draw are others in the next call.
    for first, second in zip((loc, scale), _normals(wrapped), strict=True):
        for site, x in first.items():
            if not torch.equal(x, second[site]):
                raise ValueError(
                    f"Site {site!r}: the guide's distribution is another in each call, "
                    "as where it depends on the draw of a site before it; mean_field "
                    "is of sites that are normal each by itself. Take an AutoNormal, "
                    "or draws: ensemble(lora, [...])."
                )
    return GaussianPosterior(
        loc, scale, wrapped.networks, wrapped.model if model is None else model
    )


@torch.no_grad()
def _normals(wrapped: GuidePosterior) -> tuple[Weights, Weights]:
    """Means, and standard deviations of the sites that have some, of one call.

    Raises:
        ValueError: If a site isn't normal, or depends on auxiliary ones.
    """
    latents = latent_nodes(wrapped.trace())
    auxiliary = {s for s, node in latents.items() if node["infer"].get("is_auxiliary")}
    loc: Weights = {}
    scale: Weights = {}
    for site, node in latents.items():
        if site in auxiliary:
            continue
        value, source = node["value"], f"{site}_unconstrained"
        # Stock guides sample in unconstrained space, which is the site's own here.
        if source in auxiliary and torch.equal(latents[source]["value"], value):
            auxiliary.remove(source)
            node = latents[source]
        fn = node["fn"]
        while isinstance(fn, td.Independent):
            fn = fn.base_dist
        if isinstance(fn, td.Normal):
            loc[site], scale[site] = (
                x.detach().expand(value.shape).clone() for x in (fn.loc, fn.scale)
            )
        elif isinstance(fn, dist.Delta) and source not in auxiliary:
            loc[site] = value.detach().clone()
        else:
            raise ValueError(
                f"Site {site!r}: the guide's distribution is "
                f"{type(fn).__name__} on another support than all real numbers, or "
                "isn't normal. Fix the site by poutine.condition, or give "
                "it an AutoDelta in an AutoGuideList."
            )
    if auxiliary:
        raise ValueError(
            f"The guide's sites depend on one another by {sorted(auxiliary)}, and "
            "mean_field is of sites that are normal each by itself. Take an "
            "AutoNormal, or draws: ensemble(lora, [...])."
        )
    return loc, scale
