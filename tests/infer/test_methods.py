"""The methods of others: each against its own algebra, all through one table."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from peft import PeftModel
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.optim import Adam
from torch import Tensor, nn
from torch.testing import assert_close

import pyro_lora as pl
from tests import networks
from tests.curvature.gauss_newton import assert_same, flatten
from tests.networks import batch, bert, inputs

pytestmark = pytest.mark.untrained

NUM = 10
METHODS = ("blob", "blob as a value", "tfb", "subspace", "subspace as a value", "ivon")
METHODS += ("swag",)
Batch = dict[str, Tensor]


class Task:
    def __init__(self) -> None:
        torch.manual_seed(0)
        pyro.set_rng_seed(0)
        self.lora = pl.lift(bert(2), prior=pl.priors.normal(0.5))
        self.model = pl.models.classification(self.lora, NUM)
        self.batches = [batch(6, 7), batch(4, 9)]

    def trained(self, guide: Any, model: Any, num_steps: int = 3) -> Any:
        svi = SVI(model, guide, Adam({"lr": 1e-3}), Trace_ELBO())
        for _ in range(num_steps):
            svi.step(**self.batches[0])
        return guide

    def iterates(self, number: int = 4) -> list[dict[str, Tensor]]:
        return [
            {s: x + 0.05 * torch.randn_like(x) for s, x in self.lora.weights().items()}
            for _ in range(number)
        ]


@cache
def task() -> Task:
    return Task()


@cache
def posterior(method: str) -> Any:
    pyro.set_rng_seed(0)
    t = task()
    if method.endswith("as a value"):
        return pl.methods.mean_field(posterior(method.removesuffix(" as a value")))
    if method == "blob":
        start = t.lora.init_to_adapter()
        return t.trained(pl.methods.blob(t.model, init_loc_fn=start), t.model)
    if method == "tfb":
        by_itself = [
            inputs(b) for b in t.batches
        ]  # on labels by chance any width will do
        return pl.methods.tfb(t.model, by_itself, num_samples=2, progress_bar=False)
    if method == "subspace":
        lora = t.lora.with_prior(pl.priors.subspace(0.3))
        model = pl.models.classification(lora, NUM)
        guide = AutoNormal(model, init_loc_fn=lora.init_to_adapter(), init_scale=0.05)
        return t.trained(guide, model)
    if method == "ivon":
        lora = pl.lift(bert(2))
        parameters = lora.network.parameters()
        optimizer = pl.methods.IVON(parameters, 0.1, num_data=NUM)
        for _ in range(2):
            optimizer.zero_grad()
            with optimizer.sampled():
                lora.network(**t.batches[0]).loss.backward()
            optimizer.step()
        return optimizer.posterior(
            lora, model=pl.models.classification(lora, NUM), obs_site="y"
        )
    return pl.methods.swag(t.lora, t.iterates(), rank=3, model=t.model)


def seeded(call: Callable[[], Any]) -> Any:
    pyro.set_rng_seed(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Estimated shape parameter")
        return call()


@pytest.mark.parametrize("method", METHODS)
def test_predict_averages_the_network_at_its_draws(method: str) -> None:
    found = posterior(method)
    prediction = seeded(lambda: pl.predict(found, task().batches, num_samples=4))
    assert prediction.probs.shape == (NUM, 2)
    assert_close(prediction.probs.sum(1), torch.ones(NUM).double())
    if not isinstance(found, pl.Posterior):
        return
    draws = seeded(lambda: found.sample(4))
    if not method.startswith("subspace"):
        (lora,) = found.networks
        each = []
        for s in range(4):
            at = {site: x[s] for site, x in draws.items()}
            with torch.no_grad(), lora.bind(at) as net:
                each.append(
                    torch.cat([net(**inputs(b)).logits for b in task().batches])
                )
        expected = torch.stack(each).softmax(-1).mean(0)
        assert_close(prediction.probs, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_diagnose(method: str) -> None:
    found = posterior(method)
    diagnosis = seeded(lambda: pl.diagnose(found, task().batches, num_samples=25))
    assert diagnosis.gaussian is not None  # Pareto's k of its draws
    assert diagnosis.confidence is not None
    assert str(diagnosis)


@pytest.mark.parametrize("method", METHODS)
def test_to_datatree(method: str) -> None:
    found = posterior(method)
    tree = seeded(lambda: pl.to_datatree(found, task().batches, num_samples=3))
    assert tree["log_likelihood"]["y"].shape == (1, 3, NUM)
    singular = [n for n in tree["posterior"] if str(n).endswith("singular_values")]
    assert len(singular) == 2  # of query and value
    assert tree["sample_stats"]["lp"].shape == (1, 3)
    assert ("log_q" in tree["sample_stats"]) == isinstance(found, pl.Posterior)


@pytest.mark.parametrize("method", METHODS)
def test_save_and_load(method: str, tmp_path: Path) -> None:
    found = posterior(method)
    if not isinstance(found, pl.Posterior):
        with pytest.raises(ValueError, match=r"pyro_lora\.methods\.mean_field\(guide"):
            pl.save(found, tmp_path / "folder")
        return
    (lora,) = found.networks
    pl.save(found, tmp_path / "folder")
    again = pl.load(tmp_path / "folder", lora, model=found.model)
    assert type(again) is type(found)
    drawn, expected = (seeded(lambda p=p: p.sample(3)) for p in (again, found))
    for site, x in expected.items():
        assert torch.equal(drawn[site], x)
    if method.startswith("subspace"):
        with pytest.raises(ValueError, match="no such site"):
            pl.load(tmp_path / "folder", task().lora)  # under another prior
        torch.manual_seed(1)
        other = pl.lift(bert(2), prior=lora.prior)  # of another adapter
        base = dict(lora.network.named_buffers()) | dict(
            lora.network.named_parameters()
        )
        lifted = {name for names in lora.sites.values() for name in names}
        rest = {name: x for name, x in base.items() if name not in lifted}
        other.network.load_state_dict(rest, strict=False)
        with pytest.raises(
            ValueError, match=r"\.A'.* Lift the network with the adapter"
        ):
            pl.load(tmp_path / "folder", other)
        other.load(lora.weights())
        again = pl.load(tmp_path / "folder", pl.lift(other.network, prior=lora.prior))
        assert_same(again.mean(), found.mean())


@pytest.mark.parametrize("method", METHODS)
def test_export_adapters(method: str, tmp_path: Path) -> None:
    found = posterior(method)
    call = lambda: pl.export_adapters(found, tmp_path / "out", 2)  # noqa: E731
    seeded(call)
    as_value = found if isinstance(found, pl.Posterior) else None
    if as_value is not None and not method.startswith("subspace"):
        draws = seeded(lambda: found.sample(2))
        (lora,) = found.networks
        with torch.no_grad(), lora.bind({s: x[1] for s, x in draws.items()}) as net:
            expected = net(**inputs(task().batches[0])).logits
        base = networks.without_peft(copy.deepcopy(lora.network))
        served = PeftModel.from_pretrained(base, tmp_path / "out" / "draw_001").eval()
        with torch.no_grad():
            logits = served(**inputs(task().batches[0])).logits
        assert_close(logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_it_says_what_it_is(method: str) -> None:
    found = posterior(method)
    if isinstance(found, pl.Posterior):
        assert "gaussian=" in repr(found)
        assert found.gaussians() == []
        assert found.num_samples is None


# BLoB


def linear(num_data: int = 8) -> tuple[Any, Any, Batch]:
    """Regression on a network that is linear in A: B is what it is."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(3, 2, bias=False)).double()
    network = networks.adapted(layers, r=2, lora_alpha=2, target_modules=["0"])
    lora = pl.lift(network, prior=pl.priors.normal(0.7))

    def model(x: Tensor, labels: Tensor | None = None) -> None:
        f = lora()(x)
        with pyro.plate("data", num_data, subsample=x):
            pyro.sample("y", dist.Normal(f, 0.5).to_event(1), obs=labels)

    x = torch.randn(num_data, 3).double()
    return lora, model, {"x": x, "labels": torch.randn(num_data, 2).double()}


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_blob_has_the_elbo_of_the_closed_form(elbo: Any) -> None:
    lora, model, data = linear()
    guide = pl.methods.blob(model, init_loc_fn=lora.init_to_adapter(), init_scale=0.3)
    guide(**data)
    (path, (b, a)) = next(iter(lora.delta_weight_factors(lora.weights()).items()))
    base: Any = lora.network.get_submodule(path)
    x, y = data["x"], data["labels"]
    # f = (W + b A) x with A ~ N(m, s^2): mean (W + b m) x, variance s^2 |x|^2 (b^2) 1.
    mean = x @ (base.base_layer.weight + b @ a).mT
    variance = 0.3**2 * x.square().sum(1, keepdim=True) * b.square().sum(1)
    error = (y - mean).square() + variance
    log_likelihood = -0.5 * (error / 0.25 + math.log(2 * math.pi * 0.25)).sum()
    prior = dist.Normal(torch.zeros(()).double(), 0.7)
    q = dist.Normal(a, torch.full_like(a, 0.3))
    kl = torch.distributions.kl_divergence(q, prior).sum()
    own_b = next(v for s, v in lora.weights().items() if s.endswith(".B"))
    expected = float((log_likelihood - kl + prior.log_prob(own_b).sum()).detach())
    pyro.set_rng_seed(0)
    vectorised = elbo(200, 1, vectorize_particles=True)
    each = torch.tensor([-vectorised.loss(model, guide, **data) for _ in range(20)])
    error_of_mean = float(each.std()) / math.sqrt(len(each))
    assert abs(float(each.mean()) - expected) < 5 * error_of_mean
    assert error_of_mean < 0.02 * abs(expected)
    # log p(A) - log q(A) of one draw, whose mean the KL divergence is
    trace = poutine.trace(guide).get_trace(**data)
    site = next(s for s in lora.sites if s.endswith(".A"))
    draw = trace.nodes[site]["value"]
    assert_close(
        trace.log_prob_sum().detach(), q.log_prob(draw[0]).sum(), rtol=1e-6, atol=1e-6
    )


