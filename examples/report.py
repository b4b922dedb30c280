"""The demo's table and files."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torchmetrics.functional import spearman_corrcoef

import pyro_lora as pl
from examples import pictures
from examples.methods import Outcome, Study, Task
from examples.rows import Corpus

COLUMNS = ("accuracy", "nll", "ece", "brier", "auroc", "spearman", "seconds")

# What a demo writes: an earlier one's is replaced. The first is written first, so that
# a folder that holds any of the others holds it, too.
MARK = "table.json"
WRITTEN = (
    *("table.txt", "laplace", "laplace.nc", "svgd", "svgd.nc", "mixture", "adapters"),
    *(f"{name}.png" for name in pictures.NAMES),
)

NUM_DRAWS = 400  # in Laplace's ArviZ file: one linearised pass, however many

NOTE = """\
nll in nats; ece with 15 bins; brier summed over the classes.
auroc: entropy of the prediction, test rows against the other domains. spearman: rank
correlation of the aleatoric entropy with the standard deviation of people's ratings.
MAP + temperature scaling and Laplace (held-out nll) train on 80 % of the rows and tune
on the other 20 %; every other method trains on all rows and tunes on none.
SVGD in function space repels with a constant strength of 0.4 per training row.
seconds: a method's own fit and its predictions of the test rows and other domains.
Laplace starts from the fit of MAP (held-out nll: of temperature scaling), the mixture
from SVGD in function space; the fits that they start from aren't counted again."""


def measure(outcome: Outcome, corpus: Corpus) -> dict[str, float | None]:
    """One row's numbers; None where the rows have no other domains or ratings.

    Args:
        outcome: The method's predictions.
        corpus: The rows that were predicted.

    Returns:
        Column name -> value.
    """
    metrics = outcome.test.metrics()
    auroc = spearman = None
    if outcome.domains:
        auroc = pl.auroc(outcome.test, _joined(outcome.domains))
    spread = [row.spread for row in corpus.test]
    if None not in spread:
        doubt = outcome.test.aleatoric_entropy.cpu().double()
        ratings = torch.tensor(spread, dtype=torch.float64)
        spearman = float(spearman_corrcoef(doubt, ratings))
    values = {name: metrics[name] for name in COLUMNS if name in metrics}
    return {
        **values,
        "auroc": auroc,
        "spearman": spearman,
        "seconds": outcome.seconds,
    }


def told_apart(task: Task) -> dict[str, float]:
    """How well the states below the adapters tell the test rows from other domains.

    Args:
        task: The task.

    Returns:
        Domain -> AUROC.
    """
    corpus = task.corpus
    weights = task.lora.weights()  # any: adapters don't change what is below them
    posterior = pl.ensemble(task.lora, [weights], model=task.model(corpus.train))
    distance = pl.state_distance(posterior, task.ordered(corpus.train))
    test = distance(task.ordered(corpus.test))
    return {
        name: pl.auroc(test, distance(task.ordered(rows)))
        for name, rows in corpus.domains.items()
    }


def table(rows: Mapping[str, Mapping[str, float | None]]) -> str:
    """The rows as plain text.

    Args:
        rows: Method -> column -> value.

    Returns:
        Lines without an end of line at the end.
    """
    width = max(len(name) for name in rows)
    lines = [" " * width + "".join(f"{column:>10}" for column in COLUMNS)]
    for name, values in rows.items():
        cells = [_cell(column, values[column]) for column in COLUMNS]
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def heading(task: Task, model: str) -> str:
    """What was run, in a few lines.

    Args:
        task: The task.
        model: What to call the encoder.

    Returns:
        Lines without an end of line at the end.
    """
    corpus = task.corpus
    num_weights = sum(weight.numel() for weight in task.lora.weights().values())
    domains = "".join(f", {name} {len(rows)}" for name, rows in corpus.domains.items())
    return (
        f"{model}: {num_weights:,} weights in LoRA and head, {task.epochs} epochs, "
        f"{task.num_particles} particles, seed {task.seed}\n"
        f"rows: train {len(corpus.train)}, test {len(corpus.test)}{domains}"
    )


def make_folder(out: Path) -> None:
    """Make the folder to write into, before the work that it is for.

    Args:
        out: The folder; an earlier demo's will do.

    Raises:
        ValueError: If it holds files of others under the names that a demo writes.
        OSError: If it can't be made.
    """
    out.mkdir(parents=True, exist_ok=True)
    others = [name for name in WRITTEN if (out / name).exists()]
    if others and not _is_a_demos(out / MARK):
        raise ValueError(
            f"{out} holds {others[0]}, which isn't an earlier demo's. Name another "
            "folder by --out."
        )


def _is_a_demos(mark: Path) -> bool:
    try:
        record = json.loads(mark.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(record, dict) and {"rows", "num_particles"} <= record.keys()


def _clear(out: Path) -> None:
    """Delete what an earlier demo wrote, which may have had other methods."""
    for path in (out / name for name in WRITTEN):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write(study: Study, task: Task, model: str, out: Path) -> str:
    """Write the table, pictures, ArviZ files, posteriors and adapters.

    Args:
        study: The fitted methods.
        task: The task.
        model: What to call the encoder.
        out: Folder to write into, of :func:`make_folder`.

    Returns:
        The text of the table, and what the files are called.
    """
    rows = {o.name: measure(o, task.corpus) for o in study.outcomes}
    parts = [heading(task, model), table(rows)]
    apart = told_apart(task)
    if apart:
        cells = ", ".join(f"{name} {auroc:.3f}" for name, auroc in apart.items())
        parts.append(f"auroc of the distance of states (no posterior): {cells}")
    text = "\n\n".join([*parts, NOTE])
    record = {
        "model": model,
        "epochs": task.epochs,
        "num_particles": task.num_particles,
        "seed": task.seed,
        "rows": rows,
        "state_distance": apart,
    }
    _clear(out)
    (out / MARK).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (out / "table.txt").write_text(text + "\n", encoding="utf-8")
    posteriors: dict[str, Any] = {
        "laplace": study.laplace,
        "svgd": study.svgd and study.svgd.posterior(),
        "mixture": study.mixture,
    }
    trees = {}
    batches = task.ordered(task.corpus.train)
    for name, posterior in posteriors.items():
        if posterior is None:
            continue
        pl.save(posterior, out / name)
        if name != "mixture":
            num_samples = NUM_DRAWS if name == "laplace" else None
            tree = pl.to_datatree(posterior, batches=batches, num_samples=num_samples)
            tree.to_netcdf(out / f"{name}.nc", engine="h5netcdf")
            trees[name] = tree
        folder = out / "adapters" / name
        if name == "svgd":
            pl.export_adapters(posterior, folder, task.num_particles)
        elif name == "laplace":  # draws of it are for the linearised network
            mode = pl.ensemble(task.lora, [posterior.mode()])
            pl.export_adapters(mode, folder, 1)
    drawn = pictures.draw(study, task.lora, trees["laplace"], out)
    names = ", ".join(path.name for path in drawn)
    return f"{text}\n\nPictures in {out}: {names}"


def _joined(domains: Mapping[str, pl.Prediction]) -> pl.Prediction:
    parts = list(domains.values())
    return pl.Prediction(
        log_probs=torch.cat([part.log_probs for part in parts]),
        aleatoric_entropy=torch.cat([part.aleatoric_entropy for part in parts]),
    )


def _cell(column: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if column == "seconds" else f"{value:.3f}"
