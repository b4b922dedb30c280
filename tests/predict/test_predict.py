"""Predictions against loops over draws, integrals, and what must be refused."""

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import autoguide
from torch import Tensor
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora.predict import draws
from tests import networks
from tests.predict import models


@pytest.mark.parametrize("num_labels", [2, 3])
def test_particles_equal_a_loop(num_labels: int) -> None:
    lora, model = models.classifier(num_labels)
    batches = models.two_batches(num_labels)
    posterior = models.particles(lora, model)
    found = pl.predict(posterior, batches, model=model)
    probs, aleatoric = models.averaged(lora, posterior.particles, batches)
    assert_close(found.probs, probs, rtol=0, atol=1e-10)
    assert_close(found.log_probs, probs.log(), rtol=0, atol=1e-10)
    assert_close(found.aleatoric_entropy, aleatoric, rtol=0, atol=1e-10)
    total = -(probs * probs.log()).sum(-1)
    assert_close(found.epistemic_entropy, total - aleatoric, rtol=0, atol=1e-10)
    assert found.epistemic_entropy.max() > 0.01
    assert found.labels is not None
    assert found.labels.tolist() == [y for b in batches for y in b["labels"].tolist()]


def test_more_draws_than_one_pass_holds_equal_a_loop() -> None:
    lora, plain = models.classifier()
    at_once = []

    def model(**batch: Any) -> Tensor:
        labels = plain(**batch)
        at_once.append(labels.numel() // len(batch["input_ids"]))
        return labels

    batches = models.two_batches()
    posterior = models.particles(lora, model, num=2 * draws.DRAWS_AT_ONCE + 1)
    probs, aleatoric = models.averaged(lora, posterior.particles, batches)
    found = pl.predict(posterior, batches, model=model)
    assert_close(found.probs, probs, rtol=0, atol=1e-10)
    assert_close(found.aleatoric_entropy, aleatoric, rtol=0, atol=1e-10)
    # The first finds the model's plates, and which labels count; then it is seen that
    # the model keeps draws apart.
    assert at_once == [1, 1, 2, 8, 8, 1, 8, 8, 1]


def test_as_many_draws_as_data_are_not_mixed_up() -> None:
    lora, model = models.classifier()
    batches = [networks.batch(5), networks.batch(5)]
    posterior = models.particles(lora, model, num=5)
    probs, _ = models.averaged(lora, posterior.particles, batches)
    assert_close(pl.predict(posterior, batches, model=model).probs, probs)


def test_laplace_draws_are_those_of_the_posterior() -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    posterior = models.laplace(lora, model, batches)
    pyro.set_rng_seed(3)
    found = pl.predict(posterior, batches, model=model, method="sample", num_samples=4)
    pyro.set_rng_seed(3)
    probs, aleatoric = models.averaged(lora, posterior.sample(4), batches)
    assert_close(found.probs, probs)
    assert_close(found.aleatoric_entropy, aleatoric)


def test_the_batch_size_changes_nothing() -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    posterior = models.laplace(lora, model, batches)
    results = []
    for size in (1, 4, 10):
        pyro.set_rng_seed(1)
        resized = models.resized(batches, size)
        results.append(
            pl.predict(posterior, resized, model=model, method="sample", num_samples=11)
        )
    for other in results[1:]:
        assert_close(other.probs, results[0].probs, rtol=0, atol=1e-10)
    assert len(results[0].probs) == 10


def test_the_seed_decides() -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    posterior = models.laplace(lora, model, batches)

    def probs(seed: int) -> Tensor:
        pyro.set_rng_seed(seed)
        found = pl.predict(
            posterior, batches, model=model, method="sample", num_samples=3
        )
        return found.probs

    assert torch.equal(probs(1), probs(1))
    assert not torch.allclose(probs(1), probs(2), atol=1e-4)


def test_sampling_converges_to_64_draws_without_being_asked() -> None:
    lora, model = models.classifier()
    counts = []

    def guide(**_: Any) -> dict[str, Tensor]:
        counts.append(1)
        return models.guide_over(lora.weights())()

    pl.predict(guide, models.two_batches(), model=model)
    assert len(counts) == 64


@pytest.mark.parametrize(
    "family",
    [
        autoguide.AutoDelta,
        autoguide.AutoNormal,
        autoguide.AutoLowRankMultivariateNormal,
    ],
)
def test_stock_guides_equal_a_loop(family: Any) -> None:
    lora, model = models.classifier(3)
    batches = models.two_batches(3)
    guide = family(model, init_loc_fn=lora.init_to_adapter())
    guide(**batches[0])
    pyro.set_rng_seed(5)
    found = pl.predict(guide, batches, model=model, num_samples=3)
    pyro.set_rng_seed(5)
    drawn = [guide(**batches[0]) for _ in range(3)]
    weights = {s: torch.stack([d[s] for d in drawn]).detach() for s in lora.sites}
    probs, _ = models.averaged(lora, weights, batches)
    assert_close(found.probs, probs)


def test_an_untrained_guide_is_set_up_with_labels() -> None:
    lora, model = models.classifier()
    guide = autoguide.AutoNormal(model, init_loc_fn=lora.init_to_adapter())
    assert (
        len(pl.predict(guide, models.two_batches(), model=model, num_samples=1).probs)
        == 10
    )


def test_probabilities_are_averaged_in_log_space() -> None:
    # Each draw gives the label less than the smallest double.
    lora, model = models.classifier()
    weights = models.jittered(lora, 3)
    weights["head.classifier.bias"] = torch.tensor([[[900.0, 0.0]]] * 3).double()
    posterior = pl.ParticlePosterior(weights, (lora,), model, "y")
    batches = [networks.batch(4) | {"labels": torch.ones(4, dtype=torch.long)}]
    found = pl.predict(posterior, batches, model=model)
    each = torch.stack(
        [
            models.logits_at(lora, models.draw(weights, s), batches[0]).log_softmax(-1)
            for s in range(3)
        ]
    )
    expected = each.logsumexp(0) - torch.tensor(3.0).log()
    assert expected[:, 1].max() < -800
    assert_close(found.log_probs, expected, rtol=0, atol=1e-6)
    assert found.metrics()["nll"] > 800


def bernoulli(lora: pl.LiftedNetwork) -> Any:
    def model(labels: Tensor | None = None, **inputs: Tensor) -> None:
        logits = lora()(**inputs).logits[..., 0]
        with pyro.plate("data", models.NUM_DATA, subsample=inputs["input_ids"]):
            obs = None if labels is None else labels.double()
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=obs)

    return model


