"""Where inference starts: at the adapter, at given weights, or anew."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.optim import SGD, Adam
from torch import Tensor
from torch.testing import assert_close

import pyro_lora as pl
from tests.networks import (
    adapted,
    batch,
    bert,
    classifier,
    llama,
    particles,
    without_peft,
)

QUERY = "lora.bert.encoder.layer.attention.self.query"
InitFn = Callable[[dict[str, Any]], Tensor]


def start(lora: pl.LiftedNetwork, init: InitFn, **infer: Any) -> dict[str, Tensor]:
    return {site: init({"name": site, "infer": infer}) for site in lora.sites}


def assert_moments(draws: Tensor, mean: float, deviation: float) -> None:
    """Within five standard errors: s / sqrt(n), and at most s / sqrt(2 n) for s."""
    n = draws.numel()
    assert abs(draws.mean() - mean) < 5 * deviation / n**0.5
    assert abs(draws.std() - deviation) < 5 * deviation / (2 * n) ** 0.5


# init_to_adapter


@pytest.mark.parametrize("guide_kind", [AutoDelta, AutoNormal])
def test_a_guide_starts_at_the_adapter(guide_kind: Any) -> None:
    lora = pl.lift(bert())
    guide = guide_kind(classifier(lora), init_loc_fn=lora.init_to_adapter())
    guide(**batch())
    for site, value in lora.weights().items():
        assert_close(guide.median()[site], value, rtol=0, atol=1e-12)


def test_the_adapter_is_read_when_the_start_is_chosen_and_not_shared() -> None:
    lora = pl.lift(bert())
    weights = lora.weights()
    init = lora.init_to_adapter()
    lora.load(particles(lora))
    for value in start(lora, init).values():
        value.zero_()
    for site, value in start(lora, init).items():
        assert torch.equal(value, weights[site])


def test_jitter_is_normal_noise_anew_for_each_particle() -> None:
    lora = pl.lift(bert(hidden_size=64))
    init = lora.init_to_adapter(jitter=0.02)
    one, two = start(lora, init), start(lora, init)
    for site, value in lora.weights().items():
        for other in (one[site] - value, two[site] - value, one[site] - two[site]):
            assert (other != 0).all()
    noise = [(one[site] - value).flatten() for site, value in lora.weights().items()]
    assert_moments(torch.cat(noise), 0.0, 0.02)


@pytest.mark.parametrize(
    "settings", [{}, {"r": 2, "lora_alpha": 64}, {"r": 16, "use_rslora": True}]
)
@pytest.mark.parametrize("hidden_size", [32, 128])
def test_automatic_jitter_changes_outputs_by_what_half_precision_resolves(
    settings: dict[str, Any], hidden_size: int
) -> None:
    network = bert(hidden_size=hidden_size, **settings)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:  # as PEFT starts: all updates coincide
            torch.nn.init.zeros_(parameter)
    lora = pl.lift(network)
    init = lora.init_to_adapter(jitter="auto")
    draws = [start(lora, init) for _ in range(40)]
    together = {site: torch.stack([d[site] for d in draws]) for site in lora.sites}
    changes = [
        b @ (a @ torch.randn(40, a.shape[-1], 1).double())
        for b, a in lora.delta_weight_factors(together).values()
    ]
    # Independent draws; given B and A the outputs are normal, and their variance over
    # draws has a relative standard deviation below sqrt(2 / r) + sqrt(2 / I).
    found = torch.stack(changes).square().mean((0, 2, 3)).mean().sqrt() / 2**-7
    assert abs(found - 1) < 0.15
    for site, value in lora.weights().items():
        if site.endswith(".A"):
            rms = value.square().mean((1, 2), keepdim=True).sqrt()
            assert_moments((together[site] - value) / rms, 0.0, 2**-7)


def test_automatic_jitter_of_other_parameters() -> None:
    network = bert(
        target_modules=["query"], use_dora=True, hidden_size=64, bias="lora_only"
    )
    head = next(m for n, m in network.named_modules() if n.endswith("modules_to_save"))
    bias = next(p for n, p in head.named_parameters() if n.endswith("bias"))
    torch.nn.init.zeros_(bias)
    lora = pl.lift(network)
    init = lora.init_to_adapter(jitter="auto")
    draws = [start(lora, init) for _ in range(200)]
    for site, value in lora.weights().items():
        if site.startswith("lora.") and site.endswith(".B"):
            continue
        noise = torch.stack([d[site] - value for d in draws])
        for layer, of_layer in enumerate(value):
            rms = of_layer.square().mean().sqrt().item()
            assert_moments(noise[:, layer], 0.0, 2**-7 * (rms or 1.0))


@pytest.mark.parametrize("jitter", [-0.1, math.nan, "wide"])
def test_jitters_out_of_range(jitter: Any) -> None:
    with pytest.raises(ValueError, match=r"jitter.* 'auto'"):
        pl.lift(bert()).init_to_adapter(jitter=jitter)


@pytest.mark.parametrize("rule", ["init_to_adapter", "init_to", "init_to_fresh"])
def test_other_latents_start_at_their_median(rule: str) -> None:
    lora = pl.lift(bert())
    given = (lora.weights(),) if rule == "init_to" else ()

    def model(**texts: Tensor) -> None:
        pyro.sample("noise", dist.LogNormal(2.0, 1e-3))
        classifier(lora)(**texts)

    guide = AutoDelta(model, init_loc_fn=getattr(lora, rule)(*given))
    guide(**batch())
    assert_close(
        guide.median()["noise"], torch.tensor(math.exp(2.0)), rtol=0.01, atol=0
    )


# init_to


def test_one_weight_set_is_the_start_of_every_particle() -> None:
    lora = pl.lift(bert())
    weights = particles(lora)
    for infer in ({}, {"particle": 3}):
        for site, value in start(lora, lora.init_to(weights), **infer).items():
            assert torch.equal(value, weights[site])


def test_each_particle_starts_at_its_own_weights() -> None:
    lora = pl.lift(bert())
    weights = particles(lora, 3)
    init = lora.init_to(weights)
    for k in range(3):
        for site, value in start(lora, init, particle=k).items():
            assert torch.equal(value, weights[site][k])


@pytest.mark.parametrize("num", [1, 2, 5])
@pytest.mark.parametrize("guide", [pl.AutoLaplace, AutoDelta, AutoNormal])
def test_a_guide_starts_at_one_weight_set(guide: Any, num: int) -> None:
    lora = pl.lift(bert())
    weights, texts = particles(lora, num), batch()
    auto = guide(
        pl.models.classification(lora, len(texts["labels"])),
        init_loc_fn=lora.init_to(weights),
    )
    if num > 1:
        message = rf"hold {num} particles, but a guide starts at one.*MixturePosterior"
        with pytest.raises(ValueError, match=message):
            auto(**texts)
        return
    auto(**texts)
    for site, value in auto.median().items():
        assert torch.equal(value, weights[site][0])


@pytest.mark.parametrize(("given", "num"), [(3, 2), (2, 1), (2, 2), (1, 1)])
def test_svgd_drops_no_particle_it_was_given(given: int, num: int) -> None:
    lora = pl.lift(bert())
    weights, texts = particles(lora, given), batch()
    model = pl.models.classification(lora, len(texts["labels"]))
    svgd = pl.SVGD(
        model,
        pl.kernels.RBF(),
        Adam({"lr": 0.0}),
        num,
        init_loc_fn=lora.init_to(weights),
    )
    if given > num:
        with pytest.raises(ValueError, match=f"hold {given} .* num_particles={num}"):
            svgd.step(**texts)
        return
    svgd.step(**texts)
    for site, value in svgd.get_named_particles().items():
        assert torch.equal(value, weights[site])


def test_more_particles_than_weights_are_refused() -> None:
    lora = pl.lift(bert())
    with pytest.raises(ValueError, match=rf"'{QUERY}\.A'.*particle 4.*hold 3"):
        start(lora, lora.init_to(particles(lora, 3)), particle=3)


def replaced(weights: dict[str, Tensor], value: Tensor | None) -> dict[str, Tensor]:
    rest = {site: v for site, v in weights.items() if site != f"{QUERY}.A"}
    return rest if value is None else {f"{QUERY}.A": value, **rest}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, rf"'{QUERY}\.A' is missing"),
        (torch.zeros(2, 3, 17), r"\(2, 3, 16\), or \(K, \.\.\.\).*\(2, 3, 17\)"),
        (torch.zeros(4, 4, 2, 3, 16), rf"'{QUERY}\.A'.*\(4, 4, 2, 3, 16\)"),
        (torch.zeros(2, 2, 3, 16), "different numbers of particles"),
        (torch.full((2, 3, 16), torch.nan), rf"'{QUERY}\.A'.*NaN"),
    ],
)
def test_wrong_weights_are_refused_at_once(value: Tensor | None, message: str) -> None:
    lora = pl.lift(bert())
    with pytest.raises(ValueError, match=message):
        lora.init_to(replaced(lora.weights(), value))


LATENTS = {  # a constrained value of each, and where a guide starts without it
    "noise": dist.LogNormal(0.0, 1.0),
    "shares": dist.Dirichlet(torch.ones(3).double()),
    "shift": dist.Normal(torch.zeros(2, 2).double(), 1.0).to_event(2),
}


def with_latents(lora: pl.LiftedNetwork) -> Callable[..., None]:
    def model(**texts: Tensor) -> None:
        for name, fn in LATENTS.items():
            pyro.sample(name, fn)
        classifier(lora)(**texts)

    return model


@settings(deadline=None, max_examples=10, suppress_health_check=list(HealthCheck))
@given(names=st.sets(st.sampled_from(sorted(LATENTS))), num=st.integers(0, 3))
def test_every_site_that_is_given_counts(names: set[str], num: int) -> None:
    lora = pl.lift(bert())
    lead = (num,) if num else ()
    weights = particles(lora, *lead)
    weights |= {name: LATENTS[name].sample(lead) for name in sorted(names)}
    init = lora.init_to(weights)
    for k in range(max(1, num)):
        expected = {s: x[k] if num else x for s, x in weights.items()}
        for name, value in expected.items():
            start = init(
                {"name": name, "infer": {"particle": k}, "fn": LATENTS.get(name)}
            )
            assert torch.equal(start, value)
    pyro.clear_param_store()
    firsts = {s: x[0] if num else x for s, x in weights.items()}
    guide = AutoDelta(with_latents(lora), init_loc_fn=lora.init_to(firsts))
    guide(**batch())
    for name in names:
        first = firsts[name]
        assert_close(guide.median()[name], first, rtol=1e-6, atol=1e-6)


def test_a_latent_of_another_shape_is_refused() -> None:
    lora = pl.lift(bert())
    weights = {**lora.weights(), "shift": torch.zeros(3, 2)}
    guide = AutoDelta(with_latents(lora), init_loc_fn=lora.init_to(weights))
    with pytest.raises(ValueError, match=r"'shift'.*\(2, 2\).*found \(3, 2\)"):
        guide(**batch())


def engines(lora: pl.LiftedNetwork, model: Any, init: Any) -> dict[str, Any]:
    guide = pl.AutoLaplace(model, init_loc_fn=init)
    trained = pl.AutoLaplace(model, init_loc_fn=init)
    svgd = pl.SVGD(
        model, pl.kernels.NoRepulsion(), SGD({"lr": 0.0}), 1, init_loc_fn=init
    )
    return {
        "laplace": lambda: guide.laplace_approximation([batch()]),
        "svi": lambda: SVI(model, trained, SGD({"lr": 0.0}), Trace_ELBO()).step(
            **batch()
        ),
        "svgd": lambda: svgd.step(**batch()),
    }


@pytest.mark.parametrize("engine", ["laplace", "svi", "svgd"])
def test_a_site_that_the_model_does_not_sample_is_refused(engine: str) -> None:
    lora = pl.lift(bert())
    weights = {**lora.weights(), "noise": torch.ones(())}
    run = engines(lora, classifier(lora, num_data=5), lora.init_to(weights))[engine]
    for _ in range(2):  # and nothing was set up by the first
        with pytest.raises(ValueError, match=r"\['noise'\], which the model doesn't"):
            run()


def test_noise_of_a_prior_that_is_not_centred() -> None:
    prior = pl.priors.hierarchical(0.3, centered=False)
    lora = pl.lift(bert(), prior=prior)
    model = classifier(lora)
    first = AutoDelta(model, init_loc_fn=pyro.infer.autoguide.init_to_sample)
    first(**batch())
    median = first.median()
    pyro.clear_param_store()
    again = AutoDelta(model, init_loc_fn=lora.init_to(median))
    again(**batch())
    for name, value in median.items():
        assert_close(again.median()[name], value, rtol=1e-9, atol=1e-9)
    svgd = pl.SVGD(
        model,
        pl.kernels.NoRepulsion(),
        SGD({"lr": 0.0}),
        1,
        init_loc_fn=lora.init_to(median),
    )
    svgd.step(**batch())
    for name, value in svgd.get_named_particles().items():
        assert_close(value[0], median[name], rtol=1e-6, atol=1e-6)
    other = {**median, f"{QUERY}.A": torch.ones(2, 3, 16).double()}
    svgd = pl.SVGD(
        model,
        pl.kernels.NoRepulsion(),
        SGD({"lr": 0.0}),
        1,
        init_loc_fn=lora.init_to(other),
    )
    with pytest.raises(ValueError, match=rf"'{QUERY}\.A_decentered' doesn't start"):
        svgd.step(**batch())


# init_to_fresh


def fresh_adapters(
    make: Callable[[], PeftModel], num: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Per site: ``init_to_fresh``'s draws, and those of PEFT itself."""
    lora = pl.lift(make())
    init = lora.init_to_fresh()
    ours = [start(lora, init) for _ in range(num)]
    theirs = [pl.lift(make()).weights() for _ in range(num)]
    return {
        site: (
            torch.stack([w[site] for w in ours]),
            torch.stack([w[site] for w in theirs]),
        )
        for site in lora.sites
    }


