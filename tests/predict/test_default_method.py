"""Each posterior knows its way of predicting."""

import warnings
from functools import cache
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch import Tensor, nn
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora.diagnose.diagnosis import Confidence
from tests import networks
from tests.predict import models


@cache
def posteriors() -> tuple[Any, list[dict[str, Tensor]], dict[str, tuple[Any, str]]]:
    """Of one model, with the method that is each one's own; the same for all tests."""
    lora, model = models.classifier()
    batches = models.two_batches()
    laplace = models.laplace(lora, model, batches)
    particles = models.particles(lora, model)
    auto = AutoNormal(model, init_loc_fn=lora.init_to_adapter(), init_scale=0.01)
    auto(**batches[0])
    kinds = {
        "laplace": (laplace, "linearized"),
        "mixture": (pl.MixturePosterior([laplace, laplace]), "linearized"),
        "nested": (
            pl.MixturePosterior([pl.MixturePosterior([laplace]), laplace]),
            "linearized",
        ),
        "half": (pl.MixturePosterior([laplace, particles]), "sample"),
        "particles": (particles, "sample"),
        "ensemble": (pl.ensemble(lora, [laplace.mode()], model=model), "sample"),
        "stock": (auto, "sample"),
        "function": (models.guide_over(lora.weights()), "sample"),
    }
    return model, batches, kinds


KINDS = ["laplace", "mixture", "nested", "half", "particles", "ensemble"]


@pytest.mark.grid
@pytest.mark.parametrize("kind", [*KINDS, "stock", "function"])
@pytest.mark.parametrize("num_samples", [None, 3])
@pytest.mark.few(4)
def test_the_default_is_the_posteriors_own(kind: str, num_samples: int | None) -> None:
    model, batches, kinds = posteriors()
    posterior, method = kinds[kind]
    if kind in KINDS:
        total = sum(weight for weight, _ in posterior.gaussians())
        assert (total == pytest.approx(1.0)) == (method == "linearized")

    def predicted(**options: Any) -> pl.Prediction:
        pyro.set_rng_seed(5)
        return pl.predict(
            posterior, batches, model=model, num_samples=num_samples, **options
        )

    expected = predicted(method=method)
    assert torch.equal(predicted().log_probs, expected.log_probs)
    assert torch.equal(predicted().aleatoric_entropy, expected.aleatoric_entropy)


def test_dropout_goes_by_draws() -> None:
    lora, model = models.classifier(network=networks.bert(dropout=0.3))
    posterior = pl.mc_dropout(lora)
    batches = models.two_batches()
    found = []
    for options in ({}, {"method": "sample"}):
        pyro.set_rng_seed(5)
        found.append(
            pl.predict(posterior, batches, model=model, num_samples=3, **options)
        )
    assert torch.equal(found[0].log_probs, found[1].log_probs)


@pytest.mark.parametrize("kind", ["laplace", "mixture", "nested", "half", "particles"])
def test_a_tree_and_a_diagnosis_follow_the_same_rule(kind: str) -> None:
    model, batches, kinds = posteriors()
    posterior, method = kinds[kind]
    with warnings.catch_warnings():
        warnings.filterwarnings("error")
        tree = pl.to_datatree(posterior, model=model, batches=batches, num_samples=4)
    assert tree["log_likelihood"].attrs["method"] == method
    if kind in ("laplace", "mixture"):
        held_out = pl.predict(posterior, batches, model=model, method="linearized")
        found = pl.diagnose(posterior, batches, model=model).confidence
        assert isinstance(found, Confidence)
        assert found.overconfidence == held_out.metrics()["overconfidence"]


