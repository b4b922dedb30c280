"""Views of one network under several priors: what they share, and what they don't."""

import copy
import io
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from pyro.optim import Adam
from torch.testing import assert_close

import pyro_lora as pl
from tests.networks import batch, bert, inputs, particles
from tests.predict.models import laplace


def scale_of(prior: Any, lora: pl.LiftedNetwork) -> float:
    """Of the first site."""
    trace = poutine.trace(prior).get_trace(lora)
    return float(trace.nodes[next(iter(lora.sites))]["fn"].stddev.flatten()[0])


def views() -> tuple[pl.LiftedNetwork, pl.LiftedNetwork]:
    lora = pl.lift(bert(3), prior=pl.priors.normal(0.5))
    return lora, lora.with_prior(pl.priors.normal(0.01))


def test_each_view_samples_by_its_own_prior() -> None:
    wide, narrow = views()
    assert narrow is not wide
    assert (scale_of(wide.prior, wide), scale_of(narrow.prior, narrow)) == (0.5, 0.01)
    for lora in (wide, narrow, wide):
        nodes = poutine.trace(lora).get_trace().nodes
        for site in lora.sites:
            assert nodes[site]["infer"]["lora"] == (lora,)
            assert nodes[site]["fn"].stddev.unique() == (0.5 if lora is wide else 0.01)


def test_a_prior_is_read_only_and_a_function() -> None:
    lora, _ = views()
    with pytest.raises(AttributeError):
        lora.prior = pl.priors.normal(1.0)  # type: ignore[misc]
    for wrong in (None, 1.0):
        with pytest.raises(TypeError, match=r"prior must be .*priors\.normal"):
            lora.with_prior(wrong)  # type: ignore[arg-type]


def test_views_are_of_one_network() -> None:
    wide, narrow = views()
    texts = batch(5)
    assert narrow.network is wide.network
    assert narrow.sites == wide.sites
    assert narrow.context_fn is wide.context_fn
    weights = particles(wide)
    with wide.bind(weights) as net:
        expected = net(**inputs(texts)).logits
        assert narrow.is_bound
        with pytest.raises(RuntimeError), narrow.bind(weights):
            pass
    narrow.load(weights)
    for site, x in wide.weights().items():
        assert torch.equal(x, weights[site])
    assert_close(wide.network(**inputs(texts)).logits, expected, rtol=0, atol=1e-12)


def test_lifting_again_makes_every_view_stale() -> None:
    wide, narrow = views()
    third = narrow.with_prior(pl.priors.normal(1.0))
    again = pl.lift(wide.network)
    late = wide.with_prior(pl.priors.normal(1.0))
    for lora in (wide, narrow, third, late):
        with pytest.raises(RuntimeError, match="stale"):
            lora()
    again()
    view = again.with_prior(pl.priors.normal(1.0))
    view()
    again()


def test_lifting_again_while_a_view_has_weights_bound() -> None:
    wide, narrow = views()
    with narrow.bind(wide.weights()), pytest.raises(RuntimeError, match="are bound"):
        pl.lift(wide.network)
    wide()


def test_engines_take_a_view() -> None:
    wide, narrow = views()
    texts = batch(6, num_labels=3)
    modes = {}
    for lora in (wide, narrow):
        pyro.clear_param_store()
        model = pl.models.classification(lora, 6)
        guide = AutoDelta(model, init_loc_fn=lora.init_to_adapter())
        svi = SVI(model, guide, Adam({"lr": 1e-2}), Trace_ELBO())
        for _ in range(5):
            svi.step(**texts)
        modes[lora] = guide.median()
        svgd = pl.SVGD(
            model,
            pl.kernels.RBF(),
            Adam({"lr": 1e-3}),
            2,
            init_loc_fn=lora.init_to_adapter(jitter=0.01),
        )
        svgd.step(**texts)
        assert svgd.posterior().networks == (lora,)
        assert svgd.posterior().prior is lora.prior
    pyro.clear_param_store()
    site = next(iter(wide.sites))
    assert not torch.equal(modes[wide][site], modes[narrow][site])


@pytest.mark.filterwarnings("ignore:The weights aren't a mode")
def test_a_posterior_has_the_prior_of_the_view_that_its_model_called() -> None:
    wide, narrow = views()
    texts = [batch(6, num_labels=3)]
    found = [
        laplace(lora, pl.models.classification(lora, 6), texts)
        for lora in (wide, narrow, wide)
    ]
    for posterior, lora in zip(found, (wide, narrow, wide), strict=True):
        assert posterior.networks == (lora,)
        # Whichever view of the network it is asked about.
        for other in (wide, narrow):
            assert scale_of(posterior.prior, other) == scale_of(lora.prior, lora)
    assert_close(found[0].log_evidence(), found[2].log_evidence(), rtol=0, atol=0)
    assert float(found[0].log_evidence()) != float(found[1].log_evidence())


def pickled(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_of_views_are_views_of_one_copy(copied: Any) -> None:
    wide, narrow = views()
    twins = copied((wide, narrow))
    assert twins[0].network is twins[1].network
    assert twins[0].network is not wide.network
    assert [scale_of(lora.prior, lora) for lora in twins] == [0.5, 0.01]
    twins[1].load({site: x + 1 for site, x in wide.weights().items()})
    for site, x in wide.weights().items():
        assert torch.equal(twins[0].weights()[site], x + 1)
    pl.lift(twins[0].network)
    for lora in twins:
        with pytest.raises(RuntimeError, match="stale"):
            lora()
    wide()
    narrow()
