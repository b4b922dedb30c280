"""The trunk's hidden states, kept between calls: the same numbers, fewer passes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from peft import PeftModel
from pyro.optim import SGD
from torch import Tensor, nn
from torch.testing import assert_close

import pyro_lora as pl
from pyro_lora import kernels
from pyro_lora.lifting.cached_trunk import TrunkCache
from tests.lifting.test_trunk import bert_on_top, layers, llama_on_top, loop
from tests.networks import adapted, batch, bert, classifier, inputs, particles

KINDS = [bert_on_top, llama_on_top]


def outputs(
    lora: pl.LiftedNetwork, weights: dict[str, Tensor], texts: dict[str, Tensor]
) -> Tensor:
    with lora.bind(weights) as net:
        logits: Tensor = net(**texts).logits
    return logits


def rows(texts: dict[str, Tensor], index: list[int]) -> dict[str, Tensor]:
    return {name: x[index] for name, x in texts.items()}


@contextmanager
def trunk_rows(network: PeftModel) -> Iterator[list[int]]:
    """Rows of each call of the trunk's two layers; the third layer's are left out."""
    seen: list[int] = []
    handles = [
        next(
            m for m in layer.modules() if isinstance(m, nn.Linear)
        ).register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
        for layer in layers(network)[:2]
    ]
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_gigabytes", [1.0, 0.0, 6e-6])
def test_the_trunk_runs_once_a_datum(
    kind: Callable[[], PeftModel], max_gigabytes: float, tmp_path: Path
) -> None:
    # 5 rows of 7 tokens of 16 float64 numbers are 4,480 bytes: two batches don't fit
    # into 6,000.
    network = kind()
    lora = pl.lift(network)
    weights = {s: x.requires_grad_() for s, x in particles(lora, 3).items()}
    first, second = inputs(batch()), inputs(batch())
    both = {name: torch.cat([first[name], second[name]]) for name in first}
    mixed = rows(both, [7, 0, 9, 4])
    calls = [first, second, first, second, mixed]

    def gradients(texts: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        logits = outputs(lora, weights, texts)
        found = torch.autograd.grad(logits.square().sum(), list(weights.values()))
        return logits, found

    expected = [gradients(texts) for texts in calls]
    with (
        pl.cached_trunk(lora, max_gigabytes=max_gigabytes, folder=tmp_path),
        trunk_rows(network) as seen,
    ):
        for texts, (logits, found) in zip(calls, expected, strict=True):
            again = gradients(texts)
            assert_close(again[0], logits, rtol=1e-12, atol=1e-12)
            assert_close(again[1], found, rtol=1e-10, atol=1e-12)
        files = list(tmp_path.rglob("*.safetensors"))
    assert seen == [5, 5, 5, 5]  # two layers, two batches
    assert len(files) == {1.0: 0, 0.0: 2, 6e-6: 1}[max_gigabytes]
    assert not list(tmp_path.iterdir())
    with trunk_rows(network) as seen:
        gradients(first)
    assert seen == [5, 5]


def test_one_set_of_weights_meets_each_datum_once() -> None:
    network = bert_on_top()
    lora = pl.lift(network)
    texts = inputs(batch(7))  # as many rows as tokens
    weights = {s: x[0].requires_grad_() for s, x in particles(lora, 1).items()}
    constants = {s: x.detach() for s, x in weights.items()}

    def gradients() -> tuple[Tensor, ...]:
        logits = outputs(lora, weights, texts)
        return torch.autograd.grad(logits.square().sum(), list(weights.values()))

    logits, expected = outputs(lora, weights, texts), gradients()
    with pl.cached_trunk(lora), trunk_rows(network) as seen:
        outputs(lora, constants, texts)
        outputs(lora, constants, texts)
        for _ in range(3):
            assert_close(gradients(), expected, rtol=1e-10, atol=1e-12)
        assert_close(outputs(lora, constants, texts), logits, rtol=1e-12, atol=1e-12)
        assert_close(
            outputs(lora, {s: x[None] for s, x in constants.items()}, texts)[0], logits
        )
        assert seen == [7] * 2


def test_one_set_of_weights_under_what_runs_before_is_not_cached() -> None:
    class Late(nn.Module):
        """Its adapted layer is registered last, and runs first."""

        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
            self.first = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for layer in self.stack:
                x = layer(x)
            return x

    network = adapted(Late().double(), target_modules=["first", "stack.1"])
    lora = pl.lift(network)
    x = torch.randn(3, 4, dtype=torch.float64)
    with pl.cached_trunk(lora):
        for seed in range(3):
            torch.manual_seed(seed)
            weights = {s: torch.randn_like(w) for s, w in lora.weights().items()}
            leaves = {s: w.clone().requires_grad_() for s, w in weights.items()}
            with lora.bind(leaves) as net:
                with pytest.raises(ValueError, match="adapter may run before"):
                    net(x)
            lora.load(weights)
            network(x)  # as it was


@pytest.mark.grid
@pytest.mark.parametrize("kernel", [kernels.RBF(), kernels.RBF(space="function")])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_svgd_is_the_same(kernel: Any, chunk_size: int | None) -> None:
    network = bert_on_top()
    lora = pl.lift(network)
    batches = [batch(num_labels=3), batch(num_labels=3)]
    start = particles(lora, 4)

    def run() -> dict[str, Tensor]:
        svgd = pl.SVGD(
            pl.models.classification(lora, 10),
            kernel,
            SGD({"lr": 0.01}),
            4,
            init_loc_fn=lora.init_to(start),
            chunk_size=chunk_size,
        )
        with trunk_rows(network) as seen:
            svgd.run(batches, num_epochs=3, progress_bar=False)
        passes.append(len(seen))
        return svgd.get_named_particles()

    passes: list[int] = []
    expected = run()
    with pl.cached_trunk(lora):
        found = run()
    assert_close(found, expected, rtol=1e-10, atol=1e-12)
    starting = 2 * (1 + 4)  # one weight set at a time: to inspect, and to initialise
    assert passes[1] == 2 * 2  # each batch once
    assert passes[0] >= starting + 2 * 6


@pytest.mark.untrained
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_is_looked_at_first_goes_through_the_trunk_once(
    kind: Callable[[], PeftModel],
) -> None:
    network = kind()
    lora = pl.lift(network)
    batches = [batch(5), batch(5), batch(3)]
    model = classifier(lora, 13)
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
    with trunk_rows(network) as seen:
        posterior = guide.laplace_approximation(batches)
    # Once before it's known which networks there are.
    assert seen == [5, 5, *(n for n in (5, 5, 3) for _ in range(2))]
    again = guide.laplace_approximation(batches)  # which has nothing to look at
    assert torch.equal(posterior.log_evidence(), again.log_evidence())
    for method in ("linearized", "sample"):
        pl.predict(posterior, batches[:1], method=method, num_samples=3)
        with trunk_rows(network) as seen:
            whole = pl.predict(posterior, batches, method=method, num_samples=3)
        assert seen == [n for n in (5, 5, 3) for _ in range(2)]
        if method == "linearized":
            alone = [pl.predict(posterior, [x], method=method) for x in batches]
            parts = torch.cat([x.probs for x in alone])
            assert_close(whole.probs, parts, rtol=1e-12, atol=1e-12)


def assert_is_as_without_sharing(
    find: Callable[[pl.LiftedNetwork], dict[str, Tensor]],
) -> None:
    """Compare what is found of two networks; below the adapter one shares nothing."""
    found = []
    for is_shared in (True, False):
        torch.manual_seed(0)
        lora = pl.lift(bert_on_top())
        if not is_shared:
            lora.trunk.layers = []
        found.append(find(lora))
    assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


def evidence_and_probs(
    lora: pl.LiftedNetwork, model: Any, batches: Any
) -> dict[str, Tensor]:
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
    posterior = guide.laplace_approximation(batches)
    ensemble = pl.ensemble(lora, [particles(lora) for _ in range(5)])
    return {
        "evidence": posterior.log_evidence(),
        "linearized": pl.predict(posterior, batches, model=model).probs,
        "draws": pl.predict(ensemble, batches, model=model, chunk_size=2).probs,
    }


class Loader:
    """Batches in one and the same memory, which PyTorch doesn't see being written.

    Each time another one is the first.
    """

    def __init__(self) -> None:
        self.batches = [batch(5) for _ in range(3)]
        self.tensors = {k: x.clone() for k, x in self.batches[0].items()}
        self.memory = {k: x.numpy() for k, x in self.tensors.items()}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        given = self.tensors
        self.batches.append(self.batches.pop(0))
        for one in self.batches:
            for name, x in one.items():
                self.memory[name][:] = x.numpy()
            yield given


@pytest.mark.untrained
def test_memory_that_is_written_again_is_another_batch() -> None:
    assert_is_as_without_sharing(
        lambda lora: evidence_and_probs(lora, classifier(lora, 15), Loader())
    )


@pytest.mark.untrained
def test_what_a_model_changes_between_its_calls_stays_so() -> None:
    def find(lora: pl.LiftedNetwork) -> dict[str, Tensor]:
        below = layers(lora.network)[0].attention.self.query
        plain = below.forward
        below.forward = lambda x: plain(x) + below.task

        def model(
            input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
        ) -> None:
            net, logits = lora(), []
            for below.task in (0.0, 5.0):
                logits.append(net(input_ids, attention_mask).logits)
            with pyro.plate("data", 10, subsample=input_ids):
                likelihood = dist.Categorical(logits=logits[0] - logits[1])
                pyro.sample("y", likelihood, obs=labels)

        return evidence_and_probs(lora, model, [batch(5), batch(5)])

    assert_is_as_without_sharing(find)


class OfGraph(nn.Module):
    """Nodes that see their neighbours, by a matrix that may be sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def forward(self, x: Tensor, neighbours: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = torch.tanh(layer(neighbours @ x if i < 2 else x))
        return x


@pytest.mark.untrained
@pytest.mark.filterwarnings("ignore:Sparse")
def test_an_input_may_be_sparse() -> None:
    lora = pl.lift(adapted(OfGraph().double(), target_modules=["2"]))

    def model(x: Tensor, neighbours: Tensor, labels: Tensor | None = None) -> None:
        logits = lora()(x, neighbours)
        with pyro.plate("data", 5, subsample=x):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    x, matrix = torch.randn(5, 4).double(), (torch.rand(5, 5) < 0.5).double()
    labels = torch.tensor([0, 1, 2, 3, 0])
    found = []
    for neighbours in (matrix, matrix.to_sparse()):
        guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
        batches = [{"x": x, "neighbours": neighbours, "labels": labels}]
        posterior = guide.laplace_approximation(batches)
        found.append(pl.predict(posterior, batches).probs)
    assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


@pytest.mark.untrained
def test_who_looks_into_the_trunk_sees_what_it_gives() -> None:
    lora = pl.lift(bert_on_top())
    model = classifier(lora, 10)
    batches = [batch(5), batch(5)]
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
    posterior = guide.laplace_approximation(batches)
    seen: list[Tensor] = []
    layers(lora.network)[0].register_forward_hook(
        lambda layer, args, output: seen.append(output)
    )
    pl.predict(posterior, batches)
    assert all(torch.isfinite(x).all() for x in seen)


def test_every_input_is_in_the_key() -> None:
    network = bert_on_top()
    lora = pl.lift(network)
    weights, texts = particles(lora, 3), inputs(batch())
    kinds = torch.zeros_like(texts["input_ids"])
    kinds[0, 3] = 1
    places = torch.arange(7)[None] + 2
    variants = [
        texts,
        {**texts, "attention_mask": torch.ones_like(texts["attention_mask"])},
        {**texts, "token_type_ids": kinds},
        {**texts, "position_ids": places},
        {**texts, "position_ids": places + 1},
        {**texts, "position_ids": places.expand(5, 7)},
        {name: x[:, :6] for name, x in texts.items()},
    ]
    expected = [outputs(lora, weights, v) for v in variants]
    with pl.cached_trunk(lora):
        for _ in range(2):
            for variant, logits in zip(variants, expected, strict=True):
                again = outputs(lora, weights, variant)
                assert_close(again, logits, rtol=1e-12, atol=1e-12)


def test_changed_weights_below_are_noticed() -> None:
    network = bert_on_top()
    lora = pl.lift(network)
    weights, texts = particles(lora, 3), inputs(batch())
    embeddings = network.get_input_embeddings()
    layer_norm = next(m for m in layers(network)[0].modules() if "Norm" in str(type(m)))
    with pl.cached_trunk(lora):
        before = outputs(lora, weights, texts)
        for module in (embeddings, layer_norm):
            with torch.no_grad():
                module.weight.mul_(1.5)
            after = outputs(lora, weights, texts)
            assert (after - before).abs().max() > 1e-3
            before = after
    assert_close(outputs(lora, weights, texts), before, rtol=1e-12, atol=1e-12)


def test_autocast_and_inference_mode_have_their_own() -> None:
    network = bert_on_top(dtype=torch.float32)
    lora = pl.lift(network)
    weights, texts = particles(lora, 3), inputs(batch())
    weights = {s: x.float().requires_grad_() for s, x in weights.items()}
    with pl.cached_trunk(lora):
        with torch.inference_mode():
            expected = outputs(lora, weights, texts)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = outputs(lora, weights, texts)
        with torch.no_grad():
            logits = outputs(lora, weights, texts)
        assert_close(logits, expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(low.float(), logits)
        outputs(lora, weights, texts).sum().backward()  # on what no_grad left there


def test_what_is_refused() -> None:
    network = bert(3, num_layers=2)
    with pytest.raises(ValueError, match=r"no trunk to cache.*layers_to_transform"):
        pl.cached_trunk(pl.lift(network)).__enter__()
    network = bert_on_top(dropout=0.1)
    lora = pl.lift(network)
    weights, texts = particles(lora, 3), inputs(batch())
    with pytest.raises(ValueError, match="max_gigabytes must be finite and at least 0"):
        pl.cached_trunk(lora, max_gigabytes=-1).__enter__()
    with pl.cached_trunk(lora):
        layers(network)[1].train()
        with pytest.raises(ValueError, match=r"layer\.1' is in training mode.*eval"):
            outputs(lora, weights, texts)
        network.train()
        with pytest.raises(ValueError, match="'the network' is in training mode"):
            outputs(lora, weights, texts)
    outputs(lora, weights, texts)  # without a cache there is nothing to refuse
    with pytest.raises(ValueError, match="training mode"):
        pl.cached_trunk(lora).__enter__()


class Layer(nn.Module):
    def __init__(self, gives_two: bool = False) -> None:
        super().__init__()
        self.linear, self.gives_two = nn.Linear(4, 4), gives_two

    def forward(self, x: Tensor) -> Any:
        y = torch.tanh(self.linear(x))
        return (y, y + 1) if self.gives_two else y


class Stack(nn.Module):
    """Layers in a list; the last one may run first, or the first give two tensors."""

    def __init__(self, gives_two: bool = False, last_first: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(gives_two), Layer(), Layer()])
        self.last_first = last_first

    def forward(self, x: Tensor) -> Tensor:
        order = [2, 0, 1] if self.last_first else [0, 1, 2]
        for i in order:
            x = self.layers[i](x)
            x = x[0] if isinstance(x, tuple) else x
        return x


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"gives_two": True}, "its layer 0 returns more than one tensor"),
        ({"last_first": True}, "adapter may run before them"),
    ],
)
def test_trunks_of_other_forms_are_refused(
    settings: dict[str, bool], match: str
) -> None:
    network = adapted(Stack(**settings).double(), target_modules=["layers.2.linear"])
    lora = pl.lift(network)
    weights, x = particles(lora, 3), torch.randn(5, 4).double()
    with pl.cached_trunk(lora), lora.bind(weights) as net:
        for _ in range(2):
            with pytest.raises(ValueError, match=match):
                net(x)
    # Without a cache such networks run as they are.
    expected = loop(lora, weights, lambda net: net(x))
    with lora.bind(weights) as net:
        assert_close(net(x), torch.stack(expected), rtol=0, atol=1e-12)


