"""Digests of values, the same in every process: of batches, models and settings.

A function is its bytecode, constants, defaults and what it closes over; an object its
type and attributes; a tensor its dtype, shape and values. Another closure of the same
name has another digest, and so has the same text under another version of Python.
Libraries' functions are their names. What is only known by its type, such as an open
file, is only that.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Mapping, Set
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_lora.lifting.fingerprint import sample
from pyro_lora.lifting.lifted_network import LiftedNetwork

_LIBRARIES = ("torch", "pyro", "transformers", "peft", "numpy", "builtins", "functools")
_MOST = 100_000  # values in one object; beyond them, the rest doesn't count


def update(digest: Any, value: object) -> None:
    """Add a value to a digest.

    Args:
        digest: Of ``hashlib``.
        value: Any; of what isn't known, the type.
    """
    _Walk(digest).add(value)


class _Walk:
    """One value and all that it's made of, each object once."""

    def __init__(self, digest: Any) -> None:
        self._digest = digest
        self._seen: dict[int, Any] = {}  # the objects too, so that no id is used again

    def add(self, value: Any) -> None:
        if value is None or isinstance(
            value, bool | int | float | complex | str | bytes
        ):
            self._say(type(value).__name__, value)
            return
        if id(value) in self._seen or len(self._seen) > _MOST:
            self._say("again")
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, np.ndarray | np.generic):
            array = np.asarray(value)
            if array.dtype == object:
                self.add(array.tolist())
            else:
                self._say("array", array.dtype.str, array.shape)
                self._digest.update(np.ascontiguousarray(array).tobytes())
        elif isinstance(value, weakref.WeakKeyDictionary):
            self._say("cache")  # which fills as it's used, singledispatch's for one
        elif isinstance(value, Mapping):
            self._say("mapping", len(value))
            for key in sorted(value, key=_said):
                self.add(key)
                self.add(value[key])
        elif isinstance(value, list | tuple):
            self._say("sequence", len(value))
            for inner in value:
                self.add(inner)
        elif isinstance(value, Set):
            self._say("set", *sorted(map(_said, value)))
        elif isinstance(value, functools.partial):
            self._say("partial")
            self.add([value.func, value.args, value.keywords])
        elif isinstance(value, types.MethodType):
            self._say("method")
            self.add([value.__func__, value.__self__])
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.CodeType):
            self._code(value)
        elif isinstance(value, type | types.ModuleType | types.BuiltinFunctionType):
            self._say(getattr(value, "__module__", ""), value.__name__)
        elif isinstance(value, LiftedNetwork):
            self._say("lifted", *value.sites)  # and its fingerprint
        elif isinstance(value, nn.Module):
            self._module(value)
        else:
            self._object(value)

    def _say(self, *words: object) -> None:
        self._digest.update(repr(words).encode(errors="surrogatepass"))

    def _tensor(self, value: Tensor) -> None:
        x = value.detach()
        self._say("tensor", str(x.dtype), tuple(x.shape))
        if x.device.type != "meta" and type(value) in (Tensor, nn.Parameter):
            # A copy: an expanded number counts as contiguous, with strides of 0.
            flat = x.cpu().clone(memory_format=torch.contiguous_format).reshape(-1)
            self._digest.update(flat.view(torch.uint8).numpy())

    def _module(self, value: nn.Module) -> None:
        # What is trained is the fit's mode, or moves; of the rest a sample will do.
        self._say("module", type(value).__qualname__)
        for module in value.modules():
            kind = type(module)
            if kind.__module__.split(".")[0] not in _LIBRARIES:
                self._say(kind.__module__, kind.__qualname__)
                self._written(kind, "forward")
                self.add({n: x for n, x in vars(module).items() if n[0] != "_"})
        for name, x in value.named_parameters():
            if not x.requires_grad:
                self._say(name, str(x.dtype), tuple(x.shape))
                self._tensor(sample(x))

    def _function(self, value: types.FunctionType) -> None:
        self._say("function", value.__module__, value.__qualname__)
        if (value.__module__ or "").split(".")[0] in _LIBRARIES:
            # A handler's wrapper is the library's; what it wraps is in its closure.
            self._cells(value)
            return
        self._code(value.__code__)
        self.add([value.__defaults__, value.__kwdefaults__])
        self._cells(value)
        for name in _names(value.__code__):
            named = value.__globals__.get(name)
            if not isinstance(named, types.ModuleType | type | nn.Module):
                self.add([name, named])

    def _written(self, kind: type, name: str) -> None:
        """A method that a class or one that it inherits from has, in Python."""
        method = getattr(kind, name, None)
        if isinstance(method, types.FunctionType):
            self.add(method)

    def _cells(self, value: types.FunctionType) -> None:
        # What singledispatch makes: one type more changes nothing for the others.
        dispatches = hasattr(value, "registry") or value.__module__ == "functools"
        for name, cell in zip(
            value.__code__.co_freevars, value.__closure__ or (), strict=True
        ):
            if dispatches and name in ("cache_token", "registry"):
                continue  # all ABCs' classes, counted, and all types that are known
            self._say(name)
            try:
                self.add(cell.cell_contents)
            except ValueError:  # not yet assigned
                self._say("empty")

    def _code(self, code: types.CodeType) -> None:
        self._say("code", code.co_code, code.co_names, code.co_varnames)
        for constant in code.co_consts:
            self.add(constant)

    def _object(self, value: Any) -> None:
        kind = type(value)
        self._say("object", kind.__module__, kind.__qualname__)
        self._written(kind, "__call__")
        if is_dataclass(value):
            self.add({f.name: getattr(value, f.name, None) for f in fields(value)})
        elif kind.__module__.split(".")[0] not in ("_io", "threading", "logging"):
            self.add(getattr(value, "__dict__", {}))


def _names(code: types.CodeType) -> tuple[str, ...]:
    """The global names in a function, and in those inside of it."""
    inner = (x for x in code.co_consts if isinstance(x, types.CodeType))
    return sum((_names(x) for x in inner), code.co_names)


def _said(value: Any) -> str:
    """A word for a key or member, without an address."""
    plain = value is None or isinstance(value, str | int | float | bytes | tuple)
    return repr(value) if plain else type(value).__qualname__
