"""Cost of Laplace's approximation, side by side with the libraries of the same job.

Usage: ``python -m benchmarks.laplace [--quick] [--repeats 3] [--device cuda]
[--out benchmarks/results]``, on a quiet machine, with the extra ``bench``. Networks and
texts are random; no download. About 10 minutes on two cores, on Linux.
"""

import argparse
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pyro

from benchmarks.laplace_libraries import (
    BATCH,
    BLORA_RANK,
    RANK,
    Job,
    Library,
    Setting,
    Texts,
    blora,
    floor,
    laplace_torch,
    ours,
)
from benchmarks.main_job import seconds
from benchmarks.tables import header, provenance

# The targets.
MAX_FIT, MAX_PREDICTIVE = 1.25, 2.0  # over the floor
MIN_FIT_LAPLACE, MIN_GLM_LAPLACE, MIN_GLM_BLORA = 2.5, 15.0, 8.0  # times as fast
MAX_EVIDENCE, MAX_EVIDENCE_MS = 1e-4, 0.5  # of the fit, or milliseconds

BACKENDS = ("CurvlinopsGGN", "AsdlGGN", "BackPackGGN")
PEERS = ("laplace-torch", "curvlinops-for-pytorch", "bayesian-lora")


def runnable(setting: Setting) -> tuple[dict[str, Library], list[str]]:
    """The other libraries that run, tried on two batches; and why others don't."""
    makers: dict[str, Callable[[], Library]] = {
        f"laplace-torch, {backend}": lambda backend=backend: laplace_torch(  # type: ignore[misc]
            setting, backend
        )
        for backend in BACKENDS
    }
    makers["bayesian-lora"] = lambda: blora(setting)
    found, refused = {}, []
    for name, make in makers.items():
        try:
            library = make()
            library.fit(setting.batches()[:2])
            library.predict(setting.batches(2)[0])
        except Exception as error:  # whatever another library raises, it doesn't run
            refused.append(f"{name} doesn't run: {type(error).__name__}: {error}")
        else:
            found[name] = library
    return found, refused


def medians(jobs: dict[str, Job], repeats: int) -> dict[str, float]:
    """Median seconds, the jobs taking turns; they are warm already."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            times[name].append(seconds(job))
    return {name: statistics.median(t) for name, t in times.items()}


def repeated(job: Job, number: int) -> Job:
    """The job several times in a row."""

    def run() -> None:
        for _ in range(number):
            job()

    return run


def measure(setting: Setting, repeats: int) -> tuple[list[str], list[str]]:
    """Rows of the table, and what doesn't run."""
    library, train = ours(setting)
    network, batches = setting.network(), setting.batches()

    def floor_pass(over: list[Texts]) -> None:
        for texts in over:
            floor(network, texts)

    for job in (train, floor_pass, library.fit):
        job(batches[:2])  # warm up
    own = {
        "MAP epoch": lambda: train(batches),
        "floor": lambda: floor_pass(batches),
        "fit": lambda: library.fit(batches),
    }
    times = medians(own, repeats)
    epoch, base = times["MAP epoch"], times["floor"]
    others, refused = runnable(setting)
    fits = {name: seconds(lambda o=o: o.fit(batches)) for name, o in others.items()}  # type: ignore[misc]

    def row(what: str, value: float, against: str, target: str) -> str:
        cells = [str(setting), what, f"{1e3 * value:.2f}", f"{value / epoch:.3g}"]
        return f"| {' | '.join([*cells, against, target])} |"

    rows = [
        row("MAP epoch (SVI)", epoch, "", ""),
        row("floor of a fit: 1 forward, C-1 backward", base, "", ""),
        row(
            "KFAC fit, exact Fisher",
            times["fit"],
            f"{times['fit'] / base:.2f} x floor",
            f"≤ {MAX_FIT} x floor",
        ),
    ]
    for name, value in fits.items():
        target = f"≥ {MIN_FIT_LAPLACE} x ours" if "laplace" in name else ""
        rows.append(
            row(f"fit, {name}", value, f"{value / times['fit']:.1f} x ours", target)
        )
    rows += predictive_rows(setting, library, others, row, repeats)
    rows += evidence_rows(library, others, row, times["fit"])
    return rows, refused


