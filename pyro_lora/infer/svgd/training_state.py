"""The state of an SVGD run: particles, ``pyro.optim`` optimiser, random generators.

The optimiser steps leaves that Pyro's param store doesn't know, so its state is kept by
site. Whatever a state comes from, all of it is checked before any is taken over, the
optimiser's by the form that its own has after a step. In a folder's manifest tensors
are named, and what JSON doesn't have says its kind: of the state ``{"optim": {"w":
{"step": tensor(3.0)}}, "loss": [1.5, 1.25]}`` the manifest holds ::

    {"kind": "dict", "items": [
        ["optim", {"kind": "dict", "items": [
            ["w", {"kind": "dict", "items": [
                ["step", {"kind": "tensor", "name": "optim/w/step"}]]}]]}],
        ["loss", {"kind": "floats", "name": "loss"}]]}

and the file of tensors two, ``optim/w/step`` and ``loss``.
"""

from __future__ import annotations

import copy
import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyro_lora.ground.checked_tensors import MAX_REPEATS, CheckedTensors, stored
from pyro_lora.ground.settings import check_kind
from pyro_lora.ground.tensor_folder import (
    Count,
    Format,
    Manifest,
    Schema,
    read_folder,
    write_folder,
)
from pyro_lora.ground.weights import drawing_nothing
from pyro_lora.infer.svgd.particle_model import ParticleModel
from pyro_lora.lifting.fingerprint import NetworkDescription

Tensors = dict[str, Tensor]


class EngineState(Schema):
    """What ``SVGD.state_dict()`` gives.

    Attributes:
        values: Site -> particles on its support, (K, ...).
        particles: Site -> particles, unconstrained.
        optim: Site -> the optimiser's state.
        diagnostics: Series with one value a step.
        num_epochs: Of all runs.
        networks: What ``fingerprint.described`` says of the lifted networks.
    """

    values: Tensors
    particles: Annotated[Tensors, msgspec.Meta(min_length=1)]
    optim: dict[str, dict[str, Any]]
    diagnostics: dict[str, list[float]]
    num_epochs: Count
    networks: tuple[list[NetworkDescription], Tensors]


def checked_state(
    state: Mapping[str, Any], num_particles: int, target: ParticleModel | None
) -> EngineState:
    """The state of an engine.

    Args:
        state: From ``SVGD.state_dict()``.
        num_particles: K.
        target: The model, None where it isn't known yet.

    Returns:
        The same, checked.

    Raises:
        ValueError: If it's something else, or of another K or model.
    """
    check_kind("state", state, Mapping, "what SVGD.state_dict() gave")
    try:
        fields = msgspec.convert(dict(state), EngineState)
    except (msgspec.ValidationError, UnicodeError) as error:
        raise ValueError(
            f"Expected a state from SVGD.state_dict(), but {error}. Load another."
        ) from error
    sites = list(fields.particles)
    for name, by_site in ("values", fields.values), ("optim", fields.optim):
        if by_site.keys() != fields.particles.keys():
            raise ValueError(
                f"The state has particles at {sites}, {name!r} at {list(by_site)}."
            )
    check_shapes(fields.particles, num_particles, target)
    particles = CheckedTensors(fields.particles, "")
    values = CheckedTensors(fields.values, "")
    for site in sites:
        x = particles.real(site)
        shape = (
            None
            if target is None
            else target.latents[site].transform.forward_shape(x.shape)
        )
        value = values.real(site, shape, (x.dtype,))
        if value.shape[:1] != (num_particles,):
            raise ValueError(f"values of {site!r} have shape {tuple(value.shape)}")
    return fields


def check_shapes(
    particles: Mapping[str, Tensor], num_particles: int, target: ParticleModel | None
) -> None:
    """Refuse particles of another K or another model.

    Args:
        particles: Site -> (K, ...), unconstrained.
        num_particles: K.
        target: The model, None where it isn't known yet.

    Raises:
        ValueError: Naming the site that differs.
    """
    for site, x in particles.items():
        if x.shape[:1] != (num_particles,):
            raise ValueError(
                f"Site {site!r}: the state holds particles {tuple(x.shape)}, this SVGD "
                f"has num_particles={num_particles}. Make one with as many."
            )
    if target is None:
        return
    shapes = {site: tuple(x.shape[1:]) for site, x in particles.items()}
    expected = {site: tuple(latent.shape) for site, latent in target.latents.items()}
    for site in sorted(shapes.keys() | expected.keys()):
        if shapes.get(site) != expected.get(site):
            raise ValueError(
                f"Site {site!r}: the state holds particles of shape "
                f"{shapes.get(site)}, the model's are {expected.get(site)}. Load the "
                "state of the same model."
            )


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
    restored = []  # all before any is taken over
    for tensor, saved in states:
        if not saved:
            continue
        inner = optim._get_optim(tensor)
        state = _checked_optimizer(copy.deepcopy(saved), optim, inner, tensor)
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


