"""A posterior beside the files of its adapter, in a folder or on the hub.

The folder is a PEFT adapter, and one more folder in it has the posterior:

    adapter_config.json  adapter_model.safetensors  README.md      as PEFT writes them
    posterior/manifest.json  posterior/<64 digits>.safetensors     as ``save`` does

Among the manifest's metadata is what PEFT doesn't say of the network (the names of its
classes), and which of the ready models the posterior is of:

    pretrained: {"class_names": ["bad", "good"], "model": {"kind": "classification",
                 "settings": {"num_data": 1000}}}
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import torch
import transformers
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from peft import PeftConfig, PeftModel
from torch import nn

import pyro_lora.models as models
from pyro_lora.export.adapters import one_adapter, write_adapter
from pyro_lora.export.checkpoint import load, load_metadata, save
from pyro_lora.ground.interrupts import leaving_no_trace, undone
from pyro_lora.ground.settings import check_kind
from pyro_lora.ground.tensor_folder import Schema, put
from pyro_lora.ground.unfinished import aside, make_folder
from pyro_lora.ground.warning import warn
from pyro_lora.ground.weights import Weights
from pyro_lora.lift import lift
from pyro_lora.lifting.lifted_network import LiftedNetwork
from pyro_lora.lifting.sites import uncompiled
from pyro_lora.likelihood.model_trace import Model
from pyro_lora.posteriors.posterior import (
    Posterior,
    WithMode,
    kind_of,
    largest_gaussian,
    point_to_serve,
)
from pyro_lora.posteriors.prior import with_scaled_sites
from pyro_lora.priors import Prior

# What the client of HTTP raises that the hub's is built on: httpx, or one like it.
_OF_HTTP: Any = HfHubHTTPError.__bases__[0]
_NOT_REACHED = (_OF_HTTP, OfflineModeIsEnabled, LocalEntryNotFoundError)

_FOLDER = "posterior"
_METADATA = "pretrained"  # its name among the manifest's metadata

# What transformers calls a network for each of PEFT's tasks.
_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_WITH_CLASSES = ("SEQ_CLS", "TOKEN_CLS")

_READY: dict[str, Any] = {
    name: kind
    for name, kind in vars(models).items()
    if not name.startswith("_")
    and is_dataclass(kind)
    and kind.__module__ == models.__name__
}


class _ReadyModel(Schema):
    """One of ``models``, and its fields but for the network."""

    kind: str
    settings: dict[str, Any] = msgspec.field(default_factory=dict)


class _Pretrained(Schema):
    """What else it takes to make the network and the model again."""

    class_names: tuple[str, ...] | None = None
    model: _ReadyModel | None = None


@leaving_no_trace
def save_pretrained(
    posterior: WithMode,
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a posterior beside its adapter; its method says more.

    Args:
        posterior: Of one PEFT model.
        path: The folder.
        metadata: Words of the user's own.

    Raises:
        ValueError: If there isn't one adapter that PEFT saves, the prior would make
            other weights of it, or the metadata have the name that is kept for this.
    """
    words = dict(metadata or {})
    if _METADATA in words:
        raise ValueError(
            f"The metadata have {_METADATA!r}, which is what save_pretrained calls its "
            "own. Give yours another name."
        )
    lora, network, adapter = one_adapter(posterior, "save_pretrained")
    point = _point(posterior, lora)
    _check_made_again(posterior, lora, point)
    folder = Path(path)
    about = _Pretrained(_class_names(network), _described(posterior.model))
    words[_METADATA] = msgspec.json.encode(about).decode()
    make_folder(folder)
    with aside(folder) as unfinished:
        before = lora.weights()
        # PEFT writes what is in the network, so the mode is put there, for that long.
        with undone(partial(lora.load, before)):
            lora.load(point)
            meaning = _MEANING.format(point=_named(posterior))
            written = write_adapter(
                network, adapter, unfinished / "adapter", _TITLE, meaning
            )
        # It has a mode of its own, so it is right with the old adapter, too.
        save(posterior, folder / _FOLDER, metadata=words)
        for file in sorted(written.iterdir()):
            put(file, folder / file.name)


def push_to_hub(
    posterior: WithMode,
    repo_id: str,
    *,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str,
    metadata: Mapping[str, str] | None,
) -> str:
    """Upload what :func:`save_pretrained` writes; its method says more.

    Args:
        posterior: Of one PEFT model.
        repo_id: The repository.
        private: Whether it is made a private one.
        token: The hub's.
        revision: The branch.
        commit_message: What the commit is called.
        metadata: Words of the user's own.

    Returns:
        The commit's address.
    """
    _, network, adapter = one_adapter(posterior, "push_to_hub")
    base = network.peft_config[adapter].base_model_name_or_path
    if base and Path(base).is_dir():
        warn(
            f"The adapter's base network is {base!r}, a folder, so nobody else can "
            "load it. Set the hub's name first: network.peft_config[adapter]."
            "base_model_name_or_path = 'owner/name'."
        )
    api = HfApi(token=token)
    without = (
        "Without one, posterior.save_pretrained writes the same folder, and "
        "pl.from_pretrained reads it."
    )
    with TemporaryDirectory() as folder, _reaching_the_hub(repo_id, without):
        save_pretrained(posterior, folder, metadata)
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            delete_patterns=f"{_FOLDER}/*",  # the new ones have other names
        )
    return str(commit.commit_url)


