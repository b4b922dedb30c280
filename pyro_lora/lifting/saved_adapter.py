"""Weights of an adapter that PEFT saved, by the sites of a lifted network."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from torch import Tensor

from pyro_lora.ground.interrupts import leaving_no_trace, undone
from pyro_lora.lifting.fingerprint import adapter_settings
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.lifting.sites import uncompiled

# Of a network in memory the layers say these, of a file only the configuration does.
_IN_LAYERS = ("r", "lora_alpha", "use_rslora", "rank_pattern")
# Initialisations that leave the base as it is: of no matter to the weights later on.
_BESIDE_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
_REMEDY = "Lift a network that was given this adapter's configuration."


@leaving_no_trace
@torch.no_grad()
def read_adapter(
    lora: LiftedNetwork, folder: str | os.PathLike[str]
) -> dict[str, Tensor]:
    """The weights in a folder that ``save_pretrained`` made, stacked as sites.

    Args:
        lora: A lifted PEFT network with an adapter of the same configuration. All of
            its weights are as before afterwards.
        folder: Holds ``adapter_config.json`` and the weights.

    Returns:
        Site -> value of the site's shape, on the network's device.

    Raises:
        ValueError: If there is no adapter in the folder, or it's for another network or
            of another configuration, has weights that the lifted adapter has no place
            for, or others than the network where these aren't lifted.
    """
    network, adapter = uncompiled(lora.network), lora.adapter
    if not isinstance(network, PeftModel) or adapter is None:
        raise ValueError(
            f"The lifted network is a {type(network).__name__}; expected a PeftModel, "
            f"the whole of it, to read {os.fspath(folder)!r} into."
        )
    path = Path(folder)
    if not (path / "adapter_config.json").is_file():
        raise ValueError(
            f"{path} holds no adapter_config.json. Name a folder that save_pretrained "
            "of a PEFT model wrote."
        )
    config = network.peft_config[adapter]
    saved, own = _meaning(PeftConfig.from_pretrained(str(path))), _meaning(config)
    for name, expected in own.items():
        value = saved.get(name)
        if value != expected:
            raise ValueError(
                f"{path}: {name} is {value!r}, but the lifted adapter's is "
                f"{expected!r}, so the weights would mean something else. {_REMEDY}"
            )
    state = load_peft_weights(str(path), device="cpu")
    pattern = getattr(config, "rank_pattern", None)
    before = {
        name: (x, x.clone())
        for name, x in [*network.named_parameters(), *network.named_buffers()]
        if f".{adapter}" in name or name in state
    }

    @torch.no_grad()  # an interrupt may have ended the caller's
    def put_back() -> None:
        for x, old in before.values():
            x.copy_(old)
        if isinstance(config, AdaLoraConfig):
            config.rank_pattern = pattern

    with undone(put_back):
        if isinstance(config, AdaLoraConfig):
            # Else PEFT puts new parameters, of the kept ranks, in place of the lifted.
            config.rank_pattern = None
        try:
            report: Any = set_peft_model_state_dict(
                network, state, adapter_name=adapter
            )
        except RuntimeError as error:  # of other shapes
            raise ValueError(
                f"{path} is an adapter of another network: {error}"
            ) from error
        except KeyError as error:  # of a head, say, or a prompt
            raise ValueError(
                f"{path} has no {error.args[0]!r}, which the lifted adapter needs: it "
                "was saved without that module."
            ) from error
        written = get_peft_model_state_dict(
            network, adapter_name=adapter, save_embedding_layers=False
        )
        missing = set(report.missing_keys)
        # PEFT writes some that it doesn't read, a head's biases under two more names.
        unknown = [x for x in report.unexpected_keys if x not in written]
        if config.is_prompt_learning:
            in_prompt = _names_of_prompt(path, config, written, state)
            missing = {x for x in missing if not x.startswith("prompt_encoder.")}
            unknown = [x for x in unknown if x not in in_prompt]
        weights = lora.weights()
        changed = [n for n, (x, old) in before.items() if not torch.equal(x, old)]
    if unknown:
        raise ValueError(
            f"{path} holds {unknown[0]!r} ({len(unknown)} such), for which the lifted "
            f"adapter has no parameter, so it would be left out. {_REMEDY}"
        )
    names: dict[int, set[str]] = {}  # more than one of what layers share
    for name, x in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(x), set()).add(name)
    for site, members in lora.parameters.items():
        absent = [p.name for p in members if names[id(p.parameter)] <= missing]
        if absent:
            raise ValueError(
                f"{path} has no {absent[0]!r}, which site {site!r} needs: it's an "
                "adapter of another network, or was saved without that module."
            )
    lifted = {id(p.parameter) for ps in lora.parameters.values() for p in ps}
    frozen = [name for name in changed if id(before[name][0]) not in lifted]
    if frozen:
        raise ValueError(
            f"{path} has another {frozen[0]!r} than the network, where it isn't "
            "lifted, so the weights would mean something else. Load this adapter "
            "before lifting, or lift that parameter, too: .requires_grad_(True)."
        )
    return weights


def _meaning(config: PeftConfig) -> dict[str, Any]:
    """What of an adapter's configuration decides what its weights mean."""
    in_layers = {name: getattr(config, name, None) for name in _IN_LAYERS}
    starts = {
        name: True if start in _BESIDE_THE_BASE else start
        for name, start in config.to_dict().items()
        if name.startswith("init_") and name.endswith("weights")
    }
    settings = adapter_settings(config)
    return {"peft_type": settings["peft_type"], **in_layers, **settings, **starts}


def _names_of_prompt(
    path: Path,
    config: PeftConfig,
    again: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
) -> set[str]:
    """What in a file is a prompt, which isn't called there as in the network.

    Raises:
        ValueError: If PEFT would write another prompt now that it has read this one.
    """
    names = {
        name
        for name, x in again.items()
        if name in state and torch.equal(x, state[name].to(x))
    }
    if "prompt_embeddings" not in names:
        kind = _meaning(config)["peft_type"]
        raise ValueError(
            f"{path} holds the prompt that an encoder of {kind} makes, and not the "
            "encoder's weights, which are what is lifted. Give weight sets, as of "
            "lora.weights(), in place of such folders, and keep posteriors by "
            "pyro_lora.save."
        )
    return names
