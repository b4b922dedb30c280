"""Draws for the network itself, which servers of adapters and generation run.

A Gaussian over several layers describes the network linearised at its mode: draws of it
have to be made narrow first, by rows on which their loss is seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from pyro_lora.ground.warning import warn
from pyro_lora.likelihood.batch import Batch
from pyro_lora.posteriors.laplace_posterior import LaplacePosterior
from pyro_lora.posteriors.posterior import Posterior


@runtime_checkable
class _Narrowed(Protocol):
    """One that can be made narrow."""

    def for_sampling(self, batches: Iterable[Batch]) -> Posterior: ...


def served(
    posterior: Posterior, batches: Iterable[Batch] | None, caller: str
) -> Posterior:
    """The posterior whose draws go through the network itself.

    Args:
        posterior: Any.
        batches: Rows with labels on which a Gaussian over several layers is made
            narrow; None where there are none.
        caller: Name of the function that draws.

    Warns:
        UserWarning: If it is such a Gaussian, and stays as wide as it is.
    """
    if not is_linearized(posterior):
        return posterior
    if batches is not None and isinstance(posterior, _Narrowed):
        return posterior.for_sampling(batches)
    warn(
        "A Gaussian over several layers describes the network linearised at its mode. "
        f"The network itself, which {caller} draws for, may predict at chance at draws "
        f"of it. Give rows with labels, {caller}(..., batches=...), on which it is "
        "made narrow as by posterior.for_sampling; or draws of a posterior over the "
        "last layer (AutoLaplace(sites='last_layer')), particles (SVGD), or the "
        "trained weights (ensemble(lora, [posterior.origin()])), which predict as they "
        "should."
    )
    return posterior


def is_linearized(posterior: Posterior) -> bool:
    """Whether a posterior, or a part of it, describes a network that is linearised.

    A Gaussian over one layer is the same either way: the network is linear in that
    layer's weights, up to what comes after it.

    Args:
        posterior: The posterior.
    """
    return any(_num_layers(part) > 1 for _, part in posterior.gaussians())


def _num_layers(gaussian: LaplacePosterior) -> int:
    layers = {
        p.locations[0][0]
        for lora in gaussian.networks
        for site, members in lora.parameters.items()
        for p in members
        if site in gaussian.gaussian.loc
    }
    return len(layers)
