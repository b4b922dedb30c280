"""Networks that can't take particles in their batch: one at a time, never wrong."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import pyro_lora as pl
from tests.networks import adapted, batch, bert, inputs, llama, particles

torch_double = {"dtype": torch.float64}


def loop(lora: pl.LiftedNetwork, weights: dict[str, Tensor], *x: Any) -> Tensor:
    """The network's own outputs with each particle's weights in its parameters."""
    own, outputs = lora.weights(), []
    for i in range(len(next(iter(weights.values())))):
        lora.load({site: value[i] for site, value in weights.items()})
        outputs.append(lora.network(*x))
    lora.load(own)
    return torch.stack(outputs)


class SequenceFirst(nn.Module):
    """Takes (T, B, I); the batch is the second dim."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 3, **torch_double)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x).cumsum(0)


class SequenceFirstInside(nn.Module):
    """Takes (B, T, I), and has the tokens first inside."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 3, **torch_double)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x.transpose(0, 1)).cumsum(0).transpose(0, 1)


class Routed(nn.Module):
    """Each expert sees the tokens that are sent to it."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4, **torch_double) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, 4)
        out = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            chosen = (tokens[:, 0] > 0).long() == i
            out[chosen] = expert(tokens[chosen])
        return out.reshape(x.shape)


def tied() -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    layers[2].weight = layers[0].weight
    return layers


def hooked() -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    forward = layers[1].forward
    layers[1].forward = lambda x: 2 * forward(x)  # as accelerate does
    return layers


def parametrized() -> nn.Sequential:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    return nn.Sequential(nn.Linear(4, 4), layer).double()


def read_by_value() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True).double().eval()


NETWORKS: list[Callable[[], nn.Module]] = [
    SequenceFirst,
    SequenceFirstInside,
    Routed,
    tied,
    hooked,
    parametrized,
    read_by_value,
]


