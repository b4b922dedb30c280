"""The ready models: their densities by hand, and under every engine."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.optim import Adam
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import pyro_lora as pl
from tests import networks
from tests.lifting.liftable_row import gpt2
from tests.lifting.liftable_row import lora as lora_on
from tests.networks import VOCABULARY

NUM_DATA = 10
CHOICES = [7, 3, 11]
Batch = dict[str, Tensor]
Model = Callable[..., Tensor]
Ready = tuple[pl.LiftedNetwork, Model, list[Batch]]


def two_batches(labels: Callable[[Batch], Tensor]) -> list[Batch]:
    batches = [networks.batch(6, 7), networks.batch(4, 9)]
    return [{**b, "labels": labels(b)} for b in batches]


def classification() -> Ready:
    lora = pl.lift(networks.bert(3))
    batches = two_batches(lambda b: torch.randint(3, b["labels"].shape))
    return lora, pl.models.classification(lora, NUM_DATA), batches


def regression(scale: Any = None) -> Ready:
    lora = pl.lift(networks.bert(1))
    batches = two_batches(lambda b: torch.randn(len(b["labels"])).double())
    return lora, pl.models.regression(lora, NUM_DATA, scale), batches


def multiple_choice() -> Ready:
    lora = pl.lift(networks.llama(None))
    batches = two_batches(lambda b: torch.randint(3, b["labels"].shape))
    return lora, pl.models.multiple_choice(lora, NUM_DATA, CHOICES), batches


def text_labels(texts: Batch) -> Tensor:
    """The padding and each text's first two tokens, its prompt, don't count."""
    labels = texts["input_ids"].where(texts["attention_mask"] > 0, torch.tensor(-100))
    return torch.cat([torch.full_like(labels[:, :2], -100), labels[:, 2:]], 1)


def language_model() -> Ready:
    lora = pl.lift(networks.llama(None))
    model = pl.models.language_model(lora, NUM_DATA)
    return lora, model, two_batches(text_labels)


def some_ignored(labels: Tensor) -> Tensor:
    """The same with -100 for about a fifth, and in all of the last row but one."""
    labels = labels.masked_fill(torch.rand(labels.shape) < 0.2, -100)
    labels[-1] = -100
    labels.view(-1)[-1] = 0
    return labels


def multi_label() -> Ready:
    lora = pl.lift(networks.bert(3))

    def labels(batch: Batch) -> Tensor:
        holds = torch.randint(2, (len(batch["labels"]), 3))
        return some_ignored(holds).double()  # as BCEWithLogitsLoss has them

    return lora, pl.models.multi_label(lora, NUM_DATA), two_batches(labels)


def token_classification() -> Ready:
    lora = pl.lift(networks.bert(3, of_tokens=True))

    def labels(batch: Batch) -> Tensor:
        tags = some_ignored(torch.randint(3, batch["input_ids"].shape))
        return tags.masked_fill(batch["attention_mask"] == 0, -100)

    return lora, pl.models.token_classification(lora, NUM_DATA), two_batches(labels)


def answer_likelihood() -> Ready:
    """Two answers, of the texts' last two tokens or of others."""
    lora = pl.lift(networks.llama(None))
    batches = []
    for batch in two_batches(lambda b: torch.randint(2, b["labels"].shape)):
        mask = batch["attention_mask"]
        is_last = (mask.flip(1).cumsum(1) <= 2).flip(1) & (mask > 0)
        others = (batch["input_ids"] + 5) % (VOCABULARY - 1) + 1
        both = [batch["input_ids"], others.where(is_last, batch["input_ids"])]
        texts = {
            "input_ids": torch.stack(both, 1),
            "attention_mask": torch.stack([mask, mask], 1),
            "answer_mask": torch.stack([is_last, is_last], 1).long(),
        }
        batches.append({**texts, "labels": batch["labels"]})
    return lora, pl.models.answer_likelihood(lora, NUM_DATA), batches


READY = [
    classification,
    regression,
    multiple_choice,
    language_model,
    multi_label,
    token_classification,
    answer_likelihood,
]


