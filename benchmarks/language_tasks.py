"""What a language model is asked: a data set's rows, prompts, answers and likelihood.

Used by ``python -m benchmarks.language_model_quality``. One more data set is an entry
of :data:`TASKS`.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

import pyro_lora as pl
from benchmarks.corpora import corpus
from benchmarks.encoder_top import BATCH_SIZE, Batch, CachedRows, Rows, chunks
from benchmarks.language_top import NUM_LAYERS, AnswerTop, CausalTop, LanguageTop
from benchmarks.seed_runs import Model, classes
from examples.rows import Row

MAX_LENGTH = 32  # tokens of a text, the prompt's beside
# Texts that the network hasn't been trained for, by a short name.
FOREIGN = {
    "news": Path("agnews", "test.jsonl"),
    "editorials": Path("vader", "ood_nyt.jsonl"),
    "reviews": Path("vader", "test.jsonl"),
}


@dataclass(frozen=True)
class Read:
    """Rows that the whole network has read.

    Attributes:
        rows: Their states below the adapted layers.
        surprise: Mean negative log likelihood of a text's tokens after its prompt's
            beginning, (N,), nats: the logarithm of its perplexity. None where the rows
            aren't texts.
    """

    rows: Rows
    surprise: Tensor | None = None

    def by_length(self) -> "Read":
        """Short rows first."""
        order = self.rows.order()
        surprise = None if self.surprise is None else self.surprise[order]
        return Read(self.rows.subset(order), surprise)


class Task(ABC):
    """How the rows of a data set are asked about.

    Attributes:
        about: What it is, for the table's readers.
        foreign: Texts to tell from its own, of :data:`FOREIGN`.
    """

    about: ClassVar[str]
    foreign: tuple[str, ...]

    @abstractmethod
    def corpus(self, folder: Path) -> tuple[Sequence[Any], Sequence[Any]]:
        """Rows to train on and to test on; each has a ``label``."""

    @abstractmethod
    def states(
        self,
        network: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Any],
        num_layers: int = NUM_LAYERS,
    ) -> dict[str, Tensor]:
        """What :meth:`read` needs of the network without an adapter, for a file."""

    @abstractmethod
    def read(self, states: Mapping[str, Tensor], labels: Tensor) -> Read:
        """The rows of which these are the states."""

    @abstractmethod
    def top(
        self,
        network: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        num_layers: int = NUM_LAYERS,
    ) -> CausalTop:
        """The layers above the states."""

    @abstractmethod
    def likelihood(self, lora: pl.LiftedNetwork, num_data: int) -> Model:
        """The Pyro model of a batch of rows."""


@dataclass(frozen=True)
class OneToken(Task):
    """A text, and the token of each class's answer."""

    about: ClassVar[str] = (
        f"a text of at most {MAX_LENGTH} tokens, classified by one token of answer"
    )

    before: str
    after: str
    answers: tuple[str, ...]
    foreign: tuple[str, ...]

    def corpus(self, folder: Path) -> tuple[Sequence[Row], Sequence[Row]]:
        """Rows to train on and to test on."""
        rows = corpus(folder)
        return rows.train, rows.test

    def states(
        self,
        network: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Row],
        num_layers: int = NUM_LAYERS,
    ) -> dict[str, Tensor]:
        """Hidden states of each row, and the texts' surprise."""
        tokens = encoder(tokenizer)
        before, after = tokens(self.before), tokens(self.after)
        texts = [tokens(" " + row.text)[:MAX_LENGTH] for row in rows]
        prompts = [[*before, *text, *after] for text in texts]
        hidden, surprise = [], []
        read = run(network, prompts, num_layers)
        for text, (below, last) in zip(texts, read, strict=True):
            start = len(before) - 1  # the state there predicts the text's first token
            logits = network.lm_head(last[start : start + len(text)])
            surprise.append(cross_entropy(logits, torch.tensor(text)))
            hidden.append(below)
        found = {f"{i:05}": x for i, x in enumerate(hidden)}
        return found | {"surprise": torch.stack(surprise)}

    def read(self, states: Mapping[str, Tensor], labels: Tensor) -> Read:
        """The rows of which these are the states."""
        hidden = [states[f"{i:05}"] for i in range(len(labels))]
        return Read(CachedRows(hidden, labels), states["surprise"])

    def top(
        self,
        network: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        num_layers: int = NUM_LAYERS,
    ) -> LanguageTop:
        """With the scores of each answer's first token."""
        tokens = encoder(tokenizer)
        first = [tokens(x)[0] for x in self.answers]
        return LanguageTop(network, first, num_layers)

    def likelihood(self, lora: pl.LiftedNetwork, num_data: int) -> Model:
        """A class for each text."""
        return classes(lora, num_data)