def test_blob_ends_in_the_mean_field_optimum() -> None:
    lora, model, data = linear()
    # With B fixed by its own prior's width the posterior of A is Gaussian, and the best
    # product of normals has the inverses of the precision's diagonal as variances.
    b_site = next(s for s in lora.sites if s.endswith(".B"))
    fixed = poutine.condition(model, {b_site: lora.weights()[b_site]})
    guide = pl.methods.blob(fixed, init_loc_fn=lora.init_to_adapter(), init_scale=0.2)
    svi = SVI(
        fixed, guide, Adam({"lr": 0.02}), Trace_ELBO(30, 1, vectorize_particles=True)
    )
    pyro.set_rng_seed(0)
    for _ in range(250):
        svi.step(**data)
    ((_, (b, a)),) = lora.delta_weight_factors(lora.weights()).items()
    x = data["x"]
    precision = torch.kron(b.mT @ b, x.mT @ x).detach() / 0.25 + torch.eye(6) / 0.7**2
    found = pl.methods.mean_field(guide)
    (scale,) = found.scale.values()
    expected = precision.diagonal().rsqrt().reshape(a.shape)
    assert_close(scale[0], expected, rtol=0.1, atol=0)


def test_blob_says_which_sites_it_could_take() -> None:
    t = Task()
    start = t.lora.init_to_adapter()
    guide = pl.methods.blob(t.model, init_loc_fn=start, sites="*.C")
    with pytest.raises(ValueError, match=r"no latent site .*'\*\.C'.*'\*\.A' and"):
        guide(**t.batches[0])
    for wrong, error in (({"init_scale": 0.0}, ValueError), ({"sites": 3}, TypeError)):
        with pytest.raises(error, match=next(iter(wrong))):
            pl.methods.blob(t.model, init_loc_fn=start, **wrong)
    ranks = bert(2, rank_pattern={"layer.0.attention.self.query": 5})
    lora = pl.lift(ranks)
    model = pl.models.classification(lora, NUM)
    guide = pl.methods.blob(model, init_loc_fn=lora.init_to_adapter())
    guide(**t.batches[0])
    scale = pl.methods.mean_field(guide).scale
    assert scale.keys() == {s for s in lora.sites if ".A" in s}
    assert len(scale) == 3
    b_random = pl.methods.blob(t.model, init_loc_fn=start, sites="*.B")
    b_random(**t.batches[0])
    assert all(s.endswith(".B") for s in pl.methods.mean_field(b_random).scale)


