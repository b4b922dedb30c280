"""The command line: a saved adapter and a file of texts -> posterior, predictions.

What the library says of wrong input is said as a sentence, and numbers in a table.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace as with_fields
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pyro_lora as pl
from pyro_lora.cli.saved_settings import (
    Settings,
    class_names,
    files_of,
    folders_of,
    network_names,
    opened,
)
from pyro_lora.cli.text_files import (
    Texts,
    check_folder,
    check_is_free,
    check_is_new,
    check_output,
    given_names,
    label_numbers,
    read_texts,
    write_prediction,
)

try:
    import typer
except ImportError as error:
    raise ImportError(
        "The command line needs typer. Install it by: pip install 'pyro-lora[cli]'"
    ) from error

if TYPE_CHECKING:
    from pyro.optim import PyroOptim
    from torch import Tensor

_AT_START, _AFTER_TRAINING = "accuracy of the adapter", "accuracy after training"

# What a command needs is imported when it runs: help and completion don't wait for
# torch, nor does the news that a file can't be read.

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Bayesian inference over a LoRA adapter for text classification.

An adapter that was trained and saved by PEFT, and a file of texts with labels (CSV,
TSV, JSONL or Parquet), become a posterior over the adapter's weights; the posterior
gives calibrated probabilities and says what it doesn't know.

1. `pyro-lora fit my_adapter train.csv posterior` puts a posterior around the adapter.

2. `pyro-lora diagnose posterior train.csv` tells whether to believe it.

3. `pyro-lora predict posterior test.csv --output predictions.csv` uses it.

4. `pyro-lora export posterior adapters` writes draws as ordinary PEFT adapters.

What is done with the texts is a call of a Python function, `pyro_lora.predict` and so
on; other tasks than classification are open there.""",
)


class Method(StrEnum):
    """How the posterior is found."""

    refined = "refined"
    laplace = "laplace"
    svgd = "svgd"

    @classmethod
    def for_size(cls, num_rows: int, num_weights: int) -> Method:
        """The best that stays small.

        A refined posterior keeps a number for each weight and row, a text and class but
        one, and its algebra is that of matrices with so many rows.
        """
        small = num_rows <= 2000 and num_rows * num_weights <= 10**8
        return cls.refined if small else cls.laplace


class Predictive(StrEnum):
    """How predictions are averaged over it."""

    linearized = "linearized"
    sample = "sample"


def _positive(value: float) -> float:
    if not 1e-30 < value < 1e30:
        raise typer.BadParameter(f"{value} is not a positive number up to 1e30.")
    return value


def _up_to_one(value: float | None) -> float | None:
    if value is not None and not 0 <= value <= 1:
        raise typer.BadParameter(f"{value} is not a number from 0 to 1.")
    return value


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pyro-lora {version('pyro-lora')}")
        raise typer.Exit


@app.callback()
def _app(
    _: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the version, and no more.",
        ),
    ] = False,
) -> None: ...


