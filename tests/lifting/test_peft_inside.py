"""PEFT inside of a user's own network: the same as PEFT around that network."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from pyro.optim import SGD
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModel, BertConfig
from transformers.modeling_outputs import SequenceClassifierOutput

import pyro_lora as pl
from tests.lifting.liftable_row import NO_DROPOUT, TINY
from tests.networks import batch, inputs, particles, randomize_adapter

pytestmark = [
    pytest.mark.untrained,
    pytest.mark.filterwarnings("ignore:The weights aren't a mode"),
]

NUM_DATA = 8
QUERY = "lora.encoder.encoder.layer.attention.self.query"


class Classifier(nn.Module):
    """A head on an encoder, as users write them."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        logits = self.head(states.last_hidden_state[:, 0])
        return SequenceClassifierOutput(logits=logits)


def encoder() -> nn.Module:
    network: nn.Module = AutoModel.from_config(BertConfig(**{**TINY, **NO_DROPOUT}))
    return network


def config(**fields: Any) -> LoraConfig:
    given = {"r": 3, "lora_alpha": 6, "target_modules": ["query", "value"], **fields}
    return LoraConfig(**given)


def wrapped(adapter: str = "default", **fields: Any) -> Classifier:
    """PEFT inside."""
    inside = get_peft_model(encoder(), config(**fields), adapter_name=adapter)
    network = Classifier(inside).double().eval()
    randomize_adapter(inside)
    return network


def both() -> tuple[pl.LiftedNetwork, pl.LiftedNetwork]:
    """PEFT inside, and PEFT around all, with the same weights."""
    one = wrapped()
    plain: Any = Classifier(encoder()).double()
    two = get_peft_model(plain, config(modules_to_save=["head"])).eval()
    state = one.state_dict()
    for name, parameter in two.named_parameters():
        own = name.removeprefix("base_model.model.")
        own = own.replace("encoder.", "encoder.base_model.model.", 1)
        own = own.replace("head.modules_to_save.default", "head")
        own = own.replace("head.original_module", "head")
        parameter.data.copy_(state[own])
    return pl.lift(one), pl.lift(two)


