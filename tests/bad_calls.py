"""Bad calls, by the thousand: engines, models and faults as data, and a verdict.

``python -m tests.bad_calls`` makes them all and counts. A call is *good* if the library
refuses it in its own words (raised from its own code, naming what is at fault), or does
what is right: where a fault is only a matter of form, the numbers are those without it.
"""

from __future__ import annotations

import random
import re
import signal
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from functools import cache
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.optim import SGD
from torch import Tensor

import pyro_lora as pl
from tests import networks

NUM_DATA, CLASSES = 10, 3
PATIENCE = 20  # seconds for a call
Batch = dict[str, Any]
POSITIONS = 32  # of tests.networks


# Models: name -> lifted network, Pyro model, its batches.


@dataclass(frozen=True)
class Setting:
    """A model with good data, and posteriors of it."""

    lora: pl.LiftedNetwork
    model: Callable[..., Any]
    kind: str  # of the outcomes: class, real, token
    batches: tuple[Batch, ...]
    laplace: pl.LaplacePosterior
    particles: pl.ParticlePosterior


def bare_classifier(lora: pl.LiftedNetwork, num_data: int) -> Callable[..., Tensor]:
    return networks.classifier(lora, num_data)


def texts(kind: str) -> tuple[Batch, ...]:
    found = []
    for size in (6, 4):
        batch: Batch = networks.batch(size, 7, num_labels=CLASSES)
        if kind == "real":
            batch["labels"] = torch.randn(size, dtype=torch.float64)
        if kind == "token":
            mask = batch["attention_mask"].bool()
            batch["labels"] = batch["input_ids"].where(mask, torch.tensor(-100))
        found.append(batch)
    return tuple(found)


@cache
def setting(name: str) -> Setting:
    """A model by name, with a Laplace posterior and particles."""
    torch.manual_seed(0)
    kind = {"regression": "real", "language": "token"}.get(name, "class")
    network = {
        "regression": lambda: networks.bert(1),
        "language": lambda: networks.llama(None),
        "choice": lambda: networks.llama(None),
    }.get(name, lambda: networks.bert(CLASSES))()
    lora = pl.lift(network)
    model = {
        "ready": lambda: pl.models.classification(lora, NUM_DATA),
        "own": lambda: bare_classifier(lora, NUM_DATA),
        "regression": lambda: pl.models.regression(lora, NUM_DATA, scale=0.5),
        "choice": lambda: pl.models.multiple_choice(lora, NUM_DATA, [3, 4, 5]),
        "language": lambda: pl.models.language_model(lora, NUM_DATA),
    }[name]()
    batches = texts(kind)
    guide = laplace_guide(lora, model, kind)
    laplace = _quietly(lambda: guide.laplace_approximation(batches))
    stack = networks.particles(lora, 3)
    particles = pl.ParticlePosterior(stack, (lora,), model, "y")
    return Setting(lora, model, kind, batches, laplace, particles)


def laplace_guide(lora: pl.LiftedNetwork, model: Any, kind: str, **options: Any) -> Any:
    fisher: Any = "mc" if kind == "token" else "exact"
    options = {"fisher": fisher, **options}
    return pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter(), **options)


def svgd(lora: Any, model: Any, **options: Any) -> pl.SVGD:
    arguments: dict[str, Any] = {
        "kernel": pl.kernels.RBF(),
        "optim": SGD({"lr": 1e-3}),
        "num_particles": 2,
        "init_loc_fn": lora.init_to_adapter(jitter=0.01),
        **options,
    }
    return pl.SVGD(model, **arguments)


# Engines: name -> (setting, batches) -> what they give.


def steps(s: Setting, batches: Any) -> Any:
    engine = svgd(s.lora, s.model)
    for batch in batches:
        engine.step(**batch)
    return engine.get_named_particles()


def ran(s: Setting, batches: Any, **options: Any) -> Any:
    engine = svgd(s.lora, s.model, **options)
    engine.run(batches, num_epochs=1, progress_bar=False)
    return engine.get_named_particles()


def by_guide(s: Setting, batches: Any) -> Any:
    guide = AutoNormal(s.model, init_loc_fn=s.lora.init_to_adapter())
    guide(**s.batches[0])
    return pl.predict(guide, batches, model=s.model, num_samples=2, **tokens_of(s))


def tokens_of(s: Setting) -> dict[str, Any]:
    return {"tokens": "each"} if s.kind == "token" else {}


ENGINES: dict[str, Callable[[Setting, Any], Any]] = {
    "fit": lambda s, b: laplace_guide(s.lora, s.model, s.kind).laplace_approximation(b),
    "fit mc diagonal": lambda s, b: laplace_guide(
        s.lora, s.model, s.kind, fisher="mc", structure=pl.structures.Diagonal()
    ).laplace_approximation(b),
    "fit ekfac": lambda s, b: laplace_guide(
        s.lora, s.model, s.kind, fisher="empirical", structure=pl.structures.EKFAC()
    ).laplace_approximation(b),
    "nll": lambda s, b: s.laplace.optimize_prior(objective="nll", batches=b),
    "refit": lambda s, b: laplace_guide(s.lora, s.model, s.kind).refit(
        s.laplace, b, SGD({"lr": 1e-4})
    ),
    "predict draws": lambda s, b: pl.predict(
        s.particles, b, model=s.model, method="sample", **tokens_of(s)
    ),
    "predict linearized": lambda s, b: pl.predict(
        s.laplace, b, model=s.model, method="linearized"
    ),
    "predict guide": by_guide,
    "metrics": lambda s, b: pl.predict(
        s.particles, b, model=s.model, method="sample", **tokens_of(s)
    ).metrics(),
    "svgd steps": steps,
    "svgd run": ran,
    "svgd function": lambda s, b: ran(s, b, kernel=pl.kernels.RBF(space="function")),
    "svgd chunks": lambda s, b: ran(s, b, chunk_size=1),
    "datatree laplace": lambda s, b: tree(s, s.laplace, b),
    "datatree particles": lambda s, b: tree(s, s.particles, b),
    "diagnose": lambda s, b: pl.diagnose(
        s.laplace, b, model=s.model, num_directions=1, num_samples=25
    ),
    "discrepancy": lambda s, b: pl.kernelized_stein_discrepancy(
        s.model, s.particles.particles, b
    ),
    "effective": lambda s, b: pl.effective_num_predictions(
        s.model, s.particles.particles, b
    ),
    "linearized": lambda s, b: [s.laplace.linearized(one) for one in b],
}


