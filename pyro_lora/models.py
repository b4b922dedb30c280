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

from pyro_lora.ground.accumulation import at_least_float32
from pyro_lora.ground.settings import check_count, check_kind, check_positive
from pyro_lora.ground.summary import FieldsShown
from pyro_lora.ground.synchronisation import ask, require
from pyro_lora.lifting.lifted_network import LiftedNetwork, check_lora
from pyro_lora.lifting.positions import position_ids, takes
from pyro_lora.likelihood.model_trace import IGNORED

_NO_NOISE = 1e-4  # beside rewards that differ by some units: nothing is observed


@dataclass(frozen=True, repr=False)
class classification(FieldsShown):
    r"""One label for each input, from the network's logits.

    :math:`y \sim \mathrm{Categorical}(\mathrm{softmax}\, f(x))`.

    Args:
        lora: A lifted network whose output has ``.logits``, (..., B, C).
        num_data: N, data in all, for which each batch stands.

    The model's keyword arguments are the network's inputs, (B, ...), and ``labels``,
    (B,) or None. What is predicted calls the classes by the network's
    ``config.id2label``, where it is set: PEFT doesn't save it, so that it's an argument
    of the ``from_pretrained`` that loads an adapter.
    """

    lora: LiftedNetwork
    num_data: int

    def __post_init__(self) -> None:
        _check_data(self)

    def __call__(self, labels: Tensor | None = None, **inputs: Any) -> Tensor:
        """Sample the weights and the labels of a batch."""
        net = self.lora()  # the pyro.sample statements
        logits = net(**inputs).logits
        _check_shapes("classification", logits, labels, inputs)
        first = next(iter(inputs.values()))
        with pyro.plate("data", self.num_data, subsample=first):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=labels)


@dataclass(frozen=True, repr=False)
class multi_label(FieldsShown):
    r"""A yes or no for each of P labels of an input, several of which may hold.

    :math:`y_p \sim \mathrm{Bernoulli}(\sigma(f_p(x)))`, independent given the weights.
    ``predict`` gives a :class:`~pyro_lora.MultiLabelPrediction`.

    Args:
        lora: A lifted network whose output has ``.logits``, (..., B, P), as
            transformers have it with ``problem_type="multi_label_classification"``.
        num_data: N, data in all, for which each batch stands.

    The model's keyword arguments are the network's inputs, (B, ...), and ``labels``,
    (B, P), 0 or 1 of whatever dtype, -100 where nobody knows; or None.
    """

    lora: LiftedNetwork
    num_data: int

    def __post_init__(self) -> None:
        _check_data(self)

    def __call__(self, labels: Tensor | None = None, **inputs: Any) -> Tensor:
        """Sample the weights and the labels of a batch."""
        net = self.lora()  # the pyro.sample statements
        logits = net(**inputs).logits
        _check_shapes("multi_label", logits, labels, inputs)
        likelihood = dist.Bernoulli(logits=logits)
        if labels is not None:
            counts = labels != IGNORED
            labels = labels.where(counts, torch.zeros_like(labels)).to(logits)
            likelihood = likelihood.mask(counts)
        first = next(iter(inputs.values()))
        with pyro.plate("data", self.num_data, subsample=first):
            return pyro.sample("y", likelihood.to_event(1), obs=labels)


