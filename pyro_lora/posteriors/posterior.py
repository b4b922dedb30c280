"""What a posterior is: a handful of members, whatever kind it is of.

Predictions, diagnoses and trees are told what they need by these, of a class of your
own as of those here; files have a table of the kinds that they hold. A Gaussian says so
by :meth:`gaussians`, a set of particles by ``num_samples``; a posterior without a
density raises in :meth:`log_prob`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_lora.ground.settings import check_fitted, check_function
from pyro_lora.ground.weights import Weights, drawing_nothing
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood.model_trace import Model
from pyro_lora.posteriors.guide_posterior import (
    POSTERIOR,
    REMEDY,
    Guide,
    GuidePosterior,
    check_samples,
)
from pyro_lora.posteriors.laplace_posterior import LaplacePosterior
from pyro_lora.posteriors.prior import is_networks_own, scaled
from pyro_lora.priors import Prior

# How a posterior is predicted from where nobody says.
PredictionMethod = Literal["sample", "linearized"]

_ROUNDING = 1e-6  # of weights that add up to one


@runtime_checkable
class Posterior(Protocol):
    """A distribution over weight sets, of a model that calls lifted networks.

    Those of this library are Pyro guides, too: called with the model's arguments they
    sample the sites. A class of your own needs the members below and nothing else.
    """

    @property
    def model(self) -> Model | None:
        """The Pyro model; None where it isn't known."""
        ...

    @property
    def networks(self) -> tuple[LiftedNetwork, ...]:
        """The lifted networks in the model; empty where they aren't known."""
        ...

    @property
    def obs_site(self) -> str | None:
        """The likelihood's site, None for the only one."""
        ...

    @property
    def prior(self) -> Prior:
        """The prior that it was made with."""
        ...

    @property
    def num_samples(self) -> int | None:
        """How many draws there are, K particles; None where any number may be drawn.

        ``sample`` of as many gives each of them once, in order.
        """
        ...

    def sample(self, num_samples: int) -> Weights:
        """Draws, site -> value with a leading (S,)."""
        ...

    def log_prob(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Log density in nats, (S,) for weights with a leading (S,).

        Raises:
            ValueError: If it has no density.
        """
        ...

    def gaussians(self) -> Sequence[tuple[float, LaplacePosterior]]:
        """Its Gaussian parts, each with its weight; empty where there are none.

        The weights add up to one where it has no others.
        """
        ...


class WithMode(Posterior, Protocol):
    """A posterior that says where its mode is, or that it has none."""

    def mode(self) -> Weights:
        """Site -> value."""


@runtime_checkable
class _Fitted(Protocol):
    """One that knows which arguments the model got in the fit, unless None."""

    @property
    def fit_arguments(self) -> frozenset[str] | None: ...


def as_posterior(
    posterior: Posterior | Guide,
    model: Model | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Posterior:
    """The door of every function of a posterior: any Pyro guide becomes one.

    Args:
        posterior: A posterior, which stays as it is, or a Pyro guide.
        model: The model that a guide is for, where it doesn't know itself.
        arguments: What a guide is called with, such as a batch.

    Raises:
        TypeError: If it is neither, but the engine that fits one, say, or a network.
    """
    check_fitted("posterior", posterior)
    if isinstance(posterior, LiftedNetwork):
        raise TypeError(
            f"posterior must be {POSTERIOR}, found a LiftedNetwork. {REMEDY}"
        )
    if isinstance(posterior, Posterior):  # before guides, since ours are guides, too
        return posterior
    check_function("posterior", posterior, POSTERIOR)
    # Pyro's own modules are guides, others may be, where they call pyro.sample.
    if isinstance(posterior, nn.Module) and not isinstance(posterior, PyroModule):
        check_samples(posterior, arguments or {})
    return GuidePosterior(posterior, model, arguments or {})


def kind_of(posterior: Posterior) -> str:
    """What messages call it: its class, or that of the guide that it wraps."""
    if isinstance(posterior, GuidePosterior):
        return type(posterior.guide).__name__
    return type(posterior).__name__


def is_gaussian(posterior: Posterior) -> bool:
    """Whether it is a Gaussian, or a mixture of nothing but Gaussians."""
    return sum(weight for weight, _ in posterior.gaussians()) > 1 - _ROUNDING


def only_gaussian(posterior: Posterior) -> LaplacePosterior | None:
    """The Gaussian that it is; None where it is none, or has other parts."""
    gaussians = posterior.gaussians()
    return gaussians[0][1] if len(gaussians) == 1 and is_gaussian(posterior) else None


def largest_gaussian(posterior: Posterior) -> LaplacePosterior | None:
    """The Gaussian with the most weight; None where there is none."""
    parts = posterior.gaussians()
    return max(parts, key=lambda pair: pair[0])[1] if parts else None


def point_to_serve(posterior: WithMode) -> Weights:
    """The one weight set for the network itself: the mode, or what was refined.

    Raises:
        ValueError: If the posterior has no mode.
    """
    gaussian = largest_gaussian(posterior)
    # At the mode of the linearised network the network itself may predict at chance.
    return posterior.mode() if gaussian is None else gaussian.origin()


def one_weight_set(posterior: Posterior) -> Weights:
    """A weight set in the posterior's range: a mode where it has one, else a draw."""
    for _, gaussian in posterior.gaussians():
        return gaussian.mode()
    sites = [lora.zeros() for lora in posterior.networks]
    with drawing_nothing(sites):
        draws = posterior.sample(posterior.num_samples or 1)
    return {site: value[0] for site, value in draws.items()}


def tempered_prior(posterior: Posterior, scales: Mapping[str, float | Tensor]) -> Prior:
    """The posterior's prior, as a model tempers it.

    Args:
        posterior: A posterior.
        scales: Site -> scale of its log density in the model, where it's another than
            the networks' own prior says.
    """
    # The networks' own prior doesn't know of the model; any other comes of a fit, which
    # has tempered it, or of tuning, which has found it as it counts.
    prior = posterior.prior
    is_own = is_networks_own(prior, posterior.networks)
    return scaled(prior, scales) if is_own else prior


def prediction_method(posterior: Posterior) -> PredictionMethod:
    """How it is predicted from: Gaussians are about the linearised network."""
    return "linearized" if is_gaussian(posterior) else "sample"


def fit_arguments(posterior: Posterior) -> frozenset[str] | None:
    """Those that the model got where the posterior was fitted; None: unknown."""
    return posterior.fit_arguments if isinstance(posterior, _Fitted) else None
