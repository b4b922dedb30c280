"""The README's code runs as it stands there."""

import re
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest

import pyro_lora as pl
from tests.networks import batch, bert

README = (Path(__file__).parents[1] / "README.md").read_text()


def block(number: int) -> str:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)[number]


@pytest.mark.filterwarnings("ignore:The weights aren't a mode")
def test_ten_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {
        "peft_model": bert(),
        "num_data": 10,
        "train_batches": [batch(), batch()],
        "test_batches": [batch()],
    }
    exec(block(0), names)
    assert names["prediction"].probs.shape == (5, 2)
    assert "accuracy" in capsys.readouterr().out
    assert (tmp_path / "posterior.nc").is_file()
    loaded = pl.load(tmp_path / "posterior", names["lora"], model=names["model"])
    assert loaded.log_evidence() == pytest.approx(
        float(names["posterior"].log_evidence())
    )


def test_the_models_own_lines() -> None:
    lora = pl.lift(bert())
    names: dict[str, Any] = {"pyro": pyro, "dist": dist, "lora": lora, "num_data": 10}
    exec(block(1), names)
    data = batch()
    logits = (
        pyro.poutine.trace(names["model"]).get_trace(**data).nodes["y"]["fn"].logits
    )
    assert logits.shape == (5, 2)
