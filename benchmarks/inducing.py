"""What does Nyström's approximation lose? ``Exact(num_inducing=m)`` beside all rows.

Usage: ``python -m benchmarks.inducing --data FOLDER [--seeds 2]
[--sets sst2 agnews] [--numbers 500 333] [--epochs 4] [--shard 0/2]
[--out benchmarks/results]``; ``--report`` writes the table of what there is.

Network and training are those of ``benchmarks.refined``; N rows of C classes have
N (C - 1) rows of the Jacobian, of which m are drawn. Variances and evidences are
compared at the weights and at the prior that the exact evidence chooses; the NLL is
that of each structure's own refinement and own prior. Each result is kept at
once in ``raw/inducing.jsonl``.
"""

import argparse
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyro
import torch
from torch import Tensor

import pyro_lora as pl
from benchmarks.refined import encoder, scores
from benchmarks.runs import Result, arguments, keep, kept, raw, run_or_report, shard
from benchmarks.seed_runs import Setting, compared, scalar
from benchmarks.tables import header, over_seeds, provenance, row
from pyro_lora.curvature.linearize import LinearizedNetwork

SETS, NUMBERS, INDUCING = ("sst2", "agnews"), (500, 333), (50, 100, 200, 400)
COLUMNS = {
    "outside": "prior variance outside of the span",
    "ratio": "predictive variance / exact",
    "spread": "spread of its log",
    "covariance": "relative error of covariances",
    "evidence": "evidence - exact (nats)",
    "nll": "test NLL",
    "accuracy": "accuracy",
    "seconds": "seconds to fit",
}


def predicted(
    job: Setting, gaussians: dict[str, Any]
) -> dict[str, pl.integrals.GaussianLogits]:
    """Gaussians over the test rows' logits, for each linearised at the same weights."""
    origin = next(iter(gaussians.values())).origin
    network = LinearizedNetwork(job.model(len(job.train)), origin, (job.lora,), "y")
    found: dict[str, list[Any]] = {name: [] for name in gaussians}
    for batch in job.test.ordered():
        at_batch = network.at({k: x for k, x in batch.items() if k != "labels"})
        for name, gaussian in gaussians.items():
            found[name] += at_batch.logits(gaussian)
    return {
        name: pl.integrals.GaussianLogits(
            torch.cat([x.mean for x in parts]),
            torch.cat([x.covariance_matrix for x in parts]),
        )
        for name, parts in found.items()
    }


def run_one(job: Setting) -> dict[str, Result]:
    """Every structure's row of the table."""
    mode, rows = job.fit_map(job.train), job.train.by_length()
    structures = {"KFAC": pl.structures.KFAC(), "exact": pl.structures.Exact()}
    structures |= {f"m = {m}": pl.structures.Exact(num_inducing=m) for m in INDUCING}
    fits, results = {}, {}
    for name, structure in structures.items():
        pyro.set_rng_seed(job.seed)
        start = time.perf_counter()
        fits[name] = job.laplace(rows, mode, structure)
        results[name] = {"seconds": time.perf_counter() - start}
    tau = scalar(fits["exact"].optimize_prior())
    at_tau = {name: fit.with_prior_precision(tau) for name, fit in fits.items()}
    own = {
        name: (fit if name == "KFAC" else fit.refine()).optimize_prior()
        for name, fit in fits.items()
    }
    wide = predicted(job, {name: fit.gaussian for name, fit in at_tau.items()})
    ready = predicted(job, {name: fit.gaussian for name, fit in own.items()})
    evidence = float(at_tau["exact"].log_evidence())
    for name, result in results.items():
        covariances = wide[name].covariance_matrix, wide["exact"].covariance_matrix
        result |= of_covariances(*(x.double() for x in covariances))
        result["evidence"] = float(at_tau[name].log_evidence()) - evidence
        log_probs = pl.integrals.class_log_probs(ready[name])
        result |= scores(log_probs, job.test.labels)
        if name.startswith("m"):
            result["outside"] = fits[name].gaussian.coordinates.lost
    return results


def of_covariances(found: Tensor, exact: Tensor) -> Result:
    """Of logits, (N, C, C): by the classes' variances, and by all of the matrices."""
    diagonals = (x.diagonal(dim1=1, dim2=2) for x in (found, exact))
    error = float((found - exact).norm() / exact.norm())
    return compared(*diagonals) | {"covariance": error}


def run(args: argparse.Namespace) -> None:
    """Every result that isn't there yet."""
    jobs = [
        (seed, name, number)
        for seed in range(args.seeds)
        for name, number in zip(args.sets, args.numbers, strict=True)
    ]
    for seed, name, number in shard(jobs, args):
        key = f"{name}-{number}-{args.epochs}-{seed}"
        if key not in kept(raw(args)):
            job = encoder(args.data / name, number, seed)
            keep(raw(args), key, run_one(replace(job, epochs=args.epochs)))


def report(there: Mapping[str, Result]) -> list[str]:
    """All tables, in Markdown."""
    results: dict[tuple[str, int, int], list[dict[str, Result]]] = {}
    for kept_as, result in there.items():
        name, rows, epochs, _ = kept_as.split("-")
        key = name, int(rows), int(epochs)
        results.setdefault(key, []).append(result)
    lines = [
        "# Rows that stand for all",
        "",
        "MiniLM, LoRA r=2 on query and value of the last two layers, and the head, as "
        "in [](refined.md). `Exact(num_inducing=m)` draws m of the N (C - 1) rows of "
        "the Jacobian. Variances of the test rows' logits and the evidence are those "
        "at the trained weights, under the prior that the exact evidence chooses: the "
        "geometric mean of the ratios, and the standard deviation of their logs. The "
        "NLL is that after each structure's own refinement and choice of a prior; "
        "KFAC isn't refined. Mean ± standard error over the seeds.",
        "",
        provenance(),
        "",
    ]
    for (name, rows, epochs), found in sorted(results.items()):
        title = f"{name}, N = {rows}, {epochs} epochs (seeds: {len(found)})"
        lines += [f"## {title}", "", *header("structure", *COLUMNS.values())]
        for structure in ("exact", *(f"m = {m}" for m in INDUCING[::-1]), "KFAC"):
            cells = [
                over_seeds(
                    (r[structure][what] for r in found if what in r[structure]),
                    1 if what in ("evidence", "seconds") else 3,
                )
                for what in COLUMNS
            ]
            lines.append(row(structure, *cells))
        lines.append("")
    return lines


def main() -> None:
    parser = arguments(__doc__, "inducing", SETS, rows=0)
    parser.add_argument("--numbers", nargs="+", type=int, default=list(NUMBERS))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=2)
    run_or_report(parser.parse_args(), run, report)


if __name__ == "__main__":
    main()
