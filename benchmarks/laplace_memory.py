"""Memory of a KFAC fit at the shapes of a 7B model: one layer is run, and multiplied.

Usage: ``python -m benchmarks.laplace_memory [--hidden 4096] [--layers 32]``, on Linux;
:mod:`benchmarks.laplace` runs it as a process of its own.
"""

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, LlamaConfig

import pyro_lora as pl
from benchmarks.tables import header

LORA_RANK, RANK = 8, 64
MAX_GB = {"kfac_expand": 8.6, f"kfac_expand, rank={RANK}": 0.3}  # the targets
BATCH, LENGTH = 4, 16


def resident(field: str) -> int:
    """Bytes of memory in use: VmRSS now, or VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{field}:")]
    return 1024 * int(line.split()[1])


def layer(hidden: int) -> tuple[pl.LiftedNetwork, dict[str, Tensor]]:
    """One layer with LoRA on query and value, and a batch."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=hidden // 4,
        num_hidden_layers=1,
        num_attention_heads=hidden // 128,
        num_labels=2,
        pad_token_id=0,
    )
    targets = ["q_proj", "v_proj"]
    lora = LoraConfig(r=LORA_RANK, target_modules=targets, init_lora_weights=False)
    base = AutoModelForSequenceClassification.from_config(config)
    ids = torch.randint(1, 64, (BATCH, LENGTH))
    texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = torch.randint(2, (BATCH,))
    return pl.lift(get_peft_model(base, lora).eval()), {**texts, "labels": labels}


def kept(posterior: pl.LaplacePosterior) -> int:
    """Bytes of the eigenvectors and eigenvalues, each tensor once."""
    blocks: Any = vars(posterior.gaussian)["blocks"]
    tensors = {
        x.data_ptr(): x
        for block in blocks.values()
        for x in (block.values, block.rows, block.columns)
    }
    return sum(x.nbytes for x in tensors.values())


def measure(hidden: int, num_layers: int) -> list[str]:
    """The table's rows."""
    lora, texts = layer(hidden)
    model = pl.models.classification(lora, BATCH)
    # A fit with little memory of its own first, so that the network's is in the base.
    structures: dict[str, Any] = {
        "": pl.structures.Diagonal(),
        f"kfac_expand, rank={RANK}": pl.structures.KFAC(rank=RANK),
        "kfac_expand": pl.structures.KFAC(),
    }
    rows = []
    for name, structure in structures.items():
        sums: list[int] = []

        def counted(
            a: Tensor, g: Tensor, structure: Any = structure, sums: Any = sums
        ) -> Any:
            factors = structure(a, g)
            sums.append(sum(x.nbytes for x in vars(factors).values()))
            return factors

        guide = pl.AutoLaplace(
            model, init_loc_fn=lora.init_to_adapter(), structure=counted
        )
        base = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back
        posterior = guide.laplace_approximation([texts])
        peak = resident("VmHWM") - base
        if name:
            cells = [
                name,
                f"{sum(sums) / 1e6:.1f} MB",
                f"{num_layers * sum(sums) / 1e9:.3f} GB",
                f"≤ {MAX_GB[name]} GB" if hidden == 4096 else "",
                f"{num_layers * kept(posterior) / 1e9:.3f} GB",
                f"{peak / 1e6:.0f} MB",
            ]
            rows.append(f"| {' | '.join(cells)} |")
        del posterior
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=32)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # the weights aren't a mode
    print(
        *header(
            "structure",
            "factors of a layer",
            f"of {args.layers} layers",
            "target",
            f"eigenvectors and eigenvalues of {args.layers} layers",
            "most memory that the fit of one layer takes",
        ),
        sep="\n",
    )
    print("\n".join(measure(args.hidden, args.layers)))


if __name__ == "__main__":
    main()
