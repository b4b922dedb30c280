"""The mathematics of SVGD and Laplace compiles, as one graph each, to the same."""

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora.curvature.block_gaussian import BlockGaussian, Eigenblocks
from pyro_lora.curvature.capture import CountedTokens
from pyro_lora.curvature.kronecker_normal import KroneckerNormal
from pyro_lora.infer.svgd import weight_space

Function = tuple[Callable[..., Any], tuple[Tensor, ...]]
NUM_PARTICLES, LAYERS, OUT, IN = 4, 2, 5, 6
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def step(kernel: Any, transport: Any) -> Function:
    """Where particles move, of their scores."""

    def moved(particles: Tensor, scores: Tensor) -> Any:
        sq_dists = weight_space.squared_distances(particles)
        gram, slope = weight_space.gram_and_slope(kernel, sq_dists)
        pull, push = transport.weights(gram, slope, 2.0)
        return weight_space.combine(scores, particles, pull, push)

    return moved, (randn(NUM_PARTICLES, 7, 5), randn(NUM_PARTICLES, 7, 5))


def factors(structure: Any) -> Function:
    """A batch's factors, of inputs and gradients."""
    tokens = CountedTokens(MASK)

    def summed(a: Tensor, g: Tensor) -> Any:
        inputs = structure.input_factor(a, tokens)
        of_terms = structure.gradient_factor(inputs, g, tokens)
        found = structure.combine(inputs, of_terms)
        return tuple(getattr(found, field.name) for field in fields(found))

    return summed, (
        randn(*MASK.shape, IN),
        randn(2, *MASK.shape, OUT) * MASK[..., None],
    )


def gaussian() -> BlockGaussian:
    rows, columns = (torch.linalg.qr(randn(LAYERS, n, n)).Q for n in (OUT, IN))
    return BlockGaussian(
        {"w": randn(LAYERS, OUT, IN)},
        {"w": torch.ones(LAYERS, 1, 1, dtype=torch.float64)},
        {"w": Eigenblocks(randn(LAYERS, OUT, IN).square(), rows, columns)},
    )


def log_det() -> Function:
    around = gaussian()
    return lambda tau: around.log_det({"w": tau}), (randn(LAYERS, 1, 1).exp(),)


def covariance() -> Function:
    around = gaussian()

    def of_outputs(jacobian: Tensor) -> Tensor:
        by_layer = [("w", layer) for layer in jacobian]
        return around.covariance(by_layer, [around.prior_precision])

    return of_outputs, (randn(LAYERS, 3, 2, OUT, IN),)


def log_prob() -> Function:
    block, loc = gaussian().blocks["w"], randn(LAYERS, OUT, IN)

    def of_weights(value: Tensor) -> Tensor:
        precision = block.values + 1
        fn = KroneckerNormal(
            loc, precision, block.rows, block.columns, validate_args=False
        )
        return fn.log_prob(value)

    return of_weights, (randn(3, LAYERS, OUT, IN),)


WITH_GRADIENT: dict[str, Callable[[], Function]] = {
    "RBF, stein": lambda: step(pl.kernels.RBF(), weight_space.STEIN),
    "IMQ, repulsive": lambda: step(pl.kernels.IMQ(), weight_space.REPULSIVE),
    "mixture, stein": lambda: step(pl.kernels.Mixture(), weight_space.STEIN),
}
FUNCTIONS: dict[str, Callable[[], Function]] = {
    **WITH_GRADIENT,
    "KFAC": lambda: factors(pl.structures.KFAC()),
    "reduced KFAC": lambda: factors(pl.structures.KFAC(reduce=True)),
    "Diagonal": lambda: factors(pl.structures.Diagonal()),
    "log det": log_det,
    "covariance": covariance,
    "log prob": log_prob,
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.few(4)
def test_one_graph(name: str) -> None:
    function, given = FUNCTIONS[name]()
    expected = function(*given)  # what is found out once, too
    config: Any = torch._dynamo.config
    if name in WITH_GRADIENT and not hasattr(config, "trace_autograd_ops"):
        pytest.skip("this version of PyTorch has no gradient in a graph")
    options = {"trace_autograd_ops": True} if name in WITH_GRADIENT else {}
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    with config.patch(**options):
        assert_close(compiled(*given), expected, rtol=1e-12, atol=1e-12)
