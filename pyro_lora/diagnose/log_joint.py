r"""The log joint of all data at many weight sets, by the linearised network mostly.

With :math:`\ell_n(w) = \log p(y_n | x_n, w)`, its sum over N data at S weight sets
takes S passes. One pass with C - 1 backward passes tells of each datum the linearised
outputs :math:`f(x_n, \hat w) + J_n (w - \hat w)`, hence :math:`\tilde \ell_n(w)`, at
any number of weight sets. The network itself is run at them on m rows drawn at random,
and what it says other than the linearised one stands for all rows:

.. math:: \sum_n \ell_n(w) \approx \sum_n \tilde \ell_n(w)
          + \frac{N}{m} \sum_{n \in m} (\ell_n(w) - \tilde \ell_n(w)),

the difference estimator of survey sampling (Quiroz et al. 2019,
https://arxiv.org/abs/1404.4178, section 3): unbiased, and exact where the network is
linear. Its error is told by leaving out each of the m rows once. For N = 500 and
S = 77, m = 20 rows are three passes in place of 77.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_lora.curvature.gaussian_logits import class_log_probs
from pyro_lora.curvature.linearize import (
    LinearizedBatch,
    likelihood_at,
)
from pyro_lora.curvature.prior_moments import model_scales
from pyro_lora.diagnose.diagnosis import LeftOut
from pyro_lora.ground.autocast import OutsideAutocast
from pyro_lora.ground.ranks import ALONE, Ranks, draw_ranks_of
from pyro_lora.ground.settings import check_gradients
from pyro_lora.ground.weights import Weights
from pyro_lora.lifting.cached_trunk import trunk_once
from pyro_lora.likelihood import likelihoods
from pyro_lora.likelihood.batch import (
    Batch,
    PlacedBatch,
    checked_batches,
    explaining,
    next_batch,
)
from pyro_lora.likelihood.data_plate import data_plate
from pyro_lora.likelihood.model_trace import (
    Model,
    evaluating,
    evaluating_model,
    lifted_networks,
    trace_at,
)
from pyro_lora.likelihood.outcome_source import GivenLabels
from pyro_lora.likelihood.outcomes import single_outcomes
from pyro_lora.posteriors.laplace_posterior import (
    LaplacePosterior,
    linearized_network,
)
from pyro_lora.posteriors.posterior import Posterior, one_weight_set, tempered_prior
from pyro_lora.posteriors.prior import log_prior_by_site
from pyro_lora.predict.any_prediction import AnyPrediction
from pyro_lora.predict.data_pass import (
    datum_log_probs,
    latent_log_probs,
    observes_only,
    why_no_log_joint,
)
from pyro_lora.predict.draws import (
    DRAWS_AT_ONCE,
    ModelAtDraws,
    model_at_draws,
    outcome_source,
)
from pyro_lora.predict.linearized import linearized_at, not_linearizable
from pyro_lora.predict.token_prediction import which_outcomes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_LEAST_ROWS = 16  # a standard error from fewer says little


class LogJoint:
    """Log likelihood and log prior of all data, as a function of the weights.

    Args:
        posterior: The posterior, whose prior is used.
        model: The Pyro model.
        batches: Re-iterable of mappings of model keyword arguments.
        obs_site: The likelihood's site, or None.
        ranks: Who shares the data.
        mesh: Whose ranks these are; those of its dim ``"particles"`` share weight sets.

    Raises:
        ValueError: If there are no batches, or the posterior doesn't fit the model.
    """

    def __init__(
        self,
        posterior: Posterior,
        model: Model,
        batches: Iterable[Batch],
        obs_site: str | None,
        ranks: Ranks = ALONE,
        mesh: DeviceMesh | None = None,
    ) -> None:
        self.ranks, self.mesh, self.draws_over = ranks, mesh, draw_ranks_of(mesh)
        first = next_batch(checked_batches(batches), "diagnose", ranks)
        self.posterior, self.model, self.batches = posterior, model, batches
        self.first = first
        one = one_weight_set(posterior)
        with torch.no_grad(), evaluating_model():
            trace = self._first_trace = trace_at(model, one, first)
        at = model_at_draws(
            model, {s: x[None] for s, x in one.items()}, first, obs_site, trace=trace
        )
        self.obs_site, self.site = at.obs_site, trace.nodes[at.obs_site]
        self.networks = lifted_networks(trace)
        self.prior = tempered_prior(posterior, model_scales(trace, self.networks))
        self.observes_only = observes_only(trace, at.obs_site)
        num_data = 0
        in_step = ranks.in_step(checked_batches(batches))
        for batch in self.draws_over.on_same(in_step):
            num_data += at.num_rows(batch)
        self.num_data = ranks.total(num_data)

    @property
    def why_not(self) -> str | None:
        """Why there is no log joint of all data, if so."""
        return why_no_log_joint(self.site, self.num_data, self.observes_only)

    def check(self) -> None:
        """Check that there is a log joint.

        Raises:
            LeftOut: If labels or data are missing, or another site is observed, too.
        """
        if self.why_not is not None:
            raise LeftOut(self.why_not)

    def at_draws(self, weights: Mapping[str, Tensor]) -> ModelAtDraws:
        """The model at S weight sets, site -> (S, ...)."""
        return model_at_draws(
            self.model,
            weights,
            self.first,
            self.obs_site,
            trace=self._first_trace,
            ranks=self.draws_over,
        )

    def log_probs(self, trace: Any, batch: Batch) -> Tensor:
        """Log density of each datum, as it counts in the sum, (S', B), float64."""
        site = trace.nodes[self.obs_site]
        with explaining(batch, nodes=trace.nodes):
            return datum_log_probs(site) * data_plate(site).scale

    def log_probs_at(self, weights: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """The same at all of S weight sets, site -> (S, ...), whoever runs them."""
        at = self.at_draws(weights)
        own = [self.log_probs(trace, batch) for trace in at.traces(batch)]
        return at.ranks.gathered(torch.cat(own))

    @torch.no_grad()
    def is_by_row(self, mode: Weights) -> bool:
        """Whether data of the first batch are the same in other places and among fewer.

        They aren't where a tensor only happens to be as long as the batch (a weight for
        each of B classes), or where data of a batch depend on each other.

        Args:
            mode: Site -> value, all latent sites.
        """
        at = self.at_draws({site: x[None] for site, x in mode.items()})

        def log_probs(batch: Batch) -> Tensor:
            (trace,) = at.traces(batch)
            return self.log_probs(trace, batch)[0]

        each = log_probs(self.first)
        if not _has_rows(self.first, len(each)):
            return False
        moved = torch.arange(len(each), device=each.device).roll(1)
        # Far above what is rounded, as padding and batch size do it.
        dtype = max((x.dtype for x in mode.values()), key=lambda x: torch.finfo(x).eps)
        same = torch.finfo(dtype).eps ** 0.5
        return all(
            torch.allclose(
                log_probs(_rows_of(self.first, rows)), each[rows], same, same
            )
            for rows in (moved, moved[: math.ceil(len(each) / 2)])
        )

    def log_prior(self, weights: Mapping[str, Tensor]) -> Tensor:
        """That of the lifted networks, (S,), nats, float64."""
        by_site = log_prior_by_site(self.prior, self.networks, weights)
        return torch.stack(list(by_site.values())).sum(0)

    @torch.no_grad()
    def at(self, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Log likelihood and log prior, (S,) each, nats, float64.

        Args:
            weights: Site -> (S, ...).
        """
        at = self.at_draws(weights)
        totals: list[Tensor] = []
        latents: list[dict[str, Tensor]] = []
        in_step = self.ranks.in_step(checked_batches(self.batches))
        for index, batch in enumerate(in_step):
            of_batch = []
            with trunk_once(self.networks if at.num_runs > 1 else []):
                for trace in at.traces(batch):
                    of_batch.append(self.log_probs(trace, batch).sum(-1))
                    if index == 0:
                        latents.append(latent_log_probs(trace, self.networks))
            totals.append(torch.cat(of_batch))
        others = {
            s: at.ranks.gathered(torch.cat([chunk[s] for chunk in latents]))
            for s in latents[0]
        }
        log_prior = others | log_prior_by_site(self.prior, self.networks, weights)
        return (
            at.ranks.gathered(self.ranks.sum(torch.stack(totals).sum(0))),
            torch.stack(list(log_prior.values())).sum(0),
        )

    def gradient(self, mode: Weights) -> Weights:
        """Gradient in the lifted sites, nats.

        Args:
            mode: Site -> value, all latent sites of the model.
        """
        check_gradients()
        leaves = {
            site: mode[site].clone().requires_grad_()
            for lora in self.networks
            for site in lora.sites
        }
        with torch.enable_grad(), evaluating(self.networks):
            for batch in self.ranks.in_step(checked_batches(self.batches)):
                trace = trace_at(self.model, {**mode, **leaves}, batch)
                self.log_probs(trace, batch).sum().backward()
        of_data = {
            s: torch.zeros_like(x) if x.grad is None else x.grad
            for s, x in leaves.items()
        }
        return self.with_prior(mode, of_data)

    def with_prior(self, mode: Weights, of_data: Weights) -> Weights:
        """Gradient of the log joint, in the lifted sites, nats.

        Args:
            mode: Site -> value, all latent sites of the model.
            of_data: That of the log likelihood of this rank's data.
        """
        leaves = {s: mode[s].detach().clone().requires_grad_() for s in of_data}
        with torch.enable_grad():
            weights = {s: x[None] for s, x in {**mode, **leaves}.items()}
            prior = log_prior_by_site(self.prior, self.networks, weights)
            of_prior = torch.autograd.grad(
                torch.stack(list(prior.values())).sum(),
                list(leaves.values()),
                materialize_grads=True,
            )
        sums = self.ranks.sums(list(of_data.values()))
        return {
            site: a.to(b) + b for site, a, b in zip(leaves, sums, of_prior, strict=True)
        }


@dataclass(frozen=True, eq=False)
class WeightSets(OutsideAutocast):
    """The mode, points near it in a few directions, whole draws: S = 1 + P + W sets.

    Attributes:
        mode: Site -> value, all latent sites.
        steps: Lifted site -> directions, (Q, ...).
        coordinates: Of the points, in steps from the mode, (P, Q).
        draws: Site -> (W, ...), all latent sites.
    """

    mode: Weights
    steps: Weights
    coordinates: Tensor
    draws: Weights

    @property
    def sizes(self) -> tuple[int, int, int]:
        """1, P and W."""
        return 1, len(self.coordinates), len(next(iter(self.draws.values())))

    def near(self, at_once: int = DRAWS_AT_ONCE) -> Iterator[Weights]:
        """The mode and the points in order, some at a time."""
        yield {site: x[None] for site, x in self.mode.items()}
        yield from map(self._at, self.coordinates.split(at_once))

    def _at(self, z: Tensor) -> Weights:
        # w = w_0 + sum_q z_q step_q
        weights = {s: x.expand(len(z), *x.shape) for s, x in self.mode.items()}
        for site, step in self.steps.items():
            weights[site] = weights[site] + torch.tensordot(z.to(step), step, 1)
        return weights

    def chunks(self, ranks: Ranks) -> Iterator[Weights]:
        """All of them in order, as many at a time as go through the network at once.

        Args:
            ranks: Who shares each of these out.
        """
        at_once = DRAWS_AT_ONCE * ranks.size
        yield from self.near(at_once)
        for start in range(0, self.sizes[-1], at_once):
            yield {s: x[start : start + at_once] for s, x in self.draws.items()}

    def logits(self, at: LinearizedBatch) -> Tensor:
        """Those of the linearised network, (S, B, ..., C)."""
        # Of the points, J is that of Q directions, however many there are.
        moves = {
            site: torch.cat(
                [
                    (self.mode[site] - x)[None],
                    self.steps[site].to(x),
                    self.draws[site] - x,
                ]
            )
            for site, x in at.origin.items()
        }
        moved = at.logits_along(moves)
        num_steps = self.coordinates.shape[1]
        to_mode, along, to_draws = moved.split([1, num_steps, self.sizes[-1]])
        points = to_mode + torch.tensordot(self.coordinates.to(along), along, 1)
        return at.mean + torch.cat([to_mode, points, to_draws])


@dataclass(frozen=True, eq=False)
class LogLikelihoods:
    """Log likelihoods of all data at S weight sets, and how far they are known.

    Attributes:
        known: Their known part, (S,), nats, float64.
        rest: The rest as each of U random units says it, (U, S), whose mean it is;
            (0, S) where all is known.
        unseen: Share of the units that weren't drawn.
        num_data: Data that the network itself was run on at all of the weight sets.
    """

    known: Tensor
    rest: Tensor
    unseen: float
    num_data: int

    def of(self, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """A function of them, and its standard error for the units that were drawn.

        The jackknife's: of a linear function it's the textbook's one (Efron 1982, "The
        jackknife, the bootstrap and other resampling plans", section 3).

        Args:
            function: Of (S,).
        """
        number = len(self.rest)
        if number == 0:
            value = function(self.known)
            return value, torch.zeros_like(value)
        total = self.rest.sum(0)
        value = function(self.known + total / number)
        without = torch.stack(
            [function(self.known + (total - x) / (number - 1)) for x in self.rest]
        )
        squares = (without - without.mean(0)).square().sum(0)
        return value, (self.unseen * (number - 1) / number * squares).sqrt()


def rows_within(max_passes: float | None, num_data: int, num_sets: int) -> int | None:
    """Rows that S weight sets can be run on in so many passes; None is all.

    Args:
        max_passes: Forward passes over the data; None is no limit.
        num_data: N.
        num_sets: S.
    """
    if max_passes is None:
        return None
    rows = max(_LEAST_ROWS, math.ceil(max_passes * num_data / num_sets))
    return None if rows >= num_data else rows


@dataclass(frozen=True, eq=False)
class _Unit:
    """What was drawn: a row, or a batch that can't be taken apart.

    Attributes:
        batch: The model's arguments.
        known: What is known of it at each weight set, (S,).
        num_data: In it.
        batch_size: Of the batch that it comes from.
    """

    batch: PlacedBatch
    known: Tensor
    num_data: int
    batch_size: int

    @property
    def form(self) -> tuple[Any, ...]:
        """What units have in common that can be put together."""
        if self.num_data > 1:
            return (id(self),)
        return tuple(
            (name, x.shape[1:], x.dtype) if isinstance(x, Tensor) else (name, x)
            for name, x in self.batch.items()
        )


@dataclass
class _Sample:
    """Units drawn from a stream of any length: those of the smallest random numbers.

    Attributes:
        num_rows: How many; of whole batches as many as have that many rows, two at
            least.
        by_row: Whether batches with rows can be taken apart.
        seen: Units that went by.
        kept: Random numbers and units, in order.
    """

    num_rows: int
    by_row: bool
    seen: int = 0
    kept: list[tuple[float, _Unit]] = field(default_factory=list)

    @property
    def units(self) -> list[_Unit]:
        """Those that were drawn."""
        return [unit for _, unit in self.kept]

    def offer(self, batch: PlacedBatch, known: Tensor) -> None:
        """A batch goes by.

        Args:
            batch: The model's arguments.
            known: What is known of each datum at each weight set, (S, B).
        """
        size = known.shape[1]
        by_row = self.by_row and _has_rows(batch, size)
        number = self.num_rows if by_row else max(2, math.ceil(self.num_rows / size))
        for i, key in enumerate(torch.rand(size if by_row else 1, device="cpu")):
            self.seen += 1
            if len(self.kept) == number and key > self.kept[-1][0]:
                continue
            if by_row:
                row = _rows_of(batch, torch.tensor([i], device=known.device))
                unit = _Unit(row, known[:, i], 1, size)
            else:
                unit = _Unit(batch, known.sum(1), size, size)
            insort(self.kept, (float(key), unit), key=itemgetter(0))
            del self.kept[number:]

    def groups(self) -> Iterator[list[int]]:
        """Places of the units that go through the network together."""
        units = self.units
        by_form: dict[tuple[Any, ...], list[int]] = {}
        for place, unit in enumerate(units):
            by_form.setdefault(unit.form, []).append(place)
        for places in by_form.values():
            step = units[places[0]].batch_size
            for start in range(0, len(places), step):
                yield places[start : start + step]


def _has_rows(batch: Batch, size: int) -> bool:
    """Whether a batch can be taken apart: every tensor has a row for each datum."""
    return all(
        x.ndim > 0 and x.shape[0] == size
        if isinstance(x, Tensor)
        else isinstance(x, bool | int | float | str | None)
        for x in batch.values()
    )


def _rows_of(batch: PlacedBatch, rows: Tensor) -> PlacedBatch:
    """Some of a batch's data, of which every tensor has a row for each."""
    return batch.replaced(
        **{s: x[rows.to(x.device)] for s, x in batch.items() if isinstance(x, Tensor)}
    )


def _together(units: Sequence[_Unit]) -> PlacedBatch:
    first = units[0].batch
    if len(units) == 1:
        return first
    return first.replaced(
        **{
            name: torch.cat([unit.batch[name] for unit in units])
            for name, x in first.items()
            if isinstance(x, Tensor)
        }
    )


@dataclass(frozen=True, eq=False)
class Linearised:
    """What one pass over the data finds, the network linearised at a Gaussian's origin.

    Attributes:
        gradient: Of the log joint at the mode, lifted site -> value; None where there
            is no log joint, or more than the linearised outputs depends on the weights.
        log_likelihoods: At the weight sets; None where they weren't asked for.
        prediction: Of the data, with labels where there are some; None where it wasn't
            asked for.
    """

    gradient: Weights | None
    log_likelihoods: LogLikelihoods | None
    prediction: AnyPrediction | None


def why_not_linear(joint: LogJoint) -> str | None:
    """Why the network can't be linearised in front of the likelihood; None if it can.

    Args:
        joint: The log joint.
    """
    fn = joint.site["fn"]
    single = single_outcomes(fn).fn
    if likelihoods.known(single) is None:
        return f"{type(single).__name__} isn't among pyro_lora.likelihoods"
    try:
        which = which_outcomes(joint.site, None)
    except ValueError as error:
        return str(error)
    return not_linearizable(fn, which)


def linear_pass(
    joint: LogJoint,
    gaussian: LaplacePosterior,
    sets: WeightSets | None,
    num_rows: int,
    *,
    has_joint: bool,
    predicts: bool,
    labels: str | None,
) -> Linearised:
    """One pass over the data: a forward and C - 1 backward passes a batch.

    Args:
        joint: The log joint.
        gaussian: The posterior, at the joint's model.
        sets: Where the log likelihood is asked for; None: nowhere.
        num_rows: On how many rows the network itself is run there.
        has_joint: Whether the data have a log joint.
        predicts: Whether to predict the data, too.
        labels: The argument with the outcomes, where it is known.

    Returns:
        What was found, of all ranks.
    """
    network = linearized_network(gaussian, joint.model, joint.obs_site)
    which = which_outcomes(joint.site, None)
    way = linearized_at(
        gaussian, joint.model, joint.obs_site, class_log_probs, which, 0
    )
    mode = gaussian.mode()
    given = GivenLabels(outcome_source(joint.model, mode, joint.obs_site, labels))
    gradient = {s: torch.zeros_like(x) for s, x in gaussian.gaussian.origin.items()}
    predictions: list[AnyPrediction] = []
    is_all = has_joint  # there is in the gradient
    known: Tensor | float = 0.0
    sample = None
    if has_joint and sets is not None:
        sample = _Sample(math.ceil(num_rows / joint.ranks.size), joint.is_by_row(mode))
    in_step = joint.ranks.in_step(checked_batches(joint.batches))
    for index, batch in enumerate(joint.ranks.drawing(in_step)):
        with evaluating(gaussian.networks):
            at = network.at(batch, None if which is None else "each")
        if has_joint:
            terms = _LogProbs(at, batch)
            # Cutpoints that the network outputs aren't linearised, but have a gradient.
            own = likelihoods.of(single_outcomes(at.site["fn"]).fn)
            is_all = is_all and (own.in_all is None or own.classes is None)
            if is_all:
                for site, g in at.gradient(terms.total).items():
                    gradient[site] += g.to(gradient[site])
            if sets is not None and sample is not None:
                logits = sets.logits(at)
                each = torch.cat([terms.at(f) for f in logits.split(DRAWS_AT_ONCE)])
                known = known + each.sum(1)
                sample.offer(batch, each)
        if predicts:
            outputs = at.logits(gaussian.gaussian)
            predicted = way.predicted(at.site, outputs)
            if which in (None, "labels"):
                observed = given.read(batch, predicted.num_classes, index)
                if observed is not None:
                    predicted = predicted.with_labels(observed, batch.place)
            predictions.append(predicted)
            given.source.forget()
        del at
    prediction = None
    if predicts:
        kind = type(predictions[0])
        shares = joint.ranks.collected(kind.concatenated(predictions))
        prediction = shares[0] if len(shares) == 1 else kind.concatenated(shares)
    found = None
    if sets is not None and sample is not None:
        assert isinstance(known, Tensor)  # each rank has a batch
        found = _estimated(joint, sets, known, sample)
    return Linearised(
        joint.with_prior(mode, gradient) if is_all else None, found, prediction
    )


@dataclass(frozen=True, eq=False)
class _LogProbs:
    """Log densities of a batch's data as functions of the network's logits."""

    linearized: LinearizedBatch
    batch: Batch

    def at(self, logits: Tensor) -> Tensor:
        """Each as it counts in the sum, (..., B), float64."""
        site = self.linearized.site
        fn = likelihood_at(site["fn"], logits, self.linearized.numbers)
        moved = {**site, "fn": fn}
        with explaining(self.batch, nodes={site["name"]: site}):
            return datum_log_probs(moved) * data_plate(site).scale

    def total(self, logits: Tensor) -> Tensor:
        """Their sum, a scalar."""
        return self.at(logits).sum()


def constant_pass(joint: LogJoint, sets: WeightSets, num_rows: int) -> LogLikelihoods:
    """The same of a network that can't be linearised: only the mode's own is known.

    Args:
        joint: The log joint.
        sets: Where the log likelihood is asked for.
        num_rows: On how many rows the network itself is run there.
    """
    at = joint.at_draws({site: x[None] for site, x in sets.mode.items()})
    by_row = joint.is_by_row(sets.mode)
    sample = _Sample(math.ceil(num_rows / joint.ranks.size), by_row)
    known: Tensor | float = 0.0
    in_step = joint.ranks.in_step(checked_batches(joint.batches))
    for batch in joint.ranks.drawing(in_step):
        with torch.no_grad():
            (trace,) = at.traces(batch)
            each = joint.log_probs(trace, batch).expand(sum(sets.sizes), -1)
        known = known + each.sum(1)
        sample.offer(batch, each)
    assert isinstance(known, Tensor)  # each rank has a batch
    return _estimated(joint, sets, known, sample)


@torch.no_grad()
def _estimated(
    joint: LogJoint, sets: WeightSets, known: Tensor, sample: _Sample
) -> LogLikelihoods:
    units, groups = sample.units, list(sample.groups())
    batches = [_together([units[i] for i in places]) for places in groups]
    log_likelihoods = known.new_empty(sum(sets.sizes), len(units))
    for places, batch in joint.ranks.in_step(zip(groups, batches, strict=True)):
        with trunk_once(joint.networks):
            chunks = sets.chunks(joint.draws_over)
            log_probs = torch.cat([joint.log_probs_at(w, batch) for w in chunks])
        # Of rows one each; what can't be taken apart is by itself.
        log_likelihoods[:, places] = (
            log_probs if len(places) > 1 else log_probs.sum(1, keepdim=True)
        )
    rest = log_likelihoods - torch.stack([unit.known for unit in units], 1)
    ranks = joint.ranks
    number, seen = ranks.total(len(units)), ranks.total(sample.seen)
    # Each rank's units stand for all of its own.
    rest = rest * (number * sample.seen / len(units))
    return LogLikelihoods(
        known=ranks.sum(known),
        rest=ranks.gathered(rest.mT.contiguous()),
        unseen=1 - number / seen,
        num_data=ranks.total(sum(unit.num_data for unit in units)),
    )


def exact(joint: LogJoint, sets: WeightSets) -> LogLikelihoods:
    """The same by the network itself on all data, in S passes.

    Args:
        joint: The log joint.
        sets: Where the log likelihood is asked for.
    """
    chunks = sets.chunks(joint.draws_over)
    known = torch.cat([joint.at(weights)[0] for weights in chunks])
    return LogLikelihoods(known, known.new_empty(0, len(known)), 0.0, joint.num_data)
