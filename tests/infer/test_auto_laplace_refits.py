"""Prior parameters trained by the evidence, modes that follow, and what it costs."""

import math
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.optim import Adam
from torch import Tensor
from torch.distributions import constraints

import pyro_lora as pl
from pyro_lora.curvature.gaussian_logits import class_log_probs
from pyro_lora.curvature.structures import Structure
from tests.curvature.gauss_newton import assert_same, flatten, laplace, split
from tests.infer.linear_regression import linear_regression
from tests.networks import batch, bert

ignore_mode = pytest.mark.untrained


# pyro.param statements inside a prior.


def normal_prior(lora: pl.LiftedNetwork) -> dict[str, Tensor]:
    scale = pyro.param(
        "scale", torch.tensor(0.8).double(), constraint=constraints.positive
    )
    return {
        site: pyro.sample(site, dist.Normal(zeros, scale).to_event(zeros.ndim))
        for site, zeros in lora.zeros().items()
    }


def normal_by_hand(lora: pl.LiftedNetwork) -> dict[str, Tensor]:
    """Differentiable in its parameter, the mean of the head's weights, too."""
    scale = pyro.param(
        "scale", torch.tensor(0.8).double(), constraint=constraints.positive
    )
    center = pyro.param("center", torch.tensor(0.0).double())
    return {
        site: pyro.sample(
            site,
            dist.Normal(zeros + center * ("head" in site), scale).to_event(zeros.ndim),
        )
        for site, zeros in lora.zeros().items()
    }


def student_prior(lora: pl.LiftedNetwork) -> dict[str, Tensor]:
    scale = pyro.param(
        "scale", torch.tensor(0.8).double(), constraint=constraints.positive
    )
    return {
        site: pyro.sample(
            site, dist.StudentT(4.0, zeros, scale + zeros).to_event(zeros.ndim)
        )
        for site, zeros in lora.zeros().items()
    }


@ignore_mode
@pytest.mark.parametrize(
    "structure", [pl.structures.KFAC(), pl.structures.Diagonal(), pl.structures.Dense()]
)
def test_a_scale_is_what_one_precision_is(structure: Structure) -> None:
    pyro.clear_param_store()
    lora, texts = pl.lift(bert(3, hidden_size=8), prior=normal_prior), batch(9)
    posterior = laplace(lora, texts, structure=structure)
    best = posterior.optimize_prior(per="prior")
    expected = posterior.optimize_prior(per="all")
    assert_same(best.log_evidence(), expected.log_evidence(), rtol=1e-8)
    for site, tau in expected.prior_precision.items():
        shape = lora.weights()[site].shape
        found = best.prior_precision[site].expand(shape)
        assert_same(found, tau.expand(shape), rtol=1e-4)
    # The store and the network's prior are as before; the posterior's prior isn't.
    assert float(pyro.param("scale").detach()) == pytest.approx(0.8, rel=1e-6)
    trace: Any = poutine.trace(best.prior).get_trace(lora)
    site = next(iter(lora.sites))
    scale = trace.nodes[site]["fn"].base_dist.scale.flatten()[0]
    tau = best.prior_precision[site].flatten()[0]
    assert_same(scale, tau.rsqrt())
    assert best.optimize_prior(per="prior").log_evidence() >= best.log_evidence() - 1e-8


@pytest.mark.grid
@ignore_mode
@pytest.mark.parametrize("prior", [student_prior, normal_by_hand])
@pytest.mark.parametrize("structure", [pl.structures.KFAC(), pl.structures.Dense()])
def test_the_evidence_is_stationary_in_the_parameters(
    prior: Any, structure: Structure
) -> None:
    pyro.clear_param_store()
    lora, texts = pl.lift(bert(3, hidden_size=8), prior=prior), batch(9, num_labels=3)
    posterior = laplace(lora, texts, structure=structure)
    best = posterior.optimize_prior(per="prior")
    assert best.log_evidence() > posterior.log_evidence() + 0.1
    trace: Any = poutine.trace(best.prior).get_trace(lora)
    params = {k: v["value"] for k, v in trace.nodes.items() if v["type"] == "param"}

    def evidence() -> float:
        return float(laplace(lora, texts, structure=structure).log_evidence())

    for name, value in params.items():
        values = []
        for step in (-1e-3, 0.0, 1e-3):
            with torch.no_grad():
                for other, at in params.items():
                    moved = at + step if other == name else at
                    pyro.get_param_store()[other] = moved
            values.append(evidence())
        below, at, above = values
        assert at == pytest.approx(float(best.log_evidence()), rel=1e-9)
        assert abs(above - below) / 2e-3 < 1e-3
        assert above - 2 * at + below < 0
        assert value.isfinite()


