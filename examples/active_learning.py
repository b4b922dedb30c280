"""Which data to label next: those whose labels would tell most about the weights.

The pool is as pools are: much of it says the same again. Batch-BALD chooses data for
what their labels tell together. Run it by ``python -m examples.active_learning``.
"""

from collections.abc import Callable

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor

import pyro_lora as pl
from examples import toy

START, PER_ROUND, ROUNDS = 32, 32, 1
Data = dict[str, Tensor]
Model = Callable[..., Tensor]


def joined(batches: list[Data]) -> Data:
    """All data as one batch."""
    return {name: torch.cat([b[name] for b in batches]) for name in batches[0]}


def rows(data: Data, chosen: Tensor) -> Data:
    """Some of the data."""
    return {name: value[chosen] for name, value in data.items()}


def fit(data: Data) -> tuple[Model, pl.LaplacePosterior]:
    """A new adapter, trained on the data, and its posterior."""
    lora = pl.lift(toy.network(), prior=pl.priors.normal(scale=1.0))
    model = pl.models.classification(lora, len(data["labels"]))
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
    pyro.clear_param_store()
    svi = SVI(model, guide, Adam({"lr": 1e-2}), Trace_ELBO())
    for _ in range(60):
        svi.step(**data)
    return model, guide.laplace_approximation([data]).optimize_prior()


def at_random(model: Model, posterior: pl.LaplacePosterior, pool: Data) -> Tensor:
    return torch.randperm(len(pool["labels"]))[:PER_ROUND]


def by_batch_bald(model: Model, posterior: pl.LaplacePosterior, pool: Data) -> Tensor:
    # Draws of the joint Gaussian of all logits: what the labels have in common counts.
    guesses = pl.predict(
        posterior,
        [pool],
        model=model,
        method="linearized",
        num_samples=128,
        keep_draws=True,
    )
    return pl.acquire(guesses, PER_ROUND, method="batch_bald").indices


common, rare = joined(toy.reviews(8, seed=1)), joined(toy.reviews(192, seed=2))
pool = joined([*[common] * 24, rare])  # half is one of eight reviews
test = toy.reviews(512, seed=3)
for choose in (at_random, by_batch_bald):
    pyro.set_rng_seed(0)
    known = torch.randperm(len(pool["labels"]))[:START]
    for turn in range(ROUNDS + 1):
        model, posterior = fit(rows(pool, known))
        found = pl.predict(posterior, test, method="linearized").metrics()
        distinct = len(pool["input_ids"][known].unique(dim=0))
        print(
            f"{choose.__name__:13} {len(known):3} labels of {distinct:2} different "
            f"reviews: accuracy {found['accuracy']:.3f}, nll {found['nll']:.3f}"
        )
        if turn < ROUNDS:
            everything = torch.arange(len(pool["labels"]))
            rest = everything[~torch.isin(everything, known)]
            new = choose(model, posterior, rows(pool, rest))
            known = torch.cat([known, rest[new]])
