r"""One pass over the data under many draws: what each says of each datum.

The log joint of draw s is :math:`\log p(w_s) + c \sum_n \log p(y_n | x_n, w_s)`, with c
the user's own ``poutine.scale``. ``log_likelihood`` (S, N) has the terms of the sum
without c, as leave-one-out needs them, ``total_log_likelihood`` (S,) the sum with it.
The scale of subsampling, N / B, is left out of both: batches cover all data.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.nn.functional import pad

from pyro_lora.curvature.prior_moments import model_scales
from pyro_lora.ground.ranks import ALONE, Ranks
from pyro_lora.lifting.cached_trunk import trunk_once
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood.batch import Batch, checked_batches, explaining
from pyro_lora.likelihood.data_plate import data_plate
from pyro_lora.likelihood.model_trace import (
    IGNORED,
    is_missing_outcome,
)
from pyro_lora.likelihood.outcomes import (
    data_that_count,
    outcomes_that_count,
    single_outcomes,
    values_to_score,
)


@dataclass(frozen=True, eq=False)
class ObservedData:
    """N outcomes, and how likely they are under S draws.

    Attributes:
        log_likelihood: (S, N), float64, nats.
        total_log_likelihood: (S,), float64, nats, the user's own ``poutine.scale``
            included.
        values: The outcomes, (N, ...); where a datum has several, those that don't
            count are -100, real ones NaN.
        counts: Which data count, (N,).
    """

    log_likelihood: Tensor
    total_log_likelihood: Tensor
    values: Tensor
    counts: Tensor


@dataclass(frozen=True, eq=False)
class DataPass:
    """What the model said about N data under S draws.

    Attributes:
        obs_site: The likelihood's site.
        networks: The lifted networks in the model.
        observed: The outcomes; None without labels.
        no_log_joint: Why their likelihood is no part of a log joint; None where it is.
        log_prior: Site -> (S,), float64, nats, of latent sites outside the network.
        prior_scales: Site -> scale of its log density, where the model has another
            than the lifted network's prior.
        drawn: Outcomes, from the likelihood, (S, N, ...); where a text has fewer of
            them than others, -100 or NaN in the place of the rest.
        inputs: The integer inputs, name -> (N, ...), padded with zeros on the right.
    """

    obs_site: str
    networks: Sequence[LiftedNetwork]
    observed: ObservedData | None
    no_log_joint: str | None
    log_prior: dict[str, Tensor]
    prior_scales: dict[str, float | Tensor]
    drawn: Tensor
    inputs: dict[str, Tensor]


class AtDraws(Protocol):
    """A model at S draws of its latent sites."""

    @property
    def obs_site(self) -> str:
        """The likelihood's site."""
        ...

    @property
    def networks(self) -> Sequence[LiftedNetwork]:
        """The lifted networks in the model."""
        ...

    @property
    def ranks(self) -> Ranks:
        """Who shares the draws."""
        ...

    def traces(self, batch: Batch) -> Iterator[Any]:
        """Traces of some of the draws, whose likelihood has batch shape (S', B)."""
        ...


@torch.no_grad()
def pass_over_data(
    at_draws: AtDraws,
    batches: Iterable[Batch],
    labels: Collection[str],
    ranks: Ranks = ALONE,
) -> DataPass:
    """Run the model at all draws over all batches.

    Args:
        at_draws: The model at S draws.
        batches: At least one mapping of model keyword arguments.
        labels: The arguments that aren't inputs: the outcomes.
        ranks: Who shares the data.

    Returns:
        Everything on the device of the likelihood.

    Raises:
        ValueError: If some batches have labels and others none.
    """
    observed: list[ObservedData] = []
    drawn: list[Tensor] = []
    inputs: list[dict[str, Tensor]] = []
    latent: list[dict[str, Tensor]] = []
    networks = at_draws.networks
    prior_scales: dict[str, float | Tensor] = {}
    alone = True
    index = num_data = 0
    of_draws = at_draws.ranks
    in_step = ranks.in_step(checked_batches(batches))
    for index, batch in enumerate(of_draws.on_same(ranks.drawing(in_step)), 1):
        of_batch, log_likelihood, total = [], [], []
        with trunk_once(networks):
            for trace in at_draws.traces(batch):
                site = trace.nodes[at_draws.obs_site]
                of_batch.append(site["fn"].sample())
                if site["is_observed"]:
                    with explaining(batch, nodes=trace.nodes):
                        log_likelihood.append(datum_log_probs(site))
                    total.append((log_likelihood[-1] * data_plate(site).scale).sum(-1))
                if index == 1:  # the weights' own density doesn't depend on the batch
                    latent.append(latent_log_probs(trace, networks))
                    prior_scales = model_scales(trace, networks)
                    alone = alone and observes_only(trace, at_draws.obs_site)
        num_data += data_plate(site).size
        drawn.append(torch.cat(of_batch))
        if site["is_observed"]:
            observed.append(
                ObservedData(
                    torch.cat(log_likelihood),
                    torch.cat(total),
                    _one_draw(site),
                    data_that_count(site),
                )
            )
        if len(observed) not in (0, index):
            raise ValueError(
                f"Batch {index - 1} and the ones before it differ in whether they "
                f"have labels (site {at_draws.obs_site!r} observed). Give all batches "
                "labels, or none."
            )
        inputs.append(_integer_inputs(batch, drawn[-1].shape[1], labels))
    own = _DataShare(
        _of_all(observed) if observed else None,
        _joined(drawn, 1),
        _inputs_of_all(inputs),
    )
    shares = ranks.collected(own)
    seen = [x.observed for x in shares if x.observed is not None]
    if len(seen) not in (0, len(shares)):
        raise ValueError(
            f"Some ranks' batches have labels (site {at_draws.obs_site!r} observed), "
            "and others' none. Give all batches labels, or none."
        )
    whole = None
    if seen:
        whole = _of_all(seen)
        whole = replace(
            whole,
            log_likelihood=of_draws.gathered(whole.log_likelihood),
            total_log_likelihood=of_draws.gathered(whole.total_log_likelihood),
        )
    return DataPass(
        at_draws.obs_site,
        networks,
        whole,
        why_no_log_joint(site, ranks.total(num_data), alone),
        {
            name: of_draws.gathered(torch.cat([chunk[name] for chunk in latent]))
            for name in latent[0]
        },
        prior_scales,
        of_draws.gathered(_joined([x.drawn for x in shares], 1)),
        _inputs_of_all([x.inputs for x in shares]),
    )