def test_a_bernoulli_likelihood_has_two_classes() -> None:
    lora, _ = models.classifier(1)
    model, batches = bernoulli(lora), models.two_batches()
    posterior = models.particles(lora, model)
    found = pl.predict(posterior, batches, model=model)
    p = torch.cat(
        [
            sum(
                models.logits_at(lora, models.draw(posterior.particles, s), b).sigmoid()
                for s in range(3)
            )
            / 3
            for b in batches
        ]
    )
    assert_close(found.probs, torch.cat([1 - p, p], -1))


@pytest.mark.parametrize("shape", [(), (3,)])
def test_other_latent_variables_go_with_their_draw(shape: tuple[int, ...]) -> None:
    lora, _ = models.classifier(3)

    def model(labels: Tensor | None = None, **inputs: Tensor) -> None:
        scale = pyro.sample(
            "scale", dist.LogNormal(torch.zeros(shape), 1.0).to_event(len(shape))
        )
        logits = lora()(**inputs).logits
        scale = scale if shape else scale[..., None]
        with pyro.plate("data", models.NUM_DATA, subsample=inputs["input_ids"]):
            pyro.sample("y", dist.Categorical(logits=scale * logits), obs=labels)

    weights = models.jittered(lora, 4)
    weights["scale"] = torch.rand(4, *shape, dtype=torch.float64) + 0.5
    posterior = pl.ParticlePosterior(weights, (lora,), model, None)
    batch = networks.batch(4, num_labels=3)  # as many data as draws
    lifted = {site: weights[site] for site in lora.sites}
    expected = sum(
        (weights["scale"][s] * models.logits_at(lora, models.draw(lifted, s), batch))
        .softmax(-1)
        .div(4)
        for s in range(4)
    )
    assert_close(pl.predict(posterior, [batch], model=model).probs, expected)


