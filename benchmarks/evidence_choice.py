"""Does the evidence choose rank, layers, prior and the epoch to stop at?

Usage: ``python -m benchmarks.evidence_choice --data FOLDER
[--sets sst2 vader agnews] [--rows 200] [--seed 0] [--shard 0/2]
[--out benchmarks/results]``; ``--report`` writes the table of what there is.

MiniLM as in ``benchmarks.refined``. Each candidate is trained once on all rows and once
on 80 % of them, which is what validation costs. A criterion is judged by how well its
order of the candidates agrees with that of their test NLL, and by what its choice loses
to the best candidate. Each result is kept at once in ``raw/evidence_choice.jsonl``.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass, replace
from math import nan
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

import pyro_lora as pl
from benchmarks.corpora import chosen, corpus
from benchmarks.encoder_top import CachedRows, adapted, cache, minilm
from benchmarks.refined import at_weights, predicted
from benchmarks.runs import Result, arguments, keep, kept, raw, run_or_report, shard
from benchmarks.seed_runs import Setting
from benchmarks.tables import header, provenance, row

NUM_TEST = 300
SETS = ("sst2", "vader", "agnews")


@dataclass(frozen=True)
class Candidate:
    """One way to fine-tune."""

    rank: int = 4
    layers: int = 2
    precision: float = 0.1
    epochs: int = 10

    @property
    def name(self) -> str:
        """For a file."""
        return "-".join(f"{x:g}" for x in astuple(self))


BASE = Candidate()
SWEEPS = {
    "rank": [replace(BASE, rank=x) for x in (1, 2, 4, 8, 16)],
    "layers": [replace(BASE, layers=x) for x in (1, 2, 4, 6)],
    "prior precision": [replace(BASE, precision=x) for x in (0.1, 1.0, 10.0, 30.0)],
    "epochs": [replace(BASE, epochs=x) for x in (3, 5, 10, 25)],
}
CROSSED = [Candidate(1, 1, 0.1, 25), Candidate(8, 4, 1.0, 5)]
CANDIDATES = list(dict.fromkeys([c for s in SWEEPS.values() for c in s] + CROSSED))

# The less, the better: each is turned into a loss a datum.
CRITERIA = {
    "kfac at training": "KFAC's evidence under the training's prior",
    "kfac": "KFAC's evidence, prior by itself",
    "exact at training": "exact evidence under the training's prior",
    "exact": "exact evidence, prior by itself",
    "refined": "refined, its evidence",
    "under prior": "refined under the prior, its evidence",
    "loo": "refined, leave-one-out",
    "loo under prior": "refined under the prior, leave-one-out",
    "training": "training loss",
    "validation": "20 % validation, the mode's NLL",
    "validation refined": "20 % validation, the refined posterior's NLL",
}
TARGETS = {"map": "the mode's", "refined": "the refined posterior's"}


States = dict[tuple[str, int], tuple[CachedRows, CachedRows]]


def setting(
    data: Path, name: str, candidate: Candidate, number: int, seed: int, states: States
) -> Setting:
    """A network with a new head, and its rows on states, which are cached."""
    rows = corpus(data / name)
    bert, tokenizer = minilm(num_labels=len(rows.classes))
    lora = pl.lift(
        adapted(bert, candidate.rank, candidate.layers),
        prior=pl.priors.normal(scale=candidate.precision**-0.5),
    )
    key = name, candidate.layers
    if key not in states:  # below the adapters the network is the same
        parts = (chosen(rows.train, number, seed), rows.test[:NUM_TEST])
        train, test = (cache(bert, tokenizer, x, candidate.layers) for x in parts)
        states[key] = train, test.by_length()
    train, test = states[key]
    return Setting(
        lora=lora,
        train=train,
        test=test,
        epochs=candidate.epochs,
        seed=seed,
    )


def nll(log_probs: Tensor, labels: Tensor) -> float:
    """A datum, nats."""
    return -float(log_probs.gather(1, labels[:, None]).mean())


def run_one(job: Setting) -> Result:
    """All criteria and test losses of one candidate."""
    rows, number, labels = job.train.by_length(), len(job.train), job.test.labels
    mode = job.fit_map(job.train)
    kfac = job.laplace(rows, mode, pl.structures.KFAC())
    exact = job.laplace(rows, mode, pl.structures.Exact())
    refined = exact.refine().optimize_prior()
    under = exact.refine("prior")
    by_evidence = under.optimize_prior()
    evidences = {
        "kfac at training": kfac,
        "kfac": kfac.optimize_prior(),
        "exact at training": exact,
        "exact": exact.optimize_prior(),
        "refined": refined,
        "under prior": by_evidence,
    }
    criteria = {k: -float(p.log_evidence()) / number for k, p in evidences.items()}
    left_out = {
        "loo": refined,
        "loo under prior": under.optimize_prior(objective="loo"),
    }
    criteria |= {k: -float(p.leave_one_out().mean()) for k, p in left_out.items()}
    criteria["training"] = nll(at_weights(job, rows, mode), rows.labels)
    gaussians = {
        "refined": refined.gaussian,
        "exact": evidences["exact"].gaussian,
        "under prior": by_evidence.gaussian,
    }
    tested = predicted(job, gaussians) | {"map": at_weights(job, job.test, mode)}
    kept, held_out = job.halves()
    held_out = held_out.by_length()
    half = job.fit_map(kept)
    criteria["validation"] = nll(at_weights(job, held_out, half), held_out.labels)
    of_half = job.laplace(kept, half, pl.structures.Exact()).refine().optimize_prior()
    at_held_out = predicted(
        replace(job, train=kept, test=held_out), {"refined": of_half.gaussian}
    )
    criteria["validation refined"] = nll(at_held_out["refined"], held_out.labels)
    return {
        "criteria": criteria,
        "test": {name: nll(log_p, labels) for name, log_p in tested.items()},
    }


def run(args: argparse.Namespace) -> None:
    """Every result that isn't there yet."""
    jobs = [(c, name) for c in CANDIDATES for name in args.sets]
    states: States = {}
    for candidate, name in shard(jobs, args):
        key = f"{name}_{args.rows}_{candidate.name}_{args.seed}"
        if key not in kept(raw(args)):
            of_one = (args.data, name, candidate, args.rows, args.seed, states)
            keep(raw(args), key, run_one(setting(*of_one)))


