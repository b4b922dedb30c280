"""Draws of a posterior as ordinary PEFT adapters."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict

from pyro_lora.export.posterior_state import Posterior
from pyro_lora.lifting.lifted_network import LiftedNetwork


def export_adapters(
    posterior: Posterior, path: str | os.PathLike[str], num_samples: int
) -> None:
    """Write draws as adapters ``draw_000``, ``draw_001``, ... that PEFT can load.

    Each is a folder for ``PeftModel.from_pretrained(base_model, folder)`` or for any
    server of LoRA adapters; the mean of the probabilities that the adapters give is
    the posterior's prediction. All are written aside and renamed at the end, so
    that none is ever half-written. The network's own adapter stays what it was.

    Args:
        posterior: A Laplace, particle or mixture posterior of one PEFT model.
        path: The folder to hold them, made if it isn't there.
        num_samples: Number of draws; that of the particles writes each one, in order.

    Raises:
        ValueError: If the folder holds draws already, the lifted network isn't one
            PEFT model, or a lifted parameter isn't part of what PEFT saves.
    """
    folder = Path(path)
    if next(folder.glob("draw_*"), None) is not None:
        raise ValueError(
            f"{folder} holds draws already. Delete them, or name another folder."
        )
    lora, network, adapter = _one_adapter(posterior)
    _check_saved_by_peft(lora, network, adapter)
    draws = posterior.sample(num_samples)
    before = lora.weights()
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{secrets.token_hex(8)}.tmp"
    try:
        for index in range(num_samples):
            lora.load({site: draws[site][index] for site in lora.sites})
            network.save_pretrained(
                str(aside / str(index)),
                selected_adapters=[adapter],
                save_embedding_layers=False,  # never lifted; "auto" asks the hub
            )
        for index in range(num_samples):
            # PEFT puts adapters of other names into a folder of that name.
            inner = "" if adapter == "default" else adapter
            (aside / str(index) / inner).rename(folder / f"draw_{index:03d}")
    finally:
        lora.load(before)
        shutil.rmtree(aside, ignore_errors=True)


def _one_adapter(posterior: Posterior) -> tuple[LiftedNetwork, PeftModel, str]:
    if len(posterior.loras) != 1:
        raise ValueError(
            f"The posterior has {len(posterior.loras)} lifted networks; expected one, "
            "since an adapter belongs to one network."
        )
    (lora,) = posterior.loras
    network = lora.network
    if not isinstance(network, PeftModel):
        raise ValueError(
            f"The lifted network is a {type(network).__name__}; expected a PeftModel. "
            "Wrap it by peft.get_peft_model before lifting."
        )
    assert lora.adapter is not None  # a PeftModel has one
    return lora, network, lora.adapter


def _check_saved_by_peft(lora: LiftedNetwork, network: PeftModel, adapter: str) -> None:
    saved = get_peft_model_state_dict(
        network, adapter_name=adapter, save_embedding_layers=False
    ).keys()
    for site, names in lora.sites.items():
        for name in names:
            key = name.replace(f".modules_to_save.{adapter}.", ".")
            # lora_A.default.weight, lora_embedding_A.default
            key = re.sub(rf"(\.lora_\w+)\.{re.escape(adapter)}(?=\.|$)", r"\1", key)
            if key not in saved:
                raise ValueError(
                    f"Site {site!r}: PEFT doesn't save the parameter {name!r} with the "
                    "adapter. Freeze it, or name its module in modules_to_save (for a "
                    "bias: bias='lora_only' or 'all') of the LoraConfig."
                )
