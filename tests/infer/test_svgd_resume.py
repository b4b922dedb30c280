"""SVGD that goes on from a saved state."""

import io
from typing import Any

import pytest
import torch
from pyro.optim import SGD, Adam

import pyro_lora as pl
from pyro_lora import kernels
from tests.infer.engines import (
    OPTIMIZERS,
    assert_same,
    assert_same_state,
    engine,
    exponential,
    regression_batches,
)
from tests.infer.targets import bert, hierarchical_regression

pytestmark = pytest.mark.filterwarnings("ignore:The batches of an epoch hold")


@pytest.mark.grid
@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("fresh", [True, False])
def test_resumed_is_uninterrupted(name: str, fresh: bool) -> None:
    target = hierarchical_regression(3)
    batches = regression_batches()
    whole = engine(target, OPTIMIZERS[name]())
    whole.run(batches, num_epochs=4, progress_bar=False)

    first = engine(target, OPTIMIZERS[name]())
    first.run(batches, num_epochs=2, progress_bar=False)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    second = engine(target, OPTIMIZERS[name]())
    if not fresh:
        second.run(batches, num_epochs=1, progress_bar=False)
    second.load_state_dict(state)
    assert_same(second.get_named_particles(), first.get_named_particles())
    second.run(batches, num_epochs=2, progress_bar=False)
    assert_same(second.get_named_particles(), whole.get_named_particles())
    assert second.diagnostics == whole.diagnostics


def test_resumed_on_a_network_is_uninterrupted() -> None:
    target = bert(3)
    settings: dict[str, Any] = {"kernel": kernels.RBF(space="function"), "repulsion": 2}
    whole = engine(target, Adam({"lr": 0.01}), **settings)
    for _ in range(4):
        whole.step(**target.batch)
    first = engine(target, Adam({"lr": 0.01}), **settings)
    for _ in range(2):
        first.step(**target.batch)
    second = engine(target, Adam({"lr": 0.01}), **settings)
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        second.step(**target.batch)
    assert_same(second.get_named_particles(), whole.get_named_particles())


def test_a_state_is_a_copy() -> None:
    target = hierarchical_regression(3)
    svgd = engine(target, Adam({"lr": 0.05}))
    svgd.step(**target.batch)
    state = svgd.state_dict()
    before = {s: x.clone() for s, x in state["particles"].items()}
    moment = state["optim"]["w"]["optimizer"]["state"][0]["exp_avg"]
    moment_before = moment.clone()
    svgd.step(**target.batch)
    other = engine(target, Adam({"lr": 0.05}))
    other.load_state_dict(state)
    other.step(**target.batch)
    assert_same(state["particles"], before)
    assert torch.equal(moment, moment_before)
    assert len(state["diagnostics"]["loss"]) == 1
    assert_same(other.get_named_particles(), svgd.get_named_particles())


def test_loading_forgets_the_particles_before() -> None:
    target = hierarchical_regression(3)
    optim = Adam({"lr": 0.05})
    svgd = engine(target, optim)
    svgd.step(**target.batch)
    for _ in range(3):
        svgd.load_state_dict(svgd.state_dict())
    assert len(optim.optim_objs) == len(optim.grad_clip) == len(target.particles)


def assert_refused(svgd: pl.SVGD, state: Any, match: str) -> None:
    """Loading raises, and everything is as before."""
    before = svgd.state_dict()
    with pytest.raises(ValueError, match=match):
        svgd.load_state_dict(state)
    assert_same_state(svgd.state_dict(), before)


def test_states_of_others_are_refused() -> None:
    target = hierarchical_regression(3)
    svgd = engine(target, Adam({"lr": 0.05}))
    svgd.step(**target.batch)

    more = hierarchical_regression(4)
    other = engine(more, Adam({"lr": 0.05}))
    other.step(**more.batch)
    assert_refused(svgd, other.state_dict(), "num_particles=3")

    network = bert(3)
    other = engine(network, Adam({"lr": 0.05}))
    other.step(**network.batch)
    assert_refused(svgd, other.state_dict(), "Load the state of the same model")

    wider = svgd.state_dict()
    wider["particles"]["w"] = torch.zeros(3, 5).double()
    assert_refused(svgd, wider, r"'w'.*\(5,\).*\(3,\)")

    other = engine(target, SGD({"lr": 0.05}))
    other.step(**target.batch)
    assert_refused(svgd, other.state_dict(), "SGD.*Adam")
    other = engine(target, exponential())
    other.step(**target.batch)
    assert_refused(svgd, other.state_dict(), r"ExponentialLR\(Adam\)")

    assert_refused(svgd, {"weights": 1}, "state_dict")
    with pytest.raises(TypeError, match=r"state must be from SVGD\.state_dict"):
        svgd.load_state_dict("state")  # type: ignore[arg-type]


def test_a_state_of_another_model_before_the_first_step() -> None:
    network = bert(3)
    other = engine(network, Adam({"lr": 0.05}))
    other.step(**network.batch)
    target = hierarchical_regression(3)
    svgd = engine(target, Adam({"lr": 0.05}))
    svgd.load_state_dict(other.state_dict())
    for _ in range(2):
        with pytest.raises(ValueError, match="Load the state of the same model"):
            svgd.step(**target.batch)
    mine = engine(target, Adam({"lr": 0.05}))
    mine.step(**target.batch)
    svgd.load_state_dict(mine.state_dict())
    svgd.step(**target.batch)
    mine.step(**target.batch)
    assert_same(svgd.get_named_particles(), mine.get_named_particles())


def test_samples_of_a_loaded_state() -> None:
    target = hierarchical_regression(3)
    svgd, other = (engine(target, Adam({"lr": 0.01})) for _ in range(2))
    svgd.step(**target.batch)
    other.load_state_dict(svgd.state_dict())
    assert_same(other.get_samples(), svgd.get_samples())
    with pytest.raises(ValueError, match="num_samples must be at least 1, found 0"):
        other.get_samples(0)
    with pytest.raises(ValueError, match=r"Step once after loading.*pyro_lora\.save"):
        other.posterior()
