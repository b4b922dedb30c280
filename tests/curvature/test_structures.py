"""Each structure against the exact Gauss-Newton matrix, where it should be equal."""

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora.curvature import structures
from tests.curvature.gauss_newton import (
    assert_same,
    blocks,
    brute_force,
    flatten,
    laplace,
    precision_matrix,
    unflatten,
)
from tests.networks import batch, bert, llama

pytestmark = pytest.mark.untrained

LAYERWISE = [
    pl.structures.KFAC(),
    pl.structures.KFAC(reduce=True),
    pl.structures.Diagonal(),
]
ALL = [*LAYERWISE, pl.structures.Dense()]
Build = Callable[..., PeftModel]


def assert_same_fisher(
    actual: Tensor, expected: Tensor, build: Build = bert, message: str = ""
) -> None:
    """Equal but for rounding; Llama's norms compute in float32, whatever the dtype."""
    tolerance = (1e-6 if build is llama else 1e-11) * max(float(expected.max()), 1.0)
    assert_same(actual, expected, atol=tolerance, msg=message or None)


def one_token(num_labels: int) -> dict[str, Tensor]:
    return {
        "input_ids": torch.randint(1, 50, (1, 1)),
        "attention_mask": torch.ones(1, 1, dtype=torch.long),
        "labels": torch.randint(num_labels, (1,)),
    }


@pytest.mark.grid
@pytest.mark.parametrize(
    "structure", [*LAYERWISE, pl.structures.EKFAC(), pl.structures.KFAC(rank=4)]
)
@pytest.mark.parametrize("num_labels", [2, 3, 5])
@pytest.mark.parametrize("build", [bert, llama])
def test_layers_are_exact_at_one_token_of_one_datum(
    build: Build, num_labels: int, structure: structures.Structure
) -> None:
    lora, texts = pl.lift(build(num_labels)), one_token(num_labels)
    precision = precision_matrix(laplace(lora, texts, structure=structure))
    exact = brute_force(lora, texts, 1.0).fisher
    places = blocks(lora)
    for site, layer, place in places:
        block = exact[place, place]
        expected = (
            block.diag().diag() if structure == pl.structures.Diagonal() else block
        )
        identity = torch.eye(len(block), dtype=block.dtype)
        message = f"{site}, {layer}"
        assert_same_fisher(precision[place, place] - identity, expected, build, message)
        precision[place, place] = 0
    assert precision.abs().max() == 0  # nothing between the blocks


@pytest.mark.parametrize("structure", ALL)
@pytest.mark.parametrize("build", [bert, llama])
def test_a_site_without_gradient_keeps_its_prior(
    build: Build, structure: structures.Structure
) -> None:
    # Attention over a single token has no use for its query.
    lora = pl.lift(build(3), prior=pl.priors.normal(scale=0.7))
    posterior = laplace(lora, one_token(3), structure=structure)
    name = "query" if build is bert else "q_proj"
    queries = [site for site in lora.sites if name in site]
    assert len(queries) == 2
    variance = posterior.variance()
    for site in lora.sites:
        prior = torch.full_like(variance[site], 0.49)
        if site in queries:
            assert_same(variance[site], prior)
        else:
            assert float((prior - variance[site]).max()) > 1e-4


@pytest.mark.grid
@pytest.mark.parametrize("num_labels", [2, 3])
@pytest.mark.parametrize("build", [bert, llama])
@pytest.mark.parametrize("seed", range(2))
def test_dense_is_the_gauss_newton_matrix(
    build: Build, num_labels: int, seed: int
) -> None:
    torch.manual_seed(seed)
    lora = pl.lift(build(num_labels), prior=pl.priors.normal(scale=2.0))
    texts = batch(6, num_labels=num_labels)
    precision = precision_matrix(
        laplace(lora, texts, 4, structure=pl.structures.Dense())
    )
    exact = brute_force(lora, texts, 0.25)
    assert_same_fisher(precision, exact.fisher + torch.diag(exact.precision), build)


class DenseInEachLayer(structures.JointStructure):
    def factors(
        self, a: Sequence[Tensor], g: Sequence[Tensor]
    ) -> structures.DenseFactors:
        one = structures.Dense()
        layers = [one.factors([a_l], [g_l]) for a_l, g_l in zip(a, g, strict=True)]
        return structures.DenseFactors(torch.block_diag(*(f.matrix for f in layers)))


def test_a_joint_structure_of_the_users() -> None:
    lora, texts = pl.lift(bert(3)), batch(6, num_labels=3)
    precision = precision_matrix(laplace(lora, texts, 4, structure=DenseInEachLayer()))
    exact = brute_force(lora, texts, 1.0).fisher
    expected = torch.eye(len(exact), dtype=exact.dtype)
    for _, _, place in blocks(lora):
        expected[place, place] += exact[place, place]
    assert_same_fisher(precision, expected)


