"""Ctrl-C at any line, or any instruction, leaves the network as it was."""

import contextlib
import dis
import gc
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pyro
import pytest
import torch
from pyro.optim import SGD
from pyro.poutine import indep_messenger, messenger, subsample_messenger
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK
from torch import Tensor
from torch._dynamo import eval_frame
from torch.autograd import grad_mode
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _contextlib
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import pyro_lora as pl
from pyro_lora.ground.interrupts import leaving_no_trace, undone
from pyro_lora.ground.unfinished import locked
from pyro_lora.lifting.binding import Binding, undo_interrupted
from pyro_lora.lifting.slots import Slot
from tests import networks
from tests.predict import language, models

PACKAGE = str(Path(pl.__file__).parent)
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
# Where others' blocks begin and end.
CONTEXTS = {
    module.__file__
    for module in (
        contextlib,
        grad_mode,
        _contextlib,
        messenger,
        indep_messenger,
        subsample_messenger,
    )
}
# Here the interrupt may come anywhere, not only at the beginning of a line.
EXITS = ("interrupts.py", "binding.py")
# But here it can't: the interpreter looks for signals as it calls and jumps only. What
# a ``return`` in a ``try`` gives back has left that ``try``; and a ``with`` of a lock,
# all that ``wrapper`` is, has called what releases it before a signal is looked for.
RETURNS = {dis.opmap.get("RETURN_VALUE"), dis.opmap.get("RETURN_CONST")}
OF_LOCK = "wrapper"
Place = tuple[str, int, int, int]  # file, line, instruction (-1: any), visit


