"""Groups of mixtures: each draw belongs to one component, and is judged by it."""

import warnings
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray

import pyro_lora as pl
from tests.export.arrays import assert_allclose
from tests.export.linearised_draws import linearised_logits
from tests.predict import models

SITE = "lora.bert.encoder.layer.attention.self.query"
HEAD = "head.classifier.weight"
ANGLE = "delta.bert.encoder.layer.attention.self.query.angle_to_mode"


def two_modes(
    lora: pl.LiftedNetwork, model: Any, batches: list[models.Batch]
) -> tuple[pl.LaplacePosterior, pl.LaplacePosterior]:
    """Around the adapter, and around weights that are elsewhere."""
    elsewhere = models.draw(models.jittered(lora, 1), 0)
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to(elsewhere))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The weights aren't a mode")
        return models.laplace(lora, model, batches), guide.laplace_approximation(
            batches
        )


def test_each_draw_of_a_mixture_is_linearised_at_its_own_mode() -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    first, second = two_modes(lora, model, batches)
    mixture = pl.MixturePosterior([first, second])
    tree = pl.to_datatree(mixture, batches=batches, num_samples=12, weights="raw")
    component = tree["sample_stats"]["component"].values[0]
    assert {0, 1} == set(component.tolist())
    for s in range(12):
        part = (first, second)[component[s]]
        at = {
            site: torch.as_tensor(tree["posterior"][site].values[0, s]).reshape(x.shape)
            for site, x in part.mode().items()
        }
        logits = linearised_logits(lora, part.mode(), at, batches[0])
        expected = logits.log_softmax(-1).gather(1, batches[0]["labels"][:, None])
        assert_allclose(tree["log_likelihood"]["y"][0, s, :6], expected[:, 0])


def test_a_mixture_with_particles_runs_the_network() -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    laplace = models.laplace(lora, model, batches)
    some = pl.MixturePosterior([laplace, models.particles(lora, model)])
    tree = pl.to_datatree(some, batches=batches, num_samples=4)
    assert tree["log_likelihood"].attrs["method"] == "sample"
    with pytest.raises(ValueError, match=r"'linearized' needs a Laplace.*Mixture"):
        pl.to_datatree(some, batches=batches, method="linearized")


def test_a_mixture_says_its_weights(tmp_path: Path) -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    first, second = two_modes(lora, model, batches)
    second = second.with_prior_precision(9.0)
    both = pl.MixturePosterior([first, second], [1, 3])
    tree = pl.to_datatree(both, batches=batches, num_samples=4)
    attributes = tree["posterior"].attrs
    assert attributes["component_weights"] == [0.25, 0.75]
    for index, part in enumerate((first, second)):
        name = f"component.{index}"
        evidence = float(part.log_evidence())
        assert attributes[f"{name}.log_evidence"] == pytest.approx(evidence)
        precision = attributes[f"{name}.prior_precision.{SITE}.A"]
        assert precision == pytest.approx((4.0, 9.0)[index])  # the prior's sd is .5
        assert attributes[f"{name}.posterior"] == "LaplacePosterior"
    assert "log_q" in tree["sample_stats"]
    tree.to_netcdf(tmp_path / "tree.nc")
    with xarray.open_datatree(tmp_path / "tree.nc", engine="h5netcdf") as again:
        assert again["posterior"].attrs.keys() == attributes.keys()
    some = pl.MixturePosterior([first, models.particles(lora, model)])
    tree = pl.to_datatree(some, batches=batches)
    assert "log_q" not in tree["sample_stats"]
    assert "component.1.log_evidence" not in tree["posterior"].attrs
    assert tree["posterior"].attrs["component.1.posterior"] == "ParticlePosterior"


def test_the_angle_is_to_the_mode_of_the_draws_own_component() -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    parts = [*two_modes(lora, model, batches), models.particles(lora, model)]
    mixture = pl.MixturePosterior(parts)
    pyro.set_rng_seed(2)
    tree = pl.to_datatree(mixture, num_samples=9)
    pyro.set_rng_seed(2)
    raw = pl.to_datatree(mixture, num_samples=9, weights="raw")["posterior"]
    component = tree["sample_stats"]["component"].values[0].tolist()
    assert set(component) == {0, 1, 2}
    for s, k in enumerate(component):
        found = tree["posterior"][ANGLE][0, s]
        part = parts[k]
        if not isinstance(part, pl.LaplacePosterior):
            assert found.isnull().all()
            continue
        mode = part.mode()
        for layer in range(2):
            b, a = (
                torch.as_tensor(raw[f"{SITE}.{x}"].values[0, s, layer]) for x in "BA"
            )
            delta, other = b @ a, mode[f"{SITE}.B"][layer] @ mode[f"{SITE}.A"][layer]
            cosine = (delta * other).sum() / delta.norm() / other.norm()
            assert_allclose(found[layer], cosine.arccos())
    particles = pl.MixturePosterior([models.particles(lora, model)] * 2)
    assert ANGLE not in pl.to_datatree(particles)["posterior"]


def test_each_component_has_its_own_prior() -> None:
    lora, model = models.classifier()
    batches = models.two_batches()
    scales = 0.01, 0.5
    parts = [
        part.with_prior_precision(scale**-2)
        for part, scale in zip(two_modes(lora, model, batches), scales, strict=True)
    ]
    tree = pl.to_datatree(pl.MixturePosterior(parts), num_samples=60, weights="raw")
    component = tree["sample_stats"]["component"].values[0]
    for index, scale in enumerate(scales):
        some = component == index
        drawn = tree["prior"][HEAD].values[0, some]
        assert drawn.std() == pytest.approx(scale, rel=0.1)
        value = torch.as_tensor(tree["posterior"][HEAD].values[0, some])
        mean = parts[index].prior_mean[HEAD].reshape(value.shape[1:])
        expected = dist.Normal(mean, scale).log_prob(value).flatten(1).sum(1)
        assert_allclose(tree["log_prior"][HEAD].values[0, some], expected)
