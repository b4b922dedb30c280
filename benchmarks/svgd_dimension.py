"""How much of a Gaussian's variance 20 particles keep as the number of weights grows.

Usage: ``python -m benchmarks.svgd_dimension [--quick] [--out benchmarks/results]``.

The target is the posterior of a linear network whose data say all about its weights: a
standard Gaussian, or one with covariances of condition number 100, whose marginal
variances are 1 too. Particles start at exact draws, and move until they stay.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import pyro.infer
import pyro.optim
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import pyro_lora as pl
from benchmarks.linear_gaussians import (
    NUM_PARTICLES,
    SIDES,
    Target,
    Variances,
    spectrum,
    variances,
)
from benchmarks.tables import header, provenance
from pyro_lora.infer.svgd.weight_space import (
    STEIN,
    combine,
    gram_and_slope,
    squared_distances,
)

CONDITION = 100.0  # of the ill-conditioned covariance
LORA = {10: (1, 5), 100: (2, 25), 1000: (4, 125), 10_000: (4, 1250)}  # rank, side
NUM_HEADS = 10  # sites in the kernel space that has one kernel a site
NUM_STEPS, NUM_DAMPED_STEPS, LEARNING_RATE, LAST_RATE = 200, 2000, 0.3, 3e-4
KERNELS = {"RBF": pl.kernels.RBF, "IMQ": pl.kernels.IMQ, "Mixture": pl.kernels.Mixture}
LOG = math.log(NUM_PARTICLES + 1)


def optimizer(num_steps: int = NUM_STEPS) -> pyro.optim.PyroLRScheduler:
    """Adam, whose rate falls until particles stay where they are."""
    return pyro.optim.ExponentialLR(
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": LEARNING_RATE},
            "gamma": (LAST_RATE / LEARNING_RATE) ** (1 / num_steps),
        }
    )


def ours(
    target: Target,
    kernel: Any,
    num_heads: int = 1,
    **options: Any,
) -> Variances:
    """Of ``pyro_lora.SVGD``."""
    num_heads = min(num_heads, SIDES[target.size][1])
    problem = target.problem(num_heads)
    lora, model, data = problem.lora, problem.model, problem.data
    if kernel.space == "function":
        data = {**data, "y": data["y"].flatten()}
    parts = target.draws().chunk(num_heads, 1)
    start = {s: x[:, None] for s, x in zip(lora.sites, parts, strict=True)}
    particles = moved(lora, model, data, kernel, start, **options)
    return target.summary(torch.cat([particles[s][:, 0] for s in lora.sites], 1))


def moved(
    lora: pl.LiftedNetwork,
    model: Callable[..., None],
    data: dict[str, Tensor],
    kernel: pl.kernels.Kernel,
    start: dict[str, Tensor],
    **options: Any,
) -> dict[str, Tensor]:
    """Particles after all steps, site -> (K, ...)."""
    init = lora.init_to(start)
    svgd = pl.SVGD(
        model, kernel, optimizer(), NUM_PARTICLES, init_loc_fn=init, **options
    )
    svgd.run([data], num_epochs=NUM_STEPS, progress_bar=False)
    return svgd.get_named_particles()


def of_factors(target: Target, kernel: pl.kernels.Kernel) -> Variances | None:
    """Where a kernel compares LoRA's updates B A, for a Gaussian over A and B."""
    if target.size not in LORA:
        return None
    rank, side = LORA[target.size]
    torch.manual_seed(0)
    variance = spectrum(target.size, target.condition)[torch.randperm(target.size)]
    by_role = dict(zip("AB", variance.sqrt().split(rank * side), strict=True))

    def prior(lora: pl.LiftedNetwork) -> dict[str, Tensor]:
        weights = {}
        for site, zeros in lora.zeros().items():
            fn = dist.Normal(zeros, by_role[site[-1]].view_as(zeros))
            weights[site] = pyro.sample(site, fn.to_event(zeros.ndim))
        return weights

    network = nn.Sequential(nn.Linear(side, side, bias=False))
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
    lora = pl.lift(get_peft_model(network, config), prior=prior)

    def model() -> None:
        lora()

    start = {
        site: by_role[site[-1]].view_as(x) * torch.randn(NUM_PARTICLES, *x.shape)
        for site, x in lora.zeros().items()
    }
    particles = moved(lora, model, {}, kernel, start)
    found = {site[-1]: x.var(0).flatten() for site, x in particles.items()}
    wide_first = variance.argsort(descending=True)
    flat = torch.cat([found["A"], found["B"]])
    return variances(flat[wide_first], variance[wide_first])


