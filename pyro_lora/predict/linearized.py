"""Predictions of one batch by the network linearised around the mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_lora.curvature.gaussian_logits import (
    GaussianLogits,
    JointGaussianLogits,
    expected_entropy,
)
from pyro_lora.curvature.linearize import contrasts
from pyro_lora.likelihood.fisher_roots import MOST_EXACT_CLASSES
from pyro_lora.likelihood.model_trace import (
    Batch,
    Model,
    evaluating_model,
    likelihood_site,
    trace_at,
)
from pyro_lora.likelihood.outcome_kinds import (
    Tokens,
    check_outcomes,
    chosen_outcomes,
    likelihood,
    outcome_logits,
)
from pyro_lora.posteriors.laplace_posterior import LaplacePosterior
from pyro_lora.posteriors.mixture_posterior import MixturePosterior
from pyro_lora.posteriors.posterior import Guide
from pyro_lora.predict.prediction import Prediction
from pyro_lora.predict.regression import RegressionPrediction
from pyro_lora.predict.sampled import AnyPrediction, token_labels
from pyro_lora.predict.token_prediction import token_prediction

Integral = Callable[[GaussianLogits], Tensor]


def check_linearizable(posterior: Guide, obs_site: str | None) -> None:
    """Check that a posterior has Gaussians for the likelihood's site.

    Raises:
        ValueError: If it hasn't.
    """
    if isinstance(posterior, MixturePosterior):
        for component in posterior.components:
            check_linearizable(component, obs_site)
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


def obstacle(fn: Any, tokens: Tokens | None = None) -> str | None:
    """Why a network can't be linearised in front of a likelihood; None if it can.

    Args:
        fn: The likelihood's distribution.
        tokens: Which outcomes of a datum.
    """
    outcome = likelihood(fn).fn
    kind = type(outcome).__name__
    if contrasts.dispatch(type(outcome)) is contrasts.dispatch(object):
        return f"{kind} has no linear predictor here"
    if tokens is not None and outcome.event_shape == ():
        num_classes = outcome_logits(outcome).shape[-1]
        if num_classes > MOST_EXACT_CLASSES:
            return f"{num_classes} classes take as many backward passes for each token"
    return None


def linearized(
    posterior: Any,
    model: Model,
    batch: Batch,
    integral: Integral,
    obs_site: str | None,
    tokens: Tokens | None,
    num_draws: int = 0,
) -> AnyPrediction:
    """The prediction of one batch, by its likelihood's type.

    Args:
        posterior: Laplace, or a mixture of such: the network runs once for each.
        model: The Pyro model.
        batch: The model's keyword arguments, without labels; of tokens, with them.
        integral: Log probabilities from Gaussian logits.
        obs_site: The likelihood's site.
        tokens: Which outcomes of a datum.
        num_draws: How many draws of the logits to keep, joint over the batch.

    Returns:
        Without labels, but those of tokens.

    Raises:
        ValueError: If the likelihood has no such outcomes.
    """
    parts = list(laplace_parts(posterior))
    pi = torch.stack([weight for weight, _ in parts])
    components = [replace(part, model=model, obs_site=obs_site) for _, part in parts]
    if tokens is not None:
        return _tokens(components, model, pi, batch, integral, tokens)
    with torch.enable_grad():  # for the Jacobian, wherever predict is called
        if num_draws:
            joint = [part.linearized(batch, joint=True) for part in components]
            gaussians = [g.marginals() for g in joint]
        else:
            gaussians = [part.linearized(batch) for part in components]
    if gaussians[0].noise_variance is not None:
        return _reals(gaussians, pi)
    log_p, entropy = _averaged(gaussians, pi, integral)
    draws = _joint_draws(joint, pi, num_draws) if num_draws else None
    return Prediction(log_probs=log_p, aleatoric_entropy=entropy, draw_log_probs=draws)


def laplace_parts(posterior: Any) -> Iterator[tuple[Tensor, LaplacePosterior]]:
    """The Gaussians of a mixture of any depth, with their weights."""
    if isinstance(posterior, LaplacePosterior):
        yield torch.ones((), dtype=torch.float64), posterior
    else:
        for weight, component in zip(
            posterior.weights, posterior.components, strict=True
        ):
            for inner, part in laplace_parts(component):
                yield weight * inner.to(weight), part


def _averaged(
    gaussians: list[GaussianLogits], pi: Tensor, integral: Integral
) -> tuple[Tensor, Tensor]:
    """Log of the mean probability (B, C), and the mean entropy (B,)."""
    # The integrals are normalised up to their last 1e-8.
    log_p = torch.stack([integral(g).log_softmax(-1) for g in gaussians])  # (K, B, C)
    entropy = torch.stack([expected_entropy(g) for g in gaussians])
    weights = pi.to(log_p)
    return (log_p + weights.log()[:, None, None]).logsumexp(0), weights @ entropy


def _joint_draws(
    joint: list[JointGaussianLogits], pi: Tensor, num_draws: int
) -> Tensor:
    """Log probabilities under draws of the weights, (S, B, C), by component."""
    drawn = torch.multinomial(pi, num_draws, replacement=True)
    counts = torch.bincount(drawn, minlength=len(joint)).tolist()
    pairs = zip(joint, counts, strict=True)
    return torch.cat([g.log_probs_of(g.rsample((n,))) for g, n in pairs if n > 0])


def _reals(gaussians: list[GaussianLogits], pi: Tensor) -> RegressionPrediction:
    def joined(parts: list[Tensor]) -> Tensor:
        one = torch.stack(parts).double()  # (K, B, P)
        return one[..., 0] if one.shape[-1] == 1 else one

    noise = [g.noise_variance for g in gaussians if g.noise_variance is not None]
    variances = [g.covariance_matrix.diagonal(dim1=-2, dim2=-1) for g in gaussians]
    return RegressionPrediction(
        loc=joined([g.mean for g in gaussians]),
        noise_scale=joined(noise).sqrt(),
        loc_variance=joined(variances).clamp_min(0),
        weights=pi,
    )


def _tokens(
    components: list[LaplacePosterior],
    model: Model,
    pi: Tensor,
    batch: Batch,
    integral: Integral,
    tokens: Tokens,
) -> AnyPrediction:
    first = components[0]
    with torch.no_grad(), evaluating_model():
        trace = trace_at(model, first.mode(), batch)
    site = likelihood_site(trace, first.obs_site, first.mode())
    found = likelihood(site["fn"])
    check_outcomes(found, tokens, site["name"])
    logits = outcome_logits(found.fn)
    if logits.shape[-1] > MOST_EXACT_CLASSES:
        raise ValueError(
            f"Site {site['name']!r}: linearised predictions of {logits.shape[-1]} "
            "classes take one backward pass fewer for each token. Use method='sample'."
        )
    mask = found.mask.to(logits.device)
    rows, places = chosen_outcomes(mask, tokens, site["name"])
    gaussians = []
    for part in components:
        with torch.enable_grad():
            if tokens == "last":  # of all, only these have backward passes
                gaussians.append(part.linearized(batch, tokens=places))
                continue
            each = part.linearized(batch, tokens="each")
        gaussians.append(
            GaussianLogits(
                each.mean[rows, places],
                each.covariance_matrix[rows, places],
                cutpoints=None
                if each.cutpoints is None
                else each.cutpoints[rows, places],
            )
        )
    log_p, entropy = _averaged(gaussians, pi, integral)
    labels = None
    if site["is_observed"]:
        labels = token_labels(site, rows, places)
    if tokens == "last":
        return Prediction(log_probs=log_p, aleatoric_entropy=entropy, labels=labels)
    return token_prediction(log_p, entropy, rows, places, len(mask), labels, None)
