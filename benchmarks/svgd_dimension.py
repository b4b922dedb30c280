"""How much of a Gaussian's variance 20 particles keep as the number of weights grows.

Usage: ``python -m benchmarks.svgd_dimension [--quick] [--out benchmarks/results]``.

The target is the posterior of a linear network whose data say all about its weights: a
standard Gaussian, or one with covariances of condition number 100, whose marginal
variances are 1 too. Particles start at exact draws, and move until they stay.
"""

import argparse
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
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
from benchmarks.lifting import header, machine
from pyro_lora.infer.transport import (
    attract,
    gram_and_slope,
    squared_distances,
    stein_repulsion,
)

NUM_PARTICLES = 20
CONDITION = 100.0  # of the ill-conditioned covariance
FLAT = 1e-3  # prior precision over the smallest precision of the posterior
SIDES = {1: (1, 1), 10: (5, 2), 100: (10, 10), 1000: (100, 10), 10_000: (100, 100)}
LORA = {10: (1, 5), 100: (2, 25), 1000: (4, 125), 10_000: (4, 1250)}  # rank, side
NUM_HEADS = 10  # sites in the kernel space that has one kernel a site
NUM_STEPS, LEARNING_RATE, LAST_RATE = 200, 0.3, 3e-4
KERNELS = {"RBF": pl.kernels.RBF, "IMQ": pl.kernels.IMQ, "Mixture": pl.kernels.Mixture}
LOG = math.log(NUM_PARTICLES + 1)


