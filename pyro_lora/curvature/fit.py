"""One pass over the data: Fisher information, gradient and log joint at the mode."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor
from tqdm.auto import tqdm

from pyro_lora.curvature.capture import (
    Recording,
    capture_layers,
    check_recorded,
    largest_gradients,
    recording,
    score_gradient,
    tokens_that_count,
    without_padding,
)
from pyro_lora.curvature.data_sums import (
    DataSums,
    PassCheckpoint,
    batch_digest,
    fit_digest,
)
from pyro_lora.curvature.fisher import (
    FisherTerms,
    TermsFunction,
    likelihood_terms,
    several_plates,
    wrong_plate,
)
from pyro_lora.curvature.prior_moments import model_scales, prior_at_mode
from pyro_lora.curvature.structures import BatchStructure, Captures, Factors, Structure
from pyro_lora.curvature.weight_gaussian import WeightGaussian
from pyro_lora.ground.interrupts import eagerly
from pyro_lora.ground.weights import Weights
from pyro_lora.lifting.fingerprint import fingerprint
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood.batch import (
    NO_BATCHES,
    READ_ONCE,
    Batch,
    check_batches,
    checked_batches,
    explaining,
)
from pyro_lora.likelihood.data_plate import data_plate
from pyro_lora.likelihood.model_trace import (
    Model,
    is_missing_outcome,
    naming_batch,
    observed_sites,
    trace_batch,
)


def batch_factors(
    found: FisherTerms,
    log_likelihood: Tensor,
    leaves: Mapping[str, Tensor],
    record: Recording,
    structure: BatchStructure,
    max_bytes: float,
) -> tuple[dict[str, list[Tensor]], Iterator[Factors]]:
    """Gradient of the log likelihood, and factors that are yet to be computed.

    Args:
        found: Fisher terms (M, B).
        log_likelihood: Of the batch, nats.
        leaves: Site -> the weights.
        record: Of the forward pass.
        structure: What the pass sums.
        max_bytes: Of the gradients that are kept at a time. Beyond, they come in
            chunks of terms, then of layers, and twice: first to see which tokens count.

    Returns:
        Site -> (O, I) for each layer; and factors by place, some layers at a time.
    """
    terms, alpha = found.terms, found.coordinates
    score = _autograd_score(log_likelihood, leaves) if alpha is None else None
    record.find_layouts(terms, max_bytes)
    groups, step = _chunks(record, terms, structure.joint, max_bytes)
    starts = range(0, len(terms), step)
    whole = len(groups) * len(starts) == 1

    def captured(places: list[int], start: int, keep_graph: bool) -> Captures:
        chunk = terms[start : start + step]
        return capture_layers(record, chunk, places, keep_graph)

    sizes: dict[int, Tensor] = {}
    gradients: dict[int, Tensor] = {}
    for places in groups:
        for start in starts:
            captures = captured(places, start, keep_graph=not whole)
            for i, c in captures.items():
                size = largest_gradients(c)
                sizes[i] = size.maximum(sizes[i]) if start else size
                if alpha is not None:
                    g = score_gradient(c, alpha[start : start + step])
                    gradients[i] = gradients[i] + g if start else g
    counts = tokens_that_count(sizes)
    if score is None:
        score = {site: [] for site in leaves}
        for i, (_, p) in enumerate(record.layers):
            score[p.site].append(gradients[i])

    def masked(capture: Callable[[], Captures]) -> Captures:
        return {i: without_padding(c, counts[i]) for i, c in capture().items()}

    if whole:
        once = [captures]  # popped, so that nothing here holds them any longer
        return score, structure.batch_factors([partial(masked, once.pop)], counts)
    del captures

    def in_chunks() -> Iterator[Factors]:
        for places in groups:
            more = places is not groups[-1]
            chunks = [
                partial(masked, partial(captured, places, s, more or s != starts[-1]))
                for s in starts
            ]
            yield from structure.batch_factors(chunks, counts)

    return score, in_chunks()


def _chunks(
    record: Recording, terms: Tensor, joint: bool, max_bytes: float
) -> tuple[list[list[int]], int]:
    """Places of the layers that go together, and how many terms do."""
    # Layers with the same inputs share a factor, so they stay together.
    families: dict[Any, list[int]] = {}
    sizes: dict[Any, int] = {}  # of the gradients of one term, in bytes
    seen: set[Any] = set()
    for i, (slot, _) in enumerate(record.layers):
        calls = record.calls.get(slot, [])
        key = tuple(call.input.data_ptr() for call in calls)
        families.setdefault(key, []).append(i)
        own = 0 if slot in seen else sum(call.output.nbytes for call in calls)
        sizes[key] = sizes.get(key, 0) + own
        seen.add(slot)  # a weight and a bias have the same gradients
    num_terms, total = len(terms), sum(sizes.values())
    step = num_terms
    if num_terms * total > max_bytes:
        step = max(1, int(max_bytes // total))
    if joint:
        return [list(range(len(record.layers)))], step
    groups: list[list[int]] = []
    size = 0
    for key, places in families.items():
        if groups and step * (size + sizes[key]) <= max_bytes:
            groups[-1] += places
            size += sizes[key]
        else:
            groups.append(list(places))
            size = sizes[key]
    return groups, step


def _autograd_score(
    log_likelihood: Tensor, leaves: Mapping[str, Tensor]
) -> dict[str, list[Tensor]]:
    with eagerly():
        found = torch.autograd.grad(
            log_likelihood, list(leaves.values()), retain_graph=True, allow_unused=True
        )
    return {
        site: list(torch.zeros_like(leaf) if g is None else g)
        for (site, leaf), g in zip(leaves.items(), found, strict=True)
    }


@dataclass(frozen=True, eq=False)
class FisherFit:
    """What one pass over the data found at the mode.

    Attributes:
        gaussian: Mode, Fisher information and prior precision.
        prior_mean: Site -> mean of the prior.
        log_likelihood: Of all data, nats, float64.
        log_prior: Of the lifted sites, nats, float64.
        gradient: Site -> gradient of the log joint of all data, nats.
        obs_site: The likelihood's name, None where there are several.
        prior_scales: Site -> scale of its log density, where the model says it, as
            :func:`~pyro_lora.curvature.prior_moments.model_scales`.
        arguments: The arguments that the batches gave to the model.
    """

    gaussian: WeightGaussian
    prior_mean: Weights
    log_likelihood: Tensor
    log_prior: Tensor
    gradient: Weights
    obs_site: str | None
    prior_scales: Mapping[str, float | Tensor]
    arguments: frozenset[str]


def fit_fisher(
    model: Model,
    mode: Mapping[str, Tensor],
    networks: Sequence[LiftedNetwork],
    batches: Iterable[Batch],
    *,
    structure: Structure,
    fisher_terms: TermsFunction,
    obs_site: str | Sequence[str] | None = None,
    latents: Mapping[str, Tensor] | None = None,
    progress_bar: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    max_memory_gb: float | None = None,
) -> FisherFit:
    """Fisher information of the obs site in all lifted sites, for the full data.

    One forward pass and one backward pass for each Fisher term and batch, in each of
    the structure's passes.

    Args:
        model: A Pyro model.
        mode: Lifted site -> value, each of the site's shape.
        networks: The lifted networks in the model.
        batches: Mappings of model keyword arguments that cover all data once.
        structure: One of ``structures``, or your own.
        fisher_terms: A function of the obs site's distribution and value.
        obs_site: The likelihood's site, or several, whose Fisher information adds up;
            None is the only observed one.
        latents: Values of the latent sites that aren't in ``mode``.
        progress_bar: Show one for each pass.
        checkpoint: A folder to write the sums into, and to resume from; None is none.
        max_memory_gb: Of gradients at a time, in GB; None is no limit.

    Returns:
        The Fisher information with the prior's precision, and the mode's gradient.

    Raises:
        ValueError: If labels are missing, a batch gives NaN, a latent site isn't
            lifted, the batches don't hold exactly the plate's number of data, or
            a structure of several passes is given an iterator, which can be read once
            only, or the checkpoint is of another fit or other batches.
    """
    check_batches(batches)
    passes = structure.num_passes
    if passes > 1 and iter(batches) is batches:
        why = f"{structure} takes {passes} passes over the data"
        raise ValueError(READ_ONCE.format(why))
    sites = [s for lora in networks for s in lora.sites if s in mode]
    loc = {s: mode[s].detach() for s in sites}
    leaves = {site: value.clone().requires_grad_() for site, value in loc.items()}

    checkpoints: list[PassCheckpoint] = []

    names = chain(["Fisher"], (f"Fisher-{n}" for n in count(2)))

    def data_pass(summed: BatchStructure) -> tuple[DataSums, Any]:
        name = next(names)
        if checkpoint is not None:
            fit = fit_digest(
                {**loc, **(latents or {})},
                [repr(structure), fisher_terms, obs_site, name, " ".join(sites)],
                [fingerprint(lora) for lora in networks],
                model,
            )
            folder = Path(checkpoint) / name.lower()
            device = next(iter(loc.values())).device
            shapes = {site: tuple(x.shape) for site, x in loc.items()}
            checkpoints.append(PassCheckpoint(folder, fit, device, shapes))
        return _data_pass(
            model,
            leaves,
            networks,
            tqdm(batches, desc=name, disable=not progress_bar),
            summed=summed,
            fisher_terms=fisher_terms,
            obs_site=obs_site,
            latents=latents or {},
            max_bytes=math.inf if max_memory_gb is None else 1e9 * max_memory_gb,
            checkpoint=checkpoints[-1] if checkpoints else None,
        )

    def next_pass(summed: BatchStructure) -> Factors:
        return data_pass(summed)[0].factors

    sums, trace = data_pass(structure.first_pass)
    observed = observed_sites(trace, obs_site)
    prior = prior_at_mode(trace, leaves)
    gaussian = structure.gaussian(loc, prior.precision, sums.factors, next_pass)
    for written in checkpoints:
        written.delete()
    return FisherFit(
        gaussian.with_prior_precision(prior.precision),
        prior.mean,
        sums.log_likelihood,
        prior.log_prob,
        {
            s: torch.stack(sums.score[s]).reshape(x.shape).to(x) + prior.gradient[s]
            for s, x in loc.items()
        },
        observed[0]["name"] if len(observed) == 1 else None,
        model_scales(trace, networks),
        frozenset(
            k for k, x in trace.nodes["_INPUT"]["kwargs"].items() if x is not None
        ),
    )


def _data_pass(
    model: Model,
    leaves: Weights,
    networks: Sequence[LiftedNetwork],
    batches: Iterable[Batch],
    *,
    summed: BatchStructure,
    fisher_terms: TermsFunction,
    obs_site: str | Sequence[str] | None,
    latents: Mapping[str, Tensor],
    max_bytes: float,
    checkpoint: PassCheckpoint | None,
) -> tuple[DataSums, Any]:
    """The sums over all data, and the last batch's trace.

    Raises:
        ValueError: As :func:`fit_fisher` does.
    """
    trace: Any = None
    sums: DataSums | None = None
    before = None if checkpoint is None else checkpoint.read()
    num_batches, digest = 0, ""
    for index, batch in enumerate(checked_batches(batches)):
        num_batches = index + 1
        if checkpoint is not None:
            digest = batch_digest(digest, batch)
        if before is not None and checkpoint is not None:
            if num_batches < before.num_batches:
                continue
            if num_batches == before.num_batches:
                before.check(num_batches, digest, checkpoint.folder)
                # For the prior, if no batch is left.
                trace = trace_batch(model, {**latents, **leaves}, batch, index)
                sums = before.sums
                before.restore_random_state()
                continue
        with torch.enable_grad():
            with recording(networks, leaves) as record:
                trace = trace_batch(model, {**latents, **leaves}, batch, index)
            sites = observed_sites(trace, obs_site)
            check_latent_sites(trace, latents)
            with (
                naming_batch(index),
                explaining(batch, nodes=trace.nodes),
            ):
                terms, log_p = likelihood_terms(sites, fisher_terms)
            name = " and ".join(site["name"] for site in sites)
            check_recorded(record, trace, terms.terms, name)
            for site in sites:
                if several_plates(site) and record.mixes_data(terms.terms):
                    raise ValueError(wrong_plate(site))
            score, factors = batch_factors(
                terms, log_p, leaves, record, summed, max_bytes
            )
        del record  # or its tensors would live through the next forward pass
        _check_finite(log_p, score, index, name)
        found = DataSums({}, score, log_p.detach(), terms.terms.shape[1])
        if before is not None and checkpoint is not None:
            before.check_score(score, checkpoint.folder)
        sums = found if sums is None else sums.plus_rest(found)
        for layers in factors:
            if before is not None and checkpoint is not None:
                before.check_factors(layers, checkpoint.folder)
            sums.add_factors(layers)
        del factors, layers
        if checkpoint is not None:
            checkpoint.write(sums, num_batches, digest)
    if before is not None and checkpoint is not None and sums is None:
        before.check(num_batches, digest, checkpoint.folder)
    if sums is None:
        raise ValueError(NO_BATCHES)
    sites = observed_sites(trace, obs_site)
    name = " and ".join(site["name"] for site in sites)
    read_from = None if before is None or checkpoint is None else checkpoint.folder
    _check_number(sums.num_data, data_plate(sites[0]).full_size, name, read_from)
    return sums, trace


def check_latent_sites(trace: Any, known: Container[str] = ()) -> None:
    """Check that no latent site is left over, and there is no factor.

    Args:
        trace: A trace of the model.
        known: Latent sites that may be there besides the lifted ones.

    Raises:
        ValueError: If there are others.
    """
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and site_is_factor(site):
            raise ValueError(
                f"Site {name!r} is a factor, which AutoLaplace doesn't see. Leave it "
                "out (a prior of spectral or orthogonal has one), or use SVGD."
            )
        latent = site["type"] == "sample" and not site["is_observed"]
        if not latent or name in known or is_missing_outcome(trace, name):
            continue  # a missing outcome says nothing of the weights
        if "lora" not in site["infer"] and not site_is_subsample(site):
            raise ValueError(
                f"Latent site {name!r} isn't part of a lifted network and appears in "
                "some batches only. Fix it to a value by pyro.poutine.condition, or "
                "make it a constant of the model."
            )


def _check_finite(
    log_likelihood: Tensor, score: Mapping[str, list[Tensor]], index: int, site: str
) -> None:
    remedy = "Check that batch's inputs and labels, and the adapter."
    if not torch.isfinite(log_likelihood):
        raise ValueError(
            f"Batch {index}: the log likelihood of site {site!r} is NaN or infinite. "
            f"{remedy}"
        )
    for name, layers in score.items():
        if not torch.stack(layers).isfinite().all():
            raise ValueError(
                f"Batch {index}: the gradient of site {name!r} has NaN or infinite "
                f"values. {remedy}"
            )


def _check_number(
    num_seen: int, full_size: int, site: str, read_from: Path | None
) -> None:
    if num_seen != full_size:
        where = "" if read_from is None else f", those summed in {read_from} included"
        raise ValueError(
            f"The batches hold {num_seen} data{where}, but the plate of site "
            f"{site!r} says {full_size}. Give batches that cover every datum "
            "exactly once (drop_last=False, no repeats), or correct num_data in the "
            "model's pyro.plate."
        )
