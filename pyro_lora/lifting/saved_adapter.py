"""Weights of an adapter that PEFT saved, by the sites of a lifted network."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import Tensor

from pyro_lora.ground.interrupts import leaving_no_trace, undone
from pyro_lora.lifting.lifted_network import LiftedNetwork

# What of an adapter's configuration decides what its weights mean.
_MEANING = (
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
)


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
            of another configuration, or has other weights than the network where these
            aren't lifted.
    """
    network, adapter = lora.network, lora.adapter
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
    saved, own = PeftConfig.from_pretrained(str(path)), network.peft_config[adapter]
    for name in _MEANING:
        value, expected = getattr(saved, name, None), getattr(own, name, None)
        if value != expected:
            raise ValueError(
                f"{path}: {name} is {value!r}, but the lifted adapter's is "
                f"{expected!r}, so the weights would mean something else. Lift a "
                "network that was given this adapter's configuration."
            )
    state = load_peft_weights(str(path), device="cpu")
    before = {
        name: (x, x.clone())
        for name, x in [*network.named_parameters(), *network.named_buffers()]
        if f".{adapter}" in name or name in state
    }

    @torch.no_grad()  # an interrupt may have ended the caller's
    def put_back() -> None:
        for x, old in before.values():
            x.copy_(old)

    with undone(put_back):
        try:
            report: Any = set_peft_model_state_dict(
                network, state, adapter_name=adapter
            )
        except RuntimeError as error:  # of other shapes
            raise ValueError(
                f"{path} is an adapter of another network: {error}"
            ) from error
        missing = set(report.missing_keys)
        weights = lora.weights()
        changed = [n for n, (x, old) in before.items() if not torch.equal(x, old)]
    for site, names in lora.sites.items():
        absent = [name for name in names if name in missing]
        if absent:
            raise ValueError(
                f"{path} has no {absent[0]!r}, which site {site!r} needs: it's an "
                "adapter of another network, or was saved without that module."
            )
    lifted = {name for names in lora.sites.values() for name in names}
    frozen = [name for name in changed if name not in lifted]
    if frozen:
        raise ValueError(
            f"{path} has another {frozen[0]!r} than the network, where it isn't "
            "lifted, so the weights would mean something else. Load this adapter "
            "before lifting, or lift that parameter, too: .requires_grad_(True)."
        )
    return weights
