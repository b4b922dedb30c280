"""Progress bars: on a terminal, off elsewhere, and as one says where one does."""

import io
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pytest

import pyro_lora as pl
from pyro_lora.ground import progress as module
from pyro_lora.ground.progress import Counted, progress
from tests.networks import batch, bert, inputs, llama

pytestmark = [
    pytest.mark.untrained,
    pytest.mark.filterwarnings("ignore:The best prior precision"),
]


class Terminal(io.StringIO):
    """What says that it is one."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], io.StringIO]:
    def replaced(is_terminal: bool) -> io.StringIO:
        file = Terminal() if is_terminal else io.StringIO()
        monkeypatch.setattr(sys, "stderr", file)
        return file

    monkeypatch.setattr(module, "_MOMENT", 0)
    return replaced


def lifted() -> tuple[pl.LiftedNetwork, Any]:
    lora = pl.lift(bert())
    return lora, pl.models.classification(lora, 5)


def laplace() -> pl.LaplacePosterior:
    lora, model = lifted()
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
    return guide.laplace_approximation([batch()], progress_bar=False)


def fit(**setting: Any) -> None:
    lora, model = lifted()
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
    guide.laplace_approximation([batch()], **setting)


def train(**setting: Any) -> None:
    lora, model = lifted()
    optim = pyro.optim.SGD({"lr": 1e-3})
    init = lora.init_to_adapter(jitter=0.1)
    engine = pl.SVGD(model, pl.kernels.RBF(), optim, 2, init_loc_fn=init)
    engine.run([batch()], num_epochs=1, **setting)


def generate(**setting: Any) -> None:
    lora = pl.lift(llama(None))
    posterior = pl.ensemble(lora, [lora.weights()])
    ids = inputs(batch())["input_ids"].clamp(min=1)
    pl.generate(posterior, ids, max_new_tokens=3, **setting)


def acquire(**setting: Any) -> None:
    kept = pl.predict(
        laplace(), [batch()], method="sample", keep_draws=True, progress_bar=False
    )
    pl.acquire(kept, 2, method="batch_bald", **setting)


def of_particles(function: Callable[..., Any], **setting: Any) -> None:
    lora, model = lifted()
    particles = pl.ensemble(lora, [lora.weights()] * 2).particles
    function(model, particles, [batch()], **setting)


FUNCTIONS: dict[str, tuple[str, Callable[..., Any]]] = {
    "fit": ("Fisher: 100%", fit),
    "SVGD": ("SVGD: 100%", train),
    "predict": ("Predict: 100%", lambda **s: pl.predict(laplace(), [batch()], **s)),
    "acquire": ("Acquire: 100%", acquire),
    "Stein": (
        "Stein discrepancy: 100%",
        partial(of_particles, pl.kernelized_stein_discrepancy),
    ),
    "Vendi": (
        "Effective predictions: 100%",
        partial(of_particles, pl.effective_num_predictions),
    ),
    "to_datatree": (
        "DataTree: 100%",
        lambda **s: pl.to_datatree(
            laplace(), [batch()], num_samples=4, chunk_size=2, **s
        ),
    ),
    "diagnose": ("Diagnose: 100%", lambda **s: pl.diagnose(laplace(), [batch()], **s)),
    "generate": ("Generate: 100%", generate),
    "optimize_prior": (
        "Prior: 100%",
        lambda **s: laplace().optimize_prior(objective="nll", batches=[batch()], **s),
    ),
    "for_sampling": ("Scale: 100%", lambda **s: laplace().for_sampling([batch()], **s)),
    "tfb": (
        "Width: 100%",
        lambda **s: pl.methods.tfb(laplace().model, [inputs(batch())], **s),
    ),
}


@pytest.mark.grid
@pytest.mark.parametrize(("words", "call"), FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_is_for_terminals(
    words: str,
    call: Callable[..., Any],
    is_terminal: bool,
    stderr: Callable[[bool], io.StringIO],
) -> None:
    for shown in (None, True, False):
        file = stderr(is_terminal)
        call(**({} if shown is None else {"progress_bar": shown}))
        expected = is_terminal if shown is None else shown
        assert (words in file.getvalue()) == expected
        assert bool(file.getvalue()) == expected


def test_what_takes_a_moment_has_no_bar(stderr: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_MOMENT", 60)
    file = stderr(True)
    assert list(progress(range(3), title="Quick", unit="step", shown=None)) == [0, 1, 2]
    assert file.getvalue() == ""


def test_passes_over_the_same_batches_add_up(stderr: Any) -> None:
    stderr(True)
    with progress(title="Passes", unit="batch", shown=True) as bar:
        batches = Counted([1, 2, 3], bar)
        assert [*batches, *batches] == [1, 2, 3, 1, 2, 3]
        assert bar.n == 6


def test_the_total_is_of_the_passes_that_have_begun(stderr: Any) -> None:
    stderr(True)
    seen = []
    with progress(title="Passes", unit="batch", shown=True) as bar:
        three, two = Counted([1, 2, 3], bar), Counted([1, 2], bar)
        next(iter(three))  # a look at the first one is no pass
        for batches in (three, two, three):
            for _ in batches:
                seen.append((bar.n, bar.total))
            seen.append((bar.n, bar.total))
    after = [(n, total) for n, total in seen if n]
    assert [total for n, total in after if n in (3, 5, 8)] == [3, 3, 5, 5, 8]
    assert seen[-1] == (8, 8)
    with progress(title="Passes", unit="batch", shown=True, total=6) as bar:
        for _ in range(2):
            for _ in Counted([1, 2, 3], bar):
                assert bar.total == 6  # where it's known
        assert bar.n == 6
    with progress(title="Passes", unit="batch", shown=True) as bar:
        list(Counted(iter([1, 2]), bar))
        list(Counted((x for x in (1, 2)), bar))  # of no known length
        assert bar.n == 4