def from_pretrained(
    name: str | os.PathLike[str],
    *,
    network: nn.Module | None = None,
    model: Callable[[LiftedNetwork], Model] | None = None,
    prior: Prior | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Posterior:
    """The posterior that ``posterior.save_pretrained`` or ``push_to_hub`` left.

    The adapter's base network is loaded by transformers, the adapter by PEFT, and both
    are lifted: ``posterior.networks`` has the lifted network and ``posterior.model``
    the Pyro model. Nothing is executed that is in the folder.

    Args:
        name: A folder, or a repository of the hub.
        network: The base network, or a PEFT model with this adapter; None loads what
            ``adapter_config.json`` names, as ``AutoModelFor...`` of its task.
        model: The Pyro model, a function of the lifted network, such as
            ``lambda lora: my_model(lora)``; None is the ready model that was saved, if
            it was one of ``models``, else none.
        prior: The prior to lift with, where it wasn't normal.
        revision: The hub's branch, tag or commit.
        token: The hub's; None is the one that you have logged in with.

    Returns:
        The posterior.

    Raises:
        TypeError: If ``network`` is no module.
        ValueError: If a file is missing or damaged, the network is another one, it
            isn't said which it is, it can't be loaded by its name, or ``name`` is
            neither a folder nor a repository's.
        OSError: If the base network isn't where the adapter says, the hub can't be
            reached, or has no such repository.
    """
    folder = Path(name)
    if not folder.is_dir():
        without = (
            "Without one, name a folder that posterior.save_pretrained wrote: there is "
            f"none at {os.path.abspath(folder)!r}."
        )
        try:
            with _reaching_the_hub(str(name), without):
                found = snapshot_download(str(name), revision=revision, token=token)
        except HFValidationError as error:
            raise ValueError(
                f"{str(name)!r} is no folder, nor can a repository of the hub be "
                "called so. Name a folder that posterior.save_pretrained wrote, or "
                "'owner/name'."
            ) from error
        folder = Path(found)
    about = _about(folder)
    if network is None:
        network = _base(folder, about.class_names, token)
    check_kind("network", network, nn.Module, "a torch.nn.Module")
    if not isinstance(uncompiled(network), PeftModel):
        network = PeftModel.from_pretrained(network, str(folder))
    lora = lift(network.eval(), prior=prior)
    built = model(lora) if model is not None else _built(folder, about.model, lora)
    posterior = load(folder / _FOLDER, lora, model=built)
    _name_classes(lora.network, about.class_names)
    return posterior


@contextmanager
def _reaching_the_hub(repo_id: str, without: str) -> Iterator[None]:
    """Where there is no connection, the hub's client raises what its own client does.

    Args:
        repo_id: The repository, which not all of what is raised names.
        without: What can be done without a connection.

    Raises:
        OSError: In place of that.
    """
    try:
        yield
    except _NOT_REACHED as error:
        # The hub's refusals are errors of HTTP, and name the repository.
        if isinstance(error, HfHubHTTPError):
            raise
        words = " ".join(str(error).split())
        raise OSError(
            f"{repo_id!r}: the hub can't be reached ({type(error).__name__}: {words}). "
            "Try again with a network connection, and without HF_HUB_OFFLINE. "
            f"{without}"
        ) from error


def _about(folder: Path) -> _Pretrained:
    """What the posterior's metadata say.

    Raises:
        ValueError: If there are none, or they are damaged.
    """
    remedy = "Make the folder by posterior.save_pretrained."
    if not (folder / _FOLDER).is_dir():
        raise ValueError(f"{folder} holds no folder {_FOLDER!r}. {remedy}")
    text = load_metadata(folder / _FOLDER).get(_METADATA)
    if text is None:
        raise ValueError(
            f"{folder / _FOLDER} doesn't say of which network and model it is. {remedy}"
        )
    try:
        return msgspec.json.decode(text, type=_Pretrained)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ValueError(
            f"{folder / _FOLDER}: what is said of the network can't be read "
            f"({error}). {remedy}"
        ) from error


def _base(
    folder: Path, class_names: tuple[str, ...] | None, token: str | bool | None
) -> Any:
    """The network under the adapter, by transformers.

    Raises:
        OSError: If it isn't there.
        ValueError: If the adapter doesn't say which it is, or it can't be loaded so.
    """
    config = PeftConfig.from_pretrained(str(folder))
    task, base = config.task_type, config.base_model_name_or_path
    if task not in _CLASSES or not base:
        raise ValueError(
            f"{folder / 'adapter_config.json'}: task_type {task!r} and "
            f"base_model_name_or_path {base!r} don't say which network it is for. Give "
            "it as network=."
        )
    classes: dict[str, Any] = {}
    if task in _WITH_CLASSES and class_names is not None:
        names = dict(enumerate(class_names))
        classes = {
            "id2label": names,
            "label2id": {x: c for c, x in names.items()},
            "ignore_mismatched_sizes": True,  # of the head, which the adapter brings
        }
    network = getattr(transformers, _CLASSES[task])
    # transformers reports a head that the base lacks, and which the adapter brings.
    logging = transformers.utils.logging
    try:
        with undone(partial(logging.set_verbosity, logging.get_verbosity())):
            logging.set_verbosity_error()
            return network.from_pretrained(
                base, revision=config.revision, token=token, **classes
            )
    except Exception as error:  # a file of another format has errors of its own
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(
            f"{folder}: its base network {base!r} can't be loaded by that name "
            f"({error}). If it was moved, or takes more arguments than a name, as a "
            "GGUF file does, load it yourself and give it as network=."
        ) from error


def _class_names(network: PeftModel) -> tuple[str, ...] | None:
    """The names of the network's classes, which PEFT doesn't save."""
    names = getattr(getattr(network, "config", None), "id2label", None)
    if not isinstance(names, Mapping):
        return None
    return tuple(str(names[c]) for c in sorted(names))


def _name_classes(network: Any, names: tuple[str, ...] | None) -> None:
    """Give a network the names of its classes, where it has only transformers' own."""
    own = _class_names(network)
    unnamed = tuple(f"LABEL_{c}" for c in range(len(own or ())))
    if names is None or own != unnamed:
        return
    network.config.id2label = dict(enumerate(names))
    network.config.label2id = {name: c for c, name in enumerate(names)}


def _described(model: Model | None) -> _ReadyModel | None:
    """Which of the ready models it is; None of another, or of settings in no file."""
    kind = type(model).__name__
    if _READY.get(kind) is not type(model):
        return None
    settings = {f.name: getattr(model, f.name) for f in fields(_READY[kind])}
    settings.pop("lora")
    try:
        msgspec.json.encode(settings)
    except (TypeError, ValueError):  # a distribution, say
        return None
    return _ReadyModel(kind, settings)


def _built(
    folder: Path, ready: _ReadyModel | None, lora: LiftedNetwork
) -> Model | None:
    """The ready model of a lifted network.

    Raises:
        ValueError: If there is no such one.
    """
    if ready is None:
        return None
    try:
        model: Model = _READY[ready.kind](lora, **ready.settings)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder}: pyro_lora.models has no {ready.kind!r} with {ready.settings} "
            f"({error}). Give the model as model=."
        ) from error
    return model