def likelihood(model: Model, lora: pl.LiftedNetwork, batch: Batch) -> Any:
    """The likelihood's node in a trace at the adapter's values."""
    at_adapter = poutine.condition(model, lora.weights())
    trace: Any = poutine.trace(at_adapter).get_trace(**batch)
    trace.compute_log_prob()
    return trace.nodes["y"]


def own_logits(lora: pl.LiftedNetwork, batch: Batch) -> Tensor:
    with torch.no_grad():
        return lora.network(**networks.inputs(batch)).logits


@pytest.mark.parametrize("ready", READY)
def test_a_batch_stands_for_all_data(ready: Callable[[], Ready]) -> None:
    lora, model, batches = ready()
    for batch in batches:
        node = likelihood(model, lora, batch)
        size = len(batch["labels"])
        assert node["fn"].batch_shape == (size,)
        assert_close(node["log_prob"], node["unscaled_log_prob"] * NUM_DATA / size)


def test_regression_is_a_normal_around_the_output() -> None:
    lora, model, batches = regression(0.3)
    batch = batches[1]
    found = likelihood(model, lora, batch)["unscaled_log_prob"]
    z = (batch["labels"] - own_logits(lora, batch)[:, 0]) / 0.3
    expected = -(z**2) / 2 - math.log(0.3) - math.log(2 * math.pi) / 2
    assert_close(found, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("number", [np.float32, np.float64, torch.tensor, Fraction])
def test_numbers_of_other_libraries_are_numbers(number: Any) -> None:
    lora, expected, (batch, *_) = regression(0.5)
    found = pl.models.regression(lora, np.int64(NUM_DATA), number(0.5))
    assert repr(found) == repr(expected)
    of_both = (likelihood(model, lora, batch) for model in (found, expected))
    assert_close(*(site["unscaled_log_prob"] for site in of_both), rtol=0, atol=0)


@pytest.mark.parametrize("prior", [None, dist.HalfNormal(torch.tensor(2.0).double())])
def test_the_noise_of_a_regression_has_a_prior(prior: Any) -> None:
    _, model, batches = regression(prior)
    trace: Any = poutine.trace(model).get_trace(**batches[0])
    expected = dist.LogNormal(0.0, 1.0) if prior is None else prior
    noise = trace.nodes["noise"]
    assert type(noise["fn"]) is type(expected)
    assert_close(noise["fn"].variance, expected.variance, check_dtype=False)
    assert trace.nodes["y"]["fn"].scale.unique().tolist() == [float(noise["value"])]


def test_choices_are_scored_after_the_last_real_token() -> None:
    lora, model, batches = multiple_choice()
    batch = batches[1]
    expected = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        alone = {"input_ids": ids[mask > 0][None]}
        expected.append(own_logits(lora, alone)[0, -1, CHOICES])
    found = likelihood(model, lora, batch)["fn"].logits
    assert_close(found.double(), torch.stack(expected).log_softmax(-1))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64, torch.int32])
def test_choices_whatever_the_type_of_the_mask(dtype: torch.dtype) -> None:
    lora, model, batches = multiple_choice()
    batch = batches[1]
    expected = likelihood(model, lora, batch)["fn"].logits
    masked = {**batch, "attention_mask": batch["attention_mask"].to(dtype)}
    assert_close(likelihood(model, lora, masked)["fn"].logits, expected)


def test_choices_whatever_the_padding() -> None:
    lora, model, batches = multiple_choice()
    right = batches[1]
    shifts = (right["attention_mask"] == 0).sum(1)
    left = {
        name: torch.stack([row.roll(int(n)) for row, n in zip(x, shifts, strict=True)])
        for name, x in networks.inputs(right).items()
    }
    expected = likelihood(model, lora, right)["fn"].logits
    at_left = {**left, "labels": right["labels"]}
    found = likelihood(model, lora, at_left)["fn"].logits
    assert_close(found, expected, rtol=0, atol=1e-6)  # rotary tables are float32
    kept: Any = {**at_left, "logits_to_keep": 1}
    assert_close(likelihood(model, lora, kept)["fn"].logits, found)
    whole: Any = {**right, "logits_to_keep": 0}
    assert_close(likelihood(model, lora, whole)["fn"].logits, expected)


