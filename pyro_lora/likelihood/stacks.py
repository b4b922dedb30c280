"""Whether a model says of each weight set in a stack what it says of it alone.

S weight sets are one more dim, on the left of all that a network gives: (S, B, C) for
(B, C). A model that counts dims from the left, as ``logits[:, 0]`` and ``softmax(1)``
do, is right for one weight set and mixes the data of several, often in shapes that fit.
A single datum tells little: ``logits[:, 0]`` is right there, and wrong of two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from pyro_lora.ground.interrupts import hooked
from pyro_lora.ground.ranks import ALONE, Ranks, is_agreed
from pyro_lora.ground.synchronisation import ask
from pyro_lora.ground.weights import Weights, drawing_nothing
from pyro_lora.lifting.split_layers import OF_SPLIT
from pyro_lora.likelihood.model_trace import Model, lifted_networks
from pyro_lora.likelihood.outcomes import values_to_score

# Model -> its sites that were seen to keep weight sets apart, each with None, or with
# the shapes of the inputs where these were of a single datum.
_SEEN: Any = WeakIdKeyDictionary()
_STEP = 0.1  # any, so that the network's outputs differ
_MOST_ROUNDING = 0.05  # of the largest log density
_QUANTISED = 2**-8  # in place of the machine epsilon that integers don't have


@dataclass(frozen=True, eq=False)
class Stacking:
    """A model on a batch, at one weight set and at several.

    Attributes:
        model: The model.
        inputs: What the batch has, in order.
        sites: Those of the data, whose log densities are compared.
        run: Weight set -> trace.
        run_stack: Weight sets, (S, ...) each -> trace.
        at_once: The most that memory has room for.
        ranks: Who runs each pass together: all check what one of them hasn't seen.
    """

    model: Model
    inputs: Iterable[Any]
    sites: Iterable[str]
    run: Callable[[Weights], Any]
    run_stack: Callable[[Weights], Any]
    at_once: int = 3
    ranks: Ranks = ALONE

    def check(self, at: Weights, trace: Any = None) -> None:
        """Check that weight sets don't mix, where shapes fit: else a run will say so.

        A model is run for it on its first batch of several data, and until then on
        each whose inputs have new shapes.

        Args:
            at: Site -> value, all latent sites.
            trace: Of the model there, where it is known.

        Raises:
            ValueError: Naming the site, if they do.
            RuntimeError: Another rank's.
        """
        mixed: str | None = None
        try:
            mixed = self._mixed_site(at, trace)
        except (RuntimeError, ValueError) as error:
            if is_agreed(error):
                raise
        if mixed is not None:
            raise ValueError(
                f"Site {mixed!r}: of the last of several weight sets in a stack "
                "the model doesn't say what it says of it alone. Draws and "
                "particles are one more dim, on the left of the network's outputs, "
                "(S, B, C): count dims from the right, logits[..., 0] and "
                "softmax(-1) for logits[:, 0] and softmax(1)."
            )

    def is_right(self, at: Weights) -> bool:
        """Whether a stack can be run, and its weight sets don't mix.

        Args:
            at: Site -> value, all latent sites.

        Raises:
            RuntimeError: Another rank's.
            ValueError: Another rank's.
        """
        try:
            return self._mixed_site(at) is None
        except (RuntimeError, ValueError) as error:
            if is_agreed(error):
                raise
            return False

    @torch.no_grad()
    def _mixed_site(self, at: Weights, trace: Any = None) -> str | None:
        """The first site at which weight sets mix.

        Raises:
            RuntimeError: If shapes don't fit, or a ValueError.
        """
        look = f"a look at a stack of weights {OF_SPLIT}"
        if not any(self.ranks.counts(not self._is_seen(), look)):
            return None
        with drawing_nothing(at):
            trace = self.run(at) if trace is None else trace
            values = {
                name: values_to_score(trace.nodes[name])
                for name in self.sites
                if name in trace.nodes
            }
            # Weights of zero, as a new head's may be, would say the same of all data.
            moving = {site for lora in lifted_networks(trace) for site in lora.sites}
            if not moving <= at.keys():  # a prior makes some of other latents
                moving |= {s for s in at if _is_real(trace.nodes.get(s))}

            def moved() -> Weights:
                return {
                    s: x + _STEP * torch.randn_like(x) if s in moving else x
                    for s, x in at.items()
                }

            one = moved()
            nets = [lora.network for lora in lifted_networks(trace)]
            kinds = {x.dtype for network in nets for x in network.parameters()}
            layers = [x for network in nets for x in network.modules()]
            linear = [layer for layer in layers if isinstance(layer, nn.Linear)]

            # An autocast inside of the model is seen by what its layers give.
            def given(layer: nn.Module, inputs: Any, output: Tensor) -> None:
                kinds.add(output.dtype)

            with hooked(dict.fromkeys(linear, given)):
                alone = _log_densities(self.run(one), values)
            # Another number than there are data, or it might be taken for them.
            number = 3 if any(2 in x.shape for x in alone.values()) else 2
            number = min(number, self.at_once)
            # Others before it: of copies alone a mean over the stack would be right.
            sets = [*(moved() for _ in range(number - 1)), one]
            stack = {site: torch.stack([w[site] for w in sets]) for site in one}
            together = _log_densities(self.run_stack(stack), values)
            for name, expected in alone.items():
                last = together[name].reshape(number, *expected.shape)[-1]
                if _are_same(last, expected, kinds):
                    continue
                # A model that draws random numbers says something else each time.
                again = _log_densities(self.run(one), values)[name]
                if _are_same(again, expected, kinds):
                    return name
        self._remember(any(x.numel() > 1 for x in alone.values()))
        return None

    def _is_seen(self) -> bool:
        try:
            seen = _SEEN.get(self.model, ())
        except TypeError:  # it takes no weak references
            return False
        shapes = self._shapes()
        return all((s, None) in seen or (s, shapes) in seen for s in self.sites)

    def _remember(self, several: bool) -> None:
        shapes = None if several else self._shapes()
        with suppress(TypeError):
            _SEEN.setdefault(self.model, set()).update((s, shapes) for s in self.sites)

    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        tensors = (x for x in tree_leaves([*self.inputs]) if isinstance(x, Tensor))
        return tuple(tuple(x.shape) for x in tensors)


def _is_real(node: Any) -> bool:
    """Whether a site may have any real number."""
    if node is None or not node["value"].is_floating_point():
        return False
    support = getattr(node["fn"], "support", None)
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real


def _log_densities(trace: Any, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of each datum at given outcomes, by site."""
    return {
        name: trace.nodes[name]["fn"].log_prob(value) for name, value in values.items()
    }


def _are_same(found: Tensor, expected: Tensor, kinds: Set[torch.dtype]) -> bool:
    """Whether no more than rounding lies between log densities.

    Args:
        found: Of each datum.
        expected: Likewise.
        kinds: What else was computed in on the way to them.
    """
    epsilon = max(
        torch.finfo(kind).eps if kind.is_floating_point else _QUANTISED
        for kind in {found.dtype, *kinds}
    )
    rounding = min(epsilon**0.5, _MOST_ROUNDING)
    size = expected.abs().where(expected.isfinite(), torch.zeros_like(expected)).sum()
    number = max(1, expected.numel())
    both_nan = found.isnan() & expected.isnan()
    near = (found - expected).abs() <= rounding * (1 + size / number)
    return bool(ask(((found == expected) | both_nan | near).all(), usual=True))
