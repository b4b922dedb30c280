"""Whether draws of a Gaussian predict far worse than its mode, which they may.

A Gaussian over the weights of several layers describes the network linearised at the
mode. Along directions that the data say nothing of it is as wide as the prior, and
draws there lead the network itself astray, up to predictions at chance.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_lora.ground.warning import warn
from pyro_lora.predict.prediction import Prediction
from pyro_lora.predict.regression import RegressionPrediction

# What the mode must be ahead by, in accuracy, and where only its own probabilities say
# what is right. Draws of a posterior over the last layer, which are right, stay below.
_ACCURACY, _EXPECTED_ACCURACY = 0.05, 0.15
_NATS = 0.1
_RMSE = 0.1  # of the mode's
_NUM_ERRORS = 3.0  # standard errors of the mean over the data


def warn_if_worse(sampled: Any, at_mode: Any) -> None:
    """Warn, to predict's caller, of draws that predict far worse than their mode.

    Args:
        sampled: The prediction by draws, with labels where there are any.
        at_mode: The same data at the mode.
    """
    found = None
    if isinstance(sampled, Prediction):
        found = _of_classes(sampled, at_mode)
    elif isinstance(sampled, RegressionPrediction):
        found = _of_reals(sampled, at_mode)
    if found is not None:
        warn(
            f"Averaged over draws of a Gaussian posterior, {found} at its mode: the "
            "draws leave the range where the Gaussian holds. Predict with the "
            "linearised network (method='linearized', the default), or use a posterior "
            "over the last layer (AutoLaplace(sites='last_layer')) or particles.",
        )


def _of_classes(sampled: Prediction, at_mode: Prediction) -> str | None:
    chosen = at_mode.log_probs.argmax(-1)
    other = sampled.log_probs.argmax(-1)
    if sampled.labels is None:
        right = at_mode.probs.gather(1, chosen[:, None])
        left = at_mode.probs.gather(1, other[:, None])
        if not _is_ahead((right - left)[:, 0], _EXPECTED_ACCURACY):
            return None
        same = float((chosen == other).double().mean())
        return (
            f"{100 * (1 - same):.0f} % of the predicted classes are others than those"
        )
    counts = sampled.labels >= 0
    labels = sampled.labels[counts].to(chosen)
    right, left = chosen[counts] == labels, other[counts] == labels
    nll, best = (
        -p.log_probs[counts].gather(1, labels[:, None])[:, 0]
        for p in (sampled, at_mode)
    )
    if not (
        _is_ahead(right.double() - left.double(), _ACCURACY)
        or _is_ahead((nll - best).double(), _NATS)
    ):
        return None
    return (
        f"the prediction has accuracy {left.double().mean():.3f} and NLL "
        f"{nll.mean():.3f}, against {right.double().mean():.3f} and {best.mean():.3f}"
    )


def _of_reals(
    sampled: RegressionPrediction, at_mode: RegressionPrediction
) -> str | None:
    if sampled.labels is None:
        shift = (sampled.mean - at_mode.mean).square()
        noise = at_mode.noise_variance
        if not _is_ahead((shift - noise).flatten(), 0.0):
            return None
        moved, scale = shift.mean().sqrt(), noise.mean().sqrt()
        return f"the outcomes' mean is {moved:.3g} (noise {scale:.3g}) from that"
    counts = sampled.labels.isfinite()
    error, best = (
        (p.mean - sampled.labels).square()[counts] for p in (sampled, at_mode)
    )
    gain = float(((1 + _RMSE) ** 2 - 1) * best.mean())
    if not _is_ahead(error - best, gain):
        return None
    return (
        f"the prediction has RMSE {error.mean().sqrt():.3g}, against "
        f"{best.mean().sqrt():.3g}"
    )


def _is_ahead(gains: Tensor, least: float) -> bool:
    """Whether the mean over the data is large, and larger than chance makes it."""
    if len(gains) < 2:
        return False
    gains = gains.double()
    error = gains.std() / len(gains) ** 0.5
    return bool(gains.mean() > torch.clamp(_NUM_ERRORS * error, min=least))
