"""What can plain adapters serve of a posterior? Eight of them, averaged under PEFT.

Usage: ``python -m benchmarks.serving --data FOLDER [--seeds 3] [--runs .cache/serving]
[--sets sst2 agnews] [--layers 2 6] [--epochs 8] [--rows 500] [--shard 0/2]
[--parts draws ensemble] [--out benchmarks/results]``; ``--report`` writes the table of
what there is.

MiniLM as in ``benchmarks.refined``, with LoRA on its last two layers or on all six. The
draws of each method are written by ``export_adapters``, loaded by PEFT into a network
that has never been lifted, and their probabilities averaged. Each result is kept at
once in ``raw/serving.jsonl``, the weights of each training in ``--runs``: what is there
isn't computed again.
"""

import argparse
import tempfile
import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import pyro_lora as pl
from benchmarks.corpora import chosen, corpus
from benchmarks.encoder_top import CachedRows, EncoderTop, adapted, cache, minilm
from benchmarks.refined import RANK, mixed, predicted, scores
from benchmarks.runs import Result, arguments, keep, kept, raw, run_or_report, shard
from benchmarks.seed_runs import PRIOR_PRECISION, Setting
from benchmarks.tables import header, over_seeds, provenance, row
from pyro_lora.ground.weights import Weights

SETS, LAYERS = ("sst2", "agnews"), (2, 6)
NUM_ADAPTERS, NUM_TEST = 8, 300
NUM_SCALING = 100  # training rows on which a scale is found
SERVED = 1000  # seeds of draws to serve: others than those that a scale is found by
TOLERANCES = (0.05, 0.1, 0.2)
METRICS = ("nll", "accuracy", "ece")
TITLES = {
    "mode": "the mode, one adapter",
    "kfac linearised": "KFAC, linearised: not served",
    "exact linearised": "exact, refined, linearised: not served",
    "kfac full": "KFAC at full width",
    **{f"kfac {x}": f"KFAC, `for_sampling`, tolerance {x}" for x in TOLERANCES},
    **{f"exact {x}": f"exact, refined, the same, {x}" for x in TOLERANCES},
    "tfb": "TFB's shape, `methods.tfb`, 0.1",
    "ensemble": "ensemble of 8",
}


@dataclass(frozen=True)
class Job:
    """One training, and the networks to serve."""

    setting: Setting
    plain: EncoderTop
    folder: Path  # of the weights of trainings

    def trained(self, member: int) -> Weights:
        """The weights of one training, from a file where it is there."""
        path = self.folder / f"{member}.safetensors"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            save_file(self.setting.fit_map(self.setting.train, member), part)
            part.replace(path)
        return load_file(path)

    def draws(self) -> Result:
        """All but the ensemble."""
        job = self.setting
        model, rows, mode = (
            job.model(len(job.train)),
            job.train.by_length(),
            self.trained(0),
        )
        some = job.train.subset(range(NUM_SCALING)).by_length().ordered()
        kfac = job.laplace(rows, mode, pl.structures.KFAC()).optimize_prior()
        exact = job.laplace(rows, mode, pl.structures.Exact()).refine().optimize_prior()
        log_probs = {
            f"{name} linearised": log_p
            for name, log_p in predicted(
                job, {"kfac": kfac.gaussian, "exact": exact.gaussian}
            ).items()
        }
        posteriors: dict[str, Any] = {"kfac full": kfac}
        for tolerance in TOLERANCES:
            for name, posterior in (("kfac", kfac), ("exact", exact)):
                pyro.set_rng_seed(job.seed)  # the same draws at each tolerance
                narrow = posterior.for_sampling(some, tolerance=tolerance)
                posteriors[f"{name} {tolerance}"] = narrow
        pyro.set_rng_seed(job.seed)
        posteriors["tfb"] = pl.methods.tfb(model, some, weights=mode, tolerance=0.1)
        posteriors["mode"] = pl.ensemble(job.lora, [mode])
        for name, posterior in posteriors.items():
            pyro.set_rng_seed(SERVED + job.seed)
            log_probs[name] = self.served(posterior)
        return {
            "metrics": {k: scores(x, job.test.labels) for k, x in log_probs.items()},
            "scales": {
                k: posterior.scale
                for k, posterior in posteriors.items()
                if k.startswith(("kfac 0", "exact 0"))
            },
        }

    def ensemble(self) -> Result:
        """Eight trainings."""
        lora, members = self.setting.lora, map(self.trained, range(NUM_ADAPTERS))
        log_probs = self.served(pl.ensemble(lora, list(members)))
        scored = scores(log_probs, self.setting.test.labels)
        return {"metrics": {"ensemble": scored}}

    def served(self, posterior: pl.Posterior) -> Tensor:
        """Log probabilities (N, C) of exported adapters, averaged."""
        number = posterior.num_samples or NUM_ADAPTERS
        with tempfile.TemporaryDirectory() as folder:
            draws = Path(folder) / "draws"
            pl.export_adapters(posterior, draws, number)
            log_probs = [
                under_peft(self.plain, draw, self.setting.test)
                for draw in sorted(draws.iterdir())
            ]
        return mixed(log_probs)