# TFB


def loss(lora: Any, batches: list[Batch], draws: Any, labels: Any = None) -> float:
    """Nats a datum, averaged over draws, by the network alone."""
    losses = []
    for s in range(len(next(iter(draws.values())))):
        with torch.no_grad(), lora.bind({k: x[s] for k, x in draws.items()}) as net:
            logits = torch.cat([net(**inputs(b)).logits for b in batches])
        given = torch.cat([b["labels"] for b in batches]) if labels is None else labels
        losses.append(-logits.log_softmax(-1).gather(1, given[:, None]).mean())
    return float(torch.stack(losses).mean())


def confident() -> Task:
    """A task whose labels are the network's own, so that noise can only harm."""
    t = Task()
    for b in t.batches:
        with torch.no_grad():
            b["labels"] = t.lora.network(**inputs(b)).logits.argmax(-1)
    return t


def test_tfb_has_the_covariance_of_the_update_of_the_paper() -> None:
    t = confident()
    found = pl.methods.tfb(t.model, t.batches, tolerance=0.05, progress_bar=False)
    factors = t.lora.delta_weight_factors(t.lora.weights())
    sigmas = []
    for site, rows in found.rows.items():
        for name, r in zip(t.lora.sites[site], rows, strict=True):
            b, _ = factors[name.partition(".lora_A")[0]]
            # Cov of a column of s B A is s B R R^T B^T s, to be sigma^2 U U^T.
            u = torch.linalg.svd(b, full_matrices=False).U
            of_column = b @ r @ r.mT @ b.mT
            sigmas.append(float((u.mT @ of_column @ u).diagonal().mean()) ** 0.5)
            assert_close(of_column, sigmas[-1] ** 2 * u @ u.mT, rtol=1e-7, atol=1e-12)
    assert_close(torch.tensor(sigmas), torch.full((4,), sigmas[0]), rtol=1e-6, atol=0)
    points = t.lora.sites.keys() - found.rows.keys()
    draws = found.sample(2)
    for site in points:
        assert torch.equal(draws[site][1], t.lora.weights()[site])
    assert {site.rpartition(".")[2] for site in found.rows} == {"A"}