def test_a_joint_structure_returns_dense_factors() -> None:
    class OfOneLayer(structures.JointStructure):
        def factors(self, a: Sequence[Tensor], g: Sequence[Tensor]) -> Any:
            return structures.KFAC()(a[0], g[0])

    lora, texts = pl.lift(bert(3)), batch(6, num_labels=3)
    with pytest.raises(ValueError, match="KroneckerFactors, expected DenseFactors"):
        laplace(lora, texts, structure=OfOneLayer())


@pytest.mark.parametrize("build", [bert, llama])
def test_diagonal_is_the_diagonal_of_dense(build: Build) -> None:
    lora, texts = pl.lift(build(3)), batch(6, num_labels=3)
    precision = precision_matrix(
        laplace(lora, texts, structure=pl.structures.Diagonal())
    )
    exact = brute_force(lora, texts, 1.0)
    assert_same_fisher(precision, torch.diag(exact.fisher.diag() + 1.0), build)


@pytest.mark.parametrize("kind", ["lora", "base"])
def test_biases_are_blocks_of_their_own(kind: str) -> None:
    network = bert(3, lora_bias=kind == "lora")
    if kind == "base":
        for name, parameter in network.named_parameters():
            parameter.requires_grad |= name.endswith("value.base_layer.bias")
    lora, texts = pl.lift(network), one_token(3)
    assert len([s for s in lora.sites if s.startswith(kind) and s.endswith("bias")]) > 0
    precision = precision_matrix(laplace(lora, texts))
    exact = brute_force(lora, texts, 1.0).fisher
    for site, layer, place in blocks(lora):
        identity = torch.eye(place.stop - place.start, dtype=exact.dtype)
        expected = exact[place, place] + identity
        assert_same(precision[place, place], expected, msg=f"{site}, {layer}")


# Networks that aren't transformers, with a Normal likelihood.


def regression(lora: pl.LiftedNetwork, num_data: int) -> Callable[..., Tensor]:
    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        loc = lora()(x)
        with pyro.plate("data", num_data, subsample=x):
            return pyro.sample("y", dist.Normal(loc, 0.5).to_event(1), obs=y)

    return model


def fit_regression(
    lora: pl.LiftedNetwork, x: Tensor, y: Tensor, structure: structures.Structure
) -> pl.LaplacePosterior:
    guide = pl.AutoLaplace(
        regression(lora, len(x)),
        init_loc_fn=lora.init_to_adapter(),
        structure=structure,
    )
    batches = [{"x": x[i : i + 4], "y": y[i : i + 4]} for i in range(0, len(x), 4)]
    return guide.laplace_approximation(batches)


def own_and_exact(
    lora: pl.LiftedNetwork, x: Tensor, structure: structures.Structure
) -> tuple[Tensor, Tensor]:
    """The posterior's precision less the prior's, and the Gauss-Newton matrix."""
    weights = lora.weights()

    def outputs(flat: Tensor) -> Tensor:
        with lora.bind(unflatten(flat, weights)) as net:
            value: Tensor = net(x)
        return value

    flat = flatten(weights)
    j = torch.autograd.functional.jacobian(outputs, flat).flatten(0, 1)  # (N O, D)
    y = torch.zeros_like(outputs(flat))
    precision = precision_matrix(fit_regression(lora, x, y, structure))
    return precision - torch.eye(len(flat), dtype=flat.dtype), j.mT @ j / 0.25


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """(B, T, O) -> (B, O)."""
        return x.mean(1)


def test_expand_is_exact_in_a_deep_linear_network() -> None:
    lora = pl.lift(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double())
    x = torch.randn(6, 3, dtype=torch.float64)
    own, exact = own_and_exact(lora, x, pl.structures.KFAC())
    for site, layer, place in blocks(lora):
        assert_same(own[place, place], exact[place, place], msg=f"{site} {layer}")


def test_reduce_is_exact_where_tokens_are_averaged() -> None:
    lora = pl.lift(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), Mean()).double())
    x = torch.randn(6, 5, 3, dtype=torch.float64)
    own, exact = own_and_exact(lora, x, pl.structures.KFAC(reduce=True))
    for site, layer, place in blocks(lora):
        assert_same(own[place, place], exact[place, place], msg=f"{site} {layer}")
    own, exact = own_and_exact(lora, x, pl.structures.KFAC())
    place = blocks(lora)[0][2]
    assert float((own - exact)[place, place].abs().max()) > 0.01


