"""Prediction, importance sampling and Monte Carlo on every likelihood."""

from collections.abc import Iterator
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import HMC, MCMC, NUTS, Importance, Predictive
from pyro.infer.autoguide import AutoNormal, AutoNormalMessenger
from pyro.infer.importance import vectorized_importance_weights
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor
from torch.testing import assert_close

from tests.lifting.conformance import (
    GUIDES,
    LIKELIHOODS,
    NUM_PARTICLES,
    Case,
    Draws,
    assert_unchanged,
    conformance_settings,
    lifted_case,
    log_joint_of_draws,
)
from tests.networks import inputs

NUM_DRAWS = 4
on_each_likelihood = pytest.mark.parametrize("likelihood", list(LIKELIHOODS))
WAYS = {False: "one by one", True: "parallel"}


def rows(guides: list[str]) -> list[Any]:
    """Each guide on each likelihood in both ways, of which one is slow."""
    return [
        pytest.param(
            *(likelihood, guide, parallel),
            id=f"{likelihood}-{guide}-{way}",
            marks=[] if (i + j) % 2 == parallel else [pytest.mark.slow],
        )
        for i, likelihood in enumerate(LIKELIHOODS)
        for j, guide in enumerate(guides)
        for parallel, way in WAYS.items()
    ]


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    with conformance_settings():
        yield


# Prediction.


def assert_prediction(
    case: Case, found: dict[str, Tensor], draws: dict[str, Tensor]
) -> None:
    expected = torch.stack(
        [
            case.output({k: draws[k][i].reshape(v) for k, v in case.shapes.items()})
            for i in range(NUM_DRAWS)
        ]
    )
    assert_close(found["output"], expected, rtol=0, atol=1e-10)
    assert found["y"].shape == (NUM_DRAWS, *case.texts["labels"].shape)


@pytest.mark.parametrize(("likelihood", "guide", "parallel"), rows([*GUIDES]))
def test_predictive_from_samples(likelihood: str, guide: str, parallel: bool) -> None:
    case = lifted_case(likelihood)
    guide = GUIDES[guide](case.model, init_loc_fn=case.lora.init_to_adapter())
    samples = Predictive(guide, num_samples=NUM_DRAWS, parallel=parallel)(**case.texts)
    draws = {site: samples[site] for site in case.shapes}
    predictive = Predictive(case.model, draws, parallel=parallel)
    assert_prediction(case, predictive(**inputs(case.texts)), draws)


@pytest.mark.parametrize(
    ("likelihood", "guide", "parallel"),
    rows([name for name in GUIDES if "Messenger" not in name]),
)
def test_predictive_from_guide(likelihood: str, guide: str, parallel: bool) -> None:
    case = lifted_case(likelihood)
    guide = GUIDES[guide](case.model, init_loc_fn=case.lora.init_to_adapter())
    guide(**case.texts)
    predictive = Predictive(
        case.model, guide=guide, num_samples=NUM_DRAWS, parallel=parallel
    )
    with assert_unchanged(case.network):
        output = predictive(**inputs(case.texts))
    assert_prediction(case, output, output)


@on_each_likelihood
def test_auto_normal_messenger_takes_labels_that_are_missing_for_a_latent(
    likelihood: str,
) -> None:
    # It runs the model, in which an unobserved y is one more site to approximate: a
    # discrete one can't be, a normal one wants parameters by plate index. Draw with
    # labels first, as in test_predictive_from_samples.
    case = lifted_case(likelihood)
    guide = AutoNormalMessenger(case.model)
    guide(**case.texts)
    error, message = ValueError, "cannot handle discrete sample site 'y'"
    if likelihood == "Normal":
        error, message = IndexError, "Index is supposed to be a vector"
    with pytest.raises(error, match=message):
        Predictive(case.model, guide=guide, num_samples=2)(**inputs(case.texts))


# Importance sampling and Monte Carlo.


