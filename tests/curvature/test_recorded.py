"""What a pass records: every call under the posterior's weights, compiled or not."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import SGD
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import pyro_lora as pl
from tests.networks import batch, bert, classifier, inputs

NUM_DATA = 5
# Of dynamo, which looks at everything of a tensor that is bound.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),
    pytest.mark.untrained,
]
Compile = Callable[[Any], Any]


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    pyro.clear_param_store()
    yield
    torch.compiler.reset()


def in_place(network: Any) -> Any:
    network.compile(backend="eager")
    return network


def each_block(network: Any) -> Any:
    for layer in network.get_base_model().bert.encoder.layer:
        layer.compile(backend="eager")
    return network


def each_linear(network: Any) -> Any:
    for module in network.modules():
        if isinstance(module, nn.Linear):
            module.compile(backend="eager")
    return network


def wrapped(network: Any) -> Any:
    return torch.compile(network, backend="eager")


def as_it_is(network: Any) -> Any:
    return network


def train(model: Any, lora: pl.LiftedNetwork, texts: dict[str, Tensor]) -> None:
    """Steps that compile what is compiled, and move nothing."""
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
    svi = SVI(model, guide, SGD({"lr": 1e-30}), Trace_ELBO())
    for _ in range(2):
        svi.step(**texts)
    pyro.clear_param_store()


def fit(model: Any, lora: pl.LiftedNetwork, *batches: Any, **settings: Any) -> Any:
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter(), **settings)
    return guide.laplace_approximation(list(batches))


@pytest.mark.parametrize(
    ("compiled", "when"),
    [
        (in_place, "before lifting"),
        pytest.param(wrapped, "before lifting", marks=pytest.mark.slow),
        (each_block, "before fitting"),
        (each_linear, "after fitting"),
        pytest.param(in_place, "after fitting", marks=pytest.mark.slow),
    ],
)
@pytest.mark.few(1)
def test_a_compiled_network_gives_the_posterior_of_the_plain_one(
    compiled: Compile, when: str
) -> None:
    texts = batch()
    network = bert(num_layers=1)
    twin = copy.deepcopy(network)
    expected_lora = pl.lift(twin)
    expected_model = pl.models.classification(expected_lora, NUM_DATA)
    expected = fit(expected_model, expected_lora, texts)
    if when == "before lifting":
        network = compiled(network)
    lora = pl.lift(network)
    model = pl.models.classification(lora, NUM_DATA)
    if when == "before fitting":
        compiled(network)
    train(model, lora, texts)
    posterior = fit(model, lora, texts)
    if when == "after fitting":
        compiled(network)
        train(model, lora, texts)
    assert float(posterior.log_evidence()) == float(expected.log_evidence())
    logits, wanted = posterior.linearized(texts), expected.linearized(texts)
    assert_close(logits.mean, wanted.mean, rtol=0, atol=0)
    assert_close(logits.covariance_matrix, wanted.covariance_matrix, rtol=0, atol=0)
    assert fit(model, lora, texts, sites="last_layer").gaussian.loc.keys() == {
        "head.classifier.weight",
        "head.classifier.bias",
    }


class Checkpointed(nn.Module):
    """A network that checkpoints a block of its own, whatever its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4))
        self.outer = nn.Linear(4, 2)
        self.context_fn: Any = None

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(
            self.block, x, use_reentrant=False, context_fn=self.context_fn
        )
        out: Tensor = self.outer(hidden)
        return out


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.few(1)
def test_what_is_compiled_is_checkpointed_as_if_it_werent(fisher: str) -> None:
    evidences = []
    for backend in (None, "aot_eager"):
        torch.manual_seed(0)
        network, data = Checkpointed(), vectors()
        lora = pl.lift(network)
        network.context_fn = lora.context_fn
        if backend is not None:
            network.block.compile(backend=backend)
        train(of_vectors(lora), lora, data)
        posterior = fit(of_vectors(lora), lora, data, fisher=fisher)
        evidences.append(float(posterior.log_evidence()))
    assert evidences[0] == evidences[1]