def predictive_rows(
    setting: Setting,
    library: Library,
    others: dict[str, Library],
    row: Callable[[str, float, str, str], str],
    repeats: int,
) -> list[str]:
    """Time per datum of the linearised predictive as the batch grows."""
    network, rows = setting.network(), []
    for size in (1, 4, BATCH, 4 * BATCH):
        texts = setting.batches(size)[0]
        number = max(1, BATCH // size)
        jobs = {
            "floor": repeated(lambda t=texts: floor(network, t), number),  # type: ignore[misc]
            "ours": repeated(lambda t=texts: library.predict(t), number),  # type: ignore[misc]
        }
        medians(jobs, 1)
        times = {k: v / number / size for k, v in medians(jobs, repeats).items()}
        rows.append(
            row(
                f"predictive per datum, B={size}",
                times["ours"],
                f"{times['ours'] / times['floor']:.2f} x floor",
                f"≤ {MAX_PREDICTIVE} x floor",
            )
        )
        if size not in (4, BATCH):
            continue
        for name, other in others.items():
            value = seconds(lambda o=other, t=texts: o.predict(t)) / size  # type: ignore[misc]
            least = MIN_GLM_LAPLACE if "laplace" in name else MIN_GLM_BLORA
            rows.append(
                row(
                    f"predictive per datum, B={size}, {name}",
                    value,
                    f"{value / times['ours']:.1f} x ours",
                    f"≥ {least:g} x ours" if size == BATCH else "",
                )
            )
    return rows


def evidence_rows(
    library: Library,
    others: dict[str, Library],
    row: Callable[[str, float, str, str], str],
    fit: float,
) -> list[str]:
    """Time of one evaluation of the evidence with its gradient."""
    rows = []
    for name, each in {"": library, **others}.items():
        if each.evidence is None:
            continue
        each.evidence()
        value = seconds(repeated(each.evidence, 10)) / 10
        limit = max(MAX_EVIDENCE * fit, MAX_EVIDENCE_MS / 1e3)
        rows.append(
            row(
                "evidence and gradient" + (f", {name}" if name else ""),
                value,
                f"{value / fit:.1e} of our fit",
                "" if name else f"≤ {1e3 * limit:.2f} ms",
            )
        )
    return rows


def memory(hidden: int, layers: int) -> list[str]:
    """The table of a process of its own, whose memory is measured."""
    command = [sys.executable, "-m", "benchmarks.laplace_memory"]
    sizes = ["--hidden", str(hidden), "--layers", str(layers)]
    done = subprocess.run([*command, *sizes], check=True, stdout=subprocess.PIPE)
    return done.stdout.decode().splitlines()


def report(repeats: int, device: str, quick: bool) -> list[str]:
    """All tables, in Markdown."""
    shapes = [("Llama", 4, 128), ("BERT (MiniLM's shape)", 6, 384)]
    if quick:
        shapes = [("Llama", 1, 32), ("BERT (MiniLM's shape)", 1, 32)]
    settings = [
        Setting(
            kind=kind,
            layers=layers,
            hidden=hidden,
            num_classes=num_classes,
            num_data=64 if quick else 256,
            length=8 if quick else 16,
            device=device,
        )
        for kind, layers, hidden in shapes
        for num_classes in (2, 4)
    ]
    rows, refused = [], []
    for setting in settings:
        found, not_running = measure(setting, repeats)
        rows += found
        refused += [line for line in not_running if line not in refused]
    hidden, layers = (256, 2) if quick else (4096, 32)
    return [
        "# Cost of Laplace's approximation",
        "",
        f"Random weights, LoRA r={RANK} on query and value of every layer, "
        f"{settings[0].num_data} texts of {settings[0].length} tokens, float32; fits "
        f"in batches of {BATCH}. Medians of {repeats}, our jobs taking turns; the "
        "others' once, after a warm-up. The unit is an epoch of MAP training.",
        "",
        provenance(*PEERS, device=device),
        "",
        *header("network", "job", "ms", "MAP epochs", "compared", "target"),
        *rows,
        "",
        *(f"- {line}" for line in refused),
        f"- bayesian-lora samples one label a datum, keeps rank {BLORA_RANK} of the "
        "wide factors and sees the last token only; its evidence isn't one.",
        "",
        f"Memory for {layers} layers of hidden size {hidden}, LoRA r={RANK} on query "
        "and value, float32, by one such layer:",
        "",
        *memory(hidden, layers),
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test, which writes nothing"
    )
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # the weights aren't a mode; others' deprecations
    pyro.set_rng_seed(0)
    lines = report(1 if args.quick else args.repeats, args.device, args.quick)
    print("\n".join(lines))
    if not args.quick:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "laplace.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
