"""Public names load when the first is asked for, and are what they were otherwise."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import pyro_lora

SOURCE = Path(pyro_lora.__file__).read_text("utf-8")


def assert_python_runs(code: str) -> None:
    """In a fresh interpreter, with the assertions that are in it."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_type_checkers_see_the_names_that_are_loaded() -> None:
    (block,) = (
        x for x in ast.parse(SOURCE).body if isinstance(x, ast.If) and x.body[1:]
    )
    seen = [
        (statement.module, alias.name)
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    ]
    loaded = [
        (home, name)
        for home, names in pyro_lora._HOMES.items()
        for name in names.split()
    ]
    assert seen == loaded
    assert sorted(name for _, name in seen) == sorted(pyro_lora.__all__)


def test_help_and_names_need_neither_torch_nor_transformers() -> None:
    code = """
import sys
import pyro_lora as pl
shown = {name for name in dir(pl) if not name.startswith("__")}
assert shown == set(pl.__all__), shown ^ set(pl.__all__)
assert {"__version__", "__doc__"} <= set(dir(pl))
assert not hasattr(pl, "__wrapped__")
from pyro_lora.cli.commands import app
from typer.testing import CliRunner
for command in ([], ["fit"], ["predict"], ["diagnose"], ["export"]):
    assert CliRunner().invoke(app, [*command, "--help"]).exit_code == 0
late = CliRunner().invoke(app, ["fit", ".", "setup.cfg", "posterior"])
assert late.exit_code != 0
heavy = {"torch", "transformers", "peft", "pyro", "pandas", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    assert_python_runs(code)


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "import pyro_lora.predict.metrics",
        "import pyro_lora.predict",
        "from pyro_lora.predict import draws",
        "from pyro_lora import predict",
        "from pyro_lora import *",
        "import pyro_lora.infer.svgd.svgd, pyro_lora.export.checkpoint",
        "import pickle, pyro_lora.models",
    ],
)
def test_whatever_is_imported_first(first: str) -> None:
    assert_python_runs(f"""
{first}
import sys
import pyro_lora as pl
from pyro_lora import SVGD, kernels, models
assert callable(pl.predict) and not isinstance(pl.predict, type(sys)), pl.predict
import pyro_lora.predict.metrics, importlib
assert pl.predict.__module__ == "pyro_lora.predict.predict"
assert pl.SVGD is SVGD and pl.kernels is kernels
assert pl.models is sys.modules["pyro_lora.models"]
assert pl.infer is sys.modules["pyro_lora.infer"]
assert all(hasattr(pl, name) for name in pl.__all__)
importlib.reload(pl)
assert pl.SVGD is SVGD
import pickle
assert pickle.loads(pickle.dumps(pl.predict)) is pl.predict
""")


def test_a_room_never_hides_a_function() -> None:
    predict = pyro_lora.predict
    pyro_lora.predict = import_module("pyro_lora.predict")  # type: ignore[assignment]
    assert pyro_lora.predict is predict
    rooms = {
        name
        for name in pyro_lora.__all__
        if f"pyro_lora.{name}" in sys.modules
        and sys.modules[f"pyro_lora.{name}"] is not getattr(pyro_lora, name)
    }
    assert rooms == {"diagnose", "lift", "predict"}
    assert isinstance(pyro_lora.models, ModuleType)


def test_other_names_are_refused_and_set_as_on_any_module(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(AttributeError, match="'pyro_lora' has no attribute 'SVDG'"):
        pyro_lora.SVDG  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'SVDG'"):
        exec("from pyro_lora import SVDG")
    monkeypatch.setattr(pyro_lora, "predict", 3)
    assert pyro_lora.predict == 3  # type: ignore[comparison-overlap]


@pytest.mark.slow
def test_a_part_that_cannot_be_imported_says_so_each_time() -> None:
    assert_python_runs("""
import sys
sys.modules["msgspec"] = None  # as if it weren't installed
import pyro_lora as pl
for _ in range(2):
    try:
        pl.save
    except ImportError as error:
        assert "msgspec" in str(error), error
    else:
        raise AssertionError
""")
