"""Another prior for the same mode: given, or chosen by evidence or held-out data."""

import copy
import math
import warnings
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from torch import Tensor

import pyro_lora as pl
from pyro_lora.curvature.block_gaussian import BlockGaussian, Eigenblocks
from pyro_lora.curvature.gaussian_logits import class_log_probs
from pyro_lora.curvature.structures import Structure
from pyro_lora.posteriors import prior_tuning
from pyro_lora.posteriors.prior_tuning import checked_precision, maximize_evidence
from tests.curvature.gauss_newton import (
    assert_same,
    blocks,
    flatten,
    laplace,
    precision_matrix,
    split,
)
from tests.infer.linear_regression import NOISE_SD, linear_regression
from tests.networks import batch, bert, inputs

pytestmark = pytest.mark.untrained

STRUCTURES = [
    pl.structures.KFAC(),
    pl.structures.KFAC(reduce=True),
    pl.structures.Diagonal(),
    pl.structures.Dense(),
]


# Another prior.


@pytest.mark.grid
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", ["number", "tensor", "by site"])
def test_another_precision_is_another_prior(kind: str, structure: Structure) -> None:
    network, texts = bert(3), batch(6, num_labels=3)
    lora = pl.lift(network)
    scales: Any = 0.6
    precision: Any = 1 / 0.36
    if kind == "tensor":
        precision = torch.tensor(precision)
    elif kind == "by site":
        scales = {site: 0.3 + 0.1 * i for i, site in enumerate(lora.sites)}
        precision = {site: scale**-2 for site, scale in scales.items()}
    posterior = laplace(lora, texts, structure=structure)
    changed = posterior.with_prior_precision(precision)
    other = pl.lift(copy.deepcopy(network), prior=pl.priors.normal(scales))
    expected = laplace(other, texts, structure=structure)
    tolerance = 1e-6 if kind == "tensor" else 1e-11  # the tensor is float32
    assert_same(changed.log_evidence(), expected.log_evidence(), rtol=tolerance)
    assert_same(
        flatten(changed.variance()), flatten(expected.variance()), rtol=tolerance
    )
    covariance = changed.linearized(texts).covariance_matrix
    expected_covariance = expected.linearized(texts).covariance_matrix
    assert_same(covariance, expected_covariance, rtol=10 * tolerance)
    # The first posterior is as before.
    again = laplace(lora, texts, structure=structure)
    assert_same(posterior.log_evidence(), again.log_evidence())


def layerwise(lora: pl.LiftedNetwork, scales: dict[str, Tensor], mean: float) -> Any:
    return {
        site: pyro.sample(
            site, dist.Normal(mean + zeros, scales[site] + zeros).to_event(zeros.ndim)
        )
        for site, zeros in lora.zeros().items()
    }


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("mean", [0.0, 0.4])
def test_one_precision_for_each_layer(structure: Structure, mean: float) -> None:
    network, texts = bert(3), batch(6, num_labels=3)
    lora = pl.lift(network)
    first = {site: torch.tensor(0.9).double() for site in lora.sites}
    lora = lora.with_prior(lambda lora: layerwise(lora, first, mean))
    scales = {
        site: torch.linspace(0.4, 0.7, value.shape[0])
        .double()
        .reshape(-1, *[1] * (value.ndim - 1))
        for site, value in lora.weights().items()
    }
    posterior = laplace(lora, texts, structure=structure)
    changed = posterior.with_prior_precision({s: x**-2 for s, x in scales.items()})
    other = pl.lift(
        copy.deepcopy(network), prior=lambda lora: layerwise(lora, scales, mean)
    )
    expected = laplace(other, texts, structure=structure)
    assert_same(changed.log_evidence(), expected.log_evidence())
    assert_same(flatten(changed.variance()), flatten(expected.variance()))
    for site, tau in changed.prior_precision.items():
        shape = posterior.mode()[site].shape
        assert_same(tau.expand(shape), scales[site].expand(shape) ** -2)
    # The posterior's own prior is that one.
    trace: Any = poutine.trace(changed.prior).get_trace(lora)
    expected_fn: Any = poutine.trace(other.prior).get_trace(other)
    for site, value in posterior.mode().items():
        assert_same(
            trace.nodes[site]["fn"].log_prob(value),
            expected_fn.nodes[site]["fn"].log_prob(value),
        )


