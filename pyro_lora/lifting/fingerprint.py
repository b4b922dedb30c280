"""What tells a network from others of the same sites: a sample of its frozen base.

Of each frozen tensor the name, dtype, shape and 32 of its values, spread over it, are
kept, and of the adapter's and the network's settings those that change what it
computes. On an 8B model that's some hundred reads of 32 values, no pass over the
weights, so it's taken anew whenever it's asked for: nothing to go stale.

Of a tensor that is shared out over processes each sees the values of its own part, and
no other process is asked, so that one of them may write alone. What either of two
fingerprints hasn't seen isn't compared: those of a whole network and of any process's
parts of it agree.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from peft import PeftConfig
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from pyro_lora.ground.interrupts import leaving_no_trace
from pyro_lora.ground.ranks import SAME_START, Ranks
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.lifting.sites import adapter_configs, bare_names
from pyro_lora.lifting.split_layers import is_split

NUM_VALUES = 32  # of each tensor
_GOLDEN = (5**0.5 - 1) / 2  # its multiples fall evenly between 0 and 1
# Relative rounding, by which values differ that went through another dtype.
_ROUNDING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}

# An adapter's settings that are of its training, or in its parameters' names, shapes
# and scalings.
_OF_ADAPTER_ASIDE = re.compile(
    "dropout|^init_|^inference_mode$|^base_model|^revision$|version|^auto_mapping$|"
    "loftq|eva_config|corda_config|lora_ga|^r$|^lora_alpha$|rslora|^rank_pattern$|"
    "^target_|^exclude_|^layers_|^modules_to_save$|^bias$|^task_type$|"
    "^ensure_weight|^runtime_config$|^megatron|^prompt_tuning_init|^tokenizer"
)
# A network's settings that are of its training, or of how it's run, stored, spoken of.
_OF_NETWORK_ASIDE = re.compile(
    "^_|drop|init|dtype|architectures|implementation|use_cache|^output_|return_dict|"
    "torchscript|label2id|id2label|quantization|tokenizer|bos_token|eos_token|^tie_|"
    "task_specific|chunk_size|name_or_path|version|loss|problem_type|checkpointing"
)


@dataclass(frozen=True)
class Fingerprint:
    """What tells a network from others of the same sites.

    Attributes:
        tensors: Name of a frozen tensor -> its dtype and shape.
        values: Of each tensor in order, (T, 32), float32; NaN where they weren't seen.
        settings: Of the adapter and the network, as JSON has them.
    """

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    values: Tensor
    settings: Mapping[str, Any]

    def check(self, lora: LiftedNetwork, where: str) -> None:
        """Check that a network is the one that this was taken of.

        Args:
            lora: The network.
            where: What this was read from, the start of a message.

        Raises:
            ValueError: If it isn't.
        """
        difference = self._difference(fingerprint(lora))
        if difference is not None:
            raise ValueError(
                f"{where}: {difference}, so this is another network. Lift the network "
                "that it was made for."
            )

    def _difference(self, here: Fingerprint) -> str | None:
        for name in [*self.tensors, *here.tensors]:
            then, now = self.tensors.get(name), here.tensors.get(name)
            if then is None or now is None or not _comparable(then, now):
                return (
                    f"frozen tensor {name!r} is {_said(then)} there, {_said(now)} here"
                )
        order = {name: i for i, name in enumerate(here.tensors)}
        for row, (name, (dtype, _)) in zip(
            self.values, self.tensors.items(), strict=True
        ):
            other = here.values[order[name]]
            rtol, atol = rounding(dtype, here.tensors[name][0])
            unseen = row.isnan() | other.isnan()
            off = ~(torch.isclose(row, other, rtol=rtol, atol=atol) | unseen)
            if off.any():
                i = int(off.nonzero()[0])
                return (
                    f"frozen tensor {name!r} has {float(row[i]):.6g} there, where it "
                    f"has {float(other[i]):.6g} here"
                )
        for name in self.settings.keys() & here.settings.keys():
            if self.settings[name] != here.settings[name]:
                return (
                    f"{name} is {self.settings[name]!r:.80} there, "
                    f"{here.settings[name]!r:.80} here"
                )
        return None


@leaving_no_trace
@torch.no_grad()
def fingerprint(lora: LiftedNetwork) -> Fingerprint:
    """What tells a lifted network from others of the same sites.

    Tensors on the meta device, as those that are offloaded, other processes' parts and
    the running statistics of layers in training mode aren't seen.

    Args:
        lora: The network.

    Raises:
        ValueError: If the adapter is merged into the base, which has other values then.
    """
    lora.check_unmerged()
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    rows: dict[torch.device, list[Tensor]] = {}
    places: dict[torch.device, list[int]] = {}
    for name, x, seen in _frozen(lora):
        row = sample(x) if seen else _unseen("cpu")
        rows.setdefault(row.device, []).append(row)
        places.setdefault(row.device, []).append(len(tensors))
        tensors[name] = str(x.dtype).removeprefix("torch."), tuple(x.shape)
    # Rows wait on their device: reading each at once would wait for the GPU each time.
    values = torch.empty(len(tensors), NUM_VALUES, dtype=torch.float32, device="cpu")
    for device, samples in rows.items():  # one copy from each device
        values[places[device]] = torch.stack(samples).cpu()
    return Fingerprint(tensors, values, _settings(lora))


def fingerprint_of_whole(lora: LiftedNetwork) -> Fingerprint:
    """That of the whole network, with what any process has seen of it.

    All processes that have parts of the network come here, as to a pass of it.

    Args:
        lora: The network.
    """
    own = fingerprint(lora)
    values = own.values
    for other in lora.ranks.collected(values):
        values = values.where(~values.isnan(), other)
    return replace(own, values=values)


def check_same_networks(networks: Iterable[LiftedNetwork], ranks: Ranks) -> None:
    """Check that all ranks have the same frozen weights, by a few values of each.

    Args:
        networks: The networks.
        ranks: Who shares work with them.

    Raises:
        ValueError: If they don't, naming a weight and a rank.
    """
    if ranks.size == 1:
        return
    for lora in networks:
        own = fingerprint_of_whole(lora)
        values = dict(zip(own.tensors, own.values, strict=True))
        other = ranks.given_another(values)
        if other is not None:
            name, rank = other
            raise ValueError(
                f"The frozen weight {name!r} of rank {rank} is another than that of "
                f"rank 0. {SAME_START}"
            )


@dataclass(frozen=True)
class NetworkDescription:
    """A fingerprint but for its values, as JSON has it."""

    tensors: dict[str, tuple[str, tuple[int, ...]]]
    settings: dict[str, Any]


def described(prints: Sequence[Fingerprint]) -> tuple[list[Any], dict[str, Tensor]]:
    """Fingerprints as JSON has them, and their values as named tensors."""
    return (
        [{"tensors": dict(x.tensors), "settings": dict(x.settings)} for x in prints],
        {f"networks/{i}": x.values for i, x in enumerate(prints)},
    )


def restored(
    descriptions: Sequence[NetworkDescription], tensors: Mapping[str, Tensor]
) -> list[Fingerprint]:
    """The fingerprints that :func:`described` gave.

    Raises:
        ValueError: If they are something else.
    """
    prints = []
    for i, network in enumerate(descriptions):
        values, shape = tensors.get(f"networks/{i}"), (len(network.tensors), NUM_VALUES)
        if values is None or values.dtype != torch.float32 or values.shape != shape:
            raise ValueError(
                f"tensor 'networks/{i}' is missing or no float32 tensor of {shape}"
            )
        for name, (dtype, _) in network.tensors.items():
            if not isinstance(getattr(torch, dtype, None), torch.dtype):
                raise ValueError(f"networks[{i}].tensors: {name!r} has no dtype")
        prints.append(Fingerprint(network.tensors, values.cpu(), network.settings))
    return prints


def check_networks(
    saved: Sequence[Fingerprint], networks: Sequence[LiftedNetwork], what: str
) -> None:
    """Check that these networks are those that fingerprints were taken of.

    Args:
        saved: In order.
        networks: In order.
        what: What is of them, the start of a message.

    Raises:
        ValueError: If they aren't.
    """
    if len(saved) != len(networks):
        raise ValueError(
            f"{what} is of {len(saved)} networks, given were {len(networks)}. Give "
            "those that it was made for."
        )
    for one, lora in zip(saved, networks, strict=True):
        one.check(lora, what)


def _frozen(lora: LiftedNetwork) -> Iterator[tuple[str, Tensor, bool]]:
    """Names as under any adapter name, the tensors, and whether to look at values."""
    lifted = {name for names in lora.sites.values() for name in names}
    network = lora.network
    bare = bare_names(network, lora.adapter)
    unused = tuple(
        f"{path}.original_module"
        for path, module in network.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    )
    for path, module in network.named_modules():
        moved = module.training and hasattr(module, "running_mean")
        own = {
            **module._parameters,
            **{
                name: x
                for name, x in module._buffers.items()
                if name not in module._non_persistent_buffers_set
                and name != "num_batches_tracked"
            },
        }
        if path.startswith(unused):
            continue
        for attribute, x in own.items():
            name = f"{path}.{attribute}" if path else attribute
            known_as = bare(name)
            if x is None or name in lifted or known_as is None:
                continue
            yield known_as, x, not moved


def sample(x: Tensor) -> Tensor:
    """32 values spread over a tensor, float32, where it is; NaN for what isn't here."""
    x = x.detach()
    if is_split(x):
        return _sample_of_part(x)
    if type(x) not in (Tensor, nn.Parameter) and hasattr(x, "__tensor_flatten__"):
        names, _ = x.__tensor_flatten__()  # quantised: several tensors that pass as one
        inner = torch.cat([sample(getattr(x, name)).cpu() for name in names])
        return inner[:: len(names)]
    if x.device.type == "meta":
        return _unseen("cpu")
    if x.numel() == 0:
        return torch.zeros(NUM_VALUES, device="cpu")
    x = _readable(x)
    places = _places(x.numel()).to(x.device)
    if x.is_contiguous():
        return x.view(-1)[places].float()
    return x[torch.unravel_index(places, x.shape)].float()