class Inside(nn.Module):
    """A stack whose input is inside of something else."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = Stack()

    def forward(self, given: Any) -> Tensor:
        x = given["x"] if isinstance(given, dict) else given[0]
        output: Tensor = self.stack(x)
        return output


@pytest.mark.untrained
@pytest.mark.parametrize("wrap", [lambda x: {"x": x}, lambda x: [x], lambda x: (x,)])
def test_inputs_without_rows_of_their_own_run_without_a_cache(
    wrap: Callable[[Tensor], Any],
) -> None:
    layer = ["stack.layers.2.linear"]
    lora = pl.lift(adapted(Inside().double(), target_modules=layer))

    def model(given: Any, labels: Tensor | None = None) -> None:
        logits = lora()(given)
        with pyro.plate("data", 5, subsample=torch.arange(5)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    x, labels = torch.randn(5, 4).double(), torch.arange(5) % 4
    batches: Any = [{"given": wrap(x), "labels": labels}]
    weights = particles(lora, 9)  # more than go through the network at once
    expected = torch.stack(loop(lora, weights, lambda net: net(wrap(x))))
    with pl.cached_trunk(lora), lora.bind(lora.weights()) as net:
        assert_close(net(wrap(x)), lora.network(wrap(x)), rtol=0, atol=1e-12)
    members = [{s: v[k] for s, v in weights.items()} for k in range(9)]
    found = pl.predict(pl.ensemble(lora, members), batches, model=model)
    assert_close(found.probs, expected.softmax(-1).mean(0), rtol=0, atol=1e-8)
    q = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter()).laplace_approximation(
        batches
    )
    two = pl.predict(pl.MixturePosterior([q, q]), batches)
    assert_close(two.probs, pl.predict(q, batches).probs, rtol=0, atol=1e-8)
    losses = []
    for size in (None, 1):
        svgd = pl.SVGD(
            model,
            kernels.NoRepulsion(),
            SGD({"lr": 0.0}),
            3,
            init_loc_fn=lora.init_to({s: v[:3] for s, v in weights.items()}),
            chunk_size=size,
        )
        losses.append(svgd.step(**batches[0]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_altered_files_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    rows = torch.randn(3, 2, 4).to(dtype)
    keys = [bytes([i]) for i in range(3)]
    cache = TrunkCache(0, tmp_path)
    cache.put(keys, rows)
    (file,) = tmp_path.iterdir()
    intact = file.read_bytes()
    damaged = [intact[:n] for n in range(0, len(intact), 7)]
    for i in range(len(intact)):
        flipped = bytearray(intact)
        flipped[i] ^= 1 << (i % 8)
        damaged.append(bytes(flipped))
    refusals = []
    for content in damaged:
        file.write_bytes(content)
        try:
            cached = cache.get(keys)
        except ValueError as error:
            refusals.append(str(error))
            continue
        assert cached is not None
        assert torch.equal(cached, rows)
    assert len(refusals) > 0.9 * len(damaged)
    assert all(str(file) in refusal for refusal in refusals)
    file.unlink()
    with pytest.raises(ValueError, match=r"0\.safetensors, which the trunk's cache"):
        cache.get(keys)
    file.write_bytes(intact)
    again = cache.get(keys)
    assert again is not None
    assert torch.equal(again, rows)


def laplace(lora: pl.LiftedNetwork, batches: list[dict[str, Tensor]]) -> Any:
    pyro.clear_param_store()
    guide = pl.AutoLaplace(
        pl.models.classification(lora, 5 * len(batches)),
        init_loc_fn=lora.init_to_adapter(jitter=0.3),
    )
    return guide.laplace_approximation(batches)


def predicted(posterior: Any, batches: Any, **options: Any) -> Tensor:
    torch.manual_seed(0)
    return pl.predict(posterior, batches, **options).log_probs


def moved(lora: pl.LiftedNetwork, batches: Any) -> dict[str, Tensor]:
    pyro.clear_param_store()
    svgd = pl.SVGD(
        pl.models.classification(lora, 5 * len(batches)),
        kernels.RBF(space="function"),
        SGD({"lr": 0.01}),
        4,
        init_loc_fn=lora.init_to(particles(lora, 4)),
        chunk_size=2,
    )
    svgd.run(batches, num_epochs=1, progress_bar=False)
    return svgd.get_named_particles()


BY_THE_LIBRARY: dict[str, Callable[..., Any]] = {
    # Nine draws are two runs, and the mode's is a third.
    "draws": lambda lora, q, batches: predicted(
        q, batches, method="sample", num_samples=9
    ),
    "a mixture": lambda lora, q, batches: predicted(
        pl.MixturePosterior([q, q]), batches
    ),
    "a tree": lambda lora, q, batches: torch.as_tensor(
        pl.to_datatree(
            pl.ParticlePosterior(particles(lora, 9), (lora,), q.model, "y"),
            batches=batches,
        )["log_likelihood"]["y"].data
    ),
    # Outputs of all particles first, two runs, and two more with gradients.
    "SVGD": lambda lora, q, batches: moved(lora, batches),
}


@pytest.mark.untrained
@pytest.mark.parametrize("what", BY_THE_LIBRARY)
@pytest.mark.few(2)
def test_a_batch_that_is_run_again_skips_the_trunk(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = bert_on_top()
    lora = pl.lift(network)
    batches = [batch(num_labels=3) for _ in range(4)]
    q = laplace(lora, batches)

    def run(number: int) -> Any:
        torch.manual_seed(1)
        return BY_THE_LIBRARY[what](lora, q, batches[:number])

    with monkeypatch.context() as patch:
        patch.setattr(lora.trunk, "layers", [])  # each call runs all layers
        expected = run(4)
    run(4)  # the first call of a form is watched
    passes = []
    for number in (3, 4):
        with trunk_rows(network) as seen:
            found = run(number)
        passes.append(len(seen))
    assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert passes[1] - passes[0] == 2 * 1  # two layers, once


@pytest.mark.untrained
@pytest.mark.parametrize("what", ["new inputs", "written into", "weights", "embedded"])
def test_a_batch_that_changes_from_run_to_run_is_not_taken_for_the_same(
    what: str,
) -> None:
    network = bert_on_top()
    lora = pl.lift(network)
    batches = [batch(num_labels=3)]
    one = laplace(lora, batches)
    embeddings = network.get_input_embeddings()
    seen: list[Tensor] = []

    def model(input_ids: Any, attention_mask: Any, labels: Any = None) -> None:
        """Each run has another token in its first place."""
        net, number = lora(), len(seen) + 1
        given = {"input_ids": input_ids}
        if what == "new inputs":
            given["input_ids"] = input_ids.clone()
            given["input_ids"][:, 0] = number
        elif what == "written into":
            input_ids[:, 0] = number
        elif what == "weights":
            embeddings.weight.mul_(1.1)
        else:
            given = {"inputs_embeds": embeddings(input_ids) * number}
        with pyro.plate("data", 5):
            logits = net(**given, attention_mask=attention_mask).logits
            seen.append(logits.detach())
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    def run() -> list[Tensor]:
        seen.clear()
        texts = [{name: x.clone() for name, x in b.items()} for b in batches]
        start = embeddings.weight.detach().clone()
        predicted(one, texts, model=model, method="sample", num_samples=9)
        embeddings.weight.data.copy_(start)
        return list(seen)

    run()  # also sees that the model keeps draws apart
    found = run()
    lora.trunk.layers = []
    expected = run()
    assert len(found) == len(expected) > 2
    assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("settings", [{"gives_two": True}, {"last_first": True}])
def test_trunks_of_other_forms_run_each_time_and_silently(
    settings: dict[str, bool],
) -> None:
    network = adapted(Stack(**settings).double(), target_modules=["layers.2.linear"])
    lora = pl.lift(network)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        net = lora()
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=net(x)), obs=y)

    batches = [
        {"x": torch.randn(5, 4).double(), "y": torch.arange(5) % 4} for _ in range(2)
    ]
    posterior = pl.ParticlePosterior(particles(lora, 9), (lora,), model, "y")
    found = predicted(posterior, batches)
    lora.trunk.layers = []
    assert_close(found, predicted(posterior, batches), rtol=1e-10, atol=1e-12)
    assert lora.trunk.cache is None


class Dependent(nn.Module):
    """Layers in which each datum reads the others of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(3)])
        self.late = nn.Linear(4, 4)  # runs first, registered last

    def forward(self, x: Tensor, shift: Any = None) -> Tensor:
        x = self.late(x) if shift is None else x + torch.as_tensor(shift)
        x = x + x.mean(0)
        for layer in self.layers:
            x = layer(x)
        return x


