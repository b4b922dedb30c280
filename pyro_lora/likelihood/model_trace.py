"""Running a user's model at given weights, and finding its parts in the trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor, nn
from torch import distributions as td

from pyro_lora.ground.interrupts import leaving_no_trace, undone, unvalidated
from pyro_lora.ground.ranks import is_agreed
from pyro_lora.ground.settings import check_function
from pyro_lora.ground.synchronisation import NeedsAllRanksError, once_more, validated
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood.batch import (
    Batch,
    PlacedBatch,
    check_outcomes,
    check_plates,
    checked_batch,
    explaining,
)
from pyro_lora.likelihood.data_plate import GivenRows
from pyro_lora.likelihood.likelihoods import TooManyClasses
from pyro_lora.likelihood.outcomes import single_outcomes

Model = Callable[..., Any]
IGNORED = -100  # the label of a token that doesn't count, as in transformers


class _AtWeights(Messenger):
    """Latent sites take given values and stay latent."""

    def __init__(self, weights: Mapping[str, Tensor], undrawn: str | None) -> None:
        super().__init__()
        self.weights, self.undrawn = weights, undrawn

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"]:
            return
        if msg["name"] in self.weights:
            msg["value"] = self.weights[msg["name"]]
        elif msg["name"] == self.undrawn:
            msg["value"] = _in_place_of_draw(msg["fn"])


def _in_place_of_draw(fn: Any) -> Any:
    """Zeros of the form of a draw, which is one, too, where the form isn't known."""
    base = single_outcomes(fn).fn
    parameters = [x for x in vars(base).values() if isinstance(x, Tensor)]
    if not parameters:
        return fn.sample()
    is_index = isinstance(base, td.Categorical)
    return parameters[0].new_zeros(
        fn.shape(), dtype=torch.long if is_index else parameters[0].dtype
    )


def check_model(model: object) -> None:
    """Check that something can be a Pyro model.

    Raises:
        TypeError: If it can't be called, or is the lifted network itself.
    """
    expected = "a Pyro model, such as models.classification(lora, num_data)"
    if isinstance(model, LiftedNetwork):
        raise TypeError(
            f"model must be {expected}, which calls lora(); found a LiftedNetwork."
        )
    check_function("model", model, expected)


@leaving_no_trace
def trace_at(
    model: Model,
    weights: Mapping[str, Tensor],
    batch: Batch,
    undrawn: str | None = None,
) -> Any:
    """Trace of the model with its latent sites at ``weights``.

    Args:
        model: A Pyro model.
        weights: Site -> value; sites that aren't named are sampled.
        batch: The model's keyword arguments.
        undrawn: A site whose value nobody looks at, only its distribution: without
            labels it isn't drawn, which would take a GPU's time and wait for it.

    Returns:
        A ``pyro.poutine.Trace``.

    Raises:
        ValueError: As :func:`trace_on`, or if a plate of the model draws its own rows.
    """
    with GivenRows(batch):
        return trace_drawing_rows(model, weights, batch, undrawn)


@leaving_no_trace
def trace_drawing_rows(
    model: Model,
    weights: Mapping[str, Tensor],
    batch: Batch,
    undrawn: str | None = None,
) -> Any:
    """:func:`trace_at`, where it doesn't matter which rows of the data are seen.

    Args:
        model: A Pyro model in training, or a guide.
        weights: As there, and the rows of plates.
        batch: As there.
        undrawn: As there.

    Returns:
        A ``pyro.poutine.Trace``.

    Raises:
        ValueError: As :func:`trace_on`.
    """

    def run() -> Any:
        with _AtWeights(weights, undrawn):
            return trace_on(model, (), batch)

    return validated(run)  # with the weights also where it's run once more


def trace_on(model: Model, args: tuple[Any, ...], batch: Batch) -> Any:
    """Trace of a model on a batch, that says what is wrong with a bad one.

    Args:
        model: A Pyro model, or a guide.
        args: Positional arguments.
        batch: Keyword arguments.

    Returns:
        A ``pyro.poutine.Trace``.

    Raises:
        ValueError: If the batch has no data, the model fails on it, or what it observes
            isn't of the likelihood's shape.
    """
    return validated(partial(_traced, model, args, checked_batch(batch)))


def _traced(model: Model, args: tuple[Any, ...], batch: PlacedBatch) -> Any:
    handler: Any = poutine.trace(model)
    called = model if not args else partial(model, *args)
    # The trace as far as it came, should the model fail.
    with explaining(batch, called, lambda: handler.msngr.trace.nodes):
        trace = handler.get_trace(*args, **batch)
    for site in _random_sites(trace).values():
        if site["is_observed"]:
            check_outcomes(site, batch)
            check_plates(site, trace.nodes, batch.place)
    return trace


