"""Acquisition against the joint mutual information, enumerated label by label."""

import itertools
import math
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor

import pyro_lora as pl
from tests import networks
from tests.predict import models


def prediction(draws: Tensor) -> pl.Prediction:
    """Of probabilities under each draw, (S, N, C)."""
    return pl.Prediction(
        log_probs=draws.mean(0).log(),
        aleatoric_entropy=torch.special.entr(draws).sum(-1).mean(0),
        draw_log_probs=draws.log(),
    )


def random_draws(num_draws: int, num_data: int, num_classes: int) -> Tensor:
    logits = 2 * torch.randn(num_draws, num_data, num_classes, dtype=torch.float64)
    return logits.softmax(-1)


def joint_information(draws: Tensor, chosen: list[int]) -> float:
    """H(y_A) - E H(y_A | w) by a loop over all labels of the chosen data."""
    num_draws, _, num_classes = draws.shape
    entropy = conditional = 0.0
    for labels in itertools.product(range(num_classes), repeat=len(chosen)):
        each = []
        for s in range(num_draws):
            p = 1.0
            for n, y in zip(chosen, labels, strict=True):
                p *= float(draws[s, n, y])
            each.append(p)
        mean = sum(each) / num_draws
        entropy -= mean * math.log(mean or 1)
        conditional -= sum(p * math.log(p or 1) for p in each) / num_draws
    return entropy - conditional


def test_bald_is_the_largest_mutual_information() -> None:
    draws = random_draws(6, 9, 3)
    found = pl.acquire(prediction(draws), 4)
    each = [joint_information(draws, [n]) for n in range(9)]
    expected = sorted(range(9), key=lambda n: -each[n])[:4]
    assert found.indices.tolist() == expected
    assert found.scores.tolist() == pytest.approx([each[n] for n in expected])


@pytest.mark.parametrize("num_absent", [0, 1])
@pytest.mark.parametrize("num_classes", [2, 4])
def test_batch_bald_is_greedy_on_the_joint_information(
    num_classes: int, num_absent: int
) -> None:
    """Also where choices aren't there, of which no draw has a probability."""
    draws = random_draws(5, 7, num_classes)
    draws = torch.nn.functional.pad(draws, (0, num_absent))
    found = pl.acquire(prediction(draws), 3, method="batch_bald")
    chosen: list[int] = []
    scores = []
    for _ in range(3):
        joint = {
            n: joint_information(draws, [*chosen, n])
            for n in range(7)
            if n not in chosen
        }
        best = max(joint, key=lambda n: joint[n])
        chosen.append(best)
        scores.append(joint[best])
    assert found.indices.tolist() == chosen
    assert found.scores.tolist() == pytest.approx(scores, abs=1e-8)


def test_sampled_configurations_approach_the_enumeration() -> None:
    draws = random_draws(20, 12, 3)
    pool = prediction(draws)
    exact = pl.acquire(pool, 6, method="batch_bald")
    chosen = exact.indices.tolist()
    assert exact.scores[-1] == pytest.approx(joint_information(draws, chosen))
    # 81 configurations are enumerated for four data, and sampled for the rest.
    pyro.set_rng_seed(0)
    runs = [
        pl.acquire(pool, 6, method="batch_bald", max_configurations=100)
        for _ in range(30)
    ]
    for run in runs:
        assert run.indices[:5].tolist() == chosen[:5]
        assert torch.allclose(run.scores[:5], exact.scores[:5], rtol=0, atol=1e-12)
    last = torch.stack([r.scores[5] for r in runs if int(r.indices[5]) == chosen[5]])
    assert len(last) > 10
    error = 5 * float(last.std()) / len(last) ** 0.5
    assert float(last.mean()) == pytest.approx(float(exact.scores[5]), abs=error + 1e-3)
    assert error < 0.02
    assert last.std() > 0


def test_a_copy_is_chosen_by_bald_alone() -> None:
    draws = random_draws(8, 4, 2)
    best = int(pl.acquire(prediction(draws), 1).indices)
    doubled = torch.cat([draws, draws[:, [best]]], 1)
    pool = prediction(doubled)
    bald = pl.acquire(pool, 2)
    assert sorted(bald.indices.tolist()) == [best, 4]
    batch = pl.acquire(pool, 2, method="batch_bald")
    second = int(batch.indices[1])
    assert second not in (best, 4)
    others = [joint_information(doubled, [best, n]) for n in range(5) if n != best]
    assert float(batch.scores[1]) == pytest.approx(max(others), abs=1e-10)


def test_the_joint_information_stays_below_the_draws_entropy() -> None:
    draws = random_draws(4, 40, 3)
    found = pl.acquire(prediction(draws), 20, method="batch_bald")
    assert len(set(found.indices.tolist())) == 20
    assert (found.scores.diff() >= 0).all()
    assert math.log(4) * 0.8 < float(found.scores[-1]) < math.log(4) * 1.02


