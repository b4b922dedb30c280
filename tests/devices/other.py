"""A second device: its tensors live in the CPU's memory, and don't meet the CPU's.

Such a tensor says ``device="other:0"`` and holds a plain one. An operation on it runs
on what it holds and gives another of its kind; with a plain tensor among its arguments
it fails, as on a GPU, but for numbers (0 dims) and for copies from one device to the
other. So what is made on a wrong device shows, on a machine without a second one.

PyTorch takes the device for one of its own only once it is registered, for the rest of
the process, where other libraries would see it, too: so use it in a process apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import return_and_correct_aliasing

_COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
# A GPU's tensors may be indexed by places on the CPU.
_INDEXED = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
)
# What PyTorch itself gives to plain tensors and their subclasses only.
_READS = {Tensor.tolist, Tensor.__repr__, Tensor.__format__}
_OF_MEMORY = {Tensor.data_ptr, Tensor.untyped_storage}


class MixedError(RuntimeError):
    """Tensors of two devices in one operation."""


class OtherTensor(Tensor):
    """A tensor on the other device."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> OtherTensor:
        made: OtherTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=torch.device("other:0"),
        )
        made.here = here
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _READS:
            return func(args[0].detach().cpu(), *args[1:], **(kwargs or {}))
        if func in _OF_MEMORY:
            return func(args[0].here)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def register() -> torch.library.Library:
    """Let PyTorch know of the device, as long as what this returns is kept."""
    from torch.utils import backend_registration

    setup: Any = backend_registration._setup_privateuseone_for_python_backend
    setup("other")
    made = torch.library.Library("aten", "IMPL")
    # All else is made by the first two, and then filled.
    for name in ("empty.memory_format", "empty_strided", "triu_indices"):
        made.impl(name, _made_by(name), "PrivateUse1")
    made.impl("copy_", _copy, "PrivateUse1")  # torch.tensor's, below __torch_dispatch__
    return made


def _made_by(name: str) -> Callable[..., OtherTensor]:
    packet, overload = (*name.split("."), "default")[:2]
    function = getattr(getattr(torch.ops.aten, packet), overload)

    def make(*args: Any, **kwargs: Any) -> OtherTensor:
        return OtherTensor(function(*args, **{**kwargs, "device": "cpu"}))

    return make


def _copy(self: OtherTensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    _here(self).copy_(_here(source))
    return self


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [x for x in given if isinstance(x, OtherTensor)]
    plain = [x for x in given if x.ndim and not isinstance(x, OtherTensor)]
    if there and plain and func not in (*_COPIES, *_INDEXED):
        shapes = [tuple(x.shape) for x in plain]
        raise MixedError(f"{func} is given tensors of the CPU, too: {shapes}")
    device = kwargs.get("device")
    stays = isinstance(args[0], OtherTensor) if func in _COPIES[:1] else bool(there)
    goes_there = stays if device is None else torch.device(device).type == "other"
    out = func(*_mapped(_here, args), **_mapped(_here, kwargs))
    if not goes_there:
        return out
    out = _mapped(_there, out)
    aliases = any(x.alias_info is not None for x in func._schema.returns)
    return return_and_correct_aliasing(func, args, kwargs, out) if aliases else out


def _mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    return pytree.tree_map(function, tree)


def _here(x: Any) -> Any:
    if isinstance(x, torch.device) and x.type == "other":
        return torch.device("cpu")
    return x.here if isinstance(x, OtherTensor) else x


def _there(x: Any) -> Any:
    return OtherTensor(x) if isinstance(x, Tensor) and type(x) is Tensor else x
