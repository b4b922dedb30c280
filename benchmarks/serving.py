"""What can plain adapters serve of a posterior? Eight of them, averaged under PEFT.

Usage: ``python -m benchmarks.serving --data FOLDER [--seeds 3] [--runs .cache/serving]
[--network minilm_6] [--sets sst2 agnews] [--epochs 8] [--rows 500] [--shard 0/2]
[--parts draws ensemble] [--out benchmarks/results]``; ``--report`` writes the table of
what there is.

Networks and data as in ``benchmarks.refined``. The draws of each method are written by
``export_adapters``, loaded by PEFT into a network that has never been lifted, and their
probabilities averaged. Each result is kept at once in ``raw/serving.jsonl``, the
weights of each training in ``--runs``: what is there isn't computed again.
"""

import argparse
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyro
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pyro_lora as pl
from benchmarks.encoder_top import MAX_LENGTH, Rows
from benchmarks.refined import NETWORKS, mixed, predicted, scores
from benchmarks.runs import Result, arguments, keep, kept, raw, run_or_report, shard
from benchmarks.seed_runs import NUM_MEMBERS, Setting
from benchmarks.tables import header, over_seeds, provenance, row
from pyro_lora.ground.weights import Weights

SETS = ("sst2", "agnews")
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
    plain: nn.Module
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
        lora, seed = self.setting.lora, self.setting.seed
        # Those beyond a study's five members would have the next seed's starts.
        others = (1000 + 10 * seed + i for i in range(NUM_MEMBERS, NUM_ADAPTERS))
        members = map(self.trained, (*range(NUM_MEMBERS), *others))
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
def under_peft(plain: nn.Module, adapter: Path, rows: Rows) -> Tensor:
    """Log probabilities (N, C) of one adapter, by PEFT alone."""
    network = PeftModel.from_pretrained(deepcopy(plain), adapter).eval()
    batches = rows.ordered()
    logits = [network(b["hidden"], b["attention_mask"]) for b in batches]
    return torch.cat(logits).double().log_softmax(1)


def job_of(args: argparse.Namespace, name: str, seed: int) -> Job:
    """A network, its rows on cached states, and it without LoRA."""
    network, folder = NETWORKS[args.network], args.data / name
    setting = network.setting(folder, args.rows, seed)
    test = setting.test.subset(range(NUM_TEST))
    return Job(
        replace(setting, epochs=args.epochs, test=test),
        network.plain(folder),
        args.runs / f"{args.network}-{name}-{args.rows}-{args.epochs}-{seed}",
    )


def run(args: argparse.Namespace) -> None:
    """Every result that isn't there yet; ensembles, which take longest, last."""
    warnings.filterwarnings("ignore", "A Gaussian over several layers")
    jobs = [
        (part, seed, name)
        for part in args.parts
        for seed in range(args.seeds)
        for name in args.sets
    ]
    for part, seed, name in shard(jobs, args):
        of = f"{args.network}-{name}-{args.rows}-{args.epochs}-{seed}"
        if (key := f"{of}-{part}") not in kept(raw(args)):
            job = job_of(args, name, seed)
            keep(raw(args), key, job.draws() if part == "draws" else job.ensemble())


def report(there: Mapping[str, Result]) -> list[str]:
    """All tables, in Markdown."""
    results: dict[tuple[str, str, int, int], dict[str, list[Result]]] = {}
    counts: Counter[tuple[str, str, int, int]] = Counter()
    for kept_as, found in there.items():
        network, name, rows, epochs, _, part = kept_as.split("-")
        key = network, name, int(rows), int(epochs)
        counts[key] += part == "draws"
        for method, scored in found["metrics"].items():
            scale = found.get("scales", {}).get(method)
            cell = scored if scale is None else scored | {"scale": scale}
            results.setdefault(key, {}).setdefault(method, []).append(cell)
    lines = [
        "# Draws worth serving",
        "",
        f"{NUM_ADAPTERS} draws are exported as adapters, loaded by PEFT and their "
        f"probabilities averaged; the {NUM_TEST} shortest test rows, texts of at most "
        f"{MAX_LENGTH} tokens. Scales are found on {NUM_SCALING} training rows. Mean ± "
        "standard error over the seeds.",
        "",
        provenance(),
        "",
    ]
    of_networks: list[str] = []
    for (network, name, num_rows, epochs), methods in sorted(results.items()):
        if network not in of_networks:
            of_networks.append(network)
            lines += [f"## {NETWORKS[network].about}", ""]
        count = counts[network, name, num_rows, epochs]
        lines += [f"### {name}, {num_rows} rows, {epochs} epochs (seeds: {count})", ""]
        lines += header("method", "NLL", "accuracy", "ECE", "scale")
        for method, title in TITLES.items():
            if method in methods:
                cells = [
                    over_seeds(x[metric] for x in methods[method] if metric in x)
                    for metric in (*METRICS, "scale")
                ]
                number = len(methods[method])
                of = f" (seeds: {number})" if number < count else ""
                lines.append(row(title + of, *cells))
        lines.append("")
    return lines


def main() -> None:
    parser = arguments(__doc__, "serving", SETS, rows=500)
    parser.add_argument("--network", choices=list(NETWORKS), default="minilm_2")
    parser.add_argument("--runs", type=Path, default=Path(".cache/serving"))
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", default=["draws", "ensemble"])
    run_or_report(parser.parse_args(), run, report)


if __name__ == "__main__":
    main()