def test_a_text_without_a_token_has_no_answer() -> None:
    lora, model, batches = multiple_choice()
    batch = batches[1]
    batch["attention_mask"][1] = 0
    with pytest.raises(ValueError, match=r"multiple_choice: expected texts with a tok"):
        likelihood(model, lora, batch)


def test_logits_are_computed_where_a_text_ends() -> None:
    lora, model, batches = multiple_choice()
    asked: list[int] = []
    lora.network.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(kwargs["logits_to_keep"]),
        with_kwargs=True,
    )
    texts = batches[1]
    mask = texts["attention_mask"]
    shortest = int(mask.sum(1).min())
    assert 1 < shortest < mask.shape[1]
    likelihood(model, lora, texts)
    likelihood(model, lora, {k: x[:1] for k, x in texts.items()})
    ends = [mask.shape[1] + 1 - int(n) for n in (mask.sum(1).min(), mask[0].sum())]
    assert asked == ends


def test_language_model_is_the_loss_of_transformers() -> None:
    lora, model, batches = language_model()
    for batch in batches:
        found = likelihood(model, lora, batch)["unscaled_log_prob"]
        rows = [{n: x[i : i + 1] for n, x in batch.items()} for i in range(len(found))]
        counts = (batch["labels"][:, 1:] != -100).sum(1)
        with torch.no_grad():
            losses = [
                float(lora.network(**row).loss * n) if n else 0.0
                for row, n in zip(rows, counts, strict=True)
            ]
        assert_close(found.tolist(), [-x for x in losses], rtol=0, atol=1e-5)
        assert (counts > 0).sum() >= 3


def test_multi_label_is_the_loss_of_torch_over_the_labels_that_are_known() -> None:
    lora, model, batches = multi_label()
    for batch in batches:
        found = likelihood(model, lora, batch)["unscaled_log_prob"]
        counts = batch["labels"] != -100
        losses = binary_cross_entropy_with_logits(
            own_logits(lora, batch), batch["labels"].clamp(0, 1), reduction="none"
        )
        assert_close(found, -(losses * counts).sum(1), rtol=0, atol=1e-8)
        whole = {**batch, "labels": batch["labels"].clamp(0, 1)}
        numbers = {**whole, "labels": whole["labels"].long()}
        assert_close(
            likelihood(model, lora, whole)["unscaled_log_prob"],
            likelihood(model, lora, numbers)["unscaled_log_prob"],
        )
    assert not likelihood(model, lora, networks.inputs(batches[0]))["is_observed"]


def test_token_classification_is_the_loss_of_transformers() -> None:
    lora, model, batches = token_classification()
    for batch in batches:
        found = likelihood(model, lora, batch)["unscaled_log_prob"]
        counts = (batch["labels"] != -100).sum(1)
        assert counts[-1] <= 1 < counts.max()
        rows = [{n: x[i : i + 1] for n, x in batch.items()} for i in range(len(found))]
        with torch.no_grad():
            losses = [
                float(lora.network(**row).loss * n) if n else 0.0
                for row, n in zip(rows, counts, strict=True)
            ]
        assert_close(found.tolist(), [-x for x in losses], rtol=0, atol=1e-8)


@pytest.mark.parametrize("ready", [token_classification, language_model])
@pytest.mark.parametrize("on_padding", [0, 1, 2])
def test_labels_of_padding_never_count(
    ready: Callable[[], Ready], on_padding: int
) -> None:
    lora, model, batches = ready()
    for batch in batches:
        padding = batch["attention_mask"] == 0
        assert bool(padding.any())
        expected, found = (
            likelihood(
                model,
                lora,
                {**batch, "labels": batch["labels"].masked_fill(padding, label)},
            )["unscaled_log_prob"]
            for label in (-100, on_padding)
        )
        assert torch.equal(found, expected)


