r"""Mixture of posteriors, for example a Laplace approximation at each particle.

:math:`q(w) = \sum_n \pi_n q_n(w)`. A mixture of mixtures is one of their components,
each with the product of the weights on the way to it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pyro_lora.curvature.joint_distribution import sample_jointly
from pyro_lora.ground.autocast import outside_autocast
from pyro_lora.ground.settings import check_count, check_kind
from pyro_lora.ground.summary import brief, extent, listed, weights_facts
from pyro_lora.ground.weights import Weights
from pyro_lora.lifting.digests import update
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood.batch import Batch, check_batches, checked_batches
from pyro_lora.likelihood.model_trace import Model
from pyro_lora.posteriors import marginals
from pyro_lora.posteriors.guide_posterior import Guide
from pyro_lora.posteriors.laplace_posterior import (
    LaplacePosterior,
    knows_evidence,
)
from pyro_lora.posteriors.posterior import (
    Posterior,
    as_posterior,
    fit_arguments,
    kind_of,
    one_weight_set,
    only_gaussian,
)
from pyro_lora.posteriors.prior import networks_prior
from pyro_lora.posteriors.shared import Shared
from pyro_lora.priors import Prior

_ROUNDING = 1e-12  # of weights that add up to one


class MixturePosterior(marginals.ByMarginals, Shared):
    r"""Mixture :math:`q(w) = \sum_n \pi_n q_n(w)`, as a Pyro guide.

    Args:
        components: Posteriors, or Pyro guides, over the same sites.
        weights: :math:`\pi`, one for each component, normalised here; None is equal;
            ``"evidence"``, of Laplace posteriors, is :math:`\pi_n \propto p(y)_n`, the
            mass that each finds around its mode: a few nats leave one of them.

    Attributes:
        components: The posteriors that are mixed, none of them a mixture.
        prior: The components' own, where it is one; else that of the networks.

    Raises:
        TypeError: If a component is neither a posterior nor a guide.
        ValueError: If there are no components, their sites or shapes differ, or the
            weights don't fit.
    """

    num_samples: ClassVar[int | None] = None

    def __init__(
        self,
        components: Sequence[Posterior | Guide],
        weights: Tensor | Sequence[float] | Literal["evidence"] | None = None,
    ) -> None:
        name = "The components of a mixture"
        check_kind(name, components, Sequence, "a list of posteriors")
        if not components:
            raise ValueError("A mixture needs at least one component; found none.")
        given = [
            _checked(index, component) for index, component in enumerate(components)
        ]
        likes = [one_weight_set(component) for component in given]
        _check_same_sites(likes)
        self._like = likes[0]
        pi = _normalised(weights, given, self._like)
        weighted = [
            pair
            for weight, component in zip(pi, given, strict=True)
            for pair in _taken_apart(weight, component)
        ]
        self.components = tuple(component for _, component in weighted)
        self._weights = torch.stack([weight for weight, _ in weighted])
        self.networks: tuple[LiftedNetwork, ...] = given[0].networks
        self.model: Model | None = given[0].model
        self.obs_site: str | None = given[0].obs_site
        self.fit_arguments = fit_arguments(given[0])
        self.prior = _prior_of_all(self.components, self.networks)

    def __call__(self, *args: Any, **kwargs: Any) -> Weights:
        """Sample the sites, whatever the model's arguments."""
        return sample_jointly(self, self._like, self.networks)

    @property
    def weights(self) -> Tensor:
        """Of each component, (n,), float64, they add up to one."""
        return self._weights.clone()

    @torch.no_grad()
    def _facts(self) -> dict[str, str]:
        kinds = Counter(map(kind_of, self.components))
        largest = self._weights.topk(min(3, len(self._weights))).values
        weights = [f"{x:.3g}" for x in largest.tolist()]
        parts = [gaussian for _, gaussian in self.gaussians()]
        of_parts = {
            "prior_precision": [
                x for part in parts for x in part.gaussian.prior_precision.values()
            ],
            "log_evidence": [
                part.log_evidence() for part in parts if all(map(knows_evidence, parts))
            ],
        }
        return {
            "components": ", ".join(f"{n} {kind}" for kind, n in kinds.items()),
            "mixed": listed(weights, len(self.components)),
            **weights_facts(self._like),
            **{name: extent(x) for name, x in of_parts.items() if x},
            "prior": brief(self.prior),
            "obs_site": brief(self.obs_site),
            "model": brief(self.model),
        }

    def gaussians(self) -> list[tuple[float, LaplacePosterior]]:
        """The Gaussian parts with their weights in the mixture."""
        return [
            (weight * inner, gaussian)
            for weight, component in zip(
                self._weights.tolist(), self.components, strict=True
            )
            for inner, gaussian in component.gaussians()
        ]

    def sample(self, num_samples: int) -> Weights:
        """Draws in random order of components, site -> value with a leading (S,).

        Raises:
            ValueError: If S isn't positive.
        """
        return self.sample_with_components(num_samples)[0]

    def sample_with_components(self, num_samples: int) -> tuple[Weights, Tensor]:
        """Draws, and the place among the components of each one's own, (S,).

        Raises:
            ValueError: If S isn't positive.
        """
        check_count("num_samples", num_samples)
        drawn = torch.multinomial(self._weights, num_samples, replacement=True)
        # Each component draws all of its own at once.
        counts = torch.bincount(drawn, minlength=len(self.components)).tolist()
        draws = [
            component.sample(n)
            for component, n in zip(self.components, counts, strict=True)
            if n > 0
        ]
        # Sorting by component twice over puts each draw where its component was drawn.
        place = drawn.argsort(stable=True).argsort()
        return {
            s: torch.cat([of_component[s] for of_component in draws])[place]
            for s in self._like
        }, drawn

    def log_prob(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Log density in nats, (S,) for weights with a leading (S,).

        Raises:
            ValueError: If a component has no density.
        """
        log_probs = torch.stack([c.log_prob(weights) for c in self.components], -1)
        # log sum_n pi_n q_n(w), where each q_n alone may underflow
        return (log_probs + self._weights.log().to(log_probs)).logsumexp(-1)

    def mean(self) -> Weights:
        """The mean, each of its site's shape.

        Raises:
            ValueError: If a component's isn't known.
        """
        return self._averaged([mean for mean, _ in self._moments()])

    def variance(self) -> Weights:
        """Marginal variances by the law of total variance, each of its site's shape.

        Raises:
            ValueError: If a component's aren't known.
        """
        # Var w = E[Var(w | n)] + Var(E[w | n])
        moments = self._moments()
        mean = self._averaged([mean for mean, _ in moments])
        return self._averaged(
            [
                {s: x + (own[s] - mean[s]).square() for s, x in within.items()}
                for own, within in moments
            ]
        )

    def median(self) -> Weights:
        """The median of each weight by itself, of its site's shape.

        Raises:
            ValueError: If a component's marginals aren't known.
        """
        return self.quantiles(0.5)

    def marginals(self) -> dict[str, marginals.Marginals]:
        """Of each site's weights, each by itself.

        Raises:
            ValueError: If a component's aren't known.
        """
        parts = [_marginals(component) for component in self.components]
        return {
            site: marginals.mixed(self._weights, [part[site] for part in parts])
            for site in self._like
        }

    def for_sampling(
        self,
        batches: Iterable[Batch],
        *,
        tolerance: float = 0.05,
        num_samples: int = 8,
        progress_bar: bool | None = None,
    ) -> MixturePosterior:
        """The mixture of the Gaussians made narrow, the other components as they are.

        Args:
            batches: As for :meth:`LaplacePosterior.for_sampling`, which each Gaussian
                goes through.
            tolerance: Likewise, nats a datum of a draw against its Gaussian's center.
            num_samples: Likewise.
            progress_bar: Show one, for each of them.

        Raises:
            ValueError: If a Gaussian was loaded without a model, there are no batches,
                or they have no labels.
        """
        check_batches(batches)
        rows = list(checked_batches(batches))
        components = [
            component
            if gaussian is None
            else gaussian.for_sampling(
                rows,
                tolerance=tolerance,
                num_samples=num_samples,
                progress_bar=progress_bar,
            )
            for component, gaussian in zip(
                self.components, map(only_gaussian, self.components), strict=True
            )
        ]
        return MixturePosterior(components, self.weights)

    def _moments(self) -> list[tuple[Weights, Weights]]:
        return [_moments(component) for component in self.components]

    @outside_autocast()
    def _averaged(self, values: Sequence[Weights]) -> Weights:
        return {
            site: torch.tensordot(
                self._weights.to(like), torch.stack([x[site] for x in values]), 1
            )
            for site, like in self._like.items()
        }

    def mode(self) -> Weights:
        """Not defined.

        Raises:
            ValueError: Always.
        """
        raise ValueError("A mixture has no single mode. Use those of .components.")


def _checked(index: int, component: Posterior | Guide) -> Posterior:
    try:
        posterior = as_posterior(component)
    except TypeError as error:
        raise TypeError(f"Component {index} of a mixture: {error}") from error
    if posterior is not component and not posterior.networks:
        raise TypeError(
            f"Component {index} is {kind_of(posterior)}; a mixture is of posteriors, "
            "and of autoguides that have run: of others the networks aren't known."
        )
    return posterior


def _check_same_sites(likes: Sequence[Weights]) -> None:
    for index, like in enumerate(likes):
        for site in like.keys() | likes[0].keys():
            shape, expected = (
                x[site].shape if site in x else None for x in (like, likes[0])
            )
            if shape != expected:
                raise ValueError(
                    f"Component {index}, site {site!r}: expected shape {expected}, as "
                    f"in component 0, found {shape}. Mix posteriors of one model."
                )


def _taken_apart(
    weight: Tensor, component: Posterior
) -> list[tuple[Tensor, Posterior]]:
    """A component with its weight; of a mixture its own ones with theirs."""
    if not isinstance(component, MixturePosterior):
        return [(weight, component)]
    inner = component.weights.to(weight)
    return list(zip(weight * inner, component.components, strict=True))


def _moments(component: Posterior) -> tuple[Weights, Weights]:
    """Mean and marginal variances.

    Raises:
        ValueError: If they aren't known.
    """
    if isinstance(component, marginals.ByMarginals):
        return component.mean(), component.variance()
    if component.num_samples is None:
        raise ValueError(
            f"The moments of a {kind_of(component)} aren't known. Take those of draws."
        )
    draws = component.sample(component.num_samples)
    return (
        {site: x.mean(0) for site, x in draws.items()},
        {site: x.var(0, correction=0) for site, x in draws.items()},
    )


def _marginals(component: Posterior) -> dict[str, marginals.Marginals]:
    """Of each site's weights, each by itself.

    Raises:
        ValueError: If they aren't known.
    """
    if isinstance(component, marginals.ByMarginals):
        return component.marginals()
    if component.num_samples is None:
        raise ValueError(
            f"The quantiles of a {kind_of(component)} aren't known. Take those of "
            "draws."
        )
    draws = component.sample(component.num_samples)
    return {site: marginals.points(x) for site, x in draws.items()}


def _normalised(
    weights: Tensor | Sequence[float] | str | None,
    components: Sequence[Posterior],
    like: Weights,
) -> Tensor:
    device = next(iter(like.values())).device
    if weights is None:
        weights = [1.0] * len(components)
    if isinstance(weights, str):
        weights = _log_evidences(weights, components).softmax(0)
    if not isinstance(weights, Tensor):
        check_kind("Mixture weights", weights, Sequence, "a list of numbers")
        if not all(
            isinstance(w, int | float) and not isinstance(w, bool) for w in weights
        ):
            raise ValueError(
                f"Mixture weights must be {len(components)} non-negative numbers, "
                f"found {weights!r}."
            )
    pi = torch.as_tensor(weights, dtype=torch.float64, device=device)
    valid = torch.isfinite(pi).all() and (pi >= 0).all() and pi.sum() > 0
    if pi.shape != (len(components),) or not valid:
        raise ValueError(
            f"Mixture weights must be {len(components)} non-negative numbers, one for "
            f"each component, not all zero; found {pi.tolist()}."
        )
    # Those that add up to one but for rounding stay as they are, and so those of a
    # mixture's file, or of its components mixed again.
    total = pi.sum()
    return pi if abs(float(total) - 1) <= _ROUNDING else pi / total


def _log_evidences(weights: str, components: Sequence[Posterior]) -> Tensor:
    laplace = [c for c in map(only_gaussian, components) if c is not None]
    if weights != "evidence" or len(laplace) < len(components):
        raise ValueError(
            f"Mixture weights are {weights!r}. Give numbers, or 'evidence' where every "
            "component is a Laplace posterior, found "
            f"{[kind_of(component) for component in components]}."
        )
    return torch.stack([component.log_evidence().double() for component in laplace])


def _prior_of_all(
    components: Sequence[Posterior], networks: Sequence[LiftedNetwork]
) -> Prior:
    """The components' own, where it is one; else that of the networks."""
    first, *others = (component.prior for component in components)
    # Each fit, and each file, makes a value of its own of one and the same prior.
    same = [prior is first or _digest(prior) == _digest(first) for prior in others]
    return first if all(same) else networks_prior(networks)


def _digest(prior: Prior) -> bytes:
    digest = hashlib.sha256()
    update(digest, prior)
    return digest.digest()
