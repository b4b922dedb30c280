"""A saved adapter of a text classifier: its network, its classes, its tokens."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from peft import PeftConfig, PeftModel, load_peft_weights
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

import pyro_lora as pl
from pyro_lora.cli.text_files import Texts, label_numbers

SETTINGS = "command_line"  # their name in the posterior's metadata
# What save_pretrained calls its words there, and the posterior's folder in that of the
# adapter.
_PRETRAINED, _BESIDE_ADAPTER = "pretrained", "posterior"
_UNLIKELY = 7919  # a number of classes that no other size of a network is


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


def save_with(posterior: Any, folder: Path, settings: Settings) -> None:
    """Save a posterior with its settings: both are there, or neither is."""
    # The two folders may be moved together.
    seen_from = os.path.relpath(Path(settings.adapter).resolve(), folder.resolve())
    here = replace(settings, adapter=seen_from)
    pl.save(posterior, folder, metadata={SETTINGS: json.dumps(asdict(here))})


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
    if not (folder / "manifest.json").is_file() and (inner / "manifest.json").is_file():
        folder = inner
    fitted = remembered(folder)
    return folder, fitted, settings_of(folder, fitted, **told)


def remembered(folder: Path) -> Settings | None:
    """The settings of a fit; None of a posterior that ``pyro_lora.save`` wrote.

    Raises:
        ValueError: If the folder holds no posterior or is damaged.
    """
    remedy = "Make it by `pyro-lora fit`, or by save_pretrained."
    if not (folder / "manifest.json").is_file():
        raise ValueError(f"{folder} holds no manifest.json. {remedy}")
    metadata = pl.load_metadata(folder)
    text = metadata.get(SETTINGS)
    if text is None:
        return Settings(adapter="..") if _PRETRAINED in metadata else None
    try:
        return msgspec.json.decode(text, type=Settings)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ValueError(
            f"{folder}: its settings can't be read ({error}). {remedy}"
        ) from error


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
    return [adapter, Path(_config_of(adapter).base_model_name_or_path)]


def files_of(settings: Settings) -> list[Path]:
    """What is read in those folders; a table that somebody keeps there is not."""
    return [
        file
        for folder in folders_of(settings)
        if folder.is_dir()
        for file in folder.iterdir()
        if file.is_file() and file.suffix != ".csv"
    ]


def restored(
    posterior: Path, settings: Settings, device: str, texts: Texts | None = None
) -> tuple[pl.LiftedNetwork, Settings]:
    """The network of a fit, lifted anew, and the settings with its classes' names.

    Raises:
        ValueError: If the adapter is another one.
    """
    adapter, names = Path(settings.adapter), settings.label_names
    network = network_of(adapter)
    _name_classes(network, posterior)
    if names and network.config.num_labels != len(names):
        raise ValueError(
            f"{adapter} has {network.config.num_labels} classes, but {posterior} or "
            f"--label-names has {len(names)}. If the adapter was changed, fit again; "
            "else name all of its classes, in order."
        )
    if not names:
        settings = replace(settings, label_names=class_names(network, texts))
    return lifted(network, settings, device), settings


class _Model(msgspec.Struct):
    kind: str


class _Pretrained(msgspec.Struct):
    """What is read of the words that ``save_pretrained`` leaves."""

    class_names: tuple[str, ...] | None = None
    model: _Model | None = None


def _name_classes(network: PeftModel, posterior: Path) -> None:
    """Give the network the names that it had when ``save_pretrained`` wrote it.

    Raises:
        ValueError: If that was no classifier, or its words can't be read.
    """
    text = pl.load_metadata(posterior).get(_PRETRAINED)
    if text is None:
        return
    with _reading(f"{posterior}: what is said of its network can't be read."):
        about = msgspec.json.decode(text, type=_Pretrained)
    if about.model is not None and about.model.kind != "classification":
        raise ValueError(
            f"{posterior} is of models.{about.model.kind}; the command line knows "
            "models.classification. Load others by pyro_lora.from_pretrained."
        )
    names = about.class_names or ()
    if len(names) == network.config.num_labels:
        network.config.id2label = dict(enumerate(names))


def load_with(
    folder: Path, fitted: Settings | None, lora: pl.LiftedNetwork, model: Any = None
) -> Any:
    """The posterior that was saved with these settings.

    Raises:
        ValueError: If it can't be loaded, or another one was saved in the meantime.
    """
    posterior = pl.load(folder, lora, model=model)
    if remembered(folder) != fitted:
        raise ValueError(f"{folder} was written to while it was read. Try again.")
    return posterior


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """What others say of a file that they can't read begins with the file's name.

    Raises:
        ValueError: In place of whatever they raise.
    """
    try:
        yield
    # Below PEFT and transformers are readers without a common class of error, and
    # tokenizers raises nothing narrower.
    except Exception as error:
        words = " ".join(str(error).split())
        short = words if len(words) < 300 else f"{words[:300]}..."
        raise ValueError(f"{what} ({type(error).__name__}: {short})") from error


def _config_of(adapter: Path) -> Any:
    file = adapter / "adapter_config.json"
    if not file.is_file():
        raise ValueError(
            f"{file} doesn't exist. Name a folder that save_pretrained of a PEFT model "
            "wrote."
        )
    with _reading(f"{file} is no configuration of an adapter."):
        config = PeftConfig.from_pretrained(str(adapter))
    if config.task_type != "SEQ_CLS":
        raise ValueError(
            f"{file}: an adapter of task type {config.task_type}; the command line "
            "knows SEQ_CLS, text classification. Write the Pyro model in Python for "
            "others."
        )
    name = config.base_model_name_or_path
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"{file}: base_model_name_or_path is {name!r}, expected the name or the "
            "folder of the network that the adapter was trained on."
        )
    return config


def _weights_of(adapter: Path) -> dict[str, Tensor]:
    names = ("adapter_model.safetensors", "adapter_model.bin")
    file = next((adapter / name for name in names if (adapter / name).is_file()), None)
    if file is None:
        raise ValueError(
            f"{adapter / names[0]} doesn't exist. Name a folder that save_pretrained "
            "of a PEFT model wrote."
        )
    with _reading(f"{file} is truncated, or holds no weights. Copy it again."):
        weights = load_peft_weights(str(adapter), device="cpu")
    if not isinstance(weights, dict):
        raise ValueError(
            f"{file} holds an object of type {type(weights).__name__}, expected "
            "tensors by name."
        )
    return weights


def network_of(adapter: Path) -> PeftModel:
    """The network with its adapter, with as many classes as that has.

    Raises:
        ValueError: If the adapter isn't one of a classifier, a file is damaged, or the
            adapter and its base don't belong together.
    """
    config, weights = _config_of(adapter), _weights_of(adapter)
    name = config.base_model_name_or_path
    base_is = f"{adapter}: its base network {name!r} can't be loaded."
    if not Path(name).is_dir():
        base_is += (
            " There is no such folder from here; if it's a name on the hub that isn't "
            "in its cache yet, --online fetches it."
        )
    with _reading(base_is):
        classes = _num_classes(name, weights)
        base, report = AutoModelForSequenceClassification.from_pretrained(
            name,
            num_labels=classes,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # of a head that the adapter brings
        )
    with _reading(f"{adapter} doesn't fit its base network {name!r}."):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # below
            network = PeftModel.from_pretrained(base, str(adapter))
        loaded: Any = network.load_adapter(str(adapter), "default")
    _check_complete(adapter, name, network, loaded, report)
    return network


def _check_complete(
    adapter: Path, name: str, network: PeftModel, loaded: Any, report: Any
) -> None:
    """Every weight of the network was in a file, and all of the adapter's are used.

    Raises:
        ValueError: If not.
    """
    if loaded.missing_keys:
        raise ValueError(
            f"{adapter} has no weights for {loaded.missing_keys[0]!r} and "
            f"{len(loaded.missing_keys) - 1} others, which its configuration calls "
            "for. Copy it again."
        )
    if loaded.unexpected_keys:
        raise ValueError(
            f"{adapter} has weights {loaded.unexpected_keys[0]!r} and "
            f"{len(loaded.unexpected_keys) - 1} others that its base network {name!r} "
            "has no place for: it's an adapter of another network."
        )
    # A head that is replaced by the adapter's is a copy inside of a wrapper by PEFT.
    own = {
        key.replace(".base_layer.", ".")
        for key, _ in network.get_base_model().named_parameters()
    }
    absent = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    random = sorted(absent & own)
    if random:
        raise ValueError(
            f"{adapter}: neither it nor its base network {name!r} has weights for "
            f"{random[0]!r} and {len(random) - 1} others. They would be random."
        )


def _num_classes(name: str, weights: dict[str, Tensor]) -> int:
    """Of the head that the adapter brings, else of the base network's own."""
    config = AutoConfig.from_pretrained(name)
    count: int = config.num_labels
    config.num_labels = _UNLIKELY
    with torch.device("meta"):
        probe = AutoModelForSequenceClassification.from_config(config)
    for key, value in probe.named_parameters():
        saved = weights.get(f"base_model.model.{key}")
        if _UNLIKELY in value.shape and saved is not None:
            return saved.shape[value.shape.index(_UNLIKELY)]
    return count