def spectrum(size: int, condition: float) -> Tensor:
    """Eigenvalues of a circulant covariance with marginal variances 1, by frequency."""
    half = condition ** -(torch.arange(size // 2 + 1) / max(1, size // 2))
    whole = torch.cat([half, half[1 : (size + 1) // 2].flip(0)])
    return half / whole.mean()


def filtered(x: Tensor, factors: Tensor) -> Tensor:
    """Multiply the Fourier coefficients along the last dim."""
    return torch.fft.irfft(torch.fft.rfft(x) * factors, n=x.shape[-1])


class Heads(nn.Module):
    """A linear network without bias, whose outputs are those of several layers."""

    def __init__(self, num_inputs: int, num_outputs: int, num_heads: int) -> None:
        super().__init__()
        for name in "abcdefghij"[:num_heads]:
            setattr(self, name, nn.Linear(num_inputs, num_outputs // num_heads, False))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (..., O) of inputs (..., I)."""
        return torch.cat([head(x) for head in self.children()], -1)


@dataclass(frozen=True)
class Variances:
    """Of particles over those of the posterior: 1 is right, 0 is collapsed."""

    marginal: float
    widest: float
    narrowest: float


@dataclass(frozen=True, eq=False)
class Problem:
    """A lifted network, a Pyro model that calls it, and the data."""

    lora: pl.LiftedNetwork
    model: Callable[..., None]
    data: dict[str, Tensor]


@dataclass(frozen=True)
class Target:
    """A Gaussian over O rows of I weights, each with a circulant covariance.

    Attributes:
        size: D = I O.
        condition: Of the covariance.
    """

    size: int
    condition: float

    @property
    def eigenvalues(self) -> Tensor:
        """Of the covariance of a row, by frequency."""
        return spectrum(SIDES[self.size][0], self.condition)

    def draws(self) -> Tensor:
        """Where particles start, (K, O, I)."""
        torch.manual_seed(0)
        num_inputs, num_outputs = SIDES[self.size]
        noise = torch.randn(NUM_PARTICLES, num_outputs, num_inputs)
        return filtered(noise, self.eigenvalues.sqrt())

    def problem(self, num_heads: int = 1) -> Problem:
        """A linear network, its Pyro model and the data with this posterior."""
        num_inputs, num_outputs = SIDES[self.size]
        precision = 1 / self.eigenvalues
        flat = FLAT * precision.min()
        prior = pl.priors.normal(scale=float(flat**-0.5))
        lora = pl.lift(Heads(num_inputs, num_outputs, num_heads), prior=prior)

        def model(x: Tensor, y: Tensor) -> None:
            outputs = lora()(x)
            if y.ndim == 1:  # each output a datum, as function space wants it
                outputs = outputs.flatten(-2)
            with pyro.plate("data", len(y), subsample=y):
                fn = dist.Normal(outputs, 1.0).to_event(y.ndim - 1)
                pyro.sample("y", fn, obs=y)

        x = filtered(torch.eye(num_inputs), (precision - flat).sqrt())
        return Problem(lora, model, {"x": x, "y": torch.zeros(num_inputs, num_outputs)})

    def summary(self, particles: Tensor) -> Variances:
        """What particles (K, O, I) keep."""
        particles = particles.detach()
        waves = torch.fft.rfft(particles - particles.mean(0), norm="ortho")
        along = waves.abs().square().sum(0).mean(0) / (NUM_PARTICLES - 1)
        return variances(particles.var(0), along / self.eigenvalues)


def variances(marginal: Tensor, along: Tensor) -> Variances:
    """Means of variances over the posterior's, along axes from wide to narrow."""
    tenth = max(1, len(along) // 10)
    parts = (marginal, along[:tenth], along[-tenth:])
    return Variances(*(float(x.mean()) for x in parts))


def optimizer() -> pyro.optim.PyroLRScheduler:
    """Adam, whose rate falls until particles stay where they are."""
    return pyro.optim.ExponentialLR(
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": LEARNING_RATE},
            "gamma": (LAST_RATE / LEARNING_RATE) ** (1 / NUM_STEPS),
        }
    )


def ours(
    target: Target,
    kernel: Any,
    num_heads: int = 1,
    preconditioned: bool = False,
    apart: bool = False,
    **options: Any,
) -> Variances:
    """Of ``pyro_lora.SVGD``; with ``apart`` from draws without correlations."""
    num_heads = min(num_heads, SIDES[target.size][1])
    problem = target.problem(num_heads)
    lora, model, data = problem.lora, problem.model, problem.data
    if kernel.space == "function":
        data = {**data, "y": data["y"].flatten()}
    draws = Target(target.size, 1.0).draws() if apart else target.draws()
    parts = draws.chunk(num_heads, 1)
    start = {s: x[:, None] for s, x in zip(lora.sites, parts, strict=True)}
    optim: pyro.optim.PyroOptim = optimizer()
    if preconditioned:
        guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to(lora.zeros()))
        options["preconditioner"] = guide.laplace_approximation([data])
        optim = pyro.optim.SGD({"lr": 0.5})  # half a Newton step
    particles = moved(lora, model, data, kernel, start, optim, **options)
    return target.summary(torch.cat([particles[s][:, 0] for s in lora.sites], 1))


def moved(
    lora: pl.LiftedNetwork,
    model: Callable[..., None],
    data: dict[str, Tensor],
    kernel: pl.kernels.Kernel,
    start: dict[str, Tensor],
    optim: pyro.optim.PyroOptim,
    **options: Any,
) -> dict[str, Tensor]:
    """Particles after all steps, site -> (K, ...)."""
    init = lora.init_to(start)
    svgd = pl.SVGD(model, kernel, optim, NUM_PARTICLES, init_loc_fn=init, **options)
    svgd.run([data], num_epochs=NUM_STEPS, progress_bar=False)
    return svgd.get_named_particles()


def of_factors(target: Target, kernel: pl.kernels.Kernel) -> Variances | None:
    """Where a kernel compares LoRA's updates B A, for a Gaussian over A and B."""
    if target.size not in LORA:
        return None
    rank, side = LORA[target.size]
    torch.manual_seed(0)
    order = torch.randperm(target.size)
    values = spectrum(target.size, target.condition)
    mirrored = values[1 : (target.size + 1) // 2].flip(0)
    variance = torch.cat([values, mirrored])[order]
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
    particles = moved(lora, model, {}, kernel, start, optimizer())
    found = {site[-1]: x.var(0).flatten() for site, x in particles.items()}
    ratio = torch.cat([found["A"], found["B"]]) / variance
    return variances(ratio, ratio[variance.argsort(descending=True)])


def pyros(target: Target, mode: str) -> Variances:
    """Of ``pyro.infer.SVGD``, which doesn't mix particles where there is one site."""
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
    optim = optimizer()
    for _ in range(NUM_STEPS):
        score = -filtered(x.detach(), 1 / target.eigenvalues)
        gram, slope = gram_and_slope(kernel, squared_distances(x.detach()))
        push = stein_repulsion(x.detach(), slope)
        x.grad = -(attract(score, gram.fill_diagonal_(share)) + push)
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
        rows[f"coordinate, {name}"] = partial(ours, kernel=kernel(space="coordinate"))
        rows[f"delta, {name}"] = partial(of_factors, kernel=kernel(space="delta"))
        rows[f"function, {name}, β = 1"] = partial(
            ours, kernel=kernel(space="function"), repulsion=1.0
        )
    rbf, function = pl.kernels.RBF(), pl.kernels.RBF(space="function")
    rows["joint, RBF, repulsive, β = 1"] = partial(
        ours, kernel=rbf, transport="repulsive"
    )
    rows["coordinate, RBF, from N(0, 1)"] = partial(
        ours, kernel=pl.kernels.RBF(space="coordinate"), apart=True
    )
    rows["damped, RBF"] = damped
    rows["joint, RBF, T = D / log(K + 1)"] = scaled(temperature=1, kernel=rbf)
    strong = partial(scaled, repulsion=2)
    name = "β = 2 D / log(K + 1)"
    rows[f"joint, RBF, {name}"] = strong(kernel=rbf, transport="repulsive")
    rows[f"function, RBF, {name}"] = strong(kernel=function)
    rows[f"preconditioned, RBF, {name}"] = strong(
        kernel=rbf, transport="repulsive", preconditioned=True
    )
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
    for size in sizes:
        for condition in (1.0, CONDITION):
            target = Target(size, condition)
            for name, method in methods().items():
                start = time.perf_counter()
                found[name, target] = method(target)
                seconds = time.perf_counter() - start
                print(f"{target} {name}: {found[name, target]}, {seconds:.1f} s")
    return found


def table(
    found: dict[tuple[str, Target], Variances | None], sizes: Sequence[int]
) -> list[str]:
    """Marginal variances on both targets, and those along the axes of the second."""
    largest = Target(sizes[-1], CONDITION)
    lines = header(
        "kernel",
        *(f"D = {size}" for size in sizes),
        *(f"ill, D = {size}" for size in sizes),
        *("widest", "narrowest"),
    )
    for name in methods():
        cells = [
            number(v.marginal if (v := found[name, Target(size, condition)]) else None)
            for condition in (1.0, CONDITION)
            for size in sizes
        ]
        last = found[name, largest]
        axes = [last.widest, last.narrowest] if last else [None, None]
        cells += [number(x) for x in axes]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def number(x: float | None) -> str:
    """Three digits; nothing where nothing was measured."""
    if x is None:
        return ""
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
        "coordinate, RBF": ("C5", "-"),
        "coordinate, RBF, from N(0, 1)": ("C5", "--"),
        "damped, RBF": ("C6", "-"),
        "joint, RBF, β = 2 D / log(K + 1)": ("C3", ":"),
        "function, RBF, β = 2 D / log(K + 1)": ("C2", "--"),
        "preconditioned, RBF, β = 2 D / log(K + 1)": ("C3", "-"),
    }
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharex=True, sharey=True)
    for ax, condition in zip(axes, (1.0, CONDITION), strict=True):
        for name, (color, style) in lines.items():
            points = {
                size: v.marginal
                for size in sizes
                if (v := found[name, Target(size, condition)])
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
    packages = ["torch", "pyro-ppl", "matplotlib"]
    laws = [
        f"| {name} | {law(kernel(), 'stein'):.2f} | {law(kernel(), 'repulsive'):.2f} |"
        for name, kernel in KERNELS.items()
    ]
    return [
        "# SVGD and the number of weights",
        "",
        f"Variances of {NUM_PARTICLES} particles over those of the posterior, a "
        "Gaussian over D weights of a linear network: marginal ones, for a standard "
        f"Gaussian and for one of condition number {CONDITION:.0f} whose marginal "
        'variances are 1, too ("ill"); and, of the last, those along the widest and '
        f"the narrowest tenth of its axes at D = {sizes[-1]}. 1 is right. Particles "
        f"start at exact draws and take {NUM_STEPS} steps of Adam whose rate falls "
        f"from {LEARNING_RATE} to {LAST_RATE}, in float32. Bandwidths are by the median "
        "heuristic, and the transport is Stein's unless β, the strength of the "
        "repulsive one, is given. One seed; the numbers are means over weights.",
        "",
        f"{date.today()}, {machine('cpu')}, Python {platform.python_version()}, "
        + ", ".join(f"{p} {version(p)}" for p in packages)
        + ".",
        "",
        *table(found, sizes),
        "",
        '"site" has ten sites of equal size (fewer at D = 10 and 1). "delta" is a '
        "Gaussian over a LoRA pair's factors, the ill-conditioned one with a variance "
        'for each weight. "damped" (after Ba et al. 2022, '
        "https://openreview.net/forum?id=Qycd9j5Qp9J) weighs a particle's own gradient "
        "by (1 + K log(K + 1) / D) / (K + 1). "
        '"preconditioned" has a Laplace posterior as its metric and '
        "takes half Newton steps.",
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