@pytest.mark.parametrize("rule", [True, "gaussian", False])
@pytest.mark.few(1)
def test_fresh_weights_have_pefts_own_distribution(rule: Any) -> None:
    def make() -> PeftModel:
        network = without_peft(bert(target_modules=["query"]))
        config = LoraConfig(
            r=4, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=rule
        )
        return get_peft_model(network, config)

    for site, (ours, theirs) in fresh_adapters(make, 40).items():
        if site.startswith("head."):
            continue  # PEFT copies it from the network
        if not theirs.any():
            assert not ours.any()
            assert site.endswith(".B")
            continue
        assert (ours[0] != ours[1]).all()
        assert_moments(ours, 0.0, float(theirs.std()))
        gaussian = rule == "gaussian"
        uniform_bound = 1 / math.sqrt(ours.shape[-1])
        # Kaiming's uniform rule with a = sqrt(5), PEFT's for A and PyTorch's for all.
        assert_moments(ours, 0.0, 1 / 4 if gaussian else uniform_bound / math.sqrt(3))
        assert gaussian or ours.abs().max() <= uniform_bound


def test_a_fresh_head_has_the_networks_own_distribution() -> None:
    lora = pl.lift(bert(20, hidden_size=32))  # its initializer_range is 0.2
    fresh = start(lora, lora.init_to_fresh())
    assert_moments(fresh["head.classifier.weight"], 0.0, 0.2)
    assert not fresh["head.classifier.bias"].any()


def test_pretrained_biases_stay_in_a_fresh_start() -> None:
    lora = pl.lift(bert(bias="lora_only", lora_bias=True))
    fresh = start(lora, lora.init_to_fresh())
    base = "base.bert.encoder.layer.attention.self.query.bias"
    assert torch.equal(fresh[base], lora.weights()[base])
    assert not fresh[f"{QUERY}.bias"].any()


def test_fresh_weights_follow_the_seed() -> None:
    lora = pl.lift(llama())
    pyro.set_rng_seed(5)
    one = start(lora, lora.init_to_fresh())
    pyro.set_rng_seed(5)
    two = start(lora, lora.init_to_fresh())
    assert all(torch.equal(one[site], two[site]) for site in lora.sites)


def test_an_init_that_depends_on_the_base_weights_is_refused() -> None:
    lora = pl.lift(
        adapted(
            without_peft(bert(dtype=torch.float32)),
            target_modules=["query"],
            init_lora_weights="pissa",
        )
    )
    with pytest.raises(ValueError, match=r"query.*'pissa'.*init_to_adapter"):
        start(lora, lora.init_to_fresh())
