r"""Weights as named arrays with dims and coordinates, as ArviZ shows them.

A and B can't be identified: for any invertible T, (B T) (T⁻¹ A) is the same update. So
what is shown of a layer is said of :math:`\Delta W = s B A` alone. Of S draws of two
layers' queries, lifted into sites with a dim for the layers,

    lora.query.A (S, 2, R, I)            delta.query.singular_values (S, 2, R)
    lora.query.B (S, 2, O, R)     ->     delta.query.frobenius_norm (S, 2)
    head.classifier.weight (S, C, I)     as it is

and ``layer`` has the layers' numbers, ``module`` their paths in the network.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.lifting.prior import NOISE
from pyro_lora.lifting.sites import bare_names
from pyro_lora.priors.prior import hyper_name

# Heads with more weights than this are given by their norm: a table of 600,000 rows
# (a 768 x 768 layer before the classifier) helps nobody.
MAX_HEAD_WEIGHTS = 10_000
MAX_RAW_VALUES = 50_000_000  # 200 MB in float32

Factors = tuple[Tensor, Tensor]  # (B, A)
Coordinates = Sequence[int] | Sequence[str]


@dataclass
class Variables:
    """Arrays with the names of their dims, as ``arviz_base.from_dict`` wants them.

    Attributes:
        values: Name -> (S, ...).
        dims: Name -> names of the dims after S.
        coords: Dim -> values along it.
        modules: Name -> the paths of the modules that it is about, along ``layer``.
    """

    values: dict[str, np.ndarray] = field(default_factory=dict)
    dims: dict[Hashable, Sequence[Hashable]] = field(default_factory=dict)
    coords: dict[Any, Any] = field(default_factory=dict)
    modules: dict[str, str | list[str]] = field(default_factory=dict)

    def add(
        self,
        name: str,
        value: Tensor,
        dims: Mapping[str, Coordinates],
        owner: str,
    ) -> None:
        """Add one variable.

        Args:
            name: Its name.
            value: (S, ...).
            dims: Dim -> coordinate values; a dim that is taken by other values gets
                ``owner`` put after its name.
            owner: What the dims belong to.
        """
        self.values[name] = value.detach().cpu().numpy()
        self.dims[name] = [
            self._dim(dim, owner, list(coord)) for dim, coord in dims.items()
        ]

    def _dim(self, dim: str, owner: str, coord: list[Any]) -> str:
        if self.coords.setdefault(dim, coord) != coord:
            dim = f"{dim}_{owner}"
            self.coords[dim] = coord
        return dim


def delta_variables(
    networks: Sequence[LiftedNetwork],
    weights: Mapping[str, Tensor],
    mode: Mapping[str, Tensor] | None = None,
) -> Variables:
    r"""What the data can identify: the update of each layer, not its factors.

    For each kind of layer, stacked over the layers: the singular values of
    :math:`\Delta W = s B A`, its Frobenius norm and its stable rank
    :math:`\|\Delta W\|_F^2 / \sigma_1^2` (0 where :math:`\Delta W = 0`), and the
    angle to the mode's, :math:`\arccos \langle \Delta W, \Delta \hat W \rangle / \|
    \Delta W\| \|\Delta \hat W\|` in radians (NaN where one is 0). Heads and other
    sites come as they are, large heads by their Frobenius norm.

    Args:
        networks: The lifted networks.
        weights: Site -> (S, ...); other latent sites are added as they are, but for
            the noise of non-centred ones.
        mode: Site -> value, or each draw's own, (S, ...); None leaves the angle out.

    Returns:
        Variables named ``delta.<path>.singular_values`` and so on, with their modules.
    """
    result = Variables()
    matrices: set[str] = set()
    for lora in networks:
        own = {site: weights[site] for site in lora.sites}
        factors = lora.delta_weight_factors(own)
        at_mode = None
        if mode is not None:
            at_mode = lora.delta_weight_factors({s: mode[s] for s in lora.sites})
        for sites, paths in layers_by_sites(lora, factors).items():
            matrices |= {*sites}
            # Layers of one kind have one shape, so that they stack: (S, L, R).
            singular = torch.stack([singular_values(*factors[p]) for p in paths], 1)
            norm = singular.square().sum(-1).sqrt()
            # ||ΔW||_F² = Σ_r σ_r²; over σ_1² it counts the directions that matter
            largest = singular[..., 0].square()
            rank = torch.where(largest > 0, norm.square() / largest, 0.0)
            stem = stem_of(sites)
            layer = layer_dim(paths)
            if not layer:
                singular, norm, rank = singular[:, 0], norm[:, 0], rank[:, 0]
            numbers = {"rank": range(singular.shape[-1])}
            name = f"delta.{stem}"
            quantities = {
                "singular_values": (singular, layer | numbers),
                "frobenius_norm": (norm, layer),
                "stable_rank": (rank, layer),
            }
            if at_mode is not None:
                angles = [_angle(factors[p], at_mode[p]) for p in paths]
                angle = torch.stack(angles, 1) if layer else angles[0]
                quantities["angle_to_mode"] = (angle, layer)
            for quantity, (value, dims) in quantities.items():
                result.add(f"{name}.{quantity}", value, dims, stem)
                result.modules[f"{name}.{quantity}"] = paths if layer else paths[0]
    # Where a prior isn't centred, a site's noise says nothing that the site doesn't.
    noises = {f"{site}{NOISE}" for site in weights}
    chosen = weights.keys() - matrices - noises
    _add_sites(result, networks, weights, chosen, MAX_HEAD_WEIGHTS)
    return result


def raw_variables(
    networks: Sequence[LiftedNetwork],
    weights: Mapping[str, Tensor],
    mode: Mapping[str, Tensor] | None = None,
) -> Variables:
    """Every site as it is.

    Args:
        networks: The lifted networks.
        weights: Site -> (S, ...).
        mode: Not needed.

    Returns:
        Variables named as the sites.
    """
    result = Variables()
    _add_sites(result, networks, weights, weights.keys(), None)
    return result


def check_raw_size(weights: Mapping[str, Tensor]) -> None:
    """Refuse to store enormous arrays.

    Raises:
        ValueError: If there are more than 50 million values.
    """
    size = sum(value.numel() for value in weights.values())
    if size > MAX_RAW_VALUES:
        raise ValueError(
            f"weights='raw' would store {size:,} values, more than "
            f"{MAX_RAW_VALUES:,}. Lower num_samples, or use weights='delta'."
        )


def bare_parameters(lora: LiftedNetwork) -> dict[str, list[str]]:
    """Site -> its parameters' names, in layer order, as under any adapter name.

    Args:
        lora: The lifted network, whose adapter may be called "0", like a layer.
    """
    bare = bare_names(lora.network, lora.adapter)
    return {
        site: [name for name in map(bare, names) if name is not None]
        for site, names in lora.sites.items()
    }


def _add_sites(
    result: Variables,
    networks: Sequence[LiftedNetwork],
    weights: Mapping[str, Tensor],
    chosen: AbstractSet[str],
    max_weights: int | None,
) -> None:
    owners = {site: lora for lora in networks for site in lora.sites}
    parameters = {s: x for lora in networks for s, x in bare_parameters(lora).items()}
    for site, value in weights.items():
        if site not in chosen:
            continue
        owner = _owner(site)
        lora = owners.get(owner)
        if lora is not None and site.startswith(hyper_name("role_log_scale", "")):
            if value.shape[1:] == (len(lora.sites),):
                result.add(site, value, {"site": [*lora.sites]}, owner)
                continue
            lora = None  # of some sites
        if lora is None or not _is_leading(value.shape[1:], weights[owner].shape[1:]):
            result.values[site] = value.detach().cpu().numpy()
            continue
        layer = layer_dim(parameters[owner])
        value = value if layer else value[:, 0]
        sizes = value.shape[1 + len(layer) :]
        if site == owner and max_weights is not None and sizes.numel() > max_weights:
            event = tuple(range(1 + len(layer), value.ndim))
            norm = torch.linalg.vector_norm(value, dim=event)
            result.add(f"{site}.frobenius_norm", norm, layer, site)
            continue
        names = _event_dims(owner, weights[owner].ndim - 2)
        if owner.startswith("head.") and sizes[:1] == (_num_classes(lora),):
            names = ("class", *names[1:])
        event_dims = {n: range(s) for n, s in zip(names, sizes, strict=False)}
        result.add(site, value, layer | event_dims, owner)


def _owner(site: str) -> str:
    """The lifted site that a site is, or whose scale or noise it is."""
    name = site.removesuffix(NOISE)
    return name.split(".", 2)[2] if name.startswith("prior.") else name


def _is_leading(shape: torch.Size, of: torch.Size) -> bool:
    return 0 < len(shape) <= len(of) and shape == of[: len(shape)]


def _num_classes(lora: LiftedNetwork) -> int:
    """C of a classifier; 0 of other networks."""
    return getattr(getattr(lora.network, "config", None), "num_labels", 0)


def _event_dims(site: str, num_dims: int) -> tuple[str, ...]:
    role = site.rpartition(".")[2].partition("_")[0]
    names = {"A": ("rank", "in_feature"), "B": ("out_feature", "rank"), "E": ("rank",)}
    kernel = tuple(f"kernel_{i}" for i in range(num_dims))
    return (*names.get(role, ("out_feature", "in_feature")), *kernel)[:num_dims]


def layers_by_sites(
    lora: LiftedNetwork, layers: Iterable[str]
) -> dict[tuple[str, ...], list[str]]:
    """Paths of the adapted layers by the sites that hold their A and B."""
    sites: dict[str, list[str]] = {}
    for site, names in lora.sites.items():
        for name in names:
            path, mark, _ = name.rpartition(".lora_")
            if mark and site.rpartition(".")[2][0] in "ABE":
                sites.setdefault(path, []).append(site)
    result: dict[tuple[str, ...], list[str]] = {}
    for path in layers:
        result.setdefault(tuple(sites[path]), []).append(path)
    return result


def stem_of(sites: Sequence[str]) -> str:
    """The sites' common path, with the suffixes of those that have one."""
    path = sites[0].removeprefix("lora.").rpartition(".")[0]
    return path + "".join(site.rpartition(".")[2][1:] for site in sites)


def layer_dim(paths: Sequence[str]) -> dict[str, Coordinates]:
    """The dim "layer" with the indices in the paths; empty where there are none."""
    indices = [re.findall(r"(?<=\.)\d+(?=\.|$)", path) for path in paths]
    if not indices[0]:
        return {}
    if all(len(of_path) == 1 for of_path in indices):
        return {"layer": [int(of_path[0]) for of_path in indices]}
    return {"layer": [".".join(of_path) for of_path in indices]}


def _angle(update: Factors, other: Factors) -> Tensor:
    """Angle between B A and B' A', (S,), radians, without forming either."""

    def inner(x: Factors, y: Factors) -> Tensor:
        # <B A, B' A'> = tr(A^T B^T B' A') = sum of B^T B' times A A'^T.
        (b, a), (b_, a_) = x, y
        left = b.double().mT @ b_.double()
        return (left * (a.double() @ a_.double().mT)).sum((-2, -1))

    size = (inner(update, update) * inner(other, other)).clamp_min(0).sqrt()
    return (inner(update, other) / size).clamp(-1, 1).arccos()


def singular_values(b: Tensor, a: Tensor) -> Tensor:
    """Singular values of B A, (S, R), largest first, without forming B A."""
    # B = Q_b R_b and A^T = Q_a R_a, so B A = Q_b (R_b R_a^T) Q_a^T.
    r_b = torch.linalg.qr(b.double()).R
    r_a = torch.linalg.qr(a.double().mT).R
    return torch.linalg.svdvals(r_b @ r_a.mT)
