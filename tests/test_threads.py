"""Calls from several threads, as a server makes them, are right and take turns."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from pyro.poutine.runtime import _PYRO_STACK

import pyro_lora as pl
from tests.predict import models

NUM_CALLS = 12


def predictor(seed: int) -> Callable[[], Any]:
    torch.manual_seed(seed)
    lora, model = models.classifier()
    batches = models.two_batches()
    posterior = models.laplace(lora, model, batches)
    return lambda: pl.predict(posterior, batches, model=model).log_probs


@pytest.mark.parametrize("num_networks", [1, 2])
def test_threads_predict_what_one_does(num_networks: int) -> None:
    of_networks = [predictor(seed) for seed in range(num_networks)]
    expected = [predict() for predict in of_networks]
    with ThreadPoolExecutor(4) as pool:
        calls = [i % num_networks for i in range(NUM_CALLS)]
        found = list(pool.map(lambda i: of_networks[i](), calls))
    for i, log_probs in zip(calls, found, strict=True):
        assert torch.equal(log_probs, expected[i])
    assert not _PYRO_STACK
