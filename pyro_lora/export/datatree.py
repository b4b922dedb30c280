"""Posterior -> ``xarray.DataTree`` with ArviZ's groups."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pyro.infer import MCMC

from pyro_lora.export.chains import Chains, Samples, chains_of
from pyro_lora.export.draw_groups import DrawGroups, per_draw
from pyro_lora.export.linearized_pass import is_one_outcome
from pyro_lora.ground.interrupts import leaving_no_trace
from pyro_lora.ground.settings import check_count, check_word
from pyro_lora.ground.unfinished import aside
from pyro_lora.ground.warning import warn
from pyro_lora.likelihood import likelihoods
from pyro_lora.likelihood.batch import Batch, check_batches, checked_batches
from pyro_lora.likelihood.model_trace import Model
from pyro_lora.likelihood.outcomes import single_outcomes
from pyro_lora.posteriors.dropout import check_no_dropout
from pyro_lora.posteriors.guide_posterior import Guide
from pyro_lora.posteriors.posterior import (
    Posterior,
    as_posterior,
    is_gaussian,
    kind_of,
    only_gaussian,
)
from pyro_lora.predict.draws import check_names, model_at_draws
from pyro_lora.predict.linearized import obstacle

if TYPE_CHECKING:
    from xarray import Dataset, DataTree


@leaving_no_trace
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
      their numbers in the coordinate ``datum``.
    - ``prior_predictive``: outcomes under draws of the prior.
    - ``constant_data``: the integer inputs (token ids, masks), padded with zeros on
      the right to one length.

    A Gaussian over the weights describes the network linearised at its mode, not the
    network itself, whose likelihood falls much faster away from it (Immer et al. 2021,
    https://arxiv.org/abs/2008.08400). So ``log_likelihood``, ``posterior_predictive``
    and ``lp`` of a Laplace posterior, or a mixture of them, are those of
    :math:`f(x) + J (w_s - \hat w)` at each draw; that takes C - 1 backward passes a
    batch, whatever the number of draws. ``"sample"`` runs the network itself at each
    draw.

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
            nothing but weights, and a likelihood among ``likelihoods``
            with one outcome a datum; else the network is run at draws of the
            weights, with a warning.
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

    Returns:
        The tree; with ``path`` it reads from there what is asked for. The functions of
        ``arviz_stats`` take it; ``.to_netcdf(path)`` and ``.to_zarr(path)`` write it.

    Raises:
        ImportError: If ArviZ isn't installed.
        ValueError: If the model is missing or doesn't fit the posterior, ``batches``
            is empty or can't be read again for more draws or the prior's, only some
            batches have labels, raw weights are too many, ``"linearized"`` doesn't
            fit, the posterior is ``mc_dropout``'s, or ``path`` exists.

    Warns:
        UserWarning: If a Gaussian posterior's draws go through the network itself,
            since that can't be linearised.
    """
    groups = _groups(
        posterior, model, batches, num_samples, weights, method, obs_site, labels
    )
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
    chunks = (
        groups.datasets(start, min(start + size, num_draws), prior_predictive)
        for start in range(0, num_draws, size)
    )
    return joined(chunks) if path is None else written(chunks, Path(path))


