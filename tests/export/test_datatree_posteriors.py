"""The groups for each kind of posterior: Gaussians, mixtures, Markov chains, guides."""

import math
import warnings
from pathlib import Path
from typing import Any, Literal

import arviz_stats
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from pyro import poutine
from pyro.infer import MCMC, NUTS, autoguide
from torch import Tensor

import pyro_lora as pl
from tests import networks
from tests.export.arrays import assert_allclose
from tests.export.linearised_draws import linearised_logits
from tests.infer.linear_regression import linear_regression
from tests.predict import models

QUERY = "delta.bert.encoder.layer.attention.self.query"
STRUCTURES = [pl.structures.KFAC(), pl.structures.Diagonal(), pl.structures.Dense()]


@pytest.mark.grid
@pytest.mark.parametrize("num_labels", [2, 3])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_laplace_is_linearised_by_default(structure: Any, num_labels: int) -> None:
    lora, model = models.classifier(num_labels)
    batches = models.two_batches(num_labels)
    posterior = models.laplace(lora, model, batches, structure)
    pyro.set_rng_seed(2)
    tree = pl.to_datatree(posterior, batches=batches, num_samples=4)
    pyro.set_rng_seed(2)
    draws = posterior.sample(4)
    expected = torch.stack(
        [
            torch.cat(
                [
                    linearised_logits(
                        lora, posterior.mode(), models.draw(draws, s), batch
                    )
                    .log_softmax(-1)
                    .gather(1, batch["labels"][:, None])[:, 0]
                    for batch in batches
                ]
            )
            for s in range(4)
        ]
    )
    assert_allclose(tree["log_likelihood"]["y"][0], expected)
    assert tree["log_likelihood"].attrs["method"] == "linearized"
    log_prior = sum(x[0].values for x in tree["log_prior"].data_vars.values())
    assert_allclose(tree["sample_stats"]["lp"][0], log_prior + expected.sum(1).numpy())


def test_the_network_itself_when_asked() -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    posterior = models.laplace(lora, model, batches)
    pyro.set_rng_seed(2)
    tree = pl.to_datatree(posterior, batches=batches, num_samples=3, method="sample")
    pyro.set_rng_seed(2)
    draws = posterior.sample(3)
    for s in range(3):
        logits = models.logits_at(lora, models.draw(draws, s), batches[0])
        expected = logits.log_softmax(-1).gather(1, batches[0]["labels"][:, None])
        assert_allclose(tree["log_likelihood"]["y"][0, s, :6], expected[:, 0])
    assert tree["log_likelihood"].attrs["method"] == "sample"


def test_linearised_draws_have_the_moments_of_the_closed_form() -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    posterior = models.laplace(lora, model, batches)
    num = 1000
    tree = pl.to_datatree(posterior, batches=batches, num_samples=num)
    log_p = tree["log_likelihood"]["y"].values[0]  # (S, N)
    contrast = log_p - np.log1p(-np.exp(log_p))  # of the label's logit
    first = 0
    for batch in batches:
        logits = posterior.linearized(batch)
        sign = torch.stack([1 - 2 * batch["labels"], 2 * batch["labels"] - 1], 1)
        sign = sign.double()
        mean = (logits.mean * sign).sum(1)
        variance = torch.einsum("bc,bcd,bd->b", sign, logits.covariance_matrix, sign)
        found = contrast[:, first : first + len(mean)]
        error = (found.mean(0) - mean.numpy()) / (variance.numpy() / num) ** 0.5
        assert np.abs(error).max() < 4
        ratio = found.var(0) / variance.numpy()
        assert np.abs(ratio - 1).max() < 4 * math.sqrt(2 / num)
        first += len(mean)


def test_a_linear_network_gives_the_same_either_way() -> None:
    task = linear_regression()
    posterior = task.laplace(structure=pl.structures.Dense())
    trees = []
    for method in ("linearized", "sample"):
        pyro.set_rng_seed(1)
        trees.append(
            pl.to_datatree(
                posterior,
                batches=task.batches,
                num_samples=5,
                method=method,  # type: ignore[arg-type]
            )
        )
    for group in ("log_likelihood", "sample_stats", "posterior"):
        for name, value in trees[0][group].data_vars.items():
            assert_allclose(value, trees[1][group][name])


def test_several_real_outputs_a_datum_are_linearised() -> None:
    lora, model, batches = models.real_outputs()
    posterior = models.laplace(lora, model, batches)
    pyro.set_rng_seed(2)
    tree = pl.to_datatree(posterior, batches=batches, num_samples=2)
    pyro.set_rng_seed(2)
    at = models.draw(posterior.sample(2), 1)
    loc = linearised_logits(lora, posterior.mode(), at, batches[0])
    expected = dist.Normal(loc, 0.7).log_prob(batches[0]["labels"]).sum(1)
    assert_allclose(tree["log_likelihood"]["y"][0, 1, :6], expected)