@pytest.mark.parametrize("fails", [False, True])
def test_the_compilers_stance_is_as_before(fails: bool) -> None:
    lora = pl.lift(bert(num_layers=1))
    texts = batch()
    posterior = fit(pl.models.classification(lora, NUM_DATA), lora, texts)
    calls = []

    def backend(graph: Any, example: Any) -> Any:
        calls.append(graph)
        return graph.forward

    if fails:
        with pytest.raises(ValueError, match="exactly one of input_ids"):
            posterior.linearized({k: x for k, x in texts.items() if k != "input_ids"})
    else:
        posterior.linearized(texts)
    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    assert len(calls) == 1
    assert not any(module._forward_hooks for module in lora.network.modules())
    assert not any(module._forward_pre_hooks for module in lora.network.modules())


def pair() -> tuple[pl.LiftedNetwork, pl.LiftedNetwork]:
    network = bert(num_layers=1)
    return pl.lift(network), pl.lift(copy.deepcopy(network))


def test_a_model_of_another_lifted_network_is_refused(tmp_path: Path) -> None:
    (first, second), texts = pair(), batch()
    model = pl.models.classification(first, NUM_DATA)
    posterior = fit(model, first, texts)
    pl.save(posterior, tmp_path / "posterior")
    loaded = pl.load(tmp_path / "posterior", second, model=model)
    with pytest.raises(ValueError, match=r"'lora\..*samples another lifted network"):
        loaded.linearized(texts)
    with pytest.raises(ValueError, match="samples another lifted network"):
        pl.predict(loaded, [inputs(texts)], model=model, method="linearized")


def test_a_model_that_calls_the_plain_network_is_refused() -> None:
    lora, texts = pl.lift(bert(num_layers=1)), batch()

    def model(input_ids: Tensor, attention_mask: Tensor, labels: Any = None) -> Any:
        lora()
        logits = lora.network(input_ids, attention_mask).logits
        with pyro.plate("data", NUM_DATA, subsample=input_ids):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    with pytest.raises(ValueError, match="called the network itself"):
        fit(model, lora, texts)


def test_a_model_that_calls_nothing_is_refused() -> None:
    lora = pl.lift(bert(num_layers=1))

    def model(input_ids: Tensor, attention_mask: Tensor, labels: Any = None) -> Any:
        lora()
        logits = torch.zeros(len(input_ids), 2, requires_grad=True)
        with pyro.plate("data", NUM_DATA, subsample=input_ids):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    with pytest.raises(ValueError, match=r"net = lora\(\); net\(\*\*inputs\)"):
        fit(model, lora, batch())


def test_a_reference_at_other_weights_isnt_recorded() -> None:
    lora, texts = pl.lift(bert(num_layers=1)), batch()
    start = {site: 0.5 * x for site, x in lora.weights().items()}

    def model(labels: Any = None, constant: bool = False, **given: Tensor) -> Any:
        net = lora()
        with lora.bind(start) as reference:  # as preference losses do
            offset = reference(**given).logits
        offset = offset + lora.network(**given).logits
        logits = net(**given).logits - (offset.detach() if constant else offset)
        with pyro.plate("data", NUM_DATA, subsample=logits):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    fitted = fit(model, lora, texts)
    expected = fit(model, lora, {**texts, "constant": True})
    assert float(fitted.log_evidence()) == float(expected.log_evidence())


def test_networks_between_which_the_model_chooses() -> None:
    first, second = pl.lift(bert(num_layers=1)), pl.lift(bert(num_layers=1), name="b")
    texts = batch()

    def model(
        which: int, input_ids: Tensor, attention_mask: Tensor, labels: Any
    ) -> Any:
        net = (first(), second())[which]
        logits = net(input_ids=input_ids, attention_mask=attention_mask).logits
        with pyro.plate("data", 2 * NUM_DATA, subsample=input_ids):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    init = {**first.weights(), **second.weights()}
    guide = pl.AutoLaplace(model, init_loc_fn=lambda site: init[site["name"]])
    posterior = guide.laplace_approximation([{"which": i, **texts} for i in (0, 1)])
    gaussian = posterior.linearized({"which": 1, **texts})
    alone = fit(pl.models.classification(second, NUM_DATA), second, texts)
    expected = alone.linearized(texts)
    assert_close(
        gaussian.covariance_matrix, expected.covariance_matrix, rtol=0, atol=1e-12
    )