def tree(s: Setting, posterior: Any, batches: Any) -> Any:
    found = pl.to_datatree(posterior, batches=batches, num_samples=3)
    return found["log_likelihood"].to_dataset()


MODELS = ("ready", "own", "regression", "choice", "language")
UNFIT = {  # what these engines aren't for
    ("language", e)
    for e in ("nll", "predict linearized", "diagnose", "linearized", "datatree laplace")
} | {
    # No labels are taken, or only some batches.
    ("language", "svgd function"),
    ("choice", "diagnose"),
    ("language", "fit ekfac"),
    ("choice", "fit ekfac"),
}


# Faults: name -> what becomes of a batch, and what a refusal has to name.


@dataclass(frozen=True)
class Fault:
    """A change of one batch.

    Attributes:
        change: Of a copy of the batch.
        names: A pattern that a refusal contains.
        right: Whether the call may go through, with the numbers of the good one.
        kinds: Of outcomes for which it is a fault.
        labels: Whether it is one of the labels alone, which some engines don't read.
    """

    change: Callable[[Batch], Any]
    names: str
    right: bool = False
    kinds: tuple[str, ...] = ("class", "real", "token")
    labels: bool = False


def put(**values: Callable[[Batch], Any]) -> Callable[[Batch], Batch]:
    return lambda b: {**b, **{name: make(b) for name, make in values.items()}}


def without(name: str) -> Callable[[Batch], Batch]:
    return lambda b: {k: v for k, v in b.items() if k != name}


def every(make: Callable[[Tensor], Any]) -> Callable[[Batch], Batch]:
    return lambda b: {name: make(x) for name, x in b.items()}


