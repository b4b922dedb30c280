"""Studies that take hours: each result is a line of a file, and they make the table.

The file is ``raw/NAME.jsonl`` beside the tables, in the repository: a study may go on
where it was, also on another machine, and several processes may share its jobs.
"""

import argparse
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

Job = TypeVar("Job")
Result = dict[str, Any]
DIGITS = 6


def kept(path: Path) -> dict[str, Result]:
    """The results that are there, by name."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines]
    return {result.pop("name"): result for result in found}


def keep(path: Path, name: str, result: Result) -> None:
    """Add one, in one piece, so that processes don't write into one another's lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"name": name, **short(result)})
    with path.open("a") as file:
        file.write(line + "\n")
    print(name, flush=True)


def short(value: Any) -> Any:
    """The same with six digits of each number."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: short(x) for key, x in value.items()}
    return [short(x) for x in value] if isinstance(value, list) else value


def arguments(
    doc: str | None, name: str, sets: Sequence[str], rows: int
) -> argparse.ArgumentParser:
    """What every study can be told.

    Args:
        doc: Its docstring.
        name: Of the study, its file of results and its table.
        sets: Data sets, folders of ``--data``.
        rows: Training rows.
    """
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--sets", nargs="+", default=list(sets))
    parser.add_argument("--rows", type=int, default=rows)
    parser.add_argument("--shard", default="0/1", help="I/N: every Nth job, from I on")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--report", action="store_true")
    parser.set_defaults(name=name)
    return parser


def raw(args: argparse.Namespace) -> Path:
    """The file of a study's results."""
    path: Path = args.out / "raw" / f"{args.name}.jsonl"
    return path


def shard(jobs: Sequence[Job], args: argparse.Namespace) -> Sequence[Job]:
    """The jobs of this process."""
    start, number = map(int, args.shard.split("/"))
    return jobs[start::number]


def run_or_report(
    args: argparse.Namespace,
    run: Callable[[argparse.Namespace], None],
    report: Callable[[Mapping[str, Result]], list[str]],
) -> None:
    """Compute what isn't there yet; or write the table of what is."""
    if args.report:
        lines = report(dict(sorted(kept(raw(args)).items())))
        (args.out / f"{args.name}.md").write_text("\n".join(lines))
        return
    warnings.filterwarnings("ignore", "The weights aren't a mode")
    run(args)
