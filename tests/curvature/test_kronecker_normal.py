"""KroneckerNormal against MultivariateNormal with the dense matrix."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_lora.curvature.kronecker_normal import KroneckerNormal
from tests.curvature.gauss_newton import assert_same

O, I = 3, 4
BATCH_SHAPES = [(), (2,), (5, 1, 2)]
BASES = [(True, True), (True, False), (False, True), (False, False)]


def orthogonal(*shape: int) -> Tensor:
    return torch.linalg.qr(torch.randn(*shape, dtype=torch.float64)).Q


def arguments(
    batch_shape: tuple[int, ...], with_rows: bool = True, with_columns: bool = True
) -> dict[str, Any]:
    return {
        "loc": torch.randn(*batch_shape, O, I, dtype=torch.float64),
        "precision": torch.rand(*batch_shape, O, I, dtype=torch.float64) + 0.1,
        "rows": orthogonal(*batch_shape, O, O) if with_rows else None,
        "columns": orthogonal(*batch_shape, I, I) if with_columns else None,
    }


def dense(q: KroneckerNormal) -> dist.MultivariateNormal:
    """The same distribution over row-major vectors."""
    shape = q.batch_shape
    eye_o, eye_i = torch.eye(O).double(), torch.eye(I).double()
    rows = (eye_o if q.rows is None else q.rows).expand(*shape, O, O)
    columns = (eye_i if q.columns is None else q.columns).expand(*shape, I, I)
    basis = torch.einsum("...ij,...kl->...ikjl", rows, columns)
    basis = basis.reshape(*shape, O * I, O * I)
    precision = basis * q.precision.flatten(-2)[..., None, :] @ basis.mT
    return dist.MultivariateNormal(q.mean.flatten(-2), precision_matrix=precision)


@pytest.mark.parametrize("batch_shape", BATCH_SHAPES)
@pytest.mark.parametrize(("with_rows", "with_columns"), BASES)
def test_density_and_moments(
    batch_shape: tuple[int, ...], with_rows: bool, with_columns: bool
) -> None:
    q = KroneckerNormal(**arguments(batch_shape, with_rows, with_columns))
    p = dense(q)
    assert q.batch_shape == batch_shape
    assert q.event_shape == (O, I)
    value = torch.randn(7, *batch_shape, O, I, dtype=torch.float64)
    assert_same(q.log_prob(value), p.log_prob(value.flatten(-2)))
    assert_same(q.entropy(), p.entropy())
    assert_same(q.mean.flatten(-2), p.mean)
    assert_same(q.variance.flatten(-2), p.variance)
    assert_same(q.stddev.flatten(-2), p.stddev)


def test_it_is_the_gaussian_of_precision_g_kron_a_plus_tau() -> None:
    a, g = torch.randn(6, I).double(), torch.randn(6, O).double()
    a, g = a.mT @ a, g.mT @ g
    a_values, columns = torch.linalg.eigh(a)
    g_values, rows = torch.linalg.eigh(g)
    tau = 0.7
    precision = torch.outer(g_values, a_values) + tau
    q = KroneckerNormal(torch.zeros(O, I).double(), precision, rows, columns)
    matrix = torch.kron(g, a) + tau * torch.eye(O * I).double()
    p = dist.MultivariateNormal(torch.zeros(O * I).double(), precision_matrix=matrix)
    value = torch.randn(5, O, I, dtype=torch.float64)
    assert_same(q.log_prob(value), p.log_prob(value.flatten(-2)))


@pytest.mark.parametrize(("with_rows", "with_columns"), BASES)
@pytest.mark.parametrize("seed", range(2))
def test_draws_have_the_moments(seed: int, with_rows: bool, with_columns: bool) -> None:
    torch.manual_seed(seed)
    q = KroneckerNormal(**arguments((2,), with_rows, with_columns))
    num_samples = 20_000
    draws = q.rsample((num_samples,)).flatten(-2)
    p = dense(q)
    standard_error = p.stddev / num_samples**0.5
    assert ((draws.mean(0) - p.mean).abs() < 5 * standard_error).all()
    centred = draws - p.mean
    covariance = torch.einsum("sli,slj->lij", centred, centred) / num_samples
    c = p.covariance_matrix
    diagonal = c.diagonal(dim1=-2, dim2=-1)
    # Isserlis: the variance of x_i x_j is c_ii c_jj + c_ij^2.
    standard_error = (
        (diagonal[..., :, None] * diagonal[..., None, :] + c.square()) / num_samples
    ).sqrt()
    assert ((covariance - c).abs() < 5 * standard_error).all()


def test_draws_are_differentiable() -> None:
    arguments_ = arguments(())
    leaves = [arguments_["loc"].requires_grad_(), arguments_["precision"]]
    leaves[1].requires_grad_()
    draw = KroneckerNormal(**arguments_).rsample()
    for gradient in torch.autograd.grad(draw.square().sum(), leaves):
        assert gradient.abs().min() > 0


@pytest.mark.parametrize("shape", [(2,), (3, 2), (4, 3, 2)])
def test_expand(shape: tuple[int, ...]) -> None:
    q = KroneckerNormal(**arguments((2,)))
    larger = q.expand(shape)
    assert larger.batch_shape == shape
    value = torch.randn(*shape, O, I, dtype=torch.float64)
    assert_same(larger.log_prob(value), q.log_prob(value))
    assert_same(larger.variance, q.variance.expand(*shape, O, I))
    assert_same(larger.entropy(), q.entropy().expand(shape))
    assert larger.sample((5,)).shape == (5, *shape, O, I)
    different = larger.sample()
    assert len(shape) == 1 or not torch.equal(different[0], different[1])


@pytest.mark.parametrize("name", ["loc", "precision", "rows", "columns"])
def test_any_argument_may_bring_the_batch_dims(name: str) -> None:
    one = arguments(())
    one[name] = arguments((6,))[name]
    q = KroneckerNormal(**one)
    assert q.batch_shape == (6,)
    value = torch.randn(6, O, I, dtype=torch.float64)
    assert_same(q.log_prob(value), dense(q).log_prob(value.flatten(-2)))
    assert_same(q.variance.flatten(-2), dense(q).variance)
    assert q.sample((2,)).shape == (2, 6, O, I)


def test_as_a_sample_site_in_a_plate() -> None:
    q = KroneckerNormal(**arguments(()))

    def model() -> Tensor:
        with pyro.plate("particles", 5, dim=-2), pyro.plate("layers", 2, dim=-1):
            return pyro.sample("w", q)

    trace: Any = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    value = trace.nodes["w"]["value"]
    assert value.shape == (5, 2, O, I)
    assert_same(trace.nodes["w"]["log_prob"], dense(q).log_prob(value.flatten(-2)))
    independent = q.expand((2,)).to_event(1)
    assert_same(independent.log_prob(value), q.log_prob(value).sum(-1))


def test_impossible_values_are_refused() -> None:
    one = arguments(())
    one["precision"][0, 0] = -1.0
    with pytest.raises(ValueError, match="precision"):
        KroneckerNormal(**one, validate_args=True)
    q = KroneckerNormal(**arguments(()), validate_args=True)
    with pytest.raises(ValueError, match="shape"):
        q.log_prob(torch.zeros(O, I + 1, dtype=torch.float64))
