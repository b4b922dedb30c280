"""Every kind of prediction: counted, chosen, joined, named and shown, row by row."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import pyro_lora as pl
from tests import networks
from tests.predict import models

NUM_DATA = 7


def classes() -> pl.Prediction:
    draws = torch.randn(4, NUM_DATA, 3, dtype=torch.float64).log_softmax(-1)
    log_probs = draws.logsumexp(0) - torch.tensor(4.0).log()
    return pl.Prediction(
        log_probs=log_probs,
        aleatoric_entropy=-(draws.exp() * draws).sum(-1).mean(0),
        labels=torch.tensor([0, 2, -100, 1, 1, 0, 2]),
        draw_log_probs=draws,
        class_names=("bad", "so-so", "good"),
    )


def reals() -> pl.RegressionPrediction:
    labels = torch.randn(NUM_DATA, dtype=torch.float64)
    labels[3] = torch.nan
    return pl.RegressionPrediction(
        loc=torch.randn(4, NUM_DATA, dtype=torch.float64),
        noise_scale=torch.rand(4, NUM_DATA, dtype=torch.float64) + 0.5,
        loc_variance=torch.rand(4, NUM_DATA, dtype=torch.float64),
        weights=torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64),
        labels=labels,
    )


def outputs() -> pl.RegressionPrediction:
    shape = (3, NUM_DATA, 2)
    return pl.RegressionPrediction(
        loc=torch.randn(shape, dtype=torch.float64),
        noise_scale=torch.ones(shape, dtype=torch.float64),
        df=torch.full(shape, 3.0, dtype=torch.float64),
        labels=torch.randn(shape[1:], dtype=torch.float64),
    )


def counts() -> pl.MixturePrediction:
    """Of two batches, of three and four data, each with two chunks of draws."""
    rates = torch.rand(5, NUM_DATA, dtype=torch.float64) * 4 + 0.1
    groups = [rates[:, :3], rates[:, 3:]]
    return pl.MixturePrediction(
        components=[[dist.Poisson(g[:2]), dist.Poisson(g[2:])] for g in groups],
        labels=torch.tensor([0.0, 3, 1, torch.nan, 2, 7, 1], dtype=torch.float64),
    )


def trials() -> pl.MixturePrediction:
    """Counts, each of another number of trials, which has to go with its datum."""
    total = torch.arange(1.0, NUM_DATA + 1, dtype=torch.float64)
    logits = torch.randn(2, NUM_DATA, dtype=torch.float64)
    return pl.MixturePrediction(
        components=[[dist.Binomial(total, logits=logits)]], labels=total
    )


def durations() -> pl.MixturePrediction:
    """Positive numbers, of which 0 is none."""
    scale = torch.rand(3, NUM_DATA, dtype=torch.float64) + 0.5
    return pl.MixturePrediction(
        components=[[dist.LogNormal(torch.zeros_like(scale), scale)]],
        weights=torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64),
        labels=torch.rand(NUM_DATA, dtype=torch.float64) + 0.1,
    )


def votes() -> pl.MixturePrediction:
    """A row of three counts is one outcome; the third datum has none."""
    logits = torch.randn(2, NUM_DATA, 3, dtype=torch.float64)
    labels = dist.Multinomial(5, logits=logits[0]).sample()
    labels[2] = torch.nan
    return pl.MixturePrediction(
        components=[[dist.Multinomial(5, logits=logits)]], labels=labels
    )


def pairs() -> pl.MixturePrediction:
    """Two numbers with a covariance that all data and draws share."""
    loc = torch.randn(2, NUM_DATA, 2, dtype=torch.float64)
    root = torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    return pl.MixturePrediction(
        components=[[dist.MultivariateNormal(loc, scale_tril=root)]], labels=loc[0]
    )


def tokens() -> pl.TokenPrediction:
    """The fourth text has no tokens."""
    data = torch.tensor([0, 0, 1, 2, 2, 2, 4, 5, 5, 6])
    log_probs = torch.randn(len(data), 3, dtype=torch.float64).log_softmax(-1)
    confidence, predicted = log_probs.exp().max(-1)
    labels = torch.tensor([0, 1, 2, -100, 1, 0, 2, 1, -100, 0])
    of_labels = log_probs.gather(1, labels.clamp_min(0)[:, None])[:, 0]
    return pl.TokenPrediction(
        data=data,
        positions=torch.tensor([0, 1, 1, 0, 2, 3, 0, 0, 1, 0]),
        predicted=predicted,
        confidence=confidence,
        total_entropy=-(log_probs.exp() * log_probs).sum(-1),
        aleatoric_entropy=torch.zeros(len(data), dtype=torch.float64),
        num_data=NUM_DATA,
        labels=labels,
        label_log_probs=of_labels.masked_fill(labels < 0, torch.nan),
        text_log_probs=torch.randn(NUM_DATA, dtype=torch.float64),
        log_probs=log_probs,
        num_classes=3,
        class_names=("O", "person", "place"),
    )


KINDS: list[Callable[[], Any]] = [
    classes,
    reals,
    outputs,
    counts,
    trials,
    durations,
    votes,
    pairs,
    tokens,
]


def rows_of(prediction: Any) -> list[dict[str, Any]]:
    """What is said of each datum: its rows of the table, without their number."""
    table = prediction.columns()
    datum = table.pop("datum", np.arange(len(prediction)))
    return [
        {name: values[datum == n].tolist() for name, values in table.items()}
        for n in range(len(prediction))
    ]


def assert_same_rows(found: Any, expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected)
    for row, other in zip(rows_of(found), expected, strict=True):
        assert row.keys() == other.keys()
        for name, values in row.items():
            for x, y in zip(values, other[name], strict=True):
                same = x == y or (x != x and y != y)
                assert same or abs(x - y) <= 1e-14 * max(1.0, abs(y)), name


INDICES = st.one_of(
    st.integers(-NUM_DATA, NUM_DATA - 1),
    st.slices(NUM_DATA),
    st.lists(st.integers(-NUM_DATA, NUM_DATA - 1), min_size=1, max_size=9),
    st.lists(st.booleans(), min_size=NUM_DATA, max_size=NUM_DATA),
)


@pytest.mark.parametrize("make", KINDS)
@settings(deadline=None, max_examples=40)
@given(index=INDICES, form=st.sampled_from([None, torch.tensor, np.array]))
@pytest.mark.few(5)
def test_an_index_takes_the_rows_that_it_takes_of_an_array(
    make: Callable[[], Any], index: Any, form: Any
) -> None:
    prediction = make()
    chosen = np.atleast_1d(np.arange(NUM_DATA)[index]).tolist()
    if form is not None and not isinstance(index, slice):
        index = form(index)
    if len(chosen) == 0:
        with pytest.raises(ValueError, match="leaves none of the 7 data"):
            prediction[index]
        return
    rows = rows_of(prediction)
    assert_same_rows(prediction[index], [rows[n] for n in chosen])


@pytest.mark.parametrize("make", KINDS)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
@pytest.mark.few(5)
def test_pieces_make_up_the_whole(make: Callable[[], Any], data: Any) -> None:
    prediction = make()
    order = data.draw(st.permutations(range(NUM_DATA)))
    cuts = sorted(data.draw(st.sets(st.integers(1, NUM_DATA - 1))))
    pieces = [
        prediction[order[start:stop]]
        for start, stop in zip([0, *cuts], [*cuts, NUM_DATA], strict=True)
    ]
    whole = type(prediction).concatenated(pieces)
    rows = rows_of(prediction)
    assert_same_rows(whole, [rows[n] for n in order])
    back = whole[[order.index(n) for n in range(NUM_DATA)]]
    expected, found = prediction.metrics(), back.metrics()
    assert found == pytest.approx(expected, rel=1e-12)


def test_what_a_slice_keeps_of_classes() -> None:
    prediction = classes()
    assert prediction.draw_log_probs is not None
    found = prediction[[4, 1]]
    assert found.draw_log_probs is not None
    assert torch.equal(found.draw_log_probs, prediction.draw_log_probs[:, [4, 1]])
    assert found.class_names == prediction.class_names
    assert [len(one) for one in prediction] == [1] * NUM_DATA


def test_a_text_without_tokens() -> None:
    named = dataclasses.replace(tokens(), position_names=("a", "b", "c", "d"))
    empty = named[3]
    assert (len(empty), len(empty.data)) == (1, 0)
    assert in_a_line(empty).startswith("TokenPrediction(N=1, outcomes=0, C=3")
    with pytest.raises(ValueError, match="3 names, but there is a position 3"):
        dataclasses.replace(named, position_names=("a", "b", "c"))


def test_densities_of_chosen_numbers_are_those_of_the_whole() -> None:
    for make in (reals, counts, trials, durations):
        prediction = make()
        values = torch.arange(1.0, NUM_DATA + 1, dtype=torch.float64)
        whole = prediction.log_prob(values)
        rows = [6, 0, 6, 3, 6, 3]
        assert_close(prediction[rows].log_prob(values[rows]), whole[rows])
        again = prediction[rows][[0, 2, 2, 5]]
        assert_close(again.log_prob(values[[6, 6, 6, 3]]), whole[[6, 6, 6, 3]])


@pytest.mark.parametrize("make", KINDS)
def test_those_with_labels_have_the_metrics_of_all(make: Callable[[], Any]) -> None:
    prediction = make()
    found = prediction.labelled()
    assert prediction.metrics() == pytest.approx(found.metrics(), rel=1e-12)
    assert len(found) == len(found.labelled())
    if isinstance(prediction, pl.TokenPrediction):
        assert len(found) == NUM_DATA - 1  # a text has no tokens
    bare = {"labels": None}
    if isinstance(prediction, pl.TokenPrediction):
        bare["label_log_probs"] = None
    with pytest.raises(ValueError, match="a caller needs labels, and this prediction"):
        dataclasses.replace(prediction, **bare).labelled("a caller")


def test_wrong_indices_are_named() -> None:
    prediction = classes()
    for index in (7, -8, [0, 9]):
        with pytest.raises(IndexError, match=r"no datum .*7 data, 0 to 6"):
            prediction[index]
    with pytest.raises(ValueError, match=r"7 booleans, one for each datum; found 3"):
        prediction[torch.tensor([True, False, True])]
    with pytest.raises(TypeError, match=r"found torch\.float32"):
        prediction[torch.tensor([0.5])]
    with pytest.raises(TypeError, match=r"by its data alone.*found 2 indices"):
        prediction[0, 1]  # type: ignore[index]


def unlike(prediction: Any) -> dict[str, tuple[Any, str]]:
    """What can't stand beside a prediction of classes, and what is said of it."""
    other = classes()
    return {
        "no labels": (dataclasses.replace(other, labels=None), "its labels is None"),
        "no draws": (
            dataclasses.replace(other, draw_log_probs=None),
            "its draw_log_probs is None",
        ),
        "names": (
            dataclasses.replace(other, class_names=("a", "b", "c")),
            r"its class_names is \('a', 'b', 'c'\)",
        ),
        "classes": (
            pl.Prediction(
                log_probs=torch.full((2, 2), 0.5).log(),
                aleatoric_entropy=torch.zeros(2),
            ),
            r"its log_probs is of shape \(2, 2\)",
        ),
    }


