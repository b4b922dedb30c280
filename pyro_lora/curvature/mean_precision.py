"""The mean of several Gaussians' precisions, such as those at several particles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyro_lora.curvature.block_gaussian import BlockGaussian, Eigenblocks
from pyro_lora.curvature.dense_gaussian import DenseGaussian
from pyro_lora.curvature.weight_gaussian import WeightGaussian


def mean_precision(gaussians: Sequence[WeightGaussian]) -> WeightGaussian:
    r"""A Gaussian whose precision is the mean :math:`\bar P` of several.

    That of Kronecker structures has no Kronecker form. It is kept as its diagonal in
    the eigenbasis of its partial traces: each :math:`u^T \bar P u` along a basis vector
    :math:`u = u_G \otimes u_A` is exact, products of two are left out. Of one Gaussian,
    and of several with one basis, it is the whole.

    Args:
        gaussians: Over the same sites, of one structure.

    Returns:
        The Gaussian; its mean is the first's.

    Raises:
        ValueError: If sites, shapes or structures differ.
    """
    first = gaussians[0]
    for g in gaussians:
        shapes = [{s: x.shape for s, x in h.loc.items()} for h in (first, g)]
        if shapes[0] != shapes[1] or _structure(g) != _structure(first):
            raise ValueError(
                "Precisions have a mean over the same sites and structure only, found "
                f"{_structure(first)} over {shapes[0]} and {_structure(g)} over "
                f"{shapes[1]}. Give Laplace posteriors of one model and structure."
            )
    tau = {
        site: torch.stack([g.prior_precision[site].expand(x.shape) for g in gaussians])
        for site, x in first.loc.items()
    }
    prior_precision = {site: x.mean(0) for site, x in tau.items()}
    dense = [g for g in gaussians if isinstance(g, DenseGaussian)]
    if dense:
        fisher = torch.stack([g.fisher for g in dense]).mean(0)
        return replace(dense[0], prior_precision=prior_precision, fisher=fisher)
    of_blocks = [g for g in gaussians if isinstance(g, BlockGaussian)]
    blocks = {
        site: _mean_blocks([g.blocks[site] for g in of_blocks]) for site in first.loc
    }
    mean = replace(of_blocks[0], blocks=blocks)
    return mean.with_prior_precision(prior_precision)


def _structure(gaussian: WeightGaussian) -> tuple[str, ...]:
    if not isinstance(gaussian, BlockGaussian):
        return (type(gaussian).__name__,)
    rotated: Mapping[str, Eigenblocks] = gaussian.blocks
    return tuple(
        f"{site}: {'diagonal' if block.rows is None else 'Kronecker'}"
        for site, block in rotated.items()
    )


def _mean_blocks(blocks: Sequence[Eigenblocks]) -> Eigenblocks:
    if len(blocks) == 1:
        return blocks[0]
    if blocks[0].rows is None:
        return Eigenblocks(torch.stack([b.values for b in blocks]).mean(0), None, None)
    layers = []
    for layer in range(len(blocks[0].values)):
        values = [b.values[layer] for b in blocks]
        bases = [b.bases()[layer] for b in blocks]
        rows = _mean_basis([r for r, _ in bases], [v.sum(1) for v in values])
        columns = _mean_basis([c for _, c in bases], [v.sum(0) for v in values])
        diagonals = [
            (rows.mT @ r.double()).square() @ v @ (c.mT.double() @ columns).square()
            for v, (r, c) in zip(values, bases, strict=True)
        ]
        like = bases[0]
        mean = torch.stack(diagonals).mean(0)
        layers.append((mean, rows.to(like[0]), columns.to(like[1])))
    return Eigenblocks(*(torch.stack(part) for part in zip(*layers, strict=True)))


def _mean_basis(bases: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Eigenvectors of the sum of U diag(values) U^T; all that the bases U span."""
    factor = torch.cat(
        [u.double() * v.sqrt() for u, v in zip(bases, values, strict=True)], 1
    )
    if factor.shape[1] < factor.shape[0]:
        return torch.linalg.svd(factor, full_matrices=False).U
    return torch.linalg.eigh(factor @ factor.mT).eigenvectors