class RightAnswers(Messenger):
    """How often a model is right in passes over the texts that are made anyway.

    Args:
        num_texts: N, in one pass.
    """

    def __init__(self, num_texts: int) -> None:
        super().__init__()
        self._num_texts = num_texts
        self._right: list[Tensor] = []  # (B,) each

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] == "y":
            self._right.append(msg["fn"].logits.argmax(-1) == msg["value"])

    def accuracy(self) -> float:
        """Of the last pass: before it guides run a model on the first batch."""
        last = torch.cat(self._right)[-self._num_texts :]
        return last.double().mean().item()


def class_names(
    network: PeftModel, texts: Texts | None, given: Sequence[str] = ()
) -> tuple[str, ...]:
    """The names of the network's classes, in the order of its outputs.

    Those that are given; else the names in the network's configuration, or 0, 1, 2,
    ..., whichever the labels are.

    Raises:
        ValueError: If there are more or fewer classes than names, or the labels could
            mean either.
    """
    config = network.config
    if given:
        if len(given) != config.num_labels:
            raise ValueError(
                f"--label-names: {len(given)} names, but the network has "
                f"{config.num_labels} classes. Name all of its classes, in order."
            )
        return tuple(given)
    labels = set((texts and texts.labels) or ())
    names = tuple(str(config.id2label[i]) for i in range(config.num_labels))
    numbers = tuple(str(i) for i in range(config.num_labels))
    if names != numbers and labels and labels <= {*names} & {*numbers}:
        raise ValueError(
            f"{texts and texts.path}: the labels {sorted(labels)} are names of the "
            f"network's classes, {list(names)}, and numbers of them, too. Say which by "
            "--label-names, in the order of the network's outputs."
        )
    return numbers if any(label.isdecimal() for label in labels - {*names}) else names


