"""State distances against hidden states, and scikit-learn's covariance of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from sklearn.covariance import LedoitWolf
from torch import Tensor, nn
from torch.testing import assert_close

import pyro_lora as pl
from tests import networks
from tests.predict import models

pytestmark = pytest.mark.untrained


def mean_states(network: Any, batches: Sequence[models.Batch], layer: int) -> Tensor:
    """What transformers says, averaged over the tokens, row by row."""
    found = []
    for batch in batches:
        with torch.no_grad():
            out = network(**networks.inputs(batch), output_hidden_states=True)
        mask = batch["attention_mask"].bool()
        states = out.hidden_states[layer]
        found += [x[m].mean(0) for x, m in zip(states, mask, strict=True)]
    return torch.stack(found)


def distances(train: Tensor, new: Tensor) -> Tensor:
    """By scikit-learn."""
    fitted = LedoitWolf().fit(train.numpy())
    squares = fitted.mahalanobis(new.numpy())
    return torch.from_numpy((squares / train.shape[1]) ** 0.5)


def many(number: int, tokens: tuple[int, int] = (1, networks.VOCABULARY)) -> Any:
    """Batches of five texts of some of the tokens."""
    batches = [networks.batch(5, 7) for _ in range(number)]
    low, high = tokens
    for batch in batches:
        ids = torch.randint(low, high, batch["input_ids"].shape)
        batch["input_ids"] = ids * batch["attention_mask"]
    return batches


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("make", [networks.bert, networks.llama])
def test_it_is_the_mahalanobis_distance_of_mean_states(make: Any, layer: int) -> None:
    lora, model = models.classifier(network=make(layers_to_transform=[layer]))
    train, new = many(8), models.two_batches()
    distance = pl.state_distance(models.particles(lora, model), train)
    of_train, of_new = (mean_states(lora.network, x, layer) for x in (train, new))
    for batches, states in ((train, of_train), (new, of_new)):
        found = distance(batches)
        assert_close(found, distances(of_train, states), rtol=1e-8, atol=0)
    assert repr(distance) == "StateDistance(I=16, num_data=40)"


def test_of_one_dimension_by_hand() -> None:
    """Mean 1, variance 1: 4 is three standard deviations away."""
    lora = pl.lift(nn.Linear(1, 2))

    def model(x: Tensor, labels: Tensor | None = None) -> None:
        logits = lora()(x)
        with pyro.plate("data", 2, subsample=x):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    posterior = models.particles(lora, model)
    distance = pl.state_distance(posterior, [{"x": torch.tensor([[0.0], [2.0]])}])
    found = distance([{"x": torch.tensor([[4.0], [1.0]])}])
    assert_close(found, torch.tensor([3.0, 0.0]).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_half_precision(dtype: torch.dtype) -> None:
    network = networks.bert(layers_to_transform=[1], dtype=dtype)
    lora, model = models.classifier(network=network)
    train = [networks.batch(40, 7)]
    found = pl.state_distance(models.particles(lora, model), train)(train)
    states = mean_states(network, train, 1).double()
    assert_close(found, distances(states, states), rtol=0.05, atol=0)


def test_states_that_trained_weights_make_are_refused() -> None:
    network = networks.bert(
        layers_to_transform=[1], trainable_token_indices={"word_embeddings": [3, 4]}
    )
    lora, model = models.classifier(network=network)
    with pytest.raises(ValueError, match="depends on trained weights itself"):
        pl.state_distance(models.particles(lora, model), models.two_batches())


def test_it_tells_texts_of_other_words() -> None:
    lora, model = models.classifier(network=networks.bert(layers_to_transform=[1]))
    posterior = models.laplace(lora, model, models.two_batches())
    distance = pl.state_distance(posterior, many(20, (1, 5)))
    same, other = distance(many(8, (1, 5))), distance(many(8, (5, 50)))
    assert pl.auroc(same, other) > 0.95
    assert 0.5 < float(same.median()) < 2


def test_padding_batches_labels_and_caches_change_nothing() -> None:
    lora, model = models.classifier(network=networks.bert(layers_to_transform=[1]))
    posterior = models.particles(lora, model)
    train, new = many(6), models.two_batches()
    expected = pl.state_distance(posterior, train)(new)
    padded = [
        {
            k: x if k == "labels" else torch.nn.functional.pad(x, (0, 3))
            for k, x in batch.items()
        }
        for batch in train
    ]
    unlabelled = [networks.inputs(batch) for batch in models.resized(new, 3)]
    lora.network.train()
    found = pl.state_distance(posterior, padded)(unlabelled)
    assert lora.network.training
    assert_close(found, expected, rtol=1e-8, atol=0)
    lora.network.eval()
    with pl.cached_trunk(lora):
        for _ in range(2):
            found = pl.state_distance(posterior, train)(unlabelled)
    assert_close(found, expected, rtol=1e-8, atol=0)
    assert not any(m._forward_pre_hooks for m in lora.network.modules())


def test_all_rows_of_a_datum_count() -> None:
    """Choices (B, C, T), of which all tokens are one mean; one choice may be absent."""
    lora, _ = models.classifier(1, network=networks.bert(1))

    def model(labels: Tensor | None = None, **texts: Tensor) -> None:
        rows = {name: x.flatten(0, 1) for name, x in texts.items()}
        scores = lora()(**rows).logits.unflatten(-2, (-1, 3))[..., 0]
        scores = scores.masked_fill(~texts["attention_mask"].any(-1), -torch.inf)
        with pyro.plate("data", 8, subsample=texts["input_ids"]):
            pyro.sample("y", dist.Categorical(logits=scores), obs=labels)

    rows = networks.inputs(networks.batch(24, 7))
    rows["attention_mask"][5] = 0
    batch = {name: x.unflatten(0, (8, 3)) for name, x in rows.items()}
    found = pl.state_distance(models.particles(lora, model), [batch])([batch])
    states = lora.network.get_base_model().bert.embeddings(rows["input_ids"])
    states = states.unflatten(0, (8, 3)).detach()
    mask = batch["attention_mask"].bool()
    means = torch.stack([x[m].mean(0) for x, m in zip(states, mask, strict=True)])
    assert_close(found, distances(means, means), rtol=1e-8, atol=0)


def test_states_of_two_networks_stand_together() -> None:
    loras = [
        pl.lift(networks.bert(2, layers_to_transform=[i]), name=f"n{i}") for i in (0, 1)
    ]

    def model(labels: Tensor | None = None, **texts: Tensor) -> None:
        logits = sum(lora()(**texts).logits for lora in loras)
        with pyro.plate("data", 10, subsample=texts["input_ids"]):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    weights = loras[0].weights() | loras[1].weights()
    stacks = {site: x[None] for site, x in weights.items()}
    posterior = pl.ParticlePosterior(stacks, tuple(loras), model, "y")
    train = many(6)
    found = pl.state_distance(posterior, train)(train)
    states = [mean_states(x.network, train, i) for i, x in enumerate(loras)]
    both = torch.cat(states, 1)
    assert_close(found, distances(both, both), rtol=1e-8, atol=0)


def test_rows_may_come_in_any_order() -> None:
    """Pairs as models.preference puts them: all first texts, then all second ones."""
    lora = pl.lift(networks.bert(1))

    def model(labels: Tensor | None = None, **texts: Tensor) -> None:
        rows = {name: torch.cat([*x.unbind(1)]) for name, x in texts.items()}
        first, second = lora()(**rows).logits.unflatten(-2, (2, -1)).unbind(-3)
        with pyro.plate("data", 12, subsample=texts["input_ids"]):
            logits = (first - second)[..., 0]
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=labels)

    rows = networks.inputs(networks.batch(24, 7))
    batch = {name: x.unflatten(0, (12, 2)) for name, x in rows.items()}
    found = pl.state_distance(models.particles(lora, model), [batch])([batch])
    states = lora.network.get_base_model().bert.embeddings(rows["input_ids"])
    states = states.unflatten(0, (12, 2)).detach()
    mask = batch["attention_mask"].bool()
    means = torch.stack([x[m].mean(0) for x, m in zip(states, mask, strict=True)])
    assert_close(found, distances(means, means), rtol=1e-8, atol=0)


def test_the_decoder_s_states_where_it_alone_is_adapted() -> None:
    """An encoder's mask, of as many tokens, says nothing of them."""
    network = networks.adapted(networks.t5(), target_modules=r".*decoder.*\.(q|v)")
    with torch.no_grad():  # or attention is 0 on most tokens
        for x in network.parameters():
            x.mul_(0.3)
    lora = pl.lift(network)
    targets = torch.randint(1, networks.VOCABULARY, (12, 7))

    def model(decoder_input_ids: Tensor, **texts: Tensor) -> None:
        out = lora()(decoder_input_ids=decoder_input_ids, **texts)
        logits = out.logits[..., -1, :3]
        with pyro.plate("data", 12, subsample=decoder_input_ids):
            pyro.sample("y", dist.Categorical(logits=logits))

    texts = networks.inputs(networks.batch(12, 7))
    batch = {**texts, "decoder_input_ids": targets}
    posterior = models.particles(lora, model)
    found = pl.state_distance(posterior, [batch])([batch])
    states = network.get_base_model().decoder.embed_tokens(targets).detach()
    means = states.mean(1)
    assert_close(found, distances(means, means), rtol=1e-5, atol=0)


