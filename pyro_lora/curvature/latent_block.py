r"""Gaussian over small latent sites outside of the network, such as a noise scale.

With u the latents in unconstrained space, x = t(u) on their supports, it is
:math:`N(u, H^{-1})` with H minus the Hessian of :math:`\log p(y, x) + \log |t'(u)|`.
A noise scale :math:`\sigma = e^u` at residuals of variance s and N data has, but for
its prior, the Hessian -2 N s / :math:`\sigma^2` in u, so H = 2 N at its mode.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from pyro_lora.ground.ranks import ALONE, Ranks
from pyro_lora.ground.summary import FieldsShown
from pyro_lora.ground.weights import Weights, handing_out_copies
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood.batch import NO_BATCHES, Batch, checked_batches, explaining
from pyro_lora.likelihood.data_plate import data_plate
from pyro_lora.likelihood.model_trace import (
    Model,
    is_missing_outcome,
    observed_sites,
    trace_batch,
)
from pyro_lora.likelihood.outcomes import values_to_score

MAX_LATENTS = 1000  # one forward and as many small backward passes a batch

_zeros = partial(torch.zeros, dtype=torch.float64, device="cpu")


@handing_out_copies("values", "precision", "log_prior", "gradient")
@dataclass(frozen=True, eq=False, repr=False)
class LatentBlock(FieldsShown):
    r"""Gaussian over latent sites in unconstrained space, :math:`N(u, H^{-1})`.

    H is minus the Hessian of the log joint of all data (the observed, not the Fisher
    information), the Jacobian of the map onto the support included. Covariances with
    the network's weights are ignored. The centre is the mode that it is given; where
    that is a mode on the support (as SVI with a Delta guide finds), it's off the mode
    in unconstrained space by :math:`H^{-1}` times the Jacobian's gradient, O(1/N).

    Attributes:
        values: Site -> the mode, on its support.
        transforms: Site -> bijection from unconstrained space.
        precision: H, (H, H), float64, nats.
        log_prior: Density of the latents in unconstrained space there, nats, float64.
        gradient: Of the log joint in unconstrained space there, (H,), float64.

    That of no sites, which adds nothing to anything, is ``LatentBlock()``.
    """

    values: Weights = field(default_factory=dict)
    transforms: Mapping[str, Any] = field(default_factory=dict)
    precision: Tensor = field(default_factory=partial(_zeros, 0, 0))
    log_prior: Tensor = field(default_factory=partial(_zeros, ()))
    gradient: Tensor = field(default_factory=partial(_zeros, 0))

    def sample(self, num_samples: int) -> Weights:
        """Draws on the supports, each site with a leading (S,)."""
        if not self.values:
            return {}
        flat = self._normal().sample(torch.Size([num_samples]))
        return {site: x for site, (x, _) in self._constrained(flat).items()}

    def log_prob(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Log density on the supports, nats, (S,) for sites with a leading (S,)."""
        if not self.values:
            return _zeros(())
        flat: list[Tensor] = []
        log_det: Tensor | float = 0.0
        for site, like in self.values.items():
            u = self.transforms[site].inv(weights[site])
            lead = weights[site].ndim - like.ndim  # draws' dims, left of the event's
            log_det = log_det + self._log_det(site, weights[site], u, lead)
            flat.append(u.flatten(lead) if u.ndim > lead else u[..., None])
        log_prob: Tensor = self._normal().log_prob(torch.cat(flat, -1).double())
        return log_prob + log_det

    def variance(self) -> Weights:
        """Variances on the supports to first order, the slope at the mode squared."""
        if not self.values:
            return {}

        def values(u: Tensor) -> Tensor:
            on_supports = self._constrained(u).values()
            return torch.cat([x.flatten().double() for x, _ in on_supports])

        # x(u) is x(û) + J (u - û) to first order, so Var x = J H^-1 J^T.
        slope = torch.autograd.functional.jacobian(values, self._loc())
        assert isinstance(slope, Tensor)
        covariance = slope @ self.precision.inverse() @ slope.mT  # on the supports
        flat = covariance.diagonal()
        sizes = [x.numel() for x in self.values.values()]
        return {
            site: variance.reshape(x.shape).to(x)
            for (site, x), variance in zip(
                self.values.items(), flat.split(sizes), strict=True
            )
        }

    def unconstrained(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Means and marginal variances in unconstrained space, by site."""
        if not self.values:
            return {}
        variance = self.precision.inverse().diagonal()
        result, start = {}, 0
        for site, like in self.values.items():
            loc = self.transforms[site].inv(like)
            stop = start + loc.numel()
            result[site] = (loc, variance[start:stop].reshape(loc.shape).to(loc))
            start = stop
        return result

    def log_evidence(self) -> Tensor:
        """What the latents add to Laplace's log evidence, nats: their prior less q."""
        if not self.values:
            return self.log_prior
        # The integral of exp(-u^T H u / 2) is det(H / 2 pi)^(-1/2).
        log_det = torch.linalg.slogdet(self.precision / (2 * math.pi)).logabsdet
        return self.log_prior - 0.5 * log_det

    def newton_decrement(self) -> float:
        """:math:`g^T H^{-1} g`, twice what a Newton step would gain, nats."""
        if not self.values:
            return 0.0
        return float(self.gradient @ torch.linalg.solve(self.precision, self.gradient))

    def pyro_sample(self) -> Weights:
        """Guide statements: one auxiliary joint variable, the sites Deltas of it."""
        if not self.values:
            return {}
        flat = pyro.sample("latent_joint", self._normal(), infer={"is_auxiliary": True})
        return {
            site: pyro.sample(
                site,
                dist.Delta(x, log_density=log_det, event_dim=self.values[site].ndim),
            )
            for site, (x, log_det) in self._constrained(flat).items()
        }

    def _loc(self) -> Tensor:
        return torch.cat(
            [
                self.transforms[s].inv(x).flatten().double()
                for s, x in self.values.items()
            ]
        )

    def _normal(self) -> dist.MultivariateNormal:
        return dist.MultivariateNormal(self._loc(), precision_matrix=self.precision)

    def _constrained(self, flat: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Values, and log density of a Delta there, for (..., H)."""
        constrained, start = {}, 0
        for site, like in self.values.items():
            shape = self.transforms[site].inverse_shape(like.shape)
            u = flat[..., start : start + shape.numel()].to(like)
            start += shape.numel()
            u = u.reshape(flat.shape[:-1] + shape)
            x = self.transforms[site](u)
            constrained[site] = (x, self._log_det(site, x, u, flat.ndim - 1))
        return constrained

    def _log_det(self, site: str, x: Tensor, u: Tensor, lead: int) -> Tensor:
        """Of the map to unconstrained space, summed over the event."""
        log_det: Tensor = -self.transforms[site].log_abs_det_jacobian(u, x)
        return log_det.flatten(lead).sum(-1) if log_det.ndim > lead else log_det


def small_latents(trace: Any, networks: Sequence[LiftedNetwork]) -> tuple[str, ...]:
    """Names of the latent sites outside of the lifted networks.

    Args:
        trace: A trace of the model.
        networks: The lifted networks in it.

    Raises:
        ValueError: If a lifted site isn't latent itself, or a latent is local to a
            plate or not continuous.
    """
    for lora in networks:
        for site in lora.sites:
            if site not in trace.nodes or trace.nodes[site]["is_observed"]:
                raise ValueError(
                    f"Site {site!r} isn't latent: its prior makes it a function of "
                    "others (centered=False, perhaps), or it is conditioned. "
                    "AutoLaplace needs a prior on the weights themselves: "
                    "priors.normal, its scale by optimize_prior; SVGD takes any."
                )
    lifted = {site for lora in networks for site in lora.sites}
    names = []
    for name, site in trace.nodes.items():
        if (
            site["type"] != "sample"
            or site["is_observed"]
            or name in lifted
            or site_is_subsample(site)
            or site_is_factor(site)
            or is_missing_outcome(trace, name)
        ):
            continue
        if site["fn"].batch_shape:
            raise ValueError(
                f"Latent site {name!r} has the batch shape "
                f"{tuple(site['fn'].batch_shape)}; AutoLaplace takes latents outside "
                "of plates. Declare its dims as event dims, by .to_event(...)."
            )
        if not site["fn"].has_rsample and site["fn"].support.is_discrete:
            raise ValueError(
                f"Latent site {name!r} is discrete, and has no Gaussian. Sum over it "
                "in the likelihood's density, or fix it by pyro.poutine.condition."
            )
        names.append(name)
    return tuple(names)


def fit_latents(
    model: Model,
    weights: Mapping[str, Tensor],
    latents: Mapping[str, Tensor],
    batches: Iterable[Batch],
    obs_site: str | Sequence[str] | None,
    ranks: Ranks = ALONE,
) -> LatentBlock:
    """Observed information of small latent sites, for the full data.

    A pass over the data of its own: one forward pass a batch, and backward passes from
    the likelihood to the latents, two for each of their entries.

    Args:
        model: A Pyro model.
        weights: Lifted site -> the mode.
        latents: Other latent site -> the mode, on its support.
        batches: Mappings of model keyword arguments that cover all data once.
        obs_site: The likelihood's site, or several; None is the only observed one.
        ranks: Who shares the data.

    Returns:
        The block.

    Raises:
        ValueError: If there are no batches, the latents have too many entries or set a
            lifted site's prior, or the log joint isn't concave in them there.
    """
    trace: Any = None
    transforms: dict[str, Any] = {}
    gradient: Tensor | float = 0.0
    hessian: Tensor | float = 0.0
    for index, batch in enumerate(ranks.in_step(checked_batches(batches))):
        if trace is None:
            trace = trace_batch(model, {**weights, **latents}, batch, index)
            _check_there(trace, latents, index)
            transforms = {s: biject_to(trace.nodes[s]["fn"].support) for s in latents}
        # The graph runs from u through the transforms into the model: derivatives in u.
        block = _block(latents, transforms)
        flat = block._loc().detach().requires_grad_()
        with torch.enable_grad():
            values = {s: x for s, (x, _) in block._constrained(flat).items()}
            trace = trace_batch(model, {**weights, **values}, batch, index)
            _check_there(trace, latents, index)
            total = flat.new_zeros((), dtype=torch.float64)
            for site in observed_sites(trace, obs_site):
                plate = data_plate(site)
                with explaining(batch, nodes=trace.nodes):
                    log_prob = site["fn"].log_prob(values_to_score(site))
                scaled = scale_and_mask(log_prob, plate.scale, plate.mask)
                total = total + scaled.double().sum()
            slope, curvature = _derivatives(total, flat)
        gradient, hessian = gradient + slope, hessian + curvature
    if trace is None:
        raise ValueError(ranks.none_here(NO_BATCHES))
    assert isinstance(gradient, Tensor)
    assert isinstance(hessian, Tensor)
    gradient, hessian = ranks.sums([gradient, hessian])
    with torch.enable_grad():
        log_prior = flat.new_zeros(())
        for name, (_, log_det) in block._constrained(flat).items():
            site = trace.nodes[name]
            # p(u) = p(x) |dx/du|; log_det is log |du/dx|.
            log_prior = log_prior + scale_and_mask(
                site["fn"].log_prob(site["value"]).double() - log_det.double(),
                site["scale"],
                site["mask"],
            )
        _check_priors(trace, weights, flat)
        slope, curvature = _derivatives(log_prior, flat)
    gradient, precision = gradient + slope, -(hessian + curvature)
    precision = (precision + precision.mT) / 2  # rounding differs by row
    root, info = torch.linalg.cholesky_ex(precision)
    if int(info) or not root.isfinite().all():
        raise ValueError(
            f"The log joint isn't concave in the latent sites {list(latents)} at "
            f"{dict(latents)}, so no Gaussian fits there. Train them longer, or fix "
            "them by pyro.poutine.condition."
        )
    return LatentBlock(
        dict(latents), transforms, precision, log_prior.detach(), gradient
    )


def _check_there(trace: Any, latents: Iterable[str], index: int) -> None:
    missing = [site for site in latents if site not in trace.nodes]
    if missing:
        raise ValueError(
            f"Batch {index}: the model doesn't sample {missing}, as it did before. Let "
            "every batch have the same latent sites."
        )


def _block(latents: Mapping[str, Tensor], transforms: Mapping[str, Any]) -> LatentBlock:
    block = LatentBlock(dict(latents), transforms)
    num_entries = len(block._loc())
    if num_entries > MAX_LATENTS:
        raise ValueError(
            f"The latent sites {list(latents)} have {num_entries} entries, too many "
            f"for a dense block; at most {MAX_LATENTS}. Fix some by "
            "pyro.poutine.condition."
        )
    return block


def _derivatives(value: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient (H,) and Hessian (H, H), zero where there is no dependence."""
    zero = torch.zeros_like(flat)
    if not value.requires_grad:
        return zero, zero.diag()
    (gradient,) = torch.autograd.grad(
        value, flat, create_graph=True, materialize_grads=True
    )
    rows = [  # of the Hessian: the gradient of each entry of the gradient
        torch.autograd.grad(g, flat, retain_graph=True, materialize_grads=True)[0]
        if g.requires_grad
        else zero
        for g in gradient
    ]
    return gradient.detach(), torch.stack(rows)


def _check_priors(trace: Any, weights: Mapping[str, Tensor], flat: Tensor) -> None:
    for name, value in weights.items():
        log_prob = trace.nodes[name]["fn"].log_prob(value).sum()
        if not log_prob.requires_grad:
            continue
        (slope,) = torch.autograd.grad(
            log_prob, flat, allow_unused=True, retain_graph=True
        )
        if slope is not None:
            raise ValueError(
                f"Site {name!r}: its prior depends on latent sites outside of the "
                "network. Most centred hierarchical priors have no joint mode: their "
                "density runs off to infinity as the scale goes to 0. Give the scale "
                "a number and choose it by optimize_prior; or use SVGD."
            )
