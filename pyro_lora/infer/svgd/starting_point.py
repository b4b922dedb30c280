"""Where particles start, and what the model's run there tells of its sites."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from pyro_lora.infer.svgd.particle_model import InitFn, LatentSite, ParticleModel
from pyro_lora.lifting.initialization import check_start
from pyro_lora.likelihood.model_trace import (
    Model,
    evaluating_model,
    lifted_networks,
    observed_names,
    observed_site,
    trace_on,
)


def particle_model(
    model: Model,
    init_loc_fn: InitFn,
    max_plate_nesting: int | None,
    args: Any,
    kwargs: Any,
    obs_site: str | None = None,
) -> ParticleModel:
    """Inspect the model by one run, where the first particle starts.

    Args:
        model: A Pyro model.
        init_loc_fn: As in Pyro's autoguides.
        max_plate_nesting: Batch dims that the model's sites take; None finds out.
        args: The model's positional arguments.
        kwargs: The model's keyword arguments.
        obs_site: A site that must be observed; None is any or none.

    Returns:
        The model with its latent sites.

    Raises:
        ValueError: If ``obs_site`` isn't observed, there are no latent sites, one is
            discrete, belongs to the data of a minibatch or has a support without a
            transform, ``init_loc_fn`` gives a value of another shape, or
            ``max_plate_nesting`` is too small.
    """
    trace = _starting_trace(model, init_loc_fn, 0, args, kwargs)
    if obs_site is not None:
        observed_site(trace, obs_site)
    latents = {}
    needed: dict[str, int] = {}
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site_is_subsample(site):
            continue
        frames = [f for f in site["cond_indep_stack"] if f.vectorized]
        fn = site["fn"]
        needed[name] = len(fn.batch_shape)
        if site["is_observed"]:
            continue
        if fn.support.is_discrete:
            raise ValueError(
                f"Latent site {name!r} is discrete, so particles can't move along its "
                "gradient. Marginalise it, or give labels to the likelihood."
            )
        if any((f.full_size or f.size) != f.size for f in frames):
            raise ValueError(
                f"Latent site {name!r} belongs to the data of a minibatch, so its "
                "particles would mean other data at the next step. Move it out of the "
                "subsampled plate, or give labels to the likelihood."
            )
        try:
            transform = biject_to(fn.support)
        except NotImplementedError as error:
            raise ValueError(
                f"Latent site {name!r}: there is no transform from unconstrained space "
                f"to its support, {fn.support}. Sample it in other coordinates."
            ) from error
        latents[name] = LatentSite(
            transform, fn.batch_shape, transform.inv(site["value"]).shape
        )
    if not latents:
        raise ValueError(
            "The model has no latent sites. Call lora() inside it, with "
            "lora = pyro_lora.lift(peft_model)."
        )
    widest = max(needed, key=needed.__getitem__)
    if max_plate_nesting is not None and max_plate_nesting < needed[widest]:
        raise ValueError(
            f"Site {widest!r} takes {needed[widest]} batch dims, more than "
            f"max_plate_nesting={max_plate_nesting}: particles would mix with them. "
            "Leave max_plate_nesting=None, or declare event dims by .to_event()."
        )
    return ParticleModel(
        model,
        latents,
        needed[widest] if max_plate_nesting is None else max_plate_nesting,
        lifted_networks(trace),
        bool(observed_names(trace)),
    )


@torch.no_grad()
def initial_particles(
    target: ParticleModel,
    init_loc_fn: InitFn,
    num_particles: int,
    args: Any,
    kwargs: Any,
) -> dict[str, Tensor]:
    """K starting points; ``init_loc_fn`` finds k in ``site["infer"]["particle"]``.

    Args:
        target: The model.
        init_loc_fn: As in Pyro's autoguides.
        num_particles: K.
        args: The model's positional arguments.
        kwargs: The model's keyword arguments.

    Returns:
        Site -> (K, ...), unconstrained, leaf tensors that require gradients.

    Raises:
        ValueError: If a starting point has another shape than its site, is NaN or
            infinite, or isn't all that ``init_to`` was given.
    """
    rows = []
    for k in range(num_particles):
        trace = _starting_trace(target.model, init_loc_fn, k, args, kwargs)
        start = {site: trace.nodes[site]["value"] for site in target.latents}
        check_start(init_loc_fn, start, k)
        row = {
            site: latent.transform.inv(start[site])
            for site, latent in target.latents.items()
        }
        for site, latent in target.latents.items():
            if row[site].shape != latent.shape:
                raise ValueError(
                    f"Site {site!r}: particle {k} starts with shape "
                    f"{tuple(row[site].shape)}, another with {tuple(latent.shape)}. "
                    "The model's sites must have the same shapes in each run."
                )
        rows.append(row)
    particles = {site: torch.stack([r[site] for r in rows]) for site in target.latents}
    for site, value in particles.items():
        if not torch.isfinite(value).all():
            raise ValueError(
                f"Site {site!r}: a particle starts at NaN or infinity. Check "
                "init_loc_fn and the adapter's weights."
            )
    return {s: x.detach().clone().requires_grad_() for s, x in particles.items()}


@torch.no_grad()
def _starting_trace(
    model: Model, init_loc_fn: InitFn, particle: int, args: Any, kwargs: Any
) -> Any:
    number: Any = {"particle": particle}

    def init(site: dict[str, Any]) -> Tensor:
        value, shape = init_loc_fn(site), site["fn"].shape()
        if value.shape != shape:  # it would be broadcast, or fail far from here
            raise ValueError(
                f"Site {site['name']!r}: init_loc_fn starts particle {particle} with "
                f"a value of shape {tuple(value.shape)}, the site's is {tuple(shape)}."
            )
        return value

    with (
        evaluating_model(),
        InitMessenger(init),
        poutine.infer_config(config_fn=lambda _: number),
    ):
        return trace_on(model, args, kwargs)
