"""Networks whose layers are split over processes, which run each pass together.

With FSDP2 a layer's weights are gathered for each of its calls, and for each backward
pass; with tensor parallelism each process computes a part of its output. A process that
ran the network once more than another would wait for it; one that ran it on other data
would, with tensor parallelism, add parts of different outputs. So all meet before each
pass, where an error of one becomes that of all. None runs the network once more to find
out what is wrong, nor may it fail inside of a pass: the others are in it, too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from pyro_lora.ground.ranks import Ranks, agreed, all_ranks
from pyro_lora.ground.synchronisation import before_all_ranks


def is_split(parameter: Any) -> bool:
    """Whether a process has a part of it only: a DTensor."""
    return getattr(parameter, "device_mesh", None) is not None


def has_parts(network: nn.Module) -> bool:
    """Whether a process has a part only of one of a network's parameters."""
    return any(map(is_split, network.parameters()))


def is_spread(network: nn.Module) -> bool:
    """Whether processes share a network's layers out, also while they are whole."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # loaded by who uses it
    kinds = () if fsdp is None else fsdp.FSDPModule
    return has_parts(network) or any(isinstance(x, kinds) for x in network.modules())


def is_tensor_parallel(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether each process computes a part of a parameter's layer.

    FSDP's layers are split over processes between their calls only.

    Args:
        name: The parameter's full name.
        modules: The network's modules by path.
    """
    holder = name.rpartition(".")[0]
    path = name.partition(".lora_")[0]
    layer = modules.get(f"{path}.base_layer", modules[holder])
    if getattr(layer, "_hf_tp_plan", None) is not None:  # transformers' own
        return True
    if not is_split(getattr(layer, "weight", None)):
        return False
    from torch.distributed.fsdp import FSDPModule  # loaded by who made the DTensor

    parts = name.split(".")
    above = (modules.get(".".join(parts[:i])) for i in range(len(parts)))
    return not any(isinstance(module, FSDPModule) for module in above)


def meet(network: nn.Module, what: str = "a pass") -> None:
    """Wait for the processes that have other parts of a network, before a pass of it.

    Args:
        network: The network.
        what: The pass, in words.

    Raises:
        agreed: A ValueError, if one of them is elsewhere, or its error.
    """
    before_all_ranks()
    ranks = ranks_of(network)
    ranks.meet(f"{what} of a network that is split over them, as many for each")


def meet_before_backward(network: nn.Module, outputs: Iterable[Tensor]) -> None:
    """Let them meet before gradients flow into the network, too.

    Args:
        network: The network.
        outputs: Functions of what it gave: hooks of its own outputs come after FSDP's.
    """
    for x in outputs:
        if x.grad_fn is not None:
            x.grad_fn.register_prehook(lambda _: meet(network, "a backward pass"))


def check_alike(
    network: nn.Module, weights: Mapping[str, Tensor], inputs: Mapping[Any, Any]
) -> None:
    """Check that all who compute parts of the same outputs are given the same.

    Args:
        network: With layers that are split by tensor parallelism.
        weights: Bound to it, by name.
        inputs: By name or place.

    Raises:
        agreed: A ValueError, if they aren't.
    """
    meet(network)
    ranks = ranks_of(network)
    tensors = {str(k): x for k, x in inputs.items() if isinstance(x, Tensor)}
    other = ranks.differing({**weights, **tensors})
    if other is not None:
        name, rank = other
        raise agreed(
            ValueError(
                "Layers of the network are split over processes by tensor parallelism, "
                f"but rank {rank} runs it with another {name!r} than rank 0. All need "
                "the same data and particles: batches that aren't shared out, and mesh="
                f"init_device_mesh(device, (1, 1, {ranks.size}), mesh_dim_names="
                "('data', 'particles', 'tensor'))."
            )
        )


def ranks_of(network: nn.Module) -> Ranks:
    """The processes that have a network's parts.

    Args:
        network: With a parameter that is split.
    """
    parts: Any = filter(is_split, network.parameters())
    mesh, everyone = next(parts).device_mesh, all_ranks()
    # Whoever is elsewhere meets all processes there, so that this is noticed.
    return everyone if mesh.size() == everyone.size else Ranks(mesh.get_group(0))
