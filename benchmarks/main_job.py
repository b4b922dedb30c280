"""Cost of the main job: a KFAC fit and an SVGD step, in units of MAP training.

Usage: ``python -m benchmarks.main_job [--repeats 5] [--out benchmarks/results]``, on a
quiet machine. The network and data are the demo's.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

import pyro_lora as pl
from benchmarks.tables import provenance
from examples import recipe, text, vader

NUM_PARTICLES = 5
NUM_STEPS = 8  # of MAP and SVGD
MAX_FIT, MAX_PER_PARTICLE = 1.3, 1.0  # the targets


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


def measure(layers: str, repeats: int, device: str) -> list[dict[str, float]]:
    """Medians of an epoch and a fit; and of some steps of MAP and SVGD."""
    network, tokenizer = text.load_network(
        text.default_model(),
        num_classes=2,
        layers=layers,
        device=device,
    )
    rows = vader.load().train
    batches = list(text.batches(rows, tokenizer, device=device, shuffle_seed=0))
    lora = pl.lift(network, prior=pl.priors.normal(scale=recipe.PRIOR_PRECISION**-0.5))
    model = recipe.classifier(lora, len(rows))
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_fresh())
    svi = SVI(model, guide, Adam({"lr": 1e-4}), Trace_ELBO())

    def steps(step: Callable[..., Any], num_steps: int) -> Callable[[], None]:
        def run() -> None:
            for batch in batches[:num_steps]:
                step(**batch)

        return run

    def svgd(kernel: Any, num_particles: int) -> Callable[[], None]:
        engine = pl.SVGD(
            model,
            kernel,
            Adam({"lr": 1e-4}),
            num_particles,
            init_loc_fn=lora.init_to_fresh(),
        )
        return steps(engine.step, NUM_STEPS)

    fits = {
        "MAP epoch (SVI)": steps(svi.step, len(batches)),
        "KFAC fit": lambda: guide.laplace_approximation(batches),
    }
    runs = {
        "MAP steps (SVI)": steps(svi.step, NUM_STEPS),
        "SVGD steps, K=1, NoRepulsion": svgd(pl.kernels.NoRepulsion(), 1),
    }
    for name, kernel in {
        "NoRepulsion": pl.kernels.NoRepulsion(),
        "joint": pl.kernels.RBF(),
        "function": pl.kernels.RBF(space="function"),
    }.items():
        runs[f"SVGD steps, K={NUM_PARTICLES}, {name}"] = svgd(kernel, NUM_PARTICLES)
    return [alternating_medians(jobs, repeats) for jobs in (fits, runs)]


def table(groups: list[dict[str, float]], layers: str) -> list[str]:
    """The rows of one configuration, in Markdown."""
    lines = [
        f"LoRA on {'the last two layers' if layers == 'last2' else 'all layers'}:",
        "",
        "| job | seconds | relative to MAP | per particle | target |",
        "|---|---|---|---|---|",
    ]
    for times in groups:
        unit = next(iter(times.values()))
        for name, value in times.items():
            count = NUM_PARTICLES if f"K={NUM_PARTICLES}" in name else 1
            target = f"{MAX_FIT} in all" if name == "KFAC fit" else ""
            target = f"{MAX_PER_PARTICLE} per particle" if count > 1 else target
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
    lines = [
        "# Cost of the main job",
        "",
        "MiniLM (22.7M parameters), 1,000 sentences of at most 32 tokens, batch 32, "
        f"LoRA r=8, two classes; an epoch or a fit is 32 batches, "
        f"steps are {NUM_STEPS}. "
        f"Medians of {args.repeats}, the jobs taking turns.",
        "",
        provenance(device=args.device),
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