def test_kronecker_structures_average_a_precision_over_each_matrix() -> None:
    lora, texts = pl.lift(bert(3)), batch(6, num_labels=3)
    full = {s: 0.5 + torch.rand_like(x) for s, x in lora.weights().items()}
    mean = {
        site: tau.mean(tuple(range(1, tau.ndim)), keepdim=True)
        for site, tau in full.items()
    }
    posterior = laplace(lora, texts)
    found, expected = map(posterior.with_prior_precision, (full, mean))
    assert_same(found.log_evidence(), expected.log_evidence())
    assert_same(flatten(found.variance()), flatten(expected.variance()))
    exact = precision_matrix(posterior) - torch.eye(len(flatten(full)))
    exact = exact + torch.diag(flatten(full))
    averaged = precision_matrix(found)
    for site, layer, place in blocks(lora):
        # Variances along all directions: generalised eigenvalues of the two.
        root = torch.linalg.cholesky(averaged[place, place])
        half = torch.linalg.solve_triangular(root, exact[place, place], upper=False)
        both = torch.linalg.solve_triangular(root, half.mT, upper=False)
        ratio = torch.linalg.eigvalsh((both + both.mT) / 2)
        tau = full[site][layer]
        assert ratio.min() > tau.min() / tau.mean() - 1e-9
        assert ratio.max() < tau.max() / tau.mean() + 1e-9
        assert ratio.max() > 1.01
    for structure in (
        pl.structures.Diagonal(),
        pl.structures.Dense(),
    ):  # these take every value
        found = laplace(lora, texts, structure=structure).with_prior_precision(full)
        exact = laplace(lora, texts, structure=structure)
        p = precision_matrix(exact) + torch.diag(flatten(full) - 1)
        assert_same(precision_matrix(found), p)


def test_the_prior_before_any_change_is_the_models() -> None:
    lora = pl.lift(bert(2), prior=pl.priors.normal(scale=0.3))
    posterior = laplace(lora, batch(5))
    trace: Any = poutine.trace(posterior.prior).get_trace(lora)
    for site in lora.sites:
        assert trace.nodes[site]["fn"].base_dist.scale.unique().item() == 0.3
    assert posterior.prior_precision.keys() == lora.sites.keys()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.0, "between 1e-08 and 1e\\+08, found 0"),
        (-1.0, "between"),
        (1e9, "between"),
        (math.nan, "between"),
        (torch.ones(7), r"shape \(1, 1, 7\) doesn't broadcast .*\(2, 1, 1\)"),
        (torch.ones(2, 1, 1, 1), "doesn't broadcast"),
        ({"nothing": 1.0}, "differ in .*'nothing'"),
    ],
)
def test_impossible_precisions_are_refused(value: Any, message: str) -> None:
    posterior = laplace(pl.lift(bert(2)), batch(5))
    with pytest.raises(ValueError, match=message):
        posterior.with_prior_precision(value)


# Choosing the prior.


def groups(posterior: pl.LaplacePosterior, per: str) -> list[list[tuple[str, int]]]:
    """What shares one precision: lists of (site, layer)."""
    layers = [(s, i) for s, x in posterior.mode().items() for i in range(x.shape[0])]
    if per == "all":
        return [layers]
    if per == "layer":
        return [[one] for one in layers]
    return [[one for one in layers if one[0] == site] for site in posterior.mode()]


def expanded(posterior: pl.LaplacePosterior) -> dict[str, Tensor]:
    """Precisions of shape (L, 1, ...)."""
    return {
        site: tau.expand(
            tau.shape if tau.shape[0] > 1 else (x.shape[0], *tau.shape[1:])
        )
        .flatten(1)[:, 0]
        .reshape(-1, *[1] * (x.ndim - 1))
        .clone()
        for (site, tau), x in zip(
            posterior.prior_precision.items(), posterior.mode().values(), strict=True
        )
    }