def test_a_scale_that_the_network_outputs_is_linearised() -> None:
    lora, _ = models.classifier(2)

    def model(labels: Tensor | None = None, **inputs: Tensor) -> None:
        loc, log_scale = lora()(**inputs).logits.unbind(-1)
        with pyro.plate("data", models.NUM_DATA, subsample=inputs["input_ids"]):
            pyro.sample("y", dist.Normal(loc, log_scale.exp()), obs=labels)

    batches = models.two_batches()
    for batch in batches:
        batch["labels"] = torch.randn(len(batch["labels"]), dtype=torch.float64)
    posterior = models.laplace(lora, model, batches)
    pyro.set_rng_seed(2)
    tree = pl.to_datatree(posterior, batches=batches, num_samples=2)
    pyro.set_rng_seed(2)
    at = models.draw(posterior.sample(2), 1)
    f = linearised_logits(lora, posterior.mode(), at, batches[0])
    expected = dist.Normal(f[:, 0], f[:, 1].exp()).log_prob(batches[0]["labels"])
    assert_allclose(tree["log_likelihood"]["y"][0, 1, :6], expected)


def test_the_angle_to_the_mode() -> None:
    lora, model = models.classifier()
    posterior = models.laplace(lora, model, models.two_batches())
    pyro.set_rng_seed(2)
    tree = pl.to_datatree(posterior, num_samples=3)
    pyro.set_rng_seed(2)
    draws = posterior.sample(3)
    site = "lora.bert.encoder.layer.attention.self.query"
    mode = posterior.mode()
    for s in range(3):
        for layer in range(2):
            delta = draws[f"{site}.B"][s, layer] @ draws[f"{site}.A"][s, layer]
            other = mode[f"{site}.B"][layer] @ mode[f"{site}.A"][layer]
            cosine = (delta * other).sum() / delta.norm() / other.norm()
            found = tree["posterior"][f"{QUERY}.angle_to_mode"][0, s, layer]
            assert_allclose(found, cosine.arccos())
    particles = pl.to_datatree(models.particles(lora, model))["posterior"]
    assert f"{QUERY}.angle_to_mode" not in particles


def test_prior_predictive_outcomes_are_those_of_the_prior() -> None:
    lora, _ = models.classifier(1)

    def model(labels: Tensor | None = None, **inputs: Tensor) -> None:
        noise = pyro.sample("noise", dist.LogNormal(2.0, 0.1))
        mean = lora()(**inputs).logits[..., 0]
        with pyro.plate("data", models.NUM_DATA, subsample=inputs["input_ids"]):
            pyro.sample("y", dist.Normal(1e-6 * mean, noise), obs=labels)

    batches = models.two_batches()
    for batch in batches:
        batch["labels"] = torch.zeros(len(batch["labels"]), dtype=torch.float64)
    weights = models.jittered(lora, 100)
    weights["noise"] = torch.full((100,), 1e-3, dtype=torch.float64)
    posterior = pl.ParticlePosterior(weights, (lora,), model, "y")
    tree = pl.to_datatree(posterior, batches=batches, prior_predictive=True)
    found = tree["prior_predictive"]["y"]
    assert found.dims == ("chain", "draw", "datum")
    # 1,000 draws of sd exp(2), by the prior of the noise, not the posterior's.
    expected = math.exp(2 + 0.1**2)
    assert float(found.std()) == pytest.approx(expected, rel=4 / math.sqrt(2000) + 0.02)
    assert "prior_predictive" not in pl.to_datatree(posterior, batches=batches)


def test_a_latent_noise_is_drawn_not_linearised() -> None:
    task = linear_regression()

    def model(x: Tensor, y: Tensor | None = None) -> None:
        noise = pyro.sample("noise", dist.LogNormal(torch.zeros(()).double(), 1.0))
        loc = task.lora()(x)[..., 0]
        with pyro.plate("data", 12, subsample=x):
            pyro.sample("y", dist.Normal(loc, noise), obs=y)

    guide = pl.AutoLaplace(model, init_loc_fn=task.lora.init_to_adapter())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The weights aren't a mode")
        posterior = guide.laplace_approximation(task.batches)
    with pytest.warns(UserWarning, match="latent sites besides the weights"):
        tree = pl.to_datatree(posterior, batches=task.batches, num_samples=5)
    assert tree["log_likelihood"].attrs["method"] == "sample"
    assert float(tree["posterior"]["noise"].std()) > 0
    with pytest.raises(ValueError, match=r"needs a Laplace posterior over nothing but"):
        pl.to_datatree(posterior, batches=task.batches, method="linearized")


