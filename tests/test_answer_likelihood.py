"""Answers of several tokens: rows joined into one call are a loop over the choices."""

from collections.abc import Callable
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.optim import Adam
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, OPTConfig

import pyro_lora as pl
from tests.curvature.gauss_newton import assert_same, flatten, unflatten
from tests.networks import PAD, VOCABULARY, adapted, particles

pytestmark = pytest.mark.untrained

NUM_DATA = 5
Batch = dict[str, Tensor]
Texts = list[list[tuple[list[int], int]]]  # by datum and choice: tokens, of the answer


def texts(num_data: int, most_choices: int = 4, length: int = 8) -> Texts:
    """Questions with two choices or more, each of one token or more."""
    found: Texts = []
    for datum in range(num_data):
        num_tokens = int(torch.randint(2, length - 3, ()))
        question = torch.randint(1, VOCABULARY, (num_tokens,)).tolist()
        choices = []
        for choice in range(2 + datum % (most_choices - 1)):
            size = 1 + (datum + choice) % 3
            answer = torch.randint(1, VOCABULARY, (size,)).tolist()
            choices.append((question + answer, size))
        found.append(choices)
    return found


def collated(
    given: Texts, num_choices: int = 4, side: Literal["left", "right"] = "right"
) -> Batch:
    """As a collator for multiple choice pads tokens and choices."""
    length = max(len(tokens) for choices in given for tokens, _ in choices)
    shape = (len(given), num_choices, length)
    batch = {
        "input_ids": torch.full(shape, PAD),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "answer_mask": torch.zeros(shape, dtype=torch.long),
    }
    for datum, choices in enumerate(given):
        for choice, (tokens, size) in enumerate(choices):
            start = length - len(tokens) if side == "left" else 0
            stop = start + len(tokens)
            row = batch["input_ids"][datum, choice]
            row[start:stop] = torch.tensor(tokens)
            batch["attention_mask"][datum, choice, start:stop] = 1
            batch["answer_mask"][datum, choice, stop - size : stop] = 1
    sizes = torch.tensor([len(choices) for choices in given])
    batch["labels"] = torch.arange(len(given)) % sizes
    return batch


def scores(network: Any, given: Texts, per_token: bool) -> list[Tensor]:
    """By datum, of its choices: one text and one token after the other."""
    found = []
    for choices in given:
        of_datum = []
        for tokens, size in choices:
            logits = network(input_ids=torch.tensor([tokens])).logits[..., 0, :, :]
            total = torch.zeros(()).double()
            for t in range(len(tokens) - size, len(tokens)):
                total = total + logits[..., t - 1, :].log_softmax(-1)[..., tokens[t]]
            of_datum.append(total / size if per_token else total)
        found.append(torch.stack(of_datum, -1))
    return found


def padded(of_datum: Tensor, num_choices: int = 4) -> Tensor:
    """Scores with those of choices that aren't there."""
    absent = num_choices - of_datum.shape[-1]
    return torch.nn.functional.pad(of_datum, (0, absent), value=-torch.inf)


def loop(
    lora: pl.LiftedNetwork, given: Texts, per_token: bool = False
) -> Callable[..., Tensor]:
    """The model of the texts, a batch being which of them: as many calls as choices."""

    def model(index: Tensor, labels: Tensor | None = None) -> Tensor:
        chosen = [given[i] for i in index.tolist()]
        rows = [padded(x) for x in scores(lora(), chosen, per_token)]
        logits = torch.stack(rows, -2)
        with pyro.plate("data", NUM_DATA, subsample=index):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    return model


def likelihood(model: Any, lora: pl.LiftedNetwork, batch: Batch) -> Any:
    at_adapter = poutine.condition(model, lora.weights())
    return poutine.trace(at_adapter).get_trace(**batch).nodes["y"]["fn"]