class Experts(nn.Module):
    """Two linear experts of which an input takes one, by its first entry's sign."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(3, 2) for _ in range(2))
        self.gate = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        expert = self.experts[int(x[0, 0] > 0)]
        logits: Tensor = self.gate(expert(x))
        return logits


class ReadsItself(nn.Module):
    """A linear layer whose weight is read past it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.outer(self.inner.forward(x))
        return out


def of_vectors(lora: pl.LiftedNetwork) -> Any:
    def model(x: Tensor, labels: Tensor | None = None) -> Any:
        logits = lora()(x)
        with pyro.plate("data", NUM_DATA, subsample=x):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    return model


def vectors() -> dict[str, Tensor]:
    x = torch.randn(NUM_DATA, 3)
    return {"x": x.abs(), "labels": torch.randint(2, (NUM_DATA,))}


def test_an_expert_that_isnt_called_keeps_its_prior() -> None:
    lora = pl.lift(Experts(), prior=pl.priors.normal(2.0))
    data = vectors()
    posterior = fit(of_vectors(lora), lora, data)
    variance = posterior.variance()["base.experts.weight"]
    assert_close(variance[0], torch.full((2, 3), 4.0))
    assert (variance[1] < 4.0).all()
    only = fit(of_vectors(lora), lora, data, sites=["base.experts.weight"])
    assert only.linearized(data).covariance_matrix.diagonal(dim1=1, dim2=2).min() > 0


def test_a_layer_that_is_read_past_its_call_is_refused() -> None:
    lora, data = pl.lift(ReadsItself()), vectors()
    with pytest.raises(ValueError, match=r"depends on 'inner\.\w+' in 1 places"):
        fit(of_vectors(lora), lora, data)
    # Of a posterior over the other layer nothing is missing.
    sites = ["base.outer.weight", "base.outer.bias"]
    assert fit(of_vectors(lora), lora, data, sites=sites).gaussian.loc.keys() == {
        *sites
    }


def test_a_linearisation_without_gradients_is_refused() -> None:
    lora, data = pl.lift(nn.Linear(3, 2)), vectors()
    posterior = fit(of_vectors(lora), lora, data)

    def detached(x: Tensor, labels: Tensor | None = None) -> Any:
        net = lora()
        with torch.no_grad():
            logits = net(x)
        with pyro.plate("data", NUM_DATA, subsample=x):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    with pytest.raises(ValueError, match="no gradient reaches"):
        pl.predict(posterior, [data], model=detached, method="linearized")


def test_deep_copies_give_the_same_numbers_or_say_why_not() -> None:
    lora, texts = pl.lift(bert(num_layers=1)), batch()
    posterior = fit(pl.models.classification(lora, NUM_DATA), lora, texts)
    twin = copy.deepcopy(posterior)
    assert twin.networks[0].network is not lora.network
    expected = posterior.linearized(texts)
    with torch.no_grad():  # what happens to the first network is nothing to the other
        lora.network.get_base_model().classifier.weight.zero_()
        for parameter in lora.network.parameters():
            parameter.zero_()
    logits = twin.linearized(texts)
    assert_close(logits.mean, expected.mean, rtol=0, atol=0)
    assert_close(logits.covariance_matrix, expected.covariance_matrix, rtol=0, atol=0)


def test_a_deep_copy_of_a_posterior_of_a_function_is_refused() -> None:
    lora, texts = pl.lift(bert(num_layers=1)), batch()
    model = classifier(lora, NUM_DATA)
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
    posterior = guide.laplace_approximation([texts])
    with pytest.raises(ValueError, match="deep copy"):
        copy.deepcopy(posterior).linearized(texts)
    with pytest.raises(ValueError, match="deep copy"):
        copy.deepcopy(guide).laplace_approximation([texts])