def test_absent_answers_do_not_count_whatever_their_mask() -> None:
    from tests.test_answer_likelihood import collated, texts

    lora = pl.lift(networks.llama(None))
    model = pl.models.answer_likelihood(lora, num_data=6)
    posterior = models.particles(lora, model)
    batch = collated(texts(6))
    expected = pl.state_distance(posterior, [batch])([batch])
    padded = {
        name: x if name == "labels" else torch.nn.functional.pad(x, (0, 5))
        for name, x in batch.items()
    }
    found = pl.state_distance(posterior, [padded])([padded])
    assert_close(found, expected, rtol=1e-6, atol=0)


def test_a_guide_that_is_a_function_will_do() -> None:
    lora, model = models.classifier()

    def guide(**batch: Any) -> None:
        for site, x in lora.weights().items():
            pyro.sample(site, dist.Delta(x, event_dim=x.ndim))
        pyro.sample("kind", dist.Categorical(torch.ones(3)))

    def of_kind(**batch: Any) -> Tensor:
        pyro.sample("kind", dist.Categorical(torch.ones(3)))
        return model(**batch)

    train = many(6)
    found = pl.state_distance(guide, train, model=of_kind)(train)
    states = mean_states(lora.network, train, 0)
    assert_close(found, distances(states, states), rtol=1e-8, atol=0)