def opt(num_layers: int = 2) -> Any:
    """A causal language model that computes nothing in float32."""
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        word_embed_proj_dim=16,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        ffn_dim=32,
        max_position_embeddings=32,
        init_std=0.2,
        pad_token_id=PAD,
        dropout=0.0,
    )
    network = AutoModelForCausalLM.from_config(config).double()
    return adapted(network, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


class Task:
    """The same data as two batches of the ready model, and of a loop."""

    def __init__(self, per_token: bool = False) -> None:
        self.lora = pl.lift(opt(num_layers=1), prior=pl.priors.normal(0.5))
        self.texts = texts(NUM_DATA)
        self.model = pl.models.answer_likelihood(
            self.lora, NUM_DATA, per_token=per_token
        )
        self.loop = loop(self.lora, self.texts, per_token)
        self.batches = [collated(self.texts[:3]), collated(self.texts[3:])]
        index = torch.arange(NUM_DATA)
        self.of_loop = [
            {"index": i, "labels": b["labels"]}
            for i, b in zip((index[:3], index[3:]), self.batches, strict=True)
        ]

    def fits(self, **options: Any) -> list[pl.LaplacePosterior]:
        found = []
        for model, data in ((self.model, self.batches), (self.loop, self.of_loop)):
            guide = pl.AutoLaplace(
                model, init_loc_fn=self.lora.init_to_adapter(), **options
            )
            torch.manual_seed(0)
            found.append(guide.laplace_approximation(data))
        return found


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_are_those_of_each_answer_by_itself(side: Any, per_token: bool) -> None:
    lora, given = pl.lift(opt()), texts(6)
    model = pl.models.answer_likelihood(lora, NUM_DATA, per_token=per_token)
    found = likelihood(model, lora, collated(given, side=side))
    with torch.no_grad():
        expected = scores(lora.network, given, per_token)
    for probs, of_datum in zip(found.probs, expected, strict=True):
        size = len(of_datum)
        assert_close(probs[:size], of_datum.softmax(0), rtol=0, atol=1e-10)
        assert (probs[size:] == 0).all()


def test_more_padding_and_more_absent_choices_change_nothing() -> None:
    lora, given = pl.lift(opt()), texts(6, most_choices=3)
    model = pl.models.answer_likelihood(lora, NUM_DATA)
    batch = collated(given, num_choices=3)
    wider = {
        name: torch.nn.functional.pad(x, (0, 4, 0, 2)) if x.ndim == 3 else x
        for name, x in batch.items()
    }
    found, expected = (likelihood(model, lora, b).probs for b in (wider, batch))
    assert_same(found[:, :3], expected)
    assert (found[:, 3:] == 0).all()


@pytest.mark.parametrize(
    "options",
    [
        {"structure": pl.structures.Dense()},
        {"structure": pl.structures.Exact()},
        {"structure": pl.structures.KFAC()},
        {"structure": pl.structures.KFAC(), "fisher": "empirical"},
        {"structure": pl.structures.EKFAC()},
        {"structure": pl.structures.Diagonal()},
    ],
)
@pytest.mark.filterwarnings("ignore:The weights aren't a mode")
@pytest.mark.few(2)
def test_laplace_is_that_of_a_loop(options: Any) -> None:
    task = Task()
    found, expected = task.fits(**options)
    assert_close(found.log_evidence(), expected.log_evidence(), rtol=1e-8, atol=1e-8)
    assert_close(
        flatten(found.variance()), flatten(expected.variance()), rtol=1e-7, atol=1e-10
    )
    for batch, of_loop in zip(task.batches, task.of_loop, strict=True):
        one, two = found.linearized(batch), expected.linearized(of_loop)
        assert_close(one.mean, two.mean, rtol=0, atol=1e-9)
        assert_close(one.covariance_matrix, two.covariance_matrix, rtol=0, atol=1e-9)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.filterwarnings("ignore:The weights aren't a mode")
def test_the_dense_fisher_is_that_of_the_scores(per_token: bool) -> None:
    task = Task(per_token)
    lora, weights = task.lora, task.lora.weights()

    def all_scores(flat: Tensor) -> Tensor:
        with lora.bind(unflatten(flat, weights)) as net:
            return torch.cat(scores(net, task.texts, per_token))

    flat = flatten(weights)
    jacobian = torch.autograd.functional.jacobian(all_scores, flat)  # (choices, D)
    with torch.no_grad():
        logits = scores(lora.network, task.texts, per_token)
    fisher = torch.zeros(len(flat), len(flat)).double()
    for j, f in zip(jacobian.split([len(f) for f in logits]), logits, strict=True):
        p = f.softmax(0)
        fisher += j.mT @ (torch.diag(p) - torch.outer(p, p)) @ j
    found, _ = task.fits(structure=pl.structures.Dense())
    gaussian: Any = found.gaussian
    assert_close(gaussian.fisher, fisher, rtol=1e-8, atol=1e-9)


@pytest.mark.filterwarnings("ignore:The weights aren't a mode")
def test_linearised_predictions_are_those_of_a_loop() -> None:
    task = Task()
    found, expected = task.fits()
    prediction = pl.predict(found, task.batches)
    of_loop = pl.predict(expected, task.of_loop)
    assert_close(prediction.probs, of_loop.probs, rtol=0, atol=1e-9)
    assert torch.equal(prediction.labels, of_loop.labels)
    assert 0 <= prediction.metrics()["accuracy"] <= 1


def test_predictions_by_draws_are_those_of_a_loop() -> None:
    task = Task()
    draws = particles(task.lora, 3)
    posterior = pl.ParticlePosterior(draws, (task.lora,), task.model, None)
    each = []
    for s in range(3):
        with torch.no_grad(), task.lora.bind({k: x[s] for k, x in draws.items()}):
            rows = scores(task.lora.network, task.texts, per_token=False)
        each.append(torch.stack([padded(x).softmax(-1) for x in rows]))
    prediction = pl.predict(posterior, task.batches)
    assert_close(prediction.probs, torch.stack(each).mean(0), rtol=0, atol=1e-9)


@pytest.mark.parametrize("space", ["joint", "function"])
def test_folded_particles_are_those_of_each_by_itself(space: Any) -> None:
    task = Task()
    start = particles(task.lora, 3)
    found = []
    for folded in (True, False):
        svgd = pl.SVGD(
            task.model,
            pl.kernels.RBF(space),
            Adam({"lr": 1e-2}),
            num_particles=3,
            chunk_size=None if folded else 1,
            init_loc_fn=task.lora.init_to(start),
        )
        losses = [svgd.step(**batch) for batch in 2 * task.batches]
        found.append((flatten(svgd.get_samples()), torch.tensor(losses)))
    assert_close(found[0], found[1], rtol=1e-8, atol=1e-9)


def test_one_particle_is_the_mode_of_the_loop() -> None:
    task = Task()
    found = []
    for model, data in ((task.model, task.batches), (task.loop, task.of_loop)):
        svgd = pl.SVGD(
            model,
            pl.kernels.NoRepulsion(),
            Adam({"lr": 1e-2}),
            1,
            init_loc_fn=task.lora.init_to_adapter(),
        )
        losses = [svgd.step(**batch) for batch in 2 * data]
        found.append((flatten(svgd.get_samples()), torch.tensor(losses)))
    assert_close(found[0], found[1], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_network_is_asked_for_the_answers_alone(side: Any) -> None:
    lora, given = pl.lift(opt()), texts(4)
    model = pl.models.answer_likelihood(lora, NUM_DATA)
    batch = collated(given, side=side)
    sizes = []
    head = lora.network.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, __, out: sizes.append(out.shape[-2]))
    try:
        fn = likelihood(model, lora, batch)
        whole = likelihood(model, lora, {**batch, "logits_to_keep": 0})
    finally:
        hook.remove()
    first = batch["answer_mask"].flatten(0, 1).any(0).byte().argmax()
    length = batch["input_ids"].shape[-1]
    assert sizes == [length - int(first) + 1, length]
    assert_same(fn.probs, whole.probs)


def test_no_text_is_without_tokens_for_the_network() -> None:
    """Attention to none of them is NaN in some, and so are gradients through it."""
    lora, given = pl.lift(opt()), texts(4)
    batch, seen = collated(given), []
    hook = lora.network.get_base_model().register_forward_pre_hook(
        lambda _, __, inputs: seen.append(inputs["attention_mask"]), with_kwargs=True
    )
    try:
        likelihood(pl.models.answer_likelihood(lora, NUM_DATA), lora, batch)
    finally:
        hook.remove()
    assert not (batch["attention_mask"] > 0).any(-1).all()
    assert (seen[0] > 0).any(-1).all()


def test_the_data_are_questions_in_a_tree() -> None:
    task = Task()
    posterior = pl.ensemble(task.lora, [task.lora.weights()] * 2, model=task.model)
    tree = pl.to_datatree(posterior, batches=task.batches)
    assert tree["log_likelihood"]["y"].shape == (1, 2, NUM_DATA)
    assert tree["posterior_predictive"]["y"].shape == (1, 2, NUM_DATA)


def test_what_is_wrong_with_a_batch_is_said() -> None:
    lora = pl.lift(opt())
    model = pl.models.answer_likelihood(lora, NUM_DATA)
    given = [
        [([4, 5, 6], 1), ([4, 5, 7, 8], 2), ([4, 5, 9], 1)],
        [([7, 3], 1), ([7, 4], 1)],
    ]
    batch = collated(given, num_choices=3)

    def refused(message: str, **changed: Tensor | int) -> None:
        with pytest.raises(ValueError, match=message):
            model(**{**batch, **changed})

    refused(r"\(B, C, T\), .*found \(2, 3\)", input_ids=batch["input_ids"][..., 0])
    flat = batch["answer_mask"].flatten(0, 1)
    refused(r"answer_mask \(B, C, T\), .*\(6, 4\)", answer_mask=flat)
    unmarked = batch["answer_mask"].clone()
    unmarked[0, 1] = 0
    refused("datum 0, choice 1: no token of the answer", answer_mask=unmarked)
    first = torch.zeros_like(unmarked)
    first[..., 0] = 1
    refused("has one before it", answer_mask=first)
    absent = torch.tensor([0, 2])
    refused(r"datum 1 has the choices \[0, 1\], and the label 2", labels=absent)
    gone = batch["attention_mask"].clone()
    gone[0] = 0
    refused(r"datum 0 has the choices \[\]", attention_mask=gone)
    refused("logits_to_keep leaves out", logits_to_keep=1)
    with pytest.raises(TypeError, match="per_token must be True or False"):
        pl.models.answer_likelihood(lora, 2, per_token="yes")  # type: ignore[arg-type]