def _groups(
    posterior: Any,
    model: Model | None,
    batches: Iterable[Batch] | None,
    num_samples: int | None,
    weights: str,
    method: str | None,
    obs_site: str | None,
    labels: str | None,
) -> DrawGroups:
    """What the groups are made from, the arguments checked.

    Raises:
        ImportError: If ArviZ isn't installed.
        ValueError: If the arguments don't fit.
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
    first, batches = _first_batch(batches)
    given, kind, known = posterior, type(posterior).__name__, None
    if not isinstance(posterior, MCMC | Mapping):
        posterior = known = as_posterior(posterior, model, first)
        check_no_dropout(known, "to_datatree")
        kind = kind_of(known)
        model = known.model if model is None else model
        obs_site = known.obs_site if obs_site is None else obs_site
    if known is not given and (model is None or first is None):
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
    chains = chains_of(posterior, num_samples)
    linearized, reason = False, f"the posterior is {kind}"
    if model is not None and first is not None:
        if method != "sample" and known is not None and is_gaussian(known):
            found, obs_site = _obstacle(chains, model, first, obs_site)
            linearized, reason = found is None, found or reason
            if not linearized and method is None:
                warn(
                    f"The network can't be linearised here, since {reason}: the "
                    "log likelihood is that of the network itself at draws of the "
                    "weights, which may leave the range where the Gaussian holds. Say "
                    "method='sample' if that's what you want."
                )
        if method == "linearized" and not linearized:
            raise ValueError(
                "method='linearized' needs a Laplace posterior over nothing but "
                "weights, or a mixture of them, and a likelihood among "
                f"pyro_lora.likelihoods with one outcome a datum; {reason}. Use "
                "method='sample'."
            )
    return DrawGroups(
        known,
        kind,
        chains,
        model,
        batches,
        first,
        weights == "raw",
        linearized,
        obs_site,
        labels,
    )


def _obstacle(
    chains: Chains, model: Model, first: Batch, obs_site: str | None
) -> tuple[str | None, str | None]:
    """Why the likelihood can't be linearised, if so, and its site."""
    parts = [only_gaussian(part) for part in chains.components]
    if parts[0] is None or None in parts:
        return "a component of the posterior is no single Gaussian", obs_site
    one = {site: value[None] for site, value in parts[0].mode().items()}
    at = model_at_draws(model, one, first, obs_site)
    (trace,) = at.traces(first)
    if any(part is not None and part.latents is not None for part in parts):
        return "the posterior has latent sites besides the weights", at.obs_site
    fn = trace.nodes[at.obs_site]["fn"]
    single = single_outcomes(fn).fn
    if likelihoods.known(single) is None:  # its draws and density will do
        return f"{type(single).__name__} isn't among pyro_lora.likelihoods", at.obs_site
    reason = obstacle(fn)
    if reason is None and not is_one_outcome(fn):
        reason = f"{type(fn).__name__} isn't one outcome a datum"
    return reason, at.obs_site


def _first_batch(
    batches: Iterable[Batch] | None,
) -> tuple[Batch | None, Iterable[Batch] | None]:
    if batches is None:
        return None, None
    check_batches(batches)
    iterator = iter(batches)
    first = next(checked_batches(iterator), None)
    if first is None:
        raise ValueError("to_datatree got no batches. Is the iterable used up already?")
    # An iterator can be read once only, so what it gave is put back.
    return first, chain([first], iterator) if iterator is batches else batches


Groups = Mapping[str, "Dataset"]


def joined(chunks: Iterable[Groups]) -> DataTree:
    """All chunks as one tree in memory.

    Args:
        chunks: Groups of some draws each, in order.
    """
    from xarray import DataTree, concat

    parts = list(chunks)
    if len(parts) == 1:
        return DataTree.from_dict(dict(parts[0]))
    return DataTree.from_dict(
        {
            name: concat(
                [part[name] for part in parts],
                "draw",
                data_vars="all",
                coords="minimal",
                compat="override",
                join="exact",
                combine_attrs="override",
            )
            if per_draw(name)
            else group
            for name, group in parts[0].items()
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

    if path.exists():
        raise ValueError(f"{path} exists. Name a store that doesn't, or delete it.")
    with aside(path.parent) as unfinished:
        part = unfinished / path.name
        for index, groups in enumerate(chunks):
            for name, group in groups.items():
                if index == 0:
                    group.to_zarr(part, group=name, mode="a", consolidated=False)
                elif per_draw(name):
                    group.to_zarr(
                        part, group=name, append_dim="draw", consolidated=False
                    )
        part.rename(path)
    return open_datatree(path, engine="zarr", consolidated=False)
