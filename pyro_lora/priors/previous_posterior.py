r"""Yesterday's posterior as today's prior, site by site.

A prior samples sites one after the other, each with a density of its own, while a
posterior may have one density for all. The chain rule writes the one as the other,
:math:`p(w) = \prod_i p(w_i | w_{<i})`: of a normal, each factor is a normal again; of a
mixture, a mixture whose weights are those of the components after the sites before,
:math:`\pi_k \prod_{j<i} p_k(w_j | w_{<j})`. Of two components at (-1, -1) and (1, 1),
narrow, the second site's has weight 1 at -1 once the first was drawn near -1.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol, runtime_checkable

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions.transforms import ReshapeTransform

from pyro_lora.ground.autocast import OutsideAutocast
from pyro_lora.ground.settings import check_fitted, check_function, check_positive
from pyro_lora.ground.summary import FieldsShown
from pyro_lora.ground.warning import warn
from pyro_lora.ground.weights import Weights
from pyro_lora.lifting.prior import NOISE, Network, Prior


class SiteMixture(TorchDistribution):
    r"""Mixture :math:`\sum_k \pi_k p_k(w)`, the components of any type.

    Args:
        log_weights: :math:`\log \pi_k` up to a common constant, each of a shape that
            broadcasts with the components' batch shapes.
        components: :math:`p_k`, over one event shape and support.

    >>> from torch.distributions import Normal
    >>> halves = [torch.zeros(()), torch.zeros(())]
    >>> SiteMixture(halves, [Normal(-1.0, 0.1), Normal(1.0, 0.1)]).sample().shape
    torch.Size([])
    """

    arg_constraints = {}  # noqa: RUF012

    def __init__(
        self, log_weights: Sequence[Tensor], components: Sequence[TorchDistribution]
    ) -> None:
        self.components = tuple(components)
        batch_shape = torch.broadcast_shapes(
            *(fn.batch_shape for fn in components), *(x.shape for x in log_weights)
        )
        self.log_weights = torch.stack(
            [x.expand(batch_shape) for x in log_weights]
        ).log_softmax(0)  # (K, *batch_shape)
        super().__init__(batch_shape, components[0].event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """That of the components."""
        return self.components[0].support

    def expand(self, batch_shape: Any, _instance: Any = None) -> SiteMixture:
        """The same distribution with a larger batch shape."""
        shape = torch.Size(batch_shape)
        return SiteMixture(
            [x.expand(shape) for x in self.log_weights],
            [fn.expand(shape) for fn in self.components],
        )

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws, (*sample_shape, *batch_shape, *event_shape)."""
        shape = torch.Size(sample_shape)
        with torch.no_grad():
            pi = self.log_weights.exp().movedim(0, -1)  # (*batch_shape, K)
            drawn = torch.distributions.Categorical(probs=pi).sample(shape)
            drawn = drawn[(..., *[None] * len(self.event_shape))]
            value: Tensor | None = None
            for k, fn in enumerate(self.components):
                draw = fn.expand(self.batch_shape).sample(shape)
                # All components draw, of which one is taken: no loop over the batch.
                value = draw if value is None else torch.where(drawn == k, draw, value)
        assert value is not None, "a mixture has components"
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, of the batch shape."""
        log_probs = [
            log_pi + fn.log_prob(value)
            for log_pi, fn in zip(self.log_weights, self.components, strict=True)
        ]
        return torch.stack(log_probs).logsumexp(0)


_ROUNDING = 1e-6  # of weights that add up to one


class Component(Protocol):
    """One part of the prior, its density by the chain rule."""

    def given(
        self, sites: tuple[str, ...], site: str, before: Weights
    ) -> TorchDistribution:
        """Distribution of a site given the values of the sites before it.

        Args:
            sites: All that get this prior, in order; others are integrated out.
            site: One of them.
            before: The values of those before it.
        """
        ...


@runtime_checkable
class Posterior(Protocol):
    """What is read of a posterior."""

    networks: Any
    num_samples: int | None

    def sample(self, num_samples: int) -> Weights:
        """Draws, site -> value with a leading (S,); K of particles are each once."""
        ...

    def gaussians(self) -> Sequence[tuple[float, Any]]:
        """The Gaussian parts with their weights."""
        ...


@runtime_checkable
class Mixture(Protocol):
    """A mixture of posteriors, such as ``MixturePosterior``."""

    components: Sequence[Any]
    weights: Tensor


@runtime_checkable
class DenseNormal(Protocol):
    """A Gaussian with one precision matrix over all sites, fisher + diag(tau)."""

    loc: Weights
    prior_precision: Weights
    fisher: Tensor


@runtime_checkable
class MeanField(Protocol):
    """A Gaussian of the weights themselves, such as ``GaussianPosterior``.

    It has sites of independent normals only where there are no rows or deviations.
    """

    loc: Weights
    scale: Weights
    rows: Weights
    deviations: Weights


def from_posterior(posterior: Any, *, bandwidth: float | None = None) -> Prior:
    r"""Yesterday's posterior as today's prior: continual learning.

    :math:`p(w | y_1, y_2) \propto p(y_2 | w)\, p(w | y_1)`, with an approximate
    posterior for :math:`p(w | y_1)` (online Laplace: Ritter et al. 2018,
    https://arxiv.org/abs/1805.07810; variational: Nguyen et al. 2018).

    Every site is sampled under its own name with a density of its own, so that SVI,
    SVGD and all else that samples or scores the model has the whole prior.
    Posteriors whose sites are dependent are written by the chain rule,
    :math:`p(w) = \prod_i p(w_i | w_{<i})`, which is exact:

    - Laplace with a Kronecker or diagonal structure, and a Gaussian with a scale for
      each weight, as ``methods.mean_field`` gives: its distributions as they are;
    - Laplace with the dense structure: each site given those before it. Sites of
      another network, or that another prior is given to, are integrated out;
    - particles: an equally weighted mixture of K normals at the particles, which is a
      density, :math:`\frac1K \sum_k N(w; w_k, \mathrm{diag}\, h^2)`. Given the sites
      before, a site is a mixture with weights :math:`\propto \prod_{j<i} N(w_j; w_{kj},
      h_j^2)`, so no draw mixes sites of several particles other than by overlap of
      their normals;
    - a mixture of these: likewise.

    ``AutoLaplace.laplace_approximation`` has less of it. The mode that SVI finds is
    that of the whole prior, but the precision there is the Fisher information plus the
    diagonal of the prior's precision: of a posterior of ``structures.Diagonal()`` that
    is all of it, of others the correlations are lost, and the fit warns. It takes no
    mixtures, and a posterior of ``structures.Dense()`` over one site only.

    Args:
        posterior: A Gaussian, particles or a mixture, over at least the sites that get
            this prior; or any guide without arguments that samples each from a
            distribution other than a Delta, independently. Its tensors are used, not
            copied.
        bandwidth: h, for particles; None: for each site :math:`K^{-1/(D + 4)}` times
            the root mean square over its weights of the particles' standard deviation
            (Scott 1992, section 6.3; for the D of an adapter the first factor is near
            1, so that the prior has about twice the particles' variance).

    Returns:
        A prior over every site.

    Raises:
        TypeError: If it is none of these.
        ValueError: If the posterior's sites have no density of their own, the bandwidth
            isn't positive and finite, or particles coincide and there is no bandwidth;
            when the prior is sampled, if a site isn't the posterior's, is fixed there,
            or has another shape.

    Warns:
        UserWarning: If one of our posteriors has sites outside of its networks, such as
            an observation noise: a network's prior can't sample them.
    """
    if bandwidth is not None:
        check_positive("from_posterior: bandwidth", bandwidth)
    components = _components(posterior, bandwidth)
    others = _outside_of_networks(posterior, components)
    if others:
        warn(
            f"The posterior's {sorted(others)} belong to no lifted network, so they "
            "aren't part of this prior: they have the prior that your model gives "
            "them. Put what the posterior says of them into the model's own "
            "pyro.sample statements."
        )
    return PreviousPosterior(tuple(components))


@dataclass(frozen=True, eq=False, repr=False)
class PreviousPosterior(FieldsShown):
    """The prior that :func:`from_posterior` makes.

    Attributes:
        components: Log weight of each part of the mixture, and the part.
    """

    components: tuple[tuple[Tensor, Component], ...]

    def __call__(self, lora: Network) -> dict[str, Tensor]:
        """Sample every site.

        Raises:
            ValueError: If a site isn't in the posterior, is fixed there, or has another
                shape.
        """
        sites = tuple(lora.sites)
        log_joint = [log_pi for log_pi, _ in self.components]
        weights: dict[str, Tensor] = {}
        all_zeros = lora.zeros()
        for site in sites:
            zeros = all_zeros[site]
            fns = [part.given(sites, site, weights) for _, part in self.components]
            if fns[0].event_shape != zeros.shape:
                raise ValueError(
                    f"Site {site!r}: expected a posterior of event shape "
                    f"{tuple(zeros.shape)}, found {tuple(fns[0].event_shape)}. Lift "
                    "the same layers with the same ranks as for the posterior."
                )
            if len(fns) == 1:
                weights[site] = pyro.sample(site, fns[0])
                continue
            weights[site] = pyro.sample(
                site, SiteMixture([x.to(zeros) for x in log_joint], fns)
            )
            log_joint = [  # log pi_k p_k(w_<=i), what the next site's weights are
                log_p.to(zeros) + fn.log_prob(weights[site])
                for log_p, fn in zip(log_joint, fns, strict=True)
            ]
        return weights


def _outside_of_networks(
    posterior: Any, components: Sequence[tuple[Tensor, Component]]
) -> set[str]:
    """The sites of a posterior that aren't those of its networks."""
    if not isinstance(posterior, Posterior) or not posterior.networks:
        return set()  # of any other guide they aren't known
    sites = {site for _, part in components for site in getattr(part, "loc", ())}
    for _, gaussian in posterior.gaussians():
        sites |= set(getattr(gaussian.latents, "values", ()))
    for lora in posterior.networks:
        sites -= {name for site in lora.sites for name in (site, f"{site}{NOISE}")}
    return sites


def _components(
    posterior: Any, bandwidth: float | None
) -> list[tuple[Tensor, Component]]:
    """Log weight of each component, and the component."""
    if isinstance(posterior, Mixture):
        return [
            (log_pi + log_inner, part)
            for log_pi, component in zip(
                posterior.weights.log(), posterior.components, strict=True
            )
            if log_pi > -math.inf
            for log_inner, part in _components(component, bandwidth)
        ]
    if isinstance(posterior, Posterior):
        gaussians = posterior.gaussians()
        if sum(weight for weight, _ in gaussians) > 1 - _ROUNDING:
            return [
                (_number(weight).log(), _gaussian(part)) for weight, part in gaussians
            ]
        if posterior.num_samples is not None:
            particles = posterior.sample(posterior.num_samples)
            return _normals_at({s: x.detach() for s, x in particles.items()}, bandwidth)
        if (
            isinstance(posterior, MeanField)
            and posterior.scale
            and not (posterior.rows or posterior.deviations)
        ):
            return [(_number(0.0), _NormalAt(posterior.loc, posterior.scale))]
    check_fitted("posterior", posterior)
    check_function("posterior", posterior, "a posterior with a density, or a guide")
    return [(_number(0.0), _independent(posterior, type(posterior).__name__))]


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def _gaussian(posterior: Any) -> Component:
    if isinstance(posterior.gaussian, DenseNormal):
        return _dense(posterior.gaussian)
    kind = f"{type(posterior).__name__} ({posterior.gaussian.structure})"
    return _independent(posterior, kind, posterior.gaussian.loc)


@dataclass(frozen=True, eq=False, repr=False)
class _NormalAt(FieldsShown):
    """Independent normals around one weight set; sites without a width are points."""

    loc: Weights
    widths: Weights

    def given(
        self, sites: tuple[str, ...], site: str, before: Weights
    ) -> TorchDistribution:
        _check_there(site, self.loc)
        if site not in self.widths:
            raise _fixed(site, "posterior")
        loc = self.loc[site]
        return dist.Normal(loc, self.widths[site]).to_event(loc.ndim)


def _normals_at(
    particles: Weights, bandwidth: float | None
) -> list[tuple[Tensor, Component]]:
    num_particles = len(next(iter(particles.values())))
    size = sum(x[0].numel() for x in particles.values())
    widths = {}
    for site, x in particles.items():
        if bandwidth is None:
            spread = (
                x.float().var(0, correction=min(num_particles - 1, 1)).mean().sqrt()
            )
            widths[site] = (num_particles ** (-1 / (size + 4)) * spread).to(x)
        else:
            widths[site] = x.new_tensor(bandwidth)
        if not widths[site] > 0:
            raise ValueError(
                f"Site {site!r}: its {num_particles} particle(s) don't differ, so they "
                "give no bandwidth. Give from_posterior(..., bandwidth=)."
            )

    log_weight = _number(-math.log(num_particles))
    return [
        (log_weight, _NormalAt({s: x[k] for s, x in particles.items()}, widths))
        for k in range(num_particles)
    ]


def _dense(gaussian: DenseNormal) -> Component:
    loc = {site: x.detach() for site, x in gaussian.loc.items()}
    tau = torch.cat(
        [
            gaussian.prior_precision[site].detach().double().expand(x.shape).flatten()
            for site, x in loc.items()
        ]
    )
    # The covariance, of which a marginal over some sites is a block.
    precision = gaussian.fisher.detach().double() + torch.diag_embed(tau)
    return _Dense(loc, torch.cholesky_inverse(torch.linalg.cholesky(precision)))


@dataclass(frozen=True, eq=False, repr=False)
class _Dense(OutsideAutocast, FieldsShown):
    """A normal with one covariance matrix over all sites."""

    loc: Weights
    covariance: Tensor
    roots: dict[tuple[str, ...], Tensor] = field(default_factory=dict)  # of some sites

    def given(
        self, sites: tuple[str, ...], site: str, before: Weights
    ) -> TorchDistribution:
        # With Cholesky factor C of the covariance and w - loc = C z, z standard normal:
        # w_i given w_<i is N(loc_i + C_i,<i z_<i, C_ii C_ii^T).
        if sites not in self.roots:
            self.roots[sites] = self._root(sites)
        root = self.roots[sites]
        mean, n = self.loc[site], self.loc[site].numel()
        shift = mean.flatten()
        start = sum(self.loc[s].numel() for s in before)
        if before:
            deviation = _deviations(before, self.loc)  # (..., start)
            z = torch.linalg.solve_triangular(
                root[:start, :start].to(deviation), deviation[..., None], upper=False
            )
            rows = root[start : start + n, :start].to(deviation)
            shift = shift + (rows @ z)[..., 0]
        block = root[start : start + n, start : start + n].to(mean)
        fn = dist.MultivariateNormal(shift, scale_tril=block)
        return dist.TransformedDistribution(
            fn, [ReshapeTransform(torch.Size([n]), mean.shape)]
        )

    def _root(self, sites: tuple[str, ...]) -> Tensor:
        for site in sites:
            _check_there(site, self.loc)
        ends = [*accumulate(x.numel() for x in self.loc.values())]
        places = {
            site: torch.arange(end - x.numel(), end, device=self.covariance.device)
            for (site, x), end in zip(self.loc.items(), ends, strict=True)
        }
        # Rows and columns that are left out are integrated over.
        index = torch.cat([places[site] for site in sites])
        return torch.linalg.cholesky(self.covariance[index[:, None], index])


def _deviations(weights: Weights, loc: Weights) -> Tensor:
    """Weights minus their mean as vectors, (..., D); lead dims broadcast."""
    flat = [(x - loc[site]).flatten(-loc[site].ndim) for site, x in weights.items()]
    lead = torch.broadcast_shapes(*(x.shape[:-1] for x in flat))
    return torch.cat([x.expand(*lead, x.shape[-1]) for x in flat], -1)


def _independent(
    posterior: Any, kind: str, random: Collection[str] | None = None
) -> Component:
    """Sites with distributions of their own.

    Args:
        posterior: A guide without arguments.
        kind: What it is, for errors.
        random: Its sites that aren't fixed; None: it isn't known which.

    Raises:
        ValueError: If none of them has a density.
    """
    with poutine.block(), torch.no_grad():
        nodes = poutine.trace(posterior).get_trace().nodes
    fns = {
        name: node["fn"]
        for name, node in nodes.items()
        if node["type"] == "sample" and not node["infer"].get("is_auxiliary")
    }
    sites = list(fns if random is None else random)
    if sites and all(_is_point(fns[site]) for site in sites):
        # Of a Gaussian over all sites together, too, which are Deltas of it.
        raise ValueError(
            f"Site {sites[0]!r}: expected a posterior with a density for each site, "
            f"found a Delta in this {kind}. Use a LaplacePosterior of KFAC, EKFAC or "
            "Diagonal, as it was before for_sampling, methods.mean_field, "
            "particles or a mixture, or a posterior's moments in priors.normal(scale, "
            "center=)."
        )
    return _Independent(fns, kind)


def _is_point(fn: Any) -> bool:
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)


@dataclass(frozen=True, eq=False, repr=False)
class _Independent(FieldsShown):
    """Sites with distributions of their own; what the posterior is, for errors."""

    fns: Mapping[str, TorchDistribution]
    kind: str

    def given(
        self, sites: tuple[str, ...], site: str, before: Weights
    ) -> TorchDistribution:
        _check_there(site, self.fns)
        if _is_point(self.fns[site]):
            raise _fixed(site, self.kind)
        return self.fns[site]


def _fixed(site: str, kind: str) -> ValueError:
    return ValueError(
        f"Site {site!r}: expected a density, but this {kind} fixes it at "
        "one value, as AutoLaplace(sites=) does those that it leaves out. Give "
        "the fixed sites another prior by by_site, or fit them, too."
    )


def _check_there(site: str, sites: Mapping[str, Any]) -> None:
    if site not in sites:
        raise ValueError(
            f"Site {site!r}: expected it among the posterior's sites, found "
            f"{sorted(sites)}. Give the sites that are new, or fixed there by sites=, "
            "another prior by by_site."
        )
