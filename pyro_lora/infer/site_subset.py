"""Which of the lifted sites a posterior is over."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from pyro_lora.ground.interrupts import hooked
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.likelihood.batches import first_batch
from pyro_lora.likelihood.model_trace import Batch, Model, evaluating, trace_at


def chosen_sites(
    sites: Collection[str] | None,
    model: Model,
    values: Mapping[str, Tensor],
    networks: Sequence[LiftedNetwork],
    batches: Iterable[Batch],
) -> Collection[str]:
    """The sites that ``AutoLaplace(sites=)`` stands for.

    Args:
        sites: Names, ``"last_layer"`` (which takes one forward pass), or None for all.
        model: A Pyro model.
        values: Latent site -> the mode.
        networks: The lifted networks in the model.
        batches: Mappings of model keyword arguments.

    Returns:
        Names of lifted sites.

    Raises:
        ValueError: If a name isn't that of a lifted site, or the last layer shares its
            sites with others.
    """
    lifted = [site for lora in networks for site in lora.sites]
    if sites is None:
        return lifted
    if sites == "last_layer":
        batch = first_batch(batches, "the first one tells which layer is the last")
        return _last_layer(model, values, networks, batch)
    names = {sites} if isinstance(sites, str) else set(sites)
    if not names <= set(lifted):
        raise ValueError(
            f"sites: {sorted(names - set(lifted))} aren't lifted. Lifted are {lifted}; "
            "or say 'last_layer'."
        )
    return names


def _last_layer(
    model: Model,
    values: Mapping[str, Tensor],
    networks: Sequence[LiftedNetwork],
    batch: Batch,
) -> list[str]:
    calls: list[torch.nn.Module] = []
    members = [p for lora in networks for ps in lora.parameters.values() for p in ps]
    holders = {p.locations[0][0] for p in members}

    def hook(module: torch.nn.Module, *_: object) -> None:
        calls.append(module)

    with torch.no_grad(), evaluating(networks), hooked(dict.fromkeys(holders, hook)):
        trace_at(model, values, batch)
    last = [p for p in members if calls and p.locations[0][0] is calls[-1]]
    found = [p.site for p in last]
    if not last or any(p.site in found and p not in last for p in members):
        names = [p.name for p in last]
        raise ValueError(
            f"sites='last_layer': the lifted layer that is called last holds {names}, "
            f"and its sites {found} hold others, too. Lift a head (modules_to_save), "
            "or name sites."
        )
    return found
