"""What a GPU would see: how often a program waits for it, and what it launches.

Usage: ``python -m benchmarks.gpu_ready [--out benchmarks/results]``, on any machine: it
counts, and nothing is timed. Networks and texts are random; no download. Half a minute.
"""

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from peft import LoraConfig, get_peft_model
from pyro.optim import SGD
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BertConfig

import pyro_lora as pl
from benchmarks.synchronisations import Counts, counted
from benchmarks.tables import header, provenance

BATCH, LENGTH = 8, 12
QUERY_VALUE = ("query", "value")
ALL = ("query", "key", "value", "dense")
# The same counts at 8d400d5, where each check was read by itself, by network.
BEFORE = {
    "SVGD step, joint": (43, 43, 93),
    "SVGD step, function": (48, 48, 98),
    "KFAC fit, a batch": (81, 165, 200),
    "EKFAC fit, a batch of both passes": (124, 224, 297),
    "Diagonal fit, a batch": (45, 65, 102),
    "predict linearized, a batch": (33, 33, 59),
    "predict by 4 draws, a batch": (36, 36, 76),
}


def lifted(num_layers: int, targets: tuple[str, ...]) -> pl.LiftedNetwork:
    """A small BERT with LoRA."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=2,
        pad_token_id=0,
    )
    base = AutoModelForSequenceClassification.from_config(config)
    lora = LoraConfig(
        r=4, target_modules=list(targets), init_lora_weights=False, task_type="SEQ_CLS"
    )
    return pl.lift(get_peft_model(base, lora).eval())


def texts(num_batches: int) -> list[dict[str, Tensor]]:
    """Random texts, padded."""
    batches = []
    for _ in range(num_batches):
        ids = torch.randint(1, 50, (BATCH, LENGTH))
        mask = torch.arange(LENGTH) < LENGTH - torch.arange(BATCH)[:, None] % 5
        labels = torch.randint(2, (BATCH,))
        batches.append(
            {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": labels}
        )
    return batches


def of_step(lora: pl.LiftedNetwork, kernel: Any, num_particles: int) -> Counts:
    """Of one SVGD step, by plain gradient descent."""
    svgd = pl.SVGD(
        pl.models.classification(lora, 100),
        kernel,
        SGD({"lr": 1e-4}),
        num_particles,
        init_loc_fn=lora.init_to_adapter(jitter=0.1),
    )
    first, second = texts(2)
    svgd.step(**first)
    with counted() as counts:
        svgd.step(**second)
    return counts


def of_batch(function: Callable[[list[dict[str, Tensor]]], object]) -> Counts:
    """Of a pass over the data, a batch: what two more of them add, by two."""
    function(texts(1))
    passes = []
    for num_batches in (2, 4):
        with counted() as counts:
            function(texts(num_batches))
        passes.append(counts)
    two, four = passes
    waits = {k: (n - two.waits[k]) // 2 for k, n in four.waits.items()}
    return Counts(
        (four.operations - two.operations) // 2,
        waits=type(four.waits)({k: n for k, n in waits.items() if n}),
    )


def fit(
    lora: pl.LiftedNetwork, structure: Any, batches: list[dict[str, Tensor]]
) -> pl.LaplacePosterior:
    """Laplace's approximation, of however many data there are."""
    model = pl.models.classification(lora, BATCH * len(batches))
    guide = pl.AutoLaplace(
        model, init_loc_fn=lora.init_to_adapter(), structure=structure
    )
    return guide.laplace_approximation(batches)


def jobs(lora: pl.LiftedNetwork) -> dict[str, Callable[[], Counts]]:
    """What is counted."""
    posterior = fit(lora, pl.structures.KFAC(), texts(1))
    structures = pl.structures

    def predicted(batches: list[dict[str, Tensor]], **settings: Any) -> None:
        pl.predict(posterior, batches, **settings)

    return {
        "SVGD step, joint": lambda: of_step(lora, pl.kernels.RBF(), 3),
        "SVGD step, function": lambda: of_step(
            lora, pl.kernels.RBF(space="function"), 3
        ),
        "KFAC fit, a batch": lambda: of_batch(
            lambda batches: fit(lora, structures.KFAC(), batches)
        ),
        "EKFAC fit, a batch of both passes": lambda: of_batch(
            lambda batches: fit(lora, structures.EKFAC(), batches)
        ),
        "Diagonal fit, a batch": lambda: of_batch(
            lambda batches: fit(lora, structures.Diagonal(), batches)
        ),
        "predict linearized, a batch": lambda: of_batch(predicted),
        "predict by 4 draws, a batch": lambda: of_batch(
            lambda batches: predicted(batches, method="sample", num_samples=4)
        ),
    }


def waits() -> list[str]:
    """How often each job waits, by network."""
    networks = {
        "2 layers, 6 sites": lifted(2, QUERY_VALUE),
        "6 layers, 6 sites": lifted(6, QUERY_VALUE),
        "2 layers, many sites": lifted(2, ALL),
    }
    columns = [jobs(lora) for lora in networks.values()]
    rows = header("job, before and now", *networks)
    for name in columns[0]:
        cells = [
            f"{before} → {of_network[name]().num_waits}"
            for before, of_network in zip(BEFORE[name], columns, strict=True)
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def launches() -> list[str]:
    """Operations as particles, layers and sites grow."""
    rows = header("SVGD step", "K=2", "K=4", "K=8")
    for name, lora in {
        "2 layers, query and value": lifted(2, QUERY_VALUE),
        "4 layers, query and value": lifted(4, QUERY_VALUE),
        "2 layers, every linear layer": lifted(2, ALL),
    }.items():
        for space in ("joint", "function"):
            kernel = pl.kernels.RBF(space=space)  # type: ignore[arg-type]
            cells = [str(of_step(lora, kernel, k).operations) for k in (2, 4, 8)]
            title = f"{name}, {len(lora.sites)} sites, {space}"
            rows.append(f"| {title} | {' | '.join(cells)} |")
    rows += ["", *header("predict by draws, a batch", "S=2", "S=4", "S=8")]
    lora = lifted(2, QUERY_VALUE)
    posterior = fit(lora, pl.structures.KFAC(), texts(1))
    cells = [
        str(
            of_batch(
                lambda batches, s=s: pl.predict(  # type: ignore[misc]
                    posterior, batches, method="sample", num_samples=s
                )
            ).operations
        )
        for s in (2, 4, 8)
    ]
    return [*rows, f"| 2 layers, query and value | {' | '.join(cells)} |"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # the weights aren't a mode
    torch.set_num_threads(1)
    pyro.enable_validation(True)
    lines = [
        "# What a GPU would see",
        "",
        "Counted on the CPU, where nothing waits: operations that would wait for a GPU "
        "(values that are read, shapes that depend on values), but for those in the "
        "network's own code; and all operations that are dispatched, each a launch or "
        "none. Pyro validates. Two classes; with more, `predict linearized` has one "
        "eigendecomposition a batch, which waits, too. `structures.Exact()` waits "
        "four times.",
        "",
        provenance(),
        "",
        "How often a job waits:",
        "",
        *waits(),
        "",
        "Operations, which grow with sites and layers, and not with particles or draws "
        "of one forward pass. At 8d400d5 there were as many, within 5 %:",
        "",
        *launches(),
        "",
    ]
    print("\n".join(lines))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu_ready.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