Data = Annotated[
    Path,
    typer.Argument(
        help="CSV or TSV file with a header, JSONL (.jsonl or .json) or Parquet file.",
        exists=True,
        dir_okay=False,
    ),
]
PosteriorFolder = Annotated[
    Path,
    typer.Argument(
        help="Folder that `pyro-lora fit`, `pyro_lora.save` or `save_pretrained` "
        "wrote.",
        exists=True,
        file_okay=False,
    ),
]
AdapterFolder = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the adapter.  [default: where it was in the fit, as seen from "
        "the posterior's folder]",
        exists=True,
        file_okay=False,
    ),
]
TextColumn = Annotated[
    str | None, typer.Option(help="Column of the texts.  [default: the fit's]")
]
LabelColumn = Annotated[
    str | None, typer.Option(help="Column of the labels.  [default: the fit's]")
]
LabelNames = Annotated[
    str,
    typer.Option(
        help="Classes in the order of the network's outputs: 'negative,positive'.  "
        "[default: the fit's]"
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option(min=1, max=10**6, help="Tokens of a text.  [default: the fit's]"),
]
Replace = Annotated[
    bool, typer.Option("--replace", help="Replace what an earlier run wrote there.")
]
Online = Annotated[
    bool,
    typer.Option(
        "--online", help="Let the hub be asked for what isn't in its cache yet."
    ),
]
BatchSize = Annotated[
    int, typer.Option(min=1, max=10**6, help="Texts in one forward pass.")
]
Seed = Annotated[
    int, typer.Option(min=0, max=2**32 - 1, help="Same seed, same numbers.")
]
Device = Annotated[str, typer.Option(help="As torch names it: cpu, cuda, cuda:1, mps.")]


@app.command()
def fit(
    adapter: Annotated[
        Path,
        typer.Argument(
            help="Folder of a saved PEFT adapter.", exists=True, file_okay=False
        ),
    ],
    data: Data,
    posterior: Annotated[
        Path, typer.Argument(help="Folder to write.", file_okay=False)
    ],
    method: Annotated[
        Method | None,
        typer.Option(
            help="refined: the exact Gaussian of the linearised network around its own "
            "mode, for few texts. laplace: a Gaussian around the adapter (KFAC), for "
            "any number. Of both the prior is chosen by the evidence. svgd: particles "
            "that are trained from the adapter and repel each other.  [default: "
            "refined for up to 2,000 texts (times classes but one) and 100 million "
            "numbers (that times weights), else laplace]"
        ),
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column of the texts.")] = "text",
    label_column: Annotated[str, typer.Option(help="Column of the labels.")] = "label",
    label_names: Annotated[
        str,
        typer.Option(
            help="Classes in the order of the network's outputs: 'negative,positive'. "
            "Needed where labels are words that the network's config doesn't know."
        ),
    ] = "",
    epochs: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=10**6,
            help="Passes of training over the data. 0 takes the adapter as it is.  "
            "[default: 3 for svgd, else 0]",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            callback=_up_to_one, help="Adam's, in training.  [default: 0.001]"
        ),
    ] = None,
    prior_scale: Annotated[
        float,
        typer.Option(
            callback=_positive, help="Standard deviation of every weight beforehand."
        ),
    ] = 1.0,
    num_particles: Annotated[
        int | None, typer.Option(min=2, max=1000, help="For svgd.  [default: 5]")
    ] = None,
    max_length: Annotated[
        int, typer.Option(min=1, max=10**6, help="Tokens of a text.")
    ] = 128,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    device: Device = "cpu",
    replace: Replace = False,
    online: Online = False,
) -> None:
    """Put a posterior around a trained adapter.

    `refined` and `laplace` take one pass over the data and no training. `laplace` is
    about a mode, and warns where the adapter isn't one: then let `--epochs 1` take it
    there. `svgd` costs as much as training `--num-particles` adapters.
    """
    with _errors_in_words():
        laplace = method is not Method.svgd
        epochs = (0 if laplace else 3) if epochs is None else epochs
        _refuse(
            laplace and num_particles is not None,
            "--num-particles is for --method svgd.",
        )
        _refuse(
            not epochs and learning_rate is not None,
            "--learning-rate is for training: say how long by --epochs.",
        )
        learning_rate = 1e-3 if learning_rate is None else learning_rate
        names = given_names(label_names)
        check_folder(posterior, "POSTERIOR", adapter)
        check_is_free(posterior, replace)
        texts = read_texts(data, text_column, label_column)
        if names:
            label_numbers(texts, names)
        in_files = network_names(adapter)
        if in_files is not None:
            label_numbers(texts, class_names(in_files, texts, names))
        _prepare(seed, online)

        from pyro_lora.cli import saved_classifier as saved

        network = saved.network_of(adapter)
        settings = Settings(
            adapter=str(adapter.resolve()),
            label_names=class_names(saved.names_in(network), texts, names),
            text_column=text_column,
            label_column=label_column,
            max_length=max_length,
            prior_scale=prior_scale,
        )
        label_numbers(texts, settings.label_names)
        lora = saved.lifted(network, settings, device)
        saved.check_tokens(texts, settings, lora)
        model = pl.models.classification(lora, len(texts))
        num_rows = len(texts) * (len(settings.label_names) - 1)
        method = method or Method.for_size(num_rows, _num_weights(lora))
        batches = saved.text_batches(texts, settings, batch_size, lora)
        shuffled = saved.text_batches(texts, settings, batch_size, lora, shuffle=True)
        numbers: dict[str, float] = {}
        if epochs or not laplace:  # else the fit's own pass says it
            at_start = pl.ensemble(lora, [lora.weights()])
            numbers[_AT_START] = _accuracy(at_start, model, batches)
            _compare_with_chance(numbers[_AT_START], texts)
        fitted: pl.LaplacePosterior | pl.ParticlePosterior
        if laplace:
            with saved.RightAnswers(len(texts)) as right:
                fitted, of_fit = _laplace(
                    model,
                    lora,
                    batches,
                    shuffled,
                    epochs,
                    learning_rate,
                    method is Method.refined,
                )
            numbers[_AFTER_TRAINING if epochs else _AT_START] = right.accuracy()
            if not epochs:
                _compare_with_chance(numbers[_AT_START], texts)
        else:
            fitted, of_fit = _svgd(
                model, lora, shuffled, epochs, learning_rate, num_particles or 5
            )
            if epochs:
                numbers[_AFTER_TRAINING] = _accuracy(fitted, model, batches)
        saved.save_with(fitted, posterior, settings)
    counts = {
        "texts": len(texts),
        "classes": ", ".join(settings.label_names),
        "weights": _num_weights(lora),
    }
    title = f"{method.value} posterior in {posterior}"
    _show(title, {**counts, **numbers, **of_fit})