class CalledTwice(nn.Module):
    """One layer with two places in the network."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh() + 1)


@pytest.mark.parametrize("tokens", [(), (4,)])
def test_a_layer_that_is_called_twice(tokens: tuple[int, ...]) -> None:
    lora = pl.lift(nn.Sequential(CalledTwice(), *([Mean()] if tokens else [])))
    x = torch.randn(6, *tokens, 3, dtype=torch.float64)
    own, exact = own_and_exact(lora, x, pl.structures.Dense())
    assert_same(own, exact)
    own, _ = own_and_exact(lora, x, pl.structures.Diagonal())
    assert_same(own, exact.diag().diag())


class WithUnusedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(5, 4).double()
        self.layer = nn.Linear(3, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


@pytest.mark.parametrize("structure", ALL)
def test_a_layer_that_is_not_called_keeps_its_prior(
    structure: structures.Structure,
) -> None:
    lora = pl.lift(WithUnusedLayer())
    own, exact = own_and_exact(lora, torch.randn(6, 3, dtype=torch.float64), structure)
    for site, _, place in blocks(lora):
        block = exact[place, place]
        assert (float(block.abs().max()) == 0) == ("unused" in site)
        expected = (
            block.diag().diag() if structure == pl.structures.Diagonal() else block
        )
        assert_same(own[place, place], expected)


@pytest.mark.parametrize("layers", ["output", "input"])
def test_layers_overwritten_in_place_are_refused(layers: str) -> None:
    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            x = x + 1
            out: Tensor = self.layer(x)
            if layers == "output":
                return out.relu_()
            x.mul_(2)
            return out + x

    x = torch.randn(6, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"in place.*inplace=False"):
        fit_regression(
            pl.lift(Careless()), x, torch.zeros_like(x), pl.structures.KFAC()
        )


# The structures as plain functions.


def test_factors_are_sums_over_tokens_that_count() -> None:
    a = torch.randn(3, 4, 5, dtype=torch.float64)
    g = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    counts = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    g = g * counts[..., None]
    rows, grads = a[counts], g[:, counts].flatten(0, 1)
    expand = pl.structures.KFAC()(a, g)
    assert_same(expand.a, rows.mT @ rows)
    assert_same(expand.g, grads.mT @ grads)
    assert int(expand.count) == 4
    reduce = pl.structures.KFAC(reduce=True)(a, g)
    means = torch.stack([a[0][counts[0]].mean(0), a[2, 0]])
    sums = g.sum(2).flatten(0, 1)
    assert_same(reduce.a, means.mT @ means)
    assert_same(reduce.g, sums.mT @ sums)
    assert int(reduce.count) == 2


@pytest.mark.parametrize("structure", LAYERWISE)
def test_half_precision_is_summed_in_float32(
    structure: structures.LayerStructure,
) -> None:
    a, g = torch.randn(8, 32, 4), torch.randn(2, 8, 32, 3)
    half = structure(a.bfloat16(), g.bfloat16())
    full = structure(a.bfloat16().double(), g.bfloat16().double())
    for name, value in vars(half).items():
        assert value.dtype == torch.float32
        assert_close(value.double(), vars(full)[name], rtol=1e-5, atol=1e-4)


def test_a_users_own_structure() -> None:
    class Doubled(structures.LayerStructure):
        def input_factor(self, a: Tensor, counts: Any) -> Tensor:
            return a

        def gradient_factor(self, inputs: Tensor, g: Tensor, counts: Any) -> Tensor:
            return 2 * structures.Diagonal().gradient_factor(inputs, g, counts)

        def combine(
            self, inputs: Tensor, gradients: Tensor
        ) -> structures.DiagonalFactors:
            return structures.DiagonalFactors(gradients)

    lora, texts = pl.lift(bert(3)), batch(6, num_labels=3)
    identity = torch.eye(len(flatten(lora.weights())), dtype=torch.float64)
    once = (
        precision_matrix(laplace(lora, texts, structure=pl.structures.Diagonal()))
        - identity
    )
    twice = precision_matrix(laplace(lora, texts, structure=Doubled())) - identity
    assert_same(twice, 2 * once)


@pytest.mark.parametrize("width", [319, 320, 331, 333])
@pytest.mark.parametrize(
    "structure", [pl.structures.KFAC(), pl.structures.KFAC(reduce=True)]
)
def test_wide_factors_are_sums_of_outer_products(
    structure: Callable[..., structures.KroneckerFactors], width: int
) -> None:
    a, g = torch.randn(3, 1, 5).double(), torch.randn(2, 3, 1, width).double()
    wide = structure(g[0], a[None])  # one token each: both structures are one
    assert_same(wide.a, torch.einsum("bti,btj->ij", g[0], g[0]))
    factor = structure(a, g).g
    assert_same(factor, torch.einsum("mbti,mbtj->ij", g, g))
    assert torch.equal(factor, factor.mT)
