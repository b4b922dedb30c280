r"""How foreign a datum is, by what the layers below the adapters make of it.

A posterior over adapters doubts what its training data left open. Whether a text is
like these at all is told better by the states that the adapters are given: with h(x)
the mean over the tokens of x, and m and C mean and covariance of h over N training
data,

.. math:: d(x) = \sqrt{(h(x) - m)^T C^{-1} (h(x) - m) / I},

about 1 for data like them. In one dimension, with training states 0 and 2, m = 1,
C = 1, and a state of 4 has d = 3.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor, nn

from pyro_lora.curvature.capture import check_reached
from pyro_lora.ground.accumulation import at_least_float32
from pyro_lora.ground.autocast import OutsideAutocast, outside_autocast
from pyro_lora.ground.checked_tensors import DOUBLE, CheckedTensors
from pyro_lora.ground.interrupts import eagerly, hooked, leaving_no_trace, undone
from pyro_lora.ground.progress import progress
from pyro_lora.ground.ranks import ranks_of, sharing_data
from pyro_lora.ground.settings import check_gradients
from pyro_lora.ground.summary import Summarised
from pyro_lora.ground.tensor_folder import Format, Schema, read_folder, write_folder
from pyro_lora.ground.weights import Weights
from pyro_lora.lifting.fingerprint import (
    NetworkDescription,
    check_networks,
    described,
    fingerprint,
    restored,
)
from pyro_lora.lifting.folding import tensors_in
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood.batch import (
    Batch,
    PlacedBatch,
    check_batches,
    checked_batches,
    next_batch,
)
from pyro_lora.likelihood.data_plate import data_plate
from pyro_lora.likelihood.likelihoods import of as likelihood_of
from pyro_lora.likelihood.model_trace import (
    Model,
    evaluating_model,
    lifted_networks,
    likelihood_site,
    trace_at,
)
from pyro_lora.likelihood.outcomes import single_outcomes
from pyro_lora.posteriors.guide_posterior import Guide
from pyro_lora.posteriors.posterior import (
    Posterior,
    as_posterior,
    fit_arguments,
    one_weight_set,
)
from pyro_lora.predict.draws import check_names, check_same_inputs, model_of

_LEAST_SHRINKAGE = 1e-6  # of the covariance, so that it has an inverse
_SAME = 1e-5  # relative differences below it are rounding
_NOTHING = 1e-15  # of the largest gradient: masked attention leaves 1e-19, or 0
_DIGITS = 16  # of data's numbers: few, since gradients may be in half precision
_OFF = 0.2  # by which a digit may be off there
_OF_TOKENS = 3  # dims of states (B, T, I)


@dataclass(frozen=True, eq=False, repr=False)
class StateDistance(OutsideAutocast, Summarised):
    """How far the states of data are from those of the training data.

    Made by :func:`state_distance`, and called with batches.

    Attributes:
        mean: m, the mean state, (I,), float64.
        root: Cholesky factor of C, (I, I), float64.
        num_data: N, the training data.
        posterior: Whose model and networks run the batches.
        model: The Pyro model.
        obs_site: The likelihood's site.
        arguments: Those of the training data's batches.
    """

    mean: Tensor
    root: Tensor
    num_data: int
    posterior: Posterior
    model: Model
    obs_site: str | None
    arguments: frozenset[str]

    def __call__(
        self, batches: Iterable[Batch], *, progress_bar: bool | None = None
    ) -> Tensor:
        r"""The distance of each datum, a forward pass a batch.

        Args:
            batches: Mappings of model keyword arguments, with or without labels.
            progress_bar: Show one; None: on a terminal or in a notebook.

        Returns:
            :math:`d` (N',), float64, in standard deviations, in order: about 1 for data
            like the training data, larger for others.

        Raises:
            ValueError: If there are no batches, or the network gives other states.

        Warns:
            UserWarning: If the network gets a mask, or another input, that it didn't
                have for the training data, or the other way round.
        """
        states = _see(
            self.posterior,
            batches,
            self.model,
            self.obs_site,
            progress_bar,
            self.arguments,
        ).states
        if states.shape[1:] != self.mean.shape:
            raise ValueError(
                f"State distance: expected states of {len(self.mean)} numbers, as in "
                f"the training data, found {states.shape[1]}. Give batches of the same "
                "arguments, whose model calls the same networks."
            )
        errors = (states - self.mean).mT
        whitened = torch.linalg.solve_triangular(self.root, errors, upper=False)
        return whitened.square().mean(0).sqrt()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it into a folder, which is made if it isn't there.

        As ``pyro_lora.save`` writes a posterior: two files, safetensors and JSON, and a
        crash at any time leaves the old content or the new one.

        Args:
            path: The folder, another than the posterior's.

        Raises:
            ValueError: If the folder holds a ``manifest.json`` of something else.
        """
        prints = [fingerprint(lora) for lora in self.posterior.networks]
        networks, values = described(prints)
        content = {
            "num_data": self.num_data,
            "obs_site": self.obs_site,
            "arguments": sorted(self.arguments),
            "networks": networks,
        }
        tensors = {"mean": self.mean, "root": self.root} | values
        write_folder(Path(path), FORMAT, content, tensors)

    def _facts(self) -> dict[str, str]:
        return {"I": f"{len(self.mean):,}", "num_data": f"{self.num_data:,}"}


class _Saved(Schema):
    """The fields of its manifest."""

    num_data: Annotated[int, msgspec.Meta(ge=2)]
    obs_site: str | None
    arguments: tuple[str, ...]
    networks: tuple[NetworkDescription, ...]


FORMAT = Format("pyro_lora state distance", 1, "Save it again.", _Saved)


@leaving_no_trace
def load_state_distance(
    path: str | os.PathLike[str],
    posterior: Posterior | Guide,
    *,
    model: Model | None = None,
) -> StateDistance:
    """Read what :meth:`StateDistance.save` wrote, without the training data.

    Args:
        path: The folder.
        posterior: A posterior, or any Pyro guide that has run, over the same networks.
        model: The Pyro model; None is the posterior's own.

    Returns:
        What was saved, on the network's device.

    Raises:
        ValueError: If a file is missing, truncated, altered or of something else, or
            the posterior is of another network.
    """
    posterior = as_posterior(posterior, model)
    networks = posterior.networks
    sites = [x for lora in networks[:1] for x in lora.zeros().values()]
    device = sites[0].device if sites else torch.device("cpu")
    manifest, read = read_folder(Path(path), FORMAT, device)
    content: _Saved = manifest.content
    tensors = CheckedTensors(read)
    try:
        mean = tensors.real("mean", None, DOUBLE)
        root = tensors.real("root", (mean.numel(), mean.numel()), DOUBLE)
        if mean.ndim != 1 or not bool((root.diagonal() > 0).all()):
            raise ValueError(
                f"tensors mean and root aren't (I,) and a factor. {FORMAT.remedy}"
            )
        prints = restored(content.networks, tensors.values)
        check_networks(prints, networks, "the state distance")
    except ValueError as error:
        raise ValueError(f"{manifest.file}: {error}") from error
    return StateDistance(
        mean=mean,
        root=root,
        num_data=content.num_data,
        posterior=posterior,
        model=model_of(posterior, model, "load_state_distance"),
        obs_site=content.obs_site,
        arguments=frozenset(content.arguments),
    )


def state_distance(
    posterior: Posterior | Guide,
    batches: Iterable[Batch],
    *,
    model: Model | None = None,
    obs_site: str | None = None,
    progress_bar: bool | None = None,
) -> StateDistance:
    r"""Learn what states the training data have below the adapters.

    The Mahalanobis distance of Lee et al. (2018), https://arxiv.org/abs/1807.03888,
    with one class, of the mean over the tokens of what the first adapted layer of a
    stack is given; where there is none, or the network calls its parts alone, the first
    adapted ``nn.Linear``. It asks nothing of the posterior but its model: adapters
    don't change what is below them. The covariance is shrunk towards a multiple of the
    identity as Ledoit and Wolf (2004) do, so that N may be smaller than I.

    A datum's tokens are those on which its outcome depends, which autograd tells:
    padding isn't, whatever hides it, nor a choice that isn't there, nor a token to
    which all attention is 0 in the network's precision; and rows may come in any order.
    Of several rows a datum, and of several calls of a network, all tokens count alike;
    of several networks the states are put after one another. It takes a forward pass,
    and two backward passes that end where the states are, three from 17 data in a
    batch on.

    Args:
        posterior: A posterior, or any Pyro guide for the model.
        batches: The training data, mappings of model keyword arguments; labels aren't
            needed. N I numbers are kept while it runs, I² afterwards.
        model: The Pyro model; None is the posterior's own.
        obs_site: The likelihood's site, where the model has several.
        progress_bar: Show one; None: on a terminal or in a notebook.

    Returns:
        A function of batches: ``distance(test_loader)`` is (N',), about 1 for data like
        these, ``pl.auroc(distance(test_loader), distance(other_loader))`` how well it
        tells others, and ``distance.save(folder)`` keeps it. Where to draw the line,
        rows of the same kind say that weren't trained on:
        ``distance(held_out).quantile(0.95)``.

    Raises:
        TypeError: If the likelihood isn't of a known type.
        ValueError: If there are fewer than two data or all have the same state, the
            model doesn't call its network, a network's states aren't (rows, I) or
            (rows, T, I), or several data's outcomes depend on one row.

    Warns:
        UserWarning: If the network gets a mask, or another input, that it didn't have
            in the fit, or the other way round.
    """
    seen = _see(posterior, batches, model, obs_site, progress_bar)
    states = seen.states
    mean = states.mean(0)
    errors = states - mean
    spread = errors.abs().amax()  # NaN is no number that is larger
    if len(states) < 2 or not bool(spread > _SAME * states.abs().amax()):
        raise ValueError(
            "state_distance needs two training data at least, with different and "
            f"finite states; found {len(states)}, at most {float(spread):.1g} from "
            "their mean."
        )
    root = torch.linalg.cholesky(shrunk_covariance(errors))
    return StateDistance(
        mean=mean,
        root=root,
        num_data=len(states),
        posterior=seen.posterior,
        model=seen.model,
        obs_site=obs_site,
        arguments=seen.arguments,
    )


def shrunk_covariance(errors: Tensor) -> Tensor:
    r"""Ledoit and Wolf's estimate, (I, I), from (N, I) of mean 0.

    :math:`(1 - \rho) S + \rho \mu I` with :math:`\mu` the mean eigenvalue of S, and
    :math:`\rho = \min(1, \sum_n |x_n x_n^T - S|^2 / (N^2 |S - \mu I|^2))`.

    Args:
        errors: Rows less their mean, (N, I), float64.
    """
    number, size = errors.shape
    s = errors.mT @ errors / number
    mu = s.diagonal().mean()
    eye = torch.eye(size, dtype=s.dtype, device=s.device)
    # |x x' - S|^2 summed over the rows: the cross terms add up to -2 N |S|^2.
    spread = errors.square().sum(1).square().sum() - number * s.square().sum()
    distance = (s - mu * eye).square().sum()
    rho = (spread / number**2 / distance).nan_to_num(1).clamp(_LEAST_SHRINKAGE, 1)
    return (1 - rho) * s + rho * mu * eye


@dataclass(frozen=True, eq=False)
class _Seen:
    """What was seen of data.

    Attributes:
        posterior: Whose.
        model: Its model.
        arguments: Those of the batches.
        states: Of all data, those of all ranks, in order, (N, I), float64.
    """

    posterior: Posterior
    model: Model
    arguments: frozenset[str]
    states: Tensor


@leaving_no_trace
@sharing_data
def _see(
    posterior: Posterior | Guide,
    batches: Iterable[Batch],
    model: Model | None,
    obs_site: str | None,
    progress_bar: bool | None,
    arguments: frozenset[str] | None = None,
) -> _Seen:
    """Run all batches; ``arguments`` are those of earlier ones, None the fit's."""
    caller = "state_distance"
    check_batches(batches)
    check_gradients()
    ranks = ranks_of(None, "data")
    stream = checked_batches(
        progress(batches, title="States", unit="batch", shown=progress_bar)
    )
    first = next_batch(stream, caller, ranks)
    posterior = as_posterior(posterior, model, first)
    model = model_of(posterior, model, caller)
    check_names(model, obs_site)
    name = obs_site or posterior.obs_site
    weights, networks = one_weight_set(posterior), posterior.networks
    if not networks:  # of a guide that is a function
        with torch.no_grad(), evaluating_model():
            networks = lifted_networks(trace_at(model, weights, first, undrawn=name))
    if arguments is None:
        arguments = fit_arguments(posterior)
    check_same_inputs(networks, arguments, first)

    def all_batches() -> Iterable[PlacedBatch]:
        yield first
        yield from stream

    own = [
        _mean_states(model, weights, networks, name, batch)
        for batch in ranks.in_step(all_batches())
    ]
    shares = ranks.collected(torch.cat(own))
    states = torch.cat([x.to(own[0]) for x in shares])
    return _Seen(posterior, model, frozenset(first.given), states)


def _mean_states(
    model: Model,
    weights: Weights,
    networks: Sequence[LiftedNetwork],
    obs_site: str | None,
    batch: PlacedBatch,
) -> Tensor:
    r"""Of each datum of a batch, (B, I), float64.

    Which rows and tokens are a datum's is asked of autograd, since models put rows in
    any order and leave out padding in many ways. With f_b a number that the outcome of
    datum b depends on, and c_b a digit of b, the gradients of :math:`\sum_b f_b` and
    :math:`\sum_b c_b f_b` in a state differ by the factor c_b where it's datum b's
    alone, and are 0 where no outcome depends on it.

    Raises:
        ValueError: If a state isn't one datum's alone, depends on trained weights, or
            a datum has none.
    """
    # A guide of the user's may have indices among its sites.
    leaves = {
        s: x.detach().requires_grad_(x.is_floating_point()) for s, x in weights.items()
    }
    readers = [_Reader(lora, batch.place) for lora in networks]
    starts = {x.lora.network: x.starts for x in readers}
    reads = {layer: x.reads for x in readers for layer in x.layers}

    def put_back() -> None:
        for reader in readers:
            reader.forget()

    with torch.enable_grad(), undone(put_back):
        # Two blocks, since a network may be a single layer. Not around the backward
        # passes: a checkpointed network runs again in them.
        with hooked({}, starts), hooked({}, reads), evaluating_model():
            trace = trace_at(model, leaves, batch, undrawn=obs_site)
        outputs = _outputs(likelihood_site(trace, obs_site, weights))
        for reader in readers:
            reader.check_below(leaves)
        number = len(outputs)
        totals = [outputs.sum()]
        for digit in _digits(number, outputs):
            totals.append((outputs * (digit + 1) / _DIGITS).sum())
        with eagerly(), outside_autocast():
            gradients = [
                [_gradients(total, reader.states) for total in totals]
                for reader in readers
            ]
    means = []
    for reader, of_totals in zip(readers, gradients, strict=True):
        by_call = zip(reader.states, zip(*of_totals, strict=True), strict=True)
        own = [_by_datum(x, of_x, number, batch.place) for x, of_x in by_call]
        sums, counts = (torch.stack(parts).sum(0) for parts in zip(*own, strict=True))
        if not bool((counts > 0).all()):
            raise ValueError(
                f"{batch.place}: the outcome of datum "
                f"{int((counts == 0).nonzero()[0])} depends on no token that the "
                "network reads. Its attention_mask may be all 0, or the outputs NaN."
            )
        means.append(sums / counts[:, None])
    return torch.cat(means, 1)


def _gradients(total: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """In each call's states, zeros where it doesn't depend on them."""
    return torch.autograd.grad(
        total, states, retain_graph=True, allow_unused=True, materialize_grads=True
    )


def _outputs(site: dict[str, Any]) -> Tensor:
    """A number for each datum that depends on all that its outcomes do, (B,).

    Raises:
        TypeError: If the likelihood isn't of a known type.
    """
    single, plate = single_outcomes(site["fn"]), data_plate(site)
    f = at_least_float32(likelihood_of(single.fn).predictor)  # (..., P)
    check_reached(f, site["name"])
    f = f.where(f.isfinite() & single.unmasked[..., None], 0)  # choices may be absent
    # Logits count up to a shift of all of them: no constant weights.
    weights = torch.arange(1, f.shape[-1] + 1, device=f.device).to(f).cos()
    shape = site["fn"].batch_shape
    of_outcomes = (f @ weights).expand(single.fn.batch_shape).reshape(*shape, -1)
    return plate.data_last(of_outcomes, shape).sum(0)


def _digits(number: int, like: Tensor) -> list[Tensor]:
    """Of the numbers 0 to B - 1, the last digit first, (B,) each."""
    rest = torch.arange(number, device=like.device)
    found: list[Tensor] = []
    while not found or bool(rest.any()):
        found.append((rest % _DIGITS).to(like))
        rest = rest // _DIGITS
    return found


def _by_datum(
    states: Tensor, gradients: Sequence[Tensor], number: int, place: str
) -> tuple[Tensor, Tensor]:
    """A call's sums over the tokens of each datum, (B, I), and their number, (B,).

    Args:
        states: (R, I) or (R, T, I).
        gradients: Like them, of the sum over the data, and of those by their digits.
        number: B.
        place: What the batch is called.

    Raises:
        ValueError: If the outcomes of several data depend on a row.
    """
    x, g, *of_digits = (
        at_least_float32(v.detach()).reshape(len(v), -1, v.shape[-1])
        for v in (states, *gradients)
    )
    tiny = torch.finfo(g.dtype).tiny
    scale = g.abs().max().clamp_min(tiny)
    g = g / scale
    largest = g.abs().amax(-1)  # (R, T)
    of_row = largest.amax(1)
    is_read = of_row > _NOTHING
    squares = g.square().sum((1, 2)).clamp_min(tiny)
    datum = torch.zeros(len(x), dtype=torch.long, device=x.device)
    mixed = torch.zeros_like(is_read)
    for j, h in enumerate(of_digits):
        factor = (g * h / scale).sum((1, 2)) / squares
        rest = (h / scale - factor[:, None, None] * g).square().sum((1, 2)) / squares
        at = factor * _DIGITS - 1
        digit = at.nan_to_num().round().clamp(0, _DIGITS - 1)
        mixed |= ~(((at - digit).abs() < _OFF) & (rest < _OFF**2))
        datum += digit.long() * _DIGITS**j
    mixed = is_read & (mixed | (datum >= number))
    if bool(mixed.any()):
        raise ValueError(
            f"{place}: outcomes of several data depend on row "
            f"{int(mixed.nonzero()[0])} of the network's input, so that it isn't one "
            "datum's. Let the data's plate be over what the rows are, or join the "
            "outcomes of a row by .to_event(1)."
        )
    counts = is_read[:, None] & (largest > _NOTHING * of_row[:, None])
    # A product with the mask would keep what is NaN in padding.
    sums = x.where(counts[..., None], 0).sum(1).double()
    rows = datum.where(is_read, 0)
    return (
        sums.new_zeros(number, sums.shape[1]).index_add(0, rows, sums),
        sums.new_zeros(number).index_add(0, rows, counts.sum(1).to(sums)),
    )


class _Reader:
    """Keeps what a network's first adapted layer is given in each call.

    Args:
        lora: The network.
        place: What the batch is called.

    Attributes:
        lora: The network.
        layers: The adapted ones, of which the first that runs is given the states.
        states: Of each call, (R, I) or (R, T, I), with gradients.
    """

    def __init__(self, lora: LiftedNetwork, place: str) -> None:
        self.lora, self._place = lora, place
        self._stacked = lora.trunk.first_adapted
        owners = [p.owner for of_site in lora.parameters.values() for p in of_site]
        # A layer of a stack runs before those in it, where it is called at all.
        self.layers = {x for x in [self._stacked, *owners] if x is not None}
        self.states: list[Tensor] = []
        self._waits = False
        self._watched: list[Tensor] = []

    def starts(self, network: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """A pre-hook of the network: a call begins."""
        self._waits = True

    def reads(self, layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """A pre-hook of the layers: the first in a call is given the states.

        Raises:
            ValueError: If they have another form.
        """
        if not self._waits:
            return
        self._waits = False
        x = tensors_in([args, kwargs])[0]
        is_known = layer is self._stacked or isinstance(layer, nn.Linear)
        if not (is_known and x.is_floating_point() and x.ndim in (2, _OF_TOKENS)):
            raise ValueError(
                f"{self._place}: state distance expects that an adapted nn.Linear or "
                "the first adapted layer of a stack is given states (rows, I) or "
                f"(rows, T, I); the first that runs is a {type(layer).__name__}, given "
                f"{x.dtype} of shape {tuple(x.shape)}. Compare features of your own."
            )
        if not x.requires_grad:
            self._watched.append(x.requires_grad_())
        self.states.append(x)

    def check_below(self, leaves: Weights) -> None:
        """Check that there are states, which no trained weight has made.

        Raises:
            ValueError: If there are none, or some has.
        """
        kind = type(self.lora.network).__name__
        if not self.states:
            raise ValueError(
                f"{self._place}: the model doesn't call the lifted network {kind}, "
                "whose states are compared."
            )
        given = [x.sum() for x in self.states if x.grad_fn is not None]
        if not given:
            return
        trained = {site: x for site, x in leaves.items() if x.requires_grad}
        with eagerly(), outside_autocast():
            found = torch.autograd.grad(
                given, [*trained.values()], retain_graph=True, allow_unused=True
            )
        made_by = [s for s, g in zip(trained, found, strict=True) if g is not None]
        if made_by:
            raise ValueError(
                f"{self._place}: what the first adapted layer of {kind} is given "
                f"depends on trained weights itself, {made_by[0]!r}, so that no state "
                "is below them. Compare features of your own."
            )

    def forget(self) -> None:
        """Leave the states as they were given."""
        for x in self._watched:
            x.requires_grad_(False)