class Interrupts:
    """Runs code, and interrupts it at one place of the package, or of ``CONTEXTS``.

    Args:
        place: Where; None only records the places.
        instructions: Whether the places are instructions, in the files of ``EXITS``
            alone, or lines.
        files: The names of the files that count; none are all of the package's.
    """

    def __init__(
        self, place: Place | None, instructions: bool = False, files: Any = ()
    ) -> None:
        self.place, self.instructions, self.files = place, instructions, files
        self.visits = Counter[tuple[str, int, int]]()
        self.is_done = False

    def __enter__(self) -> "Interrupts":
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _called(self, frame: FrameType, event: str, _: Any) -> Any:
        file = frame.f_code.co_filename
        ours = file.startswith(PACKAGE) or file in CONTEXTS
        if not ours or (self.files and not file.endswith(tuple(self.files))):
            return None
        frame.f_trace_opcodes = self.instructions
        return self._at

    def _at(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        returns = self.instructions and code.co_code[frame.f_lasti] in RETURNS
        if returns or code.co_name == OF_LOCK:
            return self._at
        if event == ("opcode" if self.instructions else "line"):
            at = (
                frame.f_code.co_filename,
                frame.f_lineno,
                frame.f_lasti if self.instructions else -1,
            )
            self.visits[at] += 1
            if (*at, self.visits[at]) == self.place and not self.is_done:
                self.is_done = True
                raise KeyboardInterrupt
        return self._at


@dataclass
class State:
    """All of a network, and of the libraries below, that an interrupt might change."""

    lora: pl.LiftedNetwork
    batch: dict[str, Tensor]
    folder: Path | None = None  # that files are written to

    def __post_init__(self) -> None:
        self.parts = self.look()
        self.values = self.look_at_values()
        self.outputs = self.run(self.lora.network)

    def run(self, network: Any) -> Tensor:
        with torch.no_grad():
            logits: Tensor = network(**self.batch).logits
        return logits

    def look(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path, module in self.lora.network.named_modules():
            found[path] = (
                module.training,
                {name: id(x) for name, x in module._parameters.items()},
                [x is None or x.requires_grad for x in module._parameters.values()],
                {name: id(x) for name, x in module._buffers.items()},
                list(module._forward_hooks) + list(module._forward_pre_hooks),
                "forward" in vars(module),
                isinstance(module, Slot) and module.bound,
            )
        found["bound"] = list(self.lora._host.bindings.active)
        found["cache"] = self.lora.trunk.cache
        found["libraries"] = (
            list(_PYRO_STACK),
            list(_DIM_ALLOCATOR._stack),
            pyro.settings.get(),
            dict(pyro.get_param_store()),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            eval_frame._stance,
            _get_current_dispatch_mode_stack(),
            _get_current_function_mode_stack(),
        )
        if self.folder is not None:
            found["unfinished"] = list(self.folder.rglob("*.pyro_lora.tmp"))
            with locked(self.folder, 0) as found["is free for other writers"]:
                pass
        return found

    def look_at_values(self) -> dict[str, Tensor]:
        network = self.lora.network
        named = [*network.named_parameters(), *network.named_buffers()]
        return {name: x.detach().clone() for name, x in named}

    def assert_unchanged(self) -> None:
        assert self.look() == self.parts
        now = self.look_at_values()
        assert all(torch.equal(now[name], x) for name, x in self.values.items())
        assert torch.equal(self.run(self.lora.network), self.outputs)
        with self.lora.bind(self.lora.weights()) as net:
            assert torch.allclose(self.run(net), self.outputs, rtol=0, atol=1e-12)


Action = Callable[[], object]
Case = Callable[[Path], tuple[State, Action]]


def of_classifier(act: Callable[[Any, Any, Any, Path], object]) -> Case:
    def case(folder: Path) -> tuple[State, Action]:
        network = networks.bert(num_layers=1, hidden_size=16, dropout=0.1)
        lora, model = models.classifier(network=network.eval())
        next(iter(network.modules())).training = True  # a mode of its own
        batches = [networks.batch(6, 5), networks.batch(4, 5)]
        state = State(lora, networks.inputs(batches[0]), folder)

        def action() -> None:
            lora._host.checked.clear()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                act(lora, model, batches, folder)

        return state, action

    return case


def call(lora: Any, model: Any, batches: Any, folder: Path) -> None:
    for weights in (lora.weights(), models.jittered(lora, 2)):
        with lora.bind(weights) as net:
            net(**networks.inputs(batches[0]))


def laplace(lora: Any, model: Any, batches: Any, folder: Path) -> Any:
    return models.laplace(lora, model, batches)


def last_layer(lora: Any, model: Any, batches: Any, folder: Path) -> Any:
    start = lora.init_to_adapter()
    guide = pl.AutoLaplace(model, init_loc_fn=start, sites="last_layer")
    return guide.laplace_approximation(batches)


def by_draws(lora: Any, model: Any, batches: Any, folder: Path) -> None:
    pl.predict(models.particles(lora, model, 2), batches, model=model, method="sample")


def dropout(lora: Any, model: Any, batches: Any, folder: Path) -> None:
    pl.predict(pl.mc_dropout(lora), batches[:1], model=model, num_samples=2)


def svgd(lora: Any, model: Any, batches: Any, folder: Path) -> None:
    start = lora.init_to_adapter(jitter=0.1)
    engine = pl.SVGD(
        model, pl.kernels.RBF(), SGD({"lr": 0.1}), num_particles=2, init_loc_fn=start
    )
    engine.run(batches[:1], num_epochs=1, progress_bar=False)


def values(lora: Any, model: Any, batches: Any, folder: Path) -> None:
    lora.load(lora.weights())
    particles = models.jittered(lora, 2)
    pl.effective_num_predictions(model, particles, batches[:1])
    pl.kernelized_stein_discrepancy(model, particles, batches)


def fresh(lora: Any, model: Any, batches: Any, folder: Path) -> None:
    site = next(iter(lora.sites))
    lora.init_to_fresh()({"name": site})


def export(lora: Any, model: Any, batches: Any, folder: Path) -> None:
    target = folder / f"{len(list(folder.iterdir()))}"
    pl.export_adapters(models.particles(lora, model, 1), target, 1)


def read(lora: Any, model: Any, batches: Any, folder: Path) -> None:
    if not (folder / "read").exists():
        pl.export_adapters(models.particles(lora, model, 1), folder / "read", 1)
    pl.ensemble(lora, [folder / "read" / "draw_000"])


def linearized(lora: Any, model: Any, batches: Any, folder: Path) -> None:
    if not (folder / "laplace").exists():
        pl.save(laplace(lora, model, batches, folder), folder / "laplace")
    posterior = pl.load(folder / "laplace", lora, model=model)
    pl.predict(posterior, batches[:1], model=model, method="linearized")


def tree(lora: Any, model: Any, batches: Any, folder: Path) -> None:
    pl.to_datatree(models.particles(lora, model, 2), batches=batches)


def verdicts(lora: Any, model: Any, batches: Any, folder: Path) -> None:
    pl.diagnose(models.particles(lora, model, 2), batches, model=model)


def of_language_model(folder: Path) -> tuple[State, Action]:
    lora = pl.lift(networks.llama(None, num_layers=1).eval())
    prompts = language.prompts()
    state = State(lora, prompts)

    def action() -> None:
        particles = language.particles(lora, 2)
        mask = prompts["attention_mask"]
        pl.generate(
            particles,
            prompts["input_ids"],
            lora=lora,
            attention_mask=mask,
            max_new_tokens=2,
            pad_token_id=0,
        )

    return state, action


def of_trunk(folder: Path) -> tuple[State, Action]:
    from tests.lifting.test_trunk import bert_on_top

    lora = pl.lift(bert_on_top().eval())
    texts = networks.inputs(networks.batch())
    state = State(lora, texts, folder)

    def action() -> None:
        with (
            pl.cached_trunk(lora, folder=folder),
            lora.bind(models.jittered(lora, 2)) as net,
        ):
            net(**texts)
            net(**texts)

    return state, action


def of_checkpointing(folder: Path) -> tuple[State, Action]:
    network = networks.bert(num_layers=1)
    lora = pl.lift(network)
    settings = {"use_reentrant": False, "context_fn": lora.context_fn}
    network.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    network.train()
    texts = networks.inputs(networks.batch())
    state = State(lora, texts)

    def action() -> None:
        weights = {s: x.requires_grad_() for s, x in models.jittered(lora, 2).items()}
        with lora.bind(weights) as net:
            loss = net(**texts).logits.sum()
        loss.backward()

    return state, action


CASES: dict[str, Case] = {
    **{
        act.__name__: of_classifier(act)
        for act in (
            call,
            laplace,
            last_layer,
            by_draws,
            dropout,
            svgd,
            values,
            fresh,
            export,
            read,
            linearized,
            tree,
            verdicts,
        )
    },
    "generate": of_language_model,
    "trunk": of_trunk,
    "checkpointing": of_checkpointing,
}


def places(action: Action, instructions: bool, files: Any) -> list[Place]:
    """Every line (or instruction) that runs, at its first visit and its last."""
    action()  # once before, for what is found out only once
    with Interrupts(None, instructions, files) as found:
        action()
    return [
        (*at, visit)
        for at, count in found.visits.items()
        for visit in sorted({1, count})
    ]


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """The same random numbers, and so the same lines, in every run."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def assert_whole_after_interrupts(
    case: Case,
    folder: Path,
    num: int | None,
    instructions: bool = False,
    files: Any = (),
) -> None:
    """Interrupt at some places, or all, and look at the network each time."""
    state, action = case(folder)
    with seeded():
        found = places(action, instructions, files)
    state.assert_unchanged()
    if num is not None and num < len(found):
        found = random.Random(0).sample(found, num)
    interrupted = 0
    for place in found:
        error: KeyboardInterrupt | None = None
        with seeded(), Interrupts(place, instructions, files):
            try:
                action()
            except KeyboardInterrupt as raised:
                error = raised
        interrupted += error is not None
        if place[0] == contextlib.__file__:
            error = None  # whose frames hold a block open as long as they are known
            if state.look() != state.parts:
                gc.collect()
        try:
            state.assert_unchanged()
        except BaseException as wrong:
            raise AssertionError(f"interrupted at {place}") from wrong
        del error
    assert interrupted > 0.9 * len(found)  # a few places aren't reached each time


@pytest.mark.parametrize("name", CASES)
def test_interrupted_at_some_lines(name: str, tmp_path: Path) -> None:
    assert_whole_after_interrupts(CASES[name], tmp_path, num=6)


@pytest.mark.parametrize("name", ["call", "checkpointing"])
def test_interrupted_at_some_instructions_of_the_exits(
    name: str, tmp_path: Path
) -> None:
    assert_whole_after_interrupts(
        CASES[name], tmp_path, num=30, instructions=True, files=EXITS
    )


@pytest.mark.parametrize("name", ["laplace", "export", "trunk"])
def test_interrupted_at_some_lines_of_the_exits(name: str, tmp_path: Path) -> None:
    files = ("interrupts.py", "unfinished.py")
    assert_whole_after_interrupts(CASES[name], tmp_path, num=30, files=files)


# Between open() and its block a file is the garbage collector's to close.
UNCLOSED = pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning",
    "ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning",
)


@pytest.mark.parametrize("name", ["call", "fresh", "read"])
def test_interrupted_where_blocks_of_others_begin_and_end(
    name: str, tmp_path: Path
) -> None:
    assert_whole_after_interrupts(CASES[name], tmp_path, num=None, files=CONTEXTS)


@UNCLOSED
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_interrupted_at_every_line(name: str, tmp_path: Path) -> None:
    assert_whole_after_interrupts(CASES[name], tmp_path, num=None)


@UNCLOSED
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_interrupted_at_every_instruction_of_the_exits(
    name: str, tmp_path: Path
) -> None:
    assert_whole_after_interrupts(
        CASES[name], tmp_path, num=None, instructions=True, files=EXITS
    )


def test_a_plate_that_an_interrupt_left_open_is_closed() -> None:
    @leaving_no_trace
    def interrupted() -> None:
        pyro.plate("data", 3).__enter__()  # and no exit
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pyro.plate("data", 3) as rows:  # which would be one too many
        assert len(rows) == 3


def test_what_an_interrupted_call_left_bound_ends_at_the_next_use() -> None:
    lora = pl.lift(networks.bert(num_layers=1))
    state = State(lora, networks.inputs(networks.batch()))
    wrong = models.draw(models.jittered(lora, 1), 0)
    values = {
        p: value
        for site, members in lora.parameters.items()
        for p, value in zip(members, wrong[site], strict=True)
    }

    def leave_bound() -> Any:
        # As where the interrupt comes between the context's entry and the block.
        context = Binding(lora._host.bindings, values).bound()
        context.__enter__()
        assert not torch.equal(state.run(lora.network), state.outputs)
        return context

    kept = [leave_bound()]
    with lora.bind(lora.weights()):
        pass
    state.assert_unchanged()
    kept.append(leave_bound())
    state.run(lora())
    state.assert_unchanged()
    kept.append(leave_bound())
    undo_interrupted(lora.network)  # as lift does
    state.assert_unchanged()
    with lora.bind(wrong) as net:
        expected = state.run(net)
        kept.clear()  # as the traceback is gone at last: nothing else is undone
        assert torch.equal(state.run(net), expected)
    state.assert_unchanged()


def test_lifting_ends_what_an_interrupted_call_left_bound() -> None:
    network, texts = networks.bert(num_layers=1), networks.inputs(networks.batch())
    lora = pl.lift(network)
    state = State(lora, texts)
    zeros = {
        p: torch.zeros_like(p.parameter) for ps in lora.parameters.values() for p in ps
    }
    context = Binding(lora._host.bindings, zeros).bound()
    context.__enter__()
    del lora, state.lora
    gc.collect()
    lifted = pl.lift(network)
    assert torch.equal(state.run(network), state.outputs)
    assert not lifted._host.bindings.active


def test_what_is_put_back_is_put_back_after_a_first_interrupt() -> None:
    done = []

    def undo() -> None:
        done.append(len(done))
        if len(done) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), undone(undo):
        pass
    assert done == [0, 1]


def test_loading_is_all_or_nothing() -> None:
    lora = pl.lift(networks.bert(num_layers=1))
    before, new = lora.weights(), models.draw(models.jittered(lora, 1), 0)
    with Interrupts(None, files=["lifted_network.py"]) as found:
        lora.load(new)
    lora.load(before)
    seen = set()
    for at, count in found.visits.items():
        for visit in range(1, count + 1):
            with (
                contextlib.suppress(KeyboardInterrupt),
                Interrupts((*at, visit), files=["lifted_network.py"]),
            ):
                lora.load(new)
            now = lora.weights()
            (which,) = (
                i
                for i, weights in enumerate((before, new))
                if all(torch.equal(now[site], x) for site, x in weights.items())
            )
            seen.add(which)
            lora.load(before)
    assert seen == {0, 1}


def test_what_is_undone_is_undone_once() -> None:
    calls: list[int] = []
    with undone(lambda: calls.append(1)):
        pass
    assert calls == [1]
    with pytest.raises(ValueError, match="inside"), undone(lambda: calls.append(2)):
        raise ValueError("inside")
    assert calls == [1, 2]