def _sample_of_part(x: Any) -> Tensor:
    """Of the whole tensor's values those that this process has."""
    from torch.distributed.tensor import Replicate, Shard  # loaded by who made it

    part = x.to_local()
    known = all(type(p) in (Replicate, Shard) for p in x.placements)
    plain = type(part) is Tensor and not part.is_meta and not part.is_complex()
    if not known or not plain or x.ndim == 0 or x.numel() == 0:
        return _unseen("cpu")
    row = _unseen(part.device)
    (chunk,) = x.__create_chunk_list__()
    places = torch.stack(torch.unravel_index(_places(x.numel()), x.shape))  # (dims, 32)
    first, size = (
        torch.tensor(y, device="cpu")[:, None] for y in (chunk.offsets, chunk.sizes)
    )
    here = ((first <= places) & (places < first + size)).all(0).nonzero()[:, 0]
    own = (places - first)[:, here].to(part.device)
    row[here.to(part.device)] = _readable(part)[tuple(own)].float()
    return row


def _unseen(device: Any) -> Tensor:
    return torch.full((NUM_VALUES,), math.nan, device=device)


def _places(number: int) -> Tensor:
    """Of the sample's values among so many."""
    spread = [round((number - 1) * ((i * _GOLDEN) % 1)) for i in range(NUM_VALUES)]
    return torch.tensor(spread, device="cpu")