def test_latent_variables_in_a_plate_of_their_own() -> None:
    lora, _ = models.classifier(3)

    def model(labels: Tensor | None = None, **inputs: Tensor) -> None:
        with pyro.plate("classes", 3):
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        logits = lora()(**inputs).logits + (
            shift[..., None, :] if shift.ndim > 1 else shift
        )
        with pyro.plate("data", models.NUM_DATA, subsample=inputs["input_ids"]):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    weights = models.jittered(lora, 3)
    weights["shift"] = torch.randn(3, 3, dtype=torch.float64)
    posterior = pl.ParticlePosterior(weights, (lora,), model, "y")
    batch = networks.batch(4, num_labels=3)
    lifted = {site: weights[site] for site in lora.sites}
    expected = sum(
        (weights["shift"][s] + models.logits_at(lora, models.draw(lifted, s), batch))
        .softmax(-1)
        .div(3)
        for s in range(3)
    )
    assert_close(pl.predict(posterior, [batch], model=model).probs, expected)


def test_recorded_values_are_no_likelihood() -> None:
    lora, plain = models.classifier()

    def model(labels: Tensor | None = None, **inputs: Tensor) -> None:
        logits = lora()(**inputs).logits
        pyro.deterministic("logits", logits, event_dim=0)
        with pyro.plate("data", models.NUM_DATA, subsample=inputs["input_ids"]):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    posterior = models.particles(lora, model, obs_site=None)
    batches = models.two_batches()
    expected = pl.predict(posterior, batches, model=plain)
    assert_close(pl.predict(posterior, batches, model=model).probs, expected.probs)


def test_a_model_without_plates() -> None:
    lora, _ = models.classifier()

    def model(labels: Tensor | None = None, **inputs: Tensor) -> None:
        pyro.sample("y", dist.Categorical(logits=lora()(**inputs).logits), obs=labels)

    posterior = models.particles(lora, model, num=4)
    batches = [networks.batch(4)]
    probs, _ = models.averaged(lora, posterior.particles, batches)
    assert_close(pl.predict(posterior, batches, model=model).probs, probs)


def test_labels_stay_hidden_from_the_model() -> None:
    lora, _ = models.classifier()
    seen = []

    def model(labels: Tensor | None, **inputs: Tensor) -> None:
        seen.append(labels)
        logits = lora()(**inputs).logits
        if labels is not None:  # one that gives them away
            logits = logits + 9 * torch.eye(2)[labels]
        with pyro.plate("data", models.NUM_DATA, subsample=inputs["input_ids"]):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    batches, posterior = models.two_batches(), models.particles(lora, model)
    found = pl.predict(posterior, batches, model=model)
    # Runs of the first batch have them, which ask for no more than which argument
    # they are, and which of them count.
    assert all(x is None for x in seen[-1:])
    assert len([x for x in seen if x is not None]) <= 2
    probs, _ = models.averaged(lora, posterior.particles, batches)
    assert_close(found.probs, probs, rtol=0, atol=1e-10)


def test_without_labels_there_are_none() -> None:
    lora, model = models.classifier()
    batches = [networks.inputs(b) for b in models.two_batches()]
    assert (
        pl.predict(models.particles(lora, model), batches, model=model).labels is None
    )


def test_dropout_is_off_and_comes_back() -> None:
    lora, model = models.classifier(network=networks.bert(dropout=0.5))
    batches = models.two_batches()
    posterior = models.particles(lora, model)
    expected = pl.predict(posterior, batches, model=model).probs
    lora.network.train()
    training = {n: m.training for n, m in lora.network.named_modules()}
    assert_close(pl.predict(posterior, batches, model=model).probs, expected)
    assert {n: m.training for n, m in lora.network.named_modules()} == training


def test_nothing_is_trained_or_stored() -> None:
    lora, model = models.classifier()
    before = lora.weights()
    found = pl.predict(models.particles(lora, model), models.two_batches(), model=model)
    assert not found.log_probs.requires_grad
    assert all(p.grad is None for p in lora.network.parameters())
    assert all(torch.equal(x, before[s]) for s, x in lora.weights().items())
    assert len(pyro.get_param_store()) == 0


