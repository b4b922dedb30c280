"""Linearised logits: J P^-1 J^T for each datum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import singledispatch
from typing import Any

import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch import distributions as td

from pyro_lora.curvature.capture import capture_layers, jacobians, recording
from pyro_lora.curvature.data_plate import data_plate
from pyro_lora.curvature.gaussian_logits import GaussianLogits
from pyro_lora.curvature.structures import at_least_float32
from pyro_lora.curvature.weight_gaussian import WeightGaussian
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.lifting.model_trace import Batch, Model, likelihood_site, trace_at


@singledispatch
def contrasts(fn: object) -> tuple[Tensor, Tensor]:
    """What identifies a likelihood's outcome, and how the logits follow from it.

    Contrasts (..., M), differentiable, M = C - 1 for C classes, and a basis (C, M): the
    logits, their mean over classes removed, are ``basis @ contrasts``.

    Args:
        fn: The likelihood's distribution, without event dims.

    Raises:
        ValueError: If the type has no linear predictor here.
    """
    raise ValueError(
        f"No linear predictor for {type(fn).__name__}; expected Categorical, "
        "Bernoulli or Normal."
    )


@contrasts.register
def _categorical(fn: td.Categorical) -> tuple[Tensor, Tensor]:
    # Helmert's orthonormal contrasts: class m against the mean of those before it.
    logits = at_least_float32(fn.logits)
    num_classes = logits.shape[-1]
    m = torch.arange(1, num_classes, dtype=torch.float64, device=logits.device)
    c = torch.arange(num_classes, device=logits.device)[:, None]
    basis = (c < m) / m - (c == m).double()
    basis = (basis / basis.norm(dim=0)).to(logits)
    return logits @ basis, basis


@contrasts.register
def _bernoulli(fn: td.Bernoulli) -> tuple[Tensor, Tensor]:
    # Two classes with logits -f/2 and f/2.
    logits = at_least_float32(fn.logits)[..., None]
    return logits, logits.new_tensor([[-0.5], [0.5]])


@contrasts.register
def _normal(fn: td.Normal) -> tuple[Tensor, Tensor]:
    loc = at_least_float32(fn.loc)[..., None]
    return loc, loc.new_ones(1, 1)


def linearized_logits(
    model: Model,
    gaussian: WeightGaussian,
    networks: Sequence[LiftedNetwork],
    batch: Batch,
    obs_site: str | None,
    prior_precisions: Sequence[Mapping[str, Tensor]] | None = None,
) -> list[GaussianLogits]:
    r"""Gaussian over the logits, :math:`N(f(x), J P^{-1} J^T)`, for each of Q priors.

    One forward pass and C - 1 backward passes a batch (Immer et al. 2021,
    https://arxiv.org/abs/2008.08400, eq. 9).

    Args:
        model: A Pyro model.
        gaussian: Mode and precision.
        networks: The lifted networks in the model.
        batch: The model's keyword arguments; labels aren't needed.
        obs_site: The likelihood's site.
        prior_precisions: Priors to evaluate; None is the Gaussian's own.

    Returns:
        For each prior: mean (B, C), its mean over classes removed, and covariance
        (B, C, C).

    Raises:
        ValueError: If the likelihood has event dims or isn't a known type.
    """
    leaves = {site: x.detach().requires_grad_() for site, x in gaussian.loc.items()}
    with torch.enable_grad(), recording(networks) as record:
        trace = trace_at(model, leaves, batch)
        site: dict[str, Any] = likelihood_site(trace, obs_site, gaussian.loc)
        fn = site["fn"]
        while isinstance(fn, MaskedDistribution):  # masks hide labels, not logits
            fn = fn.base_dist
        if fn.event_shape or len(fn.batch_shape) != 1:
            raise ValueError(
                f"Site {site['name']!r}: linearised predictions are for one outcome a "
                f"datum, batch shape (B,); found batch shape {tuple(fn.batch_shape)} "
                f"and event shape {tuple(fn.event_shape)}."
            )
        values, basis = contrasts(fn)
        terms = data_plate(site).data_last(values, fn.batch_shape)  # (M, B)
        captures = capture_layers(networks, record, terms)
    covariances = gaussian.covariance(
        jacobians(captures), prior_precisions or [gaussian.prior_precision]
    )
    mean = values.detach() @ basis.mT
    return [GaussianLogits(mean, basis @ c @ basis.mT) for c in covariances.to(mean)]