def _checked_optimizer(
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
    # A leaf of the same form is stepped once, to see what state the optimiser keeps.
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
    with drawing_nothing(probe):  # some optimisers draw noise
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
        pairs = zip(like, saved, strict=True)
        return type(like)([_as(a, b, f"{path}[].{name}") for a, b in pairs])
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


class SavedState(Schema):
    """The fields of a state's manifest."""

    state: dict[str, Any]
    device: str


FORMAT = Format("pyro_lora training state", 2, "Save the state again.", SavedState)


class _Tensor(Schema, tag_field="kind", tag="tensor"):
    name: str


class _Floats(Schema, tag_field="kind", tag="floats"):
    name: str


class _Tuple(Schema, tag_field="kind", tag="tuple"):
    items: list[Any]


class _Dict(Schema, tag_field="kind", tag="dict"):
    items: list[tuple[int | str, Any]]


class _Counter(Schema, tag_field="kind", tag="counter"):
    items: list[tuple[int | str, int]]


_Node = _Tensor | _Floats | _Tuple | _Dict | _Counter


def write_state(state: Mapping[str, Any], folder: Path) -> None:
    """Write a state of :class:`~pyro_lora.SVGD`, and that of the random generators.

    Args:
        state: From ``SVGD.state_dict()``: nested dicts, lists and tuples of tensors
            and of what JSON has.
        folder: Where, in the form of ``tensor_folder``.

    Raises:
        ValueError: If the state holds something else.
    """
    device = next(iter(state["particles"].values())).device
    tensors: Tensors = {}
    whole = {**state, "random": _generators(device)}
    content = {
        "state": _encoded(whole, "", tensors),
        "device": str(device),
    }
    write_folder(folder, FORMAT, content, tensors)


def read_state(
    folder: Path, device: torch.device | str | None = None
) -> dict[str, Any]:
    """What :func:`write_state` wrote.

    Args:
        folder: Where.
        device: Where to put the tensors; None is where they were.

    Returns:
        The state, with the generators' as ``"random"``.

    Raises:
        ValueError: If the folder is missing, damaged, newer or of something else, or
            this machine doesn't have the device.
    """

    def target(manifest: Manifest) -> torch.device:
        return _device(manifest.content.device if device is None else device, folder)

    def check(manifest: Manifest) -> None:
        target(manifest)

    # Optimisers put their own tensors where the particles are, but counters on the CPU.
    manifest, tensors = read_folder(folder, FORMAT, torch.device("cpu"), check)
    there = target(manifest)
    for name, x in tensors.items():
        if x.numel() > MAX_REPEATS * stored(x).numel():
            raise ValueError(
                f"{manifest.file}: tensor {name!r} repeats what it holds to the shape "
                f"{tuple(x.shape)}. {FORMAT.remedy}"
            )
    kept = ("optim/", "random/")
    tensors = {
        name: x if name.startswith(kept) else x.to(there) for name, x in tensors.items()
    }
    try:
        state = _decoded(manifest.content.state, tensors, "state")
        if not isinstance(state, dict):
            raise ValueError("the state is no mapping")
        check_generators(state.get("random"))
    except ValueError as error:
        raise ValueError(f"{manifest.file}: {error}. {FORMAT.remedy}") from error
    return state


def _device(name: torch.device | str, folder: Path) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{folder}: {name!r:.80} is no device: {error}") from error
    if device.type == "cpu":
        return torch.device("cpu")
    here = torch.accelerator.current_accelerator()
    is_here = here is not None and here.type == device.type
    if device.type == "cuda":
        is_here = is_here and torch.cuda.is_available()
    if not is_here or (device.index or 0) >= torch.accelerator.device_count():
        raise ValueError(
            f"{folder} is the state of particles on {device}, which this machine "
            "doesn't have. Load it onto another by device='cpu'."
        )
    return device


_Word = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
_Words624 = Annotated[tuple[_Word, ...], msgspec.Meta(min_length=624, max_length=624)]
_Words625 = Annotated[tuple[_Word, ...], msgspec.Meta(min_length=625, max_length=625)]


class _Generators(Schema):
    torch: Tensor
    cuda: dict[str, Tensor]
    python: tuple[int, _Words625, float | None]  # the last is a place in the others
    numpy: tuple[str, _Words624, int, int, float]


def check_generators(state: Any) -> None:
    """Check that :func:`restore_generators` will take a state.

    Args:
        state: ``"random"`` of a state.

    Raises:
        ValueError: If it won't.
    """
    try:
        generators = msgspec.convert(state, _Generators)
        for device, value in generators.cuda.items():
            if torch.device(device).type != "cuda" or value.dtype != torch.uint8:
                raise ValueError(f"{device!r:.80} has no generator")
        torch.Generator().set_state(generators.torch)
        random.Random().setstate(generators.python)
        np.random.RandomState().set_state(generators.numpy)  # type: ignore[arg-type]
    except (
        *(ValueError, TypeError, LookupError, OverflowError, RuntimeError),
        msgspec.ValidationError,
    ) as error:
        raise ValueError(f"a random generator's state is none: {error}") from error


def restore_generators(state: Mapping[str, Any]) -> None:
    """Set the generators of torch, NumPy and Python.

    Args:
        state: ``"random"`` of :func:`read_state`. That of a device which this machine
            doesn't have is left out.
    """
    torch.set_rng_state(state["torch"])
    for device, value in state["cuda"].items():
        if (torch.device(device).index or 0) < torch.cuda.device_count():
            torch.cuda.set_rng_state(value, device)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])


