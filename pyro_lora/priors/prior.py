"""What a prior is, and what all priors share: hyper-latents and their names."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.reparam.reparam import Reparam, ReparamMessage, ReparamResult
from torch import Tensor

from pyro_lora.lifting.prior import NOISE


def hyper_name(quantity: str, site: str) -> str:
    """Name of a hyper-latent that belongs to a site.

    What several sites share is named after the first of them. Sites of one Pyro model
    are distinct and none is a dotted prefix of another, and so these are too: with two
    lifted networks, with several priors on one network (``by_site``), and under
    ``AutoDelta``, which makes attributes of dotted names.
    """
    return f"prior.{quantity}.{site}"


def sample_normal(
    name: str, loc: Tensor, scale: Tensor, event_dim: int, *, centered: bool
) -> Tensor:
    r"""Sample N(loc, scale^2), its last ``event_dim`` dims being event dims.

    Non-centred, the latent is ``<name>_decentered``, standard normal, and ``name`` a
    deterministic function of it.
    """
    fn = dist.Normal(loc, scale).to_event(event_dim)
    value: Tensor
    if centered:
        value = pyro.sample(name, fn)
    else:

        def deterministic(site: Any) -> Any:  # as pyro.deterministic marks them
            return {"_deterministic": True} if site["name"] == name else {}

        with (
            poutine.infer_config(config_fn=deterministic),
            poutine.reparam(config={name: NonCentered()}),
        ):
            value = pyro.sample(name, fn)
    return value


class NonCentered(Reparam):
    """What ``LocScaleReparam(0.0)`` does for normals, with particle dims aligned.

    Papaspiliopoulos, Roberts & Sköld (2007), section 2. ``Predictive(parallel=True)``
    gives a guide's draws of an event with several dims as (S, ...) where the plates
    ask for (S, 1, ...), see :func:`aligned`.
    """

    def apply(self, msg: ReparamMessage) -> ReparamResult:
        """Replace a normal site by its noise and a deterministic function."""
        fn, event_dim = self._unwrap(msg["fn"])
        loc, scale, value = fn.loc, fn.scale, msg["value"]
        noise = pyro.sample(
            f"{msg['name']}{NOISE}",
            dist.Normal(torch.zeros_like(loc), torch.ones_like(scale)).to_event(
                event_dim
            ),
            obs=None if value is None else (value - loc) / scale,
            infer={"is_observed": bool(msg["is_observed"])},
        )
        if value is None:
            noise, loc, scale = aligned(
                (noise, event_dim), (loc, event_dim), (scale, event_dim)
            )
            value = loc + scale * noise
        fn = dist.Delta(value, event_dim=event_dim).mask(False)  # no density of its own
        return {"fn": fn, "value": value, "is_observed": True}


def aligned(*values: tuple[Tensor, int]) -> list[Tensor]:
    """Values with as many particle dims each: (S,) becomes (S, 1) beside (S, 1).

    Plates put the particles of all sites into one dim, left of the model's own plates.
    But ``Predictive(parallel=True)`` inserts dims into a guide's draws by counting all
    dims, event dims as well: a scalar comes as (S, 1), a matrix as (S, ...). Plain
    broadcasting would then combine every particle with every other.

    Args:
        values: Value, and how many of its dims are event dims.

    Returns:
        The values, with dims of size 1 right of shorter particle dims.
    """
    leads = [value.shape[: value.ndim - event_dim] for value, event_dim in values]
    num_dims = max(map(len, leads))
    ones = [[1] * (num_dims - len(lead)) for lead in leads]
    return [
        value.reshape([*lead, *extra, *value.shape[len(lead) :]])
        for lead, extra, (value, _) in zip(leads, ones, values, strict=True)
    ]


def over_event(value: Tensor, num_dims: int) -> Tensor:
    """The value with trailing dims of size 1 for the rest of an event."""
    return value[(..., *[None] * num_dims)]