def test_what_can_not_be_linearised_goes_by_draws_and_says_so() -> None:
    lora = pl.lift(nn.Linear(3, 1).double())

    def model(x: Tensor, labels: Tensor | None = None) -> None:
        loc = lora()(x)[..., 0]
        with pyro.plate("data", 8, subsample=x):
            pyro.sample("y", dist.Cauchy(loc, 0.5), obs=labels)

    batches = [{"x": torch.randn(8, 3).double(), "labels": torch.zeros(8).double()}]
    guide = pl.AutoLaplace(
        model,
        init_loc_fn=lora.init_to_adapter(),
        structure=pl.structures.Dense(),
        fisher="mc",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The weights aren't a mode")
        posterior = guide.laplace_approximation(batches)
    said = "Cauchy isn't among pyro_lora.likelihoods"
    with pytest.warns(UserWarning, match=said):
        tree = pl.to_datatree(posterior, batches=batches, num_samples=4)
    assert tree["log_likelihood"].attrs["method"] == "sample"
    pl.to_datatree(posterior, batches=batches, num_samples=4, method="sample")


def test_latents_beside_the_weights_in_a_tree_go_by_draws_and_say_so() -> None:
    lora = pl.lift(networks.bert(1))
    model = pl.models.regression(lora, 8)
    texts = networks.batch(8)
    texts["labels"] = torch.randn(8).double()
    posterior = models.laplace(lora, model, [texts])
    with pytest.warns(UserWarning, match="latent sites besides the weights"):
        tree = pl.to_datatree(posterior, batches=[texts], num_samples=3)
    assert tree["log_likelihood"].attrs["method"] == "sample"
    pl.to_datatree(posterior, batches=[texts], num_samples=3, method="sample")


def test_draws_that_are_kept_are_of_one_batch() -> None:
    model, batches, kinds = posteriors()
    laplace, _ = kinds["laplace"]
    with pytest.raises(ValueError, match=r"second batch.*method='sample'"):
        pl.predict(laplace, batches, model=model, keep_draws=True)
    whole = models.resized(batches, 10)
    found = pl.predict(laplace, whole, model=model, keep_draws=True, num_samples=5)
    assert found.draw_log_probs is not None
    assert found.draw_log_probs.shape == (5, 10, 2)
    exact = pl.predict(laplace, whole, model=model, method="linearized")
    assert_close(found.log_probs, exact.log_probs, rtol=0, atol=1e-10)


# Draws of a Gaussian that lead the network astray


class Product(nn.Module):
    """Logits (0, b tanh(a x)), a network whose weights multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8, bias=False), nn.Linear(8, 1, bias=False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x).tanh())
        return out[..., 0]


NUM = 200


def trained(num_outputs: str = "classes") -> tuple[Any, Any, dict[str, Tensor]]:
    """A network near its data, and the Pyro model of it."""
    network = Product()
    x = torch.randn(NUM, 4).double()
    y = (x[:, 0] > 0).long() if num_outputs == "classes" else x[:, 0]
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        f = network(x)
        loss = (
            nn.functional.binary_cross_entropy_with_logits(f, y.double())
            if num_outputs == "classes"
            else (f - y).square().mean()
        )
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    lora = pl.lift(network)

    def model(x: Tensor, labels: Tensor | None = None) -> None:
        f = lora()(x)
        with pyro.plate("data", NUM, subsample=x):
            if num_outputs == "classes":
                logits = torch.stack([torch.zeros_like(f), f], -1)
                pyro.sample("y", dist.Categorical(logits=logits), obs=labels)
            else:
                pyro.sample("y", dist.Normal(f, 0.1), obs=labels)

    return lora, model, {"x": x, "labels": y}


@pytest.mark.parametrize("kind", ["classes", "reals"])
@pytest.mark.parametrize("labelled", [True, False])
def test_draws_far_worse_than_the_mode_are_told(kind: str, labelled: bool) -> None:
    lora, model, data = trained(kind)
    # Along many directions the data say nothing, and the prior says next to nothing.
    wide = models.laplace(
        lora, model, [data], pl.structures.Dense()
    ).with_prior_precision(1e-4)
    shown = [{k: v[:100] for k, v in data.items() if labelled or k == "x"}] * 2
    pyro.set_rng_seed(0)
    with pytest.warns(UserWarning, match=r"draws of a Gaussian.*'linearized'") as told:
        found = pl.predict(wide, shown, model=model, method="sample")
    if labelled:
        mode = pl.predict(pl.ensemble(lora, [wide.mode()]), shown, model=model)
        for name in {"classes": ["accuracy", "nll"], "reals": ["rmse"]}[kind]:
            for one in (found, mode):
                number = one.metrics()[name]
                form = f"{number:.3f}" if kind == "classes" else f"{number:.3g}"
                assert form in str(told[0].message)


@pytest.mark.grid
@pytest.mark.parametrize("kind", ["classes", "reals"])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("sites", [None, "last_layer"])
def test_good_draws_pass_without_a_word(kind: str, labelled: bool, sites: Any) -> None:
    lora, model, data = trained(kind)
    guide = pl.AutoLaplace(
        model,
        init_loc_fn=lora.init_to_adapter(),
        structure=pl.structures.Dense(),
        sites=sites,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The weights aren't a mode")
        good = guide.laplace_approximation([data])
    # In the last layer's weights the network is linear; in all of them it is nearby.
    good = good.optimize_prior() if sites else good.with_prior_precision(1e4)
    shown = {k: v for k, v in data.items() if labelled or k == "x"}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        pl.predict(good, [shown], model=model, method="sample")
    assert not told


@pytest.mark.grid
@pytest.mark.parametrize("kind", ["laplace", "svgd", "mixture"])
@pytest.mark.parametrize("name", ["attention_mask", "token_type_ids"])
@pytest.mark.parametrize("fitted_with", [True, False])
def test_other_inputs_than_the_fits_are_said(
    kind: str, name: str, fitted_with: bool
) -> None:
    lora, _ = models.classifier()

    def model(labels: Any = None, **inputs: Any) -> None:
        logits = lora()(**inputs).logits
        with pyro.plate("data", models.NUM_DATA, subsample=inputs["input_ids"]):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    having = [
        {**b, "token_type_ids": torch.zeros_like(b["input_ids"])}
        for b in models.two_batches()
    ]
    lacking = [{k: x for k, x in b.items() if k != name} for b in having]
    fitted, shown = (having, lacking) if fitted_with else (lacking, having)
    if kind == "svgd":
        svgd = pl.SVGD(
            model,
            pl.kernels.RBF(),
            Adam({"lr": 1e-3}),
            2,
            init_loc_fn=lora.init_to_adapter(jitter=0.1),
        )
        svgd.run(fitted, num_epochs=1, progress_bar=False)
        posterior: Any = svgd.posterior()
    else:
        posterior = models.laplace(lora, model, fitted).with_prior_precision(1e4)
        if kind == "mixture":
            posterior = pl.MixturePosterior([posterior, posterior])
    pl.predict(posterior, fitted)  # without a word
    unlabelled = [{k: x for k, x in b.items() if k != "labels"} for b in fitted]
    pl.predict(posterior, unlabelled)
    has = f"has {'no' if fitted_with else 'a'} '{name}' for the network"
    with pytest.warns(UserWarning, match=has):
        pl.predict(posterior, shown)
