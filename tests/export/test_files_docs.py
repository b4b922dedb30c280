"""The page on files runs as it stands, after the quickstart."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

DOCS = Path(__file__).parents[2] / "docs"


def code(page: str) -> str:
    text = (DOCS / page).read_text(encoding="utf-8")
    return "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code("quickstart.md"), names)
    exec(code("files.md"), names)
    assert not any((tmp_path / "unfinished").iterdir())
    found = {path.name for path in tmp_path.iterdir() if any(path.iterdir())}
    assert found == {"posterior", "training", "draws", "particles", "mode"}
    assert names["probs"].shape == (5, 2)
    assert torch.allclose(names["probs"].sum(-1), torch.ones(5))
