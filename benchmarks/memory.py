"""Planned memory beside measured memory, of networks with random weights.

What is measured is what PyTorch's allocator has handed out at a time, at most. Usage:
``python -m benchmarks.memory [--device cuda] [--out benchmarks/results]``; with
``--large`` it plans what ``docs/large.md`` shows instead, and prints its table.
"""

import argparse
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from pyro.optim import Adam
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
)

import pyro_lora as pl
from benchmarks.devices import allocated
from benchmarks.tables import header, provenance, row

MB, GB = 1e6, 1e9
JITTER = 0.01  # particles apart, and gradients that aren't zero
HEADS: dict[str, Any] = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "CAUSAL_LM": AutoModelForCausalLM,
}

MINILM = BertConfig(
    vocab_size=30522,
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=12,
    intermediate_size=1536,
    num_labels=3,
)
SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    intermediate_size=1536,
    tie_word_embeddings=True,
)
SMALL = LlamaConfig(
    vocab_size=1000,
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=1024,
    pad_token_id=0,
    num_labels=4,
)
QWEN3 = Qwen3Config(
    vocab_size=151936,
    hidden_size=1024,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=3072,
    tie_word_embeddings=True,
)
LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    intermediate_size=14336,
)
LLAMA_70B = LlamaConfig(
    vocab_size=128256,
    hidden_size=8192,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    intermediate_size=28672,
)
BATCH = (4, 512)
_SHARED: dict[str, Any] = {"world_size": 8, "shard_base": True}
# Name, configuration, what differs from one GPU and four texts.
LARGE: list[tuple[str, PretrainedConfig, dict[str, Any]]] = [
    ("Qwen3-0.6B", QWEN3, {}),
    ("Qwen3-0.6B", QWEN3, {"world_size": 8}),
    ("Llama-3.1-8B", LLAMA_8B, {}),
    ("Llama-3.1-8B", LLAMA_8B, {"world_size": 8}),
    ("Llama-3.1-70B", LLAMA_70B, {}),
    ("Llama-3.1-70B", LLAMA_70B, _SHARED),
    *(
        ("Llama-3.1-70B", LLAMA_70B, {**_SHARED, "batch": size, "max_memory_gb": 4.0})
        for size in ((1, 512), (1, 384))
    ),
]


def adapter(task: str, targets: str | list[str] = "all-linear") -> LoraConfig:
    """LoRA of rank 8."""
    return LoraConfig(task_type=task, r=8, target_modules=targets)


# Name, configuration, adapter, structure, batch, particles.
QUERIES = adapter("SEQ_CLS", ["query", "value"])
SHAPES: list[tuple[str, PretrainedConfig, LoraConfig, Any, tuple[int, int], int]] = [
    ("MiniLM, query and value", MINILM, QUERIES, pl.structures.KFAC(), (16, 32), 4),
    ("the same, longer", MINILM, QUERIES, pl.structures.EKFAC(), (4, 256), 2),
    (
        "Llama of 4 layers, 256 wide, all linear",
        SMALL,
        adapter("SEQ_CLS"),
        pl.structures.KFAC(),
        (8, 128),
        4,
    ),
    ("the same", SMALL, adapter("SEQ_CLS"), pl.structures.Diagonal(), (32, 16), 8),
    (
        "the same, as a language model",
        SMALL,
        adapter("CAUSAL_LM"),
        pl.structures.KFAC(reduce=True),
        (8, 64),
        3,
    ),
    (
        "SmolLM2-135M, all linear",
        SMOLLM2,
        adapter("CAUSAL_LM"),
        pl.structures.KFAC(rank=64),
        (2, 64),
        2,
    ),
]