def pyros(target: Target, mode: str) -> Variances:
    """Of ``pyro.infer.SVGD``, which doesn't mix particles where there is one site."""
    target = replace(target, turned=True)
    problem = target.problem()
    start = target.draws()
    optim = optimizer()
    with pyro.get_param_store().scope():
        svgd = pyro.infer.SVGD(
            problem.model,
            pyro.infer.RBFSteinKernel(),
            optim,
            NUM_PARTICLES,
            max_plate_nesting=1,
            mode=mode,
        )
        pyro.param("svgd_particles", start.flatten())
        for _ in range(NUM_STEPS):
            svgd.step(**problem.data)
            optim.step()
        (particles,) = svgd.get_named_particles().values()
    return target.summary(particles.reshape(start.shape))


def damped(target: Target) -> Variances:
    r"""Where a particle's own gradient counts less than in SVGD (Ba et al. 2022).

    With :math:`\lambda \nabla \log p(x_i)` in place of it, particles at equal distances
    have the right variance at :math:`\lambda = (1 + K \log(K + 1) / D) / (K + 1)`.
    """
    share = min(1.0, (1 + NUM_PARTICLES * LOG / target.size) / (NUM_PARTICLES + 1))
    kernel = pl.kernels.RBF()
    x = target.draws().requires_grad_()
    optim = optimizer(NUM_DAMPED_STEPS)
    for _ in range(NUM_DAMPED_STEPS):
        at = x.detach()
        score = -at / target.spectrum
        gram, slope = gram_and_slope(kernel, squared_distances(at))
        weights = STEIN.weights(gram.fill_diagonal_(share), slope, 1.0)
        x.grad = -combine(score, at, *weights)[0]
        optim([x])
        optim.step()
    return target.summary(x)


def law(kernel: pl.kernels.Kernel, form: str) -> float:
    """D times the variance of particles at equal distances, in closed form.

    With k the kernel between two of them and k' its slope at a squared distance of 1,
    it is -k' K / (1 - k) for ``"stein"``, -k' K / (1 + (K - 1) k) for ``"repulsive"``.
    """
    gram, slope = gram_and_slope(kernel, 1 - torch.eye(NUM_PARTICLES))
    k, push = float(gram[0, 1]), -float(slope[0, 1]) * NUM_PARTICLES
    return push / (1 - k if form == "stein" else 1 + (NUM_PARTICLES - 1) * k)


def methods() -> dict[str, Callable[[Target], Variances | None]]:
    """Row of the tables -> what it measures."""
    rows: dict[str, Callable[[Target], Variances | None]] = {
        f"pyro.infer.SVGD, RBF, {mode}": partial(pyros, mode=mode)
        for mode in ("multivariate", "univariate")
    }
    for name, kernel in KERNELS.items():
        rows[f"joint, {name}"] = partial(ours, kernel=kernel())
        rows[f"site, {name}"] = partial(
            ours, kernel=kernel(space="site"), num_heads=NUM_HEADS
        )
        rows[f"delta, {name}"] = partial(of_factors, kernel=kernel(space="delta"))
        rows[f"function, {name}, β = 1"] = partial(
            ours, kernel=kernel(space="function"), repulsion=1.0
        )
    rbf, function = pl.kernels.RBF(), pl.kernels.RBF(space="function")
    rows["joint, RBF, repulsive, β = 1"] = partial(
        ours, kernel=rbf, transport="repulsive"
    )
    rows["damped, RBF"] = damped
    rows["joint, RBF, T = D / log(K + 1)"] = scaled(temperature=1, kernel=rbf)
    strong = partial(scaled, repulsion=2)
    name = "β = 2 D / log(K + 1)"
    rows[f"joint, RBF, {name}"] = strong(kernel=rbf, transport="repulsive")
    rows[f"function, RBF, {name}"] = strong(kernel=function)
    return rows


def scaled(**options: Any) -> Callable[[Target], Variances]:
    """A method with its temperature or repulsion multiplied by D / log(K + 1)."""

    def method(target: Target) -> Variances:
        factor = max(1.0, target.size / LOG)
        names = {"temperature", "repulsion"} & options.keys()
        return ours(target, **options | {n: factor * options[n] for n in names})

    return method


def measure(sizes: Sequence[int]) -> dict[tuple[str, Target], Variances | None]:
    """Every method on every target."""
    found = {}
    for condition in (1.0, CONDITION):
        for size in sizes if condition == 1 else sizes[1:]:
            target = Target(size, condition)
            for name, method in methods().items():
                start = time.perf_counter()
                found[name, target] = method(target)
                seconds = time.perf_counter() - start
                print(
                    f"{target} {name}: {found[name, target]}, {seconds:.1f} s",
                    flush=True,
                )
    return found


