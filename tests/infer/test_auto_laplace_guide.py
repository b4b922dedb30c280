"""AutoLaplace and its posterior as citizens of Pyro."""

import copy
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Importance, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import pyro_lora as pl
from pyro_lora.curvature.structures import Structure
from tests.curvature.gauss_newton import assert_same, flatten, laplace, split
from tests.infer.linear_regression import linear_regression
from tests.networks import adapted, batch, bert, inputs, llama, particles

STRUCTURES = [pl.structures.KFAC(), pl.structures.Diagonal(), pl.structures.Dense()]


def converged(lora: pl.LiftedNetwork, texts: dict[str, Tensor]) -> pl.AutoLaplace:
    """A guide at the mode of the log joint, found by L-BFGS on the adapter."""
    model = pl.models.classification(lora, len(texts["labels"]))
    leaves = {s: x.requires_grad_() for s, x in lora.weights().items()}
    optimizer = torch.optim.LBFGS(
        list(leaves.values()), max_iter=200, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        trace: Any = poutine.trace(poutine.condition(model, leaves)).get_trace(**texts)
        value: Any = -trace.log_prob_sum()
        value.backward()
        return value

    optimizer.step(loss)
    mode = {s: x.detach() for s, x in leaves.items()}
    return pl.AutoLaplace(model, init_loc_fn=lora.init_to(mode))


# The posterior as a guide.


@pytest.mark.grid
@pytest.mark.untrained
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("build", [bert, llama])
def test_predictive(build: Any, parallel: bool, structure: Structure) -> None:
    lora, texts = pl.lift(build(3)), batch(5, num_labels=3)
    posterior = laplace(lora, texts, structure=structure)
    model = pl.models.classification(lora, 5)
    predictive = Predictive(model, guide=posterior, num_samples=4, parallel=parallel)
    drawn = predictive(**inputs(texts))
    assert drawn["y"].shape == (4, 5)
    again = Predictive(
        model,
        guide=posterior,
        num_samples=4,
        parallel=parallel,
        return_sites=list(lora.sites),
    )(**inputs(texts))
    for site, value in lora.weights().items():
        found = again[site]
        assert found.reshape(4, *value.shape).shape[0] == 4
        assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_elbo_of_an_exact_posterior_is_the_evidence(structure: Structure) -> None:
    # log p(y, w) - log q(w) is log p(y) for every draw w.
    task = linear_regression(orthogonal=structure != pl.structures.Dense())
    posterior = task.laplace(structure=structure)
    expected = torch.tensor(float(task.log_evidence)).double()
    losses = {
        "loop": Trace_ELBO(num_particles=3),
        "vectorized": Trace_ELBO(
            num_particles=3, vectorize_particles=True, max_plate_nesting=1
        ),
        "deeper": Trace_ELBO(
            num_particles=3, vectorize_particles=True, max_plate_nesting=2
        ),
    }
    for name, elbo in losses.items():
        found = torch.tensor(-elbo.loss(task.model, posterior, **task.whole)).double()
        assert_same(found, expected, msg=name)
    if structure != pl.structures.Dense():  # which has an auxiliary site
        loss = TraceMeanField_ELBO().loss(task.model, posterior, **task.whole)
        assert abs(-loss - float(expected)) < 5  # a KL with draws, finite


@pytest.mark.parametrize("structure", STRUCTURES)
def test_importance_weights_of_an_exact_posterior_are_equal(
    structure: Structure,
) -> None:
    task = linear_regression(orthogonal=structure != pl.structures.Dense())
    posterior = task.laplace(structure=structure)
    importance = Importance(task.model, posterior, num_samples=5).run(**task.whole)
    log_weights = torch.stack(importance.log_weights)
    assert_same(log_weights, task.log_evidence.expand(5))


@pytest.mark.untrained
@pytest.mark.parametrize("structure", STRUCTURES)
def test_sites_name_their_network(structure: Structure) -> None:
    lora, texts = pl.lift(bert(3)), batch(5, num_labels=3)
    posterior = laplace(lora, texts, structure=structure)
    trace: Any = poutine.trace(posterior).get_trace(**texts)
    for site, value in lora.weights().items():
        node = trace.nodes[site]
        assert node["infer"]["lora"] == (lora,)
        assert node["value"].shape == value.shape
        assert node["value"].dtype == value.dtype
    drawn = posterior(**texts)
    assert drawn.keys() == lora.sites.keys()
    log_q: Any = poutine.trace(posterior).get_trace(**texts)
    assert_same(
        log_q.log_prob_sum(),
        posterior.log_prob({site: log_q.nodes[site]["value"] for site in drawn}),
    )


@pytest.mark.untrained
@pytest.mark.parametrize("structure", STRUCTURES)
def test_sites_in_a_plate_of_particles(structure: Structure) -> None:
    lora, texts = pl.lift(bert(3)), batch(5, num_labels=3)
    posterior = laplace(lora, texts, structure=structure)
    with pyro.plate("particles", 4, dim=-2):
        trace: Any = poutine.trace(posterior).get_trace(**texts)
    for site, value in lora.weights().items():
        assert trace.nodes[site]["value"].shape == (4, 1, *value.shape)
    trace.compute_log_prob()
    log_prob = sum(
        node["log_prob"] for node in trace.nodes.values() if "log_prob" in node
    )
    weights = {site: trace.nodes[site]["value"] for site in lora.sites}
    assert_same(log_prob, posterior.log_prob(weights))


# Where the mode comes from.


@pytest.mark.untrained
def test_svi_moves_the_mode() -> None:
    lora, texts = pl.lift(bert(3)), batch(7, num_labels=3)
    model = pl.models.classification(lora, 7)
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
    svi = SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO())
    losses = [svi.step(**texts) for _ in range(10)]
    assert losses[-1] < losses[0]
    posterior = guide.laplace_approximation(split(texts, 3))
    trained = guide.median()
    for site, value in posterior.mode().items():
        assert torch.equal(value, trained[site])
        assert not torch.equal(value, lora.weights()[site])
    log_joint = float(posterior.log_likelihood + posterior.log_prior)
    assert log_joint == pytest.approx(-svi.evaluate_loss(**texts))
    svi.step(**texts)  # the posterior is a value, which further training leaves alone
    for site, value in posterior.mode().items():
        assert not torch.equal(value, guide.median()[site])