@on_each_likelihood
def test_importance_from_the_prior(likelihood: str) -> None:
    case = lifted_case(likelihood)
    with assert_unchanged(case.network):
        run = Importance(case.model, num_samples=3).run(**case.texts)
    for trace, log_weight in zip(run.exec_traces, run.log_weights, strict=True):
        values = {site: trace.nodes[site]["value"] for site in case.shapes}
        expected = case.log_likelihood(values).sum()
        assert_close(log_weight, expected, rtol=1e-10, atol=0)


@on_each_likelihood
def test_importance_from_a_guide(likelihood: str) -> None:
    case = lifted_case(likelihood)
    auto_normal = AutoNormal(case.model, init_loc_fn=case.lora.init_to_adapter())
    draws = Draws()

    def guide(**texts: Tensor) -> None:
        with draws:
            auto_normal(**texts)

    with assert_unchanged(case.network):
        run = Importance(case.model, guide, num_samples=NUM_PARTICLES)
        run.run(**case.texts)
    expected = log_joint_of_draws(case, draws) - draws.log_q()
    assert_close(torch.stack(run.log_weights), expected, rtol=1e-10, atol=0)


@on_each_likelihood
def test_vectorised_importance(likelihood: str) -> None:
    case = lifted_case(likelihood)
    guide = AutoNormal(case.model, init_loc_fn=case.lora.init_to_adapter())
    guide(**case.texts)
    settings = {"num_samples": NUM_PARTICLES, "max_plate_nesting": 1}
    with torch.no_grad(), Draws() as draws:
        log_weights, _, _ = vectorized_importance_weights(
            case.model, guide, **settings, **case.texts
        )
    expected = log_joint_of_draws(case, draws) - draws.log_q()
    assert_close(log_weights, expected, rtol=1e-10, atol=0)


@on_each_likelihood
def test_the_potential_of_hmc_is_minus_the_log_joint(likelihood: str) -> None:
    case = lifted_case(likelihood)
    start, potential, transforms, _ = initialize_model(
        case.model,
        model_kwargs=case.texts,
        init_strategy=case.lora.init_to_adapter(),
    )
    values = {site: transforms[site].inv(u) for site, u in start.items()}
    assert list(values) == list(case.shapes)
    for site, weights in case.lora.weights().items():
        assert_close(values[site], weights, rtol=0, atol=1e-12)
    # Hamiltonian Monte Carlo moves log(sigma): d sigma / d log(sigma) = sigma.
    log_jacobian = start.get("sigma", torch.tensor(0.0))
    expected = -case.log_joint(values) - log_jacobian
    assert_close(potential(start), expected, rtol=1e-10, atol=0)


KERNELS = {
    "NUTS": lambda model, **settings: NUTS(model, max_tree_depth=2, **settings),
    "HMC": lambda model, **settings: HMC(model, num_steps=2, **settings),
}


@pytest.mark.parametrize("kernel", list(KERNELS))
@on_each_likelihood
def test_monte_carlo(likelihood: str, kernel: str) -> None:
    case = lifted_case(likelihood)
    start = case.lora.init_to_adapter()
    settings = {"step_size": 1e-3, "adapt_step_size": False, "init_strategy": start}
    mcmc = MCMC(
        KERNELS[kernel](case.model, **settings),
        num_samples=3,
        warmup_steps=1,
        disable_progbar=True,
    )
    with assert_unchanged(case.network):
        mcmc.run(**case.texts)
    samples = mcmc.get_samples()
    assert samples.keys() == case.shapes.keys()
    for site, weights in case.lora.weights().items():
        assert samples[site].shape == (3, *weights.shape)
        # At this step size nothing is rejected, and nothing gets far.
        steps = torch.cat([weights[None], samples[site]]).diff(dim=0).abs()
        assert steps.flatten(1).amax(1).min() > 1e-5
        assert steps.max() < 0.1
    assert list(pyro.get_param_store()) == []