def _readable(x: Tensor) -> Tensor:
    """The values in a dtype that every device reads."""
    if x.dtype.is_complex:
        x = torch.view_as_real(x)
    if x.dtype.itemsize == 1 and x.dtype is not torch.bool and x.is_contiguous():
        x = x.view(torch.uint8)  # not every device reads each of the 8-bit floats
    return x


def _comparable(
    then: tuple[str, tuple[int, ...]], now: tuple[str, tuple[int, ...]]
) -> bool:
    real = all(getattr(torch, x[0], torch.int8).is_floating_point for x in (then, now))
    wide = real and min(getattr(torch, x[0]).itemsize for x in (then, now)) > 1
    return tuple(then[1]) == tuple(now[1]) and (wide or then[0] == now[0])


def rounding(then: str, now: str) -> tuple[float, float]:
    """Relative and absolute differences that a change of dtype makes."""
    if then == now:
        return 0.0, 0.0
    dtypes = getattr(torch, then), getattr(torch, now)
    return (
        max(_ROUNDING.get(dtype, 2.0**-22) for dtype in dtypes),
        max(torch.finfo(dtype).smallest_normal for dtype in dtypes),
    )


def _said(tensor: tuple[str, tuple[int, ...]] | None) -> str:
    return "missing" if tensor is None else f"{tensor[0]} of shape {tuple(tensor[1])}"


def adapter_settings(config: PeftConfig) -> dict[str, Any]:
    """Settings of an adapter that change what it computes with given weights."""
    return {
        name: x
        for name, x in _plain(config.to_dict()).items()
        if not _OF_ADAPTER_ASIDE.search(name)
    }


def _settings(lora: LiftedNetwork) -> dict[str, Any]:
    """Settings that change what the network computes with given weights."""
    network: Any = lora.network
    settings: dict[str, Any] = {}
    for path, configs in adapter_configs(network).items():
        if lora.adapter not in configs:
            continue
        part = "".join(f"{x}." for x in path.split(".") if x not in ("", "_orig_mod"))
        settings |= {
            f"{part}adapter.{name}": x
            for name, x in adapter_settings(configs[lora.adapter]).items()
        }
    base = getattr(network, "get_base_model", lambda: network)()
    base = getattr(base, "_orig_mod", base)
    config = getattr(base, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        return settings | {
            f"config.{name}": x
            for name, x in _plain(config.to_dict()).items()
            if not _OF_NETWORK_ASIDE.search(name)
        }
    # Of a network without a config, its layers without weights: activations and so on.
    for path, module in base.named_modules():
        own = type(module).__module__
        of_torch = own.startswith("torch.nn.modules.") and "container" not in own
        quiet = isinstance(module, nn.modules.dropout._DropoutNd | nn.Identity)
        if of_torch and not quiet and not [*module.children(), *module.parameters()]:
            settings[f"layer {path.replace('_orig_mod.', '')}"] = str(module)
    return settings


def _plain(value: Any) -> Any:
    """As JSON would give it back; what it can't hold is left out of mappings."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, Mapping):
        items = {str(k): _plain(x) for k, x in value.items()}
        return {k: x for k, x in items.items() if x is not _LEFT_OUT}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [None if x is _LEFT_OUT else x for x in map(_plain, value)]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return _LEFT_OUT


_LEFT_OUT = object()