@pytest.mark.parametrize("name", unlike(None))
def test_what_does_not_fit_is_not_joined(name: str) -> None:
    other, message = unlike(None)[name]
    expected = rf"predictions\[1\] doesn't fit the first one: {message}"
    with pytest.raises(ValueError, match=expected):
        pl.Prediction.concatenated([classes(), other])


def test_joined_are_predictions_of_one_kind() -> None:
    with pytest.raises(ValueError, match="got no predictions"):
        pl.Prediction.concatenated([])
    with pytest.raises(TypeError, match=r"predictions\[1\] is a RegressionPrediction"):
        pl.Prediction.concatenated([classes(), reals()])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"of 2 Binomial, not of 5 Poisson"):
        pl.MixturePrediction.concatenated([counts(), trials()])


def test_labels_can_be_given_afterwards() -> None:
    labels = torch.tensor([2.0, 0, 1, 1, -100, 0, 2])
    bare = dataclasses.replace(classes(), labels=None)
    found = bare.with_labels(labels)
    assert found.labels is not None
    assert found.labels.tolist() == labels.long().tolist()
    column = torch.randn(NUM_DATA, 1)
    assert reals().with_labels(column).labels.tolist() == column[:, 0].tolist()
    for prediction in (bare, reals(), counts()):
        with pytest.raises(ValueError, match=r"shape \(7,\), one for each datum"):
            prediction.with_labels(torch.zeros(3))
    with pytest.raises(ValueError, match="predict needs them in its batches"):
        tokens().with_labels(torch.zeros(3))


