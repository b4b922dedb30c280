"""Every kernel in every space, and what all of them are for one particle."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pyro.optim import Adam
from torch.testing import assert_close

from pyro_lora import kernels
from tests.infer import double_loop
from tests.infer.engines import engine
from tests.infer.targets import (
    Target,
    bernoulli_bert,
    bert,
    hierarchical_bert,
    hierarchical_regression,
)
from tests.infer.test_svgd_delta_space import PROFILES
from tests.infer.test_svgd_step import SPACES, assert_equal, direction

# The Gaussian is test_svgd_step's.
OTHERS = [name for name in PROFILES if name != "RBF"]


@pytest.mark.grid
@pytest.mark.parametrize("make", [hierarchical_regression, hierarchical_bert])
@pytest.mark.parametrize("space", list(SPACES))
@pytest.mark.parametrize("bandwidth", [None, 2.0])
@pytest.mark.parametrize("name", OTHERS)
def test_weights_are_compared(
    make: Callable[[int], Target], space: Any, bandwidth: float | None, name: str
) -> None:
    target = make(4)
    kernel, profile = PROFILES[name]
    kernel = kernel(space=space, bandwidth=bandwidth)
    at = double_loop.points(target.particles)
    by_site = SPACES[space](at, bandwidth, profile)
    phi, _ = direction(target, kernel, temperature=2.0)
    assert_equal(phi, double_loop.stein(at, target.log_joint, by_site, 2.0))
    phi, _ = direction(
        target, kernel, temperature=2.0, transport="repulsive", repulsion=3.0
    )
    expected = double_loop.repulsive(at, target.log_joint, by_site, 2.0, 3.0)
    assert_equal(phi, expected)


@pytest.mark.grid
@pytest.mark.parametrize("make", [hierarchical_regression, bert, bernoulli_bert])
@pytest.mark.parametrize("bandwidth", [None, 0.8])
@pytest.mark.parametrize("name", OTHERS)
def test_predictions_are_compared(
    make: Callable[[int], Target], bandwidth: float | None, name: str
) -> None:
    target = make(4)
    kernel, profile = PROFILES[name]
    phi, _ = direction(
        target, kernel(space="function", bandwidth=bandwidth), repulsion=3.0
    )
    assert target.outputs is not None
    expected = double_loop.function_space(
        double_loop.points(target.particles),
        target.log_joint,
        target.outputs,
        bandwidth,
        1.0,
        3.0,
        profile,
    )
    assert_close(phi, expected, rtol=1e-9, atol=1e-9)


SINGLE: list[tuple[Any, dict[str, Any]]] = [
    (kernels.NoRepulsion(), {}),
    (lambda sq_dists: (-sq_dists.sqrt()).exp(), {}),
    *(
        (
            kernel(space=space),
            {
                "transport": transport,
                "repulsion": 5.0 if transport == "repulsive" else None,
            },
        )
        for kernel in (kernels.RBF, kernels.IMQ, kernels.Mixture)
        for space in ("joint", "site", "delta", "function")
        for transport in ("stein", "repulsive")
        if (space, transport) != ("function", "stein")
    ),
]


@pytest.mark.parametrize(("kernel", "settings"), SINGLE)
@pytest.mark.few(8)
def test_one_particle_is_map(kernel: Any, settings: dict[str, Any]) -> None:
    # Of a mode there is nothing to say: a warning would be an error.
    target = bert(1)
    svgd = engine(target, Adam({"lr": 0.01}), kernel, **settings)
    leaves = {s: x[0].clone().requires_grad_() for s, x in target.particles.items()}
    adam = torch.optim.Adam(leaves.values(), lr=0.01)
    for _ in range(3):
        adam.zero_grad()
        loss = -target.log_joint(leaves)
        loss.backward()
        adam.step()
        assert svgd.step(**target.batch) == pytest.approx(loss.item(), rel=1e-12)
    expected = {site: x.detach()[None] for site, x in leaves.items()}
    assert_equal(svgd.get_named_particles(), expected)
    assert svgd.diagnostics["repulsion"] == [0, 0, 0]
