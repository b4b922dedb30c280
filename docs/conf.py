"""Sphinx settings. ``make docs`` builds the site, with every warning an error."""

import os
import sys
from importlib.resources import files
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parents[1]))  # this checkout, its tests' table

import pyro_lora

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = ROOT / "benchmarks" / "results"
# What the tutorials' kernels inherit: the examples' toys, and no progress bars.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
os.environ["TQDM_DISABLE"] = "1"

project = "pyro_lora"
copyright = "the pyro_lora contributors"
# Not an editable installation's metadata, which are as old as the installation.
version = release = pyro_lora.__version__

extensions = [
    "myst_nb",  # pages in Markdown, and notebooks that are run
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_design",  # cards
]
exclude_patterns = ["_build", "templates"]
html_theme = "furo"
html_title = f"pyro_lora {release}"  # at the head of each page
templates_path = ["templates"]
html_sidebars = {  # furo's, and the versions that are published beside this one
    "**": [
        "sidebar/brand.html",
        "sidebar/search.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "sidebar/scroll-end.html",
        "versions.html",
    ]
}

# Without a network a page can't ask MathJax's host: MathJax itself, which sets formulas
# with outlines of its own and so needs no fonts, is one file of the site.
mathjax_path = "tex-svg.js"
html_static_path = [
    str(files("sphinx-mathjax-offline") / "static" / "mathjax" / mathjax_path),
    "site.css",
]
html_css_files = ["site.css"]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

# A tutorial is run when its code has changed, or docs/_build was deleted.
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE / "_build" / "notebooks")
nb_execution_timeout = 600  # seconds a cell
nb_execution_raise_on_error = True
nb_merge_streams = True  # what a cell prints, in one piece
nb_output_stderr = "remove"  # libraries' words about the machine


def insert_table(app: Sphinx, docname: str, source: list[str]) -> None:
    """Write the tests' table of what can be lifted into its page."""
    if docname == "liftable":
        from tests.lifting.liftable import markdown

        source[0] = source[0].replace("<!-- table -->", markdown())


def write_benchmark_pages(app: Sphinx) -> None:
    """A page for each table of benchmarks/results, whichever are there."""
    folder = HERE / "benchmarks"
    wanted = {
        folder / result.name: f"```{{include}} ../../benchmarks/results/{result.name}\n"
        ":relative-images:\n```\n"
        for result in RESULTS.glob("*.md")
    }
    for page in folder.glob("*.md"):
        if page.name != "index.md" and page not in wanted:
            page.unlink()
    for page, text in wanted.items():
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> None:
    """Register what this site adds to Sphinx."""
    app.connect("config-inited", lambda app, config: write_benchmark_pages(app))
    app.connect("source-read", insert_table)