def lifted_networks(trace: Any) -> tuple[LiftedNetwork, ...]:
    """The lifted networks whose sites appear in a trace, each once."""
    networks: dict[int, LiftedNetwork] = {}
    for site in trace.nodes.values():
        if site["type"] == "sample":
            for lora in site["infer"].get("lora", ()):
                networks[id(lora)] = lora
    return tuple(networks.values())


def sampled_networks(trace: Any) -> tuple[LiftedNetwork, ...]:
    """The same, where sites are left out that are functions of a prior's latents.

    Args:
        trace: Such as an autoguide's prototype.
    """
    networks = {id(lora): lora for lora in lifted_networks(trace)}
    for site in trace.nodes.values():
        if site["type"] == "sample":
            for lora in site["infer"].get("prior_of", ()):
                networks[id(lora)] = lora
    return tuple(networks.values())


def _random_sites(trace: Any) -> dict[str, dict[str, Any]]:
    """The sample sites that are neither subsamples, factors nor deterministic."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not site_is_subsample(site)
        and not site_is_factor(site)
        and not site["infer"].get("_deterministic", False)
        and not _is_function(site["fn"])
        and not is_missing_outcome(trace, name)
    }


def _is_function(fn: Any) -> bool:
    """Whether a site is a function of others, as ``LocScaleReparam`` makes them."""
    masked = isinstance(fn, dist.MaskedDistribution) and fn._mask is False
    return masked and isinstance(fn.base_dist, dist.Delta)


def is_missing_outcome(trace: Any, name: str) -> bool:
    """Whether a site is what ``pyro.sample("y", ..., obs_mask=)`` draws in its gaps.

    It makes the sites "y_observed" and "y_unobserved", masked, and "y" of the two.
    """
    stem = name.removesuffix("_unobserved")
    return stem != name and {stem, f"{stem}_observed"} <= trace.nodes.keys()


def without_gaps(model: Model) -> Model:
    """The model without what an ``obs_mask`` draws in its gaps.

    Those who look for latent sites would take it for parameters, or for particles.
    """
    without: Model = poutine.block(model, hide_fn=_is_in_gaps)
    return without


def _is_in_gaps(site: Any) -> bool:
    """:func:`is_missing_outcome`, while the model runs."""
    name: str = site["name"]
    is_named_so = site["type"] == "sample" and name.endswith("_unobserved")
    return is_named_so and site["mask"] is not None


def observed_names(trace: Any) -> set[str]:
    """The names of all observed sites."""
    return {name for name, site in _random_sites(trace).items() if site["is_observed"]}


def unobserved_names(trace: Any) -> set[str]:
    """The names of the sites that were sampled."""
    return _random_sites(trace).keys() - observed_names(trace)


def observed_sites(
    trace: Any, obs_site: str | Sequence[str] | None
) -> list[dict[str, Any]]:
    """The observed sites: those of ``obs_site``, else the only one that there is.

    Args:
        trace: A trace of the model.
        obs_site: A name, several, or None. Of a site with an ``obs_mask``, the name in
            the model will do.

    Raises:
        ValueError: If there is none, more than one to choose from, or one that is
            named isn't observed (labels missing, perhaps).
    """
    sites = {k: site for k, site in _random_sites(trace).items() if site["is_observed"]}
    if obs_site is None:
        if not sites:
            raise ValueError(
                "The model observed nothing, so there is no likelihood. Put labels "
                "into the batches (they go to obs= of the likelihood's pyro.sample)."
            )
        if len(sites) > 1:
            raise ValueError(
                f"The model has {len(sites)} observed sites, {sorted(sites)}. Name "
                "the likelihood by obs_site=."
            )
        return list(sites.values())
    names = [obs_site] if isinstance(obs_site, str) else list(obs_site)
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"obs_site={obs_site!r} should name one observed site or several, each "
            f"once; observed are {sorted(sites)}."
        )
    names = [f"{name}_observed" if name not in sites else name for name in names]
    for name in names:
        if name not in sites:
            name = name.removesuffix("_observed")
            raise ValueError(
                f"Site {name!r} isn't observed; observed are {sorted(sites)}. Put "
                "labels into the batches, or name another site by obs_site=."
            )
    return [sites[name] for name in names]


def observed_site(trace: Any, obs_site: str | None) -> dict[str, Any]:
    """The observed site: ``obs_site``, else the only one that there is.

    Raises:
        ValueError: If there is none, more than one to choose from, or the one named
            isn't observed (labels missing, perhaps).
    """
    (site,) = observed_sites(trace, obs_site)
    return site


def likelihood_site(
    trace: Any, obs_site: str | None, latent: Iterable[str]
) -> dict[str, Any]:
    """The likelihood's site in a trace that need not have labels.

    ``obs_site``, else the only observed site, else the one sample site that isn't
    ``latent``.

    Raises:
        ValueError: If the rule leaves no site or more than one.
    """
    sites = _random_sites(trace)
    if obs_site is not None:
        if obs_site not in sites and f"{obs_site}_observed" in sites:
            obs_site = f"{obs_site}_observed"
        if obs_site not in sites:
            raise ValueError(
                f"The model has no site {obs_site!r}; it has {sorted(sites)}. Name "
                "the likelihood by obs_site=."
            )
        return sites[obs_site]
    candidates = [n for n, site in sites.items() if site["is_observed"]]
    if not candidates:
        candidates = sorted(sites.keys() - set(latent))
    if len(candidates) != 1:
        raise ValueError(
            f"Expected one likelihood site, found {candidates}. Name it by obs_site=."
        )
    return sites[candidates[0]]


@contextmanager
def evaluating(networks: Iterable[LiftedNetwork]) -> Iterator[None]:
    """Evaluation mode for one block; every module's mode is restored after it.

    Dropout is off, and no batch norm moves its statistics.
    """
    networks = tuple(networks)
    modes = {m: mode for lora in networks for m, mode in modes_of(lora).items()}
    with undone(partial(set_modes, modes)):
        for lora in networks:
            lora.network.eval()
        yield


@contextmanager
def in_mode(put: Callable[[LiftedNetwork], object]) -> Iterator[None]:
    """A mode for each lifted network, from the moment that a model samples it.

    For a run that tells which networks there are; all are as before at its end.

    Args:
        put: Puts a network into the mode.
    """
    modes: dict[nn.Module, bool] = {}  # as they were
    with undone(partial(set_modes, modes)), _PuttingIntoMode(put, modes):
        yield


def evaluating_model() -> AbstractContextManager[None]:
    """:func:`evaluating`, of whatever lifted networks a model samples in a block."""
    return in_mode(lambda lora: lora.network.eval())


class _PuttingIntoMode(Messenger):
    def __init__(
        self, put: Callable[[LiftedNetwork], object], modes: dict[nn.Module, bool]
    ) -> None:
        super().__init__()
        self._put, self._modes = put, modes
        self._seen: set[int] = set()

    def _pyro_sample(self, msg: Any) -> None:
        for lora in msg["infer"].get("lora", ()):
            if id(lora) not in self._seen:
                self._seen.add(id(lora))
                # Networks may share modules: the first to be seen knows how they were.
                self._modes.update({**modes_of(lora), **self._modes})
                self._put(lora)


def modes_of(lora: LiftedNetwork) -> dict[nn.Module, bool]:
    """Which modules of a network are in training mode."""
    return {module: module.training for module in lora.network.modules()}


def set_modes(modes: Mapping[nn.Module, bool]) -> None:
    """Put modules into these modes."""
    for module, mode in modes.items():
        module.training = mode


def trace_batch(
    model: Model, weights: Mapping[str, Tensor], batch: Batch, index: int
) -> Any:
    """The model's trace on a batch.

    Args:
        model: A Pyro model.
        weights: Latent site -> value.
        batch: The model's keyword arguments.
        index: The batch's place.

    Raises:
        ValueError: As the model does, with the batch's place and, if it's for NaN
            parameters of a likelihood, their sites.
    """

    def run() -> Any:
        with naming_batch(index, partial(_nan_likelihoods, model, weights, batch)):
            return trace_at(model, weights, batch)

    return validated(run)


@contextmanager
def naming_batch(
    index: int, find_sites: Callable[[], Sequence[str]] = tuple
) -> Iterator[None]:
    """Say in an error of the model, such as Pyro's on NaN logits, which batch it was.

    Args:
        index: The batch's place.
        find_sites: Called on an error; names of the sites at fault, if they're known.

    Raises:
        ValueError: If the block raises one.
    """
    try:
        yield
    except ValueError as error:
        # Of no batch; and to run again, a rank needs the others.
        if is_agreed(error) or isinstance(error, TooManyClasses):
            raise
        at = "".join(f", site {name!r}" for name in find_sites())
        if str(error).startswith(f"Batch {index}"):
            if not at:
                raise
            raise ValueError(f"{error}\nNaN are the parameters of{at[1:]}.") from error
        raise ValueError(
            f"The model failed on batch {index}{at}: {error}\nIf it runs on others, "
            "check that batch's inputs and labels."
        ) from error


def _nan_likelihoods(
    model: Model, weights: Mapping[str, Tensor], batch: Batch
) -> list[str]:
    """Observed sites whose distribution has NaN parameters, if nothing else fails."""
    try:
        # Validated, the model would fail again, before there is a trace.
        with unvalidated(), once_more():
            trace = trace_at(model, weights, batch)
    except (ValueError, NeedsAllRanksError):
        return []
    names = []
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or not site["is_observed"]:
            continue
        fn = site["fn"]
        while hasattr(fn, "base_dist"):
            fn = fn.base_dist
        tensors = [x for x in vars(fn).values() if isinstance(x, Tensor)]
        if any(x.isnan().any() for x in tensors):
            names.append(name)
    return names
