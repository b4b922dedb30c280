"""Bytes of tensors: where they lie, and how many are in use at a time.

Of ``x = zeros(10)``, ``y = x[2:]`` and ``z = x + 1`` the first two lie in one place of
40 bytes, and 80 bytes are in use: until x and y are both gone.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_lora.ground.synchronisation import values_are_known


def address(x: Tensor) -> tuple[int, int]:
    """Where a tensor's first number is: the same for two that share their numbers.

    A pointer would tell as much, but tensors without values have none.

    Args:
        x: Which must live as long as it's compared.
    """
    return x.untyped_storage()._cdata, int(x.storage_offset())


def constant(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that makes each tensor once; but those without values are not kept."""
    kept = functools.lru_cache(maxsize=16)(function)

    @functools.wraps(function)
    def wrapper(*args: Hashable) -> Tensor:
        return (kept if values_are_known() else function)(*args)

    return wrapper


class MemoryInUse(TorchDispatchMode):
    """Counts the bytes of all tensors that operations give, while the block runs.

    Attributes:
        now: Bytes.
        most: So far; set it to ``now`` to begin anew.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._sizes: dict[weakref.ref[Any], int] = {}
        self._known: dict[int, weakref.ref[Any]] = {}

    def add(self, x: Tensor, num_bytes: int | None = None) -> None:
        """Count a tensor that was there before.

        Args:
            x: The tensor.
            num_bytes: What it takes here, where the rest is elsewhere; None is all.
        """
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if num_bytes is None else num_bytes

        def gone(_: object) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and count what it gives."""
        outputs = func(*args, **(kwargs or {}))
        for x in tree_leaves(outputs):
            if isinstance(x, Tensor):
                self.add(x)
        if func in _WORKSPACES:
            rows, columns = args[0].shape[-2:]
            size = _WORKSPACES[func](rows, columns) * args[0].element_size()
            self.most = max(self.most, self.now + size)
        return outputs


class WithoutValues(TorchDispatchMode):
    """Runs operations on tensors of the meta device, and answers what reads a value.

    An operation that has been run on such shapes before isn't run again.
    """

    def __init__(self) -> None:
        super().__init__()
        self._forms: dict[Any, Any] = {}
        self._masks: weakref.WeakSet[Any] = weakref.WeakSet()

    def mask(self, x: Tensor) -> None:
        """Say that not all values are true, and so of what is made of it."""
        self._masks.add(x.untyped_storage())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, or say what it usually gives."""
        kwargs = kwargs or {}
        if func is _READ and args[0].is_meta:
            return _USUAL.get(args[0].dtype, 1.0) and not self._is_mask(args[0])
        if func in _COMPARED:
            return True
        if not _gives_new(func) or func in _WORKSPACES:
            return func(*args, **kwargs)
        key = func, _form(args), _form(tuple(kwargs.items()))
        known = self._forms.get(key)
        if known is None:
            outputs = func(*args, **kwargs)
            if not _storages(outputs) & _storages((args, kwargs)):  # as _unsafe_view's
                self._forms[key] = _made_again(outputs)
        else:
            outputs = known()
        if args and isinstance(outputs, Tensor) and outputs.dtype in _USUAL:
            if self._is_mask(args[0]):
                self.mask(outputs)
        return outputs

    def _is_mask(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.untyped_storage() in self._masks


_aten = torch.ops.aten
_READ = _aten._local_scalar_dense.default
# Numbers that LAPACK's drivers work on, beside what they return: syevd's, and gesdd's
# with a copy of what it's given. Those of a batch take turns.
_WORKSPACES: dict[Any, Callable[[int, int], int]] = {
    _aten._linalg_eigh.default: lambda n, _: 1 + 6 * n + 2 * n**2,
    _aten._linalg_svd.default: lambda m, n: m * n + 28 * min(m, n),
}
_COMPARED = (_aten.equal.default, _aten.allclose.default)
# Whether something holds; and of a decomposition 0, that nothing went wrong.
_USUAL = {torch.bool: True, torch.int32: 0, torch.int64: 0}


@functools.cache
def _gives_new(func: Any) -> bool:
    """Whether an operation returns tensors of its own, and changes none."""
    schema = func._schema
    return not any(x.alias_info for x in (*schema.arguments, *schema.returns))


def _form(value: Any) -> Any:
    """What decides which tensors an operation gives."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, list | tuple):
        return tuple([_form(x) for x in value])
    return type(value), value


def _storages(values: Any) -> set[int]:
    return {address(x)[0] for x in tree_leaves(values) if isinstance(x, Tensor)}


def _made_again(outputs: Any) -> Callable[[], Any] | None:
    """Makes tensors like these, each in memory of its own; None if it isn't known."""
    if isinstance(outputs, Tensor):
        form: Any = {"dtype": outputs.dtype, "device": outputs.device}
        shape, stride = outputs.shape, outputs.stride()
        return lambda: torch.empty_strided(shape, stride, **form)
    if isinstance(outputs, tuple):
        each = [_made_again(x) for x in outputs]
        known = [x for x in each if x is not None]
        if len(known) == len(each):
            return lambda: tuple([x() for x in known])
    return None


class FusedAttention(TorchFunctionMode):
    """Attention as it's computed on a device, where the meta device has none.

    The fused kernels keep no weight for each pair of tokens. In a backward pass, where
    gradient checkpointing runs layers again, PyTorch's modes of functions are off: so
    there is another function in the module, too.
    """

    def __enter__(self) -> FusedAttention:
        functional.scaled_dot_product_attention = _fused
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        functional.scaled_dot_product_attention = scaled_dot_product_attention

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run a function."""
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and args[0].is_meta:
            return _attention(func, *args, **kwargs)
        return func(*args, **kwargs)


def _fused(query: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Attention where the mode is on, by the module's name for it."""
    if query.is_meta:
        return _attention(scaled_dot_product_attention, query, *args, **kwargs)
    return scaled_dot_product_attention(query, *args, **kwargs)


def _attention(
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    sizes = {x.shape[-1] for x in (query, key, value)}
    learnt = attn_mask is not None and attn_mask.requires_grad
    if dropout_p > 0 or learnt or len(sizes) > 1 or query.ndim != 4:
        rest = {"scale": scale, "enable_gqa": enable_gqa}
        return func(query, key, value, attn_mask, dropout_p, is_causal, **rest)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        zeros = torch.zeros((), dtype=query.dtype, device=query.device)
        attn_mask = zeros.where(attn_mask, -torch.inf)
    output = _aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return output