def test_parameters_of_the_model_leave_no_graph() -> None:
    lora, _ = models.classifier()

    def model(labels: Tensor | None = None, **inputs: Tensor) -> None:
        shift = pyro.param("shift", torch.ones(2, dtype=torch.float64))
        logits = lora()(**inputs).logits + shift
        with pyro.plate("data", models.NUM_DATA, subsample=inputs["input_ids"]):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    posterior = models.particles(lora, model)
    found = pl.predict(posterior, models.two_batches(), model=model)
    assert not found.log_probs.requires_grad


def test_batches_are_streamed() -> None:
    lora, model = models.classifier()
    alive: list[weakref.ref[Tensor]] = []

    def batches() -> Iterator[dict[str, Tensor]]:
        for _ in range(4):
            gc.collect()
            assert sum(ref() is not None for ref in alive[:-1]) == 0
            batch = networks.batch()
            alive.append(weakref.ref(batch["input_ids"]))
            yield batch
            del batch

    particles = models.particles(lora, model)
    with models.only_new_objects():
        assert len(pl.predict(particles, batches(), model=model)) == 20


def expected_sigmoid(mean: Tensor, sd: Tensor) -> Tensor:
    """By brute force: a million points of the noise."""
    z = torch.linspace(-12, 12, 1_000_001, dtype=torch.float64)
    density = (-0.5 * z**2).exp()
    return (
        torch.stack(
            [
                (density * (m + s * z).sigmoid()).sum()
                for m, s in zip(mean, sd, strict=True)
            ]
        )
        / density.sum()
    )


def test_linearized_integrates_over_gaussian_logits() -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    posterior = models.laplace(lora, model, batches)
    found = pl.predict(posterior, batches, model=model, method="linearized")
    p = []
    for batch in batches:
        logits = posterior.linearized(batch)
        mean = logits.mean[:, 1] - logits.mean[:, 0]
        c = logits.covariance_matrix
        variance = c[:, 0, 0] + c[:, 1, 1] - 2 * c[:, 0, 1]
        p.append(expected_sigmoid(mean.double(), variance.double().sqrt()))
    assert_close(found.probs[:, 1], torch.cat(p), rtol=1e-7, atol=0)
    assert (found.epistemic_entropy > 0).all()
    assert found.labels is not None


def test_an_integral_without_a_use_for_it_is_refused() -> None:
    lora, model = models.classifier()
    posterior = models.laplace(lora, model, models.two_batches())
    points = pl.ensemble(lora, [lora.weights()])
    for given, method in ((posterior, "sample"), (points, None)):
        with pytest.raises(ValueError, match="integral= is of the linearised"):
            pl.predict(
                given,
                models.two_batches(),
                model=model,
                method=method,
                integral=pl.integrals.probit,
            )


@pytest.mark.grid
@pytest.mark.parametrize(
    "integral", [pl.integrals.class_log_probs, pl.integrals.probit]
)
@pytest.mark.parametrize("num_labels", [2, 3])
def test_linearized_by_the_integral_of_choice(integral: Any, num_labels: int) -> None:
    lora, model = models.classifier(num_labels)
    batches = models.two_batches(num_labels)
    parts = [models.laplace(lora, model, batches)]
    parts.append(parts[0].with_prior_precision(50.0))
    mixture = pl.MixturePosterior(parts)
    found = pl.predict(
        mixture, batches, model=model, method="linearized", integral=integral
    )
    each = [
        torch.cat([integral(part.linearized(batch)).exp() for batch in batches])
        for part in parts
    ]
    assert_close(found.probs, sum(each) / 2, rtol=0, atol=1e-7)
    exact = pl.predict(mixture, batches, model=model, method="linearized")
    assert torch.equal(found.aleatoric_entropy, exact.aleatoric_entropy)


def test_linearized_works_without_grad_and_leaves_no_graph() -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    posterior = models.laplace(lora, model, batches)
    expected = pl.predict(posterior, batches, model=model, method="linearized")
    assert not expected.log_probs.requires_grad
    assert not expected.aleatoric_entropy.requires_grad
    with torch.no_grad():
        found = pl.predict(posterior, batches, model=model, method="linearized")
    assert torch.equal(found.log_probs, expected.log_probs)


