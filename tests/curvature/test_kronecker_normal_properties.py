"""KroneckerNormal of any shape and rank against MultivariateNormal."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal

from pyro_lora.curvature.kronecker_normal import KroneckerNormal
from tests.curvature.gauss_newton import assert_same


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_it_is_the_gaussian_of_its_dense_precision(data: st.DataObject) -> None:
    num_rows, num_columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    j, k = data.draw(st.integers(1, num_rows)), data.draw(st.integers(1, num_columns))
    shape = tuple(data.draw(st.lists(st.integers(1, 3), max_size=2)))
    spread = data.draw(st.floats(0, 3))  # decades of the eigenvalues, either way
    torch.manual_seed(data.draw(st.integers(0, 1000)))

    loc = torch.randn(*shape, num_rows, num_columns, dtype=torch.float64)
    precision = 10 ** (spread * (2 * torch.rand(*shape, j, k).double() - 1))
    u = torch.linalg.qr(torch.randn(*shape, num_rows, num_rows).double()).Q[..., :j]
    v = torch.linalg.qr(torch.randn(*shape, num_columns, num_columns).double()).Q
    v = v[..., :k]
    thin = j < num_rows or k < num_columns
    outside = torch.rand(shape, dtype=torch.float64) + 0.1 if thin else None
    q = KroneckerNormal(loc, precision, u, v, outside, validate_args=True)

    basis = torch.einsum("...ij,...kl->...ikjl", u, v)
    basis = basis.reshape(*shape, num_rows * num_columns, j * k)
    tau = torch.ones(shape).double() if outside is None else outside
    tau = tau[..., None, None]
    dense = basis * (precision.flatten(-2)[..., None, :] - tau) @ basis.mT
    dense = dense + tau * torch.eye(num_rows * num_columns, dtype=torch.float64)
    p = MultivariateNormal(loc.flatten(-2), precision_matrix=(dense + dense.mT) / 2)

    draw = q.rsample((3,))
    assert draw.shape == (3, *shape, num_rows, num_columns)
    for value in (draw, loc, loc + torch.randn_like(loc)):
        assert_same(
            q.log_prob(value), p.log_prob(value.flatten(-2)), rtol=1e-8, atol=1e-8
        )
    assert_same(q.entropy(), p.entropy(), rtol=1e-8, atol=1e-8)
    assert_same(q.variance.flatten(-2), p.variance, rtol=1e-8, atol=1e-8)
    larger = q.expand((2, *shape))
    assert_same(larger.entropy(), q.entropy().expand(2, *shape))
    assert larger.sample().shape == (2, *shape, num_rows, num_columns)
