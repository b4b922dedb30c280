"""Posterior -> ``xarray.DataTree`` with ArviZ's groups.

Draws come chain by chain, a few at a time, and one pass over the data says what the
model thinks of each datum at each of them. For example, of two chains of 50 draws of a
classifier for 64 texts, with labels,

    posterior        delta....frobenius_norm (chain 2, draw 50, layer)
    log_likelihood   y (chain 2, draw 50, datum 64)
    observed_data    y (datum 64)

S = 100 draws go through the model one chain after another, (S, N), and are shaped
(chain, draw, N) at the end alone. The likelihood of a Gaussian's draws is that of the
linearised network, f(x; ŵ) + J (w_s - ŵ).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from operator import length_hint
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pyro.infer import MCMC
from torch import Tensor

from pyro_lora.curvature.linearize import likelihood_at
from pyro_lora.export.weight_variables import (
    Variables,
    check_raw_size,
    delta_variables,
    raw_variables,
)
from pyro_lora.ground.interrupts import leaving_no_trace
from pyro_lora.ground.progress import Counted, progress
from pyro_lora.ground.ranks import (
    ALONE,
    Ranks,
    all_ranks,
    draw_ranks_of,
    is_first,
    ranks_of,
    sharing_data,
)
from pyro_lora.ground.settings import check_count, check_word
from pyro_lora.ground.unfinished import aside
from pyro_lora.ground.warning import warn
from pyro_lora.ground.weights import Weights
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood import likelihoods
from pyro_lora.likelihood.batch import (
    Batch,
    check_batches,
    checked_batches,
    next_batch,
)
from pyro_lora.likelihood.model_trace import (
    Model,
    evaluating,
    evaluating_model,
    trace_at,
)
from pyro_lora.likelihood.outcome_source import OutcomeSource
from pyro_lora.likelihood.outcomes import single_outcomes
from pyro_lora.posteriors.dropout import check_no_dropout
from pyro_lora.posteriors.guide_posterior import Guide
from pyro_lora.posteriors.laplace_posterior import (
    LaplacePosterior,
    linearized_network,
)
from pyro_lora.posteriors.mixture_posterior import MixturePosterior
from pyro_lora.posteriors.posterior import (
    Posterior,
    as_posterior,
    is_gaussian,
    kind_of,
    only_gaussian,
    tempered_prior,
)
from pyro_lora.posteriors.prior import (
    log_prior_by_site,
    networks_prior,
    prior_draws,
    scaled,
    with_scaled_sites,
)
from pyro_lora.predict.data_pass import DataPass, pass_over_data
from pyro_lora.predict.draws import check_names, model_at_draws, outcome_source
from pyro_lora.predict.linearized import not_linearizable
from pyro_lora.priors import Prior

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from xarray import Dataset, DataTree

DEFAULT_NUM_SAMPLES = 100  # PSIS needs 25; quantiles want a few more

Samples = Mapping[str, Tensor]  # site -> (chain, draw, ...)
Groups = Mapping[str, "Dataset"]
UnderPrior = Callable[[Prior, Sequence[LiftedNetwork], Weights], Weights]


@leaving_no_trace
@sharing_data
def to_datatree(
    posterior: Posterior | Guide | MCMC | Samples,
    batches: Iterable[Batch] | None = None,
    *,
    model: Model | None = None,
    num_samples: int | None = None,
    weights: Literal["delta", "raw"] = "delta",
    method: Literal["linearized", "sample"] | None = None,
    prior_predictive: bool = False,
    obs_site: str | None = None,
    labels: str | None = None,
    path: str | os.PathLike[str] | None = None,
    chunk_size: int | None = None,
    progress_bar: bool | None = None,
    mesh: DeviceMesh | None = None,
) -> DataTree:
    r"""Draws of a posterior as ArviZ's data structure, dims chain and draw.

    Groups, each if there is what it needs:

    - ``posterior`` and ``prior``: what the data can identify, which is for each
      adapted layer the singular values, the Frobenius norm and the stable rank of
      :math:`\Delta W = s B A`, around a Laplace mode its angle (radians) to the
      mode's (in a mixture, to that of the draw's own component, NaN where it has
      none), and the head's weights; or every site as it is. What is said of
      :math:`\Delta W` has the attribute ``module``, where in the network it is: a
      path, or one for each ``layer``. Attributes of
      ``posterior``: its kind, log evidence (nats), prior precisions (averaged over
      each layer); of a mixture its weights, and these of each component, as
      ``component.0.log_evidence``.
    - ``log_prior``: log density of each site, nats, under the posterior's own prior,
      else the lifted network's; times a ``poutine.scale`` around ``lora()`` or the
      model (of which particles say nothing without ``batches``). Draws of the prior
      aren't changed by one.
    - ``sample_stats``: ``lp``, the log joint of all data, where the likelihood is all
      that the model observes and the batches hold as many data as its plate says (else
      the attribute ``lp_left_out`` of ``posterior`` has the reason); ``log_q``, the
      posterior's log density, both in nats; ``component``, a mixture's; ``diverging``,
      of NUTS.
    - ``log_likelihood``: one value a datum, nats, float64.
    - ``posterior_predictive`` and ``observed_data``: outcomes, drawn and given. Data
      whose outcome is missing or masked are in the first alone, and the others keep
      their numbers in the coordinate ``datum``. Of a datum with several outcomes,
      those that don't count are -100 among the given, real ones NaN; and so are those
      that a text has fewer of than the longest, in both.
    - ``prior_predictive``: outcomes under draws of the prior.
    - ``constant_data``: the integer inputs (token ids, masks), padded with zeros on
      the right to one length.

    A Gaussian over the weights describes the network linearised at its mode, not the
    network itself, whose likelihood falls much faster away from it (Immer et al. 2021,
    https://arxiv.org/abs/2008.08400). So ``log_likelihood``, ``posterior_predictive``
    and ``lp`` of a Laplace posterior, or a mixture of them, are those of
    :math:`f(x) + J (w_s - \hat w)` at each draw; that takes C - 1 backward passes a
    batch, for each token of a text, whatever the number of draws. ``"sample"`` runs the
    network itself at each draw.

    Args:
        posterior: A posterior; or any Pyro guide, an ``MCMC`` that has run, or samples
            by chain, site -> (chain, draw, ...), which need model and batches.
        batches: Mappings of model keyword arguments that cover all data once; None
            leaves out the groups that depend on data.
        model: The Pyro model; None is the posterior's.
        num_samples: Draws; None is every particle once, all of a Markov chain, or 100.
        weights: ``"delta"`` or ``"raw"``.
        method: ``"linearized"`` or ``"sample"``; None is the posterior's own, as in
            ``predict``: ``"linearized"`` where it is Laplace's. That needs one over
            nothing but weights, and a likelihood among ``likelihoods`` with one
            outcome a datum, or one row of them; else the network is run at draws of
            the weights, with a warning.
        prior_predictive: Draw outcomes under the prior, too: as many forward passes
            over the data as there are draws.
        obs_site: The likelihood's site; None is the posterior's, else the model's
            only one.
        labels: The model's argument with that site's outcomes; None follows the
            arguments to its ``obs=``.
        path: A zarr store to write, draws after draws, in the memory of
            ``chunk_size`` of them; it's there once all is written. None keeps the tree
            in memory.
        chunk_size: Draws of each chain at a time, each in a pass over the data of its
            own; None is all at once.
        progress_bar: Show one, of the batches of all passes; None: on a terminal or in
            a notebook.
        mesh: A ``DeviceMesh`` whose dim ``"data"`` shares the data and ``"particles"``
            the draws, as in ``predict``; None: all ranks share the data, where
            ``torch.distributed`` is initialised, each with batches of its own
            (:func:`~pyro_lora.share`). All get the whole tree, one process's but for
            drawn outcomes, which are others of the same distribution. The first one
            writes ``path``, which the others read: it must be where all see it.

    Returns:
        The tree; with ``path`` it reads from there what is asked for. The functions of
        ``arviz_stats`` take it; ``.to_netcdf(path)`` and ``.to_zarr(path)`` write it.

    Raises:
        ImportError: If ArviZ isn't installed.
        ValueError: If the model is missing or doesn't fit the posterior, ``batches``
            is empty, can't be read again for more draws or the prior's or is missing
            where ``method`` or ``prior_predictive`` needs it, only some
            batches have labels, raw weights are too many, ``"linearized"`` doesn't
            fit, the posterior is ``mc_dropout``'s, or ``path`` exists.

    Warns:
        UserWarning: If a Gaussian posterior's draws go through the network itself,
            since that can't be linearised.
    """
    try:  # an extra: the rest of pyro_lora runs without it
        import arviz_base  # noqa: F401
        import xarray  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "to_datatree needs ArviZ. Install it by: pip install 'pyro-lora[arviz]'"
        ) from error
    check_word("weights", weights, ("delta", "raw"))
    check_word("method", method, ("linearized", "sample", None))
    if num_samples is not None:
        check_count("num_samples", num_samples)
    of_data = {"method": method is not None, "prior_predictive": prior_predictive}
    for name in (name for name, is_said in of_data.items() if is_said):
        if batches is None:
            raise ValueError(
                f"{name}= is about groups that depend on data, and there are no "
                "batches. Pass batches=, or leave it out."
            )
    ranks = ranks_of(mesh, "data")
    first, batches = _first_batch(batches, ranks)
    own: Posterior | None = None
    source: Posterior | MCMC | Samples
    if isinstance(posterior, MCMC | Mapping):
        source = posterior
    else:
        source = own = as_posterior(posterior, model, first)
        check_no_dropout(own, "to_datatree")
        model = own.model if model is None else model
        obs_site = own.obs_site if obs_site is None else obs_site
    kind = type(posterior).__name__ if own is None else kind_of(own)
    if own is not posterior and (model is None or first is None):
        # A guide's networks, or those of samples, are known by the model's run alone.
        raise ValueError(
            f"{kind} doesn't know the model. Pass model= and batches= to to_datatree."
        )
    if model is not None:
        check_names(model, obs_site, labels)
    if first is not None and model is None:
        raise ValueError(
            "This posterior was loaded without its model. Pass model= to "
            "to_datatree, or leave batches out."
        )
    chains = chains_of(source, num_samples)
    data = None
    gaussians: Sequence[LaplacePosterior] = ()
    if batches is not None and first is not None and model is not None:
        draws_over = draw_ranks_of(mesh)
        data = ModelAndData(model, batches, first, obs_site, labels, ranks, draws_over)
        data, gaussians = _linearized_at(data, chains, own, kind, method)
    groups = DrawGroups(own, kind, chains, data, gaussians, raw=weights == "raw")
    num_draws = groups.chains.num_draws
    size = num_draws if chunk_size is None else chunk_size
    check_count("chunk_size", size)
    if size < num_draws and batches is not None and iter(batches) is batches:
        raise ValueError(
            f"{num_draws} draws, {size} at a time, take several passes over the data, "
            "but batches is an iterator. Pass a list or a DataLoader."
        )
    if prior_predictive and batches is not None and iter(batches) is batches:
        raise ValueError(
            "prior_predictive=True takes a pass over the data of its own, but batches "
            "is an iterator. Pass a list or a DataLoader."
        )
    starts = range(0, num_draws, size)
    passes = len(starts) * (2 if prior_predictive else 1)
    with progress(
        title="DataTree",
        unit="batch",
        total=length_hint(batches or ()) * passes or None,
        shown=False if data is None else progress_bar,
    ) as bar:
        if data is not None:
            counted = replace(data, batches=Counted(data.batches, bar))
            groups = replace(groups, data=counted)
        chunks = (
            groups.datasets(start, min(start + size, num_draws), prior_predictive)
            for start in starts
        )
        if path is None:
            return joined(chunks)
        return written(chunks, Path(path))


def _first_batch(
    batches: Iterable[Batch] | None, ranks: Ranks
) -> tuple[Batch | None, Iterable[Batch] | None]:
    if batches is None:
        return None, None
    check_batches(batches)
    iterator = iter(batches)
    first = next_batch(checked_batches(iterator), "to_datatree", ranks)
    # An iterator can be read once only, so what it gave is put back.
    return first, chain([first], iterator) if iterator is batches else batches


@dataclass(frozen=True, eq=False)
class ModelAndData:
    """What says how likely the data are.

    Attributes:
        model: The Pyro model.
        batches: The data.
        first: The first batch.
        obs_site: The likelihood's site, or None.
        labels: The model's argument with that site's outcomes, where it is named.
        ranks: Who shares the data.
        draws_over: Who shares the draws.
    """

    model: Model
    batches: Iterable[Batch]
    first: Batch
    obs_site: str | None
    labels: str | None
    ranks: Ranks
    draws_over: Ranks

    def at_draws(self, weights: Weights, batch: Batch, obs_site: str | None) -> Any:
        """The model at S draws, site -> (S, ...), set up by a batch."""
        return model_at_draws(
            self.model, weights, batch, obs_site, ranks=self.draws_over
        )


def _linearized_at(
    data: ModelAndData,
    chains: Chains,
    own: Posterior | None,
    kind: str,
    method: str | None,
) -> tuple[ModelAndData, Sequence[LaplacePosterior]]:
    """The Gaussians whose networks are linearised, none if none are; and their site.

    Raises:
        ValueError: If they should be and can't.
    """
    reason: str | None = f"the posterior is {kind}"
    if method != "sample" and own is not None and is_gaussian(own):
        reason, site = _not_linearizable(chains, data)
        data = replace(data, obs_site=site)
        if reason is None:
            each = [only_gaussian(part) for part in chains.posteriors]
            return data, [part for part in each if part is not None]
        if method is None:
            warn(
                f"The network can't be linearised here, since {reason}: the "
                "log likelihood is that of the network itself at draws of the "
                "weights, which may leave the range where the Gaussian holds. Say "
                "method='sample' if that's what you want."
            )
    if method == "linearized":
        raise ValueError(
            "method='linearized' needs a Laplace posterior over nothing but "
            "weights, or a mixture of them, and a likelihood among "
            f"pyro_lora.likelihoods with one row of outcomes a datum; {reason}. Use "
            "method='sample'."
        )
    return data, ()


def _not_linearizable(
    chains: Chains, data: ModelAndData
) -> tuple[str | None, str | None]:
    """Why the likelihood can't be linearised, if so, and its site."""
    gaussians = [only_gaussian(part) for part in chains.posteriors]
    if gaussians[0] is None or None in gaussians:
        return "a component of the posterior is no single Gaussian", data.obs_site
    origin = {site: value[None] for site, value in gaussians[0].origin().items()}
    at = model_at_draws(data.model, origin, data.first, data.obs_site)
    (trace,) = at.traces(data.first)
    if any(part is not None and part.latents.values for part in gaussians):
        return "the posterior has latent sites besides the weights", at.obs_site
    fn = trace.nodes[at.obs_site]["fn"]
    single = single_outcomes(fn).fn
    if likelihoods.known(single) is None:  # its draws and density will do
        return f"{type(single).__name__} isn't among pyro_lora.likelihoods", at.obs_site
    if not _is_one_row(fn):
        return f"{type(fn).__name__} isn't one row of outcomes a datum", at.obs_site
    return not_linearizable(
        fn, "each" if _has_several_classes(fn) else None
    ), at.obs_site


def _is_one_row(fn: Any) -> bool:
    """Whether a likelihood has one outcome a datum, or one row of them."""
    single = single_outcomes(fn)
    return single.event_dims <= (0 if single.fn.event_shape else 1)


def _has_several_classes(fn: Any) -> bool:
    """Whether a datum has several outcomes, tokens or labels, that are classes."""
    single = single_outcomes(fn)
    return single.event_dims > 0 and likelihoods.of(single.fn).classes is not None


@dataclass(frozen=True)
class Draws:
    """A few draws of every chain.

    Attributes:
        weights: Site -> (S, ...), one chain after another.
        component: Of a mixture, each draw's, (S,); else None.
    """

    weights: Weights
    component: Tensor | None = None

    def __len__(self) -> int:
        """S."""
        return next(iter(self.weights.values())).shape[0]

    def of(self, component: int) -> Tensor:
        """The places of a component's draws."""
        if self.component is None:
            return torch.arange(len(self), device="cpu")
        return (self.component == component).nonzero()[:, 0]


@dataclass(frozen=True, eq=False)
class Chains:
    """Draws of a posterior that needn't be in memory together.

    Attributes:
        num_chains: Independent chains; 1 where the draws are independent.
        num_draws: Of each chain.
        take: The draws from start to stop of every chain, asked for in order.
        posteriors: What the draws are of: a mixture's components, else the posterior
            itself; empty where there are draws alone.
        component_weights: Of a mixture, else None.
        diverging: Of NUTS, (chain, draw); else None.
    """

    num_chains: int
    num_draws: int
    take: Callable[[int, int], Draws] = field(repr=False)
    posteriors: tuple[Posterior, ...] = ()
    component_weights: Tensor | None = None
    diverging: Tensor | None = None


def chains_of(posterior: Posterior | MCMC | Samples, num_samples: int | None) -> Chains:
    """The draws of a posterior.

    Args:
        posterior: A posterior, an ``MCMC`` that has run, or its samples by chain.
        num_samples: Draws of each chain; None is all that there are, or 100. Fewer
            than a Markov chain has are its last ones.

    Returns:
        The chains.

    Raises:
        ValueError: If there are fewer draws, or samples don't fit each other.
    """
    if isinstance(posterior, MCMC):
        samples = posterior.get_samples(group_by_chain=True)
        chains = _of_samples(samples, num_samples)
        diverging = torch.zeros(next(iter(samples.values())).shape[:2], device="cpu")
        divergences = posterior.diagnostics().get("divergences", {})
        for index, draws in enumerate(divergences.values()):
            diverging[index, draws] = 1
        last = diverging[:, -chains.num_draws :].bool()
        return replace(chains, diverging=last)
    if isinstance(posterior, Mapping):
        return _of_samples(posterior, num_samples)
    if num_samples is None:
        num_samples = posterior.num_samples or DEFAULT_NUM_SAMPLES
    check_count("num_samples", num_samples)
    # Draws of a density are independent, so that one chunk can come after another.
    if isinstance(posterior, MixturePosterior):
        return Chains(
            1,
            num_samples,
            lambda a, b: Draws(*posterior.sample_with_components(b - a)),
            posterior.components,
            posterior.weights,
        )
    if posterior.num_samples is None:
        return Chains(
            1, num_samples, lambda a, b: Draws(posterior.sample(b - a)), (posterior,)
        )
    particles = posterior.sample(num_samples)  # each of them once, over all chunks
    return Chains(
        1,
        num_samples,
        lambda a, b: Draws({site: x[a:b] for site, x in particles.items()}),
        (posterior,),
    )


def _of_samples(samples: Samples, num_samples: int | None) -> Chains:
    leads = {tuple(value.shape[:2]) for value in samples.values()}
    if len(leads) != 1 or len(next(iter(leads))) != 2:
        raise ValueError(
            "Samples should be site -> (chain, draw, ...), as MCMC.get_samples("
            f"group_by_chain=True) gives them; found the leading dims {sorted(leads)}."
        )
    ((num_chains, length),) = leads
    num_draws = length if num_samples is None else num_samples
    if not 1 <= num_draws <= length:
        raise ValueError(
            f"num_samples is {num_draws}, but each chain has {length} draws."
        )
    first = length - num_draws  # the last ones, furthest from where the chain began

    def take(start: int, stop: int) -> Draws:
        rows = slice(first + start, first + stop)
        return Draws({s: x[:, rows].flatten(0, 1) for s, x in samples.items()})

    return Chains(num_chains, num_draws, take)


@dataclass(frozen=True, eq=False)
class LinearizedAtDraws:
    """A model at S draws of a Gaussian posterior, the network linearised at its mode.

    Attributes:
        model: The Pyro model.
        gaussians: What the draws are of, a mixture's components in order.
        draws: The draws.
        obs_site: The likelihood's site.
    """

    model: Model
    gaussians: Sequence[LaplacePosterior]
    draws: Draws
    obs_site: str

    @property
    def num_draws(self) -> int:
        """S."""
        return len(self.draws)

    @property
    def networks(self) -> Sequence[LiftedNetwork]:
        """The lifted networks in the model."""
        return self.gaussians[0].networks

    @property
    def ranks(self) -> Ranks:
        """Who shares the draws: nobody, as one Jacobian is for all."""
        return ALONE

    def traces(self, batch: Batch) -> Iterator[Any]:
        """One trace, at the origin but for the likelihood's distribution.

        Args:
            batch: The model's keyword arguments.

        Yields:
            A trace in which that has batch shape (S, B).
        """
        values: Tensor | None = None  # (S, B, C), of several classes (S, B, T, C)
        for component, gaussian in enumerate(self.gaussians):
            index = self.draws.of(component)
            if not len(index):
                continue
            # f(x; ŵ) + J (w_s - ŵ): one Jacobian a batch for all draws of a component
            with evaluating(gaussian.networks):
                trace = trace_at(self.model, gaussian.origin(), batch)
                network = linearized_network(gaussian, self.model, self.obs_site)
                weights = _draws_at(self.draws.weights, index)
                fn = trace.nodes[self.obs_site]["fn"]
                tokens: Any = "each" if _has_several_classes(fn) else None
                at = network.at(batch, tokens)
                of_gaussian = at.logits_at(weights)
            if values is None:
                values = of_gaussian.new_empty(self.num_draws, *of_gaussian.shape[1:])
            values[index] = of_gaussian
        assert values is not None
        # All but the likelihood (plates, observed values) is the same under every draw.
        site = trace.nodes[self.obs_site]
        moved = likelihood_at(site["fn"], values, at.numbers)
        trace.nodes[self.obs_site] = {**site, "fn": moved}
        yield trace


def _draws_at(weights: Weights, index: Tensor) -> Weights:
    return {site: value[index.to(value.device)] for site, value in weights.items()}


@dataclass(frozen=True, eq=False)
class DrawGroups:
    """What the groups are made from, some draws at a time.

    Attributes:
        posterior: The posterior; None where there are draws alone.
        kind: What it is called.
        chains: Its draws.
        data: The model and the data, where there are some.
        gaussians: Where the likelihood is that of the linearised network, what it's
            linearised at, one for each of the chains' posteriors; else empty.
        raw: Whether sites come as they are.
    """

    posterior: Posterior | None
    kind: str
    chains: Chains
    data: ModelAndData | None
    gaussians: Sequence[LaplacePosterior]
    raw: bool

    def datasets(
        self, start: int, stop: int, prior_predictive: bool
    ) -> dict[str, Dataset]:
        """The groups of the draws from start to stop of every chain.

        Args:
            start: The first draw's place in its chain.
            stop: One after the last's.
            prior_predictive: Whether to run the model at draws of the prior, too.
        """
        from arviz_base import dict_to_dataset

        draws = self.chains.take(start, stop)
        if self.raw:
            check_raw_size(draws.weights)
        seen = self._pass(draws)
        networks = self._networks(seen)
        variables = raw_variables if self.raw else delta_variables
        mode = _modes(self.chains, draws)
        priors = _priors(self.chains, draws, {} if seen is None else seen.prior_scales)
        of_prior = _by_draw(
            priors, lambda prior, rows: prior_draws(prior, networks, len(rows))
        )

        def under_prior(of: UnderPrior, weights: Weights) -> Weights:
            return _by_draw(
                priors,
                lambda prior, rows: of(
                    prior, networks, {site: x[rows] for site, x in weights.items()}
                ),
            )

        log_prior = under_prior(log_prior_by_site, draws.weights)
        if seen is not None:
            # Of the model's other latents by its trace, of the weights by their prior.
            log_prior = seen.log_prior | log_prior
        stats = self._sample_stats(draws, seen, log_prior, slice(start, stop))
        groups = {
            "posterior": variables(
                networks, under_prior(with_scaled_sites, draws.weights), mode
            ),
            "prior": variables(networks, under_prior(with_scaled_sites, of_prior)),
            "log_prior": _variables(log_prior),
            "sample_stats": _variables(stats),
        }
        if seen is not None:
            groups |= _data_groups(seen)
        if prior_predictive and self.data is not None and seen is not None:
            groups["prior_predictive"] = _outcomes(
                seen, self._under_prior(self.data, draws, of_prior, seen)
            )
        result = {}
        # Group by group: a site's draws and its log prior have one name, other dims.
        for name, group in groups.items():
            if group.values:
                result[name] = dict_to_dataset(
                    {n: self._shaped(name, x) for n, x in group.values.items()},
                    dims=group.dims,
                    coords=group.coords,
                    sample_dims=["chain", "draw"] if per_draw(name) else [],
                    attrs=self._attributes(name, seen),
                    check_conventions=False,  # a chunk may have fewer draws than chains
                )
                for variable, module in group.modules.items():
                    result[name][variable].attrs["module"] = module
                if per_draw(name):
                    result[name] = result[name].assign_coords(draw=range(start, stop))
        return result

    def _shaped(self, group: str, value: Any) -> Any:
        """(S, ...) -> (chain, draw, ...)."""
        if not per_draw(group):
            return value
        return value.reshape(self.chains.num_chains, -1, *value.shape[1:])

    def _pass(self, draws: Draws) -> DataPass | None:
        data = self.data
        if data is None:
            return None
        labels = _source(data, draws).arguments(data.first)
        if self.gaussians:
            assert data.obs_site is not None  # of those that can be linearised
            linearized = LinearizedAtDraws(
                data.model, self.gaussians, draws, data.obs_site
            )
            return pass_over_data(linearized, data.batches, labels, data.ranks)
        at = data.at_draws(draws.weights, data.first, data.obs_site)
        return pass_over_data(at, data.batches, labels, data.ranks)

    def _networks(self, seen: DataPass | None) -> Sequence[LiftedNetwork]:
        if seen is not None:
            return seen.networks
        assert self.posterior is not None  # to_datatree has checked it
        return self.posterior.networks

    def _under_prior(
        self, data: ModelAndData, draws: Draws, of_prior: Weights, seen: DataPass
    ) -> Tensor:
        """Outcomes (S, N, ...) under draws of the prior."""
        source = _source(data, draws)
        hidden = source.hidden(data.first)
        others = _other_latents(data.model, of_prior, hidden, seen)
        at = data.at_draws(of_prior | others, data.first, seen.obs_site)
        batches = (source.hidden(batch) for batch in data.batches)
        labels = source.arguments(data.first)
        return pass_over_data(at, batches, labels, data.ranks).drawn

    def _sample_stats(
        self, draws: Draws, seen: DataPass | None, log_prior: Weights, rows: slice
    ) -> Weights:
        stats = {}
        if seen is not None and seen.no_log_joint is None:
            assert seen.observed is not None  # else that's the reason
            # log p(w_s) + log p(y | w_s), up to a constant of the data
            total = torch.stack(list(log_prior.values())).sum(0)
            stats["lp"] = total + seen.observed.total_log_likelihood
        if self.posterior is not None:
            log_q = _log_q(self.posterior, draws.weights)
            stats |= {} if log_q is None else {"log_q": log_q}
        if draws.component is not None:
            stats["component"] = draws.component
        if self.chains.diverging is not None:
            stats["diverging"] = self.chains.diverging[:, rows].flatten()
        return stats

    def _attributes(self, group: str, seen: DataPass | None) -> dict[str, Any]:
        attributes: dict[str, Any] = {"inference_library": "pyro_lora"}
        if group == "posterior":
            attributes |= self._posterior_attributes()
            if seen is not None and seen.no_log_joint is not None:
                attributes["lp_left_out"] = seen.no_log_joint
        if group in ("log_likelihood", "posterior_predictive"):
            attributes["method"] = "linearized" if self.gaussians else "sample"
        return attributes

    def _posterior_attributes(self) -> dict[str, Any]:
        attributes: dict[str, Any] = {"posterior": self.kind}
        weights, posteriors = self.chains.component_weights, self.chains.posteriors
        if weights is None:
            for own in posteriors:
                attributes |= _gaussian_attributes(own)
            return attributes
        attributes["component_weights"] = weights.tolist()
        for index, own in enumerate(posteriors):
            of_one = {"posterior": kind_of(own), **_gaussian_attributes(own)}
            attributes |= {f"component.{index}.{n}": x for n, x in of_one.items()}
        return attributes


def _source(data: ModelAndData, draws: Draws) -> OutcomeSource:
    one = {site: value[0] for site, value in draws.weights.items()}
    return outcome_source(data.model, one, data.obs_site, data.labels)


def per_draw(group: str) -> bool:
    """Whether a group has the dims chain and draw.

    Args:
        group: Its name.
    """
    return not group.endswith("_data")


@torch.no_grad()
def _other_latents(
    model: Model, of_prior: Weights, batch: Batch, seen: DataPass
) -> Weights:
    """Draws from the model of the latent sites that the weights' prior doesn't have."""
    values: dict[str, list[Tensor]] = {}
    for s in range(len(next(iter(of_prior.values())))):
        weights = {site: value[s] for site, value in of_prior.items()}
        with evaluating_model():
            trace = trace_at(model, weights, batch)
        for site in seen.log_prior:
            if site not in of_prior:
                values.setdefault(site, []).append(trace.nodes[site]["value"])
    return {site: torch.stack(each) for site, each in values.items()}


def _log_q(posterior: Posterior, weights: Weights) -> Tensor | None:
    """Log density of draws of the posterior, float64; None where it has none."""
    try:
        return posterior.log_prob(weights).double()
    except ValueError:
        return None


def _outcomes(seen: DataPass, drawn: Tensor) -> Variables:
    """A group of outcomes that were drawn for all data, (S, N, ...)."""
    return _variables({seen.obs_site: drawn}, {"datum": range(drawn.shape[1])})


def _data_groups(seen: DataPass) -> dict[str, Variables]:
    groups = {"posterior_predictive": _outcomes(seen, seen.drawn)}
    if seen.observed is not None:
        # A missing outcome is no datum: leave-one-out would count its 0.
        rows = seen.observed.counts.nonzero()[:, 0]
        of_seen = {"datum": rows.tolist()}
        for group, value in {
            "log_likelihood": seen.observed.log_likelihood[:, rows],
            "observed_data": seen.observed.values[rows],
        }.items():
            groups[group] = _variables({seen.obs_site: value}, of_seen)
    groups["constant_data"] = Variables()
    datum = {"datum": range(seen.drawn.shape[1])}
    for name, value in seen.inputs.items():
        token = {"token": range(value.shape[1])} if value.ndim == 2 else {}
        groups["constant_data"].add(name, value, datum | token, name)
    return groups


def _priors(
    chains: Chains, draws: Draws, scales: Mapping[str, float | Tensor]
) -> list[tuple[Prior, Tensor]]:
    """Each prior, and which draws it is the one of: in a mixture its component's."""
    if not chains.posteriors:
        return [(scaled(networks_prior(()), scales), draws.of(0))]
    each = [
        (tempered_prior(own, scales), draws.of(index))
        for index, own in enumerate(chains.posteriors)
    ]
    return [(prior, rows) for prior, rows in each if len(rows) > 0]


def _by_draw(
    priors: Sequence[tuple[Prior, Tensor]], values: Callable[[Prior, Tensor], Weights]
) -> Weights:
    """Values under each prior, in the order of the draws."""
    each = [values(prior, rows) for prior, rows in priors]
    # The priors' rows, one prior after another, are a permutation of the draws'.
    order = torch.cat([rows for _, rows in priors]).argsort()
    return {s: torch.cat([own[s] for own in each])[order] for s in each[0]}


def _modes(chains: Chains, draws: Draws) -> Weights | None:
    """The mode; of a mixture each draw's own, (S, ...), NaN where there is none."""
    gaussians = [only_gaussian(own) for own in chains.posteriors]
    modes = [None if own is None else own.mode() for own in gaussians]
    one = next((mode for mode in modes if mode is not None), None)
    if one is None or draws.component is None:
        return one
    # A draw's angle is to its own component's mode: one that has none gives NaN.
    nowhere = {site: torch.full_like(x, torch.nan) for site, x in one.items()}
    each = [nowhere if mode is None else mode for mode in modes]
    return {s: torch.stack([m[s] for m in each])[draws.component] for s in one}


def _variables(
    values: Weights, dims: Mapping[str, Sequence[int]] | None = None
) -> Variables:
    result = Variables()
    for name, value in values.items():
        result.add(name, value, dims or {}, name)
    return result


def _gaussian_attributes(posterior: Posterior) -> dict[str, Any]:
    gaussian = only_gaussian(posterior)
    if gaussian is None:
        return {}
    attributes: dict[str, Any] = {"log_evidence": float(gaussian.log_evidence())}
    for site, tau in gaussian.prior_precision.items():
        # One number for each layer; a prior of one scale for all of them has one.
        rows = tau.expand(gaussian.mode()[site].shape).flatten(1).mean(1).tolist()
        attributes[f"prior_precision.{site}"] = rows if len(set(rows)) > 1 else rows[0]
    return attributes


def joined(chunks: Iterable[Groups]) -> DataTree:
    """All chunks as one tree in memory.

    Args:
        chunks: Groups of some draws each, in order.
    """
    from xarray import DataTree, concat

    each = list(chunks)
    if len(each) == 1:
        return DataTree.from_dict(dict(each[0]))
    return DataTree.from_dict(
        {
            name: concat(
                [groups[name] for groups in each],
                "draw",
                data_vars="all",
                coords="minimal",
                compat="override",
                join="exact",
                combine_attrs="override",
            )
            if per_draw(name)
            else group
            for name, group in each[0].items()
        }
    )


def written(chunks: Iterable[Groups], path: Path) -> DataTree:
    """All chunks in a zarr store, one in memory at a time.

    The store has another name until it is whole.

    Args:
        chunks: Groups of some draws each, in order.
        path: The store to make.

    Returns:
        The tree, which reads from the store.

    Raises:
        ValueError: If ``path`` exists.
    """
    from xarray import open_datatree

    # Whoever reads it, of whatever mesh, waits until the first process has written it.
    with all_ranks().together():
        if is_first():
            _write(chunks, path)
        else:
            for _ in chunks:  # whose data they may share
                pass
    return open_datatree(path, engine="zarr", consolidated=False)


def _write(chunks: Iterable[Groups], path: Path) -> None:
    if path.exists():
        raise ValueError(f"{path} exists. Name a store that doesn't, or delete it.")
    with aside(path.parent) as unfinished:
        store = unfinished / path.name
        for index, groups in enumerate(chunks):
            for name, group in groups.items():
                if index == 0:
                    group.to_zarr(store, group=name, mode="a", consolidated=False)
                elif per_draw(name):
                    group.to_zarr(
                        store, group=name, append_dim="draw", consolidated=False
                    )
        store.rename(path)
