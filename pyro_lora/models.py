"""Ready Pyro models around a lifted network, short enough to copy and change."""

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.lifting.model_trace import IGNORED


def classification(lora: LiftedNetwork, num_data: int) -> Callable[..., Tensor]:
    r"""One label for each input, from the network's logits.

    :math:`y \sim \mathrm{Categorical}(\mathrm{softmax}\, f(x))`.

    Args:
        lora: A lifted network whose output has ``.logits``, (..., B, C).
        num_data: N, data in all, for which each batch stands.

    Returns:
        A Pyro model with keyword arguments: the network's inputs, (B, ...), and
        ``labels``, (B,) or None.
    """

    def model(labels: Tensor | None = None, **inputs: Any) -> Tensor:
        net = lora()  # the pyro.sample statements
        logits = net(**inputs).logits
        first = next(iter(inputs.values()))
        with pyro.plate("data", num_data, subsample=first):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    return model


def regression(
    lora: LiftedNetwork,
    num_data: int,
    scale: float | TorchDistributionMixin | None = None,
) -> Callable[..., Tensor]:
    r"""One real number for each input: :math:`y \sim N(f(x), \sigma^2)`.

    Args:
        lora: A lifted network whose output has ``.logits``, (..., B, 1), as
            transformers make it with ``num_labels=1``.
        num_data: N, data in all, for which each batch stands.
        scale: :math:`\sigma`: a number, or the prior of the latent site "noise"; None
            is LogNormal(0, 1), for labels of about unit variance.

    Returns:
        A Pyro model with keyword arguments: the network's inputs, (B, ...), and
        ``labels``, (B,) or None.

    Raises:
        ValueError: If ``scale`` is a number that isn't positive; from the model, if
            the network has more than one output.
    """
    if isinstance(scale, int | float) and not scale > 0:
        raise ValueError(f"The noise's scale must be positive, found {scale}.")

    def model(labels: Tensor | None = None, **inputs: Any) -> Tensor:
        net = lora()  # the pyro.sample statements
        logits = net(**inputs).logits
        _check_single(logits)
        noise: Any = scale
        if not isinstance(scale, int | float):
            prior = dist.LogNormal(logits.new_zeros(()), 1.0)
            noise = pyro.sample("noise", prior if scale is None else scale)
        first = next(iter(inputs.values()))
        with pyro.plate("data", num_data, subsample=first):
            return pyro.sample("y", dist.Normal(logits[..., 0], noise), obs=labels)

    return model


def multiple_choice(
    lora: LiftedNetwork, num_data: int, choice_ids: Sequence[int]
) -> Callable[..., Tensor]:
    r"""One of C answers, by the scores of their tokens after the last real token.

    :math:`y \sim \mathrm{Categorical}(\mathrm{softmax}\, f_{c_1 \dots c_C}(x))`, with f
    the logits over the vocabulary there, and c the answers' tokens.

    Args:
        lora: A lifted causal language model, whose output has ``.logits``,
            (..., B, T, V). With left padding, ``logits_to_keep=1`` among its inputs
            saves computing all but the last.
        num_data: N, data in all, for which each batch stands.
        choice_ids: The token of each answer, " A", " B" and so on.

    Returns:
        A Pyro model with keyword arguments: the network's inputs, among them
        ``attention_mask``, (B, T), padded on either side, and ``labels``, (B,), places
        in ``choice_ids``, or None.

    Raises:
        ValueError: If there are fewer than two choices, or one is there twice.
    """
    choices = torch.as_tensor(choice_ids)
    if choices.ndim != 1 or not 2 <= len(choices) == len(choices.unique()):
        raise ValueError(
            f"choice_ids must be two or more different token ids, found {choice_ids}. "
            "If answers start with the same token, score them by another one."
        )

    def model(
        attention_mask: Tensor, labels: Tensor | None = None, **inputs: Any
    ) -> Tensor:
        net = lora()  # the pyro.sample statements
        logits = net(attention_mask=attention_mask, **inputs).logits
        last = -1 - attention_mask.flip(1).argmax(1)  # (B,), counted from the right
        rows = torch.arange(len(last), device=last.device)
        scores = logits[..., rows, last, :][..., choices.to(last.device)]
        with pyro.plate("data", num_data, subsample=attention_mask):
            return pyro.sample("y", dist.Categorical(logits=scores), obs=labels)

    return model


def language_model(lora: LiftedNetwork, num_data: int) -> Callable[..., Tensor]:
    r"""The next token at each place; one datum is a sequence.

    :math:`\log p(x) = \sum_t \log \mathrm{softmax}(f(x_{<t}))_{x_t}`, nats, over the
    tokens that count.

    For ``AutoLaplace`` with ``fisher="mc"``: the exact Fisher information of a
    vocabulary takes too many backward passes.

    Args:
        lora: A lifted causal language model, whose output has ``.logits``,
            (..., B, T, V).
        num_data: N, sequences in all, for which each batch stands.

    Returns:
        A Pyro model with keyword arguments: the network's inputs, (B, T), and
        ``labels``, (B, T) or None: the input ids with -100 where a token doesn't count,
        not shifted, as in transformers. Without labels all tokens of the
        ``attention_mask`` count. A text's first token never does, on whichever side
        the padding is: nothing comes before it.
    """

    def model(labels: Tensor | None = None, **inputs: Any) -> Tensor:
        net = lora()  # the pyro.sample statements
        logits = net(**inputs).logits[..., :-1, :]  # the last token's has no label
        tokens = inputs["input_ids"] if labels is None else labels
        real = inputs.get("attention_mask", torch.ones_like(tokens)) > 0
        counts = (real if labels is None else labels != IGNORED)[:, 1:] & real[:, :-1]
        if labels is not None:
            labels = labels[:, 1:].where(counts, torch.zeros_like(labels[:, 1:]))
        likelihood = dist.Categorical(logits=logits).mask(counts).to_event(1)
        with pyro.plate("data", num_data, subsample=tokens):
            return pyro.sample("y", likelihood, obs=labels)

    return model


def _check_single(logits: Tensor) -> None:
    if logits.shape[-1] != 1:
        raise ValueError(
            f"models.regression: the network gives {logits.shape[-1]} outputs a datum, "
            "expected one. Load it with num_labels=1, or copy the model and observe "
            "all of them by .to_event(1)."
        )
