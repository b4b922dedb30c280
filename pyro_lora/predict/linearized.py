r"""Predictions of one batch by the network linearised at the trained weights.

With weights w ~ N(μ, Σ) and J the Jacobian at ŵ, the outputs f(x; ŵ) + J (w - ŵ) are
Gaussian, N(f(x; ŵ) + J (μ - ŵ), J Σ Jᵀ), μ being ŵ unless it was refined, and
:math:`p(y | x) = \int p(y | f) N(f) df` is an integral over a few numbers, without
draws of weights. Of a mixture :math:`\sum_n \pi_n N_n` it's the weighted mean of its
Gaussians' integrals: the network runs once for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from pyro_lora.predict.any_prediction import AnyPrediction, NumberPrediction
from pyro_lora.predict.multi_label_prediction import multi_label_prediction
from pyro_lora.predict.prediction import Prediction
from pyro_lora.predict.regression import RegressionPrediction
from pyro_lora.predict.sampled import numbers
from pyro_lora.predict.token_prediction import (
    ChosenTokens,
    WhichOutcomes,
    chosen_tokens,
    is_binary,
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
    for _, gaussian in posterior.gaussians():
        if gaussian.obs_site is not None and obs_site != gaussian.obs_site:
            raise ValueError(
                f"obs_site is {obs_site!r}, but the posterior was made for the site "
                f"{gaussian.obs_site!r}. Leave obs_site out, or make a posterior for "
                "it."
            )


def not_linearizable(fn: Any, which: WhichOutcomes | None = None) -> str | None:
    """Why a network can't be linearised in front of a likelihood; None if it can.

    Args:
        fn: The likelihood's distribution.
        which: Which outcomes of a datum.

    Raises:
        TypeError: If nothing is known of it.
    """
    classes = likelihoods.of(single_outcomes(fn).fn).classes
    if which is not None and classes is not None:
        num_classes = classes.logits.shape[-1]
        if num_classes > MOST_EXACT_CLASSES:
            return f"{num_classes} classes take as many backward passes for each token"
    return None


@dataclass(frozen=True, eq=False)
class Linearized:
    r"""Predictions by the linearised network.

    Attributes:
        gaussians: The posterior's, at the model and site that are predicted.
        pi: Their weights :math:`\pi`, (n,), float64.
        integral: Log probabilities from Gaussian logits.
        which: Which outcomes of a datum.
        num_draws: How many draws of the logits to keep, joint over the batch.
    """

    gaussians: Sequence[LaplacePosterior]
    pi: Tensor
    integral: Integral
    which: WhichOutcomes | None
    num_draws: int = 0

    @property
    def takes_one_batch(self) -> bool:
        """Whether a second batch couldn't be put beside the first: no joint draws."""
        return self.num_draws > 0

    @property
    def num_runs(self) -> int:
        """How often a batch goes through the network; once more with tokens."""
        return len(self.gaussians) + (self.which is not None)

    def predict(self, batch: Batch) -> AnyPrediction:
        """The prediction of one batch, by its likelihood's type.

        Args:
            batch: The model's keyword arguments, without labels; of tokens, with them.

        Returns:
            Without labels, but those of tokens.

        Raises:
            ValueError: If the likelihood has no such outcomes.
        """
        if self.which is not None:
            return self._several(batch, self.which)
        joint: list[JointGaussianLogits] = []
        with torch.enable_grad():  # for the Jacobian, wherever predict is called
            if self.num_draws:
                joint = [q.linearized(batch, joint=True) for q in self.gaussians]
                outputs = [g.marginals() for g in joint]
            else:
                outputs = [q.linearized(batch) for q in self.gaussians]
        return self._single(outputs, joint)

    def predicted(
        self, site: dict[str, Any], outputs: Sequence[GaussianLogits]
    ) -> AnyPrediction:
        """The same of Gaussians that are known already.

        Args:
            site: The likelihood's, in a trace of the batch.
            outputs: By Gaussian; where a datum has several outcomes, of each of them.
        """
        if self.which is None:
            return self._single(outputs, [])
        inside = single_outcomes(site["fn"]).inside.to(outputs[0].mean.device)
        chosen = chosen_tokens(inside, self.which, site["name"])
        each = [_at_tokens(g, chosen.rows, chosen.places) for g in outputs]
        return self._of_tokens(site, chosen, each, self.which)

    def _single(
        self, outputs: Sequence[GaussianLogits], joint: Sequence[JointGaussianLogits]
    ) -> AnyPrediction:
        if outputs[0].numbers is not None:
            return self._numbers(outputs)
        log_p, entropy = self._averaged(outputs)
        return Prediction(
            log_probs=log_p,
            aleatoric_entropy=entropy,
            draw_log_probs=self._joint_draws(joint) if joint else None,
            ordered=outputs[0].cutpoints is not None,
        )

    def _averaged(self, outputs: Sequence[GaussianLogits]) -> tuple[Tensor, Tensor]:
        """Log of the mean probability (B, C), and the mean entropy (B,)."""
        # The integrals are normalised up to their last 1e-8.
        log_p = torch.stack([self.integral(g).log_softmax(-1) for g in outputs])
        entropy = torch.stack([expected_entropy(g) for g in outputs])
        pi = self.pi.to(log_p)  # log_p: (n, B, C)
        return (log_p + pi.log()[:, None, None]).logsumexp(0), pi @ entropy

    def _joint_draws(self, joint: Sequence[JointGaussianLogits]) -> Tensor:
        """Log probabilities under draws of the weights, (S, B, C), by Gaussian."""
        # A draw of the mixture is one of its n-th Gaussian with probability π_n.
        drawn = torch.multinomial(self.pi, self.num_draws, replacement=True)
        counts = torch.bincount(drawn, minlength=len(joint)).tolist()
        pairs = zip(joint, counts, strict=True)
        return torch.cat([g.log_probs_of(g.rsample((n,))) for g, n in pairs if n > 0])

    def _numbers(self, of_gaussians: Sequence[GaussianLogits]) -> NumberPrediction:
        outputs, weights = [], []
        for weight, whole in zip(self.pi, of_gaussians, strict=True):
            parts, of_parts = whole.given_scale()
            outputs += parts
            weights.append(weight * of_parts)
        pi = torch.cat(weights)
        noise = [g.noise_variance for g in outputs if g.noise_variance is not None]
        if len(noise) < len(outputs):
            # A Gaussian of f is a weighted mean over nodes f_q; so is a mixture's.
            pairs = [g.components() for g in outputs]
            pi = torch.cat([w * x for w, (_, x) in zip(pi, pairs, strict=True)])
            return numbers([fn for fn, _ in pairs], pi)

        def joined(values: Sequence[Tensor]) -> Tensor:
            each = torch.stack(list(values)).double()  # (n, B, P)
            return each[..., 0] if each.shape[-1] == 1 else each

        variances = [g.covariance_matrix.diagonal(dim1=-2, dim2=-1) for g in outputs]
        return RegressionPrediction(
            loc=joined([g.mean for g in outputs]),
            noise_scale=joined(noise).sqrt(),
            loc_variance=joined(variances).clamp_min(0),
            weights=pi,
        )

    def _several(self, batch: Batch, which: WhichOutcomes) -> AnyPrediction:
        first = self.gaussians[0]
        assert first.model is not None  # linearized_at has set it
        with torch.no_grad(), evaluating_model():
            trace = trace_at(first.model, first.origin(), batch)
        site = likelihood_site(trace, first.obs_site, first.origin())
        single = single_outcomes(site["fn"])
        likelihood = likelihoods.of(single.fn)
        assert likelihood.classes is not None  # which_outcomes has seen to it
        logits = likelihood.classes.logits
        if logits.shape[-1] > MOST_EXACT_CLASSES:
            raise ValueError(
                f"Site {site['name']!r}: linearised predictions of {logits.shape[-1]} "
                "classes take one backward pass fewer for each token. Use "
                "method='sample'."
            )
        chosen = chosen_tokens(single.inside.to(logits.device), which, site["name"])
        with torch.enable_grad():
            if which == "last":  # of all, only these have backward passes
                outputs = [
                    q.linearized(batch, tokens=chosen.places) for q in self.gaussians
                ]
            else:
                each = [q.linearized(batch, tokens="each") for q in self.gaussians]
                outputs = [_at_tokens(g, chosen.rows, chosen.places) for g in each]
        return self._of_tokens(site, chosen, outputs, which)

    def _of_tokens(
        self,
        site: dict[str, Any],
        chosen: ChosenTokens,
        outputs: Sequence[GaussianLogits],
        which: WhichOutcomes,
    ) -> AnyPrediction:
        """Of the tokens that were chosen, or labels."""
        log_p, entropy = self._averaged(outputs)
        if which == "labels":
            return multi_label_prediction(log_p, entropy, chosen.num_data)
        labels = token_labels(site, chosen)
        if which == "each":
            binary = is_binary(likelihoods.of(single_outcomes(site["fn"]).fn))
            return token_prediction(log_p, entropy, chosen, labels, None, binary)
        return Prediction(
            log_probs=log_p,
            aleatoric_entropy=entropy,
            labels=labels,
            ordered=outputs[0].cutpoints is not None,
        )


