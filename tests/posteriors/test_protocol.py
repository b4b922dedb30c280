"""One table: every kind of posterior through every public function of a posterior."""

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from peft import PeftModel
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch import Tensor
from torch.testing import assert_close

import pyro_lora as pl
from tests import networks
from tests.predict import language, models
from tests.predict.language import prompts

NUM = 10  # data


class Particles:
    """A posterior of a user's, written against the protocol alone."""

    num_samples = 3
    obs_site = None

    def __init__(self, lora: pl.LiftedNetwork, model: Any, draws: Any) -> None:
        self.model, self.networks, self.draws = model, (lora,), draws
        self.prior = lora.prior

    def sample(self, num_samples: int) -> dict[str, Tensor]:
        index = torch.arange(num_samples) % self.num_samples
        return {site: x[index] for site, x in self.draws.items()}

    def log_prob(self, weights: Mapping[str, Tensor]) -> Tensor:
        raise ValueError("no density")

    def gaussians(self) -> list[Any]:
        return []


class Gaussian:
    """Likewise, a Gaussian of the library inside."""

    num_samples = None

    def __init__(self, inner: pl.LaplacePosterior) -> None:
        self._inner = inner
        self.model, self.networks = inner.model, inner.networks
        self.prior, self.obs_site = inner.prior, inner.obs_site

    def sample(self, num_samples: int) -> dict[str, Tensor]:
        return self._inner.sample(num_samples)

    def log_prob(self, weights: Mapping[str, Tensor]) -> Tensor:
        return self._inner.log_prob(weights)

    def gaussians(self) -> list[tuple[float, pl.LaplacePosterior]]:
        return [(1.0, self._inner)]


Rows = dict[str, Any]


def rows(lora: pl.LiftedNetwork, model: Any, laplace: Any, batch: Any) -> Rows:
    """Each kind of posterior, over one network."""
    particles = models.particles(lora, model, obs_site=None)
    auto = AutoNormal(model, init_loc_fn=lora.init_to_adapter(), init_scale=0.05)
    auto(**batch)
    mixture = pl.MixturePosterior([laplace, laplace], [1, 3])
    return {
        "laplace": laplace,
        "mixture": mixture,
        "mixture of mixtures": pl.MixturePosterior([mixture, laplace]),
        "mixture with particles": pl.MixturePosterior([laplace, particles]),
        "particles": particles,
        "ensemble": pl.ensemble(lora, [lora.weights()], model=model),
        "dropout": pl.mc_dropout(lora, model=model),
        "autoguide": auto,
        "function": models.guide_over(lora.weights()),
        "mixture of guides": pl.MixturePosterior([auto, auto]),
        "own particles": Particles(lora, model, particles.particles),
        "own gaussian": Gaussian(laplace),
    }


KINDS = (
    "laplace",
    "mixture",
    "mixture of mixtures",
    "mixture with particles",
    "particles",
    "ensemble",
    "dropout",
    "autoguide",
    "function",
    "mixture of guides",
    "own particles",
    "own gaussian",
)
GAUSSIAN = {"laplace", "mixture", "mixture of mixtures", "own gaussian"}