def lifted(network: PeftModel, settings: Settings, device: str) -> pl.LiftedNetwork:
    """The network on its device, with a normal prior on the adapter's weights.

    Raises:
        ValueError: If this machine has no such device, or the network can't be lifted.
    """
    try:
        torch.zeros(1, device=device).item()  # the meta device has no numbers
        network.to(device).eval()
    except (RuntimeError, AssertionError) as error:  # by torch's version
        words = next(iter(str(error).splitlines()), "there is no such device")
        raise ValueError(f"--device {device}: {words}") from error
    if network.config.pad_token_id is None:
        network.config.pad_token_id = tokenizer_of(settings).pad_token_id
    prior = pl.priors.normal(scale=settings.prior_scale)
    try:
        return pl.lift(network, prior=prior)
    except ValueError as error:
        raise ValueError(f"{settings.adapter}: {error}") from error


def tokenizer_of(settings: Settings) -> Any:
    """The adapter's own tokenizer if it has one, else the base network's.

    Raises:
        ValueError: If it can't be loaded, or has no token to pad with.
    """
    folder = Path(settings.adapter)
    if not (folder / "tokenizer_config.json").is_file():
        name = _config_of(folder).base_model_name_or_path
        folder = Path(name)
        if folder.is_dir() and not any(
            next(folder.glob(pattern), None) for pattern in ("*token*", "*vocab*")
        ):
            raise ValueError(
                f"Neither {settings.adapter} nor its base network {name!r} has a "
                "tokenizer. Save it into one of them by save_pretrained."
            )
        folder = name
    with _reading(f"{settings.adapter}: its tokenizer, {folder}, can't be loaded."):
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(
            f"{folder}: its tokenizer has neither a padding token nor one for the end. "
            "Set tokenizer.pad_token, and save it into the adapter's folder."
        )
    return tokenizer


