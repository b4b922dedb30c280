"""Are mixtures of refined posteriors better than mixtures of Laplace, or than one?

Usage: ``python -m benchmarks.refined_mixtures --data FOLDER [--seeds 3]
[--sets sst2] [--rows 500] [--epochs 8 25] [--shard 0/2] [--out benchmarks/results]``;
``--report`` writes the tables of what there is.

Network, rows and training are those of ``benchmarks.refined``. Members are five modes
of different seeds, or five particles of SVGD in function space; at each of them stand a
KFAC Gaussian and the refined posterior, both under the prior of their evidence.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

import pyro_lora as pl
from benchmarks.refined import at_weights, mixed, predicted, run, scores
from benchmarks.runs import Result, arguments, run_or_report
from benchmarks.seed_runs import NUM_MEMBERS, Setting
from benchmarks.tables import header, over_seeds, provenance, row
from pyro_lora.ground.weights import Weights

TITLES = {
    "one, plain": "MAP",
    "one, kfac": "KFAC, evidence",
    "one, refined": "refined, evidence",
    "ensemble, plain": "ensemble of 5",
    "ensemble, kfac": "mixture of KFAC at its members",
    "ensemble, refined": "mixture of refined at its members",
    "svgd, plain": "SVGD, 5 particles",
    "svgd, kfac": "mixture of KFAC at its particles",
    "svgd, refined": "mixture of refined at its particles",
}


def ensemble(job: Setting) -> list[Weights]:
    """Modes from different starts."""
    return [job.fit_map(job.train, member) for member in range(NUM_MEMBERS)]


def svgd(job: Setting) -> list[Weights]:
    """Particles that repel one another by their predictions."""
    kernel = pl.kernels.RBF(space="function")
    found = job.fit_particles(job.train, kernel, NUM_MEMBERS).particles
    return [{s: x[k] for s, x in found.items()} for k in range(NUM_MEMBERS)]


def at_member(job: Setting, weights: Weights) -> dict[str, Tensor]:
    """Log probabilities (N, C) of the network itself and of each Gaussian there."""
    structures: dict[str, Any] = {
        "kfac": pl.structures.KFAC(),
        "refined": pl.structures.Exact(),
    }
    rows, gaussians = job.train.by_length(), {}
    for name, structure in structures.items():
        posterior = job.laplace(rows, weights, structure)
        if name == "refined":
            posterior = posterior.refine()
        gaussians[name] = posterior.optimize_prior().gaussian
    return {"plain": at_weights(job, job.test, weights)} | predicted(job, gaussians)


def run_one(job: Setting) -> Result:
    """All rows of the table for one data set, number of epochs and seed."""
    found = {}
    for name, members in (("ensemble", ensemble(job)), ("svgd", svgd(job))):
        each = [at_member(job, weights) for weights in members]
        if name == "ensemble":
            found |= {f"one, {kind}": log_p for kind, log_p in each[0].items()}
        for kind in each[0]:
            found[f"{name}, {kind}"] = mixed([log_probs[kind] for log_probs in each])
    labels = job.test.labels
    return {"metrics": {name: scores(log_p, labels) for name, log_p in found.items()}}


def report(there: Mapping[str, Result]) -> list[str]:
    """A table for each metric, in Markdown."""
    results: dict[tuple[str, int, int], list[dict[str, dict[str, float]]]] = {}
    for kept_as, result in there.items():
        _, name, rows, epochs, _ = kept_as.split("-")
        key = name, int(rows), int(epochs)
        results.setdefault(key, []).append(result["metrics"])
    keys = sorted(results)
    columns = [
        f"{name}, {rows:,} rows, {epochs} epochs (seeds: {len(results[key])})"
        for key in keys
        for name, rows, epochs in [key]
    ]
    lines = [
        "# Mixtures of refined posteriors",
        "",
        "MiniLM's last two layers, in the settings of `refined.md`. Mean ± standard "
        "error over the seeds, where there are several. No label is held out.",
        "",
        provenance(),
        "",
    ]
    for metric in ("nll", "accuracy", "ece", "brier"):
        lines += [f"## {metric}", "", *header("method", *columns)]
        for method, title in TITLES.items():
            cells = [
                over_seeds((m[method][metric] for m in results[key]), 3) for key in keys
            ]
            lines.append(row(title, *cells))
        lines.append("")
    return lines


def main() -> None:
    parser = arguments(__doc__, "refined_mixtures", ["sst2"], rows=500)
    parser.add_argument("--epochs", nargs="+", type=int, default=[8, 25])
    parser.add_argument("--seeds", type=int, default=3)
    parser.set_defaults(network="minilm_2")
    run_or_report(parser.parse_args(), partial(run, run_one=run_one), report)


if __name__ == "__main__":
    main()
