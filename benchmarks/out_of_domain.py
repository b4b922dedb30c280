"""Scores that say how foreign a text is, larger for what a network hasn't seen.

Used by ``python -m benchmarks.language_model_quality``, whose table compares them by
their AUROC: those of a prediction, of a posterior, and the usual ones that ask no
posterior at all.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

import pyro_lora as pl
from pyro_lora.predict.state_distance import shrunk_covariance

Batches = Iterable[dict[str, Tensor]]


def total_entropy(prediction: pl.Prediction) -> Tensor:
    """Of the averaged probabilities, (N,)."""
    return prediction.total_entropy


def epistemic_entropy(prediction: pl.Prediction) -> Tensor:
    """What of it more training data would take away, (N,)."""
    return prediction.epistemic_entropy


def doubt(prediction: pl.Prediction) -> Tensor:
    """One less the largest probability, (N,)."""
    return 1 - prediction.probs.amax(1)


OF_PREDICTIONS: dict[str, Callable[[pl.Prediction], Tensor]] = {
    "total entropy": total_entropy,
    "epistemic entropy": epistemic_entropy,
    "1 - largest probability": doubt,
}


def variance_of_draws(draw_log_probs: Tensor) -> Tensor:
    """Of the logits before the softmax, summed over classes, (N,), from (S, N, C).

    Logits are known up to a shift of all of them: their mean over the classes is 0.
    """
    centered = draw_log_probs - draw_log_probs.mean(-1, keepdim=True)
    return centered.var(0).sum(-1)


def variance_of_logits(posterior: pl.LaplacePosterior, batches: Batches) -> Tensor:
    """The same of the linearised network's, exact, (N,)."""
    traces = []
    for batch in batches:
        inputs = {k: x for k, x in batch.items() if k != "labels"}
        covariance = posterior.linearized(inputs).covariance_matrix  # (B, C, C)
        traces.append(covariance.diagonal(dim1=-2, dim2=-1).sum(-1))
    return torch.cat(traces)


@dataclass(frozen=True)
class Mahalanobis:
    """Distance to the nearest class, in the metric of the covariance within classes.

    Lee et al. (2018), https://arxiv.org/abs/1807.03888. The covariance is shrunk
    towards a multiple of the identity as Ledoit and Wolf (2004) do, since there are
    fewer rows than dimensions.

    Attributes:
        means: Of each class, (C, I).
        root: Cholesky factor of the covariance, (I, I).
    """

    means: Tensor
    root: Tensor

    @classmethod
    def of(cls, states: Tensor, labels: Tensor) -> "Mahalanobis":
        """From states of training rows, (N, I), and their labels, (N,)."""
        states = states.double()
        means = torch.stack([states[labels == c].mean(0) for c in labels.unique()])
        _, index = labels.unique(return_inverse=True)
        covariance = shrunk_covariance(states - means[index])
        return cls(means, torch.linalg.cholesky(covariance))

    def __call__(self, states: Tensor) -> Tensor:
        """Squared distance of each of (N, I), (N,)."""
        errors = states.double() - self.means[:, None]  # (C, N, I)
        whitened = torch.linalg.solve_triangular(self.root, errors.mT, upper=False)
        return whitened.square().sum(-2).amin(0)