def test_a_large_pool_is_done_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyro_lora.predict import acquisition

    pool = prediction(random_draws(5, 30, 3))
    expected = pl.acquire(pool, 4, method="batch_bald")
    monkeypatch.setattr(acquisition, "_MOST_NUMBERS", 200)
    found = pl.acquire(pool, 4, method="batch_bald")
    assert torch.equal(found.indices, expected.indices)


def test_draws_of_any_posterior_are_kept() -> None:
    lora, model = models.classifier(3)
    batches = models.two_batches(3)
    posterior = models.particles(lora, model, num=5)
    pool = pl.predict(posterior, batches, model=model, keep_draws=True, chunk_size=2)
    assert pool.draw_log_probs.shape == (5, 10, 3)
    for s in range(5):
        at = models.draw(posterior.particles, s)
        expected = torch.cat([models.logits_at(lora, at, b) for b in batches])
        torch.testing.assert_close(pool.draw_log_probs[s], expected.log_softmax(-1))
    found = pl.acquire(pool, 2, method="batch_bald")
    joint = joint_information(pool.draw_log_probs.exp(), found.indices.tolist())
    assert float(found.scores[-1]) == pytest.approx(joint, abs=1e-8)
    plain = pl.predict(posterior, batches, model=model)
    assert plain.draw_log_probs is None
    torch.testing.assert_close(pool.log_probs, plain.log_probs)


@pytest.mark.parametrize("mixed", [False, True])
def test_linearized_draws_are_joint_over_the_batch(mixed: bool) -> None:
    lora, model = models.classifier()
    batch = networks.batch(4)
    # The same text twice: one weight set gives both the same probabilities.
    batch = {name: torch.cat([x, x[:1]]) for name, x in batch.items()}
    first = models.laplace(lora, model, models.two_batches())
    posterior: Any = first
    if mixed:
        posterior = pl.MixturePosterior([first, first.with_prior_precision(9.0)])
    options: Any = {"method": "linearized", "num_samples": 2000}
    pool = pl.predict(posterior, [batch], model=model, keep_draws=True, **options)
    draws = pool.draw_log_probs.exp()
    assert draws.shape == (2000, 5, 2)
    torch.testing.assert_close(draws[:, 0], draws[:, 4], rtol=0, atol=1e-6)
    error = 5 * draws.std(0) / 2000**0.5
    assert ((draws.mean(0) - pool.probs).abs() < error).all()
    found = pl.acquire(pool, 3, method="batch_bald")
    assert not {0, 4} <= set(found.indices.tolist())
    plain = pl.predict(posterior, [batch], model=model, method="linearized")
    torch.testing.assert_close(pool.probs, plain.probs)
    with pytest.raises(ValueError, match="needs all data in one batch"):
        pl.predict(posterior, [batch, batch], model=model, keep_draws=True, **options)


def test_the_last_tokens_draws_are_kept() -> None:
    lora = pl.lift(networks.llama(None))
    model = pl.models.language_model(lora, models.NUM_DATA)
    batch = networks.inputs(networks.batch(3, padding="left"))
    batch["attention_mask"][:] = 1
    posterior = models.particles(lora, model)
    pool = pl.predict(posterior, [batch], model=model, tokens="last", keep_draws=True)
    assert pool.draw_log_probs.shape == (3, 3, networks.VOCABULARY)
    mean = pool.draw_log_probs.exp().mean(0)
    torch.testing.assert_close(mean, pool.probs)
    with pytest.raises(ValueError, match="keep_draws is for one class a datum"):
        pl.predict(posterior, [batch], model=model, tokens="each", keep_draws=True)


def test_bad_requests_are_named() -> None:
    pool = prediction(random_draws(3, 4, 3))
    with pytest.raises(ValueError, match="num must be from 1 to 4, the data; found 5"):
        pl.acquire(pool, 5)
    with pytest.raises(ValueError, match="'bald' or 'batch_bald', found 'entropy'"):
        pl.acquire(pool, 1, method="entropy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 3, the classes; found 2"):
        pl.acquire(pool, 1, method="batch_bald", max_configurations=2)
    real = pl.RegressionPrediction(loc=torch.zeros(1, 4), noise_scale=torch.ones(1, 4))
    with pytest.raises(ValueError, match="classes, found a RegressionPrediction"):
        pl.acquire(real, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="classes, found a RegressionPrediction"):
        pl.fit_temperature(real)  # type: ignore[arg-type]
    without = pool.with_temperature(2.0)
    with pytest.raises(ValueError, match="keep_draws=True"):
        pl.acquire(without, 1, method="batch_bald")
    with pytest.raises(ValueError, match=r"draw_log_probs has shape \(2, 3\)"):
        pl.Prediction(
            log_probs=pool.log_probs,
            aleatoric_entropy=pool.aleatoric_entropy,
            draw_log_probs=torch.zeros(2, 3),
        )
