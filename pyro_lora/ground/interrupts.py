"""What is put back at the end of a block, also when Ctrl-C comes in between.

``KeyboardInterrupt`` may come between any two instructions: before a ``try``, in a
``finally``, between the end of a ``with`` block and the call of its exit. Three things
together leave no place for it:

- What puts something back is known before anything is changed, and may run twice.
- It runs in two nested ``finally``, so that where the inner one is interrupted, the
  outer one does the work again.
- It belongs to a generator: a ``with`` statement that is left without its exit being
  called drops its generator, which Python then closes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

import pyro
import torch
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK
from torch import nn
from torch.distributions import Distribution

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def undone(undo: Callable[[], None]) -> Iterator[None]:
    """Put something back at the end of a block, whatever ends it.

    Args:
        undo: What puts it back; it runs once or twice, also where the block hasn't
            changed everything yet.
    """
    try:
        try:
            yield
        finally:
            undo()
    finally:
        undo()


def leaving_no_trace(function: Callable[P, R]) -> Callable[P, R]:
    """A function after which PyTorch's and Pyro's own state is as before.

    Their context managers have one ``finally`` each, if any. An interrupt may leave
    gradients off, a handler on Pyro's stack that answers every later ``sample``, or a
    plate that Pyro takes for one that is still open.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        depth, gradients = len(_PYRO_STACK), torch.is_grad_enabled()
        plates = list(_DIM_ALLOCATOR._stack)

        def undo() -> None:
            del _PYRO_STACK[depth:]
            _DIM_ALLOCATOR._stack[:] = plates
            torch.set_grad_enabled(gradients)

        with undone(undo):
            return function(*args, **kwargs)

    return wrapper


@contextmanager
def unvalidated() -> Iterator[None]:
    """A block in which distributions take any arguments and values.

    Pyro's own block leaves PyTorch's setting at Pyro's, whatever it was.
    """
    before = bool(Distribution._validate_args)
    restore = partial(Distribution.set_default_validate_args, before)
    with undone(restore), pyro.validation_enabled(False):
        yield


@contextmanager
def eagerly() -> Iterator[None]:
    """A block in which compiled networks run as they were written.

    For passes with hooks: a graph that was compiled without them is used again, and
    leaves them out. And for backward passes from there, in which gradient checkpointing
    must run what it ran before.
    """
    stance: Any = torch.compiler.set_stance("force_eager")
    with undone(partial(stance.__exit__, None, None, None)):
        yield


@contextmanager
def hooked(
    after: Mapping[nn.Module, Callable[..., None]],
    before: Mapping[nn.Module, Callable[..., None]] = MappingProxyType({}),
) -> Iterator[None]:
    """Forward hooks for one block, in which compiled networks run eagerly.

    Args:
        after: Module -> forward hook, one that it doesn't have yet.
        before: Module -> forward pre-hook, likewise, which gets keyword arguments, too.
    """

    def remove() -> None:  # by themselves: a handle may be lost on its way here
        for module, hook in before.items():
            _remove(module._forward_pre_hooks, hook)
        for module, hook in after.items():
            _remove(module._forward_hooks, hook)

    with eagerly(), undone(remove):
        for module, hook in before.items():
            module.register_forward_pre_hook(hook, with_kwargs=True)
        for module, hook in after.items():
            module.register_forward_hook(hook)
        yield


def _remove(hooks: dict[int, Callable[..., Any]], hook: Callable[..., Any]) -> None:
    for key in [key for key, x in hooks.items() if x is hook]:
        hooks.pop(key, None)
