"""Mixture of posteriors, for example a Laplace approximation at each particle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union

import torch
from torch import Tensor

from pyro_lora.ground.settings import check_kind
from pyro_lora.ground.weights import Weights
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood.model_trace import Model
from pyro_lora.posteriors.joint_distribution import check_num_samples, sample_jointly
from pyro_lora.posteriors.laplace_posterior import LaplacePosterior, PredictionMethod
from pyro_lora.posteriors.particle_posterior import ParticlePosterior

Posterior = Union[LaplacePosterior, ParticlePosterior, "MixturePosterior"]


class MixturePosterior:
    r"""Mixture :math:`q(w) = \sum_n \pi_n q_n(w)`, as a Pyro guide.

    Args:
        components: Posteriors over the same sites.
        weights: :math:`\pi`, one for each component, normalised here; None is equal;
            ``"evidence"``, of Laplace posteriors, is :math:`\pi_n \propto p(y)_n`, the
            mass that each finds around its mode: a few nats leave one of them.

    Raises:
        TypeError: If a component is another kind of guide.
        ValueError: If there are no components, their sites or shapes differ, or the
            weights don't fit.
    """

    def __init__(
        self,
        components: Sequence[Posterior],
        weights: Tensor | Sequence[float] | Literal["evidence"] | None = None,
    ) -> None:
        name = "The components of a mixture"
        check_kind(name, components, Sequence, "a list of posteriors")
        if not components:
            raise ValueError("A mixture needs at least one component; found none.")
        kinds = LaplacePosterior, ParticlePosterior, MixturePosterior
        for index, component in enumerate(components):
            if not isinstance(component, kinds):
                raise TypeError(
                    f"Component {index} is {type(component).__name__}; a mixture is of "
                    "Laplace and particle posteriors and of mixtures of them."
                )
        self.components = tuple(components)
        self._like = components[0].mean()
        for index, component in enumerate(self.components):
            shapes = {s: x.shape for s, x in component.mean().items()}
            for site in shapes.keys() | self._like.keys():
                expected = self._like[site].shape if site in self._like else None
                if shapes.get(site) != expected:
                    raise ValueError(
                        f"Component {index}, site {site!r}: expected shape "
                        f"{expected}, as in component 0, found {shapes.get(site)}. Mix "
                        "posteriors of one model."
                    )
        self.weights = _normalised(weights, self.components, self._like)
        self.loras: tuple[LiftedNetwork, ...] = components[0].loras
        self.model: Model | None = components[0].model
        self.obs_site: str | None = components[0].obs_site

    def __call__(self, *args: Any, **kwargs: Any) -> Weights:
        """Sample the sites, whatever the model's arguments."""
        return sample_jointly(self, self._like, self.loras)

    @property
    def prediction_method(self) -> PredictionMethod:
        """How to predict: with linearised networks where all components do so."""
        methods = {component.prediction_method for component in self.components}
        return "linearized" if methods == {"linearized"} else "sample"

    def sample(self, num_samples: int) -> Weights:
        """Draws in random order of components, site -> value with a leading (S,).

        Raises:
            ValueError: If S isn't positive.
        """
        check_num_samples(num_samples)
        drawn = torch.multinomial(self.weights, num_samples, replacement=True)
        counts = torch.bincount(drawn, minlength=len(self.components)).tolist()
        parts = [
            component.sample(n)
            for component, n in zip(self.components, counts, strict=True)
            if n > 0
        ]
        # Sorting by component twice over puts each draw where its component was drawn.
        place = drawn.argsort(stable=True).argsort()
        return {s: torch.cat([part[s] for part in parts])[place] for s in self._like}

    def log_prob(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Log density in nats, (S,) for weights with a leading (S,).

        Raises:
            ValueError: If a component has no density.
        """
        log_probs = torch.stack([c.log_prob(weights) for c in self.components], -1)
        return (log_probs + self.weights.log().to(log_probs)).logsumexp(-1)

    def mean(self) -> Weights:
        """The mean, each of its site's shape."""
        means = [component.mean() for component in self.components]
        return {
            site: torch.tensordot(
                self.weights.to(like), torch.stack([m[site] for m in means]), 1
            )
            for site, like in self._like.items()
        }

    def variance(self) -> Weights:
        """Marginal variances by the law of total variance, each of its site's shape."""
        result, mean = {}, self.mean()
        within = [component.variance() for component in self.components]
        means = [component.mean() for component in self.components]
        for site, like in self._like.items():
            pi = self.weights.to(like)
            distance = torch.stack([m[site] for m in means]) - mean[site]
            between = torch.tensordot(pi, distance.square(), 1)
            inside = torch.tensordot(pi, torch.stack([v[site] for v in within]), 1)
            result[site] = inside + between
        return result

    def mode(self) -> Weights:
        """Not defined.

        Raises:
            ValueError: Always.
        """
        raise ValueError("A mixture has no single mode. Use those of .components.")


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
    return pi / pi.sum()


def _log_evidences(weights: str, components: Sequence[Posterior]) -> Tensor:
    laplace = [c for c in components if isinstance(c, LaplacePosterior)]
    if weights != "evidence" or len(laplace) < len(components):
        raise ValueError(
            f"Mixture weights are {weights!r}. Give numbers, or 'evidence' where every "
            "component is a Laplace posterior, found "
            f"{[type(component).__name__ for component in components]}."
        )
    return torch.stack([component.log_evidence().double() for component in laplace])