@pytest.mark.untrained
def test_without_svi_the_param_store_is_untouched() -> None:
    lora, texts = pl.lift(bert(3)), batch(7, num_labels=3)
    pyro.param("a_users_own", torch.ones(2))
    posterior = laplace(lora, texts, 3)
    posterior.optimize_prior().sample(2)
    posterior.linearized(texts)
    assert list(pyro.get_param_store().keys()) == ["a_users_own"]
    assert_same(flatten(posterior.mode()), flatten(lora.weights()))


@pytest.mark.untrained
def test_guides_side_by_side_keep_their_modes() -> None:
    lora, texts = pl.lift(bert(3)), batch(7, num_labels=3)
    model = pl.models.classification(lora, 7)
    starts = [particles(lora), particles(lora)]
    guides = [pl.AutoLaplace(model, init_loc_fn=lora.init_to(w)) for w in starts]
    for guide, start in zip(guides, starts, strict=True):
        posterior = guide.laplace_approximation([texts])
        assert_same(flatten(posterior.mode()), flatten(start))
    for guide, start in zip(guides, starts, strict=True):
        posterior = guide.laplace_approximation([texts])
        assert_same(flatten(posterior.mode()), flatten(start))


@pytest.mark.untrained
def test_a_trained_guide_does_not_leak_into_another() -> None:
    lora, texts = pl.lift(bert(3)), batch(7, num_labels=3)
    model = pl.models.classification(lora, 7)
    trained = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
    svi = SVI(model, trained, Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(**texts)
    other = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
    posterior = other.laplace_approximation([texts])
    assert_same(flatten(posterior.mode()), flatten(lora.weights()))


def trainer(seed: int) -> tuple[pl.LiftedNetwork, pl.AutoLaplace, SVI]:
    """A guide of a network of its own, and SVI for it."""
    torch.manual_seed(seed)
    lora = pl.lift(bert(3))
    model = pl.models.classification(lora, 7)
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
    return lora, guide, SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO())


