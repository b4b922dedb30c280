"""Time of a fit, predictions and SVGD on 1, 2 and 3 processes of one thread.

Usage: ``python -m benchmarks.distributed [--device cuda] [--out benchmarks/results]``,
on a machine that does nothing else. The network has MiniLM's shapes and random weights.
On GPUs each process has one, and there are 1, 2, 4, ... of them, as far as there are.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BertConfig

import pyro_lora as pl
from benchmarks.main_job import seconds
from benchmarks.tables import header, provenance

BATCH, LENGTH, PARTICLES, STEPS = 16, 32, 6, 3
SIZES = (1, 2, 3)  # processes on a CPU


def network(hidden: int, num_layers: int) -> Any:
    """An encoder with LoRA on query and value, and a head."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1000,
        hidden_size=hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=12,
        intermediate_size=4 * hidden,
        num_labels=2,
    )
    lora = LoraConfig(
        task_type="SEQ_CLS", r=8, target_modules=["query", "value"], lora_alpha=16
    )
    base = AutoModelForSequenceClassification.from_config(config)
    return get_peft_model(base, lora).eval()


def batches(num_data: int, device: str) -> list[dict[str, Tensor]]:
    """Texts of one length, with labels."""
    ids = torch.randint(1, 1000, (num_data, LENGTH), device=device)
    labels = torch.randint(2, (num_data,), device=device)
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return [
        {name: x[i : i + BATCH] for name, x in whole.items()}
        for i in range(0, num_data, BATCH)
    ]


def timed(times: dict[str, float], name: str, run: Callable[[], Any]) -> Any:
    """What a run gives; its seconds, from when all processes are there."""
    found: list[Any] = []
    if dist.is_initialized():
        dist.barrier()
    times[name] = seconds(lambda: found.append(run()))
    return found[0]


def measure(
    rank: int,
    size: int,
    device: str,
    hidden: int,
    num_layers: int,
    num_data: int,
    folder: Path,
) -> None:
    """The work of one process; the first one writes its times."""
    torch.set_num_threads(1)
    if device != "cpu":
        torch.cuda.set_device(rank)
    if size > 1:
        store = f"file://{folder}/store{size}"
        backend = "gloo" if device == "cpu" else "nccl"
        dist.init_process_group(backend, store, rank=rank, world_size=size)
    torch.manual_seed(0)  # the same texts on all
    data = batches(num_data, device)
    peft_network = network(hidden, num_layers).to(device)
    lora = pl.lift(peft_network, prior=pl.priors.normal(scale=1.0))
    model = pl.models.classification(lora, num_data)
    init = lora.init_to_adapter(jitter=0.01)
    guide = pl.AutoLaplace(model, init_loc_fn=lora.init_to_adapter())
    svgd = pl.SVGD(
        model,
        pl.kernels.RBF(space="function"),
        pyro.optim.Adam({"lr": 1e-4}),
        PARTICLES,
        init_loc_fn=init,
    )
    svgd.step(**data[0])  # what is made once
    own = pl.share(data)
    times: dict[str, float] = {}
    posterior = timed(times, "KFAC", lambda: guide.laplace_approximation(own))
    timed(times, "linearised", lambda: pl.predict(posterior, own))
    timed(times, "draws", lambda: pl.predict(svgd.posterior(), own))
    timed(times, "SVGD", lambda: [svgd.step(**data[0]) for _ in range(STEPS)])
    torch.save(times, folder / f"{size}-{rank}.pt")
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


def numbers(device: str) -> list[int]:
    """How many processes there are, in turn."""
    if device == "cpu":
        return [*SIZES]
    return [2**i for i in range(torch.cuda.device_count().bit_length())]


def table(device: str, hidden: int, num_layers: int, num_data: int) -> list[str]:
    """Seconds of each part by the number of processes, and how many times faster."""
    times, sizes = {}, numbers(device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size in sizes:
            arguments = (size, device, hidden, num_layers, num_data, folder)
            mp.start_processes(measure, arguments, nprocs=size)  # type: ignore[arg-type]
            times[size] = torch.load(folder / f"{size}-0.pt")
    parts = {
        "KFAC": f"fit, KFAC, {num_data} texts",
        "linearised": f"predict, linearised, {num_data} texts",
        "draws": f"predict, {PARTICLES} particles, {num_data} texts",
        "SVGD": f"{STEPS} steps of SVGD, {PARTICLES} particles, function space",
    }
    rows = header("", *(f"{size} process{'es'[: size * 2 - 2]}" for size in sizes))
    for part, words in parts.items():
        one = times[1][part]
        cells = [
            f"{times[n][part]:.2f} s"
            + (f" ({one / times[n][part]:.2f}x)" if n > 1 else "")
            for n in sizes
        ]
        rows.append(f"| {words} | {' | '.join(cells)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--data", type=int, default=288)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# Several processes of one thread",
        "",
        f"`python -m benchmarks.distributed`: BERT of {options.layers} layers of "
        f"{options.hidden}, LoRA of rank 8 on query and value, batches of {BATCH} "
        f"texts of {LENGTH} tokens. {provenance(device=options.device)}",
        "",
        *table(options.device, options.hidden, options.layers, options.data),
    ]
    print(text := "\n".join(lines))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "distributed.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