@pytest.mark.parametrize("names", ["bad", ("bad", "good"), ("a", "a", "b"), (0, 1, 2)])
def test_each_class_has_a_name_of_its_own(names: Any) -> None:
    with pytest.raises(ValueError, match="class_names must be 3 different strings"):
        dataclasses.replace(classes(), class_names=names)


def test_classes_go_by_their_names_in_tables() -> None:
    prediction = classes()
    table = prediction.to_pandas()
    assert list(table)[:5] == ["predicted", "confidence", "p_bad", "p_so-so", "p_good"]
    assert [*table] == [*prediction.columns()]
    assert table["label"].tolist()[:2] == ["bad", "good"]
    assert table["label"].isna().tolist() == [False, False, True] + 4 * [False]
    p = table[["p_bad", "p_so-so", "p_good"]].to_numpy()
    names = np.array(["bad", "so-so", "good"])
    assert table["predicted"].tolist() == names[p.argmax(1)].tolist()
    plain = dataclasses.replace(prediction, class_names=None).to_pandas()
    assert {"p_0", "p_1", "p_2"} <= {*plain}
    assert plain["label"].tolist()[:3] == [0, 2, -100]
    assert plain["predicted"].tolist() == p.argmax(1).tolist()


def in_a_line(prediction: Any) -> str:
    """Its repr, which has a line for each fact where it is long."""
    words = " ".join(repr(prediction).split())
    return words.replace("( ", "(").replace(", )", ")")