def at(value: Any, where: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x[where] = value
    return x


def renamed(old: str, new: str) -> Callable[[Batch], Batch]:
    return lambda b: {new if k == old else k: v for k, v in b.items()}


def longer(b: Batch, length: int) -> Batch:
    size = len(b["input_ids"])
    long = torch.randint(1, networks.VOCABULARY, (size, length))
    labels = long if b["labels"].ndim == 2 else b["labels"]
    return {
        **b,
        "input_ids": long,
        "attention_mask": torch.ones_like(long),
        "labels": labels,
    }


def of_labels(make: Callable[[Tensor], Any]) -> Callable[[Batch], Batch]:
    return put(labels=lambda b: make(b["labels"]))


def of_ids(make: Callable[[Tensor], Any]) -> Callable[[Batch], Batch]:
    return put(input_ids=lambda b: make(b["input_ids"]))


def of_mask(make: Callable[[Tensor], Any]) -> Callable[[Batch], Batch]:
    return put(attention_mask=lambda b: make(b["attention_mask"]))


KEYWORDS = "names|strings|keyword"
CLASS, REAL, TOKEN = ("class",), ("real",), ("token",)
BATCH_FAULTS: dict[str, Fault] = {
    # What a batch is.
    "a list of pairs": Fault(lambda b: list(b.items()), "mapping"),
    "a tuple of tensors": Fault(lambda b: tuple(b.values()), "mapping"),
    "a tensor": Fault(lambda b: b["input_ids"], "mapping"),
    "none": Fault(lambda b: None, "mapping"),
    "a string": Fault(lambda b: "text", "mapping"),
    "a number": Fault(lambda b: 3, "mapping"),
    "no arguments": Fault(lambda b: {}, "batch|argument|input_ids|labels"),
    "keys that are numbers": Fault(lambda b: dict(enumerate(b.values())), KEYWORDS),
    # Forms that a collator may give.
    "lists": Fault(every(lambda x: x.tolist()), "input_ids|list", right=True),
    "numpy": Fault(every(lambda x: x.numpy()), "input_ids|ndarray", right=True),
    "labels as a list": Fault(
        of_labels(lambda x: x.tolist()), "labels", right=True, labels=True
    ),
    "labels as numpy": Fault(
        of_labels(lambda x: x.numpy()), "labels", right=True, labels=True
    ),
    "labels as int32": Fault(
        of_labels(lambda x: x.int()), "labels", right=True, labels=True, kinds=CLASS
    ),
    "ids as int32": Fault(of_ids(lambda x: x.int()), "input_ids", right=True),
    "mask as bool": Fault(of_mask(lambda x: x.bool()), "attention_mask", right=True),
    "mask as floats": Fault(
        of_mask(lambda x: x.double()), "attention_mask", right=True
    ),
    # Sizes.
    "zero rows": Fault(every(lambda x: x[:0]), "empty|0 data"),
    "labels one short": Fault(of_labels(lambda x: x[:-1]), "labels|'y'", labels=True),
    "labels one more": Fault(
        of_labels(lambda x: torch.cat([x, x[:1]])), "labels|'y'", labels=True
    ),
    "one label": Fault(of_labels(lambda x: x[:1]), "labels|'y'", labels=True),
    "a scalar label": Fault(
        of_labels(lambda x: x.flatten()[0]), "labels|'y'", labels=True
    ),
    "no labels at all": Fault(of_labels(lambda x: x[:0]), "labels|'y'", labels=True),
    "labels (B, 1)": Fault(
        of_labels(lambda x: x[:, None]),
        "labels|'y'",
        right=True,
        kinds=("class", "real"),
        labels=True,
    ),
    "labels (1, B)": Fault(
        of_labels(lambda x: x[None]),
        "labels|'y'",
        right=True,
        kinds=("class", "real"),
        labels=True,
    ),
    "labels one-hot": Fault(
        of_labels(lambda x: torch.nn.functional.one_hot(x, CLASSES)),
        "labels|'y'",
        kinds=CLASS,
        labels=True,
    ),
    "labels of fewer tokens": Fault(
        of_labels(lambda x: x[:, :-1]), "labels|'y'|argument", kinds=TOKEN, labels=True
    ),
    "labels of one token": Fault(
        of_labels(lambda x: x[:, :1]), "labels|'y'|argument", kinds=TOKEN, labels=True
    ),
    "ids one row short": Fault(of_ids(lambda x: x[:-1]), "input_ids"),
    "ids of one text": Fault(of_ids(lambda x: x[0]), "input_ids"),
    "ids of three dims": Fault(of_ids(lambda x: x[..., None]), "input_ids"),
    "ids of no token": Fault(
        lambda b: {
            **b,
            "input_ids": b["input_ids"][:, :0],
            "attention_mask": b["attention_mask"][:, :0],
        },
        "input_ids",
    ),
    "mask one row short": Fault(of_mask(lambda x: x[:-1]), "attention_mask"),
    "mask one column short": Fault(of_mask(lambda x: x[:, :-1]), "attention_mask"),
    "mask of one column": Fault(of_mask(lambda x: x[:, :1]), "attention_mask"),
    "mask of one row": Fault(of_mask(lambda x: x[:1]), "attention_mask"),
    "mask of one dim": Fault(of_mask(lambda x: x[:, 0]), "attention_mask"),
    "mask transposed": Fault(of_mask(lambda x: x.mT), "attention_mask"),
    "more tokens than positions": Fault(
        lambda b: longer(b, POSITIONS + 3), "input_ids|positions"
    ),
    # Values.
    "labels out of range": Fault(
        of_labels(lambda x: at(99, 1, x)), "labels|'y'", kinds=CLASS, labels=True
    ),
    "labels of tokens out of range": Fault(
        of_labels(lambda x: at(99, (1, 1), x)), "labels|'y'", kinds=TOKEN, labels=True
    ),
    "negative labels": Fault(
        of_labels(lambda x: at(-1, 1, x)), "labels|'y'", kinds=CLASS, labels=True
    ),
    "ignored labels": Fault(
        of_labels(lambda x: at(-100, 1, x)), "labels|'y'", kinds=CLASS, labels=True
    ),
    "float labels": Fault(
        of_labels(lambda x: x.double()),
        "labels|'y'",
        right=True,
        kinds=CLASS,
        labels=True,
    ),
    "labels between classes": Fault(
        of_labels(lambda x: x + 0.5), "labels|'y'", kinds=CLASS, labels=True
    ),
    "nan labels": Fault(
        of_labels(lambda x: at(torch.nan, 1, x.double())),
        "labels|'y'",
        kinds=("class", "real"),
        labels=True,
    ),
    "infinite labels": Fault(
        of_labels(lambda x: at(torch.inf, 1, x)), "labels|'y'", kinds=REAL, labels=True
    ),
    "labels as strings": Fault(
        of_labels(lambda x: ["good"] * len(x)), "labels", labels=True
    ),
    "complex labels": Fault(
        of_labels(lambda x: x.to(torch.complex128)),
        "labels|'y'",
        kinds=REAL,
        labels=True,
    ),
    "ids as floats": Fault(of_ids(lambda x: x.double()), "input_ids"),
    "ids as strings": Fault(of_ids(lambda x: ["a text"] * len(x)), "input_ids"),
    "ids none": Fault(of_ids(lambda x: None), "input_ids"),
    "ids outside of the vocabulary": Fault(
        of_ids(lambda x: at(networks.VOCABULARY, (1, 0), x)), "input_ids|vocabulary"
    ),
    "negative ids": Fault(of_ids(lambda x: at(-1, (1, 0), x)), "input_ids|vocabulary"),
    "ragged ids": Fault(
        of_ids(lambda x: [row[: 3 + i].tolist() for i, row in enumerate(x)]),
        "input_ids",
    ),
    "mask as a string": Fault(of_mask(lambda x: "all"), "attention_mask"),
    # Names.
    # transformers' networks leave it alone, too
    "an unknown argument": Fault(
        put(colour=lambda b: b["input_ids"]), "colour", right=True
    ),
    "a misspelled mask": Fault(renamed("attention_mask", "atention_mask"), "atention"),
    "a misspelled argument": Fault(
        renamed("input_ids", "inputs_id"), "inputs_id|input_ids"
    ),
    "ids missing": Fault(without("input_ids"), "input_ids"),
    "labels misspelled": Fault(renamed("labels", "label"), "'label'|labels"),
    # Devices.
    "ids elsewhere": Fault(of_ids(lambda x: x.to("meta")), "input_ids|device"),
    "mask elsewhere": Fault(of_mask(lambda x: x.to("meta")), "attention_mask|device"),
    "labels elsewhere": Fault(
        of_labels(lambda x: x.to("meta")), "labels|'y'|device", labels=True
    ),
}
LATER_FAULTS: dict[str, Fault] = {  # a fault beside batches that are otherwise
    "labels missing": Fault(without("labels"), "labels|'y'", labels=True),
    "labels none": Fault(put(labels=lambda b: None), "labels|'y'", labels=True),
    "mask missing": Fault(without("attention_mask"), "attention_mask"),
}
CONTAINER_FAULTS: dict[str, Fault] = {
    "a mapping": Fault(lambda bs: bs[0], "list"),
    "a tensor": Fault(lambda bs: bs[0]["input_ids"], "mapping|list"),
    "none": Fault(lambda bs: None, "batches"),
    "a number": Fault(lambda bs: 3, "batches"),
    "a string": Fault(lambda bs: "data", "batches|mapping"),
    "an empty list": Fault(lambda bs: [], "no batches|batches"),
    "a used-up generator": Fault(lambda bs: iter(()), "batches"),
    "a function": Fault(lambda bs: lambda: bs, "batches"),
    "a list of lists": Fault(lambda bs: [list(bs)], "mapping"),
}
# These read no labels, so faults of theirs are none.
LABEL_BLIND = {"predict guide", "linearized", "effective"}


# Settings: what to call, and the values that each takes.

NUMBERS = ("three", None, True, torch.nan, torch.inf, -1.0, [], torch.ones(2))
COUNTS = ("three", None, True, torch.nan, -1, 0, 1.5, [], torch.ones(2))
WORDS = ("no such", None, 3, True, [])


@dataclass(frozen=True)
class Knob:
    """A setting of a public function.

    Attributes:
        call: Of a value.
        name: What a refusal has to name.
        values: Bad ones.
        fine: Those of them that are right here, by their ``repr``.
    """

    call: Callable[[Any], Any]
    name: str
    values: tuple[Any, ...]
    fine: tuple[str, ...] = ()


def knobs() -> dict[str, Knob]:
    """Every numeric setting of every public function, and the words."""
    s, language = setting("ready"), setting("language")
    lora, ids = s.lora, language.batches[0]["input_ids"]
    prediction = pl.predict(s.particles, s.batches, model=s.model, keep_draws=True)
    real = setting("regression")
    reals = pl.predict(real.particles, real.batches, model=real.model, method="sample")
    function = pl.kernels.RBF(space="function")
    found: dict[str, Knob] = {}

    def add(
        where: str,
        name: str,
        call: Callable[..., Any],
        values: tuple[Any, ...],
        *fine: str,
        word: str | None = None,
    ) -> None:
        found[f"{where}: {name}"] = Knob(
            lambda v: call(**{name: v}), word or name, values, fine
        )

    def bound(function: Callable[..., Any], *args: Any, **given: Any) -> Any:
        return lambda **values: function(*args, **{**given, **values})

    priors, kernels, schedules = pl.priors, pl.kernels, pl.schedules
    add("normal", "scale", priors.normal, NUMBERS, "tensor")
    add("normal", "center", priors.normal, ("three", None, True, torch.nan, []))
    add("laplace", "scale", priors.laplace, NUMBERS, "tensor")
    add("student_t", "df", priors.student_t, NUMBERS)
    add("student_t", "scale", bound(priors.student_t, 3.0), NUMBERS, "tensor")
    for name in ("scale", "scale_spread", "role_spread", "layer_spread"):
        add("hierarchical", name, priors.hierarchical, NUMBERS)
    for name in ("global_scale", "slab_scale", "slab_df"):
        add("horseshoe", name, priors.horseshoe, NUMBERS)
    add("horseshoe", "per", priors.horseshoe, WORDS)
    add("rank_ard", "scale", priors.rank_ard, NUMBERS)
    add("rank_ard", "df", priors.rank_ard, NUMBERS)
    add("rank_ard", "other_scale", priors.rank_ard, NUMBERS, "None")
    add("orthogonal", "strength", priors.orthogonal, NUMBERS)
    add("spectral", "frobenius_scale", priors.spectral, NUMBERS)
    add("spectral", "penalty", priors.spectral, ("nuclear", 3.0, []))
    bad_prior = ("normal", 3.0, [], {"a": 1})
    add("spectral", "prior", bound(priors.spectral, frobenius_scale=1.0), bad_prior)
    add("orthogonal", "prior", bound(priors.orthogonal, 1.0), bad_prior)
    add("by_site", "priors", priors.by_site, (*bad_prior, None), word="by_site|prior")
    add("lift", "prior", lambda prior: pl.lift(networks.bert(), prior=prior), bad_prior)
    add(
        "lift",
        "adapter",
        lambda adapter: pl.lift(networks.bert(), adapter=adapter),
        ("no such", 3, True, []),
    )
    add(
        "lift",
        "name",
        lambda name: pl.lift(networks.bert(), name=name),
        (3, True, [], "", "a b."),
        word="name",
    )
    for kernel in (kernels.RBF, kernels.IMQ, kernels.Mixture):
        add(kernel.__name__, "bandwidth", kernel, (*NUMBERS, 0.0), "None")
        add(kernel.__name__, "space", kernel, WORDS)
    add(
        "Mixture",
        "scales",
        kernels.Mixture,
        ("ab", None, 1.0, (), (torch.nan,), (torch.inf,), (-1.0,), ("a",), (True,)),
    )
    for schedule in (schedules.annealed, schedules.cyclical):
        for name in ("final", "start", "power"):
            add(schedule.__name__, name, schedule, NUMBERS)
    add("cyclical", "num_cycles", schedules.cyclical, COUNTS)

    def engine(**options: Any) -> Any:
        return ran(s, s.batches, **options)

    add("SVGD", "num_particles", engine, COUNTS)
    add("SVGD", "chunk_size", engine, COUNTS, "None")
    add("SVGD", "temperature", engine, (*NUMBERS, 0.0))
    add("SVGD", "repulsion", bound(engine, transport="repulsive"), NUMBERS, "None")
    add(
        "SVGD",
        "repulsion in functions",
        bound(
            lambda **v: engine(kernel=function, repulsion=v["repulsion in functions"])
        ),
        NUMBERS,
        "None",
        word="repulsion",
    )
    add("SVGD", "max_plate_nesting", engine, ("three", True, torch.nan, -1, 0, 1.5, []))
    add("SVGD", "transport", engine, WORDS, "None")
    add("SVGD", "kernel", engine, ("rbf", None, 3.0, kernels.RBF, []))
    add("SVGD", "optim", engine, ("adam", None, 3.0, torch.optim.SGD, {"lr": 1.0}))
    add("SVGD", "init_loc_fn", engine, ("adapter", None, 3.0, lora.weights(), []))
    add("SVGD", "obs_site", bound(engine, kernel=function), ("no such", 3, True, []))
    add(
        "SVGD",
        "model",
        lambda model: svgd(lora, model).step(**s.batches[0]),
        ("model", None, 3.0, lora.weights(), [], lora),
        word="model",
    )

    def run(**options: Any) -> Any:
        return svgd(lora, s.model).run(
            s.batches, **{"num_epochs": 1, "progress_bar": False, **options}
        )

    add("run", "num_epochs", run, COUNTS)
    add("run", "total_epochs", run, COUNTS, "None")

    stepped = svgd(lora, s.model)
    stepped.step(**s.batches[0])
    add("get_samples", "num_samples", stepped.get_samples, COUNTS, "None")
    add(
        "load_state_dict",
        "state",
        stepped.load_state_dict,
        ("state", None, {}, [], 3.0),
    )

    def fit(**options: Any) -> Any:
        guide = laplace_guide(lora, s.model, "class", **options)
        return guide.laplace_approximation(s.batches)

    add("AutoLaplace", "num_fisher_samples", bound(fit, fisher="mc"), COUNTS)
    add("AutoLaplace", "fisher", fit, WORDS)
    add("AutoLaplace", "structure", fit, ("kfac", None, 3.0, []))
    add("AutoLaplace", "obs_site", fit, ("no such", 3, True, [], ("y", "y")))
    add("AutoLaplace", "sites", fit, ("no such", 3, True, [], ["no such"]))
    add(
        "AutoLaplace",
        "init_loc_fn",
        lambda init_loc_fn: pl.AutoLaplace(
            s.model, init_loc_fn=init_loc_fn
        ).laplace_approximation(s.batches),
        ("adapter", None, 3.0, lora.weights(), []),
    )
    add(
        "AutoLaplace",
        "model",
        lambda model: pl.AutoLaplace(
            model, init_loc_fn=lora.init_to_adapter()
        ).laplace_approximation(s.batches),
        ("model", None, 3.0, lora.weights(), [], s.laplace),
    )
    add(
        "fit",
        "max_memory_gb",
        lambda max_memory_gb: laplace_guide(
            lora, s.model, "class"
        ).laplace_approximation(s.batches, max_memory_gb=max_memory_gb),
        (*NUMBERS, 0.0),
        "None",
        "inf",
    )
    add(
        "fit",
        "checkpoint",
        lambda checkpoint: laplace_guide(lora, s.model, "class").laplace_approximation(
            s.batches, checkpoint=checkpoint
        ),
        (3.0, True, [], {}),
    )

    def tuned(**options: Any) -> Any:
        return s.laplace.optimize_prior(**options)

    def refitted(**options: Any) -> Any:
        arguments = {"posterior": s.laplace, "optim": SGD({"lr": 1e-4}), **options}
        guide = laplace_guide(lora, s.model, "class")
        return guide.refit(batches=s.batches, **arguments)

    add("optimize_prior", "per", tuned, WORDS)
    add("optimize_prior", "objective", tuned, WORDS)
    add("refit", "num_epochs", refitted, COUNTS)
    add("refit", "optim", refitted, ("adam", None, 3.0, torch.optim.SGD))
    add("refit", "posterior", refitted, (None, 3, "posterior", s.particles))
    add(
        "optimize_prior",
        "labels",
        bound(tuned, objective="nll", batches=s.batches),
        ("no such", None, 3, []),
    )
    add(
        "optimize_prior",
        "obs_site",
        bound(tuned, objective="nll", batches=s.batches),
        ("no such", 3, True, ["y"]),
    )
    add(
        "with_prior_precision",
        "value",
        s.laplace.with_prior_precision,
        (*NUMBERS, 0.0, {}, {"no such": 1.0}),
        word="precision",
    )
    add("sample", "num_samples", s.laplace.sample, COUNTS)
    add("particles.sample", "num_samples", s.particles.sample, COUNTS)
    mixture = pl.MixturePosterior([s.laplace, s.laplace])
    add("mixture.sample", "num_samples", mixture.sample, COUNTS)
    add(
        "MixturePosterior",
        "weights",
        bound(pl.MixturePosterior, [s.laplace, s.laplace]),
        ("no such", 3.0, True, [1.0], [torch.nan, 1.0], [-1.0, 2.0], ["a", "b"], []),
        word="weights",
    )
    add(
        "MixturePosterior",
        "components",
        pl.MixturePosterior,
        (None, 3.0, [], "ab", [3], s.laplace),
        word="[Cc]omponent",
    )
    add(
        "log_prob",
        "weights",
        s.laplace.log_prob,
        (None, 3.0, {}, "ab", [], {"no such": torch.ones(2)}),
        word="weights|[Ss]ite",
    )
    add(
        "linearized",
        "batch",
        s.laplace.linearized,
        (None, 3.0, {}, "ab", [], list(s.batches)),
        word="batch|mapping|argument",
    )
    add(
        "linearized",
        "tokens",
        bound(s.laplace.linearized, s.batches[0]),
        ("no such", 3, True, []),
    )

    def predicted(**options: Any) -> Any:
        given = {"model": s.model, "posterior": s.laplace, "batches": s.batches}
        return pl.predict(**{**given, "method": "sample", **options})

    bad_posteriors = ("laplace", None, 3.0, [], lora, s.lora.weights())
    bad_models = ("model", None, 3.0, [], lora, s.laplace, {})
    add("predict", "num_samples", predicted, COUNTS, "None")
    add("predict", "chunk_size", predicted, COUNTS)
    add("predict", "method", predicted, WORDS, "None")
    add("predict", "tokens", predicted, WORDS, "None")
    add("predict", "obs_site", predicted, ("no such", 3, True, []))
    add("predict", "labels", predicted, (3, True, []))
    add(
        "predict",
        "integral",
        bound(predicted, method="linearized"),
        ("probit", None, 3.0, []),
    )
    add("predict", "posterior", predicted, bad_posteriors)
    add(
        "predict linearized",
        "posterior",
        bound(predicted, method="linearized"),
        bad_posteriors,
    )
    add("predict", "model", predicted, bad_models, "None")
    add(
        "predict linearized",
        "model",
        bound(predicted, method="linearized"),
        bad_models,
        "None",
    )

    def draws(**options: Any) -> Any:
        given = {"posterior": s.particles, "batches": s.batches}
        return pl.to_datatree(**{**given, **options})

    add("to_datatree", "num_samples", draws, COUNTS, "None")
    add("to_datatree", "chunk_size", draws, COUNTS, "None")
    add("to_datatree", "weights", draws, WORDS)
    add("to_datatree", "method", draws, WORDS, "None")
    add("to_datatree", "obs_site", draws, ("no such", 3, True, []))
    add("to_datatree", "labels", draws, (None, 3, True, []))
    add("to_datatree", "posterior", draws, bad_posteriors, word="posterior|model")
    add("to_datatree", "model", draws, bad_models, "None")

    def asked(**options: Any) -> Any:
        given = {"posterior": s.laplace, "model": s.model, "batches": s.batches}
        return pl.diagnose(
            **{**given, "num_directions": 1, "num_samples": 25, **options}
        )

    add("diagnose", "num_samples", asked, COUNTS)
    add("diagnose", "num_directions", asked, COUNTS)
    allowed = tuple(x for x in NUMBERS if x is not None)
    add("diagnose", "max_passes", asked, allowed)
    add("diagnose", "obs_site", asked, ("no such", 3, True, []))
    add("diagnose", "posterior", asked, bad_posteriors)
    add("diagnose", "model", asked, bad_models, "None")
    add(
        "diagnose",
        "held_out",
        asked,
        ("data", 3.0, [], s.batches[0]),
        word="held_out|batches",
    )

    def discrepancy(**options: Any) -> Any:
        given = {
            "model": s.model,
            "particles": s.particles.particles,
            "batches": s.batches,
        }
        return pl.kernelized_stein_discrepancy(**{**given, **options})

    bad_particles = (
        "ab",
        None,
        3.0,
        [],
        {},
        {"no such": torch.ones(2, 3)},
        s.particles,
    )
    add("discrepancy", "temperature", discrepancy, (*NUMBERS, 0.0))
    add("discrepancy", "num_bootstrap", discrepancy, COUNTS, "0")
    add("discrepancy", "chunk_size", discrepancy, COUNTS, "None")
    add("discrepancy", "kernel", discrepancy, ("rbf", 3.0, kernels.RBF, function))
    add("discrepancy", "particles", discrepancy, bad_particles, word="particle|[Ss]ite")
    add("discrepancy", "model", discrepancy, bad_models)
    add(
        "effective",
        "chunk_size",
        lambda chunk_size: pl.effective_num_predictions(
            s.model, s.particles.particles, s.batches, chunk_size=chunk_size
        ),
        COUNTS,
        "None",
    )
    add(
        "effective",
        "particles",
        lambda particles: pl.effective_num_predictions(s.model, particles, s.batches),
        bad_particles,
        word="particle|[Ss]ite",
    )
    add(
        "effective",
        "model",
        lambda model: pl.effective_num_predictions(
            model, s.particles.particles, s.batches
        ),
        bad_models,
    )

    def chosen(**options: Any) -> Any:
        return pl.acquire(**{"prediction": prediction, "num": 2, **options})

    add("acquire", "num", chosen, (*COUNTS, 11))
    add("acquire", "method", chosen, WORDS)
    add("acquire", "prediction", chosen, (None, 3.0, reals, s.laplace))
    add("acquire", "max_configurations", bound(chosen, method="batch_bald"), COUNTS)
    add("metrics", "num_bootstrap", prediction.metrics, COUNTS, "0")
    add("metrics", "ood", prediction.metrics, ("text", 3.0, reals))
    add("reals metrics", "num_bootstrap", reals.metrics, COUNTS, "0")
    add("quantile", "probability", reals.quantile, (*NUMBERS, 1.5))
    add("with_temperature", "temperature", prediction.with_temperature, (*NUMBERS, 0.0))
    add("fit_temperature", "held_out", pl.fit_temperature, (None, 3.0, reals))
    add(
        "auroc",
        "in_domain",
        bound(pl.auroc, out_of_domain=prediction),
        (None, 3.0, reals),
    )
    add("auroc", "score", bound(pl.auroc, prediction, prediction), WORDS)

    def text(**options: Any) -> Any:
        given = {
            "lora": language.lora,
            "posterior": language.particles,
            "input_ids": ids[:2, :1],
            "max_new_tokens": 2,
        }
        return pl.generate(**{**given, **options})

    sampled = {"do_sample": True}
    bad_ids = (
        None,
        "text",
        3,
        [1, 2],
        ids[:2].double(),
        ids[0],
        ids[:0],
        ids[:2] + 100,
        -ids[:2] - 1,
    )
    add("generate", "num_samples", text, COUNTS, "None")
    add("generate", "max_new_tokens", text, COUNTS)
    add("generate", "temperature", bound(text, **sampled), (*NUMBERS, 0.0))
    add("generate", "top_k", bound(text, **sampled), COUNTS, "None")
    add("generate", "top_p", bound(text, **sampled), (*NUMBERS, 1.5), "None")
    add("generate", "mode", text, WORDS)
    add("generate", "input_ids", text, bad_ids)
    add(
        "generate",
        "attention_mask",
        text,
        ("text", 3, [1, 2], torch.ones(2, 3), torch.zeros(2, 1)),
    )
    add("generate", "eos_token_id", text, ("end", -1, 1.5, 999, [], True), "[]")
    add("generate", "pad_token_id", text, ("pad", 1.5, 999, []))
    add("generate", "generator", bound(text, **sampled), ("seed", 3, []))
    add("generate", "logits_processor", text, ("text", 3, [3], None))
    add(
        "generate",
        "posterior",
        text,
        ("laplace", None, 3.0, [], s.particles),
    )
    add(
        "generate",
        "lora",
        text,
        ("lora", None, 3.0, [], language.lora.network, lora),
        word="lora|language model",
    )

    def score(**options: Any) -> Any:
        given = {
            "lora": language.lora,
            "posterior": language.particles,
            "input_ids": ids[:2],
            "labels": at(-100, (slice(None), 0), ids[:2]),
        }
        return pl.sequence_log_prob(**{**given, **options})

    add("sequence_log_prob", "input_ids", score, bad_ids, word="input_ids|labels")
    add(
        "sequence_log_prob",
        "labels",
        score,
        (None, "text", 3, [1, 2], ids[:2], ids[:1], ids[0], ids[:2].double()),
    )
    add("sequence_log_prob", "num_samples", score, COUNTS, "None")
    add(
        "sequence_log_prob",
        "posterior",
        score,
        ("laplace", None, 3.0, [], s.particles),
    )
    add(
        "sequence_log_prob",
        "lora",
        score,
        ("lora", None, 3.0, [], language.lora.network, lora),
        word="lora|language model",
    )
    add(
        "semantic_entropy",
        "texts",
        lambda texts: pl.semantic_entropy(texts, torch.zeros(2), key=str),
        (None, "ab", 3, [], ["a"], [1, 2]),
    )
    add(
        "semantic_entropy",
        "log_probs",
        lambda log_probs: pl.semantic_entropy(["a", "b"], log_probs, key=str),
        (None, "ab", 3, [], torch.zeros(3), torch.tensor([0.0, torch.nan])),
    )
    add(
        "semantic_entropy",
        "key",
        lambda key: pl.semantic_entropy(["a", "b"], torch.zeros(2), key=key),
        (None, "ab", 3, []),
    )
    add("init_to_adapter", "jitter", lora.init_to_adapter, NUMBERS)
    some = lora.weights()
    first = next(iter(some))
    bad_weights = (
        None,
        "ab",
        3.0,
        [],
        {},
        list(some),
        {**some, first: None},
        {**some, first: 3.0},
        {**some, first: [1.0]},
        {**some, first: some[first] * torch.nan},
        {**some, first: some[first][0]},
        {**some, first: some[first].numpy()},
    )
    add("init_to", "weights", lora.init_to, bad_weights, word="weights|[Ss]ite")
    add("load", "weights", lora.load, bad_weights, word="[Ww]eights|[Ss]ite")

    def bind(weights: Any) -> None:
        with lora.bind(weights):
            pass

    add("bind", "weights", bind, bad_weights, word="[Ww]eights|[Ss]ite")
    add(
        "delta_weight_factors",
        "weights",
        lora.delta_weight_factors,
        bad_weights[:9],
        word="[Ww]eights|[Ss]ite",
    )
    add(
        "lift",
        "model",
        pl.lift,
        (None, "bert", 3.0, [], lora),
        word=r"torch\.nn\.Module|network",
    )
    add(
        "ensemble",
        "members",
        bound(pl.ensemble, lora),
        (None, "ab", 3.0, [], [3.0], [None], [{}]),
        word="[Mm]ember",
    )
    add(
        "ensemble",
        "lora",
        lambda lora: pl.ensemble(lora, [some]),
        (None, "ab", 3.0, lora.network),
        word="lora",
    )
    add(
        "mc_dropout",
        "lora",
        pl.mc_dropout,
        (None, "ab", 3.0, lora.network),
        word="lora",
    )

    trunk = pl.lift(networks.bert(layers_to_transform=[1]))

    def cached(**options: Any) -> None:
        with pl.cached_trunk(**{"lora": trunk, **options}):
            pass

    add("cached_trunk", "max_gigabytes", cached, NUMBERS, "inf")
    add("cached_trunk", "folder", cached, (3.0, True, []))
    add("cached_trunk", "lora", cached, (None, "ab", 3.0, trunk.network), word="lora")

    methods = pl.methods
    data = networks.batch(NUM_DATA)
    classifier = pl.models.classification(lora, NUM_DATA)
    tfb = bound(methods.tfb, classifier, [data], num_samples=1, progress_bar=False)
    add("tfb", "tolerance", tfb, (*NUMBERS, 0.0))
    add("tfb", "num_samples", tfb, COUNTS)
    add("tfb", "weights", tfb, ("ab", 3.0, [1], {"a": 1}))
    start = lora.init_to_adapter()
    blob = bound(methods.blob, classifier, init_loc_fn=start)
    add("blob", "init_scale", blob, (*NUMBERS, 0.0))
    add("blob", "sites", blob, (None, 3.0, True, []))
    add("blob", "init_loc_fn", blob, (None, "ab", 3.0))
    swag = bound(methods.swag, lora, [lora.weights()] * 2)
    add("swag", "rank", swag, (*COUNTS, 1))
    add("mean_field", "guide", methods.mean_field, (None, "ab", 3.0))
    parameter = torch.nn.Parameter(torch.ones(2))
    ivon = bound(methods.IVON, [parameter], lr=0.1, num_data=5)
    for name in ("lr", "prior_precision", "init_hessian", "clip_radius"):
        add("IVON", name, ivon, (*NUMBERS, 0.0))
    add("IVON", "num_data", ivon, COUNTS)
    pairs = ((0.9, 1.0), (0.9, -1.0), ("a", 0.9), (0.9,), 0.9, None)
    add("IVON", "betas", ivon, pairs)
    subspace = pl.priors.subspace
    add("subspace", "scale", subspace, (*NUMBERS, 0.0))
    add("subspace", "center", subspace, ("three", None, True, torch.nan, []))
    add("subspace", "factors", subspace, ("ab", 3.0, [1], {"a": 1}))

    models = pl.models
    ready = (
        models.classification,
        models.regression,
        models.language_model,
        models.answer_likelihood,
    )
    for make in ready:
        add(make.__name__, "num_data", bound(make, lora), COUNTS)
        add(
            make.__name__,
            "lora",
            bound(make, num_data=NUM_DATA),
            (None, "ab", 3.0, lora.network),
        )
    add(
        "multiple_choice",
        "num_data",
        bound(models.multiple_choice, lora, choice_ids=[1, 2]),
        COUNTS,
    )
    add(
        "multiple_choice",
        "choice_ids",
        bound(models.multiple_choice, lora, NUM_DATA),
        (None, "ab", 3, [], [1], [1, 1], [1.5, 2.5], [-1, 2], ["a", "b"], [[1], [2]]),
    )
    add(
        "answer_likelihood",
        "per_token",
        bound(models.answer_likelihood, lora, NUM_DATA),
        (None, "ab", 3.0, []),
    )
    add(
        "regression",
        "scale",
        bound(models.regression, lora, NUM_DATA),
        (*NUMBERS, 0.0),
        "None",
    )
    return found


# Models that are wrong.


def in_plate(lora: pl.LiftedNetwork, subsample: bool = True) -> Any:
    def model(input_ids: Any, attention_mask: Any, labels: Any = None) -> Any:
        given: Any = {"subsample": input_ids} if subsample else {}
        size = NUM_DATA if subsample else len(input_ids)
        with pyro.plate("data", size, **given):
            net = lora()
            logits = net(input_ids=input_ids, attention_mask=attention_mask).logits
            return pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    return model


def no_call(lora: pl.LiftedNetwork) -> Any:
    def model(input_ids: Any, attention_mask: Any, labels: Any = None) -> Any:
        if len(input_ids):
            return None
        return lora()

    return model


def no_observation(lora: pl.LiftedNetwork) -> Any:
    def model(labels: Any = None, **texts: Any) -> Any:
        return lora()(**texts).logits

    return model


def two_plates(lora: pl.LiftedNetwork) -> Any:
    def model(labels: Any = None, **texts: Any) -> Any:
        logits = lora()(**texts).logits
        with pyro.plate("data", 7):  # another number of data than the batch has
            return pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    return model


def unsampled(lora: pl.LiftedNetwork) -> Any:
    def model(labels: Any = None, **texts: Any) -> Any:
        logits = lora(**texts).logits  # type: ignore[call-arg]
        with pyro.plate("data", NUM_DATA, subsample=logits):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    return model


WRONG_MODELS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "lora() in the plate": (in_plate, r"lora\(\).*before.*plate"),
    "returns before lora()": (no_call, r"lora\(\)|obs_site|likelihood"),
    "no observed site": (no_observation, "observed|likelihood|obs"),
    "a plate of another size": (two_plates, "'data'|plate|'y'"),
    "inputs given to lora": (unsampled, r"lora\(\)|LiftedNetwork"),
}
# These only ask for what the model has not, and it is right to say so elsewhere.
UNFIT_MODELS = {
    ("no observed site", "svgd run"),
    ("no observed site", "svgd steps"),
    ("no observed site", "svgd chunks"),
    ("no observed site", "discrepancy"),
}


