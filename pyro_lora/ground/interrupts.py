"""What is put back at the end of a block, also when Ctrl-C comes in between.

``KeyboardInterrupt`` may come between any two instructions: before a ``try``, in a
``finally``, between the end of a ``with`` block and the call of its exit. Three things
together leave no place for it:

- What puts something back is known before anything is changed, and may run twice.
- It runs in one of two nested ``finally``: where the inner one is interrupted before
  it is done, the outer one does the work again.
- It belongs to a generator: a ``with`` statement that is left without its exit being
  called drops its generator, which Python then closes.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

import pyro
import torch
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
)

P = ParamSpec("P")
R = TypeVar("R")

_VALIDATION = (
    "validate_distributions_pyro",
    "validate_distributions_torch",
    "validate_infer",
    "validate_poutine",
)


# Pyro has one stack of handlers for all threads, and a network one set of weights.
_ONE_THREAD = threading.RLock()


@contextmanager
def undone(undo: Callable[[], object]) -> Iterator[None]:
    """Put something back at the end of a block, whatever ends it.

    Args:
        undo: What puts it back; it runs once, or twice where an interrupt comes in
            between, also where the block hasn't changed everything yet.
    """
    is_done = False
    try:
        try:
            yield
        finally:
            undo()
            is_done = True
    finally:
        if not is_done:
            undo()


def leaving_no_trace(function: Callable[P, R]) -> Callable[P, R]:
    """A function after which PyTorch's and Pyro's own state is as before.

    Their context managers have one ``finally`` each, if any. An interrupt may leave
    gradients off, a handler on Pyro's stack that answers every later ``sample``, or a
    plate that Pyro takes for one that is still open. Another thread that calls such a
    function waits for its turn.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with _ONE_THREAD:
            return alone(*args, **kwargs)

    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        depth, gradients = len(_PYRO_STACK), torch.is_grad_enabled()
        plates = list(_DIM_ALLOCATOR._stack)

        def undo() -> None:
            del _PYRO_STACK[depth:]
            _DIM_ALLOCATOR._stack[:] = plates
            torch.set_grad_enabled(gradients)

        # Without a generator: one that a traceback keeps is closed later than the
        # functions around this one have ended, and would turn their gradients off.
        try:
            try:
                return function(*args, **kwargs)
            finally:
                undo()
        finally:
            undo()

    return wrapper


@contextmanager
def entered(mode: TorchDispatchMode | TorchFunctionMode) -> Iterator[None]:
    """A block under one of PyTorch's modes, which no interrupt leaves on its stack."""

    def leave() -> None:
        of_operations = _get_current_dispatch_mode_stack()
        if mode in (*of_operations, *_get_current_function_mode_stack()):
            mode.__exit__(None, None, None)

    with undone(leave):
        mode.__enter__()
        yield


@contextmanager
def unvalidated() -> Iterator[None]:
    """A block in which distributions take any arguments and values.

    Pyro's own block leaves PyTorch's setting at Pyro's, whatever it was.
    """
    before = {name: pyro.settings.get(name) for name in _VALIDATION}
    with undone(partial(pyro.settings.set, **before)):
        pyro.enable_validation(False)
        yield


@contextmanager
def eagerly() -> Iterator[None]:
    """A block in which compiled networks run as they were written.

    For passes with hooks: a graph that was compiled without them is used again, and
    leaves them out. And for backward passes from there, in which gradient checkpointing
    must run what it ran before.
    """
    from torch._dynamo import eval_frame  # set_stance loads it, too, which takes long

    # set_stance would tell what was before only when it is already changed.
    with undone(partial(eval_frame._set_stance, eval_frame._stance)):
        torch.compiler.set_stance("force_eager")
        yield


# Hooks of :func:`hooked`, by their ids.
_WATCHING: set[int] = set()


@contextmanager
def hooked(
    after: Mapping[nn.Module, Callable[..., None]],
    before: Mapping[nn.Module, Callable[..., None]] = MappingProxyType({}),
) -> Iterator[None]:
    """Forward hooks that watch, for one block, in which compiled networks run eagerly.

    Args:
        after: Module -> forward hook, one that it doesn't have yet.
        before: Module -> forward pre-hook, likewise, which gets keyword arguments, too.
    """
    watching = {id(hook) for hook in [*after.values(), *before.values()]}

    def remove() -> None:  # by themselves: a handle may be lost on its way here
        for module, hook in before.items():
            _remove(module._forward_pre_hooks, hook)
        for module, hook in after.items():
            _remove(module._forward_hooks, hook)
        _WATCHING.difference_update(watching)

    with eagerly(), undone(remove):
        _WATCHING.update(watching)
        for module, hook in before.items():
            module.register_forward_pre_hook(hook, with_kwargs=True)
        for module, hook in after.items():
            module.register_forward_hook(hook)
        yield


def num_hooks(module: nn.Module) -> int:
    """How many forward hooks a module has that may change what it gives."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return sum(id(hook) not in _WATCHING for hook in hooks)


def _remove(hooks: dict[int, Callable[..., Any]], hook: Callable[..., Any]) -> None:
    for key in [key for key, x in hooks.items() if x is hook]:
        hooks.pop(key, None)