def regression_chains(num_chains: int = 1) -> tuple[Any, MCMC]:
    task = linear_regression()
    mcmc = MCMC(
        NUTS(task.model, jit_compile=False),
        num_samples=60,
        warmup_steps=40,
        num_chains=num_chains,
        disable_progbar=True,
    )
    mcmc.run(**task.whole)
    return task, mcmc


def test_a_markov_chain_that_has_run() -> None:
    task, mcmc = regression_chains()
    tree = pl.to_datatree(mcmc, model=task.model, batches=task.batches)
    samples = mcmc.get_samples()
    found = tree["posterior"]
    assert_allclose(found["base.bias"][0], samples["base.bias"][:, 0])
    assert found.sizes["draw"] == 60
    for s in (0, 59):
        at = {site: value[s] for site, value in samples.items()}
        trace: Any = poutine.trace(poutine.condition(task.model, at)).get_trace(
            **task.whole
        )
        assert_allclose(tree["sample_stats"]["lp"][0, s], trace.log_prob_sum().detach())
    diverging = tree["sample_stats"]["diverging"]
    assert diverging.dtype == bool
    listed = mcmc.diagnostics()["divergences"]["chain 0"]
    assert np.flatnonzero(diverging[0]).tolist() == list(listed)


def test_chains_stay_chains() -> None:
    task, mcmc = regression_chains()
    whole = mcmc.get_samples()
    chains = {s: x.reshape(3, 20, *x.shape[1:]) for s, x in whole.items()}
    tree = pl.to_datatree(chains, model=task.model, batches=task.batches)
    once = pl.to_datatree(mcmc, model=task.model, batches=task.batches)
    assert dict(tree["posterior"].sizes)["chain"] == 3
    for group in ("posterior", "log_prior", "log_likelihood"):
        for name, value in once[group].data_vars.items():
            again = tree[group][name].values
            assert_allclose(again.reshape(value.shape), value.values)
    table = arviz_stats.summary(tree, var_names=["base.bias"], round_to="none")
    assert table["r_hat"].iloc[0] < 1.2
    last = pl.to_datatree(chains, model=task.model, batches=task.batches, num_samples=4)
    assert_allclose(last["posterior"]["base.bias"][1], chains["base.bias"][1, -4:, 0])


def test_samples_are_checked() -> None:
    task, mcmc = regression_chains()
    with pytest.raises(ValueError, match="MCMC doesn't know the model"):
        pl.to_datatree(mcmc)
    chains = {s: x[None] for s, x in mcmc.get_samples().items()}
    shorter = chains | {"base.bias": chains["base.bias"][:, :50]}
    with pytest.raises(ValueError, match=r"group_by_chain=True.*\(1, 50\), \(1, 60\)"):
        pl.to_datatree(shorter, model=task.model, batches=task.batches)
    with pytest.raises(ValueError, match="num_samples is 61, but each chain has 60"):
        pl.to_datatree(chains, model=task.model, batches=task.batches, num_samples=61)


def test_a_stock_guide_over_a_scale_and_the_weights() -> None:
    def prior(lora: pl.LiftedNetwork) -> dict[str, Tensor]:
        scale = pyro.sample("scale", dist.HalfCauchy(torch.tensor(1.0).double()))
        return {
            site: pyro.sample(
                site,
                dist.Normal(zeros, scale[(..., *[None] * zeros.ndim)]).to_event(
                    zeros.ndim
                ),
            )
            for site, zeros in lora.zeros().items()
        }

    lora = pl.lift(networks.bert(), prior=prior)
    model = pl.models.classification(lora, models.NUM_DATA)
    batches = models.two_batches()
    guide = autoguide.AutoNormal(model)
    guide(**batches[0])
    tree = pl.to_datatree(guide, model=model, batches=batches, num_samples=5)
    assert tree["posterior"]["scale"].shape == (1, 5)
    assert tree["prior"]["scale"].shape == (1, 5)
    assert tree["log_prior"]["scale"].shape == (1, 5)
    assert tree["log_likelihood"].attrs["method"] == "sample"


def under_autonormal(
    prior: Any, weights: Literal["delta", "raw"] = "delta"
) -> xarray.DataTree:
    """Four draws of a stock guide for a network under a prior, always the same."""
    pyro.clear_param_store()
    pyro.set_rng_seed(4)
    lora = pl.lift(networks.bert(), prior=prior)
    model = pl.models.classification(lora, models.NUM_DATA)
    guide = autoguide.AutoNormal(model, init_scale=0.5)
    batches = models.two_batches()
    guide(**batches[0])
    return pl.to_datatree(
        guide, model=model, batches=batches, num_samples=4, weights=weights
    )


