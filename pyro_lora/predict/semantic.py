"""Texts that mean the same, and the uncertainty about what is meant."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_lora.ground.accumulation import at_least_float32
from pyro_lora.ground.settings import check_function, check_kind
from pyro_lora.ground.summary import FieldsShown


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class SemanticEntropy(FieldsShown):
    r"""Groups of texts with one meaning, and entropies over meanings, in nats.

    Attributes:
        groups: The group of each text, (n,), numbered by first appearance.
        log_probs: Log-probability of each group, (G,): that of its different texts
            together, not normalised over the groups that were seen.
        entropy: :math:`-\sum_c \bar p_c \log \bar p_c` with the groups' probabilities
            normalised over those that were seen, () (Farquhar et al. 2024).
        monte_carlo_entropy: :math:`-\frac1n \sum_i \log p(c_i)` over the n texts, with
            probabilities as they are, () (Kuhn et al. 2023). For texts that were
            drawn from the model; too high as long as likely ones haven't been drawn.
        discrete_entropy: That of the groups' shares of the n texts, () (Farquhar et
            al. 2024). For draws, and where probabilities aren't known.
    """

    groups: Tensor
    log_probs: Tensor
    entropy: Tensor
    monte_carlo_entropy: Tensor
    discrete_entropy: Tensor


def semantic_entropy(
    texts: Sequence[str],
    log_probs: Tensor,
    same_meaning: Callable[[str, str], bool] | None = None,
    *,
    key: Callable[[str], Hashable] | None = None,
) -> SemanticEntropy:
    r"""Entropy over meanings, :math:`-\sum_c p(c) \log p(c)`, of answers to one prompt.

    A meaning's probability is that of all texts which express it,
    :math:`p(c) = \sum_{y \in c} p(y)`; a text that comes twice counts once. "Means the
    same" is made transitive as in the paper: in order, each text joins the first group
    whose first text means the same, else it founds one. Only first texts are compared,
    so with a relation that isn't transitive the order of the texts matters.

    Sources: Kuhn, Gal & Farquhar (2023), https://arxiv.org/abs/2302.09664, algorithm
    1; Farquhar, Kossen, Kuhn & Gal (2024), https://doi.org/10.1038/s41586-024-07421-0.

    Args:
        texts: Answers, n of them, as a rule sampled.
        log_probs: Log-probability of each, (n,), nats; divided by the number of tokens
            if long texts shall not count less, as both papers do.
        same_meaning: Whether two texts mean the same: the group's first text, and
            another. In the papers, that a network for natural-language inference says
            that each entails the other.
        key: Instead of it: texts with equal keys mean the same, as ``str.strip`` or a
            parser of numbers gives them.

    Returns:
        Groups and entropies.

    Raises:
        ValueError: If there are no texts, shapes differ, a log-probability isn't
            finite, or not exactly one of ``same_meaning`` and ``key`` is given.

    >>> import torch
    >>> texts = ["Paris", "paris.", "Rome"]
    >>> log_probs = torch.tensor([0.5, 0.25, 0.25]).log()
    >>> meanings = semantic_entropy(texts, log_probs, key=lambda text: text[0].lower())
    >>> meanings.groups.tolist(), round(meanings.entropy.item(), 3)
    ([0, 0, 1], 0.562)
    """
    _check(texts, log_probs)
    if (same_meaning is None) == (key is None):
        raise ValueError(
            "Pass exactly one of same_meaning, a function of two texts, and key, a "
            "function of one."
        )
    check_function("key or same_meaning", key or same_meaning, "a function of texts")
    if same_meaning is None:
        members = _by_key(texts, key)  # type: ignore[arg-type]
    else:
        members = _by_first_match(texts, same_meaning)
    log_probs = at_least_float32(log_probs.detach())
    groups = torch.tensor(members, device=log_probs.device)
    is_new = torch.tensor(
        [text not in texts[:i] for i, text in enumerate(texts)], device="cpu"
    )
    is_new = is_new.to(log_probs.device)
    of_group = torch.arange(max(members) + 1, device=log_probs.device)
    # p(c) sums over different texts: one that was drawn twice is no more probable.
    inside = (groups == of_group[:, None]) & is_new  # (G, n)
    by_group = log_probs.where(inside, -torch.inf).logsumexp(-1)
    shares = groups.bincount().to(log_probs) / len(texts)
    return SemanticEntropy(
        groups=groups,
        log_probs=by_group,
        entropy=torch.special.entr(by_group.softmax(-1)).sum(),
        monte_carlo_entropy=-by_group[groups].mean(),
        discrete_entropy=torch.special.entr(shares).sum(),
    )


def _by_first_match(
    texts: Sequence[str], same_meaning: Callable[[str, str], bool]
) -> list[int]:
    founders: list[str] = []
    members = []
    for text in texts:
        # A founder stands for its group: the relation needn't be transitive.
        matches = (i for i, first in enumerate(founders) if same_meaning(first, text))
        group = next(matches, len(founders))
        if group == len(founders):
            founders.append(text)
        members.append(group)
    return members


def _by_key(texts: Sequence[str], key: Callable[[str], Hashable]) -> list[int]:
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(key(text), len(numbers)) for text in texts]


def _check(texts: Sequence[str], log_probs: Tensor) -> None:
    if (
        not isinstance(texts, Sequence)
        or isinstance(texts, str)
        or not texts
        or not all(isinstance(text, str) for text in texts)
    ):
        raise ValueError("texts must be one or more strings in a sequence.")
    check_kind("log_probs", log_probs, Tensor, "a tensor, one value for each text")
    if log_probs.shape != (len(texts),):
        raise ValueError(
            f"log_probs have shape {tuple(log_probs.shape)}; expected "
            f"({len(texts)},), one value for each of texts."
        )
    if not log_probs.isfinite().all():
        raise ValueError("log_probs has values that are NaN or infinite.")
