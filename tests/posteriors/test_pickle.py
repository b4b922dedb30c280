"""What is pickled, or deep-copied, is the same and has a network of its own."""

import copy
import functools
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pyro
import pyro.optim
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora.posteriors.dropout import DropoutPosterior
from tests.networks import batch, bert, inputs, llama

NUM_DATA = 5
pytestmark = pytest.mark.untrained


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


copied = pytest.mark.parametrize("copied", [pickled, copy.deepcopy])
Copied = Callable[[Any], Any]


def small(**settings: Any) -> pl.LiftedNetwork:
    return pl.lift(bert(num_layers=1, **settings))


def laplace(**settings: Any) -> pl.LaplacePosterior:
    lora = small()
    model = pl.models.classification(lora, NUM_DATA)
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter(), **settings)
    return guide.laplace_approximation([batch()])


def particles() -> pl.ParticlePosterior:
    lora = small()
    values = {s: torch.stack([x, 2 * x]) for s, x in lora.weights().items()}
    model = pl.models.classification(lora, NUM_DATA)
    return pl.ParticlePosterior(values, (lora,), model, None)


def mixture() -> pl.MixturePosterior:
    posterior = laplace()
    return pl.MixturePosterior([posterior, posterior.with_prior_precision(9.0)])


def dropout() -> DropoutPosterior:
    return pl.mc_dropout(small(dropout=0.1))


def model_of(posterior: Any) -> Any:
    (lora,) = getattr(posterior, "components", (posterior,))[0].networks
    return pl.models.classification(lora, NUM_DATA)


def predict(posterior: Any, texts: dict[str, Tensor]) -> Tensor:
    kind = getattr(posterior, "components", (posterior,))[0]
    linear = isinstance(kind, pl.LaplacePosterior)
    pyro.set_rng_seed(0)
    prediction = pl.predict(
        posterior,
        [texts],
        model=model_of(posterior),
        num_samples=None if linear else 2,
        method="linearized" if linear else "sample",
    )
    return prediction.log_probs


POSTERIORS: dict[str, Callable[[], Any]] = {
    "laplace": laplace,
    "ekfac": lambda: laplace(structure=pl.structures.EKFAC()),
    "dense": lambda: laplace(structure=pl.structures.Dense()),
    "rank": lambda: laplace(structure=pl.structures.KFAC(rank=2)),
    "subset": lambda: laplace(sites="last_layer", fisher="mc"),
    "tuned": lambda: laplace().optimize_prior(),
    "particles": particles,
    "mixture": mixture,
    "dropout": dropout,
}


@pytest.mark.grid
@copied
@pytest.mark.parametrize("make", POSTERIORS.values(), ids=POSTERIORS)
def test_a_copy_of_a_posterior_predicts_the_same(
    make: Callable[[], Any], copied: Copied
) -> None:
    posterior, texts = make(), inputs(batch())
    expected = predict(posterior, texts)
    twin = copied(posterior)
    with torch.no_grad():  # the first network is no longer what it was
        for parameter in model_of(posterior).lora.network.parameters():
            parameter.zero_()
    assert_close(predict(twin, texts), expected, rtol=0, atol=0)


@copied
def test_a_copy_of_a_posterior_can_do_what_it_could(copied: Copied) -> None:
    posterior, texts = laplace(), batch()
    twin = copied(posterior)

    def followed(p: pl.LaplacePosterior) -> pl.LaplacePosterior:
        (lora,), model = p.networks, p.model
        assert model is not None
        guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
        tuned = p.optimize_prior(per="site")
        found = guide.refit(tuned, [texts], pyro.optim.Adam({"lr": 1e-3}))
        return found.optimize_prior(per="site")

    found, expected = followed(twin), followed(posterior)
    assert float(found.log_evidence()) == float(expected.log_evidence())
    pl.lift(twin.networks[0].network)
    with pytest.raises(RuntimeError, match="stale"):
        twin.networks[0]()


@copied
def test_a_copy_of_a_guide_goes_on(copied: Copied) -> None:
    lora, texts = small(), batch()
    model = pl.models.classification(lora, NUM_DATA)
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
    assert copied(guide).model is not None  # before the first step
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    svi.step(**texts)
    twin = copied(guide)
    assert guide.model is not None
    posterior = twin.laplace_approximation([texts])
    expected = guide.laplace_approximation([texts])
    assert float(posterior.log_evidence()) == float(expected.log_evidence())
    assert posterior.networks[0] is not lora


@pytest.mark.grid
@copied
@pytest.mark.parametrize("space", ["joint", "function"])
@pytest.mark.parametrize(
    "optim",
    [
        lambda: pyro.optim.Adam({"lr": 1e-3}, {"clip_norm": 1.0}),
        lambda: pyro.optim.ExponentialLR(
            {
                "optimizer": torch.optim.Adam,
                "optim_args": {"lr": 1e-3},
                "gamma": 0.5,
            }
        ),
    ],
    ids=["clipped", "scheduled"],
)
def test_a_copy_of_svgd_goes_on(
    optim: Callable[[], Any], space: Any, copied: Copied
) -> None:
    lora, texts = small(), batch()
    svgd = pl.SVGD(
        pl.models.classification(lora, 2 * NUM_DATA),
        pl.kernels.RBF(space=space),
        optim(),
        3,
        init_loc_fn=lora.init_to_adapter(jitter=0.1),
        temperature=pl.schedules.annealed(),
    )
    copied(svgd)  # before the first step
    svgd.run([texts, texts], num_epochs=2, progress_bar=False)
    twin = copied(svgd)
    for engine in (svgd, twin):
        engine.step(**texts)
        engine.run([texts, texts], num_epochs=1, progress_bar=False)
    assert twin.diagnostics == svgd.diagnostics
    found, expected = twin.get_named_particles(), svgd.get_named_particles()
    assert_close(found, expected, rtol=0, atol=0)
    assert twin.posterior().networks[0] is not lora