@ignore_mode
def test_parameters_that_changed_since_the_fit() -> None:
    pyro.clear_param_store()
    lora = pl.lift(bert(2), prior=student_prior)
    posterior = laplace(lora, batch(5))
    pyro.get_param_store()["scale"] = torch.tensor(0.5).double()
    with pytest.raises(ValueError, match=r"values changed since.*Fit again"):
        posterior.optimize_prior(per="prior")


# A mode that follows its prior.


@pytest.mark.slow
@pytest.mark.parametrize("per", ["all", "prior"])
def test_alternation_finds_the_best_evidence_of_a_linear_model(per: Any) -> None:
    pyro.clear_param_store()
    regression = linear_regression()
    if per == "prior":
        lora = regression.lora.with_prior(normal_prior)
        regression = replace(regression, lora=lora)
    guide, whole = regression.guide(), [regression.whole]
    posterior = guide.laplace_approximation(regression.batches)
    before = {s: x.clone() for s, x in regression.lora.weights().items()}
    best, optim = posterior.optimize_prior(per=per), Adam({"lr": 0.02})
    for _ in range(6):
        best = guide.refit(best, whole, optim, num_epochs=250).optimize_prior(per=per)
    # The Laplace evidence is exact here: its maximum over the prior's scale, first
    # roughly, then between that one's neighbours.
    low, high = -0.7, 1.5
    for _ in range(2):
        scales = torch.linspace(low, high, 89).exp()
        evidence = torch.stack(
            [replace(regression, prior_sd=float(s)).log_evidence for s in scales]
        )
        top = int(evidence.argmax())
        assert 0 < top < 88
        low, high = scales[top - 1].log().item(), scales[top + 1].log().item()
    scale = float(next(iter(best.prior_precision.values())).flatten()[0]) ** -0.5
    assert float(evidence.max() - best.log_evidence()) == pytest.approx(0, abs=1e-5)
    assert scale == pytest.approx(float(scales[top]), rel=5e-3)
    mode = replace(regression, prior_sd=scale).mode
    torch.testing.assert_close(flatten(best.mode()), mode, rtol=0, atol=1e-2)
    # Network and model are as before.
    assert best.model is posterior.model
    for site, x in regression.lora.weights().items():
        assert_same(x, before[site])
    alone = posterior.optimize_prior(per=per)
    assert best.log_evidence() > alone.log_evidence() - 1e-9


def test_a_refit_is_the_fit_at_the_mode_that_follows() -> None:
    regression = linear_regression()
    guide = regression.guide(structure=pl.structures.Dense())
    posterior = guide.laplace_approximation(regression.batches)
    narrow = posterior.with_prior_precision(25.0)
    optim = Adam({"lr": 0.02})
    fitted = guide.refit(narrow, [regression.whole], optim, num_epochs=400)
    expected = replace(regression, prior_sd=0.2)
    torch.testing.assert_close(flatten(fitted.mode()), expected.mode, rtol=0, atol=1e-4)
    precision = fitted.gaussian.fisher + 25.0 * torch.eye(4)
    torch.testing.assert_close(precision, expected.precision, rtol=1e-8, atol=1e-8)
    assert fitted.prior is narrow.prior
    assert fitted.model is posterior.model
    # The curvature is the guide's own fit there.
    again = replace(fitted, model=None).log_evidence()
    assert_same(fitted.log_evidence(), again)


@ignore_mode
def test_a_posterior_without_a_model_is_trained_on_with_the_guides() -> None:
    regression = linear_regression()
    guide = regression.guide(structure=pl.structures.Dense())
    posterior = guide.laplace_approximation(regression.batches)
    narrow = posterior.with_prior_precision(25.0)
    one, other = (
        guide.refit(x, [regression.whole], Adam({"lr": 0.02}), num_epochs=5)
        for x in (narrow, replace(narrow, model=None))
    )
    assert_same(one.log_evidence(), other.log_evidence())
    assert_same(flatten(one.mode()), flatten(other.mode()))


