"""What the files beside a posterior and an adapter say, before anything is loaded.

A posterior's manifest and an adapter's configuration are JSON, and a file of
safetensors begins with JSON: no torch is needed to know the settings of a fit, where
its adapter is, and mostly its classes. Whether the files are whole and belong together
is checked when they are loaded.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec

import pyro_lora as pl
from pyro_lora.cli.text_files import MANIFEST, POSTERIOR, TABLES, Texts, read_json

SETTINGS = "command_line"  # their name in the posterior's metadata
# What save_pretrained calls its words there, and the posterior's folder in that of the
# adapter.
PRETRAINED, _BESIDE_ADAPTER = "pretrained", "posterior"
_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
_HEAD = re.compile(r"base_model\.model\.\w+\.weight")  # of one layer
_LONGEST_HEADER = 10**8  # of a file of safetensors, bytes


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a posterior's folder remembers of its fit.

    Attributes:
        adapter: Folder of the PEFT adapter, as seen from the posterior's.
        label_names: Names of the classes, in the order of the logits; none are those
            that the network knows.
        text_column: Column of the texts.
        label_column: Column of the labels.
        max_length: Tokens after which a text is cut.
        prior_scale: Standard deviation of the prior that the network is lifted with.
    """

    adapter: str
    label_names: tuple[str, ...] = ()
    text_column: str = "text"
    label_column: str = "label"
    max_length: Annotated[int, msgspec.Meta(ge=1, le=2**53)] = 128
    prior_scale: Annotated[float, msgspec.Meta(gt=0, le=1e9)] = 1.0


def opened(
    folder: Path, told: Mapping[str, Any]
) -> tuple[Path, Settings | None, Settings]:
    """Where a posterior is, the settings of its fit, and those that hold now.

    Args:
        folder: As ``pyro-lora fit`` wrote it, or ``save_pretrained``, whose adapter has
            the posterior in a folder of its own.
        told: What the command line says instead; None where it doesn't.

    Raises:
        ValueError: If there is no posterior, or its adapter is gone or never named.
    """
    inner = folder / _BESIDE_ADAPTER
    if not (folder / MANIFEST).is_file() and (inner / MANIFEST).is_file():
        folder = inner
    fitted = remembered(folder)
    return folder, fitted, settings_of(folder, fitted, **told)


def remembered(folder: Path) -> Settings | None:
    """The settings of a fit; None of a posterior that ``pyro_lora.save`` wrote.

    Raises:
        ValueError: If the folder holds no posterior or is damaged.
    """
    remedy = "Make it by `pyro-lora fit`, or by save_pretrained."
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} holds no {MANIFEST}. {remedy}")
    metadata = _metadata(folder)
    text = metadata.get(SETTINGS)
    if text is None:
        return Settings(adapter="..") if PRETRAINED in metadata else None
    try:
        return msgspec.json.decode(text, type=Settings)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ValueError(
            f"{folder}: its settings can't be read ({error}). {remedy}"
        ) from error


def _metadata(folder: Path) -> dict[str, str]:
    """Those of a manifest, whose checksums are looked at when it is loaded.

    Raises:
        ValueError: If there are none.
    """
    content = read_json(folder / MANIFEST)
    metadata = content.get("metadata")
    if content.get("format") == POSTERIOR and isinstance(metadata, dict):
        if all(isinstance(words, str) for words in metadata.values()):
            return metadata
    return pl.load_metadata(folder)  # which says what is wrong with it


def settings_of(folder: Path, fitted: Settings | None, **given: Any) -> Settings:
    """The settings of a fit, whose adapter is there, or others in place of them.

    Args:
        folder: Of a posterior.
        fitted: What it remembers.
        **given: What the command line says instead; None where it doesn't.

    Raises:
        ValueError: If the adapter is gone, or was never named.
    """
    others = {name: value for name, value in given.items() if value}
    if "adapter" in others:
        others["adapter"] = str(Path(others["adapter"]).resolve())
    elif fitted is None:
        raise ValueError(
            f"{folder} was saved by pyro_lora.save, which doesn't know the adapter's "
            "folder: name it by --adapter."
        )
    else:
        others["adapter"] = os.path.normpath(folder.resolve() / fitted.adapter)
    settings = replace(fitted or Settings(adapter=""), **others)
    if not Path(settings.adapter).is_dir():
        raise ValueError(
            f"{folder}: the adapter that it is about isn't in {settings.adapter} any "
            "more. Say where it is by --adapter, or fit again."
        )
    return settings


def folders_of(settings: Settings) -> list[Path]:
    """Of the adapter, and of its base network if it is in one.

    Raises:
        ValueError: If the adapter's configuration can't be read.
    """
    adapter = Path(settings.adapter)
    return [adapter, Path(base_of(adapter))]


