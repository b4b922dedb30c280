"""Posterior -> ``xarray.DataTree`` with ArviZ's groups."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pyro.infer import MCMC

from pyro_lora.export.chains import Samples, chains_of, is_linearizable
from pyro_lora.export.draw_chunks import joined, written
from pyro_lora.export.draw_groups import DrawGroups
from pyro_lora.export.linearized_pass import has_linear_predictor
from pyro_lora.infer.mixture_posterior import MixturePosterior
from pyro_lora.lifting.model_trace import Batch, Model
from pyro_lora.predict.draws import LORA_POSTERIORS, Guide, model_at_draws
from pyro_lora.predict.dropout import check_no_dropout

if TYPE_CHECKING:
    from xarray import DataTree


def to_datatree(
    posterior: Guide | MCMC | Samples,
    *,
    model: Model | None = None,
    batches: Iterable[Batch] | None = None,
    num_samples: int | None = None,
    weights: Literal["delta", "raw"] = "delta",
    method: Literal["linearized", "sample"] | None = None,
    prior_predictive: bool = False,
    obs_site: str | None = None,
    labels: str = "labels",
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
      else the lifted network's.
    - ``sample_stats``: ``lp``, the log joint of all data, where the likelihood is all
      that the model observes; ``log_q``, the posterior's log density, both in nats;
      ``component``, a mixture's; ``diverging``, of NUTS.
    - ``log_likelihood``: one value a datum, nats, float64.
    - ``posterior_predictive`` and ``observed_data``: outcomes, drawn and given.
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
        posterior: One of ours; or any Pyro guide, an ``MCMC`` that has run, or samples
            by chain, site -> (chain, draw, ...), which need model and batches.
        model: The Pyro model; None is the posterior's.
        batches: Mappings of model keyword arguments that cover all data once; None
            leaves out the groups that depend on data.
        num_samples: Draws; None is every particle once, all of a Markov chain, or 100.
        weights: ``"delta"`` or ``"raw"``.
        method: ``"linearized"`` or ``"sample"``; None is ``"linearized"`` where the
            posterior is Laplace's over nothing but weights, and the likelihood
            Categorical, Bernoulli or Normal, one outcome a datum.
        prior_predictive: Draw outcomes under the prior, too: as many forward passes
            over the data as there are draws.
        obs_site: The likelihood's site; None is the posterior's, else the model's
            only one.
        labels: The model's argument with that site's outcomes.
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
    """
    groups = _groups(
        posterior, model, batches, num_samples, weights, method, obs_site, labels
    )
    num_draws = groups.chains.num_draws
    size = num_draws if chunk_size is None else chunk_size
    if size < 1:
        raise ValueError(f"chunk_size must be at least 1, found {chunk_size}.")
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
    labels: str,
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
    if weights not in ("delta", "raw"):
        raise ValueError(f"weights must be 'delta' or 'raw', found {weights!r}.")
    if method not in ("linearized", "sample", None):
        raise ValueError(
            f"method must be 'linearized', 'sample' or None, found {method!r}."
        )
    check_no_dropout(posterior, "to_datatree")
    first, batches = _first_batch(batches)
    if isinstance(posterior, LORA_POSTERIORS):
        model = posterior.model if model is None else model
        obs_site = posterior.obs_site if obs_site is None else obs_site
    elif model is None or first is None:
        raise ValueError(
            f"{type(posterior).__name__} doesn't know the model. Pass model= and "
            "batches= to to_datatree."
        )
    if first is not None and model is None:
        raise ValueError(
            "This posterior was loaded without its model. Pass model= to "
            "to_datatree, or leave batches out."
        )
    chains = chains_of(posterior, num_samples, first or {})
    linearized = False
    if model is not None and first is not None and is_linearizable(posterior):
        part = posterior
        if isinstance(posterior, MixturePosterior):
            part = posterior.components[0]
        one = {site: value[None] for site, value in part.mode().items()}
        at = model_at_draws(model, one, first, obs_site)
        obs_site = at.obs_site
        (trace,) = at.traces(first)
        linearized = has_linear_predictor(trace.nodes[obs_site]["fn"])
    if method == "linearized" and first is not None and not linearized:
        raise ValueError(
            "method='linearized' needs a Laplace posterior over nothing but weights, "
            "or a mixture of them, and a Categorical, Bernoulli or Normal likelihood "
            f"with one outcome a datum; the posterior is {type(posterior).__name__}. "
            "Use method='sample'."
        )
    return DrawGroups(
        posterior,
        chains,
        model,
        batches,
        first,
        weights == "raw",
        linearized and method != "sample",
        obs_site,
        labels,
    )


def _first_batch(
    batches: Iterable[Batch] | None,
) -> tuple[Batch | None, Iterable[Batch] | None]:
    if batches is None:
        return None, None
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise ValueError("to_datatree got no batches. Is the iterable used up already?")
    # An iterator can be read once only, so what it gave is put back.
    return first, chain([first], iterator) if iterator is batches else batches
