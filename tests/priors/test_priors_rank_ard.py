"""A precision for each rank component: its density, its pairs, what it finds."""

import itertools
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from peft.tuners.lora.layer import ParamWrapper
from pyro import poutine
from torch import Tensor, nn
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora.likelihood.model_trace import trace_at
from tests.networks import adapted, bert


def test_a_rank_component_is_multivariate_student_t() -> None:
    prior = pl.priors.rank_ard(2.0, df=3.0)
    lora = pl.lift(bert(), prior=prior)
    trace = poutine.trace(lora).get_trace()
    trace.compute_log_prob()
    values = {name: node.get("value") for name, node in trace.nodes.items()}
    names = [n for n in values if n.startswith("prior.")]
    assert len(names) == 2  # query and value
    for name in names:
        a, b = (values[f"{name[21:-1]}{role}"] for role in "AB")
        precision = values[name]
        total = torch.tensor(0.0).double()
        for layer, r in itertools.product(range(2), range(3)):
            w = torch.cat([a[layer, r], b[layer, :, r]])
            student = scipy.stats.multivariate_t(shape=4.0 * torch.eye(len(w)), df=3.0)
            # p(w, alpha) = p(w) p(alpha | w), the latter a Gamma by conjugacy.
            gamma = scipy.stats.gamma(
                (3 + len(w)) / 2, scale=2 / (3 * 4 + w.square().sum())
            )
            total += student.logpdf(w) + gamma.logpdf(precision[layer, r])
        own = [name, *(f"{name[21:-1]}{role}" for role in "AB")]
        log_prob = sum(trace.nodes[n]["log_prob"] for n in own)
        assert_close(log_prob, total, rtol=1e-6, atol=0)


def test_rank_components_are_found_where_ranks_and_shapes_differ() -> None:
    network = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 4)).double()
    peft_model = adapted(
        network, target_modules=["0", "1", "2"], rank_pattern={"1": 2}, r=3
    )
    lora = pl.lift(peft_model, prior=pl.priors.rank_ard())
    nodes = poutine.trace(lora).get_trace().nodes
    sds = {}  # parameter name -> sd of its rank components
    for site, names in lora.sites.items():
        for i, name in enumerate(names):
            scale = nodes[site]["fn"].base_dist.scale[i]
            sds[name] = scale[:, 0] if ".lora_A." in name else scale[0]
    assert len(sds) == 6
    for name, sd in sds.items():
        assert_close(sd, sds[name.replace(".lora_A.", ".lora_B.")], rtol=0, atol=0)
        assert len(set(sd.tolist())) == (2 if ".model.1." in name else 3)


class Experts(nn.Module):
    """A mixture of linear experts, stacked in one parameter, averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 5).double())  # (experts, in, out)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eio->bo", x, self.weight) / 3


def test_rank_components_of_stacked_experts_are_paired_as_peft_pairs_them() -> None:
    network = nn.ModuleDict({"experts": Experts()})
    network.forward = lambda x: network["experts"](x)
    peft_model = adapted(network, target_parameters=["experts.weight"], r=2)
    lora = pl.lift(peft_model, prior=pl.priors.rank_ard())
    nodes = poutine.trace(lora).get_trace().nodes
    a_site, b_site = sorted(lora.sites)
    rows = nodes[a_site]["fn"].base_dist.scale[0, :, 0]
    columns = nodes[b_site]["fn"].base_dist.scale[0, 0]
    (layer,) = (m for m in peft_model.modules() if isinstance(m, ParamWrapper))
    for i, j in itertools.product(range(6), range(6)):
        weights = {site: torch.zeros_like(x) for site, x in lora.weights().items()}
        weights[a_site][0, i] = 1
        weights[b_site][0, :, j] = 1
        lora.load(weights)
        together = bool(layer.get_delta_weight("default").any())
        assert together == bool(rows[i] == columns[j])


@pytest.mark.slow
def test_rank_ard_finds_that_one_rank_is_enough() -> None:
    peft_model = adapted(nn.Sequential(nn.Linear(6, 5)).double(), target_modules=["0"])
    lora = pl.lift(peft_model, prior=pl.priors.rank_ard(df=0.2))
    base = peft_model.base_model.model[0].base_layer
    x = torch.randn(50, 6).double()
    update = 2 * torch.outer(torch.randn(5), torch.randn(6)).double()
    with torch.no_grad():
        y = base(x) + x @ update.mT + 0.3 * torch.randn(50, 5)

    def model() -> None:
        mean = lora()(x)
        with pyro.plate("data", 50):
            pyro.sample("y", dist.Normal(mean, 0.3).to_event(1), obs=y)

    a_site = next(site for site in lora.sites if site.endswith("A"))
    log_precision = torch.zeros(1, 3).double().requires_grad_()
    weights = {site: x.requires_grad_() for site, x in lora.weights().items()}
    optimizer = torch.optim.LBFGS(
        [*weights.values(), log_precision],
        max_iter=500,
        line_search_fn="strong_wolfe",
        tolerance_change=1e-12,
        tolerance_grad=1e-5,
    )

    def loss() -> Any:
        optimizer.zero_grad()
        precision = {f"prior.rank_precision.{a_site}": log_precision.exp()}
        value = -trace_at(model, {**weights, **precision}, {}).log_prob_sum()
        value.backward()
        return value

    optimizer.step(loss)
    precision = log_precision.detach()[0].exp()
    small, middle, large = sorted((precision**-0.5).tolist())
    assert large > 3 * middle
    assert middle < 1.5 * small  # both unused: at what the prior alone makes of them
    # A rank-one update has 10 degrees of freedom, each with a standard error near
    # .3 / sqrt(50).
    ((b, a),) = lora.delta_weight_factors(weights).values()
    assert (b @ a - update).norm() < 5 * 10**0.5 * 0.3 / 50**0.5
    # The joint mode's closed form, alpha = (D_r + nu - 2) / (|w_r|^2 + nu s^2).
    squares = weights[a_site][0].square().sum(1)
    squares = squares + weights[a_site[:-1] + "B"][0].square().sum(0)
    assert_close(precision, (11 + 0.2 - 2) / (squares + 0.2), rtol=1e-4, atol=0)


def test_rank_ard_needs_pairs_of_a_and_b() -> None:
    lora = pl.lift(nn.Linear(3, 2), prior=pl.priors.rank_ard())
    with pytest.raises(ValueError, match=r"rank_ard needs LoRA.*'base\.weight'"):
        lora()
    rest = pl.priors.normal()
    lora = pl.lift(bert())
    lora = lora.with_prior(
        pl.priors.by_site({"*.value.A": rest, "*": pl.priors.rank_ard()})
    )
    with pytest.raises(
        ValueError, match=r"value\.B': expected an A of '.*' with 3 rows.*found None"
    ):
        lora()
