"""A Trainer's training ends with a posterior, the same as by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import pyro_lora as pl
from tests.networks import VOCABULARY, batch, bert, llama

pytestmark = pytest.mark.untrained
NUM_DATA = 20


def rows(number: int) -> list[dict[str, Tensor]]:
    texts = batch(number)
    texts["labels"] = (texts["input_ids"][:, 0] > VOCABULARY // 2).long()
    return [{k: v[i] for k, v in texts.items()} for i in range(number)]


class Listening(TrainerCallback):
    """What a place that the Trainer reports to gets."""

    def __init__(self) -> None:
        self.heard: dict[str, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.heard |= kwargs["logs"]


def trainer(path: Path, **options: Any) -> Trainer:
    settings = {"max_steps": 6, "learning_rate": 0.02, **options.pop("settings", {})}
    arguments = TrainingArguments(
        output_dir=str(path),
        per_device_train_batch_size=8,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    network = options.pop("network", None)
    if network is None:
        network = bert(dtype=torch.float32, lora_dropout=0.2)
    data = {"train_dataset": rows(NUM_DATA), "eval_dataset": rows(12), **options}
    return Trainer(network, arguments, **data)


def test_the_end_is_what_one_does_by_hand(tmp_path: Path) -> None:
    training, listening = trainer(tmp_path), Listening()
    callback = pl.LaplaceCallback(training, prior=pl.priors.normal(scale=2.0))
    assert "posterior=None" in repr(callback)
    training.add_callback(callback)
    training.add_callback(listening)
    assert callback.posterior is None
    training.train()

    lora = pl.lift(training.model, prior=pl.priors.normal(scale=2.0))
    model = pl.models.classification(lora, NUM_DATA)
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
    held_out: Any = training.get_test_dataloader(training.eval_dataset)
    data: Any = training.get_test_dataloader(training.train_dataset)
    expected = guide.laplace_approximation(data).optimize_prior()
    assert callback.posterior is not None
    for site, value in expected.mode().items():
        assert_close(callback.posterior.mode()[site], value)
    logged = training.state.log_history[-1]
    assert logged["laplace_log_evidence"] == pytest.approx(
        float(expected.log_evidence()), rel=1e-5
    )
    point = pl.ensemble(lora, [expected.mode()])
    for method, posterior in {"laplace": expected, "map": point}.items():
        metrics = pl.predict(posterior, held_out, model=model).metrics()
        for name in ("accuracy", "nll", "ece"):
            found = logged[f"eval_{method}_{name}"]
            assert found == pytest.approx(metrics[name], abs=1e-5)
            assert listening.heard[f"eval_{method}_{name}"] == found


def test_several_evaluation_sets_and_none(tmp_path: Path) -> None:
    several = trainer(tmp_path, eval_dataset={"a": rows(5), "b": rows(6)})
    several.add_callback(pl.LaplaceCallback(several, optimize_prior=False))
    several.train()
    assert {"eval_a_map_nll", "eval_b_laplace_ece"} <= {*several.state.log_history[-1]}
    none = trainer(tmp_path, eval_dataset=None)
    none.add_callback(pl.LaplaceCallback(none))
    none.train()
    assert "laplace_log_evidence" in none.state.log_history[-1]


def test_what_cannot_be_fitted_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"trainer must be a transformers\.Trainer"):
        pl.LaplaceCallback(bert())  # type: ignore[arg-type]
    dropping = trainer(tmp_path, settings={"dataloader_drop_last": True})
    with pytest.raises(ValueError, match="dataloader_drop_last=True and 1 processes"):
        pl.LaplaceCallback(dropping)
    training = trainer(tmp_path)
    with pytest.raises(TypeError, match="model must be a function of a lifted"):
        pl.LaplaceCallback(training, model="classification")  # type: ignore[arg-type]

    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(rows(2))

    training = trainer(tmp_path, train_dataset=Endless())
    with pytest.raises(ValueError, match="Endless, which has no length"):
        pl.LaplaceCallback(training)


@pytest.mark.parametrize("name", ["classification", "multi_label", "regression"])
def test_a_model_of_texts_is_refused_for_a_language_model(
    tmp_path: Path, name: str
) -> None:
    training = trainer(tmp_path, network=llama(None, dtype=torch.float32))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*models\.language_model"):
        pl.LaplaceCallback(training, model=getattr(pl.models, name))
    classifier = trainer(tmp_path, network=llama(2, dtype=torch.float32))
    pl.LaplaceCallback(classifier, model=getattr(pl.models, name))


@pytest.mark.filterwarnings("ignore:The weights aren't a mode")
def test_a_language_model_that_is_trained_on_texts(tmp_path: Path) -> None:
    texts = rows(NUM_DATA)
    for row in texts:
        row["labels"] = row["input_ids"]
    training = trainer(
        tmp_path,
        network=llama(None, dtype=torch.float32),
        train_dataset=texts,
        eval_dataset=texts,
    )
    model = pl.models.language_model
    training.add_callback(pl.LaplaceCallback(training, model=model, fisher="mc"))
    training.train()
    assert "eval_laplace_nll" in training.state.log_history[-1]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_error_of_the_fit_loses_no_weights(
    tmp_path: Path, kind: type[BaseException]
) -> None:
    def failing(lora: pl.LiftedNetwork, num_data: int) -> Any:
        raise kind("not today")

    training = trainer(tmp_path)
    training.add_callback(pl.LaplaceCallback(training, model=failing))
    with pytest.raises(kind, match="not today") as caught:
        training.train()
    assert str(tmp_path) in "".join(caught.value.__notes__)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    trained = get_peft_model_state_dict(training.model)
    assert saved.keys() == trained.keys()
    for name, value in trained.items():
        assert torch.equal(saved[name], value), name
