"""A saved adapter of a text classifier: its network, its classes, its tokens."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from peft import PeftConfig, PeftModel, load_peft_weights
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

import pyro_lora as pl
from pyro_lora.cli.saved_settings import (
    PRETRAINED,
    SETTINGS,
    Settings,
    base_of,
    class_names,
    remembered,
    weights_file,
)
from pyro_lora.cli.text_files import Texts, label_numbers

_UNLIKELY = 7919  # a number of classes that no other size of a network is


def save_with(posterior: Any, folder: Path, settings: Settings) -> None:
    """Save a posterior with its settings: both are there, or neither is."""
    # The two folders may be moved together.
    seen_from = os.path.relpath(Path(settings.adapter).resolve(), folder.resolve())
    here = replace(settings, adapter=seen_from)
    pl.save(posterior, folder, metadata={SETTINGS: json.dumps(asdict(here))})


def restored(
    posterior: Path, settings: Settings, device: str, texts: Texts | None = None
) -> tuple[pl.LiftedNetwork, Settings]:
    """The network of a fit, lifted anew, and the settings with its classes' names.

    Raises:
        ValueError: If the adapter is another one.
    """
    adapter, names = Path(settings.adapter), settings.label_names
    metadata = pl.load_metadata(posterior)  # first, since it looks at the checksum
    network = network_of(adapter)
    if PRETRAINED in metadata:
        _name_classes(network, posterior, metadata[PRETRAINED])
    if names and network.config.num_labels != len(names):
        raise ValueError(
            f"{adapter} has {network.config.num_labels} classes, but {posterior} or "
            f"--label-names has {len(names)}. If the adapter was changed, fit again; "
            "else name all of its classes, in order."
        )
    if not names:
        settings = replace(settings, label_names=class_names(names_in(network), texts))
    return lifted(network, settings, device), settings


class _Model(msgspec.Struct):
    kind: str


class _Pretrained(msgspec.Struct):
    """What is read of the words that ``save_pretrained`` leaves."""

    class_names: tuple[str, ...] | None = None
    model: _Model | None = None


def _name_classes(network: PeftModel, posterior: Path, text: str) -> None:
    """Give the network the names that it had when ``save_pretrained`` wrote it.

    Raises:
        ValueError: If that was no classifier, or its words can't be read.
    """
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


def _weights_of(adapter: Path) -> dict[str, Tensor]:
    file = weights_file(adapter)
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
    name = base_of(adapter)
    with _reading(
        f"{adapter / 'adapter_config.json'} is no configuration of an adapter."
    ):
        PeftConfig.from_pretrained(str(adapter))
    weights = _weights_of(adapter)
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


def names_in(network: PeftModel) -> tuple[str, ...]:
    """The names of the network's classes, in the order of its outputs."""
    config = network.config
    return tuple(str(config.id2label[i]) for i in range(config.num_labels))


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
    folder, home = Path(settings.adapter), settings.adapter
    if not (folder / "tokenizer_config.json").is_file():
        name = base_of(folder)
        base = Path(name)
        if base.is_dir() and not any(
            next(base.glob(pattern), None) for pattern in ("*token*", "*vocab*")
        ):
            raise ValueError(
                f"Neither {settings.adapter} nor its base network {name!r} has a "
                "tokenizer. Save it into one of them by save_pretrained."
            )
        home = name
    with _reading(f"{settings.adapter}: its tokenizer, {home}, can't be loaded."):
        tokenizer = AutoTokenizer.from_pretrained(home)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(
            f"{home}: its tokenizer has neither a padding token nor one for the end. "
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
