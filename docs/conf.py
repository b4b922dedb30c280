"""Sphinx settings. ``make docs`` builds the site, with every warning an error."""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent.parent))  # for the tests' table

project = "pyro_lora"
copyright = "the pyro_lora contributors"
version = release = installed_version("pyro-lora")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "pyro_lora"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False


def insert_table(app: Sphinx, docname: str, source: list[str]) -> None:
    """Write the tests' table of what can be lifted into its page."""
    if docname == "liftable":
        from tests.lifting.liftable import markdown

        source[0] = source[0].replace("<!-- table -->", markdown())


def setup(app: Sphinx) -> None:
    """Register what this site adds to Sphinx."""
    app.connect("source-read", insert_table)
