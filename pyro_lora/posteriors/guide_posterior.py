"""Any Pyro guide as a posterior: a stock autoguide, or a function of the user's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor, nn

from pyro_lora.ground.interrupts import leaving_no_trace
from pyro_lora.ground.settings import check_count, shown
from pyro_lora.ground.summary import Summarised, brief
from pyro_lora.ground.weights import Weights, copied, drawing_nothing
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood.batch import FAILURES
from pyro_lora.likelihood.model_trace import (
    Model,
    sampled_networks,
    trace_drawing_rows,
    trace_on,
)
from pyro_lora.posteriors.marginals import Levels, as_given, checked_levels
from pyro_lora.posteriors.prior import latent_nodes, networks_prior
from pyro_lora.priors import Prior

Guide = Callable[..., Any]  # any Pyro guide

# What is expected where a posterior is, and how one comes to be.
POSTERIOR = "a posterior, one of pyro_lora's or any Pyro guide"
REMEDY = (
    "Fit one: lora = pl.lift(peft_model), a Pyro model that calls lora(), such as "
    "pl.models.classification(lora, num_data), and of it "
    "pl.AutoLaplace(model, ...).laplace_approximation(batches). Of trained weights "
    "alone it is pl.ensemble(lora, [lora.weights()])."
)


@dataclass(frozen=True, eq=False, repr=False)
class GuidePosterior(Summarised):
    """A Pyro guide without local latent variables.

    Attributes:
        guide: The guide.
        own_model: The model that it is for, where the guide doesn't have it itself.
        called_with: The arguments of its call; autoguides that have run need none.
    """

    guide: Guide
    own_model: Model | None = None
    called_with: Mapping[str, Any] = field(default_factory=dict)

    obs_site: ClassVar[str | None] = None
    num_samples: ClassVar[int | None] = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The guide's own statements."""
        return self.guide(*args, **kwargs)

    def _facts(self) -> dict[str, str]:
        return {
            "guide": brief(self.guide),
            "networks": str(len(self.networks)),
            "model": brief(self.model),
        }

    @property
    def model(self) -> Model | None:
        """The model; stock autoguides have theirs."""
        if self.own_model is not None:
            return self.own_model
        try:
            model: Any = getattr(self.guide, "model", None)
        except TypeError:  # Pyro's forget it when they are copied
            return None
        # Stock guides start their latents by a handler around it, which would start
        # the outcomes, too, that a batch without labels leaves open.
        while True:
            call = getattr(model, "func", None)
            if not isinstance(call, partial) or len(call.args) != 2:
                return model
            handler, inner = call.args
            if not isinstance(handler, InitMessenger):
                return model
            model = inner

    def trace(self) -> Any:
        """Of one call of the guide.

        Raises:
            TypeError: If it samples nothing.
        """
        trace = trace_on(self.guide, (), self.called_with)
        if not latent_nodes(trace):
            raise TypeError(samples_nothing(self.guide))
        return trace

    @property
    def networks(self) -> tuple[LiftedNetwork, ...]:
        """Those of the model that an autoguide has seen; of a function none."""
        trace = getattr(self.guide, "prototype_trace", None)
        return () if trace is None else sampled_networks(trace)

    @property
    def prior(self) -> Prior:
        """The prior of the networks."""
        return networks_prior(self.networks)

    def sample(self, num_samples: int) -> Weights:
        """Draws, site -> value with a leading (S,)."""
        return self.sample_with_log_prob(num_samples)[0]

    def sample_with_log_prob(self, num_samples: int) -> tuple[Weights, Tensor]:
        """Draws, and the log density of each in nats, (S,).

        Auxiliary variables of the guide count in the density, so that it isn't one of
        the draws alone.
        """
        check_count("num_samples", num_samples)
        draws, log_probs = [], []
        with torch.no_grad():
            for _ in range(num_samples):  # a guide of the user's may not vectorise
                trace = self.trace()
                log_probs.append(trace.log_prob_sum())
                latents = latent_nodes(trace).items()
                draws.append(
                    {s: x["value"] for s, x in latents if not _is_auxiliary(x)}
                )
        weights = {site: torch.stack([d[site] for d in draws]) for site in draws[0]}
        return weights, torch.stack(log_probs)

    def log_prob(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Log density in nats, (S,) for weights with a leading (S,).

        Raises:
            ValueError: If the guide has auxiliary variables, as most autoguides do, and
                so no density of given weights.
        """
        log_probs = []
        for s in range(len(next(iter(weights.values())))):
            at = {site: value[s] for site, value in weights.items()}
            trace = trace_drawing_rows(self.guide, at, self.called_with)
            if any(_is_auxiliary(node) for node in trace.nodes.values()):
                raise ValueError(
                    f"{type(self.guide).__name__} has auxiliary variables, and so no "
                    "density of given weights."
                )
            log_probs.append(trace.log_prob_sum())
        return torch.stack(log_probs)

    def gaussians(self) -> list[tuple[float, Any]]:
        """None, whatever the guide's distributions are."""
        return []

    def median(self) -> Weights | None:
        """An autoguide's median, site -> value; None where the guide has none."""
        median = getattr(self.guide, "median", None)
        return None if median is None else copied(median())  # of points the parameters

    def quantiles(self, quantiles: Levels) -> Weights:
        """An autoguide's quantiles of each weight by itself.

        Args:
            quantiles: Between 0 and 1: one, or Q of them.

        Returns:
            Site -> value of the site's shape, for several with a leading (Q,).

        Raises:
            TypeError: If they are no numbers.
            ValueError: If one isn't between 0 and 1, or the guide has none.
        """
        levels = checked_levels(quantiles)
        of_guide = getattr(self.guide, "quantiles", None)
        if of_guide is None:
            raise ValueError(
                f"{type(self.guide).__name__} has no quantiles. Take those of draws."
            )
        return as_given(of_guide(levels), quantiles)


@leaving_no_trace
@torch.no_grad()
def check_samples(network: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Check that a network, which can be called as guides can, is one.

    Args:
        network: Any; the random numbers go on as if it hadn't been called.
        arguments: What it is called with.

    Raises:
        TypeError: If the call samples nothing, whether it goes through or not.
    """
    handler: Any = poutine.trace(network)
    failed: Exception | None = None
    with drawing_nothing([dict(network.named_parameters())]):
        try:
            handler.get_trace(**arguments)
        except FAILURES as error:  # what networks say of arguments
            failed = error
    if not latent_nodes(handler.msngr.trace):
        raise TypeError(samples_nothing(network)) from failed


def samples_nothing(guide: Guide) -> str:
    """What to say of something that can be called as a guide, and isn't one."""
    return (
        f"posterior must be {POSTERIOR}, found {shown(guide)}, whose call samples "
        f"nothing. {REMEDY}"
    )


def _is_auxiliary(node: Mapping[str, Any]) -> bool:
    infer = node["infer"] if node["type"] == "sample" else {}
    return bool(infer.get("is_auxiliary"))