def test_a_refit_takes_a_laplace_posterior_and_an_optimizer() -> None:
    regression = linear_regression()
    guide = regression.guide()
    posterior = guide.laplace_approximation(regression.batches)
    optim = Adam({"lr": 0.1})
    point = pl.ensemble(regression.lora, [posterior.mode()])
    with pytest.raises(TypeError, match="posterior must be a LaplacePosterior"):
        guide.refit(point, regression.batches, optim)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="optim"):
        guide.refit(posterior, regression.batches, torch.optim.Adam)
    with pytest.raises(ValueError, match=r"iterator.*several passes"):
        guide.refit(posterior, iter(regression.batches), optim)
    with pytest.raises(ValueError, match="num_epochs"):
        guide.refit(posterior, regression.batches, optim, num_epochs=0)


# Several precisions by held-out data.


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The best prior precision")
@ignore_mode
@pytest.mark.parametrize("per", ["site", "layer"])
def test_held_out_nll_of_several_precisions(per: Any) -> None:
    lora, texts = pl.lift(bert(2, num_layers=1, hidden_size=8)), batch(9)
    posterior = laplace(lora, texts)
    held_out = batch(8)

    def nll(found: pl.LaplacePosterior) -> float:
        log_p = class_log_probs(found.linearized(held_out))
        return -float(log_p.gather(1, held_out["labels"][:, None]).sum())

    options: Any = {"objective": "nll", "batches": split(held_out, 5)}
    best = posterior.optimize_prior(per=per, **options)
    assert nll(best) <= nll(posterior.optimize_prior(**options)) + 1e-12
    # The last group to be searched is at its best, the others fixed.
    tau = {site: x.clone() for site, x in best.prior_precision.items()}
    last = list(tau)[-1]
    losses = []
    for value in torch.logspace(-4, 6, 81, dtype=torch.float64):
        tau[last] = torch.full_like(tau[last], float(value))
        losses.append(nll(posterior.with_prior_precision(tau)))
    assert min(losses) == pytest.approx(nll(best), abs=1e-10)


# What evaluations cost.


@ignore_mode
@pytest.mark.parametrize(
    "structure",
    [pl.structures.KFAC(), pl.structures.KFAC(reduce=True), pl.structures.Diagonal()],
)
def test_evaluations_only_shift_eigenvalues(
    structure: Structure, monkeypatch: pytest.MonkeyPatch
) -> None:
    posterior = laplace(pl.lift(bert(3)), batch(6, num_labels=3), structure=structure)

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a decomposition or a pass over the data")

    for name in ("eigh", "eigvalsh", "eig", "svd", "cholesky", "slogdet", "inv", "qr"):
        monkeypatch.setattr(torch.linalg, name, never)
    monkeypatch.setattr(torch, "logdet", never)
    silent = replace(posterior, model=never)
    values = [
        float(silent.with_prior_precision(math.exp(i / 10 - 5)).log_evidence())
        for i in range(100)
    ]
    best = silent.optimize_prior(per="layer")
    assert max(values) <= float(best.log_evidence())
    num_weights = sum(x.numel() for x in posterior.mode().values())
    with _LargestTensor() as seen:
        silent.optimize_prior()
    # The eigenvalues of all matrices at once, and no matrix over weights.
    assert seen.numel <= num_weights


class _LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@ignore_mode
def test_a_refit_of_outcomes_behind_an_obs_mask() -> None:
    lora, texts = pl.lift(bert(3)), batch(6, num_labels=3)
    data = split({**texts, "mask": torch.arange(6) % 3 > 0}, 3)

    def refitted(by_pyro: bool) -> pl.LaplacePosterior:
        def model(mask: Tensor, labels: Tensor | None = None, **texts: Tensor) -> None:
            fn: Any = dist.Categorical(logits=lora()(**texts).logits)
            with pyro.plate("data", 6, subsample=texts["input_ids"]):
                if by_pyro:
                    pyro.sample("y", fn, obs=labels, obs_mask=mask)
                else:
                    pyro.sample("y", fn.mask(mask), obs=labels)

        guide = pl.AutoLaplace(
            model,
            init_loc_fn=lora.init_to_adapter(),
            structure=pl.structures.Dense(),
        )
        start = guide.laplace_approximation(data)
        return guide.refit(start, data, Adam({"lr": 1e-2}), num_epochs=2)

    found, expected = refitted(True), refitted(False)
    assert all((expected.mode()[s] != x).any() for s, x in lora.weights().items())
    assert_same(found.mode(), expected.mode(), rtol=1e-10)
    assert_same(found.log_evidence(), expected.log_evidence(), rtol=1e-10)
