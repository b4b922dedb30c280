"""The effective number of predictions, against the definition by a double loop."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from torch import Tensor

import pyro_lora as pl
from tests import networks
from tests.infer.targets import bernoulli_bert, bert, hierarchical_regression

YES, NO = 60.0, -60.0  # logits that leave no doubt


def vendi(similarity: Tensor) -> float:
    eigenvalues = torch.linalg.eigvals(similarity / len(similarity)).real
    return math.exp(-sum(x * math.log(x) for x in eigenvalues.tolist() if x > 1e-15))


def by_loop(densities: list[Tensor]) -> Tensor:
    """Similarities of K particles, each with probabilities (B, C)."""
    return torch.stack(
        [
            torch.stack([(p * q).sqrt().sum(-1).mean() for q in densities])
            for p in densities
        ]
    )


def by_datum(f: Tensor, event_dim: int) -> Tensor:
    """The first event dim in place of the plate's, which particles have as 1."""
    return f.squeeze(-1 - event_dim) if f.ndim > event_dim else f


def voter(logits: Tensor, y: Tensor) -> None:
    """Each particle is the logits themselves of B yes-no questions."""
    f = pyro.sample("f", dist.Normal(torch.zeros_like(logits), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=by_datum(f, 1)), obs=y)


def votes(*rows: list[float]) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    f = torch.tensor(rows).double()
    return {"f": f}, [{"logits": f[0], "y": torch.zeros_like(f[0])}]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[YES, NO]], 1),
        ([[YES, NO]] * 3, 1),
        ([[YES, YES], [NO, NO]], 2),
        ([[YES, YES], [NO, NO], [NO, NO]], 3 / 2 ** (2 / 3)),
    ],
)
def test_votes(rows: list[list[float]], expected: float) -> None:
    particles, batches = votes(*rows)
    found = pl.effective_num_predictions(voter, particles, batches)
    assert found == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("num_labels", [1, 3])
def test_classifiers(num_labels: int, chunk_size: int | None) -> None:
    target = bernoulli_bert(4) if num_labels == 1 else bert(4, num_labels)
    assert target.outputs is not None
    densities = []
    for k in range(4):
        f = target.outputs({site: x[k] for site, x in target.particles.items()})
        f = torch.cat([torch.zeros_like(f), f], 1) if num_labels == 1 else f
        densities.append(f.softmax(1).detach())
    found = pl.effective_num_predictions(
        target.model, target.particles, [target.batch], chunk_size=chunk_size
    )
    assert 1 < found < 4
    assert found == pytest.approx(vendi(by_loop(densities)), rel=1e-8)


def test_batches_count_by_their_data() -> None:
    target = bert(3)
    texts = target.batch
    parts = [{k: x[rows] for k, x in texts.items()} for rows in (slice(1), slice(1, 4))]
    found, expected = (
        pl.effective_num_predictions(target.model, target.particles, batches)
        for batches in (parts, [texts])
    )
    assert found == pytest.approx(expected, rel=1e-8)


