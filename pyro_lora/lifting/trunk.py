"""The trunk: layers below the first adapted one, the same for every particle."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyro_lora.lifting.slots import Fold


def _caches(network: nn.Module) -> bool:
    """Whether a call fills a key-value cache unless it is told not to."""
    get_base = getattr(network, "get_base_model", None)
    base = network if get_base is None else get_base()
    wants = getattr(getattr(base, "config", None), "use_cache", False)
    return bool(wants) and "use_cache" in inspect.signature(base.forward).parameters


def find_trunk(network: nn.Module, adapted: Iterable[nn.Module]) -> Trunk:
    """The trunk of a network.

    Args:
        network: The network.
        adapted: Its adapted layers.

    Returns:
        The trunk, which may be empty.
    """
    return Trunk(_trunk_layers(network, set(adapted)), _caches(network))


def _trunk_layers(network: nn.Module, adapted: set[nn.Module]) -> list[nn.Module]:
    """The layers of a stack that come before its first adapted layer."""
    order = {module: i for i, module in enumerate(network.modules())}
    if not adapted:
        return []
    first_slot = min(order[slot] for slot in adapted)
    for stack in network.modules():
        if not isinstance(stack, nn.ModuleList):
            continue
        contents = [set(layer.modules()) for layer in stack]
        first = next((i for i, c in enumerate(contents) if c & adapted), None)
        # Modules are registered in the order in which they run: this stack must hold
        # the first slot of all.
        if first is not None and any(order[m] == first_slot for m in contents[first]):
            return list(stack)[:first]
    return []


class Trunk:
    """Runs the trunk on one copy of the batch while particles are folded into it.

    Args:
        layers: In the order in which they run.
        caches: Whether the network fills a key-value cache unless told not to.
    """

    def __init__(self, layers: list[nn.Module], caches: bool = False) -> None:
        self._layers = layers
        self.caches = caches
        self._checked = False  # that particles really are the same there

    @contextmanager
    def shared(self, fold: Fold, inputs: Mapping[Any, Any]) -> Iterator[None]:
        """Share the trunk between particles while the block runs, where it's safe.

        It isn't where every layer's states or caches are asked for, where dropout
        differs between particles (in training mode), or where a sequence is as long
        as the folded batch, so that the two can't be told apart.

        Args:
            fold: How particles are folded into the inputs.
            inputs: The network's folded inputs, by name.
        """
        sizes = {
            n for x in inputs.values() if isinstance(x, Tensor) for n in x.shape[1:]
        }
        asks = ("output_hidden_states", "output_attentions")
        safe = fold.folded_size not in sizes and not any(
            inputs.get(name) for name in asks
        )
        safe = safe and not inputs.get("use_cache", self.caches)
        safe = safe and not any(layer.training for layer in self._layers)
        if not (self._layers and safe and fold.num_particles > 1):
            yield
            return
        layers = self._layers
        before = [layer.__dict__.get("forward") for layer in layers]
        for i, layer in enumerate(layers):
            last = i == len(layers) - 1
            layer.forward = self._sharing(layer.forward, fold, last)
        try:
            yield
        finally:
            for layer, forward in zip(layers, before, strict=True):
                del layer.__dict__["forward"]
                if forward is not None:
                    layer.__dict__["forward"] = forward

    def _sharing(
        self, forward: Callable[..., Any], fold: Fold, last: bool
    ) -> Callable[..., Any]:
        def one_copy(x: Tensor) -> Tensor:
            folded = x.ndim > 1 and x.shape[0] == fold.folded_size
            return x[: fold.batch_size] if folded else x

        def differs(x: Tensor) -> bool:
            second = x[fold.batch_size : 2 * fold.batch_size]
            return one_copy(x) is not x and not torch.equal(one_copy(x), second)

        def all_copies(x: Tensor) -> Tensor:
            if x.ndim < 2 or x.shape[0] != fold.batch_size:
                return x
            return x.repeat(fold.num_particles, *[1] * (x.ndim - 1))

        def shared_forward(*args: Any, **kwargs: Any) -> Any:
            if not self._checked:
                tensors: list[Tensor] = []
                _map((args, kwargs), lambda x: tensors.append(x) or x)  # type: ignore[func-returns-value]
                if any(differs(x) for x in tensors):
                    self._layers = []  # an adapted layer runs before: never share
                self._checked = True
            if not self._layers:
                return forward(*args, **kwargs)
            args, kwargs = _map((args, kwargs), one_copy)
            output = forward(*args, **kwargs)
            return _map(output, all_copies) if last else output

        return shared_forward


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(_map(v, function) for v in value)
    if isinstance(value, dict):
        return {k: _map(v, function) for k, v in value.items()}
    return value
