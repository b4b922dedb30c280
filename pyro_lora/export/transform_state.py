"""Bijections onto supports as JSON-like descriptions and named tensors, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import msgspec
import torch
from pyro.distributions import transforms as pyro_transforms
from torch import Tensor
from torch.distributions import transforms
from torch.distributions.transforms import Transform

from pyro_lora.ground.checked_tensors import CheckedTensors, check_broadcasts
from pyro_lora.ground.tensor_folder import Real, Schema

Tensors = dict[str, Tensor]
Dims = Annotated[int, msgspec.Meta(ge=0, le=8)]

# Those of ``biject_to`` that have no settings.
_PLAIN = {
    kind.__name__: kind
    for kind in (
        transforms.ExpTransform,
        transforms.SigmoidTransform,
        transforms.SoftplusTransform,
        transforms.StickBreakingTransform,
        transforms.CorrCholeskyTransform,
        pyro_transforms.OrderedTransform,
    )
}


class _Exp(Schema, tag_field="kind", tag="ExpTransform"): ...


class _Sigmoid(Schema, tag_field="kind", tag="SigmoidTransform"): ...


class _Softplus(Schema, tag_field="kind", tag="SoftplusTransform"): ...


class _StickBreaking(Schema, tag_field="kind", tag="StickBreakingTransform"): ...


class _CorrCholesky(Schema, tag_field="kind", tag="CorrCholeskyTransform"): ...


class _Ordered(Schema, tag_field="kind", tag="OrderedTransform"): ...


class _Affine(Schema, tag_field="kind", tag="AffineTransform"):
    event_dim: Dims
    loc: Real | None = None  # None: a tensor
    scale: Real | None = None


class _Independent(Schema, tag_field="kind", tag="IndependentTransform"):
    base: TransformDescription
    dims: Dims


class _Compose(Schema, tag_field="kind", tag="ComposeTransform"):
    parts: Annotated[tuple[TransformDescription, ...], msgspec.Meta(max_length=8)]


_WithoutSettings = (
    _Exp | _Sigmoid | _Softplus | _StickBreaking | _CorrCholesky | _Ordered
)
TransformDescription = _WithoutSettings | _Affine | _Independent | _Compose


def describe_transform(
    transform: Transform, prefix: str
) -> tuple[dict[str, Any], Tensors]:
    """What :func:`restore_transform` needs.

    Args:
        transform: A bijection as ``biject_to`` makes it.
        prefix: Put before the tensors' names.

    Returns:
        A description that JSON can hold, and named tensors.

    Raises:
        ValueError: If the transform is of another type.
    """
    kind = type(transform).__name__
    if isinstance(transform, transforms.ComposeTransform):
        parts: list[dict[str, Any]] = []
        tensors: Tensors = {}
        for index, part in enumerate(transform.parts):
            description, found = describe_transform(part, f"{prefix}{index}/")
            parts.append(description)
            tensors |= found
        return {"kind": kind, "parts": parts}, tensors
    if isinstance(transform, transforms.IndependentTransform):
        base, tensors = describe_transform(transform.base_transform, prefix)
        dims = transform.reinterpreted_batch_ndims
        return {"kind": kind, "base": base, "dims": dims}, tensors
    if isinstance(transform, transforms.AffineTransform):
        description = {"kind": kind, "event_dim": transform.event_dim}
        tensors = {}
        for name in ("loc", "scale"):
            value = getattr(transform, name)
            if isinstance(value, Tensor):
                tensors[f"{prefix}{name}"] = value
            else:
                description[name] = value
        return description, tensors
    if _PLAIN.get(kind) is not type(transform):
        raise ValueError(f"its support is mapped by {kind}, which save doesn't know")
    return {"kind": kind}, {}


def restore_transform(
    description: TransformDescription,
    tensors: CheckedTensors,
    in_dtypes: Callable[[Tensors], Tensors],
    value: Tensor,
) -> Transform:
    """The transform that :func:`describe_transform` described.

    Args:
        description: As returned by ``describe_transform``.
        tensors: As returned by ``describe_transform``.
        in_dtypes: Brings tensors to the network's dtype.
        value: On the support, what it maps to.

    Returns:
        The transform.

    Raises:
        ValueError: If a tensor is missing or something else, or no transform maps
            onto ``value``.
    """
    what = f"the transform {tensors.prefix}"
    transform = _restored(description, tensors, in_dtypes, value)
    try:
        u = transform.inv(value)
        again = transform(u)
        finite = transform.log_abs_det_jacobian(u, again).isfinite().all()
        shape = transform.inverse_shape(value.shape)
    except (ValueError, RuntimeError, AssertionError, IndexError) as error:
        raise ValueError(
            f"{what} can't map to {tuple(value.shape)}: {error}"
        ) from error
    rounding = 10 * torch.finfo(value.dtype).eps ** 0.5
    form = again.shape, again.dtype
    same = form == (value.shape, value.dtype) and torch.allclose(
        again, value, rtol=rounding, atol=rounding
    )
    if not (same and finite and u.isfinite().all() and u.shape == shape):
        raise ValueError(f"{what} isn't onto a support that has the site's value")
    return transform


def _restored(
    description: TransformDescription,
    tensors: CheckedTensors,
    in_dtypes: Callable[[Tensors], Tensors],
    value: Tensor,
) -> Transform:
    if isinstance(description, _Compose):
        parts = [
            _restored(part, tensors.under(f"{index}/"), in_dtypes, value)
            for index, part in enumerate(description.parts)
        ]
        return transforms.ComposeTransform(parts)
    if isinstance(description, _Independent):
        base = _restored(description.base, tensors, in_dtypes, value)
        return transforms.IndependentTransform(base, description.dims)
    if isinstance(description, _Affine):
        loc, scale = (
            _affine(tensors, name, getattr(description, name), in_dtypes, value)
            for name in ("loc", "scale")
        )
        if (torch.as_tensor(scale) == 0).any():
            raise ValueError(f"the transform {tensors.prefix} has a scale of 0")
        return transforms.AffineTransform(loc, scale, description.event_dim)
    found: Transform = _PLAIN[str(description.__struct_config__.tag)]()
    return found


def _affine(
    tensors: CheckedTensors,
    name: str,
    number: float | None,
    in_dtypes: Callable[[Tensors], Tensors],
    value: Tensor,
) -> Tensor | float:
    if number is not None:
        return number
    x = tensors.real(name)
    check_broadcasts(x, value.shape, f"tensor {tensors.prefix}{name}")
    return in_dtypes({tensors.prefix + name: x})[tensors.prefix + name]