@app.command()
def predict(
    posterior: PosteriorFolder,
    data: Data,
    output: Annotated[
        Path | None,
        typer.Option(
            help="File to write, a row for each text: .csv, .tsv, .jsonl, .json "
            "(as .jsonl) or .parquet.",
            dir_okay=False,
        ),
    ] = None,
    method: Annotated[
        Predictive | None,
        typer.Option(
            help="linearized: exact, for refined and laplace. sample: an average over "
            "draws.  [default: linearized where possible]"
        ),
    ] = None,
    num_samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=10**6,
            help="Draws, with sample.  [default: 64, or all particles]",
        ),
    ] = None,
    adapter: AdapterFolder = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    label_names: LabelNames = "",
    max_length: MaxLength = None,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    device: Device = "cpu",
    replace: Replace = False,
    online: Online = False,
) -> None:
    """Probabilities of the classes, and how far to trust them.

    The file has texts and, if it has labels, too, a table of metrics is the answer,
    with the standard errors that come from the choice of the texts: accuracy, negative
    log-likelihood (nll), calibration error (ece), Brier score.
    `--output` has for each text the predicted class, its probability (confidence), all
    probabilities (p_ and the class's name), and the entropy in nats: aleatoric (the
    text is ambiguous) and epistemic (the adapter has seen too little).
    """
    with _errors_in_words():
        _refuse(
            method is not Predictive.sample and num_samples is not None,
            "--num-samples is for --method sample: say that, too. Without it "
            "predictions are exact for refined and laplace, by the linearized "
            "network, and means over all particles for svgd.",
        )
        if output is not None:
            check_output(output, [data, posterior], replace)
        told = _told(adapter, label_names, text_column, label_column, max_length)
        folder, fitted, settings = opened(posterior, told)
        if output is not None:
            check_output(output, files_of(settings), replace)
        (texts,) = _read([data], settings, optional=True)
        _prepare(seed, online)

        from pyro_lora.cli import saved_classifier as saved

        lora, settings = saved.restored(folder, settings, device, texts)
        saved.check_tokens(texts, settings, lora)
        model = pl.models.classification(lora, len(texts))
        prediction: pl.Prediction = pl.predict(
            saved.load_with(folder, fitted, lora, model),
            saved.text_batches(texts, settings, batch_size, lora),
            method=method.value if method else None,
            num_samples=num_samples,
        )
        if output is not None:
            prediction = with_fields(prediction, class_names=settings.label_names)
            write_prediction(output, texts, prediction)
    numbers: dict[str, Any] = {"texts": len(texts)}
    if prediction.labels is None:
        numbers["mean confidence"] = float(prediction.probs.max(-1).values.mean())
    else:
        numbers |= _with_standard_errors(prediction)
    numbers["mean epistemic entropy"] = float(prediction.epistemic_entropy.mean())
    way = f"{method.value} prediction" if method else "prediction"
    _show(f"{way} of {data}", numbers)


