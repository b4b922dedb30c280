r"""How particles move, and the spaces whose distances are those of weights.

With scores :math:`s_j = \nabla \log p(x_j) / T`, particles :math:`x_j`, a kernel
:math:`k = \kappa(d^2)` of squared distances :math:`d^2_{ij} = |x_i - x_j|^2` and its
derivative :math:`\kappa'` both transports are

.. math:: \phi_i = \sum_j (a_{ij} s_j + c_{ij} x_j),

with two matrices (K, K) that follow from :math:`k` and :math:`\kappa'`:

- Stein: :math:`a = k / K` and, since :math:`\nabla_{x_j} k(x_j, x_i) = -2 \kappa'_{ij}
  (x_i - x_j)`, :math:`c = \frac2K [\kappa' - \mathrm{diag}(\kappa' 1)]`.
- repulsive: :math:`a = 1` and :math:`c_i = 2 \beta [\kappa' - \mathrm{diag}(\kappa'
  1)]_i / \sum_j k_{ij}`.

So nothing of K^2 times the number D of weights is formed: distances come from inner
products (K, K), and a direction is two products of (K, K) with (K, D). For particles at
-1 and 1 and :math:`\kappa = e^{-d^2 / 2}`, :math:`\kappa'_{12} = -e^{-2} / 2` and
Stein's :math:`c x = e^{-2} (-1, 1)`: they are driven apart.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_lora.ground.accumulation import at_least_float32
from pyro_lora.ground.autocast import outside_autocast
from pyro_lora.ground.weights import Weights
from pyro_lora.infer.svgd.kernels import Kernel
from pyro_lora.infer.svgd.particle_model import (
    ParticleModel,
    ParticlePass,
    datum_loss,
    likelihood_at_particles,
)
from pyro_lora.likelihood.data_plate import data_plate

# Strength of the repulsion: a number, or a function of (minibatch loss in nats per
# datum, mean over particles, a scalar; N), whose value may stay on the device.
Repulsion = float | Tensor | Callable[[Tensor, int], float | Tensor]

# Numbers that are worked on at once: 1 MiB in float32 stays in a core's cache. A GPU
# has no use for small blocks.
BLOCK, LARGE_BLOCK = 2**18, 2**26


@dataclass(frozen=True)
class Direction:
    """Where K particles move, and what drives them there.

    Attributes:
        by_site: Site -> direction (K, ...).
        log_joint: (K,), nats, full data.
        nll: Negative log likelihood per datum, (K,), nats; None if the batch observes
            no data.
        attraction: Norm of the gradients' part, a scalar.
        repulsion: Norm of the repulsion, a scalar.
        mean_kernel: Mean kernel value between different particles, a scalar.
    """

    by_site: Weights
    log_joint: Tensor
    nll: Tensor | None
    attraction: Tensor
    repulsion: Tensor
    mean_kernel: Tensor


class Space(Protocol):
    """What the distances of a kernel measure, and the direction that follows."""

    @property
    def default_repulsion(self) -> Repulsion | None:
        """Strength of the repulsion where none is given; None if it has none."""
        ...

    def check(self, target: ParticleModel) -> None:
        """Refuse a model that has nothing to measure.

        Raises:
            ValueError: If it has nothing.
        """
        ...

    def direction(
        self, at: ParticlePass, temperature: float, repulsion: Repulsion
    ) -> Direction:
        """The direction on a batch.

        Args:
            at: The model at the particles, on the batch.
            temperature: T.
            repulsion: Strength of the repulsion, where the transport has one.

        Raises:
            TypeError: If the likelihood isn't known in this space.
            ValueError: If labels are missing, or a log density or a gradient is NaN or
                infinite.
        """
        ...


class Transport(Protocol):
    """What a kernel's values make of the particles' scores and places."""

    @property
    def default_repulsion(self) -> float | None:
        """Strength of the repulsion where none is given; None if it has none."""
        ...

    def weights(
        self, gram: Tensor, slope: Tensor, repulsion: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """The matrices a and c of the module's first lines, both (K, K).

        Args:
            gram: (K, K).
            slope: Derivative of the kernel in the squared distance, (K, K).
            repulsion: Strength of the second term.
        """
        ...

    def repulsions(
        self,
        gram: Tensor,
        slope: Tensor,
        repulsion: float | Tensor,
        gradients: Callable[[Tensor, slice], tuple[Tensor, ...]],
    ) -> list[Tensor]:
        r"""The second term where distances aren't those of the weights themselves.

        Args:
            gram: (K, K).
            slope: Derivative of the kernel in the squared distance, (K, K).
            repulsion: Strength of the term.
            gradients: Of :math:`\sum_{kj} c_{kj} d^2(x_k, y_j)` in x, a (K, ...) a
                site, from c (K, K') and which K' of the particles y is.

        Returns:
            For each site (K, ...).
        """
        ...


@dataclass(frozen=True)
class Stein:
    r"""Stein variational gradient descent (Liu & Wang 2016, eq. 8).

    :math:`\phi_i = \frac1K \sum_j [k(x_j, x_i) s_j + \nabla_{x_j} k(x_j, x_i)]`,
    https://arxiv.org/abs/1608.04471. The strength of its repulsion is that of the
    formula.
    """

    default_repulsion: None = None

    def weights(
        self, gram: Tensor, slope: Tensor, repulsion: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """The matrices a and c, both (K, K)."""
        num_particles = gram.shape[0]
        return gram / num_particles, _differences(slope) / num_particles

    def repulsions(
        self,
        gram: Tensor,
        slope: Tensor,
        repulsion: float | Tensor,
        gradients: Callable[[Tensor, slice], tuple[Tensor, ...]],
    ) -> list[Tensor]:
        """The second term, in each of its K gradients one particle held fixed."""
        num_particles = len(slope)
        by_particle = [
            [x.sum(0) / num_particles for x in gradients(slope[:, i : i + 1], one)]
            for i, one in ((i, slice(i, i + 1)) for i in range(num_particles))
        ]
        return [torch.stack(rows) for rows in zip(*by_particle, strict=True)]


@dataclass(frozen=True)
class Repulsive:
    r"""An own gradient and minus the log kernel density's (D'Angelo & Fortuin 2021).

    :math:`\phi_i = s_i - \beta \nabla_{x_i} \log \sum_j k(x_i, x_j)`, j including i,
    other particles held fixed, https://arxiv.org/abs/2106.11642, eq. 8.
    """

    default_repulsion: float = 1.0

    def weights(
        self, gram: Tensor, slope: Tensor, repulsion: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """The matrices a and c, both (K, K)."""
        density = gram.sum(1, keepdim=True)  # sum_j k_ij, (K, 1)
        push = _differences(slope) / density
        return torch.eye(
            len(gram), dtype=gram.dtype, device=gram.device
        ), repulsion * push

    def repulsions(
        self,
        gram: Tensor,
        slope: Tensor,
        repulsion: float | Tensor,
        gradients: Callable[[Tensor, slice], tuple[Tensor, ...]],
    ) -> list[Tensor]:
        """The second term, in one gradient."""
        share = slope / gram.sum(1, keepdim=True)
        return [repulsion * -x for x in gradients(share, slice(None))]


STEIN, REPULSIVE = Stein(), Repulsive()


@dataclass(frozen=True)
class Scores:
    """Gradients of the log joint at K particles, on a batch.

    Attributes:
        by_site: Site -> (K, ...), nats, full data.
        log_joint: (K,), nats, full data.
        nll: Negative log likelihood per datum, (K,), nats; None if the batch observes
            no data.
        repulsion: Strength of the repulsion at the minibatch loss.
    """

    by_site: Weights
    log_joint: Tensor
    nll: Tensor | None
    repulsion: float | Tensor


def scores_at(at: ParticlePass, repulsion: Repulsion) -> Scores:
    """Gradients of the log joint, and the minibatch loss if the strength asks for it.

    Args:
        at: The model at the particles, on a batch.
        repulsion: Strength of the repulsion.

    Raises:
        ValueError: If labels are missing, or a log density or a gradient is NaN or
            infinite.
    """
    losses: list[Tensor] = []
    num_data = 0
    size: Tensor | int = 0

    def objective(rows: slice, trace: Any, log_joint: Tensor) -> Tensor:
        nonlocal num_data, size
        at.target.check_observed(trace)
        if callable(repulsion):
            site = likelihood_at_particles(trace, at.target.obs_site)
            loss, size = datum_loss(site, log_joint.shape[0])
            losses.append(loss)
            num_data = data_plate(site).full_size
        return log_joint.sum()

    by_site, log_joint, nll = at.gradients(objective)
    if callable(repulsion):
        loss = at.whole(at.mean_over_data(torch.cat(losses), size))
        repulsion = repulsion(loss.mean(), num_data)
    return Scores(by_site, log_joint, nll, repulsion)


@dataclass(frozen=True)
class Independent:
    r"""No kernel: :math:`\phi_i = s_i`, with no 1 / K, so that one particle is MAP."""

    default_repulsion: None = None

    def check(self, target: ParticleModel) -> None:
        """Every model will do."""

    def direction(
        self, at: ParticlePass, temperature: float, repulsion: Repulsion
    ) -> Direction:
        """The tempered gradients of the log joint."""
        return self.move(at, scores_at(at, repulsion), temperature)

    def move(self, at: ParticlePass, scores: Scores, temperature: float) -> Direction:
        """Direction where the scores are known."""
        tempered = {s: x / temperature for s, x in scores.by_site.items()}
        zero = scores.log_joint.new_zeros(())
        return Direction(
            tempered, scores.log_joint, scores.nll, norm(tempered), zero, zero
        )


@dataclass(frozen=True)
class KernelSpace(ABC):
    """A space whose kernel compares weights.

    Attributes:
        kernel: A function of squared distances.
        transport: Stein or repulsive.
    """

    kernel: Kernel
    transport: Transport = STEIN

    @property
    def default_repulsion(self) -> Repulsion | None:
        """The transport's."""
        return self.transport.default_repulsion

    @abstractmethod
    def check(self, target: ParticleModel) -> None:
        """Refuse a model whose weights can't be compared so.

        Raises:
            ValueError: If it is one.
        """

    @abstractmethod
    def move(self, at: ParticlePass, scores: Scores, temperature: float) -> Direction:
        """Direction where the scores are known."""

    def direction(
        self, at: ParticlePass, temperature: float, repulsion: Repulsion
    ) -> Direction:
        """The scores by one pass of the model, and the direction that they give."""
        return self.move(at, scores_at(at, repulsion), temperature)