def test_a_description_says_what_there_is() -> None:
    prediction = classes()
    metrics = prediction.metrics()
    assert in_a_line(prediction) == (
        "Prediction(N=7, C=3, classes=(bad, so-so, good), S=4, labels=6, "
        f"accuracy={metrics['accuracy']:.3f}, nll={metrics['nll']:.3f})"
    )
    many = tuple(f"c{n}" for n in range(9))
    uniform = pl.Prediction(
        log_probs=torch.full((2, 9), 1 / 9).log(),
        aleatoric_entropy=torch.zeros(2),
        class_names=many,
    )
    assert in_a_line(uniform) == (
        "Prediction(N=2, C=9, classes=(c0, c1, c2, c3, c4, c5, 3 more), labels=None)"
    )
    numbers = counts()
    rmse = numbers.metrics()["rmse"]
    assert in_a_line(numbers) == f"MixturePrediction(N=7, labels=6, rmse={rmse:.3g})"
    assert in_a_line(outputs()).startswith(
        "RegressionPrediction(N=7, P=2, labels=7, rmse="
    )
    texts = tokens()
    nll = texts.metrics()["nll"]
    said = in_a_line(texts)
    assert "N=7, outcomes=10, C=3, classes=(O, person, place), labels=8" in said
    assert f"nll={nll:.3f}" in said
    missing = dataclasses.replace(prediction, labels=torch.full((NUM_DATA,), -100))
    assert in_a_line(missing).endswith("labels=0)")


@pytest.mark.parametrize("make", KINDS)
def test_a_notebook_shows_the_same(make: Callable[[], Any]) -> None:
    prediction = make()
    html = prediction._repr_html_()
    facts = dict(re.findall(r"<tr><th>(\w+)</th><td>([^<]*)</td></tr>", html))
    inside = ", ".join(f"{name}={value}" for name, value in facts.items())
    assert in_a_line(prediction) == f"{type(prediction).__name__}({inside})"
    assert html.count("\n") == 0
    named = dataclasses.replace(classes(), class_names=("<b>", "&", "c"))
    assert "(&lt;b&gt;, &amp;, c)" in named._repr_html_()