PRIORS = {
    "normal": pl.priors.normal(3.0, center="init"),
    "laplace": pl.priors.laplace(0.5),
    "student_t": pl.priors.student_t(4.0),
    "hierarchical": pl.priors.hierarchical(centered=False),
    "horseshoe": pl.priors.horseshoe(per="row"),
    "rank_ard": pl.priors.rank_ard(other_scale=2.0),
    "orthogonal": pl.priors.orthogonal(2.0),
    "spectral": pl.priors.spectral(frobenius_scale=2.0),
    "subspace": pl.priors.subspace(0.5, center=0.0),
    "by_site": pl.priors.by_site(
        {"head.*": pl.priors.normal(9.0), "*": pl.priors.normal()}
    ),
}


def drawn(prior: Any, lora: pl.LiftedNetwork) -> Any:
    pyro.set_rng_seed(0)
    with poutine.trace():  # some have a factor, which is for inference only
        return prior(lora)


@copied
@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
def test_a_copy_of_a_prior_is_the_same(prior: Any, copied: Copied) -> None:
    twin, lora = copied(prior), small()
    assert twin == prior
    assert repr(twin) == repr(prior)
    assert eval(repr(prior), vars(pl.priors)) == prior  # what a user would write
    assert_close(drawn(twin, lora), drawn(prior, lora), rtol=0, atol=0)


@copied
@pytest.mark.parametrize("make", [laplace, particles, mixture])
def test_a_copy_of_a_prior_from_a_posterior(
    make: Callable[[], Any], copied: Copied
) -> None:
    prior, lora = pl.priors.from_posterior(make()), small()
    assert_close(drawn(copied(prior), lora), drawn(prior, lora), rtol=0, atol=0)


def test_priors_with_other_fields_differ() -> None:
    assert pl.priors.normal(1.0) != pl.priors.normal(2.0)
    assert pl.priors.normal(1.0) != pl.priors.laplace(1.0)
    assert hash(pl.priors.normal(1.0)) == hash(pl.priors.normal(1.0))


MODELS: dict[str, Callable[[], Any]] = {
    "classification": lambda: pl.models.classification(small(), NUM_DATA),
    "regression": lambda: pl.models.regression(
        small(num_labels=1), NUM_DATA, pyro.distributions.Gamma(2.0, 2.0)
    ),
    "multiple_choice": lambda: pl.models.multiple_choice(
        pl.lift(llama(None, num_layers=1)), NUM_DATA, [3, 4]
    ),
    "language_model": lambda: pl.models.language_model(
        pl.lift(llama(None, num_layers=1)), NUM_DATA
    ),
}


@copied
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_copy_of_a_model_has_the_same_density(
    make: Callable[[], Any], copied: Copied
) -> None:
    model, texts = make(), inputs(batch())
    pyro.set_rng_seed(0)
    trace = poutine.trace(model).get_trace(**texts)
    again = poutine.trace(poutine.replay(copied(model), trace)).get_trace(**texts)
    assert float(trace.log_prob_sum()) == float(again.log_prob_sum())


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_model_is_a_callable_like_any_other(make: Callable[[], Any]) -> None:
    model, texts = make(), inputs(batch())
    parameters = inspect.signature(model).parameters
    assert parameters["labels"].default is None
    assert parameters["inputs"].kind is inspect.Parameter.VAR_KEYWORD
    assert "num_data=5" in repr(model)

    @functools.wraps(model)
    def wrapper(**given: Any) -> Any:
        return model(**given)

    assert Predictive(wrapper, num_samples=2)(**texts)["y"].shape[0] == 2


def test_nothing_is_copied_while_weights_are_bound() -> None:
    lora = small()
    with (
        lora.bind(lora.weights()),
        pytest.raises(RuntimeError, match="while weights are bound"),
    ):
        pickle.dumps(lora)
    assert pickled(lora).sites == lora.sites


@copied
def test_a_copy_after_a_cached_trunk_shares_and_caches(copied: Copied) -> None:
    lora = pl.lift(bert(num_layers=2, layers_to_transform=[1]))
    texts = inputs(batch())
    weights = {s: torch.stack([x, 2 * x]) for s, x in lora.weights().items()}

    def logits(of: pl.LiftedNetwork) -> Any:
        with pl.cached_trunk(of), of.bind(weights) as net:
            net(**texts)
            return net(**texts).logits

    expected = logits(lora)
    assert_close(logits(copied(lora)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("compiled", ["before", "after"])
def test_a_compiled_network_is_pickled_as_it_was_written(compiled: str) -> None:
    network, texts = bert(num_layers=1), inputs(batch())
    if compiled == "before":
        network.compile(backend="eager")
    lora = pl.lift(network)
    for module in lora.network.modules():
        module.compile(backend="eager")
    with lora.bind(lora.weights()) as net:
        expected = net(**texts).logits
    twin = pickled(lora)
    with twin.bind(lora.weights()) as net:
        assert_close(net(**texts).logits, expected, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_spawned_processes_predict_the_same() -> None:
    torch.manual_seed(0)
    texts = inputs(batch())
    posteriors = [make() for make in POSTERIORS.values()]
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        found = [pool.apply(_predicted, (p, texts)) for p in posteriors]
    assert found == [predict(p, texts).tolist() for p in posteriors]


def _predicted(posterior: Any, texts: dict[str, Tensor]) -> Any:
    return predict(posterior, texts).tolist()
