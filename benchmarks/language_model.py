"""What a posterior of a language model costs, in units of plain passes and steps.

Usage: ``python -m benchmarks.language_model [--quick] [--repeats 3]
[--rows 500] [--device cuda] [--out benchmarks/results]``, on Linux with glibc. The
network has SmolLM2-135M's shape and random weights; no download.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.optim import Adam
from torch.nn.functional import cross_entropy

import pyro_lora as pl
from benchmarks.allocator import SETTINGS, keep_freed_memory
from benchmarks.devices import allocated, clock
from benchmarks.generate import FIRST_TOKEN, HEAD, NUM_LAYERS, VOCABULARY, network
from benchmarks.tables import header, provenance, row

ADAPTED = 4
TARGETS = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
BATCH, LENGTH, NUM_DRAWS, NUM_PARTICLES = 25, 48, 10, 5
CHOICES = {2: (11, 12), 4: (11, 12, 13, 14)}
# Name of a job -> of which unit, how many of these it may take.
LIMITS = {
    "predict, linearised, KFAC": ("plain pass", 1.3),
    f"predict, {NUM_DRAWS} draws": ("plain pass", 2.3),
    "KFAC fit": ("MAP epoch", 1.1),
    f"SVGD epoch, K={NUM_PARTICLES}": ("MAP epoch", 0.6 * NUM_PARTICLES),
}


def prompts(num_batches: int, num_classes: int, device: str) -> list[dict[str, Any]]:
    """Texts of one length, each with the place of its answer."""
    found = []
    for _ in range(num_batches):
        ids = torch.randint(FIRST_TOKEN, VOCABULARY, (BATCH, LENGTH), device=device)
        labels = torch.randint(num_classes, (BATCH,), device=device)
        mask = torch.ones_like(ids)
        texts = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        found.append({**texts, "logits_to_keep": 1})
    return found


class Jobs:
    """What is timed, on all batches.

    Args:
        num_layers: Of the network.
        num_heads: Of each layer, which are of 64 units.
        num_batches: Of the data.
        num_classes: C, the possible answers.
        device: Where all is.
    """

    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        num_batches: int,
        num_classes: int,
        device: str,
    ) -> None:
        self.device = device
        self.batches = prompts(num_batches, num_classes, device)
        self.choices = CHOICES[num_classes]
        self.network = network(ADAPTED, TARGETS, num_layers, num_heads).to(device)
        self.lora = pl.lift(self.network, prior=pl.priors.normal(scale=1.0))
        self.model = pl.models.multiple_choice(
            self.lora, BATCH * num_batches, self.choices
        )
        self.posteriors = {
            name: self.fit(structure)
            for name, structure in {
                "KFAC": pl.structures.KFAC(),
                "Exact": pl.structures.Exact(),
            }.items()
        }

    def fit(self, structure: Any, **options: Any) -> pl.LaplacePosterior:
        """Laplace's approximation at the adapter."""
        pyro.clear_param_store()
        guide = pl.AutoLaplace(
            self.model,
            init_loc_fn=self.lora.init_to_adapter(),
            structure=structure,
            **options,
        )
        return guide.laplace_approximation(self.batches)

    def plain_pass(self) -> None:
        """The network as PEFT runs it, without gradients."""
        with torch.no_grad():
            for batch in self.batches:
                self.network(**{k: x for k, x in batch.items() if k != "labels"})

    def map_epoch(self) -> None:
        """Steps of plain PyTorch, without a prior."""
        weights = [x for x in self.network.parameters() if x.requires_grad]
        optimizer = torch.optim.Adam(weights, lr=0.0)
        for batch in self.batches:
            inputs = {k: x for k, x in batch.items() if k != "labels"}
            logits = self.network(**inputs).logits[:, -1, list(self.choices)]
            optimizer.zero_grad()
            cross_entropy(logits, batch["labels"]).backward()
            optimizer.step()
        optimizer.zero_grad()

    def svgd_epoch(self) -> None:
        """Steps of five particles, in function space."""
        pyro.clear_param_store()
        svgd = pl.SVGD(
            self.model,
            pl.kernels.RBF(space="function"),
            Adam({"lr": 1e-5}),
            NUM_PARTICLES,
            init_loc_fn=self.lora.init_to_adapter(jitter=0.01),
        )
        svgd.run(self.batches, num_epochs=1, progress_bar=False)

    def predict(self, structure: str, **options: Any) -> Callable[[], Any]:
        """Predictions of all data."""
        posterior = self.posteriors[structure]
        return lambda: pl.predict(posterior, self.batches, **options)

    def all(self) -> dict[str, Callable[[], Any]]:
        """Name -> job; units come first."""
        return {
            "plain pass": self.plain_pass,
            "MAP epoch": self.map_epoch,
            "predict, linearised, KFAC": self.predict("KFAC"),
            "predict, linearised, Exact": self.predict("Exact"),
            f"predict, {NUM_DRAWS} draws": self.predict(
                "KFAC", method="sample", num_samples=NUM_DRAWS
            ),
            "KFAC fit": lambda: self.fit(pl.structures.KFAC()),
            'KFAC fit, fisher="mc"': lambda: self.fit(
                pl.structures.KFAC(), fisher="mc"
            ),
            "Exact fit": lambda: self.fit(pl.structures.Exact()),
            f"SVGD epoch, K={NUM_PARTICLES}": self.svgd_epoch,
        }


