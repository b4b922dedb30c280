"""Whether a model says of each weight set in a stack what it says of it alone.

S weight sets are one more dim, on the left of all that a network gives: (S, B, C) for
(B, C). A model that counts dims from the left, as ``logits[:, 0]`` and ``softmax(1)``
do, is right for one weight set and mixes the data of several, often in shapes that fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from pyro_lora.ground.ranks import is_agreed
from pyro_lora.ground.synchronisation import ask
from pyro_lora.ground.weights import Weights, drawing_nothing
from pyro_lora.likelihood.model_trace import Model, lifted_networks
from pyro_lora.likelihood.outcomes import values_to_score

# The models that were seen to keep weight sets apart, on a batch of several data.
_SEEN: WeakSet[Any] = WeakSet()
_STEP = 0.1  # any, so that the network's outputs differ
_MOST_ROUNDING = 0.05  # of the largest log density
_QUANTISED = 2**-8  # in place of the machine epsilon that integers don't have


@torch.no_grad()
def check_stack(
    model: Model,
    trace: Any,
    at: Weights,
    sites: Iterable[str],
    run: Callable[[Weights], Any],
    run_stack: Callable[[Weights], Any],
    at_once: int = 3,
) -> None:
    """Check that a model may be run at several weight sets at once.

    Args:
        model: The model. One that was seen to be right isn't run again.
        trace: Of it.
        at: Site -> value, all latent sites, as there.
        sites: Those of its data, whose log densities are compared.
        run: Weight set -> trace.
        run_stack: Weight sets, (S, ...) each -> trace.
        at_once: The most that memory has room for.

    Raises:
        ValueError: Naming the site, if it isn't right.
        RuntimeError: Another rank's.
    """
    values = {name: values_to_score(trace.nodes[name]) for name in sites}
    if not values or _is_seen(model):
        return
    with drawing_nothing(at):
        # Weights of zero, as a new head's may be, would say the same of all data.
        lifted = {site for lora in lifted_networks(trace) for site in lora.sites}

        def moved() -> Weights:
            return {
                s: x + _STEP * torch.randn_like(x) if s in lifted else x
                for s, x in at.items()
            }

        one = moved()
        try:
            alone = _log_densities(run(one), values)
            # Another number than there are data, or it might be taken for them.
            number = 3 if any(2 in x.shape for x in alone.values()) else 2
            number = min(number, at_once)
            # Others before it: of copies alone a mean over the stack would be right.
            sets = [*(moved() for _ in range(number - 1)), one]
            stack = {site: torch.stack([w[site] for w in sets]) for site in one}
            together = _log_densities(run_stack(stack), values)
        except (RuntimeError, ValueError) as error:
            if is_agreed(error):
                raise
            return  # of shapes that don't fit, as whoever runs it will say
        for name, expected in alone.items():
            if together[name].numel() != number * expected.numel():
                return
            last = together[name].reshape(number, *expected.shape)[-1]
            if _are_same(last, expected, trace):
                continue
            # A model that draws random numbers says something else each time.
            if _are_same(_log_densities(run(one), values)[name], expected, trace):
                raise ValueError(
                    f"Site {name!r}: of the last of {number} weight sets in a stack "
                    "the model doesn't say what it says of it alone. Draws and "
                    "particles are one more dim, on the left of the network's outputs, "
                    "(S, B, C): count dims from the right, logits[..., 0] and "
                    "softmax(-1) for logits[:, 0] and softmax(1)."
                )
    if any(x.numel() > 1 for x in alone.values()):
        _remember(model)


def _log_densities(trace: Any, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of each datum at given outcomes, by site."""
    return {
        name: trace.nodes[name]["fn"].log_prob(value) for name, value in values.items()
    }


def _are_same(found: Tensor, expected: Tensor, trace: Any) -> bool:
    """Whether no more than rounding lies between log densities."""
    rounding = min(_precision(found, trace) ** 0.5, _MOST_ROUNDING)
    size = expected.abs().where(expected.isfinite(), torch.zeros_like(expected)).sum()
    number = max(1, expected.numel())
    both_nan = found.isnan() & expected.isnan()
    near = (found - expected).abs() <= rounding * (1 + size / number)
    return bool(ask(((found == expected) | both_nan | near).all(), usual=True))


def _precision(x: Tensor, trace: Any) -> float:
    """The coarsest machine epsilon on the way to a log density."""
    kinds = {x.dtype}
    for lora in lifted_networks(trace):
        kinds |= {parameter.dtype for parameter in lora.network.parameters()}
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        kinds.add(torch.get_autocast_dtype(device))
    return max(
        torch.finfo(kind).eps if kind.is_floating_point else _QUANTISED
        for kind in kinds
    )


def _is_seen(model: Model) -> bool:
    try:
        return model in _SEEN
    except TypeError:  # it has no hash
        return False


def _remember(model: Model) -> None:
    try:
        _SEEN.add(model)
    except TypeError:  # it has none, or takes no weak references
        return