def linearized_at(
    posterior: Posterior,
    model: Model,
    obs_site: str | None,
    integral: Integral,
    which: WhichOutcomes | None,
    num_draws: int,
) -> Linearized:
    """How a posterior of Gaussians is predicted from.

    Args:
        posterior: A Gaussian, or a mixture of such.
        model: The Pyro model.
        obs_site: The likelihood's site.
        integral: Log probabilities from Gaussian logits.
        which: Which outcomes of a datum.
        num_draws: How many draws of the logits to keep.
    """
    pairs = posterior.gaussians()
    return Linearized(
        [replace(gaussian, model=model, obs_site=obs_site) for _, gaussian in pairs],
        torch.tensor(
            [weight for weight, _ in pairs],
            dtype=torch.float64,
            device=next(iter(pairs[0][1].mode().values())).device,
        ),
        integral,
        which,
        num_draws,
    )


def _at_tokens(each: GaussianLogits, rows: Tensor, places: Tensor) -> GaussianLogits:
    """The logits (M, C) of some tokens, of those of all (B, T, C)."""
    cutpoints = each.cutpoints
    return GaussianLogits(
        each.mean[rows, places],
        each.covariance_matrix[rows, places],
        cutpoints=None if cutpoints is None else cutpoints[rows, places],
        are_all_there=each.are_all_there,
    )
