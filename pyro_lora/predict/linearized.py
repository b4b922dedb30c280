"""Predictions of one batch by the network linearised around the mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_lora.curvature.gaussian_logits import (
    GaussianLogits,
    JointGaussianLogits,
    expected_entropy,
)
from pyro_lora.likelihood import likelihoods
from pyro_lora.likelihood.batch import Batch
from pyro_lora.likelihood.likelihoods import MOST_EXACT_CLASSES
from pyro_lora.likelihood.model_trace import (
    Model,
    evaluating_model,
    likelihood_site,
    trace_at,
)
from pyro_lora.likelihood.outcomes import single_outcomes
from pyro_lora.posteriors.laplace_posterior import LaplacePosterior
from pyro_lora.posteriors.mixture_posterior import MixturePosterior
from pyro_lora.posteriors.posterior import Posterior, is_gaussian, kind_of
from pyro_lora.predict.prediction import Prediction
from pyro_lora.predict.regression import RegressionPrediction
from pyro_lora.predict.sampled import AnyPrediction, NumberPrediction, numbers
from pyro_lora.predict.token_prediction import (
    Tokens,
    check_tokens,
    chosen_tokens,
    token_labels,
    token_prediction,
)

Integral = Callable[[GaussianLogits], Tensor]


def check_linearizable(posterior: Posterior, obs_site: str | None) -> None:
    """Check that a posterior is made of Gaussians for the likelihood's site.

    Raises:
        ValueError: If it isn't.
    """
    if not is_gaussian(posterior):
        other = posterior
        if isinstance(posterior, MixturePosterior):
            other = next(x for x in posterior.components if not is_gaussian(x))
        raise ValueError(
            "method='linearized' needs a LaplacePosterior or a mixture of them, found "
            f"{kind_of(other)}. Use method='sample', or make one by "
            "AutoLaplace(...).laplace_approximation(batches)."
        )
    for _, part in posterior.gaussians():
        if part.obs_site is not None and obs_site != part.obs_site:
            raise ValueError(
                f"obs_site is {obs_site!r}, but the posterior was made for the site "
                f"{part.obs_site!r}. Leave obs_site out, or make a posterior for it."
            )


def obstacle(fn: Any, tokens: Tokens | None = None) -> str | None:
    """Why a network can't be linearised in front of a likelihood; None if it can.

    Args:
        fn: The likelihood's distribution.
        tokens: Which outcomes of a datum.

    Raises:
        TypeError: If nothing is known of it.
    """
    classes = likelihoods.of(single_outcomes(fn).fn).classes
    if tokens is not None and classes is not None:
        num_classes = classes.logits.shape[-1]
        if num_classes > MOST_EXACT_CLASSES:
            return f"{num_classes} classes take as many backward passes for each token"
    return None


def linearized(
    posterior: Posterior,
    model: Model,
    batch: Batch,
    integral: Integral,
    obs_site: str | None,
    tokens: Tokens | None,
    num_draws: int = 0,
) -> AnyPrediction:
    """The prediction of one batch, by its likelihood's type.

    Args:
        posterior: A Gaussian, or a mixture of such: the network runs once for each.
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
    parts = posterior.gaussians()
    pi = torch.tensor([weight for weight, _ in parts], dtype=torch.float64)
    components = [replace(part, model=model, obs_site=obs_site) for _, part in parts]
    if tokens is not None:
        return _tokens(components, model, pi, batch, integral, tokens)
    with torch.enable_grad():  # for the Jacobian, wherever predict is called
        if num_draws:
            joint = [part.linearized(batch, joint=True) for part in components]
            gaussians = [g.marginals() for g in joint]
        else:
            gaussians = [part.linearized(batch) for part in components]
    if gaussians[0].numbers is not None:
        return _numbers(gaussians, pi)
    log_p, entropy = _averaged(gaussians, pi, integral)
    draws = _joint_draws(joint, pi, num_draws) if num_draws else None
    return Prediction(
        log_probs=log_p,
        aleatoric_entropy=entropy,
        draw_log_probs=draws,
        ordered=gaussians[0].cutpoints is not None,
    )


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


def _numbers(gaussians: list[GaussianLogits], pi: Tensor) -> NumberPrediction:
    if all(g.noise_variance is not None for g in gaussians):
        return _normal(gaussians, pi)
    found = [g.components() for g in gaussians]
    fns = [fn for fn, _ in found]
    weights = torch.cat([w * x for w, (_, x) in zip(pi, found, strict=True)])
    return numbers(fns, weights)


def _normal(gaussians: list[GaussianLogits], pi: Tensor) -> RegressionPrediction:
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
    single = single_outcomes(site["fn"])
    classes = likelihoods.of(single.fn).classes
    check_tokens(single, classes, tokens, site["name"])
    assert classes is not None  # check_tokens has seen to it
    logits = classes.logits
    if logits.shape[-1] > MOST_EXACT_CLASSES:
        raise ValueError(
            f"Site {site['name']!r}: linearised predictions of {logits.shape[-1]} "
            "classes take one backward pass fewer for each token. Use method='sample'."
        )
    mask = single.inside.to(logits.device)
    rows, places = chosen_tokens(mask, tokens, site["name"])
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
        return Prediction(
            log_probs=log_p,
            aleatoric_entropy=entropy,
            labels=labels,
            ordered=classes.cutpoints is not None,
        )
    return token_prediction(log_p, entropy, rows, places, len(mask), labels, None)