def test_without_labels_a_token_classifier_counts_the_mask() -> None:
    lora, model, batches = token_classification()
    texts = networks.inputs(batches[0])
    mask = likelihood(model, lora, texts)["fn"].base_dist._mask
    assert torch.equal(mask, texts["attention_mask"] > 0)
    bare = {"input_ids": texts["input_ids"]}
    assert likelihood(model, lora, bare)["fn"].base_dist._mask.all()


def test_without_labels_a_language_model_counts_real_tokens() -> None:
    lora, model, batches = language_model()
    texts = networks.inputs(batches[0])
    with_labels = texts["input_ids"].where(
        texts["attention_mask"] > 0, torch.tensor(-100)
    )
    expected = likelihood(model, lora, {**texts, "labels": with_labels})["fn"]
    found = likelihood(model, lora, texts)["fn"]
    assert found.event_shape == (6,)
    assert torch.equal(found.base_dist._mask, expected.base_dist._mask)
    bare = {"input_ids": texts["input_ids"]}
    assert likelihood(model, lora, bare)["fn"].base_dist._mask.all()


def absolute_positions() -> pl.LiftedNetwork:
    network = gpt2(AutoModelForCausalLM, n_layer=1).double()
    return pl.lift(lora_on(network, "c_attn", fan_in_fan_out=True))


@pytest.mark.parametrize("kind", ["multiple_choice", "language_model", "answers"])
def test_absolute_positions_are_counted_from_the_first_token(kind: str) -> None:
    lora, right = absolute_positions(), networks.batch(5, 7)
    makes: dict[str, Callable[[], Any]] = {
        "multiple_choice": lambda: pl.models.multiple_choice(lora, 5, [3, 4]),
        "language_model": lambda: pl.models.language_model(lora, 5),
        "answers": lambda: pl.models.answer_likelihood(lora, 5),
    }
    shifts = (right["attention_mask"] == 0).sum(1)
    left = {
        name: torch.stack([row.roll(int(n)) for row, n in zip(x, shifts, strict=True)])
        for name, x in networks.inputs(right).items()
    }
    found = []
    for texts in (left, networks.inputs(right)):
        batch: Any = dict(texts)
        if kind == "answers":  # each text is a choice, its last token the answer
            last = (
                texts["attention_mask"].cumsum(1)
                == texts["attention_mask"].sum(1)[:, None]
            )
            batch["answer_mask"] = (last & (texts["attention_mask"] > 0)).long()
            batch = {name: x[None] for name, x in batch.items()}
        batch["labels"] = torch.zeros(1, dtype=torch.long)
        if kind == "multiple_choice":
            batch["labels"] = right["labels"]
        if kind == "language_model":
            real = texts["attention_mask"] > 0
            batch["labels"] = texts["input_ids"].where(real, torch.tensor(-100))
        found.append(log_joint(makes[kind](), lora.weights(), batch))
    assert found[0] == pytest.approx(found[1], rel=1e-10)


@pytest.mark.parametrize("with_labels", [True, False])
def test_a_language_model_whatever_the_padding(with_labels: bool) -> None:
    lora, model, batches = language_model()
    right = networks.inputs(batches[1])
    shifts = (right["attention_mask"] == 0).sum(1)
    left = {
        name: torch.stack([row.roll(int(n)) for row, n in zip(x, shifts, strict=True)])
        for name, x in right.items()
    }

    def log_probs(texts: Batch) -> Tensor:
        real = texts["attention_mask"] > 0
        labels = texts["input_ids"].where(real, torch.tensor(-100))
        batch = {**texts, "labels": labels} if with_labels else texts
        fn = likelihood(model, lora, batch)["fn"]
        return fn.log_prob(texts["input_ids"][:, 1:])

    # rotary tables are float32
    assert_close(log_probs(left), log_probs(right), rtol=0, atol=1e-4)


def log_joint(model: Model, weights: dict[str, Tensor], batch: Batch) -> float:
    """Of the full data, nats."""
    at_weights = poutine.condition(model, weights)
    trace: Any = poutine.trace(at_weights).get_trace(**batch)
    return float(trace.log_prob_sum().detach())


