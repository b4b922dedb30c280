r"""Predictions of one batch, averaged over draws of the weights.

With S draws w_s and one set of them for all data, :math:`p(y | x) = \frac1S \sum_s p(y
| x, w_s)`: probabilities are averaged, never logits, as log p = logsumexp_s log p_s -
log S. Its entropy is the total one, the mean of the draws' entropies the aleatoric one:
draws that say (.9, .1) and (.1, .9) average to (.5, .5), of entropy log 2 = .69, where
each by itself has .33. Draws go through the network a few at a time, so that sums, and
no draw's own probabilities, are all that stays; and, where ranks share the draws, sums
are what each sends.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from pyro_lora.likelihood import likelihoods
from pyro_lora.likelihood.batch import Batch
from pyro_lora.likelihood.likelihoods import Likelihood
from pyro_lora.likelihood.model_trace import IGNORED
from pyro_lora.likelihood.outcomes import one_class_log_probs, single_outcomes
from pyro_lora.predict.any_prediction import AnyPrediction, NumberPrediction
from pyro_lora.predict.draws import ModelAtDraws
from pyro_lora.predict.mixture_prediction import MixturePrediction
from pyro_lora.predict.multi_label_prediction import multi_label_prediction
from pyro_lora.predict.prediction import Prediction
from pyro_lora.predict.regression import RegressionPrediction
from pyro_lora.predict.token_prediction import (
    WhichOutcomes,
    chosen_tokens,
    is_binary,
    token_labels,
    token_prediction,
)


@dataclass(frozen=True, eq=False)
class Sampled:
    """Predictions by draws.

    Attributes:
        at_draws: The model at S draws.
        which: Which outcomes of a datum.
        keep_draws: Whether each draw's probabilities stay.
    """

    at_draws: ModelAtDraws
    which: WhichOutcomes | None
    keep_draws: bool = False

    @property
    def takes_one_batch(self) -> bool:
        """Whether a second batch couldn't be put beside the first: it can."""
        return False

    @property
    def num_runs(self) -> int:
        """How often a batch goes through the network."""
        return self.at_draws.num_runs

    @torch.no_grad()
    def predict(self, batch: Batch) -> AnyPrediction:
        """The prediction of one batch, by its likelihood's type.

        Args:
            batch: The model's keyword arguments, without labels; of tokens, with them.

        Returns:
            Without labels, but those of tokens.

        Raises:
            ValueError: If the likelihood has no such outcomes.
        """
        obs_site = self.at_draws.obs_site
        stream = (t.nodes[obs_site] for t in self.at_draws.traces(batch))
        first = next(stream)
        single = single_outcomes(first["fn"])
        likelihood = likelihoods.of(single.fn)
        nodes = chain([first], stream)
        if likelihood.classes is None:
            own = [single_outcomes(node["fn"]).fn for node in nodes]
            return numbers([*chain(*self.at_draws.ranks.collected(own))])
        if self.which is not None:
            mask = single.inside[0].to(likelihood.classes.logits.device)
            return self._several(nodes, mask, likelihood, self.which)
        log_probs = (one_class_log_probs(node["fn"]) for node in nodes)
        return self._classes(log_probs, likelihood)

    def _classes(self, chunks: Iterable[Tensor], likelihood: Likelihood) -> Prediction:
        kept: list[Tensor] = []

        def keeping() -> Iterator[Tensor]:
            for chunk in chunks:
                kept.append(chunk)
                yield chunk

        ranks = self.at_draws.ranks
        log_p, entropy = self._averaged(keeping() if self.keep_draws else chunks)
        assert likelihood.classes is not None  # predict has seen to it
        return Prediction(
            log_probs=log_p,
            aleatoric_entropy=entropy,
            draw_log_probs=ranks.gathered(torch.cat(kept)) if self.keep_draws else None,
            ordered=likelihood.classes.cutpoints is not None,
        )

    def _averaged(self, chunks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Of (S', B, C): log of the mean probability (B, C), and the mean entropy."""
        log_sum: Tensor | None = None
        entropy: Tensor | None = None
        for log_p in chunks:
            of_chunk = torch.special.entr(log_p.exp()).sum((0, -1))
            entropy = of_chunk if entropy is None else entropy + of_chunk
            # log Σ_s p_s over all draws, from those of one chunk after another
            own = log_p.logsumexp(0)
            log_sum = own if log_sum is None else torch.logaddexp(log_sum, own)
        assert log_sum is not None
        assert entropy is not None
        num_draws, ranks = self.at_draws.num_draws, self.at_draws.ranks
        log_mean = ranks.log_sum(log_sum) - math.log(num_draws)
        return log_mean, ranks.sum(entropy) / num_draws

    def _several(
        self,
        nodes: Iterable[dict[str, Any]],
        mask: Tensor,
        likelihood: Likelihood,
        which: WhichOutcomes,
    ) -> AnyPrediction:
        chosen = chosen_tokens(mask, which, self.at_draws.obs_site)
        labels: Tensor | None = None
        by_text: list[Tensor] = []

        def chunks() -> Iterator[Tensor]:
            nonlocal labels
            for node in nodes:
                classes = likelihoods.of(single_outcomes(node["fn"]).fn).classes
                assert classes is not None  # which_outcomes has seen to it
                log_p = (
                    classes.logits[:, chosen.rows, chosen.places]
                    .double()
                    .log_softmax(-1)
                )  # (S', M, C)
                labels = token_labels(node, chosen)
                if labels is not None:
                    # A draw's probability of a text is the product over its tokens.
                    index = labels.clamp_min(0).expand(log_p.shape[:2])
                    of_labels = log_p.gather(2, index[..., None])
                    of_labels = of_labels * (labels != IGNORED)[..., None]
                    zeros = log_p.new_zeros(len(log_p), len(mask))
                    by_text.append(zeros.index_add(1, chosen.rows, of_labels[..., 0]))
                yield log_p

        if which == "last":
            return replace(self._classes(chunks(), likelihood), labels=labels)
        log_p, entropy = self._averaged(chunks())
        if which == "labels":
            return multi_label_prediction(log_p, entropy, len(mask))
        texts = None
        if by_text:
            of_draws = self.at_draws.ranks.gathered(torch.cat(by_text))
            texts = of_draws.logsumexp(0) - math.log(len(of_draws))
        return token_prediction(
            log_p, entropy, chosen, labels, texts, is_binary(likelihood)
        )


def numbers(fns: Sequence[Any], weights: Tensor | None = None) -> NumberPrediction:
    """A mixture of distributions of numbers, in closed form where there is one.

    Args:
        fns: Single outcomes' distributions, one for some draws after the others, each
            of batch shape (S', B), or (S', B, P) of P outputs.
        weights: Of all draws, (S,); None is equal.

    Returns:
        Without labels.
    """
    of_draws = [likelihoods.of(fn) for fn in fns]
    noise = [x.noise for x in of_draws if x.noise is not None]
    if not noise:
        return MixturePrediction(components=[fns], weights=weights)

    def joined(values: list[Tensor]) -> Tensor:
        one = torch.cat(values).double()  # (S, B), or (S, B, P)
        return one[..., 0] if one.ndim == 3 and one.shape[-1] == 1 else one

    return RegressionPrediction(
        loc=joined([x.predictor[..., 0] for x in of_draws]),
        noise_scale=joined([x.scale for x in noise]),
        df=joined([x.df for x in noise if x.df is not None])
        if noise[0].df is not None
        else None,
        weights=weights,
    )
