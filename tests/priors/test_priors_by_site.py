"""Different priors on different sites."""

from typing import cast

import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.testing import assert_close

import pyro_lora as pl
from tests.networks import bert, particles

normal = pl.priors.normal


def scales(lora: pl.LiftedNetwork) -> dict[str, float]:
    nodes = poutine.trace(lora).get_trace().nodes
    return {site: nodes[site]["fn"].stddev.unique().item() for site in lora.sites}


def test_the_first_pattern_that_matches_decides() -> None:
    prior = pl.priors.by_site(
        {
            "head.*.bias": normal(1.0),
            "head.*": normal(2.0),
            "lora.*.query.?": normal(3.0),
            "*.[B]": normal(4.0),
            "*": normal(5.0),
        }
    )
    lora = pl.lift(bert(), prior=prior)
    expected = {
        "query.A": 3.0,
        "query.B": 3.0,
        "value.A": 5.0,
        "value.B": 4.0,
        "classifier.weight": 2.0,
        "classifier.bias": 1.0,
    }
    found = {".".join(s.split(".")[-2:]): x for s, x in scales(lora).items()}
    assert found == expected


def test_patterns_can_be_nested() -> None:
    lora = pl.lift(bert())
    inner = pl.priors.by_site({"*.A": normal(1.0), "*.B": normal(2.0)})
    lora = lora.with_prior(pl.priors.by_site({"lora.*": inner, "head.*": normal(3.0)}))
    ends = {"A": 1.0, "B": 2.0, "weight": 3.0, "bias": 3.0}
    for site, scale in scales(lora).items():
        assert scale == ends[site.rpartition(".")[2]]


def test_each_prior_sees_its_own_sites_and_their_values() -> None:
    lora = pl.lift(bert())
    seen = []

    def prior(part: pl.LiftedNetwork) -> dict[str, Tensor]:
        seen.append(part)
        return normal(1.0, center="init")(part)

    lora = lora.with_prior(
        pl.priors.by_site({"*.query.*": prior, "*.A": prior, "*": prior})
    )
    draws = particles(lora, 2)
    start = lora.weights()
    lora.load({site: value[0] for site, value in draws.items()})
    lora()
    query, a, rest = seen
    assert [len(part.sites) for part in seen] == [2, 1, 3]
    assert {**query.sites, **a.sites, **rest.sites} == lora.sites
    for part in seen:
        assert part.network is lora.network
        assert list(part.zeros()) == list(part.sites)
        for site in part.sites:
            assert torch.equal(part.weights()[site], draws[site][0])
            assert torch.equal(part.initial_weights[site], start[site])
            assert torch.equal(part.zeros()[site], 0 * start[site])
    whole = lora.delta_weight_factors(draws)
    for part, count in ((query, 2), (a, 0), (rest, 0)):
        own = {site: draws[site] for site in part.sites}
        factors = part.delta_weight_factors(own)
        assert len(factors) == count
        for path, pair in factors.items():
            assert path.endswith("query")
            for found, expected in zip(pair, whole[path], strict=True):
                assert_close(found, expected, rtol=0, atol=0)


def test_the_same_prior_on_two_groups_shares_nothing() -> None:
    lora = pl.lift(bert())
    prior = pl.priors.hierarchical()
    lora = lora.with_prior(pl.priors.by_site({"*.query.*": prior, "*": prior}))
    nodes = poutine.trace(lora).get_trace().nodes
    assert sum(n.startswith("prior.mean_log_scale.") for n in nodes) == 2
    assert {f"prior.log_scale.{site}" for site in lora.sites} <= set(nodes)


def test_every_site_needs_a_prior() -> None:
    lora = pl.lift(bert())
    lora = lora.with_prior(
        pl.priors.by_site({"lora.*": normal(), "head.*.weight": normal()})
    )
    with pytest.raises(
        ValueError, match=r"Sites \['head\.classifier\.bias'\] match none.*'lora\.\*'"
    ):
        lora()


@pytest.mark.parametrize("pattern", ["heads.*", "HEAD.*", "lora.*.query.A"])
def test_a_pattern_without_sites_is_an_error(pattern: str) -> None:
    lora = pl.lift(bert())
    patterns = {"lora.*": normal(), pattern: normal(), "*": normal()}
    lora = lora.with_prior(pl.priors.by_site(patterns))
    with pytest.raises(
        ValueError, match=r"Patterns \['.*'\] decide for none.*narrower"
    ):
        lora()


def test_the_pattern_for_the_rest_may_be_left_with_nothing() -> None:
    lora = pl.lift(bert())
    patterns = {"lora.*": normal(), "head.*": normal(), "*": normal()}
    lora = lora.with_prior(pl.priors.by_site(patterns))
    assert len(scales(lora)) == len(lora.sites)


def test_there_are_patterns() -> None:
    with pytest.raises(ValueError, match="by_site got no patterns"):
        pl.priors.by_site(cast(dict[str, pl.priors.Prior], {}))