@dataclass(frozen=True)
class JointSpace(KernelSpace):
    """All weights together."""

    def check(self, target: ParticleModel) -> None:
        """Every model will do."""

    def move(self, at: ParticlePass, scores: Scores, temperature: float) -> Direction:
        """Direction where the scores are known."""
        products = [centred_products(x.detach()) for x in at.particles.values()]
        sq_dists = distances_from_products(torch.stack(products).sum(0))
        grams = dict.fromkeys(at.particles, gram_and_slope(self.kernel, sq_dists))
        return _combined(self.transport, grams, at.particles, scores, temperature)


@dataclass(frozen=True)
class SiteSpace(KernelSpace):
    """The weights of each site, one kernel a site."""

    def check(self, target: ParticleModel) -> None:
        """Every model will do."""

    def move(self, at: ParticlePass, scores: Scores, temperature: float) -> Direction:
        """Direction where the scores are known."""
        grams = {
            site: gram_and_slope(self.kernel, squared_distances(x.detach()))
            for site, x in at.particles.items()
        }
        return _combined(self.transport, grams, at.particles, scores, temperature)


def _combined(
    transport: Transport,
    grams: Mapping[str, tuple[Tensor, Tensor]],
    particles: Weights,
    scores: Scores,
    temperature: float,
) -> Direction:
    """The direction by the Gram matrix and slopes (K, K) of each site."""
    by_site, squares = {}, []
    for site, x in particles.items():
        pull, push = transport.weights(*grams[site], scores.repulsion)
        by_site[site], of_site = combine(
            scores.by_site[site], x.detach(), pull / temperature, push
        )
        squares.append(of_site)
    norms = (torch.stack(squares).sum(0) / len(scores.log_joint)).sqrt()
    mean_kernels = [mean_off_diagonal(gram) for gram, _ in grams.values()]
    mean_kernel = torch.stack(mean_kernels).mean()
    return Direction(
        by_site, scores.log_joint, scores.nll, norms[0], norms[1], mean_kernel
    )


