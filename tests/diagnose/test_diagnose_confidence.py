"""Is it over- or under-confident: of classes, of real outcomes, by any name."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_lora as pl
from pyro_lora.diagnose import diagnosis
from tests.export.arrays import assert_allclose
from tests.infer.linear_regression import linear_regression
from tests.predict import models


def test_confidence_is_that_of_the_linearised_prediction() -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    posterior = models.laplace(lora, model, batches)
    found = pl.diagnose(
        posterior, batches, model=model, held_out=batches[:1]
    ).confidence
    assert found is not None
    prediction = pl.predict(posterior, batches[:1], model=model, method="linearized")
    metrics = prediction.metrics()
    assert found.overconfidence == pytest.approx(metrics["overconfidence"])
    assert found.ece == pytest.approx(metrics["ece"])
    assert (found.num_data, found.held_out) == (6, True)
    gap = (
        prediction.probs.max(1).values
        - (prediction.probs.argmax(1) == batches[0]["labels"]).double()
    )
    assert found.standard_error == pytest.approx(float(gap.std()) * math.sqrt(5) / 6)


def test_verdicts_on_confidence() -> None:
    def verdict(gap: float) -> str:
        return diagnosis.Confidence(
            overconfidence=gap, standard_error=0.02, ece=0.1, num_data=9, held_out=True
        ).verdict

    assert [verdict(x) for x in (0.05, 0.03, -0.05)] == ["over", "neither", "under"]


def regression(noise_sd: float = 0.5, **options: Any) -> diagnosis.Coverage:
    task = linear_regression()

    def model(x: Tensor, y: Tensor | None = None) -> None:
        loc = task.lora()(x)[..., 0]
        with pyro.plate("data", 12, subsample=x):
            pyro.sample("y", dist.Normal(loc, noise_sd), obs=y)

    found = pl.diagnose(
        task.laplace(), task.batches, model=model, labels="y", **options
    )
    assert isinstance(found.confidence, diagnosis.Coverage)
    return found.confidence


def test_real_outcomes_are_inside_their_intervals_or_not() -> None:
    task = linear_regression()
    posterior = task.laplace(structure=pl.structures.Dense())
    found = pl.diagnose(posterior, task.batches, model=task.model, labels="y")
    assert isinstance(found.confidence, diagnosis.Coverage)
    covariance = torch.linalg.inv(task.precision)
    sd = (0.5**2 + ((task.design @ covariance) * task.design).sum(1)).sqrt()
    z = (task.y - task.design @ task.mode) / sd
    inside = (z.abs() < 1.6448536269514722).double().mean()  # 95% of a normal's
    assert found.confidence.coverage == pytest.approx(float(inside))
    assert (found.confidence.num_data, found.confidence.held_out) == (12, False)
    assert found.confidence.standard_error == pytest.approx(math.sqrt(0.09 / 12))


def test_too_little_noise_is_overconfidence() -> None:
    assert regression(noise_sd=0.01).verdict == "over"
    few = regression(noise_sd=100.0)
    assert few.coverage == 1
    assert few.verdict == "neither"  # 12 of 12 happens once in four
    many = diagnosis.Coverage(coverage=1.0, num_data=120, held_out=True)
    assert many.verdict == "under"
    assert many.lines() == [
        "100.0% of 120 held-out data inside the central 90% interval, +- 2.7% by chance"
    ]


@pytest.mark.filterwarnings("ignore:The network can't be linearised here")
def test_students_noise_is_judged_by_draws() -> None:
    task = linear_regression()

    def model(x: Tensor, y: Tensor | None = None) -> None:
        loc = task.lora()(x)[..., 0]
        with pyro.plate("data", 12, subsample=x):
            pyro.sample("y", dist.StudentT(4.0, loc, 0.5), obs=y)

    pyro.set_rng_seed(1)
    found = pl.diagnose(
        task.laplace(), task.batches, model=model, labels="y"
    ).confidence
    assert isinstance(found, diagnosis.Coverage)
    assert found.coverage > 0.5


def test_several_outputs_count_as_one_datum() -> None:
    lora, model, batches = models.real_outputs()
    posterior = models.particles(lora, model)
    found = pl.diagnose(posterior, batches, model=model).confidence
    assert isinstance(found, diagnosis.Coverage)
    metrics = pl.predict(posterior, batches, model=model).metrics()
    assert found.coverage == pytest.approx(metrics["coverage"])
    assert found.standard_error == pytest.approx(0.3 / math.sqrt(10))


def test_counts_have_intervals() -> None:
    lora, _ = models.classifier(1)

    def model(labels: Tensor | None = None, **inputs: Tensor) -> None:
        rate = lora()(**inputs).logits[..., 0].exp()
        with pyro.plate("data", models.NUM_DATA, subsample=inputs["input_ids"]):
            pyro.sample("y", dist.Poisson(rate), obs=labels)

    batches = [{**b, "labels": b["labels"].double()} for b in models.two_batches()]
    particles = models.particles(lora, model)
    found = pl.diagnose(particles, batches, model=model).confidence
    assert isinstance(found, diagnosis.Coverage)
    metrics = pl.predict(particles, batches, model=model).metrics()
    assert found.coverage == metrics["coverage"]
    assert found.num_data == models.NUM_DATA


def stars_instead(batches: list[models.Batch]) -> list[models.Batch]:
    return [
        {"stars" if name == "labels" else name: x for name, x in batch.items()}
        for batch in batches
    ]


def test_outcomes_by_another_name() -> None:
    lora, model = models.classifier()

    def of_stars(stars: Tensor | None = None, **inputs: Tensor) -> Tensor:
        return model(labels=stars, **inputs)

    batches = models.two_batches()
    renamed = stars_instead(batches)
    for posterior in (
        models.laplace(lora, model, batches),
        models.particles(lora, model),
    ):
        expected = pl.diagnose(posterior, batches, model=model)
        found = pl.diagnose(posterior, renamed, model=of_stars, labels="stars")
        assert found.confidence == expected.confidence
        assert found.diversity == expected.diversity
        unnamed = pl.diagnose(
            posterior, renamed, model=of_stars
        )  # found from the model
        assert unnamed.confidence == expected.confidence
        bare = [{k: x for k, x in b.items() if k != "stars"} for b in renamed]
        without = pl.diagnose(posterior, bare, model=of_stars)
        assert "no 'labels': labels= says" in without.left_out["confidence"]


def test_outcomes_by_another_name_are_no_input_of_the_tree() -> None:
    lora, model = models.classifier()

    def of_stars(stars: Tensor | None = None, **inputs: Tensor) -> Tensor:
        return model(labels=stars, **inputs)

    batches = models.two_batches()
    posterior = models.particles(lora, of_stars, num=20)
    tree = pl.to_datatree(
        posterior,
        batches=stars_instead(batches),
        labels="stars",
        prior_predictive=True,
    )
    assert set(tree["constant_data"].data_vars) == {"input_ids", "attention_mask"}
    stars = torch.cat([batch["labels"] for batch in batches])
    assert_allclose(tree["observed_data"]["y"], stars)
    # Not the outcomes given, 20 times over.
    assert (tree["prior_predictive"]["y"].std(("chain", "draw")) > 0).any()