@pytest.mark.parametrize("method", ["sample", "linearized"])
def test_names_come_from_the_network(method: Any) -> None:
    lora, model = models.classifier(3)
    batches = models.two_batches(3)
    posterior = models.laplace(lora, model, batches)
    config: Any = lora.network.config

    def names(**options: Any) -> tuple[str, ...] | None:
        found = pl.predict(posterior, batches, method=method, **options)
        return found.class_names

    with pytest.MonkeyPatch.context() as patch:
        assert names() is None  # LABEL_0, LABEL_1, LABEL_2
        patch.setattr(config, "id2label", {0: "neg", 1: "neutral", 2: "pos"})
        assert names() == ("neg", "neutral", "pos")
        patch.setattr(config, "id2label", {0: "same", 1: "same", 2: "pos"})
        assert names() is None
        patch.setattr(config, "id2label", {0: "neg", 1: "pos"})  # of other classes
        assert names() is None


def test_a_stock_guide_knows_them_by_the_model() -> None:
    lora, model = models.classifier(2)
    lora.network.config.id2label = {0: "no", 1: "yes"}  # type: ignore[union-attr]
    guide = pyro.infer.autoguide.AutoNormal(model)
    batches = models.two_batches(2)
    guide(**batches[0])
    found = pl.predict(guide, batches, model=model, num_samples=2)
    assert found.class_names == ("no", "yes")


@pytest.mark.parametrize("method", ["sample", "linearized"])
def test_several_labels_of_a_datum_have_names_and_probabilities(method: Any) -> None:
    lora = pl.lift(networks.bert(2))
    lora.network.config.id2label = {0: "toxic", 1: "rude"}  # type: ignore[union-attr]

    def model(labels: Tensor | None = None, **inputs: Tensor) -> None:
        logits = lora()(**inputs).logits
        with pyro.plate("data", models.NUM_DATA, subsample=inputs["input_ids"]):
            pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=labels)

    batches = models.two_batches(2)
    for batch in batches:
        shape = len(batch["labels"]), 2
        batch["labels"] = torch.randint(2, shape).to(torch.float64)
    posterior: Any = models.particles(lora, model)
    if method == "linearized":
        posterior = models.laplace(lora, model, batches)
    found = pl.predict(posterior, batches, tokens="each", method=method)
    assert found.position_names == ("toxic", "rude")
    assert found.class_names is None
    assert "C=2, positions=(toxic, rude)" in in_a_line(found)
    assert found.probs.shape == (2 * models.NUM_DATA, 2)
    table = found.to_pandas()
    assert table["position"].tolist() == ["toxic", "rude"] * models.NUM_DATA
    assert_close(table["p_0"].to_numpy() + table["p_1"].to_numpy(), np.ones(len(table)))
    if method == "sample":
        each = torch.cat(
            [
                torch.stack(
                    [
                        models.logits_at(lora, models.draw(posterior.particles, k), b)
                        for k in range(3)
                    ]
                )
                for b in batches
            ],
            1,
        )
        p = each.double().sigmoid().mean(0).flatten()
        assert_close(found.probs[:, 1], p, rtol=1e-6, atol=1e-8)


def test_many_classes_are_not_kept() -> None:
    lora = pl.lift(networks.llama(None))
    model = pl.models.language_model(lora, models.NUM_DATA)
    batches = models.two_batches()
    for batch in batches:
        batch["labels"] = batch["input_ids"]
    found = pl.predict(models.particles(lora, model), batches, tokens="each")
    vocabulary = lora.network.config.vocab_size  # type: ignore[union-attr]
    assert found.num_classes == vocabulary
    assert (found.log_probs is None) == (vocabulary > 64)
    if found.log_probs is None:
        with pytest.raises(ValueError, match="more than 64 classes aren't kept"):
            found.probs.sum()