@dataclass(frozen=True, repr=False)
class token_classification(FieldsShown):
    r"""A label for each token; one datum is a text.

    :math:`\log p(y | x) = \sum_t \log \mathrm{softmax}(f_t(x))_{y_t}`, nats, over the
    tokens that count. ``predict`` gives a :class:`~pyro_lora.TokenPrediction`.

    With long texts, for ``AutoLaplace`` with ``fisher="mc"``: the exact Fisher
    information takes C - 1 backward passes for each place of a batch's texts.

    Args:
        lora: A lifted network whose output has ``.logits``, (..., B, T, C), such as
            ``AutoModelForTokenClassification``.
        num_data: N, texts in all, for which each batch stands.

    The model's keyword arguments are the network's inputs, (B, T), and ``labels``,
    (B, T) or None: classes with -100 where a token doesn't count, as transformers'
    ``DataCollatorForTokenClassification`` pads them. Padding, where ``attention_mask``
    is 0, never does, whatever its labels; without labels all other tokens count.
    """

    lora: LiftedNetwork
    num_data: int

    def __post_init__(self) -> None:
        _check_data(self)

    def __call__(self, labels: Tensor | None = None, **inputs: Any) -> Tensor:
        """Sample the weights and the labels of a batch."""
        net = self.lora()  # the pyro.sample statements
        logits = net(**inputs).logits
        _check_shapes("token_classification", logits, labels, inputs)
        first = next(iter(inputs.values()))
        counts = inputs.get("attention_mask", first.new_ones(first.shape[:2])) > 0
        if labels is not None:
            counts = counts & (labels != IGNORED)
            labels = labels.where(counts, torch.zeros_like(labels))
        likelihood = dist.Categorical(logits=logits).mask(counts).to_event(1)
        with pyro.plate("data", self.num_data, subsample=first):
            return pyro.sample("y", likelihood, obs=labels)


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
        _check_data(self)
        if not isinstance(self.scale, TorchDistributionMixin | None):
            check_positive("The noise's scale", self.scale)
            object.__setattr__(self, "scale", float(self.scale))

    def __call__(self, labels: Tensor | None = None, **inputs: Any) -> Tensor:
        """Sample the weights and the labels of a batch."""
        net = self.lora()  # the pyro.sample statements
        logits = net(**inputs).logits
        _check_single(logits)
        _check_shapes("regression", logits, labels, inputs)
        noise: Any = self.scale
        if not isinstance(noise, float):
            prior = dist.LogNormal(logits.new_zeros(()), 1.0)
            noise = pyro.sample("noise", prior if noise is None else noise)
        first = next(iter(inputs.values()))
        with pyro.plate("data", self.num_data, subsample=first):
            return pyro.sample("y", dist.Normal(logits[..., 0], noise), obs=labels)


@dataclass(frozen=True, repr=False)
class multiple_choice(FieldsShown):
    r"""One of C answers, by the scores of their tokens after the last real token.

    :math:`y \sim \mathrm{Categorical}(\mathrm{softmax}\, f_{c_1 \dots c_C}(x))`, with f
    the logits over the vocabulary there, and c the answers' tokens. It is conditional
    on the answer being one of them: how probable they are together, the sum of
    :math:`\mathrm{softmax}(f(x))` over c, is neither trained nor seen in what is
    predicted.

    Args:
        lora: A lifted causal language model, whose output has ``.logits``,
            (..., B, T, V).
        num_data: N, data in all, for which each batch stands.
        choice_ids: The token of each answer, " A", " B" and so on. What is predicted
            calls the classes by the network's ``config.id2label``, where it is set.

    The model's keyword arguments are the network's inputs, among them
    ``attention_mask``, (B, T), padded on either side, and ``labels``, (B,), places in
    ``choice_ids``, or None. A network that takes ``position_ids`` gets those that count
    real tokens alone, unless they are given; one that takes none, as BART or under
    prompt tuning, counts padding on the left, and wants it on the right.

    The network is asked for the logits from the first of the last real tokens on, where
    it takes ``logits_to_keep``: with padding on the left these are the last ones alone.

    Raises:
        TypeError: If a choice isn't a token's id, but a text or a list of them.
        ValueError: If there are fewer than two choices, or one is there twice.
    """

    lora: LiftedNetwork
    num_data: int
    choice_ids: Sequence[int]

    def __post_init__(self) -> None:
        _check_data(self)
        kinds: Any = Sequence | Tensor
        check_kind("choice_ids", self.choice_ids, kinds, "a list of token ids")
        given: Sequence[Any] = self.choice_ids
        for place, token in enumerate(given):
            if isinstance(token, Sequence) or getattr(token, "ndim", 0) > 0:
                raise TypeError(
                    f"choice_ids[{place}] must be one token's id, found {token!r}. Of "
                    "an answer of one token take its only one, [token] = tokenizer."
                    "encode(' no', add_special_tokens=False); answers of several are "
                    "for models.answer_likelihood."
                )
            check_count("Each of choice_ids", token, 0)
        choices = torch.as_tensor(self.choice_ids, device="cpu")
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
        """Sample the weights and the labels of a batch.

        Raises:
            ValueError: If a text has no token (where Pyro validates distributions).
        """
        real = (attention_mask > 0).int()
        if pyro.settings.get("validate_distributions_pyro"):
            require(real.any(1).all(), _no_text)
        last = -1 - real.flip(1).argmax(1)  # (B,), counted from the right
        if takes(self.lora.network, "logits_to_keep") and len(last):
            inputs.setdefault("logits_to_keep", -int(ask(last.min(), usual=-2)))
        _number_tokens(self.lora, attention_mask, inputs)
        net = self.lora()  # the pyro.sample statements
        logits = net(attention_mask=attention_mask, **inputs).logits
        rows = torch.arange(len(last), device=last.device)
        choices = torch.tensor(self.choice_ids, device=last.device)
        scores = logits[..., rows, last, :][..., choices]
        with pyro.plate("data", self.num_data, subsample=attention_mask):
            return pyro.sample("y", dist.Categorical(logits=scores), obs=labels)


