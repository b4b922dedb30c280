"""Stochastic variational inference: every guide and objective on every likelihood.

``pytest -rA -m "" tests/lifting/test_conformance.py`` ends in the table. The fast ones
have every pair of the three, once or more often; the other triples are slow.
"""

import math
from collections.abc import Iterator
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import RenyiELBO
from torch import Tensor
from torch.testing import assert_close

from tests.lifting.conformance import (
    ALPHA,
    ELBOS,
    GUIDES,
    LIKELIHOODS,
    NUM_PARTICLES,
    Case,
    ConformanceTable,
    Draws,
    assert_unchanged,
    conformance_settings,
    drops_a_density,
    lifted_case,
    log_joint_of_draws,
    step_moves_all_parameters,
)

# As from one guide to the next, or one objective, the fast likelihood is another one,
# every pair is among the fast rows.
ROWS = [
    pytest.param(
        *(likelihood, guide, elbo),
        id=f"{likelihood}-{guide}-{elbo}",
        marks=[] if (i + j + k) % len(LIKELIHOODS) == 0 else [pytest.mark.slow],
    )
    for i, likelihood in enumerate(LIKELIHOODS)
    for j, guide in enumerate(GUIDES)
    for k, elbo in enumerate(ELBOS)
]


@pytest.fixture(scope="module", autouse=True)
def table(request: pytest.FixtureRequest) -> None:
    plugins = request.config.pluginmanager
    if not plugins.has_plugin("conformance table"):
        plugins.register(ConformanceTable(), "conformance table")


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    with conformance_settings():
        yield


def trained(case: Case, guide: str, elbo: str) -> Any:
    """The guide after a step, which moved all its parameters and nothing else."""
    guide = GUIDES[guide](case.model, init_loc_fn=case.lora.init_to_adapter())
    with assert_unchanged(case.network):
        step_moves_all_parameters(case.model, guide, elbo, case.texts)
    # The param store holds the guide's parameters, and none of the network.
    of_guide = {id(p) for p in guide.parameters()}
    assert {id(p) for _, p in pyro.get_param_store().named_parameters()} == of_guide
    assert of_guide.isdisjoint(map(id, case.network.parameters()))
    return guide


def loss_and_draws(case: Case, guide: Any, elbo: str) -> tuple[Tensor, Draws, Tensor]:
    """An objective's loss, what it drew, and log p of that by plain PyTorch, (K,)."""
    with torch.no_grad(), Draws() as draws:
        loss = ELBOS[elbo].loss(case.model, guide, **case.texts)
    return torch.tensor(loss), draws, log_joint_of_draws(case, draws)


@pytest.mark.parametrize(
    ("likelihood", "guide", "elbo"),
    [row for row in ROWS if not drops_a_density(*row.values)],
)
def test_svi(likelihood: str, guide: str, elbo: str) -> None:
    case = lifted_case(likelihood)
    loss, draws, log_p = loss_and_draws(case, trained(case, guide, elbo), elbo)
    difference = log_p - draws.log_q()
    expected = difference.mean()
    if isinstance(ELBOS[elbo], RenyiELBO):
        scaled = (1 - ALPHA) * difference
        expected = (scaled.logsumexp(0) - math.log(NUM_PARTICLES)) / (1 - ALPHA)
    assert_close(loss, -expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("likelihood", "guide", "elbo"),
    [row for row in ROWS if drops_a_density(*row.values)],
)
def test_pyro_drops_a_density(likelihood: str, guide: str, elbo: str) -> None:
    # Whatever the model: pyro.distributions.kl takes KL(Delta(v, log_density), p) for
    # -log p(v). The rest of the loss is right. Use Trace_ELBO with these guides.
    case = lifted_case(likelihood)
    loss, draws, log_p = loss_and_draws(case, trained(case, guide, elbo), elbo)
    right = -(log_p - draws.log_q()).mean()
    assert_close(loss, right - draws.log_density().mean(), rtol=1e-10, atol=0)
    assert (loss - right).abs() > 0.01


def test_auto_structured_takes_networks_in_the_default_dtype_only() -> None:
    # Its dependencies are nn.Linear layers that Pyro makes without a dtype.
    case = lifted_case("Categorical")
    torch.set_default_dtype(torch.float32)
    guide = GUIDES["AutoStructured"](case.model)
    with pytest.raises(RuntimeError, match="same dtype"):
        guide(**case.texts)
