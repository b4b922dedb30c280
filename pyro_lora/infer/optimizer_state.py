"""State of a ``pyro.optim`` optimiser for tensors that the param store doesn't know."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau


def check_optimizer(optim: object) -> None:
    """Refuse what can't step particles.

    Raises:
        TypeError: If it isn't from ``pyro.optim``.
        ValueError: If it has per-parameter callables.
    """
    if not isinstance(optim, PyroOptim):
        raise TypeError(
            "optim must come from pyro.optim, such as pyro.optim.Adam({'lr': 1e-3}), "
            f"found {type(optim).__name__}."
        )
    if callable(optim.pt_optim_args) or callable(optim.pt_clip_args):
        raise ValueError(
            "Per-parameter callables need names from Pyro's param store, where "
            "particles aren't. Give the optimiser a dict of arguments."
        )


def optimizer_state(optim: PyroOptim, tensor: Tensor) -> dict[str, Any]:
    """The state that the optimiser keeps for one tensor.

    Args:
        optim: The optimiser, or a scheduler around one.
        tensor: A leaf that it has stepped.

    Returns:
        A copy: ``kind``, ``optimizer``, and ``scheduler`` where there is one; empty
        before the first step.
    """
    inner = optim.optim_objs.get(tensor)
    if inner is None:
        return {}
    state: dict[str, Any] = {"kind": _kind(inner)}
    if isinstance(inner, LRScheduler):
        state["scheduler"] = inner.state_dict()
        inner = inner.optimizer
    state["optimizer"] = inner.state_dict()
    return copy.deepcopy(state)


def restore_optimizer(
    optim: PyroOptim,
    states: Sequence[tuple[Tensor, dict[str, Any]]],
    replaced: Iterable[Tensor],
) -> None:
    """Make the optimiser go on with tensors from saved states.

    Args:
        optim: The optimiser, of the same kind as the one saved.
        states: The leaves to step, each with its :func:`optimizer_state`.
        replaced: Leaves to forget.

    Raises:
        ValueError: If a state is that of another kind of optimiser; ``optim`` is then
            unchanged.
    """
    restored = []
    for tensor, saved in states:
        if not saved:
            continue
        state = copy.deepcopy(saved)
        inner = optim._get_optim(tensor)
        if state["kind"] != _kind(inner):
            raise ValueError(
                f"The state is that of {state['kind']}, this optimiser is "
                f"{_kind(inner)}. Give SVGD the same optimiser as before."
            )
        if isinstance(inner, LRScheduler):
            inner.load_state_dict(state["scheduler"])
            inner.optimizer.load_state_dict(state["optimizer"])
        else:
            inner.load_state_dict(state["optimizer"])
        restored.append((tensor, inner))
    for tensor in replaced:
        optim.optim_objs.pop(tensor, None)
        optim.grad_clip.pop(tensor, None)
    for tensor, inner in restored:
        optim.optim_objs[tensor] = inner
        optim.grad_clip[tensor] = optim._get_grad_clip(tensor)  # type: ignore[arg-type]


def step_schedulers(optim: PyroOptim, tensors: Iterable[Tensor], loss: float) -> None:
    """Step the schedulers of these tensors; others of the optimiser stay.

    Args:
        optim: An optimiser; nothing happens where it is no scheduler.
        tensors: Leaves that it has stepped.
        loss: What ``ReduceLROnPlateau`` looks at.
    """
    for tensor in tensors:
        inner = optim.optim_objs[tensor]
        if isinstance(inner, ReduceLROnPlateau):
            inner.step(loss)
        elif isinstance(inner, LRScheduler):
            inner.step()


def _kind(inner: Any) -> str:
    name = type(inner).__name__
    if isinstance(inner, LRScheduler):
        return f"{name}({_kind(inner.optimizer)})"
    return name
