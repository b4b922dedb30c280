"""The groups against brute force."""

import math
import re
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import autoguide
from torch import Tensor

import pyro_lora as pl
from pyro_lora.diagnose.diagnosis import LeftOut
from pyro_lora.diagnose.log_joint import LogJoint
from pyro_lora.export import weight_variables
from tests import networks
from tests.export.arrays import assert_allclose
from tests.predict import models

QUERY = "delta.bert.encoder.layer.attention.self.query"


def delta_weight(
    lora: pl.LiftedNetwork, weights: dict[str, Tensor], layer: int
) -> Tensor:
    """Dense s B A of one query projection, from the matrices themselves."""
    site = "lora.bert.encoder.layer.attention.self.query"
    return 2.0 * weights[f"{site}.B"][layer] @ weights[f"{site}.A"][layer]  # 6 / 3


def test_delta_weights_equal_dense_svds() -> None:
    lora, model = models.classifier()
    posterior = models.particles(lora, model, num=4)
    tree = pl.to_datatree(posterior)
    found = tree["posterior"]
    for s in range(4):
        for layer in range(2):
            dense = delta_weight(lora, models.draw(posterior.particles, s), layer)
            singular = torch.linalg.svdvals(dense)
            norm = dense.square().sum().sqrt()
            at = {"chain": 0, "draw": s, "layer": layer}
            assert_allclose(found[f"{QUERY}.singular_values"].sel(at), singular[:3])
            assert_allclose(found[f"{QUERY}.frobenius_norm"].sel(at), norm)
            assert_allclose(
                found[f"{QUERY}.stable_rank"].sel(at), (norm / singular[0]) ** 2
            )
    head = found["head.classifier.weight"]
    assert head.dims == ("chain", "draw", "class", "in_feature")
    assert_allclose(head[0], posterior.particles["head.classifier.weight"][:, 0])


def test_a_delta_weight_of_zero_has_stable_rank_zero() -> None:
    lora, model = models.classifier()
    weights = {s: torch.zeros_like(x) for s, x in models.jittered(lora, 2).items()}
    posterior = pl.ParticlePosterior(weights, (lora,), model, "y")
    tree = pl.to_datatree(posterior)
    assert_allclose(tree["posterior"][f"{QUERY}.stable_rank"], np.zeros((1, 2, 2)))


def test_raw_weights_only_when_asked() -> None:
    lora, model = models.classifier()
    posterior = models.particles(lora, model)
    site = "lora.bert.encoder.layer.attention.self.query.A"
    assert site not in pl.to_datatree(posterior)["posterior"]
    raw = pl.to_datatree(posterior, weights="raw")["posterior"]
    assert set(raw.data_vars) == set(lora.sites)
    assert raw[site].dims == ("chain", "draw", "layer", "rank", "in_feature")
    for name, value in posterior.particles.items():
        assert_allclose(raw[name][0].values.ravel(), value.flatten())


def test_too_many_raw_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lora, model = models.classifier()
    monkeypatch.setattr(weight_variables, "MAX_RAW_VALUES", 500)
    with pytest.raises(ValueError, match="Lower num_samples, or use weights='delta'"):
        pl.to_datatree(models.particles(lora, model), weights="raw")


def test_large_heads_are_given_by_their_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    lora, model = models.classifier()
    posterior = models.particles(lora, model)
    monkeypatch.setattr(weight_variables, "MAX_HEAD_WEIGHTS", 31)  # it has 2 x 16
    found = pl.to_datatree(posterior)["posterior"]
    assert "head.classifier.weight" not in found
    norm = posterior.particles["head.classifier.weight"].flatten(1).norm(dim=1)
    assert_allclose(found["head.classifier.weight.frobenius_norm"][0], norm)
    assert "head.classifier.bias" in found


def test_log_likelihood_equals_a_loop() -> None:
    lora, model = models.classifier(3)
    batches = models.two_batches(3)
    posterior = models.particles(lora, model, num=11)
    tree = pl.to_datatree(posterior, batches=batches)
    expected = torch.stack(
        [
            torch.cat(
                [
                    models.logits_at(lora, models.draw(posterior.particles, s), b)
                    .log_softmax(-1)
                    .gather(1, b["labels"][:, None])[:, 0]
                    for b in batches
                ]
            )
            for s in range(11)
        ]
    )
    found = tree["log_likelihood"]["y"]
    assert found.dims == ("chain", "draw", "datum")
    assert found.dtype == np.float64
    assert_allclose(found[0], expected)
    labels = torch.cat([b["labels"] for b in batches])
    assert tree["observed_data"]["y"].values.tolist() == labels.tolist()