@dataclass(frozen=True, eq=False)
class _DataShare:
    """What a rank found out of its own data."""

    observed: ObservedData | None
    drawn: Tensor
    inputs: dict[str, Tensor]


def _inputs_of_all(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {
        name: _padded_rows([of_batch[name] for of_batch in batches])
        for name in batches[0]
        if all(name in of_batch for of_batch in batches)
    }


def _of_all(batches: Sequence[ObservedData]) -> ObservedData:
    return ObservedData(
        _joined([x.log_likelihood for x in batches], 1),
        torch.stack([x.total_log_likelihood for x in batches]).sum(0),
        _joined([x.values for x in batches]),
        _joined([x.counts for x in batches]),
    )


def datum_log_probs(site: Mapping[str, Any]) -> Tensor:
    """Log density of each datum, (S', B), float64; 0 of one that doesn't count.

    Args:
        site: The likelihood's site in a trace.
    """
    log_prob = site["fn"].log_prob(values_to_score(site)).double()
    if site["mask"] is None:
        return log_prob
    # A product with the mask would keep NaN.
    mask = torch.as_tensor(site["mask"], device=log_prob.device)
    return torch.where(mask, log_prob, 0.0)


def _one_draw(site: Mapping[str, Any]) -> Tensor:
    """The outcomes given, (B, ...), without dims that the draws added."""
    value, counts = site["value"], outcomes_that_count(site)
    ndim = 1 + len(site["fn"].event_shape)
    while value.ndim > ndim:
        value = value[0]
    if single_outcomes(site["fn"]).event_dims != 1 or counts.ndim < value.ndim:
        return value
    while counts.ndim > value.ndim:
        counts = counts[0]
    return value.masked_fill(~counts, _no_outcome(value))


def _no_outcome(values: Tensor) -> float:
    """What marks a place without an outcome."""
    return torch.nan if values.is_floating_point() else IGNORED


def _joined(batches: Sequence[Tensor], dim: int = 0) -> Tensor:
    """The data of all batches, along their dim; shorter texts are filled up."""
    if len(batches) == 1:
        return batches[0]  # no copy
    rest = [x.shape[dim + 1 :] for x in batches]
    longest = [max(sizes) for sizes in zip(*rest, strict=True)]
    filled = []
    for x, shape in zip(batches, rest, strict=True):
        ends = [m - n for m, n in zip(longest, shape, strict=True)]
        # pad wants (left, right) of the last dim first
        sides = [side for end in reversed(ends) for side in (0, end)]
        filled.append(pad(x, sides, value=_no_outcome(x)) if any(sides) else x)
    return torch.cat(filled, dim)


def latent_log_probs(
    trace: Any, networks: Sequence[LiftedNetwork]
) -> dict[str, Tensor]:
    """Log density of each latent site outside of the networks, (S',), nats.

    Args:
        trace: Of the model at S' draws.
        networks: The lifted networks in it.
    """
    lifted = {name for lora in networks for name in lora.sites}
    result = {}
    for name, site in trace.nodes.items():
        if (
            site["type"] == "sample"
            and not site["is_observed"]
            and not site_is_subsample(site)
            and "lora" not in site["infer"]
            and name not in lifted
            and not is_missing_outcome(trace, name)  # its density is no prior
        ):
            log_prob = site["fn"].log_prob(site["value"]).double()
            counted = scale_and_mask(log_prob, site["scale"], site["mask"])
            result[name] = counted.flatten(1).sum(1)
    return result


def why_no_log_joint(site: dict[str, Any], num_data: int, alone: bool) -> str | None:
    """Why batches have no log joint of all data, if so.

    Args:
        site: The likelihood's, in a batch's trace.
        num_data: How many data the batches hold.
        alone: Whether the model observes no other.
    """
    if not site["is_observed"]:
        return "needs labels, and the batches have none"
    # A part of the data, or the same twice, has another likelihood than the model's.
    full_size = data_plate(site).full_size
    if num_data != full_size:
        return (
            f"needs all training data: the batches hold {num_data}, the model's plate "
            f"{full_size}"
        )
    return None if alone else "the model observes more than one site"


def observes_only(trace: Any, obs_site: str) -> bool:
    """Whether nothing but the likelihood's site is observed.

    Args:
        trace: Of the model.
        obs_site: The likelihood's site.
    """
    return all(
        name == obs_site or site["infer"].get("_deterministic")
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and site["is_observed"]
    )


def _integer_inputs(
    batch: Batch, batch_size: int, labels: Collection[str]
) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in batch.items()
        if name not in labels
        and isinstance(value, Tensor)
        and not (value.is_floating_point() or value.is_complex())
        and value.ndim in (1, 2)
        and value.shape[0] == batch_size
    }


def _padded_rows(batches: Sequence[Tensor]) -> Tensor:
    if batches[0].ndim == 1:
        return torch.cat(list(batches))
    longest = max(rows.shape[1] for rows in batches)
    return torch.cat([pad(rows, (0, longest - rows.shape[1])) for rows in batches])
