r"""Passes over the data: Fisher information, gradient and log joint at the mode.

Of each batch they take terms c, (M, B), whose gradients are a root of the Fisher
information (``fisher``), record what each layer got and gave (``capture``) and add the
structure's factors:

.. math:: F = \sum_{b=1}^N \sum_m \nabla c_{mb} \nabla c_{mb}^T, \quad
          \nabla \log p(y) = \sum_{b=1}^N \sum_m \alpha_{mb} \nabla c_{mb}.

So one set of M backward passes gives both. Plates' subsampling scales are divided out:
the sums over all batches are those of the full data.
"""

from __future__ import annotations

import math
import os
from collections.abc import (
    Callable,
    Collection,
    Container,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor

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
    OBSERVED,
    DataSums,
    PassCheckpoint,
    PassLog,
    fit_digest,
    over_ranks,
)
from pyro_lora.curvature.fisher import (
    FisherTerms,
    Site,
    TermsFunction,
    exact_terms,
    likelihood_terms,
    linear_terms,
    several_plates,
    wrong_plate,
)
from pyro_lora.curvature.observations import Observed
from pyro_lora.curvature.prior_moments import model_scales, prior_at_mode
from pyro_lora.curvature.saved_observations import ObservedFactors
from pyro_lora.curvature.structures import (
    BatchStructure,
    Captures,
    Factors,
    Structure,
)
from pyro_lora.curvature.weight_gaussian import WeightGaussian
from pyro_lora.ground.autocast import outside_autocast
from pyro_lora.ground.interrupts import eagerly
from pyro_lora.ground.memory import address
from pyro_lora.ground.progress import progress
from pyro_lora.ground.ranks import ALONE, Ranks, is_first
from pyro_lora.ground.synchronisation import gathered, require, validated
from pyro_lora.ground.warning import warn
from pyro_lora.ground.weights import Weights
from pyro_lora.lifting.cached_trunk import end_trunk_once
from pyro_lora.lifting.fingerprint import fingerprint_of_whole
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.lifting.split_layers import who_run
from pyro_lora.likelihood import likelihoods
from pyro_lora.likelihood.batch import (
    NO_BATCHES,
    READ_ONCE,
    Batch,
    check_batches,
    checked_batches,
    explaining,
)
from pyro_lora.likelihood.data_plate import DataPlate, data_plate
from pyro_lora.likelihood.model_trace import (
    Model,
    is_missing_outcome,
    naming_batch,
    observed_names,
    observed_sites,
    trace_batch,
)
from pyro_lora.likelihood.outcomes import single_outcomes, values_to_score


