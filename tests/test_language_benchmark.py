"""The language model's benchmark: its network, its scores and its methods."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

import pyro_lora as pl
from benchmarks.encoder_top import CachedRows, Rows
from benchmarks.language_methods import METHODS, Job, Trainings, own_logits
from benchmarks.language_model_quality import report, run_one
from benchmarks.language_tasks import Choices, Question
from benchmarks.language_top import NUM_LAYERS, LanguageTop, adapted
from benchmarks.out_of_domain import Mahalanobis, shrunk_covariance
from benchmarks.seed_runs import PRIOR_PRECISION, Setting

WIDTH, ANSWERS = 16, [3, 5, 7]
LENGTHS = (2, 3, 3, 4, 5, 7, 3, 4, 6, 2)


@pytest.fixture
def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=NUM_LAYERS + 1,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def test_the_top_on_cached_states_is_the_whole_network(llama: LlamaForCausalLM) -> None:
    texts = [torch.randint(20, (length,)) for length in (5, 2, 3)]
    with torch.no_grad():
        whole = [llama(x[None], output_hidden_states=True) for x in texts]
        below = [x.hidden_states[1][0] for x in whole]
        batch = CachedRows(below, torch.zeros(3)).batch(range(3))
        top = LanguageTop(llama, ANSWERS)(batch["hidden"], batch["attention_mask"])
    expected = torch.stack([x.logits[0, -1, ANSWERS] for x in whole])
    assert_close(top, expected)


@pytest.fixture
def setting(llama: LlamaForCausalLM) -> Setting:
    labels = torch.arange(len(LENGTHS)) % len(ANSWERS)
    rows = CachedRows([torch.randn(length, WIDTH) for length in LENGTHS], labels)
    prior = pl.priors.normal(scale=PRIOR_PRECISION**-0.5)
    lora = pl.lift(adapted(LanguageTop(llama, ANSWERS)), prior=prior)
    return Setting(lora=lora, train=rows, test=rows, epochs=4, seed=0)


@pytest.mark.filterwarnings("ignore:The weights aren't a mode")
# Those that are no more than a call of what has tests of its own are left out.
@pytest.mark.parametrize(
    "key", ["map-t", "kfac-last", "refined", "blob", "ivon", "swag", "subspace", "tfb"]
)
def test_a_method_predicts_and_says_what_it_cost(
    key: str, setting: Setting, tmp_path: Path
) -> None:
    before = setting.lora.weights()
    trainings = Trainings(tmp_path)
    job = Job(setting=setting, dropping=setting, trainings=trainings)
    found = run_one(job, key, {"own": setting.test})
    assert 0 < found["nll"] < 3
    assert found["fit seconds"] > 0
    assert found["predict seconds"] > 0
    assert found["auroc"]["own"]["total entropy"] == pytest.approx(0.5, abs=0.2)
    if key != "ivon":  # which trains the network itself
        after = setting.lora.weights()
        assert all(torch.equal(after[site], x) for site, x in before.items())


VOCABULARY = 20
ROUNDING = 1e-6  # Llama's normalisation is in float32 whatever the network is in
CHOICES = Choices()
QUESTIONS = [
    Question("what", ("a", "bcd", "ef"), 1),
    Question("which one is it", ("gh", "ij"), 0),
    Question("why", ("k", "lmno", "pq", "r"), 3),
    Question("how many of them", ("s", "tuv", "wx"), 2),
    Question("who", ("yz", "a"), 1),
]


def tokens(text: str) -> list[int]:
    """One for each letter."""
    return [ord(letter) % VOCABULARY for letter in text]


def tokenizer(text: str, add_special_tokens: bool) -> SimpleNamespace:
    assert not add_special_tokens
    return SimpleNamespace(input_ids=tokens(text))


def answered(network: LlamaForCausalLM) -> Rows:
    states = CHOICES.states(network, tokenizer, QUESTIONS)
    return CHOICES.read(states, torch.tensor([x.label for x in QUESTIONS])).rows


def asking(network: LlamaForCausalLM) -> Setting:
    prior = pl.priors.normal(scale=PRIOR_PRECISION**-0.5)
    top = adapted(CHOICES.top(network, tokenizer))
    rows = answered(network)
    return Setting(
        lora=pl.lift(top, prior=prior),
        train=rows,
        test=rows,
        epochs=4,
        seed=0,
        likelihood=CHOICES.likelihood,
    )


@torch.no_grad()
def log_likelihood(network: LlamaForCausalLM, question: str, answer: str) -> Tensor:
    """Mean of an answer's tokens, one after the other."""
    text = tokens(f"Question: {question}\nAnswer:")
    each = []
    for token in tokens(" " + answer):
        log_probs = network(torch.tensor([text])).logits[0, -1].log_softmax(-1)
        each.append(log_probs[token])
        text.append(token)
    return torch.stack(each).mean()


