"""The demo's pictures: pyro_lora's own and ArviZ's. The docs show the same files."""

import io
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # files only, also where there is no display

import arviz_plots
import arviz_stats
import matplotlib.pyplot as plt
from arviz_base.labels import MapLabeller
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from xarray import DataTree

import pyro_lora as pl
from examples.methods import Study

COMPARED = (
    "MAP",
    "MAP + temperature scaling",
    "deep ensemble",
    "Laplace (evidence)",
    "mixture of Laplace at these particles",
)
NAMES = (
    *("reliability", "rejection", "evidence", "effective_parameters", "delta_norms"),
    *("forces", "entropy", "norms", "khat", "pava"),
)
NUM_COLORS = 128  # enough for lines and letters, and a third of the bytes


def draw(study: Study, lora: pl.LiftedNetwork, tree: DataTree, out: Path) -> list[Path]:
    """Draw what the study has.

    Args:
        study: The fitted methods.
        lora: Their lifted network.
        tree: Laplace's draws.
        out: An existing folder.

    Returns:
        The files.
    """
    assert study.laplace is not None, "every run has Laplace"
    predictions = {o.name: o.test for o in study.outcomes if o.name in COMPARED}
    best = study.outcomes[-1]
    figures = {
        "reliability": _figure(pl.plots.reliability(predictions)),
        "rejection": _figure(pl.plots.rejection(predictions)),
        "evidence": _figure(pl.plots.evidence(study.laplace)),
        "effective_parameters": _figure(pl.plots.effective_parameters(study.laplace)),
        "delta_norms": _figure(pl.plots.delta_norms(lora, study.laplace.mode())),
    }
    if study.svgd is not None:
        figures["forces"] = _figure(pl.plots.forces(study.svgd.diagnostics))
    if best.domains:
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(9, 4), layout="constrained", sharey=True
        )
        pl.plots.entropy(best.test, best.domains, left)
        pl.plots.entropy(best.test, best.domains, right, score="epistemic")
        right.set_ylabel("")
        figures["entropy"] = figure
    figures |= _of_arviz(tree)
    return [_save(figure, out / f"{name}.png") for name, figure in figures.items()]


def _of_arviz(tree: DataTree) -> dict[str, Figure]:
    """ArviZ's own pictures of Laplace's draws."""
    norms = [n for n in tree["posterior"].data_vars if n.endswith("frobenius_norm")]
    roles = {name: name.split(".")[-2] for name in norms if name.startswith("delta.")}
    options = {"backend": "matplotlib"}
    prior = arviz_plots.plot_prior_posterior(
        tree,
        var_names=[*roles],
        labeller=MapLabeller(var_name_map=roles),  # their names are long
        figure_kwargs={"figsize": (10, 2.2)},
        **options,
    )
    loo = arviz_stats.loo(tree, pointwise=True)
    figures = {"norms": prior, "khat": arviz_plots.plot_khat(loo, **options)}
    if tree["observed_data"]["y"].max() == 1:
        figures["pava"] = arviz_plots.plot_ppc_pava(tree, **options)
    return {name: plot.get_viz("figure") for name, plot in figures.items()}


def _figure(ax: Axes) -> Figure:
    figure = ax.figure
    assert isinstance(figure, Figure), "axes of our own are in no other figure's"
    return figure


def _save(figure: Figure, path: Path) -> Path:
    """Write a small PNG, and close the figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, bbox_inches="tight")
    plt.close(figure)
    image = Image.open(buffer).convert("RGB").quantize(NUM_COLORS)
    image.save(path, optimize=True)
    return path
