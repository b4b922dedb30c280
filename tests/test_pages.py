"""Every page of the docs with code runs as it stands."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pyro
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    PreTrainedTokenizerFast,
)

from tests.pages import blocks, cells, names_after


@pytest.fixture(scope="module")
def after_quickstart() -> tuple[dict[str, Any], Any]:
    """Its names, and its parameters: most pages go on from there."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    names = names_after("quickstart")
    return names, pyro.get_param_store().get_state()


@pytest.fixture
def quickstart(after_quickstart: tuple[dict[str, Any], Any]) -> dict[str, Any]:
    names, parameters = after_quickstart
    pyro.get_param_store().set_state(parameters)
    return names


def test_quickstart(quickstart: dict[str, Any]) -> None:
    assert quickstart["prediction"].probs.shape == (64, 2)


def save_adapter(folder: Path) -> None:
    """What a training leaves behind: a base, and an adapter with its tokenizer."""
    words = ["[PAD]", "[UNK]", "good", "bad", "film", "song"]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    base = AutoModelForSequenceClassification.from_config(
        BertConfig(
            vocab_size=len(words),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            pad_token_id=0,
        )
    )
    base.save_pretrained(folder / "base")
    adapter = bert_adapter(folder / "base")
    adapter.save_pretrained(folder / "my_adapter")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    )
    fast.save_pretrained(folder / "base")
    fast.save_pretrained(folder / "my_adapter")


def bert_adapter(base: Path) -> PeftModel:
    """LoRA on a saved base; PEFT writes the base's folder into the adapter's."""
    network = AutoModelForSequenceClassification.from_pretrained(base)
    return get_peft_model(
        network, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    )


# An adapter that nobody has trained.
@pytest.mark.untrained
@pytest.mark.filterwarnings("ignore:The weights aren't a mode")
def test_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_adapter(tmp_path)
    monkeypatch.chdir(tmp_path)
    texts = [f"{how} {what}" for how in ("good", "bad") for what in ("film", "song")]
    names: dict[str, Any] = {
        "train_texts": 4 * texts,
        "train_labels": 4 * [1, 1, 0, 0],
        "new_texts": [*texts, "good"],
        "new_labels": [1, 1, 0, 0, 1],
    }
    exec("\n".join(blocks("docs/adapter.md")), names)
    assert names["prediction"].to_pandas().shape[0] == 5
    assert "p_positive" in names["prediction"].to_pandas()
    assert "after" in capsys.readouterr().out
    assert names["again"].log_evidence() == pytest.approx(0, abs=100)