def test_regression() -> None:
    # The integral of sqrt(p q) over a fine grid instead of its closed form.
    target = hierarchical_regression(4)
    assert target.outputs is not None
    grid = torch.linspace(-40, 40, 40_001, dtype=torch.float64)
    densities = []
    for k in range(4):
        loc = target.outputs({s: x[k] for s, x in target.particles.items()})  # (B, 1)
        log_probs = dist.Normal(loc, 0.5).log_prob(grid)
        densities.append(log_probs.exp() * (grid[1] - grid[0]))
    constrained = {**target.particles, "tau": target.particles["tau"].exp()}
    found = pl.effective_num_predictions(target.model, constrained, [target.batch])
    assert found == pytest.approx(vendi(by_loop(densities)), rel=1e-8)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_outcomes_of_one_datum_multiply_and_masked_ones_do_not_count(
    chunk_size: int | None,
) -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])

    def model(y: Tensor) -> None:
        f = pyro.sample("f", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        with pyro.plate("data", 2):
            fn = dist.Bernoulli(logits=by_datum(f, 2)).mask(mask).to_event(1)
            pyro.sample("y", fn, obs=y)

    f = torch.randn(3, 2, 3).double()
    p = f.sigmoid()
    similarity = torch.zeros(3, 3).double()
    for i in range(3):
        for j in range(3):
            for b in range(2):
                product = 1.0
                for e in range(3):
                    if mask[b, e]:
                        x, y = p[i, b, e].item(), p[j, b, e].item()
                        product *= math.sqrt(x * y) + math.sqrt((1 - x) * (1 - y))
                similarity[i, j] += product / 2
    found = pl.effective_num_predictions(
        model, {"f": f}, [{"y": torch.zeros(2, 3)}], chunk_size=chunk_size
    )
    assert found == pytest.approx(vendi(similarity), rel=1e-8)


@given(
    by_site=st.booleans(),
    mask=st.lists(st.booleans(), min_size=1, max_size=6).filter(any),
    size=st.integers(1, 6),
)
@settings(max_examples=25, deadline=None, database=None)
def test_a_masked_datum_is_as_one_left_out(
    by_site: bool, mask: list[bool], size: int
) -> None:
    seen = torch.tensor(mask)
    num_data = len(mask)
    f = torch.randn(3, num_data, 2).double()

    def model(rows: Tensor, y: Tensor, mask: Tensor) -> None:
        zeros = torch.zeros(num_data, 2)
        drawn = pyro.sample("f", dist.Normal(zeros, 1.0).to_event(2))
        some = by_datum(drawn, 2)[..., rows, :]
        with (
            pyro.plate("data", num_data, subsample=rows),
            poutine.mask(mask=mask if by_site else True),
        ):
            fn = dist.Bernoulli(logits=some).to_event(1)
            pyro.sample("y", fn if by_site else fn.mask(mask), obs=y)

    def number(rows: Tensor) -> float:
        batches = [
            {"rows": some, "y": torch.zeros(len(some), 2), "mask": seen[some]}
            for some in rows.split(size)
        ]
        return pl.effective_num_predictions(model, {"f": f}, batches)

    left = seen.nonzero()[:, 0]
    assert number(torch.arange(num_data)) == pytest.approx(number(left), rel=1e-12)
    if not seen.all():
        with pytest.raises(ValueError, match="all outcomes are masked or missing"):
            number((~seen).nonzero()[:, 0])


def test_dropout_is_off_and_comes_back() -> None:
    network = networks.bert(dropout=0.5).train()
    lora = pl.lift(network, prior=pl.priors.normal(0.7))
    model = pl.models.classification(lora, 5)
    particles = {site: x.expand(2, *x.shape) for site, x in lora.weights().items()}
    found = pl.effective_num_predictions(model, particles, [networks.batch()])
    assert found == pytest.approx(1, abs=1e-6)
    assert network.training


def poisson(y: Tensor) -> None:
    f = pyro.sample("f", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Poisson(f.exp()), obs=y)


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_counts_by_draws(chunk_size: int | None) -> None:
    # The coefficient of two Poissons is exp(-(sqrt a - sqrt b)^2 / 2).
    f = torch.tensor([0.0, 1.0, 1.5]).double()
    roots = (f / 2).exp()
    affinity = (-(roots[:, None] - roots).square() / 2).exp()
    pyro.set_rng_seed(0)
    batches = [{"y": torch.ones(200).double()}]
    found = pl.effective_num_predictions(
        poisson, {"f": f}, batches, chunk_size=chunk_size
    )
    assert found == pytest.approx(vendi(affinity), abs=0.01)  # of 38,400 draws
    same = {"f": torch.ones(3).double()}
    found = pl.effective_num_predictions(poisson, same, batches, chunk_size=chunk_size)
    assert found == pytest.approx(1, abs=1e-6)


def cauchy(y: Tensor) -> None:
    f = pyro.sample("f", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Cauchy(f, 1.0), obs=y)


def test_an_unknown_likelihood_is_refused() -> None:
    with pytest.raises(TypeError, match="Nothing is known of the likelihood Cauchy"):
        pl.effective_num_predictions(
            cauchy, {"f": torch.zeros(2)}, [{"y": torch.ones(3)}]
        )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batches": []}, "no batches"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"particles": {}}, "no particles"),
        ({"particles": {"g": torch.zeros(2)}}, "'f'"),
    ],
)
def test_bad_arguments(wrong: dict[str, Any], message: str) -> None:
    arguments = {
        "particles": {"f": torch.zeros(2)},
        "batches": [{"y": torch.ones(3)}],
        **wrong,
    }
    with pytest.raises(ValueError, match=message):
        pl.effective_num_predictions(poisson, **arguments)
