"""Bijections onto supports as JSON-like descriptions and named tensors, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyro.distributions import transforms as pyro_transforms
from torch import Tensor
from torch.distributions import transforms
from torch.distributions.transforms import Transform

Tensors = dict[str, Tensor]

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
    description: Mapping[str, Any], tensors: Tensors, prefix: str
) -> Transform:
    """The transform that :func:`describe_transform` described.

    Args:
        description: As returned by ``describe_transform``.
        tensors: As returned by ``describe_transform``.
        prefix: As given to ``describe_transform``.

    Returns:
        The transform.

    Raises:
        KeyError: If a tensor or a field is missing.
    """
    kind = description["kind"]
    if kind == "ComposeTransform":
        parts = [
            restore_transform(part, tensors, f"{prefix}{index}/")
            for index, part in enumerate(description["parts"])
        ]
        return transforms.ComposeTransform(parts)
    if kind == "IndependentTransform":
        base = restore_transform(description["base"], tensors, prefix)
        return transforms.IndependentTransform(base, description["dims"])
    if kind == "AffineTransform":
        loc, scale = (
            description[name] if name in description else tensors[f"{prefix}{name}"]
            for name in ("loc", "scale")
        )
        return transforms.AffineTransform(loc, scale, description["event_dim"])
    found: Transform = _PLAIN[kind]()
    return found
