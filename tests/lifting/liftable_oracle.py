"""What lifted networks are compared with: the plain network, one particle at a time."""

import copy
import warnings
from collections.abc import Mapping
from pydoc import locate
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora.ground.weights import Weights
from tests.lifting.liftable_row import Row

NUM_PARTICLES = 3
Sites = Mapping[str, tuple[str, ...]]


def built(row: Row) -> nn.Module:
    """The row's network; what peft warns of while it makes one is not our matter."""
    if row.needs and locate(row.needs) is None:
        pytest.skip(f"needs {row.needs}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return row.build()


def output_of(network: Any, inputs: Mapping[str, Any]) -> Tensor:
    output = network(**inputs)
    if not isinstance(output, Tensor):
        names = ("logits", "last_hidden_state", "logits_per_image")
        output = next(output[name] for name in names if name in output)
    assert isinstance(output, Tensor)
    return output


def score(output: Tensor) -> Tensor:
    """A scalar whose gradient tells all entries of the output apart."""
    coefficients = torch.arange(output.numel(), dtype=torch.float64).cos()
    return (output.double() * coefficients.view(output.shape)).sum()


def plain(
    network: nn.Module, inputs: Mapping[str, Any], sites: Sites, weights: Weights
) -> tuple[Tensor, Weights]:
    """Output and gradients of an unlifted network with the weights written into it."""
    return _written(copy.deepcopy(network), inputs, sites, weights)


def _written(
    network: nn.Module, inputs: Mapping[str, Any], sites: Sites, weights: Weights
) -> tuple[Tensor, Weights]:
    parameters = dict(network.named_parameters())
    for site, names in sites.items():
        for name, value in zip(names, weights[site], strict=True):
            parameters[name].requires_grad_(True)
            parameters[name].data.copy_(value)
    output = output_of(network, inputs)
    computed = torch.autograd.grad(
        score(output),
        [parameters[name] for names in sites.values() for name in names],
        materialize_grads=True,
    )
    gradients = iter(computed)
    stacked = {
        site: torch.stack([next(gradients).to(weights[site].dtype) for _ in names])
        for site, names in sites.items()
    }
    return output.detach(), stacked


def one_by_one(
    network: nn.Module, inputs: Mapping[str, Any], sites: Sites, particles: Weights
) -> tuple[Tensor, Weights]:
    """The same of one unlifted network for each particle, stacked."""
    network = copy.deepcopy(network)
    singles = [
        _written(network, inputs, sites, {site: w[i] for site, w in particles.items()})
        for i in range(NUM_PARTICLES)
    ]
    outputs = torch.stack([output for output, _ in singles])
    return outputs, {
        site: torch.stack([gradients[site] for _, gradients in singles])
        for site in sites
    }


def bound(
    lora: pl.LiftedNetwork, inputs: Mapping[str, Any], weights: Weights
) -> tuple[Tensor, Weights]:
    """The same of the lifted network; with particles, all of them at once."""
    leaves = {site: value.clone().requires_grad_() for site, value in weights.items()}
    has_particles = any(w.shape != lora.weights()[s].shape for s, w in weights.items())
    with lora.bind(leaves) as net:
        output = output_of(net, inputs)
        particles = output.unbind() if has_particles else (output,)
        gradients = torch.autograd.grad(
            torch.stack([score(particle) for particle in particles]).sum(),
            list(leaves.values()),
            materialize_grads=True,
        )
    return output.detach(), dict(zip(leaves, gradients, strict=True))


def assert_same(
    found: tuple[Tensor, Weights], expected: tuple[Tensor, Weights], tolerance: float
) -> None:
    output, gradients = expected
    assert_close(found[0], output, rtol=0, atol=tolerance * scale(output))
    assert found[1].keys() == gradients.keys()
    for site, gradient in gradients.items():
        atol = tolerance * max(map(scale, gradients.values()))
        assert_close(
            found[1][site],
            gradient,
            rtol=0,
            atol=atol,
            msg=lambda m, s=site: f"{s}: {m}",
        )


def scale(value: Tensor) -> float:
    return max(1.0, float(value.abs().max()))


def noisy(lora: pl.LiftedNetwork, parameters: Mapping[str, Tensor]) -> Weights:
    """Weights of every particle, in numbers that the parameters' dtype has, too."""
    result = {}
    for site, value in lora.weights().items():
        noise = 0.2 * torch.randn(NUM_PARTICLES, *value.shape, dtype=value.dtype)
        dtype = parameters[lora.sites[site][0]].dtype
        result[site] = (value + noise).to(dtype).to(value.dtype)
    return result