def test_lp_is_the_log_joint_of_all_data() -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    posterior = models.particles(lora, model)
    tree = pl.to_datatree(posterior, batches=batches)
    (whole,) = models.resized(batches, models.NUM_DATA)
    for s in range(3):
        at = models.draw(posterior.particles, s)
        joint = poutine.trace(poutine.condition(model, at)).get_trace(**whole)
        log_joint = joint.log_prob_sum()
        assert_allclose(tree["sample_stats"]["lp"][0, s], log_joint.detach(), 1e-6)
        prior = sum(
            dist.Normal(0.0, 0.5).log_prob(value).sum() for value in at.values()
        )
        total = sum(float(x[0, s]) for x in tree["log_prior"].data_vars.values())
        assert_allclose(total, prior, 1e-6)
    assert set(tree["log_prior"].data_vars) == set(lora.sites)
    assert "log_q" not in tree["sample_stats"]  # particles have no density


def test_lp_keeps_a_scale_of_the_users() -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    posterior = models.particles(lora, model)
    plain = pl.to_datatree(posterior, batches=batches)
    half = poutine.scale(model, 0.5)
    scaled = pl.to_datatree(posterior, model=half, batches=batches)
    log_prior = sum(x.values for x in plain["log_prior"].data_vars.values())
    likelihood = plain["log_likelihood"]["y"].sum("datum").values
    assert_allclose(plain["sample_stats"]["lp"], log_prior + likelihood)
    assert_allclose(scaled["sample_stats"]["lp"], 0.5 * (log_prior + likelihood))
    assert_allclose(scaled["log_likelihood"]["y"], plain["log_likelihood"]["y"])


def test_laplace_brings_density_evidence_and_its_own_prior() -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    posterior = models.laplace(lora, model, batches).with_prior_precision(7.0)
    pyro.set_rng_seed(2)
    tree = pl.to_datatree(posterior, batches=batches, num_samples=5)
    pyro.set_rng_seed(2)
    draws = posterior.sample(5)
    assert_allclose(tree["sample_stats"]["log_q"][0], posterior.log_prob(draws))
    for site, value in draws.items():
        normal = dist.Normal(torch.zeros_like(value), 7.0**-0.5)
        expected = normal.log_prob(value).flatten(1).sum(1)
        assert_allclose(tree["log_prior"][site][0], expected, 1e-6)
    attributes = tree["posterior"].attrs
    assert attributes["posterior"] == "LaplacePosterior"
    assert attributes["log_evidence"] == pytest.approx(float(posterior.log_evidence()))
    assert attributes["prior_precision.head.classifier.bias"] == pytest.approx(7.0)


def test_prior_draws_are_the_posteriors_prior() -> None:
    lora, model = models.classifier()
    posterior = models.laplace(lora, model, models.two_batches())
    narrow = pl.to_datatree(posterior.with_prior_precision(1e4), num_samples=50)
    sd = narrow["prior"]["head.classifier.weight"].values.std()
    assert sd == pytest.approx(0.01, rel=0.1)  # 1,600 values: its own sd is 2 %
    own = pl.to_datatree(models.particles(lora, model, num=50))
    assert own["prior"]["head.classifier.weight"].values.std() == pytest.approx(
        0.5, rel=0.1
    )


def test_another_prior_of_the_network_is_not_the_posteriors() -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    posterior = models.laplace(lora, model, batches)
    draws = posterior.sample(3)
    before = pl.to_datatree(posterior, batches=batches, num_samples=50)
    lora = lora.with_prior(pl.priors.normal(0.01))
    other = pl.models.classification(lora, 10)
    after = pl.to_datatree(posterior, batches=batches, model=other, num_samples=50)
    sd = after["prior"]["head.classifier.weight"].values.std()
    assert sd == pytest.approx(0.5, rel=0.1)
    site = "head.classifier.weight"
    assert after["log_prior"][site].mean() == pytest.approx(
        float(before["log_prior"][site].mean()), rel=0.1
    )
    trace = poutine.trace(posterior.prior).get_trace(lora)
    assert trace.nodes[site]["fn"].log_prob(draws[site][0]).sum() == pytest.approx(
        float(dist.Normal(0, 0.5).log_prob(draws[site][0]).sum())
    )


def test_the_prior_may_be_a_posterior_in_float32() -> None:
    lora, model = models.classifier(network=networks.bert(dtype=torch.float32))
    batches = models.two_batches()
    lora = lora.with_prior(
        pl.priors.from_posterior(models.laplace(lora, model, batches))
    )
    model = pl.models.classification(lora, 10)
    with pytest.warns(UserWarning, match="correlations"):
        posterior = models.laplace(lora, model, batches)
    tree = pl.to_datatree(posterior, batches=batches)
    assert np.isfinite(tree["log_prior"].to_dataset().to_array()).all()


