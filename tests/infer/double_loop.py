"""SVGD written as its formulas: loops over pairs of particles, autograd on scalars."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Point = dict[str, Tensor]  # one particle, site -> value in unconstrained space
LogJoint = Callable[[Point], Tensor]
PairKernel = Callable[[Point, Point], Tensor]
Profile = Callable[[Tensor], Tensor]  # the kernel as a function of d^2 / (2 h^2)


def gaussian(scaled: Tensor) -> Tensor:
    return (-scaled).exp()


def points(particles: dict[str, Tensor]) -> list[Point]:
    num_particles = len(next(iter(particles.values())))
    return [
        {s: x[k].clone() for s, x in particles.items()} for k in range(num_particles)
    ]


def stack(of_points: list[Point]) -> dict[str, Tensor]:
    return {site: torch.stack([p[site] for p in of_points]) for site in of_points[0]}


def gradient(function: Callable[[Point], Tensor], at: Point) -> Point:
    leaves = {site: x.detach().clone().requires_grad_() for site, x in at.items()}
    gradients = torch.autograd.grad(
        function(leaves),
        list(leaves.values()),
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(leaves, gradients, strict=True))


def squared_distance(x: Point, y: Point, sites: list[str]) -> Tensor:
    return torch.stack([(x[s] - y[s]).square().sum() for s in sites]).sum()


def median_bandwidth(squared_distances: list[float], num_particles: int) -> float:
    """2 h^2: the lower median over the pairs i < j, divided by log(K + 1)."""
    ordered = sorted(squared_distances)
    return ordered[(len(ordered) - 1) // 2] / math.log(num_particles + 1)


def rbf(
    at: list[Point],
    sites: list[str],
    bandwidth: float | None,
    profile: Profile = gaussian,
) -> PairKernel:
    """A kernel over some sites; None takes the median over the particles."""
    if bandwidth is None:
        pairs = [
            squared_distance(at[i], at[j], sites).item()
            for i in range(len(at))
            for j in range(i + 1, len(at))
        ]
        twice_square = median_bandwidth(pairs, len(at))
    else:
        twice_square = 2 * bandwidth**2
    return lambda x, y: profile(squared_distance(x, y, sites) / twice_square)


def joint_rbf(
    at: list[Point], bandwidth: float | None, profile: Profile = gaussian
) -> dict[str, PairKernel]:
    return dict.fromkeys(at[0], rbf(at, list(at[0]), bandwidth, profile))


def site_rbf(
    at: list[Point], bandwidth: float | None, profile: Profile = gaussian
) -> dict[str, PairKernel]:
    return {site: rbf(at, [site], bandwidth, profile) for site in at[0]}


def attraction_and_repulsion(
    at: list[Point],
    log_joint: LogJoint,
    kernels: dict[str, PairKernel],
    temperature: float = 1.0,
) -> tuple[list[Point], list[Point]]:
    """Both terms of phi_i = mean_j [k(x_j, x_i) grad_j log p / T + grad_j k]."""
    num_particles = len(at)
    scores = [gradient(log_joint, x) for x in at]
    attraction: list[Point] = []
    repulsion: list[Point] = []
    for x_i in at:
        pull = {site: torch.zeros_like(x) for site, x in x_i.items()}
        push = {site: torch.zeros_like(x) for site, x in x_i.items()}
        for x_j, score in zip(at, scores, strict=True):
            for site, kernel in kernels.items():
                slope = gradient(lambda x, k=kernel, x_i=x_i: k(x, x_i), x_j)[site]
                k = kernel(x_j, x_i)
                pull[site] += k * score[site] / temperature / num_particles
                push[site] += slope / num_particles
        attraction.append(pull)
        repulsion.append(push)
    return attraction, repulsion


def stein(
    at: list[Point],
    log_joint: LogJoint,
    kernels: dict[str, PairKernel],
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    attraction, repulsion = attraction_and_repulsion(
        at, log_joint, kernels, temperature
    )
    both = zip(attraction, repulsion, strict=True)
    return stack([{site: a[site] + r[site] for site in a} for a, r in both])


def repulsive(
    at: list[Point],
    log_joint: LogJoint,
    kernels: dict[str, PairKernel],
    temperature: float,
    strength: float,
) -> dict[str, Tensor]:
    """phi_i = grad_i log p / T - strength grad_i log sum_j k(x_i, x_j)."""
    directions = []
    for x_i in at:
        score = gradient(log_joint, x_i)
        direction = {}
        for site, kernel in kernels.items():

            def log_density(x: Point, kernel: PairKernel = kernel) -> Tensor:
                return torch.stack([kernel(x, x_j) for x_j in at]).sum().log()

            push = gradient(log_density, x_i)[site]
            direction[site] = score[site] / temperature - strength * push
        directions.append(direction)
    return stack(directions)


def function_space(
    at: list[Point],
    log_joint: LogJoint,
    outputs: Callable[[Point], Tensor],
    bandwidth: float | None,
    temperature: float,
    strength: float,
    profile: Profile = gaussian,
) -> dict[str, Tensor]:
    """The same with k between the outputs (B, M) on the minibatch."""
    fixed = [outputs(x).detach() for x in at]
    batch_size = fixed[0].shape[0]

    def distance(f: Tensor, g: Tensor) -> Tensor:
        return (f - g).square().sum() / batch_size

    if bandwidth is None:
        pairs = [
            distance(fixed[i], fixed[j]).item()
            for i in range(len(at))
            for j in range(i + 1, len(at))
        ]
        twice_square = median_bandwidth(pairs, len(at))
    else:
        twice_square = 2 * bandwidth**2

    def objective(x: Point) -> Tensor:
        f = outputs(x)
        kernel = torch.stack([profile(distance(f, g) / twice_square) for g in fixed])
        return log_joint(x) / temperature - strength * kernel.sum().log()

    return stack([gradient(objective, x) for x in at])