@pytest.mark.parametrize("ready", READY)
def test_under_svi(ready: Callable[[], Ready]) -> None:
    lora, model, batches = ready()
    guide = AutoDelta(model, init_loc_fn=lora.init_to_adapter())
    svi = SVI(model, guide, Adam({"lr": 1e-3}), Trace_ELBO())
    start = {site: x.detach().clone() for site, x in guide(**batches[0]).items()}
    assert svi.step(**batches[0]) == pytest.approx(
        -log_joint(model, start, batches[0]), rel=1e-6
    )
    moved = guide(**batches[0])
    assert all(not torch.equal(moved[s], start[s]) for s in lora.sites)


@pytest.mark.parametrize(
    "ready",
    [
        x
        if x in (classification, token_classification)
        else pytest.param(x, marks=pytest.mark.slow)
        for x in READY
    ],
)
def test_under_a_vectorised_elbo(ready: Callable[[], Ready]) -> None:
    lora, model, batches = ready()
    guide = AutoNormal(model, init_loc_fn=lora.init_to_adapter(), init_scale=0.01)
    guide(**batches[0])
    losses = []
    for vectorize in (False, True):
        elbo = Trace_ELBO(100, 1, vectorize_particles=vectorize)
        pyro.set_rng_seed(0)
        losses.append(elbo.loss(model, guide, **batches[0]))
    # Both are means of 100 draws, whose terms have a standard deviation of this much.
    pyro.set_rng_seed(1)
    each = torch.tensor(
        [Trace_ELBO().loss(model, guide, **batches[0]) for _ in range(30)]
    )
    error = 5 * float(each.std()) * math.sqrt(2 / 100)
    assert losses[0] == pytest.approx(losses[1], abs=error)