def _num_tokens(network: Any, tokenizer: Any, settings: Settings) -> int:
    """Tokens after which a text is cut: as many as were asked for, if all can be read.

    A network of the family of RoBERTa counts positions from after the padding's.
    """
    limits = [settings.max_length, tokenizer.model_max_length]
    limits += [
        module.num_embeddings
        - (-1 if module.padding_idx is None else module.padding_idx)
        - 1
        for name, module in network.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
    ]
    positions = getattr(network.config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        limits.append(positions)
    return min(limits)


def check_tokens(texts: Texts, settings: Settings, lora: pl.LiftedNetwork) -> None:
    """Refuse texts that the network can't read, and warn of those that will be cut.

    Args:
        texts: All of them are looked at, before the first pass over them.
        settings: Whose tokenizer.
        lora: The network.

    Raises:
        ValueError: If a text has no tokens, or one that the network doesn't know.
    """
    network: Any = lora.network
    tokenizer = tokenizer_of(settings)
    most = _num_tokens(network, tokenizer, settings)
    vocabulary = network.get_input_embeddings().weight.shape[0]
    at_once, num_cut, first_cut = 1000, 0, 0
    for start in range(0, len(texts), at_once):
        chunk = list(texts.texts[start : start + at_once])
        for index, ids in enumerate(tokenizer(chunk, verbose=False).input_ids, start):
            if not ids:
                raise ValueError(
                    f"{texts.where(index)}: the tokenizer finds no tokens in the text "
                    f"{texts.texts[index][:50]!r}. Delete the row."
                )
            if max(ids) >= vocabulary:
                raise ValueError(
                    f"{texts.where(index)}: token {max(ids)}, but the network knows "
                    f"{vocabulary}. The tokenizer of {settings.adapter} is of another "
                    "network."
                )
            if len(ids) > most:
                num_cut, first_cut = num_cut + 1, first_cut if num_cut else index
    if num_cut:
        why = (
            "--max-length" if most == settings.max_length else "the network's positions"
        )
        warnings.warn(
            f"{num_cut} of {len(texts)} texts are cut after {most} tokens ({why}), the "
            f"first one in {texts.where(first_cut)}.",
            stacklevel=2,
        )


def text_batches(
    texts: Texts,
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
    numbers = label_numbers(texts, settings.label_names)
    tokenizer = tokenizer_of(settings)
    most = _num_tokens(lora.network, tokenizer, settings)
    device = next(iter(lora.weights().values())).device

    def collate(indices: list[int]) -> dict[str, Tensor]:
        batch = dict(
            tokenizer(
                [texts.texts[i] for i in indices],
                padding=True,
                truncation=True,
                max_length=most,
                return_tensors="pt",
            )
        )
        if numbers is not None:
            batch["labels"] = torch.tensor([numbers[i] for i in indices])
        return {name: value.to(device) for name, value in batch.items()}

    every: Any = range(len(texts))
    size = min(batch_size, len(texts))
    return DataLoader(every, size, shuffle=shuffle, collate_fn=collate)
