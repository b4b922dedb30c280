r"""One pass over the data under many draws: what each says of each datum.

The log joint of draw s is :math:`\log p(w_s) + c \sum_n \log p(y_n | x_n, w_s)`, with c
the user's own ``poutine.scale``. ``log_likelihood`` (S, N) has the terms of the sum
without c, as leave-one-out needs them, ``total_log_likelihood`` (S,) the sum with it.
The scale of subsampling, N / B, is left out of both: batches cover all data.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.nn.functional import pad

from pyro_lora.curvature.prior_moments import model_scales
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood.batch import Batch, checked_batches, explaining
from pyro_lora.likelihood.data_plate import data_plate
from pyro_lora.likelihood.model_trace import is_missing_outcome, lifted_networks
from pyro_lora.likelihood.outcomes import data_that_count, values_to_score


@dataclass(frozen=True, eq=False)
class ObservedData:
    """N outcomes, and how likely they are under S draws.

    Attributes:
        log_likelihood: (S, N), float64, nats.
        total_log_likelihood: (S,), float64, nats, the user's own ``poutine.scale``
            included.
        values: The outcomes, (N, ...).
        counts: Which of them count, (N,).
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
        drawn: Outcomes, from the likelihood, (S, N, ...).
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

    def traces(self, batch: Batch) -> Iterator[Any]:
        """Traces of some of the draws, whose likelihood has batch shape (S', B)."""
        ...


@torch.no_grad()
def pass_over_data(
    at_draws: AtDraws, batches: Iterable[Batch], labels: Collection[str]
) -> DataPass:
    """Run the model at all draws over all batches.

    Args:
        at_draws: The model at S draws.
        batches: At least one mapping of model keyword arguments.
        labels: The arguments that aren't inputs: the outcomes.

    Returns:
        Everything on the device of the likelihood.

    Raises:
        ValueError: If some batches have labels and others none.
    """
    observed: list[ObservedData] = []
    drawn: list[Tensor] = []
    inputs: list[dict[str, Tensor]] = []
    latent: list[dict[str, Tensor]] = []
    networks: Sequence[LiftedNetwork] = ()
    prior_scales: dict[str, float | Tensor] = {}
    alone = True
    index = num_data = 0
    for index, batch in enumerate(checked_batches(batches), 1):
        of_batch, log_likelihood, total = [], [], []
        for trace in at_draws.traces(batch):
            site = trace.nodes[at_draws.obs_site]
            of_batch.append(site["fn"].sample())
            if site["is_observed"]:
                with explaining(batch, nodes=trace.nodes):
                    log_likelihood.append(datum_log_probs(site))
                total.append((log_likelihood[-1] * data_plate(site).scale).sum(-1))
            if index == 1:  # the weights' own density doesn't depend on the batch
                networks = lifted_networks(trace)
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
    return DataPass(
        at_draws.obs_site,
        networks,
        _of_all(observed) if observed else None,
        why_no_log_joint(site, num_data, alone),
        {
            name: torch.cat([of_draws[name] for of_draws in latent])
            for name in latent[0]
        },
        prior_scales,
        torch.cat(drawn, 1),
        {
            name: _padded_rows([of_batch[name] for of_batch in inputs])
            for name in inputs[0]
            if all(name in of_batch for of_batch in inputs)
        },
    )


def _of_all(batches: Sequence[ObservedData]) -> ObservedData:
    return ObservedData(
        torch.cat([x.log_likelihood for x in batches], 1),
        torch.stack([x.total_log_likelihood for x in batches]).sum(0),
        torch.cat([x.values for x in batches]),
        torch.cat([x.counts for x in batches]),
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
    value = site["value"]
    ndim = 1 + len(site["fn"].event_shape)
    while value.ndim > ndim:
        value = value[0]
    return value


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
