"""How the cost of the Stein direction grows with particles and weights.

Used by ``python -m benchmarks.svgd``.
"""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import pyro_lora as pl
from benchmarks.main_job import alternating_medians
from benchmarks.tables import header
from pyro_lora.infer.svgd.particle_model import ParticleModel, ParticlePass
from pyro_lora.infer.svgd.weight_space import JointSpace, Scores

Job = Callable[[], Any]


def direction(particles: Tensor, scores: Tensor) -> Tensor:
    """Kernel and Stein direction of particles (K, D), as SVGD's steps find them."""
    target = ParticleModel(lambda: None, {}, 0, (), False, (), None)
    at = ParticlePass(target, {"x": particles}, (), {}, len(particles))
    known = Scores({"x": scores}, scores.new_zeros(len(scores)), None, 1.0)
    return JointSpace(pl.kernels.RBF()).move(at, known, 1.0).by_site["x"]


def growth(
    counts: list[int], sizes: list[int], repeats: int, device: str
) -> dict[tuple[int, int], float]:
    """Seconds of the joint Stein direction for N particles and D weights."""
    most = max(counts) * max(sizes)
    buffers = [torch.randn(most, device=device) for _ in range(2)]
    times = {}
    for count, size in itertools.product(counts, sizes):
        x, scores = (b[: count * size].view(count, size) for b in buffers)
        jobs: dict[str, Job] = {"": lambda x=x, s=scores: direction(x, s)}  # type: ignore[misc]
        large = count * size > 10**8
        times[count, size] = alternating_medians(jobs, 1 if large else repeats)[""]
    return times


def exponent(times: dict[int, float]) -> float:
    """Slope of log time over log size, by least squares."""
    x = torch.tensor([math.log(size) for size in times])
    y = torch.tensor([math.log(value) for value in times.values()])
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x @ x))


def growth_table(
    times: dict[tuple[int, int], float], gradients: dict[int, float]
) -> list[str]:
    """Both costs over N, and the exponents of their growth."""
    counts, sizes = (sorted(set(x)) for x in zip(*times, strict=True))
    lines = header(
        "N",
        *(f"D={size:.0e}, ms" for size in sizes),
        "exponent in D",
        "gradients, ms",
        "ms per particle",
    )
    for n in counts:
        row = {size: times[n, size] for size in sizes}
        large = {size: value for size, value in row.items() if size >= sizes[-1] / 100}
        cells = [str(n), *(f"{1e3 * value:.2f}" for value in row.values())]
        cells.append(f"{exponent(large):.2f}")
        if n in gradients:
            cells += [f"{1e3 * gradients[n]:.0f}", f"{1e3 * gradients[n] / n:.1f}"]
        else:
            cells += ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    in_counts = exponent({n: times[n, sizes[-1]] for n in counts})
    return [
        *lines,
        "",
        f"Exponents in N: {in_counts:.2f} for the direction at D={sizes[-1]:.0e}, "
        f"{exponent(gradients):.2f} for the gradients.",
    ]


def plot(
    times: dict[tuple[int, int], float], gradients: dict[int, float], path: Path
) -> None:
    """Cost of the direction over N D, and of both over N."""
    counts, sizes = (sorted(set(x)) for x in zip(*times, strict=True))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for n in counts:
        values = [1e3 * times[n, size] for size in sizes]
        left.loglog([n * size for size in sizes], values, "o-", label=f"N={n}")
    ends = [counts[0] * sizes[-1], counts[-1] * sizes[-1]]
    start = 1e3 * times[counts[0], sizes[-1]]
    left.loglog(ends, [start * x / ends[0] for x in ends], "k:", label="linear in N D")
    left.set(xlabel="N D", ylabel="ms", title="Stein direction")
    for size in sizes:
        values = [1e9 * times[n, size] / (n * size) for n in counts]
        right.semilogx(counts, values, "o-", label=f"D={size:.0e}", base=2)
    right.set(xlabel="N", ylabel="ns for a number", ylim=(0, None), title="over N D")
    twin = right.twinx()
    alone = [1e3 * value / n for n, value in gradients.items()]
    twin.plot(list(gradients), alone, "ks--", label="gradients")
    twin.set(ylabel="ms for a particle's gradients", ylim=(0, None))
    left.legend(fontsize="small")
    right.legend(fontsize="small", loc="upper left")
    twin.legend(fontsize="small", loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)