def squared_distances(particles: Tensor) -> Tensor:
    """Squared distances between particles, by a Gram matrix.

    Args:
        particles: (K, ...).

    Returns:
        (K, K), zero on the diagonal, in float32 or wider.
    """
    return distances_from_products(centred_products(particles))


@outside_autocast()
def centred_products(particles: Tensor) -> Tensor:
    """Inner products of particles (K, ...) less their mean, (K, K).

    Distances are those of the particles themselves, with less cancellation. In float32
    or wider.
    """
    blocks = (_centred(block) for block in _blocks(particles))
    # A sum over weights, block by block: all of (K, D) is read once.
    return torch.stack([x @ x.mT for x in blocks]).sum(0)


def distances_from_products(gram: Tensor) -> Tensor:
    """Squared distances (K, K) of particles with inner products (K, K)."""
    # |x|^2 + |y|^2 - 2 <x, y>, symmetric also where rounding made the products not so
    norms = gram.diagonal()
    sq_dists = (norms[:, None] + norms[None, :] - gram - gram.mT).clamp_min(0)
    return sq_dists - torch.diag_embed(sq_dists.diagonal())


def gram_and_slope(kernel: Kernel, sq_dists: Tensor) -> tuple[Tensor, Tensor]:
    r"""Kernel and its derivative :math:`\kappa'` in the squared distance.

    Args:
        kernel: A function (K, K) -> (K, K), elementwise in the squared distances.
        sq_dists: (..., K, K).

    Returns:
        Gram matrix and slopes, both (..., K, K), constants.

    Raises:
        ValueError: If the kernel doesn't give a (K, K) matrix.
    """
    with torch.enable_grad():
        leaf = sq_dists.detach().requires_grad_()
        gram = kernel(leaf)
        if gram.shape != leaf.shape:
            raise ValueError(
                f"The kernel maps squared distances {tuple(leaf.shape)} to shape "
                f"{tuple(gram.shape)}; it must give the Gram matrix of the same shape."
            )
        # Each entry depends on its own distance alone, so this is elementwise.
        (slope,) = torch.autograd.grad(gram.sum(), leaf)
    # a particle doesn't repel itself, even if the slope is inf
    slope.diagonal(dim1=-2, dim2=-1).zero_()
    return gram.detach(), slope


