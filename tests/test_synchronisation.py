"""How often a program waits for a GPU, counted by operations on the CPU."""

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from peft import PeftModel
from pyro.optim import SGD, Adam
from torch import Tensor, nn

import pyro_lora as pl
from benchmarks.synchronisations import counted
from pyro_lora.ground import synchronisation
from pyro_lora.ground.synchronisation import ask, gathered, require, validated
from pyro_lora.likelihood.model_trace import trace_at
from tests.networks import batch, bert, classifier, llama

STRUCTURES = {
    "KFAC": pl.structures.KFAC(),
    "reduce": pl.structures.KFAC(reduce=True),
    "rank": pl.structures.KFAC(rank=2),
    "Diagonal": pl.structures.Diagonal(),
    "Dense": pl.structures.Dense(),
}
NETWORKS: dict[str, Callable[[], PeftModel]] = {
    "few sites": bert,
    "many layers": lambda: bert(num_layers=4),
    "a trunk": lambda: bert(num_layers=4, layers_to_transform=[3]),
    "many sites": lambda: llama(
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    ),
}


of_networks = pytest.mark.parametrize("network", NETWORKS)


def lifted(network: str) -> pl.LiftedNetwork:
    return pl.lift(NETWORKS[network]())


def texts(num_batches: int) -> list[dict[str, Tensor]]:
    return [batch(6, 7) for _ in range(num_batches)]


def waits_a_batch(function: Callable[[list[dict[str, Tensor]]], Any]) -> float:
    """How much longer a pass over two more batches waits, a batch."""
    with counted():  # under which PyTorch takes other operations
        function(texts(1))  # what is found out once
    numbers = []
    for num_batches in (2, 4):
        with counted() as counts:
            function(texts(num_batches))
        numbers.append(counts.num_waits)
    return (numbers[1] - numbers[0]) / 2


@pytest.mark.grid
@of_networks
@pytest.mark.parametrize("space", ["joint", "site", "delta", "function", None])
def test_an_svgd_step_waits_once(network: str, space: Any) -> None:
    lora = lifted(network)
    kernel = pl.kernels.RBF(space=space) if space else pl.kernels.NoRepulsion()
    svgd = pl.SVGD(
        classifier(lora),
        kernel,
        Adam({"lr": 1e-3}),
        3,
        init_loc_fn=lora.init_to_adapter(jitter=0.1),
    )
    svgd.step(**batch(6, 7))
    with counted() as counts:
        svgd.step(**batch(6, 7))
    assert counts.num_waits == 1, counts.waits


def test_a_repulsion_of_ones_own_waits_once_more() -> None:
    lora = lifted("few sites")
    svgd = pl.SVGD(
        classifier(lora),
        pl.kernels.RBF(space="function"),
        Adam({"lr": 1e-3}),
        3,
        repulsion=lambda fraction, loss: max(0.0, 1 - loss),
        init_loc_fn=lora.init_to_adapter(jitter=0.1),
    )
    svgd.step(**batch(6, 7))
    with counted() as counts:
        svgd.step(**batch(6, 7))
    assert counts.num_waits == 2, counts.waits


@pytest.mark.untrained
@pytest.mark.parametrize(
    ("network", "structure", "fisher"),
    [
        *((network, "KFAC", "exact") for network in NETWORKS),
        *(("few sites", x, "exact") for x in STRUCTURES if x != "KFAC"),
        ("few sites", "KFAC", "empirical"),
    ],
)
def test_a_batch_of_a_fit_waits_twice(
    network: str, structure: str, fisher: Any
) -> None:
    lora = lifted(network)

    def fit(batches: list[dict[str, Tensor]]) -> None:
        guide = pl.AutoLaplace(
            classifier(lora, 6 * len(batches)),
            init_loc_fn=lora.init_to_adapter(),
            structure=STRUCTURES[structure],
            fisher=fisher,
        )
        guide.laplace_approximation(batches)

    assert waits_a_batch(fit) == 2


@pytest.mark.grid
@pytest.mark.untrained
@of_networks
@pytest.mark.parametrize("method", ["linearized", "sample"])
def test_a_batch_of_predict_waits_once(network: str, method: Any) -> None:
    # Draws near the mode: of worse ones a call says so, and reads more for that.
    lora = pl.lift(NETWORKS[network](), prior=pl.priors.normal(scale=0.01))
    guide = pl.AutoLaplace(classifier(lora, 6), init_loc_fn=lora.init_to_adapter())
    posterior = guide.laplace_approximation(texts(1))

    def predict(batches: Iterable[Any]) -> None:
        pl.predict(posterior, batches, method=method, num_samples=12)

    assert waits_a_batch(predict) == 1


@pytest.mark.parametrize("space", ["joint", "function"])
def test_operations_do_not_grow_with_particles(space: Any) -> None:
    lora = lifted("few sites")

    def operations(num_particles: int) -> int:
        svgd = pl.SVGD(
            classifier(lora),
            pl.kernels.RBF(space=space),
            SGD({"lr": 1e-3}),
            num_particles,
            init_loc_fn=lora.init_to_adapter(jitter=0.1),
        )
        svgd.step(**batch(6, 7))
        with counted() as counts:
            svgd.step(**batch(6, 7))
        return counts.operations

    assert operations(2) == operations(5)