def _generators(device: torch.device) -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    on_cuda = device.type == "cuda"
    return {
        "torch": torch.get_rng_state(),
        "cuda": {str(device): torch.cuda.get_rng_state(device)} if on_cuda else {},
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
    }


def _encoded(value: Any, path: str, tensors: Tensors) -> Any:
    """What JSON can hold; tensors and series of floats go into ``tensors``.

    Raises:
        ValueError: If there is anything else.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list) and value and all(type(x) is float for x in value):
        tensors[path] = torch.tensor(value, dtype=torch.float64, device="cpu")
        return {"kind": "floats", "name": path}
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"kind": "tensor", "name": path}
    if isinstance(value, list | tuple):
        items = [_encoded(x, f"{path}/{i}", tensors) for i, x in enumerate(value)]
        return items if isinstance(value, list) else {"kind": "tuple", "items": items}
    if isinstance(value, Mapping) and all(isinstance(k, int | str) for k in value):
        start = f"{path}/" if path else ""
        items = [[k, _encoded(x, f"{start}{k}", tensors)] for k, x in value.items()]
        kind = "counter" if isinstance(value, Counter) else "dict"
        return {"kind": kind, "items": items}
    raise ValueError(
        f"The state has a {type(value).__name__} at {path!r}, which no folder can "
        "store; expected tensors, numbers, strings, and lists, tuples or dicts of "
        "them. Save svgd.state_dict() by other means."
    )


def _decoded(value: Any, tensors: Tensors, path: str) -> Any:
    """What :func:`_encoded` was given.

    Raises:
        ValueError: If it's nothing that it gave.
    """
    if isinstance(value, list):
        return [_decoded(x, tensors, f"{path}[{i}]") for i, x in enumerate(value)]
    if not isinstance(value, dict):
        return value
    try:
        node = msgspec.convert(value, _Node)
    except (msgspec.ValidationError, UnicodeError) as error:
        raise ValueError(f"{path}: {error}") from error
    if isinstance(node, _Tuple):
        return tuple(_decoded(node.items, tensors, path))
    if isinstance(node, _Dict):
        return {k: _decoded(x, tensors, f"{path}.{k}") for k, x in node.items}
    if isinstance(node, _Counter):
        return Counter(dict(node.items))
    if node.name not in tensors:
        raise ValueError(f"{path}: tensor {node.name!r:.80} is missing")
    x = tensors[node.name]
    if isinstance(node, _Tensor):
        return x
    if x.dtype != torch.float64 or x.ndim != 1:
        raise ValueError(f"{path}: tensor {node.name!r:.80} is no series of floats")
    return x.tolist()