# Eight texts, and a base that reads few of their words.
@pytest.mark.untrained
@pytest.mark.filterwarnings("ignore:The weights aren't a mode")
def test_from_texts_to_a_posterior(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_adapter(tmp_path)
    monkeypatch.chdir(tmp_path)
    hub = Path("sentence-transformers")  # a folder stands for a name on the hub
    hub.mkdir()
    Path("base").rename(hub / "all-MiniLM-L6-v2")
    whole, *_ = blocks("docs/training.md")
    names: dict[str, Any] = {}
    exec(whole.replace("report_to", "use_cpu=True, report_to"), names)
    assert names["posterior"].gaussian.is_refined
    assert "p_positive" in capsys.readouterr().out
    assert Path("my_posterior", "posterior").is_dir()


# Pages that train for a step.
@pytest.mark.untrained
def test_pyro_and_extending(quickstart: dict[str, Any]) -> None:
    names = names_after("extending", names_after("pyro", quickstart))
    assert names["draws"]["y"].shape == (8, 16)
    assert names["isotropic"].log_evidence() > names["posterior"].log_evidence() - 100
    assert names["around"].log_prob(names["around"].sample(3)).shape == (3,)


# A page that trains for seconds only.
@pytest.mark.untrained
@pytest.mark.filterwarnings("ignore:The best prior precision")
def test_laplace(quickstart: dict[str, Any]) -> None:
    names = names_after("laplace", quickstart)
    assert names["prediction"].probs.shape == (200, 2)
    assert names["joint"].covariance_matrix.shape == (200, 2, 200, 2)
    assert names["by_evidence"].log_evidence() >= names["posterior"].log_evidence()
    assert names["conditional"].obs_site == "y"


# A page that trains for seconds only.
@pytest.mark.untrained
@pytest.mark.filterwarnings("ignore:The weights aren't a mode")
def test_linearized(
    quickstart: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = names_after("linearized", quickstart)
    assert names["prediction"].probs.shape == (64, 2)
    assert 0 < names["narrow"].scale <= 1
    assert len(list((tmp_path / "adapters").iterdir())) >= 8


# A page that trains for seconds only.
@pytest.mark.untrained
def test_svgd(quickstart: dict[str, Any]) -> None:
    names = names_after("svgd", quickstart)
    assert len(names["mixture"].components) == 4
    assert names["last"]["ratio"] > 0


# A page that trains for seconds only.
@pytest.mark.untrained
def test_methods(
    quickstart: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    names = names_after("methods", quickstart)
    assert set(names["over_a"].scale) == {
        s for s in names["lora"].sites if s[-1] == "A"
    }
    printed = capsys.readouterr().out
    assert all(x in printed for x in ("TFB", "BLoB", "subspace", "IVON", "SWAG"))


def test_prediction(
    quickstart: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    names = names_after("prediction", quickstart)
    assert names["table"].shape[0] == 200
    assert len(names["rows"]) == 8
    assert "Laplace + temperature" in capsys.readouterr().out
    assert names["rated"].probs.shape == (64, 4)
    assert len(names["chosen"].indices) == 10


# A page of trees and figures, whose parts the tests of export look at.
# Few draws; and versions of ArviZ and xarray that warn of one another.
@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto")
@pytest.mark.filterwarnings("ignore:In a future version of xarray:FutureWarning")
@pytest.mark.slow
def test_arviz(quickstart: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    plt.close("all")  # those of other pages
    names = names_after("arviz", quickstart)
    assert len(names["svgd_tree"]["posterior"].draw) == 4
    assert len(names["chain_tree"]["posterior"].draw) == 10
    assert names["again"].identical(names["tree"])
    assert set(names["large"].children) == set(names["tree"].children)
    printed = capsys.readouterr().out
    assert "Is the mode stationary?" in printed
    assert "AutoNormal" in printed
    assert len(plt.get_fignums()) == 8
    names["again"].close()
    names["large"].close()
    plt.close("all")


def test_files(
    quickstart: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = names_after("files", quickstart)
    assert not any((tmp_path / "unfinished").iterdir())
    found = {path.name for path in tmp_path.iterdir() if any(path.iterdir())}
    expected = {"posterior", "training", "draws", "particles", "mode"}
    assert found == expected | {"my_posterior"}
    assert names["probs"].shape == (5, 2)
    assert torch.allclose(names["probs"].sum(-1), torch.ones(5))


# Four prompts are told to an adapter that nobody has trained.
@pytest.mark.filterwarnings("ignore:The weights aren't a mode")
@pytest.mark.filterwarnings("ignore:The best prior precision")
def test_text() -> None:
    names = names_after("text")
    assert len(set(names["third"])) > 1
    assert names["answers"].metrics()["accuracy"] == 1
    assert {"p_c", "p_e"} <= {*names["answers"].to_pandas()}
    assert names["mass"].shape == (4,)
    assert names["prediction"].metrics()["accuracy"] == 1


@pytest.mark.slow
@pytest.mark.untrained
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_scale() -> None:
    names = names_after("scale")
    variance = names["posterior"].variance()
    assert all(not x.any() for site, x in variance.items() if site != names["name"])
    assert torch.isfinite(names["posterior"].log_evidence())


def test_preferences() -> None:
    prediction = names_after("preferences")["prediction"]
    assert (prediction.probs[:, 1] > 0.5).all()


def shown(name: str) -> dict[str, Any]:
    """What a tutorial's code leaves."""
    names: dict[str, Any] = {}
    exec(cells(name), names)
    plt.close("all")
    return names


def tutorial(test: Callable[[], None]) -> Callable[[], None]:
    """Marks of a test of what a tutorial's text says."""
    return pytest.mark.slow(pytest.mark.untrained(test))


@tutorial
def test_step_by_step() -> None:
    names = shown("step_by_step")
    # "Every number of a Laplace approximation computed twice"
    dense, variance = names["dense"], names["variance"]
    torch.testing.assert_close(dense.gaussian.fisher, names["F"], rtol=0, atol=1e-9)
    torch.testing.assert_close(dense.log_evidence(), names["evidence"])
    assert names["difference"] < 1e-9  # of KFAC's variances
    torch.testing.assert_close(names["of_difference"], variance)


@tutorial
def test_svgd_against_an_ensemble() -> None:
    names = shown("svgd_against_an_ensemble")
    # "SVGD in function space had lost most of its overconfidence already, and here the
    # widths take back more than is due"
    sure = {name: row["overconfidence"] for name, row in names["rows"].items()}
    assert sure["SVGD, function space"] < sure["ensemble"] / 2
    assert sure["SVGD + Laplace"] < 0
    assert names["rows"]["ensemble + Laplace"]["nll"] < names["rows"]["ensemble"]["nll"]


@tutorial
def test_rank_ard() -> None:
    names = shown("rank_ard")
    # "The count is near the truth", and "under a normal prior all eight share the work"
    assert names["TRUE_RANK"] <= names["used"] <= names["TRUE_RANK"] + 1
    sizes = names["sizes"]["normal"]
    assert (sizes > 0.05 * sizes[0]).all()


@tutorial
def test_active_learning() -> None:
    names = shown("active_learning")
    # "bald's first round asks sixteen times for little more than two; batch_bald asks
    # for different texts"
    found = {name: [x[1] for x in rounds] for name, rounds in names["results"].items()}
    asked = {name: x[1] - x[0] for name, x in found.items()}
    assert asked["bald"] < 8 < asked["batch_bald"]
    assert found["batch_bald"][-1] > found["at random"][-1]


@tutorial
@pytest.mark.filterwarnings("ignore:The prior of .* has correlations")
def test_continual() -> None:
    names = shown("continual")
    # "Training on forgets some of the first task. With Monday's posterior for the prior
    # less is forgotten"; "at a tenth of it the two are as good as with all data"
    rows, first = names["rows"], "first task, nll"
    assert rows["posterior as prior"][first] < rows["trained on"][first]
    for key in (first, "second task, nll"):
        both = rows["both data sets kept"][key]
        assert names["found"][0.1][key] == pytest.approx(both, abs=0.03)


@tutorial
def test_map_of_methods() -> None:
    names = shown("map_of_methods")
    # "the same Pyro model, engines and prediction serve every method of fine-tuning";
    # "Laplace is below the mode for each method that has it"
    table, methods = names["table"], names["methods"]
    assert list(table.index) == list(methods)
    both = table.dropna()
    assert {"LoRA", "PiSSA", "head", "bottlenecks"} <= set(both.index)
    assert (both["NLL, Laplace"] < both["NLL, MAP"]).all()


@tutorial
def test_language_model() -> None:
    names = shown("language_model")
    # "The particles' epistemic entropy tells these from all others"
    assert names["doesn_t_know"] == {"told": 0, "in two cities": 0, "untold": 1}
    one = names["scores"]["one network", "total"]
    assert one["untold against two cities"] < 0.8


@tutorial
def test_reward_model() -> None:
    names = shown("reward_model")
    # "averages of five networks gain more than that"; "larger by a tenth"
    nll = {name: row["nll"] for name, row in names["metrics"].items()}
    assert nll["ensemble"] < nll["Laplace"] < nll["one network"]
    sd = names["table"]["sd"].unstack()
    assert ((sd[4] > sd[0]) & (sd[4] < 1.2 * sd[0])).all()
