"""Cost of lifting, against the plain PEFT model on the same work.

Usage: ``python -m benchmarks.lifting [--quick] [--repeats 9] [--device cuda]
[--out benchmarks/results]``, on a quiet machine. Networks and texts are random; no
download.
"""

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from pyro.optim import Adam
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BertConfig

import pyro_lora as pl
from benchmarks.allocator import SETTINGS, keep_freed_memory
from benchmarks.devices import allocated
from benchmarks.main_job import alternating_medians
from benchmarks.tables import header, provenance
from pyro_lora.ground.weights import Weights

MAX_ONE, MAX_FOLDED, MAX_STEP, MAX_MEMORY = 1.03, 1.0, 1.1, 1.0  # the targets
HELPS = 0.95  # a smaller saving is within the noise of a table like this
VOCABULARY = 1000
Texts = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Size:
    """A network, a BERT with LoRA r=8 on query and value of every layer, and a batch.

    Adapters on all layers leave no trunk that particles could share.
    """

    layers: int
    hidden: int
    batch: int
    length: int

    def network(self, device: str) -> PeftModel:
        """The network, the same at each call."""
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 32,
            intermediate_size=4 * self.hidden,
            num_labels=2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        base = AutoModelForSequenceClassification.from_config(config)
        lora = LoraConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS")
        return get_peft_model(base.to(device), lora)

    def texts(self, device: str, copies: int = 1) -> Texts:
        """The batch, several times over."""
        shape = (self.batch * copies, self.length)
        ids = torch.randint(1, VOCABULARY, shape, device=device)
        labels = torch.randint(2, shape[:1], device=device)
        mask = torch.ones_like(ids)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def __str__(self) -> str:
        return (
            f"{self.layers} layers of {self.hidden}, batch {self.batch}, "
            f"length {self.length}"
        )


def leaves(lora: pl.LiftedNetwork, *lead: int) -> Weights:
    """The adapter's weights, once for each particle, ready for gradients."""
    return {
        site: value.expand(*lead, *value.shape).clone().requires_grad_()
        for site, value in lora.weights().items()
    }