def test_what_a_batch_is_known_by() -> None:
    network = adapted(Dependent().double(), target_modules=["layers.2.linear"])
    lora = pl.lift(network)
    leaves = {s: w[0].requires_grad_() for s, w in particles(lora, 1).items()}
    x = torch.randn(8, 4, dtype=torch.float64)
    shift = np.zeros((2000, 4))
    moved = shift.copy()
    moved[1000] = 3.0  # what is printed of it is the same
    assert repr(shift) == repr(moved)

    def run() -> list[Tensor]:
        found = []
        with lora.bind(leaves) as net:
            for rows in ([0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 4, 5], [3, 2, 1, 0]):
                found.append(net(x[rows]))
            long = x[:1].expand(2000, 4)
            found += [net(long, shift=shift), net(long, shift=moved)]
            with torch.no_grad():
                network.base_model.model.late.weight.mul_(1.5)
            found.append(net(x[:4]))
            with torch.no_grad():
                network.base_model.model.late.weight.div_(1.5)
        return found

    expected = run()
    with pl.cached_trunk(lora):
        for _ in range(2):
            assert_close(run(), expected, rtol=1e-10, atol=1e-12)


class Remembers(Layer):
    def __init__(self, gives_length: bool) -> None:
        super().__init__()
        self.gives_length = gives_length

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        if not self.gives_length:
            self.seen = y.mean(1, keepdim=True)
        return y, y.shape[1] if self.gives_length else None


