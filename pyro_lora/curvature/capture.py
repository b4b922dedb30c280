r"""Inputs and output gradients of every lifted layer, for one batch.

A linear layer :math:`h_t = W a_t` has :math:`\partial c / \partial W = \sum_t g_t
a_t^T` with :math:`g_t = \partial c / \partial h_t`. So forward hooks that keep a and h,
and gradients in h alone, tell each datum's gradient in W, where autograd's own in W is
summed over the batch. A bias is a layer of its own with a = 1. For a = (1, 2) at one
token and g = 3: (3, 6), and 3 for the bias.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from pyro_lora.curvature.layout import Call, Layout, Run, find_layouts, mixes_data
from pyro_lora.ground.accumulation import at_least_float32
from pyro_lora.ground.interrupts import eagerly, hooked
from pyro_lora.ground.memory import address
from pyro_lora.ground.ranks import Ranks
from pyro_lora.ground.settings import check_gradients
from pyro_lora.ground.synchronisation import ask
from pyro_lora.lifting.folding import tensors_in
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.lifting.sites import LiftedParameter
from pyro_lora.lifting.split_layers import meet, who_run
from pyro_lora.likelihood.model_trace import lifted_networks


@dataclass(frozen=True)
class LayerCapture:
    """One layer of one site: what the curvature structures are functions of.

    Attributes:
        site: The site's name.
        inputs: (B, T, I); ones (B, T, 1) for a bias.
        gradients: Of the Fisher terms w.r.t. the layer's outputs, (M, B, T, O).
    """

    site: str
    inputs: Tensor
    gradients: Tensor


@dataclass
class Recording:
    """What the forward hooks saw.

    Attributes:
        layers: Each layer of each site, sites in order, layers in order; a layer's
            weight and bias are two.
        networks: The lifted networks that they are in.
        calls: For each slot its calls under the posterior's weights, slots in the order
            of their first.
        weights: Place among the layers -> the posterior's weights that stood there, one
            for each call of the network.
        plain: The networks that were called without them.
        outside: Calls of slots outside of their networks'.
        runs: Calls of the networks.
        layouts: Of each call, once it is known.
    """

    layers: list[tuple[nn.Linear, LiftedParameter]]
    networks: Sequence[LiftedNetwork] = ()
    calls: dict[nn.Module, list[Call]] = field(default_factory=dict)
    weights: dict[int, list[Tensor]] = field(default_factory=dict)
    plain: set[nn.Module] = field(default_factory=set)
    outside: Run = field(default_factory=Run)
    runs: list[Run] = field(default_factory=list)
    layouts: dict[Call, Layout] = field(default_factory=dict)

    @property
    def ranks(self) -> Ranks:
        """Who runs each pass together, since layers are split over them."""
        return who_run(self.networks)

    def find_layouts(self, terms: Tensor, max_bytes: float = math.inf) -> None:
        """Find which positions of each layer belong to which datum.

        Args:
            terms: All Fisher terms, (M, B).
            max_bytes: Of gradients at a time.

        Raises:
            ValueError: If a position belongs to several data, or a layer's input is
                overwritten in place.
        """
        if any(call.overwritten for calls in self.calls.values() for call in calls):
            raise ValueError(
                "The network overwrites inputs or outputs of a lifted layer in place, "
                "so their gradients can't be read. Set inplace=False in its "
                "activations."
            )
        with eagerly():
            self.layouts = find_layouts(
                [self.outside, *self.runs], terms, max_bytes, self.ranks
            )

    def mixes_data(self, terms: Tensor) -> bool:
        """Whether the terms, (M, B), of several data depend on the same output."""
        with eagerly():
            return mixes_data(self.runs, terms)


@contextmanager
def recording(
    networks: Iterable[LiftedNetwork], sites: Container[str]
) -> Iterator[Recording]:
    """Record inputs and outputs of the slots of some sites while the block runs.

    Calls that aren't under the posterior's weights, such as those of a reference that
    the model compares with, say nothing of these and aren't recorded.
    """
    check_gradients()
    by_module = {lora.network: lora for lora in networks}
    networks = tuple(by_module.values())
    layers = [pair for lora in networks for pair in linear_layers(lora, sites)]
    record = Recording(layers, networks)
    lifted = dict(reversed(layers))  # the first of weight and bias
    # Calls of a slot belong to the innermost network that runs; below it is the model.
    active = [record.outside]

    def starts(network: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        for i, (slot, p) in enumerate(layers):
            weight = _posterior_weight(slot, p)
            if weight is not None:
                record.weights.setdefault(i, []).append(weight)
        if not by_module[network].is_bound:
            record.plain.add(network)
        given = [(name, x is None) for name, x in [*enumerate(args), *kwargs.items()]]
        active.append(Run(by_module[network], tuple(given)))
        record.runs.append(active[-1])

    def ends(network: Any, args: Any, output: Any) -> None:
        active.pop().outputs += [x for x in tensors_in(output) if x.ndim > 0]

    def called(slot: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        p = lifted[slot]
        if _posterior_weight(slot, p) is None:
            return
        x = inputs[0].detach()
        call = Call(p.name, p.site, x, output, (x._version, output._version))
        record.calls.setdefault(slot, []).append(call)
        active[-1].calls.append(call)

    # Two blocks, since a network may be a single layer, which has ended after its call.
    runs = dict.fromkeys(by_module, starts)
    with (
        hooked(dict.fromkeys(lifted, called), runs),
        hooked(dict.fromkeys(by_module, ends)),
    ):
        yield record


def _posterior_weight(slot: nn.Linear, p: LiftedParameter) -> Tensor | None:
    """What a layer computes with, if it is bound and has gradients; else None."""
    name = p.locations[0][1]
    value: Any = getattr(getattr(slot, "bound", None), name, None)
    value = slot._parameters[name] if value is None else value
    bound = value.requires_grad and not isinstance(value, nn.Parameter)
    return value if bound else None


def check_recorded(record: Recording, trace: Any, values: Tensor, site: str) -> None:
    """Check that what wasn't recorded really says nothing of the weights.

    Of a layer that isn't called in a pass nothing is recorded, and zero gradients are
    taken for zero information: right for an expert to which no token is routed, or a
    layer that is dropped, but wrong where the model calls another network.

    Args:
        record: Of the pass.
        trace: Of the model, in that pass.
        values: What the posterior's Jacobian is of, differentiable.
        site: Of the likelihood.

    Raises:
        ValueError: If a network isn't called with the posterior's weights (unless the
            model samples it and calls another of the posterior's instead), no gradient
            reaches them, or ``values`` depend on the weights of a layer that isn't
            called.
    """
    sampled = lifted_networks(trace)
    for lora in record.networks:
        members = {p for ps in lora.parameters.values() for p in ps}
        places = [i for i, (_, p) in enumerate(record.layers) if p in members]
        if not places or any(i in record.weights for i in places):
            continue
        if lora in sampled and record.weights and lora.network not in record.plain:
            continue  # as a model does that chooses between networks
        p = record.layers[places[0]][1]
        raise ValueError(
            f"Site {p.site!r}: its layers, such as {p.name!r}, weren't called with the "
            f"posterior's weights, so nothing is known of them. "
            f"{_why_not_called(lora, sampled, record)}"
        )
    check_reached(values, site)
    is_new = any(
        run.network is None or run.form not in run.network.layouts
        for run in record.runs
    )
    # Of a network that was looked at before, the layers that aren't called are enough.
    wanted = {  # an edge of autograd's graph is a node and the place of its output
        (weight.grad_fn, weight.output_nr): i
        for i, weights in record.weights.items()
        if is_new or record.layers[i][0] not in record.calls
        for weight in weights
    }
    for i, times in _times_read(values, wanted).items() if wanted else ():
        slot, p = record.layers[i]
        called = len(record.calls.get(slot, ()))
        if times > called:
            raise ValueError(
                f"Site {p.site!r}: the likelihood depends on {p.name!r} in {times} "
                f"places, but its layer was called {called} times, so that inputs and "
                "gradients of the others are unknown. Let the network call the layer, "
                "not its .forward, and not read the weight itself; or freeze the "
                "parameter before lifting."
            )


def check_reached(values: Tensor, site: str) -> None:
    """Check that what a likelihood is a function of depends on the network.

    Args:
        values: Outputs of the model.
        site: The likelihood's.

    Raises:
        ValueError: If they have no gradient.
    """
    if not values.requires_grad:
        raise ValueError(
            f"The likelihood of site {site!r} doesn't depend on the lifted "
            "network: no gradient reaches its outputs. Call the network that lora() "
            "returns inside the model, without torch.no_grad() or detach()."
        )


def _why_not_called(
    lora: LiftedNetwork, sampled: Sequence[LiftedNetwork], record: Recording
) -> str:
    if lora not in sampled and sampled:
        return (
            "The model samples another lifted network than the posterior's: one that "
            "was lifted again, or loaded for; or this is a deep copy, in which a "
            "function keeps the network that it was written with (those of "
            "pyro_lora.models are copied with it). Use the model and the network "
            "together, as in load(path, lora, model=model)."
        )
    if lora.network in record.plain:
        return (
            "The model called the network itself, at its own weights. Call what lora() "
            "returns: net = lora(); net(**inputs)."
        )
    return (
        "Call the network that lora() returns inside the model: net = lora(); "
        "net(**inputs)."
    )


def _times_read(
    values: Tensor, wanted: Mapping[tuple[Any, int], int]
) -> dict[int, int]:
    """How many operations that values depend on read each of some tensors.

    A walk over autograd's graph, which costs no backward pass.

    Args:
        values: Differentiable.
        wanted: Node and place of each tensor -> what it is counted as.
    """
    nodes: list[Any] = [values.grad_fn]
    seen = set(nodes)
    times: dict[int, int] = {}
    while nodes:
        for edge in nodes.pop().next_functions:
            if edge in wanted:
                times[wanted[edge]] = times.get(wanted[edge], 0) + 1
            if edge[0] is not None and edge[0] not in seen:
                seen.add(edge[0])
                nodes.append(edge[0])
    return times


def capture_layers(
    record: Recording,
    terms: Tensor,
    places: Iterable[int] | None = None,
    keep_graph: bool = False,
) -> dict[int, LayerCapture]:
    """Gradients of every term at every recorded layer: one backward pass a term.

    Args:
        record: Filled by :func:`recording` around the forward pass, its layouts found.
        terms: (M, B), each datum's terms depending on that datum alone.
        places: Which of ``record.layers``; None is all of them.
        keep_graph: Whether further backward passes follow.

    Returns:
        Place -> capture; a layer that wasn't called or has no gradient has zero
        gradients. Layers that get the same tensor, as query and value do, have the
        same ``inputs``. All are where the terms are, whatever device a layer is on.
    """
    batch_size, device = terms.shape[1], terms.device
    layers = dict(enumerate(record.layers))
    if places is not None:
        layers = {i: layers[i] for i in places}
    slots = {slot for slot, _ in layers.values()}
    calls = {
        slot: laid_out
        for slot, of_slot in record.calls.items()
        if slot in slots and (laid_out := [c for c in of_slot if c in record.layouts])
    }
    outputs = [call.output for of_slot in calls.values() for call in of_slot]
    meet(record.ranks, f"{len(terms)} backward passes to {len(outputs)} layers")
    rows = [  # M queues, from which each gradient is taken once, to free its memory
        deque(_output_gradients(term, outputs, keep_graph or i < len(terms) - 1))
        for i, term in enumerate(terms)
    ]
    inputs: dict[nn.Module, Tensor] = {}
    gradients: dict[nn.Module, Tensor] = {}
    same: dict[tuple[Any, ...], Tensor] = {}  # inputs by datum, once for all that share
    for slot, of_slot in calls.items():
        layouts = [record.layouts[c] for c in of_slot]
        xs = [c.input for c in of_slot]
        key = (*((address(x), x.shape, x.stride()) for x in xs), *layouts)
        if key not in same:
            by_datum = [
                at.inputs(x.to(device)) for at, x in zip(layouts, xs, strict=True)
            ]
            same[key] = _joined(by_datum, 1)
        inputs[slot] = same[key]
        per_call = [  # (M, B, T, O) each
            torch.stack([at.gradients(row.popleft().to(device)) for row in rows])
            for at in layouts
        ]
        gradients[slot] = _joined(per_call, 2)
    captures = {}
    for i, (slot, p) in layers.items():
        if slot in calls:
            a, g = inputs[slot], gradients[slot]
        else:
            a = terms.new_zeros(batch_size, 1, slot.in_features)
            g = terms.new_zeros(len(terms), batch_size, 1, slot.out_features)
        if p.locations[0][1] == "bias":
            a = torch.ones_like(a[..., :1])
        captures[i] = LayerCapture(p.site, a, g)
    return captures


def linear_layers(
    lora: LiftedNetwork, sites: Container[str]
) -> list[tuple[nn.Linear, LiftedParameter]]:
    """The linear layers of some sites in order, with the parameter that is lifted.

    Args:
        lora: A lifted network.
        sites: Which.

    Raises:
        ValueError: If a parameter isn't the weight or bias of an ``nn.Linear``, or is
            that of several.
    """
    layers = []
    for site, members in lora.parameters.items():
        for p in members if site in sites else ():
            holder = p.locations[0][0]
            if p.owner is not holder or not isinstance(holder, nn.Linear):
                owner = type(p.owner or lora.network)
                if len({module for module, _ in p.locations}) > 1:
                    raise ValueError(
                        f"Site {site!r}: curvature is that of weights of one "
                        f"torch.nn.Linear each, but {len(p.locations)} modules of "
                        f"{owner.__module__}.{owner.__qualname__} share {p.name!r}. "
                        "Use SVGD or a Pyro guide, or give each its own, or freeze it "
                        "(requires_grad_(False)) before lifting."
                    )
                raise ValueError(
                    f"Site {site!r}: curvature is that of torch.nn.Linear layers, but "
                    f"{owner.__module__}.{owner.__qualname__} computes with "
                    f"{p.name!r}. Use SVGD or a Pyro guide, or freeze it "
                    "(requires_grad_(False)) before lifting."
                )
            layers.append((holder, p))
    return layers


def largest_gradients(capture: LayerCapture) -> Tensor:
    """Of each token, over terms and outputs, (B, T)."""
    return capture.gradients.abs().amax((0, 3))


class CountedTokens:
    """Which tokens of a layer count, and how many, which is asked for at once.

    Args:
        mask: (B, T), bool.
        others: Those of other layers, which may be the same.

    Attributes:
        mask: (B, T), bool.
    """

    def __init__(self, mask: Tensor, others: Sequence[CountedTokens] = ()) -> None:
        self.mask = mask
        self._number = ask(mask.sum(), usual=mask.numel() - 1)
        self._others = [
            (other, ask((mask == other.mask).all()))
            for other in others
            if other.mask.shape == mask.shape
        ]

    @property
    def are_all(self) -> bool:
        """Whether none is left out."""
        return self._number.value == self.mask.numel()

    @cached_property
    def shared(self) -> CountedTokens:
        """The first of those that are the same."""
        return next((x.shared for x, is_same in self._others if is_same), self)

    def rows(self, x: Tensor) -> Tensor:
        """The tokens that count, (..., B, T, X) -> (..., n, X)."""
        rows = x.flatten(-3, -2)
        return rows if self.are_all else rows.index_select(-2, self.shared._index)

    @cached_property
    def _index(self) -> Tensor:
        # As many are known to count: the first of them, sorted by whether they do.
        left_out = (~self.mask).flatten().to(torch.uint8)
        return left_out.argsort(stable=True)[: int(self._number)]


def tokens_that_count(
    sizes: Mapping[int, Tensor], inputs: Mapping[int, object]
) -> dict[int, CountedTokens]:
    """Which tokens count for a layer.

    A token counts where its largest gradient exceeds 1e3 eps times the largest of its
    datum in that layer, and 10 eps times that over all layers. Attention leaves 1e-19
    or 0 at the same padded token, depending on the padding, and nothing else in a layer
    that a datum has no use for; a maximum over the batch would depend on how the data
    are split. A layer whose gradients are small beside another's counts all the same.

    Args:
        sizes: Of all layers of one batch, :func:`largest_gradients` by place.
        inputs: What tells layers with the same inputs from others, by place.

    Returns:
        Place -> tokens.
    """
    largest = torch.stack([s.amax(1) for s in sizes.values()]).amax(0)  # (B,)
    # Half precision rounds each gradient, but what should be zero stays near zero.
    eps = torch.finfo(at_least_float32(largest).dtype).eps
    counts: dict[int, CountedTokens] = {}
    families: dict[object, list[CountedTokens]] = {}
    for i, s in sizes.items():
        mask = s > eps * torch.maximum(1e3 * s.amax(1), 10 * largest)[:, None]
        family = families.setdefault(inputs[i], [])
        counts[i] = CountedTokens(mask, family)
        family.append(counts[i])
    return counts


def without_padding(capture: LayerCapture, counts: CountedTokens) -> LayerCapture:
    """The gradients of the tokens that don't count, exactly zero.

    Args:
        capture: One layer.
        counts: Which of its tokens count.
    """
    if counts.are_all:
        return capture
    return replace(capture, gradients=capture.gradients * counts.mask[..., None])


def _output_gradients(
    term: Tensor, outputs: Sequence[Tensor], keep_graph: bool
) -> list[Tensor]:
    wanted = [out for out in outputs if out.requires_grad]
    with eagerly():
        computed = iter(
            torch.autograd.grad(
                term.sum(), wanted, retain_graph=keep_graph, allow_unused=True
            )
            if wanted
            else ()
        )
    gradients = []
    for out in outputs:
        gradient = next(computed) if out.requires_grad else None
        gradients.append(torch.zeros_like(out) if gradient is None else gradient)
    return gradients


def _joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    # A single one needs no copy.
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def score_gradient(capture: LayerCapture, coordinates: Tensor) -> Tensor:
    r"""Gradient of the log likelihood, :math:`\sum_{m,b} \alpha_{mb} \nabla c_{mb}`.

    Args:
        capture: One layer.
        coordinates: :math:`\alpha`, (M, B).

    Returns:
        (O, I), nats, summed over the batch.
    """
    a, g = at_least_float32(capture.inputs), at_least_float32(capture.gradients)
    alpha = coordinates.to(g)[..., None, None]  # (M, B, 1, 1)
    # The narrower side takes the coordinates.
    if a.shape[-1] < g.shape[-1]:
        return g.flatten(0, 2).mT @ (alpha * a).flatten(0, 2)
    return (alpha * g).sum(0).flatten(0, 1).mT @ a.flatten(0, 1)


def jacobians(captures: Iterable[LayerCapture]) -> Iterator[tuple[str, Tensor]]:
    r"""Per datum :math:`\sum_t g_{mbt} a_{bt}^T`, one layer at a time.

    Args:
        captures: All layers of one batch.

    Yields:
        Site and (B, M, O, I), in the order of the captures.
    """
    for c in captures:
        a, g = at_least_float32(c.inputs), at_least_float32(c.gradients)
        yield c.site, (g.mT @ a).transpose(0, 1)  # (M, B, O, I), data first
