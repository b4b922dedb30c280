"""What the commands say: errors and warnings as sentences, numbers in a table."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    import pyro_lora as pl


@contextmanager
def errors_in_words() -> Iterator[None]:
    """What the library says of wrong input is the message, without a traceback.

    Raises:
        Exit: In place of it.
        MemoryError: Never.
        RuntimeError: If it isn't about memory: that is an error in this library.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # for the libraries' authors
        warnings.showwarning = _say  # type: ignore[assignment]  # it takes more
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


def quiet_transformers() -> None:
    """Neither bars nor tables of what transformers reads: it's checked afterwards."""
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()


def _say(message: Warning | str, *_: Any) -> None:
    typer.secho(f"Warning: {message}", fg="yellow", err=True)


def with_standard_errors(prediction: pl.Prediction) -> dict[str, str]:
    """Metrics, each with the standard error that comes from the choice of the data."""
    numbers = prediction.metrics(num_bootstrap=100)
    return {
        name: f"{value:.4g} +- {numbers[f'{name}_se']:.2g}"
        for name, value in numbers.items()
        if f"{name}_se" in numbers
    }


def say(text: str) -> None:
    """Print text, and the codes of what the terminal has no characters for."""
    encoding = sys.stdout.encoding or "utf-8"
    typer.echo(text.encode(encoding, "backslashreplace").decode(encoding))


def show(title: str, numbers: Mapping[str, Any]) -> None:
    """Print a table of two columns under its title."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for name, value in numbers.items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        table.add_row(name, shown)
    say(f"\n{title}")
    Console().print(table)
