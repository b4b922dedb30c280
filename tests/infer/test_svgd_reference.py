"""SVGD whose particles repel on a batch that stays the same, against autograd."""

from typing import Any

import pytest
import torch
from pyro.optim import SGD, Adam
from torch import Tensor
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora import kernels
from tests import networks
from tests.infer import double_loop
from tests.infer.engines import assert_same_state, engine
from tests.infer.targets import NUM_DATA, Target, bert, normal
from tests.infer.test_svgd_step import assert_equal

FUNCTION = kernels.RBF(space="function")


def with_reference(num_particles: int) -> tuple[Target, dict[str, Tensor]]:
    """A target with a reference batch of another size and length."""
    lora = pl.lift(networks.bert(3), prior=pl.priors.normal(0.7))
    batch = networks.batch(4, num_labels=3)
    reference = networks.batch(7, 9, num_labels=3)

    def logits(p: double_loop.Point, texts: dict[str, Tensor]) -> Tensor:
        with lora.bind(p) as net:
            found: Tensor = net(**networks.inputs(texts)).logits
        return found

    def log_joint(p: double_loop.Point) -> Tensor:
        prior = torch.stack([normal(x, 0.0, 0.7) for x in p.values()]).sum()
        log_probs = logits(p, batch).log_softmax(-1)
        return prior + NUM_DATA / 4 * log_probs[torch.arange(4), batch["labels"]].sum()

    def outputs(p: double_loop.Point) -> Tensor:
        f = logits(p, reference)
        return f - f.mean(-1, keepdim=True)

    target = Target(
        pl.models.classification(lora, NUM_DATA),
        batch,
        networks.particles(lora, num_particles),
        {},
        log_joint,
        outputs,
    )
    return target, reference


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
@pytest.mark.parametrize("bandwidth", [None, 0.8])
def test_predictions_on_the_reference_repel(
    chunk_size: int | None, bandwidth: float | None
) -> None:
    target, reference = with_reference(4)
    svgd = engine(
        target,
        SGD({"lr": 1.0}),
        kernels.RBF(space="function", bandwidth=bandwidth),
        repulsion=3.0,
        temperature=2.0,
        reference=reference,
        chunk_size=chunk_size,
    )
    svgd.step(**target.batch)
    after = svgd.state_dict()["particles"]
    at = double_loop.points(target.particles)

    def expected(strength: float) -> dict[str, Tensor]:
        assert target.outputs is not None
        return double_loop.function_space(
            at, target.log_joint, target.outputs, bandwidth, 2.0, strength
        )

    whole, alone = expected(3.0), expected(0.0)
    found = {site: after[site] - x for site, x in target.particles.items()}
    assert_close(found, whole, rtol=1e-9, atol=1e-9)

    def rms(directions: dict[str, Tensor]) -> float:
        return (sum(x.square().sum().item() for x in directions.values()) / 4) ** 0.5

    repulsion = rms({site: x - alone[site] for site, x in whole.items()})
    assert svgd.diagnostics["attraction"] == [pytest.approx(rms(alone), rel=1e-9)]
    assert svgd.diagnostics["repulsion"] == [pytest.approx(repulsion, rel=1e-7)]


def test_the_minibatch_as_its_own_reference() -> None:
    target = bert(3)
    settings: dict[str, Any] = {"repulsion": lambda fraction, loss: 4 * loss}
    svgd = engine(target, SGD({"lr": 0.1}), FUNCTION, **settings)
    other = engine(
        target, SGD({"lr": 0.1}), FUNCTION, reference=target.batch, **settings
    )
    for _ in range(3):
        assert other.step(**target.batch) == pytest.approx(
            svgd.step(**target.batch), rel=1e-12
        )
    assert_equal(other.get_named_particles(), svgd.get_named_particles())
    for name in ("loss", "mean_kernel", "spread"):
        assert other.diagnostics[name] == pytest.approx(svgd.diagnostics[name])


def test_updates_of_several_batches_and_resuming() -> None:
    target, reference = with_reference(3)
    settings: dict[str, Any] = {"repulsion": 3.0, "reference": reference}
    big = engine(target, Adam({"lr": 0.01}), FUNCTION, **settings)
    parts = engine(target, Adam({"lr": 0.01}), FUNCTION, accumulate=2, **settings)
    first, second = (
        {name: x[rows] for name, x in target.batch.items()}
        for rows in (slice(0, 1), slice(1, 4))
    )
    for _ in range(2):
        big.step(**target.batch)
        parts.step(**first)
        state = parts.state_dict()
        resumed = engine(target, Adam({"lr": 0.01}), FUNCTION, accumulate=2, **settings)
        resumed.load_state_dict(state)
        parts.step(**second)
        resumed.step(**second)
        assert_same_state(resumed.state_dict(), parts.state_dict())
    assert_equal(parts.get_named_particles(), big.get_named_particles())
    # A reference keeps gradients, not batches, in between.
    parts.step(**first)
    other = engine(target, Adam({"lr": 0.01}), FUNCTION, accumulate=2, repulsion=3.0)
    with pytest.raises(ValueError, match="another accumulate, kernel or reference"):
        other.load_state_dict(parts.state_dict())


@pytest.mark.parametrize("space", ["joint", "site", "coordinate", "delta"])
def test_no_other_space_has_a_reference(space: Any) -> None:
    target, reference = with_reference(3)
    with pytest.raises(ValueError, match="reference batch has no effect"):
        engine(target, SGD({"lr": 1.0}), kernels.RBF(space=space), reference=reference)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_a_reference_needs_no_labels(chunk_size: int | None) -> None:
    target, reference = with_reference(3)
    states = []
    for batch in (reference, networks.inputs(reference)):
        svgd = engine(
            target,
            SGD({"lr": 1.0}),
            FUNCTION,
            repulsion=3.0,
            reference=batch,
            chunk_size=chunk_size,
        )
        svgd.step(**target.batch)
        states.append(svgd.state_dict())
    assert_same_state(states[1], states[0])


def test_a_minibatch_needs_labels() -> None:
    target, _ = with_reference(3)
    svgd = engine(target, SGD({"lr": 1.0}), FUNCTION)
    svgd.step(**target.batch)
    with pytest.raises(ValueError, match="labels"):
        svgd.step(**networks.inputs(target.batch))
