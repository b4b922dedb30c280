"""Studies that take hours: each result is a file, and their table is of what is there.

A result is written at once and whole, and what is there isn't computed again, so that
an interrupted study goes on where it was, and several processes may share its jobs.
"""

import argparse
import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

Job = TypeVar("Job")


def write(path: Path, result: dict[str, Any]) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1))
    os.replace(part, path)
    print(path.stem, flush=True)


def arguments(
    doc: str | None, name: str, sets: Sequence[str], rows: int
) -> argparse.ArgumentParser:
    """What every study can be told.

    Args:
        doc: Its docstring.
        name: Of the study, its folder of results and its table.
        sets: Data sets, folders of ``--data``.
        rows: Training rows.
    """
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--sets", nargs="+", default=list(sets))
    parser.add_argument("--rows", type=int, default=rows)
    parser.add_argument("--shard", default="0/1", help="I/N: every Nth job, from I on")
    parser.add_argument("--runs", type=Path, default=Path(".cache") / name)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--report", action="store_true")
    parser.set_defaults(name=name)
    return parser


def shard(jobs: Sequence[Job], args: argparse.Namespace) -> Sequence[Job]:
    """The jobs of this process."""
    start, number = map(int, args.shard.split("/"))
    return jobs[start::number]


def run_or_report(
    args: argparse.Namespace,
    run: Callable[[argparse.Namespace], None],
    report: Callable[[Path], list[str]],
) -> None:
    """Compute what isn't there yet; or write the table of what is."""
    if args.report:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"{args.name}.md").write_text("\n".join(report(args.runs)))
        return
    args.runs.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", "The weights aren't a mode")
    run(args)
