"""A kernel for each coordinate of the weights: particles in as many 1-D problems."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from pyro_lora.infer.svgd import transport
from pyro_lora.infer.svgd.kernels import Kernel

# Squared distances that are alive at once: 1 MiB in float32 stays in a core's cache.
BLOCK = 2**18


def coordinate_direction(
    kernel: Kernel,
    particles: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    form: Literal["stein", "repulsive"],
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    r"""Both terms of the Stein or repulsive direction, coordinate by coordinate.

    :math:`\phi_{id} = \frac1K \sum_j [k(x_{jd}, x_{id}) s_{jd} + \partial_{x_{jd}}
    k(x_{jd}, x_{id})]`: sliced SVGD with the axes as slices (Gong, Li and
    Hernández-Lobato 2021, https://arxiv.org/abs/2006.16531), or ``pyro.infer.SVGD``
    with ``mode="univariate"``. The repulsive form is :math:`s_{id} -
    \partial_{x_{id}} \log \sum_j k(x_{id}, x_{jd})`.

    Args:
        kernel: A function of squared distances (n, K, K).
        particles: Site -> (K, ...).
        scores: Gradients of the tempered log joint, site -> (K, ...).
        form: Transport.

    Returns:
        Attraction and repulsion, site -> (K, ...); and the mean kernel value between
        different particles and over coordinates, a scalar.
    """
    attractions, repulsions, totals = {}, {}, []
    for site, x in particles.items():
        pulls, pushes = [], []
        for pull, push, total in _blocks(kernel, x, scores[site], form):
            pulls.append(pull)
            pushes.append(push)
            totals.append(total)
        attractions[site] = torch.cat(pulls, 1).reshape(x.shape)
        repulsions[site] = torch.cat(pushes, 1).reshape(x.shape)
    num_weights = sum(x[0].numel() for x in particles.values())
    return attractions, repulsions, torch.stack(totals).sum() / num_weights


def _blocks(
    kernel: Kernel, particles: Tensor, scores: Tensor, form: str
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Both terms (K, n), and the sum of mean kernel values, of n coordinates a time."""
    num_particles = particles.shape[0]
    rows = (v.reshape(num_particles, -1) for v in (particles, scores))
    size = max(1, BLOCK // num_particles**2)
    for x, s in zip(*(v.split(size, 1) for v in rows), strict=True):
        # (K, K, n) in memory, so that every operation runs along the coordinates
        differences = x[:, None] - x
        sq_dists = differences.square().permute(2, 0, 1)
        by_coordinate = transport.gram_and_slope(kernel, sq_dists)
        gram, slope = (value.permute(1, 2, 0) for value in by_coordinate)
        push = -2 * (slope * differences).sum(1)
        total = transport.mean_off_diagonal(by_coordinate[0]).sum()
        if form == "stein":
            yield (gram * s).sum(1) / num_particles, push / num_particles, total
        else:
            yield s, push / gram.sum(1), total
