"""Priors with hyper-latents: densities by scipy, scales that the data determine."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor, nn
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora.likelihood.model_trace import trace_at
from pyro_lora.priors import Prior
from tests.networks import bert

Hyper = Callable[..., Prior]


def trace_of(lora: pl.LiftedNetwork) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values and log densities of one draw, by site."""
    trace = poutine.trace(lora).get_trace()
    trace.compute_log_prob()
    nodes = {n: x for n, x in trace.nodes.items() if x["type"] == "sample"}
    return (
        {name: node["value"] for name, node in nodes.items()},
        {name: node["log_prob"] for name, node in nodes.items()},
    )


def scipy_sum(fn: Any, value: Tensor) -> Tensor:
    return torch.tensor(fn.logpdf(value.numpy()).sum(), dtype=torch.float64)


def first(lora: pl.LiftedNetwork) -> str:
    return next(iter(lora.sites))


def horseshoe_scale(
    lora: pl.LiftedNetwork, values: dict[str, Tensor], site: str
) -> Tensor:
    tau = values[f"prior.global_scale.{first(lora)}"]
    c2 = values[f"prior.slab_variance.{first(lora)}"]
    local = values[f"prior.local_scale.{site}"]
    local = local.reshape(*local.shape, *[1] * (values[site].ndim - local.ndim))
    variance = tau**2 * c2 * local**2 / (c2 + tau**2 * local**2)
    return variance.sqrt().expand(values[site].shape)


def layer_scale(lora: pl.LiftedNetwork, values: dict[str, Tensor], site: str) -> Tensor:
    scale = values[f"prior.log_scale.{site}"].exp()
    value = values[site]
    return scale.reshape(-1, *[1] * (value.ndim - 1)).expand(value.shape)


def component_scale(
    lora: pl.LiftedNetwork, values: dict[str, Tensor], site: str
) -> Tensor:
    value = values[site]
    if site.startswith("head."):
        return torch.full_like(value, 0.7)
    sd = values[f"prior.rank_precision.{site[:-1]}A"] ** -0.5  # (L, R)
    return (sd[:, :, None] if site.endswith("A") else sd[:, None]).expand(value.shape)


HYPER: dict[str, tuple[Hyper, Callable[..., Tensor]]] = {
    "horseshoe": (partial(pl.priors.horseshoe, 0.2), horseshoe_scale),
    "horseshoe, rows": (
        partial(pl.priors.horseshoe, 0.2, per="row"),
        horseshoe_scale,
    ),
    "hierarchical": (partial(pl.priors.hierarchical, 2.0), layer_scale),
    "rank_ard": (partial(pl.priors.rank_ard, 2.0, other_scale=0.7), component_scale),
}
each_prior = pytest.mark.parametrize("name", list(HYPER))


@each_prior
def test_given_their_scales_weights_are_normal(name: str) -> None:
    prior, scale_of = HYPER[name]
    lora = pl.lift(bert(), prior=prior())
    for _ in range(3):
        values, log_probs = trace_of(lora)
        for site in lora.sites:
            normal = scipy.stats.norm(scale=scale_of(lora, values, site).numpy())
            expected = scipy_sum(normal, values[site])
            assert_close(log_probs[site], expected, rtol=1e-8, atol=1e-8)


@each_prior
def test_the_non_centred_form_is_the_same_prior(name: str) -> None:
    prior, scale_of = HYPER[name]
    lora = pl.lift(bert(), prior=prior(centered=False))
    values, log_probs = trace_of(lora)
    lora = lora.with_prior(prior())
    trace = trace_at(lambda: lora(), values, {})
    trace.compute_log_prob()
    # Change of variables: w = scale z.
    jacobian = sum(scale_of(lora, values, site).log().sum() for site in lora.sites)
    centered = trace.log_prob_sum()
    non_centered = torch.stack(list(log_probs.values())).sum()
    assert_close(centered, non_centered - jacobian, rtol=1e-10, atol=0)


