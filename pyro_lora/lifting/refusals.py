"""What can't be lifted, and what to do instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any

import torch
from peft.tuners.cpt import CPTEmbedding
from peft.tuners.lora.layer import MultiheadAttention
from peft.tuners.xlora import XLoraModel
from torch import Tensor, nn


def check_network(model: nn.Module) -> None:
    """Check that calling the network leaves base and bound weights alone.

    Raises:
        ValueError: If it doesn't: LoRA of ``nn.MultiheadAttention``, X-LoRA, CPT, or
            4-bit layers that bitsandbytes has packed for inference on a CPU.
    """
    for path, module in model.named_modules():
        if isinstance(module, MultiheadAttention):
            raise ValueError(
                f"{path}: LoRA of nn.MultiheadAttention changes the base weights at "
                "every call and can't be lifted. Adapt torch.nn.Linear layers."
            )
        if isinstance(module, XLoraModel):
            raise ValueError(
                "X-LoRA mixes several adapters and switches off their gradients at "
                "every call, so it can't be lifted. Load one LoRA adapter."
            )
        if isinstance(module, CPTEmbedding):
            raise ValueError(
                f"{path}: CPT writes into its own weights at every call, so it can't "
                "be lifted. Use another method of prompt learning, or LoRA."
            )
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"{path}: bitsandbytes has packed this 4-bit layer for inference on "
                "the CPU, which has no gradient. Load the network again and lift it "
                "before its first call in evaluation mode, or use a GPU."
            )


def keep_bitsandbytes_differentiable(model: nn.Module) -> None:
    """Stop 4-bit layers from packing their weights in place, which has no gradient.

    bitsandbytes does so on some CPUs at the first call in evaluation mode.
    """
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            vars(module)["support_avx512bf16_for_cpu"] = False


def check_storages(lifted: Iterable[str], model: nn.Module) -> None:
    """Check that no lifted parameter shares its numbers with another one.

    One ``nn.Parameter`` in several places is one parameter. Two of them on the same
    numbers, as PEFT's ``ensure_weight_tying`` makes of the matrices for tied
    embeddings, would be sites that move independently.

    Args:
        lifted: Names of lifted parameters.
        model: The network.

    Raises:
        ValueError: Naming both.
    """
    by_storage: dict[Any, list[tuple[str, Tensor]]] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        # Quantised types and the like have no storage of their own, and no gradient.
        if type(tensor) in (nn.Parameter, Tensor) and tensor.numel():
            start = tensor.device, tensor.untyped_storage().data_ptr()
            by_storage.setdefault(start, []).append((name, tensor))
    names = set(lifted)
    for (_, start), tensors in by_storage.items():
        own = [pair for pair in tensors if pair[0] in names]
        for (one, x), (two, y) in product(own if start else [], tensors):  # 0: no data
            if x is not y and _overlap(x, y):
                raise ValueError(
                    f"Parameters {one!r} and {two!r} are two views of the same numbers "
                    "(tied by PEFT's ensure_weight_tying=True, perhaps), and would be "
                    "lifted as if they could differ. Leave one out (of target_modules, "
                    "say), or share one nn.Parameter."
                )


def _overlap(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors on one storage have numbers in common."""
    if x.element_size() != y.element_size():
        return True  # one reads the other's bytes as another type
    starts = [z.storage_offset() for z in (x, y)]
    steps = [zip(z.shape, z.stride(), strict=True) for z in (x, y)]
    ends = [
        1 + start + sum((size - 1) * stride for size, stride in of_dims)
        for start, of_dims in zip(starts, steps, strict=True)
    ]
    if ends[0] <= starts[1] or ends[1] <= starts[0]:
        return False
    marked = torch.zeros(max(ends), dtype=torch.bool)
    marked.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(True)
    return bool(marked.as_strided(y.shape, y.stride(), y.storage_offset()).any())


def check_parameter(
    name: str, kind: str, parameter: nn.Parameter, modules: Mapping[str, nn.Module]
) -> None:
    """Check that a parameter can be lifted.

    Args:
        name: Its full name.
        kind: The first part of its site's name, or "other adapter".
        parameter: The parameter.
        modules: The network's modules by path.

    Raises:
        ValueError: If it belongs to another adapter or to a recurrent layer, or has no
            values.
    """
    holder = modules[name.rpartition(".")[0]]
    if kind == "other adapter":
        raise ValueError(
            f"Trainable parameter {name!r} belongs to an adapter that isn't lifted. "
            "Freeze it, or lift that adapter by adapter=."
        )
    if isinstance(holder, nn.RNNBase):
        raise ValueError(
            f"Parameter {name!r} can't be lifted: {type(holder).__name__} keeps "
            "references of its own to its weights. Freeze it (requires_grad_(False))."
        )
    if parameter.is_meta:
        raise ValueError(
            f"Parameter {name!r} can't be lifted: it is on the meta device and has no "
            "values (offloaded, perhaps). Load the network whole, or freeze it "
            "(requires_grad_(False))."
        )