@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("tolerance", [0.02, 0.2])
def test_tfb_is_as_wide_as_the_tolerance_allows(
    tolerance: float, with_labels: bool
) -> None:
    t = confident()
    given = t.batches if with_labels else [inputs(b) for b in t.batches]
    before = t.lora.weights()
    pyro.set_rng_seed(3)
    found = pl.methods.tfb(
        t.model, given, tolerance=tolerance, num_samples=4, progress_bar=False
    )
    pyro.set_rng_seed(3)
    draws = found.sample(4)  # those of the search, at the width that it found
    mode = found.mode()
    least = loss(t.lora, t.batches, {s: x[None] for s, x in mode.items()})

    def at(scale: float) -> float:
        wider = {s: mode[s] + scale * (x - mode[s]) for s, x in draws.items()}
        return loss(t.lora, t.batches, wider)

    assert at(1.0) <= least + tolerance + 1e-9
    assert at(1 + 2**-6) > least + tolerance
    for site, x in t.lora.weights().items():
        assert torch.equal(x, before[site])


def in_a_dim_of_its_own(t: Task) -> Any:
    def model(labels: Tensor | None = None, **texts: Tensor) -> None:
        logits = t.lora()(**texts).logits[..., None, :]
        obs = None if labels is None else labels[:, None]
        with pyro.plate("data", NUM, dim=-2, subsample=texts["input_ids"]):
            pyro.sample("y", dist.Categorical(logits=logits), obs=obs)

    return model


def in_a_plate_of_a_batch(t: Task) -> Any:
    def model(labels: Tensor | None = None, **texts: Tensor) -> None:
        logits = t.lora()(**texts).logits
        size = logits.shape[-2]
        with poutine.scale(scale=NUM / size), pyro.plate("data", size):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    return model


def in_no_plate(t: Task) -> Any:
    def model(labels: Tensor | None = None, **texts: Tensor) -> None:
        logits = t.lora()(**texts).logits
        pyro.sample("y", dist.Categorical(logits=logits).to_event(1), obs=labels)

    return model


def test_tfb_counts_data_as_the_model_has_them() -> None:
    t = confident()
    whole = [
        {
            k: torch.cat([b[k][:, :7] if b[k].ndim > 1 else b[k] for b in t.batches])
            for k in t.batches[0]
        }
    ]
    parts = [{k: x[i : i + 5] for k, x in whole[0].items()} for i in (0, 5)]

    def width(model: Any, batches: list[Batch], tolerance: float = 0.05) -> Tensor:
        pyro.set_rng_seed(0)
        found = pl.methods.tfb(
            model, batches, tolerance=tolerance, num_samples=3, progress_bar=False
        )
        return next(iter(found.rows.values()))

    expected = width(t.model, whole)
    for batches in (whole, parts):
        assert_same(width(in_a_dim_of_its_own(t), batches), expected, rtol=1e-6)
    assert_same(width(in_a_plate_of_a_batch(t), whole), expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"hold 10 data, .* the size of a batch, 5"):
        width(in_a_plate_of_a_batch(t), parts)
    one_datum = width(in_no_plate(t), whole, 0.05 * NUM)
    assert_same(one_datum, expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"tfb: .* hold 2 data, .* is in no plate"):
        width(in_no_plate(t), parts)


def test_tfb_says_what_it_lacks() -> None:
    t = Task()
    with pytest.raises(ValueError, match="There are no batches"):
        pl.methods.tfb(t.model, [])
    with pytest.raises(ValueError, match="tolerance"):
        pl.methods.tfb(t.model, t.batches, tolerance=0.0)
    zero = {s: 0 * x if s.endswith(".B") else x for s, x in t.lora.weights().items()}
    with pytest.raises(ValueError, match=r"found none whose B isn't 0 .*Train the"):
        pl.methods.tfb(t.model, t.batches, weights=zero)
    lora = pl.lift(bert(1))
    model = pl.models.regression(lora, NUM)
    real = [{**b, "labels": torch.randn(len(b["labels"])).double()} for b in t.batches]
    with pytest.raises(ValueError, match=r"latent sites \['noise'\]"):
        pl.methods.tfb(model, real)
    with pytest.raises(ValueError, match=r"no labels for site 'y', and its Normal"):
        pl.methods.tfb(
            pl.models.regression(lora, NUM, 1.0), [inputs(b) for b in t.batches]
        )
    noise = {"noise": torch.tensor(0.5).double()}
    found = pl.methods.tfb(model, real, weights=noise, num_samples=1)
    assert found.loc["noise"] == 0.5


def test_tfb_says_where_no_width_costs_anything() -> None:
    t = Task()
    with torch.no_grad():
        head = t.lora.network.base_model.model.classifier
        for x in head.modules_to_save["default"].parameters():
            x.zero_()  # so that every draw is at chance, as the adapter is
    with pytest.warns(UserWarning, match=r"^No width up to .* costs 0.05 nats"):
        found = pl.methods.tfb(t.model, t.batches, num_samples=1)
    assert all(x.isfinite().all() for x in found.variance().values())