@outside_autocast()
def combine(
    scores: Tensor, particles: Tensor, pull: Tensor, push: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Direction :math:`\phi_i = \sum_j (a_{ij} s_j + c_{ij} x_j)`, in one pass.

    Args:
        scores: s, (K, ...).
        particles: x, (K, ...).
        pull: a, (K, K).
        push: c, (K, K), with rows that add up to 0.

    Returns:
        (K, ...); and the sums of squares of both terms, (2,).
    """
    direction = torch.empty_like(particles, memory_format=torch.contiguous_format)
    rows = direction.view(len(particles), -1)
    squares, start = [], 0
    for s, x in zip(_blocks(scores), _blocks(particles), strict=True):
        x = _centred(x)  # c times their mean is 0, and its rounding errors are large
        attraction, repulsion = pull.to(x) @ s.to(x), push.to(x) @ x
        squares += [attraction.square().sum(), repulsion.square().sum()]
        stop = start + x.shape[1]
        rows[:, start:stop] = attraction.add_(repulsion)
        start = stop
    return direction, torch.stack(squares).double().view(-1, 2).sum(0)


@outside_autocast()
def attract(scores: Tensor, pull: Tensor) -> Tensor:
    """The first term alone, (K, ...)."""
    rows = at_least_float32(_rows(scores))
    return (pull.to(rows) @ rows).to(scores.dtype).reshape(scores.shape)


@outside_autocast()
def repel(particles: Tensor, push: Tensor) -> Tensor:
    """The second term alone, (K, ...)."""
    x = _centred(_rows(particles))
    return (push.to(x) @ x).reshape(particles.shape)


def spread(particles: Mapping[str, Tensor]) -> Tensor:
    """Root mean square distance of the particles from their mean, a scalar."""
    squares = [
        _centred(block).square().sum()
        for x in particles.values()
        for block in _blocks(x.detach())
    ]
    return _root_mean_square(squares, particles)


def mean_off_diagonal(gram: Tensor) -> Tensor:
    """Mean kernel value between different particles, (...) of (..., K, K).

    It is 1 where there is just one.
    """
    num_particles = gram.shape[-1]
    if num_particles == 1:
        return gram.new_ones(gram.shape[:-2])
    total = gram.sum((-2, -1)) - gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    return total / (num_particles * (num_particles - 1))


def norm(values: Mapping[str, Tensor]) -> Tensor:
    """Root mean square over particles of the norm over all sites, a scalar."""
    squares = [
        at_least_float32(block).square().sum()
        for x in values.values()
        for block in _blocks(x)
    ]
    return _root_mean_square(squares, values)


def _root_mean_square(squares: list[Tensor], like: Mapping[str, Tensor]) -> Tensor:
    num_particles = next(iter(like.values())).shape[0]
    return (torch.stack(squares).double().sum() / num_particles).sqrt()


def _rows(particles: Tensor) -> Tensor:
    return particles.reshape(particles.shape[0], -1)  # (K, D), D = 1 for scalars


def _blocks(particles: Tensor) -> tuple[Tensor, ...]:
    """Columns of the rows, in parts (K, n)."""
    return _rows(particles).split(max(1, block_size(particles) // len(particles)), 1)


def block_size(like: Tensor) -> int:
    """How many numbers are worked on at once where a tensor is."""
    return LARGE_BLOCK if like.is_cuda else BLOCK


def _centred(rows: Tensor) -> Tensor:
    rows = at_least_float32(rows)
    return rows - rows.mean(0)


def _differences(slope: Tensor) -> Tensor:
    # c of -2 sum_j kappa'_ij (x_i - x_j)
    return 2 * (slope - slope.sum(1).diag())