def around_all(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by the sites of the network that PEFT is around."""
    return {s.replace("base.head", "head.head"): x for s, x in weights.items()}


def predicted(posterior: Any) -> dict[str, Tensor]:
    prediction = pl.predict(posterior, [inputs(batch(4, num_labels=3))])
    return {"probs": prediction.probs}


def seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(3)
    pyro.set_rng_seed(3)
    return make()


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert_close(x, expected[name], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "structure", [pl.structures.KFAC(), pl.structures.Exact()], ids=["KFAC", "Exact"]
)
def test_laplace_is_that_of_peft_around_all(structure: Any) -> None:
    data = [batch(4, num_labels=3) for _ in range(2)]
    posteriors = []
    for lora in both():
        before = copy.deepcopy(lora.network.state_dict())
        guide = pl.AutoLaplace(
            pl.models.classification(lora, NUM_DATA),
            init_loc_fn=lora.init_to_adapter(),
            structure=structure,
        )
        posteriors.append(guide.laplace_approximation(data))
        after = lora.network.state_dict()
        assert all(torch.equal(x, after[name]) for name, x in before.items())
    one, two = posteriors
    assert set(around_all(one.mode())) == set(two.mode())
    assert f"{QUERY}.A" in one.mode()
    close(around_all(one.variance()), dict(two.variance()))
    assert_close(one.log_evidence(), two.log_evidence(), rtol=1e-8, atol=1e-8)
    close(*(seeded(lambda p=p: predicted(p)) for p in posteriors))
    best = [p.optimize_prior() for p in posteriors]
    close(*(seeded(lambda p=p: predicted(p)) for p in best))


def test_svgd_is_that_of_peft_around_all() -> None:
    data = batch(NUM_DATA, num_labels=3)
    ends: list[Any] = []
    losses: list[Any] = []
    start = None
    for lora in both():
        start = particles(lora, 3) if start is None else around_all(start)
        svgd = pl.SVGD(
            pl.models.classification(lora, NUM_DATA),
            pl.kernels.RBF(),
            SGD({"lr": 0.01}),
            3,
            init_loc_fn=lora.init_to(start),
        )
        losses.append([svgd.step(**data) for _ in range(2)])
        ends.append(svgd.get_named_particles())
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    close(around_all(ends[0]), ends[1])


def test_fresh_starts_are_those_of_peft_around_all() -> None:
    one, two = both()
    for site in one.sites:
        if site.startswith("lora."):
            drawn = [
                seeded(lambda x=x: x.init_to_fresh()({"name": site}))  # noqa: B023
                for x in (one, two)
            ]
            assert torch.equal(*drawn)


def test_ranks_that_adalora_pruned_stay_zero() -> None:
    given = AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, target_modules=["query", "value"]
    )
    inside: Any = get_peft_model(encoder(), given)
    layer = "encoder.layer.0.attention.self.query.lora_E"
    inside.peft_config["default"].rank_pattern = {layer: [True, False, True, False]}
    lora = pl.lift(Classifier(inside).double().eval())
    weights = particles(lora)
    kept = {site: x.clone() for site, x in weights.items()}
    kept[f"{QUERY}.E"][0, [1, 3]] = 0
    texts = inputs(batch(3))
    outputs = []
    for given_weights in (weights, kept):
        with lora.bind(given_weights) as net:
            outputs.append(net(**texts).logits)
    assert torch.equal(*outputs)
    with lora.bind({**kept, f"{QUERY}.E": 0 * kept[f"{QUERY}.E"]}) as net:
        assert not torch.equal(net(**texts).logits, outputs[0])


def of_particles(lora: pl.LiftedNetwork) -> pl.ParticlePosterior:
    model = pl.models.classification(lora, NUM_DATA)
    return pl.ParticlePosterior(particles(lora, 2), (lora,), model, "y")


def test_a_posterior_is_saved_and_loaded(tmp_path: Path) -> None:
    network = wrapped()
    lora = pl.lift(network)
    posterior = of_particles(lora)
    pl.save(posterior, tmp_path)
    renamed = wrapped("other")
    state = {
        k.replace(".default", ".other"): x for k, x in network.state_dict().items()
    }
    renamed.load_state_dict(state)
    other = pl.lift(renamed)
    loaded = pl.load(tmp_path, other, model=pl.models.classification(other, NUM_DATA))
    for site, x in posterior.particles.items():
        assert torch.equal(loaded.sample(2)[site], x)
    close(*(seeded(lambda p=p: predicted(p)) for p in (posterior, loaded)))
    scaled = wrapped(lora_alpha=7)
    scaled.load_state_dict(network.state_dict())
    with pytest.raises(ValueError, match=r"LoRA scaling 2.0 .* and 2.33"):
        pl.load(tmp_path, pl.lift(scaled))
    another = copy.deepcopy(network)
    with torch.no_grad():
        another.encoder.get_parameter(BASE).add_(1.0)
    with pytest.raises(
        ValueError, match=r"frozen tensor '.*query\.base_layer\.weight'"
    ):
        pl.load(tmp_path, pl.lift(another))


BASE = "base_model.model.encoder.layer.0.attention.self.query.base_layer.weight"


def test_settings_of_the_adapter_inside_are_told_apart(tmp_path: Path) -> None:
    network = wrapped()
    pl.save(of_particles(pl.lift(network)), tmp_path)
    network.encoder.peft_config["default"].use_dora = True
    with pytest.raises(ValueError, match=r"encoder\.adapter\.use_dora is False there"):
        pl.load(tmp_path, pl.lift(network))


def test_adapters_are_written_of_peft_around_all(tmp_path: Path) -> None:
    one, two = both()
    says = r"is a Classifier; expected a PeftModel.*whole network.*modules_to_save"
    with pytest.raises(ValueError, match=says):
        pl.export_adapters(of_particles(one), tmp_path / "one", 2)
    pl.export_adapters(of_particles(two), tmp_path / "two", 2)
    with pytest.raises(ValueError, match="is a Classifier; expected a PeftModel"):
        pl.ensemble(one, [tmp_path / "two" / "draw_000"])


@pytest.mark.slow
def test_it_is_described_and_planned() -> None:
    one, two = both()
    assert "adapter='default'" in repr(one)
    plans = [
        pl.plan_memory(
            lora.network,
            model=pl.models.classification,
            num_particles=2,
            batch=batch(4, num_labels=3),
        )
        for lora in (one, two)
    ]
    # PEFT around all has the head once more, as it was.
    copied = sum(x.nbytes for x in one.network.head.parameters())
    for phase in plans[0].phases:
        other = plans[1][phase.name]
        assert phase.weights == other.weights - copied
        assert (phase.particles, phase.factors) == (other.particles, other.factors)
        assert phase.activations == other.activations


@pytest.mark.parametrize("name", [None, "first"])
def test_what_a_network_calls_its_own_config_is_no_adapter(name: str | None) -> None:
    network = wrapped("first")
    network.peft_config = config()
    lora = pl.lift(network, adapter=name)
    assert lora.adapter == "first"
    plain = Classifier(encoder())
    plain.peft_config = config()
    assert pl.lift(plain).adapter is None


def test_a_part_that_is_called_a_prompt_encoder_is_no_prompt() -> None:
    network = nn.Module()
    network.prompt_encoder = nn.Linear(3, 2)  # as SAM's
    assert set(pl.lift(network).sites) == {
        "base.prompt_encoder.weight",
        "base.prompt_encoder.bias",
    }


# Bad input.


class Two(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        parts = [get_peft_model(encoder(), config(), adapter_name=x) for x in names]
        self.left, self.right = parts
        self.head = nn.Linear(4, 2)

    def forward(self, **texts: Tensor) -> Tensor:
        both = self.left(**texts)[0] + self.right(**texts)[0]
        return self.head(both[:, 0, :4])


def test_different_adapters_inside_are_named() -> None:
    network = Two("first", "second")
    with pytest.raises(
        ValueError, match=r"\['first', 'second'\] in the parts \['left', 'right'"
    ):
        pl.lift(network)
    with pytest.raises(
        ValueError, match=r"No adapter 'c': the model has \['first', 'second'\]"
    ):
        pl.lift(network, adapter="c")
    with pytest.raises(
        ValueError, match=r"'right\..*lora_A\.second.*isn't lifted\. Freeze"
    ):
        pl.lift(network, adapter="first")
    network.right.requires_grad_(False)
    lora = pl.lift(network, adapter="first")
    assert all(".right." not in site for site in lora.sites)
    assert {"base.head.weight", "base.head.bias"} < lora.sites.keys()
    texts, weights = inputs(batch(3)), particles(lora)
    with lora.bind(weights) as net:
        found = net(**texts)
    lora.load(weights)
    assert_close(found, network(**texts), rtol=1e-6, atol=1e-6)


def test_a_frozen_adapter_inside_is_lifted_where_it_is_named() -> None:
    network = wrapped()
    network.encoder.requires_grad_(False)
    assert pl.lift(network).sites.keys() == {"base.head.weight", "base.head.bias"}
    named = pl.lift(network, adapter="default").sites.keys()
    assert named == pl.lift(wrapped()).sites.keys()
    network.head.requires_grad_(False)
    assert all(site.startswith("lora.") for site in pl.lift(network).sites)


def test_a_merged_adapter_inside_is_refused() -> None:
    network = wrapped()
    network.encoder.merge_adapter()
    with pytest.raises(ValueError, match=r"merged.*unmerge_adapter"):
        pl.lift(network)
