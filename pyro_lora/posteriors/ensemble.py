"""A guide over given weight sets: one mode, a deep ensemble, saved adapters."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_lora.ground.settings import check_kind
from pyro_lora.ground.weights import check_weights
from pyro_lora.lifting.lifted_network import LiftedNetwork, check_lora
from pyro_lora.lifting.saved_adapter import read_adapter
from pyro_lora.likelihood.model_trace import Model
from pyro_lora.posteriors.particle_posterior import ParticlePosterior

Member = Mapping[str, Tensor] | str | os.PathLike[str]


def ensemble(
    lora: LiftedNetwork,
    members: Sequence[Member],
    *,
    model: Model | None = None,
    obs_site: str | None = None,
) -> ParticlePosterior:
    r"""Equally weighted members, :math:`q(w) = \frac1K \sum_k \delta(w - w_k)`.

    ``ensemble(lora, [posterior.mode()])`` is the network at the mode;
    ``ensemble(lora, [lora.weights()])`` is the adapter as it is; folders of adapters
    that were trained from different seeds are a deep ensemble (Lakshminarayanan et al.
    2017, https://arxiv.org/abs/1612.01474).

    Args:
        lora: The lifted network.
        members: For each member a weight set, as of ``lora.weights()``, with the values
            of the model's other latent sites where there are any; or a folder that
            PEFT's ``save_pretrained`` wrote, of an adapter with the same configuration.
        model: The Pyro model, where something needs it.
        obs_site: The likelihood's site, None for the only one.

    Returns:
        A guide; the network's own weights are as before.

    Raises:
        ValueError: If there are no members, one doesn't have the network's sites and
            shapes or the first member's, or a folder doesn't fit the network.
    """
    if isinstance(members, Mapping | str | os.PathLike):
        raise ValueError(
            f"members must be a list of weight sets or folders, found a "
            f"{type(members).__name__}. Put it into a list."
        )
    check_lora(lora)
    check_kind("members", members, Sequence, "a list of weight sets or folders")
    for index, member in enumerate(members):
        if not isinstance(member, str | os.PathLike):
            check_weights(member, f"Member {index}")
    if not members:
        raise ValueError("An ensemble needs at least one member; found none.")
    weights = [
        read_adapter(lora, member) if isinstance(member, str | os.PathLike) else member
        for member in members
    ]
    shapes = {site: x.shape for site, x in weights[0].items()}
    shapes |= {site: x.shape for site, x in lora.zeros().items()}
    for index, member in enumerate(weights):
        for site in sorted(shapes.keys() | member.keys()):
            expected = shapes.get(site)
            found = member[site].shape if site in member else None
            if found != expected:
                raise ValueError(
                    f"Member {index}, site {site!r}: expected "
                    f"{_named(expected)}, found {_named(found)}. Members are weight "
                    "sets of one model, without leading dims: pick draws one by one."
                )
    device = next(iter(lora.zeros().values())).device
    stacked = {
        site: torch.stack([m[site].detach().to(device) for m in weights])
        for site in shapes
    }
    return ParticlePosterior(stacked, (lora,), model, obs_site)


def _named(shape: torch.Size | None) -> str:
    return "no such site" if shape is None else f"shape {tuple(shape)}"
