"""Cost of the main job: a KFAC fit and an SVGD step, in units of MAP training.

Usage: ``python -m benchmarks.main_job [--repeats 5] [--out benchmarks/results]``, on a
quiet machine. The network and data are the demo's.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

import pyro_lora as pl
from examples import recipe, text, vader

NUM_PARTICLES = 5
NUM_ROWS = 256  # eight batches: an epoch's cost is the same for each
TARGETS = {"KFAC fit / MAP epoch": 1.3, "SVGD step / K MAP steps": 1.0}


def seconds(function: Callable[[], Any]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternating_medians(
    jobs: dict[str, Callable[[], Any]], repeats: int
) -> dict[str, float]:
    """Median seconds of each job; the jobs take turns, so that drift hits all."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values():  # warm up
        job()
    for _ in range(repeats):
        for name, job in jobs.items():
            times[name].append(seconds(job))
    return {name: statistics.median(t) for name, t in times.items()}


def measure(layers: str, repeats: int, device: str) -> dict[str, float]:
    """Medians of an epoch, a fit, and of an epoch of SVGD in each space."""
    network, tokenizer = text.load_network(
        text.default_model(),
        num_classes=2,
        layers=layers,
        device=device,
    )
    rows = vader.load().train[:NUM_ROWS]
    batches = list(text.batches(rows, tokenizer, device=device, shuffle_seed=0))
    lora = pl.lift(network, prior=pl.priors.normal(scale=recipe.PRIOR_PRECISION**-0.5))
    model = recipe.classifier(lora, len(rows))
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_fresh())
    svi = SVI(model, guide, Adam({"lr": 1e-4}), Trace_ELBO())

    def epoch(step: Callable[..., Any]) -> Callable[[], None]:
        def run() -> None:
            for batch in batches:
                step(**batch)

        return run

    def svgd(kernel: Any, num_particles: int) -> pl.SVGD:
        return pl.SVGD(
            model,
            kernel,
            Adam({"lr": 1e-4}),
            num_particles,
            init_loc_fn=lora.init_to_fresh(),
        )

    jobs = {
        "MAP epoch (SVI)": epoch(svi.step),
        "KFAC fit": lambda: guide.laplace_approximation(batches),
        "SVGD epoch, K=1, Zero": epoch(svgd(pl.kernels.Zero(), 1).step),
    }
    for name, kernel in {
        "Zero": pl.kernels.Zero(),
        "joint": pl.kernels.RBF(),
        "site": pl.kernels.RBF(space="site"),
        "function": pl.kernels.RBF(space="function"),
    }.items():
        jobs[f"SVGD epoch, K={NUM_PARTICLES}, {name}"] = epoch(
            svgd(kernel, NUM_PARTICLES).step
        )
    return alternating_medians(jobs, repeats)


def table(times: dict[str, float], layers: str) -> list[str]:
    """The rows of one configuration, in Markdown."""
    unit = times["MAP epoch (SVI)"]
    lines = [
        f"LoRA on {'the last two layers' if layers == 'last2' else 'all layers'}:",
        "",
        "| job | seconds | in MAP epochs | per particle | target |",
        "|---|---|---|---|---|",
    ]
    for name, value in times.items():
        count = NUM_PARTICLES if f"K={NUM_PARTICLES}" in name else 1
        target = ""
        if name == "KFAC fit":
            target = f"<= {TARGETS['KFAC fit / MAP epoch']}"
        elif count > 1:
            target = f"<= {TARGETS['SVGD step / K MAP steps']} per particle"
        lines.append(
            f"| {name} | {value:.2f} | {value / unit:.2f} | "
            f"{value / unit / count:.2f} | {target} |"
        )
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    pyro.set_rng_seed(0)
    packages = ["torch", "pyro-ppl", "transformers", "peft"]
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if args.device != "cpu":
        machine = torch.cuda.get_device_name()
    lines = [
        "# Cost of the main job",
        "",
        f"MiniLM (22.7M parameters), {NUM_ROWS} sentences of at most 32 tokens, batch "
        f"32, LoRA r=8, two classes. Medians of {args.repeats}, the jobs taking turns.",
        "",
        f"{date.today()}, {machine}, Python {platform.python_version()}, "
        + ", ".join(f"{p} {version(p)}" for p in packages)
        + ".",
        "",
    ]
    for layers in ("last2", "all"):
        pyro.clear_param_store()  # or the second guide would take the first's values
        lines += table(measure(layers, args.repeats, args.device), layers)
    print("\n".join(lines))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "main_job.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