def test_a_row_of_several_data_is_refused() -> None:
    """Tokens whose plate is over places: each text is of all of them."""
    lora = pl.lift(networks.bert(2, of_tokens=True))

    def model(labels: Tensor | None = None, **texts: Tensor) -> None:
        logits = lora()(**texts).logits
        with pyro.plate("data", 7), pyro.plate("texts", 10, dim=-2):
            pyro.sample("y", dist.Categorical(logits=logits))

    batch = networks.inputs(networks.batch(10, 7))
    with pytest.raises(ValueError, match="outcomes of several data depend on row 0"):
        pl.state_distance(models.particles(lora, model), [batch])


def test_saved_it_is_the_same_for_the_same_network_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    lora = pl.lift(networks.bert(2))
    model = pl.models.classification(lora, 12)
    posterior = pl.ensemble(lora, [lora.weights()], model=model)
    train, others = many(12), many(5)
    distance = pl.state_distance(posterior, train)
    distance.save(tmp_path / "distance")
    again = pl.load_state_distance(tmp_path / "distance", posterior)
    assert torch.equal(again(others), distance(others))
    assert repr(again) == repr(distance)
    with pytest.warns(UserWarning, match="attention_mask"):  # as the first one does
        again([{"input_ids": others[0]["input_ids"]}])
    pl.save(posterior, tmp_path / "posterior")
    with pytest.raises(ValueError, match="pyro_lora posterior"):
        pl.load_state_distance(tmp_path / "posterior", posterior)
    with pytest.raises(ValueError, match="pyro_lora state distance"):
        pl.load(tmp_path / "distance", lora)
    with pytest.raises(ValueError, match=rf"There is one in {tmp_path}"):
        pl.load_metadata(tmp_path)
    other = pl.lift(networks.bert(2))
    of_other = pl.ensemble(
        other, [other.weights()], model=pl.models.classification(other, 12)
    )
    with pytest.raises(ValueError, match=r"manifest.json: .*this is another network"):
        pl.load_state_distance(tmp_path / "distance", of_other)


