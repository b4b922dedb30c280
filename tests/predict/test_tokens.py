"""Predicted tokens against loops over draws and tokens."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import pyro_lora as pl
from tests import networks
from tests.predict import models

Batch = dict[str, Tensor]


def text_batches() -> list[Batch]:
    batches = models.two_batches()
    for batch in batches:
        labels = batch["input_ids"].where(
            batch["attention_mask"] > 0, torch.tensor(-100)
        )
        labels[:, 0] = -100
        labels[0, 3] = -100  # a hole
        batch["labels"] = labels
    return batches


@pytest.fixture
def lora() -> pl.LiftedNetwork:
    return pl.lift(networks.llama(None))


def by_loops(
    lora: pl.LiftedNetwork, weights: dict[str, Tensor], batches: list[Batch]
) -> list[dict[str, Any]]:
    """One row a token: text, place, each draw's probabilities (S, V), the label."""
    num_draws = len(next(iter(weights.values())))
    rows, start = [], 0
    for batch in batches:
        each = torch.stack(
            [
                models.logits_at(lora, models.draw(weights, s), batch).softmax(-1)
                for s in range(num_draws)
            ]
        )
        size, length = batch["labels"].shape
        for b in range(size):
            for t in range(length - 1):
                label = int(batch["labels"][b, t + 1])
                if label != -100:
                    row = {"datum": start + b, "place": t, "label": label}
                    rows.append({**row, "p": each[:, b, t]})
        start += size
    return rows


@pytest.mark.parametrize("chunk_size", [1, 2, 5])
def test_each_token_equals_a_loop(lora: pl.LiftedNetwork, chunk_size: int) -> None:
    model, batches = pl.models.language_model(lora, models.NUM_DATA), text_batches()
    posterior = models.particles(lora, model, num=5)
    found = pl.predict(
        posterior, batches, model=model, tokens="each", chunk_size=chunk_size
    )
    assert isinstance(found, pl.TokenPrediction)
    rows = by_loops(lora, posterior.particles, batches)
    assert found.data.tolist() == [r["datum"] for r in rows]
    assert found.positions.tolist() == [r["place"] for r in rows]
    assert found.labels.tolist() == [r["label"] for r in rows]
    mean = torch.stack([r["p"].mean(0) for r in rows])
    assert_close(found.confidence, mean.amax(1))
    assert torch.equal(found.predicted, mean.argmax(1))
    assert_close(found.total_entropy, -(mean * mean.log()).sum(1))
    aleatoric = torch.stack([-(r["p"] * r["p"].log()).sum(1).mean() for r in rows])
    assert_close(found.aleatoric_entropy, aleatoric)
    assert found.epistemic_entropy.max() > 0.01
    of_labels = torch.stack([r["p"][:, r["label"]] for r in rows])  # (M, S)
    assert_close(found.label_log_probs, of_labels.mean(1).log())
    data = torch.tensor([r["datum"] for r in rows])
    has_tokens = data.unique()
    together = [of_labels[data == n].prod(0).mean() for n in has_tokens]
    assert found.num_data == 10
    assert_close(found.text_log_probs[has_tokens], torch.stack(together).log())


def test_each_token_is_meant_where_nobody_says(lora: pl.LiftedNetwork) -> None:
    model, batches = pl.models.language_model(lora, models.NUM_DATA), text_batches()
    posterior = models.particles(lora, model)
    found = pl.predict(posterior, batches)
    expected = pl.predict(posterior, batches, tokens="each")
    assert torch.equal(found.label_log_probs, expected.label_log_probs)
    assert torch.equal(found.data, expected.data)


def test_metrics_of_tokens(lora: pl.LiftedNetwork) -> None:
    model, batches = pl.models.language_model(lora, models.NUM_DATA), text_batches()
    found = pl.predict(
        models.particles(lora, model), batches, model=model, tokens="each"
    )
    correct = (found.predicted == found.labels).double()
    metrics = found.metrics()
    assert metrics["accuracy"] == pytest.approx(float(correct.mean()))
    assert metrics["nll"] == pytest.approx(-float(found.label_log_probs.mean()))
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["nll"]))
    gap = float(found.confidence.mean() - correct.mean())
    assert metrics["overconfidence"] == pytest.approx(gap)
    assert metrics["ece"] >= abs(gap) - 1e-6
    table = found.to_pandas()
    assert table.index.name == "token"
    assert table["label_log_prob"].tolist() == found.label_log_probs.tolist()