def ranks(values: Iterable[float]) -> Tensor:
    """From 0, of different values."""
    return torch.tensor(list(values)).argsort().argsort().double()


def rank_correlation(x: Iterable[float], y: Iterable[float]) -> float:
    """Spearman's."""
    return float(torch.corrcoef(torch.stack([ranks(x), ranks(y)]))[0, 1])


Table = dict[str, dict[Candidate, Result]]  # by data set


def read(there: Mapping[str, Result]) -> tuple[Table, int]:
    """What there is, and of how many rows."""
    table: Table = {}
    number = 0
    for kept_as, found in there.items():
        name, rows, of, seed = kept_as.rsplit("_", 3)
        rank, layers, precision, epochs = of.split("-")
        key = Candidate(int(rank), int(layers), float(precision), int(epochs))
        title = name if int(seed) == 0 else f"{name}, seed {seed}"
        table.setdefault(title, {})[key] = found
        if number not in (0, int(rows)):
            raise SystemExit(f"There are fits of {number} rows and of {rows}.")
        number = int(rows)
    return table, number


def judged(
    table: Table, target: str, kept: Callable[[Candidate], bool]
) -> dict[str, tuple[list[float], list[float]]]:
    """Of each criterion rank correlation and loss of its choice, by data set."""
    found: dict[str, tuple[list[float], list[float]]] = {c: ([], []) for c in CRITERIA}
    for results in table.values():
        some = [r for c, r in results.items() if kept(c)]
        losses = [r["test"][target] for r in some]
        for criterion, (correlations, regrets) in found.items():
            if len(some) < 2:  # nothing to choose among yet
                correlations.append(nan)
                regrets.append(nan)
                continue
            values = [r["criteria"][criterion] for r in some]
            correlations.append(rank_correlation(values, losses))
            regrets.append(losses[values.index(min(values))] - min(losses))
    return found


def report(there: Mapping[str, Result]) -> list[str]:
    """All tables, in Markdown."""
    table, number = read(there)
    fits = sum(map(len, table.values()))
    lines = [
        "# Evidence that chooses",
        "",
        f"MiniLM, LoRA on query and value of its last layers, and the head; {number} "
        f"training rows, {NUM_TEST} test rows, texts of at most 32 tokens; {fits} fits "
        f"on {len(table)} data sets. Around rank {BASE.rank}, the last {BASE.layers} "
        f"layers, prior precision {BASE.precision:g} and {BASE.epochs} epochs each is "
        "varied by itself, and there are two others. Spearman's rank correlation of "
        "each criterion with the test NLL (1: the same order), and how much more NLL "
        "than the best candidate's the criterion's choice has.",
        "",
        provenance(),
        "",
    ]
    for target, title in TARGETS.items():
        lines += [f"## Choosing for {title} test NLL", ""]
        lines += header(
            "criterion",
            *(f"{name}: correlation" for name in table),
            "mean",
            *(f"{name}: loss" for name in table),
            "mean",
        )
        for criterion, (x, y) in judged(table, target, lambda _: True).items():
            cells = [f"{v:.2f}" for v in (*x, fmean(x))]
            cells += [f"{v:.3f}" for v in (*y, fmean(y))]
            lines.append(row(CRITERIA[criterion], *cells))
        lines += ["", "By what is chosen, means over the data sets:", ""]
        lines += header(
            "criterion",
            *(f"{x}: {y}" for x in SWEEPS for y in ("correlation", "loss")),
        )
        by_sweep = [judged(table, target, s.__contains__) for s in SWEEPS.values()]
        for criterion, title_of in CRITERIA.items():
            cells = []
            for found in by_sweep:
                x, y = found[criterion]
                cells += [f"{fmean(x):.2f}", f"{fmean(y):.3f}"]
            lines.append(row(title_of, *cells))
        lines.append("")
    lines += ["## Test NLL of each candidate", ""]
    lines += header(
        "rank, layers, precision, epochs",
        *(f"{name}, {x}" for name in table for x in ("mode", "refined")),
    )
    for candidate in CANDIDATES:
        cells = []
        for results in table.values():
            r = results.get(candidate)
            cells += [f"{r['test'][t]:.3f}" if r else "" for t in TARGETS]
        lines.append(row(", ".join(candidate.name.split("-")), *cells))
    return [*lines, ""]


def main() -> None:
    parser = arguments(__doc__, "evidence_choice", SETS, rows=200)
    parser.add_argument("--seed", type=int, default=0)
    run_or_report(parser.parse_args(), run, report)


if __name__ == "__main__":
    main()
