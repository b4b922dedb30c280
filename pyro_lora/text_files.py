"""Files of texts, and the saved adapter that they are for: what the commands read."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import pyro_lora as pl
from pyro_lora.curvature.tensor_folder import Format, read_manifest, write_folder

SETTINGS = "command_line"  # in the posterior's folder
FORMAT = Format("pyro_lora command line", 1, "Make it by `pyro-lora fit`.")
Row = tuple[str, str | None]  # a text, and its label


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a posterior's folder remembers of its fit.

    Attributes:
        adapter: Folder of the PEFT adapter.
        label_names: Names of the classes, in the order of the logits.
        text_column: Column of the texts.
        label_column: Column of the labels.
        max_length: Tokens after which a text is cut.
        prior_scale: Standard deviation of the prior that the network is lifted with.
    """

    adapter: str
    label_names: tuple[str, ...]
    text_column: str
    label_column: str
    max_length: int
    prior_scale: float


def remember(posterior: Path, settings: Settings) -> None:
    """Write the settings beside the posterior."""
    write_folder(posterior / SETTINGS, FORMAT, {"settings": asdict(settings)}, {})


def remembered(posterior: Path, device: str) -> tuple[Settings, pl.LiftedNetwork]:
    """The settings of a fit, and its network, lifted anew.

    Raises:
        ValueError: If the folder wasn't written by ``pyro-lora fit``, or its settings
            are damaged or of a newer version.
    """
    if not (posterior / SETTINGS).is_dir():
        raise ValueError(f"{posterior} has no {SETTINGS}: make it by `pyro-lora fit`.")
    stored = read_manifest(posterior / SETTINGS, FORMAT)["settings"]
    settings = Settings(**{**stored, "label_names": tuple(stored["label_names"])})
    network, _ = network_of(Path(settings.adapter), settings.label_names, [])
    return settings, lifted(network, settings, device)


def network_of(
    adapter: Path, words: tuple[str, ...], labels: Sequence[str | None]
) -> tuple[PeftModel, tuple[str, ...]]:
    """The network with its adapter, and the names of its classes in order.

    Raises:
        ValueError: If the adapter isn't one of a classifier, or of another number of
            classes.
    """
    config = PeftConfig.from_pretrained(str(adapter))
    if config.task_type != "SEQ_CLS":
        raise ValueError(
            f"{adapter}: an adapter of task type {config.task_type}; the command line "
            "knows SEQ_CLS, text classification. Write the Pyro model in Python for "
            "others."
        )
    given = set(labels)
    numbers = all(label is not None and label.isdecimal() for label in given)
    if not words and numbers:
        most = max(int(label) for label in given if label is not None)
        words = tuple(str(i) for i in range(max(most + 1, 2)))
    count = {"num_labels": len(words)} if words else {}
    try:
        base = AutoModelForSequenceClassification.from_pretrained(
            config.base_model_name_or_path, **count
        )
        network = PeftModel.from_pretrained(base, str(adapter))
    except RuntimeError as error:  # a head of another size
        raise ValueError(
            f"{adapter} doesn't fit a network with the {len(words)} classes "
            f"{', '.join(words)}. Name all of its classes, in order, by "
            f"--label-names. ({error})"
        ) from error
    names = tuple(base.config.id2label[i] for i in range(base.num_labels))
    return network, words or names


def lifted(network: PeftModel, settings: Settings, device: str) -> pl.LiftedNetwork:
    """The network on its device, with a normal prior on the adapter's weights.

    Raises:
        ValueError: If this machine has no such device.
    """
    try:
        network.to(device).eval()
    except (RuntimeError, AssertionError) as error:  # by torch's version
        raise ValueError(f"--device {device}: {error}") from error
    if network.config.pad_token_id is None:
        network.config.pad_token_id = _tokenizer(settings).pad_token_id
    return pl.lift(network, prior=pl.priors.normal(scale=settings.prior_scale))


