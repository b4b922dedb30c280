"""The rules of the house, read from the source: who imports whom, what is public."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pyro_lora

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pyro_lora"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# In the data's order: each imports only from those before it.
ROOMS = (
    "ground",
    "priors",
    "lifting",
    "likelihood",
    "curvature",
    "posteriors",
    "infer",
    "predict",
    "diagnose",
    "export",
)
OWNERS = {  # third party: the only places that import it
    "peft": ("lifting/", "export/adapters.py", "cli/saved_classifier.py"),
    "arviz_base": ("export/",),
    "arviz_stats": ("diagnose/", "export/"),
    "arviz_plots": ("export/plots/",),
    "matplotlib": ("export/plots/",),
}
LAZY = {"arviz_base", "arviz_plots", "arviz_stats", "matplotlib", "pandas", "xarray"}


def allowed_targets(file: str) -> set[str] | None:
    """What of pyro_lora a file may import; None: everything."""
    place = file.split("/")[0]
    if place in ROOMS:
        return set(ROOMS[: ROOMS.index(place) + 1])
    # Elsewhere a file sees the public names, "", alone.
    return {
        "__init__.py": None,
        "models.py": {"ground", "lifting", "likelihood"},
        "cli": {"", "cli"},
    }.get(place, {""})


def imports(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Each import with its full dotted name, `from a import b` as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node, f"{module}.{alias.name}") for alias in node.names)


def runs_at_import(tree: ast.Module) -> set[ast.AST]:
    """The nodes outside every function and `if TYPE_CHECKING`."""
    never = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for inner in ast.walk(node)
    }
    return set(ast.walk(tree)) - never


def violations(file: str, source: str) -> list[str]:
    """The imports of `file`, a path inside the package, that the house forbids."""
    tree = ast.parse(source)
    at_import, targets, found = runs_at_import(tree), allowed_targets(file), []
    for node, name in imports(tree):
        top, *rest = name.split(".")
        if not top:
            found.append(f"{name}: relative")
        elif top == "pyro_lora" and targets is not None:
            if inner_module(node, rest) not in targets:
                found.append(f"{name}: against the flow of the data")
        elif top in OWNERS and not file.startswith(OWNERS[top]):
            found.append(f"{name}: belongs in {' or '.join(OWNERS[top])}")
        elif top in LAZY and node in at_import:
            found.append(f"{name}: not inside a function")
    return found


def inner_module(node: ast.AST, rest: list[str]) -> str:
    """Which room or file of the package an import reaches; "": the public names."""
    # `from pyro_lora import predict` is the function, not its room.
    from_root = isinstance(node, ast.ImportFrom) and node.module == "pyro_lora"
    if not rest or (from_root and rest[0] in pyro_lora.__all__):
        return ""
    return rest[0]


def ruff_order(name: str) -> tuple[bool, bool, str]:
    """RUF022's order: CONSTANTS, then Classes, then functions."""
    return not name.isupper(), not name[0].isupper(), name


def unmentioned(names: list[str], text: str) -> list[str]:
    return [name for name in names if not re.search(rf"\b{re.escape(name)}\b", text)]


@pytest.mark.parametrize("file", FILES)
def test_imports_follow_the_flow_of_the_data(file: str) -> None:
    assert violations(file, (PACKAGE / file).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("lifting/slots.py", "from pyro_lora.curvature.kfac import kfac_expand"),
        ("lifting/slots.py", "from pyro_lora import export"),
        ("infer/svgd.py", "def f():\n    import pyro_lora.predict.metrics"),
        ("export/arviz.py", "from pyro_lora import AutoLaplace"),
        ("export/arviz.py", "import pyro_lora"),
        ("export/arviz.py", "from . import plots"),
        ("lifting/network.py", "from .slots import Slot"),
        ("models.py", "from pyro_lora.infer import svgd"),
        ("cli/commands.py", "from pyro_lora.predict.predict import predict"),
        ("cli/commands.py", "import pyro_lora.models"),
        ("curvature/fisher.py", "import peft"),
        ("export/arviz.py", "from peft.utils import get_peft_model_state_dict"),
        ("predict/metrics.py", "import arviz_base as az"),
        ("export/arviz.py", "def f():\n    import matplotlib.pyplot as plt"),
        ("export/plots/axes.py", "import matplotlib.pyplot as plt"),
        ("export/plots/axes.py", "try:\n    import arviz_plots\nfinally:\n    pass"),
    ],
)
def test_a_forbidden_import_is_found(file: str, source: str) -> None:
    assert len(violations(file, source)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("__init__.py", "from pyro_lora.export.arviz import to_datatree"),
        ("lifting/network.py", "from pyro_lora.lifting.slots import Slot"),
        (
            "export/arviz.py",
            "from pyro_lora.lifting import network\ndef f():\n    import arviz_base",
        ),
        ("models.py", "from pyro_lora.lifting.network import LiftedNetwork"),
        (
            "cli/commands.py",
            "import pyro_lora as pl\nfrom pyro_lora import lift",
        ),
        ("lifting/network.py", "from peft import PeftModel\nimport pyro_lorax"),
        ("export/adapters.py", "from peft import PeftModel"),
        ("export/plots/axes.py", "def f():\n    import matplotlib.pyplot as plt"),
        (
            "export/plots/axes.py",
            "if TYPE_CHECKING:\n    from matplotlib.axes import Axes",
        ),
    ],
)
def test_an_allowed_import_passes(file: str, source: str) -> None:
    assert violations(file, source) == []


def test_every_folder_is_a_room() -> None:
    folders = {file.split("/")[0] for file in FILES if "/" in file}
    assert folders == {*ROOMS, "cli"}


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
    text = (ROOT / "docs" / "api.rst").read_text(encoding="utf-8")
    assert unmentioned(list(pyro_lora.__all__), text) == []


def test_an_undocumented_name_is_found() -> None:
    text = ".. autofunction:: pyro_lora.lift\n.. autoclass:: pyro_lora.AutoLaplace"
    assert unmentioned(["Auto", "lift"], text) == ["Auto"]


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_readme_says_how_to_start(command: str) -> None:
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")


def test_quickstart_runs() -> None:
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec("\n".join(blocks), names)
    assert names["prediction"].probs.shape == (64, 2)