@pytest.mark.untrained
def test_a_second_guide_in_the_param_store_starts_where_it_is_told() -> None:
    texts = batch(7, num_labels=3)
    alone = {}
    for seed in (1, 2):
        pyro.clear_param_store()
        _, guide, svi = trainer(seed)
        losses = [svi.step(**texts) for _ in range(2)]
        alone[seed] = losses, flatten(guide.laplace_approximation([texts]).mode())
    pyro.clear_param_store()
    _, first, svi_of_first = trainer(1)
    assert [svi_of_first.step(**texts) for _ in range(2)] == alone[1][0]
    _, second, svi = trainer(2)
    assert [svi.step(**texts) for _ in range(2)] == alone[2][0]
    assert_same(flatten(second.laplace_approximation([texts]).mode()), alone[2][1])
    # The first keeps what it has found, and doesn't train the second's.
    assert_same(flatten(first.laplace_approximation([texts]).mode()), alone[1][1])
    before = {n: x.clone() for n, x in pyro.get_param_store().items()}
    with pytest.raises(ValueError, match=r"'AutoLaplace\.lora.*another AutoLaplace's"):
        svi_of_first.step(**texts)
    for name, value in before.items():
        assert torch.equal(pyro.param(name), value)
    svi.step(**texts)
    pyro.clear_param_store()  # which makes room
    svi_of_first.step(**texts)


def test_guides_side_by_side_under_module_local_params() -> None:
    texts = batch(7, num_labels=3)
    alone = []
    for seed in (1, 2):
        pyro.clear_param_store()
        svi = trainer(seed)[2]
        alone.append([svi.step(**texts) for _ in range(3)])
    pyro.clear_param_store()
    with pyro.settings.context(module_local_params=True):
        both = [trainer(seed)[2] for seed in (1, 2)]
        found = [[svi.step(**texts) for svi in both] for _ in range(3)]
    assert [list(losses) for losses in zip(*found, strict=True)] == alone


def test_a_store_from_a_file_is_gone_on_from(tmp_path: Any) -> None:
    texts = batch(7, num_labels=3)
    svi = trainer(1)[2]
    for _ in range(2):
        svi.step(**texts)
    pyro.get_param_store().save(tmp_path / "store")
    expected = svi.evaluate_loss(**texts)
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    assert trainer(1)[2].evaluate_loss(**texts) == expected


# What the pass leaves alone.


@pytest.mark.untrained
@pytest.mark.parametrize("build", [bert, llama])
def test_the_network_is_as_before(build: Any) -> None:
    network = build(3)
    before = copy.deepcopy(network.state_dict())
    trainable = {n: p.requires_grad for n, p in network.named_parameters()}
    lora, texts = pl.lift(network), batch(7, num_labels=3)
    posterior = laplace(lora, texts, 3)
    posterior.linearized(texts)
    posterior.optimize_prior(objective="nll", batches=[texts])
    after = network.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert {n: p.requires_grad for n, p in network.named_parameters()} == trainable
    assert all(p.grad is None for p in network.parameters())
    hooks = [m for m in network.modules() if m._forward_hooks]
    assert hooks == []


@pytest.mark.untrained
def test_dropout_is_off_during_the_pass_and_restored() -> None:
    network: Any = bert(3, dropout=0.5, lora_dropout=0.5)
    lora, texts = pl.lift(network), batch(7, num_labels=3)
    expected = laplace(lora, texts, 3)
    network.train()
    network.base_model.model.bert.encoder.layer[0].eval()  # as a user may have it
    modes = [module.training for module in network.modules()]
    posterior = laplace(lora, texts, 3)
    assert [module.training for module in network.modules()] == modes
    assert_same(posterior.log_evidence(), expected.log_evidence())
    assert_same(flatten(posterior.variance()), flatten(expected.variance()))
    logits = posterior.linearized(texts)
    assert [module.training for module in network.modules()] == modes
    assert_same(logits.mean, expected.linearized(texts).mean)
    assert_same(logits.covariance_matrix, expected.linearized(texts).covariance_matrix)
    broken = [{**texts, "labels": torch.full((7,), 99)}]
    guide = pl.AutoLaplace(
        pl.models.classification(lora, 7), init_loc_fn=lora.init_to_adapter()
    )
    with pytest.raises(ValueError, match="Batch 0"):
        guide.laplace_approximation(broken)
    assert [module.training for module in network.modules()] == modes


