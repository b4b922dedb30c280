"""The page on ArviZ and pictures runs as it stands, after the quickstart."""

import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest

DOCS = Path(__file__).parents[2] / "docs"


def code(page: str) -> str:
    text = (DOCS / page).read_text(encoding="utf-8")
    return "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))


# Few draws; and versions of ArviZ and xarray that warn of one another.
@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto")
@pytest.mark.filterwarnings("ignore:In a future version of xarray:FutureWarning")
def test_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(code("quickstart.md"), names)
    exec(code("arviz.md"), names)
    assert len(names["svgd_tree"]["posterior"].draw) == 4
    assert len(names["chain_tree"]["posterior"].draw) == 10
    assert names["again"].identical(names["tree"])
    assert set(names["large"].children) == set(names["tree"].children)
    printed = capsys.readouterr().out
    assert "Is the mode stationary?" in printed
    assert "AutoNormal" in printed
    assert len(plt.get_fignums()) == 7
    names["again"].close()
    names["large"].close()
    plt.close("all")