@app.command()
def diagnose(
    posterior: PosteriorFolder,
    data: Data,
    held_out: Annotated[
        Path | None,
        typer.Option(
            help="File of other texts, for calibration.", exists=True, dir_okay=False
        ),
    ] = None,
    adapter: AdapterFolder = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    label_names: LabelNames = "",
    max_length: MaxLength = None,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    device: Device = "cpu",
    online: Online = False,
) -> None:
    """Ask a posterior five questions: is it to be believed?

    The file is the one that the posterior was fitted to. Is the mode one, is the
    Gaussian believable, are particles diverse, is the prior or the data in charge, is
    it over- or under-confident? Of laplace it takes up to three times as long as fit.
    """
    with _errors_in_words():
        told = _told(adapter, label_names, text_column, label_column, max_length)
        folder, fitted, settings = opened(posterior, told)
        files = _read([data] if held_out is None else [data, held_out], settings)
        texts = files[0]
        _prepare(seed, online)

        from pyro_lora.cli import saved_classifier as saved

        lora, settings = saved.restored(folder, settings, device, texts)
        batches = []
        for file in files:
            saved.check_tokens(file, settings, lora)
            batches.append(saved.text_batches(file, settings, batch_size, lora))
        model = pl.models.classification(lora, len(texts))
        diagnosis = pl.diagnose(
            saved.load_with(folder, fitted, lora, model),
            batches[0],
            held_out=batches[1] if held_out is not None else None,
        )
    _print(str(diagnosis).replace(*_HELD_OUT))


@app.command()
def export(
    posterior: PosteriorFolder,
    output: Annotated[
        Path, typer.Argument(help="Folder to hold the adapters.", file_okay=False)
    ],
    num_samples: Annotated[
        int | None,
        typer.Option(
            min=1, max=10**6, help="Adapters to write.  [default: 8, or all particles]"
        ),
    ] = None,
    mode: Annotated[
        bool,
        typer.Option(
            "--mode",
            help="Write one adapter, for laplace the mode, for refined the adapter "
            "that was refined.",
        ),
    ] = False,
    adapter: AdapterFolder = None,
    seed: Seed = 0,
    online: Online = False,
) -> None:
    """Write draws as ordinary PEFT adapters: draw_000, draw_001, ...

    Each has a README.md that says how to load it, by `PeftModel.from_pretrained`, and
    whether servers of many LoRA adapters (vLLM, LoRAX) take it. The mean of the
    probabilities that they give is the prediction of particles (svgd). Draws of a
    refined or laplace posterior, which is about the linearised network, may predict at
    chance: write its `--mode`, or particles.
    """
    with _errors_in_words():
        _refuse(
            mode and num_samples is not None,
            "--mode writes one adapter: leave out --num-samples.",
        )
        check_folder(output, "OUTPUT", posterior)
        check_is_new(output)
        folder, fitted, settings = opened(posterior, {"adapter": adapter})
        check_folder(output, "OUTPUT", folder, *folders_of(settings))
        _prepare(seed, online)

        from pyro_lora.cli import saved_classifier as saved

        lora, _ = saved.restored(folder, settings, "cpu")
        loaded = saved.load_with(folder, fitted, lora)
        if mode:
            is_laplace = isinstance(loaded, pl.LaplacePosterior)
            one = loaded.origin() if is_laplace else loaded.mode()
            loaded = pl.ensemble(lora, [one])
        if num_samples is None:
            num_samples = loaded.num_samples or 8
        pl.export_adapters(loaded, output, num_samples)
    names = sorted(draw.name for draw in output.glob("draw_*"))
    _show(f"adapters in {output}", {"from": names[0], "to": names[-1]})


