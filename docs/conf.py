"""Sphinx settings. ``make docs`` builds the site, with every warning an error."""

from importlib.metadata import version as installed_version

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
