"""The page on predictions runs as it stands, after the quickstart."""

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def code(page: str) -> str:
    text = (DOCS / page).read_text(encoding="utf-8")
    return "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))


def test_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(code("quickstart.md"), names)
    exec(code("prediction.md"), names)
    assert names["table"].shape[0] == 200
    assert len(names["rows"]) == 8
    assert "Laplace + temperature" in capsys.readouterr().out
    assert len(names["chosen"].indices) == 10