@pytest.mark.grid
@pytest.mark.parametrize(
    "structure", [pl.structures.KFAC(), pl.structures.Diagonal(), pl.structures.Dense()]
)
@pytest.mark.parametrize("per", ["all", "site", "layer"])
def test_evidence_is_stationary_in_each_precision(
    per: Any, structure: Structure
) -> None:
    lora, texts = pl.lift(bert(3, hidden_size=8)), batch(9, num_labels=3)
    posterior = laplace(lora, texts, structure=structure)
    best = posterior.optimize_prior(per=per)
    tau = expanded(best)
    for group in groups(posterior, per):
        shared = torch.stack([tau[site].flatten()[layer] for site, layer in group])
        assert_same(shared, shared[0].expand_as(shared))
        values = []
        for step in (-1e-3, 0.0, 1e-3):  # in log tau
            moved = {site: x.clone() for site, x in tau.items()}
            for site, layer in group:
                moved[site][layer] *= math.exp(step)
            values.append(float(posterior.with_prior_precision(moved).log_evidence()))
        below, at, above = values
        assert abs(above - below) / 2e-3 < 1e-4  # the slope
        assert above - 2 * at + below < 0  # a maximum


@pytest.mark.parametrize("structure", STRUCTURES)
def test_more_freedom_gives_more_evidence(structure: Structure) -> None:
    lora, texts = pl.lift(bert(3)), batch(9, num_labels=3)
    posterior = laplace(lora, texts, structure=structure)
    values = [posterior.log_evidence()]
    choices: list[Any] = ["all", "site", "layer"]
    for per in choices:
        best = posterior.optimize_prior(per=per)
        values.append(best.log_evidence())
        assert_same(best.optimize_prior(per=per).log_evidence(), values[-1])
    assert all(b >= a - 1e-9 for a, b in pairwise(values))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_evidence_of_one_precision_against_a_grid(structure: Structure) -> None:
    lora, texts = pl.lift(bert(3)), batch(9, num_labels=3)
    posterior = laplace(lora, texts, structure=structure)
    best = posterior.optimize_prior()
    tau = float(next(iter(best.prior_precision.values())).flatten()[0])
    grid = torch.linspace(-2, 2, 201).exp() * tau
    values = [posterior.with_prior_precision(float(t)).log_evidence() for t in grid]
    assert int(torch.stack(values).argmax()) == 100
    assert max(values) <= best.log_evidence() + 1e-9


def synthetic(seed: int) -> BlockGaussian:
    """Modes and eigenvalues that differ by decades between the layers."""
    torch.manual_seed(seed)

    def decades(low: float, high: float, *shape: int) -> Tensor:
        return 10 ** (low + (high - low) * torch.rand(*shape, dtype=torch.float64))

    loc, blocks = {}, {}
    for site in ("a", "b"):
        loc[site] = torch.randn(4, 3, 5).double() * decades(-4, 4, 4, 1, 1)
        values = decades(-4, 4, 4, 1, 1) * decades(-5, 5, 4, 3, 5)
        values[torch.rand(4, 3, 5) < 0.3] = 0
        blocks[site] = Eigenblocks(values, None, None)
    return BlockGaussian(loc, {s: torch.ones(4, 1, 1) for s in loc}, blocks)


@pytest.mark.filterwarnings("ignore:The best prior precision is 1e-08")
@pytest.mark.parametrize("seed", range(8))
def test_precisions_decades_apart_are_found(seed: int) -> None:
    gaussian = synthetic(seed)
    mean = {site: torch.zeros_like(x) for site, x in gaussian.loc.items()}
    taus = maximize_evidence(gaussian, mean, "layer")
    grid = torch.logspace(-8, 8, 4001, dtype=torch.float64)

    def log_evidence(site: str, layer: int, tau: Tensor) -> Tensor:
        w, values = gaussian.loc[site][layer], gaussian.blocks[site].values[layer]
        log_det = (values.flatten() + tau[:, None]).log().sum(1)
        return 0.5 * (w.numel() * tau.log() - tau * w.square().sum() - log_det)

    for site, tau in taus.items():
        for layer in range(4):
            best = log_evidence(site, layer, grid).max()
            gap = best - log_evidence(site, layer, tau[layer].flatten())
            assert float(gap) < 2e-3


def test_precisions_stay_within_their_bounds() -> None:
    values = torch.full((2, 3, 5), 1e12, dtype=torch.float64)
    loc = torch.zeros_like(values)
    loc[1] = 1e6  # so far out that the best precision is 1e-12
    gaussian = BlockGaussian(
        {"a": loc}, {"a": torch.ones(2, 1, 1)}, {"a": Eigenblocks(values, None, None)}
    )
    with pytest.warns(UserWarning, match=r"precision is .* at \['a'\]: the data given"):
        tau = maximize_evidence(gaussian, {"a": torch.zeros_like(loc)}, "layer")["a"]
    assert_same(tau.flatten(), torch.tensor([1e8, 1e-8]).double(), rtol=0.0)
    checked_precision({"a": tau}, {"a": loc})  # isn't refused for its rounding