class Task:
    """A classifier, its data and every posterior over its weights."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        pyro.set_rng_seed(0)
        network = networks.bert(2, lora_dropout=0.3)
        self.lora = pl.lift(network, prior=pl.priors.normal(0.5))
        self.model = pl.models.classification(self.lora, NUM)
        self.batches = models.two_batches()
        laplace = models.laplace(self.lora, self.model, self.batches)
        self.rows = rows(self.lora, self.model, laplace, self.batches[0])


@pytest.fixture(scope="module")
def task() -> Task:
    return Task()


def seeded(call: Callable[[], Any]) -> Any:
    pyro.set_rng_seed(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Averaged over draws of a Gaussian")
        warnings.filterwarnings("ignore", "A Gaussian over several layers")
        return call()


def refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        seeded(call)


def test_the_table_is_whole(task: Task) -> None:
    assert tuple(task.rows) == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_posterior_has(task: Task, kind: str) -> None:
    posterior = task.rows[kind]
    is_wrapped = kind in ("autoguide", "function")
    assert isinstance(posterior, pl.Posterior) is not is_wrapped
    if is_wrapped:
        return
    if kind != "mixture of guides":  # an autoguide wraps its model
        assert posterior.model is task.model
    assert posterior.networks == (task.lora,)
    assert posterior.prior is task.lora.prior
    parts = posterior.gaussians()
    assert all(isinstance(part, pl.LaplacePosterior) for _, part in parts)
    total = sum(weight for weight, _ in parts)
    expected = {"mixture with particles": 0.5}.get(kind, float(kind in GAUSSIAN))
    assert total == pytest.approx(expected, abs=1e-12)
    num = posterior.num_samples or 2
    draws = posterior.sample(num)
    assert draws.keys() == set(task.lora.sites)
    for site, x in task.lora.weights().items():
        assert draws[site].shape == (num, *x.shape)
    if kind in GAUSSIAN:
        assert posterior.log_prob(draws).shape == (num,)
        site, x = next(iter(draws.items()))
        for other in (x.flatten(1), x[..., :1]):
            with pytest.raises(ValueError, match=rf"Site '{site}': log_prob needs"):
                posterior.log_prob({**draws, site: other})
    else:
        with pytest.raises(ValueError, match="no density"):
            posterior.log_prob(draws)


def test_a_mixture_of_any_depth_is_its_parts(task: Task) -> None:
    laplace, particles = task.rows["laplace"], task.rows["particles"]
    inner = pl.MixturePosterior([laplace, particles], [0.25, 0.75])
    outer = pl.MixturePosterior([inner, Gaussian(laplace)], [0.4, 0.6])
    deep = pl.MixturePosterior([outer, inner], [0.5, 0.5])
    assert [weight for weight, _ in deep.gaussians()] == pytest.approx(
        [0.05, 0.3, 0.125], abs=1e-15
    )
    assert all(part is laplace for _, part in deep.gaussians())
    assert deep.weights.tolist() == pytest.approx([0.05, 0.15, 0.3, 0.125, 0.375])
    assert deep.components[1] is particles


@pytest.mark.parametrize("kind", KINDS)
def test_predict(task: Task, kind: str) -> None:
    posterior, model = task.rows[kind], None
    if kind == "function":
        refused(lambda: pl.predict(posterior, task.batches), "function doesn't know")
        model = task.model
    prediction = seeded(
        lambda: pl.predict(posterior, task.batches, model=model, num_samples=4)
    )
    assert prediction.probs.shape == (NUM, 2)
    assert_close(prediction.probs.sum(1), torch.ones(NUM).double())
    for method in ("linearized", "sample"):
        call = lambda method=method: pl.predict(  # noqa: E731
            posterior, task.batches, model=model, num_samples=4, method=method
        )
        if method == "linearized" and kind not in GAUSSIAN:
            refused(call, "needs a LaplacePosterior or a mixture of them, found")
            continue
        by_method = seeded(call)
        if (method == "linearized") == (kind in GAUSSIAN):
            assert_close(by_method.log_probs, prediction.log_probs, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.few(6)
def test_diagnose(task: Task, kind: str) -> None:
    model = task.model if kind == "function" else None
    diagnosis = seeded(
        lambda: pl.diagnose(
            task.rows[kind], task.batches, model=model, num_samples=25, num_directions=1
        )
    )
    assert (diagnosis.stationarity is not None) == (kind in ("laplace", "own gaussian"))
    assert (diagnosis.charge is not None) == (kind in GAUSSIAN)
    assert (diagnosis.gaussian is not None) == (
        kind in ("laplace", "own gaussian", "autoguide", "function")
    )
    several = {"mixture", "mixture of mixtures", "particles", "own particles"}
    assert (diagnosis.diversity is not None) == (kind in several)
    assert diagnosis.confidence is not None
    assert str(diagnosis)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.few(6)
def test_to_datatree(task: Task, kind: str) -> None:
    posterior, model = task.rows[kind], None
    if kind == "dropout":
        refused(lambda: pl.to_datatree(posterior), "all draws of mc_dropout are the")
        return
    if kind in ("autoguide", "function"):
        refused(lambda: pl.to_datatree(posterior), r"Pass model= and batches=")
        model = task.model if kind == "function" else None
    else:
        tree = seeded(lambda: pl.to_datatree(posterior, num_samples=3))
        assert set(tree.children) >= {"posterior", "prior", "log_prior"}
    tree = seeded(
        lambda: pl.to_datatree(posterior, task.batches, model=model, num_samples=3)
    )
    assert tree["log_likelihood"]["y"].shape == (1, 3, NUM)
    stats = tree["sample_stats"]
    assert stats["lp"].shape == (1, 3)
    assert ("log_q" in stats) == (kind in {*GAUSSIAN, "function"})
    assert ("component" in stats) == kind.startswith("mixture")
    attributes = tree["posterior"].attrs
    assert ("log_evidence" in attributes) == (kind in ("laplace", "own gaussian"))


@pytest.mark.parametrize("kind", KINDS)
def test_export_adapters(task: Task, kind: str, tmp_path: Path) -> None:
    posterior = task.rows[kind]
    call = lambda: pl.export_adapters(posterior, tmp_path / "out", 2)  # noqa: E731
    if kind in ("dropout", "function"):
        refused(call, r"can't write a \w*; .*export pyro_lora\.ensemble")
        return
    before = task.lora.weights()
    seeded(call)
    for site, x in task.lora.weights().items():
        assert torch.equal(x, before[site])
    draws = [tmp_path / "out" / f"draw_00{i}" for i in range(2)]
    for folder in draws:
        base = networks.without_peft(copy.deepcopy(task.lora.network))
        assert isinstance(PeftModel.from_pretrained(base, folder), PeftModel)


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(task: Task, kind: str, tmp_path: Path) -> None:
    posterior = task.rows[kind]
    if kind not in {"particles", "ensemble", "mixture with particles"} | (
        GAUSSIAN - {"own gaussian"}
    ):
        refused(lambda: pl.save(posterior, tmp_path / "folder"), "save can't store a")
        return
    pl.save(posterior, tmp_path / "folder")
    again = pl.load(tmp_path / "folder", task.lora, model=task.model)
    assert type(again) is type(posterior)
    drawn, expected = (seeded(lambda p=p: p.sample(3)) for p in (again, posterior))
    for site, x in expected.items():
        assert torch.equal(drawn[site], x)


@pytest.mark.parametrize("kind", KINDS)
def test_from_posterior(task: Task, kind: str) -> None:
    posterior = task.rows[kind]
    call = lambda: pl.priors.from_posterior(posterior, bandwidth=0.1)  # noqa: E731
    if kind in ("dropout", "autoguide", "mixture of guides"):
        refused(lambda: task.lora.with_prior(call())(), "found a Delta")
        return
    lora = task.lora.with_prior(seeded(call))
    model = pl.models.classification(lora, NUM)
    trace = pyro.poutine.trace(model).get_trace(**task.batches[0])
    assert lora.sites.keys() <= trace.nodes.keys()
    assert torch.isfinite(trace.log_prob_sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.few(4)
def test_plots(task: Task, kind: str) -> None:
    posterior = task.rows[kind]
    for plot, can in (
        (pl.plots.evidence, {"laplace", "own gaussian"}),
        (pl.plots.effective_parameters, GAUSSIAN),
    ):
        if kind in can:
            axes: Any = plot(posterior)
            axes.figure.clear()
            continue
        with pytest.raises(TypeError, match="needs a LaplacePosterior"):
            plot(posterior)


@pytest.mark.parametrize("kind", ["guide", "after SVI", "SVGD"])
def test_what_a_posterior_is_made_from_is_none_yet(
    task: Task, kind: str, tmp_path: Path
) -> None:
    start = task.lora.init_to_adapter()
    engine: Any = pl.AutoLaplace(task.model, init_loc_fn=start)
    by = r"this AutoLaplace isn't one yet.*laplace_approximation\(batches\)"
    if kind == "after SVI":
        SVI(task.model, engine, Adam({"lr": 1e-3}), Trace_ELBO()).step(
            **task.batches[0]
        )
    if kind == "SVGD":
        optim = Adam({"lr": 1e-3})
        engine = pl.SVGD(task.model, pl.kernels.RBF(), optim, 2, init_loc_fn=start)
        by = r"this SVGD isn't one yet.*Call its posterior\(\)"
    calls: list[Callable[..., Any]] = [
        lambda: pl.predict(engine, task.batches),
        lambda: pl.predict(engine, task.batches, model=task.model, method="linearized"),
        lambda: pl.to_datatree(engine, task.batches),
        lambda: pl.to_datatree(engine),
        lambda: pl.diagnose(engine, task.batches),
        lambda: pl.export_adapters(engine, tmp_path / "out", 2),
        lambda: pl.save(engine, tmp_path / "out"),
        lambda: pl.MixturePosterior([engine, task.rows["laplace"]]),
        lambda: pl.priors.from_posterior(engine),
        lambda: pl.plots.evidence(engine),
        lambda: pl.generate(
            engine, input_ids=task.batches[0]["input_ids"], max_new_tokens=1
        ),
        lambda: pl.sequence_log_prob(engine, **task.batches[0]),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=rf"posterior must be a posterior; {by}"):
            call()
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def language_rows() -> tuple[pl.LiftedNetwork, Rows]:
    torch.manual_seed(0)
    pyro.set_rng_seed(0)
    lora = pl.lift(networks.llama(None, lora_dropout=0.3))
    model = language.language_model(lora)
    texts = language.texts()
    guide = pl.AutoLaplace(
        model,
        init_loc_fn=lora.init_to_adapter(),
        fisher="mc",
        structure=pl.structures.Diagonal(),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The weights aren't a mode")
        laplace = guide.laplace_approximation([texts])
    return lora, rows(lora, model, laplace, texts)


@pytest.mark.parametrize("kind", KINDS)
def test_generate_and_sequence_log_prob(
    language_rows: tuple[pl.LiftedNetwork, Rows], kind: str
) -> None:
    lora, posteriors = language_rows
    posterior, texts = posteriors[kind], prompts()
    given = {"lora": lora} if kind == "function" else {}
    labels = texts["input_ids"].clone()
    labels[:, :-1] = -100
    options: Any = {"max_new_tokens": 2, "num_samples": 2, **given, **texts}

    def score() -> Any:
        return pl.sequence_log_prob(
            posterior, labels=labels, num_samples=2, **given, **texts
        )

    if kind == "dropout":
        for call in (lambda: pl.generate(posterior, **options), score):
            refused(call, "all draws of mc_dropout are the same")
        return
    generated = seeded(lambda: pl.generate(posterior, **options))
    assert generated.sequences.shape == (3, 7)
    assert seeded(score).draws.shape == (2, 3)
    at_mode = lambda: pl.generate(posterior, mode="mode", **options)  # noqa: E731
    if kind in ("laplace", "own gaussian", "autoguide"):
        assert seeded(at_mode).sequences.shape == (3, 7)
    else:
        refused(at_mode, "neither a mode nor a median")


@pytest.mark.parametrize(
    ("own", "kind"), [("own particles", "particles"), ("own gaussian", "laplace")]
)
def test_a_posterior_of_ones_own_says_what_the_librarys_says(
    task: Task, own: str, kind: str
) -> None:
    found, expected = (
        seeded(lambda p=p: pl.predict(p, task.batches))
        for p in (task.rows[own], task.rows[kind])
    )
    assert_close(found.log_probs, expected.log_probs, rtol=0, atol=0)
    trees = [
        seeded(lambda p=p: pl.to_datatree(p, task.batches, num_samples=3))
        for p in (task.rows[own], task.rows[kind])
    ]
    for group in ("posterior", "log_likelihood", "log_prior", "sample_stats"):
        assert trees[0][group].to_dataset().equals(trees[1][group].to_dataset())


def test_what_is_no_posterior_is_refused(task: Task) -> None:
    wrong: Any
    for wrong in (3, None, task.lora, "posterior", {}):
        for call in (
            lambda w=wrong: pl.predict(w, task.batches, model=task.model),
            lambda w=wrong: pl.diagnose(w, task.batches, model=task.model),
            lambda w=wrong: pl.export_adapters(w, "nowhere", 1),
            lambda w=wrong: pl.save(w, "nowhere"),
            lambda w=wrong: pl.plots.evidence(w),
            lambda w=wrong: pl.MixturePosterior([w]),
        ):
            with pytest.raises(TypeError, match=r"posterior must be .*Pyro guide"):
                call()


def test_a_network_or_a_function_that_samples_nothing_is_no_guide(task: Task) -> None:
    peft_model, model = task.lora.network, task.model
    wrong: Any
    for wrong in (peft_model, torch.nn.Linear(2, 2), lambda **_: None):
        for call in (
            lambda w=wrong: pl.predict(w, task.batches, model=model),
            lambda w=wrong: pl.diagnose(w, task.batches, model=model),
            lambda w=wrong: pl.to_datatree(w, task.batches, model=model),
        ):
            with pytest.raises(TypeError, match=r"found a .*pl\.lift\(.*AutoLaplace"):
                call()
    state = torch.get_rng_state()
    for call in (pl.to_datatree, lambda w: pl.MixturePosterior([w])):
        with pytest.raises(
            TypeError, match=r"found a PeftModel.*isn't lifted.*pl\.lift"
        ):
            call(peft_model)
    assert torch.equal(torch.get_rng_state(), state)


class PlainModule(torch.nn.Module):
    """A Pyro guide that is a module, and none of Pyro's."""

    def __init__(self, lora: pl.LiftedNetwork) -> None:
        super().__init__()
        means = list(lora.weights().values())
        self.sites, self.means = [*lora.sites], torch.nn.ParameterList(means)

    def forward(self, **inputs: Tensor) -> None:
        assert "input_ids" in inputs
        for site, mean in zip(self.sites, self.means, strict=True):
            pyro.sample(site, dist.Normal(mean, 0.1).to_event(mean.ndim))


def test_a_guide_may_be_a_module(task: Task) -> None:
    guide = PlainModule(task.lora)
    found, expected = (
        seeded(lambda p=p: pl.predict(p, task.batches, model=task.model, num_samples=3))
        for p in (guide, lambda **inputs: guide(**inputs))
    )
    assert_close(found.log_probs, expected.log_probs, rtol=0, atol=0)
