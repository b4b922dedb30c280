"""Which layers do something: heat maps over layers and the roles of matrices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from pyro_lora.diagnose.diagnose import charge_of
from pyro_lora.diagnose.diagnosis import LeftOut
from pyro_lora.export.plots.axes import axes_or_new
from pyro_lora.export.weight_variables import (
    bare_parameters,
    layer_dim,
    layers_by_sites,
    singular_values,
    stem_of,
)
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.posteriors.posterior import Posterior, as_posterior

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Layer = int | str  # "2.1" where a path has two indices
Row = Mapping[Layer, float]

_NO_LAYER = "-"  # what a head's column is called
_MAX_NUMBERED = 200  # cells that still have room for their numbers


def effective_parameters(posterior: Posterior, ax: Axes | None = None) -> Axes:
    r"""How many weights of each matrix the data determine, layers x roles.

    A matrix's part of :math:`\mathrm{tr}(F P^{-1})`: 0 where the prior says everything,
    the matrix's number of weights where the data do. A mixture's are its components',
    averaged.

    Args:
        posterior: A Laplace posterior, or a mixture of them.
        ax: Axes to draw on; None makes a figure.

    Returns:
        The axes; the colour bar has axes of its own beside them.

    Raises:
        TypeError: If the posterior is of another kind.
    """
    posterior = as_posterior(posterior)
    try:
        by_layer = charge_of(posterior).by_layer
    except LeftOut as reason:
        raise TypeError(
            "plots.effective_parameters needs a LaplacePosterior or a mixture of them: "
            f"{reason}."
        ) from reason
    parameters = {
        s: names
        for lora in posterior.networks
        for s, names in bare_parameters(lora).items()
    }
    kinds = dict.fromkeys(site.partition(".")[0] for site in by_layer)
    rows = []
    for kind in kinds:  # lora, head, base
        sites = [site for site in by_layer if site.partition(".")[0] == kind]
        for label, site in zip(_short(sites, keep=2), sites, strict=True):
            rows.append((label, _row(parameters[site], by_layer[site])))
    return _heat_map(rows, "effective parameters", ax)


def delta_norms(
    lora: LiftedNetwork, weights: Mapping[str, Tensor], ax: Axes | None = None
) -> Axes:
    r"""Frobenius norm of each layer's update :math:`\Delta W = s B A`, layers x roles.

    Args:
        lora: The lifted network.
        weights: Site -> value, such as ``lora.weights()`` or ``posterior.mode()``. Of
            draws or particles, which have a leading dim, the norms' mean is shown.
        ax: Axes to draw on; None makes a figure.

    Returns:
        The axes; the colour bar has axes of its own beside them.

    Raises:
        ValueError: If the network has no updates of low rank, or the weights aren't
            its own.
    """
    factors = lora.delta_weight_factors(
        {site: value for site, value in weights.items() if site in lora.sites}
    )
    if not factors:
        raise ValueError(
            "plots.delta_norms: the lifted network has no updates of the form B A."
        )
    paths = {stem_of(s): p for s, p in layers_by_sites(lora, factors).items()}
    rows = []
    for label, layers in zip(_short([*paths], keep=1), paths.values(), strict=True):
        norms = [singular_values(*factors[p]).square().sum(-1).sqrt() for p in layers]
        rows.append((label, _row(layers, [norm.mean() for norm in norms])))
    return _heat_map(rows, r"$\|\Delta W\|_F$", ax)


def _row(paths: Sequence[str], values: Iterable[Tensor]) -> Row:
    layers: Sequence[Layer] = layer_dim(paths).get("layer", [_NO_LAYER])
    return {n: float(x) for n, x in zip(layers, values, strict=True)}


def _short(names: Sequence[str], keep: int) -> list[str]:
    """Dotted names without what all start with, but for their last ``keep`` parts."""
    parts = [name.split(".") for name in names]
    common = 0
    while all(len(p) > common + keep and p[common] == parts[0][common] for p in parts):
        common += 1
    return [".".join(p[common:]) for p in parts]


def _heat_map(rows: Sequence[tuple[str, Row]], label: str, ax: Axes | None) -> Axes:
    layers = sorted({layer for _, row in rows for layer in row}, key=_natural)
    values = [[row.get(layer, math.nan) for layer in layers] for _, row in rows]
    numbered = len(rows) * len(layers) <= _MAX_NUMBERED
    width = 0.5 if numbered else 0.25
    ax = axes_or_new(ax, (2.6 + width * len(layers), 1.2 + 0.35 * len(rows)))
    largest = max(x for _, row in rows for x in row.values())
    image = ax.imshow(values, cmap="Blues", vmin=0, vmax=largest or 1, aspect="auto")
    for y, line in enumerate(values if numbered else []):
        for x, value in enumerate(line):
            if not math.isnan(value):
                ax.text(
                    x,
                    y,
                    f"{value:.2g}" if value < 10 else f"{value:.0f}",
                    ha="center",
                    va="center",
                    color="white" if value > 0.6 * largest else "black",
                    fontsize="small",
                )
    ax.set_facecolor("0.92")  # where there is no such matrix
    ax.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    ax.set_yticks(range(len(rows)), [name for name, _ in rows])
    ax.set(xlabel="layer")
    figure = ax.get_figure()
    assert figure is not None
    figure.colorbar(image, ax=ax, label=label)
    return ax


def _natural(layer: Layer) -> tuple[bool, list[int]]:
    """Numbers in their order, what has none last."""
    if layer == _NO_LAYER:
        return True, []
    return False, [int(n) for n in str(layer).split(".")]