@pytest.mark.parametrize("per", ["all", "site", "layer"])
def test_weights_of_which_the_data_say_nothing_keep_their_prior(per: str) -> None:
    """A layer of which no datum knows, beside one that all know."""
    torch.manual_seed(0)
    loc = torch.randn(2, 3, 5).double()
    values = torch.rand(2, 3, 5).double() * 100
    values[1] = 0
    own = torch.tensor([2.0, 7.0]).double().reshape(2, 1, 1)
    other = {"x": torch.randn(1, 4, 2).double()}
    gaussian = BlockGaussian(
        {"a": loc} | other,
        {"a": own, "x": torch.full((1, 1, 1), 3.0).double()},
        {"a": Eigenblocks(values, None, None)}
        | {"x": Eigenblocks(torch.zeros(1, 4, 2).double(), None, None)},
    )
    mean = {site: torch.zeros_like(x) for site, x in gaussian.loc.items()}
    found = maximize_evidence(gaussian, mean, per)
    tau = float(found["a"][0])
    assert abs(tau - 2) > 0.1
    if per == "all":  # they share it with those of which the data do
        assert all((x == tau).all() for x in found.values())
        return
    assert float(found["x"]) == 3
    if per == "layer":
        assert float(found["a"][1]) == 7
        gamma = (values[0] / (values[0] + tau)).sum()  # MacKay's fixed point
        assert_same(tau * loc[0].square().sum(), gamma, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:The best prior precision is 1e.08, the strongest")
def test_weights_at_their_prior_mean_have_no_best_precision() -> None:
    network = bert(3)
    with torch.no_grad():  # LoRA's B before training
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    posterior = laplace(pl.lift(network), batch(9, num_labels=3))
    best = posterior.optimize_prior(per="site")
    tau = dict(best.prior_precision)
    for site in tau:
        if site.endswith(".B"):  # the evidence grows towards a limit
            assert float(tau[site].max()) > 100
            tau[site] = torch.full_like(tau[site], 1e8)
    limit = posterior.with_prior_precision(tau).log_evidence()
    assert 0 <= float(limit - best.log_evidence()) < 1e-2


def test_held_out_nll_picks_the_best_of_the_grid() -> None:
    lora, texts = pl.lift(bert(3)), batch(9, num_labels=3)
    posterior = laplace(lora, texts)
    held_out = batch(8, num_labels=3)
    best = posterior.optimize_prior(objective="nll", batches=split(held_out, 3))
    precision = float(next(iter(best.prior_precision.values())).flatten()[0])
    grid = torch.logspace(-4, 6, 81, dtype=torch.float64)
    losses = []
    for tau in grid:
        logits = posterior.with_prior_precision(float(tau)).linearized(held_out)
        log_p = class_log_probs(logits).gather(1, held_out["labels"][:, None])
        losses.append(-float(log_p.sum()))
    expected = float(grid[torch.tensor(losses).argmin()])
    assert precision == pytest.approx(expected, rel=1e-12)
    assert min(losses) < losses[0]
    assert min(losses) < losses[-1]


@pytest.mark.filterwarnings("ignore:The weights aren't a mode")
@pytest.mark.filterwarnings("ignore:The best prior precision is")
@pytest.mark.parametrize("of_tokens", [True, False])
def test_held_out_nll_of_several_outcomes_a_datum(of_tokens: bool) -> None:
    lora = pl.lift(bert(3, num_layers=1, of_tokens=of_tokens))
    texts, held_out = batch(6, num_labels=3), batch(6, num_labels=3)
    with torch.no_grad(), lora.bind(lora.weights()) as net:
        for one in (texts, held_out):
            logits = net(**inputs(one)).logits
            if of_tokens:  # less often what the network says than it is sure of
                one["labels"] = dist.Categorical(logits=0.5 * logits).sample()
                one["labels"][:, 0] = -100
            else:
                one["labels"] = (logits > 0).long()
                one["labels"][::2] = 1 - one["labels"][::2]
                one["labels"][0, 1] = -100
    models = pl.models
    model = (models.token_classification if of_tokens else models.multi_label)(lora, 6)
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
    posterior = guide.laplace_approximation([texts])
    best = posterior.optimize_prior(objective="nll", batches=split(held_out, 2))
    tau = float(next(iter(best.prior_precision.values())).flatten()[0])

    def nll(tau: float) -> float:
        tuned = posterior.with_prior_precision(tau)
        found = pl.predict(tuned, [held_out], method="linearized", tokens="each")
        return found.metrics()["nll"]

    others = [tau * 10 ** (k / 8) for k in (-15, -8, -1, 1, 8, 15)]
    assert nll(tau) < max(map(nll, others))
    assert nll(tau) <= min(nll(x) for x in others if 1e-4 <= x <= 1e6)


@given(slope=st.sampled_from([0.0, 1.0, -1.0]), per=st.sampled_from(["all", "site"]))
@settings(max_examples=6, deadline=None, database=None)
def test_held_out_nll_at_the_grids_end_warns(slope: float, per: Any) -> None:
    """Losses that only rise, only fall, or have their least inside of the grid."""
    loc = {"a": torch.zeros(2, 3), "b": torch.zeros(1)}

    def losses(*args: Any) -> Tensor:
        taus = [[t.log10().mean() for t in prior.values()] for prior in args[3]]
        steps = torch.tensor(taus)  # (G, sites)
        by_site = slope * steps if slope else (steps - 1).square()
        return by_site.sum(1)

    with (
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(record=True) as w,
    ):
        warnings.simplefilter("always")
        patch.setattr(prior_tuning, "_nll", losses)
        gaussian: Any = SimpleNamespace(loc=loc)
        found = prior_tuning.minimize_nll(None, gaussian, [{}], per)  # type: ignore[arg-type]
    ends = {0.0: 10.0, 1.0: 1e-4, -1.0: 1e6}
    for tau in found.values():
        assert float(tau.flatten()[0]) == pytest.approx(ends[slope], rel=1e-6)
    assert len(w) == (slope != 0)
    if slope:
        for word in ("'a'", "'b'", f"{ends[slope]:g}", "with_prior_precision"):
            assert word in str(w[0].message)


def test_held_out_nll_of_real_outcomes() -> None:
    task = linear_regression()
    posterior = task.laplace(structure=pl.structures.Dense())
    x = torch.randn(20, 3).double()
    noise = 0.6 * torch.randn(20).double()
    design = torch.cat([x, torch.ones(20, 1).double()], 1)
    y = design @ task.mode + noise
    held_out = [{"x": x[:9], "y": y[:9]}, {"x": x[9:], "y": y[9:]}]
    best = posterior.optimize_prior(objective="nll", batches=held_out)
    precision = float(next(iter(best.prior_precision.values())).flatten()[0])
    gram = task.design.mT @ task.design / NOISE_SD**2
    grid = torch.logspace(-4, 6, 81, dtype=torch.float64)
    losses = []
    for tau in grid:  # at the mode that there is, as Laplace does
        covariance = torch.linalg.inv(gram + tau * torch.eye(4))
        variance = (design @ covariance * design).sum(1) + NOISE_SD**2
        fn = dist.Normal(design @ task.mode, variance.sqrt())
        losses.append(-fn.log_prob(y).sum())
    expected = torch.stack(losses)
    assert 0 < int(expected.argmin()) < 80
    assert precision == pytest.approx(float(grid[expected.argmin()]), rel=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per": "matrix"}, "per must be 'all', .*'layer'.*'matrix'"),
        ({"objective": "accuracy"}, "'evidence', 'loo' or 'nll'"),
        ({"objective": "nll"}, "needs held-out batches"),
        ({"objective": "nll", "per": "site", "batches": [{}]}, "Batch 0, .*input_ids"),
        ({"objective": "nll", "per": "prior", "batches": [{}]}, "no per='prior'"),
        ({"per": "prior"}, "no pyro.param.*'layer'"),
        ({"batches": [{}]}, "take no batches"),
        ({"objective": "nll", "batches": []}, "no batches"),
        (
            {"objective": "nll", "batches": [inputs(batch(3))]},
            "Held-out batch 0 has no labels",
        ),
    ],
)
def test_impossible_searches_are_refused(options: Any, message: str) -> None:
    posterior = laplace(pl.lift(bert(2)), batch(5))
    with pytest.raises(ValueError, match=message):
        posterior.optimize_prior(**options)