def measured(job: Callable[[], Any], device: str) -> tuple[float, int]:
    """Seconds, and bytes at the peak, of one and the same run."""
    seconds = 0.0

    def timed() -> None:
        nonlocal seconds
        start = clock(device)
        job()
        seconds = clock(device) - start

    most = allocated(timed, device)
    return seconds, most


def table(jobs: Jobs, num_classes: int, repeats: int) -> list[str]:
    """Lines of one number of classes."""
    runs: dict[str, list[tuple[float, int]]] = {name: [] for name in jobs.all()}
    for _ in range(repeats):
        for name, job in jobs.all().items():
            runs[name].append(measured(job, jobs.device))
            print(num_classes, name, runs[name], flush=True)
    seconds = {name: statistics.median(s for s, _ in run) for name, run in runs.items()}
    lines = []
    for name, run in runs.items():
        unit, limit = LIMITS.get(name, ("", 0.0))
        lines.append(
            row(
                str(num_classes),
                name,
                f"{seconds[name]:.2f}",
                f"{seconds[name] / seconds['plain pass']:.2f}",
                f"{seconds[name] / seconds['MAP epoch']:.2f}",
                f"{max(most for _, most in run) / 1e6:.0f}",
                f"≤ {limit:g} of a {unit}" if unit else "",
            )
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small, writes nothing")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    num_layers, num_heads, num_batches = NUM_LAYERS, 9, options.rows // BATCH
    if options.quick:
        num_layers, num_heads, num_batches = ADAPTED + 1, 3, 2
    repeats = 1 if options.quick else options.repeats
    rows = []
    for num_classes in CHOICES:
        jobs = Jobs(num_layers, num_heads, num_batches, num_classes, options.device)
        rows += table(jobs, num_classes, repeats)
    lines = [
        "# Prices on a language model",
        "",
        f"A random network of SmolLM2-135M's shape ({num_layers} layers of "
        f"{HEAD * num_heads}, {VOCABULARY:,} tokens), float32, LoRA r=8 on query, "
        f"value and MLP of the last {ADAPTED} layers, {num_batches * BATCH} prompts of "
        f"{LENGTH} tokens in "
        f"batches of {BATCH}, an answer of one token (`models.multiple_choice`). "
        "Nothing is cached between batches; the layers below the adapters run once "
        "for all draws or particles. Seconds of one processor (on a GPU, all of them), "
        f"medians of {repeats} runs, the jobs taking turns, while memory is recorded; "
        "megabytes that a job holds at its peak beyond what was there before. Memory "
        f"is kept by the allocator (`{SETTINGS}`).",
        "",
        provenance(device=options.device),
        "",
        *header("C", "job", "s", "plain passes", "MAP epochs", "MB", "target"),
        *rows,
    ]
    if not options.quick:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "language_model.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
