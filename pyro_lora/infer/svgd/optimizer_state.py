"""State of a ``pyro.optim`` optimiser for tensors that the param store doesn't know."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

_LARGEST = 1e30  # of what optimisers keep; far from it, they'd have failed
# Tensors of torch's and Pyro's optimisers that are sums of squares, counts or sizes.
_NOT_NEGATIVE = frozenset(
    "step exp_avg_sq max_exp_avg_sq square_avg exp_inf acc_delta sum step_size".split()
)


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
        ValueError: If a state is that of another kind of optimiser, or of none;
            ``optim`` is then unchanged.
    """
    restored = []
    for tensor, saved in states:
        if not saved:
            continue
        inner = optim._get_optim(tensor)
        state = _checked(copy.deepcopy(saved), optim, inner, tensor)
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


def _checked(
    state: dict[str, Any], optim: PyroOptim, inner: Any, tensor: Tensor
) -> dict[str, Any]:
    """The state, of the form that this optimiser's own has after a step.

    Raises:
        ValueError: If it has another.
    """
    scheduled = isinstance(inner, LRScheduler)
    keys = {"kind", "optimizer", *(["scheduler"] if scheduled else [])}
    if state.get("kind") != _kind(inner):
        raise ValueError(
            f"The state is that of {state.get('kind')!s:.80}, this optimiser is "
            f"{_kind(inner)}. Give SVGD the same optimiser as before."
        )
    if state.keys() != keys:
        raise ValueError(
            f"The optimiser's state has {sorted(map(str, state))}, expected "
            f"{sorted(keys)}."
        )
    probe = torch.zeros_like(tensor).requires_grad_()
    like = optim._get_optim(probe)
    if isinstance(like, LRScheduler):
        state["scheduler"] = _as(like.state_dict(), state["scheduler"], "scheduler")
        like = like.optimizer
    fresh, saved = like.state_dict(), state["optimizer"]
    if not isinstance(saved, dict) or saved.keys() != fresh.keys():
        raise ValueError(f"optimizer: expected the fields {list(fresh)}.")
    groups = _as(fresh["param_groups"], saved["param_groups"], "param_groups")
    like.load_state_dict({**fresh, "param_groups": copy.deepcopy(groups)})
    devices = [probe.device] if probe.is_cuda else []
    with torch.random.fork_rng(devices):  # some optimisers draw noise
        probe.grad = torch.zeros_like(probe)
        try:
            like.step()
        except (ArithmeticError, RuntimeError) as error:  # an integer of 30 digits, say
            raise ValueError(
                f"optimizer: it can't step with param_groups {groups!r:.300} ({error})."
            ) from error
    own = _as(like.state_dict()["state"], saved["state"], "state")
    return {**state, "optimizer": {**saved, "param_groups": groups, "state": own}}


def _as(like: Any, saved: Any, path: str) -> Any:
    """What was saved, if it's of the form of ``like``; flags it lacks from there.

    Args:
        like: What this optimiser has: mappings, lists, tensors, numbers, flags.
        saved: What is to take its place.
        path: Of it, for messages.

    Raises:
        ValueError: If it has another form, another flag, or numbers that can't be.
    """
    name = path.rpartition(".")[2]
    wrong = ValueError(
        f"optimizer: {path} is {saved!r:.60}, where this optimiser has {like!r:.60}. "
        "Give SVGD the same optimiser as before."
    )
    if isinstance(like, Tensor):
        fits = isinstance(saved, Tensor) and (saved.shape, saved.dtype) == (
            like.shape,
            like.dtype,
        )
        if not fits or not (saved.abs() <= _LARGEST).all():
            raise wrong
        if name in _NOT_NEGATIVE and (saved < 0).any():
            raise wrong
        return saved
    if like is None or isinstance(like, bool | str | Counter):
        if type(saved) is not type(like) or saved != like:
            raise wrong
        return saved
    if isinstance(like, int | float):
        if type(saved) not in (int, float):
            raise wrong
        at_most = _LARGEST
        if math.isinf(like):
            at_most = math.inf
        elif "beta" in name:  # at 1 a running mean never starts
            at_most = 1 - 1e-12
        at_least = -at_most if like < 0 or math.isinf(like) else 0.0
        if not at_least <= saved <= at_most or (name == "eps" and saved == 0 < like):
            raise wrong
        return saved
    if isinstance(like, Mapping):
        if not isinstance(saved, Mapping):
            raise wrong
        flags = {k: x for k, x in like.items() if x is None or isinstance(x, bool)}
        unknown = [
            k
            for k, x in saved.items()
            if k not in like and not (x is None or isinstance(x, bool))
        ]
        missing = [k for k in like if k not in saved and k not in flags]
        if unknown or missing:
            raise ValueError(
                f"optimizer: {path} has {unknown!s:.80} too many and {missing!s:.80} "
                "too few. Give SVGD the same optimiser as before."
            )
        return flags | {  # other versions of torch have fewer or more
            k: _as(like[k], x, f"{path}.{k}") for k, x in saved.items() if k in like
        }
    if isinstance(like, list | tuple):
        if type(saved) is not type(like) or len(saved) != len(like):
            raise wrong
        parts = zip(like, saved, strict=True)
        return type(like)([_as(a, b, f"{path}[].{name}") for a, b in parts])
    if type(saved) is not type(like):
        raise wrong
    return saved


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