@pytest.mark.parametrize("shape", [(5, 7, 4), (2, 6, 4), (6, 2, 4), (1, 3, 4)])
@pytest.mark.parametrize("kind", NETWORKS)
def test_particles_are_a_loop_over_the_plain_network(
    kind: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    network, x = kind(), torch.randn(shape, **torch_double)
    lora = pl.lift(network)
    weights = particles(lora, 3)
    expected = loop(lora, weights, x)
    with lora.bind(weights) as net:
        for _ in range(2):
            assert_close(net(x), expected, rtol=0, atol=1e-12)
    assert_close(loop(lora, weights, x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", NETWORKS)
def test_gradients_are_those_of_the_parameters(kind: Callable[[], nn.Module]) -> None:
    network, x = kind(), torch.randn(5, 7, 4, **torch_double)
    lora = pl.lift(network)
    network(x).square().sum().backward()
    weights = {k: v.requires_grad_() for k, v in lora.weights().items()}
    with lora.bind(weights) as net:
        net(x).square().sum().backward()
    parameters = dict(network.named_parameters())
    for site, names in lora.sites.items():
        expected = torch.stack([parameters[name].grad for name in names])
        assert_close(weights[site].grad, expected, rtol=0, atol=1e-12)


def test_a_loss_is_one_for_each_particle() -> None:
    lora, texts = pl.lift(bert()), batch()
    weights = particles(lora, 3)
    with lora.bind(weights) as net:
        out = net(**texts)
    assert out.logits.shape == (3, 5, 2)
    for i in range(3):
        with lora.bind({site: value[i] for site, value in weights.items()}) as net:
            one = net(**texts)
        assert_close(out.loss[i], one.loss, rtol=0, atol=1e-12)
        assert_close(out.logits[i], one.logits, rtol=0, atol=1e-12)
    with lora.bind({k: v[:, None] for k, v in weights.items()}) as net:
        out = net(**texts)
    assert (out.loss.shape, out.logits.shape) == ((3, 1), (3, 5, 2))
    with lora.bind({k: v[:1] for k, v in weights.items()}) as net:
        assert net(**texts).loss.shape == (1,)


def test_a_bound_value_replaces_the_parameter_wherever_it_is_read() -> None:
    network, texts = llama(None, modules_to_save=["lm_head"]), inputs(batch())
    lora = pl.lift(network)
    weights = particles(lora)
    with lora.bind(weights) as net:
        bound = net(**texts).logits
        assert not torch.equal(lora.weights()["head.lm_head.weight"], bound)
        for site, value in lora.initial_weights.items():  # what is bound isn't seen
            assert torch.equal(lora.weights()[site], value)
    lora.load(weights)
    assert_close(network(**texts).logits, bound, rtol=0, atol=0)


class TiedAutoencoder(nn.Module):
    """Decodes by the encoder's weight, past the layer's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 3, **torch_double)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x).tanh() @ self.encoder.weight


@pytest.mark.parametrize("lead", [(), (3,)])
def test_a_linear_layers_weight_that_is_read_past_its_forward(
    lead: tuple[int, ...],
) -> None:
    lora, x = pl.lift(TiedAutoencoder()), torch.randn(5, 4, **torch_double)
    weights = particles(lora, *lead)
    with lora.bind(weights) as net:
        bound = net(x)
    stacked = weights if lead else {k: v[None] for k, v in weights.items()}
    expected = loop(lora, stacked, x).reshape(bound.shape)
    assert_close(bound, expected, rtol=0, atol=1e-12)


class Named(NamedTuple):
    """What a network may return."""

    logits: Tensor
    name: str


@dataclass(frozen=True)
class Fields:
    """What a network may return."""

    logits: Tensor
    name: str


class Returning(nn.Module):
    """Returns its logits in a form of its own."""

    def __init__(self, form: Callable[[Tensor, str], Any], *, one_by_one: bool) -> None:
        super().__init__()
        self.classifier = nn.Linear(4, 3, **torch_double)
        self.form, self.one_by_one = form, one_by_one

    def forward(self, x: Tensor) -> Any:
        logits = self.classifier(x)
        mixed = logits.mean(0) if self.one_by_one else 0.0
        return self.form(logits - mixed, "y")


@pytest.mark.parametrize("lead", [(3,), (1,), (3, 1)])
@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("form", [Named, Fields])
def test_outputs_are_unfolded_in_named_tuples_and_dataclasses(
    form: Callable[[Tensor, str], Any], one_by_one: bool, lead: tuple[int, ...]
) -> None:
    lora = pl.lift(Returning(form, one_by_one=one_by_one))
    plain = pl.lift(Returning(lambda y, _: y, one_by_one=one_by_one))
    weights, x = particles(lora, *lead), torch.randn(5, 4, **torch_double)
    with lora.bind(weights) as net:
        out = net(x)
    assert (type(out), out.name) == (form, "y")
    stacked = {k: v.reshape(-1, *v.shape[len(lead) :]) for k, v in weights.items()}
    expected = loop(plain, stacked, x)
    assert_close(out.logits, expected, rtol=0, atol=1e-12)


def test_outputs_without_gradient_come_one_at_a_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lora = pl.lift(Returning(lambda y, _: y.argmax(-1), one_by_one=False))
    weights, x = particles(lora, 3), torch.randn(5, 4, **torch_double)
    with lora.bind(weights) as net:
        output = net(x)
    assert torch.equal(output, loop(lora, weights, x))
    assert "outputs have no gradient" in caplog.text


def test_a_network_of_ones_own_in_inference_mode(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lora = pl.lift(Returning(lambda y, _: y, one_by_one=False))
    weights, x = particles(lora, 3), torch.randn(5, 4, **torch_double)
    with torch.inference_mode(), lora.bind(weights) as net:
        output = net(x)
    assert_close(output, loop(lora, weights, x).detach(), rtol=0, atol=1e-12)
    assert not caplog.text  # all at once


class MixingAtTimes(nn.Module):
    """Standardises over the batch in training mode, or where it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 3, **torch_double)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        out = self.project(x)
        if self.training:
            out = out - out.mean(0)
        return out if scale is None else out + scale * out.mean(0)


@pytest.mark.parametrize("by", ["training", "input"])
def test_every_form_of_call_is_checked(by: str) -> None:
    network, x = MixingAtTimes().eval(), torch.randn(5, 4, **torch_double)
    lora = pl.lift(network)
    weights = particles(lora, 3)
    with lora.bind(weights) as net:
        output = net(x, None)
    assert_close(output, loop(lora, weights, x, None), rtol=0, atol=1e-12)
    network.train(by == "training")
    scale = torch.ones(5, 1, **torch_double) if by == "input" else None
    with lora.bind(weights) as net:
        output = net(x, scale)
    assert_close(output, loop(lora, weights, x, scale), rtol=0, atol=1e-12)


STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "range": lambda x: x.abs().amax(),
    "max - min": lambda x: x.max() - x.min(),
    "aminmax": lambda x: x.aminmax().max,
    "std": lambda x: x.std(),
    "by feature": lambda x: x.flatten(0, -2).square().mean(0).sqrt(),
    "norm": lambda x: x.norm(),
    "median": lambda x: x.abs().median(),
    "quantile": lambda x: x.abs().flatten().sort().values[-3],
}


class Scaled(nn.Module):
    """A layer whose input is rounded by a statistic of all data, detached."""

    def __init__(self, layer: nn.Module, statistic: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.statistic = layer, statistic

    def forward(self, x: Tensor) -> Any:
        scale = self.statistic(x.detach()) / 7
        rounded = (x.detach() / scale).round() * scale
        return self.layer(x + (rounded - x).detach())  # a straight-through gradient


@pytest.mark.grid
@pytest.mark.parametrize("name", sorted(STATISTICS))
@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("equal_at_first", [True, False])
def test_a_detached_statistic_of_the_batch_doesnt_mix_particles(
    name: str, pretrained: bool, equal_at_first: bool
) -> None:
    if pretrained:
        network: Any = bert(3)
        for layer in network.base_model.model.bert.encoder.layer:
            layer.intermediate.dense = Scaled(
                layer.intermediate.dense, STATISTICS[name]
            )
        texts = inputs(batch(4))
    else:
        layers = [nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh()]
        layers[2] = Scaled(layers[2], STATISTICS[name])
        network = nn.Sequential(*layers, nn.Linear(8, 2)).double()
        network = adapted(network, target_modules=["0", "4"])
        texts = {"input": torch.randn(4, 4).double()}
    lora = pl.lift(network)

    def call(net: Any) -> Tensor:
        found: Any = net(**texts)
        return found.logits if pretrained else found

    if equal_at_first:  # as particles are that start at one adapter
        same = {s: x.expand(3, *x.shape) for s, x in lora.weights().items()}
        with lora.bind(same) as net:
            call(net)
    weights = particles(lora, 3)
    with lora.bind(weights) as net:
        found = call(net)
    for k in range(3):
        with lora.bind({s: x[k] for s, x in weights.items()}) as net:
            assert_close(found[k], call(net), rtol=0, atol=1e-12)


def test_a_statistic_of_each_datum_is_folded(caplog: pytest.LogCaptureFixture) -> None:
    network = bert(3)
    for layer in network.base_model.model.bert.encoder.layer:
        layer.intermediate.dense = Scaled(
            layer.intermediate.dense, lambda x: x.abs().amax((1, 2), keepdim=True)
        )
    lora = pl.lift(network)
    with lora.bind(particles(lora, 3)) as net:
        net(**inputs(batch(4)))
    assert not caplog.records