# Making the calls.


@dataclass(frozen=True)
class Call:
    """One bad call."""

    group: str
    name: str
    run: Callable[[], Any]
    names: str
    like: Callable[[], Any] | None = None  # of the same numbers, where it is right
    fine: bool = False  # whether it may go through whatever it gives


def batch_calls() -> Iterator[Call]:
    """Engine by model by fault by the faulty batch's place."""
    for model in MODELS:
        for engine, run in ENGINES.items():
            if (model, engine) in UNFIT:
                continue
            for place in (0, 1):
                faults = BATCH_FAULTS | (LATER_FAULTS if place else {})
                for fault_name, fault in faults.items():
                    if not _applies(fault, setting(model), engine):
                        continue
                    yield Call(
                        "batch",
                        f"{engine} | {model} | {fault_name} | batch {place}",
                        _with_fault(model, run, fault, place),
                        fault.names,
                        _good(model, engine) if fault.right else None,
                        _may_pass(model, engine, fault_name),
                    )
            for fault_name, fault in CONTAINER_FAULTS.items():
                if engine in ("svgd steps", "linearized"):
                    continue  # these take one batch
                if engine.startswith("datatree") and fault_name == "none":
                    continue  # which leaves out what depends on data
                yield Call(
                    "container",
                    f"{engine} | {model} | {fault_name}",
                    _with_container(model, run, fault),
                    fault.names,
                )