def test_linearized_needs_no_labels() -> None:
    lora, model = models.classifier(3)
    batches = models.two_batches(3)
    posterior = models.laplace(lora, model, batches)
    with_labels = pl.predict(posterior, batches, model=model, method="linearized")
    bare = [networks.inputs(b) for b in batches]
    found = pl.predict(posterior, bare, model=model, method="linearized")
    assert torch.equal(found.log_probs, with_labels.log_probs)
    assert found.labels is None


def test_a_mixture_averages_its_components() -> None:
    lora, model = models.classifier(3)
    batches = models.two_batches(3)
    first = models.laplace(lora, model, batches)
    parts = [first, first.with_prior_precision(50.0), first.with_prior_precision(0.5)]
    pi = [0.5, 0.2, 0.3]
    mixture = pl.MixturePosterior(parts, pi)
    found = pl.predict(mixture, batches, model=model, method="linearized")
    each = [pl.predict(p, batches, model=model, method="linearized") for p in parts]
    probs = sum(w * p.probs for w, p in zip(pi, each, strict=True))
    aleatoric = sum(w * p.aleatoric_entropy for w, p in zip(pi, each, strict=True))
    assert_close(found.probs, probs, rtol=0, atol=1e-12)
    assert_close(found.aleatoric_entropy, aleatoric, rtol=0, atol=1e-12)
    nested = pl.MixturePosterior(
        [pl.MixturePosterior(parts[:2], pi[:2]), parts[2]], [7, 3]
    )
    again = pl.predict(nested, batches, model=model, method="linearized")
    assert_close(again.probs, probs, rtol=0, atol=1e-12)


def test_a_component_of_weight_zero_counts_for_nothing() -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    first = models.laplace(lora, model, batches)
    mixture = pl.MixturePosterior([first, first.with_prior_precision(50.0)], [1.0, 0.0])
    found = pl.predict(mixture, batches, model=model, method="linearized")
    alone = pl.predict(first, batches, model=model, method="linearized")
    assert_close(found.probs, alone.probs)


def test_linearized_refuses_what_has_no_gaussian() -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    posterior = models.particles(lora, model)
    guide = models.guide_over(lora.weights())
    for other, name in [
        (posterior, "ParticlePosterior"),
        (pl.MixturePosterior([posterior]), "ParticlePosterior"),
        (guide, "function"),
    ]:
        with pytest.raises(ValueError, match=f"found {name}. Use method='sample'"):
            pl.predict(other, batches, model=model, method="linearized")


def test_linearized_is_of_the_model_given() -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    posterior = models.laplace(lora, model, batches)
    expected = pl.predict(posterior, batches, model=model, method="linearized")
    loaded = replace(posterior, model=None)
    found = pl.predict(loaded, batches, model=model, method="linearized")
    assert torch.equal(found.log_probs, expected.log_probs)

    def halved(labels: Tensor | None = None, **inputs: Tensor) -> None:
        logits = lora()(**inputs).logits / 2
        with pyro.plate("data", models.NUM_DATA, subsample=inputs["input_ids"]):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    changed = pl.predict(posterior, batches, model=halved, method="linearized")
    direct = replace(posterior, model=halved).linearized(batches[0])
    assert_close(
        changed.log_probs[: len(direct.mean)],
        pl.integrals.class_log_probs(direct).log_softmax(-1),
    )


def test_linearized_refuses_another_site() -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    posterior = models.laplace(lora, model, batches)
    with pytest.raises(ValueError, match=r"'z', but the posterior was made for.*'y'"):
        pl.predict(posterior, batches, model=model, method="linearized", obs_site="z")


