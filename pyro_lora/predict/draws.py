"""Draws of the weights, and the likelihood's site under many draws at once.

Draws are one more batch dim, left of all the model's plates, so that one run of the
model is one forward pass for several. With the data's plate alone, of B data, and a
site of weights (L, R, I) outside of it, S draws (S, L, R, I) become

    (S, 1, L, R, I)      1: the data's plate, in which the site isn't

and the likelihood's distribution then has batch shape (S, B).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_lora.ground.ranks import ALONE, Ranks
from pyro_lora.ground.settings import check_count, check_name
from pyro_lora.ground.warning import warn
from pyro_lora.ground.weights import Weights
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.lifting.split_layers import who_run
from pyro_lora.likelihood.batch import Batch, PlacedBatch
from pyro_lora.likelihood.batch_dims import batch_dims, plates_of
from pyro_lora.likelihood.data_plate import data_plate
from pyro_lora.likelihood.model_trace import (
    Model,
    check_model,
    evaluating_model,
    in_mode,
    is_missing_outcome,
    lifted_networks,
    likelihood_site,
    trace_at,
)
from pyro_lora.likelihood.outcome_source import OutcomeSource
from pyro_lora.likelihood.stacks import Stacking
from pyro_lora.posteriors.dropout import drop
from pyro_lora.posteriors.posterior import Posterior, kind_of

# Draws folded into one forward pass: a few fill the processor, more cost memory.
DRAWS_AT_ONCE = 8


@torch.no_grad()
def draw_weights(
    posterior: Posterior, num_samples: int | None, default: int
) -> Weights:
    """Draws of every site that a posterior samples.

    Args:
        posterior: A posterior.
        num_samples: S; None is the posterior's own number, K for particles, else
            ``default``.
        default: S where nothing says otherwise.

    Returns:
        Site -> (S, ...).

    Raises:
        ValueError: If S isn't positive.
    """
    if num_samples is None:
        num_samples = posterior.num_samples or default
    check_count("num_samples", num_samples)
    return posterior.sample(num_samples)


def check_names(model: object, obs_site: object, labels: object = None) -> None:
    """Check the arguments that every function of a model and a posterior has.

    Args:
        model: The Pyro model.
        obs_site: The likelihood's site, or None.
        labels: The name of the labels' argument, or None.

    Raises:
        TypeError: If one is of a wrong kind, or model and posterior were swapped.
    """
    if isinstance(model, Posterior):
        raise TypeError(
            f"model must be the Pyro model, found a {type(model).__name__}. Are model "
            "and posterior in each other's place?"
        )
    check_model(model)
    check_name("obs_site", obs_site)
    check_name("labels", labels)


def check_same_inputs(
    networks: Sequence[LiftedNetwork],
    fitted_with: frozenset[str] | None,
    batch: PlacedBatch,
) -> None:
    """Warn where the networks get other arguments than in a fit.

    A model whose ``attention_mask`` has a default runs without one, and padding counts.

    Args:
        networks: Those of the posterior.
        fitted_with: The arguments of the fit's batches; None where it isn't known.
        batch: The first one.
    """
    if fitted_with is None:
        return
    takes = {name for lora in networks for name in lora.input_names}
    for name in sorted((fitted_with ^ batch.given) & takes):
        has, had = ("no", "with") if name in fitted_with else ("a", "without")
        warn(
            f"{batch.place} has {has} {name!r} for the network, and the posterior was "
            f"fitted {had} one, so these outputs are others. Give the same arguments; "
            "of a mask, ones where nothing is padding."
        )


def model_of(posterior: Posterior, model: Model | None, caller: str) -> Model:
    """The model that is given, else the posterior's own.

    Args:
        posterior: A posterior.
        model: The model that is given, if there is one.
        caller: Name of the function that needs it.

    Raises:
        ValueError: If there is none.
    """
    model = posterior.model if model is None else model
    if model is None:
        raise ValueError(
            f"{caller} needs the model, and this {kind_of(posterior)} doesn't "
            f"know its own. Use {caller}(posterior, ..., model=model)."
        )
    return model


def network_of(
    posterior: Posterior, lora: LiftedNetwork | None, caller: str
) -> LiftedNetwork:
    """The lifted network that is given, else the posterior's only one.

    Args:
        posterior: A posterior.
        lora: The network that is given, if there is one.
        caller: Name of the function that needs it.

    Raises:
        ValueError: If there is none, or several.
    """
    if lora is not None:
        return lora
    networks = posterior.networks
    if len(networks) != 1:
        raise ValueError(
            f"{caller} needs one lifted network, and this {kind_of(posterior)} "
            f"knows {len(networks)}. Use {caller}(posterior, ..., lora=lora)."
        )
    return networks[0]


def outcome_source(
    model: Model, weights: Weights, obs_site: str | None, labels: str | None
) -> OutcomeSource:
    """Finds the outcomes of a likelihood in batches, dropout off.

    Args:
        model: A Pyro model.
        weights: One weight set, all latent sites.
        obs_site: The likelihood's site, or None.
        labels: The argument with its outcomes, where it is known.
    """

    def trace(batch: Batch) -> Any:
        with torch.no_grad(), evaluating_model():
            return trace_at(model, weights, batch)

    return OutcomeSource(trace, obs_site, tuple(weights), labels)


@dataclass(frozen=True, eq=False)
class ModelAtDraws:
    """A model at S draws of its latent sites.

    Attributes:
        model: The Pyro model.
        weights: Site -> (S, 1, ..., 1, *shape): batch dims are padded up to the
            model's plates, so that the draws are the leftmost batch dim everywhere.
        obs_site: The likelihood's site.
        networks: The lifted networks in the model.
        batch_first: Whether a batch's first tensor has one row for each datum.
        check: That a batch's data aren't those of several draws, mixed.
        draws_at_once: Draws in one forward pass.
        dropout: Whether dropout is on.
        ranks: Who shares the draws: each runs the model at those that it owns.
    """

    model: Model
    weights: Weights
    obs_site: str
    networks: Sequence[LiftedNetwork]
    batch_first: bool
    check: Callable[[Batch], None]
    draws_at_once: int = DRAWS_AT_ONCE
    dropout: bool = False
    ranks: Ranks = ALONE

    @property
    def num_draws(self) -> int:
        """S."""
        return next(iter(self.weights.values())).shape[0]

    @property
    def num_runs(self) -> int:
        """How often a batch goes through the network, on this rank."""
        own = self.ranks.owned(self.num_draws)
        return math.ceil(len(own) / self.draws_at_once)

    def num_rows(self, batch: Batch) -> int:
        """B; where the batch's tensors don't tell, by a run at the first draw."""
        if self.batch_first:
            return _num_rows(batch)[0]
        one = {site: x[:1] for site, x in self.weights.items()}
        (trace,) = replace(self, weights=one, ranks=ALONE).traces(batch)
        return data_plate(trace.nodes[self.obs_site]).size

    def traces(self, batch: Batch) -> Iterator[Any]:
        """Traces of the model, a few of this rank's draws at a time.

        Args:
            batch: The model's keyword arguments.

        Yields:
            Traces in which the likelihood's distribution has batch shape (S', B).

        Raises:
            ValueError: If the distribution has other batch dims, or the model mixes
                the data of several draws.
        """
        self.check(batch)
        own = self.ranks.owned(self.num_draws)
        for start in range(own.start, own.stop, self.draws_at_once):
            stop = min(start + self.draws_at_once, own.stop)
            chunk = {site: x[start:stop] for site, x in self.weights.items()}
            with in_mode(drop) if self.dropout else evaluating_model():
                trace = trace_at(self.model, chunk, batch, undrawn=self.obs_site)
            shape = tuple(trace.nodes[self.obs_site]["fn"].batch_shape)
            size = _num_rows(batch) if self.batch_first else shape[-1:]
            expected = (stop - start, *size)
            if shape != expected:
                raise ValueError(
                    f"Site {self.obs_site!r}: {stop - start} draws at once should give "
                    f"the batch shape {expected}, found {shape}. Index the network's "
                    "outputs from the right (logits[..., -1, :])."
                )
            yield trace


@torch.no_grad()
def model_at_draws(
    model: Model,
    weights: Mapping[str, Tensor],
    batch: Batch,
    obs_site: str | None,
    draws_at_once: int = DRAWS_AT_ONCE,
    dropout: bool = False,
    trace: Any = None,
    ranks: Ranks = ALONE,
) -> ModelAtDraws:
    """Trace the model once, at the first draw, and fit the draws to its plates.

    Args:
        model: A Pyro model.
        weights: Site -> (S, ...), all latent sites of the model.
        batch: The first batch, labels or not.
        obs_site: The likelihood's site, or None.
        draws_at_once: How many of them go through the network in one forward pass.
        dropout: Whether dropout is on, for MC dropout.
        trace: That trace, where it is known.
        ranks: Who shares the draws; fewer draws than ranks are run by each.

    Returns:
        The model at the draws.

    Raises:
        ValueError: If the likelihood isn't found or gives more than one outcome a
            datum, the model and the posterior have different latent sites, one is local
            to a datum, the model mixes the data of several draws, or ranks that share
            the draws have others.
    """
    check_names(model, obs_site)
    ranks.check_same(weights, "the draws", "Give all ranks the same posterior.")

    def run(batch: Batch, at: Weights, undrawn: str | None = None) -> Any:
        with evaluating_model():
            return trace_at(model, at, batch, undrawn)

    if trace is None:
        trace = run(batch, {site: x[0] for site, x in weights.items()})
    obs = likelihood_site(trace, obs_site, weights)
    if len(obs["fn"].batch_shape) != 1:
        raise ValueError(
            f"Site {obs['name']!r} has batch shape {tuple(obs['fn'].batch_shape)}; "
            "expected (B,), one likelihood value for each datum. Declare the other "
            "dims as one event, by .to_event(1)."
        )
    nodes = {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample"
        and not site_is_subsample(node)
        and not is_missing_outcome(trace, name)
    }
    for name, node in nodes.items():
        missing = not node["is_observed"] and name not in {obs["name"], *weights}
        # Beside the named site another outcome of the same data may go unobserved.
        if missing and not (obs_site is not None and plates_of(node) & plates_of(obs)):
            raise ValueError(
                f"The model's site {name!r} isn't among those that the posterior "
                f"samples, {sorted(weights)}. Use the model that the posterior was "
                "made for, with every latent site in the guide."
            )
    unknown = sorted(weights.keys() - trace.nodes.keys())
    if unknown:
        raise ValueError(
            f"The posterior samples {unknown}, which the model doesn't; the model has "
            f"{sorted(nodes)}. Use the model that the posterior was made for."
        )
    # Not those of pyro.deterministic: what it records may have any number of dims.
    places = batch_dims([obs], {s: n for s, n in nodes.items() if s in weights})

    def padded(stack: Mapping[str, Tensor]) -> Weights:
        return {name: dims.stacked(stack[name]) for name, dims in places.items()}

    at = {name: trace.nodes[name]["value"] for name in places}
    networks = lifted_networks(trace)

    def check(batch: Batch, trace: Any = None) -> None:
        Stacking(
            model,
            batch.values(),
            [obs["name"]],
            partial(run, batch),
            lambda stack: run(batch, padded(stack), obs["name"]),
            draws_at_once,
            who_run(networks),
        ).check(at, trace)

    check(batch, trace)
    batch_first = _num_rows(batch) == tuple(obs["fn"].batch_shape)
    return ModelAtDraws(
        model,
        padded(weights),
        obs["name"],
        networks,
        batch_first,
        check,
        draws_at_once,
        dropout,
        ranks.over(len(next(iter(weights.values())))),
    )


def _num_rows(batch: Batch) -> tuple[int, ...]:
    """(B,) by the batch's first tensor with dims; () if it has none."""
    tensors = (x for x in batch.values() if isinstance(x, Tensor) and x.ndim > 0)
    return next((tuple(x.shape[:1]) for x in tensors), ())
