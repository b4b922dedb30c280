"""The prior of a Laplace posterior as a description and tensors, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td
from torch.distributions import constraints

from pyro_lora.ground.checked_tensors import CheckedTensors
from pyro_lora.ground.tensor_folder import Real, Schema
from pyro_lora.ground.weights import Weights
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood.model_trace import trace_at
from pyro_lora.posteriors.laplace_posterior import LaplacePosterior, normal_prior
from pyro_lora.posteriors.prior_parameters import (
    AtParameters,
    PriorAtParameters,
    fixing,
    present_prior,
)
from pyro_lora.priors import Prior

Tensors = dict[str, Tensor]

_SAME = 1e-5  # relative difference of two log densities, summed in another order


class NormalPrior(Schema, tag_field="kind", tag="normal"):
    """N(prior mean, 1 / prior precision), the posterior's own."""


class NetworkPrior(Schema, tag_field="kind", tag="network"):
    """The prior that the network was lifted with, recognised by its density."""

    log_density: Real
    parameters: tuple[str, ...]


PriorDescription = NormalPrior | NetworkPrior


class _Expecting(AtParameters):
    """Likewise, once each value is seen to be one that the statement may have."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__(values)
        self.seen: set[str] = set()

    def _pyro_param(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self.values:
            raise ValueError(
                f"the prior of the network has a parameter {name!r}, the posterior's "
                f"has {list(self.values)}. Lift the network with the prior of the fit."
            )
        first = msg["args"][0] if msg["args"] else None
        first = first() if callable(first) else first
        value = self.values[name]
        constraint = msg["kwargs"].get("constraint", constraints.real)
        if isinstance(first, Tensor) and first.shape != value.shape:
            raise ValueError(
                f"tensor prior_parameters/{name} has shape {tuple(value.shape)}, "
                f"expected {tuple(first.shape)}"
            )
        if not constraint.check(value).all():
            raise ValueError(
                f"tensor prior_parameters/{name} isn't {constraint}, as it must be"
            )
        self.seen.add(name)
        super()._pyro_param(msg)


def describe_prior(
    posterior: LaplacePosterior, prefix: str
) -> tuple[dict[str, Any], Tensors]:
    """What :func:`restore_prior` needs.

    A prior that is N(prior mean, 1 / prior precision) is in the posterior's numbers.
    Any other is a function of the user's, which no file can hold: of it the values of
    its ``pyro.param`` statements are kept, and its log density at the mode, by which
    it's recognised.

    Args:
        posterior: The posterior.
        prefix: Put before the tensors' names.

    Returns:
        A description that JSON can hold, and named tensors.
    """
    mode, tau = posterior.gaussian.loc, posterior.prior_precision
    nodes = _nodes(posterior.prior, posterior.loras, mode)
    parameters = {n["name"]: n["value"] for n in nodes if n["type"] == "param"}
    if not parameters and all(
        _is_normal(n["fn"], posterior.prior_mean[n["name"]], tau[n["name"]])
        for n in nodes
        if n["name"] in mode
    ):
        return {"kind": "normal"}, {}
    description = {
        "kind": "network",
        "log_density": _log_density(nodes, mode),
        "parameters": list(parameters),
    }
    return description, {f"{prefix}{name}": x for name, x in parameters.items()}


def restore_prior(
    description: PriorDescription,
    tensors: CheckedTensors,
    in_dtypes: Callable[[Tensors], Tensors],
    loras: Sequence[LiftedNetwork],
    mode: Weights,
    mean: Weights,
    precision: Weights,
    fixed: Weights,
) -> Prior:
    """The prior that :func:`describe_prior` described.

    Args:
        description: As returned by ``describe_prior``.
        tensors: By name, of its ``pyro.param`` statements.
        in_dtypes: Brings tensors to the network's dtype.
        loras: The lifted networks.
        mode: Site -> the mode, in the dtype that it was saved in.
        mean: Site -> mean of the normal prior.
        precision: Site -> precision of the normal prior.
        fixed: Site -> value, of the sites that have a Delta there.

    Returns:
        The prior.

    Raises:
        ValueError: If a parameter is missing or something else, or the saved prior
            isn't normal, and the network's isn't the same.
    """
    if isinstance(description, NormalPrior):
        return normal_prior(mean, precision, fixed)
    parameters = in_dtypes({n: tensors.real(n) for n in description.parameters})
    present = present_prior(loras)
    prior = PriorAtParameters(present, parameters)

    expecting = _Expecting(parameters)
    with expecting:
        found = _log_density(_nodes(present, loras, mode), mode)
    if expecting.seen != parameters.keys():
        raise ValueError(
            f"the posterior's prior has the parameters {list(parameters)}, the "
            f"network's {sorted(expecting.seen)}. Lift the network with the prior of "
            "the fit."
        )
    expected = description.log_density
    if not abs(found - expected) <= _SAME * max(1.0, abs(expected)):
        raise ValueError(
            f"the posterior's prior isn't N(mean, 1 / precision), and its log density "
            f"at the mode is {expected:.6g}; that of the prior which the network was "
            f"lifted with is {found:.6g}. Lift the network with the prior of the fit."
        )
    return fixing(prior, fixed)


@torch.no_grad()
def _nodes(
    prior: Prior, loras: Sequence[LiftedNetwork], mode: Weights
) -> list[dict[str, Any]]:
    """Trace nodes of the prior at the mode; the generators stay where they are."""
    with torch.random.fork_rng():
        traces = [trace_at(partial(prior, lora), mode, {}) for lora in loras]
    return [node for trace in traces for node in trace.nodes.values()]


@torch.no_grad()
def _log_density(nodes: Sequence[Mapping[str, Any]], mode: Weights) -> float:
    return sum(
        float(node["fn"].log_prob(mode[node["name"]]).double().sum())
        for node in nodes
        if node["name"] in mode
    )


def _is_normal(fn: Any, mean: Tensor, precision: Tensor) -> bool:
    while isinstance(fn, td.Independent):
        fn = fn.base_dist
    return isinstance(fn, td.Normal) and all(
        torch.allclose(found, expected.to(found).expand_as(found))
        for found, expected in (
            (fn.loc.expand(mean.shape), mean),
            (fn.scale.expand(mean.shape), precision.rsqrt()),
        )
    )