def texts(config: Any, size: tuple[int, int], task: str) -> dict[str, Tensor]:
    """A batch with some padding."""
    ids = torch.randint(1, config.vocab_size, size)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    labels = ids if task == "CAUSAL_LM" else torch.zeros(len(ids), dtype=torch.long)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def measured(
    config: Any,
    lora_config: LoraConfig,
    structure: Any,
    size: tuple[int, int],
    num_particles: int,
    device: str,
) -> Iterator[tuple[str, int]]:
    """Phase -> bytes, beside the network's and the posterior's own."""
    torch.manual_seed(0)
    task = str(lora_config.task_type)
    of_tokens = task == "CAUSAL_LM"
    base = HEADS[task].from_config(config)
    lora = pl.lift(get_peft_model(base, lora_config).to(device))
    make = pl.models.language_model if of_tokens else pl.models.classification
    model = make(lora, 2 * size[0])
    first, second = (
        {name: x.to(device) for name, x in texts(config, size, task).items()}
        for _ in range(2)
    )
    without = {k: x for k, x in first.items() if k != "labels"}
    kernels: dict[str, tuple[Any, int]] = {
        "MAP step": (pl.kernels.NoRepulsion(), 1),
        "SVGD step": (pl.kernels.RBF(), num_particles),
    }

    def init() -> Any:  # a copy of the adapter, which counts
        return lora.init_to_adapter(jitter=JITTER)

    def step(kernel: Any, number: int) -> None:
        adam = Adam({"lr": 1e-3})
        svgd = pl.SVGD(model, kernel, adam, number, init_loc_fn=init())
        for _ in range(2):
            svgd.step(**first)

    for name, of_phase in kernels.items():
        yield name, allocated(partial(step, *of_phase), device)
    fisher: Any = "mc" if of_tokens else "exact"
    found: list[Any] = []

    def fit() -> None:
        guide = pl.AutoLaplace(
            model, init_loc_fn=init(), structure=structure, fisher=fisher
        )
        found.append(guide.laplace_approximation([first, second]))

    yield "Laplace fit", allocated(fit, device)
    tokens: Any = "last" if of_tokens else None
    methods = {"predict linearized": "linearized", "predict by draws": "sample"}
    for name, method in methods.items():
        if method == "sample" or not of_tokens:
            kwargs: Any = {"method": method, "tokens": tokens}
            yield (
                name,
                allocated(
                    lambda k=kwargs: pl.predict(found[0], [without], **k), device
                ),
            )


def rows(device: str) -> Iterator[str]:
    """The table's rows."""
    for name, config, lora_config, structure, size, number in SHAPES:
        plan = pl.plan_memory(
            config,
            peft_config=lora_config,
            structure=structure,
            num_particles=number,
            batch=size,
        )
        shape = f"{name}, {size[0]} x {size[1]}, K={number}, {structure!r}"
        found = measured(config, lora_config, structure, size, number, device)
        for phase_name, peak in found:
            phase = plan[phase_name]
            planned = phase.peak
            if phase_name == "Laplace fit":
                planned = max(planned, plan["Laplace finish"].peak)
            whole = peak + phase.weights + phase.posterior
            yield row(
                shape,
                phase_name,
                f"{planned / MB:,.1f}",
                f"{whole / MB:,.1f}",
                f"{planned / whole - 1:+.1%}",
            )
            print(shape, phase_name, planned, whole, flush=True)
            shape = ""


def large() -> Iterator[str]:
    """The rows of the table in ``docs/large.md``."""
    for name, config, settings in LARGE:
        plan = pl.plan_memory(
            config,
            peft_config=adapter("CAUSAL_LM"),
            structure=pl.structures.KFAC(rank=64),
            num_particles=4,
            dtype=torch.bfloat16,
            **{"batch": BATCH, **settings},
        )
        phases = ("MAP step", "SVGD step", "Laplace fit", "Laplace finish")
        sizes = [plan[phase].peak / GB for phase in (*phases, "predict by draws")]
        marks = [f"{x:.1f}" if x <= 80 else f"{x:.1f}, too large" for x in sizes]
        said = ", ".join(f"{k}={x}" for k, x in settings.items())
        yield row(name, said, f"{plan.phases[0].weights / GB:.1f}", *marks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # the weights aren't a mode
    torch.set_num_threads(1)
    if args.large:
        for line in large():
            print(line, flush=True)
        return
    lines = [
        "# Planned and measured memory",
        "",
        "`python -m benchmarks.memory`: what `pl.plan_memory` says, and what the",
        "allocator of PyTorch has handed out at most, in MB, with the network. Texts",
        "of some tokens, one of them padded; LoRA of rank 8; random weights, float32.",
        "Of a fit it is the larger one of its passes and its end. Two steps, and two",
        "batches of a fit, so that the first one's looking at the network is in it.",
        "The network and the posterior, which were there before, count as planned.",
        "",
        provenance(device=args.device),
        "",
        *header("shape", "phase", "planned", "measured", "difference"),
        *rows(args.device),
        "",
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "memory.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