def test_outcomes_are_drawn_from_the_likelihood() -> None:
    lora, model = models.classifier(3)
    batches = models.two_batches(3)
    particle = models.jittered(lora, 1)
    many = {s: x.expand(800, *x.shape[1:]) for s, x in particle.items()}
    posterior = pl.ParticlePosterior(many, (lora,), model, "y")
    outcomes = pl.to_datatree(posterior, batches=batches)["posterior_predictive"]["y"]
    assert outcomes.shape == (1, 800, 10)
    probs = torch.cat(
        [
            models.logits_at(lora, models.draw(particle, 0), b).softmax(-1)
            for b in batches
        ]
    )
    for c in range(3):
        found = (outcomes[0] == c).mean("draw").values
        error = np.abs(found - probs[:, c].numpy())
        assert error.max() < 4 * 0.5 / math.sqrt(800)


def test_integer_inputs_are_kept_padded_with_zeros() -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    tree = pl.to_datatree(models.particles(lora, model), batches=batches)
    constant = tree["constant_data"]
    (whole,) = models.resized(batches, models.NUM_DATA)
    assert set(constant.data_vars) == {"input_ids", "attention_mask"}
    assert constant["input_ids"].dims == ("datum", "token")
    assert_allclose(constant["input_ids"], whole["input_ids"])
    assert_allclose(constant["attention_mask"], whole["attention_mask"])


def test_without_batches_only_what_needs_no_data() -> None:
    lora, model = models.classifier()
    posterior = models.laplace(lora, model, models.two_batches())
    tree = pl.to_datatree(posterior)
    assert set(tree.children) == {"posterior", "prior", "log_prior", "sample_stats"}
    assert set(tree["sample_stats"].data_vars) == {"log_q"}
    assert tree["posterior"].sizes["draw"] == 100


def test_without_labels_there_is_no_likelihood() -> None:
    lora, model = models.classifier()
    batches = [networks.inputs(b) for b in models.two_batches()]
    tree = pl.to_datatree(models.particles(lora, model), batches=batches)
    assert "posterior_predictive" in tree.children
    assert not {"log_likelihood", "observed_data", "sample_stats"} & set(tree.children)


def test_other_latent_variables_are_in_every_group() -> None:
    lora, _ = models.classifier(1)

    def model(labels: Tensor | None = None, **inputs: Tensor) -> None:
        noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
        mean = lora()(**inputs).logits[..., 0]
        with pyro.plate("data", models.NUM_DATA, subsample=inputs["input_ids"]):
            pyro.sample("y", dist.Normal(mean, noise), obs=labels)

    batches = models.two_batches()
    for batch in batches:
        batch["labels"] = torch.randn(len(batch["labels"]), dtype=torch.float64)
    weights = models.jittered(lora, 4)
    weights["noise"] = torch.rand(4, dtype=torch.float64) + 0.5
    posterior = pl.ParticlePosterior(weights, (lora,), model, "y")
    tree = pl.to_datatree(posterior, batches=batches)
    assert_allclose(tree["posterior"]["noise"][0], weights["noise"])
    expected = dist.LogNormal(0.0, 1.0).log_prob(weights["noise"])
    assert_allclose(tree["log_prior"]["noise"][0], expected)
    (whole,) = models.resized(batches, models.NUM_DATA)
    for s in range(4):
        at = models.draw(weights, s)
        trace = poutine.trace(poutine.condition(model, at)).get_trace(**whole)
        log_joint = trace.log_prob_sum().detach()
        assert_allclose(tree["sample_stats"]["lp"][0, s], log_joint, 1e-6)


def test_a_prior_with_scales_of_its_own() -> None:
    def prior(lora: pl.LiftedNetwork) -> dict[str, Tensor]:
        with pyro.plate("two", 2):
            scale = pyro.sample("scale", dist.HalfCauchy(torch.tensor(1.0).double()))
        return {
            site: pyro.sample(
                site,
                dist.Normal(zeros, zeros + scale[..., :1, None, None]).to_event(
                    zeros.ndim
                ),
            )
            for site, zeros in lora.zeros().items()
        }

    lora = pl.lift(networks.bert(), prior=prior)
    model = pl.models.classification(lora, models.NUM_DATA)
    batches = models.two_batches()
    weights = models.jittered(lora, 3) | {"scale": torch.rand(3, 2).double() + 0.5}
    posterior = pl.ParticlePosterior(weights, (lora,), model, "y")
    tree = pl.to_datatree(posterior, batches=batches)
    expected = dist.HalfCauchy(1.0).log_prob(weights["scale"]).sum(1)
    assert_allclose(tree["log_prior"]["scale"][0], expected, 1e-6)
    (whole,) = models.resized(batches, models.NUM_DATA)
    for s in range(3):
        at = models.draw(weights, s)
        trace = poutine.trace(poutine.condition(model, at)).get_trace(**whole)
        log_joint = trace.log_prob_sum().detach()
        assert_allclose(tree["sample_stats"]["lp"][0, s], log_joint, 1e-6)
    assert (tree["prior"]["scale"] > 0).all()
    assert tree["prior"]["scale"].shape == (1, 3, 2)


