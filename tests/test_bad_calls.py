"""Bad calls end in the library's own words, over engines, models and faults."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.optim import Adam
from torch import Tensor

import pyro_lora as pl
from pyro_lora.likelihood.batch import checked_batch, checked_batches
from pyro_lora.likelihood.model_trace import trace_on
from tests import bad_calls, networks


def complaints(sizes: dict[str, int], seed: int) -> list[str]:
    calls = bad_calls.sample(bad_calls.all_calls(), sizes, seed)
    verdicts = [(call, bad_calls.verdict(call)) for call in calls]
    return [f"{call.name}: {found}" for call, found in verdicts if found is not None]


def test_a_few_bad_calls() -> None:
    assert complaints(bad_calls.FEW, 0) == []


@pytest.mark.slow
def test_thousands_of_bad_calls() -> None:
    assert complaints(bad_calls.SIZES, 1) == []


def observing(shape: tuple[int, ...], event_dim: int) -> Callable[..., None]:
    """A model whose likelihood has a shape, the data at the dim left of the event."""

    def model(labels: Tensor) -> None:
        fn = dist.Normal(torch.zeros(shape), 1.0).to_event(event_dim)
        with pyro.plate("data", 100, subsample=torch.zeros(shape[0])):
            pyro.sample("y", fn, obs=labels)

    return model


SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)


@given(SHAPES, SHAPES)
@settings(max_examples=200, deadline=None)
def test_observed_values_have_the_shape_of_their_likelihood(
    shape: tuple[int, ...], found: tuple[int, ...]
) -> None:
    # Whatever PyTorch would broadcast: each datum has one value, its own.
    model = observing(shape, len(shape) - 1)
    batch = {"labels": torch.zeros(found)}
    if found == shape:
        trace_on(model, (), batch)
        return
    with pytest.raises(ValueError, match=r"site 'y': expected observed values"):
        trace_on(model, (), batch)


def test_rows_that_differ_are_named_beside_labels_that_do_not_fit() -> None:
    # A mask of one row may be that of all, and gives one prediction.
    batch = {"attention_mask": torch.ones(1, 3), "labels": torch.zeros(4)}

    def model(attention_mask: Tensor, labels: Tensor) -> None:
        observing((len(attention_mask),), 0)(labels)

    with pytest.raises(ValueError, match=r"rows differ, .'attention_mask': 1, 'labels"):
        trace_on(model, (), batch)


@pytest.mark.parametrize("engine", ["laplace", "svgd"])
@pytest.mark.parametrize("fn", [dist.Poisson, partial(dist.Normal, scale=1.0)])
def test_outputs_that_keep_their_last_dim_are_refused(engine: str, fn: Any) -> None:
    # (B, 1) in a plate of B data is a likelihood of (B, B): each output for all data.
    lora = pl.lift(networks.bert(num_labels=1, num_layers=1))
    data = networks.batch()

    def model(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> None:
        f = lora()(input_ids=input_ids, attention_mask=attention_mask).logits
        with pyro.plate("data", len(labels), subsample=labels):
            pyro.sample("y", fn(f.exp()), obs=labels.to(f))

    start = lora.init_to_adapter()
    guide = pl.AutoLaplace(model, init_loc_fn=start)
    optim = Adam({"lr": 0.01})
    svgd = pl.SVGD(model, pl.kernels.NoRepulsion(), optim, 1, init_loc_fn=start)
    run = {
        "laplace": partial(guide.laplace_approximation, [data]),
        "svgd": partial(svgd.step, **data),
    }[engine]
    with pytest.raises(ValueError, match=r"batch shape \(5, 5\).*\[..., 0\]"):
        run()


NUMBERS = st.floats(width=32) | st.integers(-3, 5).map(float)


@pytest.mark.parametrize("masked", [False, True])
@given(st.lists(NUMBERS, min_size=1, max_size=5))
@settings(max_examples=100, deadline=None)
def test_observed_classes_are_classes(masked: bool, labels: list[float]) -> None:
    # Unless they are masked, and whether PyTorch validates or not.
    value = torch.tensor(labels)
    fits = (value == 0) | (value == 1) | (value == 2)

    def model(labels: Tensor) -> None:
        counts = fits if masked else torch.ones_like(fits)
        fn = dist.Categorical(torch.ones(len(labels), 3)).mask(counts)
        with pyro.plate("data", 100, subsample=labels):
            pyro.sample("y", fn, obs=labels)

    for validates in (False, True):
        before = torch.distributions.Distribution._validate_args
        torch.distributions.Distribution.set_default_validate_args(validates)
        try:
            if masked or bool(fits.all()):
                trace_on(model, (), {"labels": value})
                continue
            with pytest.raises(ValueError, match=r"site 'y'.*outside of the support"):
                trace_on(model, (), {"labels": value})
        finally:
            torch.distributions.Distribution.set_default_validate_args(before)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([1, 2], torch.tensor([1, 2])),
        ([[1.0], [2.0]], torch.tensor([[1.0], [2.0]])),
        (np.arange(2), torch.arange(2)),
        ([np.arange(2), np.arange(2)], torch.tensor([[0, 1], [0, 1]])),
    ],
)
def test_numbers_become_tensors(value: Any, expected: Tensor) -> None:
    found = checked_batch({"x": value})["x"]
    assert torch.equal(found, expected)
    assert found.dtype == expected.dtype


@pytest.mark.parametrize("value", ["a text", ["a", "b"], [[1], [1, 2]], [], None, 3])
def test_other_values_stay(value: Any) -> None:
    assert checked_batch({"x": value, "y": torch.ones(2)})["x"] is value


def test_a_tensor_is_the_same_object() -> None:
    x = torch.ones(2)
    assert checked_batch({"x": x})["x"] is x


def test_arguments_of_later_batches() -> None:
    one = networks.batch()
    with pytest.raises(ValueError, match="Batch 1 has no 'attention_mask', other"):
        list(checked_batches([one, {**one, "attention_mask": None}]))
    with pytest.raises(ValueError, match="Batch 2 has 'extra', other than the first"):
        list(checked_batches([one, one, {**one, "extra": one["labels"]}]))


class MyError(ValueError):
    """An error of a user's own."""


@pytest.mark.parametrize("error", [MyError("mine"), ZeroDivisionError("mine")])
def test_a_users_own_errors_stay(error: Exception) -> None:
    def model(labels: Tensor) -> None:
        raise error

    with pytest.raises(type(error), match="mine"):
        trace_on(model, (), {"labels": torch.ones(2)})


def test_a_users_value_error_is_quoted() -> None:
    def model(labels: Tensor) -> None:
        raise ValueError("no such text")

    with pytest.raises(ValueError, match=r"'labels': float32 \(2,\).*no such text"):
        trace_on(model, (), {"labels": torch.ones(2)})


def test_lora_in_the_plate() -> None:
    lora = pl.lift(networks.bert())
    texts = networks.batch()
    with pytest.raises(ValueError, match=r"lora\(\) is called inside the plate 'data'"):
        bad_calls.in_plate(lora)(**texts)
    with pyro.plate("particles", 3, dim=-2):  # these may be open
        networks.classifier(lora)(**texts)