def _point(posterior: WithMode, lora: LiftedNetwork) -> Weights:
    """The weights that the adapter gets: a mode, the first particle, or trained ones.

    Raises:
        ValueError: If it has neither.
    """
    if posterior.num_samples is not None:
        every = posterior.sample(posterior.num_samples)
        draws = {site: x[:1] for site, x in every.items()}
    else:
        point = point_to_serve(posterior)
        draws = {site: x[None] for site, x in point.items()}
    # Under a prior that isn't centred, these are of a site's noise, not of the site.
    weights = with_scaled_sites(posterior.prior, (lora,), draws)
    return {site: weights[site][0] for site in lora.sites}


def _check_made_again(posterior: WithMode, lora: LiftedNetwork, at: Weights) -> None:
    """The prior makes the same weights of an adapter that is lifted where it's written.

    Raises:
        ValueError: If it starts from those that the adapter had when it was lifted.
    """
    lifted = copy(lora)
    lifted.initial_weights = at
    for site, x in _point(posterior, lifted).items():
        if not torch.equal(x, at[site]):
            raise ValueError(
                f"Site {site!r}: the prior makes it of the weights that the adapter "
                "had when it was lifted, and the saved adapter has others. Give the "
                "prior its own, as priors.subspace(factors=lora.weights()), or keep "
                "the adapter and write the posterior by pyro_lora.save."
            )


def _named(posterior: Posterior) -> str:
    if posterior.num_samples is not None:
        return "the first particle"
    gaussian = largest_gaussian(posterior)
    if gaussian is not None and gaussian.gaussian.is_refined:
        return f"at the weights around which a {kind_of(posterior)} was refined"
    return f"the mode of a {kind_of(posterior)}"


_TITLE = "An adapter and its posterior"
_MEANING = """The adapter is {point};
the folder `posterior` has the whole distribution over its weights, whose predictions
are averages:

```python
import pyro_lora as pl

posterior = pl.from_pretrained("this folder")
prediction = pl.predict(posterior, batches)
```

The adapter alone, by plain PEFT:"""
