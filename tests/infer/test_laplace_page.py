"""The page on Laplace approximations runs as it stands, after the quickstart."""

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def code(page: str) -> str:
    text = (DOCS / page).read_text(encoding="utf-8")
    return "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))


# A page that trains for seconds only.
@pytest.mark.filterwarnings("ignore:The weights aren't a mode")
def test_the_page_runs() -> None:
    names: dict[str, Any] = {}
    exec(code("quickstart.md"), names)
    exec(code("laplace.md"), names)
    assert names["prediction"].probs.shape == (200, 2)
    assert names["joint"].covariance_matrix.shape == (200, 2, 200, 2)
    assert names["by_evidence"].log_evidence() >= names["posterior"].log_evidence()
    assert names["conditional"].obs_site == "y"