def table(
    found: dict[tuple[str, Target], Variances | None], sizes: Sequence[int]
) -> list[str]:
    """Marginal variances on both targets, and those along the axes of the second."""
    largest = Target(sizes[-1], CONDITION)
    lines = header(
        "kernel",
        *(f"D = {size}" for size in sizes),
        *(f"ill, D = {size}" for size in sizes[1:]),
        *("widest", "narrowest"),
    )
    for name in methods():
        cells = [
            number(v.marginal) if v else ""
            for (row, _), v in found.items()
            if row == name
        ]
        if last := found[name, largest]:
            cells += [number(last.widest), number(last.narrowest)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def number(x: float) -> str:
    """Two digits."""
    return f"{x:.1e}" if x < 5e-4 else f"{x:.2g}" if x < 0.1 else f"{x:.2f}"


def plot(
    found: dict[tuple[str, Target], Variances | None],
    sizes: Sequence[int],
    path: Path,
) -> None:
    """Marginal variances over D, one panel a target."""
    lines = {
        "pyro.infer.SVGD, RBF, multivariate": ("0.6", ":"),
        "joint, RBF": ("C0", "-"),
        "joint, IMQ": ("C0", "--"),
        "joint, Mixture": ("C0", ":"),
        "site, RBF": ("C1", "-"),
        "delta, RBF": ("C4", "-"),
        "function, RBF, β = 1": ("C2", "-"),
        "damped, RBF": ("C6", "-"),
        "joint, RBF, β = 2 D / log(K + 1)": ("C3", ":"),
        "function, RBF, β = 2 D / log(K + 1)": ("C2", "--"),
    }
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharex=True, sharey=True)
    for ax, condition in zip(axes, (1.0, CONDITION), strict=True):
        for name, (color, style) in lines.items():
            points = {
                size: v.marginal
                for size in sizes
                if (v := found.get((name, Target(size, condition))))
            }
            ax.plot(points.keys(), points.values(), style, color=color, label=name)
        ax.axhline(1, color="k", linewidth=0.5)
        ax.set(xscale="log", yscale="log", ylim=(1e-4, 10), xlabel="weights D")
    axes[0].set(title="standard Gaussian", ylabel="marginal variance / posterior's")
    axes[1].set(title=f"condition number {CONDITION:.0f}")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="center right", fontsize="small"
    )
    figure.tight_layout(rect=(0, 0, 0.71, 1))
    figure.savefig(path, dpi=150)


def report(
    found: dict[tuple[str, Target], Variances | None], sizes: Sequence[int]
) -> list[str]:
    """All of it, in Markdown."""
    laws = [
        f"| {name} | {law(kernel(), 'stein'):.2f} | {law(kernel(), 'repulsive'):.2f} |"
        for name, kernel in KERNELS.items()
    ]
    return [
        "# SVGD and the number of weights",
        "",
        f"Variances of {NUM_PARTICLES} particles over those of the posterior, a "
        "Gaussian over D weights of a linear network: the mean over weights, for a "
        f'standard Gaussian and for one of condition number {CONDITION:.0f} ("ill"); '
        "and, of the last, along the widest and the narrowest tenth of its axes at "
        f"D = {sizes[-1]}. 1 is right. Particles start at exact draws and take "
        f"{NUM_STEPS} steps of Adam whose rate falls from {LEARNING_RATE} to "
        f"{LAST_RATE}, float32. Bandwidths are by the median heuristic, and the "
        "transport is Stein's unless β, the strength of the repulsive one, is given. "
        "One seed.",
        "",
        provenance("matplotlib"),
        "",
        *table(found, sizes),
        "",
        "The ill-conditioned Gaussian's axes are those of the weights, so that Adam "
        "settles; for Pyro's SVGD, which sees weights one by one, they are turned at "
        'random. "site" has ten sites of one size (two at D = 10). "delta" is a '
        'Gaussian over the factors of a LoRA pair. "damped" (after Ba et al. 2022, '
        "https://openreview.net/forum?id=Qycd9j5Qp9J) weighs a particle's own gradient "
        "by (1 + K log(K + 1) / D) / (K + 1), and takes ten times as many steps.",
        "",
        "Where D exceeds K the particles of one kernel come to lie at equal distances. "
        "Their variance is then c / D in closed form, with c:",
        "",
        *header("kernel", "stein", "repulsive, β = 1"),
        *laws,
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test, which writes nothing"
    )
    args = parser.parse_args()
    sizes = list(SIDES)[:2] if args.quick else list(SIDES)
    found = measure(sizes)
    lines = report(found, sizes)
    print("\n".join(lines))
    if not args.quick:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "svgd_dimension.md").write_text("\n".join(lines))
        plot(found, sizes, args.out / "svgd_dimension.png")


if __name__ == "__main__":
    main()
