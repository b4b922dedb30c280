"""SVGD in function space with several outcomes a datum, against loops over them."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.optim import SGD, Adam
from torch import Tensor
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora import kernels
from tests import networks
from tests.infer import double_loop
from tests.infer.engines import engine
from tests.infer.targets import NUM_DATA, Target, normal

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(5, 2, generator=GENERATOR).double()
NUMBERS = torch.randn(5, 3, generator=GENERATOR).double()
CLASSES = torch.randint(4, (5, 3), generator=GENERATOR)
ONES = torch.ones(5, 3, dtype=torch.bool)
# Outcomes of the first two data, the others whole; and data, the fourth not.
OUTCOMES = torch.tensor([[True, False, True], [False, False, True], *[[True] * 3] * 3])
DATA = torch.tensor([True, True, True, False, True])

# Outcomes: distribution of one by the network's outputs f, values, shape of f's end.
KINDS: dict[str, tuple[Callable[[Tensor], Any], Tensor, tuple[int, ...]]] = {
    "Normal": (lambda f: dist.Normal(f, 0.5), NUMBERS, (3,)),
    "Categorical": (lambda f: dist.Categorical(logits=f), CLASSES, (3, 4)),
    "OneHotCategorical": (
        lambda f: dist.OneHotCategorical(logits=f),
        torch.eye(4).double()[CLASSES],
        (3, 4),
    ),
    "NanMaskedNormal": (
        lambda f: dist.NanMaskedNormal(f, 0.5),
        NUMBERS.where(OUTCOMES, torch.nan),
        (3,),
    ),
}


def joint(fn: Any) -> Any:
    return fn.to_event(1)


def inside(fn: Any) -> Any:
    return fn.mask(OUTCOMES).to_event(1)


def outside(fn: Any) -> Any:
    return fn.to_event(1).mask(DATA)


# What is made of single outcomes, the site's mask, and which outcomes then count.
MASKS: dict[str, tuple[Callable[[Any], Any], Any, Tensor]] = {
    "none": (joint, True, ONES),
    "inside": (inside, True, OUTCOMES),
    "outside": (outside, True, ONES & DATA[:, None]),
    "site": (joint, DATA, ONES & DATA[:, None]),
    "both": (inside, DATA, OUTCOMES & DATA[:, None]),
}


def several_outcomes(kind: str, mask: str) -> Target:
    """A linear model of three outcomes a datum."""
    single, y, event = KINDS[kind]
    event_of, site_mask, counts = MASKS[mask]
    if kind == "NanMaskedNormal":
        counts = counts & OUTCOMES

    def model(y: Tensor) -> None:
        fn = dist.Normal(X.new_zeros(2, *event), 1.0).to_event(1 + len(event))
        w = pyro.sample("w", fn)
        f = (X[..., None] * w.flatten(-len(event))).sum(-2)
        with pyro.plate("data", NUM_DATA, subsample=y), poutine.mask(mask=site_mask):
            likelihood = event_of(single(f.unflatten(-1, event)))
            pyro.sample("y", likelihood, obs=y)

    def log_joint(p: double_loop.Point) -> Tensor:
        total = torch.zeros(()).double()
        for b in range(5):
            for e in range(3):
                if counts[b, e]:
                    f = X[b] @ p["w"][:, e]
                    total = total + single(f).log_prob(y[b, e])
        return normal(p["w"], 0.0, 1.0) + NUM_DATA / 5 * total

    def outputs(p: double_loop.Point) -> Tensor:
        rows = []
        for b in range(5):
            row = []
            for e in range(3):
                f = X[b] @ p["w"][:, e]
                if f.ndim:
                    f = f - f.mean()
                row.append(f.reshape(-1) if counts[b, e] else 0 * f.reshape(-1))
            if counts[b].any():
                rows.append(torch.cat(row))
        return torch.stack(rows)

    particles = {"w": torch.randn(4, 2, *event).double()}
    return Target(model, {"y": y}, particles, {}, log_joint, outputs)


def assert_one_step(
    target: Target,
    bandwidth: float | None,
    tolerance: float = 1e-10,
    **settings: Any,
) -> pl.SVGD:
    """One step is that of the double loop."""
    kernel = kernels.RBF(space="function", bandwidth=bandwidth)
    svgd = engine(
        target, SGD({"lr": 1.0}), kernel, repulsion=3.0, temperature=2.0, **settings
    )
    svgd.step(**target.batch)
    assert target.outputs is not None
    expected = double_loop.function_space(
        double_loop.points(target.particles),
        target.log_joint,
        target.outputs,
        bandwidth,
        2.0,
        3.0,
    )
    after = svgd.state_dict()["particles"]
    found = {site: after[site] - x for site, x in target.particles.items()}
    assert_close(found, expected, rtol=tolerance, atol=tolerance)
    return svgd


@pytest.mark.grid
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("mask", list(MASKS))
def test_several_outcomes_a_datum(kind: str, mask: str) -> None:
    target = several_outcomes(kind, mask)
    svgd = assert_one_step(target, 1.5)
    # The attraction is the likelihood's gradient in the outputs that count.
    single, y, _ = KINDS[kind]
    counts = MASKS[mask][2]
    squares = []
    for p in double_loop.points(target.particles):
        f = torch.einsum("bi,i...->b...", X, p["w"])

        def likelihood(at: double_loop.Point) -> Tensor:
            return single(at["f"]).log_prob(y)[counts].sum() * NUM_DATA / 5

        squares.append(double_loop.gradient(likelihood, {"f": f})["f"].square().sum())
    rms = torch.stack(squares).mean().sqrt().item() / 2
    assert svgd.diagnostics["attraction"] == [pytest.approx(rms, rel=1e-10)]


@pytest.mark.parametrize("mask", ["inside", "both"])
@pytest.mark.parametrize("kind", ["Normal", "Categorical"])
def test_median_and_chunks(kind: str, mask: str) -> None:
    assert_one_step(several_outcomes(kind, mask), None, chunk_size=3)


def test_a_vocabulary_takes_no_roots() -> None:
    x, y = torch.randn(3, 2).double(), torch.tensor([[5, 2_999], [7, 0], [1, 1]])

    def likelihood(w: Tensor) -> Any:
        return dist.Categorical(logits=x[..., None] * w)

    def model(y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(2, 3_000), 1.0).to_event(2))
        with pyro.plate("data", 3):
            pyro.sample("y", likelihood(w).to_event(1), obs=y)

    def outputs(p: double_loop.Point) -> Tensor:
        logits = x[..., None] * p["w"]
        return (logits - logits.mean(-1, keepdim=True)).flatten(1)

    target = Target(
        model,
        {"y": y},
        {"w": torch.randn(3, 2, 3_000).double()},
        {},
        lambda p: normal(p["w"], 0.0, 1.0) + likelihood(p["w"]).log_prob(y).sum(),
        outputs,
    )
    assert_one_step(target, None)


def texts() -> dict[str, Tensor]:
    """Padded texts, of which the first token and the third text's next don't count."""
    batch = networks.inputs(networks.batch(4, 7))
    labels = batch["input_ids"].where(batch["attention_mask"] > 0, -100)
    labels[2, :3] = -100
    return {**batch, "labels": labels}


def language(num_particles: int) -> Target:
    """A lifted Llama, text by text and without their padding."""
    lora = pl.lift(networks.llama(None), prior=pl.priors.normal(0.7))
    batch = texts()
    length = batch["attention_mask"].sum(1)

    def each(p: double_loop.Point) -> list[tuple[Tensor, Tensor]]:
        """Logits of the tokens that count, and those tokens, of each text."""
        found = []
        for b in range(4):
            with lora.bind(p) as net:
                ids = batch["input_ids"][b : b + 1, : length[b]]
                logits = net(input_ids=ids).logits[0, :-1]
            labels = batch["labels"][b, 1 : length[b]]
            found.append((logits[labels != -100], labels[labels != -100]))
        return found

    def log_joint(p: double_loop.Point) -> Tensor:
        prior = torch.stack([normal(x, 0.0, 0.7) for x in p.values()]).sum()
        log_probs = [dist.Categorical(logits=f).log_prob(y).sum() for f, y in each(p)]
        return prior + NUM_DATA / 4 * torch.stack(log_probs).sum()

    def outputs(p: double_loop.Point) -> Tensor:
        rows = [(f - f.mean(-1, keepdim=True)).flatten() for f, _ in each(p)]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    return Target(
        pl.models.language_model(lora, NUM_DATA),
        batch,
        networks.particles(lora, num_particles),
        {},
        log_joint,
        outputs,
    )


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_a_language_model_by_its_texts(chunk_size: int | None) -> None:
    # Llama's norms are in float32, so that padding changes the last digits.
    assert_one_step(language(3), 4.0, 1e-4, chunk_size=chunk_size)


def test_a_language_model_trains() -> None:
    target = language(3)
    svgd = engine(
        target, Adam({"lr": 0.05}), kernels.RBF(space="function"), repulsion=1.0
    )
    for _ in range(20):
        svgd.step(**target.batch)
    assert svgd.diagnostics["loss"][-1] < 0.8 * svgd.diagnostics["loss"][0]
    assert svgd.diagnostics["repulsion"][-1] > 0