@pytest.mark.parametrize("reads", [False, True])  # else who calls the network may
@pytest.mark.parametrize("gives_length", [False, True])
@pytest.mark.parametrize("num", [1, 3])
def test_what_layers_leave_elsewhere_is_no_trunks(
    reads: bool, gives_length: bool, num: int
) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            first = [Remembers(gives_length), Remembers(gives_length), Layer()]
            self.layers = nn.ModuleList(first)

        def forward(self, x: Tensor) -> Tensor:
            y, length = self.layers[0](x)
            y, length = self.layers[1](y)
            y = self.layers[2](y)
            if not reads:
                return y
            return y / length if gives_length else y + self.layers[0].seen

    network = adapted(Reads().double(), target_modules=["layers.2.linear"])
    lora = pl.lift(network)
    weights, x = particles(lora, num), torch.randn(5, 4, dtype=torch.float64)
    expected = loop(lora, weights, lambda net: net(x))
    with lora.bind(weights) as net:
        assert_close(net(x), torch.stack(expected), rtol=0, atol=1e-12)
    weights = {s: w.requires_grad_() for s, w in weights.items()}
    with pl.cached_trunk(lora), lora.bind(weights) as net:
        with pytest.raises(ValueError, match="trunk can't be cached"):
            net(x)


class Either(Layer):
    def forward(self, x: Tensor, in_tuple: bool) -> Any:
        y = super().forward(x)
        return (y, None) if in_tuple else y


def test_layers_may_return_tuples_in_calls_of_one_form_alone() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Either(), Either(), Either()])

        def forward(self, x: Tensor, in_tuple: bool) -> Tensor:
            for layer in self.layers:
                x = layer(x, in_tuple)[0] if in_tuple else layer(x, in_tuple)
            return x

    network = adapted(Reads().double(), target_modules=["layers.2.linear"])
    lora = pl.lift(network)
    weights, x = particles(lora, 3), torch.randn(5, 4, dtype=torch.float64)
    expected = torch.stack(loop(lora, weights, lambda net: net(x, in_tuple=False)))
    leaves = {s: w.clone().requires_grad_() for s, w in weights.items()}
    with pl.cached_trunk(lora), lora.bind(leaves) as net:
        for in_tuple in (True, False, True, False):
            assert_close(net(x, in_tuple=in_tuple), expected, rtol=0, atol=1e-12)
