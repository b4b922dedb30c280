"""The price of eight draws of a prompt, in units of one draw's.

Usage: ``python -m benchmarks.generate [--quick] [--repeats 3] [--device cuda]
[--out benchmarks/results]``. The network has SmolLM2-135M's shape and random weights;
no download.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Cache, LlamaConfig, LlamaForCausalLM

import pyro_lora as pl
from benchmarks.allocator import SETTINGS, keep_freed_memory
from benchmarks.devices import clock
from benchmarks.tables import header, provenance, row
from pyro_lora.predict.generate import Mode

NUM_DRAWS, TARGET = 8, 2.0
NUM_LAYERS, HEAD, VOCABULARY, PROMPT = 30, 64, 49152, 512
FIRST_TOKEN = 3  # those before it are special


@dataclass(frozen=True, kw_only=True)
class Job:
    """Texts to be written.

    Attributes:
        mode: Of ``pl.generate``.
        adapted: How many of the last layers have adapters.
        new_tokens: Of each text.
    """

    mode: Mode
    adapted: int
    new_tokens: int


JOBS = [
    Job(mode="average", adapted=4, new_tokens=8),
    Job(mode="average", adapted=4, new_tokens=32),
    Job(mode="draws", adapted=4, new_tokens=8),
    Job(mode="average", adapted=NUM_LAYERS, new_tokens=8),
]


def network(
    adapted: int,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    num_layers: int = NUM_LAYERS,
    num_heads: int = 9,
) -> PeftModel:
    """The network with LoRA r=8 on parts of the last layers; or a smaller one."""
    torch.manual_seed(0)
    width = HEAD * num_heads
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads // 3,
        intermediate_size=width * 8 // 3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    adapter = LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        target_modules=list(targets),
        layers_to_transform=list(range(num_layers - adapted, num_layers)),
    )
    return get_peft_model(LlamaForCausalLM(config), adapter).eval()


def num_bytes(cache: Any) -> int:
    """Of all keys and values that a cache holds, those inside its layers included."""
    held = {}
    waiting = list(cache.layers)
    while waiting:
        layer = waiting.pop()
        for value in vars(layer).values():
            if isinstance(value, torch.Tensor):
                held[value.data_ptr()] = value.numel() * value.element_size()
            elif hasattr(value, "get_seq_length"):
                waiting.append(value)
    return sum(held.values())


def measure(job: Job, repeats: int, device: str) -> dict[int, tuple[float, int]]:
    """Draws -> median seconds, and bytes of the cache at its end."""
    lora = pl.lift(network(job.adapted).to(device))
    prompt = torch.randint(FIRST_TOKEN, VOCABULARY, (1, PROMPT), device=device)
    sizes = []

    def see(_: Any, args: Any, output: Any) -> None:
        sizes.extend(num_bytes(x) for x in output.values() if isinstance(x, Cache))

    handle = lora.network.get_base_model().register_forward_hook(see)  # type: ignore[operator]

    def run(num_draws: int) -> Callable[[], Any]:
        weights = {
            site: value + 0.02 * torch.randn(num_draws, *value.shape, device=device)
            for site, value in lora.weights().items()
        }
        posterior = pl.ParticlePosterior(weights, (lora,), None, None)
        return lambda: pl.generate(
            posterior,
            prompt,
            max_new_tokens=job.new_tokens,
            mode=job.mode,
            progress_bar=False,
        )

    jobs = {num_draws: run(num_draws) for num_draws in (1, NUM_DRAWS)}
    times: dict[int, list[float]] = {num_draws: [] for num_draws in jobs}
    held = {}
    for repeat in range(repeats + 1):
        for num_draws, write in jobs.items():
            sizes.clear()
            start = clock(device)
            write()
            if repeat > 0:  # the first one warms up
                times[num_draws].append(clock(device) - start)
            held[num_draws] = max(sizes)
    handle.remove()
    return {s: (statistics.median(times[s]), held[s]) for s in jobs}


def table(jobs: list[Job], repeats: int, device: str) -> list[str]:
    """The table's lines."""
    lines = header(
        "answer",
        "adapted layers",
        "new tokens",
        "one draw, s",
        f"{NUM_DRAWS} draws, s",
        "ratio",
        "cache of one, MB",
        f"of {NUM_DRAWS}, MB",
        "ratio",
    )
    for job in jobs:
        measured = measure(job, repeats, device)
        (one, held), (several, held_by_several) = measured[1], measured[NUM_DRAWS]
        lines.append(
            row(
                f'`"{job.mode}"`',
                f"{job.adapted} of {NUM_LAYERS}",
                str(job.new_tokens),
                f"{one:.2f}",
                f"{several:.2f}",
                f"{several / one:.2f}",
                f"{held / 1e6:.1f}",
                f"{held_by_several / 1e6:.1f}",
                f"{held_by_several / held:.2f}",
            )
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one row, one repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    jobs = JOBS[:1] if options.quick else JOBS
    lines = [
        "# Eight draws of a prompt",
        "",
        f"`pl.generate` on a random network of SmolLM2-135M's shape ({NUM_LAYERS} "
        f"layers of 576, {VOCABULARY:,} tokens), float32, LoRA r=8 on query and value "
        f"of the last layers, one prompt of {PROMPT} tokens. Seconds of one processor "
        f"(on a GPU, all of them), "
        f"medians of {1 if options.quick else options.repeats}, one draw and "
        f"{NUM_DRAWS} taking turns; bytes of the key-value cache at the end. "
        "The texts' scores are part of it: of each text under each draw. "
        f"Memory is kept by the allocator (`{SETTINGS}`).",
        "",
        provenance(device=options.device),
        "",
        *table(jobs, 1 if options.quick else options.repeats, options.device),
        "",
        f"Target for an average with adapters on 4 of {NUM_LAYERS} layers: {TARGET:g} "
        "in time and in cache. With adapters on every layer there is nothing to share. "
        f'`"draws"` scores {NUM_DRAWS} texts under {NUM_DRAWS} draws.',
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "generate.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
