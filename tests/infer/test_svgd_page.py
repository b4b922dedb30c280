"""The page on SVGD runs as it stands, after the quickstart."""

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def code(page: str) -> str:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    blocks = re.findall(
        r"^( *)```python\n(.*?)```", text, flags=re.DOTALL | re.MULTILINE
    )
    return "\n".join(textwrap.dedent(block) for _, block in blocks)


# A page that trains for seconds only.
@pytest.mark.filterwarnings("ignore:The weights aren't a mode")
def test_the_page_runs() -> None:
    names: dict[str, Any] = {}
    exec(code("quickstart.md"), names)
    exec(code("svgd.md"), names)
    assert len(names["mixture"].components) == 4
    assert names["last"]["ratio"] > 0
    assert len(names["svgd"].diagnostics["loss"]) == 4  # two updates an epoch