@pytest.mark.untrained
def test_operations_do_not_grow_with_draws() -> None:
    lora = lifted("few sites")
    guide = pl.AutoLaplace(classifier(lora, 6), init_loc_fn=lora.init_to_adapter())
    posterior = guide.laplace_approximation(texts(1))

    def operations(num_samples: int) -> int:
        with counted() as counts:
            pl.predict(posterior, texts(2), method="sample", num_samples=num_samples)
        return counts.operations

    operations(2)  # what is found out once
    assert operations(2) == operations(8)
    assert operations(16) < 2 * operations(8)  # two forward passes a batch


@pytest.mark.gpu
@pytest.mark.untrained
def test_on_a_gpu_nothing_else_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    transferred = synchronisation._transferred

    def allowed(tensors: Sequence[Tensor]) -> list[float]:
        torch.cuda.set_sync_debug_mode("default")
        try:
            return transferred(tensors)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    lora = pl.lift(bert(dtype=torch.float32).cuda())

    def model(input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        # Without a mask, of which the network itself asks whether it hides anything.
        logits = lora()(input_ids=input_ids).logits
        with pyro.plate("data", 12, subsample=input_ids):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    batches = [
        {name: x.cuda() for name, x in one.items() if name != "attention_mask"}
        for one in texts(2)
    ]
    svgd = pl.SVGD(
        model,
        pl.kernels.RBF(),
        SGD({"lr": 1e-3}),
        3,
        init_loc_fn=lora.init_to_adapter(jitter=0.1),
    )
    svgd.step(**batches[0])
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
    posterior = guide.laplace_approximation(batches)
    expected = pl.predict(posterior, batches)  # what is found out once, and kept
    monkeypatch.setattr(synchronisation, "_transferred", allowed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        svgd.step(**batches[1])
        found = pl.predict(posterior, batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.probs, expected.probs)


def test_the_counter_sees_what_waits() -> None:
    x, mask = torch.arange(4.0), torch.tensor([True, False, True, True])
    operations: dict[str, Callable[[], object]] = {
        "_local_scalar_dense": lambda: bool(x.sum() > 0),
        "nonzero": mask.nonzero,
        "equal": lambda: torch.equal(x, x),
        "index": lambda: x[mask],
        "tolist": x.tolist,
    }
    for name, operation in operations.items():
        with counted() as counts:
            operation()
        assert [k.split()[-1] for k in counts.waits] == [name]
    with counted() as counts:
        x.index_select(0, torch.tensor([0, 1])).where(mask[:2], 0.0).sum()
    assert counts.num_waits == 0


def test_what_is_asked_is_read_at_once() -> None:
    with gathered(), counted() as counts:
        answers = [ask(torch.tensor(x)) for x in (True, 3, 2.5, False)]
        assert counts.num_waits == 0
        assert [answer.value for answer in answers] == [1, 3, 2.5, 0]
    assert counts.num_waits == 1


def fails(text: str) -> Callable[[], Exception]:
    return lambda: ValueError(text)


def test_the_first_that_does_not_hold_is_raised_when_an_answer_is_needed() -> None:
    reached: list[str] = []

    def block() -> None:
        with gathered():
            require(torch.tensor(True), fails("first"))
            require(torch.tensor(False), fails("second"))
            require(torch.tensor(False), fails("third"))
            answer = ask(torch.tensor(1))
            reached.append("asked")
            int(answer)
            reached.append("answered")

    with pytest.raises(ValueError, match="second"):
        block()
    assert reached == ["asked"]


def test_what_is_left_is_read_at_the_end() -> None:
    with pytest.raises(ValueError, match="left"), gathered():
        require(torch.tensor(False), fails("left"))


def test_outside_of_a_block_it_is_read_at_once() -> None:
    with pytest.raises(ValueError, match="now"):
        require(torch.tensor(False), fails("now"))
    assert ask(torch.tensor(True))


def failing(holds: bool, error: BaseException) -> None:
    with gathered():
        require(torch.tensor(holds), fails("why"))
        raise error


def test_where_a_block_fails_what_was_asked_before_tells_why() -> None:
    with pytest.raises(ValueError, match="why"):
        failing(False, RuntimeError("multinomial"))
    with pytest.raises(RuntimeError, match="multinomial"):
        failing(True, RuntimeError("multinomial"))


def test_an_interrupt_is_no_reason_to_wait() -> None:
    with pytest.raises(KeyboardInterrupt):
        failing(False, KeyboardInterrupt())
    with pytest.raises(ValueError, match="now"):  # nothing is left behind
        require(torch.tensor(False), fails("now"))


def test_pytorchs_validation_is_gathered_and_says_the_same() -> None:
    def normal(scale: float) -> Tensor:
        fn = dist.Normal(torch.zeros(3), torch.full((3,), scale))
        return fn.log_prob(torch.ones(3))

    with pytest.raises(ValueError, match="Expected parameter scale") as expected:
        normal(-1.0)
    came_through: list[str] = []

    def block(function: Callable[[], object]) -> None:
        with gathered():
            function()
            came_through.append("there")

    with counted() as counts, gathered():
        assert validated(lambda: normal(1.0)).shape == (3,)
        assert counts.num_waits == 0
    assert counts.num_waits == 1
    with pytest.raises(ValueError, match="Expected parameter scale") as found:
        block(lambda: validated(lambda: normal(-1.0)))
    assert str(found.value) == str(expected.value)
    assert came_through == ["there"]


def test_what_an_invalid_distribution_breaks_says_so() -> None:
    def factored() -> object:
        return dist.MultivariateNormal(torch.zeros(2), -torch.eye(2))

    def drawn() -> object:
        return dist.Categorical(probs=torch.tensor([math.nan, 1.0])).sample()

    def read() -> object:
        dist.Normal(torch.zeros(2), torch.tensor([1.0, -1.0]))
        return {}["of a user"]

    def block(function: Callable[[], object]) -> None:
        with gathered():
            validated(function)

    for function in (factored, drawn, read):
        with pytest.raises(ValueError, match="Expected parameter") as expected:
            function()
        with pytest.raises(ValueError, match="Expected parameter") as found:
            block(function)
        assert str(found.value) == str(expected.value)


def test_other_errors_of_a_model_stay_and_it_runs_once() -> None:
    runs: list[int] = []

    def failing_model() -> None:
        runs.append(1)
        dist.Normal(0.0, 1.0)
        raise RuntimeError("of a user")

    def block() -> None:
        with gathered():
            validated(failing_model)

    with pytest.raises(RuntimeError, match="of a user"):
        block()
    assert len(runs) == 1


def test_a_model_at_weights_is_run_once_more_at_them() -> None:
    def model(x: Tensor) -> None:
        scale = pyro.sample("scale", dist.Uniform(1.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(0.0, scale - 1.5), obs=x)

    def block(scale: float) -> None:
        with gathered():
            trace_at(model, {"scale": torch.tensor(scale)}, {"x": torch.zeros(2)})

    block(1.9)
    for _ in range(8):  # a draw would have a scale above 0 every other time
        with pytest.raises(ValueError, match="Expected parameter scale"):
            block(1.1)


def test_an_interrupted_transfer_loses_no_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(tensors: Sequence[Tensor]) -> list[float]:
        raise KeyboardInterrupt

    with gathered():
        answer = ask(torch.tensor(3))
        with monkeypatch.context() as patch:
            patch.setattr(synchronisation, "_transferred", interrupted)
            with pytest.raises(KeyboardInterrupt):
                int(answer)
        assert int(answer) == 3


def test_other_threads_are_validated_as_ever() -> None:
    errors: list[Exception] = []

    def elsewhere() -> None:
        try:
            dist.Normal(0.0, -1.0)
        except ValueError as error:
            errors.append(error)

    def here() -> None:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    with gathered():
        validated(here)
    assert len(errors) == 1


class Broken(nn.Module):
    """A classifier of two inputs whose outputs are NaN where the first is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out(x)
        return logits + x[:, :1].sqrt() * 0


def broken_model() -> tuple[pl.LiftedNetwork, Callable[..., Any]]:
    lora = pl.lift(Broken())

    def model(x: Tensor, labels: Tensor | None = None) -> Any:
        logits = lora()(x)
        with pyro.plate("data", 6, subsample=x):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    return lora, model


def rows(first: float = 1.0, label: int = 0) -> dict[str, Tensor]:
    x = torch.rand(3, 2) + 0.1
    x[0, 0] = first
    return {"x": x, "labels": torch.tensor([label, 1, 0])}


@pytest.mark.untrained
@pytest.mark.parametrize(
    ("bad", "text"),
    [(rows(-1.0), "Expected parameter logits"), (rows(label=7), "observed value 7")],
)
def test_a_bad_batch_is_named_as_before(bad: dict[str, Tensor], text: str) -> None:
    lora, model = broken_model()
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
    with pytest.raises(ValueError, match=f"(?s)Batch 1.*{text}|batch 1.*{text}"):
        guide.laplace_approximation([rows(), bad])
    posterior = guide.laplace_approximation([rows(), rows()])
    with pytest.raises(ValueError, match=text):
        pl.predict(posterior, [rows(), bad])
    svgd = pl.SVGD(
        model,
        pl.kernels.RBF(space="function"),
        Adam({"lr": 0.1}),
        2,
        init_loc_fn=lora.init_to_adapter(jitter=0.1),
    )
    svgd.step(**rows())
    before = svgd.get_named_particles()
    with pytest.raises(ValueError, match="SVGD's batch 1"):
        svgd.step(**bad)
    for site, x in svgd.get_named_particles().items():
        assert torch.equal(x, before[site])
    assert len(svgd.diagnostics["loss"]) == 1
