"""Pyro models around tiny networks, and posteriors for them."""

import gc
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_lora as pl
from pyro_lora.ground.weights import Weights
from tests import networks

Batch = dict[str, Tensor]
NUM_DATA = 10


@contextmanager
def only_new_objects() -> Iterator[None]:
    """The libraries' own, of which there are millions, aren't looked through."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def classifier(
    num_labels: int = 2, network: Any = None, prior: float = 0.5
) -> tuple[pl.LiftedNetwork, Callable[..., Tensor]]:
    """A lifted BERT and the ready-made model of it."""
    network = networks.bert(num_labels) if network is None else network
    lora = pl.lift(network, prior=pl.priors.normal(scale=prior))
    return lora, pl.models.classification(lora, NUM_DATA)


def two_batches(num_labels: int = 2) -> list[Batch]:
    """Ten data in batches of six and four, the second with longer texts."""
    return [
        networks.batch(6, 7, num_labels=num_labels),
        networks.batch(4, 9, num_labels=num_labels),
    ]


def real_outputs() -> tuple[pl.LiftedNetwork, Callable[..., None], list[Batch]]:
    """Three real outcomes a datum, with noise of a known size."""
    lora, _ = classifier(3)

    def model(labels: Tensor | None = None, **inputs: Tensor) -> None:
        loc = lora()(**inputs).logits
        with pyro.plate("data", NUM_DATA, subsample=inputs["input_ids"]):
            pyro.sample("y", dist.Normal(loc, 0.7).to_event(1), obs=labels)

    batches = two_batches()
    for batch in batches:
        batch["labels"] = torch.randn(len(batch["labels"]), 3, dtype=torch.float64)
    return lora, model, batches


def resized(batches: list[Batch], size: int) -> list[Batch]:
    """The same data in batches of another size, texts padded to one length."""
    length = max(b["input_ids"].shape[1] for b in batches)
    rows: Batch = {}
    for name in batches[0]:
        parts = [b[name] for b in batches]
        if parts[0].ndim == 2:
            parts = [
                torch.nn.functional.pad(p, (0, length - p.shape[1])) for p in parts
            ]
        rows[name] = torch.cat(parts)
    count = len(rows["labels"])
    return [
        {name: x[i : i + size] for name, x in rows.items()}
        for i in range(0, count, size)
    ]


def jittered(lora: pl.LiftedNetwork, num: int, scale: float = 0.3) -> Weights:
    """Weight sets around the adapter's, with a leading (num,)."""
    return {
        site: value + scale * torch.randn(num, *value.shape, dtype=value.dtype)
        for site, value in lora.weights().items()
    }


def particles(
    lora: pl.LiftedNetwork, model: Any, num: int = 3, obs_site: str | None = "y"
) -> pl.ParticlePosterior:
    return pl.ParticlePosterior(jittered(lora, num), (lora,), model, obs_site)


def laplace(
    lora: pl.LiftedNetwork, model: Any, batches: list[Batch], structure: Any = None
) -> pl.LaplacePosterior:
    """A Laplace posterior around the adapter, trained or not."""
    structure = pl.structures.KFAC() if structure is None else structure
    guide = pl.AutoLaplace(
        model, init_loc_fn=lora.init_to_adapter(), structure=structure
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The weights aren't a mode")
        return guide.laplace_approximation(batches)


def logits_at(
    lora: pl.LiftedNetwork, weights: Mapping[str, Tensor], batch: Batch
) -> Tensor:
    """The network's logits at one weight set, (B, C)."""
    with torch.no_grad(), lora.bind(weights) as net:
        return net(**networks.inputs(batch)).logits


def draw(weights: Mapping[str, Tensor], index: int) -> Weights:
    return {site: value[index] for site, value in weights.items()}


def averaged(
    lora: pl.LiftedNetwork, weights: Mapping[str, Tensor], batches: list[Batch]
) -> tuple[Tensor, Tensor]:
    """Mean probabilities (N, C) and mean entropies (N,), draw by draw."""
    num_draws = len(next(iter(weights.values())))
    probs, entropies = [], []
    for batch in batches:
        each = [
            logits_at(lora, draw(weights, s), batch).softmax(-1)
            for s in range(num_draws)
        ]
        probs.append(sum(each) / num_draws)
        entropies.append(sum(-(p * p.log()).sum(-1) for p in each) / num_draws)
    return torch.cat(probs), torch.cat(entropies)


def guide_over(weights: Mapping[str, Tensor]) -> Callable[..., Weights]:
    """A plain guide function: independent normals around a weight set."""

    def guide(**_: Any) -> Weights:
        return {
            site: pyro.sample(site, dist.Normal(value, 0.1).to_event(value.ndim))
            for site, value in weights.items()
        }

    return guide
