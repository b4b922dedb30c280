"""What AutoLaplace refuses, and what it says then."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor, nn

import pyro_lora as pl
from tests.curvature.gauss_newton import laplace, split
from tests.networks import batch, bert, classifier, inputs

pytestmark = pytest.mark.untrained

Model = Callable[..., Any]


@pytest.fixture
def lora() -> pl.LiftedNetwork:
    return pl.lift(bert(3))


@pytest.fixture
def texts() -> dict[str, Tensor]:
    return batch(7, num_labels=3)


def guide(lora: pl.LiftedNetwork, model: Model | None = None, **options: Any) -> Any:
    model = pl.models.classification(lora, 7) if model is None else model
    return pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter(), **options)


def trained(lora: pl.LiftedNetwork, texts: dict[str, Tensor]) -> Any:
    """A guide after a step of SVI."""
    model = pl.models.classification(lora, 7)
    found = guide(lora, model)
    SVI(model, found, Adam({"lr": 1e-3}), Trace_ELBO()).step(**texts)
    return found


@pytest.mark.parametrize("after_svi", [False, True])
@pytest.mark.parametrize("missing", ["none", "left out", "in a later batch"])
def test_missing_labels(
    lora: pl.LiftedNetwork, texts: dict[str, Tensor], missing: str, after_svi: bool
) -> None:
    batches: list[dict[str, Any]] = list(split(texts, 3))
    for one in batches[1:] if missing == "in a later batch" else batches:
        one["labels"] = None
        if missing == "left out":
            del one["labels"]
    start = trained(lora, texts) if after_svi else guide(lora)
    later = r"Batch 1 has no 'labels', other than the first.*same arguments"
    nothing = r"observed nothing.*Put labels into the ba"
    message = later if missing == "in a later batch" else nothing
    with pytest.raises(ValueError, match=message):
        start.laplace_approximation(batches)


FAULTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    r"arguments \['token_type_ids'\]: the model takes": lambda texts: {
        **texts,
        "token_type_ids": torch.zeros_like(texts["input_ids"]),
    },
    r"arguments \['attention_mask'\] are missing": lambda texts: {
        name: x for name, x in texts.items() if name != "attention_mask"
    },
    "token 50 is outside of": lambda texts: {
        **texts,
        "input_ids": torch.full_like(texts["input_ids"], 50),
    },
    "are more than the network's 32 positions": lambda texts: {
        **texts,
        "input_ids": texts["input_ids"][:, :1].expand(-1, 33),
        "attention_mask": texts["attention_mask"][:, :1].expand(-1, 33),
    },
}


@pytest.mark.parametrize("words", FAULTS)
def test_the_first_step_of_svi_names_the_fault_as_the_fit_does(
    lora: pl.LiftedNetwork, texts: dict[str, Tensor], words: str
) -> None:
    model, bad = classifier(lora, 7), FAULTS[words](texts)
    said = []
    svi = SVI(model, guide(lora, model), Adam({"lr": 1e-3}), Trace_ELBO())
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("The batch, ", lambda: svi.step(**bad)),
        ("Batch 0, ", lambda: guide(lora, model).laplace_approximation([bad])),
    ]
    for place, call in calls:
        with pytest.raises(ValueError, match=words) as caught:
            call()
        first, *_ = str(caught.value).split("Trace Shapes:")  # which Pyro adds
        said.append(first.strip().removeprefix(place))
    assert said[0] == said[1]


@pytest.mark.parametrize("after_svi", [False, True])
@pytest.mark.parametrize("chosen", [[0], [0, 0, 1], [0, 1, 2, 0]])
def test_batches_that_do_not_cover_the_data_once(
    lora: pl.LiftedNetwork,
    texts: dict[str, Tensor],
    chosen: list[int],
    after_svi: bool,
) -> None:
    batches = split(texts, 3)
    seen = sum(len(batches[i]["labels"]) for i in chosen)
    start = trained(lora, texts) if after_svi else guide(lora)
    with pytest.raises(ValueError, match=rf"hold {seen} data.*'y' says 7.*every datum"):
        start.laplace_approximation([batches[i] for i in chosen])


@pytest.mark.parametrize("after_svi", [False, True])
def test_no_batches(
    lora: pl.LiftedNetwork, texts: dict[str, Tensor], after_svi: bool
) -> None:
    start = trained(lora, texts) if after_svi else guide(lora)
    with pytest.raises(ValueError, match=r"no batches.*re-iterable"):
        start.laplace_approximation([])


def test_batches_that_can_be_read_once(
    lora: pl.LiftedNetwork, texts: dict[str, Tensor]
) -> None:
    with pytest.raises(ValueError, match=r"iterator.*Give a list or a DataLoader"):
        guide(lora).laplace_approximation(iter(split(texts, 3)))


def test_tuning_with_batches_that_can_be_read_once(
    lora: pl.LiftedNetwork, texts: dict[str, Tensor]
) -> None:
    posterior = laplace(lora, texts)
    message = r"iterator.*takes passes\. Give a list or a DataLoader"
    with pytest.raises(ValueError, match=message):
        posterior.optimize_prior(
            objective="nll", per="site", batches=iter(split(texts, 3))
        )
    # One precision takes one pass.
    one = posterior.optimize_prior(objective="nll", batches=iter(split(texts, 3)))
    again = posterior.optimize_prior(objective="nll", batches=split(texts, 3))
    assert torch.equal(one.log_evidence(), again.log_evidence())


def test_latents_with_batches_that_can_be_read_once(
    lora: pl.LiftedNetwork, texts: dict[str, Tensor]
) -> None:
    def init(site: dict[str, Any]) -> Tensor:
        start = {**lora.weights(), "temperature": torch.tensor(1.0)}
        return start[site["name"]]

    start = pl.AutoLaplace(with_temperature(lora), init_loc_fn=init)
    expected = start.laplace_approximation(split(texts, 3))  # this sets the guide up
    with pytest.raises(ValueError, match=r"\['temperature'\] take a pass of their own"):
        start.laplace_approximation(iter(split(texts, 3)))
    again = start.laplace_approximation(split(texts, 3))
    assert torch.equal(again.log_evidence(), expected.log_evidence())


@pytest.mark.parametrize("after_svi", [False, True])
@pytest.mark.parametrize("index", [0, 2])
def test_an_empty_batch(
    lora: pl.LiftedNetwork, texts: dict[str, Tensor], index: int, after_svi: bool
) -> None:
    batches = split(texts, 3)
    batches.insert(index, {name: x[:0] for name, x in texts.items()})
    start = trained(lora, texts) if after_svi else guide(lora)
    with pytest.raises(ValueError, match=rf"Batch {index} is empty.*Leave it out"):
        start.laplace_approximation(batches)
    posterior = laplace(lora, texts)
    with pytest.raises(ValueError, match=rf"Batch {index} is empty"):
        posterior.optimize_prior(objective="nll", batches=batches)
    with pytest.raises(ValueError, match="is empty"):
        posterior.linearized(batches[index])


def test_a_mode_with_nan(lora: pl.LiftedNetwork, texts: dict[str, Tensor]) -> None:
    start = trained(lora, texts)
    site = list(lora.sites)[1]
    with torch.no_grad():
        pyro.param(f"AutoLaplace.{site}").flatten()[3] = math.nan
    with pytest.raises(ValueError, match=rf"{site}.*NaN.*smaller learning rate"):
        start.laplace_approximation([texts])


@pytest.mark.parametrize("index", [0, 2])
def test_nan_in_a_batch(
    lora: pl.LiftedNetwork, texts: dict[str, Tensor], index: int
) -> None:
    def model(factor: Tensor, labels: Tensor | None = None, **texts: Tensor) -> Tensor:
        logits = lora()(**texts).logits * factor
        with pyro.plate("data", 7, subsample=logits):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    batches = [{**one, "factor": torch.tensor(1.0)} for one in split(texts, 3)]
    batches[index]["factor"] = torch.tensor(math.nan)
    with pytest.raises(ValueError, match=rf"Batch {index}, .*'factor'(.|\n)*'y'"):
        guide(lora, model).laplace_approximation(batches)
    with pyro.validation_enabled(False):  # then Pyro leaves it to us
        with pytest.raises(ValueError, match=rf"Batch {index}: .*'y' is NaN.*inputs"):
            guide(lora, model).laplace_approximation(batches)


def test_a_gradient_with_nan(lora: pl.LiftedNetwork, texts: dict[str, Tensor]) -> None:
    def model(labels: Tensor | None = None, **texts: Tensor) -> Tensor:
        logits = lora()(**texts).logits
        # The square root has no slope at zero, though its value is fine.
        logits = logits + (logits - logits).sqrt().nan_to_num()
        with pyro.plate("data", 7, subsample=logits):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    with pytest.raises(ValueError, match=r"Batch 0: the gradient of site '(lora|head)"):
        guide(lora, model).laplace_approximation(split(texts, 3))


def test_labels_outside_of_the_classes(
    lora: pl.LiftedNetwork, texts: dict[str, Tensor]
) -> None:
    texts["labels"][4] = 3
    with pytest.raises(
        ValueError, match=r"Batch 1, site 'y': .* 3 .*support.*classes 0 to 2.*labels"
    ):
        guide(lora).laplace_approximation(split(texts, 3))


def test_a_label_of_probability_zero(
    lora: pl.LiftedNetwork, texts: dict[str, Tensor]
) -> None:
    def model(labels: Tensor | None = None, **texts: Tensor) -> Tensor:
        logits = lora()(**texts).logits
        logits = torch.cat(
            [logits[:, :2], torch.full_like(logits[:, :1], -math.inf)], 1
        )
        with pyro.plate("data", 7, subsample=logits):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    texts["labels"] = torch.tensor([0, 1, 0, 1, 2, 1, 0])
    with pytest.raises(ValueError, match=r"Batch 1: the log likelihood.*infinite"):
        guide(lora, model).laplace_approximation(split(texts, 3))


def test_a_model_without_a_lifted_network(texts: dict[str, Tensor]) -> None:
    def model(labels: Tensor | None = None, **texts: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", 7, subsample=labels):
            pyro.sample("y", dist.Categorical(logits=w.expand(7, 3)), obs=labels)

    start = pl.AutoLaplace(model, init_loc_fn=lambda site: site["fn"].sample())
    with pytest.raises(ValueError, match=r"no lifted network.*pyro_lora.lift"):
        start.laplace_approximation([texts])


def test_a_likelihood_that_ignores_the_network(
    lora: pl.LiftedNetwork, texts: dict[str, Tensor]
) -> None:
    def model(labels: Tensor | None = None, **texts: Tensor) -> Tensor:
        logits = lora()(**texts).logits.detach()
        with pyro.plate("data", 7, subsample=logits):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    with pytest.raises(ValueError, match=r"'y' doesn't depend.*without torch.no_grad"):
        guide(lora, model).laplace_approximation([texts])


def with_temperature(lora: pl.LiftedNetwork) -> Model:
    def model(labels: Tensor | None = None, **texts: Tensor) -> Tensor:
        temperature = pyro.sample("temperature", dist.LogNormal(0.0, 1.0))
        logits = lora()(**texts).logits / temperature
        with pyro.plate("data", 7, subsample=logits):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    return model


@pytest.mark.parametrize("first", [False, True])
def test_a_latent_site_in_some_batches(
    lora: pl.LiftedNetwork, texts: dict[str, Tensor], first: bool
) -> None:
    def model(hot: bool, labels: Tensor | None = None, **texts: Tensor) -> Tensor:
        logits = lora()(**texts).logits
        if hot:
            logits = logits / pyro.sample("temperature", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", 7, subsample=logits):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    batches = [
        {**one, "hot": (i == 0) == first} for i, one in enumerate(split(texts, 4))
    ]
    message = "Batch 1: .*'temperature'" if first else "'temperature'.*some batches"
    with pytest.raises(ValueError, match=message):
        guide(lora, model).laplace_approximation(batches)


def test_the_remedy_for_a_latent_site(
    lora: pl.LiftedNetwork, texts: dict[str, Tensor]
) -> None:
    model = poutine.condition(
        with_temperature(lora), {"temperature": torch.tensor(1.0)}
    )
    start = guide(lora, model)
    with pytest.raises(ValueError, match=r"\['temperature', 'y'\]. Name.*obs_site="):
        start.laplace_approximation(split(texts, 3))
    posterior = guide(lora, model, obs_site="y").laplace_approximation(split(texts, 3))
    expected = laplace(lora, texts, 3)
    assert float(posterior.log_evidence()) == pytest.approx(
        float(expected.log_evidence())
    )
    assert posterior.obs_site == "y"


def two_sites(lora: pl.LiftedNetwork) -> Model:
    def model(labels: Tensor, score: Tensor, **texts: Tensor) -> None:
        logits = lora()(**texts).logits
        with pyro.plate("data", 7, subsample=logits):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)
            pyro.sample("score", dist.Normal(logits[:, 0], 1.0), obs=score)

    return model


def test_two_observed_sites(lora: pl.LiftedNetwork, texts: dict[str, Tensor]) -> None:
    texts["score"] = torch.randn(7, dtype=torch.float64)
    model = two_sites(lora)
    with pytest.raises(ValueError, match=r"2 observed sites, .*obs_site="):
        guide(lora, model).laplace_approximation([texts])
    with pytest.raises(ValueError, match=r"'z' isn't observed.*'score', 'y'"):
        guide(lora, model, obs_site="z").laplace_approximation([texts])
    with pytest.warns(UserWarning, match=r"observes \['y'\], too"):
        posterior = guide(lora, model, obs_site="score").laplace_approximation([texts])
    assert posterior.linearized(texts).mean.shape == (7, 1)


def test_an_unknown_fisher(lora: pl.LiftedNetwork) -> None:
    with pytest.raises(ValueError, match=r"'exact', 'mc' or 'empirical'.*'kfac'"):
        guide(lora, fisher="kfac")
    with pytest.raises(ValueError, match=r"num_fisher_samples .* at least 1, found 0"):
        guide(lora, fisher="mc", num_fisher_samples=0)


def weibull(lora: pl.LiftedNetwork) -> Model:
    def model(labels: Tensor, **texts: Tensor) -> Tensor:
        rate = lora()(**texts).logits[:, 0].exp()
        with pyro.plate("data", 7, subsample=rate):
            return pyro.sample("y", dist.Weibull(rate, 1.0), obs=1 + labels.double())

    return model


def test_a_likelihood_without_exact_fisher(
    lora: pl.LiftedNetwork, texts: dict[str, Tensor]
) -> None:
    with pytest.raises(TypeError, match=r"Weibull.*fisher='mc'"):
        guide(lora, weibull(lora)).laplace_approximation([texts])
    start = guide(lora, weibull(lora), fisher="mc", num_fisher_samples=3)
    posterior = start.laplace_approximation(split(texts, 3))
    assert float(posterior.gaussian.effective_parameters()) > 0.1
    with pytest.raises(TypeError, match="Nothing is known of the likelihood Weibull"):
        posterior.linearized(texts)


def prior_of(fn: Callable[[Tensor], Any]) -> Any:
    def prior(lora: pl.LiftedNetwork) -> dict[str, Tensor]:
        return {
            site: pyro.sample(site, fn(zeros).to_event(zeros.ndim))
            for site, zeros in lora.zeros().items()
        }

    return prior


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda z: dist.Normal(z, z + 1e30), r"must be positive.*found values from 0"),
        (lambda z: dist.ImproperUniform(dist.constraints.real, z.shape, ()), "proper"),
        (lambda z: dist.Gumbel(z, z + 1.0), "Gumbel, not symmetric.*register"),
        (lambda z: dist.AsymmetricLaplace(z, z + 1, z + 2), "Asym.*register"),
    ],
)
def test_priors_that_are_improper_or_have_no_gaussian_form(
    texts: dict[str, Tensor], fn: Any, message: str
) -> None:
    lora = pl.lift(bert(3, dtype=torch.float32), prior=prior_of(fn))
    with pytest.raises(ValueError, match=rf"Site 'lora.*{message}"):
        laplace(lora, texts)


def test_a_prior_that_is_masked(texts: dict[str, Tensor]) -> None:
    normal = prior_of(lambda zeros: dist.Normal(zeros, zeros + 1))
    lora = pl.lift(bert(3), prior=poutine.mask(normal, mask=False))
    with pytest.raises(ValueError, match=r"Site 'lora.*Use a proper prior"):
        laplace(lora, texts)


def test_without_a_model(lora: pl.LiftedNetwork, texts: dict[str, Tensor]) -> None:
    posterior = replace(laplace(lora, texts), model=None)
    assert torch.isfinite(posterior.optimize_prior().log_evidence())
    with pytest.raises(ValueError, match=r"linearized needs the model.*model=model"):
        posterior.linearized(inputs(texts))
    with pytest.raises(ValueError, match=r"nll.*needs the model.*model=model"):
        posterior.optimize_prior(objective="nll", batches=[texts])


@pytest.mark.parametrize("structure", [pl.structures.KFAC(), pl.structures.Dense()])
def test_layers_that_have_no_curvature_here(
    structure: Any, texts: dict[str, Tensor]
) -> None:
    lora = pl.lift(bert(3, use_dora=True))
    message = (
        r"'lora\.bert.*query\.(A|magnitude)'.*nn\.Linear layers.*"
        r"peft\.tuners\.lora\.layer\.Linear computes with '.*'\. Use SVGD"
    )
    fit = guide(lora, structure=structure).laplace_approximation
    with pytest.raises(ValueError, match=message) as raised:
        fit([texts])
    assert "batch 0" not in str(raised.value)


def test_layers_that_share_a_weight() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    network[2].weight = network[0].weight
    lora = pl.lift(network)

    def model(x: Tensor, labels: Tensor | None = None) -> None:
        with pyro.plate("data", 3, subsample=x):
            pyro.sample("y", dist.Categorical(logits=lora()(x)), obs=labels)

    fit = pl.AutoLaplace(
        model, init_loc_fn=lora.init_to_adapter()
    ).laplace_approximation
    with pytest.raises(
        ValueError, match=r"2 modules of .*Sequential share '0\.weight'"
    ):
        fit([{"x": torch.randn(3, 4), "labels": torch.zeros(3).long()}])


@pytest.mark.untrained
def test_an_observed_site_that_is_left_out_is_named() -> None:
    """Alone, conditioned on, named, or behind an ``obs_mask``, none is."""
    lora = pl.lift(nn.Linear(3, 4).double())
    x, y = torch.randn(6, 3).double(), torch.randn(6).double()
    c = torch.randint(3, (6,))

    def model(x: Tensor, y: Tensor, c: Tensor | None = None) -> None:
        noise = pyro.sample("noise", dist.LogNormal(x.new_zeros(()), 1.0))
        f = lora()(x)
        with pyro.plate("data", 6, subsample=x):
            seen = torch.ones(len(x), dtype=torch.bool)
            pyro.sample("y", dist.Normal(f[..., 0], noise), obs=y, obs_mask=seen)
            if c is not None:
                pyro.sample("c", dist.Categorical(logits=f[..., 1:]), obs=c)

    conditioned = poutine.condition(model, {"noise": x.new_ones(())})

    def fit(obs_site: Any, *names: str) -> pl.LaplacePosterior:
        whole = {"x": x, "y": y, "c": c}
        batches = [{name: whole[name] for name in names}]
        init = lora.init_to_adapter()
        guide = pl.AutoLaplace(conditioned, init_loc_fn=init, obs_site=obs_site)
        return guide.laplace_approximation(batches)

    alone = fit("y", "x", "y")
    fit(("y", "c"), "x", "y", "c")
    with pytest.warns(UserWarning, match=r"observes \['c'\], too.*'y_obs") as caught:
        found = fit("y", "x", "y", "c")
    assert sum("observes" in str(warning.message) for warning in caught) == 1
    assert float(found.log_evidence()) == float(alone.log_evidence())
