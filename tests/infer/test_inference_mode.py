"""``torch.inference_mode()``: what needs gradients says so, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pyro.optim import Adam

import pyro_lora as pl
from tests.predict import models

Setting = dict[str, Any]


@pytest.fixture
def setting() -> Setting:
    lora, model = models.classifier()
    batches = models.two_batches()
    return {
        "lora": lora,
        "model": model,
        "batches": batches,
        "laplace": models.laplace(lora, model, batches),
        "particles": models.particles(lora, model),
        "guide": pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter()),
        "svgd": svgd(lora, model, "joint"),
        "function": svgd(lora, model, "function"),
    }


def svgd(lora: pl.LiftedNetwork, model: Any, space: Any) -> pl.SVGD:
    return pl.SVGD(
        model,
        pl.kernels.RBF(space=space),
        Adam({"lr": 1e-3}),
        2,
        init_loc_fn=lora.init_to_adapter(jitter=0.1),
    )


NEED: dict[str, Callable[[Setting], Any]] = {
    "fit": lambda s: s["guide"].laplace_approximation(s["batches"]),
    "step": lambda s: s["svgd"].step(**s["batches"][0]),
    "function space": lambda s: s["function"].step(**s["batches"][0]),
    "predict": lambda s: pl.predict(s["laplace"], s["batches"]),
    "linearized": lambda s: s["laplace"].linearized(s["batches"][0]),
    "evidence": lambda s: s["laplace"].optimize_prior(),
    "nll": lambda s: s["laplace"].optimize_prior(objective="nll", batches=s["batches"]),
    "diagnose": lambda s: pl.diagnose(s["laplace"], s["batches"]),
    "datatree": lambda s: pl.to_datatree(s["laplace"], s["batches"], num_samples=2),
    "stein": lambda s: pl.kernelized_stein_discrepancy(
        s["model"], s["particles"].particles, s["batches"]
    ),
}
ignored = [
    pytest.mark.filterwarnings("ignore:The weights aren't a mode"),
    pytest.mark.filterwarnings("ignore:The best prior precision"),
]
pytestmark = ignored


@pytest.mark.parametrize("name", sorted(NEED))
def test_what_needs_gradients_says_so_and_goes_on_after_it(
    name: str, setting: Setting
) -> None:
    with (
        torch.inference_mode(),
        pytest.raises(ValueError, match=r"torch\.inference_mode\(\) is on"),
    ):
        NEED[name](setting)
    NEED[name](setting)  # nothing made in there has stayed


@pytest.mark.parametrize("name", sorted(NEED))
def test_no_grad_is_no_obstacle(name: str, setting: Setting) -> None:
    with torch.no_grad():
        result = NEED[name](setting)
        assert not torch.is_grad_enabled()  # which is put back as it was
    assert result is not None


def test_draws_are_predicted_from(setting: Setting) -> None:
    expected = pl.predict(setting["particles"], setting["batches"])
    with torch.inference_mode():
        prediction = pl.predict(setting["particles"], setting["batches"])
    torch.testing.assert_close(prediction.probs, expected.probs)


@pytest.mark.parametrize("name", ["fit", "step"])
def test_classes_made_in_there_are_as_good_as_others(
    name: str, setting: Setting
) -> None:
    with torch.inference_mode():
        setting["batches"] = models.two_batches()
    assert NEED[name](setting) is not None


def test_a_network_made_in_there_is_named() -> None:
    with torch.inference_mode():
        lora, model = models.classifier()
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
    with pytest.raises(ValueError, match=r"network's '.*' was made under torch\.inf"):
        guide.laplace_approximation(models.two_batches())