def test_arguments_are_checked() -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    posterior = models.particles(lora, model)
    with pytest.raises(ValueError, match="'sample', 'linearized' or None, found 'glm'"):
        pl.predict(posterior, batches, model=model, method="glm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"found a dict. Put a single batch"):
        pl.predict(posterior, batches[0], model=model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no batches"):
        pl.predict(posterior, [], model=model)
    with pytest.raises(ValueError, match="num_samples"):
        pl.predict(posterior, batches, model=model, num_samples=0)
    with pytest.raises(ValueError, match="no site 'z'"):
        pl.predict(posterior, batches, model=model, obs_site="z")
    mixed = [batches[0], networks.inputs(batches[1])]
    with pytest.raises(ValueError, match="Batch 1 has no 'labels'"):
        pl.predict(posterior, mixed, model=model)


@pytest.mark.parametrize(
    ("likelihood", "message"),
    [
        (
            lambda x: dist.Cauchy(x[..., 0], 1.0),
            "Nothing is known of the likelihood Cauchy",
        ),
        (
            lambda x: dist.Bernoulli(logits=x).to_event(1),
            r"real numbers of shape \(5, 2\), one for each datum, found \(5,\)",
        ),
        (
            lambda x: dist.OneHotCategorical(logits=x[..., None, :]).to_event(1),
            r"'y' has 2 event dims",
        ),
    ],
)
def test_other_likelihoods_are_refused(likelihood: Any, message: str) -> None:
    lora, _ = models.classifier()

    def model(labels: Tensor | None = None, **inputs: Tensor) -> None:
        logits = lora()(**inputs).logits
        with pyro.plate("data", models.NUM_DATA, subsample=inputs["input_ids"]):
            pyro.sample("y", likelihood(logits))

    with pytest.raises((TypeError, ValueError), match=message):
        pl.predict(models.particles(lora, model), [networks.batch()], model=model)


def test_token_likelihoods_without_events_are_refused() -> None:
    lora, _ = models.classifier()

    def model(labels: Tensor | None = None, **inputs: Tensor) -> None:
        logits = lora()(**inputs).logits
        with (
            pyro.plate("data", models.NUM_DATA, subsample=inputs["input_ids"], dim=-2),
            pyro.plate("tokens", 2, dim=-1),
        ):
            pyro.sample("y", dist.Bernoulli(logits=logits))

    with pytest.raises(ValueError, match=r"'y' has batch shape \(5, 2\).*to_event"):
        pl.predict(models.particles(lora, model), [networks.batch()], model=model)


def test_wrong_indexing_of_many_draws_is_found() -> None:
    lora, _ = models.classifier()

    def model(labels: Tensor | None = None, **inputs: Tensor) -> None:
        logits = lora()(**inputs).logits[:, :1, None].squeeze()  # of one draw only
        pyro.sample("y", dist.Bernoulli(logits=logits))

    with pytest.raises(ValueError, match="Index the network's outputs from the right"):
        pl.predict(models.particles(lora, model), [networks.batch()], model=model)


def test_a_site_that_the_posterior_lacks_is_named() -> None:
    lora, model = models.classifier()
    some = {"head.classifier.bias": lora.weights()["head.classifier.bias"]}
    guide = models.guide_over(some)
    with pytest.raises(ValueError, match=r"'lora\.bert.*isn't among those"):
        pl.predict(guide, models.two_batches(), model=model, obs_site="y")


def test_local_latent_variables_are_refused() -> None:
    lora, _ = models.classifier()

    def model(labels: Tensor | None = None, **inputs: Tensor) -> None:
        logits = lora()(**inputs).logits
        with pyro.plate("data", models.NUM_DATA, subsample=inputs["input_ids"]):
            noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Bernoulli(logits=logits[..., 0] + noise))

    def guide(labels: Tensor, **inputs: Tensor) -> None:
        models.guide_over(lora.weights())()
        with pyro.plate("data", models.NUM_DATA, subsample=inputs["input_ids"]):
            pyro.sample("noise", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="'noise' is inside the plate 'data'"):
        pl.predict(
            guide, models.two_batches(), model=model, num_samples=2, obs_site="y"
        )


@pytest.mark.gpu
def test_on_a_gpu_with_labels_on_the_cpu() -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    posterior = models.particles(lora, model)
    expected = pl.predict(posterior, batches, model=model)
    lora.network.cuda()
    weights = {s: x.cuda() for s, x in posterior.particles.items()}
    posterior = pl.ParticlePosterior(weights, (lora,), model, "y")
    moved = [
        {n: x if n == "labels" else x.cuda() for n, x in b.items()} for b in batches
    ]
    found = pl.predict(posterior, moved, model=model)
    assert found.log_probs.is_cuda
    assert_close(found.probs.cpu(), expected.probs)
    assert found.metrics() == pytest.approx(expected.metrics(), abs=1e-6)
