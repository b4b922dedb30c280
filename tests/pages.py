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


def cells(tutorial: str) -> str:
    """All code of a notebook in Markdown."""
    text = (ROOT / "docs" / "tutorials" / f"{tutorial}.md").read_text(encoding="utf-8")
    found = re.findall(r"^```\{code-cell\}\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    return "\n".join(re.sub(r"^:tags:.*\n", "", cell) for cell in found)


def names_after(page: str, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the names stand for after the code of a page of the docs.

    Args:
        page: Its name.
        before: What they stand for after the page that it goes on from.
    """
    names = dict(before or {})
    exec("\n".join(blocks(f"docs/{page}.md")), names)
    return names
