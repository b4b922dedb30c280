"""Draws that keep their promise in the network itself."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro import poutine
from torch import Tensor, nn
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora.ground.ranks import ALONE
from pyro_lora.posteriors.loss_of_draws import LossOfDraws, largest_scale
from pyro_lora.posteriors.scaled_posterior import ScaledPosterior
from tests.curvature.gauss_newton import assert_same, flatten, laplace, split
from tests.infer.linear_regression import linear_regression
from tests.networks import batch, bert, inputs, llama
from tests.predict.language import language_model
from tests.predict.language import texts as rows

pytestmark = [
    pytest.mark.untrained,
    pytest.mark.filterwarnings("ignore:The weights aren't a mode"),
]


@pytest.fixture
def lora() -> pl.LiftedNetwork:
    return pl.lift(bert(3), prior=pl.priors.normal(scale=3.0))


@pytest.fixture
def texts() -> dict[str, Tensor]:
    return batch(8, num_labels=3)


def loss(lora: pl.LiftedNetwork, texts: dict[str, Tensor], draws: object) -> float:
    """Nats a datum, averaged over draws, by the network alone."""
    assert isinstance(draws, dict)
    losses = []
    for s in range(len(next(iter(draws.values())))):
        with torch.no_grad(), lora.bind({k: x[s] for k, x in draws.items()}) as net:
            log_probs = net(**inputs(texts)).logits.log_softmax(-1)
        losses.append(-log_probs.gather(1, texts["labels"][:, None]).mean())
    return float(torch.stack(losses).mean())


@pytest.mark.grid
@pytest.mark.parametrize("structure", [pl.structures.KFAC(), pl.structures.Exact()])
@pytest.mark.parametrize("tolerance", [0.02, 0.2])
def test_the_scale_is_the_largest_within_the_tolerance(
    lora: pl.LiftedNetwork,
    texts: dict[str, Tensor],
    structure: pl.structures.Structure,
    tolerance: float,
) -> None:
    posterior = laplace(lora, texts, 3, structure=structure)
    before = {s: x.clone() for s, x in lora.weights().items()}
    pyro.set_rng_seed(1)
    found = posterior.for_sampling(split(texts, 3), tolerance=tolerance, num_samples=4)
    pyro.set_rng_seed(1)
    draws = posterior.sample(4)
    mode = posterior.mode()
    least = loss(lora, texts, {s: x[None] for s, x in mode.items()})

    def at(scale: float) -> float:
        scaled = {s: mode[s] + scale * (x - mode[s]) for s, x in draws.items()}
        return loss(lora, texts, scaled)

    assert 0 < found.scale < 1
    assert at(found.scale) <= least + tolerance
    assert at(found.scale * (1 + 1 / 126)) > least + tolerance
    for site, x in lora.weights().items():
        assert torch.equal(x, before[site])
    assert_same(flatten(found.mode()), flatten(mode))


def test_density_and_moments_are_those_of_the_narrower_gaussian() -> None:
    task = linear_regression()
    posterior = task.laplace(structure=pl.structures.Exact())
    found = posterior.for_sampling(task.batches, tolerance=0.01)
    mode, size = flatten(posterior.mode()), 4
    covariance = found.scale**2 * torch.linalg.inv(task.precision)
    expected = dist.MultivariateNormal(mode, covariance)
    draws = found.sample(2000)
    flat = torch.cat([draws[s].flatten(1) for s in task.lora.sites], 1)
    assert_same(found.log_prob(draws), expected.log_prob(flat))
    error = (flat.mean(0) - mode) / covariance.diagonal().sqrt()
    assert float(error.abs().max()) < 5 / math.sqrt(2000)
    assert_same(flatten(found.mean()), mode)
    assert_same(flatten(found.variance()), covariance.diagonal())
    ratio = flat.var(0) / covariance.diagonal()
    assert float((ratio - 1).abs().max()) < 5 * math.sqrt(2 / 2000)
    trace = poutine.trace(found).get_trace(**task.whole)
    weights = {s: trace.nodes[s]["value"][None] for s in task.lora.sites}
    assert_same(trace.log_prob_sum(), found.log_prob(weights)[0])
    assert size == flat.shape[1]


def test_a_refined_posterior_is_centered_where_the_network_itself_is_best(
    lora: pl.LiftedNetwork, texts: dict[str, Tensor]
) -> None:
    refined = laplace(lora, texts, 3, structure=pl.structures.Exact()).refine("prior")
    found = refined.for_sampling(split(texts, 3), tolerance=0.05, num_samples=2)
    origin, mode = lora.weights(), refined.mode()
    losses = {
        step: loss(
            lora,
            texts,
            {s: (x + step * (mode[s] - x))[None] for s, x in origin.items()},
        )
        for step in (0.0, 0.1, 0.25, 0.5, 1.0)
    }
    best = min(losses, key=lambda step: losses[step])
    center = {s: x + best * (mode[s] - x) for s, x in origin.items()}
    assert_close(flatten(found.mode()), flatten(center))


def test_is_predicted_by_draws_and_exported(
    lora: pl.LiftedNetwork, texts: dict[str, Tensor], tmp_path: object
) -> None:
    posterior = laplace(lora, texts, 3)
    found = posterior.for_sampling(split(texts, 3), num_samples=2)
    assert isinstance(found, pl.Posterior)
    assert isinstance(found, ScaledPosterior)
    pyro.set_rng_seed(0)
    prediction = pl.predict(found, [inputs(texts)], num_samples=3)
    pyro.set_rng_seed(0)
    draws = found.sample(3)
    probs = []
    for s in range(3):
        with torch.no_grad(), lora.bind({k: x[s] for k, x in draws.items()}) as net:
            probs.append(net(**inputs(texts)).logits.softmax(-1))
    assert_close(prediction.probs, torch.stack(probs).mean(0).double())


def test_fixed_sites_and_other_latents_are_as_they_were(
    texts: dict[str, Tensor],
) -> None:
    lora = pl.lift(bert(3), prior=pl.priors.normal(scale=3.0))
    posterior = laplace(lora, texts, 3, sites="last_layer")
    found = posterior.for_sampling(split(texts, 3), tolerance=0.1, num_samples=2)
    draws = found.sample(3)
    for site, value in posterior.fixed.items():
        assert_same(draws[site], value.expand(3, *value.shape))


def test_all_draws_go_through_the_network_at_once(
    lora: pl.LiftedNetwork, texts: dict[str, Tensor]
) -> None:
    posterior, seen = laplace(lora, texts, 3), []
    layer = lora.network.base_model.model.bert.encoder.layer[0]
    layer.register_forward_hook(lambda *_: seen.append(1))
    posterior.for_sampling(split(texts, 3), num_samples=8)
    # A trace, two draws and their stack; the center and up to 8 scales, three batches.
    assert (len(seen) - 4) % 3 == 0
    assert len(seen) <= 4 + 3 * (1 + 8)


@given(
    log_edge=st.floats(-15, 15),
    power=st.floats(0.5, 8),
    flat=st.floats(0, 1),
    wall=st.floats(1, 8),
    tolerance=st.floats(1e-3, 1),
)
def test_the_largest_scale_is_found_whatever_the_loss_is_like(
    log_edge: float, power: float, flat: float, wall: float, tolerance: float
) -> None:
    edge, seen = 2.0**log_edge, []

    def increase(scale: float) -> float:
        # Less than nothing at first, then a power, then no number.
        seen.append(scale)
        ratio = scale / edge
        if ratio > wall:
            return math.inf
        return tolerance * ratio**power if ratio > flat else -0.01

    found = largest_scale(increase, tolerance, 1.0, most=2.0**16, least=2.0**-16)
    scale, is_found = found
    assert is_found
    assert increase(scale) <= tolerance < increase(scale * (1 + 1 / 126) * (1 + 1e-9))
    assert len(seen) <= 40


@pytest.mark.parametrize("power", [2, 3, 4])
@pytest.mark.parametrize("edge", [0.02, 0.2, 0.5, 3.0])
def test_few_scales_are_looked_at_where_the_loss_is_that_around_a_mode(
    power: int, edge: float
) -> None:
    seen = []

    def increase(scale: float) -> float:
        seen.append(scale)
        return 0.05 * (scale / edge) ** power

    scale, is_found = largest_scale(increase, 0.05, 1.0, most=2.0**16, least=2.0**-8)
    assert is_found
    assert edge / (1 + 1 / 126) <= scale * (1 + 1e-12) <= edge * (1 + 2e-12)
    assert len(seen) <= 7


def test_the_ends_of_the_range_are_kept_to() -> None:
    at = {"start": 1.0, "most": 4.0, "least": 0.5}
    assert largest_scale(lambda _: 0.0, 0.1, **at) == (4.0, True)
    assert largest_scale(lambda _: math.inf, 0.1, **at) == (0.5, False)


def double_loop(posterior: Any, weights: dict[str, Tensor], batches: Any) -> float:
    """Nats a datum with an outcome, by one draw and one batch at a time."""
    total, number = 0.0, 0
    draws = len(next(iter(weights.values())))
    for one in batches:
        for s in range(draws):
            at = {k: x[s] for k, x in weights.items()}
            model = poutine.condition(posterior.model, at)
            trace: Any = poutine.trace(model).get_trace(**one)
            plates = {"y", "real"} & trace.nodes.keys()
            for name in plates:
                node = trace.nodes[name]
                scale = node["scale"] / (5 / len(one["x"]))
                log_prob = node["fn"].log_prob(node["value"])
                total -= float((scale * log_prob).sum()) / draws
        number += len(one["x"])
    return total / number


@pytest.mark.parametrize("num_draws", [1, 3, 11])
def test_the_loss_of_draws_at_once_is_that_of_each(num_draws: int) -> None:
    # Two sites, one of tokens behind masks, all of one datum's, a gap in the other, and
    # a latent scale.
    network = nn.Linear(3, 4).double()
    lora = pl.lift(network, prior=pl.priors.normal(scale=0.7))
    x = torch.randn(5, 2, 3).double()
    mask = torch.tensor([[0, 0], [1, 0], [1, 1], [1, 0], [1, 1]]).bool()
    y, real = torch.randint(3, (5, 2)), torch.randn(5).double()
    real[2] = torch.nan

    def model(x: Tensor, mask: Tensor, y: Any = None, real: Any = None) -> None:
        noise = pyro.sample("noise", dist.LogNormal(torch.tensor(0.0).double(), 1.0))
        f = lora()(x)
        with pyro.plate("data", 5, subsample=x), poutine.scale(scale=0.3):
            tokens = dist.Categorical(logits=f[..., :3]).mask(mask).to_event(1)
            pyro.sample("y", tokens, obs=y)
            pyro.sample("real", dist.NanMaskedNormal(f[..., 0, 3], noise), obs=real)

    whole = {"x": x, "mask": mask, "y": y, "real": real}
    batches = [{k: v[i : i + 2] for k, v in whole.items()} for i in (0, 2, 4)]
    start = {**lora.weights(), "noise": torch.tensor(0.5).double()}
    guide = pl.AutoLaplace(
        model, init_loc_fn=lora.init_to(start), obs_site=("y", "real")
    )
    posterior = guide.laplace_approximation(batches)
    scaled = replace(posterior.scaled(), obs_site=("y", "real"))
    draws = posterior.sample(num_draws)
    one = {s: v[None] for s, v in posterior.mode().items()}
    loss = LossOfDraws(
        model, scaled.networks, scaled.obs_site, one, batches, ALONE, "for_sampling"
    )
    found = loss.at(draws)
    assert abs(found - double_loop(posterior, draws, batches)) < 1e-12


@pytest.mark.filterwarnings("ignore:The model observes")
def test_losses_of_all_sites_of_the_fit_add_up(tmp_path: Path) -> None:
    # A third site is observed, which isn't of the fit.
    lora = pl.lift(nn.Linear(3, 5).double(), prior=pl.priors.normal(scale=0.7))
    x, real = torch.randn(5, 3).double(), 2 * torch.randn(5).double()
    whole = {"x": x, "y": torch.randint(3, (5,)), "real": real, "third": 9 * real}

    def model(x: Tensor, y: Any = None, real: Any = None, third: Any = None) -> None:
        f = lora()(x)
        with pyro.plate("data", 5, subsample=x):
            pyro.sample("y", dist.Categorical(logits=f[..., :3]), obs=y)
            pyro.sample("real", dist.Normal(f[..., 3], 0.5), obs=real)
            pyro.sample("third", dist.Normal(f[..., 4], 0.1), obs=third)

    batches = [{k: v[i : i + 2] for k, v in whole.items()} for i in (0, 2, 4)]
    guide = pl.AutoLaplace(
        model, init_loc_fn=lora.init_to_adapter(), obs_site=("y", "real")
    )
    posterior = guide.laplace_approximation(batches)
    pyro.set_rng_seed(1)
    draws, mode = posterior.sample(4), posterior.mode()

    def at(scale: float) -> float:
        scaled = {s: mode[s] + scale * (x - mode[s]) for s, x in draws.items()}
        return double_loop(posterior, scaled, batches)

    pl.save(posterior, tmp_path / "saved")
    loaded = pl.load(tmp_path / "saved", lora, model=model)
    assert isinstance(loaded, pl.LaplacePosterior)
    for fitted in (posterior, loaded):
        pyro.set_rng_seed(1)
        found = fitted.for_sampling(batches, tolerance=0.1, num_samples=4)
        assert 0 < found.scale < 1
        assert at(found.scale) <= at(0.0) + 0.1 < at(found.scale * (1 + 1 / 126))


@pytest.mark.parametrize("size", [1, 2, 4, 12])
@pytest.mark.few(2)
def test_a_model_that_takes_no_stack_runs_draw_by_draw(size: int) -> None:
    # Indexed from the left, or a latent scale that isn't put beside the classes' dim: a
    # stack of as many draws as there are data would be mixed with them.
    task = linear_regression()
    batches = [
        {"x": task.x[i : i + size], "y": task.y[i : i + size]}
        for i in range(0, 12, size)
    ]

    def model_of(loc: Any) -> Any:
        def model(x: Tensor, y: Tensor | None = None) -> None:
            scale = pyro.sample("scale", dist.LogNormal(torch.zeros(()).double(), 1.0))
            f = task.lora()(x)
            with pyro.plate("data", len(task.x), subsample=x):
                pyro.sample("y", dist.Normal(loc(f, scale), 0.5), obs=y)

        return model

    start = {**task.lora.weights(), "scale": torch.tensor(0.8).double()}
    scales = []
    for loc in (
        lambda f, scale: (f * scale[..., None])[..., 0],
        lambda f, scale: (f * scale)[..., 0],
        lambda f, scale: f[:, 0] * scale,
    ):
        guide = pl.AutoLaplace(model_of(loc), init_loc_fn=task.lora.init_to(start))
        posterior = guide.laplace_approximation(batches)
        pyro.set_rng_seed(2)
        found = posterior.for_sampling(batches, tolerance=0.02, num_samples=4)
        scales.append(found.scale)
    assert 0 < scales[0] < 1
    assert scales[1:] == [scales[0]] * 2


@pytest.mark.parametrize("method", ["for_sampling", "tfb"])
@pytest.mark.few(1)
def test_a_model_that_mixes_draws_in_shapes_that_fit_runs_draw_by_draw(
    method: str, texts: dict[str, Tensor]
) -> None:
    """The oracle is a model that says the same of one draw, and keeps several apart."""
    lora = pl.lift(bert(3), prior=pl.priors.normal(scale=3.0))
    weights = {s: x + 0.3 * torch.randn_like(x) for s, x in lora.weights().items()}

    def model_of(logits_of: Any) -> Any:
        def model(labels: Tensor | None = None, **text: Tensor) -> None:
            logits = logits_of(lora()(**text).logits)
            with pyro.plate("data", 8, subsample=text["input_ids"]):
                pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

        return model

    # A single datum, for which a column from the left is right, and the rest.
    batches = [{k: x[i:j] for k, x in texts.items()} for i, j in ((0, 1), (1, 8))]
    scales = []
    for logits_of in (
        lambda f: f,
        lambda f: f if f.ndim == 2 else f[:1].expand_as(f),
        lambda f: f[:, :1].expand_as(f) if f.ndim == 3 else f,
    ):
        pyro.set_rng_seed(2)
        model = model_of(logits_of)
        if method == "tfb":
            found = pl.methods.tfb(model, batches, weights=weights, tolerance=0.02)
            scales.append(found.sample(1))
        else:
            guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to(weights))
            posterior = guide.laplace_approximation(batches)
            scaled = posterior.for_sampling(batches, tolerance=0.02, num_samples=4)
            scales.append(scaled.sample(1))
    for other in scales[1:]:
        for site, x in scales[0].items():
            assert_close(other[site], x, rtol=1e-8, atol=1e-8)


def test_each_gaussian_of_a_mixture_is_made_narrow(
    lora: pl.LiftedNetwork, texts: dict[str, Tensor]
) -> None:
    gaussian = laplace(lora, texts, 3)
    draws = [{s: x[0] for s, x in gaussian.sample(1).items()} for _ in range(2)]
    particles = pl.ensemble(lora, draws)
    mixture = pl.MixturePosterior([gaussian, particles], [0.25, 0.75])
    pyro.set_rng_seed(1)
    found = mixture.for_sampling(split(texts, 3), tolerance=0.1, num_samples=2)
    pyro.set_rng_seed(1)
    expected = gaussian.for_sampling(split(texts, 3), tolerance=0.1, num_samples=2)
    first, second = found.components
    assert isinstance(first, ScaledPosterior)
    assert first.scale == expected.scale
    assert second is particles
    assert_same(found.weights, torch.tensor([0.25, 0.75]).double())
    assert not found.gaussians()


def test_adapters_are_of_the_narrow_one_where_rows_are_given(
    lora: pl.LiftedNetwork, texts: dict[str, Tensor], tmp_path: Path
) -> None:
    posterior, rows = laplace(lora, texts, 3), split(texts, 3)
    pyro.set_rng_seed(1)
    pl.export_adapters(posterior, tmp_path / "found", 2, batches=iter(rows))
    pyro.set_rng_seed(1)
    narrow = posterior.for_sampling(rows)
    pl.export_adapters(narrow, tmp_path / "expected", 2)
    for index in range(2):
        file = Path(f"draw_{index:03d}") / "adapter_model.safetensors"
        found = (tmp_path / "found" / file).read_bytes()
        assert found == (tmp_path / "expected" / file).read_bytes()
    card = (tmp_path / "found" / "draw_000" / "README.md").read_text(encoding="utf-8")
    assert "at chance" not in card


def test_texts_are_of_the_narrow_one_where_rows_are_given() -> None:
    lora = pl.lift(llama(None), prior=pl.priors.normal(scale=0.7))
    guide = pl.AutoLaplace(
        language_model(lora), init_loc_fn=lora.init_to_adapter(), fisher="mc"
    )
    posterior = guide.laplace_approximation([rows()])
    prompt, settings = torch.tensor([[5, 23, 42]]), {"max_new_tokens": 3}
    pyro.set_rng_seed(1)
    found = pl.generate(posterior, prompt, 3, batches=[rows()], **settings)
    pyro.set_rng_seed(1)
    expected = pl.generate(posterior.for_sampling([rows()]), prompt, 3, **settings)
    assert_same(found.log_probs, expected.log_probs)
    with pytest.warns(UserWarning, match=r"generate\(..., batches=...\)"):
        pl.generate(posterior, prompt, 3, **settings)


def test_bad_arguments(lora: pl.LiftedNetwork, texts: dict[str, Tensor]) -> None:
    posterior = laplace(lora, texts, 3)
    with pytest.raises(ValueError, match="tolerance"):
        posterior.for_sampling([texts], tolerance=0.0)
    with pytest.raises(ValueError, match="There are no batches"):
        posterior.for_sampling([])
    with pytest.raises(ValueError, match="labels"):
        posterior.for_sampling([inputs(texts)])


def test_a_loss_that_is_no_number_is_an_error(
    lora: pl.LiftedNetwork, texts: dict[str, Tensor]
) -> None:
    task = linear_regression()
    posterior = task.laplace()
    wrong = {"x": task.x.clone(), "y": task.y}
    wrong["x"][0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        posterior.for_sampling([wrong])