@dataclass(frozen=True)
class Question:
    """A question, and which of its answers is right."""

    question: str
    choices: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Choices(Task):
    """Questions with answers of several tokens, each by how likely its tokens are."""

    about: ClassVar[str] = (
        "a question with mostly four answers of several tokens, each scored by the "
        'mean log likelihood of its tokens after "Question: ...\\nAnswer:" '
        "(`pl.models.answer_likelihood`, per token); none of the foreign texts are "
        "questions with answers, so that nothing is said of these"
    )
    foreign: tuple[str, ...] = ()

    def corpus(self, folder: Path) -> tuple[Sequence[Question], Sequence[Question]]:
        """Rows to train on and to test on."""
        train, test = (questions(folder / f"{x}.jsonl") for x in ("train", "test"))
        return train, test

    def states(
        self,
        network: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Question],
        num_layers: int = NUM_LAYERS,
    ) -> dict[str, Tensor]:
        """Of each answer its tokens, and the states up to its last token but one."""
        tokens = encoder(tokenizer)
        prompts, answers = {}, {}
        for i, row in enumerate(rows):
            question = tokens(f"Question: {row.question}\nAnswer:")
            for c, choice in enumerate(row.choices):
                answer = tokens(" " + choice)
                prompts[f"{i:05}-{c}"] = [*question, *answer[:-1]]
                answers[f"{i:05}-{c}-answer"] = torch.tensor(answer)
        names = sorted(prompts, key=lambda name: len(prompts[name]))  # little padding
        read = run(network, [prompts[name] for name in names], num_layers)
        found = {name: below for name, (below, _) in zip(names, read, strict=True)}
        return found | answers

    def read(self, states: Mapping[str, Tensor], labels: Tensor) -> Read:
        """The rows of which these are the states."""
        answers: list[list[Answer]] = [[] for _ in labels]
        for name in sorted(states):
            row, _, *others = name.split("-")
            if not others:
                answer = Answer(states[name], states[f"{name}-answer"])
                answers[int(row)].append(answer)
        return Read(ChoiceRows(answers, labels, max(map(len, answers))))

    def top(
        self,
        network: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        num_layers: int = NUM_LAYERS,
    ) -> AnswerTop:
        """With the scores of the answers' tokens."""
        return AnswerTop(network, num_layers)

    def likelihood(self, lora: pl.LiftedNetwork, num_data: int) -> Model:
        """One of each question's answers.

        Per token, since the network is far too sure of sums. Untrained, it has NLLs of
        2.10 and 1.45 on openbookqa and arc_easy, with sums 7.07 and 1.92; accuracies of
        .30 and .48, with sums .16 and .55.
        """
        return pl.models.answer_likelihood(lora, num_data, per_token=True)


REVIEW = OneToken(
    "Review:", "\nSentiment:", (" negative", " positive"), ("news", "editorials")
)
TASKS: dict[str, Task] = {
    "sst2": REVIEW,
    "vader": REVIEW,
    "agnews": OneToken(
        "Article:",
        "\nTopic:",
        (" World", " Sports", " Business", " Technology"),
        ("editorials", "reviews"),
    ),
    "boolq_closed": OneToken(
        "Question:", "?\nAnswer:", (" no", " yes"), tuple(FOREIGN)
    ),
    "openbookqa": Choices(),
    "arc_easy": Choices(),
}


@dataclass(frozen=True)
class Answer:
    """One answer to a question.

    Attributes:
        hidden: States from the question's first token to the answer's last but one.
        tokens: Of the answer, (A,); the last A states are those that predict them.
    """

    hidden: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class ChoiceRows(Rows):
    """Questions with their answers, and which one is right, (N,).

    Attributes:
        num_choices: C, to which all of them are padded.
    """

    answers: list[list[Answer]]
    labels: Tensor
    num_choices: int

    def lengths(self) -> list[int]:
        """Tokens of each question with its longest answer."""
        return [max(len(x.hidden) for x in choices) for choices in self.answers]

    def batch(self, index: Sequence[int]) -> Batch:
        """Some rows, as :class:`AnswerTop` and ``answer_likelihood`` have them.

        A place of A + 1 is the question's last token, or one of the answer.
        """
        chosen = [self.answers[i] for i in index]
        shape = len(chosen), self.num_choices
        flat = [x for choices in chosen for x in choices]
        length = max(len(x.hidden) for x in flat)
        num_places = 1 + max(len(x.tokens) for x in flat)
        hidden = flat[0].hidden.new_zeros(*shape, length, flat[0].hidden.shape[1])
        mask, places, tokens = torch.zeros(3, *shape, num_places, dtype=torch.long)
        for b, choices in enumerate(chosen):
            for c, answer in enumerate(choices):
                stop, size = len(answer.hidden), len(answer.tokens)
                hidden[b, c, :stop] = answer.hidden
                places[b, c, :size] = torch.arange(stop - size, stop)
                tokens[b, c, 1 : size + 1] = answer.tokens
                mask[b, c, : size + 1] = 1
        return {
            "input_ids": torch.zeros_like(tokens),
            "attention_mask": mask,
            "answer_mask": mask * (torch.arange(num_places) > 0),
            "hidden": hidden,
            "places": places,
            "tokens": tokens,
            "labels": self.labels[list(index)],
        }

    def subset(self, index: Sequence[int]) -> "ChoiceRows":
        """Some rows, of as many choices."""
        answers = [self.answers[i] for i in index]
        return ChoiceRows(answers, self.labels[list(index)], self.num_choices)


def questions(path: Path) -> list[Question]:
    """The rows of a file with ``question``, ``choices`` and ``label``."""
    if not path.exists():
        raise SystemExit(f"{path} isn't there: --data is the folder of the data sets.")
    with path.open(encoding="utf-8") as file:
        found = [json.loads(line) for line in file]
    return [Question(x["question"], tuple(x["choices"]), x["label"]) for x in found]


def encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    """Text -> its tokens, and none beside."""

    def tokens(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return found

    return tokens


@torch.no_grad()
def run(
    network: LlamaForCausalLM, prompts: Sequence[Sequence[int]], num_layers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """States (T, I) of each prompt's tokens: below the adapted layers, and the last."""
    # It has no dropout. In evaluation mode bitsandbytes packs 4-bit layers for good,
    # without a gradient.
    network.train()
    for chunk in chunks(prompts, BATCH_SIZE):
        tokens = [torch.tensor(x) for x in chunk]
        padded = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        states = network.model(padded, output_hidden_states=True, use_cache=False)
        below = states.hidden_states[-1 - num_layers]
        for x, last, prompt in zip(below, states.last_hidden_state, chunk, strict=True):
            yield x[: len(prompt)].clone(), last[: len(prompt)]