def _applies(fault: Fault, s: Setting, engine: str) -> bool:
    if s.kind not in fault.kinds or (fault.labels and engine in LABEL_BLIND):
        return False
    # A step takes **batch, so that Python itself refuses what is no mapping.
    return engine != "svgd steps" or fault.names not in ("mapping", KEYWORDS)


def _may_pass(model: str, engine: str, fault: str) -> bool:
    # Rotary positions have no end.
    rotary = model in ("choice", "language")
    return rotary and fault == "more tokens than positions"


def _with_fault(model: str, run: Any, fault: Fault, place: int) -> Callable[[], Any]:
    def call() -> Any:
        s = setting(model)
        batches: list[Any] = [dict(b) for b in s.batches]
        batches[place] = fault.change(batches[place])
        return run(s, batches)

    return call


def _with_container(model: str, run: Any, fault: Fault) -> Callable[[], Any]:
    return lambda: run(setting(model), fault.change(setting(model).batches))


@cache
def _good_result(model: str, engine: str) -> Any:
    return _numbers(
        _quietly(lambda: ENGINES[engine](setting(model), setting(model).batches))
    )


def _good(model: str, engine: str) -> Callable[[], Any]:
    return lambda: _good_result(model, engine)


def setting_calls() -> Iterator[Call]:
    """Every setting at every bad value."""
    for name, knob in knobs().items():
        for value in knob.values:
            shown = repr(value)[:40]
            yield Call(
                "setting",
                f"{name} = {shown}",
                lambda knob=knob, value=value: knob.call(value),
                knob.name,
                fine=any(shown.startswith(x) for x in knob.fine),
            )