def test_what_is_wrong_is_said() -> None:
    lora, model = models.classifier()
    posterior = models.particles(lora, model)
    one, batches = networks.batch(1), models.two_batches()
    with pytest.raises(ValueError, match=r"two training data .* found 1"):
        pl.state_distance(posterior, [one])
    with pytest.raises(ValueError, match="at most 0 from their mean"):
        pl.state_distance(posterior, [one, one])
    with pytest.raises(ValueError, match="got no batches"):
        pl.state_distance(posterior, [])
    distance = pl.state_distance(posterior, batches)
    with pytest.raises(ValueError, match="got no batches"):
        distance([])
    with pytest.warns(UserWarning, match="no 'attention_mask'"):
        distance([{k: x for k, x in one.items() if k != "attention_mask"}])
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        distance(batches)
    with pytest.raises(TypeError, match="two predictions, or scores of both"):
        pl.auroc(distance(batches), pl.predict(posterior, batches))
    with pytest.raises(ValueError, match=r"one score a datum"):
        pl.auroc(distance(batches), torch.zeros(2, 3))


def test_a_model_that_does_not_call_its_network_is_refused() -> None:
    lora, plain = models.classifier()

    def model(labels: Tensor | None = None, **texts: Tensor) -> None:
        lora()
        logits = texts["input_ids"][:, :2].double()
        with pyro.plate("data", 10, subsample=logits):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    posterior = models.particles(lora, plain)
    with pytest.raises(ValueError, match="no gradient reaches its outputs"):
        pl.state_distance(posterior, models.two_batches(), model=model)


def test_what_an_adapter_changes_is_no_state() -> None:
    """Without a stack it is what the first adapted nn.Linear is given."""
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    network[0].requires_grad_(False)
    images = torch.randn(12, 1, 4, 4)

    def distance(network: nn.Module) -> Tensor:
        lora = pl.lift(network)

        def model(x: Tensor, labels: Tensor | None = None) -> None:
            logits = lora()(x)
            with pyro.plate("data", 12, subsample=x):
                pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

        posterior = models.particles(lora, model)
        return pl.state_distance(posterior, [{"x": images}])([{"x": images}])

    states = network[:2](images).double()
    assert_close(distance(network), distances(states, states), rtol=1e-5, atol=0)
    network[0].requires_grad_(True)
    with pytest.raises(ValueError, match=r"first that runs is a Conv2d"):
        distance(network)


def test_of_a_stack_whose_layers_are_not_called() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(3, 3))] * 1)
            self.layers.append(nn.Sequential(nn.Linear(3, 2)))
            self.layers[0].requires_grad_(False)

        def forward(self, x: Tensor) -> Any:
            first, second = self.layers
            return second[0](first[0](x).tanh())

    lora = pl.lift(Stack())

    def model(x: Tensor, labels: Tensor | None = None) -> None:
        logits = lora()(x)
        with pyro.plate("data", 12, subsample=x):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    x = torch.randn(12, 3)
    found = pl.state_distance(models.particles(lora, model), [{"x": x}])([{"x": x}])
    states = lora.network.layers[0](x).tanh().double().detach()
    assert_close(found, distances(states, states), rtol=1e-5, atol=0)