def files_of(settings: Settings) -> list[Path]:
    """What is read in those folders; a table that somebody keeps there is not."""
    return [
        file
        for folder in folders_of(settings)
        if folder.is_dir()
        for file in folder.iterdir()
        if file.is_file() and file.suffix.lower() not in TABLES
    ]


def base_of(adapter: Path) -> str:
    """Name or folder of the network that an adapter of a classifier was trained on.

    Raises:
        ValueError: If its configuration isn't one of such an adapter.
    """
    file = adapter / "adapter_config.json"
    if not file.is_file():
        raise ValueError(
            f"{file} doesn't exist. Name a folder that save_pretrained of a PEFT model "
            "wrote."
        )
    config = read_json(file)
    task, name = config.get("task_type"), config.get("base_model_name_or_path")
    if not isinstance(task, str | None) or not isinstance(config.get("peft_type"), str):
        raise ValueError(f"{file} is no configuration of an adapter. Copy it again.")
    if task != "SEQ_CLS":
        raise ValueError(
            f"{file}: an adapter of task type {task}; the command line knows SEQ_CLS, "
            "text classification. Write the Pyro model in Python for others."
        )
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"{file}: base_model_name_or_path is {name!r}, expected the name or the "
            "folder of the network that the adapter was trained on."
        )
    return name


def weights_file(adapter: Path) -> Path:
    """The file of an adapter's weights.

    Raises:
        ValueError: If there is none.
    """
    files = [adapter / name for name in _WEIGHTS]
    for file in files:
        if file.is_file():
            return file
    raise ValueError(
        f"{files[0]} doesn't exist. Name a folder that save_pretrained of a PEFT model "
        "wrote."
    )


def network_names(adapter: Path) -> tuple[str, ...] | None:
    """The names of the network's classes, as the files of adapter and base say them.

    Returns:
        As many as the network has; None where the files don't say, since the base
        network isn't in a folder, or the adapter's head has several layers.

    Raises:
        ValueError: If the adapter's configuration isn't one of a classifier, or there
            are no weights.
    """
    base = Path(base_of(adapter)) / "config.json"
    heads, config = _head_sizes(weights_file(adapter)), read_json(base)
    if heads is None or len(heads) > 1 or not config:
        return None
    labels = config.get("id2label")
    if labels is None and "num_labels" not in config:
        labels = {"0": "LABEL_0", "1": "LABEL_1"}  # as transformers has it
    if not isinstance(labels, dict) or {*labels} != {*map(str, range(len(labels)))}:
        return None
    if heads and heads[0] != len(labels):  # which are then named anew
        return tuple(f"LABEL_{i}" for i in range(heads[0]))
    return tuple(str(labels[str(i)]) for i in range(len(labels)))


def _head_sizes(file: Path) -> list[int] | None:
    """Outputs of the layers that an adapter brings whole; None if that isn't known."""
    if file.suffix != ".safetensors":
        return None
    with file.open("rb") as content:
        size = int.from_bytes(content.read(8), "little")
        header = content.read(size) if size <= _LONGEST_HEADER else b""
    sizes = []
    try:
        for name, entry in json.loads(header).items():
            # The adapter's own factors have a name of PEFT's in theirs.
            if name == "__metadata__" or ".lora_" in name or len(entry["shape"]) < 2:
                continue
            if not _HEAD.fullmatch(name):
                return None
            sizes.append(int(entry["shape"][0]))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None  # a damaged file, which its reader describes
    return sizes


def class_names(
    names: Sequence[str], texts: Texts | None, given: Sequence[str] = ()
) -> tuple[str, ...]:
    """The names of the classes, in the order of the network's outputs.

    Those that are given; else the names in the network's configuration, or 0, 1, 2,
    ..., whichever the labels are.

    Args:
        names: In the network's configuration.
        texts: A file with labels.
        given: On the command line.

    Raises:
        ValueError: If there are more or fewer classes than names, or the labels could
            mean either.
    """
    names = tuple(names)
    if given:
        if len(given) != len(names):
            raise ValueError(
                f"--label-names: {len(given)} names, but the network has "
                f"{len(names)} classes. Name all of its classes, in order."
            )
        return tuple(given)
    labels = set((texts and texts.labels) or ())
    numbers = tuple(str(i) for i in range(len(names)))
    if names != numbers and labels and labels <= {*names} & {*numbers}:
        raise ValueError(
            f"{texts and texts.path}: the labels {sorted(labels)} are names of the "
            f"network's classes, {list(names)}, and numbers of them, too. Say which by "
            "--label-names, in the order of the network's outputs."
        )
    return numbers if any(label.isdecimal() for label in labels - {*names}) else names