def model_calls() -> Iterator[Call]:
    """Engines on models that are wrong."""
    for name, (make, names) in WRONG_MODELS.items():
        for engine, run in ENGINES.items():
            if (name, engine) in UNFIT_MODELS:
                continue
            yield Call("model", f"{engine} | {name}", _with_model(make, run), names)


def _with_model(make: Any, run: Any) -> Callable[[], Any]:
    def call() -> Any:
        s = setting("own")
        wrong = make(s.lora)
        changed = Setting(
            s.lora,
            wrong,
            s.kind,
            s.batches,
            _replaced(s.laplace, wrong),
            _replaced(s.particles, wrong),
        )
        return run(changed, s.batches)

    return call


def _replaced(posterior: Any, model: Any) -> Any:
    from dataclasses import replace

    return replace(posterior, model=model)


def all_calls() -> list[Call]:
    return [*batch_calls(), *setting_calls(), *model_calls()]


def _quietly(run: Callable[[], Any]) -> Any:
    pyro.clear_param_store()
    torch.manual_seed(1)
    pyro.set_rng_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run()


def verdict(call: Call) -> str | None:
    """What is wrong with how a call ended; None if nothing is."""
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(PATIENCE)
    try:
        found = _quietly(call.run)
    except Exception as error:
        return _refusal(error, call)
    finally:
        signal.alarm(0)
    if call.fine:
        return None
    if call.like is None:
        return "accepted"
    if not _same(_numbers(found), call.like()):
        return "accepted, with other numbers"
    return None