@pytest.mark.parametrize("ready", READY)
def test_under_laplace(ready: Callable[[], Ready]) -> None:
    lora, model, batches = ready()
    guide = pl.AutoLaplace(
        model,
        init_loc_fn=lora.init_to_adapter(),
        structure=pl.structures.KFAC(),
        fisher="mc" if ready is language_model else "exact",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The weights aren't a mode")
        posterior = guide.laplace_approximation(batches)
    expected = sum(
        float(
            likelihood(poutine.condition(model, posterior.mode()), lora, b)[
                "unscaled_log_prob"
            ].sum()
        )
        for b in batches
    )
    assert float(posterior.log_likelihood) == pytest.approx(expected, abs=1e-4)
    draws = posterior.sample(4)
    assert ("noise" in draws) == (ready is regression)
    assert posterior.log_prob(draws).isfinite().all()
    prior = sum(float(x.sum()) for x in posterior.prior_precision.values())
    assert prior > 0


@pytest.mark.parametrize("ready", READY)
def test_under_svgd(ready: Callable[[], Ready]) -> None:
    lora, model, batches = ready()
    svgd = pl.SVGD(
        model,
        pl.kernels.RBF(),
        Adam({"lr": 1e-4}),
        num_particles=3,
        init_loc_fn=lora.init_to_adapter(jitter=0.01),
    )
    svgd.step(**batches[0])
    particles = svgd.posterior().sample(3)  # each once
    assert particles.keys() == lora.sites.keys() | (
        {"noise"} if ready is regression else set()
    )
    expected = 0.0
    for k in range(3):
        at = {site: x[k].clone() for site, x in particles.items()}
        expected -= log_joint(model, at, batches[1]) / 3
        if "noise" in at:  # particles move in unconstrained space
            expected -= float(at["noise"].log()) / 3
    assert svgd.step(**batches[1]) == pytest.approx(expected, rel=1e-6)


def test_bad_arguments_are_named() -> None:
    lora = pl.lift(networks.llama(None))
    with pytest.raises(ValueError, match=r"two or more different token ids.*\[4\]"):
        pl.models.multiple_choice(lora, 5, [4])
    with pytest.raises(ValueError, match=r"different token ids, found \[4, 4\]"):
        pl.models.multiple_choice(lora, 5, [4, 4])
    of_texts: Any
    for of_texts in ([[7], [9]], torch.tensor([[7], [9]]), [" no", " yes"]):
        with pytest.raises(TypeError, match=r"choice_ids\[0\].*take its only one"):
            pl.models.multiple_choice(lora, 5, of_texts)
    with pytest.raises(ValueError, match=r"must be positive and finite, found -1.0"):
        pl.models.regression(lora, 5, -1.0)
    two = pl.lift(networks.bert(2))
    with pytest.raises(ValueError, match=r"2 outputs a datum, expected one"):
        pl.models.regression(two, 5)(**networks.inputs(networks.batch()))
    assert VOCABULARY > max(CHOICES)


@pytest.mark.parametrize(
    ("name", "network", "by_token", "message"),
    [
        (
            "token_classification",
            networks.bert,
            True,
            r"logits are of shape \(5, 2\), expected \(B, T, C\) with B = 5, T = 7.*"
            "AutoModelForTokenClassification",
        ),
        (
            "token_classification",
            partial(networks.bert, of_tokens=True),
            False,
            r"labels are of shape \(5,\), expected \(B, T\) with B = 5, T = 7",
        ),
        (
            "language_model",
            networks.bert,
            True,
            r"logits are of shape \(5, 2\), expected \(B, T, V\).*AutoModelForCausalLM",
        ),
        # As many classes as tokens.
        ("language_model", partial(networks.llama, 7), True, r"of shape \(5, 7\)"),
        (
            "language_model",
            partial(networks.llama, None),
            False,
            r"labels are of shape \(5,\), expected \(B, T\)",
        ),
        (
            "multi_label",
            partial(networks.bert, 3),
            False,
            r"labels are of shape \(5,\), expected \(B, P\) with B = 5, P = 3",
        ),
        # As many labels as data.
        ("multi_label", partial(networks.bert, 5), False, r"expected \(B, P\)"),
        (
            "multi_label",
            partial(networks.bert, of_tokens=True),
            False,
            r"logits are of shape \(5, 7, 2\), expected \(B, P\) with B = 5",
        ),
        (
            "classification",
            partial(networks.llama, None),
            False,
            r"logits are of shape \(5, 7, 50\), expected \(B, C\) with B = 5",
        ),
        (
            "regression",
            partial(networks.bert, 1, of_tokens=True),
            False,
            r"logits are of shape \(5, 7, 1\), expected \(B, 1\) with B = 5",
        ),
    ],
)
def test_networks_and_labels_of_another_model_are_named(
    name: str, network: Callable[[], Any], by_token: bool, message: str
) -> None:
    lora, texts = pl.lift(network()), networks.batch()
    model = getattr(pl.models, name)(lora, 5)
    if by_token:
        texts["labels"] = texts["input_ids"]
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter(), fisher="mc")
    svgd = pl.SVGD(
        model,
        pl.kernels.RBF(),
        Adam({"lr": 1e-3}),
        2,
        init_loc_fn=lora.init_to_adapter(jitter=0.1),
    )
    calls: list[Callable[[], Any]] = [
        lambda: guide.laplace_approximation([texts]),
        lambda: svgd.step(**texts),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=rf"models\.{name}: .*{message}") as caught:
            call()
        assert "Trace Shapes" not in str(caught.value)


def test_a_ready_model_can_be_subclassed() -> None:
    @dataclass(frozen=True, repr=False)
    class tempered(pl.models.classification):
        def __call__(self, labels: Tensor | None = None, **inputs: Any) -> Tensor:
            with poutine.scale(scale=0.5):
                return super().__call__(labels, **inputs)

    lora = pl.lift(networks.bert(2))
    batch = networks.batch(3)
    whole = likelihood(pl.models.classification(lora, 3), lora, batch)
    half = likelihood(tempered(lora, 3), lora, batch)
    assert_close(half["log_prob"], 0.5 * whole["log_prob"])