@dataclass(frozen=True, repr=False)
class answer_likelihood(FieldsShown):
    r"""One of C answers of several tokens each, by how likely each is.

    :math:`y \sim \mathrm{Categorical}(\mathrm{softmax}(s_1, \dots, s_C))` with the
    log likelihood :math:`s_c = \sum_{t \in a_c} \log \mathrm{softmax}(f(x_{c,
    <t}))_{x_{c,t}}` of the tokens :math:`a_c` of the answer in the text :math:`x_c`,
    question and answer (Brown et al. 2020, section 2.4,
    https://arxiv.org/abs/2005.14165).

    Args:
        lora: A lifted causal language model, whose output has ``.logits``,
            (..., B C, T, V).
        num_data: N, data in all, for which each batch stands.
        per_token: Whether the sum is divided by the answer's number of tokens, so that
            long answers aren't less likely for their length.

    The model's keyword arguments are those of ``AutoModelForMultipleChoice``:
    ``input_ids`` and ``attention_mask``, (B, C, T), padded on either side, and
    ``labels``, (B,), places among the choices, or None; and ``answer_mask``, (B, C, T),
    1 at the tokens of the answer. A datum with fewer than C choices has rows of
    padding in place of the others, whose ``attention_mask`` is 0 throughout: these have
    probability 0, and no part in anything. All batches have the same C. Other inputs of
    the network are (B, C, ...); ``position_ids``, where it takes them and they aren't
    given, count real tokens alone. Where it takes none, pad on the right.

    The network is asked for the logits from the first answer's token on, where it takes
    ``logits_to_keep``: with padding on the left these are the answers' own.

    Raises:
        TypeError: If ``per_token`` is no truth value.
        ValueError: From the model, if shapes don't fit; and (where Pyro validates
            distributions) if a datum has no choices, an answer no tokens that something
            comes before, or the label is that of a choice that isn't there.
    """

    lora: LiftedNetwork
    num_data: int
    per_token: bool = False

    def __post_init__(self) -> None:
        _check_data(self)
        check_kind("per_token", self.per_token, bool, "True or False")

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        answer_mask: Tensor,
        labels: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Sample the weights and the labels of a batch."""
        _check_choices(input_ids, attention_mask, answer_mask)
        real, present = attention_mask > 0, (attention_mask > 0).any(-1)  # (B, C)
        # What says how likely a token is stands at the place before it.
        counts = real[..., :-1] & real[..., 1:] & (answer_mask[..., 1:] > 0)
        if takes(self.lora.network, "logits_to_keep"):
            first = int(counts.flatten(0, 1).any(0).byte().argmax())
            inputs.setdefault("logits_to_keep", input_ids.shape[-1] - first)
        # Attention to nothing at all is NaN in some networks.
        mask = attention_mask.masked_fill(~present[..., None], 1)
        _number_tokens(self.lora, mask, inputs)
        texts = {"input_ids": input_ids, "attention_mask": mask, **inputs}
        net = self.lora()  # the pyro.sample statements
        logits = net(**{name: _as_rows(x, present) for name, x in texts.items()}).logits
        logits = logits[..., :-1, :]  # the last token's has no token after it
        start = counts.shape[-1] - logits.shape[-2]
        left_out, counts = counts[..., :start], counts[..., start:]
        if pyro.settings.get("validate_distributions_pyro"):
            _check_answers(counts, present, labels, left_out.any())
        scores = _token_log_probs(logits, input_ids[..., start + 1 :].flatten(0, 1))
        scores = scores.unflatten(-2, present.shape)  # (..., B, C, kept)
        scores = scores.where(counts, torch.zeros_like(scores)).sum(-1)
        if self.per_token:
            scores = scores / counts.sum(-1).clamp_min(1)
        scores = scores.masked_fill(~present, -torch.inf)
        with pyro.plate("data", self.num_data, subsample=input_ids):
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
    in transformers. Padding, where ``attention_mask`` is 0, never does, whatever its
    labels; without labels all other tokens count. A text's first token never does, on
    whichever side the padding is: nothing comes before it.
    """

    lora: LiftedNetwork
    num_data: int

    def __post_init__(self) -> None:
        _check_data(self)

    def __call__(self, labels: Tensor | None = None, **inputs: Any) -> Tensor:
        """Sample the weights and the labels of a batch."""
        if "attention_mask" in inputs:
            _number_tokens(self.lora, inputs["attention_mask"], inputs)
        net = self.lora()  # the pyro.sample statements
        logits = net(**inputs).logits
        _check_shapes("language_model", logits, labels, inputs)
        logits = logits[..., :-1, :]  # the last token's has no label
        tokens = inputs["input_ids"] if labels is None else labels
        real = inputs.get("attention_mask", torch.ones_like(tokens)) > 0
        counts = real[:, 1:] & real[:, :-1]
        if labels is not None:
            labels = labels[:, 1:]
            counts = counts & (labels != IGNORED)
            labels = labels.where(counts, torch.zeros_like(labels))
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
        _check_data(self)

    @property
    def advantages(self) -> "_advantages":
        r"""How much better the first texts are, :math:`r(x_1) - r(x_2) - m`, (B,).

        A model to predict with: ``predict(posterior, pairs, model=model.advantages)``
        has their ``mean`` and, of what the preferences leave open, their
        ``weight_variance``, so that ``mean - beta * weight_variance.sqrt()`` is the
        pessimistic score of an answer against a reference. Rewards themselves have a
        level that no preference says anything of, with the prior's variance.
        """
        return _advantages(self)

    def __call__(
        self,
        labels: Tensor | Literal[True] | None = True,
        margin: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Sample the weights and the preferences of a batch."""
        score = self._advantage(inputs, margin)
        pairs = torch.arange(score.shape[-1], device=score.device)
        if labels is not None:
            labels = score.new_ones(len(pairs)) if labels is True else labels.to(score)
        with pyro.plate("data", self.num_data, subsample=pairs):
            return pyro.sample("y", dist.Bernoulli(logits=score), obs=labels)

    def _advantage(self, inputs: dict[str, Any], margin: Tensor | None) -> Tensor:
        """Difference of the rewards less the margin, (..., B); samples the weights.

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
        return score


@dataclass(frozen=True, repr=False)
class _advantages(FieldsShown):
    """The difference itself in the place of who is preferred."""

    of: preference

    def __call__(
        self,
        labels: Tensor | None = None,
        margin: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Sample the weights and the differences of a batch."""
        score = self.of._advantage(inputs, margin)
        pairs = torch.arange(score.shape[-1], device=score.device)
        with pyro.plate("data", self.of.num_data, subsample=pairs):
            return pyro.sample("y", dist.Normal(score, _NO_NOISE), obs=labels)


def _check_data(model: Any) -> None:
    check_lora(model.lora)
    check_count("num_data", model.num_data)
    # A count of NumPy's, or a tensor, would be in no file.
    object.__setattr__(model, "num_data", int(model.num_data))


def _no_text() -> ValueError:
    return ValueError(
        "models.multiple_choice: expected texts with a token whose attention_mask "
        "isn't 0, found one that has none. Leave it out."
    )


def _number_tokens(
    lora: LiftedNetwork, attention_mask: Tensor, inputs: dict[str, Any]
) -> None:
    """Give ``position_ids`` to networks that take them, so that padding moves none."""
    if "position_ids" not in inputs:
        positions = position_ids(lora.network, attention_mask)
        if positions is not None:
            inputs["position_ids"] = positions


def _as_rows(value: Any, like: Tensor) -> Any:
    """An input (B, C, ...) as (B C, ...); others as they are."""
    if isinstance(value, Tensor) and value.shape[:2] == like.shape:
        return value.flatten(0, 1)
    return value


def _token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log probabilities (..., R, T), nats, of tokens (R, T), from logits for each."""
    wide = at_least_float32(logits)
    index = tokens.expand(wide.shape[:-1])[..., None]
    # Not log_softmax, which is one more tensor of a vocabulary's size to keep.
    return wide.gather(-1, index)[..., 0] - wide.logsumexp(-1)


def _check_choices(ids: Tensor, attention_mask: Tensor, answer_mask: Tensor) -> None:
    masks = {"attention_mask": attention_mask, "answer_mask": answer_mask}
    for name, mask in masks.items():
        if ids.ndim != 3 or mask.shape != ids.shape or ids.shape[-1] < 2:
            raise ValueError(
                f"models.answer_likelihood: expected input_ids and {name} (B, C, T), a "
                "text of question and answer for each choice, of two tokens or more, "
                f"found "
                f"{tuple(ids.shape)} and {tuple(mask.shape)}. Pad choices by rows "
                "whose attention_mask is 0."
            )


def _check_answers(
    counts: Tensor, present: Tensor, labels: Tensor | None, is_cut: Tensor
) -> None:
    def cut() -> ValueError:
        return ValueError(
            "models.answer_likelihood: logits_to_keep leaves out some of the answers' "
            "tokens. Leave the argument out, or keep one more than the longest has."
        )

    def no_tokens() -> ValueError:
        datum, choice = empty.nonzero()[0].tolist()
        return ValueError(
            f"models.answer_likelihood: datum {datum}, choice {choice}: no token of "
            "the answer has one before it. Mark the answer by answer_mask, begin texts "
            "by a question or the tokenizer's first token; if the choice isn't there, "
            "its attention_mask is 0."
        )

    def no_choice() -> ValueError:
        datum = int((~there).nonzero()[0])
        found = "" if labels is None else f", and the label {int(labels[datum])}"
        return ValueError(
            f"models.answer_likelihood: datum {datum} has the choices "
            f"{present[datum].nonzero()[:, 0].tolist()}{found}. Expected one or more, "
            "the label's among them; a choice isn't there if its attention_mask is 0."
        )

    empty = present & ~counts.any(-1)
    there = present.any(-1)
    if labels is not None and labels.shape == there.shape:  # else it is said of them
        places = labels.long().clamp(0, present.shape[1] - 1)[:, None]
        there = there & present.gather(1, places)[:, 0]
    require(~is_cut, cut)
    require(~empty.any(), no_tokens)
    require(there.all(), no_choice)


@dataclass(frozen=True)
class _Shapes:
    """What a model expects.

    Attributes:
        logits: Letters of their last dims: B and T as the inputs have them.
        found_in: Networks that have such.
        labels: Letters of the labels' dims; None where it's said of any likelihood.
        others: Where labels of another shape belong.
    """

    logits: str
    found_in: str
    labels: str | None = None
    others: str = ""


_OF_TEXTS = "AutoModelForSequenceClassification"
_ONE_CLASS = " If a datum has one class, the model is models.classification."
_SHAPES = {
    "classification": _Shapes("BC", _OF_TEXTS),
    "regression": _Shapes("B1", _OF_TEXTS),
    "multi_label": _Shapes("BP", _OF_TEXTS, "BP", _ONE_CLASS),
    "token_classification": _Shapes(
        "BTC", "AutoModelForTokenClassification", "BT", _ONE_CLASS
    ),
    "language_model": _Shapes("BTV", "AutoModelForCausalLM", "BT", _ONE_CLASS),
}


def _check_shapes(
    name: str, logits: Tensor, labels: Tensor | None, inputs: dict[str, Any]
) -> None:
    expected = _SHAPES[name]
    sizes = dict(zip("BT", next(iter(inputs.values())).shape, strict=False))

    def fits(shape: torch.Size, dims: str) -> bool:
        pairs = zip(shape, dims, strict=False)
        same = all(sizes.get(letter, size) == size for size, letter in pairs)
        return len(shape) == len(dims) and same

    def words(dims: str) -> str:
        known = [f"{x} = {sizes[x]}" for x in dims if x in sizes]
        return f"({', '.join(dims)}) with {', '.join(known)}"

    if not fits(logits.shape[-len(expected.logits) :], expected.logits):
        raise ValueError(
            f"models.{name}: the network's logits are of shape {tuple(logits.shape)}, "
            f"expected {words(expected.logits)}. Load it by {expected.found_in}, or "
            "use another of pyro_lora.models, which is for such outputs."
        )
    sizes[expected.logits[-1]] = logits.shape[-1]
    if (
        isinstance(labels, Tensor)
        and expected.labels
        and not fits(labels.shape, expected.labels)
    ):
        raise ValueError(
            f"models.{name}: labels are of shape {tuple(labels.shape)}, expected "
            f"{words(expected.labels)}.{expected.others}"
        )


def _check_single(logits: Tensor) -> None:
    if logits.shape[-1] != 1:
        raise ValueError(
            f"models.regression: the network gives {logits.shape[-1]} outputs a datum, "
            "expected one. Load it with num_labels=1, or copy the model and observe "
            "all of them by .to_event(1)."
        )