def test_answers_on_cached_states_are_as_likely_as_by_the_whole_network(
    llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    setting = asking(llama.double())
    job = Job(setting=setting, dropping=setting, trainings=Trainings(tmp_path))
    posterior = job.points([setting.lora.weights()])  # a new adapter changes nothing
    found = pl.predict(posterior, setting.test.ordered())
    expected = torch.zeros(len(QUESTIONS), 4, dtype=torch.float64)
    for row, x in zip(expected, QUESTIONS, strict=True):
        each = [log_likelihood(llama, x.question, answer) for answer in x.choices]
        row[: len(each)] = torch.stack(each).softmax(0)
    assert_close(found.probs, expected, rtol=0, atol=ROUNDING)
    assert found.labels.tolist() == [x.label for x in QUESTIONS]
    logits = own_logits(job, setting.test.batch([2, 0]))
    assert_close(logits.softmax(1), expected[[2, 0]], rtol=0, atol=ROUNDING)


def test_own_logits_have_the_gradient_of_the_networks_parameters(
    llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    setting = asking(llama.double())
    lora, rows = setting.lora, setting.train
    lora.load({site: torch.randn_like(x) for site, x in lora.weights().items()})
    job = Job(setting=setting, dropping=setting, trainings=Trainings(tmp_path))
    batch = rows.batch(range(len(QUESTIONS)))
    logits = own_logits(job, batch)
    found = torch.nn.functional.cross_entropy(logits, batch["labels"])

    top, losses = lora.network.get_base_model(), []
    for answers, label in zip(rows.answers, rows.labels, strict=True):
        each = []
        for answer in answers:
            stop, size = len(answer.hidden), len(answer.tokens)
            [states] = top.states(
                answer.hidden[None], torch.arange(stop - size, stop)[None]
            )
            log_probs = (states @ top.vocabulary.mT).log_softmax(-1)
            each.append(log_probs.gather(1, answer.tokens[:, None]).mean())
        losses.append(-torch.stack(each).log_softmax(0)[label])
    expected = torch.stack(losses).mean()
    assert_close(found, expected, rtol=0, atol=ROUNDING)
    own = [x for x in lora.network.parameters() if x.requires_grad]
    for x, y in zip(
        torch.autograd.grad(found, own), torch.autograd.grad(expected, own), strict=True
    ):
        assert x.any()
        assert_close(x, y, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.filterwarnings("ignore:The weights aren't a mode")
@pytest.mark.filterwarnings("ignore:The best prior precision is")  # of letters
@pytest.mark.parametrize("key", ["kfac", "refined-loo", "ivon", "svgd"])
def test_a_method_predicts_answers_of_several_tokens(
    key: str, llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    setting = asking(llama)
    job = Job(setting=setting, dropping=setting, trainings=Trainings(tmp_path))
    found = run_one(job, key, {})
    assert 0 < found["nll"] < 6
    assert found["auroc"] == {}


def test_some_questions_are_padded_as_all_of_them(llama: LlamaForCausalLM) -> None:
    rows = answered(llama)
    some = rows.subset([1, 4])  # with two choices each
    assert some.batch([0])["hidden"].shape[:2] == (1, 4)
    assert some.labels.tolist() == [0, 1]
    assert rows.by_length().labels.tolist() == [
        QUESTIONS[i].label for i in sorted(range(5), key=rows.lengths().__getitem__)
    ]


def result(**changed: Any) -> dict[str, Any]:
    numbers = ("accuracy", "nll", "ece", "brier", "temperature", "stored")
    seconds = ("fit seconds", "predict seconds")
    found = dict.fromkeys([*numbers, *seconds], 0.5)
    return found | {"auroc": {}, "row losses": [0.4, 0.6]} | changed


def test_the_report_has_foreign_texts_where_a_task_has_some() -> None:
    methods = ("map", "map-t", "refined-loo")
    of_answers = {f"float32/arc_easy-2-200-4-0/{x}": result() for x in methods}
    without = "\n".join(report(of_answers))
    assert "Foreign texts" not in without
    assert "of arc_easy: a question" in without
    assert "one token of answer" not in without
    auroc = {"news": {"total entropy": 0.75}}
    of_texts = {f"float32/sst2-2-200-4-0/{x}": result(auroc=auroc) for x in methods}
    lines = report(of_answers | of_texts)
    [columns] = [x for x in lines if x.startswith("| of | score")]
    assert columns.split("|")[3:-1] == [" sst2, 4 epochs: news "]
    assert "of sst2: a text" in "\n".join(lines)


def test_a_training_is_counted_by_all_who_use_it(
    setting: Setting, tmp_path: Path
) -> None:
    seconds = []
    for _ in range(2):
        trainings = Trainings(tmp_path)
        mode = Job(setting=setting, dropping=setting, trainings=trainings).mode()
        assert mode.keys() == setting.lora.sites.keys()
        seconds.append(trainings.reused)
    assert seconds[0] == 0 < seconds[1]


def test_every_method_has_a_title() -> None:
    assert len({title for title, _ in METHODS.values()}) == len(METHODS)


def test_the_covariance_is_shrunk_by_its_own_error() -> None:
    x: Tensor = torch.randn(9, 4).double() @ torch.randn(4, 4).double()
    s = sum(torch.outer(row, row) for row in x) / 9
    target = s.trace() / 4 * torch.eye(4).double()
    error = sum((torch.outer(row, row) - s).square().sum() for row in x) / 9**2
    rho = min(1.0, float(error / (s - target).square().sum()))
    assert 0 < rho < 1
    assert_close(shrunk_covariance(x), (1 - rho) * s + rho * target)


def test_the_distance_is_to_the_nearest_class() -> None:
    states, labels = torch.randn(12, 3).double(), torch.arange(12) % 2
    means = torch.stack([states[labels == c].mean(0) for c in (0, 1)])
    inverse = shrunk_covariance(states - means[labels]).inverse()
    points = torch.randn(5, 3).double()
    expected = [min(float((p - m) @ inverse @ (p - m)) for m in means) for p in points]
    found = Mahalanobis.of(states, labels)(points)
    assert_close(found, torch.tensor(expected).double())
