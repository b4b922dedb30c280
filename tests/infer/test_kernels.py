"""Kernels and directions against their formulas, entry by entry."""

import math
from dataclasses import dataclass

import pytest
import torch
from pyro.optim import SGD
from torch import Tensor
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora import kernels
from pyro_lora.infer.svgd import weight_space
from tests import networks


def distances(num_particles: int) -> Tensor:
    x = torch.randn(num_particles, 3).double()
    return torch.cdist(x, x).square()


def test_rbf_with_a_bandwidth() -> None:
    sq_dists = distances(4)
    gram = kernels.RBF(bandwidth=0.7)(sq_dists)
    for i in range(4):
        for j in range(4):
            expected = math.exp(-sq_dists[i, j].item() / (2 * 0.7**2))
            assert gram[i, j].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("num_particles", [2, 3, 4, 5])
def test_the_median_is_the_lower_one_over_pairs(num_particles: int) -> None:
    # 1, 3, 6 and 10 pairs: the lower median is number 1, 2, 3 and 5 of them.
    sq_dists = distances(num_particles)
    pairs = sorted(
        sq_dists[i, j].item() for i in range(num_particles) for j in range(i)
    )
    number = {2: 1, 3: 2, 4: 3, 5: 5}[num_particles]
    twice_square = pairs[number - 1] / math.log(num_particles + 1)
    gram = kernels.RBF()(sq_dists)
    assert_close(gram, (-sq_dists / twice_square).exp(), rtol=1e-12, atol=1e-12)


def test_no_gradient_through_the_median() -> None:
    sq_dists = distances(4)
    twice_square = -sq_dists[0, 1] / kernels.RBF()(sq_dists)[0, 1].log()
    _, slope = weight_space.gram_and_slope(kernels.RBF(), sq_dists)
    expected = -(-sq_dists / twice_square).exp() / twice_square
    expected.fill_diagonal_(0)
    assert_close(slope, expected, rtol=1e-10, atol=1e-10)


def test_particles_that_coincide() -> None:
    gram, slope = weight_space.gram_and_slope(kernels.RBF(), torch.zeros(3, 3))
    assert torch.equal(gram, torch.ones(3, 3))
    assert torch.isfinite(slope).all()
    assert torch.equal(kernels.RBF()(torch.zeros(1, 1)), torch.ones(1, 1))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_squared_distances(shape: tuple[int, ...]) -> None:
    x = torch.randn(5, *shape).double()
    sq_dists = weight_space.squared_distances(x)
    expected = torch.stack(
        [torch.stack([(a - b).square().sum() for b in x]) for a in x]
    )
    assert_close(sq_dists, expected, rtol=1e-12, atol=1e-12)
    assert (sq_dists.diagonal() == 0).all()