def test_tfb_takes_directions_that_b_hardly_has() -> None:
    t = confident()
    weights = t.lora.weights()
    for site, x in weights.items():
        if site.endswith(".B"):
            x[..., 0] = x[..., 1]  # of rank two in three columns
            x[1] = 0  # a layer that isn't adapted
    found = pl.methods.tfb(
        t.model, t.batches, weights=weights, num_samples=2, progress_bar=False
    )
    draws = found.sample(3)
    assert found.log_prob(draws).isfinite().all()
    factors = t.lora.delta_weight_factors(draws)
    at = t.lora.delta_weight_factors(weights)
    for path, (b, a) in factors.items():
        moved = b @ a - at[path][0] @ at[path][1]
        assert moved.abs().max() < 1e3  # whatever A is


# Subspace inference


@pytest.mark.parametrize("lead", [(), (5,), (5, 1)])
def test_subspace_weighs_the_components_of_the_adapter(lead: tuple[int, ...]) -> None:
    t = Task()
    lora = t.lora.with_prior(pl.priors.subspace(0.3))
    latents = {
        f"prior.subspace.{s}": torch.randn(*lead, *x.shape[:2]).double()
        for s, x in lora.weights().items()
        if s.endswith(".A")
    }
    trace: Any = poutine.trace(
        poutine.condition(pl.models.classification(lora, NUM), latents)
    ).get_trace(**inputs(t.batches[0]))
    own, made = lora.weights(), {s: trace.nodes[s]["value"] for s in lora.sites}
    factors = lora.delta_weight_factors(
        {s: x.expand(*lead, *own[s].shape) for s, x in made.items()}
    )
    adapter = lora.delta_weight_factors(own)
    for site, names in lora.sites.items():
        if not site.endswith(".A"):
            assert torch.equal(made[site], own[site])
            continue
        for layer, name in enumerate(names):
            path = name.partition(".lora_A")[0]
            (b, a), v = adapter[path], latents[f"prior.subspace.{site}"][..., layer, :]
            expected = b @ torch.diag_embed(v) @ a
            found_b, found_a = factors[path]
            assert_same(found_b @ found_a, expected)
    assert trace.nodes["y"]["fn"].logits.shape == (*lead[:1], 6, 2)


def test_the_density_of_a_subspace_is_that_of_its_numbers() -> None:
    t = Task()
    lora = t.lora.with_prior(pl.priors.subspace(0.3, center=0.5))
    trace: Any = poutine.trace(lora).get_trace()
    values = [trace.nodes[n]["value"] for n in trace.nodes if n.startswith("prior.")]
    assert sum(x.numel() for x in values) == 2 * 2 * 3  # kinds, layers, ranks
    fn = dist.Normal(*torch.tensor([0.5, 0.3], dtype=torch.float64))
    expected = sum(fn.log_prob(x).sum() for x in values)
    assert_same(trace.log_prob_sum(), expected)


def test_subspace_inference_finds_the_exact_posterior() -> None:
    """The network is linear in the numbers, so that it is a Gaussian."""
    lora, _, data = linear(12)
    lora = lora.with_prior(pl.priors.subspace(0.8))

    def model(x: Tensor, labels: Tensor | None = None) -> None:
        f = lora()(x)
        with pyro.plate("data", 12, subsample=x):
            pyro.sample("y", dist.Normal(f, 0.5).to_event(1), obs=labels)

    guide = AutoMultivariateNormal(model, init_loc_fn=lora.init_to_adapter())
    elbo = Trace_ELBO(20, 1, vectorize_particles=True)
    svi = SVI(model, guide, Adam({"lr": 0.03}), elbo)
    pyro.set_rng_seed(0)
    for _ in range(300):
        svi.step(**data)
    ((path, (b, a)),) = lora.delta_weight_factors(lora.weights()).items()
    base: Any = lora.network.get_submodule(path)
    x, y = data["x"], data["labels"]
    rest = (y - x @ base.base_layer.weight.mT).detach()
    design = torch.einsum("or,nr->nor", b, x @ a.mT).flatten(0, 1).detach()
    precision = design.mT @ design / 0.25 + torch.eye(2).double() / 0.8**2
    shift = design.mT @ rest.flatten() / 0.25 + 1.0 / 0.8**2
    covariance = torch.linalg.inv(precision)
    q = guide.get_posterior()
    sd = covariance.diagonal().sqrt()
    assert ((q.mean - covariance @ shift).abs() < 0.15 * sd).all()
    assert_close(
        q.covariance_matrix.detach(),
        covariance,
        rtol=0.25,
        atol=0.05 * float(sd.max()) ** 2,
    )


def test_heads_beside_a_subspace_may_be_random() -> None:
    t = Task()
    prior = pl.priors.by_site(
        {"head.*": pl.priors.normal(1.0), "*": pl.priors.subspace()}
    )
    lora = t.lora.with_prior(prior)
    model = pl.models.classification(lora, NUM)
    guide = AutoNormal(model, init_loc_fn=lora.init_to_adapter(), init_scale=0.01)
    t.trained(guide, model)
    found = pl.methods.mean_field(guide)
    heads = {s for s in lora.sites if s.startswith("head.")}
    assert heads < found.loc.keys()
    assert len(found.loc) == len(heads) + 2
    prediction = pl.predict(found, t.batches, num_samples=3)
    assert prediction.probs.shape == (NUM, 2)


