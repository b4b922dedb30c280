"""The rules of the house that no tool checks: what is public, what loads when.

Who imports whom is read by import-linter, from pyproject.toml.
"""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_lora

ROOT = Path(__file__).parent.parent


def ruff_order(name: str) -> tuple[bool, bool, str]:
    """RUF022's order: CONSTANTS, then Classes, then functions."""
    return not name.isupper(), not name[0].isupper(), name


def unmentioned(names: list[str], text: str) -> list[str]:
    return [name for name in names if not re.search(rf"\b{re.escape(name)}\b", text)]


@pytest.mark.slow
def test_what_is_large_and_seldom_used_loads_when_it_is_used() -> None:
    code = """
import sys
import pyro_lora as pl
for name in pl.__all__:
    getattr(pl, name)
late = {"arviz_base", "arviz_plots", "arviz_stats", "torchmetrics", "xarray"}
assert not late & sys.modules.keys(), late & sys.modules.keys()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_public_names_are_sorted_and_there() -> None:
    names = list(pyro_lora.__all__)
    assert names == sorted(set(names), key=ruff_order)
    assert [name for name in names if not hasattr(pyro_lora, name)] == []


def test_ruff_order() -> None:
    assert sorted(["lift", "AutoLaplace", "SVGD"], key=ruff_order) == [
        "SVGD",
        "AutoLaplace",
        "lift",
    ]


def test_public_names_are_documented() -> None:
    pages = (ROOT / "docs" / "api").glob("*.rst")
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    assert unmentioned(list(pyro_lora.__all__), text) == []


def test_an_undocumented_name_is_found() -> None:
    text = ".. autofunction:: pyro_lora.lift\n.. autoclass:: pyro_lora.AutoLaplace"
    assert unmentioned(["Auto", "lift"], text) == ["Auto"]


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_readme_says_how_to_start(command: str) -> None:
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_picture_of_the_rooms_is_that_of_the_imports() -> None:
    rooms = runpy.run_path(str(ROOT / "docs" / "rooms.py"))
    drawn = rooms["BLOCK"].findall((ROOT / "CONTRIBUTING.md").read_text("utf-8"))
    assert drawn == [rooms["picture"]()], "python docs/rooms.py draws it anew"
