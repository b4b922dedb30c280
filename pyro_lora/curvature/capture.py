"""Inputs and output gradients of every lifted layer, for one batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pyro_lora.curvature.structures import at_least_float32
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.lifting.sites import LiftedParameter


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


@dataclass(frozen=True)
class _Call:
    """One call of a slot, and the versions of its tensors at that time."""

    input: Tensor
    output: Tensor
    versions: tuple[int, int]

    @property
    def overwritten(self) -> bool:
        """Whether a later operation wrote into the input or the output."""
        return (self.input._version, self.output._version) != self.versions


@dataclass
class Recording:
    """What the forward hooks saw.

    Attributes:
        layers: Each layer of each site, sites in order, layers in order; a layer's
            weight and bias are two.
        calls: For each slot its calls, slots in the order of their first.
    """

    layers: list[tuple[nn.Linear, LiftedParameter]]
    calls: dict[nn.Module, list[_Call]] = field(default_factory=dict)


@contextmanager
def recording(
    networks: Iterable[LiftedNetwork], sites: Container[str]
) -> Iterator[Recording]:
    """Record inputs and outputs of the slots of some sites while the block runs."""
    layers = [pair for lora in networks for pair in linear_layers(lora, sites)]
    record = Recording(layers)

    def hook(slot: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].detach()
        call = _Call(x, output, (x._version, output._version))
        record.calls.setdefault(slot, []).append(call)

    slots = {slot for slot, _ in record.layers}
    handles = [slot.register_forward_hook(hook) for slot in slots]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def capture_layers(
    record: Recording,
    terms: Tensor,
    places: Iterable[int] | None = None,
    keep_graph: bool = False,
) -> dict[int, LayerCapture]:
    """Gradients of every term at every recorded layer: one backward pass a term.

    Args:
        record: Filled by :func:`recording` around the forward pass.
        terms: (M, B), each datum's terms depending on that datum alone.
        places: Which of ``record.layers``; None is all of them.
        keep_graph: Whether further backward passes follow.

    Returns:
        Place -> capture; a layer that wasn't called or has no gradient has zero
        gradients. Layers that get the same tensor, as query and value do, have the
        same ``inputs``.

    Raises:
        ValueError: If a layer's input isn't batch first, or is overwritten in place.
    """
    batch_size = terms.shape[1]
    layers = dict(enumerate(record.layers))
    if places is not None:
        layers = {i: layers[i] for i in places}
    slots = {slot for slot, _ in layers.values()}
    calls = {slot: found for slot, found in record.calls.items() if slot in slots}
    if any(call.overwritten for of_slot in calls.values() for call in of_slot):
        raise ValueError(
            "The network overwrites inputs or outputs of a lifted layer in place, so "
            "their gradients can't be read. Set inplace=False in its activations."
        )
    outputs = [call.output for of_slot in calls.values() for call in of_slot]
    rows = [  # M queues, from which each gradient is taken once, to free its memory
        deque(_output_gradients(term, outputs, keep_graph or i < len(terms) - 1))
        for i, term in enumerate(terms)
    ]
    inputs: dict[nn.Module, Tensor] = {}
    gradients: dict[nn.Module, Tensor] = {}
    same: dict[tuple[Any, ...], Tensor] = {}
    for slot, of_slot in calls.items():
        a = _joined([_by_token(c.input, batch_size) for c in of_slot], 1)
        inputs[slot] = same.setdefault((a.data_ptr(), a.shape, a.stride()), a)
        per_call = [
            torch.stack([_by_token(row.popleft(), batch_size) for row in rows])
            for _ in of_slot
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
        ValueError: If a parameter isn't the weight or bias of an ``nn.Linear``.
    """
    found = []
    for site, members in lora.parameters.items():
        for p in members if site in sites else ():
            holder = p.locations[0][0]
            if p.owner is not holder or not isinstance(holder, nn.Linear):
                owner = type(p.owner or lora.network)
                raise ValueError(
                    f"Site {site!r}: curvature is that of torch.nn.Linear layers, but "
                    f"{p.name!r} is computed with by {owner.__module__}."
                    f"{owner.__qualname__}. Use SVGD or a Pyro guide, or freeze it "
                    "(requires_grad_(False)) before lifting."
                )
            found.append((holder, p))
    return found


def largest_gradients(capture: LayerCapture) -> Tensor:
    """Of each token, over terms and outputs, (B, T)."""
    return capture.gradients.abs().amax((0, 3))


def tokens_that_count(sizes: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Which tokens count for a layer.

    A token counts where its largest gradient exceeds 1e3 eps times the largest
    gradient of its datum over all layers: attention leaves 1e-19 or 0 at the same
    padded token, depending on the padding, and a maximum over the batch would depend
    on how the data are split.

    Args:
        sizes: Of all layers of one batch, :func:`largest_gradients` by place.

    Returns:
        Place -> (B, T), bool.
    """
    largest = torch.stack([s.amax(1) for s in sizes.values()]).amax(0)  # (B,)
    # Half precision rounds each gradient, but what should be zero stays near zero.
    dtype = torch.promote_types(largest.dtype, torch.float32)
    least = 1e3 * torch.finfo(dtype).eps * largest[:, None]
    return {i: s > least for i, s in sizes.items()}


def without_padding(capture: LayerCapture, counts: Tensor) -> LayerCapture:
    """The gradients of the tokens that don't count, exactly zero.

    Args:
        capture: One layer.
        counts: Which of its tokens count, (B, T).
    """
    if counts.all():
        return capture
    return replace(capture, gradients=capture.gradients * counts[..., None])


def _output_gradients(
    term: Tensor, outputs: Sequence[Tensor], keep_graph: bool
) -> list[Tensor]:
    wanted = [out for out in outputs if out.requires_grad]
    found = iter(
        torch.autograd.grad(
            term.sum(), wanted, retain_graph=keep_graph, allow_unused=True
        )
        if wanted
        else ()
    )
    gradients = []
    for out in outputs:
        gradient = next(found) if out.requires_grad else None
        gradients.append(torch.zeros_like(out) if gradient is None else gradient)
    return gradients


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    # A single one needs no copy.
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _by_token(x: Tensor, batch_size: int) -> Tensor:
    if x.shape[0] % batch_size != 0:
        raise ValueError(
            f"A lifted layer has an input or output of shape {tuple(x.shape)} for "
            f"{batch_size} data: its first dim must be the batch, or batch times "
            "tokens. Networks that route tokens across data aren't supported."
        )
    return x.reshape(batch_size, -1, x.shape[-1])


def score_gradient(capture: LayerCapture, coordinates: Tensor) -> Tensor:
    r"""Gradient of the log likelihood, :math:`\sum_{m,b} \alpha_{mb} \nabla c_{mb}`.

    Args:
        capture: One layer.
        coordinates: :math:`\alpha`, (M, B).

    Returns:
        (O, I), nats, summed over the batch.
    """
    a, g = at_least_float32(capture.inputs), at_least_float32(capture.gradients)
    alpha = coordinates.to(g)[..., None, None]
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
        yield c.site, (g.mT @ a).transpose(0, 1)