@pytest.mark.untrained
def test_an_interrupted_pass_leaves_nothing_behind() -> None:
    network = bert(3)
    lora, texts = pl.lift(network), batch(7, num_labels=3)
    model = pl.models.classification(lora, 7)
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
    expected = guide.laplace_approximation(split(texts, 3)).log_evidence()

    class Broken(list[Any]):
        def __iter__(self) -> Any:
            yield self[0]
            raise KeyboardInterrupt

    network.train()
    with pytest.raises(KeyboardInterrupt):
        guide.laplace_approximation(Broken(split(texts, 3)))
    assert network.training
    assert [m for m in network.modules() if m._forward_hooks] == []
    assert_same(guide.laplace_approximation(split(texts, 3)).log_evidence(), expected)


@pytest.mark.untrained
def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    lora, texts = pl.lift(bert(2)), batch(5)
    model = pl.models.classification(lora, 5)
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
    guide.laplace_approximation(split(texts, 2))
    assert capsys.readouterr().err == ""
    guide.laplace_approximation(split(texts, 2), progress_bar=True)
    assert "3/3" in capsys.readouterr().err


# Stationarity.


def test_a_converged_mode_gives_no_warning() -> None:
    lora, texts = pl.lift(bert(3)), batch(7, num_labels=3)
    posterior = converged(lora, texts).laplace_approximation(split(texts, 3))
    assert torch.isfinite(posterior.log_evidence())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_start_that_is_no_mode_gives_a_warning(structure: Structure) -> None:
    lora, texts = pl.lift(bert(3), prior=pl.priors.normal(0.1)), batch(7, num_labels=3)
    # B, and with it the log prior's gradient, is far from what that prior wants.
    with pytest.warns(UserWarning, match=r"aren't a mode.*'lora\..*refine\(\)"):
        laplace(lora, texts, structure=structure)


def test_remedies_of_a_vocabulary_lead_to_no_refusal() -> None:
    words = LlamaConfig(
        vocab_size=2_001,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
    )
    network = adapted(LlamaForCausalLM(words).double(), task_type="CAUSAL_LM")
    lora = pl.lift(network, prior=pl.priors.normal(0.1))
    ids = torch.arange(1, 13).reshape(3, 4)
    mask = torch.ones_like(ids)
    texts = [{"input_ids": ids, "attention_mask": mask, "labels": ids}]
    model = pl.models.language_model(lora, 3)
    for structure in (pl.structures.KFAC(), pl.structures.Exact()):
        start = lora.init_to_adapter()
        guide = pl.AutoLaplace(
            model, init_loc_fn=start, fisher="mc", structure=structure
        )
        with pytest.warns(UserWarning, match=r"Train on under the .* and data\.$"):
            posterior = guide.laplace_approximation(texts)
        with pytest.raises(ValueError, match=r"models\.multiple_choice, or train on"):
            posterior.refine()
        exact = pl.AutoLaplace(model, init_loc_fn=start, structure=structure)
        # Of no one batch.
        with pytest.raises(ValueError, match=r"^The exact.*2001.*num_fisher_samples.$"):
            exact.laplace_approximation(texts)