def test_what_is_no_subspace_is_refused() -> None:
    t = Task()
    with pytest.raises(ValueError, match=r"expected factors of shape .*, found none"):
        t.lora.with_prior(pl.priors.subspace(factors={}))()
    with pytest.raises(ValueError, match="scale"):
        pl.priors.subspace(0.0)
    only_heads = pl.priors.by_site(
        {"head.*": pl.priors.subspace(), "*": pl.priors.normal()}
    )
    with pytest.raises(ValueError, match="needs LoRA matrices A"):
        t.lora.with_prior(only_heads)()


# IVON


@pytest.mark.parametrize("radius", [None, 0.4])
def test_ivon_is_the_papers_algorithm(radius: float | None) -> None:
    """Three steps by hand, of one number each, with the noise of the generator."""
    torch.manual_seed(0)
    num_data, tau, lr, (beta1, beta2), h0 = 50, 2.0, 0.3, (0.8, 0.9), 0.5
    p = nn.Parameter(torch.tensor([1.0, -2.0]).double())
    slope = torch.tensor([0.7, 3.0]).double()

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = (slope * p.square() / 2 + p.sin()).sum()
        value.backward()
        return value

    optimizer = pl.methods.IVON(
        [p],
        lr,
        num_data=num_data,
        prior_precision=tau,
        betas=(beta1, beta2),
        init_hessian=h0,
        clip_radius=radius,
    )
    is_cut = []
    m, g = p.detach().clone(), torch.zeros(2).double()
    h, delta = torch.full((2,), h0).double(), tau / num_data
    for step in (1, 2, 3):
        state = torch.get_rng_state()
        optimizer.step(closure)
        torch.set_rng_state(state)
        sigma = (num_data * (h + delta)).rsqrt()
        theta = m + sigma * torch.randn(2, dtype=torch.float64)
        gradient = slope * theta + theta.cos()
        estimate = gradient * (theta - m) / sigma**2
        g = beta1 * g + (1 - beta1) * gradient
        h = (
            beta2 * h
            + (1 - beta2) * estimate
            + (1 - beta2) ** 2 * (h - estimate) ** 2 / (2 * (h + delta))
        )
        corrected = g / (1 - beta1**step)
        d = (h0 + delta) * (corrected + delta * m) / (h + delta)
        is_cut.append(d.abs() > (radius or math.inf))
        m = m - lr * torch.where(is_cut[-1], d.sign() * (radius or 0), d)
        assert_same(p.detach(), m)
        assert_same(optimizer.state[p]["hessian"], h)
    cut = torch.stack(is_cut)
    assert not cut.all()
    assert bool(cut.any()) is (radius is not None)