@pytest.mark.grid
@each_prior
@pytest.mark.parametrize("centered", [True, False])
def test_draws_have_the_moments_of_their_scales(name: str, centered: bool) -> None:
    prior, scale_of = HYPER[name]
    lora = pl.lift(bert(), prior=prior(centered=centered))
    noise = []
    for _ in range(30):
        values, _ = trace_of(lora)
        noise += [
            (values[site] / scale_of(lora, values, site)).flatten()
            for site in lora.sites
        ]
    z = torch.cat(noise)
    # Standard errors of the mean, the variance and the fourth moment of n normals.
    n = z.numel()
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 5 * (96 / n) ** 0.5


@pytest.mark.parametrize("per", ["weight", "row"])
def test_horseshoe_scales_have_scipys_densities(per: Any) -> None:
    prior = pl.priors.horseshoe(0.3, slab_scale=2.0, slab_df=5.0, per=per)
    lora = pl.lift(bert(), prior=prior)
    values, log_probs = trace_of(lora)
    name = f"prior.global_scale.{first(lora)}"
    expected = scipy_sum(scipy.stats.halfcauchy(scale=0.3), values[name])
    assert_close(log_probs[name], expected, rtol=1e-7, atol=1e-7)
    name = f"prior.slab_variance.{first(lora)}"
    inverse_gamma = scipy.stats.invgamma(2.5, scale=2.5 * 4)
    expected = scipy_sum(inverse_gamma, values[name])
    assert_close(log_probs[name], expected, rtol=1e-7, atol=1e-7)
    for site, weights in lora.weights().items():
        name = f"prior.local_scale.{site}"
        shape = weights.shape if per == "weight" else weights.shape[:2]
        assert values[name].shape == shape
        expected = scipy_sum(scipy.stats.halfcauchy(), values[name])
        assert_close(log_probs[name], expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("centered_scales", [True, False])
def test_layer_scales_have_scipys_densities(centered_scales: bool) -> None:
    prior = pl.priors.hierarchical(
        2.0,
        scale_spread=0.7,
        role_spread=0.4,
        layer_spread=0.3,
        centered_scales=centered_scales,
    )
    lora = pl.lift(bert(), prior=prior)
    values, log_probs = trace_of(lora)
    at = {
        name.removeprefix("prior.").removesuffix("." + first(lora)): name
        for name in values
        if name.startswith("prior.")
    }
    mean = values[at["mean_log_scale"]]
    role_sd, layer_sd = (values[at[f"{x}_spread"]] for x in ("role", "layer"))
    roles = values[at["role_log_scale"]]
    norm, halfnorm = scipy.stats.norm, scipy.stats.halfnorm
    expected = {
        "mean_log_scale": scipy_sum(norm(torch.tensor(2.0).log(), 0.7), mean),
        "role_spread": scipy_sum(halfnorm(scale=0.4), role_sd),
        "layer_spread": scipy_sum(halfnorm(scale=0.3), layer_sd),
    }
    for name, value in expected.items():
        assert_close(log_probs[at[name]], value, rtol=1e-6, atol=1e-6)
    total = scipy_sum(norm(mean, role_sd), roles)
    jacobian = role_sd.log() * len(roles)
    for role, site in zip(roles, lora.sites, strict=True):
        scales = values[f"prior.log_scale.{site}"]
        assert scales.shape == (len(lora.weights()[site]),)
        total += scipy_sum(norm(role, layer_sd), scales)
        jacobian += layer_sd.log() * len(scales)
    log_prob = sum(
        x for n, x in log_probs.items() if "log_scale" in n and "mean_log" not in n
    )
    if not centered_scales:
        log_prob = log_prob - jacobian
    assert_close(log_prob, total, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "name", [pytest.param("hierarchical", marks=pytest.mark.slow), "student_t"]
)
def test_nuts_on_the_non_centred_form_finds_the_posterior(name: str) -> None:
    x = torch.tensor([0.5, -1.0, 1.5]).double()
    y = torch.tensor([0.9, -1.2, 2.6]).double()
    grid = torch.linspace(-6, 6, 2001).double()
    if name == "student_t":
        prior = pl.priors.student_t(2.0, 0.5)
        density = scipy.stats.t(2.0, scale=0.5).pdf(grid)
    else:
        prior = pl.priors.hierarchical(0.5, centered=False)
        eta = torch.linspace(-6, 6, 401).double()[:, None]
        given = scipy.stats.norm(0, 0.5 * eta.exp()).pdf(grid)  # (eta, grid)
        density = scipy.stats.norm.pdf(eta.numpy()).T @ given
    lora = pl.lift(nn.Linear(1, 1, bias=False).double(), prior=prior)

    def model() -> None:
        mean = lora()(x[:, None])[..., 0]
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    (site,) = lora.sites
    if name == "student_t":
        model = poutine.reparam(model, config={site: LocScaleReparam(0.0)})
    else:  # leave the common scale and the weight alone
        one = torch.ones(()).double()
        fixed = {f"prior.{of}_spread.{site}": one for of in ("role", "layer")}
        for level in ("role_log_scale", "log_scale"):
            fixed[f"prior.{level}.{site}_decentered"] = 0 * one[None]
        model = poutine.condition(model, data=fixed)
    residuals = y[:, None] - x[:, None] * grid
    posterior = (
        torch.as_tensor(density).flatten() * (-residuals.square().sum(0) / 2).exp()
    )
    posterior /= posterior.sum()
    mean = (posterior * grid).sum()
    sd = (posterior * (grid - mean).square()).sum().sqrt()
    kernel = NUTS(model, max_tree_depth=4)
    mcmc = MCMC(kernel, num_samples=120, warmup_steps=60, disable_progbar=True)
    mcmc.run()
    draws = [
        trace_at(model, {n: v[i] for n, v in mcmc.get_samples().items()}, {})
        for i in range(120)
    ]
    w = torch.stack([trace.nodes[site]["value"].squeeze() for trace in draws])
    # Standard errors if every second draw counts: sd / sqrt(60), sd / sqrt(120).
    assert abs(w.mean() - mean) < 5 * sd / 60**0.5
    assert abs(w.std() - sd) < 5 * sd / 120**0.5


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("prior", "argument"),
    [
        (pl.priors.horseshoe, "global_scale"),
        (pl.priors.horseshoe, "slab_scale"),
        (pl.priors.horseshoe, "slab_df"),
        (pl.priors.hierarchical, "scale"),
        (pl.priors.hierarchical, "scale_spread"),
        (pl.priors.hierarchical, "role_spread"),
        (pl.priors.hierarchical, "layer_spread"),
        (pl.priors.rank_ard, "scale"),
        (pl.priors.rank_ard, "df"),
        (pl.priors.rank_ard, "other_scale"),
    ],
)
@pytest.mark.grid
def test_hyper_parameters_are_positive_and_finite(
    prior: Hyper, argument: str, value: float
) -> None:
    name = prior.__name__
    with pytest.raises(
        ValueError, match=f"{name}: {argument} must be positive and finite, found"
    ):
        prior(**{argument: value})


def test_a_horseshoe_is_per_weight_or_row() -> None:
    with pytest.raises(ValueError, match="'weight' or 'row', found 'layer'"):
        pl.priors.horseshoe(per="layer")  # type: ignore[arg-type]


def test_scales_are_positive_whatever_is_drawn() -> None:
    prior = pl.priors.horseshoe()
    lora = pl.lift(bert(dtype=torch.float32), prior=prior)
    name = f"prior.local_scale.{first(lora)}"
    zero = torch.zeros_like(lora.weights()[first(lora)])
    for local in (zero, zero + 1e38):
        trace = trace_at(lambda: lora(), {name: local}, {})
        scale = trace.nodes[first(lora)]["fn"].base_dist.scale
        assert (scale > 0).all()
        assert scale.isfinite().all()