def test_non_centred_sites_are_their_scale_times_noise() -> None:
    prior = pl.priors.hierarchical(centered=False)
    raw = under_autonormal(prior, "raw")["posterior"]
    found = under_autonormal(prior)["posterior"]
    path = "lora.bert.encoder.layer.attention.self.query"
    sites = raw[f"prior.role_log_scale.{path}.A"].coords["site"].values.tolist()
    mean, role_sd, layer_sd = (
        raw[f"prior.{name}.{path}.A"].values[0]
        for name in ("mean_log_scale", "role_spread", "layer_spread")
    )
    of_roles = raw[f"prior.role_log_scale.{path}.A_decentered"].values[0]
    weights = []
    for site in (f"{path}.B", f"{path}.A"):
        role = mean + role_sd * of_roles[:, sites.index(site)]
        noise = raw[f"prior.log_scale.{site}_decentered"].values[0]
        log_scale = role[:, None] + layer_sd[:, None] * noise
        assert_allclose(found[f"prior.log_scale.{site}"][0], log_scale)
        scale = np.exp(log_scale)[..., None, None]
        weights.append(scale * raw[f"{site}_decentered"].values[0])
    delta = 2.0 * weights[0] @ weights[1]  # lora_alpha / r = 6 / 3
    assert_allclose(
        found[f"{QUERY}.frobenius_norm"][0], np.linalg.norm(delta, axis=(-2, -1)), 1e-6
    )
    assert not [name for name in found if str(name).endswith("_decentered")]


def test_draws_of_a_non_centred_prior_have_their_weights() -> None:
    found = under_autonormal(pl.priors.horseshoe(centered=False), "raw")["prior"]
    site = "head.classifier.weight"
    path = "lora.bert.encoder.layer.attention.self.query.A"
    scale = found[site].values / found[f"{site}_decentered"].values
    tau, slab = (
        found[f"prior.{name}.{path}"].values[..., None, None]
        for name in ("global_scale", "slab_variance")
    )
    wide = tau * found[f"prior.local_scale.{site}"].values
    # tau lambda where it's small against the slab's width, that where it's large.
    assert_allclose(scale, 1 / np.sqrt(1 / slab + 1 / wide**2), 1e-5)


@pytest.mark.parametrize(
    ("prior", "site", "dims"),
    [
        (pl.priors.hierarchical(), "prior.log_scale.{query}.A", ("layer",)),
        (pl.priors.hierarchical(), "prior.log_scale.head.classifier.weight", ()),
        (pl.priors.hierarchical(), "prior.role_log_scale.{query}.A", ("site",)),
        (pl.priors.hierarchical(), "prior.mean_log_scale.{query}.A", ()),
        (pl.priors.rank_ard(), "prior.rank_precision.{query}.A", ("layer", "rank")),
        (
            pl.priors.horseshoe(),
            "prior.local_scale.{query}.B",
            ("layer", "out_feature", "rank"),
        ),
        (
            pl.priors.horseshoe(per="row"),
            "prior.local_scale.head.classifier.weight",
            ("class",),
        ),
    ],
)
def test_scales_of_a_prior_have_the_dims_of_what_they_scale(
    prior: Any, site: str, dims: tuple[str, ...]
) -> None:
    path = "lora.bert.encoder.layer.attention.self.query"
    found = under_autonormal(prior)["posterior"][site.format(query=path)]
    assert found.dims == ("chain", "draw", *dims)
    if "layer" in dims:
        assert found.coords["layer"].values.tolist() == [0, 1]


def test_a_precision_for_each_layer_is_a_list_also_in_a_file(tmp_path: Path) -> None:
    lora, model = models.classifier()
    posterior = models.laplace(lora, model, models.two_batches())
    site = "lora.bert.encoder.layer.attention.self.query.A"
    tau = {**posterior.prior_precision}
    tau[site] = torch.tensor([3.0, 5.0], dtype=torch.float64)[:, None, None]
    tree = pl.to_datatree(posterior.with_prior_precision(tau), num_samples=3)
    name = f"prior_precision.{site}"
    assert tree["posterior"].attrs[name] == pytest.approx([3, 5])
    tree.to_netcdf(tmp_path / "tree.nc")
    with xarray.open_datatree(tmp_path / "tree.nc", engine="h5netcdf") as again:
        assert again["posterior"].attrs[name].tolist() == pytest.approx([3, 5])
