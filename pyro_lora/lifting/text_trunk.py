"""The trunk while texts are written, and its key-value cache.

S draws continue B prompts of T tokens. What the trunk makes of a token is the same for
all draws for as long as their tokens are: in the prompts, and further on where the
draws agree on every token, as they do when they write one text together. T' tokens
later a layer's keys (and values) are

    trunk, one text       (B, heads, T + T', D)
    trunk, S texts        (B, heads, T, D) and (S B, heads, T', D)
    above                 (S B, heads, T + T', D)

How far the draws are is read off these rows: there is no state beside the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from pyro_lora.lifting.folding import tensors_in
from pyro_lora.lifting.slots import Fold
from pyro_lora.lifting.trunk import (
    Call,
    Copies,
    is_plain,
    mapped,
    replaced_forwards,
)


class PromptsAndTexts(DynamicLayer):
    """A layer's keys and values: one copy of the prompts', and those of S B texts.

    Args:
        prompts: What was kept while all draws' tokens were the same, B rows.
        num_particles: S.
    """

    def __init__(self, prompts: DynamicLayer, num_particles: int) -> None:
        super().__init__()
        self.prompts: Any = prompts
        self.num_particles = num_particles

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep what is new, (S B, heads, t, D), and give all, in S copies."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        prompts = self.prompts
        return self._joined(prompts.keys, keys), self._joined(prompts.values, values)

    def get_seq_length(self, *args: Any) -> int:
        """T + T'."""
        length: int = self.prompts.get_seq_length(*args)
        return length + int(super().get_seq_length(*args))

    def _joined(self, prompts: Tensor, texts: Tensor) -> Tensor:
        texts = texts.unflatten(0, (self.num_particles, -1))  # (S, B, heads, T', D)
        copies = prompts.expand(self.num_particles, *prompts.shape)
        return torch.cat([copies, texts], -2).flatten(0, 1)


def _copied(layer: Any, num_particles: int) -> Any:
    """The layer with S copies of its rows."""
    rows = torch.arange(len(layer.keys), device=layer.keys.device)
    layer.reorder_cache(rows.repeat(num_particles))
    return layer


# What a layer of a cache becomes when S texts begin to differ; of a window that slides
# on, less and less is the prompts'. Layers of other kinds may be of all rows at once.
_OF_TEXTS: Mapping[Any, Callable[[Any, int], Any]] = {
    DynamicLayer: PromptsAndTexts,
    DynamicSlidingWindowLayer: _copied,
}


# Arguments by which a caller is given caches, or layers' states, of all rows.
_ASKS = (
    "return_dict_in_generate",
    "generation_config",
    "custom_generate",
    "output_hidden_states",
    "output_attentions",
)


class TextTrunk:
    """Runs the trunk on one copy of the batch while the draws' tokens are the same.

    Args:
        layers: The trunk's, in the order in which they run.
        tables: How many rows the network's embeddings have.
    """

    caches = False  # which are the network's own matter while it writes
    cache = None  # of hidden states

    def __init__(self, layers: Sequence[nn.Module], tables: Container[int]) -> None:
        self._layers = layers
        self._tables = tables

    def run(self, call: Call) -> Any:
        """What a call gives, its trunk run once for all draws where it's safe.

        Args:
            call: Of ``generate``, or of the network; each is looked at as it runs.
        """
        with self._shared(call.fold, call.inputs):
            return call.run()

    @contextmanager
    def _shared(self, fold: Fold, inputs: Mapping[Any, Any]) -> Iterator[None]:
        """Share the trunk between draws while the block runs, where it's safe.

        It isn't for several beams, in training mode, with caches or arguments of other
        kinds than :class:`DynamicCache` and tensors, in which layers may leave what
        others read, and where a caller is given the cache or layers' states.
        """
        training = any(layer.training for layer in self._layers)
        if training or any(inputs.get(name) for name in _ASKS):
            yield
            return
        # Of the pass that runs; None while the draws differ.
        copies: Copies | None = None

        def replacement(forward: Callable[..., Any], i: int) -> Callable[..., Any]:
            last = i == len(self._layers) - 1

            def shared_forward(*args: Any, **kwargs: Any) -> Any:
                nonlocal copies
                if i == 0:
                    copies = self._copies(fold, [*args, *kwargs.values()])
                if copies is None:
                    return forward(*args, **kwargs)
                args, kwargs = mapped((args, kwargs), copies.one)
                output = forward(*args, **kwargs)
                return mapped(output, copies.all) if last else output

            return shared_forward

        with replaced_forwards(self._layers, replacement):
            yield

    def _copies(self, fold: Fold, given: Sequence[Any]) -> Copies | None:
        """Copies in what the first layer is given, None unless they are all equal.

        The cache is made one of S texts where they begin to differ.
        """
        if not all(map(_is_known, given)):
            return None
        tensors = tensors_in(given)
        caches = [x for x in given if isinstance(x, Cache)]
        rows = {_num_rows(layer) for cache in caches for layer in cache.layers} - {0}
        if rows and fold.batch_size not in rows:
            return None
        sizes = {n for x in tensors for n in x.shape[1:]}
        ambiguous = fold.folded_size in sizes or fold.folded_size in self._tables
        copies = Copies(fold, ambiguous)
        if copies.are_given(tensors):
            return copies
        for cache in caches:
            cache.layers = [
                _OF_TEXTS[type(layer)](layer, fold.num_particles)
                if _num_rows(layer) == fold.batch_size
                else layer
                for layer in cache.layers
            ]
        return None


def _num_rows(layer: Any) -> int:
    """Rows of keys; 0 where there are none, yet or in a layer without attention."""
    keys = getattr(layer, "keys", None)
    return 0 if keys is None or not keys.numel() else len(keys)


def holds_rows(cache: Any, num_rows: int) -> bool:
    """Whether a key-value cache is of so many rows, in one of its layers at least."""
    return any(_num_rows(layer) == num_rows for layer in getattr(cache, "layers", ()))


def check_caches(values: Iterable[tuple[Any, Any]], num_particles: int) -> None:
    """Check that a key-value cache is what the particles have filled together.

    Args:
        values: The arguments of a call, by name.
        num_particles: S.

    Raises:
        ValueError: If it hasn't S B rows.
    """
    given = dict(values)
    tensors = [x for x in given.values() if isinstance(x, Tensor) and x.ndim > 0]
    for name, value in given.items():
        if not isinstance(value, Cache):
            continue
        if not tensors or not holds_rows(value, num_particles * len(tensors[0])):
            raise ValueError(
                f"Input {name!r} is a {type(value).__name__}, which {num_particles} "
                "particles can't share. Pass what a call of these particles with "
                "use_cache=True returned, or pass one particle at a time."
            )


def _is_known(value: Any) -> bool:
    """Whether it is known what a layer does with an argument."""
    if isinstance(value, Cache):
        kinds: set[Any] = {type(layer) for layer in value.layers}
        kinds |= {value.layer_class_to_replicate} - {None}
        known = type(value) is DynamicCache and not value.offloading
        return known and kinds <= _OF_TEXTS.keys()
    return is_plain(value)