def test_the_warning_is_about_a_newton_step() -> None:
    # Linear regression: moving the mode by d changes g' P^-1 g to d' P d exactly.
    task = linear_regression()
    posterior = task.laplace(structure=pl.structures.Dense())
    effective = float(posterior.gaussian.effective_parameters())
    direction = torch.ones(4).double()
    unit = direction / (direction @ task.precision @ direction).sqrt()
    for factor, warns in ((0.99, False), (1.01, True)):
        moved = task.mode + unit * factor * effective**0.5
        weights = {
            "base.weight": moved[:3].reshape(1, 1, 3),
            "base.bias": moved[3:][None],
        }
        guide = pl.AutoLaplace(
            task.model,
            init_loc_fn=task.lora.init_to(weights),
            structure=pl.structures.Dense(),
        )
        if warns:
            norm = float((task.precision @ (moved - task.mode)).norm())
            message = rf"aren't a mode.*gradient has norm {norm:.3g}, most.*Train on"
            with pytest.warns(UserWarning, match=message):
                guide.laplace_approximation(task.batches)
        else:
            guide.laplace_approximation(task.batches)


# Number types.


@pytest.mark.grid
@pytest.mark.untrained
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32])
def test_half_precision_networks(adapter: torch.dtype, structure: Structure) -> None:
    network = bert(3)
    texts = batch(7, num_labels=3)
    expected = laplace(pl.lift(copy.deepcopy(network)), texts, structure=structure)
    network.to(torch.bfloat16)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapter)
    lora = pl.lift(network)
    posterior = laplace(lora, texts, 3, structure=structure)
    for site, value in expected.variance().items():
        assert posterior.mode()[site].dtype == torch.float32
        assert posterior.variance()[site].dtype == torch.float32
        assert_same(posterior.variance()[site].double(), value, rtol=0.1, atol=0.02)
    exact = float(expected.gaussian.effective_parameters())
    effective = float(posterior.gaussian.effective_parameters())
    assert effective == pytest.approx(exact, rel=0.1)
    logits = posterior.linearized(texts)
    assert logits.mean.dtype == torch.float32
    wanted = expected.linearized(texts).covariance_matrix
    error = (logits.covariance_matrix - wanted).norm() / wanted.norm()
    assert float(error) < 0.1


@pytest.mark.untrained
@pytest.mark.parametrize("structure", STRUCTURES)
def test_float32_networks_agree_with_float64(structure: Structure) -> None:
    network, texts = bert(3), batch(7, num_labels=3)
    expected = laplace(pl.lift(copy.deepcopy(network)), texts, structure=structure)
    expected = expected.optimize_prior(per="site")
    found = laplace(pl.lift(network.float()), texts, structure=structure)
    found = found.optimize_prior(per="site")
    assert_same(found.log_evidence(), expected.log_evidence(), rtol=1e-4)
    for site, value in found.prior_precision.items():
        assert value.dtype == torch.float32
        assert_same(value.double(), expected.prior_precision[site], rtol=2e-3)
    draws = {site: value.float() for site, value in particles_of(expected).items()}
    found_log_prob = found.log_prob(draws).double()
    assert_same(found_log_prob, expected.log_prob(particles_of(expected)), rtol=1e-3)


def particles_of(posterior: pl.LaplacePosterior) -> dict[str, Tensor]:
    """Draws, always the same ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return posterior.sample(3)


@pytest.mark.gpu
@pytest.mark.untrained
@pytest.mark.parametrize("structure", STRUCTURES)
def test_everything_stays_on_the_gpu(structure: Structure) -> None:
    network, texts = bert(3), batch(7, num_labels=3)
    expected = laplace(pl.lift(copy.deepcopy(network)), texts, structure=structure)
    lora = pl.lift(network.cuda())
    on_gpu = {name: value.cuda() for name, value in texts.items()}
    found = laplace(lora, on_gpu, 3, structure=structure).optimize_prior()
    found = found.optimize_prior(objective="nll", batches=[on_gpu])
    found = found.with_prior_precision(1.0)
    for value in [*found.variance().values(), *found.sample(2).values()]:
        assert value.is_cuda
    assert_same(found.log_evidence().cpu(), expected.log_evidence(), rtol=1e-6)
    covariance = found.linearized(on_gpu).covariance_matrix
    assert covariance.is_cuda
    assert_same(
        covariance.cpu(), expected.linearized(texts).covariance_matrix, rtol=1e-6
    )
