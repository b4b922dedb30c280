"""Ready Pyro models around a lifted network, short enough to copy and change.

Each is a value with fields, which is called with a batch: it can be printed, compared
and pickled, as a function inside a function can't.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from pyro_lora.ground.settings import check_count, check_kind, check_positive
from pyro_lora.ground.summary import FieldsShown
from pyro_lora.lifting.lifted_network import LiftedNetwork, check_lora
from pyro_lora.likelihood.model_trace import IGNORED


@dataclass(frozen=True, repr=False)
class classification(FieldsShown):
    r"""One label for each input, from the network's logits.

    :math:`y \sim \mathrm{Categorical}(\mathrm{softmax}\, f(x))`.

    Args:
        lora: A lifted network whose output has ``.logits``, (..., B, C).
        num_data: N, data in all, for which each batch stands.

    The model's keyword arguments are the network's inputs, (B, ...), and ``labels``,
    (B,) or None.
    """

    lora: LiftedNetwork
    num_data: int

    def __post_init__(self) -> None:
        _check_data(self.lora, self.num_data)

    def __call__(self, labels: Tensor | None = None, **inputs: Any) -> Tensor:
        """Sample the weights and the labels of a batch."""
        net = self.lora()  # the pyro.sample statements
        logits = net(**inputs).logits
        first = next(iter(inputs.values()))
        with pyro.plate("data", self.num_data, subsample=first):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=labels)


@dataclass(frozen=True, repr=False)
class regression(FieldsShown):
    r"""One real number for each input: :math:`y \sim N(f(x), \sigma^2)`.

    Args:
        lora: A lifted network whose output has ``.logits``, (..., B, 1), as
            transformers make it with ``num_labels=1``.
        num_data: N, data in all, for which each batch stands.
        scale: :math:`\sigma`: a number, or the prior of the latent site "noise"; None
            is LogNormal(0, 1), for labels of about unit variance.

    The model's keyword arguments are the network's inputs, (B, ...), and ``labels``,
    (B,) or None.

    Raises:
        ValueError: If ``scale`` is a number that isn't positive; from the model, if
            the network has more than one output.
    """

    lora: LiftedNetwork
    num_data: int
    scale: float | TorchDistributionMixin | None = None

    def __post_init__(self) -> None:
        _check_data(self.lora, self.num_data)
        if not isinstance(self.scale, TorchDistributionMixin | None):
            check_positive("The noise's scale", self.scale)

    def __call__(self, labels: Tensor | None = None, **inputs: Any) -> Tensor:
        """Sample the weights and the labels of a batch."""
        net = self.lora()  # the pyro.sample statements
        logits = net(**inputs).logits
        _check_single(logits)
        noise: Any = self.scale
        if not isinstance(noise, int | float):
            prior = dist.LogNormal(logits.new_zeros(()), 1.0)
            noise = pyro.sample("noise", prior if noise is None else noise)
        first = next(iter(inputs.values()))
        with pyro.plate("data", self.num_data, subsample=first):
            return pyro.sample("y", dist.Normal(logits[..., 0], noise), obs=labels)


@dataclass(frozen=True, repr=False)
class multiple_choice(FieldsShown):
    r"""One of C answers, by the scores of their tokens after the last real token.

    :math:`y \sim \mathrm{Categorical}(\mathrm{softmax}\, f_{c_1 \dots c_C}(x))`, with f
    the logits over the vocabulary there, and c the answers' tokens.

    Args:
        lora: A lifted causal language model, whose output has ``.logits``,
            (..., B, T, V). With left padding, ``logits_to_keep=1`` among its inputs
            saves computing all but the last.
        num_data: N, data in all, for which each batch stands.
        choice_ids: The token of each answer, " A", " B" and so on.

    The model's keyword arguments are the network's inputs, among them
    ``attention_mask``, (B, T), padded on either side, and ``labels``, (B,), places in
    ``choice_ids``, or None.

    Raises:
        ValueError: If there are fewer than two choices, or one is there twice.
    """

    lora: LiftedNetwork
    num_data: int
    choice_ids: Sequence[int]

    def __post_init__(self) -> None:
        _check_data(self.lora, self.num_data)
        kinds: Any = Sequence | Tensor
        check_kind("choice_ids", self.choice_ids, kinds, "a list of token ids")
        for token in self.choice_ids:
            check_count("Each of choice_ids", token, 0)
        choices = torch.as_tensor(self.choice_ids)
        if choices.ndim != 1 or not 2 <= len(choices) == len(choices.unique()):
            raise ValueError(
                "choice_ids must be two or more different token ids, found "
                f"{self.choice_ids}. If answers start with the same token, score them "
                "by another one."
            )
        object.__setattr__(self, "choice_ids", tuple(choices.tolist()))

    def __call__(
        self, attention_mask: Tensor, labels: Tensor | None = None, **inputs: Any
    ) -> Tensor:
        """Sample the weights and the labels of a batch."""
        net = self.lora()  # the pyro.sample statements
        logits = net(attention_mask=attention_mask, **inputs).logits
        last = -1 - attention_mask.flip(1).argmax(1)  # (B,), counted from the right
        rows = torch.arange(len(last), device=last.device)
        choices = torch.tensor(self.choice_ids, device=last.device)
        scores = logits[..., rows, last, :][..., choices]
        with pyro.plate("data", self.num_data, subsample=attention_mask):
            return pyro.sample("y", dist.Categorical(logits=scores), obs=labels)


@dataclass(frozen=True, repr=False)
class language_model(FieldsShown):
    r"""The next token at each place; one datum is a sequence.

    :math:`\log p(x) = \sum_t \log \mathrm{softmax}(f(x_{<t}))_{x_t}`, nats, over the
    tokens that count.

    For ``AutoLaplace`` with ``fisher="mc"``: the exact Fisher information of a
    vocabulary takes too many backward passes.

    Args:
        lora: A lifted causal language model, whose output has ``.logits``,
            (..., B, T, V).
        num_data: N, sequences in all, for which each batch stands.

    The model's keyword arguments are the network's inputs, (B, T), and ``labels``,
    (B, T) or None: the input ids with -100 where a token doesn't count, not shifted, as
    in transformers. Without labels all tokens of the ``attention_mask`` count. A text's
    first token never does, on whichever side the padding is: nothing comes before it.
    """

    lora: LiftedNetwork
    num_data: int

    def __post_init__(self) -> None:
        _check_data(self.lora, self.num_data)

    def __call__(self, labels: Tensor | None = None, **inputs: Any) -> Tensor:
        """Sample the weights and the labels of a batch."""
        net = self.lora()  # the pyro.sample statements
        logits = net(**inputs).logits[..., :-1, :]  # the last token's has no label
        tokens = inputs["input_ids"] if labels is None else labels
        real = inputs.get("attention_mask", torch.ones_like(tokens)) > 0
        counts = (real if labels is None else labels != IGNORED)[:, 1:] & real[:, :-1]
        if labels is not None:
            labels = labels[:, 1:].where(counts, torch.zeros_like(labels[:, 1:]))
        likelihood = dist.Categorical(logits=logits).mask(counts).to_event(1)
        with pyro.plate("data", self.num_data, subsample=tokens):
            return pyro.sample("y", likelihood, obs=labels)


@dataclass(frozen=True, repr=False)
class preference(FieldsShown):
    r"""Which of two texts is preferred, by their rewards; one datum is a pair.

    :math:`y \sim \mathrm{Bernoulli}(\sigma(r(x_1) - r(x_2) - m))`, with r the network's
    only output and m a margin (Bradley & Terry 1952,
    https://doi.org/10.2307/2334029).

    The arguments are what TRL's ``DataCollatorForPreference`` makes, so that a reward
    model and its data go from ``RewardTrainer`` to any engine as they are.

    Args:
        lora: A lifted network whose output has ``.logits``, (..., 2 B, 1), as
            transformers make it with ``num_labels=1``.
        num_data: N, pairs in all, for which each batch of B pairs stands.

    A Pyro model with keyword arguments: the network's inputs, (2 B, ...), the chosen
    texts first and then the rejected ones in the same order; ``margin``, (B,) or None;
    and ``labels``. These are True where left out, since the first of a pair is the one
    that was chosen; or (B,), 0 where it was the second; or None, unknown.

    Raises:
        ValueError: From the model, if the rows aren't pairs, or the network has more
            than one output.
    """

    lora: LiftedNetwork
    num_data: int

    def __post_init__(self) -> None:
        _check_data(self.lora, self.num_data)

    def __call__(
        self,
        labels: Tensor | Literal[True] | None = True,
        margin: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Sample the weights and the preferences of a batch.

        Raises:
            ValueError: If the rows aren't pairs, or there is more than one output.
        """
        net = self.lora()  # the pyro.sample statements
        logits = net(**inputs).logits
        *_, num_rows, num_outputs = logits.shape
        if num_rows % 2 or num_outputs != 1:
            raise ValueError(
                f"models.preference: the network gives {num_outputs} outputs for each "
                f"of {num_rows} rows, expected one for each of 2 B, the chosen texts "
                "and then the rejected ones. Load it with num_labels=1, and collate "
                "pairs as TRL's DataCollatorForPreference does."
            )
        chosen, rejected = logits[..., 0].chunk(2, -1)  # each (..., B)
        score = chosen - rejected
        if margin is not None:
            score = score - margin.to(score)
        pairs = torch.arange(num_rows // 2, device=score.device)
        if labels is not None:
            labels = score.new_ones(len(pairs)) if labels is True else labels.to(score)
        with pyro.plate("data", self.num_data, subsample=pairs):
            return pyro.sample("y", dist.Bernoulli(logits=score), obs=labels)


def _check_data(lora: LiftedNetwork, num_data: int) -> None:
    check_lora(lora)
    check_count("num_data", num_data)


def _check_single(logits: Tensor) -> None:
    if logits.shape[-1] != 1:
        raise ValueError(
            f"models.regression: the network gives {logits.shape[-1]} outputs a datum, "
            "expected one. Load it with num_labels=1, or copy the model and observe "
            "all of them by .to_event(1)."
        )