def _told(
    adapter: Path | None,
    label_names: str,
    text_column: str | None,
    label_column: str | None,
    max_length: int | None,
) -> dict[str, Any]:
    """What the command line says in place of the fit's settings, by their names."""
    return {
        "adapter": adapter,
        "label_names": given_names(label_names),
        "text_column": text_column,
        "label_column": label_column,
        "max_length": max_length,
    }


def _read(
    files: Sequence[Path], settings: Settings, *, optional: bool = False
) -> list[Texts]:
    """Files with the columns of a fit, and with labels of its classes."""
    columns = settings.text_column, settings.label_column
    texts = [read_texts(file, *columns, optional=optional) for file in files]
    if settings.label_names:
        for file in texts:
            label_numbers(file, settings.label_names)
    return texts


def _refuse(condition: bool, words: str) -> None:
    if condition:
        raise ValueError(words)


def _compare_with_chance(accuracy: float, texts: Texts) -> None:
    most = max(Counter(texts.labels or ()).values()) / len(texts)
    if accuracy < most:
        warnings.warn(
            f"The adapter is right about {accuracy:.1%} of the texts, and always to "
            f"say the most frequent class would be about {most:.1%}. Are these its "
            "classes, in the order of its outputs (--label-names), and its texts?",
            stacklevel=2,
        )


def _laplace(
    model: Callable[..., Tensor],
    lora: pl.LiftedNetwork,
    batches: Any,
    shuffled: Any,
    epochs: int,
    learning_rate: float,
    refined: bool,
) -> tuple[pl.LaplacePosterior, dict[str, Any]]:
    import torch
    from pyro.infer import SVI, Trace_ELBO
    from tqdm.auto import trange

    guide = pl.AutoLaplace(
        model,
        init_loc_fn=lora.init_to_adapter(),
        structure=pl.structures.Exact() if refined else pl.structures.KFAC(),
    )
    svi = SVI(model, guide, _adam(learning_rate), Trace_ELBO())
    lora.network.train()
    # On a terminal alone, as the library's own bars.
    for _ in trange(epochs, desc="Train", unit="epoch", disable=None):
        for batch in shuffled:
            svi.step(**batch)
    lora.network.eval()
    with warnings.catch_warnings():
        if refined:  # then that is mended
            warnings.filterwarnings("ignore", "The weights aren't a mode")
        first = guide.laplace_approximation(batches)
    first = first.refine() if refined else first
    tuned = first.optimize_prior()
    precision = torch.cat([p.flatten() for p in tuned.prior_precision.values()])
    return tuned, {
        "log evidence, prior as given (nats)": float(first.log_evidence()),
        "log evidence, prior chosen by it (nats)": float(tuned.log_evidence()),
        "prior standard deviation chosen": float(precision.mean().rsqrt()),
    }