def log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed over particles and data; logits are (..., B, C)."""
    log_probs = logits.log_softmax(-1)
    index = labels[:, None].expand(*logits.shape[:-1], 1)
    return log_probs.gather(-1, index).sum()


def forward(network: Any, texts: Texts) -> Tensor:
    """The log likelihood, by a network that is plain or bound."""
    inputs = {k: v for k, v in texts.items() if k != "labels"}
    return log_likelihood(network(**inputs).logits, texts["labels"])


def plain_pass(network: PeftModel, texts: Texts) -> Callable[[], None]:
    """Forward and backward of the plain network."""
    trained = [p for p in network.parameters() if p.requires_grad]

    def run() -> None:
        torch.autograd.grad(forward(network, texts), trained)

    return run


def lifted_pass(
    lora: pl.LiftedNetwork, texts: Texts, weights: Weights
) -> Callable[[], None]:
    """Forward and backward of the lifted network, all particles at once."""

    def run() -> None:
        with lora.bind(weights) as net:
            torch.autograd.grad(forward(net, texts), list(weights.values()))

    return run


def one_particle(size: Size, repeats: int, device: str) -> list[str]:
    """A row: one set of weights in the lifted network, and the plain network."""
    texts, lora = size.texts(device), pl.lift(size.network(device))
    times = alternating_medians(
        {
            "plain": plain_pass(size.network(device), texts),
            "lifted": lifted_pass(lora, texts, leaves(lora)),
        },
        repeats,
    )
    return [
        f"| {size} | {1e3 * times['plain']:.1f} | {1e3 * times['lifted']:.1f} | "
        f"{times['lifted'] / times['plain']:.3f} | {MAX_ONE} |"
    ]


def one_after_another(single: Callable[[], None], count: int) -> Callable[[], None]:
    """The same pass, several times."""

    def run() -> None:
        for _ in range(count):
            single()

    return run


def folded(size: Size, counts: list[int], repeats: int, device: str) -> list[float]:
    """Time of S folded particles over that of S passes of one, for each S.

    The last ratio is that of the plain network: a batch S times as large over S passes,
    for the largest S. What it costs isn't lifting's.
    """
    texts, lora = size.texts(device), pl.lift(size.network(device))
    alone = lifted_pass(lora, texts, leaves(lora))
    ratios = []
    for count in counts:
        jobs = {
            "folded": lifted_pass(lora, texts, leaves(lora, count)),
            "alone": one_after_another(alone, count),
        }
        times = alternating_medians(jobs, repeats)
        ratios.append(times["folded"] / times["alone"])
    network, count = size.network(device), counts[-1]
    jobs = {
        "large": plain_pass(network, size.texts(device, copies=count)),
        "alone": one_after_another(plain_pass(network, texts), count),
    }
    times = alternating_medians(jobs, repeats)
    return [*ratios, times["large"] / times["alone"]]


def folded_table(
    grid: dict[str, list[int]], counts: list[int], repeats: int, device: str
) -> list[str]:
    """How folding compares, over batch, length and hidden size."""
    most = counts[-1]
    lines = header(
        *("hidden", "batch", "length", "tokens"),
        *(f"S={count}" for count in counts),
        f"plain, batch x{most}",
    )
    helps = dict.fromkeys(grid["hidden"], 0)
    for hidden, batch, length in itertools.product(*grid.values()):
        size = Size(layers=2, hidden=hidden, batch=batch, length=length)
        ratios = folded(size, counts, repeats, device)
        cells = [hidden, batch, length, batch * length]
        texts = [str(cell) for cell in cells] + [f"{ratio:.2f}" for ratio in ratios]
        lines.append(f"| {' | '.join(texts)} |")
        if ratios[-2] < HELPS:
            helps[hidden] = max(helps[hidden], batch * length)
    return [
        *lines,
        "",
        f"Target at S={most}: {MAX_FOLDED}. Folding {most} particles saves more than "
        f"{1 - HELPS:.0%} up to "
        + ", ".join(
            f"{tokens} tokens a batch at hidden size {hidden}"
            for hidden, tokens in helps.items()
        )
        + "; beyond, it costs what a plain batch of that size costs (last column).",
    ]


def plain_step(network: PeftModel, texts: Texts) -> Callable[[], None]:
    """One step of PyTorch's Adam on the PEFT model's own parameters."""
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-4)

    def run() -> None:
        optimizer.zero_grad()
        (-forward(network, texts)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return run


def svi_step(lora: pl.LiftedNetwork, texts: Texts) -> Callable[[], None]:
    """One step of SVI with AutoDelta and Adam on the same network."""

    def model(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> None:
        logits = lora()(input_ids=input_ids, attention_mask=attention_mask).logits
        with pyro.plate("data", len(labels)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    pyro.clear_param_store()
    guide = AutoDelta(model, init_loc_fn=lora.init_to_adapter())
    svi = SVI(model, guide, Adam({"lr": 1e-4}), Trace_ELBO())
    return lambda: svi.step(**texts)


def one_step(size: Size, repeats: int, device: str) -> list[str]:
    """A row: a step of SVI, and a plain step."""
    texts, lora = size.texts(device), pl.lift(size.network(device))
    times = alternating_medians(
        {
            "plain": plain_step(size.network(device), texts),
            "SVI": svi_step(lora, texts),
        },
        repeats,
    )
    return [
        f"| {size} | {1e3 * times['plain']:.1f} | {1e3 * times['SVI']:.1f} | "
        f"{times['SVI'] / times['plain']:.3f} | {MAX_STEP} |"
    ]


def kept_bytes(function: Callable[[], Tensor], known: list[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass, beside ``known`` tensors."""
    given = {x.untyped_storage().data_ptr() for x in known}
    storages: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in given:
            storages[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output = function()  # alive, and so is what it keeps, until all is counted
    assert output.requires_grad
    return sum(storages.values())


def memory(size: Size, count: int, device: str) -> list[str]:
    """A row: activations of S particles, and of a plain batch S times as large."""
    network, lora = size.network(device), pl.lift(size.network(device))
    weights, texts = leaves(lora, count), size.texts(device)
    large = size.texts(device, copies=count)
    if device == "cpu":

        def lifted() -> Tensor:
            with lora.bind(weights) as net:
                return forward(net, texts)

        known = [*network.parameters(), *lora.network.parameters(), *weights.values()]
        found = kept_bytes(lifted, known)
        plain = kept_bytes(lambda: forward(network, large), known)
    else:
        passes = lifted_pass(lora, texts, weights), plain_pass(network, large)
        for run in passes:  # what the device takes once
            run()
        found, plain = (allocated(run, device) for run in passes)
    return [
        f"| {size}, S={count} | {plain / 2**20:.1f} | {found / 2**20:.1f} | "
        f"{found / plain:.3f} | {MAX_MEMORY} |"
    ]


def report(repeats: int, device: str, quick: bool) -> list[str]:
    """All tables, in Markdown."""
    if quick:
        sizes = [Size(layers=2, hidden=64, batch=4, length=16)]
        deep = sizes[0]
        grid = {"hidden": [64], "batch": [4], "length": [16]}
        counts = [1, 2]
    else:
        sizes = [
            Size(layers=6, hidden=384, batch=16, length=64),
            Size(layers=24, hidden=256, batch=8, length=64),
        ]
        deep = sizes[1]
        grid = {"hidden": [128, 384], "batch": [1, 4, 16], "length": [16, 128]}
        counts = [1, 2, 4, 8]
    rows = [row for size in sizes for row in one_particle(size, repeats, device)]
    kept = (
        "Activations kept for the backward pass" if device == "cpu" else "Peak memory"
    )
    lines = [
        "# Cost of lifting",
        "",
        "BERT with random weights, LoRA r=8 on query and value of every layer, two "
        f"classes, float32. Medians of {repeats}, the jobs taking turns.",
        "",
        provenance(device=device),
        "",
        "Forward and backward with one set of weights, in milliseconds:",
        "",
        *header("network", "plain PEFT", "lifted", "ratio", "target"),
        *rows,
        "",
        "Forward and backward of S particles at once, over S passes of one particle "
        "(two layers):",
        "",
        *folded_table(grid, counts, max(3, repeats // 3), device),
        "",
        "A training step, Adam on the PEFT model and SVI with AutoDelta, in "
        "milliseconds:",
        "",
        *header("network", "plain PyTorch", "SVI", "ratio", "target"),
        *one_step(deep, repeats, device),
        "",
        f"{kept}, in MiB, of a plain batch S times as large and of S particles:",
        "",
        *header("network", "plain PEFT", "lifted", "ratio", "target"),
        *(row for size in sizes for row in memory(size, counts[-1], device)),
        "",
    ]
    if device == "cpu" and keep_freed_memory():
        lines += [
            f"S particles at once once more, with `{SETTINGS}`, by which glibc keeps "
            "the memory of freed tensors:",
            "",
            *folded_table(grid, counts, max(3, repeats // 3), device),
            "",
        ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test, which writes nothing"
    )
    args = parser.parse_args()
    pyro.set_rng_seed(0)
    lines = report(1 if args.quick else args.repeats, args.device, args.quick)
    print("\n".join(lines))
    if not args.quick:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "lifting.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
