"""Blocks of Llama-8B at full width, as many as fit: time in forward passes, and memory.

Usage: ``python -m benchmarks.wide [--gb 20] [--blocks N] [--device cuda]
[--out benchmarks/results]``, alone on a machine with that much memory. Weights are
random: times and sizes are those of the real network, and nothing else is. What 32
blocks take is extrapolated from the two depths that are run.
"""

import argparse
import gc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from pyro.optim import Adam
from torch import Tensor
from transformers import AutoModelForSequenceClassification, LlamaConfig

import pyro_lora as pl
from benchmarks.devices import allocated
from benchmarks.main_job import seconds
from benchmarks.memory import GB, JITTER, adapter
from benchmarks.tables import header, provenance, row

WHOLE, LEAST = 32, 2  # blocks of Llama-8B, and of the shallower run
LENGTH, PARTICLES, RANK = 512, 4, 64
STRUCTURE = pl.structures.KFAC(rank=RANK)
FORWARD = "forward pass"
Found = dict[str, tuple[float, float]]  # phase -> seconds, GB


def config(num_blocks: int) -> LlamaConfig:
    """Llama-3.1-8B but for its depth, its vocabulary and a head of two classes."""
    return LlamaConfig(
        vocab_size=1000,
        hidden_size=4096,
        num_hidden_layers=num_blocks,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        num_labels=2,
        pad_token_id=0,
    )


def peaks(num_blocks: int) -> dict[str, float]:
    """Phase -> GB as planned, the end of a fit with its passes."""
    plan = pl.plan_memory(
        config(num_blocks),
        peft_config=adapter("SEQ_CLS"),
        structure=STRUCTURE,
        num_particles=PARTICLES,
        batch=(1, LENGTH),
        dtype=torch.bfloat16,
    )
    found = {phase.name: phase.peak / GB for phase in plan.phases}
    end = found.pop("Laplace finish")
    return found | {"Laplace fit": max(found["Laplace fit"], end)}


def memory_of(device: str) -> float:
    """GB to be used."""
    return 20.0 if device == "cpu" else 0.9 * torch.cuda.mem_get_info(device)[1] / GB


def that_fit(gb: float) -> int:
    """The most blocks of which every phase fits; each takes as much as another."""
    few, twice = (max(peaks(n).values()) for n in (LEAST, 2 * LEAST))
    return min(LEAST + int((gb - few) / (twice - few) * LEAST), WHOLE)


def text(device: str) -> dict[str, Tensor]:
    """One text with some padding, and its class."""
    ids = torch.randint(1, 1000, (1, LENGTH), device=device)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    labels = torch.zeros_like(ids[0, :1])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def timed(run: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds of a second run, and GB that weren't there before it."""
    run()
    took: list[float] = []
    memory = allocated(lambda: took.append(seconds(run)), device)
    return took[0], memory / GB


def measured(num_blocks: int, device: str) -> Iterator[tuple[str, tuple[float, float]]]:
    """Phase -> seconds of one batch, and GB with the network."""
    torch.manual_seed(0)
    with torch.device(device):
        network = AutoModelForSequenceClassification.from_config(
            config(num_blocks), dtype=torch.bfloat16
        )
    lora = pl.lift(get_peft_model(network, adapter("SEQ_CLS")).eval())
    weights = sum(x.nbytes for x in lora.network.parameters()) / GB
    model = pl.models.classification(lora, 2)
    first, second = text(device), text(device)
    without = {k: x for k, x in first.items() if k != "labels"}

    def of(run: Callable[[], object]) -> tuple[float, float]:
        took, memory = timed(run, device)
        return took, memory + weights

    def forward() -> None:
        with torch.no_grad():
            lora.network(**without)

    yield FORWARD, of(forward)
    init = lora.init_to_adapter(jitter=JITTER)
    kernels: dict[str, tuple[Any, int]] = {
        "MAP step": (pl.kernels.NoRepulsion(), 1),
        "SVGD step": (pl.kernels.RBF(), PARTICLES),
    }
    for name, (kernel, number) in kernels.items():
        svgd = pl.SVGD(model, kernel, Adam({"lr": 1e-4}), number, init_loc_fn=init)
        yield name, of(lambda s=svgd: s.step(**first))  # type: ignore[misc]
        del svgd
    guide = pl.AutoLaplace(model, init_loc_fn=init, structure=STRUCTURE)
    found: list[Any] = []

    def fit() -> None:
        found[:] = [guide.laplace_approximation([first, second])]

    of_two, memory = of(fit)
    yield "Laplace fit", (of_two / 2, memory)
    yield "predict linearized", of(lambda: pl.predict(found[0], [without]))


def rows(shallow: Found, deep: Found, num_blocks: int) -> Iterator[str]:
    """The table's rows."""
    plans = {n: peaks(n) for n in (num_blocks, WHOLE)}

    def whole(name: str, which: int) -> float:
        few, many = shallow[name][which], deep[name][which]
        return many + (many - few) / (num_blocks - LEAST) * (WHOLE - num_blocks)

    for name, (took, memory) in deep.items():
        plan = [plans[n].get(name) for n in plans]
        of_plan = [f"{x:.1f}" if x else "" for x in plan]
        yield row(
            name,
            f"{took:.1f}",
            f"{took / deep[FORWARD][0]:.2f}",
            f"{memory:.1f}",
            of_plan[0],
            f"{whole(name, 0):.1f}",
            f"{whole(name, 0) / whole(FORWARD, 0):.2f}",
            f"{whole(name, 1):.1f}",
            of_plan[1],
        )


def report(num_blocks: int, device: str) -> list[str]:
    """The page."""
    found: dict[int, Found] = {}
    for number in (LEAST, num_blocks):
        found[number] = {}
        for name, values in measured(number, device):
            found[number][name] = values
            print(number, name, *values, flush=True)
        gc.collect()
    return [
        "# Llama-8B's shapes",
        "",
        f"`python -m benchmarks.wide`: {num_blocks} blocks of Llama-3.1-8B at full "
        "width, bfloat16, frozen, with random weights, a vocabulary of 1,000 and a "
        "head of two classes; LoRA of rank 8 on all projections; a text of "
        f"{LENGTH} tokens a batch; `KFAC(rank={RANK})`; {PARTICLES} particles. Seconds "
        "a batch, of a fit with its end shared by two; memory is what PyTorch's "
        "allocator has handed out at most, with the network. Of "
        f"{WHOLE} blocks time and memory are extrapolated from those of {LEAST} and "
        f"{num_blocks}.",
        "",
        provenance(device=device),
        "",
        *header(
            "",
            "seconds",
            "forward passes",
            "GB",
            "GB planned",
            f"{WHOLE} blocks: seconds",
            "forward passes",
            "GB",
            "GB planned",
        ),
        *rows(found[LEAST], found[num_blocks], num_blocks),
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, help="20, or most of a GPU's")
    parser.add_argument("--blocks", type=int, help="in place of as many as fit")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # the weights aren't a mode
    gb = args.gb or memory_of(args.device)
    lines = report(args.blocks or that_fit(gb), args.device)
    print("\n".join(lines))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "wide.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