def _svgd(
    model: Callable[..., Tensor],
    lora: pl.LiftedNetwork,
    shuffled: Any,
    epochs: int,
    learning_rate: float,
    num_particles: int,
) -> tuple[pl.ParticlePosterior, dict[str, Any]]:
    engine = pl.SVGD(
        model,
        pl.kernels.RBF(space="function"),  # repulsion of weights hardly changes outputs
        _adam(learning_rate),
        num_particles,
        init_loc_fn=lora.init_to_adapter(jitter="auto"),
    )
    lora.network.train()
    engine.run(shuffled, num_epochs=epochs)
    lora.network.eval()
    # The loss has the prior's constant in it, which says nothing: nll stands first.
    series: dict[str, list[float]] = {"nll": [], **engine.diagnostics}
    last: dict[str, Any] = {
        name: values[-1] for name, values in series.items() if values and name != "loss"
    }
    if last.get("repulsion") == 0:
        last |= dict.fromkeys(("repulsion", "ratio"), "0, gate closed")
    return engine.posterior(), {"particles": num_particles, **last}


def _adam(learning_rate: float) -> PyroOptim:
    import torch
    from pyro.optim import PyroOptim

    return PyroOptim(torch.optim.Adam, {"lr": learning_rate})


def _accuracy(posterior: Any, model: Callable[..., Tensor], batches: Any) -> float:
    return pl.predict(posterior, batches, model=model).metrics()["accuracy"]


def _num_weights(lora: pl.LiftedNetwork) -> int:
    return sum(value.numel() for value in lora.zeros().values())


@contextmanager
def _errors_in_words() -> Iterator[None]:
    """What the library says of wrong input is the message, without a traceback.

    Raises:
        Exit: In place of it.
        MemoryError: Never.
        RuntimeError: If it isn't about memory: that is an error in this library.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # for the libraries' authors
        warnings.showwarning = _warn  # type: ignore[assignment]  # it takes more
        try:
            yield
        except (ValueError, OSError, ImportError) as error:
            typer.secho(f"Error: {error}", fg="red", err=True)
            raise typer.Exit(1) from error
        except (MemoryError, RuntimeError) as error:
            if "memory" not in str(error):
                raise
            typer.secho(
                "Error: not enough memory. A smaller --batch-size, --max-length, "
                f"--num-particles or --num-samples takes less. ({_first_line(error)})",
                fg="red",
                err=True,
            )
            raise typer.Exit(1) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _prepare(seed: int, online: bool) -> None:
    """Load the libraries, which is what takes seconds; the same seed, the same run."""
    # The hub's client reads it once, when it's imported.
    os.environ["HF_HUB_OFFLINE"] = "0" if online else "1"
    import pyro

    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    # Neither bars nor tables of what transformers reads: it's checked afterwards.
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()


# What a command has in place of what the library advises.
_REMEDIES = {
    "The weights aren't a mode": "Here: by (more) --epochs, as in "
    "--epochs 1 --learning-rate 1e-4, or by --method refined.",
    "A Gaussian over several layers": "Here: write the mode, by --mode, or fit "
    "particles, by --method svgd.",
    "Averaged over draws of a Gaussian": "Here: leave out --method sample, or fit "
    "particles, by fit --method svgd.",
}
_HELD_OUT = "give held_out=", "give --held-out"


def _warn(message: Warning | str, *_: Any) -> None:
    words = [str(message)]
    words += [own for start, own in _REMEDIES.items() if words[0].startswith(start)]
    typer.secho(f"Warning: {' '.join(words)}", fg="yellow", err=True)


def _with_standard_errors(prediction: pl.Prediction) -> dict[str, str]:
    """Metrics, each with the standard error that comes from the choice of the data."""
    numbers = prediction.metrics(num_bootstrap=100)
    return {
        name: f"{value:.4g} +- {numbers[f'{name}_se']:.2g}"
        for name, value in numbers.items()
        if f"{name}_se" in numbers
    }


def _print(text: str) -> None:
    """Print text, and the codes of what the terminal has no characters for."""
    encoding = sys.stdout.encoding or "utf-8"
    typer.echo(text.encode(encoding, "backslashreplace").decode(encoding))


def _show(title: str, numbers: Mapping[str, Any]) -> None:
    """Print a table of two columns under its title."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for name, value in numbers.items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        table.add_row(name, shown)
    _print(f"\n{title}")
    Console().print(table)


if __name__ == "__main__":
    app()