def test_standard_errors_resample_texts(lora: pl.LiftedNetwork) -> None:
    num_texts, length = 100, 4
    losses = torch.randn(num_texts, 1).double().abs().expand(-1, length).flatten()
    ones = torch.ones(num_texts * length)
    found = pl.TokenPrediction(
        data=torch.arange(num_texts).repeat_interleave(length),
        positions=torch.arange(length).repeat(num_texts),
        predicted=ones.long(),
        confidence=0.5 * ones,
        total_entropy=ones,
        aleatoric_entropy=ones,
        num_data=num_texts,
        labels=ones.long(),
        label_log_probs=-losses,
    )
    pyro.set_rng_seed(0)
    metrics = found.metrics(num_bootstrap=400)
    # Copies within a text tell nothing: the error is that of 100 data.
    exact = float(losses[::length].std(correction=0)) / 10
    assert metrics["nll_se"] == pytest.approx(exact, rel=4 * 0.035)
    assert metrics["accuracy_se"] == 0


@pytest.mark.parametrize("with_labels", [True, False])
def test_the_last_token(lora: pl.LiftedNetwork, with_labels: bool) -> None:
    model, batches = pl.models.language_model(lora, models.NUM_DATA), text_batches()
    for batch in batches:  # none of one token, which predicts nothing
        batch["attention_mask"][:, :3] = 1
        batch["labels"][:, 1:3] = batch["input_ids"][:, 1:3]
    posterior = models.particles(lora, model)
    rows = by_loops(lora, posterior.particles, batches)
    last = [[r for r in rows if r["datum"] == n][-1] for n in range(10)]
    if not with_labels:
        batches = [networks.inputs(b) for b in batches]
    found = pl.predict(posterior, batches, model=model, tokens="last")
    mean = torch.stack([r["p"].mean(0) for r in last])
    assert isinstance(found, pl.Prediction)
    assert_close(found.probs, mean)
    expected = [r["label"] for r in last]
    assert (found.labels.tolist() == expected) if with_labels else not found.labels


def tagger(lora: pl.LiftedNetwork) -> Any:
    """Two classes for each of three outcomes, of which some don't count."""

    def model(labels: Tensor | None = None, **inputs: Tensor) -> None:
        logits = lora()(**inputs).logits
        mask = inputs["attention_mask"][:, :3] > 0
        shifted = torch.stack([logits, 0.5 * logits, -logits], -2)
        with pyro.plate("data", models.NUM_DATA, subsample=inputs["input_ids"]):
            fn = dist.Categorical(logits=shifted).mask(mask).to_event(1)
            pyro.sample("y", fn, obs=labels)

    return model


@pytest.mark.parametrize("tokens", ["last", "each"])
def test_linearized_tokens(tokens: Any) -> None:
    lora, _ = models.classifier(2)
    model = tagger(lora)
    batches = [
        {**b, "labels": torch.randint(2, (len(b["labels"]), 3))}
        for b in models.two_batches()
    ]
    posterior = models.laplace(lora, model, batches)
    parts = [posterior, posterior.with_prior_precision(50.0)]
    mixture = pl.MixturePosterior(parts, [0.3, 0.7])
    found = pl.predict(
        mixture, batches, model=model, method="linearized", tokens=tokens
    )
    probs, labels = [], []
    for batch in batches:
        mask = batch["attention_mask"][:, :3] > 0
        gaussians = [part.linearized(batch, tokens="each") for part in parts]
        for b, row in enumerate(mask.tolist()):
            places = [t for t in range(3) if row[t]]
            for t in places[-1:] if tokens == "last" else places:
                each = [
                    pl.integrals.class_log_probs(
                        pl.integrals.GaussianLogits(
                            g.mean[b, t][None], g.covariance_matrix[b, t][None]
                        )
                    ).exp()
                    for g in gaussians
                ]
                probs.append(0.3 * each[0] + 0.7 * each[1])
                labels.append(int(batch["labels"][b, t]))
    expected = torch.cat(probs)
    confidence = found.probs.amax(1) if tokens == "last" else found.confidence
    assert_close(confidence, expected.amax(1), rtol=0, atol=1e-7)
    assert found.labels.tolist() == labels
    assert found.metrics()["nll"] == pytest.approx(
        -float(expected.log()[torch.arange(len(labels)), labels].mean()), abs=1e-6
    )


def test_the_last_tokens_take_one_backward_pass_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lora, _ = models.classifier(2)
    model = tagger(lora)
    batches = [
        {**b, "labels": torch.randint(2, (len(b["labels"]), 3))}
        for b in models.two_batches()
    ]
    posterior = models.laplace(lora, model, batches)
    passes = []
    grad = torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *a, **k: passes.append(1) or grad(*a, **k)
    )
    options: Any = {"method": "linearized"}
    pl.predict(posterior, batches[:1], model=model, tokens="last", **options)
    assert len(passes) == 1
    pl.predict(posterior, batches[:1], model=model, tokens="each", **options)
    assert len(passes) == 1 + 3