def test_ivon_finds_the_hessian_of_a_quadratic() -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(40).double())
    hessian = torch.linspace(0.5, 4, 40).double()
    minimum = torch.randn(40).double()
    num_data, tau, num_steps = 200, 4.0, 2000
    optimizer = pl.methods.IVON(
        [p], 0.05, num_data=num_data, prior_precision=tau, betas=(0.9, 0.997)
    )
    mean, curvature = torch.zeros(40).double(), torch.zeros(40).double()
    for step in range(num_steps):
        optimizer.zero_grad()
        with optimizer.sampled():
            (hessian * (p - minimum).square() / 2).sum().backward()
        optimizer.step()
        if step >= num_steps // 2:
            mean += p.detach() / (num_steps // 2)
            curvature += optimizer.state[p]["hessian"] / (num_steps // 2)
    # Of g (w - m) / sigma^2 with g = H (w - m), the mean is H and the variance 2 H^2;
    # an average over 1000 steps has a standard error of H sqrt(2 / 1000), and its
    # weights, which forget after 300, leave a bias of less than that.
    ratio = curvature / hessian
    assert float((ratio - 1).abs().max()) < 5 * math.sqrt(2 / 500)
    assert abs(float(ratio.mean()) - 1) < 5 * math.sqrt(2 / 500 / 40)
    delta = tau / num_data
    sd = (num_data * hessian + tau).rsqrt()
    assert ((mean - hessian * minimum / (hessian + delta)).abs() < sd).all()


def test_ivons_precision_is_that_of_hessian_and_prior() -> None:
    lora = pl.lift(bert(2), prior=pl.priors.normal(3**-0.5))
    optimizer = pl.methods.IVON(
        lora.network.parameters(), 0.1, num_data=7, prior_precision=3.0
    )
    with optimizer.sampled():
        lora.network(**batch()).loss.backward()
    optimizer.step()
    found = optimizer.posterior(lora)
    assert found.scale.keys() == set(lora.sites)
    for site, members in lora.parameters.items():
        assert_same(found.loc[site], lora.weights()[site])
        for member, sd in zip(members, found.scale[site], strict=True):
            h = optimizer.state[member.parameter]["hessian"]
            assert_same(sd.pow(-2), 7 * h + 3.0)


def test_ivon_leaves_the_weights_at_their_mean() -> None:
    lora = pl.lift(bert(2))
    data = batch()
    optimizer = pl.methods.IVON(lora.network.parameters(), 0.1, num_data=5)
    before = lora.weights()
    with optimizer.sampled():
        assert any(not torch.equal(x, before[s]) for s, x in lora.weights().items())
        with pytest.raises(RuntimeError, match="draw already"), optimizer.sampled():
            pass
        with pytest.raises(RuntimeError, match="leave the block of sampled"):
            optimizer.posterior(lora)
        with pytest.raises(RuntimeError, match="after the block"):
            optimizer.step()
        lora.network(**data).loss.backward()
    for site, x in lora.weights().items():
        assert torch.equal(x, before[site])
    with pytest.raises(KeyError), optimizer.sampled():
        raise KeyError
    for site, x in lora.weights().items():
        assert torch.equal(x, before[site])
    optimizer.step()
    assert any(not torch.equal(x, before[s]) for s, x in lora.weights().items())


def test_ivon_adds_up_the_gradients_of_several_draws() -> None:
    p = nn.Parameter(torch.ones(3).double())
    optimizer = pl.methods.IVON([p], 0.1, num_data=5)
    gradients, noises = [], []
    for _ in range(2):
        with optimizer.sampled():
            noises.append(p.detach() - 1)
            (p.pow(3).sum() / 2).backward()
            assert p.grad is not None
            gradients.append(p.grad.clone())
    assert_same(p.grad, gradients[0] + gradients[1])
    estimates = [
        g * n * (5 * 1.0 + 1.0) for g, n in zip(gradients, noises, strict=True)
    ]
    assert_same(optimizer.state[p]["estimate"], estimates[0] + estimates[1])


def test_ivon_forgets_gradients_wherever_they_are_zeroed() -> None:
    p = nn.Parameter(torch.ones(3).double())
    optimizer = pl.methods.IVON([p], 0.1, num_data=5)
    for _ in range(2):
        with optimizer.sampled():
            optimizer.zero_grad()
            p.pow(3).sum().backward()
            assert p.grad is not None
            own = p.grad.clone()
    assert_same(p.grad, own)
    optimizer.zero_grad()
    assert p.grad is None
    assert "estimate" not in optimizer.state[p]


@pytest.mark.parametrize("unscales", [False, True])
def test_ivon_is_the_same_whatever_the_loss_is_scaled_by(unscales: bool) -> None:
    def trained(scale: float) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        p = nn.Parameter(torch.ones(3).double())
        optimizer = pl.methods.IVON([p], 0.1, num_data=5)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for _ in range(3):
            optimizer.zero_grad()
            with optimizer.sampled(scaler):
                scaler.scale(p.pow(4).sum()).backward()
            if unscales:  # as before gradients are clipped
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        return p.detach(), optimizer.state[p]["hessian"]

    for found, expected in zip(trained(2.0**16), trained(1.0), strict=True):
        assert_same(found, expected)


def test_ivon_leaves_out_a_step_that_overflows() -> None:
    p = nn.Parameter(torch.ones(3).double())
    optimizer = pl.methods.IVON([p], 0.1, num_data=5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with optimizer.sampled(scaler):
        scaler.scale(p.sum() / 0).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(p.detach(), torch.ones(3).double())
    assert "step" not in optimizer.state[p]
    optimizer.zero_grad()
    with optimizer.sampled():  # which isn't told
        scaler.scale(p.sum()).backward()
    with pytest.raises(RuntimeError, match=r"GradScaler.*optimizer\.sampled\(scaler\)"):
        scaler.step(optimizer)


def test_a_curvature_that_is_no_number_is_refused() -> None:
    lora = pl.lift(bert(2))
    optimizer = pl.methods.IVON(lora.network.parameters(), 0.1, num_data=5)
    with optimizer.sampled():
        (lora.network(**batch()).loss * float("nan")).backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"curvature is NaN or infinite.*lower lr"):
        optimizer.posterior(lora)


def test_ivon_goes_on_from_its_state() -> None:
    def steps(number: int, state: Any = None, value: Any = None) -> tuple[Any, Any]:
        p = nn.Parameter(torch.ones(3).double() if value is None else value.clone())
        optimizer = pl.methods.IVON([p], 0.1, num_data=5)
        if state is not None:
            optimizer.load_state_dict(state)
        for _ in range(number):
            optimizer.zero_grad()
            with optimizer.sampled():
                p.pow(4).sum().backward()
            optimizer.step()
        return p, optimizer

    torch.manual_seed(0)
    whole, _ = steps(4)
    torch.manual_seed(0)
    half, optimizer = steps(2)
    state = optimizer.state_dict()
    del state["param_groups"][0]["clip_radius"]  # as of an earlier version
    again, _ = steps(2, state, half.detach())
    assert_same(again.detach(), whole.detach())


def test_ivon_says_what_is_wrong() -> None:
    p = nn.Parameter(torch.ones(2))
    for wrong in (
        {"num_data": 0},
        {"num_data": 5, "betas": (0.9, 1.0)},
        {"num_data": 5, "init_hessian": 0.0},
        {"num_data": 5, "prior_precision": -1.0},
        {"num_data": 5, "clip_radius": 0.0},
    ):
        with pytest.raises(ValueError, match=list(wrong)[-1]):
            pl.methods.IVON([p], 0.1, **wrong)  # type: ignore[arg-type]
    optimizer = pl.methods.IVON([p], 0.1, num_data=5)
    p.square().sum().backward()
    with pytest.raises(RuntimeError, match=r"with optimizer\.sampled\(\)"):
        optimizer.step()
    lora = pl.lift(bert(2))
    with pytest.raises(ValueError, match="none of the network's parameters"):
        optimizer.posterior(lora)
    strong = pl.methods.IVON(
        lora.network.parameters(), 0.1, num_data=5, prior_precision=9.0
    )
    with strong.sampled():
        lora.network(**batch()).loss.backward()
    strong.step()
    with pytest.warns(
        UserWarning, match=r"lifted with, normal\(.*prior=priors\.normal"
    ):
        strong.posterior(lora)
    strong.posterior(lora.with_prior(pl.priors.normal(1 / 3)))
    untrained = pl.methods.IVON(lora.network.parameters(), 0.1, num_data=5)
    untrained.zero_grad()
    with untrained.sampled():
        lora.network(**batch()).loss.backward()
    with pytest.raises(ValueError, match="take a step"):
        untrained.posterior(lora)
    untrained.step()
    untrained.posterior(lora)
    first = next(n for n in lora.sites if len(lora.sites[n]) > 1)
    part = [lora.parameters[first][0].parameter]
    optimizer = pl.methods.IVON(part, 0.1, num_data=5)
    with optimizer.sampled():
        lora.network(**batch()).loss.backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"trains 1 of its 2 parameters"):
        optimizer.posterior(lora)


# SWAG


def test_swag_has_the_covariances_of_numpy() -> None:
    t = Task()
    iterates = t.iterates(7)

    def stream() -> Iterator[dict[str, Tensor]]:
        yield from iterates

    found = pl.methods.swag(t.lora, stream(), rank=5)
    flat = np.stack([flatten(i).numpy() for i in iterates])
    mean = flat.mean(0)
    d = flat[-5:] - mean
    expected = np.diag(flat.var(0)) / 2 + d.T @ d / (2 * 4)
    v = torch.cat([x.flatten(1) for x in found.deviations.values()], 1)
    scale = flatten(found.scale)
    assert_close(flatten(found.mean()).numpy(), mean, rtol=0, atol=1e-12)
    assert_close(
        (torch.diag(scale.square()) + v.mT @ v).numpy(), expected, rtol=1e-8, atol=1e-12
    )
    whole = pl.methods.swag(t.lora, iterates, rank=7)
    v = torch.cat([x.flatten(1) for x in whole.deviations.values()], 1)
    assert_close((2 * v.mT @ v).numpy(), np.cov(flat.T), rtol=1e-8, atol=1e-12)
    draws = whole.sample(2)
    covariance = torch.diag(flatten(whole.scale).square()) + v.mT @ v
    exact = dist.MultivariateNormal(torch.from_numpy(mean), covariance)
    at = torch.cat([draws[s].flatten(1) for s in whole.loc], 1)
    assert_close(whole.log_prob(draws), exact.log_prob(at), rtol=1e-9, atol=1e-7)


def test_swag_copies_the_weights_that_go_on_changing() -> None:
    t = Task()
    names = dict(t.lora.network.named_parameters())

    def training() -> Iterator[dict[str, Tensor]]:
        for step in range(3):
            assert torch.is_grad_enabled()  # it trains
            shared = {
                s: torch.stack([names[n].data for n in ns])
                for s, ns in t.lora.sites.items()
            }
            yield shared
            for x in shared.values():
                x += step  # after it was given

    found = pl.methods.swag(t.lora, training())
    assert max(float(x.max()) for x in found.scale.values()) < 1e-10


def test_swag_says_what_is_wrong() -> None:
    t = Task()
    with pytest.raises(ValueError, match="two iterates at least, found 1"):
        pl.methods.swag(t.lora, t.iterates(1))
    wrong = {s: x * float("nan") for s, x in t.lora.weights().items()}
    with pytest.raises(ValueError, match=r"Site '.*': an iterate is NaN or infinite"):
        pl.methods.swag(t.lora, [*t.iterates(2), wrong])
    with pytest.raises(ValueError, match="rank must be at least 2"):
        pl.methods.swag(t.lora, t.iterates(), rank=1)
    one, two = t.iterates(2)
    two.pop(next(iter(two)))
    with pytest.raises(ValueError, match=r"Iterate 1 differs from the network in \["):
        pl.methods.swag(t.lora, [one, two])
