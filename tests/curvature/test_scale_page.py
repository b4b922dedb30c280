"""The page on scale runs as it stands."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


@pytest.mark.filterwarnings("ignore:The weights aren't a mode")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_the_page_runs() -> None:
    text = PAGE.read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), names)
    variance = names["posterior"].variance()
    assert all(not x.any() for site, x in variance.items() if site != names["name"])
    assert torch.isfinite(names["posterior"].log_evidence())
