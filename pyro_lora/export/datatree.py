"""Posterior -> ``xarray.DataTree`` with ArviZ's groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import torch

from pyro_lora.export.data_pass import DataPass, pass_over_data
from pyro_lora.export.prior_density import log_prior_by_site, prior_draws, prior_of
from pyro_lora.export.weight_variables import (
    Variables,
    check_raw_size,
    delta_variables,
    raw_variables,
)
from pyro_lora.infer.laplace_posterior import LaplacePosterior
from pyro_lora.infer.mixture_posterior import MixturePosterior
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.lifting.model_trace import Batch, Model
from pyro_lora.predict.draws import (
    LORA_POSTERIORS,
    Guide,
    Weights,
    draw_weights,
    model_at_draws,
)

if TYPE_CHECKING:
    from xarray import DataTree

DEFAULT_NUM_SAMPLES = 100  # PSIS needs 25; quantiles want a few more


def to_datatree(
    posterior: Guide,
    *,
    model: Model | None = None,
    batches: Iterable[Batch] | None = None,
    num_samples: int | None = None,
    weights: Literal["delta", "raw"] = "delta",
    obs_site: str | None = None,
) -> DataTree:
    r"""Draws of a posterior as ArviZ's data structure, dims chain (of 1) and draw.

    Groups, each if there is what it needs:

    - ``posterior`` and ``prior``: what the data can identify, which is for each
      adapted layer the singular values, the Frobenius norm and the stable rank of
      :math:`\Delta W = s B A`, and the head's weights; or every site as it is.
      Attributes of ``posterior``: its kind, log evidence (nats), prior precisions
      (averaged over each layer).
    - ``log_prior``: log density of each site, nats, under the posterior's own prior,
      else the lifted network's.
    - ``sample_stats``: ``lp``, the log joint of all data, where the likelihood is all
      that the model observes; ``log_q``, the posterior's log density. Both in nats.
    - ``log_likelihood``: one value a datum, nats, float64.
    - ``posterior_predictive`` and ``observed_data``: outcomes, drawn and given.
    - ``constant_data``: the integer inputs (token ids, masks), padded with zeros on
      the right to one length.

    Args:
        posterior: One of ours; or any Pyro guide, which needs model and batches.
        model: The Pyro model; None is the posterior's.
        batches: Mappings of model keyword arguments that cover all data once; None
            leaves out the groups that depend on data.
        num_samples: Draws; None is every particle once, or 100.
        weights: ``"delta"`` or ``"raw"``.
        obs_site: The likelihood's site; None is the posterior's, else the model's
            only one.

    Returns:
        The tree. The functions of ``arviz_stats`` take it; ``.to_netcdf(path)`` and
        ``.to_zarr(path)`` write it.

    Raises:
        ImportError: If ArviZ isn't installed.
        ValueError: If the model is missing or doesn't fit the posterior, ``batches``
            is empty, only some batches have labels, or raw weights are too many.
    """
    try:  # an extra: the rest of pyro_lora runs without it
        from arviz_base import dict_to_dataset
        from xarray import DataTree
    except ImportError as error:
        raise ImportError(
            "to_datatree needs ArviZ. Install it by: pip install 'pyro-lora[arviz]'"
        ) from error
    if weights not in ("delta", "raw"):
        raise ValueError(f"weights must be 'delta' or 'raw', found {weights!r}.")
    variables = delta_variables if weights == "delta" else raw_variables
    first, stream = _first_batch(batches)
    loras: Sequence[LiftedNetwork]
    if isinstance(posterior, LORA_POSTERIORS):
        model = posterior.model if model is None else model
        obs_site = posterior.obs_site if obs_site is None else obs_site
        loras = posterior.loras
    elif model is None or first is None:
        raise ValueError(
            f"{type(posterior).__name__} is called with the model's arguments. Pass "
            "model= and batches= to to_datatree."
        )
    draws = draw_weights(posterior, num_samples, DEFAULT_NUM_SAMPLES, first or {})
    if weights == "raw":
        check_raw_size(draws)
    data = None
    if first is not None:
        if model is None:
            raise ValueError(
                "This posterior was loaded without its model. Pass model= to "
                "to_datatree, or leave batches out."
            )
        at_draws = model_at_draws(model, draws, first, obs_site)
        data = pass_over_data(at_draws, stream)
        loras = data.networks
    prior = prior_of(posterior)
    named = variables(loras, draws)
    prior_named = variables(loras, prior_draws(prior, loras, _num_draws(draws)))
    log_prior = log_prior_by_site(prior, loras, draws)
    if data is not None:
        log_prior = data.log_prior | log_prior
    groups = {
        "posterior": named,
        "prior": prior_named,
        "log_prior": _variables(log_prior),
        "sample_stats": _variables(_sample_stats(posterior, draws, data, log_prior)),
        **_data_groups(data),
    }
    attrs = {"posterior": _attributes(posterior)}
    datasets = {}
    # Group by group: a site's draws and its log prior have one name and other dims.
    for name, group in groups.items():
        per_draw = not name.endswith("_data")
        if group.values:
            datasets[name] = dict_to_dataset(
                {n: x[None] if per_draw else x for n, x in group.values.items()},
                dims=group.dims,
                coords=group.coords,
                sample_dims=["chain", "draw"] if per_draw else [],
                attrs={"inference_library": "pyro_lora", **attrs.get(name, {})},
            )
    return DataTree.from_dict(datasets)


def _first_batch(
    batches: Iterable[Batch] | None,
) -> tuple[Batch | None, Iterable[Batch]]:
    if batches is None:
        return None, ()
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise ValueError("to_datatree got no batches. Is the iterable used up already?")
    return first, chain([first], iterator)


def _num_draws(draws: Weights) -> int:
    return next(iter(draws.values())).shape[0]


def _sample_stats(
    posterior: Guide, draws: Weights, data: DataPass | None, log_prior: Weights
) -> Weights:
    stats = {}
    if data is not None and data.total_log_likelihood is not None:
        total = torch.stack(list(log_prior.values())).sum(0)
        stats["lp"] = total + data.total_log_likelihood
    if _has_density(posterior):
        stats["log_q"] = posterior.log_prob(draws).double()  # type: ignore[attr-defined]
    return stats


def _has_density(posterior: Guide) -> bool:
    if isinstance(posterior, MixturePosterior):
        return all(_has_density(component) for component in posterior.components)
    return isinstance(posterior, LaplacePosterior)


def _data_groups(data: DataPass | None) -> dict[str, Variables]:
    if data is None:
        return {}
    datum = {"datum": range(data.outcomes.shape[1])}
    found = {
        "log_likelihood": data.log_likelihood,
        "posterior_predictive": data.outcomes,
        "observed_data": data.observed,
    }
    groups = {
        group: _variables({data.obs_site: value}, datum)
        for group, value in found.items()
        if value is not None
    }
    groups["constant_data"] = Variables()
    for name, value in data.inputs.items():
        token = {"token": range(value.shape[1])} if value.ndim == 2 else {}
        groups["constant_data"].add(name, value, datum | token, name)
    return groups


def _variables(
    values: Weights, dims: Mapping[str, Sequence[int]] | None = None
) -> Variables:
    result = Variables()
    for name, value in values.items():
        result.add(name, value, dims or {}, name)
    return result


def _attributes(posterior: Guide) -> dict[str, Any]:
    found: dict[str, Any] = {"posterior": type(posterior).__name__}
    if isinstance(posterior, LaplacePosterior):
        found["log_evidence"] = float(posterior.log_evidence())
        for site, tau in posterior.prior_precision.items():
            rows = tau.expand(posterior.mode()[site].shape).flatten(1).mean(1).tolist()
            found[f"prior_precision.{site}"] = rows[0] if len(set(rows)) == 1 else rows
    if isinstance(posterior, MixturePosterior):
        found["component_weights"] = posterior.weights.tolist()
    return found
