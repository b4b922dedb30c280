"""Posterior -> predicted class probabilities, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import singledispatch
from typing import Any, Literal

import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch import distributions as td
from torch.nn.functional import logsigmoid
from tqdm.auto import tqdm

from pyro_lora.curvature.gaussian_logits import (
    GaussianLogits,
    class_log_probs,
    expected_entropy,
)
from pyro_lora.infer.laplace_posterior import LaplacePosterior
from pyro_lora.infer.mixture_posterior import MixturePosterior
from pyro_lora.lifting.model_trace import Batch, Model
from pyro_lora.predict.draws import (
    LORA_POSTERIORS,
    Guide,
    ModelAtDraws,
    draw_weights,
    model_at_draws,
    without_labels,
)
from pyro_lora.predict.prediction import Prediction

DEFAULT_NUM_SAMPLES = 64  # the Monte-Carlo sd of a probability is then at most .06


def predict(
    model: Model,
    posterior: Guide,
    batches: Iterable[Batch],
    *,
    method: Literal["sample", "linearized"] = "sample",
    num_samples: int | None = None,
    integral: Callable[[GaussianLogits], Tensor] = class_log_probs,
    obs_site: str | None = None,
    progress_bar: bool = False,
) -> Prediction:
    r"""Class probabilities averaged over a posterior.

    ``"sample"``: :math:`p(y | x) = \frac1S \sum_s p(y | x, w_s)` with one set of draws
    for all data. ``"linearized"``: the network linearised in the weights around the
    mode, so that the logits are Gaussian, and integrated exactly (Immer et al. 2021,
    https://arxiv.org/abs/2008.08400).

    Dropout is off and nothing is trained. Batches are streamed: only (N, C) numbers
    stay. Labels are kept for the metrics and hidden from the model.

    Args:
        model: The Pyro model; its class labels come in as ``labels``, None here.
        posterior: Any Pyro guide for the model, with ``"sample"``; a
            ``LaplacePosterior`` or a mixture of them, with ``"linearized"``.
        batches: Mappings of model keyword arguments.
        method: ``"sample"`` or ``"linearized"``.
        num_samples: Draws S; None is every particle once, or 64 where there are
            none. ``"linearized"`` has no use for it.
        integral: Log probabilities (B, C) from Gaussian logits, with
            ``"linearized"``: ``class_log_probs``, numerical, or the closed forms
            ``probit`` and ``laplace_bridge``, which are rough. The aleatoric entropy
            is numerical in any case.
        obs_site: The likelihood's site; None is the posterior's, else the model's
            only one.
        progress_bar: Show one.

    Returns:
        Probabilities, entropies (nats) and labels of all data, in order.

    Raises:
        ValueError: If there are no batches, the likelihood isn't Categorical or
            Bernoulli with one outcome a datum, some batches have labels and others
            none, or the posterior doesn't fit the model or the method.
    """
    if method not in ("sample", "linearized"):
        raise ValueError(f"method must be 'sample' or 'linearized', found {method!r}.")
    if isinstance(posterior, LORA_POSTERIORS):
        obs_site = obs_site or posterior.obs_site
    if method == "linearized":
        _check_linearizable(posterior, obs_site)
    at_draws: ModelAtDraws | None = None
    log_probs, aleatoric, labels = [], [], []
    for batch in tqdm(batches, desc="Predict", disable=not progress_bar):
        inputs = without_labels(batch)
        if method == "linearized":
            log_p, entropy = _linearized(posterior, inputs, integral)
        else:
            if at_draws is None:
                weights = draw_weights(
                    posterior, num_samples, DEFAULT_NUM_SAMPLES, batch
                )
                at_draws = model_at_draws(model, weights, inputs, obs_site)
            log_p, entropy = _sampled(at_draws, inputs)
        log_probs.append(log_p)
        aleatoric.append(entropy)
        labels.append(batch.get("labels"))
    if not log_probs:
        raise ValueError("predict got no batches. Is the iterable used up already?")
    device = log_probs[0].device
    return Prediction(
        log_probs=torch.cat(log_probs),
        aleatoric_entropy=torch.cat(aleatoric),
        labels=_joined(labels, device),
    )


@singledispatch
def outcome_log_probs(fn: object) -> Tensor:
    """Log probabilities of the classes, (..., C), float64, nats.

    By the likelihood's type; register your own.

    Args:
        fn: The likelihood's distribution, of batch shape (...).

    Raises:
        ValueError: If the type has no classes here.

    >>> import pyro.distributions as dist
    >>> outcome_log_probs(dist.Bernoulli(torch.tensor(0.25))).exp()
    tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    raise ValueError(
        f"No class probabilities for {type(fn).__name__}; expected Categorical or "
        "Bernoulli. For other likelihoods draw outcomes by pyro.infer.Predictive, or "
        "by to_datatree."
    )


@outcome_log_probs.register
def _categorical(fn: td.Categorical) -> Tensor:
    return fn.logits.double().log_softmax(-1)


@outcome_log_probs.register
def _bernoulli(fn: td.Bernoulli) -> Tensor:
    logits = fn.logits.double()
    return torch.stack([logsigmoid(-logits), logsigmoid(logits)], -1)


@outcome_log_probs.register
def _masked(fn: MaskedDistribution) -> Tensor:
    return outcome_log_probs(fn.base_dist)


@outcome_log_probs.register(td.Independent)
def _independent(fn: td.Independent[Any]) -> Tensor:
    raise ValueError(
        f"The likelihood has event shape {tuple(fn.event_shape)}: several outcomes a "
        "datum, one for each token perhaps. predict is for one class a datum; draw "
        "outcomes by pyro.infer.Predictive or to_datatree."
    )


@torch.no_grad()
def _sampled(at_draws: ModelAtDraws, inputs: Batch) -> tuple[Tensor, Tensor]:
    """Log of the mean probability (B, C), and the mean entropy (B,)."""
    log_sum: Tensor | None = None
    entropy: Tensor | float = 0.0
    for trace in at_draws.traces(inputs):
        log_p = outcome_log_probs(trace.nodes[at_draws.obs_site]["fn"])  # (S', B, C)
        entropy = entropy + torch.special.entr(log_p.exp()).sum((0, -1))
        part = log_p.logsumexp(0)
        log_sum = part if log_sum is None else torch.logaddexp(log_sum, part)
    assert log_sum is not None
    assert isinstance(entropy, Tensor)
    return log_sum - math.log(at_draws.num_draws), entropy / at_draws.num_draws


def _check_linearizable(posterior: Guide, obs_site: str | None) -> None:
    if isinstance(posterior, MixturePosterior):
        for component in posterior.components:
            _check_linearizable(component, obs_site)
    elif not isinstance(posterior, LaplacePosterior):
        raise ValueError(
            "method='linearized' needs a LaplacePosterior or a mixture of them, found "
            f"{type(posterior).__name__}. Use method='sample', or make one by "
            "AutoLaplace(...).laplace_approximation(batches)."
        )
    elif posterior.obs_site is not None and obs_site != posterior.obs_site:
        raise ValueError(
            f"obs_site is {obs_site!r}, but the posterior was made for the site "
            f"{posterior.obs_site!r}. Leave obs_site out, or make a posterior for it."
        )


def _linearized(
    posterior: Any, inputs: Batch, integral: Callable[[GaussianLogits], Tensor]
) -> tuple[Tensor, Tensor]:
    """Log of the mean probability (B, C), and the mean entropy (B,)."""
    if isinstance(posterior, LaplacePosterior):
        with torch.enable_grad():  # for the Jacobian, wherever predict is called
            logits = posterior.linearized(inputs)
        log_p = integral(logits).log_softmax(-1)  # the integrals' last 1e-8
        return log_p, expected_entropy(logits)
    assert isinstance(posterior, MixturePosterior)
    parts = [_linearized(c, inputs, integral) for c in posterior.components]
    log_p = torch.stack([part[0] for part in parts])  # (K, B, C)
    weights = posterior.weights.to(log_p)
    entropy = weights @ torch.stack([part[1] for part in parts])
    return (log_p + weights.log()[:, None, None]).logsumexp(0), entropy


def _joined(labels: list[Any], device: torch.device) -> Tensor | None:
    missing = [index for index, value in enumerate(labels) if value is None]
    if len(missing) == len(labels):
        return None
    if missing:
        raise ValueError(
            f"Batch {missing[0]} has no 'labels', but others have. Give all batches "
            "labels, or none."
        )
    joined = torch.cat([torch.as_tensor(value) for value in labels]).to(device)
    whole = joined.long()
    return whole if bool((whole == joined).all()) else joined
