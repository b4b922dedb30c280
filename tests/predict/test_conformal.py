"""Conformal sets from our probabilities, by the docs' recipe, cover as they should."""

import math
from typing import Any

import numpy as np
import pyro
from mapie.classification import SplitConformalClassifier

import pyro_lora as pl
from tests import networks
from tests.pages import blocks
from tests.predict import models

LEVEL, NUM_DATA, NUM_SPLITS = 0.9, 400, 200


def test_coverage_over_splits() -> None:
    lora, model = models.classifier(3)
    batches = [networks.batch(100, num_labels=3) for _ in range(NUM_DATA // 100)]
    found = pl.predict(models.particles(lora, model), batches)
    probs, labels = found.probs.numpy(), found.labels.numpy()
    (recipe,) = (b for b in blocks("docs/prediction.md") if "class Given" in b)
    names: dict[str, Any] = {}
    exec(recipe.split("\ncalibrating")[0], names)
    given = names["Given"]().fit(probs, labels)
    pyro.set_rng_seed(0)
    covered = []
    for _ in range(NUM_SPLITS):
        order = np.random.permutation(NUM_DATA)
        first, second = order[: NUM_DATA // 2], order[NUM_DATA // 2 :]
        sets = SplitConformalClassifier(given, confidence_level=LEVEL)
        sets.conformalize(probs[first], labels[first])
        _, chosen = sets.predict_set(probs[second])
        covered.append(chosen[np.arange(len(second)), labels[second], 0].mean())
    # Of n calibrating data and a new one, all exchangeable, the ceil((n + 1) level)-th
    # smallest score is above the new one's with this probability.
    n = NUM_DATA // 2
    expected = math.ceil((n + 1) * LEVEL) / (n + 1)
    error = np.std(covered, ddof=1) / math.sqrt(NUM_SPLITS)
    assert 0.0005 < error < 0.004
    assert abs(np.mean(covered) - expected) < 4 * error