def test_squared_distances_far_from_the_origin() -> None:
    # In float32, |x|^2 + |y|^2 - 2 xy alone would lose everything here.
    x = torch.randn(4, 50)
    sq_dists = weight_space.squared_distances(100 + 1e-3 * x)
    y = (100 + 1e-3 * x).double()
    expected = (y[:, None] - y).square().sum(-1)
    assert_close(sq_dists.double(), expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_many_weights_are_worked_on_in_blocks(dtype: torch.dtype) -> None:
    # The last block is a smaller one. Sums of bfloat16 numbers are wider.
    num_weights = weight_space.BLOCK + 7
    x, s = (torch.randn(3, 2, num_weights // 2, dtype=dtype) for _ in range(2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tight = {torch.float64: 1e-12, torch.float32: 1e-4}[wide]
    a, b = x.double().flatten(1), s.double().flatten(1)
    centred = a - a.mean(0)
    squares = centred.square().sum(1).mean().sqrt()
    products = weight_space.centred_products(x)
    assert products.dtype == wide
    assert_close(products.double(), centred @ centred.mT, rtol=tight, atol=tight * 1e5)
    assert_close(weight_space.spread({"x": x}), squares, rtol=tight, atol=0)
    norm = b.square().sum(1).mean().sqrt()
    assert_close(weight_space.norm({"s": s}), norm, rtol=tight, atol=0)

    pull, push = torch.rand(3, 3).double(), torch.rand(3, 3).double()
    push -= push.sum(1).diag()
    direction, squares = weight_space.combine(s, x, pull, push)
    assert direction.dtype == dtype
    eps = max(torch.finfo(dtype).eps, 1e-12)
    expected = (pull @ b + push @ a).reshape(x.shape)
    assert_close(direction.double(), expected, rtol=eps, atol=10 * tight)
    terms = torch.stack([(pull @ b).square().sum(), (push @ a).square().sum()])
    assert_close(squares, terms, rtol=tight, atol=0)
    assert_close(
        weight_space.attract(s, pull).flatten(1).double(),
        pull @ b,
        rtol=eps,
        atol=10 * tight,
    )


def test_spread_and_means() -> None:
    values = {"a": torch.randn(4, 2).double(), "b": torch.randn(4).double()}
    flat = torch.cat([values["a"], values["b"][:, None]], 1)
    centre = sum(flat) / 4
    squares = [(x - centre).square().sum().item() for x in flat]
    rms = math.sqrt(sum(squares) / 4)
    assert weight_space.spread(values).item() == pytest.approx(rms, rel=1e-12)
    gram = torch.rand(3, 3).double()
    off = [gram[i, j].item() for i in range(3) for j in range(3) if i != j]
    mean = weight_space.mean_off_diagonal(gram).item()
    assert mean == pytest.approx(sum(off) / 6, rel=1e-12)
    assert weight_space.mean_off_diagonal(torch.ones(1, 1)) == 1


@pytest.mark.parametrize("transport", [weight_space.STEIN, weight_space.REPULSIVE])
@pytest.mark.parametrize("kernel", [kernels.RBF(), kernels.IMQ(bandwidth=0.8)])
def test_both_forms_of_a_transport_s_repulsion_agree(
    transport: weight_space.Transport, kernel: kernels.Kernel
) -> None:
    # Between the weights themselves, distances by their gradients are differences.
    x = torch.randn(5, 4).double()
    gram, slope = weight_space.gram_and_slope(kernel, torch.cdist(x, x).square())

    def gradients(coefficients: Tensor, others: slice) -> tuple[Tensor, ...]:
        leaf = x.clone().requires_grad_()
        sq_dists = (leaf[:, None] - x[others]).square().sum(-1)
        return torch.autograd.grad((coefficients * sq_dists).sum(), leaf)

    _, push = transport.weights(gram, slope, 2.5)
    (repulsion,) = transport.repulsions(gram, slope, 2.5, gradients)
    assert_close(repulsion, push @ x, rtol=1e-10, atol=1e-10)


def test_stein_s_repulsion_of_two_particles() -> None:
    x = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    gram, slope = weight_space.gram_and_slope(
        kernels.RBF(bandwidth=1.0), weight_space.squared_distances(x)
    )
    _, push = weight_space.STEIN.weights(gram, slope, 1.0)
    assert_close(push @ x, math.exp(-2) * x, rtol=1e-12, atol=0)


@dataclass(frozen=True)
class Gaussian:
    """A kernel of a user's own, with a space and a profile of width one."""

    space: str

    def __call__(self, sq_dists: Tensor) -> Tensor:
        return (-sq_dists / 2).exp()


@pytest.mark.parametrize("space", ["joint", "site", "delta", "function"])
def test_the_space_of_a_kernel_of_ones_own_counts(space: str) -> None:
    lora, batch = pl.lift(networks.bert(num_layers=1)), networks.batch()
    moved = []
    for kernel in (Gaussian(space), kernels.RBF(space=space, bandwidth=1.0)):
        svgd = pl.SVGD(
            pl.models.classification(lora, 5),
            kernel,
            SGD({"lr": 1e-3}),
            3,
            repulsion=2.0 if space == "function" else None,
            init_loc_fn=lora.init_to(
                {
                    s: x.expand(3, *x.shape)
                    + torch.arange(3.0).view(3, *[1] * x.ndim) * 0.05
                    for s, x in lora.weights().items()
                }
            ),
        )
        svgd.step(**batch)
        moved.append(svgd.get_named_particles())
    for site, value in moved[0].items():
        assert_close(value, moved[1][site], rtol=1e-12, atol=1e-12)


def test_a_space_that_is_none_is_refused() -> None:
    lora = pl.lift(networks.bert(num_layers=1))
    with pytest.raises(ValueError, match=r"kernel's space .*'logits'"):
        pl.SVGD(
            pl.models.classification(lora, 5),
            Gaussian("logits"),
            SGD({"lr": 1e-3}),
            2,
            init_loc_fn=lora.init_to_adapter(),
        )
