r"""Which data to label next: the mutual information of labels and weights.

Of one datum it's :math:`I(y; w) = H(E_s p_s) - E_s H(p_s)`, the epistemic entropy. Of
several, with A those chosen so far, it grows by :math:`I(y_n; w | y_A)`, which takes
the joint distribution of :math:`y_A` and the draw: one row of log p(configuration |
draw s), (M, S), for each of M configurations of the labels. With two classes, say,

    chosen     M    configurations
    nothing    1    ()
    n          2    (0) (1)
    n, m       4    (0, 0) (0, 1) (1, 0) (1, 1)

so that M grows as C to the number of the chosen, until they are sampled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pyro_lora.ground.autocast import outside_autocast
from pyro_lora.ground.interrupts import leaving_no_trace
from pyro_lora.ground.progress import progress
from pyro_lora.ground.settings import check_count, check_word
from pyro_lora.ground.summary import FieldsShown
from pyro_lora.predict.prediction import Prediction

# Numbers in the largest intermediate array: 256 MB of float64.
_MOST_NUMBERS = 2**25


@dataclass(frozen=True, eq=False, repr=False)
class Acquisition(FieldsShown):
    """The data that are worth a label, most informative first.

    Attributes:
        indices: Their places among the prediction's data, (num,).
        scores: Nats, (num,): of ``"bald"`` each datum's own mutual information, of
            ``"batch_bald"`` the joint one of the data up to it.
    """

    indices: Tensor
    scores: Tensor


@leaving_no_trace
def acquire(
    prediction: Prediction,
    num: int,
    *,
    method: Literal["bald", "batch_bald"] = "bald",
    max_configurations: int = 4096,
    progress_bar: bool | None = None,
) -> Acquisition:
    r"""Choose the data whose labels would tell most about the weights.

    ``"bald"``: the largest :math:`I(y_n; w) = H(E\,p_n) - E\,H(p_n)` (Houlsby et al.
    2011, https://arxiv.org/abs/1112.5745), each datum for itself, so that copies of one
    datum are all chosen. ``"batch_bald"``: the joint :math:`I(y_1, \dots, y_b; w)`,
    grown greedily (Kirsch et al. 2019, https://arxiv.org/abs/1906.08158), by

    .. math:: I(y_n; w | y_A) = \sum_m \pi_m H(\sum_s W_{ms} p_{sn}) - E_s H(p_{sn}),

    where :math:`\pi_m` is the probability of the m-th configuration of the labels
    chosen before, and :math:`W_{ms}` that of draw s given them. All configurations are
    gone through while there are at most ``max_configurations``; then as many are
    sampled, with torch's generator.

    Args:
        prediction: Of the pool; ``"batch_bald"`` needs one by
            ``predict(keep_draws=True)``, of any posterior.
        num: How many data to choose.
        method: ``"bald"`` or ``"batch_bald"``.
        max_configurations: M, of the labels of chosen data.
        progress_bar: Show one, of the data chosen by ``"batch_bald"``; None: on a
            terminal or in a notebook.

    Returns:
        The chosen data and their scores. Those of ``"batch_bald"`` can't exceed
        log S: take S draws well above the exponential of the score.

    Raises:
        ValueError: If ``num`` is more than there are data, the method is unknown, there
            are no classes, or the draws weren't kept.

    >>> sure, torn = [0.99, 0.01], [0.5, 0.5]
    >>> p = torch.tensor([[sure, sure, torn], [sure, sure[::-1], torn]])
    >>> prediction = Prediction(
    ...     log_probs=p.mean(0).log(),
    ...     aleatoric_entropy=torch.special.entr(p).sum(-1).mean(0),
    ...     draw_log_probs=p.log(),
    ... )
    >>> acquire(prediction, 1).indices
    tensor([1])
    """
    if not isinstance(prediction, Prediction):
        raise ValueError(
            f"prediction must be a Prediction of classes, found a "
            f"{type(prediction).__name__}."
        )
    num_data, num_classes = prediction.log_probs.shape
    check_count("num", num, 0)
    check_count("max_configurations", max_configurations)
    if not 1 <= num <= num_data:
        raise ValueError(f"num must be from 1 to {num_data}, the data; found {num}.")
    check_word("method", method, ("bald", "batch_bald"))
    if method == "bald":
        scores, indices = prediction.epistemic_entropy.topk(num)
        return Acquisition(indices, scores)
    if max_configurations < num_classes:
        raise ValueError(
            f"max_configurations must be at least {num_classes}, the classes; found "
            f"{max_configurations}."
        )
    draws = prediction.draw_log_probs
    if draws is None:
        raise ValueError(
            "batch_bald needs each draw's probabilities, which this prediction hasn't. "
            "Use predict(..., keep_draws=True)."
        )
    with progress(
        range(num), title="Acquire", unit="datum", shown=progress_bar
    ) as steps:
        return _batch_bald(draws.double(), steps, max_configurations)


def _batch_bald(
    log_p: Tensor, steps: Iterable[int], max_configurations: int
) -> Acquisition:
    num_draws, _, num_classes = log_p.shape
    p = log_p.exp()  # (S, N, C)
    aleatoric = torch.special.entr(p).sum(-1).mean(0)
    # log p(configuration | draw), (M, S), at first of the empty configuration
    joint = log_p.new_zeros(1, num_draws)
    share = log_p.new_zeros(1)  # log pi_m
    chosen: list[int] = []
    scores: list[Tensor] = []
    is_exact = True
    for _ in steps:
        # A configuration that no draw allows has no weights, and a share of 0.
        weights = joint.softmax(1).nan_to_num(0.0)
        gain = _expected_entropy(weights, share.exp(), p) - aleatoric
        gain[chosen] = -math.inf  # each datum once
        best = int(gain.argmax())
        chosen.append(best)
        scores.append(gain[best].clamp_min(0))
        is_exact = is_exact and len(joint) * num_classes <= max_configurations
        if is_exact:
            # Given the weights labels are independent: their log probabilities add.
            joint = (joint[:, None] + log_p[:, best].mT).flatten(0, 1)
            share = joint.logsumexp(1) - math.log(num_draws)
        else:
            joint = _sampled_configurations(log_p[:, chosen], max_configurations)
            share = joint.new_full((len(joint),), -math.log(len(joint)))
    device = log_p.device
    return Acquisition(
        torch.tensor(chosen, device=device), torch.stack(scores).cumsum(0)
    )


@outside_autocast()
def _expected_entropy(weights: Tensor, share: Tensor, p: Tensor) -> Tensor:
    """Entropy of each datum's label given a configuration, averaged over those, (N,).

    Args:
        weights: Of the draws given each configuration, (M, S).
        share: Probability of each configuration, (M,).
        p: (S, N, C).
    """
    size = max(1, _MOST_NUMBERS // (len(weights) * p.shape[-1]))
    entropies = []
    for chunk in p.split(size, dim=1):
        given = torch.tensordot(weights, chunk, 1)  # (M, N', C)
        entropies.append(share @ torch.special.entr(given).sum(-1))
    return torch.cat(entropies)


def _sampled_configurations(log_p: Tensor, num: int) -> Tensor:
    """Log probabilities (M, S) under each draw of labels sampled from the average.

    Args:
        log_p: Of the chosen data, (S, A, C).
        num: M.
    """
    num_draws, num_chosen, _ = log_p.shape
    # A stratified sample of the mixture: equally many from each draw, up to one.
    order = torch.randperm(num_draws, device=log_p.device)
    source = order.repeat(-(-num // num_draws))[:num]
    joint = log_p.new_zeros(num, num_draws)
    for a in range(num_chosen):
        labels = torch.multinomial(log_p[source, a].exp(), 1)[:, 0]  # (M,)
        joint += log_p[:, a, labels].mT
    return joint