def batch_factors(
    fisher: FisherTerms,
    log_likelihood: Tensor,
    leaves: Mapping[str, Tensor],
    record: Recording,
    structure: BatchStructure,
    max_bytes: float,
) -> tuple[dict[str, list[Tensor]], Iterator[Factors]]:
    """Gradient of the log likelihood, and factors that are yet to be computed.

    Args:
        fisher: Terms (M, B).
        log_likelihood: Of the batch, nats.
        leaves: Site -> the weights.
        record: Of the forward pass.
        structure: What the pass sums.
        max_bytes: Of the gradients that are kept at a time. Beyond, they come in
            chunks of terms, then of layers, and twice: first to see which tokens count.

    Returns:
        Site -> (O, I) for each layer; and factors by place, some layers at a time.
    """
    terms, alpha = fisher.terms, fisher.coordinates
    # Sampled labels don't span the score, which then takes a backward pass of its own.
    score = _autograd_score(log_likelihood, leaves) if alpha is None else None
    record.find_layouts(terms, max_bytes)
    groups, step = _chunks(record, terms, structure.joint, max_bytes)
    starts = range(0, len(terms), step)  # of the chunks of terms
    whole = len(groups) * len(starts) == 1

    def captured(places: list[int], start: int, keep_graph: bool) -> Captures:
        chunk = terms[start : start + step]
        return capture_layers(record, chunk, places, keep_graph)

    # Which tokens count is known when all layers and terms were seen.
    sizes: dict[int, Tensor] = {}
    inputs: dict[int, object] = {}
    gradients: dict[int, Tensor] = {}
    for places in groups:
        for start in starts:
            captures = captured(places, start, keep_graph=not whole)
            for i, c in captures.items():
                size = largest_gradients(c)  # (B, T)
                sizes[i] = size.maximum(sizes[i]) if start else size
                inputs[i] = _input_key(record, i)
                if alpha is not None:
                    g = score_gradient(c, alpha[start : start + step])  # (O, I)
                    gradients[i] = gradients[i] + g if start else g
    counts = tokens_that_count(sizes, inputs)
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
        key = _input_key(record, i)
        families.setdefault(key, []).append(i)
        own = 0 if slot in seen else sum(call.output.nbytes for call in calls)
        sizes[key] = sizes.get(key, 0) + own
        seen.add(slot)  # a weight and a bias have the same gradients
    # Who runs each pass together cuts alike, by the longest batch.
    sizes = dict(zip(sizes, record.ranks.largest([*sizes.values()]), strict=True))
    num_terms, total = len(terms), sum(sizes.values())
    step = num_terms
    if num_terms * total > max_bytes:
        step = max(1, int(max_bytes // total))  # else one term, of some layers
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


def _input_key(record: Recording, place: int) -> tuple[tuple[int, int], ...]:
    """Where a layer's inputs are: in one place of several, such as query and value."""
    slot, _ = record.layers[place]
    return tuple(address(call.input) for call in record.calls.get(slot, ()))


def _autograd_score(
    log_likelihood: Tensor, leaves: Mapping[str, Tensor]
) -> dict[str, list[Tensor]]:
    with eagerly():
        gradients = torch.autograd.grad(
            log_likelihood, list(leaves.values()), retain_graph=True, allow_unused=True
        )
    return {
        site: list(torch.zeros_like(leaf) if g is None else g)
        for (site, leaf), g in zip(leaves.items(), gradients, strict=True)
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
        obs_sites: The likelihood's site, or sites.
        prior_scales: Site -> scale of its log density, where the model says it, as
            :func:`~pyro_lora.curvature.prior_moments.model_scales`.
        arguments: The arguments that the last batch gave to the model.
        num_data: N, all data.
        has_exact_fisher: Whether the likelihood has an exact Fisher information, as one
            over a vocabulary hasn't.
    """

    gaussian: WeightGaussian
    prior_mean: Weights
    log_likelihood: Tensor
    log_prior: Tensor
    gradient: Weights
    obs_sites: tuple[str, ...]
    prior_scales: Mapping[str, float | Tensor]
    arguments: frozenset[str]
    num_data: int
    has_exact_fisher: bool


@dataclass(frozen=True, eq=False, kw_only=True)
class FisherPasses:
    """Passes over the data that sum a model's Fisher information at given weights.

    One forward pass and one backward pass for each Fisher term and batch, in each of
    the structure's passes.

    Attributes:
        model: A Pyro model.
        networks: The lifted networks in it.
        values: Latent site -> the mode, lifted or not.
        sites: The lifted sites whose Fisher information it is.
        structure: One of ``structures``, or your own.
        fisher_terms: A function of the obs site's distribution and value.
        obs_site: The likelihood's site, or several, whose Fisher information adds up;
            None is the only observed one.
        progress_bar: Show one for each pass; None: on a terminal or in a notebook.
        checkpoint: A folder to write the sums into, and to resume from; None is none.
        max_memory_gb: Of gradients at a time, in GB; None is no limit.
        ranks: Who shares the data.
    """

    model: Model
    networks: Sequence[LiftedNetwork]
    values: Weights
    sites: Collection[str]
    structure: Structure
    fisher_terms: TermsFunction
    obs_site: str | Sequence[str] | None = None
    progress_bar: bool | None = None
    checkpoint: str | os.PathLike[str] | None = None
    max_memory_gb: float | None = None
    ranks: Ranks = ALONE

    @property
    def mode(self) -> Weights:
        """Of the sites whose Fisher information it is, in the networks' order."""
        lifted = [site for lora in self.networks for site in lora.sites]
        return {s: self.values[s].detach() for s in lifted if s in self.sites}

    @property
    def held(self) -> Weights:
        """The other sites, which are held at their values."""
        return {s: x for s, x in self.values.items() if s not in self.sites}

    def fit(self, batches: Iterable[Batch]) -> FisherFit:
        """The Fisher information with the prior's precision, and the mode's gradient.

        Args:
            batches: Mappings of model keyword arguments that cover all data once.

        Raises:
            ValueError: If labels are missing, a batch gives NaN, a latent site isn't
                lifted, the batches don't hold exactly the plate's number of data, or
                a structure of several passes is given an iterator, which can be read
                once only, or the checkpoint is of another fit or other batches.

        Warns:
            UserWarning: If the prior has correlations, which only its precision's
                diagonal stands for, or the model observes other sites, too.
        """
        check_batches(batches)
        num_passes = self.structure.num_passes
        if num_passes > 1 and iter(batches) is batches:
            why = f"{self.structure} takes {num_passes} passes over the data"
            raise ValueError(READ_ONCE.format(why))
        mode = self.mode
        leaves = {site: x.clone().requires_grad_() for site, x in mode.items()}
        numbers = count(1)
        checkpoints: list[PassCheckpoint] = []

        def one_pass(summed: BatchStructure) -> tuple[DataSums, Any]:
            number = next(numbers)
            name = "Fisher" if number == 1 else f"Fisher-{number}"
            if self.checkpoint is not None:
                checkpoints.append(self._pass_checkpoint(Path(self.checkpoint), name))
            return self._sum(
                summed,
                leaves,
                progress(batches, title=name, unit="batch", shown=self.progress_bar),
                checkpoints[-1] if checkpoints else None,
                is_last=number == self.structure.num_passes,
            )

        def next_pass(summed: BatchStructure) -> Factors:
            return one_pass(summed)[0].factors

        sums, trace = one_pass(self.structure.first_pass)
        observed = observed_sites(trace, self.obs_site)
        names_of = [site["name"] for site in observed]
        left_out = [  # not those that a handler has conditioned on a constant
            name
            for name in sorted(observed_names(trace) - {*names_of})
            if _is_of_weights(trace.nodes[name])
        ]
        if left_out:
            warn(
                f"The model observes {left_out}, too, and this posterior is of "
                f"{names_of} alone: Fisher information and evidence know nothing of "
                "the others' likelihood. Of sites with the same data name all, "
                f"obs_site={(*names_of, *left_out)}; or take the others out of the "
                f"model, pyro.poutine.block(model, hide={left_out})."
            )
        prior = prior_at_mode(trace, leaves)
        if prior.correlated:
            warn(
                f"The prior of {list(prior.correlated)} has correlations between "
                "weights, of which the Laplace posterior doesn't know: only the "
                "diagonal of the prior's precision is added to the Fisher information. "
                "Variances, predictions and the evidence are off by that. As a "
                "previous posterior take one of structures.Diagonal(), which has none; "
                "or use SVGD, or SVI with another guide, which keep the whole prior."
            )
        gaussian = self.structure.gaussian(
            mode, prior, sums.factors, next_pass, self.ranks
        )
        for written in checkpoints:
            written.delete()
        return FisherFit(
            gaussian.with_prior_precision(prior.precision),
            prior.mean,
            sums.log_likelihood,
            prior.log_prob,
            {  # of the log joint: the likelihood's and the prior's
                s: torch.stack(sums.score[s]).reshape(x.shape).to(x) + prior.gradient[s]
                for s, x in mode.items()
            },
            tuple(site["name"] for site in observed),
            model_scales(trace, self.networks),
            frozenset(
                k for k, x in trace.nodes["_INPUT"]["kwargs"].items() if x is not None
            ),
            sums.num_data,
            all(
                likelihoods.has_exact_fisher(single_outcomes(site["fn"]).fn)
                for site in observed
            ),
        )

    def _terms(self, sites: Sequence[Site]) -> tuple[FisherTerms, Tensor]:
        if self.structure.linear and self.fisher_terms is exact_terms:
            return linear_terms(sites)
        return likelihood_terms(sites, self.fisher_terms)

    def _explained_terms(
        self, sites: Sequence[Site], batch: Batch, index: int, trace: Any
    ) -> tuple[FisherTerms, Tensor]:
        with naming_batch(index), explaining(batch, nodes=trace.nodes):
            return self._terms(sites)

    def _pass_checkpoint(self, folder: Path, name: str) -> PassCheckpoint:
        mode = self.mode
        settings = [repr(self.structure), self.fisher_terms, self.obs_site]
        fit = fit_digest(
            {**mode, **self.held},
            [*settings, name, " ".join(mode)],
            [fingerprint_of_whole(lora) for lora in self.networks],
            self.model,
        )
        device = next(iter(mode.values())).device
        shapes = {site: tuple(x.shape) for site, x in mode.items()}
        # Who runs parts of the first's passes leaves out those that the first does.
        joint = who_run(self.networks).size > 1
        reads = is_first() or (joint and self.ranks.rank == 0)
        return PassCheckpoint(folder / name.lower(), fit, device, shapes, reads)

    def _sum(
        self,
        summed: BatchStructure,
        leaves: Weights,
        batches: Iterable[Batch],
        checkpoint: PassCheckpoint | None,
        is_last: bool,
    ) -> tuple[DataSums, Any]:
        """The sums over all data of all ranks, and the last batch's trace.

        What another pass is made of must be there when that one is resumed: rows that
        were drawn can't be drawn again.

        Raises:
            ValueError: As :meth:`fit` does.
        """
        held, ranks = self.held, self.ranks
        max_memory_gb = math.inf if self.max_memory_gb is None else self.max_memory_gb
        trace: Any = None
        sums: DataSums | None = None
        log = PassLog(checkpoint, ranks)
        before = log.before
        if before is not None:
            sums = before.sums
        last: tuple[int, Batch] | None = None

        def to_do() -> Iterator[tuple[int, Batch]]:
            nonlocal last
            with ranks.drawing_apart():
                for index, batch in enumerate(ranks.rounds(checked_batches(batches))):
                    if batch is None:
                        log.go_on()
                    else:
                        last = index, batch
                        if not log.is_done(batch):
                            yield index, batch
                    log.write(sums)

        for index, batch in to_do():
            with torch.enable_grad(), gathered():
                with recording(self.networks, leaves) as record:
                    trace = trace_batch(self.model, {**held, **leaves}, batch, index)
                sites = observed_sites(trace, self.obs_site)
                check_latent_sites(trace, held)
                terms, log_p = validated(
                    partial(self._explained_terms, sites, batch, index, trace)
                )
                name = _names(sites)
                check_recorded(record, trace, terms.terms, name)
                for site in sites:
                    if several_plates(site) and record.mixes_data(terms.terms):
                        raise ValueError(wrong_plate(site))
                plate = data_plate(sites[0])
                rows_before = 0 if sums is None else sums.num_rows
                num_rows = _checked_rows(terms, plate, rows_before, summed.max_rows)
                with outside_autocast():
                    score, factors = batch_factors(
                        terms, log_p, leaves, record, summed, 1e9 * max_memory_gb
                    )
                _check_finite(log_p, score, index, name)
            del record  # or its tensors would live through the next forward pass
            num_data = terms.terms.shape[1]
            of_batch = DataSums({}, score, log_p.detach(), num_data, num_rows)
            if terms.observed is not None:
                factors = _of_outcomes(factors, terms.observed)
            if before is not None:
                before.check_score(score)
            sums = of_batch if sums is None else sums.plus_rest(of_batch)
            with outside_autocast():  # they are computed as they are asked for
                for layers in factors:
                    if before is not None:
                        before.check_factors(layers)
                    sums.add_factors(layers)
            del factors, layers
            end_trunk_once(self.networks)
        log.check()
        if not is_last:
            log.write(sums, at_once=True)
        if last is None:
            raise ValueError(ranks.none_here(NO_BATCHES))
        if trace is None:  # for the prior, where all batches were done before
            trace = trace_batch(self.model, {**held, **leaves}, last[1], last[0])
        check_rows(ranks.total(0 if sums is None else sums.num_rows), summed.max_rows)
        device = next(iter(leaves.values())).device
        sums = over_ranks(ranks, sums, device)
        sites = observed_sites(trace, self.obs_site)
        read_from = None if before is None else before.folder
        plate = data_plate(sites[0])
        _check_number(sums.num_data, plate, _names(sites), read_from, ranks)
        return sums, trace


def _is_of_weights(site: Site) -> bool:
    """Whether a site's log density depends on the posterior's weights."""
    log_prob: Tensor = site["fn"].log_prob(values_to_score(site))
    return log_prob.requires_grad


def _of_outcomes(factors: Iterator[Factors], observed: Observed) -> Iterator[Factors]:
    """Factors of the outcomes that count, in order, and what was observed there."""
    places = observed.rows
    for layers in factors:
        yield {i: rows.at(places) for i, rows in layers.items()}
    yield {OBSERVED: ObservedFactors((observed.outcomes,))}


def _checked_rows(
    terms: FisherTerms, plate: DataPlate, before: int, max_rows: int | None
) -> int:
    """The number of a batch's rows, before there are more than can be kept.

    Raises:
        ValueError: If there are, or the first batch says that there will be.
    """
    each: int | None = len(terms.terms)
    number = terms.terms.numel()
    if terms.observed is not None:
        each, number = terms.observed.num_each, len(terms.observed.rows)
    total = before + number
    if max_rows is not None and not before and each is not None:
        total = each * plate.full_size
    check_rows(total, max_rows)
    return number


def check_rows(total: int, max_rows: int | None) -> None:
    """Check that rows of the Jacobian aren't more than a pass takes.

    Args:
        total: Their number.
        max_rows: What it takes; None is any number.

    Raises:
        ValueError: If they are.
    """
    if max_rows is not None and total > max_rows:
        raise ValueError(
            "structures.Exact() works on matrices of as many rows as there are "
            f"outcomes times contrasts, here {total:,} or more, and takes {max_rows:,} "
            "at most. Use structures.Exact(num_inducing=m), which projects them on the "
            "span of m and takes 400,000,000 / m of them, or structures.KFAC()."
        )


def _names(sites: Sequence[dict[str, Any]]) -> str:
    return " and ".join(site["name"] for site in sites)


def check_latent_sites(trace: Any, held: Container[str] = ()) -> None:
    """Check that no latent site is left over, and there is no factor.

    Args:
        trace: A trace of the model.
        held: Latent sites that may be there besides the lifted ones.

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
        if not latent or name in held or is_missing_outcome(trace, name):
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
    by_site = [torch.stack(layers).isfinite().all() for layers in score.values()]
    finite = torch.stack([x.to(log_likelihood.device) for x in by_site])
    names = [*score]

    def bad_likelihood() -> ValueError:
        return ValueError(
            f"Batch {index}: the log likelihood of site {site!r} is NaN or infinite. "
            f"{remedy}"
        )

    def bad_gradient() -> ValueError:
        name = names[finite.tolist().index(False)]
        return ValueError(
            f"Batch {index}: the gradient of site {name!r} has NaN or infinite "
            f"values. {remedy}"
        )

    require(log_likelihood.isfinite(), bad_likelihood)
    require(finite.all(), bad_gradient)


def _check_number(
    num_seen: int, plate: DataPlate, site: str, read_from: Path | None, ranks: Ranks
) -> None:
    if num_seen == plate.full_size:
        return
    where = "" if read_from is None else f", those summed in {read_from} included"
    whose, shared = "", ""
    if ranks.size > 1:
        whose = f" of all {ranks.size} ranks together"
        shared = (
            " Each rank gives its own share, pl.share(batches); a "
            "DistributedSampler repeats data where they don't divide by the ranks."
        )
    says, remedy = plate.contradiction(num_seen, site)
    raise ValueError(
        f"The batches{whose} hold {num_seen} data{where}, but {says}. {remedy}{shared}"
    )