def test_bad_requests_are_named(lora: pl.LiftedNetwork) -> None:
    model, batches = pl.models.language_model(lora, models.NUM_DATA), text_batches()
    posterior = models.particles(lora, model)
    with pytest.raises(ValueError, match="tokens must be 'last', 'each' or None"):
        pl.predict(posterior, batches, model=model, tokens="first")
    batches[0]["labels"][2] = -100
    with pytest.raises(ValueError, match=r"datum 2 of a batch has no token"):
        pl.predict(posterior, batches, model=model, tokens="last")
    classifier, plain = models.classifier()
    particles = models.particles(classifier, plain)
    with pytest.raises(ValueError, match="leave tokens out"):
        pl.predict(particles, models.two_batches(), model=plain, tokens="last")
    unlabelled = [networks.inputs(b) for b in batches]
    found = pl.predict(posterior, unlabelled, model=model, tokens="each")
    assert found.text_log_probs is None
    with pytest.raises(ValueError, match="metrics needs labels"):
        found.metrics()
    mixed = [batches[1], unlabelled[0]]
    with pytest.raises(ValueError, match="Batch 1 has no 'labels'"):
        pl.predict(posterior, mixed, model=model, tokens="each")


def two_outcomes(lora: pl.LiftedNetwork) -> Any:
    """A class and a number for each datum."""

    def model(
        labels: Tensor | None = None, stars: Tensor | None = None, **inputs: Tensor
    ) -> None:
        logits = lora()(**inputs).logits
        with pyro.plate("data", models.NUM_DATA, subsample=inputs["input_ids"]):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)
            pyro.sample("stars", dist.Normal(logits[..., 0], 0.5), obs=stars)

    return model


@pytest.mark.parametrize("with_labels", [True, False])
def test_one_of_several_sites(with_labels: bool) -> None:
    lora, plain = models.classifier()
    model = two_outcomes(lora)
    batches: list[Any] = [
        {**b, "stars": torch.randn(len(b["labels"])).double()}
        for b in models.two_batches()
    ]
    posterior = models.particles(lora, model, obs_site=None)
    if not with_labels:
        batches = [networks.inputs(b) | {"stars": None} for b in batches]
    classes = pl.predict(posterior, batches, model=model, obs_site="y")
    expected = pl.predict(
        posterior,
        [networks.inputs(b) for b in batches]
        if not with_labels
        else batches_of(batches),
        model=plain,
    )
    assert_close(classes.probs, expected.probs)
    stars = pl.predict(
        posterior, batches, model=model, obs_site="stars", labels="stars"
    )
    assert isinstance(stars, pl.RegressionPrediction)
    assert stars.loc.shape == (3, 10)
    if with_labels:
        assert (
            stars.labels.tolist() == torch.cat([b["stars"] for b in batches]).tolist()
        )
        with pytest.raises(ValueError, match=r"isn't among those|obs_site="):
            pl.predict(posterior, batches, model=model)


def batches_of(batches: list[Any]) -> list[Any]:
    return [{k: x for k, x in b.items() if k != "stars"} for b in batches]


def test_several_sites_linearized() -> None:
    lora, _ = models.classifier()
    model = two_outcomes(lora)
    batches: list[Any] = [
        {**b, "stars": torch.randn(len(b["labels"])).double()}
        for b in models.two_batches()
    ]
    guide = pl.AutoLaplace(
        model, init_loc_fn=lora.init_to_adapter(), obs_site=["y", "stars"]
    )
    with pytest.warns(UserWarning, match="aren't a mode"):
        posterior = guide.laplace_approximation(batches)
    options: Any = {"method": "linearized"}
    classes = pl.predict(posterior, batches, model=model, obs_site="y", **options)
    stars = pl.predict(
        posterior, batches, model=model, obs_site="stars", labels="stars", **options
    )
    drawn = pl.predict(
        posterior,
        batches,
        model=model,
        obs_site="stars",
        labels="stars",
        num_samples=500,
    )
    assert classes.metrics()["nll"] > 0
    assert_close(
        stars.noise_variance, torch.full((10,), 0.25).double(), check_dtype=False
    )
    # Not linear, so roughly: within the sd that the weights give.
    assert ((drawn.mean - stars.mean).abs() < stars.weight_variance.sqrt()).all()