def _too_long(*_: object) -> None:
    raise TimeoutError(f"no end after {PATIENCE} s")


def _refusal(error: Exception, call: Call) -> str | None:
    frames = traceback.extract_tb(error.__traceback__)
    where = frames[-1].filename
    text = f"{type(error).__name__}: {error}".replace("\n", " ")[:300]
    if "/pyro_lora/" not in where or type(error) not in (
        ValueError,
        TypeError,
        RuntimeError,
        ImportError,
        FileNotFoundError,
    ):
        return f"others' words: {text}"
    if not re.search(call.names, str(error)):
        return f"doesn't name {call.names}: {text}"
    return None


def _numbers(value: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def walk(name: str, x: Any) -> None:
        if isinstance(x, Tensor):
            found[name] = x.detach().double()
        elif isinstance(x, np.ndarray):
            found[name] = torch.as_tensor(np.array(x)).double()
        elif isinstance(x, bool | int | float) and not isinstance(x, bool):
            found[name] = torch.tensor(float(x))
        elif hasattr(x, "data_vars"):
            for key, part in x.data_vars.items():
                walk(f"{name}.{key}", part.values)
        elif isinstance(x, pl.LaplacePosterior):
            walk(f"{name}.evidence", x.log_evidence())
            walk(f"{name}.variance", x.variance())
        elif isinstance(x, Mapping):
            for key, part in x.items():
                walk(f"{name}.{key}", part)
        elif isinstance(x, list | tuple):
            for i, part in enumerate(x):
                walk(f"{name}.{i}", part)
        elif is_dataclass(x):
            walk(name, {k: v for k, v in vars(x).items() if k not in _UNREAD})

    walk("", value)
    return found


_UNREAD = {"model", "networks", "prior"}


def _same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        x.shape == expected[k].shape
        and torch.allclose(x, expected[k], rtol=1e-6, atol=1e-8, equal_nan=True)
        for k, x in found.items()
    )


