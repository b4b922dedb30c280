"""Every kind of posterior generates: texts are those of its own draws."""

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from pyro.optim import Adam
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora.ground.weights import Weights
from tests import networks
from tests.predict.language import (
    adapters,
    averaged_text,
    language_model,
    particles,
    prompts,
    step_by_step,
    texts,
)
from tests.predict.models import guide_over

pytestmark = pytest.mark.filterwarnings("ignore:A Gaussian over several layers")

NEW, NUM_DRAWS, END = 4, 3, 2


def lifted(**settings: Any) -> pl.LiftedNetwork:
    prior = pl.priors.normal(scale=0.7)
    return pl.lift(networks.llama(None), prior=prior, **settings)


def laplace(lora: pl.LiftedNetwork) -> pl.LaplacePosterior:
    guide = pl.AutoLaplace(
        language_model(lora), init_loc_fn=lora.init_to_adapter(), fisher="mc"
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The weights aren't a mode")
        return guide.laplace_approximation([texts()])


def refined(lora: pl.LiftedNetwork) -> pl.LaplacePosterior:
    ids = list(range(3))
    guide = pl.AutoLaplace(
        pl.models.multiple_choice(lora, 6, ids),
        init_loc_fn=lora.init_to_adapter(),
        structure=pl.structures.Exact(),
    )
    data = texts() | {"labels": torch.arange(6) % 3}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The weights aren't a mode")
        return guide.laplace_approximation([data]).refine(around="prior")


def mixture(lora: pl.LiftedNetwork) -> pl.MixturePosterior:
    return pl.MixturePosterior([laplace(lora), laplace(lora)])


def svgd(lora: pl.LiftedNetwork) -> pl.ParticlePosterior:
    engine = pl.SVGD(
        language_model(lora),
        pl.kernels.RBF(),
        Adam({"lr": 0.05}),
        NUM_DRAWS,
        init_loc_fn=lora.init_to_adapter(jitter=0.5),
    )
    engine.step(**texts())
    return engine.posterior()


def own_draws(posterior: Any) -> Weights:
    draws: Weights = posterior.sample(NUM_DRAWS)
    return draws


def stock(guide: Any) -> Callable[[pl.LiftedNetwork], Any]:
    def trained(lora: pl.LiftedNetwork) -> Any:
        pyro.clear_param_store()
        model = language_model(lora)
        fitted = guide(model, init_loc_fn=lora.init_to_adapter())
        svi = SVI(model, fitted, Adam({"lr": 0.01}), Trace_ELBO())
        svi.step(**texts())
        return fitted

    return trained


def guide_draws(guide: Any) -> Weights:
    each = [guide() for _ in range(NUM_DRAWS)]
    return {
        site: torch.stack([draw[site] for draw in each])
        for site in each[0]
        if site.startswith("lora.")
    }


def plain(lora: pl.LiftedNetwork) -> Any:
    return guide_over(lora.weights())


POSTERIORS: dict[str, tuple[Any, Callable[[Any], Weights]]] = {
    "Laplace": (laplace, own_draws),
    "mixture": (mixture, own_draws),
    "SVGD": (svgd, own_draws),
    "AutoNormal": (stock(AutoNormal), guide_draws),
    "AutoDiagonalNormal": (stock(AutoDiagonalNormal), guide_draws),
    "a function": (plain, guide_draws),
}


@pytest.mark.parametrize("name", POSTERIORS)
def test_the_average_over_its_draws(name: str) -> None:
    make, drawn = POSTERIORS[name]
    lora = lifted()
    posterior, prompt = make(lora), torch.tensor([[5, 23, 42]])
    torch.manual_seed(1)
    each = adapters(lora, drawn(posterior))
    torch.manual_seed(1)
    found = pl.generate(posterior, prompt, NUM_DRAWS, lora=lora, max_new_tokens=NEW)
    new = averaged_text(each, prompt[0], NEW, END)
    assert torch.equal(found.new_tokens[0, : len(new)], new)
    expected = step_by_step(each, prompt[0], new)
    assert_close(found.log_probs[0, : len(new)], expected["log_prob"])
    assert_close(found.total_entropy[0, : len(new)], expected["total"])
    labels = found.sequences.where(found.sequences != networks.PAD, -100)
    labels[:, :3] = -100
    torch.manual_seed(1)
    scores = pl.sequence_log_prob(
        posterior, found.sequences, labels, lora=lora, num_samples=NUM_DRAWS
    )
    assert_close(scores.by_token, found.log_probs.sum(-1))


@pytest.mark.parametrize("name", ["Laplace", "AutoNormal"])
def test_the_mode_s_text_and_what_the_draws_think_of_it(name: str) -> None:
    make, drawn = POSTERIORS[name]
    lora = lifted()
    posterior, prompt = make(lora), prompts(1, 3)
    centre = posterior.mode() if name == "Laplace" else posterior.median()
    (alone,) = adapters(lora, {site: centre[site][None] for site in lora.sites})
    own = alone.generate(**prompt, max_new_tokens=NEW, do_sample=False)
    torch.manual_seed(1)
    each = adapters(lora, drawn(posterior))
    torch.manual_seed(1)
    found = pl.generate(
        posterior, lora=lora, **prompt, num_samples=3, max_new_tokens=NEW, mode="mode"
    )
    assert torch.equal(found.sequences, own)
    new = found.new_tokens[0]
    length = len(new) if not (new == END).any() else int((new == END).nonzero()[0]) + 1
    expected = step_by_step(each, prompt["input_ids"][0], new[:length])
    assert_close(found.log_probs[0, :length], expected["log_prob"])
    epistemic = expected["total"] - expected["aleatoric"]
    assert_close(found.epistemic_entropy[0, :length], epistemic)
    assert (epistemic > 0).all()


def test_the_mode_s_text_of_what_is_refined_is_the_trained_networks() -> None:
    lora = lifted()
    posterior, prompt = refined(lora), prompts(1, 3)
    trained, mode = lora.weights(), posterior.mode()
    assert max((trained[s] - mode[s]).abs().max() for s in trained) > 0.1
    assert_close(posterior.origin(), trained)
    (alone,) = adapters(lora, {site: x[None] for site, x in trained.items()})
    own = alone.generate(**prompt, max_new_tokens=NEW, do_sample=False)
    found = pl.generate(posterior, **prompt, max_new_tokens=NEW, mode="mode")
    assert torch.equal(found.sequences, own)


@pytest.mark.filterwarnings("ignore:No width up to")
@pytest.mark.parametrize("name", ["for_sampling", "tfb"])
def test_the_mode_s_text_of_what_was_made_narrow(name: str) -> None:
    lora = lifted()
    data = texts() | {"labels": torch.arange(6) % 3}
    if name == "tfb":
        model = pl.models.multiple_choice(lora, 6, list(range(3)))
        posterior: Any = pl.methods.tfb(model, [data], weights=lora.weights())
    else:
        posterior = refined(lora).for_sampling([data])
    centre, prompt = posterior.mode(), prompts(1, 3)
    (alone,) = adapters(lora, {site: centre[site][None] for site in lora.sites})
    own = alone.generate(**prompt, max_new_tokens=NEW, do_sample=False)
    found = pl.generate(posterior, **prompt, max_new_tokens=NEW, mode="mode")
    assert torch.equal(found.sequences, own)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_draws_that_run_one_at_a_time_end_where_they_end() -> None:
    peft_model = networks.llama(None, num_layers=1).unload()
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    lora = pl.lift(get_peft_model(peft_model, config).double().eval())
    weights = {
        s: torch.randn(NUM_DRAWS, *x.shape).to(x) for s, x in lora.weights().items()
    }
    posterior = pl.ParticlePosterior(weights, (lora,), None, None)
    prompt = torch.tensor([[5, 23, 42]])
    lengths = set()
    for end in range(3, 30):
        options: Any = {"max_new_tokens": 5, "eos_token_id": end, "pad_token_id": 0}
        each = []
        for s in range(NUM_DRAWS):
            one = pl.ensemble(lora, [{site: x[s] for site, x in weights.items()}])
            found = pl.generate(
                one, torch.tensor([[5, 23, 42]]), mode="draws", **options
            )
            each.append(found.new_tokens[0, 0])
        longest = max(map(len, each))
        expected = [torch.nn.functional.pad(x, (0, longest - len(x))) for x in each]
        found = pl.generate(posterior, prompt, mode="draws", **options)
        assert torch.equal(found.new_tokens[:, 0], torch.stack(expected))
        lengths |= {tuple(map(len, each))}
    assert any(len({*x}) > 1 for x in lengths)


@pytest.mark.parametrize("length", [7, 8])
@pytest.mark.few(1)
def test_a_prompt_as_long_as_the_draws_where_tokens_are_learnt(length: int) -> None:
    lora = pl.lift(networks.llama(None, num_layers=1, modules_to_save=["embed_tokens"]))
    posterior, prompt = particles(lora, 8, 0.3), torch.arange(3, 3 + length)[None]
    each = adapters(lora, posterior.sample(8))
    found = pl.generate(posterior, prompt, max_new_tokens=NEW)
    new = averaged_text(each, prompt[0], NEW, END)
    assert torch.equal(found.new_tokens[0, : len(new)], new)


@pytest.mark.parametrize("error", [NotImplementedError, None])
def test_networks_that_do_not_name_their_tokens_table(
    error: type[Exception] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = networks.llama(None, num_layers=1, modules_to_save=["embed_tokens"])

    def unnamed(self: Any) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(type(network.get_base_model()), "get_input_embeddings", unnamed)
    lora = pl.lift(network)
    assert any("embed_tokens" in site for site in lora.sites)
    weights, given = networks.particles(lora, 2), texts()
    found = networks.bound_logits(lora, weights, given)
    one = {site: x[1] for site, x in weights.items()}
    assert_close(found[1], networks.bound_logits(lora, one, given))


def test_a_point_has_no_epistemic_entropy() -> None:
    lora = lifted()
    guide = stock(AutoDelta)(lora)
    found = pl.generate(guide, lora=lora, **prompts(), max_new_tokens=NEW)
    assert_close(found.epistemic_entropy, torch.zeros_like(found.log_probs))
    assert found.total_entropy.max() > 0.1


def test_a_prior_that_is_not_centred() -> None:
    prior = pl.priors.hierarchical(0.7, centered=False)
    lora = pl.lift(networks.llama(None), prior=prior)
    guide = AutoNormal(language_model(lora), init_scale=0.3)
    given = texts()
    guide(**given)
    assert not lora.sites.keys() & guide.median().keys()
    prompt = torch.tensor([[5, 23, 42]])
    torch.manual_seed(1)
    draws = [
        pyro.poutine.condition(lora.prior, data=guide(**given))(lora)
        for _ in range(NUM_DRAWS)
    ]
    weights = {site: torch.stack([d[site] for d in draws]) for site in lora.sites}
    each = adapters(lora, {site: value.detach() for site, value in weights.items()})
    torch.manual_seed(1)
    found = pl.generate(guide, prompt, NUM_DRAWS, lora=lora, max_new_tokens=NEW)
    new = averaged_text(each, prompt[0], NEW, END)
    assert torch.equal(found.new_tokens[0, : len(new)], new)
    expected = step_by_step(each, prompt[0], new)
    assert_close(found.total_entropy[0, : len(new)], expected["total"])


def test_every_particle_comes_once() -> None:
    lora = lifted()
    posterior = particles(lora, 5)
    found = pl.generate(
        posterior, lora=lora, **prompts(), max_new_tokens=2, mode="draws"
    )
    assert found.sequences.shape == (5, 3, 7)
    some = pl.generate(
        laplace(lora), lora=lora, **prompts(), max_new_tokens=2, mode="draws"
    )
    assert some.sequences.shape == (8, 3, 7)