def _tokenizer(settings: Settings) -> Any:
    """The adapter's own tokenizer if it has one, else the base network's."""
    folder = Path(settings.adapter)
    if not (folder / "tokenizer_config.json").is_file():
        folder = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def text_batches(
    rows: Sequence[Row],
    settings: Settings,
    batch_size: int,
    lora: pl.LiftedNetwork,
    *,
    shuffle: bool = False,
) -> DataLoader[Any]:
    """Tokens and class numbers of the rows, padded batch by batch.

    Raises:
        ValueError: If a label isn't the name of a class.
    """
    numbers = {name: i for i, name in enumerate(settings.label_names)}
    unknown = {label for _, label in rows if label is not None} - numbers.keys()
    if unknown:
        raise ValueError(
            f"Label {min(unknown)!r} isn't one of the classes {sorted(numbers)}. "
            "Name them in the order of the network's outputs: --label-names."
        )
    tokenizer = _tokenizer(settings)
    device = next(iter(lora.weights().values())).device

    def collate(some: list[Row]) -> dict[str, Tensor]:
        texts = [text for text, _ in some]
        batch = dict(
            tokenizer(
                texts,
                padding=True,
                truncation=True,
                max_length=settings.max_length,
                return_tensors="pt",
            )
        )
        if some[0][1] is not None:
            batch["labels"] = torch.tensor([numbers[str(name)] for _, name in some])
        return {name: value.to(device) for name, value in batch.items()}

    return DataLoader(list(rows), batch_size, shuffle=shuffle, collate_fn=collate)  # type: ignore[arg-type]


def read_rows(
    path: Path, text_column: str, label_column: str, *, optional: bool = False
) -> list[Row]:
    """Texts and labels of a file; labels are None where they are optional and missing.

    Raises:
        ValueError: If it isn't such a file, is empty, a column is missing, or a row
            has no value in it.
    """
    read = {".csv": _csv_rows, ".jsonl": _json_rows, ".json": _json_rows}
    if path.suffix.lower() not in read:
        raise ValueError(f"{path}: expected a file that ends in .csv or .jsonl.")
    with path.open(encoding="utf-8-sig", newline="") as file:  # as spreadsheets write
        rows = list(read[path.suffix.lower()](path, file))
    if not rows:
        raise ValueError(f"{path} has no rows.")
    first = rows[0][1]
    labelled = label_column in first or not optional
    columns = [text_column, label_column] if labelled else [text_column]
    for column in columns:
        if column not in first:
            raise ValueError(
                f"{path} has no column {column!r}, but {sorted(first)}. "
                "Name it by --text-column or --label-column."
            )
        for line, row in rows:
            if row.get(column) is None:
                raise ValueError(f"{path}, line {line}: no value for {column!r}.")
    return [
        (str(row[text_column]), str(row[label_column]) if labelled else None)
        for _, row in rows
    ]


def _csv_rows(path: Path, file: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(file)
    for row in reader:
        yield reader.line_num, row


def _json_rows(path: Path, file: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}, line {number}: expected one JSON object in each line, as "
                '{"text": "...", "label": "..."}.'
            )
        yield number, row


def write_prediction(
    path: Path, rows: Sequence[Row], prediction: pl.Prediction, settings: Settings
) -> None:
    """A CSV file with a row for each text, in order."""
    names = settings.label_names
    confidence, best = prediction.probs.max(-1)
    columns: dict[str, list[Any]] = {settings.text_column: [text for text, _ in rows]}
    if prediction.labels is not None:
        columns[settings.label_column] = [label for _, label in rows]
    columns |= {
        "class": [names[i] for i in best.tolist()],
        "confidence": confidence.tolist(),
        **{f"p({n})": prediction.probs[:, i].tolist() for i, n in enumerate(names)},
        "total_entropy": prediction.total_entropy.tolist(),
        "aleatoric_entropy": prediction.aleatoric_entropy.tolist(),
        "epistemic_entropy": prediction.epistemic_entropy.tolist(),
    }
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