def test_lp_is_left_out_where_the_likelihood_is_not_all() -> None:
    lora, _ = models.classifier()

    def model(labels: Tensor | None = None, **inputs: Tensor) -> None:
        logits = lora()(**inputs).logits
        with pyro.plate("data", models.NUM_DATA, subsample=inputs["input_ids"]):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)
            pyro.sample("z", dist.Normal(logits[..., 0], 1.0), obs=torch.tensor(0.0))

    posterior = models.particles(lora, model)
    tree = pl.to_datatree(posterior, batches=models.two_batches())
    assert "sample_stats" not in tree.children
    assert set(tree["log_likelihood"].data_vars) == {"y"}


def test_a_mask_takes_data_out_of_the_likelihood() -> None:
    lora, plain = models.classifier()
    batches = models.two_batches()
    keep = {6: torch.arange(6) > 1, 4: torch.arange(4) > 1}

    def model(labels: Tensor | None = None, **inputs: Tensor) -> None:
        with poutine.mask(mask=keep[len(inputs["input_ids"])]):
            logits = lora()(**inputs).logits
            with pyro.plate("data", models.NUM_DATA, subsample=inputs["input_ids"]):
                pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    posterior = models.particles(lora, plain)
    found = pl.to_datatree(posterior, model=model, batches=batches)["log_likelihood"]
    whole = pl.to_datatree(posterior, batches=batches)["log_likelihood"]["y"]
    mask = torch.cat([keep[6], keep[4]]).numpy()
    # What is masked is no datum, which leave-one-out would count.
    assert_allclose(found["y"], whole[..., mask])


def test_a_stock_guide_needs_model_and_batches() -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    guide = autoguide.AutoLowRankMultivariateNormal(
        model, init_loc_fn=lora.init_to_adapter()
    )
    guide(**batches[0])
    tree = pl.to_datatree(guide, model=model, batches=batches, num_samples=6)
    assert tree["log_likelihood"]["y"].shape == (1, 6, 10)
    assert f"{QUERY}.frobenius_norm" in tree["posterior"]
    assert not [name for name in tree["posterior"].data_vars if "latent" in name]
    with pytest.raises(ValueError, match=r"AutoLowRank.*Pass model= and batches="):
        pl.to_datatree(guide, model=model)


def test_arguments_are_checked() -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    posterior = models.particles(lora, model)
    with pytest.raises(ValueError, match="'delta' or 'raw', found 'all'"):
        pl.to_datatree(posterior, weights="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no batches"):
        pl.to_datatree(posterior, batches=[])
    alone = pl.ParticlePosterior(posterior.particles, (lora,), None, "y")
    with pytest.raises(ValueError, match="Pass model="):
        pl.to_datatree(alone, batches=batches)
    mixed = [batches[0], networks.inputs(batches[1])]
    with pytest.raises(ValueError, match="Batch 1 has no 'labels'"):
        pl.to_datatree(posterior, batches=mixed)


def test_without_arviz_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    lora, model = models.classifier()
    monkeypatch.setitem(sys.modules, "arviz_base", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-lora\[arviz\]'"):
        pl.to_datatree(models.particles(lora, model))


@pytest.mark.parametrize("method", ["linearized", "sample"])
@given(data=st.data())
@settings(max_examples=8, deadline=None, database=None)
def test_lp_and_diagnose_want_the_same_data(method: str, data: st.DataObject) -> None:
    lora, model = models.classifier()
    whole = models.two_batches()
    posterior = models.laplace(lora, model, whole)
    singles = models.resized(whole, 1)
    some = data.draw(st.lists(st.sampled_from(range(10)), min_size=1, max_size=12))
    batches = [singles[i] for i in some]
    tree = pl.to_datatree(posterior, batches, num_samples=2, method=method)
    joint = LogJoint(posterior, model, batches, "y")
    reason = tree["posterior"].attrs.get("lp_left_out")
    assert ("lp" in tree["sample_stats"]) == (reason is None) == (len(some) == 10)
    if reason is not None:
        assert reason.startswith(
            f"needs all training data: the batches hold {len(some)}"
        )
        with pytest.raises(LeftOut, match=re.escape(reason)):
            joint.check()
    assert tree["log_likelihood"].sizes["datum"] == len(some)
