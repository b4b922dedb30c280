"""The code on the README and on the docs' pages, as it stands there."""

import re
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def blocks(page: str) -> list[str]:
    """A page's blocks of Python, those inside of lists, too."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^( *)```python\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for _, block in found]


def names_after(*pages: str) -> dict[str, Any]:
    """What the names stand for after the code of the docs' pages, one by one."""
    names: dict[str, Any] = {}
    for page in pages:
        exec("\n".join(blocks(f"docs/{page}.md")), names)
    return names