def sample(calls: list[Call], sizes: Mapping[str, int], seed: int = 0) -> list[Call]:
    """At random, so many of each group; all of the groups that aren't named."""
    generator = random.Random(seed)
    found = []
    for group in ("batch", "container", "setting", "model"):
        members = [call for call in calls if call.group == group]
        size = min(sizes.get(group, len(members)), len(members))
        found += generator.sample(members, size)
    return found


# All settings and models, and of the products of engine, model and fault a sample.
SIZES = {"batch": 1200, "container": 200}
FEW = {"batch": 40, "container": 10, "setting": 40, "model": 4}


def main() -> None:
    """Make the sampled calls, or all whose name has the pattern given, and count."""
    calls = all_calls()
    if len(sys.argv) > 1:
        calls = [call for call in calls if re.search(sys.argv[1], call.name)]
    else:
        calls = sample(calls, SIZES)
    counts: Counter[str] = Counter()
    for number, call in enumerate(calls):
        if number % 100 == 0:
            print(f"after {number}: {dict(counts)}", flush=True)
        found = verdict(call)
        kind = "good" if found is None else found.split(":")[0]
        counts[kind if not kind.startswith("doesn't") else "names nothing"] += 1
        if found is not None:
            print(f"{call.group} | {call.name}\n    {found}", flush=True)
    print(f"{len(calls)} calls", dict(counts))


if __name__ == "__main__":
    main()