@torch.no_grad()
def under_peft(plain: EncoderTop, adapter: Path, rows: CachedRows) -> Tensor:
    """Log probabilities (N, C) of one adapter, by PEFT alone."""
    network = PeftModel.from_pretrained(deepcopy(plain), adapter).eval()
    batches = rows.ordered()
    logits = [network(b["hidden"], b["attention_mask"]) for b in batches]
    return torch.cat(logits).double().log_softmax(1)


def job_of(args: argparse.Namespace, name: str, layers: int, seed: int) -> Job:
    """A network with a new head, its rows on cached states, and it without LoRA."""
    rows = corpus(args.data / name)
    bert, tokenizer = minilm(num_labels=len(rows.classes))
    plain = EncoderTop(deepcopy(bert), layers)
    prior = pl.priors.normal(scale=PRIOR_PRECISION**-0.5)
    parts = (chosen(rows.train, args.rows, seed), rows.test[:NUM_TEST])
    train, test = (cache(bert, tokenizer, part, layers) for part in parts)
    setting = Setting(
        lora=pl.lift(adapted(bert, RANK, layers), prior=prior),
        train=train,
        test=test.by_length(),
        epochs=args.epochs,
        seed=seed,
    )
    folder = args.runs / f"{name}-{layers}-{args.epochs}-{args.rows}-{seed}"
    return Job(setting, plain, folder)


def run(args: argparse.Namespace) -> None:
    """Every result that isn't there yet; ensembles, which take longest, last."""
    warnings.filterwarnings("ignore", "A Gaussian over several layers")
    jobs = [
        (part, seed, layers, name)
        for part in args.parts
        for seed in range(args.seeds)
        for layers in args.layers
        for name in args.sets
    ]
    for part, seed, layers, name in shard(jobs, args):
        key = f"{name}-{layers}-{args.epochs}-{args.rows}-{seed}-{part}"
        if key not in kept(raw(args)):
            job = job_of(args, name, layers, seed)
            keep(raw(args), key, job.draws() if part == "draws" else job.ensemble())


def report(there: Mapping[str, Result]) -> list[str]:
    """All tables, in Markdown."""
    results: dict[tuple[str, int], dict[str, list[Result]]] = {}
    counts: dict[tuple[str, int], int] = {}
    for kept_as, found in there.items():
        name, layers, *_, part = kept_as.split("-")
        key = name, int(layers)
        counts[key] = counts.get(key, 0) + (part == "draws")
        for method, scored in found["metrics"].items():
            results.setdefault(key, {}).setdefault(method, []).append(scored)
        for method, scale in found.get("scales", {}).items():
            results[key][method][-1]["scale"] = scale
    lines = [
        "# Draws worth serving",
        "",
        f"MiniLM, LoRA r={RANK} on query and value, and the head; 500 training rows, "
        f"8 epochs, {NUM_TEST} test rows, texts of at most 32 tokens. {NUM_ADAPTERS} "
        "draws are exported as adapters, loaded by PEFT and their probabilities "
        f"averaged. Scales are found on {NUM_SCALING} training rows. Mean ± standard "
        "error over the seeds.",
        "",
        provenance(),
        "",
    ]
    for (name, layers), methods in sorted(results.items()):
        where = "all layers" if layers == max(LAYERS) else f"the last {layers} layers"
        lines += [f"## {name}, LoRA on {where} (seeds: {counts[name, layers]})", ""]
        lines += header("method", "NLL", "accuracy", "ECE", "scale")
        for method, title in TITLES.items():
            if method in methods:
                cells = [
                    over_seeds(x[metric] for x in methods[method] if metric in x)
                    for metric in (*METRICS, "scale")
                ]
                number = len(methods[method])
                of = f" (seeds: {number})" if number < counts[name, layers] else ""
                lines.append(row(title + of, *cells))
        lines.append("")
    return lines


def main() -> None:
    parser = arguments(__doc__, "serving", SETS, rows=500)
    parser.add_argument("--layers", nargs="+", type=int, default=list(LAYERS))
    parser.add_argument("--runs", type=Path, default=Path(".cache/serving"))
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", default=["draws", "ensemble"])
    run_or_report(parser.parse_args(), run, report)


if __name__ == "__main__":
    main()
